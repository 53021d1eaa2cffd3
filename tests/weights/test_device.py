"""Memory of a GPU, as other processes map it: what no CPU runs is held against torch."""

import inspect

from torch.multiprocessing.reductions import rebuild_cuda_tensor

from treerpo_ray.weights.device import DEVICE_ARGUMENT


def test_the_number_of_the_device_is_put_where_torch_takes_it() -> None:
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[DEVICE_ARGUMENT] == (
        "storage_device"
    )
