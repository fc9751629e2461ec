"""How do others keep a subject, and how long does it take? Stories on `sprites`, judged by the oracle.

    python bench/compare.py             # 10 sets of 5 settings -> bench/results/compare.json and compare.png
    python bench/compare.py --sets 1    # a quick look

For every set: one subject, five settings, one seed per picture. Whoever has to learn the subject learns it from one
picture, the one that the plain model draws of the first setting. Scores as in bench/ablation.py. Times are processor
seconds on one thread until five pictures are there: what a subject takes before its first picture, and the drawing.

Textual Inversion and DreamBooth see their picture `TI_STEPS` and `LORA_STEPS` times in batches of four; longer training
keeps the subject better until settings get lost. "shared attention": every picture reads all others, no masks, no
injection. "reference only": every picture reads the one given, noised.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablation
import torch
from ablation import IMAGES, Scores, agreements, draw_set, mean_and_error, share
from baselines import dreambooth, textual_inversion
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SETTINGS, SUBJECTS
from measure import machine
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig

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


Drawn = tuple[Any, float, float]  # pictures uint8 [5, H, W, 3], seconds before the first, seconds of drawing


def draw(pipe: ConsiStory, number: int, steps: int, config: ConsistoryConfig, **options: Any) -> Any:
    subject, settings = draw_set(number)
    return pipe(
        subject=f"a {subject}", settings=settings, concepts=[subject], seed=1000 * number, steps=steps, config=config,
        **options,
    ).images  # fmt: skip


def given_picture(pipe: ConsiStory, number: int, steps: int) -> tuple[Any, str]:
    """The one picture [H, W, 3] that shows the subject, and its prompt."""
    subject, settings = draw_set(number)
    story = pipe(
        subject=f"a {subject}", settings=settings[:1], concepts=[subject], seed=1000 * number, steps=steps,
        config=VANILLA,
    )  # fmt: skip
    return story.images[0], story.prompts[0]


def at_once(config: ConsistoryConfig, **options: Any) -> Callable[[ConsiStory, int, int], Drawn]:
    """Nothing to learn: pictures of one story."""

    def tell(pipe: ConsiStory, number: int, steps: int) -> Drawn:
        clock = Clock()
        return draw(pipe, number, steps, config, **options), 0.0, clock.lap()

    return tell


def from_photo(config: ConsistoryConfig | None, **options: Any) -> Callable[[ConsiStory, int, int], Drawn]:
    """The given picture as the only anchor."""

    def tell(pipe: ConsiStory, number: int, steps: int) -> Drawn:
        clock = Clock()
        picture, prompt = given_picture(pipe, number, steps)
        kind, settings = draw_set(number)
        subject = pipe.personalize(
            [picture], prompts=[prompt], concept=kind, seed=500, steps=steps, config=config, **options
        )
        before = clock.lap()
        prompts = [f"a {kind} {setting}" for setting in settings]
        seeds = [1000 * number + i for i in range(IMAGES)]
        return subject.extend(prompts=prompts, seed=seeds).images, before, clock.lap()

    return tell


def inverted(pipe: ConsiStory, number: int, steps: int) -> Drawn:
    """Textual Inversion."""
    clock = Clock()
    picture, prompt = given_picture(pipe, number, steps)
    word = draw_set(number)[0]
    vectors = textual_inversion.learn(
        pipe, latents_of(pipe, picture), prompt, word, steps=TI_STEPS, rate=TI_RATE, seed=number
    )
    before = clock.lap()
    with textual_inversion.embedded(pipe, word, vectors):
        return draw(pipe, number, steps, VANILLA), before, clock.lap()


def tuned(pipe: ConsiStory, number: int, steps: int) -> Drawn:
    """DreamBooth with a LoRA."""
    clock = Clock()
    picture, prompt = given_picture(pipe, number, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subject.safetensors"
        dreambooth.learn(
            pipe, latents_of(pipe, picture), prompt, path, rank=RANK, steps=LORA_STEPS, rate=LORA_RATE, seed=number
        )
        other = ConsiStory.from_pretrained("sprites", loras=[(path, 1.0)])
    before = clock.lap()
    return draw(other, number, steps, VANILLA), before, clock.lap()


def latents_of(pipe: ConsiStory, picture: Any) -> Tensor:
    return pipe.encode(picture[None]).clone()


METHODS: dict[str, Callable[[ConsiStory, int, int], Drawn]] = {
    "vanilla": at_once(VANILLA),
    "ConsiStory": at_once(ConsistoryConfig()),
    "shared attention": at_once(SHARED, anchors=IMAGES),
    "reference only": from_photo(SHARED, method="noise", align_keys=False),
    "ConsiStory, one photo": from_photo(None),
    "Textual Inversion": inverted,
    "DreamBooth LoRA": tuned,
}


def judge(pipe: ConsiStory, oracle: Oracle, name: str, number: int, steps: int) -> Scores:
    images, before, drawing = METHODS[name](pipe, number, steps)
    subject, settings = draw_set(number)
    reading = oracle.read(images)
    wanted = torch.tensor([SETTINGS.index(setting) for setting in settings])
    return {
        "subject": share(reading.subject == SUBJECTS.index(subject)),
        "setting": share(reading.setting == wanted),
        **agreements(reading),
        "before": before,
        "drawing": drawing,
    }


def summarise(table: ablation.Table) -> dict[str, Any]:
    rows = {}
    for name in (name for name in METHODS if len(table.get(name, {})) > 1):
        scores = next(iter(table[name].values()))
        rows[name] = {"sets": len(table[name])}
        rows[name] |= {score: mean_and_error(ablation.column(table, name, score)) for score in scores}
    return rows


def as_text(rows: dict[str, Any]) -> str:
    titles = {"subject": "subject", "setting": "setting", "main": "main", "second": "second", "pattern": "pattern",
              "all": "all three"}  # fmt: skip
    lines = ["| | sets | " + " | ".join(titles.values()) + " | seconds |", "|---" * (len(titles) + 3) + "|"]
    for name, row in rows.items():
        cells = [f"{100 * row[score]['mean']:.0f} ± {100 * row[score]['standard error']:.0f}" for score in titles]
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
        at = row["before"]["mean"] + row["drawing"]["mean"], 100 * row["main"]["mean"]
        axes.errorbar(*at, 100 * row["main"]["standard error"], fmt="o", color="#2b6cb0", ecolor="#bbbbbb", lw=1)
        axes.annotate(name, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("processor seconds until five pictures are there")
    axes.set_ylabel("pairs that agree in main colour (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, oracle = ConsiStory.from_pretrained("sprites"), Oracle.load()
    path = args.out / "compare.json"
    about = {"images per set": IMAGES, "steps": args.steps} | machine("cpu")
    before = json.loads(path.read_text()) if path.exists() else {"about": None}
    table: ablation.Table = before["scores"] if before["about"] == about else {}
    for number, name in tqdm([(number, name) for number in range(args.sets) for name in args.methods]):
        if str(number) in table.get(name, {}):
            continue
        table.setdefault(name, {})[str(number)] = judge(pipe, oracle, name, number, args.steps)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"about": about, "rows": summarise(table), "scores": table}) + "\n")
        os.replace(part, path)
    rows = summarise(table)
    plot(rows, args.out / "compare.png")
    print(as_text(rows))


if __name__ == "__main__":
    main()
