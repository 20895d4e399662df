"""Attention by documents against SDPA with the dense mask: outputs, gradients, errors in bf16, what it computes."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from random_rows import packed, rich_rows, seeds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion.model import varlen
from transfusion.model.mask import dense_mask
from transfusion.model.varlen import FULL, varlen_attention, varlen_mask


def layout_of(seed, rows, padding=0):
    batch = packed(seed, rows)
    batch = packed(seed, rows, seq_len=batch.tokens.shape[1] + padding)
    return batch.document, batch.image, batch.hidden


def heads(layout, n_heads, n_kv_heads, dtype=torch.float32):
    """q, k, v that ask for gradients, and a gradient of the output."""
    (B, L), random = layout[0].shape, torch.Generator().manual_seed(0)
    shapes = [(B, L, h, 8) for h in (n_heads, n_kv_heads, n_kv_heads, n_heads)]
    *qkv, g = (torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes)
    return [x.detach().requires_grad_() for x in qkv], g


strips = st.sampled_from([16, 256])  # documents of the tests take several of the first


@given(seeds, rich_rows, st.integers(0, 9), st.booleans(), st.sampled_from([(2, 2), (4, 2), (3, 1)]), strips)
def test_every_document_gets_the_output_and_the_gradients_of_the_dense_mask_and_padding_none(
    seed, rows, padding, full, n_heads, strip
):
    layout = layout_of(seed, rows, padding)
    real = (layout[0] >= 0)[:, None, :, None]
    assume(real.any())
    qkv, g = heads(layout, *n_heads)
    g = g * real
    wanted = F.scaled_dot_product_attention(*qkv, dense_mask(*layout, full), enable_gqa=True) * real
    wanted_gradients = torch.autograd.grad(wanted, qkv, g)
    with patch.object(varlen, "STRIP", strip):
        found = varlen_attention(*qkv, varlen_mask(*layout, full))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found, qkv, g), wanted_gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


LAYOUT = [[[9, (4, 4), 5], [(2, 3, "copy"), 7], [30]], [[3, (5, 5)], [40]]]


@pytest.mark.parametrize("strip", [16, 256])
@pytest.mark.parametrize("spread, most", [(1, 0.01), (4, 0.02), (16, 0.06)])
def test_in_bf16_outputs_and_gradients_err_by_little_even_where_scores_are_large(spread, most, strip, monkeypatch):
    monkeypatch.setattr(varlen, "STRIP", strip)
    layout = layout_of(0, LAYOUT, 3)
    real = (layout[0] >= 0)[:, None, :, None]
    (q, k, v), g = heads(layout, 4, 2, torch.bfloat16)
    qkv = [x.detach().requires_grad_() for x in (q * spread, k, v)]  # the scores' deviation is the spread
    found = varlen_attention(*qkv, varlen_mask(*layout)) * real
    exact = [x.detach().float().requires_grad_() for x in qkv]
    wanted = F.scaled_dot_product_attention(*exact, dense_mask(*layout), enable_gqa=True) * real
    assert found.dtype == torch.bfloat16
    gradients = zip(torch.autograd.grad(found, qkv, g * real), torch.autograd.grad(wanted, exact, g.float() * real))
    for a, b in ((found, wanted), *gradients):
        assert (a.float() - b).norm() < most * b.norm(), f"{(a.float() - b).norm() / b.norm():.3f}"


@pytest.mark.parametrize(
    "precision, written_out", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_the_products_of_documents_are_all_that_is_computed_up_to_the_last_key_that_a_strip_sees(
    precision, written_out, monkeypatch
):
    monkeypatch.setattr(varlen, "STRIP", 16)
    if not written_out:
        monkeypatch.setattr(varlen, "WRITTEN_OUT", 0)
    layout = layout_of(0, LAYOUT, 3)
    qkv, g = heads(layout, 4, 2, precision)
    mask = varlen_mask(*layout)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no other of a CPU
        varlen_attention(*qkv, mask).backward(g)
    pairs = sum(strip.allowed.numel() for strips in mask.strips for strip in strips)
    assert pairs < 0.9 * sum(D * n**2 for D, n in mask.groups)
    assert counter.get_total_flops() == 6 * 2 * 4 * 8 * pairs  # two products forward, four backward; 4 heads of 8


@given(seeds, rich_rows, st.integers(0, 9))
def test_documents_see_nothing_of_each_other_as_cutting_rows_by_documents_takes_for_granted(seed, rows, padding):
    document, image, hidden = layout_of(seed, rows, padding)
    apart = document[:, :, None] != document[:, None]
    assert not (dense_mask(document, image, hidden)[:, 0] & apart).any()


@given(seeds, rich_rows, st.integers(0, 9))
def test_every_real_position_has_one_place_and_little_is_filled_up(seed, rows, padding):
    layout = layout_of(seed, rows, padding)
    mask, real = varlen_mask(*layout), layout[0].flatten() >= 0
    assert mask.at[mask.place[real]].tolist() == real.nonzero()[:, 0].tolist()
    assert (mask.place[~real] == len(mask.at)).all()
    assert len(mask.at) == sum(D * n for D, n in mask.groups) <= real.sum() / FULL + 1


@given(seeds, rich_rows, st.booleans())
def test_strips_hold_each_query_once_and_all_that_it_sees(seed, rows, full):
    layout = layout_of(seed, rows)
    with patch.object(varlen, "STRIP", 16):
        mask = varlen_mask(*layout, full)
    seen, real = dense_mask(*layout, full).sum(-1).flatten(), layout[0].flatten() >= 0
    for (_, n), strips in zip(mask.groups, mask.strips, strict=True):
        assert [i for s in strips for i in range(n)[s.queries]] == list(range(n))
        assert all(s.allowed.any(0).any(1)[0, -1] and s.keys.start == 0 for s in strips), "no key more than is seen"
    of_places = torch.cat(
        [seen[:0], *(torch.cat([s.allowed.sum(-1)[:, 0] for s in x], 1).flatten() for x in mask.strips)]
    )
    assert torch.equal(of_places[mask.place[real]], seen[real])


def test_rows_of_padding_alone_come_out_as_zeros():
    none = torch.full((2, 5), -1, dtype=torch.int32)
    mask = varlen_mask(none, none, none > 0)
    assert not mask.groups
    q = torch.randn(2, 1, 5, 8)
    assert torch.equal(varlen_attention(q, q, q, mask), torch.zeros_like(q))
