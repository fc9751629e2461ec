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
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from consistory.weights.errors import ConsistoryError

from .arguments import check_choice, check_prompts, compose_prompts, expand_seeds
from .config import ConsistoryConfig
from .images import Choose, OnPicture, Record, every_picture
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
    """Anchors and the model that drew them. masks: {stride: bool [A, P]} where the subject is in the anchors."""

    pipe: ConsiStory
    recipe: Recipe
    masks: Mapping[int, Tensor]

    def extend(
        self, settings: Sequence[str] = (), *, prompts: Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None, chunk: int | None = None,
        on_step: OnStep = lambda done, total: None,
        choose: Choose = every_picture,
        on_picture: OnPicture = lambda index, image: None,
    ) -> Story:
        """New pictures of the subject, one for each setting or whole prompt; the anchors are run along with them.

        seed: as for a story; by default the seeds go on after those used so far.
        chunk: at most so many new pictures at a time; the result does not depend on it but for rounding.
        on_step, choose, on_picture: as for a story. Only new pictures count.

        Raises ConsistoryError, before any work, if the arguments do not fit.
        """
        recipe = self.recipe
        prompts = list(prompts) if prompts is not None else compose_prompts(recipe.subject, settings, recipe.style)
        check_prompts(prompts)
        seeds = expand_seeds(recipe.next_seed if seed is None else seed, len(prompts))
        if chunk is not None and chunk < 1:
            raise ConsistoryError(f"chunks of {chunk} pictures are too small: use 1 or more")
        # All prompts are checked before any is drawn: here for what would raise an error, then for what is cut off.
        tokenizer = self.pipe.tokenizers[0]
        for concept in recipe.concepts:
            tokenizer.concept_positions(prompts, concept)
        tokenizer.encode(prompts)

        anchors = len(recipe.prompts)
        chosen: list[int] = []

        def draw(pictures: list[int], **callbacks: Any) -> Story:
            return self.pipe(
                prompts=recipe.prompts + [prompts[i] for i in pictures], concepts=recipe.concepts,
                seed=recipe.seeds + [seeds[i] for i in pictures], subject=recipe.subject, style=recipe.style,
                steps=recipe.steps, guidance=recipe.guidance, negative_prompt=recipe.negative_prompt, anchors=anchors,
                width=recipe.width, height=recipe.height, config=recipe.config, **callbacks,
            )

        def note_choice(record: Record) -> list[int]:
            chosen.extend(check_choice(choose({**record, "prompts": prompts, "seeds": seeds}), len(prompts)))
            return []

        def part(number: int, pictures: list[int]) -> Story:
            return draw(
                pictures,
                on_step=lambda done, total: on_step(number * total + done, len(parts) * total),
                choose=lambda record: range(anchors, anchors + len(pictures)),
                on_picture=lambda index, image: on_picture(pictures[index - anchors], image),
            )

        nothing = draw([], choose=note_choice)
        size = chunk or len(prompts)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        told = nothing.join([part(number, pictures) for number, pictures in enumerate(parts)])
        return replace(told, subject=replace(self, recipe=replace(recipe, next_seed=max(seeds) + 1)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Raises ConsistoryError if it cannot be written."""
        path = Path(path)
        tensors = {f"masks.{stride}": mask.cpu().contiguous() for stride, mask in self.masks.items()}
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
        return cls(pipe, Recipe(**{**recipe, "config": ConsistoryConfig.from_dict(recipe["config"])}), masks)


def fingerprint(module: nn.Module) -> str:
    """Tells models apart by the signs of every parameter's first values, which do not depend on the precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(bytes(parameter.flatten()[:64].signbit().tolist()))
    return digest.hexdigest()
