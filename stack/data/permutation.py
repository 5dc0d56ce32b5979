"""A shuffled order of n items that is computed for each position and not stored."""

import hashlib

import numpy as np

_ROUNDS = 8
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudo-random permutation of 0 .. size-1, chosen by (seed, epoch), in O(1) memory.

    A balanced Feistel network over the smallest even number of bits that holds `size`, with cycle walking: a value
    of `size` or more is encrypted again until it is below `size`. The domain is at most 4 x `size`, so a position takes
    at most 4 encryptions on average. A Feistel network is a bijection for every round function.

    Feistel: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J.
    Comput. 17(2), 1988. Cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002. Round function: the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) under a round key from BLAKE2b. Good enough to shuffle, not a secure cipher.
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        """`size` is from 1 to 2**62 - 1; `seed` and `epoch` are any integers. Raises `ValueError` for `size` < 1."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one item, not {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        key = f"{seed} {epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS, person=b"stack data order").digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The items at `positions`, integers in [0, size) of any shape: int64 of the same shape."""
        items = self._encrypt(np.atleast_1d(positions).astype(np.uint64))
        while (outside := items >= np.uint64(self.size)).any():
            items[outside] = self._encrypt(items[outside])
        return items.astype(np.int64).reshape(np.shape(positions))

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))
