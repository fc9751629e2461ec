"""A wheel, built and installed elsewhere, is whole and works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import consistory

ROOT = Path(__file__).parent.parent
HOUSE = {"consistory": "consistory", "kernels": "consistory/kernels", "weights": "consistory/weights"}
DATA = {".py", ".typed", ".html", ".json", ".txt", ".safetensors", ""}


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean and nothing of an older build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in HOUSE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--no-index", "--target", target)
    return target


def python(arguments: list[str], installed: Path, cwd: Path) -> str:
    """What a Python with the installed copy first on its path prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    """In particular no top-level `kernels` or `weights`, which other distributions are called too."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"consistory", f"consistory-{consistory.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    files = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in HOUSE.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in DATA and "__pycache__" not in path.parts
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "consistory/py.typed",
        "consistory/kernels/otsu/__init__.py",
        "consistory/weights/sdxl/unet.json",
        "consistory/weights/vocabulary/vocab.json",
        "consistory/weights/vocabulary/merges.txt",
        "consistory/weights/vocabulary/LICENSE",
    } <= files
    assert files <= held, sorted(files - held)


def test_the_wheel_holds_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"consistory-{consistory.__version__}.dist-info"
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "consistory = consistory.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_the_installed_copy_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    program = """
import consistory, consistory.kernels.otsu, consistory.weights.loading
from consistory.tokenizer import Tokenizer
print(consistory.__file__, consistory.kernels.__file__, consistory.weights.__file__, sep="\\n")
print(Tokenizer.clip().encode(["a cat"])[0, 2].item())
print(consistory.weights.loading.sdxl_configs()["unet"]["cross_attention_dim"])
"""
    *files, cat, width = python(["-c", program], installed, tmp_path).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert (cat, width) == ("2368", "2048")


def test_the_installed_copy_tells_a_story(installed: Path, tmp_path: Path) -> None:
    arguments = ["-m", "consistory", "a cat", "--settings", "on the beach", "in space", "--steps", "2", "--out", "here"]
    assert "here" in python(arguments, installed, tmp_path)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["01.png", "02.png", "grid.png", "story.json"]
