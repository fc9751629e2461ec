from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import randn
from skimage.filters import threshold_otsu
from torch import Tensor

from consistory.correspondence import Nearest
from consistory.injection import Injection, plan_injection


def nearest(images: int, anchors: int, patches: int) -> Nearest:
    """Random matches: distances in [0, 1], an anchor's to itself infinite."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(patches, (images, anchors, patches), generator=generator)
    distance = torch.rand(images, anchors, patches, generator=generator)
    own = torch.eye(images, anchors, dtype=torch.bool)
    return Nearest(index, distance.masked_fill(own[..., None], torch.inf))


def every_patch(images: int, patches: int) -> Tensor:
    return torch.ones(images, patches, dtype=torch.bool)


# --- where from, where to (eq. 5) -------------------------------------------------------------------------------------


def test_each_patch_draws_from_its_nearest_anchor() -> None:
    found = nearest(5, 3, 40)
    plan = plan_injection(found, every_patch(5, 40), 0.8)
    assert plan.anchors == 3
    assert plan.alpha == 0.8
    for i in range(5):
        for p in range(40):
            anchor = int(found.distance[i, :, p].argmin())
            assert plan.anchor[i, p] == anchor != i
            assert plan.index[i, p] == found.index[i, anchor, p]


def test_only_similar_subject_patches_take_part() -> None:
    """Similar: below Otsu's threshold of all the image's distances, those outside its mask included."""
    found, mask = nearest(4, 2, 60), randn(4, 60, seed=1) > 0
    plan = plan_injection(found, mask, 0.8)
    for i in range(4):
        best = found.distance[i].min(dim=0).values
        similar = best < threshold_otsu(best.numpy())
        assert torch.equal(plan.mask[i], mask[i] & similar)
        assert 0 < plan.mask[i].sum() < mask[i].sum()


def test_each_image_has_a_threshold_of_its_own() -> None:
    found = nearest(4, 2, 60)
    distance = found.distance * torch.tensor([1, 0.01, 1, 0.1])[:, None, None]
    plan = plan_injection(Nearest(found.index, distance), every_patch(4, 60), 0.8)
    alike = plan_injection(found, every_patch(4, 60), 0.8)
    assert torch.equal(plan.mask[[0, 2]], alike.mask[[0, 2]])
    assert (plan.mask != alike.mask).float().mean() < 0.01  # a threshold moves with the scale, up to rounding


def test_a_single_image_has_no_source() -> None:
    plan = plan_injection(nearest(1, 1, 20), every_patch(1, 20), 0.8)
    x = randn(1, 20, 3)
    assert not plan.mask.any()
    assert torch.equal(plan(x), x)


def test_a_single_anchor_only_gives() -> None:
    plan = plan_injection(nearest(3, 1, 20), every_patch(3, 20), 0.8)
    x = randn(3, 20, 3)
    out = plan(x)
    assert torch.equal(out[0], x[0])
    assert not torch.equal(out[1], x[1])
    assert not torch.equal(out[2], x[2])


@pytest.mark.parametrize("distance", [0.3, 2.0])
def test_equal_distances_inject_nothing(distance: float) -> None:
    """2: no anchor shows the subject at all."""
    distances = torch.tensor([torch.inf, distance])[:, None, None].expand(2, 1, 20)
    plan = plan_injection(Nearest(nearest(2, 1, 20).index, distances), every_patch(2, 20), 0.8)
    assert not plan.mask.any()


# --- the blend (eq. 6) ------------------------------------------------------------------------------------------------


def test_blend_written_out() -> None:
    """Image after image, in place: the second anchor draws from the first as it is by then."""
    plan, x = plan_injection(nearest(4, 2, 30), randn(4, 30, seed=1) > -0.5, 0.7), randn(4, 30, 5)
    expected = x.clone()
    for i in range(4):
        for p in range(30):
            if plan.mask[i, p]:
                source = expected[plan.anchor[i, p], plan.index[i, p]].clone()
                expected[i, p] = 0.7 * source + 0.3 * expected[i, p]
    torch.testing.assert_close(plan(x), expected, atol=1e-6, rtol=0)


def test_anchors_agree_instead_of_swapping() -> None:
    """Two anchors that draw from each other: all at once they would trade places, 0.8 apart as before."""
    x = torch.tensor([0.0, 1.0, 5.0]).view(3, 1, 1)
    anchor, index = torch.tensor([[1], [0], [1]]), torch.zeros(3, 1, dtype=torch.int64)
    injection = Injection(anchor, index, every_patch(3, 1), 0.8, anchors=2)
    first = 0.8 * 1 + 0.2 * 0
    second = 0.8 * first + 0.2 * 1
    third = 0.8 * second + 0.2 * 5
    torch.testing.assert_close(injection(x).flatten(), torch.tensor([first, second, third]))


def test_its_input_stays_as_it_was() -> None:
    plan, x = plan_injection(nearest(3, 2, 30), every_patch(3, 30), 0.8), randn(3, 30, 5)
    before = x.clone()
    assert not torch.equal(plan(x), before)
    assert torch.equal(x, before)


# --- recorded runs ----------------------------------------------------------------------------------------------------


def test_equals_the_recorded_injection(golden: Any) -> None:
    units, facts = golden("algo_units")
    found = Nearest(units["inject/nn_map64"][:, :2].long(), units["inject/nn_dist64"][:, :2])
    plan = plan_injection(found, units["inject/mask64"], 0.8)
    assert plan.mask.double().mean(dim=1).tolist() == facts["inject"]["changed_frac"]
    torch.testing.assert_close(plan(units["inject/in"]), units["inject/out"], atol=1e-6, rtol=0)


def test_thresholds_of_a_recorded_run(golden: Any) -> None:
    tensors, _ = golden("case1b_batch_n19")
    distance = tensors["nn/nn_dist64"][:, :2]
    found = Nearest(tensors["nn/nn_map64"][:, :2].long(), distance)
    mask = tensors["pass1/mask64_step18"]
    expected = mask & (distance.amin(dim=1) < tensors["pass2/dist_thr"][:, None])
    assert torch.equal(plan_injection(found, mask, 0.8).mask, expected)
