"""The contenders of bench/kernels.py: for each operator ours, what others offer for it, and the floor.

A contender takes the problem and returns a call without arguments. What a real run would prepare once a step (indices,
block masks, lengths on the host) is prepared outside the call; what it would do in every layer (gathering keys) inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Call
from torch import Tensor

from consistory.kernels.correspondence import match
from consistory.kernels.cross_attention import cross_attention
from consistory.kernels.extended_attention import extended_attention, packed
from consistory.kernels.injection import inject


class Unavailable(Exception):
    """This contender does not run here; the message says why."""


@dataclass
class Attention:
    """One layer of subject-driven self-attention. q, k, v [G, N, H, P, d] in the UNet's layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor
    share: Tensor

    @property
    def anchors(self) -> int:
        return len(self.key_mask)

    @property
    def reads(self) -> Tensor:
        """bool [N, A, P]: the anchor keys that each image reads."""
        return self.share[:, :, None] & self.key_mask

    def flops(self) -> float:
        """Two matrix products over every query and the keys that it reads: 4 d operations each."""
        halves, images, heads, patches, head_size = self.q.shape
        keys = images * patches + int(self.reads.sum())
        return 4.0 * halves * heads * patches * keys * head_size

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.key_mask, self.share


@dataclass
class Match:
    """target [T, P, C], source [S, P, C], source_mask [S, P]."""

    target: Tensor
    source: Tensor
    source_mask: Tensor


@dataclass
class Cross:
    """q [B, H, P, d], k and v [B, H, T, d], token_weights [B, T, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    token_weights: Tensor


@dataclass
class Inject:
    """x [N, P, C] and where it draws from."""

    x: Tensor
    source_index: Tensor
    source_image: Tensor
    inject_mask: Tensor
    alpha: float
    anchors: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, int]:
        return self.x, self.source_index, self.source_image, self.inject_mask, self.alpha, self.anchors


# --- extended attention -----------------------------------------------------------------------------------------------


def fused_attention(a: Attention) -> Call:
    _needs_cuda(a.q)
    return lambda: extended_attention(*a.arguments(), backend="fused")


def packed_attention(a: Attention) -> Call:
    return lambda: extended_attention(*a.arguments(), backend="packed")


def masked_sdpa(a: Attention) -> Call:
    """All keys of all anchors, those not read under a mask that is broadcast over heads and queries."""
    return lambda: packed.attend_masked(a.q, a.k, a.v, a.k[:, : a.anchors], a.v[:, : a.anchors], a.key_mask, a.share)


def batch_masked_sdpa(a: Attention) -> Call:
    """What one would write with SDPA alone: every image attends to the whole batch, under a mask. N P keys a query."""
    halves, images, _, patches, _ = a.q.shape
    mask = torch.eye(images, dtype=torch.bool, device=a.q.device)[:, :, None].repeat(1, 1, patches)
    mask[:, : a.anchors] |= a.reads

    def everyone(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2).expand(images, -1, -1, -1)

    def call() -> Tensor:
        return torch.stack([
            F.scaled_dot_product_attention(
                a.q[half], everyone(a.k[half]), everyone(a.v[half]), mask.flatten(1)[:, None, None]
            )
            for half in range(halves)
        ])

    return call


def image_loop(a: Attention) -> Call:
    """What one would write first: for every image, find its keys, which waits for the GPU, gather them, and attend."""

    def call() -> Tensor:
        out = torch.empty_like(a.q)
        for image, reads in enumerate(a.reads):
            anchor, patch = reads.nonzero(as_tuple=True)
            joined = [
                torch.cat([x[:, image], x.transpose(2, 3)[:, anchor, patch].transpose(1, 2)], dim=2) for x in (a.k, a.v)
            ]
            out[:, image] = F.scaled_dot_product_attention(a.q[:, image], *joined)
        return out

    return call


def varlen(a: Attention) -> Call:
    """PyTorch's variable-length FlashAttention over one ragged batch."""
    _needs_cuda(a.q)
    from torch.nn.attention.varlen import varlen_attn

    return _ragged(a, lambda q, k, v, r: varlen_attn(q, k, v, r.starts_q, r.starts_k, r.longest_q, r.longest_k))


