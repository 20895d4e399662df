"""The loader: how fast a training process gets its batches, of a config whose data ships with the package."""

from answer import Repeat
from clock import Clock
from content import Case
from machine import ROOT

from transfusion.codec.codec import Codec
from transfusion.codec.load import load_codec
from transfusion.config import load_config
from transfusion.data.corpus import build_corpus
from transfusion.data.loader import Packer
from transfusion.run import RunConfig, format_of, load_own_tokenizer, resolve

STEPS = 8  # of a repetition


def packer_of(config: RunConfig, codec: Codec) -> Packer:
    """What makes the batches of a run."""
    tokenizer = load_own_tokenizer(config)
    fmt = format_of(config, tokenizer, codec)
    corpus, _ = build_corpus(config.data, tokenizer, codec, fmt, config.train.seq_len)
    return Packer(corpus, fmt, config.seed, config.train.rows, config.train.seq_len, config.train.micro_batch)


def loading(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """The batches of the first steps."""
    config = load_config(RunConfig, ROOT / case.config)
    codec = load_codec(config.data.codec)
    packer = packer_of(resolve(config, codec), codec)
    batches = [batch for step in range(STEPS) for batch in packer.batches(step)]
    images, tokens = sum(len(b.grids) for b in batches), sum(int((b.document >= 0).sum()) for b in batches)

    def repeat(i: int):
        with clock("batches"):
            for step in range(STEPS):
                packer.batches(step)

    return repeat, {"units": {"images": images, "tokens": tokens, "steps": STEPS}}
