"""The charts of a report, each with a sentence on what healthy curves look like. Alarms are those of alarms.py."""

from __future__ import annotations

from pipeline.evaluation.alarms import FAR_KL, FAR_NATS_PER_TOKEN
from pipeline.reporting.line_chart import Chart, Series

REWARD_CHARTS = (
    Chart(
        title="accuracy, share of pairs",
        first=Series("train/accuracy", "training"),
        second=Series("eval/accuracy", "held out"),
        healthy="Both rise above 0.5, a coin's. Training far above held out means memorised pairs "
        "(alarm memorised_prompts).",
    ),
    Chart(
        title="NLL, nats a pair",
        first=Series("train/nll", "training"),
        second=Series("eval/nll", "held out"),
        healthy="Both fall below ln 2 = 0.693, a coin's. If held out rises again, train less long.",
    ),
    Chart(
        title="mean |margin|, units of the reward",
        first=Series("train/margin", "training"),
        second=Series("eval/margin", "held out"),
        healthy="Both grow, then level off. Near 0 all rewards are alike (alarm z_collapse).",
    ),
    Chart(
        title="KL of the objective weights, nats",
        first=Series("train/kl_w", "training"),
        second=Series("eval/kl_w", "held out"),
        healthy="It may peak early, then stays level above 0. At 0 every prompt has the weights of the prior "
        "(alarm w_collapse).",
    ),
    Chart(
        title="KL of semantic features, nats a pair",
        first=Series("train/kl_z", "training"),
        second=Series("eval/kl_z", "held out"),
        healthy="It stays level above 0. At 0 the features say nothing of the response (alarm z_collapse).",
    ),
    Chart(
        title="active semantic units",
        second=Series("eval/active_units", "held out"),
        healthy="Most of them stay active. Fewer than 2 raise the alarm z_collapse.",
    ),
)

POLICY_CHARTS = (
    Chart(
        title="reward",
        first=Series("reward/mean", "training prompts"),
        second=Series("eval/reward", "held-out prompts"),
        healthy="Both rise together. Training prompts alone mean a policy that exploits them "
        "(alarm reward_without_validation).",
    ),
    Chart(
        title="KL to the start, nats a response",
        first=Series("kl/per_response", "training prompts"),
        second=Series("eval/kl", "held-out prompts"),
        healthy=f"It grows slowly and stays below {FAR_KL:g} (alarm far_from_start).",
    ),
    Chart(
        title="length, tokens a response",
        first=Series("response/tokens", "training prompts"),
        second=Series("eval/length", "held-out prompts"),
        healthy="It stays between half and twice its first value (alarm length_drift).",
    ),
    Chart(
        title="entropy, nats a token",
        first=Series("ppo/entropy", "training prompts"),
        healthy="It falls slowly and stays above a third of its first value (alarm entropy_collapse).",
    ),
    Chart(
        title="value loss",
        first=Series("ppo/value_loss", "training prompts"),
        healthy="It falls, then stays low. A lasting rise means that the critic no longer follows the rewards.",
    ),
    Chart(
        title="clip fraction, share of tokens",
        first=Series("ppo/clip_fraction", "training prompts"),
        healthy="A small share, by rule of thumb below 0.3. More means that the updates are too large.",
    ),
    Chart(
        title="gap of engine and learner, nats",
        first=Series("engine_gap/mean", "mean of a step"),
        second=Series("gate/max", "largest at the gate"),
        healthy="Level, with a mean below 0.1 nats a token (alarm engine_gap).",
    ),
    Chart(
        title="tokens per second",
        first=Series("tokens_per_s/rollout", "while sampling"),
        second=Series("tokens_per_s/step", "over whole steps"),
        healthy="Level. A lasting fall means longer answers, lost workers or little memory.",
    ),
    Chart(
        title="gold reward, by the planted truth",
        first=Series("gold/mean", "training prompts"),
        second=Series("eval/gold", "held-out prompts"),
        healthy="It rises with the reward. If it falls while the reward rises, the policy fools its reward model.",
    ),
    Chart(
        title="reward minus gold reward, standard deviations",
        first=Series("gold/gap", "training prompts"),
        healthy="Level. Growth is over-optimisation: the reward rises faster than the truth.",
    ),
)

DIRECT_CHARTS = (
    Chart(
        title="loss",
        first=Series("train/loss", "training"),
        second=Series("eval/loss", "held out"),
        healthy="Both fall. If held out rises again, train less long.",
    ),
    Chart(
        title="accuracy of the implicit reward",
        first=Series("train/accuracy", "training"),
        second=Series("eval/accuracy", "held out"),
        healthy="Both rise above 0.5, a coin's.",
    ),
    Chart(
        title="its margin",
        first=Series("train/margin", "training"),
        second=Series("eval/margin", "held out"),
        healthy="Both grow from 0, then level off.",
    ),
    Chart(
        title="chosen: change of log-probability, nats",
        first=Series("train/chosen_change", "training"),
        second=Series("eval/chosen_change", "held out"),
        healthy="Above 0, or a little below. If chosen and rejected both lose more than "
        f"{FAR_NATS_PER_TOKEN:g} nats a token, other responses became likely (alarm likelihood_displacement).",
    ),
    Chart(
        title="rejected: change of log-probability, nats",
        first=Series("train/rejected_change", "training"),
        second=Series("eval/rejected_change", "held out"),
        healthy="It falls below that of the chosen responses.",
    ),
    Chart(
        title="gradient norm",
        first=Series("grad_norm", "training"),
        healthy="Level. Peaks that grow mean that the learning rate is too high.",
    ),
)
