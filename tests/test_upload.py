"""Batches on their way to the device: the same values, out of memory that is used again."""

import numpy as np
import pytest
import torch

from kcache.upload import Upload


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
