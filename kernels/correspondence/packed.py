"""Nearest patches in plain PyTorch: a slab of the distances at a time, and on a CPU only the kept source patches."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from consistory.kernels.precision import at_least_float32

SLAB = 2**22  # distances in memory at a time: 16 MiB in float32


def match(target: Tensor, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `consistory.kernels.correspondence`. Products in the features' own precision."""
    targets, patches, _ = target.shape
    rows = normalize(at_least_float32(target), dim=-1).to(target.dtype).flatten(0, 1)
    source = normalize(at_least_float32(source), dim=-1).to(source.dtype)
    index = torch.zeros(targets, len(source), patches, dtype=torch.int64, device=target.device)
    distance = torch.full_like(index, 2.0, dtype=torch.float32)
    for image, mask in enumerate(source_mask):
        nearest = nearest_kept if target.device.type == "cpu" else nearest_of
        found = nearest(rows, source[image], mask)
        index[:, image], distance[:, image] = (each.view(targets, patches) for each in found)
    return index, distance


def nearest_kept(rows: Tensor, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest_of` without the masked patches: their number is needed on the host, which is free on a CPU only."""
    kept = mask.nonzero()[:, 0]
    if len(kept) == 0:
        return torch.zeros(len(rows), dtype=torch.int64), torch.full((len(rows),), 2.0)
    index, distance = nearest_of(rows, source[kept], mask[kept])
    return kept[index], distance


def nearest_of(rows: Tensor, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, C], source [P, C] under its mask [P] -> index int64 [R], distance [R]."""
    slabs = [
        (1 - at_least_float32(slab @ source.T)).masked_fill(~mask, 2.0).min(dim=-1)
        for slab in rows.split(max(1, SLAB // len(source)))
    ]
    return torch.cat([slab.indices for slab in slabs]), torch.cat([slab.values for slab in slabs])
