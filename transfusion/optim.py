"""Optimizers, the learning rate as a pure function of the step, gradient clipping, and the average of the weights.

    lr      warm-up  (step + 1) / warmup_steps,  then cosine from lr to min_lr, which the last step has
    ema     e <- d e + (1 - d) w,   d = min(ema, (1 + step) / (10 + step))

Defaults are the paper's (section 3.2): AdamW, betas .9 / .95, eps 1e-8, weight decay .1, clip 1, lr 3e-4 -> 1.5e-5.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transfusion.model.paths import is_adapter, text_twin
from transfusion.muon import Muon

OPTIMIZERS = ("adamw", "muon")
FREEZABLE = ("text", "image", "patches")

DECAYS = {  # progress in [0, 1] -> 1 at the start, 0 at the end
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | muon: Muon for the matrices in `layers`, AdamW for all else
    lr: float = 3e-4
    min_lr: float = 1.5e-5  # where the decay ends; Muon's lr ends at the same share of its own
    warmup_steps: int = 4000
    decay: str = "cosine"  # cosine | linear
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    muon_lr: float = 0.0  # lr of Muon's matrices; 0 = lr (its updates are scaled to AdamW's size)
    ema: float = 0.9999  # decay of the weights' average; 0 = no average
    freeze: tuple[str, ...] = ()  # weights that stay as they began: some of FREEZABLE; adapters always train

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}, got {self.name!r}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise ValueError(f"lr must be positive and min_lr in [0, lr], got lr {self.lr} and min_lr {self.min_lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), 0 for none, got {self.ema}")
        if not set(self.freeze) <= set(FREEZABLE):
            raise ValueError(f"freeze = {list(self.freeze)}: choose some of {', '.join(FREEZABLE)}")
        for field in ("warmup_steps", "weight_decay", "clip", "muon_lr"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")


def part_of(name: str) -> str:
    """Which of FREEZABLE a parameter belongs to, or "adapters".

    "text" is all that a document of text alone reads: the trunk's weights, embedding, head and last norm. "image" are
    the twins that patches have of the trunk's, "patches" the layers through which they enter and leave.
    """
    if is_adapter(name):
        return "adapters"
    if name.startswith(("patches.", "refine.")):
        return "patches"
    return "image" if text_twin(name) else "text"


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Takes the parts out of training: no gradients, no decay, no average; ValueError where nothing is left.

    A part without weights of its own goes through those of text, so it is frozen with them or not at all.
    """
    there = {part_of(name) for name, _ in model.named_parameters()}
    shared = [part for part in parts if part not in there]
    if shared and "text" not in parts:
        raise ValueError(
            f"optim.freeze = {list(parts)}: the model has no {' and no '.join(shared)} weights apart from the text's, "
            f"which train: add text, leave {' and '.join(shared)} out, or set model.separate as configs/mot.toml does"
        )
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) not in parts)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"optim.freeze = {list(parts)} leaves nothing to train: take one of them out")


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or [Muon, AdamW]; each trainable parameter is in one group, those of 2 or more dimensions decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [(name, p) for name, p in named if config.name == "muon" and is_layer_matrix(name, p)]
    taken = {name for name, _ in muon}
    rest = [(name, p) for name, p in named if name not in taken]
    groups = [
        {"params": [(name, p) for name, p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in rest if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
    ]
    groups = [group for group in groups if group["params"]]  # adapters alone have no vectors
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        if not muon:
            raise ValueError("optim.name = muon, but no matrix of the layers trains: set optim.name=adamw")
        lr = config.muon_lr or config.lr
        muon_type = Muon if hasattr(muon[0][1], "device_mesh") else torch.optim.Muon  # of DTensors, of Tensors
        optimizers += [muon_type(muon, lr, config.weight_decay, adjust_lr_fn="match_rms_adamw")]
    if groups:
        # One kernel for all parameters; where torch has none for the device, it picks its own loop (fused=None).
        fused = True if {p.device.type for _, p in rest} <= {"cpu", "cuda", "mps"} else None
        optimizers += [torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=fused)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # torch's name for what a schedule multiplies
    return optimizers


def is_layer_matrix(name: str, p: Tensor) -> bool:
    """True for a 2-D weight inside the transformer's layers, which is what Muon is for."""
    return p.ndim == 2 and re.search(r"(^|\.)layers\.\d+\.", name) is not None


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """The multiplier of lr in [min_lr / lr, 1] (less in the warm-up) for step 0 .. steps - 1 of a run of steps."""
    done, warmup = step + 1, config.warmup_steps
    if done < warmup:
        return done / warmup
    progress = min(1.0, (done - warmup) / max(1, steps - warmup))
    end = config.min_lr / config.lr
    return end + (1 - end) * DECAYS[config.decay](progress)


def set_lr(optimizers: list[torch.optim.Optimizer], step: int, steps: int, config: OptimConfig) -> float:
    """The lr of this step, after every group got it (Muon's its own)."""
    share = lr_at(step, steps, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
    return config.lr * share


def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """The gradients' norm before they were scaled down to clip (0: not at all), a scalar still on its device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients spread over ranks
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


# ---- average of the weights ----


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen, in their order: those that an average has."""
    return [p for p in model.parameters() if p.requires_grad]


def init_ema(model: nn.Module) -> list[Tensor]:
    """A float32 copy of the model's trained parameters, in their order."""
    return [p.detach().to(torch.float32, copy=True) for p in trained(model)]


def ema_decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early on, the average must forget the random start."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: list[Tensor], model: nn.Module, step: int, decay: float) -> None:
    """Moves ema towards the model's parameters, in place, after optimizer step 0, 1, ..."""
    weights = [p.detach().float() for p in trained(model)]  # no copy where they are float32
    torch._foreach_lerp_(ema, weights, 1 - ema_decay_at(step, decay))


@contextmanager
def averaged(model: nn.Module, ema: list[Tensor] | None) -> Iterator[nn.Module]:
    """The model with the averaged weights inside the block, by reference: no copy, and its own ones back after it.

    Without an average, with its own.
    """
    if ema is None:
        yield model
        return
    parameters = trained(model)
    assert len(parameters) == len(ema), f"{len(ema)} averages for {len(parameters)} parameters"
    own = [p.data for p in parameters]
    try:
        for p, e in zip(parameters, ema):
            p.data = e.to(p.dtype)
        yield model
    finally:
        for p, weight in zip(parameters, own):
            p.data = weight
