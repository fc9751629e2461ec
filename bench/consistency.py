"""Does the method keep a subject? Seeded stories on `sprites`, with and without it, judged by the oracle.

    python bench/consistency.py                 # 40 sets of 5 settings -> bench/results/consistency.json
    python bench/consistency.py --sets 4        # a quick look
    python bench/consistency.py --jobs 2        # a process a core

For every set: one subject, five settings, one seed per picture. "subject" and "setting" are the shares of pictures that
show what the prompt asks for; "main", "second" (colours) and "pattern" are the shares of picture pairs of a set that
agree in what the prompt leaves open, "all" the share that agrees in all three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from judging import IMAGES, Scores, as_line, judge, summarise, tell
from measure import machine, write
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig
from consistory.weights.sprites.oracle import Oracle

pipe: ConsiStory
oracle: Oracle
CONFIGS: dict[str, Callable[[], ConsistoryConfig]] = {
    "vanilla": ConsistoryConfig.vanilla,
    "consistory": ConsistoryConfig,
    "no injection": lambda: replace(ConsistoryConfig(), injection=False),
    "no sdsa": lambda: replace(ConsistoryConfig(), sdsa=False),
    "reference": ConsistoryConfig.reference,
    "paper": ConsistoryConfig.paper,
}


def prepare(model: str, device: str, dtype: str, jobs: int) -> None:
    """What every process holds. Several of them share the cores."""
    global pipe, oracle
    if jobs > 1:
        torch.set_num_threads(1)
    pipe = ConsiStory.from_pretrained(model, device=device, dtype=getattr(torch, dtype))
    oracle = Oracle.load()


def judge_numbered(name: str, steps: int, number: int) -> Scores:
    return judge(oracle, tell(pipe, number, steps, CONFIGS[name]()).images, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the sets out among them")
    parser.add_argument("--configs", nargs="+", default=["vanilla", "consistory"], choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "consistency.json")
    args = parser.parse_args()

    workers = ProcessPoolExecutor(
        args.jobs, get_context("spawn"), prepare, (args.model, args.device, args.dtype, args.jobs)
    )
    about = {
        "sets": args.sets, "images per set": IMAGES, "steps": args.steps, "model": args.model, "jobs": args.jobs,
        "dtype": args.dtype, **machine(args.device),
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name in args.configs:
        start = time.perf_counter()
        judged = workers.map(partial(judge_numbered, name, args.steps), range(args.sets))
        rows[name] = summarise(list(tqdm(judged, desc=name, total=args.sets, leave=False)))
        print(as_line(name, rows[name]), flush=True)
        rows[name] |= {"seconds per set": (time.perf_counter() - start) / args.sets}
        write(args.out, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
