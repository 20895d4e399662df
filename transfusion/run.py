"""What a run is: its config, and the folder that it leaves.

RUN/config.toml       the resolved config          RUN/metrics.jsonl   one line a logged step
RUN/tokenizer.json    the tokenizer used           RUN/samples/*.png   drawings at intervals
RUN/skipped.txt       every input left out, and why
RUN/checkpoints/step_00001000/                     the last few, each complete or absent
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from transfusion.codec.codec import Codec
from transfusion.codec.load import load_codec
from transfusion.config import from_dict
from transfusion.data.documents import DataConfig
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.solver import SOLVERS
from transfusion.llama import TOKENIZER, folder_of, is_llama, sizes_of
from transfusion.metrics import MetricsConfig
from transfusion.model.float8 import MULTIPLE
from transfusion.model.recompute import MODES as RECOMPUTE
from transfusion.model.transformer import ModelConfig
from transfusion.optim import OptimConfig
from transfusion.parallel import ParallelConfig
from transfusion.sequence import Format
from transfusion.tokenizer import Tokenizer, load_tokenizer

PRECISIONS = ("auto", "bf16", "fp32")
FLOAT8 = (8, 9)  # the least capability of a GPU that multiplies it
UNUSED = 2  # times as many rows of the vocabulary as tokens are a mistake


@dataclass(frozen=True)
class TrainConfig:
    """The loop. A step takes `rows` rows of `seq_len` positions, `micro_batch` of them at once."""

    steps: int = 0  # 0 = as many as fit into `minutes` on this machine, found at the start by measuring
    minutes: float = 10.0  # of training; without effect where `steps` is given
    rows: int = 32
    seq_len: int = 256
    micro_batch: int = 0  # rows that a rank computes at once, at most; 0 = all of its own. Changes memory, no result
    image_weight: float = 5.0  # lambda
    z_loss: float = 0.0  # weight of log^2 Z of the text head, which keeps its logits from drifting (Chameleon: 1e-5)
    # bf16 = autocast with fp32 master weights; an engine samples with bf16 ones; auto = bf16 where the hardware has it
    precision: str = "auto"
    checkpointing: str = "none"  # activations: what a layer keeps for the way back; none, selective, full
    compile: bool = False  # torch.compile, block by block
    float8: bool = False  # the trunk's products, of a training in bf16 on a GPU that has them; sampling stays as it is
    log_every: int = 10  # steps, as all that follow; 0 = never
    sample_every: int = 0
    save_every: int = 500
    keep: int = 2  # checkpoints, and those whose step is a multiple of
    keep_every: int = 0  # 0 = of none
    save_async: bool = False  # write checkpoints while training goes on, from a copy in the host's memory
    max_bad_steps: int = 5  # stop after so many non-finite steps in a row

    def __post_init__(self):
        for name in ("rows", "seq_len", "max_bad_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: it must be at least 1")
        if self.steps < 0 or not (self.steps or self.minutes > 0):
            raise ValueError(f"train.steps = {self.steps}, train.minutes = {self.minutes}: one of them must be above 0")
        if self.micro_batch < 0:
            raise ValueError(f"train.micro_batch = {self.micro_batch}: rows at once, or 0 for all of a rank's")
        if self.checkpointing not in RECOMPUTE:
            raise ValueError(f"train.checkpointing = {self.checkpointing!r}: choose one of {', '.join(RECOMPUTE)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision = {self.precision!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class SampleConfig:
    """How the engine samples unless it is told otherwise."""

    steps: int = 50  # of the solver
    solver: str = "ddim"
    guidance: float = 3.0  # scale of the text; 1 = none
    image_guidance: float = 1.0  # scale of the images before the one that is drawn; 1 = none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guide only at these t
    renormalise: bool = False  # scale the guided prediction down to the norm of the conditional one
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
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"sample.guidance_interval = {low}, {high}: give two times, 0 <= from <= to <= 1")
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        if self.train.seq_len % self.parallel.context:
            raise ValueError(
                f"train.seq_len = {self.train.seq_len} does not part among parallel.context = {self.parallel.context} "
                "ranks: make it a multiple"
            )
        if self.model.lora.r:
            # patches go through the text path's matrices where they have no own
            wanted = {"text", *self.model.lora.paths}
            if not wanted <= set(self.optim.freeze):
                raise ValueError(
                    f"model.lora.r = {self.model.lora.r}, optim.freeze = {list(self.optim.freeze)}: adapters stand "
                    f"beside frozen weights: set optim.freeze={','.join(sorted(wanted | set(self.optim.freeze)))}"
                )
        elif self.adapter:
            raise ValueError(f"adapter = {self.adapter!r}, but model.lora.r is 0: set it and the rest of model.lora")
        if self.train.float8:
            m = self.model
            sizes = {"dim": m.dim, "ffn_dim": m.hidden_dim, "queries' width": m.n_heads * m.head_dim}
            sizes["keys' width"] = m.kv_heads * m.head_dim
            if wrong := [f"{name} = {size}" for name, size in sizes.items() if size % MULTIPLE]:
                raise ValueError(
                    f"train.float8 = true, and of the model {', '.join(wrong)}: products in float8 want multiples of "
                    f"{MULTIPLE}; choose other sizes, or set train.float8=false"
                )


def load_own_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the config names, else that of the Llama it begins with, else the shipped one."""
    if is_llama(config.init) and not config.data.tokenizer:
        return load_tokenizer(folder_of(config.init) / TOKENIZER)
    return load_tokenizer(config.data.tokenizer)


