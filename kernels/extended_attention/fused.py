"""Extended attention in Triton: two launches a layer, work proportional to the kept keys, no host synchronisation.

`pack` moves the anchors' kept keys and values together and leaves their number on the device. `attend` streams an
image's own keys, then the packed keys of the anchors it reads, through one online softmax (FlashAttention-2, Dao 2023).
The launches do not depend on what the masks hold, so a CUDA graph can replay them. On Hopper they overlap:
`attend` waits for `pack` once it is done with the own keys.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel is called with has no Python types)

from math import log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from consistory.kernels.backends import with_contiguous_rows


class Packed(NamedTuple):
    """The kept keys and values, anchor after anchor [G, H, A P, d], and their regions int32 [A P].

    end: int32 [A], where those of each anchor end. Rows beyond the last end are undefined.
    """

    k: Tensor
    v: Tensor
    region: Tensor | None
    end: Tensor


class Tile(NamedTuple):
    """Queries and keys of one block, and the resources of the program that holds it; registers: at most, a thread."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def tile_for(dtype: torch.dtype, head_size: int, hopper: bool) -> Tile:
    """As good as any that `bench/kernels.py --tiles` compares on an H200; float32 has registers for less."""
    if dtype == torch.float32:
        return Tile(queries=64, keys=16, warps=8, stages=2)
    if not hopper:
        return Tile(queries=128, keys=64, warps=8, stages=3)
    if head_size > 64:
        return Tile(queries=64, keys=64, warps=4, stages=3)
    if head_size != triton.next_power_of_2(head_size):
        return Tile(queries=128, keys=64, warps=8, stages=3, registers=128)
    return Tile(queries=64, keys=64, warps=4, stages=3, registers=128)  # four programs a multiprocessor


def is_hopper(x: Tensor) -> bool:
    """An H100 or H200: matrix units read shared memory, and a launch can begin before the one before it has ended."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor,
    anchor_v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    q_blend: tuple[Tensor, float] | None = None,
    regions: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Shapes as in `consistory.kernels.extended_attention`; strides are free, scattered rows of d values are copied.

    The result is laid out [G, N, P, H, d], so that joining its heads is a view.
    """
    # Copies that `pack` reads are held until `attend` is launched: its result, which it begins to write while `pack`
    # runs, would be given their memory. Those that it reads itself by then have to be made before `pack` is launched.
    q, k, v, anchor_k, anchor_v = (with_contiguous_rows(x) for x in (q, k, v, anchor_k, anchor_v))
    if q_blend is not None:
        q_blend = with_contiguous_rows(q_blend[0]), q_blend[1]
    key_mask = key_mask.contiguous()
    query_region, key_region = (None, None) if regions is None else (regions[0], regions[1].contiguous())
    overlap = is_hopper(q) and len(key_mask) > 0
    packed = pack(anchor_k, anchor_v, key_mask, key_region, overlap=overlap)
    return attend(q, k, v, packed, share, q_blend, query_region, tile, overlap=overlap)


