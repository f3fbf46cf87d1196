"""Tokenizers: what a row holds, any caption at all, CLIP's own ids, files."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrobust.data import tokens
from jaxrobust.data.tokens import Tokenizer, bpe_tokenizer, clip_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "clip_tokens.json").read_text())
CAPTIONS = (
    *("a red apple", "a green apple", "the red car", "a car on the road", "grüne Äpfel"),
    *("two red cars", "an apple tree", "the green tree on the road"),
) * 3
STRANGE = (
    "",
    "   ",
    "!!!",
    "2019",
    "中文字",
    "🍎",
    "👩‍👩‍👧",
    "\x00",
    "\ud800",
    "&#xd800;",
    "مرحبا",
    "e\u0301",
)
TRAINED = bpe_tokenizer(CAPTIONS, vocabulary=300, length=16)


def merges_file(folder, lines=None, name="merges.txt.gz"):
    path = folder / name
    text = "\n".join(["#version", *(GOLDEN["merges"] if lines is None else lines)])
    path.write_bytes(gzip.compress(text.encode()))
    return path


def json_file(folder, *, specials=(tokens.START, tokens.END), **added):
    """A tokenizer.json as Hugging Face's CLIP models have, of the golden vocabulary."""
    own = clip_tokenizer(merges_file(folder), length=16)
    content = json.loads(own.definition)
    for name in specials:
        content["model"]["vocab"][name] = len(content["model"]["vocab"])
    content["added_tokens"] = [
        {"id": content["model"]["vocab"][name], "content": name, "special": True, "lstrip": False,
         "rstrip": False, "single_word": False, "normalized": False}
        for name in specials
    ]  # fmt: skip
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**content, **added}))
    return path


def decoded(tokenizer, row):
    """The text of a row, by hand: letters of the ids between start and end, back to bytes."""
    names = {i: name for name, i in json.loads(tokenizer.definition)["model"]["vocab"].items()}
    letters = {
        letter: byte for byte, letter in zip(_byte_order(), tokens.byte_letters(), strict=True)
    }
    inside = row[1 : list(row).index(tokenizer.end)]
    return bytes(letters[c] for i in inside for c in names[int(i)]).decode()


def _byte_order():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*shown, *(byte for byte in range(256) if byte not in shown)]


def test_a_row_is_start_text_end_and_zeros():
    rows = TRAINED(["a red apple", ""])
    assert rows.shape == (2, 16)
    assert rows.dtype == np.int32
    assert rows[0, 0] == TRAINED.start == TRAINED.vocabulary - 2
    end = list(rows[0]).index(TRAINED.end)
    assert end == 1 + len(["a", " red", " apple"])
    assert TRAINED.end == TRAINED.vocabulary - 1 == rows.max()
    assert (rows[0, 1:end] > 0).all()
    assert not rows[0, end + 1 :].any()
    np.testing.assert_array_equal(rows[1], [TRAINED.start, TRAINED.end, *(0,) * 14])


def test_a_text_that_is_too_long_keeps_its_end():
    rows = TRAINED(["a red apple " * 20, "a red apple"])
    assert rows[0, -1] == TRAINED.end
    assert list(rows[0]).count(TRAINED.end) == 1
    # Cutting changes nothing before the cut.
    np.testing.assert_array_equal(rows[0, :4], rows[1, :4])


def test_no_captions_give_no_rows():
    assert TRAINED([]).shape == (0, 16)


@pytest.mark.parametrize("caption", STRANGE)
def test_a_strange_caption_is_a_text_too(caption):
    row = bpe_tokenizer(CAPTIONS, vocabulary=300, length=64)([caption])[0]
    assert decoded(TRAINED, row).strip() == tokens.clean(caption)


@given(st.text(st.characters(exclude_categories=()), max_size=12))
def test_any_text_survives_the_way_to_ids_and_back(caption):
    long = Tokenizer(TRAINED.definition, 128, TRAINED.start, TRAINED.end)
    row = long([caption])[0]
    assert decoded(long, row).removeprefix(" ") == tokens.clean(caption)
    assert (row == long.end).sum() == 1
    assert (row == long.start).sum() == 1


def test_control_tokens_in_a_caption_are_text(tmp_path):
    caption = f"red {tokens.END} apple <|padding|> {tokens.START}"
    for tokenizer in (
        Tokenizer(TRAINED.definition, 99, TRAINED.start, TRAINED.end),
        clip_tokenizer(merges_file(tmp_path), length=99),
        clip_tokenizer(json_file(tmp_path), length=99),
    ):
        row = tokenizer([caption])[0]
        end = row.argmax()
        assert end > 20
        assert (row[1:end] < tokenizer.start).all()
        assert not row[end + 1 :].any()
        assert (row[1:end] > 0).all() or tokenizer.start > 500  # id 0 is "!" in CLIP's


def test_spaces_case_and_looks_do_not_matter():
    same = TRAINED(["A  Red\n apple", "a red apple ", "\uff41 red apple", "a r&#101;d apple"])
    np.testing.assert_array_equal(same, same[:1].repeat(4, 0))
    two = TRAINED(["hotdog", "hot dog"])
    assert (two[0] != two[1]).any()


