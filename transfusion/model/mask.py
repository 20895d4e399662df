"""Who sees whom: causal, plus full attention among the patches of one image (Zhou et al. 2024, section 3, figure 4).

    position      k: <bos> a cat <boi> # # # # <eoi> <eos>
    q = cat          x    x  x
    q = <boi>        x    x  x    x
    q = a patch      x    x  x    x    x x x x                  a patch sees its whole image, and all before it
    q = <eoi>        x    x  x    x    x x x x   x              BOI and EOI are ordinary causal tokens

    allow(q, k) = document(q) == document(k)  and  (k <= q  or  image(q) == image(k) != none)
                                              and  (image(q) == image(k)  or  not hidden(k))

Hidden are the noised patches of an image that has a clean copy behind it: they see what any patch sees, and nobody but
their own image sees them. Without `full`, patches are causal too (the paper's ablation): k <= q is all that holds.

`allow` is the only definition. SDPA reads it as a boolean tensor, FlexAttention as a function of indices, and the block
mask that tells Flex which tiles to skip follows from the layout in closed form: documents and images are contiguous, so
each position sees one interval of its row, less what is hidden in it. Attention by documents (varlen.py) reads it for
one document at a time, as it may while the first term stands.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # FlexAttention's tile
ALL = slice(None)


def allow(document_q, image_q, index_q, document_k, image_k, index_k, hidden_k, full: bool = True):
    """Whether q sees k; indices count positions of a row. Broadcasts."""
    same_image = (image_q == image_k) & (image_q >= 0)
    order = (index_k <= index_q) | (same_image & full)
    return (document_q == document_k) & order & (same_image | ~hidden_k)


def dense_mask(document: Tensor, image: Tensor, hidden: Tensor, full: bool = True, queries: slice = ALL) -> Tensor:
    """Bool [B, 1, Q, L] for SDPA, True = attend, of rows laid out as `document`, `image` and `hidden` [B, L]; Q are the
    positions of `queries`."""
    index = torch.arange(document.shape[1], device=document.device)
    q = (x[:, None, queries, None] for x in (document, image))
    k = (x[:, None, None] for x in (document, image))
    return allow(*q, index[queries, None], *k, index[None], hidden[:, None, None], full)


def visible(document: Tensor, image: Tensor, full: bool = True) -> tuple[Tensor, Tensor]:
    """(first, last) [B, L]: the interval of its row that each position sees, hidden ones not yet taken out.

    Both never decrease along a row.
    """
    B, L = document.shape
    index = torch.arange(L, device=document.device).expand(B, L)
    edge = torch.ones_like(document[:, :1], dtype=torch.bool)
    starts = torch.cat([edge, document[:, 1:] != document[:, :-1]], 1)
    first = torch.where(starts, index, 0).cummax(1).values  # where the document begins
    if not full:
        return first, index
    ends = torch.cat([(image[:, 1:] != image[:, :-1]) | (image[:, :-1] < 0), edge], 1)
    last = torch.where(ends, index, L).flip(1).cummin(1).values.flip(1)  # itself, or where its image ends
    return first, last


def pairs_seen(document: Tensor, image: Tensor, hidden: Tensor, full: bool = True) -> Tensor:
    """[B, L] how many positions each one sees: the sums over keys of `dense_mask`, without the L^2 numbers of it."""
    first, last = visible(document, image, full)
    # an image's positions stand together, so in the interval of one of them they are the last
    index = torch.arange(image.shape[1], device=image.device)
    edge = torch.ones_like(image[:, :1], dtype=torch.bool)
    begins = torch.cat([edge, image[:, 1:] != image[:, :-1]], 1)
    mates = torch.where(begins, index, 0).cummax(1).values
    mates = torch.where(image >= 0, mates, last + 1)  # first of the same image; text has none
    before = torch.nn.functional.pad(hidden.long().cumsum(1), (1, 0))  # [B, L + 1] hidden ones before each position
    return last + 1 - first - (before.gather(1, mates) - before.gather(1, first))


def block_mask(
    document: Tensor, image: Tensor, hidden: Tensor, full: bool = True, block: int = BLOCK, queries: slice = ALL
) -> BlockMask:
    """FlexAttention's mask of rows [B, L]: O((L / block)^2) work, L a multiple of `block`, and so are the ends of
    `queries`.

    A tile of queries i and keys j holds an allowed pair iff first(i's first query) <= j's last key and
    last(i's last query) >= j's first key, and nothing but allowed pairs iff the same holds with the ends exchanged.
    A tile with hidden keys is never taken for one without exceptions: Flex looks at its pairs one by one.
    """
    B, L = document.shape
    start, stop, _ = queries.indices(L)
    for n, what in ((L, "seq_len"), (stop - start, "a rank's part of seq_len")):
        if n % block:
            raise ValueError(f"{what} = {n} is not a multiple of {block}, the tile of FlexAttention: round it up")
    first, last = (x[:, queries] for x in visible(document, image, full))
    n = L // block
    begin = torch.arange(n, device=document.device) * block  # first key of each tile
    tiles_first, tiles_last = (x.unflatten(1, (-1, block)) for x in (first, last))
    some = (tiles_first[..., :1] < begin + block) & (tiles_last[..., -1:] >= begin)  # [B, n, n]
    every = (tiles_first[..., -1:] <= begin) & (tiles_last[..., :1] >= begin + block - 1)
    every &= ~hidden.view(B, 1, n, block).any(-1)

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(how many, which first) of the marked tiles of each query tile, as BlockMask wants them."""
        tiles = tiles[:, None]  # one mask for all heads
        return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()

    def mask_mod(b, h, q, k):
        q = q + start
        return allow(document[b, q], image[b, q], q, document[b, k], image[b, k], k, hidden[b, k], full)

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every), *ordered(every), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(stop - start, L)
    )
