"""DDIM (Song et al. 2021) with eta = 0, as pure functions of the schedule the model was trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ScheduleConfig


def alpha_bars(schedule: ScheduleConfig) -> Tensor:
    """Cumulative products of 1 - beta, float32 [train_steps]; beta is linear in its square root ("scaled linear")."""
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    betas = torch.linspace(start, end, schedule.train_steps, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


def timesteps(schedule: ScheduleConfig, steps: int) -> list[int]:
    """Timesteps in the order they are visited ("leading" spacing): 50 steps of 1000 -> 981, 961, ..., 1."""
    stride = schedule.train_steps // steps
    return [i * stride + schedule.offset for i in reversed(range(steps))]


def alpha_bar_after(schedule: ScheduleConfig, steps: int, t: int) -> Tensor:
    """alpha_bar at the timestep a step from t leads to, a scalar; past the last one it is that of t = 0, or 1."""
    previous = t - schedule.train_steps // steps
    if previous < 0 and schedule.final_alpha_one:
        return torch.tensor(1.0)
    return alpha_bars(schedule)[max(previous, 0)]


def predict_x0(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that x and eps imply (eq. 12 of the DDIM paper, first term). All [..., 4, h, w]."""
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def step(x: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """One deterministic step from noise level alpha_bar to alpha_bar_next. x, eps [..., 4, h, w]."""
    return alpha_bar_next.sqrt() * predict_x0(x, eps, alpha_bar) + (1 - alpha_bar_next).sqrt() * eps


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. All [..., 4, h, w]."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
