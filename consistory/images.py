"""A story as files: numbered PNGs, a grid to look at, and `story.json`, which says how to make it again."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from consistory.weights.errors import ConsistoryError

from .files import whole_name, write_atomically

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Record = dict[str, Any]  # how a story was made, as JSON would hold it
Choose = Callable[[Record], Sequence[int]]  # a story's record -> indices of the pictures to draw
OnPicture = Callable[[int, Pixels], None]  # index, uint8 [H, W, 3]

GRID = "grid.png"
RECORD = "story.json"
PAGE = "story.html"
GENERATOR = b'<meta name="generator" content="consistory">'  # near the start of every page
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
    """Write 01.png, 02.png, ..., grid.png and story.json into a folder, which is made if need be; another story goes.

    Each PNG has a text chunk "consistory", the run's parameters as JSON; a numbered one also has "prompt" and "seed".
    No file is ever seen half written, and story.json, which names the others, comes last.
    Raises ConsistoryError if Pillow is missing, there is no picture, the folder cannot be written or somebody else's
    file is in the way.
    """
    if not len(story.images):
        raise ConsistoryError("the story has no pictures: there is nothing to save")
    check_free(folder, len(story.images))
    album = Album(folder, make_record(story.prompts, story.concepts, story.seeds, story.settings))
    for index, image in enumerate(story.images):
        album.add(index, image)
    album.finish()


def make_record(prompts: list[str], concepts: list[str], seeds: list[int], settings: Mapping[str, Any]) -> Record:
    """Everything that is needed to run a story again, as JSON would hold it."""
    version = importlib.metadata.version("consistory")
    return {"version": version, "prompts": prompts, "concepts": concepts, "seeds": seeds, **settings}


@dataclass
class Album:
    """A folder that a story is drawn into, picture by picture, so that a run that is cut short loses little.

        album = Album(Path("story"))
        pipe(..., choose=album.begin, on_picture=album.add)  # draws what the folder lacks
        album.finish()

    Whenever the run ends, all PNGs are whole, and story.json is there only if it names pictures that are there, whole,
    and made as it says: the first new picture takes an earlier record away, and `finish` writes the new one last.
    Pictures of another story are overwritten one by one; those past the end of this one go when it is finished.
    Pictures that are nobody's story, and another story.json, are left alone: if one is in the way, nothing is drawn.

    record: see `make_record`; by default what `begin` is given.
    """

    folder: Path
    record: Record = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    def begin(self, record: Record) -> list[int]:
        """The indices of the pictures that the folder lacks. `record` describes the story.

        Raises ConsistoryError if a picture or a record of another kind is in the way.
        """
        self.record = record
        check_free(self.folder, len(record["prompts"]))
        return [index for index in every_picture(record) if not self._holds(index)]

    def add(self, index: int, image: Pixels) -> None:
        """Write one picture, uint8 [H, W, 3]. Raises ConsistoryError if the folder cannot be written."""
        text = {"prompt": self.record["prompts"][index], "seed": str(self.record["seeds"][index]), **self._text}
        data = encode_png(image, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (PAGE, RECORD, GRID) if is_page(self.folder / PAGE) else (RECORD, GRID):
                (self.folder / name).unlink(missing_ok=True)
            write_atomically(self.folder / self._names[index], data)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def finish(self) -> None:
        """Write the grid and story.json, once all pictures are there; remove what earlier runs have left behind.

        Raises ConsistoryError if a picture is missing or the folder cannot be written.
        """
        try:
            images = [np.asarray(_pillow().Image.open(self.folder / name)) for name in self._names]
            for path in self._leftovers():
                path.unlink(missing_ok=True)
            write_atomically(self.folder / GRID, encode_png(make_grid(np.stack(images)), self._text))
            record = {**self.record, "files": self._names, "grid": GRID}
            write_atomically(self.folder / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        except FileNotFoundError as error:
            raise ConsistoryError(f"{error.filename} is missing: run again, all ranks with one shared folder") from None
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    @property
    def _names(self) -> list[str]:
        return picture_names(len(self.record["prompts"]))

    @property
    def _text(self) -> dict[str, str]:
        return {"consistory": json.dumps(self.record)}

    def _holds(self, index: int) -> bool:
        """Is this picture there, whole, and made exactly as it would be now?"""
        wanted = {**self.record, "prompt": self.record["prompts"][index], "seed": str(self.record["seeds"][index])}
        found = read_record(self.folder / self._names[index])
        return found is not None and _decisive(found) == _decisive(json.loads(json.dumps(wanted)))

    def others(self) -> list[Path]:
        """Pictures of another story in the folder: this one overwrites them, or removes them when it is finished."""
        if not self.folder.is_dir():
            return []
        held = {name for index, name in enumerate(self._names) if self._holds(index)}
        numbered = [path for path in self.folder.iterdir() if re.fullmatch(r"\d+\.png", path.name)]
        return [path for path in numbered if path.name not in held and read_record(path)]

    def _leftovers(self) -> list[Path]:
        """Pictures of an earlier story that this one does not overwrite, and parts of files that a killed run left."""
        paths = [path for path in self.folder.iterdir() if path.name not in self._names]
        numbered = [path for path in paths if re.fullmatch(r"\d+\.png", path.name)]
        parts = [path for path in paths if re.fullmatch(r"\d+\.png|grid\.png|story\.json", whole_name(path) or "")]
        return [path for path in numbered if read_record(path)] + parts


def _decisive(record: Record) -> Record:
    """What decides on the looks of one picture: not the other pictures, nor where the model was."""
    return {key: value for key, value in record.items() if key not in ("prompts", "seeds", "model")}


def read_record(path: Path) -> Record | None:
    """How a numbered PNG was made: its story's record, and "prompt" and "seed"; its size is what it really is.

    None if there is no such file, or it is not whole or not ours.
    """
    text = read_text(path) or {}
    try:
        made = {key: text[key] for key in ("prompt", "seed", "width", "height")}
        return {**json.loads(text["consistory"]), **made}
    except (KeyError, TypeError, ValueError):
        return None


def read_text(path: Path) -> dict[str, Any] | None:
    """The text chunks of a picture, and its width and height; None if there is no such picture, or it is not whole."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            image.load()
            return {**getattr(image, "text", {}), "width": image.width, "height": image.height}
    except Exception:  # Pillow tells of damage by many exceptions
        return None


