"""Merged weights equal those of peft and diffusers, under every name that LoRA files give to modules."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from parity import randomise
from safetensors.torch import load_file, save_file
from single_file import SMALL, build
from torch import Tensor, nn

from consistory import ConsiStory
from consistory.weights import loading, lora, names
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import Component, TensorSource

State = dict[str, Tensor]
CONFIGS = SMALL["sdxl"]
PARTS = ("unet", "text_encoder", "text_encoder_2")
TARGETS = {
    "unet": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out",
        "time_embedding.linear_1", "add_embedding.linear_2",
    ],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "text_encoder_2": ["q_proj", "v_proj", "fc2", "text_projection"],
}  # fmt: skip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def oracle_module(part: str) -> nn.Module:
    if part == "unet":
        module = diffusers.UNet2DConditionModel.from_config(CONFIGS[part])
    else:
        text = transformers.CLIPTextConfig(**CONFIGS[part])
        module = getattr(transformers, CONFIGS[part]["architectures"][0])(text)
    randomise(module, seed=PARTS.index(part))
    return module.eval()


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return {part: oracle_module(part) for part in PARTS}


@pytest.fixture(scope="module")
def parts(modules: dict[str, nn.Module]) -> dict[str, Component]:
    """The same weights as a checkpoint that is opened; its autoencoder holds nothing."""
    sources = {part: TensorSource(part, readers(named(part, module))) for part, module in modules.items()}
    return {part: (CONFIGS[part], source) for part, source in sources.items()} | {"vae": ({}, TensorSource("vae", {}))}


def readers(state: State) -> dict[str, loading.Read]:
    return {name: tensor.clone for name, tensor in state.items()}


def named(part: str, module: nn.Module) -> State:
    """A state dict in the library's names: transformers 5 drops a prefix of the first text encoder."""
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("position_ids")}
    prefix = "" if part != "text_encoder" or any(name.startswith("text_model.") for name in state) else "text_model."
    return {prefix + name: tensor for name, tensor in state.items()}


def adapted(part: str, module: nn.Module, **options: Any) -> peft.PeftModel:
    """A copy with random adapters."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 3, "target_modules": TARGETS[part]} | options))
    return randomly(peft.get_peft_model(copy.deepcopy(module), config))


def randomly(model: peft.PeftModel) -> peft.PeftModel:
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:  # an adapter's
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter_state(model: peft.PeftModel) -> State:
    return {k.removeprefix("base_model.model."): x for k, x in peft.get_peft_model_state_dict(model).items()}


def written(tensors: State, path: Path, **metadata: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def merged(parts: dict[str, Component], *files: tuple[Path, float]) -> dict[str, State]:
    """Every parameter of the components with LoRA files merged in."""
    loras = [lora.read(path, weight, parts) for path, weight in files]
    components = lora.merge(parts, loras)
    return {part: {name: read() for name, read in source.tensors.items()} for part, (_, source) in components.items()}


def assert_close(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-6, msg=partial("{}: {}".format, name))


def changed(state: State, base: State) -> set[str]:
    return {name for name in base if not torch.equal(state[name], base[name])}


def kohya(part: str, state: State, alpha: float, *, original: bool = False) -> State:
    """A peft state dict under the names of Kohya's scripts, which store alphas."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    by_name = {rename.name: rename for rename in names.unet_table(CONFIGS["unet"])} if original else {}
    result: State = {}
    for key, tensor in state.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        if part == "text_encoder" and not module.startswith("text_model."):
            module = f"text_model.{module}"
        stem = prefix + names.original_name(module, by_name).replace(".", "_")
        renamed = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
        result[f"{stem}.{renamed.get(factor, factor)}"] = by_rows(tensor) if "magnitude" in factor else tensor
        result[f"{stem}.alpha"] = torch.tensor(alpha)
    return result


def by_rows(magnitude: Tensor) -> Tensor:
    """peft's [out] or [1, out, 1, 1] -> LyCORIS' [out, 1] or [out, 1, 1, 1]."""
    return magnitude[:, None] if magnitude.dim() == 1 else magnitude.transpose(0, 1)


