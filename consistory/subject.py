"""A subject that lasts (§4.4): its anchors are kept, and new pictures of the same subject join them later.

They are kept in one of two grades, a recipe or a recording. Nothing flows from other pictures to an anchor, so running
the anchors again together with new pictures gives what one large story would have given. So does recording, while the
anchors are drawn, what other pictures need of them (`consistory.recording`), and running the new pictures alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from consistory.weights.errors import ConsistoryError

from .arguments import (
    check_choice,
    check_chunk,
    check_either,
    check_latents,
    check_prompts,
    compose_prompts,
    expand_seeds,
    initial_noise,
)
from .config import ConsistoryConfig, PhotoConfig
from .controlnet import Control, ControlNet, check_controls
from .images import Choose, OnPicture, every_picture, make_record
from .recording import Recorded, Recorder, most_tensors
from .story import Observer, OnStep
from .tensorfile import TensorFile, is_intact

if TYPE_CHECKING:
    from .model import ConsiStory, Story

FORMAT = "consistory subject 3"


@dataclass(frozen=True)
class Recipe:
    """What re-creates the anchors: their prompts and seeds, and the settings of the run.

    subject, style: words that new prompts are composed of; empty if whole prompts were given.
    next_seed: the default for the first new picture, so that pictures made one after the other all differ.
    photos: how they take part, if the anchors are real photos; the seeds are those of their noise.
    """

    prompts: list[str]
    seeds: list[int]
    concepts: list[str]
    subject: str
    style: str
    steps: int
    guidance: float
    negative_prompt: str | None
    width: int
    height: int
    next_seed: int
    config: ConsistoryConfig
    clip_skip: int = 0
    photos: PhotoConfig | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """Anchors and the model that drew them.

    masks: {stride: bool [A, P]} where the subject is in the anchors; photos have none before pictures are drawn.
    latents: [A, 4, h, w] their noise, if it was given outright and not by their seeds.
    recorded: what other pictures need of the anchors, if it was recorded; without it the anchors are run again.
    controls: what steered the anchors.  steered: whether anything did that is not at hand: with a recording that was
        loaded, ControlNets are not needed, unless it is to be saved again.
    photos: [A, 4, h, w] their latents, if the anchors are photos.
    """

    pipe: ConsiStory = field(repr=False)
    recipe: Recipe
    masks: Mapping[int, Tensor] = field(repr=False)
    latents: Tensor | None = field(default=None, repr=False)
    recorded: Recorded | None = None
    controls: Sequence[Control] = field(default=(), repr=False)
    photos: Tensor | None = field(default=None, repr=False)
    steered: bool = False

    def extend(
        self, settings: Sequence[str] = (), *, prompts: Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None, latents: Tensor | None = None, controls: Sequence[Control] = (),
        chunk: int | None = None,
        on_step: OnStep = lambda done, total: None,
        choose: Choose = every_picture,
        on_picture: OnPicture = lambda index, image: None,
        observer: Observer | None = None,
    ) -> Story:
        """New pictures of the subject, one for each setting or whole prompt; anchors are run along if not recorded.

        seed: as for a story; by default seeds go on after those that led to this subject. To go on from there in turn,
            extend the new story's `subject`. `latents` [N, 4, h, w] are noise given outright.
        chunk: at most this many new pictures at a time; the result does not depend on it, up to rounding.
        controls: ControlNets for the new pictures. The anchors keep their own.
        on_step, choose, on_picture: as for a story. Only new pictures count.
        observer: looks on; anchors that are run along come before the new pictures.

        Raises ConsistoryError, before any work, if the arguments do not fit.
        """
        recipe = self.recipe
        check_either(settings, "", prompts)
        if prompts is None and not recipe.subject:
            raise ConsistoryError("this subject was drawn from whole prompts: extend it with prompts=[...] from Python")
        prompts = check_prompts(
            compose_prompts(recipe.subject, settings, recipe.style) if prompts is None else prompts
        )
        seeds = expand_seeds(recipe.next_seed if seed is None else seed, len(prompts))
        shape = self.pipe.latent_shape(recipe.height, recipe.width)
        noise = initial_noise(seeds, shape) if latents is None else latents
        check_latents(noise, (len(prompts), *shape))
        noise = noise.float()  # as the anchors', which must not be rounded to it
        check_chunk(chunk)
        check_controls(
            controls, len(prompts), recipe.steps, self.pipe.unet, self.pipe.vae.config.stride, self.pipe.device
        )
        subject = replace(self, recipe=replace(recipe, next_seed=max(recipe.next_seed, max(seeds) + 1)))
        anchors = len(recipe.prompts)
        old, new = range(anchors), range(anchors, anchors + len(prompts))
        stretched = [control.stretched((recipe.height, recipe.width)) for control in controls]
        return subject.draw(
            recipe.prompts + prompts, recipe.seeds + seeds, torch.cat([self._noise().to(noise), noise]), first=anchors,
            given=latents, controls=[*(c.at(old) for c in self.controls), *(c.at(new) for c in stretched)],
            chunk=chunk, on_step=on_step, choose=choose, on_picture=on_picture, observer=observer,
        )

    def draw(
        self, prompts: list[str], seeds: list[int], noise: Tensor, *, first: int = 0, given: Tensor | None,
        controls: Sequence[Control], chunk: int | None, record: str | Path | None = None, on_step: OnStep,
        choose: Choose, on_picture: OnPicture, observer: Observer | None = None,
    ) -> Story:
        """What a story and its extension share. prompts, seeds, noise [N, 4, h, w]: of anchors, then of all others.

        first: the pictures from this one on are the story's; `choose` and `on_picture` know no others.
        given: noise that was given outright.  controls: numbered like the pictures, anchors included.
        record: a file for what others need of the anchors.
        """
        pipe, config, anchors = self.pipe, self.recipe.config, len(self.recipe.prompts)
        if record is not None:
            self._check_recordable()
        # All prompts are checked before any is drawn: here for what would raise an error, then for what is cut off.
        pipe.token_weights(prompts, self.recipe.concepts)
        pipe.tokenizers[0].encode([*prompts[first:], self.recipe.negative_prompt or ""])
        settings = self._settings(given, controls)
        story = make_record(prompts[first:], self.recipe.concepts, seeds[first:], settings)
        chosen = [first + i for i in check_choice(choose(story), len(prompts) - first)]
        batches = split(chosen, anchors, chunk)

        def draw_batch(subject: Subject, number: int, recorder: Recorder | None) -> Story:
            batch = batches[number]
            along = range(anchors) if subject.recorded is None and config.uses_anchors else ()
            run = sorted({*batch, *along})
            return pipe.draw_batch(
                subject, [prompts[i] for i in run], [seeds[i] for i in run], noise[run], settings,
                places=[run.index(i) for i in batch], recorder=recorder,
                controls=[part for control in controls if (part := control.part(run)) is not None],
                on_step=lambda done, total: on_step(number * total + done, len(batches) * total),
                on_picture=lambda place, image: on_picture(batch[place] - first, image), observer=observer,
            )  # fmt: skip

        if record is not None and not batches:  # no picture is missing, but the recording is
            return pipe.empty_story(self.record(record, on_step=on_step), settings)
        parts = [pipe.empty_story(self, settings)]
        for number in range(len(batches)):
            if record is not None and number == 0:
                with self.recording(record) as recorder:
                    part = draw_batch(self, number, recorder)
                part = replace(part, subject=replace(part.subject, recorded=Recorded(record, pipe.unet)))
            else:
                part = draw_batch(parts[-1].subject, number, None)
            parts.append(part)
        return parts[0].join(parts[1:])

    def _settings(self, given: Tensor | None, controls: Sequence[Control]) -> dict[str, Any]:
        """How the subject's pictures are made, as JSON would hold it."""
        pipe, recipe = self.pipe, self.recipe
        outright = [noise for noise in (self.latents, given) if noise is not None]
        photos = None
        if recipe.photos is not None and self.photos is not None:
            photos = {**asdict(recipe.photos), "latents": digest(self.photos)}
        return {
            "model": pipe.name, "vae": pipe.other_vae, "loras": [[str(file.path), file.weight] for file in pipe.loras],
            "spacing": "trailing" if pipe.schedule.trailing else "leading", "prediction": pipe.schedule.prediction_name,
            "steps": recipe.steps, "guidance": recipe.guidance, "negative_prompt": recipe.negative_prompt,
            "clip_skip": recipe.clip_skip, "anchors": len(recipe.prompts), "width": recipe.width,
            "height": recipe.height, "dtype": str(pipe.dtype).removeprefix("torch."), "config": asdict(recipe.config),
            "fingerprint": pipe.fingerprint, "latents": digest(*outright) if outright else None,
            "anchor_prompts": recipe.prompts, "anchor_seeds": recipe.seeds,
            "controls": [control.settings() | {"fingerprint": fingerprint(control.net)} for control in controls],
            "photos": photos,
            "picture": None if pipe.picture is None else pipe.picture.settings,
            "words": [[word.file, word.name] for word in pipe.words],
        }

    def _noise(self) -> Tensor:
        """The anchors', [A, 4, h, w]."""
        if self.latents is not None:
            return self.latents
        return initial_noise(self.recipe.seeds, self.pipe.latent_shape(self.recipe.height, self.recipe.width))

    def save(self, path: str | Path) -> None:
        """Write the recipe and the masks to one safetensors file, atomically: some kilobytes.

        Features would be of no use without the rest that `record` writes, and much larger.
        Raises ConsistoryError if the file cannot be written, or is the subject's own recording.
        """
        if self.recorded is not None and self.recorded.path == Path(path).resolve():
            raise ConsistoryError(f"{path} is the recording, and a recipe would replace it: choose another name")
        with self._file(path, "recipe", len(self.masks)) as file:
            for stride, mask in self.masks.items():
                file.write(f"masks.{stride}", mask)

    def record(self, path: str | Path, *, on_step: OnStep = lambda done, total: None) -> Subject:
        """Run the anchors and write all that other pictures need of them to one safetensors file, atomically.

        Returns the subject with the recording, from which it can be extended without running the anchors again.
        Raises ConsistoryError if the file cannot be written. For the size see `consistory.recording`.
        """
        again, recipe = replace(self, recorded=None), self.recipe
        story = again.draw(
            recipe.prompts, recipe.seeds, self._noise(), given=None, controls=self.controls, chunk=None, record=path,
            on_step=on_step, choose=every_picture, on_picture=lambda index, image: None,
        )
        return story.subject

    @contextmanager
    def recording(self, path: str | Path) -> Iterator[Recorder]:
        """For a story to write to while the anchors are drawn. The file is there once it is whole.

        Raises ConsistoryError if it cannot be written.
        """
        with self._file(path, "recording", most_tensors(self.pipe.unet, self.recipe.steps)) as file:
            yield Recorder(file)

    def _check_recordable(self) -> None:
        """Raises ConsistoryError for what a recording cannot hold: separate subjects, photos."""
        if self.recipe.config.separate_subjects:
            raise ConsistoryError("a recording does not keep subjects separate: keep the subject as a recipe instead")
        if self.photos is not None:
            raise ConsistoryError("photos are not recorded: keep the subject as a recipe instead")

    @contextmanager
    def _file(self, path: str | Path, grade: str, tensors: int) -> Iterator[TensorFile]:
        if self.steered:
            raise ConsistoryError(
                "this subject was read from a recording, without the ControlNets that steered its anchors, and would "
                "be saved without them: keep the recording"
            )
        controls = [
            {"net": c.net.name, "fingerprint": fingerprint(c.net), "weight": c.weight, "start": c.start, "end": c.end,
             "only": None if c.only is None else list(c.only)}
            for c in self.controls
        ]  # fmt: skip
        metadata = {
            "format": FORMAT, "grade": grade, "recipe": json.dumps(asdict(self.recipe)), "model": identity(self.pipe),
            "schedule": str(self.pipe.schedule), "controls": json.dumps(controls),
        }
        with TensorFile(path, metadata, tensors + 2 + len(controls)) as file:
            if self.latents is not None:
                file.write("latents", self.latents.float())
            if self.photos is not None:
                file.write("photos", self.photos)
            for number, control in enumerate(self.controls):
                file.write(f"controls.{number}", torch.from_numpy(np.stack(control.images)))
            yield file

    @classmethod
    def load(cls, path: str | Path, pipe: ConsiStory, nets: Sequence[ControlNet] = ()) -> Subject:
        """Read what `save` or `record` wrote: the whole file once, to see whether it is damaged.

        nets: loaded ControlNets, in case the anchors were steered; others are loaded from where they once were.
        Raises ConsistoryError for another kind of file, a damaged one, or one that another model, noise schedule or
        ControlNet made.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except FileNotFoundError:
            raise ConsistoryError(f"there is no file {path}: check the name") from None
        except (OSError, SafetensorError) as error:
            raise ConsistoryError(f"{path} is not a complete subject file ({error}): save the subject again") from None
        if metadata.get("format") != FORMAT:
            raise ConsistoryError(f"{path} is not a subject file of this version: save the subject again")
        if metadata.get("model") != identity(pipe):
            other = f"another model than {pipe.name}, other LoRAs, learned words or another picture prompt"
            raise ConsistoryError(f"{path} was made with {other}: load what it was made with")
        if metadata.get("schedule") != str(pipe.schedule):
            raise ConsistoryError(
                f"{path} was made with another noise schedule, spacing of its timesteps or prediction than {pipe.name} "
                "has: load the model with the spacing and the prediction it was made with"
            )
        if not is_intact(path):
            raise ConsistoryError(f"{path} is damaged: save the subject again")
        with safe_open(path, "pt") as file:
            kept = [key for key in file.keys() if key.startswith(("latents", "photos", "controls.", "masks."))]  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in kept}
        latents = tensors.get("latents")
        masks = {int(key.removeprefix("masks.")): mask for key, mask in tensors.items() if key.startswith("masks.")}
        recipe = json.loads(metadata["recipe"])
        recipe["config"] = ConsistoryConfig.from_dict(recipe["config"])
        if recipe["photos"] is not None:
            recipe["photos"] = PhotoConfig(**recipe["photos"])
        recipe = Recipe(**recipe)
        if metadata["grade"] == "recording":
            steered = bool(json.loads(metadata["controls"]))
            return cls(pipe, recipe, masks, latents, Recorded(path, pipe.unet), steered=steered)
        loaded = {fingerprint(net): net for net in nets}
        controls = []
        for number, control in enumerate(json.loads(metadata["controls"])):
            net = find_net(path, control.pop("net"), control.pop("fingerprint"), loaded, pipe)
            controls.append(Control(net=net, images=list(tensors[f"controls.{number}"].numpy()), **control))
        return cls(pipe, recipe, masks, latents, None, controls, tensors.get("photos"))


def kept_in(path: str | Path) -> str | None:
    """What a subject file of this or another version holds, "recipe" or "recording"; None for another file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata.get("grade", "recipe") if metadata.get("format", "").startswith("consistory subject") else None


