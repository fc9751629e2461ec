"""What a user asks for -> what the model is given: prompts, seeds, noise, devices; or a clear error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index

import numpy as np
import torch
from torch import Tensor

from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, ScheduleConfig
from .nouns import find_concept

MOST_SEPARATE = 31  # subjects: the bits of an int32 but its sign


def compose_prompts(subject: str, settings: Sequence[str], style: str = "") -> list[str]:
    """ "{style} {subject} {setting}" for every setting. Raises ConsistoryError without a subject or a setting."""
    check_texts("subject", [subject])
    check_texts("style", [style])
    if not subject.strip():
        raise ConsistoryError('no subject is given: say what all pictures show, such as "a cat"')
    settings = check_texts("settings", settings)
    if not settings:
        raise ConsistoryError('no setting is given: name one for each picture, such as "on the beach"')
    return [" ".join(part.strip() for part in (style, subject, setting) if part.strip()) for setting in settings]


def check_either(settings: Sequence[str], style: str, prompts: Sequence[str] | None) -> None:
    """Raises ConsistoryError for whole prompts beside parts that prompts are composed of."""
    if prompts is not None and (check_texts("settings", settings) or style):
        raise ConsistoryError("prompts are given beside settings or a style, which would go unused: give only one")


def check_list(name: str, value: Iterable[object] | None) -> None:
    """Raises ConsistoryError for a single string, whose letters would otherwise be taken for a list."""
    if isinstance(value, str):
        raise ConsistoryError(f"{name} is the single string {value!r}: give a list of strings")


def check_texts(name: str, value: Iterable[object] | None) -> list[str]:
    """The texts as a list, empty for None. Raises ConsistoryError unless all are strings of valid Unicode."""
    check_list(name, value)
    if not isinstance(value, Iterable | None):
        raise ConsistoryError(f"{name} is {value!r}: give a list of strings")
    texts = []
    for text in () if value is None else value:
        if not isinstance(text, str):
            raise ConsistoryError(f"{name}: {text!r} is not a string: put it in quotes, or leave it out")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python reads bytes that are not UTF-8
            raise ConsistoryError(f"{name}: {text!r} is not UTF-8: save or type it in that encoding")
        texts.append(text)
    return texts


def check_kind(name: str, value: object, kind: type) -> None:
    """Raises ConsistoryError for a value of another type."""
    if not isinstance(value, kind):
        raise ConsistoryError(f"{name} is {value!r}: give a {kind.__name__}")


def check_whole(name: str, number: int) -> int:
    """The number as Python's int, be it NumPy's or another library's. Raises ConsistoryError unless it is whole."""
    try:
        return index(number)
    except TypeError:
        raise ConsistoryError(f"{name} is {number!r}: give a whole number") from None


def check_number(name: str, number: float) -> float:
    """The number as Python's float, be it NumPy's or another library's. Raises ConsistoryError unless it is finite."""
    if not isinstance(number, Real) or not math.isfinite(number):
        raise ConsistoryError(f"{name} is {number!r}: give a finite number")
    return float(number)


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """The prompts as a list. Raises ConsistoryError unless there are 1 to 100."""
    texts = check_texts("prompts", prompts)
    if not 1 <= len(texts) <= 100:
        raise ConsistoryError(f"{len(texts)} prompts are given: a story has 1 to 100 pictures")
    return texts


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ConsistoryError for noise of another shape than [N, 4, h, w] of the story, or that is not finite."""
    if not isinstance(latents, Tensor):
        raise ConsistoryError(f"latents are a {type(latents).__name__}: give a tensor {list(shape)}")
    if not latents.is_floating_point():
        raise ConsistoryError(f"latents are {latents.dtype}: give standard normal noise, in floating point")
    if latents.shape != shape:
        raise ConsistoryError(f"latents are {list(latents.shape)}: these prompts at this size need {list(shape)}")
    if not latents.isfinite().all():
        raise ConsistoryError("latents are not all finite: give standard normal noise")


def check_finite(what: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises ConsistoryError unless every value of what was computed in `dtype` is finite."""
    if not x.isfinite().all():
        wider = {torch.float16: "use dtype bfloat16 or float32", torch.bfloat16: "use dtype float32"}
        advice = wider.get(dtype, "use a lower guidance or another checkpoint")
        raise ConsistoryError(f"{what} is not finite in dtype {str(dtype).removeprefix('torch.')}: {advice}")


