"""The heads that turn hidden states into a posterior, and a posterior into a reward.

Head mathematics runs in float32 with autocast off: a Dirichlet cannot be sampled in bfloat16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import ShapeError
from pipeline.models.last_layer import ErrorBar, LastLayerPosterior, no_error_bar
from pipeline.models.reward_decoders import FiLMDecoder, MLPDecoder
from pipeline.objectives.last_layer import LastLayerInputs
from pipeline.objectives.variational import (
    gaussian_noise,
    reward_mean_and_variance,
    sample_dirichlet,
    sampled_reward_moments,
)

SCALE_SPEED = 10.0
"""tau = exp(SCALE_SPEED * rho): Adam moves every parameter alike, and the scale has the longest way to go."""

FLOORS_IN_ALPHA_MIN = 50.0
"""alpha_min over the smallest single concentration of `mean_conc`."""


class RewardOutput(NamedTuple):
    """What a head says of N (prompt, response) rows, float32. A field that a head does not have is 0 wide."""

    sampled: torch.Tensor
    """[N] one posterior sample of the reward; the mean where no noise seeds were given."""
    mean: torch.Tensor
    """[N] posterior mean of the reward."""
    variance: torch.Tensor
    """[N] variance of the reward under q(w|x) q(z|x,y): the method's own. The error bar of a reward is `deviations`."""
    alpha: torch.Tensor
    """[N, K] Dirichlet concentrations of the objective weights."""
    mu: torch.Tensor
    """[N, d] Gaussian means of the semantic features."""
    logvar: torch.Tensor
    """[N, d] Gaussian log-variances."""
    scores: torch.Tensor
    """[N, K] posterior mean objective scores in units of the reward, where mean = <weights, scores>; 0 wide for the
    other decoders."""
    annotation_scores: torch.Tensor
    """[N, K] the annotators' scores as the head predicts them, in standard deviations of the annotations: what the
    score supervision fits. Of the vrm and the gate head, `scores` without the learned scale."""
    weights: torch.Tensor
    """[N, K] posterior mean objective weights."""
    deviations: torch.Tensor
    """[N, L] error bar of the reward: its length is the standard deviation, an inner product of two rows with one
    prompt their covariance (`LastLayerPosterior`). For an ensemble, the members around their mean. 0 wide in training.
    """
    prompt_features: torch.Tensor
    """[N, G] last hidden layer behind the weights; 0 wide in training. `last_layer_inputs` reads it."""
    response_features: torch.Tensor
    """[N, F] last hidden layer behind the scores or the reward, times the reward's scale; 0 wide in training."""

    @property
    def last_layer_inputs(self) -> LastLayerInputs:
        """What `deviations` are a function of. Only a head with prompt features learns its objective weights."""
        width = self.weights.shape[1] if self.prompt_features.shape[1] else 0
        weights, scores = self.weights[:, :width], self.scores[:, :width]
        return LastLayerInputs(weights, scores, self.prompt_features, self.response_features)


