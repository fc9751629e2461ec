"""Nearest patches: every backend against all distances in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import ALL, DEVICE, DTYPES, FAST, draw, draw_mask, needs_gpu, needs_triton, poisoned_memory
from torch import Tensor

from consistory.kernels.backends import Backend
from consistory.kernels.correspondence import match, packed


def distances(target: Tensor, source: Tensor) -> Tensor:
    """[T, P, C], [S, P, C] -> float64 [T, S, P, P]."""
    return 1 - torch.einsum("tpc,sqc->tspq", *(F.normalize(x.double(), dim=-1) for x in (target, source)))


def check(backend: Backend, target: Tensor, source: Tensor, mask: Tensor, tolerance: float) -> None:
    """The distance is the smallest, and the index is a kept patch at that distance: near ties may go either way."""
    with poisoned_memory():
        index, distance = match(target, source, mask, backend=backend)
    exact = distances(target, source).masked_fill(~mask[None, :, None], 2.0)
    assert (index.dtype, distance.dtype) == (torch.int64, torch.float32)
    assert index.shape == distance.shape == exact.shape[:3]
    torch.testing.assert_close(distance.double(), exact.amin(-1), atol=tolerance, rtol=0)
    chosen = exact.gather(-1, index[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, exact.amin(-1), atol=tolerance, rtol=0)


TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "targets, sources, patches, channels", [(3, 2, 70, 48), (1, 1, 33, 100), (2, 3, 64, 64), (2, 0, 9, 8)]
)
@pytest.mark.parametrize("backend", ALL)
def test_finds_the_nearest_patch(
    backend: Backend, targets: int, sources: int, patches: int, channels: int, dtype: torch.dtype
) -> None:
    target = draw((targets, patches, channels), dtype, seed=1)
    source = draw((sources, patches, channels), dtype, seed=2)
    check(backend, target, source, draw_mask((sources, patches), 0.4, seed=3), TOLERANCE[dtype])


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_without_the_masked_patches_or_with_them(kept: float) -> None:
    """Two ways to the same result: a CPU takes the first, other devices without Triton the second."""
    rows, source = (F.normalize(draw((n, 16), torch.float32, seed=n).cpu(), dim=-1) for n in (7, 50))
    mask = torch.rand(50, generator=torch.Generator().manual_seed(1)) < kept
    (index, distance), (other_index, other_distance) = (
        nearest(rows, source, mask) for nearest in (packed.nearest_kept, packed.nearest_of)
    )
    assert torch.equal(index, other_index)
    torch.testing.assert_close(distance, other_distance)


@pytest.mark.parametrize("backend", ALL)
def test_masks_of_every_kind(backend: Backend) -> None:
    """None, all, the first and the last patch of a source."""
    mask = torch.zeros(4, 40, dtype=torch.bool, device=DEVICE)
    mask[1], mask[2, 0], mask[3, -1] = True, True, True
    target, source = draw((2, 40, 32), torch.float32, seed=1), draw((4, 40, 32), torch.float32, seed=2)
    check(backend, target, source, mask, tolerance=1e-6)
    index, distance = match(target, source, mask, backend=backend)
    assert (index[:, 0] == 0).all() and (distance[:, 0] == 2).all()
    assert (index[:, 2] == 0).all() and (index[:, 3] == 39).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_ties_go_to_the_lowest_index(backend: Backend, dtype: torch.dtype) -> None:
    """The same 50 patches three times over, the first ten of them masked.

    Whole numbers, whose products are the same in whatever order a matrix library adds them up.
    """
    once = (4 * draw((1, 50, 32), dtype, seed=1)).round()
    source = once.repeat(1, 3, 1)
    mask = torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    mask[:, :10] = False
    index, distance = match(source, source, mask, backend=backend)
    lowest = torch.arange(50, device=DEVICE)
    lowest[:10] += 50
    assert torch.equal(index[0, 0], lowest.repeat(3))
    assert distance.abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ALL)
def test_opposite_patches_are_matched_all_the_same(backend: Backend) -> None:
    """At the largest distance, the lowest index is that of a patch under the mask."""
    source = torch.ones(1, 20, 32, device=DEVICE)
    mask = (torch.arange(20, device=DEVICE) >= 7)[None]
    index, distance = match(-source, source, mask, backend=backend)
    assert (index == 7).all()
    torch.testing.assert_close(distance, torch.full_like(distance, 2))


@pytest.mark.parametrize("backend", ALL)
def test_the_length_of_a_feature_does_not_matter(backend: Backend) -> None:
    target, source = draw((1, 30, 32), torch.float32, seed=1), draw((1, 30, 32), torch.float32, seed=2)
    mask = torch.ones(1, 30, dtype=torch.bool, device=DEVICE)
    scale = torch.linspace(0.1, 50, 30, device=DEVICE)[:, None]
    index, distance = match(target, source, mask, backend=backend)
    scaled_index, scaled_distance = match(target * scale, source * scale, mask, backend=backend)
    assert torch.equal(index, scaled_index)
    torch.testing.assert_close(distance, scaled_distance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_a_patch_without_features_is_at_distance_one(backend: Backend) -> None:
    target, source = draw((1, 20, 16), torch.float32, seed=1), draw((1, 20, 16), torch.float32, seed=2)
    target[0, 3] = 0
    _, distance = match(target, source, torch.ones(1, 20, dtype=torch.bool, device=DEVICE), backend=backend)
    assert distance[0, 0, 3] == 1


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = draw((3, 41, 16), torch.float32, seed=1), draw((2, 41, 16), torch.float32, seed=2)
    mask = draw_mask((2, 41), 0.5, seed=3)
    whole = match(target, source, mask, backend="packed")
    monkeypatch.setattr(packed, "SLAB", 100)
    slabs = match(target, source, mask, backend="packed")
    assert torch.equal(whole[0], slabs[0])
    torch.testing.assert_close(whole[1], slabs[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "backend, side", [("reference", 24), ("packed", 24), pytest.param("fused", 8, marks=needs_triton)]
)
def test_recorded_matches(backend: Backend, side: int, golden: Any) -> None:
    tensors, _ = golden("algo_units")
    features = F.interpolate(tensors["smooth/out"], side, mode="bilinear").flatten(2).transpose(1, 2).to(DEVICE)
    index, distance = match(features, features, tensors[f"nn/mask{side}"].to(DEVICE), backend=backend)
    others = ~torch.eye(len(features), dtype=torch.bool)  # an image is not matched with itself in the recording
    assert torch.equal(index.cpu()[others], tensors[f"nn/cyclic_map{side}"][others])
    torch.testing.assert_close(distance.cpu()[others], tensors[f"nn/cyclic_dist{side}"][others], atol=1e-6, rtol=0)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdxl_shapes_on_a_gpu(dtype: torch.dtype) -> None:
    target, source = draw((3, 1024, 1280), dtype, seed=1), draw((2, 1024, 1280), dtype, seed=2)
    check("fused", target, source, draw_mask((2, 1024), 0.3, seed=3), TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("backend", FAST)
def test_nothing_waits_for_the_gpu(backend: Backend) -> None:
    target, source = draw((2, 64, 64), torch.float16, seed=1), draw((2, 64, 64), torch.float16, seed=2)
    mask = draw_mask((2, 64), 0.3, seed=3)
    match(target, source, mask, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        match(target, source, mask, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
