"""Answers to benchmark prompts: best of n by the reward model, or conversations as the benchmark prescribes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from pipeline.benchmark.answer_log import AnsweredTurn, AnswerLog
from pipeline.benchmark.benchmark_question import BenchmarkQuestion
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.data.batching import stable_seed
from pipeline.data.chat import encode_prompt, strip_thinking
from pipeline.errors import DataError, WorkerError
from pipeline.ports import RewardSources, RolloutSource, RolloutStream
from pipeline.records import Answer, Message, Prompt, RewardScore, SamplingParams

REENCODING_SLACK = 64
"""Tokens by which the text of an answer may encode to more than were sampled."""


def answer_prompts(
    rollouts: RolloutSource,
    rewards: RewardSources,
    prompts: Sequence[Prompt],
    config: BenchmarkConfig,
    *,
    generator: str,
    seed: int,
) -> list[Answer]:
    """One answer per prompt: the best of `config.best_of` samples by reward.

    The engines must hold the policy already. With `best_of` 1 nothing is selected, only scored.

    Raises:
        WorkerError: an answer has no reward.
    """
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=1.0,
        max_response_tokens=config.max_response_tokens,
        samples_per_prompt=config.best_of,
        seed=stable_seed("benchmark", seed),
    )
    samples = rollouts.generate(prompts, sampling)
    scores = _all_of(rewards.score(samples).scores)
    answers = []
    for n, prompt in enumerate(prompts):
        candidates = range(n * config.best_of, (n + 1) * config.best_of)
        best = max(candidates, key=lambda i: scores[i].mean)
        answers.append(
            Answer(
                prompt_id=prompt.id,
                instruction=prompt.messages[-1]["content"],
                output=as_answer(samples[best].response_text, keep_thoughts=config.keep_thoughts),
                generator=generator,
                score=scores[best],
            )
        )
    return answers


def _all_of(scores: Sequence[RewardScore | None]) -> list[RewardScore]:
    """Every answer of a benchmark counts.

    Raises:
        WorkerError: an answer has no score.
    """
    scored = [score for score in scores if score is not None]
    if len(scored) < len(scores):
        raise WorkerError(
            f"{len(scores) - len(scored)} of {len(scores)} answers have no reward, and every answer counts in a "
            "benchmark. Give the reward a fixed score for them (alignment.rewards: on_failure)."
        )
    return scored


def answer_questions(
    rollouts: RolloutStream,
    questions: Sequence[BenchmarkQuestion],
    log: AnswerLog,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: SamplingParams,
    max_model_len: int,
    keep_thoughts: bool = False,
    progress: Callable[[AnsweredTurn], None] = lambda turn: None,
) -> None:
    """Answers every turn that `log` has no answer to; a later turn sees the model's own earlier ones.

    The engines must hold the policy already. The next turn of a conversation is asked as soon as the one before is
    answered, while the other conversations go on.

    Args:
        sampling: how every turn is sampled; the temperature is that of the question.
        max_model_len: tokens of a conversation. An answer that encodes to more tokens than were sampled can leave the
            next turn less room than `sampling` allows; it is then cut there.
        keep_thoughts: answers are logged with their `<think>` blocks.
    """
    waiting: deque[tuple[Prompt, SamplingParams]] = deque()
    question_of: dict[str, BenchmarkQuestion] = {}

    def next_turn(question: BenchmarkQuestion) -> tuple[Prompt, SamplingParams]:
        outputs = [turn.output for turn in log.turns(question)]
        prompt = Prompt(
            id=f"question {question.id}, turn {len(outputs) + 1}",
            messages=(messages := conversation(question, outputs)),
            token_ids=encode_prompt(tokenizer, messages),
        )
        question_of[prompt.id] = question
        room = max(1, min(sampling.max_response_tokens, max_model_len - len(prompt.token_ids)))
        return prompt, replace(sampling, temperature=question.temperature, max_response_tokens=room)

    waiting.extend(next_turn(question) for question in questions if len(log.turns(question)) < len(question.turns))
    for rollout in rollouts.stream(waiting):
        question = question_of[rollout.prompt.id]
        answered = AnsweredTurn(
            output=as_answer(rollout.response_text, keep_thoughts=keep_thoughts),
            num_tokens=len(rollout.response_ids),
            finish_reason=rollout.finish_reason,
        )
        log.append(question, answered)
        progress(answered)
        if len(log.turns(question)) < len(question.turns):
            # Ahead of the others: the last conversation to end decides when the run ends.
            waiting.appendleft(next_turn(question))


def as_answer(response: str, *, keep_thoughts: bool) -> str:
    """What a judge reads of a response."""
    return response if keep_thoughts else strip_thinking(response)


def conversation(question: BenchmarkQuestion, outputs: Sequence[str]) -> tuple[Message, ...]:
    """The user's turns with the answers so far between them, up to the first one that has no answer.

    A model does not read its earlier thoughts.
    """
    messages: list[Message] = []
    for turn, output in zip(question.turns, outputs, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": strip_thinking(output)}]
    return (*messages, {"role": "user", "content": question.turns[len(outputs)]})


def require_room_for_all(
    questions: Sequence[BenchmarkQuestion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_response_tokens: int,
    context: int,
) -> int:
    """Tokens that the longest conversation can take.

    Raises:
        DataError: more than the model's context; names the question.
    """
    needed = {
        question.place: len(encode_prompt(tokenizer, conversation(question, [""] * (len(question.turns) - 1))))
        + len(question.turns) * max_response_tokens
        for question in questions
    }
    place = max(needed, key=lambda place: needed[place])
    if needed[place] > context:
        raise DataError(
            f"{place}: with {max_response_tokens} tokens for each answer this conversation can take {needed[place]}, "
            f"and the model's context has {context}. Lower --max-response-tokens, or take a model with a longer one."
        )
    return min(context, needed[place] + REENCODING_SLACK)
