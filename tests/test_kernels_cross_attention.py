"""Cross-attention with token maps: every backend against the probabilities in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    ALL,
    DEVICE,
    DTYPES,
    FAST,
    assert_as_good_as,
    draw,
    generator,
    needs_gpu,
    poisoned_memory,
    swapped_in_memory,
)  # fmt: skip
from torch import Tensor

from consistory.kernels.backends import Backend
from consistory.kernels.cross_attention import cross_attention

CASES = {  # B, H, P, T, d, K
    "sdxl": (2, 3, 70, 77, 64, 2),
    "few tokens": (1, 2, 33, 7, 40, 1),
    "small heads": (1, 1, 16, 77, 16, 9),
    "full block": (1, 2, 64, 128, 32, 1),
}


def tensors(B: int, H: int, P: int, T: int, d: int, K: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as the UNet lays them out, and token weights."""
    q, k, v = (draw((B, rows, H, d), dtype, seed).transpose(1, 2) for rows, seed in ((P, 1), (T, 2), (T, 3)))
    return q, k, v, torch.rand(B, T, K, generator=generator(4)).to(DEVICE)


def by_definition(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(dtype) for x in (q, k, v))
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return p @ v, p.mean(dim=1) @ weights.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_definition(backend: Backend, case: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = tensors(*case, dtype=dtype)
    with poisoned_memory():
        out, maps = cross_attention(*arguments, backend=backend)
    plain, exact = by_definition(*arguments, dtype=dtype), by_definition(*arguments, dtype=torch.float64)
    assert (out.dtype, maps.dtype) == (dtype, torch.float32)
    assert_as_good_as(plain[0], out, exact[0])
    assert_as_good_as(plain[1], maps, exact[1])


@pytest.mark.parametrize("axes", [(0, 2), (2, 3)], ids=["rows contiguous", "rows scattered"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("backend", FAST)
def test_a_tensor_may_be_laid_out_unlike_all_others(backend: Backend, name: str, axes: tuple[int, int]) -> None:
    given = dict(zip(["q", "k", "v", "token_weights"], tensors(2, 2, 33, 7, 16, 1, dtype=torch.float32), strict=True))
    expected = cross_attention(**given, backend="reference")
    out = cross_attention(**given | {name: swapped_in_memory(given[name], *axes)}, backend=backend)
    for ours, exact in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_all_tokens_together_get_all_the_attention(backend: Backend) -> None:
    q, k, v, weights = tensors(*CASES["sdxl"], dtype=torch.float32)
    _, maps = cross_attention(q, k, v, torch.ones_like(weights), backend=backend)
    torch.testing.assert_close(maps, torch.ones_like(maps))


@pytest.mark.parametrize("backend", ALL)
def test_a_concept_is_its_own_tokens_only(backend: Backend) -> None:
    """All queries look at token 5: it gets everything, the rest of the prompt next to nothing."""
    q, k, v, weights = tensors(*CASES["sdxl"], dtype=torch.float32)
    k[:, :, 5] = 100 * q.mean(dim=2)
    q = q.mean(dim=2, keepdim=True).expand_as(q)
    weights.zero_()
    weights[:, 5, 0], weights[:, 6:, 1] = 1, 1
    _, maps = cross_attention(q, k, v, weights, backend=backend)
    assert maps[..., 0].min() > 0.95 and maps[..., 1].max() < 0.05


@pytest.mark.parametrize("backend", ALL)
def test_a_prompt_without_concepts(backend: Backend) -> None:
    q, k, v, weights = tensors(*CASES["few tokens"], dtype=torch.float32)
    out, maps = cross_attention(q, k, v, weights[..., :0], backend=backend)
    assert maps.shape == (1, 33, 0)
    torch.testing.assert_close(out, cross_attention(q, k, v, weights, backend="reference")[0])


@needs_gpu
@pytest.mark.parametrize("backend", FAST)
def test_nothing_waits_for_the_gpu(backend: Backend) -> None:
    arguments = tensors(*CASES["sdxl"], dtype=torch.float16)
    cross_attention(*arguments, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_attention(*arguments, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
