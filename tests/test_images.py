"""Saving a story: files, their contents, and what happens when something is in the way."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import check_whole, save_until_killed

from consistory import ConsistoryError
from consistory.images import (
    GENERATOR,
    Album,
    Pixels,
    Record,
    check_can_save,
    check_free,
    encode_png,
    make_grid,
    make_record,
    save_story,
    write_atomically,
)

SETTINGS = {"model": "sprites", "steps": 4, "guidance": 5.0, "config": {"dropout": 0.5, "freeu": None}}


def pictures(n: int, height: int = 64, width: int = 64) -> Pixels:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Story:
    """What saving needs of a story; `consistory.Story` has more."""

    images: Pixels
    prompts: list[str]
    concepts: list[str]
    seeds: list[int]
    settings: dict[str, Any]


def story(n: int, height: int = 64, width: int = 64) -> Story:
    return Story(
        images=pictures(n, height, width),
        prompts=[f"a cat in place {i}" for i in range(n)],
        concepts=["cat"],
        seeds=[10 * i for i in range(n)],
        settings=SETTINGS,
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_story_is_numbered_pictures_a_grid_and_a_record(tmp_path: Path) -> None:
    save_story(story(3), tmp_path / "new" / "folder")
    assert files(tmp_path / "new" / "folder") == ["01.png", "02.png", "03.png", "grid.png", "story.json"]


def test_numbers_are_padded_so_that_names_sort(tmp_path: Path) -> None:
    save_story(story(100, 8, 8), tmp_path)
    assert files(tmp_path)[:2] == ["001.png", "002.png"]
    assert files(tmp_path)[99:] == ["100.png", "grid.png", "story.json"]


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (1, 3)])
def test_pictures_keep_every_pixel(tmp_path: Path, height: int, width: int) -> None:
    told = story(2, height, width)
    save_story(told, tmp_path)
    for name, image in zip(("01.png", "02.png"), told.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), image)


def test_each_png_says_how_it_was_made(tmp_path: Path) -> None:
    save_story(story(2), tmp_path)
    second = Image.open(tmp_path / "02.png").text
    assert second["prompt"] == "a cat in place 1" and second["seed"] == "10"
    parameters = json.loads(second["consistory"])
    assert parameters["prompts"] == ["a cat in place 0", "a cat in place 1"] and parameters["steps"] == 4
    assert json.loads(Image.open(tmp_path / "grid.png").text["consistory"]) == parameters


def test_prompts_in_any_script_survive(tmp_path: Path) -> None:
    prompts = ["een kat in café Änne, 50 €", "ネコ 🐈"]
    save_story(replace(story(2), prompts=prompts), tmp_path)
    assert [Image.open(tmp_path / name).text["prompt"] for name in ("01.png", "02.png")] == prompts
    assert json.loads((tmp_path / "story.json").read_text("utf-8"))["prompts"] == prompts


def test_the_record_holds_everything(tmp_path: Path) -> None:
    told = story(2)
    save_story(told, tmp_path)
    record = json.loads((tmp_path / "story.json").read_text("utf-8"))
    assert record.pop("version")
    assert record == {
        "prompts": told.prompts, "concepts": ["cat"], "seeds": [0, 10], **SETTINGS,
        "files": ["01.png", "02.png"], "grid": "grid.png",
    }


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, columns", [(1, 1), (3, 3), (5, 5), (6, 3), (9, 3), (10, 4), (100, 10)])
def test_a_grid_is_a_row_of_five_or_nearly_square(n: int, columns: int) -> None:
    grid = make_grid(pictures(n, 256, 256))
    rows = math.ceil(n / columns)
    assert grid.shape == (rows * 260 - 4, columns * 260 - 4, 3)


def test_a_grid_shows_the_pictures_in_order_on_white() -> None:
    images = pictures(7, 256, 512)
    grid = make_grid(images)
    covered = np.zeros(grid.shape[:2], dtype=bool)
    for i, image in enumerate(images):
        place = np.s_[i // 3 * 264 :, i % 3 * 520 :]
        assert np.array_equal(grid[place][:256, :512], image)
        covered[place][:256, :512] = True
    assert (grid[~covered] == 255).all()


@pytest.mark.parametrize("height, width, factor", [(64, 64, 4), (48, 80, 6), (255, 300, 2), (512, 512, 1)])
def test_small_pictures_are_enlarged_pixel_by_pixel(height: int, width: int, factor: int) -> None:
    (image,) = images = pictures(1, height, width)
    grid = make_grid(images)
    assert grid.shape == (height * factor, width * factor, 3)
    assert np.array_equal(grid, np.kron(image, np.ones((factor, factor, 1), dtype=np.uint8)))


# --- nothing half written ---------------------------------------------------------------------------------------------




def fail_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, writing a file whose final name is `name` fails after half of its bytes."""
    write = Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        if name in path.name:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)


