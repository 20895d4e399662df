"""Every shipped config: it loads, it is planned, its model builds."""

from dataclasses import replace
from pathlib import Path

import pytest

from transfusion.checkpoint import load_weights
from transfusion.cli import main
from transfusion.config import load_config
from transfusion.model.paths import is_adapter
from transfusion.model.transformer import SEPARABLE, build_model, parameter_counts
from transfusion.pretrained import find
from transfusion.run import RunConfig, resolve

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
PAPER = {  # layers, width, heads; millions of parameters: the trunk, all with 32,000 tokens and an untied head
    "paper-0.16b": (16, 768, 12, 113.3, 162.4),
    "paper-0.37b": (24, 1024, 16, 308.3, 373.9),
    "paper-0.76b": (24, 1536, 24, 679.6, 777.9),
    "paper-1.4b": (24, 2048, 16, 1233, 1364),
    "paper-7b": (32, 4096, 32, 6476, 6738),
}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: Path) -> RunConfig:
    """The config, its vocabulary and sizes filled in."""
    return resolve(load_config(RunConfig, path))


def test_there_are_configs_to_test():
    assert {"demo", "emoji", "mot", "lora", "lmfusion-smollm2", *PAPER} <= {path.stem for path in CONFIGS}


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


def test_the_shipped_model_lacks_nothing_that_lora_begins_with_but_the_adapters():
    config = load(FOLDER / "lora.toml")
    lacking = load_weights(build_model(config.model), find(config.init).weights, partly=True)
    assert lacking and all(map(is_adapter, lacking))


def test_mot_is_the_demo_with_a_second_path():
    demo, mot = (load(FOLDER / f"{name}.toml") for name in ("demo", "mot"))
    assert mot == replace(demo, model=replace(demo.model, separate=SEPARABLE))


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_has_the_sizes_of_the_papers_table(name):
    config = load_config(RunConfig, FOLDER / f"{name}.toml")
    model, train = config.model, config.train
    n_layers, dim, n_heads, trunk, total = PAPER[name]
    assert (model.n_layers, model.dim, model.n_heads, model.vocab_size) == (n_layers, dim, n_heads, 32_000)
    latents = replace(model, channels=8, patch_size=2)  # the paper's; our 16 x 16 pixels are 768 numbers instead of 32
    counts, on_pixels = (dict(parameter_counts(build_model(m, "meta"))) for m in (latents, model))
    assert counts["trunk"] / 1e6 == pytest.approx(trunk, rel=1e-3)
    assert sum(counts.values()) / 1e6 == pytest.approx(total, rel=0.01)
    assert sum(on_pixels.values()) / 1e6 == pytest.approx(total, rel=0.015)
    assert (config.data.image_size // model.patch_size) ** 2 == 256  # as 2 x 2 patches of a 32 x 32 latent
    assert train.rows * train.seq_len == pytest.approx(2e6, rel=0.05)
    assert train.rows * train.seq_len * train.steps == pytest.approx(0.5e12, rel=0.05)
    assert train.seq_len % 128 == 0 and train.rows % train.accumulate == 0
