"""Runs of the command that are cut short, by kill -9 too, and what the same command makes of it afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import check_whole, exit_code, start, subject_file, wait_for_pictures

from consistory import ConsiStory
from consistory.cli import main
from consistory.images import Album, Pixels

SETTINGS = ["on the beach", "in the snow", "in space", "in a meadow"]
SMALL = ["--steps", "2", "--width", "32", "--height", "32"]

Command = Callable[..., list[int]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbered(folder: Path) -> dict[str, int]:
    """When which picture was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden_weights: Path) -> Command:
    """Tells a story of the settings with the recorded model, to a folder; says how many pictures each pass decoded."""
    decoded: list[int] = []
    decode = ConsiStory.decode
    monkeypatch.setattr(ConsiStory, "decode", lambda pipe, z, f: decoded.append(len(z)) or decode(pipe, z, f))

    def run(*settings: str, options: str = "", out: str = "out") -> list[int]:
        decoded.clear()
        fixed = ["--model", str(golden_weights), "--steps", "2", "--width", "64", "--height", "64"]
        assert main(["a cat", "--settings", *settings, *fixed, *options.split(), "--out", str(tmp_path / out)]) == 0
        return decoded

    return run


# --- the same command again -------------------------------------------------------------------------------------------


def test_a_finished_story_is_not_drawn_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SETTINGS[:3]) == [3]
    before = contents(tmp_path / "out"), numbered(tmp_path / "out")
    capsys.readouterr()
    assert command(*SETTINGS[:3]) == []
    assert (contents(tmp_path / "out"), numbered(tmp_path / "out")) == before
    assert capsys.readouterr().out.splitlines()[0] == f"3 of 3 pictures are in {tmp_path / 'out'} already"


@pytest.mark.parametrize("lost", [["03.png"], ["01.png"], ["02.png", "04.png", "story.json"]], ids=" ".join)
def test_missing_pictures_are_drawn_and_no_others(command: Command, tmp_path: Path, lost: list[str]) -> None:
    command(*SETTINGS)
    before, times = contents(tmp_path / "out"), numbered(tmp_path / "out")
    for name in lost:
        (tmp_path / "out" / name).unlink()
    gone = [name for name in lost if name.endswith(".png")]
    assert command(*SETTINGS) == [len(gone)]
    check_whole(tmp_path / "out")
    assert contents(tmp_path / "out").keys() == before.keys()
    again = numbered(tmp_path / "out")
    assert {name for name in times if again[name] != times[name]} == set(gone)


def test_a_drawn_again_picture_is_the_same(command: Command, tmp_path: Path) -> None:
    """Whichever others are drawn with it."""
    import numpy as np
    from PIL import Image

    command(*SETTINGS)
    path = tmp_path / "out" / "03.png"
    before = np.asarray(Image.open(path)).astype(int)
    path.unlink()
    command(*SETTINGS)
    assert np.abs(np.asarray(Image.open(path)) - before).max() <= 1


def test_one_more_setting_is_one_more_picture(command: Command, tmp_path: Path) -> None:
    command(*SETTINGS[:3])
    assert command(*SETTINGS) == [1]
    assert len(numbered(tmp_path / "out")) == 4


def test_another_story_is_drawn_whole(command: Command, tmp_path: Path) -> None:
    command(*SETTINGS)
    assert command(*SETTINGS[:3], options="--seed 9") == [3]
    assert command(*SETTINGS[:3], options="--seed 9 --dropout 0.25") == [3]
    assert sorted(contents(tmp_path / "out")) == ["01.png", "02.png", "03.png", "grid.png", "story.json"]
    check_whole(tmp_path / "out")


def test_without_the_method_anchors_are_not_run_for_others(command: Command, tmp_path: Path) -> None:
    command(*SETTINGS, options="--vanilla")
    (tmp_path / "out" / "04.png").unlink()
    assert command(*SETTINGS, options="--vanilla") == [1]


def test_a_subject_is_kept_though_all_pictures_are_there(command: Command, tmp_path: Path) -> None:
    command(*SETTINGS[:3])
    command(*SETTINGS[:3], options=f"--save-subject {tmp_path / 'cat.safetensors'}")
    command(*SETTINGS[:3], options=f"--save-subject {tmp_path / 'cat2.safetensors'}", out="other")
    assert subject_file(tmp_path / "cat.safetensors") == subject_file(tmp_path / "cat2.safetensors")
    check_whole(tmp_path / "out")


def test_a_run_that_stops_while_decoding_keeps_what_it_has(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Album.add

    def stop_at_the_third(album: Album, index: int, image: Pixels) -> None:
        if index == 2:
            raise RuntimeError("stopped")
        add(album, index, image)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(Album, "add", stop_at_the_third)
        command(*SETTINGS)
    assert sorted(contents(tmp_path / "out")) == ["01.png", "02.png"]
    assert command(*SETTINGS) == [2]
    check_whole(tmp_path / "out")


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_killed_at_ten_moments(tmp_path: Path) -> None:
    shown, kept, expected = tmp_path / "shown", tmp_path / "cat.safetensors", tmp_path / "expected"
    first = ["a cat", "--settings", *SETTINGS[:2], *SMALL, "--out", tmp_path / "first", "--save-subject", kept]
    extend = ["extend", kept, "--settings", *SETTINGS[1:], "--chunk", "1"]
    assert exit_code(start(first, shown)) == 0
    begun = time.monotonic()
    assert exit_code(start([*extend, "--out", expected], shown)) == 0
    a_picture = (time.monotonic() - begun) / 3

    moments, left_over = random.Random(0), []
    for number in range(10):
        out = tmp_path / str(number)
        run = start([*extend, "--out", out], shown)
        wait_for_pictures(out, number % 3)
        time.sleep(moments.random() * a_picture)
        run.kill()
        exit_code(run)
        check_whole(out)
        there = numbered(out)
        left_over.append(len(there))
        assert exit_code(start([*extend, "--out", out], shown)) == 0
        assert contents(out) == contents(expected)
        assert there.items() <= numbered(out).items(), "a finished picture was made again"
    assert {1, 2} & set(left_over), "no run was killed between two pictures"
