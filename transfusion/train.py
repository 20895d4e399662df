"""Training of the model: what it learns from, and the gradients of a step; `loop.py` does the rest.

batch -> noise -> losses -> backward -> clip,      each a function of (config, step) alone
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion import checkpoint
from transfusion import config as configs
from transfusion.beginning import begin, prepare, same_tokens
from transfusion.codec.codec import Codec
from transfusion.codec.load import load_codec
from transfusion.context import Context
from transfusion.data.corpus import build_corpus
from transfusion.data.loader import Packer, load_batches, micro_batches
from transfusion.data.report import Lost
from transfusion.evals.config import EvalConfig
from transfusion.evals.documents import some_of
from transfusion.evals.editing import draw_last, edits, sheet_items
from transfusion.flops import count_packed
from transfusion.generate import Engine
from transfusion.llama import is_llama
from transfusion.loop import NO_ROOM, Step, Training, find_checkpoint, optional_sheet, restore, run_steps, start
from transfusion.loss import draw_noise, losses
from transfusion.model.float8 import use_float8
from transfusion.model.precision import empty_at_precision
from transfusion.model.recompute import recompute
from transfusion.model.transformer import Transfusion, build_model
from transfusion.optim import averaged, build_optimizers, clip_gradients, freeze, trained
from transfusion.parallel import Ranks, gather, join, room, scatter, shard
from transfusion.pretrained import TOKENIZER, find
from transfusion.run import (
    RunConfig,
    check_compile,
    check_vocabulary,
    format_of,
    pick_device,
    same_codec,
    stored_config,
    uses_bf16,
    uses_float8,
)
from transfusion.sequence import Batch
from transfusion.sheet import contact_sheet
from transfusion.tokenizer import Tokenizer
from transfusion.weights import trained_names, weights

CALIBRATION_STEPS = 8
SAMPLED = 12  # captions on a sample sheet


def train(config: RunConfig, run: Path, resume: bool = False) -> Path:
    """Trains the run to its last step, or to a signal, and returns its newest checkpoint.

    Under torchrun all ranks call it.
    """
    with join(config.parallel, pick_device(config.device)) as ranks:
        found = find_checkpoint(run, resume)
        step = checkpoint.step_of(found) if found else -1
        if ranks.most(step, -step) != [step, -step]:
            raise ValueError(f"the ranks see different checkpoints in {run}, this one {found}: is it a shared folder?")
        return train_with(ranks, config, run, found)


def train_with(ranks: Ranks, config: RunConfig, run: Path, found: Path | None) -> Path:
    """Trains the run from the checkpoint `found`, or from its beginning."""
    device = ranks.device
    float8, bf16 = uses_float8(config.train, device), uses_bf16(config.train.precision, device)
    check_compile(config.train, device.type)
    micro_batches(config.train.rows, config.train.micro_batch, ranks.rows[1])  # or they are refused before all else
    codec = load_codec(config.data.codec, device)
    config, tokenizer = prepare(config, codec, found)
    config, fmt = with_statistics(config, codec, found), format_of(config, tokenizer, codec)
    same_codec(codec, config.data)
    check_vocabulary(config, fmt)
    with ranks.lead_first():  # it encodes images, the others find them encoded
        corpus, reports = build_corpus(config.data, tokenizer, codec, fmt, config.train.seq_len)
    config = replace(config, data=corpus.config)
    for source, report in reports.items():
        print(f"{source}: {report.summary()}")
    print(corpus.summary())
    c, (n, at_once) = config.train, micro_batches(config.train.rows, config.train.micro_batch, ranks.rows[1])
    of_rank = f", {n * at_once} of them this rank's" if ranks.mesh else ""
    print(f"a step: {c.rows} rows of {c.seq_len} positions{of_rank}, {at_once} at once")
    model = build_model(config.model, "meta" if ranks.mesh else device)
    freeze(model, config.optim.freeze)
    if config.optim.freeze:
        some, all_of = (sum(p.numel() for p in ps) for ps in (trained(model), model.parameters()))
        print(f"{some:,} of {all_of:,} parameters train")
    if float8:
        use_float8(model.layers)
    recompute(model.layers, c.checkpointing)
    if c.compile:
        model.compile_layers()
    if ranks.mesh:
        shard(model, ranks, bf16)
    state = checkpoint.read_state(found) if found else {}
    since = (state["step"], state["data"]) if found else None
    packer = Packer(corpus, fmt, config.seed, c.rows, c.seq_len, c.micro_batch, *ranks.rows, since)
    if found:
        same_tokens(run, run / TOKENIZER, tokenizer)
        config = match_steps(config, state)
        training = restore(found, model, build_optimizers(model, config.optim), config)
    else:
        config, training = begun(model, config, tokenizer, packer, ranks)
    if ranks.leads:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(configs.to_toml(config))
        if not found:  # else it is there, and others may be reading it
            tokenizer.save(run / TOKENIZER)
        (run / "skipped.txt").write_text("".join(f"{source}\n{report.names()}" for source, report in reports.items()))
    ranks.meet()  # from here on steps are timed

    lost = Lost(run / "lost.txt", config.data.max_lost)

    def compute(step: int, micro: list[Batch]) -> Step:
        of_step = over(ranks, counts(micro, count_packed(config, micro, padding=False)))
        lm, image, norm = gradients(model, micro, config, step, of_step, ranks.context)
        lm, image = ranks.add(torch.stack([lm, image]))
        own = ranks.context is None or ranks.context.rank == 0  # of those that share rows, one tells
        lost.found([name for batch in micro for name in batch.lost if own], int(of_step.lost))

        def numbers() -> dict[str, float]:
            return {
                "lm_loss": lm.item() / max(1, of_step.targets),
                "image_loss": image.item() / of_step.images if of_step.images else math.nan,
                "grad_norm": norm.item(),
                "lost": lost.count,
            }

        seen = {"tokens": of_step.positions, "flops": of_step.flops}
        seen |= {"images": of_step.images} if of_step.images else {}
        return Step(norm + lm + image, seen, numbers)

    def sample(path: Path):
        with whole(model, training.ema, config, ranks) as drawing:
            if drawing is not None:
                with optional_sheet():
                    draw_samples(drawing, tokenizer, config, corpus, path)

    workers, pinned = config.data.workers, device.type == "cuda"
    batches = load_batches(packer, training.step, config.train.steps, workers, pin_memory=pinned)
    return run_steps(
        run, config, training, batches, compute, sample, lambda step: {"data": packer.cursors(step)}, ranks
    )


def begun(
    model: Transfusion, config: RunConfig, tokenizer: Tokenizer, packer: Packer, ranks: Ranks
) -> tuple[RunConfig, Training]:
    """A training at step 0, and its config with a number of steps: found by measuring, where it gives minutes."""
    fresh(model, config, tokenizer, ranks)
    if not config.train.steps:
        seconds, minutes = seconds_per_step(model, packer, config, ranks), config.train.minutes
        steps = max(1, int(60 * minutes / seconds))
        print(f"{seconds:.3f} s a step: {steps} steps in {minutes:g} minutes")
        config = replace(config, train=replace(config.train, steps=steps))
        with redirect_stdout(None):  # it has said what there is to say
            fresh(model, config, tokenizer, ranks)
    return config, start(model, build_optimizers(model, config.optim), config)


def fresh(model: Transfusion, config: RunConfig, tokenizer: Tokenizer, ranks: Ranks):
    """Gives the model the weights of step 0, drawn on a CPU: the same on any device, for any number of ranks."""
    if ranks.mesh is None and ranks.device.type == "cpu":
        begin(model, config, tokenizer)
        return
    drawn = None
    if ranks.leads:
        drawn = build_model(config.model, "meta").to_empty(device="cpu")
        begin(drawn, config, tokenizer)
    ranks.meet()
    scatter(drawn, model)


@contextmanager
def whole(
    model: Transfusion, ema: list[Tensor] | None, config: RunConfig, ranks: Ranks
) -> Iterator[Transfusion | None]:
    """The averaged model, to draw with; where it is spread over ranks a whole copy, on the rank that leads alone.

    That copy is in the precision that an engine draws in; None, on all ranks, where one of them has no room for it.
    """
    if ranks.mesh is None:
        with averaged(model, ema):
            yield model
        return
    held, drawing, lacks = weights(model) | dict(zip(trained_names(model), ema or [])), None, False
    dtype = torch.bfloat16 if uses_bf16(config.train.precision, ranks.device) else torch.float32
    try:
        if ranks.leads:
            drawing = empty_at_precision(config.model, dtype, ranks.device)
        room(held, ranks)
    except torch.OutOfMemoryError as error:
        drawing, lacks = None, True
        print(f"rank {ranks.rank}: {error}", file=sys.stderr)
    if ranks.most(lacks)[0]:  # known to all before they gather, as none may leave that halfway
        print(NO_ROOM.format("a rank has no room to gather the model"))
        yield None
        return
    gather(held, drawing)
    yield drawing
    ranks.wait()


class Counts(NamedTuple):
    """What micro-batches hold."""

    targets: float  # of the text
    images: float  # to be learned
    grids: float  # images, given ones too
    positions: float
    lost: float  # documents
    flops: float  # of what is learned from, padding left out; 0 = not counted


def counts(micro: list[Batch], flops: float = 0.0) -> Counts:
    of_batches = ((b.n_targets, b.n_images, len(b.grids), b.tokens.numel(), len(b.lost)) for b in micro)
    return Counts(*map(sum, zip(*of_batches)), flops)


def over(ranks: Ranks, of_one: Counts) -> Counts:
    """Those of all ranks; rows that several share count once."""
    share = ranks.context.size if ranks.context else 1
    return Counts(*(n / share for n in ranks.total(*of_one)))


def gradients(
    model: Transfusion,
    micro: list[Batch],
    config: RunConfig,
    step: int,
    of_step: Counts | None = None,
    context: Context | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(LM loss sum, image loss sum, gradient norm) of these micro-batches; leaves the clipped gradients in the model.

    Where they are a rank's part of the step, `of_step` are the counts of all ranks; the norm is of all ranks anyway.
    """
    of_step = of_step or counts(micro)
    device = model.norm.weight.device
    lm_sum, image_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    for p in model.parameters():
        p.grad = None
    for batch in micro:
        batch = batch.to(device)
        noise = draw_noise(batch, config.diffusion, config.seed, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config.train.precision, device)):
            lm, image = losses(model, batch, noise, config.diffusion, config.train.z_loss, context)
        if of_step.grids and not batch.grids:
            image = image + nothing_of(model)
        (lm / max(1, of_step.targets) + config.train.image_weight * image / max(1, of_step.images)).backward()
        lm_sum, image_sum = lm_sum + lm.detach(), image_sum + image.detach()
    return lm_sum, image_sum, clip_gradients(model, config.optim.clip)


