"""Live progress of a run: a bar on a terminal, a line every few seconds anywhere else.

Every line begins with the run's title: of several runs in one log it is clear whose it is.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tempo_megatron.telemetry.labels import phase_label

PLAIN_INTERVAL_S = 5.0
RATE_WINDOW_STEPS = 20


def run_title(stage: str, output_dir: str | Path) -> str:
    """Stage and run folder, each once: ``tempo my-run``, and ``demo/tempo`` where the folder is named as the stage."""
    folder = Path(output_dir).absolute()
    return f"{folder.parent.name}/{folder.name}" if folder.name == stage else f"{stage} {folder.name}"


class Progress:
    """Phase, step, rate, time left and a few metrics, on stderr; before ``start``, a line for each phase.

    Args:
        title: what is running, see :func:`run_title`.
        total: the run's last step.
        enabled: False on all ranks but one: every method then does nothing.
        console: where to write; a terminal gets a live bar, anything else plain lines, at most one per
            ``PLAIN_INTERVAL_S`` besides notes and the last one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        enabled: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._enabled, self._clock = title, total, enabled, clock
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._running, self._closed = False, False
        self._made = clock()
        self._step = 0
        self._shown: Mapping[str, float] = {}
        self._phase = ""
        self._phase_began = clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW_STEPS + 1)
        self._last_line = ""
        self._last_line_at = float("-inf")

    def start(self, at: int = 0) -> None:
        """Begin at step ``at`` (of a resumed run: the step it resumes after)."""
        if not self._enabled or self._running:
            return
        self._running, self._closed = True, False
        self._step = at
        self._marks.append((self._clock(), at))
        atexit.register(self.close)  # an exit that never reaches close() must not leave the cursor hidden
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()

    def phase(self, name: str) -> None:
        """Show ``name`` (of the ledger's phase) as what is being done now."""
        text = phase_label(name)
        if self._enabled and not self._running and not self._closed and text != self._phase:
            self.note(f"{duration(self._clock() - self._made)}  {text}")
        self._phase, self._phase_began = text, self._clock()
        self._plain_line()

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        """Step ``step`` is done; ``shown`` are the metrics to show with it."""
        self._step, self._shown = step, dict(shown)
        self._marks.append((self._clock(), step))
        self._plain_line()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._print(f"{self._title} {text}")

    def close(self) -> None:
        """Show the last state and give the terminal back; again is fine."""
        self._closed = True
        if not self._running:
            return
        self._running = False
        atexit.unregister(self.close)
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif (line := self._line()) != self._last_line:
            self._print(line)

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plain_line(self) -> None:
        if not self._running or self._live is not None or self._clock() - self._last_line_at < PLAIN_INTERVAL_S:
            return
        self._last_line, self._last_line_at = self._line(), self._clock()
        self._print(self._last_line)

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _steps_per_s(self) -> float | None:
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - began) if last > first and ended > began else None

    def _rate_and_eta(self) -> str:
        rate = self._steps_per_s()
        if rate is None:
            return "ETA -:--"
        speed = f"{rate:.2f} steps/s" if rate >= 0.1 else f"{1 / rate:.1f} s/step"
        return f"{speed}  ETA {duration(max(self._total - self._step, 0) / rate)}"

    def _metrics(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self._shown.items())

    def _line(self) -> str:
        parts = [f"{self._title} {self._step}/{self._total}", self._phase, self._rate_and_eta(), self._metrics()]
        return "  ".join(part for part in parts if part)

    def _render(self) -> Group:
        """Called by rich's thread; reads only attributes that are replaced as a whole."""
        phase = f"{self._phase} {duration(self._clock() - self._phase_began)}" if self._phase else ""
        row = Table.grid(padding=(0, 2))
        row.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=24),
            Text(f"{self._step}/{self._total}"),
            Text(self._rate_and_eta()),
            Text(phase, style="cyan"),
        )
        metrics = self._metrics()
        return Group(row, Text(metrics, style="dim")) if metrics else Group(row)


def duration(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
