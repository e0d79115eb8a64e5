"""Teachers that are made: which of them serve again, and mistakes that show before they are made."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffkd import Distiller, UserError

WORDS = [
    "teacher=simple/cnn4",
    "student=simple/cnn4",
    "teacher.train.epochs=1",
    "trainer.epochs=1",
    "trainer.accelerator=cpu",
    "data.image_size=16",
    "data.batch_size=4",
    "data.workers=0",
]


@pytest.fixture
def photos(tmp_path):
    """Makes a folder of two classes of pictures of one brightness."""

    def make(name, brightness):
        for kind in ("cat", "dog"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(6):
                noise = np.random.default_rng(i).integers(0, brightness, (20, 20, 3))
                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / name / kind / f"{i}.png")
        return tmp_path / name

    return make


def test_a_teacher_serves_its_own_pictures_only_wherever_they_lie(diffkd, photos, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    one, other = photos("one", 200), photos("other", 90)
    status, _, err = diffkd("distill", "folder", *WORDS, f"data.root={one}", "output=a")
    assert (status, "once" in err) == (0, True), err
    one.rename(tmp_path / "moved")
    status, _, err = diffkd("distill", "folder", *WORDS, f"data.root={tmp_path / 'moved'}", "output=b")
    assert (status, "once" in err) == (0, False), err
    status, _, err = diffkd("distill", "folder", *WORDS, f"data.root={other}", "output=c")
    assert (status, "once" in err) == (0, True), err
    status, _, err = diffkd("distill", "folder", *WORDS, f"data.root={other}", "output=a", "resume=true")
    assert (status, err.count("\n")) == (2, 1)
    assert "was made on other data" in err


def test_a_teacher_is_made_anew_where_its_code_changed(diffkd, tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    code = (
        "from diffkd.models.simple import SimpleCNN\n"
        "def net(num_classes): return SimpleCNN({}, 1, num_classes)\n"
    )
    for width in (4, 5):
        folder = tmp_path / f"w{width}"
        folder.mkdir()
        (folder / "mine.py").write_text(code.format(width))
        words = [f"teacher.model={folder}/mine.py:net", "teacher.train.epochs=1", "trainer.epochs=1"]
        status, _, err = diffkd("distill", "tiny.yaml", *words, f"output=r{width}")
        assert (status, "once" in err) == (0, True), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.labels=none", "data.num_classes=2"], "a teacher cannot be trained without labels"),
        (["task.label_smoothing=2.0"], "task.label_smoothing=2.0: needs at least 0 and less than 1"),
        (["data.augment=rand-m9.9.9-mstd0.5"], "no policy that timm knows"),
        (["student.mean=[0.5,0.5]"], "mean has 2 values for 3 channels"),
    ],
)
def test_mistakes_show_before_the_teacher_is_made(words, said, diffkd, photos):
    status, _, err = diffkd(
        "distill", "folder", *WORDS, f"data.root={photos('one', 200)}", "output=a", *words
    )
    assert (status, err.count("\n")) == (2, 1), err
    assert said in err


def test_a_runs_own_recipe_goes_on_in_its_folder(diffkd, tiny, tmp_path):
    assert diffkd("distill", "tiny.yaml", "output=a")[0] == 0
    status, _, err = diffkd("distill", "a/recipe.yaml", "resume=true")
    assert status == 0
    assert "the run in a is finished" in err


def net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(36 * width, 5))


SAMPLE = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give sample="),
        ({"sample": SAMPLE, "methods": ["kd"]}, "names with weights"),
        ({"sample": SAMPLE, "methods": {"kd": -1.0}}, "weight -1.0 is negative"),
        ({"sample": SAMPLE, "methods": {"kd": {"temprature": 1.0}}}, "did you mean 'temperature'"),
    ],
)
def test_mistakes_in_ones_own_loop(arguments, said):
    with pytest.raises(UserError, match=said):
        Distiller(net(), net(8), **arguments)


def test_student_and_teacher_are_two():
    one = net()
    with pytest.raises(UserError, match="share 4 weights"):
        Distiller(one, one, sample=SAMPLE)


def test_no_methods_no_loss():
    assert Distiller(net(), None, methods={}, sample=SAMPLE)(SAMPLE).total.item() == 0
    assert Distiller(net(), net(8), methods="none", sample=SAMPLE)(SAMPLE).total.item() == 0


def test_outputs_of_several_entries_are_not_taken_for_class_scores():
    class Two(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

        def forward(self, x):
            feature = self.body(x).mean((2, 3))
            return self.head(feature), feature

    with pytest.warns(UserWarning, match="none is taken for class scores"):
        distiller = Distiller(Two(4), Two(8), {"body": "body", "": ""}, "sp", SAMPLE)
    assert not any(pair.is_logits for pair in distiller.pairs)
    distiller = Distiller(Two(4), Two(8), {"[0]": "[0]"}, "kd", SAMPLE, logits=("[0]",))
    assert list(distiller(SAMPLE)) == ["kd.[0].kd"]
