import json
import shutil

import numpy as np
import pytest
from PIL import Image
from shard_files import picture, tree, write_table, write_tar
from tiny_run import write_documents, write_tiny

from transfusion.cli import main
from transfusion.data.build import build
from transfusion.data.check import check
from transfusion.data.tars import find_members


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


def test_the_commands_build_and_encode_what_a_config_names(tmp_path, capsys, monkeypatch):
    write_tiny(tmp_path / "tiny")
    out = tmp_path / "built"
    assert main(["data", "build", "images", str(tmp_path / "tiny/pictures"), "--out", str(out)]) == 0
    assert f"data.images={out}" in capsys.readouterr().out
    config = [str(tmp_path / "tiny/tiny.toml"), f"data.images={out}", "data.codec=pretrained:emoji"]
    assert main(["data", "encode", *config]) == 0
    assert f"{out}: latents in {out / 'latents'}" in capsys.readouterr().out
    shutil.rmtree(out / "latents")
    for rank, said in ((1, ""), (0, f"{out}: latents in ")):  # of two that torchrun starts the first has the one block
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        assert main(["data", "encode", *config]) == 0
        assert said in capsys.readouterr().out and len(list(out.glob("latents/*/latents.json"))) == (rank == 0)
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


def test_a_built_folder_is_checked_by_its_checksums(tmp_path, capsys):
    write_tiny(tmp_path / "tiny")
    write_documents(tmp_path / "docs")
    for kind, source in (("images", "tiny/pictures"), ("text", "tiny/texts"), ("documents", "docs")):
        out = tmp_path / "built" / kind
        assert main(["data", "build", kind, str(tmp_path / source), "--out", str(out), "--workers", "0"]) == 0
        n = int(capsys.readouterr().out.split("kept ")[-1].split(",")[0])
        assert main(["data", "check", kind, str(out), "--workers", "0"]) == 0
        assert f"left out 0\n{n} {kind} can be used" in capsys.readouterr().out


def test_images_that_have_changed_and_the_documents_that_show_them_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transfusion.data.check.AT_ONCE", 2)
    monkeypatch.setattr("transfusion.data.check.STRETCH", 3)
    (tmp_path / "docs").mkdir()
    colours = ("red", "blue", "green", "white")
    files = {
        f"{colour}.{end}": picture(colour) if end == "png" else colour for colour in colours for end in ("png", "txt")
    }
    tar = write_tar(tmp_path / "docs" / "0.tar", files)
    told = [["red", "blue"], ["green"], ["blue"], ["white", "green"], ["white"]]
    lines = [{"segments": ["see", *({"image": f"0.tar/{one}.png"} for one in own)]} for own in told]
    (tmp_path / "docs" / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build("images", [str(tar)], tmp_path / "images")
    build("documents", [str(tmp_path / "docs")], tmp_path / "documents")
    data = bytearray(tar.read_bytes())
    data[find_members(str(tar))["blue.png"][0] + 50] ^= 1
    tar.write_bytes(data)
    changed = "bytes that have changed since it was built"
    found = list(check("images", [str(tmp_path / "images")]))
    assert [(one.usable, one.left) for one in found] == [(2, {changed: (1, ["blue"])}), (1, {})]
    assert found[1].url == f"{tmp_path / 'images'}, 3 ... 3"
    found = list(check("documents", [str(tmp_path / "documents")]))
    lost = [f"documents.jsonl:{i}" for i in (1, 3)]
    assert [(one.usable, one.left) for one in found] == [(1, {changed: (2, lost)}), (2, {})]
    tar.unlink()
    (first, _) = check("images", [str(tmp_path / "images")])
    ((reason, (n, names)),) = first.left.items()
    assert (reason, n) == ("file that cannot be read", 3) and "FileNotFoundError" in names[0]


@pytest.mark.parametrize("kind", ["images", "text", "documents"])
def test_every_file_of_a_built_folder_is_proven_by_its_checksum(tmp_path, kind):
    write_tiny(tmp_path / "tiny")
    write_documents(tmp_path / "docs")
    source = {"images": "tiny/pictures", "text": "tiny/texts", "documents": "docs"}[kind]
    dataset = build(kind, [str(tmp_path / source)], tmp_path / "built")
    arrays = {path.name for path in (tmp_path / "built").glob("*.npy")}
    assert arrays <= set(dataset["files"]) and len(arrays) >= 1
    for name, (size, _) in dataset["files"].items():
        data = bytearray((tmp_path / "built" / name).read_bytes())
        assert len(data) == size
        data[-1] ^= 1
        (tmp_path / "built" / name).write_bytes(data)
        (found,) = check(kind, [str(tmp_path / "built")])
        assert found.left == {"file that has changed: remove it, and build the data anew": (1, [name])}
        assert not found.usable
        (tmp_path / "built" / name).unlink()
        build(kind, [str(tmp_path / source)], tmp_path / "built")
        assert all(not one.left and one.usable for one in check(kind, [str(tmp_path / "built")]))
