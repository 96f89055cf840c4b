"""The scoring service on real Ray Serve."""

import json
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import build as serve_build

from actors.reward_service import scorer_of_application, start_service, stop_service, swap_model
from actors.served_scorer import ServedScorer
from pipeline.config.cluster import ScoringConfig
from pipeline.config.rewards import ModelReward
from pipeline.data.planted import OBJECTIVES
from pipeline.errors import ConfigError, DataError, DeadlineExceeded, PipelineError, ResourceError, WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, make_head, save_reward_model
from pipeline.rewards.model_reward import RemoteVRM, SteeredModel
from pipeline.rewards.rows import RewardRows
from pipeline.serving.client import PATIENCE_S, VRMScorer, as_reward_score
from pipeline.serving.protocol import TOKEN_VARIABLE
from pipeline.serving.trl_reward import VRMReward
from pipeline.stages.fingerprint import directory_fingerprint
from tests.rewards.rows import means, rollout
from tests.support.learners import HEAD, reward_card, statistics_of
from tests.support.nodes import ray_processes

pytestmark = pytest.mark.components

TOKEN = "only-for-this-test"
MEAN_REWARD = 0.25
SETTINGS = {"start_s": 240, "deadline_s": 120, "name": "under-test", "token": TOKEN}


def config_of(port):
    # It remembers no scores, so every answer comes from the model.
    return ScoringConfig(cpus_per_replica=0.5, port=port, cache_entries=0)


@pytest.fixture(scope="module")
def reward_model(tiny_policy, tokenizer, world, tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("reward-model"), tiny_policy, tokenizer, world, seed=0)


@pytest.fixture(scope="module")
def better_model(tiny_policy, tokenizer, world, tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("better-model"), tiny_policy, tokenizer, world, seed=1)


def random_model(directory, tiny_policy, tokenizer, world, *, seed):
    directory = str(directory)
    backbone = load_backbone(tiny_policy, dtype="float32")
    torch.manual_seed(seed)
    model = RewardModel(backbone, make_head("vrm", 64, 4, HEAD))
    torch.nn.init.normal_(model.head.weight_head.output.weight, std=0.1)
    save_reward_model(
        directory,
        state_dict=model.state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card("vrm", statistics_of(world)).model_copy(
            update={"reward_mean": MEAN_REWARD, "mean_contributions": (0.5, 0.25, 0.25, -0.75)}
        ),
    )
    return directory


