"""Schedules against the discrete table they stand for, and against their own derivatives."""

import math

import pytest
import torch

from transfusion.diffusion.schedule import SCHEDULES, shift_t, timesteps, velocity_coefficients


def discrete_cosine_alpha_bar(n: int = 1000, s: float = 0.008) -> torch.Tensor:
    """alpha_bar [n + 1] as Nichol & Dhariwal build it: a product of clipped betas, in float64."""
    f = [math.cos((k / n + s) / (1 + s) * math.pi / 2) ** 2 for k in range(n + 1)]
    betas = torch.tensor([min(1 - f[k + 1] / f[k], 0.999) for k in range(n)], dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_cosine_is_the_discrete_table_at_every_thousandth(dtype, tolerance):
    table = discrete_cosine_alpha_bar()
    t = torch.arange(1001, dtype=dtype) / 1000
    alpha, sigma = SCHEDULES["cosine"](t)
    assert alpha.dtype == dtype
    torch.testing.assert_close(alpha.double() ** 2, table, rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(sigma.double() ** 2, 1 - table, rtol=tolerance, atol=tolerance**2 + 3e-9)


@pytest.mark.parametrize(
    "t, alpha_bar", [(0.1, 0.972), (0.25, 0.847), (0.5, 0.494), (0.75, 0.144), (0.9, 0.024), (1.0, 2.4e-9)]
)
def test_cosine_has_the_published_values(t, alpha_bar):
    alpha, _ = SCHEDULES["cosine"](torch.tensor(t))
    assert alpha.item() ** 2 == pytest.approx(alpha_bar, rel=0.02, abs=0)
    assert abs(alpha.item() ** 2 - alpha_bar) < 5e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_from_all_data_to_all_noise_without_turning_back(name):
    t = torch.linspace(0, 1, 10_001)
    alpha, sigma = SCHEDULES[name](t)
    rounding = 2e-7
    assert (alpha[0], sigma[0], sigma[-1]) == (1, 0, 1)
    assert 0 <= alpha[-1] < 1e-4
    assert (alpha.diff() <= rounding).all() and (sigma.diff() >= -rounding).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_coefficients_are_the_slopes_of_the_schedule(name):
    schedule, t, h = SCHEDULES[name], torch.linspace(0.01, 0.99, 99, dtype=torch.float64), 1e-6
    slopes = velocity_coefficients(schedule, t)
    for slope, ahead, behind in zip(slopes, schedule(t + h), schedule(t - h)):
        torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_coefficients_are_finite_at_both_ends_and_see_the_data_arrive_at_t_1(name):
    with torch.inference_mode():  # where an engine calls them
        alpha_slope, sigma_slope = velocity_coefficients(SCHEDULES[name], torch.tensor([0.0, 1.0]))
    assert alpha_slope.isfinite().all() and sigma_slope.isfinite().all()
    assert alpha_slope[1] < -0.9  # not the 0 of cosine's floor


def test_timesteps_fall_from_one_to_zero_and_a_shift_keeps_the_ends():
    torch.testing.assert_close(timesteps(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    shifted = timesteps(4, shift=3.0)
    torch.testing.assert_close(shifted, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert (shifted[0], shifted[-1]) == (1, 0)


def test_a_shift_is_undone_by_its_inverse():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_t(shift_t(t, 4.0), 1 / 4.0), t)


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        timesteps(0)
