"""What a run will need, from its config alone, as tables: nothing is read but the config, nothing is computed with.

parameters, FLOPs of a step (`flops.py`), memory (`memory.py`); for many GPUs (`cluster.py`) also time and traffic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transfusion.cluster import GPUS, Cluster, hidden_up_to, traffic
from transfusion.data.loader import micro_batches
from transfusion.flops import count_6nd, count_flops, count_images, grid_of, parameters_of
from transfusion.memory import drawing_memory, estimate_memory
from transfusion.model.recompute import MODES
from transfusion.model.transformer import build_model
from transfusion.optim import freeze, trained
from transfusion.run import RunConfig, check_compile

FITS = 0.9  # of a GPU's memory: the rest is for CUDA, NCCL and what the allocator cannot use


def plan(config: RunConfig) -> str:
    """The plan for one device."""
    on, p = "cpu" if config.device == "cpu" else "cuda", config.parallel
    check_compile(config.train, on)
    if p.shards or p.context > 1:
        raise ValueError(f"parallel.shards = {p.shards}, parallel.context = {p.context}: say how many ranks by --gpus")
    memory, (size, of) = estimate_memory(config, on=on), unit(config)
    return "\n".join(
        [
            *head(config),
            *rows(f"memory of one device ({on})", memory, 2**20, "MiB"),
            length_of(config),
            f"a step counted as the paper counts, 6 N D: {count_6nd(config) / size:,.2f} {of}",
        ]
    )


def head(config: RunConfig) -> list[str]:
    """What does not depend on the devices."""
    return [
        *rows("parameters", parameters_of(config.model), 1e6, "M"),
        *rows("a step, forward and backward", count_flops(config), *unit(config)),
    ]


def unit(config: RunConfig) -> tuple[float, str]:
    """In what a step's FLOPs are told."""
    return (1e12, "TFLOP") if sum(count_flops(config).values()) > 1e13 else (1e9, "GFLOP")


def rows(title: str, values: Mapping[str, float], scale: float, unit: str) -> list[str]:
    """A table with its total."""
    lines = [f"  {name:26}{value / scale:12,.2f} {unit}" for name, value in values.items()]
    return [title, *lines, f"  {'total':26}{sum(values.values()) / scale:12,.2f} {unit}", ""]


def length_of(config: RunConfig) -> str:
    c, flops = config.train, sum(count_flops(config).values())
    positions = c.rows * c.seq_len
    if not c.steps:
        return f"the run: as many steps of {positions:,} positions as fit into {c.minutes:g} minutes"
    return (
        f"the run: {c.steps:,} steps of {positions:,} positions = {c.steps * positions:,} positions, "
        f"{c.steps * flops:.3g} FLOP"
    )


@dataclass(frozen=True)
class Scaled:
    """A run on many GPUs; bytes, seconds and FLOPs of one rank."""

    memory: dict[str, dict[str, float]]  # by checkpointing
    fits: list[str]  # checkpointing modes, the one that keeps most first
    traffic: dict[str, tuple[float, float]]  # (bytes, seconds) of a step
    flops: float  # of a step
    seconds: float  # of a step, at the MFU
    hidden: float  # the MFU up to which traffic hides
    tokens: float  # a second, all ranks, as the two that follow
    images: float
    days: float  # of the run, as the two that follow; nan: it has no number of steps
    texts: float  # tokens of text that it reads
    drawn: float  # images
    read: float  # bytes of both, as they lie on disk; of pixels as if they were not compressed
    saved: float  # bytes of a checkpoint
    sheet: float  # bytes of weights that rank 0 gathers to draw; 0 = it draws with its own, or nothing


