"""Accuracy where the attack may touch only what is salient, or only what is not.

SIP-AT leaves the salient region undefended on purpose. These two numbers say what that costs; they
stand beside the unmasked robust accuracy and never replace it.
"""

from typing import Any

import numpy as np

from jaxrobust.evaluation.accuracy import Apply, correct
from jaxrobust.salience import check_maps
from jaxrobust.sipat.masking import Masking


def salience_only_correct(
    apply: Apply, variables: Any, images: Any, labels: Any, salience: Any, **options: Any
) -> np.ndarray:
    """Which examples are classified rightly when the attack may change salient pixels (S > 1/2).

    Args:
        apply: (variables, x) -> [b, classes] logits: the whole defended model.
        variables: its parameters.
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] whole numbers.
        salience: [n, h, w, 1] maps in [0, 1].
        options: `attack`, `key` and further options of `evaluation.correct`.

    Returns:
        [n] bool.

    Raises:
        TypeError, ValueError: as `evaluation.correct`; or maps that do not fit the images.
    """
    return _region(Masking(invert=True), apply, variables, images, labels, salience, options)


def background_only_correct(
    apply: Apply, variables: Any, images: Any, labels: Any, salience: Any, **options: Any
) -> np.ndarray:
    """Which examples are classified rightly when the attack may change the others (S <= 1/2).

    Arguments, result and errors as `salience_only_correct`.
    """
    return _region(Masking(), apply, variables, images, labels, salience, options)


def _region(masking, apply, variables, images, labels, salience, options):
    check_maps(salience, images)
    mask = np.asarray(masking.mask(salience))
    return correct(apply, variables, images, labels, mask=mask, **options)
