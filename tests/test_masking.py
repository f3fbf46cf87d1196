"""The report card: planted defences are flagged, honest networks are not, and noise is no alarm.

Network, strengths and forms are others than in experiments/masking_plants.py, on which the limits
were set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrobust as jr
from jaxrobust import evaluation
from jaxrobust.evaluation import checks, probes

EPS = 0.12
NET = jr.models.small_cnn(channels=(12,), strides=(2,), kernel=3, dense=(40,))
SMALL = {"steps": 12, "targets": 2, "queries": 150, "batch_size": 80}
NAMES = (
    "one step", "black box", "transfer", "large radius", "zero gradient", "repeatable", "jump",
    "probabilities", "convergence", "finite differences", "eps curve", "random gradient", "bpda",
)  # fmt: skip


# ---- plants: before and after the network, chosen by number so that all share their programs ----


def coarse(x):
    return jnp.floor(x * 6) / 6


def half_stopped(x):
    checkers = (jnp.arange(8)[:, None, None] + jnp.arange(8)[:, None]) % 2
    return jnp.where(checkers == 0, jax.lax.stop_gradient(x), x)


def resized(x):
    """Shrunk by a share and to a place that depend on the image's last bits."""
    digest = jax.lax.bitcast_convert_type(x, jnp.int32).reshape(len(x), -1)
    digest = (digest * jnp.arange(1, 128, 2)).sum(1) * 40503
    chance = jnp.stack([(digest >> s) % 251 / 251 for s in (4, 9, 14)], 1)

    def one(image, chance):
        scale = 0.6 + 0.4 * jnp.full(2, chance[0])
        shift = chance[1:] * 8 * (1 - scale)
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, shift, "linear")

    return jax.vmap(one)(x, chance)


@jax.custom_vjp
def blurred(x):
    """A mean of neighbours with the gradient of something else: non-adaptive."""
    return sum(jnp.roll(x, move, axis) for move in (0, 1) for axis in (1, 2)) / 4


blurred.defvjp(lambda x: (blurred(x), None), lambda _, g: (jnp.flip(g, (1, 2)),))

BEFORE = (lambda x: x, coarse, half_stopped, resized, blurred)
AFTER = (
    lambda z: z,
    lambda z: jax.nn.sigmoid(60 * z),
    lambda z: 3e4 * z,
    jax.nn.softmax,
)
PLANTS = {
    "input quantisation": (1, 0),
    "stop_gradient": (2, 0),
    "saturated sigmoid": (0, 1),
    "huge logit scale": (0, 2),
    "random resizing": (3, 0),
    "softmaxed outputs": (0, 3),
    "non-adaptive pre-processor": (4, 0),
}


def defended(x, variables, before, after):
    x = jax.lax.switch(before, BEFORE, x)
    return jax.lax.switch(after, AFTER, NET.apply(variables, x))


@jax.jit
def trained(eps, images, labels):
    """Variables after 500 steps of adversarial training; eps = 0 is plain training."""
    loss_fn = lambda x, v, y: jr.losses.cross_entropy(NET.apply(v, x), y)  # noqa: E731
    variables = NET.init(jax.random.key(5), images.shape[1:])
    optimizer = optax.adam(5e-3)

    def step(carry, key):
        variables, state = carry
        rows = jax.random.randint(key, (64,), 0, len(images))
        x, y = images[rows], labels[rows]
        x = jr.linf_pgd(eps, steps=4)(loss_fn, x, key, args=(variables, y))
        gradient = jax.grad(lambda v: loss_fn(x, v, y).mean())(variables)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(variables, updates), state), None

    keys = jax.random.split(jax.random.key(6), 500)
    return jax.lax.scan(step, (variables, optimizer.init(variables)), keys)[0][0]


@pytest.fixture(scope="module")
def world():
    """Variables of a plain and of a robust network, and 80 test images."""
    train, test = (jr.data.load("digits", split) for split in ("train", "test"))
    networks = [trained(eps, jnp.asarray(train.images), train.labels) for eps in (0.0, 0.15)]
    return *networks, test.images[:80], test.labels[:80]


