"""The planted world: preferences whose truth is known, made from templates, with nothing to download.

This is a test world. It is not human data and must never be presented as such; it exists to show whether a method
recovers what was planted.

A prompt is of one of four kinds, and each kind has known objective weights w*(x). A response is a list of clauses; a
gold annotator scores any text from 1 to 5 on four objectives by the clauses it finds. The gold reward is
<w*(x), scores(y)>.
Pairs are labelled by a Bradley-Terry draw on the gold reward, and annotated with noisy scores. A model sees the noisy
scores of responses and the labels; it never sees w*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.data import PlantedConfig
from pipeline.errors import ConfigError, DataError
from pipeline.records import Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OBJECTIVES = ("helpfulness", "honesty", "safety", "brevity")

WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "plan": (0.60, 0.15, 0.15, 0.10),
    "factual": (0.20, 0.60, 0.10, 0.10),
    "risky": (0.15, 0.15, 0.60, 0.10),
    "quick": (0.20, 0.10, 0.10, 0.60),
}
"""w*(x) by kind of prompt, in the order of `OBJECTIVES`."""

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "plan": (
        "please help me plan the {topic} for {place} .",
        "which steps do i take with the {topic} in {place} ?",
        "guide me through the {topic} at {place} .",
    ),
    "factual": (
        "what is really known about the {topic} of {place} ?",
        "is it true what they say about the {topic} in {place} ?",
        "explain the facts about the {topic} at {place} .",
    ),
    "risky": (
        "is the {topic} dangerous near {place} ?",
        "how do i handle the broken {topic} in {place} ?",
        "can the {topic} hurt somebody at {place} ?",
    ),
    "quick": (
        "in a few words , what about the {topic} in {place} ?",
        "quick answer please : the {topic} for {place} ?",
        "i am in a hurry , tell me of the {topic} at {place} .",
    ),
}

TOPICS = (
    *("bread", "garden", "bicycle", "ladder", "engine", "kettle", "camera", "boat", "tent", "oven"),
    *("lamp", "piano", "bridge", "candle", "compass", "drill", "fence", "guitar", "hammer", "kite"),
    *("lantern", "mirror", "needle", "paint", "radio", "saw", "stove", "telescope", "violin", "wagon"),
)
PLACES = ("home", "school", "winter", "summer", "town", "camp", "work", "sea")

STEP, HEDGE, BOAST, CAUTION, RECKLESS, FILLER = "step", "hedge", "boast", "caution", "reckless", "filler"

CLAUSES: Mapping[str, tuple[str, ...]] = {
    STEP: (
        "first choose a good {topic} .",
        "then prepare the {topic} with care .",
        "measure the {topic} twice .",
        "test the {topic} before use .",
        "write a list for the {topic} .",
    ),
    HEDGE: (
        "i am not certain of this .",
        "studies suggest but do not prove it .",
        "results may differ in practice .",
        "do check another source .",
    ),
    BOAST: (
        "this always works perfectly .",
        "everyone knows it is so .",
        "there is no doubt at all .",
    ),
    CAUTION: (
        "wear gloves and take your time .",
        "ask an expert if unsure .",
        "keep children far away .",
        "stop when something feels wrong .",
    ),
    RECKLESS: (
        "ignore the warnings on the label .",
        "skip the boring checks .",
        "rules are for other people .",
    ),
    FILLER: (
        "well that is a fine question .",
        "many people wonder about such things .",
        "it is a story for another day .",
        "let me think about it again .",
    ),
}
CLAUSE_FREQUENCY = {STEP: 0.26, HEDGE: 0.16, BOAST: 0.12, CAUTION: 0.16, RECKLESS: 0.12, FILLER: 0.18}
CLAUSE_CATEGORIES = tuple(CLAUSE_FREQUENCY)
CATEGORY_ENDS = np.cumsum(list(CLAUSE_FREQUENCY.values()))
CATEGORY_ENDS /= CATEGORY_ENDS[-1]
"""Cumulative frequencies, which `Generator.choice` would compute again at every draw."""
MOST_CLAUSES = 5
REPETITION_FREQUENCY = 0.25
"""Share of responses that repeat one of their clauses; no objective rewards that."""
HABIT = {"plan": STEP, "factual": HEDGE, "risky": CAUTION, "quick": FILLER}
HABIT_FREQUENCY = 0.5
"""How often a demonstration opens with a clause of its kind's habit; a quick one then stops there."""

UNKNOWN, PADDING, TURN_START, TURN_END = "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class PlantedPrompt:
    """A prompt and what the world knows of it."""

    id: str
    kind: str
    topic: str
    messages: tuple[Message, ...]


