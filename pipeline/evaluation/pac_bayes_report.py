"""The paper's PAC-Bayes bound of a reward model, its meaning, and a held-out bound that does hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.evaluation.posterior_risk import PosteriorRisk
from pipeline.objectives.pac_bayes import (
    BOUNDS,
    PacBayesBound,
    clopper_pearson_upper,
    largest_kl,
    risk_bound,
    smallest_n,
)

COIN = 0.5
"""The risk of an ordering that ignores both responses. Q = P also has it, with divergence 0."""

PAPER_BOUND = "mcallester99"


@dataclass(frozen=True, kw_only=True)
class BoundReport:
    """One PAC-Bayes bound on the Gibbs risk, and what would make it informative."""

    at_most: float
    """The bound, not clipped to 1. Above 1, it shows how far it is from being informative."""
    clipped: float
    vacuous: bool
    """The bound is at least 1, which holds for every risk."""
    beats_coin: bool
    """The bound is below 1/2."""
    kl_per_pair_below_1: float | None
    """D/n below which the bound is below 1, at this n and R_hat; 0 if there is none. None for kl_inverse, which is
    below 1 at any D, up to rounding."""
    kl_per_pair_below_coin: float
    """The same for 1/2."""
    pairs_below_1: int | None
    """Training pairs from which the bound is below 1, at this R_hat and D/n; None if no number is enough."""
    pairs_below_coin: int | None
    """The same for 1/2."""


@dataclass(frozen=True, kw_only=True)
class PacBayesReport:
    """VRM Eqs. 15-20 on the training pairs, and Clopper-Pearson bounds on held-out ones."""

    delta: float
    """Each single bound holds with probability 1 - delta."""
    training: PosteriorRisk
    kl: float
    """D(Q||P), nats over all training pairs (Eq. 20)."""
    kl_per_pair: float
    bounds: Mapping[str, BoundReport]
    """The bounds by their names in `BOUNDS`."""
    heldout: PosteriorRisk
    """The risk on one pair per prompt, so that the trials are independent."""
    shared_prompts: int
    """Held-out prompts that are also in training. Above 0, the held-out bounds do not hold."""
    heldout_gibbs_at_most: float
    """Bound on the risk of one posterior draw per pair, which the PAC-Bayes bounds are also about."""
    heldout_mean_reward_at_most: float
    """Bound on the risk of the posterior-mean reward, which is the one that is served."""


def pac_bayes_report(
    training: PosteriorRisk, heldout: PosteriorRisk, *, delta: float, shared_prompts: int
) -> PacBayesReport:
    """All bounds from the two measurements.

    Args:
        training: risk on the pairs that the model was trained on.
        heldout: risk on one pair per prompt. Pairs of the same prompt are not independent trials.
        delta: in (0, 1).
        shared_prompts: number of prompts that are in both sets.

    Raises:
        DataError: held-out pairs share prompts.
        NumericsError: delta is outside (0, 1), or a divergence is not finite.
    """
    if heldout.num_prompts < heldout.num_pairs:
        raise DataError(
            f"{heldout.num_pairs} held-out pairs share {heldout.num_prompts} prompts, but Clopper-Pearson counts "
            "independent trials. Keep one pair per prompt."
        )
    return PacBayesReport(
        delta=delta,
        training=training,
        kl=training.kl,
        kl_per_pair=training.kl / training.num_pairs,
        bounds={name: _bound_report(bound, training, delta) for name, bound in BOUNDS.items()},
        heldout=heldout,
        shared_prompts=shared_prompts,
        heldout_gibbs_at_most=clopper_pearson_upper(heldout.first_draw_errors, heldout.num_pairs, delta),
        heldout_mean_reward_at_most=clopper_pearson_upper(heldout.mean_reward_errors, heldout.num_pairs, delta),
    )


def _bound_report(bound: PacBayesBound, training: PosteriorRisk, delta: float) -> BoundReport:
    risk, n = training.gibbs_risk, training.num_pairs
    at_most = risk_bound(bound, risk, training.kl, n, delta)

    def affordable(level: float) -> float:
        return max(0.0, largest_kl(bound, risk, n, delta, level=level)) / n

    def enough_pairs(level: float) -> int | None:
        return smallest_n(bound, risk, training.kl / n, delta, level=level)

    return BoundReport(
        at_most=at_most,
        clipped=min(1.0, at_most),
        vacuous=at_most >= 1.0,
        beats_coin=at_most < COIN,
        kl_per_pair_below_1=affordable(1.0) if affordable(1.0) < math.inf else None,
        kl_per_pair_below_coin=affordable(COIN),
        pairs_below_1=enough_pairs(1.0),
        pairs_below_coin=enough_pairs(COIN),
    )


def pac_bayes_text(report: PacBayesReport) -> str:
    """The report for a terminal: the numbers, then their meaning."""
    training, heldout = report.training, report.heldout
    n = training.num_pairs
    parts = {"w": training.kl_w, "z chosen": training.kl_z_chosen, "z rejected": training.kl_z_rejected}
    shares = ", ".join(f"{name} {kl / n:.4g}" for name, kl in parts.items())
    lines = [
        f"training pairs              n = {n:,}, over {training.num_prompts:,} prompts",
        f"Gibbs risk R_hat(Q)         {training.gibbs_risk:.4f} +- {training.gibbs_risk_standard_error:.4f}, "
        f"{training.samples} posterior draws per pair, ties are errors",
        f"risk of the mean reward     {training.mean_reward_errors / n:.4f}",
        f"D(Q||P), a total            {report.kl:,.1f} nats = {report.kl_per_pair:.4g} per pair: {shares}",
        "",
        f"With probability {1 - report.delta:g} the Gibbs risk is at most",
        f"  {'bound':<14}{'value':>10}{'below 1 if D/n <':>20}{'below 1/2 if D/n <':>20}",
    ]
    lines += [
        f"  {name:<14}{bound.at_most:>10.4f}{_affordable(bound.kl_per_pair_below_1):>20}"
        f"{_affordable(bound.kl_per_pair_below_coin):>20}  {_verdict(bound)}"
        for name, bound in report.bounds.items()
    ]
    lines += [
        "",
        f"held-out pairs              m = {heldout.num_pairs:,}, one per prompt; {report.shared_prompts:,} of these "
        "prompts are also in training",
        f"With probability {1 - report.delta:g}, by Clopper-Pearson,",
        f"  one posterior draw        errs on {heldout.first_draw_errors:,}; "
        f"its risk is at most {report.heldout_gibbs_at_most:.4f}",
        f"  the mean reward           errs on {heldout.mean_reward_errors:,}; "
        f"its risk is at most {report.heldout_mean_reward_at_most:.4f}",
        "",
        "What this means",
    ]
    lines += [f"- {sentence}" for sentence in (*_on_the_paper_bound(report), _on_the_certificate(report))]
    return "\n".join(lines)


def _verdict(bound: BoundReport) -> str:
    if bound.vacuous:
        return "vacuous"
    return "better than a coin" if bound.beats_coin else "no better than a coin"


def _affordable(kl_per_pair: float | None) -> str:
    return "any" if kl_per_pair is None else f"{kl_per_pair:.4f}" if kl_per_pair else "none"


def _on_the_paper_bound(report: PacBayesReport) -> list[str]:
    bound, n = report.bounds[PAPER_BOUND], report.training.num_pairs
    if bound.beats_coin:
        sentences = [f"The paper's bound (Eq. 19) of {bound.at_most:.4f} is below a coin's risk of 1/2."]
    elif bound.vacuous:
        sentences = [
            f"The paper's bound (Eq. 19) is vacuous: it promises a risk of at most {bound.at_most:.2f}, and every risk "
            "is at most 1." + _missing("1", bound.kl_per_pair_below_1),
            _growth("1", bound.pairs_below_1, report.kl_per_pair),
        ]
    else:
        sentences = [
            f"The paper's bound (Eq. 19) of {bound.at_most:.4f} promises no more than a coin, whose risk is 1/2."
            + _missing("1/2", bound.kl_per_pair_below_coin),
            _growth("1/2", bound.pairs_below_coin, report.kl_per_pair),
        ]
    if report.bounds["kl_inverse"].vacuous:
        sentences.append(
            "kl_inverse approaches 1 and never exceeds it: its 1.0000 means the same as the others' larger values."
        )
    if report.training.num_prompts < n:
        sentences.append(
            f"All three bounds assume n independent pairs; {n:,} pairs share {report.training.num_prompts:,} prompts."
        )
    return [
        *sentences,
        "No value of these bounds would be a certificate. The encoders that produce Q were fitted to these same pairs, "
        "and R(Q) applies them to pairs they have not seen. The prior over w and z does not account for that fit.",
    ]


def _missing(level: str, kl_per_pair: float | None) -> str:
    if not kl_per_pair:
        return f" At this n and R_hat not even D = 0 would bring it below {level}."
    return f" At this n and R_hat it falls below {level} where D/n is below {kl_per_pair:.4f} nats."


def _growth(level: str, pairs: int | None, kl_per_pair: float) -> str:
    enough = "no number of pairs brings" if pairs is None else f"it takes {pairs:,} pairs to bring"
    return (
        "D is a sum over the training pairs (Eq. 20) and grows as fast as n: "
        f"at {kl_per_pair:.4g} nats per pair {enough} the bound below {level}."
    )


def _on_the_certificate(report: PacBayesReport) -> str:
    if report.shared_prompts:
        return (
            f"The held-out bounds are no certificate either: some held-out prompts ({report.shared_prompts:,}) are "
            "also in training. Split by prompt and measure again."
        )
    return (
        f"What holds is the held-out bound: the mean reward misorders at most {report.heldout_mean_reward_at_most:.1%} "
        f"of pairs like these, at confidence {1 - report.delta:g}, if nothing about the model was chosen by looking at "
        "them."
    )
