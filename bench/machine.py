"""What a figure was measured on: the commit, the processor, the packages."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("results", "plots", "README.md")  # by the measurements themselves
FLAGS = ("amx_bf16", "avx512_bf16")  # instructions that multiply bf16
PACKAGES = ("torch", "numpy", "transfusion", "transfusion-pytorch", "transformers")


def git(*arguments: str) -> str:
    """What git says of the repository; nothing where it is none."""
    known = shutil.which("git") and (ROOT / ".git").exists()
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() if known else ""


def commit() -> str:
    """The commit of the code, with -dirty where it differs; results of measurements are no code. "" = not known."""
    changed = git("status", "--porcelain", "--untracked-files=no", ".", *(f":!bench/{name}" for name in WRITTEN))
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


def hardware() -> dict[str, str | int | list[str]]:
    """The processor's name, which of FLAGS it has, its cores, its memory in GiB."""
    says = subprocess.run(["lscpu"], capture_output=True, text=True).stdout if shutil.which("lscpu") else ""
    fields = dict(line.split(":", 1) for line in says.splitlines() if ":" in line)
    flags = fields.get("Flags", "").split()
    return {
        "processor": fields.get("Model name", platform.processor() or platform.machine()).strip(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count() or 0,
        "gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions() -> dict[str, str]:
    """Of Python, and of those of PACKAGES that are installed."""
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    return {"python": platform.python_version(), **dict(sorted(installed.items()))}
