"""A network as a codec: numpy in, numpy out, a few images at a time, nothing of it trained."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from transfusion.codec.autoencoder import Autoencoder
from transfusion.codec.codec import Codec, Encode

AT_ONCE = 16  # images in a call of a network


def learned_codec(name: str, model: Autoencoder) -> Codec:
    """The codec of an autoencoder, on the device where that lies."""
    c, device = model.config, device_of(model)
    codebook = {}
    if c.bottleneck == "vq":
        codebook = {
            "codes": c.codes,
            "quantize": by_parts(lambda z: model.quantize(tensor(z, device)).codes),
            "lookup": by_parts(lambda codes: model.quantize.lookup(tensor(codes, device))),
        }
    return Codec(
        name,
        channels=c.channels,
        factor=c.factor,
        limit=1.0 if c.bottleneck == "vq" else None,
        encode=by_parts(lambda images: model.latents(to_tensor(images, device)).z),
        decode=by_parts(lambda z: to_bytes(model.decode(tensor(z, device)))),
        key=digest(model),
        **codebook,
    )


def by_parts(function: Callable[[np.ndarray], Tensor]) -> Encode:
    """The function over arrays of any length."""

    @torch.no_grad()
    def apply(batch: np.ndarray) -> np.ndarray:
        parts = [batch[i : i + AT_ONCE] for i in range(0, max(1, len(batch)), AT_ONCE)]
        return np.concatenate([function(part).cpu().numpy() for part in parts])

    return apply


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """[n, 3, H, W] in [-1, 1] of uint8 [n, H, W, 3]."""
    return tensor(images, device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] of [n, 3, H, W] in [-1, 1]."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy, as arrays from images and files may not be written to, which torch warns of."""
    return torch.from_numpy(np.array(array)).to(device)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def digest(model: nn.Module) -> str:
    """A name of the model's weights that changes with any of them."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
