"""The page is what the lines give: the committed one, its ratios, its exponents."""

import copy
import json
from dataclasses import asdict

import page
import pytest
from content import Case
from operators import CLASSES, REST
from questions import BARS, QUESTIONS


def line(question: str, arm: str, seconds: float, case: Case | None = None, **fields) -> dict:
    """A line of results, as ask.py writes it."""
    case = case or QUESTIONS[question].cases[0]
    return {
        "question": question,
        "arm": arm,
        "case": json.loads(json.dumps(asdict(case))),
        "answer": QUESTIONS[question].arms[arm].answer if arm in QUESTIONS[question].arms else "",
        "change": QUESTIONS[question].arms[arm].change if arm in QUESTIONS[question].arms else {},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "n": 3,
        "wall": {"q25": seconds * 0.9, "median": seconds, "q75": seconds * 1.1},
        "cpu": {"q25": seconds, "median": seconds / 2, "q75": seconds},
        "rounds": {"wall": [seconds * 0.9, seconds, seconds * 1.1], "cpu": [seconds / 2] * 3},
        "parts": {"forward": {"wall": seconds / 4, "cpu": 0.1}, "backward": {"wall": seconds / 2, "cpu": 0.1}},
        "numbers": {},
        "calibration": 30.0,
        "memory": {"imported": 2**29, "peak": 3 * 2**30},
        "facts": {"units": {"positions": 4000}, "parameters": 5_000_000},
        "commit": "abc1234",
        "run": "2026-11-23T10:00:00",
        "hardware": {"processor": "A Processor", "flags": ["avx512_bf16"], "cores": 2, "gib": 24},
        "load": 0.1,
        **fields,
    }


