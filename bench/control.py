"""Does a ControlNet steer the layout, and does the subject stay the same? Stories on `sprites`, judged by the oracle.

    python bench/control.py                 # 8 sets of 4 settings, 20 steps -> bench/results/control.json

For every set: one subject, four settings, and for each picture the silhouette of that subject from a scene of its own,
drawn from seeds that no training has used. "silhouette" is the intersection over union of the subject's pixels, as the
oracle finds them, with the silhouette asked for (without control: with the one that was not asked for); the others are
as in bench/consistency.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SETTINGS, SUBJECTS, render, sample_scenes
from measure import machine
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig, Control, ControlNet

IMAGES = 4
HELD_OUT = 2**40  # training seeds its generators with smaller numbers
RUNS = {
    "vanilla": (ConsistoryConfig.vanilla(), False),
    "vanilla, control": (ConsistoryConfig.vanilla(), True),
    "consistory": (ConsistoryConfig(), False),
    "consistory, dropout 0.7": (ConsistoryConfig.control(), False),
    "consistory, control": (ConsistoryConfig.control(), True),
}


def draw_set(number: int) -> tuple[str, list[str], Tensor]:
    """The subject, the settings and the silhouettes bool [IMAGES, 64, 64] of a set, the same in every run."""
    rng = np.random.default_rng(number)
    subject = number % len(SUBJECTS)
    settings = [SETTINGS[i] for i in rng.choice(len(SETTINGS), IMAGES, replace=False)]
    scenes = sample_scenes(IMAGES, torch.Generator().manual_seed(HELD_OUT + number), second_subject=0.0)
    _, silhouettes = render(replace(scenes, subject=torch.full((IMAGES,), subject)))
    return SUBJECTS[subject], settings, silhouettes


def judge(
    pipe: ConsiStory, net: ControlNet, oracle: Oracle, config: ConsistoryConfig, controlled: bool, weight: float,
    steps: int, number: int,
) -> dict[str, float]:  # fmt: skip
    """Scores of one set: means over its pictures, and agreements over pairs of pictures."""
    subject, settings, silhouettes = draw_set(number)
    pictures = (255 * silhouettes.to(torch.uint8))[..., None].expand(-1, -1, -1, 3).numpy()
    story = pipe(
        subject=f"a {subject}", settings=settings, concepts=[subject], seed=1000 * number, steps=steps, config=config,
        controls=[Control(net, pictures, weight)] if controlled else [],
    )  # fmt: skip
    reading = oracle.read(story.images)
    overlap = (reading.mask & silhouettes).sum(dim=(1, 2)) / (reading.mask | silhouettes).sum(dim=(1, 2))
    wanted = torch.tensor([SETTINGS.index(setting) for setting in settings])
    agreements = {
        name: float(np.mean([a == b for a, b in combinations(getattr(reading, name).tolist(), 2)]))
        for name in ("main", "second", "pattern")
    }
    return {
        "silhouette": overlap.mean().item(),
        "subject": (reading.subject == SUBJECTS.index(subject)).float().mean().item(),
        "setting": (reading.setting == wanted).float().mean().item(),
    } | agreements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--net", default="sprites", help="a ControlNet for the embedded model")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "control.json")
    args = parser.parse_args()
    pipe, oracle = ConsiStory.from_pretrained("sprites", device=args.device), Oracle.load()
    net = ControlNet.load(args.net, device=args.device)
    about = machine(args.device) | {
        "sets": args.sets, "images per set": IMAGES, "steps": args.steps, "net": args.net, "weight": args.weight,
    }  # fmt: skip
    rows: dict[str, Any] = {}
    for name in args.runs:
        sets = tqdm(range(args.sets), desc=name, leave=False)
        scores = [judge(pipe, net, oracle, *RUNS[name], args.weight, args.steps, number) for number in sets]
        rows[name] = {
            score: {
                "mean": float(np.mean([s[score] for s in scores])),
                "standard error": float(np.std([s[score] for s in scores], ddof=1) / len(scores) ** 0.5),
            }
            for score in scores[0]
        }
        cells = [f"{score} {100 * v['mean']:.1f} ± {100 * v['standard error']:.1f}" for score, v in rows[name].items()]
        print(f"{name:24}", " | ".join(cells), flush=True)
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
