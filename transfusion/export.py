"""A trained model or codec as one folder: model.safetensors (averaged weights), config.json, README.md, and of a model
its tokenizer.json, and codec/ where its codec lies in a folder of this machine.

Adapters are merged into the weights, so that every exported folder is one plain model, and lie in adapters/ beside it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from transfusion.adapters import merge, save_adapters
from transfusion.checkpoint import STATE, atomic_folder, read_state
from transfusion.codec.foreign import DIFFUSERS, local_folder
from transfusion.codec.load import find_codec, holds_codec
from transfusion.config import from_dict, to_dict, to_toml
from transfusion.model.lora import LoraConfig
from transfusion.model.paths import is_adapter
from transfusion.pretrained import CODEC, CONFIG, TOKENIZER, WEIGHTS, find
from transfusion.run import RunConfig
from transfusion.train_codec import CodecRunConfig
from transfusion.weights import read_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

CARD = """---
library_name: transfusion
license: {license}
---
# {name}

A Transfusion model (Zhou et al. 2024, arXiv 2408.11039): it writes text and draws images in one pass.

- parameters: {parameters:,}, stored as {dtype}
- data: images {images}; documents {documents}; text {text}
- training: {steps:,} steps of {positions:,} positions, seed {config.seed}

```
transfusion generate {address} "a red heart"
```

## Configuration

```toml
{toml}```
"""


CODEC_CARD = """---
library_name: transfusion
license: {license}
---
# {name}

An autoencoder for Transfusion (Zhou et al. 2024, arXiv 2408.11039) after Esser et al. 2021.

- latents: {config.codec.channels} numbers for {config.codec.factor} x {config.codec.factor} pixels
- parameters: {parameters:,}, stored as {dtype}
- data: images {images} at {config.data.image_size} pixels
- training: {steps:,} steps of {config.train.batch} images, seed {config.seed}

```
transfusion eval-codec {address}
transfusion train CONFIG.toml data.codec={address}
```

## Configuration

```toml
{toml}```
"""


class Parts(NamedTuple):
    """What the folder is made of."""

    weights: Path
    tensors: dict[str, Tensor]
    config: RunConfig | CodecRunConfig
    card: str
    tokenizer: Path | None = None
    codec: str = ""  # one that only this machine has
    adapters: dict[str, Tensor] | None = None
    lora: LoraConfig = LoraConfig()


def export(name: str | Path, out: Path, dtype: str = "bf16", license: str = "other", address: str = "") -> Path:
    """Writes the folder `out`, whole or not at all; raises ValueError where it exists already.

    `address` is what the model card loads it by; "" = the folder's name."""
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or name another folder")
    parts = codec_parts(name) if holds_codec(name) else model_parts(name)
    tensors = {key: parts.tensors.pop(key).to(DTYPES[dtype]) for key in list(parts.tensors)}  # never all of it twice
    config, saved = parts.config, parts.weights
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        if parts.tokenizer:
            shutil.copyfile(parts.tokenizer, folder / TOKENIZER)
        if parts.codec:
            copy_codec(parts.codec, folder / CODEC, license)
        if parts.adapters:
            save_adapters(parts.adapters, parts.lora, folder / "adapters")
        text = parts.card.format(
            license=license,
            name=out.name,
            address=address or out.name,
            parameters=sum(t.numel() for t in tensors.values()),
            dtype=dtype,
            steps=read_state(saved)["step"] if (saved / STATE).is_file() else config.train.steps,
            config=config,
            images=", ".join(config.data.images),
            toml=to_toml(config),
        )
        (folder / "README.md").write_text(text)
    return out


def copy_codec(name: str, out: Path, license: str):
    """Writes the codec of that name into the folder `out`, to the bit what the model learned its latents from."""
    foreign = local_folder(name)
    if foreign:
        shutil.copytree(foreign, out, ignore=shutil.ignore_patterns(".*"))
    else:
        export(name, out, "fp32", license)


def model_parts(name: str | Path) -> Parts:
    """Those of a trained model."""
    config, weights, tokenizer = find(name)
    # of this machine, and no business of who gets the model
    config, lora = replace(config, out="", init="", adapter="", device="auto"), config.model.lora
    card = CARD.replace("{positions:,}", f"{config.train.rows * config.train.seq_len:,}")
    for field in ("text", "documents"):
        card = card.replace(f"{{{field}}}", ", ".join(getattr(config.data, field)) or "none")
    tensors = read_weights(weights)
    codec, foreign = config.data.codec, local_folder(config.data.codec)
    if foreign or holds_codec(codec):
        config = replace(config, data=replace(config.data, codec=DIFFUSERS + CODEC if foreign else CODEC))
    else:
        if codec.startswith(DIFFUSERS):
            print(f"data.codec = {codec} is no folder here: it stays a name, to be found where the export is loaded")
        codec = ""
    if not lora.r:
        return Parts(weights, tensors, config, card, tokenizer, codec)
    adapters = {key: value for key, value in tensors.items() if is_adapter(key)}
    merged, model = merge(tensors, config.model)
    return Parts(weights, merged, replace(config, model=model), card, tokenizer, codec, adapters, lora)


def codec_parts(name: str | Path) -> Parts:
    """Those of a trained autoencoder, without its discriminator."""
    found = find_codec(name)
    weights, prefix = found.weights, found.prefix
    config = replace(from_dict(CodecRunConfig, found.config), out="", device="auto")
    tensors = {key.removeprefix(prefix): x for key, x in read_weights(weights).items() if key.startswith(prefix)}
    return Parts(weights, tensors, config, CODEC_CARD)