def scale(config: RunConfig, cluster: Cluster, gpu: str, mfu: float) -> Scaled:
    """The run on ranks of a GPU of GPUS, if it reaches that MFU."""
    if gpu not in GPUS:
        raise ValueError(f"gpu = {gpu!r}: choose one of {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu = {mfu}: a share of the peak, above 0 and at most 1")
    c, m, g = config.train, config.model, GPUS[gpu]
    if c.float8 and not g.float8:
        raise ValueError(f"train.float8 = true: {gpu} does not multiply it: leave it out, or choose another --gpu")
    sheet = drawing_memory(config) if c.sample_every and cluster.world > 1 else 0.0
    by_mode = {mode: replace(config, train=replace(c, checkpointing=mode)) for mode in MODES}
    memory = {mode: estimate_memory(other, cluster) for mode, other in by_mode.items()}
    model = build_model(m, "meta")
    freeze(model, config.optim.freeze)
    numbers = [sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model))]
    n, rows = micro_batches(c.rows, c.micro_batch, cluster.groups)
    keys = 2 * m.kv_heads * m.head_dim * m.n_layers * rows * c.seq_len
    found = traffic(cluster, g, *numbers, keys, n)
    flops = sum(count_flops(config).values()) / cluster.world
    seconds, kept = flops / (mfu * g.flops), memory[MODES[0]]
    steps = c.steps or float("nan")
    texts, drawn = steps * c.rows * c.seq_len * (1 - config.data.image_share), steps * count_images(config)
    numbers_of_image = math.prod(grid_of(config)) * (1 if m.patches == "codes" else m.patch_dim)
    token = 2 if m.vocab_size <= 1 << 16 else 4
    image = (1 if config.data.codec == "pixels" else 4) * numbers_of_image  # pixels uncompressed; else as `encoded.py`
    return Scaled(
        memory=memory,
        fits=[mode for mode in MODES if sum(memory[mode].values()) + sheet <= FITS * g.memory],
        traffic={name: (t.bytes, t.seconds) for name, t in found.items()},
        flops=flops,
        seconds=seconds,
        hidden=hidden_up_to(found, flops, g),
        tokens=c.rows * c.seq_len / seconds,
        images=count_images(config) / seconds,
        days=steps * seconds / 86400,
        texts=texts,
        drawn=drawn,
        read=token * texts + image * drawn,
        saved=cluster.of_shard * sum(kept[name] for name in ("weights", "optimizer", "average")),
        sheet=sheet,
    )


def plan_cluster(
    config: RunConfig, cluster: Cluster, gpu: str = "h100", mfu: float = 0.4, storage: float = 10.0
) -> str:
    """The plan for many GPUs, which share a storage of so many GB/s."""
    if not storage > 0:
        raise ValueError(f"storage = {storage}: GB/s, above 0")
    s, g, c, n = scale(config, cluster, gpu, mfu), GPUS[gpu], config.train, cluster.world

    def row(name: str, values: list[float]) -> str:
        return f"  {name:26}" + "".join(f"{value / 2**30:12,.2f}" for value in values)

    by_mode = list(s.memory.values())
    lines = [*head(config), f"{'memory of a rank, GiB':28}" + "".join(f"{mode:>12}" for mode in s.memory)]
    lines += [row(name, [memory[name] for memory in by_mode]) for name in by_mode[0]]
    lines.append(row("total", [sum(memory.values()) for memory in by_mode]))
    remedy = "none: more GPUs, more of them to a shard (parallel.shards), or a smaller train.micro_batch"
    room = f"{g.memory / 2**30:.1f} GiB of {gpu}, a tenth left free"
    lines += [f"checkpointing that fits into {room}: {', '.join(s.fits) or remedy}", ""]

    count, rows = micro_batches(c.rows, c.micro_batch, cluster.groups)
    share = f"{rows} rows x {c.seq_len // cluster.context} positions"
    lines.append(f"a step of a rank: {count} x {share}, {s.flops / 1e12:,.1f} TFLOP, {s.seconds:.3g} s")
    lines += [f"  {name:26}{size / 1e9:12,.2f} GB {seconds:10.3f} s" for name, (size, seconds) in s.traffic.items()]
    if s.traffic:
        lines.append(f"  which computing hides up to {s.hidden:.0%} MFU: {'yes' if s.hidden >= mfu else 'NO'}")
    lines += ["", f"{n} x {gpu} at {mfu:.0%} MFU: {s.tokens:,.0f} positions/s, {s.images:,.1f} images/s"]
    lines.append(f"  of each GPU: {s.tokens / n:,.0f} positions/s, {s.images / n:,.2f} images/s")
    saved = f"{s.saved / 1e9:,.1f} GB, {s.saved / 1e9 / cluster.of_shard:,.2f} of a GPU that holds a shard"
    lines.append(f"a checkpoint: {saved}; {s.saved / 1e9 / storage:,.1f} s at {storage:g} GB/s")
    if s.sheet:
        lines.append(f"a sheet: {s.sheet / 1e9:,.1f} GB of weights on rank 0, whole, beside its shards")
    lines += ["", length_of(config)]
    if c.steps:
        lines.append(f"  {s.days:,.2f} days, {s.days * 24 * n:,.0f} GPU hours")
        lines.append(f"  reads {s.texts:.3g} tokens of text and {s.drawn:.3g} images, {s.read / 1e12:,.1f} TB")
        lines.append(f"  of each GPU {s.read / (s.days * 86400 * n) / 1e6:,.2f} MB/s")
    return "\n".join(lines)
