"""CLIP (Radford et al. 2021): texts and pictures as vectors that can be compared.

The text encoder is that of `text.py`. Parameter names are those of transformers' CLIPModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from consistory.weights import loading

from .arguments import usable_device
from .config import TextConfig, VisionConfig
from .images import Pixels, resize_bicubic
from .text import Layers, TextEncoder
from .tokenizer import Tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 16  # pictures at a time


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + (c.image_size // c.patch_size) ** 2, c.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + P, C], the class's state first."""
        patches = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.width, eps=c.norm_eps)  # spelt so in every published checkpoint
        self.encoder = Layers(c, causal=False)
        self.post_layernorm = nn.LayerNorm(c.width, eps=c.norm_eps)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> [B, D], the class's final, normed state, projected."""
        x = self.vision_model.encoder.layers[-1](self.penultimate(pixels))
        return self.visual_projection(self.vision_model.post_layernorm(x[:, 0]))

    def penultimate(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> states [B, 1 + P, C] before the last layer, the class's first."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        for layer in self.vision_model.encoder.layers[:-1]:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Preprocessor:
    """How a picture is made ready: its shorter side resized to `size`, the centre cut out, colours normalised."""

    size: int
    crop: tuple[int, int]  # height, width
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def from_json(cls, d: dict[str, Any], image_size: int) -> Preprocessor:
        """From `preprocessor_config.json`; a number may stand for {"shortest_edge": n}, or for a square to cut out."""
        size, crop = d.get("size", image_size), d.get("crop_size", image_size)
        return cls(
            size=size if isinstance(size, int) else size["shortest_edge"],
            crop=(crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"]),
            mean=tuple(d.get("image_mean", MEAN)),
            std=tuple(d.get("image_std", STD)),
        )

    def __call__(self, image: Pixels) -> Tensor:
        """uint8 [H, W, 3] -> float32 [3, h, w]. Raises ConsistoryError if Pillow is missing."""
        height, width = (int(self.size * side / min(image.shape[:2])) for side in image.shape[:2])
        resized: NDArray[np.uint8] = resize_bicubic(image, height, width)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        cut = resized[top : top + self.crop[0], left : left + self.crop[1]]
        colours = torch.from_numpy(cut.copy()).permute(2, 0, 1).to(torch.float32) / 255
        mean, std = (colours.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (colours - mean) / std


@dataclass(frozen=True)
class ImageEncoder:
    """The half for pictures: `ImageEncoder.from_pretrained(folder)`."""

    vision: VisionEncoder
    prepare: Preprocessor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> ImageEncoder:
        """Load a folder in transformers' layout, of this encoder or of a whole CLIP, in float32.

        Raises ConsistoryError for a missing, damaged or unsuitable folder and for an unknown device.
        """
        folder, device = Path(folder), usable_device(device)
        config, tensors = loading.image_encoder(folder)
        vision, settings = VisionConfig.from_json(config), folder / "preprocessor_config.json"
        return cls(
            loading.load_module(lambda: VisionEncoder(vision), tensors, dtype=torch.float32, device=device),
            Preprocessor.from_json(loading.read_json(settings) if settings.exists() else {}, vision.image_size),
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Pixels]) -> Tensor:
        """Pictures, uint8 [H, W, 3] each -> features, float32 [N, D]. Raises ConsistoryError without Pillow."""
        pixels = torch.stack([self.prepare(image) for image in images]).to(self.vision.visual_projection.weight.device)
        return torch.cat([self.vision(batch) for batch in pixels.split(BATCH)]).cpu()

    @torch.no_grad()
    def patches(self, images: Sequence[Pixels | None]) -> Tensor:
        """Pictures, uint8 [H, W, 3] each -> states of their patches, float32 [N, 1 + P, C], the class's first.

        None stands for a picture that has the mean colour all over. Raises ConsistoryError without Pillow.
        """
        mean = torch.zeros(3, *self.prepare.crop, dtype=torch.float32, device="cpu")
        pixels = torch.stack([mean if image is None else self.prepare(image) for image in images])
        return self.vision.penultimate(pixels.to(self.vision.visual_projection.weight.device)).cpu()


@dataclass(frozen=True)
class CLIP:
    """Both encoders: `CLIP.from_pretrained(folder)`. Vectors have length 1, so that a dot product is a cosine."""

    name: str
    tokenizer: Tokenizer
    text: TextEncoder
    images: ImageEncoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> CLIP:
        """Load a folder in transformers' layout, in float32.

        Raises ConsistoryError for a missing, damaged or unsuitable folder and for an unknown device.
        """
        folder, device = Path(folder), usable_device(device)
        config, tensors = loading.clip_components(folder)["text"]
        text = replace(TextConfig.from_json(config), projection=config["projection_dim"])
        return cls(
            name=str(folder),
            tokenizer=Tokenizer.from_folder(folder),
            text=loading.load_module(lambda: TextEncoder(text), tensors, dtype=torch.float32, device=device),
            images=ImageEncoder.from_pretrained(folder, device=device),
        )

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> float32 [N, D], each of length 1."""
        device = self.images.vision.visual_projection.weight.device
        _, pooled = self.text(self.tokenizer.encode(texts).to(device))
        return nn.functional.normalize(pooled, dim=-1).cpu()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Pixels]) -> Tensor:
        """Pictures, uint8 [H, W, 3] each -> float32 [N, D], each of length 1. Raises ConsistoryError without Pillow."""
        return nn.functional.normalize(self.images.embed(images), dim=-1)
