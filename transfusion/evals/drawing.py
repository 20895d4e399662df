"""Draw accuracy: is the image drawn for a caption nearest to the real image of that caption, among all of the data?

    caption -> drawing -> its nearest of all real images, of every split -> does it carry the caption?

Of data with more images than `n_candidates` so many stand for all: figures of other numbers are no comparison.

Distances are L2 between pixels and, where weights are given, between EfficientNet-Lite features. A caption's rank is
the number of real images closer than the closest that carries it, duplicates of which count as carrying it too; top-k
is a rank below k. Chance is what a random order of the real images gives. FD-EffNet compares all drawings of a split
with the real images of their captions, as sets of features.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from transfusion.data.documents import Corpus
from transfusion.data.images import Size
from transfusion.evals.chosen import Candidate, candidates, chosen, look
from transfusion.evals.config import EvalConfig
from transfusion.evals.features import efficientnet
from transfusion.evals.frechet import frechet_distance
from transfusion.evals.interval import wilson
from transfusion.generate import Engine
from transfusion.sheet import contact_sheet

TOP = (1, 5)
CHUNK = 512  # real images at once, to bound the memory


def draw(engine: Engine, texts: list[str], config: EvalConfig) -> list[np.ndarray]:
    """[H, W, 3] uint8 drawings of the texts, the i-th from seed + i."""
    return [np.asarray(image) for image in engine.draw(texts, seed=config.seed, **config.sampling)]


def pixels(images: np.ndarray) -> Tensor:
    """[n, S * S * 3] uint8."""
    return torch.from_numpy(images.reshape(len(images), -1))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] float64 between rows of a [n, k] and b [m, k]; exact for pixels, so that ties are ties."""
    a = a.double()
    parts = []
    for part in b.split(CHUNK):
        part = part.double()
        parts.append(a.square().sum(1)[:, None] + part.square().sum(1) - 2 * a @ part.T)
    return torch.cat(parts, 1)


def carriers(real: Sequence[Candidate], texts: list[str]) -> np.ndarray:
    """[n, m] bool: which of m real images carry each text, or look exactly like one that does."""
    number: dict[bytes, int] = {}
    same = np.array([number.setdefault(look(image), len(number)) for image, _ in real])  # [m] equal where images are
    numbers: dict[str, list[int]] = {}
    for i, (_, own) in enumerate(real):
        for text in own:
            numbers.setdefault(text, []).append(i)
    return np.stack([np.isin(same, same[numbers[text]]) for text in texts])


def ranks(distances: Tensor, right: np.ndarray) -> np.ndarray:
    """[n] how many of the m images are closer than the closest right one; distances and right are [n, m]."""
    nearest = distances.masked_fill(~torch.from_numpy(right), torch.inf).min(1, keepdim=True).values
    return (distances < nearest).sum(1).numpy()


def chance(right: np.ndarray, k: int) -> float:
    """How often a random order of the m images has a right one among its first k; right is [n, m]."""
    m, k = right.shape[1], min(k, right.shape[1])
    return float(np.mean([1 - math.comb(m - int(r), k) / math.comb(m, k) for r in right.sum(1)]))


def of_one_size(images: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """[n, h, w, 3] uint8: images [H, W, 3] of several sizes stretched to one."""
    stretched = (i if i.shape[:2] == size else PIL.Image.fromarray(i).resize(size[::-1]) for i in images)
    return np.stack([np.asarray(image) for image in stretched])


def evaluate_drawing(engine: Engine, corpus: Corpus, config: EvalConfig) -> Iterator[tuple[str, float]]:
    """(name, value) for each split: top-k with its interval in each space, and chance."""
    looked_at = list(chosen(corpus, config.n_captions, config.seed))
    everything = list(candidates(corpus, config, looked_at))
    if not everything:
        return
    size = corpus.config.sizes[0]
    real = of_one_size([image for image, _ in everything], size)
    spaces = {"pixel": pixels}
    if config.features and config.n_captions:
        spaces["feature"] = efficientnet(config.features, engine.device)
    real_in = {space: embed(real) for space, embed in spaces.items()}
    for split, _, captions in looked_at:
        n, texts = len(captions), [own[0] for own in captions.texts]
        drawn, right = of_one_size(draw(engine, texts, config), size), carriers(everything, texts)
        yield f"drawing/{split}/n", n
        for space, embed in spaces.items():
            embedded = embed(drawn)
            if space == "feature" and n > 1:
                wanted = embed(of_one_size(captions.images, size))
                yield f"drawing/{split}/fd_effnet", frechet_distance(embedded, wanted)
            rank = ranks(squared_distances(embedded, real_in[space]), right)
            for k in TOP:
                hits = int((rank < k).sum())
                low, high = wilson(hits, n)
                yield f"drawing/{split}/{space}_top{k}", hits / n
                yield f"drawing/{split}/{space}_top{k}_low", low
                yield f"drawing/{split}/{space}_top{k}_high", high
        for k in TOP:
            yield f"drawing/{split}/chance_top{k}", chance(right, k)
        if config.sheets:
            path = Path(config.sheets) / f"drawn_{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            items = [(text, pair) for text, *pair in zip(texts, drawn, captions.images)]
            contact_sheet(items, columns=8, title=f"{split}: drawn, real").save(path)
