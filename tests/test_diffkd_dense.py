"""DiffKD on large maps: at a lower resolution, or with denoising steps run twice instead of kept."""

import pytest
import torch

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.levels import pooled
from diffkd.methods.base import Feature, Pair, Setup
from diffkd.methods.diffkd import DiffKDMethod
from diffkd.models.measure import SavedBytes

PAIRS = (
    Pair("map", Feature("map", (6, 16, 24)), Feature("map", (8, 16, 24))),
    Pair("output", Feature("", (5, 16, 24)), Feature("", (5, 16, 24)), is_logits=True),
)


def method(**options):
    torch.manual_seed(0)
    return DiffKDMethod(Setup(PAIRS, torch.nn.Identity(), torch.nn.Identity(), 5, 10), **options)


def features(size=(16, 24)):
    random = torch.Generator().manual_seed(1)
    widths = {"student": (6, 5), "teacher": (8, 5)}
    made = {
        side: {p.name: torch.rand(2, w, *size, generator=random) for p, w in zip(PAIRS, both, strict=True)}
        for side, both in widths.items()
    }
    return {n: x.requires_grad_() for n, x in made["student"].items()}, made["teacher"]


def losses_and_gradients(found, student, teacher, batch):
    torch.manual_seed(2)
    losses = found(student, teacher, batch)
    return losses, torch.autograd.grad(sum(losses.values()), [*student.values(), *found.parameters()])


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_recomputing_changes_neither_losses_nor_gradients_and_keeps_less(preset):
    student, teacher = features()
    batch = Batch(torch.rand(2, 3, 64, 96))
    saved, results, states = [], [], []
    for recompute in (False, True):
        found = method(preset=preset, recompute=recompute, warmup=0.0, num_steps=4)
        counted = SavedBytes()
        with counted:
            found(student, teacher, batch)
        saved.append(counted.total)
        found = method(preset=preset, recompute=recompute, warmup=0.0)
        results.append(losses_and_gradients(found, student, teacher, batch))
        states.append(dict(found.named_buffers()))
    (losses, gradients), (again, others) = results
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in again.items()}
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, others, strict=True))
    assert saved[1] < 0.8 * saved[0]


def test_pooled_maps_are_those_that_are_compared():
    student, teacher = features()
    batch = Batch(torch.rand(2, 3, 64, 96))
    small = [
        {n: torch.nn.functional.avg_pool2d(x, 4) for n, x in side.items()} for side in (student, teacher)
    ]
    torch.manual_seed(2)
    expected = method()(*small, batch)
    torch.manual_seed(2)
    found = method(pool=4)(student, teacher, batch)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_void_is_left_out_of_the_pooled_mean():
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, :2, :1] = False
    feature = torch.ones(1, 2, 4, 4)
    feature[:, :, :2, :1] = 99
    assert torch.equal(pooled(feature, valid, 2), torch.ones(1, 2, 2, 2))
    with pytest.raises(UserError, match="pool=0"):
        method(pool=0)
