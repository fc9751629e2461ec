"""The methods that bench/compare.py sets beside ConsiStory, after a step or two of training."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from consistory import ConsiStory
from consistory.ip_adapter import IPAdapter
from consistory.weights.sprites.oracle import Oracle

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from baselines import dreambooth, ip_adapter, textual_inversion

PROMPT = "a cat in space"


@pytest.fixture(scope="module")
def pipe() -> ConsiStory:
    return ConsiStory.from_pretrained("sprites")


@pytest.fixture(scope="module")
def x0() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_lora_is_learnt_beside_the_model(pipe: ConsiStory, x0: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    before = copy.deepcopy(pipe.unet.state_dict())
    dreambooth.learn(pipe, x0, PROMPT, path, rank=2, steps=2, rate=1e-2, seed=0)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())

    merged, file = ConsiStory.from_pretrained("sprites", loras=[(path, 1.0)]).unet.state_dict(), load_file(path)
    changed = {key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in file if "lora_A" in key}
    for name, x in before.items():
        module = name.removesuffix(".weight")
        if module in changed:
            x = x + file[f"unet.{module}.lora_B.weight"] @ file[f"unet.{module}.lora_A.weight"]
            assert not torch.equal(merged[name], before[name])
        torch.testing.assert_close(merged[name], x, atol=1e-6, rtol=1e-5)


def test_textual_inversion_changes_a_word_and_nothing_else(pipe: ConsiStory, x0: torch.Tensor) -> None:
    prompts = [PROMPT, "a robot in space"]
    before = pipe.encode_prompts(prompts)
    vectors = textual_inversion.learn(pipe, x0, PROMPT, "cat", steps=2, rate=1e-1, seed=0)
    with textual_inversion.embedded(pipe, "cat", vectors):
        within = pipe.encode_prompts(prompts)
    after = pipe.encode_prompts(prompts)
    for old, learnt, new in zip(before, within, after, strict=True):
        assert torch.equal(old, new) and torch.equal(old[1], learnt[1])
        assert not torch.allclose(old[0], learnt[0], atol=1e-3)


@torch.no_grad()
def test_an_ip_adapter_starts_as_the_prompt(pipe: ConsiStory) -> None:
    """Untrained, a layer makes of a token what it makes of the text's."""
    adapter = ip_adapter.untrained(pipe.unet, features=6)
    keys = adapter(torch.ones(1, 6))
    prompts = pipe.unet.prompt_keys(adapter.image_proj(torch.ones(1, 6)))
    assert keys.keys() == prompts.keys()
    assert all(torch.equal(keys[site][0], own.k) and torch.equal(keys[site][1], own.v) for site, own in prompts.items())


def test_features_are_of_the_subject() -> None:
    features = ip_adapter.features_of(Oracle.load(), torch.rand(3, 3, 64, 64))
    adapter = IPAdapter.load(ip_adapter.WEIGHTS, ConsiStory.from_pretrained("sprites").unet)
    assert features.shape == (3, adapter.image_proj.features)
