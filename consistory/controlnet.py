"""ControlNet (Zhang et al. 2023): a picture such as a pose, a depth map or a silhouette steers what is drawn.

A ControlNet is a trained copy of the UNet's first half that sees the picture, too. What it makes of every skip and of
the middle goes through a 1x1 convolution, zero before training, and is added to the UNet's own: `add_residuals`,
between `UNet.encode` and `UNet.decode`. Parameter names are those of diffusers' ControlNetModel.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consistory.weights
from consistory.weights import loading
from consistory.weights.errors import ConsistoryError

from .arguments import check_kind, check_number, check_whole, usable_device
from .attention import AttentionControl
from .config import ControlNetConfig
from .images import Pixels, is_rgb
from .unet import Conditioning, Encoded, Encoder, UNet

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

    def __init__(self, config: ControlNetConfig, name: str = "unnamed"):
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
    def load(
        cls, name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ControlNet:
        """From wherever `name` leads: "sprites", a folder, or a single file."""
        single = Path(name).is_file() or Path(name).suffix == ".safetensors"
        return (cls.from_single_file if single else cls.from_pretrained)(name, device=device, dtype=dtype)

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
        """Load an SDXL ControlNet from one `.safetensors` file, with diffusers' names or the original ones.

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


def add_residuals(encoded: Encoded, residuals: Sequence[Residuals]) -> Encoded:
    """The state of the UNet's own first half with residuals added, ready for `UNet.decode`."""
    for r in residuals:
        skips = tuple(skip + more for skip, more in zip(encoded.skips, r.skips, strict=True))
        encoded = replace(encoded, x=encoded.x + r.x, skips=skips)
    return encoded


