from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from parity import randn
from torch import Tensor

from consistory import ddim, ddpm
from consistory.config import ScheduleConfig
from consistory.ddpm import Levels

SCHEDULE = ScheduleConfig()
SCHEDULES = {
    "sdxl": SCHEDULE,
    "v": replace(SCHEDULE, prediction="v_prediction"),
    "zero terminal snr": replace(SCHEDULE, prediction="v_prediction", zero_terminal_snr=True, trailing=True),
}
STEPS = 7


def predict(x: Tensor, step: int) -> Tensor:
    """Any function of the latents and the step serves as a model."""
    return (1.5 * x + 0.1 * step).sin() - 0.3 * x.flip(-1)


@pytest.fixture
def x0() -> Tensor:
    return randn(2, 4, 6, 5, seed=1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("i", [0, 3, STEPS - 1])
def test_a_step_is_ddim_with_eta_1(x0: Tensor, prediction: str, i: int) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    output, z = randn(2, 4, 6, 5, seed=2), randn(2, 4, 6, 5, seed=3)
    expected = scheduler.step(output, scheduler.timesteps[i], x0, eta=1.0, variance_noise=z).prev_sample
    new = ddpm.step(x0, output, z, Levels.of(SCHEDULE, STEPS, i), prediction)
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=1e-5)


def test_latents_are_noised_independently_at_every_step(x0: Tensor) -> None:
    x0 = x0[:, :, :1, :1].expand(-1, -1, 40, 40)
    x = ddpm.noised(x0, [3, 4], SCHEDULE, STEPS)
    assert x.shape == (STEPS + 1, *x0.shape) and torch.equal(x[-1], x0)
    bars = ddim.alpha_bars(SCHEDULE)[ddim.timesteps(SCHEDULE, STEPS)]
    eps = (x[:-1] - bars.sqrt().view(-1, 1, 1, 1, 1) * x0) / (1 - bars).sqrt().view(-1, 1, 1, 1, 1)
    correlation = torch.corrcoef(eps.flatten(2).flatten(0, 1))  # of every step and picture with every other
    assert (correlation - torch.eye(2 * STEPS)).abs().max() < 0.06
    assert eps.std() == pytest.approx(1, abs=0.02)


def test_fixed_noise_is_the_same_at_every_step(x0: Tensor) -> None:
    x = ddpm.noised(x0, [3, 4], SCHEDULE, STEPS, fixed=True)
    bars = ddim.alpha_bars(SCHEDULE)[ddim.timesteps(SCHEDULE, STEPS)].view(-1, 1, 1, 1, 1)
    eps = (x[:-1] - bars.sqrt() * x0) / (1 - bars).sqrt()
    torch.testing.assert_close(eps, eps[:1].expand_as(eps), atol=1e-4, rtol=0)


def test_noise_depends_on_a_pictures_own_seed_alone(x0: Tensor) -> None:
    torch.manual_seed(0)
    together = ddpm.noised(x0, [3, 4], SCHEDULE, STEPS)
    torch.manual_seed(1)
    torch.testing.assert_close(ddpm.noised(x0[1:], [4], SCHEDULE, STEPS), together[:, 1:])
    start = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(4))  # what a generated picture starts from
    bar = ddim.alpha_bars(SCHEDULE)[ddim.timesteps(SCHEDULE, STEPS)[0]]
    assert (together[0, 1] - ddim.add_noise(x0[1], start, bar)).abs().max() > 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_maps_reproduce_the_picture(x0: Tensor, name: str) -> None:
    schedule = SCHEDULES[name]
    inversion = ddpm.invert(predict, x0, [3, 4], schedule, STEPS)
    assert len(inversion.maps) == STEPS
    torch.testing.assert_close(inversion.start, ddpm.noised(x0, [3, 4], schedule, STEPS)[0])
    torch.testing.assert_close(ddpm.generate(predict, inversion, schedule, STEPS), x0, atol=1e-4, rtol=0)


def test_noise_maps_are_of_this_model_alone(x0: Tensor) -> None:
    """Under another model, the same maps lead elsewhere: that is what makes edits possible."""
    inversion = ddpm.invert(predict, x0, [3, 4], SCHEDULE, STEPS)
    other = ddpm.generate(lambda x, step: 0.5 * predict(x, step), inversion, SCHEDULE, STEPS)
    assert (other - x0).abs().max() > 0.1


def test_a_step_without_noise_has_no_noise_map(x0: Tensor) -> None:
    """Where a schedule ends at alpha_bar = 1, the last step leads to the model's own prediction."""
    levels = Levels.of(replace(SCHEDULE, final_alpha_one=True), STEPS, STEPS - 1)
    assert levels.sigma == 0
    output = predict(x0, 0)
    z = ddpm.noise_map(x0, output, randn(2, 4, 6, 5, seed=9), levels)
    assert not z.any()
    torch.testing.assert_close(ddpm.step(x0, output, z, levels), ddim.predict(x0, output, levels.alpha_bar)[0])
