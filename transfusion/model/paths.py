"""Weights per path: text positions take the text path's, patches the image path's (MoT, arXiv 2411.04996).

    rows [B, L]      <bos> a cat <boi> # # # # <eoi> | a dog <boi> # # # # <eoi>
    text [M]         <bos> a cat <boi> <eoi> a dog <boi> <eoi>                          BOI and EOI are text
    patches [N]      # # # # # # # #

Which path a position takes is known from the layout alone, so nothing is routed by a learned gate. The trunk carries
two streams instead of one, a matrix each, and joins them into rows for attention, where text and patches see each
other. A weight without a twin of its own name with `image_` before it serves both paths. Matrices that read the same
stream, as wq, wk and wv, are asked together (`products`); how they multiply can be set (`multiply_by`).
"""

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.model.lora import PATHS, LoraConfig

TEXT, IMAGE = 0, 1  # a stream's number is its path


class Order:
    """Where the positions of rows [B, L] stand in the streams; without `patch_at` there is one stream, the rows."""

    def __init__(self, shape: tuple[int, int], patch_at: Tensor | None):
        self.shape, self.sorts = tuple(shape), patch_at is not None
        if patch_at is not None:
            S = shape[0] * shape[1]
            self.n_text = S - len(patch_at)
            is_patch = torch.zeros(S, dtype=torch.bool, device=patch_at.device).index_fill(0, patch_at, True)
            self.at = is_patch.argsort(stable=True)  # [S] the position of each place: text first, each in its order
            self.place = self.at.argsort()  # [S] the inverse

    def split(self, rows: Tensor) -> list[Tensor]:
        """The streams of rows [B, L, ...]: [rows], or [text [M, ...], patches [N, ...]]."""
        if not self.sorts:
            return [rows]
        rows = rows.flatten(0, 1)
        # a copy to places, not a gather from them: its derivative is a gather, that of a gather a sum
        return list(torch.empty_like(rows).index_copy_(0, self.place, rows).tensor_split([self.n_text]))

    def join(self, streams: list[Tensor]) -> Tensor:
        """Rows [B, L, ...] of the streams: the inverse of `split`."""
        if not self.sorts:
            return streams[0]
        joined = torch.cat(list(streams))
        return torch.empty_like(joined).index_copy_(0, self.at, joined).unflatten(0, self.shape)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [..., n_out] of x [..., n_in], W [n_out, n_in]."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]:
        # one row: F.linear repacks W at each call, a loop of the graph's own reads it as it is, at least twice as fast
        return (x.float().unsqueeze(-2) * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


def plain(x: Tensor, weights: Seq[Tensor]) -> list[Tensor]:
    """x W^T [..., n_out] of x [..., n_in] by each of the weights [n_out, n_in]."""
    return [linear(x, w) for w in weights]


class Linear(nn.Module):
    """y = W x, plus alpha / r B A x where the path has an adapter; W, A and B are those of the path."""

    def __init__(self, n_in: int, n_out: int, separate: bool = False, lora: LoraConfig | None = None):
        super().__init__()
        self.weight = parameter(n_out, n_in)
        self.image_weight = parameter(n_out, n_in) if separate else None
        self.product: Callable[[Tensor, Seq[Tensor]], Seq[Tensor]] = plain  # or float8's (`multiply_by`)
        self.stacked: tuple[Tensor, Tensor] | None = None  # of each path: W, then others' (`stack`)
        self.scale = lora.alpha / lora.r if lora else 0.0
        for path, prefix in zip(PATHS, ("", "image_")):
            adapted = lora is not None and path in lora.paths
            self.register_parameter(f"{prefix}lora_A", parameter(lora.r, n_in) if adapted else None)
            self.register_parameter(f"{prefix}lora_B", parameter(n_out, lora.r) if adapted else None)

    def forward(self, x: Tensor, path: int) -> Tensor:
        """[..., n_out] of a stream [..., n_in]."""
        weight = self.own(path)
        if weight.dtype == torch.bfloat16:  # an engine's; in training autocast chooses
            x = x.to(weight.dtype)
        (y,) = self.product(x, (weight,))
        return self.adapted(y, x, path)

    def own(self, path: int) -> Tensor:
        """The weight [n_out, n_in] of the path."""
        return self.image_weight if path == IMAGE and self.image_weight is not None else self.weight

    def adapted(self, y: Tensor, x: Tensor, path: int) -> Tensor:
        """y = W x with what the path's adapter, if it has one, adds to it."""
        A, B = (self.image_lora_A, self.image_lora_B) if path == IMAGE else (self.lora_A, self.lora_B)
        return y if A is None else y + self.scale * linear(linear(x, A), B)


def products(linears: Seq[Linear], x: Tensor, path: int) -> Seq[Tensor]:
    """[..., n_out] by each of the matrices of the same stream x [..., n_in]; one product where they are stacked."""
    first, device = linears[0], x.device.type
    if first.stacked is not None:
        y = linear(x.to(first.stacked[path].dtype), first.stacked[path])
        return y.split([len(w.weight) for w in linears], -1)
    # cast once, not for each; in an engine the weights' type says to what
    x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.weight.dtype)
    of_weights = first.product(x, [w.own(path) for w in linears])
    return [w.adapted(y, x, path) for w, y in zip(linears, of_weights)]


def multiply_by(layers: nn.Module, product: Callable[[Tensor, Seq[Tensor]], Seq[Tensor]]):
    """Lets every matrix of the layers multiply as `product` does, in place of `plain`."""
    for module in layers.modules():
        if isinstance(module, Linear):
            assert module.stacked is None, "stacked matrices are to sample with, by products of their own"
            module.product = product


def stack(linears: Seq[Linear]):
    """Puts the weights of matrices that read the same stream into one piece a path, of which they become views.

    To sample with: a few rows are through all of them as soon as through one. With adapters they stay apart.
    """
    if any(is_adapter(name) for w in linears for name, _ in w.named_parameters()):
        return
    pieces = []
    for name in ("weight", "image_weight")[: 1 + (linears[0].image_weight is not None)]:
        weights = [getattr(w, name).detach() for w in linears]
        pieces.append(torch.cat(weights))
        for w, part in zip(linears, pieces[-1].split([len(x) for x in weights])):
            setattr(w, name, nn.Parameter(part, requires_grad=False))
    linears[0].stacked = (pieces[0], pieces[-1])


class Norm(nn.Module):
    """RMSNorm with the path's weight."""

    def __init__(self, dim: int, eps: float, separate: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = parameter(dim)
        self.image_weight = parameter(dim) if separate else None

    def forward(self, x: Tensor, path: int) -> Tensor:
        own = path == IMAGE and self.image_weight is not None
        weight = self.image_weight if own else self.weight
        weight = weight.to(torch.promote_types(weight.dtype, x.dtype))  # ranks gather it in bfloat16; torch's kernel
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)  # wants one type


def text_twin(name: str) -> str | None:
    """The name of the text path's weight that a weight of the image path stands beside; None for all others."""
    twin = re.sub(r"(^|\.)image_(?=(weight|lora_A|lora_B)$)", r"\1", name)
    return twin if twin != name else None


def is_adapter(name: str) -> bool:
    """Whether a parameter is a matrix of an adapter."""
    return name.endswith(("lora_A", "lora_B"))
