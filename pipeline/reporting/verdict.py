"""The verdict that opens a report: a few sentences, each with a level, from the numbers of a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.evaluation.alarms import FAR_KL
from pipeline.evaluation.reasons import LEAST_PAIRS, REASON_PREFIX, TRUSTED_PAIR_ACCURACY, verified_objectives
from pipeline.records import Metrics
from pipeline.reporting.alarm_history import AlarmHistory

Level = Literal["good", "unsure", "bad"]
"""On the page they are green, amber and red."""

OWN_JUDGE = "reward"
"""Prefix of the win rate by the reward model that the policy was trained on."""

JUDGES = {"gold": "the planted truth", "judge": "an independent judge"}
"""Prefix of a win rate -> who judged, in words; any other prefix but OWN_JUDGE is the name of its judge."""

KL_METRIC = "kl/per_response"
"""Nats a response to the start, of the rollouts of PPO. A direct alignment samples nothing and measures none."""

OTHER_LENGTH = 1.5
"""Factor in mean words from which a win rate may be one of length."""

SAME_OPENING = 0.15
"""Growth of the share of answers with one opening from which the policy may have found one answer for all prompts: .01
to .08 in runs whose samples are sound, .20 to .44 in runs that learned to apologise or to refuse (docs/LOG.md)."""

OFTEN_CUT = 0.2
"""Share of responses cut at the length limit from which the penalty for it may be what the policy learns."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of the verdict."""

    level: Level
    text: str
    threshold: str
    """What decides the level."""


REWARD_THRESHOLD = (
    'Green: the 95% interval of the accuracy lies above 50%, and that of its lead over "longer is better" above 0. '
    "Red: the first reaches 50%, or the second lies below 0. Amber: anything else."
)
ODDS_THRESHOLD = f"Amber: the held-out NLL, after calibration, is {math.log(2.0):.3f} (ln 2) or more."
PROMPT_THRESHOLD = (
    "A reward that does not read the prompt prefers a response to it over one to another in half of the cases. "
    "Green: the 95% interval lies above 50%. Amber: it does not."
)
REASONS_THRESHOLD = (
    f"A reason is verified if its score orders {TRUSTED_PAIR_ACCURACY:.0%} of at least {LEAST_PAIRS} held-out pairs as "
    "their annotators do. Green: all are. Red: none is. Amber: some are, or none can be measured."
)
DECISIVE_THRESHOLD = f"Green: {TRUSTED_PAIR_ACCURACY:.0%} or more. Amber: less."
POLICY_THRESHOLD = (
    "Green: the 95% interval of the win rate lies above 50%, by a judge that the policy was not trained on. "
    "Red: it lies below 50%. Amber: it holds 50%, or nobody else judged."
)
FOOLED_THRESHOLD = "Red: the interval by its own rewards lies above 50%, and that of no independent judge does."


def verdict(
    reward: Metrics,
    benchmark: Metrics,
    last_step: Mapping[str, float],
    objectives: Sequence[str],
    alarms: Sequence[AlarmHistory],
) -> list[Finding]:
    """Is the reward usable, are its reasons verified, did the policy improve, and what looks wrong.

    Args:
        reward: held-out metrics of the reward model; empty without one.
        benchmark: win rates and means of `compare_answers`.
        last_step: metrics of the last step of the alignment; empty if there was none.
        alarms: those that the reward model and the alignment checked.
    """
    return [
        *(reward_findings(reward) if reward else []),
        *prompt_findings(reward),
        *(reason_findings(reward, objectives) if reward else []),
        *policy_findings(benchmark, last_step, own="its own reward model" if reward else "its own rewards"),
        *alarm_findings(alarms),
    ]


