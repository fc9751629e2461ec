"""`--control` on the command line, and the pictures that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity import randomise
from PIL import Image
from safetensors.torch import save_file
from test_cli import CAT, Capture, command, contents

from consistory import ConsiStory, ConsistoryError, Control, ControlNet
from consistory.config import ControlNetConfig
from consistory.images import read_picture
from consistory.weights.sprites.train import CONTROL_JSON

QUICK = ["--steps", "3"]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ControlNet for the embedded model: what it draws is no matter here."""
    module = ControlNet(ControlNetConfig.from_json(CONTROL_JSON))
    randomise(module)
    with torch.no_grad():
        for parameter in (*module.controlnet_down_blocks.parameters(), *module.controlnet_mid_block.parameters()):
            parameter.mul_(0.3)
    folder = tmp_path_factory.mktemp("control") / "net"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONTROL_JSON))
    save_file(module.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def silhouette(path: Path, left: int = 8, size: int = 64) -> Path:
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[size // 3 : -size // 6, left : left + size // 2] = 255
    Image.fromarray(pixels).convert("RGB").save(path)
    return path


@pytest.fixture
def left(tmp_path: Path) -> Path:
    return silhouette(tmp_path / "left.png")


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return silhouette(tmp_path / "right one.png", left=24)


def drawn(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(folder / name)) for name in ("01.png", "02.png")])


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_picture_for_each_is_what_the_library_gives(net: Path, left: Path, right: Path, tmp_path: Path) -> None:
    options = ["--control", net, left, right, "--control-weight", "0.5", "--control-end", "0.7"]
    assert command(*CAT, *QUICK, *options, "--out", tmp_path / "out") == 0
    pipe = ConsiStory.from_pretrained("sprites")
    images = [read_picture(left), read_picture(right)]
    control = Control(ControlNet.from_pretrained(net), images, weight=0.5, end=0.7)
    story = pipe(subject="a cat", settings=CAT[2:], steps=3, controls=[control])
    assert np.array_equal(drawn(tmp_path / "out"), story.images)
    record = json.loads((tmp_path / "out" / "story.json").read_text("utf-8"))
    (steered,) = record["controls"]
    assert control.settings().items() <= steered.items() and steered["net"] == str(net)
    assert record["config"]["dropout"] == 0.7


def test_several_with_their_own_weights(net: Path, left: Path, right: Path, tmp_path: Path) -> None:
    """The same net twice: weights add up."""
    both = ["--control", net, left, "--control", net, right, "--control-weight", "0.7", "0"]
    assert command(*CAT, *QUICK, *both, "--out", tmp_path / "both") == 0
    one = ["--control", net, left, "--control-weight", "0.7"]
    assert command(*CAT, *QUICK, *one, "--out", tmp_path / "one") == 0
    assert np.array_equal(drawn(tmp_path / "both"), drawn(tmp_path / "one"))
    assert command(*CAT, *QUICK, "--control", net, left, "--out", tmp_path / "other") == 0
    assert not np.array_equal(drawn(tmp_path / "other"), drawn(tmp_path / "one"))


@pytest.mark.parametrize("options, dropout", [([], 0.7), (["--dropout", "0.5"], 0.5), (["--preset", "paper"], 0.7)])
def test_dropout(options: list[str], dropout: float, net: Path, left: Path, tmp_path: Path) -> None:
    assert command(*CAT, *QUICK, "--control", net, left, *options, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "story.json").read_text("utf-8"))["config"]["dropout"] == dropout


def test_a_steered_subject_is_kept_and_extended(
    net: Path, left: Path, right: Path, tmp_path: Path, capsys: Capture
) -> None:
    kept = tmp_path / "cat.safetensors"
    steered = ["--control", net, left, right, left, "--out", tmp_path / "all"]
    assert command(*CAT, "in space", *QUICK, *steered) == 0
    two = ["--control", net, left, right, "--save-subject", kept]
    assert command(*CAT, *QUICK, *two, "--out", tmp_path / "1") == 0
    assert command("extend", kept, "--settings", "in space", "--control", net, left, "--out", tmp_path / "2") == 0
    wanted, new = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("all/03.png", "2/01.png"))
    assert np.abs(new - wanted).max() <= 1
    # Without pictures, the new ones are free.
    assert command("extend", kept, "--settings", "in space", "--control", net, "--out", tmp_path / "3") == 0
    free = np.asarray(Image.open(tmp_path / "3" / "01.png")).astype(int)
    assert np.abs(free - wanted).max() > 10
    assert capsys.readouterr().err == ""


