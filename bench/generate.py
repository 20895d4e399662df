"""What generation costs: CPU seconds of one thread, random weights, in the two smallest shapes that say something.

    OMP_NUM_THREADS=1 python bench/generate.py [256 | 512] [bf16 | fp32] [times]

Prints one line a case: the median over interleaved repetitions. 64 tokens are written, images of 64 patches drawn in 50
steps of Euler, and 32 requests, half of each kind, answered together and one by one.
"""

import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from transfusion.data.documents import DataConfig
from transfusion.generate import Engine
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.run import RunConfig, SampleConfig, TrainConfig
from transfusion.sequence import Special, Text

HEADS = {256: 4, 512: 8}
VOCAB = 2048


class Numbers:
    """A tokenizer whose `<eos>` is never picked, so that every text has its full length."""

    special = Special(pad=0, bos=1, eos=VOCAB - 1, boi=3, eoi=4, patch=5)
    vocab_size = VOCAB - 1

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def engine_of(dim: int, precision: str) -> Engine:
    """An engine of 8 layers with random weights: 64 patches an image."""
    torch.manual_seed(0)
    sizes = {"dim": dim, "n_layers": 8, "n_heads": HEADS[dim], "patch_size": 4, "channels": 3, "vocab_size": VOCAB}
    model = build_model(ModelConfig(**sizes))
    train = TrainConfig(seq_len=256, precision=precision)
    sample = SampleConfig(steps=50, solver="euler", max_tokens=64, temperature=1.0)
    config = RunConfig(model=model.config, data=DataConfig(image_size=32), train=train, sample=sample)
    return Engine(model, Numbers(), config)


def cases(engine: Engine):
    """(name, what to time)."""
    random = np.random.default_rng(0)
    prompts = [[Text(np.array([1, *random.integers(6, VOCAB - 1, 7 + i % 5)]))] for i in range(32)]

    def answer(mode: str, documents: list, **options):
        return lambda: engine.complete(documents, mode, 0, replace(engine.config.sample, **options))

    def apart():
        for i, prompt in enumerate(prompts):
            answer(("text", "draw")[i % 2], [prompt])()

    def together():
        batching = engine.batching()
        for i, prompt in enumerate(prompts):
            batching.submit(engine.request(prompt, ("text", "draw")[i % 2], i, engine.config.sample))
        left = len(prompts)
        while left:
            left -= len(batching.step())

    for n in (1, 16):
        yield f"write 64 tokens, batch {n}", answer("text", prompts[:n])
    for n in (1, 4):
        for guidance in (1.0, 3.0):
            yield f"draw 64 patches, batch {n}, guidance {guidance:g}", answer("draw", prompts[:n], guidance=guidance)
    yield "32 requests together", together
    yield "32 requests one by one", apart


def main(dim: int = 256, precision: str = "fp32", times: int = 3):
    engine, seconds = engine_of(dim, precision), {}
    for i in range(times + 1):
        for name, run in cases(engine):
            if i == 0 and name.startswith("32"):
                continue  # the others have warmed it up
            start = time.process_time()
            run()
            if i:
                seconds.setdefault(name, []).append(time.process_time() - start)
    for name, of_case in seconds.items():
        print(f"dim {dim} {precision}  {name:40s} {statistics.median(of_case):8.3f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(kind(given) for kind, given in zip((int, str, int), sys.argv[1:])))
