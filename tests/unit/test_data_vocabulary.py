"""A corpus fits a pretrained model only if its ids mean the same tokens."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stack.config.schema import Data
from stack.data.tokenizer import load_or_train
from stack.data.vocabulary import check_vocabulary
from stack.errors import DataError


def tokenizer(folder: Path, text: str) -> Path:
    load_or_train(Data(tokenizer="bpe", vocab_size=262), [text] * 9, folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return tokenizer(tmp_path / "model", "to be or not to be, to be")


def test_the_models_own_tokenizer_fits_with_what_is_added_to_it(model, tmp_path):
    hf = AutoTokenizer.from_pretrained(model)
    hf.save_pretrained(tmp_path / "same" / "tokenizer")
    check_vocabulary(tmp_path / "same", model)
    hf.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    hf.save_pretrained(tmp_path / "more" / "tokenizer")
    check_vocabulary(tmp_path / "more", model)


def test_another_vocabulary_is_refused(model, tmp_path):
    tokenizer(tmp_path / "corpus" / "tokenizer", "what is in a name, what is in it")
    line = (
        r"corpus was tokenized with another vocabulary than that of .*model: id 2\d\d is '.+' in the corpus and '.+' in"
    )
    with pytest.raises(DataError, match=line) as caught:
        check_vocabulary(tmp_path / "corpus", model)
    assert str(caught.value).endswith(f"; use data.tokenizer={model}")


def test_a_larger_vocabulary_of_the_same_beginning_is_refused(model, tmp_path):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = 262
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="id 262 is 'zebra' in the corpus and no token in the model"):
        check_vocabulary(tmp_path, model)


def test_unigram_vocabularies_are_numbered_by_their_order(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer").mkdir()
    pieces = [["a", -1.0], ["b", -2.0]]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}, "added_tokens": []}))
    for order, fits in ((pieces, True), (pieces[::-1], False)):
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": order}}))
        if fits:
            check_vocabulary(tmp_path, tmp_path / "model")
        else:
            with pytest.raises(DataError, match="id 0 is 'b' in the corpus and 'a' in the model"):
                check_vocabulary(tmp_path, tmp_path / "model")


def test_without_a_tokenizer_there_is_nothing_to_compare(model, tmp_path):
    check_vocabulary(tmp_path, model)
    check_vocabulary(tmp_path, tmp_path)


def test_a_damaged_tokenizer_is_named(model, tmp_path):
    tokenizer(tmp_path / "tokenizer", "to be or not to be, to be")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is damaged, it is no tokenizer"):
        check_vocabulary(tmp_path, model)
