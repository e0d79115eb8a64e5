"""DiffKD's training step as it is here and as the published code runs it: the time of one beside the other.

    python benchmarks/diffkd_step.py [--channels-last]

Both have the same layers and weights, draw the same noise and give the same losses (this is checked first).
Forward and backward, preset `paper`, on one thread, in turns; seconds of the processor. A ratio under 1
says that it is faster here.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd import DiffKD
from diffkd.maths.diffusion import alpha_bars

SHAPES = ((32, 128, 8, 8), (16, 256, 14, 14))


def published(diffkd: DiffKD, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss with a code for every sample in every step, and the steps by the formulas of DDIM."""
    bars = alpha_bars().float()
    activations_in_place(diffkd, True)

    def predict(noisy: Tensor, times: Tensor) -> Tensor:
        noise: Tensor = diffkd.denoiser.body(noisy + diffkd.denoiser.embedding(times)[..., None, None])
        return noise

    feature = diffkd.align(student)
    noise = torch.randn(feature.shape)
    gamma = diffkd.noise_matcher(feature).view(-1, 1, 1, 1)
    noisy = gamma * feature + (1 - gamma) * noise
    for step in (400, 300, 200, 100, 0):
        now, then = bars[step], bars[step - 100] if step else torch.tensor(1.0)
        seen = predict(noisy, torch.full((len(noisy),), step))
        clean = (noisy - (1 - now) ** 0.5 * seen) / now**0.5
        seen = (noisy - now**0.5 * clean) / (1 - now) ** 0.5
        noisy = then**0.5 * clean + (1 - then) ** 0.5 * seen
    distance = F.mse_loss(diffkd.projection(noisy), teacher)
    noise = torch.randn(teacher.shape)
    times = torch.randint(0, len(bars), (len(teacher),))
    share = bars[times].view(-1, 1, 1, 1)
    seen = predict(share**0.5 * teacher + (1 - share) ** 0.5 * noise, times)
    return distance + F.mse_loss(seen, noise)


def ours(diffkd: DiffKD, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as the package has it."""
    activations_in_place(diffkd, False)
    return diffkd(student, teacher).loss


def activations_in_place(diffkd: DiffKD, wanted: bool) -> None:
    """As the published layers have them."""
    for layer in diffkd.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = wanted


def main() -> None:
    """Prints the ratio of each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--channels-last", action="store_true", help="ours in that layout")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for shape in SHAPES:
        torch.manual_seed(0)
        diffkd = DiffKD(shape[1] // 2, shape[1], preset="paper")
        inputs = torch.randn(shape)[:, : shape[1] // 2].contiguous(), torch.randn(shape)
        losses = []
        for loss in (ours, published):
            torch.manual_seed(1)
            losses.append(loss(diffkd, *inputs))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        layout = torch.channels_last if wanted.channels_last else torch.contiguous_format
        found = sorted(_ratios(diffkd, inputs, wanted.rounds, layout))
        middle = f"{found[len(found) // 4]:.2f} to {found[-1 - len(found) // 4]:.2f}"
        print(f"{shape}: {median(found):.2f} (the middle half {middle})", flush=True)


def _ratios(
    diffkd: DiffKD, inputs: tuple[Tensor, ...], rounds: int, layout: torch.memory_format
) -> list[float]:
    """Our time by the published code's, of every round after the first three."""
    ways = {}
    for loss, kind in ((published, torch.contiguous_format), (ours, layout)):
        student, teacher = (x.detach().to(memory_format=kind) for x in inputs)
        module = copy.deepcopy(diffkd).to(memory_format=kind)  # type: ignore[call-overload]
        ways[loss] = (module, student.requires_grad_(), teacher)

    def seconds(loss: Callable[[DiffKD, Tensor, Tensor], Tensor]) -> float:
        module, student, teacher = ways[loss]
        module.zero_grad()
        student.grad = None
        begun = time.process_time()
        loss(module, student, teacher).backward()
        return time.process_time() - begun

    found = []
    for number in range(rounds + 3):
        times = {loss: seconds(loss) for loss in (list(ways) if number % 2 else list(ways)[::-1])}
        found.append(times[ours] / times[published])
    return found[3:]


if __name__ == "__main__":
    main()
