"""Cross-attention with its probabilities in memory."""

from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """In float32. Shapes as in `consistory.kernels.cross_attention`."""
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    probabilities = scores.softmax(dim=-1)  # [B, H, P, T]
    return (probabilities @ v.float()).to(q.dtype), probabilities.mean(dim=1) @ token_weights.float()