@pytest.fixture(scope="module")
def service(local_ray, reward_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scorer = start_service(reward_model, config_of(port), **SETTINGS)
    yield scorer, f"http://127.0.0.1:{port}"
    stop_service("under-test")


def post(url, body, token=TOKEN):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_served_scores_equal_the_model_in_this_process(service, reward_model, world):
    scorer, _ = service
    pairs = world.heldout_pairs()
    prompts, responses = [p.prompt for p in pairs], [p.chosen for p in pairs]
    direct = RewardModelScorer.load(reward_model, max_tokens_per_batch=4096).score(prompts, responses)
    for served, expected in zip(scorer.score(prompts, responses), direct, strict=True):
        assert served.mean == pytest.approx(expected.mean, abs=1e-5)
        assert served.std == pytest.approx(expected.std, abs=1e-5)
        assert served.objective_weights == pytest.approx(expected.objective_weights, abs=1e-5)


def test_another_job_scores_through_the_application_with_its_own_weights(service, reward_model, world, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    pair = world.heldout_pairs()[0]
    rows = [pair.prompt] * 2, [pair.chosen, pair.rejected]
    other = scorer_of_application("under-test", config_of(0), deadline_s=60.0)
    assert other.score(*rows) == service[0].score(*rows)
    assert other.steered(dict.fromkeys(OBJECTIVES, 5.0)).score(*rows) == other.score(*rows)
    model = RewardModelScorer.load(reward_model, max_tokens_per_batch=4096)
    expected = SteeredModel(model, {OBJECTIVES[2]: 3.0}).score(*rows)
    for served, alone in zip(other.steered({OBJECTIVES[2]: 3.0}).score(*rows), expected, strict=True):
        assert (served.mean, served.std) == pytest.approx((alone.mean, alone.std), abs=1e-5)
    with pytest.raises(ConfigError, match=r"no application 'nowhere' .* it has .*under-test"):
        scorer_of_application("nowhere", config_of(0), deadline_s=60.0)


def test_another_job_scores_through_the_url_in_the_units_of_the_model(service, reward_model, world, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    rows = RewardRows.of([rollout("q", 0, "a"), rollout("q", 1, "b c")], {})
    remote = RemoteVRM(ModelReward(place=service[1], weights={OBJECTIVES[2]: 3.0}))
    model = RewardModelScorer.load(reward_model, max_tokens_per_batch=4096)
    assert remote.scale() == RewardScale(mean=MEAN_REWARD, std=RewardScale.of(model.card).std)
    expected = SteeredModel(model, {OBJECTIVES[2]: 3.0}).score(rows.prompts, rows.responses)
    assert means(remote.score(rows)) == pytest.approx([score.mean for score in expected], abs=1e-5)
    remote.close()
    nowhere = RemoteVRM(ModelReward(place="http://127.0.0.1:9", deadline_s=0.2))
    assert means(nowhere.score(rows)) == ["unanswered", "unanswered"]
    nowhere.close()


def test_contributions_add_up_to_the_reward_above_the_mean_held_out_response(service, world):
    _, url = service
    prompt = [dict(m) for m in world.heldout_prompts[0].messages]
    status, answer = post(f"{url}/v1/score", {"prompt": prompt, "responses": ["do check another source ."]})
    assert status == 200
    [scored] = answer["scores"]
    assert tuple(scored["contributions"]) == OBJECTIVES
    assert sum(scored["contributions"].values()) == pytest.approx(scored["reward"] - MEAN_REWARD, abs=1e-5)
    assert sum(scored["objective_weights"].values()) == pytest.approx(1.0, abs=1e-5)


def test_every_answer_names_the_checkpoint(service, reward_model):
    expected = directory_fingerprint(reward_model)
    for path, body in (
        ("score", {"prompt": "hi", "responses": ["x"]}),
        ("score", {"items": [{"prompt": "hi", "responses": ["x"]}]}),
        ("compare", {"prompt": "hi", "a": "x", "b": "y"}),
        ("best_of", {"prompt": "hi", "responses": ["x", "y"]}),
    ):
        status, answer = post(f"{service[1]}/v1/{path}", body)
        assert (status, answer["model_fingerprint"]) == (200, expected)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_token_nobody_is_served(service, token):
    status, _ = post(f"{service[1]}/v1/score", {"prompt": "hi", "responses": ["x"]}, token=token)
    assert status == 401


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[" * 100_000,
        b'{"prompt": "hi", "responses": ["\xff\xfe"]}',
        b'{"prompt": "hi", "responses": ["\\ud800"]}',
        {"prompt": "hi", "responses": [float("nan")]},
        {"prompt": "hi", "responses": []},
    ],
    ids=lambda body: str(body)[:30],
)
def test_malformed_requests_are_refused_and_the_replica_lives(service, body):
    before = [replica.pid for replica in replicas()]
    status, answer = post(f"{service[1]}/v1/score", body)
    assert status in {400, 422}
    assert "Traceback" not in str(answer)
    assert post(f"{service[1]}/v1/score", {"prompt": "hi", "responses": ["x"]})[0] == 200
    assert [replica.pid for replica in replicas()] == before


def test_the_client_and_the_training_run_read_the_same_rewards(service, world):
    scorer, url = service
    pairs = world.heldout_pairs()
    prompts, responses = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    with scorer.client(rows=len(pairs)) as by_handle:
        inside = by_handle.score_rows(prompts, responses)
        known, chosen = by_handle.model(), by_handle.best_of(prompts[0], responses, lcb=1.0)
    with VRMScorer(url, token=TOKEN, deadline_s=60, batch_size=5) as client:
        answer = client.score_rows(prompts, responses)
        assert client.model() == known
        assert client.best_of(prompts[0], responses, lcb=1.0).best == chosen.best
        better, worse = client.best_of(prompts[0], [responses[0], pairs[0].rejected]).ranking
    assert known.objectives == list(OBJECTIVES)
    assert better.reward >= worse.reward
    assert answer.model_fingerprint == inside.model_fingerprint
    assert scorer.score(prompts, responses) == [as_reward_score(scored) for scored in inside.scores]
    for over_http, by_handle in zip(answer.scores, inside.scores, strict=True):
        assert over_http.reward == pytest.approx(by_handle.reward, abs=1e-5)
        assert over_http.concentration == pytest.approx(by_handle.concentration, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # TRL wants an older vLLM, which this trainer does not use
def test_grpo_of_trl_trains_on_the_rewards_of_the_service(service, reward_model, tiny_policy, world, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl (1.16 was tried)")
    datasets = pytest.importorskip("datasets")
    scorer = RewardModelScorer.load(reward_model, max_tokens_per_batch=4096)

    def direct(prompts, completions, **columns):
        return [score.mean for score in scorer.score(prompts, [turns[-1]["content"] for turns in completions])]

    trainer = trl.GRPOTrainer(
        model=tiny_policy,
        reward_funcs=[VRMReward(service[1], token=TOKEN, deadline_s=60), direct],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": [dict(turn) for turn in prompt.messages]} for prompt in world.train_prompts]
        ),
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["rewards/vrm/mean"] == pytest.approx(row["rewards/direct/mean"], abs=1e-5)
        assert row["rewards/vrm/std"] == pytest.approx(row["rewards/direct/std"], abs=1e-5)
        assert row["reward_std"] > 0.0
        assert row["grad_norm"] > 0.0
        contributions = [row[f"vrm/{name}"] for name in OBJECTIVES]
        assert sum(contributions) == pytest.approx(row["rewards/vrm/mean"] - MEAN_REWARD, abs=1e-5)


def test_page_health_and_metrics_need_no_token(service):
    _, url = service
    for path, words in (("", "Which response is better"), ("healthz", "ok"), ("metrics", "vrm_requests_total")):
        with urllib.request.urlopen(f"{url}/{path}", timeout=30) as answer:
            assert words in answer.read().decode()


def test_a_score_does_not_depend_on_what_shared_its_batch(service, world):
    scorer, _ = service
    pairs = world.heldout_pairs()
    together = scorer.score([p.prompt for p in pairs], [p.chosen for p in pairs])
    for pair, score in zip(pairs[:4], together[:4], strict=True):
        [alone] = scorer.score([pair.prompt], [pair.chosen])
        assert alone.mean == pytest.approx(score.mean, abs=1e-5)
        assert alone.std == pytest.approx(score.std, abs=1e-5)


def test_prompts_without_responses_are_refused(service):
    prompt = ({"role": "user", "content": "hi"},)
    with pytest.raises(DataError, match="2 prompts and 1 responses to score"):
        service[0].score([prompt, prompt], ["x"])


def test_no_answer_in_time_ends_in_a_deadline(service):
    handle = serve.get_app_handle("under-test")
    hurried = ServedScorer(handle, ScoringConfig(), deadline_s=1e-4, token=TOKEN)
    prompt = ({"role": "user", "content": "hi"},)
    with pytest.raises(DeadlineExceeded, match=r"did not answer within 0.0001 s"):
        hurried.score([prompt] * 64, ["x"] * 64)


def test_a_replica_that_hangs_is_reported_at_the_deadline_with_what_it_was_asked_and_for_how_long(service, world):
    pair = world.heldout_pairs()[0]
    expected = service[0].score([pair.prompt], [pair.chosen])
    hurried = ServedScorer(serve.get_app_handle("under-test"), ScoringConfig(), deadline_s=3, token=TOKEN)
    [replica] = replicas()
    replica.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(
            DeadlineExceeded,
            match=r"^http://scoring-service/v1/score did not answer within 3 s, at last with .*no answer in time",
        ):
            hurried.score([pair.prompt], [pair.chosen])
        assert 3 <= time.monotonic() - started < 20
    finally:
        replica.send_signal(signal.SIGCONT)
    assert service[0].score([pair.prompt], [pair.chosen]) == expected
    assert replicas() == [replica]


def replicas():
    return ray_processes("ServeRepli")


def test_two_jobs_on_one_cluster_have_a_service_each(service, reward_model, world):
    config = ScoringConfig(cpus_per_replica=0.5)
    other = start_service(reward_model, config, start_s=120, deadline_s=60, name="other-job")
    pair = world.heldout_pairs()[0]
    try:
        assert other.score([pair.prompt], [pair.chosen]) == service[0].score([pair.prompt], [pair.chosen])
    finally:
        stop_service("other-job")
    assert service[0].score([pair.prompt], [pair.chosen])
    assert post(f"{service[1]}/v1/score", {"prompt": "hi", "responses": ["x"]})[0] == 200


def test_another_port_than_the_one_serve_listens_on_is_refused_before_anything_starts(service):
    with pytest.raises(ResourceError, match=r"Serve already runs .* and does not listen on port 1"):
        start_service("nowhere", ScoringConfig(port=1), start_s=120, deadline_s=60, name="other-port")
    assert "other-port" not in serve.status().applications


def test_a_service_that_others_reach_needs_a_token():
    with pytest.raises(ConfigError, match=r"a service on '0\.0\.0\.0' without a token would answer whoever reaches"):
        start_service("nowhere", ScoringConfig(port=8000, host="0.0.0.0"), start_s=1, deadline_s=1)


def test_nobody_else_reaches_a_service_that_was_not_exposed(service):
    _, url = service
    port = int(url.rpartition(":")[2])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


@pytest.fixture(scope="module")
def rows(world):
    """256 of all lengths."""
    return [(p.prompt, f"{p.chosen} {n}" + " check" * 4 * n) for p in world.heldout_pairs() for n in range(16)]


@pytest.fixture(scope="module")
def expected(reward_model, better_model, rows):
    """Fingerprint -> the reward of each row, scored in this process."""
    scorers = {
        directory_fingerprint(directory): RewardModelScorer.load(directory, max_tokens_per_batch=4096)
        for directory in (reward_model, better_model)
    }
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    return {name: [score.mean for score in scorer.score(prompts, responses)] for name, scorer in scorers.items()}


class Load:
    """Two callers over HTTP, one through the handle; every answer is compared with what its model scores directly."""

    def __init__(self, service, rows, expected, *, rows_per_call=32, pause_s=0.0):
        self._scorer, self._url = service
        self._rows, self._expected = rows, expected
        self._rows_per_call, self._pause_s = rows_per_call, pause_s
        self.answers = []
        """(asked at, answered at, fingerprint, "HTTP" or "handle")."""
        self.troubles = []
        self._ends = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._ask_over_http, args=(seed,)) for seed in range(2)),
            threading.Thread(target=self._ask_through_the_handle),
        ]

    def _ask_over_http(self, seed):
        with VRMScorer(self._url, token=TOKEN, deadline_s=120, batch_size=self._rows_per_call // 2) as client:
            self._keep_asking(client, seed, "HTTP")

    def _ask_through_the_handle(self):
        with self._scorer.client(rows=self._rows_per_call) as client:
            self._keep_asking(client, 2, "handle")

    def _keep_asking(self, client, seed, road):
        chance = random.Random(seed)
        while not self._ends.wait(self._pause_s):
            chosen = chance.sample(range(len(self._rows)), self._rows_per_call)
            began = time.monotonic()
            try:
                answer = client.score_rows([self._rows[i][0] for i in chosen], [self._rows[i][1] for i in chosen])
            except PipelineError as error:
                self.troubles.append(repr(error))
                return
            name = answer.model_fingerprint
            rewards = [score.reward for score in answer.scores]
            if rewards != pytest.approx([self._expected[name][i] for i in chosen], abs=1e-5):
                self.troubles.append(f"wrong rewards from {name} by {road}")
            self.answers.append((began, time.monotonic(), name, road))

    def wait_for_answers(self, *, asked_after):
        """Seconds from then to the end of the first calls, on either road, that began later."""
        gives_up = time.monotonic() + 180
        while not self.troubles and time.monotonic() < gives_up:
            over_http = [end for began, end, _, road in self.answers if began > asked_after and road == "HTTP"]
            by_handle = [end for began, end, _, road in self.answers if began > asked_after and road == "handle"]
            if over_http and by_handle:
                return max(min(over_http), min(by_handle)) - asked_after
            time.sleep(0.05)
        raise AssertionError(self.troubles)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.wait_for_answers(asked_after=0.0)
        return self

    def __exit__(self, *_):
        self._ends.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("process", ["ServeRepli", "ProxyActor"])
def test_a_killed_process_costs_its_callers_nothing_but_time(
    service, reward_model, rows, expected, process, record_property
):
    serving = directory_fingerprint(reward_model)
    with Load(service, rows, {serving: expected[serving]}) as load:
        [victim] = ray_processes(process)
        victim.kill()
        whole_after_s = load.wait_for_answers(asked_after=time.monotonic())
    record_property("whole_after_s", whole_after_s)
    assert not load.troubles
    assert whole_after_s < PATIENCE_S  # what the service promises, and the client waits out
    [successor] = ray_processes(process)
    assert successor.pid != victim.pid


def test_a_new_checkpoint_rolls_in_under_load(service, reward_model, better_model, rows, expected, tmp_path):
    old, new = directory_fingerprint(reward_model), directory_fingerprint(better_model)
    config = config_of(int(service[1].rpartition(":")[2]))
    # Callers who leave the machine time to start the replicas.
    with Load(service, rows, expected, rows_per_call=4, pause_s=0.5) as load:
        with pytest.raises(WorkerError, match=r"holds no reward_model\.json"):
            swap_model(str(tmp_path), reward_model, config, **SETTINGS)
        load.wait_for_answers(asked_after=time.monotonic())
        assert {name for _, _, name, _ in load.answers} == {old}
        began = time.monotonic()
        swap_model(better_model, reward_model, config, **SETTINGS)
        swapped = time.monotonic()
        load.wait_for_answers(asked_after=swapped)
    assert not load.troubles
    assert {name for asked, _, name, _ in load.answers if asked > swapped} == {new}
    # The old model answered while the new one loaded.
    ends = sorted(end for _, end, _, _ in load.answers if began < end < swapped)
    assert max(later - earlier for earlier, later in pairwise([began, *ends, swapped])) < (swapped - began) / 2


def test_what_serve_build_writes_deploys_and_sleeps_while_nobody_asks(
    service, reward_model, world, tmp_path, monkeypatch
):
    monkeypatch.setenv("VRM_MODEL", reward_model)
    monkeypatch.setenv("VRM_SERVICE_TOKEN", TOKEN)
    built = CliRunner().invoke(
        serve_build, ["jobs.scoring_application:application", "--output-path", str(tmp_path / "built.yaml")]
    )
    assert built.exit_code == 0, built.output
    schema = yaml.safe_load((tmp_path / "built.yaml").read_text())
    [application] = schema["applications"]
    [deployment] = application["deployments"]
    assert deployment["name"] == "RewardService"
    assert deployment["max_surge_percent"] == 1
    del schema["http_options"], schema["proxy_location"]  # of the Serve that runs already
    application |= {"name": "built", "route_prefix": "/built"}
    application["runtime_env"] = {"env_vars": {"VRM_MODEL": reward_model, "VRM_SERVICE_TOKEN": TOKEN}}
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        "min_replicas": 0,
        "max_replicas": 1,
        "downscale_delay_s": 0.5,
        "look_back_period_s": 2,
        "metrics_interval_s": 1,
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(schema))
    try:
        wait_until(lambda: serve.status().applications["built"].status == "RUNNING")
        assert replicas_of("built") == 0
        with VRMScorer(f"{service[1]}/built", token=TOKEN, deadline_s=120) as client:
            answer = client.score("what of the saw ?", ["do check another source ."])
        assert answer.model_fingerprint == directory_fingerprint(reward_model)
        assert replicas_of("built") == 1
        wait_until(lambda: replicas_of("built") == 0)
    finally:
        stop_service("built")


def replicas_of(application):
    [deployment] = serve.status().applications[application].deployments.values()
    return sum(deployment.replica_states.values())


def wait_until(is_so, timeout_s=120):
    ends = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.1)
