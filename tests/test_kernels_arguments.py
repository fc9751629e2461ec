"""What all operators say to arguments that do not fit, and which backend they take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from consistory.kernels.backends import has_triton, pick_backend
from consistory.kernels.correspondence import match
from consistory.kernels.cross_attention import cross_attention
from consistory.kernels.extended_attention import extended_attention
from consistory.kernels.injection import inject


def attention_with_options(*, q_vanilla: Tensor, query_region: Tensor, key_region: Tensor, **arguments: Any) -> Tensor:
    """Extended attention, which takes these in pairs."""
    return extended_attention(**arguments, q_blend=(q_vanilla, 0.5), regions=(query_region, key_region))


G, N, A, H, P, D, T, K = 2, 3, 2, 2, 16, 8, 7, 1
FITTING: dict[Callable[..., Any], dict[str, Tensor]] = {
    attention_with_options: {name: torch.randn(G, N, H, P, D) for name in ("q", "k", "v", "q_vanilla")}
    | {"key_mask": torch.ones(A, P, dtype=torch.bool), "share": torch.ones(N, A, dtype=torch.bool)}
    | {f"anchor_{name}": torch.randn(G, A, H, P, D) for name in "kv"}
    | {"query_region": torch.ones(N, P, dtype=torch.int32), "key_region": torch.ones(A, P, dtype=torch.int32)},
    match: {
        "target": torch.randn(N, P, D), "source": torch.randn(A, P, D),
        "source_mask": torch.ones(A, P, dtype=torch.bool),
    },
    cross_attention: {"q": torch.randn(N, H, P, D), "k": torch.randn(N, H, T, D), "v": torch.randn(N, H, T, D),
                      "token_weights": torch.rand(N, T, K)},
    inject: {"x": torch.randn(N, P, D), "source_index": torch.zeros(N, P, dtype=torch.int64),
             "source_image": torch.zeros(N, P, dtype=torch.int64), "inject_mask": torch.ones(N, P, dtype=torch.bool),
             "anchor_x": torch.randn(A, P, D)},
}  # fmt: skip
FREE = [(inject, "anchor_x", 0), (match, "target", 0), (cross_attention, "q", 2), (cross_attention, "token_weights", 2)]
OTHERS: dict[Callable[..., Any], dict[str, Any]] = {inject: {"alpha": 0.8}}


@pytest.mark.parametrize("backend", ["reference", "packed"])
@pytest.mark.parametrize(("operator", "name"), [(each, name) for each, given in FITTING.items() for name in given])
def test_shapes_that_do_not_fit_are_refused(operator: Callable[..., Any], name: str, backend: str) -> None:
    """One less along any axis that another tensor has, too: nothing is computed."""
    arguments = FITTING[operator] | OTHERS.get(operator, {}) | {"backend": backend}
    operator(**arguments)
    given = arguments[name]
    for axis in (axis for axis in range(given.ndim) if (operator, name, axis) not in FREE):
        with pytest.raises(ValueError, match="has to be"):
            operator(**arguments | {name: given.narrow(axis, 0, given.shape[axis] - 1)})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("operator", "name"),
    [(each, name) for each, given in FITTING.items() for name, x in given.items() if x.dtype == torch.bool],
)
def test_masks_are_of_booleans(operator: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    arguments = FITTING[operator] | OTHERS.get(operator, {})
    with pytest.raises(ValueError, match=f"{name} is of {dtype}: make it torch.bool"):
        operator(**arguments | {name: arguments[name].to(dtype)})


LIKE_THE_OTHERS = [
    (operator, name)
    for operator, given in FITTING.items()
    for name, x in list(given.items())[1:]
    if x.is_floating_point() and name != "token_weights"
]


@pytest.mark.parametrize(("operator", "name"), LIKE_THE_OTHERS)
def test_tensors_are_of_one_type(operator: Callable[..., Any], name: str) -> None:
    arguments = FITTING[operator] | OTHERS.get(operator, {})
    with pytest.raises(ValueError, match=rf"{name} is of torch\.float16: to match .* make it"):
        operator(**arguments | {name: arguments[name].half()})


@pytest.mark.parametrize("operator", FITTING)
def test_tensors_are_floating_point(operator: Callable[..., Any]) -> None:
    whole = {name: x.long() if x.is_floating_point() else x for name, x in FITTING[operator].items()}
    with pytest.raises(ValueError, match=r"of torch\.int64: give floating point"):
        operator(**whole | OTHERS.get(operator, {}))


@pytest.mark.parametrize("name", ["query_region", "key_region"])
def test_regions_are_bit_sets(name: str) -> None:
    given = FITTING[attention_with_options]
    with pytest.raises(ValueError, match=r"make them torch\.int32"):
        attention_with_options(**given | {name: given[name].float()})


def test_attention_needs_something_to_attend_to() -> None:
    empty = torch.zeros(2, 0, 2, 16, 8)
    masks = torch.ones(0, 16, dtype=torch.bool), torch.ones(0, 0, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"q is \[2, 0, 2, 16, 8\]: it holds nothing"):
        extended_attention(empty, empty, empty, *masks)
    flat = torch.zeros(2, 16, 8)
    with pytest.raises(ValueError, match=r"q \[2, 16, 8\], .* they have to be \[B, H, P, d\]"):
        cross_attention(flat, flat, flat, torch.zeros(2, 16, 1))


@pytest.mark.parametrize("operator", [extended_attention, match, cross_attention, inject])
def test_launches_are_on_the_device_of_the_tensors(
    operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which may be another GPU."""
    pytest.importorskip("triton")
    current: list[Tensor] = []
    launches: list[bool] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.clear()

    def launch(*arguments: Any) -> None:
        launches.append(len(current) == 1 and current[0] is arguments[0])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(f"{operator.__module__}.pick_backend", lambda *arguments, **options: "fused")
    monkeypatch.setattr(f"{operator.__module__}.fused.{operator.__name__}", launch)
    given = FITTING[attention_with_options if operator is extended_attention else operator]
    given = {name: x for name, x in given.items() if name not in ("q_vanilla", "query_region", "key_region")}
    operator(**given | OTHERS.get(operator, {}))
    assert launches == [True]


