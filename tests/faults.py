"""`transfusion ...` with a fault in one rank at one step, the first time that torchrun starts it:

torchrun ... faults.py KIND RANK STEP train CONFIG ...
"""

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from transfusion import train as training
from transfusion.cli import main
from transfusion.loss import Losses

kind, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
compute, losses, make_room, at = training.gradients, training.losses, training.room, [-1]


def children() -> list[int]:
    """The processes that this one has started."""
    return [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def fail():
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hangs":
        time.sleep(1000)
    elif kind == "has no disk left":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    elif kind == "loses a worker":
        os.kill(max(children()), signal.SIGKILL)
    elif kind.startswith("is told by "):
        os.kill(os.getpid(), signal.Signals[kind.removeprefix("is told by ")])


def faulty(model, micro, config, now, *more):
    at[0] = now
    if now == step:
        fail()
    return compute(model, micro, config, now, *more)


def poisoned(*inputs):
    lm, image = losses(*inputs)
    return Losses(lm * (math.nan if at[0] == step else 1), image)


def no_room(*inputs):
    if at[0] == step:
        raise torch.OutOfMemoryError("all taken")
    make_room(*inputs)


torch.set_num_threads(1)
if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    training.gradients = faulty
    if kind == "finds nan":
        training.losses = poisoned
    elif kind == "has no room":
        training.room = no_room
sys.exit(main(sys.argv[4:]))
