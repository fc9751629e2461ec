"""ControlNets from folders and single files, under both names; and what is none, or one of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from parity import randomise
from safetensors.torch import save_file
from single_file import SMALL
from torch import Tensor

from consistory import ConsistoryError
from consistory.config import ControlNetConfig
from consistory.controlnet import ControlNet
from consistory.weights import loading, names

State = dict[str, Tensor]
PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
HINT = {"conditioning_channels": 3, "conditioning_embedding_out_channels": [2, 3, 4, 6]}
DECODER_ONLY = ("out_channels", "sample_size", "up_block_types")
CONFIG = {key: value for key, value in SMALL["sdxl"]["unet"].items() if key not in DECODER_ONLY} | HINT
CONFIG |= {"_class_name": "ControlNetModel"}
OLDER = CONFIG | {"addition_embed_type": None, "cross_attention_dim": 768}


def oracle(config: dict[str, Any]) -> ControlNetModel:
    net = ControlNetModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    randomise(net)
    return net


@pytest.fixture(scope="module")
def state() -> State:
    return oracle(CONFIG).state_dict()


def to_original(state: State, config: dict[str, Any] = CONFIG) -> State:
    """The table read backwards, longest names first."""
    by_name = {rename.name: rename.original for rename in names.controlnet_table(config)}
    result = {}
    for key, tensor in state.items():
        stem = max((name for name in by_name if key.startswith(name + ".")), key=len)
        result[by_name[stem] + key.removeprefix(stem)] = tensor
    return result


def written(tensors: State, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def folder_of(config: dict[str, Any], state: State, folder: Path, weights: str = PLAIN) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    written(state, folder / weights)
    return folder


def loaded(component: loading.Component) -> State:
    config, tensors = component
    build: Callable[[], ControlNet] = lambda: ControlNet(ControlNetConfig.from_json(config))  # noqa: E731
    return loading.load_module(build, tensors, dtype=torch.float32, device="cpu").state_dict()


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in actual.items())


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_folder(state: State, tmp_path: Path) -> None:
    net = ControlNet.from_pretrained(folder_of(CONFIG, state, tmp_path / "net"))
    assert_same(net.state_dict(), state)
    assert net.name == str(tmp_path / "net") and net.stride == 8
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())


def test_what_diffusers_saves(state: State, tmp_path: Path) -> None:
    oracle(CONFIG).save_pretrained(tmp_path)
    assert_same(ControlNet.load(tmp_path).state_dict(), state)


def test_the_fp16_variant_of_a_folder(state: State, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    folder = folder_of(CONFIG, half, tmp_path / "net", FP16)
    assert_same(ControlNet.from_pretrained(folder).state_dict(), {name: x.float() for name, x in half.items()})
    written(state, folder / PLAIN)
    assert_same(ControlNet.from_pretrained(folder, variant="fp16", dtype=torch.float16).state_dict(), half)
    assert_same(ControlNet.from_pretrained(folder).state_dict(), state)


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_single_file(layout: str, prefix: str, state: State, tmp_path: Path) -> None:
    tensors = to_original(state) if layout == "original" else state
    assert (tensors.keys() == state.keys()) == (layout == "diffusers")
    path = written({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "net.safetensors")
    assert_same(loaded(loading.single_file_controlnet(path, CONFIG)), state)


def test_original_names_are_those_that_diffusers_converts(state: State) -> None:
    original = to_original(state)
    converted = convert_controlnet_checkpoint(dict(original), CONFIG | {"class_embed_type": None})
    # It leaves out the embedding of sizes, which is named as in the UNet.
    assert_same(converted, {key: tensor for key, tensor in state.items() if not key.startswith("add_embedding.")})
    assert {"zero_convs.0.0.weight", "middle_block_out.0.bias", "input_hint_block.14.weight"} <= original.keys()


@pytest.mark.parametrize(
    "own",
    [
        {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
        {"transformer_layers_per_block": [1, 0, 0]},
        {"transformer_layers_per_block": [1, 1, 2]},
    ],
    ids=["no attention", "transformers without blocks", "fewer blocks"],
)
def test_small_ones_tell_their_attention_by_their_keys(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of a single file is SDXL's but for that."""
    small = oracle(CONFIG | own).state_dict()
    path = written(small, tmp_path / "small.safetensors")
    monkeypatch.setattr(loading, "sdxl_configs", lambda: {"unet": SMALL["sdxl"]["unet"]})
    monkeypatch.setattr(names, "SDXL_CONTROLNET", HINT)
    assert_same(ControlNet.load(path).state_dict(), small)


def test_sdxls_own_configuration_has_the_parameters_of_diffusers() -> None:
    config = {k: v for k, v in loading.sdxl_configs()["unet"].items() if k not in DECODER_ONLY} | names.SDXL_CONTROLNET
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig.from_json(config))
        expected = ControlNetModel.from_config(config)
    shapes, expected_shapes = ({k: x.shape for k, x in m.state_dict().items()} for m in (net, expected))
    assert shapes == expected_shapes
    assert sum(shape.numel() for shape in shapes.values()) > 1.2e9


