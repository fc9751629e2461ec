"""IP-Adapter (Ye et al. 2023): a picture prompts, too. Every cross-attention also reads a few tokens made of it.

    adapter = IPAdapter.load("ip-adapter_sdxl_vit-h.safetensors", pipe.unet)
    features = ImageEncoder.from_pretrained("image_encoder").embed([picture])[0]    # consistory.clip
    pipe = pipe.with_picture(adapter, features, weight=0.6)

Parameter names are the published ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from consistory.weights import loading
from consistory.weights.errors import ConsistoryError

from .attention import PromptKeys, Site, TransformerBlock
from .subject import fingerprint
from .unet import UNet

PictureKeys = Mapping[Site, tuple[Tensor, Tensor]]  # keys and values of every layer, each [B, H, T, d]


class ImageTokens(nn.Module):
    """Features [B, F] -> tokens [B, T, C']."""

    def __init__(self, features: int, tokens: int, context_width: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(x), "b (t c) -> b t c", t=self.tokens))


class TokenKeys(nn.Module):
    """What a cross-attention layer makes of tokens [B, T, C']: keys and values, each [B, H, T, d]."""

    def __init__(self, context_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_k_ip = nn.Linear(context_width, width, bias=False)
        self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.to_k_ip(tokens)), self._heads(self.to_v_ip(tokens))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)


class IPAdapter(nn.Module):
    """For a UNet like the one given; `ip_adapter.N` belongs to its N-th attention, cross-attentions being odd."""

    def __init__(self, unet: UNet, features: int, tokens: int = 4, name: str = "unnamed"):
        super().__init__()
        self.name = name
        self.layers = cross_attentions(unet)
        width = unet.config.context_width
        self.image_proj = ImageTokens(features, tokens, width)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): TokenKeys(width, *sizes) for i, sizes in enumerate(self.layers.values())}
        )

    def forward(self, features: Tensor) -> dict[Site, tuple[Tensor, Tensor]]:
        """[B, F] -> keys and values of every layer, [B, H, T, d]. Zeros stand for no picture."""
        tokens = self.image_proj(features)
        return {site: layer(tokens) for site, layer in zip(self.layers, self.ip_adapter.values(), strict=True)}

    @classmethod
    def load(cls, path: str | Path, unet: UNet) -> IPAdapter:
        """A `.safetensors` file for this UNet, whose device and precision it gets.

        Raises ConsistoryError for a missing, damaged or unsuitable file, and for a kind that reads other features than
        one vector for a picture (Plus, FaceID).
        """
        tensors, features, outputs = loading.ip_adapter(Path(path))
        weight, tokens = unet.conv_in.weight, max(outputs // unet.config.context_width, 1)
        return loading.load_module(
            lambda: cls(unet, features, tokens, str(path)), tensors, dtype=weight.dtype, device=weight.device
        )


def cross_attentions(unet: UNet) -> dict[Site, tuple[int, int]]:
    """Width and number of heads of every cross-attention, in the order in which published files count them."""
    order = {"encoder": 0, "decoder": 1, "mid": 2}
    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
    blocks.sort(key=lambda block: (order[block.site.part], block.site.index))
    return {block.site: (block.attn2.to_k.out_features, block.attn2.heads) for block in blocks}


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """A picture that prompts all of a model's pictures.

    keys: of 2 samples: without the picture, for the unconditional half, and with it. Values are weighted.
    settings: as JSON would hold them: the adapter, the SHA-256 of the picture's features, and the weight.
    identity: tells picture prompts apart, wherever the adapter lies.
    """

    keys: PictureKeys
    settings: dict[str, Any]
    identity: str

    @classmethod
    @torch.inference_mode()
    def make(cls, adapter: IPAdapter, features: Tensor, weight: float) -> PicturePrompt:
        """features: [F]. Raises ConsistoryError if they do not fit the adapter or the weight is not finite."""
        wanted = adapter.image_proj.proj.in_features
        if features.shape != (wanted,):
            raise ConsistoryError(
                f"features {list(features.shape)} do not fit {adapter.name}, which reads [{wanted}]: give those of one "
                "picture, by the image encoder that the adapter was trained with"
            )
        if not math.isfinite(weight):
            raise ConsistoryError(f"picture weight {weight} is not a number to prompt with: use about 0.5 to 1")
        digest = hashlib.sha256(features.float().cpu().numpy().tobytes()).hexdigest()
        features = features.to(adapter.image_proj.proj.weight)
        keys = adapter(torch.stack([torch.zeros_like(features), features]))
        return cls(
            {site: (k, weight * v) for site, (k, v) in keys.items()},
            {"adapter": adapter.name, "features": digest, "weight": weight},
            f"{fingerprint(adapter)}*{digest}*{weight:g}",
        )

    def beside(self, prompts: Mapping[Site, PromptKeys]) -> dict[Site, PromptKeys]:
        """What layers read of 2 N samples' prompts, the unconditional half first, and of the picture."""
        like = next(iter(prompts.values())).k

        def both(x: Tensor) -> Tensor:
            return x.to(like).repeat_interleave(len(like) // 2, dim=0)

        return beside(prompts, {site: (both(k), both(v)) for site, (k, v) in self.keys.items()})


def beside(prompts: Mapping[Site, PromptKeys], picture: PictureKeys) -> dict[Site, PromptKeys]:
    """What cross-attention layers read of prompts and, by itself, of pictures; as many samples of either."""
    return {site: own._replace(picture=picture[site]) for site, own in prompts.items()}
