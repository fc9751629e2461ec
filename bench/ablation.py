"""What does each part of the method do? Seeded stories on `sprites` with parts left out, judged by the oracle.

    python bench/ablation.py --jobs 2      # -> bench/results/ablation.json and ablation.png; goes on if interrupted
    python bench/ablation.py --quick       # a few sets, in bench/results/quick/

For every set: one subject, five settings, one seed per picture, the same in every row. Rows that claims about
consistency rest on have 100 sets, those about diversity 30, the others 8. Ten steps, in which injection takes steps 1
to 3 and features are taken at step 7. The schedules that the paper, its released implementation and this library prefer
differ too little for that: they have 30 steps. A story without injection is the first pass of the one with it, taken to
its end: so `vanilla` comes with `no SDSA`, and `no injection` with `full`.

consistency   main, second, pattern: pairs of pictures of a set that agree in what the prompt leaves open; all: in all
              three. likeness: cosine similarity of the oracle's features of the subject, the background painted grey.
              Its scale is arbitrary: two different cats are alike to it, too.
alignment     pictures that show the subject, and the setting, that the prompt asks for.
diversity     displacement (App. C): how far apart the same part of the subject is in two pictures, over all pairs, as a
              share of the side. Parts are matched by diffusion features of the finished pictures, noised to t = 261,
              within the subject as the oracle sees it. place, size: standard deviation over a set of the subject's
              centre (share of the side) and of the logarithm of its area. facing: pairs of pictures in which it faces
              different ways.

Every row is set against `full`, and every claim is a difference of two rows, on the sets that both have; a difference
counts if it exceeds two standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import judging
import torch
import torch.nn.functional as F
from baselines.ip_adapter import features_of
from judging import (
    IMAGES,
    Scores,
    Table,
    agreements,
    alignment,
    in_per_cent,
    judge_missing,
    mean_and_error,
    read_table,
    tell,
)
from measure import machine, write
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, Story, ddim
from consistory.correspondence import nearest_patches, smooth
from consistory.injection import Injection
from consistory.kernels.injection import inject
from consistory.story import Observer, Plan, State, denoise, guided_output
from consistory.weights.sprites.oracle import Oracle, Reading

pipe: ConsiStory
oracle: Oracle


@dataclass(frozen=True)
class Row:
    """first_pass: the name of the row that this one's first pass leads to.  against: the row to compare this one to."""

    config: ConsistoryConfig
    anchors: int = 2
    sets: int = 8
    steps: int = 10
    in_order: bool = True
    first_pass: str | None = None
    against: str = "full"


FULL = ConsistoryConfig()
ROWS = {
    "vanilla": Row(ConsistoryConfig.vanilla(), sets=100),
    "full": Row(FULL, sets=100, first_pass="no injection"),
    "no SDSA": Row(replace(FULL, sdsa=False), sets=100, first_pass="vanilla"),
    "no injection": Row(replace(FULL, injection=False), sets=100),
    "no dropout": Row(replace(FULL, dropout=0.0), sets=30),
    "no dropout, no blending": Row(replace(FULL, dropout=0.0, query_blend=None), sets=30),
    "no blending": Row(replace(FULL, query_blend=None)),
    "no mask": Row(replace(FULL, masking=False)),
    "dropout 0.15": Row(replace(FULL, dropout=0.15)),
    "dropout 0.3": Row(replace(FULL, dropout=0.3)),
    "dropout 0.7": Row(replace(FULL, dropout=0.7)),
    "1 anchor": Row(FULL, anchors=1),
    "3 anchors": Row(FULL, anchors=3),
    "5 anchors": Row(FULL, anchors=IMAGES),
    "injection at once": Row(FULL, in_order=False),
    "30 steps": Row(FULL, steps=30, against="30 steps"),
    "30 steps, paper": Row(ConsistoryConfig.paper(), steps=30, against="30 steps"),
    "30 steps, reference": Row(ConsistoryConfig.reference(), steps=30, against="30 steps"),
}
CLAIMS = [  # score, the row that should have more of it, the row that should have less
    ("all", "full", "no injection"), ("all", "no injection", "no SDSA"), ("all", "no SDSA", "vanilla"),
    ("likeness", "full", "no injection"), ("likeness", "no injection", "no SDSA"), ("likeness", "no SDSA", "vanilla"),
    ("displacement", "full", "no dropout"), ("displacement", "no dropout", "no dropout, no blending"),
    ("displacement", "vanilla", "full"), ("facing", "full", "no dropout"), ("facing", "vanilla", "full"),
    ("setting", "vanilla", "full"), ("subject", "vanilla", "full"),
    ("all", "5 anchors", "1 anchor"), ("displacement", "1 anchor", "5 anchors"),
    ("all", "no dropout", "dropout 0.7"), ("displacement", "dropout 0.7", "no dropout"),
]  # fmt: skip
DROPOUTS = {"no dropout": 0.0, "dropout 0.15": 0.15, "dropout 0.3": 0.3, "full": 0.5, "dropout 0.7": 0.7}
ANCHORS = {"1 anchor": 1, "full": 2, "3 anchors": 3, "5 anchors": 5}


