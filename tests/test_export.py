"""The student in other formats gives the same answers."""

import json

import pytest
import timm
import torch

from diffkd import load_student
from diffkd.use.runtime import Onnx


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
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["class_names"] == list("0123456789")
    assert told["input"].startswith("uint8" if prepared else "normalised")


def test_eight_bits_are_smaller_and_measured(diffkd, run, tmp_path):
    status, out, err = diffkd("export", run, "quantize=int8", f"output={tmp_path}/a.onnx")
    assert status == 0, err
    figures = [float(word) for word in out.replace("(float:", "").split() if word.replace(".", "").isdigit()]
    assert abs(figures[-1] - figures[-2]) < 5  # points of top-1 beside the float model's
    assert (tmp_path / "a-int8.onnx").is_file()


@pytest.mark.parametrize("to", ["torch_export", "torchscript", "safetensors"])
def test_pytorchs_own_formats(diffkd, run, to, tmp_path):
    status, _, err = diffkd("export", run, f"to={to}", f"output={tmp_path}/a")
    assert status == 0, err
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
    status, _, err = diffkd("export", "run", "to=timm", "output=small")
    assert status == 0, err
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


def test_a_detector_leaves_with_its_postprocessing(tmp_path):
    from diffkd.data.base import Data
    from diffkd.models.base import Preprocess
    from diffkd.models.detectors import build
    from diffkd.pictures.view import TestView
    from diffkd.tasks.detection import Detection
    from diffkd.use.deploy import Standing, deployed, distance, examples
    from diffkd.use.runtime import write
    from diffkd.use.student import Student

    torch.manual_seed(0)
    options = {"channels": 32, "levels": [4, 5], "score_thresh": 0.005, "num_convs": 1}
    model = build("fcos:timm/test_resnet", num_classes=3, image_size=(64, 64), **options).eval()
    data = Data(range(0), range(0), 3, (3, 64, 64))
    task, prepare = Detection(data), Preprocess((0.5,) * 3, (0.5,) * 3, None, channels=3)
    student = Student(model, prepare, TestView("whole"), task, ("a", "b", "c"), {"image_shape": [3, 64, 64]})
    images = examples(student, None, raw=True)[:1]
    module = deployed(student, True, images)
    write(module, images, tmp_path / "a.onnx", "onnx", set(), None, {"class_names": ["a", "b", "c"]})
    runtime = Onnx(tmp_path / "a.onnx")
    assert runtime.session.get_modelmeta().custom_metadata_map == {"class_names": '["a", "b", "c"]'}
    other = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert len(module(other)[0]) > 0
    assert distance(module, runtime, other) < 1e-4
    (answer,) = Standing(runtime, task)(other[:, :, :50])  # smaller pictures are padded
    assert set(answer["labels"].tolist()) <= {1, 2, 3}
