"""Hostile input for every parser: real inputs that are changed, byte by byte and by their structure.

    python tests/fuzzing.py [messages manifests ... | --all] [--cases 1000000] [--seed 0] [--jobs 2]

Whatever comes in, a parser gives something or one of our errors, within CASE_SECONDS of a processor, WAIT_SECONDS in
all and MORE_BYTES of memory, and nothing is unpickled. Cases run in children of this process, on all processors, so
that one that ends the process is a finding too. Every case follows from its parser, the seed and its number.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hostile_parsers import PARSERS, Parser, parser_of
from robustdice.errors import RobustdiceError

CASE_SECONDS = 5.0
"""Of processor time, which does not pass while others compute or the machine stands still."""
WAIT_SECONDS = 120.0
MORE_BYTES = 2**29
"""Of address space, beyond what the process has before its first case."""
AT_ONCE = 2000
"""Cases of one child."""


class Hang(BaseException):
    """A case took too long; no parser may catch it."""


class Unpickled(BaseException):
    """Something was unpickled."""


def case(parser: Parser, name: str, seed: int, number: int) -> Any:
    """The input of one case."""
    dice = random.Random(f"{name} {seed} {number}")  # noqa: S311 -- to be had again
    return parser.change(dice, dice.choice(parser.inputs))


def problem(parser: Parser, changed: Any) -> str | None:
    """What is wrong with how a parser took its input; within limits after :func:`limit`."""
    try:
        parser.parse(changed)
    except RobustdiceError:
        return None
    except BaseException as error:  # whatever else it is: that is the finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
    return None


def limit() -> None:
    """From now on memory is limited in this process, and unpickling raises."""
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, resource.RLIM_INFINITY))
    sys.addaudithook(_no_pickle)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _ring)


def _ring(*_: object) -> None:
    raise Hang


def _no_pickle(event: str, _: object) -> None:
    if event == "pickle.find_class":
        raise Unpickled


def _run(parser: Parser, name: str, seed: int, numbers: range, report: Path) -> None:
    """In a child: write the number of each case, and what was found."""
    limit()
    with report.open("w") as file:
        for number in numbers:
            file.seek(0)
            file.write(f"{number:12}")
            file.flush()
            changed = case(parser, name, seed, number)
            signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
            found = problem(parser, changed)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if found is not None:
                raise SystemExit(f"{number}: {found}")


def fuzz(name: str, numbers: range, seed: int) -> list[str]:
    """What was found in the cases of a parser with these numbers; after a finding the next child goes on behind it."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    findings, number = list[str](), numbers.start
    with tempfile.TemporaryDirectory(dir=where) as directory:
        room = Path(directory)
        parser, report, said = parser_of(name, room), room / "report", room / "said"
        while number < numbers.stop:
            some = range(number, min(number + AT_ONCE, numbers.stop))
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    _run(parser, name, seed, some, report)
                    status = 0
                except BaseException as error:  # the harness's own errors must be seen
                    said.write_text(str(error) if isinstance(error, SystemExit) else traceback.format_exc())
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            number = some.stop
            if status:
                last = int(report.read_text().split()[0])
                ended = f"{last}: the process ended with signal {status & 127}"
                findings.append(ended if status & 127 else said.read_text())
                number = last + 1
    return findings


def main() -> None:
    """Fuzz; the exit status is 1 when anything was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    options.add_argument("--all", action="store_true", help="every parser")
    options.add_argument("--cases", type=int, default=100_000, help="of each parser (default: 100000)")
    options.add_argument("--first", type=int, default=0, help="the number of the first case (default: 0)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    chosen = options.parse_args()
    if unknown := {*chosen.parsers} - {*PARSERS}:
        options.error(f"there is no parser {min(unknown)}; there are {', '.join(PARSERS)}")
    any_found = False
    with ProcessPoolExecutor(chosen.jobs, get_context("fork")) as pool:
        for name in [*PARSERS] if chosen.all else chosen.parsers:
            any_found |= bool(_fuzz_all(pool, name, chosen))
    sys.exit(any_found)


def _fuzz_all(pool: ProcessPoolExecutor, name: str, chosen: argparse.Namespace) -> list[str]:
    start, end = time.monotonic(), chosen.first + chosen.cases
    size = max(AT_ONCE, chosen.cases // 50)
    parts = [range(first, min(first + size, end)) for first in range(chosen.first, end, size)]
    tasks: dict[Future[list[str]], range] = {pool.submit(fuzz, name, part, chosen.seed): part for part in parts}
    done, findings = 0, list[str]()
    for task in as_completed(tasks):
        done += len(tasks[task])
        findings += task.result()
        text = f"{name}: {done:,} cases in {time.monotonic() - start:.0f} s, {len(findings)} findings"
        print(text, end="\r" if sys.stdout.isatty() and done < chosen.cases else "\n", flush=True)
    for finding in findings[:20]:
        print(f"    case {finding}", flush=True)
    return findings


if __name__ == "__main__":
    main()
