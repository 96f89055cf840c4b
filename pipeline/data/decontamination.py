"""Prompts that are both in the training data and in an evaluation file: a score on them measures memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipeline.data.files import Row, read_rows
from pipeline.data.preferences import normalised_prompt
from pipeline.data.prompts import EVALUATION_PROMPT_FIELDS, prompt_of
from pipeline.records import Message, Metrics

NGRAM_WORDS = 13
"""Words in a row that two prompts do not share by chance (Brown et al. 2020, arXiv:2005.14165, appendix C)."""

EXAMPLES_PER_FILE = 5

WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """One prompt of an evaluation file; a text that occurs several times counts once."""

    file: str
    place: str
    """"<file>, line <n>" of its first appearance."""
    text: str
    """Normalised, without system turns."""


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """An evaluation prompt, and the first training prompt that repeats it."""

    evaluation: str
    """File and line of the evaluation prompt."""
    training_id: str
    shared: str
    """The whole normalised prompt, or the 13 words the two have in common."""


@dataclass(frozen=True, kw_only=True)
class FileContamination:
    """How much of one evaluation file is in the training data."""

    file: str
    prompts: int
    """Distinct prompts of the file."""
    exact: int
    """How many of them equal a training prompt, word for word."""
    overlapping: int
    """How many others share 13 words in a row with a training prompt."""
    examples: tuple[SharedPrompt, ...]
    """The first few, exact ones before overlapping ones."""


@dataclass(frozen=True, kw_only=True)
class SourceContamination:
    """How much of one source of training prompts is in the evaluation files. Repeated prompts count each time."""

    prompts: int
    exact: int
    overlapping: int


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """What a training run logs of its data and its evaluation files."""

    training_prompts: int
    training_exact: int
    """Training prompts that are an evaluation prompt, word for word; repeated ones count each time."""
    training_overlapping: int
    """Training prompts that are not, but share 13 words in a row with one."""
    files: tuple[FileContamination, ...]
    sources: Mapping[str, SourceContamination]
    """The same counts for every source of training prompts."""

    def metrics(self) -> Metrics:
        """The counts, named by file and by source."""
        counts = {
            "contamination/training_prompts": float(self.training_prompts),
            "contamination/training_exact": float(self.training_exact),
            "contamination/training_overlapping": float(self.training_overlapping),
        }
        for file in self.files:
            counts[f"contamination/{file.file}/prompts"] = float(file.prompts)
            counts[f"contamination/{file.file}/exact"] = float(file.exact)
            counts[f"contamination/{file.file}/overlapping"] = float(file.overlapping)
        for name, source in self.sources.items():
            for kind, count in asdict(source).items():
                counts[f"contamination/source/{name}/{kind}"] = float(count)
        return counts


class EvaluationPrompts:
    """The prompts of evaluation files, found by their text and by their 13-grams.

    Evaluation files are small and stay in memory; training prompts stream past them. A word is a run of messages and
    digits, so a script without spaces has few 13-grams: there only the exact match speaks.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Reads JSONL or Parquet with a field `messages`, `prompt`, `instruction` or `turns` (of which the first).

        Raises:
            DataError: a file or a row cannot be used; names file, line and field.
        """
        self.files = tuple(files)
        self.prompts: list[EvaluationPrompt] = []
        self._by_text: defaultdict[str, list[int]] = defaultdict(list)
        self._by_ngram: defaultdict[str, list[int]] = defaultdict(list)
        for file in files:
            seen: set[str] = set()
            for row in read_rows(file):
                text = _text(_messages(row))
                if text in seen:
                    continue
                seen.add(text)
                self._by_text[text].append(len(self.prompts))
                for ngram in set(_ngrams(text)):
                    self._by_ngram[ngram].append(len(self.prompts))
                self.prompts.append(EvaluationPrompt(file=file, place=row.place, text=text))

    def holds(self, messages: Sequence[Message]) -> bool:
        """Whether this training prompt is an evaluation prompt, word for word: a run leaves such prompts out."""
        return _text(messages) in self._by_text

    def exact(self, text: str) -> Mapping[int, str]:
        """Positions in `prompts` of the prompts that are this normalised text, and the text."""
        return dict.fromkeys(self._by_text.get(text, ()), text)

    def overlapping(self, text: str) -> Mapping[int, str]:
        """Positions of the prompts that share 13 words in a row with it, and the first such words."""
        found: dict[int, str] = {}
        for ngram in _ngrams(text):
            for position in self._by_ngram.get(ngram, ()):
                found.setdefault(position, ngram)
        return found


def find_contamination(
    training: Iterable[tuple[str, str, Sequence[Message]]], evaluation: EvaluationPrompts
) -> Contamination:
    """Streams (source, id, messages) of every training prompt past the evaluation prompts.

    See docs/method.md section 8.
    """
    exact: dict[int, SharedPrompt] = {}
    overlapping: dict[int, SharedPrompt] = {}
    prompts, same_prompts, similar_prompts = Counter[str](), Counter[str](), Counter[str]()
    for source, identity, messages in training:
        text = _text(messages)
        same, similar = evaluation.exact(text), evaluation.overlapping(text)
        prompts[source] += 1
        same_prompts[source] += bool(same)
        similar_prompts[source] += bool(similar) and not same
        for matches, found in ((same, exact), (similar, overlapping)):
            for position, shared in matches.items():
                if position not in found:
                    place = evaluation.prompts[position].place
                    found[position] = SharedPrompt(evaluation=place, training_id=identity, shared=shared)
    return Contamination(
        training_prompts=prompts.total(),
        training_exact=same_prompts.total(),
        training_overlapping=similar_prompts.total(),
        files=tuple(_of_file(file, evaluation, exact, overlapping) for file in evaluation.files),
        sources={
            name: SourceContamination(prompts=count, exact=same_prompts[name], overlapping=similar_prompts[name])
            for name, count in prompts.items()
        },
    )


def _of_file(
    file: str, evaluation: EvaluationPrompts, exact: Mapping[int, SharedPrompt], overlapping: Mapping[int, SharedPrompt]
) -> FileContamination:
    positions = [position for position, prompt in enumerate(evaluation.prompts) if prompt.file == file]
    same = [exact[p] for p in positions if p in exact]
    similar = [overlapping[p] for p in positions if p in overlapping and p not in exact]
    return FileContamination(
        file=file,
        prompts=len(positions),
        exact=len(same),
        overlapping=len(similar),
        examples=tuple([*same, *similar][:EXAMPLES_PER_FILE]),
    )


def _messages(row: Row) -> tuple[Message, ...]:
    """The prompt of an evaluation row."""
    return prompt_of(row, EVALUATION_PROMPT_FIELDS)


def _text(messages: Sequence[Message]) -> str:
    """Normalised; without system turns, which are boilerplate that one side may have and the other not."""
    return normalised_prompt([message for message in messages if message["role"] != "system"])


def _ngrams(text: str) -> Iterator[str]:
    """Every 13 words in a row, punctuation dropped."""
    words = WORD.findall(text)
    return (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))
