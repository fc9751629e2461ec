"""What the tests of names and loading share: small configurations, modules, and the way back to the original layout."""

from typing import Any

import torch
from torch import Tensor, nn

from consistory.config import TextConfig, UNetConfig, VAEConfig
from consistory.text import TextEncoder
from consistory.unet import UNet
from consistory.vae import VAE
from consistory.weights import names
from consistory.weights.names import SINGLE_FILE, Rename

Json = dict[str, Any]

DOWN, DOWN_ATTENDED = "DownBlock2D", "CrossAttnDownBlock2D"
UP, UP_ATTENDED = "UpBlock2D", "CrossAttnUpBlock2D"


def unet_config(widths: list[int], blocks: int, depths: list[int]) -> Json:
    """Depth 0: a level without attention."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 16,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": [DOWN_ATTENDED if depth else DOWN for depth in depths],
        "up_block_types": [UP_ATTENDED if depth else UP for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "attention_head_dim": [2] * len(widths),
        "cross_attention_dim": 12,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "class_embed_type": None,
    }


def vae_config(widths: list[int], blocks: int) -> Json:
    levels = len(widths)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(width: int, layers: int, projects: bool) -> Json:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "vocab_size": 50,
        "max_position_embeddings": 77,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "projection_dim": width,
        "bos_token_id": 48,
        "eos_token_id": 49,
    }


# SDXL's topology; then other numbers of levels, blocks and layers.
SMALL: dict[str, dict[str, Json]] = {
    "sdxl": {
        "unet": unet_config([8, 16, 24], 2, [0, 2, 3]),
        "vae": vae_config([8, 16, 24, 24], 2),
        "text_encoder": text_config(8, 2, False),
        "text_encoder_2": text_config(12, 3, True),
    },
    "two levels": {
        "unet": unet_config([8, 12], 1, [1, 2]),
        "vae": vae_config([8, 12], 1),
        "text_encoder": text_config(4, 1, False),
        "text_encoder_2": text_config(8, 1, True),
    },
    "five levels": {
        "unet": unet_config([4, 8, 8, 12, 12], 3, [0, 1, 0, 2, 1]),
        "vae": vae_config([4, 8, 8, 12, 12], 3),
        "text_encoder": text_config(4, 12, False),
        "text_encoder_2": text_config(4, 11, True),
    },
}


def build(component: str, config: Json) -> nn.Module:
    if component == "unet":
        return UNet(UNetConfig.from_json(config))
    if component == "vae":
        return VAE(VAEConfig.from_json(config))
    return TextEncoder(TextConfig.from_json(config))


def to_original(component: str, config: Json, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A component's state dict in the single-file layout: the table read backwards."""
    part = SINGLE_FILE[component]
    renames = {rename.name: rename for rename in part.table(config)}
    original: dict[str, Tensor] = {}
    fused: dict[str, dict[Any, Tensor]] = {}
    for name, tensor in state.items():
        rename, rest = _find(name, renames)
        key = part.prefix + rename.original + rest
        if rename.layout in (names.query_rows, names.key_rows, names.value_rows):
            fused.setdefault(key, {})[rename.layout] = tensor
        elif rename.layout is names.transposed:
            original[key] = tensor.T.contiguous()
        elif rename.layout is names.from_convolution and tensor.dim() == 2:
            original[key] = tensor[..., None, None]
        else:
            original[key] = tensor
    for key, rows in fused.items():
        original[key] = torch.cat([rows[names.query_rows], rows[names.key_rows], rows[names.value_rows]])
    return original


def _find(name: str, renames: dict[str, Rename]) -> tuple[Rename, str]:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = ".".join(parts[:end])
        if stem in renames:
            return renames[stem], name[len(stem) :]
    raise AssertionError(f"no name for {name} in the original layout")
