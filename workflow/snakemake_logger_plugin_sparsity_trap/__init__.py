"""What `make book` prints: the steps done, and a bar with time left for each step that is running.

Snakemake finds this logger by its module name. Bars come from the files that
`sparsity_trap.progress.track` writes; Snakemake's own complete log stays in .snakemake/log.
"""

import re
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from logging import WARNING, LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from sparsity_trap.progress import VARIABLE

REFRESH_S = 0.5
#: Without a terminal nothing can be redrawn, so a line about running steps comes at this interval.
HEARTBEAT_S = 20.0

#: Snakemake's account of a failed command, which repeats the command and explains nothing.
SAID_BY_THE_JOB = ("CalledProcessError", "did not complete successfully", "job execution failed")
#: Its account of a command that could not say anything itself.
KILLED = r"died with <Signals\.(\w+)"
#: Snakemake's account of a result that may not be replaced.
PROTECTED = r"Write-protected output files.*affected files:\s+([^\n]+)"


@dataclass
class Step:
    """A running job."""

    title: str
    progress: Path | None
    start: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """Title, and the newest bar of the step or the time it has taken."""
        bar = ""
        if self.progress and self.progress.is_file():
            drawn = (
                self.progress.read_bytes().decode(errors="replace").replace("\n", "\r").split("\r")
            )
            bar = next((text.strip() for text in reversed(drawn) if text.strip()), "")
        return f"{self.title}  {bar or f'{time.monotonic() - self.start:.0f} s'}"


class LogHandler(LogHandlerBase):
    """Draws finished steps as lines, and running ones below them."""

    def __post_init__(self) -> None:
        self.total = self.done = self.drawn = 0
        self.running: dict[int, Step] = {}
        self.start = self.spoken = time.monotonic()
        self.live = sys.stderr.isatty()
        self.drawing = threading.RLock()
        threading.Thread(target=self._refresh, daemon=True).start()

    def emit(self, record: LogRecord) -> None:
        event = getattr(record, "event", None)
        with self.drawing:
            self._erase()
            if event == LogEvent.RUN_INFO:
                self.total = record.stats["total"] - 1  # the target itself is no step
            elif event == LogEvent.JOB_INFO and record.shellcmd:
                found = re.search(rf'{VARIABLE}="\$PWD/([^"]+)"', record.shellcmd)
                progress = Path(found[1]) if found else None
                if progress:
                    # Where it may not be removed, the job cannot write its results and says so.
                    with suppress(OSError):
                        progress.unlink()
                title = record.rule_msg or record.rule_name
                self.running[record.jobid] = Step(title, progress)
                if not self.live:
                    self._say(f"        {title}: started")
            elif event == LogEvent.JOB_FINISHED and record.job_id in self.running:
                step = self.running.pop(record.job_id)
                self.done += 1
                took = time.monotonic() - step.start
                self._say(f"{self._count()} {step.title}: done in {took:.0f} s")
            elif event == LogEvent.JOB_ERROR and record.jobid in self.running:
                # The job itself has said on stderr what is wrong.
                self._say(f"{self._count()} {self.running.pop(record.jobid).title}: failed")
            elif event == LogEvent.ERROR or (event is None and record.levelno >= WARNING):
                text = record.getMessage().rstrip()
                if found := re.search(PROTECTED, text, re.DOTALL):
                    self._say(f"error: {found[1]} cannot be written: make it writable for you")
                elif found := re.search(KILLED, text):
                    self._say(
                        f"error: this step was ended from outside ({found[1]}), as happens where "
                        "memory runs out: run fewer steps at a time, such as with CORES=1"
                    )
                elif not any(phrase in text for phrase in SAID_BY_THE_JOB):
                    self._say(text)
            elif event is None and record.getMessage().startswith("Nothing to be done"):
                self._say("nothing to do: everything is up to date")
            self._draw()

    def _count(self) -> str:
        return f"[{self.done:2d}/{self.total}]"

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _erase(self) -> None:
        # The cursor waits on the first drawn line, so what a job prints overwrites the bars below
        # and is never erased with them.
        if self.drawn:
            sys.stderr.write("\x1b[J")
            self.drawn = 0

    def _draw(self) -> None:
        if not (self.live and self.running):
            return
        elapsed = time.monotonic() - self.start
        lines = [f"{self._count()} steps done, {elapsed / 60:.1f} min"]
        lines += [f"        {step.line()}" for step in self.running.values()]
        self.drawn = len(lines)
        for line in lines:
            self._say(line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.write(f"\x1b[{self.drawn}A")
        sys.stderr.flush()

    def _refresh(self) -> None:
        while True:
            time.sleep(REFRESH_S)
            with self.drawing:
                if self.live:
                    self._erase()
                    self._draw()
                elif time.monotonic() - self.spoken > HEARTBEAT_S:
                    self.spoken = time.monotonic()
                    for step in self.running.values():
                        self._say(f"        {step.line()}")

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False