def check_chunk(chunk: int | None) -> None:
    """Raises ConsistoryError for chunks without pictures."""
    if chunk is None:
        return
    check_whole("chunk", chunk)
    if chunk < 1:
        raise ConsistoryError(f"chunks of {chunk} pictures are too small: use 1 or more")


def check_tile(tile: int | None) -> None:
    """Raises ConsistoryError for a tile without rows."""
    if tile is None:
        return
    check_whole("tile", tile)
    if tile < 1:
        raise ConsistoryError(f"tiles of {tile} rows are too small: use 1 or more, commonly 32")


def check_anchors(anchors: int | None, images: int) -> int:
    """The number of anchors; 2 by default, or 1 for a single picture. Raises ConsistoryError if it does not fit."""
    if anchors is None:
        return min(2, images)
    anchors = check_whole("anchors", anchors)
    if not 1 <= anchors <= images:
        raise ConsistoryError(f"{anchors} anchors do not fit {images} pictures: use 1 to {images}")
    return anchors


def check_choice(pictures: Sequence[int], images: int) -> list[int]:
    """Indices of chosen pictures, in order, each once. Raises ConsistoryError for one that the story does not have."""
    chosen = sorted(set(pictures))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < images:
        raise ConsistoryError(f"pictures {chosen} are chosen of {images}: use indices from 0 to {images - 1}")
    return chosen


def check_sampling(steps: int, schedule: ScheduleConfig, guidance: float) -> tuple[int, float]:
    """Both, as Python's numbers. Raises ConsistoryError for more steps than the schedule has, or bad numbers."""
    steps = check_whole("steps", steps)
    most = schedule.train_steps - schedule.offset
    if not 1 <= steps <= most:
        raise ConsistoryError(f"{steps} steps are out of range: use 1 to {most}, commonly 20 to 50")
    return steps, check_number("guidance", guidance)


def check_negative(negative_prompt: str | None, guidance: float) -> None:
    """Raises ConsistoryError for a negative prompt that is not a string, or would do nothing."""
    check_texts("negative_prompt", [negative_prompt or ""])
    if negative_prompt and guidance <= 1:
        raise ConsistoryError(
            f"a negative prompt does nothing at guidance {guidance:g}: leave it out, or use a guidance above 1"
        )


def check_clip_skip(clip_skip: int | None, layers: int) -> int:
    """0 for None. Raises ConsistoryError for more layers than the smaller text encoder has besides its last."""
    clip_skip = check_whole("clip_skip", clip_skip or 0)
    if not 0 <= clip_skip < layers:
        raise ConsistoryError(f"clip_skip {clip_skip} is out of range: use 0 to {layers - 1}, commonly 0 or 1")
    return clip_skip


def expand_seeds(seed: int | Sequence[int], images: int) -> list[int]:
    """One seed per image. Raises ConsistoryError for a wrong number of them, or one not whole or out of range."""
    try:
        if isinstance(seed, np.ndarray | Tensor) and seed.ndim:
            seed = seed.tolist()
        seeds = [index(s) for s in seed] if isinstance(seed, Sequence) else [index(seed) + i for i in range(images)]
    except TypeError:
        raise ConsistoryError(f"the seed is {seed!r}: give a whole number, or a list, one per picture") from None
    if len(seeds) != images:
        raise ConsistoryError(f"{len(seeds)} seeds are given for {images} pictures: give one seed, or one per picture")
    if not all(0 <= s < 2**63 for s in seeds):
        raise ConsistoryError("a seed is out of range: use whole numbers from 0 to 2^63 - 1")
    return seeds


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[N, *shape] float32. Each image has a CPU generator of its own: the same noise on any device, in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators])


def choose_concepts(concepts: Sequence[str] | None, subject: str, config: ConsistoryConfig) -> list[str]:
    """Those given, or the subject's noun where the method needs one. Raises ConsistoryError if it lacks one."""
    concepts = check_texts("concepts", concepts)
    needed = config.masking and config.uses_anchors
    if needed and config.separate_subjects and not 2 <= len(concepts) <= MOST_SEPARATE:
        raise ConsistoryError(
            f"{len(concepts)} concepts are given: to keep subjects separate, name each of them, "
            f"2 to {MOST_SEPARATE}, as a concept of its own"
        )
    if concepts or not needed:
        return concepts
    if not subject:
        raise ConsistoryError("no concept is given: name the word that stands for the subject in every prompt")
    return [find_concept(subject)]


def usable_device(device: str | torch.device) -> torch.device:
    """The device, with its number. Raises ConsistoryError for one that this machine does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConsistoryError(f"device {str(device)!r} cannot be used ({reason}): use cpu, cuda or mps") from None
