"""Supervised fine-tuning of a policy, one rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.data.collate import pad_right
from pipeline.learning.engine import TrainEngine
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.shards import MicroBatch, Sums, own_micro_batches
from pipeline.models.backbone import save_causal_lm
from pipeline.objectives.masked import masked_sum
from pipeline.records import Metrics, TokenisedText


class SupervisedFineTuner:
    """Minimises the mean negative log-likelihood of response tokens. Implements `Learner[Sequence[TokenisedText]]`.

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

    def update(self, batch: Sequence[TokenisedText], step: int) -> Metrics:
        self.engine.module.train()
        num_tokens = _num_response_tokens(batch)
        sums = Sums()
        for micro in own_micro_batches([len(text.token_ids) for text in batch], self.engine, self.max_tokens):
            nll = self._nll_sum(batch, micro)
            self.engine.backward(micro.weight * nll / num_tokens, last=micro.last)
            sums.add(micro.weight, nll=nll)
        factor = learning_rate_factor(step, num_steps=self.num_steps, warmup_fraction=self.warmup_fraction)
        grad_norm = self.engine.step(factor)
        nll_sum = float(sums.over_ranks(self.engine)["nll"])
        return {"train/nll": nll_sum / num_tokens, "grad_norm": grad_norm, "tokens": float(num_tokens)}

    def evaluate(self, batch: Sequence[TokenisedText]) -> Metrics:
        self.engine.module.eval()
        sums = Sums()
        with torch.no_grad():
            for micro in own_micro_batches([len(text.token_ids) for text in batch], self.engine, self.max_tokens):
                sums.add(micro.weight, nll=self._nll_sum(batch, micro))
        return {"eval/nll": float(sums.over_ranks(self.engine)["nll"]) / _num_response_tokens(batch)}

    def save(self, directory: str) -> None:
        self.engine.save(directory)

    def export(self, directory: str) -> None:
        state = self.engine.full_state_dict()
        if self.engine.rank == 0:
            policy = {name.removeprefix("policy."): tensor for name, tensor in state.items()}
            save_causal_lm(policy, self.model_config, self.tokenizer, directory)

    def _nll_sum(self, batch: Sequence[TokenisedText], micro: MicroBatch) -> torch.Tensor:
        texts = [batch[row] for row in micro.rows.tolist()]
        device = self.engine.device
        prompt_lengths = torch.tensor([text.prompt_length for text in texts], device=device)
        lengths = torch.tensor([len(text.token_ids) for text in texts], device=device)
        response_lengths = lengths - prompt_lengths
        input_ids = pad_right([text.token_ids for text in texts], self.tokenizer.pad_token_id).to(device)
        columns = int(response_lengths.max())
        logprobs = self.engine.forward(input_ids, prompt_lengths, response_lengths, columns, 1.0)
        mask = torch.arange(columns, device=device) < response_lengths.unsqueeze(-1)
        return -masked_sum(logprobs, mask)


def _num_response_tokens(batch: Sequence[TokenisedText]) -> int:
    return sum(len(text.token_ids) - text.prompt_length for text in batch)
