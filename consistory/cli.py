"""The command `consistory`: a subject and its settings in, a folder of pictures out."""

from __future__ import annotations

import argparse
import importlib.metadata
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
from typing import TYPE_CHECKING, Any, NoReturn

from consistory.weights.errors import ConsistoryError

from .config import CONTROL_DROPOUT, PREDICTIONS, ConsistoryConfig, FreeU
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

if TYPE_CHECKING:  # torch takes seconds to import: never before the arguments are parsed
    from .controlnet import Control, ControlNet
    from .distributed import Ranks
    from .model import ConsiStory, Story

DESCRIPTION = """\
Draw one subject in several settings and keep it the same one, without training (ConsiStory, Tewel et al. 2024).

Each setting makes one picture, from the prompt "STYLE SUBJECT SETTING". All pictures are drawn together. The first ones
are anchors: the other pictures, and each other anchor, look at the subject in them while they are being drawn."""

EXAMPLES = """\
examples:
  consistory "a cat" --settings "on the beach" "in the snow" "in space" --out story
      the embedded model, sprites: small cartoons, drawn in a minute or two on any computer

  consistory "a cat" --settings "on the beach" "in the snow" "in space" --out plain --vanilla
      the same noise without the method, for comparison: another cat in each picture

  consistory "a friendly robot" --style "a watercolor of" --settings "reading a book" "by the sea" "in a cafe" \\
      --model path/to/stable-diffusion-xl-base-1.0 --seed 7
      SDXL in the diffusers layout

  consistory "a girl and her dog" --concept girl --concept dog --settings "in a park" "on a train" \\
      --single-file path/to/sd_xl_base_1.0.safetensors
      SDXL as one file; two subjects, both kept

  consistory "a cat" --settings "on the beach" "in the snow" --out first --save-subject cat.safetensors
  consistory extend cat.safetensors --settings "in space" "in a meadow" --out more
      more pictures of the same cat, later; with --record in the first line, without drawing its pictures again

  torchrun --nproc-per-node 8 -m consistory "a cat" --settings ... --model path/to/stable-diffusion-xl-base-1.0
      the same files, drawn by eight GPUs at once

  consistory evaluate sets.yaml --clip path/to/clip-vit-large-patch14 --out evaluation
      many stories, measured

  consistory "a cat" --settings "on the beach" "in the snow" --control sprites left.png right.png
      each picture's silhouette is given: white on black; --control depth.safetensors room.png gives all the same depth

  consistory personalize photo1.jpg photo2.jpg --subject "a cat" --settings "in space" "in a meadow" --out mine
      the cat of real photos in new pictures

The folder then holds 01.png, 02.png, ..., grid.png with all of them, and story.json, which says how they were made;
each PNG says it too, in its metadata. Pictures are written as they are finished. If a run is cut short, the same
command goes on: pictures that are there and were made with the same options are kept."""

PRESETS: dict[str, Callable[[], ConsistoryConfig]] = {
    "default": ConsistoryConfig,
    "reference": ConsistoryConfig.reference,
    "paper": ConsistoryConfig.paper,
    "vanilla": ConsistoryConfig.vanilla,
}

# What plain RuntimeErrors say where there is no torch.OutOfMemoryError: on MPS and on the CPU.
OUT_OF_MEMORY = re.compile(r"MPS backend out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory")


EXTEND = """\
Draw more pictures of a subject that `consistory SUBJECT ... --save-subject FILE` has kept. They come out as if all had
been drawn together. Unless the subject was kept with --record, its first pictures, the anchors, are drawn again along
with the new ones."""


EVALUATE = """\
Draw many stories, one from each set of prompts, and measure them with CLIP: how well the pictures fit their prompts,
and how alike the subject is in the pictures of a set, their background removed.

SETS is a list of entries, in YAML or JSON:

  - style: a photo of          (may be left out)
    subject: a friendly robot
    concept_token: [robot]     (may be left out: the subject's noun)
    settings: [reading a book, by the sea, in a cafe]

Every set has its folder in --out. What has been drawn is not drawn again, so an evaluation that was interrupted goes on
where it was. The scores go to evaluation.json."""


