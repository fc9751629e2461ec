"""Race the kernels against their peers: right first, then how fast.

    python bench/kernels.py                       # all operators, shapes that suit the device
    python bench/kernels.py --operator match      # one of them
    python bench/kernels.py --quick               # the smallest shape of each, few rounds: does everything run?
    python bench/kernels.py --tiles               # on a GPU: which blocks suit attention best, what options cost
    ncu ... python bench/kernels.py --profile     # on a GPU: attention alone, for a profiler (see bench/gpu.sh)

A table on screen; JSON and a plot in bench/results/, or in the folder of `--out`. Every contender is compared with
float32 before it is timed: one that is off by more than its precision allows gets no time. "floor" is what the user
knows: plain self-attention, bare matrix products, attention without maps, a copy. "x ours" is in units of the faster of
`fused` and `packed`. Times are medians of rounds in which all contenders take turns. TFLOP/s count the kept keys only:
whoever multiplies more does not score more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Call, machine, median_seconds, peak_bytes, write
from peers import CONTENDERS, Attention, Cross, Inject, Match, Unavailable
from torch import Tensor

from consistory.kernels.correspondence import reference as match_reference
from consistory.kernels.cross_attention import reference as cross_reference
from consistory.kernels.extended_attention import reference as attention_reference
from consistory.kernels.injection import inject

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative error, root mean square
OURS = ("fused", "packed")


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; how much of an anchor its subject covers, and how much of that dropout takes away."""

    images: int
    patches: int
    heads: int
    head_size: int = 64
    subject: float = 0.25
    dropout: float = 0.5
    anchors: int = 2
    halves: int = 2


LAYERS = (Shape(images=4, patches=1024, heads=20), Shape(images=4, patches=4096, heads=10))  # SDXL's, of four images


@dataclass
class Row:
    """One contender on one shape. Without `seconds` it did not run, or was wrong: `note` says why."""

    operator: str
    contender: str
    shape: dict[str, float]
    error: float | None = None
    seconds: float | None = None
    tflops: float | None = None
    peak_bytes: int | None = None
    note: str = ""


def shapes(device: str, quick: bool, masked: bool) -> list[Shape]:
    """SDXL's layers on a GPU, a tenth of their heads on a CPU: over the number of images, then over the kept share."""
    layers = [(1024, 20), (4096, 10)] if device == "cuda" else [(1024, 2), (4096, 2)]
    if quick:
        return [Shape(images=3, patches=256, heads=2)]
    many = [3, 4, 8, 16] if device == "cuda" else [3, 4, 8]
    kept = [(subject, dropout) for subject in (0.10, 0.25, 0.50) for dropout in (0.5, 0.0)] if masked else []
    over_images = [Shape(n, patches, heads) for patches, heads in layers for n in many]
    over_kept = [Shape(4, patches, heads, subject=s, dropout=d) for patches, heads in layers for s, d in kept]
    if device == "cpu":  # the large layer takes seconds a call: only the figure that is published
        over_images = [s for s in over_images if s.patches < 4096 or s.images == 4]
        over_kept = [s for s in over_kept if s.patches < 4096]
    return list(dict.fromkeys(over_images + over_kept))


# --- problems ---------------------------------------------------------------------------------------------------------


def blobs(shape: Shape, draws: torch.Generator) -> Tensor:
    """bool [A, P]: an ellipse somewhere near the middle of each anchor, some of it dropped."""
    side = math.isqrt(shape.patches)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    masks = []
    for _ in range(shape.anchors):
        cy, cx, stretch = torch.rand(3, generator=draws).tolist()
        radius, stretch = math.sqrt(shape.subject / math.pi), 0.8 + 0.4 * stretch
        cy, cx = 0.4 + 0.2 * cy, 0.4 + 0.2 * cx
        masks.append(((y - cy) / stretch) ** 2 + ((x - cx) * stretch) ** 2 < radius**2)
    subject = torch.stack(masks).flatten(1)
    return subject & (torch.rand(subject.shape, generator=draws) >= shape.dropout)


