"""Images of a codec's training: each once an epoch, a function of (seed, step), cut and mirrored as asked for."""

import numpy as np
import PIL.Image
import pytest

from transfusion.data.arrays import Held
from transfusion.data.build import build
from transfusion.data.crops import CropConfig, Crops, build_crops


def crops(n=6, side=10, **fields) -> Crops:
    """Image i is a ramp of bytes that begins at 5 i, no two places of it alike."""
    ramp = np.arange(side * side, dtype=np.uint8).reshape(side, side, 1).repeat(3, 2)
    return Crops(CropConfig(**fields), {"train": Held([ramp + np.uint8(5 * i) for i in range(n)])})


def image(c: Crops, seed: int, k: int) -> np.ndarray:
    """The k-th image of training."""
    (found,), _ = c.batch(seed, k, 1)
    return found


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    c = crops(image_size=10)
    epochs = [[int(image(c, 7, k)[0, 0, 0]) // 5 for k in range(start, start + 6)] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_is_a_function_of_seed_and_step():
    c = crops(image_size=4, flips=0.5)
    batch, lost = c.batch(3, 5, 4)
    assert not lost
    assert batch.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(batch, crops(image_size=4, flips=0.5).batch(3, 5, 4)[0])
    np.testing.assert_array_equal(batch[1], c.batch(3, 21, 1)[0][0])  # the batch's size moves no image
    assert not np.array_equal(batch, c.batch(4, 5, 4)[0]) and not np.array_equal(batch, c.batch(3, 6, 4)[0])


def test_a_crop_is_a_square_of_the_image_anywhere_in_it():
    c = crops(1, image_size=4)
    corners = set()
    for k in range(600):
        cut = image(c, 0, k)
        top, left = divmod(int(cut[0, 0, 0]), 10)
        np.testing.assert_array_equal(cut, c.splits["train"][0][top : top + 4, left : left + 4])
        corners.add((top, left))
    assert {(0, 0), (6, 6)} <= corners and len(corners) == 49


def test_images_are_mirrored_as_often_as_asked_for():
    for share, least, most in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        c = crops(1, image_size=10, flips=share)
        mirrored = [bool(image(c, 0, k)[0, 0, 0] == 9) for k in range(200)]
        assert least <= sum(mirrored) <= most


def test_channels_change_places_in_every_way_as_often_as_asked_for():
    whole = np.tile(np.array([1, 2, 3], np.uint8), (1, 4, 4, 1))
    orders = {}
    for share in (0.0, 0.5, 1.0):
        c = Crops(CropConfig(image_size=4, recolour=share), {"train": Held(whole)})
        found = [image(c, 0, k) for k in range(200)]
        assert all((one == one[0, 0]).all() for one in found)
        orders[share] = [tuple(one[0, 0].tolist()) for one in found]
    assert set(orders[0.0]) == {(1, 2, 3)} and len(set(orders[1.0])) == 6
    assert orders[1.0].count((1, 2, 3)) < 60 < orders[0.5].count((1, 2, 3)) < 160


def test_centres_are_the_middle_of_images_spread_over_the_split():
    c = crops(image_size=4)
    found = c.centres("train", 3)
    np.testing.assert_array_equal(found, [c.splits["train"][i][3:7, 3:7] for i in (0, 2, 5)])
    assert len(c.centres("train", 99)) == 6


def test_pictures_need_no_captions_and_some_are_held_out(tmp_path):
    for i in range(60):
        PIL.Image.new("RGB", (12, 9), (4 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.txt").write_text("a caption does no harm\n")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    c, reports = build_crops(CropConfig((str(tmp_path),), image_size=6, load_size=8))
    assert len(c.splits["train"]) + len(c.splits["held_out_image"]) == 60 and len(c.splits["held_out_image"]) > 0
    assert c.splits["train"][0].shape == (8, 8, 3)
    (report,) = reports.values()
    assert report.skipped == {"broken or unknown image": ["broken.png"]}


def test_a_folder_without_a_picture_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.txt").write_text("no image beside it")
    with pytest.raises(ValueError, match=r"no image in .* or a folder of images"):
        build_crops(CropConfig((str(tmp_path),)))


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"images": ()}, "name a folder"),
        ({"flips": 2.0}, "from 0 to 1"),
        ({"load_size": 32}, "is below data.image_size"),
    ],
)
def test_wrong_fields_are_refused_with_the_remedy(fields, remedy):
    with pytest.raises(ValueError, match=remedy):
        CropConfig(**fields)


def test_a_built_folder_is_cut_as_the_folder_it_was_built_of(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(25):
        pixels = PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        pixels.save(tmp_path / "in" / f"{i:02}.png")
        (tmp_path / "in" / f"{i:02}.txt").write_text("noise")
    build("images", [str(tmp_path / "in")], tmp_path / "built")
    sizes = {"image_size": 8, "load_size": 10, "flips": 0.5}
    memory, built = (build_crops(CropConfig(images=(str(tmp_path / n),), **sizes))[0] for n in ("in", "built"))
    assert {split: len(of) for split, of in built.splits.items()} == {s: len(of) for s, of in memory.splits.items()}
    np.testing.assert_array_equal(memory.batch(1, 2, 20)[0], built.batch(1, 2, 20)[0])
    for split in memory.splits:
        np.testing.assert_array_equal(memory.centres(split, 5), built.centres(split, 5))


def test_an_image_that_cannot_be_read_gives_its_turn_to_the_next(monkeypatch):
    c, whole = crops(image_size=10), crops(image_size=10)
    images = c.splits["train"]
    reads, gone = images.read, {3}
    monkeypatch.setattr(
        images, "read", lambda numbers: ["gone" if i in gone else x for i, x in zip(numbers, reads(numbers))]
    )
    found, all_of = ([image(one, 7, k) for k in range(7)] for one in (c, whole))
    (at,) = (k for k in range(6) if all_of[k][0, 0, 0] == 15)
    assert all((a == b).all() for k, (a, b) in enumerate(zip(found, all_of)) if k not in (at, 6))
    assert found[at][0, 0, 0] == all_of[at + 1][0, 0, 0]
    gone |= set(range(6))
    with pytest.raises(
        ValueError, match=r"100 images in turn cannot be read .gone.: see `transfusion data check images`"
    ):
        image(c, 7, 0)


def test_a_batch_is_read_by_one_call_and_names_what_it_lost_once(monkeypatch):
    c, calls = crops(40, image_size=10), []
    images, gone = c.splits["train"], {c.number(7, turn) for turn in (3, 4, 8)}
    reads = images.read

    def lacking(numbers):
        calls.append(list(numbers))
        return ["gone" if i in gone else x for i, x in zip(numbers, reads(numbers))]

    monkeypatch.setattr(images, "read", lacking)
    batch, lost = c.batch(7, 0, 20)
    assert [len(numbers) for numbers in calls] == [20, 3, 1]  # all; those that lack one; that which met another
    assert len(batch) == 20 and sorted(lost) == sorted(f"image {i}: gone" for i in gone)
    calls.clear()
    assert not c.batch(7, 1, 20)[1] and len(calls) == 1


def test_of_a_split_that_cannot_be_read_there_are_no_centres(monkeypatch):
    c = crops(image_size=4)
    monkeypatch.setattr(c.splits["train"], "read", lambda numbers: ["gone"] * len(numbers))
    assert c.centres("train", 3).shape == (0, 4, 4, 3)
