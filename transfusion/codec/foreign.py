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

KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
PROBE = 128  # pixels a side of the image that tells factor and channels: a cell of the largest factor that there is


def diffusers_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec of a folder or a hub name; the latents are its mode, as they leave its encoder."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"diffusers:{name} needs diffusers installed: pip install diffusers") from None
    folder = Path(name).expanduser()
    subfolder = "vae" if (folder / "vae").is_dir() else ""
    local = str(folder) if folder.is_dir() else name
    try:
        config, _ = diffusers.AutoencoderKL.load_config(local, subfolder=subfolder, return_unused_kwargs=True)
        kind = config.get("_class_name", "that diffusers does not name")  # a codec of our own
        if kind not in KINDS:
            raise ValueError(
                f"diffusers:{name} is of the kind {kind}; known are {', '.join(KINDS)}, and a codec of train-codec goes "
                "by its folder alone"
            )
        model = getattr(diffusers, kind).from_pretrained(local, subfolder=subfolder or None)
    except OSError as error:
        raise ValueError(f"diffusers:{name} holds no autoencoder: {str(error).splitlines()[0]}") from None
    device = torch.device(device)
    model.eval().requires_grad_(False).to(device)
    with torch.no_grad():
        z = mode(model, to_tensor(np.zeros((1, PROBE, PROBE, 3), np.uint8), device))
    return Codec(
        f"diffusers:{name}",
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
