"""A reward model as `AutoModelForSequenceClassification`: this file lies beside the weights that it reads.

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    reward = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]

The messages end with the assistant's answer, without its thoughts. The logit is the posterior mean of the reward, as
the scoring service gives it. The weights of the objectives are read where the prompt ends, and the features where the
answer's turn ends or over all of the answer, so both places must be in the text. Needs torch and transformers, and
nothing of the project that wrote it: https://arxiv.org/abs/2603.04974 has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu, softplus
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

SCALE_SPEED = 10.0
FLOORS_IN_ALPHA_MIN = 50.0
SIMPLEX_FLOOR = 1e-6


class VRMRewardConfig(PretrainedConfig):
    """The decoder, the head, and where prompt and answer end."""

    model_type = "vrm_reward_model"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        generation_prompt: Sequence[int] = (),
        turn_end: int | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            backbone: config of the decoder.
            head: kind, number of objectives and sizes of the head.
            generation_prompt: tokens with which the template begins the assistant's turn; empty where it has none that
                a message could not spell.
            turn_end: the token with which the template ends the assistant's turn.
        """
        self.backbone = backbone or {}
        self.head = head or {}
        self.generation_prompt = [*generation_prompt]
        self.turn_end = turn_end
        super().__init__(**kwargs)


class VRMRewardModel(PreTrainedModel):
    """Logits [B, 1]: the rewards of B conversations."""

    config_class = VRMRewardConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_unexpected = [r"^head\.last_layer\."]  # noqa: RUF012 -- error bars, which no logit reads
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 -- transformers reads a set or a list

    def __init__(self, config: VRMRewardConfig) -> None:
        super().__init__(config)
        decoder = AutoConfig.for_model(**config.backbone)
        # The dtype that the caller asked for, which is the default one while a model is made, not that of training.
        self.backbone = AutoModel.from_config(decoder, dtype=torch.get_default_dtype())
        self.head = RewardHead(decoder.hidden_size, config.head)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        answer_starts: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Rewards of conversations that end with the assistant's answer.

        Args:
            input_ids: [B, T], padded on either side.
            attention_mask: [B, T], 1 on tokens; None is 1 everywhere.
            answer_starts: [B], the place of each answer's first token; None looks for the last place where the
                template begins the assistant's turn.

        Raises:
            ValueError: a conversation without the beginning of an answer, or without its end.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        starts = self._answer_starts(input_ids, mask) if answer_starts is None else answer_starts.to(input_ids.device)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_end = (input_ids == self.config.turn_end) & (mask > 0) & (places >= starts.unsqueeze(1))
        _require(is_end.any(1), "end of the assistant's turn behind the answer")
        ends = torch.where(is_end, places, -1).amax(1)
        # Padding on the left moves every position alike, which rotary decoders do not see.
        states = self.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        if self.config.head["pooling"] == "mean":
            of_answer = (places >= starts.unsqueeze(1)) & (places <= ends.unsqueeze(1))
            sums = (states.float() * of_answer.unsqueeze(-1)).sum(1)
            answers = sums / of_answer.sum(1, keepdim=True)
        else:
            answers = states[rows, ends]
        logits = self.head(states[rows, starts - 1], answers).unsqueeze(1)
        return SequenceClassifierOutput(logits=logits)

    def _answer_starts(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B]: the place behind the last beginning of an assistant's turn."""
        beginning = torch.tensor(self.config.generation_prompt, device=input_ids.device)
        if len(beginning) == 0:
            raise ValueError("the chat template does not mark where an answer begins: pass answer_starts")
        if input_ids.shape[1] < len(beginning):
            _require(torch.zeros(len(input_ids), dtype=torch.bool), "beginning of the assistant's turn")
        windows = (input_ids.masked_fill(mask == 0, -1).unfold(1, len(beginning), 1) == beginning).all(-1)
        _require(windows.any(1), "beginning of the assistant's turn")
        return torch.where(windows, torch.arange(windows.shape[1], device=windows.device), -1).amax(1) + len(beginning)


def _require(found: torch.Tensor, what: str) -> None:
    if not found.all():
        raise ValueError(
            f"row {int((~found).nonzero()[0])} has no {what}. Render whole conversations with the chat template of "
            "this directory (add_generation_prompt=False, enable_thinking=False), or pass answer_starts."
        )