# --- one set ----------------------------------------------------------------------------------------------------------


@contextmanager
def injection_at_once() -> Iterator[None]:
    """All images, anchors too, draw from the anchors as they were before injection."""

    def at_once(injection: Injection, x: Tensor, anchor_x: Tensor | None = None) -> Tensor:
        before = x[: injection.anchors].clone()
        return inject(x, injection.index, injection.anchor, injection.mask, injection.alpha, anchor_x=before)

    with patch.object(Injection, "__call__", at_once):
        yield


class FirstPass(Observer):
    """Keeps the end of the first pass."""

    plan: Plan
    state: State
    stages: list[str]

    def __init__(self) -> None:
        self.stages = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
        if self.stages[-1] == "first pass":
            self.plan, self.state = plan, after

    @torch.inference_mode()
    def without_injection(self, story: Story) -> Story:
        """The same story, had it gone on without injection."""
        plan = replace(self.plan, observer=Observer())
        latents = [self.state, *denoise(plan, self.state, plan.steps)][-1].x
        return replace(story, images=pipe.decode(latents), latents=latents)


def judge(quick: bool, name: str, number: int) -> dict[str, Scores]:
    """One set's scores in a row, and in the row that its first pass leads to."""
    row, seen = ROWS[name], FirstPass()
    steps = 2 if quick else row.steps
    with nullcontext() if row.in_order else injection_at_once():
        story = tell(pipe, number, steps, row.config, anchors=row.anchors, observer=seen)
    stories = {name: story}
    if row.first_pass is not None:
        stories[row.first_pass] = seen.without_injection(story)
    return {name: scores(story, number) for name, story in stories.items()}


def scores(story: Story, number: int) -> Scores:
    """Every score of one set, see the top of this file."""
    reading = oracle.read(story.images)
    return {
        **alignment(reading, number),
        **agreements(reading),
        "likeness": likeness(story, reading),
        "displacement": displacement(story, reading),
        **layouts(reading.mask.float()),
        "facing": differing(reading.facing),
    }


@torch.inference_mode()
def likeness(story: Story, reading: Reading) -> float:
    """Mean cosine similarity of the subjects of two pictures."""
    pictures = torch.from_numpy(story.images).permute(0, 3, 1, 2) / 255
    unit = F.normalize(features_of(oracle, torch.where(reading.mask[:, None], pictures, 0.5)), dim=-1)
    return off_diagonal(unit @ unit.T)


