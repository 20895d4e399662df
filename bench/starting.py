"""How long until a program does what it is for: whole processes, from their start to their end.

torch              `import torch`, which all that follow contain
transfusion        `import transfusion`             help    `transfusion --help`
resume             `transfusion train CONFIG --resume` for one step: import, data, checkpoint, the step, a checkpoint
transfusion_pytorch, transformers                   the peers' imports
"""

import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from clock import Clock
from content import Case

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "torch": "import torch",
    "transfusion": "import transfusion",
    "transfusion_pytorch": "import transfusion_pytorch",
    "transformers": "from transformers import LlamaForCausalLM",
}


def starting(case: Case, clock: Clock) -> tuple[Callable[[int], None], dict]:
    """The program `case.way`, run to its end."""
    command = [sys.executable, "-m", "transfusion.cli"]
    out = tempfile.mkdtemp()

    def train(steps: int) -> list[str]:
        quiet = ["train.log_every=0", "train.sample_every=0", "train.keep=1", "device=cpu"]
        return [*command, "train", case.config, f"train.steps={steps}", f"out={out}/run", *quiet]

    def of(i: int) -> list[str]:
        if case.way == "resume":  # the i-th goes on from where the one before it ended
            return [*train(i + 2), "--resume"]
        return [*command, "--help"] if case.way == "help" else [sys.executable, "-c", IMPORTS[case.way]]

    def run(arguments: list[str]) -> None:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(arguments)}: {done.stderr}")

    def repeat(i: int):
        with clock("process"):
            run(of(i))

    if case.way == "resume":
        run(train(1))
    weakref.finalize(repeat, shutil.rmtree, out, ignore_errors=True)
    return repeat, {"units": {"starts": 1}}
