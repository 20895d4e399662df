import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transfusion.data.processes import cores, side_by_side


def test_as_many_cores_are_counted_as_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7}, raising=False)
    assert cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def square_or_die(n: int) -> int:
    if n == 13:
        os._exit(1)
    return n * n


def test_results_come_in_order_and_a_killed_process_is_told():
    assert list(side_by_side(square_or_die, range(5), 0)) == [0, 1, 4, 9, 16]
    found = side_by_side(square_or_die, [3, 2, 13], 2)
    with pytest.raises(ValueError, match=r"killed, most likely for want of memory: .* fewer --workers"):
        list(found)


def say_and_wait(file: str) -> None:
    Path(file + ".new").write_text(str(os.getpid()))
    os.replace(file + ".new", file)
    time.sleep(600)


def is_alive(pid: int) -> bool:
    """As the system says; one that has ended and that nobody asked about has not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux who is alive")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    files = [str(tmp_path / name) for name in "ab"]
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_processes import say_and_wait
from transfusion.data.processes import side_by_side
list(side_by_side(say_and_wait, {files!r}, 2))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) as parent:
        while not all(map(os.path.exists, files)):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    workers = [int(Path(file).read_text()) for file in files]
    for _ in range(600):
        if not any(map(is_alive, workers)):
            return
        time.sleep(0.05)
    pytest.fail(f"{workers} live on")
