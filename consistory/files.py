"""Files that are seen whole or not at all: they are written under another name, and renamed once they are complete."""

from __future__ import annotations

import os
import re
from pathlib import Path


def part_path(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def whole_name(part: Path) -> str | None:
    """What a file was to be called that some process was writing, or was killed while it wrote; None for any other."""
    found = re.fullmatch(r"\.(.+)\.\d+\.part", part.name)
    return found and found[1]


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever looks at the path sees the file before, or the whole file after, never a part."""
    part = part_path(path)
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
