"""Two processes give the gradients of one with the double batch."""

import torch
from lightning.fabric import Fabric
from torch import nn

from conftest import start
from diffkd import Batch, Data, Distiller
from diffkd.assembly import Step
from diffkd.tasks.classification import Classification


def build():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * c, 5)).double()
        for c in (4, 8)
    )
    images = torch.rand(8, 3, 8, 8).double()
    targets = torch.arange(8) % 5
    data = Data([], [], 5, (3, 8, 8))
    distiller = Distiller(student, teacher, {"0": "0", "": ""}, {"diffkd": {"num_steps": 2}}, images)
    # Statistics of half a batch differ from those of the whole: BatchNorm aside.
    step = Step(distiller, Classification(data), 1.0).eval().double()
    return step, images, targets


def fixed_noise(like, **_):
    """Noise that depends on the sample alone, so that halves and whole draw the same."""
    return torch.sin(1000 * like.detach())


def fixed_timesteps(low, high, size, **_):
    return torch.full(size if isinstance(size, tuple) else (size,), high // 3)


def gradients(step, images, targets, backward):
    losses = step(Batch(images, targets))
    backward(torch.stack(list(losses.values())).sum())


def worker(fabric, place):
    torch.randn_like, torch.randint = fixed_noise, fixed_timesteps
    step, images, targets = build()
    plain = step
    step = fabric.setup(step)
    half = slice(4 * fabric.global_rank, 4 * fabric.global_rank + 4)
    gradients(step, images[half], targets[half], fabric.backward)
    if fabric.is_global_zero:
        torch.save({n: p.grad for n, p in plain.named_parameters()}, place)


def test_two_processes_give_the_gradients_of_the_double_batch(tmp_path, monkeypatch):
    place = tmp_path / "gradients.pt"
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(worker, place)
    found = torch.load(place, weights_only=True)
    monkeypatch.setattr(torch, "randn_like", fixed_noise)
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
