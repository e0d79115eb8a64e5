"""FitNet, AT, SP, RKD, PKT, VID, MGD, OFD, CRD and ReviewKD against the formulas of their papers."""

import math

import pytest
import torch
from torch import nn

import oracle_features as oracle
from diffkd import Batch, Distiller, UserError
from diffkd.maths.layers import inner_products, unit
from diffkd.methods.base import Feature, Pair, Setup, method_class

NAMES = ("fitnet", "at", "sp", "rkd", "pkt", "vid", "mgd", "ofd", "crd", "reviewkd")
SAMPLES = 20
MAP, SMALL = ((6, 4, 4), (8, 4, 4)), ((5, 2, 2), (8, 2, 2))
LARGER, MIXED = ((6, 5, 4), (8, 2, 2)), ((6, 2, 5), (8, 3, 3))
VECTOR, SEQUENCE, VOLUME = ((6,), (8,)), ((6, 5), (8, 3)), ((6, 2, 3, 1), (8, 2, 2, 1))

pytestmark = pytest.mark.filterwarnings("ignore:tap .* resized")
ANY = pytest.mark.parametrize("shapes", [MAP, LARGER, MIXED, VECTOR, SEQUENCE, VOLUME], ids=str)
WITH_POSITIONS = pytest.mark.parametrize("shapes", [MAP, LARGER, MIXED, SEQUENCE, VOLUME], ids=str)
EACH = pytest.mark.parametrize("name", NAMES)


def setup(*shapes, dataset_size=SAMPLES):
    """One pair per (student's shape, teacher's)."""
    pairs = [Pair(f"layer.{i}", Feature("", a), Feature("", b)) for i, (a, b) in enumerate(shapes)]
    return Setup(tuple(pairs), nn.Identity(), nn.Identity(), num_classes=5, dataset_size=dataset_size)


