"""Cross-attention that also reports how much each patch attends to chosen tokens (ConsiStory, eq. 7)."""

import torch
from torch import Tensor

from consistory.kernels.backends import Backend, check_dtypes, check_shapes, pick_backend
from consistory.kernels.cross_attention import packed, reference

__all__ = ["cross_attention"]


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to the prompt's tokens, and the head-averaged attention probabilities weighted by `token_weights`.

    q               [B, H, P, d]
    k, v            [B, H, T, d], one row a token
    token_weights   float [B, T, K], for each of K concepts the weight of every token's probability
    returns         out [B, H, P, d], maps [B, P, K]: softmax(q k^T / sqrt(d)) @ token_weights, mean of
                    heads, in float32 (float64 if q is)

    Raises ValueError for shapes or types that do not fit together, an unknown backend, or "fused" where it cannot run.
    """
    if q.dim() != 4 or k.dim() != 4 or token_weights.dim() != 3:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, token_weights {list(token_weights.shape)}"
        raise ValueError(f"{shapes}: they have to be [B, H, P, d], [B, H, T, d] and [B, T, K]")
    (batch, heads, _, head_size), tokens, concepts = q.shape, k.shape[2], token_weights.shape[-1]
    keys = batch, heads, tokens, head_size
    check_shapes(k=(k, keys), v=(v, keys), token_weights=(token_weights, (batch, tokens, concepts)))
    check_dtypes(q, k=k, v=v)
    fits = 16 <= head_size <= 64 and tokens <= 128 and concepts > 0
    chosen = pick_backend(q, k, v, token_weights, backend=backend, fits=fits)
    if chosen == "fused":
        from consistory.kernels.cross_attention import fused

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return fused.cross_attention(q, k, v, token_weights)
    implementation = reference if chosen == "reference" else packed
    return implementation.cross_attention(q, k, v, token_weights)
