"""The generation job on a real engine, against the Hugging Face model it must agree with."""

import json
from contextlib import ExitStack, contextmanager

import pytest
import torch

from jobs.generate_answers import generate_answers, generate_answers_command, open_pool
from pipeline.benchmark.alpaca_eval.model_outputs import read_model_outputs
from pipeline.benchmark.mt_bench.answers import read_mt_bench_answers
from pipeline.data.chat import encode_prompt
from pipeline.models.backbone import load_causal_lm

parse = generate_answers_command.options

pytestmark = [pytest.mark.components, pytest.mark.usefixtures("local_ray")]

QUESTIONS = [
    {"question_id": n, "category": category, "turns": [f"the boat {n} ?", "why is the kite ?"]}
    for n, category in enumerate(("math", "coding", "writing", "extraction") * 3, start=81)
]
INSTRUCTIONS = [{"instruction": f"explain the {word} ?"} for word in ("boat", "kite", "bread", "stove", "sea", "lamp")]


@pytest.fixture(scope="module")
def answer(tiny_policy, tmp_path_factory):
    """Runs the job, with one engine for all runs; returns where its answers lie."""
    directory = tmp_path_factory.mktemp("answers")
    with ExitStack() as exits:
        opened = []

        @contextmanager
        def open_once(*arguments):
            if not opened:
                opened.append(exits.enter_context(open_pool(*arguments)))
            yield opened[0]

        def answer(benchmark, rows, *more, out):
            prompts = directory / f"{benchmark}.jsonl"
            prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
            arguments = ["--benchmark", benchmark, "--model", tiny_policy, "--prompts", str(prompts), "--name", "tiny"]
            arguments += ["--max-response-tokens", "8", "cluster.rollout.workers=1", "cluster.rollout.max_sequences=4"]
            # Fewer places in the engine than questions: some wait there, some on the driver.
            arguments += ["cluster.rollout.chunk_size=2", "--out", str(directory / out)]
            generate_answers(parse([*arguments, *more]), open_once)
            return directory / out

        yield answer


def greedy(model, tokenizer, messages):
    prompt = encode_prompt(tokenizer, messages)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_both_turns_of_mt_bench_are_what_the_model_says(answer, tiny_policy):
    out = answer("mt_bench", QUESTIONS, out="mt")
    answers = read_mt_bench_answers([str(out / "model_answer/tiny.jsonl")])
    assert [answer.question_id for answer in answers] == [question["question_id"] for question in QUESTIONS]
    model, tokenizer = load_causal_lm(tiny_policy, dtype="float32")
    for question, answered in zip(QUESTIONS, answers, strict=True):
        first, second = answered.turns
        messages = [{"role": "user", "content": question["turns"][0]}]
        greedy_turns = [greedy(model, tokenizer, messages)]
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": question["turns"][1]}]
        greedy_turns.append(greedy(model, tokenizer, messages))
        # Writing is sampled at 0.7, the others at 0.
        assert ((first, second) == tuple(greedy_turns)) == (question["category"] != "writing")


def test_an_alpaca_eval_run_in_two_parts_gives_the_answers_of_one(answer):
    whole = read_model_outputs(answer("alpaca_eval", INSTRUCTIONS, out="whole") / "model_outputs.json")
    answer("alpaca_eval", INSTRUCTIONS, "--limit", "2", out="parts")
    parts = read_model_outputs(answer("alpaca_eval", INSTRUCTIONS, out="parts") / "model_outputs.json")
    assert parts == whole
    assert len({row.output for row in whole}) == len(INSTRUCTIONS)
