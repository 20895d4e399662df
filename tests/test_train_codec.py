"""Training of a codec: bitwise resume, what is learned, and the gradients against autograd's own of the whole loss."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from test_train import Stop, assert_same_runs, records

from transfusion import config as configs
from transfusion import train_codec as loop
from transfusion.checkpoint import latest_checkpoint, read_state
from transfusion.codec.autoencoder import Autoencoder, CodecConfig
from transfusion.codec.discriminator import DiscriminatorConfig, hinge
from transfusion.codec.loss import LossConfig, Networks, build_distances, gradients
from transfusion.data.arrays import Held
from transfusion.data.crops import CropConfig, build_crops
from transfusion.metrics import MetricsConfig
from transfusion.optim import OptimConfig
from transfusion.train_codec import CodecRunConfig, CodecTrainConfig, codebook_use, train_codec
from transfusion.weights import read_weights

KL = CodecConfig("kl", 8, (1, 2), 1, groups=4, latent_channels=3)
VQ = replace(KL, bottleneck="vq", latent_channels=8, codes=16, code_dim=4)
NONE = build_distances(LossConfig(), "cpu")
TERMS = ["l1", "perceptual", "second", "bottleneck", "fooled", "hinge"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> CodecRunConfig:
    """A run of a few milliseconds a step, whose discriminator joins at step 3."""
    images = tmp_path_factory.mktemp("data") / "images"
    images.mkdir()
    for i in range(12):  # half of a colour of its own, half white: no caption, as none is needed
        picture = np.full((10, 10, 3), 255, np.uint8)
        picture[:, 5:] = 37 * i % 256, 91 * i % 256, 17 * i % 256
        PIL.Image.fromarray(np.rot90(picture, i).copy()).save(images / f"{i:03}.png")
    return CodecRunConfig(
        codec=KL,
        discriminator=DiscriminatorConfig(width=8, layers=1),
        loss=LossConfig(gan_start=3),
        data=CropConfig((str(images),), image_size=8, load_size=10, flips=0.5),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_steps=3, ema=0.9),
        train=CodecTrainConfig(steps=8, batch=4, precision="fp32", log_every=1, save_every=2, keep=99),
        metrics=MetricsConfig(sinks=("jsonl",)),
        device="cpu",
    )


def with_train(config: CodecRunConfig, **fields) -> CodecRunConfig:
    return replace(config, train=replace(config.train, **fields))


def cut(config, run, steps, monkeypatch):
    """Trains with the process dying in the middle of each of these steps, and resumes until the end."""
    compute = loop.gradients
    for at in steps:

        def dying(networks, images, eps, distances, config, step, autocast, at=at):
            if step == at:
                raise Stop
            return compute(networks, images, eps, distances, config, step, autocast)

        monkeypatch.setattr(loop, "gradients", dying)
        with pytest.raises(Stop):
            train_codec(config, run, resume=True)
    monkeypatch.setattr(loop, "gradients", compute)
    return train_codec(config, run, resume=True)


@pytest.mark.parametrize("codec", [KL, VQ], ids=["kl", "vq"])
def test_a_resumed_codec_run_is_bitwise_the_uninterrupted_one(tiny, tmp_path, monkeypatch, codec):
    config = with_train(replace(tiny, codec=codec), sample_every=3)
    torch.manual_seed(99)  # the process's own random state must not matter
    train_codec(config, tmp_path / "whole")
    torch.manual_seed(7)
    cut(config, tmp_path / "cut", [1, 2, 5, 7], monkeypatch)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    lines = records(tmp_path / "cut")
    assert [r["step"] for r in lines] == list(range(1, 9))
    assert all(set(TERMS) <= r.keys() for r in lines)
    assert [r["hinge"] > 0 for r in lines] == [step >= 3 for step in range(8)]


@pytest.mark.parametrize(("codec", "share"), [(KL, 0.7), (VQ, 0.95)], ids=["kl", "vq"])
def test_training_lowers_the_error_and_leaves_config_sheets_and_averages(tiny, tmp_path, codec, share):
    config = replace(tiny, codec=codec, loss=LossConfig(gan_start=55), optim=replace(tiny.optim, lr=5e-3))
    config = with_train(config, steps=60, save_every=0, sample_every=30)
    saved = train_codec(config, tmp_path)
    lines = records(tmp_path)
    assert sum(r["l1"] for r in lines[-5:]) < share * sum(r["l1"] for r in lines[:5])
    own, averages = (read_weights(saved, averaged) for averaged in (False, True))
    moved = [not torch.equal(own[name], averages[name]) for name in own if name.startswith("autoencoder.encoder")]
    assert sum(moved) > 0.9 * len(moved)
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == ["step_00000030.png", "step_00000060.png"]
    assert len(PIL.Image.open(tmp_path / "samples" / "step_00000060.png").convert("RGB").getcolors(10**6)) > 12
    assert configs.load_config(CodecRunConfig, tmp_path / "config.toml") == config
    if codec is VQ:
        assert 0 < lines[-1]["codes_used"] <= 1 <= lines[-1]["perplexity"] <= 16


def test_the_gradients_are_those_of_the_whole_loss_with_the_balance_held_fixed():
    torch.manual_seed(0)
    config = LossConfig(perceptual_weight=0.7, second_weight=0.2, gan_start=0, kl_weight=1e-3)
    networks = Networks(KL, config, DiscriminatorConfig(8, 1))
    images, eps = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    distances = [(0.7, lambda a, b: (a - b).square().mean()), (0.2, lambda a, b: (a - b).abs().sum())]
    terms, _, _ = gradients(networks, images, eps, distances, config, 0, nullcontext)
    found = {name: p.grad.clone() for name, p in networks.named_parameters()}

    networks.zero_grad()
    ae, d = networks.autoencoder, networks.discriminator
    latent = ae.quantize(ae.encode(images), eps)
    out = ae.decode(latent.z)
    rest = (out - images).abs().mean() + sum(w * distance(out, images) for w, distance in distances)
    fooled = d(out).mean()
    last = ae.decoder.conv_out.weight
    by = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rest, -fooled)]
    loss = rest - config.gan_weight * by[0] / by[1] * fooled + config.kl_weight * latent.cost
    wanted = dict(zip([n for n, _ in ae.named_parameters()], torch.autograd.grad(loss, list(ae.parameters()))))
    for name, grad in wanted.items():
        torch.testing.assert_close(found[f"autoencoder.{name}"], grad, rtol=1e-4, atol=1e-5)
    worst = hinge(d(images), d(out.detach()))
    for (name, _), grad in zip(d.named_parameters(), torch.autograd.grad(worst, list(d.parameters()))):
        torch.testing.assert_close(found[f"discriminator.{name}"], grad, rtol=1e-4, atol=1e-6)
    assert terms.hinge == pytest.approx(worst.item()) and terms.fooled == pytest.approx(fooled.item())


def test_before_its_step_the_discriminator_neither_learns_nor_is_heard():
    torch.manual_seed(0)
    config = LossConfig(gan_start=5)
    networks = Networks(KL, config, DiscriminatorConfig(8, 1))
    images, eps = torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    found = []
    for step in (4, 5):
        networks.zero_grad()
        gradients(networks, images, eps, NONE, config, step, nullcontext)
        found.append({name: p.grad for name, p in networks.named_parameters()})
    assert all(g is None for name, g in found[0].items() if name.startswith("discriminator."))
    assert all(g is not None for g in found[1].values())
    assert not torch.equal(*(f["autoencoder.decoder.conv_out.weight"] for f in found))


@pytest.mark.parametrize("codec", [KL, VQ], ids=["kl", "vq"])
def test_training_in_bf16_stays_near_training_in_fp32(tiny, tmp_path, codec):
    runs = {}
    for precision in ("fp32", "bf16"):
        train_codec(with_train(replace(tiny, codec=codec), steps=5, precision=precision), tmp_path / precision)
        runs[precision] = [r["l1"] for r in records(tmp_path / precision)]
    assert runs["bf16"] != runs["fp32"] and runs["bf16"] == pytest.approx(runs["fp32"], rel=0.1)


def test_a_run_without_a_discriminator_has_none(tiny, tmp_path):
    saved = train_codec(with_train(replace(tiny, loss=LossConfig(gan_weight=0.0)), steps=2), tmp_path)
    assert not any(name.startswith("discriminator") for name in read_weights(saved, averaged=False))


def test_a_step_without_a_finite_gradient_is_skipped_and_harms_no_code(tiny, tmp_path, monkeypatch):
    config = with_train(replace(tiny, codec=VQ), save_every=1)
    draw, made = loop.to_tensor, []

    def poisoned(images, device):
        made.append(1)
        return draw(images, device) * (float("nan") if len(made) == 4 else 1)

    monkeypatch.setattr(loop, "to_tensor", poisoned)
    train_codec(config, tmp_path)
    assert [r["skipped"] for r in records(tmp_path)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert all(
        p.isfinite().all() for p in read_weights(tmp_path / "checkpoints/step_00000004", averaged=False).values()
    )


def test_a_finished_codec_run_is_not_begun_again_and_resuming_does_nothing(tiny, tmp_path):
    saved = train_codec(tiny, tmp_path)
    assert train_codec(tiny, tmp_path, resume=True) == saved
    with pytest.raises(ValueError, match="--resume"):
        train_codec(tiny, tmp_path)
    assert read_state(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 8


def test_frozen_parts_are_refused():
    with pytest.raises(ValueError, match=r"optim\.freeze = \['patches'\]: a codec trains whole"):
        CodecRunConfig(optim=OptimConfig(freeze=("patches",)))


def test_an_image_size_that_is_no_multiple_of_a_cell_is_refused():
    with pytest.raises(ValueError, match=r"data.image_size = 60 is not a multiple of 8 pixels"):
        CodecRunConfig(data=CropConfig(image_size=60))


def test_the_use_of_a_codebook_is_its_share_and_its_perplexity():
    use = torch.tensor([2.0, 2.0, 0.0, 0.0])
    assert codebook_use(use) == pytest.approx({"codes_used": 0.5, "perplexity": 2.0})
    assert codebook_use(torch.ones(9)) == pytest.approx({"codes_used": 1.0, "perplexity": 9.0})


def test_a_sheet_of_images_of_which_none_can_be_read_is_left_out(tiny, tmp_path):
    class Gone(Held):
        def read(self, numbers):
            return ["gone" for _ in numbers]

    crops, _ = build_crops(tiny.data)
    gone = replace(crops, splits={split: Gone(list(of)) for split, of in crops.splits.items()})
    loop.draw_samples(Autoencoder(KL), gone, nullcontext, tmp_path / "samples/sheet.png")
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_are_named_counted_and_limited(tiny, tmp_path, monkeypatch):
    class Spoiled(Held):
        def read(self, numbers):
            return ["gone" if i == 2 else one for i, one in zip(numbers, super().read(numbers))]

    def spoiled(config):
        crops, reports = build_crops(config)
        return replace(crops, splits={split: Spoiled(list(of)) for split, of in crops.splits.items()}), reports

    monkeypatch.setattr(loop, "build_crops", spoiled)
    train_codec(tiny, tmp_path / "run")
    named = (tmp_path / "run/lost.txt").read_text().splitlines()
    assert len(named) in (2, 3) and set(named) == {"image 2: gone"}  # 32 images of 12 or fewer
    assert records(tmp_path / "run")[-1]["lost"] == len(named)
    with pytest.raises(ValueError, match=r"1 images could not be read, more than data.max_lost = 0: .*lost.txt names"):
        train_codec(replace(tiny, data=replace(tiny.data, max_lost=0)), tmp_path / "strict")
