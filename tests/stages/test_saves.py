"""A save is written behind the training's back, and committed only when it is written."""

import os
import threading
from pathlib import Path

import pytest

from pipeline.errors import WorkspaceError
from pipeline.stages.workspace import CheckpointStore


class Slow:
    """A snapshot that is written when it is told to, and fails with an error if it has one."""

    def __init__(self, error=None):
        self.may_end = threading.Event()
        self._error = error

    def write(self, uri):
        assert self.may_end.wait(30)
        if self._error is not None:
            raise self._error
        os.makedirs(uri)
        Path(uri, "part").write_text("state")


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(str(tmp_path), keep=2)


def committed(store):
    return store._committed_steps()


def test_training_goes_on_while_a_save_is_written_and_nothing_is_committed_before_it_is(store):
    slow = Slow()
    store.save(3, lambda: slow, {"kl": 0.5})
    store.require_sound()  # the next step, and all is well
    assert committed(store) == []
    slow.may_end.set()
    store.settle()
    assert (store.latest().step, store.latest().state) == (3, {"kl": 0.5})


def test_the_next_save_waits_for_the_one_before_so_that_one_copy_is_held(store):
    first, order = Slow(), []
    store.save(3, lambda: first, {})
    threading.Timer(0.2, lambda: (order.append("first may end"), first.may_end.set())).start()
    second = Slow()
    second.may_end.set()
    store.save(7, lambda: order.append("second is copied") or second, {})
    store.settle()
    assert order == ["first may end", "second is copied"]
    assert committed(store) == [3, 7]


def test_a_failed_save_surfaces_at_the_next_step_once_and_leaves_the_commit_before(store):
    good, bad = Slow(), Slow(WorkspaceError("no space is left"))
    good.may_end.set()
    store.save(3, lambda: good, {})
    store.save(7, lambda: bad, {})
    bad.may_end.set()
    store._save_thread.join()
    with pytest.raises(WorkspaceError, match="no space is left"):
        store.require_sound()
    store.require_sound()
    assert store.latest().step == 3


def commit(store, step, **metrics):
    written = Slow()
    written.may_end.set()
    store.save(step, lambda: written, {"metrics": metrics})
    store.settle()


@pytest.mark.parametrize(("keep_best", "kept", "best"), [("accuracy", [3, 8, 9], 3), ("-accuracy", [1, 8, 9], 1)])
def test_the_best_commit_is_kept_beside_the_newest(keep_best, kept, best, tmp_path):
    store = CheckpointStore(str(tmp_path), keep=2, keep_best=keep_best)
    for step, accuracy in {0: 0.5, 1: 0.2, 2: 0.7, 3: 0.9, 4: 0.3, 8: 0.6}.items():
        commit(store, step, accuracy=accuracy)
    commit(store, 9)  # on short notice, without an evaluation
    assert committed(store) == kept
    assert store.better_than({"accuracy": 0.55}).step == best


def test_only_a_checkpoint_that_beats_the_last_model_replaces_it(tmp_path):
    store = CheckpointStore(str(tmp_path), keep=1, keep_best="accuracy")
    assert store.better_than({"accuracy": 0.1}) is None
    commit(store, 0, accuracy=0.8)
    assert store.better_than({"accuracy": 0.8}) is None
    assert store.better_than({"accuracy": 0.79}).step == 0
    assert CheckpointStore(str(tmp_path), keep=1).better_than({"accuracy": 0.1}) is None
