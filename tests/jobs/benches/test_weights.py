"""Benches that stand between parts of their own: these are there, and what they do is right."""

import asyncio
from dataclasses import astuple

import pytest
import torch

from jobs.benches.weights import SyncPath


@pytest.mark.ray
@pytest.mark.engine
def test_a_sync_of_the_bench_goes_all_the_way_and_is_proved(ray_cluster) -> None:
    threads = torch.get_num_threads()
    path = SyncPath(num_parameters=10**7, sent_as=torch.bfloat16, chunk_bytes=2**23)
    try:
        times = asyncio.run(path.round())
    finally:
        torch.set_num_threads(threads)
    assert min(astuple(times)) >= 0
    loaded = path.transfer.model.parameters_by_name
    assert loaded.keys() == path.weights.keys()
    assert all(torch.equal(loaded[name], path.weights[name].bfloat16()) for name in loaded)
