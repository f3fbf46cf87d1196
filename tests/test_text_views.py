"""EDA variants of captions: what may change, what must not, and what they depend on."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrobust.data.text_views import text_views, wordnet_synonyms

LONG = "a small brown dog runs over the wide green field after its red ball today again"
WORDS = {"dog": ("hound", "dog"), "small": ("little",), "ball": ("sphere", "globe")}


def many(caption, count=300, **options):
    """Variants of one caption under many indices."""
    found = text_views([caption] * count, 1, seed=0, **options)
    return [variant for (variant,) in found.variants]


def test_a_variant_depends_on_seed_index_and_view_alone():
    captions = [LONG, "two cats", LONG, "a tree by the sea"]
    whole = text_views(captions, 3, seed=5)
    part = text_views(captions[2:], 2, seed=5, indices=[2, 3])
    assert part.variants == tuple(views[:2] for views in whole.variants[2:])
    assert whole == text_views(captions, 3, seed=5)
    assert whole.variants != text_views(captions, 3, seed=6).variants
    assert whole.variants[0] != whole.variants[2]
    assert len({len(views) for views in whole.variants}) == 1


def test_without_dictionary_words_are_swapped_or_dropped():
    words = LONG.split()
    kinds = Counter()
    for variant in many(LONG):
        own = variant.split()
        if sorted(own) == sorted(words) and own != words:
            kinds["swap"] += 1
            assert sum(a != b for a, b in zip(own, words, strict=True)) == 2
        else:
            kinds["deletion"] += 1
            rest = iter(words)
            assert all(word in rest for word in own)  # in order
    # Both with probability 1/2: six sigma of 300 coins.
    assert abs(kinds["swap"] - 150) < 6 * 8.7


def test_deletion_drops_a_tenth_of_the_words():
    lengths = [len(v.split()) for v in many(LONG, 600)]
    # Half of the variants are deletions.
    expected = len(LONG.split()) * (1 - 0.1 / 2)
    assert abs(np.mean(lengths) - expected) < 0.3


def test_with_a_dictionary_there_are_also_replacements_and_insertions():
    words = LONG.split()
    others = {"hound", "little", "sphere", "globe"}
    kinds = Counter()
    for variant in many(LONG, synonyms=WORDS):
        own = variant.split()
        if len(own) == len(words) + 1:
            kinds["insertion"] += 1
            assert Counter(own) - Counter(words) <= Counter(others)
        elif set(own) & others:
            kinds["replacement"] += 1
            changed = [(a, b) for a, b in zip(words, own, strict=True) if a != b]
            assert len(changed) == 1
            assert changed[0][1] in WORDS[changed[0][0]]
    assert min(kinds["insertion"], kinds["replacement"]) > 40


def test_synonyms_keep_the_punctuation_around_a_word():
    found = {v for v in many("Good dog!", synonyms=WORDS) if "hound!" in v.split()}
    assert "Good hound!" in found


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "caption empty"),
        ("  ", "caption empty"),
        ("2019", "no letters"),
        ("!!! ??", "no letters"),
        ("Dog", "one word"),
        ("犬と猫", "one word"),
    ],
)
def test_what_has_no_variants_is_kept_and_counted(caption, reason):
    found = text_views([caption, LONG], 2, seed=0, synonyms=WORDS)
    assert found.variants[0] == (caption, caption)
    unchanged = {"caption empty": 0, "no letters": 0, "one word": 0} | {reason: 1}
    assert found.counts == {"captions": 2} | unchanged


def test_rate_zero_is_the_identity():
    assert set(many(LONG, 50, rate=0.0, synonyms=WORDS)) == {LONG}


def test_rate_one_leaves_at_least_one_word():
    assert all(variant.split() for variant in many("two cats", rate=1.0))


def test_lower_case_and_letters_only_are_options():
    caption = "Tom's BIG dog, 2 years-old"
    assert set(many(caption, 20, rate=0.0)) == {caption}
    assert set(many(caption, 20, rate=0.0, lower=True)) == {caption.lower()}
    assert set(many(caption, 20, rate=0.0, letters_only=True)) == {"toms big dog years old"}
    kept = text_views(["猫 2019"], 1, seed=0, letters_only=True)
    assert kept.variants == (("猫 2019",),)
    assert kept.counts["no letters"] == 1


@given(st.lists(st.text(max_size=30), max_size=4), st.booleans(), st.floats(0, 1))
def test_no_text_is_an_exception(captions, letters_only, rate):
    found = text_views(captions, 2, seed=1, rate=rate, synonyms=WORDS, letters_only=letters_only)
    assert len(found.variants) == len(captions) == found.counts["captions"]
    for caption, variants in zip(captions, found.variants, strict=True):
        assert all(variant.split() or variant == caption for variant in variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"rate": 1.5}, r"rate must be in \[0, 1\], got 1.5"),
        ({"indices": [1, 2]}, "indices must be 1 ids >= 0, one per caption, got 2 from 1"),
        ({"indices": [-3]}, "indices must be 1 ids .* from -3 on"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        text_views(["a b"], **{"seed": 0, **options})


def test_wordnets_files_are_read(tmp_path):
    licence = "  1 This software and database is being provided to you\n"
    noun = "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 000 | a pet\n"
    lone = "02121620 05 n 01 cat 0 000 | a pet\n"
    (tmp_path / "data.noun").write_text(licence + noun + lone)
    (tmp_path / "data.verb").write_text("02005948 38 v 02 chase 0 dog 1 000 | go after\n")
    (tmp_path / "data.adj").write_text("00000001 00 a 02 galore(ip) 0 abounding 0 000 | much\n")
    with pytest.raises(FileNotFoundError, match=r"no .*data\.adv"):
        wordnet_synonyms(tmp_path)
    (tmp_path / "data.adv").write_text("")
    found = wordnet_synonyms(tmp_path)
    assert found["dog"] == ("canis familiaris", "chase", "domestic dog")
    assert found["galore"] == ("abounding",)
    assert "cat" not in found
