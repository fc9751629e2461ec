from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from consistory import ConsistoryError
from consistory.tensorfile import TensorFile, is_intact

METADATA = {"format": "tales", "prompt": 'a "cat", ein Kätzchen'}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, 3, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "mask": torch.randn(3, 5, generator=generator) > 0,
        "late": torch.randn(2, 3, generator=generator).half(),
        "empty": torch.zeros(2, 0, 4, dtype=torch.float16),
        "strided": torch.randn(4, 6, generator=generator).half().T[::2],
    }


def write(path: Path) -> Path:
    with TensorFile(path, METADATA, len(tensors())) as file:
        for name, tensor in tensors().items():
            file.write(name, tensor)
    return path


def test_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    read = load_file(path)
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert METADATA.items() <= file.metadata().items()
    assert is_intact(path)


def test_values_are_where_readers_want_them(tmp_path: Path) -> None:
    """Mapped into memory, a value's address is a multiple of its size."""
    with safe_open(write(tmp_path / "x.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_data_goes_to_the_disk_as_it_comes_and_the_file_appears_whole(tmp_path: Path) -> None:
    path, megabyte = tmp_path / "x.safetensors", torch.ones(2**18)
    with TensorFile(path, {}, 3) as file:
        for count in range(1, 4):
            file.write(f"{count}", megabyte)
            (part,) = tmp_path.iterdir()
            assert part != path and part.stat().st_size >= count * 2**20
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 3 * 2**20 + 2**12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(error), TensorFile(path, METADATA, 1) as file:
        file.write("x", torch.ones(3))
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_parts_of_killed_runs_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    for expected in ([path.name], [".y.safetensors.1.part", path.name]):
        with TensorFile(path, {}, 1) as file:
            file.write("x", torch.ones(3))
        assert sorted(each.name for each in path.parent.iterdir()) == expected
        for name in (path.name, "y.safetensors"):
            (path.parent / f".{name}.1.part").touch()


def test_a_failure_leaves_the_file_before(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TensorFile(path, METADATA, 1):
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.safetensors"):
        with pytest.raises(ConsistoryError, match="cannot be written"):
            TensorFile(path, METADATA, 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that always is")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError, match="No space left"), TensorFile(tmp_path / "x", METADATA, 1) as file:
        file._file = Path("/dev/full").open("wb")  # noqa: SIM115
        file.write("x", torch.ones(2**20))
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed(tmp_path: Path) -> None:
    """Whichever bit of the header's text or of the data changes."""
    path = write(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    (room,) = struct.unpack("<Q", whole[:8])
    text = len(whole[8 : 8 + room].rstrip())
    for place in [*range(8, 8 + text, 7), *range(8 + room, len(whole), 5)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not readable(path), f"a changed bit at {place} went unnoticed"
    for length in (0, 7, 8 + room // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not readable(path), f"{length} of {len(whole)} bytes passed for all"


def readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return is_intact(path)
    except (SafetensorError, OSError):
        return False


def test_a_file_that_states_no_checksum_is_not_intact(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "tales"}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    assert not is_intact(tmp_path / "x")


def test_longest_entries_fit_the_room(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "x", METADATA, 50) as file:
        file._end = 10**15  # nothing is that large, but places are written out in full
        for i in range(50):
            file.write(f"2.999.output.decoder.{100 + i}", torch.zeros(2, 0, 12800))
        file._finish()
