"""How a picture file is prepared for a trained model, as plain values that can be written down."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.errors import UserError


@dataclass(frozen=True)
class TestView:
    """From an RGB picture to what the model's own normalisation takes, as in evaluation.

    Attributes:
        kind: "crop" resizes the shorter side and shows the centre; "resize" brings to `size` whatever
            the proportions; "shortest" brings the shorter side to the first of `size`, the longer one to
            the second at most; "whole" keeps the picture.
        size: height and width, or shortest and longest side, in pixels; None for "whole".
        crop_fraction: share of the shorter side that "crop" shows.
        interpolation: how pictures are resized.
        channels: 3, or 1 for grey.
        levels: values of 16-bit pictures that became black and white, which `decode` wants to hear.

    >>> view = TestView("crop", (8, 8), crop_fraction=0.5)
    >>> view(Image.new("RGB", (40, 30))).shape
    torch.Size([3, 8, 8])
    """

    __test__ = False  # no test, whatever its name begins with

    kind: Literal["crop", "resize", "shortest", "whole"]
    size: tuple[int, int] | None = None
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    channels: int = 3
    levels: tuple[int, int] | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        """`(C, H, W)` uint8."""
        if self.channels == 1:
            picture = picture.convert("L")
        pixels = torch.from_numpy(np.array(self._resized(picture)))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.kind == "whole" or self.size is None:
            return picture
        height, width = self.size
        if self.kind == "resize":
            return self._brought_to(picture, height, width)
        if self.kind == "shortest":
            # evaluation shrinks the tensor, not the Pillow picture: the same pixels here
            return _shortest(picture, *self.size)
        # the same bits as torchvision's Resize and CenterCrop, in less time
        side, shorter = round(height / self.crop_fraction), min(picture.size)
        rows, columns = (
            side if length == shorter else int(side * length / shorter)
            for length in (picture.height, picture.width)
        )
        whole = self._brought_to(picture, rows, columns)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        return whole.crop((left, top, left + width, top + height))

    def _brought_to(self, picture: Image.Image, height: int, width: int) -> Image.Image:
        if picture.size == (width, height):
            return picture
        return picture.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "TestView":
        """From plain values.

        Raises:
            UserError: they do not describe a view.
        """
        try:
            pairs = {key: values.get(key) for key in ("size", "levels")}
            told = {key: (int(pair[0]), int(pair[1])) if pair else None for key, pair in pairs.items()}
            return cls(**{**values, **told})
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(f"'view' does not say how pictures are prepared: {error}") from error


def _shortest(picture: Image.Image, shortest: int, longest: int) -> Image.Image:
    from torchvision.transforms import v2 as transforms  # it takes seconds: not before it is needed

    tensor = transforms.RandomShortestSize([shortest], longest)(transforms.PILToTensor()(picture))
    array = tensor.permute(1, 2, 0).contiguous() if len(tensor) == 3 else tensor[0]
    return Image.fromarray(array.to(torch.uint8).numpy())
