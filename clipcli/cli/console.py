"""What the tool says to a person: notices, progress and errors, all of it on stderr.

stdout is data and not touched here. Colour only on a terminal; names from outside are shown with their control
characters escaped.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from clipcli.errors import ClipcliError
from clipcli.output.text import printable
from clipcli.records import Failure

if TYPE_CHECKING:
    from rich.status import Status


def wants_color(stream: IO[str], choice: str = "auto") -> bool:
    """Whether `stream` gets colour: --color, then NO_COLOR, FORCE_COLOR and TERM, then whether it is a terminal."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say_error(error: ClipcliError, choice: str = "auto") -> None:
    """Render an error: one line, and a hint on a second."""
    red, cyan, end = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if wants_color(sys.stderr, choice) else ("", "", "")
    _write(f"{red}clipcli:{end} {printable(error.message)}\n")
    if error.hint:
        _write(f"{cyan}hint:{end} {printable(error.hint)}\n")


def _write(text: str) -> None:
    with suppress(OSError):  # whoever listens may have gone: the rows still count
        sys.stderr.write(text)
        sys.stderr.flush()


class _Notices(logging.Handler):
    def __init__(self, talk: Talk) -> None:
        super().__init__(logging.WARNING)
        self.talk = talk

    def emit(self, record: logging.LogRecord) -> None:
        self.talk.notice(record.getMessage())


class Talk:
    """The conversation of one command: how much is said, and the line that shows that work goes on."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False, color: str = "auto") -> None:
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self.color = color
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not quiet
        self._status: Status | None = None

    @contextmanager
    def listening(self) -> Iterator[Talk]:
        """Show the library's notices for as long as this lasts, the time in which a command works."""
        gc.enable()
        logger, handler = logging.getLogger("clipcli"), _Notices(self)
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield self
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    def notice(self, text: str, *, name: bool = True) -> None:
        """Say something that the user should know, unless --quiet; with our name before it, unless it goes on."""
        if not self.quiet:
            self._line(f"clipcli: {printable(text)}" if name else printable(text))

    def failure(self, text: str) -> None:
        """Say what could not be done, even with --quiet."""
        self._line(f"clipcli: {printable(text)}")

    def failed(self, picture: Failure) -> None:
        """Say which picture could not be used, and why."""
        self.failure(f"{picture.path}: {picture.kind}: {picture.message}")

    def detail(self, text: str) -> None:
        """Say what was chosen or reused: with --verbose only."""
        if self.verbose:
            self._line(printable(text))

    @contextmanager
    def working(self, text: str) -> Iterator[Ticker]:
        """A line that lives on a terminal while work goes on, and is gone afterwards. Elsewhere silence."""
        if not self.live:
            yield Ticker()
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(stderr=True, no_color=not wants_color(sys.stderr, self.color))
        with console.status(Text(printable(text)), spinner_style="cyan") as status:  # a name is no markup
            self._status = status
            try:
                yield LiveTicker(text, lambda said: status.update(Text(printable(said))))
            finally:
                self._status = None

    @contextmanager
    def standing_aside(self) -> Iterator[None]:
        """Take the living line away, if there is one, while something else draws on the terminal."""
        status = self._status
        if status is not None:
            status.stop()
        yield
        if status is not None:
            status.start()

    def _line(self, text: str) -> None:
        if self._status is not None:  # above the living line, not through it
            with suppress(OSError):
                self._status.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            _write(text + "\n")


class Ticker:
    """Takes counts of what is done; says nothing."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` things are done, of `total` if that is known."""

    def say(self, text: str) -> None:
        """Where the work stands, in other words than counts."""


class LiveTicker(Ticker):
    """Counts on the terminal, ten times a second at most."""

    def __init__(self, text: str, update: Callable[[str], None]) -> None:
        self.text = text
        self.update = update
        self.began = self.shown = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show `done` of `total`, and how many a second."""
        now = time.monotonic()
        if now - self.shown < 0.1:
            return
        self.shown = now
        rate = done / (now - self.began)
        count = f"{done:,} of {total:,}" if total else f"{done:,}"
        left = f", {duration((total - done) / rate)} left" if total and rate else ""
        self.update(f"{self.text}: {count}, {rate:.1f}/s{left}")

    def say(self, text: str) -> None:
        """Show `text` in place of the counts."""
        now = time.monotonic()
        if now - self.shown >= 0.1:
            self.shown = now
            self.update(text)


def duration(seconds: float) -> str:
    """`1:05:09` or `5:09`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