class RewardHead(nn.Module):
    """States of N prompts and answers -> posterior means of their rewards, in float32."""

    def __init__(self, hidden_size: int, head: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.num_objectives, vrm = head["kind"], head["num_objectives"], head["vrm"]
        self.vrm, self.reward_weights, self.ensemble = vrm, head["reward_weights"], head["ensemble"]
        if self.kind not in ("vrm", "gate"):
            outputs = {"regression": self.num_objectives, "ensemble": self.ensemble["members"]}.get(self.kind, 1)
            self.linear = nn.Linear(hidden_size, outputs, bias=self.kind == "regression")
            if self.kind == "bt_aux":
                self.auxiliary = nn.Linear(hidden_size, self.num_objectives)  # the loss alone read it
            return
        is_vrm = self.kind == "vrm"
        self.decoder_kind = vrm["decoder"] if is_vrm else "bilinear"
        separate_mean = is_vrm and vrm["weight_param"] == "mean_conc"
        dims = vrm["semantic_dims"]
        self.weight_head = TwoLayerHead(hidden_size, vrm["hidden_size"], self.num_objectives + separate_mean)
        self.feature_head = TwoLayerHead(hidden_size, vrm["hidden_size"], (1 + is_vrm) * dims)
        if self.decoder_kind in ("mlp", "film"):
            network = MLPDecoder if self.decoder_kind == "mlp" else FiLMDecoder
            self.decoder = network(self.num_objectives, dims, vrm["decoder_hidden_size"])
        elif vrm["learned_scale"]:
            self.units = RewardUnits()
        if self.decoder_kind == "bilinear":
            self.score_matrix = nn.Parameter(torch.empty(self.num_objectives, dims))

    def forward(self, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """[N, H] states at the ends of prompts and answers -> [N]."""
        with torch.autocast(prompt.device.type, enabled=False):
            prompt, answer = prompt.float(), answer.float()
            match self.kind:
                case "regression":
                    weights = answer.new_tensor(
                        self.reward_weights or [1.0 / self.num_objectives] * self.num_objectives
                    )
                    return (weights * self.linear(answer)).sum(-1)
                case "ensemble":
                    members = self.linear(answer)
                    return members.mean(-1) if self.ensemble["reward"] == "mean" else members.amin(-1)
                case "gate":
                    return self._linear_reward(torch.softmax(self.weight_head(prompt), -1), self.feature_head(answer))
                case "vrm":
                    return self._posterior_mean(self._concentrations(prompt), self.feature_head(answer))
            return self.linear(answer).squeeze(-1)

    def _concentrations(self, prompt: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, K] of the Dirichlet over the objectives' weights."""
        u, low, high = self.weight_head(prompt), self.vrm["alpha_min"], self.vrm["alpha_max"]
        if self.vrm["weight_param"] != "mean_conc":
            return high * torch.tanh((low + softplus(u)) / high)
        floor = low / FLOORS_IN_ALPHA_MIN
        share = high * torch.tanh((low - floor + softplus(u[:, self.num_objectives :])) / high)
        return floor + self.num_objectives * share * torch.softmax(u[:, : self.num_objectives], dim=-1)

    def _posterior_mean(self, alpha: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[N, K] concentrations and [N, 2d] mean and log-variance of the features -> [N]."""
        mu, raw_logvar = features.chunk(2, dim=-1)
        if self.decoder_kind not in ("mlp", "film"):
            return self._linear_reward(alpha / alpha.sum(-1, keepdim=True), mu)
        middle = 0.5 * (self.vrm["logvar_max"] + self.vrm["logvar_min"])
        half = 0.5 * (self.vrm["logvar_max"] - self.vrm["logvar_min"])
        logvar = middle + half * torch.tanh(raw_logvar / half)
        draws = self.vrm["inference_draws"]
        # The noise of training's evaluations: the same for every row.
        gammas = torch.stack([torch._standard_gamma(a.expand(draws, -1), _generator(0)) for a in alpha.cpu()])
        weights = (gammas / gammas.sum(-1, keepdim=True).clamp(min=torch.finfo(gammas.dtype).tiny)).clamp(SIMPLEX_FLOOR)
        weights = (weights / weights.sum(-1, keepdim=True)).to(alpha.device)
        noise = torch.randn(2 * draws, mu.shape[-1], generator=_generator(1)).to(mu.device)
        features = mu.unsqueeze(1) + torch.exp(0.5 * logvar).unsqueeze(1) * noise
        return self.decoder(torch.cat([weights, weights], dim=1), features).mean(1)

    def _linear_reward(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """tau <w, S z>; S is the identity of the hadamard decoder."""
        scores = features @ self.score_matrix.T if self.decoder_kind == "bilinear" else features
        reward = (weights * scores).sum(-1)
        return self.units() * reward if self.vrm["learned_scale"] else reward


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TwoLayerHead(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(silu(self.hidden(x)))


class RewardUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1))

    def forward(self) -> torch.Tensor:
        return torch.exp(SCALE_SPEED * self.rho)


class MLPDecoder(nn.Module):
    def __init__(self, num_objectives: int, semantic_dims: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_objectives + semantic_dims, hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = torch.cat([weights, features], dim=-1)
        return self.output(silu(self.second(silu(self.first(x))))).squeeze(-1)


class FiLMDecoder(nn.Module):
    def __init__(self, num_objectives: int, semantic_dims: int, hidden_size: int) -> None:
        super().__init__()
        self.features = nn.Linear(semantic_dims, hidden_size, bias=False)
        self.modulation = nn.Linear(num_objectives, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.output(silu(self.features(features) * (1.0 + self.modulation(weights)))).squeeze(-1)
