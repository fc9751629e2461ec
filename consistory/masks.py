"""Where the subject is: cross-attention maps -> Otsu -> subject masks (§4.1, eq. 7) -> dropout (§4.2)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from consistory.kernels.otsu import otsu_threshold

Size = tuple[int, int]  # height, width in patches


def subject_masks(cross_map: Tensor, size: Size, sizes: dict[int, Size]) -> dict[int, Tensor]:
    """Eq. 7: threshold each concept's map by Otsu's method, at every attended resolution, and join the concepts.

    cross_map: [N, P, K] probability that a patch attends to concept k, averaged over layers and steps.
    size: height and width of its P patches.  sizes: the same for every stride to make a mask for.
    Returns {stride: bool [N, P]}. A constant map gives an empty mask.
    """
    return {stride: masks.any(dim=1) for stride, masks in concept_masks(cross_map, size, sizes).items()}


def concept_masks(cross_map: Tensor, size: Size, sizes: dict[int, Size]) -> dict[int, Tensor]:
    """Eq. 7 for every concept by itself: arguments of `subject_masks` -> {stride: bool [N, K, P]}."""
    maps = cross_map.unflatten(1, size).permute(0, 3, 1, 2)  # [N, K, h, w]
    return {stride: _threshold(F.interpolate(maps, s, mode="bilinear")) for stride, s in sizes.items()}


def _threshold(maps: Tensor) -> Tensor:
    """[N, K, h, w] -> bool [N, K, P]."""
    flat = maps.flatten(2)
    return flat > otsu_threshold(flat)[..., None]


def region_bits(regions: Tensor) -> Tensor:
    """bool [N, R, P] -> int32 [N, P], bit r: the patch is in region r. A patch in none has all bits."""
    bit = 2 ** torch.arange(regions.shape[1], dtype=torch.int32, device=regions.device)
    bits = (regions * bit[:, None]).sum(dim=1, dtype=torch.int32)
    return bits.masked_fill(bits == 0, -1)


def average_maps(history: list[Tensor]) -> Tensor:
    """Mean over recorded steps of maps [N, P, K]."""
    return torch.stack(history).mean(dim=0)


def draw_dropout(seed: int, stride: int, steps: int, anchors: int, patches: int, p: float) -> Tensor:
    """Which keys survive mask dropout (§4.2): bool [steps, A, P], each True with probability 1 - p.

    Every anchor and resolution has a CPU generator of its own, so the draws depend on the seed alone: not on the
    device, nor on how many images there are, nor on what else draws random numbers.
    """
    generators = [generator_for(seed, stride, anchor) for anchor in range(anchors)]
    draws = [torch.rand(steps, patches, generator=each, dtype=torch.float32, device="cpu") for each in generators]
    return torch.stack(draws, dim=1) >= p


def generator_for(seed: int, *key: int) -> torch.Generator:
    """A CPU generator of its own for every key: draws for different keys are independent."""
    words = np.random.SeedSequence([seed, *key]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
