"""The sprites world: cartoon scenes drawn with anti-aliased signed-distance shapes, and captions that describe them.

A scene has a setting and a subject whose colours, pattern, place, size and facing the caption mostly leaves open: what
a text-to-image model must invent for each picture, and what consistent generation must hold fixed between pictures.

Positions and distances are in scene units: the picture spans [0, 64] both ways, y pointing down, at any resolution. A
signed distance is negative inside its shape. Source of the shapes' formulas: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

SUBJECTS = ("cat", "robot", "bird", "fish", "snail", "rabbit", "ghost", "car")
SETTINGS = (
    "on the beach",
    "in the snow",
    "in the forest",
    "in the desert",
    "in the city at night",
    "in a meadow",
    "under the sea",
    "in space",
)
COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.54, 0.08),
    "yellow": (0.98, 0.89, 0.20),
    "green": (0.22, 0.66, 0.22),
    "cyan": (0.25, 0.84, 0.86),
    "blue": (0.14, 0.32, 0.88),
    "purple": (0.55, 0.20, 0.74),
    "pink": (0.99, 0.55, 0.76),
    "brown": (0.48, 0.27, 0.12),
    "white": (0.97, 0.97, 0.97),
    "grey": (0.56, 0.56, 0.58),
    "black": (0.17, 0.17, 0.19),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERNS = ("plain", "stripes", "spots", "belly")
# {a}: the subjects with "a" or "an"; {the}: with "the"; {bare}: without an article.
PHRASINGS = (
    "{a} {setting}",
    "{a} {setting}",
    "a picture of {a} {setting}",
    "a photo of {a} {setting}",
    "a drawing of the {bare} {setting}",
    "a cartoon of {a} {setting}",
    "the {bare} {setting}",
    "{bare}, {setting}",
)
COLOUR_NAMED = 0.25  # how often a caption names a subject's main colour

EXTENT = 64.0  # scene units across the picture
INK = (0.07, 0.05, 0.10)
OUTLINE = 1.2  # scene units
JITTERS = 8
CHUNK = 512  # scenes drawn at once on a CPU: keeps the working set in the cache

Distance = Tensor  # [B, R, R], or broadcastable to it
Value = Tensor | float  # a scalar for all samples, or [B, 1, 1]


@dataclass
class Scenes:
    """A batch of B scenes; every field is a tensor of length B.

    Indices are int64 into `SUBJECTS`, `SETTINGS`, `COLOUR_NAMES` and `PATTERNS`. x, y are the subject's centre and size
    its box, in scene units; facing is +1 (right) or -1 (left). Fields ending in 2 describe a second subject, absent
    where subject2 is -1. jitter [B, 8] in [0, 1) varies the background.
    """

    setting: Tensor
    jitter: Tensor
    subject: Tensor
    main: Tensor
    second: Tensor
    pattern: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    facing: Tensor
    subject2: Tensor
    main2: Tensor
    second2: Tensor
    pattern2: Tensor
    x2: Tensor
    y2: Tensor
    size2: Tensor
    facing2: Tensor

    def __len__(self) -> int:
        return len(self.setting)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))


class Figure(NamedTuple):
    """One subject per sample: the part of `Scenes` that draws it."""

    kind: Tensor
    main: Tensor
    second: Tensor
    pattern: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    facing: Tensor


class Layers(NamedTuple):
    """A subject's shapes in its own coordinates, painted in this order."""

    behind: Distance  # second colour
    body: Distance  # main colour, then the pattern
    belly: Distance  # what the pattern "belly" fills
    front: Distance  # second colour
    white: Distance
    ink: Distance


