"""The Gibbs risk of the reward posterior on preference pairs, and its divergence from the prior."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.config.reward import VRMHeadConfig
from pipeline.data.batching import plan_micro_batches, stable_seed
from pipeline.data.collate import TokenisedPair
from pipeline.data.preferences import normalised_prompt
from pipeline.errors import ConfigError
from pipeline.models.packing import pack
from pipeline.models.reward_heads import RewardOutput
from pipeline.models.reward_model import RewardModel
from pipeline.objectives.preference import ranked_correctly
from pipeline.objectives.variational import dirichlet_kl, gaussian_kl


@dataclass(frozen=True, kw_only=True)
class PosteriorRisk:
    """Errors and divergences of q(w|x) q(z_w|x,y_w) q(z_l|x,y_l) over n pairs. A tie is an error (VRM Eqs. 15-20)."""

    num_pairs: int
    num_prompts: int
    """Distinct prompts of the pairs. Pairs of the same prompt are not independent."""
    fingerprint: str
    """SHA-256 over the tokens of the pairs, in order."""
    samples: int
    gibbs_risk: float
    """R_hat(Q), Eq. 18: share of all (pair, posterior draw) that are ordered wrongly."""
    gibbs_risk_standard_error: float
    """Standard error over the draws, for these fixed pairs."""
    first_draw_errors: int
    """Pairs that the first draw orders wrongly. They are independent trials of the Gibbs risk, one per pair."""
    mean_reward_errors: int
    """Pairs that the posterior-mean reward orders wrongly. The service uses this reward."""
    kl_w: float
    """sum_i KL( q(w|x_i) || p(w) ), nats, a total over the pairs (Eq. 20)."""
    kl_z_chosen: float
    """sum_i KL( q(z|x_i, y_w,i) || p(z) )."""
    kl_z_rejected: float
    """sum_i KL( q(z|x_i, y_l,i) || p(z) )."""

    @property
    def kl(self) -> float:
        """D(Q||P), Eq. 20."""
        return self.kl_w + self.kl_z_chosen + self.kl_z_rejected


@torch.inference_mode()
def posterior_risk(
    model: RewardModel,
    pairs: Sequence[TokenisedPair],
    *,
    prior: VRMHeadConfig,
    samples: int,
    seed: int,
    max_tokens_per_batch: int,
    device: str,
    report: Callable[[int], None] = lambda num_measured: None,
) -> PosteriorRisk:
    """R_hat(Q) by seeded posterior draws, and D(Q||P), of a VRM on n pairs, in micro-batches.

    R_hat = 1/n sum_i 1/S sum_s 1[ r(w_is, z_w,is) <= r(w_is, z_l,is) ],  one w for both responses of a pair
    standard error^2 = 1/n^2 sum_i p_i (1 - p_i) / (S - 1),  p_i the share of pair i's draws that err

    The result does not depend on the micro-batches, because each draw's seed is a function of (seed, pair, draw).

    Args:
        model: with a variational head.
        prior: defines p(w) as in training; p(z) = N(0, I).
        samples: S >= 2 draws per pair.
        seed: seed of the draws.
        max_tokens_per_batch: token limit of one forward pass, including both responses of each pair.
        report: told after each forward pass how many pairs are measured.

    Raises:
        ConfigError: samples is below 2.
    """
    if samples < 2:
        raise ConfigError(f"samples = {samples}: the standard error of the Gibbs risk needs at least 2 draws per pair")
    model.to(device).eval()
    wrong_draws = torch.zeros(len(pairs), samples, dtype=torch.bool)
    wrong_means = torch.zeros(len(pairs), dtype=torch.bool)
    kl_w, kl_z = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(2, len(pairs), dtype=torch.float64)
    lengths = [pair.tokens.num_tokens for pair in pairs]
    num_measured = 0
    for rows in plan_micro_batches(lengths, world_size=1, max_tokens=max_tokens_per_batch)[0]:
        prompts, responses = model.encode(pack([pairs[i].tokens for i in rows]).to(device))
        posterior: RewardOutput = model.head(prompts, responses, None)
        wrong_means[rows] = _wrong(posterior.mean)
        for s in range(samples):
            seeds = torch.tensor([stable_seed("posterior risk", seed, i, s) for i in rows])
            wrong_draws[rows, s] = _wrong(model.head(prompts, responses, seeds).sampled)
        kl_w[rows], kl_z[:, rows] = _divergences(posterior, prior)
        num_measured += len(rows)
        report(num_measured)
    share = wrong_draws.double().mean(1)
    return PosteriorRisk(
        num_pairs=len(pairs),
        num_prompts=len({normalised_prompt(pair.pair.prompt) for pair in pairs}),
        fingerprint=_fingerprint(pairs),
        samples=samples,
        gibbs_risk=float(share.mean()),
        gibbs_risk_standard_error=float((share * (1.0 - share) / (samples - 1)).sum().sqrt()) / len(pairs),
        first_draw_errors=int(wrong_draws[:, 0].sum()),
        mean_reward_errors=int(wrong_means.sum()),
        kl_w=float(kl_w.sum()),
        kl_z_chosen=float(kl_z[0].sum()),
        kl_z_rejected=float(kl_z[1].sum()),
    )


def _divergences(posterior: RewardOutput, prior: VRMHeadConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """KL( q(w|x) || p(w) ) [n], and KL( q(z|x,y) || p(z) ) [2, n] of the chosen and of the rejected responses; nats.

    Float64 and not below 0: at the prior, float32 rounding would otherwise add up over the training set.
    """
    alpha, mu, logvar = (t.double().cpu() for t in (posterior.alpha, posterior.mu, posterior.logvar))
    num_pairs = len(alpha) // 2
    prior_alpha = alpha.new_tensor(prior.prior_concentrations(alpha.shape[1]))
    zero = mu.new_zeros(1)
    kl_w = dirichlet_kl(alpha[:num_pairs], prior_alpha).clamp(min=0.0)
    return kl_w, gaussian_kl(mu, logvar, zero, zero).clamp(min=0.0).view(2, num_pairs)


def _wrong(rewards: torch.Tensor) -> torch.Tensor:
    """[2n] rewards, chosen first -> [n] bool."""
    chosen, rejected = rewards.cpu().chunk(2)
    return ranked_correctly(chosen - rejected) == 0


def _fingerprint(pairs: Sequence[TokenisedPair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.tokens.prompt_ids, *pair.tokens.response_ids)).encode())
    return digest.hexdigest()