def test_training_does_not_depend_on_order_process_or_threads():
    shuffled = list(CAPTIONS)
    random.Random(1).shuffle(shuffled)
    assert bpe_tokenizer(shuffled, vocabulary=300, length=16) == TRAINED
    code = (
        "import sys; from jaxrobust.data.tokens import bpe_tokenizer as b;"
        f"t = b({list(CAPTIONS)!r}, vocabulary=300, length=16);"
        "sys.stdout.buffer.write(t.definition.encode())"
    )
    for threads in ("1", "4"):
        env = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PATH": ""}
        other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
        assert other.stdout.decode() == TRAINED.definition, other.stderr.decode()


def test_the_vocabulary_is_at_most_what_was_asked_for():
    assert bpe_tokenizer(CAPTIONS, vocabulary=270).vocabulary == 270
    assert bpe_tokenizer(CAPTIONS, vocabulary=10_000).vocabulary < 400
    least = bpe_tokenizer([], vocabulary=259, length=8)
    assert least.vocabulary == 259
    assert decoded(least, least(["🍎"])[0]) == " 🍎"


def test_frequent_words_become_one_token():
    rows = bpe_tokenizer(CAPTIONS, vocabulary=320, length=16)(["the red apple"])
    assert list(rows[0]).index(rows.max()) == 4


@pytest.mark.parametrize("kind", [merges_file, json_file])
def test_clips_own_files_give_clips_own_ids(kind, tmp_path):
    tokenizer = clip_tokenizer(kind(tmp_path), length=16)
    expected = np.array(GOLDEN["ids"])
    assert tokenizer.vocabulary == 512 + len(GOLDEN["merges"]) + 2 == expected.max() + 1
    np.testing.assert_array_equal(tokenizer(GOLDEN["captions"]), expected)


def test_a_plain_text_of_merges_is_read_too(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("\n".join(["#version", *GOLDEN["merges"], ""]))
    assert clip_tokenizer(path) == clip_tokenizer(merges_file(tmp_path))


def test_only_the_merges_that_clip_uses_are_read(tmp_path):
    lines = [f"{'a' * (i // 250 + 1)} {'b' * (i % 250 + 1)}" for i in range(49_000)]
    assert len(tokens._read_merges(merges_file(tmp_path, lines))) == 48_894


@pytest.mark.parametrize("make", [lambda p: TRAINED, lambda p: clip_tokenizer(merges_file(p))])
def test_a_saved_tokenizer_comes_back_equal(make, tmp_path):
    tokenizer = make(tmp_path)
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "deep" / "tokenizer.json")
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    np.testing.assert_array_equal(again(CAPTIONS), tokenizer(CAPTIONS))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]


def saved(folder, **changes):
    TRAINED.save(folder / "t.json")
    content = json.loads((folder / "t.json").read_text())
    (folder / "t.json").write_text(json.dumps({**content, **changes}))
    return folder / "t.json"


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("got the string 'a cat'", lambda p: TRAINED("a cat")),
        (r"captions\[1\] must be a string, got None", lambda p: TRAINED(["a", None])),
        (r"captions\[0\] must be a string, got nan", lambda p: bpe_tokenizer([float("nan")])),
        ("got the string", lambda p: bpe_tokenizer("a cat")),
        ("vocabulary must be >= 259, got 258", lambda p: bpe_tokenizer([], vocabulary=258)),
        ("length must be an integer >= 3, got 2", lambda p: bpe_tokenizer([], length=2)),
        ("length must be", lambda p: clip_tokenizer(merges_file(p), length=1)),
        ("no list of merges", lambda p: clip_tokenizer(merges_file(p, ["a b c"]))),
        ("no list of merges", lambda p: clip_tokenizer(merges_file(p, []))),
        ("merges.txt.gz: ", lambda p: clip_tokenizer(merges_file(p, ["nowhere b"]))),
        ("no gzipped text", lambda p: clip_tokenizer(cut(merges_file(p)))),
        ("no JSON", lambda p: clip_tokenizer(cut(json_file(p)))),
        ("no tokenizer.json", lambda p: clip_tokenizer(json_file(p, model={}))),
        ("no <|startoftext|> and", lambda p: clip_tokenizer(other_json(p))),
        ("must be the last of the ids", lambda p: clip_tokenizer(swapped(p))),
        ("no tokenizer that", lambda p: Tokenizer.load(saved(p, format="other"))),
        ("a damaged tokenizer", lambda p: Tokenizer.load(saved(p, length="long"))),
        ("a damaged tokenizer", lambda p: Tokenizer.load(saved(p, definition={"model": 1}))),
        ("a damaged tokenizer", lambda p: Tokenizer.load(saved(p, more=1))),
        ("no JSON", lambda p: Tokenizer.load(cut(saved(p)))),
        ("must hold one JSON object", lambda p: Tokenizer.load(listed(p))),
    ],
)  # fmt: skip
def test_what_is_no_caption_or_no_vocabulary_is_named(message, call, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])
    return path


def other_json(folder):
    return json_file(folder, specials=())


def swapped(folder):
    return json_file(folder, specials=(tokens.END, tokens.START))


def listed(folder):
    (folder / "list.json").write_text("[]")
    return folder / "list.json"


@pytest.mark.parametrize("read", [Tokenizer.load, clip_tokenizer])
def test_a_missing_file_is_missing(read, tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.txt.gz")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        bpe_tokenizer(["a"])
