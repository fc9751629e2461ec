"""A look inside: notes taken while a story is told, and one self-contained page that shows them.

    trace = Trace()
    story = pipe(subject="a cat", settings=["on the beach", "in the snow"], observer=trace)
    trace.save(story, "story.html")

The page needs no network and no other file. `explain.html` is its template; arrays travel in it as one deflated blob.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import inspect
import json
import math
import pkgutil
import re
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from consistory.kernels.otsu import otsu_threshold
from consistory.weights.errors import ConsistoryError

from . import ddim
from .attention import Around, AttentionControl, Site
from .files import write_atomically
from .images import Pixels, check_can_save, encode_jpeg, encode_png
from .injection import plan_injection
from .masks import Size, average_maps
from .sdsa import Consistent
from .story import Masks, Observer, Plan, State, blend_weight, current_regions

if TYPE_CHECKING:
    from .model import Story

PICTURES = 8  # shown of a story, and all anchors
STEPS = 50  # shown of a pass: every step of a usual one
READING_BYTES = 4_000_000  # of all attention matrices together, before they are deflated
READING_PATCHES = 256  # of an attention matrix, at most
DECODED = 128  # pixels: predictions for larger pictures are drawn by a linear map of the latents


@dataclass(frozen=True)
class Note:
    """A step. x0: float16 [E, 4, h, w], the prediction.

    masks, cross_map: what was in force: bool [E, P] per stride, float [E, P]; None where no step came before.
    """

    step: int
    x0: Tensor
    masks: Masks | None
    cross_map: Tensor | None


@dataclass
class RunningMean:
    """A running mean over layers."""

    total: Tensor | None = None
    count: int = 0

    def add(self, x: Tensor) -> None:
        self.total = x if self.total is None else self.total + x
        self.count += 1

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


@dataclass
class Notes:
    """Notes on one story. E pictures are shown.

    passes: one list of notes for each.  stages: names and when they began, in seconds without the note-taking's own.
    readings: {step: float [E, Q, 1 + A, K]} attention of Q query patches to K patches of the own picture and of each
        anchor, both pooled to the same grid.  pulls: {step: float [E, P]} cosine distance from a query to the vanilla
        one that is blended in. Both are means over the heads and the decoder layers of the coarsest resolution.
    latents: [N, 4, h, w] after the last step.
    """

    plan: Plan | None = None
    latents: Tensor | None = None
    passes: list[list[Note]] = field(default_factory=list)
    stages: list[tuple[str, float]] = field(default_factory=list)
    readings: dict[int, RunningMean] = field(default_factory=dict)
    pulls: dict[int, RunningMean] = field(default_factory=dict)
    aside: float = 0.0


class Watched(Around):
    """A control with someone looking on: `look` sees the queries and keys of every self-attention."""

    def __init__(self, inner: AttentionControl, look: Callable[[Tensor, Tensor, Site], None]) -> None:
        super().__init__(inner)
        self.look = look

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.look(q, k, site)
        return super().self_attention(q, k, v, site)


class Trace(Observer):
    """Takes notes of a story, for a page. They slow it down a little and change nothing.

    One trace watches one story at a time: the next story replaces the notes.
    """

    def __init__(self) -> None:
        self.notes = Notes()

    def stage(self, name: str) -> None:
        if name == "prompts":
            self.notes = Notes()
        if name.endswith("pass"):
            self.notes.passes.append([])
        self.notes.stages.append((name, time.perf_counter() - self.notes.aside))

    def control(self, plan: Plan, state: State, control: Consistent) -> AttentionControl:
        wanted = state.step in reading_steps(plan.steps)
        blended = control.sharing is not None and control.sharing.vanilla is not None
        if control.sharing is None or not (wanted or blended):
            return control
        # The second pass draws the pictures: what it reads replaces what the first has read at the same step.
        reading = self.notes.readings[state.step] = RunningMean()
        pull = self.notes.pulls[state.step] = RunningMean()
        images = len(state.x)

        def look(q: Tensor, k: Tensor, site: Site) -> None:
            if site.part != "decoder" or site.stride != plan.unet.strides[-1]:
                return
            with self._aside(q):
                q, k = q[-images:], k[-images:]  # of the conditional samples
                if control.sharing is not None and control.sharing.vanilla is not None:
                    recorded, weight = control.sharing.vanilla
                    plain = recorded.queries[site][-images:]
                    pull.add(1 - F.cosine_similarity(q.float(), plain.float(), -1).mean(1)[: shown(plan)])
                    q = (1 - weight) * q + weight * plain
                if wanted:
                    reading.add(self._read(plan, q, k, control))

        return Watched(control, look)

    def _read(self, plan: Plan, q: Tensor, k: Tensor, control: Consistent) -> Tensor:
        """Attention [E, Q, 1 + A, K] of one layer, averaged over heads. q, k: [N, H, P, d], the conditional half."""
        assert control.sharing is not None
        stride = plan.unet.strides[-1]
        key_mask, share, factor = control.sharing.key_masks[stride], control.sharing.share, reading_factor(plan)
        own = torch.ones_like(key_mask[:1])
        pictures = []
        for i in range(shown(plan)):
            keys = torch.cat([k[i : i + 1], k[: plan.anchors]])
            readable = torch.cat([own, key_mask & share[i, :, None]]).flatten()
            read = RunningMean()
            for head in range(q.shape[1]):  # one by one: a matrix of all heads takes much memory at large sizes
                scores = q[i, head].float() @ keys[:, head].flatten(0, 1).float().T / q.shape[-1] ** 0.5
                read.add(scores.masked_fill(~readable, -torch.inf).softmax(-1))
            pictures.append(pool_reading(read.mean.unflatten(1, (1 + plan.anchors, -1)), plan.sizes[stride], factor))
        return torch.stack(pictures)

    def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
        if before.step % math.ceil(plan.steps / STEPS) and after.step < plan.steps:
            return
        with self._aside(output):
            self.notes.plan, self.notes.latents = plan, after.x
            alpha_bar = ddim.alpha_bars(plan.schedule)[plan.timesteps[before.step]]
            x0, _ = ddim.predict(before.x, output, alpha_bar, plan.schedule.prediction)
            masks = cross_map = None
            if before.cross_maps:
                regions = current_regions(plan, before)
                masks = {s: region[: shown(plan)].any(dim=1).cpu() for s, region in regions.items()}
                cross_map = average_maps(before.cross_maps)[: shown(plan)].mean(-1).float().cpu()
            self.notes.passes[-1].append(Note(before.step, x0[: shown(plan)].half().cpu(), masks, cross_map))

    @contextmanager
    def _aside(self, x: Tensor) -> Iterator[None]:
        """Note-taking's own time is no part of any stage. Reading a value waits for a device that is still at work."""
        x.flatten()[:1].cpu()
        start = time.perf_counter()
        yield
        x.flatten()[:1].cpu()
        self.notes.aside += time.perf_counter() - start

    def save(self, story: Story, path: str | Path) -> None:
        """Write the page of the story that was watched. Raises ConsistoryError if it cannot be written."""
        path = Path(path)
        check_can_save(path.absolute().parent)
        data = self.page(story).encode()
        try:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            raise ConsistoryError(f"{path} cannot be written ({error.strerror}): choose another name") from None

    @torch.no_grad()
    def page(self, story: Story) -> str:
        """The whole page. Raises ConsistoryError if no story was watched, or only part of one, or Pillow is missing."""
        plan = self.notes.plan
        if plan is None or self.notes.latents is None:
            raise ConsistoryError("this trace has watched no story: pass it to the call as observer=trace")
        if len(plan.token_weights) != len(story.images):
            raise ConsistoryError(
                "this trace has watched other pictures than the story's: use it for a whole story, not for more "
                "pictures of a subject, without chunk and choose"
            )
        if not torch.equal(self.notes.latents.to(story.latents), story.latents):
            raise ConsistoryError("this trace has watched another story: give the one that it was handed to last")
        arrays = Arrays()
        facts = describe_run(plan, story) | {
            "decoded": decodes(story),
            "passes": [
                {
                    "steps": [note.step for note in notes],
                    "frames": draw_predictions(notes, story),
                    **add_masks(arrays, f"pass{number}", notes, plan),
                }
                for number, notes in enumerate(self.notes.passes)
            ],
            "readings": self._add_readings(arrays, plan),
            "pulls": self._add_pulls(arrays),
            "matches": add_matches(arrays, plan, story),
            "stages": [
                {"name": name, "seconds": end - start}
                for (name, start), (_, end) in zip(self.notes.stages, self.notes.stages[1:], strict=False)
            ] + [{"name": "notes for this page", "seconds": self.notes.aside}],
        }
        if plan.config.sdsa:
            arrays.add("kept", plan.kept_keys[plan.unet.strides[-1]])
        return fill_template(facts, arrays)

    def _add_readings(self, arrays: Arrays, plan: Plan) -> dict[str, Any] | None:
        """Square roots of each query's probabilities, relative to its largest; and how much each picture gets."""
        readings = {step: x.mean.cpu() for step, x in sorted(self.notes.readings.items()) if x.count}
        if not readings:
            return None
        read = torch.stack(list(readings.values()))  # [R, E, Q, 1 + A, K]
        arrays.add("reading", to_bytes((read / read.amax((-2, -1), keepdim=True)).sqrt(), 1.0))
        arrays.add("reading_share", to_bytes(read.sum(-1), 1.0))
        (h, w), factor = plan.sizes[plan.unet.strides[-1]], reading_factor(plan)
        return {"steps": list(readings), "grid": [math.ceil(h / factor), math.ceil(w / factor)]}

    def _add_pulls(self, arrays: Arrays) -> dict[str, Any] | None:
        pulls = {step: x.mean.cpu() for step, x in sorted(self.notes.pulls.items()) if x.count}
        if not pulls:
            return None
        stacked = torch.stack(list(pulls.values()))
        arrays.add("pull", to_bytes(stacked, stacked.max().item()))
        return {"steps": list(pulls), "largest": stacked.max().item()}


