"""Which patch of an anchor shows the same part of the subject: DIFT features -> nearest patches (§4.3, eqs. 8-9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from consistory.kernels.correspondence import match

from .attention import patches
from .masks import Size


@dataclass(frozen=True)
class Nearest:
    """For each image, anchor and patch: the anchor's most similar patch and the cosine distance to it, [N, A, P]."""

    index: Tensor
    distance: Tensor


def smooth(features: Tensor) -> Tensor:
    """3x3 Gaussian (sigma 1, zero padding) over each channel of [N, C, h, w]."""
    weights = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32, device=features.device) ** 2)
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).to(features.dtype)
    channels = features.shape[1]
    return F.conv2d(features, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


def nearest_patches(
    dift: Tensor, size: Size, subject_mask: Tensor, share: Tensor, anchor_dift: Tensor | None = None
) -> Nearest:
    """Eqs. 8-9: match every image's patches with the subject patches of every anchor.

    dift: [N, C, h, w] smoothed features, the A anchors' first.
    size: height and width in patches of the resolution to match at.
    subject_mask: bool [A or N, P]; an anchor with an empty one is at distance 2, the largest there is.
    share: bool [N, A], True where image i may draw from anchor a; all other distances are infinite.
    anchor_dift: [A, C, h, w] of recorded anchors, if they are not among the images.
    """
    anchors = share.shape[1]
    features = patches(F.interpolate(dift, size, mode="bilinear"))
    source = features if anchor_dift is None else patches(F.interpolate(anchor_dift, size, mode="bilinear"))
    index, distance = match(features, source[:anchors], subject_mask[:anchors])
    return Nearest(index, distance.masked_fill(~share[..., None], torch.inf))


def nearest_in_regions(dift: Tensor, size: Size, regions: Tensor, share: Tensor) -> Nearest:
    """`nearest_patches` where a patch draws only from the anchors' patches of the regions, bool [N, R, P], it is in.

    Patches in no region draw from all, as everywhere if R = 1.
    """
    found = [nearest_patches(dift, size, region, share) for region in regions.unbind(dim=1)]
    index, distance = (torch.stack(each) for each in zip(*((n.index, n.distance) for n in found), strict=True))
    draws = regions | ~regions.any(dim=1, keepdim=True)
    distance, region = distance.masked_fill(~draws.transpose(0, 1)[:, :, None], torch.inf).min(dim=0)
    return Nearest(index.gather(0, region[None]).squeeze(0), distance)
