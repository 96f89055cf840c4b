"""A rollout worker that dies when its fate says so. Loads no torch: many of them start, one after the other."""

import os
import signal
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pipeline.columns import Rollouts
from pipeline.data.chat import decode_response
from pipeline.data.planted import build_tokenizer
from pipeline.records import Rollout


def befalls(fate, what):
    """Once: the file that announces it is gone afterwards."""
    try:
        (Path(fate) / what).unlink()
    except FileNotFoundError:
        return False
    return True


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class MortalWorker:
    """Draws tokens as a function of its weights and of the request; its fate lies in its model directory."""

    def __init__(self, name):
        self._name = name

    def start(self, directory, config, weight_transfer, dtype, max_model_len, seed):
        self._fate = directory
        self._tokenizer = build_tokenizer()

    def load_weights(self, weights, tolerance):
        if befalls(self._fate, "death in a weight update"):
            die()
        state = load_file(f"{weights.location}/model.safetensors")
        self._checksum = int.from_bytes(np.float64(sum(t.sum(dtype=np.float64) for t in state.values())).tobytes())
        self._version = weights.version
        gate = {"gate/mean": 0.0, "gate/max": 0.0}
        transfer = {"weights/seconds": 0.1, "weights/gb_per_s": 1.0, "weights/copy_gb_per_s": 8.0}
        transfer["weights/copies_fetched"] = 0.0
        return gate | transfer | {"memory/rollout_worker_peak_gib": 1.0}

    def sample(self, requests, sampling, ahead=(), *, seconds, resample_unfinished):
        if befalls(self._fate, "death in generation"):
            die()
        return Rollouts.of([self._draw(request, sampling) for request in requests])

    def _draw(self, request, sampling):
        rng = np.random.default_rng([request.seed, self._checksum])
        drawn = rng.integers(10, 100, size=int(rng.integers(2, sampling.max_response_tokens))).tolist()
        tokens = (*drawn, self._tokenizer.eos_token_id)
        return Rollout(
            prompt=request.prompt,
            sample_index=request.sample_index,
            response_ids=tokens,
            response_text=decode_response(self._tokenizer, tokens),
            logprobs=(-4.0,) * len(tokens),
            policy_version=self._version,
            finish_reason="stop",
        )
