"""The page is what the lines give: the committed one, its ratios, its exponents."""

import copy
import json
from dataclasses import asdict

import page
import pytest
from content import Case
from operators import CLASSES, REST
from questions import QUESTIONS


def line(question: str, arm: str, seconds: float, case: Case | None = None, **fields) -> dict:
    """A line of results, as ask.py writes it."""
    case = case or QUESTIONS[question].cases[0]
    return {
        "question": question,
        "arm": arm,
        "case": json.loads(json.dumps(asdict(case))),
        "change": {},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "n": 9,
        "wall": {"q25": seconds * 0.9, "median": seconds, "q75": seconds * 1.1},
        "cpu": {"q25": seconds, "median": seconds / 2, "q75": seconds},
        "parts": {"forward": {"wall": seconds / 4, "cpu": 0.1}, "backward": {"wall": seconds / 2, "cpu": 0.1}},
        "numbers": {},
        "calibration": {"median": 40.0, "worst": 30.0},
        "memory": {"imported": 2**29, "built": 2**30, "peak": 3 * 2**30},
        "facts": {"units": {"positions": 4000}, "parameters": 5_000_000},
        "commit": "abc1234",
        "date": "2026-11-23",
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


def test_a_ratio_is_a_median_over_the_first_arms_in_the_same_case():
    one, two = QUESTIONS["training"].cases[:2]
    text = page.page(
        [
            line("training", "transfusion-pytorch", 6.0, one),
            line("training", "ours", 2.0, one),
            line("training", "ours", 1.0, two),
            line("training", "transfusion-pytorch", 5.0, two, cpu={"q25": 1, "median": 4.0, "q75": 5}),
        ]
    )
    found = rows(text, "wall x")
    assert [(r["threads"], r["arm"], r["wall x"], r["cpu x"]) for r in found] == [
        ("1", "ours", "", ""),
        ("1", "transfusion-pytorch", "3.00", "3.00"),
        ("2", "ours", "", ""),
        ("2", "transfusion-pytorch", "5.00", "8.00"),
    ]
    assert (
        found[0]
        | {
            "s": "2",
            "quartiles": "1.8 - 2.2",
            "positions / s": "2,000",
            "GiB": "3.00",
            "above imports": "2.50",
            "calm": "0.75",
            "n": "9",
            "forward": "0.5",
        }
        == found[0]
    )
    assert "A Processor, 2 cores, 24 GiB, avx512_bf16; torch 2.13.0; commit abc1234 (2026-11-23)." in text


def test_arms_are_compared_whatever_they_change():
    lines = [line("attention", way, s, change={"way": way}) for way, s in (("dense", 2.0), ("documents", 1.0))]
    assert [r["wall x"] for r in rows(page.page(lines), "wall x")] == ["", "0.50"]


def test_mfu_is_flops_a_second_over_the_peak():
    facts = {"units": {"positions": 1}, "flops": 6e9, "peak": 12e9}
    (found,) = rows(page.page([line("gpu", "ours", 2.0, facts=facts)]), "MFU")
    assert (found["GFLOP"], found["MFU"]) == ("6", "25.0%")


def test_what_failed_and_what_is_missing_stands_on_the_page():
    bad = {
        k: v
        for k, v in line("text", "ours", 1.0).items()
        if k in ("question", "arm", "case", "change", "device", "hardware")
    }
    bad |= {"error": "exit status 1: no | memory", "commit": "abc1234", "date": "2026-11-23"}
    text = page.page([bad])
    assert "failed: exit status 1: no / memory" in text
    assert "Not measured: transfusion-pytorch, transformers Llama." in text
    assert "Not measured yet: `python bench/ask.py training`." in text
    assert rows(page.page([bad, line("text", "transformers Llama", 1.0)]), "| s |")[1]["s"] == "1", (
        "no ratio to nothing"
    )


def test_of_two_lines_the_later_counts_and_machines_are_apart(tmp_path):
    first, second = line("loader", "ours", 1.0), line("loader", "ours", 2.0)
    other = copy.deepcopy(first)
    other["hardware"]["processor"] = "Another"
    (tmp_path / "2026-a.jsonl").write_text(json.dumps(first) + "\n")
    (tmp_path / "2026-b.jsonl").write_text(json.dumps(second) + "\n" + json.dumps(other) + "\n")
    lines = page.read(tmp_path.glob("*.jsonl"))
    assert [x["wall"]["median"] for x in lines] == [2.0, 1.0]
    text = page.page(lines)
    assert text.count("| ours |") == 2 and "Another, 2 cores" in text


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
    pytest.importorskip("matplotlib")
    page.plot(QUESTIONS["growth-length"], lines, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_roofline_divides_the_least_seconds_by_those_that_were_taken():
    names = [*CLASSES, REST]
    facts = {
        "units": {"positions": 1},
        "flops": 1.0,
        "peak": 100e9,
        "bandwidth": 10e9,
        "work": {"flops": dict.fromkeys(names, 0) | {"matmul": 50e9}, "bytes": dict.fromkeys(names, 1e9)},
    }
    numbers = dict.fromkeys(names, 1.0) | {"matmul": 2.0, "optimizer": 0.5}
    found = rows(page.page([line("flops", "ours, profiled", 6.0, facts=facts, numbers=numbers)]), "reached")
    of = {r["class"]: (r["least s"], r["reached"]) for r in found}
    assert of["matmul"] == ("0.5", "25%") and of["optimizer"] == ("0.1", "20%") and len(of) == len(names)
    assert found[0]["class"] == "matmul" and found[0]["share"] == f"{2 / 5.5:.1%}"