def reward_findings(reward: Metrics) -> list[Finding]:
    """Whether the reward orders held-out pairs better than a coin and than length, and whether to trust its odds."""
    share, by_length = f"{reward['eval/accuracy']:.1%}", f"{reward['eval/longer_is_better']:.1%}"
    findings = []
    if "eval/accuracy_low" not in reward:
        findings.append(
            _unsure(
                f"It is not known whether the reward is usable: it orders {share} of the pairs of one prompt right.",
                REWARD_THRESHOLD,
            )
        )
    else:
        low, high = reward["eval/accuracy_low"], reward["eval/accuracy_high"]
        right = f"it orders {share} {_interval(low, high)} of {reward['data/heldout_pairs']:.0f} held-out pairs right"
        if low <= 0.5:
            findings.append(_bad(f"The reward is not usable: {right}, and a coin orders 50%.", REWARD_THRESHOLD))
        elif reward["eval/accuracy_over_length_high"] < 0:
            text = f'The reward is not usable: {right}, and "longer is better" more, {by_length}.'
            findings.append(_bad(text, REWARD_THRESHOLD))
        elif reward["eval/accuracy_over_length_low"] <= 0:
            findings.append(
                _unsure(
                    f"It is not known whether the reward is usable: {right}. A coin orders fewer, but these pairs do "
                    f'not tell the reward from "longer is better", which orders {by_length}.',
                    REWARD_THRESHOLD,
                )
            )
        else:
            text = f'The reward is usable: {right}, and "longer is better" only {by_length}.'
            findings.append(_good(text, REWARD_THRESHOLD))
    # What a user is told are calibrated probabilities; too few held-out pairs leave them uncalibrated.
    nll = reward.get("eval/calibrated_nll", reward["eval/nll"])
    if nll >= math.log(2.0):
        findings.append(
            _unsure(
                f"Use the order of its rewards, not its probabilities: their NLL of {nll:.2f} is no "
                "better than that of a coin, 0.69.",
                ODDS_THRESHOLD,
            )
        )
    return findings


def prompt_findings(reward: Metrics) -> list[Finding]:
    """Whether the reward prefers the response to the prompt over one to another; none where that was not measured."""
    if "eval/mismatched_accuracy" not in reward:
        return []
    low, high = reward["eval/mismatched_accuracy_low"], reward["eval/mismatched_accuracy_high"]
    share = f"{reward['eval/mismatched_accuracy']:.1%} {_interval(low, high)}"
    if low > 0.5:
        text = (
            f"The reward reads the prompt: the response chosen for it beats one chosen for another in {share} of cases."
        )
        return [_good(text, PROMPT_THRESHOLD)]
    return [
        _unsure(
            f"It is not known whether the reward reads the prompt: the response chosen for it beats one chosen for "
            f"another in {share} of cases. If it does not read it, one answer, such as an apology, can please it for "
            "every prompt. Set mismatched_pairs of the sources.",
            PROMPT_THRESHOLD,
        )
    ]


def reason_findings(reward: Metrics, objectives: Sequence[str]) -> list[Finding]:
    """For which objectives the scores agree with held-out annotations, and whether named reasons are the true ones."""
    measured = [name for name in objectives if f"{REASON_PREFIX}{name}/pair_accuracy" in reward]
    for is_missing, text in (
        (
            f"{REASON_PREFIX}collinearity" not in reward,
            "The reward gives no reasons: this head has no objective scores.",
        ),
        (not measured, "Its reasons cannot be verified: no held-out pair is annotated on both sides."),
        (
            "eval/scale" not in reward,
            "The reward gives no reasons: it is no sum over the objectives whose annotations it predicts.",
        ),
    ):
        if is_missing:
            return [_unsure(text, REASONS_THRESHOLD)]
    verified = verified_objectives(reward, objectives)
    others = [_fidelity(reward, name) if name in measured else name for name in objectives if name not in verified]
    told = ", ".join(_fidelity(reward, name) for name in verified)
    bound = f"{TRUSTED_PAIR_ACCURACY:.0%} of at least {LEAST_PAIRS} pairs"
    if not verified:
        text = f"The model cannot tell why: no score agrees with annotators on {bound}: {', '.join(others)}."
        finding = _bad(text, REASONS_THRESHOLD)
    elif others:
        text = (
            f"Its reasons are verified for {told}. For {', '.join(others)} the model cannot tell: a reason needs "
            f"agreement with the annotators on {bound}."
        )
        finding = _unsure(text, REASONS_THRESHOLD)
    else:
        text = f"Its reasons are verified for every objective: {told} of held-out pairs ordered as annotated."
        finding = _good(text, REASONS_THRESHOLD)
    return [finding, *_decisive_finding(reward)]


