"""Batch memory: used again when nobody holds it, never while somebody does."""

import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kcache.buffers import BatchMemory

FLOAT = np.dtype(np.float32)


def test_memory_comes_back_when_the_last_reference_goes() -> None:
    memory = BatchMemory(keep=2)
    array = memory.empty((100, 100), FLOAT)
    address = array.ctypes.data
    del array
    assert memory.empty((100, 100), FLOAT).ctypes.data == address


def test_a_tensor_or_a_view_keeps_its_memory() -> None:
    memory = BatchMemory(keep=2)
    tensor = torch.from_numpy(memory.empty((100, 100), FLOAT))[3:5]
    tensor.fill_(7)
    view = tensor.numpy()
    del tensor
    gc.collect()
    for _ in range(3):
        memory.empty((100, 100), FLOAT)[:] = 0
    assert (view == 7).all()


@given(shapes=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=20))
def test_arrays_have_the_shape_asked_and_never_overlap(shapes: list[tuple[int, int]]) -> None:
    memory = BatchMemory(keep=3)
    arrays = [memory.empty(shape, FLOAT) for shape in shapes]
    for number, array in enumerate(arrays):
        array[:] = number
    for number, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape
        assert array.flags.c_contiguous
        assert (array == number).all()


def test_blocks_are_made_only_when_none_is_free() -> None:
    made = []

    def new_block(size: int) -> np.ndarray:
        made.append(size)
        return np.empty(size, np.uint8)

    memory = BatchMemory(keep=2, new_block=new_block)
    for _ in range(5):
        first, second = memory.empty((100, 100), FLOAT), memory.empty((100, 100), FLOAT)
        del first, second
    assert len(made) == 2
