"""What there is to set, a schema of it, and what the cache keeps."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from filelock import FileLock

from diffkd.names import submodules
from diffkd.recipe.files import builtin
from diffkd.report.settings import groups
from diffkd.runs.places import note_use, users, uses_file


def test_every_section_says_its_keys_with_type_default_and_meaning(diffkd):
    status, out, err = diffkd("settings", "trainer")
    assert status == 0, err
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines()}
    status, out, _ = diffkd("settings", "taps")  # a key, wherever it stands
    assert "method.taps" in out
    assert "text by name by name | null null " in " ".join(out.split())  # however long, columns stay apart
    assert lines["trainer.ema"] == (
        "trainer.ema number | null null decay of the averaged student, which is then what is evaluated and "
        "shipped."
    )
    assert lines["trainer.precision"].startswith("trainer.precision fp32 | bf16 | fp16 fp32")
    status, out, _ = diffkd("settings", "optimizer")
    assert (status, out.count("optimizer.lr "), "optimizer adamw:" in out) == (0, 3, True)
    assert "what the learning rate of a layer" in out


def test_options_of_methods_data_and_tasks(diffkd):
    status, out, _ = diffkd("settings", "kd")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    weight = "of all its losses beside the supervised ones; auto measures it."
    assert (status, lines[1]) == (0, f"method.kd.weight number | auto 0.9 {weight}")
    assert any(
        line.startswith("method.kd.temperature number | null null") and len(line) > 40 for line in lines
    )
    status, out, _ = diffkd("settings", "diffkd")
    assert (status, "as in `DiffKD`" in out, "method.diffkd.num_steps" in out) == (0, False, True)
    status, out, _ = diffkd("settings", "classification")
    assert (status, "task.label_smoothing" in out) == (0, True)
    assert "share of the target probability" in out
    status, out, _ = diffkd("settings", "folder")
    assert (status, "data.image_size" in out) == (0, True)
    status, out, _ = diffkd("settings")
    assert (status, "student.weights" in out, "trainer.epochs" in out) == (0, True, True)
    status, _, err = diffkd("settings", "diffdk")
    assert (status, "did you mean 'diffkd'" in err) == (2, True)


def test_no_setting_is_without_a_sentence():
    rooms = ("methods", "data", "tasks")
    names = ["", *(name for room in rooms for name in submodules(f"diffkd.{room}"))]
    found = [setting for name in names for group in groups(name) for setting in group.settings]
    assert len(found) > 300
    assert [setting.key for setting in found if not setting.said] == []
    said = {setting.key: setting.said for setting in found}
    assert said["data.max_corrupt"].startswith("how many")  # of options that several data sets share


def test_the_schema_describes_the_recipes_that_come_along(diffkd):
    status, out, _ = diffkd("schema")
    schema = json.loads(out)
    assert status == 0
    assert schema["properties"]["seed"] == {"default": 0, "minimum": 0, "title": "Seed", "type": "integer"}
    trainer = schema["$defs"]["TrainerRecipe"]["properties"]
    for place in builtin().values():
        content = yaml.safe_load(place.read_text())
        assert set(content) <= {*schema["properties"], "base"}
        assert set(content.get("trainer") or {}) <= set(trainer)


@pytest.fixture
def teachers(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    for name, days in (("old", 40), ("busy", 50), ("new", 1)):
        folder = tmp_path / "cache/teachers" / name
        (folder / "student").mkdir(parents=True)
        (folder / "student/model.safetensors").write_bytes(b"0" * 1_500_000)
        folder.with_name(f"{name}.lock").touch()
        for place in (folder / "student/model.safetensors", folder / "student", folder):
            os.utime(place, (time.time() - days * 86400,) * 2)
    return tmp_path / "cache/teachers"


def test_clean_lists_and_removes_what_is_old_and_not_in_use(teachers, diffkd):
    status, out, _ = diffkd("clean")
    assert (status, out.splitlines()[0]) == (0, "busy: 1.5 MB, 50.0 days old")
    assert out.splitlines()[-1] == "3 teachers, 4.5 MB"
    with FileLock(teachers / "busy.lock"):
        status, out, _ = diffkd("clean", "teachers", "older=30d", "yes=true")
        assert status == 0
        assert "busy: 1.5 MB, 50.0 days old, in use" in out
        assert "busy: in use, left" in out
        assert "old: removed" in out
    assert {p.name for p in teachers.iterdir() if p.is_dir()} == {"busy", "new"}
    assert not (teachers / "old.lock").exists()
    run = teachers.parents[1] / "runs/a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    for _ in range(2):
        note_use(teachers / "busy", run)
    assert uses_file(teachers / "busy").read_text() == f"{run}\n"
    status, out, _ = diffkd("clean")
    assert out.splitlines()[:2] == [
        "run runs/a: 0.0 MB, 0.0 days old",
        f"busy: 1.5 MB, 50.0 days old, needed by {run}",
    ]
    status, out, _ = diffkd("clean", "teachers", "older=30d", "yes=true")
    assert f"busy: needed by {run}, left" in out
    other = teachers / "new/student/model.safetensors"
    for weights, needs in ((teachers / "busy/student/model.safetensors", True), (other, False)):
        told = {"teacher": None, "teachers": {"wide": {"weights": str(weights)}}}
        (run / "summary.json").write_text(json.dumps(told))
        assert bool(users(teachers / "busy")) == needs  # another run in its place has another teacher
    status, out, _ = diffkd("clean", "teachers", "older=30d", "yes=true")
    assert "busy: removed" in out
    assert not uses_file(teachers / "busy").exists()
    status, _, err = diffkd("clean", "everything")
    assert (status, "clean takes: teachers older=30d" in err) == (2, True)


def test_clean_asks_first(teachers):
    command = [sys.executable, "-m", "diffkd", "clean", "teachers"]
    done = subprocess.run(command, input="n\n", capture_output=True, text=True, check=False)
    assert (done.returncode, "remove 3 of them, 4.5 MB?" in done.stdout) == (0, True), done.stderr
    assert len([p for p in teachers.iterdir() if p.is_dir()]) == 3
