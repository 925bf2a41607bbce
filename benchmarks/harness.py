"""What the throughput scripts share: entrants that are timed in turn, and the report that they end in.

Every entrant is one process or several at once, built and warmed up before anything is timed. Then all of them wait,
and each in turn runs for a moment, round after round, so that a drift of the machine's speed hits all alike. What
other processes take of the machine meanwhile is watched, and windows that they disturbed do not count. What such a
process does is in ``windows.py``.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import charts

import rlopt

QUIET, LEAST = 0.05, 3
"""The share of the machine that other processes may take in a window that counts, and how many count in any case."""
BLUE, SKY, GREEN, ORANGE, GREY = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#999999"


# --- the parent's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entrant:
    """One way to do the work: ``processes`` at once, each with its part."""

    name: str
    """Whom it stands for; the best of its settings is compared."""
    setting: str
    library: str
    """``rlopt``, ``stable_baselines3``, ``sbx``, ``cleanrl`` or, of environments, ``peer``, ``ale``, ``gymnasium``."""
    threads: int
    config: Mapping[str, Any] = field(default_factory=dict)
    """rlopt's, on top of the benchmark's; a peer's, where the benchmark has any."""
    processes: int = 1

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}"

    def environment(self) -> dict[str, str]:
        """What must be said before the library is imported."""
        if self.library == "rlopt":
            from rlopt.cli.environment import PROCESS_SETTINGS

            return {**PROCESS_SETTINGS, **os.environ}
        flags = {"OMP_NUM_THREADS": str(self.threads)}
        if self.library == "sbx":
            one = "false intra_op_parallelism_threads=1"
            flags["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={one if self.threads == 1 else 'true'}"
        return {**os.environ, **flags}


class Others:
    """What the other processes of this machine have taken of it since this was made (Linux; elsewhere unknown)."""

    def __init__(self, mine: Sequence[int]) -> None:
        self._mine, self._begin = mine, time.perf_counter()
        self._busy, self._own = _busy_ticks(), _own_ticks(mine)

    def share(self) -> float:
        """The part of all cores' time, 0 … 1; NaN where it cannot be known."""
        taken = (_busy_ticks() - self._busy) - (_own_ticks(self._mine) - self._own)
        whole = (time.perf_counter() - self._begin) * (os.cpu_count() or 1) * _TICKS
        return min(max(taken / whole, 0.0), 1.0)


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _busy_ticks() -> float:
    try:
        user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    except (OSError, ValueError):
        return math.nan
    return float(sum(map(int, (user, nice, system, irq, softirq, steal))))


def _own_ticks(processes: Sequence[int]) -> float:
    """Of these processes, which have no children."""
    total = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        total += int(fields[11]) + int(fields[12])
    return float(total)


class LeftOut(Exception):
    """An entrant that does not run here, and why."""


class Window(NamedTuple):
    speed: float
    """Steps per second."""
    others: float
    """What other processes took of the machine meanwhile, 0 … 1."""


def undisturbed(windows: Sequence[Window]) -> list[Window]:
    """Those in which others took no more than ``QUIET``; the ``LEAST`` quietest where there are fewer."""
    in_order = sorted(windows, key=lambda w: w.others)
    return [w for i, w in enumerate(in_order) if i < LEAST or not w.others > QUIET]


class Parked:
    """The processes of one entrant, waiting for their windows."""

    def __init__(self, entrant: Entrant, settings: Mapping[str, Any]) -> None:
        self.entrant = entrant
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the processes)
        spec = {"library": entrant.library, "threads": entrant.threads, "config": dict(entrant.config), **settings}
        command = [sys.executable, Path(__file__).with_name("windows.py")]
        self._processes = [
            subprocess.Popen(
                [*command, json.dumps({**spec, "number": i})], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._said, env=entrant.environment(), text=True, bufsize=1,
            )
            for i in range(entrant.processes)
        ]  # fmt: skip

    def ready(self) -> None:
        """Wait until every process is warm.

        Raises:
            LeftOut: one of them ended.
        """
        for p in self._processes:
            self._line(p)

    def window(self, seconds: float, besides: Sequence[int] = ()) -> Window:
        """All the processes at work together. ``besides`` are processes that are meant to disturb them.

        Raises:
            LeftOut: one of them ended.
        """
        others = Others([p.pid for p in self._processes] + list(besides))
        for p in self._processes:
            assert p.stdin is not None
            p.stdin.write(f"{seconds}\n")
        speed = sum(float(self._line(p)) for p in self._processes)
        return Window(speed, others.share())

    def close(self) -> None:
        for p in self._processes:
            p.kill()
            p.wait()
            for pipe in (p.stdin, p.stdout):
                if pipe is not None:
                    pipe.close()
        self._said.close()

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise LeftOut((self._said.read().strip().splitlines() or ["it ended without a word"])[-1])
        return line


