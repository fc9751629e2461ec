"""Checkpoints of all kinds that users have, loaded whole: saved by diffusers, with another autoencoder, with LoRAs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from parity import randn
from safetensors.torch import load_file, save_file
from single_file import to_original
from torch import Tensor, nn

from consistory import ConsiStory, ConsistoryError
from consistory.weights import loading

Json = dict[str, Any]
State = dict[str, Tensor]
PROMPTS = ["a photo of a cute dog sitting on the beach", "a watercolor of a fluffy dog, by night"]
QUICK: dict[str, Any] = {"prompts": PROMPTS, "concepts": ["dog"], "steps": 1, "width": 32, "height": 64}


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights)


def component(folder: Path, name: str) -> tuple[Json, State]:
    """A component's configuration and weights."""
    (weights,) = (folder / name).glob("*.safetensors")
    return json.loads((folder / name / "config.json").read_text("utf-8")), load_file(weights)


@pytest.fixture
def single_file(golden_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recorded model in the original layout; its configuration passes for SDXL's."""
    configs, original = {}, {}
    for name in loading.COMPONENTS:
        configs[name], state = component(golden_weights, name)
        kept = {key: x for key, x in state.items() if not key.endswith("position_ids")}
        original |= to_original(name, configs[name], kept)
    for name, path in {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}.items():
        configs[name] = json.loads((golden_weights / path).read_text("utf-8"))
    monkeypatch.setattr(loading, "sdxl_configs", lambda: configs)
    return written(original, tmp_path / "model.safetensors")


def written(tensors: State, path: Path) -> Path:
    save_file({key: x.contiguous() for key, x in tensors.items()}, path)
    return path


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


def assert_has(module: nn.Module, state: State) -> None:
    assert all(torch.equal(parameter, state[name]) for name, parameter in module.named_parameters())


# --- folders ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["fp16", None])
def test_a_folder_that_diffusers_saved_in_shards(golden_weights: Path, tmp_path: Path, variant: str | None) -> None:
    """A variant only, every component in several files, and tokenizers as they are saved today."""
    oracle = StableDiffusionXLPipeline.from_pretrained(golden_weights, add_watermarker=False)
    oracle.save_pretrained(tmp_path, variant="fp16", max_shard_size="200KB")
    assert len(list(tmp_path.glob("unet/*-of-*.safetensors"))) > 1
    pipe = ConsiStory.from_pretrained(tmp_path, variant=variant)
    assert_has(pipe.unet, oracle.unet.state_dict())
    assert_has(pipe.vae, oracle.vae.state_dict())
    context, pooled = pipe.encode_prompts(PROMPTS)
    expected, _, expected_pooled, _ = oracle.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=0)


def folder_with(golden_weights: Path, folder: Path, config: str, **changes: Any) -> Path:
    """A copy of the recorded model with other values in one of its configurations."""
    shutil.copytree(golden_weights, folder)
    content = json.loads((folder / config).read_text("utf-8"))
    (folder / config).write_text(json.dumps(content | changes))
    return folder


def test_a_checkpoint_that_predicts_v(golden_weights: Path, tmp_path: Path) -> None:
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = folder_with(golden_weights, tmp_path / "v", "scheduler/scheduler_config.json", **changes)
    schedule = ConsiStory.from_pretrained(folder).schedule
    assert (schedule.prediction, schedule.zero_terminal_snr) == ("v_prediction", True)


def test_what_a_checkpoint_predicts_can_be_given(golden_weights: Path, single_file: Path, tmp_path: Path) -> None:
    """To those that say something else; "v-ztsnr" also where a file says what cannot be."""
    schedule = ConsiStory.from_pretrained(golden_weights, prediction="v").schedule
    assert schedule == replace(ConsiStory.from_pretrained(golden_weights).schedule, prediction="v_prediction")
    folder = folder_with(
        golden_weights, tmp_path / "x", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True
    )
    with pytest.raises(ConsistoryError, match="load it with prediction v-ztsnr"):
        ConsiStory.from_pretrained(folder)
    given = ConsiStory.from_pretrained(folder, prediction="v-ztsnr").schedule
    assert (given.prediction_name, given.prediction, given.trailing) == ("v-ztsnr", "v_prediction", True)
    assert ConsiStory.from_pretrained(folder, prediction="epsilon").schedule.prediction_name == "epsilon"
    assert ConsiStory.from_single_file(single_file, prediction="v").schedule.prediction_name == "v"
    with pytest.raises(ConsistoryError, match="'x0': use one of epsilon, v, v-ztsnr"):
        ConsiStory.from_pretrained(folder, prediction="x0")


def test_a_checkpoint_for_inpainting(golden_weights: Path, tmp_path: Path) -> None:
    folder = folder_with(golden_weights, tmp_path / "inpainting", "unet/config.json", in_channels=9)
    with pytest.raises(ConsistoryError, match=r"UNet of 9 channels for latents of 4.*inpainting"):
        ConsiStory.from_pretrained(folder)


def test_the_refiner(golden_weights: Path, tmp_path: Path) -> None:
    changes = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
    folder = folder_with(golden_weights, tmp_path / "refiner", "model_index.json", **changes)
    with pytest.raises(ConsistoryError, match=r"not an SDXL base checkpoint .*Img2ImgPipeline without text_encoder"):
        ConsiStory.from_pretrained(folder)


# --- another autoencoder ----------------------------------------------------------------------------------------------


