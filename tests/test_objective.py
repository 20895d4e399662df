"""Predictions are invertible mixtures of x and eps, and loss_weight carries squared error from one to another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion.diffusion.objective import (
    PREDICTIONS,
    T_LAWS,
    DiffusionConfig,
    add_noise,
    loss_weight,
    network_input,
    sample_t,
    solve,
    target,
)
from transfusion.diffusion.schedule import SCHEDULES

names = st.sampled_from(sorted(PREDICTIONS))
schedules = st.sampled_from(sorted(SCHEDULES))
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, eps), standard normal, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=dtype).unbind()


@settings(deadline=None)  # nothing here is timed
@given(names, schedules, seeds, st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3))
def test_solve_undoes_target_for_every_image_at_its_own_time(prediction, schedule, seed, times):
    x, eps = draw(seed, 3, 2, 4, 4)
    alpha, sigma = SCHEDULES[schedule](torch.tensor(times, dtype=x.dtype).view(3, 1, 1, 1))
    z = add_noise(x, eps, alpha, sigma)
    x_back, eps_back = solve(prediction, target(prediction, x, eps, alpha, sigma), z, alpha, sigma)
    torch.testing.assert_close(x_back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_back, eps, rtol=1e-9, atol=1e-9)


@settings(deadline=None)  # nothing here is timed
@given(names, schedules, seeds, st.floats(0.05, 0.95))
def test_solve_undoes_target_in_float32(prediction, schedule, seed, t):
    x, eps = draw(seed, 1, 8, dtype=torch.float32)
    alpha, sigma = SCHEDULES[schedule](torch.tensor(t))
    p = target(prediction, x, eps, alpha, sigma)
    x_back, eps_back = solve(prediction, p, add_noise(x, eps, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(x_back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eps_back, eps, rtol=1e-4, atol=1e-4)


@settings(deadline=None)  # nothing here is timed
@given(names, schedules, seeds, st.floats(0.001, 0.999))
def test_any_output_splits_z_into_parts_that_add_up_to_z(prediction, schedule, seed, t):
    z, output = draw(seed, 2, 8)  # an output that no x and eps of ours produced
    alpha, sigma = SCHEDULES[schedule](torch.tensor(t, dtype=z.dtype))
    x, eps = solve(prediction, output, z, alpha, sigma)
    torch.testing.assert_close(add_noise(x, eps, alpha, sigma), z)
    torch.testing.assert_close(target(prediction, x, eps, alpha, sigma), output)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_solve_is_finite_at_both_ends_and_keeps_the_half_that_is_stated(prediction, schedule):
    (z, output), t = draw(0, 2, 8, dtype=torch.float32), torch.tensor([[0.0], [1.0]])
    x, eps = solve(prediction, output, z, *SCHEDULES[schedule](t))
    assert x.isfinite().all() and eps.isfinite().all()
    if prediction == "eps":
        torch.testing.assert_close(eps, output)
    if prediction == "x0":
        torch.testing.assert_close(x, output)


@settings(deadline=None)  # nothing here is timed
@given(names, names, schedules, seeds, st.floats(0.06, 0.94))
def test_loss_weight_turns_error_in_one_space_into_error_in_another(prediction, loss_space, schedule, seed, t):
    x, eps = draw(seed, 2, 16)
    output, _ = draw(seed + 1, 2, 16)
    alpha, sigma = SCHEDULES[schedule](torch.tensor(t, dtype=x.dtype))
    z = add_noise(x, eps, alpha, sigma)
    error = (output - target(prediction, x, eps, alpha, sigma)).square().mean()
    carried = target(loss_space, *solve(prediction, output, z, alpha, sigma), alpha, sigma)  # the output, said in q
    direct = (carried - target(loss_space, x, eps, alpha, sigma)).square().mean()
    torch.testing.assert_close(loss_weight(prediction, loss_space, alpha, sigma) * error, direct)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_in_the_predictions_own_space_has_weight_one_even_below_the_floor(prediction):
    alpha, sigma = SCHEDULES["cosine"](torch.tensor([0.0, 0.5, 1.0]))
    for loss_space in ("", prediction):
        assert loss_weight(prediction, loss_space, alpha, sigma).tolist() == [1, 1, 1]


def test_x_prediction_with_flow_loss_is_weighted_as_in_jit():
    alpha, sigma = SCHEDULES["linear"](torch.tensor([0.0, 0.01, 0.05, 0.5, 1.0]))
    weight = loss_weight("x0", "flow", alpha, sigma, floor=0.05)
    torch.testing.assert_close(weight, torch.tensor([400.0, 400.0, 400.0, 4.0, 1.0]))


def test_logit_normal_times_have_the_moments_asked_for():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.logit(sample_t(u, "logit_normal", mean=-0.4, std=1.5))
    assert logits.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.5, abs=2e-3)


@settings(deadline=None)  # nothing here is timed
@given(st.sampled_from(sorted(T_LAWS)), st.floats(0.1, 10), st.lists(st.floats(0, 1, exclude_max=True, width=32)))
def test_times_stay_in_the_unit_interval_and_keep_the_order_of_u(law, shift, u):
    u = torch.tensor(sorted(u), dtype=torch.float64)
    t = sample_t(u, law, shift)
    assert ((t >= 0) & (t <= 1)).all()
    assert (t.diff() > -1e-12).all()


def test_uniform_times_are_u_itself_and_a_shift_moves_them_towards_noise():
    u = torch.tensor([0.0, 0.25, 0.5])
    assert sample_t(u).tolist() == u.tolist()
    torch.testing.assert_close(sample_t(u, shift=3.0), torch.tensor([0, 0.5, 0.75]))


@pytest.mark.parametrize(
    "wrong, remedy",
    [
        ({"schedule": "sine"}, "'cosine', 'linear'"),
        ({"prediction": "epsilon"}, "'eps', 'flow', 'v', 'x0'"),
        ({"loss_space": "x"}, "'eps', 'flow', 'v', 'x0'"),
        ({"t_law": "normal"}, "'logit_normal', 'uniform'"),
        ({"t_shift": 0.0}, "above 0"),
        ({"t_std": -1.0}, "above 0"),
        ({"det_floor": 0.0}, "above 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_choices(wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        DiffusionConfig(**wrong)


def test_the_default_config_is_the_papers():
    config = DiffusionConfig()
    assert (config.schedule, config.prediction, config.t_law, config.t_shift) == ("cosine", "eps", "uniform", 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
def test_the_network_reads_the_least_squares_estimate_of_x(schedule, t):
    x, eps = draw(0, 200_000)
    x, variance = 0.6 * x, 0.36
    alpha, sigma = SCHEDULES[schedule](torch.tensor(t, dtype=x.dtype))
    z = add_noise(x, eps, alpha, sigma)
    best = (z @ x) / (z @ z)  # the c of the smallest |x - c z|^2
    torch.testing.assert_close(network_input(z, alpha, sigma, variance), best * z, rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_network_reads_z_itself_without_a_variance_and_a_clean_image_as_it_is(schedule):
    z, _ = draw(0, 100)
    alpha, sigma = SCHEDULES[schedule](torch.tensor(0.5))
    assert network_input(z, alpha, sigma, 0.0) is z
    assert torch.equal(network_input(z, *SCHEDULES[schedule](torch.tensor(0.0)), 0.4), z)


def test_a_data_variance_is_refused_where_the_prediction_asks_for_noise():
    with pytest.raises(ValueError, match="with prediction x0 only"):
        DiffusionConfig(prediction="eps", data_variance=0.4)
    with pytest.raises(ValueError, match=r"data_variance = -1\.0"):
        DiffusionConfig(prediction="x0", data_variance=-1.0)
