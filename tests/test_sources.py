"""A run on built folders is the run on the sources that they were built of, batch by batch."""

import json
from pathlib import Path

import numpy as np
import pytest
from shard_files import picture, write_tar
from test_loader import same
from tiny_run import write_documents, write_tiny

from transfusion.cli import main
from transfusion.codec.codec import PIXELS
from transfusion.codec.load import load_codec
from transfusion.data.build import build
from transfusion.data.corpus import build_corpus
from transfusion.data.documents import DataConfig
from transfusion.data.encode import encode_built
from transfusion.data.loader import Packer, load_batches
from transfusion.data.windows import LEAST_TEXT
from transfusion.metrics import read_records
from transfusion.sequence import Format
from transfusion.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
FMT = Format(TOKENIZER.special, 8)
KINDS = {"images": "pictures", "text": "texts", "documents": "docs"}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Folders of the tiny run and, below built/, what is built of them; some captions and documents are long."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    write_documents(folder / "docs")
    (folder / "pictures" / "red-disc.txt").write_text("a red disc " * 20 + "\nred disc")
    (folder / "pictures" / "red-bar.txt").write_text("a red bar " * 20)
    with (folder / "docs" / "documents.jsonl").open("a") as file:
        file.write(json.dumps({"segments": ["long " * 80, {"image": "red-disc.png"}], "split": "train"}) + "\n")
    for kind, name in KINDS.items():
        build(kind, [str(folder / name)], folder / "built" / name)
    return folder


def config_of(folder: Path, **more) -> DataConfig:
    names = {kind: (str(folder / name),) for kind, name in KINDS.items()}
    return DataConfig(**{**names, "buckets": ("16x16", "16x24"), **more})


def batches(config: DataConfig, steps: int, codec=PIXELS, workers: int = 0, fmt=FMT, seq_len: int = 64) -> list:
    corpus, _ = build_corpus(config, TOKENIZER, codec, fmt, seq_len)
    packer = Packer(corpus, fmt, 0, 4, seq_len)
    return [batch for step in load_batches(packer, 0, steps, workers, False) for batch in step]


@pytest.mark.parametrize("conditioning", ["noised", "clean"])
def test_batches_of_built_data_are_those_of_the_data_in_memory(data, conditioning):
    memory, built = (batches(config_of(folder, conditioning=conditioning), 12) for folder in (data, data / "built"))
    assert len(memory) == 12 and all(same(a, b) for a, b in zip(memory, built))
    assert sum(len(b.grids) for b in built) > 40 and (memory[0].document >= 0).sum() > LEAST_TEXT


@pytest.mark.parametrize("seq_len", [24, 40, 64, 400])
def test_the_same_is_left_out_for_its_length(data, seq_len):
    found = [
        build_corpus(config_of(folder, conditioning="clean"), TOKENIZER, PIXELS, FMT, seq_len)
        for folder in (data, data / "built")
    ]
    (memory, said), (built, told) = found
    for split, captions in memory.captions.items():
        of_built = built.captions[split]
        assert list(of_built.names) == list(captions.names) and list(of_built.texts) == list(captions.texts)
        assert all((a == b).all() for a, b in zip(captions.images, of_built.images))
    for split, documents in memory.interleaved.documents.items():
        assert [(d.name, d.info) for d in built.interleaved.documents[split]] == [(d.name, d.info) for d in documents]
    assert list(said.values()) == list(told.values())  # reports, with all names
    assert built.held_out_text == memory.held_out_text
    assert (len(memory.captions["train"].images), seq_len) in ((22, 24), (22, 40), (22, 64), (23, 400))


def test_of_much_that_is_left_out_the_first_names_are_kept_and_all_counted(data, monkeypatch):
    monkeypatch.setattr("transfusion.data.report.LISTED", 1)
    monkeypatch.setattr("transfusion.data.built.SCANNED", 5)  # so that both are looked at in parts
    config = config_of(data / "built", conditioning="clean")
    _, reports = build_corpus(config, TOKENIZER, PIXELS, FMT, 24)
    _, everything = build_corpus(config_of(data, conditioning="clean"), TOKENIZER, PIXELS, FMT, 24)
    some, every = ([v for k, v in r.items() if k.startswith("documents")].pop() for r in (reports, everything))
    ((reason, names),) = every.skipped.items()
    assert len(names) > 3 and some.skipped == {reason: names[:1]} and some.unnamed == {reason: len(names) - 1}
    assert some.kept == every.kept and f"{len(names)} x {reason}: {names[0]}, and " in some.summary()
    assert some.names() == f"  {reason}\n    {names[0]}\n    and {len(names) - 1} more\n"


