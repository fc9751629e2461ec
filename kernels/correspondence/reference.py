"""Nearest patches as the paper writes them: argmin over the matrix of all cosine distances (equations 8-9)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def match(target: Tensor, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, with every distance in memory. Shapes as in `consistory.kernels.correspondence`."""
    cosine = torch.einsum("tpc,sqc->tspq", normalize(target.float(), dim=-1), normalize(source.float(), dim=-1))
    distance = (1 - cosine).masked_fill(~source_mask[None, :, None], 2.0)
    nearest = distance.min(dim=-1)
    return nearest.indices, nearest.values
