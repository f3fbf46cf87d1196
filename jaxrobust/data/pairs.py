"""What a set of image-text pairs is."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Pairs(NamedTuple):
    """Images with their captions, in memory.

    Attributes:
        images: [n, h, w, c] float32 in [0, 1].
        captions: n texts.
        indices: [n] int32, an id that stays with the pair whatever the split or order.
    """

    images: Float[np.ndarray, "n h w c"]
    captions: tuple[str, ...]
    indices: Int[np.ndarray, "n"]

    def take(self, rows: Any) -> "Pairs":
        """The pairs at `rows`: a slice, an index array or a mask."""
        chosen = np.arange(len(self.captions))[rows]
        captions = tuple(self.captions[row] for row in chosen)
        return Pairs(self.images[chosen], captions, self.indices[chosen])
