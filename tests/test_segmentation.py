"""The task of segmentation: losses and figures of pixels that have a class, at the size of the mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import nn

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.tasks.base import Figures
from diffkd.tasks.segmentation import Segmentation, class_scores, known_taps

K = 4


def task(size=(16, 16), **options):
    return Segmentation(Data([], [], K, (3, *size)), **options)


def truth(*shape, void=0.2, seed=0):
    random = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, K, shape, generator=random)
    return mask.masked_fill(torch.rand(shape, generator=random) < void, 255)


def figures_of(answers, masks):
    metrics = task().metrics()
    for ours, mask in zip(answers, masks, strict=True):
        task().update(metrics, F.one_hot(ours, K).movedim(-1, 1).float(), Batch(None, mask))
    return Figures.of(metrics.compute())


def test_figures_are_those_of_scikit_learn_over_the_whole_set():
    masks = [truth(2, 9, 7, seed=i) for i in range(3)]
    answers = [torch.where(torch.rand(m.shape) < 0.5, m.clamp(max=K - 1), 1) for m in masks]
    figures = figures_of(answers, masks)
    ours, theirs = torch.cat(answers).flatten(), torch.cat(masks).flatten()
    there = theirs != 255
    each = jaccard_score(theirs[there], ours[there], average=None, labels=range(K))
    assert figures.arrays["iou"] == pytest.approx(each.tolist())
    assert figures.scalars["miou"] == pytest.approx(each.mean())
    assert figures.scalars["pixel_accuracy"] == pytest.approx((ours == theirs)[there].double().mean().item())
    assert np.sum(figures.arrays["confusion"]) == there.sum()


def test_a_class_that_is_nowhere_is_left_out():
    figures = figures_of([torch.tensor([[[0, 0, 1, 1]]])], [torch.tensor([[[0, 1, 1, 255]]])])
    assert figures.scalars["miou"] == 0.5
    assert figures.arrays["iou"] == [0.5, 0.5, None, None]
    everywhere_void = figures_of([torch.zeros(1, 2, 2).long()], [torch.full((1, 2, 2), 255)])
    assert everywhere_void.scalars == {"miou": 0.0, "pixel_accuracy": 0.0}


def eroded(mask, width):
    """What is left of a mask `(H, W)` after so many erosions by 3 x 3, outside of which there is nothing."""
    height, columns = mask.shape
    for _ in range(width):
        padded = np.pad(mask, 1)
        shifts = [padded[y : y + height, x : x + columns] for y in range(3) for x in range(3)]
        mask = np.logical_and.reduce(shifts)
    return mask


def test_boundary_iou_is_that_of_the_paper():
    random, metrics = np.random.default_rng(0), task(boundary_ratio=0.06).metrics()
    both, either = np.zeros(K), np.zeros(K)
    for height, width in ((24, 32), (50, 20), (9, 9)):
        blocks = random.choice([0, 1, 3, 255], (2, -(-height // 7), -(-width // 7)), p=[0.3, 0.3, 0.3, 0.1])
        ours, theirs = blocks.repeat(7, 1).repeat(7, 2)[:, :height, :width]
        ours = np.where(ours == 255, 1, ours)
        task().update(
            metrics,
            F.one_hot(torch.tensor(ours), K).permute(2, 0, 1)[None].float(),
            Batch(None, torch.tensor(theirs)[None]),
        )
        distance = max(round(0.06 * np.sqrt(height**2 + width**2)), 1)
        for k in range(K):
            bands = [
                m & ~eroded(m, distance) & (theirs != 255)
                for m in ((ours == k) & (theirs != 255), theirs == k)
            ]
            both[k] += (bands[0] & bands[1]).sum()
            either[k] += (bands[0] | bands[1]).sum()
    figures = Figures.of(metrics.compute())
    assert either[2] == 0
    expected = [both[k] / either[k] if either[k] else None for k in range(K)]
    assert figures.arrays["boundary_iou"] == pytest.approx(expected)
    assert (
        0 < figures.scalars["boundary_miou"] == pytest.approx(np.mean([x for x in expected if x is not None]))
    )
    assert figures.scalars["boundary_miou"] < figures.scalars["miou"]
    with pytest.raises(UserError, match="boundary_ratio=2"):
        task(boundary_ratio=2)


def test_void_pixels_change_neither_loss_nor_gradient():
    masks, logits = truth(2, 32, 32), torch.randn(2, K, 8, 8, requires_grad=True)
    loss = task().loss(logits, Batch(None, masks))["cross_entropy"]
    scores = F.interpolate(logits, (32, 32), mode="bilinear").movedim(1, -1)
    there = masks != 255
    assert torch.allclose(loss, F.cross_entropy(scores[there], masks[there]))
    nothing = task().loss(logits, Batch(None, torch.full((2, 32, 32), 255)))["cross_entropy"]
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0
    assert not gradient.any()


def test_an_auxiliary_head_counts_half():
    masks, main, aux = truth(1, 32, 32), torch.randn(1, K, 4, 4), torch.randn(1, K, 4, 4)
    losses = task().loss({"out": main, "aux": aux}, Batch(None, masks))
    alone = task().loss(aux, Batch(None, masks))["cross_entropy"]
    assert torch.allclose(losses["auxiliary"], alone / 2)


class Pointwise(nn.Module):
    """Every pixel's own class scores; notes the sizes that it sees."""

    def __init__(self):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, K, 1), []

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        return self.conv(x)


