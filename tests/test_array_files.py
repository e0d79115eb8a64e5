"""Arrays as others save them: other names of files and arrays, one file for all, labels in a column."""

import numpy as np
import pytest

from diffkd.data.base import builder
from diffkd.errors import UserError

X = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
Y = np.arange(6) % 3


def sizes(root):
    data = builder("arrays")(str(root))
    assert data.train.targets[:3].tolist() == [0, 1, 2]
    return data.num_classes, len(data.train), len(data.test)


@pytest.mark.parametrize(
    "files",
    [
        {"Train.npz": {"X": X, "Y": Y}, "Test.npz": {"X": X[:3], "Y": Y[:3]}},
        {"train.npz": {"images": X, "labels": Y[:, None]}, "val.npz": {"images": X[:3], "labels": Y[:3]}},
        {"mnist.npz": {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3]}},
        {"med.npz": {"train_images": X, "train_labels": Y, "val_images": X[:3], "val_labels": Y[:3]}},
        {"X_train.npy": X, "y_train.npy": Y, "X_test.npy": X[:3], "y_test.npy": Y[:3]},
    ],
)
def test_names_of_others_are_understood(tmp_path, files):
    for name, content in files.items():
        np.savez(tmp_path / name, **content) if isinstance(content, dict) else np.save(
            tmp_path / name, content
        )
    assert sizes(tmp_path) == (3, 6, 3)


def test_what_is_in_a_file_instead_is_said(tmp_path):
    np.savez(tmp_path / "train.npz", first=X)
    with pytest.raises(UserError, match=r"no x in '.*train\.npz' \(there: first\)"):
        builder("arrays")(str(tmp_path))
    np.savez(tmp_path / "train.npz", x=X)
    with pytest.raises(UserError, match=r"no y in '.*train\.npz' \(there: x\); add them"):
        builder("arrays")(str(tmp_path))
