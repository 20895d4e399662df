import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HF
from tokenizers import models, pre_tokenizers, processors

from transfusion.tokenizer import load_tokenizer, train_tokenizer

SPELLED = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<patch>"]
shipped = load_tokenizer()
hard_text = st.lists(st.sampled_from(SPELLED) | st.text(max_size=8), max_size=6).map("".join)


@given(hard_text)
def test_every_text_comes_back_to_the_letter_and_never_as_a_special_token(text):
    ids = shipped.encode(text)
    assert shipped.decode(ids) == text
    assert not set(ids) & set(vars(shipped.special).values())
    assert shipped.encode_many([text, ""]) == [ids, []]


def test_special_tokens_are_the_first_ids_and_are_left_out_of_text():
    assert list(vars(shipped.special).values()) == [0, 1, 2, 3, 4, 5]
    s = shipped.special
    assert (
        shipped.decode([s.bos, *shipped.encode("a red"), s.boi, s.patch, s.eoi, *shipped.encode(" apple"), s.eos])
        == "a red apple"
    )
    assert shipped.encode("") == [] and shipped.decode([]) == ""


def test_a_trained_tokenizer_compresses_what_it_saw_and_is_the_same_when_trained_again():
    texts = ["the cat sat on the mat", "the bat sat on the hat"] * 50
    tokenizer = train_tokenizer(texts, 300)
    assert 262 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(texts[0])) < 0.5 * len(texts[0])
    assert train_tokenizer(iter(texts), 300).hf.to_str() == tokenizer.hf.to_str()
    unseen = "\u732b \x00 \U0001f408"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_training_on_text_that_spells_special_tokens_does_not_make_them_text():
    tokenizer = train_tokenizer([" ".join(SPELLED)] * 100, 400)
    for name in SPELLED:
        assert not set(tokenizer.encode(name)) & set(range(6))
        assert tokenizer.decode(tokenizer.encode(name)) == name


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    assert train_tokenizer([], 262).vocab_size == 262
    with pytest.raises(ValueError, match="take 262"):
        train_tokenizer(["a"], 261)


def test_a_saved_tokenizer_is_loaded_the_same(tmp_path):
    tokenizer = train_tokenizer(["hello hello world"] * 9, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert again.special == tokenizer.special and again.vocab_size == tokenizer.vocab_size
    assert again.encode("hello <eos> world") == tokenizer.encode("hello <eos> world")


def test_a_foreign_tokenizer_gets_the_missing_special_tokens_behind_its_vocabulary(tmp_path):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    hf = HF(models.BPE(vocab, []))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.add_special_tokens(["<|begin|>", "<eos>"])  # 256 and 257: one of ours is there already
    hf.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 256)])
    hf.enable_truncation(4)
    hf.enable_padding(length=16)
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    s = tokenizer.special
    assert s.eos == 257 and sorted(vars(s).values()) == [257, 258, 259, 260, 261, 262]
    assert tokenizer.vocab_size == 263
    ids = tokenizer.encode("<|begin|><boi> seven")
    assert len(ids) == len("<|begin|><boi> seven") and max(ids) < 256  # no template, no truncation, no padding


def test_a_tokenizer_that_would_confuse_text_with_special_tokens_is_refused(tmp_path):
    hf = HF(models.WordLevel({"<boi>": 0, "other": 1, "?": 2}, unk_token="?"))
    hf.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="turns the text '<boi>' into a special token"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_or_foreign_file_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer .*transfusion tokenize"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "no"}))
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