def build(name, *shapes, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return method_class(name)(setup(*shapes or (MAP,)), **options).to(dtype)


def features(*shapes, batch=3, seed=0, dtype=torch.float64):
    """Random features of every pair: the student's (with gradient), the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        {
            f"layer.{i}": torch.randn(batch, *pair[side], generator=generator, dtype=torch.float64).to(dtype)
            for i, pair in enumerate(shapes or (MAP,))
        }
        for side in (0, 1)
    ]
    for feature in sides[0].values():
        feature.requires_grad_()
    return sides


def run(method, student, teacher, seed=1):
    """The losses, of random draws that `seed` repeats."""
    torch.manual_seed(seed)
    size = len(next(iter(student.values())))
    return method(student, teacher, Batch(torch.zeros(size, 3, 2, 2), None, torch.arange(size) * 3 + 1))


def state_of(method):
    return {name: value.detach().clone() for name, value in method.state_dict().items()}


def assert_same(losses, expected, student):
    """Values, and gradients with respect to the student's features."""
    assert list(losses) == list(expected)
    for name, loss in losses.items():
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-9)
        ours, theirs = (
            torch.autograd.grad(x, list(student.values()), retain_graph=True, allow_unused=True)
            for x in (loss, expected[name])
        )
        assert any(gradient is not None and gradient.any() for gradient in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# The methods, against the oracles


@ANY
@pytest.mark.parametrize("name", ["fitnet", "vid"])
def test_regressions(name, shapes):
    method, (student, teacher) = build(name, shapes), features(shapes)
    expected = getattr(oracle, name)(state_of(method), "layer_0", student["layer.0"], teacher["layer.0"])
    assert_same(run(method, student, teacher), {"layer.0.kd": expected}, student)


@ANY
@pytest.mark.parametrize("name", ["sp", "pkt"])
def test_similarities(name, shapes):
    student, teacher = features(shapes, batch=4)
    expected = getattr(oracle, name)(student["layer.0"], teacher["layer.0"])
    assert_same(run(build(name, shapes), student, teacher), {"layer.0.kd": expected}, student)


@ANY
def test_rkd(shapes):
    student, teacher = features(shapes, batch=4)
    both = student["layer.0"], teacher["layer.0"]
    expected = {
        "layer.0.distance": 25 * oracle.rkd_distance(*both),
        "layer.0.angle": 50 * oracle.rkd_angle(*both),
    }
    assert_same(run(build("rkd", shapes), student, teacher), expected, student)
    halves = run(build("rkd", shapes, distance_weight=12.5, angle_weight=0), student, teacher)
    torch.testing.assert_close(halves["layer.0.distance"], expected["layer.0.distance"] / 2)
    assert halves["layer.0.angle"] == 0


@WITH_POSITIONS
@pytest.mark.parametrize("power", [2.0, 3])
def test_at(shapes, power):
    student, teacher = features(shapes)
    expected = oracle.attention(student["layer.0"], teacher["layer.0"], power)
    assert_same(run(build("at", shapes, power=power), student, teacher), {"layer.0.kd": expected}, student)


@pytest.mark.parametrize("shapes", [MAP, LARGER, MIXED, SEQUENCE, ((8, 3), (8, 3))], ids=str)
@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_mgd(shapes, ratio):
    method, (student, teacher) = build("mgd", shapes, mask_ratio=ratio), features(shapes)
    found = run(method, student, teacher, seed=7)
    torch.manual_seed(7)
    size = [min(pair) for pair in zip(shapes[0][1:], shapes[1][1:], strict=True)]
    kept = torch.rand(3, 1, *size) >= ratio
    assert kept.all() == (ratio == 0)
    expected = oracle.mgd(state_of(method), "layer_0", student["layer.0"], teacher["layer.0"], kept)
    assert_same(found, {"layer.0.kd": expected}, student)


@ANY
def test_ofd(shapes):
    method = build("ofd", shapes, SMALL)
    state, seen = state_of(method), {"layer.0": [], "layer.1": []}
    for step in range(2):
        student, teacher = features(shapes, SMALL, seed=step)
        teacher["layer.1"][:, 0] = teacher["layer.1"][:, 0].abs()
        expected = {}
        for later, name in ((1, "layer.0"), (0, "layer.1")):
            seen[name].append(oracle.common(student[name], teacher[name])[1])
            margins = oracle.negative_means(seen[name])
            expected[f"{name}.kd"] = oracle.ofd(
                state, name.replace(".", "_"), student[name], teacher[name], margins, later
            )
        assert_same(run(method, student, teacher), expected, student)
    margin = method.connectors["layer_1"].margin
    torch.testing.assert_close(margin, torch.stack(oracle.negative_means(seen["layer.1"])))
    assert margin[0] == 0
    assert (margin[1:] < 0).all()


def test_ofd_as_for_imagenet():
    sides = features()
    plain, imagenet = (run(build("ofd", **o), *sides)["layer.0.kd"] for o in ({}, {"divisor": 10_000.0}))
    torch.testing.assert_close(imagenet * 10, plain)


def test_ofd_with_the_teacher_in_training_mode():
    def net(channels):
        torch.manual_seed(channels)
        return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())

    images, teacher = torch.rand(4, 3, 8, 8), net(5)
    options = {"ofd": {"teacher_training": True}}
    distiller = Distiller(net(4), teacher, {"1": "1"}, options, images)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        maps = teacher[0](images)
    own = (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.var((0, 2, 3), False, True) + 1e-5).sqrt()
    distiller.train()
    torch.testing.assert_close(distiller.features(images)[1]["1"], own)
    distiller.eval()
    assert not torch.allclose(distiller.features(images)[1]["1"], own, atol=0.1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


@ANY
def test_crd(shapes):
    options = {"temperature": 0.2, "momentum": 0.25}
    method = build("crd", shapes, width=4, negatives=6, **options)
    expected = oracle.CRD(state_of(method), "layer_0", **options)
    for step in range(3):
        student, teacher = features(shapes, seed=step)
        found = run(method, student, teacher, seed=step)
        torch.manual_seed(step)
        drawn = torch.randint(SAMPLES, (3, 6))
        loss = expected.step(student["layer.0"], teacher["layer.0"], torch.tensor([1, 4, 7]), drawn)
        assert_same(found, {"layer.0.kd": loss}, student)
    for side in ("student", "teacher"):
        memory = getattr(method.contrasts["layer_0"], side)
        torch.testing.assert_close(memory.vectors, expected.memory[side], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(memory.log_z.exp(), expected.z[side])


STAGES = [
    (((4, 6, 6), (5, 6, 6)), MAP, ((5, 2, 2), (8, 2, 2))),
    (((4, 3, 3), (5, 3, 3)), ((4, 3, 3), (6, 3, 3))),
    (((4, 5, 6), (5, 3, 3)), ((4, 3, 2), (6, 4, 4)), ((4, 1, 1), (6, 1, 1))),
]


@pytest.mark.parametrize("shapes", STAGES, ids=["pyramid", "one size", "unequal"])
@pytest.mark.parametrize("width", [None, 3])
def test_reviewkd(shapes, width):
    method, (student, teacher) = build("reviewkd", *shapes, width=width), features(*shapes, batch=2)
    keys = [f"layer_{i}" for i in range(len(shapes))]
    stages = oracle.reviewkd(state_of(method), keys, list(student.values()), list(teacher.values()))
    expected = {f"{name}.kd": loss for name, loss in zip(student, stages, strict=True)}
    assert_same(run(method, student, teacher), expected, student)


# What holds for all


@EACH
@pytest.mark.parametrize("shapes", [MAP, ((6, 1, 1), (8, 1, 1)), VECTOR], ids=str)
def test_a_single_sample_is_finite(name, shapes):
    if len(shapes[0]) == 1 and name in ("at", "mgd", "reviewkd"):
        pytest.skip("not for vectors")
    student, teacher = features(shapes, batch=1)
    losses = run(build(name, shapes), student, teacher)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert student["layer.0"].grad.isfinite().all()
    if name in ("rkd", "sp", "pkt"):
        assert sum(losses.values()).abs() < 1e-12


@EACH
def test_features_of_zeros_have_gradients_of_a_sane_size(name):
    student, teacher = features(dtype=torch.float32)
    dead = torch.zeros_like(student["layer.0"])
    dead[2] = 1.0
    dead.requires_grad_()
    sum(run(build(name, dtype=torch.float32), {"layer.0": dead}, teacher).values()).backward()
    assert dead.grad.abs().max() < 1e3


@EACH
def test_teacher_gets_no_gradient_and_everything_else_does(name):
    student, teacher = features(MAP, SMALL)
    for feature in teacher.values():
        feature.requires_grad_()
    method = build(name, MAP, SMALL)
    sum(run(method, student, teacher).values()).backward()
    assert all(feature.grad is None for feature in teacher.values())
    assert all(feature.grad.any() for feature in student.values())
    assert all(parameter.grad is not None for parameter in method.parameters())


@EACH
def test_names_of_losses_and_state(name):
    losses = run(build(name, MAP, SMALL), *features(MAP, SMALL))
    kinds = ("distance", "angle") if name == "rkd" else ("kd",)
    assert list(losses) == [f"layer.{i}.{kind}" for i in range(2) for kind in kinds]
    kind = method_class(name)
    assert kind.uses_logits is False
    assert kind.stages == ("all" if name in ("at", "vid", "ofd", "reviewkd") else "last")


@pytest.mark.parametrize("name", ["at", "sp", "rkd", "pkt"])
def test_a_copy_of_the_teacher_is_perfect(name):
    student, _ = features()
    teacher = {key: value.detach() for key, value in student.items()}
    assert sum(run(build(name), student, teacher).values()).abs() < 1e-12


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(name, dtype):
    student, teacher = features(dtype=dtype)
    method = build(name, dtype=torch.float32)
    state = state_of(method)
    with torch.autocast("cpu", dtype=dtype):
        found = run(method, student, teacher)
    sum(found.values()).backward()
    assert student["layer.0"].grad.isfinite().all()
    method.load_state_dict(state)
    wanted = run(method, *({k: v.float() for k, v in side.items()} for side in (student, teacher)))
    for key, loss in found.items():
        assert loss.dtype == torch.float32
        without_layers = name in ("at", "sp", "rkd", "pkt")
        torch.testing.assert_close(loss, wanted[key], rtol=1e-4 if without_layers else 0.1, atol=1e-6)


@EACH
def test_one_graph_for_the_compiler(name):
    torch.compiler.reset()
    method, (student, teacher) = build(name, LARGER, SMALL), features(LARGER, SMALL)
    state = state_of(method)
    wanted = run(method, student, teacher)
    method.load_state_dict(state)
    found = run(torch.compile(method, fullgraph=True, backend="eager"), student, teacher)
    torch.testing.assert_close(found, wanted)


@EACH
def test_state_is_taken_up_again(name):
    method = build(name)
    run(method, *features())
    other = build(name)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(run(other, *features(seed=1)), run(method, *features(seed=1)))


@pytest.mark.parametrize("name", ["ofd", "crd"])
def test_evaluation_leaves_the_state_alone(name):
    method = build(name).eval()
    before = state_of(method)
    assert all(loss.isfinite() for loss in run(method, *features()).values())
    torch.testing.assert_close(state_of(method), before, rtol=0, atol=0)


def test_vid_starts_at_the_variance_asked_for():
    for variance in (5.0, 1e-3, 1000.0):
        raw = build("vid", initial_variance=variance).gaussians["layer_0"].raw_variance
        found = nn.functional.softplus(raw) + 1e-5
        torch.testing.assert_close(found, torch.full_like(found, variance), rtol=1e-4, atol=0)


def test_crd_draws_no_more_negatives_than_there_are_samples():
    assert build("crd").negatives == SAMPLES
    assert build("crd", negatives=7).negatives == 7
    memory = build("crd").contrasts["layer_0"].teacher
    assert memory.vectors.shape == (SAMPLES, 128)
    assert math.isinf(memory.log_z)


# Mistakes


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("at", "power", 0.5, "at least 1"),
        ("rkd", "distance_weight", -1.0, "at least 0"),
        ("rkd", "angle_weight", -1.0, "at least 0"),
        ("pkt", "eps", 0.0, "more than 0"),
        ("vid", "initial_variance", 0.0, "more than"),
        ("mgd", "mask_ratio", 1.0, "below 1"),
        ("mgd", "mask_ratio", -0.1, "from 0"),
        ("crd", "width", 0, "more than 0"),
        ("crd", "negatives", 0, "more than 0"),
        ("crd", "temperature", 0, "more than 0"),
        ("crd", "momentum", 1.0, "below 1"),
        ("reviewkd", "width", 0, "more than 0"),
    ],
)
def test_impossible_options(name, option, value, words):
    with pytest.raises(UserError, match=f"^{option}={value}: .*{words}"):
        build(name, **{option: value})


