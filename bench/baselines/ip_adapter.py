"""IP-Adapter (Ye et al. 2023): every cross-attention also reads a few tokens made of a picture's features.

    python bench/baselines/ip_adapter.py --work runs/adapter    # -> ip_adapter.safetensors next to this file

Trained once, on pairs of rendered pictures of one subject: the features of one, and the caption of the other, lead to
the other. Features are the oracle's of the subject, which take the place of CLIP's: no CLIP has seen `sprites`.
Weights carry the published names, so that `IPAdapter.load` reads files for SDXL just so (`image_proj.proj` kind, for
CLIP's pooled features).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
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
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consistory import ddim
from consistory.attention import Around, AttentionControl, Site, TransformerBlock
from consistory.config import ScheduleConfig
from consistory.sdsa import Consistent
from consistory.story import Observer, Plan, State
from consistory.unet import UNet

WEIGHTS = Path(__file__).with_name("ip_adapter.safetensors")
CHECKPOINT = Path(__file__).parents[2] / "weights" / "sprites" / "checkpoint"
TOKENS = 4
FEATURE_DROPOUT = 0.1  # share of samples without features, for guidance
POOL = 4096  # pairs that are rendered and encoded at once

logger = logging.getLogger(__name__)


# --- the network ------------------------------------------------------------------------------------------------------


class ImageTokens(nn.Module):
    """Features [B, F] -> tokens [B, TOKENS, C']."""

    def __init__(self, features: int, context_width: int):
        super().__init__()
        self.proj = nn.Linear(features, TOKENS * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(x), "b (t c) -> b t c", t=TOKENS))


class KeysValues(nn.Module):
    """What a cross-attention layer makes of tokens [B, T, C']: keys and values, each [B, H, T, d]."""

    def __init__(self, context_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_k_ip = nn.Linear(context_width, width, bias=False)
        self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_k_ip(tokens), self.to_v_ip(tokens)
        return tuple(rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in (k, v))


class IPAdapter(nn.Module):
    """The published layout: `image_proj`, and `ip_adapter.N` for the N-th attention, cross-attentions being odd."""

    def __init__(self, unet: UNet, features: int):
        super().__init__()
        blocks = {module.site: module for module in unet.modules() if isinstance(module, TransformerBlock)}
        order = {"encoder": 0, "decoder": 1, "mid": 2}  # in which the published files count
        self.sites = sorted(blocks, key=lambda site: (order[site.part], site.index))
        self.image_proj = ImageTokens(features, unet.config.context_width)
        self.ip_adapter = nn.ModuleDict()
        for i, site in enumerate(self.sites):
            attention = blocks[site].attn2
            own = KeysValues(unet.config.context_width, attention.to_k.out_features, attention.heads)
            # As published: it starts as the text's.
            own.to_k_ip.weight.data.copy_(attention.to_k.weight)
            own.to_v_ip.weight.data.copy_(attention.to_v.weight)
            self.ip_adapter[str(2 * i + 1)] = own

    def forward(self, features: Tensor) -> dict[Site, tuple[Tensor, Tensor]]:
        """[B, F] -> keys and values of every layer, [B, H, T, d]. Zeros stand for no picture."""
        tokens = self.image_proj(features)
        return {site: own(tokens) for site, own in zip(self.sites, self.ip_adapter.values(), strict=True)}

    @classmethod
    def load(cls, path: Path, unet: UNet) -> IPAdapter:
        """A file with the published names, for a UNet like this one."""
        tensors = load_file(path)
        adapter = cls(unet, features=tensors["image_proj.proj.weight"].shape[1])
        adapter.load_state_dict(tensors)
        return adapter.to(unet.conv_in.weight).requires_grad_(False)


class Decoupled(Around):
    """Cross-attention to the prompt, plus `scale` times cross-attention to a picture."""

    def __init__(self, inner: AttentionControl, picture: Mapping[Site, tuple[Tensor, Tensor]], scale: float = 1.0):
        super().__init__(inner)
        self.picture, self.scale = picture, scale

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        prompt = super().cross_attention(q, k, v, site)
        return prompt + self.scale * AttentionControl().cross_attention(q, *self.picture[site], site)


class Prompter(Observer):
    """Prompts every picture of a story with the features [F] of one: `pipe(..., observer=Prompter(...))`."""

    def __init__(self, adapter: IPAdapter, features: Tensor, scale: float = 1.0):
        features = features.to(adapter.image_proj.proj.weight)
        self.keys_values, self.scale = adapter(torch.stack([torch.zeros_like(features), features])), scale

    def control(self, plan: Plan, state: State, control: Consistent) -> AttentionControl:
        n = len(state.x)
        picture = {site: (both(k, n), both(v, n)) for site, (k, v) in self.keys_values.items()}
        return Decoupled(control, picture, self.scale)


def both(x: Tensor, n: int) -> Tensor:
    """[2, ...] -> [2 n, ...]: without the picture for the unconditional half, with it for the other."""
    return x.repeat_interleave(n, dim=0)


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
        return self.model.unet(x, t, cond, Decoupled(MatmulAttention(), self.adapter(self.features)))


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
    run = start(IPAdapter(model.unet, oracle.subject_features[0].out_features))
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
