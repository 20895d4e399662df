"""How well held-out text is predicted, per byte, so that tokenizers compare.

    bits per byte = nats per token / ln 2 * tokens per byte        documents <bos> w_1 .. w_(seq_len - 1), side by side

Every token is predicted once. Where `text_windows` leaves some out, tokens per byte is still that of the whole text.
"""

import math
from collections.abc import Iterator

import numpy as np

from transfusion.data.documents import Corpus
from transfusion.evals.config import EvalConfig
from transfusion.evals.score import nats
from transfusion.generate import Engine
from transfusion.sequence import Text


def windows(works: list[np.ndarray], size: int, limit: int) -> list[np.ndarray]:
    """At most `limit` windows of at most `size` ids, evenly spread over all works end to end; none spans two."""
    cut = [ids[start : start + size] for ids in works for start in range(0, len(ids), size)]
    if len(cut) <= limit:
        return cut
    return [cut[i] for i in np.linspace(0, len(cut) - 1, limit).round().astype(int)]


def evaluate_text(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value): tokens predicted, nats per token, bits per byte of UTF-8."""
    works = [np.asarray(ids, np.int64) for ids in engine.tokenizer.encode_many(corpus.held_out_text)]
    n_tokens, n_bytes = sum(map(len, works)), sum(len(text.encode()) for text in corpus.held_out_text)
    chosen = windows(works, engine.config.train.seq_len - 1, config.text_windows)
    if not chosen:
        return
    bos = engine.fmt.special.bos
    of_windows, numbers = nats(engine, [[Text(np.append(bos, ids))] for ids in chosen], config.batch)
    per_token, n = of_windows.sum() / numbers.sum(), int(numbers.sum())
    yield "text/held_out/tokens", n
    yield "text/held_out/nats_per_token", per_token
    yield "text/held_out/bits_per_byte", per_token / math.log(2) * n_tokens / n_bytes
