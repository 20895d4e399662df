"""Every shipped config: it loads, it is planned, its model builds."""

from dataclasses import replace
from pathlib import Path

import pytest

from transfusion.cli import main
from transfusion.config import load_config
from transfusion.model.transformer import build_model, parameter_counts
from transfusion.run import RunConfig
from transfusion.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
PAPER = {  # millions: the trunk; all, with a vocabulary of 32,000 and an untied head
    "paper-0.16b": (113.3, 162.4),
    "paper-0.37b": (308.3, 373.9),
    "paper-0.76b": (679.6, 777.9),
    "paper-1.4b": (1233, 1364),
    "paper-7b": (6476, 6738),
}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: Path) -> RunConfig:
    """The config, its vocabulary filled in."""
    config = load_config(RunConfig, path)
    size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    return replace(config, model=replace(config.model, vocab_size=size))


def test_there_are_configs_to_test():
    assert {"demo", "emoji", *PAPER} == {path.stem for path in CONFIGS}


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


@pytest.mark.parametrize("name, millions", PAPER.items(), ids=PAPER)
def test_a_paper_config_has_the_parameters_of_the_papers_table(name, millions):
    model = load(FOLDER / f"{name}.toml").model
    trunk = dict(parameter_counts(build_model(model, "meta")))["trunk"] / 1e6
    latents = replace(model, channels=8, patch_size=2)  # the paper's; our 16 x 16 pixels are 768 numbers instead of 32
    size, on_pixels = (sum(n for _, n in parameter_counts(build_model(m, "meta"))) / 1e6 for m in (latents, model))
    assert trunk == pytest.approx(millions[0], rel=1e-3)
    assert size == pytest.approx(millions[1], rel=0.01)
    assert on_pixels == pytest.approx(millions[1], rel=0.015)
