"""Real vLLM engines behind the pool, against the Hugging Face model they must agree with."""

import copy
import os
import shutil
import signal
import time
from collections import deque
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import psutil
import pytest
import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.ranked_learner import RankedSender
from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings, WorkerActors
from cluster.placement import pack_bundles
from cluster.rollout_plan import RolloutPlan, WeightReceivers
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.data.chat import encode_prompt
from pipeline.errors import CheckpointError, StaleEngineError
from pipeline.models.backbone import load_causal_lm, save_causal_lm
from pipeline.models.tensor_stream import TensorStream
from pipeline.records import PolicyWeights, ProbeSequence, Prompt, SamplingParams
from pipeline.rollouts.numerics_gate import GATE_TOLERANCE, choose_probes
from pipeline.rollouts.policy_files import PolicyFiles
from pipeline.rollouts.requests import rollout_requests
from tests.support.gloo import CpuWorker, GroupOfOne, PolicyRank

pytestmark = pytest.mark.components

TOLERANCE = 1e-4
SAMPLING = SamplingParams(temperature=0.7, top_p=1.0, max_response_tokens=24, samples_per_prompt=2, seed=11)


@pytest.fixture(scope="module")
def learner(local_ray):
    """The first rank of a learner whose GPU is a CPU."""
    return GroupOfOne()


@pytest.fixture(scope="module")
def pool(learner, tiny_policy):
    """Engines that read published files, as all do, and that also take weights from `learner`."""
    with cpu_engines(tiny_policy, "nccl", workers=2) as pool:
        yield pool


def cpu_engines(directory, backend, *, workers, shards=1):
    return RolloutPool(
        EngineSettings(
            model_uri=directory,
            dtype="float32",
            max_model_len=128,
            gate_tolerance=TOLERANCE,
            seed=0,
            plan=RolloutPlan(placement="disaggregated", weight_transfer=backend),
        ),
        RolloutConfig(
            workers=workers,
            cpus_per_worker=0.5,  # so that all engines of this file stand at once on the four CPUs of the tests' Ray
            tensor_parallel_size=shards,
            chunk_size=8,
            max_sequences=64,
            max_restarts=2,
        ),
        DeadlinesConfig(start_s=900),  # of a busy machine; an engine of two shards takes half a minute on a quiet one
        actors=WorkerActors(worker=CpuWorker),
    )


def sender_of(group, backend, *, shards=1):
    receivers = WeightReceivers(weight_transfer=backend, dtype="float32", shards=shards)
    return RankedSender(group, receivers, deadline_s=60.0)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    return [
        Prompt(id=f"prompt {n}", messages=messages, token_ids=encode_prompt(tokenizer, messages))
        for n in range(12)
        for messages in [({"role": "user", "content": " ".join(words[n : n + 3 + n % 5])},)]
    ]


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return load_causal_lm(tiny_policy, dtype="float32")[0].eval()


@pytest.fixture(scope="module")
def publish(tokenizer, prompts, tmp_path_factory):
    """Writes a model's weights and its own log-probabilities of the probes, as a learner does."""
    probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0)
    root = tmp_path_factory.mktemp("published")
    count = iter(range(1000))

    def publish(model, *, state=None, version=0):
        location = root / str(next(count))
        PolicyFiles().write(TensorStream.of(model.state_dict() if state is None else state), location)
        return PolicyWeights(
            version=version,
            location=str(location),
            probes=tuple(
                ProbeSequence(prompt_ids=p, response_ids=r, logprobs=tuple(logprobs_of(model, p, r)))
                for p, r in ((probe.prompt_ids, probe.response_ids[0]) for probe in probes)
            ),
        )

    return publish


