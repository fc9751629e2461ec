"""Dense correspondence: the nearest source patch of every target patch (ConsiStory, §4.3, eqs. 8-9)."""

import torch
from torch import Tensor

from consistory.kernels.backends import Backend, check_dtypes, check_masks, check_shapes, pick_backend
from consistory.kernels.correspondence import packed, reference

__all__ = ["match"]


def match(
    target: Tensor, source: Tensor, source_mask: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine nearest neighbours, for every pair of a target and a source image.

    target          [T, P, C] features
    source          [S, P, C] features
    source_mask     bool [S, P], the patches that may be matched
    returns         index int64 [T, S, P] and distance float32 [T, S, P] = 1 - cos; ties go to the lowest index,
                    and a source without any such patch gives index 0 and distance 2, the largest there is

    Raises ValueError for shapes or types that do not fit together, a mask that is not of booleans, an unknown backend,
    or "fused" where it cannot run.
    """
    check_shapes(source=(source, (len(source), *target.shape[1:])), source_mask=(source_mask, source.shape[:2]))
    check_dtypes(target, source=source)
    check_masks(source_mask=source_mask)
    chosen = pick_backend(target, source, backend=backend)
    if chosen == "fused":
        from consistory.kernels.correspondence import fused

        with torch.cuda.device_of(target):  # Triton launches on the current device
            return fused.match(target, source, source_mask)
    implementation = reference if chosen == "reference" else packed
    return implementation.match(target, source, source_mask)
