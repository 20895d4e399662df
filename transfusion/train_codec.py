"""Training of an autoencoder: what it learns from, and the gradients of a step; `loop.py` does the rest.

    images -> latents -> reconstruction -> losses -> backward -> clip,      each a function of (config, step) alone

The discriminator learns beside it, from the same reconstructions, in the same step.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transfusion import config as configs
from transfusion.codec.autoencoder import Autoencoder, CodecConfig
from transfusion.codec.bottleneck import UNUSED
from transfusion.codec.discriminator import DiscriminatorConfig
from transfusion.codec.foreign import DIFFUSERS
from transfusion.codec.learned import device_of, to_bytes, to_tensor
from transfusion.codec.load import find_codec
from transfusion.codec.loss import LossConfig, Networks, build_distances, gradients, reconstruct
from transfusion.data.crops import CropConfig, Crops, build_crops
from transfusion.data.report import Lost
from transfusion.loop import Step, find_checkpoint, optional_sheet, restore, run_steps, start
from transfusion.metrics import MetricsConfig
from transfusion.optim import OptimConfig, averaged, build_optimizers, clip_gradients
from transfusion.run import PRECISIONS, pick_device, uses_bf16
from transfusion.sheet import contact_sheet

SAMPLED = 12  # images of a split on a sheet


@dataclass(frozen=True)
class CodecTrainConfig:
    """The loop. A step takes `batch` images."""

    steps: int = 1_000_000
    batch: int = 16
    precision: str = "auto"  # bf16 = autocast with fp32 master weights; auto = bf16 where the hardware multiplies it
    log_every: int = 10  # steps, as all that follow; 0 = never
    sample_every: int = 0
    save_every: int = 500
    keep: int = 2  # checkpoints, and those whose step is a multiple of
    keep_every: int = 0  # 0 = of none
    save_async: bool = False  # write checkpoints while training goes on, from a copy in the host's memory
    max_bad_steps: int = 5  # stop after so many non-finite steps in a row

    def __post_init__(self):
        for name in ("steps", "batch", "max_bad_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: it must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision = {self.precision!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class CodecRunConfig:
    """Everything that decides what a run computes."""

    seed: int = 0
    out: str = ""  # run folder; "" = runs/NAME OF THE CONFIG
    device: str = "auto"  # auto = cuda, mps or cpu, the first that is there
    codec: CodecConfig = field(default_factory=CodecConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: CodecTrainConfig = field(default_factory=CodecTrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self):
        if self.optim.freeze:
            raise ValueError(f"optim.freeze = {list(self.optim.freeze)}: a codec trains whole, leave it out")
        if self.data.image_size % self.codec.factor:
            raise ValueError(
                f"data.image_size = {self.data.image_size} is not a multiple of {self.codec.factor} pixels, a cell of "
                f"the latents (codec.multipliers has {len(self.codec.multipliers)} levels): choose one that is"
            )
        least = 3 * 2**self.discriminator.layers
        if self.loss.gan_weight and self.data.image_size < least:
            raise ValueError(
                f"data.image_size = {self.data.image_size} is too small for a discriminator of "
                f"{self.discriminator.layers} layers, which wants {least}: lower discriminator.layers"
            )


def train_codec(config: CodecRunConfig, run: Path, resume: bool = False) -> Path:
    """Trains the run to its last step, or to a signal, and returns its newest checkpoint."""
    found = find_checkpoint(run, resume)
    device = torch.device(pick_device(config.device))
    distances = build_distances(config.loss, device)
    crops, reports = build_crops(config.data)
    for source, report in reports.items():
        print(f"{source}: {report.summary()}")
    held_out = sum(map(len, crops.splits.values())) - len(crops.splits["train"])
    print(f"to train on: {len(crops.splits['train'])} images; held out: {held_out}")

    torch.manual_seed(config.seed)
    networks = Networks(config.codec, config.loss, config.discriminator)
    networks.to(device, memory_format=torch.channels_last)
    optimizers = build_optimizers(networks, config.optim)
    training = restore(found, networks, optimizers, config) if found else start(networks, optimizers, config)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(configs.to_toml(config))
    (run / "skipped.txt").write_text("".join(f"{source}\n{report.names()}" for source, report in reports.items()))

    c, lost = config.train, Lost(run / "lost.txt", config.data.max_lost, "images")

    def autocast():
        bf16 = uses_bf16(c.precision, device)
        return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def compute(step: int, batch: np.ndarray) -> Step:
        networks.zero_grad()
        images = to_tensor(batch, device).contiguous(memory_format=torch.channels_last)
        eps = draw_eps(config, step, len(images)).to(device)
        terms, latent, vectors = gradients(networks, images, eps, distances, config.loss, step, autocast)
        revived = 0
        if latent.codes is not None and terms.l1.isfinite():
            revived = networks.autoencoder.quantize.revive(vectors, latent.codes, generator_of(config.seed, 1, step))
        norm = clip_gradients(networks.autoencoder, config.optim.clip)
        if networks.discriminator is not None and step >= config.loss.gan_start:
            norm = norm + 0 * clip_gradients(networks.discriminator, config.optim.clip)  # not finite if either is not

        def numbers() -> dict[str, float]:
            record = {name: x.item() for name, x in terms._asdict().items()}
            if latent.codes is not None:
                record |= {**codebook_use(networks.autoencoder.quantize.use), "revived": revived}
            return {**record, "grad_norm": norm.item(), "lost": lost.count}

        return Step(norm, {"images": len(images)}, numbers)

    def sample(path: Path):
        with averaged(networks, training.ema), optional_sheet():
            draw_samples(networks.autoencoder, crops, autocast, path)

    def batches() -> Iterator[np.ndarray]:
        for step in range(training.step, c.steps):
            images, names = crops.batch(config.seed, step, c.batch)
            lost.found(names, len(names))
            yield images

    return run_steps(run, config, training, batches(), compute, sample)


def data_of(name: str) -> CropConfig:
    """The data that a codec was trained on; the shipped drawings where its name does not tell."""
    if name == "pixels" or name.startswith(DIFFUSERS):
        return CropConfig()
    return configs.from_dict(CodecRunConfig, find_codec(name).config).data


def generator_of(*key: int) -> torch.Generator:
    """A generator on the CPU whose draws are a function of the key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def draw_eps(config: CodecRunConfig, step: int, n: int) -> Tensor:
    """[n, C, h, w] the noise of a step's latents."""
    side = config.data.image_size // config.codec.factor
    return torch.randn(n, config.codec.channels, side, side, generator=generator_of(config.seed, 0, step))


def codebook_use(use: Tensor) -> dict[str, float]:
    """The share of codes met at all lately, and the perplexity of all codes, from their use."""
    p = use / use.sum().clamp(min=1e-12)  # none is used before the first step
    perplexity = torch.special.entr(p).sum().exp().item()
    return {"codes_used": (use > UNUSED).float().mean().item(), "perplexity": perplexity}


@torch.no_grad()
def draw_samples(autoencoder: Autoencoder, crops: Crops, autocast, path: Path):
    """A sheet of the same images each time, originals beside reconstructions; held-out ones below."""
    items = []
    device = device_of(autoencoder)
    for split in crops.splits:
        originals = crops.centres(split, SAMPLED)
        if not len(originals):
            continue  # none of them can be read
        with autocast():
            made = to_bytes(reconstruct(autoencoder, to_tensor(originals, device))).cpu().numpy()
        items += [(split.replace("_", " "), pair) for pair in zip(originals, made)]
    if not items:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(items).save(path)
