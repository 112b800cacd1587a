"""How many actors a cluster has room for, and what each takes of a machine."""

import pytest

from kcache.engines.cluster import Slot, room_for, slot_of

GPU_NODE, CPU_NODE, HEAD = {"CPU": 16.0, "GPU": 8.0}, {"CPU": 6.0}, {"memory": 1e9}


@pytest.mark.parametrize(
    ("machines", "device", "threads", "workers", "slot"),
    [
        ([HEAD, GPU_NODE], None, 4, None, Slot(gpus=1, cpus=2)),  # its share of the machine's
        ([GPU_NODE], None, 4, 1, Slot(gpus=1, cpus=1)),
        ([GPU_NODE], None, 4, 64, Slot(gpus=1, cpus=2)),  # more would leave GPUs without anyone
        ([GPU_NODE, CPU_NODE], "cpu", 4, None, Slot(gpus=0, cpus=4)),
        ([CPU_NODE, HEAD], None, 4, 2, Slot(gpus=0, cpus=4)),
        ([CPU_NODE], None, 64, None, Slot(gpus=0, cpus=6)),
        ([HEAD], None, 4, None, Slot(gpus=0, cpus=1)),  # what will come, nobody knows
        ([CPU_NODE], "cuda", 4, None, Slot(gpus=1, cpus=1)),
    ],
)
def test_an_actor_takes_a_gpu_where_there_are_any_and_else_the_cpus_that_it_computes_with(
    machines: list[dict[str, float]], device: str | None, threads: int, workers: int | None, slot: Slot
) -> None:
    assert slot_of(machines, device, threads, workers) == slot


@pytest.mark.parametrize(
    ("slot", "room"),
    [(Slot(gpus=1, cpus=2), 8), (Slot(gpus=1, cpus=4), 4), (Slot(gpus=0, cpus=4), 5), (Slot(gpus=0, cpus=32), 0)],
)
def test_there_is_room_for_as_many_as_fit_into_each_machine(slot: Slot, room: int) -> None:
    assert room_for([HEAD, GPU_NODE, CPU_NODE], slot) == room
