"""A dense task and a method of one's own, in a file outside the package."""

import torch.nn.functional as F
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from diffkd import Method, Task
from toy_parts import VOID, pad


class Dense(Task):
    metric, metric_label, logits = "miou", "mIoU", ("[out]",)

    def loss(self, output, batch):
        masks = pad([target["mask"] for target in batch.targets], VOID)
        return {"cross_entropy": F.cross_entropy(output["out"], masks, ignore_index=VOID)}

    def metrics(self):
        return MetricCollection({"miou": MulticlassJaccardIndex(2, ignore_index=VOID)})

    def update(self, metrics, output, batch):
        metrics.update(output["out"], pad([target["mask"] for target in batch.targets], VOID))


class Mimic(Method):
    """Feature maps, brought to the teacher's width, as the teacher's."""

    def __init__(self, setup, *, power: int = 2):
        super().__init__()
        self.power, self.names = power, [p.name for p in setup.features]
        widths = [(p.student.channels, p.teacher.channels) for p in setup.features]
        self.maps = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in widths)

    def forward(self, student, teacher, batch):
        pairs = {n: fit(student[n]) - teacher[n] for n, fit in zip(self.names, self.maps, strict=True)}
        return {name: difference.abs().pow(self.power).mean() for name, difference in pairs.items()}
