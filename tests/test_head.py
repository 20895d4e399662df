"""The head: summed cross-entropy and its gradients are those of all logits at once, however many are held."""

import pytest
import torch
import torch.nn.functional as F

from transfusion.model import head
from transfusion.model.head import linear_cross_entropy


def written_out(h, weight, target, z_loss):
    logits = F.linear(h, weight).float()
    return F.cross_entropy(logits, target, reduction="sum") + z_loss * logits.logsumexp(-1).square().sum()


def inputs(dtype=torch.float32, m=7, v=11, d=5):
    torch.manual_seed(0)
    h, weight = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((m, d), (v, d)))
    return h, weight, torch.randint(v, (m,))


@pytest.mark.parametrize("logits", [1, 11, 33, 1 << 24])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_add_up_to_the_loss_and_the_gradients_of_all_logits(logits, z_loss, monkeypatch):
    monkeypatch.setattr(head, "LOGITS", logits)
    h, weight, target = inputs()
    loss, wanted = (f(h, weight, target, z_loss) for f in (linear_cross_entropy, written_out))
    torch.testing.assert_close(loss, wanted)
    found, gradients = (torch.autograd.grad(x / 3, (h, weight)) for x in (loss, wanted))
    torch.testing.assert_close(found, gradients)


def test_no_more_logits_are_held_than_are_allowed(monkeypatch):
    monkeypatch.setattr(head, "LOGITS", 22)
    seen, log_softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda x, *a, **k: seen.append(tuple(x.shape)) or log_softmax(x, *a, **k))
    linear_cross_entropy(*inputs())
    assert seen == [(2, 11)] * 3 + [(1, 11)]


def test_under_autocast_products_are_in_bf16_and_gradients_in_the_types_of_what_they_are_of():
    h, weight, target = inputs(m=40, v=64, d=32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, wanted = (f(h, weight, target, 0.1) for f in (linear_cross_entropy, written_out))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    found, gradients = (torch.autograd.grad(x, (h, weight)) for x in (loss, wanted))
    for a, b in zip(found, gradients):
        assert a.dtype == b.dtype == torch.float32 and a.abs().sum() > 0
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_what_needs_no_gradient_gets_none():
    h, weight, target = inputs()
    wanted = torch.autograd.grad(written_out(h, weight, target, 0.0), (h, weight))
    for frozen, other, gradient in ((weight, h, wanted[0]), (h, weight, wanted[1])):
        frozen.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(h, weight, target), other)[0], gradient)
        frozen.requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, weight, target), written_out(h, weight, target, 0.0))


def test_no_targets_lose_nothing():
    h, weight, target = inputs(m=0)
    loss = linear_cross_entropy(h, weight, target)
    loss.backward()
    assert loss == 0 and not weight.grad.any()


def test_a_second_way_back_is_refused():
    loss = linear_cross_entropy(*inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second way back"):
        loss.backward()
