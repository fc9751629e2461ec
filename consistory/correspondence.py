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

    def among(self, share: Tensor) -> Nearest:
        """The same with anchors that an image does not read infinitely far from it. share: bool [N, A]."""
        return Nearest(self.index, self.distance.masked_fill(~share[..., None], torch.inf))


def smooth(features: Tensor) -> Tensor:
    """3x3 Gaussian (sigma 1, zero padding) over each channel of [N, C, h, w]."""
    weights = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], device=features.device) ** 2)
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).to(features.dtype)
    channels = features.shape[1]
    return F.conv2d(features, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


def nearest_patches(dift: Tensor, size: Size, subject_mask: Tensor, anchors: int) -> Nearest:
    """Eqs. 8-9: match every image's patches with the subject patches of every anchor.

    dift: [N, C, h, w] smoothed features. size: height and width in patches of the resolution to match at.
    subject_mask: bool [N, P]; an anchor's patches outside its mask count as distance 2, the largest there is.
    An anchor is never its own source: its distances to itself are infinite.
    """
    features = patches(F.interpolate(dift, size, mode="bilinear"))
    index, distance = match(features, features[:anchors], subject_mask[:anchors])
    own = torch.eye(len(dift), anchors, dtype=torch.bool, device=dift.device)
    return Nearest(index, distance.masked_fill(own[..., None], torch.inf))
