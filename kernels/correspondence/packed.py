"""Nearest patches in plain PyTorch: a slab of the distances at a time, and on a CPU only the kept source patches."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

SLAB = 2**22  # distances in memory at a time: 16 MiB in float32


def match(target: Tensor, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `consistory.kernels.correspondence`. Products are taken in the features' own precision."""
    rows = normalize(target.float(), dim=-1).to(target.dtype).flatten(0, 1)
    columns = normalize(source.float(), dim=-1).to(source.dtype)
    pairs = [_match_source(rows, column, mask) for column, mask in zip(columns, source_mask, strict=True)]
    index, distance = (
        torch.stack(each).unflatten(1, target.shape[:2]).transpose(0, 1) for each in zip(*pairs, strict=True)
    )
    return index, distance


def _match_source(rows: Tensor, column: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, C] against one source image [P, C] under its mask [P]: index int64 [R], distance float32 [R]."""
    if column.device.type == "cpu":  # the number of kept patches is known on the host
        kept = mask.nonzero()[:, 0]
        column, mask = column[kept], mask[kept]
        if len(kept) == 0:
            return kept.new_zeros(len(rows)), torch.full((len(rows),), 2.0)
        index, distance = _nearest(rows, column, mask)
        return kept[index], distance
    return _nearest(rows, column, mask)


def _nearest(rows: Tensor, column: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    slabs = [
        (1 - (slab @ column.T).float()).masked_fill(~mask, 2.0).min(dim=-1)
        for slab in rows.split(max(1, SLAB // len(column)))
    ]
    return torch.cat([slab.indices for slab in slabs]), torch.cat([slab.values for slab in slabs])
