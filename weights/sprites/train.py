"""Train the sprites model: SDXL's architecture in small, on endless pictures of the sprites world.

    python -m consistory.weights.sprites.train vae    --work runs/sprites --images 30000
    python -m consistory.weights.sprites.train unet   --work runs/sprites --images 150000
    python -m consistory.weights.sprites.train export --work runs/sprites --checkpoint weights/sprites/checkpoint

    python -m consistory.weights.sprites.train control --work runs/control --images 20000

Stage 1 is the autoencoder; `decoder` trains its second half only, also after stage 2. Stage 2 is the UNet together with
both text encoders, which start from random weights too. `control` trains a ControlNet for silhouettes on an exported
checkpoint, which stays as it is, and writes it into the folder `control` next to that.
A run that was stopped goes on exactly where its last checkpoint was. With a longer `--images` (or `--minutes`, for
machines whose speed is not known) a finished run goes on as well; its learning rate jumps to where the longer cosine
has it. While it runs, the work folder holds the checkpoint and a sheet of samples. On another machine, `restore` makes
a work folder from an exported checkpoint.

Runs on CUDA, where there is one, or on CPU: in bfloat16 on either if the hardware multiplies it fast.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consistory import ddim
from consistory.attention import AttentionControl, Site
from consistory.config import ControlNetConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from consistory.controlnet import ControlNet, add_residuals
from consistory.text import TextEncoder
from consistory.tokenizer import Tokenizer
from consistory.unet import Conditioning, UNet
from consistory.vae import VAE
from consistory.weights.sprites.loop import Plan, below, generator_for, mixed_precision, resume, start, train
from consistory.weights.sprites.tokenizer import END, build_tokenizer
from consistory.weights.sprites.world import SETTINGS, SUBJECTS, captions, render, sample_scenes

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
# Sizes that a sample is conditioned on: original height and width, crop top and left, target height and width.
SIZES = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)

VAE_JSON: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": IMAGE_SIZE,
    "scaling_factor": 1.0,  # measured at the end of the training
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
TEXT_WIDTHS = (64, 96)
UNET_JSON: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "attention_head_dim": [2, 4],  # the numbers of heads: diffusers' name
    "block_out_channels": [64, 128],
    "cross_attention_dim": sum(TEXT_WIDTHS),
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 16,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": TEXT_WIDTHS[1] + 6 * 16,
    "sample_size": IMAGE_SIZE // 2,
    "transformer_layers_per_block": [1, 1],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "use_linear_projection": True,
}
DECODER_ONLY = ("out_channels", "sample_size", "up_block_types")
CONTROL_JSON: dict[str, Any] = {key: value for key, value in UNET_JSON.items() if key not in DECODER_ONLY} | {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32],
    "controlnet_conditioning_channel_order": "rgb",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],  # attention at the coarser resolution only: faster
}
SCHEDULER_JSON: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
MODEL_INDEX_JSON: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

POOL = 4096  # scenes that are rendered and encoded at once
PASSES = 3  # how often each of them is used, with another caption and other noise
CAPTION_DROPOUT = 0.1  # share of samples that learn the unconditional prediction, for guidance
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023): low noise levels count less than they would by eps alone
KL_WEIGHT = 0.001  # keeps latents near unit size, and a little noise in them, so that they are smooth
GUIDANCE = 5.0  # of the sample pictures


def text_json(index: int, vocabulary: int) -> dict[str, Any]:
    """The configuration of the first or second text encoder."""
    width = TEXT_WIDTHS[index]
    return {
        "architectures": [("CLIPTextModel", "CLIPTextModelWithProjection")[index]],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": ("quick_gelu", "gelu")[index],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": width // 32,
        "num_hidden_layers": 2,
        "pad_token_id": (vocabulary - 1, 0)[index],
        "projection_dim": TEXT_WIDTHS[1],
        "vocab_size": vocabulary,
    }


# ---------------------------------------------------------------- stage 1: the autoencoder


def vae_loss(vae: VAE, images: Tensor, noise: Tensor) -> Tensor:
    """L1 on pixels and on their differences (edges), and a little Kullback-Leibler divergence from N(0, 1).

    images [B, 3, H, W] in [-1, 1], noise [B, 4, h, w].
    """
    with mixed_precision(images.device):
        mean, logvar = vae.encode(images)
        mean, logvar = mean.float(), logvar.float()
        decoded = vae.decode(mean + noise * (0.5 * logvar).exp()).float()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(decoded, images) + edges + KL_WEIGHT * divergence


def train_vae(work: Path, plan: Plan, seed: int, device: torch.device, learning: str = "") -> None:
    """learning: "decoder." leaves the encoder, and thereby the latents that a UNet has learned, as they are."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig.from_json(VAE_JSON)).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks this argument
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    run = start(vae)
    resume(run, work / "vae.safetensors")
    pictures: tuple[int, Tensor] | None = None

    def loss_of(step: int) -> Tensor:
        nonlocal pictures
        number, place = divmod(step * plan.batch, PASSES * POOL)
        if pictures is None or pictures[0] != number:
            scenes = sample_scenes(POOL, generator_for(seed, 1, number))
            pictures = number, render(scenes.to(device), IMAGE_SIZE)[0]
        images = pictures[1][(place + torch.arange(plan.batch, device=device)) % POOL]
        generator = generator_for(seed, 8, step, device=device)
        noise = torch.randn(plan.batch, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2, generator=generator, device=device)
        return vae_loss(vae, 2 * images - 1, noise)

    def sheet(path: Path) -> None:
        images, _ = render(sample_scenes(16, generator_for(seed, 2)).to(device), IMAGE_SIZE)
        with torch.no_grad():
            decoded = run.average.decode(run.average.encode(2 * images - 1)[0])
        save_grid(torch.cat([images, decoded / 2 + 0.5]), path, columns=8)
        logger.info("mean absolute error %.4f of the range", (decoded / 2 + 0.5 - images).abs().mean().item())

    train(run, plan, loss_of, work / "vae.safetensors", sheet)


