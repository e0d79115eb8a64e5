"""KD, DKD, DIST, MLKD, OFA and SimKD against the formulas of their papers."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import oracle_logits as oracle
from diffkd import Batch, UserError
from diffkd.maths.losses import hard_targets
from diffkd.methods.base import Feature, Pair, Setup, method_class
from diffkd.methods.choice import chosen_methods

K = 4
ON_LOGITS = ("kd", "dkd", "dist", "mlkd")
NAMES = (*ON_LOGITS, "ofa", "simkd")
LABELS = torch.tensor([1, 3, 0])


def setup(*shape, features=()):
    """A pair of class scores, and one per feature: (student's shape, teacher's)."""
    pairs = [Pair(f"f.{i}", Feature("", a), Feature("", b)) for i, (a, b) in enumerate(features)]
    if shape:
        pairs.append(Pair("output", Feature("", shape), Feature("", shape), True))
    return Setup(tuple(pairs), student=nn.Identity(), teacher=nn.Identity(), num_classes=K)


FEATURES = [((3, 4, 4), (5, 2, 2)), ((6, 5), (6, 5)), ((7,), (4,)), ((3, 1, 1), (2, 1, 1))]


def build(name, given=None, **options):
    torch.manual_seed(0)
    if given is None:
        given = setup(*() if name == "simkd" else (K,), features=() if name in ON_LOGITS else FEATURES)
    return method_class(name)(given, **options)


def randoms(*shape, seed=0, count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def inputs(size, dtype=torch.float32):
    """Random tensors for every pair of what `build` makes: the student's (with gradient), the teacher's."""
    student, teacher = {}, {}
    for i, shapes in enumerate([*FEATURES, ((K,), (K,))]):
        name = f"f.{i}" if i < len(FEATURES) else "output"
        student[name], teacher[name] = (
            randoms(size, *shape, seed=seed, count=1, dtype=dtype)[0] for seed, shape in enumerate(shapes)
        )
        student[name].requires_grad_()
    return student, teacher


def run(method, student, teacher, targets=None):
    batch = Batch(torch.zeros(len(student), 3, 2, 2), targets)
    return method({"output": student}, {"output": teacher}, batch)


def assert_same(losses, expected, student):
    """Values, and gradients with respect to the student's scores."""
    assert list(losses) == list(expected)
    for name, loss in losses.items():
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-9)
        ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected[name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


SHAPES = pytest.mark.parametrize("shape", [(3, K), (2, K, 2, 3), (2, K, 3), (1, K, 1, 2, 2)])


@SHAPES
@pytest.mark.parametrize("standardize", [False, True])
def test_kd(shape, standardize):
    student, teacher = randoms(*shape)
    student.requires_grad_()
    method = build("kd", setup(*shape[1:]), temperature=2.5, standardize=standardize)
    expected = {"output.kd": oracle.kd(student, teacher, 2.5, standardize)}
    assert_same(run(method, student, teacher), expected, student)


@SHAPES
@pytest.mark.parametrize("standardize", [False, True])
def test_dkd(shape, standardize):
    student, teacher = randoms(*shape)
    student.requires_grad_()
    labels = torch.randint(0, K, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    options = {"alpha": 0.5, "beta": 3.0, "temperature": 2.5, "standardize": standardize}
    method = build("dkd", setup(*shape[1:]), **options)
    found = oracle.dkd(student, teacher, labels.flatten().tolist(), 0.5, 3.0, 2.5, standardize)
    expected = dict(zip(("output.target", "output.non_target"), found, strict=True))
    assert_same(run(method, student, teacher, labels), expected, student)


@SHAPES
def test_dist(shape):
    student, teacher = randoms(*shape)
    student.requires_grad_()
    method = build("dist", setup(*shape[1:]), beta=0.5, gamma=3.0, temperature=2.5)
    found = oracle.dist(student, teacher, 0.5, 3.0, 2.5)
    expected = dict(zip(("output.inter", "output.intra"), found, strict=True))
    assert_same(run(method, student, teacher), expected, student)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("standardize", [False, True])
def test_mlkd(size, standardize):
    student, teacher = randoms(size, K)
    student.requires_grad_()
    method = build("mlkd", temperatures=(1.5, 4), standardize=standardize)
    found = oracle.mlkd(student, teacher, (1.5, 4), standardize)
    expected = dict(zip((f"output.{k}" for k in ("instance", "batch", "class")), found, strict=True))
    assert_same(run(method, student, teacher), expected, student)


def test_ofa_on_vectors_and_the_students_own_scores():
    student, teacher = randoms(3, K)
    student.requires_grad_()
    (feature,) = randoms(3, 5, seed=1, count=1)
    method = build(
        "ofa", setup(K, features=[((5,), (2,))]), eps=1.4, logits_eps=1.1, temperature=2.0
    ).double()
    head = method.heads["f_0"].classifier
    given = {"f.0": feature.requires_grad_(), "output": student}
    losses = method(given, {"f.0": torch.zeros(3, 2), "output": teacher}, Batch(torch.zeros(3), LABELS))
    logits = oracle.linear(head.weight, feature[..., None])[..., 0] + head.bias
    own = oracle.ofa(student, teacher, LABELS, 1.1, 2.0)
    assert_same({"output.kd": losses["output.kd"]}, {"output.kd": own}, student)
    assert_same(
        {"f.0.kd": losses["f.0.kd"]}, {"f.0.kd": oracle.ofa(logits, teacher, LABELS, 1.4, 2.0)}, feature
    )


def test_ofas_head_on_sequences():
    method = build("ofa", setup(K, features=[((2, 3), (5, 9))])).double()
    (feature,) = randoms(2, 2, 3, count=1)
    head = method.heads["f_0"]
    x = oracle.linear(head.body[1].weight[..., 0], oracle.depthwise(head.body[0].weight, feature))
    pooled = oracle.relu(oracle.batch_norm(x)).sum(2) / 3
    expected = oracle.linear(head.classifier.weight, pooled[..., None])[..., 0] + head.classifier.bias
    torch.testing.assert_close(head(feature), expected, rtol=1e-9, atol=1e-9)
    assert pooled.shape == (2, 5)


@pytest.mark.parametrize("lengths", [(3, 3), (4, 2), (2, 4)])
def test_simkd(lengths):
    ours, theirs = ((2, lengths[0]), (5, lengths[1]))
    with pytest.warns(UserWarning, match="resized") if lengths[0] != lengths[1] else nullcontext():
        method = build("simkd", setup(features=[(ours, theirs)])).double()
    student, teacher = randoms(3, *ours, count=1)[0], randoms(3, *theirs, seed=1, count=1)[0]
    (loss,) = method({"f.0": student}, {"f.0": teacher}, Batch(torch.zeros(3))).values()
    x, target = (z.unflatten(2, (min(lengths), -1)).sum(3) for z in (student, teacher))
    x, target = x * min(lengths) / lengths[0], target * min(lengths) / lengths[1]
    narrow, middle, wide = (layer.weight for layer in method.projectors["f_0"][::3])
    assert narrow.shape[0] == 2
    x = oracle.relu(oracle.batch_norm(oracle.linear(narrow[..., 0], x)))
    x = oracle.relu(oracle.batch_norm(oracle.full_convolution(middle, x)))
    x = oracle.relu(oracle.batch_norm(oracle.linear(wide[..., 0], x)))
    expected = ((x - target) ** 2).sum() / target.numel()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    student, teacher = randoms(5, K)
    method = build(name)
    same, other = run(method, teacher, teacher), run(method, student, teacher)
    for key, loss in same.items():
        assert abs(loss) < 1e-5 < 1e-3 < other[key]


def test_ofa_is_least_where_the_student_is_like_its_teacher_with_eps_1():
    _, teacher = randoms(3, K)
    method = build("ofa", setup(K, features=[((5,), (2,))]), eps=1.0).double()
    student = teacher.clone().requires_grad_()
    features = {"f.0": torch.zeros(3, 5, dtype=torch.float64)}
    loss = method(features | {"output": student}, {"output": teacher}, Batch(torch.zeros(3), LABELS))[
        "output.kd"
    ]
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "keys"), [("kd", ["kd"]), ("dkd", ["target", "non_target"]), ("mlkd", ["instance"])]
)
def test_standardized_losses_do_not_see_scale_and_shift(name, keys):
    student, teacher = randoms(3, K)
    method = build(name, standardize=True)
    plain = run(method, student, teacher, LABELS)
    moved = run(method, 7 * student - 2, 0.5 * teacher + 9, LABELS)
    for key in keys:
        torch.testing.assert_close(plain[f"output.{key}"], moved[f"output.{key}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:tap")
def test_few_samples_and_half_precision_give_finite_losses(name, size, dtype):
    method = build(name)
    student, teacher = inputs(size, dtype)
    losses = method(student, teacher, Batch(torch.zeros(size), LABELS[:size]))
    assert losses
    for loss in losses.values():
        assert loss.dtype == torch.float32
    sum(losses.values()).backward()
    gradients = [x.grad for x in (*student.values(), *method.parameters()) if x.grad is not None]
    assert gradients
    for value in (*losses.values(), *gradients):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd", "dist"])
def test_sure_models_give_finite_gradients(name):
    """Probabilities that are 0 and 1 in float32."""
    student = (1000 * torch.eye(K)).requires_grad_()
    losses = run(
        build(name, **({} if name == "mlkd" else {"temperature": 1.0})), student, 1000 * torch.eye(K).flip(0)
    )
    sum(losses.values()).backward()
    assert student.grad.isfinite().all()
    assert torch.stack(list(losses.values())).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:tap")
def test_every_method_is_one_graph(name):
    method = build(name)
    student, teacher = inputs(3)
    batch = Batch(torch.zeros(3), LABELS)
    compiled = torch.compile(method, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, batch), method(student, teacher, batch))


