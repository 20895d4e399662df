"""Where a training step goes: seconds by class of operator (torch.profiler), and those at its two limits.

    at the limits = max(FLOPs / peak, bytes / bandwidth)     both by torch's dispatcher, in a pass of their own

matmul               products with weights
attention            scores, softmax, weighted sums: SDPA's kernels, or the batched products of attention by documents
norm, elementwise    norms, activations, rotations, losses: what passes over the data and hardly computes
optimizer            fused AdamW
data movement        copies, casts, gathers, scatters

Bytes are those of every operator's tensors, in and out, as if nothing stayed in a cache. That is an upper bound, so a
class whose data does stay there can be faster.
"""

import torch
from answer import Repeat
from clock import Clock, bandwidth
from content import Case
from ours import training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

CLASSES = {  # the first that has a word of the operator's name; REST has what is left
    "optimizer": ("adam",),
    "attention": ("scaled_dot_product", "bmm", "_softmax"),
    "matmul": ("aten::mm", "addmm", "linear", "matmul"),
    "data movement": ("copy", "index", "cat", "fill", "zero", "clone", "gather", "scatter", "embedding", "contiguous")
    + ("split", "empty", "pad", "arange", "sort", "cumsum", "view", "transpose", "reshape", "expand"),
}
REST = "norm, elementwise"


def class_of(operator: str) -> str:
    """The class of an operator."""
    name = operator.lower()
    if "log_softmax" in name:
        return REST  # of the loss
    return next((c for c, words in CLASSES.items() if any(word in name for word in words)), REST)


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write, by class; views move none."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys([*CLASSES, REST], 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes[class_of(func.name())] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def work(step: Repeat, clock: Clock) -> dict[str, dict[str, float]]:
    """{"flops" | "bytes" -> {class -> number}} of a step."""
    with ByteCounter() as moved, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(0)  # torch counts no other kernel of a CPU
    clock.take()
    flops = dict.fromkeys([*CLASSES, REST], 0.0)
    for operator, n in counter.get_flop_counts()["Global"].items():
        flops[class_of(f"aten::{operator}".replace("aten::aten.", "aten::"))] += n
    return {"flops": flops, "bytes": moved.bytes}


def profiled(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """The step of `training` under the profiler, whose own cost is in these seconds."""
    step, facts = training(case, clock)

    def repeat(i: int) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
            step(i)
        seconds = dict.fromkeys([*CLASSES, REST], 0.0)
        for event in found.key_averages():
            seconds[class_of(event.key)] += event.self_cpu_time_total / 1e6
        return seconds

    return repeat, facts | {"work": lambda: work(step, clock), "bandwidth": lambda: bandwidth(case.device)}
