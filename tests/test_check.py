import json

import numpy as np
import pytest
from PIL import Image
from shard_files import picture, tree, write_table, write_tar
from tiny_run import write_documents, write_tiny

from transfusion.cli import main
from transfusion.data.check import check


def cut(folder) -> bytes:
    """A JPEG whose header is whole."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").unlink()
    return data[: len(data) // 2]


def test_every_image_is_decoded_and_nothing_written(tmp_path):
    broken = cut(tmp_path)
    files = {"a.png": picture(), "a.txt": "a", "b.jpg": broken, "b.txt": "b", "c.png": picture()}
    write_tar(tmp_path / "a.tar", files)
    write_table(tmp_path / "b.parquet", image=[picture(), broken, None, picture()], text=["a", "b", "c", None])
    before = tree(tmp_path)
    found = [one for source in ("a.tar", "b.parquet") for one in check("images", [str(tmp_path / source)])]
    assert [(one.usable, one.left) for one in found] == [
        (1, {"broken or unknown image": (1, ["a.tar/b.jpg"]), "no caption": (1, ["a.tar/c.png"])}),
        (
            1,
            {
                "broken or unknown image": (1, ["b.parquet:1"]),
                "row without an image": (1, ["b.parquet:2"]),
                "no caption": (1, ["b.parquet:3"]),
            },
        ),
    ]
    assert tree(tmp_path) == before


def test_the_summary_names_the_first_of_many(tmp_path):
    lines = [{"text": "good"}] * 4 + [{"no": "text"}] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (found,) = check("text", [str(tmp_path / "a.jsonl")])
    assert found.summary() == (
        f'{tmp_path / "a.jsonl"}: usable 4, left out 5\n  5 x line without "text": a.jsonl:5, a.jsonl:6, a.jsonl:7, ...'
    )


def test_processes_find_what_one_finds(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", {"a.png": picture(), "a.txt": "a", "b.png": b"none"})
    alone = list(check("images", [str(tmp_path)]))
    assert list(check("images", [str(tmp_path)], workers=2)) == alone and len(alone) == 3


def test_the_command_ends_with_1_where_nothing_is_usable(tmp_path, capsys):
    write_tiny(tmp_path / "tiny")
    docs = write_documents(tmp_path / "docs")
    for kind, source in (
        ("images", tmp_path / "tiny/pictures"),
        ("text", tmp_path / "tiny/texts"),
        ("documents", docs),
    ):
        assert main(["data", "check", kind, str(source), "--workers", "0"]) == 0
        assert f"{kind} can be used" in capsys.readouterr().out
    (tmp_path / "none.jsonl").write_text("{}\n")
    assert main(["data", "check", "text", str(tmp_path / "none.jsonl")]) == 1
    assert "0 text can be used" in capsys.readouterr().out
    assert main(["data", "check", "text", str(tmp_path / "gone")]) == 2
    assert "not there: give " in capsys.readouterr().err


def test_the_commands_build_and_encode_what_a_config_names(tmp_path, capsys):
    write_tiny(tmp_path / "tiny")
    out = tmp_path / "built"
    assert main(["data", "build", "images", str(tmp_path / "tiny/pictures"), "--out", str(out)]) == 0
    assert f"data.images={out}" in capsys.readouterr().out
    config = [str(tmp_path / "tiny/tiny.toml"), f"data.images={out}", "data.codec=pretrained:emoji"]
    assert main(["data", "encode", *config]) == 0
    assert f"{out}: latents in {out / 'latents'}" in capsys.readouterr().out
    assert main(["data", "encode", config[0]]) == 2
    assert "names no built images: build them by" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["images", "text", "documents"])
def test_a_shard_that_cannot_be_read_is_told(tmp_path, kind, monkeypatch):
    def gone(*rest):
        raise OSError("the disk is gone")

    names = {"images": "a.tar", "text": "a.jsonl", "documents": "documents.jsonl"}
    (tmp_path / names[kind]).write_bytes(b"x")
    monkeypatch.setattr("transfusion.data.rows.open_url", gone)
    monkeypatch.setattr("transfusion.data.tars.open_url", gone)
    (found,) = check(kind, [str(tmp_path / names[kind])])
    assert found.left == {"shard that cannot be read": (1, ["the disk is gone"])} and found.usable == 0
