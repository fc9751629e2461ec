"""Do new pictures keep the subject of two photos? Rendered photos of new subjects, on `sprites`, judged by the oracle.

    python bench/photos.py                            # 8 subjects -> bench/results/photos.json; goes on if interrupted
    python bench/photos.py --subjects 4 --steps 25    # a quick look

For every subject: two rendered pictures of it, in two settings, at other places and sizes, and four new settings to
draw it in. "setting" and "kind" are the shares of new pictures that show what the prompt asks for; "main", "second"
(colours) and "pattern" the shares that agree with the photos, which no prompt tells of.

    python bench/photos.py --reconstruct              # do noise maps lead back to the photos?
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judging import Scores, Table, as_line, judge_missing, read_table, share, summarise
from measure import machine, write
from numpy.typing import NDArray

from consistory import ConsiStory, ConsistoryConfig, Story, ddpm
from consistory.config import PhotoConfig
from consistory.photos import photo_model
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SETTINGS, SUBJECTS, Scenes, render, sample_scenes

PHOTOS, NEW = 2, 4  # pictures of a subject
pipe: ConsiStory
oracle: Oracle


def draw_photos(number: int) -> tuple[Scenes, NDArray[np.uint8], list[str]]:
    """A subject, the same in every run: its scenes, the photos uint8 [2, 64, 64, 3] and the new settings."""
    generator = torch.Generator().manual_seed(70_000 + number)
    scenes = sample_scenes(PHOTOS, generator, second_subject=0)
    settings = torch.randperm(len(SETTINGS), generator=generator)[: PHOTOS + NEW].tolist()
    for name in ("subject", "main", "second", "pattern"):
        getattr(scenes, name)[:] = getattr(scenes, name)[0].clone()
    scenes.subject[:] = number % len(SUBJECTS)
    scenes.setting[:] = torch.tensor(settings[:PHOTOS])
    images, _ = render(scenes)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return scenes, pixels, [SETTINGS[i] for i in settings[PHOTOS:]]


def personalized(**options: Any) -> Callable[[int, int], Story]:
    """New pictures of a numbered subject, with these options of `ConsiStory.personalize`."""

    def tell(number: int, steps: int) -> Story:
        _, photos, settings = draw_photos(number)
        kind = SUBJECTS[number % len(SUBJECTS)]
        subject = pipe.personalize(
            list(photos), subject=f"a {kind}", concepts=[kind], seed=1000 * number, steps=steps, **options
        )
        return subject.extend(settings)

    return tell


def vanilla(number: int, steps: int) -> Story:
    """The same prompts and noise without the photos."""
    *_, settings = draw_photos(number)
    return pipe(
        subject=f"a {SUBJECTS[number % len(SUBJECTS)]}", settings=settings, seed=1000 * number + PHOTOS, steps=steps,
        config=ConsistoryConfig.vanilla(),
    )  # fmt: skip


WAYS: dict[str, Callable[[int, int], Story]] = {
    "vanilla": vanilla,
    "inversion": personalized(),
    "no AdaIN": personalized(align_keys=False),
    "photos read each other": personalized(anchors_read=True),
    "noise": personalized(method="noise"),
    "dropout 0.5": personalized(config=ConsistoryConfig()),
}


def prepare() -> None:
    """What every process holds. Several of them share the cores."""
    global pipe, oracle
    torch.set_num_threads(1)
    pipe, oracle = ConsiStory.from_pretrained("sprites"), Oracle.load()


def judge(steps: int, way: str, number: int) -> dict[str, Scores]:
    """Scores of one subject: shares of its new pictures."""
    scenes, _, settings = draw_photos(number)
    reading = oracle.read(WAYS[way](number, steps).images)
    wanted = {
        "setting": torch.tensor([SETTINGS.index(setting) for setting in settings]),
        "kind": scenes.subject[0], "main": scenes.main[0], "second": scenes.second[0], "pattern": scenes.pattern[0],
    }  # fmt: skip
    read = {name: getattr(reading, {"kind": "subject"}.get(name, name)) for name in wanted}
    return {way: {name: share(read[name] == wanted[name]) for name in wanted}}


@torch.inference_mode()
def reconstruct(steps: int, number: int) -> Scores:
    """How far sampling with a photo's noise maps ends from it: in latents, and in decibels from their picture."""
    _, photos, _ = draw_photos(number)
    recipe = pipe.personalize(list(photos), subject=f"a {SUBJECTS[number % len(SUBJECTS)]}", steps=steps).recipe
    x0, plan = pipe.encode(photos), pipe.plan(recipe, recipe.prompts)
    predict = photo_model(plan, PhotoConfig())
    inversion = ddpm.invert(predict, x0, recipe.seeds, pipe.schedule, steps)
    again = ddpm.generate(predict, inversion, pipe.schedule, steps)
    error = pipe.decode(again).astype(float) - pipe.decode(x0)
    return {
        "latents": (again - x0).abs().max().item(),
        "decibels": float(10 * np.log10(255**2 / np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-3)).min()),
    }


def summaries(table: Table) -> dict[str, Any]:
    """Means with standard errors of every way that has some."""
    return {
        name: {"subjects": len(subjects), "scores": summarise(list(subjects.values()))}
        for name in WAYS
        if len(subjects := table.get(name, {})) > 1
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS), help="one of each kind by default")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the subjects out among them")
    parser.add_argument("--reconstruct", action="store_true", help="that alone; prints the worst picture's figures")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "photos.json")
    args = parser.parse_args()

    if args.reconstruct:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), prepare) as workers:
            found = list(workers.map(partial(reconstruct, args.steps), range(args.subjects)))
        print(f"{PHOTOS * len(found)} pictures, {args.steps} steps:",
              f"latents differ by at most {max(f['latents'] for f in found):.1e},",
              f"pictures by at least {min(f['decibels'] for f in found):.1f} dB")  # fmt: skip
        return
    about = {"photos each": PHOTOS, "new pictures each": NEW, "steps": args.steps, "torch": torch.__version__}
    table = read_table(args.out, about)
    about |= machine("cpu") | {"threads": "1"}

    def save(table: Table) -> None:
        write(args.out, {"about": about, "rows": summaries(table), "scores": table})

    tasks = [(name, number) for number in range(args.subjects) for name in args.ways]
    todo = [(name, number) for name, number in tasks if str(number) not in table.get(name, {})]
    judge_missing(table, todo, partial(judge, args.steps), prepare, args.jobs, save)
    for name, row in summaries(table).items():
        print(as_line(f"{name} ({row['subjects']} subjects)", row["scores"]))


if __name__ == "__main__":
    main()
