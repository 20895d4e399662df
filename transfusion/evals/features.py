"""Image features that notice what people notice: EfficientNet-Lite0's last feature map, averaged over the image.

f(image) = mean over places of extract_features((x - 127) / 128)        x in 0 .. 255 at 224 x 224; 1280 numbers
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from transfusion.codec.perceptual import load_efficientnet

SIDE = 224  # pixels, what the network was trained on
BATCH = 32


def efficientnet(weights: str, device: torch.device | str = "cpu") -> Callable[[np.ndarray], torch.Tensor]:
    """Images uint8 [n, S, S, 3] -> features float32 [n, 1280], of weights in a file or "installed" as a package."""
    net = load_efficientnet(weights, device)

    @torch.inference_mode()
    def features(images: np.ndarray) -> torch.Tensor:
        """[n, 1280] float32 on the CPU, of uint8 [n, S, S, 3]."""
        found = []
        for part in np.split(images, range(BATCH, len(images), BATCH)):
            x = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float()  # [n, 3, S, S]
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
            found.append(net.extract_features((x - 127) / 128).mean((2, 3)).float().cpu())
        return torch.cat(found)

    return features
