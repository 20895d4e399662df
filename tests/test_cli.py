"""Every command through `main`, on a tiny run, and what a user's mistakes end in."""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_documents, write_tiny

from transfusion import cli, commands, load
from transfusion.checkpoint import latest_checkpoint, read_state
from transfusion.cli import COMMANDS, build_parser, main, parse
from transfusion.commands import free_name
from transfusion.data.corpus import build_corpus
from transfusion.evals import run as run_evaluators
from transfusion.metrics import read_records
from transfusion.tokenizer import load_tokenizer
from transfusion.train import draw_samples


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(config) -> Path:
    run = config.parent / "run"
    assert main(["train", str(config), f"out={run}", "seed=7", "train.keep=1"]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def parsers() -> dict[str, argparse.ArgumentParser]:
    return next(a for a in build_parser(COMMANDS)._actions if isinstance(a, argparse._SubParsersAction)).choices


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_train_leaves_the_resolved_config_the_numbers_and_the_last_checkpoint(trained):
    saved = tomllib.loads((trained / "config.toml").read_text())
    assert (saved["seed"], saved["train"]["keep"], saved["train"]["steps"]) == (7, 1, 30)
    assert [r["step"] for r in read_records(trained / "metrics.jsonl")] == [10, 20, 30]
    assert [p.name for p in (trained / "checkpoints").iterdir()] == ["step_00000030"]


def test_train_says_where_the_run_lies_and_what_to_try(config, tmp_path, capsys):
    assert main(["train", str(config), f"out={tmp_path / 'r'}", "train.steps=1"]) == 0
    out = capsys.readouterr().out
    assert f"run folder: {tmp_path / 'r'}" in out and f"transfusion eval {tmp_path / 'r'}" in out
    assert "kept 24, skipped 0" in out


def test_a_second_train_into_the_same_folder_is_refused_and_changes_nothing(config, run, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", str(config), f"out={run}"]) == 2
    assert "--resume" in error_line(capsys)
    assert (run / "metrics.jsonl").read_text() == before


def test_resume_goes_on_from_the_newest_checkpoint(config, run):
    assert main(["train", str(config), "--resume", f"out={run}", "seed=7", "train.steps=34", "train.log_every=2"]) == 0
    assert read_state(latest_checkpoint(run / "checkpoints"))["step"] == 34
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [10, 20, 30, 32, 34]


def test_drawings_are_named_after_their_prompts_and_overwrite_nothing(trained, tmp_path, capsys):
    for expected in (["red-disc.png", "what-a-b.png"], ["red-disc-2.png", "what-a-b-2.png"]):
        assert main(["generate", str(trained), "red disc", "what? a/b", "--out", str(tmp_path / "new")]) == 0
        out = capsys.readouterr().out
        assert all(str(tmp_path / "new" / name) in out for name in expected)
        assert all(pixels(tmp_path / "new" / name).shape == (16, 16, 3) for name in expected)
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_a_prompt_without_letters_still_gets_a_file_name(tmp_path):
    assert free_name(tmp_path, "?!") == tmp_path / "image.png"
    assert len(free_name(tmp_path, "long " * 50).name) < 80


def test_sampling_options_and_the_seed_decide_what_is_drawn(trained, tmp_path):
    def drawn(name: str, *options: str) -> np.ndarray:
        assert main(["generate", str(trained), "blue bar", "--out", str(tmp_path / name), *options]) == 0
        return pixels(tmp_path / name / "blue-bar.png")

    plain = drawn("plain")
    assert np.array_equal(plain, drawn("again", "--seed", "0", "--steps", "2"))
    assert not np.array_equal(plain, drawn("seed", "--seed", "1"))
    assert not np.array_equal(plain, drawn("steps", "--steps", "5"))
    assert not np.array_equal(plain, drawn("guidance", "--guidance", "1"))
    assert not np.array_equal(plain, drawn("solver", "--solver", "heun"))
    unguided, never = drawn("unguided", "--guidance", "1"), drawn("never", "--guidance-interval", "0", "0")
    assert np.abs(unguided.astype(int) - never).max() <= 1
    assert not np.array_equal(plain, drawn("renormalised", "--renormalise"))


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
def test_a_model_is_compiled_where_that_is_asked_for(trained, tmp_path, graphs, capsys):
    asked = ["generate", str(trained), "blue bar", "--mode", "text", "--temperature", "0", "--out", str(tmp_path)]
    assert main(asked) == 0
    plain = capsys.readouterr().out
    assert not graphs
    assert main([*asked, "--compile"]) == 0
    assert capsys.readouterr().out == plain and len(graphs) == 1


@pytest.mark.parametrize("command", ["generate", "caption", "edit", "inpaint", "eval"])
def test_every_command_with_a_model_hands_on_how_it_is_to_run(command, tmp_path, monkeypatch):
    asked, file = [], str(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(file)

    def load(*arguments):
        asked.append(arguments)
        raise ValueError("that is all")

    monkeypatch.setattr(commands, "load", load)
    given = {"generate": ["x"], "caption": [file], "edit": [file, "x"], "inpaint": [file, file, "x"], "eval": []}
    for options in ([], ["--compile"]):
        assert main([command, "run", *given[command], "--precision", "fp32", "--device", "cpu", *options]) == 2
    assert asked == [("run", "cpu", "fp32", False), ("run", "cpu", "fp32", True)]
    assert set(given) == {name for name, c in parsers().items() if any(a.dest == "compile" for a in c._actions)}


def test_mode_text_writes_text_and_no_file(trained, tmp_path, capsys):
    arguments = ["generate", str(trained), "Line 3: a", "--mode", "text", "--out", str(tmp_path), "--max-tokens", "5"]
    assert main([*arguments, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("Line 3: a:\n") and len(greedy) > len("Line 3: a:\n")
    assert main([*arguments, "--temperature", "1", "--top-k", "1"]) == 0
    assert capsys.readouterr().out == greedy
    assert not list(tmp_path.iterdir())


def test_mode_auto_prints_what_the_engine_answers(trained, tmp_path, capsys):
    prompts = [f"{colour} disc" for colour in ("red", "green", "blue", "black")]
    assert main(["generate", str(trained), *prompts, "--mode", "auto", "--out", str(tmp_path), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    answers = load(trained, "cpu").generate(prompts, mode="auto", seed=3)
    assert all(part in out for answer in answers for part in answer if isinstance(part, str))
    assert len(list(tmp_path.iterdir())) == sum(not isinstance(part, str) for answer in answers for part in answer)


def test_images_stand_before_each_prompt(trained, config, tmp_path, capsys):
    files = sorted((config.parent / "pictures").glob("*.png"))[:2]
    given = [option for file in files for option in ("--image", str(file))]
    assert main(["generate", str(trained), "a", "b c", *given, "--mode", "text", "--temperature", "0"]) == 0
    prompts = [[*map(Image.open, files), prompt] for prompt in ("a", "b c")]
    answers = load(trained, "cpu").generate(prompts, mode="text", temperature=0)
    said = (f"{prompt[-1]}:\n" + "".join(f"  {part}\n" for part in answer) for prompt, answer in zip(prompts, answers))
    assert capsys.readouterr().out == "".join(said)


def test_what_is_given_reaches_the_engine_in_its_order(config, monkeypatch):
    asked, files = [], sorted((config.parent / "pictures").glob("*.png"))[:2]

    def generate(prompts, **options):
        asked.append((prompts, options))
        return [[] for _ in prompts]

    monkeypatch.setattr(commands, "load", lambda *_: SimpleNamespace(generate=generate))
    given = [option for file in files for option in ("--image", str(file))]
    assert main(["generate", "any", "x", *given, "--max-images", "3", "--guidance-interval", "0.1", "0.8"]) == 0
    (((first, second, text),), options) = asked[0]
    assert [np.asarray(i).tobytes() for i in (first, second)] == [pixels(f).tobytes() for f in files] and text == "x"
    assert not np.array_equal(pixels(files[0]), pixels(files[1]))
    assert options["max_images"] == 3 and options["guidance_interval"] == (0.1, 0.8)


def test_caption_says_a_line_for_each_image_as_the_engine_does(trained, config, capsys):
    images = sorted((config.parent / "pictures").glob("*.png"))[:3]
    assert main(["caption", str(trained), *map(str, images)]) == 0
    said = load(trained, "cpu").caption([Image.open(path) for path in images])
    assert capsys.readouterr().out == "".join(f"{path}: {text}\n" for path, text in zip(images, said))


def test_eval_prints_a_table_and_writes_the_same_numbers(trained, tmp_path, capsys):
    file = tmp_path / "new" / "eval.json"
    sizes = ["n_captions=6", "n_images=4", "text_windows=2", "times=0.3,0.7"]
    assert main(["eval", str(trained), "--json", str(file), *sizes]) == 0
    numbers, out = json.loads(file.read_text()), capsys.readouterr().out
    assert numbers["captions/train/n"] == 6 and numbers["denoising/train/n"] == 4
    assert f"{numbers['text/held_out/nats_per_token']:.4f}" in out
    assert f"{numbers['denoising/train/t_0.7']:.4f}" in out


def test_plan_counts_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(config), "model.n_layers=1"]) == 0
    one = capsys.readouterr().out
    assert main(["plan", str(config)]) == 0
    two = capsys.readouterr().out
    assert "n_layers = 1" in one and "n_layers = 2" in two
    trunk = [float(out.split("trunk")[1].split()[0]) for out in (one, two)]
    assert 0 < trunk[0] < trunk[1]
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_made_by_tokenize_serves_a_training(config, tmp_path, capsys):
    file, texts = tmp_path / "new" / "own.json", config.parent / "texts"
    assert main(["tokenize", str(file), str(texts), "--vocab-size", "300"]) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert load_tokenizer(file).vocab_size == 300
    out = tmp_path / "run"
    assert main(["train", str(config), f"out={out}", f"data.tokenizer={file}", "train.steps=1"]) == 0
    assert load(out, "cpu").config.model.vocab_size == 300


@pytest.mark.parametrize("name", ["run", "checkpoint"])
def test_an_exported_folder_draws_what_the_run_draws(name, trained, tmp_path, capsys):
    model = trained if name == "run" else latest_checkpoint(trained / "checkpoints")
    folder = tmp_path / "shared" / "tiny"
    assert main(["export", str(model), str(folder), "--dtype", "fp32", "--license", "cc0-1.0"]) == 0
    assert f"transfusion generate {folder} " in capsys.readouterr().out
    for source, out in ((trained, "a"), (folder, "b")):
        assert main(["generate", str(source), "red bar", "--out", str(tmp_path / out)]) == 0
    assert np.array_equal(pixels(tmp_path / "a" / "red-bar.png"), pixels(tmp_path / "b" / "red-bar.png"))
    assert "license: cc0-1.0" in (folder / "README.md").read_text()


# ---- other models, from the data to what they draw ----


def test_a_model_of_documents_sizes_and_clean_copies_trains_is_measured_edits_inpaints_and_draws(config, tmp_path):
    data, run, out = write_documents(tmp_path / "edits"), tmp_path / "run", tmp_path / "drawn"
    options = ["data.buckets=16x16,16x24", "model.sides=3", "data.conditioning=clean", "data.image_share=0.8"]
    steps = ["train.steps=2", "train.log_every=1"]
    assert main(["train", str(config), f"out={run}", f"data.documents={data}", *options, *steps]) == 0
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [1, 2]
    sizes = ["n_captions=2", "n_images=2", "n_edits=9", "text_windows=1", "times=0.5"]
    assert main(["eval", str(run), "--json", str(tmp_path / "eval.json"), *sizes]) == 0
    numbers, engine = json.loads((tmp_path / "eval.json").read_text()), load(run, "cpu")
    assert engine.config.model.vocab_size == engine.tokenizer.vocab_size + 3
    assert numbers["documents/held_out/n"] == numbers["editing/held_out/n"] == 2 and numbers["editing/train/n"] == 8
    assert 0 < numbers["editing/held_out/mse"] < 4 and 0 < numbers["denoising/train/t_0.5"] < 4
    assert numbers["documents/held_out/nats_per_token"] == pytest.approx(math.log(engine.fmt.vocab_size), abs=0.5)

    picture, said = data / "red-bar.png", ["make it green", "make it blue"]
    scales = ["--guidance", "2", "--image-guidance", "1.5", "--seed", "4"]
    assert main(["edit", str(run), str(picture), *said, "--out", str(out), *scales]) == 0
    with Image.open(picture) as image:
        want = engine.edit([image] * 2, said, guidance=2.0, image_guidance=1.5, seed=4)
        mask = Image.new("L", image.size, 0)
    for name, one in zip(("make-it-green.png", "make-it-blue.png"), want):
        assert pixels(out / name).shape == (16, 24, 3) and np.array_equal(pixels(out / name), one)
    assert not np.array_equal(*want)

    mask.paste(255, (0, 0, 8, 16))  # a column of patches
    mask.save(tmp_path / "mask.png")
    assert main(["inpaint", str(run), str(picture), str(tmp_path / "mask.png"), "red bar", "--out", str(out)]) == 0
    before, after = pixels(picture), pixels(out / "red-bar.png")
    assert np.array_equal(after[:, 8:], before[:, 8:]) and not np.array_equal(after[:, :8], before[:, :8])

    assert main(["generate", str(run), "red disc", "--size", "16x24", "--out", str(out)]) == 0
    assert pixels(out / "red-disc.png").shape == (16, 24, 3)
    assert main(["generate", str(run), "a", "b", "--out", str(out)]) == 0  # of the sizes that it writes
    assert all({*pixels(out / f"{name}.png").shape[:2]} <= {8, 16, 24} for name in "ab")


def test_a_model_of_codes_trains_is_measured_and_draws_the_same_once_exported_with_its_codec(config, tmp_path):
    codec, run, folder = tmp_path / "codec", tmp_path / "run", tmp_path / "shared"
    sizes = ["codec.bottleneck=vq", "codec.multipliers=1,1,1", "codec.codes=16", "codec.code_dim=4"]  # 4 x 4 codes
    assert main(["train-codec", str(config.with_name("codec.toml")), f"out={codec}", "train.steps=2", *sizes]) == 0
    options = ["model.patches=codes", "model.patch_size=1", "train.z_loss=1e-5", "train.steps=2", f"data.codec={codec}"]
    assert main(["train", str(config), f"out={run}", *options]) == 0
    sizes = ["n_captions=2", "n_images=4", "text_windows=1"]
    assert main(["eval", str(run), "--json", str(tmp_path / "eval.json"), *sizes]) == 0
    numbers, engine = json.loads((tmp_path / "eval.json").read_text()), load(run, "cpu")
    assert engine.config.model.vocab_size == engine.tokenizer.vocab_size + 16
    assert numbers["denoising/train/n"] == 4 and "denoising/train/loss" not in numbers
    assert numbers["denoising/train/nats_per_code"] == pytest.approx(math.log(engine.fmt.vocab_size), abs=0.5)
    assert main(["export", str(run), str(folder), "--dtype", "fp32"]) == 0
    assert main(["generate", str(run), "red bar", "--out", str(tmp_path / "a")]) == 0
    codec.rename(tmp_path / "gone"), run.rename(tmp_path / "gone too")
    assert main(["generate", str(folder), "red bar", "--out", str(tmp_path / "b")]) == 0
    drawn = [pixels(tmp_path / name / "red-bar.png") for name in "ab"]
    assert np.array_equal(*drawn) and drawn[0].shape == (16, 16, 3) and drawn[0].std() > 0
    assert {p.name for p in (folder / "codec").iterdir()} == {"README.md", "config.json", "model.safetensors"}


# ---- help ----


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_each_of_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for action in parsers()[name]._actions:
        shown = action.option_strings[-1] if action.option_strings else action.metavar
        assert shown in out, f"{name} --help does not name {shown}"


def test_every_command_does_something_of_its_own():
    actions = [a for a in parsers()["data"]._actions if isinstance(a, argparse._SubParsersAction)]
    every = [p for name, p in parsers().items() if name != "data"] + [p for a in actions for p in a.choices.values()]
    assert len({parser.get_default("run") for parser in every} - {None}) == len(every) == len(COMMANDS) + 2


def test_overrides_may_stand_on_both_sides_of_an_option():
    args = parse(["train", "c.toml", "a=1", "--resume", "b.c=2"])
    assert args.overrides == ["a=1", "b.c=2"] and args.resume


@pytest.mark.parametrize(
    "arguments", [["train", "c.toml", "--resum=1", "a=1"], ["plan", "c.toml", "--fast"], ["dance"]]
)
def test_what_no_command_knows_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: transfusion" in capsys.readouterr().err


# ---- mistakes ----


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("transfusion ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["optim.lrr=1"], "optim.lr?"),
        (["steps=10"], "train.steps"),
        (["train.steps=many"], "must be int, got 'many'"),
        (["train.micro_batch=-1"], "rows at once, or 0 for all"),
        (["device=abacus"], "device=cpu"),
        (["data.images=nowhere"], "no folder nowhere"),
        (["data.tokenizer=nowhere.json"], "transfusion tokenize"),
        (["no-equals"], "a.b=value"),
    ],
)
def test_a_wrong_override_ends_in_one_line_with_the_remedy(overrides, remedy, config, tmp_path, capsys):
    assert main(["train", str(config), f"out={tmp_path / 'r'}", *overrides]) == 2
    assert remedy in error_line(capsys)
    assert not (tmp_path / "r").exists()


def test_a_missing_config_names_those_that_are_there(config, capsys):
    assert main(["plan", str(config.with_name("tyni.toml"))]) == 2
    assert "tiny.toml" in error_line(capsys)


@pytest.mark.parametrize("command", ["generate", "caption", "eval", "export"])
def test_a_missing_run_is_said_to_be_missing(command, config, tmp_path, capsys):
    rest = {
        "generate": ["x"],
        "caption": [str(config.parent / "pictures" / "red-disc.png")],
        "eval": [],
        "export": ["f"],
    }
    assert main([command, str(tmp_path / "nowhere"), *rest[command]]) == 2
    assert "nowhere: name a run" in error_line(capsys)


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "x"]) == 2
    assert "holds no checkpoint" in error_line(capsys)


def test_a_pretrained_model_that_is_not_shipped_is_said_not_to_be(capsys):
    assert main(["generate", "pretrained:nothing", "x"]) == 2
    assert "there is no pretrained:nothing; shipped with this version" in error_line(capsys)


def test_resuming_with_another_model_names_the_difference(config, run, capsys):
    assert main(["train", str(config), f"out={run}", "--resume", "model.dim=48", "seed=7"]) == 2
    err = capsys.readouterr().err
    assert "does not fit this model" in err and "model.dim was 32, now 48" in err


def test_a_checkpoint_that_was_cut_off_is_not_loaded(run, capsys):
    file = latest_checkpoint(run / "checkpoints") / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    assert main(["generate", str(run), "x"]) == 2
    assert "holds no checkpoint" in error_line(capsys)
    assert main(["generate", str(file.parent), "x"]) == 2
    assert "__0_0.distcp has" in error_line(capsys)


def test_exported_weights_of_another_model_are_not_loaded(trained, tmp_path, capsys):
    folder = tmp_path / "tiny"
    assert main(["export", str(trained), str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    config["model"]["n_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["generate", str(folder), "x"]) == 2
    assert "does not fit this model" in error_line(capsys)


@pytest.mark.parametrize("command", ["generate", "export"])
def test_damaged_weights_and_configs_of_other_versions_say_where_they_are(command, trained, tmp_path, capsys):
    folder, more = tmp_path / "tiny", ["x"] if command == "generate" else [str(tmp_path / "again")]
    assert main(["export", str(trained), str(folder)]) == 0
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, stored = file.read_bytes(), json.loads(config.read_text())
    file.write_bytes(whole[:1000])
    capsys.readouterr()
    assert main([command, str(folder), *more]) == 2
    assert f"{file} is damaged: " in error_line(capsys)
    file.write_bytes(whole)
    config.write_text(json.dumps(stored | {"train": {"gone": 1}}))
    assert main([command, str(folder), *more]) == 2
    assert f"{config} has no config of this version: unknown key train.gone" in error_line(capsys)


def test_export_overwrites_no_folder(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path)]) == 2
    assert "exists already" in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "there is no file"), (b"\x89PNG\r\n\x1a\n cut", "PNG or JPEG")]
)
def test_an_image_that_cannot_be_read_is_named(content, problem, trained, tmp_path, capsys):
    if content is not None:
        (tmp_path / "broken.png").write_bytes(content)
    assert main(["caption", str(trained), str(tmp_path / "broken.png")]) == 2
    err = error_line(capsys)
    assert "broken.png" in err and problem in err


