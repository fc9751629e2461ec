"""DDIM (Song et al. 2021) with eta = 0, as pure functions of the schedule the model was trained with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import ScheduleConfig


def alpha_bars(schedule: ScheduleConfig) -> Tensor:
    """Cumulative products of 1 - beta, float32 [train_steps]; beta is linear in its square root ("scaled linear").

    With zero terminal SNR, their square roots are shifted and scaled so that the last is 0 (Lin et al. 2023, alg. 1).
    """
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    betas = torch.linspace(start, end, schedule.train_steps, dtype=torch.float32, device="cpu") ** 2
    bars = torch.cumprod(1 - betas, dim=0)
    if not schedule.zero_terminal_snr:
        return bars
    roots = bars.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def timesteps(schedule: ScheduleConfig, steps: int) -> list[int]:
    """Timesteps in the order they are visited: 50 steps of 1000 with "leading" spacing -> 981, 961, ..., 1.

    With "trailing" spacing -> 999, 979, ..., 19: needed where the first one is pure noise, and where steps are few.
    """
    if schedule.trailing:
        spaced = np.arange(schedule.train_steps, 0, -schedule.train_steps / steps)[:steps]
        return [int(t) - 1 for t in np.round(spaced)]
    stride = schedule.train_steps // steps
    return [i * stride + schedule.offset for i in reversed(range(steps))]


def alpha_bar_after(schedule: ScheduleConfig, steps: int, t: int) -> Tensor:
    """alpha_bar at the timestep a step from t leads to, a scalar; past the last one it is that of t = 0, or 1."""
    previous = t - schedule.train_steps // steps
    if previous < 0 and schedule.final_alpha_one:
        return torch.tensor(1.0, dtype=torch.float32, device="cpu")
    return alpha_bars(schedule)[max(previous, 0)]


def predict(x: Tensor, output: Tensor, alpha_bar: Tensor, prediction: str = "epsilon") -> tuple[Tensor, Tensor]:
    """The clean latents x0 and the noise eps that a UNet's output on x stands for. All [..., 4, h, w].

    x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps;  v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    (Salimans & Ho 2022).
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    return (x - noise * output) / signal, output


def step(
    x: Tensor, output: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, prediction: str = "epsilon"
) -> Tensor:
    """One deterministic step from noise level alpha_bar to alpha_bar_next. x, output [..., 4, h, w]."""
    x0, eps = predict(x, output, alpha_bar, prediction)
    return alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * eps


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. All [..., 4, h, w]."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
