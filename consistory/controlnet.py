"""ControlNet (Zhang et al. 2023): a picture such as a pose, a depth map or a silhouette steers what is drawn.

A ControlNet is a trained copy of the UNet's first half that sees the picture, too. What it makes of every skip and of
the middle goes through a 1x1 convolution, zero before training, and is added to the UNet's own: `add_residuals`, between
`UNet.encode` and `UNet.decode`. Parameter names are those of diffusers' ControlNetModel.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import consistory.weights
import numpy as np
import torch
import torch.nn.functional as F
from consistory.weights import loading
from consistory.weights.errors import ConsistoryError
from numpy.typing import NDArray
from torch import Tensor, nn

from .arguments import usable_device
from .attention import AttentionControl
from .config import ControlNetConfig
from .masks import Size
from .unet import Conditioning, Encoded, Encoder

logger = logging.getLogger(__name__)

SPRITES = Path(consistory.weights.__file__).parent / "sprites" / "control"


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to an encoder's state: to x [B, C, h, w] and to the skips, finest first."""

    x: Tensor
    skips: tuple[Tensor, ...]


class HintEmbedding(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> hints [B, C, h, w], as fine as the latents."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.silu(self.conv_in(pictures))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """`ControlNet.from_pretrained("sprites")`, or a folder; or `ControlNet.from_single_file(path)`.

    name: where it was loaded from.
    """

    def __init__(self, config: ControlNetConfig, name: str = ""):
        super().__init__(config.encoder)
        self.name = name
        self.stride = config.stride
        self.controlnet_cond_embedding = HintEmbedding(config.image_channels, config.hint_widths, self.skip_widths[0])
        self.controlnet_down_blocks = nn.ModuleList([zeroed(nn.Conv2d(w, w, 1)) for w in self.skip_widths])
        width = self.skip_widths[-1]
        self.controlnet_mid_block = zeroed(nn.Conv2d(width, width, 1))

    def hint(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> [B, C, h, w]: the same at every timestep."""
        return self.controlnet_cond_embedding(pictures)

    def forward(self, x: Tensor, t: Tensor | int, cond: Conditioning, hint: Tensor) -> Residuals:
        """Residuals for latents x [B, 4, h, w] at timestep t. Its own attention is always plain."""
        encoded = self._encode(self.conv_in(x) + hint, self._embed(x, t, cond), cond.context, AttentionControl())
        skips = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, encoded.skips, strict=True)]
        return Residuals(self.controlnet_mid_block(encoded.x), tuple(skips))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> ControlNet:
        """Load "sprites" (silhouettes, for the embedded model), or a folder in the diffusers layout.

        variant: which of several weights to take, such as "fp16"; found by itself where there is only one.
        Raises ConsistoryError for a missing, damaged or unsuitable ControlNet and for an unknown device.
        """
        folder = SPRITES if str(name) == "sprites" else Path(name)
        return cls._assemble(str(name), loading.folder_controlnet(folder, variant), device, dtype)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ControlNet:
        """Load a ControlNet of SDXL from one `.safetensors` file, with diffusers' names or the original ones.

        Raises ConsistoryError for a missing, damaged or unsuitable ControlNet and for an unknown device.
        """
        return cls._assemble(str(path), loading.single_file_controlnet(Path(path)), device, dtype)

    @classmethod
    def _assemble(
        cls, name: str, component: loading.Component, device: str | torch.device, dtype: torch.dtype
    ) -> ControlNet:
        config, tensors = component
        config_of_module = ControlNetConfig.from_json(config)
        device = usable_device(device)
        return loading.load_module(lambda: cls(config_of_module, name), tensors, dtype=dtype, device=device)


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """A convolution that starts at zero: an untrained ControlNet changes nothing."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


def add_residuals(encoded: Encoded, residuals: Residuals, weight: float = 1.0) -> Encoded:
    """The state with weighted residuals added, ready for `UNet.decode`."""
    skips = tuple(skip + weight * r for skip, r in zip(encoded.skips, residuals.skips, strict=True))
    return replace(encoded, x=encoded.x + weight * residuals.x, skips=skips)
