"""The bounds of documents that the host computes for a batch."""

import numpy as np

from stack.models.documents import Documents


def positions(*microbatches: list[list[int]]) -> np.ndarray:
    """Positions [microbatches, micro_size, seq_len] from the lengths of the documents in each sequence."""
    return np.array([[[i for n in lengths for i in range(n)] for lengths in rows] for rows in microbatches])


def test_one_document_a_sequence():
    found = Documents.of(positions([[8], [8]]))
    assert not found.packed
    assert found.longest == 8
    assert found.bounds.tolist() == [[0, 8, 16, 16]]


def test_packed_documents_of_all_microbatches_have_one_number_of_bounds():
    found = Documents.of(positions([[3, 5], [8]], [[2, 2, 2, 2], [7, 1]]))
    assert found.packed
    assert found.longest == 8
    assert found.bounds.tolist() == [[0, 3, 8, 16, 16, 16, 16, 16], [0, 2, 4, 6, 8, 15, 16, 16]]
    assert found.bounds.dtype == np.int32
