"""A loaded checkpoint and the call that tells a story with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import consistory.weights
from consistory.weights import loading
from consistory.weights.errors import ConsistoryError

from .arguments import (
    check_anchors,
    check_chunk,
    check_finite,
    check_latents,
    check_list,
    check_prompts,
    check_sampling,
    check_tile,
    compose_prompts,
    expand_seeds,
    find_concept,
    initial_noise,
    usable_device,
)
from .config import ConsistoryConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from .correspondence import Nearest
from .images import save_story
from .offload import on_device
from .story import OnStep, Plan, tell
from .subject import Recipe, Subject
from .text import TextEncoder
from .tiling import tiled_decode
from .tokenizer import Tokenizer
from .unet import Conditioning, UNet
from .vae import VAE

SPRITES = Path(consistory.weights.__file__).parent / "sprites" / "checkpoint"
WHOLE_PIXELS = 1024 * 1024  # larger ones are decoded in tiles; of this size, SDXL's take 2.5 GiB, and 0.9 in tiles
TILE = 32  # rows


@dataclass(frozen=True)
class Story:
    """Pictures of one subject, and how they came about.

    images: uint8 [N, H, W, 3].  latents: float32 [N, 4, h, w], the last ones.
    masks: {stride: bool [N, P]} and nearest: {stride: indices and distances [N, A, P]}, what injection used.
    settings: the parameters of the run, as JSON would hold them.
    subject: the anchors, for more pictures of the same subject.
    """

    images: NDArray[np.uint8]
    prompts: list[str]
    concepts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    latents: Tensor
    masks: dict[int, Tensor]
    nearest: dict[int, Nearest]
    subject: Subject

    def select(self, pictures: slice) -> Story:
        """The story with some of its pictures only."""
        return replace(
            self,
            images=self.images[pictures],
            prompts=self.prompts[pictures],
            seeds=self.seeds[pictures],
            latents=self.latents[pictures],
            masks={stride: mask[pictures] for stride, mask in self.masks.items()},
            nearest={s: Nearest(n.index[pictures], n.distance[pictures]) for s, n in self.nearest.items()},
        )

    def join(self, others: Sequence[Story]) -> Story:
        """One story of the pictures of this and other stories of the same subject."""
        parts = [self, *others]
        return replace(
            self,
            images=np.concatenate([part.images for part in parts]),
            prompts=[prompt for part in parts for prompt in part.prompts],
            seeds=[seed for part in parts for seed in part.seeds],
            latents=torch.cat([part.latents for part in parts]),
            masks={s: torch.cat([part.masks[s] for part in parts]) for s in self.masks},
            nearest={
                s: Nearest(*(torch.cat([getattr(part.nearest[s], x) for part in parts]) for x in ("index", "distance")))
                for s in self.nearest
            },
            subject=max((part.subject for part in parts), key=lambda subject: subject.recipe.next_seed),
        )

    def save(self, folder: str | Path) -> None:
        """Write numbered PNGs, a grid and `story.json`. Raises ConsistoryError if the folder cannot be written."""
        save_story(self, Path(folder))


@dataclass(frozen=True)
class ConsiStory:
    """An SDXL checkpoint, ready to tell stories: `ConsiStory.from_pretrained("sprites")(subject="a cat", ...)`.

    device: where everything runs. Weights that lie elsewhere are there only while their module runs.
    tile: rows of a tile, to decode any picture in tiles; None does so only above 1024 x 1024 pixels.
    """

    name: str
    tokenizers: tuple[Tokenizer, Tokenizer]
    text_encoders: tuple[TextEncoder, TextEncoder]
    unet: UNet
    vae: VAE
    schedule: ScheduleConfig
    zero_negative: bool  # without a negative prompt, the unconditional context and pooled state are zeros
    device: torch.device
    tile: int | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        variant: str | None = None, offload: bool = False, tile: int | None = None,
    ) -> ConsiStory:
        """Load "sprites" (the embedded model), or a folder in the diffusers layout.

        variant: which of several weights to take, such as "fp16"; found by itself where there is only one.
        offload: keep the weights in host memory; text encoders, UNet and autoencoder visit the device one after the
            other, while they run. That costs one copy of the weights a call (a chunk, if it has chunks). By default
            all of them stay on the device.
        tile: decode pictures of any size in tiles of so many rows, for a third of the memory and twice the work; by
            default only those of more than 1024 x 1024 pixels.
        Raises ConsistoryError for a missing, damaged or unsuitable checkpoint and for an unknown device.
        """
        folder = SPRITES if str(name) == "sprites" else Path(name)
        index = loading.read_model_index(folder)
        parts = {part: loading.folder_component(folder, part, variant) for part in loading.COMPONENTS}
        schedule = loading.read_json(folder / "scheduler" / "scheduler_config.json")
        tokenizers = Tokenizer.from_folder(folder / "tokenizer"), Tokenizer.from_folder(folder / "tokenizer_2")
        return cls._assemble(str(name), tokenizers, parts, schedule, index, device, dtype, offload, tile)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        offload: bool = False, tile: int | None = None,
    ) -> ConsiStory:
        """Load an SDXL checkpoint in the original layout, one `.safetensors` file. Options as for `from_pretrained`.

        Raises ConsistoryError for a missing, damaged or unsuitable checkpoint and for an unknown device.
        """
        configs = loading.sdxl_configs()
        parts = loading.single_file_components(Path(path), configs)
        tokenizers = Tokenizer.clip(), Tokenizer.clip(pad="!")
        schedule = loading.single_file_schedule(Path(path), configs["scheduler"])
        index = configs["model_index"]
        return cls._assemble(str(path), tokenizers, parts, schedule, index, device, dtype, offload, tile)

    @classmethod
    def _assemble(
        cls, name: str, tokenizers: tuple[Tokenizer, Tokenizer], parts: dict[str, loading.Component],
        schedule: loading.Json, index: loading.Json, device: str | torch.device, dtype: torch.dtype, offload: bool,
        tile: int | None,
    ) -> ConsiStory:
        device = usable_device(device)
        check_tile(tile)
        home = torch.device("cpu") if offload else device

        def load(part: str, build: Callable[[Any], Any], dtype: torch.dtype = dtype) -> Any:
            config, tensors = parts[part]
            return loading.load_module(lambda: build(config), tensors, dtype=dtype, device=home)

        # SDXL's decoder overflows in float16: black pictures.
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        return cls(
            name=name,
            tokenizers=tokenizers,
            text_encoders=(
                load("text_encoder", lambda c: TextEncoder(TextConfig.from_json(c))),
                load("text_encoder_2", lambda c: TextEncoder(TextConfig.from_json(c))),
            ),
            unet=load("unet", lambda c: UNet(UNetConfig.from_json(c))),
            vae=load("vae", lambda c: VAE(VAEConfig.from_json(c)), vae_dtype),
            schedule=ScheduleConfig.from_json(schedule),
            zero_negative=index.get("force_zeros_for_empty_prompt", True),
            device=device,
            tile=tile,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.inference_mode()
    def __call__(
        self,
        *,
        subject: str = "",
        settings: Sequence[str] = (),
        style: str = "",
        prompts: Sequence[str] | None = None,
        concepts: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int = 50,
        guidance: float = 5.0,
        negative_prompt: str | None = None,
        anchors: int | None = None,
        width: int | None = None,
        height: int | None = None,
        latents: Tensor | None = None,
        chunk: int | None = None,
        config: ConsistoryConfig | None = None,
        on_step: OnStep = lambda done, total: None,
    ) -> Story:
        """Tell a story: one picture for each setting (or whole prompt), all of the same subject.

        subject, settings, style: prompts are "{style} {subject} {setting}"; or give whole `prompts`.
        concepts: words or phrases for the subject that every prompt contains; by default the subject's head noun.
        seed: noise of picture i is seeded with seed + i, or with the i-th of several seeds; `latents` [N, 4, h, w] are
            noise given outright.
        anchors: the first so many pictures share their subject with all; by default 2.
        width, height: in pixels; by default what the checkpoint was trained for.
        chunk: draw at most so many pictures at a time beside the anchors, to save memory; the result does not depend
            on it but for rounding. Every chunk runs the anchors again: with 2 anchors, a story of 8 pictures takes the
            work of 18 for chunk=1, and of 12 for chunk=3. Needs seeds, not `latents`. By default all are drawn at once.
        config: the method's settings; by default `ConsistoryConfig()`.
        on_step: called as on_step(done, total) after every denoising step.

        Raises ConsistoryError, before any work, if the arguments do not fit together or do not fit the model.
        """
        config = config or ConsistoryConfig()
        prompts = compose_prompts(subject, settings, style) if prompts is None else prompts
        check_prompts(prompts)
        prompts, images = list(prompts), len(prompts)
        height, width = self._check_size(height, width)
        anchors = check_anchors(anchors, images)
        check_sampling(steps, self.schedule, guidance)
        seeds = expand_seeds(seed, images)
        concepts = self._concepts(concepts, subject, config)
        token_weights = self._token_weights(prompts, concepts)
        stride = self.vae.config.stride
        size = height // stride, width // stride
        check_chunk(chunk, latents)
        if latents is None:
            latents = initial_noise(seeds, (self.unet.config.channels, *size))
        check_latents(latents, (images, self.unet.config.channels, *size))
        first = images if chunk is None else min(images, anchors + chunk)
        parts = 1 if chunk is None else 1 + math.ceil((images - first) / chunk)

        context, pooled = self._contexts(prompts[:first], negative_prompt)
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(2 * first, 6)
        with on_device(self.unet, self.device):
            plan = Plan(
                unet=self.unet, schedule=self.schedule,
                cond=Conditioning(self.unet.prompt_keys(context), pooled, sizes),
                token_weights=token_weights[:first], config=config, steps=steps, guidance=guidance, anchors=anchors,
                seed=seeds[0], latent_size=size,
            )
            told = tell(
                plan, latents[:first].to(self.device, torch.float32), lambda done, total: on_step(done, parts * total)
            )
            del plan  # its keys and values of the prompts take memory that decoding may need
        settings_used = {
            "model": self.name, "steps": steps, "guidance": guidance, "negative_prompt": negative_prompt,
            "anchors": anchors, "width": width, "height": height, "dtype": str(self.dtype).removeprefix("torch."),
            "config": asdict(config),
        }
        recipe = Recipe(
            prompts=prompts[:anchors], seeds=seeds[:anchors], concepts=concepts, subject=subject, style=style,
            steps=steps, guidance=guidance, negative_prompt=negative_prompt, width=width, height=height,
            next_seed=max(seeds) + 1, config=config,
        )
        masks = {stride: mask[:anchors] for stride, mask in told.masks.items()}
        story = Story(
            images=self.decode(told.latents), prompts=prompts[:first], concepts=concepts, seeds=seeds[:first],
            settings=settings_used, latents=told.latents, masks=told.masks, nearest=told.nearest,
            subject=Subject(self, recipe, masks),
        )
        if parts == 1:
            return story

        def on_later(done: int, total: int) -> None:
            each = total // (parts - 1)
            on_step(each + done, each * parts)

        later = story.subject.extend(prompts=prompts[first:], seed=seeds[first:], chunk=chunk, on_step=on_later)
        return story.join([later])

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [N, 77, Cx], both encoders' states side by side, and pooled [N, D] of the second one."""
        encoded = []
        for i, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            ids = tokenizer.encode(prompts, warn=i == 0).to(self.device)
            with on_device(encoder, self.device):
                encoded.append(encoder(ids))
        (first, _), (second, pooled) = encoded
        return torch.cat([first, second], dim=-1), pooled

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [N, 4, h, w] -> pictures, uint8 [N, H, W, 3]; one at a time, since decoding takes much memory.

        Raises ConsistoryError if latents, or the pictures that the autoencoder makes of them, are not finite.
        """
        check_finite("the model's output", latents, self.dtype)
        dtype = self.vae.post_quant_conv.weight.dtype
        z = (latents / self.vae.config.scaling_factor).to(self.device, dtype)
        large = math.prod(z.shape[-2:]) * self.vae.config.stride**2 > WHOLE_PIXELS
        tile = self.tile or (TILE if large else None)
        decode = self.vae.decode if tile is None else partial(tiled_decode, self.vae, tile=tile)
        with on_device(self.vae, self.device):
            pictures = torch.cat([decode(one).float() for one in z.split(1)])
        check_finite("the autoencoder's output", pictures, dtype)
        pixels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def _contexts(self, prompts: list[str], negative_prompt: str | None) -> tuple[Tensor, Tensor]:
        """Context and pooled state of 2 N samples: the unconditional half, then the conditional half."""
        if negative_prompt is None and self.zero_negative:
            context, pooled = self.encode_prompts(prompts)
            return torch.cat([torch.zeros_like(context), context]), torch.cat([torch.zeros_like(pooled), pooled])
        context, pooled = self.encode_prompts([*prompts, negative_prompt or ""])
        unconditional = context[-1:].expand_as(context[:-1]), pooled[-1:].expand_as(pooled[:-1])
        return torch.cat([unconditional[0], context[:-1]]), torch.cat([unconditional[1], pooled[:-1]])

    def _token_weights(self, prompts: list[str], concepts: list[str]) -> Tensor:
        """[N, 77, K]. Raises ConsistoryError if a prompt lacks a concept."""
        if not concepts:
            return torch.zeros(len(prompts), self.tokenizers[0].length, 0, device=self.device)
        columns = [self.tokenizers[0].concept_positions(prompts, concept) for concept in concepts]
        return torch.stack(columns, dim=-1).to(self.device)

    def _concepts(self, concepts: Sequence[str] | None, subject: str, config: ConsistoryConfig) -> list[str]:
        """Those given, or the subject's noun where the method needs one. Raises ConsistoryError if it lacks one."""
        check_list("concepts", concepts or [])
        needed = config.masking and (config.sdsa or config.injection)
        if concepts or not needed:
            return list(concepts or [])
        if not subject:
            raise ConsistoryError("no concept is given: name the word that stands for the subject in every prompt")
        return [find_concept(subject)]

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.unet.config.sample_size * self.vae.config.stride
        multiple = self.vae.config.stride * 2 ** (len(self.unet.config.widths) - 1)
        height, width = (native if side is None else side for side in (height, width))
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ConsistoryError(f"size {width}x{height} does not fit the model: use multiples of {multiple} pixels")
        return height, width
