"""PGD in images per second, against PyTorch by hand, torchattacks and foolbox on JAX.

    pip install -e '.[bench]' && pip install --no-deps torchattacks==3.5.1
    python -m experiments.bench_attacks                  # three networks, 20 minutes on 2 cores
    python -m experiments.bench_attacks --preset smoke   # ours alone, seconds

All run in one process, in turn, from the same random start on the same weights; the table gives
the median, and the loss that each attack reached: a fast attack that is weak would be no win.
Ours runs on one device per core with the batch spread over them, and on one device; PyTorch uses
its own threads. Missing peers are named and left out. What the results file holds is not measured
again: remove it to start anew, and leave the machine alone meanwhile.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrobust as jr
from experiments import common, records, timing
from jaxrobust import training

NAME = "bench_attacks"
IMAGES = {"digits_cnn": (8, 8, 1), "mnist_cnn": (28, 28, 1), "preact_resnet18": (32, 32, 3)}
MODELS = {
    "digits_cnn": {"name": "small_cnn", "channels": (16, 32), "strides": (1, 2), "kernel": 3},
    "mnist_cnn": {"name": "small_cnn"},
    "preact_resnet18": {"name": "preact_resnet18", "norm": "batch"},
}
DATA = {"digits_cnn": "digits", "mnist_cnn": "mnist5k"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    models: tuple[str, ...] = ("digits_cnn", "mnist_cnn", "preact_resnet18")
    batch: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"digits_cnn": 128, "mnist_cnn": 128, "preact_resnet18": 32}
    )
    steps: tuple[int, ...] = (10, 40)
    eps: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"digits_cnn": 0.1, "mnist_cnn": 0.1, "preact_resnet18": 8 / 255}
    )
    repeats: int = 11
    seconds: float = 30.0
    peers: bool = True


PRESETS = {
    "full": Config(),
    "smoke": Config(
        models=("digits_cnn",), batch={"digits_cnn": 16}, steps=(2,), repeats=2, peers=False
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network, one batch, one start."""

    model: jr.models.Model
    variables: Any
    images: np.ndarray
    labels: np.ndarray
    start: np.ndarray
    eps: float
    steps: int

    @property
    def step_size(self) -> float:
        """The common step size."""
        return 2.5 * self.eps / self.steps

    def loss_fn(self, x, variables, labels):
        """Cross entropy per example."""
        return jr.losses.cross_entropy(self.model.apply(variables, x), labels)

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


def problem(name: str, config: Config, steps: int) -> Problem:
    """A network, briefly trained where real images are at hand, and a batch to attack."""
    model = jr.models.build(**MODELS[name])
    variables = model.init(jax.random.key(0), IMAGES[name])
    draw = np.random.default_rng(0)
    shape = (config.batch[name], *IMAGES[name])
    if name in DATA:
        variables = trained(model, DATA[name])
        test = jr.data.load(DATA[name], "test")
        rows = np.arange(shape[0]) % len(test.labels)
        images, labels = test.images[rows], test.labels[rows]
    else:
        images = draw.random(shape, dtype=np.float32)
        labels = np.asarray(model.apply(variables, images).argmax(1))
    eps = config.eps[name]
    start = draw.uniform(-eps, eps, shape).astype(np.float32)
    return Problem(model, variables, images, labels, start, eps, steps)


def trained(model: jr.models.Model, dataset: str) -> Any:
    """Three epochs of ordinary training: enough for gradients that are not noise."""
    examples = jr.data.load(dataset)
    optimizer = optax.adam(2e-3)
    mesh = jr.parallel.data_mesh(1)
    shape = examples.images.shape[1:]
    state = jr.parallel.create(
        lambda: training.create_state(model, optimizer, jax.random.key(0), shape), mesh
    )
    step = training.train_step(model, optimizer, training.standard())
    fitted = training.fit(
        step, state, examples, batch_size=64, epochs=3, mesh=mesh, label=f"{dataset} warm-up"
    )
    return jax.tree.map(np.asarray, fitted.variables)


def ours(case: Problem, devices: int, loop: str = "auto") -> Callable[[], np.ndarray]:
    """Our attack on so many devices."""
    mesh = jr.parallel.data_mesh(devices)
    attack = jr.linf_pgd(case.eps, case.steps, case.step_size, loop=loop)
    variables = jr.parallel.create(lambda: jax.tree.map(jnp.asarray, case.variables), mesh)
    x, y, start = jr.parallel.shard_batch((case.images, case.labels, case.start), mesh)
    loss_fn = case.loss_fn

    def run():
        return attack(loss_fn, x, args=(variables, y), delta=start).block_until_ready()

    return run


def peers(case: Problem, name: str) -> dict[str, Callable[[], Any]]:
    """Every installed peer, by name."""
    runs = {}
    with _optional("torch", runs):
        runs.update(_torch_runs(case, name))
    with _optional("torchattacks", runs):
        runs.update(_torchattacks_run(case, name))
    with _optional("foolbox", runs):
        runs.update(_foolbox_runs(case))
    return runs


