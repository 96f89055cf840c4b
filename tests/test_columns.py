"""Columns are sequences of records: what goes in comes out, row by row, in slices and over Ray's pickles."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from ray import cloudpickle

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.ragged import Ragged
from pipeline.records import CriticTargets, Experience, Prompt, PromptGroup, Rollout, TokenEvaluation

A = Rollout(
    prompt=Prompt(id="a", messages=({"role": "user", "content": "why ?"},), token_ids=(1, 2)),
    sample_index=0,
    response_ids=(7, 8, 9),
    response_text="because",
    logprobs=(-0.5, -1.0, -1.5),
    policy_version=3,
    finish_reason="stop",
)
B = replace(A, sample_index=1, response_ids=(5,), response_text="", logprobs=(-2.0,), finish_reason="length")
C = replace(
    A, prompt=replace(A.prompt, id="c", token_ids=(4,)), policy_version=4, response_ids=(6, 6), logprobs=(0.0, -1.0)
)


def test_rollouts_are_read_row_by_row_and_in_slices():
    rollouts = Rollouts.of([A, B, C])
    assert [*rollouts] == [A, B, C]
    assert (rollouts[1], rollouts[-1], len(rollouts)) == (B, C, 3)
    assert [*rollouts[1:]] == [B, C]
    assert [*rollouts[::-2]] == [C, A]
    assert [*rollouts[:0]] == []
    with pytest.raises(IndexError):
        rollouts[3]


def test_the_columns_of_rollouts():
    rollouts = Rollouts.concat([Rollouts.of([A, B]), Rollouts.of([C])])
    assert rollouts.response_ids.values.tolist() == [7, 8, 9, 5, 6, 6]
    assert rollouts.response_ids.offsets.tolist() == [0, 3, 4, 6]
    assert rollouts.num_response_tokens == 6
    assert rollouts.conversations == [A.prompt.messages, B.prompt.messages, C.prompt.messages]
    assert [*rollouts] == [A, B, C]


def test_the_tokens_alone_are_groups_of_one_response():
    sequences = Rollouts.of([A, B, C]).sequences
    assert [*sequences] == [A.tokens, B.tokens, C.tokens]
    assert sequences.select(torch.tensor([2, 0]))[0] == PromptGroup(prompt_ids=(4,), response_ids=((6, 6),))


def test_evaluations_are_read_row_by_row():
    one = TokenEvaluation(logprobs=(-1.0, -2.0), reference_logprobs=(-1.5, -2.5), values=(0.0, 0.5))
    two = TokenEvaluation(logprobs=(-3.0,), reference_logprobs=(-3.5,), values=(1.0,))
    evaluations = TokenEvaluations.of([one, two])
    assert [*evaluations] == [one, two]
    assert [*evaluations[1:]] == [two]
    assert evaluations.values.values.tolist() == [0.0, 0.5, 1.0]


def test_rows_of_a_batch_travel_without_the_rest_of_it():
    many = Rollouts.of([replace(A, response_ids=(n,) * 1000, logprobs=(-0.5,) * 1000) for n in range(50)])
    buffers = []
    pickled = cloudpickle.dumps(many[20:22], protocol=5, buffer_callback=buffers.append)
    assert len(pickled) + sum(len(buffer.raw()) for buffer in buffers) < 3 * 2 * 1000 * 4
    received = cloudpickle.loads(pickled, buffers=[buffer.raw().tobytes() for buffer in buffers])
    assert [*received] == [*many[20:22]]


def test_an_experience_travels_without_a_copy_of_its_tensors():
    numbers = torch.tensor([0.5, 1.5, 2.5])
    experience = Experience(
        sequences=Rollouts.of([B, C]).sequences,
        rows=(0, 1),
        offsets=torch.tensor([0, 1, 3]),
        logprobs=numbers,
        reference_logprobs=numbers + 1,
        advantages=numbers + 2,
        importance_weights=numbers + 3,
        kl_loss_coefficient=0.5,
        critic=CriticTargets(values=numbers + 4, returns=numbers + 5),
        num_response_tokens=3,
    )
    buffers = []
    pickled = cloudpickle.dumps(experience, protocol=5, buffer_callback=buffers.append)
    arrived = [buffer.raw().tobytes() for buffer in buffers]
    received = cloudpickle.loads(pickled, buffers=arrived)
    addresses = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in arrived}
    for record, other in ((received, experience), (received.critic, experience.critic)):
        for field in fields(record):
            value, expected = getattr(record, field.name), getattr(other, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected), field.name
                assert value.data_ptr() in addresses, field.name
    assert [*received.sequences] == [B.tokens, C.tokens]
    assert (received.rows, received.kl_loss_coefficient, received.num_response_tokens) == ((0, 1), 0.5, 3)


def test_a_column_holds_32_bits_a_token():
    rollouts = Rollouts.of([A])
    assert isinstance(rollouts.response_ids, Ragged)
    assert (rollouts.response_ids.values.dtype, rollouts.logprobs.values.dtype) == (torch.int32, torch.float32)
