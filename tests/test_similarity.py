"""How alike features are: the estimator's values, which pictures are asked, and comparisons without any."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffkd.pictures.held import classes_in, part_of, spread
from diffkd.report import compare
from diffkd.report.similarity import linear_cka


def _noise(count, channels, seed):
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [200, 1000])
def test_independent_noise_scores_nought_however_wide(count):
    assert abs(linear_cka(_noise(count, 512, 0), _noise(count, 1024, 1))) < 0.05


def test_the_estimator_is_the_mean_over_four_tuples():
    """Unbiased HSIC is a U-statistic: the mean, over all four different samples, of its kernel."""
    from itertools import permutations

    x, y = (_noise(7, 3, seed).double() for seed in (0, 1))
    k, other = (x @ x.T).numpy(), (y @ y.T).numpy()

    def hsic(a, b):
        four = list(permutations(range(7), 4))
        return np.mean([a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in four])

    expected = hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_features_that_say_nothing_have_no_figure():
    assert linear_cka(torch.ones(50, 4), _noise(50, 4, 0)) is None
    assert linear_cka(_noise(3, 4, 0), _noise(3, 4, 1)) is None


def test_pictures_are_spread_over_the_classes_whatever_their_order():
    labels = np.arange(100).repeat(50)
    chosen = spread(labels, 5000, 250)
    counts = np.bincount(labels[chosen], minlength=100)
    assert counts.min() == 2
    assert counts.max() == 3
    assert len(np.unique(chosen)) == 250
    assert spread(None, 5000, 2).tolist() == [0, 4999]


def test_the_splits_own_labels_are_found(monkeypatch, tiny):
    from diffkd.assembly import assemble
    from diffkd.recipe.schema import load

    test = assemble(load(str(tiny)), with_teacher=False).data.test
    labels = classes_in(test)
    assert len(labels) == len(test)
    assert set(labels.tolist()) == set(load_digits().target)
    some = part_of(test, spread(labels, len(test), 20), training=False)
    batch = some.to(torch.device("cpu")).batch(torch.arange(20), 0)
    assert batch.targets.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("broken", [False, True])
def test_the_report_is_written_without_features(broken, diffkd, tiny, tmp_path, monkeypatch):
    words = ["methods=none,kd", "seeds=1", "trainer.epochs=1", "output=c"]
    if broken:
        monkeypatch.setattr(compare, "similarity", lambda *_: 1 / 0)
    else:
        words.append("taps={'': ''}")
    status, _, err = diffkd("compare", "tiny.yaml", *words)
    assert status == 0, err
    assert (tmp_path / "c/report.html").read_text().count("features are not compared") == 2