def logprobs_of(model, prompt_ids, response_ids, temperature=1.0):
    """log pi(response token | what precedes it), from the Hugging Face model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    rows = (logits / temperature).log_softmax(-1)
    return rows[torch.arange(len(response_ids)), torch.tensor(response_ids)].tolist()


def another(policy, seed):
    """Same architecture, every parameter moved by noise as large as the initialisation."""
    model = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def test_engines_agree_with_the_learner_after_every_update(pool, policy, publish):
    before = None
    for version in range(1, 5):
        weights = publish(another(policy, version), version=version)

        metrics = pool.load_weights(weights)

        assert metrics["gate/max"] <= TOLERANCE
        now = torch.tensor([x for probe in weights.probes for x in probe.logprobs])
        # The probes tell the versions apart, by much more than the tolerance.
        assert before is None or (now - before).abs().mean() > 0.1
        before = now
    # The first went through vLLM's loader, and showed that the others need not.
    assert ray.get([worker.actor.loader.remote() for worker in pool._fleet.workers], timeout=60) == ["ours"] * 2


FAMILIES = {
    "biases lie between the matrices that vLLM fuses": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "matrices are published transposed": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2},
    # 40 is no multiple of 32, so that vLLM pads what it packs.
    "experts of a mixture are packed": {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
}


@pytest.fixture(scope="module")
def families(local_ray, tokenizer, tmp_path_factory):
    """Name -> a policy and a pool of one engine; all pools start at once."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    opened = {}
    with ExitStack() as stack:
        for (name, shape), backend in zip(FAMILIES.items(), ["shm", "ipc", "shm"], strict=True):
            config = AutoConfig.for_model(**shape, **ends, vocab_size=len(tokenizer))
            torch.manual_seed(0)
            policy = AutoModelForCausalLM.from_config(config).eval()
            directory = str(tmp_path_factory.mktemp(config.model_type))
            save_causal_lm(policy.state_dict(), config, tokenizer, directory)
            opened[name] = policy, stack.enter_context(cpu_engines(directory, backend, workers=1))
        yield opened


@pytest.mark.parametrize(("family", "loader"), [*zip(FAMILIES, ["ours", "vLLM's", "vLLM's"], strict=True)])
def test_a_policy_that_vllm_loads_by_other_rules_stays_with_its_loader(families, family, loader, publish):
    policy, pool = families[family]
    for version in (1, 2):
        assert pool.load_weights(publish(another(policy, version), version=version))["gate/max"] <= TOLERANCE
        assert ray.get(pool._fleet.workers[0].actor.loader.remote(), timeout=60) == loader


def on_gpus(backend, count):
    reason = f"{backend} works between GPUs; it takes {count} here, and there are {torch.cuda.device_count()}"
    return pytest.param(backend, marks=pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason))


@pytest.fixture
def on_one_gpu(families, learner):
    """A policy that vLLM's loader loads, a pool that takes it by CUDA IPC, and the learner: their GPU is a CPU."""
    return *families["matrices are published transposed"], learner


@pytest.fixture(
    params=["shm", "nccl over gloo", "ipc over shared memory", on_gpus("nccl", 2), on_gpus("ipc", 1)],
)
def fed_pool(request, pool, learner, policy, tiny_policy):
    """A policy, a pool, the learner that feeds it, and its sender: the port, whatever is behind it."""
    backend = request.param
    if backend in ("shm", "nccl over gloo"):
        sender = sender_of(learner, "nccl")
        with pool.fed_by(sender) if backend != "shm" else nullcontext():
            yield policy, pool, learner
        return
    if backend == "ipc over shared memory":
        policy, pool, group = request.getfixturevalue("on_one_gpu")
        with pool.fed_by(sender_of(group, "ipc")):
            yield policy, pool, group
        return
    shared = pack_bundles(1, cpus=1, gpus=1, timeout_s=60, name="learner", tenants=2) if backend == "ipc" else None
    own = {"num_gpus": 1} if shared is None else {"num_gpus": 0.5, "scheduling_strategy": shared.strategy(0)}
    group = GroupOfOne(PolicyRank, **own)
    gpu_pool = RolloutPool(
        EngineSettings(
            model_uri=tiny_policy,
            dtype="float32",
            max_model_len=128,
            gate_tolerance=GATE_TOLERANCE["float32"],
            seed=0,
            plan=RolloutPlan(placement="colocated" if shared else "disaggregated", weight_transfer=backend),
        ),
        RolloutConfig(workers=1, gpus_per_worker=1, gpu_memory_fraction=0.2, max_sequences=64),
        DeadlinesConfig(),
        actors=WorkerActors(placement=shared),
    )
    with gpu_pool, gpu_pool.fed_by(sender_of(group, backend)):
        yield policy, gpu_pool, group
    ray.kill(group.rank)
    if shared is not None:
        shared.remove()


