"""Tests that bad arguments of the losses give one clear error each."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import losses

Z1, Z2 = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
LABELS = np.arange(8)
ONE, THREE = np.zeros((2, 1), np.float32), np.zeros((2, 3), np.float32)
ZERO_ONE = np.array([0, 1], np.int32)
BAD_CALLS = {
    "logits must have shape \\[batch, classes\\], got \\(3,\\)": (
        losses.cross_entropy, (THREE[0], ZERO_ONE), {}),
    "labels must have shape \\(2,\\), got \\(3,\\)": (
        losses.cross_entropy, (THREE, np.arange(3)), {}),
    "labels must be integers, got float32": (losses.margin, (THREE, THREE[:, 0]), {}),
    "labels must lie in \\[0, 3\\), got values from 0 to 3": (
        losses.cross_entropy, (THREE, np.array([0, 3])), {}),
    "labels must lie in \\[0, 3\\), got values from -1 to 1": (
        losses.mart_kl, (THREE, THREE, np.array([-1, 1])), {}),
    "targets must lie in \\[0, 4\\)": (
        losses.targeted_dlr, (np.zeros((2, 4), np.float32), ZERO_ONE, ZERO_ONE + 4), {}),
    "label_smoothing must lie in \\[0, 1\\], got -0.1": (
        losses.cross_entropy, (THREE, ZERO_ONE), {"label_smoothing": -0.1}),
    "logits must have at least 2 classes, got 1": (losses.margin, (ONE, ZERO_ONE * 0), {}),
    "logits must have at least 3 classes, got 1": (losses.dlr, (ONE, ZERO_ONE * 0), {}),
    "logits must have at least 4 classes, got 3": (
        losses.targeted_dlr, (THREE, ZERO_ONE, ZERO_ONE), {}),
    "logits_adv must have at least 2 classes, got 1": (losses.mart_bce, (ONE, ZERO_ONE * 0), {}),
    "logits and logits_adv must have the same shape": (losses.trades_kl, (ONE, THREE), {}),
    "temperature must be > 0, got 0": (losses.nt_xent, (Z1, Z2), {"temperature": 0}),
    "temperature must be > 0, got -1.0": (losses.info_nce, (Z1, Z2), {"temperature": -1.0}),
    "logit_scale must be > 0, got nan": (losses.clip_loss, (Z1, Z2, float("nan")), {}),
    "anchors and positives must have the same shape": (losses.info_nce, (Z1, Z2[:3]), {}),
    "embeddings must have shape \\[batch, d\\]": (
        losses.supervised_contrastive, (Z1[0], LABELS), {}),
    "labels must have shape \\(8,\\), got \\(3,\\)": (
        losses.supervised_contrastive, (Z1, LABELS[:3]), {}),
    "embeddings must be of at least two examples, got one without negatives": (
        losses.adversarial_contrastive, (Z1[:1], Z2[:1]), {}),
    "reconstruction and target must have the same shape": (losses.squared_error, (ONE, THREE), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_raise_one_clear_error(message):
    loss, arguments, options = BAD_CALLS[message]
    # Unwrapped: the run-time check of the annotations would speak first, and less clearly.
    kind = TypeError if "must be integers" in message else ValueError
    with pytest.raises(kind, match=message):
        inspect.unwrap(loss)(*map(jnp.asarray, arguments), **options)


def test_a_label_out_of_range_is_nan_under_jit():
    for bad in (-1, 3):
        values = jax.jit(losses.cross_entropy)(THREE, np.array([0, bad], np.int32))
        assert np.isfinite(values[0])
        assert np.isnan(values[1])
