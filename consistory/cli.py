"""The command `consistory`: a subject and its settings in, a folder of pictures out."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, FreeU
from .images import (
    GRID,
    PAGE,
    RECORD,
    Album,
    Pixels,
    Record,
    check_can_save,
    check_free,
    every_picture,
    picture_names,
    read_picture,
)
from .options import parse, parse_evaluate, parse_extend, parse_personalize, torchrun_rank

if TYPE_CHECKING:  # torch takes seconds to import: never before the arguments are parsed
    from .controlnet import Control, ControlNet
    from .distributed import Ranks
    from .model import ConsiStory, Story

PRESETS: dict[str, Callable[[], ConsistoryConfig]] = {
    "default": ConsistoryConfig,
    "reference": ConsistoryConfig.reference,
    "paper": ConsistoryConfig.paper,
    "vanilla": ConsistoryConfig.vanilla,
}

# What plain RuntimeErrors say where there is no torch.OutOfMemoryError: on MPS and on the CPU.
OUT_OF_MEMORY = re.compile(r"MPS backend out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 2 for a mistake that the user can fix, 130 if interrupted.

    Of the ranks that torchrun starts, the first one talks. What goes wrong on all of them is its to tell; the others
    return 0 then, so that torchrun does not end it before it has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be for a terminal that cannot show a folder's name
        sys.stdout.reconfigure(errors="backslashreplace")
    first = torchrun_rank() in (None, 0)
    act: Callable[[argparse.Namespace], str]
    with nullcontext() if first else silence():
        if argv[:1] == ["extend"]:
            args, act = parse_extend(argv[1:]), partial(run, extend)
        elif argv[:1] == ["personalize"]:
            args, act = parse_personalize(argv[1:]), partial(run, personalize)
        elif argv[:1] == ["evaluate"]:
            args, act = parse_evaluate(argv[1:]), evaluate
        else:
            args, act = parse(argv), partial(run, draw)
    try:
        with warnings_on_stderr(first):
            result = act(args)
    except ConsistoryError as error:
        from .distributed import SharedError

        if isinstance(error, SharedError) and not first:
            return 0
        print("consistory: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:  # such as a name that is too long
        where = f"{error.filename}: " if error.filename else ""
        print("consistory: error:", where + " ".join(str(error.strerror or error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("consistory: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if first and not args.quiet:
        print(result)
    return 0


@contextmanager
def silence() -> Iterator[None]:
    """Not a word, and no exit code, on how arguments are parsed."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            sys.exit(0)


def run(make: Callable[..., Story], args: argparse.Namespace) -> str:
    """Draw what the folder lacks of a story, together with the other ranks, if there are any; returns where it is."""
    from .distributed import Ranks, draw_on_ranks, torchrun_ranks
    from .explain import Trace

    album = Album(args.out)
    trace = Trace() if args.explain else None
    if trace is not None and (args.chunk or torchrun_rank() is not None):
        raise ConsistoryError("--explain shows pictures that are drawn together: leave out --chunk and torchrun")

    drawn: set[int] = set()

    def choose(record: Record) -> Sequence[int]:
        missing = album.begin(record)
        if trace is not None:
            missing = list(every_picture(record))
        drawn.update(missing)
        kept = len(record["prompts"]) - len(missing)
        if ranks.rank == 0 and not args.quiet:
            if missing and args.concept is None and record["concepts"]:
                print(f'Keeping the "{record["concepts"][0]}" the same; --concept names something else')
            if kept:
                print(f"{kept} of {len(record['prompts'])} pictures are in {args.out} already")
            if others := album.others():
                print(f"Pictures of another story in {args.out} are replaced: {len(others)}")
        return missing or [0] * (args.save_subject is not None)  # a subject is kept from a run of the anchors

    def on_picture(index: int, image: Pixels) -> None:
        if index in drawn:
            album.add(index, image)

    def check_and_make(**callbacks: Any) -> Story:
        if ranks.rank == 0:
            check_can_save(args.out)
            check_free(args.out, len(args.settings), page=trace is not None)
            if args.save_subject is not None:
                check_subject_file(args)
        return make(args, ranks, **callbacks)

    with nullcontext(Ranks()) if torchrun_rank() is None else torchrun_ranks() as ranks:
        observer = {} if trace is None else {"observer": trace}
        story = draw_on_ranks(check_and_make, ranks=ranks, choose=choose, on_picture=on_picture, **observer)
        if ranks.rank == 0:
            album.finish()
            if args.save_subject is not None and not args.record:
                story.subject.save(args.save_subject)
    if trace is None:
        return f"The story is in {args.out}: look at {args.out / GRID}"
    trace.save(story, args.out / PAGE)
    return f"The story is in {args.out}: look at {args.out / GRID} and, in a browser, {args.out / PAGE}"


