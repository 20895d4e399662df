"""Noise schedules: how much of the data and how much noise is in z at time t. t = 0 is data, t = 1 is noise.

    z(t) = alpha(t) x + sigma(t) eps

A schedule is a function t -> (alpha, sigma). A new one is one function (often one line) and its entry in `SCHEDULES`;
derivatives come from it by automatic differentiation, training and sampling both read it, and nothing restates it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal
MAX_BETA = 0.999  # the most that one of their 1000 steps may destroy

# The slopes are read this far inside [0, 1]: cosine's sigma grows like sqrt(t) at 0, so its slope there is infinite,
# and its alpha is held at a floor from 1 - 3e-5 on, where the slope would read 0 and an Euler step add no data.
SLOPE_MARGIN = 1e-4


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha^2 = f(t) / f(0), f(t) = cos^2((t+s)/(1+s) pi/2), arXiv 2102.09672 eq. 17."""
    # Both are rewritten with h = pi/2 / (1+s) so that float32 is exact at both ends: 1 - f(t)/f(0) would lose half of
    # its digits near t = 0, and cos(...) near t = 1.
    h = math.pi / 2 / (1 + COSINE_OFFSET)
    alpha = torch.sin(h * (1 - t)) / math.sin(h)
    sigma = torch.sqrt(torch.sin(h * t) * torch.sin(h * (t + 2 * COSINE_OFFSET))) / math.sin(h)
    # beta <= .999 only binds in the last of 1000 steps; as a floor it holds the same table at every k/1000
    floor = math.sqrt(1 - MAX_BETA) * math.sin(h * 0.001) / math.sin(h)  # 4.9e-5: alpha(1)^2 = 2.4e-9
    return alpha.clamp(min=floor), sigma


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": lambda t: (1 - t, t),  # rectified flow, arXiv 2209.03003
}


def velocity_coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d alpha / dt, d sigma / dt) shaped like t, so that dz/dt = alpha' x + sigma' eps; finite at t = 0 and t = 1."""
    with torch.inference_mode(False), torch.enable_grad():  # a sampler runs without gradients
        inside = t.clone().clamp(SLOPE_MARGIN, 1 - SLOPE_MARGIN).requires_grad_()
        return tuple(torch.autograd.grad(part.sum(), inside)[0] for part in schedule(inside))


def shift_t(t: Tensor, shift: float) -> Tensor:
    """t moved towards noise (shift > 1) with 0 and 1 fixed: shift t / (1 + (shift - 1) t), arXiv 2403.03206 eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(n: int, shift: float = 1.0) -> Tensor:
    """The n + 1 times of n solver steps, falling from 1 to 0, float32."""
    if n < 1:
        raise ValueError(f"timesteps: {n} steps cannot reach the data; ask for at least 1")
    return shift_t(torch.linspace(1, 0, n + 1), shift)
