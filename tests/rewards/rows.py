"""Rows for the tests of rewards."""

from pipeline.records import Prompt, Rollout
from pipeline.rewards.rows import RewardRows


def rollout(prompt, index, text, *, tokens=3):
    return Rollout(
        prompt=Prompt(id=prompt, messages=({"role": "user", "content": f"{prompt} ?"},), token_ids=(1,)),
        sample_index=index,
        response_ids=(2,) * tokens,
        response_text=text,
        logprobs=(-1.0,) * tokens,
        policy_version=0,
        finish_reason="stop",
    )


def rows_of(*responses, **columns):
    """One prompt a response; `columns` as lists."""
    rollouts = [rollout(f"p{n}", 0, text, tokens=len(text.split()) or 1) for n, text in enumerate(responses)]
    by_id = {f"p{n}": {name: values[n] for name, values in columns.items()} for n in range(len(responses))}
    return RewardRows.of(rollouts, by_id)


def means(scores):
    """The mean of each score, or the kind of its failure."""
    return [getattr(score, "kind", None) or score.mean for score in scores]