def test_a_picture_of_another_size_is_a_note(net: Path, tmp_path: Path, capsys: Capture) -> None:
    path = silhouette(tmp_path / "large.png", left=16, size=128)
    assert command(*CAT, *QUICK, "--control", net, path, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err == "consistory: warning: control pictures of 128x128 are stretched to 64x64\n"


def text(path: Path) -> None:
    path.write_text("a text")


def truncated(path: Path) -> None:
    silhouette(path)
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "there is no file"), (text, "is not a picture"), (truncated, "cannot be read"),
        (Path.mkdir, "is a folder: give a picture in it"),
    ],
    ids=["missing", "text", "truncated", "folder"],
)  # fmt: skip
def test_what_is_no_picture_is_told_before_loading(
    make: Callable[[Path], None], says: str, net: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistory.model.ConsiStory", None)  # any use of it would be another error
    make(tmp_path / "pose.png")
    assert command(*CAT, "--control", net, tmp_path / "pose.png", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error: ") and says in line and "pose.png" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        (["--control", "NET"], "name a picture after the ControlNet"),
        (["--control"], "--control: expected at least one argument"),
        (["--control-weight", "1", "2"], "there is no --control"),
        (["--control", "NET", "LEFT", "--control-end", "0.5", "0.6"], "2 numbers are given for 1 --control"),
        (["--control", "NET", "LEFT", "--control-start", "2"], "use 0 to 1"),
        (["--control", "NET", "LEFT", "--control-start", "0.9", "--control-end", "0.1"], "from 0.9 to 0.1"),
        (["--control", "NET", "LEFT", "LEFT", "LEFT"], "has 3 pictures to steer 2"),
        (["--control", "LEFT", "LEFT"], "not a complete safetensors file"),
        (["--control", "nowhere", "LEFT"], "there is no folder nowhere"),
        (["--control", "nowhere.safetensors", "LEFT"], "there is no file nowhere.safetensors"),
    ],
)
def test_mistakes(options: list[str], says: str, net: Path, left: Path, tmp_path: Path, capsys: Capture) -> None:
    options = [{"LEFT": str(left), "NET": str(net)}.get(option, option) for option in options]
    assert command(*CAT, *options, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error: ") and says in line
    assert not (tmp_path / "out").exists()


# --- reading pictures -------------------------------------------------------------------------------------------------

RED = (204, 51, 0)  # as grey: 91


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4), RED).convert(kind)
    path = tmp_path / ("a.tiff" if kind == "CMYK" else "a.png")
    image.save(path)
    pixels = read_picture(path)
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    dithered = image.convert("RGB").getpixel((0, 0))
    expected = {"L": (91, 91, 91), "LA": (91, 91, 91), "1": dithered}.get(kind, RED)
    assert pixels[0, 0].tolist() == list(expected)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    """As depth maps often are."""
    depth = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    assert read_picture(tmp_path / "depth.png")[..., 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("background, expected", [("white", 255), ("black", 0)])
def test_transparency_shows_the_background(background: str, expected: int, tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[..., :3] = 90
    pixels[0, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", background)[..., 0].tolist() == [[90, 90], [expected, expected]]


def test_a_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([90, 90, 90, 10, 200, 10])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_picture(tmp_path / "a.png", "black").tolist() == [[[0, 0, 0], [10, 200, 10]]]


def test_exif_turns_a_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (6, 4, 3)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_taken(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (0, 255, 128)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert not read_picture(path).any()
    assert caplog.messages == [f"{path} has 3 frames: the first one is taken"]


def test_a_picture_that_is_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConsistoryError, match="too many pixels"):
        read_picture(tmp_path / "a.png")


def test_reading_leaves_the_file_alone(left: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    read_picture(left)
    assert contents(tmp_path) == before
