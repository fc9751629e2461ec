"""A loaded checkpoint and the call that tells a story with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import consistory.weights
from consistory.weights import hub, loading, lora
from consistory.weights.errors import ConsistoryError

from .arguments import (
    check_anchors,
    check_chunk,
    check_clip_skip,
    check_either,
    check_finite,
    check_kind,
    check_latents,
    check_list,
    check_negative,
    check_number,
    check_prompts,
    check_sampling,
    check_texts,
    check_tile,
    check_whole,
    choose_concepts,
    compose_prompts,
    expand_seeds,
    initial_noise,
    usable_device,
)
from .config import ConsistoryConfig, PhotoConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from .controlnet import Control, check_controls
from .correspondence import Nearest
from .images import Choose, OnPicture, every_picture, save_story
from .ip_adapter import IPAdapter, PicturePrompt, cross_attentions
from .offload import on_device
from .photos import Photo, check_photos, find_trail, read_photos, with_photos
from .recording import Recorder
from .story import Observer, OnStep, Plan, Told, tell
from .subject import Recipe, Subject, fingerprint, identity
from .text import TextEncoder
from .tiling import tiled_decode
from .tokenizer import Tokenizer
from .unet import Conditioning, UNet
from .vae import VAE
from .words import Word

SPRITES = Path(consistory.weights.__file__).parent / "sprites" / "checkpoint"
WHOLE_PIXELS = 1024 * 1024  # larger ones are decoded in tiles: here SDXL's decoder takes 2.5 GiB, in tiles 0.9
TILE = 32  # rows

LoRAs = Sequence[str | Path | tuple[str | Path, float]]  # files, with weights other than 1


@dataclass(frozen=True, eq=False)
class Story:
    """Pictures of one subject, and how they came about.

    images: uint8 [N, H, W, 3].  latents: float32 [N, 4, h, w], the final ones.
    masks: {stride: bool [N, P]} and nearest: {stride: indices and distances [N, A, P]}, what injection used.
    settings: the parameters of the run, as JSON would hold them.
    subject: the anchors, for more pictures of the same subject.
    """

    images: NDArray[np.uint8] = field(repr=False)
    prompts: list[str]
    concepts: list[str]
    seeds: list[int]
    settings: dict[str, Any] = field(repr=False)
    latents: Tensor = field(repr=False)
    masks: dict[int, Tensor] = field(repr=False)
    nearest: dict[int, Nearest] = field(repr=False)
    subject: Subject = field(repr=False)

    def select(self, pictures: Sequence[int]) -> Story:
        """The story of some of its pictures, in this order."""
        chosen = list(pictures)
        return replace(
            self,
            images=self.images[chosen],
            prompts=[self.prompts[i] for i in chosen],
            seeds=[self.seeds[i] for i in chosen],
            latents=self.latents[chosen],
            masks={stride: mask[chosen] for stride, mask in self.masks.items()},
            nearest={s: Nearest(n.index[chosen], n.distance[chosen]) for s, n in self.nearest.items()},
        )

    def join(self, others: Sequence[Story]) -> Story:
        """One story of the pictures of this and other stories of the same subject; some may have no picture."""
        parts = [part for part in (self, *others) if part.prompts] or [self]
        first = parts[0]
        return replace(
            first,
            images=np.concatenate([part.images for part in parts]),
            prompts=[prompt for part in parts for prompt in part.prompts],
            seeds=[seed for part in parts for seed in part.seeds],
            latents=torch.cat([part.latents for part in parts]),
            masks={s: torch.cat([part.masks[s] for part in parts]) for s in first.masks},
            nearest={
                s: Nearest(*(torch.cat([getattr(part.nearest[s], x) for part in parts]) for x in ("index", "distance")))
                for s in first.nearest
            },
            subject=parts[-1].subject,
        )

    def save(self, folder: str | Path) -> None:
        """Write numbered PNGs, a grid and `story.json`, in place of another story that the folder may hold.

        Raises ConsistoryError if the folder cannot be written or holds such files that are not a story's.
        """
        save_story(self, Path(folder))


@dataclass(frozen=True, eq=False)
class ConsiStory:
    """An SDXL checkpoint, ready to tell stories: `ConsiStory.from_pretrained("sprites")(subject="a cat", ...)`."""

    name: str
    tokenizers: tuple[Tokenizer, Tokenizer] = field(repr=False)
    text_encoders: tuple[TextEncoder, TextEncoder] = field(repr=False)
    unet: UNet = field(repr=False)
    vae: VAE = field(repr=False)
    schedule: ScheduleConfig
    zero_negative: bool  # without a negative prompt, the unconditional context and pooled state are zeros
    device: torch.device
    tile: int | None = None
    other_vae: str | None = None  # the name of an autoencoder that is not the checkpoint's own
    loras: tuple[lora.Merged, ...] = field(default=(), repr=False)  # what is merged into the weights
    picture: PicturePrompt | None = field(default=None, repr=False)  # beside every prompt
    words: tuple[Word, ...] = ()  # that prompts may use beside the vocabulary

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        variant: str | None = None, vae: str | Path | None = None, loras: LoRAs = (), spacing: str | None = None,
        prediction: str | None = None, offload: bool = False, tile: int | None = None,
    ) -> ConsiStory:
        """Load "sprites" (the embedded model), a folder in the diffusers layout, or a model of the Hugging Face hub.

        name: "owner/model", unless there is such a folder, is of the hub: taken from its cache, downloaded if need be.
        variant: which of several weights to take, such as "fp16"; found by itself where there is only one.
        vae: another autoencoder than the checkpoint's own: a `.safetensors` file, a folder, or a name of the hub.
        loras: `.safetensors` files (LoRA, LoHa, LoKr, DoRA) to merge into the weights, in any order; a pair
            (file, weight) for another weight than 1.
        spacing: "leading" | "trailing" timesteps, see `ScheduleConfig`; by default as the checkpoint's schedule says.
            Models distilled to a few steps, Lightning or Turbo, want "trailing".
        prediction: what the UNet predicts, "epsilon" | "v" | "v-ztsnr" (of noise with zero terminal SNR), for
            checkpoints that do not say so; by default as they say.
        offload: keep the weights in host memory; text encoders, UNet and autoencoder visit the device one after the
            other, while they run. That costs one copy of the weights a call (a chunk, if it has chunks), and such a
            model serves one thread at a time. By default all of them stay on the device.
        tile: decode pictures of any size in tiles of this many rows, which takes a third of the memory and twice the
            work; by default only those of more than 1024 x 1024 pixels.
        Raises ConsistoryError for a missing, damaged or unsuitable file, and for an unknown device, spacing or
        prediction.
        """
        device = usable_device(device)
        folder = SPRITES if str(name) == "sprites" else Path(name)
        if hub.is_id(name):
            folder = hub.checkpoint_folder(str(name), variant)
        index = loading.read_model_index(folder)
        parts = {part: loading.folder_component(folder, part, variant) for part in loading.COMPONENTS}
        if vae is not None:
            parts["vae"] = _vae_component(vae, parts["vae"][0])
        said = loading.read_json(folder / "scheduler" / "scheduler_config.json")
        schedule = ScheduleConfig.from_json(said, prediction).spaced(spacing)
        tokenizers = Tokenizer.from_folder(folder / "tokenizer"), Tokenizer.from_folder(folder / "tokenizer_2")
        return cls._assemble(str(name), tokenizers, parts, schedule, index, device, dtype, vae, loras, offload, tile)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        vae: str | Path | None = None, loras: LoRAs = (), spacing: str | None = None,
        prediction: str | None = None, offload: bool = False, tile: int | None = None,
    ) -> ConsiStory:
        """Load an SDXL checkpoint in the original layout, one `.safetensors` file. Options as for `from_pretrained`.

        vae: with another one given, the file need not hold one.
        Raises ConsistoryError for a missing, damaged or unsuitable file, and for an unknown device, spacing or
        prediction.
        """
        device = usable_device(device)
        configs = loading.sdxl_configs()
        parts = loading.single_file_components(Path(path), configs, optional=() if vae is None else ("vae",))
        if vae is not None:
            parts["vae"] = _vae_component(vae, configs["vae"])
        tokenizers = Tokenizer.clip(), Tokenizer.clip(pad="!")
        said = loading.single_file_schedule(Path(path), configs["scheduler"])
        schedule = ScheduleConfig.from_json(said, prediction).spaced(spacing)
        index = configs["model_index"]
        return cls._assemble(str(path), tokenizers, parts, schedule, index, device, dtype, vae, loras, offload, tile)

    @classmethod
    def _assemble(
        cls, name: str, tokenizers: tuple[Tokenizer, Tokenizer], parts: dict[str, loading.Component],
        schedule: ScheduleConfig, index: loading.Json, device: torch.device, dtype: torch.dtype,
        vae: str | Path | None, loras: LoRAs, offload: bool, tile: int | None,
    ) -> ConsiStory:
        check_tile(tile)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ConsistoryError(f"dtype is {dtype!r}: give torch.float16, bfloat16, float32 or float64")
        home = torch.device("cpu") if offload else device
        unet, autoencoder = parts["unet"][0], parts["vae"][0]
        if unet["in_channels"] != autoencoder["latent_channels"]:
            channels = f'a UNet of {unet["in_channels"]} channels for latents of {autoencoder["latent_channels"]}'
            raise ConsistoryError(f"{name} is not an SDXL base checkpoint ({channels}): it may be one for inpainting")
        check_list("loras", loras)
        pairs = [(one, 1.0) if isinstance(one, (str, Path)) else one for one in loras]
        if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise ConsistoryError(f"loras are {list(loras)}: give a list of files, or of pairs (file, weight)")
        merged = tuple(
            lora.read(Path(path), check_number(f"weight of {path}", weight), parts) for path, weight in pairs
        )
        parts = lora.merge(parts, merged)

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
            schedule=schedule,
            zero_negative=index.get("force_zeros_for_empty_prompt", True),
            device=device,
            tile=tile,
            other_vae=None if vae is None else str(vae),
            loras=tuple(each.merged() for each in merged),
        )

    def with_picture(self, adapter: IPAdapter, features: Tensor, weight: float = 1.0) -> ConsiStory:
        """The same model with a picture as a further prompt for everything it draws; see `consistory.ip_adapter`.

        features: the picture's, from `IPAdapter.read`.  weight: factor of what is added.
        Raises ConsistoryError if they do not fit the adapter, or the adapter does not fit the model.
        """
        if adapter.layers != cross_attentions(self.unet):
            raise ConsistoryError(f"{adapter.name} is for another model: load it for this one's UNet")
        return replace(self, picture=PicturePrompt.make(adapter, features, weight))

    def with_word(self, word: Word) -> ConsiStory:
        """The same model, whose prompts may use a word that was learned by textual inversion; see `consistory.words`.

        Raises ConsistoryError if it does not fit the text encoders, or there is a word of this name already.
        """
        widths = [vectors.shape[1] for vectors in word.vectors]
        wanted = [encoder.config.width for encoder in self.text_encoders]
        if widths != wanted:
            other = f"{word.file} was made for another model (widths {widths}, not {wanted})"
            raise ConsistoryError(f"{other}: give a word of this one")
        first, second = (tokenizer.with_word(word.name, len(word.vectors[0])) for tokenizer in self.tokenizers)
        return replace(self, words=(*self.words, word), tokenizers=(first, second))

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def fingerprint(self) -> str:
        """Tells checkpoints apart, LoRAs and another VAE included, wherever they lie and in any precision."""
        encoders = [
            fingerprint(encoder, {name for lora in self.loras for name in lora.changed[part]})
            for part, encoder in zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=True)
        ]
        parts = [identity(self), *encoders, fingerprint(self.vae), str(self.schedule), str(self.zero_negative)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @torch.no_grad()
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
        clip_skip: int | None = None,
        anchors: int | None = None,
        width: int | None = None,
        height: int | None = None,
        latents: Tensor | None = None,
        controls: Sequence[Control] = (),
        chunk: int | None = None,
        config: ConsistoryConfig | None = None,
        record: str | Path | None = None,
        on_step: OnStep = lambda done, total: None,
        choose: Choose = every_picture,
        on_picture: OnPicture = lambda index, image: None,
        observer: Observer | None = None,
    ) -> Story:
        """Tell a story: one picture for each setting (or whole prompt), all of the same subject.

        subject, settings, style: prompts are "{style} {subject} {setting}"; or give whole `prompts`.
        concepts: words or phrases for the subject that every prompt contains; by default the subject's head noun.
        seed: noise of picture i is seeded with seed + i, or with the i-th of several seeds; `latents` [N, 4, h, w] are
            noise given outright.
        guidance: how closely to follow the prompt (Ho & Salimans 2022). At 1 or less there is none, as distilled models
            want it, and a step takes half the work; nor can there be a negative prompt.
        clip_skip: layers of the text encoders to leave out besides the last one, which SDXL does without; as in
            diffusers, of the prompts only, not of the negative prompt. By default 0.
        anchors: how many pictures, the first ones, share their subject with all; by default 2.
        width, height: in pixels; by default what the checkpoint was trained for.
        controls: ControlNets with the pictures that they steer by.
        chunk: draw at most this many pictures at a time alongside the anchors, to save memory; the result does not
            depend on it, up to rounding. Every chunk runs the anchors again, unless they are recorded: with 2 anchors,
            a story of 8 pictures takes the work of 18 for chunk=1, of 10 for chunk=3. By default all are drawn at once.
        config: the method's settings; by default `ConsistoryConfig()`, or `ConsistoryConfig.control()` with controls.
        record: a file for all that later pictures need of the anchors, so that these need not be drawn again; see
            `Subject`.
        on_step: called as on_step(done, total) after every denoising step.
        choose: called as choose(record), with what `story.json` would hold, once the arguments are checked; returns the
            indices of the pictures to draw. By default all; the anchors are run along with any others. The pictures
            are those of the whole story up to rounding, and the story returned has no others.
        on_picture: called as on_picture(index, image) as soon as a picture is decoded, uint8 [H, W, 3].
        observer: looks on, such as a `consistory.explain.Trace`.

        Raises ConsistoryError, before any work, if the arguments do not fit together or do not fit the model; after it,
        if what the model makes is not finite or a recording cannot be written.
        """
        if config is None:
            config = ConsistoryConfig.control() if controls else ConsistoryConfig()
        check_kind("config", config, ConsistoryConfig)
        check_either(settings, style, prompts)
        prompts = check_prompts(compose_prompts(subject, settings, style) if prompts is None else prompts)
        images = len(prompts)
        height, width = self._check_size(height, width)
        anchors = check_anchors(anchors, images)
        steps, guidance = check_sampling(steps, self.schedule, guidance)
        check_negative(negative_prompt, guidance)
        clip_skip = self._check_clip_skip(clip_skip)
        seeds = expand_seeds(seed, images)
        concepts = choose_concepts(concepts, subject, config)
        shape = self.latent_shape(height, width)
        noise = initial_noise(seeds, shape) if latents is None else latents
        check_latents(noise, (images, *shape))
        check_chunk(chunk)
        check_controls(controls, images, steps, self.unet, self.vae.config.stride, self.device)
        controls = [control.stretched((height, width)) for control in controls]
        recipe = Recipe(
            prompts=prompts[:anchors], seeds=seeds[:anchors], concepts=concepts, subject=subject, style=style,
            steps=steps, guidance=guidance, negative_prompt=negative_prompt, width=width, height=height,
            next_seed=max(seeds) + 1, config=config, clip_skip=clip_skip,
        )
        kept = Subject(
            self, recipe, {}, None if latents is None else latents[:anchors].clone(),
            controls=[part for control in controls if (part := control.part(range(anchors))) is not None],
        )
        return kept.draw(
            prompts, seeds, noise, given=latents, controls=controls, chunk=chunk, record=record, on_step=on_step,
            choose=choose, on_picture=on_picture, observer=observer,
        )

    @torch.no_grad()
    def draw_batch(
        self, subject: Subject, prompts: list[str], seeds: list[int], latents: Tensor, settings: dict[str, Any], *,
        places: Sequence[int], controls: Sequence[Control] = (), recorder: Recorder | None = None, on_step: OnStep,
        on_picture: OnPicture, observer: Observer | None = None,
    ) -> Story:
        """A batch of pictures of a subject: its anchors first, or, where they are recorded, other pictures alone.

        prompts, seeds, latents [N, 4, h, w]: of every picture to denoise.
        places: which of these to decode; the story returned has no others.  controls: numbered like the pictures.
        """
        observer = observer or Observer()
        observer.stage("prompts")
        recipe, anchors = subject.recipe, len(subject.recipe.prompts)
        told = self._tell(subject, prompts, latents, controls, recorder, on_step, observer)
        if subject.recorded is None:
            subject = replace(subject, masks={stride: mask[:anchors] for stride, mask in told.masks.items()})
        chosen = list(places)
        observer.stage("pictures")
        images = self.decode(told.latents[chosen], on_picture)
        observer.stage("done")
        return Story(
            images=images, prompts=[prompts[i] for i in chosen], concepts=recipe.concepts,
            seeds=[seeds[i] for i in chosen],
            settings=settings, latents=told.latents[chosen], masks={s: mask[chosen] for s, mask in told.masks.items()},
            nearest={s: Nearest(n.index[chosen], n.distance[chosen]) for s, n in told.nearest.items()},
            subject=subject,
        )

    def _tell(
        self, subject: Subject, prompts: list[str], latents: Tensor, controls: Sequence[Control],
        recorder: Recorder | None, on_step: OnStep, observer: Observer,
    ) -> Told:
        """Apart from decoding, which may need the memory that keys and values of the prompts take."""
        recipe, anchors = subject.recipe, len(subject.recipe.prompts)
        cond = self._conditioning(prompts, recipe)
        steering = tuple(control.steering(cond, recipe.steps) for control in controls)
        x = latents.to(self.device, torch.float32)
        with on_device(self.unet, self.device):
            plan = self.plan(recipe, prompts, cond)
            plan = replace(plan, recorded=subject.recorded, recorder=recorder, controls=steering, observer=observer)
            if recipe.photos is not None and subject.photos is not None and recipe.config.uses_anchors:
                alone = self.plan(recipe, recipe.prompts, cond.of(range(anchors)))
                trail = find_trail(alone, subject.photos.to(x), recipe.seeds, recipe.photos)
                plan, x = with_photos(plan, trail, recipe.photos), torch.cat([trail.start, x[anchors:]])
            return tell(plan, x, on_step)

    def plan(self, recipe: Recipe, prompts: list[str], cond: Conditioning | None = None) -> Plan:
        """The plan of pictures with these prompts, the recipe's anchors first. cond: theirs, by default made here."""
        cond = cond or self._conditioning(prompts, recipe)
        assert isinstance(cond.context, Tensor)
        keys = self.unet.prompt_keys(cond.context)
        if self.picture is not None:
            keys = self.picture.beside(keys, cond.guided)
        return Plan(
            unet=self.unet, schedule=self.schedule, cond=replace(cond, context=keys),
            token_weights=self.token_weights(prompts, recipe.concepts), config=recipe.config, steps=recipe.steps,
            guidance=max(recipe.guidance, 1.0), anchors=len(recipe.prompts), seed=recipe.seeds[0],
            latent_size=self.latent_shape(recipe.height, recipe.width)[1:],
        )

    def personalize(
        self,
        images: Sequence[Photo],
        *,
        subject: str = "",
        concepts: Sequence[str] | None = None,
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
        clip_skip: int | None = None,
        width: int | None = None,
        height: int | None = None,
        config: ConsistoryConfig | None = None,
    ) -> Subject:
        """A subject whose anchors are real photos (App. E); `extend` draws new pictures of it.

        images: photos of the subject, as paths of files or uint8 [H, W, 3] of any size; what does not have the model's
            size is cut to its centre and resized.
        subject, style: a photo's prompt is "{style} {subject}", unless `prompts` are given, one for each photo; and
            prompts of settings begin so.
        concepts: words or phrases for the subject; by default the subject's head noun.
        method: "inversion" | "noise", photo_guidance, align_keys, anchors_read: see `PhotoConfig`.
        seed: of the photos' noise.  config: by default `ConsistoryConfig.photos()`.
        Other arguments are those of a story.

        Raises ConsistoryError if a photo cannot be read or the arguments do not fit together or do not fit the model.
        """
        config = ConsistoryConfig.photos() if config is None else config
        check_kind("config", config, ConsistoryConfig)
        check_photos(images)
        prompts = check_prompts(compose_prompts(subject, [""] * len(images), style) if prompts is None else prompts)
        if len(prompts) != len(images):
            raise ConsistoryError(f"{len(prompts)} prompts are given for {len(images)} photos: give one for each")
        height, width = self._check_size(height, width)
        steps, photo_guidance = check_sampling(steps, self.schedule, photo_guidance)
        steps, guidance = check_sampling(steps, self.schedule, guidance)
        photos = PhotoConfig(method, photo_guidance, align_keys, anchors_read)
        check_negative(negative_prompt, guidance)
        clip_skip = self._check_clip_skip(clip_skip)
        seeds = expand_seeds(seed, len(images))
        concepts = choose_concepts(concepts, subject, config)
        self.token_weights(prompts, concepts)  # every prompt has to contain them
        recipe = Recipe(
            prompts=prompts, seeds=seeds, concepts=concepts, subject=subject, style=style, steps=steps,
            guidance=guidance, negative_prompt=negative_prompt, width=width, height=height, next_seed=max(seeds) + 1,
            config=config, clip_skip=clip_skip, photos=photos,
        )
        return Subject(self, recipe, {}, photos=self.encode(read_photos(images, height, width)))

    def empty_story(self, subject: Subject, settings: dict[str, Any]) -> Story:
        """A story that others can be joined to."""
        height, width = subject.recipe.height, subject.recipe.width
        return Story(
            images=np.empty((0, height, width, 3), np.uint8), prompts=[], concepts=subject.recipe.concepts, seeds=[],
            settings=settings, latents=torch.empty(0, *self.latent_shape(height, width), device=self.device),
            masks={}, nearest={}, subject=subject,
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture, whose size is given in pixels."""
        stride = self.vae.config.stride
        return self.unet.config.channels, height // stride, width // stride

    def encode_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, negative: Sequence[str] = (), *, warn: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Context [N, 77, Cx], both encoders' states side by side, and pooled [N, D] of the second one.

        negative: further prompts, to which clip_skip does not apply; their states come last.
        """
        prompts, negative = check_texts("prompts", prompts), check_texts("negative", negative)
        encoded = []
        for i, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            groups = [(prompts, clip_skip), (negative, 0)] if negative else [(prompts, clip_skip)]
            vectors = [word.vectors[i].to(self.device, self.dtype) for word in self.words]
            learned = torch.cat(vectors) if vectors else None
            with on_device(encoder, self.device):
                states = [
                    encoder(tokenizer.encode(group, warn=warn and i == 0).to(self.device), skip, learned)
                    for group, skip in groups
                ]
            encoded.append([torch.cat(each) for each in zip(*states, strict=True)])
        (first, _), (second, pooled) = encoded
        return torch.cat([first, second], dim=-1), pooled

    @torch.no_grad()
    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Pictures, uint8 [N, H, W, 3] -> latents, float32 [N, 4, h, w] on the CPU: the posterior's means."""
        dtype = self.vae.quant_conv.weight.dtype
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device, torch.float32) / 127.5 - 1
        with on_device(self.vae, self.device):
            means = torch.cat([self.vae.encode(one.to(dtype))[0].float() for one in pixels.split(1)])
        return (means * self.vae.config.scaling_factor).cpu().contiguous()

    def decode(self, latents: Tensor, on_picture: OnPicture = lambda index, image: None) -> NDArray[np.uint8]:
        """Latents [N, 4, h, w] -> pictures, uint8 [N, H, W, 3]; one at a time, since decoding takes much memory.

        on_picture: called as on_picture(index, image) after each.
        Raises ConsistoryError if latents, or the pictures that the autoencoder makes of them, are not finite.
        """
        check_finite("the model's output", latents, self.dtype)
        dtype = self.vae.post_quant_conv.weight.dtype
        z = (latents / self.vae.config.scaling_factor).to(self.device, dtype)
        large = math.prod(z.shape[-2:]) * self.vae.config.stride**2 > WHOLE_PIXELS
        tile = self.tile or (TILE if large else None)
        decode = self.vae.decode if tile is None else partial(tiled_decode, self.vae, tile=tile)
        pictures = []
        with on_device(self.vae, self.device):
            for index, one in enumerate(z.split(1)):
                picture = decode(one).float()[0]
                check_finite("the autoencoder's output", picture, dtype)
                pixels = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                pictures.append(pixels.permute(1, 2, 0).cpu().numpy())
                on_picture(index, pictures[-1])
        return np.stack(pictures)

    def _conditioning(self, prompts: list[str], recipe: Recipe) -> Conditioning:
        """Token states and the rest of the prompts' samples. Photos have a guidance of their own."""
        guided, n = recipe.guidance > 1 or recipe.photos is not None, len(prompts)
        no_negative = not guided or (recipe.negative_prompt is None and self.zero_negative)
        negative = [] if no_negative else [recipe.negative_prompt or ""]
        context, pooled = self.encode_prompts(prompts, recipe.clip_skip, negative, warn=False)
        if guided:
            context, pooled = (
                torch.cat([x[n:].expand_as(x[:n]) if negative else torch.zeros_like(x), x[:n]])
                for x in (context, pooled)
            )
        height, width = recipe.height, recipe.width
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(len(pooled), 6)
        return Conditioning(context, pooled, sizes, guided)

    def token_weights(self, prompts: list[str], concepts: list[str]) -> Tensor:
        """[N, 77, K]. Raises ConsistoryError if a prompt lacks a concept."""
        if not concepts:
            return torch.zeros(len(prompts), self.tokenizers[0].length, 0, dtype=torch.float32, device=self.device)
        columns = [self.tokenizers[0].concept_positions(prompts, concept) for concept in concepts]
        return torch.stack(columns, dim=-1).to(self.device)

    def _check_clip_skip(self, clip_skip: int | None) -> int:
        return check_clip_skip(clip_skip, min(encoder.config.layers for encoder in self.text_encoders))

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.unet.config.sample_size * self.vae.config.stride
        multiple = self.vae.config.stride * 2 ** (len(self.unet.config.widths) - 1)
        height = check_whole("height", native if height is None else height)
        width = check_whole("width", native if width is None else width)
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ConsistoryError(
                f"size {width}x{height} does not fit the model: use positive multiples of {multiple} pixels"
            )
        return height, width


def _vae_component(vae: str | Path, own: loading.Json) -> loading.Component:
    return loading.vae_component(hub.vae_folder(str(vae)) if hub.is_id(vae) else Path(vae), own)
