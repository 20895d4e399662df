"""One solver step for all images that are being drawn, each at its own step, of its own size, with its own guidance.

chunk   lane 0   image A, behind its prompt              p_c      the predictions of a request's lanes, weighted,
        lane 1   image A, behind guidance's prefix       p_u      are the guided one:  w_c p_c + w_u p_u
        lane 2   image B, behind its prompt, no guidance p_c
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.chunk import Chunk, Span
from transfusion.diffusion.guidance import renormalised
from transfusion.diffusion.objective import DiffusionConfig, add_noise
from transfusion.diffusion.schedule import SCHEDULES
from transfusion.diffusion.solver import NOISY, SOLVERS, denoiser_from
from transfusion.request import Request

Forward = Callable[[Chunk, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """The patches being drawn, all branches of a request side by side: M in the chunk, N that they stand for."""

    requests: list[Request]
    chunk: Chunk
    image_of: Tensor  # [N] the request of each patch
    source: Tensor  # [M] which of the N each patch of the chunk is
    first: Tensor  # [images of the chunk] the first of the N that each shows
    weights: Tensor  # [M] how much a branch counts
    main: Tensor  # [N] which of the M is the patch in the conditional branch
    interval: tuple[Tensor, Tensor]  # each [N, 1]: where guidance begins and where it ends
    renormalise: Tensor | None  # [N, 1] bool; None: nobody wants it


class Canvas(NamedTuple):
    """The image that a request draws, in one of its branches."""

    span: Span
    request: int
    branch: int


def canvases(requests: Seq[Request]) -> list[Canvas]:
    """The images that the requests draw, in all branches that count at their steps, in the order of the lanes."""
    rows = [(i, j, b) for i, r in enumerate(requests) for j, b in enumerate(r.branches()) if j == 0 or r.guided[r.step]]
    first = [requests[i].final(b) for i, _, b in rows]
    found = [Canvas(Span(b, at, at + len(requests[i].z)), i, j) for at, (i, j, b) in zip(first, rows)]
    return sorted(found, key=lambda c: c.span.branch.lane)


def plan_of(requests: Seq[Request], rows: Seq[Canvas], chunk: Chunk) -> Plan:
    """What does not change from step to step while the same requests draw; they are in the order of their main lanes,
    and `chunk` is that of the rows."""
    device = chunk.tokens.device
    owner = torch.tensor([c.request for c in rows])
    sizes = torch.tensor([len(r.z) for r in requests])
    first = sizes.cumsum(0) - sizes
    source = torch.cat([torch.arange(len(requests[i].z)) + first[i] for i in owner.tolist()])
    weights = torch.tensor([requests[c.request].weights[c.branch] for c in rows])
    main = torch.tensor([c.branch == 0 for c in rows])
    image_of = torch.repeat_interleave(torch.arange(len(requests)), sizes)
    weights, main = (torch.repeat_interleave(x, sizes[owner]) for x in (weights, main))
    main = main.nonzero()[:, 0]  # the requests are in the order of their main lanes, so in that of the N
    settings = [(*r.sampling.guidance_interval, r.sampling.renormalise) for r in requests]
    low, high, renormalise = (torch.tensor(x)[image_of, None].to(device) for x in zip(*settings))
    tensors = (x.to(device) for x in (image_of, source, first[owner], weights, main))
    return Plan(list(requests), chunk, *tensors, (low, high), renormalise if renormalise.any() else None)


def draw_step(plan: Plan, forward: Forward, diffusion: DiffusionConfig, clip: float | None):
    """Takes every request of the plan one solver step on; `forward` gives the model's predictions [M, P] of
    a chunk at z [M, P] and t [I]."""
    requests, device = plan.requests, plan.image_of.device
    schedule, solver = SCHEDULES[diffusion.schedule], requests[0].sampling.solver

    def predict(z: Tensor, t: Tensor) -> Tensor:
        """[N, P] guided prediction at z [N, P] as the model reads it, t [N, 1]."""
        if len(plan.source) == len(z):  # nobody is guided
            return forward(plan.chunk, z, t[plan.first, 0])
        p = forward(plan.chunk, z[plan.source], t[plan.first, 0])
        low, high = plan.interval
        cond = p[plan.main]
        guided = torch.zeros_like(z).index_add(0, plan.source, p * plan.weights[:, None])
        guided = torch.where((low <= t) & (t <= high), guided, cond)
        if plan.renormalise is None:
            return guided
        return torch.where(plan.renormalise, renormalised(guided, cond, plan.image_of, len(requests)), guided)

    now = torch.stack([r.times[r.step : r.step + 2] for r in requests])[plan.image_of]  # [N, 2]
    t, t_next = now[:, :1], now[:, 1:]
    denoise = denoiser_from(predict, diffusion.prediction, schedule, clip, diffusion.data_variance)
    z, noise = torch.cat([r.z for r in requests]), None
    if solver in NOISY:
        noise = torch.cat([torch.randn(r.z.shape, generator=r.random) for r in requests]).to(device)
    z = SOLVERS[solver](z, t, t_next, denoise, schedule, noise)
    sizes = [len(r.z) for r in requests]
    for r, patches, to in zip(requests, z.split(sizes), t_next.split(sizes)):
        if r.known is not None:
            patches = torch.where(r.known.keep, add_noise(r.known.patches, r.noise, *schedule(to)), patches)
        r.z, r.step = patches, r.step + 1
