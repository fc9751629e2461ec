"""Reading checkpoints: safetensors files -> modules.

    read_json(path) -> dict                                     any config file
    read_model_index(folder) -> dict                            of an SDXL checkpoint in the diffusers layout
    folder_component(folder, name, variant) -> Component        its "unet", "vae", "text_encoder" or "text_encoder_2"
    vae_component(path, own) -> Component                       an autoencoder on its own, in any layout
    clip_components(folder) -> {name: Component}                "text" and "vision" of a CLIP model
    sdxl_configs() -> {name: config.json content}               for single files, which carry none
    single_file_components(path, configs) -> {name: Component}  the same four from one file in the original layout
    single_file_schedule(path, schedule) -> schedule            what a single file's flags change in it
    folder_controlnet(folder, variant) -> Component             a ControlNet in the diffusers layout
    single_file_controlnet(path, config) -> Component           a ControlNet from one file
    ip_adapter(path) -> (tensors, sizes)                        an IP-Adapter
    image_encoder(folder) -> Component                          CLIP's, which an IP-Adapter reads pictures with
    load_module(build, tensors, dtype, device) -> module        builds it and gives it the component's tensors

A `Component` is (config, tensors). Opening one reads names only; tensors are mapped from the file and read when they
are asked for. Pickled files (.ckpt, .bin, .pt) are refused: loading one runs whatever code it holds.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from consistory.weights import names
from consistory.weights.errors import ConsistoryError
from consistory.weights.names import Json, Layout, Rename

Module = TypeVar("Module", bound=nn.Module)
Read = Callable[[], Tensor]

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SDXL_CONFIGS = Path(__file__).parent / "sdxl"
PICKLED = {".ckpt", ".bin", ".pt", ".pth"}
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\..*safetensors")
SHARD = re.compile(r"-\d+-of-\d+")
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
    r".*(lora_|\.lora\.|hada_|lokr_)": "a LoRA, which is given beside a checkpoint, with loras= or --lora",
    r"cond_stage_model\.": "Stable Diffusion 1 or 2",
    r"conditioner\.embedders\.0\.model\.": "the SDXL refiner",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"edm_vpred\.": "an SDXL checkpoint with an EDM schedule",
    r"(control_model|controlnet_cond_embedding)\.": "a ControlNet",
    r"(input_blocks|down_blocks|text_model|decoder|encoder)\.": "one component of a checkpoint",
}

# The same for a file that is not an SDXL ControlNet, or not one that works like the usual ones. The first match counts.
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
CONTROLNET_ADVICE = "give an SDXL ControlNet for a single kind of picture"

IP_ADAPTER_ADVICE = "give an SDXL IP-Adapter that is not FaceID, such as ip-adapter-plus_sdxl_vit-h"


# How the parameters of CLIP's two encoders begin, and the sizes of ViT-B/32, which its configs need not repeat.
CLIP_PARTS: dict[str, tuple[tuple[str, ...], Json]] = {
    "text": (
        ("text_model.", "text_projection."),
        {
            "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    ),
    "vision": (
        ("vision_model.", "visual_projection."),
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
    ),
}  # fmt: skip


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
        if not path.parent.exists():
            raise ConsistoryError(f"there is no folder {path.parent}: check the name") from None
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
        raise ConsistoryError(f"{folder} is not an SDXL base checkpoint ({kind} without {', '.join(absent)})")
    return content


def folder_component(folder: Path, name: str, variant: str | None = None) -> Component:
    """A component of a checkpoint in the diffusers layout.

    variant: the middle of names like `model.fp16.safetensors`; None takes the plain file, or the only variant there is.
    Raises ConsistoryError if a file is missing, damaged or pickled.
    """
    return _component(folder / name, name, variant, f"{name} of {folder}")


def _component(folder: Path, name: str, variant: str | None, label: str) -> Component:
    config = read_json(folder / "config.json")
    path, stored = _open_folder(folder, variant)
    by_original = names.index(names.FOLDER[name])
    return config, TensorSource(f"{label} ({path.name})", _by_parameter(stored, by_original))


# What latents mean to an autoencoder: configuration keys, with diffusers' defaults.
LATENTS = {"in_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215}


def vae_component(path: Path, own: Json) -> Component:
    """An autoencoder in place of a checkpoint's own, whose `config.json` content is `own`.

    path: a `.safetensors` file in the original layout (alone, or in a whole checkpoint) or with diffusers' names; or a
    folder in the diffusers layout, an autoencoder's or a whole checkpoint's. A file carries no configuration: it gets
    the checkpoint's.
    Raises ConsistoryError if it is missing or damaged, or a folder's latents are not the checkpoint's.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "model_index.json").exists() else path
        config, tensors = _component(folder, "vae", None, f"vae of {path}")
        _check_latents(path, config, own)
        return {**own, **config}, tensors
    stored = _open(path)
    for prefix in (names.SINGLE_FILE["vae"].prefix, "vae."):
        inner = {key.removeprefix(prefix): read for key, read in stored.items() if key.startswith(prefix)}
        stored = inner or stored
    by_original = names.index(chain(names.vae_table(own), names.FOLDER["vae"]))
    return own, TensorSource(f"vae of {path}", _by_parameter(stored, by_original))