def test_recorded_keys_need_values() -> None:
    for name in ("anchor_k", "anchor_v"):
        arguments = {key: value for key, value in FITTING[attention_with_options].items() if key != name}
        with pytest.raises(ValueError, match="give both or neither"):
            attention_with_options(**arguments)


@pytest.mark.parametrize(("capability", "backend"), [((7, 5), "packed"), ((8, 0), "fused"), ((9, 0), "fused")])
def test_fused_needs_an_ampere(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    given = {"dtype": torch.float16, "is_cuda": True, "device": torch.device("cuda:0")}
    x: Any = SimpleNamespace(**given, requires_grad=False)
    wanted: Any = SimpleNamespace(**given, requires_grad=True)
    assert pick_backend(x, x) == backend
    assert pick_backend(x, wanted) == "packed", "kernels compute no gradients"
    with torch.no_grad():
        assert pick_backend(x, wanted) == backend
    with pytest.raises(ValueError, match="computes no gradients"):
        pick_backend(wanted, x, backend="fused")


def test_a_triton_that_is_too_old_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 3.4 there is no programmatic dependent launch, before 3.3 a kernel cannot take a tuple."""
    monkeypatch.setitem(sys.modules, "triton.language.extra.cuda.gdc", None)
    assert not has_triton.__wrapped__()


def test_fused_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="runs on a GPU, and the tensors are on cpu"):
        pick_backend(torch.zeros(1), backend="fused")


def test_fused_is_not_interpreted_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pick_backend(torch.zeros(1), backend="fused") == "fused"
    with pytest.raises(ValueError, match="interpreter is wrong in bfloat16"):
        pick_backend(torch.zeros(1, dtype=torch.bfloat16), backend="fused")


@pytest.mark.parametrize(
    ("operator", "name"),
    [(each, name) for each, given in FITTING.items() for name, x in given.items() if x.is_floating_point()],
)
def test_gradients_reach_every_input(
    operator: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is known that they are wanted, so that no kernel would run on a GPU."""
    arguments = FITTING[operator] | OTHERS.get(operator, {})
    wanted = arguments[name].clone().requires_grad_()
    asked: list[Tensor] = []

    def pick(*tensors: Tensor, **options: Any) -> str:
        asked.extend(tensors)
        return pick_backend(*tensors, **options)

    module = extended_attention if operator is attention_with_options else operator
    monkeypatch.setattr(f"{module.__module__}.pick_backend", pick)
    output = operator(**arguments | {name: wanted})
    (gradient,) = torch.autograd.grad((output if isinstance(output, Tensor) else output[-1]).sum(), wanted)
    assert gradient.isfinite().all()
    assert any(tensor is wanted for tensor in asked)


@pytest.mark.parametrize("anchors", [-1, 0, N + 1])
def test_injection_needs_sources(anchors: int) -> None:
    given = {name: x for name, x in FITTING[inject].items() if name != "anchor_x"}
    with pytest.raises(ValueError, match=f"anchors is {anchors}: give how many of the 3 images"):
        inject(**given, alpha=0.8, anchors=anchors)


def test_anchors_are_in_the_batch_or_recorded() -> None:
    given = FITTING[attention_with_options]
    few = {name: x[:, :1] if x.dim() == 5 else x for name, x in given.items() if not name.startswith("anchor")}
    few |= {"share": few["share"][:1], "query_region": few["query_region"][:1]}
    with pytest.raises(ValueError, match="2 anchors, but there are 1 images: give anchor_k and anchor_v"):
        attention_with_options(**few)
    with pytest.raises(ValueError, match=r"q is \[3, 2, 16, 8\]: it has to be \[halves, images"):
        attention_with_options(**given | {"q": given["q"][0]})
