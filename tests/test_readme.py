"""The README tells the truth: its commands exist, and its map has every file."""

import re
import shlex
from pathlib import Path

import pytest

from transfusion.cli import parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(transfusion|make) ", line)]
NAMED = {
    name.rstrip("/") for name in re.findall(r"`((?:transfusion|configs|docs|scripts|tests|bench)/[\w./-]*)`", TEXT)
}
MAP = TEXT.partition("## Map")[2].partition("\n## ")[0]


def test_the_readme_shows_commands_and_a_map():
    assert any(c.startswith("make demo") for c in COMMANDS) and any(c.startswith("transfusion ") for c in COMMANDS)
    assert MAP


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_readme_exists(command):
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {a for a in arguments if "=" not in a} <= targets
    else:
        parse(arguments)  # leaves by SystemExit where it does not understand


@pytest.mark.parametrize("command", [c for c in COMMANDS if "configs/" in c])
def test_a_config_in_a_command_of_the_readme_is_there(command):
    for name in re.findall(r"configs/[\w.-]+", command):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", sorted(NAMED))
def test_what_the_readme_names_is_there(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)[^):]*\)", TEXT))
def test_what_the_readme_links_to_is_there(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "transfusion").iterdir()), ids=lambda path: path.name)
def test_the_map_has_every_module_and_folder(path):
    if path.suffix == ".py" and path.name != "__init__.py":
        assert f"`transfusion/{path.name}`" in MAP
    elif (path / "__init__.py").exists():
        assert f"`transfusion/{path.name}/`" in MAP
        row = next(line for line in MAP.splitlines() if f"`transfusion/{path.name}/`" in line)
        if path.name != "evals":  # one file an evaluation, told in one line
            missing = [m.stem for m in path.glob("[!_]*.py") if f"`{m.stem}`" not in row]
            assert not missing
