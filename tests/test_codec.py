"""Codecs: latents of the promised shape and range, and the image comes back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from transfusion.codec import CODECS

images = st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)).flatmap(lambda shape: arrays(np.uint8, shape))


@given(images)
def test_an_image_of_bytes_comes_back_from_pixels_exactly(image):
    codec = CODECS["pixels"]
    back = codec.decode(codec.encode(image))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, image)


def test_every_byte_comes_back_from_pixels_exactly():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(CODECS["pixels"].decode(CODECS["pixels"].encode(every)), every)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_latents_have_the_shape_and_the_range_that_the_codec_promises(codec, value):
    image = np.full((2 * codec.factor, 3 * codec.factor, 3), value, np.uint8)
    latents = codec.encode(image)
    assert latents.shape == (codec.channels, 2, 3) and latents.dtype == np.float32
    assert codec.limit is None or np.abs(latents).max() <= codec.limit


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_latents_out_of_range_become_valid_bytes(codec):
    wild = np.array([-9.0, 9.0], np.float32).reshape(1, 1, 2).repeat(codec.channels, 0)
    image = codec.decode(wild)
    assert image.dtype == np.uint8 and image.shape == (codec.factor, 2 * codec.factor, 3)


def test_pixels_run_from_minus_one_to_one_with_the_channel_first():
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 0, 51, 255
    np.testing.assert_allclose(CODECS["pixels"].encode(image)[:, 0], [[-1, -1], [-1, -0.6], [-1, 1]], atol=1e-6)
