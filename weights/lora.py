"""LoRA files and their relatives (LoHa, LoKr, DoRA): changes of a checkpoint's weights, made as these are read.

    read(path, weight, parts) -> LoRA     opens a file and finds the parameter that each of its tensors belongs to
    merge(parts, loras) -> parts          the components, with  W + weight * (alpha / rank) * up @ down  in place of W,
                                          or what stands for up @ down in other files, see `deltas`

Nothing is added before a parameter is asked for, so no second copy of the model is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from consistory.weights import deltas, names
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import Component, Read, TensorSource, is_finite, listed, open_safetensors
from consistory.weights.names import Json

logger = logging.getLogger(__name__)

BUNDLED = "bundle_emb."  # learned words that some trainers keep in the same file

# A module in LoRA files. name: the library's own; other: in another layout (the original UNet's, or that of a text
# encoder that transformers 5 saved); old: how diffusers first called attention's projections. Kohya's scripts, and
# LyCORIS without them, put underscores for dots.
TEMPLATES = {
    "unet": (
        "lora_unet_{flat_name}", "lora_unet_{flat_other}", "unet.{name}", "unet.{old}", "{name}", "{old}",
        "diffusion_model.{other}", "lycoris_{flat_name}",
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
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",  # diffusers, text encoders
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # diffusers at first
    ".lora_magnitude_vector": "row norms", ".lora_magnitude_vector.weight": "row norms",  # peft, DoRA
    **{f".{factor}": factor for factor in deltas.FACTORS if "_" in factor}, ".dora_scale": "norms",  # LyCORIS
    ".diff": "diff", ".w_norm": "diff", ".diff_b": "bias", ".b_norm": "bias",  # LyCORIS, whole differences
}  # fmt: skip

# What else a file may be (regular expressions for a part of a key that has no place), and what to say.
OTHER_KINDS = {
    r"\.oft_|\.boft_": "an OFT",
    r"\.wd_for_diff": "a DoRA of differences",
    r"lora_te_": "a LoRA of Stable Diffusion 1 or 2",
    r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]attentions": "a LoRA of Stable Diffusion 1 or 2",
    r"^transformer\.|double_blocks|joint_blocks|lora_transformer": "a LoRA of a diffusion transformer",
}


@dataclass(frozen=True)
class Update:
    """What a LoRA does to one parameter W: it adds weight * scale * change; with norms, it goes `weight` of the way
    from W to W + scale * change with those norms.

    label: of the module in its file, for messages.  factors: to read, by name, for `kind`.
    norms: to read; of W's columns if they are [1, columns, ...], else of its rows.
    """

    label: str
    weight: float
    scale: float
    kind: deltas.Kind
    factors: Mapping[str, Read]
    norms: Read | None = None

    def added_to(self, total: Tensor, parameter: Tensor) -> Tensor:
        """total + what it does to the parameter, both in float32; total may hold what other LoRAs do to it already.

        Raises ConsistoryError if it does not fit the parameter or is not finite.
        """
        factors = {name: self._read(read) for name, read in self.factors.items()}
        try:
            change = self.kind.make(**factors)
        except (IndexError, RuntimeError):
            held = ", ".join(f"{name} {list(x.shape)}" for name, x in factors.items())
            raise ConsistoryError(
                f"{self.label} holds factors that cannot be multiplied ({held}): download it again"
            ) from None
        rows = parameter.reshape(len(parameter), -1)
        if change.shape != rows.shape:
            raise self._misfit(*(" x ".join(map(str, x.shape)) for x in (change, rows)))
        change = change.reshape(parameter.shape)
        if self.norms is None:
            return torch.add(total, change, alpha=self.weight * self.scale)
        norms = self._read(self.norms)
        axis = 1 if norms.dim() > 1 and len(norms) < norms.numel() else 0
        wanted = parameter.shape[axis] if axis < parameter.dim() else 0
        if norms.numel() != wanted:
            raise self._misfit(f"{norms.numel()} norms", str(wanted))
        moved = deltas.renormalised(parameter + self.scale * change, norms, axis)
        return torch.add(total, moved - parameter, alpha=self.weight)

    def _read(self, read: Read) -> Tensor:
        factor = read()
        if factor.numel() and not is_finite(factor):
            raise ConsistoryError(f"{self.label} holds NaN or infinity: download the LoRA again")
        return factor.float()

    def _misfit(self, found: str, wanted: str) -> ConsistoryError:
        return ConsistoryError(
            f"{self.label} is {found}, not {wanted}, so made for another model: give a LoRA for this one"
        )


@dataclass(frozen=True)
class LoRA:
    """A LoRA file as it was given, a digest of its content, and {component: {parameter: what it does to it}}."""

    path: Path
    weight: float
    digest: str
    updates: Mapping[str, Mapping[str, Update]]

    def merged(self) -> Merged:
        changed = {part: frozenset(updates) for part, updates in self.updates.items()}
        return Merged(self.path, self.weight, self.digest, changed)


@dataclass(frozen=True)
class Merged:
    """What is known of a LoRA once it is merged. changed: {component: names of the parameters}."""

    path: Path
    weight: float
    digest: str
    changed: Mapping[str, frozenset[str]]


def read(path: Path, weight: float, parts: Mapping[str, Component]) -> LoRA:
    """Find a place in the components for everything in a LoRA file, whose changes are multiplied by `weight`.

    Raises ConsistoryError if the file is missing, damaged, pickled or of another kind or model, and for any key that
    has no place.
    """
    file = open_safetensors(path)
    configs = {part: _peft_config(path, file.metadata(), part) for part in TEMPLATES}
    updates: dict[str, dict[str, Update]] = {part: {} for part in TEMPLATES}
    own = [key for key in file.keys() if not key.startswith(BUNDLED)]  # noqa: SIM118
    if len(own) < len(file.keys()):
        logger.warning("%s brings words for prompts, too, which take an --embedding %s:WORD (Word.load)", path, path)
    for (part, name), keys in _places(path, own, parts).items():
        label = f"{path}: {_split(next(iter(keys.values())))[0]}"
        reads = {role: partial(file.get_tensor, key) for role, key in keys.items()}
        if "bias" in keys:
            if f"{name}.bias" not in parts[part][1].tensors:
                raise ConsistoryError(f"{label} changes a bias that this model lacks: give a LoRA for this one")
            updates[part][f"{name}.bias"] = Update(label, weight, 1.0, deltas.DIFFERENCE, {"diff": reads["bias"]})
        if keys.keys() != {"bias"}:
            factors = {role: reads[role] for role in keys if role in deltas.FACTORS}
            kind = _kind(path, factors.keys(), keys)
            ranked = next((keys[factor] for factor in kind.ranked if factor in keys), None)
            rank = None if ranked is None else _rank(label, file.get_slice(ranked).get_shape())
            scale = 1.0 if rank is None else _scale(label, rank, reads.get("alpha"), configs[part], name)
            norms = partial(_flattened, reads["row norms"]) if "row norms" in keys else reads.get("norms")
            updates[part][f"{name}.weight"] = Update(label, weight, scale, kind, factors, norms)
    return LoRA(path, weight, _digest(path), updates)


def _flattened(read: Read) -> Tensor:
    return read().flatten()


def merge(parts: Mapping[str, Component], loras: Iterable[LoRA]) -> dict[str, Component]:
    """The components with all LoRAs' changes, each made when its parameter is read.

    Every LoRA changes the checkpoint's own weights, so that their order does not matter.
    """
    merged, loras = dict(parts), list(loras)
    for part in TEMPLATES:
        config, source = merged[part]
        updates: dict[str, list[Update]] = {}
        for lora in loras:
            for name, update in lora.updates[part].items():
                updates.setdefault(name, []).append(update)
        changed = {name: partial(_read_changed, source.tensors[name], each) for name, each in updates.items()}
        merged[part] = config, replace(source, tensors={**source.tensors, **changed})
    return merged


def _read_changed(read: Read, updates: Sequence[Update]) -> Tensor:
    """In float32."""
    parameter = total = read().float()
    for update in updates:
        total = update.added_to(total, parameter)
    return total


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


def _kind(path: Path, factors: Collection[str], keys: Mapping[str, str]) -> deltas.Kind:
    """What a module's factors make. Raises ConsistoryError if they make nothing whole."""
    for kind in deltas.KINDS:
        if frozenset(factors) in kind.whole:
            return kind
    raise ConsistoryError(f"{path} is incomplete (of a module, it has only {listed(keys.values())}): download it again")


def _rank(label: str, shape: list[int]) -> int:
    """The first axis of a factor. Raises ConsistoryError if there is none."""
    if not shape or shape[0] == 0:
        raise ConsistoryError(f"{label} holds factors that cannot be multiplied (one of {shape}): download it again")
    return shape[0]


def _scale(label: str, rank: int, read_alpha: Read | None, config: Json, name: str) -> float:
    """alpha / rank with the file's own alpha, else as peft's configuration has it.

    Raises ConsistoryError unless the alpha is one number.
    """
    if read_alpha is None:
        return _peft_scale(config, name, rank)
    alpha = read_alpha()
    if alpha.numel() != 1 or not is_finite(alpha):
        raise ConsistoryError(f"{label} has an alpha that is not one number: download it again")
    return float(alpha.item()) / rank


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
                return ConsistoryError(f"{path} is {kind} (it holds {key}): give a plain SDXL LoRA")
    if some_found:
        keys = f"{path} holds keys that have no place in this model ({listed(homeless)})"
        return ConsistoryError(f"{keys}: give an unmodified SDXL LoRA")
    return ConsistoryError(f"{path} is not a LoRA for this model (it holds {listed(homeless) or 'nothing'}): give one")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
