"""Changes made to a picture and what belongs to it together: its mask, its boxes, their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as v2

from diffkd.errors import UserError
from diffkd.pictures.files import IMAGENET_MEAN

VOID = 255  # the label of pixels that mean nothing
_LARGEST_SIDE = 16384  # pixels
PADDING = tuple(round(255 * m) for m in IMAGENET_MEAN)


@dataclass(frozen=True)
class JointOptions:
    """How training pictures are changed together with their masks or boxes.

    Attributes:
        crop_size: height and width in pixels of training views, or one number for both; None takes what
            the data set says. A picture that is smaller is padded: with the mean colour, its mask with void.
        min_scale, max_scale: a picture is first resized by a factor drawn between the two.
        flip: mirror left and right at random; turn it off where that changes the class.
        photometric: change brightness, contrast, saturation and hue at random.
        max_corrupt: how many unreadable pictures of a split are skipped, each with a warning; the next one
            more stops the run.

    Raises:
        UserError: an option is out of its range.
    """

    crop_size: int | list[int] | None = None
    min_scale: float = 0.5
    max_scale: float = 2.0
    flip: bool = True
    photometric: bool = True
    max_corrupt: int = 0

    def __post_init__(self) -> None:
        if self.max_corrupt < 0:
            raise UserError(f"data.max_corrupt={self.max_corrupt} is negative")
        if not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                f"data.min_scale={self.min_scale}, data.max_scale={self.max_scale}: "
                "need two factors above 0, the smaller first"
            )
        if self.crop_size is not None:
            size_of(self.crop_size, "data.crop_size")

    def view(self, size: tuple[int, int]) -> Any:
        """Changes any structure of tv_tensors of one picture to a random view of `size` `(H, W)`.

        Boxes are clipped to the view; those that fell out of it are left with no area.

        Args:
            size: `(H, W)` where `crop_size` says none.

        >>> from torchvision import tv_tensors
        >>> sample = {
        ...     "image": tv_tensors.Image(torch.zeros(3, 20, 30, dtype=torch.uint8)),
        ...     "mask": tv_tensors.Mask(torch.zeros(20, 30, dtype=torch.uint8)),
        ... }
        >>> view = JointOptions().view((16, 16))(sample)
        >>> view["image"].shape, view["mask"].shape
        (torch.Size([3, 16, 16]), torch.Size([16, 16]))
        """
        if self.crop_size is not None:
            size = size_of(self.crop_size, "data.crop_size")
        fill = {tv_tensors.Image: PADDING, tv_tensors.Mask: VOID, "others": 0}
        steps: list[Any] = []
        if (self.min_scale, self.max_scale) != (1, 1):
            steps.append(RandomScale(self.min_scale, self.max_scale))
        steps.append(transforms.RandomCrop(size, pad_if_needed=True, fill=fill))
        if self.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if self.photometric:
            steps.append(transforms.RandomPhotometricDistort())
        return transforms.Compose(steps)


def size_of(value: int | Sequence[int], key: str) -> tuple[int, int]:
    """`(H, W)` of one number or two, as an option says it.

    Raises:
        UserError: it is neither, less than a pixel, or beyond all memory; `key` names the option.

    >>> size_of(64, "data.crop_size"), size_of([32, 64], "data.crop_size")
    ((64, 64), (32, 64))
    """
    size = (value, value) if isinstance(value, int) else tuple(value)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"{key}={value}: needs a number of pixels, or two (height, width)")
    if max(size) > _LARGEST_SIDE:
        raise UserError(f"{key}={value}: needs at most {_LARGEST_SIDE} pixels")
    return size[0], size[1]


class RandomScale(transforms.Transform):  # type: ignore[misc]
    """Resizes picture, mask and boxes by one random factor; masks to the nearest pixel.

    Args:
        low, high: the factor is drawn evenly between them.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The new `(H, W)`."""
        height, width = transforms.query_size(flat_inputs)
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": [max(round(height * factor), 1), max(round(width * factor), 1)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One of the sample's parts, resized."""
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(resized_mask(inpt.as_subclass(Tensor), params["size"]), like=inpt)
        return self._call_kernel(v2.resize, inpt, size=params["size"], antialias=True)


def resized_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Label maps `(..., H, W)` of uint8 or int64 at another size: every pixel takes the nearest one's label.

    >>> resized_mask(torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8), (4, 4))[0].tolist()
    [0, 0, 1, 1]
    """
    rows, columns = (
        # the centre of the new pixel, in old pixels; torchvision's own nearest takes its corner
        ((torch.arange(new, device=mask.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip(size, mask.shape[-2:], strict=True)
    )
    return mask[..., rows[:, None], columns]


def pad_to(picture: Tensor, size: tuple[int, int], fill: float = 0) -> Tensor:
    """`(..., H, W)` filled up at the bottom and the right.

    >>> pad_to(torch.ones(2, 2), (2, 3))
    tensor([[1., 1., 0.],
            [1., 1., 0.]])
    """
    below, right = size[0] - picture.shape[-2], size[1] - picture.shape[-1]
    return F.pad(picture, (0, right, 0, below), value=fill) if below or right else picture
