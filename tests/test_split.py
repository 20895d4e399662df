import numpy as np

from transfusion.data.split import hash_of, lowest


def test_a_hash_is_the_same_everywhere():
    assert hash_of("cat.png") == 0xB94F5CE0690DBE02  # what sha256sum says


def test_the_lowest_share_is_held_out_and_one_at_least():
    hashes = np.array([2**64 - 1, 2**62, 2**63, 7], np.uint64)
    assert lowest(hashes, 0.25).tolist() == [False, True, False, True]
    assert lowest(hashes, 0.0).tolist() == [False, False, False, True]
    assert lowest(hashes[:1], 0.5).tolist() == [True]
