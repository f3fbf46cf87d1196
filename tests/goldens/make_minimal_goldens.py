"""Writes the goldens of tests/test_minimal.py: norms found by adv-lib and foolbox on a tiny net.

    python tests/goldens/make_minimal_goldens.py

Per attack and library the norm of each example's perturbation, inf where it failed. 100 steps, for
Carlini and Wagner 5 searches of 100, for DeepFool 50; adv-lib's DDN without its rounding to 256
levels. foolbox's FMN in l2 is left out: it never projects. Written with torch 2.13 on CPU, foolbox
3.3.4 and adv-lib 0.2.8.
"""

import sys
from pathlib import Path
from unittest import mock

import foolbox
import numpy as np
import torch

# adv-lib imports these for losses and plots that no attack here uses.
ABSENT = ("torchvision", "torchvision.models", "visdom")
with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ABSENT}):
    from adv_lib import attacks as adv_lib
    from adv_lib.attacks.deepfool import df

HERE = Path(__file__).parent
ORDER = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
IMAGE = (5, 4, 1)


def runs(net, x, labels):
    """Every attack of every library, by (name, library)."""
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")

    def by_foolbox(attack):
        return lambda: attack.run(model, x, foolbox.criteria.Misclassification(labels))

    made = foolbox.attacks
    found = {
        ("ddn", "adv_lib"): lambda: adv_lib.ddn(net, x, labels, steps=100, levels=None),
        ("ddn", "foolbox"): by_foolbox(made.DDNAttack(steps=100)),
        ("cw", "adv_lib"): lambda: adv_lib.carlini_wagner_l2(
            net, x, labels, binary_search_steps=5, max_iterations=100
        ),
        ("cw", "foolbox"): by_foolbox(made.L2CarliniWagnerAttack(binary_search_steps=5, steps=100)),
        ("deepfool_l2", "foolbox"): by_foolbox(made.L2DeepFoolAttack(steps=50)),
        ("deepfool_linf", "foolbox"): by_foolbox(made.LinfDeepFoolAttack(steps=50)),
    }
    for norm, order in ORDER.items():
        found[f"fmn_{norm}", "adv_lib"] = lambda order=order: adv_lib.fmn(
            net, x, labels, norm=order, steps=100
        )
    for norm, kind in (("linf", "LInf"), ("l1", "L1"), ("l0", "L0")):
        found[f"fmn_{norm}", "foolbox"] = by_foolbox(getattr(made, f"{kind}FMNAttack")(steps=100))
    for norm in ("linf", "l2"):
        found[f"deepfool_{norm}", "adv_lib"] = lambda norm=norm: df(
            net, x, labels, steps=50, norm=ORDER[norm]
        )
    return found


def main():
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    size = int(np.prod(IMAGE))
    stored = {
        "x": draw.random((32, *IMAGE), dtype=np.float32),
        "first": draw.normal(0, 1.5 / size**0.5, (size, 16)).astype(np.float32),
        "bias": draw.normal(0, 0.1, 16).astype(np.float32),
        "second": draw.normal(0, 1, (16, 6)).astype(np.float32),
    }
    stored["x"][:8] = stored["x"][:8].round()
    first, bias, second = (torch.from_numpy(stored[k]) for k in ("first", "bias", "second"))
    # One channel: the pixels' order is the same as NHWC's.
    forward = lambda x: torch.tanh(x.flatten(1) @ first + bias) @ second  # noqa: E731
    net = torch.nn.Module()
    net.forward = forward
    net.eval()
    x = torch.from_numpy(stored["x"].transpose(0, 3, 1, 2).copy())
    labels = net(x).argmax(1)
    stored["labels"] = labels.numpy().astype(np.int32)
    for (name, library), run in runs(net, x, labels).items():
        x_adv = run().detach()
        delta = (x_adv - x).flatten(1).numpy()
        order = ORDER["l2" if name in ("ddn", "cw") else name.split("_")[1]]
        norms = (
            np.linalg.norm(delta, ord=order, axis=1) if order else (delta != 0).sum(1).astype(float)
        )
        norms = np.where((net(x_adv).argmax(1) != labels).numpy(), norms, np.inf)
        stored[f"{name}_by_{library}"] = norms.astype(np.float32)
        print(f"{name:14} {library:8} {np.median(norms):.4f}")
    np.savez_compressed(HERE / "minimal.npz", **stored)


if __name__ == "__main__":
    main()
