"""Image-text tables of every layout, their bad rows, and pairs read from them as needed."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from jaxrobust.data.batching import batches
from jaxrobust.data.decoding import decode_image, is_readable
from jaxrobust.data.pair_faults import FAULTS
from jaxrobust.data.pairs import Pairs, load_pairs, pair_source
from tests.test_data_archives import jpeg


def png(side, seed):
    image = np.random.default_rng(seed).integers(0, 256, (side, side + 2, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five images in a sub-folder, one that is cut off and one that is no image."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(10 + number, number))
    whole = jpeg(np.random.default_rng(9).integers(0, 256, (64, 64, 3), np.uint8))
    (tmp_path / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "text.png").write_bytes(b"not an image")
    return tmp_path


def expected(folder, number, size):
    return decode_image((folder / "images" / f"{number}.png").read_bytes(), 3, size) / np.float32(
        255
    )


def write_tsv(folder, rows, heading=("filepath", "title")):
    path = folder / "train.tsv"
    path.write_text("\n".join("\t".join(row) for row in (heading, *rows)) + "\n")
    return path


GOOD = [(f"images/{number}.png", f"picture {number}") for number in range(5)]
BAD = [
    ("images/0.png", "   ", "caption empty"),
    ("images/1.png", "NaN", "caption missing"),
    ("images/9.png", "nobody is here", "image missing"),
    ("images/cut.jpg", "half a picture", "image corrupt"),
    ("images/text.png", "no picture", "image corrupt"),
    ("images/2.png", " picture 2", "duplicate row"),
    ("", "no path", "image missing"),
]


def assert_is_good(pairs, folder, numbers=range(5), size=8):
    assert pairs.captions == tuple(f"picture {number}" for number in numbers)
    for image, number in zip(pairs.images, numbers, strict=True):
        np.testing.assert_array_equal(image, expected(folder, number, size))


def test_a_table_is_read_in_every_layout(folder):
    paths = {"tsv": write_tsv(folder, GOOD)}
    paths["csv"] = folder / "a.csv"
    lines = [f'7,"{caption}",{image}' for image, caption in GOOD]
    paths["csv"].write_text("\ufeffid,Caption,Image\n" + "\n".join(lines))
    records = [{"image": image, "text": caption} for image, caption in GOOD]
    paths["jsonl"] = folder / "a.jsonl"
    paths["jsonl"].write_text("\n".join(map(json.dumps, records)) + "\n\n")
    paths["json"] = folder / "a.json"
    paths["json"].write_text(json.dumps(records))
    for path in paths.values():
        pairs, counts = load_pairs(path, size=8)
        assert_is_good(pairs, folder)
        np.testing.assert_array_equal(pairs.indices, np.arange(5))
        assert pairs.indices.dtype == np.int32
        assert counts == {"rows": 5, "kept": 5, **dict.fromkeys(FAULTS, 0)}


def test_columns_and_root_can_be_named(folder, tmp_path):
    rows = [(str(number), f"{number}.png", f"picture {number}") for number in range(5)]
    path = write_tsv(folder, rows, heading=("title", "where", "what"))
    options = {"image_column": "where", "caption_column": "what", "root": folder / "images"}
    assert_is_good(load_pairs(path, size=8, **options)[0], folder)
    with pytest.raises(ValueError, match=r"no image column 'image' or .*only \['title', 'where'"):
        load_pairs(path)
    with pytest.raises(ValueError, match=r"no caption column 'missing'.*give caption_column="):
        load_pairs(path, image_column="where", caption_column="missing")


def test_bad_rows_are_counted_by_kind_and_said_in_one_line(folder, caplog):
    rows = [(image, caption) for image, caption, _ in BAD]
    path = write_tsv(folder, [*GOOD[:3], *rows, ("images/3.png",), *GOOD[3:]])
    with caplog.at_level(logging.INFO, "jaxrobust.data"):
        pairs, counts = load_pairs(path, size=8)
    assert_is_good(pairs, folder)
    assert pairs.indices.tolist() == [0, 1, 2, 11, 12]
    found = {"row malformed": 1}
    for _, _, kind in BAD:
        found[kind] = found.get(kind, 0) + 1
    assert counts == {"rows": 13, "kept": 5, **dict.fromkeys(FAULTS, 0), **found}
    assert sum(counts[fault] for fault in FAULTS) == 8
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "5 of 13 pairs kept" in record.message
    assert "image corrupt 2 (row 6 images/cut.jpg, row 7 images/text.png)" in record.message


@pytest.mark.parametrize(("image", "caption", "kind"), BAD)
def test_any_bad_row_raises_when_asked_to(folder, image, caption, kind):
    path = write_tsv(folder, [*GOOD, (image, caption)])
    with pytest.raises(ValueError, match=rf"5 of 6 pairs kept; {kind} 1 \(row 5"):
        pair_source(path, size=8, on_bad="raise")


def test_captions_without_letters_are_kept(folder):
    path = write_tsv(folder, [("images/0.png", "2019"), ("images/1.png", "!!!")])
    assert load_pairs(path, size=8, on_bad="raise")[0].captions == ("2019", "!!!")


def test_captions_of_json_may_be_anything_and_broken_lines_are_counted(folder):
    path = folder / "a.jsonl"
    lines = ['{"image": "images/0.png", "caption": NaN}', '{"image": "images/0.png"}', "{broken"]
    lines += ['{"image": "images/0.png", "caption": 5}', '{"image": 3, "caption": "three"}', "[1]"]
    lines += ['{"image": "images/0.png", "caption": "picture 0"}']
    path.write_text("\n".join(lines))
    pairs, counts = load_pairs(path, size=8)
    assert_is_good(pairs, folder, [0])
    kinds = {"caption missing": 2, "row malformed": 2, "caption not a text": 1, "image missing": 1}
    assert counts == {"rows": 7, "kept": 1, **dict.fromkeys(FAULTS, 0), **kinds}


@pytest.mark.parametrize("last", ['a "b"', "b"])
def test_a_lone_quote_cannot_swallow_rows(folder, last):
    path = write_tsv(folder, [GOOD[0], ("images/1.png", '"open'), ("images/2.png", last)])
    with pytest.raises(ValueError, match=r"train\.tsv, line \d: .*; give quoted=False"):
        pair_source(path, size=8)
    captions = load_pairs(path, size=8, quoted=False)[0].captions
    assert captions == ("picture 0", '"open', last)


def test_a_table_without_a_good_row_is_refused(folder):
    with pytest.raises(ValueError, match="0 of 1 pairs kept; image missing 1"):
        pair_source(write_tsv(folder, [("images/7.png", "seven")]), size=8)


@pytest.mark.parametrize("verify", [True, False])
def test_a_name_that_no_file_can_have_is_a_missing_image(folder, verify):
    path = folder / "odd.jsonl"
    rows = [("images/\0.png", "odd"), ("images/0.png", "picture 0")]
    path.write_text("\n".join(json.dumps({"image": i, "caption": c}) for i, c in rows))
    counts = pair_source(path, size=8, verify=verify).counts
    assert (counts["kept"], counts["image missing"]) == (1, 1)


def test_visual_genomes_regions_become_captions(folder):
    for name, number in (("VG_100K", 0), ("VG_100K_2", 1)):
        (folder / name).mkdir()
        (folder / name / f"{number}.jpg").write_bytes(
            (folder / "images" / f"{number}.png").read_bytes()
        )
    phrases = [f"phrase {i}" for i in range(7)]
    records = [
        {"id": 0, "regions": [{"phrase": text} for text in ["a", " a ", "", "b"]]},
        {"regions": [{"image_id": 1, "phrase": text} for text in phrases]},
        {"id": 2, "regions": [{"phrase": "the image is not there"}]},
        {"id": 3, "regions": []},
        {"regions": []},
        {"id": 4, "regions": ["no region"]},
        {"id": -1, "regions": [{"phrase": "a number that no picture has"}]},
    ]
    path = folder / "region_descriptions.json"
    path.write_text(json.dumps(records))
    pairs, counts = load_pairs(path, size=8, phrases=5)
    assert pairs.captions[0] == "a; b"
    chosen = pairs.captions[1].split("; ")
    assert len(set(chosen)) == 5
    assert chosen == sorted(chosen)
    assert set(chosen) < set(phrases)
    assert load_pairs(path, size=8)[0].captions == pairs.captions
    others = {load_pairs(path, size=8, seed=seed)[0].captions[1] for seed in range(5)}
    assert len(others) > 1
    np.testing.assert_array_equal(pairs.images[1], expected(folder, 1, 8))
    kinds = {"image missing": 1, "caption missing": 1, "row malformed": 3}
    assert counts == {"rows": 7, "kept": 2, **dict.fromkeys(FAULTS, 0), **kinds}


def test_a_source_gives_rows_shards_and_batches(folder):
    source = pair_source(write_tsv(folder, GOOD), size=8)
    assert len(source) == 5
    assert_is_good(source.take([3, 1]), folder, [3, 1])
    shards = list(source.shards(2))
    assert [len(shard.captions) for shard in shards] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([s.indices for s in shards]), np.arange(5))
    assert_is_good(next(source.shards(2, start=1)), folder, [2, 3])
    for batch in batches(source.source, 2, seed=3):
        for image, row in zip(batch["image"], batch["label"], strict=True):
            np.testing.assert_array_equal(image, expected(folder, row, 8))
            assert source.captions[row] == f"picture {row}"


def test_without_verification_a_corrupt_image_is_named_when_it_is_taken(folder):
    path = write_tsv(folder, [*GOOD, ("images/cut.jpg", "half"), ("images/9.png", "gone")])
    source = pair_source(path, size=8, verify=False)
    assert (source.counts["kept"], source.counts["image missing"]) == (6, 1)
    with pytest.raises(ValueError, match=r"cannot read 1 of 2 images: .*cut\.jpg"):
        source.take([0, 5])


def test_pairs_are_taken_with_all_that_is_theirs():
    images = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    texts, ids = tuple("abcd"), np.arange(10, 14, dtype=np.int32)
    pairs = Pairs(images, texts, ids)
    labelled = pairs.replace(labels=ids % 2, class_names=("even", "odd"))
    for rows in (slice(1, 3), [1, 2], np.array([False, True, True, False])):
        part = labelled.take(rows)
        assert part.captions == ("b", "c")
        assert part.images.ravel().tolist() == [1, 2]
        assert part.indices.tolist() == [11, 12]
        assert part.labels.tolist() == [1, 0]
        assert part.class_names == ("even", "odd")
    assert pairs.take([0]).labels is None


def test_readable_means_to_the_end():
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert is_readable(whole)
    assert is_readable(png(8, 0))
    assert not is_readable(whole[: len(whole) * 3 // 4])
    assert not is_readable(png(8, 0)[:-40])
    assert not is_readable(b"")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad": "ignore"}, "on_bad must be 'skip' or 'raise', got 'ignore'"),
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"phrases": 0}, "phrases must be >= 1, got 0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write_tsv(folder, GOOD), **options)


def test_bad_shards_and_unknown_tables_are_refused(folder):
    source = pair_source(write_tsv(folder, GOOD), size=8)
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        source.shards(0)
    with pytest.raises(ValueError, match="start must be >= 0, got -1"):
        source.shards(1, start=-1)
    with pytest.raises(ValueError, match=r"path must end in one of \.tsv, .* got .*a\.parquet"):
        pair_source(folder / "a.parquet")
    with pytest.raises(FileNotFoundError):
        pair_source(folder / "nowhere.tsv")
    (folder / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of records, got a dict"):
        pair_source(folder / "a.json")
