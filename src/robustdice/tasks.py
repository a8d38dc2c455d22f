"""Many independent pieces of work, each done once: here or on a Dask cluster, and kept when a run is interrupted.

Scoring and evaluating are made of tasks that do not depend on each other. What they have in common is the *context*
(a network, say); what a task gives is plain JSON data, so that finished ones can be kept in a :class:`Checkpoint`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from robustdice.errors import ClusterError, OutputError, RobustdiceError
from robustdice.progress import Progress, silent

Context = TypeVar("Context")
Item = TypeVar("Item")

QUEUED_PER_THREAD = 2
"""Tasks handed to a Dask cluster ahead of need: enough that no worker waits, few enough that items fit into memory."""
CONNECT_SECONDS = 10.0


class Checkpoint:
    """Results of finished tasks in one file, a JSON object a line; the first line says what work they belong to.

    ``work`` is plain JSON that is the same exactly when results may be used again (digests, settings). A file of other
    work is refused, a line cut short by an interruption is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], work: Mapping[str, Any]) -> None:
        """OutputError when the file holds something else or cannot be written."""
        self.path = Path(path)
        self._results: dict[str, Any] = {}
        header = {"format": "robustdice-checkpoint", "version": 1, "work": json.loads(json.dumps(work))}
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
            complete = lines[:-1]  # what follows the last line break was cut short
            if complete:
                self._read(complete, header)
            with self.path.open("wb") as file:
                file.write(b"".join(line + b"\n" for line in complete) or json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another place") from None

    def _read(self, lines: list[bytes], header: Mapping[str, Any]) -> None:
        remedy = "take another file, or delete it to start again"
        try:
            documents = [json.loads(line) for line in lines]
            if documents[0].get("format") != header["format"]:
                raise ValueError
            if documents[0] != header:
                raise OutputError(f"{self.path} holds results of other work (another model, plan or data); {remedy}")
            self._results = {str(document["key"]): document["result"] for document in documents[1:]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{self.path} is not a checkpoint of robustdice; {remedy}") from None

    def get(self, key: str) -> Any | None:
        """The result that is kept for ``key``, or None."""
        return self._results.get(key)

    def add(self, key: str, result: Any) -> None:
        """Keep a result; it is on disk when this returns."""
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps({"key": key, "result": result}).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; make room, then go on from it") from None
        self._results[key] = result

    def delete(self) -> None:
        """Remove the file: the work is done."""
        self.path.unlink(missing_ok=True)


def run_tasks(
    work: Callable[[Context, Item], Any],
    keys: Sequence[str],
    item: Callable[[str], Item],
    context: Context,
    *,
    recreate: Callable[[], Context] | None = None,
    scheduler: str | None = None,
    checkpoint: Checkpoint | None = None,
    cost: Callable[[str], int] = lambda _: 1,
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """``work(context, item(key))`` for every key, as a dictionary in the order of ``keys``. Results are JSON data.

    ``item`` is called when a task's turn comes, and not for those that ``checkpoint`` has. With ``scheduler``, the
    address of a Dask scheduler, the tasks run on its workers; there ``recreate`` makes the context, once a process.
    Progress counts ``cost``. ClusterError when the scheduler cannot be reached or its workers keep dying.
    """
    kept = {} if checkpoint is None else {key: checkpoint.get(key) for key in keys}
    found = {key: result for key, result in kept.items() if result is not None}
    todo = [key for key in keys if key not in found]
    total = sum(map(cost, keys))
    done = total - sum(map(cost, todo))
    on_progress(done, total)
    if scheduler is None or not todo:
        results: Iterator[tuple[str, Any]] = ((key, work(context, item(key))) for key in todo)
    else:
        assert recreate is not None, "tasks that may run elsewhere say how their context is made there"
        results = _on_dask(work, todo, item, recreate, scheduler)
    for key, result in results:
        found[key] = result
        if checkpoint is not None:
            checkpoint.add(key, result)
        done += cost(key)
        on_progress(done, total)
    return {key: found[key] for key in keys}


def _on_dask(
    work: Callable[[Context, Item], Any],
    keys: Sequence[str],
    item: Callable[[str], Item],
    recreate: Callable[[], Context],
    scheduler: str,
) -> Iterator[tuple[str, Any]]:
    """Results as they come. A task whose worker dies goes to another one; Dask gives up after several deaths."""
    try:
        from distributed import Client, KilledWorker, as_completed  # noqa: PLC0415 -- heavy, and not everybody's
    except ModuleNotFoundError:
        raise ClusterError("--scheduler needs Dask: pip install 'robustdice[workshop]'") from None
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {scheduler!r} ({error}); start one with 'dask scheduler' and workers with "
            "'dask worker ADDRESS', or leave out --scheduler"
        ) from None
    with client:
        # Never without a place to run: then waiting is the user's wish (workers may come later), and Ctrl-C ends it.
        shared = client.scatter(recreate, hash=False)  # type: ignore[no-untyped-call]
        pending = iter(keys)
        names: dict[Any, str] = {}

        def submit(key: str) -> Any:
            future = client.submit(_elsewhere, work, shared, item(key), pure=False)
            names[future] = key
            return future

        ahead = QUEUED_PER_THREAD * max(1, sum(client.nthreads().values()))  # type: ignore[no-untyped-call]
        first = [submit(key) for _, key in zip(range(ahead), pending, strict=False)]
        running: Any = as_completed(first, loop=client.loop)  # type: ignore[no-untyped-call]
        for future in running:
            try:
                result = future.result()
            except KilledWorker as error:
                raise ClusterError(f"Dask workers died over the same task again and again ({error})") from None
            yield names.pop(future), result
            for key in pending:
                running.add(submit(key))
                break


def _elsewhere(work: Callable[[Any, Any], Any], recreate: Callable[[], Any], item: Any) -> Any:
    try:
        return work(_context(recreate), item)
    except RobustdiceError as error:
        raise type(error)(f"on a Dask worker: {error}") from None


@lru_cache(maxsize=1)
def _context(recreate: Callable[[], Context]) -> Context:
    return recreate()
