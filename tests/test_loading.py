import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import randomise
from safetensors.torch import load_file, save_file
from single_file import SMALL, build, to_original
from torch import Tensor, nn

from consistory.weights import loading
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import COMPONENTS, TensorSource

Json = dict[str, Any]
State = dict[str, Tensor]
CONFIGS = SMALL["sdxl"]
PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """Random weights of the four components, in the modules' names."""
    modules = {component: build(component, CONFIGS[component]) for component in COMPONENTS}
    for seed, module in enumerate(modules.values()):
        randomise(module, seed)
    return {component: module.state_dict() for component, module in modules.items()}


@pytest.fixture
def folder(states: dict[str, State], tmp_path: Path) -> Path:
    """The components in the diffusers layout."""
    folder = tmp_path / "checkpoint"
    for component, state in states.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(CONFIGS[component]))
        save_file(state, folder / component / ("model.safetensors" if "text" in component else PLAIN))
    index = {component: ["library", "class"] for component in COMPONENTS}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **index}))
    return folder


@pytest.fixture(scope="module")
def original(states: dict[str, State]) -> State:
    """The components in the original layout."""
    return {k: x for name in COMPONENTS for k, x in to_original(name, CONFIGS[name], states[name]).items()}


def written(tensors: State, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def module(component: str, source: TensorSource, dtype: torch.dtype = torch.float32) -> nn.Module:
    return loading.load_module(partial(build, component, CONFIGS[component]), source, dtype=dtype, device="cpu")


def from_folder(folder: Path, component: str, variant: str | None = None) -> State:
    config, source = loading.folder_component(folder, component, variant)
    assert config == CONFIGS[component]
    return module(component, source).state_dict()


def from_single_file(path: Path) -> dict[str, State]:
    parts = loading.single_file_components(path, CONFIGS)
    return {component: module(component, source).state_dict() for component, (_, source) in parts.items()}


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype and tensor.equal(expected[name]), name


def assert_says(error: pytest.ExceptionInfo[ConsistoryError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# Folders.


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_folder_gives_every_tensor(component: str, folder: Path, states: dict[str, State]) -> None:
    assert_same(from_folder(folder, component), states[component])


def test_a_loaded_module_is_ready_to_run(folder: Path, states: dict[str, State]) -> None:
    config, source = loading.folder_component(folder, "text_encoder_2")
    loaded = module("text_encoder_2", source)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = build("text_encoder_2", config)
    expected.load_state_dict(states["text_encoder_2"])
    ids = torch.arange(77)[None] % config["vocab_size"]
    for actual, wanted in zip(loaded(ids), expected(ids), strict=True):
        assert actual.equal(wanted)


def test_dtype_is_given_at_load(folder: Path, states: dict[str, State]) -> None:
    _, source = loading.folder_component(folder, "unet")
    loaded = module("unet", source, torch.bfloat16).state_dict()
    assert_same(loaded, {name: tensor.bfloat16() for name, tensor in states["unet"].items()})


def test_tensors_of_the_right_dtype_stay_in_the_file(folder: Path) -> None:
    _, source = loading.folder_component(folder, "unet")
    first, second = (module("unet", source).state_dict() for _ in range(2))
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


def test_building_allocates_nothing_and_draws_nothing(folder: Path) -> None:
    before = torch.random.get_rng_state()
    devices = set()

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.linear = nn.Linear(3, 3)
            devices.update(parameter.device.type for parameter in self.parameters())

    expected = Probe().state_dict()
    torch.random.set_rng_state(before)
    devices.clear()
    source = TensorSource("probe", {name: tensor.clone for name, tensor in expected.items()})
    assert_same(loading.load_module(Probe, source, dtype=torch.float32, device="cpu").state_dict(), expected)
    assert devices == {"meta"}
    assert torch.random.get_rng_state().equal(before)


def test_tensors_are_read_one_at_a_time() -> None:
    """Once converted, a tensor is gone when the next one is read: no second copy of the module in memory."""
    read_before: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        assert all(reference() is None for reference in read_before)
        tensor = torch.ones(4, 4, dtype=torch.float16)
        read_before.append(weakref.ref(tensor))
        return tensor

    def stack() -> nn.Module:
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))

    source = TensorSource("source", {f"{i}.weight": read for i in range(5)})
    loading.load_module(stack, source, dtype=torch.float32, device="cpu")
    assert len(read_before) == 5


def test_variants(folder: Path, states: dict[str, State]) -> None:
    half = {name: tensor.half() for name, tensor in states["unet"].items()}
    save_file(half, folder / "unet" / FP16)
    rounded = {name: tensor.float() for name, tensor in half.items()}
    assert_same(from_folder(folder, "unet", "fp16"), rounded)
    assert_same(from_folder(folder, "unet"), states["unet"])
    (folder / "unet" / PLAIN).unlink()
    assert_same(from_folder(folder, "unet"), rounded)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_variant_that_is_not_there(variant: str | None, folder: Path) -> None:
    (folder / "unet" / PLAIN).rename(folder / "unet" / "diffusion_pytorch_model.bf16.safetensors")
    shutil.copy(folder / "vae" / PLAIN, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(ConsistoryError) as error:
        loading.folder_component(folder, "unet", variant)
    assert_says(error, folder / "unet", variant or "(none)", "choose one that it has: bf16, non_ema")


@pytest.mark.parametrize(
    ("index", "shard", "variant"),
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00002.safetensors", None),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
            "fp16",
        ),
    ],
)
def test_shards(index: str, shard: str, variant: str | None, folder: Path, states: dict[str, State]) -> None:
    (folder / "unet" / PLAIN).unlink()
    names = sorted(states["unet"])
    shards = {shard.format(1): names[::2], shard.format(2): names[1::2]}
    for file, own in shards.items():
        save_file({name: states["unet"][name] for name in own}, folder / "unet" / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(from_folder(folder, "unet", variant), states["unet"])
    assert_same(from_folder(folder, "unet"), states["unet"])
    (folder / "unet" / shard.format(2)).unlink()
    with pytest.raises(ConsistoryError) as error:
        loading.folder_component(folder, "unet")
    assert_says(error, "there is no file", shard.format(2))


def test_old_names_of_the_autoencoders_attention(folder: Path, states: dict[str, State]) -> None:
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in states["vae"].items():
        for new, older in old.items():
            name = name.replace(new, older)
        renamed[name] = tensor
    assert renamed.keys() != states["vae"].keys()
    save_file(renamed, folder / "vae" / PLAIN)
    assert_same(from_folder(folder, "vae"), states["vae"])


def test_names_of_a_text_encoder_that_transformers_5_saved(folder: Path, states: dict[str, State]) -> None:
    renamed = {name.removeprefix("text_model."): tensor for name, tensor in states["text_encoder"].items()}
    save_file(renamed, folder / "text_encoder" / "model.safetensors")
    assert_same(from_folder(folder, "text_encoder"), states["text_encoder"])


def test_keys_without_use_are_left_out(folder: Path, states: dict[str, State]) -> None:
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}
    save_file({**states["text_encoder"], **extra}, folder / "text_encoder" / "model.safetensors")
    assert_same(from_folder(folder, "text_encoder"), states["text_encoder"])


