"""FreeU alone; within the UNet it is compared in test_unet.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.utils import torch_utils
from parity import randn, relative_error

from consistory.config import FreeU
from consistory.freeu import apply_freeu, scale_low_frequencies

TOLERANCE = 1e-5
FACTORS = FreeU(s1=0.9, s2=0.2, b1=1.3, b2=1.6)
SIZES = [(16, 16), (5, 7), (6, 10), (8, 3), (1, 4), (2, 2), (1, 1), (13, 32)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_equals_diffusers(level: int, size: tuple[int, int]) -> None:
    x, skip = randn(2, 6, *size), randn(2, 4, *size, seed=1)
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.6}
    expected = torch_utils.apply_freeu(level, x.clone(), skip.clone(), **factors)
    for actual, wanted in zip(apply_freeu(x, skip, level, FACTORS), expected, strict=True):
        assert relative_error(actual, wanted) <= TOLERANCE


@pytest.mark.parametrize("level", [0, 1, 2])
def test_leaves_its_inputs_alone(level: int) -> None:
    """The skips belong to an encoded state that is decoded more than once."""
    x, skip = randn(1, 6, 5, 7), randn(1, 4, 5, 7, seed=1)
    apply_freeu(x, skip, level, FACTORS)
    assert torch.equal(x, randn(1, 6, 5, 7))
    assert torch.equal(skip, randn(1, 4, 5, 7, seed=1))


def test_a_constant_is_scaled_and_the_highest_frequency_is_not() -> None:
    constant = torch.full((1, 1, 8, 6), 3.0)
    torch.testing.assert_close(scale_low_frequencies(constant, 0.5), constant / 2)
    checkers = torch.tensor([1.0, -1.0]).repeat(1, 1, 8, 3)
    torch.testing.assert_close(scale_low_frequencies(checkers, 0.5), checkers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_transformed_in_float32(dtype: torch.dtype) -> None:
    skip = randn(1, 4, 5, 7).to(dtype)
    actual = scale_low_frequencies(skip, 0.4)
    assert actual.dtype == dtype
    assert torch.equal(actual, scale_low_frequencies(skip.float(), 0.4).to(dtype))


def test_equals_the_recorded_freeu(golden: Any) -> None:
    units, _ = golden("algo_units")
    for level in (0, 1, 2):
        x, skip = apply_freeu(units["freeu/h"], units["freeu/res"], level, FreeU())
        assert relative_error(x, units[f"freeu/idx{level}_h"]) <= TOLERANCE
        assert relative_error(skip, units[f"freeu/idx{level}_res"]) <= TOLERANCE
