"""LoRA files [1]: low-rank additions to a checkpoint's weights, merged into them as they are read.

    read(path, weight, parts) -> LoRA     opens a file and finds the parameter that each of its tensors belongs to
    merge(parts, loras) -> parts          the components, with  W + weight * (alpha / rank) * up @ down  in place of W

Nothing is added before a parameter is asked for, so no second copy of the model is ever in memory. Convolutions are
matrices too: down [rank, in, kh, kw] and up [out, rank, 1, 1] make a kernel [out, in, kh, kw].

[1] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from consistory.weights import names
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import Component, Read, TensorSource, is_finite, listed, open_safetensors
from consistory.weights.names import Json
from torch import Tensor

# A module in LoRA files. name: the library's own; other: in another layout (the original UNet's, or that of a text
# encoder that transformers 5 saved); old: how diffusers first called attention's projections. Kohya's scripts put
# underscores for dots.
TEMPLATES = {
    "unet": (
        "lora_unet_{flat_name}", "lora_unet_{flat_other}", "unet.{name}", "unet.{old}", "{name}", "{old}",
        "diffusion_model.{other}",
    ),
    "text_encoder": ("lora_te1_{flat_name}", "text_encoder.{name}", "text_encoder.{old}", "text_encoder.{other}"),
    "text_encoder_2": ("lora_te2_{flat_name}", "text_encoder_2.{name}", "text_encoder_2.{old}"),
}  # fmt: skip
OTHER_LAYOUTS = {"unet": names.unet_table, "text_encoder": lambda config: names.FOLDER["text_encoder"]}
OLD_ENDINGS = {
    "to_q": "processor.to_q", "to_k": "processor.to_k", "to_v": "processor.to_v", "to_out.0": "processor.to_out",
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out",
}  # fmt: skip

# What follows the module's name.
ROLES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",  # diffusers, text encoders
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # diffusers at first
}  # fmt: skip

# What else a file may be (regular expressions for a part of a key that has no place), and what to say.
OTHER_KINDS = {
    r"\.hada_[wt]\d": "a LoHa",
    r"\.lokr_[wt]\d": "a LoKr",
    r"\.dora_scale|\.lora_magnitude_vector": "a DoRA",
    r"\.lora_mid\.": "a LoRA with a Tucker decomposition",
    r"\.oft_|\.boft_": "an OFT",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a LoRA with whole differences of weights",
    r"lora_te_": "a LoRA of Stable Diffusion 1 or 2",
    r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]attentions": "a LoRA of Stable Diffusion 1 or 2",
    r"^transformer\.|double_blocks|joint_blocks|lora_transformer": "a LoRA of a diffusion transformer",
}


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to one parameter: scale * up @ down.

    label: of the module in its file, for messages. down, up: read the factors [rank, in, ...] and [out, rank, 1, ...].
    """

    label: str
    down: Read
    up: Read
    scale: float

    def added_to(self, parameter: Tensor) -> Tensor:
        """In float32. Raises ConsistoryError if the factors do not fit the parameter or are not finite."""
        down, up = self.down(), self.up()
        if not (is_finite(down) and is_finite(up)):
            raise ConsistoryError(f"{self.label} holds NaN or infinity: download the LoRA again")
        weight, down, up = (x.float().reshape(len(x), -1) for x in (parameter, down, up))
        if (len(up), down.shape[1]) != weight.shape:
            shapes = f"{len(up)} x {down.shape[1]}, not {len(weight)} x {weight.shape[1]}"
            raise ConsistoryError(f"{self.label} is {shapes}, so made for another model: give a LoRA of this one")
        return torch.addmm(weight, up, down, alpha=self.scale).reshape(parameter.shape)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file as it was given, a digest of its content, and {component: {parameter: what it adds}}."""

    path: Path
    weight: float
    digest: str
    updates: Mapping[str, Mapping[str, Update]]


def read(path: Path, weight: float, parts: Mapping[str, Component]) -> LoRA:
    """Find a place in the components for everything in a LoRA file, whose additions are multiplied by `weight`.

    Raises ConsistoryError if the file is missing, damaged, pickled or of another kind or model, and for any key that
    has no place.
    """
    if not math.isfinite(weight):
        raise ConsistoryError(f"weight {weight} of {path} is not a number to multiply with: use about 0 to 1")
    file = open_safetensors(path)
    configs = {part: _peft_config(path, file.metadata(), part) for part in TEMPLATES}
    updates: dict[str, dict[str, Update]] = {part: {} for part in TEMPLATES}
    for (part, name), keys in _places(path, file.keys(), parts).items():
        missing = [role for role in ("down", "up") if role not in keys]
        if missing:
            halves = f"{listed(keys.values())} without its {missing[0]}"
            raise ConsistoryError(f"{path} is not whole ({halves}): download it again")
        rank = _rank(path, keys, *(file.get_slice(keys[role]).get_shape() for role in ("down", "up")))
        own_alpha = "alpha" in keys
        scale = file.get_tensor(keys["alpha"]).item() / rank if own_alpha else _peft_scale(configs[part], name, rank)
        down, up = (partial(file.get_tensor, keys[role]) for role in ("down", "up"))
        updates[part][f"{name}.weight"] = Update(f"{path}: {_split(keys['down'])[0]}", down, up, weight * scale)
    return LoRA(path, weight, _digest(path), updates)


def merge(parts: Mapping[str, Component], loras: Iterable[LoRA]) -> dict[str, Component]:
    """The components with all LoRAs' additions, each made when its parameter is read."""
    merged = dict(parts)
    for lora in loras:
        for part, updates in lora.updates.items():
            config, source = merged[part]
            added = {name: partial(_read_updated, source.tensors[name], update) for name, update in updates.items()}
            merged[part] = config, replace(source, tensors={**source.tensors, **added})
    return merged


