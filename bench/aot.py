"""Compile the Triton kernels for a GPU that need not be there, and print what the compiler made of them.

    python bench/aot.py              # a table for sm_80 and sm_90
    python bench/aot.py --json       # the same, to be read by a program

HGMMA (Hopper) and HMMA (Ampere) are the matrix instructions: no HGMMA on sm_90 means the slow path. Spills are
registers moved to memory and back: a block too large for its warps.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from consistory.kernels.correspondence import fused as correspondence
from consistory.kernels.cross_attention import fused as cross_attention
from consistory.kernels.extended_attention import fused as extended_attention
from consistory.kernels.injection import fused as injection

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Instructions: products of matrices, exponentials, copies to shared memory, and the two of overlapping launches, "the
# next may begin" and "wait for the last".
COUNTED = ("HGMMA", "HMMA", "MUFU", "FFMA", "LDGSTS", "PREEXIT", "ACQBULK")
STRIDES = ("i32",) * 4 + ("constexpr",)  # of a [G, N, H, P, d] tensor: the last is 1


@dataclass(frozen=True)
class Specimen:
    """A kernel with the arguments it would be called with: run-time types by name, constants, and launch options."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers a thread, stack in bytes a thread, spilling instructions, shared bytes."""

    name: str
    arch: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]


def attention(
    arch: int, head_size: int, dtype: torch.dtype, patches: int, blend: bool = False, regions: bool = False
) -> Specimen:
    width, pointer = triton.next_power_of_2(head_size), f"*{TYPES[dtype]}"
    tile = extended_attention.tile_for(dtype, head_size, arch == 90)
    tensors = {
        f"{x}_{part}": t
        for x in ("q", "vanilla", "k", "v", "out")
        for part, t in (("ptr", pointer), ("strides", STRIDES))
    }
    option = blend * " blend" + regions * " regions"
    return Specimen(
        name=f"attend d={head_size} {TYPES[dtype]} P={patches} {tuple(tile[:4])}{option}",
        kernel=extended_attention.attend_kernel,
        types=tensors
        | {"packed_k_ptr": pointer, "packed_v_ptr": pointer, "end_ptr": "*i32", "share_ptr": "*u8"}
        | {"packed_region_ptr": "*i32", "region_ptr": "*i32"}
        | {"weight": "fp32", "scale": "fp32"}
        | dict.fromkeys(("halves", "images", "anchors", "heads", "patches"), "i32"),
        constants={
            "BLEND": blend,
            "REGIONS": regions,
            "HEAD_SIZE": head_size,
            "WIDTH": width,
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
        },
        warps=tile.warps,
        stages=tile.stages,
        registers=tile.registers,
    )


def pack(head_size: int, dtype: torch.dtype, patches: int, regions: bool = False) -> Specimen:
    pointer = f"*{TYPES[dtype]}"
    return Specimen(
        name=f"pack d={head_size} {TYPES[dtype]} P={patches}" + regions * " regions",
        kernel=extended_attention.pack_kernel,
        types={"k_ptr": pointer, "k_strides": STRIDES, "v_ptr": pointer, "v_strides": STRIDES, "mask_ptr": "*u8"}
        | {
            "packed_k_ptr": pointer,
            "packed_v_ptr": pointer,
            "region_ptr": "*i32",
            "packed_region_ptr": "*i32",
            "end_ptr": "*i32",
            "anchors": "i32",
            "heads": "i32",
            "patches": "i32",
        },
        constants={
            "REGIONS": regions,
            "HEAD_SIZE": head_size,
            "WIDTH": triton.next_power_of_2(head_size),
            "ROWS": extended_attention.pack_rows(triton.next_power_of_2(head_size), dtype),
            "MASK_SIZE": patches,
        },
        warps=8,
    )


def match(dtype: torch.dtype) -> Specimen:
    rows, keys, columns = correspondence.blocks_for(dtype)
    return Specimen(
        name=f"match {TYPES[dtype]} ({rows}, {keys}, {columns})",
        kernel=correspondence.match_kernel,
        types={"target_ptr": f"*{TYPES[dtype]}", "packed_ptr": f"*{TYPES[dtype]}", "packed_index_ptr": "*i32"}
        | {"target_norm_ptr": "*fp32", "source_norm_ptr": "*fp32", "length_ptr": "*i32", "index_ptr": "*i64"}
        | {"distance_ptr": "*fp32", "rows": "i32", "patches": "i32", "channels": "i32"},
        constants={"ROWS": rows, "KEYS": keys, "COLUMNS": columns, "EVEN": True},
        warps=8,
        stages=4,
    )


def match_norm(dtype: torch.dtype) -> Specimen:
    return Specimen(
        name=f"match, norms {TYPES[dtype]}",
        kernel=correspondence.norm_kernel,
        types={"x_ptr": f"*{TYPES[dtype]}", "norm_ptr": "*fp32", "rows": "i32", "channels": "i32"},
        constants={"ROWS": correspondence.PACK_ROWS, "COLUMNS": 64},
    )