PERSONALIZE = """\
Draw new pictures of the subject of real photos, without training. One photo is enough; two or more, which show it in
different places, are better. The photos are the anchors: the new pictures look at the subject in them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 2 for a mistake that the user can mend, 130 if interrupted.

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
            print("consistory: interrupted", file=sys.stderr)
        return 130
    if first and not args.quiet:
        print(result)
    return 0


def torchrun_rank() -> int | None:
    """This process's number among those that torchrun has started; None without torchrun."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ["RANK"]) if started else None


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
    subject_file = getattr(args, "save_subject", None)
    trace = Trace() if getattr(args, "explain", False) else None
    if trace is not None and (args.chunk or torchrun_rank() is not None):
        raise ConsistoryError("--explain shows pictures that are drawn together: leave out --chunk and torchrun")

    def choose(record: Record) -> Sequence[int]:
        missing = album.begin(record)
        if trace is not None:
            missing = list(every_picture(record))
        kept = len(record["prompts"]) - len(missing)
        if ranks.rank == 0 and not args.quiet:
            if missing and getattr(args, "concept", []) is None and record["concepts"]:
                print(f'What stays the same is the "{record["concepts"][0]}"; --concept names something else')
            if kept:
                print(f"{kept} of {len(record['prompts'])} pictures are in {args.out} already")
        return missing or [0] * (subject_file is not None)  # a subject is kept from a run of the anchors

    def check_and_make(**callbacks: Any) -> Story:
        if ranks.rank == 0:
            check_can_save(args.out)
            check_free(args.out, len(args.settings), page=trace is not None)
            if subject_file is not None:
                check_subject_file(args, subject_file)
        return make(args, ranks, **callbacks)

    with nullcontext(Ranks()) if torchrun_rank() is None else torchrun_ranks() as ranks:
        observer = {} if trace is None else {"observer": trace}
        story = draw_on_ranks(check_and_make, ranks=ranks, choose=choose, on_picture=album.add, **observer)
        if ranks.rank == 0:
            if subject_file is not None and not getattr(args, "record", False):
                story.subject.save(subject_file)
            album.finish()
    if trace is None:
        return f"The story is in {args.out}: look at {args.out / GRID}"
    trace.save(story, args.out / PAGE)
    return f"The story is in {args.out}: look at {args.out / GRID} and, in a browser, {args.out / PAGE}"


def check_subject_file(args: argparse.Namespace, file: Path) -> None:
    """Raises ConsistoryError if the subject cannot be kept there, or something else would be lost by it."""
    from .subject import kept_in

    check_can_save(file.absolute().parent)
    if file.is_dir():
        raise ConsistoryError(f"{file} is a folder: name a file for the subject to be kept in")
    own = (*picture_names(len(args.settings)), GRID, RECORD, PAGE)
    if file.resolve() in [(args.out / name).resolve() for name in own]:
        raise ConsistoryError(f"{file} is one of the story's own files: name another one for the subject to be kept in")
    kept = kept_in(file)
    if file.exists() and kept is None:
        raise ConsistoryError(f"{file} is no subject file, and would be overwritten: name another one")
    if kept == "recording" and not getattr(args, "record", False):
        raise ConsistoryError(f"{file} holds a recording, which would be lost: add --record, or name another file")


def draw(args: argparse.Namespace, ranks: Ranks, **callbacks: Any) -> Story:
    """Load the model and tell the story. Raises ConsistoryError, before any drawing, for arguments that do not fit."""
    if args.record and args.save_subject is None:
        raise ConsistoryError("--record needs a file to record to: name it with --save-subject")
    pictures = read_controls(args)
    with told_if_out_of_memory():
        pipe = load(args, ranks)
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
                config=method(args),
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
    with told_if_out_of_memory():
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
    with told_if_out_of_memory():
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
    with told_if_out_of_memory():
        subject = load(args, ranks).personalize(
            args.photos,
            subject=args.subject,
            concept=args.concept,
            style=args.style,
            method=args.method,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            align_keys=args.align_keys,
            negative_prompt=args.negative,
            width=args.width,
            height=args.height,
            config=method(args),
        )
        with progress_bar(args.quiet or ranks.rank > 0) as on_step:
            return subject.extend(args.settings, chunk=args.chunk, on_step=on_step, **callbacks)


