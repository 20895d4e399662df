"""Memory of a training step, from its config alone: a rehearsal on tensors that have shapes and types and no numbers.

    ledger    + 786432 B   mm -> [1, 4096, 96] bf16      an operator brings a storage: it is entered
              - 786432 B                                 the last tensor of it goes: it is struck out
    peak      most that was alive at once                from the start of the forward to the end of the backward

The rehearsal is the step's own code (`losses`, `backward`) under torch's FakeTensorMode: so all is in it that autograd,
autocast and checkpointing keep, and what the backward takes for a moment, whatever the model is made of. What lasts
from step to step is known without it: of each parameter 4 bytes, and of one that trains as many for its gradient, twice
as many for its moments, once more for its average.

    one device          all of that, and the peak
    a rank of several   of that a part in `shards`; the weights of blocks in flight, whole; what its rows keep

Attention is a GPU's, which holds no scores, or a CPU's, which holds those of strips (model/varlen.py). Compiled blocks
keep less than is said here: what is quickly computed they compute again. What an allocator holds beyond what it is
asked for is not in it; docs/scaling.md says what was measured.
"""

import weakref
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transfusion.cluster import Cluster
from transfusion.data.loader import micro_batches
from transfusion.flops import copies, count_images, grid_of
from transfusion.loss import Noise, losses
from transfusion.model.float8 import use_float8
from transfusion.model.head import LOGITS
from transfusion.model.precision import empty_at_precision
from transfusion.model.recompute import recompute
from transfusion.model.transformer import Mask, Transfusion, build_model
from transfusion.model.varlen import Strip, VarlenMask, varlen_mask
from transfusion.optim import freeze, is_layer_matrix, trained
from transfusion.parallel import ParallelConfig
from transfusion.run import RunConfig
from transfusion.sequence import Batch, Codes, Format, Image, Special, Text, collate, image_length, lay_out

