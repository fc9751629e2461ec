"""Sets of prompts -> stories -> scores (§5): do pictures fit their prompts, and is the subject the same in all of them?

    sets = read_sets("sets.yaml")
    print(evaluate(sets, "evaluation", lambda: ConsiStory.from_pretrained("sprites"), model="sprites"))

Each set has a folder of its own, which is whole once it holds `story.json`. `evaluation.json` holds the run's settings,
which a folder has once and for all, and the scores.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import read_json

from .arguments import check_anchors, check_prompts, choose_concepts, compose_prompts, expand_seeds
from .config import ConsistoryConfig
from .files import write_atomically
from .images import RECORD, Pixels, check_can_save, check_free, encode_png, read_png
from .masks import average_maps, subject_masks
from .nouns import find_concept
from .story import Observer, OnStep, Plan, State

if TYPE_CHECKING:
    from .clip import CLIP
    from .model import ConsiStory, Story

logger = logging.getLogger(__name__)

RESULTS = "evaluation.json"
SCORES = {"text_alignment": "text alignment", "image_similarity": "image similarity"}
GREY = 128  # of what is not the subject
SEEDS = 100  # from one set to the next: a story has no more pictures
KEYS = ("style", "subject", "concept_token", "settings")

Json = dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """One story to be. number: its place in the file, from 0."""

    number: int
    subject: str
    settings: list[str]
    style: str
    concepts: list[str]

    @property
    def prompts(self) -> list[str]:
        return compose_prompts(self.subject, self.settings, self.style)

    @property
    def folder(self) -> str:
        words = re.sub(r"\W+", "-", self.subject.lower()).strip("-")
        return f"{self.number + 1:03}-{words[:40]}"

    def seeds(self, seed: int) -> list[int]:
        return expand_seeds(seed + SEEDS * self.number, len(self.settings))


def read_sets(path: str | Path) -> list[PromptSet]:
    """Read a .json file, or YAML: a list of entries with subject and settings, style and concept_token if need be.

    Raises ConsistoryError that names the entry if one is malformed; if the file is missing; or, for YAML, if PyYAML is.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConsistoryError(f"cannot read {path} ({error.strerror}): give a file of prompt sets") from None
    except UnicodeDecodeError:
        raise ConsistoryError(f"{path} is not a text in UTF-8: give a file of prompt sets") from None
    entries = _parse(path, text)
    if not isinstance(entries, list) or not entries:
        raise ConsistoryError(f"{path} holds no list of prompt sets: see consistory evaluate --help")
    sets = [_read_set(path, number, entry) for number, entry in enumerate(entries)]
    unknown = sorted({str(key) for entry in entries for key in entry} - {*KEYS})
    if unknown:
        logger.warning("%s: only %s are read; this is ignored: %s", path, ", ".join(KEYS), ", ".join(unknown))
    return sets


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConsistoryError(f"{path} is not JSON ({error}): fix it there") from None
    try:
        import yaml
    except ImportError:
        raise ConsistoryError('PyYAML, which reads YAML, is missing: pip install "consistory[evaluate]"') from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConsistoryError(f"{path} is not YAML ({' '.join(str(error).split())}): fix it there") from None


def _read_set(path: Path, number: int, entry: Any) -> PromptSet:
    where = f"set {number + 1} of {path}"
    if not isinstance(entry, dict):
        raise ConsistoryError(f"{where} is not an entry with subject and settings: see consistory evaluate --help")
    # What a file holds may be anything: it is checked before it is used.
    subject: Any = entry.get("subject")
    settings: Any = entry.get("settings")
    style: Any = entry.get("style") or ""
    concepts: Any = entry.get("concept_token") or []
    concepts = [concepts] if isinstance(concepts, str) else concepts
    texts = isinstance(subject, str) and isinstance(style, str)
    lists = all(isinstance(x, list) and all(isinstance(text, str) for text in x) for x in (settings, concepts))
    if not (texts and lists):
        raise ConsistoryError(f"{where} is malformed: subject and style are texts, settings a list of texts")
    with errors_name(where):
        made = PromptSet(number, subject, settings, style, concepts or [find_concept(subject)])
        check_prompts(made.prompts)
    return made


@contextmanager
def errors_name(where: str) -> Iterator[None]:
    """Errors say where they are."""
    try:
        yield
    except ConsistoryError as error:
        raise ConsistoryError(f"{where}: {error}") from None