def find_net(
    path: str | Path, name: str, wanted: str, loaded: dict[str, ControlNet], pipe: ConsiStory
) -> ControlNet:
    """The ControlNet that steered the anchors of a subject file. Raises ConsistoryError if it is not to be found."""
    if wanted not in loaded:
        try:
            net = ControlNet.load(name, device=pipe.device, dtype=pipe.dtype)
        except ConsistoryError as error:
            raise ConsistoryError(f"{path} was drawn with the ControlNet {name}, which is needed: {error}") from None
        loaded[fingerprint(net)] = net
    if wanted not in loaded:
        raise ConsistoryError(f"{path} was drawn with another ControlNet than {name} is now: load that one")
    return loaded[wanted]


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.float().cpu().numpy().tobytes() for x in tensors)).hexdigest()


def split(chosen: list[int], anchors: int, chunk: int | None) -> list[list[int]]:
    """Pictures to draw at a time: the anchors among them with the first `chunk` others, then `chunk` at a time."""
    own, others = [i for i in chosen if i < anchors], [i for i in chosen if i >= anchors]
    size = chunk or max(len(others), 1)
    first, *later = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    return [batch for batch in (own + first, *later) if batch]


def identity(pipe: ConsiStory) -> str:
    """Tells models apart: the UNet's fingerprint, then the content and the weight of every LoRA that is merged into it,
    then learned words and a picture that prompts.

    A LoRA may turn no sign at all, and others with every rounding: the parameters that it changes are left out.
    """
    changed = {name for lora in pipe.loras for name in lora.changed["unet"]}
    loras = sorted(f"{lora.digest}*{lora.weight:g}" for lora in pipe.loras)
    picture = [] if pipe.picture is None else [pipe.picture.identity]
    words = sorted(word.identity for word in pipe.words)
    return " ".join([fingerprint(pipe.unet, changed), *loras, *words, *picture])


def fingerprint(module: nn.Module, without: Collection[str] = ()) -> str:
    """A hash of the signs of every parameter's first values, which do not depend on the precision.

    without: parameters that do not count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if name in without:
            continue
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(bytes(parameter.flatten()[:64].signbit().tolist()))
    return digest.hexdigest()
