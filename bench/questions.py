"""What is asked: of each question the arms that answer it in turn, and the cases in which they do.

An arm is an answer (`module.function`, see worker.py) in a Python: ours, or the peer's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from content import Case

OWN, PEER = "own", "peer"
MAKE_PEER = """\
python -m venv PEER
PEER/bin/pip install torch==2.13.0
PEER/bin/pip install --no-deps transfusion-pytorch==0.20.0 axial-positional-embedding beartype einops einx frozendict \\
    jaxtyping wadler-lindig loguru numpy tqdm torchdiffeq scipy ema-pytorch rotary-embedding-torch torch-einops-utils"""


@dataclass(frozen=True)
class Arm:
    """One who answers; `change` has the fields of the case that are its own."""

    answer: str
    python: str = OWN
    change: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """`says` heads its table; ratios are to the first of the arms."""

    says: str
    arms: dict[str, Arm]
    cases: tuple[Case, ...]
    axis: str = ""  # of growth: what x is, a key of AXES


def grid(base: Case, **axes: tuple) -> Iterator[Case]:
    """The case at every point of the axes."""
    for values in product(*axes.values()):
        yield replace(base, **dict(zip(axes, values)))


def sized(*cases: Case) -> tuple[Case, ...]:
    """The cases at both sizes of the comparison."""
    return tuple(replace(c, dim=dim, heads=dim // 64) for dim in (256, 512) for c in cases)


def with_images(length: int, images: int, **fields: Any) -> Case:
    """One document of so many positions of content, so many images of 64 patches among them, in a row."""
    return Case(rows=1, images=images, text_tokens=length - 64 * images, **fields)


def of_growth(says: str, axis: str, cases: Iterator[Case] | list[Case]) -> Question:
    return Question(f"Growth: a training step against {says}", TRAINERS, tuple(cases), axis)


def as_large(answer: str) -> dict[str, Arm]:
    """Ours with about as many parameters as transfusion-pytorch has in 8 layers of the same width."""
    return {"ours, 24 layers": Arm(f"ours.{answer}", change={"depth": 24})}


TRAINERS = {"ours": Arm("ours.training"), "transfusion-pytorch": Arm("peer_lucid.training", PEER)}
TEXT = Case(images=0, text_tokens=987)
PACKED = Case(rows=1, images=2, text_tokens=128)  # documents of 256 positions of content
PAPER = Case(documents=8, images=1, side=16, patch_size=2, text_tokens=252, vocab=31994, seq_len=4096)
H100 = replace(PAPER, device="cuda", compile=True, threads=8, peak=(4096, 8192))
SMALL, LARGE = "configs/paper-0.76b-linear.toml", "configs/paper-1.4b-linear.toml"

AXES = {  # what time and memory are drawn against: (its name, x of a line)
    "length": ("positions of a row", lambda line: Case(**line["case"]).positions),
    "rows": ("rows", lambda line: line["case"]["rows"]),
    "size": ("parameters", lambda line: line["facts"]["parameters"]),
    "images": ("images of a document", lambda line: line["case"]["images"]),
}

QUESTIONS = {
    "training": Question(
        "A training step: text and images, rows of 987 positions of content, 6 images of 64 patches each",
        TRAINERS | as_large("training"),
        sized(*grid(Case(), threads=(1, 2))),
    ),
    "text": Question(
        "A training step on text alone, rows of 987 tokens",
        TRAINERS | {"transformers Llama": Arm("peer_llama.training")},
        sized(*grid(TEXT, threads=(1, 2))),
    ),
    "attention": Question(
        "Attention alone, one layer: forward, and backward where there is one",
        {way: Arm("attend.attention", change={"way": way}) for way in ("dense", "documents", "flex", "flex, compiled")},
        (
            *(with_images(length, n) for length in (1024, 4096) for n in (0, length // 128, length // 72)),
            *grid(PACKED, documents=(4, 16)),
        ),
    ),
    "loader": Question(
        "The loader: batches of a step of configs/demo.toml",
        {"ours": Arm("loading.loading")},
        (Case(config="configs/demo.toml"),),
    ),
    "drawing": Question(
        "Drawing: 64 patches by 50 steps of Euler's method behind 16 tokens, batched and cached",
        {"ours": Arm("ours.drawing"), "transfusion-pytorch": Arm("peer_lucid.drawing", PEER), **as_large("drawing")},
        sized(*grid(Case(threads=2), precision=("bf16", "fp32"), batch=(1, 4, 16), guidance=(1.0, 3.0))),
    ),
    "writing": Question(
        "Writing: 64 tokens behind 16, batched and cached",
        {
            "ours": Arm("ours.writing"),
            "transfusion-pytorch": Arm("peer_lucid.writing", PEER),
            "transformers Llama": Arm("peer_llama.writing"),
            **as_large("writing"),
        },
        sized(*grid(replace(TEXT, threads=2), precision=("bf16", "fp32"), batch=(1, 4, 16))),
    ),
    "captioning": Question(
        "Writing: 64 tokens behind 16 and an image, batched and cached",
        {"ours": Arm("ours.writing"), "transfusion-pytorch": Arm("peer_lucid.writing", PEER), **as_large("writing")},
        sized(*grid(Case(threads=2, image_in_prompt=True), precision=("bf16", "fp32"), batch=(1, 4, 16))),
    ),
    "starting": Question(
        "From the start of a process to its end (resume: for one step of configs/demo.toml)",
        {
            "import torch": Arm("starting.starting", change={"way": "torch"}),
            "import transfusion": Arm("starting.starting", change={"way": "transfusion"}),
            "transfusion --help": Arm("starting.starting", change={"way": "help"}),
            "resume to a first step": Arm("starting.starting", change={"way": "resume"}),
            "import transfusion_pytorch": Arm("starting.starting", PEER, {"way": "transfusion_pytorch"}),
            "import transformers' Llama": Arm("starting.starting", change={"way": "transformers"}),
        },
        (Case(config="configs/demo.toml"),),
    ),
    "growth-length": of_growth(
        "the length of one document, half of it images",
        "length",
        [with_images(n, n // 128) for n in (256, 512, 1024, 2048, 4096, 8192, 16384)],
    ),
    "growth-packed": of_growth(
        "the length of a row packed from documents of 256 positions",
        "length",
        grid(PACKED, documents=(1, 2, 4, 8, 16, 32, 64)),
    ),
    "growth-rows": of_growth("the number of rows", "rows", grid(Case(), rows=(1, 2, 4, 8, 16))),
    "growth-size": of_growth(
        "the size of the model",
        "size",
        [replace(Case(rows=1), dim=dim, heads=dim // 64) for dim in (128, 256, 512, 1024)],
    ),
    "growth-images": of_growth(
        "the number of images in a document of 1024 positions",
        "images",
        [with_images(1024, n) for n in (1, 2, 4, 8, 15)],
    ),
    "flops": Question(
        "The paper's 0.16B model: one row of 4096 packed from documents of about 290 positions",
        {"ours": Arm("ours.training"), "ours, profiled": Arm("operators.profiled")},
        tuple(
            grid(
                replace(PAPER, config="configs/paper-0.16b-linear.toml", rows=1, documents=14, text_tokens=30),
                threads=(1, 2),
            )
        ),
    ),
    "gpu": Question(
        "A training step on a GPU, blocks compiled, FlexAttention: rows of 4096, half of them images, or text alone",
        {"ours": Arm("ours.training")},
        tuple(
            replace(H100, config=config, rows=rows, **content)
            for config, rows in ((SMALL, 4), (LARGE, 2))
            for content in ({}, {"images": 0, "text_tokens": 510})
        ),
    ),
    "gpu-drawing": Question(
        "Drawing on a GPU: an image of 256 patches by 50 steps of Euler's method",
        {"ours": Arm("ours.drawing")},
        tuple(grid(replace(H100, config=SMALL, compile=False), batch=(1, 16), guidance=(1.0, 3.0))),
    ),
}
