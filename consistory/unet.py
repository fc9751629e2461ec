"""SDXL's UNet, in two halves: `encode` (encoder and middle) and `decode`.

ConsiStory calls it twice on the same latents, once plainly and once consistently, and the two calls differ in the
decoder only: so the halves are separate. Parameter names are those of diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionControl, Prompt, PromptKeys, Site, Transformer, TransformerBlock
from .blocks import Downsample, ResBlock, Upsample
from .config import FreeU, UNetConfig
from .freeu import apply_freeu


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on.

    context: [B, 77, Cx] token states of both text encoders, or what `UNet.prompt_keys` makes of them.
    pooled: [B, D] projected end-of-text state of the second one.
    sizes: [B, 6] original height and width, crop top and left, target height and width, in pixels.
    guided: whether the B samples are those of N images twice, first without the prompt, then with it; otherwise once.
    """

    context: Prompt
    pooled: Tensor
    sizes: Tensor
    guided: bool = True

    def samples(self, images: Sequence[int]) -> list[int]:
        """Which samples belong to some of the N images."""
        n = len(self.pooled) // (1 + self.guided)
        return [half * n + i for half in range(1 + self.guided) for i in images]

    def of(self, images: Sequence[int]) -> Conditioning:
        """That of some of the N images."""
        assert isinstance(self.context, Tensor)
        samples = self.samples(images)
        return Conditioning(self.context[samples], self.pooled[samples], self.sizes[samples], self.guided)


@dataclass(frozen=True)
class Encoded:
    """The UNet's state between encoder and decoder: x [B, C, h, w], skips (finest first), emb [B, E], context."""

    x: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    context: Prompt


