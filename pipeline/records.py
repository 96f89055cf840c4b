"""The nouns that travel between rooms.

Every record is frozen, keyword-only and complete when it is created. A rollout gains a score by becoming part of an
`Experience`, never by having a field filled in later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant"]

Message = Mapping[str, str]
"""One chat turn: {"role": Role, "content": text}."""

Metrics = dict[str, float]

POLICY_FILE = "model.safetensors"
"""The file in the directory of a published policy (`PolicyWeights`)."""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """One comparison in the one schema of the project (docs/method.md section 8)."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    scores_chosen: Mapping[str, float] | None
    scores_rejected: Mapping[str, float] | None
    source: str
    """Name of the recipe's source; "planted" in the planted world."""
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """A prompt and the responses to it, in one model's tokens; every response ends with the end of its turn."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """The prompt counts once: what a packed forward pass computes."""
        return len(self.prompt_ids) + self.num_response_tokens

    @property
    def num_response_tokens(self) -> int:
        return sum(map(len, self.response_ids))


@dataclass(frozen=True, kw_only=True)
class ObjectiveTruth:
    """What the objectives of B pairs really are, where a world with a known truth made the pairs."""

    weights: torch.Tensor
    """[B, K] float64: the true objective weights of each prompt."""
    scores: torch.Tensor
    """[2B, K] float64: the true scores of each response, chosen rows first."""


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """B tokenised pairs. Rows [0, B) are the chosen responses, rows [B, 2B) the rejected ones."""

    pairs: tuple[PromptGroup, ...]
    """Two responses each: the chosen, then the rejected."""
    target: torch.Tensor
    """[B, K] float32: supervision distribution over the objectives, 0 where masked."""
    target_mask: torch.Tensor
    """[B, K] bool: which objectives were annotated; all False for a pair without scores."""
    noise_seeds: torch.Tensor
    """[B] int64: seed of each pair's posterior sample; a function of (seed, step, position), so
    neither sharding nor micro-batching changes the noise."""
    scores: torch.Tensor
    """[2B, K] float32: standardised annotated scores of each response, 0 where masked."""
    score_mask: torch.Tensor
    """[2B, K] bool: which scores were annotated."""
    margins: torch.Tensor
    """[B] float32: by how much the chosen response was rated better, on the annotators' scale; NaN where unknown."""
    sources: tuple[str, ...]
    """[B] the source of each pair."""
    truth: ObjectiveTruth | None = None
    """Only evaluation reads it, so training batches have none. None also where nobody knows it."""

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, kw_only=True)
class ReferencedResponses:
    """B prompts with k responses each, and what the reference policy says of them."""

    groups: tuple[PromptGroup, ...]
    reference_logprobs: torch.Tensor
    """[B, k] float32: log pi_ref(y|x), summed over the tokens of each response, nats."""


@dataclass(frozen=True, kw_only=True)
class DirectBatch:
    """What a policy is aligned to directly in one step: B pairs, or B single responses with a label."""

    groups: tuple[PromptGroup, ...]
    """k responses each: the chosen and the rejected one of a pair (k = 2), or one response (k = 1)."""
    desirable: torch.Tensor
    """[B, k] bool: which responses are to become more likely; (True, False) for a pair."""
    reference_logprobs: torch.Tensor | None
    """[B, k] float32: log pi_ref(y|x), summed over tokens, nats; None where the method has no reference."""
    mismatched: ReferencedResponses | None
    """KTO's other responses: every prompt of `groups` with the responses of the row before it; None for others."""
    seed: int
    """Of the random choices of the step; a function of (seed, step)."""

    @property
    def num_rows(self) -> int:
        return len(self.groups)

    @property
    def num_responses(self) -> int:
        return self.desirable.numel()


@dataclass(frozen=True, kw_only=True)
class LabelledResponse:
    """One response that somebody liked or did not like."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    label: bool


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to answer, in words and in the policy's tokens."""

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the engine samples; `seed` is mixed with (step, prompt, sample) per request."""

    temperature: float
    top_p: float
    max_response_tokens: int
    samples_per_prompt: int
    seed: int


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response, with the engine's own log-probabilities of its tokens."""

    prompt: Prompt
    sample_index: int
    response_ids: tuple[int, ...]
    """Ends with the end-of-turn token when `finish_reason` is "stop"."""
    response_text: str
    logprobs: tuple[float, ...]
    """Natural log-probabilities of `response_ids` under the engine, in the distribution it sampled from (temperature
    applied)."""
    policy_version: int
    """Version of the policy that sampled the first token. A later policy may have sampled the rest. Each logprob comes
    from the policy that sampled its token."""
    finish_reason: FinishReason

    @property
    def tokens(self) -> PromptGroup:
        return PromptGroup(prompt_ids=self.prompt.token_ids, response_ids=(self.response_ids,))


