"""The sprites oracle: reads from a picture what `world` drew into it.

    oracle = Oracle.load()
    reading = oracle.read(images)         # uint8 [N, 64, 64, 3]
    reading.main                          # int64 [N], indices into COLOUR_NAMES
    reading.mask                          # bool [N, 64, 64], the subject's pixels

    python -m consistory.weights.sprites.oracle train --work runs/sprites --minutes 30
    python -m consistory.weights.sprites.oracle evaluate

A small convolutional network finds the subject's pixels first and then judges its kind, colours and pattern from the
features inside them, so that the setting cannot colour the answer; which way it faces, from how these differ between
its left and right. It is trained on rendered scenes with one subject, blurred, noisy, slightly recoloured or passed
through the autoencoder: the pictures it is for are generated ones.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consistory.vae import VAE
from consistory.weights.sprites.loop import Plan, generator_for, mixed_precision, resume, start, train
from consistory.weights.sprites.train import load_vae
from consistory.weights.sprites.world import COLOURS, PATTERNS, SETTINGS, SUBJECTS, Scenes, render, sample_scenes

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "oracle.safetensors"
# What is read, and how many answers each has.
PROPERTIES = {
    "subject": len(SUBJECTS),
    "setting": len(SETTINGS),
    "main": len(COLOURS),
    "second": len(COLOURS),
    "pattern": len(PATTERNS),
    "facing": 2,  # left, right
}


class Reading(NamedTuple):
    """What N pictures show: indices [N], int64, into the world's tables; the subject's pixels; and how sure that is."""

    subject: Tensor
    setting: Tensor
    main: Tensor
    second: Tensor
    pattern: Tensor
    facing: Tensor  # 0 left, 1 right
    mask: Tensor  # [N, 64, 64] bool
    probabilities: dict[str, Tensor]  # property -> [N, answers]


class Block(nn.Module):
    """3x3 convolution, norm, activation; halves height and width if `stride` is 2."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Oracle(nn.Module):
    """A U-shaped network from 2x2 pixel cells (32x32 of them) down to 8x8 and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Block(12, 40)  # stage 1: 32x32
        self.fine = Block(40, 40)
        self.middle = nn.Sequential(Block(40, 64, stride=2), Block(64, 64))  # 16x16
        self.coarse = nn.Sequential(Block(64, 96, stride=2), Block(96, 96))  # 8x8
        self.up_middle = Block(96 + 64, 64)
        self.up_fine = Block(64 + 40, 64)
        self.mask = nn.Conv2d(64, 4, 3, padding=1)  # four pixels a cell
        self.subject_features = nn.Sequential(nn.Linear(64 + 64 + 96, 160), nn.SiLU())
        self.facing_maps = nn.Sequential(Block(64 + 40, 48), Block(48, 48))  # which way the pupils look, say
        self.facing_features = nn.Sequential(nn.Linear(2 * 48 + 64 + 64 + 96, 64), nn.SiLU())
        inputs = {"setting": 96, "facing": 64}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(inputs.get(name, 160), answers) for name, answers in PROPERTIES.items()}
        )

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """images [N, 3, 64, 64] in [0, 1] -> logits [N, answers] of each property, mask logits [N, 64, 64]."""
        cells = self.cells(F.pixel_unshuffle(2 * images - 1, 2))
        fine = self.fine(cells)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up_middle = self.up_middle(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], dim=1))
        up_fine = self.up_fine(torch.cat([F.interpolate(up_middle, scale_factor=2.0), fine], dim=1))
        mask = self.mask(up_fine)
        # Maps are averaged over the subject; no gradient goes that way: the mask is learnt from its own loss only.
        weight = mask.detach().sigmoid().mean(dim=1, keepdim=True)
        maps = [(x, F.adaptive_avg_pool2d(weight, x.shape[-2:])) for x in (up_fine, up_middle, coarse)]
        inside = [_weighted_mean(x, w) for x, w in maps]
        subject = self.subject_features(torch.cat(inside, dim=1))
        looks = self.facing_maps(torch.cat([up_fine, fine], dim=1))
        leans = [_lean(x, w) for x, w in [(looks, weight), *maps]]
        features = {
            "setting": coarse.mean(dim=(2, 3)),
            "facing": self.facing_features(torch.cat([_weighted_mean(looks, weight), *leans], dim=1)),
        }
        logits = {name: head(features.get(name, subject)) for name, head in self.heads.items()}
        return logits, F.pixel_shuffle(mask, 2)[:, 0]

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Oracle:
        """The trained oracle, in float32."""
        oracle = cls()
        oracle.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return oracle.requires_grad_(False).eval()

    @torch.no_grad()
    def read(self, images: Tensor | NDArray[np.uint8]) -> Reading:
        """images uint8 [N, 64, 64, 3], such as `Story.images` -> what they show."""
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(self.mask.weight)
        logits, mask = self(pixels / 255)
        indices = {name: x.argmax(dim=-1) for name, x in logits.items()}
        probabilities = {name: x.softmax(dim=-1) for name, x in logits.items()}
        return Reading(**indices, mask=mask > 0, probabilities=probabilities)


def _weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C, h, w], weight [N, 1, h, w] -> [N, C]."""
    return (x * weight).sum(dim=(2, 3)) / (weight.sum(dim=(2, 3)) + 1e-3)


