"""The learners of `pipeline.learning.builders` on DeepSpeed ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.rank_group import RankGroup
from actors.ranked_learner import RankedDirectLearner, RankedLearner
from cluster.placement import Placement
from pipeline.config.cluster import DeadlinesConfig, RanksConfig
from pipeline.learning import builders
from pipeline.learning.builders import DirectTrainerSpec, PPOLearnerSpec, RewardTrainerSpec, SFTTrainerSpec

if TYPE_CHECKING:
    import torch

    from pipeline.learning.direct_trainer import DirectAlignmentTrainer
    from pipeline.learning.ppo_learner import PPOLearner
    from pipeline.learning.reward_trainer import RewardTrainer
    from pipeline.learning.sft_trainer import SFTTrainer

# ------------------------------------------------------------------ run on every rank


def deepspeed_sft_trainer(spec: SFTTrainerSpec, ranks: RanksConfig, device: torch.device) -> SFTTrainer:
    from actors.deepspeed_engine import DeepSpeedEngine, shards_of

    make_engine = partial(DeepSpeedEngine, ranks=ranks, device=device)
    return builders.build_sft_trainer(spec, make_engine, shards_of(ranks, device))


def deepspeed_reward_trainer(spec: RewardTrainerSpec, ranks: RanksConfig, device: torch.device) -> RewardTrainer:
    from actors.deepspeed_engine import DeepSpeedEngine, shards_of

    make_engine = partial(DeepSpeedEngine, ranks=ranks, device=device)
    return builders.build_reward_trainer(spec, make_engine, shards_of(ranks, device))


def deepspeed_ppo_learner(spec: PPOLearnerSpec, ranks: RanksConfig, device: torch.device) -> PPOLearner:
    from actors.deepspeed_engine import DeepSpeedEngine, sharded_reference, shards_of

    return builders.build_ppo_learner(
        spec,
        partial(DeepSpeedEngine, ranks=ranks, device=device),
        partial(sharded_reference, ranks=ranks, dtype=spec.dtype, device=device),
        shards_of(ranks, device),
    )


def deepspeed_direct_trainer(
    spec: DirectTrainerSpec, ranks: RanksConfig, device: torch.device
) -> DirectAlignmentTrainer:
    from actors.deepspeed_engine import DeepSpeedEngine, shards_of

    make_engine = partial(DeepSpeedEngine, ranks=ranks, device=device)
    return builders.build_direct_trainer(spec, make_engine, shards_of(ranks, device))


# ------------------------------------------------------------------ runs in the job


@contextmanager
def open_ranked_learner(
    name: str, build: Callable[..., Any], ranks: RanksConfig, deadlines: DeadlinesConfig, spec: Any
) -> Iterator[RankedLearner]:
    """Ranks that each hold the learner of `spec`, as one learner; they end with the block.

    Args:
        name: names the group in messages.
        build: one of the functions above.
    """
    with RankGroup(name, ranks, start_s=deadlines.start_s) as group:
        group.build(build, spec, ranks)
        yield RankedLearner(group, deadlines)


@contextmanager
def open_ranked_direct_learner(
    ranks: RanksConfig, deadlines: DeadlinesConfig, spec: DirectTrainerSpec, *, placement: Placement | None = None
) -> Iterator[RankedDirectLearner]:
    """Ranks that each hold the trainer of `spec`, as one learner; they end with the block.

    Args:
        placement: GPUs that the ranks share with engines, where there are some.
    """
    with RankGroup("direct alignment", ranks, start_s=deadlines.start_s, placement=placement) as group:
        group.build(deepspeed_direct_trainer, spec, ranks)
        yield RankedDirectLearner(group, deadlines)