def test_mlkd_is_as_precise_under_autocast():
    student, teacher = randoms(5, K, dtype=torch.float32)
    method = build("mlkd")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(method, student, teacher)
    torch.testing.assert_close(inside, run(method, student, teacher))


VOID = torch.tensor([[[0, 255], [3, -1]], [[1, 2], [K, 3]]])


def test_dkd_leaves_out_void_pixels():
    student, teacher = randoms(2, K, 2, 2)
    student.requires_grad_()
    method = build("dkd", setup(K, 2, 2))
    found = oracle.dkd(student, teacher, VOID.flatten().tolist(), 1.0, 8.0, 4.0)
    losses = run(method, student, teacher, VOID)
    assert_same(losses, dict(zip(("output.target", "output.non_target"), found, strict=True)), student)
    (gradient,) = torch.autograd.grad(sum(losses.values()), student)
    assert (gradient.abs().amax(1) == 0).equal((VOID < 0) | (VOID >= K))
    nothing = run(method, student, teacher, torch.full_like(VOID, 255))
    assert [loss.item() for loss in nothing.values()] == [0.0, 0.0]


def test_dense_scores_of_two_sizes_meet_at_the_smaller():
    student, teacher = randoms(1, K, 4, 4, count=1)[0], randoms(1, K, 2, 2, count=1)[0]
    pair = Pair("output", Feature("", (K, 4, 4)), Feature("", (K, 2, 2)), True)
    with pytest.warns(UserWarning, match="resized"):
        method = build("kd", Setup((pair,), nn.Identity(), nn.Identity()))
    small = student.unflatten(2, (2, 2)).unflatten(4, (2, 2)).sum((3, 5)) / 4
    torch.testing.assert_close(run(method, student, teacher)["output.kd"], oracle.kd(small, teacher, 1.0))


