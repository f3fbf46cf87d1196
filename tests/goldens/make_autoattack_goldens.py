"""Writes the goldens of tests/test_apgd.py and tests/test_fab.py: the reference on a tiny net.

    python tests/goldens/make_autoattack_goldens.py

Auto-PGD begins at given points instead of its own draws; FAB's first round has none. Images, starts
and results are stored NHWC. Written with torch 2.13 on CPU and pyautoattack 0.2.0.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from torch import nn

HERE = Path(__file__).parent
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
EPS = {"linf": 0.022, "l2": 0.12, "l1": 0.45}
STEPS, BATCH, SHAPE, CLASSES = 40, 48, (2, 5, 4), 5


class Net(nn.Module):
    """Two smooth dense layers over the pixels in NHWC order."""

    def __init__(self, generator):
        super().__init__()
        size = int(np.prod(SHAPE))
        self.first = nn.Parameter(torch.randn(size, 24, generator=generator) / size**0.5 * 4)
        self.second = nn.Parameter(torch.randn(24, CLASSES, generator=generator) / 24**0.5 * 4)

    def forward(self, x):
        return torch.tanh(2 * (x.permute(0, 2, 3, 1).flatten(1) - 0.5) @ self.first) @ self.second


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def auto_pgd(net, norm, loss, x, labels, targets, noise):
    setting = {"n_iter": STEPS, "norm": NORMS[norm], "eps": EPS[norm]}
    if loss == "targeted_dlr":
        attack = APGDAttack_targeted(net, **setting)
        attack.y_target = targets
    else:
        attack = APGDAttack(net, loss=loss, **setting)
    attack.init_hyperparam(x)
    draw = {"linf": ("rand", (noise + 1) / 2), "l2": ("randn", noise), "l1": ("randn", noise)}[norm]
    with mock.patch(f"torch.{draw[0]}", return_value=draw[1].clone()):
        best, accurate, best_loss, _ = attack.attack_single_run(x, labels)
    return nhwc(best), (accurate == 0).numpy(), best_loss.numpy()


def fast_adaptive_boundary(net, norm, x, labels, target_rank):
    attack = FABAttack_PT(net, norm=NORMS[norm], n_iter=STEPS, eps=EPS[norm], device="cpu")
    attack.target_class = target_rank
    with torch.no_grad():
        return nhwc(attack.attack_single_run(x, labels, is_targeted=target_rank is not None))


def main():
    generator = torch.Generator().manual_seed(0)
    net = Net(generator).requires_grad_(False)
    x = torch.rand((BATCH, *SHAPE), generator=generator)
    x[:8] = x[:8].round()
    noise = 2 * torch.rand((BATCH, *SHAPE), generator=generator) - 1
    logits = net(x)
    labels = logits.argmax(1)
    targets = logits.sort(1)[1][:, -2]
    stored = {
        "x": nhwc(x), "noise": nhwc(noise), "labels": labels.numpy(), "targets": targets.numpy(),
        "first": net.first.numpy(), "second": net.second.numpy(), "steps": STEPS,
    }  # fmt: skip
    for norm, eps in EPS.items():
        stored[f"eps_{norm}"] = eps
        for loss in ("ce", "dlr", "targeted_dlr"):
            found = auto_pgd(net, norm, loss, x, labels, targets, noise)
            for name, value in zip(("best", "fooled", "loss"), found, strict=True):
                stored[f"apgd_{loss}_{norm}_{name}"] = value
        stored[f"fab_{norm}"] = fast_adaptive_boundary(net, norm, x, labels, None)
        stored[f"fab_t_{norm}"] = fast_adaptive_boundary(net, norm, x, labels, 2)
    np.savez_compressed(HERE / "autoattack.npz", **stored)


if __name__ == "__main__":
    main()