def test_every_version_reaches_every_engine_asleep_or_awake(fed_pool, publish):
    policy, pool, learner = fed_pool
    for version in (1, 2):
        model = another(policy, version)
        learner.hold(model.state_dict())
        pool.sleep()
        metrics = pool.load_weights(publish(model, version=version))
        assert metrics["gate/mean"] <= GATE_TOLERANCE["float32"]
        assert metrics.get("weights/sent_between_gpus", 1) == 1
        assert metrics["weights/gb_per_s"] > 0
        assert metrics["weights/copy_gb_per_s"] > 0
        assert metrics["memory/rollout_worker_peak_gib"] > 0.1


def test_weights_by_ipc_go_in_buckets_of_which_each_holds_at_least_the_largest_tensor(on_one_gpu, publish):
    policy, pool, learner = on_one_gpu
    model = another(policy, 3)
    learner.hold(model.state_dict())
    with pool.fed_by(sender_of(learner, "ipc")):
        assert pool.load_weights(publish(model, state={}))["weights/sent_between_gpus"] == 1
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    buckets = ray.get(learner.rank.sizes.remote(), timeout=60)
    assert sum(buckets) == sum(sizes)
    assert len(buckets) > 2
    assert max(buckets) == max(sizes)


@pytest.mark.parametrize("road", ["from the file", "by ipc"])
def test_an_engine_gives_up_all_of_its_gpu_and_takes_its_cache_back_when_the_weights_have_come(
    on_one_gpu, publish, road
):
    """vLLM ignores sleep on a CPU, except that an engine which nobody wakes answers nothing."""
    policy, pool, learner = on_one_gpu
    model = another(policy, 4)
    learner.hold(model.state_dict())
    [worker] = pool._fleet.workers
    ray.get(worker.actor.calls.remote(), timeout=60)
    for _ in range(2):
        ray.get(worker.actor.sleep.remote(), timeout=60)
    sends = pool.fed_by(sender_of(learner, "ipc"))
    with sends if road == "by ipc" else nullcontext():
        metrics = pool.load_weights(publish(model))
    assert metrics.get("weights/sent_between_gpus") == (1 if road == "by ipc" else None)
    assert metrics["gate/max"] <= TOLERANCE
    calls = [call for call, _ in groupby(ray.get(worker.actor.calls.remote(), timeout=60))]
    assert calls == [
        "sleep(2)",
        *(["init_weight_transfer_engine"] if road == "by ipc" else []),
        "wake_up(weights)",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "wake_up(kv_cache)",
        "reset_prefix_cache",
    ]


