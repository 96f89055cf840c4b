"""What reward training reads: tokenised pairs of both splits, their statistics, and the batch of every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.batching import stable_seed, step_indices
from pipeline.data.chat_rendering import require_chat_template
from pipeline.data.collate import PairCollator, TokenisedPair, objective_truth, tokenise_pairs
from pipeline.data.planted import GoldAnnotator
from pipeline.data.preferences import require_annotations, shared_prompts
from pipeline.data.run_data import RunData
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.evaluation.pair_metrics import longer_is_better
from pipeline.records import Metrics, PreferenceBatch, PreferencePair, PromptGroup

MISMATCHED_HELDOUT = 256
"""Pairs that tell within .06 how often a reward prefers the response to the prompt over one to another prompt."""


@dataclass(frozen=True, kw_only=True)
class RewardData:
    """The batch of a step is a pure function of the step, so a resumed run sees the same data."""

    pairs: Sequence[TokenisedPair]
    num_mismatched: int
    """How many of these pairs are `mismatched_pairs`: the last ones."""
    mismatched_heldout_pairs: Sequence[TokenisedPair]
    """Held-out chosen responses against some that were chosen for other prompts, `MISMATCHED_HELDOUT` at most."""
    heldout_pairs: Sequence[TokenisedPair]
    statistics: MixtureStatistics
    collate: PairCollator
    batch_pairs: int
    num_steps: int
    seed: int
    gold: GoldAnnotator | None
    """The truth about the held-out pairs, where it is known."""

    @classmethod
    def of(cls, experiment: ExperimentConfig, data: RunData, tokenizer: PreTrainedTokenizerBase) -> RewardData:
        """Tokenises both splits. A training pair that is too long is dropped; a held-out one gets a shorter prompt.

        Raises:
            DataError: no pair fits, or the pairs lack annotations that the head or the pair loss needs.
        """
        config = experiment.reward
        require_chat_template(tokenizer)
        pairs = tokenise_pairs(
            data.train_pairs,
            tokenizer,
            max_length=config.max_length,
            drop_too_long=True,
            max_too_long=experiment.data.max_too_long,
        )
        heldout = tokenise_pairs(
            share_by_source(data.heldout_pairs, config.max_eval_pairs),
            tokenizer,
            max_length=config.max_length,
            drop_too_long=False,
        )
        require_annotations(
            [p.pair for p in pairs], scores=config.head == "regression", margins=config.pair_loss.form != "bt"
        )
        statistics = MixtureStatistics.of(
            [p.pair for p in pairs], experiment.objectives, heldout=[p.pair for p in heldout]
        )
        if not statistics.has_scores and not experiment.own_objectives:
            # What nobody scored is no helpfulness.
            statistics = statistics.named(experiment.factor_names)
        shares = {source.name: source.mismatched_pairs for source in experiment.data.sources}
        mismatched = mismatched_pairs(pairs, shares, experiment.seed, max_length=config.max_length)
        pairs = [*pairs, *mismatched]
        return cls(
            pairs=pairs,
            num_mismatched=len(mismatched),
            heldout_pairs=heldout,
            mismatched_heldout_pairs=_mismatched_heldout(heldout, experiment.seed, max_length=config.max_length),
            statistics=statistics,
            collate=PairCollator(
                statistics=statistics,
                temperature=config.loss.supervision_temperature,
                seed=experiment.seed,
                target_from=config.loss.target_from,
            ),
            batch_pairs=config.batch_pairs,
            num_steps=config.num_steps or max(1, len(pairs) // config.batch_pairs),
            seed=experiment.seed,
            gold=data.gold,
        )

    @property
    def compared_pairs(self) -> Sequence[TokenisedPair]:
        """The training pairs that somebody compared."""
        return self.pairs[: len(self.pairs) - self.num_mismatched]

    def batch(self, step: int) -> PreferenceBatch:
        """The training pairs of a step."""
        rows = step_indices(len(self.pairs), self.batch_pairs, step, self.seed)
        return self.collate([self.pairs[i] for i in rows], step)

    def last_batches(self, num_pairs: int) -> list[PreferenceBatch]:
        """The batches of the last steps, at least one, of at most `num_pairs` pairs and of at most one epoch."""
        count = min(num_pairs, len(self.pairs)) // self.batch_pairs
        return [self.batch(step) for step in range(max(0, self.num_steps - max(1, count)), self.num_steps)]

    @property
    def heldout(self) -> PreferenceBatch:
        """All held-out pairs as one batch, with the truth about them where it is known."""
        batch = self.collate(self.heldout_pairs, 0)
        if self.gold is None:
            return batch
        pairs = [pair.pair for pair in self.heldout_pairs]
        return replace(batch, truth=objective_truth(self.gold, pairs, self.statistics.objectives))

    @property
    def mismatched_heldout(self) -> PreferenceBatch | None:
        """None where no held-out response fits another prompt."""
        return self.collate(self.mismatched_heldout_pairs, 0) if self.mismatched_heldout_pairs else None

    def metrics(self) -> Metrics:
        """Sizes of the splits, in all and by source, the prompts they share, and the accuracy of length alone."""
        num_shared = shared_prompts((p.pair.prompt for p in self.pairs), (p.pair.prompt for p in self.heldout_pairs))
        gaps = [len(chosen) - len(rejected) for chosen, rejected in (p.tokens.response_ids for p in self.heldout_pairs)]
        by_source = {
            f"data/source/{name}/{split}_pairs": float(count)
            for split, pairs in (("train", self.compared_pairs), ("heldout", self.heldout_pairs))
            for name, count in Counter(p.pair.source for p in pairs).items()
        }
        return by_source | {
            "data/train_pairs": float(len(self.compared_pairs)),
            "data/mismatched_pairs": float(self.num_mismatched),
            "data/heldout_pairs": float(len(self.heldout_pairs)),
            "data/shared_prompts": float(num_shared),
            "eval/longer_is_better": longer_is_better(gaps),
        }


def mismatched_pairs(
    pairs: Sequence[TokenisedPair], shares: Mapping[str, float], seed: int, *, max_length: int
) -> list[TokenisedPair]:
    """`mismatched_pair` of each pair, with the probability that `shares` has for its source, or 0.

    Seed and ids decide which pairs get one, so a larger share contains the pairs of a smaller one. A pair gets none
    where no other chosen response fits.
    """
    asked = (
        pair
        for pair in pairs
        if stable_seed("mismatched", seed, pair.pair.id) / 2**62 < shares.get(pair.pair.source, 0.0)
    )
    made = (mismatched_pair(pair, pairs, seed, max_length=max_length) for pair in asked)
    return [pair for pair in made if pair is not None]


def _mismatched_heldout(heldout: Sequence[TokenisedPair], seed: int, *, max_length: int) -> list[TokenisedPair]:
    asked = {pair.id for pair in share_by_source([p.pair for p in heldout], MISMATCHED_HELDOUT)}
    made = (mismatched_pair(p, heldout, seed, max_length=max_length) for p in heldout if p.pair.id in asked)
    return [pair for pair in made if pair is not None]


def mismatched_pair(
    pair: TokenisedPair, pairs: Sequence[TokenisedPair], seed: int, *, max_length: int
) -> TokenisedPair | None:
    """The chosen response against one of `pairs` that was chosen for another prompt, without scores and margin.

    Source: Liu et al. 2024, arXiv:2409.13156, section 3, the non-contextual pairs.

    Returns:
        None where no other chosen response fits into `max_length` tokens behind the prompt.
    """
    prompt, chosen = pair.tokens.prompt_ids, pair.tokens.response_ids[0]
    first = stable_seed("response to another prompt", seed, pair.pair.id) % len(pairs)
    others = (pairs[(first + place) % len(pairs)] for place in range(len(pairs)))
    fitting = (
        other
        for other in others
        if other.tokens.prompt_ids != prompt
        and other.tokens.response_ids[0] != chosen
        and len(prompt) + len(other.tokens.response_ids[0]) <= max_length
    )
    if (other := next(fitting, None)) is None:
        return None
    compared = replace(
        pair.pair,
        id=f"{pair.pair.id}/mismatched",
        rejected=other.pair.chosen,
        scores_chosen=None,
        scores_rejected=None,
        margin=None,
    )
    tokens = PromptGroup(prompt_ids=prompt, response_ids=(chosen, other.tokens.response_ids[0]))
    return TokenisedPair(pair=compared, tokens=tokens)


def share_by_source(pairs: Sequence[PreferencePair], count: int) -> list[PreferencePair]:
    """At most `count` pairs, in their order: the first ones of every source, as many as its share, at least one."""
    if count >= len(pairs):
        return list(pairs)
    sizes = Counter(pair.source for pair in pairs)
    room = {source: max(1, size * count // len(pairs)) for source, size in sizes.items()}
    kept = []
    for pair in pairs:
        if room[pair.source]:
            room[pair.source] -= 1
            kept.append(pair)
    return kept
