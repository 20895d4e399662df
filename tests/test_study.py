"""The runner of studies: a run a line, none twice, equal FLOPs, intervals by the book."""

import json
import math
from pathlib import Path

import pytest
import study
from tiny_run import write_tiny

from transfusion.codec.load import load_codec
from transfusion.config import load_config
from transfusion.run import RunConfig, resolve

ROOT = Path(__file__).parents[1]


def write(folder: Path, flops: float) -> Path:
    """A study of two arms, the second half as wide, of the tiny run."""
    text = f'base = "{write_tiny(folder).as_posix()}"\nout = "{(folder / "out").as_posix()}"\nflops = {flops}\n'
    text += 'seeds = [0, 1]\neval = ["n_captions=2", "n_images=2", "text_windows=1"]\nset = ["train.save_every=2"]\n'
    text += 'report = ["denoising/train/loss", "absent"]\n[arms.wide]\n[arms.narrow]\nagainst = "wide"\n'
    (folder / "study.toml").write_text(text + 'set = ["model.ffn_dim=32"]\n')
    return folder / "study.toml"


def test_arms_get_as_many_steps_as_their_flops_pay_for(tmp_path):
    s = load_config(study.Study, write(tmp_path, 4e9))
    steps = {arm: int(study.overrides_of(s, arm, 0)[-1].removeprefix("train.steps=")) for arm in s.arms}
    assert steps["narrow"] > steps["wide"] > 3
    double = load_config(study.Study, write(tmp_path / "double", 8e9))
    assert int(study.overrides_of(double, "wide", 0)[-1].removeprefix("train.steps=")) == pytest.approx(
        2 * steps["wide"], abs=1
    )
    with pytest.raises(ValueError, match="less than half a step of 'wide': raise it"):
        study.overrides_of(load_config(study.Study, tmp_path / "study.toml", ["flops=1e3"]), "wide", 0)


def test_a_study_leaves_a_line_a_run_repeats_none_and_prints_its_table(tmp_path, capfd):
    path = write(tmp_path, 1.2e9)
    assert study.main([str(path), "seeds=0", "only=wide"]) == 0
    first = (tmp_path / "out" / "results.jsonl").read_text()
    assert study.main([str(path), "seeds=0"]) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert lines.startswith(first) and lines.count("\n") == 2 and "== wide" in capfd.readouterr().out
    wide, narrow = map(json.loads, lines.splitlines())
    assert (wide["arm"], narrow["arm"], wide["seed"], narrow["seed"]) == ("wide", "narrow", 0, 0)
    assert wide["images"] >= wide["steps"]
    assert wide["flops"] == pytest.approx(1.2e9, rel=0.5) and wide["results"]["denoising/train/loss"] > 0
    assert study.main([str(path), "--table"]) == 0
    printed = capfd.readouterr().out
    assert "| narrow - wide | 1 |" in printed and "| absent |" not in printed and "No run has absent." in printed
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines


def test_a_run_that_was_stopped_is_not_on_record_and_goes_on(tmp_path, monkeypatch):
    path, called = write(tmp_path, 1.2e9), []
    whole = study.subprocess.run

    def half(command, **keys):  # the first training is stopped after a step
        if "train" in command and not called:
            called.append(command)
            command = [c if not c.startswith("train.steps=") else "train.steps=1" for c in command]
        return whole(command, **keys)

    monkeypatch.setattr(study.subprocess, "run", half)
    assert study.main([str(path), "seeds=0", "only=wide"]) == 2
    assert not (tmp_path / "out" / "results.jsonl").exists()
    assert study.main([str(path), "seeds=0", "only=wide"]) == 0
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert line["resumed"] and line["steps"] > 1
    assert study.main([str(path), "seeds=0", "only=wide", "flops=9e9"]) == 2, "another grid in the same folder"