def _lean(x: Tensor, weight: Tensor) -> Tensor:
    """Covariance of x [N, C, h, w] with the place across the subject, weight [N, 1, h, w], in its own width: [N, C]."""
    place = torch.linspace(-1, 1, x.shape[-1], device=x.device).expand_as(weight)
    offset = place - _weighted_mean(place, weight)[:, :, None, None]
    width = _weighted_mean(offset**2, weight).sqrt() + 1e-3
    return _weighted_mean(x * offset, weight) / width


# ---------------------------------------------------------------- training


def degrade(images: Tensor, vae: VAE, generator: torch.Generator) -> Tensor:
    """Make rendered images [N, 3, 64, 64] in [0, 1] look generated: recoloured, passed through the VAE, blurred, noisy.

    An eighth of them goes through the autoencoder with noisy latents; half of the others is blurred a little.
    """
    n, device = len(images), images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    gain, shift = 0.94 + 0.12 * uniform(n, 3, 1, 1), 0.06 * uniform(n, 3, 1, 1) - 0.03
    images = images * gain + shift
    decoded = n // 8
    with torch.no_grad(), mixed_precision(device):
        mean, _ = vae.encode(2 * images[:decoded] - 1)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        through = vae.decode(mean + 0.1 * mean.std() * noise * uniform(decoded, 1, 1, 1)).float() / 2 + 0.5
    images = torch.cat([through, images[decoded:]])
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    strength = (2 * uniform(n, 1, 1, 1) - 1).clamp(min=0) * 0.7
    images = torch.lerp(images, blurred, strength)
    noise = torch.randn(images.shape, generator=generator).to(device)
    return (images + 0.04 * uniform(n, 1, 1, 1) * noise).clamp(0, 1)


def answers(scenes: Scenes) -> dict[str, Tensor]:
    """What the oracle should say of each property: indices [N]."""
    drawn = {name: getattr(scenes, name) for name in PROPERTIES}
    return drawn | {"facing": (scenes.facing > 0).long()}


def oracle_loss(oracle: Oracle, images: Tensor, scenes: Scenes, masks: Tensor) -> Tensor:
    """Cross-entropy of every property and of the mask's pixels, summed."""
    with mixed_precision(images.device):
        logits, mask = oracle(images)
    losses = [
        F.cross_entropy(logits[name].float(), answer, label_smoothing=0.02) for name, answer in answers(scenes).items()
    ]
    return torch.stack(losses).sum() + F.binary_cross_entropy_with_logits(mask.float(), masks.float())


def train_oracle(work: Path, plan: Plan, seed: int, device: torch.device, facing_only: bool = False) -> None:
    """Train with the autoencoder of the same work folder, and write the weights into the package.

    facing_only: teach the shipped oracle which way subjects face; it answers all else as before.
    """
    torch.manual_seed(seed)
    vae = load_vae(work, device)
    oracle = Oracle().to(device)
    if facing_only:
        oracle.load_state_dict(load_file(WEIGHTS), strict=False)
        for name, parameter in oracle.named_parameters():
            parameter.requires_grad_("facing" in name)
    run = start(oracle)
    resume(run, work / "oracle.safetensors")

    def loss_of(step: int) -> Tensor:
        generator = generator_for(seed, 7, step)
        scenes = sample_scenes(plan.batch, generator, second_subject=0.0).to(device)
        images, masks = render(scenes)
        return oracle_loss(oracle, degrade(images, vae, generator), scenes, masks)

    train(run, plan, loss_of, work / "oracle.safetensors")
    save_file({name: value.half().cpu() for name, value in run.average.state_dict().items()}, WEIGHTS)


def evaluate(
    oracle: Oracle, scenes: Scenes, change: Callable[[Tensor], Tensor] = lambda images: images
) -> dict[str, float]:
    """Share of right answers per property, and the masks' mean intersection over union, on (changed) fresh renders."""
    images, masks = render(scenes)
    pixels = (change(images) * 255).round().byte().permute(0, 2, 3, 1)
    reading = oracle.read(pixels)
    scores = {name: (getattr(reading, name) == x).float().mean().item() for name, x in answers(scenes).items()}
    intersection, union = (reading.mask & masks).sum(dim=(1, 2)), (reading.mask | masks).sum(dim=(1, 2))
    return scores | {"mask": (intersection / union).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the sprites oracle.")
    parser.add_argument("job", choices=("train", "evaluate"))
    parser.add_argument("--work", type=Path, help="folder with the trained autoencoder; checkpoints go there too")
    parser.add_argument("--minutes", type=float, default=30, help="how long to train, in all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facing-only", action="store_true", help="go on from the shipped weights, all else as it is")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.job == "train":
        if args.work is None:
            parser.error("say where the autoencoder is: --work")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train_oracle(args.work, Plan(None, args.minutes, args.batch, args.rate), args.seed, device, args.facing_only)
    scenes = sample_scenes(2000, generator_for(args.seed, 8), second_subject=0.0)
    for name, score in evaluate(Oracle.load(), scenes).items():
        print(f"{name:8} {100 * score:.2f} %")


if __name__ == "__main__":
    main()
