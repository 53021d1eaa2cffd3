from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from treerpo_ray.quickstart.make_model import MODEL_FOLDER
from treerpo_ray.quickstart.tokenizer import EOS, PAD, make_tokenizer

SAVED = AutoTokenizer.from_pretrained(MODEL_FOLDER)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates have no UTF-8


@given(ANY_TEXT)
def test_any_text_passes_through_as_one_token_a_byte_and_comes_back(text):
    text = normalize("NFC", text)
    token_ids = SAVED.encode(text)
    assert len(token_ids) == len(text.encode())
    assert all(token_id < 256 for token_id in token_ids)
    assert SAVED.decode(token_ids) == text


@given(ANY_TEXT)
def test_text_in_another_normal_form_comes_back_in_nfc(text):
    assert SAVED.decode(SAVED.encode(text)) == normalize("NFC", text)


def test_decomposed_and_composed_letters_are_the_same_prompt():
    assert SAVED.encode("e\u0301") == SAVED.encode("\u00e9")


def test_special_tokens_written_out_in_a_text_stay_bytes():
    text = f"a{EOS}b{PAD}"
    assert SAVED.encode(text) == [token_id for char in text for token_id in SAVED.encode(char)]
    assert SAVED.decode(SAVED.encode(text), skip_special_tokens=True) == text


def test_end_and_padding_tokens_are_left_out_of_the_text():
    token_ids = [*SAVED.encode("51"), SAVED.eos_token_id, SAVED.pad_token_id]
    assert SAVED.decode(token_ids, skip_special_tokens=True) == "51"
    assert SAVED.decode(token_ids) == f"51{EOS}{PAD}"


@given(st.lists(st.integers(0, 257)))
def test_any_token_ids_decode_to_some_text(token_ids):
    assert isinstance(SAVED.decode(token_ids), str)


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", "1+1=?")], "1+1=?\n"),
        ([("system", "Add."), ("user", "1+1=?")], "Add.\n1+1=?\n"),
    ],
)
def test_the_chat_template_is_each_message_and_a_newline(messages, prompt):
    chat = [{"role": role, "content": content} for role, content in messages]
    for tokenizer in (SAVED, make_tokenizer()):
        token_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert token_ids == tokenizer.encode(prompt)


def test_the_saved_tokenizer_is_the_one_that_the_script_makes():
    made = make_tokenizer()
    assert type(SAVED) is type(made)
    assert SAVED.get_vocab() == made.get_vocab()
    assert len(SAVED) == 258
    assert (SAVED.eos_token_id, SAVED.pad_token_id) == (256, 257)
