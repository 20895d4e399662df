"""One document in the making: what it waits for, which tokens may come next, and what guidance compares it with.

writes text  ->  <boi>  ->  [writes its size]  ->  draws patches, all at once, step by step   ->  writes text
                                               or  writes codes, one by one
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from transfusion.diffusion.guidance import branch_weights
from transfusion.lanes import Branch
from transfusion.run import SampleConfig
from transfusion.sequence import Format, Segment, Text, image_length

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
    sampling: SampleConfig
    slots: int  # positions that it may come to
    main: Branch | None = None  # None: it waits for a lane
    guiding: list[Branch] = field(default_factory=list)  # other prefixes, which the image being drawn is compared with
    weights: tuple[float, ...] = (1.0,)  # how much the main branch and each of them counts
    ids: list[int] = field(default_factory=list)  # of the text being written, not yet in the document
    sides: list[int] | None = None  # written so far of the size of an image; None = none is being written
    coded: int | None = None  # codes written so far of an image; None = none is being written
    z: Tensor | None = None  # [N, P] patches on the way from noise to image; None = it writes
    noise: Tensor | None = None  # [N, P] what z began as
    times: Tensor | None = None  # [steps + 1] of the solver
    guided: list[bool] = field(default_factory=list)  # of each of its steps, whether guidance can count in it
    step: int = 0  # of the solver
    written: int = 0  # tokens
    drawn: int = 0  # images
    done: bool = False
    error: Exception | None = None  # why it came to its end too early

    @property
    def answer(self) -> list[Segment]:
        """What has been added to the document."""
        return self.document[self.prompt :]

    @property
    def lanes(self) -> int:
        """How many it needs at most."""
        return 1 if self.mode == "text" else 1 + others_of(self.sampling)

    @property
    def ready(self) -> bool:
        """Whether it draws, and all that its image stands on is cached."""
        return self.z is not None and all(b.settled == self.final(b) for b in self.branches())

    def branches(self) -> list[Branch]:
        """Those that it computes now."""
        return [self.main, *self.guiding]

    def final(self, branch: Branch) -> int:
        """How many positions of a branch are final: all but those of an image that is not finished."""
        if self.z is not None:
            return branch.length - len(self.z) - 1
        if self.coded is not None:
            return branch.length - (self.document[-1].codes.size - self.coded) - 1
        return branch.length

    def end_text(self):
        """Puts the text that was being written into the document."""
        if self.ids:
            self.document.append(Text(np.array(self.ids)))
            self.ids = []

    def close(self):
        """Leaves in the document what is finished."""
        self.end_text()
        if self.z is not None or self.coded is not None:
            self.document.pop()
            self.z = self.coded = None


def allowed(r: Request, fmt: Format, limit: int, n: int) -> Tensor:
    """Bool [n]: the tokens that may come next; `limit` is the number of positions that a document may have."""
    if r.coded is not None:
        return codes_allowed(fmt, n)
    if r.sides is None:
        room = r.main.length + image_length(r.grid or (1, 1), fmt) <= limit
        return text_allowed(fmt, n, r.mode != "text" and r.drawn < r.sampling.max_images and room)
    tokens = torch.zeros(n, dtype=torch.bool)  # so many that the image, of one column at least, ends within the row
    before = r.main.length - 1 - len(r.sides)
    for side in range(1, fmt.sides + 1):
        grid = (*r.sides, side) if r.sides else (side, 1)
        tokens[fmt.side(side)] = before + image_length(grid, fmt) <= limit
    return tokens


@cache
def codes_allowed(fmt: Format, n: int) -> Tensor:
    """Bool [n]: the codes."""
    tokens = torch.zeros(n, dtype=torch.bool)
    tokens[fmt.first_code : fmt.first_code + fmt.codes] = True
    return tokens


@cache
def text_allowed(fmt: Format, n: int, image: bool) -> Tensor:
    """Bool [n]: text, `<eos>` and, with `image`, `<boi>`."""
    tokens, special = torch.zeros(n, dtype=torch.bool), fmt.special
    tokens[: fmt.text_tokens] = True
    tokens[[special.pad, special.bos, special.eoi, special.patch]] = False
    tokens[special.boi] = image
    return tokens


def others_of(sampling: SampleConfig) -> int:
    """How many prefixes guidance needs at most besides the conditional one."""
    everything, seen, nothing = branch_weights(sampling.guidance, sampling.image_guidance)
    return max((seen != 0) + (nothing != 0), int(everything != 1))


def pick(logits: Tensor, sampling: SampleConfig, random: torch.Generator) -> int:
    """A token id from logits [V]: greedy at temperature 0, else from the top-k of the nucleus (1904.09751)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1 or sampling.top_k:
        ordered, ids = p.sort(descending=True, stable=True)
        keep = ordered.cumsum(0) - ordered < sampling.top_p  # the smallest set that reaches top_p
        keep[sampling.top_k or len(p) :] = False
        p = torch.zeros_like(p).index_copy(0, ids, ordered * keep)
    return int(torch.multinomial(p, 1, generator=random))