def test_missing_and_unknown_keys_are_named(folder: Path, states: dict[str, State]) -> None:
    state = dict(states["unet"])
    state["conv_inn.weight"] = state.pop("conv_in.weight")
    for name in [name for name in state if name.startswith("mid_block.resnets.0.")]:
        del state[name]
    save_file(state, folder / "unet" / PLAIN)
    with pytest.raises(ConsistoryError) as error:
        from_folder(folder, "unet")
    assert_says(error, f"unet of {folder}", "missing: conv_in.weight, mid_block.resnets.0.conv1.bias", "and 6 more")
    assert_says(error, "unknown: conv_inn.weight")


def test_a_wrong_shape_is_named(folder: Path, states: dict[str, State]) -> None:
    save_file({**states["unet"], "conv_in.weight": torch.zeros(8, 9, 3, 3)}, folder / "unet" / PLAIN)
    with pytest.raises(ConsistoryError) as error:
        from_folder(folder, "unet")
    assert_says(error, f"unet of {folder}", "conv_in.weight is [8, 9, 3, 3], not [8, 4, 3, 3]")


def test_an_sdxl_folder_is_recognised(folder: Path) -> None:
    assert loading.read_model_index(folder)["_class_name"] == "StableDiffusionXLPipeline"


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "StableDiffusionPipeline", "text_encoder_2": ...}, "DiffusionPipeline without text_encoder_2"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}, "without text_encoder"),
        ({"_class_name": "FluxPipeline", "unet": ..., "transformer": ["diffusers", "x"]}, "FluxPipeline without unet"),
    ],
)  # fmt: skip
def test_folders_of_another_family(index: Json, says: str, folder: Path) -> None:
    path = folder / "model_index.json"
    content = json.loads(path.read_text()) | index
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ConsistoryError) as error:
        loading.read_model_index(folder)
    assert_says(error, f"{folder} is not an SDXL base checkpoint", says)


