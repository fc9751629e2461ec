"""A subject that lasts (§4.4): anchors are kept as a recipe, and new pictures of the same subject join them later.

Nothing flows from other pictures to an anchor, so running the anchors again together with new pictures gives what one
large story would have given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from consistory.weights.errors import ConsistoryError

from .arguments import check_prompts, compose_prompts, expand_seeds
from .config import ConsistoryConfig
from .controlnet import Control, ControlNet, check_controls
from .story import OnStep

if TYPE_CHECKING:
    from .model import ConsiStory, Story

FORMAT = "consistory subject 1"


@dataclass(frozen=True)
class Recipe:
    """What re-creates the anchors: their prompts and seeds, and the settings of the run.

    subject, style: words that new prompts are composed of; empty if whole prompts were given.
    next_seed: the default for the first new picture, so that pictures made one after the other all differ.
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


@dataclass(frozen=True)
class Subject:
    """Anchors and the model that drew them.

    masks: {stride: bool [A, P]} where the subject is in the anchors.  controls: what steered the anchors.
    """

    pipe: ConsiStory
    recipe: Recipe
    masks: Mapping[int, Tensor]
    controls: Sequence[Control] = ()

    def extend(
        self, settings: Sequence[str] = (), *, prompts: Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None, chunk: int | None = None, controls: Sequence[Control] = (),
        on_step: OnStep = lambda done, total: None,
    ) -> Story:
        """New pictures of the subject, one for each setting or whole prompt; the anchors are run along with them.

        seed: as for a story; by default the seeds go on after those used so far.
        chunk: at most so many new pictures at a time; the result does not depend on it but for rounding.
        controls: ControlNets for the new pictures. The anchors keep their own.

        Raises ConsistoryError, before any work, if the arguments do not fit.
        """
        recipe = self.recipe
        prompts = list(prompts) if prompts is not None else compose_prompts(recipe.subject, settings, recipe.style)
        check_prompts(prompts)
        seeds = expand_seeds(recipe.next_seed if seed is None else seed, len(prompts))
        if chunk is not None and chunk < 1:
            raise ConsistoryError(f"chunks of {chunk} pictures are too small: use 1 or more")
        check_controls(controls, len(prompts), recipe.steps, self.pipe.unet, self.pipe.vae.config.stride)
        controls = [control.stretched((recipe.height, recipe.width)) for control in controls]
        size = chunk or len(prompts)
        starts = range(0, len(prompts), size)

        def part(number: int, start: int) -> Story:
            def on_part(done: int, total: int) -> None:
                on_step(number * total + done, len(starts) * total)

            numbers = range(start, min(start + size, len(prompts)))
            own = [part for control in controls if (part := control.part(numbers)) is not None]
            return self._extend(prompts[start : start + size], seeds[start : start + size], own, on_part)

        first, *others = [part(number, start) for number, start in enumerate(starts)]
        return first.join(others)

    def _extend(self, prompts: list[str], seeds: list[int], controls: list[Control], on_step: OnStep) -> Story:
        recipe = self.recipe
        anchors = range(len(recipe.prompts))
        new = range(len(anchors), len(anchors) + len(prompts))
        together = self.pipe(
            prompts=recipe.prompts + prompts, seed=recipe.seeds + seeds, concepts=recipe.concepts,
            subject=recipe.subject, style=recipe.style, steps=recipe.steps, guidance=recipe.guidance,
            negative_prompt=recipe.negative_prompt, anchors=len(anchors), width=recipe.width,
            height=recipe.height, config=recipe.config, on_step=on_step,
            controls=[*(c.at(anchors) for c in self.controls), *(c.at(new) for c in controls)],
        )
        return together.select(slice(len(anchors), None))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Raises ConsistoryError if it cannot be written."""
        path = Path(path)
        tensors = {f"masks.{stride}": mask.cpu().contiguous() for stride, mask in self.masks.items()}
        for number, control in enumerate(self.controls):
            tensors[f"controls.{number}"] = torch.from_numpy(np.stack(control.images))
        controls = [
            {"net": c.net.name, "fingerprint": fingerprint(c.net), "weight": c.weight, "start": c.start, "end": c.end,
             "only": None if c.only is None else list(c.only)}
            for c in self.controls
        ]  # fmt: skip
        metadata = {
            "format": FORMAT, "recipe": json.dumps(asdict(self.recipe)), "model": fingerprint(self.pipe.unet),
            "controls": json.dumps(controls),
        }
        part = path.with_name(f".{path.name}.part")
        try:
            save_file(tensors or {"masks": torch.zeros(0, dtype=torch.bool)}, part, metadata)
            os.replace(part, path)
        except OSError as error:
            raise ConsistoryError(f"{path} cannot be written ({error.strerror}): choose another name") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, pipe: ConsiStory, nets: Sequence[ControlNet] = ()) -> Subject:
        """Read what `save` wrote.

        nets: loaded ControlNets, in case the anchors were steered; others are loaded from where they once were.
        Raises ConsistoryError for another kind of file, and for one that another model or ControlNet made.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ConsistoryError(f"there is no file {path}: check the name") from None
        except (OSError, SafetensorError) as error:
            raise ConsistoryError(f"{path} is not a whole subject file ({error}): save the subject again") from None
        if metadata.get("format") != FORMAT:
            raise ConsistoryError(f"{path} is not a subject file of this version: save the subject again")
        if metadata["model"] != fingerprint(pipe.unet):
            raise ConsistoryError(f"{path} was made with another model than {pipe.name}: load the one it was made with")
        masks = {int(key.removeprefix("masks.")): mask for key, mask in tensors.items() if key.startswith("masks.")}
        recipe = json.loads(metadata["recipe"])
        loaded = {fingerprint(net): net for net in nets}
        controls = []
        for number, control in enumerate(json.loads(metadata.get("controls", "[]"))):
            net = find_net(path, control.pop("net"), control.pop("fingerprint"), loaded, pipe)
            controls.append(Control(net=net, images=list(tensors[f"controls.{number}"].numpy()), **control))
        return cls(pipe, Recipe(**{**recipe, "config": ConsistoryConfig.from_dict(recipe["config"])}), masks, controls)


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
        raise ConsistoryError(f"{path} was drawn with another ControlNet {name} than is there now: give the one it was")
    return loaded[wanted]


def fingerprint(module: nn.Module) -> str:
    """Tells models apart by the signs of every parameter's first values, which do not depend on the precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(bytes(parameter.flatten()[:64].signbit().tolist()))
    return digest.hexdigest()