def evaluate(
    sets: Sequence[PromptSet],
    out: str | Path,
    load: Callable[[], ConsiStory],
    *,
    model: str,
    options: Mapping[str, Any] | None = None,
    clip: CLIP | None = None,
    seed: int = 0,
    config: ConsistoryConfig | None = None,
    on_step: OnStep = lambda done, total: None,
    **sampling: Any,
) -> str:
    """Draw the sets that are not there yet, score all of them, write `evaluation.json`; returns a table to read.

    Without `clip`, scores that are there already stay, but for sets that are drawn anew. Those of sets that are not
    among these stay, too, apart from the others and from the means.
    load: gives the model; called only if there is something to draw.  model, options: its name and how it is loaded
    (dtype, loras, ...), for the record.
    sampling: steps, guidance and what else is the same for every set; as `ConsiStory.__call__` takes them, without
    `chunk`.
    Raises ConsistoryError, before any drawing, if a prompt lacks its concept, a set does not fit the settings, or the
    folder holds pictures of other prompts or other settings, or somebody else's.
    """
    out, config = Path(out), config or ConsistoryConfig()
    check_can_save(out)
    run = {"model": model, **(options or {}), "seed": seed, **sampling, "config": asdict(config)}
    run = json.loads(json.dumps(run))
    there: Json = {}
    if (out / RESULTS).exists():
        there = read_own(out / RESULTS)
        check_same_run(out, there.get("run"), run)
    missing = [one for one in sets if not is_drawn(one, out / one.folder, one.seeds(seed))]
    for one in missing:
        check_free(out / one.folder, len(one.settings))
    if missing:
        pipe = load()
        for one in missing:
            with errors_name(f"set {one.number + 1}"):
                pipe.token_weights(one.prompts, choose_concepts(one.concepts, one.subject, config))
                check_anchors(sampling.get("anchors"), len(one.prompts))
    for number, one in enumerate(missing):

        def on_part(done: int, total: int, number: int = number) -> None:
            on_step(number * total + done, len(missing) * total)

        story, masks = draw(pipe, one, one.seeds(seed), {**sampling, "config": config, "on_step": on_part})
        if not (out / RESULTS).exists():  # the settings bind as soon as there are pictures, and no earlier
            write_results(out, run, None, [], [])
        save(story, masks, out / one.folder)
    rows: list[Json] = [{"folder": one.folder, "prompts": one.prompts} for one in sets]
    for one, row in zip(sets, rows, strict=True):
        if clip is not None:
            row |= score(clip, out / one.folder)
        elif one not in missing:
            row |= old_scores(there, row)
    name = there.get("clip") if clip is None else clip.name
    folders = {row["folder"] for row in rows}
    rest = [old for old in old_rows(there) if old.get("folder") not in folders]
    write_results(out, run, name if summarise([*rows, *rest]) else None, rows, rest)
    return as_table(rows, out)


def is_drawn(one: PromptSet, folder: Path, seeds: list[int]) -> bool:
    """Whether the set's pictures are there. Raises ConsistoryError if others are."""
    if not (folder / RECORD).exists():
        return False
    record = read_own(folder / RECORD)
    if (record.get("prompts"), record.get("seeds"), record.get("concepts")) != (one.prompts, seeds, one.concepts):
        raise ConsistoryError(f"{folder} holds pictures of another set: choose another folder with --out")
    masks = [mask_name(number + 1) for number in range(len(seeds))]
    return all((folder / name).exists() for name in [*record["files"], *masks])


def read_own(path: Path) -> Json:
    """Raises ConsistoryError if what was written here is not whole any more."""
    try:
        return read_json(path)
    except ConsistoryError:
        raise ConsistoryError(f"{path} is damaged: delete it") from None


def check_same_run(out: Path, there: Any, run: Json) -> None:
    """Raises ConsistoryError if the folder's pictures were drawn with other settings."""
    there = there if isinstance(there, dict) else {}
    other = sorted(key for key in there.keys() | run.keys() if there.get(key) != run.get(key))
    if other:
        raise ConsistoryError(
            f"{out} holds an evaluation with another {', '.join(other)}: choose another folder with --out"
        )


