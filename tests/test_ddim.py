from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from parity import randn, relative_error

from consistory import ConsistoryError, ddim
from consistory.config import ScheduleConfig

TOLERANCE = 1e-5


def config_json(**others: Any) -> dict[str, Any]:
    """SDXL's schedule, as its `scheduler_config.json` has it."""
    config = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    return config | others


CONFIGS = {
    "sdxl": config_json(),
    "final-alpha-one": config_json(set_alpha_to_one=True, steps_offset=0),
    "final-alpha-one-offset": config_json(set_alpha_to_one=True),
    "v-prediction": config_json(prediction_type="v_prediction"),
    "zero-terminal-snr": config_json(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "trailing": config_json(timestep_spacing="trailing"),
    "short-and-steep": config_json(num_train_timesteps=300, beta_start=0.002, beta_end=0.05),
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[ScheduleConfig, DDIMScheduler]:
    return ScheduleConfig.from_json(request.param), DDIMScheduler(**request.param)


def test_alpha_bars_equal_diffusers(pair: tuple[ScheduleConfig, DDIMScheduler]) -> None:
    schedule, oracle = pair
    actual = ddim.alpha_bars(schedule)
    assert relative_error(actual, oracle.alphas_cumprod) <= 1e-6
    # relative to each value, too: the last ones are small
    torch.testing.assert_close(actual, oracle.alphas_cumprod, rtol=TOLERANCE, atol=1e-7)  # the very last may be zero


def test_timesteps_equal_diffusers_for_every_count(pair: tuple[ScheduleConfig, DDIMScheduler]) -> None:
    schedule, oracle = pair
    # Not as many steps as the schedule has: with an offset of 1 the first timestep would lie past its end.
    for steps in range(1, schedule.train_steps):
        oracle.set_timesteps(steps)
        timesteps = ddim.timesteps(schedule, steps)
        assert timesteps == oracle.timesteps.tolist()[:steps]  # rounding may give the oracle one more, -1
        assert timesteps[-1] >= 0 and timesteps[0] < schedule.train_steps


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 50, 299])
def test_steps_equal_diffusers(pair: tuple[ScheduleConfig, DDIMScheduler], steps: int) -> None:
    """A whole trajectory, each step from the oracle's own state."""
    schedule, oracle = pair
    oracle.set_timesteps(steps)
    alpha_bars = ddim.alpha_bars(schedule)
    x = randn(2, 4, 6, 5)
    for i, t in enumerate(ddim.timesteps(schedule, steps)):
        eps = randn(2, 4, 6, 5, seed=i + 1)
        expected = oracle.step(eps, t, x, eta=0.0)
        after = ddim.alpha_bar_after(schedule, steps, t)
        actual = ddim.step(x, eps, alpha_bars[t], after, schedule.prediction)
        assert relative_error(actual, expected.prev_sample) <= TOLERANCE
        x0, _ = ddim.predict(x, eps, alpha_bars[t], schedule.prediction)
        assert relative_error(x0, expected.pred_original_sample) <= TOLERANCE
        x = expected.prev_sample


@pytest.mark.parametrize("t", [0, 1, 150, 299])
def test_noise_is_added_as_in_diffusers(pair: tuple[ScheduleConfig, DDIMScheduler], t: int) -> None:
    schedule, oracle = pair
    x0, eps = randn(2, 4, 6, 5), randn(2, 4, 6, 5, seed=1)
    noisy = ddim.add_noise(x0, eps, ddim.alpha_bars(schedule)[t])
    assert relative_error(noisy, oracle.add_noise(x0, eps, torch.tensor([t, t]))) <= TOLERANCE


def test_the_end_of_the_schedule() -> None:
    """SDXL's last step leads to the noise level of t = 0, not to none; a schedule may say otherwise."""
    first = ddim.alpha_bars(ScheduleConfig())[0]
    assert ddim.alpha_bar_after(ScheduleConfig(), 50, 1) == first
    assert first < 1
    assert ddim.alpha_bar_after(ScheduleConfig(final_alpha_one=True), 50, 1) == 1


def test_the_default_schedule_is_sdxls() -> None:
    assert ScheduleConfig.from_json(CONFIGS["sdxl"]) == ScheduleConfig()


