"""The network: residuals equal diffusers', and so does a UNet that takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from parity import randn, randomise, relative_error
from test_unet import SDXL_IN_SMALL, TOLERANCE, config_json
from test_unet import build as build_unet
from torch import Tensor

from consistory.attention import AttentionControl
from consistory.config import ControlNetConfig, FreeU
from consistory.controlnet import ControlNet, Residuals, add_residuals
from consistory.unet import Conditioning

DECODER_ONLY = ("out_channels", "sample_size", "up_block_types")


@dataclass(frozen=True)
class Case:
    name: str
    unet: dict[str, Any]
    own: dict[str, Any]  # what the ControlNet's configuration has besides, or instead
    size: tuple[int, int]  # of the latents
    batch: int

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.unet.items() if key not in DECODER_ONLY} | self.own

    @property
    def stride(self) -> int:
        return 2 ** (len(self.own["conditioning_embedding_out_channels"]) - 1)


CASES = [
    Case("sdxl-in-small", SDXL_IN_SMALL, {"conditioning_embedding_out_channels": [4, 6, 8, 12]}, (12, 20), 3),
    Case(
        "two-levels-stride-two",
        config_json([8, 24], [True, True], layers_per_block=1, use_linear_projection=False, norm_eps=1e-6),
        {"conditioning_embedding_out_channels": [3, 5]}, (6, 10), 2,
    ),
    Case(
        "four-levels-attention-left-out",  # as in the published small ControlNets of SDXL
        config_json([8, 16, 16, 32], [False, True, True, False], attention_head_dim=[1, 4, 2, 8], norm_num_groups=2),
        {
            "conditioning_embedding_out_channels": [4, 6, 8], "down_block_types": ["DownBlock2D"] * 4,
            "mid_block_type": "UNetMidBlock2D",
        },
        (24, 8), 1,
    ),
    Case(
        "transformers-without-blocks", SDXL_IN_SMALL,
        {"conditioning_embedding_out_channels": [4, 6, 8, 12], "transformer_layers_per_block": [0, 0, 0]}, (8, 12), 2,
    ),
]  # fmt: skip


def build(case: Case) -> tuple[ControlNet, ControlNetModel]:
    """Ours and diffusers', with the same random weights, zero convolutions included."""
    oracle = ControlNetModel(**case.config).eval()
    randomise(oracle, seed=3)
    with torch.no_grad():
        for parameter in oracle.controlnet_cond_embedding.parameters():
            parameter.mul_(2)  # else hints are faint
    net = ControlNet(ControlNetConfig.from_json(dict(oracle.config))).eval()
    net.load_state_dict(oracle.state_dict())
    return net, oracle


def inputs(case: Case) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    """x, timesteps, conditioning, pictures."""
    n, (h, w) = case.batch, case.size
    sizes = torch.tensor([[64.0, 48, 3, 5, 40, 56], [1024, 1024, 0, 0, 1024, 1024], [512, 768, 7, 0, 100, 900]])
    cond = Conditioning(randn(n, 11, 20, seed=1), randn(n, 12, seed=2), sizes[:n])
    pictures = torch.rand(n, 3, case.stride * h, case.stride * w, generator=torch.Generator().manual_seed(4))
    return randn(n, 4, h, w), torch.tensor([981, 261, 1])[:n], cond, pictures


def expected(oracle: ControlNetModel, x: Tensor, t: Tensor, cond: Conditioning, pictures: Tensor) -> Residuals:
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes}
    out = oracle(x, t, encoder_hidden_states=cond.context, controlnet_cond=pictures, added_cond_kwargs=added)
    return Residuals(out.mid_block_res_sample, tuple(out.down_block_res_samples))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_residuals_equal_diffusers(case: Case) -> None:
    net, oracle = build(case)
    x, t, cond, pictures = inputs(case)
    ours, theirs = net(x, t, cond, net.hint(pictures)), expected(oracle, x, t, cond, pictures)
    assert net.stride == case.stride
    for residual, wanted in zip([ours.x, *ours.skips], [theirs.x, *theirs.skips], strict=True):
        assert relative_error(residual, wanted) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("freeu", [None, FreeU(s1=0.9, s2=0.2, b1=1.3, b2=1.6)], ids=["plain", "freeu"])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_a_steered_unet_equals_diffusers(case: Case, freeu: FreeU | None) -> None:
    net, control_oracle = build(case)
    unet, oracle = build_unet(case.unet)
    x, t, cond, pictures = inputs(case)
    given = expected(control_oracle, x, t, cond, pictures)
    if freeu is not None:
        oracle.enable_freeu(**vars(freeu))
    wanted = oracle(
        x, t, encoder_hidden_states=cond.context,
        added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.sizes},
        down_block_additional_residuals=list(given.skips),
        mid_block_additional_residual=given.x,
    ).sample  # fmt: skip
    plain = AttentionControl()
    encoded = unet.encode(x, t, cond, plain)
    steered = add_residuals(encoded, [net(x, t, cond, net.hint(pictures))])
    eps = unet.decode(steered, plain, freeu)
    assert relative_error(eps, wanted) <= TOLERANCE
    assert relative_error(unet.decode(encoded, plain, freeu), wanted) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("changed", ["x", "t", "context", "pooled", "sizes", "picture"])
def test_every_input_matters(changed: str) -> None:
    net, _ = build(CASES[0])
    x, t, cond, pictures = inputs(CASES[0])
    before = net(x, t, cond, net.hint(pictures))
    values = {"context": cond.context, "pooled": cond.pooled, "sizes": cond.sizes} | {"x": x, "picture": pictures}
    if changed == "t":
        t = t // 2
    else:
        values[changed] = 2 * values[changed]
    other = Conditioning(values["context"], values["pooled"], values["sizes"])
    after = net(values["x"], t, other, net.hint(values["picture"]))
    assert relative_error(after.x, before.x) > 0.01


@torch.no_grad()
def test_an_untrained_one_changes_nothing() -> None:
    net = ControlNet(ControlNetConfig.from_json(CASES[0].config)).eval()
    x, t, cond, pictures = inputs(CASES[0])
    residuals = net(x, t, cond, net.hint(pictures))
    assert all(not tensor.any() for tensor in (residuals.x, *residuals.skips))


@torch.no_grad()
def test_keys_of_the_prompt_can_be_made_before() -> None:
    net, _ = build(CASES[0])
    x, t, cond, pictures = inputs(CASES[0])
    assert isinstance(cond.context, Tensor)
    keys = Conditioning(net.prompt_keys(cond.context), cond.pooled, cond.sizes)
    hint = net.hint(pictures)
    assert relative_error(net(x, t, keys, hint).x, net(x, t, cond, hint).x) <= TOLERANCE
