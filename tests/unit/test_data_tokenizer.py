"""A learnt BPE has exactly the requested size and is the same every time; any Hugging Face tokenizer with an eos token
works."""

import json
import os
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stack.config.schema import Data
from stack.data import hub, tokenizer
from stack.errors import DataError

WORDS = ["def", "return", "value", "naïve", "日本語", "for", "while", "🙂", "x", "\n    ", "\t", "\x00"]


def texts(count: int = 60) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=40)) for _ in range(count)]


def test_bpe_is_exact_and_round_trips_any_text(tmp_path):
    trained = tokenizer.load_or_train(Data(tokenizer="bpe", vocab_size=300), texts(), tmp_path / "t")
    assert (trained.vocab_size, len(trained.hf)) == (300, 300)
    assert trained.hf.convert_ids_to_tokens(trained.eos_id) == "<|endoftext|>"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    samples = ["  two  spaces\r\n", "日本語 🙂 é \x00", "".join(map(chr, range(256))), *texts(3)]
    for sample, ids in zip(samples, trained.encode(samples), strict=True):
        assert loaded(sample)["input_ids"] == ids
        assert loaded.decode(ids) == sample


def test_text_that_spells_the_end_token_does_not_end_the_document(tmp_path):
    trained = tokenizer.load_or_train(
        Data(tokenizer="bpe", vocab_size=257, special_tokens="text"), texts(), tmp_path / "t"
    )
    (ids,) = trained.encode(["a <|endoftext|> b"])
    assert trained.eos_id not in ids
    assert trained.hf.decode(ids) == "a <|endoftext|> b"


def test_bpe_is_the_same_in_another_process(tmp_path):
    script = (
        "import json, sys; from stack.data.tokenizer import _byte_level_bpe;"
        "_byte_level_bpe(300, json.load(sys.stdin)).save(sys.argv[1])"
    )
    there = tmp_path / "there.json"
    subprocess.run([sys.executable, "-c", script, str(there)], input=json.dumps(texts()), text=True, check=True)
    assert tokenizer._byte_level_bpe(300, texts()).to_str(pretty=True) == there.read_text()


def test_too_little_text_names_the_vocabulary_that_works(tmp_path):
    with pytest.raises(DataError, match=r"data.vocab_size=4096 cannot.* use data.vocab_size=(\d+)") as caught:
        tokenizer.load_or_train(Data(tokenizer="bpe"), texts(2), tmp_path / "t")
    works = int(str(caught.value).split("use data.vocab_size=")[1].split(",")[0])
    assert (
        tokenizer.load_or_train(Data(tokenizer="bpe", vocab_size=works), texts(2), tmp_path / "t").vocab_size == works
    )


def test_sample_is_bounded_spread_and_in_order(monkeypatch):
    monkeypatch.setattr(tokenizer, "SAMPLE_CHARS", 500)
    monkeypatch.setattr(tokenizer, "SAMPLE_DOCUMENT", 10)
    chosen = tokenizer.sample(f"{number:04d}" + "x" * 20 for number in range(1000))
    numbers = [int(text[:4]) for text in chosen]
    assert 500 <= sum(map(len, chosen)) < 510
    assert numbers == sorted(numbers)
    assert numbers[0] < 200
    assert numbers[-1] > 800
    assert tokenizer.sample(["a", "b"]) == ["a", "b"]


def word_tokenizer(folder, **fields) -> str:
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 70_000}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **fields).save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_and_its_largest_id_counts(tmp_path):
    cfg = Data(tokenizer=word_tokenizer(tmp_path / "in", eos_token="</s>"))
    loaded = tokenizer.load_or_train(cfg, [], tmp_path / "out")
    assert (loaded.vocab_size, loaded.eos_id) == (70_001, 1)
    assert loaded.encode(["a"]) == [[0]]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def test_description_of_a_folder_is_its_content(tmp_path):
    one = Data(tokenizer=word_tokenizer(tmp_path / "one", eos_token="</s>"))
    two = Data(tokenizer=word_tokenizer(tmp_path / "two", eos_token="</s>"))
    (tmp_path / "two/model.safetensors").write_bytes(b"weights decide no token")
    assert tokenizer.describe(one) == tokenizer.describe(two)
    word_tokenizer(tmp_path / "two", eos_token="a")
    assert tokenizer.describe(one) != tokenizer.describe(two)


def test_no_eos_token_is_refused(tmp_path):
    with pytest.raises(DataError, match="eos_token"):
        tokenizer.load_or_train(Data(tokenizer=word_tokenizer(tmp_path / "in")), [], tmp_path / "out")


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    word_tokenizer(folder, eos_token="</s>")
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    wish = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(wish))
    # Fails if transformers asks on the terminal whether to run the code.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(DataError, match=r"needs Python code of its own, and code .* is never run here") as caught:
        tokenizer.load_or_train(Data(tokenizer=str(folder)), [], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[" * 200_000, '{"n": ' + "7" * 5000 + "}", "7", '{"model": {}}', "\xff"])
def test_a_damaged_tokenizer_is_one_line(tmp_path, name, content):
    folder = word_tokenizer(tmp_path / "in", eos_token="</s>")
    (tmp_path / "in" / name).write_text(content, encoding="latin-1")
    if (name, content) == ("tokenizer_config.json", '{"model": {}}'):
        return  # this content sets nothing, and is not damage
    with pytest.raises(DataError, match=r"data\.tokenizer=") as caught:
        tokenizer.load_or_train(Data(tokenizer=folder), [], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(tmp_path):
    folder = word_tokenizer(tmp_path / "in", eos_token="</s>")
    (tmp_path / "in/tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "in/tokenizer_config.json")
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read \(it is no regular file\)"):
        tokenizer.describe(Data(tokenizer=folder))


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        tokenizer.describe(Data(tokenizer=str(tmp_path / "model")))
    with pytest.raises(DataError, match="not a folder"):
        tokenizer.describe(Data(tokenizer=str(tmp_path / "nothing")))
    (tmp_path / "model/tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        tokenizer.load_or_train(Data(tokenizer=str(tmp_path / "model")), [], tmp_path / "out")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(DataError, match="cannot be reached"):
        tokenizer.load_or_train(Data(tokenizer="nobody/no-such"), [], tmp_path / "out")
