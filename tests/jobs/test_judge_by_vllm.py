"""A server of vLLM as the judge: a tiny model that knows two verdicts, weighed as the same model weighs them here."""

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jobs.judge_benchmark import judge_benchmark, judge_benchmark_command
from pipeline.benchmark.alpaca_eval.judging import is_switched
from pipeline.data.planted import CHAT_TEMPLATE
from pipeline.models.backbone import create_tiny_causal_lm, load_causal_lm, save_causal_lm
from tests.conftest import SMALLEST

parse = judge_benchmark_command.options

pytestmark = [pytest.mark.components, pytest.mark.long]

INSTRUCTIONS = ("boat", "what boat", "boat boat", "which boat or what")
KEY = "sk-of-this-test"


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """Six tokens, so that a verdict is always among the five alternatives that the judge is asked for."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "m", "M", "boat"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    model = create_tiny_causal_lm(SMALLEST, tokenizer, seed=0)
    directory = str(tmp_path_factory.mktemp("judge"))
    save_causal_lm(model.state_dict(), model.config, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def judge_url(judge_model, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", judge_model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny-judge", "--api-key", KEY]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)
    try:
        ends = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < ends, log.read_text()[-4000:]
            try:
                if httpx.get(f"{url}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_verdicts_of_a_vllm_server_are_weighed_as_its_model_weighs_them(judge_model, judge_url, tmp_path, monkeypatch):
    monkeypatch.setenv("VRM_JUDGE_API_KEY", KEY)
    template = tmp_path / "clf.txt"
    template.write_text("<|im_start|>user\n{instruction} m {output_1} M {output_2}\n<|im_end|>")
    outputs = {
        "ours": [{"instruction": word, "output": f"{word} boat", "generator": "ours"} for word in INSTRUCTIONS],
        "base": [{"instruction": word, "output": f"a {word}", "generator": "base"} for word in INSTRUCTIONS],
    }
    for side, rows in outputs.items():
        (tmp_path / f"{side}.json").write_text(json.dumps(rows))
    out = tmp_path / "annotations.json"
    arguments = ["--benchmark", "alpaca_eval", "--answers", str(tmp_path / "ours.json")]
    arguments += ["--baseline", str(tmp_path / "base.json"), "--templates", str(template), "--out", str(out)]
    judge_benchmark(parse([*arguments, "--judge", judge_url, "--model", "tiny-judge"]))

    model, tokenizer = load_causal_lm(judge_model, dtype="float32")
    verdicts = tokenizer.convert_tokens_to_ids(["m", "M"])
    rows = json.loads(out.read_text())
    assert [row["instruction"] for row in rows] == list(INSTRUCTIONS)
    for row, ours, base in zip(rows, outputs["ours"], outputs["base"], strict=True):
        switched = is_switched(row["instruction"])
        first, second = (ours["output"], base["output"]) if switched else (base["output"], ours["output"])
        conversation = f"<|im_start|> user {row['instruction']} m {first} M {second} <|im_end|> <|im_start|> assistant"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(conversation, add_special_tokens=False).input_ids])).logits[0, -1]
        seen = logits.topk(5)
        for_first, for_second = (seen.values.exp()[seen.indices == verdict].sum().item() for verdict in verdicts)
        share = for_second / (for_first + for_second)
        assert row["preference"] == pytest.approx(1.0 + (1.0 - share if switched else share), abs=1e-4)
    assert len({round(row["preference"], 6) for row in rows}) > 1
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert (summary["requests"], summary["sent"]) == (4, 4)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
