"""Writes the goldens of tests/test_model_parity.py: tiny nets written by hand in PyTorch.

    python tests/goldens/make_model_goldens.py

Names and layouts are those of the published state dicts (RobustBench, TRADES). Every file holds the
weights (int8, in units of 1 / 64), an input, the outputs of some submodules in
inference mode, and the logits and running statistics of one call in training mode. Written with
torch 2.13 on CPU; another version changes the last digits only.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride, *, act, from_input, kernel, same, shortcut_name):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.stride, self.act, self.from_input, self.same = stride, act, from_input, same
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 0, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut_name = shortcut_name if stride != 1 or c_in != c_out else None
        if self.shortcut_name:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, 0, bias=False)
            setattr(
                self,
                shortcut_name,
                conv if shortcut_name == "convShortcut" else nn.Sequential(conv),
            )
        self.shortcut_pad = kernel > 1

    def pad(self, x):
        # TensorFlow's SAME on an even side: nothing before, one after, where the stride is 2.
        return F.pad(x, (0, 1, 0, 1) if self.same and self.stride == 2 else (1, 1, 1, 1))

    def forward(self, x):
        active = self.act(self.bn1(x))
        shortcut = x
        if self.shortcut_name:
            source = x if self.from_input else active
            source = self.pad(source) if self.shortcut_pad else source
            shortcut = getattr(self, self.shortcut_name)(source)
        return shortcut + self.conv2(self.act(self.bn2(self.conv1(self.pad(active)))))


class PreAct(nn.Module):
    def __init__(self, *, act, final_norm, **block):
        super().__init__()
        self.act, self.final_norm = act, final_norm
        block = {**block, "act": act, "shortcut_name": "shortcut"}
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(Block(8, 8, 1, **block))
        self.layer2 = nn.Sequential(Block(8, 16, 2, **block), Block(16, 16, 1, **block))
        if final_norm:
            self.bn = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.conv1(x)))
        x = self.act(self.bn(x)) if self.final_norm else x
        return self.linear(x.mean((2, 3)))


class Stage(nn.Module):
    def __init__(self, *args, **block):
        super().__init__()
        self.layer = nn.Sequential(Block(*args, **block))

    def forward(self, x):
        return self.layer(x)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        block = {"act": F.relu, "from_input": False, "kernel": 1, "same": False}
        block["shortcut_name"] = "convShortcut"
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(16, 16, 1, **block)
        self.block2 = Stage(16, 32, 2, **block)
        self.block3 = Stage(32, 64, 2, **block)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class Transformer(nn.Module):
    """PyTorch's own encoder layer, so that attention is not written twice by the same hand."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 16)) for n in (1, 10))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    16, 4, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.norm, self.head = nn.LayerNorm(16, 1e-6), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def randomise(net):
    """Weights on the scale of a trained net, whole multiples of 1 / 64 that fit in int8."""
    for name, value in net.state_dict().items():
        if "num_batches" in name:
            continue
        if value.ndim >= 2 and "embed" not in name.split(".")[-1]:
            new = torch.randn(value.shape) * (2.0 / value[0].numel()) ** 0.5
        elif name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            new = 0.5 + torch.rand(value.shape)
        else:
            new = 0.2 * torch.randn(value.shape)
        value.copy_((64 * new).round().clamp(-127, 127) / 64)


def recorder(out, key):
    def hook(_module, _inputs, output):
        out.setdefault(key, output[:1].numpy().copy())

    return hook


def write(name, net, taps):
    with torch.no_grad():
        randomise(net)
        x = torch.rand(4, 3, 12, 12).half().float()
        state = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
        out = {f"weight:{k}": (64 * v).numpy().astype(np.int8) for k, v in state.items()}
        out["x"] = x.permute(0, 2, 3, 1).numpy().astype(np.float16)
        modules = dict(net.named_modules())
        for tap in taps:
            modules[tap].register_forward_hook(recorder(out, f"tap:{tap}"))
        out["logits"] = net.eval()(x).numpy()
        out["train_logits"] = net.train()(x).numpy()
        for k, v in net.state_dict().items():
            if "running" in k:
                out[f"after:{k}"] = v.numpy()
    np.savez_compressed(HERE / f"model_{name}.npz", **out)


def main():
    torch.manual_seed(0)
    plain = {"from_input": False, "kernel": 1, "same": False}
    other = {"from_input": True, "kernel": 3, "same": True}
    layers = ("conv1", "layer1", "layer2.0.bn1", "layer2.0", "layer2")
    write("preact_awp", PreAct(act=F.relu, final_norm=True, **plain), layers)
    write("preact_deepmind", PreAct(act=F.silu, final_norm=True, **other), layers)
    unactivated = {**plain, "from_input": True}
    write("preact_robustbench", PreAct(act=F.relu, final_norm=False, **unactivated), layers)
    write("wide", Wide(), ("conv1", "block1", "block2", "block3", "bn1"))
    write("vit", Transformer(), ("blocks.0", "blocks.1", "norm"))


if __name__ == "__main__":
    main()
