"""Writes the goldens of test_towers.py: tiny ViTs by timm and OpenCLIP themselves.

    pip install timm==1.0.31 open_clip_torch==3.3.0
    python tests/goldens/make_tower_goldens.py

Every file holds a state dict (int8, in units of 1 / 64), an input in [0, 1] and the output on the
normalised input. DINOv2's names are timm's but for the registers; its class token is given a
position of its own, as its own code does.
"""

from pathlib import Path

import numpy as np
import open_clip.transformer
import timm.models.vision_transformer
import torch

HERE = Path(__file__).parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def towers():
    """(name, model, mean, std)"""
    timm_vit = timm.models.vision_transformer.VisionTransformer
    yield "timm", timm_vit(**SIZE, mlp_ratio=2, num_classes=5), MEAN, STD
    dino = {"init_values": 1e-5, "num_classes": 0, "mlp_ratio": 2}
    yield "dinov2", timm_vit(**SIZE, **dino), MEAN, STD
    registers = {"reg_tokens": 3, "no_embed_class": True}
    yield "registers", timm_vit(**SIZE, **dino, **registers), MEAN, STD
    clip = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=6,
        act_layer=open_clip.transformer.QuickGELU,
    )  # fmt: skip
    yield "clip", clip, CLIP_MEAN, CLIP_STD


def main():
    """Draws weights in units of 1 / 64, so that they are stored exactly, and runs each tower."""
    for number, (name, model, mean, std) in enumerate(towers()):
        generator = torch.Generator().manual_seed(number)
        state = {}
        for key, value in model.state_dict().items():
            drawn = torch.randint(-32, 33, value.shape, generator=generator)
            near_one = "norm" in key or ".ln_" in key or "ln_p" in key
            state[key] = (drawn + (64 if near_one and key.endswith("weight") else 0)) / 64
        model.load_state_dict(state)
        x = torch.rand((2, 3, 16, 16), generator=generator)
        shape = (1, 3, 1, 1)
        normalised = (x - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
        with torch.no_grad():
            out = model.eval()(normalised)
        if name == "registers":  # DINOv2's own name
            state["register_tokens"] = state.pop("reg_token")
        arrays = {
            f"weight:{key}": (64 * value).round().to(torch.int16).numpy()
            for key, value in state.items()
        }
        np.savez_compressed(
            HERE / f"tower_{name}.npz", x=x.permute(0, 2, 3, 1).numpy(), out=out.numpy(), **arrays
        )


if __name__ == "__main__":
    main()