# --- what is shown ----------------------------------------------------------------------------------------------------


def shown(plan: Plan) -> int:
    """E: how many pictures of a story are shown."""
    return min(len(plan.token_weights), max(PICTURES, plan.anchors))


def reading_steps(steps: int) -> list[int]:
    """Steps whose attention is noted: the first with sharing, and about where blending and injection end; and late."""
    return sorted({1, steps // 10, steps // 3, 2 * steps // 3} & set(range(1, steps)))


def reading_factor(plan: Plan) -> int:
    """Patches that are pooled, along each axis, to keep the attention matrices small."""
    matrices = len(reading_steps(plan.steps)) * shown(plan) * (1 + plan.anchors)
    most = min(READING_PATCHES, (READING_BYTES / max(matrices, 1)) ** 0.5)
    h, w = plan.sizes[plan.unet.strides[-1]]
    return next(f for f in range(1, max(h, w) + 1) if math.ceil(h / f) * math.ceil(w / f) <= max(most, 1))


def pool_reading(read: Tensor, size: Size, factor: int) -> Tensor:
    """[P, 1 + A, P] -> [Q, 1 + A, K]: means over the queries of a block, sums over its keys."""
    keys = F.avg_pool2d(read.unflatten(-1, size), factor, ceil_mode=True, divisor_override=1).flatten(2)
    queries = rearrange(keys, "(h w) a k -> (a k) h w", h=size[0])
    pooled = F.avg_pool2d(queries, factor, ceil_mode=True, count_include_pad=False)
    return rearrange(pooled, "(a k) h w -> (h w) a k", a=read.shape[1])


def describe_run(plan: Plan, story: Story) -> dict[str, Any]:
    """What the page says about the run as a whole."""
    pictures = story.images[: shown(plan)]
    h, w = pictures.shape[1:3]
    return {
        "version": importlib.metadata.version("consistory"),
        "subject": story.subject.recipe.subject or ", ".join(story.concepts) or "a story",
        "concepts": story.concepts,
        "prompts": story.prompts[: shown(plan)],
        "seeds": story.seeds[: shown(plan)],
        "images": len(story.images),
        "pictures": [picture_uri(picture) for picture in pictures],
        "width": w,
        "height": h,
        "anchors": plan.anchors,
        "settings": story.settings,
        "timesteps": plan.timesteps,
        "fine": plan.sizes[plan.unet.strides[0]],
        "coarse": plan.sizes[plan.unet.strides[-1]],
        "sharing": plan.config.sdsa,
        "blend": [
            blend_weight(plan.config, step, plan.steps) if plan.config.sdsa and step else None
            for step in range(plan.steps)
        ],
        "injection": [plan.injection_steps.start, plan.injection_steps.stop - 1] if plan.config.injection else None,
        "dift": plan.dift_step if plan.config.injection else None,
    }


def add_masks(arrays: Arrays, name: str, notes: list[Note], plan: Plan) -> dict[str, Any]:
    """Masks at both resolutions and the map they come from; steps before the first mask are empty."""
    fine, coarse = plan.unet.strides[0], plan.unet.strides[-1]

    def masks(stride: int) -> Tensor:
        h, w = plan.sizes[stride]
        empty = torch.zeros(shown(plan), h * w, dtype=torch.bool, device="cpu")
        return torch.stack([empty if note.masks is None else note.masks[stride] for note in notes])

    def scaled(note: Note) -> Tensor:
        if note.cross_map is None:
            h, w = plan.sizes[coarse]
            return torch.zeros(shown(plan), h * w, dtype=torch.float32, device="cpu")
        least, most = (extreme(1, keepdim=True) for extreme in (note.cross_map.amin, note.cross_map.amax))
        return (note.cross_map - least) / (most - least).clamp(min=1e-12)

    arrays.add(f"{name}_fine", masks(fine))
    arrays.add(f"{name}_coarse", masks(coarse))
    arrays.add(f"{name}_map", to_bytes(torch.stack([scaled(note) for note in notes]), 1.0))
    return {"masked": [note.masks is not None for note in notes]}


def add_matches(arrays: Arrays, plan: Plan, story: Story) -> dict[str, Any] | None:
    """Nearest patches in every anchor, and which of them injection used."""
    if not story.nearest:
        return None
    fine, pictures = plan.unet.strides[0], shown(plan)
    nearest, mask = story.nearest[fine], story.masks[fine]
    injection = plan_injection(nearest, mask, plan.config.alpha)
    best = nearest.distance.amin(1)[:pictures]  # infinite where a picture is the only anchor
    most = best.where(best.isfinite(), 0.0).max().item() or 1.0
    arrays.add("match_index", nearest.index[:pictures])
    arrays.add("match_distance", to_bytes(nearest.distance[:pictures], most))
    arrays.add("match_anchor", injection.anchor[:pictures].to(torch.uint8))
    arrays.add("match_mask", mask[:pictures])
    arrays.add("match_injected", injection.mask[:pictures])
    thresholds = otsu_threshold(best).tolist()
    return {"largest": most, "thresholds": [value if math.isfinite(value) else None for value in thresholds]}


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_predictions(notes: list[Note], story: Story) -> list[list[str]]:
    """Predictions as pictures, data URIs [steps][E]: decoded if that is cheap, else by a linear map of the latents."""
    x0 = torch.stack([note.x0 for note in notes]).float()
    if decodes(story):
        pixels = story.subject.pipe.decode(x0.flatten(0, 1).to(story.latents.device))
    else:
        pixels = LatentColours.fit(story.latents.cpu(), story.images)(x0.flatten(0, 1))
    uris = [picture_uri(picture, quality=80) for picture in pixels]
    return [uris[start : start + x0.shape[1]] for start in range(0, len(uris), x0.shape[1])]


def decodes(story: Story) -> bool:
    """Whether predictions are decoded."""
    return max(story.images.shape[1:3]) <= DECODED


@dataclass(frozen=True)
class LatentColours:
    """A linear map from a latent's channels to the colour of its pixels, weights [C + 1, 3], the last row a constant.

    It is fitted to the story's own pictures, so it suits any autoencoder.
    """

    weights: Tensor

    @classmethod
    def fit(cls, latents: Tensor, images: Pixels) -> LatentColours:
        """Least squares between the last latents [N, C, h, w] and their pictures, uint8 [N, H, W, 3]."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        colours = F.interpolate(pixels, latents.shape[-2:], mode="area").permute(0, 2, 3, 1).reshape(-1, 3)
        return cls(torch.linalg.lstsq(_with_one(latents).flatten(0, 2), colours).solution)

    def __call__(self, latents: Tensor) -> Pixels:
        """Latents [B, C, h, w] -> uint8 [B, h, w, 3], at most 128 pixels a side."""
        factor = math.ceil(max(latents.shape[-2:]) / DECODED)
        colours = _with_one(F.avg_pool2d(latents, factor)) @ self.weights
        return colours.clamp(0, 255).round().to(torch.uint8).numpy()


def _with_one(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h, w, C + 1]."""
    return F.pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0)


def picture_uri(picture: NDArray[np.uint8], quality: int = 88) -> str:
    """uint8 [H, W, 3] -> a data URI: a PNG of a small picture at full quality, else a JPEG."""
    small = max(picture.shape[:2]) <= DECODED and quality > 80
    kind, data = ("png", encode_png(picture, {})) if small else ("jpeg", encode_jpeg(picture, quality))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# --- the file ---------------------------------------------------------------------------------------------------------


class Arrays:
    """Arrays of bytes or of 32-bit numbers, one after the other, and where each is."""

    def __init__(self) -> None:
        self.layout: dict[str, dict[str, Any]] = {}
        self.data = bytearray()

    def add(self, name: str, x: Tensor) -> None:
        size = 1 if x.dtype in (torch.uint8, torch.bool) else 4
        self.layout[name] = {"offset": len(self.data), "size": size, "shape": list(x.shape)}
        self.data += x.cpu().numpy().astype(f"<u{size}").tobytes()


def to_bytes(x: Tensor, largest: float) -> Tensor:
    """0 to `largest` -> 0 to 255."""
    return (x / largest * 255).clamp(0, 255).round().to(torch.uint8)


def fill_template(facts: dict[str, Any], arrays: Arrays) -> str:
    """The template with its three blanks, and the code it asks for, filled in."""
    template = resources.files("consistory").joinpath("explain.html").read_text("utf-8")
    template = re.sub("<!-- code: (.+) -->", lambda found: source_code(found[1]), template)
    record = json.dumps({**facts, "arrays": arrays.layout}, ensure_ascii=False, separators=(",", ":"))
    blanks = {
        "__TITLE__": html.escape(f"{facts['subject']}: a look inside"),
        "__FACTS__": record.replace("<", "\\u003c"),  # so that nothing in a prompt ends the element
        "__ARRAYS__": base64.b64encode(zlib.compress(arrays.data, 9)).decode(),
    }
    return "".join(blanks.get(part, part) for part in re.split("(__[A-Z]+__)", template))


def source_code(address: str) -> str:
    """Of a function or class, "module:name": an element to unfold."""
    module, name = address.split(":")
    title = f"{module.replace('.', '/')}.py: {name}".replace("consistory/kernels", "kernels")
    code = html.escape(textwrap.dedent(inspect.getsource(pkgutil.resolve_name(address))).rstrip())
    return (
        f'<details class="code"><summary><code>{title}</code></summary>'
        f'<pre tabindex="0" role="region" aria-label="Code of {name}">{code}</pre></details>'
    )
