"""Data sets as plain arrays: loading, batching, device prefetch and augmentation.

    train = load("mnist5k", "train")
    for batch in prefetch(batches(train, 128, seed=0, epoch=0), put=jax.device_put):
        images = pad_crop(key, batch["image"], pad=2)

TFDS prepares and stores the named sets; neither it nor TensorFlow is imported until a set is asked
for, and TensorFlow never is.
"""

from jaxrobust.data.augment import compose, cutout, flip, pad_crop
from jaxrobust.data.batching import batches, epoch_order, steps_per_epoch, stream
from jaxrobust.data.corruptions import CORRUPTIONS, corrupt
from jaxrobust.data.dataset import Dataset, Source, check_images
from jaxrobust.data.folder import load_folder
from jaxrobust.data.loading import load, names, source
from jaxrobust.data.photos import foolbox_photos
from jaxrobust.data.prefetching import prefetch
from jaxrobust.data.tokens import Tokenizer, bpe_tokenizer, clip_tokenizer

__all__ = [
    "CORRUPTIONS",
    "Dataset",
    "Source",
    "Tokenizer",
    "batches",
    "bpe_tokenizer",
    "check_images",
    "clip_tokenizer",
    "compose",
    "corrupt",
    "cutout",
    "epoch_order",
    "flip",
    "foolbox_photos",
    "load",
    "load_folder",
    "names",
    "pad_crop",
    "prefetch",
    "source",
    "steps_per_epoch",
    "stream",
]