def bounded_softplus(u: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """high * tanh((low + softplus(u)) / high): above ~`low`, near linear, below `high` (docs/method.md section 2)."""
    return high * torch.tanh((low + nn.functional.softplus(u)) / high)


def inverse_bounded_softplus(alpha: float, *, low: float, high: float) -> float:
    """u with bounded_softplus(u) = alpha, for low < alpha < high."""
    softplus = high * math.atanh(alpha / high) - low
    return softplus + math.log(-math.expm1(-softplus))


def soft_clamp(x: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """y = m + h * tanh(x / h), with m the middle and h half the width of [low, high]: no edge kills the gradient."""
    middle, half = 0.5 * (high + low), 0.5 * (high - low)
    return middle + half * torch.tanh(x / half)


def inverse_soft_clamp(y: float, *, low: float, high: float) -> float:
    """x with soft_clamp(x) = y, for low < y < high."""
    middle, half = 0.5 * (high + low), 0.5 * (high - low)
    return half * math.atanh((y - middle) / half)


def mean_and_concentration(u: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """alpha = f + c * softmax(u_1..u_K),  c / K = bounded_softplus(u_{K+1}) from low - f to high,  f = low / 50.

    The mean of the weights and their total concentration are outputs of their own, so supervising the one leaves the
    other alone (docs/method.md section 2). The floor f is ours: at softmax 0, lgamma(alpha) would be infinite.

    Args:
        u: [N, K + 1].

    Returns:
        [N, K] concentrations; their mean over the objectives lies between `low` and `high` + f.
    """
    num_objectives = u.shape[-1] - 1
    floor = low / FLOORS_IN_ALPHA_MIN
    share = bounded_softplus(u[:, num_objectives:], low=low - floor, high=high)
    return floor + num_objectives * share * torch.softmax(u[:, :num_objectives], dim=-1)


class TwoLayerHead(nn.Module):
    """Linear -> SiLU -> Linear in float32; the output layer starts at zero weight, so its bias alone sets the start."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, output_size, dtype=torch.float32)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, input_size] -> [N, output_size]."""
        return self.output(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] what the output layer is linear in."""
        return nn.functional.silu(self.hidden(x))


class RewardUnits(nn.Module):
    """tau > 0, the reward's units per standard deviation of the annotations: r = tau <w, s> (docs/method.md section 2).

    The scores s are fitted to annotations, so their margins are a few standard deviations. Bradley-Terry needs margins
    in log-odds. Without a scale of its own, one number would have to be both. It starts at 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """[1] tau."""
        return torch.exp(SCALE_SPEED * self.rho)


class VRMHead(nn.Module):
    """Weight head, feature head and decoder (VRM, arXiv 2603.04974, Eqs. 3-5 and 12; docs/method.md section 2).

    alpha(x) = weight head at the last prompt token
    (mu, logvar)(x, y) = feature head at the last response token
    r = g(w, z):  bilinear tau <w, S z>,  hadamard tau <w, z>,  or a network (`pipeline/models/reward_decoders.py`)

    At the start alpha(x) equals the prior, so KL_w = 0.
    """

    def __init__(self, hidden_size: int, num_objectives: int, config: VRMHeadConfig) -> None:
        super().__init__()
        self.config = config
        separate_mean = config.weight_param == "mean_conc"
        self.weight_head = TwoLayerHead(hidden_size, config.hidden_size, num_objectives + separate_mean)
        self.feature_head = TwoLayerHead(hidden_size, config.hidden_size, 2 * config.semantic_dims)
        self.decoder: MLPDecoder | FiLMDecoder | None = None
        linear = config.decoder in ("bilinear", "hadamard")
        self.units = RewardUnits() if config.learned_scale and linear else None
        self.last_layer = LastLayerPosterior(
            response_size=config.hidden_size if linear else hidden_size,
            prompt_size=config.hidden_size if linear else 0,
            num_objectives=num_objectives if linear else 0,
        )
        match config.decoder:
            case "bilinear":
                self.score_matrix = nn.Parameter(torch.empty(num_objectives, config.semantic_dims, dtype=torch.float32))
            case "hadamard":
                self.register_buffer("score_matrix", torch.eye(num_objectives), persistent=False)
            case "mlp":
                self.decoder = MLPDecoder(num_objectives, config.semantic_dims, config.decoder_hidden_size)
            case "film":
                self.decoder = FiLMDecoder(num_objectives, config.semantic_dims, config.decoder_hidden_size)
        with torch.no_grad():
            # A zero feature head would give mu = 0 and no gradient to S: let mu start small instead.
            nn.init.normal_(
                self.feature_head.output.weight[: config.semantic_dims], std=1.0 / math.sqrt(config.hidden_size)
            )
            self.feature_head.output.bias[config.semantic_dims :] = inverse_soft_clamp(
                config.initial_logvar, low=config.logvar_min, high=config.logvar_max
            )
            prior = config.prior_concentrations(num_objectives)
            if separate_mean:
                floor = config.alpha_min / FLOORS_IN_ALPHA_MIN
                above = [alpha - floor for alpha in prior]
                share = inverse_bounded_softplus(
                    sum(above) / num_objectives, low=config.alpha_min - floor, high=config.alpha_max
                )
                self.weight_head.output.bias.copy_(torch.tensor([*map(math.log, above), share]))
            else:
                self.weight_head.output.bias.copy_(
                    torch.tensor(
                        [inverse_bounded_softplus(a, low=config.alpha_min, high=config.alpha_max) for a in prior]
                    )
                )
            if config.decoder == "bilinear":
                nn.init.normal_(self.score_matrix, std=1.0 / math.sqrt(config.semantic_dims))

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """Posterior and reward of N rows.

        Mean and variance are exact for the linear decoders. For the others they are those of `inference_draws` samples.
        Every row gets the same fixed noise, so a score depends on its row alone.

        Args:
            prompt_hidden: [N, H] state at the last prompt token.
            response_hidden: [N, H] state at the last response token.
            noise_seeds: [B] int64 with N = 2B, chosen rows first: one draw of w per pair, one of z per row (Eq. 11).
                None gives the posterior mean.

        Raises:
            ShapeError: the rows are not two per noise seed.
        """
        with torch.autocast(prompt_hidden.device.type, enabled=False):
            config = self.config
            concentrations = mean_and_concentration if config.weight_param == "mean_conc" else bounded_softplus
            alpha = concentrations(self.weight_head(prompt_hidden.float()), low=config.alpha_min, high=config.alpha_max)
            mu, raw_logvar = self.feature_head(response_hidden.float()).split(config.semantic_dims, dim=-1)
            logvar = soft_clamp(raw_logvar, low=config.logvar_min, high=config.logvar_max)
            if self.decoder is None:
                matrix = self._scaled_matrix()
                mean, variance = reward_mean_and_variance(alpha, mu, logvar, matrix)
                annotation_scores, scores = mu @ self.score_matrix.T, mu @ matrix.T
            else:
                with torch.no_grad():  # the loss takes the sample alone
                    mean, variance = sampled_reward_moments(
                        self.decoder, alpha, mu, logvar, draws=config.inference_draws
                    )
                annotation_scores = scores = mu.new_zeros(len(mu), 0)
            sampled = mean if noise_seeds is None else self._sampled_rewards(alpha, mu, logvar, noise_seeds)
            weights = alpha / alpha.sum(-1, keepdim=True)
            if self.training:
                error_bar = no_error_bar(mean)
            elif self.decoder is None:
                prompt_features = self.weight_head.features(prompt_hidden.float())
                response_features = scaled(self.feature_head.features(response_hidden.float()), self.units)
                error_bar = self.last_layer(LastLayerInputs(weights, scores, prompt_features, response_features))
            else:
                error_bar = linear_error_bar(self.last_layer, response_hidden)
            return RewardOutput(
                sampled, mean, variance, alpha, mu, logvar, scores, annotation_scores, weights, *error_bar
            )

    def _scaled_matrix(self) -> torch.Tensor:
        """tau S, [K, d]: mean, sample and variance of the reward follow from it."""
        return self.score_matrix if self.units is None else self.units() * self.score_matrix

    def decode(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """r = g(w, z): [*, K] and [*, d] -> [*]."""
        if self.decoder is None:
            return (weights * (features @ self._scaled_matrix().T)).sum(-1)
        return self.decoder(weights, features)

    def _sampled_rewards(
        self, alpha: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor, noise_seeds: torch.Tensor
    ) -> torch.Tensor:
        """[2B] one draw of r per row; both rows of a pair share the draw of w."""
        require_pairs(len(mu), noise_seeds)
        weights = sample_dirichlet(alpha[: len(noise_seeds)], noise_seeds)
        noise = gaussian_noise(noise_seeds, draws=2, dims=mu.shape[-1]).to(mu.device)
        features = mu + torch.exp(0.5 * logvar) * noise.transpose(0, 1).flatten(0, 1)
        return self.decode(torch.cat([weights, weights]), features)


class GateHead(nn.Module):
    """The VRM head without its posterior: r = tau <softmax(u(x)), S mu(x, y)>, as deterministic as ArmoRM's gate.

    What VRM must beat to claim that the variational part matters (docs/method.md section 2).
    Source: Wang et al. 2024, arXiv:2406.12845, section 3.2, with learned instead of regressed objective scores.
    """

    def __init__(self, hidden_size: int, num_objectives: int, config: VRMHeadConfig) -> None:
        super().__init__()
        self.weight_head = TwoLayerHead(hidden_size, config.hidden_size, num_objectives)
        self.feature_head = TwoLayerHead(hidden_size, config.hidden_size, config.semantic_dims)
        self.units = RewardUnits() if config.learned_scale else None
        self.last_layer = LastLayerPosterior(
            response_size=config.hidden_size, prompt_size=config.hidden_size, num_objectives=num_objectives
        )
        self.score_matrix = nn.Parameter(torch.empty(num_objectives, config.semantic_dims, dtype=torch.float32))
        nn.init.normal_(self.feature_head.output.weight, std=1.0 / math.sqrt(config.hidden_size))
        nn.init.normal_(self.score_matrix, std=1.0 / math.sqrt(config.semantic_dims))

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """[N, H] states -> rewards with weights and scores, without noise; the signature is the VRM head's."""
        with torch.autocast(response_hidden.device.type, enabled=False):
            weights = torch.softmax(self.weight_head(prompt_hidden.float()), dim=-1)
            mu = self.feature_head(response_hidden.float())
            annotation_scores = mu @ self.score_matrix.T
            scores = scaled(annotation_scores, self.units)
            reward = (weights * scores).sum(-1)
            empty, no_variance = reward.new_zeros(len(reward), 0), torch.zeros_like(reward)
            if self.training:
                error_bar = no_error_bar(reward)
            else:
                prompt_features = self.weight_head.features(prompt_hidden.float())
                response_features = scaled(self.feature_head.features(response_hidden.float()), self.units)
                error_bar = self.last_layer(LastLayerInputs(weights, scores, prompt_features, response_features))
            return RewardOutput(
                reward, reward, no_variance, empty, mu, empty, scores, annotation_scores, weights, *error_bar
            )


class RegressionHead(nn.Module):
    """K linear scores of the response, and a fixed weighting of them: r = <v, s>, s = W h_y + c.

    Source: HelpSteer2, Wang et al. 2024, arXiv:2406.08673, section 4; scores here are in standard deviations, and start
    at 0, the mean annotation.
    """

    def __init__(self, hidden_size: int, num_objectives: int, reward_weights: tuple[float, ...]) -> None:
        super().__init__()
        self.reward_weights = reward_weights or (1.0 / num_objectives,) * num_objectives
        self.linear = nn.Linear(hidden_size, num_objectives, dtype=torch.float32)
        self.last_layer = LastLayerPosterior(response_size=hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """[N, H] states -> scores and their weighted sum; the signature is the VRM head's."""
        with torch.autocast(response_hidden.device.type, enabled=False):
            scores = self.linear(response_hidden.float())
            weights = scores.new_tensor(self.reward_weights).expand_as(scores)
            reward = (weights * scores).sum(-1)
            empty = reward.new_zeros(len(reward), 0)
            no_variance = torch.zeros_like(reward)
            error_bar = linear_error_bar(self.last_layer, response_hidden)
            return RewardOutput(reward, reward, no_variance, empty, empty, empty, scores, scores, weights, *error_bar)


class BradleyTerryHead(nn.Module):
    """The baseline: one linear reward on the last response token (VRM Eq. 1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        self.last_layer = LastLayerPosterior(response_size=hidden_size)
        nn.init.normal_(self.linear.weight, std=1.0 / math.sqrt(hidden_size))

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """[N, H] states -> rewards without a posterior; the signature is the VRM head's."""
        with torch.autocast(response_hidden.device.type, enabled=False):
            reward = self.linear(response_hidden.float()).squeeze(-1)
            empty = reward.new_zeros(len(reward), 0)
            error_bar = linear_error_bar(self.last_layer, response_hidden)
            no_variance = torch.zeros_like(reward)
            return RewardOutput(reward, reward, no_variance, empty, empty, empty, empty, empty, empty, *error_bar)


class BradleyTerryAuxiliaryHead(nn.Module):
    """Bradley-Terry with an auxiliary task: K linear scores beside the reward, fitted to the same annotations.

    The fair baseline of heads with supervised scores: here too the backbone learns from the annotations. But the
    reward is one linear output and has no reasons (docs/method.md section 2).
    """

    def __init__(self, hidden_size: int, num_objectives: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        self.auxiliary = nn.Linear(hidden_size, num_objectives, dtype=torch.float32)
        self.last_layer = LastLayerPosterior(response_size=hidden_size)
        nn.init.normal_(self.linear.weight, std=1.0 / math.sqrt(hidden_size))
        nn.init.zeros_(self.auxiliary.weight)
        nn.init.zeros_(self.auxiliary.bias)

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """[N, H] states -> rewards, and the scores that only the loss reads; the signature is the VRM head's."""
        with torch.autocast(response_hidden.device.type, enabled=False):
            states = response_hidden.float()
            reward = self.linear(states).squeeze(-1)
            empty, no_variance = reward.new_zeros(len(reward), 0), torch.zeros_like(reward)
            annotation_scores = self.auxiliary(states)
            error_bar = linear_error_bar(self.last_layer, response_hidden)
            return RewardOutput(
                reward, reward, no_variance, empty, empty, empty, empty, annotation_scores, empty, *error_bar
            )


class EnsembleHead(nn.Module):
    """n Bradley-Terry heads on one backbone: a posterior that is uniform over its members (VRM Eq. 1, n times).

    A training pair is ranked by one member, drawn with the pair's noise seed. The loss is in expectation the mean of
    the members' losses, and the members differ in their start and in the pairs they learn from.

    Source: the linear-layer ensemble of Zhang et al. 2024, arXiv:2401.16635, with mean, minimum and mean - c * sd as
    in Coste et al. 2023, arXiv:2310.02743 (they subtract the variance).
    """

    def __init__(self, hidden_size: int, config: EnsembleConfig) -> None:
        super().__init__()
        self.reward = config.reward
        self.linear = nn.Linear(hidden_size, config.members, bias=False, dtype=torch.float32)
        self.last_layer = LastLayerPosterior(response_size=config.members, draws=member_spread(config.members))
        nn.init.normal_(self.linear.weight, std=1.0 / math.sqrt(hidden_size))

    def forward(
        self, prompt_hidden: torch.Tensor, response_hidden: torch.Tensor, noise_seeds: torch.Tensor | None
    ) -> RewardOutput:
        """[N, H] states -> mean or minimum of the members' rewards, and their population variance.

        `noise_seeds` [B] with N = 2B make `sampled` the reward of one member, the same for both rows of a pair.

        Raises:
            ShapeError: the rows are not two per noise seed.
        """
        with torch.autocast(response_hidden.device.type, enabled=False):
            members = self.linear(response_hidden.float())
            reward = members.mean(-1) if self.reward == "mean" else members.amin(-1)
            sampled = reward
            if noise_seeds is not None:
                require_pairs(len(members), noise_seeds)
                member = (noise_seeds % members.shape[1]).to(members.device).repeat(2)
                sampled = members.gather(1, member.unsqueeze(1)).squeeze(1)
            empty = reward.new_zeros(len(reward), 0)
            error_bar = self.last_layer(LastLayerInputs(empty, empty, empty, members))
            variance = members.var(-1, correction=0)
            return RewardOutput(sampled, reward, variance, empty, empty, empty, empty, empty, empty, *error_bar)


def member_spread(members: int) -> torch.Tensor:
    """[M, M] matrix that takes M members' rewards to their deviations from the mean, over sqrt(M)."""
    return (torch.eye(members) - 1.0 / members) / members**0.5


def scaled(rows: torch.Tensor, units: RewardUnits | None) -> torch.Tensor:
    """tau times the rows; the rows where no scale is learned."""
    return rows if units is None else units() * rows


def linear_error_bar(last_layer: LastLayerPosterior, response_hidden: torch.Tensor) -> ErrorBar:
    """The error bar of a reward that is read as a linear map of the response's state, [N, H]."""
    states = response_hidden.float()
    empty = states.new_zeros(len(states), 0)
    if last_layer.training:
        return no_error_bar(states)
    return last_layer(LastLayerInputs(empty, empty, empty, states))


def require_pairs(num_rows: int, noise_seeds: torch.Tensor) -> None:
    """Raises ShapeError unless there are two rows per seed."""
    if num_rows != 2 * len(noise_seeds):
        raise ShapeError(
            f"{num_rows} rows for {len(noise_seeds)} noise seeds: a posterior sample needs the chosen and then the "
            "rejected row of every pair. Pass no seeds to get the mean."
        )


RewardHead = VRMHead | GateHead | RegressionHead | BradleyTerryHead | BradleyTerryAuxiliaryHead | EnsembleHead
