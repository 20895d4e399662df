"""Writes bench/README.md from bench/results/*.jsonl: a table a question, ratios of medians, exponents of growth.

    python bench/page.py             # the page, and its plots where matplotlib is (the extra `plot`)

Of an arm that was measured twice in a case on a machine, the later line counts.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from content import Case
from questions import AXES, MAKE_PEER, QUESTIONS, Question

BENCH = Path(__file__).resolve().parent
HIDDEN = ("peak", "device", "compile", "heads")  # fields of a case that no column shows
FITTED = 2  # points that make a fit

HEAD = """\
# Benchmarks

Written by `python bench/page.py` from `bench/results/*.jsonl`; do not edit. One command a question measures this
repository and its peers in turn, in the same run, on the same data and shapes:

```
{commands}
```

transfusion-pytorch has a virtual environment of its own, PEER, which these commands make:

```
{peer}
```

Without one it is left out, and says so. transformers' Llama needs nothing besides the packages of the tests.
`field=value` changes a case everywhere (its fields are in `bench/content.py`), as in
`python bench/ask.py training dim=64 depth=2 peak=64 --repeat 1`.

## How it is measured

- Each arm answers in a process of its own, which stays; repetitions alternate, and round r begins with arm r. The
  first round is warm-up. A figure is the median of its rounds, with its quartiles, in wall seconds (s) and in processor
  seconds of all threads (cpu s). A ratio is one median over another: "wall x" and "cpu x" are how many times as long an
  arm takes as the first one.
- Content is the same for all: random tokens and latents from (case, round). Each writes its own markers, and lays out
  its rows within the time. bf16 is autocast; each has the optimizer that it would have: fused AdamW here and for Llama,
  torch's default AdamW for transfusion-pytorch. Parts: data, forward, backward (ours: with the gradients' norm),
  optimizer. Positions and images are those of the content.
- At the same width, depth and heads the implementations differ in parameters ("M par."): "ours, 24 layers" has about
  as many as transfusion-pytorch with 8. That package tries its ways to process a batch and keeps the fastest for
  batches of as many tokens; all rounds have as many, so it tries in the warm-up alone.
- Memory is the most that the process held (VmHWM), on a GPU what torch allocated; libraries included; "above imports"
  without what importing them had taken.
- "calm" is the slowest of the small products that bracket each repetition, over their median: far below 1, the machine
  was doing something else, and the wall seconds are not to be trusted.
- MFU: FLOPs of the step by the area that its mask allows (`count_packed` in `transfusion/plan.py`), a second, over the
  best product of square matrices in the same process, just after.
- Where the time goes: seconds are the profiler's, "least s" what FLOPs over the peak or bytes over the bandwidth of a
  large copy take, whichever is more, and "reached" the one over the other (`bench/operators.py`).
