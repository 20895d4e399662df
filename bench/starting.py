"""How long until a program does what it is for: whole processes, from their start.

torch              `import torch`, which resume and the peers contain
transfusion        `import transfusion`             help    `transfusion --help`, neither of which needs it
load               `from transfusion import load`: all that sampling needs, as the peers' imports
resume             `transfusion train CONFIG --resume`: import, data, checkpoint, until the first step is told
transfusion_pytorch, transformers                   the peers' imports
"""

import os
import subprocess
import sys
import weakref
from shutil import rmtree
from tempfile import mkdtemp

from answer import Repeat
from clock import Clock
from content import Case
from machine import ROOT

CLI = [sys.executable, "-m", "transfusion.cli"]
COMMANDS = {
    "torch": [sys.executable, "-c", "import torch"],
    "transfusion": [sys.executable, "-c", "import transfusion"],
    "load": [sys.executable, "-c", "from transfusion import load"],
    "help": [*CLI, "--help"],
    "transfusion_pytorch": [sys.executable, "-c", "import transfusion_pytorch"],
    "transformers": [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
}


def starting(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """The program `case.way`, run to its end or its first step."""

    def run(command: list[str], until: str | None = None) -> None:
        """Ends the program at the first line that begins so."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            said = []
            for line in process.stdout:
                said.append(line)
                if until and line.startswith(until):
                    process.kill()
                    return
        if process.returncode or until:
            raise ValueError(f"{' '.join(command)}: exit status {process.returncode}: {''.join(said)}")

    def repeat(i: int):
        with clock("process"):
            run(command, until)

    command, until = COMMANDS.get(case.way), None
    if case.way == "resume":
        folder = mkdtemp()
        weakref.finalize(repeat, rmtree, folder, ignore_errors=True)
        command = [*CLI, "train", case.config, f"out={folder}/run", "train.log_every=1", "train.sample_every=0"]
        command, until = [*command, f"device={case.device}"], "step "
        run([*command, "train.steps=1"])
        command += ["train.steps=1000", "--resume"]

    return repeat, {"units": {"starts": 1}}
