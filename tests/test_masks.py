from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import randn
from skimage.filters import threshold_otsu
from torch import Tensor

from consistory.masks import Size, average_maps, concept_masks, draw_dropout, region_bits, subject_masks

SQUARE = {2: (16, 16), 4: (8, 8)}
WIDE = {2: (8, 20), 4: (4, 10)}


def bilinear(length: int, target: int) -> Tensor:
    """[target, length] weights of a bilinear resize: pixels are squares, and beyond the border it goes on as it is."""
    weights = torch.zeros(target, length, dtype=torch.float64)
    for row in range(target):
        position = min(max((row + 0.5) * length / target - 0.5, 0), length - 1)
        low = int(position)
        weights[row, low] += 1 - (position - low)
        weights[row, min(low + 1, length - 1)] += position - low
    return weights


def expected_mask(cross_map: Tensor, size: Size, target: Size) -> Tensor:
    """Eq. 7 for one image, [P, K] -> bool [P']: resize, scikit-image's threshold, union of the concepts."""
    mask = torch.zeros(target, dtype=torch.bool)
    for concept in cross_map.T:
        resized = bilinear(size[0], target[0]) @ concept.view(size).double() @ bilinear(size[1], target[1]).T
        mask |= resized > threshold_otsu(resized.numpy())
    return mask.flatten()


def blob(size: Size, rows: slice, columns: slice, height: float = 1.0) -> Tensor:
    """[P]: a rectangle on a background of 0."""
    picture = torch.zeros(size)
    picture[rows, columns] = height
    return picture.flatten()


@pytest.mark.parametrize("sizes", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("concepts", [1, 2])
def test_otsu_on_the_resized_map(sizes: dict[int, Size], concepts: int) -> None:
    h, w = sizes[4]
    cross_map = randn(3, h * w, concepts).softmax(dim=1)
    masks = subject_masks(cross_map, (h, w), sizes)
    assert masks.keys() == sizes.keys()
    for stride, size in sizes.items():
        expected = torch.stack([expected_mask(image, (h, w), size) for image in cross_map])
        assert masks[stride].dtype == torch.bool
        assert torch.equal(masks[stride], expected)


def test_concepts_are_thresholded_alone_and_then_joined() -> None:
    """A concept of faint attention counts as much as one of strong attention."""
    size = SQUARE[4]
    cat, hat = blob(size, slice(0, 3), slice(0, 3), 0.9), blob(size, slice(5, 8), slice(5, 8), 0.001)
    masks = subject_masks(torch.stack([cat, hat], dim=-1)[None], size, {4: size})
    assert torch.equal(masks[4][0], (cat > 0) | (hat > 0))


def test_masks_of_concepts_are_those_of_each_alone() -> None:
    h, w = WIDE[4]
    cross_map = randn(3, h * w, 3).softmax(dim=1)
    masks, union = (make(cross_map, (h, w), WIDE) for make in (concept_masks, subject_masks))
    for stride in WIDE:
        assert torch.equal(masks[stride].any(dim=1), union[stride])
        for k in range(3):
            alone = subject_masks(cross_map[..., k : k + 1], (h, w), WIDE)[stride]
            assert torch.equal(masks[stride][:, k], alone)
            assert not torch.equal(alone, union[stride])


def test_a_bit_for_each_region_of_a_patch_and_all_where_there_is_none() -> None:
    cat, hat = [True, True, False, False], [False, True, True, False]
    bits = region_bits(torch.tensor([[cat, hat]]))
    assert bits.dtype == torch.int32
    assert bits.tolist() == [[0b01, 0b11, 0b10, -1]]
    many = region_bits(torch.eye(31, dtype=torch.bool)[None])
    assert many.tolist() == [[2**k for k in range(31)]]


def test_rows_and_columns_keep_their_places() -> None:
    size = WIDE[4]
    subject = blob(size, slice(1, 2), slice(6, 9))
    masks = subject_masks(subject[None, :, None], size, WIDE)
    assert torch.equal(masks[4][0], subject > 0)
    rows, columns = masks[2][0].view(WIDE[2]).nonzero(as_tuple=True)
    assert set(rows.tolist()) == {2, 3}
    assert set(columns.tolist()) == set(range(12, 18))


def test_a_constant_map_gives_an_empty_mask() -> None:
    h, w = SQUARE[4]
    masks = subject_masks(torch.full((2, h * w, 2), 1 / 77), (h, w), SQUARE)
    assert not any(mask.any() for mask in masks.values())


def test_images_do_not_mix() -> None:
    h, w = SQUARE[4]
    cross_map = randn(3, h * w, 2).softmax(dim=1) * torch.tensor([1.0, 0.01, 100])[:, None, None]
    together = subject_masks(cross_map, (h, w), SQUARE)
    for i in range(3):
        alone = subject_masks(cross_map[i : i + 1], (h, w), SQUARE)
        assert all(torch.equal(alone[stride][0], together[stride][i]) for stride in SQUARE)


def test_average_is_over_the_history() -> None:
    history = [randn(2, 6, 3, seed=i) for i in range(4)]
    expected = np.mean([maps.double().numpy() for maps in history], axis=0)
    np.testing.assert_allclose(average_maps(history), expected, atol=1e-6)
    assert torch.equal(average_maps(history[:1]), history[0])


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = draw_dropout(7, 2, 3, 2, 50, 0.5)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(draw_dropout(7, 2, 3, 2, 50, 0.5), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw_dropout(8, 2, 3, 2, 50, 0.5), first)


def test_dropout_of_an_anchor_is_the_same_among_more_anchors() -> None:
    assert torch.equal(draw_dropout(7, 4, 5, 4, 30, 0.5)[:, :2], draw_dropout(7, 4, 5, 2, 30, 0.5))


@pytest.mark.parametrize("p", [0.15, 0.3, 0.5, 0.7])
def test_dropout_rate(p: float) -> None:
    kept = draw_dropout(0, 2, 10, 2, 4000, p)
    assert kept.shape == (10, 2, 4000)
    assert kept.dtype == torch.bool
    rates = 1 - kept.float().mean(dim=-1)  # of every step and anchor
    deviation = (p * (1 - p) / 4000) ** 0.5
    assert ((rates - p).abs() < 4 * deviation).all()


def test_dropout_of_nothing_and_of_all() -> None:
    assert draw_dropout(0, 2, 3, 2, 1000, 0.0).all()
    assert not draw_dropout(0, 2, 3, 2, 1000, 1.0).any()


def test_dropout_is_fresh_for_every_step_anchor_and_resolution() -> None:
    fine, coarse = (draw_dropout(3, stride, 4, 3, 4000, 0.5) for stride in (2, 4))
    draws = torch.cat([fine.flatten(0, 1), coarse.flatten(0, 1)]).double()
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlations.abs().max() < 5 / 4000**0.5


def test_a_higher_rate_drops_more_of_the_same() -> None:
    """Runs that differ only in the rate are comparable: what a lower rate drops, a higher one drops too."""
    low, high = draw_dropout(3, 2, 4, 2, 100, 0.3), draw_dropout(3, 2, 4, 2, 100, 0.5)
    assert (low | ~high).all()