@contextmanager
def told_if_out_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise ConsistoryError(
            "out of memory: draw fewer or smaller pictures, or fewer at a time (--chunk 1), or use --offload or "
            "--dtype float16"
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
    if words and hasattr(args, "negative"):
        warn_of_unused_words(args, pipe)
    return pipe if picture is None else with_picture(args, pipe, picture)


def warn_of_unused_words(args: argparse.Namespace, pipe: ConsiStory) -> None:
    """Of those that no prompt has. args: of a command whose prompts are made of them."""
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


def method(args: argparse.Namespace) -> ConsistoryConfig:
    """The preset, changed as other options say."""
    config = PRESETS[args.preset]()
    dropout = args.dropout
    if dropout is None and getattr(args, "control", None):
        dropout = CONTROL_DROPOUT
    elif dropout is None and hasattr(args, "photos"):
        dropout = ConsistoryConfig.photos().dropout
    if dropout is not None:
        config = replace(config, dropout=dropout)
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


class Parser(argparse.ArgumentParser):
    """An error is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: SUBJECT"):
            message += ", which comes before the options"
        self.exit(2, f"consistory: error: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, as on the command line. Exits with code 2 and one line if they are malformed."""
    parser = Parser(
        prog="consistory",
        usage="consistory SUBJECT --settings SETTING [SETTING ...] [--out FOLDER] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"consistory {importlib.metadata.version('consistory')}")

    story = parser.add_argument_group("the story")
    story.add_argument("subject", metavar="SUBJECT", help='what all pictures show, such as "a cat"')
    story.add_argument(
        "--settings", metavar="SETTING", nargs="+", required=True, help="one for each picture, 1 to 100 of them"
    )
    story.add_argument("--style", default="", help='put before every prompt, such as "a watercolor of" (default: none)')
    story.add_argument(
        "--concept", action="append",
        help="word or phrase for what is to stay the same; repeat it for several (default: the subject's noun)",
    )
    story.add_argument("--negative", metavar="PROMPT", help="what the pictures should not show (default: nothing)")

    output = add_output(parser)
    output.add_argument(
        "--save-subject", metavar="FILE", type=Path,
        help="keep the subject in a .safetensors file, for `consistory extend` (default: it is not kept)",
    )
    output.add_argument(
        "--record", action="store_true",
        help="keep in that file all that new pictures need of the first ones, so that these are not drawn again: some "
        "gigabytes for SDXL (default: they are drawn again)",
    )
    output.add_argument(
        "--explain", action="store_true",
        help="also write story.html, a page that shows how the pictures came about (default: off)",
    )
    add_model(parser)
    add_control(parser, "PICTURE [PICTURE ...]: one for each of the story's pictures, or one for all of them")
    add_sampling(parser).add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most so many pictures at a time beside the anchors, to save memory; the same pictures, but every "
        "chunk draws the anchors again (default: all at once)",
    )
    add_anchors(add_method(parser))
    args = parser.parse_args(argv)
    check_control(parser, args)
    if not all(paths for _, *paths in args.control):
        parser.error("argument --control: name a picture after the ControlNet")
    return args


def add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=int, nargs="+", default=[0],
        help="of the noise: one number, from which the pictures count up, or one for each picture (default: 0)",
    )
    sampling.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    sampling.add_argument(
        "--guidance", type=float, default=5.0,
        help="how closely to follow the prompt; 1, for distilled checkpoints, takes half the work (default: 5)",
    )
    sampling.add_argument(
        "--clip-skip", type=int, default=0, metavar="K",
        help="layers of the text encoders to leave out, besides the last one, which SDXL never uses (default: 0)",
    )
    sampling.add_argument("--width", type=int, metavar="PIXELS", help="default: what the model was trained for")
    sampling.add_argument("--height", type=int, metavar="PIXELS", help="default: what the model was trained for")
    return sampling



