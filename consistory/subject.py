"""A subject that lasts (§4.4): anchors are kept as a recipe, and new pictures of the same subject join them later.

Nothing flows from other pictures to an anchor, so running the anchors again together with new pictures gives what one
large story would have given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from consistory.weights.errors import ConsistoryError

from .arguments import check_prompts, compose_prompts, expand_seeds, initial_noise
from .config import ConsistoryConfig, PhotoConfig
from .story import OnStep

if TYPE_CHECKING:
    from .model import ConsiStory, Story

FORMAT = "consistory subject 1"


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
    photos: PhotoConfig | None = None


@dataclass(frozen=True)
class Subject:
    """Anchors and the model that drew them.

    masks: {stride: bool [A, P]} where the subject is in the anchors; photos have none before pictures are drawn.
    photos: [A, 4, h, w] their latents, if the anchors are photos.
    """

    pipe: ConsiStory
    recipe: Recipe
    masks: Mapping[int, Tensor]
    photos: Tensor | None = None

    def extend(
        self, settings: Sequence[str] = (), *, prompts: Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None, chunk: int | None = None,
        on_step: OnStep = lambda done, total: None,
    ) -> Story:
        """New pictures of the subject, one for each setting or whole prompt; the anchors are run along with them.

        seed: as for a story; by default the seeds go on after those used so far.
        chunk: at most so many new pictures at a time; the result does not depend on it but for rounding.

        Raises ConsistoryError, before any work, if the arguments do not fit.
        """
        recipe = self.recipe
        prompts = list(prompts) if prompts is not None else compose_prompts(recipe.subject, settings, recipe.style)
        check_prompts(prompts)
        seeds = expand_seeds(recipe.next_seed if seed is None else seed, len(prompts))
        if chunk is not None and chunk < 1:
            raise ConsistoryError(f"chunks of {chunk} pictures are too small: use 1 or more")
        for concept in recipe.concepts:
            self.pipe.tokenizers[0].concept_positions(prompts, concept)  # every prompt has to contain it
        size = chunk or len(prompts)
        starts = range(0, len(prompts), size)

        def part(number: int, start: int) -> Story:
            def on_part(done: int, total: int) -> None:
                on_step(number * total + done, len(starts) * total)

            return self._extend(prompts[start : start + size], seeds[start : start + size], on_part)

        first, *others = [part(number, start) for number, start in enumerate(starts)]
        return first.join(others)

    def _extend(self, prompts: list[str], seeds: list[int], on_step: OnStep) -> Story:
        recipe = replace(self.recipe, next_seed=max(self.recipe.seeds + seeds) + 1)
        noise = initial_noise(recipe.seeds + seeds, self.pipe.latent_shape(recipe.height, recipe.width))
        together = self.pipe.draw(
            replace(self, recipe=recipe), recipe.prompts + prompts, recipe.seeds + seeds, noise, on_step=on_step
        )
        return together.select(slice(len(recipe.prompts), None))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Raises ConsistoryError if it cannot be written."""
        path = Path(path)
        tensors = {f"masks.{stride}": mask.cpu().contiguous() for stride, mask in self.masks.items()}
        if self.photos is not None:
            tensors["photos"] = self.photos
        metadata = {
            "format": FORMAT, "recipe": json.dumps(asdict(self.recipe)), "model": fingerprint(self.pipe.unet),
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
    def load(cls, path: str | Path, pipe: ConsiStory) -> Subject:
        """Read what `save` wrote. Raises ConsistoryError for another kind of file, or one that another model made."""
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
        recipe["config"] = ConsistoryConfig.from_dict(recipe["config"])
        if recipe.get("photos") is not None:
            recipe["photos"] = PhotoConfig(**recipe["photos"])
        return cls(pipe, Recipe(**recipe), masks, tensors.get("photos"))


def fingerprint(module: nn.Module) -> str:
    """Tells models apart by the signs of every parameter's first values, which do not depend on the precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(bytes(parameter.flatten()[:64].signbit().tolist()))
    return digest.hexdigest()