def flash_attn(a: Attention) -> Call:
    _needs_cuda(a.q)
    from flash_attn import flash_attn_varlen_func

    return _ragged(
        a, lambda q, k, v, r: flash_attn_varlen_func(q, k, v, r.starts_q, r.starts_k, r.longest_q, r.longest_k)
    )


def xformers(a: Attention) -> Call:
    _needs_cuda(a.q)
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths_q, lengths_k = _lengths(a)
    bias = BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    return _ragged(a, lambda q, k, v, _: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0])


def flex(a: Attention) -> Call:
    """FlexAttention over the keys of {own, anchors}: its block mask skips blocks of 128 x 128 without any kept key."""
    halves, images, _, patches, _ = a.q.shape
    # One look-up a score: whatever else the mask function did, it would do for every score. In int32, since a look-up
    # of booleans makes the whole thirteen times slower (PyTorch 2.11 on an H200).
    visible = F.pad(a.reads.flatten(1), (patches, 0), value=True).repeat(halves, 1).int()  # [G N, P + A P]

    def join(x: Tensor) -> Tensor:
        return torch.cat([x, _anchor_rows(x, a.anchors)[:, None].expand(-1, images, -1, -1, -1)], dim=3)

    return _flex(a, lambda b, h, q, key: visible[b, key] > 0, patches * (1 + a.anchors), join)


def flex_packed(a: Attention) -> Call:
    """FlexAttention over the own keys and the kept ones, padded to the image that keeps most."""
    kept = a.reads.flatten(1)
    lengths = (a.q.shape[3] + kept.sum(1)).repeat(a.q.shape[0])  # [G N]
    longest = int(kept.sum(1).max())
    rows = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]

    def join(x: Tensor) -> Tensor:
        return torch.cat([x, _anchor_rows(x, a.anchors)[:, :, rows].transpose(1, 2)], dim=3)

    return _flex(a, lambda b, h, q, key: key < lengths[b], a.q.shape[3] + longest, join)