def test_the_learner_sends_its_policy_and_the_file_stands_in_where_that_fails(pool, learner, policy, publish, caplog):
    sender = sender_of(learner, "nccl")

    def update(version, *, sends=True):
        """Metrics, and the buckets that were sent. Without `sends` the learner's GPU holds another policy."""
        model = another(policy, version)
        state = model.state_dict() if sends else another(policy, 99).state_dict()
        learner.hold(state)
        metrics = pool.load_weights(publish(model, version=version))
        assert metrics["gate/max"] <= TOLERANCE
        return metrics, ray.get(learner.rank.sizes.remote(), timeout=60)

    sizes = [tensor.nbytes for tensor in policy.state_dict().values()]
    with pool.fed_by(sender):
        for version in (1, 2):
            metrics, buckets = update(version)
            assert metrics["weights/sent_between_gpus"] == 1
            assert sum(buckets) == sum(sizes)
            assert len(buckets) > 2
            assert all(bucket <= 2 * max(sizes) for bucket in buckets)

        # A worker fails half way: no engine may be taken to hold the policy, and all read the file.
        ray.get(pool._fleet.workers[1].actor.fail_next.remote(), timeout=60)
        metrics, _ = update(3, sends=False)
        assert metrics["weights/sent_between_gpus"] == 0
        assert "MemoryError: no room for the next bucket" in caplog.text
        # And they meet the learner again.
        metrics, _ = update(4)
        assert metrics["weights/sent_between_gpus"] == 1

        # The gate sees what was sent, not what was published.
        with pytest.raises(StaleEngineError):
            update(5, sends=False)
    metrics, _ = update(6, sends=False)
    assert "weights/sent_between_gpus" not in metrics


def test_a_policy_is_sent_before_its_file_which_late_workers_and_a_failed_transfer_wait_for(
    pool, learner, policy, publish, tmp_path
):
    sender = sender_of(learner, "nccl")

    def load(version):
        model = another(policy, version)
        learner.hold(model.state_dict(), str(tmp_path), version)
        location = tmp_path / f"policy-{version:06d}"
        assert not location.exists()
        weights = replace(publish(model, state={}, version=version), location=str(location), file_follows=True)
        metrics = pool.load_weights(weights)
        assert metrics["gate/max"] <= TOLERANCE
        assert "weights/written_gb_per_s" not in metrics
        return metrics["weights/sent_between_gpus"]

    with pool.fed_by(sender):
        assert load(1) == 1
        # A worker that joins later is loaded this way; it reads the file.
        _, metrics = pool._fleet._load(pool._fleet.workers, pool._fleet.policy)
        assert [one["gate/max"] <= TOLERANCE for one in metrics] == [True, True]
        # A worker fails half way: the tensors were read to the end, and all wait for their file.
        ray.get(pool._fleet.workers[1].actor.fail_next.remote(), timeout=60)
        assert load(2) == 0
        assert load(3) == 1


def test_rollouts_carry_the_logprobs_of_the_distribution_they_were_sampled_from(
    pool, policy, publish, prompts, tokenizer
):
    model = another(policy, 1)
    pool.load_weights(publish(model, version=5))

    rollouts = pool.generate(prompts, SAMPLING)

    eos = tokenizer.eos_token_id
    assert [(r.prompt.id, r.sample_index) for r in rollouts] == [(p.id, i) for p in prompts for i in range(2)]
    assert len({r.response_ids for r in rollouts}) == len(rollouts)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        theirs = logprobs_of(model, rollout.prompt.token_ids, rollout.response_ids, temperature=0.7)
        assert rollout.logprobs == pytest.approx(theirs, abs=TOLERANCE)
        assert rollout.policy_version == 5
        assert eos not in rollout.response_ids[:-1]
        assert (rollout.response_ids[-1] == eos) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 24


def wait_until_all_sample(pool):
    batch = pool._sampler._batch[0]
    while sum(call.batch is batch for call in list(pool._sampler.calls.values())) < pool.num_workers:
        time.sleep(0.001)
    time.sleep(0.1)


@pytest.fixture
def interrupt(pool, policy, publish, prompts, monkeypatch):
    """Loads policy 7 in the middle of responses of policy 6; gives both models and the rollouts."""
    monkeypatch.setattr("actors.rollout_sampler.SLICE_S", 0.02)
    models = {version: another(policy, version) for version in (6, 7)}
    old, new = (publish(model, version=version) for version, model in models.items())

    def interrupt(sampling, *, resample_unfinished):
        pool.load_weights(old)
        pool.begin(prompts, sampling, resample_unfinished=resample_unfinished)
        wait_until_all_sample(pool)
        pool.load_weights(new)
        return models, pool.collect()

    return interrupt


