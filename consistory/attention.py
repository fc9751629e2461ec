"""Attention layers that ask a control what to do.

Nothing here is patched or swapped: every attention layer hands its queries, keys and values to an `AttentionControl`.
The base class is plain SDXL; `consistory.sdsa` overrides it with the paper's method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """Which transformer block an attention layer belongs to, fixed when the UNet is built.

    part: "encoder" | "mid" | "decoder".
    index: running number of the transformer block within its part.
    stride: latent positions per patch and axis; in SDXL at 1024 px, 2 is 64x64 patches and 4 is 32x32.
    """

    part: str
    index: int
    stride: int


class PromptKeys(NamedTuple):
    """What a cross-attention layer makes of a prompt, at every timestep the same.

    k, v: keys and values [B, H, T, d].
    picture: keys and values of a picture that prompts, too, and is attended to by itself; see `consistory.ip_adapter`.
    """

    k: Tensor
    v: Tensor
    picture: tuple[Tensor, Tensor] | None = None


# What cross-attention reads: the context [B, T, C'], or what every layer has made of it before.
Prompt = Tensor | Mapping[Site, PromptKeys]


class AttentionControl:
    """Plain SDXL attention. Shapes: B samples, see `Conditioning`, H heads, P patches, T tokens."""

    def self_input(self, x: Tensor, site: Site) -> None:
        """Sees what a self-attention layer makes its queries, keys and values of: [B, P, C]."""

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """q, k, v and the result [B, H, P, d]."""
        return F.scaled_dot_product_attention(q, k, v)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """q and the result [B, H, P, d]; k, v [B, H, T, d]."""
        return F.scaled_dot_product_attention(q, k, v)

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        """x_out of a self-attention layer, after its output projection and before the residual: [B, P, C]."""
        return x

    def decoder_features(self, x: Tensor, index: int) -> None:
        """Sees the output of decoder block `index`, after its upsampler and as FreeU scales it: [B, C, h, w]."""


class Around(AttentionControl):
    """Does what another control does; a subclass adds something of its own around that."""

    def __init__(self, inner: AttentionControl) -> None:
        self.inner = inner

    def self_input(self, x: Tensor, site: Site) -> None:
        self.inner.self_input(x, site)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.inner.self_attention(q, k, v, site)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.inner.cross_attention(q, k, v, site)

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        return self.inner.self_output(x, site)

    def decoder_features(self, x: Tensor, index: int) -> None:
        self.inner.decoder_features(x, index)


class Attention(nn.Module):
    """The projections around an attention; the attention itself is the control's."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def queries(self, x: Tensor) -> Tensor:
        """[B, P, C] -> [B, H, P, d]."""
        return self._heads(self.to_q(x))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, C'] -> keys and values, each [B, H, T, d]."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b p (h d) -> b h p d", h=self.heads)

    def output(self, heads: Tensor) -> Tensor:
        return self.to_out[0](rearrange(heads, "b h p d -> b p (h d)"))


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)  # in place: nothing else in the UNet takes as much memory


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # The identity holds the place of a dropout, so that parameters keep their published names.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, site: Site):
        super().__init__()
        self.site = site
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, prompt: Prompt, control: AttentionControl) -> Tensor:
        y = self.norm1(x)
        control.self_input(y, self.site)
        heads = control.self_attention(self.attn1.queries(y), *self.attn1.keys_values(y), self.site)
        x = x + control.self_output(self.attn1.output(heads), self.site)
        own = PromptKeys(*self.attn2.keys_values(prompt)) if isinstance(prompt, Tensor) else prompt[self.site]
        q = self.attn2.queries(self.norm2(x))
        heads = control.cross_attention(q, own.k, own.v, self.site)
        if own.picture is not None:
            heads = heads + F.scaled_dot_product_attention(q, *own.picture)
        x = x + self.attn2.output(heads)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the patches of a feature map [B, C, h, w], with a residual around them all."""

    def __init__(self, width: int, context_width: int, heads: int, groups: int, linear: bool, sites: list[Site]):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context_width, heads, s) for s in sites)
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, prompt: Prompt, control: AttentionControl) -> Tensor:
        h, w = x.shape[-2:]
        y = patches(_project(self.proj_in, self.norm(x)))
        for block in self.transformer_blocks:
            y = block(y, prompt, control)
        return x + _project(self.proj_out, feature_map(y, h, w))


def patches(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, P, C], row by row."""
    return rearrange(x, "b c h w -> b (h w) c")


def feature_map(x: Tensor, h: int, w: int) -> Tensor:
    """[B, P, C] -> [B, C, h, w]."""
    return rearrange(x, "b (h w) c -> b c h w", h=h, w=w)


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 projection of a feature map, stored as a linear layer or as a convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.ndim == 4:
        return layer(x)
    return rearrange(layer(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
