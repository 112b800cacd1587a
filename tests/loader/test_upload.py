"""Batches on their way to the device: the same values, out of memory that is used again once nobody holds it."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kcache.loader.upload import BatchMemory, Upload


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"latents": rng.standard_normal((3, 4)).astype(np.float16), "text_offsets": np.arange(4)}


def test_on_the_cpu_a_batch_is_the_arrays_themselves() -> None:
    upload = Upload(torch.device("cpu"), keep=2)
    given = arrays()
    batch = upload.send(given)
    upload.receive(batch)
    assert all(np.shares_memory(batch[name].numpy(), array) for name, array in given.items())


def test_staging_copies_into_memory_that_comes_back() -> None:
    upload = Upload(torch.device("cpu"), keep=2)
    tensor = torch.arange(5000.0)
    staged = upload._staged(tensor)
    address = staged.data_ptr()
    assert torch.equal(staged, tensor)
    assert address != tensor.data_ptr()
    del staged
    assert upload._staged(tensor).data_ptr() == address


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_batches_keep_their_values_while_memory_is_reused() -> None:
    upload = Upload(torch.device("cuda"), keep=2)
    batches = []
    for number in range(20):
        array = upload.memory.empty((64, 1000), np.dtype(np.float32))
        array[:] = number
        assert torch.from_numpy(array).is_pinned()
        batches.append(upload.send({"pinned": array, "pageable": np.full(10, number)}))
        del array
        upload.receive(batches[-1])
    for number, batch in enumerate(batches):
        assert (batch["pinned"] == number).all()
        assert (batch["pageable"] == number).all()


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
