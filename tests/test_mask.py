"""The mask against the paper's sentence, and its three other forms (intervals, tiles, FlexAttention) against it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import packed, rows_of_parts, seeds
from torch.nn.attention.flex_attention import flex_attention

from transfusion.model.mask import block_mask, dense_mask, visible

# several images in a document, several documents in a row, padding in row 1, images that cross a tile's edge
LAYOUT = [[[3, (2, 3), 2, (3, 3), 1], [(3, 1), 4, (1, 1)]], [[5, (4, 5)]], [[40], [2, (5, 8), (2, 2)]]]


def layouts(multiple: int):
    """Strategy for (document, image) [B, L], L a multiple of this."""

    def lay(seed, rows, padding):
        longest = packed(seed, rows).tokens.shape[1] + padding
        batch = packed(seed, rows, seq_len=-(-longest // multiple) * multiple)
        return batch.document, batch.image

    return st.builds(lay, seeds, rows_of_parts, st.integers(0, 9))


def papers_sentence(document, image):
    """[B, L, L] by loops: causal attention to every element of the sequence, and bidirectional attention within the
    elements of each individual image; a sequence is a document (padding counts as one)."""
    B, L = document.shape
    document, image = document.tolist(), image.tolist()
    sees = torch.zeros(B, L, L, dtype=torch.bool)
    for b in range(B):
        for q in range(L):
            for k in range(L):
                if document[b][q] != document[b][k]:
                    continue
                if k <= q:
                    sees[b, q, k] = True
                elif image[b][q] != -1 and image[b][q] == image[b][k]:
                    sees[b, q, k] = True
    return sees


@given(layouts(1))
def test_the_dense_mask_is_the_papers_sentence(layout):
    assert torch.equal(dense_mask(*layout)[:, 0], papers_sentence(*layout))


@given(layouts(1))
def test_every_position_sees_one_interval_and_visible_names_it(layout):
    first, last = visible(*layout)
    index = torch.arange(first.shape[1])
    inside = (first[..., None] <= index) & (index <= last[..., None])
    assert torch.equal(dense_mask(*layout)[:, 0], inside)
    assert (first.diff() >= 0).all() and (last.diff() >= 0).all()


def listed(count, index):
    """Bool [B, rows, columns] of the tiles that a BlockMask lists."""
    tiles = torch.zeros(index.shape, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        tiles[b, h, row, index[b, h, row, : count[b, h, row]].long()] = True
    return tiles[:, 0]


def check_tiles(document, image, block):
    B, L = document.shape
    mask, n = block_mask(document, image, block), L // block
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    tiles = dense_mask(document, image).view(B, n, block, n, block).transpose(2, 3)  # [B, n, n, block, block]
    some, every = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    assert torch.equal(full, every), "the full tiles are those with only allowed pairs"
    assert torch.equal(partial, some & ~every), "the others that are listed are those with some"


@given(layouts(16))
def test_tiles_of_16_are_listed_exactly_as_the_mask_fills_them(layout):
    check_tiles(*layout, 16)


@settings(max_examples=20)
@given(layouts(128))
def test_tiles_of_128_are_listed_exactly_as_the_mask_fills_them(layout):
    check_tiles(*layout, 128)


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_tiles_of_a_crowded_layout_are_listed_exactly_at_any_size(block):
    batch = packed(0, LAYOUT, seq_len=128)
    check_tiles(batch.document, batch.image, block)


def test_a_row_that_is_no_multiple_of_the_tile_is_refused():
    batch = packed(0, LAYOUT, seq_len=120)
    with pytest.raises(ValueError, match="seq_len = 120 is not a multiple of 128"):
        block_mask(batch.document, batch.image)


def heads(batch, n_kv_heads=2, K=16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    B, L = batch.tokens.shape
    return [torch.randn(B, h, L, K, generator=generator).to(device) for h in (4, n_kv_heads, n_kv_heads)]


def slow_attention(q, k, v, sees):
    """Softmax over what each query sees, one query at a time."""
    out = torch.empty_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g = h * k.shape[1] // q.shape[1]  # the head of k and v that head h shares
        keys = sees[b, i]
        weights = torch.softmax(k[b, g, keys] @ q[b, h, i] / math.sqrt(q.shape[-1]), 0)
        out[b, h, i] = weights @ v[b, g, keys]
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow is fine here
def test_sdpa_and_flex_attention_are_the_slow_softmax():
    batch = packed(0, LAYOUT, seq_len=128)
    q, k, v = heads(batch)
    slow = slow_attention(q, k, v, papers_sentence(batch.document, batch.image))
    sdpa = F.scaled_dot_product_attention(q, k, v, dense_mask(batch.document, batch.image), enable_gqa=True)
    torch.testing.assert_close(sdpa, slow, rtol=1e-5, atol=1e-5)
    for block in (16, 128):
        flex = flex_attention(q, k, v, block_mask=block_mask(batch.document, batch.image, block), enable_gqa=True)
        torch.testing.assert_close(flex, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("seq_len", [128, 512])
def test_compiled_flex_attention_is_sdpa_forward_and_backward(seq_len):
    batch = packed(0, LAYOUT, seq_len=seq_len).to("cuda")
    inputs = [x.requires_grad_() for x in heads(batch, K=64, device="cuda")]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for attend, mask in (
        (torch.compile(flex_attention), {"block_mask": block_mask(batch.document, batch.image)}),
        (F.scaled_dot_product_attention, {"attn_mask": dense_mask(batch.document, batch.image)}),
    ):
        out = attend(*inputs, **mask, enable_gqa=True)
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for flex, sdpa in zip(*found):
        torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-4)
