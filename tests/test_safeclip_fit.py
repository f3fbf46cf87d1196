"""Whole runs: schedules, growth of the safe set, and a stop at any moment."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import checkpoint, parallel, safeclip
from tests.tiny_clip import SHAPE, WORDS, tiny_clip

N, BATCH = 64, 8
RANDOM = np.random.default_rng(1)
IMAGES = RANDOM.random((N, *SHAPE), dtype=np.float32)
TOKENS = RANDOM.integers(0, WORDS, (N, 3, 6)).astype(np.int32)
CLIP = tiny_clip()
SHORT = {
    "epochs": 6, "unimodal_epochs": 1, "slow_epochs": 1, "batch_size": BATCH, "peak": 1e-2,
    "slow_rate": 1e-3, "warmup": 4, "pool": 20, "growth": 0.05, "bounds": (0.0, 1.0),
}  # fmt: skip


def recipe(**changes):
    return safeclip.Recipe(**{**SHORT, **changes})


def fit(recipe, **options):
    settings = {"progress": False, "mesh": parallel.data_mesh(1), **options}
    return safeclip.fit(CLIP, recipe, IMAGES, TOKENS, **settings)


def same(one, other):
    assert one.history == other.history
    # Optimizer, pools, rate and key too: all that a next step depends on.
    ours, theirs = (x.state._replace(key=jax.random.key_data(x.state.key)) for x in (one, other))
    chex.assert_trees_all_equal(ours, theirs)
    np.testing.assert_array_equal(one.trust.safe, other.trust.safe)
    np.testing.assert_array_equal(one.trust.scores, other.trust.scores)


@pytest.fixture(scope="module")
def whole():
    return fit(recipe())


def test_the_phases_follow_each_other(whole):
    kinds = [sorted(k for k in e if k.startswith("steps_")) for e in whole.history]
    assert kinds[0] == ["steps_unimodal"]
    assert kinds[1] == ["steps_two_views"]
    assert all(k == ["steps_two_views", "steps_unimodal"] for k in kinds[2:])


def test_the_safe_set_is_of_the_announced_size_and_the_rest_is_risky(whole):
    first = whole.history[2]["safe_share"]
    for entry in whole.history[2:]:
        share = min(first + 0.05 * (entry["epoch"] - 3), 0.85)
        expected = int(share * N) if entry["epoch"] > 3 else round(first * N)
        assert round(entry["safe_share"] * N) == expected
        assert entry["steps_two_views"] == expected // BATCH
        assert entry["steps_unimodal"] == (N - expected) // BATCH


VIEWED = {"scoring": "augmented", "draws": 2, "memory": 0.3}
AGREEING = {"scoring": "agreement", "neighbours": 3, "slow_epochs": 0, "memory": 0.3}


def noisy(keys, images):
    """A view that depends on the pair's own key."""
    draw = jax.vmap(lambda key: jax.random.normal(key, SHAPE))
    return jnp.clip(images + 0.05 * draw(keys), 0, 1)


class Stop(Exception):
    """A run that is cut off."""


def fit_until(after, recipe, **options):
    """A run that is killed right after so many checkpoints."""
    seen, original = [], checkpoint.save

    def save(*args, **kwargs):
        original(*args, **kwargs)
        seen.append(args[1])
        if len(seen) == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "save", save)
        with pytest.raises(Stop):
            fit(recipe, **options)


@pytest.mark.parametrize(
    ("after", "changes"), [(1, {}), (13, {}), (25, {}), (4, VIEWED), (21, VIEWED), (17, AGREEING)]
)
def test_a_stopped_run_ends_as_if_it_had_not_been(whole, tmp_path, after, changes):
    unbroken = fit(recipe(**changes), views=noisy) if changes else whole
    views = noisy if changes else None
    fit_until(after, recipe(**changes), views=views, directory=tmp_path, save_steps=1)
    again = fit(recipe(**changes), views=views, directory=tmp_path, save_every=1e9)
    same(again, unbroken)


def test_a_finished_run_is_not_run_again(whole, tmp_path):
    first = fit(recipe(), directory=tmp_path)
    again = fit(recipe(), directory=tmp_path, evaluate=lambda *_: pytest.fail("it was run again"))
    same(first, whole)
    same(again, whole)


def test_a_finished_run_is_final_even_if_its_last_step_was_saved_before(whole, tmp_path):
    fit(recipe(), directory=tmp_path, save_steps=1)
    again = fit(recipe(), directory=tmp_path, evaluate=lambda *_: pytest.fail("it was run again"))
    same(again, whole)


def test_what_evaluate_gives_is_in_the_history_as_json_has_it(tmp_path):
    evaluate = lambda *_: {"one": np.float32(0.5), "some": (np.arange(2), 3)}  # noqa: E731
    found = fit(recipe(epochs=3), evaluate=evaluate, directory=tmp_path)
    again = fit(recipe(epochs=3), evaluate=evaluate, directory=tmp_path)
    assert found.history == again.history
    assert found.history[0] | {"one": 0.5, "some": [[0, 1], 3]} == found.history[0]


