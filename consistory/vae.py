"""SDXL's autoencoder. Parameter names are those of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import feature_map, patches
from .blocks import Downsample, ResBlock, Upsample
from .config import VAEConfig

EPS = 1e-6


class PixelAttention(nn.Module):
    """Single-head self-attention over all positions, with its own norm and residual."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        y = patches(self.group_norm(x))
        q, k, v = (f(y)[:, None] for f in (self.to_q, self.to_k, self.to_v))  # one head, so that fused kernels apply
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + feature_map(y, *x.shape[-2:])


class Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Stage(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where there is one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups, EPS) for i in range(blocks))
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layers(self) -> Iterator[nn.Module]:
        yield from self.resnets
        yield from self.downsamplers or self.upsamplers or ()


def layers(stages: nn.ModuleList) -> Iterator[nn.Module]:
    """One after the other: called as a whole, a stage would hold on to its input, a map of up to a GiB, to its end."""
    for stage in stages:
        assert isinstance(stage, Stage)
        yield from stage.layers()


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(c.image_channels, c.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = c.widths[0]
        for level, c_out in enumerate(c.widths):
            stage = Stage(width, c_out, c.blocks, c.groups)
            if level < len(c.widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(c_out, symmetric=False)])
            self.down_blocks.append(stage)
            width = c_out
        self.mid_block = Middle(width, c.groups)
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in layers(self.down_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        width = c.widths[-1]
        self.conv_in = nn.Conv2d(c.latent_channels, width, 3, padding=1)
        self.mid_block = Middle(width, c.groups)
        self.up_blocks = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(c.widths))):
            stage = Stage(width, c_out, c.blocks + 1, c.groups)
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(c_out)])
            self.up_blocks.append(stage)
            width = c_out
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, c.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for layer in layers(self.up_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean and log-variance of the posterior, each [B, 4, h, w], unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z = latents / scaling_factor [B, 4, h, w] -> images [B, 3, H, W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
