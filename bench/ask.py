"""Measures: every arm of a question in a process of its own, repetition by repetition in turn, one JSON line a result.

    python bench/ask.py training --peer-python PEER/bin/python         # on an idle machine
    python bench/ask.py gpu gpu-fsdp gpu-drawing --minutes 7 --out FILE.jsonl   # on a GPU
    python bench/ask.py training dim=64 depth=2 peak=64 --repeat 1     # fields of the case (content.py), for all cases

Round r begins with arm r, so that no arm always comes first. A figure is the median over the rounds, of wall and of
processor seconds, with its quartiles; round 0 is warm-up. What could not be measured is a line too, with its error.
Lines go to bench/results, those of cases with changed fields to runs/bench.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles

from content import Case
from machine import ROOT, commit, hardware
from questions import MAKE_PEER, OWN, PEER, QUESTIONS, Arm

from transfusion.config import override

NO_PEER = f"""Its Python is to be named by --peer-python PEER/bin/python, and made by
{MAKE_PEER}"""


CLOCKS = ("wall", "cpu")


class Worker:
    """An arm's process; ValueError with its last words where it ended."""

    def __init__(self, python: str, arm: Arm, case: Case):
        environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT)}
        self.errors = tempfile.TemporaryFile()
        command = [python, str(ROOT / "bench" / "worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.send(case=asdict(case), answer=arm.answer)

    def send(self, **line) -> None:
        """Asks, without waiting for the reply."""
        try:
            print(json.dumps(line), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the reply will say why

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"exit status {code}: {' '.join(last) or 'no last words; killed for its memory?'}")

    def ask(self, **line) -> dict:
        self.send(**line)
        return self.reply()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it tries once more to send what could not be sent
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"q25": low, "median": median(values), "q75": high}


def summary(replies: list[dict]) -> dict:
    """What the repetitions of an arm come to."""
    rounds = {clock: [sum(p[k] for p in r["parts"].values()) for r in replies] for k, clock in enumerate(CLOCKS)}
    parts = {
        name: {clock: median(r["parts"][name][k] for r in replies) for k, clock in enumerate(CLOCKS)}
        for name in replies[0]["parts"]
    }
    return {
        "n": len(replies),
        **{clock: spread(seconds) for clock, seconds in rounds.items()},
        "rounds": rounds,
        "parts": parts,
        "numbers": {name: median(r["numbers"][name] for r in replies) for name in replies[0]["numbers"]},
        "calibration": median(r["calibration"] for r in replies),
    }


def measure(
    arms: dict[str, Arm], pythons: dict[str, str], case: Case, rounds: int, seconds: float, end: float = math.inf
) -> Iterator[dict]:
    """A line of results for each arm; rounds end early, with three at least, so many seconds after the warm-up, or at
    the monotonic clock's `end`."""
    workers, hellos, replies, errors = {}, {}, {name: [] for name in arms}, {}

    def attempt(name: str, work):
        try:
            return work()
        except ValueError as error:
            errors[name] = str(error)

    try:
        for name, arm in arms.items():
            workers[name] = Worker(pythons[arm.python], arm, replace(case, **arm.change))
        for name in arms:
            hellos[name] = attempt(name, workers[name].reply)
        torches = {name: hello["versions"]["torch"] for name, hello in hellos.items() if hello}
        if len(set(torches.values())) > 1:
            raise ValueError(f"torch differs: {torches}: install the same one, +cpu or not, for all")
        for name in torches:
            attempt(name, lambda name=name: workers[name].ask(build=True))
        for r in range(rounds + 1):
            names = [name for name in arms if name not in errors]
            for name in names[r % max(1, len(names)) :] + names[: r % max(1, len(names))]:
                reply = attempt(name, lambda name=name, r=r: workers[name].ask(repeat=r))
                if reply and r:
                    replies[name].append(reply)
            if r == 0:  # the warm-up may have compiled for minutes
                until = min(time.monotonic() + seconds, end)
            elif r >= 3 and time.monotonic() > until:
                break
        for name, arm in arms.items():
            line = {"arm": name, "answer": arm.answer, "case": asdict(case), "change": arm.change}
            memory = None if name in errors else attempt(name, lambda name=name: workers[name].ask(end=True))
            if name in errors:
                device = (hellos[name] or {}).get("device", case.device)
                yield line | {"error": errors[name], "device": device}
            else:
                yield line | hellos[name] | summary(replies[name]) | memory
    finally:
        for worker in workers.values():
            worker.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this repository and its peers in turn.")
    parser.add_argument("what", nargs="*", metavar="QUESTION | field=value", help=f"questions: {', '.join(QUESTIONS)}")
    parser.add_argument("--peer-python", default="", help="the Python of an environment with transfusion-pytorch")
    parser.add_argument("--repeat", type=int, default=11, help="rounds besides the first")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument(
        "--case-minutes", type=float, default=0.5, help="begin no round but the first three so many after the warm-up"
    )
    parser.add_argument("--commit", default=commit(), help="of the code, where git does not know it")
    parser.add_argument(
        "--out", type=Path, help="file of results, which grows; otherwise DATE-QUESTION.jsonl where they belong"
    )
    args = parser.parse_intermixed_args(argv)
    asked = [w for w in args.what if "=" not in w]
    until = time.monotonic() + 60 * args.minutes
    try:
        if not asked:
            raise ValueError(f"name a question: {', '.join(QUESTIONS)}")
        if unknown := [name for name in asked if name not in QUESTIONS]:
            raise ValueError(f"no question {unknown[0]!r}: choose some of {', '.join(QUESTIONS)}")
        if args.repeat < 1:
            raise ValueError(f"--repeat {args.repeat}: at least 1 round beside the warm-up")
        if not args.commit:
            raise ValueError("git knows no commit here: give the code's by --commit")
        overrides = [w for w in args.what if "=" in w]
        cases = {name: list(dict.fromkeys(override(c, overrides) for c in QUESTIONS[name].cases)) for name in asked}
        about = {"commit": args.commit, "run": time.strftime("%FT%T"), "load": os.getloadavg()[0]}
        folder = ROOT / ("runs/bench" if overrides else "bench/results")
        for name in asked:
            out = args.out or folder / f"{time.strftime('%F')}-{name}.jsonl"
            ask(name, cases[name], args, about | {"hardware": hardware()}, until, out)
    except (ValueError, OSError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 2
    return 0


def ask(name: str, cases: list[Case], args: argparse.Namespace, about: dict, until: float, out: Path) -> None:
    """Appends the lines of one question to `out`, each with what it is `about`."""
    pythons = {OWN: sys.executable, PEER: args.peer_python}
    arms = {arm: a for arm, a in QUESTIONS[name].arms.items() if pythons[a.python]}
    if left_out := sorted(set(QUESTIONS[name].arms) - set(arms)):
        print(f"{name}: not measured: {', '.join(left_out)}. {NO_PEER}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(cases):
        if time.monotonic() > until:
            print(f"{name}: not measured, the time is over: {len(cases) - i} of {len(cases)} cases", file=sys.stderr)
            return
        for line in measure(arms, pythons, case, args.repeat, 60 * args.case_minutes, until):
            with out.open("a") as file:
                file.write(json.dumps({"question": name, **line, **about}) + "\n")
            says = line.get("error") or f"{line['wall']['median']:.4g} s, processor {line['cpu']['median']:.4g} s"
            print(f"{name} {i + 1}/{len(cases)} {line['arm']}: {says}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
