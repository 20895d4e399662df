"""Codecs at the command line: train-codec, eval-codec, export; what the evaluation says of codecs known by heart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_run import stored, write_tiny

from transfusion.checkpoint import latest_checkpoint
from transfusion.cli import main
from transfusion.codec.codec import PIXELS
from transfusion.codec.load import load_codec
from transfusion.data.arrays import Held
from transfusion.data.crops import CropConfig, Crops
from transfusion.evals import reconstruction
from transfusion.evals.reconstruction import CodecEvalConfig, evaluate_codec
from transfusion.shards import write_shards


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("codec")).with_name("codec.toml")


@pytest.fixture(scope="module")
def trained(config) -> Path:
    run = config.parent / "run"
    assert main(["train-codec", str(config), f"out={run}", "seed=7"]) == 0
    return run


def crops() -> Crops:
    rng = np.random.default_rng(0)
    splits = {name: rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for name, n in (("train", 6), ("held_out_image", 3))}
    return Crops(CropConfig(image_size=16), {split: Held(images) for split, images in splits.items()})


def test_a_codec_that_loses_nothing_has_no_error_and_one_that_is_off_by_four_has_that():
    results = evaluate_codec(PIXELS, crops(), CodecEvalConfig(n_images=4))
    assert results["reconstruction/train/n"] == 4 and results["reconstruction/held_out_image/n"] == 3
    assert results["reconstruction/train/l1"] == 0 and results["reconstruction/train/ssim"] == pytest.approx(1)
    off = replace(PIXELS, decode=lambda z: np.where(PIXELS.decode(z) > 99, PIXELS.decode(z) - 4, PIXELS.decode(z) + 4))
    results = evaluate_codec(off, crops(), CodecEvalConfig(n_images=4))
    assert results["reconstruction/train/l1"] == pytest.approx(4 / 127.5)
    assert results["reconstruction/train/psnr"] == pytest.approx(10 * np.log10(255**2 / 16))
    assert results["reconstruction/train/ssim"] < 1


def test_a_split_that_cannot_be_read_is_passed_over(monkeypatch, capsys):
    spoiled = crops()
    monkeypatch.setattr(spoiled.splits["held_out_image"], "read", lambda numbers: ["gone"] * len(numbers))
    results = evaluate_codec(PIXELS, spoiled, CodecEvalConfig(n_images=4))
    assert {name.split("/")[1] for name in results} == {"train"}
    assert "3 of 3 images of held_out_image are passed over" in capsys.readouterr().err


def test_the_use_of_a_codebook_is_counted():
    codes = np.zeros((4, 16, 16), np.int64)
    codes[:, :8] = 3
    book = replace(PIXELS, codes=8, quantize=lambda z: codes[: len(z)])
    results = evaluate_codec(book, crops(), CodecEvalConfig(n_images=4))
    assert results["reconstruction/train/codes_used"] == pytest.approx(2 / 8)
    assert results["reconstruction/train/perplexity"] == pytest.approx(2)


def test_the_distance_in_features_is_that_of_both_sets(monkeypatch):
    given = []

    def features(images):
        given.append(images)
        return torch.from_numpy(images.reshape(len(images), -1)[:, :5].astype(np.float32))

    monkeypatch.setattr(reconstruction, "efficientnet", lambda weights, device: features)
    results = evaluate_codec(PIXELS, crops(), CodecEvalConfig(n_images=4, features="some.pth"))
    assert results["reconstruction/train/fd_effnet"] == pytest.approx(0, abs=1e-6)
    assert len(given) == 4


def test_eval_codec_prints_a_table_of_the_runs_own_data_and_writes_the_numbers_and_sheets(trained, tmp_path, capsys):
    file = tmp_path / "new" / "codec.json"
    assert main(["eval-codec", str(trained), "--json", str(file), "n_images=8", f"sheets={tmp_path}"]) == 0
    results, out = json.loads(file.read_text()), capsys.readouterr().out
    assert results["reconstruction/train/n"] == 8
    assert f"{results['reconstruction/train/psnr']:.4f}" in out and "PSNR, dB" in out
    with PIL.Image.open(tmp_path / "reconstructed_train.png") as sheet:
        assert sheet.width > 500


def test_eval_codec_takes_pixels_and_other_data(config, capsys):
    arguments = ["eval-codec", "pixels", f"data.images={config.parent / 'pictures'}", "data.image_size=16"]
    assert main([*arguments, "n_images=3"]) == 0
    assert "Reconstruction" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "checkpoint"])
def test_an_exported_codec_is_the_averaged_autoencoder_alone(trained, tmp_path, name):
    source, out = trained if name == "run" else latest_checkpoint(trained / "checkpoints"), tmp_path / "shared"
    assert main(["export", str(source), str(out), "--dtype", "fp32", "--license", "cc0-1.0"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    x = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    a, b = load_codec(str(trained)), load_codec(str(out))
    np.testing.assert_array_equal(a.encode(x), b.encode(x))
    assert a.key == b.key
    card = (out / "README.md").read_text()
    assert "license: cc0-1.0" in card and "3 numbers for 2 x 2 pixels" in card and "4 steps of 2 images" in card
    assert str(trained) not in (out / "config.json").read_text()


def test_resume_goes_on_and_a_second_start_is_refused(config, trained, capsys):
    assert main(["train-codec", str(config), f"out={trained}", "seed=7"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train-codec", str(config), "--resume", f"out={trained}", "seed=7", "train.steps=5"]) == 0
    assert latest_checkpoint(trained / "checkpoints").name == "step_00000005"


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["data.image_size=15"], "not a multiple of 2 pixels"),
        (["discriminator.layers=4"], "lower discriminator.layers"),
        (["loss.perceptual=vgg"], "choose one of efficientnet"),
        (["codec.bottleneck=vae"], "choose one of kl, vq"),
        (["codec.widht=4"], "did you mean codec.width?"),
    ],
)
def test_a_wrong_field_ends_in_one_line_with_the_remedy(config, tmp_path, capsys, overrides, remedy):
    assert main(["train-codec", str(config), f"out={tmp_path / 'r'}", *overrides]) == 2
    err = capsys.readouterr().err
    assert remedy in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_model_learns_to_draw_the_latents_of_a_codec_that_goes_with_it_and_no_other(
    config, trained, tmp_path, monkeypatch, capsys
):
    run, codec = tmp_path / "model", tmp_path / "codec"
    shutil.copytree(trained, codec)
    sizes = ["model.patch_size=4", "train.steps=2", f"data.codec={codec}", f"out={run}"]
    assert main(["train", str(config.parent / "tiny.toml"), *sizes]) == 0
    assert main(["generate", str(run), "red disc", "--out", str(tmp_path)]) == 0
    with PIL.Image.open(tmp_path / "red-disc.png") as drawn:
        assert drawn.size == (16, 16)
    assert main(["export", str(run), str(tmp_path / "exported"), "--dtype", "fp32"]) == 0
    newest = latest_checkpoint(codec / "checkpoints")
    other = {name: x + (name == "ema.autoencoder.decoder.conv_out.bias") for name, x in stored(newest).items()}
    (newest / ".metadata").unlink()
    write_shards(other, newest)  # of another training
    capsys.readouterr()
    assert main(["generate", str(run), "red disc", "--out", str(tmp_path)]) == 2
    assert "changed since the model learned its latents" in capsys.readouterr().err
    shutil.rmtree(codec)
    monkeypatch.chdir(tmp_path.parent)
    assert main(["generate", str(tmp_path / "exported"), "red disc", "--out", str(tmp_path)]) == 0
    one, other = (PIL.Image.open(tmp_path / name) for name in ("red-disc.png", "red-disc-2.png"))
    assert one.tobytes() == other.tobytes(), "the exported folder draws what the run drew"
