"""A training state is cut wherever its writers were, and put together as its readers are."""

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.learning.training_state import Fragment, SavedState, TrainingStatePart

SHAPES = {"a.weight": (2, 3), "b": (4,)}
WHOLE = {"a.weight": torch.arange(6.0), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}


def fragment(name, start, stop, *, fill=True, step=7.0):
    """Elements [start, stop) of a parameter; its moments are a tenth and a hundredth of it."""
    weight = WHOLE[name][start:stop].clone() if fill else torch.full((stop - start,), torch.nan)
    adam = {"exp_avg": weight / 10, "exp_avg_sq": weight / 100, "step": torch.tensor(step if fill else 0.0)}
    return Fragment.of(name, start, weight, adam)


def write(directory, *parts):
    for part, fragments in enumerate(parts):
        TrainingStatePart.take(fragments, SHAPES, part=part, num_parts=len(parts)).write(str(directory))


THREE = (
    [fragment("a.weight", 0, 4)],
    [fragment("a.weight", 4, 6), fragment("b", 0, 1)],
    [fragment("b", 1, 4)],
)


@pytest.mark.parametrize("cuts", [((0, 6),), ((0, 3), (3, 6)), ((0, 1), (1, 5), (5, 6))])
def test_three_writers_are_read_by_any_number_of_readers(cuts, tmp_path):
    write(tmp_path, *THREE)
    with SavedState(str(tmp_path), SHAPES) as saved:
        for start, stop in cuts:
            mine = fragment("a.weight", start, stop, fill=False)
            saved.restore([mine])
            assert mine.tensors["weight"].tolist() == list(range(start, stop))
            assert torch.equal(mine.tensors["exp_avg"], torch.arange(float(start), stop) / 10)
            assert torch.equal(mine.tensors["exp_avg_sq"], torch.arange(float(start), stop) / 100)
            assert mine.step == 7.0
        assert saved.read("weight", "b", 0, 4).tolist() == [10.0, 20.0, 30.0, 40.0]


def test_a_snapshot_keeps_what_was_while_the_learner_goes_on(tmp_path):
    live = fragment("b", 0, 4)
    snapshot = TrainingStatePart.take([live], {"b": (4,)}, part=0, num_parts=1)
    live.tensors["weight"].zero_()
    live.step.add_(1)
    snapshot.write(str(tmp_path))
    with SavedState(str(tmp_path), {"b": (4,)}) as saved:
        assert saved.read("weight", "b", 0, 4).tolist() == [10.0, 20.0, 30.0, 40.0]


def test_a_state_of_which_a_part_is_missing_is_refused(tmp_path):
    write(tmp_path, *THREE)
    (tmp_path / "part-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole training state: it holds part-00000-of-00003"):
        SavedState(str(tmp_path), SHAPES)
    with pytest.raises(CheckpointError, match=r"it holds nothing of it. Delete this checkpoint"):
        SavedState(str(tmp_path / "elsewhere"), SHAPES)


def test_half_a_file_is_refused(tmp_path):
    write(tmp_path, *THREE)
    part = tmp_path / "part-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Delete this checkpoint to resume"):
        SavedState(str(tmp_path), SHAPES)


def test_a_gap_between_parts_is_refused(tmp_path):
    write(tmp_path, [fragment("b", 0, 1), fragment("b", 2, 4)])
    with SavedState(str(tmp_path), SHAPES) as saved, pytest.raises(CheckpointError, match="from 1 on of weight of b"):
        saved.read("weight", "b", 0, 4)


@pytest.mark.parametrize(
    ("shapes", "letter"),
    [
        ({"a.weight": (3, 2), "b": (4,)}, r"the first is a.weight \(saved \(2, 3\), now trained \(3, 2\)\)"),
        ({"a.weight": (2, 3)}, r"the first is b \(saved \(4,\), now trained not at all\)"),
        (SHAPES | {"c": (1,)}, r"the first is c \(saved not at all, now trained \(1,\)\)"),
    ],
)
def test_the_state_of_another_model_is_refused(shapes, letter, tmp_path):
    write(tmp_path, *THREE)
    with pytest.raises(CheckpointError, match=rf"does not restore this model: 1 parameters differ, {letter}"):
        SavedState(str(tmp_path), shapes)
