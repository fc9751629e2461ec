"""A loaded checkpoint and the call that tells a story with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import consistory.weights
from consistory.weights import loading
from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from .correspondence import Nearest
from .images import save_story
from .story import OnStep, Plan, tell
from .text import TextEncoder
from .tokenizer import Tokenizer
from .unet import Conditioning, UNet
from .vae import VAE

logger = logging.getLogger(__name__)

SPRITES = Path(consistory.weights.__file__).parent / "sprites" / "checkpoint"


@dataclass(frozen=True)
class Story:
    """Pictures of one subject, and how they came about.

    images: uint8 [N, H, W, 3].  latents: float32 [N, 4, h, w], the last ones.
    masks: {stride: bool [N, P]} and nearest: {stride: indices and distances [N, A, P]}, what injection used.
    settings: the parameters of the run, as JSON would hold them.
    """

    images: NDArray[np.uint8]
    prompts: list[str]
    concepts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    latents: Tensor
    masks: dict[int, Tensor]
    nearest: dict[int, Nearest]

    def save(self, folder: str | Path) -> None:
        """Write numbered PNGs, a grid and `story.json`. Raises ConsistoryError if the folder cannot be written."""
        save_story(self, Path(folder))


@dataclass(frozen=True)
class ConsiStory:
    """An SDXL checkpoint, ready to tell stories: `ConsiStory.from_pretrained("sprites")(subject="a cat", ...)`."""

    name: str
    tokenizers: tuple[Tokenizer, Tokenizer]
    text_encoders: tuple[TextEncoder, TextEncoder]
    unet: UNet
    vae: VAE
    schedule: ScheduleConfig
    zero_negative: bool  # without a negative prompt, the unconditional context and pooled state are zeros

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> ConsiStory:
        """Load "sprites" (the embedded model), or a folder in the diffusers layout.

        variant: which of several weights to take, such as "fp16"; found by itself where there is only one.
        Raises ConsistoryError for a missing, damaged or unsuitable checkpoint and for an unknown device.
        """
        folder = SPRITES if str(name) == "sprites" else Path(name)
        index = loading.read_model_index(folder)
        parts = {part: loading.folder_component(folder, part, variant) for part in loading.COMPONENTS}
        schedule = loading.read_json(folder / "scheduler" / "scheduler_config.json")
        tokenizers = Tokenizer.from_folder(folder / "tokenizer"), Tokenizer.from_folder(folder / "tokenizer_2")
        return cls._assemble(str(name), tokenizers, parts, schedule, index, device, dtype)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ConsiStory:
        """Load an SDXL checkpoint in the original layout, one `.safetensors` file.

        Raises ConsistoryError for a missing, damaged or unsuitable checkpoint and for an unknown device.
        """
        configs = loading.sdxl_configs()
        parts = loading.single_file_components(Path(path), configs)
        tokenizers = Tokenizer.clip(), Tokenizer.clip(pad="!")
        schedule = loading.single_file_schedule(Path(path), configs["scheduler"])
        return cls._assemble(str(path), tokenizers, parts, schedule, configs["model_index"], device, dtype)

    @classmethod
    def _assemble(
        cls, name: str, tokenizers: tuple[Tokenizer, Tokenizer], parts: dict[str, loading.Component],
        schedule: loading.Json, index: loading.Json, device: str | torch.device, dtype: torch.dtype,
    ) -> ConsiStory:
        device = usable_device(device)

        def load(part: str, build: Callable[[Any], Any], dtype: torch.dtype = dtype) -> Any:
            config, tensors = parts[part]
            return loading.load_module(lambda: build(config), tensors, dtype=dtype, device=device)

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
        )

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

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
        config: the method's settings; by default `ConsistoryConfig()`.
        on_step: called as on_step(done, total) after every denoising step.

        Raises ConsistoryError, before any work, if the arguments do not fit together or do not fit the model.
        """
        config = config or ConsistoryConfig()
        prompts = list(prompts) if prompts is not None else compose_prompts(subject, settings, style)
        check_prompts(prompts)
        height, width = self._check_size(height, width)
        anchors = check_anchors(anchors, len(prompts))
        check_sampling(steps, self.schedule, guidance)
        seeds = expand_seeds(seed, len(prompts))
        concepts = list(concepts) if concepts is not None else self._default_concepts(subject, config)
        token_weights = self._token_weights(prompts, concepts)
        stride = self.vae.config.stride
        size = height // stride, width // stride
        if latents is None:
            latents = initial_noise(seeds, (self.unet.config.channels, *size))
        elif latents.shape != (len(prompts), self.unet.config.channels, *size):
            raise ConsistoryError(
                f"latents are {list(latents.shape)}: {len(prompts)} prompts at {width}x{height} need "
                f"{[len(prompts), self.unet.config.channels, *size]}"
            )

        plan = Plan(
            unet=self.unet, schedule=self.schedule, cond=self._conditioning(prompts, negative_prompt, height, width),
            token_weights=token_weights, config=config, steps=steps, guidance=guidance, anchors=anchors,
            seed=seeds[0], latent_size=size,
        )
        told = tell(plan, latents.to(self.device, torch.float32), on_step)
        settings_used = {
            "model": self.name, "steps": steps, "guidance": guidance, "negative_prompt": negative_prompt,
            "anchors": anchors, "width": width, "height": height, "dtype": str(self.dtype).removeprefix("torch."),
            "config": asdict(config),
        }
        images = self.decode(told.latents)
        return Story(images, prompts, concepts, seeds, settings_used, told.latents, told.masks, told.nearest)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [N, 77, Cx], both encoders' states side by side, and pooled [N, D] of the second one."""
        ids = [tok.encode(prompts, warn=i == 0).to(self.device) for i, tok in enumerate(self.tokenizers)]
        (first, _), (second, pooled) = (encode(x) for encode, x in zip(self.text_encoders, ids, strict=True))
        return torch.cat([first, second], dim=-1), pooled

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [N, 4, h, w] -> pictures, uint8 [N, H, W, 3]; one at a time, since decoding needs the most memory.

        Raises ConsistoryError if latents are not finite.
        """
        if not latents.isfinite().all():
            raise ConsistoryError("the model's output is not finite: use dtype bfloat16 or float32")
        z = (latents / self.vae.config.scaling_factor).to(self.vae.post_quant_conv.weight.dtype)
        pictures = torch.cat([self.vae.decode(one).float() for one in z.split(1)])
        pixels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def _conditioning(self, prompts: list[str], negative_prompt: str | None, height: int, width: int) -> Conditioning:
        """Unconditional half, then conditional half: 2 N samples."""
        context, pooled = self.encode_prompts(prompts)
        if negative_prompt is None and self.zero_negative:
            negative = torch.zeros_like(context), torch.zeros_like(pooled)
        else:
            one_context, one_pooled = self.encode_prompts([negative_prompt or ""])
            negative = one_context.expand_as(context), one_pooled.expand_as(pooled)
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(2 * len(prompts), 6)
        keys = self.unet.prompt_keys(torch.cat([negative[0], context]))
        return Conditioning(keys, torch.cat([negative[1], pooled]), sizes)

    def _token_weights(self, prompts: list[str], concepts: list[str]) -> Tensor:
        """[N, 77, K]. Raises ConsistoryError if a prompt lacks a concept."""
        if not concepts:
            return torch.zeros(len(prompts), self.tokenizers[0].length, 0, device=self.device)
        columns = [self.tokenizers[0].concept_positions(prompts, concept) for concept in concepts]
        return torch.stack(columns, dim=-1).to(self.device)

    def _default_concepts(self, subject: str, config: ConsistoryConfig) -> list[str]:
        if not (config.masking and (config.sdsa or config.injection)):
            return []
        if not subject:
            raise ConsistoryError("no concept is given: name the word that stands for the subject in every prompt")
        return [find_concept(subject)]

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.unet.config.sample_size * self.vae.config.stride
        multiple = self.vae.config.stride * 2 ** (len(self.unet.config.widths) - 1)
        height, width = height or native, width or native
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise ConsistoryError(f"size {width}x{height} does not fit the model: use multiples of {multiple} pixels")
        return height, width


def compose_prompts(subject: str, settings: Sequence[str], style: str = "") -> list[str]:
    """ "{style} {subject} {setting}" for every setting. Raises ConsistoryError without a subject or a setting."""
    if not subject.strip():
        raise ConsistoryError('no subject is given: say what all pictures show, such as "a cat"')
    if not settings:
        raise ConsistoryError('no setting is given: name one for each picture, such as "on the beach"')
    return [" ".join(part.strip() for part in (style, subject, setting) if part.strip()) for setting in settings]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ConsistoryError unless there are 1 to 100 prompts."""
    if not 1 <= len(prompts) <= 100:
        raise ConsistoryError(f"{len(prompts)} prompts are given: a story has 1 to 100 pictures")


