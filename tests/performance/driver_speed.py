"""What the token data of one alignment step cost the driver: processor seconds and memory.

    python -m tests.performance.driver_speed                                    # 1,000 and 10,000 responses
    python -m tests.performance.driver_speed --responses 100000

Rows, each with the driver's part of a step:

    rollouts    the workers' answers, 64 responses each, are decoded and put in order
    evaluate    the rollouts are encoded for the ranks, and what these say of each response is decoded
    experience  the rewards are shaped and encoded; what a rank says of the experience is decoded

Behind them the first rank's part: it decodes rollouts and evaluation, sums them up by response, builds the experience
of all ranks and encodes it. The driver waits for that, as it waits for evaluation and update.

Another process makes the data, of random tokens, before the clock starts; the rank is a process of its own. What
travels is pickled as Ray pickles it: large buffers apart, written to shared memory by the sender and read there by the
receiver. The memory is the most that a process held at once over what it held before, mapped buffers included. Scoring,
the texts' way to the scorer, the Parquet files of kept rollouts and the forward passes are not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ray import cloudpickle

from pipeline.columns import EvaluatedRollouts, Rollouts, TokenEvaluations
from pipeline.config.alignment import AlignmentConfig
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.experience import build_experience, summary_of
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.learning.rewarded_rows import reward_rows
from pipeline.ragged import Ragged
from pipeline.records import Prompt, RewardScore
from pipeline.repetition import repeated_shares
from pipeline.rollouts.chunks import ChunkLedger
from pipeline.rollouts.prefetch import staleness
from pipeline.rollouts.requests import RolloutRequest
from tests.performance.processor import processor

RESPONSES_PER_ANSWER = 64
SAMPLES_PER_PROMPT = 4
PROMPT_TOKENS = 100
VOCABULARY = 150_000
CHARACTERS_PER_TOKEN = 4
ENGINE_TOKENS_PER_S = 20_000
BYTES_PER_TOKEN = 5 * 4
"""Token id, and the log-probabilities of engine, policy and reference and the value, at 4 bytes."""


# ------------------------------------------------------------------ what travels


def send(path, record):
    """Pickles a record as Ray does. Large buffers are not copied but into the shared memory."""
    buffers = []
    pickled = cloudpickle.dumps(record, protocol=5, buffer_callback=buffers.append)
    pieces = [pickled, *(buffer.raw() for buffer in buffers)]
    with open(path, "wb") as stream:
        stream.write(json.dumps([len(piece) for piece in pieces]).encode() + b"\n")
        for piece in pieces:
            stream.seek(-stream.tell() % 64, os.SEEK_CUR)
            stream.write(piece)


def receive(path):
    """The record; its buffers lie in the shared memory and cannot be written."""
    with open(path, "rb") as stream:
        lengths = json.loads(stream.readline())
        position = stream.tell()
        shared = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    pieces = []
    for length in lengths:
        position += -position % 64
        pieces.append(shared[position : position + length])
        position += length
    return cloudpickle.loads(pieces[0], buffers=pieces[1:])


# ------------------------------------------------------------------ the data


def lengths_of(options, num_responses):
    """Tokens of each response: `tokens` in the mean, uniform in `spread` of it on both sides."""
    half = int(options.spread * options.tokens)
    return np.random.default_rng(0).integers(options.tokens - half, options.tokens + half, num_responses, endpoint=True)


def prompts_of(num_responses):
    dice = np.random.default_rng(1)
    return [
        Prompt(
            id=f"prompt-{n}",
            messages=({"role": "user", "content": "x" * CHARACTERS_PER_TOKEN * PROMPT_TOKENS},),
            token_ids=tuple(dice.integers(VOCABULARY, size=PROMPT_TOKENS).tolist()),
        )
        for n in range(-(-num_responses // SAMPLES_PER_PROMPT))
    ]


def requests_of(num_responses):
    prompts = prompts_of(num_responses)
    return [
        RolloutRequest(prompt=prompts[n // SAMPLES_PER_PROMPT], sample_index=n % SAMPLES_PER_PROMPT, seed=n)
        for n in range(num_responses)
    ]


def logprobs(dice, lengths):
    return Ragged.divided(torch.from_numpy(-dice.random(int(lengths.sum()), dtype=np.float32)), lengths)


def make_data(directory, options, num_responses):
    """Writes the workers' answers and the first rank's evaluation."""
    requests, all_lengths = requests_of(num_responses), torch.from_numpy(lengths_of(options, num_responses))
    dice = np.random.default_rng(2)
    for number, first in enumerate(range(0, num_responses, RESPONSES_PER_ANSWER)):
        own, lengths = requests[first:][:RESPONSES_PER_ANSWER], all_lengths[first:][:RESPONSES_PER_ANSWER]
        token_ids = torch.from_numpy(dice.integers(VOCABULARY, size=int(lengths.sum()), dtype=np.int32))
        response_ids = Ragged.divided(token_ids, lengths)
        answer = Rollouts(
            prompts=tuple(request.prompt for request in own),
            sample_indices=tuple(request.sample_index for request in own),
            response_ids=response_ids,
            response_texts=tuple("x" * CHARACTERS_PER_TOKEN * length for length in lengths.tolist()),
            logprobs=logprobs(dice, lengths),
            policy_versions=(0,) * len(own),
            finish_reasons=("stop",) * len(own),
            repetition=tuple(repeated_shares(response_ids).tolist()),
        )
        send(directory / f"answer-{number}", answer)
    evaluations = TokenEvaluations(
        logprobs=logprobs(dice, all_lengths),
        reference_logprobs=logprobs(dice, all_lengths),
        values=logprobs(dice, all_lengths),
    )
    send(directory / "evaluation", evaluations)


# ------------------------------------------------------------------ what a step costs


class Costs:
    """Processor seconds of each phase, and the most memory over all of them."""

    def __init__(self):
        gc.collect()
        self.seconds = {}
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
        self._before = self._peak_bytes()

    @contextmanager
    def phase(self, name):
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

    def as_row(self):
        return {"seconds": self.seconds, "bytes": self._peak_bytes() - self._before}

    def _peak_bytes(self):
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


def collected(directory, requests):
    ledger = ChunkLedger(requests, RESPONSES_PER_ANSWER)
    while (chunk := ledger.issue(0.0)) is not None:
        ledger.accept(chunk, receive(directory / f"answer-{chunk.number}"), 0.0)
    return Rollouts.concat(ledger.answers())


def config_of_the_step():
    return AlignmentConfig(num_steps=1, max_response_tokens=2**20)


def drive(directory, num_responses):
    """The driver's part of a step. Returns the seconds of its phases, its peak of memory, and the same of a rank."""
    requests = requests_of(num_responses)
    scores = [
        RewardScore(mean=mean, std=0.1, objective_weights=(), objective_scores=())
        for mean in np.random.default_rng(3).normal(size=num_responses).tolist()
    ]
    costs = Costs()
    with costs.phase("rollouts"):
        rollouts = collected(directory, requests)
        staleness(rollouts, 0, at_most=0)
    for answer in directory.glob("answer-*"):
        answer.unlink()  # as Ray frees what nobody refers to
    with costs.phase("evaluate"):
        send(directory / "rollouts", rollouts)
    with costs.phase("experience"):
        rewarded, _ = reward_rows(rollouts, scores, config_of_the_step(), RewardScale(mean=0.0, std=1.0))
        send(directory / "rewarded", rewarded)
    rank = json.loads(child(["--rank", str(directory)]))
    with costs.phase("evaluate"):
        receive(directory / "responses")
    with costs.phase("experience"):
        receive(directory / "summary")
    return costs.as_row() | {"rank": rank, "tokens": rollouts.num_response_tokens}


