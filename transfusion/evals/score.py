"""Whole documents through the engine's model, one a row, as in training but without noise of its own.

nats    = - sum log p(token | all before it)        images on the way are clean, t = 0
text    tokens of the tokenizer but <boi>: whether to draw, and how large, is a decision, not text
codes   of images that are written as codes
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.generate import Engine
from transfusion.model.mask import dense_mask
from transfusion.sequence import Batch, Format, Segment, collate, lay_out


def batches(engine: Engine, documents: Sequence[list[Segment]], size: int) -> Iterator[Batch]:
    """The documents in batches of `size` rows, each as long as its longest document, on the engine's device."""
    for start in range(0, len(documents), size):
        rows = [[lay_out(document, engine.fmt)] for document in documents[start : start + size]]
        yield collate(rows, max(len(row[0]) for row in rows), engine.fmt).to(engine.device)


@torch.inference_mode()
def forward(engine: Engine, batch: Batch, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [M, V], predictions [N, P]), float32, of a batch whose patches are z [N, P] at the levels t [I]."""
    # of any length, unlike the block mask of training
    mask = dense_mask(batch.document, batch.image, batch.hidden, not engine.config.model.causal_images)
    # a CPU's likelihoods stay those of float32, whether or not it has products of bfloat16
    half = engine.device.type != "cpu" and engine.dtype != torch.float32
    with torch.autocast(engine.device.type, engine.dtype, enabled=half):
        logits, predictions = engine.model(
            batch.tokens, batch.place, mask, z, t, batch.patch_image, batch.grids, batch.patch_at, batch.text_at
        )
    return logits.float(), predictions.float()


def is_text(target: Tensor, fmt: Format) -> Tensor:
    return (target < fmt.text_tokens) & (target != fmt.special.boi)


def is_code(target: Tensor, fmt: Format) -> Tensor:
    return target >= fmt.first_code


def nats(
    engine: Engine,
    documents: Sequence[list[Segment]],
    size: int,
    counted: Callable[[Tensor, Format], Tensor] = is_text,
) -> tuple[np.ndarray, np.ndarray]:
    """([documents] nats of the targets that are counted, [documents] how many there are), float64 and int."""
    sums, numbers = [], []
    for batch in batches(engine, documents, size):
        logits, _ = forward(engine, batch, batch.patches, torch.zeros_like(batch.t_max))
        counts = counted(batch.target, engine.fmt).cpu().double()  # [M]; mps has no float64
        of_token = F.cross_entropy(logits, batch.target, reduction="none").cpu().double() * counts
        row = batch.text_at.cpu() // batch.tokens.shape[1]
        zeros = counts.new_zeros(len(batch.tokens))
        sums.append(zeros.index_add(0, row, of_token).numpy())
        numbers.append(zeros.index_add(0, row, counts).numpy())
    return np.concatenate(sums), np.concatenate(numbers).astype(int)