def card_of(world, robust=False, plant=(0, 0), **options):
    plain, strong, images, labels = world
    card = evaluation.report_card(
        defended, images, labels, eps=EPS, key=jax.random.key(3),
        args=(strong if robust else plain, *plant), **{**SMALL, **options},
    )  # fmt: skip
    assert tuple(check.name for check in card) == NAMES
    return {check.name: check for check in card}


def flags(card):
    return {name for name, check in card.items() if check.verdict == "flag"}


@pytest.mark.parametrize("robust", [False, True])
def test_an_honest_network_has_no_flag(world, robust):
    card = card_of(world, robust)
    assert not flags(card), [check for check in card.values() if not check.passed]
    for name in ("transfer", "random gradient", "bpda"):
        assert card[name].verdict == "not applicable"
        assert card[name].meaning.startswith("Not applicable: ")


@pytest.mark.parametrize("plant", PLANTS)
def test_every_planted_defence_is_flagged(world, plant):
    found = flags(card_of(world, plant=PLANTS[plant]))
    expected = {
        "input quantisation": {"zero gradient", "finite differences", "jump"},
        "stop_gradient": {"finite differences"},
        "saturated sigmoid": {"finite differences"},
        "huge logit scale": {"zero gradient"},
        "random resizing": {"jump"},
        "softmaxed outputs": {"probabilities"},
        "non-adaptive pre-processor": {"finite differences"},
    }
    assert found >= expected[plant], found


def test_transfer_and_bpda_break_what_a_wrong_gradient_hides(world):
    plain, _, images, labels = world
    card = card_of(
        world, plant=(1, 0),
        white_box=np.asarray(defended(images, plain, 1, 0).argmax(1) == labels),
        black_box=np.ones(80, bool),
        surrogates=[(honest, (plain,))],
        preprocessor=(lambda x, *_: coarse(x), lambda x, variables, *_: NET.apply(variables, x)),
    )  # fmt: skip
    assert {"transfer", "bpda"} <= flags(card)
    assert card["black box"].figure == 0


def honest(x, variables):
    return NET.apply(variables, x)


# ---- a linear model: random ones, and what is refused --------------------------------------------

WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
POINTS = np.random.default_rng(1).uniform(0.2, 0.8, (24, 4, 4, 1)).astype(np.float32)


def linear(x, weights):
    return (x.reshape(len(x), -1) - 0.5) @ weights


def noisy_linear(x, keys, weights, deviation):
    """The weights themselves are noisy: what the noise does to the gradient is no constant."""
    shape = weights.shape
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return jnp.einsum("bi,bik->bk", x.reshape(len(x), -1) - 0.5, weights + deviation * noise)


def linear_card(function, *args, **options):
    labels = np.asarray(linear(POINTS, WEIGHTS).argmax(1))
    options = {"white_box": np.ones(24, bool), "black_box": np.ones(24, bool), **options}
    card = evaluation.report_card(
        function, POINTS, labels, eps=0.05, key=jax.random.key(0), args=args, **options
    )
    return {check.name: check for check in card}


def test_randomness_drawn_while_tracing_is_noticed():
    draw = np.random.default_rng(2)
    card = linear_card(lambda x: linear(x, WEIGHTS) + draw.normal(size=3).astype(np.float32))
    assert card["repeatable"].verdict == "flag"
    assert linear_card(linear, WEIGHTS)["repeatable"].figure == 0


@pytest.mark.parametrize(("deviation", "flagged"), [(0.02, False), (3.0, True)])
def test_a_random_gradient_that_is_not_the_expected_one_is_flagged(deviation, flagged):
    card = linear_card(noisy_linear, WEIGHTS, deviation, random=True, draws=8)
    assert (card["random gradient"].verdict == "flag") == flagged
    assert card["repeatable"].verdict == "not applicable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"white_box": np.ones(3, bool)}, r"white_box must be \[24\] bool, got bool \(3,\)"),
        ({"black_box": np.ones(24)}, r"black_box must be \[24\] bool, got float64"),
        ({"bounds": (0.0, np.inf)}, "bounds must be finite"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ],
)
def test_what_cannot_be_checked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_card(linear, WEIGHTS, **options)


