"""The mask against the paper's sentence, and its three other forms (intervals, tiles, FlexAttention) against it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import packed, rich_rows, seeds
from torch.nn.attention.flex_attention import flex_attention

from transfusion.model.mask import block_mask, dense_mask, pairs_seen, visible

# several images in a document, several documents in a row, padding in row 1, images that cross a tile's edge
LAYOUT = [
    [[3, (2, 3), 2, (3, 3, "copy"), 1], [(3, 1, "given"), 4, (1, 1)]],
    [[5, (4, 5)]],
    [[40], [2, (5, 4, "copy"), (2, 2)]],
]
full_or_causal = st.booleans()


def layouts(multiple: int):
    """Strategy for (document, image, hidden) [B, L], L a multiple of this."""

    def lay(seed, rows, padding):
        longest = packed(seed, rows).tokens.shape[1] + padding
        batch = packed(seed, rows, seq_len=-(-longest // multiple) * multiple)
        return layout_of(batch)

    return st.builds(lay, seeds, rich_rows, st.integers(0, 9))


def layout_of(batch):
    return batch.document, batch.image, batch.hidden


def papers_sentence(document, image, hidden, full=True):
    """[B, L, L] by loops: causal attention to every element of the sequence, and bidirectional attention within the
    elements of each individual image; a sequence is a document (padding counts as one). Nobody else sees a noised image
    that has a clean copy."""
    B, L = document.shape
    document, image, hidden = document.tolist(), image.tolist(), hidden.tolist()
    sees = torch.zeros(B, L, L, dtype=torch.bool)
    for b in range(B):
        for q in range(L):
            for k in range(L):
                if document[b][q] != document[b][k] or (hidden[b][k] and image[b][q] != image[b][k]):
                    continue
                if k <= q:
                    sees[b, q, k] = True
                elif full and image[b][q] != -1 and image[b][q] == image[b][k]:
                    sees[b, q, k] = True
    return sees


@given(layouts(1), full_or_causal)
def test_the_dense_mask_is_the_papers_sentence(layout, full):
    assert torch.equal(dense_mask(*layout, full)[:, 0], papers_sentence(*layout, full))


@given(layouts(1), full_or_causal)
def test_every_position_sees_one_interval_less_what_is_hidden_and_visible_names_it(layout, full):
    document, image, hidden = layout
    first, last = visible(document, image, full)
    index = torch.arange(first.shape[1])
    inside = (first[..., None] <= index) & (index <= last[..., None])
    inside &= ~hidden[:, None] | (image[:, :, None] == image[:, None])
    assert torch.equal(dense_mask(*layout, full)[:, 0], inside)
    assert (first.diff() >= 0).all() and (last.diff() >= 0).all()


def listed(count, index):
    """Bool [B, rows, columns] of the tiles that a BlockMask lists."""
    tiles = torch.zeros(index.shape, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        tiles[b, h, row, index[b, h, row, : count[b, h, row]].long()] = True
    return tiles[:, 0]


def check_tiles(layout, full, block):
    B, L = layout[0].shape
    mask, n = block_mask(*layout, full, block), L // block
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    tiles = dense_mask(*layout, full).view(B, n, block, n, block).transpose(2, 3)  # [B, n, n, block, block]
    some, every = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    hides = layout[2].view(B, 1, n, block).any(-1).expand(B, n, n)  # tiles with hidden keys
    assert torch.equal(whole, every & ~hides), "the full tiles are those with only allowed pairs, and nothing hidden"
    assert not (some & ~whole & ~partial).any() and not (whole & partial).any(), "no tile with a pair is left out"
    assert not (partial & ~some & ~hides).any(), "none is listed for nothing, but for what is hidden in it"


@given(layouts(16), full_or_causal)
def test_tiles_of_16_are_listed_exactly_as_the_mask_fills_them(layout, full):
    check_tiles(layout, full, 16)


@settings(max_examples=20)
@given(layouts(128), full_or_causal)
def test_tiles_of_128_are_listed_exactly_as_the_mask_fills_them(layout, full):
    check_tiles(layout, full, 128)


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_tiles_of_a_crowded_layout_are_listed_exactly_at_any_size(block):
    batch = packed(0, LAYOUT, seq_len=128)
    check_tiles(layout_of(batch), True, block)


def test_a_row_that_is_no_multiple_of_the_tile_is_refused():
    batch = packed(0, LAYOUT, seq_len=120)
    with pytest.raises(ValueError, match="seq_len = 120 is not a multiple of 128"):
        block_mask(*layout_of(batch))


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


@given(layouts(1), full_or_causal)
@settings(max_examples=60, deadline=None)
def test_pairs_seen_are_the_sums_of_the_dense_mask(layout, full):
    assert torch.equal(pairs_seen(*layout, full), dense_mask(*layout, full)[:, 0].sum(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow is fine here
def test_sdpa_and_flex_attention_are_the_slow_softmax():
    batch = packed(0, LAYOUT, seq_len=128)
    q, k, v = heads(batch)
    slow = slow_attention(q, k, v, papers_sentence(*layout_of(batch)))
    sdpa = F.scaled_dot_product_attention(q, k, v, dense_mask(*layout_of(batch)), enable_gqa=True)
    torch.testing.assert_close(sdpa, slow, rtol=1e-5, atol=1e-5)
    for block in (16, 128):
        flex = flex_attention(q, k, v, block_mask=block_mask(*layout_of(batch), block=block), enable_gqa=True)
        torch.testing.assert_close(flex, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow is fine here
@pytest.mark.parametrize("queries", [slice(0, 64), slice(64, 128), slice(32, 48)])
def test_a_mask_of_some_queries_is_its_part_of_the_whole(queries):
    batch = packed(0, LAYOUT, seq_len=128)
    layout, (q, k, v) = layout_of(batch), heads(batch)
    part = dense_mask(*layout, queries=queries)
    assert torch.equal(part, dense_mask(*layout)[:, :, queries])
    sdpa = F.scaled_dot_product_attention(q[:, :, queries], k, v, part, enable_gqa=True)
    tiles = block_mask(*layout, block=16, queries=queries)
    flex = flex_attention(q[:, :, queries], k, v, block_mask=tiles, enable_gqa=True)
    torch.testing.assert_close(flex, sdpa, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("seq_len", [128, 512])
def test_compiled_flex_attention_is_sdpa_forward_and_backward(seq_len):
    batch = packed(0, LAYOUT, seq_len=seq_len).to("cuda")
    inputs = [x.requires_grad_() for x in heads(batch, K=64, device="cuda")]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for attend, mask in (
        (torch.compile(flex_attention), {"block_mask": block_mask(*layout_of(batch))}),
        (F.scaled_dot_product_attention, {"attn_mask": dense_mask(*layout_of(batch))}),
    ):
        out = attend(*inputs, **mask, enable_gqa=True)
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for flex, sdpa in zip(*found):
        torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-4)