def policy_findings(
    benchmark: Metrics, last_step: Mapping[str, float], *, own: str = "its own reward model"
) -> list[Finding]:
    """Whether the policy beats its start, by whose judgement, how far it went, and what else may explain it.

    Args:
        own: what the policy was trained on, in words.
    """
    judges = [key.removesuffix("/win_rate") for key in benchmark if key.endswith("/win_rate")]
    # A judge with a source behind it is the same judge on a part of the prompts.
    independent = [judge for judge in judges if judge != OWN_JUDGE and "/" not in judge]
    context = _distance(benchmark, last_step)
    findings = [_judged_finding(benchmark, judge, context) for judge in independent]
    by_own = _win_rate_text(benchmark, OWN_JUDGE, own)
    if not independent:
        findings.append(_own_finding(benchmark, own, f"{by_own}; {context}"))
    elif benchmark[f"{OWN_JUDGE}/low"] > 0.5 and all(finding.level != "good" for finding in findings):
        findings.append(
            _bad(
                f"{own.capitalize()} sees an improvement that the others do not: {by_own}. The policy may fool it. "
                "Raise alignment.kl.coefficient, or stop earlier.",
                FOOLED_THRESHOLD,
            )
        )
    return findings + _side_effects(benchmark, last_step)


def alarm_findings(alarms: Sequence[AlarmHistory]) -> list[Finding]:
    """One sentence for each alarm that the finished reward model or policy raises, or that there is none.

    An alarm is a reason to look, not a verdict.
    """
    raised = [
        _unsure(f"Look at this: {alarm.message}", f"Amber: {alarm.raised_when}.") for alarm in alarms if alarm.is_raised
    ]
    if raised or not alarms:
        return raised
    earlier = ", ".join(f"{alarm.name} ({alarm.times})" for alarm in alarms if alarm.raised_at)
    text = f"Nothing looks wrong: none of {len(alarms)} alarms is raised"
    text += f" at the end. During training there were {earlier}." if earlier else "."
    return [_good(text, "Green: no alarm is raised at the end. The thresholds are those of the table of alarms.")]


# ----------------------------------------------------------------------------- parts


def _decisive_finding(reward: Metrics) -> list[Finding]:
    accuracy = reward.get(f"{REASON_PREFIX}decisive_accuracy")
    if accuracy is None:
        return []
    text = (
        f"The truth is known here: of {reward[f'{REASON_PREFIX}decisive_pairs']:.0f} pairs with a named reason, the "
        f"objective named as decisive is the true one in {accuracy:.0%}."
    )
    return [(_good if accuracy >= TRUSTED_PAIR_ACCURACY else _unsure)(text, DECISIVE_THRESHOLD)]


def _judged_finding(benchmark: Metrics, judge: str, context: str) -> Finding:
    told = f"{_win_rate_text(benchmark, judge)}; {context}."
    if benchmark[f"{judge}/low"] > 0.5:
        return _good(f"The policy improved: {told}", POLICY_THRESHOLD)
    if benchmark[f"{judge}/high"] < 0.5:
        return _bad(f"The policy got worse: {told}", POLICY_THRESHOLD)
    return _unsure(f"It is not known whether the policy improved: {told} The interval holds 50%.", POLICY_THRESHOLD)


