"""The contract: documents of text and images in, rows of positions out. Everything else is a function from or to this.

    document   [Text "a red apple", Image 2x2 patches, Text "<eos>"]
    tokens     <bos> a red apple <boi> # # # # <eoi> <eos>       # = <patch>, a filler that no loss ever names
    image       .    .  .    .     .   0 0 0 0   .     .         which image the position is a patch of (. = none, -1)
    target      a red apple <boi>  .   . . . . <eos>   .         next token, where it is to be learned (. = none, -1)

Loss masks (Zhou et al. 2024, section 3): no LM loss where the input is BOI or a patch, so EOI is never a target (the
decoder appends it); BOI is one. `lay_out` is the only place that writes a sequence, for training and for generation.
Three variants of an image:

    its size is written      <boi> <2> <3> # # # # # # <eoi>       rows and columns of patches; both are targets
    with a clean copy        <boi> # # # # = = = = <eoi>           # noised, seen by itself alone; = clean, seen later
    as codes (VQ tokens)     <boi> v v v v <eoi>                   causal tokens like text; every v is a target

Dimensions: B rows, L positions, I images, N patches of all images together, P numbers in a patch, C h w a latent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

IMAGE_POSITIONS = ("raster", "axial")
NONE = -1  # no image, no target, no document (padding)


def check_image_positions(name: str):
    if name not in IMAGE_POSITIONS:
        raise ValueError(f"image_positions = {name!r}: choose one of {', '.join(IMAGE_POSITIONS)}")


@dataclass(frozen=True)
class Special:
    """Token ids that are not text."""

    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    patch: int


@dataclass(frozen=True)
class Format:
    """What a sequence depends on besides its document.

    `image_positions`: "raster" numbers patches like text, one after the other; "axial" gives patch (row, column) of an
    image that starts at p the pair (p + row, p + column), and the text after it goes on behind the larger side.

    Behind the `text_tokens` ids of the tokenizer follow those of the sides 1 ... `sides`, then those of `codes` codes.
    """

    special: Special
    patch_size: int  # latent cells a side; 1 where images are codes
    image_positions: str = "raster"
    text_tokens: int = 0
    sides: int = 0  # the largest side, in patches, that can be written; 0 = sizes are not written
    codes: int = 0  # size of the codebook whose codes stand for images; 0 = images are patches

    def __post_init__(self):
        check_image_positions(self.image_positions)

    def side(self, n: int) -> int:
        """The token that says: n patches."""
        if not 1 <= n <= self.sides:
            raise ValueError(f"a side of {n} patches cannot be written: model.sides = {self.sides}, raise it")
        return self.text_tokens + n - 1

    @property
    def first_code(self) -> int:
        """The token of code 0."""
        return self.text_tokens + self.sides

    @property
    def vocab_size(self) -> int:
        return self.first_code + self.codes


@dataclass(frozen=True, eq=False)
class Text:
    """A stretch of token ids; without `learn` they are only read, never predicted in training."""

    ids: np.ndarray  # [n] int
    learn: bool = True


@dataclass(frozen=True, eq=False)
class Image:
    """An image as the codec's latents; its noise level in training is drawn below `t_max` (the noise limit).

    One with t_max 0 is given: clean, and without a loss. A `copy` lets what follows read the image clean.
    """

    latents: np.ndarray  # [C, h, w] float32
    t_max: float = 1.0
    copy: bool = False


@dataclass(frozen=True, eq=False)
class Codes:
    """An image as codes of the codec's codebook."""

    codes: np.ndarray  # [h, w] int
    learn: bool = True


Segment = Text | Image | Codes


