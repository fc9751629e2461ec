"""The methods that bench/compare.py sets beside ConsiStory, after a step or two of training."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from consistory.weights.loading import sdxl_configs
from parity import randn, randomise, relative_error
from safetensors.torch import load_file, save_file
from test_unet import SDXL_IN_SMALL, build

from consistory import ConsiStory
from consistory.attention import AttentionControl
from consistory.config import UNetConfig
from consistory.unet import Conditioning, UNet

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
def test_ip_adapter_equals_diffusers(tmp_path: Path) -> None:
    """A file with the published names, read by both."""
    unet, oracle = build(SDXL_IN_SMALL)
    written = ip_adapter.IPAdapter(unet, features=24)
    randomise(written)
    save_file(written.state_dict(), tmp_path / "adapter.safetensors")
    tensors = load_file(tmp_path / "adapter.safetensors")
    parts = {
        part: {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    oracle._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in oracle.attn_processors.values():
        processor.scale = [0.7]

    x, t = randn(3, 4, 32, 16), torch.tensor([981, 261, 1])
    cond = Conditioning(randn(3, 11, 20, seed=1), randn(3, 12, seed=2), torch.full((3, 6), 64.0))
    features = randn(3, 24, seed=5)
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes, "image_embeds": [features[:, None]]}
    expected = oracle(x, t, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample
    adapter = ip_adapter.IPAdapter.load(tmp_path / "adapter.safetensors", unet)
    control = ip_adapter.Decoupled(AttentionControl(), adapter(features), scale=0.7)
    assert relative_error(unet(x, t, cond, control), expected) <= 1e-5
    assert relative_error(unet(x, t, cond), expected) > 0.01


def test_ip_adapter_has_the_published_shapes_for_sdxl() -> None:
    """As in ip-adapter_sdxl_vit-h: four tokens of CLIP ViT-H's 1024 features, and 70 cross-attention layers."""
    with torch.device("meta"):
        adapter = ip_adapter.IPAdapter(UNet(UNetConfig.from_json(sdxl_configs()["unet"])), features=1024)
    shapes = {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
    assert shapes["image_proj.proj.weight"] == (8192, 1024) and shapes["image_proj.norm.bias"] == (2048,)
    numbers = sorted(int(name.split(".")[1]) for name in shapes if name.endswith("to_k_ip.weight"))
    assert numbers == list(range(1, 140, 2))
    assert shapes["ip_adapter.1.to_k_ip.weight"] == shapes["ip_adapter.119.to_v_ip.weight"] == (640, 2048)
    assert shapes["ip_adapter.121.to_k_ip.weight"] == shapes["ip_adapter.139.to_v_ip.weight"] == (1280, 2048)


def test_prompting_with_no_weight_changes_nothing(pipe: ConsiStory) -> None:
    adapter = ip_adapter.IPAdapter(pipe.unet, features=6)
    call = {"prompts": [PROMPT, "a cat on the beach"], "concepts": ["cat"], "seed": 1, "steps": 3}
    plain = pipe(**call).latents
    latents = [
        pipe(**call, observer=ip_adapter.Prompter(adapter, torch.ones(6), scale)).latents for scale in (0.0, 1.0)
    ]
    torch.testing.assert_close(latents[0], plain, atol=1e-4, rtol=0)
    assert not torch.allclose(latents[1], plain, atol=0.1)
