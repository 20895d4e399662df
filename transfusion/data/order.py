"""The order of an epoch over any number of things: a keyed bijection, so that the i-th is found without the others.

i = a L + R  ->  L <- L + F_1(R) mod a,  R <- R + F_2(L) mod a,  L <- ...  ->  a L + R,     a = ceil(sqrt(n))

A Feistel network on the a^2 >= n numbers, and where it leads to n or more, from there once more (cycle walking): Black
& Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5. Its round function is a hash, no cipher: the
orders look random and are no secret.
"""

import hashlib
from functools import lru_cache
from math import isqrt

ROUNDS = 6
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd


def mixed(x: int) -> int:
    """A bijection of 64 bits after which every bit depends on every other (the finaliser of SplitMix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=256)
def number_of(name: str) -> int:
    """64 bits of a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def key_of(*parts: int | str) -> int:
    """64 bits in which all parts, and their places, take part: a key of `shuffled`, or a seed."""
    key = 0
    for part in parts:
        key = mixed((key + GOLDEN + (number_of(part) if isinstance(part, str) else part)) & MASK)
    return key


def shuffled(i: int, n: int, *key: int | str) -> int:
    """The i-th of n things in the order that `key` names: a bijection of 0 ... n - 1, in O(1) time and memory."""
    assert 0 <= i < n, f"there is no place {i} in an order of {n}"
    a, key = 1 + isqrt(n - 1), key_of(*key)
    rounds = [mixed((key + r * GOLDEN) & MASK) for r in range(ROUNDS)]
    while True:
        left, right = divmod(i, a)
        for number in rounds:
            left, right = right, (left + mixed((right + number) & MASK)) % a
        i = a * left + right
        if i < n:
            return i
