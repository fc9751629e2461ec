"""What several programs share: the machine's name, contenders timed in turns, and results in files."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from consistory.files import write_atomically

Call = Callable[[], Any]


def machine(device: str) -> dict[str, str]:
    """Hardware and versions, as they belong to every published figure."""
    facts = {"hardware": _cpu_name(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    if device.startswith("cuda"):
        facts |= {"hardware": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "xformers", "flash-attn"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def write(path: Path, content: Any) -> None:
    """As JSON, whole or not at all, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def median_seconds(calls: dict[str, Call], rounds: int, device: str) -> dict[str, float]:
    """Median time of every call. They take turns, so that a slow spell of the machine hits all of them alike."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_cuda_seconds(call) if device == "cuda" else _cpu_seconds(call))
    return {name: median(times) for name, times in taken.items()}


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Call, repeats: int = 5) -> float:
    """Time on the GPU: it is kept busy until the launches are queued, so that a slow host does not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def peak_bytes(call: Call, device: str) -> int | None:
    """Memory a call takes beyond what was there before, its result included; unknown on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
