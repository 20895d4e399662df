"""A study: every arm of a grid trained from several seeds at the same FLOPs, evaluated, one JSON line a run.

    python bench/study.py bench/studies/paper.toml            # trains what is missing, then prints the table
    python bench/study.py bench/studies/paper.toml --table    # only the table

A run that is on record is not repeated, one that was interrupted goes on from its checkpoint, both only under the very
settings that it had; runs may be split among machines by `only=ARM` and `seeds=0,1`. The steps of a run follow from
its own FLOPs as they are packed (`count_packed` in transfusion/flops.py), so arms of unequal cost a step get unequal
steps, and see unequal numbers of images. Arms are compared seed by seed: the mean difference to each arm that they are
measured against, with the 95 % interval of Student's t. It covers what the seed decides in training, not the choice of
what is evaluated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from loading import STEPS, packer_of
from machine import commit, hardware

from transfusion.checkpoint import latest_checkpoint, read_state
from transfusion.codec.codec import Codec
from transfusion.codec.load import load_codec
from transfusion.config import load_config, to_dict
from transfusion.flops import count_6nd, count_packed
from transfusion.run import RunConfig, resolve, stored_config

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by seeds - 1


@dataclass(frozen=True)
class Arm:
    """What a run changes, and which arms it is measured against."""

    set: tuple[str, ...] = ()  # overrides of the base config
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A grid of runs."""

    base: str  # a config
    flops: float  # of each run, forward and backward
    out: str  # folder of the runs, and of results.jsonl
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0, 1, 2)
    eval: tuple[str, ...] = ()  # overrides of `transfusion eval`
    report: tuple[str, ...] = ()  # names of the numbers that the table shows
    only: tuple[str, ...] = ()  # arms; () = all
    set: tuple[str, ...] = ()  # overrides for all arms

    def __post_init__(self):
        for name, arm in self.arms.items():
            for other in arm.against:
                if other not in self.arms:
                    raise ValueError(f"arm {name!r} is against {other!r}, which is none of {', '.join(self.arms)}")
        for name in self.only:
            if name not in self.arms:
                raise ValueError(f"only = {name!r} is none of the arms: {', '.join(self.arms)}")


def results(study: Study) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> its line, of all runs on record."""
    file = Path(study.out) / "results.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {(r["arm"], r["seed"]): r for r in map(json.loads, lines)}


def overrides_of(study: Study, arm: str, seed: int) -> list[str]:
    """What the run changes in the base config, steps included."""
    given = [*study.set, *study.arms[arm].set, f"seed={seed}"]
    config = load_config(RunConfig, study.base, [*given, "train.steps=1"])
    codec = load_codec(config.data.codec)
    steps = round(study.flops / of_a_step(resolve(config, codec), codec)["flops"])
    if not steps:
        raise ValueError(f"flops = {study.flops:g} is less than half a step of {arm!r}: raise it")
    return [*given, f"train.steps={steps}"]


def settings_of(study: Study, overrides: list[str]) -> dict:
    """All that decides a run's line, as JSON keeps it: the config, base and overrides, and those of the evaluation."""
    config = to_dict(load_config(RunConfig, study.base, overrides))
    return json.loads(json.dumps({"config": config, "eval": study.eval}))


def as_of_now(settings: dict) -> dict:
    """Settings on record, with the defaults of options that have come since."""
    return json.loads(json.dumps(settings | {"config": to_dict(stored_config(settings["config"], "a run on record"))}))


def of_a_step(config: RunConfig, codec: Codec) -> dict[str, float]:
    """Means over the first steps as they are packed: FLOPs, forward and backward, and images, drawn and read."""
    packer = packer_of(config, codec)
    steps = [packer.batches(step) for step in range(STEPS)]
    images = fmean(sum((b.tokens == packer.fmt.special.boi).sum().item() for b in micro) for micro in steps)
    return {"flops": fmean(count_packed(config, micro) for micro in steps), "images": images}