def load_vae(work: Path, device: torch.device) -> VAE:
    """The trained autoencoder, with the scaling factor that gives its latents unit variance."""
    vae = VAE(VAEConfig.from_json(VAE_JSON))
    vae.load_state_dict(below("average.", load_file(work / "vae.safetensors")))
    vae.requires_grad_(False).to(device)
    images, _ = render(sample_scenes(512, generator_for(0, 3)).to(device), IMAGE_SIZE)
    factor = 1 / encode(vae, images).std().item()
    vae.config = replace(vae.config, scaling_factor=factor * vae.config.scaling_factor)
    return vae


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> Tensor:
    """images [B, 3, H, W] in [0, 1] -> latents [B, 4, h, w], scaled."""
    with mixed_precision(images.device):
        means = [vae.encode(2 * part - 1)[0].float() for part in images.split(1024 if images.is_cuda else 128)]
    return vae.config.scaling_factor * torch.cat(means)


# ---------------------------------------------------------------- stage 2: the UNet and both text encoders


class MatmulAttention(AttentionControl):
    """Attention as plain matrix products: on CPU, training runs faster so than through PyTorch's fused attention."""

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.self_attention(q, k, v, site)


class Denoiser(nn.Module):
    """All that learns in stage 2; its children carry the names of the checkpoint's folders."""

    sizes: Tensor

    def __init__(self, vocabulary: int):
        super().__init__()
        self.register_buffer("sizes", torch.tensor(SIZES, dtype=torch.float32), persistent=False)
        self.text_encoder = TextEncoder(TextConfig.from_json(text_json(0, vocabulary)))
        self.text_encoder_2 = TextEncoder(TextConfig.from_json(text_json(1, vocabulary)))
        self.unet = UNet(UNetConfig.from_json(UNET_JSON))
        for encoder in (self.text_encoder, self.text_encoder_2):
            # Words start out weightier than their places: which word it is matters more than where it stands.
            nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight, std=0.2)

    def condition(self, ids: Tensor, ids_2: Tensor, known: Tensor | None = None) -> Conditioning:
        """Token ids [B, 77] of both tokenizers -> conditioning; zeros, as SDXL has it, where `known` [B] is False."""
        (context, _), (context_2, pooled) = self.text_encoder(ids), self.text_encoder_2(ids_2)
        context = torch.cat([context, context_2], dim=-1)
        if known is not None:
            context, pooled = context * known[:, None, None], pooled * known[:, None]
        return Conditioning(context, pooled, self.sizes.expand(len(ids), 6))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, known: Tensor | None = None) -> Tensor:
        """The predicted noise [B, 4, h, w]."""
        control = MatmulAttention() if x.device.type == "cpu" else AttentionControl()
        return self.unet(x, t, self.condition(ids, ids_2, known), control)


