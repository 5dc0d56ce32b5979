"""Special tokens in a text, and the tokens that begin a document, with many kinds of tokenizers."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stack.data.encoder import Encoder
from stack.errors import DataError
from tests.helpers.tokenizers import KINDS, build, metaspace, sentencepiece

SPELLED = ["<s>user\nhello</s>", "a <sep> b [MASK]  c</s>", "x</s>y<s>", "no token at all, <user> zebra"]


def hugging_face(backend: Tokenizer, **fields) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **fields)


@pytest.mark.parametrize("name", KINDS)
def test_parse_is_what_transformers_does_and_text_gives_no_special_token(name):
    hf = hugging_face(KINDS[name][0](), bos_token="<s>")
    parse, text = (Encoder(hf, special_tokens=how) for how in ("parse", "text"))
    assert parse.encode(SPELLED) == hf(SPELLED, add_special_tokens=False)["input_ids"]
    special = set(hf.all_special_ids) | {i for i, token in hf.added_tokens_decoder.items() if token.special}
    # A letter that the vocabulary lacks gives the unknown token with both settings.
    assert not set(sum(text.encode(SPELLED), [])) & (special - {hf.unk_token_id})  # noqa: RUF017
    assert text.encode(SPELLED[3:]) == parse.encode(SPELLED[3:])
    other = hf.convert_tokens_to_ids("<user>")
    assert other in text.encode(SPELLED[3:])[0]


def test_documents_that_spell_special_tokens_are_counted():
    encoder = Encoder(hugging_face(build("bpe", pre_tokenizer=pre.ByteLevel(False))), special_tokens="parse")
    assert encoder.note() == ""
    for text in [*SPELLED, "</s></s>"]:
        encoder.count_spelled(text)
    line = encoder.note()
    assert line.startswith("4 documents spell special tokens: </s> (4), <s> (2), ")
    assert "<sep> (1)" in line
    assert line.endswith("; they were read as these tokens (data.special_tokens=text reads them as ordinary text)")


def test_a_special_token_is_counted_in_any_case_where_the_text_is_made_lower_case():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[mask]": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("[mask]", normalized=True)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    encoder = Encoder(hf, special_tokens="text")
    assert Encoder(hf, special_tokens="parse").encode(["a [MASK]"]) == [[0, 1]]
    assert encoder.encode(["a [MASK]"]) == [[0, 0]]
    encoder.count_spelled("a [MASK]")
    assert encoder.note().startswith("1 document spells special tokens: [MASK] (1); they were read as text (")


def template(backend: Tokenizer, single: str) -> Tokenizer:
    ids = {name: backend.token_to_id(name) for name in ("<s>", "</s>")}
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    return backend


@pytest.mark.parametrize(
    ("single", "begins"),
    [("<s> $A", "<s>"), ("<s> $A </s>", "<s>"), ("$A </s>", ""), ("$A", ""), ("</s> $A </s>", "</s>")],
)
def test_a_document_begins_as_the_tokenizer_begins_a_text(single, begins):
    backend = template(build("unigram", pre_tokenizer=metaspace("always")), single)
    hf = hugging_face(backend)
    begin = Encoder(hf, special_tokens="parse").begin
    assert begin == tuple(hf.convert_tokens_to_ids([begins] if begins else []))
    assert hf("the house")["input_ids"][: len(begin)] == list(begin)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_sentencepiece_file_alone_is_a_tokenizer(tmp_path, model_type, adds_bos):
    sentencepiece(tmp_path, model_type)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", '
        f'"add_bos_token": {str(adds_bos).lower()}}}'
    )
    hf = AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder(hf, special_tokens="parse")
    assert encoder.begin == ((1,) if adds_bos else ())
    text = "the small house </s> zebra"
    assert [*encoder.begin, *encoder.encode([text])[0]] == hf(text)["input_ids"]
    assert 2 not in Encoder(hf, special_tokens="text").encode([text])[0]


def test_an_added_token_that_does_not_occur_needs_no_row():
    hf = hugging_face(build("wordpiece", pre_tokenizer=pre.BertPreTokenizer()))
    size = len(hf)
    hf.add_special_tokens({"pad_token": "[PAD]"})
    encoder = Encoder(hf, special_tokens="parse")
    assert encoder.vocab_size == size + 1
    assert encoder.ordinary_size < size


def test_a_text_without_a_token_is_one_line():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    backend.pre_tokenizer = pre.WhitespaceSplit()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), special_tokens="parse")
    with pytest.raises(DataError, match="cannot encode the text"):
        encoder.encode(["a b"])