@pytest.mark.parametrize("mode", ["draw", "text", "auto"])
def test_a_prompt_that_is_too_long_is_refused(mode, trained, tmp_path, capsys):
    assert main(["generate", str(trained), "red " * 100, "--mode", mode, "--out", str(tmp_path)]) == 2
    assert "shorten the prompt" in error_line(capsys)


def test_a_wrong_field_of_an_evaluation_names_the_nearest(trained, capsys):
    assert main(["eval", str(trained), "n_caption=3"]) == 2
    assert "did you mean n_captions?" in error_line(capsys)


def test_ctrl_c_ends_a_command_quietly(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", interrupted)
    assert main(["generate", "any", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "transfusion.cli", "plan", "nowhere.toml"],
        capture_output=True,
        text=True,
        cwd=Path(cli.__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stderr.startswith("transfusion plan: no config file nowhere.toml")
    assert done.stdout == "" and done.stderr.count("\n") == 1


def test_numbers_that_eval_has_found_outlive_a_later_failure(trained, tmp_path, capsys, monkeypatch):
    def fails(engine, corpus, config):
        raise ValueError("the store is gone")
        yield

    monkeypatch.setitem(run_evaluators.EVALUATORS, "captions", fails)
    file = tmp_path / "eval.json"
    assert main(["eval", str(trained), "--json", str(file), "text_windows=1"]) == 2
    said = capsys.readouterr()
    assert "the store is gone" in said.err and "bits per byte" in said.out
    assert {name.partition("/")[0] for name in json.loads(file.read_text())} == {"text"}


def test_a_sheet_of_a_run_leaves_out_what_cannot_be_read(trained, tmp_path, monkeypatch):
    engine = load(str(trained))
    c = engine.config
    corpus, _ = build_corpus(c.data, engine.tokenizer, engine.codec, engine.fmt, c.train.seq_len)
    images = corpus.captions["train"].images
    reads = images.read
    monkeypatch.setattr(images, "read", lambda numbers: ["gone", *reads(numbers)[1:]])
    draw_samples(engine.model, engine.tokenizer, c, corpus, tmp_path / "a.png")
    monkeypatch.setattr(images, "read", lambda numbers: ["gone" for _ in numbers])
    draw_samples(engine.model, engine.tokenizer, c, corpus, tmp_path / "b.png")
    assert (tmp_path / "a.png").is_file() and not (tmp_path / "b.png").exists()
