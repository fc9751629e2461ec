"""What the tests of the kernels share: where they run, in which precisions, and how exact a result has to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's interpreter computes bfloat16 wrongly, so on a CPU the half precision is float16 alone.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (DEVICE == "cuda" or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
FAST = ["packed", pytest.param("fused", marks=needs_triton)]
ALL = ["reference", *FAST]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal numbers, the same ones for every precision and device."""
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


def draw_mask(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    return (torch.rand(shape, generator=generator(seed)) < share).to(DEVICE)


def swapped_in_memory(x: Tensor, *axes: int) -> Tensor:
    """x as it is, with two axes in each other's place in memory."""
    return x.transpose(*axes).contiguous().transpose(*axes)


def error(out: Tensor, exact: Tensor) -> float:
    """Relative error, in the root mean square. NaN wherever the output is."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def assert_as_good_as(plain: Tensor, out: Tensor, exact: Tensor) -> None:
    """`out` strays from the float64 result at most twice as far as plain PyTorch operations in its precision do."""
    assert out.shape == exact.shape
    ours, plains = error(out, exact), error(plain, exact)
    assert ours <= 2 * plains + 1e-7, f"error {ours:.2e}, of plain operations {plains:.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN or the largest integer."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            memory = allocate(*arguments, **options)
            return memory.fill_(torch.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).max)

        return call

    with (
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
