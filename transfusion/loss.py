"""What joins the model and the diffusion in training: noise a batch, ask the model, compare.

    L = L_LM + lambda * L_diffusion                                              (Zhou et al. 2024, equation 4)
    L_LM         mean of the cross-entropy over all text targets of the step
    L_diffusion  mean over the numbers of an image, then over all images of the step that are not given (t_max = 0)

Both come back as sums with counts, so that micro-batches and ranks add up to the step's own mean.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion.context import Context
from transfusion.diffusion.objective import DiffusionConfig, add_noise, loss_weight, network_input, sample_t, target
from transfusion.diffusion.schedule import SCHEDULES
from transfusion.model.head import linear_cross_entropy
from transfusion.model.transformer import Mask, Transfusion, row_mask
from transfusion.sequence import Batch


class Noise(NamedTuple):
    t: Tensor  # [I] noise level of each image
    eps: Tensor  # [N, P] standard normal


def draw_noise(batch: Batch, config: DiffusionConfig, seed: int, step: int) -> Noise:
    """The noise of a batch of step `step`: of each row a function of (seed, step, the row's number in the step)."""
    device = batch.patches.device
    generator = torch.Generator(device)
    u, eps = [torch.zeros(0, device=device)], [batch.patches.new_zeros(0, batch.patches.shape[1])]
    grids = iter(batch.grids)
    for row, images in enumerate(batch.images_in_row, batch.first_row):
        if images:
            patches = sum(rows * columns for rows, columns in islice(grids, images))
            generator.manual_seed(int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0] >> 1))
            u.append(torch.rand(images, generator=generator, device=device))
            eps.append(torch.randn(patches, batch.patches.shape[1], generator=generator, device=device))
    u = torch.cat(u)
    # The law puts noise where captions decide. An image that is read instead stays close to the clean ones of use.
    t = torch.where(batch.t_max < 1, u, sample_t(u, config.t_law, config.t_shift, config.t_mean, config.t_std))
    return Noise(t * batch.t_max, torch.cat(eps))


def levels(batch: Batch, noise: Noise, config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), [N, 1] each, of every patch."""
    alpha, sigma = SCHEDULES[config.schedule](noise.t)
    return alpha[batch.patch_image, None], sigma[batch.patch_image, None]


def noised(batch: Batch, noise: Noise, config: DiffusionConfig) -> Tensor:
    """[N, P] the batch's patches behind their noise, as the model reads them."""
    alpha, sigma = levels(batch, noise, config)
    return network_input(add_noise(batch.patches, noise.eps, alpha, sigma), alpha, sigma, config.data_variance)


class Losses(NamedTuple):
    lm: Tensor  # [] sum over text targets, nats, z-loss included
    image: Tensor  # [] sum over images of the mean squared error in the loss space


def image_errors(prediction: Tensor, batch: Batch, noise: Noise, config: DiffusionConfig) -> Tensor:
    """[I] weighted mean squared error of each image, 0 of a given one."""
    if not len(batch.grids):
        return prediction.float().sum(1)  # [0]: such a batch does not know P
    alpha, sigma = levels(batch, noise, config)
    wanted = target(config.prediction, batch.patches, noise.eps, alpha, sigma)
    weight = loss_weight(config.prediction, config.loss_space, alpha, sigma, config.det_floor)
    error = (weight * (prediction.float() - wanted).square()).mean(1)  # [N]
    n = torch.zeros_like(noise.t).index_add(0, batch.patch_image, torch.ones_like(error))  # patches of each image
    return torch.zeros_like(noise.t).index_add(0, batch.patch_image, error) / n * (batch.t_max > 0)


def losses(
    model: Transfusion,
    batch: Batch,
    noise: Noise,
    config: DiffusionConfig,
    z_loss: float = 0.0,
    context: Context | None = None,
    mask_of: Callable[[Batch, Transfusion], Mask | None] | None = None,
) -> Losses:
    """Summed losses of a batch; divide by `n_targets` and `n_images` of the whole step.

    With a context, of this rank's part of the targets and images; the model runs as far as its part of the positions.
    The mask is found by `mask_of` in place of `row_mask` (a plan has one of a batch without numbers).
    """
    z, L = noised(batch, noise, config), batch.tokens.shape[1]
    part = slice(context.rank, None, context.size) if context else slice(None)
    mask = mask_of(batch, model) if mask_of else row_mask(batch, model, context.mine(L) if context else None)

    def head(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, model.output.weight, batch.target[part], z_loss)

    lm, prediction = model(
        batch.tokens,
        batch.place,
        mask,
        z,
        noise.t,
        batch.patch_image,
        batch.grids,
        batch.patch_at,
        batch.text_at[part],
        trunk=context.trunk(model) if context else None,
        head=head,
    )
    return Losses(lm, image_errors(prediction, batch, noise, config)[part].sum())
