"""Two names for every tensor: the modules', which are diffusers' and transformers', and the original single file's.

A table is a list of `Rename`s, one for each module that the layouts name differently, made from the component's
`config.json`. It can be read in both directions; loading needs original -> modules.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Json = dict[str, Any]
Layout = Callable[[Tensor], Tensor]  # original tensor -> parameter


def same(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    """A projection stored as [in, out]."""
    return x.T


def from_convolution(x: Tensor) -> Tensor:
    """A linear layer stored as a 1x1 convolution: weight [out, in, 1, 1] -> [out, in]; biases stay."""
    return x.flatten(1) if x.dim() > 1 else x


def query_rows(x: Tensor) -> Tensor:
    """The query's part of a fused projection [3 * width, ...]."""
    return x.tensor_split(3)[0]


def key_rows(x: Tensor) -> Tensor:
    return x.tensor_split(3)[1]


def value_rows(x: Tensor) -> Tensor:
    return x.tensor_split(3)[2]


@dataclass(frozen=True)
class Rename:
    """A module, or a single parameter, under both names; whatever stands below it is named alike in both layouts."""

    name: str
    original: str
    layout: Layout = same


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_CODER = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.0.conv_shortcut": "mid.block_1.nin_shortcut",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.resnets.1.conv_shortcut": "mid.block_2.nin_shortcut",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_FUSED = {"q_proj": query_rows, "k_proj": key_rows, "v_proj": value_rows}


