"""CrossKD: Cross-Head Knowledge Distillation for Detection (Wang et al., CVPR 2024, arXiv 2306.11369)."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.layers import conv
from diffkd.maths.losses import check_not_negative, precise
from diffkd.methods.base import Method, Range, Setup, needed_features, needed_maps

_TOWERS = {"classes": ("classification_head", "cls_logits"), "boxes": ("regression_head", "bbox_reg")}
_LARGEST = 4.135  # the logarithm of 1000 / 16: sides of boxes are no larger multiples of their anchors'
Blocks = list[list[nn.Module]]


class CrossKD(Method):
    """The student's head features go through the rest of the teacher's head, and should give its answers.

    Wang et al., CVPR 2024, arXiv 2306.11369. On every level of the pyramid the student's features after
    all but the last `rest` convolutions of its head go through the teacher's last `rest` convolutions and
    its prediction layer, which stay as they are. With p the class scores and b the boxes found so, q and
    t the teacher's own, w the teacher's best class score of an anchor, and sums over the anchors of all
    levels at valid positions (of boxes, those to which the teacher gives an area), the losses are

        classes = sum(|p - q|^beta BCE(p, q)) / max(sum(w), 1),
        boxes = box_weight sum(w (1 - GIoU(b, t))) / max(sum(w), 1).

    The paper divides by its detectors' counts of objects, for which the sum of w stands here; for a head
    of box distributions (GFL) it takes their divergence, with a weight of 4. The labels teach the
    student's own predictions, as without a teacher. The weight is 1.

    For detectors with a dense head of convolutions: RetinaNet and FCOS of torchvision, and any whose
    layers have these names. Only the teacher's anchors count, so that the student's may differ. A head of
    another width than the teacher's gets a 1x1 convolution in between. Every step runs the student's head
    once more, and the teacher's.

    Use it for RetinaNet and FCOS where the teacher's answers and the labels pull the student's head apart.

    Args:
        setup: what the run taps: the levels of both pyramids.
        rest: convolutions of the teacher's head that the student's features go through.
        beta: how much harder answers that are far off count.
        box_weight: of the loss of boxes.

    Raises:
        UserError: a model has no such head, the teacher's has fewer convolutions, what is tapped is not
            what the heads take, or an option is impossible.

    >>> from diffkd import Distiller
    >>> from diffkd.models.detectors import build
    >>> def net(channels):
    ...     return build("fcos:timm/test_resnet", num_classes=2, image_size=(64, 64), channels=channels)
    >>> images, levels = torch.rand(2, 3, 64, 64), {"backbone": "backbone"}
    >>> run = lambda model, batch: model.backbone(batch.images)
    >>> sorted(Distiller(net(32), net(64), levels, "crosskd", images, run=run)(images))
    ['crosskd.boxes', 'crosskd.classes']
    """

    stages, uses_logits = "all", False
    search = (Range("box_weight", 0.5, 4.0),)

    def __init__(self, setup: Setup, *, rest: int = 1, beta: float = 1.0, box_weight: float = 1.0) -> None:
        super().__init__()
        check_not_negative(rest=rest, beta=beta, box_weight=box_weight)
        self.rest, self.beta, self.box_weight = rest, beta, box_weight
        pairs = needed_features(setup, "crosskd", resizes=False)
        needed_maps(pairs, "crosskd")
        self.names = [pair.name for pair in pairs]
        # in a tuple: the heads are not the method's own to train or to keep
        self._heads = _head(setup.student, "student"), _head(setup.teacher, "teacher")
        self.adapters = nn.ModuleDict()
        for kind in _TOWERS:
            ours, theirs = self._tower(0, kind), self._tower(1, kind)
            if len(theirs) < rest:
                raise UserError(
                    f"method 'crosskd': rest={rest}, but the teacher's head has {len(theirs)} convolutions"
                )
            last = [_layer(self._heads[1], kind)]
            for pair in pairs:
                _check_width(
                    pair.name, "student", pair.student.channels, [*ours, [_layer(self._heads[0], kind)]]
                )
                _check_width(pair.name, "teacher", pair.teacher.channels, [*theirs, last])
            start = _convolutions(self._start(ours))
            before = start[-1].out_channels if start else pairs[0].student.channels
            after = _convolutions([*theirs[len(theirs) - rest :], last])[0].in_channels
            self.adapters[kind] = nn.Identity() if before == after else conv(2, before, after)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Both losses, over all levels."""
        sums: dict[str, list[Tensor]] = {"classes": [], "boxes": [], "objects": []}
        for name in self.names:
            ours, theirs, valid = matched(student[name], teacher[name].detach(), batch.valid)
            with torch.no_grad():
                goal = {kind: self._answer(kind, _run(self._tower(1, kind), theirs)) for kind in _TOWERS}
            found = {kind: self._answer(kind, self._cross(kind, ours)) for kind in _TOWERS}
            best = goal["classes"].sigmoid().amax(-1)
            if valid is not None:
                best = best * valid[:, None]
            wrong = _quality_focal(found["classes"], goal["classes"], self.beta).sum(-1)
            sums["classes"].append(wrong.sum() if valid is None else (wrong * valid[:, None]).sum())
            apart = generalized_box_iou_loss(found["boxes"], goal["boxes"])
            solid = (goal["boxes"][..., 2:] > goal["boxes"][..., :2]).all(-1)
            sums["boxes"].append((best * apart * solid).sum())
            sums["objects"].append(best.sum())
        objects = torch.stack(sums["objects"]).sum().clamp(min=1)
        return {
            "classes": torch.stack(sums["classes"]).sum() / objects,
            "boxes": self.box_weight * torch.stack(sums["boxes"]).sum() / objects,
        }

    def _tower(self, side: int, kind: str) -> Blocks:
        return _blocks(self._heads[side], kind)

    def _start(self, blocks: Blocks) -> Blocks:
        """What the student's features go through: its first convolution at least, where it has one."""
        return blocks[: max(len(blocks) - self.rest, min(1, len(blocks)))]

    def _cross(self, kind: str, feature: Tensor) -> Tensor:
        """A level `(B, C, H, W)` of the student's through its head and the rest of the teacher's tower."""
        rest = self._tower(1, kind)
        feature = self.adapters[kind](_run(self._start(self._tower(0, kind)), feature))
        return _run(rest[len(rest) - self.rest :], feature)

    def _answer(self, kind: str, feature: Tensor) -> Tensor:
        """The teacher's class scores `(B, A, H, W, K)` or boxes `(B, A, H, W, 4)` of head features.

        Boxes are left, top, right and bottom in units of their anchor's sides, from its centre: that is
        enough to say how far two overlap.
        """
        head = self._heads[1]
        raw: Tensor = precise(_layer(head, kind)(feature))
        anchors = _layer(head, "boxes").out_channels // 4
        raw = raw.reshape(len(raw), anchors, -1, *raw.shape[2:]).movedim(2, -1)
        if kind == "classes":
            return raw
        if hasattr(head.regression_head, "bbox_ctrness"):  # distances to the four sides
            return raw.relu() * raw.new_tensor([-1, -1, 1, 1])
        centre, sides = raw[..., :2], raw[..., 2:].clamp(max=_LARGEST).exp()
        return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def _quality_focal(found: Tensor, goal: Tensor, beta: float) -> Tensor:
    """Cross-entropy of class scores with those of the teacher, the more the farther they are apart."""
    target = goal.sigmoid()
    apart = (found.sigmoid() - target).abs().clamp(min=1e-6)
    return apart**beta * F.binary_cross_entropy_with_logits(found, target, reduction="none")


