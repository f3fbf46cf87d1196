"""Writes the goldens of tests/test_attack_parity.py: PGD of foolbox and torchattacks on a tiny net.

    python tests/goldens/make_attack_goldens.py

Both libraries draw their own starts; here their draws are replaced by given ones, so that another
implementation can begin at the same points. Images, starts and results are stored NHWC, kernels
HWIO. Written with torch 2.13 on CPU, foolbox 3.3.4 and torchattacks 3.5.1.
"""

from pathlib import Path
from unittest import mock

import eagerpy as ep
import foolbox
import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

HERE = Path(__file__).parent
EPS = {"linf": 0.1, "l2": 1.0}
STEP = {"linf": 0.02, "l2": 0.25}
STEPS = 10
MOMENTUM = 0.9


class Net(nn.Module):
    """Two strided convolutions and a linear layer, smooth everywhere."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, 2)
        self.conv2 = nn.Conv2d(6, 8, 3, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.gelu(
            self.conv2(F.gelu(self.conv1(4 * x - 2), approximate="tanh")), approximate="tanh"
        )
        return self.linear(x.mean((2, 3)))


def draw_starts(shape, generator):
    linf = EPS["linf"] * (2 * torch.rand(shape, generator=generator) - 1)
    direction = torch.randn(shape, generator=generator)
    length = EPS["l2"] * torch.rand((shape[0], 1, 1, 1), generator=generator)
    return {"linf": linf, "l2": length * F.normalize(direction.flatten(1)).reshape(shape)}


def run_foolbox(net, norm, x, labels, start):
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=STEP[norm], steps=STEPS, random_start=True)
    attack.get_random_start = lambda x0, epsilon: x0 + ep.astensor(start)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    return attack.run(model, x, foolbox.criteria.Misclassification(labels), epsilon=EPS[norm])


def run_torchattacks(net, norm, x, labels, start):
    if norm == "linf":
        attack = torchattacks.PGD(net, eps=EPS[norm], alpha=STEP[norm], steps=STEPS)
        with mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.copy_(start)):
            return attack(x, labels)
    attack = torchattacks.PGDL2(net, eps=EPS[norm], alpha=STEP[norm], steps=STEPS)
    share = start.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) / EPS[norm]
    with (
        mock.patch.object(torch.Tensor, "normal_", lambda self: self.copy_(start)),
        mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.copy_(share)),
    ):
        return attack(x, labels)


def main():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Net().eval()
    for weight in net.parameters():
        weight.data.mul_(2)
    x = torch.rand((12, 2, 9, 7), generator=generator)
    x[:4] = x[:4].round()  # a third of the images touch the box everywhere
    labels = net(x).argmax(1)
    starts = draw_starts(x.shape, generator)
    nhwc = lambda images: images.detach().permute(0, 2, 3, 1).numpy()  # noqa: E731
    stored = {"x": nhwc(x), "labels": labels.numpy().astype(np.int32)}
    for name, layer in net.named_children():
        kernel = layer.weight.detach().numpy()
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        stored |= {f"{name}_kernel": kernel, f"{name}_bias": layer.bias.detach().numpy()}
    results = {
        "torchattacks_momentum": torchattacks.MIFGSM(
            net, eps=EPS["linf"], alpha=STEP["linf"], steps=STEPS, decay=MOMENTUM
        )(x, labels)
    }
    for norm in EPS:
        stored[f"start_{norm}"] = nhwc(starts[norm])
        results[f"foolbox_{norm}"] = run_foolbox(net, norm, x, labels, starts[norm])
        results[f"torchattacks_{norm}"] = run_torchattacks(net, norm, x, labels, starts[norm])
    loss = lambda x: F.cross_entropy(net(x), labels, reduction="none").detach().numpy()  # noqa: E731
    for name, x_adv in results.items():
        stored[f"{name}_x_adv"] = nhwc(x_adv)
        stored[f"{name}_loss"] = loss(x_adv)
        print(name, stored[f"{name}_loss"].mean())
    stored["clean_loss"] = loss(x)
    np.savez_compressed(HERE / "attacks.npz", **stored)


if __name__ == "__main__":
    main()
