from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from parity import randn, randomise, recorded_module, relative_error

from consistory.config import VAEConfig
from consistory.vae import VAE

TOLERANCE = 1e-5


def config_json(widths: list[int], **others: Any) -> dict[str, Any]:
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
    }
    return config | others


CONFIGS = {
    "sdxl-in-small": config_json([8, 8, 16, 16]),
    "three-levels-one-block": config_json([16, 8, 32], layers_per_block=1, norm_num_groups=8),
    "two-levels-three-blocks": config_json([12, 20], layers_per_block=3, latent_channels=3),
    "one-level": config_json([8], norm_num_groups=2),
}


def build(config: dict[str, Any], gain: float = 1.0) -> tuple[VAE, AutoencoderKL]:
    """Ours and diffusers', with the same random weights."""
    oracle = AutoencoderKL(**config).eval()
    randomise(oracle, gain=gain)
    vae = VAE(VAEConfig.from_json(config)).eval()
    vae.load_state_dict(oracle.state_dict())
    return vae, oracle


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[VAE, AutoencoderKL]:
    return build(request.param)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(16, 16), (24, 40), (27, 19)])
def test_encode_equals_diffusers(pair: tuple[VAE, AutoencoderKL], height: int, width: int) -> None:
    """Odd sizes too: they tell padding on the right and the bottom from padding all round."""
    vae, oracle = pair
    images = randn(2, 3, height, width).clamp(-1, 1)
    mean, logvar = vae.encode(images)
    expected = oracle.encode(images).latent_dist
    assert relative_error(mean, expected.mean) <= TOLERANCE
    assert relative_error(logvar, expected.logvar) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(4, 4), (3, 7)])
def test_decode_equals_diffusers(pair: tuple[VAE, AutoencoderKL], height: int, width: int) -> None:
    vae, oracle = pair
    z = randn(2, vae.config.latent_channels, height, width)
    images = vae.decode(z)
    assert images.shape == (2, 3, vae.config.stride * height, vae.config.stride * width)
    assert relative_error(images, oracle.decode(z).sample) <= TOLERANCE
    assert relative_error(vae.decode(z.flip(-1)), images) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers_on_faint_activations(name: str) -> None:
    """Where the epsilon of every norm counts."""
    vae, oracle = build(CONFIGS[name], gain=0.03)
    images, z = randn(1, 3, 16, 24), randn(1, vae.config.latent_channels, 4, 6)
    assert relative_error(vae.encode(images)[0], oracle.encode(images).latent_dist.mean) <= TOLERANCE
    assert relative_error(vae.decode(z), oracle.decode(z).sample) <= TOLERANCE


@torch.no_grad()
def test_log_variance_is_bounded_as_in_diffusers(pair: tuple[VAE, AutoencoderKL]) -> None:
    vae, oracle = pair
    images = randn(1, 3, 16, 16)
    c = vae.config.latent_channels
    for bias, bound in ((100.0, 20.0), (-100.0, -30.0)):
        for module in (vae, oracle):
            torch.nn.init.constant_(module.quant_conv.bias[c:], bias)
        _, logvar = vae.encode(images)
        assert logvar.unique().tolist() == [bound]
        assert torch.equal(logvar, oracle.encode(images).latent_dist.logvar)


@torch.no_grad()
def test_equals_the_recorded_vae(golden: Any, golden_weights: Path) -> None:
    units, _ = golden("model_units")
    vae = recorded_module(VAE, VAEConfig, golden_weights / "vae")
    mean, logvar = vae.encode(units["vae/image"])
    assert relative_error(mean, units["vae/enc_mean"]) <= TOLERANCE
    assert relative_error(logvar, units["vae/enc_logvar"]) <= TOLERANCE
    assert relative_error(vae.decode(units["vae/z"] / vae.config.scaling_factor), units["vae/dec"]) <= TOLERANCE