def test_a_step_towards_the_same_noise_level_changes_nothing() -> None:
    x, eps = randn(1, 4, 3, 3), randn(1, 4, 3, 3, seed=1)
    level = torch.tensor(0.3)
    torch.testing.assert_close(ddim.step(x, eps, level, level), x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_prediction_tells_signal_and_noise_apart(prediction: str) -> None:
    x0, eps = randn(1, 4, 3, 3), randn(1, 4, 3, 3, seed=1)
    level = torch.tensor(0.3)
    output = eps if prediction == "epsilon" else level.sqrt() * eps - (1 - level).sqrt() * x0
    predicted = ddim.predict(ddim.add_noise(x0, eps, level), output, level, prediction)
    torch.testing.assert_close(predicted, (x0, eps))


def test_pure_noise_is_where_a_zero_terminal_snr_starts() -> None:
    schedule = ScheduleConfig.from_json(CONFIGS["zero-terminal-snr"])
    assert ddim.alpha_bars(schedule)[ddim.timesteps(schedule, 50)[0]] == 0


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_trailing_steps_are_eulers(steps: int) -> None:
    """As distilled checkpoints are sampled: Euler's states are ours over the signal's share. It ends without noise."""
    schedule = ScheduleConfig().spaced("trailing")
    oracle = EulerDiscreteScheduler.from_config(CONFIGS["trailing"])
    oracle.set_timesteps(steps)
    assert ddim.timesteps(schedule, steps) == oracle.timesteps.tolist()
    alpha_bars = ddim.alpha_bars(schedule)
    x = randn(1, 4, 6, 5)
    theirs = x / alpha_bars[999].sqrt()
    for i, t in enumerate(ddim.timesteps(schedule, steps)):
        eps, after = randn(1, 4, 6, 5, seed=i + 1), ddim.alpha_bar_after(schedule, steps, t)
        x = ddim.step(x, eps, alpha_bars[t], after)
        theirs = oracle.step(eps, oracle.timesteps[i], theirs).prev_sample
        assert relative_error(x / after.sqrt(), theirs) <= TOLERANCE


def test_a_spacing_that_cannot_be() -> None:
    assert ScheduleConfig().spaced(None) == ScheduleConfig() == ScheduleConfig().spaced("leading")
    with pytest.raises(ConsistoryError, match="spacing is 'linspace': use"):
        ScheduleConfig().spaced("linspace")
    with pytest.raises(ConsistoryError, match="has to start at pure noise: use trailing"):
        ScheduleConfig.from_json(CONFIGS["zero-terminal-snr"]).spaced("leading")


def test_what_is_null_is_not_set() -> None:
    schedule = ScheduleConfig.from_json(config_json(rescale_betas_zero_snr=None))
    assert (schedule.prediction_name, schedule.zero_terminal_snr, schedule.trailing) == ("epsilon", False, False)


@pytest.mark.parametrize(
    "others", [{"prediction_type": "sample"}, {"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}]
)
def test_a_schedule_of_another_kind_is_an_error(others: dict[str, Any]) -> None:
    with pytest.raises(ConsistoryError, match="schedule"):
        ScheduleConfig.from_json(config_json(**others))


def test_a_schedule_without_betas_is_an_error() -> None:
    """Playground v2.5's."""
    edm = {"_class_name": "EDMDPMSolverMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    with pytest.raises(ConsistoryError, match=r"EDMDPMSolverMultistepScheduler.*no betas"):
        ScheduleConfig.from_json(edm)


def test_equals_the_recorded_schedule(golden: Any) -> None:
    units, _ = golden("algo_units")
    schedule = ScheduleConfig()
    alpha_bars = ddim.alpha_bars(schedule)
    x, eps = units["ddim/sample"], units["ddim/eps"]
    assert relative_error(alpha_bars, units["ddim/alphas_cumprod"]) <= 1e-6
    assert relative_error(ddim.add_noise(x, eps, alpha_bars[261]), units["ddim/add_noise_t261"]) <= TOLERANCE
    for steps in (10, 19, 30, 50):
        assert ddim.timesteps(schedule, steps) == units[f"ddim/timesteps{steps}"].tolist()
    for steps, i in [(n, i) for n in (10, 30, 50) for i in (0, n // 2, n - 1)]:
        t = ddim.timesteps(schedule, steps)[i]
        after = ddim.alpha_bar_after(schedule, steps, t)
        name = f"ddim/step_n{steps}_i{i}"
        assert relative_error(ddim.step(x, eps, alpha_bars[t], after), units[f"{name}_prev"]) <= TOLERANCE
        assert relative_error(ddim.predict(x, eps, alpha_bars[t])[0], units[f"{name}_x0"]) <= TOLERANCE
