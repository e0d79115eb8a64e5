"""Boundary IoU (arXiv 2103.16562): intersection over union of the pixels near the edges of each class."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class BoundaryIoU(Metric):
    """Boundary IoU over a whole data set (Cheng et al. 2021, https://arxiv.org/abs/2103.16562).

    Of each class the pixels count that are no further from its edge than `ratio` of the picture's
    diagonal, in the truth and in the answer; a picture's border is an edge, as in the authors' code. Void
    pixels are void in the answer too.

    Args:
        num_classes: K.
        ratio: width of the band, as a share of the diagonal; at least one pixel.
        ignore: label of void pixels.

    >>> metric = BoundaryIoU(2, ratio=0.02)
    >>> truth = torch.zeros(6, 6, dtype=torch.long)
    >>> metric.update(truth, truth)
    >>> {name: value.tolist() for name, value in metric.compute().items()}
    {'boundary_miou': 1.0, 'boundary_iou': [1.0, nan]}
    """

    full_state_update = False
    pixels: Tensor

    def __init__(self, num_classes: int, ratio: float = 0.02, ignore: int = 255) -> None:
        super().__init__()
        self.num_classes, self.ratio, self.ignore = num_classes, ratio, ignore
        # in both bands, in the truth's, in the answer's
        self.add_state("pixels", torch.zeros(3, num_classes).long(), dist_reduce_fx="sum")

    def update(self, answers: Tensor, truth: Tensor) -> None:
        """Counts the pixels of one picture in.

        Args:
            answers: classes `(H, W)`.
            truth: likewise.
        """
        void = truth == self.ignore
        answers = answers.masked_fill(void, self.ignore)
        width = max(round(self.ratio * sum(side**2 for side in truth.shape) ** 0.5), 1)
        ours, theirs = (near_edge(labels, width) & ~void for labels in (answers, truth))
        both = ours & theirs & (answers == truth)
        parts = ((truth, both), (truth, theirs), (answers, ours))
        for row, (labels, there) in zip(self.pixels, parts, strict=True):
            row += torch.bincount(labels[there].long(), minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Figures of 0 to 1: `boundary_iou` `(K,)`, NaN where a class is in neither, and their mean."""
        both, theirs, ours = self.pixels.double()
        union = theirs + ours - both
        iou = both / union
        mean = iou[union > 0].mean() if bool((union > 0).any()) else iou.new_zeros(())
        return {"boundary_miou": mean, "boundary_iou": iou}


def near_edge(labels: Tensor, width: int) -> Tensor:
    """Which pixels of a label map `(H, W)` have another label, or the border, within so many pixels.

    >>> near_edge(torch.zeros(5, 5), 2).sum()
    tensor(24)
    """
    padded = F.pad(labels[None, None].float(), (width,) * 4, value=-1)
    greatest, least = padded, -padded
    for window in ((2 * width + 1, 1), (1, 2 * width + 1)):  # a square, one side after the other
        greatest, least = (F.max_pool2d(x, window, stride=1) for x in (greatest, least))
    return greatest[0, 0] != -least[0, 0]  # the greatest is the least where all labels are one