def run(study: Study, arm: str, seed: int, overrides: list[str]) -> dict:
    """Trains and evaluates one run; its line of results."""
    folder, start, settings = Path(study.out) / f"{arm}-{seed}", time.perf_counter(), settings_of(study, overrides)
    began = folder / "settings.json"
    if began.is_file() and as_of_now(json.loads(began.read_text())) != settings:
        raise ValueError(f"{folder} began with other settings: remove it, or set another out")
    folder.mkdir(parents=True, exist_ok=True)
    began.write_text(json.dumps(settings))
    resume = ["--resume"] if (folder / "checkpoints").is_dir() else []
    command = [sys.executable, "-m", "transfusion.cli"]
    subprocess.run([*command, "train", study.base, *overrides, f"out={folder}", *resume], check=True)
    seconds = time.perf_counter() - start
    saved = read_state(latest_checkpoint(folder / "checkpoints"))["step"]
    if f"train.steps={saved}" != overrides[-1]:
        raise ValueError(f"{folder} was stopped at step {saved}: call the study again, it goes on from there")
    subprocess.run([*command, "eval", str(folder), *study.eval, "--json", str(folder / "eval.json")], check=True)
    config = load_config(RunConfig, folder / "config.toml")
    whole = {name: config.train.steps * n for name, n in of_a_step(config, load_codec(config.data.codec)).items()}
    return {
        "arm": arm,
        "seed": seed,
        "steps": config.train.steps,
        **whole,
        "flops_6nd": config.train.steps * count_6nd(config),
        "seconds": round(seconds, 1),
        "resumed": bool(resume),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "results": json.loads((folder / "eval.json").read_text()),
        "settings": settings,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t); of one value the half is nan."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), T95[min(len(values) - 1, max(T95))] * stdev(values) / math.sqrt(len(values))


def table(study: Study) -> Iterator[str]:
    """Markdown: of each arm the mean of each number over its seeds, then its differences to what it is against."""
    found = results(study)
    for arm in study.arms:
        if len({of_any_seed(r) for (name, _), r in found.items() if name == arm}) > 1:
            raise ValueError(f"{study.out}/results.jsonl has {arm} with several settings: set another out")
    names = [name for name in study.report if any(name in r["results"] for r in found.values())]
    yield "| arm | seeds | steps | images | " + " | ".join(names) + " |"
    yield "|" + "---|" * (len(names) + 4)
    for arm in study.arms:
        runs = [found[arm, seed] for seed in study.seeds if (arm, seed) in found]
        if runs:
            cells = [cell([r["results"].get(name) for r in runs]) for name in names]
            steps, images = (fmean(r[n] for r in runs) for n in ("steps", "images"))
            yield f"| {arm} | {len(runs)} | {steps:.0f} | {images:.0f} | " + " | ".join(cells) + " |"
    yield ""
    yield "| difference | seeds | " + " | ".join(names) + " |"
    yield "|" + "---|" * (len(names) + 2)
    for name, other in ((name, other) for name, arm in study.arms.items() for other in arm.against):
        seeds = [s for s in study.seeds if (name, s) in found and (other, s) in found]
        if seeds:
            pairs = [(found[name, s]["results"], found[other, s]["results"]) for s in seeds]
            cells = [cell([a[n] - b[n] if n in a and n in b else None for a, b in pairs], "+") for n in names]
            yield f"| {name} - {other} | {len(seeds)} | " + " | ".join(cells) + " |"
    if absent := [name for name in study.report if name not in names]:
        yield f"\nNo run has {', '.join(absent)}."


def of_any_seed(line: dict) -> str:
    """The settings of a run but for its seed."""
    settings = as_of_now(line["settings"])
    return json.dumps(settings | {"config": settings["config"] | {"seed": None}}, sort_keys=True)


def cell(values: list[float | None], sign: str = "") -> str:
    """ "0.123 +- 0.004", or nothing where a number is missing."""
    if None in values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.4g} +- {half:.2g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, evaluate and compare a grid of runs.")
    parser.add_argument("study", type=Path, metavar="STUDY.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. only=causal seeds=0 out=runs/mine")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    try:
        study = load_config(Study, args.study, args.overrides)
        wanted = [] if args.table else [(arm, seed) for seed in study.seeds for arm in study.only or study.arms]
        of_arm = {arm: overrides_of(study, arm, study.seeds[0]) for arm in dict(wanted)}  # what cannot be, before all
        for arm, seed in wanted:
            overrides = [f"seed={seed}" if o == f"seed={study.seeds[0]}" else o for o in of_arm[arm]]
            on_record = results(study).get((arm, seed))
            if on_record and as_of_now(on_record["settings"]) != settings_of(study, overrides):
                raise ValueError(
                    f"{study.out}/results.jsonl has {arm}, seed {seed} with other settings: set another out"
                )
            if not on_record:
                print(f"== {arm}, seed {seed}", flush=True)
                line = run(study, arm, seed, overrides)
                with (Path(study.out) / "results.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
        print("\n".join(table(study)))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
