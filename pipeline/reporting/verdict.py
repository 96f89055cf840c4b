"""The verdict that opens a report: a few sentences, each with a level, from the numbers of a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.evaluation.alarms import DIRECT_ALARMS, FAR_KL, POLICY_ALARMS, alarm_messages
from pipeline.evaluation.reasons import REASON_PREFIX, TRUSTED_PAIR_ACCURACY, verified_objectives
from pipeline.records import Metrics
from pipeline.tracking.alarm_names import ALARM_PREFIX

Level = Literal["good", "unsure", "bad"]

OWN_JUDGE = "reward"
"""Prefix of the win rate by the reward model that the policy was trained on."""

JUDGES = {"gold": "the planted truth", "judge": "an independent judge"}
"""Prefix of a win rate -> who judged, in words; any other prefix but OWN_JUDGE is the name of its judge."""

KL_METRIC = "kl/per_response"
"""Nats a response to the start, of the rollouts of PPO. A direct alignment samples nothing and measures none."""

OTHER_LENGTH = 1.5
"""Factor in mean words from which a win rate may be one of length."""

OFTEN_CUT = 0.2
"""Share of responses cut at the length limit from which the penalty for it may be what the policy learns."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of the verdict."""

    level: Level
    text: str


def verdict(
    reward: Metrics, benchmark: Metrics, last_step: Mapping[str, float], objectives: Sequence[str]
) -> list[Finding]:
    """Is the reward usable, are its reasons verified, did the policy improve, and what looks wrong.

    Args:
        reward: held-out metrics of the reward model; empty without one.
        benchmark: win rates and means of `compare_answers`.
        last_step: metrics of the last step of the alignment; empty if there was none.
    """
    return [
        *(reward_findings(reward) if reward else []),
        *(reason_findings(reward, objectives) if reward else []),
        *policy_findings(benchmark, last_step, own="its own reward model" if reward else "its own rewards"),
        *alarm_findings(reward, last_step),
    ]


def reward_findings(reward: Metrics) -> list[Finding]:
    """Whether the reward orders held-out pairs better than a coin and than length, and whether to trust its odds."""
    share, by_length = f"{reward['eval/accuracy']:.1%}", f"{reward['eval/longer_is_better']:.1%}"
    findings = []
    if "eval/accuracy_low" not in reward:
        findings.append(
            _unsure(
                f"It is not known whether the reward is usable: it orders {share} of the pairs of one prompt right."
            )
        )
    else:
        low, high = reward["eval/accuracy_low"], reward["eval/accuracy_high"]
        right = f"it orders {share} {_interval(low, high)} of {reward['data/heldout_pairs']:.0f} held-out pairs right"
        if low <= 0.5:
            findings.append(_bad(f"The reward is not usable: {right}, and a coin orders 50%."))
        elif reward["eval/accuracy_over_length_high"] < 0:
            findings.append(_bad(f'The reward is not usable: {right}, and "longer is better" more, {by_length}.'))
        elif reward["eval/accuracy_over_length_low"] <= 0:
            findings.append(
                _unsure(
                    f"It is not known whether the reward is usable: {right}. A coin orders fewer, but these pairs do "
                    f'not tell the reward from "longer is better", which orders {by_length}.'
                )
            )
        else:
            findings.append(_good(f'The reward is usable: {right}, and "longer is better" only {by_length}.'))
    if reward["eval/nll"] >= math.log(2.0):
        findings.append(
            _unsure(
                f"Use the order of its rewards, not its probabilities: their NLL of {reward['eval/nll']:.2f} is no "
                "better than that of a coin, 0.69."
            )
        )
    return findings


