"""A training loop whose runs stop and resume exactly.

What a step draws depends on the seed and the step's number only (`generator_for`), so a run has no other state than its
weights, their running average and the optimizer's moments: one safetensors file.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Run(Generic[Model]):
    """The whole state of a training run."""

    model: Model
    average: Model  # running average of the model's weights: what is sampled from and exported
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done
    seconds: float = 0.0  # time spent on them


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: until `images` are seen or, where that is None, until `minutes` have passed."""

    images: int | None
    minutes: float | None
    batch: int
    rate: float
    warm_up: int = 200  # steps
    save_every: float = 300.0  # seconds

    def progress(self, run: Run) -> float:
        """0 at the start of the training, 1 at its end."""
        if self.images is not None:
            return run.step * self.batch / self.images
        assert self.minutes is not None
        return run.seconds / (60 * self.minutes)

    def learning_rate(self, run: Run) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        cosine = (1 + math.cos(math.pi * min(1.0, self.progress(run)))) / 2
        return self.rate * cosine * min(1.0, (run.step + 1) / self.warm_up)


def start(model: Model) -> Run[Model]:
    average = copy.deepcopy(model).requires_grad_(False)
    return Run(model, average, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True))


def train(
    run: Run, plan: Plan, loss_of: Callable[[int], Tensor], path: Path, sheet: Callable[[Path], None] | None = None
) -> None:
    """Advance the run to the end of the plan.

    Args:
        run: is changed in place.
        plan: length, batch size and learning rate.
        loss_of: the model's loss on the batch of the given step.
        path: where checkpoints go, every `plan.save_every` seconds and at the end.
        sheet: draws samples into the given picture, as often as there are checkpoints.
    """
    running_loss = None
    shown = saved = time.monotonic()
    first_step, first_seconds = run.step, run.seconds
    while plan.progress(run) < 1:
        began = time.monotonic()
        for group in run.optimizer.param_groups:
            group["lr"] = plan.learning_rate(run)
        loss = loss_of(run.step)
        run.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        update_average(run)
        run.step += 1
        now = time.monotonic()
        run.seconds += now - began

        running_loss = loss.detach() if running_loss is None else running_loss.lerp(loss.detach(), 0.02)
        if now - shown > 10:
            shown = now
            speed = plan.batch * (run.step - first_step) / (run.seconds - first_seconds)
            left = run.seconds * (1 / plan.progress(run) - 1) / 60
            logger.info("step %d  loss %.4f  %.1f images/s  %.0f min left", run.step, running_loss, speed, left)
        if now - saved > plan.save_every:
            save(run, path)
            if sheet is not None:
                sheet(path.with_suffix(".png"))
            saved = time.monotonic()
    save(run, path)
    if sheet is not None:
        sheet(path.with_suffix(".png"))


@torch.no_grad()
def update_average(run: Run) -> None:
    """Exponential moving average over about the last tenth of the run so far."""
    decay = min(0.9995, (1 + run.step) / (10 + run.step))
    averages: list[Tensor] = list(run.average.parameters())
    weights: list[Tensor] = list(run.model.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)


def save(run: Run, path: Path) -> None:
    """Write a run as one safetensors file; a reader never sees half of it."""
    tensors = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in run.average.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in run.optimizer.state[parameter].items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(run.step), "seconds": str(run.seconds)})
    os.replace(partial, path)


def resume(run: Run, path: Path) -> None:
    """Continue from the checkpoint at `path`, if there is one."""
    if not path.exists():
        return
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        run.step, run.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
    run.model.load_state_dict(below("model.", tensors))
    run.average.load_state_dict(below("average.", tensors))
    state = {}
    for index, (name, parameter) in enumerate(run.model.named_parameters()):
        values = below(f"optimizer.{name}.", tensors)  # none for weights that never had a gradient
        # Fused AdamW reads weights and moments in the order of memory, so they have to have the same strides.
        state[index] = {
            key: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
            for key, value in values.items()
        }
    run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
    logger.info("resumed %s at step %d", path, run.step)


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def generator_for(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the numbers (seed, stage, step) only."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator(device).manual_seed(seed % 2**63)


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the hardware multiplies it fast (CUDA, or a CPU with AMX tiles), else float32."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