@EACH
def test_features_that_cannot_be_distilled(name):
    with pytest.raises(UserError, match=f"'{name}' needs a feature map"):
        method_class(name)(setup())
    with pytest.raises(UserError, match=f"'{name}', tap 'layer.0'.*spatial axes"):
        build(name, ((6, 4, 4), (8, 16)))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("at", VECTOR), ("mgd", VECTOR), ("reviewkd", VECTOR), ("reviewkd", SEQUENCE), ("reviewkd", VOLUME)],
)
def test_kinds_that_a_method_cannot_serve(name, shapes):
    with pytest.raises(UserError, match=f"method '{name}', tap 'layer.1': .*choose method 'fitnet'"):
        build(name, MAP, shapes)


def test_crd_says_what_it_lacks():
    with pytest.raises(UserError, match="dataset_size"):
        method_class("crd")(setup(MAP, dataset_size=None))
    with pytest.raises(UserError, match="indices"):
        build("crd")(*features(), Batch(torch.zeros(3, 3, 2, 2)))


# The layers


def test_unit_of_zero_has_a_finite_gradient():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit(vectors).sum().backward()
    torch.testing.assert_close(vectors.grad, torch.tensor([[1.0, 1.0], [0.032, -0.024]]))


def test_inner_products_keep_their_precision_under_autocast():
    a = torch.rand(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a.mT).dtype == torch.bfloat16
        torch.testing.assert_close(inner_products(a, a), (a[:, None] * a).sum(2))