def test_labels_of_every_kind():
    logits = randoms(2, K, 2, 2, count=1)[0]
    maps = torch.arange(32).view(2, 4, 4)
    labels, known = hard_targets(maps, logits)
    nearest = maps[:, 1::2, 1::2]
    assert labels.equal(nearest.clamp(max=K - 1))
    assert known.equal(nearest < K)
    probabilities = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.0, 0.0, 0.5, 0.5]])
    assert hard_targets(probabilities, logits[:, :, 0, 0])[0].tolist() == [1, 2]
    assert hard_targets(None, logits)[0].equal(logits.argmax(1))
    for wrong in ([{"boxes": maps}], torch.zeros(2), torch.zeros(2, 3, 4, 4, 4)):
        with pytest.raises(UserError, match="targets"):
            hard_targets(wrong, logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {"temperature": 0}, "temperature=0: needs more than 0"),
        ("kd", {"temperature": float("nan")}, "temperature=nan: needs more than 0"),
        ("dkd", {"temperature": -1.0}, "temperature=-1.0: needs more than 0"),
        ("dkd", {"alpha": -1.0}, "alpha=-1.0: needs at least 0"),
        ("dkd", {"beta": -2}, "beta=-2: needs at least 0"),
        ("dist", {"beta": -1}, "beta=-1: needs at least 0"),
        ("dist", {"gamma": -1}, "gamma=-1: needs at least 0"),
        ("dist", {"temperature": 0.0}, "temperature=0.0: needs more than 0"),
        ("mlkd", {"temperatures": (2.0, 0.0)}, "temperatures=0.0: needs more than 0"),
        ("mlkd", {"temperatures": []}, "temperatures=\\[\\]: needs at least one"),
        ("ofa", {"eps": 0}, "eps=0: needs more than 0"),
        ("ofa", {"logits_eps": -1}, "logits_eps=-1: needs more than 0"),
        ("ofa", {"temperature": 0}, "temperature=0: needs more than 0"),
        ("simkd", {"factor": 0}, "factor=0: needs more than 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:tap")
