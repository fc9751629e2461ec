"""Several processes that draw one story, on the CPU. Some are started by torchrun, most as torchrun would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import (
    check_whole,
    exit_code,
    free_port,
    start,
    start_function,
    start_ranks,
    subject_file,
    wait_for_pictures,
)
from safetensors.torch import load_file, save_file

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, Story
from consistory.cli import load, main
from consistory.distributed import Ranks, SharedError, draw_on_ranks
from consistory.options import parse
from consistory.subject import Subject

SETTINGS = ["on the beach", "in the snow", "in space", "at home", "in a meadow"]
CAT = ["a cat", "--settings", *SETTINGS]
SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 3}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


# --- the library ------------------------------------------------------------------------------------------------------


def as_rank(work: str, rank: int, size: int, port: int, weights: Path, path: Path) -> None:
    """One rank's life, in the file's folder: what it finds goes into the file."""
    os.chdir(path.parent)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    found = globals()[work](ConsiStory.from_pretrained(weights, dtype=torch.float64), rank)
    save_file({key: value.contiguous() for key, value in found.items()}, path)
    dist.destroy_process_group()


def on_ranks(work: str, size: int, weights: Path, tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    port, paths = free_port(), [tmp_path / f"{rank}.safetensors" for rank in range(size)]
    processes = [start_function(as_rank, work, rank, size, port, weights, path) for rank, path in enumerate(paths)]
    assert [exit_code(process) for process in processes] == [0] * size
    return [load_file(path) for path in paths]


def tensors(story: Story) -> dict[str, torch.Tensor]:
    return {
        "latents": story.latents,
        "images": torch.from_numpy(story.images).int(),
        "seeds": torch.tensor(story.seeds),
        **{f"masks.{s}": mask for s, mask in story.masks.items()},
        **{f"index.{s}": nearest.index for s, nearest in story.nearest.items()},
        **{f"subject.{s}": mask for s, mask in story.subject.masks.items()},
        "next_seed": torch.tensor(story.subject.recipe.next_seed),
    }


def tell_and_extend(pipe: ConsiStory, draw: Any = lambda draw, *args, **options: draw(*args, **options)) -> Any:
    story = draw(pipe, subject="a cute dog", settings=SETTINGS, **SMALL)
    more = draw(story.subject.extend, ["in the forest", "by night"])
    plain = draw(pipe, subject="a cute dog", settings=SETTINGS[:2], **SMALL, config=ConsistoryConfig.vanilla())
    return {
        f"{name} {key}": x
        for name, told in (("story", story), ("more", more), ("plain", plain))
        for key, x in tensors(told).items()
    }


def share_out(pipe: ConsiStory, rank: int) -> dict[str, torch.Tensor]:
    return tell_and_extend(pipe, draw_on_ranks)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_tell_the_story_that_one_process_tells(size: int, golden_weights: Path, tmp_path: Path) -> None:
    """With four, there are more ranks than extras, and than pictures of some stories."""
    expected = tell_and_extend(ConsiStory.from_pretrained(golden_weights, dtype=torch.float64))
    for found in on_ranks("share_out", size, golden_weights, tmp_path):
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            tolerance = 1e-4 if key.endswith("latents") else 1 if key.endswith("images") else 0
            assert found[key].shape == x.shape and (found[key].double() - x.double()).abs().max() <= tolerance, key


def count_steps(pipe: ConsiStory, rank: int) -> dict[str, torch.Tensor]:
    """Which pictures this rank hears of, and whether it runs the model at all."""
    pictures: list[int] = []
    steps: list[int] = []
    arguments = {"subject": "a cute dog", "settings": SETTINGS, **SMALL}
    story = draw_on_ranks(
        pipe,
        **arguments,
        choose=lambda record: [4, 2] if rank == 0 else [0],
        on_step=lambda done, total: steps.append(done),
        on_picture=lambda index, image: pictures.append(index),
    )
    return {"pictures": torch.tensor(pictures), "steps": torch.tensor(len(steps)), "seeds": torch.tensor(story.seeds)}


def test_the_first_rank_chooses_and_idle_ranks_rest(golden_weights: Path, tmp_path: Path) -> None:
    first, second, third = on_ranks("count_steps", 3, golden_weights, tmp_path)
    assert [rank["pictures"].tolist() for rank in (first, second, third)] == [[2], [4], []]
    assert first["steps"] > 0 and third["steps"] == 0
    assert all(rank["seeds"].tolist() == [5, 7] for rank in (first, second, third))


def record(pipe: ConsiStory, rank: int) -> dict[str, torch.Tensor]:
    story = draw_on_ranks(pipe, subject="a cute dog", settings=SETTINGS[:3], **SMALL, record="dog")
    return {"recorded": torch.tensor(story.subject.recorded is not None)}


def test_the_first_rank_alone_records(golden_weights: Path, tmp_path: Path) -> None:
    found = on_ranks("record", 2, golden_weights, tmp_path)
    assert [bool(rank["recorded"]) for rank in found] == [True, False]
    assert Subject.load(tmp_path / "dog", ConsiStory.from_pretrained(golden_weights, dtype=torch.float64)).recorded


def fail(pipe: ConsiStory, rank: int) -> dict[str, torch.Tensor]:
    """Errors before anything is drawn, everywhere or on one rank, and one while a rank draws."""
    raised: list[type[Exception]] = []
    good = {"subject": "a cute dog", "settings": SETTINGS, **SMALL}

    def stop(index: int, image: Any) -> None:
        if rank == 1:
            raise ConsistoryError("the disk is full")

    calls = [
        {**good, "concepts": ["dogs"]}, {**good, "steps": 0 if rank == 1 else 2}, good, {**good, "on_picture": stop},
    ]  # fmt: skip
    for call in calls:
        try:
            draw_on_ranks(pipe, **call)
        except ConsistoryError as error:
            raised.append(type(error))
            says = str(error)
    assert raised == [SharedError, SharedError, ConsistoryError]
    return {"says": torch.tensor(list(says.encode()))}


def test_errors_reach_every_rank(golden_weights: Path, tmp_path: Path) -> None:
    first, second = (bytes(rank["says"].tolist()).decode() for rank in on_ranks("fail", 2, golden_weights, tmp_path))
    assert second == "the disk is full"
    assert "another rank stopped early" in first and "\n" not in first


# --- the command ------------------------------------------------------------------------------------------------------


def command(weights: Path, out: Path, *options: str | Path) -> list[str]:
    small = ["--model", weights, "--dtype", "float64", "--steps", "4", "--width", "64", "--height", "64", "--out", out]
    return [str(x) for x in ("a cat", "--settings", *SETTINGS, *small, *options)]


def check_same(out: Path, expected: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert (out / "story.json").read_text("utf-8") == (expected / "story.json").read_text("utf-8")
    for path in out.glob("*.png"):
        mine, theirs = Image.open(path), Image.open(expected / path.name)
        assert mine.text == theirs.text
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs)).max() <= 1


def test_torchrun_gives_the_same_files(golden_weights: Path, tmp_path: Path) -> None:
    assert main(command(golden_weights, tmp_path / "one")) == 0
    done = subprocess.run(
        [*TORCHRUN, "-m", "consistory", *command(golden_weights, tmp_path / "two")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    concept, where = done.stdout.splitlines()
    assert 'the "cat"' in concept
    assert where == f"The story is in {tmp_path / 'two'}: look at {tmp_path / 'two' / 'grid.png'}"
    check_same(tmp_path / "two", tmp_path / "one")


def test_ranks_extend_a_kept_subject(golden_weights: Path, tmp_path: Path) -> None:
    """Kept by the ranks, as one process keeps it; and there are more ranks than pictures."""
    kept, shown = tmp_path / "cat.safetensors", tmp_path / "shown"
    assert main(command(golden_weights, tmp_path / "one", "--save-subject", tmp_path / "one.safetensors")) == 0
    story = start_ranks(command(golden_weights, tmp_path / "story", "--save-subject", kept), shown, 2)
    assert [exit_code(rank) for rank in story] == [0, 0]
    assert subject_file(kept) == subject_file(tmp_path / "one.safetensors")
    extend = ["extend", kept, "--model", golden_weights, "--settings", "in the forest", "by night"]
    assert main([str(x) for x in (*extend, "--out", tmp_path / "more one")]) == 0
    ranks = start_ranks([*extend, "--chunk", "1", "--out", tmp_path / "more"], shown, 3)
    assert [exit_code(rank) for rank in ranks] == [0, 0, 0]
    check_same(tmp_path / "more", tmp_path / "more one")


def test_ranks_go_on_where_one_process_stopped(golden_weights: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "out", tmp_path / "shown"
    assert main(command(golden_weights, out)) == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    for name in ("04.png", "05.png"):
        (out / name).unlink()
    assert [exit_code(rank) for rank in start_ranks(command(golden_weights, out), shown, 2)] == [0, 0]
    assert f"3 of 5 pictures are in {out} already" in shown.read_text().splitlines()
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert {name for name in times if times[name] == again[name]} == {"01.png", "02.png", "03.png"}
    check_whole(out)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--concept", "dog"], "'dog'"),
        (["--model", "nowhere"], "nowhere"),
        (["--colour", "red"], "--colour"),
        (["--device", "abacus"], "use cpu, cuda or mps"),
    ],
    ids=["prompt", "model", "option", "device"],
)
def test_a_mistake_is_told_once(options: list[str], says: str, golden_weights: Path, tmp_path: Path) -> None:
    """The others end without an error, for torchrun would end the first one before it has told."""
    shown = tmp_path / "shown"
    ranks = start_ranks(command(golden_weights, tmp_path / "out", *options), shown, 2)
    assert [exit_code(rank) for rank in ranks] == [2, 0]
    (line,) = shown.read_text().splitlines()
    assert line.startswith("consistory: error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_help_is_shown_once(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    assert [exit_code(rank) for rank in start_ranks(["--help"], shown, 2)] == [0, 0]
    assert shown.read_text().count("usage:") == 1


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ConsiStory, "from_pretrained", lambda name, *, device, **options: devices.append(device))
    load(parse(CAT), Ranks())
    for options in ([], ["--device", "cuda"], ["--device", "cuda:0"], ["--device", "cpu"]):
        load(parse([*CAT, *options]), Ranks(rank=3, size=4, local=1))
    assert devices == ["cuda", "cuda:1", "cuda:1", "cuda:0", "cpu"]


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that draws six pictures of a sprite one by one."""
    folder = tmp_path_factory.mktemp("long")
    small = ["--steps", "2", "--width", "32", "--height", "32"]
    first = ["a cat", "--settings", *SETTINGS[:2], *small, "--save-subject", str(folder / "cat.safetensors")]
    assert main([*first, "--out", str(folder / "first")]) == 0
    settings = ["in space", "in a meadow", "on the beach"] * 2
    return ["extend", str(folder / "cat.safetensors"), "--settings", *settings, "--chunk", "1"]


