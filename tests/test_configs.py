"""Every shipped config: it loads, it is planned, its model builds."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from transfusion.cli import main
from transfusion.config import load_config
from transfusion.model.transformer import build_model, parameter_counts
from transfusion.run import RunConfig
from transfusion.tokenizer import load_tokenizer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
PAPER = [path for path in CONFIGS if path.stem.startswith("paper-")]

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: Path) -> RunConfig:
    """The config, its vocabulary filled in."""
    config = load_config(RunConfig, path)
    size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    return replace(config, model=replace(config.model, vocab_size=size))


def test_there_are_configs_to_test():
    assert {"demo", "paper-7b"} <= {path.stem for path in CONFIGS}


@each_config
def test_a_shipped_config_builds_a_model_of_its_sizes(path):
    config = load(path)
    model = build_model(config.model, "meta")
    assert len(model.layers) == config.model.n_layers
    assert sum(n for _, n in parameter_counts(model)) == sum(p.numel() for p in model.parameters())


@each_config
def test_a_shipped_config_is_planned(path, capsys):
    assert main(["plan", str(path)]) == 0
    c = load(path).train
    wanted = f"fit into {c.minutes:g} minutes" if not c.steps else f"the run: {c.steps:,} steps"
    assert wanted in capsys.readouterr().out


@each_config
def test_an_image_of_a_shipped_config_fits_into_its_rows(path):
    config = load(path)
    side, rest = divmod(config.data.image_size, config.model.patch_size)
    assert rest == 0
    assert side**2 + 4 <= config.train.seq_len  # <bos> <boi> ... <eoi> <eos>


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_config_has_the_size_in_its_name(path):
    named = float(re.fullmatch(r"paper-([\d.]+)b", path.stem).group(1))
    size = sum(n for _, n in parameter_counts(build_model(load(path).model, "meta"))) / 1e9
    assert size == pytest.approx(named, rel=0.05)
