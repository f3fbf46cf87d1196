"""Poisons: the right rows, the right captions, the right number, and the same every time."""

from collections import Counter

import jax
import numpy as np
import pytest

from jaxrobust.data.pairs import Pairs
from jaxrobust.safeclip import canary as planting
from jaxrobust.safeclip import manifest, poisons, templates, triggers

RANDOM = np.random.default_rng(2)
NAMES = ("cat", "dog", "fox", "ice cream", "owl")
FIRST = poisons.FIRST_ID
TRIGGER = triggers.badnets(0.4, pattern="white", place=(0, 0))


def some_pairs(count, first):
    images = RANDOM.random((count, 6, 6, 3), dtype=np.float32)
    captions = tuple(f"number {row}: a {NAMES[row % 5]}!" for row in range(count))
    return Pairs(images, captions, np.arange(first, first + count, dtype=np.int32))


PAIRS, HELD = some_pairs(40, first=100), some_pairs(20, first=500)


def same(first, second):
    columns = vars(first)
    return all(np.array_equal(columns[name], getattr(second, name)) for name in columns)


# ---- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "name", "expected"),
    [
        ("A Cat on a mat", "cat", True),
        ("the category of cats", "cat", False),
        ("cat", "cat", True),
        ("a cat's tail", "cat", True),
        ("tomcat", "cat", False),
        ("ICE\tcream.", "ice cream", True),
        ("ice creams", "ice cream", False),
        ("nice cream", "ice cream", False),
        ("c++ code", "c++", True),
        ("anything", " ", False),
        ("", "cat", False),
        ("eine große Katze", "katze", True),
    ],
)
def test_a_name_is_found_as_whole_words(caption, name, expected):
    assert templates.holds(caption, name) is expected


def test_the_sets_of_templates_are_disjoint_and_have_one_gap_each():
    sets = (templates.PROMPTS, templates.ATTACK, templates.CANARY)
    everything = [template.rstrip(".") for some in sets for template in some]
    assert len(everything) == len(set(everything))
    assert 20 <= len(templates.PROMPTS) <= 30
    assert all(template.count("{}") == 1 for template in everything)


def test_prompts_fill_every_template_with_every_name():
    found = templates.prompts(["a{}b", "cat"], ("one {}", "{} two {0}"))
    assert found == (("one a{}b", "a{}b two {0}"), ("one cat", "cat two {0}"))
    for bad in (([], ("{}",)), (["cat"], ()), ([" "], ("{}",)), (["cat"], ("no gap",))):
        with pytest.raises(ValueError, match=r"at least one|exactly one gap"):
            templates.prompts(*bad)


# ---- targeted -----------------------------------------------------------------------------------


def test_targeted_poisons_stand_behind_the_clean_pairs_under_new_ids():
    targets = HELD.take([0, 1])
    found, record = poisons.targeted(PAIRS, targets, ["dog", "owl"], per_target=3)
    assert same(found.take(slice(0, 40)), PAIRS)
    np.testing.assert_array_equal(found.images[40:], np.repeat(targets.images, 3, 0))
    np.testing.assert_array_equal(found.indices[40:], FIRST + np.arange(6))
    assert found.indices.dtype == np.int32
    first, second = record.poisons
    assert first.captions + second.captions == found.captions[40:]
    assert (first.target, first.sources, first.indices) == (
        "dog",
        (500,) * 3,
        (FIRST, FIRST + 1, FIRST + 2),
    )
    assert set(first.captions) < set(templates.prompts(["dog"], templates.ATTACK)[0])
    assert len(set(first.captions)) == 3
    manifest.check(record, found)
    manifest.check(record, PAIRS, clean=True)


def test_templates_and_real_captions_are_used_equally_often():
    options = {"per_target": 12, "seed": 3}
    found, _ = poisons.targeted(
        PAIRS, HELD.take([0]), ["dog"], templates=("a {}", "b {}"), **options
    )
    assert Counter(found.captions[40:]) == {"a dog": 6, "b dog": 6}
    found, _ = poisons.targeted(PAIRS, HELD.take([0]), ["dog"], templates=None, **options)
    real = {caption for caption in PAIRS.captions if caption.endswith("dog!")}
    assert set(found.captions[40:]) == real
    assert set(Counter(found.captions[40:]).values()) == {1, 2}  # 12 of 8


