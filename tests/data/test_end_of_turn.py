"""A turn ends with what the template writes behind an answer; a sampler stops at every token that the model names."""

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import decode_response, encode_prompt, encode_response
from pipeline.data.chat_rendering import render
from pipeline.data.end_of_turn import end_of_turn_ids, turn_end
from pipeline.errors import DataError
from tests.support.chat_families import FAMILIES

WITH_TEMPLATE = {name: family for name, family in FAMILIES.items() if family.template}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def ids(tokenizer, tokens):
    return tuple(tokenizer.convert_tokens_to_ids([*tokens]))


def test_the_template_the_tokenizer_and_the_model_name_the_ends(family):
    tokenizer = family.tokenizer()
    expected = ids(tokenizer, family.ends)
    assert turn_end(tokenizer) == expected[0]
    assert end_of_turn_ids(tokenizer, [*ids(tokenizer, family.own_ends)]) == expected
    without_eos = [token for token in family.own_ends if token != family.eos]
    assert {*end_of_turn_ids(tokenizer, [*ids(tokenizer, without_eos)])} == {*expected}


def test_one_end_may_stand_alone_or_be_missing_or_lie_outside_the_vocabulary():
    tokenizer = FAMILIES["Gemma"].tokenizer()
    assert (tokenizer.eos_token_id, turn_end(tokenizer)) == (257, 259)
    assert end_of_turn_ids(tokenizer, 257) == (259, 257)
    assert end_of_turn_ids(tokenizer, None) == (259, 257)
    assert end_of_turn_ids(tokenizer, [97, 50256]) == (259, 257, 97)


@pytest.mark.parametrize("name", sorted(WITH_TEMPLATE))
def test_prompt_and_response_are_what_the_template_writes_of_the_whole_conversation(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    question = {"role": "user", "content": "Which river?"}
    whole = render(tokenizer, [question, {"role": "assistant", "content": "The Elbe"}], add_generation_prompt=False)
    encoded = (*encode_prompt(tokenizer, [question]), *encode_response(tokenizer, "The Elbe"))
    if name == "GPT-2, plain":
        # Its template writes no token behind an answer, so the answer is taught to end with eos_token.
        assert tokenizer.decode(encoded) == "user: Which river?\n\nassistant:The Elbe<|endoftext|>"
    else:
        assert whole.startswith(tokenizer.decode(encoded))


def test_a_response_ends_once_and_its_text_has_no_end(family):
    tokenizer = family.tokenizer()
    response = encode_response(tokenizer, f"The {family.ends[0]} Elbe")
    assert [index in ids(tokenizer, family.ends[:1]) for index in response] == [False] * (len(response) - 1) + [True]
    elbe = encode_response(tokenizer, "The Elbe")
    assert decode_response(tokenizer, elbe) == decode_response(tokenizer, elbe[:-1]) == "The Elbe"


def test_a_template_that_is_replaced_ends_its_turns_otherwise():
    tokenizer = FAMILIES["Gemma"].tokenizer()
    assert turn_end(tokenizer) == 259
    tokenizer.chat_template = FAMILIES["GPT-2, plain"].template
    assert turn_end(tokenizer) == 257


def test_a_template_that_hides_the_answer_is_refused():
    tokenizer = FAMILIES["Gemma"].tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="leaves out the words of the assistant"):
        encode_response(tokenizer, "The Elbe")


def test_the_planted_world_ends_its_turns_as_before(tokenizer: PreTrainedTokenizerFast):
    assert end_of_turn_ids(tokenizer, None) == (tokenizer.eos_token_id,)
