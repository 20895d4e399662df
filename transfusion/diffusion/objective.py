"""What the network predicts, and in which space its error is measured.

    every prediction is a mixture  p = a x + b eps     with (a, b) from `PREDICTIONS`
    the noisy input is another     z = alpha x + sigma eps
    so the two lines give back     x = (b z - sigma p) / det,   eps = (alpha p - a z) / det,   det = alpha b - sigma a

With z known, an error e in p is an error e * det_q / det_p in any other prediction q: the whole of `loss_weight`.
alpha, sigma are tensors that broadcast against z, so every image can have its own t.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import SCHEDULES, shift_t

# (alpha, sigma) -> (a, b)
PREDICTIONS: dict[str, Callable] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # arXiv 2202.00512
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # dz/dt of the linear schedule
}

# u, mean, std -> t
T_LAWS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": lambda u, mean, std: u,
    "logit_normal": lambda u, mean, std: torch.sigmoid(
        mean + std * 2**0.5 * torch.erfinv(2 * u - 1)
    ),  # 2403.03206 eq. 19
}

SOLVE_FLOOR = 1e-5  # below cosine's least alpha (4.9e-5), so it only acts where alpha or sigma is all but zero


@dataclass(frozen=True)
class DiffusionConfig:
    """How images are noised and what is learnt from them; the defaults are the paper's (arXiv 2408.11039)."""

    schedule: str = "cosine"  # a key of SCHEDULES
    prediction: str = "eps"  # what the network outputs, a key of PREDICTIONS
    loss_space: str = ""  # where its error is measured, a key of PREDICTIONS; "" = where it predicts
    t_law: str = "uniform"  # a key of T_LAWS
    t_mean: float = 0.0  # of logit(t), logit_normal only
    t_std: float = 1.0
    t_shift: float = 1.0  # > 1 trains on more noise; the usual choice for more pixels
    det_floor: float = 0.05  # bounds loss_weight at (1 / .05)^2
    data_variance: float = 0.0  # if > 0, the network reads the linear estimate of x that it implies instead of z

    def __post_init__(self):
        choices = {"schedule": SCHEDULES, "prediction": PREDICTIONS, "loss_space": {"", *PREDICTIONS}, "t_law": T_LAWS}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                names = ", ".join(repr(name) for name in sorted(known))
                raise ValueError(f"diffusion.{field} = {getattr(self, field)!r} is unknown; choose one of {names}")
        for field in ("t_std", "t_shift", "det_floor"):
            if not getattr(self, field) > 0:
                raise ValueError(f"diffusion.{field} = {getattr(self, field)} must be above 0")
        if self.data_variance < 0 or (self.data_variance and self.prediction != "x0"):
            raise ValueError(
                f"diffusion.data_variance = {self.data_variance}: 0 to read z as it is, or, with prediction x0 only, a "
                "variance (it scales the noise away that other predictions ask for)"
            )


def add_noise(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """z = alpha x + sigma eps, shaped like x."""
    return alpha * x + sigma * eps


def network_input(z: Tensor, alpha: Tensor, sigma: Tensor, data_variance: float) -> Tensor:
    """What the network reads: z, or with a variance v the linear estimate of x, z alpha v / (alpha^2 v + sigma^2).

    The estimate is EDM's c_skip z (arXiv 2206.00364, table 1), the best for data of mean 0 and variance v; what another
    mean would add depends on t alone and is left to the timestep embedding. Near t = 1 it is near 0, so that noise,
    which says nothing, does not drown the caption in the residual stream; at t = 0 it is z itself. Shaped like z.
    """
    if not data_variance:
        return z
    return z * (alpha * data_variance / (alpha**2 * data_variance + sigma**2))


def target(prediction: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network would output, p = a x + b eps, shaped like x."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    return a * x + b * eps


def solve(prediction: str, p: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x, eps) implied by the network's output p at z; finite at both ends of t, where what p states comes back."""
    # The floor is on alpha and sigma rather than on det: at det = 0 a floored det turns the stated half into 0 as well
    # (eps = alpha p / det at alpha = 0), whereas here it cancels.
    alpha, sigma = alpha.clamp(min=SOLVE_FLOOR), sigma.clamp(min=SOLVE_FLOOR)
    a, b = PREDICTIONS[prediction](alpha, sigma)
    det = alpha * b - sigma * a
    return (b * z - sigma * p) / det, (alpha * p - a * z) / det


def loss_weight(prediction: str, loss_space: str, alpha: Tensor, sigma: Tensor, floor: float = 0.05) -> Tensor:
    """The factor, shaped like alpha, that turns squared error in `prediction` into squared error in `loss_space`.

    |det| of the prediction counts as at least `floor`, as in JiT (arXiv 2511.13720), or one clean image would outweigh
    all others; loss_space "" is the prediction itself, whose factor is 1 everywhere.
    """
    if loss_space in ("", prediction):
        return torch.ones_like(alpha)
    (a, b), (c, d) = PREDICTIONS[prediction](alpha, sigma), PREDICTIONS[loss_space](alpha, sigma)
    return ((alpha * d - sigma * c) / (alpha * b - sigma * a).abs().clamp(min=floor)) ** 2


def sample_t(u: Tensor, law: str = "uniform", shift: float = 1.0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times in [0, 1] from u ~ U(0, 1), shaped like u; the caller owns the randomness."""
    return shift_t(T_LAWS[law](u, mean, std), shift)