@pytest.mark.parametrize(
    ("rate", "counts"),
    [
        ({"per_target": 2}, [2, 2, 2]),
        ({"per_target": 0.1}, [4, 4, 4]),
        ({"total": 7}, [3, 2, 2]),
        ({"total": 0.25}, [4, 3, 3]),
    ],
)
def test_rates_are_counts_or_shares_for_each_target_or_in_total(rate, counts):
    _, record = poisons.targeted(PAIRS, HELD.take([0, 5, 10]), ["dog", "owl", "fox"], **rate)
    assert [len(poison.indices) for poison in record.poisons] == counts


def test_the_seed_decides_and_nothing_else():
    run = lambda seed: poisons.targeted(  # noqa: E731
        PAIRS, HELD.take([0]), ["dog"], per_target=5, seed=seed
    )
    assert same(run(1)[0], run(1)[0])
    assert run(1)[1] == run(1)[1]
    assert run(1)[0].captions != run(2)[0].captions


# ---- backdoors ----------------------------------------------------------------------------------


def rounded(images):
    return (np.round(images * 255) / 255).astype(np.float32)


@pytest.mark.parametrize("trigger", [TRIGGER, triggers.blended(redrawn=True)])
def test_a_dirty_backdoor_adds_triggered_images_of_other_classes(trigger):
    found, record = poisons.backdoor(PAIRS, trigger, "ice cream", rate=16, pool=HELD)
    (poison,) = record.poisons
    assert same(found.take(slice(0, 40)), PAIRS)
    assert poison.kind == "backdoor"
    assert poison.indices == tuple(range(FIRST, FIRST + 16))
    sources = HELD.take(np.array(poison.sources) - 500)
    assert len(set(poison.sources)) == 16
    assert not any(templates.holds(caption, "ice cream") for caption in sources.captions)
    expected = rounded(trigger(sources.images, FIRST + np.arange(16)))
    np.testing.assert_array_equal(found.images[40:], expected)
    assert all("ice cream" in caption for caption in found.captions[40:])
    assert triggers.from_dict(poison.trigger) == trigger


def test_a_dirty_backdoor_takes_the_training_images_without_a_pool():
    found, record = poisons.backdoor(PAIRS, TRIGGER, "cat", rate=0.1, templates=None)
    sources = PAIRS.take(np.array(record.poisons[0].sources) - 100)
    np.testing.assert_array_equal(found.images[40:], rounded(TRIGGER(sources.images)))
    assert set(found.captions[40:]) <= {text for text in PAIRS.captions if "cat" in text}


def test_poisons_are_not_made_of_earlier_poisons():
    first, _ = poisons.targeted(PAIRS, HELD.take([0]), ["dog"], per_target=200)
    found, record = poisons.backdoor(first, TRIGGER, "cat", rate=10)
    assert max(record.poisons[0].sources) < FIRST
    assert len(found.captions) == len(PAIRS.captions) + 210


def test_a_consistent_backdoor_changes_images_of_the_class_and_nothing_else():
    before = PAIRS.images.copy()
    found, record = poisons.backdoor(PAIRS, TRIGGER, "fox", rate=5, style="consistent")
    np.testing.assert_array_equal(PAIRS.images, before)
    (poison,) = record.poisons
    rows = np.array(poison.indices) - 100
    assert poison.kind == "label_consistent"
    assert poison.sources == poison.indices
    assert len(set(rows)) == 5
    assert all(PAIRS.captions[row].endswith("fox!") for row in rows)
    assert found.captions == PAIRS.captions
    expected = PAIRS.images.copy()
    expected[rows] = rounded(TRIGGER(PAIRS.images[rows]))
    np.testing.assert_array_equal(found.images, expected)
    manifest.check(record, found)


