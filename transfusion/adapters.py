"""Adapters as files, in the format of PEFT, and merged into the weights that they stand beside.

    FOLDER/text/adapter_config.json       r, lora_alpha, target_modules ...
    FOLDER/text/adapter_model.safetensors base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight ...
    FOLDER/image/                         the same for the patches' path

The text path is a Llama, so PEFT puts its adapter onto that Llama in transformers. Nothing but our trunk has a path for
patches; its adapter has the same form.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfusion.llama import their_name
from transfusion.model.lora import MODULE_OF, LoraConfig
from transfusion.model.paths import is_adapter, text_twin
from transfusion.model.transformer import PART, SEPARABLE, ModelConfig, Transfusion

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_name(name: str) -> str:
    """PEFT's name of an adapter's matrix, e.g. of layers.0.attention.wq.lora_A."""
    module, _, matrix = (text_twin(name) or name).rpartition(".")
    return f"base_model.model.{their_name(module)}.{matrix}.weight"


def peft_config(lora: LoraConfig) -> dict:
    """adapter_config.json; PEFT's defaults are left out."""
    modules = sorted(their_name(f"layers.0.{MODULE_OF[name]}.{name}").split(".")[-1] for name in lora.target_modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }


def adapters_of(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The adapter matrices of a path, by our name."""
    of_image = {name: bool(text_twin(name)) for name in tensors if is_adapter(name)}
    return {name: tensors[name] for name, image in of_image.items() if image == (path == "image")}


def save_adapters(tensors: dict[str, Tensor], lora: LoraConfig, folder: Path) -> None:
    """Writes FOLDER/text and FOLDER/image, as far as there are adapters, from a model's tensors by name."""
    for path in lora.paths:
        (folder / path).mkdir(parents=True)
        own = {peft_name(name): tensor.contiguous() for name, tensor in adapters_of(tensors, path).items()}
        save_file(own, folder / path / WEIGHTS, metadata={"format": "pt"})
        (folder / path / CONFIG).write_text(json.dumps(peft_config(lora), indent=1) + "\n")


@torch.no_grad()
def load_adapters(model: Transfusion, folder: Path) -> None:
    """Copies the adapters of FOLDER into the model; ValueError if they are of another shape or kind."""
    lora, wanted = model.config.lora, peft_config(model.config.lora)
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    for path in lora.paths:
        for file in (CONFIG, WEIGHTS):
            if not (folder / path / file).is_file():
                raise ValueError(f"there is no {folder / path / file}: model.lora.paths asks for it")
        there = json.loads((folder / path / CONFIG).read_text())
        there["target_modules"] = sorted(there.get("target_modules", []))
        # PEFT writes every field that it has; one that is set says that the adapter computes something else
        kinds = {name: there.get(name) for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")}
        wrong = [f"{name} = {value}" for name, value in kinds.items() if value]
        same = ("peft_type", "r", "lora_alpha", "target_modules", "bias")
        wrong += [f"{k} = {there.get(k)} instead of {wanted[k]}" for k in same if there.get(k) != wanted[k]]
        if wrong:
            raise ValueError(f"{folder / path / CONFIG} does not fit model.lora: {', '.join(wrong)}")
        loaded = load_file(folder / path / WEIGHTS)
        ours = {peft_name(name): p for name, p in adapters_of(own, path).items()}
        if {k: v.shape for k, v in loaded.items()} != {k: v.shape for k, v in ours.items()}:
            odd = sorted(k for k in loaded.keys() | ours.keys() if k not in loaded or k not in ours)
            raise ValueError(f"{folder / path / WEIGHTS} does not fit: {', '.join(odd[:3]) or 'it has other sizes'}")
        for name, p in ours.items():
            p.copy_(loaded[name])


def merge(tensors: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """The model without adapters that computes the same: W + alpha / r B A in place of W.

    Where both paths share a matrix and their adapters do not, each gets a matrix of its own. The weights are taken out
    of `tensors`, so that none is held twice.
    """
    adapted = {MODULE_OF[name] for name in config.lora.target_modules}
    shared = {module for module in adapted if PART[module] not in config.separate}
    if config.patches == "codes":  # all goes through the text path
        shared = set()
    separate = tuple(s for s in SEPARABLE if s in {*config.separate, *(PART[module] for module in shared)})
    merged = {name: tensors.pop(name) for name in list(tensors) if not is_adapter(name)}
    for name in list(merged):
        if any(f".{module}." in name for module in shared):
            merged[name.removesuffix("weight") + "image_weight"] = merged[name].clone()
    for path in config.lora.paths:
        for name, A in adapters_of(tensors, path).items():
            if name.endswith("A"):
                B, weight = tensors[name[:-1] + "B"], name.removesuffix("lora_A") + "weight"
                merged[weight] = merged[weight] + config.lora.alpha / config.lora.r * (B @ A)
    return merged, replace(config, separate=separate, lora=LoraConfig())
