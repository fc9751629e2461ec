"""Otsu's threshold against scikit-image and recorded thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, generator, needs_gpu
from skimage.filters import threshold_otsu

from consistory.kernels.otsu import otsu_threshold


def maps(rows: int, values: int, seed: int) -> torch.Tensor:
    """float64 [rows, values]: two overlapping classes, of other shares, distances and scales in every row."""
    draws = generator(seed)
    share, distance, scale = (torch.rand(rows, 1, generator=draws, dtype=torch.float64) for _ in range(3))
    x = torch.randn(rows, values, generator=draws, dtype=torch.float64)
    upper = torch.rand(rows, values, generator=draws, dtype=torch.float64) < share
    return (x + 8 * distance * upper) * 10 ** (4 * scale - 3)


@pytest.mark.parametrize("values", [5, 64, 1000, 4096])
def test_equals_scikit_image(values: int) -> None:
    x = maps(50, values, seed=values)
    expected = [threshold_otsu(row.numpy()) for row in x]
    assert otsu_threshold(x.to(DEVICE)).tolist() == expected


@pytest.mark.parametrize("values", [64, 1000, 4096])
def test_equals_scikit_image_in_float32(values: int) -> None:
    """scikit-image takes the histogram: numpy's own of a float32 array differs between its major versions."""
    x = maps(50, values, seed=values).float()
    expected = []
    for row in x.numpy():
        edges = np.linspace(float(row.min()), float(row.max()), 257).astype(np.float32)
        counts, _ = np.histogram(row, bins=edges)
        middle = (edges[:-1] + edges[1:]) / 2
        expected.append(threshold_otsu(hist=(counts.astype(np.float64), middle.astype(np.float64))))
    assert otsu_threshold(x.to(DEVICE)).tolist() == expected


def test_recorded_thresholds(golden: Any) -> None:
    tensors, facts = golden("algo_units")
    recorded = [fact for fact in facts["otsu"] if "value" in fact]
    assert recorded
    for fact in recorded:
        x = tensors[f"otsu/in{fact['i']:02d}"].to(DEVICE)
        threshold = otsu_threshold(x)
        assert threshold.item() == fact["value"]
        assert ((x > threshold).sum().item(), (x < threshold).sum().item()) == (fact["n_above"], fact["n_below"])


@pytest.mark.golden
def test_recorded_attention_maps(golden: Any) -> None:
    tensors, _ = golden("case1_batch")
    steps = [name for name in tensors if "attnmap32" in name]
    assert steps
    for name in steps:
        threshold = otsu_threshold(tensors[name].flatten(-2).to(DEVICE)).cpu()
        assert torch.equal(threshold.flatten(), tensors[name.replace("attnmap32", "otsu32")].flatten())


def test_a_constant_map_has_nothing_above_its_threshold() -> None:
    x = torch.tensor([[0.0], [-3.5], [1e-30]], device=DEVICE).expand(-1, 7)
    assert torch.equal(otsu_threshold(x), x[:, 0])


def test_two_values_are_parted_by_the_lowest_of_equally_good_bins() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], device=DEVICE)
    assert otsu_threshold(x).item() == 1 / 512


def test_every_row_is_a_map_of_its_own() -> None:
    x = maps(6, 100, seed=1).float().to(DEVICE)
    rows = torch.stack([otsu_threshold(row) for row in x])
    assert torch.equal(otsu_threshold(x.view(2, 3, 100)), rows.view(2, 3))
    assert otsu_threshold(x).dtype == torch.float32


@needs_gpu
def test_nothing_waits_for_the_gpu_and_the_result_is_the_cpu_one() -> None:
    x = maps(20, 4096, seed=2).float()
    on_gpu = x.to(DEVICE)
    otsu_threshold(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        threshold = otsu_threshold(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(threshold.cpu(), otsu_threshold(x))


def test_other_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="convert them to float32"):
        otsu_threshold(torch.arange(10))
