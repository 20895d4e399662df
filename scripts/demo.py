"""What `make demo` runs: it trains configs/demo.toml, evaluates the model, draws with it, and plots the losses.

    python scripts/demo.py [key=value ...]
A finished training is not repeated, an interrupted one goes on.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image

from transfusion import checkpoint, load
from transfusion.codec.load import load_codec
from transfusion.config import load_config
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import Corpus
from transfusion.evals.run import EvalConfig, evaluate, table
from transfusion.generate import Engine
from transfusion.metrics import duration, loss_plot
from transfusion.run import RunConfig
from transfusion.sheet import contact_sheet, stack
from transfusion.train import train

CONFIG = Path(__file__).parent.parent / "configs" / "demo.toml"
EVAL = {"n_captions": 200, "n_images": 200, "text_windows": 128, "steps": 30}
SHOWN = {"train": 24, "held_out_image": 12, "held_out_combination": 12}  # drawings on the contact sheet; half captioned


def main(overrides: list[str]) -> None:
    config = load_config(RunConfig, CONFIG, overrides)
    run = Path(config.out or "runs/demo")
    with stage("1/4 train"):
        saved = checkpoint.latest_checkpoint(run / "checkpoints")
        if not unfinished(saved):
            print(f"{run} is trained already; to train anew, remove it")
        elif unfinished(train(config, run, resume=saved is not None)):
            raise ValueError("the training was interrupted; the same command goes on with it")
    with stage("2/4 evaluate"):
        engine = load(run, config.device)
        c = engine.config
        corpus, _ = build_corpus(c.data, engine.tokenizer, load_codec(c.data.codec), engine.fmt, c.train.seq_len)
        results = dict(evaluate(engine, corpus, EvalConfig(**EVAL, sheets=str(run / "drawn"))))
        (run / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
        (run / "eval.txt").write_text(table(results) + "\n")
        print("", table(results), "", sep="\n")
    with stage("3/4 draw and caption"):
        sheet(engine, corpus).save(run / "contact_sheet.png")
    with stage("4/4 plot"):
        loss_plot(run / "metrics.jsonl", run / "losses.png")
    print(f"""made
  {run}/contact_sheet.png   prompts, drawings, real images, captions; drawn/: all drawings of the evaluation
  {run}/losses.png          both losses over the steps
  {run}/eval.txt            the table above; eval.json: the same numbers
try next
  . .venv/bin/activate
  transfusion generate {run} "red heart" "house" --out drawn
  transfusion caption {run} drawn/red-heart.png
  transfusion train configs/demo.toml out=runs/mine data.images=my/pictures data.text=my/texts
""")


def unfinished(saved: Path | None) -> bool:
    state = checkpoint.read_state(saved) if saved else None
    return state is None or state["step"] < state["config"]["train"]["steps"]


def sheet(engine: Engine, corpus: Corpus) -> PIL.Image.Image:
    """Drawings beside the real images, then images with their captions, split by split."""
    drawings, captionings = [], []
    for split in [split for split in SHOWN if len(corpus.captions[split])]:
        of, limit = corpus.captions[split], SHOWN[split]
        chosen = range(0, len(of), max(1, len(of) // limit))[:limit]
        name, texts, real = split.replace("_", " "), [of.texts[i][0] for i in chosen], [of.images[i] for i in chosen]
        items = [(text, [drawn, image]) for text, drawn, image in zip(texts, engine.draw(texts), real)]
        drawings.append(contact_sheet(items, columns=6, title=f"{name}: drawn for the caption, and the real image"))
        said = engine.caption([PIL.Image.fromarray(image) for image in real[: limit // 2]])
        items = [(f"is: {text}\nsays: {said}", [image]) for said, text, image in zip(said, texts, real)]
        captionings.append(contact_sheet(items, columns=12, title=f"{name}: what the model says of the image"))
    return stack(drawings + captionings)


@contextmanager
def stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    print(f"== {name}", flush=True)
    yield
    print(f"== {name}: {duration(time.perf_counter() - start)}\n", flush=True)


if __name__ == "__main__":
    try:
        with stage("demo"):
            main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