def codec_of(config: RunConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec of a run that has begun: its latents are standardised as in training."""
    codec = same_codec(load_codec(config.data.codec, device), config.data)
    return codec.standardised(config.data.latent_mean, config.data.latent_std)


def same_codec(codec: Codec, data: DataConfig) -> Codec:
    """The codec; ValueError if its weights are others than those that the run began with."""
    if data.codec_key not in ("", codec.key):
        raise ValueError(
            f"the weights of data.codec = {data.codec!r} changed since the model learned its latents: restore them, or "
            "begin a new run"
        )
    return codec


def check_vocabulary(config: RunConfig, fmt: Format) -> None:
    """ValueError where most rows of the vocabulary would never be used: the tokenizer that they are for is missing."""
    has, used = config.model.vocab_size, fmt.text_tokens + fmt.sides + fmt.codes
    if has > UNUSED * used:
        raise ValueError(
            f"model.vocab_size = {has}, and only {used} tokens are ever used: name the data.tokenizer that it is meant "
            f"for (now {config.data.tokenizer or 'the shipped one'}), or leave it out"
        )


def codes_of(config: RunConfig, codec: Codec) -> int:
    """How many codes of the codec are written as tokens."""
    if config.model.patches != "codes":
        return 0
    if not codec.codes:
        raise ValueError(
            f"model.patches = 'codes' wants a codec with a codebook, and {codec.name} has none: train one by "
            "`transfusion train-codec configs/codec-emoji-vq.toml`, or set data.codec=pretrained:emoji-vq"
        )
    return codec.codes


def format_of(config: RunConfig, tokenizer: Tokenizer, codec: Codec) -> Format:
    """How the run's sequences are written."""
    m, text_tokens = config.model, tokenizer.vocab_size
    return Format(tokenizer.special, m.patch_size, m.image_positions, text_tokens, m.sides, codes_of(config, codec))


def resolve(config: RunConfig, codec: Codec) -> RunConfig:
    """The config with what follows from the Llama that it begins with, tokenizer and codec; fetches nothing."""
    if not is_llama(config.init):
        return with_parts(config, load_tokenizer(config.data.tokenizer).vocab_size, codec)
    sizes = sizes_of(config.init, config.train.seq_len)
    text_tokens = sizes.pop("vocab_size")  # a least size: a run may have more tokens than the Llama has
    return with_parts(with_sizes(config, config.init, sizes), text_tokens, codec)


def with_sizes(config: RunConfig, source: str, sizes: dict[str, Any]) -> RunConfig:
    """The config with these sizes of the model where it has defaults; ValueError lists those that it sets otherwise."""
    now, default = vars(config.model), vars(ModelConfig())
    wrong = [f"model.{k} = {now[k]} instead of {v}" for k, v in sizes.items() if now[k] not in (v, default[k])]
    if wrong:
        raise ValueError(f"the sizes of {source} are others: {', '.join(wrong)}; leave them out to take its own")
    return replace(config, model=replace(config.model, **sizes))


def with_parts(config: RunConfig, text_tokens: int, codec: Codec) -> RunConfig:
    """The config with the vocabulary and the codec's sizes filled in; ValueError where it names something else."""
    model, data, codes = config.model, config.data, codes_of(config, codec)
    needed = text_tokens + model.sides + codes
    if model.vocab_size and model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size = {model.vocab_size}, {needed} tokens are needed: {text_tokens} of the tokenizer, "
            f"{model.sides} of sides, {codes} of codes; leave it out, or name a smaller data.tokenizer"
        )
    for name, has, wants in (
        ("model.channels", model.channels, codec.channels),
        ("data.factor", data.factor, codec.factor),
    ):
        if has not in (0, wants):
            raise ValueError(f"{name} = {has}, the codec {codec.name} has {wants}: leave it out, or name another codec")
    model = replace(model, vocab_size=model.vocab_size or needed, channels=codec.channels)
    return replace(config, model=model, data=replace(data, factor=codec.factor))


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


def stored_config(saved: dict[str, Any], path: str | Path) -> RunConfig:
    """The config of a run or an export as it was saved at `path`, also by versions that named `train.micro_batch`
    otherwise; ValueError where this version does not know it."""
    train = dict(saved.get("train", {}))
    parts = train.pop("accumulate", 1)
    if parts > 1:
        train["micro_batch"] = train.get("rows", TrainConfig.rows) // parts
    try:
        return from_dict(RunConfig, {**saved, "train": train})
    except ValueError as error:
        raise ValueError(f"{path} has no config of this version: {error}") from None


def check_compile(config: TrainConfig, on: str) -> None:
    """ValueError where a device of that type cannot compute compiled layers again."""
    if config.compile and config.checkpointing != "none" and on == "cpu":
        raise ValueError(
            f"train.compile = true, train.checkpointing = {config.checkpointing!r}: on a CPU attention stands "
            "outside of the compiled layers, and what is computed again must be whole: leave one of the two out"
        )


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: "auto" says yes where the hardware has instructions for them."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def uses_float8(config: TrainConfig, device: torch.device) -> bool:
    """Whether the trunk's products train in float8; ValueError where they cannot. A CPU can, slowly: to try it out.

    Only beside bfloat16: so an engine of such a model has matrices of its own (precision.py), which multiply as ever.
    """
    if not config.float8:
        return False
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ValueError(
            f"train.float8 = true: {name} multiplies no float8, as GPUs of capability {FLOAT8[0]}.{FLOAT8[1]} or more "
            "do (Ada, H100): set train.float8=false"
        )
    if not uses_bf16(config.precision, device):
        raise ValueError(
            f"train.float8 = true, train.precision = {config.precision!r}: all beside the trunk's products is to be "
            "in bfloat16, and would be in float32: set train.precision=bf16, or train.float8=false"
        )
    return True