@pytest.mark.parametrize("name", ["02.png", "grid.png", "story.json"])
def test_a_full_disk_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fail_at(name, monkeypatch)
    with pytest.raises(ConsistoryError, match=r"No space left on device.*choose another folder"):
        save_story(story(2), tmp_path)
    order = ["01.png", "02.png", "grid.png", "story.json"]
    assert files(tmp_path) == order[: order.index(name)]
    for path in tmp_path.glob("*.png"):
        Image.open(path).load()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old contents")
    fail_at("a", monkeypatch)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a", b"new contents")
    assert (tmp_path / "a").read_bytes() == b"old contents"
    assert files(tmp_path) == ["a"]


def test_writing_again_replaces(tmp_path: Path) -> None:
    save_story(story(2), tmp_path)
    told = replace(story(2), images=pictures(2)[::-1])
    save_story(told, tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "01.png")), told.images[0])
    assert len(files(tmp_path)) == 4


# --- what is in the way -----------------------------------------------------------------------------------------------


def blocked(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_text("mine")
    return [tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)]


@pytest.mark.parametrize("case", range(3), ids=["a file", "below a file", "a name too long"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path, case: int) -> None:
    folder = blocked(tmp_path)[case]
    for attempt in (check_can_save, lambda folder: save_story(story(1), folder)):
        with pytest.raises(ConsistoryError, match=r"cannot be written.*choose another folder"):
            attempt(folder)
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_can_save(tmp_path / "a" / "b" / "c")
    assert files(tmp_path) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    check_can_save(tmp_path / "there")
    assert files(tmp_path) == ["there"] and files(tmp_path / "there") == ["mine"]


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConsistoryError, match="Permission denied"):
        check_can_save(tmp_path / "a" / "b")
    assert files(tmp_path) == []


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image", "PIL.PngImagePlugin"):
        monkeypatch.setitem(sys.modules, name, None)
    for attempt in (check_can_save, lambda folder: save_story(story(1), folder)):
        with pytest.raises(ConsistoryError, match=r'pip install "consistory\[cli\]"'):
            attempt(tmp_path / "out")
    assert files(tmp_path) == []


# --- going on where a run has stopped ---------------------------------------------------------------------------------


def record(n: int, **changes: Any) -> Record:
    """Of `story(n)`, in full."""
    told = story(n)
    return make_record(told.prompts, told.concepts, told.seeds, {**SETTINGS, "width": 64, "height": 64}) | changes


def drawn(folder: Path, n: int, *indices: int) -> Album:
    """The folder of a run that has drawn some of n pictures."""
    album = Album(folder, record(n))
    for index in indices or range(n):
        album.add(index, story(n).images[index])
    return album


