"""What a codec keeps of images: each split's originals against what comes back through the latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from transfusion.codec.codec import Codec
from transfusion.data.crops import Crops
from transfusion.evals.chosen import pass_over
from transfusion.evals.features import efficientnet
from transfusion.evals.frechet import frechet_distance
from transfusion.evals.similarity import psnr, ssim
from transfusion.sheet import contact_sheet

ON_SHEET = 24


@dataclass(frozen=True)
class CodecEvalConfig:
    """What is looked at."""

    n_images: int = 500  # of each split, spread evenly over it
    features: str = ""  # EfficientNet-Lite0 weights for FD-EffNet: a path, or "installed"; "" = none
    sheets: str = ""  # folder for sheets of originals beside reconstructions; "" = none

    def __post_init__(self):
        if self.n_images < 2:
            raise ValueError(f"n_images = {self.n_images}: give at least 2 images of each split to look at")


def evaluate_codec(codec: Codec, crops: Crops, config: CodecEvalConfig, device: str = "cpu") -> dict[str, float]:
    """All numbers by reconstruction/split/name."""
    return {f"reconstruction/{name}": value for name, value in numbers(codec, crops, config, device)}


def numbers(codec: Codec, crops: Crops, config: CodecEvalConfig, device: str) -> Iterator[tuple[str, float]]:
    """(split/name, value) of each split."""
    features = efficientnet(config.features, device) if config.features else None
    for split in crops.splits:
        originals = crops.centres(split, config.n_images)
        wanted = min(config.n_images, len(crops.splits[split]))
        pass_over(wanted - len(originals), wanted, f"images of {split}", "they cannot be read")
        if not len(originals):
            continue
        latents = codec.encode(originals)
        made = codec.decode(latents)
        yield f"{split}/n", len(originals)
        yield f"{split}/psnr", float(psnr(originals, made).mean())
        yield f"{split}/ssim", float(ssim(originals, made).mean())
        yield f"{split}/l1", float(np.abs(originals.astype(np.float32) - made).mean() / 127.5)  # as in training
        if features and len(originals) > 1:
            yield f"{split}/fd_effnet", frechet_distance(features(originals), features(made))
        if codec.codes:
            use = torch.bincount(torch.from_numpy(codec.quantize(latents)).flatten(), minlength=codec.codes)
            p = use / use.sum()
            yield f"{split}/codes_used", (use > 0).float().mean().item()
            yield f"{split}/perplexity", torch.special.entr(p).sum().exp().item()
        else:
            spread = latents.std((0, 2, 3))
            yield f"{split}/latent_std", float(spread.mean())
            yield f"{split}/latent_std_low", float(spread.min())
            yield f"{split}/latent_std_high", float(spread.max())
        if config.sheets:
            path = Path(config.sheets) / f"reconstructed_{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            chosen = np.linspace(0, len(originals) - 1, min(ON_SHEET, len(originals))).round().astype(int)
            items = [("", [originals[i], made[i]]) for i in chosen]
            contact_sheet(items, columns=6, title=f"{split}: original, through {codec.name}").save(path)
