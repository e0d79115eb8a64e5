"""The student in other formats gives the same answers."""

import json
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
from torch import nn

from diffkd import Run, UserError, load_student
from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.models.base import Preprocess
from diffkd.models.detectors import build
from diffkd.pictures.view import TestView
from diffkd.recipe.sides import Side
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.use.deploy import Standing, deployed, distance, examples
from diffkd.use.export import ExportOptions, _standing
from diffkd.use.runtime import Onnx, loaded, write
from diffkd.use.student import Student


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a second."""
    from diffkd.recipe.schema import load
    from diffkd.runs.console import Reporter
    from diffkd.training.fit import fit

    place = tmp_path_factory.mktemp("export") / "run"
    words = ["trainer.epochs=2", "student=simple/cnn4", f"output={place}", "method=none", "teacher=null"]
    fit(load("digits-8x8", words), Reporter(progress=False))
    return place


@pytest.mark.parametrize("prepared", [False, True])
def test_onnx_answers_alike_for_any_batch(diffkd, run, prepared, tmp_path):
    words = [f"output={tmp_path}/a.onnx", f"with_preparation={str(prepared).lower()}", "verify=full"]
    status, out, err = diffkd("export", run, "to=onnx", *words)
    assert status == 0, err
    assert "(recorded:" in out
    student = load_student(run)
    pictures = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    runtime = Onnx(tmp_path / "a.onnx")
    expected = student.model(student.prepare(pictures))
    found = runtime(pictures if prepared else student.prepare(pictures))
    assert (found - expected).abs().max() < 1e-4
    told = json.loads((tmp_path / "a.onnx.json").read_text())
    assert told["class_names"] == list("0123456789")
    assert told["input"].startswith("uint8" if prepared else "normalised")


def test_eight_bits_are_smaller_and_measured(diffkd, run, tmp_path):
    status, out, err = diffkd("export", run, "quantize=int8", f"output={tmp_path}/a.onnx")
    assert status == 0, err
    figures = [float(word) for word in out.replace("(float:", "").split() if word.replace(".", "").isdigit()]
    assert abs(figures[-1] - figures[-2]) < 5  # points of top-1 beside the float model's
    told = json.loads((tmp_path / "a-int8.onnx.json").read_text())
    recorded = load_student(run).config["figures"]["top1"]
    assert (told["quantize"], told["float_figures"]["top1"]) == ("int8", recorded)
    assert f"top1 {100 * told['figures']['top1']:.2f} %" in out
    said = {pair.key: pair.value for pair in onnx.load(tmp_path / "a-int8.onnx").metadata_props}
    assert json.loads(said["figures"]) == told["figures"]
    assert json.loads(said["class_names"]) == list("0123456789")


def test_python_writes_the_same_and_tells_on_request(run, tmp_path):
    said = []
    place = Run(run).export("safetensors", say=said.append, output=str(tmp_path / "a"), verify="full")
    assert (place, len(said)) == (tmp_path / "a", 2)
    assert said[1].startswith("top1 of the exported model: ")
    with pytest.raises(UserError, match="quantize=int8 needs to=onnx"):
        Run(run).export("timm", quantize="int8")


@pytest.mark.parametrize("to", ["torch_export", "torchscript", "safetensors"])
def test_pytorchs_own_formats(diffkd, run, to, tmp_path):
    status, out, err = diffkd("export", run, f"to={to}", f"output={tmp_path}/a", "verify=full")
    assert status == 0, err
    assert "(recorded:" in out
    student, pictures = load_student(run), torch.rand(3, 1, 8, 8)
    if to == "safetensors":
        model = load_student(tmp_path / "a").model
    elif to == "torchscript":
        model = torch.jit.load(tmp_path / "a")
    else:
        model = torch.export.load(tmp_path / "a").module()
    assert (model(pictures) - student.model(pictures)).abs().max() < 1e-4


def test_a_folder_for_timm(diffkd, tmp_path):
    words = ["student=timm/test_vit", "data.shift=0", "student.size=32", "trainer.max_steps=1", "output=run"]
    status, _, err = diffkd("train", "digits-8x8", *words, "student.options={'img_size':32}")
    assert status == 0, err
    status, out, err = diffkd("export", "run", "to=timm", "output=small", "verify=full")
    assert status == 0, err
    assert "test pictures)" in out
    assert "top1 of the exported model" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, in_chans=1).eval()
    student, picture = load_student(tmp_path / "run"), torch.rand(1, 1, 32, 32)
    assert torch.allclose(model(picture), student.model(picture), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to=onx"], "to=onx: unknown; did you mean 'onnx'?"),
        (["too=onnx"], "'too=onnx'; did you mean 'to'?"),
        (["to=timm"], "'simple/cnn4' is not one of timm's models"),
        (["to=torchscript", "quantize=int8"], "quantize=int8 needs to=onnx"),
        (["to=safetensors", "with_preparation=true"], "holds weights alone"),
        (["opset=new"], "opset=new: needs a number"),
    ],
)
def test_exports_that_cannot_be(diffkd, run, words, said):
    status, _, err = diffkd("export", run, *words)
    assert (status, err.count("\n")) == (2, 1), err
    assert said in err


OPTIONS = {
    "fcos": {"score_thresh": 0.005, "num_convs": 1},
    "retinanet": {"score_thresh": 0.005},
    "fasterrcnn": {"rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10},
}


@pytest.mark.parametrize("to", ["onnx", "torchscript"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_detector_leaves_with_its_postprocessing(tmp_path, kind, to):
    torch.manual_seed(0)
    options = {"channels": 32, "levels": [4, 5], **OPTIONS[kind]}
    model = build(f"{kind}:timm/test_resnet", num_classes=3, image_size=(64, 64), **options).eval()
    for name, weights in model.named_parameters():  # scores that differ by more than rounding
        if (weights.dim() == 4 and "head" in name) or "cls_score.w" in name:
            nn.init.normal_(weights, 0, 0.08 if weights.dim() == 4 else 1.0)
    data = Data(range(0), range(0), 3, (3, 64, 64))
    task, prepare = Detection(data), Preprocess((0.5,) * 3, (0.5,) * 3, None, channels=3)
    student = Student(model, prepare, TestView("whole"), task, ("a", "b", "c"), {"image_shape": [3, 64, 64]})
    images = examples(student, None, raw=True)[:1]
    module = deployed(student, True, images)
    write(module, images, tmp_path / "a", to, set(), None, {"class_names": ["a", "b", "c"]})
    runtime = loaded(tmp_path / "a", to)
    others = torch.randint(0, 256, (3, *images.shape[1:]), dtype=torch.uint8)
    others[1] //= 4  # darker: another number of boxes
    found = distance(module, runtime, others)
    assert found.far < 1e-4
    assert found.boxes > 3
    if to == "onnx":
        assert runtime.session.get_modelmeta().custom_metadata_map == {"class_names": '["a", "b", "c"]'}
        (answer,) = Standing(runtime, task)(others[:1, :, :50])  # smaller pictures are padded
        assert set(answer["labels"].tolist()) <= {1, 2, 3}
        padded = nn.functional.pad(prepare(others[:1, :, :50]), (0, 0, 0, 14))  # as in training
        boxes, _, labels = deployed(student, False, images)(padded)
        assert torch.equal(answer["labels"], labels + 1)
        assert torch.allclose(answer["boxes"], boxes, atol=0.01)


def test_a_file_that_normalises_stands_in_for_a_model_whose_task_cuts_and_pads():
    data, prepare = Data(range(0), range(0), 3, (3, 16, 16)), Preprocess((0.4,) * 3, (0.2,) * 3, None, 3)
    task, model = Segmentation(data), nn.Conv2d(3, 3, 3, padding=1).eval()
    student = Student(model, prepare, TestView("whole"), task, ("a", "b", "c"), {"model": "conv"})
    batch = Batch(torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8))
    parts, options = SimpleNamespace(task=task, data=data), ExportOptions(with_preparation=True)
    side = _standing(deployed(student, True, batch.images), student, parts, options)
    expected = Side("conv", model, prepare).forward(task, batch)
    assert torch.allclose(side.forward(task, batch), expected, atol=1e-4)
