"""What a run begins with: the sizes, the tokens and the weights of step 0.

init = ""                     fresh weights, drawn from the seed
       a run or a model       its weights; what it lacks starts fresh
       hf:FOLDER, smollm2     a Llama in the text path
and then what patches have for themselves, where `init` lacks it, is a copy of the text path
"""

import re
from pathlib import Path

import torch

from transfusion import checkpoint
from transfusion import config as configs
from transfusion.adapters import load_adapters
from transfusion.codec.codec import Codec
from transfusion.llama import SIZES, folder_of, is_llama, load_llama
from transfusion.model.paths import is_adapter, text_twin
from transfusion.model.transformer import Transfusion
from transfusion.pretrained import TOKENIZER, find
from transfusion.run import RunConfig, load_own_tokenizer, resolve, stored_config, with_parts, with_sizes
from transfusion.tokenizer import Tokenizer, load_tokenizer
from transfusion.weights import load_weights


def prepare(config: RunConfig, codec: Codec, found: Path | None) -> tuple[RunConfig, Tokenizer]:
    """The config with its sizes filled in, and the tokenizer; a resumed run does without the Llama it began with."""
    if found is None or not is_llama(config.init):
        return resolve(config, codec), load_own_tokenizer(config)
    run = found.parents[1]
    began = stored_config(checkpoint.read_state(found)["config"], found).model
    names = (*SIZES, "rope_base", "rope_scaling")
    config = with_sizes(config, str(run), {name: getattr(began, name) for name in names})
    tokenizer = load_tokenizer(run / TOKENIZER)
    return with_parts(config, tokenizer.vocab_size, codec), tokenizer


def same_tokens(name: str | Path, file: Path, tokenizer: Tokenizer):
    """Raises ValueError where the model of that name was trained with other tokens, those of `file`."""
    if load_tokenizer(file).hf.get_vocab() != tokenizer.hf.get_vocab():
        raise ValueError(f"{name} was trained with other tokens: set data.tokenizer={file}")


def begin(model: Transfusion, config: RunConfig, tokenizer: Tokenizer):
    """Gives the model the weights of step 0, and prints where they differ from those of `init`."""
    if {"text", "image"} & set(config.optim.freeze) and not config.init:
        print(f"optim.freeze = {list(config.optim.freeze)} freezes random weights: set init to a trained model")
    torch.manual_seed(config.seed)
    model.init_weights()
    if config.init:
        take = take_llama if is_llama(config.init) else take_run
        lacking = take(model, config, tokenizer)
        copied = copy_twins(model, lacking)
        for name in dict.fromkeys(map(of_any_layer, lacking)):
            how = "begins as a copy of the text path's" if name in copied else "starts fresh"
            print(f"init: {name} is not in {config.init}, it {how}")
    if config.adapter:
        load_adapters(model, Path(config.adapter))


def take_run(model: Transfusion, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """The names of the weights that the model `init` lacks, after all others took its own."""
    trained = find(config.init)
    same_tokens(config.init, trained.tokenizer, tokenizer)
    parts = [{k: configs.to_dict(c)[k] for k in ("model", "diffusion")} for c in (trained.config, config)]
    for line in checkpoint.differences(*parts):
        print(f"init: {line}")
    return load_weights(model, trained.weights, partly=True)


def take_llama(model: Transfusion, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """The names of the weights that the Llama `init` lacks, after all others took its own."""
    same_tokens(config.init, folder_of(config.init) / TOKENIZER, tokenizer)
    return load_llama(model, config.init, tokenizer)


@torch.no_grad()
def copy_twins(model: Transfusion, names: list[str]) -> set[str]:
    """Fills the weights of these names that stand beside one of the text path; returns their names, of any layer."""
    own = dict(model.named_parameters())
    twins = {name: text_twin(name) for name in names if not is_adapter(name)}
    for name, twin in twins.items():
        if twin:
            own[name].copy_(own[twin])
    return {of_any_layer(name) for name, twin in twins.items() if twin}


def of_any_layer(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)
