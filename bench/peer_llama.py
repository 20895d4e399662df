"""The answers of transformers' Llama, of the same width, depth, heads and feed-forward: text alone.

Training is what its Trainer does by default, autocast and fused AdamW; writing is `generate` with its cache.
"""

from collections.abc import Callable

import numpy as np
import torch
from clock import Clock
from content import Case, content, prompts
from transformers import LlamaConfig, LlamaForCausalLM


def build(case: Case) -> LlamaForCausalLM:
    """The model with fresh weights."""
    if case.images or case.image_in_prompt:
        raise ValueError("Llama reads text alone: set images=0")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.dim,
        intermediate_size=-(-8 * case.dim // 3 // 256) * 256,
        num_hidden_layers=case.depth,
        num_attention_heads=case.heads,
        max_position_embeddings=max(2048, case.text_tokens, case.prompt + case.new),
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(case.device)


def facts(case: Case, model: LlamaForCausalLM, **units: int) -> dict:
    return {"units": units, "parameters": sum(p.numel() for p in model.parameters())}


def training(case: Case, clock: Clock) -> tuple[Callable[[int], None], dict]:
    """A training step on rows of one document."""
    model = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def repeat(i: int):
        rows = [np.concatenate([part for document in row for part in document]) for row in content(case, i)]
        with clock("data"):
            tokens = torch.from_numpy(np.stack(rows)).to(case.device)
        with clock("forward"), torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return repeat, facts(case, model, positions=case.rows * case.positions)


def writing(case: Case, clock: Clock) -> tuple[Callable[[int], None], dict]:
    """`new` tokens behind each of the prompts."""
    model = build(case).eval()

    def repeat(i: int):
        tokens = torch.from_numpy(np.stack([prompt[0] for prompt in prompts(case, i)])).to(case.device)
        torch.manual_seed(i)
        with clock("write"), torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=case.new, do_sample=True, pad_token_id=0
            )
        assert out.shape == (case.batch, case.prompt + case.new)

    return repeat, facts(case, model, tokens=case.batch * case.new)
