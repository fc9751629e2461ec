"""What loading an SDXL checkpoint costs: seconds and peak memory, from a single file of full size in float16.

    python bench/loading.py                          # in float16: weights stay mapped from the file
    python bench/loading.py --dtype bfloat16         # converted, so every weight takes memory of its own

Writes 7 GB of random weights under the original names into a temporary folder, loads them in fresh processes, and
removes them. The operating system counts mapped pages of the file as resident but can drop them at any time: so memory
is given in total and without them ("anonymous"), which is what a process really occupies. The file has just been
written, so the seconds are those of a file that is still in the page cache, as far as memory allows. CPU seconds tell
more where the machine is busy with other things.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import patch

import torch
from measure import machine, write

from consistory import ConsiStory
from consistory.weights import loading

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from single_file import build, to_original

BLOCK = 1 << 24  # values
SECONDS_BETWEEN_SAMPLES = 0.01


def write_checkpoint(path: Path) -> int:
    """Random float16 weights of SDXL base, written as they are drawn. Returns the file's bytes."""
    configs = loading.sdxl_configs()
    shapes = {}
    for part in loading.COMPONENTS:
        with torch.device("meta"):
            state = build(part, configs[part]).state_dict()
        shapes |= {key: list(tensor.shape) for key, tensor in to_original(part, configs[part], state).items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    names = json.dumps(header).encode()
    names += b" " * (-len(names) % 8)
    block = (0.02 * torch.randn(BLOCK)).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(names).to_bytes(8, "little") + names)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return path.stat().st_size


class Memory(threading.Thread):
    """Watches this process: the peaks of its resident memory, in bytes, in all and without pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.total = self.anonymous = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_SAMPLES):
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            kilobytes = {line[0]: int(line[1]) for line in lines if line[0].startswith(("VmRSS", "RssAnon"))}
            self.total = max(self.total, 1024 * kilobytes["VmRSS:"])
            self.anonymous = max(self.anonymous, 1024 * kilobytes["RssAnon:"])


def load(path: Path, dtype: str, check: bool) -> dict[str, float]:
    """In this process. check: whether values are looked at, for being finite."""
    memory = Memory()
    memory.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    with patch.object(loading, "is_finite", loading.is_finite if check else lambda x: True):
        pipe = ConsiStory.from_single_file(path, dtype=getattr(torch, dtype))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory.done.set()
    memory.join()
    assert pipe.dtype == getattr(torch, dtype)
    maximum = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 2), "CPU seconds": round(cpu_seconds, 2),
        "peak resident, bytes": max(maximum, memory.total), "peak resident and anonymous, bytes": memory.anonymous,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the fresh processes do
    parser.add_argument("--unchecked", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, args.dtype, not args.unchecked)))
        return

    rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "sdxl.safetensors"
        size = write_checkpoint(path)
        command = [sys.executable, __file__, "--dtype", args.dtype, "--load", str(path)]
        for name, more in {args.dtype: [], f"{args.dtype}, values unchecked": ["--unchecked"]}.items():
            done = subprocess.run([*command, *more], check=True, capture_output=True, text=True)
            row = json.loads(done.stdout)
            rows[name] = {**row, "peak resident over file": round(row["peak resident, bytes"] / size, 3)}
            print(name, rows[name], flush=True)
        about = machine("cpu") | {"load average": str(os.getloadavg()[0]), "file, bytes": size}
        write(args.out, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
