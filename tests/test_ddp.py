"""Two processes: the gradients of one with the whole batch, one student, one line for an error."""

import socket
import time

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn

from conftest import start
from diffkd import Batch, Data, Distiller
from diffkd.assembly import Step
from diffkd.maths.randomness import seed_everything
from diffkd.methods import diffkd as diffkd_file
from diffkd.models.base import Preprocess
from diffkd.pictures.loading import Loader
from diffkd.recipe.sides import Side
from diffkd.tasks.classification import Classification
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.training import ranks
from diffkd.training.devices import gathered
from diffkd.training.evaluation import evaluate


def build():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * c, 5)).double()
        for c in (4, 8)
    )
    images = torch.rand(8, 3, 8, 8).double()
    targets = torch.arange(8) % 5
    methods = {"diffkd": {"num_steps": 2}}
    task = Classification(Data([], [], 5, (3, 8, 8)))
    distiller = Distiller(student, teacher, {"0": "0", "": ""}, methods, images, task=task)
    # Statistics of half a batch differ from those of the whole: BatchNorm aside.
    step = Step(distiller, 1.0).eval().double()
    return step, images, targets


def fixed_noise(like, **_):
    """Noise that depends on the sample alone, so that halves and whole draw the same."""
    return torch.sin(1000 * like.detach())


