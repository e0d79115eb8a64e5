"""Two teachers, a method for each tap, a weight on a schedule, and inputs that are no pictures alone."""

from typing import Any

import torch
from torch import Tensor, nn

from diffkd import Distiller

TAPS = {"stem": "stem", "body": "body", "": ""}


class Net(nn.Module):
    """A classifier that is called by keywords, as models of transformers are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        scores: Tensor = self.head(self.body(self.stem(pixel_values * scale)).mean((2, 3)))
        return scores


def main(steps: int = 4) -> None:
    torch.manual_seed(0)
    student, teachers = Net(8), {"big": Net(32), "wide": Net(24)}
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
    inputs: dict[str, Any] = {"pixel_values": images, "scale": 2.0}

    distiller = Distiller(
        student,
        teachers,  # with other layers or another normalisation: taps and teacher_input by name
        taps=TAPS,
        methods={
            "fitnet": {"taps": {"stem": 0.5, "body": 1.0}, "weight": 10.0},  # a factor for each tap
            "diffkd": {"taps": ["body"]},  # one tap for this method
            "kd": {"weight": 4.0, "schedule": [[0, 0.0], [0.5, 1.0], [1, 0.2]]},  # share of the run, factor
        },
        sample=inputs,
        run=lambda model, batch: model(**batch.images),  # what is done with a dict anyway
        teacher_weights={"big": 2.0, "wide": 1.0},  # leave it out for the mean
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    for step in range(steps):
        distiller.at(step / steps)  # for the schedule
        distiller.weights["fitnet_wide"] *= 0.9  # or by hand, as you like
        losses = distiller(inputs)
        loss = losses.total + nn.functional.cross_entropy(losses.output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, {name: round(value.item(), 4) for name, value in losses.items()})


if __name__ == "__main__":
    main()
