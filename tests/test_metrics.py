"""Metrics: a file with every step once, a line that never wraps, sinks that close, a plot that shows the losses."""

import io
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.metrics import (
    MetricsConfig,
    Run,
    duration,
    jsonl,
    loss_plot,
    open_metrics,
    progress_line,
    read_records,
    running_mean,
    short,
    terminal,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, done, steps):
    with jsonl(Run(folder, done, 100)) as log:
        for step in steps:
            log(step, {"lm_loss": step / 2})


def test_every_logged_number_is_in_the_file(tmp_path):
    config = MetricsConfig(sinks=("jsonl",))
    with open_metrics(config, Run(tmp_path / "run", 0, 10)) as log:
        log(1, {"lm_loss": np.float32(2.5), "image_loss": math.nan})
        assert steps_in(tmp_path / "run") == [1]  # at once, not when the file is closed
        log(2, {"lm_loss": math.inf})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "lm_loss": 2.5, "image_loss": null}\n{"step": 2, "lm_loss": null}\n'
    assert math.isnan(read_records(tmp_path / "run" / "metrics.jsonl")[0]["image_loss"])


def test_resumed_file_has_every_step_once(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 5, range(6, 10))
    assert steps_in(tmp_path) == list(range(1, 10))


def test_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 0, [1, 2])
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", range(1, 25))
def test_half_written_last_line_is_dropped(tmp_path, cut):
    write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    write(tmp_path, 3, [4])
    assert steps_in(tmp_path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_step_logged_twice_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="step 3 is logged after step 3"):
        write(tmp_path, 0, [3, 3])


def test_unknown_sink_is_named():
    with pytest.raises(ValueError, match="sinks are jsonl, terminal, tensorboard, wandb, got 'csv'"):
        MetricsConfig(sinks=("csv",))


# ---- progress line ----

RECORD = {"lm_loss": 2.34567, "image_loss": 0.21345, "images_per_second": 91.23, "tokens_per_second": 34123.0}


def test_line_has_everything_where_there_is_room():
    line = progress_line(1200, 4000, RECORD, 750.0, 200)
    numbers = "lm 2.346  image 0.2135  91.2 images/s  34.1k tokens/s"
    assert re.fullmatch(rf"step 1200/4000  \[#{{6}}-{{14}}\]  {numbers}  12m30s left, (.+ )?\d\d:\d\d", line)
    plain = progress_line(1200, 4000, RECORD, math.nan, None)
    assert plain == f"step 1200/4000  {numbers}"


@given(st.integers(1, 250), st.integers(0, 10**7), st.floats(0, 1e7) | st.just(math.nan), st.booleans())
def test_line_is_always_narrower_than_the_window(width, step, left, full):
    line = progress_line(step, 10**7, RECORD if full else {}, left, width)
    assert len(line) < width and "\n" not in line


def test_narrow_window_keeps_step_and_time_left():
    line = progress_line(1200, 4000, RECORD, 750.0, 60)
    assert line.startswith("step 1200/4000  lm 2.346") and "12m30s left" in line and "#" not in line


def run_terminal(stream, seconds, steps=40):
    now = iter(np.arange(steps) * seconds)
    with terminal(Run("", 0, steps), stream, clock=lambda: next(now)) as log:
        for step in range(1, steps + 1):
            log(step, {"lm_loss": 100.0 / step})
    return stream.getvalue()


def test_terminal_redraws_one_line_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = run_terminal(Terminal(), seconds=1.0)
    lines = text.split("\r")[1:]
    assert len(lines) == 40 and text.count("\n") == 1 and text.endswith("\x1b[K\n")
    assert all(len(line.removesuffix("\n").removesuffix("\x1b[K")) < 60 for line in lines)
    assert "step 20/40" in lines[19] and "20s left" in lines[19] and "lm 5" in lines[19]
    assert "left" not in lines[0]


def test_fast_steps_are_not_all_drawn_but_the_last_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = run_terminal(Terminal(), seconds=0.03).split("\r")[1:]
    assert len(lines) < 15 and "step 40/40" in lines[-1]


def test_log_file_gets_a_plain_line_every_ten_seconds():
    lines = run_terminal(io.StringIO(), seconds=1.0).splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert not re.search(r"[\r\x1b#]", "".join(lines))


