"""The same networks and attacks in PyTorch, by hand, as a fair opponent for the benchmarks.

Weights come from our variables, so both sides compute the same function. Inputs of the modules are
NCHW. Attacks freeze the parameters, so that no time is lost on their gradients. Nothing here is put
on an accelerator: to import it where JAX has one is an error.
"""

import itertools

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if jax.default_backend() != "cpu":
    raise ImportError(f"the PyTorch twins run on the CPU, JAX here on a {jax.default_backend()}")


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SmallCNN(nn.Module):
    """Twin of `models.small_cnn`."""

    def __init__(self, config: dict, params: dict, image: tuple[int, int, int]):
        super().__init__()
        size, channels = image[0], image[2]
        self.convs, self.pads = nn.ModuleList(), []
        for width, stride in zip(config["channels"], config["strides"], strict=True):
            self.convs.append(nn.Conv2d(channels, width, config["kernel"], stride))
            self.pads.append(_same(size, config["kernel"], stride) * 2)
            size, channels = -(-size // stride), width
        widths = [size * size * channels, *config["dense"], config["classes"]]
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        with torch.no_grad():
            for i, conv in enumerate(self.convs, 1):
                _copy(conv, params[f"conv{i}"])
            names = [f"fc{i + 1}" for i in range(len(config["dense"]))] + ["logits"]
            for name, layer in zip(names, self.dense, strict=True):
                _copy(layer, params[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of NCHW images."""
        for conv, pad in zip(self.convs, self.pads, strict=True):
            x = F.relu(conv(F.pad(x, pad)))
        x = x.permute(0, 2, 3, 1).flatten(1)  # our order of pixels and channels
        for layer in self.dense[:-1]:
            x = F.relu(layer(x))
        return self.dense[-1](x)


class Block(nn.Module):
    """Twin of `models.resnet.PreActBlock` with BatchNorm."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One residual block."""
        active = F.relu(self.bn1(x))
        x = self.shortcut(active) if hasattr(self, "shortcut") else x
        return x + self.conv2(F.relu(self.bn2(self.conv1(active))))


class ResNet(nn.Module):
    """Twin of `models.preact_resnet` and `models.wide_resnet` with BatchNorm."""

    def __init__(self, variables: dict, *, stages: list, names: tuple[str, str, str]):
        super().__init__()
        stage_name, norm_name, linear_name = names
        params, stats = variables["params"], variables["batch_stats"]
        stem = np.asarray(params["conv1"]["kernel"])
        self.conv1 = nn.Conv2d(stem.shape[2], stem.shape[3], 3, 1, 1, bias=False)
        blocks, c_in = [], stem.shape[3]
        for i, (count, width) in enumerate(stages):
            for j in range(count):
                blocks.append((f"{stage_name}{i + 1}", str(j), c_in, width, 1 + (i > 0 and j == 0)))
                c_in = width
        self.blocks = nn.Sequential(
            *(Block(*shape) for *_, a, b, s in blocks for shape in [(a, b, s)])
        )
        self.bn, self.linear = nn.BatchNorm2d(c_in), nn.Linear(c_in, 10)
        with torch.no_grad():
            _copy(self.conv1, params["conv1"])
            _copy(self.bn, params[norm_name], stats[norm_name])
            _copy(self.linear, params[linear_name])
            for block, (stage, number, *_) in zip(self.blocks, blocks, strict=True):
                for name, layer in block.named_children():
                    _copy(layer, params[stage][number][name], stats[stage][number].get(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of NCHW images."""
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def twin(config: dict, variables: dict, image: tuple[int, int, int]) -> nn.Module:
    """The PyTorch network that computes what our model computes, in inference mode.

    Args:
        config: `Model.config` of a small_cnn, or a preact_resnet or wide_resnet with BatchNorm.
        variables: our parameters.
        image: (h, w, c).
    """
    if config["name"] == "small_cnn":
        net = SmallCNN(config, variables["params"], image)
    elif config["name"] == "preact_resnet":
        stages = list(zip(config["stages"], config["widths"], strict=True))
        net = ResNet(variables, stages=stages, names=("layer", "bn", "linear"))
    else:
        count, width = (config["depth"] - 4) // 6, config["width"]
        stages = [(count, factor * width) for factor in (16, 32, 64)]
        net = ResNet(variables, stages=stages, names=("block", "bn1", "fc"))
    return net.eval().to(memory_format=torch.channels_last)


def _copy(layer: nn.Module, params: dict, stats: dict | None = None) -> None:
    """Our kernel, bias, scale, mean and var into a layer of PyTorch's."""
    if isinstance(layer, nn.BatchNorm2d):
        layer.weight.copy_(_tensor(params["scale"]))
        layer.running_mean.copy_(_tensor(stats["mean"]))
        layer.running_var.copy_(_tensor(stats["var"]))
    else:
        kernel = np.asarray(params["kernel"])
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        layer.weight.copy_(_tensor(kernel.transpose(order)))
    if "bias" in params:
        layer.bias.copy_(_tensor(params["bias"]))


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def nchw(images: np.ndarray) -> torch.Tensor:
    """NHWC images as the tensor that the twins take."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=torch.channels_last)


def linf_pgd(net, x, y, start, *, eps: float, step_size: float, steps: int) -> torch.Tensor:
    """PGD by hand: input gradients only, everything in place where that is allowed."""
    x_adv = (x + start).clamp_(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y, reduction="sum"), x_adv)
        with torch.no_grad():
            x_adv = x_adv + step_size * grad.sign()
            x_adv = torch.max(torch.min(x_adv, x + eps), x - eps).clamp_(0, 1)
    return x_adv.detach()


def freeze(net: nn.Module) -> nn.Module:
    """Inference mode, and no gradients of the parameters."""
    return net.eval().requires_grad_(False)


def train_step(net, optimizer, x, y, start, *, eps: float, step_size: float, steps: int) -> float:
    """One step of PGD adversarial training: frozen attack in eval mode, update in train mode."""
    freeze(net)
    x_adv = linf_pgd(net, x, y, start, eps=eps, step_size=step_size, steps=steps)
    net.train().requires_grad_(True)
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(x_adv), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