CAPTION = 32  # tokens of a caption, presumed
ATEN = torch.ops.aten
# bytes of each number of a block in flight: two blocks' weights in bf16 and the buffer that they are gathered in, the
# gradient in bf16, and in float32 that which is being scattered and the one before it
IN_FLIGHT = 2 * 2 + 2 + 2 + 2 * 4


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operators brought and that are alive; copies of the weights in another type apart."""

    def __init__(self, model: torch.nn.Module, count_casts: bool):
        super().__init__()
        self.count_casts = count_casts  # towards the peak
        self.entries: dict[int, int] = {}
        self.weights = {id(p.untyped_storage()) for p in model.parameters()}
        self.alive = self.peak = self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cast = func is ATEN._to_copy.default and id(args[0].untyped_storage()) in self.weights
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.enter(x.untyped_storage(), cast)
        return out

    def enter(self, storage: torch.UntypedStorage, cast: bool) -> None:
        key, n = id(storage), storage.nbytes()
        if key in self.entries or key in self.weights:
            return
        self.entries[key] = n
        self.alive += n
        self.casts += n * cast
        self.peak = max(self.peak, self.alive - (0 if self.count_casts else self.casts))
        weakref.finalize(storage, self.strike, key, n * cast)

    def strike(self, key: int, cast: int) -> None:
        self.alive -= self.entries.pop(key)
        self.casts -= cast


class Rehearsal(NamedTuple):
    """Bytes beyond the weights."""

    activations: int  # kept at the end of the forward, but for the next two
    casts: int  # the weights in bf16, which autograd keeps
    head: int  # the gradient of the head's matrix, which is found on the way forward
    peak: int  # most that was there at once, all of these and gradients included


def rehearse(config: RunConfig, batch: Batch, on: str = "cuda", scatter: bool = False) -> Rehearsal:
    """What a step keeps of its last micro-batch, attention being that of a GPU ("cuda") or of a CPU ("cpu").

    With `scatter`, gradients go as they come, and the peak is without them and without the weights in bf16.
    """
    fake, c = FakeTensorMode(), config.train
    with fake:
        model = Transfusion(config.model)
    freeze(model, config.optim.freeze)
    if c.float8:
        use_float8(model.layers)
    recompute(model.layers, c.checkpointing)
    noise = Noise(torch.zeros(len(batch.grids)), torch.zeros_like(batch.patches))
    mask = mask_of(fake, config, batch, on)
    batch, noise = without_numbers(fake, batch), Noise(*map(fake.from_tensor, noise))
    with fake, Ledger(model, not scatter) as ledger:
        for p in trained(model):
            if scatter:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            elif micro_batches(c.rows, c.micro_batch)[0] > 1:  # gradients of those before it
                p.grad = torch.zeros_like(p)
        before = ledger.alive
        with torch.autocast("cpu", torch.bfloat16, enabled=c.precision != "fp32"):
            found = losses(model, batch, noise, config.diffusion, c.z_loss, mask_of=lambda batch, model: mask)
        head = model.output.weight
        head = head.numel() * head.element_size() if head.requires_grad else 0
        kept, casts = ledger.alive - before - head, ledger.casts
        (found.lm + found.image).backward()
    return Rehearsal(kept - casts, casts, head, ledger.peak)


def without_numbers(fake: FakeTensorMode, batch: Batch) -> Batch:
    return replace(batch, **{k: fake.from_tensor(x) for k, x in vars(batch).items() if isinstance(x, Tensor)})


def mask_of(fake: FakeTensorMode, config: RunConfig, batch: Batch, on: str) -> Mask | None:
    """The mask by which a batch is attended to; compiled blocks of a GPU hold none (FlexAttention)."""
    if on == "cuda":
        B, L = batch.tokens.shape
        with fake:
            return None if config.train.compile else torch.empty(B, 1, L, L, dtype=torch.bool)
    mask = varlen_mask(batch.document, batch.image, batch.hidden, not config.model.causal_images)

    def strip(s: Strip) -> Strip:
        bias = None if s.bias is None else fake.from_tensor(s.bias)
        return s._replace(allowed=fake.from_tensor(s.allowed), bias=bias)

    strips = [[strip(s) for s in of_group] for of_group in mask.strips]
    return VarlenMask(fake.from_tensor(mask.place), fake.from_tensor(mask.at), mask.groups, strips)


def presumed(config: RunConfig, rows: int) -> Batch:
    """Rows as a config has them filled: images with captions of CAPTION tokens, and a text for the rest of each row."""
    m, c, grid, n_copies = config.model, config.train, grid_of(config), copies(config)
    codes = int(m.patches == "codes")
    fmt = Format(Special(*range(6)), m.patch_size, m.image_positions, m.vocab_size - m.sides - codes, m.sides, codes)
    latents = np.zeros((m.channels, *(side * m.patch_size for side in grid)), np.float32)

    def image_document(i: int) -> list:
        copy = int((i + 1) * n_copies) > int(i * n_copies)
        image = Codes(np.zeros(grid, np.int64)) if codes else Image(latents, copy=copy)
        return [Text(np.full(CAPTION + 1, 6)), image, Text(np.full(1, 6))]

    per_row = count_images(config) / c.rows
    images, filled = 0, []
    for r in range(rows):
        row, room = [], c.seq_len
        while images < round((r + 1) * per_row) and room >= CAPTION + 2 + image_length(grid, fmt, n_copies > 0):
            row.append(lay_out(image_document(images), fmt))
            images, room = images + 1, room - len(row[-1])
        if room > 1:
            row.append(lay_out([Text(np.full(room, 6))], fmt))
        filled.append(row)
    return collate(filled, c.seq_len, fmt)


@lru_cache(maxsize=8)
def rehearse_presumed(config: RunConfig, rows: int, on: str, scatter: bool) -> Rehearsal:
    """`rehearse` of presumed rows, once: how weights are sharded changes nothing in it."""
    return rehearse(config, presumed(config, rows), on, scatter)


def drawing_memory(config: RunConfig) -> float:
    """Bytes of the weights with which one of several ranks draws a sheet, in the precision of a GPU."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    model = empty_at_precision(config.model, dtype, "meta")
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def estimate_memory(config: RunConfig, cluster: Cluster | None = None, on: str = "cuda") -> dict[str, float]:
    """Bytes on one device, or on one of several ranks, by part; the last one makes the sum what is there at once.

    Activations: what autograd keeps of a micro-batch. Logits: those held at once, and what they give the head's matrix.
    """
    cluster, m, c = cluster or Cluster(), config.model, config.train
    own = replace(config, train=replace(c, seq_len=c.seq_len // cluster.context))  # the positions of a rank
    (_, rows), several = micro_batches(c.rows, c.micro_batch, cluster.groups), cluster.world > 1
    found = rehearse_presumed(replace(own, parallel=ParallelConfig()), rows, on, several)
    model = build_model(m, "meta")
    freeze(model, config.optim.freeze)
    weights, train = (4.0 * sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model)))
    muon = [p for name, p in model.named_parameters() if config.optim.name == "muon" and is_layer_matrix(name, p)]
    one_moment = 4.0 * sum(p.numel() for p in muon if p.requires_grad)  # AdamW has two
    lasting = {"weights": weights, "gradients": train, "optimizer": 2 * train - one_moment}
    lasting["average"] = train if config.optim.ema else 0.0
    lasting = {name: x / cluster.of_shard for name, x in lasting.items()}
    kept = {"activations (about)": float(found.activations)}
    kept["logits (at most)"] = 10.0 * min(rows * own.train.seq_len * m.vocab_size, LOGITS) + found.head
    if not several:
        kept = {"weights in bf16": float(found.casts)} | kept
        at_once = found.peak - train  # the peak has gradients in it, as far as they are there
        return lasting | kept | {"not all at once": at_once - sum(kept.values())}
    not_all = {"not all at once": found.peak - sum(kept.values())}
    # keys and values of the other positions, gathered
    others = 2 * m.kv_heads * m.head_dim * rows * (c.seq_len - own.train.seq_len)
    kept["activations (about)"] += 2.0 * others * (1 if c.checkpointing == "full" else m.n_layers)
    of_block = sum(p.numel() for p in model.layers[0].parameters())
    of_rest = weights / 4 - of_block * m.n_layers  # stays gathered; its gradient, in bf16, comes at the end
    return lasting | {"blocks in flight (at most)": IN_FLIGHT * of_block + 4.0 * of_rest} | kept | not_all
