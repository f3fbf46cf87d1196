"""The bound behind CRoPD, term by term, on real data: a diagnostic and no certificate.

    adversarial loss <= clean loss + K L sqrt(2 (1 - s))

K: how far two rows of the head lie apart; L: how much features move per unit of the normalised
code; s: cosine of attacked and clean code. With the true constants and the worst x' it is a
theorem; here x' is what an attack found and L is measured along that way.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.spatial
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxrobust import inference, losses, parallel
from jaxrobust.attacks.inputs import check_labels, check_number, check_steps
from jaxrobust.data import check_images
from jaxrobust.evaluation import LossOfModel
from jaxrobust.keys import example_keys
from jaxrobust.models import Model
from jaxrobust.models.defended import flat


class BoundReport(NamedTuple):
    """The terms of the bound, per example.

    Attributes:
        clean_loss: [n] cross entropy of the images as they are, in nats.
        adversarial_loss: [n] cross entropy under the attack: the left-hand side.
        cosine: [n] s, of attacked and clean code.
        displacement: [n] sqrt(2 (1 - s)), measured as the distance of the two normalised codes.
        head: [n] K, the largest |w_j - w_y| over the classes j.
        lipschitz: [n] L, |features' - features| / displacement, or what was given; 0 where the
            code did not move.
        bound: [n] the right-hand side.
    """

    clean_loss: Float[np.ndarray, " n"]
    adversarial_loss: Float[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]
    displacement: Float[np.ndarray, " n"]
    head: Float[np.ndarray, " n"]
    lipschitz: Float[np.ndarray, " n"]
    bound: Float[np.ndarray, " n"]

    @property
    def means(self) -> dict[str, float]:
        """Means over the examples, with the largest L and the share for which the bound holds."""
        found = {name: float(np.mean(values)) for name, values in self._asdict().items()}
        held = self.adversarial_loss <= self.bound * (1 + 1e-5) + 1e-5
        return {**found, "largest_lipschitz": float(self.lipschitz.max()), "holds": held.mean()}


def bound_report(
    defended: Model,
    variables: Any,
    images: Any,
    labels: Any,
    *,
    attack: Any,
    key: Array,
    lipschitz: float | None = None,
    code: str = "latent",
    batch_size: int = 250,
    mesh: Mesh | None = None,
) -> BoundReport:
    """Measures every term of the bound on a defended model with a linear head of its own.

    Args:
        defended: of `models.defend(preprocessor, resize, foundation, head=classes)`, where the
            pre-processor's decoder sees nothing but the normalised code.
        variables: its variables.
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] whole numbers.
        attack: a gradient attack; it raises the cross entropy through the whole model.
        key: one typed key.
        lipschitz: L of everything from the normalised code to the features, where it is known;
            None measures it along the attack, where the bound then holds by construction of L, and
            says how loose the other steps are.
        code: tap of the code in the pre-processor.
        batch_size: images at a time, rounded up to a multiple of the devices.
        mesh: spreads each batch over devices; one device by default.

    Raises:
        ValueError: the model has no pre-processor or no head of its own, its auto-encoder does
            not normalise the code, batch_size < 1, or lipschitz < 0.

    Source: derived for this project; steps (1) to (3) of the CRoPD paper's claim, with constants.
    """
    config = defended.config
    if config.get("head") is None or config.get("preprocessor") is None:
        raise ValueError("defended must have a preprocessor and a head of its own")
    if config["preprocessor"].get("latent_norm") is False:
        raise ValueError(
            "defended must have a preprocessor whose decoder sees the normalised code alone "
            "(latent_norm=True), got latent_norm=False: the length of the code would pass by the "
            "bound"
        )
    check_steps(batch_size, "batch_size")
    if lipschitz is not None:
        check_number("lipschitz", lipschitz, low=0)
    taps = f"preprocessor.{code}", f"foundation.{config['tap']}"
    images = check_images(images)
    labels = np.asarray(check_labels(labels, len(images), config["head"]))
    keys = example_keys(key, len(images))
    look = partial(_look, defended.apply, taps)
    loss_fn = LossOfModel(defended.apply)
    size = parallel.rounded(min(batch_size, len(images)), mesh)
    variables = parallel.replicate(variables, mesh)
    parts = []
    for rows in inference.filled(np.arange(len(images)), size):
        x, y, own = parallel.place((images[rows], labels[rows], keys[rows]), mesh)
        x_adv = attack(loss_fn, x, own, args=(variables, y))
        parts.append(_terms(look(variables, x), look(variables, x_adv), y))
    stacked = [np.concatenate(column)[: len(images)] for column in zip(*parts, strict=True)]
    clean, adversarial, cosine, displacement, moved = stacked
    head_rows = np.asarray(variables["params"]["head"]["kernel"], np.float64).T
    head = scipy.spatial.distance.cdist(head_rows, head_rows).max(0)[labels]
    steep = np.divide(moved, displacement, out=np.zeros_like(moved), where=displacement > 0)
    if lipschitz is not None:
        steep = np.full(len(images), float(lipschitz))
    bound = clean + head * steep * displacement
    return BoundReport(clean, adversarial, cosine, displacement, head, steep, bound)


@partial(jax.jit, static_argnums=(0, 1))
def _look(apply, taps, variables, x):
    logits, values = apply(variables, x, taps=taps)
    code, features = (values[tap] for tap in taps)
    return logits, code.reshape(len(x), -1), flat(features)


def _terms(clean, adversarial, labels: Int[Array, " b"]):
    """[b] each: both losses, the cosine, and how far the unit code and the features moved."""
    before, after = (losses.cross_entropy(logits, labels) for logits in (clean[0], adversarial[0]))
    here, there = losses.unit_rows(clean[1]), losses.unit_rows(adversarial[1])
    # Not from the cosine, which float32 rounds to 1 long before the codes are equal.
    apart = jnp.linalg.norm(there - here, axis=1)
    moved = jnp.linalg.norm(adversarial[2] - clean[2], axis=1)
    terms = before, after, (here * there).sum(1), apart, moved
    return [np.asarray(values, np.float64) for values in terms]
