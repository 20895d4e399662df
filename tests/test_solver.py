"""Solvers against closed forms (a point, a Gaussian), against `diffusers`, and against their own batch-mates."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from transfusion.diffusion.guidance import branch_weights, guide, renormalised
from transfusion.diffusion.objective import PREDICTIONS, solve
from transfusion.diffusion.schedule import SCHEDULES, timesteps
from transfusion.diffusion.solver import SOLVERS, ddim, ddpm, denoiser_from, euler, heun, sample

COSINE, LINEAR = SCHEDULES["cosine"], SCHEDULES["linear"]
MEAN, STD = 0.7, 0.4  # of the one-dimensional Gaussian that plays the data


def gaussian_denoiser(schedule, mean=MEAN, std=STD):
    """The perfect denoiser of data ~ N(mean, std^2), the posterior mean of x and eps given z; std = 0 is a point."""

    def denoise(z, t):
        alpha, sigma = schedule(t)
        pull = (z - alpha * mean) / ((alpha * std) ** 2 + sigma**2).clamp(min=1e-12)
        return mean + alpha * std**2 * pull, sigma * pull

    return denoise


def ode_solution(z, t, t_next, schedule):
    """Where the probability flow of that Gaussian carries z: the same quantile of the marginal at t_next."""
    (alpha, sigma), (alpha_next, sigma_next) = schedule(t), schedule(t_next)
    spread, spread_next = ((alpha * STD) ** 2 + sigma**2).sqrt(), ((alpha_next * STD) ** 2 + sigma_next**2).sqrt()
    return alpha_next * MEAN + spread_next * (z - alpha * MEAN) / spread


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- a point: what each step must do exactly


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_one_step_into_t_0_returns_the_denoised_x_from_any_time(solver, schedule):
    t = torch.tensor([[0.0], [0.3], [1.0]])
    z_next = solver(noise(3, 4), t, torch.zeros(3, 1), gaussian_denoiser(schedule), schedule, noise(3, 4, seed=1))
    torch.testing.assert_close(z_next, gaussian_denoiser(schedule)(noise(3, 4), t)[0])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_stays_on_the_line_through_a_point_of_data_at_any_step_size(schedule):
    eps, t, t_next = noise(4, 3), torch.full((4, 1), 0.9), torch.tensor([[0.8], [0.5], [0.1], [0.9]])
    (alpha, sigma), (alpha_next, sigma_next) = schedule(t), schedule(t_next)
    z_next = ddim(alpha * MEAN + sigma * eps, t, t_next, gaussian_denoiser(schedule, std=0.0), schedule, None)
    torch.testing.assert_close(z_next, alpha_next * MEAN + sigma_next * eps)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddpm_keeps_the_marginals_of_a_point_exactly_at_any_step_size(schedule):
    t = torch.tensor([1.0, 0.9, 0.9, 0.5, 0.02], dtype=torch.float64)
    t_next = torch.tensor([0.99, 0.89, 0.1, 0.4, 0.01], dtype=torch.float64)
    (alpha, sigma), (alpha_next, sigma_next) = schedule(t), schedule(t_next)
    denoise = lambda z, t: (torch.full_like(z, MEAN), z)  # noqa: E731 - a point, whatever z; ddpm reads only x
    step = lambda z, n: ddpm(z, t, t_next, denoise, schedule, n)  # noqa: E731
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    # a step is affine in (z, noise): read off its two factors
    of_z, of_noise = step(one, zero) - step(zero, zero), step(zero, one) - step(zero, zero)
    torch.testing.assert_close(step(alpha * MEAN, zero), alpha_next * MEAN)
    torch.testing.assert_close((of_z * sigma) ** 2 + of_noise**2, sigma_next**2, rtol=1e-6, atol=1e-9)


# -- a Gaussian: where the solvers arrive


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_noise_becomes_the_data_distribution(solver, schedule):
    generator = torch.Generator().manual_seed(1)
    draw = lambda z: torch.randn(z.shape, generator=generator)  # noqa: E731
    x = sample(gaussian_denoiser(schedule), noise(20_000, 1), timesteps(200), solver, schedule, draw)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    assert ((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2 == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver, order", [(euler, 1), (ddim, 1), (heun, 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order, schedule):
    # from .99, as cosine's floor on alpha (4.9e-5 instead of 0 at t = 1) would show at last
    z, errors = noise(64, 1, dtype=torch.float64), []
    for n in (40, 80, 160):
        times = torch.linspace(0.99, 0.2, n + 1, dtype=torch.float64)
        arrived = sample(gaussian_denoiser(schedule), z, times, solver, schedule)
        errors.append((arrived - ode_solution(z, times[0], times[-1], schedule)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_heun_is_second_order_down_to_the_data_where_the_schedule_is_linear():
    z = noise(64, 1, dtype=torch.float64)
    exact = ode_solution(z, torch.tensor(1.0).double(), torch.tensor(0.0).double(), LINEAR)
    arrived = (sample(gaussian_denoiser(LINEAR), z, timesteps(n).double(), heun, LINEAR) for n in (32, 64))
    coarse, fine = ((x - exact).abs().max().item() for x in arrived)
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_euler_is_ddim_where_the_schedule_is_linear():
    denoise, z = gaussian_denoiser(LINEAR), noise(8, 4)
    by_euler, by_ddim = (sample(denoise, z, timesteps(10, shift=2.0), solver, LINEAR) for solver in (euler, ddim))
    torch.testing.assert_close(by_euler, by_ddim, rtol=1e-5, atol=1e-5)


# -- the batch: every image at its own step


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_images_at_different_steps_share_a_call_without_touching_each_other(solver, schedule):
    t, t_next = torch.tensor([1.0, 0.5, 0.02, 0.0]), torch.tensor([0.9, 0.25, 0.0, 0.0])  # the last one waits at t = 0
    z, eps, denoise = noise(4, 2, 3, 3), noise(4, 2, 3, 3, seed=1), gaussian_denoiser(schedule)
    shape = (4, 1, 1, 1)
    together = solver(z, t.view(shape), t_next.view(shape), denoise, schedule, eps)
    alone = [solver(z[i], t[i], t_next[i], denoise, schedule, eps[i]) for i in range(4)]
    assert together.isfinite().all()
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_clipped_sample_is_finite_and_bounded_even_for_a_network_that_predicts_rubbish(solver, prediction, schedule):
    denoise = denoiser_from(lambda z, t: 100 * z.sin(), prediction, schedule, clip=3.0)
    x = sample(denoise, noise(4, 5), timesteps(8), solver, schedule, lambda z: noise(*z.shape, seed=2))
    assert x.abs().max() <= 3


def test_a_clip_moves_eps_so_that_the_parts_still_add_up_and_leaves_the_rest_alone():
    z, output, t = noise(3, 50), 2 * noise(3, 50, seed=1), torch.tensor([[0.3], [0.8], [1.0]])
    alpha, sigma = COSINE(t)
    free = denoiser_from(lambda z, t: output, "eps", COSINE)(z, t)
    x, eps = denoiser_from(lambda z, t: output, "eps", COSINE, clip=1.5)(z, t)
    cut = free[0].abs() > 1.5
    assert 0 < cut[:2].float().mean() < 1 and x.abs().max() <= 1.5
    torch.testing.assert_close(alpha * x + sigma * eps, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(x[~cut], free[0][~cut]) and torch.equal(eps[~cut], free[1][~cut])


def test_a_new_schedule_is_one_line_and_runs_in_every_solver():
    trig = lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2))  # noqa: E731
    for solver in SOLVERS.values():
        torch.manual_seed(0)
        x = sample(gaussian_denoiser(trig), noise(5_000, 1), timesteps(100), solver, trig)
        assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
        assert x.std().item() == pytest.approx(STD, abs=0.03)


# -- guidance


def test_guidance_of_one_is_the_condition_and_of_zero_its_absence():
    branches = noise(3, 2, 3)
    cond, seen, uncond = branches
    torch.testing.assert_close(guide(branches, branch_weights(1.0)), cond)
    torch.testing.assert_close(guide(branches, branch_weights(0.0, 0.0)), uncond)
    torch.testing.assert_close(guide(branches, branch_weights(0.0)), seen)
    wanted = uncond + 1.5 * (seen - uncond) + 3 * (cond - seen)
    torch.testing.assert_close(guide(branches, branch_weights(3.0, 1.5)), wanted)
    without_images = torch.stack([cond, uncond, uncond])
    for image in (0.0, 1.0, 2.0):
        torch.testing.assert_close(guide(without_images, branch_weights(3.0, image)), uncond + 3 * (cond - uncond))


def test_renormalising_takes_an_image_down_to_the_norm_of_the_condition_and_never_up():
    image_of = torch.tensor([0, 0, 1, 1, 1])
    cond, guided = noise(5, 4), noise(5, 4, seed=1) * torch.tensor([3, 3, 0.1, 0.1, 0.1])[:, None]
    found = renormalised(guided, cond, image_of, 2)
    torch.testing.assert_close(found[:2].norm(), cond[:2].norm())
    torch.testing.assert_close(found[:2] / guided[:2], (cond[:2].norm() / guided[:2].norm()).expand(2, 4))
    assert torch.equal(found[2:], guided[2:])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_before_and_after_solving_for_x_and_eps(prediction):
    z, cond, uncond = (noise(2, 3, seed=seed, dtype=torch.float64) for seed in range(3))
    parts = COSINE(torch.tensor(0.6, dtype=torch.float64))
    weights = (3.0, -2.0)
    before = solve(prediction, guide(torch.stack([cond, uncond]), weights), z, *parts)
    after = zip(solve(prediction, cond, z, *parts), solve(prediction, uncond, z, *parts))
    for guided, (c, u) in zip(before, after):
        torch.testing.assert_close(guided, guide(torch.stack([c, u]), weights))


# -- diffusers: the same output and noise into both


def foreign(name: str, **options):
    """A scheduler of `diffusers`, whose modules are imported here, on first use."""
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)  # used in its import
        return getattr(diffusers, name)(**options)


THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def foreign_over_our_table(name: str, prediction: str):
    """A discrete scheduler of `diffusers` with trained betas from our cosine schedule."""
    alpha_bar = COSINE(torch.arange(1001, dtype=torch.float64) / 1000)[0] ** 2
    scheduler = foreign(
        name,
        trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).numpy(),
        prediction_type=THEIR_PREDICTION[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
    )
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar[1:], rtol=1e-4, atol=1e-6)
    # the same table before they round it: in float32 their 1 - alpha_bar is left with 3 digits near t = 0
    scheduler.alphas_cumprod = alpha_bar[1:]
    return scheduler


# float32 only to 250 steps: it cannot tell t = .998 from .998 + 3e-8, which alpha near t = 1 shows as 3e-5 at 1000
@pytest.mark.parametrize(
    "n, dtype, tolerance",
    [(20, torch.float32, 1e-5), (250, torch.float32, 1e-5), (250, torch.float64, 1e-8), (1000, torch.float64, 1e-8)],
)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize("name, solver", [("DDIMScheduler", ddim), ("DDPMScheduler", ddpm)])
def test_a_step_equals_that_of_diffusers(name, solver, prediction, n, dtype, tolerance):
    scheduler, times = foreign_over_our_table(name, prediction), torch.linspace(1, 0, n + 1, dtype=dtype)
    scheduler.set_timesteps(n)
    for k in sorted({0, 1, 2, n // 4, n // 2, n - 3, n - 2, n - 1}):
        their_t = int(scheduler.timesteps[k])  # their index 0 is our t = 1/1000
        assert their_t == round(1000 * times[k].item()) - 1
        z, output = (noise(2, 3, 4, 4, seed=seed, dtype=dtype) for seed in (k, k + 5000))
        options = {} if solver is ddim else {"generator": torch.Generator().manual_seed(k + 9000)}
        theirs = scheduler.step(output, their_t, z, **options).prev_sample
        denoise = denoiser_from(lambda z, t, output=output: output, prediction, COSINE)
        ours = solver(z, times[k], times[k + 1], denoise, COSINE, noise(2, 3, 4, 4, seed=k + 9000, dtype=dtype))
        scale = max(1.0, theirs.abs().max().item())  # an eps-prediction at t = 1 is magnified
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_euler_trajectory_equals_the_flow_matching_scheduler_of_diffusers(shift):
    n = 25
    scheduler = foreign("FlowMatchEulerDiscreteScheduler", shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    network = lambda z, t: (3 * z).sin() + t  # noqa: E731
    theirs = ours = noise(2, 3, 4, 4)
    denoise, times = denoiser_from(network, "flow", LINEAR), timesteps(n, shift)
    for k in range(n):
        torch.testing.assert_close(scheduler.timesteps[k] / 1000, times[k], rtol=1e-6, atol=1e-6)
        theirs = scheduler.step(network(theirs, times[k]), scheduler.timesteps[k], theirs).prev_sample
        ours = euler(ours, times[k], times[k + 1], denoise, LINEAR, None)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
