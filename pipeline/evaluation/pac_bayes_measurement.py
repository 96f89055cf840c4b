"""What the PAC-Bayes bounds of a reward model are computed from: risks on its training pairs and on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.data.collate import TokenisedPair, tokenise_pairs
from pipeline.data.preferences import first_of_each_prompt, shared_prompts
from pipeline.evaluation.pac_bayes_report import PacBayesReport, pac_bayes_report
from pipeline.evaluation.posterior_risk import PosteriorRisk
from pipeline.records import PreferencePair


@dataclass(frozen=True, kw_only=True)
class MeasuredPairs:
    """The pairs of both sides, as the bounds need them."""

    training: Sequence[TokenisedPair]
    heldout: Sequence[TokenisedPair]
    """One pair a prompt: independent trials."""

    @classmethod
    def of(
        cls,
        training: Sequence[PreferencePair],
        heldout: Sequence[PreferencePair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
    ) -> MeasuredPairs:
        """Tokenises as training did: drops training pairs that are too long, and cuts the prompt of held-out pairs."""
        return cls(
            training=tokenise_pairs(training, tokenizer, max_length=max_length, drop_too_long=True),
            heldout=tokenise_pairs(
                first_of_each_prompt(heldout), tokenizer, max_length=max_length, drop_too_long=False
            ),
        )


def measure_pac_bayes(
    pairs: MeasuredPairs, risk_of: Callable[[Sequence[TokenisedPair]], PosteriorRisk], *, delta: float
) -> PacBayesReport:
    """All bounds of a model.

    Args:
        risk_of: `posterior_risk` of the model.
        delta: each bound holds with probability 1 - delta.
    """
    return pac_bayes_report(
        risk_of(pairs.training),
        risk_of(pairs.heldout),
        delta=delta,
        shared_prompts=shared_prompts(
            (pair.pair.prompt for pair in pairs.training), (pair.pair.prompt for pair in pairs.heldout)
        ),
    )
