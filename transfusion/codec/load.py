"""From a name to a codec.

pixels                    no codec: the latents are the pixels
"""

import torch

from transfusion.codec.codec import PIXELS, Codec


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec of that name, its networks on `device`; ValueError says what is there instead."""
    if name == "pixels":
        return PIXELS
    raise ValueError(f"data.codec = {name!r}: there is no such codec; choose pixels")
