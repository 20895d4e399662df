"""Codecs: latents of the promised shape and range, and the image comes back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from transfusion.codec.codec import PIXELS, patch_grid
from transfusion.codec.load import load_codec

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.just(3))
images = shapes.flatmap(lambda shape: arrays(np.uint8, shape))


@given(images)
def test_images_of_bytes_come_back_from_pixels_exactly(images):
    back = PIXELS.decode(PIXELS.encode(images))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)


def test_every_byte_comes_back_from_pixels_exactly():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    np.testing.assert_array_equal(PIXELS.decode(PIXELS.encode(every)), every)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_pixels_have_the_shape_and_the_range_that_the_codec_promises(value):
    latents = PIXELS.encode(np.full((2, 2, 3, 3), value, np.uint8))
    assert latents.shape == (2, 3, 2, 3) and latents.dtype == np.float32
    assert np.abs(latents).max() <= PIXELS.limit


def test_latents_out_of_range_become_valid_bytes():
    wild = np.array([-9.0, 9.0], np.float32).reshape(1, 1, 1, 2).repeat(3, 1)
    images = PIXELS.decode(wild)
    assert images.dtype == np.uint8 and images[0, 0, :, 0].tolist() == [0, 255]


def test_pixels_run_from_minus_one_to_one_with_the_channel_first():
    image = np.zeros((1, 1, 2, 3), np.uint8)
    image[0, 0, 1] = 0, 51, 255
    np.testing.assert_allclose(PIXELS.encode(image)[0, :, 0], [[-1, -1], [-1, -0.6], [-1, 1]], atol=1e-6)


# ---- standardised latents ----

CODEBOOK = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
DISCRETE = replace(
    PIXELS,
    codes=7,
    quantize=lambda z: np.square(z[:, None] - CODEBOOK[None, :, :, None, None]).sum(2).argmin(1),
    lookup=lambda codes: CODEBOOK[codes].transpose(0, 3, 1, 2),
)


@given(arrays(np.int64, (2, 3, 4), elements=st.integers(0, 6)))
def test_codes_come_back_from_the_latents_of_a_codebook_standardised_or_not(codes):
    for codec in (DISCRETE, DISCRETE.standardised((0.1, -0.2, 0.3), (0.5, 2.0, 1.0))):
        np.testing.assert_array_equal(codec.quantize(codec.lookup(codes)), codes)


@given(images)
def test_standardised_latents_are_shifted_and_scaled_by_channel_and_decode_to_the_same_images(images):
    mean, std = (0.1, -0.2, 0.3), (0.5, 2.0, 1.0)
    codec = PIXELS.standardised(mean, std)
    latents = PIXELS.encode(images)
    for channel in range(3):
        np.testing.assert_allclose(
            codec.encode(images)[:, channel], (latents[:, channel] - mean[channel]) / std[channel], atol=1e-6
        )
    np.testing.assert_array_equal(codec.decode(codec.encode(images)), images)
    assert codec.limit is None


def test_statistics_that_do_not_fit_the_codec_are_refused():
    for mean, std in (((0.0,), (1.0,)), ((0.0, 0.0, 0.0), (1.0, 0.0, 1.0)), ((0.0, 0.0, 0.0), ())):
        with pytest.raises(ValueError, match="leave both out"):
            PIXELS.standardised(mean, std)
    assert PIXELS.standardised((), ()) is PIXELS


# ---- names and sizes ----


def test_an_unknown_codec_is_refused_with_what_there_is():
    assert load_codec("pixels") is PIXELS
    with pytest.raises(ValueError, match=r"'jpeg'.*pixels"):
        load_codec("jpeg")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_a_grid_counts_the_patches_of_both_sides(factor, patch_size, rows, columns):
    patch = factor * patch_size
    assert patch_grid((rows * patch, columns * patch), factor, patch_size) == (rows, columns)


def test_sizes_that_do_not_divide_are_refused_with_the_remedy():
    for size in ((24, 20), (20, 24), (0, 24)):
        with pytest.raises(ValueError, match="choose multiples of 24"):
            patch_grid(size, 8, 3)
