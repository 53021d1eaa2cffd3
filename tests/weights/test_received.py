"""What vLLM's worker receives is what it proves: every byte counts, whatever a model reads."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from treerpo_ray.weights.files import WeightFile
from treerpo_ray.weights.manifest import LoadProof, Manifest, pack_weights

pytestmark = pytest.mark.engine

WEIGHTS = {"a": torch.arange(5.0), "b": torch.ones(3, 4), "c": torch.tensor(7)}


class Model:
    """Reads so many of the tensors that it is given."""

    def __init__(self, num_read: int) -> None:
        self.num_read = num_read
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for (name, weight), _ in zip(weights, range(self.num_read), strict=False):
            self.loaded[name] = weight.clone()


def packed(file: WeightFile) -> tuple[Manifest, list[np.ndarray]]:
    assert file.begin()
    return pack_weights(
        WEIGHTS.items(), version=1, dtype=torch.float32, chunk_bytes=100, allocate=file.part
    )


def receive(transfer, manifest: Manifest, file: WeightFile) -> LoadProof:
    from treerpo_ray.engine.vllm_worker import StoreUpdate

    place = file.seal()
    transfer.digests = ()
    for number, (offset, num_bytes) in enumerate(place.parts):
        info = manifest.update_info(number)
        update = StoreUpdate(path=place.path, offset=offset, num_bytes=num_bytes, **info)
        transfer.receive_weights(update)
    file.release()
    return LoadProof(version=1, digests=(transfer.digests,))


def make_transfer(num_read: int):
    from treerpo_ray.engine.vllm_worker import StoreInit, StoreTransfer

    transfer = StoreTransfer.__new__(StoreTransfer)  # there is no engine to make it for
    transfer.model, transfer.device = Model(num_read), torch.device("cpu")
    transfer.init_transfer_engine(StoreInit())
    return transfer


@pytest.mark.parametrize("num_read", [1, 3])
def test_what_is_received_is_loaded_and_proved_however_many_tensors_the_model_reads(
    num_read,
) -> None:
    file, transfer = WeightFile(), make_transfer(num_read)
    manifest, _ = packed(file)
    receive(transfer, manifest, file).check(manifest)
    if num_read == 3:
        assert transfer.model.loaded.keys() == WEIGHTS.keys()
    for name, weight in transfer.model.loaded.items():
        assert torch.equal(weight, WEIGHTS[name]) and weight.dtype == WEIGHTS[name].dtype


def test_a_byte_that_is_flipped_anywhere_in_the_file_is_found_also_in_one_that_was_mapped() -> None:
    file, transfer = WeightFile(), make_transfer(3)
    manifest, chunks = packed(file)
    sizes = [len(chunk) for chunk in chunks]
    assert len(sizes) > 1
    receive(transfer, manifest, file).check(manifest)
    for number, size in enumerate(sizes):
        for byte in range(size):
            _, chunks = packed(file)
            chunks[number][byte] ^= 1
            with pytest.raises(RuntimeError, match="worker 0 received other bytes"):
                receive(transfer, manifest, file).check(manifest)
    packed(file)
    receive(transfer, manifest, file).check(manifest)
