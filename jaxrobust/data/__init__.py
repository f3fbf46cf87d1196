"""Data sets as plain arrays: loading, batching, device prefetch and augmentation.

    train = load("mnist5k", "train")
    for batch in prefetch(batches(train, 128, seed=0, epoch=0), put=jax.device_put):
        images = pad_crop(key, batch["image"], pad=2)

TFDS prepares and stores the named sets; neither it nor TensorFlow is imported until a set is asked
for, and TensorFlow never is.
"""

from jaxrobust.data.augment import compose, cutout, flip, pad_crop
from jaxrobust.data.batching import batches, epoch_order, steps_per_epoch, stream
from jaxrobust.data.coco_pairs import coco_pairs
from jaxrobust.data.colours import color_jitter, grayscale
from jaxrobust.data.corruptions import CORRUPTIONS, corrupt
from jaxrobust.data.dataset import Dataset, Source, check_dataset, check_images
from jaxrobust.data.emoji_pairs import emoji_labels, load_emoji_pairs
from jaxrobust.data.folder import load_folder
from jaxrobust.data.loading import load, names, source
from jaxrobust.data.pairs import Pairs, PairSource, load_pairs, pair_source
from jaxrobust.data.photos import foolbox_photos
from jaxrobust.data.prefetching import prefetch
from jaxrobust.data.resampling import gaussian_blur, random_resized_crop
from jaxrobust.data.stored_images import StoredImages, stored
from jaxrobust.data.text_views import text_views, wordnet_synonyms
from jaxrobust.data.tokens import Tokenizer, bpe_tokenizer, clip_tokenizer
from jaxrobust.data.views import clip_views

__all__ = [
    "CORRUPTIONS",
    "Dataset",
    "PairSource",
    "Pairs",
    "Source",
    "StoredImages",
    "Tokenizer",
    "batches",
    "bpe_tokenizer",
    "check_dataset",
    "check_images",
    "clip_tokenizer",
    "clip_views",
    "coco_pairs",
    "color_jitter",
    "compose",
    "corrupt",
    "cutout",
    "emoji_labels",
    "epoch_order",
    "flip",
    "foolbox_photos",
    "gaussian_blur",
    "grayscale",
    "load",
    "load_emoji_pairs",
    "load_folder",
    "load_pairs",
    "names",
    "pad_crop",
    "pair_source",
    "prefetch",
    "random_resized_crop",
    "source",
    "steps_per_epoch",
    "stored",
    "stream",
    "text_views",
    "wordnet_synonyms",
]
