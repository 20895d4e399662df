"""How well images are captioned: <bos> [image, clean] caption <eos>.

nats per token    of the caption and its <eos>, given the image
exact match       the greedy caption is, letter by letter, the first one of the image, or of one with the same pixels

Some drawings carry two names (the flags of Norway and of Bouvet Island): no model could tell which one is asked for.
"""

from collections.abc import Iterator

import PIL.Image

from transfusion.data.documents import Corpus, image_then_caption
from transfusion.evals.chosen import candidates, chosen, look
from transfusion.evals.config import EvalConfig
from transfusion.evals.interval import wilson
from transfusion.evals.score import nats
from transfusion.generate import Engine


def evaluate_captions(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value) for each split: images looked at, nats per token, exact match with its interval."""
    names: dict[bytes, set[str]] = {}  # of each picture
    looked_at = list(chosen(corpus, config.n_captions, config.seed))
    for image, texts in candidates(corpus, config, looked_at):
        names.setdefault(look(image), set()).add(texts[0])
    for split, _, captions in looked_at:
        n = len(captions)
        documents = [
            image_then_caption(corpus.special, own[0], corpus.image(captions, i)) for i, own in enumerate(captions.ids)
        ]
        of_documents, n_tokens = nats(engine, documents, config.batch)
        # a caption that goes on for twice the longest is wrong already
        enough = 2 * max(len(own[0]) for own in captions.ids) + 1
        images = [PIL.Image.fromarray(image) for image in captions.images]
        said = engine.caption(images, max_tokens=enough, batch=config.batch)
        hits = sum(s in names[look(image)] for s, image in zip(said, captions.images))
        low, high = wilson(hits, n)
        yield f"captions/{split}/n", n
        yield f"captions/{split}/nats_per_token", of_documents.sum() / n_tokens.sum()
        yield f"captions/{split}/exact_match", hits / n
        yield f"captions/{split}/exact_match_low", low
        yield f"captions/{split}/exact_match_high", high