def check_subject_file(args: argparse.Namespace) -> None:
    """Raises ConsistoryError if the subject cannot be kept there, or something else would be lost by it."""
    from .subject import kept_in

    file = args.save_subject
    check_can_save(file.absolute().parent)
    if file.is_dir() or file.resolve() in (args.out.resolve(), *args.out.resolve().parents):
        raise ConsistoryError(f"{file} is a folder: name a file for the subject to be kept in")
    own = (*picture_names(len(args.settings)), GRID, RECORD, PAGE)
    if file.resolve() in [(args.out / name).resolve() for name in own]:
        raise ConsistoryError(f"{file} is one of the story's own files: name another one for the subject to be kept in")
    kept = kept_in(file)
    if file.exists() and kept is None:
        raise ConsistoryError(f"{file} is not a subject file, and would be overwritten: name another one")
    if kept == "recording" and not args.record:
        raise ConsistoryError(f"{file} holds a recording, which would be lost: add --record, or name another file")


def draw(args: argparse.Namespace, ranks: Ranks, **callbacks: Any) -> Story:
    """Load the model and tell the story. Raises ConsistoryError, before any drawing, for arguments that do not fit."""
    if args.record and args.save_subject is None:
        raise ConsistoryError("--record needs a file to record to: name it with --save-subject")
    pictures = read_controls(args)
    with out_of_memory_told():
        pipe = load(args, ranks)
        warn_of_unused_words(args, pipe)
        controls = make_controls(args, load_nets(args, pipe), pictures)
        with progress_bar(args.quiet or ranks.rank > 0) as on_step:
            return pipe(
                subject=args.subject,
                settings=args.settings,
                style=args.style,
                concepts=args.concept,
                seed=args.seed[0] if len(args.seed) == 1 else args.seed,
                steps=args.steps,
                guidance=args.guidance,
                negative_prompt=args.negative,
                clip_skip=args.clip_skip,
                anchors=args.anchors,
                width=args.width,
                height=args.height,
                controls=controls,
                chunk=args.chunk,
                config=method(args, ConsistoryConfig.control() if controls else None),
                record=args.save_subject if args.record and ranks.rank == 0 else None,
                on_step=on_step,
                **callbacks,
            )


def extend(args: argparse.Namespace, ranks: Ranks, **callbacks: Any) -> Story:
    """Load the model and the subject, and draw more of it. Raises ConsistoryError as `draw` does."""
    from .subject import Subject

    if not args.subject.exists():  # before the model is loaded for nothing
        raise ConsistoryError(f"there is no file {args.subject}: check the name")
    pictures = read_controls(args)
    with out_of_memory_told():
        pipe = load(args, ranks)
        nets = load_nets(args, pipe)
        controls = make_controls(args, nets, pictures)
        subject = Subject.load(args.subject, pipe, nets)
        seed = None if args.seed is None else args.seed[0] if len(args.seed) == 1 else args.seed
        with progress_bar(args.quiet or ranks.rank > 0) as on_step:
            return subject.extend(
                args.settings, seed=seed, controls=controls, chunk=args.chunk, on_step=on_step, **callbacks
            )


def evaluate(args: argparse.Namespace) -> str:
    """Draw the sets that are not there yet, and score all of them; returns the scores as a table.

    Raises ConsistoryError, before any drawing, for arguments that do not fit.
    """
    from .clip import CLIP
    from .distributed import Ranks
    from .evaluate import evaluate, read_sets

    check_can_save(args.out)
    sets = read_sets(args.sets)
    names = ("variant", "vae", "lora", "embedding", "ip_adapter", "ip_adapter_weight", "spacing", "prediction")
    options = {"dtype": dtype_of(args), **{name: getattr(args, name) for name in names}}
    with out_of_memory_told():
        clip = None if args.clip is None else CLIP.from_pretrained(args.clip, device=device_of(args))
        with progress_bar(args.quiet) as on_step:
            return evaluate(
                sets, args.out, lambda: load(args, Ranks()), clip=clip, model=args.single_file or args.model,
                options=options, seed=args.seed, steps=args.steps, guidance=args.guidance, clip_skip=args.clip_skip,
                anchors=args.anchors, width=args.width, height=args.height, config=method(args), on_step=on_step,
            )  # fmt: skip


def personalize(args: argparse.Namespace, ranks: Ranks, **callbacks: Any) -> Story:
    """Load the model and draw the subject of photos. Raises ConsistoryError as `draw` does."""
    for photo in args.photos:  # what cannot be read is told before the model is loaded for nothing
        read_picture(photo)
    with out_of_memory_told():
        pipe = load(args, ranks)
        warn_of_unused_words(args, pipe)
        subject = pipe.personalize(
            args.photos,
            subject=args.subject,
            concepts=args.concept,
            style=args.style,
            method=args.method,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            align_keys=args.align_keys,
            negative_prompt=args.negative,
            clip_skip=args.clip_skip,
            width=args.width,
            height=args.height,
            config=method(args, ConsistoryConfig.photos()),
        )
        with progress_bar(args.quiet or ranks.rank > 0) as on_step:
            return subject.extend(args.settings, chunk=args.chunk, on_step=on_step, **callbacks)


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise ConsistoryError(
            "out of memory: draw fewer or smaller pictures, or fewer at a time (--chunk 1), or use --offload or, on a "
            "GPU, --dtype float16"
        ) from None