def test_folders_that_are_none(folder: Path) -> None:
    for path, says in {
        folder / "nowhere": "there is no folder",
        folder / "unet": "give the top folder",
        folder / "unet" / PLAIN: "load it as a single-file checkpoint",
    }.items():
        with pytest.raises(ConsistoryError) as error:
            loading.read_model_index(path)
        assert_says(error, path, says)


def test_a_folder_without_config_or_weights(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    (folder / "vae" / PLAIN).unlink()
    for component, says in {"unet": "config.json is missing", "vae": "has no safetensors file"}.items():
        with pytest.raises(ConsistoryError) as error:
            loading.folder_component(folder, component)
        assert_says(error, folder / component, says, "download the whole checkpoint folder again")


@pytest.mark.parametrize("content", ["", "{", "[]", "<html>"])
def test_a_damaged_config(content: str, folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(content)
    with pytest.raises(ConsistoryError) as error:
        loading.folder_component(folder, "unet")
    assert_says(error, path, "download it again")


def test_a_folder_with_pickled_weights_only(folder: Path) -> None:
    (folder / "unet" / PLAIN).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConsistoryError) as error:
        loading.folder_component(folder, "unet")
    assert_says(error, folder / "unet" / "diffusion_pytorch_model.bin", "is pickled", "convert it")


# Values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, folder: Path, states: dict[str, State]) -> None:
    damaged = states["unet"]["mid_block.resnets.0.conv1.weight"].clone()
    damaged[3, 2, 1, 0] = value
    save_file({**states["unet"], "mid_block.resnets.0.conv1.weight": damaged}, folder / "unet" / PLAIN)
    _, source = loading.folder_component(folder, "unet")
    with pytest.raises(ConsistoryError) as error:
        module("unet", source, dtype)
    assert_says(error, f"unet of {folder} ({PLAIN}) is damaged (mid_block.resnets.0.conv1.weight", "download it again")


def test_values_that_are_not_finite_in_a_single_file(original: State, tmp_path: Path) -> None:
    key = "conditioner.embedders.1.model.text_projection"
    path = written({**original, key: original[key] / 0}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        from_single_file(path)
    assert_says(error, f"text_encoder_2 of {path} is damaged", "text_projection.weight")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float16_does_not_overflow_silently(stored: torch.dtype, folder: Path, states: dict[str, State]) -> None:
    state = {name: tensor.to(stored) for name, tensor in states["unet"].items()}
    state["conv_out.bias"] = torch.tensor([0.0, 1.0, -70000.0, 2.0], dtype=stored)
    save_file(state, folder / "unet" / PLAIN)
    _, source = loading.folder_component(folder, "unet")
    with pytest.raises(ConsistoryError) as error:
        module("unet", source, torch.float16)
    assert_says(error, f"unet of {folder}", "overflows in torch.float16 (conv_out.bias has", "use bfloat16")
    for dtype in (torch.bfloat16, torch.float32):
        assert module("unet", source, dtype).state_dict()["conv_out.bias"][2] < -69000


def test_the_largest_value_of_float16_is_none_too_many(folder: Path, states: dict[str, State]) -> None:
    bias = torch.tensor([-65504.0, 65504.0, 0.0, 0.0])
    save_file({**states["unet"], "conv_out.bias": bias}, folder / "unet" / PLAIN)
    _, source = loading.folder_component(folder, "unet")
    assert module("unet", source, torch.float16).state_dict()["conv_out.bias"].equal(bias.half())


# Single files.


@pytest.mark.parametrize("size", SMALL)
def test_a_single_file_gives_every_tensor(size: str, tmp_path: Path) -> None:
    configs = SMALL[size]
    states, tensors = {}, {}
    for seed, component in enumerate(COMPONENTS):
        random = build(component, configs[component])
        randomise(random, seed)
        states[component] = random.state_dict()
        tensors |= to_original(component, configs[component], states[component])
    parts = loading.single_file_components(written(tensors, tmp_path / "x.safetensors"), configs)
    for component, (config, source) in parts.items():
        make = partial(build, component, config)
        loaded = loading.load_module(make, source, dtype=torch.float32, device="cpu")
        assert_same(loaded.state_dict(), states[component])
    assert parts.keys() == states.keys()


def test_harmless_keys_of_a_single_file(original: State, states: dict[str, State], tmp_path: Path) -> None:
    harmless = [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.0.text_projection",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef2",
        "model_ema.decay",
        "model_ema.diffusion_modelout2bias",
        "first_stage_model.loss.discriminator.main.0.weight",
    ]
    path = written({**original, **{key: torch.zeros(2) for key in harmless}}, tmp_path / "x.safetensors")
    for component, state in from_single_file(path).items():
        assert_same(state, states[component])


def test_keys_that_belong_to_nothing(original: State, tmp_path: Path) -> None:
    path = written(
        {**original, "edm_mean": torch.zeros(4), "adapter.weight": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ConsistoryError) as error:
        loading.single_file_components(path, CONFIGS)
    assert_says(error, path, "keys that SDXL does not have (adapter.weight, edm_mean)")


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("model.diffusion_model.input_blocks.30.0.in_layers.0.weight", "unet"),
        ("first_stage_model.decoder.extra.weight", "vae"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.7.mlp.fc1.bias", "text_encoder"),
        ("conditioner.embedders.1.model.transformer.resblocks.7.ln_1.bias", "text_encoder_2"),
    ],
)
def test_unknown_keys_of_a_component(key: str, component: str, original: State, tmp_path: Path) -> None:
    path = written({**original, key: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        from_single_file(path)
    assert_says(error, f"{component} of {path}", "unknown", key.removeprefix("model.diffusion_model.").split(".")[-2])


def test_a_missing_key_of_a_single_file(original: State, tmp_path: Path) -> None:
    fused = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    path = written({key: x for key, x in original.items() if key != fused}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        from_single_file(path)
    assert_says(error, *(f"text_model.encoder.layers.1.self_attn.{name}_proj.bias" for name in "qkv"))


def test_a_fused_tensor_of_wrong_shape(original: State, tmp_path: Path) -> None:
    fused = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    path = written({**original, fused: torch.zeros(33)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        from_single_file(path)
    assert_says(error, "text_model.encoder.layers.1.self_attn.", "_proj.bias is [11], not [12]")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.x"], "Stable Diffusion 1 or 2"),
        (["cond_stage_model.model.ln_final.weight"], "Stable Diffusion 1 or 2"),
        (["model.diffusion_model.out.2.bias", "conditioner.embedders.0.model.ln_final.bias"], "the SDXL refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["unet.mid_block.attentions.0.proj_in.lora.up.weight"], "a LoRA"),
        (["conv_in.weight", "down_blocks.0.resnets.0.norm1.bias"], "one component of a checkpoint"),
        (["input_blocks.0.0.weight"], "one component of a checkpoint"),
        (["model.diffusion_model.out.2.bias"], "holds no vae"),
        (["model.diffusion_model.out.2.bias", "edm_vpred.sigma_max"], "EDM schedule"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
    ],
)
def test_single_files_of_another_family(keys: list[str], says: str, tmp_path: Path) -> None:
    path = written({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        loading.single_file_components(path, loading.sdxl_configs())
    assert_says(error, path, says, "SDXL base checkpoint")


def test_a_checkpoint_of_another_size(original: State, tmp_path: Path) -> None:
    """Right names, wrong widths: what a distilled or otherwise changed SDXL looks like."""
    path = written(original, tmp_path / "x.safetensors")
    parts = loading.single_file_components(path, loading.sdxl_configs())
    config, source = parts["vae"]
    with pytest.raises(ConsistoryError) as error:
        loading.load_module(partial(build, "vae", config), source, dtype=torch.float32, device="cpu")
    assert_says(error, f"vae of {path} does not fit its configuration", "give an SDXL base checkpoint")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickled_files_are_refused_unread(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError) as error:
        loading.single_file_components(tmp_path / f"x{suffix}", CONFIGS)
    assert_says(error, f"x{suffix} is pickled", "convert it")


def test_files_that_are_not_whole(original: State, tmp_path: Path) -> None:
    whole = written(original, tmp_path / "x.safetensors").read_bytes()
    path = tmp_path / "y.safetensors"
    for content in (b"", whole[:4], whole[:1000], whole[:-1], b"<!DOCTYPE html><html>", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ConsistoryError) as error:
            loading.single_file_components(path, CONFIGS)
        assert_says(error, f"{path} is not a complete safetensors file", "download it again")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path, says in {
        tmp_path / "x.safetensors": "there is no file",
        tmp_path: "load it as a checkpoint folder",
    }.items():
        with pytest.raises(ConsistoryError) as error:
            loading.single_file_components(path, loading.sdxl_configs())
        assert_says(error, path, says)


def test_the_recorded_model(golden_weights: Path) -> None:
    """A folder that diffusers wrote."""
    loading.read_model_index(golden_weights)
    for component in COMPONENTS:
        config, source = loading.folder_component(golden_weights, component)
        make = partial(build, component, config)
        loaded = loading.load_module(make, source, dtype=torch.float32, device="cpu")
        (file,) = (golden_weights / component).glob("*.safetensors")
        expected = {k: x for k, x in load_file(file).items() if not k.endswith("position_ids")}
        assert_same(loaded.state_dict(), expected)


def test_a_projection_that_diffusers_wrote(original: State, states: dict[str, State], tmp_path: Path) -> None:
    """As a linear layer's weight, where SDXL's own file has a matrix to multiply with from the right."""
    key = "conditioner.embedders.1.model.text_projection"
    others = {name: tensor for name, tensor in original.items() if name != key}
    path = written({**others, f"{key}.weight": original[key].T.contiguous()}, tmp_path / "x.safetensors")
    assert_same(from_single_file(path)["text_encoder_2"], states["text_encoder_2"])


@pytest.mark.parametrize(("said", "predicts"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_metadata_of_a_single_file_tells_what_it_predicts(
    said: str, predicts: str, original: State, tmp_path: Path
) -> None:
    save_file(original, tmp_path / "x.safetensors", metadata={"modelspec.prediction_type": said})
    schedule = loading.single_file_schedule(tmp_path / "x.safetensors", loading.sdxl_configs()["scheduler"])
    assert schedule["prediction_type"] == predicts


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ([], {}),
        (["v_pred"], {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        (["v_pred", "ztsnr"], {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_flags_of_a_single_file_change_the_schedule(
    flags: list[str], changed: Json, original: State, tmp_path: Path
) -> None:
    path = tmp_path / "flagged.safetensors"
    save_file(original | {flag: torch.zeros(0) for flag in flags}, path)
    schedule = loading.sdxl_configs()["scheduler"]
    assert loading.single_file_schedule(path, schedule) == schedule | changed
