"""Detectors of transformers keep the contract of torchvision's; figures are gathered over processes."""

import copy

import pytest
import torch
import torch.multiprocessing as mp

from diffkd import Distiller
from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.maths.precision import BoxPrecision
from diffkd.models.base import build
from diffkd.tasks.detection import Detection

_BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
_SHARED = {
    "d_model": 32,
    "num_queries": 20,
    "decoder_layers": 2,
    **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
}
_LEVELS = ["stage2", "stage3", "stage4"]
RT_DETR = _SHARED | {
    "backbone_config": _BACKBONE | {"model_type": "rt_detr_resnet", "out_features": _LEVELS},
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32] * 3,
}
DETR = _SHARED | {
    "backbone_config": _BACKBONE | {"model_type": "resnet", "out_features": ["stage4"]},
    "encoder_layers": 1,
}
DEFORMABLE = DETR | {"backbone_config": _BACKBONE | {"model_type": "resnet", "out_features": _LEVELS}}
STRIDES = {"rt_detr_v2": [8, 16, 32], "d_fine": [8, 16, 32], "detr": [32], "deformable_detr": [8, 16, 32, 64]}


def net(kind):
    options = {"detr": DETR, "deformable_detr": DEFORMABLE}.get(kind, RT_DETR)
    torch.manual_seed(0)
    return build(f"transformers/{kind}", num_classes=3, image_shape=(3, 64, 64), options=options)


def batch():
    boxes = torch.tensor([[8.0, 8, 40, 40]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([2])},
        {"boxes": boxes[:0], "labels": torch.zeros(0).long()},
    ]
    return Batch([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets, torch.arange(2))


@pytest.mark.parametrize("kind", STRIDES)
def test_a_detector_that_asks_with_queries(kind):
    model, task = net(kind), Detection(Data([], [], 3, (3, 64, 64)))
    framed = task.prepare(task.frame(batch()), torch.nn.Identity())
    _, losses = task.train(model.train(), framed)
    losses["set"].backward()
    assert all(p.grad is not None for p in model.model.backbone.parameters() if p.requires_grad)
    assert [64 // level.shape[-1] for level in model.backbone(framed.images).values()] == STRIDES[kind]
    with torch.no_grad():
        answers = task.predict(model.eval(), framed)
    assert all(answer["labels"].min() >= 0 and answer["labels"].max() <= 2 for answer in answers)
    assert all(len(answer["boxes"]) == 20 for answer in answers)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(task.predict(twin, framed)[0]["scores"], answers[0]["scores"])
    assert not any(key.startswith("backbone") for key in model.state_dict())


def test_a_convolutional_student_learns_from_queries():
    student = build(
        "torchvision/fcos:timm/test_resnet", num_classes=3, image_shape=(3, 64, 64), options={"channels": 32}
    )
    teacher, task = net("rt_detr_v2"), Detection(Data([], [], 3, (3, 64, 64)))
    with pytest.warns(UserWarning, match="backbone"):
        distiller = Distiller(student, teacher, None, "fitnet", batch(), task=task)
    assert [(p.student.layer, p.teacher.layer) for p in distiller.pairs] == [
        ("backbone[p3]", "backbone[0]"),
        ("backbone[p4]", "backbone[1]"),
        ("backbone[p5]", "backbone[2]"),
    ]
    teacher.model.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    losses = distiller.train()(batch())
    losses.total.backward()
    assert len(losses) == 3


def test_a_narrow_head_still_sees_maps_of_one_position():
    options = {"channels": 32, "num_convs": 1}
    model = build(
        "torchvision/fcos:timm/test_resnet", num_classes=3, image_shape=(3, 64, 64), options=options
    )
    one = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])}
    assert sum(model.train()([torch.rand(3, 64, 64)], [one]).values()).isfinite()
    wide = build("torchvision/fcos:timm/test_resnet", num_classes=3, image_shape=(3, 64, 64))
    groups = {m.num_groups for m in wide.head.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {32}  # torchvision's own, where the width is


def test_options_are_checked():
    with pytest.raises(UserError, match="did you mean 'num_queries'"):
        build("transformers/detr", num_classes=3, image_shape=(3, 64, 64), options={"num_querys": 3})
    with pytest.raises(UserError, match="rt_detr_v2-r18"):
        build("transformers/rt_detr_v2-r19", num_classes=3, image_shape=(3, 64, 64))


def _process(rank, port, places):
    whole = _counted(places[0] + places[1]).compute()
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    figures = _counted(places[rank]).compute()
    assert all(torch.equal(figures[name], whole[name]) for name in whole)
    torch.distributed.destroy_process_group()


def _counted(places):
    metric = BoxPrecision(2)
    for place in places:
        random = torch.Generator().manual_seed(place)
        corners = torch.rand(3, 2, generator=random) * 50
        boxes = torch.cat([corners, corners + 20], 1)
        labels = torch.tensor([0, 1, 1])
        answer = {
            "boxes": boxes + torch.randn(3, 4, generator=random),
            "scores": torch.rand(3, generator=random),
        }
        metric.update(
            [answer | {"labels": labels}], [{"boxes": boxes, "labels": labels}], torch.tensor([place])
        )
    return metric


@pytest.mark.parametrize("places", [([0, 2], [1]), ([0, 1], [])])
def test_processes_count_every_picture_once(places):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, places), nprocs=2)