def every_picture(record: Record) -> Sequence[int]:
    """The indices of all pictures of a story."""
    return range(len(record["prompts"]))


def check_can_save(folder: Path) -> None:
    """Raises ConsistoryError if Pillow is missing or the folder cannot be written. Leaves nothing behind.

    For callers who want to know before they compute for minutes.
    """
    _pillow()
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists() and path.name != ".."]
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


def check_free(folder: Path, pictures: int, *, page: bool = False) -> None:
    """Raises ConsistoryError if a story of this many pictures would overwrite what is not a story's: a picture, the
    grid or the record; with `page`, also the page.
    """
    for name in (*picture_names(pictures), GRID):
        if os.path.lexists(folder / name) and not is_picture(folder / name):
            raise _not_ours(folder / name)
    if os.path.lexists(folder / RECORD) and not is_record(folder / RECORD):
        raise _not_ours(folder / RECORD)
    if page and os.path.lexists(folder / PAGE) and not is_page(folder / PAGE):
        raise _not_ours(folder / PAGE)


def picture_names(pictures: int) -> list[str]:
    digits = max(2, len(str(pictures)))
    return [f"{number:0{digits}}.png" for number in range(1, pictures + 1)]


def is_picture(path: Path) -> bool:
    """Whether a story's picture or grid is there, or a file that is not a whole picture any more."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:  # which reads the text before the pixels, but not these
            return "consistory" in image.info
    except pillow.Image.DecompressionBombError:  # a grid of many large pictures may be
        with path.open("rb") as file:
            return b"consistory\0" in file.read(1 << 16)
    except OSError as error:
        return error.errno is None  # else it is there, but cannot be read: a folder, for example
    except Exception:  # Pillow tells of damage by many exceptions
        return True


def is_record(path: Path) -> bool:
    """Whether a story's record is there. They are written whole, so that a damaged one is somebody else's."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"prompts", "seeds", "files"} <= record.keys()


