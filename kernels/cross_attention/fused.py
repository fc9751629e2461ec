"""Cross-attention with token maps in Triton: one launch, the probabilities stay in registers.

A program holds a block of patches and walks over the heads, so it can average their probabilities by itself; the token
weights are further columns of values.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel is called with has no Python types)

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from consistory.kernels.backends import with_contiguous_rows

PATCHES = 64


def cross_attention(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `consistory.kernels.cross_attention`; strides are free, scattered rows of d values are copied.

    The result is laid out [B, P, H, d], so that joining its heads is a view. A program holds all the tokens of a head,
    which spills no register up to T = 128 and d = 64 in 16 bit, but does in float32 (which runs here only if asked to).
    """
    q, k, v = (with_contiguous_rows(x) for x in (q, k, v))
    batch, heads, patches, head_size = q.shape
    concepts = token_weights.shape[-1]
    out = q.new_empty(batch, patches, heads, head_size).transpose(1, 2)
    maps = torch.empty(batch, patches, concepts, dtype=torch.float32, device=q.device)
    cross_attention_kernel[(triton.cdiv(patches, PATCHES), batch)](
        q, q.stride(), k, k.stride(), v, v.stride(), token_weights.to(q.dtype).contiguous(), out, out.stride(), maps,
        log2(torch.e) / head_size**0.5, heads, patches, k.shape[2], concepts,
        HEAD_SIZE=head_size, WIDTH=triton.next_power_of_2(head_size), PATCHES=PATCHES,
        TOKENS=max(16, triton.next_power_of_2(k.shape[2])), CONCEPTS=max(16, triton.next_power_of_2(concepts)),
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out, maps


@triton.jit
def cross_attention_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, weights_ptr, out_ptr, out_strides, maps_ptr,
    scale, heads, patches, tokens, concepts,
    HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr, PATCHES: tl.constexpr, TOKENS: tl.constexpr, CONCEPTS: tl.constexpr,
):  # fmt: skip
    """One program a block of patches and a sample. weights [B, T, K], maps [B, P, K]; scale = log2(e) / sqrt(d)."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    column, token, concept = tl.arange(0, WIDTH), tl.arange(0, TOKENS), tl.arange(0, CONCEPTS)
    row_inside = (row < patches)[:, None] & (column < HEAD_SIZE)[None, :]
    token_inside = (token < tokens)[:, None] & (column < HEAD_SIZE)[None, :]
    q_place = row[:, None] * q_strides[2] + column[None, :]
    k_place = token[:, None] * k_strides[2] + column[None, :]
    v_place = token[:, None] * v_strides[2] + column[None, :]
    out_place = row[:, None] * out_strides[2] + column[None, :]
    weights_place = (sample * tokens + token)[:, None] * concepts + concept[None, :]
    weights_inside = (token < tokens)[:, None] & (concept < concepts)[None, :]
    weights = tl.load(weights_ptr + weights_place, mask=weights_inside, other=0.0)

    hidden = tl.where(token < tokens, 0.0, float("-inf"))
    maps = tl.zeros([PATCHES, CONCEPTS], tl.float32)
    for head in range(heads):
        q = tl.load(q_ptr + sample * q_strides[0] + head * q_strides[1] + q_place, mask=row_inside, other=0.0)
        k = tl.load(k_ptr + sample * k_strides[0] + head * k_strides[1] + k_place, mask=token_inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + hidden[None, :]
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        p = (p * (1 / tl.sum(p, 1))[:, None]).to(q.dtype)
        v = tl.load(v_ptr + sample * v_strides[0] + head * v_strides[1] + v_place, mask=token_inside, other=0.0)
        out = tl.dot(p, v, input_precision="ieee").to(v.dtype)
        tl.store(out_ptr + sample * out_strides[0] + head * out_strides[1] + out_place, out, mask=row_inside)
        maps = tl.dot(p, weights, maps, input_precision="ieee")

    maps_place = (sample * patches + row)[:, None] * concepts + concept[None, :]
    maps_inside = (row < patches)[:, None] & (concept < concepts)[None, :]
    tl.store(maps_ptr + maps_place, maps / heads, mask=maps_inside)
