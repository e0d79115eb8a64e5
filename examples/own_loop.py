"""DiffKD in a training loop of one's own: a ResNet-18 learns from a ResNet-34 on random images."""

import torch
import torchvision

from diffkd import Distiller


def main() -> None:
    torch.manual_seed(0)
    student, teacher = (
        torchvision.models.resnet18(num_classes=10),
        torchvision.models.resnet34(num_classes=10),
    )
    images, labels = torch.rand(8, 3, 64, 64), torch.randint(10, (8,))

    distiller = Distiller(
        student, teacher, taps={"layer4": "layer4", "": ""}, methods="diffkd", sample=images
    )
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        losses = distiller(images)
        loss = losses.total + torch.nn.functional.cross_entropy(losses.output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, {name: round(value.item(), 4) for name, value in losses.items()})


if __name__ == "__main__":
    main()
