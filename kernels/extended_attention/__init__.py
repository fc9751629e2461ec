"""Extended attention: the operator of subject-driven self-attention (ConsiStory, section 4.1)."""

import torch
from torch import Tensor

from consistory.kernels.backends import Backend, check_dtypes, check_masks, check_shapes, pick_backend
from consistory.kernels.extended_attention import packed, reference

__all__ = ["extended_attention"]


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    *,
    anchor_k: Tensor | None = None,
    anchor_v: Tensor | None = None,
    q_blend: tuple[Tensor, float] | None = None,
    regions: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Every image attends to its own patches and to the kept patches of the anchors it shares (eqs. 2-3).

    q, k, v         [G, N, H, P, d]: guidance halves, images, heads, patches, head size
    key_mask        bool [A, P], which patches of each anchor may be read; for the reference also float in [0, 1], the
                    weight of each
    share           bool [N, A], which images read which anchor; an image reads its own patches in any case
    anchor_k, _v    [G, A, H, P, d]: recorded anchors; without them the anchors are the first A images of the batch
    q_blend         (q_vanilla [G, N, H, P, d], weight): queries are (1 - weight) * q + weight * q_vanilla (eq. 4)
    regions         (query_region int32 [N, P], key_region int32 [A, P]): bit sets; a query reads those kept keys of the
                    anchors only that have a bit in common with it; without them it reads all
    returns         [G, N, H, P, d], softmax over the joined keys, scale 1 / sqrt(d)

    Raises ValueError for shapes or types that do not fit together, more anchors than images where none are recorded,
    masks that are not of booleans, one of `anchor_k` and `anchor_v` alone, an unknown backend, or "fused" where it
    cannot run.
    """
    if q.dim() != 5:
        raise ValueError(f"q is {list(q.shape)}: it has to be [halves, images, heads, patches, head size]")
    if q.numel() == 0:
        raise ValueError(f"q is {list(q.shape)}: it holds nothing")
    (g, n, h, p, d), anchors = q.shape, len(key_mask)
    if (anchor_k is None) != (anchor_v is None):
        raise ValueError("one of anchor_k and anchor_v is given alone: give both or neither")
    if anchor_k is None and anchors > n:
        raise ValueError(f"key_mask has {anchors} anchors, but there are {n} images: give anchor_k and anchor_v")
    if anchor_k is None or anchor_v is None:
        anchor_k, anchor_v = k[:, :anchors], v[:, :anchors]
    recorded = g, anchors, h, p, d
    check_shapes(k=(k, q.shape), v=(v, q.shape), key_mask=(key_mask, (anchors, p)), share=(share, (n, anchors)))
    check_shapes(anchor_k=(anchor_k, recorded), anchor_v=(anchor_v, recorded))
    check_masks(share=share)
    if not (backend == "reference" and key_mask.is_floating_point()):
        check_masks(key_mask=key_mask)
    check_dtypes(q, k=k, v=v, anchor_k=anchor_k, anchor_v=anchor_v)
    if q_blend is not None:
        check_shapes(q_vanilla=(q_blend[0], q.shape))
        check_dtypes(q, q_vanilla=q_blend[0])
    if regions is not None:
        check_shapes(query_region=(regions[0], (n, p)), key_region=(regions[1], (anchors, p)))
        if {region.dtype for region in regions} != {torch.int32}:
            raise ValueError(f"regions are of {regions[0].dtype} and {regions[1].dtype}: make them torch.int32")
    others = k, v, anchor_k, anchor_v, *([] if q_blend is None else [q_blend[0]])
    chosen = pick_backend(q, *others, backend=backend, fits=16 <= d <= 128)
    if chosen == "fused":
        from consistory.kernels.extended_attention import fused

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return fused.extended_attention(q, k, v, anchor_k, anchor_v, key_mask, share, q_blend, regions)
    if q_blend is not None:
        q_vanilla, weight = q_blend
        q = (1 - weight) * q + weight * q_vanilla  # eq. 4
    implementation = reference if chosen == "reference" else packed
    return implementation.extended_attention(q, k, v, anchor_k, anchor_v, key_mask, share, regions)