def _flex(a: Attention, visible: Callable[..., Tensor], keys: int, join: Callable[[Tensor], Tensor]) -> Call:
    """Compiled. visible: FlexAttention's mask function; join: [G, N, H, P, d] -> [G, N, H, keys, d], in every call."""
    _needs_cuda(a.q)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q = a.q.flatten(0, 1)
    mask = create_block_mask(visible, len(q), None, q.shape[2], keys, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(q, join(a.k).flatten(0, 1), join(a.v).flatten(0, 1), block_mask=mask).view_as(a.q)


def _anchor_rows(x: Tensor, anchors: int) -> Tensor:
    """[G, N, H, P, d] -> [G, H, A P, d]"""
    return x[:, :anchors].transpose(1, 2).flatten(2, 3)


def plain_attention(a: Attention) -> Call:
    """The floor a user knows: every image for itself."""
    q, k, v = (x.flatten(0, 1) for x in (a.q, a.k, a.v))
    return lambda: F.scaled_dot_product_attention(q, k, v)


@dataclass
class Ragged:
    """Where each (half, image) begins in a ragged batch, and the longest of them."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


def _ragged(a: Attention, attend: Callable[[Tensor, Tensor, Tensor, Ragged], Tensor]) -> Call:
    """Keys and values of every half and image one after the other, gathered in every call."""
    halves, images, heads, patches, head_size = a.q.shape
    lengths_q, lengths_k = _lengths(a)
    starts_q, starts_k = (
        F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(a.q.device, torch.int32) for lengths in (lengths_q, lengths_k)
    )
    token = torch.arange(halves * images * patches, device=a.q.device).view(halves, images, patches)
    rows = torch.cat(
        [
            torch.cat([token[half, image], token[half, : a.anchors][reads]])
            for half in range(halves)
            for image, reads in enumerate(a.reads)
        ]
    )
    ragged = Ragged(starts_q, starts_k, max(lengths_q), max(lengths_k))

    def flat(x: Tensor) -> Tensor:
        return x.transpose(2, 3).reshape(-1, heads, head_size)

    def call() -> Tensor:
        out = attend(flat(a.q), flat(a.k)[rows], flat(a.v)[rows], ragged)
        return out.view(halves, images, patches, heads, head_size).transpose(2, 3)

    return call


def _lengths(a: Attention) -> tuple[list[int], list[int]]:
    halves, images, _, patches, _ = a.q.shape
    return [patches] * halves * images, (patches + a.reads.sum((1, 2))).tolist() * halves


def _needs_cuda(x: Tensor) -> None:
    if not x.is_cuda:
        raise Unavailable("runs on a GPU only")


# --- the other operators ----------------------------------------------------------------------------------------------


def fused_match(m: Match) -> Call:
    _needs_cuda(m.target)
    return lambda: match(m.target, m.source, m.source_mask, backend="fused")


def packed_match(m: Match) -> Call:
    return lambda: match(m.target, m.source, m.source_mask, backend="packed")


def pairwise_match(m: Match) -> Call:
    """One pair of images after the other, each with its whole distance matrix."""

    def call() -> tuple[Tensor, Tensor]:
        target, source = (F.normalize(x, dim=-1) for x in (m.target, m.source))
        nearest = [
            [(1 - t @ s.T).masked_fill(~mask, 2.0).min(dim=-1) for s, mask in zip(source, m.source_mask, strict=True)]
            for t in target
        ]
        index = torch.stack([torch.stack([pair.indices for pair in row]) for row in nearest])
        return index, torch.stack([torch.stack([pair.values for pair in row]) for row in nearest]).float()

    return call


def bare_products(m: Match) -> Call:
    """The floor: the matrix products alone, pair after pair into one buffer, nothing masked or searched."""
    out = m.target.new_empty(m.target.shape[1], m.source.shape[1])

    def call() -> Tensor:
        for target in m.target:
            for source in m.source:
                torch.mm(target, source.T, out=out)
        return out

    return call


def fused_cross(c: Cross) -> Call:
    _needs_cuda(c.q)
    return lambda: cross_attention(c.q, c.k, c.v, c.token_weights, backend="fused")


def packed_cross(c: Cross) -> Call:
    return lambda: cross_attention(c.q, c.k, c.v, c.token_weights, backend="packed")


def explicit_cross(c: Cross) -> Call:
    """The probabilities [B, H, P, T] in memory."""
    weights = c.token_weights.to(c.q.dtype)

    def call() -> tuple[Tensor, Tensor]:
        p = (c.q @ c.k.transpose(-1, -2) / c.q.shape[-1] ** 0.5).softmax(dim=-1)
        return p @ c.v, (p.mean(dim=1) @ weights).float()

    return call


def cross_without_maps(c: Cross) -> Call:
    """The floor: attention to the prompt alone."""
    return lambda: F.scaled_dot_product_attention(c.q, c.k, c.v)


def fused_inject(i: Inject) -> Call:
    _needs_cuda(i.x)
    return lambda: inject(*i.arguments(), backend="fused")


def packed_inject(i: Inject) -> Call:
    return lambda: inject(*i.arguments(), backend="packed")


def image_by_image_inject(i: Inject) -> Call:
    return lambda: inject(*i.arguments(), backend="reference")


def copy(i: Inject) -> Call:
    """The floor: the features read and written once."""
    return i.x.clone


Contenders = dict[str, Callable[[Any], Call]]

CONTENDERS: dict[str, Contenders] = {
    "extended_attention": {
        "fused": fused_attention,
        "packed": packed_attention,
        "SDPA + mask": masked_sdpa,
        "SDPA + batch mask": batch_masked_sdpa,
        "image loop": image_loop,
        "varlen": varlen,
        "FlexAttention": flex,
        "FlexAttention, packed": flex_packed,
        "xformers": xformers,
        "flash-attn": flash_attn,
        "floor": plain_attention,
    },
    "match": {"fused": fused_match, "packed": packed_match, "pairwise": pairwise_match, "floor": bare_products},
    "cross_attention": {
        "fused": fused_cross,
        "packed": packed_cross,
        "explicit": explicit_cross,
        "floor": cross_without_maps,
    },
    "injection": {"fused": fused_inject, "packed": packed_inject, "image loop": image_by_image_inject, "floor": copy},
}
