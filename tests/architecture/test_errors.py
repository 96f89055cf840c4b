"""Every error is in the drawn tree and crosses a process boundary unchanged."""

import inspect
import pickle

import pytest

from pipeline import errors

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    error = kind("rollout needs 4 GPUs, 2 are free. Lower cluster.rollout.workers.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert isinstance(copy, errors.PipelineError)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_drawn(kind):
    assert f"{kind.__name__}" in errors.__doc__
    assert kind.__doc__
