"""From a name to a codec: a run, a checkpoint, an export, one of diffusers; and what is said of what is none."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_hub import Hub
from test_train_codec import KL, VQ

from transfusion import hub
from transfusion.checkpoint import latest_checkpoint
from transfusion.codec.autoencoder import build_autoencoder
from transfusion.codec.discriminator import DiscriminatorConfig
from transfusion.codec.learned import AT_ONCE, by_parts, digest, learned_codec, tensor, to_bytes, to_tensor
from transfusion.codec.load import PRETRAINED, load_codec
from transfusion.config import to_dict
from transfusion.data.crops import CropConfig
from transfusion.export import export
from transfusion.metrics import MetricsConfig
from transfusion.optim import OptimConfig
from transfusion.train_codec import CodecRunConfig, CodecTrainConfig, LossConfig, train_codec
from transfusion.weights import load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[KL, VQ], ids=["kl", "vq"])
def run(request, tmp_path_factory):
    """A run of two steps, discriminator included."""
    folder = tmp_path_factory.mktemp("codec")
    config = CodecRunConfig(
        codec=request.param,
        loss=LossConfig(gan_start=1),
        discriminator=DiscriminatorConfig(8, 1),
        data=CropConfig(("emoji:base",), image_size=16),
        optim=OptimConfig(lr=1e-2, warmup_steps=1, ema=0.5),
        train=CodecTrainConfig(steps=2, batch=2, precision="fp32"),
        metrics=MetricsConfig(sinks=()),
        device="cpu",
    )
    train_codec(config, folder)
    return folder


def images(n=3, height=16, width=8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@torch.no_grad()
def test_a_run_is_the_codec_of_its_averaged_weights(run):
    step = latest_checkpoint(run / "checkpoints")
    codec = load_codec(str(run))
    config = KL if codec.codes == 0 else VQ
    model = build_autoencoder(config).eval()
    load_weights(model, step, prefix="autoencoder.")
    latent = model.latents(to_tensor(images(), CPU))
    z = codec.encode(images())
    np.testing.assert_allclose(z, latent.z.numpy(), rtol=1e-4, atol=1e-5)
    assert z.dtype == np.float32 and z.shape == (3, config.channels, 8, 4)
    assert (codec.channels, codec.factor) == (config.channels, 2)
    np.testing.assert_array_equal(codec.decode(z), to_bytes(model.decode(tensor(z, CPU))).numpy())
    assert codec.decode(z).shape == images().shape
    assert codec.key == load_codec(str(step)).key == digest(model)
    if codec.codes:
        np.testing.assert_array_equal(codec.quantize(z), latent.codes.numpy())
        np.testing.assert_allclose(codec.lookup(codec.quantize(z)), z, atol=1e-6)


def test_batches_of_any_size_are_encoded_image_by_image():
    torch.manual_seed(0)
    codec = learned_codec("some", build_autoencoder(KL))
    many = images(35)
    together = codec.encode(many)
    np.testing.assert_allclose(together[20:21], codec.encode(many[20:21]), rtol=1e-4, atol=1e-5)
    assert len(codec.decode(together)) == 35


def test_a_network_sees_a_few_images_at_once_and_an_empty_batch_too():
    sizes = []
    apply = by_parts(lambda batch: sizes.append(len(batch)) or tensor(batch, CPU))
    many = np.arange(2 * AT_ONCE + 3)
    assert np.array_equal(apply(many), many) and sizes == [AT_ONCE, AT_ONCE, 3]
    assert apply(many[:0]).shape == (0,)


def test_pixels_come_back_from_the_networks_range():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert np.array_equal(to_bytes(to_tensor(every, CPU)).numpy(), every)


def test_the_key_changes_with_any_weight():
    torch.manual_seed(0)
    model = build_autoencoder(KL)
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    assert digest(model) != before


def test_a_codec_that_is_pushed_to_the_hub_is_loaded_from_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "client", lambda: Hub(tmp_path / "there"))
    hub.push(export(run, tmp_path / "out", "fp32"), "me/codec")
    assert load_codec("hub:me/codec").key == load_codec(str(run)).key
    hub.push(run, "me/run")
    with pytest.raises(ValueError, match=r"hub:me/run has no config.json"):
        load_codec("hub:me/run")  # a checkpoint's metadata is a pickle


# ---- what is not there ----


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("pixel", "name pixels, a run"), ("pretrained:nothing", "shipped with this version"), ("vae:x", "name pixels")],
)
def test_a_codec_that_is_not_there_is_said_not_to_be(name, remedy):
    with pytest.raises(ValueError, match=remedy):
        load_codec(name)


def test_a_folder_that_is_no_codec_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint and no config"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "data": {"codec": "pixels"}}))
    with pytest.raises(ValueError, match="holds no codec"):
        load_codec(str(tmp_path))


def test_weights_of_another_size_do_not_fit(tmp_path):
    from safetensors.torch import save_file

    save_file(build_autoencoder(KL).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"codec": to_dict(replace(KL, width=16))}))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_codec(str(tmp_path))


# ---- diffusers ----


def saved(folder, kind: str, levels: int = 2):
    """A tiny random autoencoder of diffusers, as a folder; of DC's each level but the last halves the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    torch.manual_seed(0)
    options = {
        "AutoencoderKL": {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "latent_channels": 5,
        },
        "AutoencoderTiny": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                            "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 3,
                            "upsampling_scaling_factor": 2},
        "AutoencoderDC": {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels,
                          "encoder_layers_per_block": (1,) * levels, "decoder_layers_per_block": (1,) * levels,
                          "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
                          "encoder_qkv_multiscales": ((),) * levels, "decoder_qkv_multiscales": ((),) * levels,
                          "latent_channels": 4, "attention_head_dim": 4},
    }[kind]  # fmt: skip
    model = getattr(diffusers, kind)(**options).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
