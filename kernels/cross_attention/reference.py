"""Cross-attention with its probabilities in memory."""

from torch import Tensor

from consistory.kernels.precision import at_least_float32


def cross_attention(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, or float64 if q is. Shapes as in `consistory.kernels.cross_attention`."""
    query, key, value = (at_least_float32(x) for x in (q, k, v))
    scores = query @ key.transpose(-1, -2) / q.shape[-1] ** 0.5
    probabilities = scores.softmax(dim=-1)  # [B, H, P, T]
    return (probabilities @ value).to(q.dtype), probabilities.mean(dim=1) @ token_weights.to(value.dtype)
