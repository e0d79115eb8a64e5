"""Which weights decay, at what rate they learn, which are frozen; the average of the student."""

import pytest
import torch
from torch import nn

from diffkd import Batch, Data, Distiller
from diffkd.assembly import Step
from diffkd.errors import UserError
from diffkd.models.freeze import freeze
from diffkd.recipe.schema import load
from diffkd.recipe.training import AdamW, Sgd
from diffkd.runs.console import Reporter
from diffkd.runs.folder import load_checkpoint
from diffkd.tasks.classification import Classification
from diffkd.training.ema import Ema
from diffkd.training.fit import fit
from diffkd.training.optim import build_optimizer, parameter_groups, set_lr


class Net(nn.Module):
    """Every kind of weight that is told apart."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm([4, 6, 6]))
        self.scale, self.token = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.head = nn.Linear(4, 5)

    def no_weight_decay(self):
        return {"token"}

    def forward(self, x):
        x = self.block(self.norm(self.stem(x)))
        return self.head(x.mean((2, 3)) * self.scale + self.token)


def step_of(net, methods=(), frozen=()):
    images = torch.rand(2, 3, 8, 8)
    teacher = Net() if methods else None
    distiller = Distiller(net, teacher, {"": ""} if methods else None, dict(methods), images)
    return Step(distiller, 1.0, frozen)


def names(step, group):
    held = {id(p) for p in group["params"]}
    return {n.removeprefix("distiller.student.") for n, p in step.named_parameters() if id(p) in held}


def test_by_default_only_matrices_and_kernels_decay():
    step = step_of(Net())
    groups = parameter_groups(Sgd(weight_decay=0.1), step)
    decayed = [names(step, group) for group in groups if "weight_decay" not in group]
    assert decayed == [{"stem.weight", "block.0.weight", "head.weight"}]
    assert sum(len(group["params"]) for group in groups) == len(list(step.parameters()))


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        ("none", set()),
        ([], set()),
        (["head", "stem.bias"], {"head.weight", "head.bias", "stem.bias"}),
    ],
)
def test_what_does_not_decay_can_be_said(no_decay, spared):
    step = step_of(Net())
    groups = parameter_groups(Sgd(weight_decay=0.1, no_decay=no_decay), step)
    assert set().union(*(names(step, g) for g in groups if g.get("weight_decay") == 0)) == spared


@pytest.mark.parametrize("recipe", [Sgd(lr=0.1, weight_decay=0.5), AdamW(lr=0.1, weight_decay=0.5)])
def test_a_step_without_gradient_signal_shrinks_what_decays_alone(recipe):
    step = step_of(Net())
    before = {name: p.detach().clone() for name, p in step.named_parameters()}
    optimizer = build_optimizer(recipe, step)
    set_lr(optimizer, 0.1)
    for p in step.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in step.named_parameters():
        decays = name.removeprefix("distiller.student.") in {"stem.weight", "block.0.weight", "head.weight"}
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0))


def test_learning_rates_by_path_the_longest_counts():
    step = step_of(Net(), {"diffkd": {"preset": "paper"}})
    recipe = Sgd(lr_factors={"block": 0.5, "block.1": 0.25, "head": 10.0, "method.diffkd": 2.0})
    optimizer = build_optimizer(recipe, step)
    set_lr(optimizer, 0.2)
    rates = {}
    for group in optimizer.param_groups:
        rates |= dict.fromkeys(names(step, group), group["lr"])
    assert rates["stem.weight"] == 0.2
    assert (rates["block.0.weight"], rates["block.1.weight"], rates["head.bias"]) == (0.1, 0.05, 2.0)
    assert {rate for name, rate in rates.items() if name.startswith("distiller.methods")} == {0.4}


@pytest.mark.parametrize("words", [{"no_decay": ["hed"]}, {"lr_factors": {"hed": 0.1}}])
def test_unknown_paths_are_refused(words):
    with pytest.raises(UserError, match=rf"optimizer\.{next(iter(words))}: no layer 'hed'; .*'head'"):
        parameter_groups(Sgd(**words), step_of(Net()))
    with pytest.raises(UserError, match=r"student\.freeze: no layer 'hed'; .*'head'"):
        freeze(Net(), ["hed"], False, "student")


def test_frozen_layers_keep_their_weights_and_statistics_in_training():
    net = Net()
    frozen = freeze(net, ["block", "token"], True, "student")
    step = step_of(net, frozen=frozen)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = build_optimizer(Sgd(weight_decay=0.1), step)
    task = Classification(Data([], [], 5, (3, 8, 8)))
    step.train()
    assert (net.stem.training, net.norm.training, net.block.training) == (True, False, False)
    for _ in range(2):
        output = net(torch.rand(4, 3, 8, 8))
        loss = task.loss(output, Batch(None, torch.arange(4)))["cross_entropy"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"stem.weight", "stem.bias", "scale", "head.weight", "head.bias"}


def test_nothing_left_to_train_is_said():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(UserError, match="nothing is left to train"):
        build_optimizer(Sgd(), step_of(net, frozen=freeze(net, ["0"], False, "student")))


def test_a_run_leaves_frozen_layers_alone_evaluations_in_between(tiny, tmp_path):
    words = ["method=none", "student.freeze=[stage1]", "student.freeze_norm=true", "trainer.eval_every=2"]
    words.append("trainer.keep=all")
    folder = fit(load(str(tiny), [*words, f"output={tmp_path / 'a'}"]), Reporter(quiet=True))
    states = [load_checkpoint(path)["model"] for path in folder.list_checkpoints()]
    moved = {name for name, value in states[0].items() if not torch.equal(value, states[-1][name])}
    assert moved
    assert not any("stage1" in name or "running" in name or "num_batches" in name for name in moved)


def test_the_average_is_the_naive_one_with_its_warm_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema, expected = Ema(model, 0.5), {k: v.clone().double() for k, v in model.state_dict().items()}
    for update in range(1, 12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.rand(4, 3))
        ema.update(model, update)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_of_slow_decay_does_not_ship_the_start(tiny, tmp_path):
    words = ["method=none", "data.batch_size=64", "trainer.epochs=4", "optimizer.lr=0.1", "trainer.ema=0.999"]
    folder = fit(load(str(tiny), [*words, f"output={tmp_path / 'a'}"]), Reporter(quiet=True))
    assert folder.read_history()[-1]["top1"] > 0.6
