"""The answers of this repository: its own `lay_out`, `collate`, `gradients`, optimizer and `Engine`, as they train and
sample everywhere else. Patches carry their row and column, as the peer's do; no average of the weights, as it has none.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from answer import Repeat, facts_of, in_parts
from clock import Clock, peak_flops
from content import Case, Document, content, prompts
from machine import ROOT

from transfusion import batching, train
from transfusion.cluster import Cluster
from transfusion.cluster import peak_flops as sheet_flops
from transfusion.codec.codec import Codec
from transfusion.config import load_config
from transfusion.data.documents import DataConfig
from transfusion.flops import count_packed
from transfusion.generate import Engine
from transfusion.memory import estimate_memory
from transfusion.model.float8 import use_float8
from transfusion.model.mask import BLOCK
from transfusion.model.transformer import ModelConfig, Transfusion, build_model
from transfusion.optim import OptimConfig, build_optimizers
from transfusion.parallel import ParallelConfig, Ranks, join, scatter, shard
from transfusion.run import RunConfig, SampleConfig, TrainConfig, uses_bf16, uses_float8
from transfusion.sequence import Batch, Format, Image, Segment, Special, Text, collate, lay_out

MARKERS = 6  # special tokens, behind those of the content
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def config_of(case: Case) -> RunConfig:
    """A run of the case's sizes."""
    vocab = case.vocab + MARKERS
    if case.config:
        model = replace(load_config(RunConfig, ROOT / case.config).model, vocab_size=vocab)
    else:
        model = ModelConfig(case.dim, case.depth, case.heads, vocab_size=vocab, patch_positions=True)
    cells = case.side * case.patch_size
    return RunConfig(
        device=case.device,
        model=replace(model, channels=case.channels, patch_size=case.patch_size),
        data=DataConfig(factor=1, image_size=cells),
        optim=OptimConfig(ema=0.0),
        train=TrainConfig(seq_len=1 << 20, precision=case.precision, compile=case.compile, float8=case.float8),
    )


def format_of(case: Case) -> Format:
    """How the content is written: markers have the ids behind it."""
    special = Special(*range(case.vocab, case.vocab + MARKERS))
    return Format(special, case.patch_size, text_tokens=case.vocab + MARKERS)


def segments(document: Document, fmt: Format, closed: bool = True) -> list[Segment]:
    """The document between <bos> and, where it is closed, <eos>."""
    parts = [Text(p) if p.ndim == 1 else Image(p) for p in document]
    return [Text(np.array([fmt.special.bos])), *parts, *[Text(np.array([fmt.special.eos]))] * closed]


