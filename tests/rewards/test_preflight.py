"""Bad rewards are refused before anything starts, with the place and the cure."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.rewards import JudgeReward, ModelReward, RewardSourceConfig
from pipeline.errors import CheckpointError, ConfigError, DataError, WorkerError
from pipeline.rewards import math_answers, preflight
from pipeline.rewards.endpoints import Endpoint
from pipeline.rewards.preflight import check_rewards
from tests.rewards.rows import means, rows_of

GROUPS = ("alignment.algorithm=grpo", "alignment.prompts_per_step=32", "alignment.samples_per_prompt=4")


def recipe(*overrides):
    return load_recipe("tiny", [*GROUPS, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alignment.rewards=[]"], "alignment.rewards = (): give at least 1|give at least 1"),
        (["alignment.rewards=[{length: {at_most: 9}, weight: 0}]"], "the weights are all 0"),
        (["alignment.rewards=[{length: {at_most: 9}, weight: -1}]"], "greater than or equal to 0"),
        (["alignment.rewards=[{length: {at_most: 9}}, {length: {target: 9}}]"], "2 sources are named 'length'"),
        (["alignment.rewards=[{length: {at_most: 9}, name: shaped}]"], "'shaped' is the name of another metric"),
        (["alignment.rewards=[{weight: 1}]"], "a reward is one of model, python, .* and this has none of them"),
        (["alignment.rewards=[{model: this_run, math: answer}]"], "and this has model and math"),
        (
            ["alignment.rewards=[{python: reward.py}]"],
            "'reward.py' names no function of a file; write path.py:function",
        ),
        (["alignment.rewards=[{python: {function: 'r.py:f', deadline_s: -1}}]"], "should be greater than 0"),
        (["alignment.rewards=[{regex: '('}]"], "pattern = '\\(' cannot be read"),
        (["alignment.rewards=[{length: {}}]"], "give either target or at_most"),
        (["alignment.rewards=[{math: answer}]"], "'math' reads the column 'answer' .* give data.prompts"),
        (["data.prompts=[p.jsonl]"], "gives no pairs, and the reward model learns from pairs"),
        (["alignment.rewards=[{model: {weights: {kindness: 2}}}]"], "re-weighs 'kindness', which is no objective"),
        (["alignment.rewards=[{model: {weights: {safety: 0}}}]"], "weights are all 0"),
        (["alignment.combine_rewards=gdpo"], "set ppo.advantages=group_centred"),
        (
            [
                *("alignment.combine_rewards=gdpo", "alignment.ppo.advantages=group_centred"),
                "alignment.keep_best=reward/mean",
            ],
            "set keep_best=null",
        ),
        (["alignment.algorithm=dpo", "alignment.rewards=[{length: {at_most: 9}}]"], "set algorithm=grpo"),
        (
            [
                *("alignment.samples_per_prompt=1", "alignment.algorithm=ppo", "alignment.prompts_per_step=128"),
                "alignment.rewards=[{judge: {url: 'http://x/v1', model: m, form: pairwise}}, {length: {at_most: 9}}]",
            ],
            "'judge' compares the responses to one prompt, so samples_per_prompt = 1",
        ),
        (
            ["alignment.rewards=[{judge: {url: 'http://x/v1', model: m, form: pairwise}}]"],
            "'judge' compares the responses to one prompt, but validation and benchmark have one .* form: graded",
        ),
    ],
)
def test_rewards_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        recipe(*overrides)


def test_without_the_model_nothing_is_trained_on_pairs(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"question": "2 + 2 ?", "answer": "4", "id": "a"}))
    alone = recipe(f"data.prompts=[{prompts}]", "sft.num_steps=0", "alignment.rewards=[{exact_match: answer}]")
    assert not alone.alignment.needs_reward_model
    assert not alone.scores_by_reward_model


def test_a_column_that_prompts_lack_is_refused(tmp_path):
    from pipeline.data.recipe_files import check_data

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"question": "2 + 2 ?", "solution": "4"}))
    missing = recipe(f"data.prompts=[{prompts}]", "sft.num_steps=0", "alignment.rewards=[{exact_match: answer}]")
    with pytest.raises(DataError, match=r"line 1: no column 'answer', which the reward 'exact_match' reads.*solution"):
        check_data(missing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("def score(a): pass", r"takes \(a\); write function"),
        ("import os; os._exit(3)", "ended its process"),
    ],
)
def test_a_function_is_imported_in_a_process_of_its_own(tmp_path, text, message):
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_rewards([RewardSourceConfig.model_validate({"python": f"{tmp_path / 'reward.py'}:score"})])


def test_a_good_function_is_looked_at(tmp_path):
    (tmp_path / "reward.py").write_text("def score(prompt, response, columns): return 1")
    sources = [{"python": f"{tmp_path / 'reward.py'}:score"}, {"length": {"at_most": 3}}]
    assert check_rewards([RewardSourceConfig.model_validate(source) for source in sources]) == ["reward python"]


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vrm-pipeline\[math\]'"):
        check_rewards([RewardSourceConfig.model_validate({"math": "answer"})])


# ------------------------------------------------------------------ endpoints


class Answering:
    """An endpoint of OpenRLHF's and of vLLM's form: the reward is the length of the response, and 13 is refused."""

    def __init__(self):
        outer = self
        self.seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((self.path, body))
                status, answer = outer.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if path == "/classify":
            text = body["messages"][-1]["content"]
            return (422, {"detail": "no"}) if len(text) == 13 else (200, {"data": [{"probs": [float(len(text))]}]})
        texts = [q.removeprefix(p) for q, p in zip(body["query"], body["prompts"], strict=True)]
        return 200, {"rewards": [float(len(text)) for text in texts]}


@pytest.fixture
def endpoint():
    answering = Answering()
    yield answering
    answering.server.shutdown()
    answering.server.server_close()


def test_openrlhfs_form_has_prompt_and_response_in_one_text(endpoint):
    source = Endpoint(ModelReward(place=f"{endpoint.url}/get_reward", form="openrlhf"))
    assert means(source.score(rows_of("abc", "a"))) == [3.0, 1.0]
    [(path, body)] = endpoint.seen
    assert path == "/get_reward"
    assert body["query"][1] == "<|im_start|>user\np1 ?<|im_end|>\n<|im_start|>assistant\na"
    source.close()


def test_vllms_form_sends_the_conversation_and_one_refused_row_fails_alone(endpoint):
    source = Endpoint(ModelReward(place=endpoint.url, form="vllm", served_name="rm"))
    assert means(source.score(rows_of("abc", "x" * 13, "a"))) == [3.0, "unanswered", 1.0]
    assert {body["model"] for _, body in endpoint.seen} == {"rm"}
    assert all(body["use_activation"] is False for _, body in endpoint.seen)
    source.close()


def test_an_endpoint_is_asked_one_question_and_one_of_another_form_is_refused(endpoint):
    sources = [{"model": {"place": f"{endpoint.url}/get_reward", "form": "openrlhf"}}]
    assert check_rewards([RewardSourceConfig.model_validate(s) for s in sources]) == ["reward model"]
    wrong = {"model": {"place": endpoint.url, "form": "openrlhf"}}
    endpoint.answer = lambda path, body: (200, {"text": "hello"})
    with pytest.raises(WorkerError, match=r"'model': http.* gives no usable answer: .* Set the form"):
        check_rewards([RewardSourceConfig.model_validate(wrong)])


@pytest.mark.parametrize("form", ["vrm", "openrlhf", "vllm"])
def test_an_endpoint_without_an_answer_is_refused(form, monkeypatch):
    monkeypatch.setattr(preflight, "ANSWER_S", 0.5)
    source = RewardSourceConfig.model_validate({"model": {"place": "http://127.0.0.1:9", "form": form}})
    with pytest.raises(WorkerError, match=r"'model': http://127.0.0.1:9 gives no usable answer: .*Start the endpoint"):
        check_rewards([source])


def test_a_checkpoint_is_read_and_a_weight_of_an_objective_that_it_lacks_is_refused(trained_reward_model, tmp_path):
    def check(place, **weights):
        return check_rewards([RewardSourceConfig.model_validate({"model": {"place": str(place), "weights": weights}})])

    assert check(trained_reward_model) == ["reward model"]
    with pytest.raises(ConfigError, match="'model' re-weighs 'kindness', which is no objective of"):
        check(trained_reward_model, kindness=2.0)
    with pytest.raises(CheckpointError):
        check(tmp_path / "nowhere")


def test_a_judge_that_is_not_there_is_refused():
    judge = RewardSourceConfig(name="judge", judge=JudgeReward(url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(WorkerError, match=r"'judge': http://127\.0\.0\.1:9/v1 gives no usable answer"):
        check_rewards([judge])
    priced = judge.model_copy(
        update={"judge": JudgeReward(url="http://127.0.0.1:9/v1", model="m", prices="nowhere.json")}
    )
    with pytest.raises(DataError, match=r"nowhere\.json has no price for 'm'"):
        check_rewards([priced])