class Captions:
    """Captions -> ids of both tokenizers. There are few different captions, so each is tokenised once."""

    def __init__(self, work: Path):
        build_tokenizer(work / "tokenizer", pad=END)
        build_tokenizer(work / "tokenizer_2", pad="!")
        self.tokenizers = [Tokenizer.from_folder(work / name) for name in ("tokenizer", "tokenizer_2")]
        self.vocabulary = self.tokenizers[0].end + 1
        self._row = functools.cache(self._encode)

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """B captions -> two tensors of ids, [B, 77]."""
        ids, ids_2 = (torch.stack(rows).to(device) for rows in zip(*map(self._row, texts), strict=True))
        return ids, ids_2

    def _encode(self, text: str) -> tuple[Tensor, ...]:
        return tuple(tokenizer.encode([text])[0] for tokenizer in self.tokenizers)


@dataclass(frozen=True)
class Pool:
    """Scenes drawn, encoded and captioned at once; each is used PASSES times, then comes the next pool.

    latents [POOL, 4, h, w]; ids, ids_2 [PASSES * POOL, 77], another caption for every pass.
    """

    number: int
    latents: Tensor
    ids: Tensor
    ids_2: Tensor

    @classmethod
    def draw(cls, vae: VAE, tokenize: Captions, seed: int, number: int, device: torch.device) -> Pool:
        return cls.draw_with_masks(vae, tokenize, seed, number, device)[0]

    @classmethod
    def draw_with_masks(
        cls, vae: VAE, tokenize: Captions, seed: int, number: int, device: torch.device
    ) -> tuple[Pool, Tensor]:
        """Also the first subjects' silhouettes, bool [POOL, H, W]."""
        generator = generator_for(seed, 4, number)
        scenes = sample_scenes(POOL, generator)
        texts = [text for _ in range(PASSES) for text in captions(scenes, generator)]
        images, masks = render(scenes.to(device), IMAGE_SIZE)
        return cls(number, encode(vae, images), *tokenize(texts, device)), masks


def min_snr(snr: Tensor) -> Tensor:
    return snr.clamp(max=SNR_CAP) / snr


