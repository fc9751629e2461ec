"""Weights that visit a device. Device "meta" stands for an accelerator: moving there is a move like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consistory import ConsiStory, model
from consistory.offload import on_device

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
QUICK: dict[str, Any] = {"subject": "a dog", "settings": ["here", "there"], "steps": 2, "width": 64, "height": 64}


def build() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    module[0].weight.requires_grad_(True)
    return module


def devices(module: nn.Module) -> set[str]:
    return {weight.device.type for weight in module.state_dict().values()}


@pytest.mark.parametrize("inference", [False, True])
def test_weights_go_and_the_same_ones_come_back(inference: bool) -> None:
    """Not copies of them: what is mapped from a file stays so. Buffers go too."""
    module = build()
    before = {name: (weight, weight.data_ptr()) for name, weight in module.state_dict(keep_vars=True).items()}
    with torch.inference_mode(inference), on_device(module, ELSEWHERE):
        assert devices(module) == {"meta"}
        assert [p.requires_grad for p in module.parameters()] == [True, False, False, False, False, False]
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is weight and weight.data_ptr() == place for name, (weight, place) in before.items())
    assert devices(module) == {"cpu"}
    assert module[0].weight.requires_grad


def test_weights_come_back_after_an_error() -> None:
    module = build()
    before = list(module.parameters())
    with pytest.raises(KeyboardInterrupt), on_device(module, ELSEWHERE):
        raise KeyboardInterrupt
    assert all(x is y for x, y in zip(module.parameters(), before, strict=True))


def test_a_device_that_is_full_leaves_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    before, to, moved = list(module.parameters()), Tensor.to, []

    def until_full(x: Tensor, device: torch.device) -> Tensor:
        moved.append(x)
        if len(moved) == 3:
            raise torch.OutOfMemoryError("full")
        return to(x, device)

    monkeypatch.setattr(Tensor, "to", until_full)
    with pytest.raises(torch.OutOfMemoryError, match="full"), on_device(module, ELSEWHERE):
        raise AssertionError("ran without its weights")
    assert all(x is y for x, y in zip(module.parameters(), before, strict=True))


def test_weights_that_are_there_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a visit is within another."""
    module = build()
    monkeypatch.setattr(nn.Module, "load_state_dict", None)
    with on_device(module, CPU):
        assert devices(module) == {"cpu"}
    monkeypatch.undo()
    with on_device(module, ELSEWHERE):
        weight = module[0].weight
        with on_device(module, ELSEWHERE):
            assert module[0].weight is weight
        assert devices(module) == {"meta"}
    assert devices(module) == {"cpu"}


# --- in a story -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights, offload=True)


def parts(pipe: ConsiStory) -> dict[str, nn.Module]:
    first, second = pipe.text_encoders
    return {"text_encoder": first, "text_encoder_2": second, "unet": pipe.unet, "vae": pipe.vae}


@pytest.fixture
def journal(pipe: ConsiStory, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What visits the device and leaves it, and what computes meanwhile, without repetitions."""
    written: list[str] = []
    names = {module: name for name, module in parts(pipe).items()}

    def write(entry: str) -> None:
        if written[-1:] != [entry]:
            written.append(entry)

    @contextmanager
    def visit(module: nn.Module, device: torch.device) -> Iterator[None]:
        write(f"{names[module]} comes")
        try:
            yield
        finally:
            write(f"{names[module]} leaves")

    def runs(name: str) -> Callable[..., None]:
        return lambda *_: write(f"{name} runs")

    monkeypatch.setattr(model, "on_device", visit)
    layers = [(name, m) for name, part in parts(pipe).items() for m in part.modules() if not list(m.children())]
    hooks = [layer.register_forward_pre_hook(runs(name)) for name, layer in layers]
    yield written
    for hook in hooks:
        hook.remove()


def visits(*names: str) -> list[str]:
    return [f"{name} {what}" for name in names for what in ("comes", "runs", "leaves")]


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_parts_of_the_model_visit_one_after_the_other(
    pipe: ConsiStory, journal: list[str], negative: str | None
) -> None:
    pipe(**QUICK, negative_prompt=negative)
    assert journal == visits("text_encoder", "text_encoder_2", "unet", "vae")


def test_every_part_leaves_after_an_error(pipe: ConsiStory, journal: list[str]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**QUICK, on_step=stop)
    assert journal == visits("text_encoder", "text_encoder_2", "unet")


def test_weights_wait_on_the_host_for_a_device(golden_weights: Path) -> None:
    waiting = ConsiStory.from_pretrained(golden_weights, device="meta", offload=True)
    assert waiting.device == ELSEWHERE
    assert {name: devices(part) for name, part in parts(waiting).items()} == {name: {"cpu"} for name in parts(waiting)}
    staying = ConsiStory.from_pretrained(golden_weights, device="meta")
    assert {name: devices(part) for name, part in parts(staying).items()} == {name: {"meta"} for name in parts(staying)}
    context, pooled = waiting.encode_prompts(["a dog"])
    assert (context.device, pooled.device) == (ELSEWHERE, ELSEWHERE)
    assert devices(waiting.text_encoders[0]) == devices(waiting.text_encoders[1]) == {"cpu"}


def test_on_a_cpu_offloading_changes_nothing(golden_weights: Path, pipe: ConsiStory) -> None:
    plain = ConsiStory.from_pretrained(golden_weights)
    assert torch.equal(pipe(**QUICK).latents, plain(**QUICK).latents)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_offloading_changes_nothing_and_leaves_nothing(golden_weights: Path) -> None:
    plain = ConsiStory.from_pretrained(golden_weights, device="cuda")
    expected = plain(**QUICK).latents
    offloaded = replace(plain, **{
        field: getattr(ConsiStory.from_pretrained(golden_weights, device="cuda", offload=True), field)
        for field in ("text_encoders", "unet", "vae")
    })  # fmt: skip
    del plain
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert torch.equal(offloaded(**QUICK).latents, expected)
    assert torch.cuda.memory_allocated() - before < 2**20