def assert_says(error: pytest.ExceptionInfo[ConsistoryError], *facts: object) -> None:
    assert "\n" not in str(error.value)
    for fact in facts:
        assert str(fact) in str(error.value)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True},
     {"lora_alpha": 5, "rank_pattern": {"conv_in": 2, "fc2": 1},
      "alpha_pattern": {"mid_block.attentions.0.proj_in": 2, "layers.1.self_attn.q_proj": 1, "conv1": 4}}],
    ids=["alpha is the rank", "alpha", "rank-stabilised", "patterns"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following")  # patterns for one component do not fit the others
def test_what_diffusers_saves_merges_as_in_peft(
    options: dict[str, Any], modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    """Alphas are in the metadata. All three components in one file."""
    models = {part: adapted(part, module, **options) for part, module in modules.items()}
    layers = {f"{part}_lora_layers": adapter_state(model) for part, model in models.items()}
    metadata = _collate_lora_metadata(models)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    (file,) = tmp_path.iterdir()
    ours = merged(parts, (file, 1.0))
    for part, model in models.items():
        expected = named(part, model.merge_and_unload())
        assert_close(ours[part], expected)
        adapters = {key.rpartition(".lora_")[0] for key in layers[f"{part}_lora_layers"]}
        assert len(changed(ours[part], named(part, modules[part]))) == len(adapters)


@pytest.mark.parametrize("part, original", [*((part, False) for part in PARTS), ("unet", True)])
def test_kohyas_names_merge_as_in_peft(
    part: str, original: bool, modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    model = adapted(part, modules[part], lora_alpha=2)
    file = written(kohya(part, adapter_state(model), 2.0, original=original), tmp_path / "x.safetensors")
    ours = merged(parts, (file, 1.0))
    assert_close(ours[part], named(part, model.merge_and_unload()))
    for other in set(PARTS) - {part}:
        assert not changed(ours[other], named(other, modules[other]))
    if original:
        assert any(".input_blocks_4_1_" in key.replace("lora_unet_", ".") for key in load_file(file))


@pytest.mark.parametrize("original", [False, True], ids=["diffusers' blocks", "original blocks"])
def test_kohyas_names_merge_as_in_diffusers(
    original: bool, modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    """diffusers' own conversion of the names, of attention and its surroundings."""
    model = adapted("unet", modules["unet"], target_modules=TARGETS["unet"][:8])
    file = written(kohya("unet", adapter_state(model), 2.0, original=original), tmp_path / "x.safetensors")
    unet = copy.deepcopy(modules["unet"])
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    unet.fuse_lora(lora_scale=0.7)
    fused = {k.replace(".base_layer.", "."): x for k, x in unet.state_dict().items() if ".lora_" not in k}
    assert_close(merged(parts, (file, 0.7))["unet"], fused)


def old_name(key: str) -> str:
    """As diffusers called attention's factors until version 0.17."""
    for new, old in {
        ".to_out.0.lora_": ".processor.to_out_lora_", ".to_q.lora_": ".processor.to_q_lora_",
        ".to_k.lora_": ".processor.to_k_lora_", ".to_v.lora_": ".processor.to_v_lora_",
        ".q_proj.lora_": ".to_q_lora_", ".k_proj.lora_": ".to_k_lora_", ".v_proj.lora_": ".to_v_lora_",
        ".out_proj.lora_": ".to_out_lora_",
    }.items():  # fmt: skip
        key = key.replace(new, old)
    key = key.replace("text_encoder.encoder.", "text_encoder.text_model.encoder.")  # unlike transformers 5
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
        lambda key: key.removeprefix("unet."),
        old_name,
    ],
    ids=["lora_A", "lora.down", "lora_linear_layer.down", "a UNet on its own", "processors"],
)
def test_names_that_diffusers_has_had(
    rename: Any, modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    targets = {part: [name for name in TARGETS[part] if name in ATTENTION] for part in PARTS}
    models = {part: adapted(part, modules[part], target_modules=targets[part]) for part in PARTS}
    state = {f"{part}.{key}": x for part, model in models.items() for key, x in adapter_state(model).items()}
    ours = merged(parts, (written({rename(key): x for key, x in state.items()}, tmp_path / "x.safetensors"), 1.0))
    for part, model in models.items():
        assert_close(ours[part], named(part, model.merge_and_unload()))


def test_the_original_unets_own_names(
    modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    model = adapted("unet", modules["unet"])
    by_name = {rename.name: rename for rename in names.unet_table(CONFIGS["unet"])}
    state = {}
    for key, tensor in adapter_state(model).items():
        module, factor = key.split(".lora_")
        state[f"diffusion_model.{names.original_name(module, by_name)}.lora_{factor}"] = tensor
    ours = merged(parts, (written(state, tmp_path / "x.safetensors"), 1.0))
    assert_close(ours["unet"], named("unet", model.merge_and_unload()))


@pytest.mark.parametrize(
    ("stem", "part", "parameter"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "unet", "down_blocks.1.attentions.0.proj_in"),
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0", "unet",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
        ),
        (
            "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj", "unet",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        ),
        (
            "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_q", "unet",
            "up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_q",
        ),
        ("lora_unet_input_blocks_1_0_in_layers_2", "unet", "down_blocks.0.resnets.0.conv1"),
        ("lora_unet_input_blocks_4_0_skip_connection", "unet", "down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_input_blocks_3_0_op", "unet", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv", "unet", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_emb_layers_1", "unet", "up_blocks.2.resnets.2.time_emb_proj"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "unet", "down_blocks.1.attentions.0.proj_in"),
        ("lora_unet_label_emb_0_0", "unet", "add_embedding.linear_1"),
        (
            "lora_te1_text_model_encoder_layers_11_self_attn_q_proj", "text_encoder",
            "text_model.encoder.layers.11.self_attn.q_proj",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc1", "text_encoder_2",
            "text_model.encoder.layers.31.mlp.fc1",
        ),
    ],
)  # fmt: skip
def test_names_in_published_files(stem: str, part: str, parameter: str, tmp_path: Path) -> None:
    """At SDXL's size, with parameters that nobody reads."""
    configs = loading.sdxl_configs()
    with torch.device("meta"):
        states = {name: build(name, configs[name]).state_dict() for name in PARTS}
    sdxl = {name: (configs[name], TensorSource(name, dict.fromkeys(state, Tensor))) for name, state in states.items()}
    tensors = {f"{stem}.lora_down.weight": torch.zeros(1, 2), f"{stem}.lora_up.weight": torch.zeros(2, 1)}
    read = lora.read(written(tensors, tmp_path / "x.safetensors"), 1.0, sdxl)
    assert {name: list(updates) for name, updates in read.updates.items() if updates} == {part: [f"{parameter}.weight"]}


# --- the sum ----------------------------------------------------------------------------------------------------------


def factors(stem: str, down: Tensor, up: Tensor, alpha: float | None = None) -> State:
    own = {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, **own}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_formula(parts: dict[str, Component], tmp_path: Path) -> None:
    down, up = randn(4, 8), randn(16, 4, seed=1)
    file = written(factors("lora_te1_text_model_encoder_layers_0_mlp_fc1", down, up, 3.0), tmp_path / "x.safetensors")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    base = parts["text_encoder"][1].tensors[name]()
    result = merged(parts, (file, 0.7))["text_encoder"][name]
    torch.testing.assert_close(result, base + 0.7 * (3 / 4) * up @ down, atol=1e-6, rtol=1e-6)


def test_a_convolutions_kernel(parts: dict[str, Component], tmp_path: Path) -> None:
    """The composition of a 3x3 convolution to `rank` channels and a 1x1 convolution is one convolution."""
    down, up = randn(2, 8, 3, 3), randn(8, 2, 1, 1, seed=1)
    file = written(factors("lora_unet_input_blocks_1_0_in_layers_2", down, up), tmp_path / "x.safetensors")
    name = "down_blocks.0.resnets.0.conv1.weight"
    base, kernel = parts["unet"][1].tensors[name](), merged(parts, (file, 1.0))["unet"][name]
    x = randn(1, 8, 5, 5, seed=2)
    conv = partial(nn.functional.conv2d, padding=1)
    expected = conv(x, base) + nn.functional.conv2d(conv(x, down), up)
    torch.testing.assert_close(conv(x, kernel), expected, atol=1e-5, rtol=1e-5)


def test_linear_layers_stored_as_convolutions(parts: dict[str, Component], tmp_path: Path) -> None:
    down, up = randn(2, 16), randn(16, 2, seed=1)
    stem, name = "lora_unet_input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in.weight"
    flat = written(factors(stem, down, up), tmp_path / "flat.safetensors")
    deep = written(factors(stem, down[..., None, None], up[..., None, None]), tmp_path / "deep.safetensors")
    assert torch.equal(*(merged(parts, (file, 1.0))["unet"][name] for file in (flat, deep)))


def test_several_files_add_up_in_any_order(parts: dict[str, Component], tmp_path: Path) -> None:
    stem, name = "lora_te2_text_model_encoder_layers_1_mlp_fc2", "text_model.encoder.layers.1.mlp.fc2.weight"
    pairs = [(randn(r, 24, seed=r), randn(12, r, seed=10 + r)) for r in (1, 4)]
    files = [
        (written(factors(stem, *pair), tmp_path / f"{i}.safetensors"), weight)
        for i, (pair, weight) in enumerate(zip(pairs, (0.5, -1.25), strict=True))
    ]
    base = parts["text_encoder_2"][1].tensors[name]()
    expected = base + sum(weight * up @ down for (down, up), (_, weight) in zip(pairs, files, strict=True))
    for order in (files, files[::-1]):
        torch.testing.assert_close(merged(parts, *order)["text_encoder_2"][name], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half a unit in the last place, twice: lost if every sum were rounded."""
    tiny = torch.finfo(dtype).eps / 2
    source = TensorSource("x", {"add_embedding.linear_2.weight": lambda: torch.ones(2, 2, dtype=dtype)})
    base: dict[str, Component] = {
        "unet": (CONFIGS["unet"], source), "text_encoder": (CONFIGS["text_encoder"], TensorSource("x", {})),
        "text_encoder_2": (CONFIGS["text_encoder_2"], TensorSource("x", {})),
    }  # fmt: skip
    up, down = torch.full((2, 1), tiny, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    file = written(factors("unet.add_embedding.linear_2", down, up), tmp_path / "x.safetensors")
    read = lora.read(file, 1.0, base)
    _, twice = lora.merge(base, [read, read])["unet"]

    def make() -> nn.Module:
        return nn.ModuleDict({"add_embedding": nn.ModuleDict({"linear_2": nn.Linear(2, 2, bias=False)})})

    module = loading.load_module(make, twice, dtype=dtype, device="cpu")
    assert (module.state_dict()["add_embedding.linear_2.weight"] == 1 + 2 * tiny).all()


def test_weight_zero_leaves_the_checkpoint(
    modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    model = adapted("unet", modules["unet"])
    file = written(kohya("unet", adapter_state(model), 2.0), tmp_path / "x.safetensors")
    assert not changed(merged(parts, (file, 0.0))["unet"], modules["unet"].state_dict())


def test_a_file_is_read_while_its_parameter_is(parts: dict[str, Component], tmp_path: Path) -> None:
    """Nothing is added beforehand, and what was not asked for is not added."""
    reads: list[str] = []
    source = TensorSource("x", {"conv_in.weight": lambda: reads.append("conv_in") or torch.zeros(8, 4, 3, 3)})
    file = written(factors("unet.conv_in", torch.ones(1, 4, 3, 3), torch.ones(8, 1, 1, 1)), tmp_path / "x.safetensors")
    base = {**parts, "unet": (CONFIGS["unet"], source)}
    components = lora.merge(base, [lora.read(file, 1.0, base)])
    assert reads == []
    assert (components["unet"][1].tensors["conv_in.weight"]() == 1).all() and reads == ["conv_in"]
    assert (source.tensors["conv_in.weight"]() == 0).all()


# --- other kinds ------------------------------------------------------------------------------------------------------

LOHA, LOKR = partial(peft.LoHaConfig, r=3, alpha=2), partial(peft.LoKrConfig, r=2, alpha=2)
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize(
    ("config", "alpha", "held"),
    [
        (LOHA(), 2.0, "hada_w1_a"),
        (LOHA(use_effective_conv2d=True), 2.0, "hada_t2"),
        (LOKR(decompose_factor=2), 2.0, "lokr_w2_b"),
        (LOKR(decompose_factor=8, decompose_both=True, r=1, alpha=1), 1.0, "lokr_w1_a"),
        (LOKR(decompose_factor=2, use_effective_conv2d=True), 2.0, "lokr_t2"),
        (LOKR(r=64, alpha=64), 64.0, "lokr_w2"),
        (peft.LoraConfig(r=3, lora_alpha=2, use_dora=True), 2.0, "dora_scale"),
    ],
    ids=["LoHa", "LoHa, Tucker", "LoKr", "LoKr, both factors", "LoKr, Tucker", "LoKr, whole", "DoRA"],
)
def test_other_kinds_merge_as_in_peft(
    config: Any, alpha: float, held: str, modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    config.target_modules = set(TARGETS["unet"])
    model = randomly(peft.get_peft_model(copy.deepcopy(modules["unet"]), config))
    state = kohya("unet", adapter_state(model), alpha)
    assert any(key.endswith(f".{held}") for key in state)
    ours = merged(parts, (written(state, tmp_path / "x.safetensors"), 1.0))["unet"]
    expected = named("unet", model.merge_and_unload())
    assert_close(ours, expected)
    assert len(changed(ours, named("unet", modules["unet"]))) > 50


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({"w1": (2, 4), "w2_a": (8, 2), "w2_b": (2, 4)}, 3 / 2),
        ({"w1_a": (2, 3), "w1_b": (3, 4), "w2": (8, 4)}, 3 / 3),
        ({"w1": (2, 4), "w2": (8, 4)}, 1),
    ],
    ids=["second factored", "first factored", "whole"],
)
def test_alpha_of_a_lokr(
    given: dict[str, tuple[int, ...]], scale: float, parts: dict[str, Component], tmp_path: Path
) -> None:
    """It counts where something has a rank, as for LyCORIS; peft divides it by a rank that no factor has."""
    stem, name = "lora_unet_input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in.weight"
    tensors = {role: randn(*shape, seed=i) for i, (role, shape) in enumerate(given.items())}
    state = {f"{stem}.lokr_{role}": tensor for role, tensor in tensors.items()} | {f"{stem}.alpha": torch.tensor(3.0)}
    ours = merged(parts, (written(state, tmp_path / "x.safetensors"), 0.7))["unet"][name]
    w1, w2 = (tensors[w] if w in tensors else tensors[f"{w}_a"] @ tensors[f"{w}_b"] for w in ("w1", "w2"))
    expected = parts["unet"][1].tensors[name]() + 0.7 * scale * torch.kron(w1, w2)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_doras_as_diffusers_saves_them(
    modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path
) -> None:
    model = adapted("unet", modules["unet"], use_dora=True, lora_alpha=2)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, adapter_state(model), **_collate_lora_metadata({"unet": model})
    )
    (file,) = tmp_path.iterdir()
    assert any(".lora_magnitude_vector" in key for key in load_file(file))
    assert_close(merged(parts, (file, 1.0))["unet"], named("unet", model.merge_and_unload()))


def test_a_core_between_two_convolutions(parts: dict[str, Component], tmp_path: Path) -> None:
    """1x1 to `rank` channels, 3x3 among them, and 1x1 from them are one convolution."""
    down, mid, up = randn(2, 8, 1, 1), randn(2, 2, 3, 3, seed=1), randn(8, 2, 1, 1, seed=2)
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    state = factors(stem, down, up, 1.0) | {f"{stem}.lora_mid.weight": mid}
    kernel = merged(parts, (written(state, tmp_path / "x.safetensors"), 1.0))["unet"][f"{CONV}.weight"]
    x, conv = randn(1, 8, 5, 5, seed=3), partial(nn.functional.conv2d, padding=1)
    added = nn.functional.conv2d(conv(nn.functional.conv2d(x, down), mid), up) / 2
    expected = conv(x, parts["unet"][1].tensors[f"{CONV}.weight"]()) + added
    torch.testing.assert_close(conv(x, kernel), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("stem", "name", "factor_shapes"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in", ((2, 16), (16, 2))),
        ("lora_unet_input_blocks_1_0_in_layers_2", CONV, ((2, 8, 3, 3), (8, 2, 1, 1))),
    ],
    ids=["linear", "convolution"],
)
def test_doras_norms(
    axis: int, stem: str, name: str, factor_shapes: Any, parts: dict[str, Component], tmp_path: Path
) -> None:
    """Rows (or columns) have the norms given, and the directions of the LoRA's; at weight 0.5, half the way is gone."""
    base = parts["unet"][1].tensors[f"{name}.weight"]()
    shape = [1] * base.dim()
    shape[axis] = base.shape[axis]
    norms, pair = randn(*shape, seed=4).abs() + 0.1, [randn(*shape, seed=i) for i, shape in enumerate(factor_shapes)]
    lora_file = written(factors(stem, *pair, 1.0), tmp_path / "lora.safetensors")
    file = written(factors(stem, *pair, 1.0) | {f"{stem}.dora_scale": norms}, tmp_path / "dora.safetensors")
    plain, whole, half = (
        merged(parts, (path, weight))["unet"][f"{name}.weight"]
        for path, weight in ((lora_file, 1.0), (file, 1.0), (file, 0.5))
    )
    slices, plain_slices = (x.transpose(0, axis).flatten(1) for x in (whole, plain))
    torch.testing.assert_close(slices.norm(dim=1), norms.flatten())
    torch.testing.assert_close(nn.functional.cosine_similarity(slices, plain_slices), torch.ones(len(slices)))
    torch.testing.assert_close(half, (base + whole) / 2, atol=1e-6, rtol=1e-6)


def test_a_dora_of_zeros_stays_zero(parts: dict[str, Component], tmp_path: Path) -> None:
    source = TensorSource("x", {"conv_in.weight": lambda: torch.zeros(8, 4, 3, 3)})
    state = factors("unet.conv_in", torch.zeros(1, 4, 3, 3), torch.ones(8, 1, 1, 1))
    file = written(state | {"unet.conv_in.lora_magnitude_vector": torch.ones(1, 8, 1, 1)}, tmp_path / "x.safetensors")
    base = {**parts, "unet": (CONFIGS["unet"], source)}
    assert (lora.merge(base, [lora.read(file, 1.0, base)])["unet"][1].tensors["conv_in.weight"]() == 0).all()


def test_doras_add_up_in_any_order(modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path) -> None:
    """Each of them changes the checkpoint's weights, not what another one has made of them."""
    state = kohya("unet", adapter_state(adapted("unet", modules["unet"], use_dora=True)), 2.0)
    dora = written(state, tmp_path / "dora.safetensors"), 0.8
    other = written({key: x for key, x in state.items() if "dora" not in key}, tmp_path / "lora.safetensors"), 0.5
    assert_close(merged(parts, dora, other)["unet"], merged(parts, other, dora)["unet"])


def test_whole_differences(parts: dict[str, Component], tmp_path: Path) -> None:
    base = {name: read() for name, read in parts["unet"][1].tensors.items()}
    given = {
        "lora_unet_input_blocks_1_0_in_layers_2.diff": (f"{CONV}.weight", randn(8, 8, 3, 3)),
        "lora_unet_input_blocks_1_0_in_layers_2.diff_b": (f"{CONV}.bias", randn(8)),
        "lora_unet_input_blocks_1_0_in_layers_0.w_norm": ("down_blocks.0.resnets.0.norm1.weight", randn(8, seed=1)),
        "lora_unet_input_blocks_1_0_in_layers_0.b_norm": ("down_blocks.0.resnets.0.norm1.bias", randn(8, seed=2)),
        "lora_unet_conv_out.diff_b": ("conv_out.bias", randn(4, seed=3)),
    }
    file = written({key: tensor for key, (_, tensor) in given.items()}, tmp_path / "x.safetensors")
    ours = merged(parts, (file, 0.5))["unet"]
    assert_close(ours, base | {name: base[name] + 0.5 * tensor for name, tensor in given.values()})


def test_a_bias_that_is_not_there(parts: dict[str, Component], tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(ConsistoryError) as error:
        lora.read(written({f"{stem}.diff_b": torch.zeros(16)}, tmp_path / "x.safetensors"), 1.0, parts)
    assert_says(error, f"{stem} changes a bias that this model lacks")


def test_names_of_lycoris_itself(modules: dict[str, nn.Module], parts: dict[str, Component], tmp_path: Path) -> None:
    state = kohya("unet", adapter_state(adapted("unet", modules["unet"])), 2.0)
    renamed = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in state.items()}
    ours, expected = (
        merged(parts, (written(each, tmp_path / f"{i}.safetensors"), 1.0)) for i, each in enumerate((renamed, state))
    )
    assert_close(ours["unet"], expected["unet"])


# --- what cannot be merged --------------------------------------------------------------------------------------------

STEM = "lora_unet_input_blocks_4_1_proj_in"
GOOD = factors(STEM, torch.zeros(2, 16), torch.zeros(16, 2))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([f"{STEM}.oft_blocks"], "is an OFT"),
        ([f"{STEM}.wd_for_diff", f"{STEM}.dora_scale"], "is a DoRA of differences"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "Stable Diffusion 1 or 2"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "Stable Diffusion 1 or 2"),
        (["unet.up_blocks.3.attentions.0.proj_in.lora_A.weight"], "Stable Diffusion 1 or 2"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "diffusion transformer"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "diffusion transformer"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [{}, GOOD], ids=["alone", "beside a LoRA"])
def test_other_kinds_are_named(
    keys: list[str], says: str, beside: State, parts: dict[str, Component], tmp_path: Path
) -> None:
    file = written({key: torch.zeros(2, 2) for key in keys} | beside, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        lora.read(file, 1.0, parts)
    assert_says(error, file, says, "it holds", "give a plain SDXL LoRA")


def test_keys_without_a_place_are_named(parts: dict[str, Component], tmp_path: Path) -> None:
    stray = {"lora_unet_input_blocks_9_9_x.lora_down.weight": torch.zeros(1, 1), "emb_params": torch.zeros(1)}
    file = written(GOOD | stray, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        lora.read(file, 1.0, parts)
    assert_says(error, file, "no place in this model (emb_params, lora_unet_input_blocks_9_9_x.lora_down.weight)")


@pytest.mark.parametrize("tensors", [{}, {"model.diffusion_model.out.2.bias": torch.zeros(4)}], ids=["empty", "model"])
def test_what_is_no_lora(tensors: State, parts: dict[str, Component], tmp_path: Path) -> None:
    file = written(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        lora.read(file, 1.0, parts)
    assert_says(error, file, "is not a LoRA for this model", *(tensors or ["it holds nothing"]))


def test_half_a_pair(parts: dict[str, Component], tmp_path: Path) -> None:
    for key in (*GOOD, f"{STEM}.alpha", f"{STEM}.dora_scale", f"{STEM}.hada_w1_a", f"{STEM}.lokr_w1"):
        file = written({key: torch.zeros(16, 2)}, tmp_path / "x.safetensors")
        with pytest.raises(ConsistoryError) as error:
            lora.read(file, 1.0, parts)
        assert_says(error, file, "is incomplete", key, "download it again")


def test_the_same_module_under_two_names(parts: dict[str, Component], tmp_path: Path) -> None:
    twin = factors("lora_unet_down_blocks_1_attentions_0_proj_in", torch.zeros(2, 16), torch.zeros(16, 2))
    with pytest.raises(ConsistoryError) as error:
        lora.read(written(GOOD | twin, tmp_path / "x.safetensors"), 1.0, parts)
    assert_says(error, "changes a module twice")


@pytest.mark.parametrize(
    ("down", "up"), [((3, 16), (16, 2)), ((2, 16), (16, 2, 3, 3)), ((16,), (16, 2)), ((0, 16), (16, 0)), ((), (16, 2))]
)
def test_factors_that_cannot_be_multiplied(
    down: tuple[int, ...], up: tuple[int, ...], parts: dict[str, Component], tmp_path: Path
) -> None:
    file = written(factors(STEM, torch.zeros(down), torch.zeros(up)), tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        merged(parts, (file, 1.0))
    assert_says(error, file, "cannot be multiplied", list(down))


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{STEM}.diff": torch.tensor(1.0)},
        {f"{STEM}.diff_b": torch.tensor(1.0)},
        {f"{STEM}.diff_b": torch.zeros(0)},
        {"unet.down_blocks.0.resnets.0.norm1.w_norm": torch.zeros(8),
         "unet.down_blocks.0.resnets.0.norm1.dora_scale": torch.ones(1, 8)},
        GOOD | {f"{STEM}.alpha": torch.ones(2)},
        GOOD | {f"{STEM}.alpha": torch.tensor(float("nan"))},
    ],
    ids=["difference", "bias", "no bias", "norms of a norm", "two alphas", "no alpha"],
)  # fmt: skip
def test_damaged_files(tensors: State, parts: dict[str, Component], tmp_path: Path) -> None:
    file = written(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        merged(parts, (file, 1.0))
    assert_says(error, file)


def test_words_beside_a_lora_are_told(
    parts: dict[str, Component], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundled = {f"bundle_emb.mycat.{key}": torch.zeros(1, 4) for key in ("clip_l", "clip_g")}
    both, alone = (written(each, tmp_path / f"{len(each)}.safetensors") for each in (GOOD | bundled, GOOD))
    assert_close(merged(parts, (both, 1.0))["unet"], merged(parts, (alone, 1.0))["unet"])
    assert f"--embedding {both}:WORD" in caplog.text


def test_a_lora_of_another_width(parts: dict[str, Component], tmp_path: Path) -> None:
    """Stable Diffusion 1 has modules of the same names, and a context of 768."""
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    file = written(factors(stem, torch.zeros(2, 768), torch.zeros(16, 2)), tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        merged(parts, (file, 1.0))
    assert_says(error, f"{file}: {stem} is 16 x 768, not 16 x 12", "made for another model")


def test_norms_of_another_width(parts: dict[str, Component], tmp_path: Path) -> None:
    for norms in (torch.ones(8), torch.ones(8, 1), torch.ones(1, 8)):
        file = written(GOOD | {f"{STEM}.dora_scale": norms}, tmp_path / "x.safetensors")
        with pytest.raises(ConsistoryError) as error:
            merged(parts, (file, 1.0))
        assert_says(error, f"{file}: {STEM} is 8 norms, not 16", "made for another model")


def test_a_lora_of_a_norm(parts: dict[str, Component], tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.resnets.0.norm1"
    file = written(factors(stem, torch.zeros(1, 8), torch.zeros(8, 1)), tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        merged(parts, (file, 1.0))
    assert_says(error, stem, "made for another model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, parts: dict[str, Component], tmp_path: Path) -> None:
    down = torch.zeros(2, 16)
    down[1, 3] = value
    file = written(factors(STEM, down, torch.zeros(16, 2)), tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        merged(parts, (file, 1.0))
    assert_says(error, f"{file}: {STEM} holds NaN or infinity")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(weight: float, golden_weights: Path, tmp_path: Path) -> None:
    file = written(GOOD, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError) as error:
        ConsiStory.from_pretrained(golden_weights, loras=[(file, weight)])
    assert_says(error, f"weight of {file} is {weight}: give a finite number")


def test_files_that_cannot_be_opened(parts: dict[str, Component], tmp_path: Path) -> None:
    whole = written(GOOD, tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-1])
    written(GOOD, tmp_path / "damaged.safetensors", lora_adapter_metadata="{")
    for file, says in {
        "none.safetensors": "there is no file", "x.pt": "is pickled", "damaged.safetensors": "damaged metadata",
        "truncated.safetensors": "is not a complete safetensors file",
    }.items():  # fmt: skip
        with pytest.raises(ConsistoryError) as error:
            lora.read(tmp_path / file, 1.0, parts)
        assert_says(error, tmp_path / file, says)
