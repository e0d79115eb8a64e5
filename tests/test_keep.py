"""What a finished run keeps: its last weights and its methods', no optimizer's state."""

import pytest

from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder, load_checkpoint
from diffkd.training.fit import fit


def run(tiny, output, *words, reporter=None):
    wanted = load(str(tiny), [f"output={output}", "optimizer=adamw", *words])
    return fit(wanted, reporter or Reporter(quiet=True))


@pytest.mark.parametrize("words", [(), ("trainer.ema=0.9",)])
def test_a_finished_run_keeps_the_last_weights_alone(tiny, tmp_path, words):
    thin, whole = run(tiny, tmp_path / "a", *words), run(tiny, tmp_path / "b", "trainer.keep=all", *words)
    [kept], all_kept = thin.list_checkpoints(), whole.list_checkpoints()
    assert len(all_kept) == 2
    assert kept.stat().st_size < 0.6 * all_kept[-1].stat().st_size
    ours, theirs = load_checkpoint(kept), load_checkpoint(all_kept[-1])
    assert (ours["optimizer"], ours["random"]) == (None, None)
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(bool((value == theirs["model"][name]).all()) for name, value in ours["model"].items())
    assert any(name.startswith("distiller.methods.") for name in ours["model"])


@pytest.mark.parametrize("words", [(), ("trainer.ema=0.9",)])
def test_it_is_still_finished_and_its_lost_end_is_written_again(tiny, tmp_path, words):
    folder = run(tiny, tmp_path / "a", *words)
    weights, summary = folder.student_file.read_bytes(), folder.read_summary()
    stamp = folder.student_file.stat().st_mtime_ns
    said = []
    reporter = Reporter(quiet=True)
    reporter.note = said.append
    run(tiny, folder.path, "resume=true", *words, reporter=reporter)
    assert f"the run in {folder.path} is finished" in said
    assert folder.student_file.stat().st_mtime_ns == stamp
    for name in ("summary.json", "student/model.safetensors"):
        (folder.path / name).unlink()
    (folder.path / "student/config.json").write_text("{")
    (folder.path / "metrics.csv").unlink()
    (folder.path / "summary.json").write_text("{")
    run(tiny, folder.path, "resume=true", *words)
    assert folder.damage(history=True) is None
    assert folder.read_summary()["last"] == summary["last"]
    for name in ("summary.json", "student/model.safetensors"):
        (folder.path / name).unlink()
    again = run(tiny, folder.path, "resume=true", *words)
    assert again.student_file.read_bytes() == weights
    assert again.read_summary()["last"] == summary["last"]
    assert len(again.list_checkpoints()) == 1


def test_what_is_kept_serves_comparisons(tiny, tmp_path, diffkd):
    words = ["compare", tiny, "methods=none,diffkd", "seeds=1", "output=c", "trainer.epochs=1"]
    status, _, err = diffkd(*words)
    assert status == 0, err
    kept = RunFolder(tmp_path / "c/diffkd-seed0").list_checkpoints()
    assert len(kept) == 1
    assert load_checkpoint(kept[0])["optimizer"] is None
    status, out, err = diffkd(*words)
    assert status == 0, err
    assert "of 2 runs are there already" in out
