"""A folder of little pictures with captions, some text, and a config whose training takes a second."""

from pathlib import Path

from PIL import Image, ImageDraw

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


def write_tiny(folder: Path) -> Path:
    """The config's path; pictures, captions and texts lie beside it."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "texts").mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            picture = Image.new("RGB", (20, 20), "white")
            SHAPES[shape](ImageDraw.Draw(picture), colour)
            picture.save(folder / "pictures" / f"{colour}-{shape}.png")
            (folder / "pictures" / f"{colour}-{shape}.txt").write_text(f"{colour} {shape}\n")
    triples = [(a, b, c) for a in COLOURS for b in SHAPES for c in COLOURS]
    lines = [f"Line {i}: a {a} {b} stands by the {c} {b}.\n" for i, (a, b, c) in enumerate(triples)]
    (folder / "texts" / "lines.txt").write_text("".join(lines))
    config = folder / "tiny.toml"
    config.write_text(CONFIG.format(folder=folder.as_posix()))
    return config