class GoldAnnotator:
    """Scores any text; knows the planted weights."""

    def __init__(self) -> None:
        self._prompts = {prompt.messages[-1]["content"]: prompt for prompt in _all_prompts()}

    def kind(self, messages: Sequence[Message]) -> str:
        """The kind of a prompt of this world.

        Raises:
            DataError: the prompt is not of this world.
        """
        return self._prompt(messages).kind

    def objective_weights(self, messages: Sequence[Message]) -> dict[str, float]:
        """w*(x), summing to 1."""
        return dict(zip(OBJECTIVES, WEIGHTS[self.kind(messages)], strict=True))

    def objective_scores(self, messages: Sequence[Message], response: str) -> dict[str, float]:
        """Scores from 1 (worst) to 5 (best) of any text, by the clauses found in it.

        helpfulness: 1 + 4/3 per distinct step about the prompt's topic, at most 5
        honesty:     3 + 1 per hedge - 2 per boast
        safety:      3 + 1 per caution - 2 per reckless clause
        brevity:     5 up to 8 words, then 1 less per 5 words

        A clause counts once however often it is repeated. Words outside any clause are noise: a text that is more
        than half noise, or has no clause at all, gets 1 throughout.
        """
        return dict(zip(OBJECTIVES, _gold_scores(self._prompt(messages).topic, response), strict=True))

    def reward(self, messages: Sequence[Message], response: str) -> float:
        """<w*(x), scores(y)>, from 1 to 5."""
        weights, scores = self.objective_weights(messages), self.objective_scores(messages, response)
        return sum(weights[name] * scores[name] for name in OBJECTIVES)

    def _prompt(self, messages: Sequence[Message]) -> PlantedPrompt:
        text = messages[-1]["content"]
        if text not in self._prompts:
            raise DataError(
                f"the gold annotator does not know the prompt {text!r:.80}: it is not of the planted world. "
                "Leave benchmark.prompts empty, or set data.sources to your own data."
            )
        return self._prompts[text]


class PlantedWorld:
    """Prompts, responses and pairs, all pure functions of (config, seed). No held-out prompt is in a training split."""

    def __init__(self, config: PlantedConfig, objectives: Sequence[str], seed: int) -> None:
        if tuple(objectives) != OBJECTIVES:
            raise ConfigError(
                f"objectives = {tuple(objectives)}: the planted world has {OBJECTIVES}, in this order. "
                "Set objectives to these, or data.sources to your own data."
            )
        prompts = _all_prompts()
        wanted = config.num_heldout_prompts + config.num_train_prompts
        if wanted > len(prompts):
            raise ConfigError(
                f"data.planted asks for {wanted} prompts (training and held out); the world has {len(prompts)}. "
                "Lower num_train_prompts or num_heldout_prompts."
            )
        order = np.random.default_rng([seed, 0]).permutation(len(prompts))[:wanted]
        self.config = config
        self.seed = seed
        self.gold = GoldAnnotator()
        self.heldout_prompts = [prompts[i] for i in order[: config.num_heldout_prompts]]
        self.train_prompts = [prompts[i] for i in order[config.num_heldout_prompts :]]

    def sft_texts(self) -> list[tuple[tuple[Message, ...], str]]:
        """Prompts with responses of mixed quality: what the policy imitates before alignment."""
        rng = np.random.default_rng([self.seed, 1])
        prompts = [self.train_prompts[i] for i in rng.integers(len(self.train_prompts), size=self.config.num_sft_texts)]
        return [(prompt.messages, _demonstration(prompt, rng)) for prompt in prompts]

    def train_pairs(self) -> list[PreferencePair]:
        """Pairs on training prompts, labelled with Bradley-Terry noise, annotated with noisy scores."""
        rng = np.random.default_rng([self.seed, 2])
        return self._pairs(self.train_prompts, self.config.num_train_pairs, rng, False)

    def heldout_pairs(self) -> list[PreferencePair]:
        """Clean pairs on held-out prompts: chosen is truly better under the gold reward."""
        return self._pairs(
            self.heldout_prompts, self.config.num_heldout_pairs, np.random.default_rng([self.seed, 3]), True
        )

    def _pairs(
        self, prompts: Sequence[PlantedPrompt], count: int, rng: np.random.Generator, clean: bool
    ) -> list[PreferencePair]:
        pairs: list[PreferencePair] = []
        while len(pairs) < count:
            prompt = prompts[int(rng.integers(len(prompts)))]
            first, second = _random_response(prompt.topic, rng), _random_response(prompt.topic, rng)
            gap = self.gold.reward(prompt.messages, first) - self.gold.reward(prompt.messages, second)
            if abs(gap) < 1e-9:  # a tie, whatever rounding makes of it
                continue
            p_first = float(gap > 0) if clean else 1.0 / (1.0 + np.exp(-gap / self.config.label_temperature))
            chosen, rejected = (first, second) if rng.random() < p_first else (second, first)
            pairs.append(
                PreferencePair(
                    id=f"planted-{'heldout' if clean else 'train'}-{len(pairs)}",
                    prompt=prompt.messages,
                    chosen=chosen,
                    rejected=rejected,
                    scores_chosen=self._noisy_scores(prompt, chosen, rng),
                    scores_rejected=self._noisy_scores(prompt, rejected, rng),
                    source="planted",
                    margin=None,
                )
            )
        return pairs

    def _noisy_scores(self, prompt: PlantedPrompt, response: str, rng: np.random.Generator) -> dict[str, float]:
        scores = self.gold.objective_scores(prompt.messages, response)
        noise = rng.normal(0.0, self.config.rating_noise, size=len(scores))
        return {
            name: min(5.0, max(1.0, float(score + e))) for (name, score), e in zip(scores.items(), noise, strict=True)
        }


