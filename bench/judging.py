"""What the measurements on `sprites` share: seeded sets of prompts, the oracle's scores, means with standard errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig, Story
from consistory.weights.sprites.oracle import Oracle, Reading
from consistory.weights.sprites.world import SETTINGS, SUBJECTS

IMAGES = 5
AGREEMENTS = ("main", "second", "pattern")  # what prompts leave open: both colours, and the pattern
Scores = dict[str, float]
Summary = dict[str, dict[str, float]]  # {score: {"mean": ..., "standard error": ...}}
Table = dict[str, dict[str, Scores]]  # {row: {number of a set: scores}}


def draw_set(number: int, images: int = IMAGES) -> tuple[str, list[str]]:
    """The subject and the settings of a set, the same in every run."""
    settings = np.random.default_rng(number).choice(len(SETTINGS), images, replace=False)
    return SUBJECTS[number % len(SUBJECTS)], [SETTINGS[i] for i in settings]


def tell(
    pipe: ConsiStory, number: int, steps: int, config: ConsistoryConfig, images: int = IMAGES, **options: Any
) -> Story:
    """A set's story, from seeds that count up from 1000 times its number."""
    subject, settings = draw_set(number, images)
    return pipe(
        subject=f"a {subject}", settings=settings, concepts=[subject], seed=1000 * number, steps=steps, config=config,
        **options,
    )  # fmt: skip


def judge(oracle: Oracle, images: Any, number: int) -> Scores:
    """Every score of a set's pictures, uint8 [N, 64, 64, 3]."""
    reading = oracle.read(images)
    return alignment(reading, number) | agreements(reading)


def alignment(reading: Reading, number: int) -> Scores:
    """Shares of the pictures that show the subject, and the setting, that the prompt asks for."""
    subject, settings = draw_set(number, len(reading.setting))
    wanted = torch.tensor([SETTINGS.index(setting) for setting in settings])
    return {
        "subject": share(reading.subject == SUBJECTS.index(subject)),
        "setting": share(reading.setting == wanted),
    }


def agreements(reading: Reading) -> Scores:
    """Shares of the pairs of pictures that agree in what the prompt leaves open; "all": in all three."""
    read = {name: getattr(reading, name).tolist() for name in AGREEMENTS}
    read["all"] = list(zip(*read.values(), strict=True))
    return {name: float(np.mean([a == b for a, b in combinations(values, 2)])) for name, values in read.items()}


def share(right: Tensor) -> float:
    return right.float().mean().item()


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard error of those that are known, that is, not NaN."""
    known = [value for value in values if not np.isnan(value)]
    error = float(np.std(known, ddof=1) / len(known) ** 0.5) if len(known) > 1 else float("nan")
    return {"mean": float(np.mean(known)), "standard error": error}


def summarise(sets: Sequence[Scores]) -> Summary:
    return {score: mean_and_error(scores[score] for scores in sets) for score in sets[0]}


def in_per_cent(value: Mapping[str, float], digits: int = 1) -> str:
    return f"{100 * value['mean']:.{digits}f} ± {100 * value['standard error']:.{digits}f}"


def as_line(name: str, summary: Summary) -> str:
    return f"{name:32} " + " | ".join(f"{score} {in_per_cent(value)}" for score, value in summary.items())


def judge_missing(
    table: Table, tasks: Sequence[tuple[str, int]], judge: Callable[[str, int], dict[str, Scores]],
    prepare: Callable[[], None], jobs: int, save: Callable[[Table], None],
) -> None:  # fmt: skip
    """Fill a table with the scores of rows and numbered sets, by `jobs` processes of one thread each.

    judge: from a row and a set to that row's scores, and those of rows that come with it.
    prepare: called once in every process.  save: called whenever a set is done.
    """
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare) as workers:
        futures = {workers.submit(judge, name, number): number for name, number in tasks}
        for future in tqdm(as_completed(futures), total=len(futures)):
            for name, scores in future.result().items():
                table.setdefault(name, {})[str(futures[future])] = scores
            save(table)


def read_table(path: Path, about: Mapping[str, Any]) -> Table:
    """What an earlier run under the same conditions has left."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    return before["scores"] if {key: before["about"].get(key) for key in about} == about else {}