def test_pictures_that_are_there_are_not_missed(tmp_path: Path) -> None:
    assert Album(tmp_path / "new").begin(record(3)) == [0, 1, 2]
    drawn(tmp_path, 3, 1)
    assert Album(tmp_path).begin(record(3)) == [0, 2]
    drawn(tmp_path, 3, 0, 2).finish()
    assert Album(tmp_path).begin(record(3)) == []
    assert files(tmp_path) == ["01.png", "02.png", "03.png", "grid.png", "story.json"]


CHANGES: dict[str, dict[str, Any]] = {
    "version": {"version": "0.0.1"},
    "concepts": {"concepts": ["dog"]},
    "steps": {"steps": 5},
    "guidance": {"guidance": 5.5},
    "a part of the method": {"config": {"dropout": 0.25, "freeu": None}},
    "another option": {"negative_prompt": "a dog"},
    "size": {"width": 128},
    "all prompts": {"prompts": ["a dog"] * 3},
    "all seeds": {"seeds": [7, 8, 9]},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_pictures_of_another_run_are_drawn_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    drawn(tmp_path, 3)
    assert Album(tmp_path).begin(record(3, **changes)) == [0, 1, 2]


def test_only_what_decides_on_a_picture_counts(tmp_path: Path) -> None:
    """Not where the model lies, and not the other pictures: a longer story goes on from a shorter one."""
    drawn(tmp_path, 3)
    assert Album(tmp_path).begin(record(3, model="./sprites")) == []
    assert Album(tmp_path).begin(record(5)) == [3, 4]
    swapped = record(3, prompts=["a cat in place 0", "a cat elsewhere", "a cat in place 2"], seeds=[0, 10, 21])
    assert Album(tmp_path).begin(swapped) == [1, 2]


def test_settings_of_any_type_survive_the_metadata(tmp_path: Path) -> None:
    made = record(2, window=(0.1, 1 / 3), prompts=["ネコ 🐈", "café"])
    for _ in range(2):
        album = Album(tmp_path)
        for index in album.begin(made):
            album.add(index, story(2).images[index])
    assert Album(tmp_path).begin(made) == []


def test_a_damaged_picture_is_drawn_again(tmp_path: Path) -> None:
    drawn(tmp_path, 1)
    path = tmp_path / "01.png"
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        assert Album(tmp_path).begin(record(1)) == [0], length
    for place in range(data.index(b"IDAT"), len(data) - 12, 53):  # the pixels; the end mark after them holds nothing
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        assert Album(tmp_path).begin(record(1)) == [0], place
    path.write_bytes(data)
    assert Album(tmp_path).begin(record(1)) == []


def test_a_picture_that_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "02.png")
    before = (tmp_path / "02.png").read_bytes()
    for write in (lambda: Album(tmp_path).begin(record(3)), lambda: save_story(story(3, 8, 8), tmp_path)):
        with pytest.raises(ConsistoryError, match=r"02\.png is not a story's"):
            write()
    assert files(tmp_path) == ["02.png"] and (tmp_path / "02.png").read_bytes() == before


def test_a_grid_and_a_page_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / "story.html").write_text("my own")
    drawn(tmp_path, 2).finish()
    assert (tmp_path / "story.html").read_text() == "my own"
    Image.fromarray(pictures(1)[0]).save(tmp_path / "grid.png")
    with pytest.raises(ConsistoryError, match=r"grid\.png is not a story's"):
        Album(tmp_path).begin(record(2))


@pytest.mark.parametrize("text", ['{"title": "mine"}', '["prompts", "seeds", "files"]', '{"prompts": [', ""])
def test_a_record_that_is_not_ours_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "story.json").write_text(text)
    for write in (lambda: Album(tmp_path).begin(record(3)), lambda: save_story(story(3, 8, 8), tmp_path)):
        with pytest.raises(ConsistoryError, match=r"story\.json is not a story's"):
            write()
    assert files(tmp_path) == ["story.json"] and (tmp_path / "story.json").read_text() == text