# --- heads -----------------------------------------------------------------------------------------


def _head(model: nn.Module, side: str) -> Any:
    """A model's dense head.

    Raises:
        UserError: it has none.
    """
    head: Any = getattr(model, "head", None)
    for tower, layer in _TOWERS.values():
        part = getattr(head, tower, None)
        if not (
            isinstance(getattr(part, "conv", None), nn.Sequential)
            and isinstance(getattr(part, layer, None), nn.Conv2d)
        ):
            raise UserError(
                "method 'crosskd' serves detectors with a dense head, as RetinaNet and FCOS have; the "
                f"{side} ({type(model).__name__}) has none: choose 'pkd', 'fgd' or 'mgd'"
            )
    return head


def _layer(head: Any, kind: str) -> Any:
    """The prediction layer of a tower."""
    tower, layer = _TOWERS[kind]
    return getattr(getattr(head, tower), layer)


def _blocks(head: Any, kind: str) -> Blocks:
    """The layers of a tower, one list for each convolution and what follows it."""
    blocks: Blocks = []
    for layer in getattr(head, _TOWERS[kind][0]).conv.children():
        if not blocks or _convolutions([[layer]]):
            blocks.append([])
        blocks[-1].append(layer)
    return blocks


def _convolutions(blocks: Blocks) -> list[nn.Conv2d]:
    return [
        part for block in blocks for layer in block for part in layer.modules() if isinstance(part, nn.Conv2d)
    ]


def _check_width(tap: str, side: str, channels: int, blocks: Blocks) -> None:
    taken = _convolutions(blocks)[0].in_channels
    if channels != taken:
        raise UserError(
            f"method 'crosskd', tap '{tap}': the {side} gives {channels} channels, its head takes {taken}; "
            "tap the pyramid's levels"
        )


def _run(blocks: Blocks, feature: Tensor) -> Tensor:
    return reduce(lambda x, layer: layer(x), [layer for block in blocks for layer in block], feature)
