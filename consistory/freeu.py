"""FreeU (Si et al. 2023, arXiv 2309.11497): stronger backbone features, weaker low frequencies in the skips."""

from __future__ import annotations

import torch
from torch import Tensor

from consistory.kernels.precision import at_least_float32

from .config import FreeU


def apply_freeu(x: Tensor, skip: Tensor, level: int, freeu: FreeU) -> tuple[Tensor, Tensor]:
    """Backbone x [B, C, h, w] and skip [B, C', h, w] of decoder block `level`; only levels 0 and 1 change."""
    if level > 1:
        return x, skip
    b, s = ((freeu.b1, freeu.s1), (freeu.b2, freeu.s2))[level]
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * b, x[:, half:]], dim=1), scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """Multiply the lowest frequencies (-1 and 0 along both axes) of each channel by s. [B, C, h, w]."""
    spectrum = torch.fft.fft2(at_least_float32(x))  # half-precision transforms exist for powers of two only
    h, w = x.shape[-2:]
    spectrum[..., :: max(1, h - 1), :: max(1, w - 1)] *= s  # the first and the last along both axes
    return torch.fft.ifft2(spectrum).real.to(x.dtype)