def test_a_page_is_ours_if_it_says_so(tmp_path: Path) -> None:
    page = tmp_path / "story.html"
    for told in (b"<!doctype html>", b""):
        page.write_bytes(told)
        check_free(tmp_path, 1)
        with pytest.raises(ConsistoryError, match=r"story\.html is not a story's"):
            check_free(tmp_path, 1, page=True)
        drawn(tmp_path, 1).finish()
        assert page.read_bytes() == told, "beside a record of ours, too"
    page.write_bytes(b"<!doctype html>" + GENERATOR)
    check_free(tmp_path, 1, page=True)
    drawn(tmp_path, 1)
    assert not page.exists()


def test_a_story_without_pictures_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError, match="has no pictures"):
        save_story(story(0, 8, 8), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_too_large_for_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid may be; and somebody else's are."""
    save_story(story(2, 100, 100), tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    check_free(tmp_path, 2)
    Image.new("RGB", (100, 100)).save(tmp_path / "01.png")
    with pytest.raises(ConsistoryError, match=r"01\.png is not a story's"):
        check_free(tmp_path, 1)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    for name in ("02.png", "grid.png", "story.json"):
        (tmp_path / name).mkdir()
        with pytest.raises(ConsistoryError, match=rf"{name} is not a story's"):
            Album(tmp_path).begin(record(2))
        (tmp_path / name).rmdir()


def test_pictures_that_are_damaged_or_were_resized_are_no_help(tmp_path: Path) -> None:
    drawn(tmp_path, 3)
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:-40])
    (tmp_path / "02.png").write_text("no picture")
    with Image.open(tmp_path / "03.png") as image:
        text = dict(image.text)
    (tmp_path / "03.png").write_bytes(encode_png(pictures(1, 32, 32)[0], text))
    assert Album(tmp_path).begin(record(3)) == [0, 1, 2]


def test_the_first_new_picture_takes_the_old_record_away(tmp_path: Path) -> None:
    drawn(tmp_path, 3).finish()
    album = Album(tmp_path)
    album.begin(record(3, steps=9))
    assert "story.json" in files(tmp_path), "nothing has been drawn yet"
    album.add(2, pictures(1)[0])
    assert files(tmp_path) == ["01.png", "02.png", "03.png"]


def test_a_story_without_all_its_pictures_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"02\.png is missing"):
        drawn(tmp_path, 2, 0).finish()
    assert files(tmp_path) == ["01.png"]


def test_a_shorter_story_leaves_no_picture_of_a_longer_one(tmp_path: Path) -> None:
    """But what is not ours stays."""
    save_story(story(100, 8, 8), tmp_path)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "03.png")
    (tmp_path / "04.png").write_text("mine")
    (tmp_path / "cover.png").write_bytes((tmp_path / "001.png").read_bytes())
    save_story(story(2, 8, 8), tmp_path)
    assert files(tmp_path) == ["01.png", "02.png", "03.png", "04.png", "cover.png", "grid.png", "story.json"]


def test_unfinished_files_of_a_killed_run_go(tmp_path: Path) -> None:
    for name in (".01.png.123.part", ".07.png.9.part", ".grid.png.123.part", ".story.json.5.part", ".mine.1.part"):
        (tmp_path / name).write_text("half")
    save_story(story(1), tmp_path)
    assert files(tmp_path) == [".mine.1.part", "01.png", "grid.png", "story.json"]


def test_killed_at_any_change_of_a_file(tmp_path: Path) -> None:
    """While one story overwrites a longer one."""
    before, after = (SimpleNamespace(**asdict(replace(story(n), images=pictures(n, 8, 8)))) for n in (3, 2))
    save_story(after, tmp_path / "expected")
    operation, killed = 0, True
    while killed:
        folder = tmp_path / str(operation)
        save_story(before, folder)
        killed = save_until_killed(after, folder, operation)
        check_whole(folder)
        save_story(after, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()
        }
        operation += 1
    assert operation > 15
