"""Supervised fine-tuning of a policy, one rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.learning.engine import TrainEngine
from pipeline.learning.memory import peak_memory
from pipeline.learning.micro_batches import MicroBatch, Sums, own_micro_batches
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.training_state import TrainingStatePart
from pipeline.models.backbone import write_causal_lm
from pipeline.models.packing import pack
from pipeline.records import Metrics, PromptGroup


class SFTTrainer:
    """Minimises the mean negative log-likelihood of response tokens. Implements `Learner[Sequence[PromptGroup]]`.

    The engine's module is a `Policy`.
    """

    def __init__(
        self,
        engine: TrainEngine,
        *,
        model_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        num_steps: int,
        warmup_fraction: float,
        max_tokens_per_micro_batch: int,
    ) -> None:
        self.engine = engine
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.num_steps = num_steps
        self.warmup_fraction = warmup_fraction
        self.max_tokens = max_tokens_per_micro_batch

    def restore(self, checkpoint: str) -> None:
        self.engine.load(checkpoint)

    def update(self, batch: Sequence[PromptGroup], step: int) -> Metrics:
        self.engine.module.train()
        num_tokens = _num_response_tokens(batch)
        sums = Sums()
        for micro in own_micro_batches(batch, self.engine, self.max_tokens):
            nll = self._nll_sum(batch, micro)
            self.engine.backward(micro.weight * nll / num_tokens, last=micro.last)
            sums.add(micro.weight, nll=nll)
        factor = learning_rate_factor(step, num_steps=self.num_steps, warmup_fraction=self.warmup_fraction)
        grad_norm = self.engine.step(factor)
        nll_sum = float(sums.over_ranks(self.engine)["nll"])
        return {"train/nll": nll_sum / num_tokens, "grad_norm": grad_norm, "tokens": float(num_tokens)}

    def evaluate(self, batch: Sequence[PromptGroup]) -> Metrics:
        self.engine.module.eval()
        sums = Sums()
        with torch.no_grad():
            for micro in own_micro_batches(batch, self.engine, self.max_tokens):
                sums.add(micro.weight, nll=self._nll_sum(batch, micro))
        return {"eval/nll": float(sums.over_ranks(self.engine)["nll"]) / _num_response_tokens(batch)}

    def snapshot(self) -> TrainingStatePart:
        return self.engine.snapshot()

    def peak_memory(self) -> Metrics:
        return peak_memory(self.engine.device)

    def export(self, directory: str) -> None:
        policy = self.engine.stream().merged(self.engine.module).below("policy.")
        if self.engine.rank == 0:
            write_causal_lm(policy, self.model_config, self.tokenizer, directory)
        else:
            policy.read_to_the_end()

    def _nll_sum(self, batch: Sequence[PromptGroup], micro: MicroBatch) -> torch.Tensor:
        own = [batch[row] for row in micro.rows.tolist()]
        packed = pack(own, most_response_tokens=micro.most_response_tokens).to(self.engine.device)
        # The log-probability of padding is 0, so it adds nothing.
        return -self.engine.forward(packed, int(packed.response_lengths.max()), 1.0).sum()


def _num_response_tokens(batch: Sequence[PromptGroup]) -> int:
    return sum(text.num_response_tokens for text in batch)
