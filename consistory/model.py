"""A loaded checkpoint and the call that tells a story with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
    check_latents,
    check_list,
    check_prompts,
    check_sampling,
    compose_prompts,
    expand_seeds,
    find_concept,
    initial_noise,
    usable_device,
)
from .config import ConsistoryConfig, PhotoConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from .correspondence import Nearest
from .images import save_story
from .photos import Photo, check_photos, find_trail, read_photos, with_photos
from .story import OnStep, Plan, tell
from .subject import Recipe, Subject
from .text import TextEncoder
from .tokenizer import Tokenizer
from .unet import Conditioning, UNet
from .vae import VAE

SPRITES = Path(consistory.weights.__file__).parent / "sprites" / "checkpoint"


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
            subject=parts[-1].subject,
        )

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
        prompts = compose_prompts(subject, settings, style) if prompts is None else prompts
        check_prompts(prompts)
        prompts, images = list(prompts), len(prompts)
        height, width = self._check_size(height, width)
        anchors = check_anchors(anchors, images)
        check_sampling(steps, self.schedule, guidance)
        seeds = expand_seeds(seed, images)
        concepts = self._concepts(concepts, subject, config)
        shape = self.latent_shape(height, width)
        if latents is None:
            latents = initial_noise(seeds, shape)
        check_latents(latents, (images, *shape))
        recipe = Recipe(
            prompts=prompts[:anchors], seeds=seeds[:anchors], concepts=concepts, subject=subject, style=style,
            steps=steps, guidance=guidance, negative_prompt=negative_prompt, width=width, height=height,
            next_seed=max(seeds) + 1, config=config,
        )
        return self.draw(Subject(self, recipe, {}), prompts, seeds, latents, on_step=on_step)

    @torch.inference_mode()
    def draw(
        self, subject: Subject, prompts: list[str], seeds: list[int], latents: Tensor, *,
        on_step: OnStep = lambda done, total: None,
    ) -> Story:
        """A story of a subject, its anchors first.

        What `__call__` and `Subject.extend` share. prompts, seeds, latents [N, 4, h, w]: of every picture to draw.
        Raises ConsistoryError if a prompt lacks a concept.
        """
        recipe = subject.recipe
        plan, x = self.plan(recipe, prompts), latents.to(self.device, torch.float32)
        settings = {
            "model": self.name, "steps": recipe.steps, "guidance": recipe.guidance,
            "negative_prompt": recipe.negative_prompt, "anchors": plan.anchors, "width": recipe.width,
            "height": recipe.height, "dtype": str(self.dtype).removeprefix("torch."), "config": asdict(recipe.config),
        }
        if recipe.photos is not None and subject.photos is not None:
            x0, alone = subject.photos.to(x), self.plan(recipe, recipe.prompts)
            trail = find_trail(alone, x0, recipe.seeds, recipe.photos)
            plan, x = with_photos(plan, trail, recipe.photos), torch.cat([trail.start, x[plan.anchors :]])
            settings["photos"] = asdict(recipe.photos)
        told = tell(plan, x, on_step)
        masks = {stride: mask[: plan.anchors] for stride, mask in told.masks.items()}
        return Story(
            images=self.decode(told.latents), prompts=prompts, concepts=recipe.concepts, seeds=seeds, settings=settings,
            latents=told.latents, masks=told.masks, nearest=told.nearest, subject=replace(subject, masks=masks),
        )

    def personalize(
        self,
        images: Sequence[Photo],
        *,
        subject: str = "",
        concept: str | Sequence[str] | None = None,
        style: str = "",
        prompts: Sequence[str] | None = None,
        method: str = "inversion",
        seed: int | Sequence[int] = 0,
        steps: int = 100,
        guidance: float = 5.0,
        photo_guidance: float = 2.0,
        align_keys: bool = True,
        anchors_read: bool = False,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        config: ConsistoryConfig | None = None,
    ) -> Subject:
        """A subject whose anchors are real photos (App. E); `extend` draws new pictures of it.

        images: photos of the subject, as paths of files or uint8 [H, W, 3] of any size; what does not have the model's
            size is cut to its centre and resized.
        subject, style: a photo's prompt is "{style} {subject}"; or give `prompts`, one for each photo.
        concept: word or phrase for the subject, or several; by default the subject's head noun.
        method: "inversion" | "noise", photo_guidance, align_keys, anchors_read: see `PhotoConfig`.
        seed: of the photos' noise.  Other arguments are those of a story.

        Raises ConsistoryError if a photo cannot be read or the arguments do not fit together or do not fit the model.
        """
        config = config or ConsistoryConfig()
        photos = PhotoConfig(method, photo_guidance, align_keys, anchors_read)
        check_photos(images)
        if prompts is None:
            prompts = compose_prompts(subject, [""] * len(images), style)
        check_prompts(prompts)
        if len(prompts) != len(images):
            raise ConsistoryError(f"{len(prompts)} prompts are given for {len(images)} photos: give one for each")
        height, width = self._check_size(height, width)
        for value in (guidance, photo_guidance):
            check_sampling(steps, self.schedule, value)
        seeds = expand_seeds(seed, len(images))
        concepts = self._concepts([concept] if isinstance(concept, str) else concept, subject, config)
        self._token_weights(list(prompts), concepts)  # every prompt has to contain them
        recipe = Recipe(
            prompts=list(prompts), seeds=seeds, concepts=concepts, subject=subject, style=style, steps=steps,
            guidance=guidance, negative_prompt=negative_prompt, width=width, height=height, next_seed=max(seeds) + 1,
            config=config, photos=photos,
        )
        return Subject(self, recipe, {}, self.encode(read_photos(images, height, width)))

    def plan(self, recipe: Recipe, prompts: list[str]) -> Plan:
        """The plan of pictures with these prompts, the recipe's anchors first."""
        return Plan(
            unet=self.unet, schedule=self.schedule,
            cond=self._conditioning(prompts, recipe.negative_prompt, recipe.height, recipe.width),
            token_weights=self._token_weights(prompts, recipe.concepts), config=recipe.config, steps=recipe.steps,
            guidance=recipe.guidance, anchors=len(recipe.prompts), seed=recipe.seeds[0],
            latent_size=self.latent_shape(recipe.height, recipe.width)[1:],
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of so many pixels."""
        stride = self.vae.config.stride
        return self.unet.config.channels, height // stride, width // stride

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [N, 77, Cx], both encoders' states side by side, and pooled [N, D] of the second one."""
        ids = [tok.encode(prompts, warn=i == 0).to(self.device) for i, tok in enumerate(self.tokenizers)]
        (first, _), (second, pooled) = (encode(x) for encode, x in zip(self.text_encoders, ids, strict=True))
        return torch.cat([first, second], dim=-1), pooled

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Pictures, uint8 [N, H, W, 3] -> latents, float32 [N, 4, h, w] on the CPU: the posterior's means."""
        weight = self.vae.quant_conv.weight
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(weight.device, torch.float32) / 127.5 - 1
        means = torch.cat([self.vae.encode(one.to(weight.dtype))[0].float() for one in pixels.split(1)])
        return (means * self.vae.config.scaling_factor).cpu().contiguous()

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
