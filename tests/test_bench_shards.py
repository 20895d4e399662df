"""Data on disk is built, read, fed and told of; memory that grows is seen, and that of real workers does not."""

import json
import sys
from types import SimpleNamespace

import feeding
import pytest
import shards

from transfusion.data.built import TarImages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


def test_every_figure_is_there_and_told(tmp_path, capsys, monkeypatch):
    pytest.importorskip("aiohttp")
    shipped, _ = shards.load_images("emoji", 64)
    some = SimpleNamespace(images=shipped.images[:200], captions=shipped.captions[:200])
    monkeypatch.setattr(shards, "load_images", lambda *_: (some, None))
    monkeypatch.setattr(feeding, "ROWS", 1)
    out = tmp_path / "shards.json"
    shards.main(["--images", "20", "--copies", "1", "--workers", "1", "--steps", "13", "--out", str(out)])
    found, told = json.loads(out.read_text()), capsys.readouterr().out
    assert found["photos"]["built"]["count"] == found["remote"]["built"]["count"] == 20
    for what, steps in {"emoji": 3, "photos": 3, "remote": 2, "text": 2}.items():
        rates = [found[what][step] for step in ("built", "read", "fed")[:steps]]
        assert all(rate["count"] > 0 and rate["a core"] > 0 and rate["wall"] > 0 for rate in rates)
    fed = found["emoji"]["fed"]
    assert fed["count"] > 180, "an epoch, though fewer steps were asked for"
    assert set(fed["MiB"]) == {"lead", "worker 0"} and all(len(held) == 10 for held in fed["MiB"].values())
    assert told.count("positions/s a core; what is wanted takes") == 1 and told.count("worker 0, MiB:") == 2
    assert f"{found['wanted']['images']:,} images/s" in told


@pytest.fixture(scope="module")
def packer(tmp_path_factory):
    """Of 200 photos of 64 pixels, about 40 a step."""
    folder, rng = tmp_path_factory.mktemp("photos"), shards.np.random.default_rng(0)
    photos = (shards.encoded(shards.photo(rng, 64), "JPEG") for _ in range(200))
    shards.write_tars(folder / "tars", photos, [[f"photo {i}"] for i in range(200)])
    shards.quietly("images", [str(folder / "tars")], folder / "built")
    return feeding.packer_of_images(folder / "built", 64)


@pytest.mark.parametrize("keeps", [False, True])
def test_memory_of_a_worker_is_flat_over_epochs_and_one_that_keeps_images_is_seen(packer, keeps, monkeypatch):
    kept, pixels = [], TarImages.pixels
    if keeps:
        monkeypatch.setattr(TarImages, "pixels", lambda *given: kept.append(pixels(*given)) or kept[-1])
    steps = 10 * feeding.epoch(packer)
    fed = feeding.feed(packer, steps, workers=1)
    assert fed["images"] > 8 * 196, "nearly ten epochs"
    first, *_, last = fed["MiB"]["worker 0"][1:]
    assert (last - first > 6) == keeps, fed["MiB"]


def test_too_few_steps_to_look_at_are_refused(packer):
    with pytest.raises(ValueError, match="12 steps by 1 workers are too few"):
        feeding.feed(packer, 12, workers=1)