def test_impossible_options(name, options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        build(name, **options)


FEATURE = ((3, 4, 4), (5, 4, 4))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        *[(name, setup(features=[FEATURE]), "needs class scores") for name in (*ON_LOGITS, "ofa")],
        *[(name, setup(1, features=[FEATURE]), "1 class score") for name in (*ON_LOGITS, "ofa")],
        ("mlkd", setup(K, 2, 2), "per position"),
        ("ofa", setup(K), "needs a feature"),
        ("ofa", setup(K, 2, 2, features=[FEATURE]), "needs class scores \\(K,\\)"),
        ("simkd", setup(K), "needs a feature"),
        ("simkd", setup(features=[((3, 4, 4), (5, 4))]), "spatial axes"),
    ],
)
def test_models_that_a_method_cannot_serve(name, given, message):
    with pytest.raises(UserError, match=message):
        build(name, given)


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd"])
def test_two_standardized_classes_teach_nothing(name):
    with pytest.raises(UserError, match="only their order is left"):
        build(name, setup(2), standardize=True)


@pytest.mark.parametrize(("name", "loss"), [("dkd", "non_target"), ("dist", "inter")])
def test_a_loss_without_work_for_two_classes_says_so(name, loss):
    with pytest.warns(UserWarning, match=f"of two classes the loss '{loss}' teaches nothing"):
        method = build(name, setup(2))
    ours, theirs = randoms(4, 2)
    ours.requires_grad_()
    losses = method({"output": ours}, {"output": theirs}, Batch(torch.zeros(4, 3, 2, 2)))
    (gradient,) = torch.autograd.grad(losses[f"output.{loss}"], ours)
    assert gradient.abs().max() < 1e-4


def test_ofas_own_scores_have_the_heads_eps():
    given = setup(4, features=[((5,), (2,))])
    one = method_class("ofa")(given, eps=1.5)
    assert (one.logits_eps, method_class("ofa")(given).eps) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("name", "weight", "same"),
    [
        ("kd", 9.0, {"temperature": 2.0}),
        ("mlkd", 9.0, {"temperatures": (2.0, 3.0, 2.0, 5.0, 6.0)}),
        ("dkd", 1.0, {"alpha": 9.0, "beta": 81.0, "temperature": 2.0}),
    ],
)
def test_standardized_scores_weigh_as_published(name, weight, same):
    assert chosen_methods({name: {"standardize": True}})[name].weight == weight
    student, teacher = torch.randn(2, 6, 5)
    batch = Batch(torch.zeros(6, 1), torch.arange(6) % 5)
    usual, named = (build(name, setup(5), standardize=True, **options) for options in ({}, same))
    for key, value in named({"output": student}, {"output": teacher}, batch).items():
        torch.testing.assert_close(usual({"output": student}, {"output": teacher}, batch)[key], value)