def test_eps_may_be_an_array_of_no_axes():
    labels = np.asarray(linear(POINTS, WEIGHTS).argmax(1))
    flags = {"white_box": np.ones(24, bool), "black_box": np.ones(24, bool)}
    card = evaluation.report_card(
        linear, POINTS, labels, eps=jnp.float32(0.05), key=jax.random.key(0), args=(WEIGHTS,),
        **flags,
    )  # fmt: skip
    assert [check.verdict for check in card] == [
        check.verdict for check in linear_card(linear, WEIGHTS).values()
    ]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="logits_fn must return finite logits"):
        linear_card(linear, WEIGHTS * np.inf)


@pytest.mark.parametrize("eps", [0.0, -0.1, np.ones(24)])
def test_eps_must_be_a_positive_number(eps):
    with pytest.raises(ValueError, match="eps must be a number > 0"):
        evaluation.report_card(linear, POINTS, np.zeros(24, int), eps=eps, key=jax.random.key(0))


# ---- verdicts, by themselves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "count", "passed"),
    [(2, 100, True), (3, 100, False), (20, 10_000, True), (21, 10_000, False)],
)
def test_a_couple_of_examples_or_two_thousandths_are_no_alarm(broken, count, passed):
    check = checks.beaten("black box", np.arange(count) < broken, "Square", "do more")
    assert check.passed == passed
    assert check.meaning.endswith("do more.") != passed
    assert check.verdict == ("ok" if passed else "flag")


def test_the_curve_must_fall_and_the_long_attack_must_lead():
    falling = {0.1: 0.8, 0.2: 0.5, 0.4: 0.1}
    rising = {0.1: 0.8, 0.2: 0.5, 0.4: 0.54}
    assert checks.monotone(falling, 100).passed
    assert not checks.monotone(rising, 100).passed
    assert checks.monotone(rising, 25).passed  # one example of 25
    assert checks.one_step(falling, falling, 100).passed
    assert not checks.one_step(falling, rising, 100).passed
    assert checks.large_radius(falling, 10, 100).passed
    assert not checks.large_radius(rising, 10, 100).passed


def probed(**columns):
    rows = {
        "logits": np.array([[1.0, 2.0], [0.0, -1.0]]),
        "slope": np.ones(2),
        "jump": np.zeros(2),
        "cosine": np.ones(2),
        "agreement": np.ones(2),
    }
    return probes.Probe(**{**rows, **columns})


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf, 1e-42])
def test_gradients_that_vanish_underflow_or_break_are_counted(slope):
    check = checks.zero_gradient(np.array([1.0, slope]))
    assert not check.passed
    assert check.figure == 0.5
    assert checks.zero_gradient(np.ones(2)).passed


@pytest.mark.parametrize(
    ("judge", "columns"),
    [
        (checks.jump, {"jump": np.array([0.0, 0.5])}),
        (checks.slopes, {"cosine": np.array([1.0, 0.5])}),
        (checks.random_gradient, {"agreement": np.array([1.0, 0.5])}),
    ],
)
def test_each_probe_has_its_verdict(judge, columns):
    assert judge(probed()).passed
    assert not judge(probed(**columns)).passed


def test_probabilities_are_told_from_logits():
    assert checks.probabilities(np.array([[1.0, 2.0], [0.0, -1.0]])).passed
    assert not checks.probabilities(np.array([[0.3, 0.7], [1.0, 0.0]])).passed


def test_devices_and_company_change_no_verdict(world):
    plain, _, images, labels = world
    card = card_of(world)
    shared = card_of(world, mesh=jr.parallel.data_mesh(8), batch_size=25)
    assert [check.verdict for check in shared.values()] == [c.verdict for c in card.values()]
    order = np.random.default_rng(0).permutation(80)
    turned = card_of((plain, None, images[order], labels[order]), indices=order)
    # A share of other rows' sums is rounded in another order.
    for name in ("one step", "convergence", "eps curve"):
        assert turned[name].figure == pytest.approx(card[name].figure)
