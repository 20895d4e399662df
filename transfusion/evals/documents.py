"""How well the texts of documents with images anywhere are predicted, the images before them being clean.

    <bos> text [image, clean] text [image, clean] ... <eos>      nats per token of the texts that are learned, and <eos>

What their images would be drawn like: evals/editing.py, where a document ends with one.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from transfusion.data.documents import Corpus, Document, Interleaved, Placed
from transfusion.evals.chosen import pass_over, read, some
from transfusion.evals.config import EvalConfig
from transfusion.evals.score import nats
from transfusion.generate import Engine
from transfusion.sequence import Segment, Text

LOOKED_THROUGH = 1 << 16  # documents of a split that are read for what they are


def by_split(corpus: Corpus) -> dict[str, list[Document]]:
    """All documents by split, or some of very many; held-out ones may say why in their info ("unseen"), which parts
    them."""
    found: dict[str, list[Document]] = {}
    for split, documents in corpus.interleaved.documents.items():
        for document in map(documents.__getitem__, some(len(documents), LOOKED_THROUGH, 0)):
            why = str(document.info.get("unseen") or "").replace("/", " ")
            found.setdefault(f"{split}_{why}" if split != "train" and why else split, []).append(document)
    return found


def some_of(corpus: Corpus, documents: list[Document], n: int, seed: int) -> tuple[Corpus, list[Document]]:
    """(the corpus with the images of these alone, in memory; at most n of its documents, drawn once by seed, in their
    order; one with an image that cannot be read is passed over)."""
    drawn = [documents[i] for i in some(len(documents), n, seed)]
    found = read(corpus.interleaved, sorted({s.number for d in drawn for s in d.segments if isinstance(s, Placed)}))
    at = {number: i for i, number in enumerate(found.numbers)}
    good = [
        d._replace(segments=[s._replace(number=at[s.number]) if isinstance(s, Placed) else s for s in d.segments])
        for d in drawn
        if all(s.number in at for s in d.segments if isinstance(s, Placed))
    ]
    pass_over(len(drawn) - len(good), len(drawn), "documents", found.why)
    return replace(corpus, interleaved=Interleaved(found.images, {}, found.latents)), good


def given(corpus: Corpus, document: Document) -> list[Segment]:
    """The whole document, its images clean."""
    bos, eos = (Text(np.array([token])) for token in (corpus.special.bos, corpus.special.eos))
    segments = (s if isinstance(s, Text) else corpus.image(corpus.interleaved, s.number, 0) for s in document.segments)
    return [bos, *segments, eos]


def evaluate_documents(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value) for each split: documents looked at, nats per token; those without a text to learn are left out."""
    for split, documents in by_split(corpus).items():
        told = [d for d in documents if any(isinstance(s, Text) and s.learn for s in d.segments)]
        held, looked_at = some_of(corpus, told, config.n_captions, config.seed)
        if looked_at:
            of_documents, n_tokens = nats(engine, [given(held, d) for d in looked_at], config.batch)
            yield f"documents/{split}/n", len(looked_at)
            yield f"documents/{split}/nats_per_token", of_documents.sum() / n_tokens.sum()