def denoising_loss(
    model: Callable[..., Tensor], alpha_bars: Tensor, x0: Tensor, eps: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor,
    known: Tensor, weight: Callable[[Tensor], Tensor] = min_snr,
) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted noise, weighted by a function of the signal-to-noise ratio.

    x0, eps [B, 4, h, w], t [B], ids [B, 77], known [B]: whether the caption is given.
    """
    alpha_bar = alpha_bars[t][:, None, None, None]
    with mixed_precision(x0.device):
        predicted = model(ddim.add_noise(x0, eps, alpha_bar), t, ids, ids_2, known).float()
    snr = alpha_bar / (1 - alpha_bar)
    return (weight(snr) * (predicted - eps) ** 2).mean()


def graphed(model: Denoiser, batch: int) -> Callable[..., Tensor]:
    """The model in training as two CUDA graphs, forward and backward: its many small kernels cost little to launch."""
    x = torch.zeros(batch, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2, device="cuda")
    t, known = (torch.zeros(batch, dtype=dtype, device="cuda") for dtype in (torch.int64, torch.bool))
    ids, ids_2 = (torch.zeros(batch, 77, dtype=torch.int64, device="cuda") for _ in range(2))
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        call = torch.cuda.make_graphed_callables(model, (x, t, ids, ids_2, known), allow_unused_input=True)
    return cast(Callable[..., Tensor], call)


def train_unet(work: Path, plan: Plan, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    tokenize = Captions(work)
    vae = load_vae(work, device)
    model = Denoiser(tokenize.vocabulary).to(device)
    logger.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    run = start(model)
    resume(run, work / "unet.safetensors")
    alpha_bars = ddim.alpha_bars(ScheduleConfig.from_json(SCHEDULER_JSON)).to(device)
    denoiser: Callable[..., Tensor] = graphed(model, plan.batch) if device.type == "cuda" else model
    pool: Pool | None = None

    def loss_of(step: int) -> Tensor:
        nonlocal pool
        number, place = divmod(step * plan.batch, PASSES * POOL)
        if pool is None or pool.number != number:
            pool = Pool.draw(vae, tokenize, seed, number, device)
        generator = generator_for(seed, 5, step, device=device)
        # A batch that runs over the pool's end starts over.
        index = (place + torch.arange(plan.batch, device=device)) % (PASSES * POOL)
        x0 = pool.latents[index % POOL]
        t = torch.randint(len(alpha_bars), (plan.batch,), generator=generator, device=device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        known = torch.rand(plan.batch, generator=generator, device=device) >= CAPTION_DROPOUT
        return denoising_loss(denoiser, alpha_bars, x0, eps, t, pool.ids[index], pool.ids_2[index], known)

    def sheet(path: Path) -> None:
        prompts = [f"a {s} {SETTINGS[(2 * i + j) % len(SETTINGS)]}" for i, s in enumerate(SUBJECTS) for j in range(2)]
        save_grid(sample(run.average, vae, tokenize(prompts, device), generator_for(seed, 6)), path, columns=8)

    train(run, plan, loss_of, work / "unet.safetensors", sheet)


@torch.no_grad()
def sample(
    model: Denoiser,
    vae: VAE,
    ids: tuple[Tensor, Tensor],
    generator: torch.Generator,
    steps: int = 20,
    controlled: Controlled | None = None,
) -> Tensor:
    """Plain DDIM with classifier-free guidance: ids of both tokenizers, [B, 77] -> images [B, 3, H, W] in [0, 1]."""
    predict = model.unet if controlled is None else controlled.predict
    schedule = ScheduleConfig.from_json(SCHEDULER_JSON)
    device, n = ids[0].device, len(ids[0])
    known = torch.arange(2 * n, device=device) >= n
    with mixed_precision(device):
        cond = model.condition(ids[0].repeat(2, 1), ids[1].repeat(2, 1), known)
    x = torch.randn(n, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2, generator=generator).to(device)
    for t in ddim.timesteps(schedule, steps):
        with mixed_precision(device):
            unconditional, conditional = predict(x.repeat(2, 1, 1, 1), t, cond).float().chunk(2)
        eps = unconditional + GUIDANCE * (conditional - unconditional)
        x = ddim.step(x, eps, ddim.alpha_bars(schedule)[t], ddim.alpha_bar_after(schedule, steps, t))
    return (vae.decode(x / vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------- a ControlNet for silhouettes


@dataclass(frozen=True)
class Controlled:
    """A trained model, steered by a ControlNet with silhouettes [B, H, W], bool."""

    model: Denoiser
    net: ControlNet
    silhouettes: Tensor

    def __call__(self, x: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, known: Tensor) -> Tensor:
        with torch.no_grad():
            cond = self.model.condition(ids, ids_2, known)
        return self.predict(x, t, cond)

    def predict(self, x: Tensor, t: Tensor | int, cond: Conditioning) -> Tensor:
        """The predicted noise [B', 4, h, w]; B' is B, or 2 B for both halves of guidance."""
        attention = AttentionControl()
        hint = self.net.hint(pictures_of(self.silhouettes)).repeat(len(x) // len(self.silhouettes), 1, 1, 1)
        residuals = self.net(x, t, cond, hint)
        with torch.no_grad():
            encoded = self.model.unet.encode(x, t, cond, attention)
        return self.model.unet.decode(add_residuals(encoded, [residuals]), attention)


def pictures_of(silhouettes: Tensor) -> Tensor:
    """bool [B, H, W] -> white on black, [B, 3, H, W]."""
    return silhouettes[:, None].float().expand(-1, 3, -1, -1)


def load_exported(folder: Path, device: torch.device) -> tuple[VAE, Denoiser]:
    """The autoencoder and the model of an exported checkpoint, frozen."""
    vae = VAE(VAEConfig.from_json(_read_json(folder / "vae" / "config.json")))
    vae.load_state_dict(_exported_tensors(folder / "vae"))
    model = Denoiser(_read_json(folder / "text_encoder" / "config.json")["vocab_size"])
    for name, child in model.named_children():
        child.load_state_dict(_exported_tensors(folder / name))
    return vae.requires_grad_(False).to(device), model.requires_grad_(False).to(device)


def copy_encoder(unet: UNet, silhouettes: Tensor) -> ControlNet:
    """A ControlNet that starts as the UNet's first half, and adds zeros.

    Hints of silhouettes [B, H, W] start with zero mean and unit variance, not at zero, so that the zero convolutions
    have something to go by: with zeros at both ends, nothing is learned for a long while.
    """
    net = ControlNet(ControlNetConfig.from_json(CONTROL_JSON))
    copied = {name: value for name, value in unet.state_dict().items() if name in net.state_dict()}
    net.load_state_dict(copied, strict=False)
    last = net.controlnet_cond_embedding.conv_out
    assert last.bias is not None
    last.reset_parameters()
    with torch.no_grad():
        std, mean = torch.std_mean(net.hint(pictures_of(silhouettes)), dim=(0, 2, 3))
        last.weight /= std[:, None, None, None]
        last.bias.sub_(mean).div_(std)
    return net


def train_control(work: Path, plan: Plan, seed: int, device: torch.device, folder: Path) -> None:
    """The ControlNet for the checkpoint in `folder`; it is written into the folder `control` next to it."""
    torch.manual_seed(seed)
    tokenize = Captions(work)
    vae, model = load_exported(folder, device)
    _, silhouettes = render(sample_scenes(64, generator_for(seed, 11)))
    run = start(copy_encoder(model.unet, silhouettes).to(device))
    logger.info("%.2f M parameters", sum(p.numel() for p in run.model.parameters()) / 1e6)
    resume(run, work / "control.safetensors")
    alpha_bars = ddim.alpha_bars(ScheduleConfig.from_json(SCHEDULER_JSON)).to(device)
    pool: tuple[int, Pool, Tensor] | None = None

    def loss_of(step: int) -> Tensor:
        nonlocal pool
        number, place = divmod(step * plan.batch, PASSES * POOL)
        if pool is None or pool[0] != number:
            pool = number, *Pool.draw_with_masks(vae, tokenize, seed, number, device)
        _, scenes, silhouettes = pool
        generator = generator_for(seed, 9, step, device=device)
        index = (place + torch.arange(plan.batch, device=device)) % (PASSES * POOL)
        x0 = scenes.latents[index % POOL]
        # Layouts are settled early, at high noise: more of those timesteps, and the error of the predicted latents.
        t = (len(alpha_bars) * torch.rand(plan.batch, generator=generator, device=device).sqrt()).long()
        eps = torch.randn(x0.shape, generator=generator, device=device)
        known = torch.rand(plan.batch, generator=generator, device=device) >= CAPTION_DROPOUT
        controlled = Controlled(model, run.model, silhouettes[index % POOL])
        ids, ids_2 = scenes.ids[index], scenes.ids_2[index]
        return denoising_loss(controlled, alpha_bars, x0, eps, t, ids, ids_2, known, weight=torch.reciprocal)

    def sheet(path: Path) -> None:
        scenes = sample_scenes(8, generator_for(seed, 10), second_subject=0.0)
        _, silhouettes = render(scenes.to(device), IMAGE_SIZE)
        controlled = Controlled(model, run.average, silhouettes)
        ids = tokenize(captions(scenes, generator_for(seed, 10)), device)
        images = sample(model, vae, ids, generator_for(seed, 6), controlled=controlled)
        save_grid(torch.cat([pictures_of(silhouettes), images]), path, columns=8)

    train(run, plan, loss_of, work / "control.safetensors", sheet)
    out = folder.parent / "control"
    _write_json(out / "config.json", CONTROL_JSON)
    half = {key: value.half().cpu().contiguous() for key, value in run.average.state_dict().items()}
    save_file(half, out / "diffusion_pytorch_model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- results


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images [B, 3, H, W] in [0, 1] as one PNG, twice their size."""
    from PIL import Image  # a part of the extra `cli`; training itself does without

    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()
    pixels = pixels.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels.numpy()).save(partial, format="PNG")
    os.replace(partial, path)