def check_it_goes_on(long: list[str], out: Path, shown: Path) -> None:
    check_whole(out)
    assert not (out / "story.json").exists()
    there = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert 0 < len(there) < 6
    assert exit_code(start([*long, "--out", out], shown)) == 0
    check_whole(out)
    assert len(json.loads((out / "story.json").read_text("utf-8"))["files"]) == 6
    assert all(path.stat().st_mtime_ns == written for path, written in there.items())


@pytest.mark.parametrize("victim", [0, 1])
def test_without_torchrun_the_others_end_too(long: list[str], tmp_path: Path, victim: int) -> None:
    out, shown = tmp_path / "out", tmp_path / "shown"
    ranks = start_ranks([*long, "--out", out], shown, 2)
    wait_for_pictures(out, 1)
    ranks[victim].kill()
    assert exit_code(ranks[victim]) == -signal.SIGKILL
    assert exit_code(ranks[1 - victim], 120) == 2
    (line,) = shown.read_text().splitlines()
    assert line.startswith("consistory: error: another rank stopped early")
    check_it_goes_on(long, out, shown)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc, as Linux has it")
def test_a_killed_rank_ends_the_run(long: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (tmp_path / "shown").open("w") as shown:
        run = subprocess.Popen([*TORCHRUN, "-m", "consistory", *long, "--out", out], stdout=shown, stderr=shown)
    wait_for_pictures(out, 1)
    os.kill(rank_process(run.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait(120) != 0
    assert time.monotonic() - killed < 60
    assert "The story is in" not in (tmp_path / "shown").read_text()
    check_it_goes_on(long, out, tmp_path / "shown")


def rank_process(launcher: int, rank: int) -> int:
    """Its process id."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
        except OSError:  # it has ended since
            continue
    raise AssertionError(f"no rank {rank}")
