"""One rank under torchrun, its weights in FSDP2, its layers compiled, trains as a process alone does: on a CPU, and, by
the same lines, on a GPU (NCCL, FlexAttention, bfloat16, a checkpoint written while training goes on)."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny_run import write_tiny

from transfusion.metrics import read_records

STEPS, SAVED = 20, 10
RUN = ["train.compile=true", "train.rows=4", "train.log_every=1", "train.keep=9", "train.save_async=true"]
RUN += [f"train.steps={STEPS}", f"train.save_every={SAVED}"]
FLEX = ["device=cuda", "train.precision=bf16", "train.seq_len=256", "model.dim=64", "model.ffn_dim=128"]  # whole tiles


def apart(one: Path, other: Path, key: str) -> float:
    """The largest difference between two runs in a number of their steps, as a share of it."""
    a, b = (read_records(run / "metrics.jsonl") for run in (one, other))
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, STEPS + 1))
    x, y = (torch.tensor([r[key] for r in of_run], dtype=torch.float64) for of_run in (a, b))
    assert x.isfinite().all() and x[-1] != x[0]
    return ((x - y).abs() / x.abs()).max().item()


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun wants a Unix")
@pytest.mark.parametrize(
    "device, compiler, overrides, losses, again",
    [
        ("cpu", "aot_eager", [], 1e-5, 0.0),
        ("cpu", "aot_eager", ["train.precision=bf16", "optim.name=muon"], 0.02, 0.0),
        # FSDP2 computes with norms and embeddings in bf16 too, autocast does not; a GPU adds up in any order
        pytest.param("cuda", "inductor", FLEX, 0.02, 0.01, marks=pytest.mark.gpu),
        pytest.param("cuda", "inductor", [*FLEX, "optim.name=muon"], 0.02, 0.01, marks=pytest.mark.gpu),
    ],
)
def test_one_rank_trains_as_a_process_alone_and_goes_on_from_its_checkpoint(
    device, compiler, overrides, losses, again, tmp_path
):
    config = write_tiny(tmp_path / "tiny")

    def job(out: str, **more) -> dict:
        return {"config": config, "overrides": [*RUN, *overrides], "out": tmp_path / out, **more}

    launch(0, [job("alone")], tmp_path, device, compiler)
    launch(1, [job("one"), job("resumed", **{"from": [tmp_path / "one", SAVED]})], tmp_path, device, compiler)
    for key in ("lm_loss", "image_loss"):
        assert apart(tmp_path / "alone", tmp_path / "one", key) <= losses
        assert apart(tmp_path / "one", tmp_path / "resumed", key) <= again