def vae_folder(config: Json, state: State, path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    written(state, path / "diffusion_pytorch_model.safetensors")
    return path


def vae_in_a_checkpoint(config: Json, state: State, path: Path) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    vae_folder(config, state, path / "vae")
    return path


def vae_file(config: Json, state: State, path: Path, prefix: str = "", **others: Tensor) -> Path:
    original = to_original("vae", config, state)
    tensors = {prefix + key.removeprefix("first_stage_model."): x for key, x in original.items()}
    return written(tensors | others, path.with_suffix(".safetensors"))


def vae_file_of_diffusers(config: Json, state: State, path: Path) -> Path:
    return written(state, path.with_suffix(".safetensors"))


VAES = {
    "a folder": vae_folder,
    "a checkpoint's folder": vae_in_a_checkpoint,
    "a file": vae_file,
    "a file with a prefix": partial(vae_file, prefix="first_stage_model."),
    "a checkpoint's file": partial(
        vae_file, prefix="first_stage_model.", **{"model.diffusion_model.out.2.bias": torch.zeros(1)}
    ),
    "a file with diffusers' names": vae_file_of_diffusers,
}


def other_vae(golden_weights: Path) -> tuple[Json, State]:
    """An autoencoder that is not the checkpoint's own."""
    config, state = component(golden_weights, "vae")
    return config, {name: 2 * x for name, x in state.items()}


@pytest.mark.parametrize("write", VAES.values(), ids=VAES.keys())
def test_another_autoencoder(
    write: Callable[..., Path], pipe: ConsiStory, golden_weights: Path, tmp_path: Path
) -> None:
    config, state = other_vae(golden_weights)
    path = write(config, state, tmp_path / "vae")
    changed = ConsiStory.from_pretrained(golden_weights, vae=path)
    assert_same(changed.unet, pipe.unet)
    assert_has(changed.vae, state)
    assert changed(**QUICK).settings["vae"] == str(path)


def test_a_single_file_without_an_autoencoder(single_file: Path, golden_weights: Path, tmp_path: Path) -> None:
    config, state = other_vae(golden_weights)
    bare = written({k: x for k, x in load_file(single_file).items() if "first_stage" not in k}, tmp_path / "bare")
    with pytest.raises(ConsistoryError, match="holds no vae"):
        ConsiStory.from_single_file(bare)
    for source in (bare, single_file):
        assert_has(ConsiStory.from_single_file(source, vae=vae_file(config, state, tmp_path / "vae")).vae, state)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"scaling_factor": 0.18215}, "other latents .scaling_factor 0.18215, not 0.13025"),
        ({"latent_channels": 16}, "other latents .latent_channels 16, not 4"),
        ({"block_out_channels": [16, 32]}, "other latents .levels 2, not 4"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny: give an AutoencoderKL"),
    ],
)
def test_autoencoders_of_other_latents(config: Json, says: str, golden_weights: Path, tmp_path: Path) -> None:
    own, state = other_vae(golden_weights)
    path = vae_folder(own | config, state, tmp_path / "vae")
    with pytest.raises(ConsistoryError, match=says):
        ConsiStory.from_pretrained(golden_weights, vae=path)


def test_a_file_that_is_no_autoencoder(golden_weights: Path, tmp_path: Path) -> None:
    path = written({"x.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError, match=r"vae of .*x.safetensors does not fit .*unknown: x.weight"):
        ConsiStory.from_pretrained(golden_weights, vae=path)


# --- LoRAs ------------------------------------------------------------------------------------------------------------

STYLED = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DOWN, UP = randn(2, 80), randn(32, 2, seed=1)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA of the recorded model's UNet and of its second text encoder."""
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    text = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{unet}.lora_down.weight": DOWN, f"{unet}.lora_up.weight": UP}
    tensors |= {f"{text}.lora_down.weight": randn(2, 48), f"{text}.lora_up.weight": randn(48, 2, seed=1)}
    return written(tensors, tmp_path / "style.safetensors")


def test_a_lora_is_merged(pipe: ConsiStory, golden_weights: Path, style: Path) -> None:
    own = pipe.unet.get_parameter(STYLED)
    for loras, weight in {((style, 0.5),): 0.5, (style,): 1, (str(style),): 1, ((style, 1), (style, 2)): 3}.items():
        merged = ConsiStory.from_pretrained(golden_weights, loras=loras)
        torch.testing.assert_close(merged.unet.get_parameter(STYLED), own + weight * UP @ DOWN, atol=1e-5, rtol=1e-6)
        assert not torch.equal(*(p.encode_prompts(PROMPTS)[1] for p in (merged, pipe)))
    assert merged(**QUICK).settings["loras"] == [[str(style), 1], [str(style), 2]]


def test_a_single_file_with_a_lora(single_file: Path, golden_weights: Path, style: Path) -> None:
    single = ConsiStory.from_single_file(single_file, loras=[(style, 0.5)])
    folder = ConsiStory.from_pretrained(golden_weights, loras=[(style, 0.5)])
    assert_same(single.unet, folder.unet)
    assert_same(single.text_encoders[1], folder.text_encoders[1])


def test_a_lora_that_overflows_is_not_silent(golden_weights: Path, style: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"overflows in torch.float16 .*use bfloat16"):
        ConsiStory.from_pretrained(golden_weights, dtype=torch.float16, loras=[(style, 1e5)])
    ConsiStory.from_pretrained(golden_weights, dtype=torch.bfloat16, loras=[(style, 1e5)])


def test_a_lora_in_place_of_a_list(golden_weights: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"loras is the single string 'style.safetensors': give a list"):
        ConsiStory.from_pretrained(golden_weights, loras="style.safetensors")
    with pytest.raises(ConsistoryError, match="give a list of files, or of pairs"):
        ConsiStory.from_pretrained(golden_weights, loras=("style.safetensors", 0.8))
