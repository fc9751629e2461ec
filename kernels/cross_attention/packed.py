"""Cross-attention in plain PyTorch: the token weights ride along as further value columns of one attention call."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from consistory.kernels.precision import at_least_float32


def cross_attention(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `consistory.kernels.cross_attention`. The probabilities [B, H, P, T] are never in memory.

    The attention kernels of PyTorch want q, k and v of one width, a multiple of 8: zero columns leave the scores as
    they are.
    """
    head_size, concepts = q.shape[-1], token_weights.shape[-1]
    extra = -(-concepts // 8) * 8
    weights = pad(token_weights, (0, extra - concepts)).to(v.dtype)[:, None].expand(-1, v.shape[1], -1, -1)
    joined = scaled_dot_product_attention(
        pad(q, (0, extra)), pad(k, (0, extra)), torch.cat([v, weights], dim=-1), scale=head_size**-0.5
    )
    maps = at_least_float32(joined[..., head_size : head_size + concepts]).mean(dim=1)
    return joined[..., :head_size], maps
