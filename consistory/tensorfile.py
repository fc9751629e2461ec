"""A safetensors file that is written tensor by tensor and whose damage is noticed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from consistory.weights.errors import ConsistoryError

from .files import part_path, whole_name

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64",
}  # fmt: skip
ENTRY = 192  # bytes of the header that one tensor takes at most: its name, shape and place
BLOCK = 2**22  # bytes that are read at a time


class TensorFile:
    """A context manager that writes one safetensors file, each tensor as it comes.

    The header tells where everything is, so it is known last, but it comes first: room for it is left, and what it does
    not need is filled with spaces, as the format allows. So there is never a second copy of the data, neither in memory
    nor on disk. Under its name the file appears when it is whole and on the disk; if anything fails, it never does.

    Raises ConsistoryError, when made and later, if the file cannot be written.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, str], tensors: int) -> None:
        """tensors: how many there will be at most."""
        self.path = Path(path)
        self._part = part_path(self.path)
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._room = _align(len(json.dumps(self._header)) + ENTRY * (tensors + 1))
        self._masks: dict[str, Tensor] = {}
        self._end = self._checksum = 0
        with _reported(self.path):
            if self.path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
            self._file.seek(8 + self._room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Masks wait until the end: after an odd number of bytes, larger values would be misaligned."""
        if tensor.dtype == torch.bool:
            self._masks[name] = tensor.cpu()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        place = [self._end, self._end + data.nbytes]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        self._end = place[1]
        self._checksum = zlib.crc32(data, self._checksum)
        with _reported(self.path):
            self._file.write(data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            with _reported(self.path):
                with self._file:
                    if kind is None:
                        self._finish()
                if kind is None:
                    os.replace(self._part, self.path)
                    self._remove_leftovers()
        finally:
            self._part.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Parts of this file that killed runs left: for SDXL gigabytes."""
        for path in self.path.parent.iterdir():
            if whole_name(path) == self.path.name:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        for name, mask in self._masks.items():
            self._write(name, mask)
        self._header["__metadata__"]["checksum"] = _with_header(self._checksum, self._header)
        header = json.dumps(self._header).encode()
        assert len(header) <= self._room, "more tensors than announced"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())


def is_intact(path: str | Path) -> bool:
    """Whether a file that TensorFile wrote still is what it was: reads it once, a little at a time."""
    with open(path, "rb") as file:
        (room,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(room))
        stated = header["__metadata__"].pop("checksum", None)
        checksum = 0
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return stated == _with_header(checksum, header)


def _with_header(checksum: int, header: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode(), checksum):08x}"


def _align(size: int) -> int:
    return -(-size // 8) * 8


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConsistoryError(f"{path} cannot be written ({error.strerror}): choose another name") from None
