"""What is asked: of each question the arms that answer it in turn, the cases in which they do, and what must come out.

An arm is an answer (`module.function`, see answer.py) in a Python: ours, or the peer's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from content import Case

OWN, PEER = "own", "peer"
MAKE_PEER = """\
python -m venv PEER
PEER/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu  # for a GPU without the index
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
    expected: tuple[str, str] = ("", "")  # of growth: exponents of seconds and of memory, as the algorithms have them


@dataclass(frozen=True)
class Bar:
    """What an arm is to reach in the cases that `where` picks, against another one's better precision."""

    says: str
    measure: str  # a key of page.py's MEASURES
    bar: float
    aim: float
    question: str
    arm: str = "ours"
    against: str = ""
    where: dict[str, Any] = field(default_factory=dict)


def grid(base: Case, **axes: tuple) -> Iterator[Case]:
    """The case at every point of the axes."""
    for values in product(*axes.values()):
        yield replace(base, **dict(zip(axes, values)))


def sized(*cases: Case) -> tuple[Case, ...]:
    """The cases at both sizes of the comparison."""
    return tuple(replace(c, dim=dim, heads=dim // 64) for dim in (256, 512) for c in cases)


def with_images(length: int, images: int) -> Case:
    """One document of so many positions of content, so many images of 64 patches among them, in a row."""
    return replace(BOTH, rows=1, images=images, text_tokens=length - 64 * images)


def of_growth(says: str, axis: str, cases: Iterator[Case] | list[Case], *expected: str) -> Question:
    return Question(f"Growth: a training step against {says}", OURS, tuple(cases), axis, expected)


def with_lucid(answer: str) -> dict[str, Arm]:
    return {"ours": Arm(f"ours.{answer}"), LUCID: Arm(f"peer_lucid.{answer}", PEER)}


def as_large(answer: str, **change) -> dict[str, Arm]:
    """Ours with about as many parameters as transfusion-pytorch has in 8 layers of the same width."""
    return {"ours, 24 layers": Arm(f"ours.{answer}", change={"depth": 24} | change)}


def compiled(answer: str) -> dict[str, Arm]:
    return {"ours, compiled": Arm(f"ours.{answer}", change={"compile": True})}


def precisions(arms: dict[str, Arm]) -> dict[str, Arm]:
    """The arms, and each of them in fp32."""
    return arms | {f"{name}, fp32": replace(arm, change=arm.change | FP32) for name, arm in arms.items()}


ROW_BY_ROW = {"row_by_row": True}
LUCID, LLAMA, FP32 = "transfusion-pytorch", "transformers Llama", {"precision": "fp32"}
OURS = {"ours": Arm("ours.training")}
BOTH = Case(threads=2)
TEXT = Case(images=0, text_tokens=987, threads=2)
PACKED = Case(rows=1, images=2, text_tokens=128, threads=2)  # documents of 256 positions of content
MIXED, READ = replace(BOTH, guidance=3.0), replace(BOTH, image_in_prompt=True)
PAPER = Case(documents=8, images=1, side=16, patch_size=2, text_tokens=252, vocab=31994, seq_len=4096)
H100 = replace(PAPER, device="cuda", compile=True, threads=8, peak=(4096, 8192))
LEAST, SMALL, LARGE = (f"configs/paper-{size}-linear.toml" for size in ("0.16b", "0.76b", "1.4b"))

AXES = {  # what time and memory are drawn against: (its name, x of a line)
    "length": ("positions of a row", lambda line: Case(**line["case"]).positions),
    "rows": ("rows", lambda line: line["case"]["rows"]),
    "size": ("parameters", lambda line: line["facts"]["parameters"]),
    "images": ("images of a document", lambda line: line["case"]["images"]),
}

QUESTIONS = {  # in the order of what matters most
    "training": Question(
        "A training step: text and images, rows of 987 positions of content, 6 images of 64 patches each",
        {
            "ours": Arm("ours.training", change=ROW_BY_ROW),
            "ours, rows at once": Arm("ours.training"),
            LUCID: Arm("peer_lucid.training", PEER),
            f"{LUCID}, row by row": Arm("peer_lucid.training", PEER, ROW_BY_ROW),
        }
        | as_large("training", **ROW_BY_ROW),
        sized(BOTH, Case()),
    ),
    "drawing": Question(
        "Drawing: 64 patches by 50 steps of Euler's method behind 16 tokens, batched and cached",
        with_lucid("drawing") | compiled("drawing"),
        (
            *sized(*grid(MIXED, batch=(1, 16)), replace(MIXED, **FP32)),
            *grid(BOTH, batch=(1, 4, 16)),
            replace(MIXED, batch=4),
            replace(MIXED, threads=1),
        ),
    ),
    "writing": Question(
        "Writing: 64 tokens behind 16, batched and cached",
        precisions(with_lucid("writing") | {LLAMA: Arm("peer_llama.writing")})
        | as_large("writing")
        | compiled("writing"),
        (*sized(*grid(TEXT, batch=(1, 16))), replace(TEXT, batch=4), replace(TEXT, threads=1)),
    ),
    "requests": Question(
        "32 requests, writing 64 tokens and drawing 64 patches by 50 steps in turn: together, or one after the other",
        {"together": Arm("ours.requests"), "one by one": Arm("ours.requests", change={"way": "one by one"})},
        sized(replace(MIXED, batch=32)),
    ),
    "flops": Question(
        "The paper's 0.16B model: one row of 4096 packed from documents of about 290 positions, or of text alone",
        OURS
        | {
            "ours, text alone": Arm("ours.training", change={"images": 0, "text_tokens": 290}),
            "ours, profiled": Arm("operators.profiled"),
        },
        (replace(PAPER, config=LEAST, rows=1, documents=14, text_tokens=32, threads=2),),
    ),
    "starting": Question(
        "From the start of a process to its end (resume: to the first step of configs/demo.toml)",
        {
            "import torch": Arm("starting.starting", change={"way": "torch"}),
            "import transfusion": Arm("starting.starting", change={"way": "transfusion"}),
            "from transfusion import load": Arm("starting.starting", change={"way": "load"}),
            "transfusion --help": Arm("starting.starting", change={"way": "help"}),
            "resume to a first step": Arm("starting.starting", change={"way": "resume"}),
            "import transfusion_pytorch": Arm("starting.starting", PEER, {"way": "transfusion_pytorch"}),
            "import transformers' Llama": Arm("starting.starting", change={"way": "transformers"}),
        },
        (Case(config="configs/demo.toml", threads=2),),
    ),
    "attention": Question(
        "Attention alone, one layer, forward and backward: rows of one document, or of several of 256 positions",
        {way: Arm("attend.attention", change={"way": way}) for way in ("dense", "documents")},
        (
            *(with_images(length, n) for length in (256, 960, 4096) for n in (0, length // 128, length // 72)),
            *grid(PACKED, documents=(4, 16)),
        ),
    ),
    "captioning": Question(
        "Writing: 64 tokens behind 16 and an image, batched and cached",
        precisions(with_lucid("writing")) | compiled("writing"),
        (*sized(*grid(READ, batch=(1, 16))), replace(READ, batch=4)),
    ),
    "text": Question(
        "A training step on text alone, rows of 987 tokens",
        with_lucid("training") | {LLAMA: Arm("peer_llama.training")},
        sized(TEXT),
    ),
    "compiled": Question(
        "A training step with blocks compiled or not",
        OURS | compiled("training"),
        sized(BOTH),
    ),
    "loader": Question(
        "The loader: the batches of 8 steps of configs/demo.toml",
        {"ours": Arm("loading.loading")},
        (Case(config="configs/demo.toml"),),
    ),
    "growth-length": of_growth(
        "the length of one document, half of it images",
        "length",
        [with_images(n, n // 128) for n in (256, 512, 1024, 2048, 4096, 8192, 16384)],
        "1, to 2 as attention outweighs products",
        "1, to 2 as the mask outweighs activations",
    ),
    "growth-packed": of_growth(
        "the length of a row packed from documents of 256 positions",
        "length",
        grid(PACKED, documents=(1, 2, 4, 8, 16, 32, 64)),
        "1",
        "1",
    ),
    "growth-rows": of_growth("the number of rows", "rows", grid(BOTH, rows=(1, 2, 4, 8, 16)), "1", "1"),
    "growth-size": of_growth(
        "the size of the model",
        "size",
        [replace(BOTH, rows=1, dim=dim, heads=dim // 64) for dim in (128, 256, 512, 1024)],
        "1/2 (attention, norms: by width), to 1 (products)",
        "1/2 (activations), to 1 (weights)",
    ),
    "growth-images": of_growth(
        "the number of images in a document of 1024 positions",
        "images",
        [with_images(1024, n) for n in (1, 2, 4, 8, 15)],
        "0",
        "0",
    ),
    "gpu": Question(
        "A training step on a GPU, blocks compiled, FlexAttention: rows of 4096, half of them images, or text alone",
        OURS | {"ours, float8": Arm("ours.training", change={"float8": True})},
        tuple(
            replace(H100, config=config, rows=rows, **content)
            for config, rows in ((SMALL, 4), (LARGE, 2))
            for content in ({}, {"images": 0, "text_tokens": 510})
        ),
    ),
    "gpu-fsdp": Question(  # by itself: processes of more arms on larger models would not fit a GPU together
        "The paper's 0.16B model on a GPU, compiled, FlexAttention, 8 rows of 4096: alone, or by FSDP2 of one rank",
        OURS | {"ours, FSDP2": Arm("ours.training", change={"fsdp": True})},
        (replace(H100, config=LEAST, rows=8),),
    ),
    "gpu-drawing": Question(
        "Drawing on a GPU: an image of 256 patches by 50 steps of Euler's method",
        {"ours": Arm("ours.drawing")},
        tuple(grid(replace(H100, config=SMALL, compile=False), batch=(1, 16), guidance=(1.0, 3.0))),
    ),
}

BARS = (
    *(
        bar
        for against in (LUCID, f"{LUCID}, row by row")
        for bar in (
            Bar("training, positions / s", "times", 6, 12, "training", "ours", against, {"threads": 2}),
            Bar("peak memory of a training step", "memory", 1 / 5, 1 / 10, "training", "ours", against, {"threads": 2}),
        )
    ),
    *(
        Bar(f"{does}{how.removeprefix('ours')}", "times", bar, aim, question, how, against, among)
        for question, does, against, bar, aim, where in (
            ("drawing", "drawing, images / s", LUCID, 10, 25, {"guidance": 3.0}),
            ("writing", "writing, tokens / s", LUCID, 5, 10, {}),
            ("writing", "writing, tokens / s", LLAMA, 1.5, 3, {}),
        )
        for among in ({"threads": 2, "batch": n} | where for n in (1, 16))
        for how in ("ours", "ours, compiled")
    ),
    Bar("forward and backward on a CPU", "MFU", 0.30, 0.45, "flops"),
    Bar("a mixed row against one of text: seconds a FLOP", "per FLOP", 1.10, 1.03, "flops", against="ours, text alone"),
    Bar("32 requests", "times", 3, 5, "requests", arm="together", against="one by one"),
    Bar("resume", "seconds", 5, 5, "starting", arm="resume to a first step"),
    Bar("import transfusion", "seconds", 1.5, 1.5, "starting", arm="import transfusion"),
    Bar("from transfusion import load", "seconds", 1.5, 1.5, "starting", arm="from transfusion import load"),
    Bar("transfusion --help", "seconds", 0.3, 0.3, "starting", arm="transfusion --help"),
    Bar("training on a GPU", "MFU", 0.40, 0.50, "gpu", where={"images": 1}),
)