# ---------------------------------------------------------------- in a story


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, and the pictures that it steers a story's pictures by.

    images: uint8 [H, W, 3], RGB: one for every picture that is steered, or a single one for all of them; a list, or one
        array [n, H, W, 3]. Stretched to the story's size if need be.
    weight: factor of what is added.
    start, end: the fractions of the denoising steps between which it acts.
    only: the numbers, from 0, of the story's pictures that are steered; by default all.

    Raises ConsistoryError for values out of range and for images of another kind.
    """

    net: ControlNet = field(repr=False)
    images: Sequence[Pixels] = field(repr=False)
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "start", "end"):
            object.__setattr__(self, name, check_number(f"a control's {name}", getattr(self, name)))
        if self.only is not None:
            object.__setattr__(self, "only", [check_whole("a picture's number", number) for number in self.only])
        if not 0 <= self.start < self.end <= 1:
            raise ConsistoryError(f"a control acts from {self.start} to {self.end}: use rising fractions of the steps")
        for image in self.images:
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            if not is_rgb(image):
                raise ConsistoryError(f"a control picture is {given}: give arrays uint8 [H, W, 3], in RGB")

    def steered(self, pictures: int) -> list[int]:
        """Which of a story's pictures it steers."""
        return list(range(pictures) if self.only is None else self.only)

    def stretched(self, size: tuple[int, int]) -> Control:
        """The control with its pictures at size (H, W); tells of those that had another one."""
        others = sorted({image.shape[:2] for image in self.images} - {size})
        if not others:
            return self
        sizes = ", ".join(f"{w}x{h}" for h, w in others)
        logger.warning("control pictures of %s are stretched to %dx%d", sizes, size[1], size[0])
        return replace(self, images=[stretched(image, size) for image in self.images])

    def part(self, numbers: Sequence[int]) -> Control | None:
        """The control of some of a story's pictures, numbered from 0 again; None if it steers none of them."""
        shared = len(self.images) == 1
        if self.only is None:
            return replace(self, images=self.images if shared else [self.images[number] for number in numbers])
        kept = [place for place, number in enumerate(self.only) if number in numbers]
        if not kept:
            return None
        images = self.images if shared else [self.images[place] for place in kept]
        return replace(self, images=images, only=[numbers.index(self.only[place]) for place in kept])

    def at(self, numbers: range) -> Control:
        """The control of a story whose pictures become the pictures `numbers` of a larger one."""
        return replace(self, only=[numbers[number] for number in self.steered(len(numbers))])

    def settings(self) -> dict[str, Any]:
        """As JSON would hold it; pictures by the SHA-256 of their pixels."""
        return {
            "net": self.net.name, "weight": self.weight, "start": self.start, "end": self.end,
            "only": None if self.only is None else list(self.only),
            "images": [hashlib.sha256(image.tobytes()).hexdigest() for image in self.images],
        }  # fmt: skip

    def steering(self, cond: Conditioning, steps: int) -> Steering:
        """The control as it acts on one story. cond: of all the story's samples, its context token states."""
        net, halves = self.net, 1 + cond.guided
        numbers = self.steered(len(cond.pooled) // halves)
        own, like = cond.of(numbers), net.conv_in.weight
        assert isinstance(own.context, Tensor)
        hints = torch.cat([net.hint(as_input(image).to(like)) for image in self.images])  # one at a time: memory
        return Steering(
            net=net, index=torch.tensor(cond.samples(numbers), device=cond.pooled.device), weight=self.weight,
            hint=hints.expand(len(numbers), -1, -1, -1).repeat(halves, 1, 1, 1),
            cond=replace(own, context=net.prompt_keys(own.context)),
            steps=frozenset(acting_steps(self.start, self.end, steps)),
        )  # fmt: skip


@dataclass(frozen=True)
class Steering:
    """A control as it acts on one story: everything that is the same at all steps.

    index: [B] which of the story's samples are steered.  cond, hint [B, C, h, w]: of these.
    steps: those at which it acts.
    """

    net: ControlNet
    index: Tensor
    cond: Conditioning
    hint: Tensor
    weight: float
    steps: frozenset[int]

    def residuals(self, x: Tensor, t: int) -> Residuals:
        """For all samples x [B, 4, h, w]; zero for those that are not steered."""
        own = self.net(x[self.index], t, self.cond, self.hint)

        def among_all(r: Tensor) -> Tensor:
            return r.new_zeros(len(x), *r.shape[1:]).index_copy(0, self.index, self.weight * r)

        return Residuals(among_all(own.x), tuple(among_all(skip) for skip in own.skips))


def acting_steps(start: float, end: float, steps: int) -> list[int]:
    """The steps that lie between two fractions of all, whole."""
    return [step for step in range(steps) if step / steps >= start and (step + 1) / steps <= end]


def stretched(image: Pixels, size: tuple[int, int]) -> Pixels:
    """uint8 [H', W', 3] -> uint8 [H, W, 3] of size (H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def as_input(image: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 255


def check_controls(
    controls: Sequence[Control], pictures: int, steps: int, unet: UNet, stride: int, device: torch.device
) -> None:
    """Raises ConsistoryError if controls do not fit the numbers of pictures and steps, or the model that draws them.

    stride: pixels per latent.  device: where the model runs, wherever its weights lie.
    """
    if not isinstance(controls, Sequence):
        raise ConsistoryError(f"controls are a {type(controls).__name__}: give a list of Control")
    for number, control in enumerate(controls, start=1):
        check_kind(f"control {number}", control, Control)
        label = f"control {number} ({control.net.name})"
        _check_net(label, control.net, unet, stride, device)
        steered = control.steered(pictures)
        if len(set(steered)) < len(steered) or not all(0 <= i < pictures for i in steered) or not steered:
            raise ConsistoryError(f"{label} steers pictures {steered}: use numbers from 0 to {pictures - 1}, each once")
        given = len(control.images)
        if given not in (1, len(steered)):
            raise ConsistoryError(f"{label} has {given} pictures to steer {len(steered)}: give one, or one for each")
        if not acting_steps(control.start, control.end, steps):
            raise ConsistoryError(
                f"{label} acts from {control.start} to {control.end}, at none of {steps} steps: set them further apart"
            )


def _check_net(label: str, net: ControlNet, unet: UNet, stride: int, device: torch.device) -> None:
    shapes = [
        (c.channels, c.widths, c.blocks, c.context_width, c.added_width, c.size_features)
        for c in (net.config, unet.config)
    ]
    if shapes[0] != shapes[1] or net.stride != stride:
        raise ConsistoryError(f"{label} is for another model: use a ControlNet that was trained for this one")
    own, dtype = net.conv_in.weight, unet.conv_in.weight.dtype
    if (own.device, own.dtype) != (device, dtype):
        raise ConsistoryError(
            f"{label} is {own.dtype} on {own.device}: load it with the model's dtype={dtype} "
            f"and device={str(device)!r}"
        )
