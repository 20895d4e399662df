"""Writes bench/README.md from bench/results/*.jsonl: what was to be reached, a table a question, exponents of growth.

    python bench/page.py             # the page, and its plots where matplotlib is (the extra `plot`)

Of a case that was measured twice on a machine the last run counts, with all its arms: nothing is compared across runs.
"""

import json
import math
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from ask import CLOCKS, spread
from content import Case
from machine import ROOT
from questions import AXES, BARS, MAKE_PEER, QUESTIONS, Bar, Question

BENCH = ROOT / "bench"
HIDDEN = ("peak", "device", "compile")  # fields of a case that no column shows
FIXED = ("config", "dim", "depth", "heads", "threads", "precision")  # said above a table where they do not vary

HEAD = """\
# Benchmarks

Written by `python bench/page.py` from `bench/results/*.jsonl`; do not edit. One command a question measures this
repository and its peers in turn, in the same run, on the same data and shapes:

```
python bench/ask.py --peer-python PEER/bin/python \
    {cpu}
python bench/ask.py {gpu} --minutes 7 --out bench/results/GPU.jsonl    # on a GPU
python bench/page.py
```

The first takes more than an hour on 2 idle cores, the second is to end within 8 minutes: no case begins
after seven. `--commit` names the code's commit where it came without `.git`.

transfusion-pytorch has a virtual environment of its own, PEER, which these commands make:

```
{peer}
```

Without one it is left out, and says so. transformers' Llama needs nothing besides the packages of the tests.
`TRANSFUSION_PEER_PYTHON=PEER/bin/python` lets the tests ask transfusion-pytorch too.
`field=value` changes a case everywhere (its fields are in `bench/content.py`), as in
`python bench/ask.py training dim=64 depth=2 peak=64 --repeat 1`.

## How it is measured

- Each arm answers in a process of its own, which stays; repetitions alternate, and round r begins with arm r. The
  first round is warm-up. A figure is the median of its n rounds, with its quartiles, in wall seconds (s) and in
  processor seconds of all threads (cpu s). "wall x" and "cpu x" are how many times as long an arm takes as the first
  one: the median of the ratios of the rounds, for wall seconds with their quartiles. "compiled" is by torch.compile,
  which takes half a minute to a minute in the warm-up; the peers run as they come.
- Content is the same for all: random tokens and latents from (case, round). Each writes its own markers, and lays out
  its rows within the time. Training in bf16 is autocast, the optimizer fused AdamW, for all. In the first question ours
  adds up a step's gradients row by row, by `train.micro_batch=1`, but for the arm that says otherwise: losses are sums,
  so it is the same step. transfusion-pytorch is measured both ways. Parts: data, forward, backward (ours: with the
  gradients' norm), optimizer. Positions and images are those of the content.
- Drawing and writing in bf16: weights in bf16, here with keys and values in float32 on a CPU. transfusion-pytorch
  writes plain text so; it draws and captions under autocast, as its batched sampler fails with such weights. Which
  precision is faster differs, so writing is measured in both, drawing in fp32 for one image; what is to be reached is
  reached against a peer's faster one.
- At the same width, depth and heads the implementations differ in parameters ("M par."): "ours, 24 layers" has about
  as many as transfusion-pytorch with 8. That package tries its ways to process a batch and keeps the fastest for
  batches of as many tokens; all rounds have as many, so it tries in the warm-up alone.
- Memory is the most that the process held (VmHWM), on a GPU what torch allocated; libraries included; "above imports"
  without what importing them had taken.
- "calm": the speed of small products that bracket each repetition, median over the rounds, over the best such median
  on that machine with as many threads. Well below 1, the machine was doing something else, and the wall seconds are not
  to be trusted. The load above a table is the machine's before the first process was started.
- MFU: FLOPs of the step by the area that its mask allows (`count_packed` in `transfusion/flops.py`) over the seconds of
  forward and backward, over the best product of square matrices in the same process, just after; "of the step": over
  the seconds of the whole step. Square matrices in the case's precision, so in bf16 for "ours, float8" too, whose
  products have a peak twice as high. "of the data sheet": that step over the peak of NVIDIA's, as a run logs its MFU.
- "planned GiB": what `transfusion plan CONFIG --gpus 1` foresees for the case's rows, without an average of the
  weights; to be held against "GiB".
- Where the time goes: seconds are the profiler's; "at the limits" what FLOPs over the peak or bytes over the bandwidth
  of a large copy take, whichever is more; bytes are counted as if no cache kept any (`bench/operators.py`).
"""