def nothing_of(model: Transfusion) -> Tensor:
    """0, with a gradient of zeros for what only images go through: ranks add up gradients of the same weights."""
    parts = [m for m in (model.patches, model.refine) if m is not None]
    return sum((0 * p.sum() for m in parts for p in m.parameters() if p.requires_grad), torch.zeros(()))


def seconds_per_step(model: Transfusion, packer: Packer, config: RunConfig, ranks: Ranks) -> float:
    """Median seconds of a step here and now, of the slowest rank; moves the weights, which the caller draws anew."""
    seconds, optimizers = [], build_optimizers(model, config.optim)
    for step in range(CALIBRATION_STEPS):
        start = time.perf_counter()
        micro = packer.batches(step)
        gradients(model, micro, config, step, over(ranks, counts(micro)), ranks.context)[2].item()
        for optimizer in optimizers:
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return ranks.most(median(seconds[2:]))[0]  # the first ones compile


def with_statistics(config: RunConfig, codec: Codec, found: Path | None) -> RunConfig:
    """The config with the latents' statistics of the weights that the run goes on from, if it does and names none.

    A resumed run takes the key of its codec too, which `same_codec` then holds it to; one that begins with another
    model's weights may have a codec of its own.
    """
    if not (found or config.init) or (not found and is_llama(config.init)):
        return config
    began = stored_config(checkpoint.read_state(found)["config"], found) if found else find(config.init).config
    if not found and began.data.codec_key not in ("", codec.key):
        print(
            f"{config.init} has learned latents of other weights ({began.data.codec}) than those of "
            f"{config.data.codec}: its image path begins with what it knows of those"
        )
        return config
    own = config.data.latent_mean or config.model.patches == "codes"  # codes are not standardised
    names = ("codec_key",) if own else ("latent_mean", "latent_std", "codec_key")
    return replace(config, data=replace(config.data, **{name: getattr(began.data, name) for name in names}))


