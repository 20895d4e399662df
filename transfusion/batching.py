"""Requests carried on together, a step at a time: whoever comes in joins at once, whoever is done makes room at once.

    step    admit    those that wait take lanes, while there is room
            settle   what is final and not cached yet goes through the model once: prompts, written tokens, finished
                     images (clean, t = 0, so that the text after it sees it as it sees a prompt's); every writer
                     gets its next token
            draw     one solver step for all that draw: only the image's patches are computed, the conditional prefix
                     and guidance's others side by side in one batch, each request at its own step

What stands where in a document is `lay_out`'s word alone, as in training. Noise and tokens of a request are drawn from
its own seed, so it comes out the same alone or beside any others. A model whose images are codes writes them one by
one, as text, with guidance on the logits; one that writes sizes does so before the image.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from itertools import pairwise
from traceback import clear_frames

import numpy as np
import torch
from torch import Tensor

from transfusion.chunk import Chunk, Span, chunk_of
from transfusion.codec.codec import Codec
from transfusion.data.documents import image_alone
from transfusion.diffusion.guidance import branch_weights, guide
from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.schedule import timesteps
from transfusion.diffusion.solver import START
from transfusion.drawing import Plan, canvases, draw_step, plan_of
from transfusion.lanes import Branch, Lanes
from transfusion.model.transformer import Transfusion
from transfusion.request import Request, Size, allowed, pick
from transfusion.sequence import Codes, Format, Image, Segment, Text, unpatchify


class Batching:
    """The requests that wait and those that are under way, with the memory that these take."""

    def __init__(
        self,
        model: Transfusion,
        fmt: Format,
        codec: Codec,
        diffusion: DiffusionConfig,
        limit: int,  # positions that a document may have
        dtype: torch.dtype,  # of keys and values
        trunk: Callable[..., Tensor] | None = None,  # the model's, compiled: what comes again and again takes it
    ):
        self.model, self.device, self.dtype = model, model.norm.weight.device, dtype
        self.trunk = trunk
        self.fmt, self.codec, self.diffusion, self.limit = fmt, codec, diffusion, limit
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.ended: list[Request] = []  # in this step
        self.forget()

    def forget(self):
        """Gives the memory back."""
        self.lanes: Lanes | None = None
        self.plans: dict[tuple, Plan] = {}

    def submit(self, r: Request):
        """Lets a request wait for its turn, which may come while others are under way."""
        self.waiting.append(r)

    def cancel(self, r: Request):
        """Drops a request, wherever it stands; its answer is what it had finished."""
        if r in self.waiting:
            self.waiting.remove(r)
        elif r in self.running:
            self.running.remove(r)
            r.close()
            if r.main is not None:
                self.lanes.release(r.branches())
            if not self.running:
                self.forget()

    def end(self, r: Request, error: Exception | None = None):
        """Brings a request to its end, which `step` tells."""
        r.done, r.error = True, error
        if error:
            clear_frames(error.__traceback__)  # or it keeps what the step had in memory for as long as it is kept
        self.cancel(r)
        self.ended.append(r)

    @torch.no_grad()  # not inference_mode: see docs/log.md, 2026-11-22
    def step(self) -> list[Request]:
        """The requests that came to their ends by one step more for everyone.

        Where one cannot go on, its end has an `error`, and the others go on; where a step fails that they share, it is
        the end of all that are under way, and the next ones take their turn. Not to be called from two threads at once,
        not even of two engines where one's blocks were compiled for training: torch's stance is the whole process's.
        """
        self.ended = []
        try:
            self.admit()
            self.settle()
            self.draw()
        except Exception as error:
            for r in list(self.running):
                self.end(r, None if r.done else error)
        for r in [r for r in self.running if r.done]:
            self.end(r)
        return self.ended

    def alone(self, r: Request, part: Callable, *args):
        """Carries on one request; an error is its own."""
        try:
            part(r, *args)
        except Exception as error:
            self.end(r, error)

    def admit(self):
        """Gives lanes to those that wait, in their order, while there is room."""
        new: list[Request] = []
        while self.waiting and self.room([*self.running, *new, self.waiting[0]]):
            new.append(self.waiting.popleft())
        if not new:
            return
        self.running += new
        n, slots = sum(r.lanes for r in self.running), max(r.slots for r in self.running)
        n = max(n, 2) if self.trunk else n  # a cache of one lane would take graphs of its own
        try:
            if self.lanes is None:
                self.lanes = Lanes(self.model, self.fmt, self.dtype, n, slots)
            self.lanes = self.lanes.grown(n, slots)
        except Exception as error:  # no memory left: those that were under way before have theirs
            for r in new:
                self.end(r, error)
            return
        for r in new:
            r.main = self.lanes.take(r.document)
            if r.mode == "draw":
                self.alone(r, self.open_image)

    @staticmethod
    def room(requests: Seq[Request]) -> bool:
        """Whether so many may be under way together: no more than any of them allows."""
        return len(requests) <= min(r.sampling.batch for r in requests)

    # ---- writing ----

    def settle(self):
        """Caches what is final and not cached yet; long spans (prompts) and single tokens go apart."""
        spans = [Span(b, b.settled, r.final(b)) for r in self.running for b in r.branches() if b.settled < r.final(b)]
        writers = {b for r in self.running if r.z is None for b in r.branches()}
        logits: dict[Branch, Tensor] = {}  # at the last final position
        for group in ([s for s in spans if s.stop - s.start == 1], [s for s in spans if s.stop - s.start > 1]):
            if not group:
                continue
            group.sort(key=lambda s: s.branch.lane)
            chunk, asked = self.chunk(group), [i for i, s in enumerate(group) if s.branch in writers]
            z = torch.from_numpy(chunk.patches).to(self.device)
            clean = torch.zeros(len(chunk.grids), device=self.device)
            found, _ = self.forward(chunk, z, clean, chunk.last[asked], chunk.tokens.shape[1] == 1)
            logits |= zip([group[i].branch for i in asked], found.float().cpu())
            for s in group:
                s.branch.settled = s.stop
        for r in [r for r in self.running if r.main in logits]:
            of_branches = [logits[b] for b in r.branches()]
            self.alone(r, self.write, guide(torch.stack(of_branches), r.weights) if r.guiding else of_branches[0])

    def write(self, r: Request, logits: Tensor):
        """Draws a request's next token from logits [V] and does what it says."""
        special, fmt = self.fmt.special, self.fmt
        refuse_nan(logits)
        logits = logits.masked_fill(~allowed(r, fmt, self.limit, len(logits)), -torch.inf)
        token = pick(logits, r.sampling, r.random)
        if r.coded is not None:
            codes = r.document[-1].codes
            codes.flat[r.coded] = token - fmt.first_code
            for branch in r.branches():
                self.lanes.tokens[branch.lane, r.final(branch)] = token
            r.coded += 1
            if r.coded == codes.size:
                self.finish_image(r)
        elif r.sides is not None:
            r.sides.append(token - fmt.side(1) + 1)
            self.open_image(r)
        elif token == special.boi:
            self.open_image(r)
        elif token == special.eos:
            r.done = True
        else:
            r.ids.append(token)
            self.lanes.append(r.main, [Text(np.array([token]))])
            r.written += 1
            r.done = r.written >= r.sampling.max_tokens or r.main.length >= self.limit

    # ---- drawing ----

    def open_image(self, r: Request):
        """Opens an image behind the document; where its size is to be written, writes that first."""
        r.end_text()
        grid = r.grid
        if grid is None:
            r.sides = [] if r.sides is None else r.sides
            if len(r.sides) < 2:
                opening = [self.fmt.side(r.sides[-1]) if r.sides else self.fmt.special.boi]
                self.lanes.append(r.main, [Text(np.array(opening))])
                return
            grid, r.sides = tuple(r.sides), None
            self.lanes.cut(r.main, r.main.length - 2)  # <boi> and the rows, which are of the image now
        canvas = self.canvas(grid)
        r.document.append(canvas)
        if self.fmt.codes:
            r.coded = 0
        else:
            noise = torch.randn(grid[0] * grid[1], self.model.config.patch_dim, generator=r.random)
            # where nothing bounds x, a little later than at pure noise
            times = timesteps(r.sampling.steps, r.sampling.t_shift).clamp(max=1.0 if self.codec.limit else START)
            r.noise, r.times, r.step = noise.to(self.device), times.to(self.device), 0
            low, high = r.sampling.guidance_interval
            inside = ((low <= times) & (times <= high)).tolist()
            r.guided = [a or b for a, b in pairwise(inside)]  # heun asks at both ends of a step
            r.z = r.noise
        self.lanes.append(r.main, [canvas])
        others, r.weights = self.prefixes(r)
        r.guiding = [self.lanes.take(document) for document in others]

    def canvas(self, grid: Size) -> Image | Codes:
        """An image of so many rows and columns of patches, with nothing on it."""
        if self.fmt.codes:
            return Codes(np.zeros(grid, np.int64))
        return Image(np.zeros((self.codec.channels, *(n * self.fmt.patch_size for n in grid)), np.float32))

    def prefixes(self, r: Request) -> tuple[list[list[Segment]], tuple[float, ...]]:
        """(what guidance keeps of the document whose image is being drawn; how much it and each of these count)."""
        alone = image_alone(self.fmt.special, r.document[-1])
        images = [s for s in r.document if not isinstance(s, Text)]
        everything, seen, nothing = branch_weights(r.sampling.guidance, r.sampling.image_guidance)
        if len(images) == 1:
            seen, nothing = 0.0, 1.0 - everything
        others = [(d, w) for d, w in (([alone[0], *images], seen), (alone, nothing)) if w]
        return [document for document, _ in others], (everything, *(w for _, w in others))

    def draw(self):
        """One solver step for all that draw; those of one solver go together."""
        drawing = [r for r in self.running if r.ready]
        solvers = dict.fromkeys(r.sampling.solver for r in drawing)
        groups = [[r for r in drawing if r.sampling.solver == name] for name in solvers]
        rest = [r for r in self.running if not r.ready]
        if self.running:
            # the conditional branches side by side too: outside of guidance's interval they go alone
            parts = [
                part for group in groups for part in ([r.main for r in group], [b for r in group for b in r.guiding])
            ]
            self.lanes.arrange([*parts, [b for r in rest for b in r.branches()]])
        plans, self.plans = self.plans, {}
        for group in groups:
            group.sort(key=lambda r: r.main.lane)
            # a plan serves as long as the same requests draw in the same lanes, guided or not
            rows = canvases(group)
            key = (self.lanes.cache, *group, *(c.span.branch.lane for c in rows))
            plan = plans.get(key) or plan_of(group, rows, self.chunk([c.span for c in rows]))
            self.plans[key] = plan
            draw_step(plan, self.predictions, self.diffusion, self.codec.limit)
            for r in group:
                if r.step == r.sampling.steps:
                    self.alone(r, self.finish_image)

    def finish_image(self, r: Request):
        """The drawn image stands in the document; `settle` will encode it clean before the text goes on."""
        if r.z is not None:
            refuse_nan(r.z)
            patches, blank = r.z.float().cpu().numpy(), r.document[-1].latents
            drawn = unpatchify(patches, self.fmt.patch_size, *blank.shape[1:])
            r.document[-1] = Image(np.ascontiguousarray(drawn))
            r.main.images[-1] = r.main.images[-1]._replace(patches=patches)
        self.lanes.release(r.guiding)
        r.z = r.noise = r.times = r.coded = None
        r.guiding, r.weights, r.drawn = [], (1.0,), r.drawn + 1
        r.done = r.mode == "draw" or r.main.length >= self.limit

    # ---- to the model ----

    def chunk(self, spans: Seq[Span]) -> Chunk:
        full = not self.model.config.causal_images
        return chunk_of(spans, self.lanes, full, self.device, masked=self.trunk is not None)

    def forward(
        self, chunk: Chunk, z: Tensor, t: Tensor, text_at: Tensor, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(logits, predictions) of a chunk, whose keys and values go to the cache; t [I]. `again`: its like will come
        again, so that a compiled trunk is worth it."""
        c, trunk = chunk, self.trunk if again and chunk.regular else None
        # chunks come in many shapes, and blocks compiled for training would compile anew for each of them
        eager = self.model.compiled and trunk is None
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            of_chunk = (c.tokens, c.place, c.mask, z, t, c.patch_image, c.grids, c.patch_at, text_at, c.layers)
            return self.model(*of_chunk, trunk)

    def predictions(self, chunk: Chunk, z: Tensor, t: Tensor) -> Tensor:
        """[M, P] float32, of a chunk of images."""
        return self.forward(chunk, z, t, chunk.last[:0], again=True)[1].float()


def refuse_nan(x: Tensor):
    """Raises ValueError where an answer of the model is no number."""
    if not x.isfinite().all():
        raise ValueError("the model answers with nan or inf: its training went astray, take an earlier checkpoint")
