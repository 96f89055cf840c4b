"""The Laplace approximation of a reward's last linear maps (docs/method.md section 7).

The last maps are those from a head's last hidden layers to the reward: with features phi of the response and chi of
the prompt, s = W phi and w = softmax(V chi). A Gaussian over W and V, linearised, gives every reward a standard
deviation, and two rewards of one prompt a covariance. Without objective weights the map is r = W phi.

Source: Daxberger et al. 2021, arXiv:2106.14806 (last-layer Laplace with the generalised Gauss-Newton matrix).
Shapes: N rows, K objectives, F and G features of response and prompt, P = K (F + G), or P = F without objectives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SKETCH_SIZE = 512
"""Features that the precision matrix is kept over: 512 by 512 numbers cost nothing to decompose."""

SKETCH_SEED = 0
DRAW_SEED = 1


class LastLayerInputs(NamedTuple):
    """What the reward's gradient in its last maps is made of. A field that a head does not have is 0 wide."""

    weights: torch.Tensor
    """[N, K] objective weights."""
    scores: torch.Tensor
    """[N, K] objective scores in units of the reward."""
    prompt_features: torch.Tensor
    """[N, G] chi."""
    response_features: torch.Tensor
    """[N, F] phi, times the scale of the reward."""


def last_layer_gradient(inputs: LastLayerInputs) -> torch.Tensor:
    """[N, P] gradient of r = <w, s> in its last maps; of r = W phi where there are no prompt features.

    dr/dW = w (x) phi,   dr/dV = (w * (s - <w, s>)) (x) chi

    Linear in (s, phi), so the gradient of a margin is the difference of two rows with equal weights.
    """
    if not inputs.prompt_features.shape[1]:
        return inputs.response_features
    w, s = inputs.weights, inputs.scores
    lead = w * (s - (w * s).sum(-1, keepdim=True))
    return torch.cat([_outer(w, inputs.response_features), _outer(lead, inputs.prompt_features)], dim=1)


def relative_to(inputs: LastLayerInputs, response_features: torch.Tensor, scores: torch.Tensor) -> LastLayerInputs:
    """The inputs of r(x, y) - r(x, y_0), for a reference response with these features [F] and scores [K].

    A Bradley-Terry reward has no zero of its own, so only a difference of two responses has an error bar.
    """
    return inputs._replace(
        scores=inputs.scores - scores,
        response_features=inputs.response_features - response_features,
    )


def sketched(inputs: LastLayerInputs) -> LastLayerInputs:
    """Features projected at random, to at most SKETCH_SIZE numbers in a gradient; the same projection every time.

    Source: Johnson and Lindenstrauss 1984. With 64 dimensions a map nothing was lost (docs/LOG.md, 2026-11-29).
    """
    return inputs._replace(
        prompt_features=inputs.prompt_features @ sketch_of(inputs, prompt=True),
        response_features=inputs.response_features @ sketch_of(inputs, prompt=False),
    )


def sketch_of(inputs: LastLayerInputs, *, prompt: bool) -> torch.Tensor:
    """[F, f] or [G, g] orthonormal columns; the identity where there are few features."""
    features = inputs.prompt_features if prompt else inputs.response_features
    maps = 2 * inputs.weights.shape[1] if inputs.prompt_features.shape[1] else 1
    size = features.shape[1]
    kept = min(size, SKETCH_SIZE // maps)
    if kept == size:
        return torch.eye(size, dtype=features.dtype)
    generator = torch.Generator().manual_seed(SKETCH_SEED + prompt)
    columns = torch.randn(size, kept, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(columns)[0].to(features.dtype)


def bradley_terry_precision(differences: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """[P, P] the Gauss-Newton matrix of -sum_i log sigmoid(m_i): sum_i p_i (1 - p_i) g_i g_i^T,  p_i = sigmoid(m_i).

    Args:
        differences: [n, P] gradient of each margin.
        margins: [n] m.
    """
    p = torch.sigmoid(margins)
    return (differences * (p * (1.0 - p)).unsqueeze(1)).T @ differences


class Precision(NamedTuple):
    """H = U diag(e) U^T, ready for any prior: Sigma = (H + lambda I)^-1."""

    values: torch.Tensor
    """[P] e >= 0."""
    vectors: torch.Tensor
    """[P, P] U."""

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Precision:
        values, vectors = torch.linalg.eigh(matrix)
        return cls(values.clamp(min=0.0), vectors)

    def draws(self, prior_precision: float, *, count: int) -> torch.Tensor:
        """[P, L] samples of N(0, Sigma) over sqrt(L), seeded: |g^T draws|^2 estimates g^T Sigma g.

        The relative standard error of the estimate is sqrt(2 / L). All rows share the samples. They are made with the
        symmetric root of Sigma, because the signs of eigenvectors are accidents of rounding.
        """
        generator = torch.Generator().manual_seed(DRAW_SEED)
        noise = torch.randn(len(self.values), count, generator=generator, dtype=torch.float64).to(self.values)
        root = (self.values + prior_precision).rsqrt().unsqueeze(1)
        return self.vectors @ (root * (self.vectors.T @ noise)) / count**0.5


def unsketched_draws(draws: torch.Tensor, inputs: LastLayerInputs) -> torch.Tensor:
    """[P', L] draws over sketched features -> [P, L] the same draws over all features of `inputs`."""
    response = sketch_of(inputs, prompt=False).to(draws)
    if not inputs.prompt_features.shape[1]:
        return response @ draws
    prompt = sketch_of(inputs, prompt=True).to(draws)
    objectives = inputs.weights.shape[1]
    parts = draws.split([objectives * response.shape[1], objectives * prompt.shape[1]])
    return torch.cat(
        [
            torch.einsum("fr,krl->kfl", sketch, part.unflatten(0, (objectives, -1))).flatten(0, 1)
            for sketch, part in zip((response, prompt), parts, strict=True)
        ]
    )


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, K] and [N, F] -> [N, K F]."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
