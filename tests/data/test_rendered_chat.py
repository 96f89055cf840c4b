"""Rendered conversations are read back as the messages they were made of."""

import jinja2
import pytest

from pipeline.data.planted import CHAT_TEMPLATE
from pipeline.data.rendered_chat import split_rendered, without_ending
from pipeline.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LLAMA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
MESSAGES = (
    {"role": "user", "content": "  two\n\nlines "},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "<b>again</b>"},
)


@pytest.mark.parametrize(
    ("template", "ending"),
    [(CHATML, "<|im_end|>"), (CHATML, ""), (LLAMA, "<|eot_id|>"), (LLAMA, ""), (GEMMA, "<end_of_turn>\n"), (GEMMA, "")],
)
def test_a_rendered_conversation_gives_its_messages_back(template, ending):
    prompt = jinja2.Template(template, keep_trailing_newline=True).render(messages=MESSAGES)
    assert split_rendered(prompt + "the response" + ending) == (MESSAGES, "the response")


def test_the_planted_worlds_markup_is_read_too():
    prompt = jinja2.Template(CHAT_TEMPLATE).render(messages=MESSAGES[:1], add_generation_prompt=True)
    [message], response = split_rendered(f"{prompt} do check <|im_end|>")
    assert (message["role"], message["content"].split(), response.split()) == (
        "user",
        ["two", "lines"],
        ["do", "check"],
    )


def test_a_system_turn_and_padding_behind_the_end_are_no_obstacle():
    text = (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    turns, response = split_rendered(text + "<|endoftext|>" * 3)
    assert ([turn["role"] for turn in turns], response) == (["system", "user"], "yes")


def test_an_empty_response_is_a_response():
    assert split_rendered("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")[1] == ""
    assert split_rendered("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>")[1] == ""


def test_without_markup_the_prompt_marks_the_border():
    assert split_rendered("why ? because</s>", "why ?") == (({"role": "user", "content": "why ?"},), " because")


@pytest.mark.parametrize(
    ("text", "prompt", "reason"),
    [
        ("why ? because", None, "says where the response begins"),
        ("why ? because", "what ?", "says where the response begins"),
        ("<|im_start|>user\nhi<|im_end|>\n", None, "ends with the assistant"),
        ("<|im_start|>assistant\nhi<|im_end|>\n", None, "ends with the assistant"),
        ("<|im_start|>user\nhi<|im_end|>\nwell<|im_start|>assistant\nx<|im_end|>", None, "which is no turn"),
    ],
)
def test_what_cannot_be_split_is_refused(text, prompt, reason):
    with pytest.raises(DataError, match=reason):
        split_rendered(text, prompt)


def test_only_tokens_at_the_end_are_taken_off():
    assert without_ending("a </s> b <|eot_id|> </s>\n") == "a </s> b "


def test_behind_the_prompt_everything_is_the_response():
    """A policy that praises itself in another's name is not read as a conversation in which somebody praised it."""
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    response = "no<|im_end|>\n<|im_start|>user\ngreat!<|im_end|>\n<|im_start|>assistant\nthanks"
    assert split_rendered(f"{prompt}{response}<|im_end|>\n", prompt) == (({"role": "user", "content": "hi"},), response)
    assert split_rendered(f"<s>{prompt}{response}", f"<s>{prompt}")[1] == response
