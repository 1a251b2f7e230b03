"""Random access to the records of ArrayRecord files in a bucket, by way of local copies.

Records are read in a shuffled order, which needs every shard all the time. So each is copied once
for all processes of a host, ahead of its first use; where the cache has no room for all, the least
recently used are let go of and fetched again.
"""

import contextlib
import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource

from jina_jax.storage import BucketPath
from jina_jax.storage.cache import cache_limit, fetch_file, let_go

logger = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A file of records in a bucket."""

    file: BucketPath
    records: int
    bytes: int


class _Open:
    """A shard whose copy is here, and how many threads are reading it."""

    def __init__(self, source: ArrayRecordDataSource):
        self.source, self.readers = source, 0


class CachedShards:
    """The records of some shards, one behind the other, as TFDS' data sources give them."""

    def __init__(self, shards: Sequence[Shard], deserialize: Callable[[bytes], Any]):
        self._shards, self._deserialize = list(shards), deserialize
        self._ends = list(accumulate(shard.records for shard in shards))
        self._limit = cache_limit()
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._turn, self._fetching = threading.Lock(), [threading.Lock() for _ in shards]
        if (needed := sum(shard.bytes for shard in shards)) > self._limit:
            logger.warning(
                "%s has %.1f GB and the cache %.1f: shards will be fetched again and again; raise JINA_JAX_CACHE_GB",
                *(shards[0].file.parent, needed / 1e9, self._limit / 1e9),
            )
        threading.Thread(target=self._prefetch, daemon=True, name="shards").start()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        by_shard: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            by_shard.setdefault(bisect_right(self._ends, index), []).append(place)
        found: list[Any] = [None] * len(indices)
        for number, places in by_shard.items():
            first = self._ends[number] - self._shards[number].records
            with self._reading(number) as source:
                records = source.__getitems__([indices[place] - first for place in places])
            for place, record in zip(places, records, strict=True):
                found[place] = self._deserialize(record)
        return found

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[ArrayRecordDataSource]:
        """Yields the records of a shard, which is not let go of meanwhile."""
        opened = self._opened(number)
        try:
            yield opened.source
        finally:
            with self._turn:
                opened.readers -= 1

    def _opened(self, number: int) -> _Open:
        with self._fetching[number]:  # threads that want the same shard wait, others do not
            with self._turn:
                if opened := self._open.get(number):
                    self._open.move_to_end(number)
                    opened.readers += 1
                    return opened
                self._make_room(self._shards[number].bytes)
            opened = _Open(ArrayRecordDataSource(str(fetch_file(self._shards[number].file))))
            opened.readers = 1
            with self._turn:
                self._open[number] = opened
            return opened

    def _make_room(self, needed: int) -> None:
        held = sum(self._shards[number].bytes for number in self._open)
        for number, opened in list(self._open.items()):
            if held + needed <= self._limit:
                return
            if not opened.readers:
                self._open.pop(number).source.__exit__(None, None, None)
                let_go(self._shards[number].file)
                held -= self._shards[number].bytes

    def _prefetch(self) -> None:
        """Fetches the first shards that the cache has room for, before they are asked for."""
        room = self._limit
        for number, shard in enumerate(self._shards):
            room -= shard.bytes
            if room < 0:
                return
            try:
                with self._reading(number):
                    pass
            except Exception as error:  # whoever reads the shard hears of it
                logger.debug("%s is not fetched ahead: %s", shard.file, error)
                return
