"""What the parity tests share: weights on which nothing is negligible, and one measure of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected magnitude."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Random weights that multiply the scale of activations by `gain`, except norms, whose scales are about 1.

    With a gain far below 1, what reaches the norms is so faint that their epsilons count.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
        elif "norm" in name:
            parameter.copy_(0.3 * noise + name.endswith("weight"))
        else:
            parameter.copy_(0.3 * gain * noise)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorded_module(build: type[nn.Module], config: type[Any], folder: Path) -> nn.Module:
    """A module with the weights of one folder of a checkpoint, read without the library's own loading."""
    (weights,) = folder.glob("*.safetensors")
    module = build(config.from_json(json.loads((folder / "config.json").read_text("utf-8"))))
    tensors = {k: x for k, x in load_file(weights).items() if not k.endswith("position_ids")}
    module.load_state_dict(tensors)
    return module.eval()
