"""Feature injection: the order of the images, against a loop over single patches and against recorded numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import ALL, DEVICE, DTYPES, FAST, draw, draw_mask, generator, needs_gpu, poisoned_memory
from torch import Tensor

from consistory.kernels.backends import Backend
from consistory.kernels.injection import inject
from consistory.kernels.otsu import otsu_threshold

ALPHA = 0.8


def plan(images: int, patches: int, anchors: int) -> tuple[Tensor, Tensor, Tensor]:
    """source_index, source_image and inject_mask [N, P]."""
    draws = generator(7)
    index = torch.randint(patches, (images, patches), generator=draws)
    image = torch.randint(anchors, (images, patches), generator=draws)
    return index.to(DEVICE), image.to(DEVICE), draw_mask((images, patches), 0.6, seed=8)


def by_definition(x: Tensor, index: Tensor, image: Tensor, mask: Tensor, anchors: int) -> Tensor:
    """One patch at a time, in float64: an image's sources are as they were before the image's own turn."""
    out = x.double().clone()
    for i in range(len(x)):
        before = out[:anchors].clone()
        for p in range(x.shape[1]):
            if mask[i, p]:
                out[i, p] = ALPHA * before[image[i, p], index[i, p]] + (1 - ALPHA) * out[i, p]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "images, anchors, patches, channels", [(5, 3, 37, 20), (4, 2, 33, 130), (2, 2, 40, 16), (1, 1, 9, 8)]
)
@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_definition(
    backend: Backend, images: int, anchors: int, patches: int, channels: int, dtype: torch.dtype
) -> None:
    """Sources may be any anchor, the image itself included."""
    x, (index, image, mask) = draw((images, patches, channels), dtype, seed=1), plan(images, patches, anchors)
    untouched = x.clone()
    with poisoned_memory():
        out = inject(x, index, image, mask, ALPHA, anchors, backend=backend)
    assert torch.equal(x, untouched)
    assert torch.equal(out[~mask], x[~mask])
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        out.double(), by_definition(x, index, image, mask, anchors), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("backend", ALL)
def test_the_second_anchor_draws_from_the_blended_first(backend: Backend) -> None:
    """Features 1, 10 and 100: the first anchor reads the second's 10, the others what the first has become."""
    x = torch.tensor([1.0, 10.0, 100.0], device=DEVICE)[:, None, None]
    image = torch.tensor([[1], [0], [0]], device=DEVICE)
    everywhere = torch.ones(3, 1, dtype=torch.bool, device=DEVICE)
    out = inject(x, torch.zeros_like(image), image, everywhere, ALPHA, anchors=2, backend=backend)
    first = 0.8 * 10 + 0.2 * 1
    expected = torch.tensor([first, 0.8 * first + 0.2 * 10, 0.8 * first + 0.2 * 100], device=DEVICE)
    torch.testing.assert_close(out.flatten(), expected)


@pytest.mark.parametrize("backend", ALL)
def test_recorded_anchors_give_what_anchors_in_the_batch_give(backend: Backend) -> None:
    x, (index, image, mask) = draw((5, 30, 16), torch.float32, seed=1), plan(5, 30, 2)
    together = inject(x, index, image, mask, ALPHA, anchors=2, backend=backend)
    alone = inject(x[2:], index[2:], image[2:], mask[2:], ALPHA, anchor_x=together[:2], backend=backend)
    torch.testing.assert_close(alone, together[2:])


@pytest.mark.parametrize("backend", ["reference", "packed", pytest.param("fused", marks=needs_gpu)])
def test_recorded_batch(backend: Backend, golden: Any) -> None:
    tensors, facts = golden("algo_units")
    best = tensors["inject/nn_dist64"][:, :2].min(dim=1)
    index = tensors["inject/nn_map64"].long()[:, :2].gather(1, best.indices[:, None]).squeeze(1)
    threshold = otsu_threshold(best.values)
    assert threshold.tolist() == facts["inject"]["dist_thr"]
    mask = tensors["inject/mask64"] & (best.values < threshold[:, None])
    arguments = (x.to(DEVICE) for x in (tensors["inject/in"], index, best.indices, mask))
    out = inject(*arguments, ALPHA, anchors=2, backend=backend).cpu()
    torch.testing.assert_close(out, tensors["inject/out"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "packed", pytest.param("fused", marks=needs_gpu)])
def test_recorded_extra_image(backend: Backend, golden: Any) -> None:
    tensors, _ = golden("algo_units")
    best = tensors["inject_anchor/nn_dist64"].min(dim=1)
    index = tensors["inject_anchor/nn_map64"].long().gather(1, best.indices[:, None]).squeeze(1)
    mask = tensors["inject/mask64"][2:] & (best.values < otsu_threshold(best.values)[:, None])
    arguments = (x.to(DEVICE) for x in (tensors["inject_anchor/in"], index, best.indices, mask))
    out = inject(*arguments, ALPHA, anchor_x=tensors["inject_anchor/h_out"].to(DEVICE), backend=backend).cpu()
    torch.testing.assert_close(out, tensors["inject_anchor/out"], atol=1e-6, rtol=1e-6)


@needs_gpu
@pytest.mark.parametrize("backend", FAST)
def test_nothing_waits_for_the_gpu(backend: Backend) -> None:
    x, (index, image, mask) = draw((4, 64, 32), torch.float16, seed=1), plan(4, 64, 2)
    inject(x, index, image, mask, ALPHA, anchors=2, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inject(x, index, image, mask, ALPHA, anchors=2, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
