"""The tables of a plan add up, for one device and for many."""

from dataclasses import replace

import pytest
from test_flops import CONFIG
from tiny_run import write_tiny

from transfusion.cli import main
from transfusion.cluster import GPUS, Cluster
from transfusion.flops import count_flops
from transfusion.plan import plan, plan_cluster, scale


def test_the_plan_is_a_table_with_totals_that_add_up():
    text = plan(CONFIG)
    for section in text.split("\n\n")[:3]:
        values = [float(line[28:40].replace(",", "")) for line in section.splitlines()[1:]]
        assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.006 * len(values))
    assert "1,000 steps of 1,024 positions = 1,024,000 positions" in text and "6 N D" in text


def test_a_cpu_keeps_the_scores_of_its_strips_too():
    def kept(config) -> float:
        return float(plan(config).partition("activations (about)")[2].split()[0].replace(",", ""))

    bf16 = replace(CONFIG, train=replace(CONFIG.train, precision="bf16", compile=True))
    assert kept(replace(bf16, device="cpu")) > kept(bf16)


def test_speeds_follow_from_the_flops_of_a_step():
    s = scale(CONFIG, Cluster(4), "h100", 0.5)
    flops = sum(count_flops(CONFIG).values())
    assert s.seconds == pytest.approx(flops / 4 / (0.5 * GPUS["h100"].flops))
    assert s.tokens * s.seconds == pytest.approx(8 * 128)
    assert s.days == pytest.approx(1000 * s.seconds / 86400)
    assert s.fits == ["none", "selective", "full"]


def test_what_does_not_fit_is_left_out_and_a_remedy_named(monkeypatch):
    small = replace(GPUS["h100"], memory=sum(scale(CONFIG, Cluster(4), "h100", 0.5).memory["full"].values()) / 0.899)
    monkeypatch.setitem(GPUS, "small", small)
    assert scale(CONFIG, Cluster(4), "small", 0.5).fits == ["full"]
    monkeypatch.setitem(GPUS, "small", replace(small, memory=small.memory / 2))
    assert "none: more ranks or shards" in plan_cluster(CONFIG, Cluster(4), "small")


def test_the_plan_for_many_has_three_columns_that_add_up():
    text = plan_cluster(CONFIG, Cluster(4), "a100", 0.3)
    section = next(part for part in text.split("\n\n") if part.startswith("memory of a rank"))
    rows = [[float(cell.replace(",", "")) for cell in line[28:].split()] for line in section.splitlines()[1:-1]]
    assert len(rows) > 6 and all(len(row) == 3 for row in rows)
    for column in zip(*rows):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.006 * len(column))
    assert "4 x a100 at 30% MFU" in text and "which computing hides up to" in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gpus", "3"], "make train.rows a multiple of"),
        (["--gpus", "2", "parallel.shards=3"], "choose a divisor"),
        (["--gpus", "2", "--mfu", "40"], "a share of the peak"),
        (["--gpus", "-4"], "at least 1 rank"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, says, tmp_path, capsys):
    config = write_tiny(tmp_path)
    assert main(["plan", str(config), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_command_plans_for_as_many_gpus_as_it_is_told(tmp_path, capsys):
    config, of_two = write_tiny(tmp_path), ["--gpus", "2", "--gpu", "h200", "--gpus-per-node", "1", "--mfu", "0.5"]
    assert main(["plan", str(config), *of_two]) == 0
    fsdp = capsys.readouterr().out
    assert "2 x h200 at 50% MFU" in fsdp and "sum over replicas" not in fsdp
    assert main(["plan", str(config), *of_two, "parallel.shards=1"]) == 0
    assert "sum over replicas" in capsys.readouterr().out
