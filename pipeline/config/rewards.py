"""Where the reward of a response comes from while a policy is aligned: one entry of `alignment.rewards` a source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Frozen, NonNegative, Positive

THIS_RUN = "this_run"
SERVE_PREFIX = "serve:"
KINDS = ("model", "python", "judge", "exact_match", "regex", "math", "length", "format")
RESERVED_NAMES = frozenset(
    {"mean", "shaped", "zscore", "std_over_batch", "posterior_std", "base", "aligned", "dropped"}
    | {"win_rate", "ties", "low", "high"}
)
"""Metrics `reward/<name>` that are there already."""


class ModelReward(Frozen):
    """A reward model; `model: <place>` stands for its `place` alone."""

    place: str = THIS_RUN
    """"this_run": the reward model that this run trains. Else a checkpoint directory, `serve:<application>` of Ray
    Serve on the same cluster, or the URL of an endpoint."""
    form: Literal["vrm", "openrlhf", "vllm"] = "vrm"
    """What an endpoint speaks: this project's /v1/score, OpenRLHF's remote reward model (the URL is then the whole
    path), or vLLM's /classify. Read only where `place` is a URL."""
    served_name: str | None = None
    """The `model` of vLLM's requests; None leaves it out, and vLLM takes the one it serves."""
    weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Objective -> factor of its weight, as in {safety: 2}; 1 for objectives that are not named."""
    deadline_s: Positive = 600.0
    """Seconds that an endpoint may take for a step, its retries included."""

    @property
    def is_url(self) -> bool:
        return self.place.startswith(("http://", "https://"))

    @property
    def is_served(self) -> bool:
        return self.place.startswith(SERVE_PREFIX)

    @property
    def is_of_this_run(self) -> bool:
        return self.place == THIS_RUN

    @property
    def is_checkpoint(self) -> bool:
        return not (self.is_url or self.is_served or self.is_of_this_run)

    @model_validator(mode="after")
    def _other_forms_know_no_objectives(self) -> ModelReward:
        if self.form != "vrm" and not self.is_url:
            raise ValueError(f"form = {self.form} is the form of an endpoint, but place = {self.place!r} is no URL")
        if self.weights and self.form != "vrm":
            raise ValueError(
                f"weights = {self.weights} re-weigh the objectives of a VRM model, and an endpoint of the form "
                f"{self.form} has none; leave weights out, or set form: vrm"
            )
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights are all 0, which leaves no objective; give one of them a value above 0")
        return self


class PythonReward(Frozen):
    """A function of the user's; `python: path.py:function` stands for its `function` alone."""

    function: str
    """`path.py:name`, relative to the working directory; `name(prompts, responses, columns)` for a batch or
    `name(prompt, response, columns)` for one row (docs/rewards.md)."""
    columns: tuple[str, ...] = ()
    """Columns of the prompt files that the function needs. They are looked for before anything starts."""
    deadline_s: Positive = 60.0
    """Seconds that a batch may take. After that its process is ended and started anew."""
    batch_size: Count = 32
    """Responses per call, at most."""

    @field_validator("function")
    @classmethod
    def _names_a_file_and_a_function(cls, function: str) -> str:
        path, _, name = function.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise ValueError(f"{function!r} names no function of a file; write path.py:function")
        return function

    @property
    def path(self) -> str:
        return self.function.rpartition(":")[0]

    @property
    def function_name(self) -> str:
        return self.function.rpartition(":")[2]


class JudgeReward(Frozen):
    """A language model behind an endpoint of OpenAI's chat completions, which grades or compares responses."""

    url: str
    """Base URL with the version, as in http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model that judges, as the endpoint calls it."""
    form: Literal["graded", "pairwise"] = "graded"
    """"graded": a number for each response. "pairwise": each response against two others to the same prompt, once shown
    first and once shown second; its score is its share of wins, a tie counts one half."""
    template: str | None = None
    """A text file with {prompt} and {response}, or {prompt}, {response_a} and {response_b}; {name} of any column of the
    prompt files. None takes the template of pipeline/rewards/judge_reward.py."""
    grade_range: tuple[float, float] = (1.0, 10.0)
    """Smallest and largest grade. Another grade counts as unreadable."""
    temperature: NonNegative = 0.0
    """Divides the judge's logits; at 0 it always takes the likeliest token."""
    max_tokens: Count = 1024
    """Tokens of a judgment, at most."""
    api_key_env: str | None = None
    """Environment variable with the key; None sends none."""
    cache: str | None = None
    """A local file that keeps every judgment, so that no request is paid twice; None asks anew after a restart."""
    prices: str | None = None
    """A JSON file {model: {"prompt": ..., "completion": ...}} with prices per million tokens, for `reward/*/cost`."""
    concurrency: Count = 8
    """Requests in flight."""
    requests_per_minute: Positive | None = None
    """Requests started per minute, retries included; None for no limit."""
    deadline_s: Positive = 300.0
    """Seconds that a request may take, its retries included."""

    @model_validator(mode="after")
    def _grades_have_a_range(self) -> JudgeReward:
        low, high = self.grade_range
        if low >= high:
            raise ValueError(f"grade_range = [{low:g}, {high:g}] is empty; write the smaller number first")
        return self


class ExactMatch(Frozen):
    """1 where the response is the text of a column, else 0; `exact_match: <column>` stands for its `column` alone."""

    column: str = "answer"
    """Column of the prompt files with the expected text."""
    after: str | None = None
    """Only what follows the last occurrence of this text counts, in response and column; None takes the whole."""
    ignore_case: bool = False
    """Capital and small letters count as the same."""