def is_page(path: Path) -> bool:
    """Whether a page of `consistory.explain` is there."""
    try:
        with path.open("rb") as file:
            return GENERATOR in file.read(1000)
    except OSError:
        return False


def is_rgb(x: object) -> bool:
    """Whether it is a picture: uint8 [H, W, 3], with pixels."""
    return isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.size > 0


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


def read_png(path: Path) -> Pixels:
    """uint8 [H, W, 3], or [H, W] of a grey picture. Raises ConsistoryError if there is no such picture."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            return np.array(image)
    except OSError:
        raise ConsistoryError(f"{path} is missing or damaged: delete its folder, and draw it again") from None


def resize_bicubic(image: Pixels, height: int, width: int) -> Pixels:
    """uint8 [H, W, 3] -> [height, width, 3], with an antialiasing cubic kernel."""
    pillow = _pillow()
    resized = pillow.Image.fromarray(image).resize((width, height), pillow.Image.Resampling.BICUBIC)
    return np.array(resized)


def encode_jpeg(image: Pixels, quality: int) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a JPEG, colours at full resolution."""
    buffer = io.BytesIO()
    _pillow().Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def read_picture(path: Path, background: str = "white") -> Pixels:
    """Any picture that Pillow reads -> uint8 [H, W, 3], upright as its EXIF data says, transparency over a background.

    Of an animation, the first frame is taken, with a warning. Raises ConsistoryError for a file that is missing,
    damaged or no picture.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview is no animation
                logger.warning("%s has %d frames: the first one is taken", path, frames)
            upright = pillow.ImageOps.exif_transpose(image)
            if upright.mode == "F" or (upright.mode == "I" and image.format != "PNG"):
                raise ConsistoryError(f"{path} holds floats or 32-bit integers: save it with 8 or 16 bits a channel")
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                upright = pillow.Image.fromarray((np.asarray(upright) / 257).clip(0, 255).round().astype(np.uint8))
            if "A" in upright.getbands() or "transparency" in upright.info:
                over = upright.convert("RGBA")
                upright = pillow.Image.alpha_composite(pillow.Image.new("RGBA", over.size, background), over)
            return np.array(upright.convert("RGB"))
    except FileNotFoundError:
        raise ConsistoryError(f"there is no file {path}: check the name") from None
    except IsADirectoryError:
        raise ConsistoryError(f"{path} is a folder: give a picture in it") from None
    except pillow.UnidentifiedImageError:
        raise ConsistoryError(f"{path} is not a picture that can be read: give a PNG, JPEG or WebP file") from None
    except pillow.Image.DecompressionBombError:
        raise ConsistoryError(f"{path} has too many pixels: make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ConsistoryError(f"{path} cannot be read ({error}): save the picture again") from None


def _pillow() -> ModuleType:
    """Pillow is an extra: the library works without it until a picture is written."""
    try:
        import PIL.Image
        import PIL.ImageOps
        import PIL.PngImagePlugin
    except ImportError:
        raise ConsistoryError('Pillow, which handles pictures, is missing: pip install "consistory[cli]"') from None
    return PIL


def _not_ours(path: Path) -> ConsistoryError:
    return ConsistoryError(f"{path} is not a story's, and would be overwritten: choose another folder")


def _cannot_write(folder: Path, error: OSError) -> ConsistoryError:
    return ConsistoryError(f"{folder} cannot be written ({error.strerror}): choose another folder")
