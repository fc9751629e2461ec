"""Decoding in tiles, for pictures whose feature maps are too large: the same picture from less memory.

A tile is a strip, as wide as the picture. Every residual block is computed strip by strip. A strip comes with the rows
around it that the block's convolutions see, and the norms use the statistics of the whole map, which earlier rounds
over the strips have gathered. So there is no seam and nothing to blend: the result is that of `VAE.decode` up to
rounding. In memory is one map between two blocks instead of the maps within one. It takes 2.2 times the operations for
SDXL, because each round repeats what the one before it has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistory.kernels.precision import at_least_float32

from .blocks import ResBlock
from .vae import VAE, Stage

MapToMap = Callable[[Tensor], Tensor]  # [1, C, h, w] -> [1, C', h', w']

HALO = 2  # rows that a result depends on above and below: two 3x3 convolutions; three if the first follows upsampling


@dataclass(frozen=True)
class Statistics:
    """Mean and variance [groups] of a map's channel groups, each over `count` values."""

    mean: Tensor
    var: Tensor
    count: int


def tiled_decode(vae: VAE, z: Tensor, tile: int) -> Tensor:
    """`VAE.decode` of one picture, z [1, 4, h, w] -> [1, 3, H, W], in strips of `tile` rows. It has no gradient.

    The middle block, whose attention is global, sees the whole picture: at the latents' resolution that is little.
    """
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    upsample: MapToMap | None = None
    for stage in decoder.up_blocks:
        assert isinstance(stage, Stage)
        for block in stage.resnets:
            assert isinstance(block, ResBlock)
            x = tiled_block(block, upsample, x, tile)
            upsample = None
        if stage.upsamplers is not None:
            upsample = stage.upsamplers[0]
    found = pool(statistics(decoder.conv_norm_out, part) for _, part in strips(identity, x, tile))

    def to_pixels(x: Tensor) -> Tensor:
        return decoder.conv_out(F.silu(normalise(decoder.conv_norm_out, x, found)))

    return torch.cat([part for _, part in strips(to_pixels, x, tile)], dim=-2)


def tiled_block(block: ResBlock, upsample: MapToMap | None, x: Tensor, tile: int) -> Tensor:
    """`ResBlock`, after an upsampling if there is one. x [1, C, h, w] is overwritten if the result has its shape.

    The upsampled map, the largest of all, is never whole in memory.
    """
    scale = 1 if upsample is None else 2
    before = upsample or identity
    norm1 = pool(statistics(block.norm1, part) for _, part in strips(before, x, tile, scale))

    def half(x: Tensor) -> Tensor:
        return block.conv1(F.silu(normalise(block.norm1, x, norm1)))

    halves = strips(lambda x: half(before(x)), x, tile, scale)
    norm2 = pool(statistics(block.norm2, part) for _, part in halves)

    def whole(x: Tensor) -> Tensor:
        x = before(x)
        y = block.conv2(F.silu(normalise(block.norm2, half(x), norm2)))
        return y + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    shape = 1, block.conv2.out_channels, scale * x.shape[-2], scale * x.shape[-1]
    out = x if x.shape == shape else x.new_empty(shape)
    for rows, part in strips(whole, x, tile, scale):
        out[..., rows, :] = part
    return out


def strips(f: MapToMap, x: Tensor, tile: int, scale: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """f(x) [1, C', scale h, scale w] for x [1, C, h, w], about `tile` rows at a time: which rows, and these rows.

    A row of x may be overwritten as soon as its own result is there.
    """
    height, step = x.shape[-2], max(1, tile // scale)
    above = x[..., :0, :]
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = torch.cat([above, x[..., top : bottom + HALO, :]], dim=-2)
        first, last = above.shape[-2], above.shape[-2] + bottom - top
        above = strip[..., max(0, last - HALO) : last, :].clone()
        yield slice(scale * top, scale * bottom), f(strip)[..., scale * first : scale * last, :]


def identity(x: Tensor) -> Tensor:
    return x


def statistics(norm: nn.GroupNorm, x: Tensor) -> Statistics:
    values = at_least_float32(x).reshape(norm.num_groups, -1)
    var, mean = torch.var_mean(values, dim=1, correction=0)
    return Statistics(mean, var, values.shape[1])


def pool(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of a whole from those of its parts: the law of total variance."""
    found = list(parts)
    count = sum(part.count for part in found)
    mean, var = torch.stack([part.mean for part in found]), torch.stack([part.var for part in found])
    share = mean.new_tensor([part.count / count for part in found])[:, None]
    whole = (share * mean).sum(dim=0)
    return Statistics(whole, (share * (var + (mean - whole) ** 2)).sum(dim=0), count)


def normalise(norm: nn.GroupNorm, x: Tensor, found: Statistics) -> Tensor:
    """A group norm whose statistics are given is a batch norm in evaluation mode."""
    mean, var = (each.repeat_interleave(norm.num_channels // norm.num_groups) for each in (found.mean, found.var))
    weight, bias = at_least_float32(norm.weight), at_least_float32(norm.bias)
    return F.batch_norm(at_least_float32(x), mean, var, weight, bias, eps=norm.eps).to(x.dtype)
