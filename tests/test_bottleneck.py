"""The bottlenecks: the KL of torch's own distributions, the nearest code by a slow search, codes that come back."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from transfusion.codec.bottleneck import COMMITMENT, MEMORY, Codebook, Gaussian


def vectors(n=3, dim=4, side=5, seed=0) -> torch.Tensor:
    return torch.randn(n, dim, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_cost_of_a_gaussian_is_its_divergence_from_the_standard_normal():
    moments = vectors(dim=6)
    mean, logvar = moments.chunk(2, 1)
    latent = Gaussian()(moments)
    wanted = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(latent.cost, wanted)
    torch.testing.assert_close(latent.z, mean, rtol=0, atol=0)
    eps = vectors(dim=3, seed=1)
    torch.testing.assert_close(Gaussian()(moments, eps).z, mean + eps * (0.5 * logvar).exp())


def test_the_chosen_code_is_the_nearest_on_the_sphere_and_its_cost_the_squared_distance():
    torch.manual_seed(0)
    book, e = Codebook(11, 4), vectors()
    latent = book(e)
    on_sphere, codes = F.normalize(e, dim=1), F.normalize(book.embedding.weight.detach(), dim=1)
    total = 0.0
    for n, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(5)).tolist():
        distances = [(on_sphere[n, :, i, j] - code).square().sum().item() for code in codes]
        nearest = min(range(11), key=distances.__getitem__)
        assert latent.codes[n, i, j] == nearest
        torch.testing.assert_close(latent.z[n, :, i, j].detach(), codes[nearest])
        total += distances[nearest]
    assert latent.cost.item() == pytest.approx((1 + COMMITMENT) * total / 75, rel=1e-4)
    torch.testing.assert_close(book.lookup(latent.codes).detach(), latent.z.detach())


def test_codes_come_back_as_themselves():
    torch.manual_seed(0)
    book, codes = Codebook(50, 8), torch.arange(50).view(2, 5, 5)
    assert torch.equal(book(3.0 * book.lookup(codes)).codes, codes)  # lengths do not matter


def test_gradients_pass_straight_through_to_the_vectors_and_the_codebook_learns_by_its_cost_alone():
    torch.manual_seed(0)
    book, e = Codebook(7, 4), vectors().requires_grad_()
    along = vectors(seed=2)
    latent = book(e)
    (grad,) = torch.autograd.grad((latent.z * along).sum(), e, retain_graph=True)
    wanted = torch.autograd.grad((F.normalize(e, dim=1) * along).sum(), e)[0]
    torch.testing.assert_close(grad, wanted)
    assert torch.autograd.grad(book(e).z.sum(), book.embedding.weight, allow_unused=True) == (None,)
    by_book, by_vectors = torch.autograd.grad(latent.cost, [book.embedding.weight, e])
    assert by_book.any() and by_vectors.any()


def test_codes_that_are_never_met_become_vectors_of_the_batch_and_used_ones_stay():
    torch.manual_seed(0)
    book = Codebook(6, 4)
    book.use.fill_(1.0)
    before = book.embedding.weight.detach().clone()
    met = torch.tensor([0, 1, 2]).repeat(9)[:25].repeat(3, 1).view(3, 5, 5)
    e = vectors()
    revived = 0
    while not revived:  # the memory of their use fades
        revived = book.revive(e, met, torch.Generator().manual_seed(3))
    assert revived == 3 and torch.equal(book.embedding.weight[:3], before[:3])
    flat = F.normalize(e, dim=1).movedim(1, -1).reshape(-1, 4)
    for code in book.embedding.weight[3:].detach():
        assert (flat - code).abs().sum(1).min() < 1e-6
    assert len({tuple(code.tolist()) for code in book.embedding.weight[3:]}) == 3
    assert book.use[:3].min() > MEMORY and (book.use[3:] == 1).all()  # a new code has time to be met


def test_which_vectors_become_codes_is_a_function_of_the_generator():
    books = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        book = Codebook(6, 4)
        book.use.fill_(0.01)
        book.revive(vectors(), torch.zeros(3, 5, 5, dtype=torch.long), torch.Generator().manual_seed(seed))
        books.append(book.embedding.weight.detach())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_fewer_vectors_than_dead_codes_revive_as_many_as_there_are():
    book = Codebook(100, 4)
    book.use.fill_(0.0)
    assert book.revive(vectors(1, 4, 2), torch.zeros(1, 2, 2, dtype=torch.long), torch.Generator()) == 4
