"""Reading checkpoints: safetensors files -> modules.

    read_json(path) -> dict                                     any config file
    read_model_index(folder) -> dict                            of an SDXL checkpoint in the diffusers layout
    folder_component(folder, name, variant) -> Component        its "unet", "vae", "text_encoder" or "text_encoder_2"
    sdxl_configs() -> {name: config.json content}               for single files, which carry none
    single_file_components(path, configs) -> {name: Component}  the same four from one file in the original layout
    single_file_schedule(path, schedule) -> schedule          what a single file's flags change in it
    folder_controlnet(folder, variant) -> Component             a ControlNet in the diffusers layout
    single_file_controlnet(path, config) -> Component           a ControlNet from one file
    load_module(build, tensors, dtype, device) -> module        builds it and gives it the component's tensors

A `Component` is (config, tensors). Opening one reads names only; tensors are mapped from the file and read when they
are asked for. Pickled files (.ckpt, .bin, .pt) are refused: loading one runs whatever code it holds.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from consistory.weights import names
from consistory.weights.errors import ConsistoryError
from consistory.weights.names import Json, Layout, Rename
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)
Read = Callable[[], Tensor]

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SDXL_CONFIGS = Path(__file__).parent / "sdxl"
PICKLED = {".ckpt", ".bin", ".pt", ".pth"}
ADVICE = "give an SDXL base checkpoint, complete and unmodified"

# Known keys that no module needs (regular expressions for whole keys): position numbers, CLIP's contrastive
# temperature, the first encoder's projection, the training schedule, averaged weights, the autoencoder's training loss.
UNUSED = (
    r"(.*\.)?(text_model\.)?embeddings\.position_ids",
    r"(.*\.)?logit_scale",
    r"conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?",
    r"conditioner\.embedders\.1\.model\.attn_mask",
    r"(denoiser\.)?(betas|sigmas|log_sigmas|alphas_cumprod(_prev)?|logvar|lvlb_weights|scale_factor)",
    r"(sqrt|log)_(one_minus_|recip_|recipm1_)?alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"v_pred|ztsnr",  # flags, read by `single_file_schedule`
    r"(first_stage_model\.)?model_ema\..*",
    r"(first_stage_model\.)?loss\..*",
)

# What else a file may be (regular expressions for the beginning of any of its keys), and what to say.
OTHER_FAMILIES = {
    r".*(lora_|\.lora\.|hada_|lokr_)": "a LoRA, an addition to a checkpoint",
    r"cond_stage_model\.": "Stable Diffusion 1 or 2",
    r"conditioner\.embedders\.0\.model\.": "the SDXL refiner",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"edm_vpred\.": "an SDXL checkpoint with an EDM schedule",
    r"(control_model|controlnet_cond_embedding)\.": "a ControlNet",
    r"(input_blocks|down_blocks|text_model|decoder|encoder)\.": "one component of a checkpoint",
}

# The same for a file that is no ControlNet of SDXL, or none that works like the usual ones. The first match counts.
NO_CONTROLNETS = {
    r"lora_controlnet$|.*\.(up|down)$": "a Control-LoRA, the difference to some UNet",
    r".*(lora_|\.lora\.|hada_|lokr_)": "a LoRA, an addition to a checkpoint",
    r"lllite_": "a ControlNet-LLLite",
    r"(control_add_embedding|transformer_layes|spatial_ch_projs)\.|task_embedding$": "a union ControlNet",
    r"(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.": "a whole checkpoint",
    r"(up_blocks|output_blocks|conv_out)\.": "a UNet",
    r"(adapter|body)\.": "a T2I-Adapter",
    r"(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"(controlnet_blocks|transformer_blocks|double_blocks|controlnet_x_embedder)\.": "a ControlNet of another family",
}
CONTROLNET_ADVICE = "give a ControlNet of SDXL for a single kind of picture"


@dataclass(frozen=True)
class TensorSource:
    """A component's tensors by parameter name, each read when its function is called."""

    label: str  # for messages
    tensors: Mapping[str, Read]
    advice: str = ADVICE  # where they do not fit


