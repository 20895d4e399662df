"""Whole documents through the engine's model, one a row, as in training but without noise of its own.

nats    = - sum log p(token | all before it)        images on the way are clean, t = 0
<boi>   is not counted: whether to draw is a decision, not text
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.generate import Engine
from transfusion.model.mask import dense_mask
from transfusion.sequence import Batch, Image, Text, collate, lay_out


def batches(engine: Engine, documents: Sequence[list[Text | Image]], size: int) -> Iterator[Batch]:
    """The documents in batches of `size` rows, each as long as its longest document, on the engine's device."""
    for start in range(0, len(documents), size):
        rows = [[lay_out(document, engine.fmt)] for document in documents[start : start + size]]
        yield collate(rows, max(len(row[0]) for row in rows), engine.fmt).to(engine.device)


@torch.inference_mode()
def forward(engine: Engine, batch: Batch, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [M, V], predictions [N, P]), float32, of a batch whose patches are z [N, P] at the levels t [I]."""
    # of any length, unlike the block mask of training
    mask = dense_mask(batch.document, batch.image, batch.hidden, not engine.config.model.causal_images)
    with torch.autocast(engine.device.type, engine.dtype, enabled=engine.dtype != torch.float32):
        logits, predictions = engine.model(
            batch.tokens, batch.place, mask, z, t, batch.patch_image, batch.grids, batch.patch_at, batch.text_at
        )
    return logits.float(), predictions.float()


def text_nats(engine: Engine, documents: Sequence[list[Text | Image]], size: int) -> tuple[float, int]:
    """(nats of all text targets, how many there are)."""
    nats, n = 0.0, 0
    for batch in batches(engine, documents, size):
        logits, _ = forward(engine, batch, batch.patches, torch.zeros_like(batch.t_max))
        is_text = batch.target != engine.fmt.special.boi
        of_token = F.cross_entropy(logits, batch.target, reduction="none")[is_text]  # [M]
        nats, n = nats + of_token.cpu().double().sum().item(), n + len(of_token)
    return nats, n
