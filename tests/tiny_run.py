"""A folder of little pictures with captions, some text, documents with images anywhere, and configs, of a model and of
a codec, whose training takes a second."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from transfusion.shards import kinds, read_shards

COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = {
    "square": lambda pen, colour: pen.rectangle((4, 4, 15, 15), colour),
    "disc": lambda pen, colour: pen.ellipse((3, 3, 16, 16), colour),
    "bar": lambda pen, colour: pen.rectangle((0, 8, 19, 11), colour),
    "frame": lambda pen, colour: pen.rectangle((4, 4, 15, 15), None, colour, 2),
}

CONFIG = """
device = "cpu"
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
patch_size = 8
[data]
images = "{folder}/pictures"
text = "{folder}/texts"
image_size = 16
[diffusion]
schedule = "linear"
prediction = "x0"
[optim]
lr = 3e-3
warmup_steps = 5
ema = 0.9
[train]
steps = 30
rows = 2
seq_len = 64
precision = "fp32"
save_every = 10
[sample]
steps = 2
max_tokens = 8
"""

CODEC = """
device = "cpu"
[codec]
width = 8
multipliers = [1, 2]
blocks = 1
groups = 4
latent_channels = 3
[discriminator]
width = 8
layers = 1
[loss]
gan_start = 1
[data]
images = "{folder}/pictures"
image_size = 16
[train]
steps = 4
batch = 2
precision = "fp32"
save_every = 2
"""


def write_tiny(folder: Path) -> Path:
    """The config's path; pictures, captions, texts and a codec.toml lie beside it."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "texts").mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            draw(folder / "pictures", colour, shape, (20, 20))
            (folder / "pictures" / f"{colour}-{shape}.txt").write_text(f"{colour} {shape}\n")
    triples = [(a, b, c) for a in COLOURS for b in SHAPES for c in COLOURS]
    lines = [f"Line {i}: a {a} {b} stands by the {c} {b}.\n" for i, (a, b, c) in enumerate(triples)]
    (folder / "texts" / "lines.txt").write_text("".join(lines))
    config = folder / "tiny.toml"
    for file, text in ((config, CONFIG), (folder / "codec.toml", CODEC)):
        file.write_text(text.format(folder=folder.as_posix()))
    return config


def draw(folder: Path, colour: str, shape: str, size: tuple[int, int]) -> str:
    """The name of a new file in the folder: that shape, in a picture of (width, height) pixels."""
    picture, name = Image.new("RGB", size, "white"), f"{colour}-{shape}.png"
    SHAPES[shape](ImageDraw.Draw(picture), colour)
    picture.save(folder / name)
    return name


def write_documents(folder: Path) -> Path:
    """The folder of documents: edits, discs of 16 x 16 and bars of 16 x 24 pixels, two of them held out; and stories
    that go on behind an image to be drawn."""
    folder.mkdir()
    lines = []
    for shape, width in (("disc", 16), ("bar", 24)):
        files = {colour: {"image": draw(folder, colour, shape, (width, 16))} for colour in COLOURS}
        for a, b in pairwise(COLOURS):
            edit = [{**files[a], "learn": False}, f"make it {b}", files[b]]
            lines.append({"segments": edit, "split": "train" if a != COLOURS[0] else "held_out", "to": b})
            lines.append({"segments": [f"{a}, then", files[a], f"and {b}", files[b], "and no more"], "split": "train"})
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the names that they are stored under."""
    tensors = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds(checkpoint).items()}
    read_shards(tensors, checkpoint)
    return tensors
