"""Share ahead: the next share of a worker on its way while it trains on the one before."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pyarrow as pa
import ray.data


class ShareAhead:
    """A worker's shares, the next of which is fetched while it trains on the one before.

    Ray Data deals shares out by count, not by who asks first, so that asking early takes nothing
    from another worker; what may be in flight at all is the gate's to say. Ray's own prefetch
    would hold a share back until the next one has come, which at staleness 0 is never.
    """

    def __init__(self, shard: ray.data.DataIterator) -> None:
        batches = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        self._batches: Iterator[pa.Table] = iter(batches)
        self._ask()

    def take(self) -> pa.Table | None:
        """The next share, waiting for it; None if the stream has ended."""
        share = self._asked.result()
        self._ask()
        return share

    def _ask(self) -> None:
        self._asked: Future[pa.Table | None] = Future()
        # A daemon: behind the last step it waits for a share that never comes.
        threading.Thread(target=self._fetch, args=(self._asked,), daemon=True).start()

    def _fetch(self, asked: "Future[pa.Table | None]") -> None:
        try:
            asked.set_result(next(self._batches, None))
        except BaseException as error:  # raised again in `take`
            asked.set_exception(error)