@contextlib.contextmanager
def _optional(package, runs):
    try:
        yield
    except ImportError as error:
        print(f"{package} is left out: {error}; pip install -e '.[bench]' brings the peers")


def _torch_runs(case, name):
    import torch

    from experiments import torch_twins

    net = torch_twins.freeze(torch_twins.twin(case.model.config, case.variables, IMAGES[name]))
    _check_same(case, net(torch_twins.nchw(case.images[:8])).numpy())
    compiled = torch.compile(net)
    x, start = torch_twins.nchw(case.images), torch_twins.nchw(case.start)
    y = torch.from_numpy(np.array(case.labels)).long()
    setting = {"eps": case.eps, "step_size": case.step_size, "steps": case.steps}

    def run_of(network):
        return lambda: _nhwc(torch_twins.linf_pgd(network, x, y, start, **setting))

    return {"torch eager, frozen": run_of(net), "torch.compile, frozen": run_of(compiled)}


def _check_same(case, theirs):
    """A race between two different functions would say nothing."""
    logits = np.asarray(case.model.apply(case.variables, case.images[:8]))
    gap = np.abs(logits - theirs).max() / np.abs(logits).max()
    if gap > 1e-3:
        raise RuntimeError(
            f"the PyTorch twin computes another function: logits differ by {gap:.1e}"
        )


def _torchattacks_run(case, name):
    import torch
    import torchattacks

    from experiments import torch_twins

    net = torch_twins.twin(case.model.config, case.variables, IMAGES[name])
    attack = torchattacks.PGD(
        net, eps=case.eps, alpha=case.step_size, steps=case.steps, random_start=True
    )
    x, y = torch_twins.nchw(case.images), torch.from_numpy(np.array(case.labels)).long()
    return {"torchattacks": lambda: _nhwc(attack(x, y))}


def _foolbox_runs(case):
    import foolbox

    def plain(x):
        return case.model.apply(case.variables, x)

    attack = foolbox.attacks.LinfPGD(abs_stepsize=case.step_size, steps=case.steps)
    x, y = jnp.asarray(case.images), jnp.asarray(case.labels)

    def run_of(function):
        model = foolbox.JAXModel(function, bounds=(0, 1), data_format="channels_last")
        return lambda: jax.block_until_ready(attack(model, x, y, epsilons=case.eps)[1])

    return {"foolbox on JAX, jitted": run_of(jax.jit(plain)), "foolbox on JAX": run_of(plain)}


def _nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def measure(case: Problem, name: str, config: Config) -> dict[str, dict[str, float]]:
    """Times and losses of every runner on one problem."""
    devices = {1, max(d for d in range(1, jax.device_count() + 1) if len(case.labels) % d == 0)}
    runs = {f"jaxrobust, {count} devices": ours(case, count) for count in sorted(devices)}
    if config.peers:
        runs.update(peers(case, name))
    timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
    for runner, figures in timed.items():
        x_adv = jnp.asarray(np.asarray(runs[runner]()))
        loss = case.loss_fn(x_adv, case.variables, jnp.asarray(case.labels))
        figures["loss"] = float(loss.mean())
        figures["images_per_second"] = len(case.labels) / figures["seconds_median"]
    return timed


def attack_flops(case: Problem) -> float:
    """Floating-point operations of the whole attack, in matrix products and convolutions."""
    images, labels = jnp.asarray(case.images), jnp.asarray(case.labels)
    gradient = lambda x: jr.attacks.input_gradient(case.loss_fn, x, (case.variables, labels))  # noqa: E731
    return jr.flops.count_flops(gradient, images).matmul * case.steps


def matmul_rate(repeats: int = 10) -> float:
    """GFLOP/s of a large float32 matrix product, in JAX's default precision: the machine's best."""
    size = 2048 if jax.default_backend() == "cpu" else 16_384  # small ones would time the dispatch
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    times = timing.interleaved(
        {"matmul": lambda: product(a, a).block_until_ready()}, repeats=repeats
    )
    return 2 * size**3 / times["matmul"]["seconds_min"] / 1e9


def main(config: Config, options) -> None:
    """Times every network and step count, and writes the results."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{kind if options.preset == 'full' else options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    rate = matmul_rate()
    for name in config.models:
        for steps in config.steps:
            done = (cell["key"] for cell in results.cells)
            if any(key["model"] == name and key["steps"] == steps for key in done):
                continue
            begun = time.monotonic()
            case = problem(name, config, steps)
            flops = attack_flops(case)
            for runner, figures in measure(case, name, config).items():
                key = {"library": runner, "model": name, "steps": steps, "batch": len(case.labels)}
                extra = {
                    "gflop_per_second": flops / figures["seconds_median"] / 1e9,
                    "matmul_gflop_per_second": rate,
                }
                results.add(key, {**figures, **extra}, time.monotonic() - begun)
                print(
                    f"{name:16} PGD-{steps:<3} {runner:26} {figures['images_per_second']:9.1f} "
                    f"images/s  loss {figures['loss']:.4f}  first {figures['first_seconds']:.1f} s",
                    flush=True,
                )
    print(f"matrix products: {rate:.0f} GFLOP/s; results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
