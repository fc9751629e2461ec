"""Extended attention in plain PyTorch: the kept keys are packed, so the work is proportional to their number."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def extended_attention(
    q: Tensor, k: Tensor, v: Tensor, anchor_k: Tensor, anchor_v: Tensor, key_mask: Tensor, share: Tensor
) -> Tensor:
    """Shapes as in `consistory.kernels.extended_attention`.

    Packing needs the number of kept keys on the host. On a CPU that is free; on any other device it would stall the
    queue, so there the keys stay where they are and a mask hides those that are not read.
    """
    attend = attend_packed if q.device.type == "cpu" else attend_masked
    return attend(q, k, v, anchor_k, anchor_v, key_mask, share)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, anchor_k: Tensor, anchor_v: Tensor, key_mask: Tensor, share: Tensor
) -> Tensor:
    """One call for each guidance half and run of images that read the same anchors.

    When anchors see each other and all others see the anchors, that is A + 1 runs however many images there are.
    """
    halves, images, heads, patches, head_size = q.shape
    out = q.new_empty(halves, images, patches, heads, head_size).transpose(2, 3)
    for run in _runs(share):
        anchor, patch = (share[run.start, :, None] & key_mask).nonzero(as_tuple=True)
        for half in range(halves):
            joined_k = _join(k[half, run], anchor_k[half], anchor, patch)
            joined_v = _join(v[half, run], anchor_v[half], anchor, patch)
            out[half, run] = scaled_dot_product_attention(q[half, run], joined_k, joined_v)
    return out


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
    q: Tensor, k: Tensor, v: Tensor, anchor_k: Tensor, anchor_v: Tensor, key_mask: Tensor, share: Tensor
) -> Tensor:
    """One call over all keys of all anchors, those not read under a mask. Nothing is skipped, nothing synchronises."""
    halves, images, _, patches, _ = q.shape
    reads = (share[:, :, None] & key_mask).flatten(1)  # [N, A * P]
    mask = torch.cat([reads.new_ones(images, patches), reads], dim=1)

    def join(own: Tensor, anchors: Tensor) -> Tensor:
        everyone = anchors.transpose(1, 2).flatten(2, 3)[:, None].expand(-1, images, -1, -1, -1)
        return torch.cat([own, everyone], dim=3)

    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, join(k, anchor_k), join(v, anchor_v)))
    return scaled_dot_product_attention(flat_q, flat_k, flat_v, mask.repeat(halves, 1)[:, None, None]).view_as(q)
