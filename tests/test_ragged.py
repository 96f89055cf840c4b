"""Rows of different lengths in one tensor: by hand, and as Ray pickles them."""

import pickle

import numpy as np
import pytest
import torch
from ray import cloudpickle

from pipeline.errors import ShapeError
from pipeline.ragged import Ragged, in_padded_blocks


def rows_of(ragged):
    return [row.tolist() for row in ragged]


def ragged(*rows):
    return Ragged.of(rows, np.int32)


def test_rows_lie_end_to_end():
    three = ragged([1, 2], [], [3, 4, 5])
    assert three.values.tolist() == [1, 2, 3, 4, 5]
    assert three.values.dtype == torch.int32
    assert three.offsets.tolist() == [0, 2, 2, 5]
    assert three.lengths.tolist() == [2, 0, 3]
    assert len(three) == 3
    assert rows_of(three) == [[1, 2], [], [3, 4, 5]]


def test_a_row_is_a_view():
    three = ragged([1, 2], [], [3, 4, 5])
    assert three[2].data_ptr() == three.values.data_ptr() + 2 * 4
    with pytest.raises(IndexError, match="row 3 of 3"):
        three[3]


def test_rows_are_selected_in_any_order_and_more_than_once():
    four = ragged([1], [2, 3], [], [4, 5, 6])
    assert rows_of(four.select(torch.tensor([3, 0, 3, 2]))) == [[4, 5, 6], [1], [4, 5, 6], []]
    assert rows_of(four.select(torch.tensor([], dtype=torch.int64))) == []


def test_consecutive_rows_stay_a_view():
    four = ragged([1], [2, 3], [], [4, 5, 6])
    middle = four.select(torch.tensor([1, 2]))
    assert rows_of(middle) == [[2, 3], []]
    assert middle.values.data_ptr() == four[1].data_ptr()


def test_parts_are_joined():
    assert rows_of(Ragged.concat([ragged([1, 2], []), ragged(), ragged([3])])) == [[1, 2], [], [3]]


@pytest.mark.parametrize("offsets", [[], [0, 2], [1, 3], [0, 4]])
def test_offsets_that_do_not_divide_the_values_are_refused(offsets):
    with pytest.raises(ShapeError, match=r"do not divide values of shape \[3\]"):
        Ragged(torch.zeros(3), torch.tensor(offsets, dtype=torch.int64))


def test_a_pickle_holds_the_numbers_of_its_rows_alone():
    """As Ray does it: a slice of a large tensor travels without the rest, and once."""
    many = Ragged.of([[n] * 1000 for n in range(100)], np.int32)
    few = many.select(torch.tensor([7, 8]))
    buffers = []
    pickled = cloudpickle.dumps([few, few], protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 1000
    assert sorted(len(buffer.raw()) for buffer in buffers) == [3 * 8, 2 * 1000 * 4]
    assert rows_of(pickle.loads(pickle.dumps(few))) == [[7] * 1000, [8] * 1000]


def test_what_comes_out_of_a_pickle_shares_the_memory_that_it_came_in():
    buffers = []
    pickled = cloudpickle.dumps(ragged([1, 2], [3]), protocol=5, buffer_callback=buffers.append)
    arrived = [memoryview(buffer.raw().tobytes()) for buffer in buffers]
    received = cloudpickle.loads(pickled, buffers=arrived)
    assert rows_of(received) == [[1, 2], [3]]
    assert received.values.data_ptr() == np.frombuffer(arrived[0], np.int32).ctypes.data


def test_equal_rows_are_equal_and_rows_that_are_cut_elsewhere_are_not():
    rows = Ragged.of([[1, 2], [3]], np.int32)
    assert rows == Ragged.of([[1, 2], [3]], np.int32)
    assert rows != Ragged.of([[1], [2, 3]], np.int32)
    assert rows != Ragged.of([[1, 2], [4]], np.int32)
    assert rows != Ragged.of([[1, 2], [3]], np.int64)


def test_sums_of_rows_are_those_of_the_row_alone():
    rows = Ragged.of([[1.5, 2.5], [], [4.0], []], np.float32)
    assert rows.sums().tolist() == [4.0, 0.0, 4.0, 0.0]
    assert ragged().sums().tolist() == []
    # In float32 the small number would be lost.
    assert Ragged.of([[2.0**24, 1.0, -(2.0**24)]], np.float32).sums().tolist() == [1.0]


@pytest.mark.parametrize("block_values", [1, 5, 6, 100])
def test_blocks_of_similar_length_come_back_in_their_order(block_values):
    numbers = Ragged.of([[1.0], [2.0, 3.0, 4.0], [5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)
    shapes = []

    def from_the_end(values, signs, mask):
        shapes.append(tuple(values.shape))
        assert (values[~mask] == 0).all()
        return (values * signs).flip(1).cumsum(1).flip(1)

    signs = Ragged(torch.where(numbers.values == 5, -1.0, 1.0), numbers.offsets)
    result = in_padded_blocks(from_the_end, numbers, signs, block_values=block_values)
    assert result.tolist() == [1.0, 9.0, 7.0, 4.0, 1.0, 6.0, 24.0, 17.0, 9.0]
    assert (
        shapes
        == {
            1: [(1, 3), (1, 3), (1, 2), (1, 1)],
            5: [(1, 3), (1, 3), (2, 2)],
            6: [(2, 3), (2, 2)],
            100: [(4, 3)],
        }[block_values]
    )
