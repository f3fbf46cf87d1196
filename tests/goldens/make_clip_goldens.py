"""Writes the goldens of test_clip_files.py and test_tokens.py: tiny CLIPs by OpenCLIP itself.

    pip install open_clip_torch==3.3.0
    python tests/goldens/make_clip_goldens.py

clip_vit.safetensors and clip_resnet.safetensors hold a state dict (half precision, which its
values fit exactly), and, under "golden.", an image in [0, 1], tokens, and the two embeddings.
clip_tokens.json holds a vocabulary's merges, captions, and the ids that OpenCLIP gives them.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

# Of torchvision only transforms of pictures and a frozen BatchNorm are used, neither of them here.
MISSING = (*("transforms", "transforms.functional", "ops", "ops.misc"),)
try:
    import torchvision  # noqa: F401
except ImportError:
    sys.modules["torchvision"] = mock.MagicMock()
    sys.modules |= {f"torchvision.{name}": mock.MagicMock() for name in MISSING}

import open_clip.model  # noqa: E402
import open_clip.tokenizer  # noqa: E402

HERE = Path(__file__).parent
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT = {"context_length": 9, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
MODELS = {
    "vit": ({"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}, 16),
    "resnet": ({"image_size": 64, "layers": [1, 2, 1, 1], "width": 2, "head_width": 8}, 64),
}
MERGES = ("t h", "th e</w>", "a p", "ap p", "p l", "pl e</w>", "app le</w>", "c a", "ca t</w>",
          "l e</w>", "Ã ©</w>", "ð Ł", "d o", "do g</w>", "Ġ a", "1 9</w>", "! !</w>")  # fmt: skip
CAPTIONS = (
    "the apple", "THE Cat's   apple\n dog", "", "   ", "!!!", "2019", "café", "中文 字",
    "🍎 an apple", "hotdog hot dog", "they'll say &amp;amp; don't", "the " * 20, "Ünïcödé",
    "naïve, co-operate_1st", "a\u00a0dog\u3000apple", "I'M here; it'S", "cafe\u0301",
    "don\u2019t \u201cquote\u201d", "\ufb01ne a\ufb04e", "\uff21\uff22\uff01",
    "th\x00e\ufeff cat\x1b", "\u0133s \u01c6ep",
)  # fmt: skip


def drawn(name, value, generator):
    """Multiples of 1 / 64 up to a half, so that half precision stores them exactly."""
    integers = torch.randint(-32, 33, value.shape, generator=generator)
    near_one = value.ndim == 1 and name.endswith((".weight", "running_var"))
    return (integers + (64 if near_one else 0)) / 64


def write_model(number, name, vision, size):
    model = open_clip.model.CLIP(6, vision, TEXT, quick_gelu=True)
    generator = torch.Generator().manual_seed(number)
    kept = {k: v for k, v in model.state_dict().items() if v.dtype == torch.float32}
    state = {k: drawn(k, v, generator) for k, v in kept.items()}
    model.load_state_dict({**model.state_dict(), **state})
    x = torch.randint(0, 256, (2, 3, size, size), generator=generator) / 256
    x[1, :, :, : size // 2] /= 8  # two pictures of noise alone would end in nearly one embedding
    tokens = torch.randint(1, 18, (3, 9), generator=generator)
    for row, end in enumerate((8, 4, 1)):
        tokens[row, end], tokens[row, end + 1 :] = 19, 0
    tokens[:, 0] = 18
    shape = (1, 3, 1, 1)
    normalised = (x - torch.tensor(CLIP_MEAN).reshape(shape)) / torch.tensor(CLIP_STD).reshape(
        shape
    )
    with torch.no_grad():
        model.eval()
        image = model.encode_image(normalised, normalize=True)
        text = model.encode_text(tokens, normalize=True)
    golden = {"x": x.permute(0, 2, 3, 1).contiguous().half(), "tokens": tokens.int()}
    golden |= {"image": image, "text": text}
    arrays = {k: v.half().contiguous() for k, v in state.items()}
    counts = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    save_file(
        {**arrays, **counts, **{f"golden.{k}": v for k, v in golden.items()}},
        HERE / f"clip_{name}.safetensors",
    )


def write_tokens():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(["#version", *MERGES]).encode()))
        tokenizer = open_clip.tokenizer.SimpleTokenizer(str(path))
        ids = tokenizer(list(CAPTIONS), context_length=16).tolist()
    content = {"merges": MERGES, "captions": CAPTIONS, "ids": ids}
    (HERE / "clip_tokens.json").write_text(json.dumps(content, indent=1))


def main():
    for number, (name, (vision, size)) in enumerate(MODELS.items()):
        write_model(number, name, vision, size)
    write_tokens()


if __name__ == "__main__":
    main()
