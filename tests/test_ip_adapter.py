"""IP-Adapter against diffusers, its image encoder against transformers, and a picture as part of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from parity import randn, randomise, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_clip import CONFIGS, processor, save
from test_unet import SDXL_IN_SMALL, build
from torch import Tensor

from consistory import ConsiStory
from consistory.cli import main
from consistory.clip import CLIP, ImageEncoder
from consistory.config import UNetConfig
from consistory.ip_adapter import ImageTokens, IPAdapter, PicturePrompt, Resampler
from consistory.subject import Subject
from consistory.unet import Conditioning, UNet
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import sdxl_configs

CALL = {"prompts": ["a cat in space", "a cat on the beach", "a cat in the snow"], "concepts": ["cat"], "steps": 3}


@pytest.fixture(scope="module")
def pipe() -> ConsiStory:
    return ConsiStory.from_pretrained("sprites")


def plain(unet: UNet, features: int = 6) -> IPAdapter:
    return IPAdapter(unet, ImageTokens(features, tokens=4, context_width=unet.config.context_width))


def plus(unet: UNet, features: int = 6) -> IPAdapter:
    """As many layers as are published: diffusers counts on that."""
    return IPAdapter(unet, Resampler(features, tokens=5, width=128, layers=4, context_width=unet.config.context_width))


def seen(vector: Tensor) -> Tensor:
    """Features of no picture and of one with this vector."""
    return torch.stack([torch.zeros_like(vector), vector])


KINDS = {"plain": (plain, seen(randn(24, seed=5))), "plus": (plus, randn(2, 7, 24, seed=5))}


def written(path: Path, adapter: IPAdapter) -> Path:
    randomise(adapter)
    save_file(adapter.state_dict(), path)
    return path


# --- parity -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_diffusers(kind: str, tmp_path: Path) -> None:
    """A file with the published names, read by both; three pictures, the unconditional half without the picture."""
    unet, oracle = build(SDXL_IN_SMALL)
    make, features = KINDS[kind]
    path = written(tmp_path / "adapter.safetensors", make(unet, 24))
    tensors = load_file(path)
    parts = {
        part: {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    oracle._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for attention in oracle.attn_processors.values():
        attention.scale = [0.7]

    x, t = randn(6, 4, 32, 16), torch.tensor([981, 261, 1, 981, 261, 1])
    cond = Conditioning(randn(6, 11, 20, seed=1), randn(6, 12, seed=2), torch.full((6, 6), 64.0))
    both = features.repeat_interleave(3, dim=0)
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes, "image_embeds": [both[:, None]]}
    expected = oracle(x, t, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample

    picture = PicturePrompt.make(IPAdapter.load(path, unet), features, weight=0.7)
    prompted = replace(cond, context=picture.beside(unet.prompt_keys(cond.context), guided=True))
    assert relative_error(unet(x, t, prompted), expected) <= 1e-5
    assert relative_error(unet(x, t, cond), expected) > 0.01


def test_it_has_the_published_shapes_for_sdxl() -> None:
    """As in ip-adapter_sdxl_vit-h: four tokens of CLIP ViT-H's 1024 features, and 70 cross-attention layers."""
    with torch.device("meta"):
        adapter = plain(UNet(UNetConfig.from_json(sdxl_configs()["unet"])), features=1024)
    shapes = {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
    assert shapes["image_proj.proj.weight"] == (8192, 1024) and shapes["image_proj.norm.bias"] == (2048,)
    numbers = sorted(int(name.split(".")[1]) for name in shapes if name.endswith("to_k_ip.weight"))
    assert numbers == list(range(1, 140, 2))
    assert shapes["ip_adapter.1.to_k_ip.weight"] == shapes["ip_adapter.119.to_v_ip.weight"] == (640, 2048)
    assert shapes["ip_adapter.121.to_k_ip.weight"] == shapes["ip_adapter.139.to_v_ip.weight"] == (1280, 2048)


def test_plus_has_the_published_shapes_for_sdxl() -> None:
    """As in ip-adapter-plus_sdxl_vit-h: 16 tokens of all of CLIP ViT-H's states, 1280 wide."""
    with torch.device("meta"):
        resampler = Resampler(features=1280, tokens=16, width=1280, layers=4, context_width=2048)
    shapes = {name: tuple(x.shape) for name, x in resampler.state_dict().items()}
    outside = {"latents": (1, 16, 1280), "proj_in.weight": (1280, 1280), "proj_in.bias": (1280,)}
    outside |= {"proj_out.weight": (2048, 1280), "proj_out.bias": (2048,)}
    outside |= {"norm_out.weight": (2048,), "norm_out.bias": (2048,)}
    layer = {f"0.{norm}.{kind}": (1280,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    layer |= {"0.to_q.weight": (1280, 1280), "0.to_kv.weight": (2560, 1280), "0.to_out.weight": (1280, 1280)}
    layer |= {"1.0.weight": (1280,), "1.0.bias": (1280,), "1.1.weight": (5120, 1280), "1.3.weight": (1280, 5120)}
    assert shapes == outside | {f"layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}


@torch.no_grad()
@pytest.mark.parametrize("with_settings", [True, False])
def test_an_image_encoder_by_itself_equals_transformers(tmp_path: Path, with_settings: bool) -> None:
    """As in the folder beside published adapters, which has a `preprocessor_config.json` or none."""
    config = transformers.CLIPVisionConfig(
        hidden_size=40, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=16,
        projection_dim=24, hidden_act="gelu",
    )  # fmt: skip
    oracle = transformers.CLIPVisionModelWithProjection(config).eval()
    randomise(oracle)
    oracle.save_pretrained(tmp_path)
    prepare = processor()(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    if with_settings:
        prepare.save_pretrained(tmp_path)
    pictures = [np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)]
    pixels = prepare(pictures, return_tensors="pt")["pixel_values"].float()
    encoder = ImageEncoder.from_pretrained(tmp_path)
    assert relative_error(encoder.embed(pictures), oracle(pixels).image_embeds) <= 1e-5
    for image, given in ((pictures[0], pixels), (None, torch.zeros_like(pixels))):
        expected = oracle(given, output_hidden_states=True).hidden_states[-2]
        assert relative_error(encoder.patches([image]), expected) <= 1e-5


def test_an_image_encoder_may_come_in_a_whole_clip(tmp_path: Path) -> None:
    save(tmp_path, next(iter(CONFIGS.values())))
    pictures = [np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)]
    features = ImageEncoder.from_pretrained(tmp_path).embed(pictures)
    expected = CLIP.from_pretrained(tmp_path).embed_images(pictures)
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), expected)


# --- in a story -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_without_weight_changes_nothing(pipe: ConsiStory, kind: str) -> None:
    make, features = KINDS[kind]
    adapter = make(pipe.unet, 24)
    randomise(adapter)
    before = pipe(**CALL).latents
    latents = [pipe.with_picture(adapter, features, weight)(**CALL).latents for weight in (0.0, 1.0)]
    torch.testing.assert_close(latents[0], before, atol=1e-4, rtol=0)
    assert not torch.allclose(latents[1], before, atol=0.1)
    assert pipe.picture is None


def test_a_picture_prompts_later_pictures_too(pipe: ConsiStory, tmp_path: Path) -> None:
    """At once, in chunks, and by a subject that was kept: the same pictures."""
    adapter = IPAdapter.load(written(tmp_path / "adapter.safetensors", plain(pipe.unet)), pipe.unet)
    prompted = pipe.with_picture(adapter, seen(torch.ones(6)), weight=0.5)
    story = prompted(**CALL)
    torch.testing.assert_close(prompted(**CALL, chunk=1).latents, story.latents, atol=1e-4, rtol=0)
    for record in (None, tmp_path / "recording.safetensors"):
        first = prompted(**CALL | {"prompts": CALL["prompts"][:2]}, record=record)
        more = first.subject.extend(prompts=CALL["prompts"][2:])
        torch.testing.assert_close(more.latents, story.latents[2:], atol=1e-4, rtol=0)
    assert story.settings["picture"] == {
        "adapter": str(tmp_path / "adapter.safetensors"), "weight": 0.5,
        "features": hashlib.sha256(np.repeat([0, 1], 6).astype(np.float32).tobytes()).hexdigest(),
    }  # fmt: skip


def test_a_subject_belongs_to_its_picture(pipe: ConsiStory, tmp_path: Path) -> None:
    adapter, ones = plain(pipe.unet), seen(torch.ones(6))
    prompted = pipe.with_picture(adapter, ones)
    prompted(**CALL).subject.save(tmp_path / "cat.safetensors")
    assert Subject.load(tmp_path / "cat.safetensors", pipe.with_picture(adapter, ones)).recipe.steps == 3
    for other in (pipe, pipe.with_picture(adapter, seen(torch.zeros(6))), pipe.with_picture(adapter, ones, 0.5)):
        with pytest.raises(ConsistoryError, match="another picture prompt: load what it was made with"):
            Subject.load(tmp_path / "cat.safetensors", other)
        assert other.fingerprint != prompted.fingerprint


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, plus])
def test_the_command(
    pipe: ConsiStory, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[UNet, int], IPAdapter]
) -> None:
    clip = save(tmp_path / "encoder", next(iter(CONFIGS.values())))
    features = clip.config.projection_dim if make is plain else clip.config.vision_config.hidden_size
    file = written(tmp_path / "adapter.safetensors", make(pipe.unet, features))
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "picture.png")
    out, cat = tmp_path / "out", str(tmp_path / "cat.safetensors")
    options = ["--ip-adapter", str(file), str(tmp_path / "encoder"), str(tmp_path / "picture.png"), "--quiet"]
    story = ["a cat", "--settings", "in space", "in the snow", "--steps", "3", "--out", str(out), *options]
    assert main([*story, "--save-subject", cat, "--ip-adapter-weight", "0.5"]) == 0
    record = json.loads((out / "story.json").read_text())
    assert record["picture"]["adapter"] == str(file) and record["picture"]["weight"] == 0.5

    more = ["extend", cat, "--settings", "on the beach", "--out", str(tmp_path / "more"), *options]
    assert main([*more, "--ip-adapter-weight", "0.5"]) == 0
    assert main(more) == 2
    assert "another picture prompt" in capsys.readouterr().err

    (tmp_path / "picture.png").unlink()
    story[story.index(str(out))] = str(tmp_path / "none")
    assert main(story) == 2
    assert f"there is no file {tmp_path / 'picture.png'}: check the name" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        (["image_proj.proj.0.weight"], "holds an IP-Adapter for faces"),
        (["lora_unet_x.lora_up.weight"], r"holds no IP-Adapter \(its keys: lora_unet_x.lora_up.weight\): give"),
    ],
)
def test_another_kind_of_file_is_refused(pipe: ConsiStory, keys: list[str], message: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(ConsistoryError, match=message):
        IPAdapter.load(tmp_path / "other.safetensors", pipe.unet)


def test_an_adapter_for_another_model_is_refused(pipe: ConsiStory, tmp_path: Path) -> None:
    unet, _ = build(SDXL_IN_SMALL)
    for make in (plain, plus):
        path = written(tmp_path / "adapter.safetensors", make(unet))
        with pytest.raises(ConsistoryError, match=r"does not fit its configuration.*give an SDXL IP-Adapter"):
            IPAdapter.load(path, pipe.unet)
    with pytest.raises(ConsistoryError, match="is for another model: load it for this one's UNet"):
        pipe.with_picture(IPAdapter.load(path, unet), seen(torch.ones(6)))


def test_features_and_weight_that_do_not_fit(pipe: ConsiStory) -> None:
    adapter = plain(pipe.unet)
    for features in (torch.ones(6), torch.ones(2, 5), torch.ones(2, 3, 6)):
        with pytest.raises(ConsistoryError, match=r"features \[.*\] do not fit unnamed, which reads \[2, 6\]"):
            pipe.with_picture(adapter, features)
    with pytest.raises(ConsistoryError, match=r"features \[2, 6\] do not fit unnamed, which reads \[2, S, 6\]"):
        pipe.with_picture(plus(pipe.unet), torch.ones(2, 6))
    with pytest.raises(ConsistoryError, match="picture weight is nan: give a finite number"):
        pipe.with_picture(adapter, seen(torch.ones(6)), float("nan"))


def test_another_model_is_no_image_encoder(tmp_path: Path, golden_weights: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"holds no image encoder of CLIP \(clip_text_model\)"):
        ImageEncoder.from_pretrained(golden_weights / "text_encoder")
    with pytest.raises(ConsistoryError, match="is missing"):
        ImageEncoder.from_pretrained(tmp_path)
