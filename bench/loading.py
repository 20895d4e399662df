"""The loader: how fast a training process gets its batches, of a config whose data ships with the package."""

from statistics import fmean

from clock import Clock
from content import Case
from ours import ROOT, Repeat

from transfusion.codec.load import load_codec
from transfusion.config import load_config
from transfusion.data.corpus import build_corpus
from transfusion.data.loader import Packer
from transfusion.run import RunConfig, format_of, load_own_tokenizer, resolve

STEPS = 8  # whose images and tokens are counted


def loading(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """The batches of one step."""
    config = load_config(RunConfig, ROOT / case.config)
    codec, tokenizer = load_codec(config.data.codec), load_own_tokenizer(config)
    config = resolve(config, codec)
    fmt = format_of(config, tokenizer, codec)
    with clock("corpus"):
        corpus, _ = build_corpus(config.data, tokenizer, codec, fmt, config.train.seq_len)
    corpus_seconds = clock.take()["corpus"]
    packer = Packer(corpus, fmt, config.seed, config.train.rows, config.train.seq_len, config.train.accumulate)
    steps = [packer.batches(step) for step in range(STEPS)]

    def repeat(i: int):
        with clock("batches"):
            packer.batches(i)

    counts = {
        "images": fmean(sum(len(b.grids) for b in micro) for micro in steps),
        "tokens": fmean(sum(int((b.document >= 0).sum()) for b in micro) for micro in steps),
    }
    return repeat, {"units": counts, "corpus_seconds": corpus_seconds}
