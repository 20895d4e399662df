"""The answers: each computes what it says, of the size that it says; FLOPs are those that torch counts."""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import attend
import loading
import numpy as np
import operators
import ours
import pytest
import starting
import torch
from answer import plain_training
from clock import Clock
from content import Case, content
from machine import FLAGS, hardware, versions
from operators import CLASSES, REST, class_of, profiled
from questions import QUESTIONS
from test_bench_content import TINY
from tiny_run import write_tiny

from transfusion import batching, train
from transfusion.checkpoint import latest_checkpoint, read_state
from transfusion.cli import main
from transfusion.config import override
from transfusion.model import float8
from transfusion.model.mask import dense_mask
from transfusion.model.transformer import build_model
from transfusion.model.varlen import WRITTEN_OUT, varlen_mask

TEXT = replace(TINY, images=0)


def once(answer, case: Case) -> tuple[dict, dict]:
    """(seconds by part, facts) of a repetition."""
    clock = Clock()
    repeat, facts = answer(case, clock)
    repeat(1)
    return clock.take(), {name: fact() if callable(fact) else fact for name, fact in facts.items()}


@pytest.mark.parametrize("row_by_row", [False, True])
def test_a_training_repetition_is_a_step_of_train(row_by_row, monkeypatch):
    built, losses, case = [], train.losses, replace(TINY, row_by_row=row_by_row)
    monkeypatch.setattr(ours, "build_model", lambda *a: built.append(build_model(*a)) or built[-1])
    parts, facts = once(ours.training, case)
    assert list(parts) == ["data", "backward", "forward", "optimizer"] and train.losses is losses
    assert facts["units"] == {"positions": 2 * (21 + 2 * 4), "images": 4}
    config = ours.config_of(TINY)
    torch.manual_seed(0)
    model = build_model(config.model)
    optimizers = ours.build_optimizers(model, config.optim)
    rows = content(TINY, 1)
    micro = [ours.batch_of(TINY, [row]) for row in rows] if row_by_row else [ours.batch_of(TINY, rows)]
    assert len(micro) == (2 if row_by_row else 1)
    train.gradients(model, micro, config, 1)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(built[0].parameters(), model.parameters(), strict=True))
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_peers_step_row_by_row_is_its_step_on_all_rows():
    trained = []
    for row_by_row in (False, True):
        torch.manual_seed(0)
        case, model, sizes = replace(TEXT, row_by_row=row_by_row), torch.nn.Embedding(TEXT.vocab, 3), []

        def batch_of(rows, sizes=sizes):
            sizes.append(len(rows))
            return torch.from_numpy(np.stack([row[0][0] for row in rows]))

        def loss_of(ids, model=model):
            return model(ids).exp().mean()

        repeat, _ = plain_training(case, Clock(), model, batch_of, loss_of)
        for i in range(3):
            repeat(i)
        assert sizes == [1] * 6 if row_by_row else [2] * 3
        trained.append(model.weight)
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("fields", [{}, {"images": 0}, {"documents": 4, "side": 4}, {"patch_size": 2, "vocab": 999}])
def test_flops_of_a_step_are_those_that_torch_counts_but_for_pairs_that_the_mask_forbids(fields):
    case = replace(TINY, **fields)
    _, facts = once(profiled, case)
    counted, m = facts["work"]["flops"], ours.config_of(case).model
    batch = ours.batch_of(case, content(case, 0))
    layout, of_a_pair = (batch.document, batch.image, batch.hidden), 12 * m.n_layers * m.n_heads * m.head_dim
    allowed = (dense_mask(*layout)[:, 0] & (batch.document >= 0)[:, None]).sum().item()
    strips = [strip for of_group in varlen_mask(*layout).strips for strip in of_group]
    assert counted["attention"] == of_a_pair * sum(strip.allowed.numel() for strip in strips)
    assert counted["attention"] > of_a_pair * allowed
    useful = facts["flops"] - of_a_pair * allowed
    assert counted["matmul"] == pytest.approx(useful, rel=0.03)  # the layers before the first have no gradient of input
    assert set(counted) == {*CLASSES, REST} and sum(counted.values()) == counted["matmul"] + counted["attention"]


def test_the_classes_of_operators_add_up_and_every_one_is_met():
    clock = Clock()
    repeat, facts = profiled(TINY, clock)
    seconds, moved = repeat(0), facts["work"]()["bytes"]
    assert set(seconds) == set(moved) == {*CLASSES, REST} and min(seconds.values()) > 0 and min(moved.values()) > 0
    parameters = facts["parameters"] * 4
    assert moved["optimizer"] >= 4 * parameters, "weights, gradients and two moments"


