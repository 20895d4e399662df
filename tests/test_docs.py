"""The pages of docs/: every diff fits the code as it is, every number and every test they name is there."""

import ast
import re
from pathlib import Path

import pytest

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
    sequence, batch, noise = found["sequence"], found["batch"], found["noise"]
    assert sequence.tokens[:5].tolist() == [1, 1165, 964, 318, 3] and len(sequence) == 23
    assert sequence.patches.shape == (16, 768)
    assert (batch.n_targets, batch.n_images, len(batch.patches)) == (1625, 135, 2160)
    apple = batch.patch_image == 97
    assert (batch.patches[apple].numpy() == sequence.patches).all()
    assert (batch.patch_at[apple][0], batch.patch_at[apple][-1]) == (2634, 2649)
    assert noise.t[97].item() == pytest.approx(0.409, abs=5e-4)
    assert found["lm"].item() / batch.n_targets == pytest.approx(8.41, abs=5e-3)


def test_every_test_that_the_architecture_page_names_exists():
    page = (ROOT / "docs/architecture.md").read_text()
    for row in re.findall(r"^\|[^|]*\| (`test_.*) \|$", page, re.M):
        for part in re.split(r"; (?=`test_)", row):
            file, _, names = part.partition(":")
            code = (ROOT / "tests" / f"{file.strip('`')}.py").read_text()
            for name in re.split("[;,]", names):
                name = re.sub(r"\(.*\)", "", name).replace("...", "").strip()
                assert f"def test_{name.replace(' ', '_')}" in code, f"{file} has no test that {name!r}"
