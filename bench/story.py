"""What a story costs: UNet work in call equivalents and, on request, seconds at full SDXL size with random weights.

    python bench/story.py                                        # work only, any machine
    python bench/story.py --time --device cuda --dtype float16   # also seconds at 1024x1024, random weights

One call equivalent is one whole plain UNet call on all images, in floating-point operations at SDXL's size. The
authors' released implementation spends 112 on a story of 50 steps.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from measure import machine, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from consistory import ConsistoryConfig, QueryBlend
from consistory.attention import AttentionControl
from consistory.config import FreeU, ScheduleConfig, UNetConfig
from consistory.kernels import backends
from consistory.story import Plan, tell
from consistory.unet import Conditioning, Encoded, UNet
from consistory.weights.loading import sdxl_configs

RELEASED = 112
CONFIGS = {
    "default": ConsistoryConfig(),
    "paper": ConsistoryConfig.paper(),
    "reference": ConsistoryConfig.reference(),
    "vanilla": ConsistoryConfig.vanilla(),
}


class CountingUNet(UNet):
    """Counts its halves: "encode", and each number of decoder blocks that was asked for."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.calls: Counter[str] = Counter()

    def encode(self, x: Tensor, t: Tensor | int, cond: Conditioning, control: AttentionControl) -> Encoded:
        self.calls["encode"] += 1
        return super().encode(x, t, cond, control)

    def decode_blocks(self, blocks: int, state: Encoded, control: AttentionControl, freeu: FreeU | None) -> Tensor:
        self.calls[f"decode {blocks} blocks"] += 1
        return super().decode_blocks(blocks, state, control, freeu)


def conditioning(unet: UNet, samples: int, device: str) -> Conditioning:
    c, dtype = unet.config, unet.conv_in.weight.dtype
    context = torch.randn(samples, 77, c.context_width, device=device, dtype=dtype)
    pooled = torch.randn(samples, c.added_width - 6 * c.size_features, device=device, dtype=dtype)
    return Conditioning(unet.prompt_keys(context), pooled, torch.full((samples, 6), 1024.0, device=device))


def plan_story(unet: UNet, config: ConsistoryConfig, images: int, steps: int, size: int, device: str) -> Plan:
    token_weights = torch.zeros(images, 77, 1, device=device)
    token_weights[:, 2] = 1
    return Plan(
        unet=unet, schedule=ScheduleConfig(), cond=conditioning(unet, 2 * images, device), token_weights=token_weights,
        config=config, steps=steps, guidance=5.0, anchors=min(2, images), seed=0, latent_size=(size, size),
    )  # fmt: skip


def work_of_a_call() -> dict[str, float]:
    """Share of a whole plain call that each half, and each number of decoder blocks, takes at SDXL's size."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(sdxl_configs()["unet"]))
        x, cond, control = torch.empty(1, 4, 128, 128), conditioning(unet, 1, "meta"), AttentionControl()
        with FlopCounterMode(display=False) as encode:
            state = unet.encode(x, 1, cond, control)
        work = {"encode": encode.get_total_flops()}
        for blocks in range(1, len(unet.up_blocks) + 1):
            with FlopCounterMode(display=False) as decode:
                unet.decode_blocks(blocks, state, control, None)
            work[f"decode {blocks} blocks"] = decode.get_total_flops()
    whole = work["encode"] + work[f"decode {len(unet.up_blocks)} blocks"]
    return {part: flops / whole for part, flops in work.items()}


def call_equivalents(config: ConsistoryConfig, steps: int, work: dict[str, float]) -> float:
    """Counted on a tiny UNet of SDXL's topology; the work of each call is that of SDXL's."""
    json_config = sdxl_configs()["unet"] | {
        "block_out_channels": [4, 8, 12], "attention_head_dim": [1, 1, 1], "transformer_layers_per_block": [1, 1, 1],
        "cross_attention_dim": 8, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 28,
        "norm_num_groups": 2,
    }  # fmt: skip
    unet = CountingUNet(UNetConfig.from_json(json_config))
    with torch.inference_mode():
        tell(plan_story(unet, config, images=2, steps=steps, size=8, device="cpu"), torch.randn(2, 4, 8, 8))
    return sum(count * work[part] for part, count in unet.calls.items())


@torch.inference_mode()
def seconds(
    unet: UNet, config: ConsistoryConfig, images: int, steps: int, size: int, device: str, repeats: int
) -> float:
    """Median time of a story without text encoding and decoding."""
    plan = plan_story(unet, config, images, steps, size, device)
    times = []
    for _ in range(repeats):
        x = torch.randn(images, 4, size, size, device=device)
        start = time.perf_counter()
        tell(plan, x).latents.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return median(times)


def timed(unet: UNet, config: ConsistoryConfig, args: argparse.Namespace, name: str) -> dict[str, float]:
    row = {}
    for images in args.images:
        # Three steps that compile all that fifty need: one of them blends queries, if the story does.
        short = replace(config, query_blend=config.query_blend and QueryBlend(fraction=0.5))
        seconds(unet, short, images, min(3, args.steps), args.size, args.device, repeats=1)
        took = seconds(unet, config, images, args.steps, args.size, args.device, args.repeats)
        row[f"seconds for {images} images"] = took
        print(f"{name:18} {images} images: {took:.2f} s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--time", action="store_true", help="also measure seconds, at full SDXL size")
    parser.add_argument("--images", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--size", type=int, default=128, help="latent height and width")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "story.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    work = work_of_a_call()
    rows = {name: {"call equivalents": call_equivalents(config, args.steps, work)} for name, config in CONFIGS.items()}
    for name, row in rows.items():
        calls = row["call equivalents"]
        print(f"{name:10} {calls:6.1f} call equivalents, {RELEASED / calls:.2f} times less than {RELEASED}", flush=True)

    if args.time:
        with torch.device(args.device):
            unet = UNet(UNetConfig.from_json(sdxl_configs()["unet"])).to(getattr(torch, args.dtype)).eval()
        unet = unet.requires_grad_(False)
        for name, config in CONFIGS.items():
            rows[name] |= timed(unet, config, args, name)
        with patch.object(backends, "has_triton", return_value=False):  # as if Triton were not installed
            rows["default, no Triton"] = timed(unet, CONFIGS["default"], args, "default, no Triton")

    about = {
        **machine(args.device), "dtype": args.dtype, "steps": args.steps, "latent size": args.size,
        "released implementation, calls": RELEASED,
    }  # fmt: skip
    configs = {name: asdict(config) for name, config in CONFIGS.items()}
    write(args.out, {"about": about, "rows": rows, "configs": configs})


if __name__ == "__main__":
    main()
