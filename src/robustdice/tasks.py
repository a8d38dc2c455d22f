"""Many independent pieces of work, each done once: here or on a Dask cluster, and kept when a run is interrupted.

Scoring and evaluating are made of tasks that do not depend on each other. What they have in common is the *context*
(a network, say); what a task gives is plain JSON data, so that finished ones can be kept in a :class:`Checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from robustdice.errors import ClusterError, OutputError, RobustdiceError, first_line
from robustdice.progress import Progress, silent

Context = TypeVar("Context")
Item = TypeVar("Item")

QUEUED_PER_THREAD = 2
"""Tasks handed to a Dask cluster ahead of need: enough that no worker waits, few enough that items fit into memory."""
CONNECT_SECONDS = 10.0
SCHEMES = ("tcp://", "tls://", "ws://", "wss://", "ucx://")


class Checkpoint:
    """Results of finished tasks in one file, a JSON object a line; the first line says what work they belong to.

    ``work`` is plain JSON that is the same exactly when results may be used again (digests, settings). A file of other
    work is refused, a line cut short by an interruption is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], work: Mapping[str, Any]) -> None:
        """OutputError when the file holds something else or cannot be written."""
        self.path = Path(path)
        self._results: dict[str, Any] = {}
        belongs = {"robustdice": version("robustdice"), **work}
        header = {"format": "robustdice-checkpoint", "version": 2, "work": json.loads(json.dumps(belongs))}
        first = json.dumps(header).encode() + b"\n"
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            end = content.rfind(b"\n") + 1  # what follows the last line break was cut short
            if (end or not first.startswith(content)) and not self._read(content[:end].split(b"\n")[:-1], header):
                end = 0
            with self.path.open("r+b" if content else "wb") as file:
                file.truncate(end)
                if not end:
                    file.write(first)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another place") from None

    def _read(self, lines: list[bytes], header: Mapping[str, Any]) -> bool:
        """Whether the file is of this work; one of other work that holds no result is not, and may be overwritten."""
        remedy = "take another file, or delete it to start again"
        try:
            documents = [json.loads(line) for line in lines]
            if documents[0].get("format") != header["format"]:
                raise ValueError
            if documents[0] != header:
                ours, theirs = header["work"], documents[0]["work"]
                if len(documents) == 1:
                    return False
                differing = ", ".join(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
                raise OutputError(f"{self.path} holds results of other work (different: {differing}); {remedy}")
            for document in documents[1:]:
                if document["digest"] != _digest(document["result"]):
                    raise ValueError
                self._results[str(document["key"])] = document["result"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{self.path} is not a checkpoint of robustdice, or damaged; {remedy}") from None
        return True

    def get(self, key: str) -> Any | None:
        """The result that is kept for ``key``, or None."""
        return self._results.get(key)

    def add(self, key: str, result: Any) -> None:
        """Keep a result; it is on disk when this returns."""
        line = json.dumps({"key": key, "digest": _digest(result), "result": result}).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; make room, then go on from it") from None
        self._results[key] = result

    def delete(self) -> None:
        """Remove the file: the work is done."""
        self.path.unlink(missing_ok=True)


def _digest(result: Any) -> str:
    """A few digits by which a result that was changed is noticed."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()[:16]


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
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """``work(context, item(key))`` for every key, as a dictionary in the order of ``keys``. Results are JSON data.

    ``item`` is called when a task's turn comes, and not for those that ``checkpoint`` has. With ``scheduler``, the
    address of a Dask scheduler, the tasks run on its workers; there ``recreate`` makes the context, once a process.
    Progress counts ``cost``. With ``threads`` that many tasks run at once here; ``stop`` is set, for them to end early,
    when one fails or the caller is interrupted. ClusterError when the scheduler cannot be reached or its workers keep
    dying.
    """
    kept = {} if checkpoint is None else {key: checkpoint.get(key) for key in keys}
    found = {key: result for key, result in kept.items() if result is not None}
    todo = [key for key in keys if key not in found]
    total = sum(map(cost, keys))
    done = total - sum(map(cost, todo))
    on_progress(done, total)
    if scheduler is not None and todo:
        assert recreate is not None, "tasks that may run elsewhere say how their context is made there"
        results = _on_dask(work, todo, item, recreate, scheduler)
    elif threads is not None:
        results = _in_threads(lambda key: work(context, item(key)), todo, threads, stop or threading.Event())
    else:
        results = ((key, work(context, item(key))) for key in todo)
    with closing(results):
        for key, result in results:
            found[key] = result
            if checkpoint is not None:
                checkpoint.add(key, result)
            done += cost(key)
            on_progress(done, total)
    return {key: found[key] for key in keys}


def _in_threads(
    run: Callable[[str], Any], keys: Sequence[str], threads: int, stop: threading.Event
) -> Generator[tuple[str, Any], None, None]:
    """Results as they come."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            names = {pool.submit(run, key): key for key in keys}
            for future in as_completed(names):
                yield names[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _on_dask(
    work: Callable[[Context, Item], Any],
    keys: Sequence[str],
    item: Callable[[str], Item],
    recreate: Callable[[], Context],
    scheduler: str,
) -> Generator[tuple[str, Any], None, None]:
    """Results as they come. A task whose worker dies goes to another one; Dask gives up after several deaths."""
    try:
        import distributed  # noqa: PLC0415 -- heavy, and not everybody's
    except ModuleNotFoundError:
        raise ClusterError("--scheduler needs Dask: pip install 'robustdice[workshop]'") from None
    advice = "start one with 'dask scheduler' and workers with 'dask worker ADDRESS', or leave out --scheduler"
    if not scheduler.startswith(SCHEMES):
        raise ClusterError(f"a Dask scheduler's address starts with {', '.join(SCHEMES)}, not {scheduler!r}; {advice}")
    try:
        client: Any = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(f"no Dask scheduler answers at {scheduler!r} ({error}); {advice}") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
            # As a task's result, which the scheduler has made again when the only worker that holds it dies.
            shared = client.submit(_itself, recreate, pure=False)
        except (OSError, TimeoutError) as error:
            raise ClusterError(f"the Dask scheduler at {scheduler!r} has no workers ({error}); {advice}") from None
        pending = iter(keys)
        names: dict[Any, str] = {}

        def submit(key: str) -> Any:
            future = client.submit(_elsewhere, work, shared, item(key), pure=False)
            names[future] = key
            return future

        ahead = QUEUED_PER_THREAD * max(1, sum(client.nthreads().values()))
        first = [submit(key) for _, key in zip(range(ahead), pending, strict=False)]
        running: Any = distributed.as_completed(first, loop=client.loop)  # type: ignore[no-untyped-call]
        for future in running:
            yield names.pop(future), _result(future)
            for key in pending:
                running.add(submit(key))
                break


def _result(future: Any) -> Any:
    try:
        return future.result()
    except RobustdiceError:
        raise
    except Exception as error:  # Dask's own have no common root: workers that keep dying, a scheduler that is gone
        raise ClusterError(
            f"the Dask cluster did not finish a task ({type(error).__name__}: {first_line(error)}); start it again and "
            "repeat the command: what a checkpoint has is not done twice"
        ) from None


def _itself(recreate: Callable[[], Any]) -> Callable[[], Any]:
    return recreate


def _elsewhere(work: Callable[[Any, Any], Any], recreate: Callable[[], Any], item: Any) -> Any:
    try:
        with _one_at_a_time:  # a worker's threads share the context
            context = _context(recreate)
        return work(context, item)
    except RobustdiceError as error:
        raise type(error)(f"on a Dask worker: {error}") from None


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=1)
def _context(recreate: Callable[[], Context]) -> Context:
    return recreate()