@pytest.mark.parametrize("where", ["", "vae"])
@torch.no_grad()
def test_an_autoencoder_of_diffusers_is_a_codec(kind, where, tmp_path):
    model = saved(tmp_path / where, kind)
    codec = load_codec(f"diffusers:{tmp_path}")
    x = to_tensor(images(2, 32, 16), CPU)
    out = model.encode(x)
    z = out.latent_dist.mean if kind == "AutoencoderKL" else out.latents if kind == "AutoencoderTiny" else out.latent
    found = codec.encode(images(2, 32, 16))
    np.testing.assert_allclose(found, z.numpy(), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, codec.channels, 32 // codec.factor, 16 // codec.factor)
    np.testing.assert_array_equal(codec.decode(found), to_bytes(model.decode(z).sample).numpy())
    assert codec.key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("levels", [1, 8])
def test_the_factor_is_told_up_to_that_of_the_deepest_published_autoencoder(levels, tmp_path):
    saved(tmp_path, "AutoencoderDC", levels)  # dc-ae-f128 has eight levels
    codec, factor = load_codec(f"diffusers:{tmp_path}"), 2 ** (levels - 1)
    assert (codec.factor, codec.channels) == (factor, 4)
    assert codec.encode(images(1, 2 * factor, factor)).shape == (1, 4, 2, 1)


@pytest.mark.filterwarnings("ignore")
def test_a_codec_of_our_own_behind_diffusers_is_refused_with_its_right_name(tmp_path):
    with pytest.raises(ValueError, match=r"does not name; known are AutoencoderKL.*goes by its folder alone"):
        load_codec(f"diffusers:{PRETRAINED / 'emoji'}")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_an_autoencoder_or_with_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no autoencoder"):
        load_codec(f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="of the kind UNet2DModel; known are AutoencoderKL"):
        load_codec(f"diffusers:{tmp_path}")