def build(directory):
    """The first rank's part of a step, without its forward passes. Returns as `drive`."""
    costs, config = Costs(), config_of_the_step()
    with costs.phase("evaluate"):
        rollouts, tokens = receive(directory / "rollouts"), receive(directory / "evaluation")
        send(directory / "responses", response_evaluations(rollouts, tokens))
    with costs.phase("experience"):
        rewarded = receive(directory / "rewarded")
        evaluated = EvaluatedRollouts(rollouts=rollouts, tokens=tokens)
        experience, metrics = build_experience(evaluated, rewarded, config, kl_coefficient=config.kl.coefficient)
        send(directory / "summary", summary_of(experience, metrics))
        send(directory / "experience", experience)
    return costs.as_row()


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step of so many response tokens costs, beside forward and backward passes."""

    tokens: int
    driver: dict
    """Processor seconds of each phase."""
    rank: dict
    """The same of the first rank."""
    driver_bytes: int
    """The most that the driver held at once."""
    rank_bytes: int

    @property
    def driver_s(self):
        return sum(self.driver.values())

    @property
    def us_per_token(self):
        """Of driver and first rank, one after the other."""
        return 1e6 * (self.driver_s + sum(self.rank.values())) / self.tokens


def cost_of_step(num_responses, arguments=()):
    """Measures a step in processes of their own.

    Args:
        arguments: --tokens and --spread, where they differ from the defaults.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        child(["--make", directory, str(num_responses), *arguments])
        row = json.loads(child(["--drive", directory, str(num_responses)]))
    return StepCost(
        tokens=row["tokens"],
        driver=row["seconds"],
        rank=row["rank"]["seconds"],
        driver_bytes=row["bytes"],
        rank_bytes=row["rank"]["bytes"],
    )


def report(num_responses, cost):
    def phases(seconds):
        return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())

    def memory(num_bytes):
        times = num_bytes / cost.tokens / BYTES_PER_TOKEN
        return f"{num_bytes / 1e9:.2f} GB, {times:.1f} times the numbers of the tokens"

    rate = cost.tokens / cost.driver_s
    print(
        f"{num_responses:,} responses, {cost.tokens:,} tokens\n"
        f"  driver      {cost.driver_s:.2f} s of a processor ({phases(cost.driver)}); {memory(cost.driver_bytes)}; "
        f"{rate / 1e6:.2f} million tokens/s, {rate / ENGINE_TOKENS_PER_S:.0f} engines\n"
        f"  first rank  {sum(cost.rank.values()):.2f} s ({phases(cost.rank)}); {memory(cost.rank_bytes)}\n"
        f"  both        {cost.us_per_token:.3f} us a token",
        flush=True,
    )


def child(arguments):
    """This script in a process of its own; returns what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.performance.driver_speed", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return run.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--tokens", type=int, default=1_000, help="of a response, in the mean")
    parser.add_argument("--spread", type=float, default=0.5, help="of the lengths on both sides, as a share of tokens")
    parser.add_argument("--make", nargs=2, metavar=("DIRECTORY", "RESPONSES"), help=argparse.SUPPRESS)
    parser.add_argument("--drive", nargs=2, metavar=("DIRECTORY", "RESPONSES"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_data(Path(options.make[0]), options, int(options.make[1]))
    elif options.drive:
        print(json.dumps(drive(Path(options.drive[0]), int(options.drive[1]))))
    elif options.rank:
        print(json.dumps(build(Path(options.rank))))
    else:
        print(processor())
        print(f"responses of {options.tokens} tokens, +/- {options.spread:.0%}", flush=True)
        for num_responses in options.responses:
            arguments = ["--tokens", str(options.tokens), "--spread", str(options.spread)]
            report(num_responses, cost_of_step(num_responses, arguments))


if __name__ == "__main__":
    main()
