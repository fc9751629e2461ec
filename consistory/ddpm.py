"""DDPM steps, and the noise that makes them arrive at a given picture: edit-friendly inversion.

Source: Huberman-Spiegelglas et al. 2024, "An Edit Friendly DDPM Noise Space" (arXiv 2304.06140). A picture is noised
independently at every timestep; the noise map z_t of a step is whatever leads from the model's prediction at one of
these latents to the next one. Sampling with these maps instead of random noise reproduces the picture. Pure functions
of the schedule, as in `consistory.ddim`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ddim
from .config import ScheduleConfig
from .masks import generator_for

Predict = Callable[[Tensor, int], Tensor]  # x_t [A, 4, h, w] and the number of its step -> the guided output, like x_t


@dataclass(frozen=True)
class Levels:
    """alpha_bar before and after a step."""

    alpha_bar: Tensor
    alpha_bar_next: Tensor

    @classmethod
    def of(cls, schedule: ScheduleConfig, steps: int, step: int) -> Levels:
        t = ddim.timesteps(schedule, steps)[step]
        return cls(ddim.alpha_bars(schedule)[t], ddim.alpha_bar_after(schedule, steps, t))

    @property
    def sigma(self) -> Tensor:
        """sigma_t: the noise of a step, DDIM's eq. 16 with eta = 1. It is 0 where a schedule ends without noise."""
        shrink = (1 - self.alpha_bar_next) / (1 - self.alpha_bar)
        return (shrink * (1 - self.alpha_bar / self.alpha_bar_next)).sqrt()


def mean(x: Tensor, output: Tensor, levels: Levels, prediction: str = "epsilon") -> Tensor:
    """mu_t(x_t): where a step leads but for its noise. x, the UNet's output on it and the result [..., 4, h, w]."""
    x0, eps = ddim.predict(x, output, levels.alpha_bar, prediction)
    direction = (1 - levels.alpha_bar_next - levels.sigma**2).clamp_min(0).sqrt()
    return levels.alpha_bar_next.sqrt() * x0 + direction * eps


def step(x: Tensor, output: Tensor, z: Tensor, levels: Levels, prediction: str = "epsilon") -> Tensor:
    """x_{t-1} = mu_t(x_t) + sigma_t z."""
    return mean(x, output, levels, prediction) + levels.sigma * z


def noise_map(x: Tensor, output: Tensor, x_next: Tensor, levels: Levels, prediction: str = "epsilon") -> Tensor:
    """z_t = (x_{t-1} - mu_t(x_t)) / sigma_t: the noise with which `step` arrives at x_next; 0 where sigma_t is."""
    if levels.sigma == 0:
        return torch.zeros_like(x)
    return (x_next - mean(x, output, levels, prediction)) / levels.sigma


def noised(x0: Tensor, seeds: Sequence[int], schedule: ScheduleConfig, steps: int, *, fixed: bool = False) -> Tensor:
    """Latents x0 [A, 4, h, w] with noise, before every step and after the last: [steps + 1, A, 4, h, w].

    The noise of every step is drawn independently; if `fixed`, a picture has the same at all of them. Every picture has
    a CPU generator of its own: the same noise on any device, in any batch.
    """
    # Other draws than those which pictures generated from the same seed start from.
    generators = [generator_for(seed, 0) for seed in seeds]
    shape = 1 if fixed else steps, *x0.shape[1:]
    draws = [torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
    eps = torch.stack(draws, dim=1).to(x0)
    bars = ddim.alpha_bars(schedule)[ddim.timesteps(schedule, steps)].to(x0)
    return torch.cat([ddim.add_noise(x0, eps, bars[:, None, None, None, None]), x0[None]])


@dataclass(frozen=True)
class Inversion:
    """What reproduces pictures: latents [A, 4, h, w] before the first step, and the noise maps [steps, A, 4, h, w]."""

    start: Tensor
    maps: Tensor


def invert(predict: Predict, x0: Tensor, seeds: Sequence[int], schedule: ScheduleConfig, steps: int) -> Inversion:
    """Noise maps of latents x0 [A, 4, h, w], one seed each."""
    x = noised(x0, seeds, schedule, steps)
    maps = [
        noise_map(x[i], predict(x[i], i), x[i + 1], Levels.of(schedule, steps, i), schedule.prediction)
        for i in range(steps)
    ]
    return Inversion(x[0], torch.stack(maps))


def generate(predict: Predict, inversion: Inversion, schedule: ScheduleConfig, steps: int) -> Tensor:
    """The latents [A, 4, h, w] that sampling with the noise maps ends in: x0, if `predict` is that of `invert`."""
    x = inversion.start
    for i, z in enumerate(inversion.maps):
        x = step(x, predict(x, i), z, Levels.of(schedule, steps, i), schedule.prediction)
    return x