def test_line_is_closed_when_training_fails(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with pytest.raises(KeyError), terminal(Run("", 0, 9), stream) as log:
        log(1, {})
        raise KeyError
    assert stream.getvalue().endswith("\n")


def test_missing_image_loss_shows_the_last_one_but_a_lost_lm_loss_shows_as_nan():
    stream = io.StringIO()
    now = iter([0.0, 20.0])
    with terminal(Run("", 0, 9), stream, clock=lambda: next(now)) as log:
        log(1, {"lm_loss": 2.0, "image_loss": 0.5})
        log(2, {"lm_loss": math.nan, "image_loss": math.nan})
    assert "lm nan  image 0.5" in stream.getvalue().splitlines()[1]


def test_numbers_and_durations_are_short():
    assert [short(n) for n in (0, 7.254, 999, 34100, 2.1e6, 3e9)] == ["0", "7.25", "999", "34.1k", "2.1M", "3G"]
    assert [duration(s) for s in (0, 12.4, 60, 250, 11100, 183600)] == ["0s", "12s", "1m00s", "4m10s", "3h05m", "2d03h"]


# ---- TensorBoard and W&B ----


@pytest.fixture
def fake_wandb(monkeypatch):
    calls = []
    session = SimpleNamespace(
        log=lambda record, step: calls.append((step, record)), finish=lambda exit_code=0: calls.append(exit_code)
    )

    def init(**options):
        calls.append(options)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


def test_wandb_gets_config_records_and_an_end(tmp_path, fake_wandb):
    run = Run(tmp_path / "toy", 0, 9, {"seed": 1}, "mine")
    with open_metrics(MetricsConfig(sinks=("wandb",)), run) as log:
        log(1, {"lm_loss": 2.0})
    options, *rest = fake_wandb
    assert options["project"] == "mine" and options["config"] == {"seed": 1} and options["name"] == "toy"
    assert rest == [(1, {"lm_loss": 2.0}), 0]


def test_resumed_wandb_run_keeps_its_id_and_a_new_one_gets_another(tmp_path, fake_wandb):
    for done in (0, 5, 0):
        with open_metrics(MetricsConfig(sinks=("wandb",)), Run(tmp_path, done, 9)):
            pass
    first, resumed, new = (call["id"] for call in fake_wandb if isinstance(call, dict))
    assert first == resumed != new


def test_failed_run_is_marked_as_failed_in_wandb(tmp_path, fake_wandb):
    with pytest.raises(KeyError), open_metrics(MetricsConfig(sinks=("wandb",)), Run(tmp_path, 0, 9)):
        raise KeyError
    assert fake_wandb[-1] == 1


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_sink_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # import then fails
    with pytest.raises(ValueError, match=rf"pip install {name}$"):
        with open_metrics(MetricsConfig(sinks=(name,)), Run(tmp_path, 0, 9)):
            pass


def test_tensorboard_gets_every_scalar(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_metrics(MetricsConfig(sinks=("tensorboard",)), Run(tmp_path, 0, 9)) as log:
        for step in (1, 2):
            log(step, {"lm_loss": 2.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("lm_loss")
    assert [(e.step, e.value) for e in events] == [(1, 2.0), (2, 4.0)]


# ---- plot ----


def test_plot_shows_both_losses(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    rng = np.random.default_rng(0)
    with jsonl(Run(tmp_path, 0, 300)) as log:
        for step in range(1, 301):
            record = {"lm_loss": 2 + 3 / step + rng.normal() / 10, "image_loss": 0.2 + rng.random() / 10}
            log(step, record | ({"held_out/lm_loss": 2.1, "held_out/image_loss": 0.22} if step % 50 == 0 else {}))
    image = Image.open(loss_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")).convert("RGB")
    half = np.asarray(image).shape[1] // 2
    for side in (np.asarray(image)[:, :half], np.asarray(image)[:, half:]):
        blue = np.abs(side.astype(int) - [31, 119, 180]).sum(-1) < 30  # tab:blue, the training curve
        orange = np.abs(side.astype(int) - [255, 127, 14]).sum(-1) < 30  # C1, the held-out points
        assert blue.sum() > 200 and orange.sum() > 50


def test_plot_of_a_run_without_losses_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(ValueError, match="no lm_loss and no image_loss to plot"):
        loss_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_running_mean_follows_a_line_and_flattens_noise():
    line = np.linspace(5, 1, 1000)
    assert np.allclose(running_mean(line)[:-10], line[:-10])
    noise = np.random.default_rng(0).normal(size=1000)
    mean = running_mean(noise)
    assert mean[10] == pytest.approx(noise[:21].mean()) and mean[-1] == pytest.approx(noise[-11:].mean())
    assert mean[0] == noise[0] and np.array_equal(running_mean(noise[:3]), noise[:3])
