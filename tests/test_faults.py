"""What goes wrong in one of several ranks: nothing is lost beyond the last checkpoint, and all say what it was."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from ranks import TORCHRUN, launch, quiet
from test_parallel import assert_alike
from tiny_run import stored, write_tiny

from transfusion.checkpoint import checkpoints, latest_checkpoint, read_state
from transfusion.config import load_config
from transfusion.metrics import read_records
from transfusion.run import RunConfig
from transfusion.train import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun, limits and /proc")
SHORT = ["train.steps=20", "train.rows=4", "train.log_every=1", "train.save_every=5", "train.keep=9"]
FAULTS = str(Path(__file__).with_name("faults.py"))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


def words(config: Path, run: Path, *overrides: str) -> list[str]:
    return ["train", str(config), *SHORT, f"out={run}", *overrides, "--resume"]


def failing(
    kind: str, config: Path, run: Path, *overrides: str, restarts: int = 0, step: int = 12
) -> subprocess.CompletedProcess:
    """Two ranks train, of which the second has this fault in that step."""
    ranks = ["--nproc-per-node=2", f"--max-restarts={restarts}", FAULTS, kind, "1", str(step)]
    return subprocess.run([*TORCHRUN, *ranks, *words(config, run, *overrides)], **quiet(), timeout=300)


def saved(run: Path) -> list[int]:
    assert not list((run / "checkpoints").glob(".tmp*"))
    return [read_state(path)["step"] for path in checkpoints(run / "checkpoints")]


def test_a_rank_that_dies_is_started_again_and_the_run_ends_as_if_it_had_not(config, tmp_path):
    done = failing("dies", config, tmp_path / "died", restarts=1)
    assert done.returncode == 0 and "failed (exitcode: " in done.stderr, (
        done.stderr
    )  # of the first that torchrun sees end
    train(load_config(RunConfig, config, SHORT), tmp_path / "whole")
    assert_alike(tmp_path / "whole", tmp_path / "died")


def test_where_a_rank_hangs_all_say_where_they_stand_and_leave(config, tmp_path):
    done = failing("hangs", config, tmp_path, "parallel.timeout=15")
    assert done.returncode != 0
    assert "Timeout (0:00:16)!" in done.stderr and "in fail" in done.stderr, "the one that hangs is seen where it does"
    # the first to leave closes what the other waits for, which may hear of it before its own time is up
    assert done.stderr.count("Timeout (0:00:16)!") == 2 or "rank 0 ends: " in done.stderr, done.stderr
    for rank in {0, 1} if done.stderr.count("Timeout (0:00:16)!") == 2 else {1}:
        assert f"rank {rank}: a step has not ended in parallel.timeout = 15 s" in done.stderr
    assert "raise parallel.timeout" in done.stderr
    assert saved(tmp_path) == [5, 10]


START = """
import os, sys, time
from transfusion.parallel import ParallelConfig, join

with join(ParallelConfig(timeout=0.5), "cpu") as ranks:
    with ranks.lead_first():
        if ranks.leads:
            time.sleep(3)  # as long as six steps may take
    print("begun", flush=True)
    ranks.meet()
    if ranks.rank == int(sys.argv[1]):
        if ranks.leads:
            os.kill(os.getpid(), 9)
        raise ValueError("no such data")
    ranks.meet()
"""


@pytest.mark.parametrize("ends, says", [(0, "gone, and so is rank 0"), (1, "has failed: rank 1: no such data")])
def test_a_start_may_take_longer_than_a_step_and_ends_where_a_rank_does(ends, says):
    """Without torchrun, which would end the other one: rank 0 is killed, or rank 1 finds a mistake."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen([sys.executable, "-c", START, str(ends)], **quiet(**told, RANK=rank, LOCAL_RANK=rank))
        for rank in "01"
    ]
    said = [rank.communicate(timeout=60) for rank in ranks]
    out, err = said[1 - ends]
    assert (out, ranks[1 - ends].returncode) == ("begun\n", 2) and says in err, err
    assert "rank 1 waits for the start of others: 1 of 2 are here" in said[1][1], "every half second"


def test_a_step_with_nan_in_one_rank_is_skipped_by_all(config, tmp_path):
    done = failing("finds nan", config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["skipped"] for r in read_records(tmp_path / "metrics.jsonl")] == [0] * 12 + [1] * 8
    assert saved(tmp_path) == [5, 10, 15, 20]


def test_a_sheet_for_which_a_rank_has_no_room_is_left_out_by_all_and_training_goes_on(config, tmp_path):
    done = failing("has no room", config, tmp_path, "train.sample_every=5", "train.precision=bf16", step=9)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("no sheet is drawn, as memory does not suffice") == 1 and "rank 1: all taken" in done.stderr
    )
    sheets = {path.name: PIL.Image.open(path) for path in (tmp_path / "samples").iterdir()}
    assert set(sheets) == {f"step_{step:08d}.png" for step in (5, 15, 20)}
    assert all(len(sheet.convert("RGB").getcolors(10**6)) > 12 for sheet in sheets.values()), "the real ones have 12"
    assert saved(tmp_path) == [5, 10, 15, 20]


