"""How long until a program does what it is for: whole processes, from their start.

torch              `import torch`, which all that follow contain
transfusion        `import transfusion`             help    `transfusion --help`
resume             `transfusion train CONFIG --resume`: import, data, checkpoint, until the first step is told
transfusion_pytorch, transformers                   the peers' imports
"""

import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from answer import Repeat
from clock import Clock
from content import Case
from machine import ROOT

CLI = [sys.executable, "-m", "transfusion.cli"]
COMMANDS = {
    "torch": [sys.executable, "-c", "import torch"],
    "transfusion": [sys.executable, "-c", "import transfusion"],
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

    command, until, folder = COMMANDS.get(case.way), None, None
    if case.way == "resume":
        folder = TemporaryDirectory()
        command = [*CLI, "train", case.config, f"out={folder.name}/run", "train.log_every=1", "train.sample_every=0"]
        command, until = [*command, f"device={case.device}"], "step "
        run([*command, "train.steps=1"])
        command += ["train.steps=1000", "--resume"]

    def repeat(i: int, folder=folder):  # which is there as long as this is
        with clock("process"):
            run(command, until)

    return repeat, {"units": {"starts": 1}}
