"""The model of the peak of memory, bench/memory.py; and with it, stories on a device that is not the host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from consistory.weights.loading import sdxl_configs

BENCH = Path(__file__).parent.parent / "bench"
SMALL = {
    "unet": {
        "block_out_channels": [32, 32, 64], "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 48, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + 32,
        "norm_num_groups": 8,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_encoder_2": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    pytest.importorskip("triton")
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_memory", BENCH / "memory.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_memory"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    published = sdxl_configs()
    return {**published, **{name: published[name] | changes for name, changes in SMALL.items()}}


def held(bench: ModuleType, configs: dict[str, Any]) -> dict[str, int]:
    """Bytes of every component's weights, as they are loaded."""
    pipe = bench.load("meta", configs, bench.Option())
    return {name: sum(w.nbytes for w in part.parameters()) for name, part in bench.parts_of(pipe).items()}


def test_what_lives_is_counted(bench: ModuleType) -> None:
    """Views take nothing, in-place operations neither, what is dropped is gone; composite operations are opened."""
    meter = bench.TensorMeter("cpu")
    weight = torch.zeros(100, 10)
    meter.add(weight)
    assert meter.live == 4000
    with meter:
        x = torch.zeros(50, 10)
        x.t().add_(1)
        y = torch.nn.functional.linear(x, weight)
        assert meter.live == 4000 + 2000 + 20_000
        del x
        assert meter.live == 24_000
        y = y[:1].clone()
        assert meter.live == 4400
        with meter.during("later"):
            torch.zeros(1000)
    assert (meter.peaks["later"], meter.peaks["before"]) == (8400, 26_000)


@torch.inference_mode()
def test_the_whole_library_is_counted_as_the_allocator_does(bench: ModuleType) -> None:
    """A network without convolutions, whose workspaces are the allocator's alone."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()
    x = torch.randn(200, 64)

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(layer(x)[None, None], x[None, None], x[None, None])

    call()
    meter = bench.TensorMeter("cpu")
    for tensor in (x, *layer.parameters()):
        meter.add(tensor)
    start = meter.live
    with meter:
        call()
    assert meter.peaks["before"] - start == pytest.approx(bench.profiled(call), abs=4096)


def test_offloading_leaves_the_running_part_on_the_device(bench: ModuleType, configs: dict[str, Any]) -> None:
    """Each phase is smaller by just the weights of the other parts: nothing is there twice, and nothing stays."""
    weights = held(bench, configs)
    plain, offload = (
        bench.peaks("meta", configs, option, 3, 256).peaks for option in (bench.Option(), bench.Option(offload=True))
    )
    for phase, part in {"denoising": "unet", "decoding": "vae"}.items():
        others = sum(size for name, size in weights.items() if name != part)
        assert plain[phase] - offload[phase] == others
    assert offload["text encoders"] < weights["text_encoder_2"] + 2**20


def test_chunks_and_tiles_lower_the_peak(bench: ModuleType, configs: dict[str, Any]) -> None:
    three, six, chunks, tiles = (
        bench.peaks("meta", configs, bench.Option(**option), images, 256).peaks
        for images, option in ((3, {}), (6, {}), (4, {"chunk": 1}), (3, {"tile": 32}))
    )
    weights = sum(held(bench, configs).values())
    what_earlier_chunks_found = 2**20
    assert three["denoising"] <= chunks["denoising"] <= three["denoising"] + what_earlier_chunks_found
    assert chunks["denoising"] - weights < 0.7 * (six["denoising"] - weights)
    assert tiles["decoding"] - weights < 0.6 * (three["decoding"] - weights)
