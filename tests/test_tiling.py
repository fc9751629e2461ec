from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from parity import randn, randomise, relative_error
from torch import Tensor

from consistory import ConsiStory, model
from consistory.config import VAEConfig
from consistory.tiling import pool, statistics, tiled_decode
from consistory.vae import VAE

TOLERANCE = 1e-5
CONFIGS = {
    "sdxl-in-small": VAEConfig(3, 4, (8, 8, 16, 16), blocks=2, groups=4, scaling_factor=1.0),
    "two-levels-one-block": VAEConfig(3, 4, (12, 20), blocks=1, groups=4, scaling_factor=1.0),
    "one-level": VAEConfig(3, 4, (8,), blocks=2, groups=2, scaling_factor=1.0),
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def vae(request: pytest.FixtureRequest) -> VAE:
    vae = VAE(request.param).eval().requires_grad_(False)
    randomise(vae)
    return vae


@torch.no_grad()
@pytest.mark.parametrize("tile", [1, 3, 8, 1000])
@pytest.mark.parametrize("height, width", [(9, 4), (4, 7), (1, 1)])
def test_tiles_give_the_whole_picture(vae: VAE, height: int, width: int, tile: int) -> None:
    """Whatever their height, also where it divides neither the picture nor any map before it."""
    z = randn(1, 4, height, width)
    before, whole = z.clone(), vae.decode(z)
    assert relative_error(tiled_decode(vae, z, tile), whole) <= TOLERANCE
    assert torch.equal(z, before)


@torch.no_grad()
def test_tiles_are_as_precise_as_the_model(vae: VAE) -> None:
    double, z = copy.deepcopy(vae).double(), randn(1, 4, 9, 4).double()
    assert relative_error(tiled_decode(double, z, 3), double.decode(z)) <= 1e-12


@torch.no_grad()
def test_statistics_of_the_whole_count(vae: VAE) -> None:
    """The halves of this picture have little in common: their own statistics would give two others."""
    z = torch.cat([randn(1, 4, 8, 6), 10 + 0.1 * randn(1, 4, 8, 6)], dim=-2)
    whole = vae.decode(z)
    assert relative_error(tiled_decode(vae, z, 8 * vae.config.stride), whole) <= TOLERANCE
    alone = torch.cat([vae.decode(half) for half in z.chunk(2, dim=-2)], dim=-2)
    assert relative_error(alone, whole) > 0.05


def test_statistics_of_unequal_parts_join() -> None:
    norm = torch.nn.GroupNorm(2, 6)
    x = 100 + randn(1, 6, 9, 5)
    x[..., 7:, :] *= 3
    found = pool(statistics(norm, part) for part in x.split([4, 3, 2], dim=-2))
    expected = x.reshape(2, -1)
    torch.testing.assert_close(found.mean, expected.mean(dim=1))
    torch.testing.assert_close(found.var, expected.var(dim=1, correction=0))


@torch.no_grad()
def test_bfloat16_tiles_are_as_good_as_the_whole(vae: VAE) -> None:
    z = randn(1, 4, 8, 6)
    exact = vae.decode(z)
    half = VAE(vae.config).eval()
    half.load_state_dict(vae.state_dict())
    half = half.bfloat16()
    tiled, whole = tiled_decode(half, z.bfloat16(), 4), half.decode(z.bfloat16())
    assert tiled.dtype == torch.bfloat16
    assert relative_error(tiled.float(), exact) <= 2 * relative_error(whole.float(), exact)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents() -> Tensor:
    story = ConsiStory.from_pretrained("sprites")(subject="a cat", settings=["in space", "at home"], steps=6, seed=7)
    return story.latents


@torch.inference_mode()
@pytest.mark.parametrize("tile", [4, 16])
def test_a_picture_of_sprites_has_no_seam(latents: Tensor, tile: int) -> None:
    """Steps from row to row where two tiles meet are those of the whole picture; so is every value."""
    vae = ConsiStory.from_pretrained("sprites").vae
    for z in (latents / vae.config.scaling_factor).split(1):
        whole, tiled = vae.decode(z), tiled_decode(vae, z, tile)
        assert (tiled - whole).abs().max() * 127.5 <= 0.01
        for step in (tiled.diff(dim=-2) - whole.diff(dim=-2)).abs()[..., tile - 1 :: tile, :].unbind(-2):
            assert step.max() * 127.5 <= 0.01


def test_large_pictures_are_decoded_in_tiles_and_any_on_request(
    latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = []
    monkeypatch.setattr(
        model, "tiled_decode", lambda vae, z, tile: tiles.append((tuple(z.shape), tile)) or tiled_decode(vae, z, tile)
    )
    pipe = ConsiStory.from_pretrained("sprites")
    whole = pipe.decode(latents)
    assert tiles == []
    forced = ConsiStory.from_pretrained("sprites", tile=8).decode(latents)
    assert tiles == [((1, 4, 32, 32), 8)] * 2
    tiles.clear()
    monkeypatch.setattr(model, "WHOLE_PIXELS", 64 * 64 - 1)
    large = pipe.decode(latents)
    assert tiles == [((1, 4, 32, 32), model.TILE)] * 2
    for other in (forced, large):
        assert abs(other.astype(int) - whole).max() <= 1
    assert model.TILE < 1024


@torch.no_grad()
def test_tiles_take_less_memory(vae: VAE, tmp_path: Path) -> None:
    """The largest tensor that is made is the one map between two blocks."""
    if len(vae.config.widths) < 2:
        pytest.skip("one level: all maps are of one size")
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            largest[-1] = max(largest[-1], *(x.numel() for x in [result] if isinstance(x, Tensor)), 0)
            return result

    z = randn(1, 4, 16, 16)
    for decode in (vae.decode, lambda z: tiled_decode(vae, z, 4)):
        largest.append(0)
        with Watch():
            decode(z)
    side = 16 * vae.config.stride
    assert largest[0] >= vae.config.widths[1] * side * side
    assert largest[1] <= vae.config.widths[0] * side * side
