"""The Engine: writes text until <boi>, draws the image by diffusion, closes it with <eoi>, writes on (section 3.3).

    settle   what is final and not cached yet goes through the model once: prompts, written tokens, finished images
             (clean, t = 0, so that the text after it sees it as it sees a prompt's); every writer gets its next token
    draw     one solver step for all requests that draw: only the image's patches are computed, the conditional prefix
             and guidance's others side by side in one batch, each request at its own step

A request is a document that grows; what stands where in it is `lay_out`'s word alone, as in training. Its noise and its
tokens are drawn from its own seed, so it comes out the same alone or beside any others. A model whose images are codes
writes them one by one, as text, with guidance on the logits; one that writes sizes does so before the image.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from transfusion.chunk import Branch, Chunk, Span, chunk_of
from transfusion.codec.codec import Codec
from transfusion.data.documents import image_alone
from transfusion.data.images import to_pixels
from transfusion.diffusion.guidance import branch_weights, guide, renormalised
from transfusion.diffusion.objective import add_noise
from transfusion.diffusion.schedule import SCHEDULES, timesteps
from transfusion.diffusion.solver import NOISY, SOLVERS, START, denoiser_from
from transfusion.model.cache import Cache
from transfusion.model.transformer import Transfusion
from transfusion.request import MODES, Known, Request, Size, allowed, others_of, pick
from transfusion.run import RunConfig, SampleConfig, codec_of, format_of, uses_bf16
from transfusion.sequence import Codes, Image, Segment, Text, image_length, lay_out, patchify, unpatchify
from transfusion.tokenizer import Tokenizer

Prompt = str | PIL.Image.Image | Seq[str | PIL.Image.Image]
Answer = list[str | PIL.Image.Image]


@dataclass(frozen=True, eq=False)
class Plan:
    """The patches being drawn, all branches of a request side by side: M in the chunk, N that they stand for."""

    chunk: Chunk
    image_of: Tensor  # [N] the request of each patch
    source: Tensor  # [M] which of the N each patch of the chunk is
    first: Tensor  # [images of the chunk] the first of the N that each shows
    weights: Tensor  # [M] how much a branch counts
    main: Tensor  # [M] bool: of the conditional branches


class Engine:
    """Text and images from a trained model, on the model's device. Made by `transfusion.load`."""

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, config: RunConfig, codec: Codec | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = model.norm.weight.device
        bf16 = self.device.type == "cuda" and uses_bf16(config.train.precision, self.device)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.codec = codec or codec_of(config, self.device)
        self.fmt = format_of(config, tokenizer, self.codec)
        self.limit = config.train.seq_len

    # ---- what users call ----

    def generate(
        self,
        prompts: Seq[Prompt],
        *,
        mode: str = "auto",
        size: Size | None = None,
        seed: int | Seq[int] = 0,
        **options,
    ) -> list[Answer]:
        """What the model adds to each prompt: a list of str and PIL images.

        A prompt is a text, a PIL image, or a list of both. `mode`: "auto" (the model decides when to draw), "draw"
        (one image, now), "text" (no image). `size`: (height, width) in pixels of what it draws; None: as the model
        writes it, or the run's own where it does not. `options` are fields of `SampleConfig`, in place of the run's
        own. Request i takes its randomness from `seed[i]`, or from seed + i where one number is given.
        """
        if isinstance(prompts, str | PIL.Image.Image):
            raise ValueError(f"prompts is one {type(prompts).__name__}: give a list of prompts")
        documents = [self.open(p) for p in prompts]
        grids = [self.grid(size)] * len(documents)
        answers = self.complete(documents, mode, seed, self.sampling(**options), grids)
        return [self.read(segments) for segments in answers]

    def draw(self, captions: Seq[str], **options) -> list[PIL.Image.Image]:
        """An image for each caption."""
        return [answer[0] for answer in self.generate(captions, mode="draw", **options)]

    def caption(self, images: Seq[PIL.Image.Image], *, temperature: float = 0.0, **options) -> list[str]:
        """A caption for each image, greedy unless a temperature is given."""
        answers = self.generate(images, mode="text", temperature=temperature, **options)
        return ["".join(answer) for answer in answers]

    def edit(
        self, images: Seq[PIL.Image.Image], instructions: Seq[str], *, seed: int | Seq[int] = 0, **options
    ) -> list[PIL.Image.Image]:
        """Each image as its instruction says, of a model that has learned documents of (image, instruction, image).

        `guidance` is the scale of the instruction, `image_guidance` that of the image.
        """
        same_number(images=images, instructions=instructions)
        documents = [self.open([image, text]) for image, text in zip(images, instructions)]
        grids = [self.grid(self.fit(image).shape[:2]) for image in images]
        answers = self.complete(documents, "draw", seed, self.sampling(**options), grids)
        return [self.read(answer)[0] for answer in answers]

    def inpaint(
        self,
        images: Seq[PIL.Image.Image],
        masks: Seq[PIL.Image.Image],
        captions: Seq[str],
        *,
        seed: int | Seq[int] = 0,
        **options,
    ) -> list[PIL.Image.Image]:
        """Each image drawn anew, by its caption, where its mask is white; where it is black the image stays.

        Images come back at the run's size. At every solver step the cells that stay are set to what they are at that
        noise level, so that the new ones are drawn to fit them (RePaint, arXiv 2201.09865, without its resampling).
        """
        same_number(images=images, masks=masks, captions=captions)
        for image, mask in zip(images, masks):
            sizes = [PIL.ImageOps.exif_transpose(picture).size for picture in (image, mask)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"an image of {sizes[0]} pixels and a mask of {sizes[1]}: make the mask as large")
        if self.fmt.codes:
            raise ValueError("inpainting denoises around what is known, and this model writes images as codes")
        pictures = [self.fit(image) for image in images]
        new = [self.fit(mask.convert("L").point(lambda v: 255 * (v >= 128)))[..., 0] >= 128 for mask in masks]
        known = [self.known(*pair) for pair in zip(pictures, new, strict=True)]
        grids = [self.grid(picture.shape[:2]) for picture in pictures]
        documents = [self.open(c) for c in captions]
        answers = self.complete(documents, "draw", seed, self.sampling(**options), grids, known)
        drawn = [np.asarray(self.read(answer)[0]) for answer in answers]
        return [PIL.Image.fromarray(np.where(m[..., None], d, p)) for m, d, p in zip(new, drawn, pictures)]

    # ---- prompts and answers ----

    def open(self, prompt: Prompt) -> list[Segment]:
        """The document that a prompt begins."""
        document: list[Segment] = [Text(np.array([self.fmt.special.bos]))]
        for part in [prompt] if isinstance(prompt, str | PIL.Image.Image) else prompt:
            if isinstance(part, str):
                document.append(Text(np.asarray(self.tokenizer.encode(part), np.int64)))
            elif isinstance(part, PIL.Image.Image):
                document.append(self.segment(self.fit(part)))
            else:
                raise ValueError(f"a prompt is made of str and PIL images, not {type(part).__name__}")
        return document

    def sampling(self, **options) -> SampleConfig:
        """How the run samples, with these fields in place of its own."""
        return replace(self.config.sample, **options)

    def fit(self, picture: PIL.Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] of a picture at a size of the run's."""
        return to_pixels(picture, self.config.data.sizes)

    def segment(self, pixels: np.ndarray) -> Image | Codes:
        """An image uint8 [H, W, 3] as the model reads it."""
        latents = self.codec.encode(pixels[None])
        return Codes(self.codec.quantize(latents)[0]) if self.fmt.codes else Image(latents[0])

    def read(self, segments: Seq[Segment]) -> Answer:
        """Segments as people read them."""
        return [self.tokenizer.decode(s.ids.tolist()) if isinstance(s, Text) else self.picture(s) for s in segments]

    def picture(self, image: Image | Codes) -> PIL.Image.Image:
        latents = self.codec.lookup(image.codes[None]) if isinstance(image, Codes) else image.latents[None]
        return PIL.Image.fromarray(self.codec.decode(latents)[0])

    def grid(self, size: Size | None) -> Size | None:
        """(rows, columns) of patches of a size in pixels; None: the run's, or None again where the model writes it."""
        if size is None and self.fmt.sides:
            return None
        return self.codec.grid(size or self.config.data.sizes[0], self.fmt.patch_size)

    def known(self, pixels: np.ndarray, new: np.ndarray) -> Known:
        """What stays of an image uint8 [H, W, 3] whose `new` pixels, bool [H, W], are to be drawn."""
        latents, k = self.codec.encode(pixels[None])[0], self.codec.factor
        cells = new.reshape(latents.shape[1], k, latents.shape[2], k).any((1, 3))  # [h, w] with anything new in it
        keep = np.array(np.broadcast_to(~cells, latents.shape))  # writable, as torch wants it
        of_image = (torch.from_numpy(patchify(x, self.fmt.patch_size)).to(self.device) for x in (latents, keep))
        return Known(*of_image)

    # ---- the loop ----

    @torch.no_grad()
    def complete(
        self,
        documents: Seq[list[Segment]],
        mode: str,
        seed: int | Seq[int],
        sampling: SampleConfig,
        grids: Seq[Size | None] | None = None,
        known: Seq[Known | None] | None = None,
    ) -> list[list[Segment]]:
        """The segments that the model adds to each document."""
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: choose one of {', '.join(MODES)}")
        if self.fmt.codes and (sampling.guidance_interval != (0.0, 1.0) or sampling.renormalise):
            raise ValueError("guidance_interval and renormalise are of diffusion: this model writes images as codes")
        n = len(documents)
        seeds = [seed + i for i in range(n)] if isinstance(seed, int) else list(seed)
        if len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} prompts: give one number, or one for each")
        grids, known = grids or [self.grid(None)] * n, known or [None] * n
        lanes = 1 if mode == "text" else 1 + others_of(sampling)
        requests = []
        for i, document in enumerate(documents):
            what, more = "one token more", 1
            if mode == "draw":
                what, more = "the image to draw", image_length(grids[i] or (1, 1), self.fmt)
            need = len(lay_out(document, self.fmt)) + more
            if need > self.limit:
                raise ValueError(
                    f"prompt and {what} take {need} positions, the model has {self.limit}: shorten the prompt"
                    + " or draw a smaller image" * (mode == "draw")
                )
            random, lane = torch.Generator().manual_seed(seeds[i]), i % sampling.batch * lanes
            main, *others = (Branch(lane + j) for j in range(lanes))
            requests.append(Request(list(document), len(document), mode, grids[i], known[i], random, main, others))
        for start in range(0, n, sampling.batch):
            self.side_by_side(requests[start : start + sampling.batch], sampling)
        return [r.document[r.prompt :] for r in requests]

    def side_by_side(self, requests: Seq[Request], sampling: SampleConfig):
        """Carries requests that fit into memory together to their ends."""
        drawing: list[Request] = []
        for r in requests:
            self.open_image(r, sampling) if r.mode == "draw" else self.refresh(r)
        cache = self.new_cache(requests, sampling)
        # chunks come in many shapes, and blocks compiled for training would compile anew for each of them
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            while any(not r.done for r in requests):
                self.settle(requests, cache, sampling)
                # an image that settle has just opened waits until its <boi> and its other prefixes are cached
                group = [r for r in requests if r.z is not None and all(b.settled == r.final(b) for b in r.branches())]
                if group != drawing:  # the plan serves as long as the same requests draw
                    drawing, plan = group, self.plan(group, cache) if group else None
                if group:
                    self.draw_step(group, plan, cache, sampling)

    def new_cache(self, requests: Seq[Request], sampling: SampleConfig) -> Cache:
        """A cache as long as the requests may become."""
        slots = max(len(r.main.sequence) for r in requests)
        grids = {r.grid for r in requests}
        if requests[0].mode != "draw":
            slots += sampling.max_tokens
            slots += sampling.max_images * max((image_length(g, self.fmt) for g in grids if g), default=0)
        slots = self.limit if None in grids else min(slots, self.limit)
        lanes = 1 + max(branch.lane for r in requests for branch in (r.main, *r.others))
        return self.model.new_cache(lanes, slots, self.dtype)

    def refresh(self, r: Request):
        """Lays the request's document out again."""
        r.main.sequence = lay_out(r.document, self.fmt)

    # ---- writing ----

    def settle(self, requests: Seq[Request], cache: Cache, sampling: SampleConfig):
        """Caches what is final and not cached yet; long spans (prompts) and single tokens go apart."""
        spans: list[Span] = []
        for r in requests:
            for branch in r.branches() if not r.done else []:
                if branch.settled < r.final(branch):
                    spans.append(Span(branch, branch.settled, r.final(branch)))
        logits: dict[Branch, Tensor] = {}  # at the last final position
        single = [s for s in spans if s.stop - s.start == 1]
        longer = [s for s in spans if s.stop - s.start > 1]
        for group in filter(None, (single, longer)):
            chunk = self.chunk(group, cache)
            z = [s.patches for s in group]
            z = torch.from_numpy(np.concatenate([p for p in z if len(p)] or z[:1])).to(self.device)
            clean = torch.zeros(len(chunk.grids), device=self.device)
            found, _ = self.forward(chunk, cache, z, clean, chunk.last)
            for s, row in zip(group, found.float().cpu()):
                s.branch.settled = s.stop
                logits[s.branch] = row
        for r in requests:
            if r.main in logits and r.z is None:
                of_branches = torch.stack([logits[b] for b in r.branches()])
                self.write(r, guide(of_branches, r.weights), sampling)

    def write(self, r: Request, logits: Tensor, sampling: SampleConfig):
        """Draws a request's next token from logits [V] and does what it says."""
        special, fmt = self.fmt.special, self.fmt
        logits = logits.masked_fill(~allowed(r, sampling, self.fmt, self.limit, len(logits)), -torch.inf)
        token = pick(logits, sampling, r.random)
        if r.coded is not None:
            codes = r.document.pop().codes.copy()
            codes.flat[r.coded] = token - fmt.first_code
            r.document.append(Codes(codes))
            r.coded += 1
            for branch, document in zip(r.branches(), self.prefixes(r, sampling)[0]):
                branch.sequence = lay_out(document, fmt)
            if r.coded == codes.size:
                self.finish_image(r)
        elif r.sides is not None:
            r.sides.append(token - fmt.side(1) + 1)
            self.open_image(r, sampling)
        elif token == special.boi:
            self.open_image(r, sampling)
        elif token == special.eos:
            r.done = True
        else:
            own = r.document[-1] if len(r.document) > r.prompt and isinstance(r.document[-1], Text) else None
            ids = np.append(r.document.pop().ids if own else np.zeros(0, np.int64), token)
            r.document.append(Text(ids))
            self.refresh(r)
            r.written += 1
            r.done = r.written >= sampling.max_tokens or len(r.main.sequence) >= self.limit

    # ---- drawing ----

    def open_image(self, r: Request, sampling: SampleConfig):
        """Opens an image behind the document; where its size is to be written, writes that first."""
        grid = r.grid
        if grid is None:
            if r.sides is not None:
                r.document.pop()
            r.sides = r.sides or []
            if len(r.sides) < 2:
                r.document.append(Text(np.array([self.fmt.special.boi, *map(self.fmt.side, r.sides)])))
                self.refresh(r)
                return
            grid, r.sides = tuple(r.sides), None
        r.document.append(self.canvas(grid))
        documents, r.weights = self.prefixes(r, sampling)
        r.guiding = r.others[: len(documents) - 1]
        for branch, document in zip(r.branches(), documents):
            branch.sequence = lay_out(document, self.fmt)
        for branch in r.guiding:
            branch.settled = 0
        if self.fmt.codes:
            r.coded = 0
        else:
            r.noise = torch.randn(r.main.sequence.patches[-grid[0] * grid[1] :].shape, generator=r.random)
            r.noise = r.noise.to(self.device)
            r.z, r.step = r.noise, 0

    def canvas(self, grid: Size) -> Image | Codes:
        """An image of so many rows and columns of patches, with nothing on it."""
        if self.fmt.codes:
            return Codes(np.zeros(grid, np.int64))
        return Image(np.zeros((self.codec.channels, *(n * self.fmt.patch_size for n in grid)), np.float32))

    def prefixes(self, r: Request, sampling: SampleConfig) -> tuple[list[list[Segment]], tuple[float, ...]]:
        """(the document whose image is being drawn, and what is left of it for guidance; how much each counts)."""
        alone = image_alone(self.fmt.special, r.document[-1])
        images = [s for s in r.document if not isinstance(s, Text)]
        everything, seen, nothing = branch_weights(sampling.guidance, sampling.image_guidance)
        if len(images) == 1:
            seen, nothing = 0.0, 1.0 - everything
        weighted = ((r.document, everything), ([alone[0], *images], seen), (alone, nothing))
        documents, weights = zip(*[(d, w) for d, w in weighted if w or d is r.document])
        return list(documents), weights

    def plan(self, group: Seq[Request], cache: Cache) -> Plan:
        """What does not change from step to step while the same requests draw."""
        spans = [(i, Span(b, r.final(b), r.final(b) + len(r.z))) for i, r in enumerate(group) for b in r.branches()]
        sizes = torch.tensor([len(r.z) for r in group])
        first = sizes.cumsum(0) - sizes
        owner = torch.tensor([i for i, _ in spans])
        source = torch.cat([torch.arange(len(group[i].z)) + first[i] for i in owner.tolist()])
        weights = torch.tensor([w for r in group for w in r.weights])
        main = torch.tensor([j == 0 for r in group for j in range(len(r.weights))])
        per_patch = (owner, sizes[owner])
        image_of = torch.repeat_interleave(torch.arange(len(group)), sizes)
        tensors = (image_of, source, first[owner], *(torch.repeat_interleave(x, per_patch[1]) for x in (weights, main)))
        return Plan(self.chunk([s for _, s in spans], cache), *(x.to(self.device) for x in tensors))

    def draw_step(self, group: Seq[Request], plan: Plan, cache: Cache, sampling: SampleConfig):
        """One solver step for every request of the group."""
        c = self.config.diffusion
        schedule = SCHEDULES[c.schedule]
        low, high = sampling.guidance_interval

        def predict(z: Tensor, t: Tensor) -> Tensor:
            """[N, P] guided prediction at z [N, P] as the model reads it, t [N, 1]."""
            _, p = self.forward(plan.chunk, cache, z[plan.source], t[plan.first, 0], plan.chunk.last[:0])
            p, inside = p.float(), ((low <= t) & (t <= high))[plan.source, 0]
            cond = p[plan.main]
            guided = torch.zeros_like(z).index_add(0, plan.source, p * plan.weights[:, None])
            guided = torch.where(inside[plan.main, None], guided, cond)
            return renormalised(guided, cond, plan.image_of) if sampling.renormalise else guided

        times = timesteps(sampling.steps, sampling.t_shift).clamp(max=1.0 if self.codec.limit else START)
        t, t_next = (times[[r.step + i for r in group]].to(self.device)[plan.image_of, None] for i in (0, 1))
        denoise = denoiser_from(predict, c.prediction, schedule, self.codec.limit, c.data_variance)
        z, noise = torch.cat([r.z for r in group]), None
        if sampling.solver in NOISY:
            noise = torch.cat([torch.randn(r.z.shape, generator=r.random) for r in group]).to(self.device)
        z = SOLVERS[sampling.solver](z, t, t_next, denoise, schedule, noise)
        sizes = [len(r.z) for r in group]
        for r, patches, to in zip(group, z.split(sizes), t_next.split(sizes)):
            if r.known is not None:
                patches = torch.where(r.known.keep, add_noise(r.known.patches, r.noise, *schedule(to)), patches)
            r.z, r.step = patches, r.step + 1
            if r.step == sampling.steps:
                blank = r.document.pop().latents
                drawn = unpatchify(r.z.float().cpu().numpy(), self.fmt.patch_size, *blank.shape[1:])
                r.document.append(Image(np.ascontiguousarray(drawn)))
                self.finish_image(r)

    def finish_image(self, r: Request):
        """The drawn image stands in the document; `settle` will encode it clean before the text goes on."""
        self.refresh(r)
        r.z = r.noise = r.coded = None
        r.guiding, r.weights, r.drawn = [], (1.0,), r.drawn + 1
        r.done = r.mode == "draw" or len(r.main.sequence) >= self.limit

    # ---- to the model ----

    def chunk(self, spans: Seq[Span], cache: Cache) -> Chunk:
        return chunk_of(spans, cache, self.fmt, not self.config.model.causal_images, self.device)

    def forward(self, chunk: Chunk, cache: Cache, z: Tensor, t: Tensor, text_at: Tensor):
        """(logits, predictions) of a chunk, whose keys and values go to the cache; t [I]."""
        c, layers = chunk, cache.at(chunk.lanes, chunk.slots, chunk.length)
        return self.model(c.tokens, c.place, c.mask, z, t, c.patch_image, c.grids, c.patch_at, text_at, layers)


def same_number(**lists: Seq):
    """Raises ValueError unless the lists are of one length."""
    if len({len(x) for x in lists.values()}) > 1:
        raise ValueError(f"{', '.join(f'{len(x)} {name}' for name, x in lists.items())}: give as many of each")