class RegexMatch(Frozen):
    """1 where a pattern is found in the response, else 0; `regex: <pattern>` stands for its `pattern` alone."""

    pattern: str
    """A regular expression of Python; a dot stands for a line end too."""
    column: str | None = None
    """1 only where the first group of the last match is the text of this column."""

    @model_validator(mode="after")
    def _is_a_pattern(self) -> RegexMatch:
        try:
            groups = re.compile(self.pattern, re.DOTALL).groups
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r} cannot be read: {error}") from error
        if self.column is not None and groups == 0:
            raise ValueError(f"pattern = {self.pattern!r} has no group to compare with column {self.column!r}; add ( )")
        return self


class MathAnswer(Frozen):
    """1 where the last expression of the response equals the column's, by `math-verify`, else 0.

    `math: <column>` stands for its `column` alone. Needs the extra `math`.
    """

    column: str = "answer"
    """Column of the prompt files with the expected answer."""
    after: str | None = None
    """What the expected answer follows in its column, "####" in GSM8K; None takes the last expression of the column."""
    deadline_s: Positive = 60.0
    """Seconds that a batch may take: some expressions take forever to simplify."""
    batch_size: Count = 32
    """Responses per call, at most."""


class LengthReward(Frozen):
    """0 at the target, or up to the limit, and less with the distance from it."""

    target: Count | None = None
    """-|n - target| / target."""
    at_most: Count | None = None
    """-max(0, n - at_most) / at_most."""
    unit: Literal["tokens", "words"] = "tokens"
    """What n counts: the policy's tokens, or words between blanks."""

    @model_validator(mode="after")
    def _has_one_aim(self) -> LengthReward:
        if (self.target is None) == (self.at_most is None):
            raise ValueError("give either target or at_most, as in length: {at_most: 200}")
        return self


class FormatReward(Frozen):
    """1 where every part occurs once, in this order, else 0; `format: [<part>, ...]` stands for its `parts` alone."""

    parts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """As in ["<think>", "</think>"]."""


SHORT_FORMS = {
    "model": "place",
    "python": "function",
    "exact_match": "column",
    "regex": "pattern",
    "math": "column",
    "format": "parts",
}
"""Kind -> the setting that a plain value stands for."""


class RewardSourceConfig(Frozen):
    """One source of reward: exactly one of the kinds, its weight, and what happens where it gives no score."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """What metrics and samples call it. Where it is not given: its kind."""
    weight: NonNegative = 1.0
    """Factor of its score in the sum. 0 measures it, and trains nothing on it."""
    spread: Positive | None = None
    """Standard deviation of its scores on held-out responses, the unit in which a sum counts them. None takes the one
    that a reward model brings, or measures it with the policy before its first update."""
    on_failure: Literal["drop"] | float = "drop"
    """What a response gets to which the source gives no finite score: "drop" leaves it out of the step; a number is its
    score."""
    model: ModelReward | None = None
    python: PythonReward | None = None
    judge: JudgeReward | None = None
    exact_match: ExactMatch | None = None
    regex: RegexMatch | None = None
    math: MathAnswer | None = None
    length: LengthReward | None = None
    format: FormatReward | None = None

    @model_validator(mode="before")
    @classmethod
    def _written_short(cls, written: Any) -> Any:
        if not isinstance(written, dict):
            return written
        values = dict(written)
        kinds = [kind for kind in KINDS if values.get(kind) is not None]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none of them"
            raise ValueError(f"a reward is one of {', '.join(KINDS)}, and this has {given}")
        [kind] = kinds
        if kind in SHORT_FORMS and isinstance(values[kind], str | list | tuple):
            values[kind] = {SHORT_FORMS[kind]: values[kind]}
        return {"name": kind} | values

    @field_validator("name")
    @classmethod
    def _is_no_other_metric(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"{name!r} is the name of another metric of rewards; choose another one")
        return name

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prompt files that it reads."""
        if self.python is not None:
            return self.python.columns
        column = next((s.column for s in (self.exact_match, self.regex, self.math) if s is not None), None)
        return () if column is None else (column,)

    @property
    def is_this_runs_model(self) -> bool:
        return self.model is not None and self.model.is_of_this_run

    @property
    def compares_a_group(self) -> bool:
        return self.judge is not None and self.judge.form == "pairwise"


THIS_RUNS_MODEL = RewardSourceConfig(name="model", model=ModelReward())


def require_usable_rewards(rewards: Sequence[RewardSourceConfig]) -> None:
    """Raises ValueError where two sources have one name, none has a weight, or none scores a response by itself."""
    [(name, count)] = Counter(source.name for source in rewards).most_common(1)
    if count > 1:
        raise ValueError(f"rewards: {count} sources are named {name!r}, and metrics go by name; give each its own name")
    if not any(source.weight for source in rewards):
        raise ValueError("rewards: the weights are all 0, so nothing would be trained on; give one of them a weight")
    if all(source.compares_a_group for source in rewards):
        raise ValueError(
            f"rewards: {rewards[0].name!r} compares the responses to one prompt, but validation and benchmark have one "
            "response to each, so nothing could score them; add a reward that scores one response, with weight 0 if "
            "nothing is to be trained on it, as in {judge: {..., form: graded}, weight: 0, name: graded}"
        )
