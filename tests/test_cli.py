"""The command, from arguments to files; most tests run it in this process, on the embedded or the recorded model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from consistory import ConsiStory, ConsistoryConfig, FreeU, QueryBlend
from consistory.cli import main, method
from consistory.options import file_and_weight, parse_evaluate, parse_extend, parse_personalize

Capture = pytest.CaptureFixture[str]
CAT = ["a cat", "--settings", "on the beach", "in the snow"]


def command(*arguments: str | Path) -> int:
    """The exit code of a command line, wherever it comes from."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the main job, on sprites -----------------------------------------------------------------------------------------


def test_sprites_tell_a_story(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "story"
    assert command(*CAT, "in space", "--steps", "4", "--out", out) == 0
    assert sorted(contents(out)) == ["01.png", "02.png", "03.png", "grid.png", "story.json"]
    images = [np.asarray(Image.open(out / f"0{i}.png")) for i in (1, 2, 3)]
    assert all(image.shape == (64, 64, 3) and image.std() > 5 for image in images)
    assert not np.array_equal(images[0], images[1])
    assert Image.open(out / "grid.png").size == (3 * 256 + 2 * 4, 256)
    assert Image.open(out / "03.png").text["prompt"] == "a cat in space"
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"The story is in {out}: look at {out / 'grid.png'}"
    assert shown.err == ""


def test_the_same_command_gives_the_same_files(tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert command(*CAT, "--steps", "4", "--seed", "3", "--out", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_seed_and_method_change_the_pictures(tmp_path: Path) -> None:
    variants = {"plain": "--seed 0", "seed": "--seed 9", "vanilla": "--vanilla", "anchors": "--anchors 1"}
    for out, options in variants.items():
        assert command(*CAT, "--steps", "4", *options.split(), "--out", tmp_path / out) == 0
    pictures = {np.asarray(Image.open(tmp_path / out / "02.png")).tobytes() for out in variants}
    assert len(pictures) == len(variants)


@pytest.mark.parametrize("grade", [[], ["--record"]], ids=["recipe", "recording"])
def test_a_subject_is_kept_and_extended(tmp_path: Path, capsys: Capture, grade: list[str]) -> None:
    """As if all pictures had been drawn in one story."""
    kept = tmp_path / "cat.safetensors"
    options = ["--steps", "4", "--seed", "3", "--dtype", "float64"]
    assert command(*CAT, "in space", "in a meadow", *options, "--out", tmp_path / "all") == 0
    assert command(*CAT, *options, "--out", tmp_path / "first", "--save-subject", kept, *grade) == 0
    assert kept.stat().st_size > 10**6 if grade else kept.stat().st_size < 10**5
    more = ["extend", kept, "--settings", "in space", "in a meadow", "--chunk", "1", "--dtype", "float64"]
    assert command(*more, "--out", tmp_path / "more") == 0
    for number in (1, 2):
        new, expected = (
            np.asarray(Image.open(tmp_path / f"{folder}.png")).astype(int)
            for folder in (f"more/0{number}", f"all/0{number + 2}")
        )
        assert np.abs(new - expected).max() <= 1
    assert f"look at {tmp_path / 'more' / 'grid.png'}" in capsys.readouterr().out


def test_saving_memory_changes_no_picture(tmp_path: Path) -> None:
    story = [*CAT, "in space", "in a meadow", "--steps", "4", "--dtype", "float64", "--quiet"]
    assert command(*story, "--out", tmp_path / "plain") == 0
    assert command(*story, "--chunk", "1", "--offload", "--tile", "16", "--out", tmp_path / "sparing") == 0
    plain, sparing = (contents(tmp_path / folder) for folder in ("plain", "sparing"))
    assert plain.keys() == sparing.keys()
    assert json.loads(plain["story.json"]) == json.loads(sparing["story.json"])
    for name in ("01.png", "02.png", "03.png", "04.png"):
        one, other = (np.asarray(Image.open(io.BytesIO(files[name]))).astype(int) for files in (plain, sparing))
        assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize("content", [None, b"not safetensors"], ids=["missing", "another file"])
def test_what_is_no_subject_is_refused(tmp_path: Path, capsys: Capture, content: bytes | None) -> None:
    kept = tmp_path / "cat.safetensors"
    if content is not None:
        kept.write_bytes(content)
    assert command("extend", kept, "--settings", "in space", "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("consistory: error:") and str(kept) in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_subject_that_cannot_be_kept_stops_the_run_before_it_starts(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    assert command(*CAT, "--out", out, "--save-subject", tmp_path / "file" / "cat.safetensors") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert command(*CAT, "--out", out, "--save-subject", tmp_path) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kept", ["out", "folder"], ids=["the story's folder", "one around it"])
def test_a_subject_is_not_kept_where_a_folder_will_be(kept: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / kept if kept == "out" else tmp_path / kept / "out"
    assert command(*CAT, "--out", out, "--save-subject", tmp_path / kept) == 2
    assert f"{tmp_path / kept} is a folder" in capsys.readouterr().err
    assert not (tmp_path / kept).exists()


def test_a_subject_may_be_kept_of_a_story_that_is_there(tmp_path: Path) -> None:
    """No picture is written again, and the page stays."""
    out = tmp_path / "out"
    assert command(*CAT, "--steps", "2", "--out", out, "--explain") == 0
    files = contents(out)
    before = {name: (out / name).stat().st_mtime_ns for name in ("01.png", "02.png", "story.html")}
    assert command(*CAT, "--steps", "2", "--out", out, "--save-subject", tmp_path / "cat.safetensors") == 0
    assert (tmp_path / "cat.safetensors").exists()
    assert contents(out) == files
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_another_story_in_the_folder_is_told_of(tmp_path: Path, capsys: Capture) -> None:
    options = ["--steps", "1", "--vanilla", "--out", tmp_path / "out"]
    assert command(*CAT, "in space", *options) == 0
    assert "another story" not in capsys.readouterr().out
    assert command(*CAT, "at night", *options) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 pictures are in" in shown
    assert f"Pictures of another story in {tmp_path / 'out'} are replaced: 1\n" in shown
    assert command("a cat", "--settings", "in a meadow", *options) == 0
    assert "are replaced: 3\n" in capsys.readouterr().out
    assert sorted(contents(tmp_path / "out")) == ["01.png", "grid.png", "story.json"]


@pytest.mark.parametrize("name", ["story.json", "02.png", "grid.png", "story.html"])
def test_a_subject_is_not_kept_in_the_storys_own_files(name: str, tmp_path: Path, capsys: Capture) -> None:
    assert command(*CAT, "--out", tmp_path / "out", "--save-subject", tmp_path / "out" / ".." / "out" / name) == 2
    assert f"{name} is one of the story's own files" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_subject_takes_the_place_of_no_other_file(tmp_path: Path, capsys: Capture) -> None:
    """Of another recipe it does."""
    file, quick = tmp_path / "cat.safetensors", [*CAT, "--steps", "1", "--width", "16", "--height", "16"]
    save_file({"x": torch.zeros(1)}, file)
    line = [*quick, "--out", tmp_path / "out", "--save-subject", file]
    assert command(*line) == 2
    assert "cat.safetensors is not a subject file, and would be overwritten" in capsys.readouterr().err
    file.unlink()
    assert command(*line) == 0 and command(*line, "--record") == 0 and command(*line, "--record") == 0
    recording = file.read_bytes()
    assert command(*line) == 2
    assert "holds a recording, which would be lost" in capsys.readouterr().err
    assert file.read_bytes() == recording


def test_a_folder_beside_one_that_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "none" / ".." / "out"
    assert command(*CAT, "--steps", "1", "--width", "16", "--height", "16", "--out", out) == 0
    assert (tmp_path / "out" / "grid.png").exists()


@pytest.mark.parametrize("option", ["--model", "--single-file", "--lora", "--vae", "--embedding", "--save-subject"])
def test_a_name_that_is_too_long(option: str, tmp_path: Path, capsys: Capture) -> None:
    assert command(*CAT, "--out", tmp_path / "out", option, "x" * 300 + ".safetensors") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error:") and "too long" in line


@pytest.mark.parametrize(
    "name, options", [("story.json", []), ("story.html", ["--explain"]), ("02.png", []), ("grid.png", [])]
)
def test_what_only_has_the_name_of_a_storys_file_is_told_before_loading(
    name: str, options: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistory.model.ConsiStory", None)  # any use of it would be another error
    own = photo(tmp_path / "own.png").read_bytes()
    (tmp_path / "own.png").rename(tmp_path / name)
    assert command(*CAT, *options, "--out", tmp_path) == 2
    assert f"{name} is not a story's" in capsys.readouterr().err
    assert contents(tmp_path) == {name: own}


def test_a_page_of_another_story_goes(tmp_path: Path) -> None:
    assert command(*CAT, "--steps", "2", "--explain", "--out", tmp_path) == 0
    assert (tmp_path / "story.html").exists()
    assert command(*CAT, "--steps", "2", "--explain", "--out", tmp_path) == 0
    assert (tmp_path / "story.html").exists()
    assert command(*CAT, "--steps", "2", "--seed", "7", "--out", tmp_path) == 0
    assert not (tmp_path / "story.html").exists()


def test_what_is_drawn_later_has_a_folder_of_its_own() -> None:
    folders = [parse_extend(["f", "--settings", "x"]).out, parse_evaluate(["f"]).out]
    assert [*map(str, folders)] == ["more", "evaluation"]


@pytest.mark.parametrize("option", ["--control-weight", "--control-end", "--ip-adapter-weight"])
def test_options_that_would_do_nothing(option: str, tmp_path: Path, capsys: Capture) -> None:
    assert command(*CAT, option, "0.5", "--out", tmp_path / "out") == 2
    assert option in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_recording_needs_a_file(tmp_path: Path, capsys: Capture) -> None:
    assert command(*CAT, "--out", tmp_path / "out", "--record") == 2
    assert "name it with --save-subject" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def photo(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    colours = np.random.default_rng(sum(size)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size).save(path)
    return path


def test_photos_become_a_subject(tmp_path: Path, capsys: Capture) -> None:
    """New pictures of it now, and later; what is done to a photo is told."""
    photos = [photo(tmp_path / "one.png"), photo(tmp_path / "two.jpg", (300, 200))]
    kept, settings = tmp_path / "cat.safetensors", ["--settings", "in space", "in a meadow"]
    options = ["--subject", "a cat", "--steps", "3", "--out", tmp_path / "first", "--save-subject", kept]
    assert command("personalize", *photos, *settings, *options) == 0
    assert sorted(contents(tmp_path / "first")) == ["01.png", "02.png", "grid.png", "story.json"]
    record = json.loads((tmp_path / "first" / "story.json").read_text("utf-8"))
    assert record["prompts"] == ["a cat in space", "a cat in a meadow"] and record["photos"]["method"] == "inversion"
    shown = capsys.readouterr().err
    assert "two.jpg, 300x200 pixels, is cut to its centre of 200x200" in shown and "one.png" not in shown

    assert command("extend", kept, *settings, "--seed", "2", "--out", tmp_path / "again") == 0
    for name in ("01.png", "02.png"):
        first, again = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("first", "again"))
        assert np.abs(first - again).max() <= 1


@pytest.mark.parametrize("name, content", [("none.png", None), ("text.png", b"a text")], ids=["missing", "a text"])
def test_what_is_no_photo_is_refused(tmp_path: Path, capsys: Capture, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = [tmp_path / name, "--subject", "a cat", "--settings", "in space", "--out", tmp_path / "out"]
    assert command("personalize", *arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("consistory: error:") and name in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["extend"], ["personalize", "--subject", "a cat"]], ids=" ".join)
def test_a_name_that_is_mistyped_is_told_before_loading(
    arguments: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistory.model.ConsiStory", None)  # any use of it would be another error
    verb, *others = arguments
    assert command(verb, tmp_path / "cta", *others, "--settings", "in space", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"consistory: error: there is no file {tmp_path / 'cta'}: check the name\n"


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], ConsistoryConfig.photos()),
        (["--preset", "paper"], replace(ConsistoryConfig.paper(), dropout=0.0)),
        (["--preset", "reference", "--dropout", "0.5"], ConsistoryConfig.reference()),
    ],
)
def test_the_method_with_photos(options: list[str], expected: ConsistoryConfig) -> None:
    arguments = ["photo.jpg", "--subject", "a cat", "--settings", "in space", *options]
    assert method(parse_personalize(arguments), ConsistoryConfig.photos()) == expected


# Of a record, what is no argument of the call.
OTHER_FACTS = {
    "version", "model", "vae", "loras", "fingerprint", "dtype", "seeds", "anchor_prompts", "anchor_seeds", "files",
    "grid", "photos", "picture", "spacing", "prediction", "words",
}  # fmt: skip


def test_the_record_makes_the_same_pictures(tmp_path: Path) -> None:
    options = ["--steps", "3", "--seed", "5", "8", "--style", "a picture of", "--dropout", "0.25", "--freeu"]
    options += ["--preset", "reference", "--anchors", "1", "--guidance", "3", "--negative", "a robot", "--width", "96"]
    options += ["--clip-skip", "1"]
    assert command(*CAT, *options, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "story.json").read_text("utf-8"))
    files, parameters = record.pop("files"), {key: record[key] for key in record.keys() - OTHER_FACTS}
    config = record["config"]
    parameters["config"] = ConsistoryConfig(
        **{**config, "query_blend": QueryBlend(**config["query_blend"]), "freeu": FreeU(**config["freeu"])}
    )
    again = ConsiStory.from_pretrained(record["model"])(seed=record["seeds"], **parameters)
    for name, image in zip(files, again.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), image)


def test_python_m_consistory_is_the_command(tmp_path: Path) -> None:
    arguments = [*CAT, "--steps", "2", "--vanilla", "--out", "there"]
    done = subprocess.run(
        [sys.executable, "-m", "consistory", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"The story is in there: look at {Path('there') / 'grid.png'}"
    assert (tmp_path / "there" / "02.png").exists()


def test_what_stays_the_same_is_told_if_it_was_guessed(tmp_path: Path, capsys: Capture) -> None:
    line = [*CAT, "--steps", "1", "--width", "16", "--height", "16", "--out", tmp_path]
    for number, options in enumerate(([], [], ["--concept", "cat", "--seed", "1"], ["--vanilla"])):
        assert command(*line, *options) == 0
        told = 'Keeping the "cat" the same; --concept' in capsys.readouterr().out
        assert told == (number == 0), "the second time, there is nothing to draw"


def test_the_command_needs_no_terminal(tmp_path: Path) -> None:
    """Nothing to draw a bar on, and an output that cannot show the folder's name."""
    line = f"'{sys.executable}' -m consistory 'a cat' --settings x --steps 1 --width 16 --height 16 --out 日本 2>&-"
    shell = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(line, shell=True, cwd=tmp_path, stdout=subprocess.PIPE, timeout=300, env=shell)
    assert done.returncode == 0 and (tmp_path / "日本" / "grid.png").exists()
    assert "look at \\u65e5\\u672c" in done.stdout.decode("cp1252")


# --- what the user can fix -------------------------------------------------------------------------------------------


MALFORMED: dict[str, tuple[list[str], str]] = {
    "no arguments": ([], "SUBJECT"),
    "a subject among settings": (["--settings", "on the beach", "a cat"], "SUBJECT, which comes before the options"),
    "no settings": (["a cat"], "--settings"),
    "zero images": (["a cat", "--settings"], "--settings: expected at least one argument"),
    "unknown option": ([*CAT, "--colour", "red"], "--colour"),
    "shortened option": ([*CAT, "--drop", "0.5"], "--drop"),
    "steps in words": ([*CAT, "--steps", "many"], "'many'"),
    "seed in words": ([*CAT, "--seed", "lucky"], "'lucky'"),
    "dropout over 1": ([*CAT, "--dropout", "1.5"], "use 0 to 1"),
    "an option of the method without it": ([*CAT, "--vanilla", "--dropout", "0.5"], "which it leaves out"),
    "dropout in words": ([*CAT, "--dropout", "half"], "'half'"),
    "unknown type": ([*CAT, "--dtype", "int8"], "float16"),
    "unknown preset": ([*CAT, "--preset", "best"], "paper"),
    "preset and vanilla": ([*CAT, "--preset", "paper", "--vanilla"], "not allowed with"),
    "two models": ([*CAT, "--model", "a", "--single-file", "b"], "not allowed with"),
}
UNFIT: dict[str, tuple[list[str], str]] = {
    "empty subject": (["", "--settings", "in space"], "no subject is given"),
    "more than 100 images": (["a cat", "--settings", *["in space"] * 101], "1 to 100"),
    "absent concept": ([*CAT, "--concept", "dog"], "'dog'"),
    "one subject to be kept separate": ([*CAT, "--separate-subjects"], "name each of them, 2 to 31, as a concept"),
    "subject without a noun": (["with a hat", "--settings", "in space"], "name the word that stands for it"),
    "no steps": ([*CAT, "--steps", "0"], "commonly 20 to 50"),
    "too many steps": ([*CAT, "--steps", "1001"], "commonly 20 to 50"),
    "guidance not a number": ([*CAT, "--guidance", "nan"], "give a finite number"),
    "no anchors": ([*CAT, "--anchors", "0"], "use 1 to 2"),
    "more anchors than images": ([*CAT, "--anchors", "3"], "use 1 to 2"),
    "width not divisible": ([*CAT, "--width", "250"], "multiples of 32"),
    "negative height": ([*CAT, "--height", "-64"], "multiples of 32"),
    "seeds for other images": ([*CAT, "--seed", "1", "2", "3"], "give one seed, or one per picture"),
    "negative seed": ([*CAT, "--seed", "-1"], "use whole numbers from 0"),
    "empty chunks": ([*CAT, "--chunk", "0"], "use 1 or more"),
    "empty tiles": ([*CAT, "--tile", "0"], "use 1 or more"),
    "unknown device": ([*CAT, "--device", "abacus"], "use cpu, cuda or mps"),
    "absent device": ([*CAT, "--device", "cuda:99"], "use cpu, cuda or mps"),
    "absent variant": ([*CAT, "--variant", "fp8"], "fp8"),
    "too many layers skipped": ([*CAT, "--clip-skip", "3"], "use 0 to 2"),
    "absent LoRA": ([*CAT, "--lora", "nowhere.safetensors:0.5"], "there is no file nowhere.safetensors"),
    "LoRA without a weight": ([*CAT, "--lora", "x.safetensors:nan"], "weight of x.safetensors is nan"),
    "absent autoencoder": ([*CAT, "--vae", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
}


def check_mistake(arguments: list[str], hint: str, out: Path, capsys: Capture) -> None:
    """Exit code 2 and one line with a hint on stderr, nothing on stdout; the output folder is not there."""
    assert command(*arguments, "--out", out) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("consistory: error: ") and hint in line
    assert not out.exists()


@pytest.mark.parametrize("arguments, hint", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_arguments(arguments: list[str], hint: str, tmp_path: Path, capsys: Capture) -> None:
    check_mistake(arguments, hint, tmp_path / "out", capsys)


@pytest.mark.parametrize("arguments, hint", UNFIT.values(), ids=UNFIT.keys())
def test_arguments_that_do_not_fit(
    arguments: list[str], hint: str, tmp_path: Path, capsys: Capture, golden_weights: Path
) -> None:
    check_mistake([*arguments, "--model", str(golden_weights)], hint, tmp_path / "new" / "out", capsys)


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1")


def truncated(path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 4, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def stable_diffusion_1(path: Path) -> None:
    save_file({"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(8)}, path)


def unrelated(path: Path) -> None:
    save_file({"classifier.weight": torch.zeros(8)}, path)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "empty": (empty, "download it again"),
    "not a checkpoint": (text, "git lfs pull"),
    "truncated": (truncated, "download it again"),
    "another family": (stable_diffusion_1, "give an SDXL base checkpoint"),
    "other weights": (unrelated, "give a whole SDXL base checkpoint"),
    "a folder": (Path.mkdir, "checkpoint folder"),
}


@pytest.mark.parametrize("make, hint", FILES.values(), ids=FILES.keys())
def test_files_that_are_no_checkpoint(make: Callable[[Path], None], hint: str, tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path / "model.safetensors")
    check_mistake([*CAT, "--single-file", str(tmp_path / "model.safetensors")], hint, tmp_path / "out", capsys)


def test_a_pickled_file_is_not_opened(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"not even looked at")
    check_mistake([*CAT, "--single-file", str(tmp_path / "model.ckpt")], "pickled", tmp_path / "out", capsys)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, empty], ids=["missing", "empty folder", "a file"])
def test_folders_that_are_no_checkpoint(make: Callable[[Path], None], tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path / "model")
    check_mistake([*CAT, "--model", str(tmp_path / "model")], str(tmp_path / "model"), tmp_path / "out", capsys)


def test_an_output_folder_that_cannot_be_is_told_before_loading(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistory.model.ConsiStory", None)  # any use of it would be another error
    (tmp_path / "mine").write_text("mine")
    assert command(*CAT, "--out", tmp_path / "mine") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error: ") and "choose another folder" in line
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_mistake_leaves_an_earlier_story_alone(tmp_path: Path, golden_weights: Path) -> None:
    (tmp_path / "story.json").write_text('{"prompts": [], "seeds": [], "files": []}')
    (tmp_path / "01.png").write_text("earlier")
    before = contents(tmp_path)
    assert command(*CAT, "--model", golden_weights, "--anchors", "5", "--out", tmp_path) == 2
    assert contents(tmp_path) == before


def test_a_mistake_shows_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    arguments = [*CAT, "--model", "nowhere"]
    done = subprocess.run(
        [sys.executable, "-m", "consistory", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("consistory: error: ") and "nowhere" in line
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_is_a_warning(tmp_path: Path, capsys: Capture, golden_weights: Path) -> None:
    small = ["--model", golden_weights, "--steps", "1", "--width", "64", "--height", "64", "--vanilla"]
    assert command("a cat", "--settings", "very " * 80 + "far away", *small, "--out", tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: warning: ") and "far away" in line


# --- options, on a model that only listens ----------------------------------------------------------------------------


class Listener:
    """Stands for ConsiStory: notes how it is loaded and called, and does as it is told."""

    def __init__(self, act: Callable[[Callable[[int, int], None]], None] = lambda on_step: None) -> None:
        self.act = act
        self.loaded: tuple[Any, ...] = ()
        self.called: dict[str, Any] = {}

    def from_pretrained(self, name: str, **options: Any) -> Listener:
        self.loaded = ("folder", name, options)
        return self

    def from_single_file(self, path: str, **options: Any) -> Listener:
        self.loaded = ("file", path, options)
        return self

    def __call__(self, **arguments: Any) -> Listener:
        on_step, choose, on_picture = (arguments.pop(name) for name in ("on_step", "choose", "on_picture"))
        self.called = arguments
        pictures = len(arguments["settings"])
        chosen = choose({"prompts": arguments["settings"], "concepts": [], "seeds": [0] * pictures})
        self.act(on_step)
        for index in chosen:
            on_picture(index, np.zeros((8, 8, 3), np.uint8))
        return self

    @property
    def saved(self) -> list[Path]:
        """Folders with a finished story."""
        return [path.parent for path in Path().rglob("story.json")]


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Listener]:
    monkeypatch.chdir(tmp_path)

    def install(act: Callable[[Callable[[int, int], None]], None] = lambda on_step: None) -> Listener:
        listener = Listener(act)
        monkeypatch.setattr("consistory.model.ConsiStory", listener)
        return listener

    return install


# How a model is held by default.
AS_IT_IS = {"vae": None, "loras": [], "spacing": None, "prediction": None, "offload": False, "tile": None}


def test_defaults(listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    listener = listen()
    assert command(*CAT) == 0
    how = {"device": "cpu", "dtype": torch.float32, "variant": None, **AS_IT_IS}
    assert listener.loaded == ("folder", "sprites", how)
    assert listener.called == {
        "subject": "a cat", "settings": ["on the beach", "in the snow"], "style": "", "concepts": None, "seed": 0,
        "steps": 50, "guidance": 5.0, "negative_prompt": None, "clip_skip": 0, "anchors": None, "width": None,
        "height": None, "controls": [], "chunk": None, "config": ConsistoryConfig(), "record": None,
    }
    assert listener.saved == [Path("story")]


def test_settings_may_be_repeated(listen: Callable[..., Listener]) -> None:
    listener = listen()
    assert command("a cat", "--settings", "by day", "by night", "--settings", "in space") == 0
    assert listener.called["settings"] == ["by day", "by night", "in space"]


def test_every_option_reaches_the_call(listen: Callable[..., Listener]) -> None:
    listener = listen()
    options = "--style watercolor --concept cat --concept dog --seed 4 5 --steps 30 --guidance 7.5 --negative blur"
    options += " --anchors 1 --width 832 --height 1216 --dropout 0.7 --freeu --preset reference --out there"
    options += " --single-file sd_xl_base_1.0.safetensors --device mps --dtype bfloat16 --clip-skip 1"
    options += " --vae vae.safetensors --lora a.safetensors --lora b.safetensors:-0.5 --offload --tile 64 --chunk 3"
    options += " --record --save-subject cat.safetensors --spacing trailing --prediction v"
    assert command("a cat and a dog", *CAT[1:], *options.split()) == 0
    added = {"vae": "vae.safetensors", "loras": [("a.safetensors", 1.0), ("b.safetensors", -0.5)]}
    added |= {"spacing": "trailing", "prediction": "v"}
    how = {"device": "mps", "dtype": torch.bfloat16, "offload": True, "tile": 64, **added}
    assert listener.loaded == ("file", "sd_xl_base_1.0.safetensors", how)
    config = replace(ConsistoryConfig.reference(), dropout=0.7, freeu=FreeU())
    assert listener.called == {
        "subject": "a cat and a dog", "settings": ["on the beach", "in the snow"], "style": "watercolor",
        "concepts": ["cat", "dog"], "seed": [4, 5], "steps": 30, "guidance": 7.5, "negative_prompt": "blur",
        "clip_skip": 1, "anchors": 1, "width": 832, "height": 1216, "controls": [], "chunk": 3, "config": config,
        "record": Path("cat.safetensors"),
    }
    assert listener.saved == [Path("there")]


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], ConsistoryConfig()),
        (["--preset", "default"], ConsistoryConfig()),
        (["--preset", "paper"], ConsistoryConfig.paper()),
        (["--preset", "reference"], ConsistoryConfig.reference()),
        (["--vanilla"], ConsistoryConfig.vanilla()),
        (["--vanilla", "--freeu"], replace(ConsistoryConfig.vanilla(), freeu=FreeU())),
        (["--no-freeu"], ConsistoryConfig(freeu=None)),
        (["--dropout", "0"], ConsistoryConfig(dropout=0.0)),
        (["--separate-subjects"], ConsistoryConfig(separate_subjects=True)),
    ],
)
def test_the_method(options: list[str], expected: ConsistoryConfig, listen: Callable[..., Listener]) -> None:
    listener = listen()
    assert command(*CAT, *options) == 0
    assert listener.called["config"] == expected


@pytest.mark.parametrize(
    "options, cuda, device, dtype",
    [
        ([], True, "cuda", torch.float16),
        ([], False, "cpu", torch.float32),
        (["--device", "cpu"], True, "cpu", torch.float32),
        (["--device", "cuda:1"], True, "cuda:1", torch.float16),
        (["--dtype", "float32"], True, "cuda", torch.float32),
        (["--device", "mps"], False, "mps", torch.float32),
    ],
)
def test_device_and_type(
    options: list[str], cuda: bool, device: str, dtype: torch.dtype, listen: Callable[..., Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    listener = listen()
    assert command(*CAT, *options, "--variant", "fp16") == 0
    assert listener.loaded == ("folder", "sprites", {"device": device, "dtype": dtype, "variant": "fp16"} | AS_IT_IS)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:0.5", (r"C:\loras\a.safetensors", 0.5)),
        ("v1:2/a.safetensors", ("v1:2/a.safetensors", 1.0)),
        ("0.5", ("0.5", 1.0)),
    ],
)
def test_a_lora_and_its_weight(text: str, expected: tuple[str, float]) -> None:
    assert file_and_weight(text) == expected


def test_quiet_says_nothing(listen: Callable[..., Listener], capsys: Capture) -> None:
    listener = listen(steps)
    assert command(*CAT, "--quiet") == 0
    assert listener.saved and capsys.readouterr() == ("", "")


def interrupt(on_step: Callable[[int, int], None]) -> None:
    on_step(1, 8)
    raise KeyboardInterrupt


def test_an_interruption_is_one_line(listen: Callable[..., Listener], capsys: Capture) -> None:
    listener = listen(interrupt)
    assert command(*CAT) == 130
    assert capsys.readouterr() == ("", "consistory: interrupted; the same command goes on from here\n")
    assert not listener.saved


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.09 GB, max allowed: 18.13 GB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
    ids=["cuda", "mps", "cpu"],
)
def test_running_out_of_memory_says_what_to_do(
    error: RuntimeError, listen: Callable[..., Listener], capsys: Capture
) -> None:
    def exhaust(on_step: Callable[[int, int], None]) -> None:
        raise error

    listener = listen(exhaust)
    assert command(*CAT) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error: out of memory: draw fewer or smaller pictures")
    assert not listener.saved


def test_a_bug_is_no_lack_of_memory(listen: Callable[..., Listener]) -> None:
    def fail(on_step: Callable[[int, int], None]) -> None:
        raise RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")

    listen(fail)
    with pytest.raises(RuntimeError, match="size of tensor"):
        command(*CAT)


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(on_step: Callable[[int, int], None]) -> None:
    for done in (1, 2, 8):
        time.sleep(0.15)  # a bar is redrawn every tenth of a second
        on_step(done, 8)


def test_a_terminal_shows_progress(listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    listen(steps)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert command(*CAT) == 0
    assert "8/8" in sys.stderr.getvalue() and "100%" in sys.stderr.getvalue()


def test_a_file_shows_no_progress(listen: Callable[..., Listener], capsys: Capture) -> None:
    listen(steps)
    assert command(*CAT) == 0
    assert capsys.readouterr().err == ""


def test_a_mistake_on_a_terminal_is_still_one_line(
    tmp_path: Path, golden_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert command(*CAT, "--model", golden_weights, "--anchors", "5", "--out", tmp_path / "out") == 2
    assert sys.stderr.getvalue() == "consistory: error: 5 anchors do not fit 2 pictures: use 1 to 2\n"


def test_progress_does_without_tqdm(listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert listen(steps) and command(*CAT) == 0
    assert sys.stderr.getvalue() == ""


# --- help -------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "settings", "style", "concept", "negative", "out", "quiet", "model", "single-file", "variant", "device", "dtype",
    "seed", "steps", "guidance", "width", "height", "preset", "vanilla", "anchors", "dropout", "freeu", "no-freeu",
    "vae", "lora", "clip-skip", "chunk", "offload", "tile",
    "separate-subjects", "ip-adapter", "ip-adapter-weight", "spacing", "prediction", "embedding",
}


def test_help_teaches(capsys: Capture) -> None:
    assert command("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in OPTIONS)
    assert 'consistory "a cat" --settings "on the beach" "in the snow" "in space" --out story' in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_version(capsys: Capture) -> None:
    import consistory

    assert command("--version") == 0
    assert capsys.readouterr().out == f"consistory {consistory.__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    program = """
import sys
from consistory.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
