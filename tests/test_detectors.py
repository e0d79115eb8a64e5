"""Detectors of transformers keep the contract of torchvision's; figures are gathered over processes."""

import copy
import sys

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


OWN = {
    "retinanet_resnet50_fpn_v2": [8, 16, 32, 64, 128],
    "maskrcnn_resnet50_fpn": [4, 8, 16, 32, 64],
    "fasterrcnn_mobilenet_v3_large_320_fpn": [32, 32, 64],
    "ssdlite320_mobilenet_v3_large": [16, 32, 64, 128, 128, 128],
}


@pytest.mark.parametrize("name", OWN)
def test_torchvisions_own_by_name(name):
    """Without memory for their weights: what is built, and the levels that are tapped."""
    with torch.device("meta"):
        model = build(f"torchvision/{name}", num_classes=3, image_shape=(3, 128, 128))
        levels = model.eval().backbone(torch.empty(1, 3, 128, 128))
    assert [128 // level.shape[-1] for level in levels.values()] == OWN[name]
    keys = [key for key in model.state_dict() if "mask" in key]
    assert not keys  # boxes are all that is taught


def test_levels_of_one_stride_pair_by_the_deepest_and_train():
    """One step of a small Faster R-CNN that has two levels of stride 32, under a teacher that has one."""
    few = {f"rpn_{when}_nms_top_n_train": 20 for when in ("pre", "post")} | {"box_batch_size_per_image": 8}
    student, teacher = (
        build(f"torchvision/{name}", num_classes=3, image_shape=(3, 64, 64), options=options)
        for name, options in (
            ("fasterrcnn_mobilenet_v3_large_320_fpn", few),
            ("retinanet:timm/test_resnet", {"channels": 32}),
        )
    )
    task = Detection(Data([], [], 3, (3, 64, 64)))
    with pytest.warns(UserWarning, match=r"left out: the student's 0 \(stride 32\)"):
        distiller = Distiller(student, teacher, None, "mimic", batch(), task=task)
    first = distiller.pairs[0]
    assert (first.student.layer, first.teacher.layer) == ("backbone[1]", "backbone[p5]")
    losses = distiller.train()(batch())
    (losses.total + sum(losses.supervised.values())).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("faster_coco_eval", lambda: Detection(Data([], [], 3, (3, 64, 64)))),
        ("transformers", lambda: net("detr")),
    ],
)
def test_what_is_not_installed_is_named_with_what_installs_it(library, make, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'diffkd\[detection\]'"):
        make()


def test_options_are_checked():
    with pytest.raises(UserError, match="did you mean 'num_queries'"):
        build("transformers/detr", num_classes=3, image_shape=(3, 64, 64), options={"num_querys": 3})
    with pytest.raises(UserError, match="rt_detr_v2-r18"):
        build("transformers/rt_detr_v2-r19", num_classes=3, image_shape=(3, 64, 64))


def _process(rank, port):
    cases = [([0, 2], [1]), ([0, 1], [])]
    whole = [_counted(ours + theirs).compute() for ours, theirs in cases]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for places, expected in zip(cases, whole, strict=True):
        figures = _counted(places[rank]).compute()
        assert all(torch.equal(figures[name], expected[name]) for name in expected), places
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


def test_processes_count_every_picture_once():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (port,), nprocs=2, start_method="forkserver")
