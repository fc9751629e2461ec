from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from parity import randn, randomise, recorded_module, relative_error
from torch import Tensor, nn

from consistory.attention import AttentionControl, Site
from consistory.config import FreeU, UNetConfig
from consistory.unet import Conditioning, UNet
from consistory.weights.errors import ConsistoryError

TOLERANCE = 1e-5
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def config_json(widths: list[int], attended: list[bool], **others: Any) -> dict[str, Any]:
    """A `config.json` as diffusers takes and writes it."""
    config = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "down_block_types": [DOWN[a] for a in attended],
        "up_block_types": [UP[a] for a in reversed(attended)],
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 20,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    }
    return config | others


SDXL_IN_SMALL = config_json(
    [16, 32, 48], [False, True, True], transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 2, 3]
)


@dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]
    size: tuple[int, int]  # of the latents
    batch: int


CASES = [
    Case("sdxl-in-small", SDXL_IN_SMALL, size=(12, 20), batch=3),
    Case(
        "two-levels-thin-convolutional-projection",
        config_json([8, 24], [True, True], layers_per_block=1, use_linear_projection=False, norm_eps=1e-6),
        size=(6, 10), batch=2,
    ),
    Case(
        "four-levels-unattended-ends",
        config_json(
            [8, 16, 16, 32], [False, True, True, False],
            transformer_layers_per_block=[1, 3, 1, 2], attention_head_dim=[1, 4, 2, 8], norm_num_groups=2,
        ),
        size=(24, 8), batch=1,
    ),
    Case(
        "one-level-three-blocks",
        config_json(
            [12], [True], layers_per_block=3, attention_head_dim=3, transformer_layers_per_block=2,
            in_channels=5, out_channels=5,
        ),
        size=(7, 5), batch=2,
    ),
]


def build(config: dict[str, Any], gain: float = 1.0) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and diffusers', with the same random weights."""
    oracle = UNet2DConditionModel(**config).eval()
    randomise(oracle, gain=gain)
    unet = UNet(UNetConfig.from_json(config)).eval()
    unet.load_state_dict(oracle.state_dict())
    return unet, oracle


def inputs(case: Case) -> tuple[Tensor, Tensor, Conditioning]:
    """x, timesteps that differ within the batch, conditioning."""
    n = case.batch
    sizes = torch.tensor([[64.0, 48, 3, 5, 40, 56], [1024, 1024, 0, 0, 1024, 1024], [512, 768, 7, 0, 100, 900]])
    cond = Conditioning(randn(n, 11, 20, seed=1), randn(n, 12, seed=2), sizes[:n])
    return randn(n, case.config["in_channels"], *case.size), torch.tensor([981, 261, 1])[:n], cond


