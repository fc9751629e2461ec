"""Every table and plot of the README, from seeds, on a CPU.

    python bench/tables.py            # -> runs/tables/, in under 90 minutes on two cores with AVX-512
    python bench/tables.py --quick    # the same in small, -> runs/tables/quick/, in three to five

Nothing is taken from bench/results/, which holds what these were when last committed. One measurement after another;
those that take long share their work out over `--jobs` processes. What was interrupted goes on where it was (ablation,
compare, photos) or starts again. How long each took is kept in tables.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from measure import machine, write

BENCH = Path(__file__).parent
# What to run, what else in earnest, what else in small.
MEASUREMENTS = {
    "teaser": ("", "--steps 2"),
    "story": ("", ""),
    "memory": ("", "--images 3 --options plain --check 64"),
    "ablation": ("--jobs {jobs}", "--jobs {jobs} --quick"),
    "compare": ("--jobs {jobs}", "--jobs {jobs} --quick"),
    "photos": ("--jobs {jobs} --steps 20", "--jobs {jobs} --steps 2 --subjects 2"),
}
SUFFIXES = {"teaser": ".png"}
FOLDERS = ("ablation", "compare")  # take a folder and name their files themselves; --quick, they make a folder in it


def command(name: str, quick: bool, jobs: int, results: Path) -> list[str]:
    options = MEASUREMENTS[name][quick].format(jobs=jobs).split()
    folder = results / "quick" if quick else results
    out = results if name in FOLDERS else folder / f"{name}{SUFFIXES.get(name, '.json')}"
    return [sys.executable, str(BENCH / f"{name}.py"), *options, "--out", str(out)]


def run(line: list[str]) -> dict[str, float]:
    """Minutes it took, and minutes of processors. Raises CalledProcessError if it failed."""
    # Memory is kept, in large pages, rather than given back and asked for again at every layer.
    malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    start, before = time.perf_counter(), processor_seconds()
    subprocess.run(line, check=True, env=os.environ | malloc)
    return {
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "processor minutes": round((processor_seconds() - before) / 60, 2),
    }


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    args = parser.parse_args()
    if find_spec("matplotlib") is None:  # better said now than by the plot after an hour
        parser.error('the plots need matplotlib: pip install -e ".[bench]"')
    folder = args.out / "quick" if args.quick else args.out
    folder.mkdir(parents=True, exist_ok=True)
    took = {}
    for name in args.only:
        print(f"=== {name}", flush=True)
        took[name] = run(command(name, args.quick, args.jobs, args.out))
        write(folder / "tables.json", {"about": machine("cpu") | {"jobs": args.jobs}, "took": took})
    print(f"=== {sum(times['minutes'] for times in took.values()):.0f} minutes; results are in {folder}")


if __name__ == "__main__":
    main()
