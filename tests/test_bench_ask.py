"""Arms are measured in turn, each in its own process; what fails or is missing is said, never left out in silence."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import ask
import pytest
from content import Case
from questions import AXES, MAKE_PEER, PEER, QUESTIONS, Arm
from test_bench_content import TINY

ARMS = {"a": Arm("ours.training"), "b": Arm("ours.training"), "c": Arm("ours.training", change={"way": "other"})}


class Fake:
    """A worker that notes who was asked what; `fails` names one that fails in round 2."""

    asked: ClassVar[list[tuple[str, int]]] = []
    fails = other_torch = ""

    def __init__(self, python: str, arm: Arm, case: Case):
        self.name = next((name for name, a in ARMS.items() if a is arm), "other")
        self.torch = f"2.13.0{'+cpu' * (self.name == self.other_torch)}"

    def reply(self) -> dict:
        return {"versions": {"torch": self.torch}, "device": "cpu"}

    def ask(self, **line) -> dict:
        if "build" in line:
            return {}
        if "end" in line:
            return {"memory": {"peak": 1}, "facts": {}}
        r = line["repeat"]
        self.asked.append((self.name, r))
        if (self.name, r) == (self.fails, 2):
            raise ValueError("exit status 1: its last words")
        seconds = 100.0 if r == 0 else float(r)
        return {"parts": {"x": [seconds, 2 * seconds], "y": [1.0, 1.0]}, "numbers": {"z": r}, "calibration": 10.0 - r}

    def close(self) -> None:
        self.asked.append((self.name, "close"))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(ask, "Worker", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    return Fake


def test_every_round_asks_every_arm_once_and_begins_with_another(fake):
    list(ask.measure(ARMS, {"own": ""}, TINY, 4, float("inf")))
    rounds = [[name for name, r in fake.asked if r == i] for i in range(5)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc"), list("bca")]


def test_a_line_has_medians_and_quartiles_without_the_first_round(fake):
    a, _, c = ask.measure(ARMS, {"own": ""}, TINY, 5, float("inf"))
    assert a["n"] == 5 and a["wall"] == {"q25": 3.0, "median": 4.0, "q75": 5.0} and a["cpu"]["median"] == 7.0
    assert a["parts"] == {"x": {"wall": 3.0, "cpu": 6.0}, "y": {"wall": 1.0, "cpu": 1.0}} and a["numbers"] == {"z": 3}
    assert a["calibration"] == 7.0 and a["rounds"] == {"wall": [2, 3, 4, 5, 6], "cpu": [3, 5, 7, 9, 11]}
    assert Case(**a["case"]) == Case(**c["case"]) == TINY and c["change"] == {"way": "other"}


def test_an_arm_that_fails_has_a_line_that_says_how_and_the_others_go_on(fake, monkeypatch):
    monkeypatch.setattr(Fake, "fails", "b")
    a, b, c = ask.measure(ARMS, {"own": ""}, TINY, 4, float("inf"))
    assert b["error"] == "exit status 1: its last words" and "wall" not in b
    assert (a["n"], c["n"]) == (4, 4) and ("b", 3) not in fake.asked


def test_arms_of_another_torch_are_refused_before_any_of_them_is_asked(fake, monkeypatch):
    monkeypatch.setattr(Fake, "other_torch", "b")
    with pytest.raises(ValueError, match=r"torch differs: .*'b': '2.13.0.cpu'.*install the same"):
        list(ask.measure(ARMS, {"own": ""}, TINY, 4, float("inf")))
    assert fake.asked == [(name, "close") for name in ARMS]


def test_the_time_of_a_case_begins_when_the_warm_up_is_over(fake, monkeypatch):
    monkeypatch.setattr(
        ask.time, "monotonic", lambda: sum(1000 if r == 0 else 1 for _, r in fake.asked if r != "close")
    )
    lines = list(ask.measure(ARMS, {"own": ""}, TINY, 99, 20.0))  # a round takes 3 s, the warm-up 3000
    assert {line["n"] for line in lines} == {7}


def test_where_the_time_is_over_a_case_ends_with_three_rounds_and_the_next_is_named(
    fake, monkeypatch, tmp_path, capsys
):
    lines = list(ask.measure(ARMS, {"own": ""}, TINY, 99, 0.0))
    assert {line["n"] for line in lines} == {3}
    out = tmp_path / "out.jsonl"
    assert ask.main(["compiled", "--case-minutes", "0", "--out", str(out), "--commit", "named"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4 and {line["n"] for line in lines} == {3} and {line["commit"] for line in lines} == {"named"}
    assert len({line["run"] for line in lines}) == 1
    out.unlink()
    assert ask.main(["training", "--minutes", "0", "--out", str(out)]) == 0
    assert "training: not measured, the time is over: 4 of 4 cases" in capsys.readouterr().err and not out.exists()


def test_two_processes_answer_one_fails_one_is_missing_and_each_is_told(tmp_path, capsys):
    fields = [f"{k}={v}" for k, v in asdict(TINY).items() if k not in ("config", "way", "peak")]
    fields = [f.lower() for f in [*fields, "peak=32"]]
    out = tmp_path / "sub" / "out.jsonl"
    assert ask.main(["text", *fields, "--repeat", "1", "--out", str(out)]) == 0
    ours, llama = map(json.loads, out.read_text().splitlines())
    assert (ours["arm"], llama["arm"]) == ("ours", "transformers Llama") and ours["question"] == "text"
    assert ours["wall"]["median"] > 0 and ours["n"] == 1 and ours["case"]["images"] == 2
    assert 0 < ours["memory"]["imported"] <= ours["memory"]["peak"] and ours["run"] == llama["run"]
    assert ours["facts"]["flops"] > 0 and ours["facts"]["peak"] > 0 and ours["hardware"]["cores"] and ours["commit"]
    assert llama["error"].startswith("exit status 1") and ("images=0" in llama["error"] or "transf" in llama["error"])
    said = capsys.readouterr().err
    assert "text: not measured: transfusion-pytorch" in said and MAKE_PEER in said


def test_a_process_that_was_killed_is_told_and_the_run_goes_on():
    worker = ask.Worker(sys.executable, Arm("ours.training"), TINY)
    worker.process.kill()
    worker.process.wait()
    for _ in range(2):
        with pytest.raises(ValueError, match="exit status -9: no last words"):
            worker.ask(repeat=0)
    worker.close()


def test_lines_of_cases_with_changed_fields_do_not_go_to_the_page(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(ask, "ROOT", tmp_path)
    for fields, folder in (([], "bench/results"), (["rows=1"], "runs/bench")):
        assert ask.main(["compiled", *fields, "--repeat", "1", "--commit", "named"]) == 0
        assert [path.parent for path in tmp_path.rglob("*.jsonl")] == [tmp_path / folder]
        next(tmp_path.rglob("*.jsonl")).unlink()


def test_questions_that_are_none_and_fields_that_are_none_are_refused(capsys):
    for wrong, says in (
        (["trainig"], "no question 'trainig': choose some of training"),
        (["training", "dmi=3"], "dmi"),
        (["training", "--repeat", "0"], "at least 1 round"),
        (["threads=1"], "name a question: training"),
        (["training", "precision=fp16"], "precision = 'fp16': choose bf16 or fp32"),
        (["training", "threads=0"], "threads = 0: at least 1"),
        (["training", "dim=90"], "dim = 90 does not split into heads = 4"),
        (["training", "--commit", ""], "give the code's by --commit"),
    ):
        assert ask.main(wrong) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_asks_of_answers_that_exist_and_never_the_same_twice(name):
    question = QUESTIONS[name]
    assert len(set(question.cases)) == len(question.cases) > 0
    assert question.axis in ("", *AXES)
    for arm in question.arms.values():
        module, _, function = arm.answer.partition(".")
        code = (ask.ROOT / "bench" / f"{module}.py").read_text()
        assert f"def {function}(case: Case, clock: Clock)" in code
        assert (arm.python == PEER) == ("transfusion_pytorch" in arm.change.values() or module == "peer_lucid")
        for case in question.cases:
            changed = replace(case, **arm.change)
            assert not changed.config or Path(ask.ROOT / changed.config).is_file()