def check_anchors(anchors: int | None, images: int) -> int:
    """The number of anchors; 2 by default, or 1 for a single picture. Raises ConsistoryError if it does not fit."""
    if anchors is None:
        return min(2, images)
    if not 1 <= anchors <= images:
        raise ConsistoryError(f"{anchors} anchors do not fit {images} pictures: use 1 to {images}")
    return anchors


def check_sampling(steps: int, schedule: ScheduleConfig, guidance: float) -> None:
    """Raises ConsistoryError for a number of steps or a guidance that cannot be sampled with."""
    most = schedule.train_steps - schedule.offset
    if not 1 <= steps <= most:
        raise ConsistoryError(f"{steps} steps are out of range: use 1 to {most}, commonly 20 to 50")
    if not np.isfinite(guidance):
        raise ConsistoryError(f"guidance {guidance} is not a number to sample with: use about 5")


def expand_seeds(seed: int | Sequence[int], images: int) -> list[int]:
    """One seed per image. Raises ConsistoryError for a wrong number of seeds or one out of range."""
    seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
    if len(seeds) != images:
        raise ConsistoryError(f"{len(seeds)} seeds are given for {images} pictures: give one seed, or one per picture")
    if not all(0 <= s < 2**63 for s in seeds):
        raise ConsistoryError("a seed is out of range: use whole numbers from 0 to 2^63 - 1")
    return seeds


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[N, *shape] float32. Each image has a CPU generator of its own: the same noise on any device, in any batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# Words that end the noun phrase at the start of a subject: "a cat | wearing a hat", "an old man | with a beard".
PHRASE_END = re.compile(r"\b(with|in|on|at|by|from|near|under|over|and|who|which|that|whose|\w+ing)\b|[,.;:(]")


def find_concept(subject: str) -> str:
    """The head noun of a subject such as "a cute dog with a hat": its last word before any addition to it.

    Raises ConsistoryError if there is none.
    """
    words = re.findall(r"[\w'-]+", PHRASE_END.split(subject.strip(), maxsplit=1)[0])
    nouns = [word for word in words if word.lower() not in ("a", "an", "the")]
    if not nouns:
        raise ConsistoryError(f"no concept is found in the subject {subject!r}: name the word that stands for it")
    return nouns[-1]


def usable_device(device: str | torch.device) -> torch.device:
    """Raises ConsistoryError for a device that this machine does not have."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConsistoryError(f"device {str(device)!r} cannot be used ({reason}): use cpu, cuda or mps") from None
    return chosen
