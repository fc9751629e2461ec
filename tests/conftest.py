"""Fixtures for recorded tensors (see golden/README.md).

    def test_something(golden, golden_weights):
        tensors, case = golden("case1b_batch_n19")     # a case: golden.safetensors and case.json
        tensors, facts = golden("model_units")         # or units: units/model_units.safetensors and .json
        pipe = ConsiStory.from_pretrained(golden_weights)

`golden_weights` is a folder in the diffusers layout with the recorded model, complete with tokenizers. In the subset,
tokens that no recorded prompt has are embedded as zeros: compare with recorded numbers on recorded prompts only.
With CONSISTORY_GOLDEN set to the folder of the full recorded runs, both fixtures read from there. Without it, a test
that asks for a case outside the subset is skipped, and says so. Mark such tests `golden`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first defined
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracle libraries never need the network

SUBSET = Path(__file__).parent / "golden"
VOCABULARY = Path(__file__).parent.parent / "weights" / "vocabulary"
EMBEDDING = "text_model.embeddings.token_embedding"
FULL_ONLY = ("case1_batch", "case2_freeu_multi", "case3_cached", "case4_dropout", "case5_no_injection", "case5_vanilla")

Pair = tuple[dict[str, Tensor], dict[str, Any]]
Golden = Callable[[str], Pair]


def read_pair(tensors: Path, facts: Path) -> Pair:
    return load_file(tensors), json.loads(facts.read_text("utf-8"))


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(os.environ.get("CONSISTORY_GOLDEN") or SUBSET)


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> Golden:
    """Call it with the name of a case or of units: its tensors and its JSON."""

    def read(name: str) -> Pair:
        if name.endswith("_units"):
            return read_pair(golden_folder / "units" / f"{name}.safetensors", golden_folder / "units" / f"{name}.json")
        if golden_folder == SUBSET and name in FULL_ONLY:
            pytest.skip(f"{name} is not in the subset: set CONSISTORY_GOLDEN to the folder of the full recorded runs")
        tensors, case = read_pair(golden_folder / name / "golden.safetensors", golden_folder / name / "case.json")
        shared = load_file(SUBSET / "shared.safetensors") if golden_folder == SUBSET else {}
        return shared | tensors, case

    return read


@pytest.fixture(scope="session")
def golden_weights(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model's folder, in the diffusers layout."""
    recorded = golden_folder / "weights"
    if golden_folder != SUBSET:
        return recorded
    folder = tmp_path_factory.mktemp("golden") / "weights"
    shutil.copytree(recorded, folder)
    for name in ("text_encoder", "text_encoder_2"):
        vocabulary = json.loads((folder / name / "config.json").read_text("utf-8"))["vocab_size"]
        tensors = load_file(recorded / name / "model.safetensors")
        ids, rows = tensors.pop(f"{EMBEDDING}.ids"), tensors.pop(f"{EMBEDDING}.rows")
        table = torch.zeros(vocabulary, rows.shape[1])
        table[ids] = rows
        save_file({**tensors, f"{EMBEDDING}.weight": table}, folder / name / "model.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(VOCABULARY / file, folder / name)
    return folder