@pytest.mark.parametrize("how", ["train.save_async=false", "train.save_async=true"])
def test_where_one_rank_cannot_write_all_leave_with_its_reason(config, tmp_path, how):
    done = failing("has no disk left", config, tmp_path, how)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    first, second = sorted(said, key=lambda line: " ends as " in line)
    assert first[6:].startswith(" ends: ") and "cannot be written" in first and "rank 1: " in first, done.stderr
    assert second.endswith(f" ends as {first[:6]} does"), done.stderr
    assert saved(tmp_path) == [5, 10]


def test_a_loader_that_is_killed_ends_its_rank_and_a_restart_goes_on(config, tmp_path):
    done = failing("loses a worker", config, tmp_path, "data.workers=1", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "DataLoader worker" in done.stderr and "rank 1 ends: " in done.stderr
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 21))


def test_a_signal_to_every_process_stops_all_with_a_checkpoint(config, tmp_path):
    longer = ["train.steps=100000", "train.save_every=0"]
    handed_on = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "60"]
    command = [*TORCHRUN, "--nproc-per-node=2", *handed_on, "-m", "transfusion.cli", *words(config, tmp_path, *longer)]
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(command, **{**quiet(), "stdout": said, "stderr": said})
        lines = tmp_path / "metrics.jsonl"
        while not (lines.exists() and len(lines.read_text().splitlines()) > 3) and torchrun.poll() is None:
            time.sleep(0.01)
        for pid in (*children(torchrun.pid), torchrun.pid):  # as Slurm does; torchrun then tells the ranks once more
            os.kill(pid, signal.SIGUSR1)
        torchrun.wait(timeout=120)
    (step,), text = saved(tmp_path), (tmp_path / "said").read_text()
    assert 3 < step < 100000 and f"at step {step} of 100000" in text
    assert "SIGKILL" not in text, "all ended by themselves, long before torchrun's patience was over"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(name, config, tmp_path):
    done = failing(f"is told by {name}", config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stopped by" in done.stdout and "at step 13 of 20" in done.stdout
    assert saved(tmp_path) == [5, 10, 13]


KILLS = int(os.environ.get("TRANSFUSION_KILLS", 2))  # 20 were tried: docs/log.md


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    """What a process was started as; "" = it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("n", [1, 2])
def test_ranks_that_are_killed_again_and_again_train_what_undisturbed_ones_do(n, config, tmp_path):
    """One alone to the last bit."""
    dice, run, steps = random.Random(1), tmp_path / "killed", 60 * (KILLS + 1)
    longer = [f"train.steps={steps}", "train.save_every=3", "train.keep=2"]
    command = [*TORCHRUN, f"--nproc-per-node={n}", f"--max-restarts={2 * KILLS}", "-m", "transfusion.cli"]
    with (tmp_path / "said").open("w") as said:
        pipes = {**quiet(), "stdout": said, "stderr": said}
        torchrun = subprocess.Popen([*command, *words(config, run, *longer)], **pipes)
    lines, killed = run / "metrics.jsonl", 0
    while killed < KILLS and torchrun.poll() is None:
        seen = lines.stat().st_mtime_ns if lines.exists() else 0
        begun = time.monotonic()  # most are killed in the middle of training, some on their way to it
        wait = dice.choice([600.0, 600.0, 600.0, dice.uniform(0, 3)])
        while time.monotonic() - begun < wait and torchrun.poll() is None:
            if lines.exists() and lines.stat().st_mtime_ns != seen:
                break
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.2))
        ranks = [pid for pid in children(torchrun.pid) if "transfusion.cli" in command_of(pid)]
        if len(ranks) == n:
            os.kill(dice.choice(ranks), signal.SIGKILL)
            killed += 1
    assert torchrun.wait(timeout=600) == 0, (tmp_path / "said").read_text()[-3000:]
    assert killed == KILLS, f"the run was over after {killed} kills"
    whole = {"config": config, "overrides": [*SHORT, *longer], "out": tmp_path / "whole"}
    launch(n, [whole], tmp_path)
    assert_alike(tmp_path / "whole", run, steps)
    a, b = (stored(latest_checkpoint(folder / "checkpoints")) for folder in (tmp_path / "whole", run))
    assert max((a[name] - b[name]).abs().max() for name in a) <= (0 if n == 1 else 1e-5)
    if n == 1:
        a, b = (read_records(folder / "metrics.jsonl") for folder in (tmp_path / "whole", run))
        assert all(x[key] == y[key] for x, y in zip(a, b) for key in ("lm_loss", "image_loss", "grad_norm"))