- Drawing and writing on a CPU: `Engine` computes in the precision of the case; both are measured, for each arm.
"""


def read(files: Iterable[Path]) -> list[dict]:
    """The lines of results, of each arm, case and machine the last."""
    lines = [json.loads(line) for file in sorted(files) for line in file.read_text().splitlines()]
    return list({key(line): line for line in lines}.values())


def key(line: dict) -> str:
    """What makes a line another measurement, and not the same one again."""
    return json.dumps([line[part] for part in ("question", "arm", "case", "change", "hardware", "device")])


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


def cells(line: dict, first: dict) -> dict[str, str]:
    """column -> entry, of a line of results against that of the first arm."""
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
        row["wall x"], row["cpu x"] = (f"{line[c]['median'] / first[c]['median']:.2f}" for c in ("wall", "cpu"))
    if len(line["parts"]) > 1:
        row |= {part: number(seconds["wall"]) for part, seconds in sorted(line["parts"].items())}
    if "flops" in facts:
        row["GFLOP"] = number(facts["flops"] / 1e9)
        row["MFU"] = f"{facts['flops'] / wall['median'] / facts['peak']:.1%}"
    if "starts" not in facts["units"]:  # the memory of a process that waits for another one says nothing
        row["GiB"] = f"{memory['peak'] / 2**30:.2f}"
        row["above imports"] = f"{(memory['peak'] - memory['imported']) / 2**30:.2f}"
    if "parameters" in facts:
        row["M par."] = f"{facts['parameters'] / 1e6:.1f}"
    calm = line["calibration"]["worst"] / line["calibration"]["median"]
    return row | {"calm": f"{calm:.2f}", "n": str(line["n"])}


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Markdown of rows whose columns are those of all of them, in the order of their first appearance."""
    columns = list(dict.fromkeys(c for row in sorted(rows, key=len, reverse=True) for c in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row.get(c, "") for c in columns) + " |"


def results(question: Question, lines: list[dict]) -> Iterator[str]:
    """The table of one question on one machine."""
    fields, rows = varying(lines), []
    first = {json.dumps(x["case"]): x for x in reversed(lines) if x["arm"] == next(iter(question.arms))}
    missing = {"error": "not measured"}
    for line in sorted(lines, key=lambda x: ([x["case"][f] for f in fields], list(question.arms).index(x["arm"]))):
        case = {f: str(line["case"][f]) for f in fields}
        rows.append(case | {"arm": line["arm"]} | cells(line, first.get(json.dumps(line["case"]), missing)))
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
            if len({x for x, _ in half}) >= FITTED and all(y > 0 for _, y in points):
                span = f"{number(points[0][0])} - {number(points[-1][0])}"
                exponents = (f"{fit(p)[1]:.2f}" for p in (points, half))
                rows.append({"arm": arm, "of": name, AXES[question.axis][0]: span})
                rows[-1] |= dict(zip(("exponent", "of the larger half"), exponents))
    if rows:
        yield from ["", "Fitted by a power law:", "", *table(rows)]


# ---- where the time goes ----


def roofline(lines: list[dict]) -> Iterator[str]:
    """Seconds by class of operator, and the least that the machine's two limits allow."""
    for line in lines:
        if "error" in line or not line["numbers"]:
            continue
        facts, seconds = line["facts"], line["numbers"]
        peak, bandwidth, work = facts["peak"], facts["bandwidth"], facts["work"]
        limits = f"{number(peak / 1e9)} GFLOP/s, {number(bandwidth / 1e9)} GB/s"
        yield from ["", f"Where the time goes, threads: {line['case']['threads']} (limits: {limits}):", ""]
        rows = []
        for name, s in sorted(seconds.items(), key=lambda item: -item[1]):
            flops, moved = work["flops"][name], work["bytes"][name]
            least = max(flops / peak, moved / bandwidth)
            row = {"class": name, "s": number(s), "share": f"{s / sum(seconds.values()):.1%}"}
            row |= {"GFLOP": number(flops / 1e9), "GB": number(moved / 1e9), "least s": number(least)}
            rows.append(row | {"reached": f"{least / s:.0%}" if s else ""})
        yield from table(rows)


# ---- the page ----


def page(lines: list[dict]) -> str:
    """The whole page as Markdown."""
    commands = [f"python bench/ask.py {name} --peer-python PEER/bin/python" for name in QUESTIONS if "gpu" not in name]
    commands += [
        "python bench/ask.py gpu gpu-drawing --minutes 7      # on a machine with a GPU",
        "python bench/page.py",
    ]
    out = [HEAD.format(commands="\n".join(commands), peer=MAKE_PEER)]
    for name, question in QUESTIONS.items():
        of_question = [line for line in lines if line["question"] == name and line["arm"] in question.arms]
        out += [f"## {question.says}", ""]
        if not of_question:
            out += [f"Not measured yet: `python bench/ask.py {name}`.", ""]
        for machine in dict.fromkeys(map(hardware_of, of_question)):
            here = [line for line in of_question if hardware_of(line) == machine]
            commits = ", ".join(sorted({f"{x['commit']} ({x['date']})" for x in here}))
            torch = ", ".join(sorted({x["versions"]["torch"] for x in here if "versions" in x}))
            out += [f"{machine}; torch {torch}; commit {commits}.", "", *results(question, here)]
            if absent := [arm for arm in question.arms if arm not in {x["arm"] for x in here}]:
                out += ["", f"Not measured: {', '.join(absent)}."]
            out += roofline(here)
            if question.axis:
                out += growth(question, here)
                out += ["", f"![Time and memory]({plot_of(name, machine)})"]
            out.append("")
    return "\n".join(out)


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
            if len(points) >= FITTED and all(y > 0 for _, y in points):
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
