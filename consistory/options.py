"""What the command `consistory` may be told: its options, subcommand by subcommand."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .config import PREDICTIONS

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


def torchrun_rank() -> int | None:
    """This process's number among those that torchrun has started; None without torchrun."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ["RANK"]) if started else None


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
        "--settings", metavar="SETTING", nargs="+", action="extend", required=True,
        help="one for each picture, 1 to 100 of them",
    )
    add_words(story)

    output = add_output(parser)
    add_save_subject(output)
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
        help="draw at most N pictures at a time alongside the anchors, to save memory; the same pictures, but every "
        "chunk draws the anchors again (default: all at once)",
    )
    add_anchors(add_method(parser))
    args = parser.parse_args(argv)
    check_method(parser, args)
    check_control(parser, args)
    if not all(paths for _, *paths in args.control):
        parser.error("argument --control: name a picture after the ControlNet")
    return args


def add_words(story: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    story.add_argument("--style", default="", help='put before every prompt, such as "a watercolor of" (default: none)')
    story.add_argument(
        "--concept", action="append",
        help="word or phrase for what is to stay the same; repeat it for several (default: the subject's noun)",
    )
    story.add_argument("--negative", metavar="PROMPT", help="what the pictures should not show (default: nothing)")


def add_save_subject(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--save-subject", metavar="FILE", type=Path,
        help="keep the subject in a .safetensors file, for `consistory extend` (default: it is not kept)",
    )


def add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=int, nargs="+", default=[0],
        help="seed of the noise: one number, from which the pictures count up, or one for each picture (default: 0)",
    )
    add_denoising(sampling, steps=50)
    return sampling


def add_denoising(sampling: argparse._ArgumentGroup, steps: int) -> None:
    sampling.add_argument("--steps", type=int, default=steps, help=f"denoising steps (default: {steps})")
    sampling.add_argument(
        "--guidance", type=float, default=5.0,
        help="how closely to follow the prompt; 1 or less, for distilled checkpoints, takes half the work (default: 5)",
    )
    sampling.add_argument(
        "--clip-skip", type=int, default=0, metavar="K",
        help="layers of the text encoders to leave out, besides the last one, which SDXL never uses (default: 0)",
    )
    sampling.add_argument("--width", type=int, metavar="PIXELS", help="default: what the model was trained for")
    sampling.add_argument("--height", type=int, metavar="PIXELS", help="default: what the model was trained for")


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
        "--dropout", type=fraction, metavar="P",
        help="probability that a patch of an anchor is hidden from the others at a step: more varies the layout, less "
        "keeps the subject closer (default: 0.5, with --control 0.7, with photos 0)",
    )
    consistency.add_argument(
        "--separate-subjects", action="store_true",
        help="with several concepts: each looks at itself in the anchors, not at the others (default: at all of them)",
    )
    consistency.add_argument(
        "--freeu", action=argparse.BooleanOptionalAction,
        help="FreeU: stronger structure, less noise in detail (default: off)",
    )
    return consistency


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.preset == "vanilla" and (args.dropout is not None or args.separate_subjects):
        parser.error("argument --vanilla: --dropout and --separate-subjects are of the method, which it leaves out")


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
    parser.add_argument(
        "--settings", metavar="SETTING", nargs="+", action="extend", required=True, help="one for each new picture"
    )
    parser.add_argument(
        "--seed", type=int, nargs="+",
        help="seed of the noise: one number, from which the pictures count up, or one for each picture (default: they "
        "go on after the last of the subject's first story)",
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most N new pictures at a time, to save memory (default: all)",
    )
    add_output(parser, "more")
    add_model(parser)
    add_control(
        parser, "[PICTURE ...]: one for each new picture, or one for all of them. The subject's first pictures keep "
        "what steered them; without pictures, this says where their ControlNet is, if it has been moved",
    )
    parser.set_defaults(concept=[], save_subject=None, record=False, explain=False)  # what `run` asks of every command
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
    parser.add_argument(
        "--settings", metavar="SETTING", nargs="+", action="extend", required=True, help="one for each new picture"
    )
    add_words(parser)
    output = add_output(parser)
    add_save_subject(output)
    output.add_argument(
        "--chunk", type=int, metavar="N",
        help="draw at most N new pictures at a time, to save memory (default: all)",
    )
    add_model(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=int, default=0,
        help="seed of the noise: a number, from which the photos and then the new pictures count up (default: 0)",
    )
    add_denoising(sampling, steps=100)
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
    parser.set_defaults(record=False, explain=False)  # what `run` asks of every command
    args = parser.parse_args(argv)
    check_method(parser, args)
    return args


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
    add_output(parser, "evaluation", "folder for the sets' folders and the scores")
    add_model(parser)
    add_sampling(parser)
    add_anchors(add_method(parser))
    args = parser.parse_args(argv)
    check_method(parser, args)
    if len(args.seed) > 1:
        parser.error("--seed takes one number here: the pictures of all sets count up from it")
    if torchrun_rank() is not None:
        parser.error("an evaluation runs in one process: leave torchrun out")
    args.seed = args.seed[0]
    return args


def add_output(
    parser: argparse.ArgumentParser, folder: str = "story",
    holds: str = "folder for the pictures; those of another story there are replaced",
) -> argparse._ArgumentGroup:  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path(folder), help=f"{holds} (default: {folder})"
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar and no closing message")
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
        help="add a picture to every prompt: an SDXL IP-Adapter in a .safetensors file, the folder of the "
        "image encoder that it was trained with, and the picture",
    )
    model.add_argument(
        "--ip-adapter-weight", metavar="W", type=float, default=1.0,
        help="how much the picture counts (default: 1)",
    )
    model.add_argument(
        "--spacing", choices=("leading", "trailing"),
        help="spacing of the timesteps; checkpoints and LoRAs that are distilled to a few --steps want trailing, with "
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
        help="default: float16 on cuda, float32 elsewhere; 16 bits are very slow on most CPUs; float64 is slow, but "
        "rounding decides nothing: the same pictures on another CPU or in other chunks",
    )
    model.add_argument(
        "--offload", action="store_true",
        help="keep the weights in host memory; each part of the model is on the device only while it runs",
    )
    model.add_argument(
        "--tile", type=int, metavar="ROWS",
        help="decode in tiles of this many rows: the same pictures from less memory, with twice the work (default: "
        "only above 1024x1024 pixels, 32 rows)",
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
        help="an SDXL ControlNet (a .safetensors file, a folder in the diffusers layout, or sprites: silhouettes for "
        f"the embedded model), then {pictures}; repeat it to steer by several at once",
    )
    several = "; one number, or one for each --control"
    control.add_argument(
        "--control-weight", metavar="W", type=float, nargs="+", default=[1.0],
        help=f"how strongly to steer{several} (default: 1)",
    )
    control.add_argument(
        "--control-start", metavar="F", type=fraction, nargs="+", default=[0.0],
        help=f"from which fraction of the steps on{several} (default: 0)",
    )
    control.add_argument(
        "--control-end", metavar="F", type=fraction, nargs="+", default=[1.0],
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


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: use 0 to 1")
    return value
