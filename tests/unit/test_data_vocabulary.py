"""A corpus fits a pretrained model only if its token ids stand for the same tokens."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stack.config.schema import Config, Data, Model
from stack.data.tokenizer import load_or_train
from stack.data.vocabulary import check_choice, check_vocabulary
from stack.errors import DataError
from tests.helpers.tokenizers import sentencepiece


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


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.model"])
def test_older_layouts_of_a_model_folder_are_compared(model, tmp_path, layout):
    other, same = tmp_path / "other" / "tokenizer", tmp_path / "same" / "tokenizer"
    older = tmp_path / "older"
    older.mkdir()
    tokenizer(other, "what is in a name, what is in it")
    if layout == "vocab.json":
        AutoTokenizer.from_pretrained(model).save_pretrained(same)
        vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        (older / layout).write_text(json.dumps(vocabulary))
        (older / "merges.txt").write_text("")
    else:
        sentencepiece(older, "bpe")
        load_or_train(Data(tokenizer=str(older)), [], same)
        # The tokenizer of the corpus is saved as tokenizer.json, so two layouts are compared.
        assert (same / "tokenizer.json").is_file()
    check_vocabulary(same.parent, older)
    with pytest.raises(DataError, match=r"another vocabulary than that of .*older"):
        check_vocabulary(other.parent, older)
    (older / layout).write_text("{")
    with pytest.raises(DataError, match=f"{layout} is damaged, it is no tokenizer"):
        check_vocabulary(same.parent, older)


def config(tmp_path, tokenizer: str) -> Config:
    return Config(model=Model(name=str(tmp_path / "model"), init="pretrained"), data=Data(tokenizer=tokenizer))


def test_pretrained_weights_do_not_learn_a_vocabulary(model, tmp_path):
    with pytest.raises(DataError, match=f"bpe learns a new vocabulary.*; use data.tokenizer={model}$"):
        check_choice(config(tmp_path, "bpe"))
    check_choice(config(tmp_path, str(model)))
    for file in model.iterdir():
        file.unlink()
    (model / "config.json").write_text("{}")
    for chosen, why in (("bpe", "learns a new"), (str(model), "holds no tokenizer")):
        with pytest.raises(DataError, match=f"{why}.*; use data.tokenizer=FOLDER, the folder of the tokenizer"):
            check_choice(config(tmp_path, chosen))
    check_choice(config(tmp_path, "elsewhere"))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"n": ' + "7" * 5000 + "}", "7", '{"model": {"vocab": 3}}'])
def test_a_crafted_tokenizer_is_one_line(model, tmp_path, content):
    tokenizer(tmp_path / "tokenizer", "to be or not to be, to be")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json is damaged"):
        check_vocabulary(tmp_path, model)


def test_without_a_tokenizer_there_is_nothing_to_compare(model, tmp_path):
    check_vocabulary(tmp_path, model)
    check_vocabulary(tmp_path, tmp_path)


def test_a_damaged_tokenizer_is_named(model, tmp_path):
    tokenizer(tmp_path / "tokenizer", "to be or not to be, to be")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is damaged, it is no tokenizer"):
        check_vocabulary(tmp_path, model)
