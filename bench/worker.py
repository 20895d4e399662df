"""One implementation in a process of its own, which stays and answers over a pipe, a JSON line each way.

    {"case": {...}, "answer": "ours.training"}   ->  {"versions": {...}, "device": "cpu"}    once all is imported
    {"build": true}                              ->  {}
    {"repeat": 3}                                ->  {"parts": {"forward": [wall, cpu]}, "numbers": {}, "calibration": }
    {"end": true}                                ->  {"memory": {...}, "facts": {...}}

What an answer is stands in answer.py.
"""

import importlib
import json
import os
import resource
import sys
import warnings
from dataclasses import fields

warnings.filterwarnings("ignore")


def main() -> int:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an implementation prints goes to the errors
    first = json.loads(sys.stdin.readline())
    if sys.platform == "linux" and first["case"]["device"] == "cpu":  # a failed allocation is told, a kill is not
        most = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    import torch
    from clock import Clock, calibrate, memory
    from content import Case
    from machine import versions

    given = {f.name: first["case"][f.name] for f in fields(Case)}
    case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    torch.set_num_threads(case.threads)
    module, _, name = first["answer"].partition(".")
    answer, clock = getattr(importlib.import_module(module), name), Clock(case.device)
    held = {"imported": memory(case.device)}
    device = torch.cuda.get_device_name() if case.device == "cuda" else "cpu"
    print(json.dumps({"versions": versions(), "device": device}), file=replies, flush=True)
    if not sys.stdin.readline():
        return 0
    repeat, facts = answer(case, clock)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "repeat" not in asked:
            break
        before = calibrate()
        numbers = repeat(asked["repeat"]) or {}
        calibration = min(before, calibrate())
        done = {"parts": clock.take(), "numbers": numbers, "calibration": calibration}
        print(json.dumps(done), file=replies, flush=True)
    held["peak"] = memory(case.device)
    found = {name: fact() if callable(fact) else fact for name, fact in facts.items()}
    print(json.dumps({"memory": held, "facts": found}), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