def match_steps(config: RunConfig, state: dict) -> RunConfig:
    """The config of a resumed run whose number of steps was found by measuring when it began."""
    began = state["config"]["train"]
    if config.train.steps:
        return config
    if config.train.minutes != began["minutes"]:
        raise ValueError(f"the run has {began['steps']} steps since it began: for another number, set train.steps")
    return replace(config, train=replace(config.train, steps=began["steps"]))


def few(items: Sequence) -> Sequence:
    """At most SAMPLED of the items, evenly spread."""
    return items[:: max(1, len(items) // SAMPLED)][:SAMPLED]


def draw_samples(model: Transfusion, tokenizer, config: RunConfig, corpus, path: Path):
    """A sheet of the same captions each time, drawn from the same noise, the real images beside them."""
    engine, captions = Engine(model, tokenizer, config, corpus.codec), corpus.captions["train"]
    documents = few(edits(corpus, least=1).get("train", []))
    if len(captions):
        chosen = few(range(len(captions)))
        read = [(i, one) for i, one in zip(chosen, captions.images.read(chosen)) if not isinstance(one, str)]
        texts = [captions.texts[i][0] for i, _ in read]
        items = [(text, [drawn, real]) for text, drawn, (_, real) in zip(texts, engine.draw(texts), read)]
    else:
        held, documents = some_of(corpus, documents, SAMPLED, 0)
        items = sheet_items(engine, held, documents, draw_last(engine, held, documents, EvalConfig()))
    if not items:
        return  # nothing that ends with an image to draw, or none that can be read
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(items).save(path)