def test_settings_that_no_override_names_are_no_secret_change(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, 1.2e9)
    s = load_config(study.Study, path, ["seeds=0", "only=wide"])
    folder = Path(s.out) / "wide-0"
    folder.mkdir(parents=True)
    settings = study.settings_of(s, study.overrides_of(s, "wide", 0))
    base = Path(s.base)
    base.write_text(base.read_text().replace("[optim]", "[optim]\nclip = 0.5"))
    for record in (
        lambda: (folder / "settings.json").write_text(json.dumps(settings)),
        lambda: (Path(s.out) / "results.jsonl").write_text(
            json.dumps({"arm": "wide", "seed": 0, "results": {}, "settings": settings}) + "\n"
        ),
    ):
        record()
        assert study.main([str(path), "seeds=0", "only=wide"]) == 2
        assert "other settings" in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()


def test_intervals_are_students():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(study.interval([1.0])[1])


def test_differences_are_paired_by_seed(tmp_path):
    s = load_config(study.Study, write(tmp_path, 1e9))
    Path(s.out).mkdir()
    with (Path(s.out) / "results.jsonl").open("w") as file:
        for arm, seed, value in (("wide", 0, 1.0), ("wide", 1, 5.0), ("narrow", 0, 1.5), ("narrow", 1, 5.5)):
            line = {"arm": arm, "seed": seed, "steps": 3, "images": 9, "results": {"denoising/train/loss": value}}
            file.write(json.dumps(line | {"settings": {"config": {"seed": seed}, "eval": []}}) + "\n")
    *_, last, absent = study.table(s)
    assert last == "| narrow - wide | 2 | +0.5 +- 0 |" and absent == "\nNo run has absent."
    with (Path(s.out) / "results.jsonl").open("a") as file:
        file.write(json.dumps(line | {"seed": 2, "settings": {"config": {"seed": 2}, "eval": ["times=0.5"]}}) + "\n")
    with pytest.raises(ValueError, match="has narrow with several settings: set another out"):
        list(study.table(s))


def test_only_the_seed_itself_changes_from_seed_to_seed(tmp_path, monkeypatch):
    path, ran = write(tmp_path, 1.2e9), []
    monkeypatch.setattr(study, "overrides_of", lambda *_: ["data.any_seed=0", "seed=0", "train.steps=1"])
    monkeypatch.setattr(study, "run", lambda s, arm, seed, overrides: ran.append(overrides) or {"arm": arm, "seed": 9})
    monkeypatch.setattr(study, "table", lambda s: [])
    (tmp_path / "out").mkdir()
    assert study.main([str(path), "only=wide"]) == 0
    assert [o[:2] for o in ran] == [["data.any_seed=0", f"seed={seed}"] for seed in (0, 1)]


def test_the_lines_on_record_make_a_table_and_have_the_settings_that_the_study_gives(monkeypatch):
    monkeypatch.chdir(ROOT)
    s = load_config(study.Study, "bench/studies/paper.toml", ["out=bench/results/2026-11-23-study"])
    lines = study.results(s)
    assert len(lines) >= 10 and sum(line.startswith("| linear-64 |") for line in study.table(s)) == 1
    for (arm, seed), line in lines.items():
        given = [*s.set, *s.arms[arm].set, f"seed={seed}", f"train.steps={line['steps']}"]
        assert study.settings_of(s, given) == study.as_of_now(line["settings"])
    assert "head_width" not in line["settings"]["config"]["model"], "an option that came later has its default there"


def test_an_arm_that_is_not_there_is_refused(tmp_path):
    path = write(tmp_path, 1e9)
    for wrong in ("only=absent", "arms.narrow.against=absent"):
        with pytest.raises(ValueError, match="none of"):
            load_config(study.Study, path, [wrong])


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_study_loads_and_its_base_too(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    s = load_config(study.Study, path)
    assert s.arms and any(arm.against for arm in s.arms.values())
    for arm in s.arms.values():
        config = load_config(RunConfig, s.base, [*s.set, *arm.set])
        assert resolve(config, load_codec(config.data.codec)).model.vocab_size
