"""One document in the making: what it waits for, which tokens may come next, and what guidance compares it with.

writes text  ->  <boi>  ->  [writes its size]  ->  draws patches, all at once, step by step   ->  writes text
                                               or  writes codes, one by one
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from transfusion.chunk import Branch
from transfusion.diffusion.guidance import branch_weights
from transfusion.run import SampleConfig
from transfusion.sequence import Format, Segment, image_length

MODES = ("auto", "draw", "text")  # as the model likes | one image now | text only
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of an image to draw, and stays."""

    patches: Tensor  # [N, P] clean
    keep: Tensor  # [N, P] bool: these numbers stay


@dataclass(eq=False)
class Request:
    """One document in the making."""

    document: list[Segment]
    prompt: int  # segments of the document that are not ours
    mode: str
    grid: Size | None  # rows and columns of the images that it draws; None = as the model writes them
    known: Known | None
    random: torch.Generator
    main: Branch
    others: list[Branch]  # lanes for guidance's other prefixes, which lack conditions
    guiding: list[Branch] = field(default_factory=list)  # those that the image being drawn needs ...
    weights: tuple[float, ...] = (1.0,)  # ... and how much the main one and each of them counts
    sides: list[int] | None = None  # written so far of the size of an image; None = none is being written
    coded: int | None = None  # codes written so far of an image; None = none is being written
    z: Tensor | None = None  # [N, P] patches on the way from noise to image; None = it writes
    noise: Tensor | None = None  # [N, P] what z began as
    step: int = 0  # of the solver
    written: int = 0  # tokens
    drawn: int = 0  # images
    done: bool = False

    def branches(self) -> list[Branch]:
        """The lanes that it computes now."""
        return [self.main, *self.guiding]

    def final(self, branch: Branch) -> int:
        """How many positions of a branch are final: all but those of an image that is not finished."""
        if self.z is not None:
            return len(branch.sequence) - len(self.z) - 1
        if self.coded is not None:
            return len(branch.sequence) - (self.document[-1].codes.size - self.coded) - 1
        return len(branch.sequence)


def allowed(r: Request, sampling: SampleConfig, fmt: Format, limit: int, n: int) -> Tensor:
    """Bool [n]: the tokens that may come next; `limit` is the number of positions that a document may have."""
    tokens, special = torch.zeros(n, dtype=torch.bool), fmt.special
    if r.coded is not None:
        tokens[fmt.first_code : fmt.first_code + fmt.codes] = True
    elif r.sides is not None:  # so many that the image, of one column at least, ends within the row
        before = len(r.main.sequence) - 1 - len(r.sides)
        for side in range(1, fmt.sides + 1):
            grid = (*r.sides, side) if r.sides else (side, 1)
            tokens[fmt.side(side)] = before + image_length(grid, fmt) <= limit
    else:
        tokens[: fmt.text_tokens] = True
        tokens[[special.pad, special.bos, special.eoi, special.patch]] = False
        room = len(r.main.sequence) + image_length(r.grid or (1, 1), fmt) <= limit
        tokens[special.boi] = r.mode != "text" and r.drawn < sampling.max_images and room
    return tokens


def others_of(sampling: SampleConfig) -> int:
    """How many prefixes guidance needs at most besides the conditional one."""
    everything, seen, nothing = branch_weights(sampling.guidance, sampling.image_guidance)
    return max((seen != 0) + (nothing != 0), int(everything != 1))


def pick(logits: Tensor, sampling: SampleConfig, random: torch.Generator) -> int:
    """A token id from logits [V]: greedy at temperature 0, else from the top-k of the nucleus (1904.09751)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p, ids = torch.softmax(logits / sampling.temperature, -1).sort(descending=True, stable=True)
    keep = p.cumsum(0) - p < sampling.top_p  # the smallest set that reaches top_p
    keep[sampling.top_k or len(p) :] = False
    return int(ids[torch.multinomial(p * keep, 1, generator=random)])
