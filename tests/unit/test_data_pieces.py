"""A document that is tokenized in pieces has the same tokens as the whole document, with many kinds of tokenizers."""

from itertools import chain

import pytest

from stack.data.pieces import cutter
from tests.helpers.tokenizers import KINDS, texts


@pytest.mark.parametrize("name", KINDS)
def test_the_pieces_have_the_tokens_of_the_whole(name):
    make, is_cut = KINDS[name]
    backend = make()
    cuts = cutter(backend.to_str())
    pieces_of_all = 0
    for text in texts(1, 60):
        whole = backend.encode(text, add_special_tokens=False).ids
        for longest in (1, 7, 40):
            pieces = list(cuts.pieces(text, longest))
            assert "".join(pieces) == text
            pieces_of_all += len(pieces) - 1
            ids = [backend.encode(piece, add_special_tokens=False).ids for piece in pieces]
            assert list(chain.from_iterable(ids)) == whole, pieces
    assert (pieces_of_all > 200) == is_cut


def test_a_piece_is_as_long_as_asked_or_to_the_next_cut():
    cuts = cutter(KINDS["gpt2"][0]().to_str())
    assert max(map(len, cuts.pieces("ab " * 50, 20))) <= 20
    assert list(cuts.pieces("x" * 100, 20)) == ["x" * 100]
    assert list(cuts.pieces("!" * 30 + "b " + "b" * 30, 20)) == ["!" * 30 + "b", " " + "b" * 30]
