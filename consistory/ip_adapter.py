"""IP-Adapter (Ye et al. 2023): a picture prompts, too. Every cross-attention also reads a few tokens made of it.

    adapter = IPAdapter.load("ip-adapter-plus_sdxl_vit-h.safetensors", pipe.unet)
    features = adapter.read(ImageEncoder.from_pretrained("image_encoder"), picture)    # consistory.clip
    pipe = pipe.with_picture(adapter, features, weight=0.6)

There are plain ones, which read one vector for a picture, and Plus, which read every patch of it. Parameter names are
the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from consistory.weights import loading
from consistory.weights.errors import ConsistoryError

from .arguments import check_number
from .attention import PromptKeys, Site, TransformerBlock
from .clip import ImageEncoder
from .images import Pixels
from .subject import digest, fingerprint
from .unet import UNet

PictureKeys = Mapping[Site, tuple[Tensor, Tensor]]  # keys and values of every layer, each [B, H, T, d]
RESAMPLER_HEAD = 64  # width of a head


class ImageTokens(nn.Module):
    """The plain kind: a picture's vector [B, F] -> tokens [B, T, C']."""

    def __init__(self, features: int, tokens: int, context_width: int):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.proj = nn.Linear(features, tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(x), "b (t c) -> b t c", t=self.tokens))


class Reader(nn.Module):
    """Learnt queries [B, T, W] attend to what they are to read [B, S, W], and to themselves."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(x), queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", d=RESAMPLER_HEAD) for y in (self.to_q(queries), k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class Resampler(nn.Module):
    """Plus: the states of a picture's patches [B, S, F] -> tokens [B, T, C'], as in Perceiver (Jaegle et al. 2021)."""

    def __init__(self, features: int, tokens: int, width: int, layers: int, context_width: int):
        super().__init__()
        self.features = features
        self.latents = nn.Parameter(torch.zeros(1, tokens, width))
        self.proj_in = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.ModuleList([Reader(width), _feed_forward(width)]) for _ in range(layers))
        self.proj_out = nn.Linear(width, context_width)
        self.norm_out = nn.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        x, queries = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            read, feed_forward = layer
            queries = queries + read(x, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


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

    def __init__(self, unet: UNet, image_proj: ImageTokens | Resampler, name: str = "unnamed"):
        super().__init__()
        self.name = name
        self.layers = cross_attentions(unet)
        width = unet.config.context_width
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): TokenKeys(width, *sizes) for i, sizes in enumerate(self.layers.values())}
        )

    def forward(self, features: Tensor) -> dict[Site, tuple[Tensor, Tensor]]:
        """Pictures' features, [B, F] or for Plus [B, S, F] -> keys and values of every layer, [B, H, T, d]."""
        tokens = self.image_proj(features)
        return {site: layer(tokens) for site, layer in zip(self.layers, self.ip_adapter.values(), strict=True)}

    @classmethod
    def load(cls, path: str | Path, unet: UNet) -> IPAdapter:
        """A `.safetensors` file for this UNet, whose device and precision it gets.

        Raises ConsistoryError for a missing, damaged or unsuitable file, and for a kind that reads faces (FaceID).
        """
        tensors, sizes = loading.ip_adapter(Path(path))
        kind, weight = Resampler if "layers" in sizes else ImageTokens, unet.conv_in.weight
        return loading.load_module(
            lambda: cls(unet, kind(**sizes), str(path)), tensors, dtype=weight.dtype, device=weight.device
        )

    def read(self, encoder: ImageEncoder, picture: Pixels) -> Tensor:
        """What it reads of a picture, uint8 [H, W, 3] -> features [2, F], for Plus [2, S, F], of none and of this one.

        The unconditional half of the samples gets those of none. Raises ConsistoryError without Pillow.
        """
        if isinstance(self.image_proj, Resampler):
            return encoder.patches([None, picture])
        (vector,) = encoder.embed([picture])
        return torch.stack([torch.zeros_like(vector), vector])


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
    @torch.no_grad()
    def make(cls, adapter: IPAdapter, features: Tensor, weight: float) -> PicturePrompt:
        """features: see `IPAdapter.read`. Raises ConsistoryError if they do not fit or the weight is not finite."""
        patches = ["S"] if isinstance(adapter.image_proj, Resampler) else []
        wanted = [2, *patches, adapter.image_proj.features]
        if features.ndim != len(wanted) or (features.shape[0], features.shape[-1]) != (wanted[0], wanted[-1]):
            raise ConsistoryError(
                f"features {list(features.shape)} do not fit {adapter.name}, which reads "
                f"[{', '.join(map(str, wanted))}]: give what adapter.read(encoder, picture) returns, with the image "
                "encoder that the adapter was trained with"
            )
        weight = check_number("picture weight", weight)
        features_digest = digest(features)
        keys = adapter(features.to(next(adapter.parameters())))
        return cls(
            {site: (k, weight * v) for site, (k, v) in keys.items()},
            {"adapter": adapter.name, "features": features_digest, "weight": weight},
            f"{fingerprint(adapter)}*{features_digest}*{weight:g}",
        )

    def beside(self, prompts: Mapping[Site, PromptKeys], guided: bool) -> dict[Site, PromptKeys]:
        """What layers read of samples' prompts, see `Conditioning`, and of the picture."""
        like, halves = next(iter(prompts.values())).k, 1 + guided

        def for_all(x: Tensor) -> Tensor:
            return x[-halves:].to(like).repeat_interleave(len(like) // halves, dim=0)

        return beside(prompts, {site: (for_all(k), for_all(v)) for site, (k, v) in self.keys.items()})


def beside(prompts: Mapping[Site, PromptKeys], picture: PictureKeys) -> dict[Site, PromptKeys]:
    """What cross-attention layers read of prompts and, by itself, of pictures; as many samples of either."""
    return {site: own._replace(picture=picture[site]) for site, own in prompts.items()}