@pytest.mark.parametrize(
    "operator, name",
    [
        ("aten::mm", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::bmm", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::_log_softmax", REST),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::index_copy_", "data movement"),
        ("aten::mul", REST),
    ],
)
def test_an_operator_has_its_class(operator, name):
    assert class_of(operator) == name


def test_bytes_are_those_of_an_operators_tensors_and_views_move_none():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with operators.ByteCounter() as counter:
        (a @ b).t()
    assert counter.bytes["matmul"] == 4 * (12 + 20 + 15) and sum(counter.bytes.values()) == counter.bytes["matmul"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_answers_with_an_image_a_prompt(precision, guidance):
    parts, facts = once(ours.drawing, replace(TINY, precision=precision, guidance=guidance))
    assert list(parts) == ["draw"] and facts["units"] == {"images": 2}


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("name, image", [("drawing", False), ("writing", False), ("captioning", True)])
def test_an_arm_that_is_compiled_samples_by_compiled_graphs(name, image, graphs):
    arm = QUESTIONS[name].arms["ours, compiled"]
    once(getattr(ours, arm.answer.removeprefix("ours.")), replace(TINY, image_in_prompt=image, **arm.change))
    assert len(graphs) == 1


@pytest.mark.parametrize("image", [False, True])
def test_writing_answers_with_all_the_tokens_asked_for(image, monkeypatch):
    monkeypatch.setattr(batching, "pick", lambda logits, *_: int(logits.argmax()))
    eos, seen = ours.format_of(TINY).special.eos, []
    engine_of = ours.engine_of

    def eager_to_end(case):
        engine = engine_of(case)
        company = engine.batching()
        forward = company.forward

        def with_end(*arguments):
            logits, p = forward(*arguments)
            logits[:, eos] += 1e6
            seen.append(len(logits))
            return logits, p

        company.forward = with_end
        engine.batching = lambda: company
        return engine

    monkeypatch.setattr(ours, "engine_of", eager_to_end)
    parts, facts = once(ours.writing, replace(TINY, image_in_prompt=image))
    assert list(parts) == ["write"] and facts["units"] == {"tokens": 10} and sum(seen) == 10


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_ways_of_attention_agree_and_one_that_does_not_is_no_answer(monkeypatch, precision):
    case = replace(TINY, documents=2, dim=64, precision=precision, seq_len=128)
    found = [once(attend.attention, replace(case, way=way)) for way in attend.WAYS]
    batch = ours.batch_of(case, content(case, 0))
    allowed = dense_mask(batch.document, batch.image, batch.hidden)[:, 0] & (batch.document >= 0)[:, :, None]
    for parts, facts in found:
        assert (
            list(parts) == ["forward", "backward"] and facts["flops"] == 12 * 64 * allowed.sum() and facts["peak"] > 0
        )
    build, of_way = attend.WAYS["documents"]
    monkeypatch.setitem(attend.WAYS, "documents", (build, lambda q, k, v, mask: of_way(q, k, 1.2 * v, mask)))
    with pytest.raises(AssertionError, match="not close"):
        once(attend.attention, replace(case, way="documents"))


def test_attention_by_documents_is_measured_where_it_is_its_own():
    positions = [case.positions for case in QUESTIONS["attention"].cases if case.documents == 1]
    lengths = [n + 2 + 2 * case.images for n, case in zip(positions, QUESTIONS["attention"].cases)]
    assert sum(n <= WRITTEN_OUT for n in lengths) == 6 and max(lengths) > WRITTEN_OUT


@pytest.mark.parametrize("way", ["", "one by one"])
def test_requests_are_all_answered_together_or_one_by_one(way, monkeypatch):
    beside, step = [], batching.Batching.step
    monkeypatch.setattr(batching.Batching, "step", lambda self: (step(self), beside.append(len(self.running)))[0])
    case = replace(TINY, batch=4, steps=5, way=way, guidance=3.0)
    parts, facts = once(ours.requests, case)
    assert list(parts) == ["answer"] and facts["units"] == {"requests": 4}
    assert max(beside) == (1 if way else 4) and len(beside) == (20 if way else 5)


def test_a_request_that_ends_with_an_error_is_no_answer(monkeypatch):
    monkeypatch.setattr(batching, "pick", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="division by zero"):
        once(ours.requests, replace(TINY, batch=4))


@pytest.mark.parametrize("answer", [ours.training, ours.drawing])
def test_what_is_not_finite_is_no_answer(answer, monkeypatch):
    def astray(*arguments):
        model = build_model(*arguments)
        model.norm.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(ours, "build_model", astray)
    with pytest.raises((AssertionError, ValueError)):
        once(answer, TINY)


def test_the_loader_packs_the_steps_that_it_counts(monkeypatch):
    packed, batches = [], loading.Packer.batches

    def keep(self, step):
        found = batches(self, step)
        packed.append(sum(int((b.document >= 0).sum()) for b in found))
        return found

    monkeypatch.setattr(loading.Packer, "batches", keep)
    monkeypatch.setattr(loading, "STEPS", 2)
    parts, facts = once(loading.loading, Case(config="configs/demo.toml"))
    assert list(parts) == ["batches"] and len(packed) == 4 and packed[:2] == packed[2:]
    assert (
        facts["units"]["tokens"] == sum(packed[:2]) and facts["units"]["steps"] == 2 and facts["units"]["images"] > 100
    )


def test_a_program_that_fails_says_so_and_one_that_does_not_is_timed(monkeypatch):
    monkeypatch.setitem(starting.COMMANDS, "nothing", [sys.executable, "-c", "pass"])
    parts, facts = once(starting.starting, replace(TINY, way="nothing"))
    assert parts["process"][1] > 0 and facts["units"] == {"starts": 1}
    monkeypatch.setitem(starting.COMMANDS, "wrong", [sys.executable, "-c", "import no_such_module"])
    with pytest.raises(ValueError, match="no_such_module"):
        once(starting.starting, replace(TINY, way="wrong"))
    assert once(starting.starting, replace(TINY, way="help"))[0]["process"][0] > 0


def test_a_resumed_run_is_timed_to_its_first_step_and_goes_on_from_the_same_one_each_time(tmp_path, monkeypatch):
    killed, kill = [], starting.subprocess.Popen.kill
    monkeypatch.setattr(starting.subprocess.Popen, "kill", lambda self: (killed.append(self.args), kill(self)))
    clock = Clock()
    repeat, _ = starting.starting(replace(TINY, way="resume", config=str(write_tiny(tmp_path))), clock)
    assert not killed
    repeat(0)
    repeat(1)
    assert clock.take()["process"][1] > 0
    first, again = killed
    assert first == again and "--resume" in first
    run = Path(next(a for a in first if a.startswith("out=")).removeprefix("out="))
    assert read_state(latest_checkpoint(run / "checkpoints"))["step"] == 1
    del repeat
    gc.collect()
    assert not run.parent.exists()


ON_A_PROCESSOR = ["device=cpu", "compile=false", "config=", "dim=32", "depth=2", "heads=2", "documents=2", "side=2"]
ON_A_PROCESSOR += ["rows=1", "text_tokens=12", "seq_len=64", "vocab=99", "peak=32", "steps=2", "threads=1"]


@pytest.mark.parametrize("name", ["gpu", "gpu-drawing"])
def test_what_is_asked_of_a_gpu_runs_on_a_processor_when_it_is_tiny(name, monkeypatch):
    used, multiply = [], float8.multiply
    monkeypatch.setattr(float8, "multiply", lambda *given: used.append(given) or multiply(*given))
    cases = {override(case, ON_A_PROCESSOR) for case in QUESTIONS[name].cases}
    assert len(cases) > 1
    for case in cases:
        for arm in QUESTIONS[name].arms.values():
            module, _, function = arm.answer.partition(".")
            assert module == "ours"
            used.clear()
            parts, facts = once(getattr(ours, function), replace(case, **arm.change))
            assert parts and facts["units"] and bool(used) == ("float8" in arm.change)


SHARDED = """
import sys, torch, ours
from clock import Clock
from content import Case
from torch.distributed.tensor import DTensor
from transfusion.weights import weights
models, fresh = [], ours.fresh
ours.fresh = lambda *given: models.append(fresh(*given)) or models[-1]
found = [ours.training(case, Clock()) for case in eval(sys.argv[1])]
for repeat, _ in found:
    repeat(0)
alone, one = map(weights, models)
assert found[0][1].keys() == found[1][1].keys() and found[0][1]["units"] == found[1][1]["units"]
assert all(isinstance(p, DTensor) for p in one.values()) and not any(isinstance(p, DTensor) for p in alone.values())
print(max((one[name].full_tensor() - p).abs().max().item() for name, p in alone.items()))
"""


def test_one_rank_under_fsdp_takes_the_step_of_a_process_alone():
    arms, (case,) = QUESTIONS["gpu-fsdp"].arms, QUESTIONS["gpu-fsdp"].cases
    cases = [replace(override(case, [*ON_A_PROCESSOR, "precision=fp32"]), **arm.change) for arm in arms.values()]
    environment = os.environ | {"PYTHONPATH": f"{ours.ROOT}{os.pathsep}{ours.ROOT / 'bench'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, repr(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


def test_the_memory_beside_that_of_a_gpu_is_what_the_plan_prints(capsys):
    (case,) = QUESTIONS["gpu-fsdp"].cases
    case, overrides = replace(case, rows=1), ["train.rows=1", "train.micro_batch=0", "optim.ema=0"]
    assert main(["plan", str(ours.ROOT / case.config), *overrides, "--gpus", "1"]) == 0
    table = capsys.readouterr().out.partition("memory of a rank, GiB")[2]
    total = next(line.split()[1] for line in table.splitlines() if "total" in line)
    assert f"{ours.planned(case) / 2**30:.2f}" == total


def test_llama_answers_with_the_same_positions_and_about_as_many_parameters(monkeypatch):
    llama = pytest.importorskip("peer_llama", exc_type=ImportError)
    case = replace(TEXT, dim=64, heads=1)
    (parts, theirs), (_, own) = once(llama.training, case), once(ours.training, case)
    assert list(parts) == ["data", "forward", "backward", "optimizer"]
    assert theirs["units"] == own["units"] == {"positions": 2 * 21}
    patch_layers = sum(p.numel() for p in build_model(ours.config_of(case).model).patches.parameters())
    markers = 2 * ours.MARKERS * case.dim
    assert own["parameters"] - theirs["parameters"] == patch_layers + markers
    asked, generate = [], llama.LlamaForCausalLM.generate

    def keep(self, *arguments, **options):
        asked.append((self.dtype, options["top_k"], torch.is_autocast_enabled("cpu")))
        return generate(self, *arguments, **options)

    monkeypatch.setattr(llama.LlamaForCausalLM, "generate", keep)
    for precision in ("bf16", "fp32"):
        parts, facts = once(llama.writing, replace(case, precision=precision))
        assert list(parts) == ["write"] and facts["units"] == {"tokens": 10}
    assert asked == [(torch.bfloat16, 0, False), (torch.float32, 0, False)]
    with pytest.raises(ValueError, match="set images=0"):
        llama.training(TINY, Clock())


PEER = os.environ.get("TRANSFUSION_PEER_PYTHON", "")


@pytest.mark.skipif(not PEER, reason="TRANSFUSION_PEER_PYTHON names no Python with transfusion-pytorch")
def test_the_peer_answers_with_the_same_units(tmp_path):
    code = (
        "import peer_lucid, sys; from clock import Clock; from content import Case\n"
        f"from dataclasses import replace; case = {TINY!r}; clock = Clock()\n"
        "for name, c in (('training', case), ('training', replace(case, images=0)), ('drawing', case),\n"
        "                ('writing', case), ('writing', replace(case, precision='fp32')),\n"
        "                ('writing', replace(case, image_in_prompt=True))):\n"
        "    repeat, facts = getattr(peer_lucid, name)(c, clock); repeat(1)\n"
        "    print(list(clock.take()), facts['units'])\n"
        "print(sum(p.numel() for p in peer_lucid.build(Case()).parameters()))\n"
    )
    bench = str(ours.ROOT / "bench")
    done = subprocess.run([PEER, "-W", "ignore", "-c", code], cwd=bench, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = "['data', 'forward', 'backward', 'optimizer']"
    *said, parameters = done.stdout.splitlines()
    deep = build_model(ours.config_of(replace(Case(), **QUESTIONS["training"].arms["ours, 24 layers"].change)).model)
    assert int(parameters) == pytest.approx(sum(p.numel() for p in deep.parameters()), rel=0.01)
    assert said == [
        f"{steps} {{'positions': 58, 'images': 4}}",
        f"{steps} {{'positions': 42}}",
        "['draw'] {'images': 2}",
        *["['write'] {'tokens': 10}"] * 3,
    ]


def test_a_machine_is_described():
    h, v = hardware(), versions()
    assert h["cores"] > 0 and h["gib"] > 0 and h["processor"] and set(h["flags"]) <= set(FLAGS)
    assert v["torch"] == torch.__version__ and v["python"]
