"""Extended attention in plain PyTorch: the kept keys are packed, so the work is proportional to their number."""

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
    """One call for each distinct row of `share`: A + 1 when anchors see each other and all others see the anchors."""
    out = torch.empty_like(q)
    like = (share[:, None] == share).all(-1).int().argmax(-1)  # [N]: the first image that reads the same anchors
    for first in like.unique():
        images = (like == first).nonzero()[:, 0]
        anchor, patch = (share[first, :, None] & key_mask).nonzero(as_tuple=True)
        joined_k = _join(k[:, images], anchor_k, anchor, patch)
        joined_v = _join(v[:, images], anchor_v, anchor, patch)
        out[:, images] = _sdpa(q[:, images], joined_k, joined_v)
    return out


def _join(own: Tensor, anchors: Tensor, anchor: Tensor, patch: Tensor) -> Tensor:
    """own [G, n, H, P, d] and the packed rows (anchor, patch) of anchors [G, A, H, P, d] -> [G, n, H, P + kept, d]."""
    kept = anchors.transpose(2, 3)[:, anchor, patch].transpose(1, 2)  # [G, H, kept, d]
    return torch.cat([own, kept[:, None].expand(-1, own.shape[1], -1, -1, -1)], dim=3)


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

    return _sdpa(q, join(k, anchor_k), join(v, anchor_v), mask[None, :, None, None].expand(halves, -1, -1, -1, -1))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [G, n, H, P, d] tensors: guidance halves and images are one batch axis."""
    mask = None if mask is None else mask.flatten(0, 1)
    return scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).view_as(q)
