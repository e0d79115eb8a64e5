"""Where what was made or found once is kept for the next run."""

import hashlib
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import platformdirs


def cache_folder() -> Path:
    """Where trained teachers are kept, and what else is made once: `$DIFFKD_CACHE`, or the user's folder."""
    return Path(os.environ.get("DIFFKD_CACHE") or platformdirs.user_cache_dir("diffkd"))


class Kept:
    """Arrays found in files, by the names of those files; one file beneath the cache folder.

    Args:
        kind: of what was found, a folder's name.
        names: what it was found in.
    """

    def __init__(self, kind: str, names: Iterable[str]) -> None:
        digest = hashlib.blake2b(digest_size=12)
        for name in names:
            digest.update(os.fsencode(name) + b"\0")
        self.place = cache_folder() / kind / f"{digest.hexdigest()}.npz"

    def load(self) -> dict[str, np.ndarray]:
        """What is kept; empty where there is nothing, or it is damaged."""
        try:
            with np.load(self.place, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return {}

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps arrays; where the cache cannot be written, they are found again next time."""
        partial = self.place.with_name(f"{self.place.stem}-{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                partial.replace(self.place)
            finally:
                partial.unlink(missing_ok=True)
        except OSError:
            pass