def test_training_views_are_padded_and_the_padding_is_void():
    model, batch = Pointwise(), Batch(torch.rand(2, 3, 18, 24), truth(2, 18, 24, void=0))
    output, losses = task(multiple=32).train(model, batch)
    assert output.shape == (2, K, 32, 32)
    assert torch.allclose(losses["cross_entropy"], F.cross_entropy(output[..., :18, :24], batch.targets))
    valid = task(multiple=32).validity(batch)
    assert valid.shape == (2, 32, 32)
    assert valid.sum() == 2 * 18 * 24


def test_windows_cover_a_large_picture_and_agree_with_the_whole():
    model, images = Pointwise(), torch.rand(1, 3, 40, 21)
    slid = task((16, 16)).predict(model, Batch(images))
    assert set(model.seen) == {(16, 16)}
    whole = task((16, 16), inference="whole").predict(model, Batch(images))
    assert model.seen[-1] == (40, 21)
    assert torch.allclose(slid, whole, atol=1e-6)


def windows(model, image, high, wide):
    """Mean logits of a picture `(3, H, W)`, pixel by pixel, over windows that overlap by a third."""
    height, width = image.shape[1:]
    total, count = torch.zeros(K, height, width), torch.zeros(height, width)
    tops = sorted({min(t, height - high) for t in range(0, height, high * 2 // 3)})
    lefts = sorted({min(x, width - wide) for x in range(0, width, wide * 2 // 3)})
    for top in tops:
        for left in lefts:
            part = model(image[None, :, top : top + high, left : left + wide])[0]
            for row in range(high):
                for column in range(wide):
                    total[:, top + row, left + column] += part[:, row, column]
                    count[top + row, left + column] += 1
    return total / count


def test_windows_are_those_of_a_naive_loop():
    torch.manual_seed(0)
    model, image = nn.Conv2d(3, K, 5, padding=2), torch.rand(3, 23, 17)
    with torch.no_grad():
        found = task((9, 12)).predict(model, Batch(image[None]))
        assert torch.allclose(found[0], windows(model, image, 9, 12), atol=1e-6)


def test_other_sizes_do_not_shift_a_picture():
    rows, columns = torch.meshgrid(torch.arange(23) / 23, torch.arange(37) / 37, indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(23, 37)])[None]
    for scale in (0.5, 0.75, 1.3):
        found = task(inference="whole", scales=[scale]).predict(nn.Identity(), Batch(image))
        plain = image.softmax(1)
        assert (found - plain)[..., 2:-2, 2:-2].abs().max() < 2e-3


def test_mirror_images_and_other_sizes_are_averaged():
    model, images = nn.Conv2d(3, K, 3, padding=1), torch.rand(2, 3, 16, 16)
    found = task(flip=True, scales=[1.0, 2.0]).predict(model, Batch(images))
    views = [model(images).softmax(1), model(images.flip(-1)).softmax(1).flip(-1)]
    large = F.interpolate(images, (32, 32), mode="bilinear")
    sliding = task()._slide
    views += [sliding(model, large).softmax(1), sliding(model, large.flip(-1)).softmax(1).flip(-1)]
    views = [F.interpolate(view, (16, 16), mode="bilinear") for view in views]
    assert torch.allclose(found, torch.stack(views).mean(0), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2, 16, 16), atol=1e-5)


def test_pictures_of_many_sizes_are_judged_one_by_one():
    model = Pointwise()
    batch = Batch([torch.rand(3, 16, 16), torch.rand(3, 12, 20)], [truth(16, 16), truth(12, 20)])
    scores = task(inference="whole").predict(model, batch)
    assert [s.shape for s in scores] == [(K, 16, 16), (K, 12, 20)]
    metrics = task().metrics()
    task().update(metrics, scores, batch)
    there = sum(int((mask != 255).sum()) for mask in batch.targets)
    assert metrics.compute()["confusion"].sum() == there
    tried = task((16, 24)).sample(batch)
    assert tried.images.shape == (2, 3, 16, 24)
    assert (tried.targets == 255).sum() >= 2 * 16 * 24 - 16 * 16 - 12 * 20


@pytest.mark.parametrize("wrong", [{"scales": []}, {"scales": [0.0]}, {"multiple": 0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UserError, match=r"task\.(scales|multiple)"):
        task(**wrong)


def test_what_is_no_map_of_scores_is_refused():
    with pytest.raises(UserError, match="needs logits"):
        class_scores(torch.rand(2, K))
    with pytest.raises(UserError, match="has 4 classes, the data has 3"):
        Segmentation(Data([], [], 3, (3, 8, 8))).check_output(torch.rand(2, K, 8, 8), "student 'x'")


def test_unknown_models_say_nothing_of_their_taps():
    assert known_taps(Pointwise()) is None
