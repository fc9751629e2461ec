"""Nearest patches as the paper writes them: argmin over the matrix of all cosine distances (eqs. 8-9)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from consistory.kernels.precision import at_least_float32


def match(target: Tensor, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, or float64 if the features are. Shapes as in `consistory.kernels.correspondence`."""
    target, source = (normalize(at_least_float32(x), dim=-1) for x in (target, source))
    cosine = torch.einsum("tpc,sqc->tspq", target, source)
    distance = (1 - cosine).masked_fill(~source_mask[None, :, None], torch.inf)
    nearest = distance.min(dim=-1)
    return nearest.indices, nearest.values.float().masked_fill(nearest.values.isinf(), 2.0)
