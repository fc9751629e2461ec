"""How do others keep a subject, and how long does it take? Stories on `sprites`, judged by the oracle.

    python bench/compare.py             # 4 sets of 5 settings -> bench/results/compare.json and compare.png
    python bench/compare.py --quick     # 2 sets, 2 steps, next to no training, in bench/results/quick/

For every set: one subject, five settings, one seed per picture. Whoever has to learn the subject learns it from one
picture, the one that the plain model draws of the first setting. Scores as in bench/ablation.py. Times are processor
seconds on one thread until five pictures are there: what a subject takes before its first picture, and the drawing.

Textual Inversion and DreamBooth see their picture `TI_STEPS` and `LORA_STEPS` times in batches of four; longer training
keeps the subject better until settings get lost. IP-Adapter was trained once, for all subjects, see there; that time is
not counted. "shared attention": every picture reads all others, no masks, no injection. "reference only": every picture
reads the one given, noised.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import judging
import torch
from baselines import dreambooth, ip_adapter, textual_inversion
from judging import IMAGES, Scores, Table, draw_set, in_per_cent, judge_missing, read_table, tell
from measure import machine, write
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig
from consistory.ip_adapter import IPAdapter
from consistory.weights.sprites.oracle import Oracle

TI_STEPS, TI_RATE = 150, 3e-2
LORA_STEPS, LORA_RATE, RANK = 120, 3e-3, 4
VANILLA = ConsistoryConfig.vanilla()
SHARED = ConsistoryConfig(masking=False, dropout=0.0, query_blend=None, injection=False)


class Clock:
    """Processor seconds of this process: `lap` gives those since the last call."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def lap(self) -> float:
        before, self.last = self.last, time.process_time()
        return self.last - before


@dataclass(frozen=True)
class Task:
    """The number of a set, the steps of sampling, and the share of the training that methods get."""

    number: int
    steps: int
    effort: float = 1.0


pipe: ConsiStory
oracle: Oracle
Drawn = tuple[Any, float, float]  # pictures uint8 [5, H, W, 3], seconds before the first, seconds of drawing
Method = Callable[[ConsiStory, Task], Drawn]


def draw(pipe: ConsiStory, task: Task, config: ConsistoryConfig = VANILLA, **options: Any) -> Any:
    return tell(pipe, task.number, task.steps, config, **options).images


def given_picture(pipe: ConsiStory, task: Task) -> tuple[Any, str]:
    """The one picture [H, W, 3] that shows the subject, and its prompt."""
    story = tell(pipe, task.number, task.steps, VANILLA, images=1)
    return story.images[0], story.prompts[0]


def at_once(config: ConsistoryConfig, **options: Any) -> Method:
    """Nothing to learn: pictures of one story."""

    def method(pipe: ConsiStory, task: Task) -> Drawn:
        clock = Clock()
        return draw(pipe, task, config, **options), 0.0, clock.lap()

    return method


def from_photo(config: ConsistoryConfig | None, **options: Any) -> Method:
    """The given picture as the only anchor."""

    def method(pipe: ConsiStory, task: Task) -> Drawn:
        clock = Clock()
        picture, prompt = given_picture(pipe, task)
        kind, settings = draw_set(task.number)
        subject = pipe.personalize(
            [picture], prompts=[prompt], concept=kind, seed=500, steps=task.steps, config=config, **options
        )
        before = clock.lap()
        prompts = [f"a {kind} {setting}" for setting in settings]
        seeds = [1000 * task.number + i for i in range(IMAGES)]
        return subject.extend(prompts=prompts, seed=seeds).images, before, clock.lap()

    return method


def inverted(pipe: ConsiStory, task: Task) -> Drawn:
    """Textual Inversion."""
    clock = Clock()
    picture, prompt = given_picture(pipe, task)
    word = draw_set(task.number)[0]
    x0, steps = latents_of(pipe, picture), round(TI_STEPS * task.effort)
    vectors = textual_inversion.learn(pipe, x0, prompt, word, steps=steps, rate=TI_RATE, seed=task.number)
    before = clock.lap()
    with textual_inversion.embedded(pipe, word, vectors):
        return draw(pipe, task), before, clock.lap()


