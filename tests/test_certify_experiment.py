"""The certification experiment: blocks that survive a stop, its plot and its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import certify, plots_certify, records
from jaxrobust import smoothing

CONFIG = certify.Config(samples0=20, samples=200, block=4)
KEY = {"method": "gaussian", "sigma": 0.5, "seed": 0}
IMAGES = np.random.default_rng(0).uniform(size=(10, 2, 2, 1)).astype(np.float32)


def logits_fn(x, weights):
    return x.reshape(len(x), -1) @ weights


WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def test_blocks_equal_one_call_and_only_missing_ones_are_certified_again(tmp_path):
    run = lambda: certify.certificates(KEY, CONFIG, IMAGES, tmp_path, logits_fn, WEIGHTS)  # noqa: E731
    first, seconds = run()
    whole = smoothing.certify(
        logits_fn, IMAGES, jax.random.key(23), sigma=0.5, samples0=20, samples=200, args=(WEIGHTS,)
    )
    for got, expected in zip(first, whole, strict=True):
        np.testing.assert_array_equal(got, expected)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(path.name for path in written) == [f"certificates-{i}.npz" for i in (0, 4, 8)]
    lost = tmp_path / "certificates-4.npz"
    lost.unlink()
    again, seconds_again = run()
    for got, expected in zip(again, first, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert seconds > 0
    assert seconds_again > 0
    for path, time in written.items():
        assert (path.stat().st_mtime_ns == time) == (path != lost)


def test_plain_training_is_shared_by_all_sigmas():
    keys = certify.keys(certify.PRESETS["laptop"])
    assert len(keys) == 3 * 3 * 4
    folders = {str(certify.trained_as(key)) for key in keys}
    assert len(folders) == 3 * (1 + 3 * 3)


def test_the_table_says_what_was_not_run_and_the_plot_needs_the_file_alone(tmp_path):
    config = certify.PRESETS["smoke"]
    path = tmp_path / "certify-smoke.json"
    with pytest.raises(SystemExit, match="run the experiment without --plot-only"):
        plots_certify.certified_table(path)
    results = records.Results(path, "certify", "smoke", config)
    metrics = {
        "clean_accuracy": 0.5,
        "average_radius": 0.25,
        "radii": list(config.radii),
        "certified_accuracy": [0.5, 0.4, 0.3, 0.2, 0.1],
        "table_accuracy": [0.5, 0.3, 0.1],
        "train_flops": 2e12,
    }
    results.add({"method": "gaussian", "sigma": 0.5, "seed": 0}, metrics, 1.0)
    table = plots_certify.certified_table(path).splitlines()
    assert table[2].count("not run") == 7
    assert table[3] == "| 0.5 | Gaussian noise | 50.0 | 50.0 | 30.0 | 10.0 | 0.250 | 1 | 2 |"
    plots_certify.certified_curves(path)
    assert (tmp_path / "certify-smoke-curve.png").stat().st_size > 1000


def test_every_method_has_an_objective_a_name_and_a_colour():
    config = certify.Config()
    assert set(config.methods) == set(plots_certify.NAMES) == set(plots_certify.COLOURS)
    for method in config.methods:
        objective = certify.objective_of(method, 0.5, config, steps=10)
        assert callable(objective.loss)
    with pytest.raises(ValueError, match=r"method must be one of .*got 'magic'"):
        certify.objective_of("magic", 0.5, config, steps=10)


def test_logits_of_equal_models_are_equal():
    apply = lambda variables, x: x @ variables  # noqa: E731
    assert certify.LogitsOf(apply) == certify.LogitsOf(apply)
    assert certify.LogitsOf(apply)(jnp.ones((1, 2)), jnp.ones((2, 3))).shape == (1, 3)