def test_the_new_policy_goes_on_with_responses_where_the_old_one_was_interrupted(interrupt, prompts):
    models, rollouts = interrupt(replace(SAMPLING, max_response_tokens=64), resample_unfinished=False)

    assert [(r.prompt.id, r.sample_index) for r in rollouts] == [(p.id, i) for p in prompts for i in range(2)]
    assert len({r.response_ids for r in rollouts}) == len(rollouts)
    begun_by_old = []
    for rollout in rollouts:
        by = {
            version: torch.tensor(logprobs_of(model, rollout.prompt.token_ids, rollout.response_ids, temperature=0.7))
            for version, model in models.items()
        }
        theirs = torch.tensor(rollout.logprobs)
        is_old, is_new = (((theirs - by[version]).abs() <= TOLERANCE).tolist() for version in (6, 7))
        length = len(is_old)
        # Each token has the log-probability of the policy that sampled it: the old one, and from some token on the new.
        seam = next((t for t in range(length) if not is_old[t]), length)
        assert is_old[:seam] + is_new[seam:] == [True] * length
        assert rollout.policy_version == (6 if seam > 0 else 7)
        assert length == 64 or rollout.finish_reason == "stop"
        begun_by_old.append(0 < seam < length)
    assert sum(begun_by_old) >= 6  # at least the chunk of one engine


def test_interrupted_responses_begin_anew_where_they_are_to_be_discarded(interrupt, pool, prompts):
    long = replace(SAMPLING, max_response_tokens=64)
    _, rollouts = interrupt(long, resample_unfinished=True)

    assert {r.policy_version for r in rollouts} == {7}
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in pool.generate(prompts, long)]