def measure(
    entrants: Sequence[Entrant], settings: Mapping[str, Any], rounds: int, seconds: float
) -> tuple[dict[Entrant, list[float]], list[str], list[Parked]]:
    """Steps per second of every entrant in its undisturbed windows; remarks on these, and on entrants left out; the
    entrants, still waiting.

    ``settings`` are every worker's: ``env``, and ``warmup`` and ``extra`` (steps before the first update, and after it
    before the first window), or ``algorithm=ppo`` or ``teams``.
    """
    parked: list[Parked] = []
    left_out: list[str] = []
    started = [Parked(entrant, settings) for entrant in entrants[:1]]
    for i, entrant in enumerate(entrants):
        started += [Parked(following, settings) for following in entrants[i + 1 : i + 2]]  # imports need one core
        try:
            started[i].ready()
            parked.append(started[i])
            print(f"ready: {entrant.label}", flush=True)
        except LeftOut as e:
            started[i].close()
            if entrant.library == "rlopt":
                raise SystemExit(f"{entrant.label} failed: {e}") from e
            left_out.append(f"{entrant.label} left out: {e}")
            print(left_out[-1], flush=True)
    windows: dict[Entrant, list[Window]] = {p.entrant: [] for p in parked}
    for i in range(rounds):
        for p in parked:
            windows[p.entrant].append(p.window(seconds))
        told = ", ".join(f"{e.label} {w[-1].speed:.0f}" for e, w in windows.items())
        print(f"{i + 1}/{rounds}  {told}; others up to {max(w[-1].others for w in windows.values()):.0%}", flush=True)
    kept = {entrant: undisturbed(found) for entrant, found in windows.items()}
    speeds = {entrant: [w.speed for w in found] for entrant, found in kept.items()}
    return speeds, [disturbance(windows.values(), kept.values()), *left_out], parked


def disturbance(windows: Iterable[Sequence[Window]], kept: Iterable[Sequence[Window]]) -> str:
    """A sentence about how quiet the machine was."""
    every, counted = ([w for found in several for w in found] for several in (windows, kept))
    worst = max(w.others for w in counted)
    if math.isnan(worst):
        return "what other processes took of the machine is not known"
    return (
        f"{len(counted)} of {len(every)} windows count: the others were disturbed by other processes, which took at "
        f"most {worst:.0%} of the machine in those that count"
    )


# --- the report -----------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """A table with the sentences that belong to it."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str] = []

    @property
    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    @property
    def text(self) -> str:
        """The table, where it has rows, and the sentences as a list."""
        bullets = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (self.markdown if self.rows else "", bullets) if part)

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])


def spread(speeds: Sequence[float]) -> list[str]:
    """Median, least and greatest, as a table shows them."""
    digits = 1 if statistics.median(speeds) < 1000 else 0
    return [f"{x:.{digits}f}" for x in (statistics.median(speeds), min(speeds), max(speeds))]


def best(speeds: Mapping[Entrant, Sequence[float]]) -> dict[str, tuple[float, str]]:
    """The highest median of each name, and the setting that has it."""
    found: dict[str, tuple[float, str]] = {}
    for entrant, values in speeds.items():
        mine = (statistics.median(values), entrant.setting)
        found[entrant.name] = max(found.get(entrant.name, mine), mine)
    return found


def ranges(made: Report) -> dict[str, tuple[float, float]]:
    """The least and the greatest window of each row that begins with a name and a setting, by ``Entrant.label``."""
    if not {"min", "max"} <= {*made.header}:
        return {}
    low, high = made.header.index("min"), made.header.index("max")
    return {", ".join(row[:2]): (float(row[low]), float(row[high])) for row in made.rows if row[low]}


def verdict(what: str, found: float, target: float | None = None) -> str:
    """One ratio, and whether it is what was aimed at."""
    if target is None:
        return f"{what}: {found:.2f}"
    return f"{what}: {found:.2f} (target at least {target:g}: {'met' if found >= target else 'missed'})"


def cpu() -> str:
    """The class of this machine's processor, such as ``2-core x86-64 CPU, AVX-512``."""
    info = Path("/proc/cpuinfo")
    wide = ", AVX-512" if info.is_file() and "avx512f" in info.read_text() else ""
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU{wide}"


def versions(*names: str) -> str:
    """The versions of Python and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            version = rlopt.__version__ if name == "rlopt" else importlib.metadata.version(name)
            found.append(f"{name} {version}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def publish(
    out: Path, title: str, about: str, command: str, packages: Sequence[str], made: Report, bars: Mapping[str, float],
    label: str, colour: Callable[[str], str],
) -> None:  # fmt: skip
    """The results folder of a benchmark: `table.csv`, `README.md` and `chart.png`, which without ``bars`` is drawn from
    the table (`charts.py`)."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    made.write_csv(out / "table.csv")
    (out / "README.md").write_text(
        f"# {title}\n\n{about}\n\n    {command}\n\n{versions(*packages)}.\n\n{made.text}\n\n![bar chart](chart.png)\n",
        encoding="utf-8",
    )
    if not bars:
        charts.draw(charts.chart_of(out), out)
        return
    figure = Figure(figsize=(8, 0.38 * len(bars) + 0.9), layout="constrained")
    draw_bars(figure.subplots(), bars, label, colour, ranges(made))
    figure.savefig(out / "chart.png", dpi=150)


def draw_bars(
    axes: Any, bars: Mapping[str, float], label: str, colour: Callable[[str], str],
    spreads: Mapping[str, tuple[float, float]] | None = None,
) -> None:  # fmt: skip
    """Horizontal bars, the first on top, with their values; through the ends of those that ``spreads`` knows a line
    from the least to the greatest window."""
    axes.barh(list(bars), list(bars.values()), color=[colour(name) for name in bars])
    known = spreads or {}
    for row, (name, value) in enumerate(bars.items()):
        low, high = known.get(name, (value, value))
        axes.plot([low, high], [row, row], color="black", linewidth=1.2, solid_capstyle="butt")
        axes.annotate(f"{value:,.0f}", (max(value, high), row), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    if known.keys() & bars.keys():
        label += "\nbars: medians; lines: least to greatest window"
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.12)
    axes.invert_yaxis()
