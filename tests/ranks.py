"""Trainings by ranks, one after the other in the same processes: torchrun ... ranks.py JOBS.json DEVICE COMPILER

A job is {"config": TOML, "overrides": [...], "out": RUN}; with "from": [RUN, STEP], the run goes on from that
checkpoint of another. `launch` starts them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def launch(n: int, jobs: list[dict], folder: Path, device: str = "cpu", compiler: str = "inductor") -> None:
    """Lets n ranks do the jobs, or, n = 0, a process that torchrun did not start; `compiler`: a backend of torch's."""
    file = folder / f"jobs-{n}.json"
    file.write_text(json.dumps(jobs, default=str))
    start = [*TORCHRUN, f"--nproc-per-node={n}"] if n else [sys.executable]
    done = subprocess.run([*start, __file__, file, device, compiler], **quiet(), timeout=600)
    assert done.returncode == 0, (
        "\n".join(line for line in done.stderr.splitlines() if " ends: " in line) or done.stderr
    )


def quiet(**environment: str) -> dict:
    """How processes are started here: one thread each, their output kept."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return {"env": threads, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def copy_run(source: Path, step: int, out: Path) -> None:
    """A run that was broken off behind that step."""
    shutil.copytree(source, out)
    for later in (out / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)


def main() -> None:
    from transfusion.config import load_config
    from transfusion.loop import find_checkpoint
    from transfusion.parallel import ParallelConfig, context_of, join, mesh_of
    from transfusion.run import RunConfig
    from transfusion.train import train_with

    torch.set_num_threads(1)
    jobs, device, compiler = sys.argv[1:]
    torch.compile = partial(torch.compile, backend=compiler)
    with join(ParallelConfig(timeout=300), device) as ranks:  # a GPU compiles in the first step
        for job in json.loads(Path(jobs).read_text()):
            config, out = load_config(RunConfig, job["config"], job["overrides"]), Path(job["out"])
            if "from" in job and ranks.leads:
                source, step = job["from"]
                copy_run(Path(source), step, out)
            ranks.wait()
            parts = ranks
            if ranks.mesh:
                mesh = mesh_of(config.parallel, ranks.size, device)
                parts = replace(ranks, mesh=mesh, context=context_of(config.parallel, device))
            train_with(parts, config, out, find_checkpoint(out, resume=True))


if __name__ == "__main__":
    main()
