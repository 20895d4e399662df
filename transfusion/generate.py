"""The Engine: writes text until <boi>, draws the image by diffusion, closes it with <eoi>, writes on (section 3.3).

    settle   what is final and not cached yet goes through the model once: prompts, written tokens, finished images
             (clean, t = 0, so that the text after it sees it as it sees a prompt's); every writer gets its next token
    draw     one solver step for all requests that draw: only the image's patches are computed, the conditional and the
             unconditional prefix side by side in one batch, each request at its own step

A request is a document that grows; what stands where in it is `lay_out`'s word alone, as in training. Its noise and its
tokens are drawn from its own seed, so it comes out the same alone or beside any others.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from transfusion.codec.codec import Codec
from transfusion.data.documents import image_alone
from transfusion.data.images import to_square
from transfusion.diffusion.guidance import guide
from transfusion.diffusion.schedule import SCHEDULES, timesteps
from transfusion.diffusion.solver import NOISY, SOLVERS, denoiser_from
from transfusion.model.cache import Cache
from transfusion.model.mask import allow
from transfusion.model.transformer import Transfusion
from transfusion.run import RunConfig, SampleConfig, codec_of, format_of, uses_bf16
from transfusion.sequence import NONE, Image, Sequence, Text, image_length, lay_out, unpatchify
from transfusion.tokenizer import Tokenizer

MODES = ("auto", "draw", "text")  # as the model likes | one image now | text only
Prompt = str | PIL.Image.Image | Seq[str | PIL.Image.Image]
Answer = list[str | PIL.Image.Image]


@dataclass(eq=False)
class Branch:
    """A sequence in a lane of the cache; its first `settled` positions have their final keys and values there."""

    lane: int
    sequence: Sequence | None = None
    settled: int = 0


@dataclass(eq=False)
class Request:
    """One document in the making."""

    document: list[Text | Image]
    prompt: int  # segments of the document that are not ours
    mode: str
    random: torch.Generator
    main: Branch
    free: Branch  # the unconditional branch: only <bos> before the image
    z: Tensor | None = None  # [n, P] patches on the way from noise to image; None = it writes
    step: int = 0  # of the solver
    written: int = 0  # tokens
    drawn: int = 0  # images
    done: bool = False

    def final(self, branch: Branch) -> int:
        """How many positions of a branch are final: all but those of an image being drawn."""
        return len(branch.sequence) - (0 if self.z is None else len(self.z) + 1)


class Span(NamedTuple):
    """Positions start .. stop of a branch."""

    branch: Branch
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """b spans side by side, each filled up to q positions, as the model takes them."""

    tokens: Tensor  # [b, q]
    place: Tensor  # [b, q, 4]
    mask: Tensor  # [b, 1, q, length], of the keys in the cache
    lanes: Tensor  # [b]
    slots: Tensor  # [b, q]
    length: int
    patch_at: Tensor  # [N] flat positions of the patches
    patch_image: Tensor  # [N] which of the chunk's images each belongs to
    grids: tuple[tuple[int, int], ...]  # [I] rows and columns of each image
    last: Tensor  # [b] flat position of each span's last


class Engine:
    """Text and images from a trained model, on the model's device. Made by `transfusion.load`."""

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, config: RunConfig, codec: Codec | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = model.norm.weight.device
        bf16 = self.device.type == "cuda" and uses_bf16(config.train.precision, self.device)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.codec = codec or codec_of(config, self.device)
        self.fmt = format_of(config, tokenizer.special, tokenizer.vocab_size, self.codec)
        side = config.data.image_size
        self.grid = self.codec.grid((side, side), config.model.patch_size)  # patches of an image to draw
        self.image_length = image_length(self.grid, self.fmt)  # positions that it takes

    # ---- what users call ----

    def generate(self, prompts: Seq[Prompt], *, mode="auto", seed: int | Seq[int] = 0, **options) -> list[Answer]:
        """What the model adds to each prompt: a list of str and PIL images.

        A prompt is a text, a PIL image, or a list of both. `mode`: "auto" (the model decides when to draw), "draw"
        (one image, now), "text" (no image). `options` are fields of `SampleConfig`, in place of the run's own. Request
        i takes its randomness from `seed[i]`, or from seed + i where one number is given.
        """
        if isinstance(prompts, str | PIL.Image.Image):
            raise ValueError(f"prompts is one {type(prompts).__name__}: give a list of prompts")
        answers = self.complete([self.open(p) for p in prompts], mode, seed, replace(self.config.sample, **options))
        return [self.read(segments) for segments in answers]

    def draw(self, captions: Seq[str], **options) -> list[PIL.Image.Image]:
        """An image for each caption."""
        return [answer[0] for answer in self.generate(captions, mode="draw", **options)]

    def caption(self, images: Seq[PIL.Image.Image], *, temperature: float = 0.0, **options) -> list[str]:
        """A caption for each image, greedy unless a temperature is given."""
        answers = self.generate(images, mode="text", temperature=temperature, **options)
        return ["".join(answer) for answer in answers]

    # ---- prompts and answers ----

    def open(self, prompt: Prompt) -> list[Text | Image]:
        """The document that a prompt begins."""
        document: list[Text | Image] = [Text(np.array([self.fmt.special.bos]))]
        for part in [prompt] if isinstance(prompt, str | PIL.Image.Image) else prompt:
            if isinstance(part, str):
                document.append(Text(np.asarray(self.tokenizer.encode(part), np.int64)))
            elif isinstance(part, PIL.Image.Image):
                document.append(Image(self.codec.encode(to_square(part, self.config.data.image_size)[None])[0]))
            else:
                raise ValueError(f"a prompt is made of str and PIL images, not {type(part).__name__}")
        return document

    def read(self, segments: Seq[Text | Image]) -> Answer:
        """Segments as people read them."""
        return [
            self.tokenizer.decode(s.ids.tolist())
            if isinstance(s, Text)
            else PIL.Image.fromarray(self.codec.decode(s.latents[None])[0])
            for s in segments
        ]

    # ---- the loop ----

    @torch.no_grad()
    def complete(
        self, documents: Seq[list[Text | Image]], mode: str, seed: int | Seq[int], sampling: SampleConfig
    ) -> list[list[Text | Image]]:
        """The segments that the model adds to each document."""
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: choose one of {', '.join(MODES)}")
        seeds = [seed + i for i in range(len(documents))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(documents):
            raise ValueError(f"{len(seeds)} seeds for {len(documents)} prompts: give one number, or one for each")
        limit = self.config.train.seq_len
        what, more = ("the image to draw", self.image_length) if mode == "draw" else ("one token more", 1)
        for document in documents:
            need = len(lay_out(document, self.fmt)) + more
            if need > limit:
                raise ValueError(f"prompt and {what} take {need} positions, the model has {limit}: shorten the prompt")
        added: list[list[Text | Image]] = []
        for start in range(0, len(documents), sampling.batch):
            part = slice(start, start + sampling.batch)
            added += self.side_by_side(documents[part], mode, seeds[part], sampling)
        return added

    def side_by_side(
        self, documents: Seq[list[Text | Image]], mode: str, seeds: Seq[int], sampling: SampleConfig
    ) -> list[list[Text | Image]]:
        """`complete` for documents that fit into memory together."""
        n, requests, drawing = len(documents), [], []
        for i, (document, seed) in enumerate(zip(documents, seeds)):
            random = torch.Generator().manual_seed(seed)
            r = Request(list(document), len(document), mode, random, Branch(i), Branch(n + i))
            self.begin_image(r) if mode == "draw" else self.lay_out(r)
            requests.append(r)
        lanes = n if mode == "text" or sampling.guidance == 1 else 2 * n
        slots = max(len(r.main.sequence) for r in requests)
        if mode != "draw":
            slots += sampling.max_tokens + sampling.max_images * self.image_length
        cache = self.model.new_cache(lanes, min(slots, self.config.train.seq_len), self.dtype)
        # chunks come in many shapes, and blocks compiled for training would compile anew for each of them
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            while any(not r.done for r in requests):
                self.settle(requests, cache, sampling)
                # an image that settle has just opened waits until its <boi> and its other prefix are cached
                group = [r for r in requests if r.z is not None and r.main.settled == r.final(r.main)]
                if group != drawing:  # the chunk of patches serves as long as the same requests draw
                    drawing, chunk = group, self.patch_chunk(group, cache, sampling) if group else None
                if group:
                    self.draw_step(group, chunk, cache, sampling)
        return [r.document[r.prompt :] for r in requests]

    def lay_out(self, r: Request):
        r.main.sequence = lay_out(r.document, self.fmt)

    def begin_image(self, r: Request):
        """Opens an image behind the document: pure noise, t = 1."""
        h, w = (n * self.fmt.patch_size for n in self.grid)
        canvas = Image(np.zeros((self.codec.channels, h, w), np.float32))
        r.document.append(canvas)
        self.lay_out(r)
        r.free.sequence, r.free.settled = lay_out(image_alone(self.fmt.special, canvas), self.fmt), 0
        n = len(r.free.sequence.patches)
        r.z, r.step = torch.randn(n, self.config.model.patch_dim, generator=r.random).to(self.device), 0

    def settle(self, requests: Seq[Request], cache: Cache, sampling: SampleConfig):
        """Caches what is final and not cached yet; long spans (prompts) and single tokens go apart."""
        spans: list[tuple[Request, Span]] = []
        for r in requests:
            guided = r.z is not None and sampling.guidance != 1
            for branch in [r.main, r.free] if guided else [r.main]:
                if not r.done and branch.settled < r.final(branch):
                    spans.append((r, Span(branch, branch.settled, r.final(branch))))
        single = [(r, s) for r, s in spans if s.stop - s.start == 1]
        longer = [(r, s) for r, s in spans if s.stop - s.start > 1]
        for group in filter(None, (single, longer)):
            chunk = self.chunk([s for _, s in group], cache)
            z = [patches_of(s) for _, s in group]
            z = torch.from_numpy(np.concatenate([p for p in z if len(p)] or z[:1])).to(self.device)
            clean = torch.zeros(len(chunk.grids), device=self.device)
            logits, _ = self.forward(chunk, cache, z, clean, chunk.last)
            for (r, s), row in zip(group, logits.float().cpu()):
                s.branch.settled = s.stop
                if r.z is None:
                    self.write(r, row, sampling)

    def write(self, r: Request, logits: Tensor, sampling: SampleConfig):
        """Draws a request's next token from logits [V] and does what it says."""
        special, limit = self.fmt.special, self.config.train.seq_len
        n = len(r.main.sequence)
        room_to_draw = n + self.image_length <= limit
        banned = [special.pad, special.bos, special.eoi, special.patch]
        if r.mode == "text" or r.drawn >= sampling.max_images or not room_to_draw:
            banned.append(special.boi)
        logits[banned] = -torch.inf
        token = pick(logits, sampling, r.random)
        if token == special.boi:
            self.begin_image(r)
        elif token == special.eos:
            r.done = True
        else:
            own = r.document[-1] if len(r.document) > r.prompt and isinstance(r.document[-1], Text) else None
            ids = np.append(r.document.pop().ids if own else np.zeros(0, np.int64), token)
            r.document.append(Text(ids))
            self.lay_out(r)
            r.written += 1
            r.done = r.written >= sampling.max_tokens or n + 1 >= limit

    def patch_chunk(self, group: Seq[Request], cache: Cache, sampling: SampleConfig) -> Chunk:
        """The patches being drawn: of all conditional branches, then of all unconditional ones where guidance asks."""
        branches = [(r, r.main) for r in group] + [(r, r.free) for r in group if sampling.guidance != 1]
        return self.chunk([Span(b, r.final(b), r.final(b) + len(r.z)) for r, b in branches], cache)

    def draw_step(self, group: Seq[Request], chunk: Chunk, cache: Cache, sampling: SampleConfig):
        """One solver step for every request of the group."""
        sizes = [len(r.z) for r in group]
        copies = len(chunk.lanes) // len(group)  # 2 with guidance
        first = torch.tensor([0, *sizes[:-1]], device=self.device).cumsum(0)  # each request's first patch
        c = self.config.diffusion
        schedule = SCHEDULES[c.schedule]

        def predict(z: Tensor, t: Tensor) -> Tensor:
            """[N, P] guided prediction at z [N, P] as the model reads it, t [N, 1]."""
            t = t[first, 0].repeat(copies)  # [I]
            _, p = self.forward(chunk, cache, z.repeat(copies, 1), t, chunk.last[:0])
            return p.float() if copies == 1 else guide(*p.float().chunk(2), sampling.guidance)

        times = timesteps(sampling.steps, sampling.t_shift)
        t, t_next = (
            torch.repeat_interleave(times[[r.step + i for r in group]], torch.tensor(sizes))[:, None].to(self.device)
            for i in (0, 1)
        )
        denoise = denoiser_from(predict, c.prediction, schedule, self.codec.limit, c.data_variance)
        noise = (
            torch.cat([torch.randn(r.z.shape, generator=r.random) for r in group]) if sampling.solver in NOISY else None
        )
        z = torch.cat([r.z for r in group])
        z = SOLVERS[sampling.solver](z, t, t_next, denoise, schedule, None if noise is None else noise.to(self.device))
        for r, patches in zip(group, z.split(sizes)):
            r.z, r.step = patches, r.step + 1
            if r.step == sampling.steps:
                self.finish_image(r)

    def finish_image(self, r: Request):
        """Puts the drawn image into the document, where `settle` will encode it clean."""
        blank = r.document.pop().latents
        drawn = unpatchify(r.z.float().cpu().numpy(), self.fmt.patch_size, *blank.shape[1:])
        r.document.append(Image(np.ascontiguousarray(drawn)))
        self.lay_out(r)
        r.z, r.drawn = None, r.drawn + 1
        r.done = r.mode == "draw" or len(r.main.sequence) >= self.config.train.seq_len

    # ---- from spans to the model ----

    def chunk(self, spans: Seq[Span], cache: Cache) -> Chunk:
        """Spans as tensors; queries that only fill up write to the cache's bin and see its first slot."""
        b, q, length = len(spans), max(s.stop - s.start for s in spans), max(s.stop for s in spans)
        tokens, place = np.full((b, q), self.fmt.special.pad), np.zeros((b, q, 4), np.int64)
        slots, index = np.full((b, q), cache.bin), np.zeros((b, q), np.int64)
        image_q, image_k = np.full((b, q), NONE), np.full((b, length), NONE)
        grids: list[tuple[int, int]] = []
        for i, (branch, start, stop) in enumerate(spans):
            s, n = branch.sequence, stop - start
            tokens[i, :n], place[i, :n], image_q[i, :n] = s.tokens[start:stop], s.place[start:stop], s.image[start:stop]
            slots[i, :n] = index[i, :n] = np.arange(start, stop)
            image_k[i, :stop] = s.image[:stop]
            grids += [s.grids[j] for j in np.unique(image_q[i, :n]) if j != NONE]
        full = not self.config.model.causal_images
        mask = allow(0, image_q[:, :, None], index[:, :, None], 0, image_k[:, None], np.arange(length), np.False_, full)
        last = [i * q + s.stop - s.start - 1 for i, s in enumerate(spans)]
        arrays = (tokens, place, mask[:, None], np.array([s.branch.lane for s in spans]), slots)
        tokens, place, mask, lanes, slots = (torch.from_numpy(a).to(self.device) for a in arrays)
        patch_at = torch.from_numpy(np.flatnonzero(image_q != NONE)).to(self.device)
        patch_image = np.repeat(np.arange(len(grids)), [rows * columns for rows, columns in grids])
        patch_image = torch.from_numpy(patch_image).to(self.device)
        last = torch.tensor(last, device=self.device)
        return Chunk(tokens, place, mask, lanes, slots, length, patch_at, patch_image, tuple(grids), last)

    def forward(self, chunk: Chunk, cache: Cache, z: Tensor, t: Tensor, text_at: Tensor):
        """(logits, predictions) of a chunk, whose keys and values go to the cache; t [I]."""
        c, layers = chunk, cache.at(chunk.lanes, chunk.slots, chunk.length)
        return self.model(c.tokens, c.place, c.mask, z, t, c.patch_image, c.grids, c.patch_at, text_at, layers)


def patches_of(span: Span) -> np.ndarray:
    """[n, P] the clean patches that stand in a span."""
    s = span.branch.sequence
    start, stop = ((s.image[:i] != NONE).sum() for i in (span.start, span.stop))
    return s.patches[start:stop]


def pick(logits: Tensor, sampling: SampleConfig, random: torch.Generator) -> int:
    """A token id from logits [V]: greedy at temperature 0, else from the top-k of the nucleus (1904.09751)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p, ids = torch.softmax(logits / sampling.temperature, -1).sort(descending=True, stable=True)
    keep = p.cumsum(0) - p < sampling.top_p  # the smallest set that reaches top_p
    keep[sampling.top_k or len(p) :] = False
    return int(ids[torch.multinomial(p * keep, 1, generator=random)])