def reason_findings(reward: Metrics, objectives: Sequence[str]) -> list[Finding]:
    """For which objectives the scores agree with held-out annotations, and whether named reasons are the true ones."""
    if f"{REASON_PREFIX}collinearity" not in reward:
        return [_unsure("The reward gives no reasons: this head has no objective scores.")]
    measured = [name for name in objectives if f"{REASON_PREFIX}{name}/pair_accuracy" in reward]
    if not measured:
        return [_unsure("Its reasons cannot be verified: no held-out pair is annotated on both sides.")]
    if "eval/scale" not in reward:
        return [_unsure("The reward gives no reasons: it is no sum over the objectives whose annotations it predicts.")]
    verified = [name for name in measured if name in verified_objectives(reward, objectives)]
    others = [_fidelity(reward, name) if name in measured else name for name in objectives if name not in verified]
    told = ", ".join(_fidelity(reward, name) for name in verified)
    bound = f"{TRUSTED_PAIR_ACCURACY:.0%} of the pairs"
    if not verified:
        findings = [
            _bad(f"The model cannot tell why: no score agrees with annotators on {bound}: {', '.join(others)}.")
        ]
    elif others:
        findings = [
            _unsure(
                f"Its reasons are verified for {told}. For {', '.join(others)} the model cannot tell: a reason needs "
                f"agreement with the annotators on {bound}."
            )
        ]
    else:
        findings = [
            _good(f"Its reasons are verified for every objective: {told} of held-out pairs ordered as annotated.")
        ]
    return findings + _decisive_finding(reward)


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
        if benchmark[f"{OWN_JUDGE}/low"] > 0.5:
            findings.append(
                _unsure(
                    f"The policy pleases {own} more than its start does: {by_own}; {context}. It was "
                    "trained to do that, and nobody else judged, so that is no proof of an improvement."
                )
            )
        elif benchmark[f"{OWN_JUDGE}/high"] < 0.5:
            findings.append(_bad(f"The policy got worse: even {by_own}; {context}."))
        else:
            findings.append(
                _unsure(
                    f"It is not known whether the policy improved: even {by_own}; {context}. The interval holds 50%."
                )
            )
    elif benchmark[f"{OWN_JUDGE}/low"] > 0.5 and all(finding.level != "good" for finding in findings):
        findings.append(
            _bad(
                f"{own.capitalize()} sees an improvement that the others do not: {by_own}. The policy may fool it. "
                "Raise alignment.kl.coefficient, or stop earlier."
            )
        )
    return findings + _side_effects(benchmark, last_step)


def alarm_findings(reward: Metrics, last_step: Mapping[str, float]) -> list[Finding]:
    """One sentence for each alarm of the reward model and of the last step, or that there is none.

    An alarm is a reason to look, not a verdict.
    """
    are_pairs_scored = any(name.startswith(REASON_PREFIX) and name.endswith("/pairs") for name in reward)
    messages = [
        *alarm_messages(reward, are_pairs_scored=are_pairs_scored),
        *alarm_messages(last_step, (*POLICY_ALARMS, *DIRECT_ALARMS), are_pairs_scored=are_pairs_scored),
    ]
    raised = [_unsure(f"Look at this: {message}") for message in messages]
    checked = sum(name.startswith(ALARM_PREFIX) for name in (*reward, *last_step))
    return raised or [_good(f"Nothing looks wrong: none of {checked} alarms is raised.")] if checked else []


# ----------------------------------------------------------------------------- parts


def _decisive_finding(reward: Metrics) -> list[Finding]:
    accuracy = reward.get(f"{REASON_PREFIX}decisive_accuracy")
    if accuracy is None:
        return []
    text = (
        f"The truth is known here: of {reward[f'{REASON_PREFIX}decisive_pairs']:.0f} pairs with a named reason, the "
        f"objective named as decisive is the true one in {accuracy:.0%}."
    )
    return [_good(text) if accuracy >= TRUSTED_PAIR_ACCURACY else _unsure(text)]


def _judged_finding(benchmark: Metrics, judge: str, context: str) -> Finding:
    told = f"{_win_rate_text(benchmark, judge)}; {context}."
    if benchmark[f"{judge}/low"] > 0.5:
        return _good(f"The policy improved: {told}")
    if benchmark[f"{judge}/high"] < 0.5:
        return _bad(f"The policy got worse: {told}")
    return _unsure(f"It is not known whether the policy improved: {told} The interval holds 50%.")


def _side_effects(benchmark: Metrics, last_step: Mapping[str, float]) -> list[Finding]:
    findings = []
    # That of rollouts has an alarm.
    kl, stopped = last_step.get("eval/kl", 0.0), last_step.get("response/stopped", 1.0)
    if kl > FAR_KL:
        findings.append(
            _unsure(
                f"The policy is far from its start, {kl:.1f} nats a response: read the samples, and raise "
                "alignment.kl.coefficient if they are odd."
            )
        )
    if not 1 / OTHER_LENGTH < benchmark["words/aligned"] / benchmark["words/base"] < OTHER_LENGTH:
        findings.append(
            _unsure("The length of its answers changed much, so the win rate may be one of length: read the samples.")
        )
    if 1.0 - stopped > OFTEN_CUT:
        findings.append(
            _unsure(
                f"{1.0 - stopped:.0%} of the last responses were cut at the length limit, so rewards are of unfinished "
                "answers. Raise alignment.max_response_tokens."
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


def _good(text: str) -> Finding:
    return Finding(level="good", text=text)


def _unsure(text: str) -> Finding:
    return Finding(level="unsure", text=text)


def _bad(text: str) -> Finding:
    return Finding(level="bad", text=text)