def unet_table(config: Json) -> Iterator[Rename]:
    """Original blocks are numbered through: input_blocks.n.0 is a residual block or downsampler, .1 its transformer."""
    yield from _under("", "", UNET_ENDS)
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    n = 1
    for level, kind in enumerate(config["down_block_types"]):
        for block in range(blocks):
            yield from _under(f"down_blocks.{level}.resnets.{block}.", f"input_blocks.{n}.0.", RESNET)
            if kind == "CrossAttnDownBlock2D":
                yield Rename(f"down_blocks.{level}.attentions.{block}", f"input_blocks.{n}.1")
            n += 1
        if level < levels - 1:
            yield Rename(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{n}.0.op")
            n += 1
    yield from _under("mid_block.resnets.0.", "middle_block.0.", RESNET)
    yield Rename("mid_block.attentions.0", "middle_block.1")
    yield from _under("mid_block.resnets.1.", "middle_block.2.", RESNET)
    n = 0
    for level, kind in enumerate(config["up_block_types"]):
        attends = kind == "CrossAttnUpBlock2D"
        for block in range(blocks + 1):
            yield from _under(f"up_blocks.{level}.resnets.{block}.", f"output_blocks.{n}.0.", RESNET)
            if attends:
                yield Rename(f"up_blocks.{level}.attentions.{block}", f"output_blocks.{n}.1")
            n += 1
        if level < levels - 1:
            yield Rename(f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{n - 1}.{2 if attends else 1}.conv")


# A ControlNet's `config.json` where it differs from the UNet's.
SDXL_CONTROLNET: Json = {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}


def controlnet_table(config: Json) -> Iterator[Rename]:
    """The UNet's first half, a zero convolution for every input block, and the hint's convolutions at even numbers."""
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    yield from unet_table({**config, "up_block_types": []})
    for n in range(levels * (blocks + 1)):
        yield Rename(f"controlnet_down_blocks.{n}", f"zero_convs.{n}.0")
    yield Rename("controlnet_mid_block", "middle_block_out.0")
    hint, inner = "controlnet_cond_embedding", 2 * len(config["conditioning_embedding_out_channels"]) - 2
    yield Rename(f"{hint}.conv_in", "input_hint_block.0")
    for n in range(inner):
        yield Rename(f"{hint}.blocks.{n}", f"input_hint_block.{2 * (n + 1)}")
    yield Rename(f"{hint}.conv_out", f"input_hint_block.{2 * (inner + 1)}")


def attended_as_stored(config: Json, names: Collection[str]) -> Json:
    """A ControlNet's configuration with attention only where there are parameters of it: small ones leave some out."""
    levels = range(len(config["block_out_channels"]))

    def depth(module: str) -> int:
        """Transformer blocks in an attention module, or -1 if it is not there."""
        below = [name.removeprefix(module).split(".") for name in names if name.startswith(module)]
        return max((int(rest[1]) + 1 if rest[0] == "transformer_blocks" else 0 for rest in below), default=-1)

    depths = [depth(f"down_blocks.{level}.attentions.0.") for level in levels]
    middle = depth("mid_block.attentions.0.")
    return {
        **config,
        "down_block_types": ["DownBlock2D" if d < 0 else "CrossAttnDownBlock2D" for d in depths],
        "mid_block_type": "UNetMidBlock2D" if middle < 0 else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [max(0, d) for d in [*depths[:-1], max(depths[-1], middle)]],
    }


def vae_table(config: Json) -> Iterator[Rename]:
    """Original levels are numbered by resolution, finest first, in the decoder too."""
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    yield from _under("", "", {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})
    for coder in ("encoder", "decoder"):
        yield from _under(f"{coder}.", f"{coder}.", VAE_CODER)
        for name, original in VAE_ATTENTION.items():
            attention, original_attention = f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1"
            yield Rename(f"{attention}.{name}", f"{original_attention}.{original}", from_convolution)
    for level in range(levels):
        mirrored = levels - 1 - level
        yield from _vae_blocks(f"encoder.down_blocks.{level}", f"encoder.down.{level}", blocks)
        yield from _vae_blocks(f"decoder.up_blocks.{level}", f"decoder.up.{mirrored}", blocks + 1)
        if level < levels - 1:
            yield Rename(f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv")
            yield Rename(f"decoder.up_blocks.{level}.upsamplers.0.conv", f"decoder.up.{mirrored}.upsample.conv")


def _vae_blocks(name: str, original: str, blocks: int) -> Iterator[Rename]:
    for block in range(blocks):
        yield Rename(f"{name}.resnets.{block}", f"{original}.block.{block}")
        yield Rename(f"{name}.resnets.{block}.conv_shortcut", f"{original}.block.{block}.nin_shortcut")


def clip_table(config: Json) -> Iterator[Rename]:
    """The first text encoder is stored under transformers' own names."""
    yield Rename("text_model", "text_model")


def open_clip_table(config: Json) -> Iterator[Rename]:
    yield from _under("", "", OPEN_CLIP_ENDS)
    yield Rename("text_projection.weight", "text_projection.weight")  # in files that diffusers has converted
    yield Rename("text_projection.weight", "text_projection", transposed)
    for layer in range(config["num_hidden_layers"]):
        name, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        yield from _under(f"{name}.", f"{original}.", OPEN_CLIP_LAYER)
        for projection, rows in OPEN_CLIP_FUSED.items():
            for kind in ("weight", "bias"):
                yield Rename(f"{name}.self_attn.{projection}.{kind}", f"{original}.attn.in_proj_{kind}", rows)


@dataclass(frozen=True)
class SingleFilePart:
    """A component within a single file: the prefix of its keys and the table of what follows the prefix."""

    prefix: str
    table: Callable[[Json], Iterator[Rename]]


SINGLE_FILE = {
    "unet": SingleFilePart("model.diffusion_model.", unet_table),
    "vae": SingleFilePart("first_stage_model.", vae_table),
    "text_encoder": SingleFilePart("conditioner.embedders.0.transformer.", clip_table),
    "text_encoder_2": SingleFilePart("conditioner.embedders.1.model.", open_clip_table),
}

# What some files in the folder layout say instead: old diffusers in the VAE's attention, and transformers since version
# 5 in a text encoder without projection.
FOLDER = {
    "unet": [],
    "vae": [
        Rename(f"{coder}.mid_block.attentions.0.{name}", f"{coder}.mid_block.attentions.0.{old}", from_convolution)
        for coder in ("encoder", "decoder")
        for name, old in OLD_VAE_ATTENTION.items()
    ],
    "text_encoder": [Rename(f"text_model.{name}", name) for name in ("embeddings", "encoder", "final_layer_norm")],
    "text_encoder_2": [],
}


def index(table: Iterable[Rename]) -> dict[str, list[Rename]]:
    """A table by original name. Fused tensors have several entries."""
    by_original: dict[str, list[Rename]] = {}
    for rename in table:
        by_original.setdefault(rename.original, []).append(rename)
    return by_original


def parameters_in(key: str, by_original: Mapping[str, list[Rename]]) -> list[tuple[str, Layout]]:
    """The parameters that the original tensor `key` holds, and how; none if the table does not know the key."""
    for stem, rest in _stems(key):
        if stem in by_original:
            return [(rename.name + rest, rename.layout) for rename in by_original[stem]]
    return []


def original_name(name: str, by_name: Mapping[str, Rename]) -> str:
    """A module's name in the original layout, from a table by the modules' names; as it is if the table has none."""
    for stem, rest in _stems(name):
        if stem in by_name:
            return by_name[stem].original + rest
    return name


def _stems(key: str) -> Iterator[tuple[str, str]]:
    """("a.b.c", ""), ("a.b", ".c"), ("a", ".b.c")"""
    end = len(key)
    while end > 0:
        yield key[:end], key[end:]
        end = key.rfind(".", 0, end)


def _under(name: str, original: str, children: Mapping[str, str]) -> Iterator[Rename]:
    for child, original_child in children.items():
        yield Rename(name + child, original + original_child)
