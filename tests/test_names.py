from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as oracle
from single_file import SMALL, build, to_original
from torch import Tensor, nn

from consistory.weights import names
from consistory.weights.loading import COMPONENTS, sdxl_configs
from consistory.weights.names import SINGLE_FILE

Json = dict[str, Any]
CONFIGS = {"SDXL": sdxl_configs(), **SMALL}

# Parameters of SDXL base, as published with it.
SIZES = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}

configurations = pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS.keys())
components = pytest.mark.parametrize("component", COMPONENTS)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def oracle_module(component: str, config: Json) -> nn.Module:
    if component == "unet":
        return diffusers.UNet2DConditionModel.from_config(config)
    if component == "vae":
        return diffusers.AutoencoderKL.from_config(config)
    text = transformers.CLIPTextConfig(**config)
    return getattr(transformers, config["architectures"][0])(text)


def oracle_names(component: str, config: Json, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own conversion from the original layout."""
    if component == "unet":
        return oracle.convert_ldm_unet_checkpoint(state, config)
    if component == "vae":
        return oracle.convert_ldm_vae_checkpoint(state, config)
    if component == "text_encoder":
        return oracle.convert_ldm_clip_checkpoint(state)
    model = on_meta(partial(oracle_module, component, config))
    return oracle.convert_open_clip_checkpoint(model, state, prefix=SINGLE_FILE[component].prefix)


def numbered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every element of every tensor distinct, so that nothing can be exchanged unseen."""
    start, result = 0, {}
    for name, tensor in state.items():
        result[name] = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        start += tensor.numel()
    return result


@components
@configurations
def test_modules_are_named_and_shaped_as_the_oracles(component: str, configs: dict[str, Json]) -> None:
    config = configs[component]
    ours = shapes(on_meta(partial(build, component, config)).state_dict())
    theirs = shapes(on_meta(partial(oracle_module, component, config)).state_dict())
    theirs = {k: shape for k, shape in theirs.items() if not k.endswith("position_ids")}
    if component == "text_encoder":  # transformers 5 drops the prefix that SDXL's files have
        theirs = {k if k.startswith("text_model.") else f"text_model.{k}": shape for k, shape in theirs.items()}
    assert ours == theirs


@components
def test_sdxl_has_its_published_size(component: str) -> None:
    module = on_meta(partial(build, component, CONFIGS["SDXL"][component]))
    assert sum(parameter.numel() for parameter in module.parameters()) == SIZES[component]


@components
@configurations
def test_original_names_are_those_that_diffusers_converts(component: str, configs: dict[str, Json]) -> None:
    config = configs[component]
    state = on_meta(partial(build, component, config)).state_dict()
    if configs is not CONFIGS["SDXL"]:
        state = numbered(state)
    converted = oracle_names(component, config, to_original(component, config, state))
    assert shapes(converted) == shapes(state)
    assert all(converted[name].is_meta or converted[name].equal(state[name]) for name in state)


@components
@configurations
def test_a_round_trip_gives_every_tensor_back(component: str, configs: dict[str, Json]) -> None:
    config, part = configs[component], SINGLE_FILE[component]
    state = on_meta(partial(build, component, config)).state_dict()
    if configs is not CONFIGS["SDXL"]:
        state = numbered(state)
    by_original = names.index(part.table(config))
    back = {
        name: layout(tensor)
        for key, tensor in to_original(component, config, state).items()
        for name, layout in names.parameters_in(key.removeprefix(part.prefix), by_original)
    }
    assert shapes(back) == shapes(state)
    assert all(back[name].is_meta or back[name].equal(state[name]) for name in state)


def test_keys_of_the_published_single_file() -> None:
    """sd_xl_base_1.0.safetensors has 2515 tensors; two of them (position_ids, logit_scale) are no parameters."""
    configs = CONFIGS["SDXL"]
    keys: dict[str, tuple[int, ...]] = {}
    for component in COMPONENTS:
        state = on_meta(partial(build, component, configs[component])).state_dict()
        keys |= shapes(to_original(component, configs[component], state))
    assert len(keys) == 2513
    unet, vae = "model.diffusion_model.", "first_stage_model."
    first, second = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    for key, shape in {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{unet}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        f"{unet}middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        f"{unet}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
        f"{unet}label_emb.0.0.weight": (1280, 2816),
        f"{unet}out.2.bias": (4,),
        f"{vae}encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{first}encoder.layers.11.mlp.fc1.weight": (3072, 768),
        f"{second}transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        f"{second}text_projection": (1280, 1280),
        f"{second}positional_embedding": (77, 1280),
    }.items():
        assert keys[key] == shape, key


def test_unknown_keys_have_no_parameters() -> None:
    by_original = names.index(SINGLE_FILE["unet"].table(SMALL["sdxl"]["unet"]))
    assert names.parameters_in("input_blocks.99.0.in_layers.0.weight", by_original) == []
