"""What a run is: its config, and the folder that it leaves.

RUN/config.toml       the resolved config          RUN/metrics.jsonl   one line a logged step
RUN/tokenizer.json    the tokenizer used           RUN/samples/*.png   drawings at intervals
RUN/skipped.txt       every input left out, and why
RUN/checkpoints/step_00001000/                     the last few, each complete or absent
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from transfusion.codec import CODECS
from transfusion.data.documents import DataConfig
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.solver import SOLVERS
from transfusion.llama import TOKENIZER, folder_of, is_llama, sizes_of
from transfusion.metrics import MetricsConfig
from transfusion.model.transformer import ModelConfig
from transfusion.optim import OptimConfig
from transfusion.tokenizer import Tokenizer, load_tokenizer

PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. A step takes `rows` rows of `seq_len` positions, in `accumulate` micro-batches."""

    steps: int = 0  # 0 = as many as fit into `minutes` on this machine, found at the start by measuring
    minutes: float = 10.0  # of training; without effect where `steps` is given
    rows: int = 32
    seq_len: int = 256
    accumulate: int = 1
    image_weight: float = 5.0  # lambda
    precision: str = "auto"  # bf16 = autocast with fp32 master weights; auto = bf16 where the hardware multiplies it
    compile: bool = False  # torch.compile, block by block
    log_every: int = 10  # steps, as all that follow; 0 = never
    sample_every: int = 0
    save_every: int = 500
    keep: int = 2  # checkpoints
    max_bad_steps: int = 5  # stop after so many non-finite steps in a row

    def __post_init__(self):
        for name in ("rows", "seq_len", "accumulate", "max_bad_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: it must be at least 1")
        if self.steps < 0 or not (self.steps or self.minutes > 0):
            raise ValueError(f"train.steps = {self.steps}, train.minutes = {self.minutes}: one of them must be above 0")
        if self.rows % self.accumulate:
            raise ValueError(f"train.rows = {self.rows} is not a multiple of train.accumulate = {self.accumulate}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision = {self.precision!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class SampleConfig:
    """How the engine samples unless it is told otherwise."""

    steps: int = 50  # of the solver
    solver: str = "ddim"
    guidance: float = 3.0  # 1 = none
    t_shift: float = 1.0  # > 1 spends more of the steps on noisy images
    temperature: float = 1.0  # of text; 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    max_tokens: int = 256
    max_images: int = 1
    batch: int = 64  # prompts side by side, as memory allows; changes results by rounding only

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"sample.solver = {self.solver!r}: choose one of {', '.join(SOLVERS)}")
        if self.steps < 1:
            raise ValueError(f"sample.steps = {self.steps}: at least 1 step leads from noise to an image")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("sampling wants temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if self.max_tokens < 1 or self.max_images < 0 or self.batch < 1:
            raise ValueError("sampling wants max_tokens >= 1, max_images >= 0 and batch >= 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    seed: int = 0
    out: str = ""  # run folder; "" = runs/NAME OF THE CONFIG
    init: str = ""  # weights to begin with: a model as `transfusion generate` takes it, hf:FOLDER, smollm2; "" = fresh
    adapter: str = ""  # a folder of adapters to begin with, as `transfusion export` writes it; "" = fresh ones
    device: str = "auto"  # auto = cuda, mps or cpu, the first that is there
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self):
        codec, model = CODECS[self.data.codec], self.model
        if model.channels != codec.channels:
            raise ValueError(
                f"model.channels = {model.channels}, the codec {codec.name} has {codec.channels}: set those"
            )
        if model.lora.r:
            wanted = {"text", *model.lora.paths}  # patches go through the text path's matrices where they have no own
            if not wanted <= set(self.optim.freeze):
                raise ValueError(
                    f"model.lora.r = {model.lora.r}, optim.freeze = {list(self.optim.freeze)}: adapters stand beside "
                    f"frozen weights: set optim.freeze={','.join(sorted(wanted | set(self.optim.freeze)))}"
                )
        elif self.adapter:
            raise ValueError(f"adapter = {self.adapter!r}, but model.lora.r is 0: set it and the rest of model.lora")


def load_own_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the config names, else that of the Llama it begins with, else the shipped one."""
    if is_llama(config.init) and not config.data.tokenizer:
        return load_tokenizer(folder_of(config.init) / TOKENIZER)
    return load_tokenizer(config.data.tokenizer)


def resolve(config: RunConfig) -> RunConfig:
    """The config with the sizes of the Llama that it begins with and the vocabulary filled in; fetches nothing."""
    if not is_llama(config.init):
        return with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size)
    sizes = sizes_of(config.init)
    return with_vocabulary(with_sizes(config, config.init, sizes), sizes["vocab_size"])


def with_sizes(config: RunConfig, source: str, sizes: dict[str, Any]) -> RunConfig:
    """The config with these sizes of the model where it has defaults; ValueError lists those that it sets otherwise."""
    now, default = vars(config.model), vars(ModelConfig())
    sizes = {name: size for name, size in sizes.items() if name != "vocab_size"}
    wrong = [f"model.{k} = {now[k]} instead of {v}" for k, v in sizes.items() if now[k] not in (v, default[k])]
    if wrong:
        raise ValueError(f"the sizes of {source} are others: {', '.join(wrong)}; leave them out to take its own")
    return replace(config, model=replace(config.model, **sizes))


def with_vocabulary(config: RunConfig, tokens: int) -> RunConfig:
    """The config with a vocabulary of `tokens` where it names none; ValueError if it names a smaller one."""
    if config.model.vocab_size and config.model.vocab_size < tokens:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size}, the tokenizer has {tokens} tokens: leave it out, or name "
            "a smaller data.tokenizer"
        )
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or tokens))


def pick_device(name: str) -> str:
    """The device of a name; "auto" is the first of cuda, mps and cpu that is there."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device = {name!r} is not to be had here ({str(error).splitlines()[0]}): try device=cpu"
            ) from None
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: "auto" says yes where the hardware has instructions for them."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