@dataclass(frozen=True, eq=False)
class Sequence:
    """One document, position by position."""

    tokens: np.ndarray  # [n] int64
    image: np.ndarray  # [n] int64, number of the image within the document, or NONE
    hidden: np.ndarray  # [n] bool: a patch that is seen by its own image alone
    place: np.ndarray  # [n, 4] int64: two rotary coordinates (equal for text), and row and column within the image
    target: np.ndarray  # [n] int64, the token to predict here, or NONE
    patches: np.ndarray  # [N, P] float32, clean, in raster order
    grids: tuple[tuple[int, int], ...]  # [I] rows and columns of each image's patches
    t_max: np.ndarray  # [I] float32

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of L positions and, side by side, the N patches of their I images in the order of their positions."""

    tokens: Tensor  # [B, L] int64
    document: Tensor  # [B, L] int32, number of the document within its row, NONE for padding
    image: Tensor  # [B, L] int32, number of the image within the batch, or NONE
    hidden: Tensor  # [B, L] bool: a patch that is seen by its own image alone
    place: Tensor  # [B, L, 4] int32: two rotary coordinates, row and column within the image
    text_at: Tensor  # [M] int64, flat positions (of B * L) that have a target ...
    target: Tensor  # [M] int64, ... and the targets
    patch_at: Tensor  # [N] int64, flat positions of the patches
    patch_image: Tensor  # [N] int64, the image that each patch belongs to
    patches: Tensor  # [N, P] float32, clean
    t_max: Tensor  # [I] float32; 0 = given clean, without a loss
    first_row: int  # number of its first row within the step
    n_images: int  # images with a loss, on the host, as what follows
    images_in_row: tuple[int, ...]  # [B]
    grids: tuple[tuple[int, int], ...]  # [I] rows and columns of each image's patches
    lost: tuple[str, ...]  # documents that were to stand in it and could not be read: name, and why

    @property
    def n_targets(self) -> int:
        return self.target.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; the copies overlap the host's work where the memory is pinned."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in pinned.items() if isinstance(v, Tensor)})


def patchify(latents: np.ndarray, k: int) -> np.ndarray:
    """[N, P] patches of k x k latent cells, raster order, P = k * k * C with the channel last."""
    c, h, w = latents.shape
    if h % k or w % k:
        raise ValueError(f"an image of {h} x {w} latent cells does not divide into {k} x {k} patches: resize it")
    return latents.reshape(c, h // k, k, w // k, k).transpose(1, 3, 2, 4, 0).reshape(-1, k * k * c)


def unpatchify(patches: np.ndarray, k: int, h: int, w: int) -> np.ndarray:
    """[C, h, w] latents of [N, P] patches: the inverse of `patchify`."""
    c = patches.shape[1] // (k * k)
    return patches.reshape(h // k, w // k, k, k, c).transpose(4, 0, 2, 1, 3).reshape(c, h, w)


def lay_out(document: Iterable[Segment], fmt: Format, at: int = 0) -> Sequence:
    """The sequence of a document: text as it is, each image as `<boi> patches <eoi>`, or as codes between the two.

    Where it goes on with another document, `at` is the place behind that one's last position.
    """
    special = fmt.special
    tokens, learn, image, hidden, place, patches, grids, t_max = [], [], [], [], [], [], [], []

    def add(ids, learned: bool, coordinates=None, number: int = NONE, hide: bool = False):
        """Appends positions; by themselves they are text, numbered from `at` on."""
        n = len(ids)
        tokens.append(np.asarray(ids, np.int64))
        learn.append(np.full(n, learned))
        image.append(np.full(n, number))
        hidden.append(np.full(n, hide))
        place.append(np.arange(at, at + n)[:, None] * [1, 1, 0, 0] if coordinates is None else coordinates)

    add([], False)  # a document may be empty
    for segment in document:
        if isinstance(segment, Text):
            add(segment.ids, segment.learn)
            at += len(segment.ids)
            continue
        is_code = isinstance(segment, Codes)
        learned = segment.learn if is_code else segment.t_max > 0
        rows, columns = segment.codes.shape if is_code else (n // fmt.patch_size for n in segment.latents.shape[1:])
        opening = [special.boi] + ([fmt.side(rows), fmt.side(columns)] if fmt.sides else [])
        add(opening, learned)
        at += len(opening)
        coordinates, after = places(rows, columns, at, fmt.image_positions)
        if is_code:
            add(fmt.first_code + segment.codes.reshape(-1), learned, coordinates)
        else:
            of_image = patchify(segment.latents, fmt.patch_size)
            for level in (segment.t_max, 0.0) if segment.copy else (segment.t_max,):
                hide = segment.copy and level > 0
                add(np.full(rows * columns, special.patch), False, coordinates, len(grids), hide)
                patches.append(of_image)
                grids.append((rows, columns))
                t_max.append(level)
        at = after
        add([special.eoi], False)
        at += 1

    tokens = np.concatenate(tokens)
    target = np.append(np.where(np.concatenate(learn), tokens, NONE)[1:], NONE)[: len(tokens)]
    return Sequence(
        tokens=tokens,
        image=np.concatenate(image),
        hidden=np.concatenate(hidden),
        place=np.concatenate(place),
        target=target,
        patches=np.concatenate(patches).astype(np.float32) if patches else np.zeros((0, 0), np.float32),
        grids=tuple(grids),
        t_max=np.asarray(t_max, np.float32),
    )


def places(rows: int, columns: int, at: int, image_positions: str) -> tuple[np.ndarray, int]:
    """([rows * columns, 4] places of the patches of an image that begins at `at`, where the text after it goes on)."""
    grid = np.indices((rows, columns)).reshape(2, -1).T  # [n, 2]
    if image_positions == "raster":
        rotary, after = np.arange(at, at + len(grid))[:, None] * [1, 1], at + len(grid)
    else:
        rotary, after = at + grid, at + max(rows, columns)
    return np.concatenate([rotary, grid], 1), after


def image_length(grid: tuple[int, int], fmt: Format, copy: bool = False) -> int:
    """Positions that an image of (rows, columns) patches takes."""
    return grid[0] * grid[1] * (2 if copy else 1) + (4 if fmt.sides else 2)


def first_fit(lengths: Iterable[int], rows: int, seq_len: int) -> tuple[list[list[int]], list[int]]:
    """(which items stand in each row, which fit in none): first-fit decreasing bin packing; ties keep their order."""
    lengths = list(lengths)
    placed, free, left_over = [[] for _ in range(rows)], [seq_len] * rows, []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in range(rows) if free[r] >= lengths[i]), None)
        if row is None:
            left_over.append(i)
        else:
            placed[row].append(i)
            free[row] -= lengths[i]
    return placed, left_over


def collate(
    rows: list[list[Sequence]], seq_len: int, fmt: Format, first_row: int = 0, lost: tuple[str, ...] = ()
) -> Batch:
    """The batch of packed rows, rows `first_row` ... of their step.

    Positions behind a row's last document are padding, which sees padding at most.
    """
    B, L = len(rows), seq_len
    tokens = np.full((B, L), fmt.special.pad, np.int64)
    document, image = np.full((B, L), NONE, np.int32), np.full((B, L), NONE, np.int32)
    hidden = np.zeros((B, L), bool)
    place, target = np.zeros((B, L, 4), np.int32), np.full((B, L), NONE, np.int64)
    patches, t_max, images_in_row, grids = [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for d, s in enumerate(row):
            end = at + len(s)
            assert end <= L, f"row {r} holds {end} positions, more than seq_len = {L}"
            tokens[r, at:end], document[r, at:end], place[r, at:end], target[r, at:end] = s.tokens, d, s.place, s.target
            image[r, at:end] = np.where(s.image == NONE, NONE, s.image + len(grids))
            hidden[r, at:end] = s.hidden
            grids += s.grids
            if s.grids:
                patches.append(s.patches)
                t_max.append(s.t_max)
            at = end
        images_in_row.append(sum(len(s.grids) for s in row))
    flat_image, flat_target = image.reshape(-1), target.reshape(-1)
    patch_at, text_at = np.flatnonzero(flat_image != NONE), np.flatnonzero(flat_target != NONE)
    tensor, t_max = torch.from_numpy, np.concatenate(t_max or [np.zeros(0, np.float32)])
    return Batch(
        tokens=tensor(tokens),
        document=tensor(document),
        image=tensor(image),
        hidden=tensor(hidden),
        place=tensor(place),
        text_at=tensor(text_at),
        target=tensor(flat_target[text_at]),
        patch_at=tensor(patch_at),
        patch_image=tensor(flat_image[patch_at].astype(np.int64)),
        patches=tensor(np.concatenate(patches)) if patches else torch.zeros(0, 0),
        t_max=tensor(t_max),
        first_row=first_row,
        n_images=int((t_max > 0).sum()),
        images_in_row=tuple(images_in_row),
        grids=tuple(grids),
        lost=lost,
    )
