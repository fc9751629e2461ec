"""A story as files: numbered PNGs, a grid to look at, and `story.json`, which says how to make it again."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from consistory.weights.errors import ConsistoryError

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

GRID = "grid.png"
RECORD = "story.json"
GRID_PICTURE = 256  # pixels: a smaller picture is enlarged, so that a grid can be looked at
LONGEST_ROW = 5  # pictures


class Pictures(Protocol):
    """What is saved of a story. images: uint8 [N, H, W, 3].  settings: the run's parameters, fit for JSON."""

    @property
    def images(self) -> Pixels: ...
    @property
    def prompts(self) -> list[str]: ...
    @property
    def concepts(self) -> list[str]: ...
    @property
    def seeds(self) -> list[int]: ...
    @property
    def settings(self) -> dict[str, Any]: ...


def save_story(story: Pictures, folder: Path) -> None:
    """Write 01.png, 02.png, ..., grid.png and story.json into a folder, which is made if need be.

    Each PNG has a text chunk "consistory", the run's parameters as JSON; a numbered one also has "prompt" and "seed".
    No file is ever seen half written, and story.json, which names the others, comes last.
    Raises ConsistoryError if Pillow is missing or the folder cannot be written.
    """
    parameters = describe(story)
    text = {"consistory": json.dumps(parameters)}
    digits = max(2, len(str(len(story.images))))
    names = [f"{number:0{digits}}.png" for number in range(1, len(story.images) + 1)]
    files = {
        name: encode_png(image, {"prompt": prompt, "seed": str(seed), **text})
        for name, image, prompt, seed in zip(names, story.images, story.prompts, story.seeds, strict=True)
    }
    files[GRID] = encode_png(make_grid(story.images), text)
    record = {**parameters, "files": names, "grid": GRID}
    files[RECORD] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(folder / name, data)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def describe(story: Pictures) -> dict[str, Any]:
    """Everything that is needed to run a story again, as JSON would hold it."""
    version = importlib.metadata.version("consistory")
    return {
        "version": version, "prompts": story.prompts, "concepts": story.concepts, "seeds": story.seeds, **story.settings
    }


def check_can_save(folder: Path) -> None:
    """Raises ConsistoryError if Pillow is missing or the folder cannot be written. Leaves nothing behind.

    For callers who want to know before they compute for minutes.
    """
    _pillow()
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for path in made:
                if path.exists():
                    path.rmdir()
    except OSError as error:
        raise _cannot_write(folder, error) from None


def make_grid(images: Pixels) -> Pixels:
    """uint8 [N, H, W, 3] -> one picture, uint8 [H', W', 3]: a row of up to five, else as square as can be.

    Pictures under 256 pixels are enlarged by a whole factor; white gaps are 1/64 of a picture wide.
    """
    n, height, width, _ = images.shape
    factor = math.ceil(GRID_PICTURE / min(height, width))
    enlarged = images.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = factor * width // 64
    columns = n if n <= LONGEST_ROW else math.ceil(math.sqrt(n))
    blanks = -n % columns
    cells = np.pad(enlarged, ((0, blanks), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return rearrange(cells, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)[:-gap, :-gap]


def encode_png(image: Pixels, text: Mapping[str, str]) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a PNG with text chunks (tEXt; iTXt for what Latin-1 cannot hold)."""
    pillow = _pillow()
    chunks = pillow.PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    pillow.Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_picture(path: Path) -> Pixels:
    """Any picture that Pillow reads -> uint8 [H, W, 3], upright as its EXIF data says, transparency over white.

    Of an animation, the first frame is taken, with a warning. Raises ConsistoryError for a file that is no picture, or
    a damaged one.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":  # some cameras' JPEG with a preview
                logger.warning("%s has %d frames: the first one is taken", path, image.n_frames)
            upright = pillow.ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                upright = pillow.Image.fromarray((np.asarray(upright) / 257).clip(0, 255).round().astype(np.uint8))
            if upright.has_transparency_data:
                over = upright.convert("RGBA")
                upright = pillow.Image.alpha_composite(pillow.Image.new("RGBA", over.size, "white"), over)
            return np.array(upright.convert("RGB"))
    except FileNotFoundError:
        raise ConsistoryError(f"there is no file {path}: check the name") from None
    except pillow.UnidentifiedImageError:
        raise ConsistoryError(f"{path} is not a picture that can be read: give a PNG, JPEG or WebP file") from None
    except pillow.Image.DecompressionBombError:
        raise ConsistoryError(f"{path} has too many pixels: make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ConsistoryError(f"{path} cannot be read ({error}): save the picture again") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever looks at the path sees the file before, or the whole file after, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _pillow() -> ModuleType:
    """Pillow is an extra: the library works without it until a picture is written."""
    try:
        import PIL.Image
        import PIL.ImageOps
        import PIL.PngImagePlugin
    except ImportError:
        raise ConsistoryError('Pillow, which picture files need, is missing: pip install "consistory[cli]"') from None
    return PIL


def _cannot_write(folder: Path, error: OSError) -> ConsistoryError:
    return ConsistoryError(f"{folder} cannot be written ({error.strerror}): choose another folder")
