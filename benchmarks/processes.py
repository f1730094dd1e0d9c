"""Step times of one side of a benchmark, each side in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step_seconds(run: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Seconds of the first call, which may compile, and the median of `steps` later ones."""
    first = seconds(run)
    seconds(run)
    return first, statistics.median(seconds(run) for _ in range(steps))


def child(module: str, arguments: Sequence[Any]) -> subprocess.CompletedProcess[str]:
    """`python -m module --child ...` with its output, nothing fetched."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, "--child", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