def rows(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the first table of a page with that column."""
    block = next(b for b in text.split("\n\n") if b.startswith("| ") and first in b.splitlines()[0])
    split = [[c.strip() for c in row.strip("|").split("|")] for row in block.splitlines()]
    return [dict(zip(split[0], cells)) for cells in split[2:]]


def test_the_committed_page_is_what_the_committed_lines_give():
    written = (page.BENCH / "README.md").read_text()
    assert written == page.page(page.read((page.BENCH / "results").glob("*.jsonl")))
    for name, question in QUESTIONS.items():
        assert f"## {question.says}" in written and f" {name}" in written.partition("## How")[0]


def test_a_ratio_is_the_median_of_those_of_the_rounds_to_the_first_arm_in_the_same_case():
    one, two = QUESTIONS["training"].cases[:2]
    text = page.page(
        [
            line("training", "transfusion-pytorch", 6.0, one),
            line("training", "ours", 2.0, one),
            line("training", "ours", 1.0, two),
            line("training", "transfusion-pytorch", 5.0, two, rounds={"wall": [1.8, 3.0, 5.5], "cpu": [4.0] * 3}),
            line("text", "ours", 1.0, two, calibration=40.0),
        ]
    )
    found = rows(text, "wall x")
    assert [(r["threads"], r["arm"], r["wall x"], r["cpu x"]) for r in found] == [
        ("1", "ours", "", ""),
        ("1", "transfusion-pytorch", "3.00 (2.50 - 4.00)", "8.00"),
        ("2", "ours", "", ""),
        ("2", "transfusion-pytorch", "3.00 (3.00 - 3.00)", "3.00"),
    ]
    assert found[2]["calm"] == "1.00" and found[0]["calm"] == "0.75", (
        "the best at one thread is that of another question"
    )
    found = found[2:]
    assert (
        found[0]
        | {
            "s": "2",
            "quartiles": "1.8 - 2.2",
            "positions / s": "2,000",
            "GiB": "3.00",
            "above imports": "2.50",
            "n": "3",
            "forward": "0.5",
        }
        == found[0]
    )
    about = "A Processor, 2 cores, 24 GiB, avx512_bf16; torch 2.13.0; commit abc1234 (2026-11-23, load 0.1). "
    assert f"{about}dim 256, depth 8, heads 4, precision bf16\n" in text


def test_arms_are_compared_whatever_they_change():
    lines = [line("attention", way, s, change={"way": way}) for way, s in (("dense", 2.0), ("documents", 1.0))]
    assert [r["wall x"][:4] for r in rows(page.page(lines), "wall x")] == ["", "0.50"]


def test_mfu_is_flops_a_second_of_forward_and_backward_over_the_peak():
    facts = {"units": {"positions": 1}, "flops": 6e9, "peak": 12e9}
    (found,) = rows(page.page([line("gpu", "ours", 2.0, facts=facts)]), "MFU")
    assert (found["GFLOP"], found["MFU"], found["of the step"]) == ("6", "33.3%", "25.0%")


def what_is_reached(lines: list[dict]) -> dict[tuple[str, str], tuple[str, str]]:
    """(what, against) -> (reached, so)."""
    return {(r["what"], r["against"]): (r["reached"], r["so"]) for r in rows(page.page(lines), "aim")}


def test_what_is_to_be_reached_is_the_issues_and_missing_until_it_is_measured():
    found = what_is_reached([])
    assert len(found) == len(BARS) and set(found.values()) == {("not measured", "")}
    for bar in BARS:
        question = QUESTIONS[bar.question]
        assert bar.arm in question.arms and bar.against in ("", *question.arms) and bar.measure in page.MEASURES
        picked = [c for c in question.cases if all(asdict(c)[f] == value for f, value in bar.where.items())]
        assert any(c.precision == "bf16" for c in picked)
        assert (bar.aim >= bar.bar) == page.MEASURES[bar.measure][2] or bar.aim == bar.bar


def test_a_bar_is_reached_where_it_is_in_all_cases_against_a_peers_better_precision_of_the_same_run():
    small, large = (c for c in QUESTIONS["writing"].cases if c.batch == 1 and c.threads == 2)
    key = ("writing, tokens / s, threads 2, batch 1", "transfusion-pytorch")
    lines = [line("writing", "ours", 1.0, small), line("writing", "transfusion-pytorch", 12.0, small)]
    assert what_is_reached(lines)[key] == ("12x", "aim")
    lines.append(line("writing", "transfusion-pytorch, fp32", 6.0, small))
    assert what_is_reached(lines)[key] == ("6x", "bar")
    lines += [line("writing", "ours", 1.0, large), line("writing", "transfusion-pytorch", 3.0, large)]
    assert what_is_reached(lines)[key] == ("6x, dim 256; 3x, dim 512", "missed")
    lines.append(line("writing", "transfusion-pytorch", 1.0, large, run="2026-11-22T10:00:00"))
    assert what_is_reached(lines)[key] == ("6x, dim 256; 3x, dim 512", "missed")
    drawn = [
        c for c in QUESTIONS["drawing"].cases if c.batch == 1 and c.guidance == 3 and c.threads == 2 and c.dim == 256
    ]
    half, full = drawn
    assert (half.precision, full.precision) == ("bf16", "fp32")
    lines = [
        line("drawing", arm, s, c)
        for c, ours, other in ((half, 1.0, 30.0), (full, 2.0, 11.0))
        for arm, s in (("ours", ours), ("transfusion-pytorch", other))
    ]
    assert what_is_reached(lines)["drawing, images / s, threads 2, batch 1, guidance 3.0", key[1]] == ("11x", "bar")


def test_bars_of_memory_of_seconds_and_of_flops_are_read_from_their_lines():
    facts = {"units": {"positions": 1}, "peak": 10e9}
    lines = [
        line("training", "ours", 1.0, memory={"imported": 0, "peak": 2}),
        line("training", "transfusion-pytorch", 1.0, memory={"imported": 0, "peak": 16}),
        line("flops", "ours", 2.0, facts=facts | {"flops": 6e9}),
        line("flops", "ours, text alone", 2.0, facts=facts | {"flops": 7.2e9}),
        line("starting", "transfusion --help", 0.4),
    ]
    found = what_is_reached(lines)
    assert found["peak memory of a training step, threads 2", "transfusion-pytorch"] == ("0.12", "bar")
    assert found["forward and backward on a CPU", ""] == ("40%", "bar")
    assert found["a mixed row against one of text: seconds a FLOP", "ours, text alone"] == ("1.20", "missed")
    assert found["transfusion --help", ""] == ("0.4 s", "missed")


def test_what_failed_and_what_is_missing_stands_on_the_page():
    bad = {
        k: v
        for k, v in line("text", "ours", 1.0).items()
        if k in ("question", "arm", "answer", "case", "change", "device", "hardware")
    }
    bad |= {"error": "exit status 1: no | memory", "commit": "abc1234", "run": "2026-11-23T10:00:00", "load": 0.1}
    text = page.page([bad])
    assert "failed: exit status 1: no / memory" in text
    assert "Not measured: transfusion-pytorch, transformers Llama." in text
    assert "Not measured yet: `python bench/ask.py training`." in text
    assert rows(page.page([bad, line("text", "transformers Llama", 1.0)]), "| s |")[1]["s"] == "1", (
        "no ratio to nothing"
    )


def test_the_last_run_of_a_case_counts_with_all_its_arms_and_machines_are_apart(tmp_path):
    early, late = ({"run": f"2026-11-23T{hour}:00:00"} for hour in (10, 11))
    one, two = QUESTIONS["training"].cases[:2]
    first = [line("training", arm, s, one, **early) for arm, s in (("ours", 1.0), ("transfusion-pytorch", 6.0))]
    again, elsewhere = line("training", "ours", 2.0, one, **late), copy.deepcopy(first[0])
    elsewhere["hardware"]["processor"] = "Another"
    another = line(
        "training", "ours", 9.0, one, change={}, run="2026-11-23T12:00:00"
    )  # an arm that was measured so once
    assert QUESTIONS["training"].arms["ours"].change
    (tmp_path / "2026-a.jsonl").write_text("\n".join(map(json.dumps, [again, another])))
    kept = [line("training", "ours", 3.0, two, **early), elsewhere]
    (tmp_path / "2026-b.jsonl").write_text("\n".join(map(json.dumps, [*first, *kept])))
    lines = page.read(tmp_path.glob("*.jsonl"))
    assert [x["wall"]["median"] for x in lines] == [2.0, 3.0, 1.0]
    text = page.page(lines)
    assert "Another, 2 cores" in text and "Not measured: ours, rows at once, transfusion-pytorch, " in text


@pytest.mark.parametrize("a, b", [(2.0, 1.5), (0.01, 2.0), (5.0, 0.0)])
def test_a_power_law_is_found_again(a, b):
    found = page.fit([(x, a * x**b) for x in (1, 3, 10, 200)])
    assert found == pytest.approx((a, b), abs=1e-9)


def growth_lines() -> list[dict]:
    cases = QUESTIONS["growth-length"].cases
    return [
        line("growth-length", "ours", 1e-6 * c.positions**2, c, memory={"imported": 0, "peak": c.positions * 2**20})
        for c in cases
    ]


def test_exponents_of_time_and_memory_stand_on_the_page_and_a_plot_is_drawn(tmp_path):
    lines = growth_lines()
    found = rows(page.page(lines), "exponent")
    assert [(r["of"], r["exponent"], r["of the larger half"]) for r in found] == [
        ("s", "2.00", "2.00"),
        ("GiB", "1.00", "1.00"),
    ]
    assert found[0]["positions of a row"] == "256 - 16,384"
    assert tuple(r["expected"] for r in found) == QUESTIONS["growth-length"].expected
    pytest.importorskip("matplotlib")
    page.plot(QUESTIONS["growth-length"], lines, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_roofline_sets_seconds_beside_those_at_the_limits_and_python_beside_operators():
    names = [*CLASSES, REST]
    facts = {
        "units": {"positions": 1},
        "flops": 1.0,
        "peak": 100e9,
        "bandwidth": 10e9,
        "work": {"flops": dict.fromkeys(names, 0) | {"matmul": 50e9}, "bytes": dict.fromkeys(names, 1e9)},
    }
    numbers = dict.fromkeys(names, 1.0) | {"matmul": 2.0, "optimizer": 0.5}
    lines = [
        line("flops", "ours, profiled", 6.0, facts=facts, numbers=numbers),
        line("loader", "ours", 6.0, numbers={"x": 1}),
    ]
    found = rows(page.page(lines), "class")
    of = {r["class"]: (r["s"], r["share"], r["at the limits"]) for r in found}
    assert of["matmul"] == ("2", "33.3%", "0.5") and of["optimizer"] == ("0.5", "8.3%", "0.1")
    assert found[0]["class"] == "matmul" and len(of) == len(names) + 1
    assert of["between operators"] == ("0.5", "8.3%", "")


def test_every_growth_has_its_expected_exponents():
    assert all(len(q.expected) == 2 and all(q.expected) for q in QUESTIONS.values() if q.axis)
