"""The page of a reward model on the Hugging Face hub: data, objectives, fidelity, metrics, limits, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config.models import PACKAGE_SCHEME
from pipeline.evaluation.alarms import alarm_messages
from pipeline.evaluation.reasons import LEAST_PAIRS, REASON_PREFIX, TRUSTED_PAIR_ACCURACY, reasons_of_model
from pipeline.evaluation.win_rate import wilson_interval
from pipeline.models.checkpoint_files import HUB_NAME
from pipeline.models.reward_model_card import RewardModelCard
from pipeline.records import Metrics

PAPER = "arXiv 2603.04974"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """What is known of a reward model when its page is written."""

    repo: str
    card: RewardModelCard
    config: Mapping[str, Any]
    """The part of the recipe that the training stage read; empty for a checkpoint without its manifest."""
    metrics: Metrics
    """Held-out metrics, with the sizes of the data where the manifest is there."""
    licence: str | None
    """An identifier of the hub, such as apache-2.0; None where the publisher names none."""


def model_card(model: PublishedModel) -> str:
    """Markdown with the metadata of the hub in front. Every number is one of the checkpoint's card or manifest."""
    sections = {
        "Data": _data(model),
        "Objectives": _objectives(model),
        "Held-out metrics": _metrics(model),
        "Use": _use(model),
        "Limits": _limits(model),
        "Licence": [model.licence or "The publisher has named no licence. Ask before you use this model."],
    }
    parts = [_metadata(model), f"# {model.repo.rpartition('/')[2]}", _introduction(model.card)]
    for title, lines in sections.items():
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _metadata(model: PublishedModel) -> str:
    backbone = _backbone(model)
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    values["tags"] = ["reward-model", "rlhf", model.card.head]
    if model.licence:
        values["license"] = model.licence
    if backbone and HUB_NAME.fullmatch(backbone):
        values["base_model"] = backbone
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _introduction(card: RewardModelCard) -> str:
    kind = f"variational reward model ({PAPER})" if card.head == "vrm" else f"reward model with a {card.head!r} head"
    return (
        f"A {kind} of VRM pipeline. It scores the response of an assistant to a conversation of at most "
        f"{card.max_length:,} tokens. A difference of two rewards of one prompt is a log-odds of preference, before "
        "calibration. A single reward means nothing."
    )


def _backbone(model: PublishedModel) -> str | None:
    return model.config.get("reward", {}).get("backbone")


def _data(model: PublishedModel) -> list[str]:
    if not model.config:
        return ["The manifest of the training was not beside the checkpoint: its data are not known here."]
    sources = model.config["data"]["sources"]
    lines = []
    if not sources:
        lines.append(
            f"The planted world of VRM pipeline, a made-up world with known truth: "
            f"{_count(model.metrics.get('data/train_pairs'))} pairs to train on, "
            f"{_count(model.metrics.get('data/heldout_pairs'))} held out."
        )
    for source in sources:
        place = source["hub"] or source["path"].rpartition("/")[2]
        counts = [
            f"{model.metrics[key]:,.0f} pairs {words}"
            for split, words in (("train", "to train on"), ("heldout", "held out"))
            if (key := f"data/source/{source['name']}/{split}_pairs") in model.metrics
        ]
        lines.append(f"- {source['name']} (`{place}`, format {source['format']}): {', '.join(counts) or 'no counts'}")
    backbone = _backbone(model)
    lines += ["", f"The backbone is {_named(backbone)}." if backbone else "The backbone is the policy of the same run."]
    return lines


def _named(backbone: str) -> str:
    # A path says nothing to a reader, and may say too much of the machine that trained.
    if backbone.startswith(PACKAGE_SCHEME) or HUB_NAME.fullmatch(backbone):
        return f"`{backbone}`"
    return "a checkpoint in a directory of the machine that trained"


def _objectives(model: PublishedModel) -> list[str]:
    card, metrics = model.card, model.metrics
    verified = reasons_of_model(card)
    lines = ["| objective | orders held-out pairs as annotated | pairs | is a reason |", "| --- | --- | --- | --- |"]
    for name in card.objectives:
        share, pairs = (metrics.get(f"{REASON_PREFIX}{name}/{key}") for key in ("pair_accuracy", "pairs"))
        if share is None or pairs is None:
            lines.append(f"| {name} | not measured | 0 | no |")
        else:
            interval = _percent(share, *wilson_interval(share, pairs))
            lines.append(f"| {name} | {interval} | {pairs:.0f} | {'yes' if name in verified else 'no'} |")
    return [
        *lines,
        "",
        f"A score is a reason where it orders at least {TRUSTED_PAIR_ACCURACY:.0%} of at least {LEAST_PAIRS} held-out "
        "pairs as their annotators do. Do not show the others as reasons.",
    ]


