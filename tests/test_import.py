"""What importing the package costs: five dependencies and nothing else."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import transfusion

ROOT = Path(transfusion.__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(transfusion.__path__, "transfusion."))
EXTRAS = (
    "matplotlib",
    "transformers",
    "diffusers",
    "tensorboard",
    "wandb",
    "torchvision",
    "efficientnet_lite_pytorch",
    "peft",
    "gguf",
)

ALL_WITHOUT_EXTRAS = f"""
import importlib, sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {MODULES!r}:
    importlib.import_module(name)
"""
LOADED = """
import sys
import torch, numpy, safetensors.torch, tokenizers, PIL.Image
before = set(sys.modules)
import transfusion, transfusion.cli
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    assert importlib.import_module(name).__name__ == name


def test_every_module_imports_where_no_extra_is_installed():
    python(ALL_WITHOUT_EXTRAS)


def test_the_import_loads_no_extra():
    loaded = python("import transfusion, sys; print(*sys.modules)").split()
    assert "transfusion.generate" in loaded
    assert not set(EXTRAS) & set(loaded)


def test_the_command_line_loads_nothing_beyond_the_five_dependencies():
    here = {"transfusion", "torch", "numpy", "safetensors", "tokenizers", "PIL"}
    own = {*here, "torchgen", "functorch", "sympy", "mpmath"}  # torch loads parts of itself and of its own needs late
    assert set(python(LOADED).split()) <= own