def attention(shape: Shape, device: str, dtype: torch.dtype) -> Attention:
    draws = torch.Generator().manual_seed(0)
    size = (shape.halves, shape.images, shape.patches, shape.heads, shape.head_size)
    q, k, v = (torch.randn(size, generator=draws).to(device, dtype).transpose(2, 3) for _ in range(3))
    share = ~torch.eye(shape.images, shape.anchors, dtype=torch.bool, device=device)
    return Attention(q, k, v, blobs(shape, draws).to(device), share)


def matching(shape: Shape, device: str, dtype: torch.dtype) -> Match:
    """DIFT features of SDXL: 1280 channels, a quarter of them on a CPU."""
    draws = torch.Generator().manual_seed(0)
    channels = 1280 if device == "cuda" else 320
    target = torch.randn(shape.images, shape.patches, channels, generator=draws).to(device, dtype)
    return Match(target, target[: shape.anchors], blobs(shape, draws).to(device))


def crossing(shape: Shape, device: str, dtype: torch.dtype) -> Cross:
    """The conditional half, 77 tokens, one concept of two tokens."""
    draws = torch.Generator().manual_seed(0)
    size = (shape.images, shape.patches, shape.heads, shape.head_size)
    q = torch.randn(size, generator=draws).to(device, dtype).transpose(1, 2)
    k, v = (torch.randn(size[0], 77, *size[2:], generator=draws).to(device, dtype).transpose(1, 2) for _ in range(2))
    weights = torch.zeros(shape.images, 77, 1, device=device)
    weights[:, 2:4] = 0.5
    return Cross(q, k, v, weights)


def injection(shape: Shape, device: str, dtype: torch.dtype) -> Inject:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(shape.images, shape.patches, shape.heads * shape.head_size, generator=draws).to(device, dtype)
    index = torch.randint(shape.patches, x.shape[:2], generator=draws).to(device)
    image = torch.randint(shape.anchors, x.shape[:2], generator=draws).to(device)
    mask = (torch.rand(x.shape[:2], generator=draws) < shape.subject).to(device)
    return Inject(x, index, image, mask, 0.8, shape.anchors)


# --- correctness: error against float32, on a part that fits in memory ------------------------------------------------


def relative(out: Tensor, exact: Tensor) -> float:
    return ((out.float() - exact.float()).norm() / exact.float().norm()).item()


def attention_error(a: Attention, out: Tensor) -> float:
    """An anchor and the last image, one head of the second half: every kind of query, in float32."""
    some = [0, len(a.share) - 1]
    part = (a.q[1:, some, :1], a.k[1:, some, :1], a.v[1:, some, :1], a.k[1:, : a.anchors, :1], a.v[1:, : a.anchors, :1])
    exact = attention_reference.extended_attention(*(x.float() for x in part), a.key_mask, a.share[some])
    return relative(out[1:, some, :1], exact)


def match_error(m: Match, out: tuple[Tensor, Tensor]) -> float:
    """Distances, of the patches the indices name: near ties may go either way."""
    index, distance = out
    exact = match_reference.match(m.target[-1:], m.source, m.source_mask)[1]
    target, source = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (m.target[-1:], m.source))
    named = torch.stack([1 - (target[0] * source[s][index[-1, s]]).sum(-1) for s in range(len(source))])
    return max(relative(distance[-1:], exact), relative(named[None], exact))


def cross_error(c: Cross, out: tuple[Tensor, Tensor]) -> float:
    exact = cross_reference.cross_attention(c.q[:1].float(), c.k[:1].float(), c.v[:1].float(), c.token_weights[:1])
    return max(relative(out[0][:1], exact[0]), relative(out[1][:1], exact[1]))


def injection_error(i: Inject, out: Tensor) -> float:
    return relative(out, inject(i.x.float(), *i.arguments()[1:], backend="reference"))


@dataclass(frozen=True)
class Operator:
    """How to make a problem of a shape, and how far a result is off. masked: whether the kept share plays a part."""

    problem: Callable[[Shape, str, torch.dtype], Any]
    error: Callable[[Any, Any], float]
    masked: bool = True


OPERATORS = {  # the one whose peers take long to compile comes last
    "match": Operator(matching, match_error),
    "cross_attention": Operator(crossing, cross_error, masked=False),
    "injection": Operator(injection, injection_error, masked=False),
    "extended_attention": Operator(attention, attention_error),
}


# --- the race ---------------------------------------------------------------------------------------------------------


