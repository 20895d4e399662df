"""Training, read from the top: one loop, no trainer class, no callbacks.

    batch -> noise -> losses -> backward -> clip -> step -> average,   each a function of (config, step) alone,

so that a resumed run is bitwise the run that was never interrupted (on a CPU), with no random state to save.
"""

import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from transfusion import checkpoint
from transfusion import config as configs
from transfusion.beginning import begin, prepare, same_tokens
from transfusion.data.documents import build_corpus
from transfusion.data.loader import Packer, load_batches
from transfusion.generate import Engine
from transfusion.loss import draw_noise, losses
from transfusion.metrics import Run, open_metrics
from transfusion.model.transformer import Transfusion, build_model
from transfusion.optim import averaged, build_optimizers, clip_gradients, freeze, init_ema, set_lr, trained, update_ema
from transfusion.pretrained import TOKENIZER
from transfusion.run import RunConfig, pick_device, uses_bf16
from transfusion.sequence import Batch, Format
from transfusion.sheet import contact_sheet

CALIBRATION_STEPS = 8
SAMPLED = 12  # captions on a sample sheet


def train(config: RunConfig, run: Path, resume: bool = False) -> Path:
    """Trains the run to its last step, or to a signal, and returns its newest checkpoint."""
    checkpoints = run / "checkpoints"
    found = checkpoint.latest_checkpoint(checkpoints)
    if found and not resume:
        raise ValueError(f"{run} holds a run already: go on with it by --resume, or give another folder by out=FOLDER")
    config, tokenizer = prepare(config, run, found)
    device = torch.device(pick_device(config.device))
    fmt = Format(tokenizer.special, config.model.patch_size, config.model.image_positions)
    corpus, reports = build_corpus(config.data, tokenizer, config.model.patch_size, config.train.seq_len)
    for source, report in reports.items():
        print(f"{source}: {report.summary()}")
    held_out = sum(len(c) for c in corpus.captions.values()) - len(corpus.captions["train"])
    print(
        f"to train on: {len(corpus.captions['train'])} images, {len(corpus.works)} texts; "
        f"held out: {held_out} images, {len(corpus.held_out_text)} texts"
    )

    model = build_model(config.model, device)
    freeze(model, config.optim.freeze)
    if config.optim.freeze:
        n, all_n = (sum(p.numel() for p in ps) for ps in (trained(model), model.parameters()))
        print(f"{n:,} of {all_n:,} parameters train")
    if config.train.compile:
        model.compile_layers()
    optimizers = build_optimizers(model, config.optim)
    packer = Packer(corpus, fmt, config.seed, config.train.rows, config.train.seq_len, config.train.accumulate)
    first, skipped = 0, 0
    if found:
        same_tokens(run, run / TOKENIZER, tokenizer)
        config = match_steps(config, checkpoint.read_state(found))
        ema = init_ema(model) if config.optim.ema else None
        now = configs.to_dict(config)
        state = checkpoint.load_checkpoint(found, model=model, ema=ema, optimizers=optimizers, config=now)
        for line in checkpoint.differences(state["config"], now):
            print(f"config: {line}")
        first, skipped = state["step"], state["skipped"]
    else:
        if not config.train.steps:
            seconds = seconds_per_step(model, optimizers, packer, config)
            steps = max(1, int(60 * config.train.minutes / seconds))
            print(f"{seconds:.3f} s a step: {steps} steps in {config.train.minutes:g} minutes")
            config = replace(config, train=replace(config.train, steps=steps))
            optimizers = build_optimizers(model, config.optim)
        begin(model, config, tokenizer)
        ema = init_ema(model) if config.optim.ema else None
    c = config.train
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(configs.to_toml(config))
    tokenizer.save(run / TOKENIZER)
    (run / "skipped.txt").write_text("".join(f"{source}\n{report.names()}" for source, report in reports.items()))

    def save(step: int) -> Path:
        state = {"skipped": skipped, "config": configs.to_dict(config)}
        return checkpoint.save_checkpoint(
            checkpoints, step, model=model, ema=ema, optimizers=optimizers, state=state, keep=c.keep
        )

    bad_in_a_row, saved, images, positions, since = 0, found, 0, 0, time.perf_counter()
    batches = load_batches(packer, first, c.steps, config.data.workers, pin_memory=device.type == "cuda")
    folder = Run(run, first, c.steps, configs.to_dict(config), config.metrics.wandb_project)
    with open_metrics(config.metrics, folder) as log, stop_signals() as stopped:
        for step, micro in enumerate(batches, first):
            lr = set_lr(optimizers, step, c.steps, config.optim)
            lm, image, norm = gradients(model, micro, config, step)
            if torch.isfinite(norm + lm + image):
                for optimizer in optimizers:
                    optimizer.step()
                if ema is not None:
                    update_ema(ema, model, step, config.optim.ema)
                bad_in_a_row = 0
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
            done, n_images = step + 1, sum(b.n_images for b in micro)
            images, positions = images + n_images, positions + sum(b.tokens.numel() for b in micro)
            last = done == c.steps or bool(stopped)
            if every(c.log_every, done) or last or bad_in_a_row:
                seconds = time.perf_counter() - since
                record = {
                    "lm_loss": lm.item() / max(1, sum(b.n_targets for b in micro)),
                    "image_loss": image.item() / n_images if n_images else math.nan,
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "images_per_second": images / seconds,
                    "tokens_per_second": positions / seconds,
                    "skipped": skipped,
                }
                log(done, record)
                images, positions, since = 0, 0, time.perf_counter()
            if bad_in_a_row >= c.max_bad_steps:
                raise ValueError(
                    f"{bad_in_a_row} steps in a row without a finite gradient, the last of them step {step}: lower "
                    f"optim.lr (now {config.optim.lr:g}) or set train.precision=fp32; saved is {saved or 'nothing'}"
                )
            paused = time.perf_counter()
            if every(c.sample_every, done):
                with averaged(model, ema) if ema is not None else nullcontext():
                    draw_samples(model, tokenizer, config, corpus, run / "samples" / f"step_{done:08d}.png")
            if every(c.save_every, done) or last:
                saved = save(done)
            since += time.perf_counter() - paused  # sheets and checkpoints are no training
            if last:
                break
    if stopped:
        print(f"stopped by {stopped[0]} at step {done} of {c.steps}; --resume goes on from {saved}")
    return saved


