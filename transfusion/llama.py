"""A trunk from a Llama checkpoint: a Hugging Face folder (config.json, *.safetensors, tokenizer.json) in our names.

    model.embed_tokens                      tok_embeddings
    model.layers.3.self_attn.q_proj         layers.3.attention.wq
    lm_head, or embed_tokens where tied     output

`init` names it, as "hf:FOLDER" or "smollm2". What our trunk has no word for is refused by its name, as a model that
computes something else would load without an error and talk nonsense.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from transfusion import smollm2
from transfusion.config import from_dict
from transfusion.model.rope import RopeScaling
from transfusion.model.transformer import Transfusion
from transfusion.tokenizer import NAMES, Tokenizer, load_tokenizer, read_tokenizer

PREFIX = "hf:"
CONFIG, TOKENIZER, INDEX = "config.json", "tokenizer.json", "model.safetensors.index.json"
THEIRS = {  # our module -> theirs
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
SIZES = {  # field of ModelConfig -> theirs
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
FOLLOWS = ("num_key_value_heads", "head_dim")  # from the others, where a config leaves them out
SCALED = {  # rope_type -> what says how its positions are scaled, as fields of RopeScaling
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def is_llama(init: str) -> bool:
    """Whether this `init` is a Llama checkpoint, and not a model of ours."""
    return init.startswith(PREFIX) or init == smollm2.NAME


def folder_of(init: str) -> Path:
    """The checkpoint's folder; "smollm2" is fetched at its first use."""
    return smollm2.fetch() if init == smollm2.NAME else Path(init.removeprefix(PREFIX)).expanduser()


def their_name(module: str) -> str:
    """Hugging Face's name of a module of the trunk."""
    if module.startswith("layers."):
        _, i, part = module.split(".", 2)
        return f"model.layers.{i}.{THEIRS[part]}"
    return THEIRS[module]


def sizes_of(init: str, seq_len: int) -> dict[str, Any]:
    """The checkpoint's sizes as fields of ModelConfig, our special tokens in its vocabulary; fetches nothing."""
    if init == smollm2.NAME:
        sizes = translate(smollm2.CONFIG, init, seq_len)
        return {**sizes, "vocab_size": sizes["vocab_size"] + len(NAMES)}
    folder = folder_of(init)
    sizes = translate(read_json(folder / CONFIG), str(folder / CONFIG), seq_len)
    return {**sizes, "vocab_size": max(sizes["vocab_size"], load_tokenizer(folder / TOKENIZER).vocab_size)}