def _check_latents(path: Path, config: Json, own: Json) -> None:
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ConsistoryError(f"{path} is not an SDXL autoencoder but {kind}: give an AutoencoderKL")
    values = {key: (config.get(key, default), own.get(key, default)) for key, default in LATENTS.items()}
    values["levels"] = len(config.get("block_out_channels", ())), len(own["block_out_channels"])
    for key, (there, here) in values.items():
        if there != here:
            raise ConsistoryError(f"{path} is made for other latents ({key} {there}, not {here}): give an SDXL VAE")


def clip_components(folder: Path) -> dict[str, Component]:
    """Both encoders of a CLIP model in transformers' layout, "text" and "vision", each with its part of the config.

    What a config leaves out has the value that transformers documents.
    Raises ConsistoryError if a file is missing, damaged or pickled, or the folder holds another model.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ConsistoryError(
            f"{folder} holds no CLIP model ({config.get('model_type', 'of unknown type')}): "
            "give one in transformers' layout, such as openai/clip-vit-large-patch14"
        )
    _, stored = _open_folder(folder, None)
    projection = {"projection_dim": config.get("projection_dim", 512)}
    components = {}
    for name, (prefixes, defaults) in CLIP_PARTS.items():
        tensors = {key: read for key, read in stored.items() if key.startswith(prefixes)}
        part = {**defaults, **config.get(f"{name}_config", {}), **projection}
        components[name] = part, TensorSource(f"the {name} encoder of {folder}", tensors)
    return components


def sdxl_configs() -> dict[str, Json]:
    """The published configuration of SDXL base: "model_index", "scheduler" and one entry for each component."""
    return {path.stem: read_json(path) for path in SDXL_CONFIGS.glob("*.json")}


def single_file_components(
    path: Path, configs: Mapping[str, Json], optional: Collection[str] = ()
) -> dict[str, Component]:
    """The components of a checkpoint in the original single-file layout, by name.

    configs: each component's `config.json` content, such as `sdxl_configs()`.
    optional: components that the file need not hold.
    Raises ConsistoryError if the file is missing, damaged, pickled, of another family or has keys that nothing needs.
    """
    stored = _open(path)
    _check_family(path, stored)
    components = {}
    for name, part in names.SINGLE_FILE.items():
        own = {key.removeprefix(part.prefix): stored.pop(key) for key in list(stored) if key.startswith(part.prefix)}
        if not own and name in optional:
            continue
        if not own:
            raise ConsistoryError(f"{path} holds no {name} ({part.prefix}*): give a whole SDXL base checkpoint")
        by_original = names.index(part.table(configs[name]))
        components[name] = configs[name], TensorSource(f"{name} of {path}", _by_parameter(own, by_original))
    if stored:
        raise ConsistoryError(f"{path} holds keys that SDXL does not have ({listed(stored)}): {ADVICE}")
    return components


def single_file_schedule(path: Path, schedule: Json) -> Json:
    """The schedule of a single file, given SDXL's.

    A fine-tune that predicts v carries a key `v_pred` or says so in its metadata
    (https://github.com/Stability-AI/ModelSpec); and it carries a key `ztsnr` if its noise ends at zero signal.
    Raises ConsistoryError if the file is missing or damaged.
    """
    file = open_safetensors(path)
    flags, metadata = set(file.keys()), file.metadata() or {}
    if "v_pred" not in flags and metadata.get("modelspec.prediction_type") not in ("v", "v_prediction"):
        return schedule
    return {**schedule, "prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in flags}


def folder_controlnet(folder: Path, variant: str | None = None) -> Component:
    """A ControlNet in the diffusers layout: `config.json` and weights. variant: as for a checkpoint's component.

    Raises ConsistoryError if a file is missing, damaged or pickled, or if it is not an SDXL ControlNet.
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
        raise ConsistoryError(f"{folder} holds a {kind}, not an SDXL ControlNet: {CONTROLNET_ADVICE}")
    if config.get("addition_embed_type") != "text_time":
        raise _older_controlnet(folder, config.get("cross_attention_dim"))
    if config.get("global_pool_conditions"):
        raise ConsistoryError(f"{folder} pools its residuals over the picture: {CONTROLNET_ADVICE}")
    order, channels = config.get("controlnet_conditioning_channel_order", "rgb"), config.get("conditioning_channels", 3)
    if (order, channels) != ("rgb", 3):
        raise ConsistoryError(f"{folder} reads other pictures than RGB: {CONTROLNET_ADVICE}")
    return config, TensorSource(f"the ControlNet {folder}", _open_folder(folder, variant)[1], CONTROLNET_ADVICE)


def single_file_controlnet(path: Path, config: Json | None = None) -> Component:
    """A ControlNet from one file, whose keys are diffusers' or, below `control_model.` or bare, the original ones.

    config: its `config.json` content; None means SDXL's, with attention only where the file has it.
    Raises ConsistoryError if the file is missing, damaged or pickled, or if it is not an SDXL ControlNet.
    """
    stored = {key.removeprefix("control_model."): read for key, read in _open(path).items()}
    for pattern, kind in NO_CONTROLNETS.items():
        key = next((key for key in stored if re.match(pattern, key)), None)
        if key is not None:
            raise ConsistoryError(f"{path} is {kind} (it holds {key}): {CONTROLNET_ADVICE}")
    everywhere = config or sdxl_configs()["unet"] | names.SDXL_CONTROLNET
    tensors = _by_parameter(stored, names.index(names.controlnet_table(everywhere)))
    if "controlnet_cond_embedding.conv_in.weight" not in tensors:
        raise ConsistoryError(f"{path} holds no ControlNet (its keys: {listed(stored)}): {CONTROLNET_ADVICE}")
    if "add_embedding.linear_1.weight" not in tensors:
        width = next((read().shape[-1] for key, read in tensors.items() if key.endswith("attn2.to_k.weight")), None)
        raise _older_controlnet(path, width)
    config = config or names.attended_as_stored(everywhere, tensors)
    return config, TensorSource(f"the ControlNet {path}", tensors, CONTROLNET_ADVICE)


def ip_adapter(path: Path) -> tuple[TensorSource, dict[str, int]]:
    """An IP-Adapter for SDXL, and the sizes of its `image_proj`; "width" and "layers" only if it is a Plus.

    Raises ConsistoryError if the file is missing, damaged or pickled, or holds something else.
    """
    stored = _open(path)
    parts = {key.removeprefix("image_proj."): read for key, read in stored.items() if key.startswith("image_proj.")}
    if {"latents", "proj_in.weight", "proj_out.weight"} <= parts.keys():
        tokens, width = parts["latents"]().shape[-2:]
        sizes = {
            "features": parts["proj_in.weight"]().shape[-1],
            "tokens": tokens,
            "context_width": len(parts["proj_out.weight"]()),
            "width": width,
            "layers": len({key.split(".")[1] for key in parts if key.startswith("layers.")}),
        }
    elif {"proj.weight", "norm.weight"} <= parts.keys():
        outputs, context_width = len(parts["proj.weight"]()), len(parts["norm.weight"]())
        sizes = {
            "features": parts["proj.weight"]().shape[-1],
            "tokens": outputs // context_width,
            "context_width": context_width,
        }
    else:
        kind = "an IP-Adapter for faces" if "proj.0.weight" in parts else "no IP-Adapter"
        raise ConsistoryError(f"{path} holds {kind} (its keys: {listed(stored)}): {IP_ADAPTER_ADVICE}")
    return TensorSource(f"the IP-Adapter {path}", stored, IP_ADAPTER_ADVICE), sizes


def image_encoder(folder: Path) -> Component:
    """CLIP's image encoder in transformers' layout, by itself or in a whole CLIP model.

    Raises ConsistoryError if a file is missing, damaged or pickled, or the folder holds another model.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") == "clip":
        return clip_components(folder)["vision"]
    if config.get("model_type") != "clip_vision_model":
        raise ConsistoryError(
            f"{folder} holds no image encoder of CLIP ({config.get('model_type', 'of unknown type')}): "
            "give one in transformers' layout, such as the folder image_encoder beside an IP-Adapter"
        )
    _, stored = _open_folder(folder, None)
    usual = CLIP_PARTS["vision"][1] | {"projection_dim": 512}
    return usual | config, TensorSource(f"the image encoder of {folder}", stored)


def _older_controlnet(path: Path, width: int | None) -> ConsistoryError:
    return ConsistoryError(
        f"{path} is a ControlNet of Stable Diffusion 1 or 2 (context width {width}, no size ids): {CONTROLNET_ADVICE}"
    )


def load_module(
    build: Callable[[], Module], tensors: TensorSource, *, dtype: torch.dtype, device: torch.device | str
) -> Module:
    """Build a module without memory of its own and give it the tensors, converted one at a time; it needs no gradients.

    On the CPU, tensors that already have `dtype` stay mapped from the file.
    Raises ConsistoryError that names tensors which are missing, unknown, of another shape or not finite in `dtype`.
    """
    with torch.device("meta"), _SkipInit():
        module = build().requires_grad_(False).eval()
    expected = module.state_dict()
    missing, unknown = expected.keys() - tensors.tensors.keys(), tensors.tensors.keys() - expected.keys()
    if missing or unknown:
        problems = [f"{kind}: {listed(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
        found = "; ".join(problems)
        raise ConsistoryError(f"{tensors.label} does not fit its configuration ({found}): {tensors.advice}")
    state = {
        name: _converted(_of_shape(parameter.shape, tensors, name), dtype, tensors, name).to(device).contiguous()
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


def _converted(tensor: Tensor, dtype: torch.dtype, tensors: TensorSource, name: str) -> Tensor:
    converted = tensor.to(dtype)
    if not is_finite(converted):
        if is_finite(tensor.float()):
            largest = f"{name} has a value of {tensor.float().abs().max():.3g}"
            raise ConsistoryError(f"{tensors.label} overflows in {dtype} ({largest}): use bfloat16 or float32")
        raise ConsistoryError(f"{tensors.label} is damaged ({name} holds NaN or infinity): download it again")
    return converted


def is_finite(x: Tensor) -> bool:
    """Whether all values are: smallest and largest tell, in one pass and without a mask in memory."""
    return all(math.isfinite(end.item()) for end in x.aminmax())


class _SkipInit(TorchFunctionMode):
    """Random initialisation of meta tensors does nothing, but loads a compiler stack first: two seconds."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def choose_weights(files: Iterable[str], variant: str | None, folder: object) -> str:
    """Which of a component's files to read: weights, or the index of their shards, such as
    `model.safetensors` or `model.safetensors.index.fp16.json`. See `folder_component` for `variant`.

    Raises ConsistoryError, which names the folder, if none fits.
    """
    files = sorted(files)
    found = {variant_of(file): file for file in files if WEIGHTS.match(file) and not SHARD.search(file)}
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if variant in found:
        return found[variant]
    if found:
        wanted, there = variant or "(none)", ", ".join(sorted(name or "(none)" for name in found))
        raise ConsistoryError(f"{folder} has no weights of variant {wanted}: choose one that it has: {there}")
    pickled = [file for file in files if Path(file).suffix in PICKLED]
    if pickled:
        raise _pickled(Path(str(folder), pickled[0]))
    raise ConsistoryError(f"{folder} has no safetensors file: download the whole checkpoint folder again")


def variant_of(file: str) -> str | None:
    """The middle of a weights file's name: "fp16" of `model.fp16-00001-of-00002.safetensors`."""
    middle = SHARD.sub("", file).split(".")[1:]
    return next((part for part in middle if part not in ("safetensors", "index", "json")), None)


def _open_folder(folder: Path, variant: str | None) -> tuple[Path, dict[str, Read]]:
    """The weights file or shard index of a folder, and its tensors."""
    path = folder / choose_weights([path.name for path in folder.iterdir()], variant, folder)
    return path, _open_sharded(path) if path.suffix == ".json" else _open(path)


def _open_sharded(path: Path) -> dict[str, Read]:
    shards = set(read_json(path)["weight_map"].values())
    return {key: read for shard in sorted(shards) for key, read in _open(path.parent / shard).items()}


def open_safetensors(path: Path) -> Any:
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
            f"{path} is not a complete safetensors file ({error}): download it again (in a Git clone: git lfs pull)"
        ) from None


def _open(path: Path) -> dict[str, Read]:
    """The tensors of a safetensors file by key, but for those that are never needed."""
    file = open_safetensors(path)
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


def listed(keys: Iterable[str]) -> str:
    """Keys for a message: the first five, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more