def _own_finding(benchmark: Metrics, own: str, told: str) -> Finding:
    """What the rewards that the policy was trained on say, where nobody else judged."""
    if benchmark[f"{OWN_JUDGE}/low"] > 0.5:
        text = (
            f"The policy pleases {own} more than its start does: {told}. It was trained to do that, "
            "and nobody else judged, so that is no proof of an improvement."
        )
        return _unsure(text, POLICY_THRESHOLD)
    if benchmark[f"{OWN_JUDGE}/high"] < 0.5:
        return _bad(f"The policy got worse: even {told}.", POLICY_THRESHOLD)
    text = f"It is not known whether the policy improved: even {told}. The interval holds 50%."
    return _unsure(text, POLICY_THRESHOLD)


def _side_effects(benchmark: Metrics, last_step: Mapping[str, float]) -> list[Finding]:
    findings = []
    # That of rollouts has an alarm.
    kl, stopped = last_step.get("eval/kl", 0.0), last_step.get("response/stopped", 1.0)
    if kl > FAR_KL:
        findings.append(
            _unsure(
                f"The policy is far from its start, {kl:.1f} nats a response: read the samples, and raise "
                "alignment.kl.coefficient if they are odd.",
                f"Amber: the KL of held-out prompts is above {FAR_KL:g} nats a response.",
            )
        )
    if not 1 / OTHER_LENGTH < benchmark["words/aligned"] / benchmark["words/base"] < OTHER_LENGTH:
        findings.append(
            _unsure(
                "The length of its answers changed much, so the win rate may be one of length: read the samples.",
                f"Amber: one policy writes {OTHER_LENGTH:g} times as many words as the other, or more.",
            )
        )
    opening, opening_before = benchmark["opening/aligned"], benchmark["opening/base"]
    if opening - opening_before > SAME_OPENING:
        findings.append(
            _unsure(
                f"{opening:.0%} of its answers begin with the same words, {opening_before:.0%} did before: it may have "
                "found one answer that pleases for every prompt. Read the samples.",
                f"Amber: the share of the commonest opening has grown by more than {SAME_OPENING:.0%} of all answers.",
            )
        )
    if 1.0 - stopped > OFTEN_CUT:
        findings.append(
            _unsure(
                f"{1.0 - stopped:.0%} of the last responses were cut at the length limit, so rewards are of unfinished "
                "answers. Raise alignment.max_response_tokens.",
                f"Amber: more than {OFTEN_CUT:.0%} were cut.",
            )
        )
    return findings


def _distance(benchmark: Metrics, last_step: Mapping[str, float]) -> str:
    kl = _kl(last_step)
    nats = "" if kl is None else f"KL {kl:.1f} nats a response, "
    return f"{nats}{benchmark['words/base']:.0f} words an answer before and {benchmark['words/aligned']:.0f} after"


def _kl(last_step: Mapping[str, float]) -> float | None:
    return last_step.get(KL_METRIC)


def _win_rate_text(benchmark: Metrics, judge: str, who: str | None = None) -> str:
    rate, low, high = (benchmark[f"{judge}/{name}"] for name in ("win_rate", "low", "high"))
    return f"by {who or JUDGES.get(judge, judge)} it wins {rate:.1%} {_interval(low, high)} against its start"


def _fidelity(reward: Metrics, objective: str) -> str:
    share, pairs = (reward[f"{REASON_PREFIX}{objective}/{name}"] for name in ("pair_accuracy", "pairs"))
    return f"{objective} ({share:.0%} of {pairs:.0f})"


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _good(text: str, threshold: str) -> Finding:
    return Finding(level="good", text=text, threshold=threshold)


def _unsure(text: str, threshold: str) -> Finding:
    return Finding(level="unsure", text=text, threshold=threshold)


def _bad(text: str, threshold: str) -> Finding:
    return Finding(level="bad", text=text, threshold=threshold)
