"""The script behind `make demo`, on a tiny run."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import write_tiny

from transfusion.checkpoint import latest_checkpoint, read_state

pytest.importorskip("matplotlib")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The script as a module, with the tiny config and a small evaluation."""
    path = Path(__file__).parents[1] / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CONFIG", write_tiny(tmp_path))
    monkeypatch.setattr(module, "EVAL", {"n_captions": 3, "n_images": 2, "text_windows": 1, "steps": 2})
    monkeypatch.setattr(module, "SHOWN", {"train": 3, "held_out_image": 2, "held_out_combination": 2})
    monkeypatch.chdir(tmp_path)
    return module


def test_the_demo_leaves_all_that_it_names_and_trains_once(demo, capsys):
    run = Path("runs/demo")
    demo.main([])
    out = capsys.readouterr().out
    with Image.open(run / "contact_sheet.png") as sheet, Image.open(run / "losses.png") as plot:
        assert sheet.width >= 6 * 2 * 128 and plot.width > 500
    assert json.loads((run / "eval.json").read_text())["drawing/train/n"] == 3
    assert (run / "eval.txt").read_text() in out
    assert (run / "drawn" / "drawn_train.png").exists()
    assert f"transfusion generate {run}" in out
    before = (run / "metrics.jsonl").read_text()
    demo.main([])
    assert "trained already" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before


def test_an_interrupted_demo_stops_and_goes_on_the_next_time(demo, monkeypatch, capsys):
    train, checkpoints = demo.train, Path("runs/demo/checkpoints")
    assert demo.unfinished(None)

    def interrupted(config, run, resume):
        train(config, run, resume)
        final = latest_checkpoint(checkpoints)
        final.rename(final.with_name(".gone"))  # as after a stop between the last two
        return latest_checkpoint(checkpoints)

    monkeypatch.setattr(demo, "train", interrupted)
    with pytest.raises(ValueError, match="goes on with it"):
        demo.main([])
    assert read_state(latest_checkpoint(checkpoints))["step"] == 20
    assert not Path("runs/demo/contact_sheet.png").exists()
    monkeypatch.setattr(demo, "train", train)
    demo.main([])
    assert read_state(latest_checkpoint(checkpoints))["step"] == 30
    assert Path("runs/demo/contact_sheet.png").exists()
