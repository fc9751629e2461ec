"""Real photos as anchors: training-free personalisation (App. E).

The anchors are not drawn but follow the latents of given pictures from noise to picture, so that generated ones can
look at the subject in them. They do not look at each other, and their keys are aligned to those of whoever reads them
(`consistory.sdsa.align_keys`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from consistory.weights.errors import ConsistoryError

from . import ddpm
from .config import PhotoConfig
from .images import Pixels, is_rgb, read_picture
from .story import Follow, Plan, State, guided_output

logger = logging.getLogger(__name__)

Photo = str | Path | NDArray[np.uint8]  # a file, or pixels [H, W, 3]


@dataclass(frozen=True)
class Trail:
    """The way of photos from noise to picture. start: their latents [A, 4, h, w] before the first step."""

    start: Tensor
    follow: Follow


def find_trail(plan: Plan, x0: Tensor, seeds: Sequence[int], photos: PhotoConfig) -> Trail:
    """The trail of photos with latents x0 [A, 4, h, w].

    Noise maps lead through the very latents that they were made from, unless something flows into a photo. So they are
    only made, by one call of the UNet a step, if photos read each other; otherwise the latents are the trail.

    plan: of the story they will be anchors of, but with the photos as its only images.
    """
    schedule, steps = plan.schedule, plan.steps
    if photos.method == "noise" or not photos.anchors_read:
        latents = ddpm.noised(x0, seeds, schedule, steps, fixed=photos.method == "noise")
        return Trail(latents[0], lambda step, x, output: latents[step + 1])

    inversion = ddpm.invert(photo_model(plan, photos), x0, seeds, schedule, steps)

    def follow(step: int, x: Tensor, output: Tensor) -> Tensor:
        levels = ddpm.Levels.of(schedule, steps, step)
        return ddpm.step(x, output, inversion.maps[step], levels, schedule.prediction)

    return Trail(inversion.start, follow)


def photo_model(plan: Plan, photos: PhotoConfig) -> ddpm.Predict:
    """What photos are inverted with: the plain UNet with guidance, on the images of a plan."""
    plain = replace(plan, guidance=photos.guidance, config=replace(plan.config, sdsa=False, injection=False))
    return lambda x, step: guided_output(plain, State(step, x, []), None, call=(1, step))[0]


def with_photos(plan: Plan, trail: Trail, photos: PhotoConfig) -> Plan:
    """A plan whose anchors are photos: with a guidance of their own, on their trail."""
    images, device = len(plan.token_weights), plan.token_weights.device
    guidance = plan.guidance * torch.ones(images, 1, 1, 1, dtype=torch.float32, device=device)
    guidance[: plan.anchors] = photos.guidance
    return replace(
        plan, guidance=guidance, follow=trail.follow, anchors_read=photos.anchors_read, align_keys=photos.align_keys
    )


def check_photos(photos: Sequence[Photo]) -> None:
    """Raises ConsistoryError unless there is at least one photo, in a list, each a path or uint8 [H, W, 3]."""
    if isinstance(photos, (str, Path)) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
        raise ConsistoryError("images are a single photo: give a list of them")
    if not isinstance(photos, (Sequence, np.ndarray)):
        raise ConsistoryError(f"images are a {type(photos).__name__}: give a list of photos")
    if not len(photos):
        raise ConsistoryError("no photo is given: give one or more pictures of the subject")
    for photo in photos:
        if isinstance(photo, (str, Path)):
            continue
        if not is_rgb(photo):
            kind = f"{photo.dtype} {list(photo.shape)}" if isinstance(photo, np.ndarray) else type(photo).__name__
            raise ConsistoryError(f"a photo is {kind}: give a path, or a uint8 array [H, W, 3]")


def read_photos(photos: Sequence[Photo], height: int, width: int) -> Pixels:
    """Photos of any size, in files or not -> uint8 [A, height, width, 3].

    Raises ConsistoryError if one cannot be read.
    """
    names = [str(photo) if isinstance(photo, (str, Path)) else f"photo {i}" for i, photo in enumerate(photos, start=1)]
    pixels = [read_picture(Path(photo)) if isinstance(photo, (str, Path)) else photo for photo in photos]
    return np.stack([fit_photo(one, height, width, name) for one, name in zip(pixels, names, strict=True)])


def fit_photo(photo: Pixels, height: int, width: int, name: str) -> Pixels:
    """Cut uint8 [H, W, 3] to its centre in the proportions of width and height, and resize that. Logs what it does."""
    h, w = photo.shape[:2]
    if (h, w) == (height, width):
        return photo
    scale = max(height / h, width / w)
    cut_h, cut_w = min(h, round(height / scale)), min(w, round(width / scale))
    if (cut_h, cut_w) == (h, w):
        logger.info("%s, %dx%d pixels, is resized to %dx%d", name, w, h, width, height)
    else:
        logger.warning(
            "%s, %dx%d pixels, is cut to its centre of %dx%d and resized to %dx%d",
            name, w, h, cut_w, cut_h, width, height,
        )  # fmt: skip
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    centre = torch.from_numpy(photo[top : top + cut_h, left : left + cut_w].copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(centre, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
