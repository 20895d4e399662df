"""Checkpoints: bitwise resume, keep N, mistakes in words, and kills at every moment of a save."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from transfusion import checkpoint
from transfusion.checkpoint import (
    atomic_folder,
    differences,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from transfusion.optim import OptimConfig, build_optimizers, clip_gradients, init_ema, set_lr, update_ema
from transfusion.shards import write_shards
from transfusion.weights import load_weights, weights

resource = pytest.importorskip("resource", reason="limits and kills need a Unix")


class Toy(nn.Module):
    def __init__(self, dim: int = 8, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(16, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(2)])
        self.output = nn.Linear(dim, 16)
        self.register_buffer("scale", torch.full((dim,), 1.5))
        self.register_buffer("table", torch.arange(dim), persistent=False)

    def forward(self, ids):
        h = self.tok_embeddings(ids) * self.scale
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.output(h)


def setup(name="adamw", seed=0):
    config = OptimConfig(name=name, lr=1e-2, min_lr=1e-3, warmup_steps=3, ema=0.9)
    model = Toy(seed=seed)
    return config, model, init_ema(model), build_optimizers(model, config)


def train(config, model, ema, optimizers, first, last):
    for step in range(first, last):
        ids = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        clip_gradients(model, config.clip)
        set_lr(optimizers, step, 20, config)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, model, step, config.ema)


def save(folder, step, state=None, **parts):
    model = parts.pop("model", None) or Toy()
    optimizers = parts.pop("optimizers", None) or build_optimizers(model, OptimConfig())
    return save_checkpoint(folder, step, model=model, optimizers=optimizers, state=state or {}, **parts).result()


def step_names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_run_equals_the_unbroken_one_bitwise(tmp_path, name):
    whole = setup(name)
    train(*whole, 0, 12)
    first = setup(name)
    train(*first, 0, 5)
    _, model, ema, optimizers = first
    path = save(tmp_path, 5, {"data": {"rows": 20}}, model=model, ema=ema, optimizers=optimizers)
    second = setup(name, seed=1)
    state = load_checkpoint(path, model=second[1], ema=second[2], optimizers=second[3])
    assert state["step"] == 5 and state["data"] == {"rows": 20} and state["versions"]["torch"]
    train(*second, 5, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole[1].parameters(), second[1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole[2], second[2]))
    for a, b in zip(whole[3], second[3]):
        a, b = a.state_dict(), b.state_dict()
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        assert all(torch.equal(v, b["state"][i][k]) for i, s in a["state"].items() for k, v in s.items())


def test_average_loads_as_a_model(tmp_path):
    config, model, ema, optimizers = setup()
    train(config, model, ema, optimizers, 0, 3)
    path = save(tmp_path, 3, model=model, ema=ema, optimizers=optimizers)
    other = Toy(seed=1)
    load_weights(other, path)
    assert all(torch.equal(p, e) for p, e in zip(other.parameters(), ema))
    load_weights(other, path, averaged=False)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters()))
    assert "scale" in weights(model) and "table" not in weights(model)


def test_tied_weight_is_saved_once_and_stays_tied(tmp_path):
    model = Toy()
    model.output.weight = model.tok_embeddings.weight
    path = save(tmp_path, 1, model=model)
    other = Toy(seed=1)
    other.output.weight = other.tok_embeddings.weight
    load_checkpoint(path, model=other)
    assert torch.equal(other.output.weight, model.tok_embeddings.weight)


def test_changed_weight_decay_holds_after_the_resume(tmp_path):
    path = save(tmp_path, 1)
    model = Toy()
    optimizers = build_optimizers(model, OptimConfig(weight_decay=0.3))
    load_checkpoint(path, model=model, optimizers=optimizers)
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.3


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 4000, 100000000):
        save(tmp_path, step, keep=2)
    assert step_names(tmp_path) == ["step_00004000", "step_100000000"]
    assert latest_checkpoint(tmp_path).name == "step_100000000"


def test_beyond_the_newest_those_of_a_round_step_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, every=3)
    assert step_names(tmp_path) == [f"step_{step:08d}" for step in (3, 6, 7)]


def test_later_checkpoints_of_another_run_are_not_removed(tmp_path):
    for step in (10, 20, 5):
        save(tmp_path, step, keep=1)
    assert step_names(tmp_path) == ["step_00000005", "step_00000020"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, {"run": 1})
    path = save(tmp_path, 7, {"run": 2}, keep=1)
    assert read_state(path)["run"] == 2 and step_names(tmp_path) == ["step_00000007"]


def test_incomplete_folders_are_ignored_and_stale_ones_cleared(tmp_path):
    good = save(tmp_path, 5)
    for step, harm in [(6, "missing"), (7, "short"), (8, "no state"), (9, "bad state")]:
        path = tmp_path / f"step_{step:08d}"
        shutil.copytree(good, path)
        if harm == "missing":
            (path / "__0_0.distcp").unlink()
        elif harm == "short":
            (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:100])
        elif harm == "no state":
            (path / "state.json").unlink()
        else:
            (path / "state.json").write_text('{"step": 9, ')
        with pytest.raises(ValueError, match=r"is no complete checkpoint \(.*use .*step_00000005"):
            load_checkpoint(path, model=Toy())
    (tmp_path / ".tmp-step_00000010").mkdir()
    (tmp_path / "step_last").mkdir()
    assert latest_checkpoint(tmp_path) == good
    save(tmp_path, 11)
    assert not (tmp_path / ".tmp-step_00000010").exists() and latest_checkpoint(tmp_path).name == "step_00000011"


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None


def test_mistaken_path_names_what_is_there(tmp_path):
    save(tmp_path / "run", 5)
    with pytest.raises(ValueError, match=r"run is no complete checkpoint \(it has no state.json\): use .*step_0+5"):
        load_checkpoint(tmp_path / "run", model=Toy())
    with pytest.raises(ValueError, match=r"there is no such folder\): use .*step_00000005"):
        load_checkpoint(tmp_path / "run" / "step_00000006", model=Toy())
    with pytest.raises(ValueError, match="no complete checkpoint is near it"):
        load_checkpoint(tmp_path / "walk" / "step_00000006", model=Toy())


def test_misfit_names_the_parameter_both_shapes_and_the_config_fields(tmp_path):
    path = save(tmp_path, 5, {"config": {"model": {"dim": 8}, "seed": 1}})
    model = Toy(dim=4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, model=model, config={"model": {"dim": 4}, "seed": 1})
    assert "scale is (8,) there and (4,) here" in str(error.value) or "(16, 8) there and (16, 4)" in str(error.value)
    assert str(error.value).endswith("\n  config: model.dim was 8, now 4")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_misfit_names_missing_and_left_over_parameters(tmp_path):
    path = save(tmp_path, 5)
    more, fewer = Toy(), Toy()
    more.layers.append(nn.Linear(8, 8))
    del fewer.layers[1]
    with pytest.raises(ValueError, match=r"it has no layers.2.(weight|bias)"):
        load_checkpoint(path, model=more)
    with pytest.raises(ValueError, match=r"it has layers.1.\w+, which the model lacks"):
        load_checkpoint(path, model=fewer)


def test_misfit_of_optimizer_or_average_changes_nothing(tmp_path):
    config, model, _, optimizers = setup()
    train(config, model, init_ema(model), optimizers, 0, 1)
    path = save(tmp_path, 5, model=model, optimizers=optimizers)
    config, model, ema, optimizers = setup("muon", seed=3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"is of AdamW, this run has Muon \+ AdamW"):
        load_checkpoint(path, model=model, optimizers=optimizers)
    with pytest.raises(ValueError, match="saved without an average"):
        load_checkpoint(path, model=model, ema=ema)
    frozen = Toy()
    frozen.output.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="AdamW moved other parameters there"):
        load_checkpoint(path, model=frozen, optimizers=build_optimizers(frozen, config.__class__()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_damaged_weights_are_refused(tmp_path):
    save(tmp_path, 4)
    path = save(tmp_path, 5)
    size = (path / "__0_0.distcp").stat().st_size
    (path / "__0_0.distcp").write_bytes(b"\xff" * size)
    with pytest.raises(
        ValueError, match=r"(?s)step_00000005 is damaged: rank 0: .*; move it .* go on from .*step_00000004"
    ):
        load_checkpoint(path, model=Toy())
    (path / ".metadata").write_bytes(b"\xff" * (path / ".metadata").stat().st_size)
    with pytest.raises(ValueError, match=r"\.metadata is damaged: .*; move it away to go on from .*step_00000004"):
        load_checkpoint(path, model=Toy())


def test_weights_in_the_format_of_another_version_are_refused_with_what_to_do(tmp_path):
    path = save(tmp_path, 5)
    (path / ".metadata").rename(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no \.metadata, .*other versions .*init=FOLDER"):
        load_weights(Toy(), path)


def test_parts_that_are_on_another_machine_are_missed_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def elsewhere(tensors, folder, group):
        write_shards(tensors, folder, group)
        (folder / "__0_0.distcp").unlink()

    monkeypatch.setattr(checkpoint, "write_shards", elsewhere)
    with pytest.raises(OSError, match=r"lacks __0_0.distcp: is the run's folder one that all ranks share"):
        save(tmp_path, 2)
    assert step_names(tmp_path) == ["step_00000001"]


def test_differences_name_changed_added_and_removed_fields():
    was = {"a": 1, "b": {"c": 2, "d": 3}, "gone": True}
    now = {"a": 1, "b": {"c": 5, "d": 3}, "new": [1]}
    assert differences(was, now) == ["b.c was 2, now 5", "gone was True, now None", "new was None, now [1]"]


def test_full_disk_surfaces_and_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses to let any file grow beyond it
        with pytest.raises(Exception, match=r"(?i)file too large|write"):
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step_names(tmp_path) == ["step_00000001"]
    load_checkpoint(latest_checkpoint(tmp_path), model=Toy())


def test_failed_folder_leaves_nothing_and_the_old_one(tmp_path):
    for text in ("old", "new"):
        with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as tmp:
            (tmp / "sub").mkdir()
            (tmp / "sub" / "a").write_text(text)
            raise KeyError
        assert [p.name for p in tmp_path.iterdir()] == (["out"] if text == "new" else [])
        with atomic_folder(tmp_path / "out") as tmp:
            (tmp / "a").write_text(text)
        assert (tmp_path / "out" / "a").read_text() == text and [p.name for p in tmp_path.iterdir()] == ["out"]


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from transfusion import checkpoint
from transfusion.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, step_of

folder, mode = Path(sys.argv[1]), sys.argv[2]
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
ema = [torch.zeros_like(p) for p in model.parameters()]
optimizers = [torch.optim.AdamW(model.named_parameters(), fused=True)]
model(torch.ones(64)).sum().backward()
optimizers[0].step()

def save(step):
    with torch.no_grad():
        for tensor in [*model.parameters(), *ema, *[s["exp_avg"] for s in optimizers[0].state.values()]]:
            tensor.fill_(step)
    save_checkpoint(folder, step, model=model, ema=ema, optimizers=optimizers, state={}, keep=2)

def check(at_least):
    path = latest_checkpoint(folder)
    state = load_checkpoint(path, model=model, ema=ema, optimizers=optimizers)
    step = state["step"]
    assert step == step_of(path) >= at_least, (step, at_least)
    for tensor in [*model.parameters(), *ema, *[s["exp_avg"] for s in optimizers[0].state.values()]]:
        assert (tensor == step).all(), step
    return step

def in_child(work, delay=None):
    # The exit status of work() in a forked process, killed after delay seconds.
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def die_at(n, step):
    # save(step), killed in place of its n-th call that changes the disk's state.
    calls = 0
    def counted(f):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return call
    for module, name in [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]:
        setattr(module, name, counted(getattr(module, name)))
    torch.save = counted(torch.save)
    save(step)

for step in (1, 2, 3):
    save(step)
last, kills = 3, 0
if mode == "every call":
    n = 1
    while in_child(lambda: die_at(n, last + 1)) == signal.SIGKILL:
        last, kills, n = check(last), kills + 1, n + 1
    assert check(last) > 3
else:
    def forever():
        step = last
        while True:
            step += 1
            save(step)
    rng, start = random.Random(0), time.perf_counter()
    assert in_child(lambda: save(last + 1)) == 0
    one, last = time.perf_counter() - start, check(last + 1)  # moments are shares of what a save takes here and now
    for _ in range(25):
        assert in_child(forever, rng.uniform(0.1, 4.0) * one) == signal.SIGKILL
        last, kills = check(last), kills + 1
save(last + 1)
assert sorted(p.name for p in folder.iterdir())[-1] == f"step_{last + 1:08d}" and len(list(folder.iterdir())) == 2
print(f'{{"kills": {kills}, "last": {last}}}')
"""


@pytest.mark.parametrize("mode, at_least", [("every call", 15), ("any moment", 25)])
def test_killed_save_always_leaves_a_whole_checkpoint(tmp_path, mode, at_least):
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= at_least and result["last"] > 4, result
