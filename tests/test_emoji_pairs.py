"""Emoji with captions: splits, captions, backgrounds, labels, other styles and languages."""

import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from jaxrobust.data import emoji_pairs
from jaxrobust.data.emoji_pairs import TEMPLATES, emoji_labels, load_emoji_pairs


@pytest.fixture(scope="module")
def table():
    return emoji_pairs.emoji_table()


@pytest.fixture(scope="module")
def parts():
    return {split: load_emoji_pairs(split, size=16) for split in emoji_pairs.SPLITS}


def pictures_of(pairs):
    return set((pairs.indices // 16).tolist())


def test_every_picture_is_in_one_split_with_every_caption(parts, table):
    plain = {one.number for one in table if not one.tones}
    assert len(plain) == 1898
    found = [pictures_of(part) for part in parts.values()]
    assert set.union(*found) == plain
    assert sum(map(len, found)) == len(plain)
    for part in parts.values():
        assert len(part.captions) == len(TEMPLATES) * len(pictures_of(part))
        assert len(set(part.indices.tolist())) == len(part.indices)
    shares = np.array([len(one) for one in found]) / len(plain)
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)


def test_no_drawing_is_on_two_sides_of_a_split(parts, table):
    """Of families and of pixels: flags and silhouettes of families repeat under other codes."""
    groups = [
        {(table[n].group, table[n].family) for n in pictures_of(part)} for part in parts.values()
    ]
    assert len(set.union(*groups)) == sum(map(len, groups))
    white = load_emoji_pairs("train+validation+test", size=16, captions=1, background="white")
    side = {n: place for place, part in enumerate(parts.values()) for n in pictures_of(part)}
    sides = np.array([side[number] for number in white.indices // 16])
    flat = white.images.reshape(len(sides), -1)
    squares = (flat**2).sum(1)
    distance = (squares[:, None] + squares - 2 * flat @ flat.T) / flat.shape[1]
    # 1e-5 per value is below what eight bits can tell.
    close = np.argwhere((distance < 1e-5) & (sides[:, None] != sides))
    assert not [(white.captions[i], white.captions[j]) for i, j in close]


def test_labels_are_groups_subgroups_and_names(parts, table):
    test = parts["test"]
    assert len(test.class_names) == 9
    assert np.bincount(test.labels, minlength=9).min() >= 40
    for by, count in (("group", 9), ("subgroup", 99), ("name", 1897)):
        labels, class_names = emoji_labels(test.indices, by)
        assert len(class_names) == count
        assert list(class_names) == sorted(set(class_names))
        for index, label in list(zip(test.indices, labels, strict=True))[::97]:
            assert class_names[label] == getattr(table[index // 16], by)
    np.testing.assert_array_equal(emoji_labels(test.indices, "group")[0], test.labels)


def test_captions_are_the_templates_with_the_pictures_own_words(parts, table):
    train = parts["train"]
    each = len(train.captions) // len(TEMPLATES)
    for row in range(0, len(train.captions), 131):
        one, kind = table[train.indices[row] // 16], train.indices[row] % 16
        assert kind == row // each
        short = one.short_names[kind % len(one.short_names)]
        fields = {"name": one.name, "short": short, "group": one.group, "subgroup": one.subgroup}
        assert train.captions[row] == TEMPLATES[kind].format(**fields)
    assert not any(re.search(r"[A-Z_{}]", caption) for caption in train.captions)
    assert "a drawing of owl" in {c for part in parts.values() for c in part.captions}


def test_a_row_is_the_same_whatever_else_is_asked_for(parts):
    again = load_emoji_pairs("validation", size=16)
    assert again.captions == parts["validation"].captions
    np.testing.assert_array_equal(again.images, parts["validation"].images)
    train = parts["train"]
    both = load_emoji_pairs("train+test", size=16, captions=2, by="name")
    place = {index: row for row, index in enumerate(both.indices.tolist())}
    rows = [row for row in range(0, len(train.indices), 61) if train.indices[row] % 16 < 2]
    chosen = [place[train.indices[row]] for row in rows]
    np.testing.assert_array_equal(both.images[chosen], train.images[rows])
    assert [both.captions[i] for i in chosen] == [train.captions[i] for i in rows]
    assert len(pictures_of(both)) == len(pictures_of(train)) + len(pictures_of(parts["test"]))


def test_backgrounds_are_light_and_differ_from_row_to_row(parts):
    white = load_emoji_pairs("test", size=16, background="white")
    plain = parts["test"]
    assert plain.images.dtype == np.float32
    assert 0 <= plain.images.min() <= plain.images.max() <= 1
    # Corners that nothing is drawn on.
    empty = (white.images[:, 0, 0] == 1).all(-1)
    colours = plain.images[empty, 0, 0]
    assert empty.mean() > 0.5
    assert colours.min() >= 0.5
    assert len(np.unique(colours, axis=0)) == len(colours)
    # White shines through at least as brightly as any colour, and nothing but background differs.
    assert (white.images >= plain.images - 1e-6).all()
    assert (white.images == plain.images).all(-1).mean() > 0.2


def test_skin_tones_stay_with_their_base_and_are_told_in_the_caption(parts, table):
    toned = load_emoji_pairs("test", size=8, captions=1, skin_tones=True)
    plain = pictures_of(parts["test"])
    assert plain < pictures_of(toned)
    families = {(table[n].group, table[n].family) for n in plain}
    for index, caption in zip(toned.indices, toned.captions, strict=True):
        one = table[index // 16]
        assert (one.group, one.family) in families
        assert caption.endswith("skin tone") == bool(one.tones)
    two = next(one for one in table if one.tones == ("light", "dark"))
    assert emoji_pairs.caption_of(two, "{name}", 0, {}).endswith(" with light and dark skin tone")


@pytest.fixture
def style(tmp_path, table):
    """Squares named as other vendors name their files; one emoji in ten is there."""
    folder = tmp_path / "style"
    folder.mkdir()
    for one in table[:1898]:
        if one.number % 10 == 0:
            picture = Image.new("RGBA", (20, 20), (one.number % 256, one.number // 256, 77, 255))
            picture.save(folder / f"emoji_u{one.code.replace('-', '_')}.png")
    return folder


def test_another_style_has_the_same_splits_and_says_what_it_lacks(style, parts, caplog):
    with caplog.at_level(logging.WARNING, "jaxrobust.data"):
        drawn = load_emoji_pairs("test", size=16, styles=[style])
    expected = {number for number in pictures_of(parts["test"]) if number % 10 == 0}
    assert pictures_of(drawn) == expected
    lacking = len(pictures_of(parts["test"])) - len(expected)
    assert f"lacks {lacking} of {len(expected) + lacking} emoji" in caplog.text
    numbers = drawn.indices // 16
    colours = np.stack([numbers % 256, numbers // 256, np.full_like(numbers, 77)], -1) / 255
    np.testing.assert_allclose(drawn.images[:, 8, 8], colours, atol=1e-6)
    both = load_emoji_pairs("test", size=16, captions=1, styles=["twemoji", style])
    assert len(both.indices) == len(set(both.indices.tolist())) == lacking + 2 * len(expected)


def test_labels_and_tags_of_another_language_become_captions(tmp_path, caplog, parts, table):
    file = tmp_path / "data.json"
    one = table[parts["validation"].indices[0] // 16]
    skin = {"hexcode": "1F3C4-1F3FB", "label": "surfende Person: helle Hautfarbe"}
    entries = [
        {"hexcode": one.code.upper(), "label": "Eule", "tags": ["Vogel", "weise"]},
        {"hexcode": "1F3C4", "label": "surfende Person", "skins": [skin]},
    ]
    file.write_text(json.dumps(entries))
    with caplog.at_level(logging.WARNING, "jaxrobust.data"):
        pairs = load_emoji_pairs("validation", size=8, annotations=file)
    short = one.short_names[7 % len(one.short_names)]
    assert {"Eule", "Eule: Vogel, weise", f"{short}, Vogel, weise"} <= set(pairs.captions)
    count = len(pictures_of(pairs))
    assert len(pairs.captions) == 8 * count
    # Without a label of its own an emoji has its name instead.
    other = table[pairs.indices[1] // 16]
    assert f"{other.name}: {other.subgroup}" in pairs.captions
    assert f"has no labels for {count - 1} emoji" in caplog.text
    notes = emoji_pairs.read_annotations(file)
    assert notes["1f3c4-1f3fb"] == ("surfende Person: helle Hautfarbe", ())
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"must be a data\.json of emojibase-data"):
        load_emoji_pairs(annotations=file)


def test_other_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(emoji_pairs, "EMOJI_PAIRS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"emoji pairs: SHA-256 is .*, expected 000"):
        load_emoji_pairs("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train+dev"}, r"split must be a sum of .* got 'train\+dev' with 'dev'"),
        ({"size": 0}, "size must be >= 1 pixel, got 0"),
        ({"captions": 6}, r"captions must be in \[1, 5\], got 6"),
        ({"by": "colour"}, "by must be one of .* got 'colour'"),
        ({"background": "black"}, "background must be one of .* got 'black'"),
        ({"styles": []}, "styles must name at least one"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_emoji_pairs(**options)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="styles: no pictures"):
        load_emoji_pairs("test", styles=[tmp_path])
