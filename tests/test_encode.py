import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import picture, tree, write_tar
from tiny_run import write_documents

from transfusion.codec.codec import PIXELS, Codec
from transfusion.data import built as built_module
from transfusion.data import encode, encoded
from transfusion.data.build import build
from transfusion.data.built import load_built_images
from transfusion.data.check import check
from transfusion.data.encode import encode_built, every_image
from transfusion.data.encoded import BROKEN, load_latents
from transfusion.data.storage import UNREADABLE
from transfusion.tokenizer import load_tokenizer

SIZES = ((16, 16), (16, 24))


def halved(images: np.ndarray) -> np.ndarray:
    """[n, 3, h/2, w/2]: every second pixel."""
    return np.ascontiguousarray(images[:, ::2, ::2].transpose(0, 3, 1, 2), np.float32) / 255


CODEC = Codec("halved", 3, 2, None, halved, halved, key="1")


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    """70 images of two sizes, one of them broken, in blocks of 16."""
    monkeypatch.setattr(encode, "BLOCK", 16)
    monkeypatch.setattr(encoded, "BLOCK", 16)
    monkeypatch.setattr(encode, "BATCH", 5)
    rng, files = np.random.default_rng(0), {}
    for i in range(70):
        size = (20, 20) if i % 3 else (30, 20)
        files[f"{i:02}.png"] = picture(tuple(rng.integers(0, 256, 3).tolist()), size)
        files[f"{i:02}.txt"] = f"image {i}"
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "n.jpg")
    files |= {"x.jpg": (tmp_path / "n.jpg").read_bytes()[:1500], "x.txt": "broken behind its header"}
    build("images", [str(write_tar(tmp_path / "a.tar", files))], tmp_path / "built")
    return tmp_path / "built"