def load(args: argparse.Namespace, ranks: Ranks) -> ConsiStory:
    import torch

    from .model import ConsiStory
    from .words import Word

    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if args.ip_adapter is None and args.ip_adapter_weight != 1:
        raise ConsistoryError("--ip-adapter-weight needs --ip-adapter: name the adapter and its picture, too")
    device = device_of(args)
    if device == "cuda" and ranks.size > 1:
        device = f"cuda:{ranks.local}"
    options = {"device": device, "dtype": getattr(torch, dtype_of(args)), "vae": args.vae, "loras": args.lora}
    options |= {"spacing": args.spacing, "prediction": args.prediction}
    memory = {"offload": args.offload, "tile": args.tile}
    picture = None if args.ip_adapter is None else read_picture(Path(args.ip_adapter[-1]))
    words = [Word.load(*file_and_name) for file_and_name in args.embedding]
    if args.single_file is not None:
        pipe = ConsiStory.from_single_file(args.single_file, **options, **memory)
    else:
        pipe = ConsiStory.from_pretrained(args.model, variant=args.variant, **options, **memory)
    for word in words:
        pipe = pipe.with_word(word)
    return pipe if picture is None else with_picture(args, pipe, picture)


def warn_of_unused_words(args: argparse.Namespace, pipe: ConsiStory) -> None:
    """Warn of words given by --embedding that no prompt has."""
    if not args.embedding:
        return
    texts = [" ".join((args.style, args.subject, setting)) for setting in args.settings]
    for name in pipe.tokenizers[0].unused([*texts, args.negative or ""]):
        logging.getLogger("consistory").warning("no prompt has the word %r of --embedding", name)


def with_picture(args: argparse.Namespace, pipe: ConsiStory, picture: Pixels) -> ConsiStory:
    """The model with an IP-Adapter. Its image encoder runs on the CPU: the same features on every device."""
    from .clip import ImageEncoder
    from .ip_adapter import IPAdapter

    file, encoder, _ = args.ip_adapter
    adapter = IPAdapter.load(file, pipe.unet)
    features = adapter.read(ImageEncoder.from_pretrained(encoder), picture)
    return pipe.with_picture(adapter, features, args.ip_adapter_weight)


def device_of(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(args: argparse.Namespace) -> str:
    return args.dtype or ("float16" if device_of(args).startswith("cuda") else "float32")


def read_controls(args: argparse.Namespace) -> list[list[Pixels]]:
    """The pictures of every --control. Where one is transparent, it says nothing: black."""
    return [[read_picture(Path(path), background="black") for path in paths] for _, *paths in args.control]


def load_nets(args: argparse.Namespace, pipe: ConsiStory) -> list[ControlNet]:
    """The ControlNet of every --control; one that several name is loaded once."""
    from .controlnet import ControlNet

    loaded = {name: ControlNet.load(name, device=pipe.device, dtype=pipe.dtype) for name, *_ in args.control}
    return [loaded[name] for name, *_ in args.control]


def make_controls(
    args: argparse.Namespace, nets: Sequence[ControlNet], pictures: Sequence[Sequence[Pixels]]
) -> list[Control]:
    """Every --control that has pictures, with its weight, start and end."""
    from .controlnet import Control

    numbers = (args.control_weight, args.control_start, args.control_end)
    rows = zip(nets, pictures, *(values * len(nets) if len(values) == 1 else values for values in numbers), strict=True)
    return [Control(net, images, weight, start, end) for net, images, weight, start, end in rows if images]


def method(args: argparse.Namespace, usual: ConsistoryConfig | None = None) -> ConsistoryConfig:
    """The preset, changed as other options say. usual: where dropout is taken from, unless an option sets it."""
    config = PRESETS[args.preset]()
    if args.dropout is not None:
        config = replace(config, dropout=args.dropout)
    elif usual is not None:
        config = replace(config, dropout=usual.dropout)
    if args.separate_subjects:
        config = replace(config, separate_subjects=True)
    if args.freeu is not None:
        config = replace(config, freeu=FreeU() if args.freeu else None)
    return config


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback on_step(done, total) that draws a bar on stderr if that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total: None
        return
    # With a delay, the bar appears with the first step: arguments that do not fit are told without one.
    with tqdm(desc="drawing", unit="step", delay=0.01, disable=True if quiet or sys.stderr is None else None) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step


@contextmanager
def warnings_on_stderr(show: bool) -> Iterator[None]:
    """Show the library's warnings, such as a prompt that is cut off, each of them once."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(seen)
        seen.add(record.getMessage())
        return len(seen) > before

    handler = logging.StreamHandler() if show else logging.NullHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("consistory: warning: %(message)s"))
    handler.addFilter(is_new)
    logger = logging.getLogger("consistory")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
