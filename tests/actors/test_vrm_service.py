"""The scoring service on real Ray Serve."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest
import torch
from ray import serve

from actors.vrm_service import require_free_port, start_service, stop_service
from pipeline.config.schema import ScoringConfig
from pipeline.data.planted import OBJECTIVES
from pipeline.errors import DataError, DeadlineExceeded, ResourceError, WorkerError
from pipeline.learning.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, make_head, save_reward_model
from pipeline.serving.client import VRMScorer
from pipeline.stages.fingerprint import directory_fingerprint
from tests.learners import HEAD, reward_card, statistics_of

pytestmark = pytest.mark.components

TOKEN = "only-for-this-test"


@pytest.fixture(scope="module")
def reward_model(tiny_policy, tokenizer, world, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("reward-model"))
    backbone = load_backbone(tiny_policy, dtype="float32")
    torch.manual_seed(0)
    model = RewardModel(backbone, make_head("vrm", 64, 4, HEAD))
    torch.nn.init.normal_(model.head.weight_head.output.weight, std=0.1)
    save_reward_model(
        directory,
        state_dict=model.state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card("vrm", statistics_of(world)),
    )
    return directory


@pytest.fixture(scope="module")
def service(local_ray, reward_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ScoringConfig(cpus_per_replica=0.5, port=port)
    scorer = start_service(reward_model, config, start_s=120, deadline_s=120, name="under-test", token=TOKEN)
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


def test_the_reward_over_http_is_the_sum_of_its_contributions(service, world):
    _, url = service
    prompt = [dict(m) for m in world.heldout_prompts[0].messages]
    status, answer = post(f"{url}/v1/score", {"prompt": prompt, "responses": ["do check another source ."]})
    assert status == 200
    [scored] = answer["scores"]
    assert tuple(scored["contributions"]) == OBJECTIVES
    assert sum(scored["contributions"].values()) == pytest.approx(scored["reward"], abs=1e-5)
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
    with VRMScorer(url, token=TOKEN, deadline_s=60, batch_size=5) as client:
        answer = client.score_rows(prompts, responses)
        assert client.model().objectives == list(OBJECTIVES)
        better, worse = client.best_of(prompts[0], [responses[0], pairs[0].rejected]).ranking
    assert better.reward >= worse.reward
    for over_http, inside in zip(answer.scores, scorer.score(prompts, responses), strict=True):
        assert over_http.reward == pytest.approx(inside.mean, abs=1e-5)
        assert over_http.concentration == pytest.approx(inside.concentration, rel=1e-5)


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
    with pytest.raises(DataError, match="2 prompts but 1 responses"):
        service[0].score([prompt, prompt], ["x"])


def test_no_answer_in_time_ends_in_a_deadline(service):
    handle = serve.get_app_handle("under-test")
    hurried = type(service[0])(handle, ScoringConfig(), deadline_s=1e-4)
    prompt = ({"role": "user", "content": "hi"},)
    with pytest.raises(DeadlineExceeded, match=r"64 responses within 0.0001 s"):
        hurried.score([prompt] * 64, ["x"] * 64)


def replicas():
    """Processes of this test's own Ray only."""
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ServeRepli")]


def test_a_killed_replica_is_replaced_and_its_share_scored(service, world):
    scorer, _ = service
    pairs = world.heldout_pairs() * 512
    # No two responses alike, and enough of them to keep the replica busy for seconds.
    prompts, responses = [p.prompt for p in pairs], [f"{p.chosen} {n}" for n, p in enumerate(pairs)]
    expected = scorer.score(prompts[:16], responses[:16])
    answers = []
    asking = threading.Thread(target=lambda: answers.extend(scorer.score(prompts, responses)))
    asking.start()
    client = VRMScorer(service[1], token=TOKEN, deadline_s=120)
    over_http = []
    # A prompt that was not asked before: the replica's memory must not answer it.
    waiting = threading.Thread(target=lambda: over_http.append(client.score("what of the saw ?", responses[:16])))
    waiting.start()
    time.sleep(0.3)  # in the middle of the batch
    [victim] = replicas()
    assert asking.is_alive()
    victim.kill()
    asking.join()
    waiting.join()
    client.close()
    assert len(over_http[0].scores) == 16
    assert len(answers) == len(pairs)
    assert [a.mean for a in answers[:16]] == pytest.approx([e.mean for e in expected], abs=1e-5)


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


def test_another_port_than_the_one_serve_listens_on_is_refused(service, reward_model):
    config = ScoringConfig(cpus_per_replica=0.5, port=1)
    with pytest.raises(ResourceError, match="already"):
        start_service(reward_model, config, start_s=120, deadline_s=60, name="other-port")
    stop_service("other-port")


def test_a_checkpoint_that_does_not_load_is_named(service, tmp_path):
    with pytest.raises(WorkerError, match=r"holds no reward_model\.json"):
        start_service(str(tmp_path), ScoringConfig(cpus_per_replica=0.5), start_s=120, deadline_s=60, name="broken")
    stop_service("broken")


def test_a_taken_port_is_refused_before_anything_starts():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ResourceError, match="is in use"):
            require_free_port(holder.getsockname()[1])