class FinalMask(Observer):
    """Where the subject is in the finished pictures: bool [N, h, w] at the finest attended resolution (eq. 7).

    From the maps up to the last step, whether or not the method used them; so plain pictures have masks, too.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
        if after.step == plan.steps:
            finest, coarsest = plan.unet.strides[0], plan.unet.strides[-1]
            masks = subject_masks(average_maps(after.cross_maps), plan.sizes[coarsest], plan.sizes)
            self.mask = masks[finest].unflatten(1, plan.sizes[finest])


def draw(pipe: ConsiStory, one: PromptSet, seeds: list[int], call: Mapping[str, Any]) -> tuple[Story, Tensor]:
    """A story, and where its pictures show the subject: bool [N, h, w]."""
    final = FinalMask()
    story = pipe(prompts=one.prompts, concepts=one.concepts, seed=seeds, observer=final, **call)
    assert final.mask is not None
    return story, final.mask


def save(story: Story, masks: Tensor, folder: Path) -> None:
    """Save a story, with a mask beside each picture, as large as it: white where the subject is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (mask, image) in enumerate(zip(masks.cpu().numpy(), story.images, strict=True), 1):
            write_atomically(folder / mask_name(number), encode_png(enlarge(mask, image.shape[:2]) * np.uint8(255), {}))
    except OSError as error:
        raise ConsistoryError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    story.save(folder)


def mask_name(number: int) -> str:
    return f"mask-{number:02}.png"


def enlarge(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """[h, w] -> [H, W], to the nearest patch."""
    rows, columns = (np.arange(to) * of // to for to, of in zip(size, mask.shape, strict=True))
    return mask[rows][:, columns]


def remove_background(image: Pixels, mask: Pixels) -> Pixels:
    """uint8 [H, W, 3], grey where the mask [H, W] is 0. A picture in which no subject was found stays as it is."""
    return np.where(mask[..., None] > 0, image, np.uint8(GREY)) if mask.any() else image


def old_rows(there: Json) -> list[Json]:
    """Those of earlier results: of the sets of then, and of others before."""
    return [*there.get("sets", []), *there.get("other_sets", [])]


def old_scores(there: Json, row: Json) -> dict[str, float | None]:
    """What earlier results hold on the pictures of a row, if anything."""
    same = [old for old in old_rows(there) if row.items() <= old.items()]
    return {key: old[key] for old in same for key in SCORES if key in old}


def score(clip: CLIP, folder: Path) -> dict[str, float | None]:
    """Cosines of CLIP's vectors: of picture and prompt, and of two pictures without background; means over the set.

    A set of one picture has no pairs.
    """
    record = read_own(folder / RECORD)
    images = [read_png(folder / name) for name in record["files"]]
    masks = [read_png(folder / mask_name(number)) for number in range(1, len(images) + 1)]
    aligned = (clip.embed_images(images) * clip.embed_texts(record["prompts"])).sum(-1)
    vectors = clip.embed_images([remove_background(*pair) for pair in zip(images, masks, strict=True)])
    pairs = [(vectors[i] @ vectors[j]).item() for i, j in combinations(range(len(vectors)), 2)]
    return {
        "text_alignment": aligned.mean().item(),
        "image_similarity": float(np.mean(pairs)) if pairs else None,
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Mean and standard error over sets, for each score; a single set has no standard error."""
    summary: dict[str, dict[str, float | int | None]] = {}
    for key in SCORES:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
            summary[key] = {"mean": float(np.mean(values)), "standard_error": error, "sets": len(values)}
    return summary


def write_results(out: Path, run: Json, clip: str | None, rows: Sequence[Json], rest: Sequence[Json]) -> None:
    """rows: of the sets evaluated, which alone the means are of.  rest: of others that were drawn here earlier."""
    results = {"run": run, "clip": clip, "scores": summarise(rows), "sets": rows, "other_sets": rest}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / RESULTS, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConsistoryError(f"{out} cannot be written ({error.strerror}): choose another folder") from None


def as_table(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """A table: one line for each set, then means and standard errors."""
    summary = summarise(rows)
    if not summary:
        return f"{len(rows)} sets are drawn in {out}; they are not scored: give a CLIP model with --clip"
    width = max(len("mean ± standard error"), *(len(row["folder"]) for row in rows))

    def line(name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(width), *(cell.rjust(16) for cell in cells)])

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    lines = [line("", list(SCORES.values()))]
    lines += [line(row["folder"], [cell(row.get(key)) for key in SCORES]) for row in rows]
    empty: dict[str, Any] = {"mean": None, "standard_error": None}
    totals = [summary.get(key, empty) for key in SCORES]
    lines.append(
        line("mean ± standard error", [f"{cell(x['mean'])} ± {cell(x['standard_error'])}" for x in totals])
    )
    return "\n".join([*lines, f"All of it is in {out / RESULTS}"])
