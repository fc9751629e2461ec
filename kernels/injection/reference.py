"""Feature injection as the method runs it: image after image, in place."""

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
    """Shapes as in `consistory.kernels.injection`."""
    out = x.clone()
    sources = out[:anchors] if anchor_x is None else anchor_x
    for image in range(len(x)):
        own, here = out[image], inject_mask[image]
        source = sources[source_image[image], source_index[image]]
        own[here] = alpha * source[here] + (1 - alpha) * own[here]
    return out