Component = tuple[Json, TensorSource]


def read_json(path: Path) -> Json:
    """Read a JSON object. Raises ConsistoryError if the file is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConsistoryError(f"{path} is missing: download the whole checkpoint folder again") from None
    except (OSError, ValueError) as error:
        raise ConsistoryError(f"cannot read {path} ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ConsistoryError(f"{path} does not hold a JSON object: download it again")
    return content


def read_model_index(folder: Path) -> Json:
    """The folder's `model_index.json`. Raises ConsistoryError if there is none or it describes no SDXL base model."""
    if folder.is_file():
        raise ConsistoryError(f"{folder} is a file, not a folder: load it as a single-file checkpoint")
    if not folder.is_dir():
        raise ConsistoryError(f"there is no folder {folder}: give that of an SDXL checkpoint in the diffusers layout")
    path = folder / "model_index.json"
    if not path.exists():
        raise ConsistoryError(f"{path} is missing: give the top folder of an SDXL checkpoint in the diffusers layout")
    content = read_json(path)
    absent = [name for name in COMPONENTS if content.get(name, [None])[0] is None]
    if absent:
        kind = content.get("_class_name", "unknown pipeline")
        raise ConsistoryError(f"{folder} is no SDXL base checkpoint ({kind} without {', '.join(absent)})")
    return content


def folder_component(folder: Path, name: str, variant: str | None = None) -> Component:
    """A component of a checkpoint in the diffusers layout.

    variant: the middle of names like `model.fp16.safetensors`; None takes the plain file, or the only variant there is.
    Raises ConsistoryError if a file is missing, damaged or pickled.
    """
    config = read_json(folder / name / "config.json")
    stored = _open_folder(folder / name, variant)
    by_original = names.index(names.FOLDER[name])
    return config, TensorSource(f"{name} of {folder}", _by_parameter(stored, by_original))


def sdxl_configs() -> dict[str, Json]:
    """The published configuration of SDXL base: "model_index", "scheduler" and one entry for each component."""
    return {path.stem: read_json(path) for path in SDXL_CONFIGS.glob("*.json")}


def single_file_components(path: Path, configs: Mapping[str, Json] | None = None) -> dict[str, Component]:
    """The components of a checkpoint in the original single-file layout, by name.

    configs: each component's `config.json` content; None means SDXL base.
    Raises ConsistoryError if the file is missing, damaged, pickled, of another family or has keys that nothing needs.
    """
    configs = configs or sdxl_configs()
    stored = _open(path)
    _check_family(path, stored)
    components = {}
    for name, part in names.SINGLE_FILE.items():
        own = {key.removeprefix(part.prefix): stored.pop(key) for key in list(stored) if key.startswith(part.prefix)}
        if not own:
            raise ConsistoryError(f"{path} holds no {name} ({part.prefix}*): give a whole SDXL base checkpoint")
        by_original = names.index(part.table(configs[name]))
        components[name] = configs[name], TensorSource(f"{name} of {path}", _by_parameter(own, by_original))
    if stored:
        raise ConsistoryError(f"{path} holds keys that SDXL has not ({_listed(stored)}): {ADVICE}")
    return components


