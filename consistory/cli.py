"""The command `consistory`: a subject and its settings in, a folder of pictures out."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, FreeU
from .images import GRID, check_can_save

if TYPE_CHECKING:  # torch takes seconds to import: never before the arguments are parsed
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
      more pictures of the same cat, later

The folder then holds 01.png, 02.png, ..., grid.png with all of them, and story.json, which says how they were made;
each PNG says it too, in its metadata."""

PRESETS: dict[str, Callable[[], ConsistoryConfig]] = {
    "default": ConsistoryConfig,
    "reference": ConsistoryConfig.reference,
    "paper": ConsistoryConfig.paper,
    "vanilla": ConsistoryConfig.vanilla,
}


EXTEND = """\
Draw more pictures of a subject that `consistory SUBJECT ... --save-subject FILE` has kept. Its first pictures, the
anchors, are drawn again along with the new ones, which come out as if all had been drawn together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 2 for a mistake that the user can mend, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["extend"]:
        args, make = parse_extend(argv[1:]), extend
    else:
        args, make = parse(argv), draw
    try:
        with warnings_on_stderr():
            check_can_save(args.out)
            make(args).save(args.out)
    except ConsistoryError as error:
        print("consistory: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("consistory: interrupted", file=sys.stderr)
        return 130
    if not args.quiet:
        print(f"The story is in {args.out}: look at {args.out / GRID}")
    return 0


def draw(args: argparse.Namespace) -> Story:
    """Load the model and tell the story. Raises ConsistoryError, before any drawing, for arguments that do not fit."""
    if args.save_subject is not None:
        check_can_save(args.save_subject.absolute().parent)
    with told_if_out_of_memory():
        pipe = load(args)
        with progress_bar(args.quiet) as on_step:
            story = pipe(
                subject=args.subject,
                settings=args.settings,
                style=args.style,
                concepts=args.concept,
                seed=args.seed[0] if len(args.seed) == 1 else args.seed,
                steps=args.steps,
                guidance=args.guidance,
                negative_prompt=args.negative,
                anchors=args.anchors,
                width=args.width,
                height=args.height,
                chunk=args.chunk,
                config=method(args),
                on_step=on_step,
            )
    if args.save_subject is not None:
        story.subject.save(args.save_subject)
    return story


def extend(args: argparse.Namespace) -> Story:
    """Load the model and the subject, and draw more of it. Raises ConsistoryError as `draw` does."""
    from .subject import Subject

    with told_if_out_of_memory():
        subject = Subject.load(args.subject, load(args))
        seed = None if args.seed is None else args.seed[0] if len(args.seed) == 1 else args.seed
        with progress_bar(args.quiet) as on_step:
            return subject.extend(args.settings, seed=seed, chunk=args.chunk, on_step=on_step)


@contextmanager
def told_if_out_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ConsistoryError(
            "out of memory: draw fewer or smaller pictures, or fewer at a time (--chunk 1), or use --offload or "
            "--dtype float16"
        ) from None


def load(args: argparse.Namespace) -> ConsiStory:
    import torch

    from .model import ConsiStory

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float16" if device.startswith("cuda") else "float32"))
    memory = {"offload": args.offload, "tile": args.tile}
    if args.single_file is not None:
        return ConsiStory.from_single_file(args.single_file, device=device, dtype=dtype, **memory)
    return ConsiStory.from_pretrained(args.model, device=device, dtype=dtype, variant=args.variant, **memory)


def method(args: argparse.Namespace) -> ConsistoryConfig:
    """The preset, changed as other options say."""
    config = PRESETS[args.preset]()
    if args.dropout is not None:
        config = replace(config, dropout=args.dropout)
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
    with tqdm(desc="drawing", unit="step", delay=0.01, disable=True if quiet else None) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Show the library's warnings, such as a prompt that is cut off."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("consistory: warning: %(message)s"))
    logger = logging.getLogger("consistory")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Parser(argparse.ArgumentParser):
    """An error is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"consistory: error: {message} (see consistory --help)\n")


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
    add_model(parser)

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=int, nargs="+", default=[0],
        help="of the noise: one number, from which the pictures count up, or one for each picture (default: 0)",
    )
    sampling.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    sampling.add_argument("--guidance", type=float, default=5.0, help="how closely to follow the prompt (default: 5)")
    sampling.add_argument("--width", type=int, metavar="PIXELS", help="default: what the model was trained for")
    sampling.add_argument("--height", type=int, metavar="PIXELS", help="default: what the model was trained for")
    sampling.add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most so many pictures at a time beside the anchors, to save memory; the same pictures, but every "
        "chunk draws the anchors again (default: all at once)",
    )

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
    consistency.add_argument("--anchors", type=int, metavar="A", help="pictures that the others look at (default: 2)")
    consistency.add_argument(
        "--dropout", type=probability, metavar="P",
        help="probability that a patch of an anchor is hidden from the others at a step: more varies the layout, less "
        "keeps the subject closer (default: 0.5)",
    )
    consistency.add_argument(
        "--freeu", action=argparse.BooleanOptionalAction,
        help="FreeU: stronger structure, less noise in detail (default: off)",
    )
    return parser.parse_args(argv)


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
    add_output(parser)
    add_model(parser)
    return parser.parse_args(argv)


def add_output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", type=Path, default=Path("story"), help="default: story")
    output.add_argument("--quiet", action="store_true", help="no progress bar and no last line")
    return output


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    source = model.add_mutually_exclusive_group()
    source.add_argument(
        "--model", default="sprites",
        help="a folder in the diffusers layout, or sprites, the embedded 64-pixel cartoons (default: sprites)",
    )
    source.add_argument("--single-file", metavar="PATH", help="an SDXL checkpoint in one .safetensors file")
    model.add_argument("--variant", help="which of a folder's weights to take, such as fp16 (default: the plain ones)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, float32 elsewhere"
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


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability: use 0 to 1")
    return value
