"""From a name to an engine: a run folder, a checkpoint, an exported folder, here or on the Hugging Face hub, or a model
that ships with the package.

runs/demo                                    the newest checkpoint's averaged weights
runs/demo/checkpoints/step_00001000          those of that checkpoint
exported/                                    model.safetensors + config.json + tokenizer.json, and codec/ if it has one
hub:OWNER/NAME                               the same on the hub, as `transfusion export --push` puts it there
pretrained:emoji                             an exported folder inside the package
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from transfusion import checkpoint
from transfusion.codec.foreign import DIFFUSERS
from transfusion.generate import Engine
from transfusion.hub import HUB, fetched
from transfusion.model.transformer import build_model
from transfusion.run import RunConfig, pick_device, stored_config
from transfusion.tokenizer import load_tokenizer
from transfusion.weights import load_weights

PRETRAINED = Path(__file__).parent / "assets" / "pretrained"
CONFIG, WEIGHTS, TOKENIZER, CODEC = "config.json", "model.safetensors", "tokenizer.json", "codec"


class Trained(NamedTuple):
    """Where the parts of a trained model lie."""

    config: RunConfig
    weights: Path
    tokenizer: Path


def find(name: str | Path) -> Trained:
    """The parts that a name stands for; ValueError says what is there instead."""
    if str(name).startswith("pretrained:"):
        folder = PRETRAINED / str(name).removeprefix("pretrained:")
        if not folder.is_dir():
            there = ", ".join(f"pretrained:{p.name}" for p in sorted(PRETRAINED.glob("*"))) or "none"
            raise ValueError(f"there is no {name}; shipped with this version: {there}")
    elif str(name).startswith(HUB):
        folder = fetched(str(name))
    else:
        folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}: name a run, a checkpoint, an exported folder, hub:OWNER/NAME or "
            "pretrained:NAME"
        )
    if (folder / CONFIG).is_file():
        try:
            saved = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} is damaged: {error}; export the model again") from None
        config = stored_config(saved, folder / CONFIG)
        for file in (WEIGHTS, TOKENIZER):
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}: export the model again")
        if (folder / CODEC).is_dir():
            kind = DIFFUSERS if config.data.codec.startswith(DIFFUSERS) else ""
            config = replace(config, data=replace(config.data, codec=f"{kind}{folder / CODEC}"))
        return Trained(config, folder / WEIGHTS, folder / TOKENIZER)
    if str(name).startswith(HUB):  # checkpoints are read by pickle: only exported folders come from strangers
        raise ValueError(f"{name} has no {CONFIG}: it is no model that `transfusion export --push` put there")
    step = checkpoint.newest(folder)
    if step is None:
        raise ValueError(
            f"{folder} holds no checkpoint and no {CONFIG}: it is no run, or the run has saved nothing yet"
        )
    config = stored_config(checkpoint.read_state(step)["config"], step)
    return Trained(config, step, step.resolve().parents[1] / TOKENIZER)


def load(name: str | Path, device: str = "auto", precision: str = "", compile: bool = False) -> Engine:
    """The engine of a trained model, on `device` ("auto": cuda, mps or cpu, the first that is there).

    `precision` is that of its products, "auto", "bf16" or "fp32"; "" = the run's `train.precision`.
    `compile`: compile the model's layers, which takes minutes in the first answers and makes later ones faster.
    """
    config, weights, tokenizer = find(name)
    if precision:
        config = replace(config, train=replace(config.train, precision=precision))
    model = build_model(config.model, torch.device(pick_device(device)))
    load_weights(model, weights)
    return Engine(model, load_tokenizer(str(tokenizer)), config, compile=compile)
