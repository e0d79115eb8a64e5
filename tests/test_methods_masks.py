"""What holds for every method where a part of the picture is void: padding, or pixels without a label."""

import warnings
from itertools import product

import pytest
import torch
from torch import nn

from diffkd import Batch, DiffKD, UserError
from diffkd.maths.layers import norm
from diffkd.methods.base import Feature, Pair, Setup, method_class
from diffkd.names import submodules
from toy_parts import DenseHead

METHODS = [name for name in submodules("diffkd.methods") if name != "none"]
CLASSES, SIZE, WIDE = 5, 16, 24  # pixels; pictures of 16 x 16 are padded to 16 x 24
# Student's and teacher's maps: pixels per position.
STRIDES = pytest.mark.parametrize("strides", [(2, 2), (2, 4), (4, 2)], ids=str)
EACH = pytest.mark.parametrize("method", METHODS)
# Methods that need other channels than the student's 6 and the teacher's 8.
CHANNELS = {"ld": (4 * 17, 4 * 17)}
# Methods that reuse a part of the models.
MODELS = {"crosskd": lambda channels: DenseHead(channels, CLASSES).double()}
LARGE = (1e6, torch.inf, torch.nan)

pytestmark = pytest.mark.filterwarnings("ignore:.*resized")


class Case:
    """A method on maps, and on class scores per position (or per picture where it takes no others)."""

    def __init__(self, name, strides):
        self.strides, self.channels = strides, CHANNELS.get(name, (6, 8))
        for dense, targets in product((True, False), (self.labels, self.boxes)):
            self.dense, self.targets = dense, targets
            try:
                self.method = self._build(name)
                self.student, self.teacher, self.batch = self.draw()
                self.losses()
                return
            except UserError as error:
                refusal = str(error)
        raise AssertionError(refusal)

    def _build(self, name):
        side = SIZE // self.strides[0], SIZE // self.strides[1]
        shapes = [(c, s, s) for c, s in zip(self.channels, side, strict=True)]
        maps = Pair("map", *(Feature("", shape) for shape in shapes))
        spaces = [(s, s) if self.dense else () for s in side]
        scores = Pair("out", *(Feature("", (CLASSES, *space)) for space in spaces), is_logits=True)
        torch.manual_seed(0)
        student, teacher = map(MODELS.get(name, lambda _: nn.Identity()), self.channels)
        setup = Setup((maps, scores), student, teacher, num_classes=CLASSES, dataset_size=20)
        return method_class(name)(setup).double()

    def labels(self, count):
        drawn = torch.randint(0, CLASSES, (count, SIZE, WIDE), generator=torch.Generator().manual_seed(5))
        return drawn if self.dense else drawn[:, 0, 0]

    def boxes(self, count):
        box = torch.tensor([[2.0, 2.0, 12.0, 10.0], [0.0, 6.0, 7.0, 15.0]])
        return [{"boxes": box + i % 2, "labels": torch.tensor([1, 2])} for i in range(count)]

    def draw(self, count=4):
        """Features and batch of pictures of 16 x 24 pixels, whose right third is padding."""
        generator = torch.Generator().manual_seed(1)

        def features(stride, channels):
            made = {"map": torch.randn(count, channels, SIZE // stride, WIDE // stride, generator=generator)}
            space = made["map"].shape[2:] if self.dense else ()
            made["out"] = torch.randn(count, CLASSES, *space, generator=generator)
            return {name: feature.double() for name, feature in made.items()}

        student, teacher = map(features, self.strides, self.channels)
        valid = torch.ones(count, SIZE, WIDE, dtype=torch.bool)
        valid[..., SIZE:] = False
        batch = Batch(torch.zeros(count, 3, SIZE, WIDE), self.targets(count), torch.arange(count), valid)
        return student, teacher, batch

    def losses(self, student=None, teacher=None, batch=None):
        """The losses, of random draws that are the same each time, and the gradients of all that learns."""
        student, teacher, batch = student or self.student, teacher or self.teacher, batch or self.batch
        student = {name: feature.clone().requires_grad_() for name, feature in student.items()}
        state = {name: value.clone() for name, value in self.method.state_dict().items()}
        torch.manual_seed(2)
        losses = self.method(student, teacher, batch)
        weights = list(self.method.parameters())
        total = sum(losses.values())
        found = torch.autograd.grad(total, [*student.values(), *weights], allow_unused=True)
        self.method.load_state_dict(state)
        return losses, dict(zip(student, found, strict=False)), found[len(student) :]


def void(stride):
    return slice(SIZE // stride, None)


@STRIDES
@EACH
def test_what_stands_in_void_changes_nothing(method, strides):
    case = build(method, strides)
    expected, gradients, weights = case.losses()
    assert any(bool(g.any()) for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        if gradient is not None and gradient.dim() == 4:
            assert not gradient[..., void(strides[0])].any(), name
    for junk in LARGE:
        sides = []
        for features, stride in zip((case.student, case.teacher), strides, strict=True):
            spoilt = {name: feature.clone() for name, feature in features.items()}
            for feature in spoilt.values():
                if feature.dim() == 4:
                    feature[..., void(stride)] = junk
            sides.append(spoilt)
        losses, again, others = case.losses(*sides)
        for name, loss in losses.items():
            assert torch.equal(loss, expected[name]), (name, junk)
        for a, b in zip([*again.values(), *others], [*gradients.values(), *weights], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), junk


@STRIDES
@EACH
def test_padding_is_as_if_it_were_not_there(method, strides):
    case = build(method, strides)
    if mixes(case.method):
        pytest.skip("convolutions look across the border, batch statistics count positions")
    sides = []
    for features, stride in zip((case.student, case.teacher), strides, strict=True):
        cut = {n: f[..., : void(stride).start] if f.dim() == 4 else f for n, f in features.items()}
        sides.append(cut)
    targets = case.batch.targets
    if isinstance(targets, torch.Tensor) and targets.dim() == 3:
        targets = targets[..., :SIZE]
    plain = Batch(case.batch.images[..., :SIZE], targets, case.batch.indices)
    expected = case.losses(*sides, plain)
    losses = case.losses()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, expected[0][name], rtol=1e-6, atol=1e-6)
    for name, gradient in losses[1].items():
        if gradient is not None:
            inside = gradient[..., : void(strides[0]).start] if gradient.dim() == 4 else gradient
            torch.testing.assert_close(inside, expected[1][name], rtol=1e-6, atol=1e-6)


@STRIDES
@EACH
def test_nothing_valid_gives_zero(method, strides):
    case = build(method, strides)
    nowhere = case.batch._replace(valid=torch.zeros_like(case.batch.valid))
    losses, gradients, weights = case.losses(batch=nowhere)
    for name, loss in losses.items():
        if case.dense or name.startswith("map"):
            assert loss == 0, name
    for gradient in gradients.values():
        if gradient is not None and gradient.dim() == 4:
            assert not gradient.any()
    assert all(bool(g.isfinite().all()) for g in weights if g is not None)


@STRIDES
@EACH
def test_a_picture_without_anything_valid(method, strides):
    case = build(method, strides)
    some = case.batch.valid.clone()
    some[1] = False
    losses, gradients, _ = case.losses(batch=case.batch._replace(valid=some))
    assert all(bool(loss.isfinite()) for loss in losses.values())
    for gradient in gradients.values():
        if gradient is not None and gradient.dim() == 4:
            assert bool(gradient.isfinite().all())
            assert not gradient[1].any()
    if mixes(case.method) or not case.dense or method == "crd":
        return  # crd draws other samples
    keep = [0, 2, 3]
    sides = [{n: f[keep] for n, f in side.items()} for side in (case.student, case.teacher)]
    targets = case.batch.targets
    targets = targets[keep] if isinstance(targets, torch.Tensor) else [targets[i] for i in keep]
    fewer = Batch(case.batch.images[keep], targets, case.batch.indices[keep], case.batch.valid[keep])
    expected, *_ = case.losses(*sides, fewer)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-6)


@EACH
def test_all_valid_is_as_without_a_mask(method):
    case = build(method, (2, 4))
    everywhere = case.batch._replace(valid=torch.ones_like(case.batch.valid))
    losses, expected = case.losses(batch=everywhere), case.losses(batch=case.batch._replace(valid=None))
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, expected[0][name], rtol=1e-9, atol=1e-9)
    for a, b in zip(losses[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def build(method, strides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(method, strides)


def mixes(method):
    """Whether a method's layers look at neighbours, count positions or draw at random by position."""
    kinds = (nn.modules.batchnorm._BatchNorm, type(norm(2, 1)))
    return any(
        isinstance(m, kinds) or (isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))
        for m in method.modules()
    )


def test_diffkd_takes_a_mask_in_ones_own_loop():
    torch.manual_seed(0)
    diffkd, valid = DiffKD(4, 8), torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, 8:] = False
    student = torch.randn(2, 4, 8, 8, requires_grad=True)
    teacher = torch.randn(2, 8, 8, 8)
    torch.manual_seed(1)
    out = diffkd.eval()(student, teacher, valid)
    out.loss.backward()
    assert student.grad[:, :, :4].any()
    assert not student.grad[:, :, 4:].any()
    with torch.no_grad():
        spoilt = student.clone()
        spoilt[:, :, 4:] = torch.nan
        torch.manual_seed(1)
        assert torch.equal(diffkd(spoilt, teacher, valid).loss, out.loss)
        noise = torch.randn(2, 8, 8, 8)
        kept = [diffkd.denoise(x, noise, valid)[:, :, :4] for x in (spoilt, student)]
    assert torch.equal(*kept)
