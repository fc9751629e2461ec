"""DreamBooth (Ruiz et al. 2023) with a LoRA (Hu et al. 2021): the UNet's attention learns a subject.

The result is a file in the public naming of peft and diffusers: `from_pretrained(..., loras=[(path, 1.0)])` loads it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from consistory import ConsiStory

from .training import minimise

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """W -> W + up @ down; at first up is zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator) / rank)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def learn(
    pipe: ConsiStory, x0: Tensor, prompt: str, path: Path, *, rank: int, steps: int, rate: float, seed: int
) -> None:
    """Write a LoRA that leads to the picture with latents x0 [1, 4, h, w]; the model itself stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name: layer for name, layer in pipe.unet.named_modules() if name.endswith(PROJECTIONS)}
    changes = {name: LowRank(layer.weight, rank, generator) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", changes[name])
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    try:
        minimise(pipe, parameters, x0, prompt, steps=steps, rate=rate, seed=seed)
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    save_file(
        {
            f"unet.{name}.lora_{letter}.weight": matrix.detach().contiguous()
            for name, change in changes.items()
            for letter, matrix in (("A", change.down), ("B", change.up))
        },
        path,
    )