def tuned(pipe: ConsiStory, task: Task) -> Drawn:
    """DreamBooth with a LoRA."""
    clock = Clock()
    picture, prompt = given_picture(pipe, task)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subject.safetensors"
        x0, steps = latents_of(pipe, picture), round(LORA_STEPS * task.effort)
        dreambooth.learn(pipe, x0, prompt, path, rank=RANK, steps=steps, rate=LORA_RATE, seed=task.number)
        other = ConsiStory.from_pretrained("sprites", loras=[(path, 1.0)])
    before = clock.lap()
    return draw(other, task), before, clock.lap()


def prompted(pipe: ConsiStory, task: Task) -> Drawn:
    """IP-Adapter."""
    clock = Clock()
    picture, _ = given_picture(pipe, task)
    features = ip_adapter.features_of(Oracle.load(), torch.from_numpy(picture[None]).permute(0, 3, 1, 2) / 255)[0]
    both = torch.stack([torch.zeros_like(features), features])
    other = pipe.with_picture(IPAdapter.load(ip_adapter.WEIGHTS, pipe.unet), both)
    before = clock.lap()
    return draw(other, task), before, clock.lap()


def latents_of(pipe: ConsiStory, picture: Any) -> Tensor:
    return pipe.encode(picture[None]).clone()


METHODS: dict[str, Method] = {
    "vanilla": at_once(VANILLA),
    "ConsiStory": at_once(ConsistoryConfig()),
    "shared attention": at_once(SHARED, anchors=IMAGES),
    "reference only": from_photo(SHARED, method="noise", align_keys=False),
    "ConsiStory, one photo": from_photo(None),
    "Textual Inversion": inverted,
    "DreamBooth LoRA": tuned,
    "IP-Adapter": prompted,
}


def prepare() -> None:
    """What every process holds."""
    global pipe, oracle
    torch.set_num_threads(1)
    pipe, oracle = ConsiStory.from_pretrained("sprites"), Oracle.load()


def judge(steps: int, effort: float, name: str, number: int) -> dict[str, Scores]:
    images, before, drawing = METHODS[name](pipe, Task(number, steps, effort))
    return {name: judging.judge(oracle, images, number) | {"before": before, "drawing": drawing}}


def summarise(table: Table) -> dict[str, Any]:
    return {
        name: {"sets": len(sets), **judging.summarise(list(sets.values()))}
        for name in METHODS
        if len(sets := table.get(name, {})) > 1
    }


def as_text(rows: dict[str, Any]) -> str:
    titles = {"subject": "subject", "setting": "setting", "main": "main", "second": "second", "pattern": "pattern",
              "all": "all three"}  # fmt: skip
    lines = ["| | sets | " + " | ".join(titles.values()) + " | seconds |", "|---" * (len(titles) + 3) + "|"]
    for name, row in rows.items():
        cells = [in_per_cent(row[score], digits=0) for score in titles]
        seconds = f"{row['before']['mean']:.0f} + {row['drawing']['mean']:.0f}"
        lines.append(f"| {name} | {row['sets']} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Consistency against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in rows.items():
        at = row["before"]["mean"] + row["drawing"]["mean"], 100 * row["all"]["mean"]
        axes.errorbar(*at, 100 * row["all"]["standard error"], fmt="o", color="#2b6cb0", ecolor="#bbbbbb", lw=1)
        axes.annotate(name, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25)  # room for names
    axes.set_xlabel("processor seconds until five pictures are there")
    axes.set_ylabel("pairs that agree in colours and pattern (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each, that share the work out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    effort = 1.0
    if args.quick:
        args.sets, args.steps, args.out, effort = 2, 2, args.out / "quick", 0.02
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"images per set": IMAGES, "steps": args.steps, "effort": effort, **machine("cpu"), "threads": "1"}
    table = read_table(args.out / "compare.json", about)

    def save(table: Table) -> None:
        write(args.out / "compare.json", {"about": about, "rows": summarise(table), "scores": table})

    tasks = [(name, number) for number in range(args.sets) for name in args.methods]
    todo = [(name, number) for name, number in tasks if str(number) not in table.get(name, {})]
    judge_missing(table, todo, partial(judge, args.steps, effort), prepare, args.jobs, save)
    rows = summarise(table)
    plot(rows, args.out / "compare.png")
    print(as_text(rows))


if __name__ == "__main__":
    main()
