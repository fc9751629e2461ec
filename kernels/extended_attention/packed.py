"""Extended attention in plain PyTorch: the kept keys are packed, so the work is proportional to their number."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Regions = tuple[Tensor, Tensor]  # of queries [N, P] and of keys [A, P]


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor,
    anchor_v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    regions: Regions | None = None,
) -> Tensor:
    """Shapes as in `consistory.kernels.extended_attention`.

    Packing needs the number of kept keys on the host. On a CPU that is free; on any other device it would stall the
    queue, so there the keys stay where they are and a mask hides those that are not read.
    """
    attend = attend_packed if q.device.type == "cpu" else attend_masked
    return attend(q, k, v, anchor_k, anchor_v, key_mask, share, regions)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor,
    anchor_v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    regions: Regions | None = None,
) -> Tensor:
    """One call for each guidance half and group of queries that read the same keys."""
    halves, images, heads, patches, head_size = q.shape
    out = q.new_empty(halves, images, patches, heads, head_size).transpose(2, 3)
    for run, queries, reads in _groups(key_mask, share, regions):
        anchor, patch = reads.nonzero(as_tuple=True)
        for half in range(halves):
            joined_k = _join(k[half, run], anchor_k[half], anchor, patch)
            joined_v = _join(v[half, run], anchor_v[half], anchor, patch)
            some = q[half, run][:, :, queries]
            out[half, run][:, :, queries] = scaled_dot_product_attention(some, joined_k, joined_v)
    return out


def _groups(key_mask: Tensor, share: Tensor, regions: Regions | None) -> Iterator[tuple[slice, slice | Tensor, Tensor]]:
    """Images, which of their queries, and the keys bool [A, P] that these read.

    Without regions a group is a run of images. When anchors see each other and all others see the anchors, that is
    A + 1 runs however many images there are. With regions it is an image's queries that are in the same ones.
    """
    if regions is None:
        for run in _runs(share):
            yield run, slice(None), share[run.start, :, None] & key_mask
        return
    query_region, key_region = regions
    for image, region in enumerate(query_region):
        for bits in region.unique():
            reads = share[image, :, None] & key_mask & (key_region & bits != 0)
            yield slice(image, image + 1), (region == bits).nonzero()[:, 0], reads


def _runs(share: Tensor) -> list[slice]:
    """Consecutive images whose rows of `share` [N, A] are equal."""
    changes = (share[1:] != share[:-1]).any(dim=1).nonzero()[:, 0] + 1
    return [slice(first, last) for first, last in pairwise([0, *changes.tolist(), len(share)])]


def _join(own: Tensor, anchors: Tensor, anchor: Tensor, patch: Tensor) -> Tensor:
    """own [n, H, P, d] and rows (anchor, patch) of anchors [A, H, P, d] -> [n, H, P + kept, d].

    In memory the heads come after the patches, as in the UNet: whole rows are copied.
    """
    kept = anchors.transpose(1, 2)[anchor, patch]  # [kept, H, d]
    return torch.cat([own.transpose(1, 2), kept.expand(len(own), -1, -1, -1)], dim=1).transpose(1, 2)


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor,
    anchor_v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    regions: Regions | None = None,
) -> Tensor:
    """One call over all keys of all anchors, those not read under a mask. Nothing is skipped, nothing synchronises."""
    halves, images, _, patches, _ = q.shape
    reads = (share[:, :, None] & key_mask).flatten(1)[:, None]  # [N, 1, A * P]
    if regions is not None:
        query_region, key_region = regions
        reads = reads & (query_region[:, :, None] & key_region.flatten() != 0)  # [N, P, A * P]
    mask = torch.cat([reads.new_ones(*reads.shape[:2], patches), reads], dim=2)

    def join(own: Tensor, anchors: Tensor) -> Tensor:
        everyone = anchors.transpose(1, 2).flatten(2, 3)[:, None].expand(-1, images, -1, -1, -1)
        return torch.cat([own, everyone], dim=3)

    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, join(k, anchor_k), join(v, anchor_v)))
    return scaled_dot_product_attention(flat_q, flat_k, flat_v, mask.repeat(halves, 1, 1)[:, None]).view_as(q)
