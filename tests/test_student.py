"""A student used from its folder alone."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd import UserError, load_student
from diffkd.pictures.view import TestView


@pytest.fixture
def student(diffkd, tiny, tmp_path):
    """A trained student's folder, far from its run."""
    assert diffkd("distill", "tiny.yaml", "output=run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    return (tmp_path / "run/student").rename(tmp_path / "elsewhere/small")


def test_a_student_is_whole_without_its_run(student):
    found = load_student(student)
    assert found.config["figures"]["top1"] > 0
    assert found.class_names == tuple("0123456789")
    grey = found.read(Image.new("RGB", (30, 20), (255, 255, 255)))
    assert grey.shape == (1, 8, 8)
    assert (grey == 255).all()
    scores = found.predict([grey, grey])
    expected = found.model(found.prepare(torch.stack([grey, grey])))
    assert torch.equal(scores, expected)


def test_a_trained_model_knows_nothing_of_its_training(student, tmp_path):
    model = load_student(student).model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.jit.script(model)
    place = tmp_path / "model.pickle"
    place.write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; m = pickle.load(open(sys.argv[1], 'rb'));"
        "m(torch.zeros(1, 1, 8, 8));"
        "assert not any('distiller' in name or 'training' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(place)], check=True)


@pytest.mark.parametrize("broken", ["no weights", "no description", "not JSON", "without its model"])
def test_a_folder_that_is_no_student(student, broken):
    config = student / "config.json"
    if broken == "no weights":
        (student / "model.safetensors").unlink()
    elif broken == "no description":
        config.unlink()
    elif broken == "not JSON":
        config.write_text("{")
    else:
        config.write_text(
            json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "model"})
        )
    with pytest.raises(UserError, match=str(student)):
        load_student(student)


def test_a_view_is_what_evaluation_shows():
    picture = Image.effect_noise((50, 40), 60).convert("RGB")
    crop = TestView("crop", (16, 16), crop_fraction=0.8)
    assert TestView.of(json.loads(json.dumps(crop.as_dict()))) == crop
    middle = picture.resize((25, 20), Image.Resampling.BILINEAR).crop((4, 2, 20, 18))
    difference = crop(picture).float() - torch.from_numpy(np.array(middle)).permute(2, 0, 1)
    assert difference.abs().max() <= 1
    assert TestView("shortest", (20, 24))(picture).shape == (3, 19, 24)
    assert TestView("whole", channels=1)(picture).shape == (1, 40, 50)
