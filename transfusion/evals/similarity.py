"""How alike two images are, pixel by pixel and window by window.

psnr    10 log10 255^2 / mean (a - b)^2                                                       infinite for equal ones
ssim    (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))            Wang et al. 2004

m, s^2, s_ab: mean, variance, covariance under a Gaussian window of 11 x 11, deviation 1.5; c1 = 2.55^2, c2 = 7.65^2;
averaged over the windows that lie inside the image, and over the three colours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, DEVIATION = 11, 1.5
AT_ONCE = 16  # images, to bound the memory


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] decibels between images [n, H, W, 3] uint8, at most those of a single byte that is off by one."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1 / a[0].size))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] in [-1, 1] between images [n, H, W, 3] uint8, of at least 11 pixels a side; 1 for equal ones."""
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"images of {a.shape[1]} x {a.shape[2]} pixels are smaller than the windows of ssim, {WINDOW}")
    if len(a) > AT_ONCE:
        return np.concatenate([ssim(a[i : i + AT_ONCE], b[i : i + AT_ONCE]) for i in range(0, len(a), AT_ONCE)])
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2).double() for images in (a, b))
    mx, my = blurred(x), blurred(y)
    vx, vy, vxy = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return found.mean((1, 2, 3)).numpy()


def blurred(images: Tensor) -> Tensor:
    """[n, 3, H - 10, W - 10] the weighted mean of each window inside [n, 3, H, W]."""
    places = torch.arange(WINDOW, dtype=images.dtype) - WINDOW // 2
    weights = torch.exp(-0.5 * (places / DEVIATION) ** 2)
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)  # one row of weights a colour
    rows = F.conv2d(images, weights[:, :, :, None], groups=images.shape[1])
    return F.conv2d(rows, weights[:, :, None], groups=images.shape[1])
