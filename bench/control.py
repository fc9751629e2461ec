"""Does a ControlNet steer the layout, and does the subject stay the same? Stories on `sprites`, judged by the oracle.

    python bench/control.py                 # 8 sets of 4 settings, 20 steps -> bench/results/control.json

For every set: one subject, four settings, and for each picture the silhouette of that subject from a scene of its own,
drawn from seeds that no training has used. "silhouette" is the intersection over union of the subject's pixels, as the
oracle finds them, with the silhouette asked for (without control: with the one that was not asked for); the others are
as in bench/consistency.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from judging import Scores, Summary, agreements, alignment, as_line, draw_set, summarise, tell
from measure import machine, write
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig, Control, ControlNet
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SUBJECTS, render, sample_scenes

IMAGES = 4
HELD_OUT = 2**40  # training seeds its generators with smaller numbers
RUNS = {
    "vanilla": (ConsistoryConfig.vanilla(), False),
    "vanilla, control": (ConsistoryConfig.vanilla(), True),
    "consistory": (ConsistoryConfig(), False),
    "consistory, dropout 0.7": (ConsistoryConfig.control(), False),
    "consistory, control": (ConsistoryConfig.control(), True),
}


def draw_silhouettes(number: int) -> Tensor:
    """The silhouettes bool [IMAGES, 64, 64] of a set, the same in every run."""
    scenes = sample_scenes(IMAGES, torch.Generator().manual_seed(HELD_OUT + number), second_subject=0.0)
    subject = SUBJECTS.index(draw_set(number)[0])
    return render(replace(scenes, subject=torch.full((IMAGES,), subject)))[1]


def judge(
    pipe: ConsiStory, net: ControlNet, oracle: Oracle, config: ConsistoryConfig, controlled: bool, weight: float,
    steps: int, number: int,
) -> Scores:  # fmt: skip
    """Scores of one set: means over its pictures, and agreements over pairs of pictures."""
    silhouettes = draw_silhouettes(number)
    pictures = (255 * silhouettes.to(torch.uint8))[..., None].expand(-1, -1, -1, 3).numpy()
    controls = [Control(net, pictures, weight)] if controlled else []
    reading = oracle.read(tell(pipe, number, steps, config, IMAGES, controls=controls).images)
    overlap = (reading.mask & silhouettes).sum(dim=(1, 2)) / (reading.mask | silhouettes).sum(dim=(1, 2))
    return {"silhouette": overlap.mean().item()} | alignment(reading, number) | agreements(reading)


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
    rows: dict[str, Summary] = {}
    for name in args.runs:
        sets = tqdm(range(args.sets), desc=name, leave=False)
        rows[name] = summarise([judge(pipe, net, oracle, *RUNS[name], args.weight, args.steps, n) for n in sets])
        print(as_line(name, rows[name]), flush=True)
        write(args.out, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
