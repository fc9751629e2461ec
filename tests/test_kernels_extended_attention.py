"""Extended attention: every backend against a loop over images in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import (
    ALL,
    DEVICE,
    DTYPES,
    FAST,
    assert_as_good_as,
    draw,
    draw_mask,
    generator,
    needs_gpu,
    poisoned_memory,
    swapped_in_memory,
)  # fmt: skip
from torch import Tensor

from consistory.kernels.backends import Backend
from consistory.kernels.extended_attention import extended_attention, packed


@dataclass
class Case:
    """Sizes of a call: halves, images, anchors, heads, patches, head size."""

    G: int
    N: int
    A: int
    H: int
    P: int
    d: int

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v laid out as the UNet has them: [G, N, P, H, d] in memory."""
        shape = (self.G, self.N, self.P, self.H, self.d)
        q, k, v = (draw(shape, dtype, seed).transpose(2, 3) for seed in (1, 2, 3))
        return q, k, v

    def masks(self, kept: float = 0.3) -> tuple[Tensor, Tensor]:
        """key_mask, and share as the method has it: everyone reads every anchor, an anchor not itself."""
        return draw_mask((self.A, self.P), kept, 4), ~torch.eye(self.N, self.A, dtype=torch.bool, device=DEVICE)

    def regions(self, bits: int = 3) -> tuple[Tensor, Tensor]:
        """Of queries and of keys: every set of `bits` bits, the empty one among them."""
        query_region = torch.randint(2**bits, (self.N, self.P), generator=generator(6))
        key_region = torch.randint(2**bits, (self.A, self.P), generator=generator(7))
        return query_region.to(DEVICE, torch.int32), key_region.to(DEVICE, torch.int32)

    def __str__(self) -> str:
        return f"G{self.G}-N{self.N}-A{self.A}-H{self.H}-P{self.P}-d{self.d}"


CASES = [
    Case(G=2, N=3, A=2, H=2, P=64, d=64),
    Case(G=1, N=3, A=2, H=2, P=67, d=40),
    Case(G=1, N=1, A=0, H=3, P=33, d=16),
    Case(G=1, N=2, A=2, H=1, P=130, d=32),
    Case(G=1, N=4, A=3, H=1, P=20, d=20),
    Case(G=1, N=2, A=1, H=1, P=40, d=128),
    Case(G=1, N=2, A=1, H=1, P=1, d=16),
]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, share: Tensor, anchor_k: Tensor, anchor_v: Tensor
) -> Tensor:
    """Image after image: its own keys and the kept keys of the anchors it reads, in the precision of the arguments."""
    out = torch.empty_like(q)
    for image, reads in enumerate(share):
        keys = [k[:, image], *(anchor_k[:, a][:, :, key_mask[a]] for a in reads.nonzero()[:, 0])]
        values = [v[:, image], *(anchor_v[:, a][:, :, key_mask[a]] for a in reads.nonzero()[:, 0])]
        scores = q[:, image] @ torch.cat(keys, dim=2).transpose(-1, -2) / q.shape[-1] ** 0.5
        out[:, image] = scores.softmax(dim=-1) @ torch.cat(values, dim=2)
    return out