def test_temperature_zero_is_the_most_probable_token_every_time(pool, policy, publish, prompts):
    model = another(policy, 2)
    pool.load_weights(publish(model))

    rollouts = pool.generate(prompts[:4], replace(SAMPLING, temperature=0.0, samples_per_prompt=1))

    for rollout in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt.token_ids + rollout.response_ids])).logits[0]
        best = logits[len(rollout.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == rollout.response_ids


@pytest.mark.parametrize(
    ("stale", "group"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_an_engine_with_one_stale_parameter_is_refused_by_the_name_of_its_group(pool, policy, publish, stale, group):
    old, new = another(policy, 3), another(policy, 4)
    mixed = copy.deepcopy(new)
    mixed.load_state_dict(new.state_dict() | {stale: old.state_dict()[stale]})
    [worker, *_] = pool._fleet.workers
    ray.get(worker.actor.load_weights.remote(publish(mixed), TOLERANCE), timeout=60)

    with pytest.raises(
        StaleEngineError, match=rf"{worker.name} .* tolerance 0.0001. Parameter group '{group}'.*1 group"
    ):
        ray.get(worker.actor.accept_weights.remote(publish(new, version=9), TOLERANCE), timeout=60)


def test_an_update_that_never_happened_is_refused_and_nothing_is_sampled(pool, policy, publish, prompts):
    old, new = another(policy, 3), another(policy, 4)
    pool.load_weights(publish(old))

    with pytest.raises(StaleEngineError, match="a copy derived from them is stale"):
        pool.load_weights(publish(new, state=old.state_dict()))
    with pytest.raises(StaleEngineError, match="before it passed the numerics gate"):
        pool.generate(prompts, SAMPLING)


def test_weights_that_leave_parameters_out_or_are_not_there_are_refused(pool, policy, publish):
    state = policy.state_dict()

    with pytest.raises(CheckpointError, match=r"none for 1 of the engine's \d+ parameters \(lm_head.weight"):
        pool.load_weights(publish(policy, state={n: t for n, t in state.items() if n != "lm_head.weight"}))
    with pytest.raises(CheckpointError, match=r"no published weights at '/nowhere/model.safetensors' on node"):
        pool.load_weights(replace(publish(policy), location="/nowhere"))

    assert pool.load_weights(publish(policy))["gate/max"] <= TOLERANCE


def test_seeded_prompts_longer_together_than_one_forward_pass_are_answered(pool, policy, publish, tokenizer):
    pool.load_weights(publish(policy))
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())

    def asked(n):
        """Prompts that begin differently: what an engine has read once it does not read again."""
        messages = ({"role": "user", "content": " ".join(words[(n + k) % len(words)] for k in range(105))},)
        return Prompt(id=str(n), messages=messages, token_ids=encode_prompt(tokenizer, messages))

    # 50 requests an engine, of more than 100 tokens each: vLLM would cut one of them at 4,096.
    sampling = SamplingParams(temperature=0.7, top_p=1.0, max_response_tokens=4, samples_per_prompt=1, seed=0)
    waiting = deque((asked(n), sampling) for n in range(100))
    assert all(100 < len(prompt.token_ids) <= 124 for prompt, _ in waiting)
    assert {rollout.prompt.id for rollout in pool.stream(waiting)} == {str(n) for n in range(100)}


def assert_same_samples(rollouts, others):
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in others]
    assert [r.logprobs for r in rollouts] == [pytest.approx(r.logprobs, abs=TOLERANCE) for r in others]


def test_an_engine_killed_in_the_middle_of_responses_leaves_every_sample_as_it_was(
    pool, policy, publish, prompts, monkeypatch
):
    monkeypatch.setattr("actors.rollout_sampler.SLICE_S", 0.02)
    long = replace(SAMPLING, max_response_tokens=64)
    weights = publish(another(policy, 5))
    pool.load_weights(weights)
    undisturbed = pool.generate(prompts, long)
    killed = pool._fleet.workers[0]
    pid = ray.get(killed.actor.pid.remote(), timeout=60)

    pool.begin(prompts, long)
    wait_until_all_sample(pool)
    os.kill(pid, signal.SIGKILL)
    assert killed in [call.worker for call in list(pool._sampler.calls.values())]
    after_death = pool.collect()

    assert killed not in pool._fleet.workers
    assert_same_samples(after_death, undisturbed)
    gates = [worker.actor.accept_weights.remote(weights, TOLERANCE) for worker in pool._fleet.workers]
    assert [gate["gate/max"] <= TOLERANCE for gate in ray.get(gates, timeout=300)] == [True, True]


def test_the_gate_looks_at_the_probes_alone_where_requests_of_an_earlier_batch_are_left(pool, policy, publish, prompts):
    weights = publish(another(policy, 5))
    pool.load_weights(weights)
    worker = pool._fleet.workers[0].actor
    long = replace(SAMPLING, max_response_tokens=64, samples_per_prompt=1)
    requests = rollout_requests(prompts, long)

    assert ray.get(worker.sample.remote(requests[:1], long, requests[1:], seconds=0.0), timeout=60) == len(prompts)
    assert ray.get(worker.accept_weights.remote(weights, TOLERANCE), timeout=60)["gate/max"] <= TOLERANCE


def test_an_engine_that_would_join_with_old_weights_is_refused_and_two_engines_sample_what_one_does(
    pool, policy, publish, prompts
):
    pool.resize(1)
    weights = publish(another(policy, 6))
    pool.load_weights(weights)
    by_one = pool.generate(prompts, SAMPLING)
    file = Path(weights.location, "model.safetensors")
    right = file.rename(file.with_suffix(".right"))
    shutil.copy(Path(publish(another(policy, 5)).location, file.name), file)

    with pytest.raises(StaleEngineError, match=r"rollout worker \d+ .* tolerance 0.0001"):
        pool.resize(2)
    assert pool.num_workers == 1
    right.rename(file)
    pool.resize(2)

    assert pool.num_workers == 2
    assert_same_samples(pool.generate(prompts, SAMPLING), by_one)


# ------------------------------------------------------------------ an engine of two shards


@pytest.fixture(scope="module")
def sharded(learner, tiny_policy):
    """One engine in two processes, which have one of two attention heads each, and both the only key-value head."""
    with cpu_engines(tiny_policy, "nccl", workers=1, shards=2) as pool:
        yield pool


@pytest.mark.long
def test_every_version_reaches_both_shards_by_the_file_and_from_the_learner(sharded, learner, policy, publish):
    for version in (1, 2, 3):
        sharded.sleep()
        assert sharded.load_weights(publish(another(policy, version), version=version))["gate/max"] <= TOLERANCE
    [worker] = sharded._fleet.workers
    assert ray.get(worker.actor.loader.remote(), timeout=60) == "ours"
    with sharded.fed_by(sender_of(learner, "nccl", shards=2)):
        for version in (4, 5):
            model = another(policy, version)
            learner.hold(model.state_dict())
            metrics = sharded.load_weights(publish(model, version=version))
            assert metrics["weights/sent_between_gpus"] == 1
            assert metrics["gate/max"] <= TOLERANCE


@pytest.mark.long
def test_the_same_seeds_give_the_same_samples_on_one_shard_and_on_two(sharded, pool, policy, publish, prompts):
    weights = publish(another(policy, 1), version=5)
    for engines in (pool, sharded):
        engines.load_weights(weights)
    one, two = pool.generate(prompts, SAMPLING), sharded.generate(prompts, SAMPLING)
    assert [r.response_ids for r in two] == [r.response_ids for r in one]
    for left, right in zip(one, two, strict=True):
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stale", "group"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp"),
    ],
)
def test_a_stale_parameter_of_a_shard_is_named_by_its_group(sharded, policy, publish, stale, group):
    old, new = another(policy, 3), another(policy, 4)
    mixed = copy.deepcopy(new)
    mixed.load_state_dict(new.state_dict() | {stale: old.state_dict()[stale]})
    [worker] = sharded._fleet.workers
    ray.get(worker.actor.load_weights.remote(publish(mixed), TOLERANCE), timeout=60)
    with pytest.raises(StaleEngineError, match=rf"Parameter group '{group}'.*1 group"):
        ray.get(worker.actor.accept_weights.remote(publish(new, version=9), TOLERANCE), timeout=60)