def add_method(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    consistency = parser.add_argument_group("the method")
    preset = consistency.add_mutually_exclusive_group()
    preset.add_argument(
        "--preset", choices=("default", "reference", "paper"), default="default",
        help="values as published; paper: exactly as printed; reference: as the authors' code has them",
    )
    preset.add_argument(
        "--vanilla", dest="preset", action="store_const", const="vanilla",
        help="leave the method out: the same noise, no consistency",
    )
    consistency.add_argument(
        "--dropout", type=probability, metavar="P",
        help="probability that a patch of an anchor is hidden from the others at a step: more varies the layout, less "
        "keeps the subject closer (default: 0.5, with --control 0.7, with photos 0)",
    )
    consistency.add_argument(
        "--separate-subjects", action="store_true",
        help="with several concepts: each looks at itself in the anchors, not at the others (default: at all)",
    )
    consistency.add_argument(
        "--freeu", action=argparse.BooleanOptionalAction,
        help="FreeU: stronger structure, less noise in detail (default: off)",
    )
    return consistency


def add_anchors(consistency: argparse._ArgumentGroup) -> None:
    consistency.add_argument("--anchors", type=int, metavar="A", help="pictures that the others look at (default: 2)")


def parse_extend(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments after `extend`. Exits with code 2 and one line if they are malformed."""
    parser = Parser(
        prog="consistory extend",
        usage="consistory extend FILE --settings SETTING [SETTING ...] [--out FOLDER] [options]",
        description=EXTEND,
        allow_abbrev=False,
    )
    parser.add_argument("subject", metavar="FILE", type=Path, help="what --save-subject has written")
    parser.add_argument("--settings", metavar="SETTING", nargs="+", required=True, help="one for each new picture")
    parser.add_argument(
        "--seed", type=int, nargs="+",
        help="of the noise: one number, from which the pictures count up, or one for each picture (default: they go on "
        "after the last of the subject's first story)",
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most so many new pictures at a time, to save memory (default: all)",
    )
    add_output(parser, "more")
    add_model(parser)
    add_control(
        parser, "[PICTURE ...]: one for each new picture, or one for all of them. The subject's first pictures keep "
        "what steered them; without pictures, this says where their ControlNet is, if it has been moved",
    )
    args = parser.parse_args(argv)
    check_control(parser, args)
    return args


def parse_personalize(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments after `personalize`. Exits with code 2 and one line if they are malformed."""
    parser = Parser(
        prog="consistory personalize",
        usage="consistory personalize PHOTO [PHOTO ...] --subject SUBJECT --settings SETTING [SETTING ...] "
        "[--out FOLDER] [options]",
        description=PERSONALIZE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "photos", metavar="PHOTO", type=Path, nargs="+",
        help="pictures of the subject, of any size; what does not fit the model's is cut to its centre and resized",
    )
    parser.add_argument("--subject", required=True, help='what the photos show, such as "a cat"')
    parser.add_argument("--settings", metavar="SETTING", nargs="+", required=True, help="one for each new picture")
    parser.add_argument("--style", default="", help='put before every prompt, such as "a photo of" (default: none)')
    parser.add_argument(
        "--concept", action="append",
        help="word or phrase for what is to stay the same; repeat it for several (default: the subject's noun)",
    )
    parser.add_argument("--negative", metavar="PROMPT", help="what the pictures should not show (default: nothing)")
    output = add_output(parser)
    output.add_argument(
        "--save-subject", metavar="FILE", type=Path,
        help="keep the subject in a .safetensors file, for `consistory extend` (default: it is not kept)",
    )
    output.add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most so many new pictures at a time, to save memory (default: all)",
    )
    add_model(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=int, default=0,
        help="of the noise: a number, from which the photos and then the new pictures count up (default: 0)",
    )
    sampling.add_argument("--steps", type=int, default=100, help="denoising steps (default: 100)")
    sampling.add_argument("--guidance", type=float, default=5.0, help="how closely to follow the prompt (default: 5)")
    sampling.add_argument("--width", type=int, metavar="PIXELS", help="default: what the model was trained for")
    sampling.add_argument("--height", type=int, metavar="PIXELS", help="default: what the model was trained for")
    method = add_method(parser)
    method.add_argument(
        "--method", choices=("inversion", "noise"), default="inversion",
        help="how photos take part: with independent noise at every step, as in an inversion, or with one noise "
        "(default: inversion)",
    )
    method.add_argument(
        "--align-keys", action=argparse.BooleanOptionalAction, default=True,
        help="give the photos' attention keys the statistics of those of the new pictures (default: on)",
    )
    return parser.parse_args(argv)


def parse_evaluate(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments after `evaluate`. Exits with code 2 and one line if they are malformed."""
    parser = Parser(
        prog="consistory evaluate",
        usage="consistory evaluate SETS [--out FOLDER] [--clip FOLDER] [options]",
        description=EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sets", metavar="SETS", type=Path, help="a .yaml or .json file of prompt sets")
    parser.add_argument(
        "--clip", metavar="FOLDER", type=Path,
        help="a CLIP model as transformers saves it, such as openai/clip-vit-large-patch14, downloaded (default: no "
        "scores)",
    )
    add_output(parser, "evaluation", "of the sets' folders and the scores")
    add_model(parser)
    add_sampling(parser)
    add_anchors(add_method(parser))
    args = parser.parse_args(argv)
    if len(args.seed) > 1:
        parser.error("--seed takes one number here: the pictures of all sets count up from it")
    if torchrun_rank() is not None:
        parser.error("an evaluation runs in one process: leave torchrun out")
    args.seed = args.seed[0]
    return args


def add_output(
    parser: argparse.ArgumentParser, folder: str = "story",
    holds: str = "of the pictures; those of another story there are replaced",
) -> argparse._ArgumentGroup:  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path(folder), help=f"{holds} (default: {folder})"
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar and no last lines")
    return output


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    source = model.add_mutually_exclusive_group()
    source.add_argument(
        "--model", default="sprites",
        help="a folder in the diffusers layout, a name of the Hugging Face hub such as "
        "stabilityai/stable-diffusion-xl-base-1.0, or sprites, the embedded 64-pixel cartoons (default: sprites)",
    )
    source.add_argument("--single-file", metavar="PATH", help="an SDXL checkpoint in one .safetensors file")
    model.add_argument("--variant", help="which of a folder's weights to take, such as fp16 (default: the plain ones)")
    model.add_argument(
        "--vae", metavar="PATH",
        help="another autoencoder: a .safetensors file, a folder, or a name of the hub (default: the model's own)",
    )
    model.add_argument(
        "--lora", metavar="FILE[:WEIGHT]", type=file_and_weight, action="append", default=[],
        help="a LoRA, LoHa, LoKr or DoRA to merge into the model, in a .safetensors file; repeat it for several "
        "(default weight: 1)",
    )
    model.add_argument(
        "--embedding", metavar="FILE[:WORD]", type=file_and_word, action="append", default=[],
        help="a word learned by textual inversion, in a .safetensors file, for use in prompts; repeat it for several "
        "(default: the word is the file's name)",
    )
    model.add_argument(
        "--ip-adapter", metavar=("FILE", "ENCODER", "PICTURE"), nargs=3,
        help="let a picture prompt beside the words: an IP-Adapter of SDXL in a .safetensors file, the folder of the "
        "image encoder that it was trained with, and the picture",
    )
    model.add_argument(
        "--ip-adapter-weight", metavar="W", type=float, default=1.0,
        help="how much the picture counts beside the words (default: 1)",
    )
    model.add_argument(
        "--spacing", choices=("leading", "trailing"),
        help="of the timesteps; checkpoints and LoRAs that are distilled to a few --steps want trailing, with "
        "--guidance 1 (default: as the checkpoint says)",
    )
    model.add_argument(
        "--prediction", choices=tuple(PREDICTIONS),
        help="what the model predicts: checkpoints that predict v, or v of noise with zero terminal SNR, do not always "
        "say so, and draw only noise or grey then (default: as the checkpoint says)",
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    model.add_argument(
        "--dtype", choices=("float64", "float32", "float16", "bfloat16"),
        help="default: float16 on cuda, float32 elsewhere; float64 is slow, but rounding"
        " decides nothing: the same pictures on another CPU or in other chunks",
    )
    model.add_argument(
        "--offload", action="store_true",
        help="keep the weights in host memory; each part of the model is on the device only while it runs",
    )
    model.add_argument(
        "--tile", type=int, metavar="ROWS",
        help="decode in tiles of so many rows: the same pictures from less memory, with twice the work (default: only "
        "above 1024x1024 pixels, 32 rows)",
    )


def file_and_weight(text: str) -> tuple[str, float]:
    """ "a.safetensors:0.8" -> the file and 0.8. What follows the last colon is a weight if it is a number, else 1."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def file_and_word(text: str) -> tuple[str, str | None]:
    """ "a.safetensors:<cat>" -> the file and the word."""
    file, ending, word = text.partition(".safetensors:")
    return (file + ending.removesuffix(":"), word) if ending else (text, None)


def add_control(parser: argparse.ArgumentParser, pictures: str) -> None:
    control = parser.add_argument_group("control by pictures, such as poses or depth maps")
    control.add_argument(
        "--control", metavar=("NET", "PICTURE"), nargs="+", action="append", default=[],
        help="a ControlNet of SDXL (a .safetensors file, a folder in the diffusers layout, or sprites: silhouettes for "
        f"the embedded model), then {pictures}; repeat it to steer by several at once",
    )
    several = "; one number, or one for each --control"
    control.add_argument(
        "--control-weight", metavar="W", type=float, nargs="+", default=[1.0],
        help=f"how strongly to steer{several} (default: 1)",
    )
    control.add_argument(
        "--control-start", metavar="F", type=probability, nargs="+", default=[0.0],
        help=f"from which fraction of the steps on{several} (default: 0)",
    )
    control.add_argument(
        "--control-end", metavar="F", type=probability, nargs="+", default=[1.0],
        help=f"up to which fraction of the steps{several} (default: 1)",
    )


def check_control(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("weight", "start", "end"):
        values = len(getattr(args, f"control_{name}"))
        if not args.control and getattr(args, f"control_{name}") != parser.get_default(f"control_{name}"):
            parser.error(f"argument --control-{name}: there is no --control that it could apply to")
        if values not in (1, len(args.control)):
            given = f"{values} numbers are given for {len(args.control)} --control"
            parser.error(f"argument --control-{name}: {given}: give one, or one for each")


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability: use 0 to 1")
    return value