def check(backend: Backend, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, share: Tensor) -> None:
    anchors = len(key_mask)

    def define(dtype: torch.dtype) -> Tensor:
        wide = [x.to(dtype) for x in (q, k, v)]
        return by_definition(*wide, key_mask, share, wide[1][:, :anchors], wide[2][:, :anchors])

    with poisoned_memory():
        out = extended_attention(q, k, v, key_mask, share, backend=backend)
    assert out.dtype == q.dtype
    assert_as_good_as(define(q.dtype), out, define(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_definition(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(backend, *case.tensors(dtype), *case.masks())


@pytest.mark.parametrize("kept", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("backend", ALL)
def test_empty_and_full_masks(backend: Backend, kept: float) -> None:
    case = Case(G=1, N=3, A=2, H=1, P=65, d=16)
    check(backend, *case.tensors(torch.float32), *case.masks(kept))


@pytest.mark.parametrize("backend", ALL)
def test_share_alone_decides_who_reads_whom(backend: Backend) -> None:
    """Rows of every kind: nobody, one anchor, another, all, and twice the same."""
    case = Case(G=2, N=8, A=3, H=1, P=24, d=16)
    rows = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 0]]
    key_mask, _ = case.masks()
    check(backend, *case.tensors(torch.float32), key_mask, torch.tensor(rows, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("backend", ALL)
def test_recorded_anchors_give_what_anchors_in_the_batch_give(backend: Backend) -> None:
    """The last images of a batch, alone with the recorded keys and values of its anchors."""
    case = Case(G=2, N=4, A=2, H=2, P=50, d=16)
    q, k, v = case.tensors(torch.float32)
    key_mask, share = case.masks()
    together = extended_attention(q, k, v, key_mask, share, backend=backend)
    extras = slice(case.A, case.N)
    alone = extended_attention(
        q[:, extras], k[:, extras], v[:, extras], key_mask, share[extras],
        anchor_k=k[:, : case.A].clone(), anchor_v=v[:, : case.A].clone(), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(alone, together[:, extras], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_keys_that_are_not_kept_are_not_touched(backend: Backend) -> None:
    """NaN in a masked key, or its value, would spread to every query: packing leaves both out."""
    if backend == "packed" and DEVICE == "cuda":
        pytest.skip("without Triton a GPU hides keys under a mask: it does not leave them out")
    case = Case(G=1, N=2, A=2, H=2, P=40, d=16)
    q, k, v = case.tensors(torch.float32)
    key_mask, share = case.masks()
    anchor_k, anchor_v = case.tensors(torch.float32)[:2]
    hidden = ~key_mask[None, :, None, :, None]
    expected = extended_attention(q, k, v, key_mask, share, anchor_k=anchor_k, anchor_v=anchor_v, backend="reference")
    out = extended_attention(
        q, k, v, key_mask, share, backend=backend,
        anchor_k=anchor_k.masked_fill(hidden, torch.nan), anchor_v=anchor_v.masked_fill(hidden, torch.nan),
    )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("axes", [(2, 3), (3, 4)], ids=["rows contiguous", "rows scattered"])
@pytest.mark.parametrize("name", ["q", "k", "v", "anchor_k", "anchor_v", "q_vanilla"])
@pytest.mark.parametrize("backend", FAST)
def test_a_tensor_may_be_laid_out_unlike_all_others(backend: Backend, name: str, axes: tuple[int, int]) -> None:
    case = Case(G=1, N=2, A=2, H=2, P=20, d=16)
    shape, names = (case.G, case.N, case.H, case.P, case.d), ["q", "k", "v", "anchor_k", "anchor_v", "q_vanilla"]
    given = {name: draw(shape, torch.float32, seed) for seed, name in enumerate(names)}
    key_mask, share = case.masks()

    def attend(backend: Backend, q_vanilla: Tensor, **tensors: Tensor) -> Tensor:
        blend = q_vanilla, 0.7
        return extended_attention(**tensors, key_mask=key_mask, share=share, q_blend=blend, backend=backend)

    expected = attend("reference", **given)
    with poisoned_memory():
        out = attend(backend, **given | {name: swapped_in_memory(given[name], *axes)})
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_anchors_are_packed_in_several_blocks(backend: Backend) -> None:
    """A block is 128 rows of d = 64 in float32."""
    case = Case(G=1, N=2, A=2, H=1, P=300, d=64)
    arguments = *case.tensors(torch.float32), *case.masks()
    with poisoned_memory():
        out = extended_attention(*arguments, regions=case.regions(), backend=backend)
    expected = extended_attention(*arguments, regions=case.regions(), backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_queries_are_blended(backend: Backend, dtype: torch.dtype) -> None:
    """Equation 4: Q* = (1 - v) Q + v Q_vanilla."""
    case = Case(G=2, N=2, A=2, H=2, P=33, d=24)
    q, k, v = case.tensors(dtype)
    key_mask, share = case.masks()
    q_vanilla = draw((case.G, case.N, case.H, case.P, case.d), dtype, seed=5)
    out = extended_attention(q, k, v, key_mask, share, q_blend=(q_vanilla, 0.7), backend=backend)

    def define(dtype: torch.dtype) -> Tensor:
        blend = 0.3 * q.to(dtype) + 0.7 * q_vanilla.to(dtype)
        own = [x.to(dtype) for x in (k, v)]
        return by_definition(blend, *own, key_mask, share, *(x[:, : case.A] for x in own))

    assert_as_good_as(define(dtype), out, define(torch.float64))


# --- regions ----------------------------------------------------------------------------------------------------------


def by_definition_in_regions(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, share: Tensor, regions: tuple[Tensor, Tensor]
) -> Tensor:
    """Query after query: its image's own keys, and the kept keys with a bit in common."""
    out = torch.empty_like(q)
    query_region, key_region = (region.tolist() for region in regions)
    for image, reads in enumerate(share.tolist()):
        for query, bits in enumerate(query_region[image]):
            rows = [
                (anchor, patch)
                for anchor, kept in enumerate(key_mask.tolist())
                for patch, keep in enumerate(kept)
                if keep and reads[anchor] and bits & key_region[anchor][patch]
            ]
            anchors, patches = ([row[i] for row in rows] for i in (0, 1))
            keys, values = (torch.cat([x[:, image], x[:, anchors, :, patches].movedim(0, 2)], dim=2) for x in (k, v))
            scores = q[:, image, :, query, None] @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
            out[:, image, :, query] = (scores.softmax(dim=-1) @ values)[:, :, 0]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_queries_read_keys_of_their_regions(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    q, k, v = case.tensors(dtype)
    key_mask, share = case.masks(0.6)
    regions = case.regions()
    with poisoned_memory():
        out = extended_attention(q, k, v, key_mask, share, regions=regions, backend=backend)
    plain, exact = (
        by_definition_in_regions(q.to(precision), k.to(precision), v.to(precision), key_mask, share, regions)
        for precision in (dtype, torch.float64)
    )
    assert_as_good_as(plain, out, exact)


@pytest.mark.parametrize("backend", ALL)
def test_all_bits_read_everything_and_no_bits_nothing(backend: Backend) -> None:
    """Whole blocks of keys that a query may not read leave no trace."""
    case = Case(G=1, N=3, A=2, H=2, P=200, d=16)
    q, k, v = case.tensors(torch.float32)
    key_mask, share = case.masks(0.9)
    query_region, key_region = case.regions()
    for bits, expected in ((-1, share), (0, torch.zeros_like(share))):
        regions = torch.full_like(query_region, bits), key_region | 1
        out = extended_attention(q, k, v, key_mask, share, regions=regions, backend=backend)
        plain = extended_attention(q, k, v, key_mask, expected, backend="reference")
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_regions_go_with_blended_queries_recorded_anchors_and_strides(backend: Backend) -> None:
    case = Case(G=2, N=4, A=2, H=2, P=50, d=24)
    q, k, v = case.tensors(torch.float32)
    key_mask, share = case.masks()
    query_region, key_region = (region.T.contiguous().T for region in case.regions())
    options = {
        "q_blend": (draw((case.G, case.N, case.H, case.P, case.d), torch.float32, seed=5), 0.7),
        "regions": (query_region, key_region),
        "anchor_k": draw((case.G, case.A, case.H, case.P, case.d), torch.float32, seed=8),
        "anchor_v": draw((case.G, case.A, case.H, case.P, case.d), torch.float32, seed=9),
    }
    with poisoned_memory():
        out = extended_attention(q, k, v, key_mask, share, **options, backend=backend)
    expected = extended_attention(q, k, v, key_mask, share, **options, backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_a_mask_hides_other_regions_in_place_of_packing() -> None:
    """What a GPU without Triton runs."""
    case = Case(G=2, N=4, A=2, H=2, P=33, d=16)
    q, k, v = case.tensors(torch.float32)
    masks, regions = case.masks(), case.regions()
    out = packed.attend_masked(q, k, v, k[:, : case.A], v[:, : case.A], *masks, regions)
    expected = extended_attention(q, k, v, *masks, regions=regions, backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------


def test_a_mask_in_place_of_packing_gives_the_same() -> None:
    """What a GPU without Triton runs."""
    case = Case(G=2, N=4, A=2, H=2, P=33, d=16)
    q, k, v = case.tensors(torch.float32)
    arguments = (q, k, v, k[:, : case.A], v[:, : case.A], *case.masks())
    expected = extended_attention(q, k, v, *case.masks(), backend="reference")
    torch.testing.assert_close(packed.attend_masked(*arguments), expected, atol=1e-6, rtol=1e-5)


def test_soft_masks_multiply_softmax_weights() -> None:
    """log M: an anchor read twice at M = 1/2 counts as much as the same anchor read once at M = 1."""
    case = Case(G=1, N=3, A=2, H=1, P=12, d=16)
    q, k, v = case.tensors(torch.float32)
    anchor_k, anchor_v = (x[:, :1].expand(-1, 2, -1, -1, -1) for x in (k, v))
    once, twice = (torch.tensor([row] * 3, dtype=torch.bool, device=DEVICE) for row in ([1, 0], [1, 1]))
    whole = torch.ones(2, case.P, device=DEVICE)
    out = [
        extended_attention(q, k, v, mask, share, anchor_k=anchor_k, anchor_v=anchor_v, backend="reference")
        for mask, share in ((whole, once), (whole / 2, twice), (whole, twice))
    ]
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(out[0], out[2], atol=1e-3)


@pytest.mark.parametrize("backend", FAST)
def test_joining_the_heads_of_the_result_is_cheap(backend: Backend) -> None:
    """The UNet merges heads right after: the layout of its tensors, [G, N, P, H, d], is kept."""
    case = CASES[0]
    out = extended_attention(*case.tensors(torch.float32), *case.masks(), backend=backend)
    assert out.transpose(2, 3).is_contiguous()


def test_an_unknown_backend_is_refused() -> None:
    case = CASES[0]
    with pytest.raises(ValueError, match="unknown backend 'flash': choose one of reference, packed, fused"):
        extended_attention(*case.tensors(torch.float32), *case.masks(), backend="flash")  # type: ignore[arg-type]


def test_a_cpu_runs_the_packed_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("a GPU runs the fused backend")
    case = CASES[0]
    calls = []
    monkeypatch.setattr(packed, "extended_attention", lambda *arguments: calls.append(arguments))
    extended_attention(*case.tensors(torch.float16), *case.masks())
    assert len(calls) == 1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patches", [1024, 4096, 3952])
def test_sdxl_shapes_on_a_gpu(patches: int, dtype: torch.dtype) -> None:
    case = Case(G=2, N=3, A=2, H=4, P=patches, d=64)
    check("fused", *case.tensors(dtype), *case.masks(0.125))


@needs_gpu
@pytest.mark.parametrize("backend", FAST)
def test_nothing_waits_for_the_gpu_and_a_graph_can_replay_it(backend: Backend) -> None:
    """One captured graph serves masks of any content."""
    case = Case(G=2, N=3, A=2, H=2, P=256, d=64)
    q, k, v = case.tensors(torch.float16)
    key_mask, share = case.masks(0.1)
    extended_attention(q, k, v, key_mask, share, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        extended_attention(q, k, v, key_mask, share, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = extended_attention(q, k, v, key_mask, share, backend=backend)
    key_mask.copy_(case.masks(0.8)[0])
    graph.replay()
    expected = extended_attention(q, k, v, key_mask, share, backend="reference")
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-2)


@needs_gpu
def test_a_launch_that_begins_early_reads_finished_inputs() -> None:
    """Everything the call reads is written by launches right before it, again and again, and nobody waits."""
    case = Case(G=2, N=4, A=2, H=10, P=1024, d=64)
    q, k, v = case.tensors(torch.float16)
    key_mask, share = case.masks(0.1)
    rounds = []
    for factor in torch.linspace(0.5, 1.5, 20).tolist():
        arguments = q * factor, k * factor, v * factor, key_mask.roll(int(100 * factor), dims=1), share.clone()
        rounds.append((arguments, extended_attention(*arguments, backend="fused")))
    for arguments, out in rounds:
        torch.testing.assert_close(out, extended_attention(*arguments, backend="packed"), atol=2e-3, rtol=2e-2)
