"""Torch files read without torch, and published residual nets converted and compared with torch."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.checkpoint import CheckpointError
from jaxrobust.models.convert import ARCHITECTURES, convert, load, read_torch
from jaxrobust.models.robustbench import CIFAR, checkpoints, published

GOLDENS = Path(__file__).parent / "goldens"
# Float32 sums of up to 576 terms in another order, through up to ten layers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
FORMATS = ("zip", "legacy")
# Every case writes its own file into the one folder; a busy machine is no failure.
FAST = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def checkpoint(kind):
    return (GOLDENS / f"torch_{kind}.pt").read_bytes()


def expected_arrays():
    with np.load(GOLDENS / "torch_arrays.npz") as file:
        return dict(file)


def as_zip(pickled, compression=zipfile.ZIP_STORED, **records):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def as_legacy(pickled):
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(x, 2) for x in head) + pickled + pickle.dumps([], 2)


def read_bytes(folder, data, **options):
    (folder / "file").write_bytes(data)
    return read_torch(folder / "file", **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_both_torch_formats_give_every_array_bit_for_bit(kind):
    expected = expected_arrays()
    found = read_torch(GOLDENS / f"torch_{kind}.pt")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == (jax.numpy.bfloat16 if name == "bfloat16" else array.dtype)
        np.testing.assert_array_equal(found[name].astype(array.dtype), array, err_msg=name)


def test_a_safetensors_file_gives_the_same_arrays(tmp_path):
    expected = expected_arrays()
    # Its writer takes an array's bytes as they lie.
    rows = {f"module.{k}": np.array(a, order="C") for k, a in expected.items()}
    save_file(rows, tmp_path / "w.safetensors")
    found = read_torch(tmp_path / "w.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_key_of_a_safetensors_file_is_what_its_names_begin_with(tmp_path):
    one, two = np.float32([1, 2]), np.float32([3])
    save_file({"model.a": one, "ema.a": two, "emanate": one}, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read_torch(tmp_path / "w.safetensors", "ema")["a"], two)
    with pytest.raises(CheckpointError, match=r"key must be what names .* begin with, got 'other'"):
        read_torch(tmp_path / "w.safetensors", "other")


class Evil:
    """What a hostile file holds: unpickling it would call `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


WRAPPED = {"plain": lambda x: x, "zip": as_zip, "legacy": as_legacy}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_by_name_and_does_not_run(tmp_path, protocol, wrap):
    trace = tmp_path / "ran"
    hostile = {"state_dict": collections.OrderedDict(a=Evil(os.system, f"touch {trace}"))}
    data = pickle.dumps(hostile, protocol)
    pickle.loads(data)
    assert trace.exists(), "the pickle is not hostile: the test would prove nothing"
    trace.unlink()
    with pytest.raises(CheckpointError, match=rf"file: refused: {os.system.__module__}\.system"):
        read_bytes(tmp_path, WRAPPED[wrap](data))
    assert not trace.exists()


def test_any_name_but_the_few_known_is_refused(tmp_path):
    for value in (Evil(eval, "1"), Evil(getattr, 1, "real"), len, np.float64(1), CheckpointError):
        with pytest.raises(CheckpointError, match=r"refused: \w+\.[\w.]+ \(only tensors"):
            read_bytes(tmp_path, as_zip(pickle.dumps({"state_dict": value}, 2)))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cposix\nsystem\n.", "posix.system"),
        (b"(S'true'\nios\nsystem\n.", "opcode"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
        (b"ctorch\nFloatStorage\n)\x81.", "opcode NEWOBJ"),
        (b"K\x01)R.", "a call of int"),
        (b"]}b.", "attributes of a list"),
        (b"ccollections\nOrderedDict\n}b.", "attributes of a Named"),
        (b"}))s.", "an item of a dict"),
        (b"U\x01aQ.", "persistent id"),
        (b"}K\x01a.", "appending to a dict"),
        (b"}(K\x01u.", "zip"),
        (b"h\x05.", "damaged"),
        (b"t.", "damaged"),
        (b".", "damaged"),
        (b"}", "no end|exhausted"),
    ],
)
def test_a_pickle_may_hold_plain_data_only(tmp_path, program, message):
    with pytest.raises(CheckpointError, match=message):
        read_bytes(tmp_path, as_zip(b"\x80\x02" + program))


def tensor_program(numel, offset, shape, strides, kind="FloatStorage"):
    """A state dict {"a": tensor} as torch writes it, of any numbers."""
    out = b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storage"
    out += b"ctorch\n" + kind.encode() + b"\nU\x010U\x03cpu" + pickle.dumps(numel, 2)[2:-1] + b"tQ"
    for number in (offset, shape, strides):
        # Without a memo, since this is a piece of a longer program.
        out += (
            b"".join((b"(", *map(integer, number), b"t"))
            if isinstance(number, tuple)
            else (integer(number))
        )
    return out + b"\x89}tRs."


def integer(number):
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def test_the_tensor_program_of_these_tests_is_a_good_one(tmp_path):
    numbers = np.arange(6, dtype="<f4")
    data = as_zip(tensor_program(6, 1, (2, 2), (1, 2)), **{"data/0": numbers.tobytes()})
    np.testing.assert_array_equal(read_bytes(tmp_path, data)["a"], [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((6, 0, (7,), (1,)), "in 6 numbers"),
        ((6, 3, (2, 2), (2, 1)), "in 6 numbers"),
        ((6, -1, (2,), (1,)), "no counts"),
        ((6, 4, (2,), (-1,)), "no counts"),
        ((6, 0, (1 << 40,), (0,)), "in 6 numbers"),
        ((6, 0, (2,), (1, 1)), "wrong shape"),
        ((7, 0, (2,), (1,)), "has 24 bytes"),
        ((-6, 0, (0,), (1,)), "persistent id"),
        ((6, 0, (2,), (1,), "QInt8Storage"), "refused: torch.QInt8Storage"),
    ],
)
def test_a_tensor_stays_inside_its_storage(tmp_path, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        read_bytes(tmp_path, as_zip(tensor_program(*tensor), **{"data/0": b"\0" * 24}))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, kind):
    whole = checkpoint(kind)
    for size in (0, 1, 2, 3, *range(9, len(whole), 41), len(whole) - 1):
        with pytest.raises(CheckpointError, match="file: "):
            read_bytes(tmp_path, whole[:size])


@pytest.mark.parametrize("kind", FORMATS)
@settings(FAST, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, kind, data):
    changed = bytearray(checkpoint(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_bytes(tmp_path, bytes(changed))
    except CheckpointError:
        return
    assert all(isinstance(a, np.ndarray) for a in found.values())


@settings(FAST, max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_and_nothing_else(tmp_path, program):
    for data in (program, b"\x80\x02" + program, as_zip(program)):
        with pytest.raises(CheckpointError):
            read_bytes(tmp_path, data)


def test_a_damaged_length_sets_no_memory_aside(tmp_path):
    longer = b"\x80\x02\x96" + (2**62).to_bytes(8, "little") + b"abc."
    with pytest.raises(CheckpointError, match="only 4 remain"):
        read_bytes(tmp_path, longer)


def test_a_list_cannot_be_copied_again_and_again(tmp_path):
    # One list of 200 sizes, remembered, and handed to a function as often as two bytes can.
    sizes = b"](" + b"K\x01" * 200 + b"eq\x00"
    program = b"\x80\x02" + sizes + b"h\x00\x85ccollections\nOrderedDict\nq\x010"
    for function in (b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"):
        pair = b"](]q\x02(K\x01K\x02eh\x02" + b"h\x02" * 400 + b"eq\x00"
        program = b"\x80\x02" + (sizes if b"Size" in function else pair)
        program += b"0" + (function + b"h\x00\x85R0") * 2000 + b"N."
        with pytest.raises(CheckpointError, match=r"refused: more values|a tensor's shape"):
            read_bytes(tmp_path, as_zip(program))


def test_foreign_files_are_named(tmp_path):
    cases = {
        b"": "found 0 bytes",
        b"\x89PNG\r\n\x1a\n": "begin with b'.x89PNG",
        b"PK\x05\x06" + b"\0" * 18: "without one data.pkl",
        pickle.dumps({"a": 1}): "a pickle of another kind",
        as_zip(pickle.dumps([1, 2], 2)): "expected a state dict: found a list",
        as_zip(pickle.dumps({"epoch": 1}, 2)): "found a dict of 1: epoch",
        as_zip(b"", byteorder=b"big"): "big-endian",
        as_zip(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED): "compressed record data.pkl",
        b"\x10\0\0\0\0\0\0\0{bad": "safetensors",
    }
    for data, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            read_bytes(tmp_path, data)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_torch(tmp_path / "absent")


def nested(path):
    """The tensor program with dicts around it: torch's own way to store {"last": {...}}."""
    inner = tensor_program(2, 0, (2,), (1,))[2:-1]
    for name in reversed(path):
        inner = b"}U" + bytes([len(name)]) + name.encode() + inner + b"s"
    return b"\x80\x02" + inner + b"."


@pytest.mark.parametrize(
    "path", [(), ("state_dict",), ("model",), ("net",), ("last", "state_dict")]
)
def test_the_state_dict_is_found_under_the_usual_names(tmp_path, path):
    data = as_zip(nested(path), **{"data/0": b"\0" * 8})
    assert read_bytes(tmp_path, data).keys() == {"a"}
    assert read_bytes(tmp_path, data, key=".".join(path) or None).keys() == {"a"}


def test_a_state_dict_elsewhere_needs_its_key(tmp_path):
    data = as_zip(nested(("ema", "shadow")), **{"data/0": b"\0" * 8})
    assert read_bytes(tmp_path, data, key="ema.shadow").keys() == {"a"}
    for key in (None, "shadow", "ema.none"):
        with pytest.raises(CheckpointError, match=r"found a dict of 1: (ema|shadow)"):
            read_bytes(tmp_path, data, key=key)


def test_two_state_dicts_are_a_question(tmp_path):
    data = as_zip(pickle.dumps({"last": {}, "best": {}}, 2))
    with pytest.raises(CheckpointError, match="key must be one of last, best"):
        read_bytes(tmp_path, data)


def golden(name):
    with np.load(GOLDENS / f"model_{name}.npz") as file:
        arrays = {key: np.asarray(file[key], np.float32) for key in file.files}
    # Weights are stored as int8, in units of 1 / 64.
    weights = {k.removeprefix("weight:"): a / 64 for k, a in arrays.items() if k[:7] == "weight:"}
    return weights, arrays


def deepmind_names(state):
    """Our preact golden's names as DeepMind's nets have them."""
    pairs = [("conv1.", "conv_2d_1."), ("conv2.", "conv_2d_2."), ("shortcut.0.", "shortcut.")]
    pairs += [("bn1.", "batchnorm_0."), ("bn2.", "batchnorm_1.")]
    pairs += [(f"layer{i}.", f"layer_{i - 1}.") for i in (1, 2)]
    out = {}
    for name, array in state.items():
        if name.startswith("layer"):
            for ours, theirs in pairs:
                name = name.replace(ours, theirs)
        else:
            name = name.replace("conv1", "conv_2d").replace("bn", "batchnorm")
        out[name.replace("linear", "logits")] = array
    return out


SMALL = {
    "wide": ("wide_resnet_28_10", {"depth": 10, "width": 1}),
    "dm_wide": ("dm_wide_resnet_28_10_silu", {"depth": 10, "width": 1}),
    "preact_robustbench": ("preact_resnet_18", {"stages": (1, 2), "widths": (8, 16)}),
    "preact_awp": ("preact_resnet_18_v2", {"stages": (1, 2), "widths": (8, 16)}),
    "preact_deepmind": (
        "dm_preact_resnet_18_silu",
        {"stages": (1, 2), "widths": (8, 16), "mean": (0.0,), "std": (1.0,)},
    ),
}


def our_tap(name, tap):
    """DeepMind's name of a layer as ours; the other families have ours."""
    known = {"init_conv": "conv1", "batchnorm": "bn1", "layer.1.block.0.conv_0": "block2.0.conv1"}
    known |= {f"layer.{i}.block.0": f"block{i + 1}.0" for i in range(3)}
    return known[tap] if name == "dm_wide" else tap


@pytest.mark.parametrize("name", SMALL)
def test_a_loaded_net_equals_torch_layer_by_layer(tmp_path, name):
    state, arrays = golden(name)
    state = deepmind_names(state) if name == "preact_deepmind" else state
    extra = {"sub_block1.layer.0.bn1.bias": np.ones(3), "bn1.num_batches_tracked": np.int64([7])}
    save_file({f"module.{k}": a for k, a in {**state, **extra}.items()}, tmp_path / "w")
    model, variables = load(tmp_path / "w", SMALL[name][0], **SMALL[name][1])
    taps = {our_tap(name, k.removeprefix("tap:")): a for k, a in arrays.items() if k[:4] == "tap:"}
    apply = jax.jit(model.apply, static_argnames="taps")
    logits, found = apply(variables, arrays["x"], taps=tuple(taps))
    for tap, expected in taps.items():
        expected = expected.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found[tap][:1], expected, **TOLERANCE, err_msg=tap)
    np.testing.assert_allclose(logits, arrays["logits"], **TOLERANCE)


def test_mean_and_std_come_from_the_file_then_from_the_architecture(tmp_path):
    state, _ = golden("wide")
    small = {"depth": 10, "width": 1}
    save_file(state, tmp_path / "plain")
    assert load(tmp_path / "plain", "wide_resnet_34_10", **small)[0].config["mean"] == [0.0]
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.2])
    normalised = {**state, "mu": mean.reshape(1, 3, 1, 1), "sigma": std.reshape(1, 3, 1, 1)}
    save_file(normalised, tmp_path / "normalised")
    config = load(tmp_path / "normalised", "wide_resnet_34_10", **small)[0].config
    np.testing.assert_allclose((config["mean"], config["std"]), (mean, std), atol=1e-7)
    given = {"mean": (0.5,), "std": (0.5,)}
    config = load(tmp_path / "normalised", "wide_resnet_34_10", **small, **given)[0].config
    assert (config["mean"], config["std"]) == ([0.5], [0.5])
    with pytest.raises(CheckpointError, match="normalised by"):
        convert(normalised, models.wide_resnet(10, 1, norm="batch"))


@pytest.mark.parametrize("classes", [10, 100, 7])
def test_deepmind_nets_take_the_constants_of_their_data(tmp_path, classes):
    state, _ = golden("dm_wide")
    state["logits.weight"] = np.ones((classes, 64), np.float32)
    state["logits.bias"] = np.ones(classes, np.float32)
    save_file(state, tmp_path / "w")
    if classes not in CIFAR:
        with pytest.raises(ValueError, match=r"mean and std must be given .* of 7 classes"):
            load(tmp_path / "w", "dm_wide_resnet_28_10_silu", depth=10, width=1)
        return
    model, _ = load(tmp_path / "w", "dm_wide_resnet_28_10_silu", depth=10, width=1)
    assert model.config["classes"] == classes
    assert (tuple(model.config["mean"]), tuple(model.config["std"])) == CIFAR[classes]


def test_missing_surplus_and_misshapen_entries_are_all_named():
    state, _ = golden("wide")
    del state["block2.layer.0.bn1.bias"]
    state["extra.weight"] = np.ones((2, 2), np.float32)
    state["fc.weight"] = state["fc.weight"][:, :5]
    with pytest.raises(CheckpointError) as error:
        convert(state, models.wide_resnet(10, 1, norm="batch"), path="w.pt")
    for part in (
        "w.pt",
        "missing (1): block2.0.bn1.bias [16]",
        "unexpected (1): extra.weight [2, 2]",
        "different (1): fc.kernel is [5, 10], expected [64, 10]",
    ):
        assert part in str(error.value)


def test_two_names_of_one_entry_are_an_error():
    state, _ = golden("preact_awp")
    state["layer2.0.shortcut.weight"] = state["layer2.0.shortcut.0.weight"]
    with pytest.raises(CheckpointError, match=r"shortcut\.0\.weight and .* are the same entry"):
        convert(state, models.preact_resnet(stages=(1, 2), widths=(8, 16), norm="batch"))


def test_weights_are_refused_where_only_their_shapes_would_fit(tmp_path):
    state, _ = golden("dm_wide")
    save_file(state, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"init_conv\.weight.*'padding': 'SAME'"):
        load(tmp_path / "w", "wide_resnet_28_10", depth=10, width=1)
    save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"found 1 arrays: a\.weight"):
        load(tmp_path / "w", "wide_resnet_28_10")
    with pytest.raises(ValueError, match=r"architecture must be one of .*, got 'resnet'"):
        load(tmp_path / "w", "resnet")


# Counted on RobustBench's own classes.
PARAMETERS = {
    "wide_resnet_28_10": 36_479_194,
    "dm_wide_resnet_34_10_relu": 46_160_474,
    "dm_wide_resnet_70_16_silu": 266_796_506,
    "preact_resnet_18": 11_171_146,
    "preact_resnet_18_v2": 11_172_170,
    "dm_preact_resnet_18_silu": 12_548_426,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_sized_architectures_have_the_published_number_of_parameters(name):
    factory, options, _ = ARCHITECTURES[name]
    init = factory(**options).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), (32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]


def test_every_checkpoint_of_the_table_has_an_architecture_and_a_normalisation():
    names = [name for name, _ in checkpoints()]
    assert len(names) == len(set(names)) == 118
    for name in names:
        architecture, normalisation = published(name)
        assert architecture in ARCHITECTURES
        assert normalisation.keys() == {"mean", "std"}


def test_a_checkpoint_goes_by_its_published_name(tmp_path):
    mean, std = CIFAR[10]
    assert published("cifar10/Linf/Carmon2019Unlabeled") == (
        "wide_resnet_28_10",
        {"mean": (0.0,), "std": (1.0,)},
    )
    assert published("cifar10/L2/Rice2020Overfitting")[0] == "preact_resnet_18_v2"
    save_file(golden("wide")[0], tmp_path / "w")
    name = "cifar10/Linf/Rice2020Overfitting"
    assert published(name) == ("wide_resnet_34_20", {"mean": mean, "std": std})
    config = load(tmp_path / "w", name, depth=10, width=1)[0].config
    assert (tuple(config["mean"]), tuple(config["std"])) == (mean, std)
    with pytest.raises(ValueError, match=r"alike: cifar10/L2/Rice2020Overfitting, cifar10/Linf"):
        load(tmp_path / "w", "cifar10/L1/Rice2020Overfitting")
