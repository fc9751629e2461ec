"""Two subjects in every picture: does each stay the same, and does one take on the other's looks? On `sprites`.

    python bench/subjects.py                 # 10 sets of 4 settings -> bench/results/subjects.json
    python bench/subjects.py --sets 2        # a quick look

For every set: two subjects ("a cat and a robot"), four settings, one seed per picture. The model draws two subjects
side by side, so the halves of a picture are given to the oracle one at a time; the kinds that it finds likelier tell
which half is which subject. Shares of pictures, or of pairs of pictures of a set:

kinds, setting        pictures whose two halves show the two kinds asked for, in either order; that show the setting
main, second, pattern pairs of pictures that agree in it, each subject with itself
crossed               pairs of pictures where one subject has the main colour that the other has in the other picture
alike                 pictures whose two subjects have one main colour
overlap               patches in both concepts' masks, of those in either
located               pictures where each concept's attention leans to its own subject

"halves" means masks as they should be: the subject mask, cut in the middle, each side the concept that plain SDXL draws
there from the same noise. It tells what becomes of separate subjects where cross-attention tells them apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from judging import AGREEMENTS, as_line, summarise
from measure import machine, write
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from consistory import ConsiStory, ConsistoryConfig, masks, story
from consistory.masks import Size
from consistory.weights.sprites.loop import generator_for
from consistory.weights.sprites.oracle import Oracle, Reading
from consistory.weights.sprites.world import SETTINGS, SUBJECTS, render, sample_scenes

IMAGES = 4
SEPARATE = ConsistoryConfig(separate_subjects=True)
CONFIGS = {
    "vanilla": ConsistoryConfig.vanilla(),
    "union": ConsistoryConfig(),
    "separate": SEPARATE,
    "separate, halves": SEPARATE,
    "separate, halves, background reads nothing": SEPARATE,
}
Maps = tuple[Tensor, Size]  # cross-attention [N, P, K], and height and width of its P patches


@dataclass
class Watch:
    """Stands in for `concept_masks`: keeps what it is given last, and cuts the masks in halves where sides are known.

    right: bool [N], is the first concept on the right? Or None.
    """

    right: Tensor | None
    maps: Maps | None = None

    def __call__(self, cross_map: Tensor, size: Size, sizes: dict[int, Size]) -> dict[int, Tensor]:
        self.maps = cross_map, size
        found = masks.concept_masks(cross_map, size, sizes)
        if self.right is None:
            return found
        return {s: mask.any(dim=1, keepdim=True) & sides(self.right, sizes[s]) for s, mask in found.items()}


@contextmanager
def conditions(name: str, right: Tensor | None) -> Iterator[Watch]:
    """What the configuration alone does not say."""
    watch = Watch(right if "halves" in name else None)

    def read_nothing(regions: Tensor) -> Tensor:
        """Bits as always, but none in place of all where a patch is of no concept."""
        return masks.region_bits(regions) * regions.any(dim=1)

    bits = read_nothing if "nothing" in name else masks.region_bits
    with patch.object(story, "concept_masks", watch), patch.object(story, "region_bits", bits):
        yield watch


def sides(right: Tensor, size: Size) -> Tensor:
    """bool [N, 2, P]: the half of a picture where each of two concepts is."""
    on_right = (torch.arange(size[1]) >= size[1] / 2).expand(size).flatten()
    first = on_right == right[:, None]
    return torch.stack([first, ~first], dim=1)


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
    for name in ("subject", *AGREEMENTS):
        first = torch.where(right, getattr(halves[1], name), getattr(halves[0], name))
        scores[name] = (first == getattr(truth, name)).float().mean().item()
    return scores


def judge_maps(maps: Maps, right: Tensor) -> dict[str, float]:
    """How far the concepts' masks, as cross-attention gives them, tell the subjects apart."""
    cross_map, size = maps
    found = masks.concept_masks(cross_map, size, {0: size})[0]
    lean = (cross_map[..., 0] / cross_map[..., 1]).log()  # [N, P]
    first, second = (sides(right, size) & found.any(dim=1, keepdim=True)).unbind(dim=1)
    own, other = ((lean * where).sum(dim=1) / where.sum(dim=1) for where in (first, second))
    overlap = found.all(dim=1).sum(dim=1) / found.any(dim=1).sum(dim=1)
    return {"overlap": overlap.mean().item(), "located": (own > other).float().mean().item()}


def judge(images: NDArray[np.uint8], maps: Maps | None, oracle: Oracle, number: int) -> tuple[dict[str, float], Tensor]:
    """Scores of one set, and in which pictures its first subject is on the right."""
    subjects, settings = draw_set(number)
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
    scores = {
        "kinds": float(np.mean([pair == tuple(kinds.tolist()) for pair in zip(*found, strict=True)])),
        "setting": (oracle.read(images).setting == wanted).float().mean().item(),
        **{attribute: agreement(each(attribute)) for attribute in AGREEMENTS},
        "crossed": float(np.mean([main[0][i] == main[1][j] for i, j in permutations(range(IMAGES), 2)])),
        "alike": float(np.mean([one == other for one, other in zip(*main, strict=True)])),
    }
    return scores | (judge_maps(maps, right) if maps else {}), right


def differences(sets: list[dict[str, float]], base: list[dict[str, float]]) -> list[dict[str, float]]:
    """Set by set, as all configurations start from the same noise."""
    return [{score: each[score] - other[score] for score in other} for each, other in zip(sets, base, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subjects.json")
    args = parser.parse_args()

    pipe = ConsiStory.from_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    oracle = Oracle.load()
    about = {
        "images per set": IMAGES, "steps": args.steps, "model": args.model, "dtype": args.dtype, **machine(args.device),
        "reading of rendered pictures": reading_accuracy(oracle),
    }  # fmt: skip
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGS}
    for number in tqdm(range(args.sets), desc="sets"):
        subjects, settings = draw_set(number)
        plain_right = None  # known once the first configuration, vanilla, has been drawn
        for name, config in CONFIGS.items():
            with conditions(name, plain_right) as watch:
                told = pipe(
                    subject=" and ".join(f"a {subject}" for subject in subjects), settings=settings,
                    concepts=subjects, seed=1000 * number, steps=args.steps, config=config,
                )  # fmt: skip
            judged, right = judge(told.images, watch.maps, oracle, number)
            plain_right = right if plain_right is None else plain_right
            scores[name].append(judged)
        rows = {name: summarise(sets) for name, sets in scores.items()} | {
            f"{name} - union": summarise(differences(sets, scores["union"]))
            for name, sets in scores.items()
            if "separate" in name
        }
        write(args.out, {"about": about | {"sets": number + 1}, "rows": rows})
    for name, row in rows.items():
        print(as_line(name, row))


if __name__ == "__main__":
    main()
