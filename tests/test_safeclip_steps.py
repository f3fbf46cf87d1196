"""The training steps: what they may look at, what they keep, and that devices do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import data, losses, parallel, safeclip
from tests.tiny_clip import SHAPE, WORDS, tiny_clip

BATCH = 8
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((BATCH, *SHAPE), dtype=np.float32)
TOKENS = RANDOM.integers(0, WORDS, (BATCH, 4, 6)).astype(np.int32)
CLIP, OPTIMIZER = tiny_clip(), safeclip.adamw(0.1)


def views(keys, images):
    return data.flip(keys, images) + 0.1 * jax.vmap(lambda k: jax.random.uniform(k, SHAPE))(keys)


def batch(tokens=TOKENS):
    return {"image": IMAGES, "tokens": tokens, "index": np.arange(BATCH, dtype=np.int32)}


def state(pool=12, peak=0.01):
    made = safeclip.create_state(CLIP, OPTIMIZER, jax.random.key(0), SHAPE, pool=pool)
    rate = safeclip.rate(peak, constant=True)
    return made._replace(extra=made.extra._replace(rate=rate))


def run(kind, start, tokens=TOKENS, steps=1, devices=None, mapping="shard_map", **options):
    step = safeclip.training_step(CLIP, OPTIMIZER, kind, views=views, **options)
    if devices is None:
        step = jax.jit(step)
    else:
        mesh = parallel.data_mesh(devices)
        step = parallel.data_parallel(step, mesh, mapping=mapping, donate=False)
        start = parallel.create(lambda: start, mesh)
    found = []
    for _ in range(steps):
        start, metrics = step(start, batch(tokens))
        found.append(float(metrics["loss"]))
    return start, found


def leaves(tree):
    keys = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not keys(x)]


def test_the_unimodal_step_does_not_know_which_caption_is_whose():
    # Another order of captions, with each caption's own views: only the drawn views differ.
    same_views = np.repeat(TOKENS[:, :1], 4, axis=1)
    one, first = run("unimodal", state(), same_views, steps=2)
    other, second = run("unimodal", state(), same_views[::-1], steps=2)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    for ours, theirs in zip(leaves(one.params), leaves(other.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_clip_step_does():
    same_views = np.repeat(TOKENS[:, :1], 4, axis=1)
    _, first = run("two_views", state(), same_views)
    _, second = run("two_views", state(), same_views[::-1])
    assert abs(first[0] - second[0]) > 1e-3


def test_the_pool_is_asked_before_it_is_filled():
    # With an empty pool the neighbour of a view is the view itself: the loss without a pool.
    after, with_pool = run("unimodal", state())
    _, without = run("unimodal", state(), neighbours=False)
    np.testing.assert_allclose(with_pool, without, rtol=1e-5)
    assert int(after.extra.images.filled) == int(after.extra.texts.filled) == BATCH


def test_the_second_step_uses_what_the_first_one_left():
    after, _ = run("unimodal", state())
    replaced = after._replace(
        extra=after.extra._replace(
            images=safeclip.push(safeclip.empty_pool(12, 5), jnp.eye(5)),
        )
    )
    assert run("unimodal", after)[1] != run("unimodal", replaced)[1]


@pytest.mark.parametrize("rows", ["queries", "neighbours", "both"])
def test_the_unimodal_loss_is_that_of_its_two_modalities(rows):
    begun = state()
    _, found = run("unimodal", begun, rows=rows)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(begun.key, 0), np.arange(BATCH)
    )
    fold = lambda number: jax.vmap(jax.random.fold_in, (0, None))(keys, number)  # noqa: E731
    variables = begun.variables()
    a, b = (CLIP.encode_image(variables, views(fold(n), jnp.asarray(IMAGES))) for n in (0, 1))
    p, q = (
        CLIP.encode_text(variables, tokens)
        for tokens in safeclip.caption_views(keys, jnp.asarray(TOKENS))
    )
    scale = jnp.exp(begun.params["logit_scale"])
    own = [losses.neighbour_contrastive(second, first, scale, rows=rows).mean()
           for first, second in ((a, b), (p, q))]  # fmt: skip
    np.testing.assert_allclose(found[0], np.mean(own), rtol=1e-5)


def test_views_of_a_caption_are_two_different_ones():
    numbered = np.broadcast_to(np.arange(4)[None, :, None], (BATCH, 4, 6)).astype(np.int32)
    keys = jax.random.split(jax.random.key(3), BATCH)
    first, second = safeclip.caption_views(keys, jnp.asarray(numbered))
    assert (np.asarray(first) > 0).all()
    assert (np.asarray(first) != np.asarray(second)).all()
    alone = safeclip.caption_views(keys, jnp.asarray(numbered[:, :1]))
    np.testing.assert_array_equal(alone[0], alone[1])


def test_roclip_trains_on_the_pools_texts():
    begun, _ = run("roclip", state())
    assert int(begun.extra.texts.filled) == BATCH
    matched, _ = run("roclip", begun)
    plain, _ = run("roclip_plain", begun)
    assert np.abs(matched.params["image"] - plain.params["image"]).max() > 1e-6
    assert int(plain.extra.texts.filled) == BATCH
    assert int(matched.extra.texts.filled) == 12


def test_a_rate_of_zero_leaves_the_parameters():
    begun = state(peak=0.0)
    after, _ = run("two_views", begun)
    for ours, theirs in zip(leaves(begun.params), leaves(after.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(after.extra.rate.position) == 1


def test_the_scale_stays_in_its_range():
    begun = state(peak=0.5)
    high = {**begun.params, "logit_scale": jnp.log(100.0)}
    after, _ = run("two_views", begun._replace(params=high), steps=4)
    assert 0 <= float(after.params["logit_scale"]) <= float(jnp.log(100.0)) + 1e-6


ON_DEVICES = [(kind, 8, "shard_map") for kind in safeclip.KINDS]
ON_DEVICES += [("unimodal", 2, "pmap"), ("unimodal", 2, "jit")]


@pytest.mark.parametrize(("kind", "devices", "mapping"), ON_DEVICES)
def test_every_step_is_the_same_on_any_number_of_devices(kind, devices, mapping):
    one, first = run(kind, state(), steps=3)
    many, second = run(kind, state(), steps=3, devices=devices, mapping=mapping)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    for ours, theirs in zip(leaves(one), leaves(many), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'siglip'"):
        safeclip.training_step(CLIP, OPTIMIZER, "siglip")
