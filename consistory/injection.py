"""Feature injection (§4.3, eqs. 5-6): blend corresponding anchor features into self-attention outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from consistory.kernels.injection import inject
from consistory.kernels.otsu import otsu_threshold

from .correspondence import Nearest


@dataclass(frozen=True)
class Injection:
    """Where features come from and go to, fixed for the whole second pass.

    anchor, index: [N, P] the anchor that each patch draws from, and which of its patches.
    mask: bool [N, P] patches that are replaced.  alpha: weight of the injected feature.
    anchors: how many there are.
    """

    anchor: Tensor
    index: Tensor
    mask: Tensor
    alpha: float
    anchors: int

    def __call__(self, x: Tensor, anchor_x: Tensor | None = None) -> Tensor:
        """Eq. 6 on the conditional images' x_out [N, P, C]: alpha x_source + (1 - alpha) x, anchors first, in order.

        anchor_x: [A, P, C] of recorded anchors, none of which is among the images.
        """
        return inject(x, self.index, self.anchor, self.mask, self.alpha, self.anchors, anchor_x)


def plan_injection(nearest: Nearest, subject_mask: Tensor, alpha: float) -> Injection:
    """Eq. 5: each patch draws from the anchor with the smallest distance; only similar subject patches take part.

    Similar means a distance below Otsu's threshold of all the image's distances. subject_mask: bool [N, P].
    """
    distance, anchor = nearest.distance.min(dim=1)
    index = nearest.index.gather(1, anchor[:, None]).squeeze(1)
    similar = distance < otsu_threshold(distance)[:, None]
    return Injection(anchor, index, subject_mask & similar, alpha, anchors=nearest.index.shape[1])