def fixed_timesteps(low, high, size, **_):
    return torch.full(size if isinstance(size, tuple) else (size,), high // 3)


def gradients(step, images, targets, backward):
    losses = step(Batch(images, targets))
    backward(torch.stack(list(losses.values())).sum())


class Finder(nn.Module):
    """Finds a box where a picture is bright; its class says how bright."""

    def forward(self, images):
        found = []
        for image in images:
            at = (image[0] > 0.5).nonzero()
            box = torch.cat([at.amin(0).flip(0), at.amax(0).flip(0) + 1]).float()[None]
            label = 1 + (image[1].mean() > 0.5).long()[None]
            found.append({"boxes": box, "scores": image[2].mean()[None], "labels": label})
        return found


def judged(count, **where):
    """Figures of a model of each task on so many pictures; what `where` says is this process's part."""
    draw = torch.Generator().manual_seed(count)
    images, masks = (
        torch.rand(count, 3, 8, 8, generator=draw),
        torch.randint(3, (count, 8, 8), generator=draw),
    )
    boxes = [
        {"boxes": torch.tensor([[0.0, 0, 8, 8], [1, 1, 3, 4]]), "labels": torch.tensor([i % 2, 1])}
        for i in range(count)
    ]
    torch.manual_seed(0)
    linear, pixels = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.Conv2d(3, 3, 1)
    cases = (
        (Classification, linear, masks[:, 0, 0], None),
        (Segmentation, pixels, masks, None),
        (Detection, Finder(), boxes, lambda rows: Batch(*map(list, zip(*rows, strict=True)))),
    )
    found = {}
    for kind, model, targets, collate in cases:
        rows = list(zip(images, targets, strict=True))
        side = Side("a model", model, Preprocess((0.0,), (1.0,), None, channels=3))
        task = kind(Data(rows, rows, 3, (3, 8, 8), collate=collate))
        figures = evaluate(side, task, Loader(rows, 4, shuffle=False, collate=collate, **where))
        found |= {f"{kind.__name__} {name}": value for name, value in figures.scalars.items()}
    return found


def normalised(rank, step=lambda module: module):
    """What BatchNorm holds, and which units dropout spares, after a step on one half of eight samples."""
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    seed_everything(0, rank)
    spared = step(module)(torch.arange(32.0).view(8, 4)[4 * rank : 4 * rank + 4]) != 0
    return module[0].running_mean, spared


def worker(fabric, place):
    torch.set_num_threads(1)
    rank = {"rank": fabric.global_rank, "world_size": 2}
    told = {"figures": [judged(count, **rank) for count in (7, 1)]}
    told["halves"] = gathered(fabric, normalised(fabric.global_rank, fabric.setup))
    diffkd_file.noise_like, torch.randint = fixed_noise, fixed_timesteps
    step, images, targets = build()
    plain = step
    step = fabric.setup(step)
    half = slice(4 * fabric.global_rank, 4 * fabric.global_rank + 4)
    gradients(step, images[half], targets[half], fabric.backward)
    if fabric.is_global_zero:
        torch.save(told | {"gradients": {n: p.grad for n, p in plain.named_parameters()}}, place)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, told by the first."""
    place = tmp_path_factory.mktemp("two") / "told.pt"
    Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="forkserver")).launch(
        worker, place
    )
    return torch.load(place, weights_only=True)


def test_two_processes_judge_as_one_also_where_one_has_no_share(two):
    for count, figures in zip((7, 1), two["figures"], strict=True):
        alone = judged(count)
        assert {"Classification top1", "Segmentation miou", "Detection ap"} <= alone.keys()
        assert figures == pytest.approx(alone, abs=1e-6, nan_ok=True)


def test_batch_statistics_are_each_processes_own_and_so_are_the_draws(two):
    """As the guide says: not equal to one process with the whole batch."""
    (first, spared), (second, others) = two["halves"]
    for rank, mean in enumerate((first, second)):
        own = torch.arange(32.0).view(8, 4)[4 * rank : 4 * rank + 4].mean(0)
        torch.testing.assert_close(mean, 0.1 * own)
    assert not torch.equal(spared, others)
    assert torch.equal(spared, normalised(0)[1])  # the first process's are those of a run alone


def test_two_processes_give_the_gradients_of_the_double_batch(two, monkeypatch):
    found = two["gradients"]
    monkeypatch.setattr(diffkd_file, "noise_like", fixed_noise)
    monkeypatch.setattr(torch, "randint", fixed_timesteps)
    step, images, targets = build()
    gradients(step, images, targets, torch.Tensor.backward)
    expected = {n: p.grad for n, p in step.named_parameters()}
    assert found.keys() == expected.keys()
    assert sum(g.abs().sum() for g in expected.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_a_run_on_two_processes_ends_with_one_student(tiny, diffkd, tmp_path):
    words = ("trainer.devices=2", "data.batch_size=128", "output=a")
    process = start("distill", tiny, *words, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("run folder: a") == 1
    status, out, err = diffkd("evaluate", "a")
    assert status == 0, err
    assert "as recorded" in out


# A model that gets one of two processes into trouble in its third training step, or while it is tested.
TROUBLE = """
import os, resource, signal
from torch import nn
from diffkd.errors import UserError

class Net(nn.Sequential):
    steps = 0

    def forward(self, images):
        Net.steps += self.training
        kind, rank = os.environ["TROUBLE"].split(":")
        late = Net.steps > 3 and not self.training if kind == "killed-in-testing" else Net.steps == 3
        if late and os.environ.get("LOCAL_RANK", "0") == rank:
            if kind == "picture":
                raise UserError("picture 'cat/7.png' cannot be read")
            if kind.startswith("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return super().forward(images)

def net(num_classes):
    return Net(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ("picture:1", "error: picture 'cat/7.png' cannot be read"),
        ("full:0", "error: checkpoint of step 4 cannot be written"),
        ("killed:1", "error: another process of this run has ended"),
        ("killed-in-testing:1", "error: another process of this run has ended"),
    ],
)
def test_trouble_in_one_of_two_processes_ends_both_with_one_line(tiny, tmp_path, trouble, line):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    words = ("trainer.devices=2", "student=trouble.py:net", "method=none", "trainer.save_every=4", "output=a")
    process = start("distill", tiny, *words, cwd=tmp_path, TROUBLE=trouble)
    process.communicate(timeout=120)
    ended = time.time()
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.count(line) == 1, err
    assert "Traceback" not in err
    if trouble.startswith("killed"):
        assert ended - (tmp_path / "killed").stat().st_mtime < 5


def test_a_refused_recipe_is_said_once_by_two_processes(tiny, tmp_path):
    process = start("distill", tiny, "trainer.devices=2", "data.batch_size=33", "output=a", cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert err.count("error: ") == err.count("\n") == 1, err
    assert "data.batch_size=33" in err
    assert not (tmp_path / "a").exists()


def test_machines_that_could_not_meet_are_refused_at_once(tiny, diffkd, monkeypatch):
    for key in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(key, raising=False)
    status, _, err = diffkd("distill", tiny, "trainer.num_nodes=1000", "output=a")
    assert (status, err.count("\n")) == (2, 1)
    assert "trainer.num_nodes=1000: set MASTER_ADDR, MASTER_PORT, NODE_RANK on each machine" in err
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777", "NODE_RANK": "two"}
    status, _, err = diffkd("distill", tiny, "trainer.num_nodes=2", "output=a", **where)
    assert (status, err.count("\n")) == (2, 1), err


def test_a_port_that_is_taken_is_one_line(tiny, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        process = start("distill", tiny, "trainer.devices=2", "output=a", cwd=tmp_path, **where)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert f"cannot meet at 127.0.0.1:{where['MASTER_PORT']}" in err


def test_machines_that_do_not_come_are_waited_for_with_a_limit(monkeypatch):
    left = []
    monkeypatch.setattr(ranks, "MEETING", -1.0)
    watch = ranks._Watch(Fabric(accelerator="cpu", devices=1))
    watch._leave = lambda line, status: left.append((line, status))
    watch._look()
    assert left == [("not all processes of this run came within -0.0166667 minutes", 2)]


def test_a_comparison_on_two_processes_writes_one_report(tiny, tmp_path):
    words = ("methods=none,kd", "seeds=1", "trainer.devices=2", "trainer.epochs=1", "output=c")
    process = start("compare", tiny, *words, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("report: c/report.html") == 1, out
    assert (tmp_path / "c/report.html").is_file()
    assert len(list((tmp_path / "c").glob("*/summary.json"))) == 2


class Keys(dict):
    """A store that all processes share."""

    def add(self, key, number):
        self[key] = self.get(key, 0) + number
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    set = dict.__setitem__


def test_who_wanted_to_speak_and_was_killed_is_spoken_for(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "LOOK", 0.01)
    torn = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def ends(**known):
        watch = ranks._Watch(Fabric(accelerator="cpu", devices=1))
        watch._store = Keys({watch._key(key): value for key, value in known.items()})
        return watch.last_words(torn), watch

    for known in ({}, {"said": 1}):
        words, watch = ends(**known)
        assert str(words).startswith("another process of this run has ended")
        assert watch._store.check([watch._key("end")])
    words, watch = ends(said=1, end='{"status": 2}')
    assert isinstance(words, SystemExit)
    assert words.code == 2
    # the watch speaks for it, too
    left = []
    monkeypatch.setattr(ranks, "leave", left.append)
    for known, said in (({"said": 1}, 1), ({"said": 1, "end": '{"status": 2}'}, 0)):
        watch = ranks._Watch(Fabric(accelerator="cpu", devices=1))
        watch._store = Keys({watch._key(key): value for key, value in known.items()})
        watch._leave("gone", 2)
        assert capsys.readouterr().err.count("error: gone") == said
    assert left == [2, 2]


def test_a_watch_without_a_connection_looks_often():
    watch, waits = ranks._Watch(Fabric(accelerator="cpu", devices=1)), []
    watch.over.wait = lambda seconds: waits.append(seconds) or len(waits) > 2
    watch._look = lambda: setattr(watch, "_store", Keys(one=1) if len(waits) > 1 else None)
    watch.run()
    assert waits == [ranks.LOOK / 10, ranks.LOOK / 10, ranks.LOOK]
