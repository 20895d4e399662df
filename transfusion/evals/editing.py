"""Documents that end with an image to draw, read up to it: is what the model draws there what the document has there?

<bos> [image, clean] make it green -> drawing           mse to the document's own image, pixels in [-1, 1]
colour       of documents whose info says to what colour of the palette ("to"): has the shape it, by the pixels?
overlap      of the same ones: intersection over union of the shape drawn and the shape wanted
unchanged    mse of the image before it to the wanted one, what a model reaches that copies
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transfusion.data.documents import Corpus, Document, Placed
from transfusion.evals.colour import PALETTE, colour_of, overlap
from transfusion.evals.config import EvalConfig
from transfusion.evals.documents import by_split, given, some_of
from transfusion.evals.interval import normal, wilson
from transfusion.generate import Engine
from transfusion.sequence import Text
from transfusion.sheet import contact_sheet


def edits(corpus: Corpus, least: int = 2) -> dict[str, list[Document]]:
    """The documents that end with an image to draw, of at least so many images, by split; held-out ones may say why."""
    found = {}
    for split, documents in by_split(corpus).items():
        images = [[s for s in d.segments if isinstance(s, Placed)] for d in documents]
        of_split = [d for d, i in zip(documents, images) if len(i) >= least and d.segments[-1] == i[-1] and i[-1].learn]
        if of_split:
            found[split] = of_split
    return found


def draw_last(engine: Engine, corpus: Corpus, documents: list[Document], config: EvalConfig) -> list[np.ndarray]:
    """uint8 [h, w, 3] each: what the model draws in the place of each document's last image, of the same size."""
    prompts = [given(corpus, d)[:-2] for d in documents]
    grids = [corpus.grid(corpus.interleaved.images.shape(d.segments[-1].number)) for d in documents]
    answers = engine.complete(prompts, "draw", config.seed, engine.sampling(**config.sampling), grids)
    return [np.asarray(engine.picture(answer[0])) for answer in answers]


def sheet_items(
    engine: Engine, corpus: Corpus, documents: list[Document], drawn: list[np.ndarray]
) -> list[tuple[str, list[np.ndarray]]]:
    """What a contact sheet shows of each document: its texts, its images but the last, the one drawn, the last."""
    items = []
    for document, one in zip(documents, drawn):
        real = [corpus.interleaved.images[s.number] for s in document.segments if isinstance(s, Placed)]
        said = " ".join(engine.read([s])[0] for s in document.segments if isinstance(s, Text))
        items.append((said, [*real[:-1], one, real[-1]]))
    return items


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of uint8 images, as pixels in [-1, 1]."""
    return float(np.square((a.astype(float) - b) / 127.5).mean())


def evaluate_editing(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value) for each split: edits looked at, mse, that of the source, and colour and overlap where known."""
    for split, documents in edits(corpus).items():
        held, looked_at = some_of(corpus, documents, config.n_edits, config.seed)
        n, images = len(looked_at), held.interleaved.images
        if not n:
            continue
        drawn = draw_last(engine, held, looked_at, config)
        of_document = [[images[s.number] for s in d.segments if isinstance(s, Placed)] for d in looked_at]
        errors = [mse(d, real[-1]) for d, real in zip(drawn, of_document)]
        copied = [mse(real[-2], real[-1]) for real in of_document if real[-2].shape == real[-1].shape]
        yield f"editing/{split}/n", n
        yield f"editing/{split}/mse", float(np.mean(errors))
        if n > 1:
            yield from zip((f"editing/{split}/mse_low", f"editing/{split}/mse_high"), normal(errors))
        if copied:
            yield f"editing/{split}/unchanged", float(np.mean(copied))
        asked = [(d, real[-1], document.info.get("to")) for d, real, document in zip(drawn, of_document, looked_at)]
        known = [one for one in asked if one[2] in PALETTE]
        if known:
            hits = sum(colour_of(d) == to for d, _, to in known)
            yield f"editing/{split}/colour", hits / len(known)
            yield from zip((f"editing/{split}/colour_low", f"editing/{split}/colour_high"), wilson(hits, len(known)))
            yield f"editing/{split}/overlap", float(np.mean([overlap(d, real) for d, real, _ in known]))
        if config.sheets:
            path = Path(config.sheets) / f"edited_{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            items = sheet_items(engine, held, looked_at, drawn)
            contact_sheet(items, columns=4, title=f"{split}: given, drawn, wanted").save(path)