def _read_updated(read: Read, update: Update) -> Tensor:
    return update.added_to(read())


def _places(
    path: Path, keys: Iterable[str], parts: Mapping[str, Component]
) -> dict[tuple[str, str], dict[str, str]]:
    """{(component, module): {role: key}}. Raises ConsistoryError unless every key has a place of its own."""
    modules = {stem: (part, name) for part in TEMPLATES for name, stem in _stems(part, *parts[part])}
    places: dict[tuple[str, str], dict[str, str]] = {}
    homeless = []
    for key in keys:
        stem, role = _split(key)
        if role is None or stem not in modules:
            homeless.append(key)
            continue
        other = places.setdefault(modules[stem], {}).setdefault(role, key)
        if other != key:
            raise ConsistoryError(f"{path} changes a module twice ({other}, {key}): give an unmodified LoRA")
    if homeless or not places:
        raise _unfit(path, homeless, bool(places))
    return places


def _stems(part: str, config: Json, source: TensorSource) -> Iterator[tuple[str, str]]:
    """Every module of a component with a weight, and each of its names in LoRA files."""
    table = OTHER_LAYOUTS.get(part, lambda config: ())(config)
    by_name = {rename.name: rename for rename in table}
    for parameter in source.tensors:
        name, _, kind = parameter.rpartition(".")
        if kind == "weight":
            other = names.original_name(name, by_name)
            fields = {"name": name, "other": other, "old": _old_name(name)}
            flat = {f"flat_{key}": value.replace(".", "_") for key, value in fields.items()}
            for template in TEMPLATES[part]:
                yield name, template.format(**fields, **flat)


def _old_name(name: str) -> str:
    for ending, old in OLD_ENDINGS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(ending) + old
    return name


def _split(key: str) -> tuple[str, str | None]:
    """A key's module and role; the whole key and None if it has none."""
    for ending, role in ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _rank(path: Path, keys: Mapping[str, str], down: list[int], up: list[int]) -> int:
    """Of the shapes [rank, in, ...] and [out, rank, 1, ...]. Raises ConsistoryError if they have no common one."""
    if min(len(down), len(up)) < 2 or down[0] != math.prod(up[1:]) or down[0] == 0:
        shapes = f"{keys['down']} {down}, {keys['up']} {up}"
        raise ConsistoryError(f"{path} holds factors that cannot be multiplied ({shapes}): download it again")
    return down[0]


def _peft_config(path: Path, metadata: Mapping[str, str] | None, part: str) -> Json:
    """peft's LoraConfig of a component as diffusers keeps it: with the component before each key if there are several.

    Empty if there is none.
    """
    try:
        content = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ConsistoryError(f"{path} has damaged metadata ({error}): download it again") from None
    return {key.removeprefix(f"{part}."): value for key, value in content.items()}


def _peft_scale(config: Json, name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for a rank-stabilised LoRA; 1 without a configuration."""
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
    alpha = next(matching, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _unfit(path: Path, homeless: list[str], some_found: bool) -> ConsistoryError:
    for key in homeless:
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                return ConsistoryError(f"{path} is {kind} (it holds {key}): give a plain LoRA of SDXL")
    if some_found:
        keys = f"{path} holds keys that have no place in this model ({listed(homeless)})"
        return ConsistoryError(f"{keys}: give an unmodified LoRA of SDXL")
    return ConsistoryError(f"{path} is no LoRA of this model (it holds {listed(homeless) or 'nothing'}): give one")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
