"""What an autoencoder learns by (Zhou et al. 2024, section 4.1; Esser et al. 2021), and the gradients of a step.

    L = L1 + d_1 + 0.2 d_2 + 0.5 b L_GAN + 1e-6 L_KL        or the cost of the codebook in place of the KL
    L_GAN = -mean D(reconstruction), from step `gan_start`;  D itself minimises the hinge loss
    b = |grad (L1 + d_1 + 0.2 d_2)| / |grad L_GAN|,       gradients by the weights of the decoder's last layer

d are perceptual distances. b, of Esser et al., keeps the discriminator's say at half of the rest's, whatever the scale
of its logits. All gradients meet at the reconstruction and go back through the autoencoder once, together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfusion.codec.autoencoder import Autoencoder, CodecConfig, build_autoencoder
from transfusion.codec.bottleneck import Latent
from transfusion.codec.discriminator import Discriminator, DiscriminatorConfig, hinge
from transfusion.codec.perceptual import Distance, build_perceptual


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; the defaults are the paper's."""

    perceptual: str = ""  # a network of codec/perceptual.py; "" = none
    perceptual_weight: float = 1.0
    second: str = ""  # another one; the paper's is a MoCo v2 network
    second_weight: float = 0.2
    gan_weight: float = 0.5  # 0 = no discriminator
    gan_start: int = 50_000  # step
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0  # of the whole cost of the codebook

    def __post_init__(self):
        for name in ("perceptual_weight", "second_weight", "gan_weight", "gan_start", "kl_weight", "codebook_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")


class Networks(nn.Module):
    """What is trained: an autoencoder and, where it is asked for, its discriminator."""

    def __init__(
        self,
        codec: CodecConfig,
        loss: LossConfig,
        discriminator: DiscriminatorConfig,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        with torch.device(device):
            self.autoencoder = build_autoencoder(codec, device)
            self.discriminator = Discriminator(discriminator) if loss.gan_weight else None


class Terms(NamedTuple):
    """The unweighted terms of a step, each []."""

    l1: Tensor
    perceptual: Tensor
    second: Tensor
    bottleneck: Tensor
    fooled: Tensor  # mean logit of reconstructions
    hinge: Tensor


def build_distances(config: LossConfig, device: torch.device | str) -> list[tuple[float, Distance]]:
    """(weight, distance) of both perceptual networks, of weight 0 where there is none."""
    none = lambda a, b: a.new_zeros(())  # noqa: E731
    pairs = ((config.perceptual, config.perceptual_weight), (config.second, config.second_weight))
    return [(weight, build_perceptual(name, device)) if name else (0.0, none) for name, weight in pairs]


def gradients(
    networks: Networks,
    images: Tensor,
    eps: Tensor,
    distances: list[tuple[float, Distance]],
    config: LossConfig,
    step: int,
    autocast: Callable,
) -> tuple[Terms, Latent, Tensor]:
    """(terms, latents, bottleneck's input) of a batch [n, 3, H, W] in [-1, 1]; adds the gradients to the networks'."""
    ae, d = networks.autoencoder, networks.discriminator
    with autocast():
        vectors = ae.encode(images)
        latent = ae.quantize(vectors, eps)
        out = ae.decode(latent.z)
    seen = out.detach().float().requires_grad_()  # where the terms' gradients meet
    l1 = (seen - images).abs().mean()
    with autocast():
        far = [distance(seen, images) for _, distance in distances]
    (grad,) = torch.autograd.grad(l1 + sum(w * x for (w, _), x in zip(distances, far)), seen)
    fooled = worst = l1.new_zeros(())
    if d is not None and step >= config.gan_start:
        with autocast():
            fake, real = d(seen).float(), d(images).float()
        fooled, worst = fake.mean(), hinge(real, fake)
        (up,) = torch.autograd.grad(-fooled, seen, retain_graph=True)
        rest, gan = (norm_at(ae.decoder.conv_out.weight, out, g) for g in (grad, up))
        grad = grad + config.gan_weight * rest / gan.clamp(min=1e-8) * up
        worst.backward(inputs=list(d.parameters()))
    weight = config.kl_weight if latent.codes is None else config.codebook_weight
    torch.autograd.backward([out, weight * latent.cost], [grad.to(out.dtype), None])
    terms = Terms(l1, *far, latent.cost, fooled, worst)
    return Terms(*(x.detach() for x in terms)), latent, vectors.detach()


def norm_at(weight: Tensor, out: Tensor, grad: Tensor) -> Tensor:
    """The norm of the gradient that reaches the weight from `grad` at the output."""
    return torch.autograd.grad(out, weight, grad.to(out.dtype), retain_graph=True)[0].norm()


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """[n, 3, H, W] in [-1, 1], through the latents of use."""
    return autoencoder.decode(autoencoder.latents(images).z).clamp(-1, 1)
