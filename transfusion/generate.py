"""The Engine: text and images in, text and images out, from a trained model (section 3.3).

prompt    "a cat", or [image, "what is it"]        ->  document   [Text <bos> ..., Image, ...]
document  ->  request  ->  answer                      the model writes text until <boi>, draws the image by
                                                       diffusion, closes it with <eoi>, writes on (batching.py)
answer    [Text, Image]                            ->  ["...", PIL.Image]
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from transfusion.batching import Batching
from transfusion.codec.codec import Codec
from transfusion.data.images import to_pixels
from transfusion.model.compiled import compiled_trunk
from transfusion.model.precision import at_precision
from transfusion.model.transformer import Transfusion
from transfusion.request import MODES, Known, Request, Size
from transfusion.run import RunConfig, SampleConfig, codec_of, format_of, uses_bf16
from transfusion.sequence import Codes, Image, Segment, Text, image_length, lay_out, patchify
from transfusion.tokenizer import Tokenizer

Prompt = str | PIL.Image.Image | Seq[str | PIL.Image.Image]
Answer = list[str | PIL.Image.Image]


class Engine:
    """Text and images from a trained model, on the model's device. Made by `transfusion.load`."""

    def __init__(
        self,
        model: Transfusion,
        tokenizer: Tokenizer,
        config: RunConfig,
        codec: Codec | None = None,
        compile: bool = False,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = model.norm.weight.device
        bf16 = uses_bf16(config.train.precision, self.device)
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of the products
        self.codec = codec or codec_of(config, self.device)
        self.fmt = format_of(config, tokenizer, self.codec)
        self.limit = config.train.seq_len
        self.trunk = compiled_trunk(self.sampled) if compile else None

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

    # ---- requests ----

    @cached_property
    def sampled(self) -> Transfusion:
        """The model at the precision of the products. Where it trains on make a new engine: matrices may be copies."""
        return at_precision(self.model, self.dtype)

    def batching(self) -> Batching:
        """Nothing yet; what is submitted to it is carried on together. A server keeps one, and calls its `step`."""
        # keys and values stay float32 on a CPU, whose attention to few queries is slower in bfloat16
        cached = torch.float32 if self.device.type == "cpu" else self.dtype
        return Batching(self.sampled, self.fmt, self.codec, self.config.diffusion, self.limit, cached, self.trunk)

    def request(
        self,
        document: Seq[Segment],
        mode: str,
        seed: int,
        sampling: SampleConfig,
        grid: Size | None = None,
        known: Known | None = None,
    ) -> Request:
        """A request to go on with a document; ValueError where it cannot be."""
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: choose one of {', '.join(MODES)}")
        if self.fmt.codes and (sampling.guidance_interval != (0.0, 1.0) or sampling.renormalise):
            raise ValueError("guidance_interval and renormalise are of diffusion: this model writes images as codes")
        grid = grid or self.grid(None)
        image = image_length(grid, self.fmt) if grid else self.limit  # at most
        what, least = "one token more", 1
        for side in grid or () if self.fmt.sides else ():
            self.fmt.side(side)  # refuses one that cannot be written, before others are under way beside it
        if mode == "draw":
            what, least = "the image to draw", image_length(grid or (1, 1), self.fmt)
        n = len(lay_out(document, self.fmt))
        if n + least > self.limit:
            raise ValueError(
                f"prompt and {what} take {n + least} positions, the model has {self.limit}: shorten the prompt"
                + " or draw a smaller image" * (mode == "draw")
            )
        text = sampling.max_tokens
        most = {"draw": image, "text": text, "auto": text + sampling.max_images * image}[mode]
        slots, random = min(n + most, self.limit), torch.Generator().manual_seed(seed)
        return Request(list(document), len(document), mode, grid, known, random, sampling, slots)

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
        n = len(documents)
        seeds = [seed + i for i in range(n)] if isinstance(seed, int) else list(seed)
        if len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} prompts: give one number, or one for each")
        each = zip(documents, seeds, grids or [None] * n, known or [None] * n, strict=True)
        requests = [self.request(d, mode, s, sampling, grid, k) for d, s, grid, k in each]
        batching = self.batching()
        for r in requests:
            batching.submit(r)
        while not all(r.done for r in requests):
            for r in batching.step():
                if r.error:
                    raise r.error
        return [r.answer for r in requests]


def same_number(**lists: Seq):
    """Raises ValueError unless the lists are of one length."""
    if len({len(x) for x in lists.values()}) > 1:
        raise ValueError(f"{', '.join(f'{len(x)} {name}' for name, x in lists.items())}: give as many of each")
