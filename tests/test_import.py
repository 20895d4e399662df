"""What importing the package costs: nothing until something is asked for, then five dependencies and nothing else."""

import importlib
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import transfusion
from transfusion import load

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
    "pyarrow",
    "datasets",
    "fsspec",
)

DEPENDENCIES = {"torch", "numpy", "safetensors", "tokenizers", "PIL"}
NAMES_NO_COMMAND = """
import transfusion.cli
try:
    transfusion.cli.main({})
except SystemExit as stop:
    assert stop.code == {}
"""

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
import transfusion.commands
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after it."""
    return set(python(f"{code}\nimport sys\nprint()\nprint(*sys.modules)").splitlines()[-1].split())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    assert importlib.import_module(name).__name__ == name


def test_every_module_imports_where_no_extra_is_installed():
    python(ALL_WITHOUT_EXTRAS)


def test_the_import_loads_no_extra():
    loaded = loaded_by("from transfusion import load")
    assert "transfusion.generate" in loaded
    assert not loaded & set(EXTRAS)


def test_the_command_line_loads_nothing_beyond_the_five_dependencies():
    parts = {"torchgen", "functorch", "sympy", "mpmath"}  # of torch and of its own needs, which it loads late
    assert set(python(LOADED).split()) <= {"transfusion", *DEPENDENCIES, *parts}


def test_the_import_loads_the_dependencies_only_when_something_is_asked_for():
    assert not DEPENDENCIES & loaded_by("import transfusion; dir(transfusion), transfusion.__version__")
    assert loaded_by("import transfusion; transfusion.load") >= DEPENDENCIES


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["dance"], 2), (["--dance"], 2)])
def test_a_command_line_that_names_no_command_loads_no_dependency(words, code):
    loaded = loaded_by(NAMES_NO_COMMAND.format(words, code))
    assert "argparse" in loaded and not DEPENDENCIES & loaded


def test_a_command_line_that_names_a_command_loads_them():
    assert loaded_by(NAMES_NO_COMMAND.format(["plan", "--help"], 0)) >= DEPENDENCIES


def test_sampling_loads_no_compiler_that_it_does_not_use():
    asked = "import sys, transfusion; transfusion.load('pretrained:emoji', device='cpu').draw(['red'], steps=2)"
    seen = python(f"{asked}; print('torch._dynamo' in sys.modules, 'torch' in sys.modules)")
    assert seen.split()[-2:] == ["False", "True"]


def test_what_is_late_is_there_all_the_same():
    everything = {}
    exec("from transfusion import *", everything)
    assert transfusion.load is load is everything["load"] is transfusion.pretrained.load
    assert "load" in dir(transfusion) and "load(name" in pydoc.render_doc(transfusion, renderer=pydoc.plaintext)


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'transfusion' has no attribute 'laod'"):
        _ = transfusion.laod
    with pytest.raises(ImportError, match="cannot import name 'laod'"):
        exec("from transfusion import laod")
