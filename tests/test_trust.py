"""Code that a file names runs only where its reader says so; what is named is looked at before."""

import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from conftest import TINY
from diffkd import Run, UserError, load_student
from diffkd.data.base import builder
from diffkd.models.base import build
from diffkd.recipe.schema import load

CHROMIUM = shutil.which("chromium")
EVIL = {
    "student.model 'os:system'": "student: {model: 'os:system', options: {command: touch ran}}",
    "data.name 'shutil:rmtree'": "data: {name: 'shutil:rmtree', root: keep}",
    "task.name 'evil.py:Task'": "task: 'evil.py:Task'",
    "method 'evil.py:Loss'": "method: {'evil.py:Loss': 1.0}",
    "teacher.model 'evil.py:net'": "teacher: {model: 'evil.py:net'}",
}


@pytest.fixture
def hostile(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.mark.parametrize("command", ["check", "distill", "compare"])
@pytest.mark.parametrize("which", EVIL)
def test_a_file_that_names_code_is_refused(which, command, hostile, diffkd):
    (hostile / "r.yaml").write_text(f"base: tiny\n{EVIL[which]}\n")
    status, _, err = diffkd(command, "r.yaml", "output=out")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{which} would run code; add trust=true if you trust it" in err
    assert not (hostile / "ran").exists()
    assert (hostile / "keep").exists()


@pytest.mark.parametrize("words", [["student=os:system"], ["data=shutil:rmtree", "data.root=keep"]])
def test_what_is_named_is_looked_at_before_it_is_called(words, hostile, diffkd):
    status, _, err = diffkd("check", "tiny.yaml", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "is part of Python, not a function" in err
    assert (hostile / "keep").exists()


def test_kinds(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    (hostile / "own.py").write_text("class Net: pass\nnumber = 3\ndef two(root, force): pass\n")
    for name in ("own.py:Net", "own.py:number", "os:remove"):
        with pytest.raises(UserError, match=r"not a function that builds a model, or a torch\.nn\.Module"):
            build(name, num_classes=2, image_shape=(1, 8, 8))
    for name in ("own.py:number", "own.py:two", "os:removedirs"):
        with pytest.raises(UserError, match="not a function `build"):
            builder(name)


def test_trust_is_said_on_the_command_line_alone(hostile):
    place = hostile / "r.yaml"
    place.write_text("base: tiny\nstudent: {model: 'mine.py:net'}\n")
    assert load(str(place), ["trust=true"]).student.model == "mine.py:net"
    assert load(str(place), ["student=mine.py:net"]).student.model == "mine.py:net"
    place.write_text("base: tiny\ntrust: true\nstudent: {model: 'mine.py:net'}\n")
    with pytest.raises(UserError, match="'trust' belongs on the command line"):
        load(str(place))


def test_a_run_folder_of_own_code_asks_for_trust(hostile, diffkd):
    code = "from diffkd.models.simple import SimpleCNN\n"
    (hostile / "mine.py").write_text(f"{code}def net(num_classes): return SimpleCNN(2, 1, num_classes)\n")
    (hostile / "yaml.py").write_text("raise SystemExit('a neighbour was imported')\n")
    words = ["tiny.yaml", "student=mine:net", "trainer.max_steps=1", "method=none"]
    assert diffkd("distill", *words, "output=a")[0] == 0
    assert str(hostile) not in sys.path[:1]
    status, _, err = diffkd("evaluate", "a")
    assert (status, err.count("\n")) == (2, 1)
    assert "student.model 'mine:net' would run code; add trust=true" in err
    status, out, err = diffkd("evaluate", "a", "trust=true")
    assert status == 0, err
    assert "as recorded" in out
    with pytest.raises(UserError, match="would run code"):
        load_student(hostile / "a")
    assert load_student(hostile / "a", trust=True).model is not None


def test_every_use_of_a_student_of_own_code_asks_for_trust(hostile, diffkd):
    code = "from diffkd.models.simple import SimpleCNN\n"
    (hostile / "mine.py").write_text(f"{code}def net(num_classes): return SimpleCNN(4, 1, num_classes)\n")
    Image.new("L", (8, 8), 90).save(hostile / "one.png")
    words = ["tiny.yaml", "student=mine.py:net", "trainer.max_steps=1"]
    assert diffkd("distill", *words, "output=a")[0] == 0
    for command, rest in (("predict", ["one.png"]), ("export", []), ("visualize", ["one.png"])):
        status, _, err = diffkd(command, "a", *rest)
        assert (status, err.count("\n")) == (2, 1), err
        assert "'mine.py:net' would run code; add trust=true if you trust it" in err
        status, _, err = diffkd(command, "a", *rest, "trust=true")
        assert status == 0, err
    assert (hostile / "a/export/student.onnx").is_file()
    assert (hostile / "a/denoising/index.html").is_file()
    assert len(Run(hostile / "a", trust=True).predict(hostile / "one.png").rows) == 1
    with pytest.raises(UserError, match="would run code"):
        Run(hostile / "a").predict(hostile / "one.png")
    status, _, err = diffkd("predict", "a", "one.png", "trust=maybe")
    assert (status, "trust=maybe: needs true or false" in err) == (2, True)


def test_odd_names_are_shown_as_they_are(hostile, diffkd):
    words = ["tiny.yaml", "trainer.max_steps=1", "method=none"]
    status, out, err = diffkd("distill", *words, "output=runs/a[/x] [lr=0.1]")
    assert status == 0, err
    assert "run folder: runs/a[/x] [lr=0.1]" in out
    status, _, err = diffkd("evaluate", "no\x1b[31m\nrun")
    assert (status, err.count("\n")) == (2, 1)
    assert "\x1b" not in err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the pages")
def test_no_page_runs_what_stands_in_names(hostile, diffkd):
    """Of classes, pictures and the run; a browser would change the page's title."""
    kinds = ("<svg onload=document.title='RAN'>", "\"onmouseover=document.title='RAN' x=\"")
    for split, kind in ((split, kind) for split in ("train", "val") for kind in kinds):
        (hostile / "data" / split / kind).mkdir(parents=True)
        for i in range(4):
            picture = hostile / "data" / split / kind / f"{i}<img src=x onerror=document.title='RAN'>.png"
            Image.new("RGB", (16, 16), (60 * i, 90, 90)).save(picture)
    name = "<img src=x onerror=document.title='RAN'>"
    words = [
        "data.root=data",
        "data.image_size=16",
        "data.workers=0",
        "data.batch_size=4",
        "trainer.max_steps=1",
    ]
    words += ["teacher=simple/cnn4", "student=simple/cnn4", "teacher.train=null"]
    assert diffkd("distill", "folder", *words, f"output={name}")[0] == 0
    assert diffkd("visualize", name, f"data/val/{kinds[0]}", "output=shown")[0] == 0
    for page in (hostile / name / "run.html", hostile / "shown/index.html"):
        shutil.copy(page, hostile / "page.html")
        how = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        found = subprocess.run(
            [CHROMIUM, *how, (hostile / "page.html").as_uri()], capture_output=True, text=True, timeout=60
        ).stdout
        title = re.search("<title>(.*?)</title>", found, re.DOTALL)
        assert title is not None
        assert title[1].strip() not in ("", "RAN")
        assert not re.search("<(img|svg)[^>]* on(load|error)=", found)


def test_evaluate_takes_other_data_of_the_same_classes(hostile, diffkd):
    assert diffkd("distill", "tiny.yaml", "trainer.max_steps=1", "method=none", "output=a")[0] == 0
    status, out, _ = diffkd("evaluate", "a", "trainer.threads=1")
    assert (status, "as recorded" in out) == (0, True)
    status, _, err = diffkd("evaluate", "a", "optimizer.lr=1")
    assert (status, "evaluate takes data.KEY=" in err) == (2, True)