def read(files: Iterable[Path]) -> list[dict]:
    """The lines of results, of each question, case and machine those of the last run."""
    lines = [json.loads(line) for file in sorted(files) for line in file.read_text().splitlines()]
    # fields that came later; and no arm that was another one then
    lines = [line | {"case": asdict(Case()) | line["case"]} for line in lines if is_asked(line)]
    last = {key(line): line["run"] for line in sorted(lines, key=lambda line: line["run"])}
    return [line for line in lines if line["run"] == last[key(line)]]


def is_asked(line: dict) -> bool:
    """Whether its question has this arm today, and as it was measured."""
    arm = QUESTIONS[line["question"]].arms.get(line["arm"])
    return arm is not None and [arm.answer, arm.change] == [line["answer"], line["change"]]


def key(line: dict) -> str:
    """What makes a line another measurement, and not the same one again."""
    return json.dumps([line[part] for part in ("question", "case", "hardware", "device")])


def hardware_of(line: dict) -> str:
    """The machine of a line, in words."""
    h = line["hardware"]
    flags = f", {', '.join(h['flags'])}" if h["flags"] else ""
    device = "" if line["device"] == "cpu" else f"{line['device']}; "
    return f"{device}{h['processor']}, {h['cores']} cores, {h['gib']} GiB{flags}"


def varying(lines: list[dict]) -> list[str]:
    """The fields of the case in which the lines differ."""
    return [f for f in asdict(Case()) if f not in HIDDEN and len({json.dumps(x["case"][f]) for x in lines}) > 1]