def single_file_schedule(path: Path, schedule: Json) -> Json:
    """The schedule of a single file, given SDXL's.

    A fine-tune that predicts v carries a key `v_pred`, and `ztsnr` if its noise ends at zero signal.
    Raises ConsistoryError if the file is missing or damaged.
    """
    flags = set(_safetensors(path).keys())
    if "v_pred" not in flags:
        return schedule
    return {**schedule, "prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in flags}


def folder_controlnet(folder: Path, variant: str | None = None) -> Component:
    """A ControlNet in the diffusers layout: `config.json` and weights. variant: as for a checkpoint's component.

    Raises ConsistoryError if a file is missing, damaged or pickled, or if it is no ControlNet of SDXL.
    """
    if folder.is_file():
        raise ConsistoryError(f"{folder} is a file, not a folder: load it as a single-file ControlNet")
    if not folder.is_dir():
        raise ConsistoryError(f"there is no folder {folder}: give that of a ControlNet in the diffusers layout")
    if (folder / "model_index.json").exists():
        raise ConsistoryError(f"{folder} is a whole checkpoint: {CONTROLNET_ADVICE}")
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", "ControlNetModel")
    if "Union" in kind or "num_control_type" in config:
        raise ConsistoryError(f"{folder} is a union ControlNet, several in one: {CONTROLNET_ADVICE}")
    if kind != "ControlNetModel":
        raise ConsistoryError(f"{folder} holds a {kind}, no ControlNet of SDXL: {CONTROLNET_ADVICE}")
    if config.get("addition_embed_type") != "text_time":
        raise _older_controlnet(folder, config.get("cross_attention_dim"))
    if config.get("global_pool_conditions"):
        raise ConsistoryError(f"{folder} pools its residuals over the picture: {CONTROLNET_ADVICE}")
    order, channels = config.get("controlnet_conditioning_channel_order", "rgb"), config.get("conditioning_channels", 3)
    if (order, channels) != ("rgb", 3):
        raise ConsistoryError(f"{folder} reads other pictures than RGB: {CONTROLNET_ADVICE}")
    return config, TensorSource(f"the ControlNet {folder}", _open_folder(folder, variant), CONTROLNET_ADVICE)


def single_file_controlnet(path: Path, config: Json | None = None) -> Component:
    """A ControlNet from one file, whose keys are diffusers' or, below `control_model.` or bare, the original ones.

    config: its `config.json` content; None means SDXL's, with attention only where the file has it.
    Raises ConsistoryError if the file is missing, damaged or pickled, or if it is no ControlNet of SDXL.
    """
    stored = {key.removeprefix("control_model."): read for key, read in _open(path).items()}
    for pattern, kind in NO_CONTROLNETS.items():
        key = next((key for key in stored if re.match(pattern, key)), None)
        if key is not None:
            raise ConsistoryError(f"{path} is {kind} (it holds {key}): {CONTROLNET_ADVICE}")
    everywhere = config or sdxl_configs()["unet"] | names.SDXL_CONTROLNET
    tensors = _by_parameter(stored, names.index(names.controlnet_table(everywhere)))
    if "controlnet_cond_embedding.conv_in.weight" not in tensors:
        raise ConsistoryError(f"{path} holds no ControlNet (its keys: {_listed(stored)}): {CONTROLNET_ADVICE}")
    if "add_embedding.linear_1.weight" not in tensors:
        width = next((read().shape[-1] for key, read in tensors.items() if key.endswith("attn2.to_k.weight")), None)
        raise _older_controlnet(path, width)
    config = config or names.attended_as_stored(everywhere, tensors)
    return config, TensorSource(f"the ControlNet {path}", tensors, CONTROLNET_ADVICE)


def _older_controlnet(path: Path, width: int | None) -> ConsistoryError:
    return ConsistoryError(
        f"{path} is a ControlNet of Stable Diffusion 1 or 2 (context width {width}, no size ids): {CONTROLNET_ADVICE}"
    )


def load_module(
    build: Callable[[], Module], tensors: TensorSource, *, dtype: torch.dtype, device: torch.device | str
) -> Module:
    """Build a module without memory of its own and give it the tensors, converted one at a time; it needs no gradients.

    On the CPU, tensors that already have `dtype` stay mapped from the file.
    Raises ConsistoryError that names tensors which are missing, unknown, or of another shape.
    """
    with torch.device("meta"), _SkipInit():
        module = build().requires_grad_(False).eval()
    expected = module.state_dict()
    missing, unknown = expected.keys() - tensors.tensors.keys(), tensors.tensors.keys() - expected.keys()
    if missing or unknown:
        problems = [f"{kind}: {_listed(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
        listed = "; ".join(problems)
        raise ConsistoryError(f"{tensors.label} does not fit its configuration ({listed}): {tensors.advice}")
    state = {
        name: _of_shape(parameter.shape, tensors, name).to(device=device, dtype=dtype).contiguous()
        for name, parameter in expected.items()
    }
    module.load_state_dict(state, assign=True)
    return module


def _of_shape(shape: torch.Size, tensors: TensorSource, name: str) -> Tensor:
    tensor = tensors.tensors[name]()
    if tensor.shape != shape:
        shapes = f"{name} is {list(tensor.shape)}, not {list(shape)}"
        raise ConsistoryError(f"{tensors.label} does not fit its configuration ({shapes}): {tensors.advice}")
    return tensor


class _SkipInit(TorchFunctionMode):
    """Random initialisation of meta tensors does nothing, but loads a compiler stack first: two seconds."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _weights_file(folder: Path, variant: str | None) -> Path:
    """The safetensors file or shard index, e.g. `model.safetensors` or `model.safetensors.index.fp16.json`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors*")):
        stem, *middle = path.name.split(".")
        if stem in ("model", "diffusion_pytorch_model") and "-of-" not in path.name:
            found[next((part for part in middle if part not in ("safetensors", "index", "json")), None)] = path
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if variant in found:
        return found[variant]
    if found:
        wanted, there = variant or "(none)", ", ".join(sorted(name or "(none)" for name in found))
        raise ConsistoryError(f"{folder} has no weights of variant {wanted}: choose one that it has: {there}")
    pickled = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLED]
    if pickled:
        raise _pickled(pickled[0])
    raise ConsistoryError(f"{folder} has no safetensors file: download the whole checkpoint folder again")


def _open_folder(folder: Path, variant: str | None) -> dict[str, Read]:
    path = _weights_file(folder, variant)
    return _open_sharded(path) if path.suffix == ".json" else _open(path)


def _open_sharded(path: Path) -> dict[str, Read]:
    shards = set(read_json(path)["weight_map"].values())
    return {key: read for shard in sorted(shards) for key, read in _open(path.parent / shard).items()}


def _safetensors(path: Path) -> Any:
    """An open safetensors file. Raises ConsistoryError if it cannot be one."""
    if path.suffix in PICKLED:
        raise _pickled(path)
    if path.is_dir():
        raise ConsistoryError(f"{path} is a folder, not a file: load it as a checkpoint folder")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConsistoryError(f"there is no file {path}: check the name, or download it") from None
    except (OSError, SafetensorError) as error:
        raise ConsistoryError(
            f"{path} is not a whole safetensors file ({error}): download it again (in a Git clone: git lfs pull)"
        ) from None


def _open(path: Path) -> dict[str, Read]:
    """The tensors of a safetensors file by key, but for those that are never needed."""
    file = _safetensors(path)
    needed = [key for key in file.keys() if not any(re.fullmatch(pattern, key) for pattern in UNUSED)]  # noqa: SIM118
    return {key: partial(file.get_tensor, key) for key in needed}


def _by_parameter(stored: Mapping[str, Read], by_original: Mapping[str, list[Rename]]) -> dict[str, Read]:
    """Keys that the table does not know stay as they are: named alike in both layouts, or in no module."""
    return {
        name: partial(_read_as, layout, read)
        for key, read in stored.items()
        for name, layout in names.parameters_in(key, by_original) or [(key, names.same)]
    }


def _read_as(layout: Layout, read: Read) -> Tensor:
    return layout(read())


def _check_family(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for pattern, family in OTHER_FAMILIES.items():
            if re.match(pattern, key):
                raise ConsistoryError(f"{path} is {family} (it holds {key}): give an SDXL base checkpoint")


def _pickled(path: Path) -> ConsistoryError:
    return ConsistoryError(
        f"{path} is pickled, and loading it could run any code: "
        "get its safetensors version, or convert it with diffusers' save_pretrained(safe_serialization=True)"
    )


def _listed(keys: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