def sample_scenes(n: int, generator: torch.Generator, *, second_subject: float = 0.1) -> Scenes:
    """Draw n scenes, every property independent of the others (colours: main differs from second).

    Args:
        n: number of scenes.
        generator: a CPU generator; the scenes depend on nothing else.
        second_subject: probability of a second subject, of another kind. Both are then smaller and stand side by side.
    """

    def integers(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def another(values: Tensor, high: int) -> Tensor:
        return (values + 1 + integers(high - 1)) % high

    subject, main, main2 = integers(len(SUBJECTS)), integers(len(COLOURS)), integers(len(COLOURS))
    pair = torch.rand(n, generator=generator) < second_subject
    side = 2.0 * integers(2) - 1
    return Scenes(
        setting=integers(len(SETTINGS)),
        jitter=torch.rand(n, JITTERS, generator=generator),
        subject=subject,
        main=main,
        second=another(main, len(COLOURS)),
        pattern=integers(len(PATTERNS)),
        x=torch.where(pair, 32 + side * uniform(14, 17), uniform(20, 44)),
        y=torch.where(pair, uniform(34, 46), uniform(27, 42)),
        size=torch.where(pair, uniform(24, 28), uniform(28, 42)),
        facing=2.0 * integers(2) - 1,
        subject2=torch.where(pair, another(subject, len(SUBJECTS)), -1),
        main2=main2,
        second2=another(main2, len(COLOURS)),
        pattern2=integers(len(PATTERNS)),
        x2=32 - side * uniform(14, 17),
        y2=uniform(34, 46),
        size2=uniform(24, 28),
        facing2=2.0 * integers(2) - 1,
    )


def captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """Describe each scene in lower case: its subjects, its setting and, one time in four, a subject's main colour."""
    n = len(scenes)
    phrasings = torch.randint(len(PHRASINGS), (n,), generator=generator).tolist()
    named = (torch.rand(n, 2, generator=generator) < COLOUR_NAMED).tolist()
    properties = zip(
        scenes.setting.tolist(),
        scenes.subject.tolist(),
        scenes.main.tolist(),
        scenes.subject2.tolist(),
        scenes.main2.tolist(),
        strict=True,
    )
    result = []
    for phrasing, (named1, named2), (setting, subject, main, subject2, main2) in zip(
        phrasings, named, properties, strict=True
    ):
        nouns = [_noun(subject, main, named1)]
        if subject2 >= 0:
            nouns.append(_noun(subject2, main2, named2))
        result.append(
            PHRASINGS[phrasing].format(
                a=" and ".join(f"{_article(noun)} {noun}" for noun in nouns),
                bare=" and ".join(nouns),
                setting=SETTINGS[setting],
            )
        )
    return result


def render(scenes: Scenes, resolution: int = 64) -> tuple[Tensor, Tensor]:
    """Draw scenes, on the device they are on.

    Args:
        scenes: B scenes.
        resolution: R, pixels across the picture.

    Returns:
        images: [B, 3, R, R] float32 in [0, 1].
        masks: [B, R, R] bool, the first subject with its outline.
    """
    chunk = CHUNK if scenes.setting.device.type == "cpu" else len(scenes)
    drawn = [_render_chunk(scenes[start : start + chunk], resolution) for start in range(0, len(scenes), chunk)]
    images, masks = zip(*drawn, strict=True)
    return torch.cat(images), torch.cat(masks)


def _noun(subject: int, main: int, named: bool) -> str:
    return f"{COLOUR_NAMES[main]} {SUBJECTS[subject]}" if named else SUBJECTS[subject]


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _render_chunk(scenes: Scenes, resolution: int) -> tuple[Tensor, Tensor]:
    device = scenes.setting.device
    pixel = EXTENT / resolution
    centres = (torch.arange(resolution, device=device) + 0.5) * pixel
    x, y = centres[None, None, :], centres[None, :, None]

    images = torch.empty(len(scenes), 3, resolution, resolution, device=device)
    for setting, background in enumerate(BACKGROUNDS):
        index = (scenes.setting == setting).nonzero().flatten()
        if len(index):
            images[index] = background(Canvas(len(index), x, y, pixel), _jitter(scenes.jitter[index])).image

    s = scenes
    second = Figure(s.subject2, s.main2, s.second2, s.pattern2, s.x2, s.y2, s.size2, s.facing2)
    first = Figure(s.subject, s.main, s.second, s.pattern, s.x, s.y, s.size, s.facing)
    _draw_figures(images, second, x, y, pixel)
    masks = _draw_figures(images, first, x, y, pixel)
    return images, masks


def _jitter(jitter: Tensor) -> list[Tensor]:
    return [column[:, None, None] for column in jitter.unbind(1)]


def _draw_figures(images: Tensor, figure: Figure, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Draw the figures into images [B, 3, R, R] in place; return their masks [B, R, R]."""
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    masks = torch.zeros_like(images[:, 0], dtype=torch.bool)
    for kind, shape in enumerate(SHAPES):
        index = (figure.kind == kind).nonzero().flatten()
        if len(index) == 0:
            continue
        one = Figure(*(field[index] for field in figure))
        size = one.size[:, None, None]
        u = (x - one.x[:, None, None]) * one.facing[:, None, None] / size
        v = (y - one.y[:, None, None]) / size
        layers = shape(u, v)
        silhouette = _union(layers.behind, layers.body, layers.front, layers.white, layers.ink) * size - OUTLINE
        patterned = torch.maximum(layers.body, _pattern(one.pattern[:, None, None], layers.belly, u, v))

        canvas = Canvas(len(index), x, y, pixel, images[index])
        canvas.paint(silhouette, INK)
        canvas.paint(layers.behind * size, palette[one.second])
        canvas.paint(layers.body * size, palette[one.main])
        canvas.paint(patterned * size, palette[one.second])
        canvas.paint(layers.front * size, palette[one.second])
        canvas.paint(layers.white * size, (1.0, 1.0, 1.0))
        canvas.paint(layers.ink * size, INK)
        images[index] = canvas.image
        masks[index] = silhouette < 0
    return masks


def _pattern(pattern: Tensor, belly: Distance, u: Tensor, v: Tensor) -> Distance:
    """Distance to what is painted in the second colour over the body; pattern [B, 1, 1]."""
    plain, stripes, spots = (pattern == PATTERNS.index(name) for name in ("plain", "stripes", "spots"))
    distance = torch.where(stripes, _stripes(u, 0.26, 0.075), belly)
    distance = torch.where(spots, _spots(u, v, 0.26, 0.07), distance)
    return torch.where(plain, 1.0, distance)


# Shapes. u, v: coordinates [B, 1, R] and [B, R, 1]; a shape's own numbers are in the same units.


def _union(*distances: Distance) -> Distance:
    return reduce(torch.minimum, distances)


def _circle(u: Tensor, v: Tensor, cx: Value, cy: Value, radius: Value) -> Distance:
    return ((u - cx) ** 2 + (v - cy) ** 2).sqrt() - radius


def _ellipse(u: Tensor, v: Tensor, cx: Value, cy: Value, rx: float, ry: float) -> Distance:
    du, dv = (u - cx) / rx, (v - cy) / ry
    scaled = (du**2 + dv**2).sqrt()
    slope = ((du / rx) ** 2 + (dv / ry) ** 2).sqrt()
    return scaled * (scaled - 1) / slope.clamp_min(1e-3)


def _box(u: Tensor, v: Tensor, cx: Value, cy: Value, half_width: Value, half_height: Value, corner: float) -> Distance:
    qu, qv = (u - cx).abs() - half_width + corner, (v - cy).abs() - half_height + corner
    outside = (qu.clamp_min(0) ** 2 + qv.clamp_min(0) ** 2).sqrt()
    return outside + torch.maximum(qu, qv).clamp_max(0) - corner


def _capsule(u: Tensor, v: Tensor, ax: Value, ay: Value, bx: Value, by: Value, radius: Value) -> Distance:
    du, dv = bx - ax, by - ay
    along = (((u - ax) * du + (v - ay) * dv) / (du * du + dv * dv)).clamp(0, 1)
    return ((u - ax - along * du) ** 2 + (v - ay - along * dv) ** 2).sqrt() - radius


def _polygon(u: Tensor, v: Tensor, *corners: tuple[Value, Value]) -> Distance:
    """A convex polygon, corners clockwise on the screen."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        du, dv = bx - ax, by - ay
        length = (du * du + dv * dv) ** 0.5
        edges.append((u - ax) * (dv / length) - (v - ay) * (du / length))
    return reduce(torch.maximum, edges)


def _stripes(u: Tensor, period: float, width: float) -> Distance:
    return (torch.remainder(u + period / 2, period) - period / 2).abs() - width / 2


def _spots(u: Tensor, v: Tensor, period: float, radius: float) -> Distance:
    """Discs on a triangular lattice: two rectangular lattices, one in the middle of the other's cells."""
    height = period * math.sqrt(3)

    def lattice(cu: float, cv: float) -> Distance:
        du = torch.remainder(u - cu + period / 2, period) - period / 2
        dv = torch.remainder(v - cv + height / 2, height) - height / 2
        return (du**2 + dv**2).sqrt() - radius

    return torch.minimum(lattice(0, 0), lattice(period / 2, height / 2))


def _ring(disc: Distance, half_width: float) -> Distance:
    return disc.abs() - half_width


def _eyes(u: Tensor, v: Tensor, left: float, right: float, height: float, radius: float) -> tuple[Distance, Distance]:
    """Two round eyes (white) whose pupils (ink) look the way the subject faces."""
    white = _union(_circle(u, v, left, height, radius), _circle(u, v, right, height, radius))
    shift, pupil = 0.25 * radius, 0.6 * radius
    ink = _union(_circle(u, v, left + shift, height, pupil), _circle(u, v, right + shift, height, pupil))
    return white, ink


# Subjects, in coordinates where the subject's box is [-0.5, 0.5] and it faces right.


def _cat(u: Tensor, v: Tensor) -> Layers:
    white, pupils = _eyes(u, v, -0.06, 0.19, -0.15, 0.075)
    nose = _polygon(u, v, (0.02, -0.06), (0.12, -0.06), (0.07, -0.005))
    return Layers(
        behind=_union(
            _polygon(u, v, (-0.20, -0.50), (0.03, -0.28), (-0.24, -0.14)),
            _polygon(u, v, (0.33, -0.50), (0.36, -0.14), (0.10, -0.28)),
        ),
        body=_union(
            _ellipse(u, v, 0.06, -0.12, 0.32, 0.23),
            _ellipse(u, v, 0.0, 0.24, 0.26, 0.25),
            _capsule(u, v, -0.20, 0.40, -0.40, 0.30, 0.06),
            _capsule(u, v, -0.40, 0.30, -0.42, 0.02, 0.06),
        ),
        belly=_ellipse(u, v, 0.05, 0.26, 0.15, 0.17),
        front=_union(_ellipse(u, v, -0.10, 0.45, 0.10, 0.055), _ellipse(u, v, 0.17, 0.45, 0.10, 0.055)),
        white=white,
        ink=torch.minimum(pupils, nose),
    )


def _robot(u: Tensor, v: Tensor) -> Layers:
    white, pupils = _eyes(u, v, -0.10, 0.12, -0.24, 0.075)
    mirrored = u.abs()
    return Layers(
        behind=_union(
            _circle(u, v, 0.0, -0.46, 0.055),
            _box(u, v, 0.0, -0.40, 0.025, 0.06, 0.0),
            _box(mirrored, v, 0.36, 0.12, 0.065, 0.17, 0.03),
        ),
        body=_union(
            _box(u, v, 0.0, -0.21, 0.26, 0.16, 0.04),
            _box(u, v, 0.0, 0.16, 0.27, 0.20, 0.04),
            _box(mirrored, v, 0.14, 0.43, 0.085, 0.09, 0.03),
        ),
        belly=_box(u, v, 0.0, 0.17, 0.17, 0.12, 0.02),
        front=_box(mirrored, v, 0.27, -0.21, 0.035, 0.07, 0.0),
        white=white,
        ink=torch.minimum(pupils, _box(u, v, 0.01, -0.11, 0.11, 0.022, 0.0)),
    )


def _bird(u: Tensor, v: Tensor) -> Layers:
    eye = _circle(u, v, 0.24, -0.24, 0.08)
    return Layers(
        behind=_union(
            _polygon(u, v, (-0.52, -0.20), (-0.20, -0.02), (-0.20, 0.16), (-0.50, 0.08)),
            _polygon(u, v, (0.33, -0.28), (0.53, -0.16), (0.33, -0.10)),
            _polygon(u, v, (0.02, -0.50), (0.22, -0.38), (0.06, -0.28)),
        ),
        body=_union(_ellipse(u, v, -0.03, 0.08, 0.34, 0.29), _circle(u, v, 0.18, -0.20, 0.22)),
        belly=_ellipse(u, v, 0.10, 0.16, 0.18, 0.17),
        front=_ellipse(u, v, -0.16, 0.03, 0.15, 0.085),
        white=eye,
        ink=_union(
            _circle(u, v, 0.26, -0.24, 0.045),
            _capsule(u, v, -0.09, 0.34, -0.09, 0.47, 0.02),
            _capsule(u, v, 0.07, 0.34, 0.07, 0.47, 0.02),
        ),
    )


def _fish(u: Tensor, v: Tensor) -> Layers:
    return Layers(
        behind=_union(
            _polygon(u, v, (-0.52, -0.26), (-0.20, 0.0), (-0.52, 0.26)),
            _polygon(u, v, (-0.10, -0.42), (0.20, -0.20), (-0.14, -0.18)),
        ),
        body=_ellipse(u, v, 0.08, 0.0, 0.41, 0.27),
        belly=_ellipse(u, v, 0.10, 0.13, 0.26, 0.11),
        front=_ellipse(u, v, 0.0, 0.04, 0.09, 0.055),
        white=_circle(u, v, 0.29, -0.07, 0.085),
        ink=_union(_circle(u, v, 0.31, -0.07, 0.048), _capsule(u, v, 0.36, 0.09, 0.45, 0.07, 0.018)),
    )


def _snail(u: Tensor, v: Tensor) -> Layers:
    white, pupils = _eyes(u, v, 0.25, 0.44, -0.32, 0.075)
    shell = _circle(u, v, -0.10, -0.03, 0.36)
    return Layers(
        behind=_union(
            _capsule(u, v, 0.35, -0.05, 0.25, -0.30, 0.03),
            _capsule(u, v, 0.35, -0.05, 0.44, -0.30, 0.03),
        ),
        body=_union(
            shell,
            _capsule(u, v, -0.40, 0.38, 0.30, 0.38, 0.09),
            _capsule(u, v, 0.32, 0.36, 0.36, -0.02, 0.10),
        ),
        belly=shell + 0.16,
        front=_ring(shell + 0.04, 0.04),
        white=white,
        ink=torch.minimum(pupils, _ring(shell, 0.018)),
    )


def _rabbit(u: Tensor, v: Tensor) -> Layers:
    white, pupils = _eyes(u, v, -0.05, 0.15, -0.04, 0.065)
    return Layers(
        behind=_union(
            _circle(u, v, -0.27, 0.32, 0.11),
            _ellipse(u, v, -0.12, 0.46, 0.13, 0.055),
            _ellipse(u, v, 0.16, 0.46, 0.13, 0.055),
        ),
        body=_union(
            _capsule(u, v, -0.07, -0.15, -0.14, -0.41, 0.09),
            _capsule(u, v, 0.15, -0.15, 0.21, -0.41, 0.09),
            _circle(u, v, 0.04, -0.03, 0.21),
            _ellipse(u, v, 0.0, 0.28, 0.25, 0.20),
        ),
        belly=_ellipse(u, v, 0.04, 0.29, 0.15, 0.14),
        front=_union(
            _capsule(u, v, -0.09, -0.22, -0.13, -0.39, 0.042),
            _capsule(u, v, 0.16, -0.22, 0.20, -0.39, 0.042),
        ),
        white=white,
        ink=torch.minimum(pupils, _ellipse(u, v, 0.06, 0.06, 0.04, 0.028)),
    )


def _ghost(u: Tensor, v: Tensor) -> Layers:
    white, pupils = _eyes(u, v, -0.11, 0.15, -0.12, 0.085)
    sheet = _box(u, v, 0.0, 0.08, 0.33, 0.40, 0.30)
    hem = _box(u, v, 0.0, 0.25, 0.33, 0.16, 0.0)
    scallops = _union(*(_circle(u, v, centre, 0.46, 0.10) for centre in (-0.22, 0.0, 0.22)))
    return Layers(
        behind=_union(
            _capsule(u.abs(), v, 0.30, 0.08, 0.42, 0.00, 0.07),
            _polygon(u, v, (0.0, -0.54), (0.19, -0.24), (-0.19, -0.24)),
        ),
        body=torch.maximum(torch.minimum(sheet, hem), -scallops),
        belly=_ellipse(u, v, 0.02, 0.22, 0.20, 0.14),
        front=_ellipse(u.abs() - 0.02, v, 0.20, 0.0, 0.06, 0.035),
        white=white,
        ink=torch.minimum(pupils, _ellipse(u, v, 0.03, 0.04, 0.05, 0.04)),
    )


def _car(u: Tensor, v: Tensor) -> Layers:
    wheels = _circle(u.abs(), v, 0.29, 0.26, 0.0)
    window_back = _polygon(u, v, (-0.19, -0.27), (-0.04, -0.27), (-0.04, -0.13), (-0.25, -0.13))
    window_front = _polygon(u, v, (0.01, -0.27), (0.11, -0.27), (0.20, -0.13), (0.01, -0.13))
    return Layers(
        behind=_polygon(u, v, (-0.24, -0.34), (0.16, -0.34), (0.31, -0.05), (-0.35, -0.05)),
        body=_box(u, v, 0.0, 0.08, 0.52, 0.185, 0.08),
        belly=_ellipse(u, v, 0.0, 0.09, 0.34, 0.10),
        front=wheels - 0.085,
        white=_union(window_back, window_front, _circle(u, v, 0.47, 0.05, 0.05)),
        ink=_ring(wheels - 0.11, 0.03),
    )


SHAPES: tuple[Callable[[Tensor, Tensor], Layers], ...] = (_cat, _robot, _bird, _fish, _snail, _rabbit, _ghost, _car)


class Canvas:
    """Pictures under the brush.

    Attributes:
        x, y: scene coordinates of the pixels' centres, [1, 1, R] and [1, R, 1].
        image: [B, 3, R, R] in [0, 1].
    """

    def __init__(self, count: int, x: Tensor, y: Tensor, pixel: float, image: Tensor | None = None) -> None:
        self.count, self.x, self.y, self.pixel = count, x, y, pixel
        self.image = torch.empty(count, 3, y.shape[1], x.shape[2], device=x.device) if image is None else image

    def gradient(self, top: tuple[float, float, float], bottom: tuple[float, float, float]) -> None:
        """Fill the pictures from the colour at the top to the one at the bottom."""
        above, below = (self._colour(colour) for colour in (top, bottom))
        self.image[:] = torch.lerp(above, below, self.y[:, None] / EXTENT)

    def paint(self, distance: Distance, colour: tuple[float, float, float] | Tensor) -> None:
        """Fill a shape with a colour, per sample if [B, 3]; its edge is blended over one pixel."""
        cover = (0.5 - distance / self.pixel).clamp(0, 1)[:, None]
        self.image = torch.lerp(self.image, self._colour(colour), cover)

    def _colour(self, colour: tuple[float, float, float] | Tensor) -> Tensor:
        return torch.as_tensor(colour, device=self.image.device).reshape(-1, 3, 1, 1)


# Settings. j: jitter, 8 tensors [B, 1, 1] in [0, 1).


def _hills(canvas: Canvas, level: Value, height: Value, phase: Value, length: float) -> Distance:
    """Everything below a wavy line: vertical distance, which is close enough for gentle slopes."""
    return level + height * torch.sin(canvas.x * (2 * math.pi / length) + 2 * math.pi * phase) - canvas.y


def _side(jitter: Tensor) -> Tensor:
    return torch.where(jitter < 0.5, -1.0, 1.0)


def _scatter(canvas: Canvas, cell: float, seed: Tensor, radius: float) -> Distance:
    """One disc per cell of a grid, displaced within the cell by a hash of the cell and the sample's seed."""
    column, row = torch.floor(canvas.x / cell), torch.floor(canvas.y / cell)
    angle = 127.1 * column + 311.7 * row + 90.0 * seed
    du = canvas.x - (column + 0.5 + 0.35 * torch.sin(angle)) * cell
    dv = canvas.y - (row + 0.5 + 0.35 * torch.sin(1.7 * angle + 1.0)) * cell
    return (du**2 + dv**2).sqrt() - radius


def _beach(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    side = _side(j[0])
    canvas.gradient((0.45, 0.76, 0.95), (0.80, 0.93, 0.98))
    canvas.paint(_circle(x, y, 32 - side * (10 + 14 * j[1]), 8 + 6 * j[2], 5.5), (1.0, 0.90, 0.45))
    canvas.paint(24 + 4 * j[3] - y, (0.16, 0.55, 0.78))
    canvas.paint(_hills(canvas, 40 + 4 * j[4], 1.5, j[5], 48), (0.96, 0.86, 0.62))
    root, top = 32 + side * 25, 32 + side * (20 + 5 * j[6])
    crown = 12 + 5 * j[7]
    canvas.paint(_capsule(x, y, root, 50.0, top, crown, 1.7), (0.55, 0.37, 0.20))
    leaves = [_capsule(x, y, top, crown, top + du, crown + dv, 1.9) for du, dv in PALM_LEAVES]
    canvas.paint(_union(*leaves), (0.20, 0.58, 0.30))
    return canvas


PALM_LEAVES = ((-11.0, 4.0), (-8.0, -5.0), (0.0, -8.0), (8.0, -5.0), (11.0, 4.0))


def _snow(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    canvas.gradient((0.55, 0.66, 0.80), (0.82, 0.88, 0.95))
    canvas.paint(_hills(canvas, 30 + 4 * j[0], 4.0, j[1], 44), (0.78, 0.86, 0.95))
    tree = 32 + _side(j[2]) * (18 + 9 * j[3])
    canvas.paint(_box(x, y, tree, 41.0, 1.6, 4.0, 0.0), (0.40, 0.28, 0.20))
    for apex, half_width, height in ((23.0, 9.0, 16.0), (16.0, 7.5, 14.0), (10.0, 5.5, 12.0)):
        branches = _polygon(x, y, (tree, apex), (tree + half_width, apex + height), (tree - half_width, apex + height))
        canvas.paint(branches, (0.25, 0.45, 0.42))
    canvas.paint(_polygon(x, y, (tree, 10.0), (tree + 2.5, 15.5), (tree - 2.5, 15.5)), (0.97, 0.98, 1.0))
    canvas.paint(_hills(canvas, 44 + 4 * j[4], 2.5, j[5], 70), (0.96, 0.97, 1.0))
    canvas.paint(_scatter(canvas, 15.0, j[6], 1.8), (1.0, 1.0, 1.0))
    return canvas


def _forest(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    canvas.gradient((0.62, 0.80, 0.52), (0.52, 0.72, 0.44))
    trunks = [_box(x, y, 6.0 + 17 * i + 6 * j[i], 34.0, 2.6, 24.0, 0.0) for i in range(4)]
    canvas.paint(_union(*trunks), (0.42, 0.28, 0.17))
    crowns = [_circle(x, y, 6.0 + 17 * i + 6 * j[i], 6.0 + 5 * j[i + 4], 11.5) for i in range(4)]
    canvas.paint(_union(*crowns), (0.13, 0.40, 0.20))
    canvas.paint(_hills(canvas, 47 + 3 * j[4], 1.8, j[5], 40), (0.26, 0.42, 0.20))
    return canvas


def _desert(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    side = _side(j[0])
    canvas.gradient((0.98, 0.72, 0.45), (0.99, 0.90, 0.66))
    canvas.paint(_circle(x, y, 32 - side * (8 + 16 * j[1]), 9 + 6 * j[2], 6.5), (0.99, 0.96, 0.82))
    canvas.paint(_hills(canvas, 33 + 4 * j[3], 4.5, j[4], 56), (0.87, 0.60, 0.33))
    stem = 32 + side * (21 + 6 * j[5])
    canvas.paint(
        _union(
            _capsule(x, y, stem, 16.0, stem, 50.0, 3.0),
            _capsule(x, y, stem - 7, 24.0, stem - 7, 31.0, 1.9),
            _capsule(x, y, stem - 7, 31.0, stem, 33.0, 1.9),
            _capsule(x, y, stem + 7, 20.0, stem + 7, 27.0, 1.9),
            _capsule(x, y, stem + 7, 27.0, stem, 29.0, 1.9),
        ),
        (0.28, 0.52, 0.30),
    )
    canvas.paint(_hills(canvas, 46 + 4 * j[6], 3.0, j[7], 76), (0.94, 0.72, 0.42))
    return canvas


def _city(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    canvas.gradient((0.10, 0.12, 0.34), (0.28, 0.28, 0.56))
    moon = 10 + 44 * j[0]
    canvas.paint(_circle(x, y, moon, 8.5, 5.0), (0.97, 0.95, 0.78))
    towers = _union(*(_box(x, y, 5.5 + 10.8 * i, 56.0, 4.6, 22 + 18 * j[i + 1], 0.0) for i in range(6)))
    canvas.paint(towers, (0.17, 0.17, 0.32))
    du = (torch.remainder(x - 0.1, 5.4) - 2.7).abs() - 1.2
    dv = (torch.remainder(y + 4, 8.0) - 4.0).abs() - 2.0
    windows = torch.maximum(torch.maximum(du, dv), towers + 1.0)
    canvas.paint(windows, (0.99, 0.82, 0.38))
    canvas.paint(50 + 2 * j[7] - y, (0.32, 0.32, 0.38))
    return canvas


def _meadow(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    canvas.gradient((0.50, 0.78, 0.98), (0.86, 0.95, 1.0))
    cloud, height = 14 + 36 * j[0], 9 + 5 * j[1]
    canvas.paint(
        _union(
            _circle(x, y, cloud, height - 1.5, 5.0),
            _circle(x, y, cloud - 6, height + 1, 3.8),
            _circle(x, y, cloud + 6, height + 1, 3.8),
        ),
        (1.0, 1.0, 1.0),
    )
    canvas.paint(_hills(canvas, 29 + 4 * j[2], 3.0, j[3], 60), (0.48, 0.76, 0.34))
    grass = _hills(canvas, 38 + 3 * j[4], 2.0, j[5], 80)
    canvas.paint(grass, (0.58, 0.84, 0.38))
    flowers = _scatter(canvas, 15.0, j[6], 3.0)
    canvas.paint(torch.maximum(flowers, grass + 2), (0.96, 0.45, 0.62))
    canvas.paint(torch.maximum(flowers + 1.7, grass + 2), (1.0, 0.92, 0.40))
    return canvas


def _sea(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    canvas.gradient((0.30, 0.74, 0.84), (0.06, 0.32, 0.56))
    bubbles = _scatter(canvas, 21.0, j[0], 3.2)
    canvas.paint(_ring(bubbles, 0.8), (0.80, 0.95, 1.0))
    for i in range(3):
        root = 7 + 24 * i + 8 * (j[i + 1] - 0.5)
        sway = 2.2 * torch.sin(y / 4 + 2 * math.pi * j[i + 1])
        top = 26 + 14 * j[i + 4]
        weed = torch.maximum((x - root - sway).abs() - 1.7, top - y)
        canvas.paint(weed, (0.12, 0.55, 0.36))
    canvas.paint(_hills(canvas, 54 + 2 * j[7], 1.8, j[7], 44), (0.80, 0.74, 0.56))
    return canvas


def _space(canvas: Canvas, j: list[Tensor]) -> Canvas:
    x, y = canvas.x, canvas.y
    side = _side(j[0])
    canvas.gradient((0.10, 0.06, 0.24), (0.27, 0.13, 0.42))
    canvas.paint(_scatter(canvas, 14.0, j[1], 1.2), (0.95, 0.95, 1.0))
    cx, cy = 32 + side * (14 + 10 * j[2]), 11 + 6 * j[3]
    canvas.paint(_circle(x, y, cx, cy, 7.0), (0.85, 0.50, 0.38))
    rotated_x, rotated_y = (x - cx) + 0.35 * (y - cy), (y - cy) - 0.35 * (x - cx)
    canvas.paint(_ring(_ellipse(rotated_x, rotated_y, 0.0, 0.0, 12.5, 2.8), 0.7), (0.96, 0.85, 0.60))
    canvas.paint(_circle(x, y, 32 - side * (16 + 10 * j[4]), 50 + 6 * j[5], 5.0), (0.45, 0.50, 0.66))
    return canvas


BACKGROUNDS: tuple[Callable[[Canvas, list[Tensor]], Canvas], ...] = (
    _beach,
    _snow,
    _forest,
    _desert,
    _city,
    _meadow,
    _sea,
    _space,
)
