"""Nearest patches in Triton: a matrix product whose epilogue keeps a running maximum, so no distance reaches memory.

`pack` moves the kept source patches together; `match` multiplies blocks of target patches with them, all pairs of
images in one launch. Features are not normalised beforehand: inverse norms scale the products, which saves a rounding
and a pass.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel is called with has no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

PACK_ROWS = 32


def match(target: Tensor, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `consistory.kernels.correspondence`. Products in the features' own precision, sums in float32."""
    (targets, patches, channels), sources = target.shape, len(source)
    target, source = target.contiguous(), source.contiguous()
    packed, packed_index = torch.empty_like(source), source_mask.new_empty(source_mask.shape, dtype=torch.int32)
    source_norm = source.new_empty(source_mask.shape, dtype=torch.float32)
    target_norm = target.new_empty(targets * patches, dtype=torch.float32)
    length = torch.empty(sources, dtype=torch.int32, device=source.device)
    index = torch.empty(targets, sources, patches, dtype=torch.int64, device=target.device)
    distance = torch.empty(targets, sources, patches, dtype=torch.float32, device=target.device)
    if sources == 0:
        return index, distance

    norm_kernel[(triton.cdiv(targets * patches, PACK_ROWS),)](
        target, target_norm, targets * patches, channels, ROWS=PACK_ROWS, COLUMNS=64, enable_fp_fusion=True
    )
    pack_kernel[(triton.cdiv(patches, PACK_ROWS), sources)](
        source, source_mask.contiguous().view(torch.uint8), packed, packed_index, source_norm, length,
        patches, channels, ROWS=PACK_ROWS, COLUMNS=64, MASK_SIZE=triton.next_power_of_2(patches), enable_fp_fusion=True,
    )  # fmt: skip
    rows, keys, columns = blocks_for(target.dtype)
    match_kernel[(triton.cdiv(targets * patches, rows), sources)](
        target, target_norm, packed, packed_index, source_norm, length, index, distance,
        targets * patches, patches, channels,
        ROWS=rows, KEYS=keys, COLUMNS=columns, EVEN=channels % columns == 0,
        num_warps=8, num_stages=4, enable_fp_fusion=True,
    )  # fmt: skip
    return index, distance


def blocks_for(dtype: torch.dtype) -> tuple[int, int, int]:
    """Target patches, source patches and channels of one step. Float32 takes twice the space, and no tensor cores."""
    return (64, 64, 32) if dtype == torch.float32 else (128, 256, 32)


@triton.jit
def inverse_norm(squares):
    """1 / |x| from |x|^2, bounded as in `torch.nn.functional.normalize`."""
    return 1 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def norm_kernel(x_ptr, norm_ptr, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Inverse norms [R] of the rows of x [R, C]. One program a block of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < channels)[None, :]
        address = x_ptr + row.to(tl.int64)[:, None] * channels + column[None, :]
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    tl.store(norm_ptr + row, inverse_norm(squares), mask=row < rows)


@triton.jit
def pack_kernel(
    source_ptr, mask_ptr, packed_ptr, index_ptr, norm_ptr, length_ptr, patches, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASK_SIZE: tl.constexpr,
):  # fmt: skip
    """Kept rows of source [S, P, C] to the front, with their patch numbers and inverse norms [S, P] and number [S].

    One program a block of rows and a source.
    """
    block, image = tl.program_id(0), tl.program_id(1)
    patch = tl.arange(0, MASK_SIZE)
    before = tl.load(mask_ptr + image * patches + patch, mask=patch < block * ROWS, other=0).to(tl.int32)
    row = block * ROWS + tl.arange(0, ROWS)
    kept = tl.load(mask_ptr + image * patches + row, mask=row < patches, other=0).to(tl.int32)
    end = tl.sum(before) + tl.cumsum(kept)
    if block == tl.num_programs(0) - 1:
        tl.store(length_ptr + image, tl.max(end))

    place, first_row = end - kept, image.to(tl.int64) * patches
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        copied = (kept != 0)[:, None] & (column < channels)[None, :]
        x = tl.load(source_ptr + (first_row + row)[:, None] * channels + column[None, :], mask=copied, other=0.0)
        tl.store(packed_ptr + (first_row + place)[:, None] * channels + column[None, :], x, mask=copied)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    tl.store(index_ptr + first_row + place, row, mask=kept != 0)
    tl.store(norm_ptr + first_row + place, inverse_norm(squares), mask=kept != 0)


@triton.jit
def match_kernel(
    target_ptr, target_norm_ptr, packed_ptr, packed_index_ptr, source_norm_ptr, length_ptr, index_ptr, distance_ptr,
    rows, patches, channels,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program a block of target patches (of all T * P) and a source."""
    image, sources = tl.program_id(1), tl.num_programs(1)
    first_target, first_source = tl.program_id(0).to(tl.int64) * ROWS, image.to(tl.int64) * patches
    row = first_target + tl.arange(0, ROWS)
    length = tl.load(length_ptr + image)

    # Rows beyond the end repeat the last one: loads need no mask, and what comes of them is not kept.
    last_target = (rows - 1 - first_target).to(tl.int32)
    a_ptr = target_ptr + first_target * channels
    a_place = tl.minimum(tl.arange(0, ROWS), last_target)[:, None] * channels
    b_ptr = packed_ptr + first_source * channels
    best = tl.full([ROWS], float("-inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        b_place = tl.minimum(key, length - 1)[:, None] * channels
        products = tl.zeros([ROWS, KEYS], tl.float32)
        for first in range(0, channels, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            if EVEN:
                a, b = tl.load(a_ptr + a_place + column), tl.load(b_ptr + b_place + column)
            else:
                a = tl.load(a_ptr + a_place + column, mask=column < channels, other=0.0)
                b = tl.load(b_ptr + b_place + column, mask=column < channels, other=0.0)
            products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
        norm = tl.load(source_norm_ptr + first_source + key, mask=key < length, other=0.0)
        scores = products * norm[None, :] + tl.where(key < length, 0.0, float("-inf"))[None, :]
        block_best = tl.max(scores, 1)
        block_nearest = tl.min(tl.where(scores == block_best[:, None], key[None, :], 2**31 - 1), 1)
        nearest = tl.where(block_best > best, block_nearest, nearest)  # strict: the lowest index wins a tie
        best = tl.maximum(best, block_best)

    norm = tl.load(target_norm_ptr + row, mask=row < rows, other=1.0)
    distance = tl.where(length > 0, 1 - best * norm, 2.0)
    index = tl.load(packed_index_ptr + first_source + nearest, mask=(row < rows) & (nearest < length), other=0)
    place = (row // patches * sources + image) * patches + row % patches
    tl.store(distance_ptr + place, distance, mask=row < rows)
    tl.store(index_ptr + place, index.to(tl.int64), mask=row < rows)
