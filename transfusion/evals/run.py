"""All evaluators over one engine: each a generator of (group/split/name, value), one after the other, and their table.

A new evaluation is one generator and its entry in `EVALUATORS`.
"""

import sys
import time
from collections.abc import Callable, Iterator

from transfusion.data.documents import Corpus
from transfusion.data.images import SPLITS
from transfusion.evals.captions import evaluate_captions
from transfusion.evals.config import EvalConfig
from transfusion.evals.denoising import evaluate_denoising
from transfusion.evals.documents import evaluate_documents
from transfusion.evals.drawing import evaluate_drawing
from transfusion.evals.editing import evaluate_editing
from transfusion.evals.text import evaluate_text
from transfusion.generate import Engine

Evaluator = Callable[[Engine, Corpus, EvalConfig], Iterator[tuple[str, float]]]

EVALUATORS: dict[str, Evaluator] = {
    "text": evaluate_text,
    "captions": evaluate_captions,
    "documents": evaluate_documents,
    "denoising": evaluate_denoising,
    "drawing": evaluate_drawing,
    "editing": evaluate_editing,
}

TITLES = {
    "text": "Text",
    "captions": "Captions of images",
    "documents": "Texts of documents",
    "denoising": "Diffusion loss",
    "conditioning": "Conditioning gap",
    "drawing": "Draw accuracy",
    "editing": "Edits",
    "reconstruction": "Reconstruction",
}
LABELS = {
    "n": "looked at",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match, greedy",
    "loss": "mean over t",
    "right": "loss, right captions",
    "shuffled": "loss, shuffled captions",
    "gap": "gap (shuffled - right)",
    "nats_per_code": "nats per code",
    "nats_right": "nats per code, right captions",
    "nats_shuffled": "nats per code, shuffled captions",
    "nats_gap": "gap (shuffled - right)",
    "nats_ratio": "ratio (shuffled / right)",
    "ratio": "ratio (shuffled / right)",
    "pixel_top1": "top-1, pixels",
    "pixel_top5": "top-5, pixels",
    "feature_top1": "top-1, EfficientNet-Lite features",
    "feature_top5": "top-5, EfficientNet-Lite features",
    "mse": "mean squared error",
    "unchanged": "the same of a copy of the source",
    "colour": "the colour asked for",
    "overlap": "shape drawn on shape wanted, IoU",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "l1": "L1, of values in [-1, 1]",
    "fd_effnet": "FD-EffNet",
    "codes_used": "codes used",
    "latent_std": "deviation of a channel, mean (least - most)",
    "chance_top1": "top-1, chance",
    "chance_top5": "top-5, chance",
}
SHARES = ("exact_match", "top1", "top5", "codes_used", "colour")  # a name that ends so is shown in percent


def evaluate(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(group/split/name, value) of all, as they are found; what the data lacks is absent."""
    for name, evaluator in EVALUATORS.items():
        start = time.perf_counter()
        yield from evaluator(engine, corpus, config)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def table(results: dict[str, float]) -> str:
    """The numbers for people: a block a group, a line a name, a column a split, intervals in brackets."""
    cells: dict[str, dict[str, dict[str, str]]] = {}  # group -> name -> split -> text
    for key, value in results.items():
        group, split, name = key.split("/")
        if not name.endswith(("_low", "_high")):
            bounds = [results[f"{key}{end}"] for end in ("_low", "_high") if f"{key}{end}" in results]
            cells.setdefault(group, {}).setdefault(name, {})[split] = show(name, value, bounds)
    blocks = []
    for group, names in cells.items():
        met = dict.fromkeys(s for of_name in names.values() for s in of_name)
        splits = sorted(met, key=lambda s: (*SPLITS, s).index(s))
        head = [TITLES.get(group, group), *(s.replace("_", " ") for s in splits)]
        blocks.append([head, *([f"  {label(name)}", *(of.get(s, "") for s in splits)] for name, of in names.items())])
    lines = [line for block in blocks for line in block]
    n_columns = max(map(len, lines), default=0)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(n_columns)]
    return "\n\n".join("\n".join(aligned(line, widths) for line in block) for block in blocks)


def aligned(line: list[str], widths: list[int]) -> str:
    """The label to the left, the cells to the right, of columns of these widths."""
    cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
    return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def label(name: str) -> str:
    """A name as people read it; t_0.3 is a noise level."""
    return LABELS.get(name) or name.replace("t_", "t = ")


def show(name: str, value: float, bounds: list[float]) -> str:
    """A value with its interval, as "92.0 % (87.4 - 95.1)", "2.134" or "0.0123 (0.0101 - 0.0145)"."""
    if name in ("n", "tokens"):
        return str(value)
    scale, digits, unit = (100, 1, " %") if name.endswith(SHARES) else (1, 4, "")
    if name.startswith("chance"):
        digits = 2  # one in a few thousand
    shown, *ends = (f"{scale * v:.{digits}f}" for v in [value, *bounds])
    return shown + unit + (f" ({' - '.join(ends)})" if ends else "")
