"""Every shipped config: it loads, it is planned, its model or codec builds."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transfusion.checkpoint import differences
from transfusion.cli import main
from transfusion.codec.autoencoder import build_autoencoder
from transfusion.codec.bottleneck import COMMITMENT
from transfusion.codec.codec import PIXELS, patch_grid
from transfusion.codec.load import load_codec
from transfusion.codec.loss import Networks
from transfusion.config import load_config, to_dict
from transfusion.model.paths import is_adapter
from transfusion.model.transformer import SEPARABLE, build_model, parameter_counts
from transfusion.pretrained import find
from transfusion.run import RunConfig, resolve
from transfusion.train_codec import CodecRunConfig
from transfusion.weights import load_weights

FOLDER = Path(__file__).parents[1] / "configs"
CODECS = sorted(FOLDER.glob("codec-*.toml"))
CONFIGS = sorted(set(FOLDER.glob("*.toml")) - set(CODECS))
PAPER = {  # layers, width, heads; millions of parameters: the trunk, all with linear patches, 32,000 tokens, own head
    "0.16b": (16, 768, 12, 113.3, 162.4),
    "0.37b": (24, 1024, 16, 308.3, 373.9),
    "0.76b": (24, 1536, 24, 679.6, 777.9),
    "1.4b": (24, 2048, 16, 1233, 1364),
    "7b": (32, 4096, 32, 6476, 6738),
}
UNET = 270  # millions of parameters of the U-Net, at every size
KL = replace(PIXELS, name="codecs/kl-f8", channels=8, factor=8)  # stands for the paper's autoencoder, which is not here

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: Path) -> RunConfig:
    """The config, with what follows from tokenizer, codec and Llama filled in."""
    config = load_config(RunConfig, path)
    return resolve(config, KL if config.data.codec == KL.name else load_codec(config.data.codec))


def test_there_are_configs_to_test():
    papers = {f"paper-{size}-{patches}" for size in PAPER for patches in ("linear", "unet")}
    assert {"demo", "emoji", "mot", "lora", "lmfusion-smollm2", "codes", "anywhere", *papers} <= {
        path.stem for path in CONFIGS
    }


def test_the_discrete_baseline_is_the_studys_arm():
    arm = tomllib.loads((FOLDER.parent / "bench/studies/paper.toml").read_text())["arms"]["codes"]
    of_study = load_config(RunConfig, FOLDER / "study.toml", arm["set"])
    alone = load_config(RunConfig, FOLDER / "codes.toml")
    for part in ("model", "data", "optim", "sample"):
        differ = differences(to_dict(getattr(of_study, part)), to_dict(getattr(alone, part)))
        assert all(line.startswith(("steps", "solver", "t_shift")) for line in differ), differ  # of diffusion
    assert alone.train.z_loss == of_study.train.z_loss


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
    for size in config.data.sizes:
        rows, columns = patch_grid(size, config.data.factor, config.model.patch_size)
        assert rows * columns + 6 <= config.train.seq_len  # <bos> <boi> [sides] ... <eoi> <eos>
        assert max(rows, columns) <= config.model.sides or not config.model.sides


def test_the_shipped_model_lacks_nothing_that_lora_begins_with_but_the_adapters():
    config = load(FOLDER / "lora.toml")
    lacking = load_weights(build_model(config.model), find(config.init).weights, partly=True)
    assert lacking and all(map(is_adapter, lacking))


def test_mot_is_the_demo_with_a_second_path():
    demo, mot = (load(FOLDER / f"{name}.toml") for name in ("demo", "mot"))
    assert mot == replace(demo, model=replace(demo.model, separate=SEPARABLE))


@pytest.mark.parametrize("patches", ["linear", "unet"])
@pytest.mark.parametrize("size", PAPER)
def test_a_paper_config_has_the_sizes_of_the_papers_table(size, patches):
    config = load(FOLDER / f"paper-{size}-{patches}.toml")
    model, train = config.model, config.train
    n_layers, dim, n_heads, trunk, total = PAPER[size]
    assert (model.n_layers, model.dim, model.n_heads, model.vocab_size) == (n_layers, dim, n_heads, 32_000)
    assert (model.patches, model.channels, model.patch_size) == (patches, 8, 2)
    assert patch_grid((256, 256), config.data.factor, model.patch_size) == (16, 16)
    counts = {name: n / 1e6 for name, n in parameter_counts(build_model(model, "meta"))}
    assert counts["trunk"] == pytest.approx(trunk, rel=1e-3)
    if patches == "linear":
        assert sum(counts.values()) == pytest.approx(total, rel=0.01)
    else:
        assert counts["patches"] == pytest.approx(UNET, rel=0.05)
        assert counts["text embedding and head"] == 2 * 32_000 * dim / 1e6
    assert config.data.image_size == 256
    assert train.rows * train.seq_len == pytest.approx(2e6, rel=0.05)
    assert train.rows * train.seq_len * train.steps == pytest.approx(0.5e12, rel=0.05)
    assert train.seq_len % 128 == 0 and train.rows % train.micro_batch == 0


@pytest.mark.parametrize("size", PAPER)
def test_the_two_configs_of_a_size_differ_in_their_patches_alone(size):
    linear, unet = (load(FOLDER / f"paper-{size}-{patches}.toml") for patches in ("linear", "unet"))
    width, blocks = unet.model.unet_width, unet.model.unet_blocks
    assert unet == replace(linear, model=replace(linear.model, patches="unet", unet_width=width, unet_blocks=blocks))


@pytest.mark.parametrize("size", PAPER)
def test_a_paper_config_is_the_smallest_but_for_its_sizes_and_micro_batches(size):
    config, first = (load(FOLDER / f"paper-{name}-linear.toml") for name in (size, "0.16b"))
    sizes = {name: getattr(first.model, name) for name in ("dim", "n_layers", "n_heads")}
    train = replace(config.train, micro_batch=first.train.micro_batch)
    assert replace(config, model=replace(config.model, **sizes), train=train) == first


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_linear_patches_of_any_side_add_what_the_paper_prints(k):
    shares = {"0.16b": 0.5, "0.37b": 0.4, "0.76b": 0.4, "1.4b": 0.4, "7b": 0.3}  # percent, of its 2 x 2 patches
    for size, share in shares.items():
        model = replace(load(FOLDER / f"paper-{size}-linear.toml").model, patch_size=k)
        counts = dict(parameter_counts(build_model(model, "meta")))
        dim, patch = model.dim, 8 * k * k
        assert counts["patches"] == 2 * dim * patch + dim + patch + (257 + dim + 1) * dim  # each way, and the timestep
        if k == 2:
            assert round(100 * counts["patches"] / (sum(counts.values()) - counts["patches"]), 1) == share


# ---- codecs ----


@pytest.mark.parametrize("path", CODECS, ids=lambda path: path.stem)
def test_a_shipped_config_of_a_codec_builds_its_networks(path):
    config = load_config(CodecRunConfig, path)
    networks = Networks(config.codec, config.loss, config.discriminator, "meta")
    x = torch.empty(1, 3, config.data.image_size, config.data.image_size, device="meta")
    ae, side = networks.autoencoder, config.data.image_size // config.codec.factor
    assert ae.encode(x).shape[2:] == (side, side)
    assert ae.decode(torch.empty(1, config.codec.channels, side, side, device="meta")).shape == x.shape
    assert (networks.discriminator is None) == (config.loss.gan_weight == 0)


def test_the_papers_codecs_are_those_that_its_text_gives():
    kl, vq = (load_config(CodecRunConfig, FOLDER / f"codec-{name}-f8.toml") for name in ("kl", "vq"))
    assert {kl.out, vq.out} == {"codecs/kl-f8", "codecs/vq-f8"} and kl.out == KL.name
    for c in (kl, vq):
        assert (c.codec.factor, c.codec.channels) == (KL.factor, KL.channels)
        assert sum(p.numel() for p in build_autoencoder(c.codec, "meta").parameters()) == pytest.approx(86e6, rel=0.03)
        assert (c.train.steps, c.data.image_size, c.data.flips) == (1_000_000, 256, 0)
        assert (c.loss.gan_weight, c.loss.gan_start, c.loss.second_weight) == (0.5, 50_000, 0.2)
    assert kl.loss.kl_weight == 1e-6 and COMMITMENT == 0.25
    assert (vq.codec.codes, vq.codec.code_dim) == (16_384, 8)
