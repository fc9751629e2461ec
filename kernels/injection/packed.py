"""Feature injection in plain PyTorch: the anchors one after the other, then all other images at once."""

import torch
from torch import Tensor


def inject(
    x: Tensor,
    source_index: Tensor,
    source_image: Tensor,
    inject_mask: Tensor,
    alpha: float,
    anchors: int,
    anchor_x: Tensor | None,
) -> Tensor:
    """Shapes as in `consistory.kernels.injection`. No step depends on the masks' contents, so nothing synchronises."""
    out = x.clone()
    sources, ordered = (out[:anchors], anchors) if anchor_x is None else (anchor_x, 0)
    for images in [slice(i, i + 1) for i in range(ordered)] + [slice(ordered, len(x))]:
        source = sources[source_image[images], source_index[images]]
        blended = alpha * source + (1 - alpha) * out[images]
        out[images] = torch.where(inject_mask[images][..., None], blended, out[images])
    return out