def translate(theirs: dict[str, Any], source: str, seq_len: int) -> dict[str, Any]:
    """Their config as fields of ModelConfig; ValueError names what our trunk cannot be in rows of `seq_len`."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # transformers 4, 5
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    missing = [key for key in SIZES.values() if key not in (*theirs, *FOLLOWS)]
    if missing:
        raise ValueError(f"{source} has no {', '.join(missing)}: it is no config of a Llama")
    sizes = {ours: theirs.get(key) for ours, key in SIZES.items()}
    sizes["n_kv_heads"] = sizes["n_kv_heads"] or sizes["n_heads"]
    sizes["head_width"] = sizes["head_width"] or sizes["dim"] // sizes["n_heads"]
    kind, act = theirs.get("model_type"), theirs.get("hidden_act", "silu")
    window = theirs.get("sliding_window", 4096 if kind == "mistral" else None)  # no weight would show a wrong guess
    unsaid = [key for key in SCALED.get(rope_type, ()) if key not in rope]
    faults = {
        f"model_type = {kind}: only llama and mistral are this trunk": kind not in ("llama", "mistral"),
        f"rope_type = {rope_type}: only {', '.join(SCALED)} are here": rope_type not in SCALED,
        f"rope_type = {rope_type} without {', '.join(unsaid)}": bool(unsaid),
        "partial_rotary_factor: whole heads turn here": theirs.get("partial_rotary_factor", 1) != 1
        or rope.get("partial_rotary_factor", 1) != 1,
        "attention_bias: the matrices here have no biases": bool(theirs.get("attention_bias")),
        "mlp_bias: the matrices here have no biases": bool(theirs.get("mlp_bias")),
        f"hidden_act = {act}: only silu is here": act != "silu",
        f"sliding_window = {window}: attention here has no window, which is the same in rows of at most so many "
        f"positions: set train.seq_len={window} or less": window is not None and window < seq_len,
        "quantization_config: save it dequantised": "quantization_config" in theirs,
    }
    found = [fault for fault, there in faults.items() if there]
    if found:
        raise ValueError(f"{source} is of a model that cannot be loaded: {'; '.join(found)}")
    thetas = (
        part["rope_theta"] for part in (rope, theirs.get("rope_parameters") or {}, theirs) if "rope_theta" in part
    )
    theta = next(thetas, 10000.0)
    scaling = from_dict(RopeScaling, {key: rope[key] for key in SCALED[rope_type]})
    return {**sizes, "rope_base": float(theta), "rope_scaling": scaling, "qk_norm": False, "norm": "pre"}


@torch.no_grad()
def load_llama(model: Transfusion, init: str, tokenizer: Tokenizer) -> list[str]:
    """Copies the checkpoint into the model's text path; returns the names of the weights that it does not have.

    A tied head is untied by a copy. Tokens that the checkpoint does not know begin as the mean of its rows, <bos> and
    <eos> as those that its config names, so that a frozen text path knows them.
    """
    folder, own = folder_of(init), dict(model.named_parameters())
    ours_of = {f"{their_name(module)}.weight": f"{module}.weight" for module in modules(model)}
    of_tokens, found = ("tok_embeddings.weight", "output.weight"), {}
    for name, tensor in read_tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old checkpoints keep what follows from their config
        if name not in ours_of:
            raise ValueError(f"{folder} has {name}, which no Llama has")
        ours = ours_of[name]
        place = own[ours][: len(tensor)] if ours in of_tokens else own[ours]
        if place.shape != tensor.shape:
            raise ValueError(f"{folder}: {name} is {tuple(tensor.shape)}, its config says {tuple(place.shape)}")
        place.copy_(tensor)
        found[ours] = len(tensor)
    if read_json(folder / CONFIG).get("tie_word_embeddings") and "tok_embeddings.weight" in found:
        own["output.weight"].copy_(own["tok_embeddings.weight"])
        found["output.weight"] = found["tok_embeddings.weight"]
    missing = [name for name, ours in ours_of.items() if ours not in found]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: it is not whole")
    known = read_tokenizer(folder / TOKENIZER).get_vocab(with_added_tokens=True)
    for name in of_tokens:
        weight, n = own[name], found[name]
        new = {tokenizer.hf.token_to_id(token) for token in NAMES.values() if token not in known}
        weight[sorted(new.union(range(n, len(weight))))] = weight[:n].mean(0)
        for field in ("bos", "eos"):
            theirs = read_json(folder / CONFIG).get(f"{field}_token_id")  # Llama 3 has several that end a text
            theirs = theirs[0] if isinstance(theirs, list) else theirs
            if theirs is not None and NAMES[field] not in known:
                weight[getattr(tokenizer.special, field)] = weight[theirs]
    return [name for name in own if name not in found]


def modules(model: Transfusion) -> list[str]:
    """The names of the modules that a Llama has too."""
    parts = [part for part in THEIRS if "." in part or part.endswith("_norm")]
    layers = [f"layers.{i}.{part}" for i in range(model.config.n_layers) for part in parts]
    return ["tok_embeddings", *layers, "norm", "output"]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all shards; one tensor is in memory at a time."""
    if (folder / INDEX).is_file():
        files = sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        missing = [file.name for file in files if not file.is_file()] or ["*.safetensors"]
        raise ValueError(f"{folder} has no {', '.join(missing)}: download the whole checkpoint, as safetensors")
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safetensors.safe_open(file, "pt"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {file}: {PREFIX}FOLDER is a folder with {CONFIG} and {TOKENIZER}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