def test_workers_read_what_the_process_itself_reads(data):
    alone, helped = (batches(config_of(data / "built"), 6, workers=n) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, helped))


def test_sources_on_disk_and_in_memory_are_mixed(data, tmp_path):
    for i in range(2):
        files = {
            f"{k}.{end}": picture("red") if end == "png" else f"{i} {k}" for k in range(6) for end in ("png", "txt")
        }
        write_tar(tmp_path / f"{i}" / "a.tar", files)
        build("images", [str(tmp_path / f"{i}")], tmp_path / f"built-{i}")
    mixed = config_of(
        data,
        images=(str(tmp_path / "built-0"), str(data / "pictures"), str(tmp_path / "built-1")),
        documents=(str(data / "built" / "docs"), str(data / "docs")),
    )
    corpus, reports = build_corpus(mixed, TOKENIZER, PIXELS, FMT, 64)
    assert [source.size for source in corpus.image_sources] == [6, 22, 6, 18, 18]
    assert [report.kept for report in reports.values()] == [6, 23, 6, 1, 20, 20]
    assert list(corpus.captions["train"].texts)[28:30] == [["1 0"], ["1 1"]]
    first, again = (corpus.interleaved.documents["train"][i].segments[1].number for i in (0, 18))
    assert again - first == 12 and (corpus.interleaved.images[first] == corpus.interleaved.images[again]).all()


@pytest.mark.parametrize("name, codes", [("pretrained:emoji", False), ("pretrained:emoji-vq", True)])
def test_latents_kept_beside_the_images_are_those_that_are_encoded_in_memory(data, name, codes):
    codec = load_codec(name)
    fmt = Format(TOKENIZER.special, 1, codes=codec.codes if codes else 0)
    config = {"codec": name, "buckets": ("32x32", "32x48"), "text": (), "image_share": 1.0}
    for kind in ("images", "documents"):
        encode_built(data / "built" / KINDS[kind], codec, config_of(data, **config).sizes, codes)
    memory, built = (
        batches(config_of(folder, **config), 4, codec, fmt=fmt, seq_len=200) for folder in (data, data / "built")
    )
    for a, b in zip(memory, built):
        assert (a.tokens == b.tokens).all() and (codes or len(a.grids) > 0)
        assert np.allclose(a.patches.numpy(), b.patches.numpy(), atol=1e-4)


def test_what_breaks_after_it_was_built_is_padding_in_its_batch_and_named(data, tmp_path):
    files = {f"{k}.{end}": picture("red") if end == "png" else f"a {k}" for k in range(8) for end in ("png", "txt")}
    tar = write_tar(tmp_path / "a.tar", files)
    build("images", [str(tar)], tmp_path / "built")
    config = DataConfig(images=(str(tmp_path / "built"),), text=(), image_share=1.0, image_size=16)
    corpus, _ = build_corpus(config, TOKENIZER, PIXELS, FMT, 64)
    broken = bytearray(tar.read_bytes())
    broken[corpus.captions["train"].images.parts[0].record(2)["offset"] + 50] ^= 1
    tar.write_bytes(broken)
    packer = Packer(corpus, FMT, 0, 4, 64)
    lost = [name for step in range(4) for batch in packer.batches(step) for name in batch.lost]
    assert lost and set(lost) == {"images built, 2: bytes that have changed since it was built"}


def test_a_run_trains_resumes_and_is_measured_on_built_data(data, tmp_path, capsys):
    built = [f"data.{kind}={data / 'built' / name}" for kind, name in KINDS.items()]
    said = [str(data / "tiny.toml"), f"out={tmp_path / 'run'}", *built]
    assert main(["train", *said, "train.steps=4", "train.log_every=2", "data.workers=1"]) == 0
    assert main(["train", *said, "train.steps=6", "train.log_every=2", "--resume"]) == 0
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [2, 4, 6]
    assert main(["eval", str(tmp_path / "run"), "n_captions=2", "n_images=2"]) == 0, capsys.readouterr().err


def test_latents_that_were_not_made_are_asked_for_when_a_run_begins(data, capsys):
    built = [f"data.images={data / 'built' / 'pictures'}", "data.codec=pretrained:emoji", "data.image_size=16"]
    assert main(["train", str(data / "tiny.toml"), *built, "model.patch_size=1", f"out={data / 'none'}"]) == 2
    assert "call transfusion data encode CONFIG" in capsys.readouterr().err