def match_pack(dtype: torch.dtype, patches: int) -> Specimen:
    pointer = f"*{TYPES[dtype]}"
    return Specimen(
        name=f"match, pack {TYPES[dtype]} P={patches}",
        kernel=correspondence.pack_kernel,
        types={"source_ptr": pointer, "mask_ptr": "*u8", "packed_ptr": pointer, "index_ptr": "*i32"}
        | {"norm_ptr": "*fp32", "length_ptr": "*i32", "patches": "i32", "channels": "i32"},
        constants={"ROWS": correspondence.PACK_ROWS, "COLUMNS": 64, "MASK_SIZE": patches},
    )


def cross(head_size: int, dtype: torch.dtype) -> Specimen:
    strides = STRIDES[1:]
    tensors = {f"{x}_ptr": f"*{TYPES[dtype]}" for x in "qkv"} | {"out_ptr": f"*{TYPES[dtype]}"}
    return Specimen(
        name=f"cross-attention d={head_size} {TYPES[dtype]}",
        kernel=cross_attention.cross_attention_kernel,
        types=tensors
        | {f"{x}_strides": strides for x in ("q", "k", "v", "out")}
        | {"weights_ptr": f"*{TYPES[dtype]}", "maps_ptr": "*fp32", "scale": "fp32"}
        | {"heads": "i32", "patches": "i32", "tokens": "i32", "concepts": "i32"},
        constants={
            "HEAD_SIZE": head_size,
            "WIDTH": triton.next_power_of_2(head_size),
            "PATCHES": cross_attention.PATCHES,
            "TOKENS": 128,
            "CONCEPTS": 16,
        },
        stages=2,
    )


def inject(dtype: torch.dtype) -> Specimen:
    pointer = f"*{TYPES[dtype]}"
    return Specimen(
        name=f"inject {TYPES[dtype]}",
        kernel=injection.inject_kernel,
        types={"x_ptr": pointer, "anchor_ptr": pointer, "out_ptr": pointer, "source_index_ptr": "*i64"}
        | {
            "source_image_ptr": "*i64",
            "mask_ptr": "*u8",
            "alpha": "fp32",
            "patches": "i32",
            "channels": "i32",
        },
        constants={"LINKS": 3, "RECORDED": False, "PATCHES": injection.PATCHES, "CHANNELS": injection.CHANNELS},
    )


def specimens(arch: int) -> list[Specimen]:
    """Everything SDXL launches in 16 bit, other head sizes, and what float32 takes."""
    half = torch.float16
    return [
        attention(arch, 64, half, 4096),
        attention(arch, 64, half, 4096, blend=True),
        attention(arch, 64, half, 4096, regions=True),
        attention(arch, 64, torch.bfloat16, 4096),
        attention(arch, 40, half, 4096),
        attention(arch, 128, half, 4096),
        attention(arch, 64, torch.float32, 4096),
        pack(64, half, 4096),
        pack(64, half, 4096, regions=True),
        match(half),
        match(torch.bfloat16),
        match_norm(half),
        match_pack(half, 4096),
        cross(64, half),
        inject(half),
    ]


def compile_for(arch: int, specimen: Specimen) -> Resources:
    """Compile for compute capability `arch` (90 for H100 and H200, 80 for A100) and read the assembler's report."""
    overlap = arch == 90 and "OVERLAP" in specimen.kernel.arg_names
    built = triton.compile(
        _source(specimen, overlap),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": specimen.warps,
            "num_stages": specimen.stages,
            "maxnreg": specimen.registers,
            "launch_pdl": overlap,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        code, usage = _cuobjdump("--dump-sass", cubin), _cuobjdump("--dump-resource-usage", cubin)
    mix = Counter(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code))
    return Resources(
        name=specimen.name,
        arch=arch,
        warps=specimen.warps,
        registers=int(_group(r"REG:(\d+)", usage)),
        stack=int(_group(r"STACK:(\d+)", usage)),
        spills=mix["STL"] + mix["LDL"],
        shared=built.metadata.shared,
        instructions={op: mix[op] for op in COUNTED if mix[op]},
    )


def _source(specimen: Specimen, overlap: bool) -> ASTSource:
    """The kernel as its launcher would specialise it: pointers and strides divisible by 16, the last stride 1."""
    names, given = specimen.kernel.arg_names, specimen.constants | {"OVERLAP": overlap}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        if name in given:
            signature[name], constants[(i,)] = "constexpr", given[name]
            continue
        signature[name] = specimen.types[name]
        if isinstance(signature[name], tuple):
            last = len(signature[name]) - 1
            constants[(i, last)] = 1
            divisible += [(i, axis) for axis in range(last)]
        elif signature[name].startswith("*") or name in ("patches", "channels"):
            divisible.append((i,))
    attributes = {path: [["tt.divisibility", 16]] for path in divisible}
    return ASTSource(specimen.kernel, signature, constants, attributes)


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True).stdout


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"the assembler did not report {pattern}"
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--only", default="", help="compile kernels whose name holds this")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    arguments = parser.parse_args()
    found = [
        compile_for(arch, specimen)
        for arch in arguments.arch
        for specimen in specimens(arch)
        if arguments.only in specimen.name
    ]
    if arguments.json:
        print(json.dumps([asdict(each) for each in found]))
        return
    for each in found:
        mix = " ".join(f"{op}:{n}" for op, n in each.instructions.items())
        print(
            f"sm_{each.arch} {each.name:40} {each.registers:3} registers, {each.spills} spills, "
            f"{each.stack} B stack, {each.shared // 1024} KiB shared, {mix}"
        )


if __name__ == "__main__":
    main()