def test_weights_that_were_not_believed_say_nothing_later_either():
    upside_down = lambda scores: -scores - 2  # noqa: E731
    kept = {}

    def watch(epoch, variables, trust):
        kept[epoch] = trust
        return {}

    with pytest.warns(UserWarning, match=r"epoch 3: 0.00 % of the pairs reach 0.9, .* best 15%"):
        fit(recipe(splitter=upside_down, bounds=(0.02, 0.5)), evaluate=watch)
    for epoch in range(3, 7):
        trust = kept[epoch]
        assert trust.scores[trust.safe].min() >= trust.scores[~trust.safe].max()


def test_a_run_from_other_weights_is_another_run(tmp_path):
    one, other = (CLIP.init(jax.random.key(seed), SHAPE) for seed in (1, 2))
    clean = recipe(method="cleanclip", epochs=2)
    first = fit(clean, start=one, directory=tmp_path)
    same(fit(clean, start=one, directory=tmp_path), first)
    for start in (other, None):
        with pytest.raises(checkpoint.CheckpointError, match="expected a run with start"):
            fit(clean, start=start, directory=tmp_path)


def test_splitters_of_other_known_bad_pairs_are_other_settings(tmp_path):
    one, other = (safeclip.conformal(np.array([bad])) for bad in (3, 5))
    fit(recipe(epochs=3, threshold=0.4, splitter=one), directory=tmp_path)
    fit(recipe(epochs=3, threshold=0.4, splitter=one), directory=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="expected a run with splitter"):
        fit(recipe(epochs=3, threshold=0.4, splitter=other), directory=tmp_path)


def test_another_runs_checkpoint_is_refused(tmp_path):
    fit(recipe(epochs=3), directory=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="expected a run with seed 5, found 0"):
        fit(recipe(epochs=3), directory=tmp_path, seed=5)
    with pytest.raises(checkpoint.CheckpointError, match=r"with growth 0.1, found 0.05"):
        fit(recipe(epochs=3, growth=0.1), directory=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"with splitter by_rank, found .*mixture"):
        fit(recipe(epochs=3, splitter=safeclip.by_rank), directory=tmp_path)
    tied = safeclip.gaussian_mixture(covariance="tied")
    with pytest.raises(checkpoint.CheckpointError, match=r"splitter.*tied, found full"):
        fit(recipe(epochs=3, splitter=tied), directory=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"with views noisy, found None"):
        fit(recipe(epochs=3), directory=tmp_path, views=noisy)
    one_pixel = IMAGES.copy()
    one_pixel[3, 2, 1] = 0
    for images, tokens in ((one_pixel, TOKENS), (IMAGES, TOKENS[::-1])):
        with pytest.raises(checkpoint.CheckpointError, match="expected a run with data"):
            safeclip.fit(
                CLIP, recipe(epochs=3), images, tokens, directory=tmp_path, progress=False,
                mesh=parallel.data_mesh(1),
            )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, AGREEING], ids=["similarity", "agreement"])