def batch_of(case: Case, rows: list[list[Document]]) -> Batch:
    """The rows as a batch; FlexAttention gets whole tiles."""
    fmt = format_of(case)
    laid = [[lay_out(segments(document, fmt), fmt) for document in row] for row in rows]
    longest = max(sum(map(len, row)) for row in laid)
    if longest > (case.seq_len or longest):
        raise ValueError(f"a row takes {longest} positions, more than seq_len = {case.seq_len}: raise it")
    tile = BLOCK if case.compile and case.device == "cuda" else 1
    return collate(laid, case.seq_len or -(-longest // tile) * tile, fmt)


@cache
def one_rank(device: str) -> Ranks:
    """This process as the one rank that torchrun started, until it ends."""
    stack = ExitStack()
    with patch.dict(os.environ, ONE_RANK):
        ranks = stack.enter_context(join(ParallelConfig(timeout=1e6), device))
    atexit.register(stack.close)
    return ranks


def fresh(case: Case, config: RunConfig) -> Transfusion:
    """The model that trains, made ready as `transfusion train` does."""
    torch.manual_seed(0)
    drawn = build_model(config.model, "cpu" if case.fsdp else case.device)
    model = build_model(config.model, "meta") if case.fsdp else drawn
    on = torch.device(case.device)
    if uses_float8(config.train, on):
        use_float8(model.layers)
    if case.compile:
        model.compile_layers()
    if case.fsdp:
        shard(model, one_rank(case.device), uses_bf16(case.precision, on))
        scatter(drawn, model)
    return model


def planned(case: Case) -> float:
    """Bytes that `transfusion plan CONFIG --gpus 1` foresees for the case's rows, with these overrides."""
    share = case.documents * case.images * case.patches / case.seq_len
    ours = {"train.rows": case.rows, "train.seq_len": case.seq_len, "train.micro_batch": 0, "optim.ema": 0.0}
    ours |= {"train.compile": case.compile, "train.float8": case.float8, "data.image_share": share}
    overrides = [f"{name}={str(value).lower()}" for name, value in ours.items()]
    config = load_config(RunConfig, ROOT / case.config, overrides)
    return sum(estimate_memory(config, Cluster(), case.device).values())


def training(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """A whole training step: rows laid out, gradients, optimizer."""
    config = config_of(case)
    model = fresh(case, config)
    optimizers, losses = build_optimizers(model, config.optim), train.losses

    def timed_losses(*arguments):
        with clock("forward"):
            return losses(*arguments)

    def repeat(i: int):
        parts = in_parts(case, content(case, i))
        with clock("data"):
            micro = [batch_of(case, rows) for rows in parts]
        with clock("backward"), patch.object(train, "losses", timed_losses):
            found = train.gradients(model, micro, config, i)
        with clock("optimizer"):
            for optimizer in optimizers:
                optimizer.step()
        assert all(x.isfinite() for x in found), found

    facts = {
        "flops": lambda: count_packed(config, [batch_of(case, content(case, 0))]),
        "peak": lambda: peak_flops(case.peak, case.precision, case.device),
        "sheet": sheet_flops(torch.device(case.device)),
    }
    if case.config and case.seq_len:
        facts["planned"] = lambda: planned(case)
    return repeat, facts_of(model, **case.units) | facts


def engine_of(case: Case) -> Engine:
    """An engine of fresh weights whose codec hands latents through."""
    config, fmt = config_of(case), format_of(case)
    torch.manual_seed(0)
    model = build_model(config.model, case.device).eval()
    tokenizer = SimpleNamespace(special=fmt.special, vocab_size=fmt.text_tokens)
    codec = Codec("latents", case.channels, 1, None, encode=lambda x: x, decode=lambda x: x)
    return Engine(model, tokenizer, config, codec, case.compile)


def open_prompts(case: Case, i: int) -> list[list[Segment]]:
    """The documents that the prompts of a repetition begin."""
    fmt = format_of(case)
    return [segments(prompt, fmt, closed=False) for prompt in prompts(case, i)]


def drawing(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """An image behind each of the prompts."""
    engine = engine_of(case)
    sampling = SampleConfig(case.steps, "euler", case.guidance, batch=case.batch)

    def repeat(i: int):
        documents = open_prompts(case, i)
        with clock("draw"):
            drawn = engine.complete(documents, "draw", i, sampling)
        assert len(drawn) == case.batch
        assert all(is_drawn(case, x) for (x,) in drawn)

    return repeat, facts_of(engine.model, images=case.batch)


def is_drawn(case: Case, image: Image) -> bool:
    """Whether it has the case's size, and numbers everywhere."""
    return image.latents.shape[1] == case.side * case.patch_size and bool(np.isfinite(image.latents).all())


@contextmanager
def endless(engine: Engine) -> Iterator[None]:
    """No text ends before its last token, whatever fresh weights like."""
    allowed = batching.allowed

    def without_end(*arguments) -> torch.Tensor:
        tokens = allowed(*arguments).clone()
        tokens[engine.fmt.special.eos] = False
        return tokens

    with patch.object(batching, "allowed", without_end):
        yield


def writing(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """`new` tokens behind each of the prompts."""
    engine = engine_of(case)
    sampling = SampleConfig(guidance=1.0, max_tokens=case.new, batch=case.batch)

    def repeat(i: int):
        documents = open_prompts(case, i)
        with clock("write"), endless(engine):
            written = engine.complete(documents, "text", i, sampling)
        assert [len(x.ids) for (x,) in written] == [case.new] * case.batch

    return repeat, facts_of(engine.model, tokens=case.batch * case.new)


def requests(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """`batch` requests, writing and drawing in turn; `way` = "one by one": each waits for the one before it."""
    engine, together = engine_of(case), 1 if case.way == "one by one" else case.batch
    sampling = SampleConfig(case.steps, "euler", case.guidance, max_tokens=case.new, batch=together)

    def repeat(i: int):
        documents = open_prompts(case, i)
        with clock("answer"), endless(engine):
            company = engine.batching()
            asked = [engine.request(d, ("text", "draw")[j % 2], i + j, sampling) for j, d in enumerate(documents)]
            for r in asked:
                company.submit(r)
            while not all(r.done for r in asked):
                company.step()
        for r in asked:
            assert r.error is None, r.error
            (x,) = r.answer
            assert is_drawn(case, x) if r.mode == "draw" else len(x.ids) == case.new

    return repeat, facts_of(engine.model, requests=case.batch)
