"""Writes the goldens of test_model_parity.py, test_convert.py and test_efficientnet.py.

Tiny nets written by hand in PyTorch, and a checkpoint in both formats of `torch.save`:

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


def same(x, kernel, stride):
    """TensorFlow's SAME: the smaller half of the padding goes before."""
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    return F.pad(x, (total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2)))


class DeepMindBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv_0 = nn.Conv2d(c_in, c_out, 3, stride, 0, bias=False)
        self.conv_1 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        active = F.silu(self.batchnorm_0(x))
        y = self.conv_0(same(active, 3, self.conv_0.stride[0]))
        y = self.conv_1(F.silu(self.batchnorm_1(y)))
        return y + (self.shortcut(active) if self.shortcut else x)


class DeepMindStage(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.block = nn.Sequential(DeepMindBlock(*args))

    def forward(self, x):
        return self.block(x)


class DeepMindWide(nn.Module):
    def __init__(self):
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        sizes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.layer = nn.Sequential(*(DeepMindStage(*size) for size in sizes))
        self.batchnorm, self.logits = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x):
        mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]])
        x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        x = self.layer(self.init_conv(x))
        return self.logits(F.silu(self.batchnorm(x)).mean((2, 3)))


def batch_norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Inverted(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride, expansion):
        super().__init__()
        wide, self.expansion = c_in * expansion, expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(c_in, wide, 1, bias=False)
            self._bn0 = batch_norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1, self._bn2 = batch_norm(wide), batch_norm(c_out)
        self._project_conv = nn.Conv2d(wide, c_out, 1, bias=False)
        self.skips = stride == 1 and c_in == c_out

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expansion > 1 else x
        conv = self._depthwise_conv
        y = F.relu6(self._bn1(conv(same(y, conv.kernel_size[0], conv.stride[0]))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 8, 3, 2, bias=False), batch_norm(8)
        sizes = ((8, 8, 3, 1, 1), (8, 12, 5, 2, 6), (12, 12, 5, 1, 6), (12, 16, 3, 2, 6))
        self._blocks = nn.Sequential(*(Inverted(*size) for size in sizes))
        self._conv_head, self._bn1 = nn.Conv2d(16, 24, 1, bias=False), batch_norm(24)
        self._fc = nn.Linear(24, 10)

    def forward(self, x):
        x = (255 * x - 127) / 128
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(same(x, 3, 2)))))
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def write_checkpoint():
    """All that a training script saves beside the weights, in both formats."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net[2](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    state |= {
        "module.view": base[6:12].view(2, 3),
        "module.transposed": base.view(4, 6).T,
        "module.half": base[:4].half(),
        "module.bfloat16": base[:4].bfloat16(),
        "module.double": base[:3].double(),
        "module.int32": torch.tensor([-1, 2], dtype=torch.int32),
        "module.bool": torch.tensor([True, False]),
        "module.scalar": torch.tensor(2.5),
        "module.empty": torch.zeros(0, 3),
        "module.parameter": nn.Parameter(base[:2].clone()),
    }
    whole = {"epoch": 3, "arch": "tiny", "best": 0.5, "state_dict": state}
    whole |= {
        "optimizer": optimizer.state_dict(),
        "shape": base.shape,
        "none": [None, (1, 2, 3, 4)],
    }
    torch.save(whole, HERE / "torch_zip.pt")
    torch.save(whole, HERE / "torch_legacy.pt", _use_new_zipfile_serialization=False)
    arrays = {k.removeprefix("module."): v.detach() for k, v in state.items()}
    arrays["bfloat16"] = arrays["bfloat16"].float()
    np.savez_compressed(HERE / "torch_arrays.npz", **{k: v.numpy() for k, v in arrays.items()})


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
    blocks = tuple(f"layer.{i}.block.0" for i in range(3))
    write("dm_wide", DeepMindWide(), ("init_conv", "layer.1.block.0.conv_0", *blocks, "batchnorm"))
    blocks = tuple(f"_blocks.{i}" for i in range(4))
    layers = ("_conv_stem", "_blocks.1._depthwise_conv", "_blocks.1._bn1", *blocks, "_conv_head")
    write("efficientnet", EfficientNetLite(), (*layers, "_bn1"))
    write_checkpoint()


if __name__ == "__main__":
    main()