def _metrics(model: PublishedModel) -> list[str]:
    metrics = model.metrics
    lines = ["| held-out pairs | accuracy | pairs |", "| --- | --- | --- |"]
    lines.append(f"| all | {_accuracy(metrics, 'eval')} | {_count(metrics.get('data/heldout_pairs'))} |")
    prefixes = [key.removesuffix("/accuracy") for key in metrics if key.startswith("eval/source/")]
    for prefix in (key for key in dict.fromkeys(prefixes) if f"{key}/accuracy" in metrics):
        name = prefix.removeprefix("eval/source/")
        lines.append(f"| {name} | {_accuracy(metrics, prefix)} | {_count(metrics.get(f'{prefix}/pairs'))} |")
    others = [
        f"- {words}: {metrics[key]:.3f}"
        for key, words in (
            ("eval/longer_is_better", 'share of pairs that "longer is better" orders right'),
            ("eval/mismatched_accuracy", "share of chosen responses that beat one chosen for another prompt"),
            ("eval/nll", "negative log-likelihood of the preferences, nats (a coin: 0.693)"),
            ("eval/ece_uncalibrated", "calibration error of P(chosen is better), before calibration"),
            ("eval/ece", "the same, after calibration"),
            ("eval/scale", "learned scale: units of the reward per standard deviation of the annotations"),
        )
        if key in metrics
    ]
    others.append(f"- temperature of the log-odds, fitted on held-out pairs: {model.card.calibration.temperature:.3f}")
    return [*lines, "", "Brackets are 95% intervals.", "", *others]


def _accuracy(metrics: Metrics, prefix: str) -> str:
    share = metrics.get(f"{prefix}/accuracy")
    if share is None:
        return "not measured"
    bounds = [metrics.get(f"{prefix}/accuracy_{side}") for side in ("low", "high")]
    low, high = bounds
    return f"{share:.1%}" if low is None or high is None else _percent(share, low, high)


def _percent(share: float, low: float, high: float) -> str:
    return f"{share:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _use(model: PublishedModel) -> list[str]:
    return [
        "```python",
        "from huggingface_hub import snapshot_download",
        "import vrm",
        "",
        f"reward = vrm.load_reward_model(snapshot_download({json.dumps(model.repo)}))",
        'print(reward.score("Plan my week.", ["First list what is fixed. Then fill the gaps.", "No."]))',
        "```",
        "",
        "With transformers alone it is an `AutoModelForSequenceClassification` that needs `trust_remote_code=True`.",
    ]


def _limits(model: PublishedModel) -> list[str]:
    return [f"- {sentence}" for sentence in _limit_sentences(model.card, model.metrics)]


def _limit_sentences(card: RewardModelCard, metrics: Metrics) -> Iterator[str]:
    yield f"What exceeds {card.max_length:,} tokens is cut: of a prompt the beginning, of a response the end."
    yield "The numbers above hold for pairs like the held-out ones. Other languages and subjects were not measured."
    yield from _unverified(card)
    low = metrics.get("eval/accuracy_low")
    if low is not None and low <= 0.5:
        yield "Its accuracy cannot be told from that of a coin: do not train on it."
    if card.calibration.answer_threshold is None:
        yield "No comparison is confident enough to promise an error rate."
    else:
        yield f"Of its confident comparisons at most {card.calibration.answer_error:.0%} are wrong, for such pairs."
    yield "A policy that is trained on a reward learns its mistakes. Judge the policy by another model or by people."
    are_pairs_scored = any(key.startswith(REASON_PREFIX) and key.endswith("/pairs") for key in metrics)
    yield from alarm_messages(metrics, are_pairs_scored=are_pairs_scored)


def _unverified(card: RewardModelCard) -> Iterator[str]:
    others = [name for name in card.objectives if name not in reasons_of_model(card)]
    if others:
        yield f"It cannot tell why where the reason would be {', '.join(others)}."
