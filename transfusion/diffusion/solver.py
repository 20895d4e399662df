"""Samplers as functions of a denoiser: one step from t to t_next < t, each image at its own times.

    denoise(z, t) -> (x, eps)     the model's guess of the two parts of z, with z = alpha x + sigma eps
    step(z, t, t_next, denoise, schedule, noise) -> z_next

t and t_next broadcast against z (images [I, C, h, w]: [I, 1, 1, 1]; patches [N, P]: [N, 1]), so images at different
steps share one call. Only ddpm reads `noise`. Every step into t_next = 0 returns x: z(0) is x by definition.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .objective import SOLVE_FLOOR, network_input, solve
from .schedule import Schedule, velocity_coefficients

START = 0.999  # where sampling begins if nothing bounds x: at 1 an eps-prediction says nothing of it
Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Solver = Callable[[Tensor, Tensor, Tensor, Denoiser, Schedule, Tensor | None], Tensor]


def denoiser_from(
    predict: Callable[[Tensor, Tensor], Tensor],
    prediction: str,
    schedule: Schedule,
    clip: float | None = None,
    data_variance: float = 0.0,
) -> Denoiser:
    """The denoiser of a network `predict(network_input(z), t) -> p`.

    `clip` bounds |x| and moves eps so that z = alpha x + sigma eps.

    At t = 1 an eps-prediction says nothing about x (cosine: x = (z - eps) / 4.9e-5), and every solver's first step from
    there hands on the network's error alpha(t_next) / 4.9e-5 times: 126-fold at 250 steps. Clip, or begin a little
    later, where z is noise all the same: timesteps(n).clamp(max=0.999) makes that 4-fold.
    """

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule(t)
        p = predict(network_input(z, alpha, sigma, data_variance), t)
        x, eps = solve(prediction, p, z, alpha, sigma)
        if clip is None:
            return x, eps
        clipped = x.clamp(-clip, clip)
        return clipped, eps + alpha / sigma.clamp(min=SOLVE_FLOOR) * (x - clipped)  # exactly eps where nothing was cut

    return denoise


def ddim(z: Tensor, t: Tensor, t_next: Tensor, denoise: Denoiser, schedule: Schedule, noise: Tensor | None) -> Tensor:
    """z at t_next with the same x and eps: alpha' x + sigma' eps, arXiv 2010.02502 eq. 12 with eta = 0."""
    x, eps = denoise(z, t)
    alpha, sigma = schedule(t_next)
    return alpha * x + sigma * eps


def ddpm(z: Tensor, t: Tensor, t_next: Tensor, denoise: Denoiser, schedule: Schedule, noise: Tensor | None) -> Tensor:
    """z at t_next drawn from q(z_next | z, x): arXiv 2006.11239 eq. 7 for any two times, "fixed small" variance.

    With s = t_next, r = alpha_t / alpha_s and var = sigma_t^2 - r^2 sigma_s^2, what the steps between destroyed:
    mean = (r sigma_s^2 z + alpha_s var x) / sigma_t^2,  variance = var sigma_s^2 / sigma_t^2.
    """
    assert noise is not None, "ddpm draws: pass standard normal noise shaped like z"
    x, _ = denoise(z, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(t_next)
    r = alpha_t / alpha_s
    var = (sigma_t**2 - (r * sigma_s) ** 2).clamp(min=0)
    mean = (r * sigma_s**2 * z + alpha_s * var * x) / sigma_t**2
    # for an image that waits at t = t_next = 0 the left side is 0 / 0, and is not taken
    return torch.where(t_next > 0, mean + var.sqrt() * sigma_s / sigma_t * noise, x)


def euler(z: Tensor, t: Tensor, t_next: Tensor, denoise: Denoiser, schedule: Schedule, noise: Tensor | None) -> Tensor:
    """z after a straight step along dz/dt = alpha' x + sigma' eps; the same as ddim where the schedule is linear."""
    x, eps = denoise(z, t)
    # Into 0 linear gives x anyway, but cosine's sigma grows like sqrt(t): its slope would leave up to half the noise.
    return torch.where(t_next > 0, z + (t_next - t) * _velocity(x, eps, t, schedule), x)


def heun(z: Tensor, t: Tensor, t_next: Tensor, denoise: Denoiser, schedule: Schedule, noise: Tensor | None) -> Tensor:
    """z after a step along the mean of the slopes at both ends: second order, two calls of the denoiser.

    Into t_next = 0 it is euler's step; the second call is still made, as other images of the batch may need it.
    """
    x, eps = denoise(z, t)
    slope = _velocity(x, eps, t, schedule)
    guess = torch.where(t_next > 0, z + (t_next - t) * slope, x)
    slope_next = _velocity(*denoise(guess, t_next), t_next, schedule)
    return torch.where(t_next > 0, z + (t_next - t) * (slope + slope_next) / 2, guess)


SOLVERS: dict[str, Solver] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}
NOISY = {"ddpm"}  # those that want fresh noise at each step


def sample(
    denoise: Denoiser,
    z: Tensor,
    times: Tensor,
    solver: Solver,
    schedule: Schedule,
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """z carried through falling `times` [n + 1], shaped like z; the whole batch in step, for use without an engine."""
    for t, t_next in pairwise(times):
        shape = (z.shape[0],) + (1,) * (z.ndim - 1)  # one t an image: [I, 1, ..., 1]
        z = solver(z, t.expand(shape), t_next.expand(shape), denoise, schedule, noise_fn(z))
    return z


def _velocity(x: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """dz/dt = alpha' x + sigma' eps, shaped like x."""
    alpha_slope, sigma_slope = velocity_coefficients(schedule, t)
    return alpha_slope * x + sigma_slope * eps
