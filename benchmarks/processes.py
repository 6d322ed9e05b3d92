"""Time and memory of one measurement, each in a process of its own.

"Added" memory is the growth of the peak resident memory over what inputs, parameters
and libraries already take; "XLA" is what the compiled program asks for (temporaries and
outputs). Linux only.

All processes get huge pages from malloc (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`,
unless the environment says otherwise). Without them, page faults in gigabytes of fresh
temporaries can cost PyTorch several times its arithmetic, and the ratios say more about
the virtual machine than about the formulation.
"""

import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def memory(field: str) -> float:
    """VmRSS or VmHWM, the resident memory and its peak, in MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024 / 1e6


def measure(run: Callable[[], Any], runs: int) -> dict[str, float]:
    """Added memory of the first run, then the best and the median time in ms."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    run()
    added = memory("VmHWM") - before
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return {"best": min(times), "median": statistics.median(times), "added": added}


def compile_jax(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The compiled function, and the memory it allocates in MB."""
    import jax

    compiled = jax.jit(function, **kwargs).lower(*args).compile()
    memory = compiled.memory_analysis()
    allocated = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return compiled, allocated / 1e6


def run_apart(module: str, name: str, *args: Any) -> dict[str, float]:
    """Runs a measurement of a module in a fresh process.

    Args:
      module: `python -m MODULE --measure=JSON` hands the JSON to `answer`.
      name: of the measurement.
      args: its arguments.
    """
    out = subprocess.run(
        [sys.executable, "-m", module, "--measure", json.dumps([name, *args])],
        check=True,
        stdout=subprocess.PIPE,
        env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ},
    )
    return json.loads(out.stdout)


def answer(asked: str, measurements: Mapping[str, Callable]) -> None:
    """Prints what the measurement that `run_apart` asked for gives."""
    name, *args = json.loads(asked)
    print(json.dumps(measurements[name](*args)))


def table_row(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def print_head(note: str, header: Sequence[str]) -> None:
    """Prints what machine this is and the first two lines of a table."""
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; {note}.\n"
    )
    print(table_row(header))
    print("|" + "---|" * len(header))
