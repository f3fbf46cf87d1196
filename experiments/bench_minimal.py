"""Minimum-norm attacks: how small a perturbation they find, and how fast, against other libraries.

    pip install -e '.[bench]' && pip install --no-deps adv-lib==0.2.8
    python -m experiments.bench_minimal                  # two networks, two trainings; 1 hour
    python -m experiments.bench_minimal --preset smoke   # ours alone on the digits, seconds

Same weights, same images, equal steps; for HopSkipJump equal queries and starts. The median is over
the examples that were right before the attack; one that an attack fails on counts as infinity. All
run on one thread and in turn: on few cores PyTorch's threads cost it more than they bring. FMN in
l2 by foolbox never projects, and its Carlini-Wagner returns a black image where it found none,
which a network may well misclassify. What the results file holds is not measured again.
"""

import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrobust as jr
from experiments import bench_attacks, common, plots, records, timing
from jaxrobust import training

NAME = "bench_minimal"
ORDER = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
# adv-lib imports these for losses and plots that no attack here uses.
ABSENT = ("torchvision", "torchvision.models", "visdom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    models: tuple[str, ...] = ("digits_cnn", "mnist_cnn")
    trainings: tuple[str, ...] = ("standard", "adversarial")
    images: int = 64
    steps: int = 100
    searches: tuple[tuple[int, int], ...] = ((5, 100), (9, 200))
    hops: int = 16
    hop_images: int = 64
    eps: float = 0.1
    epochs: int = 8
    repeats: int = 3
    seconds: float = 60.0
    peers: bool = True


PRESETS = {
    "full": Config(),
    "smoke": Config(
        models=("digits_cnn",),
        trainings=("standard",),
        images=16,
        steps=5,
        searches=((2, 5),),
        hops=2,
        hop_images=4,
        repeats=1,
        peers=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network and a batch of images to attack."""

    model: jr.models.Model
    variables: Any
    images: np.ndarray
    labels: np.ndarray

    def logits(self, x, variables):
        """Class scores."""
        return self.model.apply(variables, x)

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


def problem(name: str, method: str, config: Config) -> Problem:
    """A network, briefly trained, and test images."""
    model = jr.models.build(**bench_attacks.MODELS[name])
    data = bench_attacks.DATA[name]
    if method == "standard":
        variables = bench_attacks.trained(model, data)
    else:
        variables = adversarially_trained(model, data, config)
    test = jr.data.load(data, "test")
    return Problem(model, variables, test.images[: config.images], test.labels[: config.images])


def adversarially_trained(model: jr.models.Model, dataset: str, config: Config) -> Any:
    """A few epochs of PGD-5 adversarial training."""
    examples = jr.data.load(dataset)
    optimizer = optax.adam(4e-3)
    mesh = jr.parallel.data_mesh(1)
    shape = examples.images.shape[1:]
    state = jr.parallel.create(
        lambda: training.create_state(model, optimizer, jax.random.key(0), shape), mesh
    )
    objective = training.adversarial(jr.linf_pgd(config.eps, 5))
    step = training.train_step(model, optimizer, objective)
    fitted = training.fit(
        step, state, examples, batch_size=64, epochs=config.epochs, mesh=mesh, label=dataset
    )
    return jax.tree.map(np.asarray, fitted.variables)


def ours(case: Problem, config: Config) -> dict[tuple[str, str], Callable[[], Any]]:
    """Our attacks, by (attack, norm)."""
    found = {("ddn", "l2"): jr.ddn(config.steps)}
    found |= {("fmn", norm): jr.fmn(norm, config.steps) for norm in ORDER}
    for searches, steps in config.searches:
        found[f"cw_{searches}x{steps}", "l2"] = jr.cw_l2(searches, steps)
    for norm in ("linf", "l2"):
        found["deepfool", norm] = jr.deepfool(norm)
        found["hop_skip_jump", norm] = jr.hop_skip_jump(norm, config.hops)
    variables = jax.tree.map(jnp.asarray, case.variables)
    logits_fn, key = case.logits, jax.random.key(0)

    def run_of(name, attack):
        count, start = config.images, {}
        if name == "hop_skip_jump":
            count = config.hop_images
            start = {"starts": jnp.asarray(starts(case, count))}
        x, y = jnp.asarray(case.images[:count]), jnp.asarray(case.labels[:count])
        return lambda: attack(logits_fn, x, y, key, args=(variables,), **start).block_until_ready()

    return {key: run_of(key[0], attack) for key, attack in found.items()}


def starts(case: Problem, count: int) -> np.ndarray:
    """For each image one that the network takes for another class: foolbox's own draw may fail."""
    seen = np.asarray(case.logits(case.images, case.variables).argmax(1))
    return case.images[[np.flatnonzero(seen != label)[0] for label in case.labels[:count]]]


@contextlib.contextmanager
def _optional(package):
    try:
        yield
    except ImportError as error:
        print(f"{package} is left out: {error}")


def peers(case: Problem, name: str, config: Config) -> dict[tuple[str, str, str], Callable]:
    """The other libraries' attacks, by (attack, norm, library)."""
    runs = {}
    with _optional("torch"):
        import torch

        from experiments import torch_twins

        torch.set_num_threads(1)
        image = bench_attacks.IMAGES[name]
        net = torch_twins.freeze(torch_twins.twin(case.model.config, case.variables, image))
        x, y = torch_twins.nchw(case.images), torch.from_numpy(np.array(case.labels)).long()
        with _optional("adv-lib"):
            runs.update(_adv_lib_runs(net, x, y, config))
        with _optional("foolbox"):
            runs.update(_foolbox_runs(net, x, y, case, config))
    return runs


def _adv_lib_runs(net, x, y, config):
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ABSENT}):
        from adv_lib import attacks
        from adv_lib.attacks.deepfool import df

    calls = {("ddn", "l2"): lambda: attacks.ddn(net, x, y, steps=config.steps, levels=None)}
    for norm, order in ORDER.items():
        calls["fmn", norm] = lambda order=order: attacks.fmn(
            net, x, y, norm=order, steps=config.steps
        )
    for searches, steps in config.searches:
        calls[f"cw_{searches}x{steps}", "l2"] = lambda searches=searches, steps=steps: (
            attacks.carlini_wagner_l2(net, x, y, binary_search_steps=searches, max_iterations=steps)
        )
    for norm in ("linf", "l2"):
        calls["deepfool", norm] = lambda norm=norm: df(net, x, y, steps=50, norm=ORDER[norm])
    return {(*name, "adv-lib"): _as_nhwc(call) for name, call in calls.items()}


def _foolbox_runs(net, x, y, case, config):
    import foolbox

    from experiments import torch_twins

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    made = foolbox.attacks
    found = {("ddn", "l2"): made.DDNAttack(steps=config.steps)}
    for norm, kind in (("linf", "LInf"), ("l2", "L2"), ("l1", "L1"), ("l0", "L0")):
        found["fmn", norm] = getattr(made, f"{kind}FMNAttack")(steps=config.steps)
    for searches, steps in config.searches:
        found[f"cw_{searches}x{steps}", "l2"] = made.L2CarliniWagnerAttack(
            binary_search_steps=searches, steps=steps
        )
    for norm, kind in (("linf", "Linf"), ("l2", "L2")):
        found["deepfool", norm] = getattr(made, f"{kind}DeepFoolAttack")(steps=50)
        found["hop_skip_jump", norm] = made.HopSkipJumpAttack(steps=config.hops, constraint=norm)

    def run_of(name, attack):
        count, start = len(x), {}
        if name == "hop_skip_jump":
            count = config.hop_images
            start = {"starting_points": torch_twins.nchw(starts(case, count))}
        wrong = foolbox.criteria.Misclassification(y[:count])
        return _as_nhwc(lambda: attack.run(model, x[:count], wrong, **start))

    return {(*key, "foolbox"): run_of(key[0], attack) for key, attack in found.items()}


def _as_nhwc(call):
    return lambda: call().detach().permute(0, 2, 3, 1).numpy()


def sizes(case: Problem, x_adv: np.ndarray, norm: str) -> np.ndarray:
    """Norms of the perturbations, inf where our own forward pass sees no success."""
    count = len(x_adv)
    wrong = lambda x: np.asarray(case.logits(x, case.variables).argmax(1)) != case.labels[:count]  # noqa: E731
    x = case.images[:count]
    delta = (x_adv.astype(np.float64) - x).reshape(count, -1)
    size = np.linalg.norm(delta, ord=ORDER[norm], axis=1) if norm != "l0" else (delta != 0).sum(1)
    return np.where(wrong(x_adv), size, np.inf)[~wrong(x)]


def measure(case: Problem, runs: dict[str, Callable], norm: str, config: Config):
    """Times and norms of every library on one attack."""
    timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
    for library, figures in timed.items():
        x_adv = np.asarray(runs[library]())
        size = sizes(case, x_adv, norm)
        found = size[np.isfinite(size)]
        figures["success"] = float(np.isfinite(size).mean())
        median = float(np.median(size))
        figures["median_norm"] = median if np.isfinite(median) else None
        figures["mean_norm_found"] = float(found.mean()) if len(found) else None
        figures["milliseconds_per_image"] = 1e3 * figures["seconds_median"] / len(x_adv)
    return timed


def table(path: Path) -> str:
    """Every attack over all networks: its medians beside the best of the others', and its speed."""
    problems = defaultdict(lambda: defaultdict(dict))
    for cell in plots.read(path)["cells"]:
        key = cell["key"]
        problem = key["model"], key["training"]
        problems[key["attack"], key["norm"]][problem][key["library"]] = cell["metrics"]
    lines = []
    for (attack, norm), found in problems.items():
        ratios, speeds, failed = [], [], 0
        for libraries in found.values():
            ours = libraries["jaxrobust"]
            others = [m for name, m in libraries.items() if name != "jaxrobust"]
            if not others:
                continue
            times = min(m["milliseconds_per_image"] for m in others)
            speeds.append(times / ours["milliseconds_per_image"])
            best = min((m["median_norm"] for m in others if m["median_norm"]), default=None)
            if ours["median_norm"] is None:
                failed += 1
            elif best:
                ratios.append(ours["median_norm"] / best)
        shown = f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "not run"
        shown += f"; {failed} fell on less than half" if failed else ""
        speed = f"{min(speeds):.1f} to {max(speeds):.1f}" if speeds else "not run"
        lines.append([attack, norm, shown, speed])
    header = ["attack", "norm", "median norm / best of the others'", "x the fastest of the others"]
    return common.markdown(header, lines)


def main(config: Config, options) -> None:
    """Measures every attack on every network, and writes the results."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{kind if options.preset == 'full' else options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    for name in config.models:
        for method in config.trainings:
            case = problem(name, method, config)
            others = peers(case, name, config) if config.peers else {}
            for (attack, norm), run in ours(case, config).items():
                key = {"model": name, "training": method, "attack": attack, "norm": norm}
                if results.find({**key, "library": "jaxrobust"}):
                    continue
                begun = time.monotonic()
                runs = {"jaxrobust": run}
                runs |= {who[2]: call for who, call in others.items() if who[:2] == (attack, norm)}
                for library, figures in measure(case, runs, norm, config).items():
                    results.add({**key, "library": library}, figures, time.monotonic() - begun)
                    print(
                        f"{name:11}{method:12}{attack:14}{norm:5}{library:10} median "
                        f"{figures['median_norm'] or np.inf:8.4f}  success "
                        f"{figures['success']:.2f}  {figures['milliseconds_per_image']:9.2f} ms",
                        flush=True,
                    )
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full", devices=1)
    main(PRESETS[chosen.preset], chosen)
