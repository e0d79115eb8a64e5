"""A run folder under trouble: two that want it, damaged files, parents and memory that are gone."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from diffkd import Data, UserError
from diffkd.models.base import Preprocess
from diffkd.pictures.loading import Loader
from diffkd.pictures.memory import ArraySplit
from diffkd.recipe.schema import load
from diffkd.recipe.sides import Side
from diffkd.runs.disk import write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.tasks.classification import Classification
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.training.devices import in_one_line
from diffkd.training.evaluation import evaluate
from diffkd.training.meter import Place
from diffkd.use.student import read_config


def test_a_run_folder_is_one_processs_and_an_unused_one_leaves_no_trace(tmp_path):
    folder = RunFolder(tmp_path / "deep/er/run")
    with folder.lock():
        assert not folder.exists()  # a lock is no run
        said = rf"being written by process {os.getpid()} on .* since .*; wait for it, or set output="
        with pytest.raises(UserError, match=said), RunFolder(folder.path).lock():
            raise AssertionError("two hold it")
    assert not (tmp_path / "deep").exists()
    with folder.lock():  # given back
        folder.create("seed: 0\n")
    assert folder.exists()
    assert not (folder.path / ".holder").exists()


DAMAGED = {
    "empty": b"",
    "cut": b'{"last": {"top1": 0.5',
    "no text": b"\xff\xfe\x00\x81",
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"1e999",
    "deep": b"[" * 50_000,
    "another mapping": b'{"a": {}}',
    "a header alone": b"epoch,step,top1\n",
    "words": b"epoch,top1\n1,many\n",
    "a cut row": b"epoch,step,top1\n1,5,0.5\n2,1",
    "a cut number": b"epoch,step,top1\n1,5,0.5\n2,10,0.",
    "too long a row": b"epoch,top1\n1,0.5,7,8\n",
    "nul": b"epoch,top1\n\0\0\0\0",
}


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create("seed: 0\n")
    (folder.path / "student").mkdir()
    for name, read in (
        ("metrics.csv", folder.read_history),
        ("student/config.json", lambda: read_config(folder.path / "student")),
    ):
        os.mkfifo(folder.path / name)
        with pytest.raises(UserError, match=f"{name}' is not a file"):
            read()


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_side_files_are_one_line_that_names_them(tmp_path, content):
    folder = RunFolder(tmp_path / "a")
    folder.create("seed: 0\n")
    readers = {
        "summary.json": folder.read_summary,
        "metrics.csv": folder.read_history,
        "identity.json": folder.read_identity,
        "config.json": lambda: read_config(folder.path),
    }
    for name, read in readers.items():
        (folder.path / name).write_bytes(DAMAGED[content])
        if name == "identity.json" and content == "another mapping":
            continue  # digests by name, of a kind
        with pytest.raises(UserError, match=name) as raised:
            read()
        assert "\n" not in str(raised.value)
    (folder.path / "checksums.json").write_bytes(DAMAGED[content])
    assert "checksums.json" in (folder.damage() or "") or content == "another mapping"


def test_a_writer_that_finds_no_room_names_the_file_it_was_to_write(tmp_path):
    def write(place):
        place.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.csv'"):
        write_atomically(tmp_path / "a.csv", write)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_and_a_missing_file_of_a_finished_run_are_named(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create("seed: 0\n")
    folder.write_student({"w": torch.arange(4.0)}, {"model": "a/b"})
    folder.write_summary({"metric": "top1"})
    assert folder.damage() is None
    for name in ("student/model.safetensors", "student/config.json", "summary.json"):
        place = folder.path / name
        whole = place.read_bytes()
        for harmed, said in ((bytes([whole[0] ^ 1]) + whole[1:], "checksum"), (None, "is missing")):
            place.unlink() if harmed is None else place.write_bytes(harmed)
            assert name in folder.damage()
            assert said in folder.damage()
            place.write_bytes(whole)
    assert folder.damage() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_a_run_ends_with_the_comparison_that_started_it():
    child = (
        "import time; from diffkd.cli import _end_with_parent; _end_with_parent(); "
        "print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "env = os.environ | {'DIFFKD_PARENT': str(os.getpid())}\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=env)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
    lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    (number,) = (int(line) for line in lines - {"up"})
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while _runs(number) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _runs(number)


def _runs(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "on the accelerator"),
        (MemoryError(), "out of memory; lower data.batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 7 bytes"), "out of memory"),
        (OverflowError("Numerical result out of range"), "a number is beyond what can be computed with"),
        (RuntimeError("value cannot be converted to type float without overflow"), "a number is beyond"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower data.workers"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(error, words, tiny):
    with pytest.raises(UserError) as raised, in_one_line(load(str(tiny))):
        raise error
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="of another kind"), in_one_line(load(str(tiny))):
        raise RuntimeError("of another kind")


def test_evaluation_computes_in_the_runs_precision_where_the_figures_bear_it():
    torch.manual_seed(0)
    seen = []

    class Seeing(nn.Linear):
        def forward(self, images):
            seen.append((output := super().forward(images.flatten(1))).dtype)
            return output

    images, model = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8), Seeing(16, 3)
    prepare = Preprocess((0.5,), (0.5,), None, channels=1)
    with torch.no_grad():  # labels as bfloat16 answers, so that the figure tells the precisions apart
        inputs = (images / 255 - 0.5).flatten(1) * 2
        labels = (inputs.bfloat16() @ model.weight.bfloat16().T + model.bias.bfloat16()).argmax(1)
    split = ArraySplit(images, labels)
    task = Classification(Data(split, split, 3, (1, 4, 4)))
    side, loader = Side("own", model, prepare), Loader(split, 6, shuffle=False, seed=0)
    assert evaluate(side, task, loader, precision="bf16").scalars["top1"] == 1
    evaluate(side, task, loader)
    assert seen == [torch.bfloat16, torch.float32]
    assert model.weight.dtype == torch.float32
    assert (Classification.half, Segmentation.half, Detection.half) == (True, True, False)


def test_a_history_comes_back_as_it_was_and_costs_a_save_little(tmp_path):
    place = Place(step=3)
    assert Place.of(place.state(), batches=10) == place
    for epoch in range(1, 2000):
        more = {"ap": float("inf")} if epoch == 2 else {}
        place.add_row({"epoch": epoch / 2 if epoch % 2 else epoch // 2, "loss": 1 / epoch, **more})
        if epoch == 3:
            early = place.state()
    torch.save(place.state(), tmp_path / "place.pt")
    found = Place.of(torch.load(tmp_path / "place.pt", weights_only=True), batches=10)
    assert repr(found) == repr(place)  # whole numbers stay whole
    assert len(Place.of(early, batches=10).history) == 3
    found.add_row(place.history[1])
    assert Place.of(found.state(), batches=10).history == [*place.history, place.history[1]]
    assert (tmp_path / "place.pt").stat().st_size < 2000 * 35  # bytes: no names of columns in every row