def test_eight_devices_give_the_same_losses_and_the_same_split(whole, changes):
    whole = fit(recipe(**changes)) if changes else whole
    many = fit(recipe(**changes), mesh=parallel.data_mesh(8))
    for ours, theirs in zip(whole.history, many.history, strict=True):
        for name in ours:
            if name.startswith("loss"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    np.testing.assert_array_equal(many.trust.safe, whole.trust.safe)


@pytest.mark.parametrize("method", ["clip", "clip_augmented", "roclip", "cleanclip"])
def test_baselines_use_all_pairs_in_every_epoch(method):
    found = fit(recipe(method=method, epochs=3))
    for entry in found.history:
        assert sum(v for k, v in entry.items() if k.startswith("steps_")) == N // BATCH
    assert found.history[-1][next(k for k in found.history[-1] if "loss" in k)] > 0
    assert found.trust.safe.all()


def test_the_fixed_run_ends_at_rate_zero_and_the_official_one_does_not(whole):
    settings = {k: v for k, v in SHORT.items() if k not in ("bounds",)}
    settings["slow_rate"] = 1e-3
    found = fit(safeclip.official(**settings), views=lambda keys, images: images)
    assert found.history[-1]["epoch"] == 6
    assert float(whole.state.extra.rate.value()) == pytest.approx(0, abs=1e-9)
    assert float(found.state.extra.rate.value()) > 1e-5


def plan(warmup):
    fractions = [min(0.1441 + 0.01 * k, 0.85) for k in range(26)]
    return safeclip.Plan(1008500 // 512, 512, 1008500, 7, 32, fractions, 5e-4, warmup)


# Of the notes on the authors' schedule: rates at the first and last step of an epoch.
OFFICIAL = [
    (10_000, 7, (1.9e-4, 2.0e-4), (2.7e-4, 7e-6)),
    (10_000, 13, (3.4e-4, 3.6e-4), (7e-5, 3e-5)),
    (10_000, 32, (4.7e-4, 5.0e-4), (2.3e-4, 4.5e-4)),
    (1_000, 7, (4.5e-4, 4.5e-4), (2.9e-5, 6e-7)),
    (1_000, 13, (2.8e-4, 2.6e-4), (2.6e-4, 3.6e-4)),
    (1_000, 32, (7e-5, 1.1e-4), (1e-5, 0)),
]


@pytest.mark.parametrize(("warmup", "epoch", "safe", "risky"), OFFICIAL)
def test_the_official_schedule_is_the_authors(warmup, epoch, safe, risky):
    settings = plan(warmup)
    rates = safeclip.mixed_rates(settings, epoch, "official")
    steps = settings.safe_steps[epoch - 7], settings.risky_steps[epoch - 7]
    for rate, count, expected in zip(rates, steps, (safe, risky), strict=True):
        last = rate._replace(position=rate.position + count - 1)
        found = float(rate.value()), float(last.value())
        np.testing.assert_allclose(found, expected, rtol=0.06, atol=1.2e-6)


def test_fixed_schedules_end_at_zero_when_training_does():
    settings = plan(10_000)
    for rate, steps in zip(
        safeclip.mixed_rates(settings, 32, "fixed"),
        (settings.safe_steps, settings.risky_steps),
        strict=True,
    ):
        end = rate._replace(position=rate.position + steps[-1])
        assert float(end.position) == sum(steps)
        np.testing.assert_allclose(end.value(), 0, atol=1e-10)
        highest = max(
            float(rate._replace(position=np.float32(k)).value()) for k in range(0, sum(steps), 50)
        )
        assert highest == pytest.approx(5e-4, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "siglip"}, "method must be one of"),
        ({"epochs": 2}, "epochs must exceed unimodal_epochs . slow_epochs = 2, got 2"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 32}, "pool must hold at least a batch, 32 rows, got 20"),
        ({"unimodal_epochs": -1}, "unimodal_epochs must be a whole number >= 0, got -1"),
        ({"rows": "columns"}, "rows must be one of .* got 'columns'"),
        ({"memory": 1.0}, "memory must be in .0, 1., got 1.0"),
        ({"schedule": "mended"}, "schedule must be one of"),
        ({"growth": -0.1}, "growth must be >= 0, got -0.1"),
        ({"slow_epochs": -1}, "slow_epochs must be a whole number >= 0, got -1"),
        ({"threshold": 90.0}, r"threshold must be in .0, 1., got 90"),
        ({"cap": 85.0}, r"cap must be in .0, 1., got 85"),
        ({"bounds": (2.0, 50.0)}, r"bounds must be two rising shares in .0, 1., got .2.0, 50.0."),
        ({"neighbours": 0}, "neighbours must be a whole number >= 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be .n, 1 . v, t. for the 64 images"):
        safeclip.fit(CLIP, recipe(), IMAGES, TOKENS[:, 0])
    with pytest.raises(ValueError, match="batch_size must be <= 64, the number of pairs, got 65"):
        fit(recipe(batch_size=65, pool=65))
    with pytest.raises(ValueError, match="neighbours must be < 64, the number of pairs, got 64"):
        fit(recipe(scoring="agreement", neighbours=64))
    with pytest.raises(TypeError, match="tokens must be whole numbers, got float32"):
        safeclip.fit(CLIP, recipe(), IMAGES, TOKENS.astype(np.float32))
    other = CLIP._replace(config={**CLIP.config, "vocabulary": WORDS - 1})
    with pytest.raises(ValueError, match=r"tokens must be in .0, 11.,.* got 0 to 11"):
        safeclip.fit(other, recipe(), IMAGES, TOKENS)
    with pytest.raises(ValueError, match="views must be given for scoring='augmented', got None"):
        fit(recipe(scoring="augmented"))


def test_a_safe_set_below_a_batch_is_said():
    few = {"splitter": safeclip.by_rank, "threshold": 0.95, "growth": 0.0, "epochs": 3}
    with pytest.warns(UserWarning, match="epoch 3: 4 safe pairs are fewer than a batch of 8"):
        fit(recipe(**few))


def test_a_kind_of_step_is_compiled_once(caplog):
    with jax.log_compiles():
        fit(recipe())
    messages = [record.getMessage() for record in caplog.records]
    steps = [m for m in messages if m.startswith("Compiling") and f"[{BATCH},4,4,1]" in m]
    assert len(steps) == 2, steps


def test_a_splitter_that_cannot_work_says_so_before_training():
    def broken(scores):
        raise ImportError("pip install it")

    with pytest.raises(ImportError, match="pip install it"):
        fit(recipe(splitter=broken), evaluate=lambda *_: pytest.fail("it was trained"))