def number(value: float | None) -> str:
    """Four digits, and nothing of None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ratio(line: dict, other: dict, clock: str = "wall") -> dict[str, float]:
    """How many times as long a line takes as another: median and quartiles over the rounds that they share."""
    if line["case"] != other["case"]:
        return spread([line[clock]["median"] / other[clock]["median"]])
    return spread([a / b for a, b in zip(line["rounds"][clock], other["rounds"][clock])])


def flops_to(line: dict, other: dict) -> float:
    """How many times as many FLOPs a line takes as another."""
    return line["facts"]["flops"] / other["facts"]["flops"]


def mfu(line: dict) -> float:
    """Of forward and backward."""
    seconds = sum(line["parts"][part]["wall"] for part in ("forward", "backward"))
    return line["facts"]["flops"] / seconds / line["facts"]["peak"]


def cells(line: dict, first: dict, best: float) -> dict[str, str]:
    """column -> entry, of a line of results against that of the first arm; `best`: of the machine's calibrations."""
    if "error" in line:
        return {"s": f"failed: {line['error']}".replace("|", "/")[:120]}
    wall, facts, memory = line["wall"], line["facts"], line["memory"]
    row = {
        "s": number(wall["median"]),
        "quartiles": f"{number(wall['q25'])} - {number(wall['q75'])}",
        "cpu s": number(line["cpu"]["median"]),
    }
    row |= {f"{unit} / s": number(n / wall["median"]) for unit, n in facts["units"].items()}
    if "error" not in first and line is not first:
        wall_x, cpu_x = (ratio(line, first, clock) for clock in CLOCKS)
        row["wall x"] = f"{wall_x['median']:.2f} ({wall_x['q25']:.2f} - {wall_x['q75']:.2f})"
        row["cpu x"] = f"{cpu_x['median']:.2f}"
    if len(line["parts"]) > 1:
        row |= {part: number(seconds["wall"]) for part, seconds in sorted(line["parts"].items())}
    if "flops" in facts:
        row["GFLOP"] = number(facts["flops"] / 1e9)
        row["MFU"], row["of the step"] = (
            f"{x:.1%}" for x in (mfu(line), facts["flops"] / wall["median"] / facts["peak"])
        )
        if facts.get("sheet"):
            row["of the data sheet"] = f"{facts['flops'] / wall['median'] / facts['sheet']:.1%}"
    if "starts" not in facts["units"]:  # the memory of a process that waits for another one says nothing
        row["GiB"] = f"{memory['peak'] / 2**30:.2f}"
        row["above imports"] = f"{(memory['peak'] - memory['imported']) / 2**30:.2f}"
    if "planned" in facts:
        row["planned GiB"] = f"{facts['planned'] / 2**30:.2f}"
    if "parameters" in facts:
        row["M par."] = f"{facts['parameters'] / 1e6:.1f}"
    return row | {"calm": f"{line['calibration'] / best:.2f}", "n": str(line["n"])}


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Markdown of rows whose columns are those of all of them, in the order of their first appearance."""
    columns = list(dict.fromkeys(c for row in sorted(rows, key=len, reverse=True) for c in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row.get(c, "") for c in columns) + " |"


def threads_of(line: dict) -> tuple[str, int]:
    """What calibrations are compared at."""
    return hardware_of(line), line["case"]["threads"]


def fixed(lines: list[dict]) -> str:
    """What the cases of a table have in common, of FIXED."""
    case, fields = lines[0]["case"], varying(lines)
    named = [
        f for f in FIXED if f not in fields and case[f] and not (case["config"] and f in ("dim", "depth", "heads"))
    ]
    return ", ".join(f"{f} {case[f]}" for f in named)


def tables(question: Question, lines: list[dict], best: dict[tuple, float]) -> Iterator[str]:
    """The table of one question on one machine."""
    fields, rows = varying(lines), []
    first = {json.dumps(x["case"]): x for x in reversed(lines) if x["arm"] == next(iter(question.arms))}
    missing = {"error": "not measured"}
    for line in sorted(lines, key=lambda x: ([x["case"][f] for f in fields], list(question.arms).index(x["arm"]))):
        case = {f: str(line["case"][f]) for f in fields}
        rows.append(
            case
            | {"arm": line["arm"]}
            | cells(line, first.get(json.dumps(line["case"]), missing), best.get(threads_of(line), math.nan))
        )
    yield from table(rows)


# ---- what is to be reached ----

MEASURES = {  # of a line and the one that it is against -> (figure, how it is written); whether more is better
    "times": (lambda line, other: ratio(other, line)["median"], "{:.3g}x", True),
    "memory": (lambda line, other: line["memory"]["peak"] / other["memory"]["peak"], "{:.2f}", False),
    "MFU": (lambda line, _: mfu(line), "{:.0%}", True),
    "per FLOP": (lambda line, other: ratio(line, other)["median"] / flops_to(line, other), "{:.2f}", False),
    "seconds": (lambda line, _: line["wall"]["median"], "{:.2g} s", False),
}


def reached(bar: Bar, lines: list[dict]) -> Iterator[tuple[dict, float]]:
    """(line, figure) of every case that the bar is about, in each the least favourable of those that it is against."""
    figure, _, more = MEASURES[bar.measure]
    lines = [line for line in lines if line["question"] == bar.question and "error" not in line]
    for line in lines:
        wanted = all(line["case"][f] == value for f, value in bar.where.items())
        if line["arm"] == bar.arm and wanted and line["case"]["precision"] == Case().precision:
            others = [o for o in lines if o["arm"].removesuffix(", fp32") == bar.against and alike(o, line)]
            if figures := [figure(line, other) for other in others or [{}] * (not bar.against)]:
                yield line, (min if more else max)(figures)


def alike(line: dict, other: dict) -> bool:
    """Whether both are of one run on one machine, and of one case in any precision."""
    a, b = ([hardware_of(x), x["run"], {**x["case"], "precision": ""}] for x in (line, other))
    return a == b


def bars(lines: list[dict]) -> Iterator[str]:
    """The table of what is to be reached, and what is."""
    rows = []
    for bar in BARS:
        _, form, more = MEASURES[bar.measure]
        found, levels = list(reached(bar, lines)), {"bar": bar.bar, "aim": bar.aim}
        fields = [f for f in varying([line for line, _ in found]) if f != "heads"]
        on = len({hardware_of(line) for line, _ in found}) > 1
        row = {"what": "".join([bar.says, *(f", {f} {x}" for f, x in bar.where.items())]), "against": bar.against}
        row |= {name: f"{'>=' if more else '<='} {form.format(value)}" for name, value in levels.items()}
        said = [
            ", ".join([form.format(x), *(f"{f} {line['case'][f]}" for f in fields), *[hardware_of(line)] * on])
            for line, x in found
        ]
        row["reached"] = "; ".join(said) or "not measured"
        met = [name for name, value in levels.items() if all(x >= value if more else x <= value for _, x in found)]
        rows.append(row | {"so": ["missed", *met][-1] if found else ""})
    yield from table(rows)


# ---- growth ----


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a x^b by least squares of the logarithms."""
    x, y = ([math.log(v) for v in values] for values in zip(*points))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    b = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y)) / sum((u - mean_x) ** 2 for u in x)
    return math.exp(mean_y - b * mean_x), b


