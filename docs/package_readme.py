"""The README as the package's description: a page that shows it elsewhere has none of the files beside it."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ELSEWHERE = (
    "Files named here come with the source: unpack what "
    "`pip download --no-deps --no-binary :all: diffkd` brings.\n"
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


class PackageReadme(MetadataHookInterface):
    """Hands the README to the build."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Puts the text among the project's metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source", "")
        metadata["readme"] = {"content-type": "text/markdown", "text": standalone(text, source)}


def standalone(text: str, source: str = "") -> str:
    """A text whose links to files lead to where the source is shown, or, without such a place, name the file.

    Args:
        text: Markdown.
        source: the address of the repository; pictures need one and are left out without.
    """

    def moved(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if source:
            return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/main/{path})"
        if picture:
            return ""
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    told = "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)
    head = "" if source else f"\n{ELSEWHERE}"
    return re.sub(r"(^## Read on\n)", rf"\1{head}\n" if head else r"\1", told, flags=re.MULTILINE)
