"""A trained model as one folder: model.safetensors (averaged weights), config.json, tokenizer.json, README.md.

Adapters are merged into the weights, so that every exported folder is one plain model, and lie in adapters/ beside it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from transfusion.adapters import merge, save_adapters
from transfusion.checkpoint import STATE, atomic_folder, read_state
from transfusion.config import to_dict, to_toml
from transfusion.pretrained import CONFIG, TOKENIZER, WEIGHTS, find

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

CARD = """---
library_name: transfusion
license: {license}
---
# {name}

A Transfusion model (Zhou et al. 2024, arXiv 2408.11039): it writes text and draws images in one pass.

- parameters: {parameters:,}, stored as {dtype}
- data: images {images}; text {text}
- training: {steps:,} steps of {positions:,} positions, seed {seed}

```
transfusion generate {name} "a red heart"
```

## Configuration

```toml
{toml}```
"""


def export(name: str | Path, out: Path, dtype: str = "bf16", license: str = "other") -> Path:
    """Writes the folder `out`, whole or not at all; raises ValueError where it exists already."""
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or name another folder")
    config, weights, tokenizer = find(name)
    # of this machine, and no business of who gets the model
    config = replace(config, out="", init="", adapter="", device="auto")
    trained, lora = load_file(weights), config.model.lora
    tensors, model = merge(trained, config.model) if lora.r else (trained, config.model)
    tensors = {key: value.to(DTYPES[dtype]) for key, value in tensors.items()}
    config = replace(config, model=model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        if lora.r:
            save_adapters(trained, lora, folder / "adapters")
        card = CARD.format(
            license=license,
            name=out.name,
            parameters=sum(t.numel() for t in tensors.values()),
            dtype=dtype,
            images=", ".join(config.data.images),
            text=", ".join(config.data.text),
            steps=read_state(weights.parent)["step"] if (weights.parent / STATE).is_file() else config.train.steps,
            positions=config.train.rows * config.train.seq_len,
            seed=config.seed,
            toml=to_toml(config),
        )
        (folder / "README.md").write_text(card)
    return out
