"""DiffKD on the levels of a pyramid: shared modules, weights, pooled maps."""

import pytest
import torch
from torch import nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.pairs import Feature, Pair
from diffkd.methods.base import Setup
from diffkd.methods.diffkd import DiffKDMethod

SIZES = {"p3": 8, "p4": 4, "p5": 2}
SETUP = Setup(
    tuple(Pair(n, Feature(n, (4, s, s)), Feature(n, (6, s, s))) for n, s in SIZES.items()),
    nn.Identity(),
    nn.Identity(),
)


def features(channels, factor=1):
    random = torch.Generator().manual_seed(channels)
    sides = {name: size * factor for name, size in SIZES.items()}
    return {name: torch.randn(2, channels, side, side, generator=random) for name, side in sides.items()}


def losses(method, factor=1, valid=None):
    torch.manual_seed(0)
    return method(features(4, factor), features(6, factor), Batch(torch.zeros(2, 3, 64, 64), valid=valid))


def built(**options):
    torch.manual_seed(1)
    return DiffKDMethod(SETUP, preset="paper", num_steps=2, **options)


def test_one_module_a_level_or_one_for_all():
    apart, shared = built(), built(shared=True)
    assert (len(apart.pairs), len(shared.pairs)) == (3, 1)
    count = [sum(p.numel() for p in method.parameters()) for method in (apart, shared)]
    assert count[0] == 3 * count[1]
    assert set(losses(apart)) == set(losses(shared))


def test_the_warm_up_of_a_shared_module_counts_its_levels():
    method = DiffKDMethod(SETUP, shared=True, warmup=0.5)
    method.expect(10)
    [diffkd] = method.pairs.values()
    assert diffkd.gate.waits == 15
    losses(method.train())
    assert diffkd.gate.seen == 3


def test_a_weight_scales_the_distance_of_its_level():
    plain, weighted = losses(built()), losses(built(weights={"p4": 0.25, "p5": 0.0}))
    assert torch.equal(weighted["p3.kd"], plain["p3.kd"])
    assert torch.allclose(weighted["p4.kd"], plain["p4.kd"] * 0.25)
    assert weighted["p5.kd"] == 0
    assert torch.equal(weighted["p5.diffusion"], plain["p5.diffusion"])


def test_pooled_maps_are_as_if_averaged_before():
    fine, method, plain = features(4, 2), built(pool=2), built()
    averaged = {name: nn.functional.avg_pool2d(x, 2) for name, x in fine.items()}
    teacher = {name: nn.functional.avg_pool2d(x, 2) for name, x in features(6, 2).items()}
    torch.manual_seed(0)
    by_hand = plain(averaged, teacher, Batch(torch.zeros(2, 3, 64, 64)))
    assert all(torch.allclose(value, by_hand[name]) for name, value in losses(method, 2).items())


def test_pooling_leaves_padding_out():
    method, valid = built(pool=2), torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, :, 32:] = False
    student, teacher = features(4, 2), features(6, 2)
    found = []
    for junk in (0.0, 1e4):
        for x in (*student.values(), *teacher.values()):
            x[..., x.shape[-1] // 2 :] = junk
        torch.manual_seed(0)
        found.append(method(student, teacher, Batch(torch.zeros(2, 3, 64, 64), valid=valid)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_mistakes():
    with pytest.raises(UserError, match="names no pair 'p6'"):
        built(weights={"p6": 1.0})
    with pytest.raises(UserError, match="less than 0"):
        built(weights={"p3": -1.0})
    with pytest.raises(UserError, match="pool=0"):
        built(pool=0)
