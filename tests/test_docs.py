"""The pages of docs/: every diff fits the code as it is, every number and every test they name is there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from transfusion.config import load_config, override
from transfusion.model.transformer import parameter_counts
from transfusion.optim import build_optimizers
from transfusion.run import RunConfig

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: str, kind: str) -> list[str]:
    return [body for k, body in BLOCK.findall(page) if k == kind]


WALKS = re.split(r"^## (?=\d)", (ROOT / "docs/extend.md").read_text(), flags=re.M)[1:]


@pytest.mark.parametrize("walk", WALKS, ids=[w.splitlines()[0] for w in WALKS])
def test_every_diff_of_a_walk_fits_the_code_and_leaves_it_valid(walk):
    files: dict[str, str] = {}
    for block in blocks(walk, "diff"):
        head, _, rest = block.partition("\n")
        sign, name = head.split()
        text = files.get(name) or ((ROOT / name).read_text() if sign == "---" else "")
        assert sign == "---" or not (ROOT / name).exists()
        for hunk in re.split(r"^@@\n", rest, flags=re.M):
            lines = hunk.splitlines()
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", s)) for s in "-+")
            assert sign == "+++" or text.count(old) == 1, f"{name} has {text.count(old)} places for\n{old}"
            text = text.replace(old, new) if old else new
        files[name] = text
    assert files
    for name, text in files.items():
        if name.endswith(".py"):
            ast.parse(text, name)


def test_the_batch_that_the_architecture_page_follows_is_the_one_it_shows():
    page, found = (ROOT / "docs/architecture.md").read_text(), {}
    exec(blocks(page, "python")[0].replace('"configs', f'"{ROOT}/configs'), found)
    config, sequence, batch, noise = (found[name] for name in ("config", "sequence", "batch", "noise"))
    model, train = config.model, config.train
    packer = found["Packer"](found["corpus"], found["fmt"], config.seed, train.rows, train.seq_len)
    assert sequence.tokens[:5].tolist() == [1, 1165, 964, 318, 3] and len(sequence) == 23
    assert sequence.patches.shape == (16, 768)
    assert sequence.place[[4, 5, 20, 21]].tolist() == [[4, 4, 0, 0], [5, 5, 0, 0], [8, 8, 3, 3], [9, 9, 0, 0]]
    assert (batch.n_targets, batch.n_images, len(batch.patches)) == (1403, 147, 2352)
    assert batch.place.shape == (32, 128, 4) and (batch.document < 0).sum() == 32
    apple = batch.patch_image == 91
    assert (batch.patches[apple].numpy() == sequence.patches).all()
    assert (batch.patch_at[apple][0], batch.patch_at[apple][-1]) == (2529, 2544)
    assert noise.t[91].item() == pytest.approx(0.347, abs=5e-4)
    assert found["lm"].item() / batch.n_targets == pytest.approx(7.66, abs=1e-2)
    assert found["image"].item() / batch.n_images == pytest.approx(0.84, abs=5e-3)
    assert [f"{n / 1e6:.2f} M" for _, n in parameter_counts(found["model"])] == ["5.31 M", "1.57 M", "1.02 M"]
    groups = [len(g["params"]) for o in build_optimizers(found["model"], config.optim) for g in o.param_groups]
    assert groups == [21, 12, 23]
    said = " ".join(page.split())  # the page itself, so that neither it nor the numbers above can go their own way
    for words in (
        f"{train.rows} rows a step, a transformer of {model.n_layers} layers and width {model.dim}",
        f"[1403, {found['tokenizer'].vocab_size}]",
        f"image documents {batch.n_images} p ... {batch.n_images} p + {batch.n_images - 1}",
        f"from token {packer.text_per_pack} p of that on, as a pack has room for {packer.text_per_pack} on average",
        f"7.66 + {train.image_weight:g} * 0.84",
        "image 91 of the batch: patches 1456 ... 1471, at flat positions 2529 ... 2544",
        "the apple gets t = 0.347",
        "Of the step's 4096 positions 32 are padding",
        "the rest in two groups: 12 matrices and kernels with weight decay, as Muon's have, 23 norms",
        "5.31 M trunk, 1.57 M embedding and head, 1.02 M patch layers",
    ):
        assert words in said, words


def test_the_layers_of_the_architecture_page_are_those_that_lint_imports_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["containers"] == ["transfusion"])
    drawing = (ROOT / "docs/architecture.md").read_text().split("## The layers")[1].split("```")[1]
    column = drawing.index("the command line") - 1  # where what a layer is for begins
    shown = [set(line[:column].split()) for line in drawing.strip("\n").splitlines()]
    assert shown == [set(layer.split(" | ")) for layer in layers]


def test_every_test_that_the_architecture_page_names_exists():
    page = (ROOT / "docs/architecture.md").read_text()
    for row in re.findall(r"^\|[^|]*\| (`test_.*) \|$", page, re.M):
        for part in re.split(r"; (?=`test_)", row):
            file, _, names = part.partition(":")
            code = (ROOT / "tests" / f"{file.strip('`')}.py").read_text()
            for name in re.split("[;,]", names):
                name = re.sub(r"\(.*\)", "", name).replace("...", "").strip()
                assert f"def test_{name.replace(' ', '_')}" in code, f"{file} has no test that {name!r}"


def test_every_command_of_the_pages_names_a_model_that_can_be_built():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = re.findall(r"^transfusion (?:train|plan) (configs/\S+\.toml)(.*)$", text, re.M)
    assert len(commands) >= 5
    for config, rest in commands:
        sizes = [size for size in re.findall(r"model\.(\w+=\S+)", rest) if not size.startswith("patches=")]  # walk 3's
        override(load_config(RunConfig, ROOT / config).model, sizes)
