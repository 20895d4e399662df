"""Autoencoders that others published, through diffusers: AutoencoderKL, AutoencoderDC, AutoencoderTiny.

diffusers:FOLDER      config.json and weights as diffusers saves them, or a whole pipeline's folder with its vae/
diffusers:OWNER/NAME  config.json and weights from the Hugging Face hub
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from transfusion.codec.codec import Codec
from transfusion.codec.learned import by_parts, digest, tensor, to_bytes, to_tensor

DIFFUSERS = "diffusers:"
KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
PROBE = 128  # pixels a side of the image that tells factor and channels: a cell of the largest factor that there is


def local_folder(name: str) -> Path | None:
    """Where config.json and weights of diffusers:FOLDER lie, in its vae/ if it has one; None of any other name."""
    folder = Path(name.removeprefix(DIFFUSERS)).expanduser()
    if not name.startswith(DIFFUSERS) or not folder.is_dir():
        return None
    return folder / "vae" if (folder / "vae").is_dir() else folder


def diffusers_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec of a name that begins with "diffusers:"; the latents are its mode, as they leave its encoder."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"{name} needs diffusers installed: pip install diffusers") from None
    local = str(local_folder(name) or name.removeprefix(DIFFUSERS))
    try:
        config, _ = diffusers.AutoencoderKL.load_config(local, return_unused_kwargs=True)
        kind = config.get("_class_name", "that diffusers does not name")  # a codec of our own
        if kind not in KINDS:
            raise ValueError(
                f"{name} is of the kind {kind}; known are {', '.join(KINDS)}, and a codec of train-codec goes "
                "by its folder alone"
            )
        model = getattr(diffusers, kind).from_pretrained(local)
    except OSError as error:
        raise ValueError(f"{name} holds no autoencoder: {str(error).splitlines()[0]}") from None
    device = torch.device(device)
    model.eval().requires_grad_(False).to(device)
    with torch.no_grad():
        z = mode(model, to_tensor(np.zeros((1, PROBE, PROBE, 3), np.uint8), device))
    return Codec(
        name,
        channels=z.shape[1],
        factor=PROBE // z.shape[2],
        limit=None,
        encode=by_parts(lambda images: mode(model, to_tensor(images, device))),
        decode=by_parts(lambda z: to_bytes(model.decode(tensor(z, device)).sample)),
        key=digest(model),
    )


def mode(model: nn.Module, images: Tensor) -> Tensor:
    """[n, C, h, w] the likeliest latents: the mean where the encoder gives a distribution."""
    out = model.encode(images)
    for name in ("latent", "latents"):  # DC's, Tiny's
        if hasattr(out, name):
            return getattr(out, name)
    return out.latent_dist.mode()
