"""The same start, the same loss: PGD against foolbox and torchattacks (stored goldens)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrobust import attacks, losses

# What tests/goldens/make_attack_goldens.py attacked with.
EPS = {"linf": 0.1, "l2": 1.0}
STEP = {"linf": 0.02, "l2": 0.25}
STEPS = 10
MOMENTUM = 0.9


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens" / "attacks.npz") as file:
        return dict(file)


def loss_fn(x, weights, labels):
    def conv(x, name, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = weights[f"{name}_kernel"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, "VALID", dimension_numbers=layout
        )
        return jax.nn.gelu(x + weights[f"{name}_bias"], approximate=True)

    x = conv(conv(4 * x - 2, "conv1", 2), "conv2", 1).mean((1, 2))
    return losses.cross_entropy(x @ weights["linear_kernel"] + weights["linear_bias"], labels)


def run(golden, name, attack, start):
    args = ({k: v for k, v in golden.items() if "kernel" in k or "bias" in k}, golden["labels"])
    x_adv = attack(loss_fn, golden["x"], args=args, delta=start)
    loss = np.asarray(jax.jit(loss_fn)(x_adv, *args))
    assert np.all(golden[f"{name}_loss"] > golden["clean_loss"])  # the golden itself is an attack
    np.testing.assert_allclose(loss, golden[f"{name}_loss"], atol=1e-4)
    return np.abs(np.asarray(x_adv) - golden[f"{name}_x_adv"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_loss_of_foolbox_and_torchattacks(golden, norm):
    attack = attacks.pgd(norm, EPS[norm], steps=STEPS, step_size=STEP[norm])
    for library in ("foolbox", "torchattacks"):
        apart = run(golden, f"{library}_{norm}", attack, golden[f"start_{norm}"])
        # A gradient of about zero may take another sign there: not the same pixels, the same loss.
        assert np.mean(apart > 1e-5) < 0.01


def test_momentum_pgd_reaches_the_loss_of_torchattacks(golden):
    attack = attacks.linf_pgd(EPS["linf"], STEPS, STEP["linf"], momentum=MOMENTUM, start="none")
    apart = run(golden, "torchattacks_momentum", attack, None)
    assert np.mean(apart > 1e-5) < 0.01


def test_another_step_size_does_not_reach_it(golden):
    attack = attacks.linf_pgd(EPS["linf"], STEPS, STEP["linf"] / 4)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run(golden, "foolbox_linf", attack, golden["start_linf"])