def test_the_dtype_is_given_at_load(state: State, tmp_path: Path) -> None:
    net = ControlNet.load(folder_of(CONFIG, state, tmp_path / "net"), dtype=torch.bfloat16)
    assert_same(net.state_dict(), {name: tensor.bfloat16() for name, tensor in state.items()})


# --- what is not ------------------------------------------------------------------------------------------------------

SINGLE_FILES: dict[str, tuple[Callable[[State], State], str]] = {
    "Stable Diffusion 1.5": (lambda state: oracle(OLDER).state_dict(), r"Stable Diffusion 1 or 2 \(context width 768"),
    "Stable Diffusion 1.5, original names": (
        lambda state: {f"control_model.{key}": x for key, x in to_original(oracle(OLDER).state_dict()).items()},
        r"Stable Diffusion 1 or 2 \(context width 768",
    ),
    "LoRA": (lambda state: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(1)}, "is a LoRA"),
    "LoRA of peft": (lambda state: {"unet.down_blocks.0.lora_A.weight": torch.ones(1)}, "is a LoRA"),
    "Control-LoRA": (
        lambda state: {"lora_controlnet": torch.ones(1), "input_blocks.1.0.in_layers.2.up": torch.ones(1)},
        "Control-LoRA",
    ),
    "Control-LoRA without its mark": (lambda state: {"label_emb.0.0.down": torch.ones(1)}, "Control-LoRA"),
    "LLLite": (lambda state: {"lllite_unet_input_blocks_4.down.0.weight": torch.ones(1)}, "LLLite"),
    "union": (lambda state: state | {"control_add_embedding.linear_1.weight": torch.ones(1)}, "union ControlNet"),
    "union, another key": (lambda state: state | {"task_embedding": torch.ones(1)}, "union ControlNet"),
    "checkpoint": (lambda state: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "whole checkpoint"),
    "UNet": (lambda state: state | {"up_blocks.0.resnets.0.norm1.weight": torch.ones(1)}, "is a UNet"),
    "T2I-Adapter": (lambda state: {"adapter.body.0.in_conv.weight": torch.ones(1)}, "T2I-Adapter"),
    "Flux": (lambda state: {"controlnet_blocks.0.weight": torch.ones(1)}, "another family"),
    "anything": (lambda state: {"cat": torch.ones(1)}, r"no ControlNet \(its keys: cat\)"),
    "an unknown key": (lambda state: state | {"more.weight": torch.ones(1)}, "unknown: more.weight"),
    "a key less": (lambda state: dict(list(state.items())[1:]), "missing: "),
}


@pytest.mark.parametrize("make, says", SINGLE_FILES.values(), ids=SINGLE_FILES.keys())
def test_other_single_files_are_refused(
    make: Callable[[State], State], says: str, state: State, tmp_path: Path
) -> None:
    path = written(make(state), tmp_path / "other.safetensors")
    with pytest.raises(ConsistoryError, match=says) as error:
        loaded(loading.single_file_controlnet(path, CONFIG))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "SDXL ControlNet for a single kind" in str(error.value)


@pytest.mark.parametrize(
    "changed, says",
    [
        (OLDER, r"Stable Diffusion 1 or 2 \(context width 768"),
        ({"_class_name": "ControlNetUnionModel"}, "union"),
        ({"num_control_type": 6}, "union"),
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"_class_name": "FluxControlNetModel"}, "holds a FluxControlNetModel"),
        ({"global_pool_conditions": True}, "pools"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "other pictures than RGB"),
        ({"conditioning_channels": 4}, "other pictures than RGB"),
        ({"block_out_channels": [8, 16, 32]}, "does not fit its configuration"),
    ],
)
def test_other_folders_are_refused(changed: dict[str, Any], says: str, state: State, tmp_path: Path) -> None:
    folder = folder_of(CONFIG | changed, state, tmp_path / "net")
    with pytest.raises(ConsistoryError, match=says) as error:
        ControlNet.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_path_is_named(state: State, tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"no folder .*missing"):
        ControlNet.load(tmp_path / "missing")
    with pytest.raises(ConsistoryError, match=r"no file .*missing\.safetensors"):
        ControlNet.load(tmp_path / "missing.safetensors")
    with pytest.raises(ConsistoryError, match="is a file, not a folder"):
        ControlNet.from_pretrained(written(state, tmp_path / "net.safetensors"))
    with pytest.raises(ConsistoryError, match="is a folder, not a file"):
        ControlNet.from_single_file(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConsistoryError, match="is a whole checkpoint"):
        ControlNet.load(tmp_path)
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    with pytest.raises(ConsistoryError, match="not a complete safetensors file"):
        ControlNet.load(tmp_path / "text.safetensors")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_text("")
    with pytest.raises(ConsistoryError, match="is pickled"):
        ControlNet.load(tmp_path / "pickled")
