"""Any number of ranks trains as one does, by trainings on a CPU with gloo."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import copy_run, launch
from tiny_run import stored, write_tiny

from transfusion.checkpoint import latest_checkpoint
from transfusion.config import load_config
from transfusion.metrics import read_records
from transfusion.parallel import ALONE, ParallelConfig
from transfusion.run import RunConfig
from transfusion.train import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun wants a Unix")
SHORT = ["train.steps=20", "train.rows=4", "train.log_every=1", "train.save_every=10", "train.keep=9"]
RUNS = {
    "adamw": [],
    "muon": ["optim.name=muon"],
    "few images": ["data.image_share=0.15", "model.refine_width=4", "train.image_weight=1"],
    "own weights": ["model.separate=ffn,attention,norms", "data.image_share=0.15", "train.checkpointing=selective"],
    "text alone": ["data.image_share=0"],
    "frozen text": ["optim.freeze=text", "data.image_share=0.15", "train.image_weight=1"],
    # three matrices for Muon, and a rank that owns none
    "few matrices": ["optim.name=muon", "model.n_layers=1", "model.separate=ffn", "optim.freeze=text"],
}
OF_FOUR = ("adamw", "muon", "few images", "few matrices", "frozen text")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


def job(config: Path, out: Path, *overrides: str, **more) -> dict:
    return {"config": config, "overrides": [*SHORT, *overrides], "out": out, **more}


def assert_alike(one: Path, other: Path, steps: int = 20, rtol: float = 1e-5):
    """The same steps and losses, nearly the same norms and weights."""
    a, b = (read_records(run / "metrics.jsonl") for run in (one, other))
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, steps + 1))
    bounds = {"lm_loss": rtol, "image_loss": rtol, "grad_norm": 100 * rtol, "lr": 0, "skipped": 0}
    for key, bound in bounds.items():
        x, y = (torch.tensor([r[key] for r in of_run], dtype=torch.float64) for of_run in (a, b))
        assert torch.allclose(x, y, bound, atol=1e-9, equal_nan=True), f"{other.name}: {key} is {y}, not {x}"
    a, b = (stored(latest_checkpoint(run / "checkpoints")) for run in (one, other))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max() for name in a if not name.startswith("optimizer.")) < 200 * rtol


def test_any_number_of_ranks_trains_as_one_and_goes_on_from_what_others_saved(config, tmp_path):
    for name, overrides in RUNS.items():
        train(load_config(RunConfig, config, [*SHORT, *overrides]), tmp_path / f"1 {name}")
    launch(
        2,
        [job(config, tmp_path / f"2 {name}", *overrides) for name, overrides in RUNS.items()]
        + [job(config, tmp_path / "2 on 2", **{"from": [tmp_path / "2 adamw", 10]})]
        + [job(config, tmp_path / "1 on 2", *RUNS["muon"], **{"from": [tmp_path / "1 muon", 10]})],
        tmp_path,
    )
    launch(
        4,
        [job(config, tmp_path / f"4 {name}", *RUNS[name]) for name in OF_FOUR]
        + [job(config, tmp_path / "4 in 2 copies", "parallel.shards=2", *RUNS["muon"])]
        + [job(config, tmp_path / "4, 2 a row", "parallel.context=2", *RUNS["own weights"])]
        + [job(config, tmp_path / "4 with an async save", "train.save_async=true")]
        + [job(config, tmp_path / "2 on 4", **{"from": [tmp_path / "2 adamw", 10]})],
        tmp_path,
    )
    copy_run(tmp_path / "2 adamw", 10, tmp_path / "2 on 1")
    train(load_config(RunConfig, config, SHORT), tmp_path / "2 on 1", resume=True)
    copy_run(tmp_path / "4 muon", 10, tmp_path / "4 on 1")
    train(load_config(RunConfig, config, [*SHORT, *RUNS["muon"]]), tmp_path / "4 on 1", resume=True)
    train(load_config(RunConfig, config, [*SHORT, "train.micro_batch=1"]), tmp_path / "1 in parts")
    for name in RUNS:
        assert_alike(tmp_path / f"1 {name}", tmp_path / f"2 {name}")
    for name in OF_FOUR:
        assert_alike(tmp_path / f"1 {name}", tmp_path / f"4 {name}")
    assert_alike(tmp_path / "1 own weights", tmp_path / "4, 2 a row")
    for name in ("1 in parts", "2 on 1", "2 on 2", "2 on 4", "4 with an async save"):
        assert_alike(tmp_path / "1 adamw", tmp_path / name)
    for name in ("4 in 2 copies", "1 on 2", "4 on 1"):
        assert_alike(tmp_path / "1 muon", tmp_path / name)
    assert all(0 <= r["straggler"] < 1 for r in read_records(tmp_path / "4 adamw/metrics.jsonl"))
    assert [p.name for p in sorted((tmp_path / "4 with an async save/checkpoints").iterdir())] == [
        "step_00000010",
        "step_00000020",
    ]


def test_ranks_in_float8_train_as_one_does(config, tmp_path):
    float8 = ["train.float8=true", "train.precision=bf16"]
    try:
        train(load_config(RunConfig, config, [*SHORT, *float8]), tmp_path / "one")
    except NotImplementedError:
        pytest.skip("this torch has no float8 on a CPU")
    launch(2, [job(config, tmp_path / "two", *float8)], tmp_path)
    assert_alike(tmp_path / "one", tmp_path / "two", rtol=1e-3)  # sums in bf16 round otherwise


def test_ranks_of_which_one_has_but_a_given_image_add_up_the_same_gradients(config, tmp_path):
    pictures = config.parent / "pictures"
    stories = tmp_path / "stories"
    stories.mkdir()
    shutil.copyfile(next(pictures.glob("*.png")), stories / "a.png")
    long = " ".join(["word"] * 40)
    lines = [{"segments": [{"image": "a.png", "learn": False}, long], "split": "train"}]
    lines += [{"segments": [f"{long} {i}"], "split": "train"} for i in range(3)]
    (stories / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["data.images=", f"data.documents={stories}", "data.image_share=1", "data.text=", "train.rows=2"]
    train(load_config(RunConfig, config, [*SHORT, *given]), tmp_path / "1 given")
    launch(2, [job(config, tmp_path / "2 given", *given)], tmp_path)
    assert_alike(tmp_path / "1 given", tmp_path / "2 given")


def test_what_is_for_several_ranks_is_refused_by_one(config, tmp_path):
    with pytest.raises(ValueError, match=r"parallel\.context = 2 are for several ranks"):
        train(load_config(RunConfig, config, [*SHORT, "parallel.context=2"]), tmp_path)


def test_a_process_alone_has_no_ranks_to_wait_for():
    assert ALONE.leads and ALONE.total(1.5, 2) == [1.5, 2] and ALONE.most(3) == [3]
    tensor = torch.ones(2)
    assert ALONE.add(tensor) is tensor
    ALONE.wait(), ALONE.alive()


@pytest.mark.parametrize("wrong", [{"shards": -1}, {"timeout": 0}])
def test_what_no_ranks_can_do_is_refused(wrong):
    with pytest.raises(ValueError, match=r"parallel\.shards"):
        ParallelConfig(**wrong)
