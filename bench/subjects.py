"""Two subjects in every picture: does each stay the same, and does one take on the other's looks? On `sprites`.

    python bench/subjects.py                 # 10 sets of 4 settings -> bench/results/subjects.json
    python bench/subjects.py --sets 2        # a quick look

For every set: two subjects ("a cat and a robot"), four settings, one seed per picture. The model draws two subjects
side by side, so the halves of a picture are given to the oracle one at a time; the kinds that it finds likelier tell
which half is which subject. Shares of pictures, or of pairs of pictures of a set:

kinds, setting        pictures whose two halves show the two kinds asked for, in either order; that show the setting
main, second, pattern agreement of pairs of pictures, each subject with itself
crossed               pairs of pictures where one subject has the other's main colour of the other picture
alike                 pictures whose two subjects have one main colour
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from consistory.weights.sprites.loop import generator_for
from consistory.weights.sprites.oracle import Oracle, Reading
from consistory.weights.sprites.world import SETTINGS, SUBJECTS, render, sample_scenes
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig, story

IMAGES = 4
ATTRIBUTES = ("main", "second", "pattern")
SEPARATE = ConsistoryConfig(separate_subjects=True)


def background_reads_nothing() -> AbstractContextManager[object]:
    """What `region_bits` might also do: patches of no concept read no anchor, instead of all that is shared."""
    region_bits = story.region_bits
    return patch.object(story, "region_bits", lambda regions: region_bits(regions) * regions.any(dim=1))


CONFIGS: dict[str, tuple[ConsistoryConfig, Callable[[], AbstractContextManager[object]]]] = {
    "vanilla": (ConsistoryConfig.vanilla(), nullcontext),
    "union": (ConsistoryConfig(), nullcontext),
    "separate": (SEPARATE, nullcontext),
    "separate, background reads nothing": (SEPARATE, background_reads_nothing),
    "separate, no injection": (replace(SEPARATE, injection=False), nullcontext),
    "union, no injection": (ConsistoryConfig(injection=False), nullcontext),
}


def draw_set(number: int) -> tuple[list[str], list[str]]:
    """Two subjects and the settings of a set, the same in every run."""
    rng = np.random.default_rng(number)
    subjects = rng.choice(len(SUBJECTS), 2, replace=False)
    settings = rng.choice(len(SETTINGS), IMAGES, replace=False)
    return [SUBJECTS[i] for i in subjects], [SETTINGS[i] for i in settings]


def read_halves(oracle: Oracle, images: Tensor | NDArray[np.uint8]) -> list[Reading]:
    """Left and right half of images uint8 [N, 64, 64, 3], each in the middle of a picture that goes on as its edge."""
    halves = torch.as_tensor(images).permute(0, 3, 1, 2).float().chunk(2, dim=-1)
    return [oracle.read(F.pad(half, (16, 16, 0, 0), mode="replicate").permute(0, 2, 3, 1)) for half in halves]


def swapped(halves: list[Reading], subjects: Tensor) -> Tensor:
    """bool [N]: is the first of the subjects, indices [2] or [2, N], rather on the right?"""
    rows = torch.arange(len(halves[0].subject))
    left, right = (half.probabilities["subject"].log() for half in halves)
    return left[rows, subjects[1]] + right[rows, subjects[0]] > left[rows, subjects[0]] + right[rows, subjects[1]]


def reading_accuracy(oracle: Oracle, scenes: int = 500) -> dict[str, float]:
    """How well `read_halves` and `swapped` read rendered pictures of two subjects."""
    truth = sample_scenes(scenes, generator_for(0, 99), second_subject=1.0)
    images, _ = render(truth)
    halves = read_halves(oracle, (images * 255).round().byte().permute(0, 2, 3, 1))
    right = swapped(halves, torch.stack([truth.subject, truth.subject2]))
    scores = {"side": (right == (truth.x > 32)).float().mean().item()}
    for name in ("subject", *ATTRIBUTES):
        first = torch.where(right, getattr(halves[1], name), getattr(halves[0], name))
        scores[name] = (first == getattr(truth, name)).float().mean().item()
    return scores


def judge(pipe: ConsiStory, oracle: Oracle, name: str, steps: int, number: int) -> dict[str, float]:
    subjects, settings = draw_set(number)
    config, changed = CONFIGS[name]
    with changed():
        images = pipe(
            subject=" and ".join(f"a {subject}" for subject in subjects), settings=settings, concepts=subjects,
            seed=1000 * number, steps=steps, config=config,
        ).images  # fmt: skip
    kinds = torch.tensor([SUBJECTS.index(subject) for subject in subjects])
    halves = read_halves(oracle, images)
    right = swapped(halves, kinds)

    def each(attribute: str) -> list[list[int]]:
        """[2, N]: an attribute of the first subject, and of the second."""
        left_half, right_half = (getattr(half, attribute) for half in halves)
        first, second = torch.where(right, right_half, left_half), torch.where(right, left_half, right_half)
        return [first.tolist(), second.tolist()]

    def agreement(values: list[list[int]]) -> float:
        return float(np.mean([one[i] == one[j] for one in values for i, j in combinations(range(IMAGES), 2)]))

    found, main = each("subject"), each("main")
    wanted = torch.tensor([SETTINGS.index(setting) for setting in settings])
    return {
        "kinds": float(np.mean([pair == tuple(kinds.tolist()) for pair in zip(*found, strict=True)])),
        "setting": (oracle.read(images).setting == wanted).float().mean().item(),
        **{attribute: agreement(each(attribute)) for attribute in ATTRIBUTES},
        "crossed": float(np.mean([main[0][i] == main[1][j] for i, j in permutations(range(IMAGES), 2)])),
        "alike": float(np.mean([one == other for one, other in zip(*main, strict=True)])),
    }


def summary(scores: list[float]) -> dict[str, float]:
    spread = np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return {"mean": float(np.mean(scores)), "standard error": float(spread)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS)[:4], choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subjects.json")
    args = parser.parse_args()

    pipe = ConsiStory.from_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    oracle = Oracle.load()
    about = {
        "images per set": IMAGES, "steps": args.steps, "model": args.model, "torch": torch.__version__,
        "machine": platform.machine(), "device": args.device, "dtype": args.dtype,
        "reading of rendered pictures": reading_accuracy(oracle),
    }  # fmt: skip
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in args.configs}
    for number in tqdm(range(args.sets), desc="sets"):
        for name in args.configs:
            scores[name].append(judge(pipe, oracle, name, args.steps, number))
        rows = {
            name: {score: summary([each[score] for each in sets]) for score in sets[0]} for name, sets in scores.items()
        }
        result = {"about": about | {"sets": number + 1}, "rows": rows}
        if {"union", "separate"} <= scores.keys():
            pairs = list(zip(scores["separate"], scores["union"], strict=True))
            result["separate - union"] = {name: summary([a[name] - b[name] for a, b in pairs]) for name in pairs[0][0]}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in [*rows.items(), ("separate - union", result.get("separate - union", {}))]:
        cells = (f"{score} {100 * x['mean']:.1f} ± {100 * x['standard error']:.1f}" for score, x in row.items())
        print(f"{name:34}", " | ".join(cells))


if __name__ == "__main__":
    main()