@dataclass(frozen=True, kw_only=True)
class RewardScore:
    """The reward of one response, with its reason and its error bar (docs/method.md section 7).

    `mean = sum_k objective_weights[k] * objective_scores[k]` exactly, where there are scores: the "mlp" and "film"
    decoders have none. A Bradley-Terry head has no reasons at all: both tuples are empty.
    """

    mean: float
    std: float
    """What the model does not know of its reward, against that of a mean response to the same prompt."""
    objective_weights: tuple[float, ...]
    objective_scores: tuple[float, ...]
    concentration: float = 0.0
    """A = sum_k alpha_k of the Dirichlet over the weights; 0 where the weights are not random."""
    deviations: tuple[float, ...] = ()
    """`RewardOutput.deviations`: `std` is their length, and the covariance with another response to the prompt their
    inner product."""
    temperature: float = 1.0
    """T of the model: a margin over T is log-odds, where nothing is uncertain."""


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts:
    """What the reward sources of a run say of B rollouts."""

    scores: tuple[RewardScore | None, ...]
    """[B] the reward that is trained on; None where a source gave no score and its rule drops the row."""
    by_source: Mapping[str, tuple[RewardScore | None, ...]]
    """Name of a source -> [B] what it says itself; None where it gave no score."""
    metrics: Metrics
    """`reward/<source>*` and `reward/dropped`."""


@dataclass(frozen=True, kw_only=True)
class TokenEvaluation:
    """The learner's view of one rollout's response tokens, before the update."""

    logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...]
    values: tuple[float, ...]
    """0 throughout where the algorithm trains no critic."""


class SentWithoutCopy:
    """Pickles the tensors of a dataclass as arrays. Ray shares the memory of arrays, and copies tensors twice.

    So nobody writes into the tensors of a record that has travelled.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import torch

        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        arrays = {name: value.numpy() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return _received, (type(self), values | arrays, tuple(arrays))


def _received(record: Callable[..., Any], values: dict[str, Any], arrays: Sequence[str]) -> Any:
    import torch

    # Not `from_numpy`, which warns of memory that cannot be written.
    return record(**values | {name: torch.from_dlpack(values[name]) for name in arrays})


@dataclass(frozen=True, kw_only=True)
class ResponseEvaluations(SentWithoutCopy):
    """What the driver sees of the learner's view of B rollouts. The numbers of their tokens stay with the learner."""

    log_ratios: torch.Tensor
    """[B] float64: sum over the tokens of log pi - log pi_ref, nats."""
    engine_gaps: torch.Tensor
    """[B] float32: largest |engine - learner| over the tokens' log-probabilities, nats."""


@dataclass(frozen=True, kw_only=True)
class RewardedRows(SentWithoutCopy):
    """The R rollouts of a step that have a reward, and somebody to be compared with where the estimator compares."""

    rows: torch.Tensor
    """[R] int64: places among the rollouts of the step, which are ordered by prompt, then by sample."""
    rewards: torch.Tensor
    """[R] float32: shaped, so that they can be trained on."""
    groups: torch.Tensor
    """[R] int64: number of the prompt, as the step asked for it."""


@dataclass(frozen=True, kw_only=True)
class CriticTargets(SentWithoutCopy):
    """What the critic learns from one batch."""

    values: torch.Tensor
    """[N] under the critic before the update."""
    returns: torch.Tensor
    """[N]: advantages before whitening, plus values."""


@dataclass(frozen=True, kw_only=True)
class Experience(SentWithoutCopy):
    """A rollout batch ready for the update: B sequences, whose N response tokens lie end to end."""

    sequences: Sequence[PromptGroup]
    """B prompts with one response each."""
    rows: tuple[int, ...]
    """[B] places of these responses among the rollouts of the step, of which a recipe may leave some out."""
    offsets: torch.Tensor
    """[B + 1] int64: response b has the tokens from `offsets[b]` to `offsets[b + 1]`, one at least."""
    logprobs: torch.Tensor
    """[N] under the policy before the update."""
    reference_logprobs: torch.Tensor
    """[N] under the frozen reference."""
    advantages: torch.Tensor
    """[N]; PPO and REINFORCE++ whiten them over the tokens of the whole batch."""
    importance_weights: torch.Tensor | None
    """[N]: weight of each token in the policy loss; None where the recipe does not correct for the engine's
    distribution, and every weight is 1."""
    kl_loss_coefficient: float
    """Weight of the KL term of the loss in this step; 0 where the KL is part of the reward."""
    critic: CriticTargets | None
    """None where the algorithm trains no critic."""
    num_response_tokens: int
    """The loss denominator of the whole batch, counted before sharding."""


@dataclass(frozen=True, kw_only=True)
class ExperienceSummary(SentWithoutCopy):
    """What the driver sees of the experience of a step."""

    metrics: Metrics
    """Of the tokens of all rewarded rollouts."""
    rows: tuple[int, ...]
    """[B] as in the experience."""
    mean_advantages: torch.Tensor
    """[B] float64: mean over the response's tokens, as they are trained on."""


@dataclass(frozen=True, kw_only=True)
class ProbeSequence:
    """One probe of the numerics gate: a sequence and what the learner says of it."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Float32 learner log-probabilities of `response_ids` at temperature 1."""


@dataclass(frozen=True, kw_only=True)
class PolicyWeights:
    """A published version of the policy: where its weights lie and how to recognise them."""

    version: int
    location: str
    """A directory holding `POLICY_FILE` with Hugging Face parameter names, with
    `lm_head.weight` always explicit."""
    probes: tuple[ProbeSequence, ...]
    node: str | None = None
    """Id of the node whose memory `location` lies in; None stands for the driver's."""
    written_gb_per_s: float = 0.0
    """How fast the file was written."""
    file_follows: bool = False
    """The learner sends the weights first and writes the file behind that: who reads the file waits for it."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: where its artefacts lie and what it measured."""

    name: str
    fingerprint: str
    location: str
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One benchmark answer, as AlpacaEval's `model_outputs.json` holds it, plus its reward."""

    prompt_id: str
    instruction: str
    output: str
    generator: str
    score: RewardScore
