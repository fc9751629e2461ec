"""Pictures of every kind that users have, as pixels."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from consistory import ConsistoryError
from consistory.images import read_picture

RED, BLUE = (200, 30, 40), (20, 40, 220)


def halves(height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    """Red above blue."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2], pixels[height // 2 :] = RED, BLUE
    return pixels


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "ppm"])
def test_exact_formats_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(halves()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    read = read_picture(path)
    assert read.dtype == np.uint8 and np.array_equal(read, halves())


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "L", "LA", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.array(halves()).mean(axis=2).astype(np.uint8)
    if mode == "I;16":
        image, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, axis=2)
    else:
        image = Image.fromarray(halves()).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    assert image.mode == mode
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    assert np.abs(read_picture(path).astype(int) - expected).max() <= 1


def test_transparency_is_white(tmp_path: Path) -> None:
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    Image.fromarray(np.concatenate([halves(), alpha], axis=2)).save(tmp_path / "x.png")
    read = read_picture(tmp_path / "x.png").astype(int)
    assert (read[:, :10] == 255).all()
    assert np.abs(read[0, 10] - [228, 143, 148]).max() <= 1  # half red, half white
    assert np.array_equal(read[:, 20:], halves()[:, 20:])


def test_a_palettes_transparent_colour_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(halves()).quantize(4)
    image.save(tmp_path / "x.png", transparency=image.getpixel((0, 0)))
    read = read_picture(tmp_path / "x.png")
    assert (read[0] == 255).all() and np.array_equal(read[-1, 0], BLUE)


@pytest.mark.parametrize("orientation, edge", [(3, "bottom"), (6, "right"), (8, "left")])
def test_a_photo_stands_upright(tmp_path: Path, orientation: int, edge: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(halves()).save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = read_picture(tmp_path / "x.jpg").astype(int)
    pixel = {"bottom": read[-1, 5], "right": read[5, -1], "left": read[5, 0]}[edge]
    assert np.abs(pixel - RED).max() < 20


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), colour, np.uint8)) for colour in (RED, BLUE, RED)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.abs(read_picture(tmp_path / "x.gif")[4, 4].astype(int) - RED).max() < 10
    assert caplog.records[0].levelno == logging.WARNING and "3 frames" in caplog.text


def test_what_is_no_picture_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a text")
    (tmp_path / "empty.png").write_text("")
    Image.fromarray(halves(200, 300)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    for name, says in {
        "text.png": "is not a picture", "empty.png": "is not a picture", "none.png": "there is no file",
        "cut.png": "cannot be read", ".": "is a folder: give a picture in it",
    }.items():  # fmt: skip
        with pytest.raises(ConsistoryError, match=says):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_range_are_told(tmp_path: Path, dtype: type) -> None:
    """Floats from 0 to 1 would come out black."""
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "x.tiff")
    with pytest.raises(ConsistoryError, match="8 or 16 bits"):
        read_picture(tmp_path / "x.tiff")


def test_a_huge_picture_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(halves()).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ConsistoryError, match="too many pixels"):
        read_picture(tmp_path / "x.png")
