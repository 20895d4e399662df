"""A convolutional read-out behind the linear one: it looks across the borders of patches, and closer than they do.

    p' = p + W_out * x_2,    x_0 = silu(W_in * p + W_t sinusoid(1000 t)),    x_i = x_(i-1) + silu(W_i * x_(i-1))

where * is a 3 x 3 convolution of the images that the patches form, at half their resolution and with four times their
channels (space to depth), so that few channels do. A linear read-out makes P numbers of D: where P is the larger it
leaves speckle on what should be flat, as D patterns as wide as a patch never quite cancel. It does not see the noisy
image, unlike DiP's patch detailer head (arXiv 2511.18822): where it did, the transformer looked less closely at images,
and captioned them worse (docs/log.md, 2026-11-23).
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from transfusion.model.fold import Grids, each_size, fold, join, unfold
from transfusion.model.patches import N_FREQUENCIES, sinusoid

FACTOR = 2  # of space to depth: FACTOR x FACTOR latents become one place with FACTOR^2 times the channels


class Refine(nn.Module):
    """What to add to the predictions of patches of `patch_size` x `patch_size` latents."""

    def __init__(self, patch_dim: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        channels = patch_dim * FACTOR**2 // patch_size**2
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(2 * N_FREQUENCIES, width)

    def forward(self, p: Tensor, t: Tensor, grids: Grids) -> Tensor:
        """[N, P] from predictions p [N, P] of patches in raster order; t [I], grids [I]: (rows, columns) of images."""
        return join([self.of_one_size(part, t[at], grid) for grid, at, part in each_size(p, grids)], grids)

    def of_one_size(self, p: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        time = self.time(sinusoid(1000 * t, N_FREQUENCIES).to(self.time.weight.dtype))  # [I, width]
        x = silu(self.conv_in(fold(p, grid, self.patch_size, FACTOR)) + time[:, :, None, None])
        for conv in self.convs:
            x = x + silu(conv(x))
        return unfold(self.conv_out(x), grid, self.patch_size, FACTOR)

    def init_weights(self):
        for layer in (self.conv_in, *self.convs, self.time):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv_out.weight)  # starts by adding nothing
        nn.init.zeros_(self.conv_out.bias)
