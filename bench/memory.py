"""The plan's memory against that of real steps: peak resident bytes of the third step, in a process each, on a CPU.

python bench/memory.py                         # every case, a line each, and the table
python bench/memory.py dim=256 depth=2         # fields of the case (content.py), for all cases

measured      VmHWM of the step, less VmRSS before the model exists and after a small model's step has loaded all
plan          weights, moments, and the peak of the rehearsed step (transfusion/memory.py); no average
allocator     "mapped": every tensor of 64 KiB or more is a mapping of its own, which goes when the tensor goes
              (MALLOC_MMAP_THRESHOLD_); "glibc": as it comes, where what is freed in between stays
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import ours
from clock import Clock, memory
from content import Case, content
from machine import ROOT, commit, hardware, versions

from transfusion.config import override
from transfusion.memory import rehearse
from transfusion.model.recompute import MODES, recompute
from transfusion.model.transformer import build_model

ALLOCATORS = {"mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "glibc": {}}
HEAD = """\
| width x layers | rows | documents of a row | checkpointing | allocator | plan, MiB | measured, MiB | ratio |
|---|---|---|---|---|---|---|---|"""
STEPS = 3  # the first ones find what lasts: gradients, moments, the heap
PACKED = Case(documents=14, images=1, side=16, text_tokens=32, vocab=4096, rows=1, seq_len=4096)
TEXT = Case(images=0, text_tokens=4094, vocab=4096, rows=1)
CASES = [
    replace(PACKED, dim=256, heads=4, depth=8),
    replace(PACKED, dim=512, heads=8, depth=8),
    replace(PACKED, dim=768, heads=12, depth=12),
    replace(TEXT, dim=512, heads=8, depth=8),
    replace(PACKED, dim=256, heads=4, depth=8, rows=4),
]


def planned(case: Case, checkpointing: str) -> dict[str, float]:
    """Bytes that a step takes by plan."""
    config = ours.config_of(case)
    config = replace(config, train=replace(config.train, checkpointing=checkpointing))
    found = rehearse(config, ours.batch_of(case, content(case, 0)), on="cpu")
    weights = 4 * sum(p.numel() for p in build_model(config.model, "meta").parameters())
    return {"plan": 3 * weights + found.peak, "activations": found.activations, "weights": weights}


def measure(case: Case, checkpointing: str) -> dict[str, float]:
    """MiB that a step takes by plan, and that it took in this process."""
    plan = planned(case, checkpointing)
    step_of(replace(case, dim=64, heads=1, depth=1, documents=1, seq_len=0), checkpointing)(0)
    before = resident("VmRSS")
    step = step_of(case, checkpointing)
    for i in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        step(i)
    return {name: n / 2**20 for name, n in {**plan, "measured": memory("cpu") - before}.items()}


def step_of(case: Case, checkpointing: str) -> Callable[[int], None]:
    """A training step of the case, by its number."""
    build = ours.build_model

    def checkpointed(*arguments):
        model = build(*arguments)
        recompute(model.layers, checkpointing)
        return model

    ours.build_model = checkpointed
    try:
        return ours.training(case, Clock())[0]
    finally:
        ours.build_model = build


def resident(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def in_process(case: Case, checkpointing: str, allocator: str) -> dict[str, float]:
    """`measure` in a process of its own; ValueError with its last words where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT)} | ALLOCATORS[allocator]
    command = [sys.executable, __file__, "--one", json.dumps([asdict(case), checkpointing])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(line: dict) -> str:
    """A line of results as one of the table."""
    case, plan, measured = line["case"], line["plan"], line["measured"]
    cells = [f"{case['dim']} x {case['depth']}", case["rows"], case["documents"], line["checkpointing"]]
    cells += [line["allocator"], f"{plan:.0f}", f"{measured:.0f}", f"{measured / plan:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold the plan's memory against that of real steps.")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the case, for all cases")
    parser.add_argument("--out", type=Path, help="file of results, which grows")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        fields, checkpointing = args.one
        print(json.dumps(measure(Case(**fields | {"peak": tuple(fields["peak"])}), checkpointing)))
        return 0
    out = args.out or ROOT / f"bench/results/{time.strftime('%F')}-memory" / "results.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"commit": commit(), "hardware": hardware(), "versions": versions(), "run": time.strftime("%FT%T")}
    print(HEAD)
    for case in dict.fromkeys(override(case, args.overrides) for case in CASES):
        for checkpointing in MODES:
            for allocator in ALLOCATORS:
                found = in_process(case, checkpointing, allocator)
                line = {"case": asdict(case), "checkpointing": checkpointing, "allocator": allocator, **found, **about}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(row(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
