"""What importing the library does, and which way its imports point."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"consistory": "consistory", "kernels": "consistory.kernels", "weights": "consistory.weights"}
PROGRAMS = {"consistory.weights.sprites.train", "consistory.weights.sprites.oracle"}  # not imported by the library
# Each of these may import those before it.
CHAIN = ["config", "attention", "unet", "recording", "controlnet", "sdsa", "story", "model", "distributed", "cli"]
DEPENDENCIES = {"torch", "safetensors", "tokenizers", "numpy", "einops", "triton"}
OF_TOKENIZERS = {"huggingface_hub"}  # a requirement of tokenizers
EXTRAS = {"PIL", "tqdm", "yaml"}


def source_files() -> dict[str, Path]:
    """Every module of the library, by its import name."""
    return {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for folder, package in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


SOURCES = source_files()


def imports(module: str) -> set[str]:
    """Absolute names of the modules that a source imports when it runs, in functions too."""
    names: set[str] = set()
    for node in walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parents(module, node.level), *filter(None, [node.module])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            names |= {member if member in SOURCES else base for member in members}
    return names


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from walk(child)


def parents(module: str, level: int) -> list[str]:
    """The package that a relative import with `level` dots starts from; nothing for an absolute one."""
    if level == 0:
        return []
    is_package = SOURCES[module].name == "__init__.py"
    parts = module.split(".")
    return parts[: len(parts) - level + is_package]


def library(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "consistory"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"consistory"}


def reached(module: str) -> set[str]:
    """Every library module that importing this one reaches, itself not counted unless through a cycle."""

    def follow(name: str, seen: set[str]) -> Iterator[str]:
        for target in library(imports(name)) - seen:
            seen.add(target)
            yield target
            yield from follow(target, seen)

    return set(follow(module, set()))


def within(package: str) -> list[str]:
    return [module for module in SOURCES if module == package or module.startswith(package + ".")]


# --- which way imports point ------------------------------------------------------------------------------------------


def test_the_sources_are_found() -> None:
    assert {f"consistory.{name}" for name in CHAIN} <= SOURCES.keys()
    assert {"consistory", "consistory.kernels", "consistory.weights", "consistory.weights.loading"} <= SOURCES.keys()
    assert all(library(imports(module)) <= SOURCES.keys() for module in SOURCES), "an import that leads nowhere"


@pytest.mark.parametrize("position, name", list(enumerate(CHAIN)), ids=CHAIN)
def test_the_chain_points_one_way(position: int, name: str) -> None:
    """Not even through other modules does one of the chain reach itself or a later one."""
    later = {f"consistory.{other}" for other in CHAIN[position:]}
    assert not reached(f"consistory.{name}") & later


def test_the_unet_knows_nothing_of_the_method() -> None:
    allowed = ("config", "attention", "blocks", "freeu", "kernels.precision", "weights.errors")
    assert reached("consistory.unet") <= {f"consistory.{name}" for name in allowed}


@pytest.mark.parametrize("module", within("consistory.kernels"))
def test_kernels_stand_alone(module: str) -> None:
    names = imports(module)
    assert library(names) <= set(within("consistory.kernels"))
    assert third_party(names) <= ({"torch", "triton"} if module.endswith(".fused") else {"torch"})


@pytest.mark.parametrize("module", [module for module in within("consistory.weights") if module not in PROGRAMS])
def test_weights_stand_alone(module: str) -> None:
    names = imports(module)
    assert library(names) <= set(within("consistory.weights")) - PROGRAMS
    optional = OF_TOKENIZERS if module == "consistory.weights.hub" else set()
    assert third_party(names) <= {"torch", "safetensors", "tokenizers", "numpy"} | optional


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_keeps_to_the_dependencies(module: str) -> None:
    assert third_party(imports(module)) <= DEPENDENCIES | EXTRAS | OF_TOKENIZERS


def test_nothing_imports_the_training_programs() -> None:
    assert not [module for module in SOURCES if imports(module) & PROGRAMS and module not in PROGRAMS]


# --- what importing does ----------------------------------------------------------------------------------------------

IMPORTABLE = [m for m in SOURCES if m not in PROGRAMS and not m.endswith((".fused", ".__main__"))]
REPORT = """
import importlib, json, os, random, sys, threading
import einops, numpy, safetensors.torch, tokenizers, torch

def state():
    tasks = "/proc/self/task"
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(numpy.random.get_state()),
        "python": repr(random.getstate()),
        "threads": len(os.listdir(tasks)) if os.path.isdir(tasks) else threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "default type": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "CUDA started": torch.cuda.is_initialized(),
    }

numpy.set_printoptions(threshold=10**6)
before, packages = state(), {name.split(".")[0] for name in sys.modules}
for module in sys.argv[1:]:
    importlib.import_module(module)
after = state()
added = {name.split(".")[0] for name in sys.modules} - packages - sys.stdlib_module_names
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "added": sorted(added),
    "triton": "triton" in sys.modules,
}))
"""
WITHOUT = """
import importlib, sys
for name in "triton PIL tqdm huggingface_hub diffusers transformers accelerate peft skimage scipy matplotlib".split():
    sys.modules[name] = None  # importing it fails, as where it is not installed
for module in sys.argv[1:]:
    importlib.import_module(module)

import torch
from consistory.kernels.extended_attention import extended_attention
q = torch.ones(1, 1, 1, 4, 16)
out = extended_attention(q, q, q, torch.zeros(0, 4, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.bool))
assert torch.allclose(out, q)
"""


def run(program: str, modules: list[str]) -> str:
    result = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(run(REPORT, IMPORTABLE))


def test_importing_pulls_in_the_dependencies_only(report: dict[str, Any]) -> None:
    assert report["added"] == ["consistory"]


def test_importing_does_not_import_triton(report: dict[str, Any]) -> None:
    assert not report["triton"]


def test_importing_draws_no_number_and_starts_nothing(report: dict[str, Any]) -> None:
    """No generator, thread or global setting changes."""
    assert report["changed"] == []


def test_importing_works_without_triton_and_the_extras() -> None:
    run(WITHOUT, IMPORTABLE)