def oracle_eps(oracle: UNet2DConditionModel, x: Tensor, t: Tensor | int, cond: Conditioning) -> Tensor:
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes}
    return oracle(x, t, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def pair(case: Case) -> tuple[UNet, UNet2DConditionModel]:
    return build(case.config)


@pytest.fixture(scope="module")
def small() -> tuple[UNet, UNet2DConditionModel]:
    return build(SDXL_IN_SMALL)


SMALL = CASES[0]


@torch.no_grad()
def test_equals_diffusers(case: Case, pair: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, oracle = pair
    x, t, cond = inputs(case)
    assert relative_error(unet(x, t, cond), oracle_eps(oracle, x, t, cond)) <= TOLERANCE


@torch.no_grad()
def test_equals_diffusers_on_faint_activations(case: Case) -> None:
    """Where the epsilon of every norm counts."""
    unet, oracle = build(case.config, gain=0.03)
    x, t, cond = inputs(case)
    assert relative_error(unet(x, t, cond), oracle_eps(oracle, x, t, cond)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("changed", ["x", "t", "context", "pooled", "sizes"])
def test_every_input_matters(case: Case, pair: tuple[UNet, UNet2DConditionModel], changed: str) -> None:
    """So that equal outputs above mean that each input is used, and used alike."""
    unet, _ = pair
    x, t, cond = inputs(case)
    eps = unet(x, t, cond)
    if changed == "x":
        other = unet(x.flip(-1), t, cond)
    elif changed == "t":
        other = unet(x, t // 2, cond)
    else:
        value = getattr(cond, changed)
        swapped = 2 * value if changed == "sizes" else value + randn(*value.shape, seed=7)
        other = unet(x, t, replace(cond, **{changed: swapped}))
    assert relative_error(other, eps) > 0.01


@torch.no_grad()
def test_timestep_is_a_number_or_one_for_each_sample(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, oracle = small
    x, _, cond = inputs(SMALL)
    expected = oracle_eps(oracle, x, 261, cond)
    for t in (261, torch.tensor(261), torch.tensor([261, 261, 261])):
        assert relative_error(unet(x, t, cond), expected) <= TOLERANCE


@torch.no_grad()
def test_samples_do_not_mix(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    eps = unet(x, t, cond)
    for i in range(SMALL.batch):
        row = slice(i, i + 1)
        alone = unet(x[row], t[row], Conditioning(cond.context[row], cond.pooled[row], cond.sizes[row]))
        assert relative_error(alone, eps[row]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 20), (16, 16), (28, 4)], ids=str)
def test_freeu_equals_diffusers(size: tuple[int, int]) -> None:
    unet, oracle = build(SDXL_IN_SMALL)
    x, t, cond = inputs(replace(SMALL, size=size))
    plain = unet(x, t, cond)
    oracle.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.6)
    freeu = unet(x, t, cond, freeu=FreeU(s1=0.9, s2=0.2, b1=1.3, b2=1.6))
    assert relative_error(freeu, oracle_eps(oracle, x, t, cond)) <= TOLERANCE
    assert relative_error(freeu, plain) > 0.01


# --- the control ------------------------------------------------------------------------------------------------------


class Recorder(AttentionControl):
    """Plain SDXL that writes down what it was asked: (kind of call, site, shapes of its tensors)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Site, list[tuple[int, ...]]]] = []
        self.features: list[tuple[int, Tensor]] = []

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.calls.append(("self", site, [tuple(y.shape) for y in (q, k, v)]))
        return super().self_attention(q, k, v, site)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.calls.append(("cross", site, [tuple(y.shape) for y in (q, k, v)]))
        return super().cross_attention(q, k, v, site)

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        self.calls.append(("output", site, [tuple(x.shape)]))
        return super().self_output(x, site)

    def decoder_features(self, x: Tensor, index: int) -> None:
        self.features.append((index, x))


# Encoder: two transformers a level; decoder: three, coarsest level first. Of one block at stride 2, of two at stride 4.
ENCODER = [Site("encoder", i, 2) for i in (0, 1)] + [Site("encoder", i, 4) for i in (2, 3, 4, 5)]
MID = [Site("mid", i, 4) for i in (0, 1)]
DECODER = [Site("decoder", i, 4) for i in (0, 1, 2, 3, 4, 5)] + [Site("decoder", i, 2) for i in (6, 7, 8)]


@torch.no_grad()
def test_control_sees_every_site_once_in_order(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    recorder = Recorder()
    state = unet.encode(x, t, cond, recorder)
    assert [site for kind, site, _ in recorder.calls if kind == "self"] == ENCODER + MID
    recorder.calls.clear()
    unet.decode(state, recorder)
    assert [site for kind, site, _ in recorder.calls if kind == "self"] == DECODER

    recorder = Recorder()
    unet(x, t, cond, recorder)
    expected = [(kind, site) for site in ENCODER + MID + DECODER for kind in ("self", "output", "cross")]
    assert [(kind, site) for kind, site, _ in recorder.calls] == expected


@torch.no_grad()
def test_control_gets_heads_and_patches(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    recorder = Recorder()
    unet(x, t, cond, recorder)
    heads, patches, tokens, batch = {2: 2, 4: 3}, {2: 6 * 10, 4: 3 * 5}, 11, 3
    for kind, site, shapes in recorder.calls:
        h, p = heads[site.stride], patches[site.stride]
        q, kv = (batch, h, p, 16), (batch, h, tokens, 16)
        assert shapes == {"self": [q, q, q], "cross": [q, kv, kv], "output": [(batch, p, 16 * h)]}[kind]


@torch.no_grad()
def test_encode_then_decode_is_one_call(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    control = AttentionControl()
    state = unet.encode(x, t, cond, control)
    freeu = unet.decode(state, control, FreeU())
    assert torch.equal(unet.decode(state, control), unet(x, t, cond))
    assert torch.equal(freeu, unet(x, t, cond, freeu=FreeU()))


class OutputScale(AttentionControl):
    """Scales x_out wherever `chosen` says so."""

    def __init__(self, chosen: Callable[[Site], bool], factor: float) -> None:
        self.chosen, self.factor = chosen, factor

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        return self.factor * x if self.chosen(site) else x


@torch.no_grad()
def test_a_decode_leaves_the_encoded_state_as_it_was(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    plain = AttentionControl()
    state = unet.encode(x, t, cond, plain)
    before = unet.decode(state, plain)
    between = unet.decode(state, OutputScale(lambda site: True, 3.0), FreeU())
    assert torch.equal(unet.decode(state, plain), before)
    assert relative_error(between, before) > 0.01


def without_self_output(unet: UNet, names: list[str]) -> UNet:
    """A copy whose named transformer blocks have a self-attention output projection of zeros."""
    copied = copy.deepcopy(unet)
    for name in names:
        for parameter in copied.get_submodule(name).attn1.to_out.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)
    return copied


@torch.no_grad()
@pytest.mark.parametrize(
    "chosen, names",
    [
        (lambda site: site == Site("decoder", 3, 4), ["up_blocks.0.attentions.1.transformer_blocks.1"]),
        (lambda site: site == Site("encoder", 1, 2), ["down_blocks.1.attentions.1.transformer_blocks.0"]),
        (
            lambda site: site.part == "mid",
            ["mid_block.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.1"],
        ),
    ],
    ids=["decoder-3", "encoder-1", "mid"],
)
def test_self_output_is_between_projection_and_residual(
    small: tuple[UNet, UNet2DConditionModel], chosen: Callable[[Site], bool], names: list[str]
) -> None:
    """A control that returns zeros equals a UNet whose output projections are zero, biases included."""
    unet, _ = small
    x, t, cond = inputs(SMALL)
    eps = unet(x, t, cond, OutputScale(chosen, 0.0))
    assert torch.equal(eps, without_self_output(unet, names)(x, t, cond))
    assert not torch.equal(eps, unet(x, t, cond))


class Keep(AttentionControl):
    """Keeps what one site is given."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.kept: dict[str, Tensor] = {}

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site == self.site:
            self.kept |= {"q": q, "k": k, "v": v}
        return super().self_attention(q, k, v, site)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site == self.site:
            self.kept |= {"cross q": q, "cross k": k, "cross v": v}
        return super().cross_attention(q, k, v, site)

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        if site == self.site:
            self.kept["x_out"] = x
        return x


@torch.no_grad()
def test_control_gets_the_tensors_of_its_site(small: tuple[UNet, UNet2DConditionModel]) -> None:
    """Compared with diffusers' layers. Decoder site 3 is the second block of the coarsest level's second attention."""
    unet, oracle = small
    x, t, cond = inputs(SMALL)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: seen.update({name: output})

    block = oracle.up_blocks[0].attentions[1].transformer_blocks[1]
    layers = {
        "q": block.attn1.to_q, "k": block.attn1.to_k, "v": block.attn1.to_v, "x_out": block.attn1,
        "cross q": block.attn2.to_q, "cross k": block.attn2.to_k, "cross v": block.attn2.to_v,
    }
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    control = Keep(Site("decoder", 3, 4))
    oracle_eps(oracle, x, t, cond)
    unet(x, t, cond, control)
    for hook in hooks:
        hook.remove()
    assert control.kept.keys() == seen.keys()
    for name, actual in control.kept.items():
        flat = actual if name == "x_out" else rearrange(actual, "b h p d -> b p (h d)")
        assert relative_error(flat, seen[name]) <= TOLERANCE, name


@torch.no_grad()
def test_decoder_features_are_the_blocks_outputs(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, oracle = small
    x, t, cond = inputs(SMALL)
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda module, args, output: outputs.append(output)) for b in oracle.up_blocks]
    oracle_eps(oracle, x, t, cond)
    for hook in hooks:
        hook.remove()
    recorder = Recorder()
    unet(x, t, cond, recorder)
    assert [index for index, _ in recorder.features] == [0, 1, 2]
    for (_, features), output in zip(recorder.features, outputs, strict=True):
        assert relative_error(features, output) <= TOLERANCE


@torch.no_grad()
def test_freeu_scales_decoder_features_for_the_next_block(small: tuple[UNet, UNet2DConditionModel]) -> None:
    """The recorded runs took their features where FreeU had scaled half of the channels."""
    unet, _ = small
    freeu, recorder = FreeU(s1=0.6, s2=0.4, b1=1.1, b2=1.2), Recorder()
    state = unet.encode(*inputs(SMALL), AttentionControl())
    output = unet.decode_blocks(1, state, AttentionControl(), freeu)
    unet.decode(state, recorder, freeu)
    half = output.shape[1] // 2
    expected = torch.cat([output[:, :half] * 1.2, output[:, half:]], dim=1)
    torch.testing.assert_close(recorder.features[0][1], expected)


class Explicit(AttentionControl):
    """Attention written out: softmax(q k^T / sqrt(d)) v."""

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

    cross_attention = self_attention


@torch.no_grad()
def test_the_default_control_is_scaled_dot_product_attention(small: tuple[UNet, UNet2DConditionModel]) -> None:
    unet, _ = small
    x, t, cond = inputs(SMALL)
    assert relative_error(unet(x, t, cond, Explicit()), unet(x, t, cond)) <= TOLERANCE


def test_strides_are_those_of_the_attended_levels(case: Case, pair: tuple[UNet, UNet2DConditionModel]) -> None:
    expected = {"sdxl-in-small": (2, 4), "two-levels-thin-convolutional-projection": (1, 2),
                "four-levels-unattended-ends": (2, 4), "one-level-three-blocks": (1,)}
    assert pair[0].strides == expected[case.name]


# --- recorded runs ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("t", [981, 261])
def test_equals_the_recorded_unet(golden: Any, golden_weights: Path, t: int) -> None:
    units, facts = golden("model_units")
    unet = recorded_module(UNet, UNetConfig, golden_weights / "unet")
    cond = Conditioning(units["unet/encoder_hidden_states"], units["unet/text_embeds"], units["unet/time_ids"])
    recorder = Recorder()
    assert relative_error(unet(units["unet/sample"], t, cond, recorder), units[f"unet/out_t{t}"]) <= TOLERANCE
    eps = unet(units["unet/sample"], t, cond, freeu=FreeU(**facts["freeu"]))
    assert relative_error(eps, units[f"unet/out_t{t}_freeu"]) <= TOLERANCE
    if t == 261:  # the DIFT features, recorded in half precision
        expected = units["unet/inter_t261/up0"]
        assert relative_error(recorder.features[0][1][:1], expected.float()) <= 2**-11


def test_levels_that_are_not_uniform_are_refused() -> None:
    """SSD-1B's."""
    config = SDXL_IN_SMALL | {"transformer_layers_per_block": [0, [2, 2], [4, 4]]}
    with pytest.raises(ConsistoryError, match="not uniform within a level"):
        UNetConfig.from_json(config)
