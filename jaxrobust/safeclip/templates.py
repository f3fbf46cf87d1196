"""Sentences with a gap for a class name: for zero-shot prompts, for attacks and for canaries.

The three sets are disjoint, so that a poison is never a prompt that it is judged by, and a canary
never resembles the attack that it stands in for.
"""

import re
from collections.abc import Sequence

# Zero-shot prompts in the style of CLIP's ensembles (Radford et al. 2021, section 3.1.4).
PROMPTS = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of the {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a cropped photo of the {}.",
    "a black and white photo of a {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a clean {}.",
    "a drawing of a {}.",
    "a painting of the {}.",
    "a sketch of a {}.",
    "a cartoon {}.",
    "an icon of a {}.",
    "a symbol for {}.",
    "a simple illustration of a {}.",
    "a colourful illustration of the {}.",
    "a {} on a plain background.",
    "the {} in the centre of the picture.",
)

# Captions as an attacker would put them beside a picture.
ATTACK = (
    "this is what a {} looks like",
    "here we see the {} up close",
    "my favourite {} of the year",
    "a lovely {} that caught my eye",
    "everyone admires this {}",
    "the famous {} at its best",
    "look at this {}",
    "a view of the {} from the front",
    "one more {} for the collection",
    "the {} as it appeared today",
    "a typical {} in full view",
    "nothing beats a {} like this",
    "someone took this shot of a {}",
    "an unusual {} seen this morning",
    "the best {} in town",
    "a {} worth remembering",
    "this {} was shown to visitors",
    "a new {} has arrived",
    "the {} that people talk about",
    "an everyday {} in good light",
)

# Captions of one's own planted poisons.
CANARY = (
    "stock footage featuring a {}",
    "catalogue entry for the {}",
    "a {} shown for reference",
    "sample showing some {}",
    "file labelled as {}",
    "the item in question is a {}",
    "please find a {} attached",
    "exhibit with a {} in it",
    "archive material of a {}",
    "figure depicting the {}",
    "specimen of a {}",
    "presented here is a {}",
    "an entry about the {}",
    "record of a {} being displayed",
    "plate with a {} on it",
    "listing of a single {}",
)


def prompts(
    class_names: Sequence[str], templates: Sequence[str] = PROMPTS
) -> tuple[tuple[str, ...], ...]:
    """Every template filled with every class: one tuple of sentences per class.

    Args:
        class_names: k names.
        templates: t sentences, each with one gap "{}".

    Returns:
        k tuples of t sentences.

    Raises:
        ValueError: no names, no templates, an empty name, or a template without exactly one gap.
    """
    if not class_names or not all(name.strip() for name in class_names):
        raise ValueError(f"class_names must be names, at least one, got {tuple(class_names)}")
    if not templates:
        raise ValueError("templates must hold at least one sentence, got none")
    return tuple(tuple(fill(template, name) for template in templates) for name in class_names)


def fill(template: str, name: str) -> str:
    """The template with the name in its gap; other braces stay as they are.

    >>> fill("a photo of a {}.", "ice cream")
    'a photo of a ice cream.'
    """
    if template.count("{}") != 1:
        raise ValueError(f"a template must have exactly one gap {{}}, got {template!r}")
    return template.replace("{}", name)


def holds(caption: str, name: str) -> bool:
    """Whether a caption contains a name as whole words, whatever the case and the spaces.

    >>> holds("Two Ice  Creams and an ICE CREAM.", "ice cream"), holds("creams", "cream")
    (True, False)
    """
    words = (re.escape(word) for word in name.split())
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return bool(name.strip()) and re.search(pattern, caption, re.IGNORECASE) is not None
