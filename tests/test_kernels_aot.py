"""What Triton's compiler makes of the kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

AOT = Path(__file__).parent.parent / "bench" / "aot.py"
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}


@pytest.fixture(scope="module", params=MATRIX_INSTRUCTION, ids=lambda arch: f"sm_{arch}")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The resources of every kernel, from a process of its own: here Triton may interpret instead of compiling."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    command = [sys.executable, str(AOT), "--json", "--arch", str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_register_is_spilled(compiled: list[dict[str, Any]]) -> None:
    assert {each["name"]: (each["spills"], each["stack"]) for each in compiled if each["spills"] or each["stack"]} == {}


def test_half_precision_uses_the_matrix_unit(compiled: list[dict[str, Any]]) -> None:
    multiplies = [each for each in compiled if each["name"].startswith(("attend", "match ", "cross"))]
    halves = [each for each in multiplies if "fp32" not in each["name"]]
    assert len(halves) >= 8
    assert all(each["instructions"].get(MATRIX_INSTRUCTION[each["arch"]]) for each in halves)


def test_launches_overlap_on_hopper(compiled: list[dict[str, Any]]) -> None:
    """`pack` lets `attend` begin, and `attend` waits for it before it reads what was packed."""
    for each in compiled:
        begins, waits = (each["instructions"].get(op, 0) for op in ("PREEXIT", "ACQBULK"))
        hopper = each["arch"] == 90
        assert begins == (hopper and each["name"].startswith("pack")), each["name"]
        assert waits == (hopper and each["name"].startswith("attend")), each["name"]


def test_four_programs_of_sdxl_attention_fit_on_a_hopper_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    """65536 registers and 227 KiB of shared memory each: some multiply while others take exponentials."""
    for each in compiled:
        if each["name"].startswith("attend d=64 fp16") and each["arch"] == 90:
            assert 4 * each["warps"] * 32 * each["registers"] <= 65536
            assert 4 * each["shared"] <= 227 * 1024
