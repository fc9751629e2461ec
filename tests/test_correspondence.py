from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import randn
from skimage.filters import gaussian
from torch import Tensor

from consistory.correspondence import nearest_in_regions, nearest_patches, smooth


def every_patch(images: int, patches: int) -> Tensor:
    return torch.ones(images, patches, dtype=torch.bool)


def share(images: int, anchors: int) -> Tensor:
    """Everybody reads every anchor but itself."""
    return ~torch.eye(images, anchors, dtype=torch.bool)


# --- smoothing --------------------------------------------------------------------------------------------------------


def test_smoothing_equals_the_recorded_one(golden: Any) -> None:
    units, _ = golden("algo_units")
    torch.testing.assert_close(smooth(units["smooth/in"]), units["smooth/out"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(5, 9), (1, 4), (16, 16)], ids=str)
def test_smoothing_is_a_gaussian_of_three_by_three(size: tuple[int, int]) -> None:
    features = randn(2, 3, *size)
    expected = torch.stack([
        torch.from_numpy(gaussian(channel.numpy(), sigma=1, truncate=1, mode="constant", cval=0))
        for channel in features.flatten(0, 1)
    ])  # fmt: skip
    torch.testing.assert_close(smooth(features).flatten(0, 1), expected, atol=1e-6, rtol=0)


def test_smoothing_keeps_the_dtype() -> None:
    features = randn(1, 2, 6, 6)
    half = smooth(features.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), smooth(features), atol=0.02, rtol=0)


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 24])
@pytest.mark.parametrize("anchors", [2, 3])
def test_matches_equal_the_recorded_ones(golden: Any, side: int, anchors: int) -> None:
    units, _ = golden("algo_units")
    nearest = nearest_patches(units["smooth/out"], (side, side), units[f"nn/mask{side}"], share(3, anchors))
    index = units[f"nn/cyclic_map{side}"][:, :anchors]
    distance = units[f"nn/cyclic_dist{side}"][:, :anchors]
    other = share(3, anchors)
    assert torch.equal(nearest.index[other], index[other])
    torch.testing.assert_close(nearest.distance, distance, atol=1e-5, rtol=0)
    if anchors == 2:  # recorded for the third image alone, against two anchors
        assert torch.equal(nearest.index[2:], units[f"nn/anchor_map{side}"])
        torch.testing.assert_close(nearest.distance[2:], units[f"nn/anchor_dist{side}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (1, 20)], ids=str)
def test_planted_matches_are_found(size: tuple[int, int]) -> None:
    """The second image has the first one's patches in another order, twice as bright: cosines do not see the scale."""
    h, w = size
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    first = randn(5, h * w)
    dift = torch.stack([first, 2 * first[:, order]]).view(2, 5, h, w)
    nearest = nearest_patches(dift, size, every_patch(2, h * w), share(2, 2))
    assert nearest.index.shape == nearest.distance.shape == (2, 2, h * w)
    assert torch.equal(nearest.index[1, 0], order)
    assert torch.equal(nearest.index[0, 1], order.argsort())
    off_diagonal = torch.stack([nearest.distance[0, 1], nearest.distance[1, 0]])
    torch.testing.assert_close(off_diagonal, torch.zeros(2, h * w), atol=1e-6, rtol=0)


def test_every_pair_written_out() -> None:
    """Three images, two anchors, half the resolution of the features: a bilinear resize by 2 averages 2x2 patches."""
    dift, size, patches = randn(3, 6, 8, 12), (4, 6), 24
    mask = randn(3, patches, seed=1) > 0.3
    nearest = nearest_patches(dift, size, mask, share(3, 2))
    features = F.avg_pool2d(dift, 2).flatten(2)
    for i in range(3):
        for j in range(2):
            if i == j:
                continue
            for p in range(patches):
                distance = 1 - torch.cosine_similarity(features[i, :, p, None], features[j], dim=0)
                distance[~mask[j]] = 2
                torch.testing.assert_close(nearest.distance[i, j, p], distance.min(), atol=1e-6, rtol=0)
                assert nearest.index[i, j, p] == distance.argmin()


def test_images_draw_from_the_anchors_that_they_share() -> None:
    """All others are infinitely far away: an anchor is never its own source."""
    shared = share(4, 3)
    shared[3, 1] = False
    nearest = nearest_patches(randn(4, 3, 4, 4), (4, 4), every_patch(4, 16), shared)
    assert torch.equal(nearest.distance.isfinite(), shared[..., None].expand(4, 3, 16))


def test_only_subject_patches_are_matched() -> None:
    mask = randn(3, 16, seed=1) > 0.5
    nearest = nearest_patches(randn(3, 4, 4, 4), (4, 4), mask, share(3, 2))
    assert mask[0][nearest.index[1:, 0]].all()
    assert mask[1][nearest.index[::2, 1]].all()


def test_a_source_without_a_subject_is_as_far_as_can_be() -> None:
    mask = every_patch(3, 16)
    mask[1] = False
    nearest = nearest_patches(randn(3, 4, 4, 4), (4, 4), mask, share(3, 2))
    assert (nearest.distance[0, 1] == 2).all()
    assert (nearest.distance[2, 1] == 2).all()
    assert (nearest.distance[2, 0] < 2).all()


def test_masks_of_targets_do_not_count() -> None:
    """All patches of an image are matched, and images that are no anchors are no sources."""
    dift, mask = randn(3, 4, 4, 4), every_patch(3, 16)
    without = mask.clone()
    without[2] = False
    nearest, other = (nearest_patches(dift, (4, 4), m, share(3, 2)) for m in (mask, without))
    assert torch.equal(nearest.index, other.index)
    assert torch.equal(nearest.distance, other.distance)


# --- regions ----------------------------------------------------------------------------------------------------------


def test_patches_draw_from_their_own_regions() -> None:
    """Pair after pair: a patch in both regions draws from both, a patch in none from all."""
    dift, size, patches = randn(4, 6, 4, 6), (4, 6), 24
    regions = randn(4, 2, patches, seed=1) > 0
    regions[1, 1] = False  # an anchor without the second subject
    nearest = nearest_in_regions(dift, size, regions, share(4, 2))
    features = dift.flatten(2)
    assert {int(patch) for patch in regions.sum(dim=1).unique()} == {0, 1, 2}
    for i in range(4):
        for j in range(2):
            if i == j:
                assert nearest.distance[i, j].isinf().all()
                continue
            for p in range(patches):
                mine = regions[i, :, p] if regions[i, :, p].any() else torch.ones(2, dtype=torch.bool)
                source = regions[j, mine].any(dim=0)
                distance = 1 - torch.cosine_similarity(features[i, :, p, None], features[j], dim=0)
                distance[~source] = 2
                torch.testing.assert_close(nearest.distance[i, j, p], distance.min(), atol=1e-6, rtol=0)
                if source.any():
                    assert nearest.index[i, j, p] == distance.argmin()


def test_a_single_region_is_the_subject_mask() -> None:
    dift, mask = randn(3, 4, 4, 4), randn(3, 16, seed=1) > 0
    one = nearest_in_regions(dift, (4, 4), mask[:, None], share(3, 2))
    other = nearest_patches(dift, (4, 4), mask, share(3, 2))
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.distance, other.distance)