def race(operator: str, shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Every contender on one shape."""
    problem = OPERATORS[operator].problem(shape, device, dtype)
    rows = {name: Row(operator, name, asdict(shape)) for name in CONTENDERS[operator]}
    calls: dict[str, Call] = {}
    for name, row in rows.items():
        call = _prepared(name, operator, problem, dtype, row)
        if call is not None:
            calls[name] = call
            row.peak_bytes = peak_bytes(call, device)
    for name, seconds in median_seconds(calls, rounds, device).items():
        rows[name].seconds = seconds
        if isinstance(problem, Attention) and name != "floor":
            rows[name].tflops = problem.flops() / seconds / 1e12
    return list(rows.values())


def _prepared(name: str, operator: str, problem: Any, dtype: torch.dtype, row: Row) -> Call | None:
    """The contender, once it has given the right answer. A peer that fails is noted; ours must not fail."""
    try:
        call = CONTENDERS[operator][name](problem)
        out = call()
    except Exception as failure:
        if name in OURS and not isinstance(failure, Unavailable):
            raise
        row.note = f"did not run: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}"
        return None
    if name == "floor":
        return call
    row.error = OPERATORS[operator].error(problem, out)
    if not row.error <= TOLERANCE[dtype]:
        row.note = "WRONG"
        if name in OURS:
            raise SystemExit(f"{operator}, {name}: error {row.error} on {row.shape}")
        return None
    return call


TILES = [  # queries, keys, warps, stages, registers
    (64, 64, 4, 3, 128), (64, 64, 4, 3, None), (64, 64, 4, 2, 128), (64, 64, 4, 4, 128), (64, 32, 4, 4, 96),
    (64, 128, 4, 2, 168), (128, 64, 8, 3, 128), (128, 64, 8, 3, None), (128, 128, 8, 2, None),
]  # fmt: skip


def best_tiles(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Attention with other blocks than `tile_for` chooses, and what options cost, packing included; fastest first."""
    from consistory.kernels.extended_attention import fused

    a = attention(shape, device, dtype)
    anchor_k, anchor_v = a.k[:, : a.anchors], a.v[:, : a.anchors]
    attend = partial(fused.extended_attention, a.q, a.k, a.v, anchor_k, anchor_v, a.key_mask, a.share)
    everywhere = torch.ones(shape.images, shape.patches, dtype=torch.int32, device=device)
    calls: dict[str, Call] = {str(tile): partial(attend, tile=fused.Tile(*tile)) for tile in TILES}
    calls |= {
        "pack, then attend": lambda: fused.attend(a.q, a.k, a.v, fused.pack(anchor_k, anchor_v, a.key_mask), a.share),
        "blended queries": partial(attend, q_blend=(torch.roll(a.q, 1, dims=-1), 0.5)),
        "regions": partial(attend, regions=(everywhere, everywhere[: a.anchors])),
        "pack alone": partial(fused.pack, anchor_k, anchor_v, a.key_mask),
        "floor": CONTENDERS["extended_attention"]["floor"](a),
    }
    rows = {name: Row("tiles", name, asdict(shape)) for name in calls}
    for name, row in rows.items():
        try:
            out = calls[name]()
        except Exception as failure:  # more shared memory than the GPU has
            row.note = f"did not run: {str(failure).splitlines()[0]}"
            del calls[name]
            continue
        if name not in ("blended queries", "pack alone", "floor"):  # these compute something else
            row.error = attention_error(a, out)
    for name, seconds in median_seconds(calls, rounds, device).items():
        rows[name].seconds = seconds
        if name not in ("pack alone", "floor"):
            rows[name].tflops = a.flops() / seconds / 1e12
    return sorted(rows.values(), key=lambda row: row.seconds or math.inf)


# --- the report -------------------------------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    first = rows[0]
    s = Shape(**first.shape)  # type: ignore[arg-type]
    print(
        f"\n{first.operator}: N {s.images}, P {s.patches}, H {s.heads}, d {s.head_size}, A {s.anchors}, "
        f"subject {s.subject:.0%}, dropout {s.dropout:.0%}"
    )
    floor = next((row.seconds for row in rows if row.contender == "floor"), None)
    ours = min((row.seconds for row in rows if row.contender in OURS and row.seconds), default=None)
    for row in rows:
        if row.seconds is None:
            print(f"  {row.contender:24} {row.note}")
            continue
        ratio = "".join(f"{row.seconds / unit:6.2f} x {of}" for unit, of in ((floor, "floor"), (ours, "ours")) if unit)
        tflops = f"{row.tflops:8.3g} TFLOP/s" if row.tflops else " " * 16
        error = f"error {row.error:.1e}" if row.error is not None else " " * 13
        memory = f"{row.peak_bytes / 2**20:8.0f} MiB" if row.peak_bytes is not None else ""
        print(f"  {row.contender:24} {row.seconds * 1e3:10.3f} ms {ratio} {tflops} {error} {memory}")


def plot(rows: list[Row], facts: dict[str, str], path: Path) -> None:
    """Extended attention: time relative to plain self-attention over the images, and over the kept share of keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attention_rows = [row for row in rows if row.operator == "extended_attention" and row.seconds]
    floors = {_key(row): row.seconds for row in attention_rows if row.contender == "floor"}
    patches = sorted({row.shape["patches"] for row in attention_rows})
    figure, axes = pyplot.subplots(len(patches), 2, figsize=(11, 4 * len(patches)), squeeze=False, layout="constrained")
    for line, p in enumerate(patches):
        for column, (label, varies) in enumerate(
            (("images", _by_images), ("kept share of an anchor's keys", _by_kept))
        ):
            axis = axes[line][column]
            for contender in dict.fromkeys(row.contender for row in attention_rows):
                points = sorted(
                    (x, row.seconds / floors[_key(row)])
                    for row in attention_rows
                    if row.contender == contender and row.shape["patches"] == p and (x := varies(row)) is not None
                )
                axis.plot(*zip(*points, strict=True), "o-", label=contender) if points else None
            axis.set(xlabel=label, ylabel="time / plain self-attention", title=f"P = {p}", yscale="log")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=8)
    figure.savefig(path, dpi=120)


def _key(row: Row) -> tuple[float, ...]:
    return tuple(row.shape.values())


def _by_images(row: Row) -> float | None:
    return row.shape["images"] if (row.shape["subject"], row.shape["dropout"]) == (0.25, 0.5) else None


def _by_kept(row: Row) -> float | None:
    return row.shape["subject"] * (1 - row.shape["dropout"]) if row.shape["images"] == 4 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--operator", choices=OPERATORS, nargs="+", default=list(OPERATORS),
        help="these only; saved only with --out, since the file of all would lose the others",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, else float32")
    parser.add_argument("--rounds", type=int, help="times every contender runs: 20 on a GPU, 5 on a CPU")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only; saved only with --out")
    parser.add_argument("--tiles", action="store_true", help="compare block sizes of the attention kernel, and stop")
    parser.add_argument("--profile", action="store_true", help="run the attention kernel, twice a layer, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu" and (arguments.tiles or arguments.profile):
        parser.error("--tiles and --profile look at the Triton kernel: they need a GPU")
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    rounds = arguments.rounds or (20 if device == "cuda" else 5)

    if arguments.profile:
        for shape in LAYERS:
            problem = attention(shape, device, dtype)
            for _ in range(2):
                CONTENDERS["extended_attention"]["fused"](problem)()
        return

    facts = machine(device) | {"precision": str(dtype).removeprefix("torch.")}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = arguments.out / f"{'tiles' if arguments.tiles else 'kernels'}-{'gpu' if device == 'cuda' else 'cpu'}.json"
    rows: list[Row] = []
    some = set(arguments.operator) < set(OPERATORS)
    saved = arguments.out != RESULTS or not (arguments.quick or some)

    def report(new: list[Row]) -> None:
        """Saved row by row: a run that is cut short keeps what it has measured."""
        show(new)
        rows.extend(new)
        if saved:
            write(results, {"machine": facts, "rows": [asdict(row) for row in rows]})

    if arguments.tiles:
        for shape in (*LAYERS, Shape(4, 1024, 16, 40), Shape(4, 1024, 10, 128)):
            report(best_tiles(shape, device, dtype, rounds))
        return
    for operator in arguments.operator:
        for shape in shapes(device, arguments.quick, OPERATORS[operator].masked):
            report(race(operator, shape, device, dtype, rounds))
        if operator == "extended_attention" and saved:
            plot(rows, facts, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
