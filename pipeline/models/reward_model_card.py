"""What a reward-model checkpoint says of itself, readable without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipeline.config.base import Frozen
from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import CheckpointError

CARD_FILE = "reward_model.json"

HeadKind = Literal["vrm", "gate", "regression", "bt", "bt_aux", "ensemble"]


class RewardCalibration(Frozen):
    """What held-out pairs say of margins and error bars (`RewardTrainer.calibrate`; docs/method.md section 7)."""

    temperature: float = 1.0
    """T: log-odds are margin / sqrt(T^2 + pi/8 Var[margin])."""
    variance_factor: float = 1.0
    """Factor of the Laplace variances; the stored draws contain it."""
    prior_precision: float = 0.0
    """Of the last layer's weights; 0 for an ensemble, whose members are the draws."""
    posterior_std: float = 0.0
    """Mean standard deviation of the reward of a held-out response; 0 where it was never fitted."""
    answer_threshold: float | None = None
    """Least |log-odds| of a confident answer; None where no answer is."""
    answer_error: float = 0.1
    """Share of confident answers that may be wrong."""
    answer_delta: float = 0.1
    """Probability, over the calibration pairs, that the threshold breaks that promise."""


class SourceScale(Frozen):
    """On which scale the annotators of one source scored each objective, over its training responses."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: tuple[int, ...]
    """Annotated responses; 0 where the source does not annotate the objective."""


class RewardModelCard(Frozen):
    """Describes a reward-model checkpoint: its head, its objectives, the scales of scores and reward, its metrics."""

    head: HeadKind
    vrm: VRMHeadConfig
    """Sizes of the vrm and the gate head; decoder and parameterisation of the vrm head."""
    objectives: tuple[str, ...]
    max_length: int
    score_mean: tuple[float, ...]
    """Mean annotated score per objective over the training split of the source in `score_scale_of`, whose scale a
    person is shown; empty without annotations."""
    score_std: tuple[float, ...]
    reward_mean: float
    """Mean posterior-mean reward over held-out chosen and rejected responses."""
    reward_std: float
    metrics: dict[str, float]
    """Held-out metrics at the end of training."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the objectives in the reward of a regression head; empty is the mean."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """Size and combination of an ensemble."""
    calibration: RewardCalibration = RewardCalibration()
    score_scale_of: tuple[str, ...] = ()
    """For each objective the source with most annotations."""
    score_statistics: dict[str, SourceScale] = Field(default_factory=dict)
    """Source -> the scale of its annotators: training standardised each source's scores by its own."""
    pooling: Literal["last", "mean"] = "last"
    """What the head reads of a response: the state of its last token, or the mean over its tokens."""
    scale: float = 1.0
    """tau: the reward's units per standard deviation of the annotations; 1 where none was learned."""
    mean_contributions: tuple[float, ...] = ()
    """Mean over the same responses of weight * score, for each objective; they add up to `reward_mean`. Empty where the
    reward is no sum over objectives."""


def read_card(directory: str) -> RewardModelCard:
    """The card of a checkpoint; CheckpointError when there is none or it cannot be read."""
    path = Path(directory) / CARD_FILE
    try:
        return RewardModelCard.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} holds no {CARD_FILE}: it is no reward model. Give the result directory of train_reward_model."
        ) from error
    except ValidationError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. It was written by another version, or edited."
        ) from error


def require_posterior(card: RewardModelCard, place: str) -> None:
    """Checks that the reward model is a VRM.

    Raises:
        CheckpointError: the model has no posterior to bound.
    """
    if card.head != "vrm":
        raise CheckpointError(
            f"{place} has a {card.head!r} head, and no posterior to bound. "
            "Give the result of a run with reward.head=vrm."
        )
