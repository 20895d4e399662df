"""Images far away: built and read over HTTP by ranges of bytes, they are those that lie here."""

from urllib.request import Request, urlopen

import feeding
import numpy as np
import pytest
from serving import serve
from shard_files import picture, write_tar

from transfusion.data.build import build
from transfusion.data.built import load_built_images
from transfusion.data.loader import load_batches
from transfusion.data.storage import UNREADABLE, Span, read_spans, stamp
from transfusion.tokenizer import load_tokenizer

COLOURS = ("red", "green", "blue", "black", "orange", "purple")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A folder of two tars, and its address."""
    folder = tmp_path_factory.mktemp("tars")
    for t in range(2):
        files = {}
        for i in range(60):
            colour = COLOURS[(i + t) % len(COLOURS)]
            files |= {f"{i:03}.png": picture(colour, (20 + i, 64)), f"{i:03}.txt": f"{colour} {t} {i}"}
        write_tar(folder / f"{t:02}.tar", files)
    with serve(folder) as url:
        yield folder, url


def get(url: str, wanted: str = "") -> tuple[int, bytes]:
    with urlopen(Request(url, headers={"Range": wanted} if wanted else {})) as answer:
        return answer.status, answer.read()


def test_the_server_answers_with_the_range_that_is_asked_for(tars):
    folder, url = tars
    data = (folder / "00.tar").read_bytes()
    assert get(f"{url}/00.tar") == (200, data)
    assert get(f"{url}/00.tar", "bytes=512-1023") == (206, data[512:1024])
    assert get(f"{url}/00.tar", "bytes=512-") == (206, data[512:])
    assert get(f"{url}/00.tar", "bytes=-100") == (206, data[-100:])


def test_spans_over_http_are_those_of_the_file(tars):
    pytest.importorskip("aiohttp")
    folder, url = tars
    data = (folder / "01.tar").read_bytes()
    spans = [Span(f"{url}/01.tar", 700, 900), Span(f"{url}/gone.tar", 0, 9), Span(f"{url}/01.tar", 0, 512)]
    first, gone, second = read_spans(spans)
    assert (first, second) == (data[700:1600], data[:512]) and gone.startswith(UNREADABLE)
    assert stamp(f"{url}/01.tar").bytes == len(data)


def test_images_built_over_http_are_those_built_here_in_this_process_and_in_workers(tars, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    folder, url = tars
    build("images", [f"{url}/{{00..01}}.tar"], tmp_path / "there")
    build("images", [str(folder)], tmp_path / "here")
    there, here = (load_built_images(tmp_path / n, [(32, 32)], load_tokenizer())["train"] for n in ("there", "here"))
    assert len(there.images) == len(here.images) > 100
    everything = range(len(here.images))
    for a, b in zip(there.images.read(everything), here.images.read(everything), strict=True):
        assert np.array_equal(a, b)
    monkeypatch.setattr(feeding, "ROWS", 1)

    packer = feeding.packer_of_images(tmp_path / "there", 32)

    def patches(workers: int) -> list:
        """Those of the first steps."""
        found = [batch for batches in load_batches(packer, 0, 4, workers, pin_memory=False) for batch in batches]
        assert not any(batch.lost for batch in found) and any(batch.grids for batch in found)
        return [batch.patches for batch in found]

    # workers are forked from a process that has read over HTTP itself, whose connections they must not share
    assert all(a.equal(b) for a, b in zip(patches(0), patches(2), strict=True))
