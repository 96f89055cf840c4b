"""A judge for tests: it repeats the question."""

from pipeline.benchmark.judges.judge import JudgeRequest, JudgeSampling, Judgment, Unanswered

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=16, top_logprobs=0)


def ask(text, sampling=SAMPLING, pair=None):
    return JudgeRequest(messages=({"role": "user", "content": text},), sampling=sampling, pair=pair)


def judgment_of(text, tokens=(100, 7)):
    return Judgment(
        text=text,
        first_token_logprobs={},
        finish_reason="stop",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        time=1.5,
    )


class EchoJudge:
    """Repeats each question in capitals; leaves the questions in `refuses` unanswered."""

    def __init__(self, *, refuses=(), name="echo", model="e-1"):
        self.name, self.model, self.refuses = name, model, refuses
        self.received = []

    def judge(self, requests, record):
        for i, request in reversed(list(enumerate(requests))):
            question = request.messages[-1]["content"]
            self.received.append(question)
            record(i, Unanswered(reason="busy") if question in self.refuses else judgment_of(question.upper()))