def sinusoids(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """[...] -> [..., features]: cosines, then sines, at geometrically spaced frequencies from 1 to 1e-4."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(features // 2, device=x.device, dtype=wide) / (features // 2)
    angles = x.to(wide)[..., None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class Embedding(nn.Module):
    def __init__(self, c_in: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where the level has attention."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.attended = bool(attentions)

    def apply_block(self, i: int, x: Tensor, emb: Tensor, context: Prompt, control: AttentionControl) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context, control) if self.attended else x


class DownStage(Stage):
    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer], downsample: Downsample | None):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([downsample]) if downsample else None


class UpStage(Stage):
    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer], upsample: Upsample | None):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([upsample]) if upsample else None


class Middle(nn.Module):
    """Two residual blocks with a transformer between them; only one block where there is no attention."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)


class Encoder(nn.Module):
    """The first half of a UNet: encoder and middle block. A ControlNet is one, too."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        self.emb_width = 4 * c.widths[0]
        self.time_embedding = Embedding(c.widths[0], self.emb_width)
        self.add_embedding = Embedding(c.added_width, self.emb_width)
        self.conv_in = nn.Conv2d(c.channels, c.widths[0], 3, padding=1)

        levels = range(len(c.widths))
        last = levels[-1]
        sites = count()
        self.down_blocks = nn.ModuleList()
        self.skip_widths = [c.widths[0]]
        for level in levels:
            width = c.widths[level]
            resnets = [self._resnet(self.skip_widths[-1] if i == 0 else width, width) for i in range(c.blocks)]
            attentions = [self._transformer("encoder", level, sites) for _ in resnets if c.attended[level]]
            downsample = Downsample(width, symmetric=True) if level < last else None
            self.down_blocks.append(DownStage(resnets, attentions, downsample))
            self.skip_widths += [width] * (c.blocks + (level < last))

        width = c.widths[-1]
        middle = [self._resnet(width, width) for _ in range(1 + c.mid_attended)]
        self.mid_block = Middle(middle, [self._transformer("mid", last, count())] if c.mid_attended else [])

    def _resnet(self, c_in: int, c_out: int) -> ResBlock:
        return ResBlock(c_in, c_out, self.config.groups, self.config.norm_eps, self.emb_width)

    def _transformer(self, part: str, level: int, running: Iterator[int]) -> Transformer:
        c = self.config
        sites = [Site(part, next(running), stride=2**level) for _ in range(c.depths[level])]
        return Transformer(c.widths[level], c.context_width, c.heads[level], c.groups, c.linear_projection, sites)

    def prompt_keys(self, context: Tensor) -> dict[Site, PromptKeys]:
        """Keys and values of every cross-attention layer for a context [B, 77, Cx]: the same at every timestep."""
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return {block.site: PromptKeys(*block.attn2.keys_values(context)) for block in blocks}

    def encode(self, x: Tensor, t: Tensor | int, cond: Conditioning, control: AttentionControl) -> Encoded:
        """Encoder and middle block. x [B, 4, h, w], t a timestep or [B] of them."""
        return self._encode(self.conv_in(x), self._embed(x, t, cond), cond.context, control)

    def _encode(self, x: Tensor, emb: Tensor, context: Prompt, control: AttentionControl) -> Encoded:
        skips = [x]
        for stage in self.down_blocks:
            assert isinstance(stage, DownStage)
            for i in range(len(stage.resnets)):
                x = stage.apply_block(i, x, emb, context, control)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, emb)
        for attention, resnet in zip(self.mid_block.attentions, self.mid_block.resnets[1:], strict=True):
            x = resnet(attention(x, context, control), emb)
        return Encoded(x, tuple(skips), emb, context)

    def _embed(self, x: Tensor, t: Tensor | int, cond: Conditioning) -> Tensor:
        """Timestep, pooled text and sizes, [B, emb_width]."""
        # Filled on the device: copying one number there would make the host wait.
        t = t.expand(len(x)) if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        time = sinusoids(t, self.config.widths[0], x.dtype)
        sizes = sinusoids(cond.sizes, self.config.size_features, x.dtype).flatten(1)
        return self.time_embedding(time) + self.add_embedding(torch.cat([cond.pooled, sizes], dim=-1))


class UNet(Encoder):
    """Predicts the noise eps in latents x at timestep t, or v where the checkpoint was trained for that."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c = config
        sites = count()
        self.up_blocks = nn.ModuleList()
        skip_widths = list(self.skip_widths)
        x_width = c.widths[-1]
        for level in reversed(range(len(c.widths))):
            resnets = []
            for _ in range(c.blocks + 1):
                resnets.append(self._resnet(x_width + skip_widths.pop(), c.widths[level]))
                x_width = c.widths[level]
            attentions = [self._transformer("decoder", level, sites) for _ in resnets if c.attended[level]]
            self.up_blocks.append(UpStage(resnets, attentions, Upsample(x_width) if level > 0 else None))

        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(c.widths[0], c.channels, 3, padding=1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Latent strides of the attended resolutions, finest first."""
        return tuple(2**level for level, attended in enumerate(self.config.attended) if attended)

    @property
    def attended_blocks(self) -> int:
        """How many decoder blocks it takes to pass every decoder attention."""
        return len(self.up_blocks) - self.config.attended.index(True)

    def decode(self, state: Encoded, control: AttentionControl, freeu: FreeU | None = None) -> Tensor:
        """The prediction [B, 4, h, w]."""
        x = self.decode_blocks(len(self.up_blocks), state, control, freeu)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def decode_blocks(self, blocks: int, state: Encoded, control: AttentionControl, freeu: FreeU | None) -> Tensor:
        """The output of the first `blocks` decoder blocks: enough where only what the control sees in them matters."""
        x, skips = state.x, list(state.skips)
        for index, stage in enumerate(self.up_blocks[:blocks]):
            assert isinstance(stage, UpStage)
            for i in range(len(stage.resnets)):
                skip = skips.pop()
                if freeu is not None:
                    x, skip = apply_freeu(x, skip, index, freeu)
                if i == 0 and index > 0:  # after FreeU, as in the authors' implementation
                    control.decoder_features(x, index - 1)
                x = stage.apply_block(i, torch.cat([x, skip], dim=1), state.emb, state.context, control)
            if stage.upsamplers is not None:
                x = stage.upsamplers[0](x)
        control.decoder_features(x, blocks - 1)
        return x

    def forward(
        self, x: Tensor, t: Tensor | int, cond: Conditioning, control: AttentionControl | None = None,
        freeu: FreeU | None = None,
    ) -> Tensor:
        """One whole call: x [B, 4, h, w] at timestep t -> the prediction [B, 4, h, w]."""
        control = control or AttentionControl()
        return self.decode(self.encode(x, t, cond, control), control, freeu)
