"""A shuffled order of n items that is computed, not stored."""

import hashlib

import numpy as np

_ROUNDS = 8
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudo-random permutation of 0 .. size-1, chosen by (seed, epoch), in O(1) memory.

    A balanced Feistel network over the smallest even number of bits that holds `size`, and cycle walking: a value
    that falls outside is encrypted again until it falls inside. The domain is at most 4 x `size`, so this takes
    at most 4 encryptions on average. The result is a bijection whatever the round function is.

    Feistel: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J.
    Comput. 17(2), 1988. Cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002. Round function: the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) under a round key from BLAKE2b. It shuffles; it is no cipher.
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        """`size`, below 2**62, must be at least 1; any integers `seed` and `epoch`."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one item, not {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        key = f"{seed} {epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS, person=b"stack data order").digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The items at `positions`: integers in [0, size), any shape; returns int64 of that shape."""
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
