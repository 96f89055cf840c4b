"""What the tests share: the planted world, a tiny model on disk, one local Ray."""

import contextlib
import os
import warnings
from pathlib import Path

# Before torch is imported anywhere: small models are fastest on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# As jobs/serve_reward_model.py does it.
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
# A service that falls asleep is watched for seconds, not for half a minute.
os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")

import pytest
from hypothesis import settings

from pipeline.config.data import PlantedConfig
from pipeline.config.models import TinyModelConfig
from pipeline.data.planted import OBJECTIVES, PlantedWorld, build_tokenizer
from pipeline.models.backbone import create_tiny_causal_lm, save_causal_lm
from tests.support.browser import Browser
from tests.support.learners import collator, reward_trainer, tokenised

# The same examples everywhere: a failure is the change's own, and comes again.
settings.register_profile("same everywhere", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("same everywhere")

SMALLEST = TinyModelConfig(
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64, max_positions=128
)


def small_world():
    """For processes that a test starts, too."""
    config = PlantedConfig(
        num_train_pairs=64, num_heldout_pairs=16, num_sft_texts=64, num_train_prompts=64, num_heldout_prompts=16
    )
    return PlantedWorld(config, OBJECTIVES, seed=0)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, for the tests that are skipped without it."""
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def artefacts(tmp_path):
    """Where a test leaves what a person may want to look at."""
    directory = Path(os.environ.get("VRM_TEST_ARTEFACTS", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def world():
    return small_world()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_policy(tokenizer, tmp_path_factory):
    """A directory with a random two-layer Qwen3."""
    directory = str(tmp_path_factory.mktemp("tiny-policy"))
    model = create_tiny_causal_lm(SMALLEST, tokenizer, seed=0)
    save_causal_lm(model.state_dict(), model.config, tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all component tests."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # "local": never the cluster that somebody runs on this machine.
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=300 * 2**20,
            log_to_driver=False,
        )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def s3():
    """One S3 server for all tests, with a bucket for each."""
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def trained_reward_model(tiny_policy, world, tokenizer, tmp_path_factory):
    """The directory of a reward model that was trained for a moment."""
    directory = str(tmp_path_factory.mktemp("trained-reward-model"))
    trainer = reward_trainer(tiny_policy, world, tokenizer)
    collate, pairs = collator(world, tokenizer), tokenised(world, tokenizer)
    for step in range(8):
        trainer.update(collate(pairs[8 * step : 8 * step + 8], step), step)
    trainer.evaluate(collate(tokenised(world, tokenizer, "heldout"), 0))
    trainer.export(directory)
    return directory
