"""What a chat template may do with a conversation, and what is refused."""

from datetime import datetime, timedelta

import pytest

from pipeline.data.chat import encode_prompt
from pipeline.errors import DataError
from tests.support.chat_families import FAMILIES

USER = {"role": "user", "content": "Name a river"}
DATED = (
    "{{ '<start_of_turn>system\nToday is ' + strftime_now('%d %b %Y') + '<end_of_turn>\n' }}"
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}{{ m.role + ': ' + m.content[0]['text'] + '<end_of_turn>' }}{% endfor %}"
ADDED_PARTS = "{% for m in messages %}{{ m.role + ': ' + [m.content] + '<end_of_turn>' }}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ '<start_of_turn>' + m.role + '\n' + m.content "
    "+ '<end_of_turn>\n' }}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return FAMILIES["Gemma"].tokenizer()


def test_a_template_that_asks_for_the_date_gets_one_and_the_same(tokenizer):
    tokenizer.chat_template = DATED
    text = tokenizer.decode(encode_prompt(tokenizer, [USER]))
    assert "Today is 26 Jul 2024<end_of_turn>" in text
    # As transformers renders it, the date is the clock's.
    assert "26 Jul 2024" not in tokenizer.apply_chat_template([USER], tokenize=False)


def test_the_tokens_are_the_same_on_every_day(tokenizer, monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    tokenizer.chat_template = DATED
    theirs, ours = tokenizer.apply_chat_template([USER], tokenize=False), encode_prompt(tokenizer, [USER])
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert tokenizer.apply_chat_template([USER], tokenize=False) != theirs
    assert encode_prompt(tokenizer, [USER]) == ours


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PARTS, r"leaves out the words of the user, 'a question'\. A template that wants content parts"),
        (FIRST_PART, r"refuses this conversation \(speakers: user"),
        (ADDED_PARTS, r"refuses this conversation \(speakers: user"),
    ],
    ids=["parts", "undefined", "TypeError"],
)
def test_a_template_that_wants_content_parts_is_refused(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=reason):
        encode_prompt(tokenizer, [USER])


def test_a_template_that_drops_the_system_turn_is_refused(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    assert "Name a river" in tokenizer.decode(encode_prompt(tokenizer, [USER]))
    with pytest.raises(DataError, match="leaves out the words of the system, 'Answer in German'"):
        encode_prompt(tokenizer, [{"role": "system", "content": "Answer in German"}, USER])


def test_a_template_may_trim_and_join_lines(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' + m.content | trim | replace('\n\n', '\n') + '<end_of_turn>' }}"
        "{% endfor %}"
    )
    two_paragraphs = {"role": "user", "content": "  Name a river\n\nand a lake\n"}
    text = tokenizer.decode(encode_prompt(tokenizer, [two_paragraphs]))
    assert text == "<start_of_turn>Name a river\nand a lake<end_of_turn>"


def test_without_a_template_nothing_is_rendered():
    with pytest.raises(DataError, match="has no chat template"):
        encode_prompt(FAMILIES["GPT-2"].tokenizer(), [USER])
