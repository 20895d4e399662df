"""Attention document by document, for CPUs: a packed row costs what its documents cost, not its length squared.

    rows [B, L]     | doc 0   | doc 1      | doc 2 | pad |   | doc 3  | doc 4 |  doc 5   | ...
    groups          [doc 1, doc 5]  [doc 0, doc 3]  [doc 2, doc 4]        each [D, n]: D documents of about n positions

    strip 0         q q q q q             q: queries, of which some STRIP go together
                    k k k k k k           k: the keys that any of them may see
    strip 1                   q q q q q
                    k k k k k k k k k k

Documents are sorted by length and grouped, so that little of a group is filling; padding takes no part and comes out as
0. The keys behind all that a strip sees are left out: of k strips (k - 1) / 2k of all pairs. In bf16 the products are
written out, which a CPU without AMX computes 1.5 to 4 times as fast as SDPA's kernel for documents of up to some
hundred positions, forward and backward (docs/log.md, 2026-11-23). Scores are then rounded to bf16, as in eager
attention; SDPA keeps them in float32.

It rests on the first term of `allow`, that a document sees itself alone. Were that to change, the dense mask is the one
to take (`row_mask` in model/transformer.py).
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.model.mask import allow

FULL = 0.8  # a group's shortest document is at least so long as this share of its longest
WRITTEN_OUT = 1024  # positions of a document up to which the scores of its strips are held in memory
STRIP = 256  # queries that go together at most, a multiple of 16
FILLING = -2  # document of the positions that fill up a group; padding of rows is -1


class Strip(NamedTuple):
    """Neighbouring queries of a group's documents, and what they see of the first keys."""

    queries: slice
    keys: slice
    allowed: Tensor  # bool [D, 1, queries, keys] ...
    bias: Tensor | None  # ... and bf16, 0 where allowed, -inf where not, of what is written out


@dataclass(frozen=True, eq=False)
class VarlenMask:
    """Where the positions of rows [B, L] stand in groups of documents, and who sees whom there."""

    place: Tensor  # [B * L] of each position, its place among those of all groups; of padding, behind the last
    at: Tensor  # [T] the inverse: flat position of each place, B * L where it fills up
    groups: list[tuple[int, int]]  # (documents, positions of each) of the groups; T is the sum of their products
    strips: list[list[Strip]]  # of each group


def varlen_mask(document: Tensor, image: Tensor, hidden: Tensor, full: bool = True) -> VarlenMask:
    """The mask of rows laid out as `document`, `image` and `hidden` [B, L]; a document is contiguous."""
    S = document.numel()
    edge = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True).flatten()  # a document begins here
    start = edge.nonzero()[:, 0]
    length = torch.diff(start, append=start.new_tensor([S]))
    real = document.flatten()[start] >= 0
    start, length = start[real], length[real]
    length, order = length.sort(descending=True, stable=True)
    start = start[order]

    members: list[tuple[int, int]] = []  # (first, one behind the last) of each group
    lengths = length.tolist()
    for i, n in enumerate(lengths):
        if not members or n < FULL * lengths[members[-1][0]]:
            members.append((i, i))
        members[-1] = (members[-1][0], i + 1)

    def filled(x: Tensor, value: int) -> Tensor:
        return F.pad(x.flatten(), (0, 1), value=value)

    document, image, hidden = filled(document, FILLING), filled(image, -1), filled(hidden, False)
    at, groups, strips = [start.new_zeros(0)], [], []
    for first, last in members:
        n = lengths[first]
        index = torch.arange(n, device=start.device)
        inside = index < length[first:last, None]
        here = torch.where(inside, start[first:last, None] + index, S)  # [D, n]
        d, im, h = document[here], image[here], hidden[here]
        keys = (d[:, None, None], im[:, None, None], index, h[:, None, None])
        strips.append([])
        for part in slices(n):
            queries = (d[:, None, part, None], im[:, None, part, None], index[part, None])
            strips[-1].append(strip_of(part, allow(*queries, *keys, full)))
        groups.append((last - first, n))
        at.append(here.flatten())
    at = torch.cat(at)
    place = at.new_full((S + 1,), len(at)).index_copy(0, at, torch.arange(len(at), device=at.device))[:S]
    return VarlenMask(place, at, groups, strips)


def slices(n: int) -> list[slice]:
    """n queries in about equal strips, in multiples that the kernels like."""
    size = 16 * ceil(n / ceil(n / STRIP) / 16)
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def strip_of(queries: slice, allowed: Tensor) -> Strip:
    """The strip of queries that of all n keys see those `allowed` [D, 1, queries, n]."""
    n = allowed.shape[-1]
    keys = slice(0, int(allowed.flatten(0, 2).any(0).nonzero()[-1]) + 1)
    allowed, bias = allowed[..., keys].contiguous(), None
    if n <= WRITTEN_OUT:
        bias = torch.zeros_like(allowed, dtype=torch.bfloat16).masked_fill_(~allowed, -torch.inf)
    return Strip(queries, keys, allowed, bias)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, mask: VarlenMask) -> Tensor:
    """Attention of q [B, H, L, K] to k, v [B, G, L, K], each G heads serving H / G; [B, H, L, K], 0 at padding."""
    B, H, L, _ = q.shape
    sizes = [D * n for D, n in mask.groups]

    def parts(x: Tensor) -> list[Tensor]:
        """[D, heads, n, K] of each group."""
        rows = x.transpose(1, 2).flatten(0, 1)  # [B * L, heads, K]
        # a copy to places, not a gather from them: its derivative is a gather, that of a gather a sum
        placed = rows.new_zeros(len(mask.at) + 1, *rows.shape[1:]).index_copy(0, mask.place, rows)
        split = placed[:-1].split(sizes)
        return [part.unflatten(0, group).transpose(1, 2) for part, group in zip(split, mask.groups)]

    outs = [attend(*of_group) for of_group in zip(parts(q), parts(k), parts(v), mask.strips)]
    out = torch.cat([q.new_zeros(0, H, q.shape[-1]), *(o.flatten(0, 1) for o in outs)])  # [T, H, K]
    rows = out.new_zeros(B * L + 1, *out.shape[1:]).index_copy(0, mask.at, out)[:-1]
    return rows.unflatten(0, (B, L)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, strips: list[Strip]) -> Tensor:
    """[D, n, H, K]: q [D, H, n, K] to k, v [D, G, n, K] within the documents of a group, strip by strip."""
    written_out = q.dtype == torch.bfloat16 and strips[0].bias is not None
    if written_out:
        q, k, v = q * q.shape[-1] ** -0.5, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for strip in strips:
            qs, ks, vs = q[:, :, strip.queries], k[:, :, strip.keys], v[:, :, strip.keys]
            if written_out:
                out = (qs @ ks.transpose(-1, -2)).add_(strip.bias).softmax(-1) @ vs
            else:
                out = F.scaled_dot_product_attention(qs, ks, vs, strip.allowed, enable_gqa=True)
            outs.append(out.transpose(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
