"""A small detector, its data and its task, in a file outside the package.

The detector wants its targets in training and cuts its answers down afterwards, so that each role differs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from diffkd import Data, Task

SIZE = 32  # of what the models see


class Squares(torch.utils.data.Dataset):
    """One bright square in a dark picture of 48x48; its box is `(4,)` in pixels of that picture."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        left, top = torch.randint(0, 28, (2,), generator=generator).tolist()
        image = 0.1 * torch.rand(3, 48, 48, generator=generator)
        image[:, top : top + 20, left : left + 20] = 0.9
        return image, {"box": torch.tensor([left, top, left + 20.0, top + 20.0])}


def squares(root=None):
    return Data(Squares(32, 0), Squares(8, 1), 1, (3, 48, 48))


class Detector(nn.Module):
    """Losses in training, where it must be told the boxes; boxes else. It counts what was asked of it."""

    def __init__(self, num_classes, width=4):
        super().__init__()
        steps = [nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()]
        self.backbone, self.head = nn.Sequential(*steps), nn.Linear(width * (SIZE // 4) ** 2, 4)
        self.answered = 0

    def forward(self, images, boxes=None):
        found = self.head(self.backbone(images).flatten(1)) * SIZE
        if self.training:
            return {"box": F.l1_loss(found, boxes) / SIZE}
        self.answered += 1
        return found.clamp(0, SIZE)


def wide(num_classes):
    return Detector(num_classes, 8)


class MyTask(Task):
    metric, metric_label, logits = "iou", "IoU", ()

    def prepare(self, batch, preprocess):
        images = F.interpolate(preprocess(batch.images), (SIZE, SIZE), mode="bilinear")
        boxes = batch.targets["box"] * SIZE / batch.images.shape[-1]
        return batch._replace(images=images, targets={"box": boxes})

    def train(self, student, batch):
        assert student.training
        losses = student(batch.images, batch.targets["box"])
        return losses, losses

    def teach(self, teacher, batch):
        return teacher.backbone(batch.images)

    def predict(self, model, batch):
        assert not model.training
        return model(batch.images) / SIZE

    def metrics(self):
        return MetricCollection({"iou": MeanMetric()})

    def update(self, metrics, output, batch):
        true = batch.targets["box"] / batch.images.shape[-1]
        low, high = torch.maximum(output, true)[:, :2], torch.minimum(output, true)[:, 2:]
        both, ours, theirs = (
            _area(torch.cat(c, 1)) for c in ((low, high), output.chunk(2, 1), true.chunk(2, 1))
        )
        metrics.update(both / (ours + theirs - both).clamp(min=1e-6))


def _area(box):
    return (box[:, 2:] - box[:, :2]).clamp(min=0).prod(1)
