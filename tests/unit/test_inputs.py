"""Whether the embeddings of a model suffice for a corpus, and advice that works where they do not."""

from types import SimpleNamespace

import pytest

from stack.config.schema import Config, Data, Model
from stack.errors import DataError
from stack.train.inputs import _check_rows


@pytest.mark.parametrize(
    ("init", "advice"),
    [
        ("scratch", "; use model.config.vocab_size=361$"),
        ("pretrained", r"have 360 rows, .*data.tokenizer=tok needs 361; .*m.resize_token_embeddings\(361\)"),
    ],
)
def test_ids_beyond_the_rows_are_refused_and_others_are_not(init, advice):
    cfg = Config(model=Model(name="folder", init=init), data=Data(tokenizer="tok"))
    _check_rows(cfg, 360, SimpleNamespace(vocab_size=360))
    with pytest.raises(DataError, match=advice):
        _check_rows(cfg, 360, SimpleNamespace(vocab_size=361))
