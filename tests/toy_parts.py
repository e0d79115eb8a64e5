"""Data and models that the toy task needs: maps of different sizes, void pixels, dicts of features."""

import torch
import torch.nn.functional as F
from torch import nn

from diffkd import Batch, Data

VOID = 255


class Scenes(torch.utils.data.Dataset):
    """Pictures of different sizes; targets with boxes and a label map that has void pixels."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        mask = (torch.rand((12, 16) if index % 2 else (16, 12), generator=generator) > 0.5).long()
        image = 0.9 * mask.expand(3, -1, -1)
        mask[0] = VOID
        return image, {"mask": mask, "boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]])}


def scenes(root=None, *, count: int = 16) -> Data:
    return Data(
        Scenes(count, 0),
        Scenes(8, 1),
        2,
        (3, 16, 16),
        collate=lambda rows: Batch(*map(list, zip(*rows, strict=True))),
    )


def pad(maps, value=0.0):
    return torch.stack([F.pad(m, (0, 16 - m.shape[-1], 0, 16 - m.shape[-2]), value=value) for m in maps])


class Net(nn.Module):
    """Its body gives a dict of feature maps, the net a dict."""

    def __init__(self, num_classes, width=4):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, 1, 1), Pyramid(width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        return {"out": self.head(self.body(self.stem(pad(images)))["fine"])}


class Pyramid(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.smooth = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return {"fine": self.smooth(x).relu(), "coarse": F.avg_pool2d(x, 2)}


def wide(num_classes):
    return Net(num_classes, 16)


class DenseHead(nn.Module):
    """A detector's dense head, of convolutions that see one position, for two anchors."""

    def __init__(self, channels, classes):
        super().__init__()
        self.head = nn.Module()
        for tower, layer, outputs in (
            ("classification_head", "cls_logits", classes),
            ("regression_head", "bbox_reg", 4),
        ):
            part = nn.Module()
            part.conv = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1))
            setattr(part, layer, nn.Conv2d(channels, 2 * outputs, 1))
            setattr(self.head, tower, part)
