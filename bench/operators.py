"""Where a training step goes: seconds by class of operator (torch.profiler), FLOPs of each class (torch's counter).

matmul          products with weights
attention       scores, softmax, weighted sums: SDPA's kernels, or the batched products of attention by documents
norm            norms, activations, rotations, losses: what passes over the data and hardly computes
optimizer       fused AdamW
data movement   copies, casts, gathers, scatters
"""

import torch
from clock import Clock
from content import Case
from ours import Repeat, training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

CLASSES = {  # the first that has a word of the operator's name; "norm and elementwise" has the rest
    "optimizer": ("adam",),
    "attention": ("scaled_dot_product", "flex_attention", "flash", "bmm", "_softmax"),
    "matmul": ("aten::mm", "addmm", "linear", "matmul", "gemm", "mkldnn", "cutlass", "nvjet"),
    "data movement": ("copy", "index", "cat", "fill", "zero", "clone", "gather", "scatter", "embedding", "memcpy")
    + ("memset", "contiguous", "split", "empty", "pad", "arange", "sort", "cummax", "cumsum", "nonzero"),
}
REST = "norm and elementwise"


def class_of(operator: str) -> str:
    """The class of an operator or kernel."""
    name = operator.lower()
    if "log_softmax" in name:
        return REST  # of the loss
    return next((c for c, words in CLASSES.items() if any(word in name for word in words)), REST)


def profiled(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """The step of `training` under the profiler, whose own cost is in these seconds."""
    step, facts = training(case, clock)
    cuda = case.device == "cuda"

    def repeat(i: int) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as found:
            step(i)
        seconds = dict.fromkeys([*CLASSES, REST], 0.0)
        for event in found.key_averages():
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            seconds[class_of(event.key)] += time / 1e6
        return seconds

    return repeat, facts | {"flops_by_class": {} if case.compile else flops_by_class(step, clock)}


def flops_by_class(step: Repeat, clock: Clock) -> dict[str, float]:
    """FLOPs of each class as torch counts them in a step."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no other of a CPU
        step(0)
    clock.take()
    flops = dict.fromkeys(("matmul", "attention"), 0.0)
    for operator, n in counter.get_flop_counts()["Global"].items():
        flops["attention" if operator is torch.ops.aten.bmm else "matmul"] += n
    return flops