@torch.inference_mode()
def displacement(story: Story, reading: Reading) -> float:
    """Mean distance, as a share of the side, between matched parts of the subject in two pictures; NaN without any."""
    recipe = replace(story.subject.recipe, config=ConsistoryConfig.vanilla(), guidance=1.0)  # features need none
    plan = pipe.plan(recipe, story.prompts)
    alpha_bar = ddim.alpha_bars(plan.schedule)[plan.timesteps[plan.dift_step]]
    noise = torch.randn(story.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    noised = ddim.add_noise(story.latents, noise, alpha_bar)
    _, control = guided_output(plan, State(plan.dift_step, noised, []), None, call=(1, plan.dift_step))
    assert control.dift is not None

    h, w = size = plan.sizes[plan.unet.strides[0]]
    inside = F.adaptive_avg_pool2d(reading.mask[:, None].float(), size).flatten(1) > 0.5  # [N, P]
    everyone = torch.ones(len(inside), len(inside), dtype=torch.bool)
    index = nearest_patches(smooth(control.dift), size, inside, everyone).index  # [N, N, P]
    place = torch.stack([torch.arange(h * w) // w / h, torch.arange(h * w) % w / w], dim=-1)
    distance = (place[index] - place).norm(dim=-1)
    pairs = [(i, j) for i in range(len(inside)) for j in range(len(inside)) if i != j and inside[j].any()]
    found = [distance[i, j][inside[i]].mean() for i, j in pairs if inside[i].any()]
    return torch.stack(found).mean().item() if found else float("nan")


def layouts(masks: Tensor) -> Scores:
    """masks float [N, H, W] -> how much the subject's centre and size vary over the pictures."""
    h, w = masks.shape[1:]
    area = masks.mean(dim=(1, 2)).clamp(min=1 / (h * w))
    y = (masks.mean(dim=2) * torch.arange(h) / h).mean(dim=1) / area
    x = (masks.mean(dim=1) * torch.arange(w) / w).mean(dim=1) / area
    return {"place": (x.var() + y.var()).sqrt().item(), "size": area.log().std().item()}


def differing(values: Tensor) -> float:
    """Share of the pairs of values that are not the same."""
    return off_diagonal((values[:, None] != values).float())


def off_diagonal(x: Tensor) -> float:
    return x[~torch.eye(len(x), dtype=torch.bool)].mean().item()


# --- all sets ---------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """What every process holds. Several of them share the cores."""
    global pipe, oracle
    torch.set_num_threads(1)
    pipe, oracle = ConsiStory.from_pretrained("sprites"), Oracle.load()


def missing(table: Table, sets: Callable[[Row], int]) -> list[tuple[str, int]]:
    """Rows and sets still to be told, in an order that keeps rows abreast of each other."""
    told = ROWS.keys() - {row.first_pass for row in ROWS.values()}
    asked = [((number + 1) / sets(ROWS[name]), name, number) for name in told for number in range(sets(ROWS[name]))]
    return [(name, number) for _, name, number in sorted(asked) if str(number) not in table.get(name, {})]


def summarise(table: Table) -> dict[str, Any]:
    """Means with standard errors of every row, and of differences on the sets that two rows have."""
    rows = {
        name: {"sets": len(sets), **judging.summarise(list(sets.values()))}
        for name in ROWS
        if len(sets := table.get(name, {})) > 1
    }
    for name in rows:
        if name != (other := ROWS[name].against) and other in rows:
            rows[name]["against"] = other
            rows[name]["difference"] = {score: difference(table, score, name, other) for score in SCORES}
    return {"rows": rows, "claims": [claim(table, *each) for each in CLAIMS if rows.keys() >= set(each[1:])]}


def column(table: Table, name: str, score: str) -> dict[str, float]:
    return {number: scores[score] for number, scores in table[name].items()}


def difference(table: Table, score: str, name: str, other: str) -> dict[str, float]:
    """Mean difference of two rows in a score, set by set."""
    x, y = column(table, name, score), column(table, other, score)
    return mean_and_error(x[number] - y[number] for number in x if number in y)


def claim(table: Table, score: str, more: str, less: str) -> dict[str, Any]:
    """Whether `more` has more of a score than `less`."""
    mean, error = difference(table, score, more, less).values()
    verdict = "unresolved" if abs(mean) <= 2 * error else "more" if mean > 0 else "less"
    return {"score": score, "row": more, "than": less, "difference": mean, "standard error": error, "verdict": verdict}


SCORES = {  # score: its name in the table, in per cent
    "subject": "subject", "setting": "setting", "main": "main", "second": "second", "pattern": "pattern",
    "all": "all three", "likeness": "likeness", "displacement": "displacement", "place": "place", "size": "size",
    "facing": "facing",
}  # fmt: skip


def as_text(summary: dict[str, Any]) -> str:
    """A Markdown table, in per cent, then the claims."""
    compared = ("all", "displacement")
    titles = [*SCORES.values(), *(f"{SCORES[score]}, difference" for score in compared)]
    lines = ["| | sets | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    for name, row in summary["rows"].items():
        cells = [in_per_cent(row[score]) for score in SCORES]
        cells += [in_per_cent(row["difference"][score]) if "difference" in row else "" for score in compared]
        lines.append(f"| {name} | {row['sets']} | " + " | ".join(cells) + " |")
    for c in summary["claims"]:
        by = f"{100 * c['difference']:+.1f} ± {100 * c['standard error']:.1f}"
        lines.append(f"{c['score']}: {c['row']} against {c['than']}: {by}, {c['verdict']}")
    return "\n".join(lines)


def plot(table: Table, path: Path) -> None:
    """Consistency against alignment (Fig. 8), and against diversity, by dropout (A.4) and number of anchors (A.5).

    Rows in one panel are compared on the sets that all of them have.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def show(axes: Any, names: dict[str, str], score: str, joined: bool) -> None:
        common = set.intersection(*(set(table[name]) for name in names))
        points = {
            name: [mean_and_error(100 * table[name][n][s] for n in sorted(common)) for s in (score, "all")]
            for name in names
        }
        heights = [y["mean"] for _, y in points.values()]
        for i, (name, (x, y)) in enumerate(points.items()):
            at = x["mean"], y["mean"]
            axes.errorbar(*at, y["standard error"], x["standard error"], fmt="o", color="#2b6cb0", ecolor="#cccccc")
            # The higher of two neighbours is named above, the lower below.
            neighbour = min((abs(other - heights[i]), other, j) for j, other in enumerate(heights) if j != i)[1:]
            offset = 4 if (heights[i], i) > neighbour else -11
            axes.annotate(names[name], at, xytext=(5, offset), textcoords="offset points", fontsize=8)
        if joined:
            line = [[x["mean"], y["mean"]] for name, (x, y) in points.items() if name != "vanilla"]
            axes.plot(*zip(*line, strict=True), color="#2b6cb0", lw=1)
        axes.set_xlabel({"setting": "setting right (%)", "displacement": "displacement (% of the side)"}[score])
        axes.set_title(f"{len(common)} sets", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)

    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharey=True, layout="constrained")
    parts = {name: name for name, row in ROWS.items() if row.sets >= 30}
    dropouts = {"vanilla": "vanilla"} | {name: f"dropout {p:g}" for name, p in DROPOUTS.items()}
    anchors = {name: f"{n} anchor{'s' * (n > 1)}" for name, n in ANCHORS.items()}
    show(axes[0, 0], parts, "setting", joined=False)
    show(axes[0, 1], parts, "displacement", joined=False)
    show(axes[1, 0], dropouts, "displacement", joined=True)
    show(axes[1, 1], anchors, "displacement", joined=True)
    figure.supylabel("pairs that agree in colours and pattern (%)", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each, that share the sets out")
    parser.add_argument("--quick", action="store_true", help="two sets a row, two steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    steps = 2 if args.quick else Row.steps
    about = {"images per set": IMAGES, "steps": steps, "dtype": "float32", "torch": torch.__version__}
    table = read_table(out / "ablation.json", about)
    about |= machine("cpu") | {"threads": "1"}

    def save(table: Table) -> None:
        write(out / "ablation.json", {"about": about} | summarise(table) | {"scores": table})

    todo = missing(table, lambda row: 2 if args.quick else row.sets)
    judge_missing(table, todo, partial(judge, args.quick), prepare, args.jobs, save)
    summary = summarise(table)
    plot(table, out / "ablation.png")
    print(as_text(summary))


if __name__ == "__main__":
    main()
