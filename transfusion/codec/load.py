"""From a name to a codec.

pixels                                   no codec: the latents are the pixels
runs/codec                               a train-codec run: its newest checkpoint's averaged weights
runs/codec/checkpoints/step_00001000     those of that checkpoint
exported/                                model.safetensors + config.json
hub:OWNER/NAME                           the same on the Hugging Face hub
pretrained:emoji, pretrained:emoji-vq    exported folders inside the package, of assets/codecs
diffusers:FOLDER                         an autoencoder of diffusers, from a folder or the hub
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transfusion import checkpoint
from transfusion.codec.autoencoder import CodecConfig, build_autoencoder
from transfusion.codec.codec import PIXELS, Codec
from transfusion.codec.foreign import DIFFUSERS, diffusers_codec
from transfusion.codec.learned import learned_codec
from transfusion.config import from_dict
from transfusion.hub import HUB, fetched
from transfusion.weights import load_weights

PRETRAINED = Path(__file__).parents[1] / "assets" / "codecs"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PART = "autoencoder."  # of a checkpoint's weights, which has a discriminator too


class TrainedCodec(NamedTuple):
    """Where the parts of a trained codec lie."""

    config: dict[str, Any]  # of the run
    weights: Path
    prefix: str  # of the autoencoder's weights in the file


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec of that name, its networks on `device`; ValueError says what is there instead."""
    if name == "pixels":
        return PIXELS
    if name.startswith(DIFFUSERS):
        return diffusers_codec(name, device)
    config, weights, prefix = find_codec(name)
    model = build_autoencoder(from_dict(CodecConfig, config["codec"]))
    load_weights(model, weights, prefix=prefix)
    return learned_codec(name, model.eval().requires_grad_(False).to(device))


def find_codec(name: str | Path) -> TrainedCodec:
    """The parts that a name stands for; ValueError says what is there instead."""
    folder = Path(name).expanduser()
    if str(name).startswith("pretrained:"):
        folder = PRETRAINED / str(name).removeprefix("pretrained:")
        if not folder.is_dir():
            there = ", ".join(f"pretrained:{p.name}" for p in sorted(PRETRAINED.glob("*"))) or "none"
            raise ValueError(f"there is no codec {name}; shipped with this version: {there}")
    elif str(name).startswith(HUB):
        folder = fetched(str(name))
    if not folder.is_dir():
        raise ValueError(
            f"there is no codec {str(name)!r}: name pixels, a run of train-codec, a checkpoint of it, an exported "
            "folder, hub:OWNER/NAME, pretrained:NAME or diffusers:FOLDER"
        )
    if (folder / CONFIG).is_file():
        return of_codec(folder, json.loads((folder / CONFIG).read_text()), folder / WEIGHTS, "")
    if str(name).startswith(HUB):  # checkpoints are read by pickle: only exported folders come from strangers
        raise ValueError(f"{name} has no {CONFIG}: it is no codec that `transfusion export --push` put there")
    step = checkpoint.newest(folder)
    if step is None:
        raise ValueError(f"{folder} holds no checkpoint and no {CONFIG}: it is no codec, or has saved nothing yet")
    return of_codec(folder, checkpoint.read_state(step)["config"], step, PART)


def of_codec(folder: Path, config: dict[str, Any], weights: Path, prefix: str) -> TrainedCodec:
    if "codec" not in config:
        raise ValueError(f"{folder} holds no codec: `transfusion train-codec` makes one")
    return TrainedCodec(config, weights, prefix)


def holds_codec(name: str | Path) -> bool:
    """Whether there is a codec in a folder of that name."""
    try:
        return Path(name).expanduser().is_dir() and bool(find_codec(str(name)))
    except ValueError:
        return False
