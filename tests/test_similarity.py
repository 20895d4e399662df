"""PSNR, SSIM and the Frechet distance against their formulas written out, and what they say of equal images."""

import math

import numpy as np
import pytest
import torch

from transfusion.evals.frechet import frechet_distance
from transfusion.evals.similarity import psnr, ssim


def pair(n=2, height=14, width=17) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (n, height, width, 3), np.uint8)
    noise = rng.integers(-40, 40, a.shape)
    return a, (a + noise).clip(0, 255).astype(np.uint8)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one image [H, W, 3]: every window of every colour by its sums."""
    line = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weights = np.outer(line, line)
    weights /= weights.sum()
    found = []
    for c in range(3):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x, y = (image[i : i + 11, j : j + 11, c].astype(float) for image in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                vxy = (weights * (x - mx) * (y - my)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                found.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_ssim_is_that_of_every_window_written_out():
    a, b = pair()
    np.testing.assert_allclose(ssim(a, b), [slow_ssim(x, y) for x, y in zip(a, b)], rtol=1e-9)


def test_equal_images_are_as_alike_as_can_be_and_inverted_ones_are_not():
    a, b = pair()
    assert ssim(a, a) == pytest.approx(1.0) and (ssim(a, b) < 1).all() and (ssim(a, 255 - a) < 0).all()
    assert (psnr(a, a) > psnr(a, b)).all()


def test_psnr_is_its_formula():
    a, b = pair()
    for x, y, found in zip(a.tolist(), b.tolist(), psnr(a, b)):
        errors = [(p - q) ** 2 for r, s in zip(x, y) for u, v in zip(r, s) for p, q in zip(u, v)]
        assert found == pytest.approx(10 * math.log10(255**2 / (sum(errors) / len(errors))))


def test_images_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="smaller than the windows"):
        ssim(*pair(1, 10, 20))


# ---- Frechet ----


def slow_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """By the covariances and the eigenvalues of their product."""
    means, covariances = [x.mean(0) for x in (a, b)], [torch.cov(x.T) for x in (a, b)]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    apart = (means[0] - means[1]).square().sum()
    return (apart + covariances[0].trace() + covariances[1].trace() - 2 * root).item()


@pytest.mark.parametrize("n", [3, 40])
def test_the_frechet_distance_is_that_of_the_covariances(n):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, generator=g, dtype=torch.float64) @ torch.randn(5, 5, generator=g).double() for _ in "ab")
    assert frechet_distance(a, b + 1) == pytest.approx(slow_frechet(a, b + 1), rel=1e-5)


def test_a_set_is_at_no_distance_from_itself_and_a_shift_is_its_square():
    a = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-5)