def test_latents_are_those_of_the_codec_image_by_image(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    for split in load_built_images(built, SIZES, load_tokenizer()).values():
        latents = load_latents(split.images, CODEC)
        assert len(latents) == len(split.images)
        for i, (latent, pixels) in enumerate(
            zip(latents.read(range(len(latents))), split.images.read(range(len(latents))))
        ):
            if isinstance(pixels, str):
                assert latent == BROKEN
                with pytest.raises(ValueError, match=BROKEN):
                    latents[i]
                continue
            assert (latent == halved(pixels[None])[0]).all()
    found = json.loads((folder / "latents.json").read_text())
    assert [why for _, why in found["broken"]] == ["broken or unknown image"] and found["images"] == 71


def test_what_a_kill_left_undone_is_encoded_and_nothing_else(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    whole, calls = tree(folder), []
    counted = replace(CODEC, encode=lambda images: calls.append(len(images)) or halved(images))
    encode_built(built, counted, SIZES)
    assert not calls
    (folder / "latents.json").unlink()
    (folder / "000002.json").unlink()  # killed between this block's two files
    (folder / "000004.json").unlink()
    (folder / "000004.bin").unlink()
    encode_built(built, counted, SIZES)
    assert sum(calls) in (16 + 7, 16 + 6) and tree(folder) == whole


def test_codes_are_kept_where_a_model_writes_codes(built):
    def first_bits(latents: np.ndarray) -> np.ndarray:
        return (latents[:, 0] * 255).astype(np.int64)

    codec = replace(CODEC, codes=256, quantize=first_bits)
    encode_built(built, codec, SIZES, codes=True)
    images = load_built_images(built, SIZES, load_tokenizer())["train"].images
    images = replace(images, rows=images.rows.without(np.arange(0, len(images), 2)))
    codes = images.latents(codec, True)
    assert len(codes) == len(images) > 30
    for one, pixels in zip(codes.read(range(len(codes))), images.read(range(len(codes)))):
        if isinstance(pixels, str):
            assert one == BROKEN
        else:
            assert one.dtype == np.int64 and (one == first_bits(halved(pixels[None]))[0]).all()
    with pytest.raises(ValueError, match="transfusion data encode CONFIG"):
        images.latents(codec, False)


def test_latents_of_another_codec_or_size_or_of_none_are_asked_for(built):
    images = load_built_images(built, SIZES, load_tokenizer())["train"].images
    with pytest.raises(ValueError, match="not encoded with halved: call transfusion data encode CONFIG"):
        load_latents(images, CODEC)
    encode_built(built, CODEC, SIZES)
    load_latents(images, CODEC)
    for other, of in ((replace(CODEC, key="2"), images), (CODEC, replace(images, sizes=((16, 16),)))):
        with pytest.raises(ValueError, match="transfusion data encode CONFIG"):
            load_latents(of, other)
    with pytest.raises(ValueError, match="pixels encodes as fast as latents are read"):
        encode_built(built, PIXELS, SIZES)
    with pytest.raises(ValueError, match="does not divide"):
        encode_built(built, replace(CODEC, factor=5, key="3"), SIZES)


def test_images_of_documents_are_encoded_too(tmp_path):
    build("documents", [str(write_documents(tmp_path / "docs"))], tmp_path / "built")
    images = every_image(tmp_path / "built", SIZES)
    encode_built(tmp_path / "built", CODEC, SIZES)
    latents = images.latents(CODEC, False)
    assert len(latents) == 12
    assert all((latents[i] == halved(pixels[None])[0]).all() for i, pixels in enumerate(images.read(range(12))))


def test_text_has_nothing_to_encode(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    build("text", [str(tmp_path / "a.txt")], tmp_path / "built")
    with pytest.raises(ValueError, match="holds text, which has no images"):
        encode_built(tmp_path / "built", CODEC, SIZES)


def test_what_could_not_be_read_for_a_moment_is_encoded_by_the_next_call(built, tmp_path, monkeypatch):
    whole = tree(encode_built(built, CODEC, SIZES)[0])
    (folder, _), calls = encode_built(built, replace(CODEC, key="2"), SIZES), []
    shutil.rmtree(folder)
    reads = built_module.read_spans

    def fails_once(spans):
        calls.append(spans)
        return [UNREADABLE] * len(spans) if len(calls) == 1 else reads(spans)

    with monkeypatch.context() as patch:
        patch.setattr(built_module, "read_spans", fails_once)
        with pytest.raises(ValueError, match=r"^[1-5] images of .* could not be read .*: see that .* call this again"):
            encode_built(built, replace(CODEC, key="2"), SIZES)
    assert len(list(folder.glob("0*.json"))) == 4 and not (folder / "latents.json").exists()
    assert tree(encode_built(built, replace(CODEC, key="2"), SIZES)[0]) == whole


def test_a_folder_whose_tar_is_gone_is_not_encoded(built, tmp_path):
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match="is gone or has changed: build the data anew"):
        encode_built(built, CODEC, SIZES)


def test_an_image_that_has_changed_asks_for_a_new_build(built, tmp_path):
    tar = bytearray((tmp_path / "a.tar").read_bytes())
    tar[int(every_image(built, SIZES).record(7)["offset"]) + 50] ^= 1
    (tmp_path / "a.tar").write_bytes(tar)
    with pytest.raises(ValueError, match=r"^1 images .*\(image 7: bytes that have changed .*\): build it anew"):
        encode_built(built, CODEC, SIZES)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_ranks_encode_what_one_encodes_each_block_once(built, order):
    whole, calls = tree(encode_built(built, CODEC, SIZES)[0]), []
    other = replace(CODEC, key="2", encode=lambda images: calls.append(len(images)) or halved(images))
    missing = [encode_built(built, other, SIZES, rank=rank, ranks=3)[1] for rank in order]
    assert missing[2] == 0 and missing[0] + len(range(order[0], 5, 3)) == 5
    found = encode_built(built, other, SIZES)
    assert found[1] == 0 and tree(found[0]) == whole and sum(calls) == 70


def test_two_processes_that_encode_the_same_disturb_neither(built):
    whole, began = tree(encode_built(built, CODEC, SIZES)[0]), []

    def with_another(images: np.ndarray) -> np.ndarray:
        if not began:  # the other does everything while this one is in its first block
            began.append(encode_built(built, replace(CODEC, key="2"), SIZES))
        return halved(images)

    folder, _ = encode_built(built, replace(CODEC, key="2", encode=with_another), SIZES)
    assert began == [(folder, 0)] and tree(folder) == whole


def test_a_block_of_another_size_is_refused_and_encoded_anew(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    whole, calls = tree(folder), []
    images = load_built_images(built, SIZES, load_tokenizer())["train"].images
    counted = replace(CODEC, encode=lambda images: calls.append(len(images)) or halved(images))
    for name in ("000001.bin", "starts.npy"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-4])
        with pytest.raises(ValueError, match=f"{name} is gone or has another size: call transfusion data encode"):
            load_latents(images, CODEC)
        assert encode_built(built, counted, SIZES)[1] == 0 and tree(folder) == whole
    assert sum(calls) == 16
    load_latents(images, CODEC)


def test_a_block_that_another_rank_has_to_mend_is_still_missing(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    (folder / "000001.bin").write_bytes(b"")
    assert [encode_built(built, CODEC, SIZES, rank=rank, ranks=2)[1] for rank in (0, 1)] == [1, 0]


def test_a_byte_of_latents_that_has_changed_is_found_by_the_check(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    assert not any(found.url.endswith("/latents") for found in check("images", [str(built)]))
    block = bytearray((folder / "000002.bin").read_bytes())
    block[5] ^= 1
    (folder / "000002.bin").write_bytes(block)
    first = next(iter(check("images", [str(built)])))
    assert first.url == f"{built}/latents" and first.left == {
        "latents that have changed: remove them, and call transfusion data encode again": (
            1,
            [f"latents/{folder.name}/000002.bin"],
        )
    }


def test_where_latents_begin_is_written_once(built):
    folder, _ = encode_built(built, CODEC, SIZES)
    (folder / "latents.json").unlink()
    before = (folder / "starts.npy").stat()
    encode_built(built, CODEC, SIZES)
    assert (folder / "starts.npy").stat().st_ino == before.st_ino