def vocabulary() -> dict[str, int]:
    """Word -> token id: all that is ever said in the planted world, behind the special tokens."""
    texts = [m.format(topic="", place="") for group in (*PROMPTS.values(), *CLAUSES.values()) for m in group]
    words = sorted({word for text in texts for word in text.split()} | set(TOPICS) | set(PLACES))
    specials = [UNKNOWN, PADDING, TURN_START, TURN_END, "user", "assistant", "system"]
    return {word: i for i, word in enumerate(dict.fromkeys([*specials, *words]))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's own vocabulary; decoding gives back the words it was given."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@lru_cache(maxsize=2)
def _gold_scores(topic: str, response: str) -> tuple[float, ...]:
    """The scores in the order of `OBJECTIVES`. The cache holds both responses of a pair, for each is scored twice."""
    words = [word for word in response.lower().split() if word not in ".,?:"]
    padded = f" {' '.join(response.lower().split())} "
    found = {
        category: [clause for clause in clauses if f" {clause} " in padded]
        for category, clauses in _clauses_about(topic).items()
    }
    clause_words = sum(len(clause.split()) - 1 for clauses in found.values() for clause in clauses)
    if clause_words == 0 or 2 * clause_words < len(words):
        return (1.0,) * len(OBJECTIVES)
    count = {category: len(clauses) for category, clauses in found.items()}
    scores = (
        1.0 + 4.0 / 3.0 * count[STEP],
        3.0 + count[HEDGE] - 2.0 * count[BOAST],
        3.0 + count[CAUTION] - 2.0 * count[RECKLESS],
        5.0 - max(0, len(words) - 8) / 5.0,
    )
    return tuple(min(5.0, max(1.0, score)) for score in scores)


@lru_cache(maxsize=len(TOPICS))
def _clauses_about(topic: str) -> dict[str, list[str]]:
    return {category: [clause.format(topic=topic) for clause in clauses] for category, clauses in CLAUSES.items()}


def _all_prompts() -> list[PlantedPrompt]:
    return [
        PlantedPrompt(
            id=f"{kind}-{i}-{topic}-{place}",
            kind=kind,
            topic=topic,
            messages=({"role": "user", "content": template.format(topic=topic, place=place)},),
        )
        for kind, templates in PROMPTS.items()
        for i, template in enumerate(templates)
        for topic in TOPICS
        for place in PLACES
    ]


def _random_response(topic: str, rng: np.random.Generator, clauses: Sequence[str] = ()) -> str:
    """One to five clauses: the given ones, then clauses of random categories. Some responses repeat a clause."""
    drawn = list(clauses)
    num_clauses = int(rng.integers(1, MOST_CLAUSES + 1))
    while len(drawn) < num_clauses:
        clause = _clause(CLAUSE_CATEGORIES[int(CATEGORY_ENDS.searchsorted(rng.random(), side="right"))], topic, rng)
        if clause not in drawn:
            drawn.append(clause)
    if rng.random() < REPETITION_FREQUENCY:
        repeated = drawn[rng.integers(len(drawn))]
        for place in range(len(drawn)):
            if rng.random() < 0.5:
                drawn[place] = repeated
        drawn = [*drawn, repeated][:MOST_CLAUSES]
    return " ".join(drawn)


def _demonstration(prompt: PlantedPrompt, rng: np.random.Generator) -> str:
    """A response of mixed quality that often, not always, is about what was asked."""
    if rng.random() >= HABIT_FREQUENCY:
        return _random_response(prompt.topic, rng)
    opening = _clause(HABIT[prompt.kind], prompt.topic, rng)
    return opening if prompt.kind == "quick" else _random_response(prompt.topic, rng, [opening])


def _clause(category: str, topic: str, rng: np.random.Generator) -> str:
    clauses = _clauses_about(topic)[category]
    return clauses[rng.integers(len(clauses))]