def export(work: Path, folder: Path) -> None:
    """Write what was trained as a checkpoint in diffusers' folder layout, float16."""
    build_tokenizer(folder / "tokenizer", pad=END)
    build_tokenizer(folder / "tokenizer_2", pad="!")
    vocabulary = Tokenizer.from_folder(folder / "tokenizer").end + 1
    vae = load_vae(work, torch.device("cpu"))
    average = below("average.", load_file(work / "unet.safetensors"))

    parts = {
        "text_encoder": (text_json(0, vocabulary), below("text_encoder.", average)),
        "text_encoder_2": (text_json(1, vocabulary), below("text_encoder_2.", average)),
        "unet": (UNET_JSON, below("unet.", average)),
        "vae": (VAE_JSON | {"scaling_factor": vae.config.scaling_factor}, vae.state_dict()),
    }
    for name, (config, tensors) in parts.items():
        weights = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
        _write_json(folder / name / "config.json", config)
        half = {key: value.half().contiguous() for key, value in tensors.items()}
        save_file(half, folder / name / weights, {"format": "pt"})
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_JSON)
    _write_json(folder / "model_index.json", MODEL_INDEX_JSON)


def restore(folder: Path, work: Path) -> None:
    """Make a work folder from an exported checkpoint, so that training goes on where no earlier work folder is left.

    The optimizer and the schedule start anew.
    """
    children = ("text_encoder", "text_encoder_2", "unet")
    parts = {
        "vae.safetensors": _exported_tensors(folder / "vae"),
        "unet.safetensors": {
            f"{child}.{key}": value for child in children for key, value in _exported_tensors(folder / child).items()
        },
    }
    for name, part in parts.items():
        both = {f"{kind}.{key}": value.clone() for kind in ("model", "average") for key, value in part.items()}
        save_file(both, work / name, {"step": "0", "seconds": "0"})


def _exported_tensors(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return {key: value.float() for key, value in load_file(path).items()}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the sprites model.")
    parser.add_argument("job", choices=("vae", "decoder", "unet", "control", "export", "restore"))
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and sample sheets")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, help="how many images to train on, in all")
    length.add_argument("--minutes", type=float, help="how long to train, in all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint",
        help="export to it, restore from it, or make a ControlNet for it",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.job == "export":
        export(args.work, args.checkpoint)
        return
    if args.job == "restore":
        restore(args.checkpoint, args.work)
        return
    if args.images is None and args.minutes is None:
        parser.error("say how long to train: --images or --minutes")
    plan = Plan(args.images, args.minutes, args.batch, args.rate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # shapes never change
    if args.job == "unet":
        train_unet(args.work, plan, args.seed, device)
    elif args.job == "control":
        train_control(args.work, plan, args.seed, device, args.checkpoint)
    else:
        train_vae(args.work, plan, args.seed, device, learning="decoder." if args.job == "decoder" else "")


if __name__ == "__main__":
    main()
