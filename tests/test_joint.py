"""A picture and what belongs to it change together."""

import pytest
import torch
from torchvision import tv_tensors

from diffkd.errors import UserError
from diffkd.pictures.joint import PADDING, VOID, JointOptions, RandomScale, resized_mask


def marked(height=40, width=60):
    """A picture whose red channel says the label of every pixel, its mask, and a box around label 9."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[10:20, 30:45] = 9
    image = torch.stack([mask * 20, mask, mask])
    box = torch.tensor([[30.0, 10.0, 45.0, 20.0]])
    return {
        "image": tv_tensors.Image(image),
        "mask": tv_tensors.Mask(mask),
        "boxes": tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(height, width)),
    }


@pytest.mark.parametrize("seed", range(6))
def test_picture_mask_and_boxes_change_together(seed):
    torch.manual_seed(seed)
    view = JointOptions(photometric=False, min_scale=0.7, max_scale=1.6).view((48, 48))(marked())
    image, mask = view["image"].float(), view["mask"]
    assert image.shape == (3, 48, 48)
    assert mask.shape == (48, 48)
    assert set(mask.unique().tolist()) <= {0, 9, VOID}
    inside = image[0] > 90
    label = mask == 9
    padded = mask == VOID
    assert (inside & ~padded).float().sub(label.float()).abs().mean() < 0.03
    assert torch.equal(padded, (image == torch.tensor(PADDING).view(3, 1, 1)).all(0) & padded)
    left, top, right, bottom = view["boxes"][0].tolist()
    if label.any():
        rows, columns = label.any(1).nonzero(), label.any(0).nonzero()
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.tensor(found).float() == pytest.approx(torch.tensor([left, top, right, bottom]), abs=1.5)


def test_colours_change_and_labels_do_not():
    torch.manual_seed(3)
    sample = marked()
    sample["image"] = tv_tensors.Image(torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8))
    options = JointOptions(min_scale=1.0, max_scale=1.0, flip=False)
    view = options.view((40, 60))(sample)
    assert torch.equal(view["mask"], sample["mask"])
    assert not torch.equal(view["image"], sample["image"])


def test_a_picture_smaller_than_the_crop_is_padded_with_void():
    torch.manual_seed(0)
    view = JointOptions(crop_size=[64, 70], min_scale=1.0, max_scale=1.0).view((8, 8))(marked())
    assert view["image"].shape == (3, 64, 70)
    assert (view["mask"] == VOID).sum() == 64 * 70 - 40 * 60


def test_masks_take_the_nearest_label():
    mask = torch.arange(16, dtype=torch.uint8).view(4, 4)
    assert resized_mask(mask, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert torch.equal(resized_mask(resized_mask(mask, (12, 8)), (4, 4)), mask)


def test_the_scale_lies_between_its_bounds():
    torch.manual_seed(0)
    sizes = {RandomScale(0.5, 2.0)(marked(20, 20))["image"].shape[-1] for _ in range(60)}
    assert min(sizes) >= 10
    assert max(sizes) <= 40
    assert len(sizes) > 15


@pytest.mark.parametrize(
    "wrong", [{"min_scale": 0.0}, {"min_scale": 2.0, "max_scale": 1.0}, {"crop_size": [1, 2, 3]}]
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UserError, match=r"data\.(min_scale|crop_size)"):
        JointOptions(**wrong)
