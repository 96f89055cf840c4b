"""The generation job on real engines: two turns, resumed, and the files that upstream's own code reads."""

import json

import pytest

from jobs.benchmark_answers import answer_benchmark, parse
from pipeline.data.chat import encode_prompt
from pipeline.models.backbone import load_causal_lm

pytestmark = [pytest.mark.components, pytest.mark.usefixtures("local_ray")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def greedy(model, tokenizer, messages, num_tokens):
    import torch

    prompt = encode_prompt(tokenizer, messages)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens)[0, len(prompt) :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_real_engines_hold_both_turns_of_a_conversation(tiny_policy, tmp_path, capfd):
    categories = ("math", "coding", "writing")
    questions = [
        {"question_id": n, "category": categories[n % 3], "turns": [f"the boat {n} ?", "why is the kite ?"]}
        for n in range(81, 93)
    ]
    prompts = write(tmp_path / "question.jsonl", questions)
    arguments = ["--benchmark", "mt_bench", "--model", tiny_policy, "--prompts", prompts, "--name", "tiny"]
    arguments += ["--max-response-tokens", "8", "cluster.rollout.workers=2", "cluster.rollout.max_sequences=4"]
    said = answer_benchmark(parse([*arguments, "--out", str(tmp_path / "out")]))
    assert "12 questions, 24 answers" in said

    rows = [json.loads(line) for line in (tmp_path / "out/model_answer/tiny.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(81, 93))
    model, tokenizer = load_causal_lm(tiny_policy, dtype="float32")
    for question, row in zip(questions, rows, strict=True):
        if question["category"] == "writing":
            continue
        first, second = row["choices"][0]["turns"]
        messages = [{"role": "user", "content": question["turns"][0]}]
        assert first == greedy(model, tokenizer, messages, 8)
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": question["turns"][1]}]
        assert second == greedy(model, tokenizer, messages, 8)
