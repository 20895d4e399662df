"""The answers of transformers' Llama, of the same width, depth, heads and feed-forward: text alone.

Training is what its Trainer does by default, autocast and fused AdamW; writing is `generate` with its cache, of weights
in the precision of the case.
"""

import numpy as np
import torch
from answer import Repeat, facts_of, plain_training
from clock import Clock
from content import Case, Document, prompts
from ours import config_of
from transformers import LlamaConfig, LlamaForCausalLM


def build(case: Case) -> LlamaForCausalLM:
    """The model with fresh weights."""
    if case.images or case.image_in_prompt:
        raise ValueError("Llama reads text alone: set images=0")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.dim,
        intermediate_size=config_of(case).model.hidden_dim,
        num_hidden_layers=case.depth,
        num_attention_heads=case.heads,
        max_position_embeddings=max(2048, case.text_tokens, case.prompt + case.new),
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(case.device)


def training(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """A training step on rows of one document."""
    model = build(case)

    def batch_of(rows: list[list[Document]]) -> torch.Tensor:
        texts = [np.concatenate([part for document in row for part in document]) for row in rows]
        return torch.from_numpy(np.stack(texts)).to(case.device)

    return plain_training(case, clock, model, batch_of, lambda tokens: model(input_ids=tokens, labels=tokens).loss)


def writing(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """`new` tokens behind each of the prompts."""
    model = build(case).eval().to(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    options = {"max_new_tokens": case.new, "do_sample": True, "top_k": 0, "pad_token_id": 0}  # top_k: its default is 50

    def repeat(i: int):
        tokens = torch.from_numpy(np.stack([prompt[0] for prompt in prompts(case, i)])).to(case.device)
        torch.manual_seed(i)
        with clock("write"):
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert out.shape == (case.batch, case.prompt + case.new)

    return repeat, facts_of(model, tokens=case.batch * case.new)