@pytest.mark.long
def test_a_policy_that_comes_in_the_middle_of_responses_interrupts_both_shards(sharded, policy, publish, prompts):
    long = replace(SAMPLING, max_response_tokens=64)
    old, new = (publish(another(policy, version), version=version) for version in (6, 7))
    sharded.load_weights(old)
    sharded.begin(prompts, long, resample_unfinished=True)
    wait_until_all_sample(sharded)
    sharded.load_weights(new)
    assert [r.response_ids for r in sharded.collect()] == [r.response_ids for r in sharded.generate(prompts, long)]


@pytest.mark.long
@pytest.mark.parametrize("victim", ["a shard", "the engine"])
def test_an_engine_and_its_shards_end_together_and_their_successor_leaves_every_sample_as_it_was(
    sharded, policy, publish, prompts, victim
):
    long = replace(SAMPLING, max_response_tokens=64)
    sharded.load_weights(publish(another(policy, 8), version=8))
    undisturbed = sharded.generate(prompts, long)
    [killed] = sharded._fleet.workers
    pids = ray.get(killed.actor.shard_pids.remote(), timeout=60)
    engine = ray.get(killed.actor.pid.remote(), timeout=60)
    processes = [psutil.Process(pid) for pid in {*pids, engine}]
    assert len(processes) == 3
    sharded.begin(prompts, long)
    wait_until_all_sample(sharded)
    os.kill(pids[1] if victim == "a shard" else engine, signal.SIGKILL)
    assert psutil.wait_procs(processes, timeout=20)[1] == []
    assert_same_samples(sharded.collect(), undisturbed)
    assert killed not in sharded._fleet.workers
