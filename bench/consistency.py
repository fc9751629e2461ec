"""Does the method keep a subject? Seeded stories on `sprites`, with and without it, judged by the oracle.

    python bench/consistency.py                 # 40 sets of 5 settings -> bench/results/consistency.json
    python bench/consistency.py --sets 4        # a quick look
    python bench/consistency.py --jobs 2 --dtype bfloat16   # a process a core: the least time where bfloat16 is fast

For every set: one subject, five settings, one seed per picture. "subject" and "setting" are the shares of pictures that
show what the prompt asks for; "main", "second" (colours) and "pattern" are the shares of picture pairs of a set that
agree in what the prompt leaves open.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SETTINGS, SUBJECTS
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig

IMAGES = 5
pipe: ConsiStory
oracle: Oracle
ATTRIBUTES = ("main", "second", "pattern")
CONFIGS: dict[str, Callable[[], ConsistoryConfig]] = {
    "vanilla": ConsistoryConfig.vanilla,
    "consistory": ConsistoryConfig,
    "no injection": lambda: replace(ConsistoryConfig(), injection=False),
    "no sdsa": lambda: replace(ConsistoryConfig(), sdsa=False),
    "reference": ConsistoryConfig.reference,
    "paper": ConsistoryConfig.paper,
}


def draw_set(number: int) -> tuple[str, list[str]]:
    """The subject and the settings of a set, the same in every run."""
    rng = np.random.default_rng(number)
    settings = rng.choice(len(SETTINGS), IMAGES, replace=False)
    return SUBJECTS[number % len(SUBJECTS)], [SETTINGS[i] for i in settings]


def prepare(model: str, device: str, dtype: str, jobs: int) -> None:
    """What every process holds. Several of them share the cores."""
    global pipe, oracle
    if jobs > 1:
        torch.set_num_threads(1)
    pipe = ConsiStory.from_pretrained(model, device=device, dtype=getattr(torch, dtype))
    oracle = Oracle.load()


def judge(name: str, steps: int, number: int) -> dict[str, float]:
    """Scores of one set: accuracies over pictures and agreements over pairs of pictures."""
    subject, settings = draw_set(number)
    story = pipe(
        subject=f"a {subject}", settings=settings, concepts=[subject], seed=1000 * number, steps=steps,
        config=CONFIGS[name](),
    )  # fmt: skip
    reading = oracle.read(story.images)
    wanted = torch.tensor([SETTINGS.index(setting) for setting in settings])
    scores = {
        "subject": (reading.subject == SUBJECTS.index(subject)).float().mean().item(),
        "setting": (reading.setting == wanted).float().mean().item(),
    }
    for name in ATTRIBUTES:
        values = getattr(reading, name).tolist()
        scores[name] = float(np.mean([a == b for a, b in combinations(values, 2)]))
    triples = list(zip(*(getattr(reading, name).tolist() for name in ATTRIBUTES), strict=True))
    scores["all three"] = float(np.mean([a == b for a, b in combinations(triples, 2)]))
    return scores


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
        "torch": torch.__version__, "machine": platform.machine(), "device": args.device, "dtype": args.dtype,
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name in args.configs:
        start = time.perf_counter()
        judged = workers.map(partial(judge, name, args.steps), range(args.sets))
        scores = list(tqdm(judged, desc=name, total=args.sets, leave=False))
        rows[name] = {
            score: {
                "mean": float(np.mean([s[score] for s in scores])),
                "standard error": float(np.std([s[score] for s in scores], ddof=1) / len(scores) ** 0.5),
            }
            for score in scores[0]
        } | {"seconds per set": (time.perf_counter() - start) / args.sets}
        cells = [f"{score} {100 * value['mean']:.1f} ± {100 * value['standard error']:.1f}"
                 for score, value in rows[name].items() if isinstance(value, dict)]  # fmt: skip
        print(f"{name:14}", " | ".join(cells), f"| {rows[name]['seconds per set']:.1f} s a set", flush=True)
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")

if __name__ == "__main__":
    main()