def pack(
    anchor_k: Tensor, anchor_v: Tensor, key_mask: Tensor, key_region: Tensor | None = None, *, overlap: bool = False
) -> Packed:
    """Move the kept rows of all anchors together, in order.

    anchor_k, _v    [G, A, H, P, d], rows of d values contiguous
    key_mask        bool [A, P], contiguous
    key_region      int32 [A, P], contiguous, or None
    overlap         let the next launch begin before this one has ended
    returns         rows defined up to the last anchor's end
    """
    halves, anchors, heads, patches, head_size = anchor_k.shape
    packed_k, packed_v = (x.new_empty(halves, heads, anchors * patches, head_size) for x in (anchor_k, anchor_v))
    packed_region = None if key_region is None else key_region.new_empty(anchors * patches)
    end = torch.empty(anchors, dtype=torch.int32, device=anchor_k.device)
    width = triton.next_power_of_2(head_size)
    rows = pack_rows(width, anchor_k.dtype)
    if anchors:
        grid = (triton.cdiv(patches, rows), heads, halves * anchors)
        pack_kernel[grid](
            anchor_k, anchor_k.stride(), anchor_v, anchor_v.stride(), key_mask.view(torch.uint8),
            end if key_region is None else key_region,
            packed_k, packed_v, end if packed_region is None else packed_region, end, anchors, heads, patches,
            OVERLAP=overlap, REGIONS=key_region is not None, HEAD_SIZE=head_size, WIDTH=width, ROWS=rows,
            MASK_SIZE=triton.next_power_of_2(patches), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return Packed(packed_k, packed_v, packed_region, end)


def pack_rows(width: int, dtype: torch.dtype) -> int:
    """Rows that one program packs: at most 32 KiB of keys, and as many of values."""
    return min(256, 2**15 // (width * dtype.itemsize))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    share: Tensor,
    q_blend: tuple[Tensor, float] | None = None,
    query_region: Tensor | None = None,
    tile: Tile | None = None,
    *,
    overlap: bool = False,
) -> Tensor:
    """q, k, v [G, N, H, P, d], rows of d values contiguous, with what `pack` returned -> [G, N, H, P, d].

    query_region: int32 [N, P], if regions were packed; overlap: begin before the launch before this one, which has to
    be that of `pack`, has ended.
    """
    halves, images, heads, patches, head_size = q.shape
    width = triton.next_power_of_2(head_size)
    tile = tile or tile_for(q.dtype, head_size, is_hopper(q))
    q_vanilla, weight = q_blend if q_blend is not None else (q, 0.0)
    packed_region = packed.region if query_region is not None else packed.end
    out = q.new_empty(halves, images, patches, heads, head_size).transpose(2, 3)
    attend_kernel[(triton.cdiv(patches, tile.queries), heads, halves * images)](
        q, q.stride(), q_vanilla, q_vanilla.stride(), k, k.stride(), v, v.stride(),
        packed.k, packed.v, packed_region, packed.end, share.contiguous().view(torch.uint8),
        packed.end if query_region is None else query_region.contiguous(), out, out.stride(),
        weight, log2(torch.e) / head_size**0.5, halves, images, share.shape[1], heads, patches,
        OVERLAP=overlap, BLEND=q_blend is not None, REGIONS=query_region is not None, HEAD_SIZE=head_size, WIDTH=width,
        QUERIES=tile.queries, KEYS=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def let_next_launch_begin():
    """Once every program has come here. (Triton 3.4 has a function for it that does not compile.)"""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def wait_for_last_launch():
    """Until it has ended and what it wrote can be read."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def offset(strides, half, image, head):
    """Where a [G, N, H, P, d] tensor holds the rows of one head; 64 bit, as it may hold more than 2^31 values."""
    return half.to(tl.int64) * strides[0] + image.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def load_rows(ptr, stride, row, rows, ALL: tl.constexpr, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The given rows, zeros beyond `rows` and `HEAD_SIZE`: [R] -> [R, WIDTH]. ALL: every row is below `rows`."""
    column = tl.arange(0, WIDTH)
    address = ptr + row[:, None] * stride + column[None, :]
    if ALL and HEAD_SIZE == WIDTH:
        return tl.load(address)
    elif ALL:
        return tl.load(address, mask=(column < HEAD_SIZE)[None, :], other=0.0)
    else:
        return tl.load(address, mask=(row < rows)[:, None] & (column < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, row, rows, x, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """x [R, WIDTH] to the given rows, as far as they exist."""
    column = tl.arange(0, WIDTH)
    address = ptr + row[:, None] * stride + column[None, :]
    tl.store(address, x.to(ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < HEAD_SIZE)[None, :])


@triton.jit
def pack_kernel(
    k_ptr, k_strides, v_ptr, v_strides, mask_ptr, region_ptr,
    packed_k_ptr, packed_v_ptr, packed_region_ptr, end_ptr, anchors, heads, patches,
    OVERLAP: tl.constexpr, REGIONS: tl.constexpr, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MASK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program a block of rows, a head, a half and anchor. mask uint8 [A, P]."""
    if OVERLAP:
        let_next_launch_begin()
    block, head = tl.program_id(0), tl.program_id(1)
    half, anchor = tl.program_id(2) // anchors, tl.program_id(2) % anchors

    # Every program counts the kept rows before its own: a few kilobytes from cache, and no launch for a prefix sum.
    patch = tl.arange(0, MASK_SIZE)
    before = tl.load(mask_ptr + anchor * patches + patch, mask=patch < block * ROWS, other=0).to(tl.int32)
    row = block * ROWS + tl.arange(0, ROWS)
    for earlier in range(anchor):
        before += tl.load(mask_ptr + earlier * patches + patch, mask=patch < patches, other=0).to(tl.int32)
    kept = tl.load(mask_ptr + anchor * patches + row, mask=row < patches, other=0).to(tl.int32)
    end = tl.sum(before) + tl.cumsum(kept)
    if block == tl.num_programs(0) - 1 and half + head == 0:
        tl.store(end_ptr + anchor, tl.max(end))
    if REGIONS and half + head == 0:
        region = tl.load(region_ptr + anchor * patches + row, mask=kept != 0)
        tl.store(packed_region_ptr + end - kept, region, mask=kept != 0)

    column = tl.arange(0, WIDTH)
    copied = (kept != 0)[:, None] & (column < HEAD_SIZE)[None, :]
    first_row = (half * heads + head).to(tl.int64) * anchors * patches
    place = (first_row + end - kept)[:, None] * HEAD_SIZE + column[None, :]
    k = tl.load(
        k_ptr + offset(k_strides, half, anchor, head) + row[:, None] * k_strides[3] + column[None, :], mask=copied
    )
    v = tl.load(
        v_ptr + offset(v_strides, half, anchor, head) + row[:, None] * v_strides[3] + column[None, :], mask=copied
    )
    tl.store(packed_k_ptr + place, k, mask=copied)
    tl.store(packed_v_ptr + place, v, mask=copied)


@triton.jit
def fold(
    q, query_region, k, v, region_ptr, acc, norm, m, scale, left,
    WHOLE: tl.constexpr, REGIONS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys into the online softmax. Unless WHOLE, only its first `left` keys count.

    REGIONS: of these, only those that have a bit of their region in common with the query's.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not WHOLE:
        scores = tl.where((tl.arange(0, KEYS) < left)[None, :], scores, float("-inf"))
    if REGIONS:
        key = tl.arange(0, KEYS)
        key_region = tl.load(region_ptr + key, mask=key < left, other=0)
        scores = tl.where((query_region[:, None] & key_region[None, :]) != 0, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_m[:, None])
    decay = tl.exp2(m - new_m)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, norm * decay + tl.sum(p, 1), new_m


@triton.jit
def stream(
    q, query_region, acc, norm, m, k_ptr, k_stride, v_ptr, v_stride, region_ptr, length, scale,
    REGIONS: tl.constexpr, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Fold `length` keys into the online softmax: acc [Q, WIDTH], its normaliser [Q] and the running maximum m [Q].

    Whole blocks need no mask; what is left over comes last. A block that no query may read leaves everything as it
    is, since m is finite from the image's own keys.
    """
    key = tl.arange(0, KEYS)
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        k = load_rows(k_ptr, k_stride, start + key, length, True, HEAD_SIZE, WIDTH)
        v = load_rows(v_ptr, v_stride, start + key, length, True, HEAD_SIZE, WIDTH)
        acc, norm, m = fold(
            q, query_region, k, v, region_ptr + start, acc, norm, m, scale, KEYS, True, REGIONS, KEYS
        )  # fmt: skip
    if whole < length:
        k = load_rows(k_ptr, k_stride, whole + key, length, False, HEAD_SIZE, WIDTH)
        v = load_rows(v_ptr, v_stride, whole + key, length, False, HEAD_SIZE, WIDTH)
        acc, norm, m = fold(
            q, query_region, k, v, region_ptr + whole, acc, norm, m, scale, length - whole, False, REGIONS, KEYS
        )  # fmt: skip
    return acc, norm, m


@triton.jit
def attend_kernel(
    q_ptr, q_strides, vanilla_ptr, vanilla_strides, k_ptr, k_strides, v_ptr, v_strides,
    packed_k_ptr, packed_v_ptr, packed_region_ptr, end_ptr, share_ptr, region_ptr, out_ptr, out_strides,
    weight, scale, halves, images, anchors, heads, patches,
    OVERLAP: tl.constexpr, BLEND: tl.constexpr, REGIONS: tl.constexpr, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a block of queries, a head, a half and image. share uint8 [N, A]; scale = log2(e) / sqrt(d)."""
    block, head = tl.program_id(0), tl.program_id(1)
    # The last images first: anchors read fewer keys than the others, and short programs fill gaps at the end.
    half, image = tl.program_id(2) % halves, images - 1 - tl.program_id(2) // halves

    row = block * QUERIES + tl.arange(0, QUERIES)
    q = load_rows(q_ptr + offset(q_strides, half, image, head), q_strides[3], row, patches, False, HEAD_SIZE, WIDTH)
    out = out_ptr + offset(out_strides, half, image, head)
    if BLEND:
        vanilla_ptr += offset(vanilla_strides, half, image, head)
        q_vanilla = load_rows(vanilla_ptr, vanilla_strides[3], row, patches, False, HEAD_SIZE, WIDTH)
        q = ((1 - weight) * q + weight * q_vanilla).to(q.dtype)
        # Through memory, in the rows of the result that are this program's own: blended queries that come straight from
        # registers would stay there, and fewer programs fit on a multiprocessor.
        store_rows(out, out_strides[3], row, patches, q, HEAD_SIZE, WIDTH)
        tl.debug_barrier()
        q = load_rows(out, out_strides[3], row, patches, False, HEAD_SIZE, WIDTH)

    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    norm = tl.zeros([QUERIES], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    own_k = k_ptr + offset(k_strides, half, image, head)
    own_v = v_ptr + offset(v_strides, half, image, head)
    acc, norm, m = stream(
        q, row, acc, norm, m, own_k, k_strides[3], own_v, v_strides[3], region_ptr, patches, scale,
        False, HEAD_SIZE, WIDTH, KEYS,
    )  # fmt: skip

    # So far only what was there before `pack`, an ordinary launch that began when all before it had ended. Copies of
    # the arguments below may be younger.
    if OVERLAP:
        wait_for_last_launch()
    query_region = row
    if REGIONS:
        query_region = tl.load(region_ptr + image * patches + row, mask=row < patches, other=0)
    # Anchors that follow one another and are all read are one stretch of keys.
    packed_k_ptr += (half * heads + head).to(tl.int64) * anchors * patches * HEAD_SIZE
    packed_v_ptr += (half * heads + head).to(tl.int64) * anchors * patches * HEAD_SIZE
    begin = 0
    for anchor in range(anchors):
        end = tl.load(end_ptr + anchor)
        reads = tl.load(share_ptr + image * anchors + anchor) != 0
        goes_on = tl.load(share_ptr + image * anchors + anchor + 1, mask=anchor + 1 < anchors, other=0) != 0
        if not reads:
            begin = end
        if not goes_on:
            acc, norm, m = stream(
                q, query_region, acc, norm, m, packed_k_ptr + begin * HEAD_SIZE, HEAD_SIZE,
                packed_v_ptr + begin * HEAD_SIZE, HEAD_SIZE, packed_region_ptr + begin, end - begin, scale,
                REGIONS, HEAD_SIZE, WIDTH, KEYS,
            )  # fmt: skip

    store_rows(out, out_strides[3], row, patches, acc / norm[:, None], HEAD_SIZE, WIDTH)