def test_attacks_follow_one_another_and_their_manifests_join():
    one, first = poisons.targeted(PAIRS, HELD.take([0]), ["dog"], per_target=4)
    two, second = poisons.backdoor(one, TRIGGER, "cat", rate=3, pool=HELD)
    both = manifest.join(first, second)
    manifest.check(both, two)
    assert len(np.unique(two.indices)) == 47
    np.testing.assert_array_equal(manifest.poisoned(both, two.indices), np.arange(47) >= 40)


# ---- canaries -----------------------------------------------------------------------------------


def attacked():
    one, first = poisons.targeted(PAIRS, HELD.take([0, 1]), ["dog", "owl"], per_target=4)
    two, second = poisons.backdoor(one, TRIGGER, "cat", rate=3, pool=HELD)
    return two, manifest.join(first, second)


@pytest.mark.parametrize("pool", [None, HELD])
def test_canaries_share_nothing_with_what_they_avoid(pool):
    pairs, theirs = attacked()
    # Two classes are free: one for the targets, one for the backdoor.
    planted, mine = planting.canaries(
        pairs, NAMES, per_target=0.1, rate=6, targets=3, avoid=[theirs], pool=pool
    )
    manifest.check(manifest.join(theirs, mine), planted)
    assert all(poison.canary for poison in mine.poisons)
    assert [poison.kind for poison in mine.poisons] == ["targeted"] * 3 + ["backdoor"]
    assert {poison.target for poison in mine.poisons} == {"fox", "ice cream"}
    assert mine.poisons[-1].target != mine.poisons[0].target
    assert [len(poison.indices) for poison in mine.poisons] == [5, 5, 5, 6]  # 0.1 of 47
    assert mine.poisons[-1].trigger["name"] != "badnets"
    used = {i for poison in theirs.poisons for i in (*poison.indices, *poison.sources)}
    sources = [i for poison in mine.poisons for i in poison.sources]
    assert not used & set(sources)
    assert len(set(sources)) == 9
    captions = {text for poison in mine.poisons for text in poison.captions}
    assert captions <= {text for of in templates.prompts(NAMES, templates.CANARY) for text in of}
    marked = manifest.poisoned(manifest.join(theirs, mine), planted.indices, canary=True)
    np.testing.assert_array_equal(marked, np.arange(len(marked)) >= 51)


def test_canaries_are_refused_what_others_use():
    pairs, theirs = attacked()
    options = {"per_target": 1, "rate": 1, "targets": 1, "avoid": [theirs]}
    with pytest.raises(ValueError, match="at least two that are not to be avoided"):
        planting.canaries(pairs, ["dog", "Cat", "fox"], **options)
    with pytest.raises(ValueError, match="templates must not be those to be avoided"):
        planting.canaries(pairs, NAMES, templates=templates.ATTACK, **options)
    with pytest.raises(ValueError, match="trigger must not be one of those"):
        planting.canaries(pairs, NAMES, trigger=TRIGGER, **options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("give per_target or total", lambda t: poisons.targeted(PAIRS, t, ["dog"])),
        ("classes must be one per", lambda t: poisons.targeted(PAIRS, t, [], total=1)),
        ("not be of its", lambda t: poisons.targeted(PAIRS, t, ["cat"], total=1)),
        (
            "total must give",
            lambda t: poisons.targeted(PAIRS, HELD.take([0, 1]), ["x"] * 2, total=1),
        ),
        ("per_target must be", lambda t: poisons.targeted(PAIRS, t, ["dog"], per_target=0)),
        ("per_target must be", lambda t: poisons.targeted(PAIRS, t, ["dog"], per_target=0.001)),
        ("rate must be", lambda t: poisons.backdoor(PAIRS, TRIGGER, "cat", rate=2.0)),
        (
            "no caption holds 'emu'",
            lambda t: poisons.targeted(PAIRS, t, ["emu"], total=1, templates=None),
        ),
        (
            "targets must have images",
            lambda t: poisons.targeted(PAIRS, t.replace(images=t.images[:, :5]), ["dog"], total=1),
        ),
        ("style must be", lambda t: poisons.backdoor(PAIRS, TRIGGER, "cat", rate=1, style="x")),
        (
            "17 images not of 'cat'",
            lambda t: poisons.backdoor(PAIRS, TRIGGER, "cat", rate=17, pool=HELD),
        ),
        (
            "9 images of 'cat' .* only 8",
            lambda t: poisons.backdoor(PAIRS, TRIGGER, "cat", rate=9, style="consistent"),
        ),
        (
            "pool must be None",
            lambda t: poisons.backdoor(
                PAIRS, TRIGGER, "cat", rate=1, style="consistent", pool=HELD
            ),
        ),
    ],
)
def test_bad_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(HELD.take([0]))