def gradients(model: Transfusion, micro: list[Batch], config: RunConfig, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(LM loss sum, image loss sum, gradient norm) of a step; leaves the clipped gradients in the model."""
    device = model.norm.weight.device
    n_targets, n_images = sum(b.n_targets for b in micro), sum(b.n_images for b in micro)
    lm_sum, image_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    for p in model.parameters():
        p.grad = None
    row = 0
    for batch in micro:
        batch = batch.to(device)
        noise = draw_noise(batch, config.diffusion, config.seed, step, row)
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config.train.precision, device)):
            lm, image = losses(model, batch, noise, config.diffusion)
        (lm / max(1, n_targets) + config.train.image_weight * image / max(1, n_images)).backward()
        lm_sum, image_sum, row = lm_sum + lm.detach(), image_sum + image.detach(), row + len(batch.tokens)
    return lm_sum, image_sum, clip_gradients(model, config.optim.clip)


def seconds_per_step(model: Transfusion, optimizers: list, packer: Packer, config: RunConfig) -> float:
    """Median seconds of a step here and now; moves the weights, which the caller draws anew."""
    seconds = []
    for step in range(CALIBRATION_STEPS):
        start = time.perf_counter()
        gradients(model, packer.batches(step), config, step)[2].item()
        for optimizer in optimizers:
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])  # the first ones compile


def match_steps(config: RunConfig, state: dict) -> RunConfig:
    """The config of a resumed run whose number of steps was found by measuring when it began."""
    began = state["config"]["train"]
    if config.train.steps:
        return config
    if config.train.minutes != began["minutes"]:
        raise ValueError(f"the run has {began['steps']} steps since it began: for another number, set train.steps")
    return replace(config, train=replace(config.train, steps=began["steps"]))


def draw_samples(model: Transfusion, tokenizer, config: RunConfig, corpus, path: Path):
    """A sheet of the same captions each time, drawn from the same noise, the real images beside them."""
    captions = corpus.captions["train"]
    if not len(captions):
        return  # a run on text alone has nothing to draw
    chosen = range(0, len(captions), max(1, len(captions) // SAMPLED))[:SAMPLED]
    texts = [captions.texts[i][0] for i in chosen]
    drawn = Engine(model, tokenizer, config).draw(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([(t, [d, captions.images[i]]) for t, d, i in zip(texts, drawn, chosen)]).save(path)


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


class stop_signals(AbstractContextManager):
    """Inside: SIGINT and SIGTERM fill the list instead of killing; a second one kills."""

    def __enter__(self) -> list[str]:
        received: list[str] = []

        def receive(number, frame):
            received.append(signal.Signals(number).name)
            signal.signal(number, self.before[number])

        self.before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return received

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)
