"""Feature injection in Triton: one launch, although the images depend on each other.

A blended patch of image i is (1 - alpha) of itself and alpha of its source; where the source belongs to an anchor that
is blended before i, that source is a blend in turn. Anchors come in order, so such a chain visits each at most once.
Every program follows the chains of its own patches through the unblended features: none waits for another.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel is called with has no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

PATCHES, CHANNELS = 32, 128


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
    images, patches, channels = x.shape
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    recorded = anchor_x is not None
    inject_kernel[(triton.cdiv(patches, PATCHES), triton.cdiv(channels, CHANNELS), images)](
        x, anchor_x.contiguous() if anchor_x is not None else x, source_index.contiguous(), source_image.contiguous(),
        inject_mask.contiguous().view(torch.uint8), out, alpha, patches, channels,
        LINKS=1 if recorded else anchors + 1, RECORDED=recorded,
        PATCHES=PATCHES, CHANNELS=CHANNELS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def inject_kernel(
    x_ptr, anchor_ptr, source_index_ptr, source_image_ptr, mask_ptr, out_ptr, alpha, patches, channels,
    LINKS: tl.constexpr, RECORDED: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program a block of patches, a block of channels and an image."""
    target = tl.program_id(2)
    row = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside, column_inside = row < patches, (column < channels)[None, :]
    place = target.to(tl.int64) * patches + row

    # A chain stands at patch `at` of `image` and has weight `left` for what it leads to. It ends where no blend is.
    at, image = place, tl.zeros([PATCHES], tl.int64) + target
    left = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, alpha, 0.0)
    x = tl.load(x_ptr + at[:, None] * channels + column[None, :], mask=inside[:, None] & column_inside, other=0.0)
    total = (1 - left)[:, None] * x.to(tl.float32)
    for _ in tl.static_range(LINKS):
        going = left > 0
        source = tl.load(source_image_ptr + at, mask=going, other=0)
        at = source * patches + tl.load(source_index_ptr + at, mask=going, other=0)
        source_ptr = anchor_ptr if RECORDED else x_ptr
        x = tl.load(
            source_ptr + at[:, None] * channels + column[None, :], mask=going[:, None] & column_inside, other=0.0
        )
        further = tl.zeros([PATCHES], tl.float32)
        if not RECORDED:
            before = going & (source < image)
            further = tl.where(tl.load(mask_ptr + at, mask=before, other=0) != 0, left * alpha, 0.0)
        total += (left - further)[:, None] * x.to(tl.float32)
        left, image = further, source
    out_ptr += place[:, None] * channels + column[None, :]
    tl.store(out_ptr, total.to(x.dtype), mask=inside[:, None] & column_inside)
