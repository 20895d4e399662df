"""The diffusion loss on a fixed grid of t with fixed noise, and how much of it the caption explains.

    <bos> caption [image at t] <eos>       loss.image_errors, mean over the images, for each t
    <bos> caption [codes] <eos>            nats per code, where images are written as codes; named so, as no loss is
    conditioning gap = loss with the captions of other images - loss with the right ones, the noise being the same

A model that does not read its caption has a gap of 0.
"""

from collections.abc import Iterator

import numpy as np
import torch

from transfusion.data.documents import Corpus, caption_then_image
from transfusion.evals.chosen import chosen
from transfusion.evals.config import EvalConfig
from transfusion.evals.interval import normal
from transfusion.evals.score import batches, forward, is_code, nats
from transfusion.generate import Engine
from transfusion.loss import Noise, image_errors, noised
from transfusion.sequence import Segment


def fixed_noise(shape: tuple[int, ...], *key: int) -> torch.Tensor:
    """Standard normal numbers, a function of the key alone on every device."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoising_errors(
    engine: Engine, documents: list[list[Segment]], numbers: list[int], config: EvalConfig
) -> np.ndarray:
    """[times, images] diffusion loss of documents with one image each; an image's number decides its noise."""
    diffusion = engine.config.diffusion
    columns: list[np.ndarray] = []
    for batch in batches(engine, documents, config.batch):
        first = sum(c.shape[1] for c in columns)
        shapes = [(h * w, batch.patches.shape[1]) for h, w in batch.grids]
        column = []
        for k, t in enumerate(config.times):
            eps = [fixed_noise(s, config.seed, i, k) for s, i in zip(shapes, numbers[first:])]
            noise = Noise(torch.full_like(batch.t_max, t), torch.cat(eps).to(engine.device))
            _, predictions = forward(engine, batch, noised(batch, noise, diffusion), noise.t)
            column.append(image_errors(predictions, batch, noise, diffusion).cpu().double().numpy())
        columns.append(np.stack(column))
    return np.concatenate(columns, 1)


def errors(engine: Engine, documents: list[list[Segment]], numbers: list[int], config: EvalConfig) -> np.ndarray:
    """[times, images] the loss of each image; where images are codes, [1, images] nats a code."""
    if not engine.fmt.codes:
        return denoising_errors(engine, documents, numbers, config)
    of_documents, n = nats(engine, documents, config.batch, is_code)
    return (of_documents / n)[None]


def derangement(n: int, seed: int) -> np.ndarray:
    """[n] a permutation of n > 1 things that leaves none in its place: a round through them in random order."""
    order = np.random.default_rng(seed).permutation(n)
    result = np.empty(n, np.int64)
    result[order] = np.roll(order, 1)
    return result


def evaluate_denoising(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value) for each split: the loss, its mean at each t, and the conditioning gap with its interval."""
    for split, numbers, captions in chosen(corpus, config.n_images, config.seed):
        n = len(numbers)
        images = [corpus.image(captions, i) for i in range(n)]
        texts = [own[0] for own in captions.ids]
        documents = [caption_then_image(corpus.special, text, image) for text, image in zip(texts, images)]
        right = errors(engine, documents, numbers, config)
        yield f"denoising/{split}/n", n
        if engine.fmt.codes:
            yield f"denoising/{split}/nats_per_code", float(right.mean())
        else:
            yield f"denoising/{split}/loss", float(right.mean())
            for t, of_images in zip(config.times, right):
                yield f"denoising/{split}/t_{t:g}", float(of_images.mean())
        if n == 1:
            continue  # there is no other caption
        others = [texts[j] for j in derangement(n, config.seed)]
        documents = [caption_then_image(corpus.special, text, image) for text, image in zip(others, images)]
        shuffled = errors(engine, documents, numbers, config)
        low, high = normal((shuffled - right).mean(0).tolist())
        name = f"conditioning/{split}/{'nats_' if engine.fmt.codes else ''}"
        yield f"{name}right", float(right.mean())
        yield f"{name}shuffled", float(shuffled.mean())
        yield f"{name}gap", float((shuffled - right).mean())
        yield f"{name}gap_low", low
        yield f"{name}gap_high", high
        yield f"{name}ratio", float(shuffled.mean() / right.mean())
