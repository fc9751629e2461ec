"""IP-Adapter for `sprites`: its training. What it does is in `consistory.ip_adapter`.

    python bench/baselines/ip_adapter.py --work runs/adapter    # -> ip_adapter.safetensors next to this file

Trained once, on pairs of rendered pictures of one subject: the features of one, and the caption of the other, lead to
the other. Features are the oracle's of the subject, which take the place of CLIP's: no CLIP has seen `sprites`.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from consistory import ddim
from consistory.attention import TransformerBlock
from consistory.config import ScheduleConfig
from consistory.ip_adapter import ImageTokens, IPAdapter, beside
from consistory.unet import UNet
from consistory.weights.sprites.loop import Plan as Schedule
from consistory.weights.sprites.loop import generator_for, resume, start, train
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.train import (
    CAPTION_DROPOUT,
    SCHEDULER_JSON,
    Captions,
    Denoiser,
    MatmulAttention,
    denoising_loss,
    encode,
    load_exported,
)
from consistory.weights.sprites.world import captions, render, sample_scenes

WEIGHTS = Path(__file__).with_name("ip_adapter.safetensors")
CHECKPOINT = Path(__file__).parents[2] / "weights" / "sprites" / "checkpoint"
TOKENS = 4
FEATURE_DROPOUT = 0.1  # share of samples without features, for guidance
POOL = 4096  # pairs that are rendered and encoded at once

logger = logging.getLogger(__name__)


@torch.inference_mode()
def features_of(oracle: Oracle, pictures: Tensor) -> Tensor:
    """The oracle's features of the subjects of pictures [N, 3, 64, 64] in [0, 1]: [N, 160]."""
    found: list[Tensor] = []
    handle = oracle.subject_features.register_forward_hook(lambda module, inputs, output: found.append(output))
    for part in pictures.split(256):
        oracle(part)
    handle.remove()
    return torch.cat(found)


# --- its training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompted:
    """A frozen model that an adapter prompts with features [B, F]."""

    model: Denoiser
    adapter: IPAdapter
    features: Tensor

    def __call__(self, x: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, known: Tensor) -> Tensor:
        with torch.no_grad():
            cond = self.model.condition(ids, ids_2, known)
            prompts = self.model.unet.prompt_keys(cond.context)
        cond = replace(cond, context=beside(prompts, self.adapter(self.features)))
        return self.model.unet(x, t, cond, MatmulAttention())


def untrained(unet: UNet, features: int) -> IPAdapter:
    """As published: its projections start as the text's."""
    adapter = IPAdapter(unet, ImageTokens(features, TOKENS, unet.config.context_width))
    blocks = {module.site: module.attn2 for module in unet.modules() if isinstance(module, TransformerBlock)}
    for site, layer in zip(adapter.layers, adapter.ip_adapter.values(), strict=True):
        layer.to_k_ip.weight.data.copy_(blocks[site].to_k.weight)
        layer.to_v_ip.weight.data.copy_(blocks[site].to_v.weight)
    return adapter


def draw_pairs(generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """POOL pairs of pictures [POOL, 3, 64, 64] of one subject each, in two scenes, and the second ones' captions."""
    given, wanted = (sample_scenes(POOL, generator, second_subject=0.0) for _ in range(2))
    for name in ("subject", "main", "second", "pattern"):
        getattr(wanted, name)[:] = getattr(given, name)
    return render(given)[0], render(wanted)[0], captions(wanted, generator)


def train_adapter(work: Path, schedule: Schedule, seed: int) -> None:
    """On a CPU; writes the adapter for the shipped checkpoint."""
    torch.manual_seed(seed)
    device = torch.device("cpu")
    tokenize, oracle = Captions(work), Oracle.load()
    vae, model = load_exported(CHECKPOINT, device)
    run = start(untrained(model.unet, oracle.subject_features[0].out_features))
    logger.info("%.2f M parameters", sum(p.numel() for p in run.model.parameters()) / 1e6)
    resume(run, work / "ip_adapter.safetensors")
    alpha_bars = ddim.alpha_bars(ScheduleConfig.from_json(SCHEDULER_JSON))
    pool: tuple[int, Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def loss_of(step: int) -> Tensor:
        nonlocal pool
        number, place = divmod(step * schedule.batch, POOL)
        if pool is None or pool[0] != number:
            given, wanted, texts = draw_pairs(generator_for(seed, 12, number))
            pool = number, features_of(oracle, given).clone(), encode(vae, wanted), tokenize(texts, device)
        _, features, latents, ids = pool
        generator = generator_for(seed, 13, step)
        index = (place + torch.arange(schedule.batch)) % POOL
        # Colours are settled early, at high noise: more of those timesteps, and the error of the predicted latents.
        t = (len(alpha_bars) * torch.rand(schedule.batch, generator=generator).sqrt()).long()
        eps = torch.randn(schedule.batch, *latents.shape[1:], generator=generator)
        known = torch.rand(schedule.batch, generator=generator) >= CAPTION_DROPOUT
        shown = torch.rand(schedule.batch, 1, generator=generator) >= FEATURE_DROPOUT
        prompted = Prompted(model, run.model, features[index] * shown)
        return denoising_loss(
            prompted, alpha_bars, latents[index], eps, t, ids[0][index], ids[1][index], known, weight=torch.reciprocal
        )

    train(run, schedule, loss_of, work / "ip_adapter.safetensors")
    half = {key: value.half().contiguous() for key, value in run.average.state_dict().items()}
    save_file(half, WEIGHTS, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    train_adapter(args.work, Schedule(args.images, None, args.batch, args.rate, warm_up=50), args.seed)


if __name__ == "__main__":
    main()