def curves(question: Question, lines: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """arm -> {"s" | "GiB" -> points (x, y)}; memory is what came on top of the imports."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        if "error" not in line:
            x, of_arm = AXES[question.axis][1](line), found.setdefault(line["arm"], {"s": [], "GiB": []})
            of_arm["s"].append((x, line["wall"]["median"]))
            of_arm["GiB"].append((x, (line["memory"]["peak"] - line["memory"]["imported"]) / 2**30))
    return {arm: {name: sorted(points) for name, points in of_arm.items()} for arm, of_arm in found.items()}


def growth(question: Question, lines: list[dict]) -> Iterator[str]:
    """The exponents of time and memory, over all points and over the larger half of them."""
    rows = []
    for arm, of_arm in curves(question, lines).items():
        for name, points in of_arm.items():
            half = points[len(points) // 2 :]
            if len({x for x, _ in half}) > 1 and all(y > 0 for _, y in points):
                span = f"{number(points[0][0])} - {number(points[-1][0])}"
                exponents = (f"{fit(p)[1]:.2f}" for p in (points, half))
                rows.append({"arm": arm, "of": name, AXES[question.axis][0]: span})
                rows[-1] |= dict(zip(("exponent", "of the larger half"), exponents))
                rows[-1]["expected"] = question.expected[list(of_arm).index(name)]
    if rows:
        yield from ["", "Fitted by a power law:", "", *table(rows)]


# ---- where the time goes ----


def roofline(lines: list[dict]) -> Iterator[str]:
    """Seconds by class of operator, and those that the machine's two limits would allow."""
    for line in lines:
        if "work" not in line.get("facts", {}):
            continue
        facts, seconds = line["facts"], line["numbers"]
        peak, bandwidth, work = facts["peak"], facts["bandwidth"], facts["work"]
        limits = f"{number(peak / 1e9)} GFLOP/s, {number(bandwidth / 1e9)} GB/s"
        yield from ["", f"Where the time goes, threads: {line['case']['threads']} (limits: {limits}):", ""]
        rows = []
        for name, s in sorted(seconds.items(), key=lambda item: -item[1]):
            flops, moved = work["flops"][name], work["bytes"][name]
            least, share = max(flops / peak, moved / bandwidth), f"{s / line['wall']['median']:.1%}"
            row = {"class": name, "s": number(s), "share": share, "GFLOP": number(flops / 1e9)}
            rows.append(row | {"GB": number(moved / 1e9), "at the limits": number(least)})
        between = line["wall"]["median"] - sum(seconds.values())
        share = f"{between / line['wall']['median']:.1%}"
        rows.append({"class": "between operators", "s": number(between), "share": share})
        yield from table(rows)


# ---- the page ----


def page(lines: list[dict]) -> str:
    """The whole page as Markdown."""
    asked = {on: [name for name in QUESTIONS if ("gpu" in name) == (on == "gpu")] for on in ("cpu", "gpu")}
    out, best = [HEAD.format(cpu=wrapped(asked["cpu"]), gpu=" ".join(asked["gpu"]), peer=MAKE_PEER)], {}
    for line in lines:
        if "error" not in line:
            best[threads_of(line)] = max(line["calibration"], best.get(threads_of(line), 0.0))
    out += ["## What is to be reached", "", *bars(lines), ""]
    for name, question in QUESTIONS.items():
        of_question = [line for line in lines if line["question"] == name]
        out += [f"## {question.says}", ""]
        if not of_question:
            out += [f"Not measured yet: `python bench/ask.py {name}`.", ""]
        for machine in dict.fromkeys(map(hardware_of, of_question)):
            here = [line for line in of_question if hardware_of(line) == machine]
            commits = ", ".join(sorted({f"{x['commit']} ({x['run'][:10]}, load {x['load']:.1f})" for x in here}))
            torch = ", ".join(sorted({x["versions"]["torch"] for x in here if "versions" in x}))
            out += [f"{machine}; torch {torch}; commit {commits}. {fixed(here)}", ""]
            out += tables(question, here, best)
            if absent := [arm for arm in question.arms if arm not in {x["arm"] for x in here}]:
                out += ["", f"Not measured: {', '.join(absent)}."]
            out += roofline(here)
            if question.axis:
                out += growth(question, here)
                out += ["", f"![Time and memory]({plot_of(name, machine)})"]
            out.append("")
    return "\n".join(out)


def wrapped(names: Iterable[str]) -> str:
    """The names in lines of a shell's command."""
    return " \\\n    ".join(textwrap.wrap(" ".join(names), 100, break_on_hyphens=False))


def plot_of(question: str, machine: str) -> str:
    """Where the plot of a question on a machine lies, beside the page."""
    return f"plots/{question}-{''.join(c if c.isalnum() else '-' for c in machine.split(',')[0])}.png"


def plot(question: Question, lines: list[dict], path: Path) -> None:
    """Time and memory against the axis, both logarithmic, with the fitted lines."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for arm, of_arm in curves(question, lines).items():
        for (name, points), ax in zip(of_arm.items(), axes):
            (drawn,) = ax.loglog(*zip(*points), "o", label=arm)
            if len(points) > 1 and all(y > 0 for _, y in points):
                a, b = fit(points)
                ax.loglog(
                    [x for x, _ in points], [a * x**b for x, _ in points], color=drawn.get_color(), label=f"x^{b:.2f}"
                )
            ax.set(xlabel=AXES[question.axis][0], ylabel=name)
            ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    lines = read((BENCH / "results").glob("*.jsonl"))
    (BENCH / "README.md").write_text(page(lines))
    for name, question in QUESTIONS.items():
        here = [line for line in lines if question.axis and line["question"] == name and "error" not in line]
        for machine in dict.fromkeys(map(hardware_of, here)):
            try:
                plot(question, [x for x in here if hardware_of(x) == machine], BENCH / plot_of(name, machine))
            except ImportError:
                print("page: no plots without matplotlib: pip install -e '.[plot]'", file=sys.stderr)
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
