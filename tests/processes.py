"""Runs in processes of their own, which can be killed. They fork, after one import of torch, and so start at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from consistory.cli import main
from consistory.images import Pictures, save_story

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", "processes", "consistory.distributed", "PIL.PngImagePlugin"])


def start_function(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start(arguments: Sequence[str | Path], shown: Path, **environment: str) -> ForkServerProcess:
    """`consistory ARGUMENTS`, under way. What it writes to stdout and stderr is added to the file `shown`."""
    return start_function(_command, [str(argument) for argument in arguments], shown, environment)


def start_ranks(arguments: Sequence[str | Path], shown: Path, size: int) -> list[ForkServerProcess]:
    """As torchrun would start them, but nobody ends the others when one fails."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [start(arguments, shown, RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def save_until_killed(story: Pictures, folder: Path, operation: int) -> bool:
    """Save a story in a process that kills itself, as kill -9 would, at the n-th change to a file, before it is made or
    after half of the data is written. Returns whether it came that far."""
    process = start_function(_save_until_killed, story, folder, operation)
    code = exit_code(process)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def exit_code(process: ForkServerProcess, seconds: float = 300) -> int:
    """Raises AssertionError if the process does not end in time."""
    process.join(seconds)
    assert process.exitcode is not None, f"still running after {seconds} seconds"
    return process.exitcode


def pictures_in(folder: Path) -> int:
    """The folder may come and go meanwhile: that it can be made is tried out first."""
    try:
        return len(list(folder.glob("[0-9]*.png")))
    except FileNotFoundError:
        return 0


def wait_for_pictures(folder: Path, number: int, seconds: float = 300) -> None:
    """Raises AssertionError if there are not so many numbered PNGs in time."""
    end = time.monotonic() + seconds
    while pictures_in(folder) < number:
        assert time.monotonic() < end, f"not {number} pictures in {folder} after {seconds} seconds"
        time.sleep(0.002)


def subject_file(path: Path) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """What is in it; the order in the file varies."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118


def check_whole(folder: Path) -> None:
    """What must hold whenever a run is killed: PNGs are whole, and a record lists those that it made, all there."""
    names = [path.name for path in folder.glob("*")]  # a killed run's unfinished files are hidden
    assert all(name.endswith((".png", ".part")) or name == "story.json" for name in names)
    assert all(name.startswith(".") for name in names if name.endswith(".part"))
    made = {path.name: json.loads(_text(path)["consistory"]) for path in folder.glob("[!.]*.png")}
    if "story.json" in names:
        record = json.loads((folder / "story.json").read_text("utf-8"))
        listed = [*record.pop("files"), record.pop("grid")]
        assert all(made[name] == record for name in listed)


def _text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


def _command(arguments: list[str], shown: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with shown.open("a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(main(arguments))


def _save_until_killed(story: Pictures, folder: Path, operation: int) -> None:
    left = operation

    def deadly(name: str) -> None:
        method = getattr(Path, name)

        def counted(path: Path, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                if name == "write_bytes":
                    method(path, arguments[0][: len(arguments[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return method(path, *arguments, **options)

        setattr(Path, name, counted)

    for name in ("mkdir", "write_bytes", "replace", "unlink"):
        deadly(name)
    save_story(story, folder)