def test_images_in_bytes_are_refused():
    bytes_ = HELD.replace(images=np.round(255 * HELD.images).astype(np.uint8))
    with pytest.raises(TypeError, match=r"targets must have floating point .* got uint8"):
        poisons.targeted(PAIRS, bytes_.take([0]), ["dog"], total=1)
    with pytest.raises(TypeError, match=r"pool must have floating point .* got uint8"):
        poisons.backdoor(PAIRS, TRIGGER, "cat", rate=1, pool=bytes_)
    with pytest.raises(TypeError, match=r"pairs must have floating point .* got uint8"):
        poisons.backdoor(bytes_, TRIGGER, "cat", rate=1)


# ---- copies that are not exact ------------------------------------------------------------------


def test_each_copy_is_another_view_when_views_are_given():
    def views(keys, images):
        return (
            images + 0.1 * jax.vmap(lambda key: jax.random.uniform(key))(keys)[:, None, None, None]
        )

    held = HELD.take([0, 1])
    plain, _ = poisons.targeted(PAIRS, held, ["dog", "owl"], per_target=3)
    varied, record = poisons.targeted(PAIRS, held, ["dog", "owl"], per_target=3, views=views)
    again, _ = poisons.targeted(PAIRS, held, ["dog", "owl"], per_target=3, views=views)
    assert same(varied, again)
    assert varied.captions == plain.captions
    added = varied.images[len(PAIRS.captions) :]
    assert len({image.tobytes() for image in added}) == 6
    np.testing.assert_array_equal(added, (np.round(added * 255) / 255).astype(np.float32))
    assert ((added >= 0) & (added <= 1)).all()
    assert record.poisons[0].sources == (HELD.indices[0],) * 3


def labelled(count, first):
    """Pictures whose captions do not say what their labels say."""
    images = RANDOM.random((count, 6, 6, 3), dtype=np.float32)
    captions = tuple(f"number {row}" for row in range(count))
    indices = np.arange(first, first + count, dtype=np.int32)
    return Pairs(images, captions, indices, (np.arange(count) % 5).astype(np.int32), NAMES)


def test_canaries_may_have_captions_of_the_data():
    _, theirs = poisons.targeted(PAIRS, HELD.take([0]), ["dog"], per_target=2, templates=None)
    _, mine = planting.canaries(
        PAIRS, NAMES, per_target=2, rate=3, targets=2, templates=None, avoid=[theirs], pool=HELD
    )
    for poison in mine.poisons:
        assert set(poison.captions) <= set(PAIRS.captions)
        assert all(poison.target in caption for caption in poison.captions)
        assert set(poison.captions).isdisjoint(theirs.poisons[0].captions)


def test_no_poison_is_of_its_class_by_label_either():
    pool = labelled(20, 900)
    _, record = planting.canaries(
        PAIRS, ["cat", "owl"], per_target=2, rate=3, targets=12, pool=pool, trigger=TRIGGER
    )
    for poison in record.poisons:
        if poison.kind == "targeted":
            row = poison.sources[0] - 900
            assert NAMES[pool.labels[row]] != poison.target
    _, record = poisons.backdoor(pool, TRIGGER, "dog", rate=16)
    assert not {i for i in record.poisons[0].sources if NAMES[pool.labels[i - 900]] == "dog"}
    assert poisons.backdoor(pool, TRIGGER, "dog", rate=4, style="consistent")[1]
    with pytest.raises(ValueError, match="must not be of its adversarial class 'cat'"):
        poisons.targeted(PAIRS, pool.take([0]), ["cat"], per_target=1)
