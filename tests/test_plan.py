"""The tables of a plan add up, for one device and for many."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import memory
import pytest
from test_flops import CONFIG
from tiny_run import write_tiny

from transfusion.cli import main, parse
from transfusion.cluster import GPUS, Cluster
from transfusion.config import load_config
from transfusion.flops import count_flops, parameters_of
from transfusion.memory import drawing_memory, estimate_memory
from transfusion.plan import plan, plan_cluster, scale
from transfusion.run import RunConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/scaling.md").read_text()


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


def test_a_sheet_takes_the_whole_model_in_the_precision_that_it_is_drawn_in():
    n = sum(parameters_of(CONFIG.model).values())
    full = replace(CONFIG, train=replace(CONFIG.train, precision="fp32"))
    assert (
        drawing_memory(full) == 4 * n
        and 2 * n < drawing_memory(replace(CONFIG, train=replace(CONFIG.train, precision="bf16"))) < 4 * n
    )
    drawing = replace(CONFIG, train=replace(CONFIG.train, sample_every=9))
    assert ["a sheet: " in plan_cluster(drawing, Cluster(n)) for n in (1, 4)] == [False, True]
    assert "a sheet: " not in plan_cluster(replace(drawing, train=replace(drawing.train, sample_every=0)), Cluster(4))


def test_speeds_follow_from_the_flops_of_a_step():
    s = scale(CONFIG, Cluster(4), "h100", 0.5)
    flops = sum(count_flops(CONFIG).values())
    assert s.seconds == pytest.approx(flops / 4 / (0.5 * GPUS["h100"].flops))
    assert s.tokens * s.seconds == pytest.approx(8 * 128)
    assert s.days == pytest.approx(1000 * s.seconds / 86400)
    assert s.saved == 16 * sum(parameters_of(CONFIG.model).values()), "weights, two moments, average; in four bytes"
    assert s.texts + s.drawn * (16 + 2) == pytest.approx(1000 * 8 * 128), "images are of 16 patches, <boi> and <eoi>"
    assert s.read == pytest.approx(2 * s.texts + 3 * 16 * 16 * s.drawn), "a pixel has three bytes"
    latents = replace(CONFIG, data=replace(CONFIG.data, codec="runs/codec"))
    assert scale(latents, Cluster(4), "h100", 0.5).read == pytest.approx(2 * s.texts + 4 * 3 * 16 * 16 * s.drawn)
    assert s.fits == ["none", "selective", "full"]


def test_what_does_not_fit_is_left_out_and_a_remedy_named(monkeypatch):
    small = replace(GPUS["h100"], memory=sum(scale(CONFIG, Cluster(4), "h100", 0.5).memory["full"].values()) / 0.899)
    monkeypatch.setitem(GPUS, "small", small)
    assert scale(CONFIG, Cluster(4), "small", 0.5).fits == ["full"]
    monkeypatch.setitem(GPUS, "small", replace(small, memory=small.memory / 2))
    assert "none: more GPUs" in plan_cluster(CONFIG, Cluster(4), "small")


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
        (["--gpus", "2", "--storage", "0"], "GB/s, above 0"),
        (["--gpus", "2", "--gpu", "a100", "train.float8=true", "train.precision=bf16"], "a100 does not multiply it"),
        (["train.compile=true", "train.checkpointing=full"], "leave one of the two out"),  # on the CPU that it names
        (["parallel.shards=2"], "say how many ranks by --gpus"),
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
    assert main(["plan", str(config), *of_two, "parallel.context=2"]) == 0
    shared = capsys.readouterr().out
    assert "gather keys and values" in shared and "1 x 2 rows x 32 positions" in shared


def test_every_block_of_the_scaling_page_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```\n\$ transfusion ([^\n]*)\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 4
    for command, shown in blocks:
        assert main(shlex.split(command)) == 0
        printed = iter(capsys.readouterr().out.splitlines())
        for line in filter(None, shown.splitlines()):
            assert line in printed, f"{command} does not print, behind the line before it: {line}"


def test_the_command_of_the_scaling_page_has_every_option():
    (shown,) = re.findall(r"^transfusion (plan CONFIG .*)$", PAGE, re.M)
    options = {name: values for name, values in re.findall(r"\[(--[\w-]+) ([^\]]+)\]", shown)}
    gpus, args = options.pop("--gpu").split("|"), parse(["plan", "configs/demo.toml"])
    assert gpus[0] == args.gpu and set(gpus) == set(GPUS)
    assert {k: float(v) for k, v in options.items()} == {
        "--gpus-per-node": args.gpus_per_node,
        "--mfu": args.mfu,
        "--storage": args.storage,
    }


def test_the_measured_table_of_the_scaling_page_is_that_of_the_results():
    lines = (ROOT / "bench/results/2026-11-23-memory/results.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert "\n".join([memory.HEAD, *map(memory.row, found)]) in PAGE
    for line in found:
        if line["allocator"] == "mapped":
            assert line["measured"] == pytest.approx(line["plan"], rel=0.15)


def test_the_plan_of_now_is_within_15_percent_of_what_steps_of_three_sizes_took():
    lines = (ROOT / "bench/results/2026-11-23-memory/results.jsonl").read_text().splitlines()
    found = [
        line for line in map(json.loads, lines) if (line["checkpointing"], line["allocator"]) == ("none", "mapped")
    ]
    for line, case in zip(found, memory.CASES[:3]):
        assert line["case"].items() <= json.loads(json.dumps(asdict(case))).items(), "which has options since"
        assert memory.planned(case, "none")["plan"] / 2**20 == pytest.approx(line["measured"], rel=0.15)


def test_the_plan_is_within_a_tenth_of_what_an_h100_took():
    measured = (ROOT / "bench/results/2026-11-22-h100-micro-batches.md").read_text()
    rows = re.findall(r"^\| ([\d.]+B) \| (\d) \| (\d+) \| ([\d.]+) \|$", PAGE, re.M)
    assert len(rows) == 4
    for size, n, gib, planned in rows:
        assert re.search(rf"^\| {size} \| {n} \| [\d.]+ \| {gib} \|$", measured, re.M)
        path = ROOT / f"configs/paper-{size.lower()}-linear.toml"
        config = load_config(RunConfig, path, ["train.micro_batch=0", f"train.rows={n}"])
        estimate = sum(estimate_memory(config).values()) / 2**30
        assert estimate == pytest.approx(float(planned), abs=0.06) == pytest.approx(float(gib), rel=0.1)
