"""`selftest`: does everything work here that a run uses? One line for each test. It downloads nothing and trains nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from finetune.errors import MachineError
from finetune.machine import selftest
from finetune.settings import Settings


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    """Raises MachineError where a test failed, after all of them."""
    began, found = time.perf_counter(), list[selftest.Result]()
    for result in selftest.results(selftest.host(settings, environ)):
        found.append(result)
        print(result.line(), flush=True)
    for result in selftest.with_torch(__name__, environ, found):
        found.append(result)
        print(result.line(), flush=True)
    failed = [result.name for result in found if result.good is False]
    tested = sum(result.good is not None for result in found)
    if failed:
        raise MachineError(
            f"selftest: {len(failed)} of {tested} tests failed: {', '.join(failed)}. What and why stands above."
        )
    print(f"selftest: all {tested} tests are good, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":  # the tests that need torch, in a process of their own
    from finetune.engines import selftest as tests

    tests.main(sys.argv[1:])
