"""Feature injection: the in-order blend of corresponding features (ConsiStory, §4.3, eqs. 5-6)."""

import torch
from torch import Tensor

from consistory.kernels.backends import Backend, check_dtypes, check_masks, check_shapes, pick_backend
from consistory.kernels.injection import packed, reference

__all__ = ["inject"]


def inject(
    x: Tensor,
    source_index: Tensor,
    source_image: Tensor,
    inject_mask: Tensor,
    alpha: float,
    anchors: int = 0,
    anchor_x: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Where the mask allows it, a patch becomes alpha * source + (1 - alpha) * itself.

    x               [N, P, C] features
    source_index    int64 [N, P], which patch of the source image: 0 ... P - 1, where the mask is false, too
    source_image    int64 [N, P], which anchor: 0 ... A - 1, likewise; values out of range are not looked for
    inject_mask     bool [N, P]
    anchors         at least 1: the first images are the sources. They are blended one after the other, so a later
                    one draws from an earlier one that is blended already; then all the rest, from blended anchors
    anchor_x        [A, P, C] recorded, already blended anchors: then these are the sources of every image, and
                    `anchors` is not used
    returns         a new tensor [N, P, C]

    Raises ValueError for shapes or types that do not fit together, more anchors than images, a mask that is not of
    booleans, an unknown backend, or "fused" where it cannot run.
    """
    patches = x.shape[:2]
    check_shapes(source_index=(source_index, patches), source_image=(source_image, patches))
    check_shapes(inject_mask=(inject_mask, patches))
    check_masks(inject_mask=inject_mask)
    if anchor_x is not None:
        check_shapes(anchor_x=(anchor_x, (len(anchor_x), *x.shape[1:])))
        check_dtypes(x, anchor_x=anchor_x)
    elif not 0 < anchors <= len(x):
        raise ValueError(f"anchors is {anchors}: give how many of the {len(x)} images are sources, or anchor_x")
    chosen = pick_backend(x, *([] if anchor_x is None else [anchor_x]), backend=backend)
    if chosen == "fused":
        from consistory.kernels.injection import fused

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return fused.inject(x, source_index, source_image, inject_mask, alpha, anchors, anchor_x)
    implementation = reference if chosen == "reference" else packed
    return implementation.inject(x, source_index, source_image, inject_mask, alpha, anchors, anchor_x)
