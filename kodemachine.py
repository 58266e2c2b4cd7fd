#!/usr/bin/env python3
"""kodemachine: a fresh, isolated Linux machine in seconds, from a golden image in UTM.

    kodemachine project-alpha       clone if missing, start, wait for ssh, become ssh

This file is the whole program. It is installed as one file in ~/bin and started a hundred times a day. So it imports at
the top only what every run needs; other modules are imported where they are used.

The file reads from top to bottom: code uses only names that are defined above it. Its sections:

     1  docstring, imports, version         13  sizes on disk
     2  errors, signals                     14  ssh options
     3  text and numbers                    15  Manager: find or clone, start, stop, delete
     4  files, locks, processes             16  images: Sealer, Creator
     5  utmctl and osascript                17  doctor
     6  configuration                       18  serial console
     7  memory: Record, State, orders       19  terminal output
     8  fleet: label rules, Fleet           20  commands
     9  scripts that run elsewhere          21  parser
    10  address and ssh port of a guest     22  completion, help, first screen
    11  VM: one machine                     23  main
    12  Maker: one way to make a machine

Five facts about utmctl, the command of UTM, shape the program. "contract N" names a section of the notes on UTM's
behaviour, where a fact is shown from UTM's source:

1. Exit status 0 does not mean success: a failed Apple Event is only reported on stderr (contract 0).
2. "Virtual machine not found." does not mean that the machine is absent; only a clean list says so (contract 0).
3. macOS translates the words, and not the numbers (contract 0). The program reads numbers.
4. Ending utmctl cancels nothing in UTM (contract 0). The state is read again after every action.
5. Names are not unique, and clone returns no UUID (contract 1.5, 3). After the first look a machine is its UUID.
"""
from __future__ import annotations

import signal

# Until main() handles signals, Ctrl-C ends the program without a traceback.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import enum
import errno
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, NoReturn

if sys.version_info < (3, 9):       # noqa: UP036 (this very check is for the older ones)
    sys.exit("kodemachine: needs Python 3.9 or newer, this is " + sys.version.split()[0])

__version__ = "0.1.0"

# ---- errors, signals


class KodeError(Exception):
    """A failure that one sentence explains; `hint` is what to do next."""

    status, slug = 1, "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(KodeError):
    """The command line or the configuration is not valid."""

    status, slug = 2, "usage"


class NotFound(KodeError):
    """A clean list has no such machine or image."""

    status, slug = 3, "not-found"


class WrongState(KodeError):
    """The machine's state does not allow that, or a name is ambiguous."""

    status, slug = 4, "wrong-state"


class Busy(WrongState):
    """Another kodemachine uses the machine."""


class Unreachable(KodeError):
    """UTM cannot be reached, or refuses the request."""

    status, slug = 5, "utm-unreachable"


class NotPermitted(Unreachable):
    """macOS does not let this terminal control UTM (-1743)."""


class Forbidden(KodeError):
    """The guest's configuration does not allow its agent to run that. The same request would fail again."""


class TimedOut(KodeError):
    """A time limit of kodemachine has passed."""

    status, slug = 6, "timeout"


class Interrupted(BaseException):
    """A signal asked the program to end. Not an Exception, so that only `main` handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """Turns the signals that end a program into one exception, and can delay it while a step must be complete."""

    def __init__(self) -> None:
        self._held = self._pending = 0

    def install(self) -> None:
        """Handles the signals, except those that the parent process made us ignore (nohup)."""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._arrive)
        sys.unraisablehook = self._dropped

    def _arrive(self, number: int, _frame: object) -> None:
        if self._held:
            self._pending = self._pending or number
        else:
            # A second signal must not interrupt the clean-up.
            self._held = 1
            raise Interrupted(number)

    def _dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        """Python drops an exception that is raised in a finalizer. The interruption is then raised by the next call."""
        if isinstance(dropped.exc_value, Interrupted):
            self._held, self._pending = 0, dropped.exc_value.number
        else:
            sys.__unraisablehook__(dropped)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delays signals until the block ends; then one that arrived is raised, unless the block failed."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only.
            yield
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            self._held = 1
            raise Interrupted(self._pending)


class Notes:
    """The interface through which the lower layers report what they do. This one is silent."""

    def step(self, text: str) -> None:
        """A step has begun."""

    def tick(self) -> None:
        """Time passes."""

    def progress(self, text: str) -> None:
        """The current step has made progress."""

    def warn(self, text: str) -> None:
        """Something went wrong that does not stop the work."""

    def trace(self, text: str) -> None:
        """A call to another program has ended."""


def poll(limit: float, tick: Callable[[], None], first: float = 0.1, longest: float = 1.0) -> Iterator[float]:
    """The only wait loop: yields the seconds left, at least once, with growing pauses, until `limit` has passed."""
    deadline = time.monotonic() + limit
    pause = first
    while True:
        left = deadline - time.monotonic()
        yield max(left, 0.0)
        if left <= 0:
            return
        until = min(time.monotonic() + pause, deadline)
        while time.monotonic() < until:
            tick()
            time.sleep(max(0.0, min(0.2, until - time.monotonic())))
        pause = min(pause * 1.5, longest)


# ---- text and numbers


def printable(text: str) -> str:
    """`text` without control characters: names and errors may come from a hostile guest."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def is_utf8(text: str) -> bool:
    """Whether a word of the command line was valid UTF-8. Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_edit(word: str, other: str) -> bool:
    """Whether one insertion, removal, change or swap of neighbours turns one word into the other."""
    if len(word) > len(other):
        word, other = other, word
    if len(other) - len(word) > 1 or word == other:
        return False
    i = next((i for i, (a, b) in enumerate(zip(word, other)) if a != b), len(word))
    if len(word) < len(other):
        return word[i:] == other[i + 1:]
    if word[i + 1:] == other[i + 1:]:
        return True
    return word[i:i + 2] == other[i:i + 2][::-1] and word[i + 2:] == other[i + 2:]


def size_text(size: int | None) -> str:
    """Bytes for a person: 0B, 512M, 4.2G."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for unit in "BKMGT":
        if value < 1000 or unit == "T":
            break
        value /= 1024
    if unit != "B" and value < 9.95:
        return f"{value:.1f}{unit}"
    return f"{value:.0f}{unit}"


def parse_size(text: str) -> int:
    """Bytes of `4G`, `512M`, `2048` (MiB without a unit, as in UTM). Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(text)
    power = " KMGT".index(match.group(2).upper() or "M")
    return int(float(match.group(1)) * 1024 ** power)


def parse_age(text: str) -> float:
    """Seconds of `90s`, `30m`, `12h`, `7d`, `2w`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text.strip())
    if not match:
        raise ValueError(text)
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match.group(2)]


def age_of(created: str) -> float | None:
    """Seconds since an ISO time in UTC; None if it cannot be read."""
    import datetime  # strptime would load three more modules

    try:
        made = datetime.datetime.fromisoformat(created.replace("Z", "+00:00"))
        return max(0.0, time.time() - made.timestamp())
    except (ValueError, OverflowError):
        return None


def age_text(seconds: float | None) -> str:
    """An age for a person: 5s, 12m, 3h, 9d."""
    if seconds is None:
        return "-"
    for limit, unit, size in ((60, "s", 1), (3600, "m", 60), (2 * 86400, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds / size)}{unit}"
    return f"{int(seconds / 86400)}d"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 error`, `2 errors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds_text(limit: float) -> str:
    """A time limit for a person: 60 s, 0.3 s."""
    return f"{round(limit, 1):g} s"


def iso_time(when: float) -> str:
    """A time in seconds since the epoch, as it is recorded: ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


# ---- files, locks, processes

RUN_AGAIN = "Fix that and run the command again."


def nearest(path: str) -> str:
    """The path, or the folder nearest to it, that exists as far as this user can see."""
    path = os.path.abspath(path)
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def access_hint(path: str) -> str:
    """The hint for a path to which the system denies access: the first folder or file that belongs to another user."""
    at = nearest(path)
    hint = f"To see its owner and mode: ls -ld {shlex.quote(at)}"
    foreign = ""
    # An earlier `sudo` may have made several folders. Those around one's own folders are the system's.
    while os.lstat(at).st_uid != os.geteuid():
        foreign, at = at, os.path.dirname(at)
        if at == foreign:
            return hint
    if foreign:
        return f'To make {foreign} yours: sudo chown -R "$(id -un)" {shlex.quote(foreign)}'
    return hint


@contextlib.contextmanager
def explained(path: str, hint: str = RUN_AGAIN) -> Iterator[None]:
    """Turns an OSError of the block into a KodeError that names the path."""
    try:
        yield
    except PermissionError as failure:
        remedies = [access_hint(path)]
        if hint != RUN_AGAIN:
            remedies.append(hint)
        raise KodeError(f"{path}: {failure.strerror}", "\n".join(remedies)) from None
    except OSError as failure:
        raise KodeError(f"{path}: {failure.strerror or failure}", hint) from None


def make_folder(path: str) -> None:
    """Makes a private folder if it is missing. Raises KodeError if it belongs to another user."""
    above = os.path.dirname(path) or "."
    # makedirs would give it the umask's mode.
    if not os.path.isdir(above):
        make_folder(above)
    with explained(path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        owner = os.stat(path).st_uid
    if owner != os.geteuid():
        raise KodeError(f"{path} belongs to another user", access_hint(path))


def must_be_usable(path: str) -> None:
    """Raises KodeError if a folder cannot be read and written, or made. Changes nothing."""
    at = nearest(path)
    if not os.path.isdir(at):
        raise KodeError(f"{at} is not a folder", "Move it away.")
    if not os.access(at, os.R_OK | os.W_OK | os.X_OK):
        raise KodeError(f"{path} cannot be used: {os.strerror(errno.EACCES)}", access_hint(at))


def write_file(path: str, text: str, hint: str = RUN_AGAIN) -> None:
    """Replaces a file as a whole: written beside it, synced, renamed; 0600 in a 0700 folder. Callers hold a lock.

    Raises KodeError with the hint.
    """
    # A configuration may be in a folder that several users share.
    if not os.path.isdir(os.path.dirname(path)):
        make_folder(os.path.dirname(path))
    # Always the same name, so that nothing piles up after a kill -9.
    beside = path + ".new"
    try:
        with explained(path, hint):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
                os.fchmod(handle, 0o600)
                file.write(text)
                file.flush()
                os.fsync(handle)
            os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def read_text(path: str, errors: str = "replace") -> str | None:
    """The text of a regular file of at most 16 MiB; None if it is missing. Raises OSError, never blocks on a fifo.

    `errors`: how bytes that are not UTF-8 are read; with "surrogateescape", write_file writes them unchanged.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    with open(handle, "rb") as file:
        return file.read(16 << 20).decode("utf-8", errors)


def is_locked(path: str) -> bool:
    """Whether a process holds a lock on that file. Nothing is made or written."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


# ---- utmctl and osascript


class Power(enum.Enum):
    """The words for a machine's state that utmctl prints (contract 2)."""

    STOPPED = "stopped"
    STARTING = "starting"
    STARTED = "started"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPING = "stopping"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> Power:
        return cls.UNKNOWN

    @property
    def word(self) -> str:
        """The word that people and programs see: UTM's own, but `running` for started."""
        if self is Power.STARTED:
            return "running"
        return str(self.value)


class Outcome(enum.Enum):
    """The result of one call, as far as the call itself shows it."""

    DONE = "done"
    TRANSIENT = "transient"     # -1712, -10004, -609, -600, ...: it may or may not have happened
    REFUSED = "refused"         # -1743
    FAILED = "failed"           # -2700 and the like: UTM says why
    MISSING = "not found"       # or not allowed, or not ready: utmctl hides the reason (contract 0)
    NO_APP = "no application"
    USAGE = "usage"             # utmctl does not know the command
    CRASHED = "crashed"
    HUNG = "hung"
    ENDED = "ended"             # by kodemachine, which no longer needed the answer


SCRIPT_ERROR = re.compile(r"(?:\d+:\d+: \S+ error: )?(?:UTM got an error: )?(.*) \((-\d+)\)")


class Reply(NamedTuple):
    """The answer to one call; `numbers` of all Apple Event errors on stderr, in order."""

    verb: str
    outcome: Outcome
    code: int
    out: str
    err: str
    numbers: tuple[int, ...]
    seconds: float

    @property
    def sentence(self) -> str:
        """UTM's own words on stderr, or utmctl's about a usage error; without any, the error's number."""
        own = ("Error from event: ", "NOTE: ", "WARNING: ")
        lines = [line.strip() for line in self.err.splitlines() if line.strip() and not line.startswith(own)]
        if self.outcome is Outcome.USAGE:
            # The usage and a hint follow.
            lines = [line for line in lines if line.startswith("Error: ")]
        if not lines:
            return f"error {self.numbers[-1]}" if any(self.numbers) else ""
        script = SCRIPT_ERROR.fullmatch(lines[-1])
        if self.verb == "osascript" and script:
            return script.group(1)
        return lines[-1].removeprefix("Error: ")


class Row(NamedTuple):
    """One machine as `utmctl list` shows it."""

    uuid: str
    power: Power
    name: str


class Listing(NamedTuple):
    """The rows of one list. `whole`: no error. `named`: all UUIDs and names are known, if not all states.
    `broken`: the first row that cannot be read, if there is one."""

    rows: list[Row]
    whole: bool
    named: bool
    broken: str


LINE_BREAK = "A machine's name may have a line break: rename it in UTM."


class Rows(list[Row]):
    """The machines of a list. If a row is `broken`, the absence of a machine proves nothing."""

    def __init__(self, rows: Iterable[Row], broken: str = "") -> None:
        super().__init__(rows)
        self.broken = broken

    def must_be_complete(self) -> None:
        """Raises KodeError if a row cannot be read: a machine that is not shown may exist all the same."""
        if self.broken:
            raise KodeError("UTM's list has a row that cannot be read, so it does not show whether a machine exists: "
                            + repr(self.broken), LINE_BREAK)


class Hardware(NamedTuple):
    """A machine's hardware as UTM configures it: MAC addresses (`?` for one that UTM does not report), and the
    allocated MiB of each drive that is not removable, rounded down. `known`: UTM has reported them. `is_online`: a
    network interface has a route out of the Mac."""

    macs: list[str]
    drives: list[int]
    known: bool = True
    is_online: bool = False


UUID = re.compile(r"[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}")
MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
LIST_HEADER = "UUID" + " " * 33 + "Status" + " " * 3 + "Name"
# The row of a machine that was deleted while UTM listed it begins so.
BLANK_ROW = " " * 36
EVENT_ERROR = re.compile(r"^Error from event: .*$", re.MULTILINE)
OSSTATUS = re.compile(r"OSStatus[^\d\n]*?(-\d+)")
# The programs that are called beside utmctl.
PROGRAMS = ("osascript", "curl", "hdiutil", "sysctl", "ssh", "ssh-add", "env")

NOT_ALLOWED = ("macOS does not let this terminal control UTM. Allow it in System Settings > Privacy & Security > "
               "Automation. It does not work from an ssh session or before somebody has logged in at the screen. "
               "To be asked again: tccutil reset AppleEvents")


def event_numbers(err: str) -> tuple[int, ...]:
    """The OSStatus of each Apple Event error in utmctl's stderr; 0 where a line has none."""
    found = (OSSTATUS.search(line) for line in EVENT_ERROR.findall(err))
    return tuple(int(match.group(1)) if match else 0 for match in found)


def outcome_of(number: int) -> Outcome:
    """The class of an OSStatus (contract 4). An unknown one is transient: the state decides."""
    classes = {-1743: Outcome.REFUSED, -2700: Outcome.FAILED, -1708: Outcome.FAILED, -2741: Outcome.FAILED,
               -1728: Outcome.MISSING, -1719: Outcome.MISSING}
    return classes.get(number, Outcome.TRANSIENT)


def classify_program(verb: str, code: int, err: str) -> tuple[Outcome, tuple[int, ...]]:
    """The outcome of a call to one of PROGRAMS; osascript prints the number in its last line (contract 7)."""
    if code == 0:
        return Outcome.DONE, ()
    number = 0
    lines = err.strip().splitlines()
    if verb == "osascript" and lines:
        match = SCRIPT_ERROR.fullmatch(lines[-1].strip())
        number = int(match.group(2)) if match else 0
    if code < 0:
        return Outcome.CRASHED, (number,)
    if number:
        return outcome_of(number), (number,)
    return Outcome.FAILED, (number,)


def classify_utmctl(code: int, err: str) -> tuple[Outcome, tuple[int, ...]]:
    """The outcome of a call to utmctl.

    With --hide an error of its own may precede a success (contract 4), so the last number counts. A refusal counts
    wherever it appears.
    """
    numbers = event_numbers(err)
    if -1743 in numbers:
        return Outcome.REFUSED, numbers
    if code < 0 or code in (128 + signal.SIGTRAP, 128 + signal.SIGABRT):
        return Outcome.CRASHED, numbers
    if numbers:
        return outcome_of(numbers[-1]), numbers
    if code == 64 and err.startswith("Error: "):
        return Outcome.USAGE, numbers
    if code == 1 and err.rstrip().endswith("Error: Application not found."):
        return Outcome.NO_APP, numbers
    if code == 1 and err.rstrip() == "Error: Virtual machine not found.":
        return Outcome.MISSING, numbers
    if code == 0:
        return Outcome.DONE, numbers
    return Outcome.FAILED, numbers


def classify(verb: str, code: int, err: str) -> tuple[Outcome, tuple[int, ...]]:
    """The outcome of a call that has ended by itself, and the numbers of its Apple Event errors."""
    if verb in PROGRAMS:
        return classify_program(verb, code, err)
    return classify_utmctl(code, err)


def was_not_heard(reply: Reply) -> bool:
    """Whether UTM probably never got a request. It may be repeated if nothing has changed (contract 4)."""
    if reply.outcome is Outcome.MISSING:
        return True
    return reply.outcome is Outcome.TRANSIENT and reply.numbers[-1] in (-10004, -609, -600, -10000)


def parse_list(out: str) -> tuple[list[Row], str, bool]:
    """The rows of `utmctl list`, cut by columns (contract 1.2); the first line that is not a row; and whether the
    header and the UUIDs are correct.

    A line that is not a row is the rest of the name before it, so that name cannot be read either. The exception is the
    blank row of a machine that has just been deleted.
    """
    # A name may contain other characters at which splitlines() splits.
    header, *lines = out.removesuffix("\n").split("\n")
    rows: list[Row] = []
    broken = ""
    for line in lines:
        if UUID.fullmatch(line[:36]) and line[36:37] == line[45:46] == " " and line[46:]:
            rows.append(Row(line[:36], Power(line[37:45].rstrip()), line[46:]))
        elif rows and not line.startswith(BLANK_ROW):
            half = rows.pop()
            broken = broken or f"{half.uuid} {half.power.value} {half.name}"
        else:
            broken = broken or line.strip() or "a row without a name"
    unique = len({row.uuid for row in rows}) == len(rows)
    return rows, broken, header == LIST_HEADER and unique


def judge_list(reply: Reply) -> Listing:
    """How far a list can be believed. Each unknown state accounts for one error, and each blank row for three; any
    other error spoils the list."""
    rows, broken, sound = parse_list(reply.out)
    unknown = sum(row.power is Power.UNKNOWN for row in rows)
    blank = sum(line.startswith(BLANK_ROW) for line in reply.out.splitlines())
    whole = sound and not broken and not unknown and reply.outcome is Outcome.DONE
    ended = reply.outcome not in (Outcome.HUNG, Outcome.CRASHED)
    accounted = len(reply.numbers) <= unknown + 3 * blank
    readable = sound and ended and accounted and bool(rows or broken)
    return Listing(rows, whole, whole or (readable and not broken), broken if readable else "")


def parse_hardware(out: str) -> dict[str, Hardware]:
    """The answer to the script HARDWARE, by UUID."""
    found: dict[str, Hardware] = {}
    for uuid, key, value in re.findall(r"^(\S{36}) (\S+) ?(.*)$", out, re.MULTILINE):
        if key == "unknown":
            found[uuid] = Hardware(["?"], [], known=False)
            continue
        hardware = found.setdefault(uuid, Hardware([], []))
        if key == "online":
            found[uuid] = hardware._replace(is_online=True)
        elif key == "mac":
            hardware.macs.append(value.upper() if MAC.fullmatch(value) else "?")
        elif key == "drive" and re.fullmatch(r"\d{1,12}", value):
            hardware.drives.append(int(value))
    return found


# The share of the base's allocated size below which a drive was not copied to its end (contract 10.13).
WHOLE = 0.9


def missing_part(copy: Hardware, base: Hardware | None) -> str:
    """The part of its base that a copy lacks, in words; empty if it is whole (contract 10.13).

    If the base is gone, the sizes cannot be compared. Then the copy must only have something on a drive.
    """
    if base is None:
        return "" if any(copy.drives) else "its drives are empty"
    if len(copy.drives) < len(base.drives):
        return f"it has {len(copy.drives)} of {len(base.drives)} drives"
    for size, whole in zip(copy.drives, base.drives):
        if size < whole * WHOLE:
            return f"a drive has {size} of {whole} MiB"
    return ""


# Bytes of each stream that the guest agent keeps (contract 5), and bytes that are kept of a child's stream, which has
# both streams of a guest command in base64.
EXEC_OUTPUT = 16 << 20
MAX_ANSWER = EXEC_OUTPUT * 4


class Call:
    """A child process: stdin from null, both streams captured, in a session of its own, where no Ctrl-C reaches it.

    It is ended, with all that it started, when its limit (seconds) has passed.
    """

    def __init__(self, verb: str, argv: Sequence[str], limit: float, tick: Callable[[], None],
                 keep: Sequence[int] = ()) -> None:
        self.verb, self.argv, self._tick = verb, list(argv), tick
        self._began = time.monotonic()
        self._deadline = self._began + limit
        self._child = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, start_new_session=True, pass_fds=tuple(keep))
        assert self._child.stdout and self._child.stderr
        self._pipes = [self._child.stdout, self._child.stderr]
        self._read = {pipe.fileno(): bytearray() for pipe in self._pipes}
        self._open = set(self._read)
        self.reply: Reply | None = None

    @property
    def handles(self) -> list[int]:
        """The handles on which to wait for news from the child."""
        return list(self._open)

    def wait(self, seconds: float | None = None) -> Reply | None:
        """The reply, or None if the child still runs after `seconds` (None: up to its limit)."""
        until = self._deadline
        if seconds is not None:
            until = min(until, time.monotonic() + seconds)
        while self.reply is None:
            left = until - time.monotonic()
            self._wait_for_news(max(0.0, min(left, 0.2)))
            if self.reply:
                break
            if time.monotonic() >= self._deadline:
                self.end(Outcome.HUNG)
            elif left <= 0:
                break
            self._tick()
        return self.reply

    def _wait_for_news(self, seconds: float) -> None:
        """Reads the streams while they are open; then waits for the end."""
        if self._open:
            for handle in select.select(list(self._open), [], [], seconds)[0]:
                self._take(handle)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
            self._finish(None)

    def _take(self, handle: int) -> None:
        data = os.read(handle, 1 << 16)
        if not data:
            self._open.discard(handle)
        elif len(self._read[handle]) < MAX_ANSWER:
            self._read[handle] += data

    def end(self, outcome: Outcome = Outcome.ENDED) -> None:
        """Ends the child and its children at once, if they still run. UTM continues with what it was asked for."""
        if self.reply is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._finish(outcome)

    def _finish(self, ended: Outcome | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        code = self._child.returncode
        out, err = (data.decode("utf-8", "replace") for data in self._read.values())
        outcome, numbers = classify(self.verb, code, err)
        seconds = time.monotonic() - self._began
        self.reply = Reply(self.verb, ended or outcome, code, out, err, numbers, seconds)


def printed_argument(word: str) -> str:
    """An argument as -v shows it: of a script its name, of a long word its beginning."""
    if word.startswith("-- kodemachine: "):
        return "(" + word.partition("\n")[0][len("-- kodemachine: "):] + ")"
    if len(word) <= 80 and "\n" not in word:
        return word
    return word.partition("\n")[0][:40] + "..."


# Seconds that one call may take before it is ended (contract 10). The state is read afterwards in any case, so a limit
# only bounds how long kodemachine waits for the answer. `clone` is limited by its callers.
LIMITS = {"list": 30.0, "status": 20.0, "ip-address": 20.0, "start": 30.0, "stop": 30.0, "suspend": 60.0,
          "delete": 120.0, "version": 20.0, "osascript": 60.0, "ssh": 10.0, "ssh-add": 10.0, "sysctl": 10.0}
UTMCTL_PLACES = ("/Applications/UTM.app/Contents/MacOS/utmctl", "~/Applications/UTM.app/Contents/MacOS/utmctl")
# Seconds for a clean list, all its repetitions together.
LOOK_LIMIT = 65.0
# Seconds before an empty list is believed: UTM loads its machines with its window (contract 4).
WARM_UP = 10.0
# Seconds for comparing and changing network addresses.
UNIQUE_LIMIT = 30.0
# The number of utmctl calls, and of machines, at the same time.
WIDTH = 8


class Utmctl:
    """The only door to utmctl, osascript and PROGRAMS: finds them, limits every call, and judges its result."""

    def __init__(self, configured: str | None, interrupts: Interrupts, notes: Notes) -> None:
        self._configured, self._interrupts, self.notes = configured, interrupts, notes
        self._found: dict[str, str] = {}
        self._calls: set[Call] = set()
        self._closed = self._warned = self._is_known_empty = False

    def path(self, program: str = "utmctl") -> str:
        """The path of a program. Of utmctl the real one: through a link UTM's sandbox does not find UTM (contract 4).

        Raises Unreachable, or KodeError for a program other than utmctl and osascript.
        """
        if program not in self._found:
            places = self._places(program)
            usable = [place for place in map(os.path.expanduser, places)
                      if os.path.isfile(place) and os.access(place, os.X_OK)]
            if not usable:
                raise self._no_program(program)
            self._found[program] = os.path.realpath(usable[0]) if program == "utmctl" else usable[0]
        return self._found[program]

    def _places(self, program: str) -> list[str]:
        if program == "utmctl" and self._configured:
            return [self._configured]
        on_path = shutil.which(program)
        places = [on_path] if on_path else []
        if program == "utmctl":
            places += UTMCTL_PLACES
        return places

    def _no_program(self, program: str) -> KodeError:
        if program == "osascript":
            return Unreachable("osascript was not found", "It is a part of macOS: check that /usr/bin is on PATH.")
        if program != "utmctl":
            return KodeError(f"{program} was not found on PATH",
                             "It is a part of macOS: check that /usr/bin and /usr/sbin are on PATH.")
        where = f" at {self._configured}" if self._configured else ""
        return Unreachable(f"utmctl was not found{where}", "Install UTM: brew install --cask utm; or set the path of "
                           "its utmctl: kodemachine config set utmctl PATH")

    def begin(self, verb: str, *args: str, limit: float | None = None, keep: Sequence[int] = ()) -> Call:
        """Starts one call; `limit` in seconds (None: the verb's own), `keep`: handles that it inherits.

        Raises Unreachable if it cannot be run.
        """
        argv = [self.path(verb), *args] if verb in PROGRAMS else [self.path(), verb, *args]
        if limit is None:
            limit = LIMITS[verb]
        try:
            # A signal between the start of the child and its entry here would lose it.
            with self._interrupts.held():
                call = Call(verb, argv, limit, self.notes.tick, keep)
                self._calls.add(call)
        except OSError as failure:
            if failure.errno == errno.E2BIG:
                raise UsageError("the command line is too long", "Copy a script into the machine with kodemachine cp, "
                                 "and run that.") from None
            raise Unreachable(f"{argv[0]} cannot be run: {failure.strerror}",
                              "If it is not UTM's own: kodemachine config set utmctl PATH") from None
        if self._closed:
            call.end()
            raise Interrupted(signal.SIGTERM)
        return call

    def finish(self, call: Call, seconds: float | None = None) -> Reply | None:
        """The reply of a call, or None if it still runs after `seconds`."""
        reply = call.wait(seconds)
        if reply and call in self._calls:
            self._calls.discard(call)
            words = [printed_argument(arg) for arg in call.argv[1:]]
            numbers = "".join(f" {number}" for number in reply.numbers)
            self.notes.trace(f"{os.path.basename(call.argv[0])} {shlex.join(words)}: {reply.outcome.value}{numbers}, "
                             f"exit {reply.code}, {reply.seconds:.2f} s")
        return reply

    def drop(self, call: Call | None) -> None:
        """Ends a call whose answer is not needed any more."""
        if call:
            call.end()
            self.finish(call)

    def call(self, verb: str, *args: str, limit: float | None = None) -> Reply:
        """The reply of one call; `limit` in seconds (None: the verb's own)."""
        reply = self.finish(self.begin(verb, *args, limit=limit))
        assert reply
        return reply

    def script(self, text: str, *args: str, limit: float | None = None) -> Reply:
        """Runs an AppleScript. Unlike utmctl, osascript reports a failure by its exit status (contract 7)."""
        return self.call("osascript", "-e", text, "--", *args, limit=limit)

    def answers(self, *words: str, limit: float, first: float = 0.3, longest: float = 2.0) -> Iterator[Reply]:
        """Asks a question again and again, for `limit` seconds. Raises Unreachable if no repetition can help."""
        for _ in poll(limit, self.notes.tick, first, longest):
            yield self.raise_for_refusal(self.call(*words))

    def gather(self, calls: Sequence[tuple[str, ...]], limit: float) -> list[Reply]:
        """The replies of many calls, at most WIDTH * 4 at the same time; `limit` in seconds for each."""
        waiting = list(enumerate(calls))
        active: dict[int, Call] = {}
        replies: dict[int, Reply] = {}
        while waiting or active:
            while waiting and len(active) < WIDTH * 4:
                i, words = waiting.pop(0)
                active[i] = self.begin(*words, limit=limit)
            for i in self._with_news(active):
                reply = self.finish(active[i], 0)
                if reply:
                    replies[i] = reply
                    del active[i]
            self.notes.tick()
        return [replies[i] for i in range(len(calls))]

    @staticmethod
    def _with_news(active: dict[int, Call]) -> list[int]:
        """The calls that have something to read, or may have ended, within 0.2 s."""
        owners = {handle: i for i, call in active.items() for handle in call.handles}
        # A call that has closed its streams ends at once.
        if len(owners) < 2 * len(active):
            select.select(list(owners), [], [], 0.005)
            return list(active)
        ready = select.select(list(owners), [], [], 0.2)[0]
        if ready:
            return list({owners[handle] for handle in ready})
        return list(active)

    def raise_for_refusal(self, reply: Reply) -> Reply:
        """The reply, unless no repetition could help: raises Unreachable."""
        if reply.outcome is Outcome.REFUSED:
            raise NotPermitted("macOS does not permit control of UTM (-1743)", NOT_ALLOWED)
        if reply.outcome is Outcome.NO_APP:
            raise Unreachable("utmctl does not find UTM",
                              "Set the path of the utmctl inside UTM.app: kodemachine config set utmctl PATH")
        if reply.outcome is Outcome.USAGE:
            program = f"utmctl {self.version()}".rstrip()
            raise Unreachable(f"{program} does not know the command {reply.verb}: {reply.sentence}",
                              "Use a UTM from 4.6.5 to 5.0.9. To check it: kodemachine doctor")
        return reply

    def version(self) -> str:
        """The version of the application beside utmctl, from its Info.plist; empty if that cannot be read."""
        import plistlib

        contents = os.path.dirname(os.path.dirname(self.path()))
        try:
            with open(os.path.join(contents, "Info.plist"), "rb") as file:
                return str(plistlib.load(file)["CFBundleShortVersionString"])
        # Also expat's own error, whose class plistlib does not name.
        except Exception:
            return ""

    # -- the list of machines

    def rows(self, partial: bool = False, call: Call | None = None) -> Rows:
        """A clean list, asked for until it is one (contract 0, 4). `call`: one for it that has begun already.

        After three answers a list counts in which only states are unknown. An empty one counts only after WARM_UP, once
        per run. After three equal answers a row that cannot be read is not waited for. Then `broken` is set; it is an
        error unless `partial`, for callers that conclude nothing from the absence of a machine.
        Raises Unreachable, TimedOut or KodeError.
        """
        crashes, equal, empty_since = 0, 0, float("inf")
        before: Listing | None = None
        for asked, _ in enumerate(poll(LOOK_LIMIT, self.notes.tick, 0.2, 2.0), 1):
            answer = self.finish(call or self.begin("list"))
            assert answer
            call, reply = None, self.raise_for_refusal(answer)
            listing = judge_list(reply)
            is_empty = listing.whole and not listing.rows
            empty_since = min(empty_since, time.monotonic()) if is_empty else float("inf")
            if self._is_good(listing, asked, time.monotonic() - empty_since):
                return Rows(listing.rows)
            equal = equal + 1 if listing == before else 1
            before = listing
            if listing.broken and equal >= 3:
                return self._partial_rows(listing, partial)
            if is_empty and asked == 1:
                self.notes.step("UTM shows no machines; waiting in case it is still starting")
            crashes += reply.outcome is Outcome.CRASHED
            if crashes == 3:
                raise Unreachable(f"utmctl crashed (exit {reply.code})", "It needs your session at the screen, outside "
                                  "of any sandbox. Is UTM installed completely?")
        raise self._no_list(reply)

    def _is_good(self, listing: Listing, asked: int, empty_for: float) -> bool:
        """Whether the answer number `asked` counts; `empty_for`: seconds for which the list has been empty."""
        if listing.rows:
            self._is_known_empty = False
            return listing.whole or (listing.named and asked >= 3)
        if not listing.whole:
            return False
        # An empty list is waited for once per run.
        self._is_known_empty = self._is_known_empty or empty_for >= WARM_UP
        return self._is_known_empty

    def _partial_rows(self, listing: Listing, partial: bool) -> Rows:
        rows = Rows(listing.rows, listing.broken)
        if not partial:
            rows.must_be_complete()
        if not self._warned:
            self.notes.warn(f"UTM's list has a row that cannot be read: {rows.broken!r}. {LINE_BREAK}")
        self._warned = True
        return rows

    def _no_list(self, reply: Reply) -> TimedOut:
        """The error when the last of many answers was not a clean list."""
        if reply.outcome is Outcome.DONE:
            return TimedOut("UTM's list cannot be read", f"To see its answer: {shlex.quote(self.path())} list")
        number = f" ({reply.numbers[-1]})" if reply.numbers else ""
        remedy = NOT_ALLOWED if -10004 in reply.numbers else "Otherwise quit UTM and open it again."
        return TimedOut(f"UTM gave no list within {LOOK_LIMIT:.0f} s{number}",
                        f"Does UTM ask something on the screen? Do not use sudo. {remedy}")

    def list_once(self, limit: float) -> list[Row]:
        """The rows of one list within `limit` seconds, believed as it is: to show it, never to act on it.

        Raises Unreachable or TimedOut.
        """
        reply = self.raise_for_refusal(self.call("list", limit=limit))
        rows, _, sound = parse_list(reply.out)
        if reply.outcome is Outcome.HUNG:
            raise TimedOut(f"UTM gave no list within {seconds_text(limit)}", "It may only be slow: kodemachine list")
        if not rows and not (sound and reply.outcome is Outcome.DONE):
            number = f" ({reply.numbers[-1]})" if reply.numbers else ""
            raise Unreachable(f"UTM gave no list{number}", "It may still be starting: kodemachine list")
        return rows

    def close(self) -> None:
        """Ends all calls that still run; used once, at the end."""
        self._closed = True
        for call in list(self._calls):
            call.end()


# ---- configuration


class Settings(NamedTuple):
    """The configuration. Times in seconds; paths are expanded; None: unset."""

    base_image: str | None = None
    ssh_user: str | None = None
    ssh_port: int = 22
    prefix: str = "km-"
    identity_file: str | None = None
    boot_timeout: float = 120
    clone_timeout: float = 600
    stop_timeout: float = 60
    utmctl: str | None = None
    documents: str | None = None
    first_boot: str | None = None

    @property
    def lock_limit(self) -> float:
        """Seconds to wait for the lock of another kodemachine."""
        return self.clone_timeout + self.boot_timeout


PREFIX = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?-")


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_user(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.][\w.-]*", value))


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536


def _is_prefix(value: object) -> bool:
    if not isinstance(value, str) or not PREFIX.fullmatch(value) or len(value) >= 40:
        return False
    return not "kodeimage-v".startswith(value) and not value.startswith("kodeimage-v")


# For each key: the valid values, in words for a person, and the test for them.
SETTINGS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "base_image": ("the name of a machine", _is_text),
    "ssh_user": ("a user's name", _is_user),
    "ssh_port": ("a port number", _is_port),
    "prefix": ("lower-case letters, digits and hyphens that end in a hyphen, such as 'km-'", _is_prefix),
    "identity_file": ("a path", _is_text),
    "boot_timeout": ("a positive number of seconds", _is_seconds),
    "clone_timeout": ("a positive number of seconds", _is_seconds),
    "stop_timeout": ("a positive number of seconds", _is_seconds),
    "utmctl": ("a path", _is_text),
    "documents": ("a path", _is_text),
    "first_boot": ("a path", _is_text),
}
PATHS = ("identity_file", "utmctl", "documents", "first_boot")
# Keys of earlier versions, which are ignored.
REMOVED_SETTINGS = ("headless",)


def json_problem(failure: json.JSONDecodeError) -> str:
    """The problem of a text that is not JSON, in plain words where other formats differ from JSON."""
    before, after = failure.doc[:failure.pos], failure.doc[failure.pos:]
    if after.startswith(("//", "/*", "#")):
        return "JSON does not allow comments"
    # From Python 3.13 on, the position is that of the comma.
    has_comma = before.rstrip().endswith(",") or after.startswith(",")
    if has_comma and after.lstrip(", \t\r\n").startswith(("}", "]")):
        return "JSON does not allow a comma after the last value"
    return failure.msg


class Config:
    """The configuration file. A file that is broken is an error, and is never replaced by the defaults."""

    def __init__(self, path: str, notes: Notes) -> None:
        self.path, self._notes = path, notes

    def _text(self) -> str | None:
        try:
            text = read_text(self.path)
            if text is not None and os.stat(self.path).st_uid not in (os.geteuid(), 0):
                raise PermissionError(errno.EPERM, "belongs to another user")
        except PermissionError as failure:
            raise UsageError(f"{self.path}: {failure.strerror}", access_hint(self.path)) from None
        except OSError as failure:
            raise UsageError(f"{self.path}: {failure.strerror}", "Fix the file, or move it away.") from None
        # Some editors begin a file with a byte order mark.
        return text and text.removeprefix("\ufeff")

    def load(self, unless: str = "") -> dict[str, Any]:
        """The keys that the file sets, checked except for the key `unless`.

        Raises UsageError with the file, the position and the problem.
        """
        text = self._text()
        if text is None:
            return {}
        found = self._parse(text)
        removed = [key for key in REMOVED_SETTINGS if found.pop(key, None) is not None]
        if removed:
            self._notes.warn(f"{self.path}: ignoring keys that are no longer used: {', '.join(removed)}. "
                             f"To remove one: kodemachine config unset {removed[0]}")
        for key, value in found.items():
            if key != unless:
                self._check(key, value, self._position(text, key) + ": ")
        if not unless:
            self._check_image(found)
        return found

    def _parse(self, text: str) -> dict[str, Any]:
        if not text.strip():
            raise UsageError(f"{self.path}:1:1: the file is empty", "Write {} into it, or remove it.")
        try:
            found = json.loads(text, object_pairs_hook=self._pairs)
        except json.JSONDecodeError as failure:
            where = f"{self.path}:{failure.lineno}:{failure.colno}"
            raise UsageError(f"{where}: {json_problem(failure)}", "The file must be one JSON object.") from None
        except (ValueError, RecursionError) as failure:
            raise UsageError(f"{self.path}: {failure}", "The file must be one JSON object.") from None
        if not isinstance(found, dict):
            raise UsageError(f"{self.path}:1:1: not a JSON object", 'An example: {"ssh_user": "me"}')
        return found

    @staticmethod
    def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {twice!r} appears twice")
        return found

    def _position(self, text: str, key: str) -> str:
        match = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
        at = match.start() if match else 0
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return f"{self.path}:{line}:{column}"

    @staticmethod
    def _check(key: str, value: object, where: str = "") -> None:
        """`where`: the value's place in the file; empty for a value on the command line."""
        if key not in SETTINGS:
            import difflib

            near = difflib.get_close_matches(key, SETTINGS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "Known keys: " + ", ".join(SETTINGS)
            raise UsageError(f"{where}unknown key {key!r}", hint)
        wanted, test = SETTINGS[key]
        if value is None or test(value):
            return
        problem = f"{where}{key} must be {wanted}, not {json.dumps(value)}"
        if where:
            raise UsageError(problem, f"Fix it there, or: kodemachine config unset {key}")
        raise UsageError(problem, f"To use the default: kodemachine config unset {key}")

    def _check_image(self, found: dict[str, Any]) -> None:
        """An image that looks like a clone would be treated as a clone as soon as another image is configured."""
        image, prefix = found.get("base_image"), found.get("prefix") or Settings().prefix
        if image and image.startswith(prefix):
            raise UsageError(f"{self.path}: base_image {image!r} begins with the prefix of clones, {prefix!r}",
                             "Rename the image in UTM, then: kodemachine config set base_image NAME")

    def settings(self) -> Settings:
        """The file's values over the defaults, with `~` expanded in paths. Raises UsageError."""
        found = {key: value for key, value in self.load().items() if value is not None}
        for key in set(PATHS) & set(found):
            found[key] = os.path.expanduser(found[key])
        return Settings(**found)

    def set(self, key: str, text: str) -> None:
        """Sets one key and keeps the others. Raises UsageError or KodeError.

        A relative path is stored as an absolute one: other runs are in other folders.
        """
        found = self.load(unless=key)
        value: object = text
        if key in PATHS and text and not text.startswith("~"):
            value = os.path.abspath(text)
        elif key in SETTINGS and isinstance(Settings._field_defaults[key], (int, float)):
            with contextlib.suppress(ValueError):
                value = json.loads(text)
        self._check(key, value)
        line = json.dumps({key: value})
        if found:
            line = line[1:-1]
        found[key] = value
        self._write(found, f"If another program manages that file, add this to it: {line}")

    def unset(self, key: str) -> None:
        """Removes one key, known or not, and keeps the others. Raises UsageError or KodeError."""
        found = self.load(unless=key)
        if key not in REMOVED_SETTINGS and key not in found:
            self._check(key, None)
            return
        found.pop(key, None)
        self._write(found, f"If another program manages that file, remove {key} from it there.")

    def _write(self, found: dict[str, Any], hint: str) -> None:
        """A linked file keeps its link. `hint`: for a file that cannot be written."""
        self._check_image(found)
        write_file(os.path.realpath(self.path), json.dumps(found, indent=2) + "\n", hint)


# ---- memory: Record, State, orders


HOST_KEY = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)) ([A-Za-z0-9+/]{40,2000}={0,3})")


def parse_host_keys(lines: Sequence[str]) -> list[str]:
    """The host keys, as `type base64`. The type is also inside the key; a guest may send anything."""
    import base64
    import binascii

    keys = []
    for line in lines:
        match = HOST_KEY.match(line)
        if not match or match.end() not in (len(line), line.find(" ", match.end())):
            continue
        kind = match.group(1).encode()
        with contextlib.suppress(binascii.Error):
            key = base64.b64decode(match.group(2), validate=True)
            if key.startswith(len(kind).to_bytes(4, "big") + kind):
                keys.append(f"{match.group(1)} {match.group(2)}")
    return keys[:8]


class Record(NamedTuple):
    """The data that kodemachine keeps about one machine. Empty values are not stored."""

    name: str = ""
    image: str = ""                 # the name of the image that it was cloned from
    image_uuid: str = ""
    created: str = ""               # ISO 8601, UTC
    machine_id: str = ""
    mac_is_unique: bool = False
    is_named: bool = False          # the guest has its hostname, and the host keys that it reported are pinned
    refusal: str = ""               # the lasting reason why it is not named or reports no host keys, as it was said
    never_started: bool = False
    is_copy: bool = False           # of another clone: needs host keys and a machine-id of its own
    copy_of: str = ""               # the UUID of the machine that it is not yet proved to be a whole copy of
    is_temporary: bool = False      # made by --rm
    is_offline: bool = False        # no route out of the Mac: its network interfaces are host-only
    wake: str = ""                  # the Mac's last wake-up (see `last_wake`) when the guest's clock was right
    first_boot: str = ""            # "pending" or "done"
    making: str = ""                # "begun" or "sealed", by `base create`

    @property
    def network(self) -> str | None:
        """`shared`, or `offline`, as it was proved before a start; None: unknown."""
        if not self.mac_is_unique:
            return None
        if self.is_offline:
            return "offline"
        return "shared"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Record:
        """A record as it is stored, by this version or by 0.1.0. Unknown keys are ignored."""
        fields = {key: value for key, value in found.items()
                  if key in cls._fields and type(value) is type(cls._field_defaults[key])}
        image = found.get("image")
        if isinstance(image, dict):
            fields.update(image=str(image.get("name") or ""), image_uuid=str(image.get("uuid") or ""))
        # `personality` does not become `is_named`: version 0.1.0 did not always have the host keys in known_hosts.
        renamed = {"mac_checked": "mac_is_unique", "new": "never_started", "fork": "is_copy", "rm": "is_temporary"}
        fields.update({new: True for old, new in renamed.items() if found.get(old)})
        # The script ran in a disposable boot, which left nothing on the disk.
        if fields.get("first_boot") == "ran":
            fields["first_boot"] = "pending"
        if found.get("making") is True:
            fields["making"] = "sealed" if found.get("sealed") else "begun"
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """The values that are not empty."""
        return {key: value for key, value in self._asdict().items() if value}


# Keys of version 0.1.0 that were about features which no longer exist.
REMOVED_KEYS = ("saved", "disposable")


class State:
    """The state folder: records by UUID, pinned host keys, orders, locks. It is made when it is first needed."""

    def __init__(self, folder: str, notes: Notes) -> None:
        self.folder, self._notes = folder, notes
        # The problem with the records, which is reported once.
        self.trouble = ""
        self._has_warned = False
        # The records as they were read last, and what identifies that file: each write makes a new one.
        self._cached: dict[str, Record] = {}
        self._cached_file: tuple[int, int, int] | None = None

    def path(self, *parts: str) -> str:
        """A path in the state folder."""
        return os.path.join(self.folder, *parts)

    # -- locks

    @contextlib.contextmanager
    def lock(self, name: str, limit: float, *, wait: bool = True, what: str = "") -> Iterator[None]:
        """Holds the flock `name`. It ends with the process, so it is never stale.

        Raises TimedOut after `limit` seconds, or Busy at once without `wait`; both name `what` and the owner's pid.
        """
        make_folder(self.folder)
        make_folder(self.path("locks"))
        path = self.path("locks", name + ".lock")
        with explained(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            self._take_lock(handle, what or name, limit if wait else 0.0)
            # The pid is only for people, and purge must work when the disk is full.
            with contextlib.suppress(OSError):
                os.pwrite(handle, f"{os.getpid():<19}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def locked(self, name: str) -> bool:
        """Whether a process holds that lock."""
        return is_locked(self.path("locks", name + ".lock"))

    def _take_lock(self, handle: int, what: str, limit: float) -> None:
        has_said = False
        owner = "unknown"
        for left in poll(limit, self._notes.tick, 0.05, 0.5):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            is_other = owner not in (str(os.getpid()), "unknown")
            if not has_said and limit - left > 0.5 and is_other:
                has_said = True
                self._notes.step(f"waiting for another kodemachine (pid {owner}) to finish with {what}")
        kind = TimedOut if limit else Busy
        hint = f"To see it: ps -p {owner}" if owner.isdigit() else "Try again in a moment."
        raise kind(f"{what} is in use by another kodemachine (pid {owner})", hint)

    # -- records

    def records(self) -> dict[str, Record]:
        """The records by UUID. A broken file counts as lost, with a warning. Raises KodeError."""
        if os.path.isdir(self.folder):
            # A folder of another user could contain anything.
            make_folder(self.folder)
        problem = "kodemachine did not write it"
        try:
            file = self._records_file()
            if file is None:
                return {}
            if file == self._cached_file:
                return dict(self._cached)
            found = json.loads(read_text(self.path("machines.json")) or "{}")
            if isinstance(found, dict) and all(isinstance(record, dict) for record in found.values()):
                self._warn_of_removed_keys(found)
                self._cached = {uuid: Record.from_json(record) for uuid, record in found.items()}
                self._cached_file = file
                return dict(self._cached)
        except OSError as failure:
            problem = failure.strerror or str(failure)
        except (ValueError, RecursionError) as failure:
            problem = str(failure)
        if not self.trouble:
            self.trouble = f"{self.path('machines.json')} cannot be read ({problem})"
            self._notes.warn(f"{self.trouble}; continuing without it")
        return {}

    def _records_file(self) -> tuple[int, int, int] | None:
        """The inode, time and size of machines.json; None if it is missing."""
        try:
            info = os.stat(self.path("machines.json"))
        except FileNotFoundError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size

    def _warn_of_removed_keys(self, found: dict[str, dict[str, Any]]) -> None:
        removed = [key for key in REMOVED_KEYS if any(record.get(key) for record in found.values())]
        if removed and not self._has_warned:
            self._has_warned = True
            keys = ", ".join(removed)
            self._notes.warn(f"{self.path('machines.json')}: ignoring keys that are no longer used: {keys}")

    def _rewrite(self, change: Callable[[dict[str, Record]], None]) -> None:
        """Changes the records under their lock, and writes them if they differ."""
        with self.lock("records", 30, what="the records"):
            records = self.records()
            before = dict(records)
            change(records)
            if records != before:
                stored = {uuid: record.to_json() for uuid, record in records.items()}
                write_file(self.path("machines.json"), json.dumps(stored, indent=1, sort_keys=True) + "\n")

    def remember(self, uuid: str, **changes: Any) -> Record:
        """Changes fields of a machine's record, and returns it. An empty record is removed."""
        changed = Record()

        def change(records: dict[str, Record]) -> None:
            nonlocal changed
            changed = records.get(uuid, Record())._replace(**changes)
            records[uuid] = changed
            if changed == Record():
                del records[uuid]
        self._rewrite(change)
        return changed

    def begin(self, uuid: str, record: Record, listed: set[str]) -> None:
        """Records a new machine. Records and host keys of earlier machines of its name, which are not `listed`, go."""
        def change(records: dict[str, Record]) -> None:
            self._remove(records, record.name, listed | {uuid})
            records[uuid] = record
        self._rewrite(change)
        self.pin(record.name, [])

    def forget(self, name: str, listed: set[str]) -> None:
        """Removes the records of a name's machines that are not `listed` any more, and then its host keys."""
        if not os.path.isdir(self.folder):
            return
        left = False

        def change(records: dict[str, Record]) -> None:
            nonlocal left
            self._remove(records, name, listed)
            left = any(record.name == name for record in records.values())
        self._rewrite(change)
        if not left:
            self.pin(name, [])

    def _remove(self, records: dict[str, Record], name: str, listed: set[str]) -> None:
        for uuid in [uuid for uuid, record in records.items() if record.name == name and uuid not in listed]:
            del records[uuid]
            # No machine will ever have that UUID again.
            with contextlib.suppress(OSError):
                os.unlink(self.path("locks", f"{uuid}.session.lock"))

    # -- host keys: one store, which ssh reads and may add to

    @property
    def known_hosts(self) -> str:
        """The path of kodemachine's own known-hosts file."""
        return self.path("known_hosts")

    def pin(self, name: str, keys: Sequence[str]) -> None:
        """Makes `keys` (`type base64`, validated) the only known host keys of `name`. Raises KodeError."""
        wanted = [f"{name} {key}" for key in keys]
        if self._lines_of(name, self._known_lines()) == wanted:
            return
        with self.lock("records", 30, what="the records"):
            lines = self._known_lines()
            others = [line for line in lines if not line.startswith(name + " ")]
            write_file(self.known_hosts, "".join(line + "\n" for line in others + wanted))

    def pinned(self, name: str) -> list[str]:
        """The known host keys of `name`, as `type base64`. Raises KodeError."""
        return parse_host_keys([line.split(" ", 1)[1] for line in self._lines_of(name, self._known_lines())])

    @staticmethod
    def _lines_of(name: str, lines: Sequence[str]) -> list[str]:
        return [line for line in lines if line.startswith(name + " ")]

    def _known_lines(self) -> list[str]:
        with explained(self.known_hosts, f"To start with an empty one: rm -rf {shlex.quote(self.known_hosts)}"):
            return (read_text(self.known_hosts) or "").splitlines()

    # -- orders

    def orders(self) -> list[str]:
        """The names of the machines that an unfinished order is about."""
        folder = self.path("intents")
        if not os.path.isdir(folder):
            return []
        return [entry[:-5] for entry in sorted(os.listdir(folder)) if entry.endswith(".json")]


class Order:
    """The record of a machine that UTM was asked to make: written before the call, removed when the machine is seen.

    While the call runs it holds a flock on the file, even if kodemachine was killed. So a later run can see whether the
    call has ended.
    """

    def __init__(self, state: State, name: str) -> None:
        self.path = state.path("intents", name + ".json")

    def load(self) -> dict[str, Any] | None:
        """The order of an earlier run; None if there is none that can be read.

        Keys: base, base_uuid, time (seconds since the epoch), listed (UUIDs), record (fields of the new machine's
        record), and incomplete (the UUID of an incomplete copy that resulted from it), if there is one.
        """
        try:
            found = json.loads(read_text(self.path) or "null")
        except (ValueError, RecursionError, OSError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("listed"), list):
            return None
        if not isinstance(found.get("base"), str) or not isinstance(found.get("base_uuid"), str):
            return None
        if not isinstance(found.get("time"), (int, float)):
            return None
        # Version 0.1.0 wrote the fields of its own records.
        fields = found.get("record", found.get("inherits", {}))
        found["record"] = Record.from_json(fields if isinstance(fields, dict) else {}).to_json()
        return found

    def write(self, found: dict[str, Any]) -> None:
        """Replaces the order. Raises KodeError."""
        write_file(self.path, json.dumps(found) + "\n")

    def lock(self) -> int:
        """A handle that holds the flock, for the call to inherit."""
        handle = os.open(self.path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return handle

    def is_alive(self) -> bool:
        """Whether the call of an earlier run still runs."""
        return is_locked(self.path)

    def remove(self) -> None:
        """The machine has been seen, or none will appear."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


# ---- fleet: label rules, Fleet

LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
IMAGE = re.compile(r"kodeimage-v(\d+)\.(\d+)\.(\d+)")

# Every command and alias, those that are planned included: a label that was once allowed stays allowed.
RESERVED = frozenset({
    "attach", "base", "clone", "completion", "config", "cp", "create", "delete", "doctor", "exec", "help", "info", "ip",
    "list", "logs", "ls", "proxy", "prune", "purge", "restart", "resume", "rm", "shell", "snapshot", "ssh",
    "ssh-config", "start", "status", "stop", "suspend", "version"})
# Words of other tools, and the command here. Those that are not reserved stay allowed as labels.
SYNONYMS = {
    "boot": "start", "launch": "start", "create": "start", "new": "start", "run": "start", "up": "start",
    "connect": "ssh", "enter": "ssh", "login": "ssh", "shell": "ssh", "down": "stop", "halt": "stop", "kill": "stop",
    "poweroff": "stop", "shutdown": "stop", "reboot": "restart", "pause": "suspend", "save": "suspend",
    "unpause": "resume", "destroy": "delete", "remove": "delete", "clean": "purge", "fork": "clone",
    "duplicate": "clone", "snapshot": "clone", "copy": "cp", "scp": "cp", "transfer": "cp", "push": "cp", "pull": "cp",
    "mount": "cp", "rsync": "cp", "share": "cp", "sync": "cp", "console": "attach", "logs": "attach",
    "inspect": "status", "show": "status", "ps": "list", "image": "base", "images": "base",
    "init": "base", "settings": "config", "version": "--version"}


def whole_name(image: str) -> str:
    """The name of the image that `v0.2.0` means; any other name unchanged."""
    if IMAGE.fullmatch("kodeimage-" + image):
        return "kodeimage-" + image
    return image


def near_command(word: str, commands: Iterable[str]) -> str | None:
    """The command that was perhaps meant: a synonym, or one of three letters or more that is one edit away."""
    if word in SYNONYMS:
        return SYNONYMS[word]
    known = {**SYNONYMS, **{name: name for name in commands}}
    candidates = sorted(RESERVED.intersection(known))
    near = next((name for name in candidates if len(name) >= 3 and one_edit(word, name)), None)
    return known[near] if near else None


def near_label(label: str, labels: Iterable[str]) -> str | None:
    """The one of `labels` that is one edit away, and not in a digit: web1 and web2 are both meant."""
    def letters(text: str) -> str:
        return re.sub(r"\d", "", text)
    if len(label) < 3:
        return None
    return next((other for other in labels if one_edit(label, other) and letters(label) != letters(other)), None)


def label_of_folder(prefix: str) -> str:
    """A label from the name of the current folder. Raises UsageError."""
    import unicodedata

    try:
        here = os.path.basename(os.getcwd())
    except OSError as failure:
        raise UsageError(f"the current folder has no name: {failure.strerror}", "Change to another folder.") from None
    # Without its accents. A letter that is then not one of a-z must not be dropped: "Проект 1" is not "Другой 1".
    plain = "".join(c for c in unicodedata.normalize("NFKD", here.casefold()) if not unicodedata.combining(c))
    label = re.sub(r"[^a-z0-9]+", "-", plain).strip("-").removeprefix(prefix)
    if not plain.isascii() or not label or len(prefix + label) > 63:
        suggested = f"project-{label}"[:40].rstrip("-")
        raise UsageError(f"the name of the current folder, {here!r}, cannot be made into a label",
                         f"Choose a label and use it instead of '.', for example: {suggested}")
    return label


def check_label(text: str, settings: Settings) -> str:
    """The label that a word of the command line means; a typed prefix is dropped, `.` is the folder's name.

    Raises UsageError.
    """
    prefix = settings.prefix
    label = label_of_folder(prefix) if text == "." else text.removeprefix(prefix)
    if label in RESERVED:
        problem = f"{label!r} is reserved and cannot be a machine's label"
        meant = SYNONYMS.get(label, label)
        if meant.startswith("-"):
            raise UsageError(problem, f"Did you mean: kodemachine {meant}")
        if meant != label:
            problem += f"; did you mean {meant!r}?"
        raise UsageError(problem, f"See: kodemachine help {meant}")
    if IMAGE.fullmatch(text):
        raise UsageError(f"{text!r} is the name of an image and cannot be a label",
                         f"For a machine from it: kodemachine start LABEL --base {text}")
    if not LABEL.fullmatch(label) or label.startswith(prefix):
        raise UsageError(f"{text!r} cannot be a label",
                         "A label has lower-case letters, digits and inner hyphens, such as project-alpha.")
    if len(prefix + label) > 63:
        raise UsageError(f"{label!r} is too long for a label",
                         f"At most {63 - len(prefix)} characters are allowed, with the prefix {prefix!r}.")
    return label


def label_in(name: str, prefix: str) -> str | None:
    """The label in a machine's name; None for a name that is not the prefix and a valid label."""
    label = name[len(prefix):]
    if not name.startswith(prefix) or len(name) > 63:
        return None
    if not LABEL.fullmatch(label) or label.startswith(prefix):
        return None
    return label


class Machine(NamedTuple):
    """One machine: the row of UTM's list joined with its record. `label`: None for a machine that is not a clone."""

    uuid: str
    name: str
    power: Power
    label: str | None = None
    is_image: bool = False
    record: Record = Record()


class Fleet:
    """All machines, from one clean list joined with the records once."""

    def __init__(self, rows: Rows, records: dict[str, Record], settings: Settings) -> None:
        self._settings, self._rows = settings, rows
        own = (settings.base_image or "").upper()
        # The original of an image is not an image itself.
        bases = {record.image_uuid for record in records.values() if not IMAGE.fullmatch(record.name)}
        self.machines: list[Machine] = []
        for row in rows:
            is_image = row.name == settings.base_image or row.name.startswith("kodeimage-v") \
                or row.uuid == own or row.uuid in bases
            label = None if is_image else label_in(row.name, settings.prefix)
            record = records.get(row.uuid, Record())
            self.machines.append(Machine(row.uuid, row.name, row.power, label, is_image, record))

    @property
    def broken(self) -> str:
        """The first row of the list that cannot be read; empty if there is none."""
        return self._rows.broken

    @property
    def rows(self) -> Rows:
        """The list as UTM gave it."""
        return self._rows

    @property
    def uuids(self) -> set[str]:
        """The UUIDs of all machines."""
        return {machine.uuid for machine in self.machines}

    @property
    def images(self) -> list[Machine]:
        """The golden images: the configured one, any kodeimage-v..., and any that a clone was made from."""
        return [machine for machine in self.machines if machine.is_image]

    @property
    def clones(self) -> list[Machine]:
        """The machines with a label, sorted by it."""
        return sorted((machine for machine in self.machines if machine.label), key=lambda machine: str(machine.label))

    def by_uuid(self, uuid: str) -> Machine | None:
        """The machine with that UUID, if it is listed."""
        return next((machine for machine in self.machines if machine.uuid == uuid), None)

    def named(self, name: str) -> list[Machine]:
        """The machines with exactly that name in UTM."""
        return [machine for machine in self.machines if machine.name == name]

    def get(self, label: str) -> Machine | None:
        """The clone with that label. Raises WrongState if two machines have its name, or if it is an image."""
        name = self._settings.prefix + label
        found = self.named(name)
        if len(found) > 1:
            uuids = ", ".join(machine.uuid for machine in found)
            raise WrongState(f"{len(found)} machines are named {name}: {uuids}", "Rename or delete one of them in UTM.")
        if found and found[0].is_image:
            raise WrongState(f"{name} is an image that other machines were cloned from, not a clone",
                             "Images are never started or changed. For a new machine, use another label.")
        return found[0] if found else None

    def find(self, label: str) -> Machine:
        """The clone with that label. Raises NotFound if a clean list lacks it."""
        machine = self.get(label)
        if machine:
            return machine
        self._rows.must_be_complete()
        labels = [str(clone.label) for clone in self.clones]
        hint = f"There are: {', '.join(labels)}" if labels else f"To create it: kodemachine {label}"
        raise NotFound(f"there is no machine {label}", hint)

    # -- images

    @property
    def default_image(self) -> str | None:
        """The name of the image for new machines: the configured one, or the highest version; None without any."""
        own = self._settings.base_image
        if own:
            return next((machine.name for machine in self.machines if machine.uuid == own.upper()), own)
        versions = [machine.name for machine in self.machines if IMAGE.fullmatch(machine.name)]
        return max(versions, key=lambda name: tuple(map(int, name[11:].split("."))), default=None)

    def image(self, wanted: str | None) -> Machine:
        """The image to clone, by its name, version or UUID; None: the default one. It is stopped.

        Raises NotFound or WrongState.
        """
        wanted = wanted or self.default_image
        if wanted is None:
            raise NotFound("there is no image to clone", "To create one: kodemachine base create v0.1.0")
        found = [machine for machine in self.machines if machine.name == wanted or machine.uuid == wanted.upper()]
        found = found or self.named(whole_name(wanted))
        names = ", ".join(sorted(machine.name for machine in self.images)) or "none yet"
        if not found:
            raise NotFound(f"there is no image {wanted}", f"Images: {names}")
        if len(found) > 1:
            uuids = ", ".join(machine.uuid for machine in found)
            raise WrongState(f"{len(found)} machines are named {wanted}: {uuids}", "Rename one of them in UTM.")
        if found[0].label:
            raise WrongState(f"{found[0].name} is a clone, not an image", f"Images: {names}")
        if found[0].power is not Power.STOPPED:
            raise WrongState(f"the image {found[0].name} is {found[0].power.word}; only a stopped image can be cloned",
                             "Shut it down in UTM.")
        return found[0]


# ---- scripts that run elsewhere

# The scripts for osascript (contract 7). The first line is only a name, for people and for -v. A script reads the whole
# configuration, changes it and sends it back, because UTM removes the elements of a list that a record does not name.
# These terms are traps:
# - `serial ports of` a record means the class of a machine's elements, and fails (-1728). The property of a record is
#   written by its code, «class SrPt». A running machine's `serial ports` are its ports.
# - `displays of (configuration of vm)` in one expression fails (-1728): first the record, then its list.
# - `icon` of a record that is sent back must be the name of a built-in icon. UTM ignores an empty text.
# - `removable:true` with a source makes a USB CD-ROM, which cloud images for ARM often do not see.
# - `POSIX file` inside the `tell` block is evaluated by UTM, and fails (-1728).
# - `output text` and `output data` can be missing if a command has printed nothing.

# Network addresses and drives of all machines: one event for the list, two for each machine.
# Dictionary: `id`, `configuration`, `network interfaces`, `address`, `mode` and its constant `host` (no route out of
# the Mac), `drives`, `removable`, `host size` (contract 7, 10.13).
HARDWARE = """\
-- kodemachine: hardware
on run argv
  tell application "UTM"
    set report to ""
    repeat with vm in (get virtual machines)
      set uuid to ""
      try
        set uuid to id of vm
        set part to uuid & " machine" & linefeed
        set config to configuration of vm
        set nics to network interfaces of config
        repeat with nic in nics
          set part to part & uuid & " mac " & address of nic & linefeed
          if mode of nic is not host then set part to part & uuid & " online" & linefeed
        end repeat
        set disks to drives of config
        repeat with one_disk in disks
          if not removable of one_disk then
            set part to part & uuid & " drive " & host size of one_disk & linefeed
          end if
        end repeat
      on error
        set part to uuid & " unknown" & linefeed
      end try
      set report to report & part
    end repeat
    return report
  end tell
end run
"""
# Dictionary: `backend` and its constant `qemu`, `displays`, `serial ports` (SrPt), `interface` and its constants
# `ptty` and `tcp` (contract 7, 8).
DEVICES = """\
-- kodemachine: devices
on run argv
  tell application "UTM"
    set vm to virtual machine id (item 1 of argv)
    set report to "backend other" & linefeed
    if backend of vm is qemu then set report to "backend qemu" & linefeed
    set config to configuration of vm
    set screens to displays of config
    set report to report & "displays " & (count of screens) & linefeed
    set wires to «class SrPt» of config
    repeat with wire in wires
      if interface of wire is ptty then
        set report to report & "serial ptty" & linefeed
      else if interface of wire is tcp then
        set report to report & "serial tcp" & linefeed
      else
        set report to report & "serial window" & linefeed
      end if
    end repeat
    return report
  end tell
end run
"""
# The answer is that of `utmctl attach` up to 5.0.8. Dictionary: `serial port` is an element of `virtual machine`, with
# `interface`, `address` and `port` (contract 7).
SERIAL_PORTS = """\
-- kodemachine: serial-ports
on run argv
  tell application "UTM"
    set vm to virtual machine id (item 1 of argv)
    set report to ""
    repeat with wire in (get serial ports of vm)
      if interface of wire is ptty then
        set report to report & "ptty " & address of wire & linefeed
      else if interface of wire is tcp then
        set report to report & "tcp " & address of wire & ":" & port of wire & linefeed
      else
        set report to report & "unavailable" & linefeed
      end if
    end repeat
    return report
  end tell
end run
"""
# The arguments: the machine, how many pieces of input follow, these (base64), the program and its arguments.
# A question that fails is asked again, as the guest process is not affected. The answer has three lines: exit code and
# signal, standard output, standard error (both base64). Dictionary: `execute`, `get result` (contract 7).
GUEST_COMMAND = """\
-- kodemachine: exec
on run argv
  set pieces to (item 2 of argv) as integer
  set input_data to ""
  repeat with n from 3 to (2 + pieces)
    set input_data to input_data & item (n) of argv
  end repeat
  set program to item (3 + pieces) of argv
  set words_of_it to {}
  if (count of argv) > (3 + pieces) then set words_of_it to items (4 + pieces) thru -1 of argv
  tell application "UTM"
    set vm to virtual machine id (item 1 of argv)
    set proc to execute vm at program with arguments words_of_it ¬
      using input input_data base64 encoding true output capturing true
    set seconds_between to 0.02
    set failures to 0
    repeat
      try
        set answer to get result proc
        set failures to 0
        if exited of answer then exit repeat
      on error the_text number the_number
        set failures to failures + 1
        if failures > 4 or the_number is -1743 then error "result lost: " & the_text number the_number
      end try
      delay seconds_between
      if seconds_between < 0.3 then set seconds_between to seconds_between + 0.02
    end repeat
    set out_data to ""
    set error_data to ""
    try
      set out_data to output data of answer
    end try
    try
      set error_data to error data of answer
    end try
    return "" & exit code of answer & " " & signal code of answer & linefeed & out_data & linefeed & error_data
  end tell
end run
"""
# Dictionary: `name`, `icon`, `memory` (MiB), `cpu cores`, `network interfaces`, `address`, `mode` and its constant
# `host`, `update configuration`.
CONFIGURE = """\
-- kodemachine: configure
on run argv
  tell application "UTM"
    set vm to virtual machine id (item 1 of argv)
    set config to configuration of vm
    if item 2 of argv is not "" then set name of config to item 2 of argv
    if item 3 of argv is not "" then set memory of config to (item 3 of argv) as integer
    if item 4 of argv is not "" then set cpu cores of config to (item 4 of argv) as integer
    set nics to network interfaces of config
    set n to 5
    repeat with nic in nics
      set n to n + 1
      if item 5 of argv is "offline" then set mode of nic to host
      if not (n > (count of argv)) then set address of nic to item (n) of argv
    end repeat
    set icon of config to ""
    update configuration of vm with config
    set config to configuration of vm
    set report to name of config & linefeed & memory of config & linefeed & cpu cores of config & linefeed
    set nics to network interfaces of config
    repeat with nic in nics
      set report to report & address of nic
      if mode of nic is host then set report to report & " offline"
      set report to report & linefeed
    end repeat
    return report
  end tell
end run
"""
# UTM's other defaults fit a headless machine: a shared network, a ptty serial port and no display. UTM copies
# both files into its own folder; the seed becomes a VirtIO disk, which cloud-init finds by its label. Dictionary:
# `make`, `backend`, `configuration`, `architecture`, `hypervisor`, `uefi`, `cpu cores`, `memory`, `drives`, `source`.
MAKE = """\
-- kodemachine: make
on run argv
  set {the_name, the_kind, the_cpus, the_memory, the_disk, the_seed} to argv
  set the_disk to POSIX file the_disk
  set the_seed to POSIX file the_seed
  set the_cpus to the_cpus as integer
  set the_memory to the_memory as integer
  with timeout of 900 seconds
    tell application "UTM"
      set the_drives to {{source:the_disk}, {source:the_seed}}
      set config to {name:the_name, architecture:the_kind, hypervisor:true, uefi:true, ¬
        cpu cores:the_cpus, memory:the_memory, drives:the_drives}
      set vm to make new virtual machine with properties {backend:qemu, configuration:config}
      return id of vm
    end tell
  end timeout
end run
"""
# Of the two drives of a machine that MAKE made, the first stays. The answer: how many there are now, and the first
# one's id before and after. Dictionary: `drives`, `id` of a drive, `icon`, `update configuration`.
DETACH = """\
-- kodemachine: detach
on run argv
  tell application "UTM"
    set vm to virtual machine id (item 1 of argv)
    set config to configuration of vm
    set disks to drives of config
    set disk_before to id of item 1 of disks
    if (count of disks) is 2 then
      set drives of config to {item 1 of disks}
      set icon of config to ""
      update configuration of vm with config
    end if
    set config to configuration of vm
    set disks to drives of config
    return "" & (count of disks) & " " & disk_before & " " & id of item 1 of disks
  end tell
end run
"""

# The guest agent runs this in a new clone, as root; $1 is the label. It prints one finding per line, and as its last
# line that it has reached its end. Before that everything is flushed: a machine that is forced off within a minute
# would come back with an empty /etc/hostname and empty host keys.
#
# With $2 = renew the machine is a copy of a clone, which has the original's host keys and machine-id. They are
# replaced, each as a whole. DHCP clients send an identifier that was made from the machine-id at boot (contract 3), and
# ask for the address of their last lease. So the leases are removed, and the caller restarts the guest.
IDENTITY = r"""
label=$1 PATH=$PATH:/usr/sbin:/sbin

# The host keys that sshd really uses, wherever its configuration has them. It prints them only if its folder exists.
host_keys() {
  mkdir -p -m 755 /run/sshd
  "$(command -v sshd)" -T 2>/dev/null | sed -n 's/^hostkey //p' | grep . ||
    ls /etc/ssh/ssh_host_*_key.pub | sed 's/\.pub$//'
}
# sshd reads only the private key: the public one beside it can be missing or old.
public() { ssh-keygen -y -P '' -f "$1" </dev/null 2>/dev/null || cat "${1%.pub}.pub" 2>/dev/null; }

# Prints yes or no; nothing for a key that sshd does not have either.
renew_key() {
  kind=$(public "$1" | cut -d ' ' -f 1)
  case $kind in
    '') return;;
    ecdsa-*) kind="ecdsa -b ${kind##*nistp}";;
    *) kind=${kind#ssh-};;
  esac
  rm -f "$1.new" "$1.new.pub"
  { ssh-keygen -q -t $kind -N '' -C "root@$label" -f "$1.new" </dev/null &&
    mv "$1.new" "$1" && mv "$1.new.pub" "$1.pub" && echo yes; } || echo no
}

{ printf '%s\n' "$label" > /proc/sys/kernel/hostname; } 2>/dev/null || hostnamectl set-hostname "$label"
printf '%s\n' "$label" > /etc/hostname
if grep -q '^127\.0\.1\.1[[:space:]]' /etc/hosts; then
  hosts=$(sed "s/^127\.0\.1\.1[[:space:]].*/127.0.1.1 $label/" /etc/hosts) && printf '%s\n' "$hosts" > /etc/hosts
else
  [ -z "$(tail -c 1 /etc/hosts)" ] || echo >> /etc/hosts
  printf '127.0.1.1 %s\n' "$label" >> /etc/hosts
fi
if [ "$2" = renew ]; then
  renewed=$(host_keys | while read -r key; do renew_key "$key"; done | sort -u)
  id=$(od -An -N16 -tx1 /dev/urandom | tr -dc 0-9a-f)
  { [ ${#id} = 32 ] && echo "$id" > /etc/machine-id.new && mv /etc/machine-id.new /etc/machine-id; } || renewed=no
  if [ -f /var/lib/dbus/machine-id ]; then ln -sf /etc/machine-id /var/lib/dbus/machine-id; fi
  rm -f /var/lib/dhcp/*.leases /var/lib/dhclient/*.lease* /var/lib/dhcpcd/* /etc/dhcpcd.duid
  rm -f /var/lib/NetworkManager/*.lease /var/lib/systemd/random-seed
  echo "renewed=$renewed"
fi
echo "hostname=$(cat /proc/sys/kernel/hostname)"
# The name after the next boot: a file in a folder that is kept in memory does not last.
case $(readlink -f /etc/hostname) in /run/* | /tmp/*) ;; *) echo "stored=$(cat /etc/hostname)";; esac
grep -q "^127\.0\.1\.1[[:space:]]$label\$" /etc/hosts && echo "hosts=$label"
host_keys | while read -r key; do public "$key" | sed 's/^/key=/'; done
echo "machine-id=$(cat /etc/machine-id)"
sync
echo "end=$label"
"""

# The guest agent runs this as root. It sets a clock that is more than two seconds late. $1: seconds since the epoch,
# when the agent was asked. A clock that seems to be early may only show how long the agent took.
CLOCK = """
late=$(($1 - $(date +%s)))
if [ $late -gt 2 ]; then date -s "@$1" >/dev/null; fi
"""

# The guest agent runs this in a machine that becomes an image, as root. $1: `check` (change nothing), `apply`, or
# `prove` (check again; a problem is an error now), $2: the user, $3: their public key, $4: `yes` if they may become
# root without a password. Each step prints `step NAME ok|would|done|bad|warn DETAIL`: find_NAME prints what is to be
# done (a path: it is removed), and fix_NAME does it. So the next run continues where this one was interrupted. The last
# line proves the end.
SEAL = r"""
mode=$1 user=$2 key=$3 sudo=$4
PATH=$PATH:/usr/sbin:/sbin
umask 022

say() { printf 'step %s %s %s\n' "$1" "$2" "$3"; }
brief() {
  awk 'NR == 1 { first = $0; sub("^/", "remove /", first) }
    END { if (NR > 1) first = first " and " NR - 1 " more"; print first }'
}
bad() { say "$1" bad "$2"; [ "$mode" = check ] || { echo end; exit; }; }
need() { found=$(find_"$1" | brief); if [ -n "$found" ]; then bad "$1" "$found"; else say "$1" ok; fi; }
hint() {
  found=$(find_"$1" 2>/dev/null)
  if [ -n "$found" ]; then printf '%s\n' "$found" | sed "s/^/step $1 warn /"; else say "$1" ok; fi
}
step() {
  found=$(find_"$1" 2>/dev/null | brief)
  case ${found:+$mode}-$found in
    -) say "$1" ok;;
    check-*) say "$1" would "$found";;
    prove-*) bad "$1" "$found";;
    *) said=$(fix_"$1" 2>&1 </dev/null | tail -n 1)
      left=$(find_"$1" 2>/dev/null | brief)
      if [ -n "$left" ]; then bad "$1" "$left: $said"; else say "$1" 'done' "$found"; fi;;
  esac
}
# For files that appear again while the machine runs. They are not proved.
tidy() {
  found=$(find_"$1" 2>/dev/null | brief)
  case ${found:+$mode}-$found in
    prove-* | -) say "$1" ok;;
    check-*) say "$1" would "$found";;
    *) fix_"$1" >/dev/null 2>&1 </dev/null; say "$1" 'done' "$found";;
  esac
}
enabled() { systemctl is-enabled "$1" >/dev/null 2>&1; }
start_at_boot() { systemctl unmask "$1"; systemctl enable "$1"; }
# Of a link, the file that it leads to is removed, too.
remove() { while read -r file; do rm -f "$(readlink -f "$file")" "$file"; done; }
# The home folders of all users, and of those that were deleted.
homes() { { getent passwd | cut -d : -f 6; printf '%s\n' /root /home/*; } | sort -u; }

# The user as they are now, and the options of sshd that hold if they connect from the Mac, which is the guest's router.
# Only to print them, sshd wants a host key and its folder.
sshd=$(command -v sshd)
temporary=$(mktemp -d /run/kodemachine.XXXXXX)
trap 'rm -rf "$temporary"' EXIT
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$temporary/key" </dev/null
mac=$(ip -4 route show default 2>/dev/null | sed -n '1s/^default via \([0-9.]*\).*/\1/p')
: "${mac:=192.168.64.1}"
read_user() {
  entry=$(getent passwd "$user") uid=$(id -u "$user" 2>/dev/null)
  user_home=$(readlink -f "$(printf '%s\n' "$entry" | cut -d : -f 6)")
  "$sshd" -T -h "$temporary/key" -C "user=$user,host=$mac,addr=$mac,laddr=$mac,lport=22" \
    >"$temporary/options" 2>"$temporary/errors" || : >"$temporary/options"
}
sshd_has() { sed -n "s/^$1 //p" "$temporary/options"; }
read_user

find_systemd() { command -v systemctl >/dev/null || echo 'this is not a Linux system with systemd'; }
find_server() {
  if [ -z "$sshd" ]; then echo 'openssh-server is not installed'; return; fi
  [ -s "$temporary/options" ] || echo "sshd rejects its configuration: $(tail -n 1 "$temporary/errors")"
}

find_agent() { enabled qemu-guest-agent.service || echo 'start qemu-guest-agent at boot'; }
fix_agent() { start_at_boot qemu-guest-agent.service; }

find_ssh() {
  for unit in ssh.service ssh.socket sshd.service sshd.socket; do if enabled $unit; then return; fi; done
  echo 'start the ssh server at boot'
}
fix_ssh() { start_at_boot ssh.service || start_at_boot sshd.service; }

find_user() { id -u "$user" >/dev/null 2>&1 || echo "add the user $user"; }
fix_user() { useradd -m -s /bin/bash -p '*' "$user"; }

# Whether one of the words after $1 matches the list $1 of sshd. A host after @ that is allowed is taken for the Mac.
listed() {
  list=$1
  shift
  sshd_has "$list" | while read -r pattern; do
    case $list-$pattern in deny*@*) case $mac in ${pattern##*@}) ;; *) continue;; esac;; esac
    for name; do case $name in ${pattern%@*}) echo yes;; esac; done
  done | grep -q yes
}
allowed() { [ -z "$(sshd_has "$1")" ] || listed "$@"; }
refusals() {
  groups=$(id -Gn "$user" 2>/dev/null || echo "$user")
  algorithm=${key%% *}
  [ "$algorithm" != ssh-rsa ] || algorithm=rsa-sha2
  [ "$(sshd_has pubkeyauthentication)" = yes ] || echo PubkeyAuthentication
  sshd_has 'pubkeyaccepted[a-z]*' | grep -qE "(^|,)$algorithm" || echo PubkeyAcceptedAlgorithms
  sshd_has authenticationmethods | grep -qE '(^| )(any|publickey)( |$)' || echo AuthenticationMethods
  ! listed denyusers "$user" || echo DenyUsers
  allowed allowusers "$user" || echo AllowUsers
  ! listed denygroups $groups || echo DenyGroups
  allowed allowgroups $groups || echo AllowGroups
  case $user-$(sshd_has permitrootlogin) in root-no | root-forced-commands-only) echo PermitRootLogin;; esac
  case $(sshd_has forcecommand) in none | '') ;; *) echo ForceCommand;; esac
  case $(sshd_has chrootdirectory) in none | '') ;; *) echo ChrootDirectory;; esac
  [ "$(sshd_has permittty)" != no ] || echo PermitTTY
}
# What keeps out even a user whose key is right.
find_login() {
  [ -s "$temporary/options" ] || return
  refusals | sed "s/.*/sshd does not let $user in: see & in its configuration/"
  getent shadow "$user" | awk -F : -v today=$(($(date +%s) / 86400)) -v pam="$(sshd_has usepam)" '
    pam != "yes" && /^[^:]*:!/ { print "without PAM, sshd takes an account for locked whose password begins with !" }
    $8 != "" && $8 <= today { print "the account has expired: see chage -l " $1 }
    $3 == "0" || $5 != "" && $3 + $5 < today { print "the password has expired: see chage -l " $1 }'
  if [ -e /etc/nologin ] && [ "$user" != root ]; then echo 'only root can log in: there is /etc/nologin'; fi
  shell=${entry##*:}
  case $uid-$("${shell:-/bin/sh}" -c 'echo in' 2>/dev/null) in
    -* | *-in) ;;
    *) echo "the shell of $user, $shell, runs no commands";;
  esac
}

# The files in which sshd looks for keys of the user.
key_files() {
  for file in $(sshd_has authorizedkeysfile); do
    file=$(printf '%s\n' "$file" | sed "s|%h|$user_home|g; s|%u|$user|g; s|%U|$uid|g")
    case $file in
      none) ;;
      /*) printf '%s\n' "$file";;
      *) printf '%s/%s\n' "$user_home" "$file";;
    esac
  done
}
# The parts of a path that sshd, which reads it as the user, cannot read or rejects (StrictModes).
unsafe() {
  path=$(readlink -f "$1") strict=
  [ "$(sshd_has strictmodes)" != yes ] || strict="-o -perm -020 -o -perm -002 -o ! -user $uid ! -user 0"
  while [ -n "$path" ]; do
    find "$path" -maxdepth 0 \( ! -user "$uid" \( -type d ! -perm -001 -o -type f ! -perm -004 \) $strict \)
    if [ "$path" = "$user_home" ]; then return; fi
    path=${path%/*}
  done
}
key_lines() { grep -v '^[[:space:]]*#' "$1" | grep -F "$(printf '%s\n' "$key" | cut -d ' ' -f 1,2)"; }
find_key() {
  file=$(key_files | while read -r file; do if key_lines "$file" >/dev/null; then echo "$file"; fi; done | head -n 1)
  if [ -z "$file" ]; then echo "let $user log in with your ssh key"; return; fi
  options=$(key_lines "$file" | sed -n "1s/ *${key%% *} .*//p")
  if printf '%s\n' "$options" | grep -qiE '(^|,)(from=|command=|expiry-time=|cert-authority|restrict|no-pty)'; then
    echo "let $user log in with your ssh key, without these options: $options"
  fi
  unsafe "$file" | sed 's/^/fix the owner or the mode of /'
}
# sshd takes the first line that has the key. So ours becomes the first one.
fix_key() {
  file=$(key_files | head -n 1)
  if [ -z "$file" ]; then echo 'sshd reads no file with keys: see AuthorizedKeysFile in its configuration'; return; fi
  mkdir -p "${file%/*}"
  file=$(readlink -f "$file")
  folder=${file%/*}
  others=$(cat "$file" 2>/dev/null)
  printf '%s\n' "$key" ${others:+"$others"} >"$file"
  # A file elsewhere is perhaps that of all users.
  case $folder in "$user_home"/*) chmod 700 "$folder"; chmod 600 "$file"; chown -R "$user:" "$folder";; esac
  unsafe "$file" | while read -r path; do
    chmod go-w "$path"
    if [ "$path" = "$user_home" ]; then chown "$user:" "$path"; fi
  done
  if command -v restorecon >/dev/null; then restorecon -R "$folder"; fi
}

find_sudo() {
  if [ "$uid" = 0 ] || sudo -n -l -U "$user" 2>/dev/null | grep -q 'NOPASSWD: ALL'; then return; fi
  if [ "$sudo" = yes ]; then echo "let $user become root without a password"; return; fi
  echo "$user cannot become root without a password"
}
fix_sudo() {
  printf '%s ALL=(ALL) NOPASSWD: ALL\n' "$user" >/etc/sudoers.d/90-kodemachine
  chmod 440 /etc/sudoers.d/90-kodemachine
}

case $(uname -m) in aarch64 | arm64) port=ttyAMA0;; *) port=ttyS0;; esac
find_console() {
  [ "$(systemctl is-enabled "serial-getty@$port.service" 2>/dev/null)" = enabled ] ||    # enabled-runtime is for a boot
    echo "offer a login on the serial port $port"
}
fix_console() { start_at_boot "serial-getty@$port.service"; }

# A profile for one MAC address, or for one card name, fails in a clone: its MAC address is new, and a removed drive can
# change the name. A MAC address or a DHCP identifier that a file sets would be the same in all clones. Such lines are
# removed where a line is one setting. Other files are renamed, and the profile that replaces one names no card. The
# lease follows the machine-id, which each clone makes at boot, so the DHCP client's identifier can stay at the
# system's default.
lines='^[[:blank:]]*(HWADDR=|MACADDR=|LLADDR=|DEVICE="?en|hwaddress |interface-name=e'
lines="$lines"'|(ethernet\.)?(cloned-)?mac-address="?..:|(ipv[46]\.)?dhcp-(client-id|duid)="?..:'
lines="$lines"'|send dhcp-client-identifier +["0-9]|clientid +["0-9]|duid +["0-9]|DUIDRawData=)'
with_lines() {
  grep -lEi "$lines" /etc/sysconfig/network-scripts/ifcfg-* /etc/sysconfig/network/ifcfg-* /etc/network/interfaces \
    /etc/network/interfaces.d/* /etc/NetworkManager/system-connections/* /etc/NetworkManager/NetworkManager.conf \
    /etc/NetworkManager/conf.d/* /etc/dhcp/dhclient*.conf /etc/dhclient*.conf /etc/dhcpcd.conf \
    /etc/systemd/networkd.conf
}
whole_files() {
  grep -lE 'macaddress"?:|set-name"?:|^ +"?(en[a-z0-9]+|eth[0-9]+)"?:' /etc/netplan/*.yaml
  grep -lE '^ *((Permanent)?MACAddress=|DUIDRawData=|Name=e(n|th)[a-z0-9]*$)' /etc/systemd/network/*.network
  grep -lE '^ *(Permanent)?MACAddress=' /etc/systemd/network/*.link
  grep -lE 'ATTR\{address\}==.*NAME=' /etc/udev/rules.d/*.rules
  grep -l . /etc/udev/rules.d/70-persistent-net.rules
}
find_network() { { with_lines; whole_files; } | sort -u | sed 's/^/untie from one network card: /'; }
fix_network() {
  with_lines 2>/dev/null | while read -r file; do sed -E -i "/$lines/Id" "$file"; done
  whole_files 2>/dev/null | sort -u | while read -r file; do
    case $file in
      *.yaml) new=/etc/netplan/60-kodemachine.yaml rights=600
        profile='network:\n  version: 2\n  ethernets:\n    any:\n      match: {name: "e*"}\n      dhcp4: true\n';;
      *.network) new=/etc/systemd/network/60-kodemachine.network rights=644
        profile='[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n';;
      *) new='';;
    esac
    mv "$file" "$file.before-kodemachine" || continue
    if [ -n "$new" ]; then printf '%b' "$profile" >"$new"; chmod "$rights" "$new"; fi
  done
}

find_cloud() { [ ! -d /etc/cloud ] || [ -e /etc/cloud/cloud-init.disabled ] || echo 'keep cloud-init out of clones'; }
fix_cloud() { : >/etc/cloud/cloud-init.disabled; }

# The host keys that sshd's configuration names, or else one, because that is quick. If a service of the image's own
# makes one meanwhile, that one stays.
host_keys=$(sshd_has hostkey | grep -vxF "$temporary/key")
: "${host_keys:=/etc/ssh/ssh_host_ed25519_key}"
unit=/etc/systemd/system/kodemachine-hostkeys.service
text='[Unit]
Description=Make the SSH host keys of this machine
Before=ssh.service sshd.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c "for key in '$(printf '%s\n' "$host_keys" | sed 's/.*/\\"&\\"/' | tr '\n' ' ')'; do \
[ -s \"$$key.pub\" ] && continue; kind=ed25519; \
case $${key##*/} in *rsa*) kind=rsa;; *ecdsa*) kind=ecdsa;; esac; \
rm -f \"$$key.new\"*; ssh-keygen -q -t $$kind -N \"\" -f \"$$key.new\" || exit; [ -s \"$$key.pub\" ] || \
{ mv -f \"$$key.new\" \"$$key\" && mv -f \"$$key.new.pub\" \"$$key.pub\"; } || exit; rm -f \"$$key.new\"*; done"

[Install]
WantedBy=multi-user.target'
find_newkeys() { enabled "${unit##*/}" && [ "$(cat $unit)" = "$text" ] || echo 'make new host keys at boot'; }
fix_newkeys() { printf '%s\n' "$text" >$unit; chmod 644 $unit; systemctl daemon-reload; start_at_boot "${unit##*/}"; }

find_dbus() {
  [ ! -d /var/lib/dbus ] || [ "$(readlink /var/lib/dbus/machine-id)" = /etc/machine-id ] ||
    echo 'make /var/lib/dbus/machine-id a link to /etc/machine-id'
}
fix_dbus() { ln -sf /etc/machine-id /var/lib/dbus/machine-id; }

secrets() {
  grep -rlsE --exclude='ssh_host_*' 'BEGIN .*PRIVATE KEY|^ *PrivateKey *=' /etc
  homes | while read -r home; do
    grep -lsE 'BEGIN .*PRIVATE KEY' "$home"/.ssh/*
    for file in .aws/credentials .netrc .git-credentials .config/gh/hosts.yml .docker/config.json .npmrc .pypirc \
      .kube/config .config/gcloud/credentials.db .gnupg/private-keys-v1.d .claude/.credentials.json .codex/auth.json; do
      if [ -e "$home/$file" ]; then printf '%s/%s\n' "$home" "$file"; fi
    done
  done
}
find_secrets() {
  secrets | grep -vxF "$host_keys" | sed 's/$/ would be in every clone/'
  sshd_has hostkeyagent | grep -v '^none$' | sed 's/^/every clone would have the host keys of the ssh agent /'
}

# What identifies this machine to a network, a cluster or a service. To its server, all clones would be one machine.
nodes() {
  ls -d /var/lib/tailscale/tailscaled.state /var/lib/zerotier-one/identity.secret /var/lib/netbird/*.json \
    /etc/netbird/config.json /etc/rancher/node/password /var/lib/kubelet/pki /var/lib/docker/swarm/certificates \
    /opt/consul/node-id /var/lib/consul/node-id /opt/nomad/client/client-id /var/lib/nomad/client/client-id \
    /etc/salt/pki/minion/minion.pem /etc/puppetlabs/puppet/ssl/private_keys /var/lib/puppet/ssl/private_keys \
    /etc/chef/client.pem /var/lib/teleport/host_uuid /var/lib/amazon/ssm/registration \
    /var/lib/ubuntu-advantage/private/machine-token.json /etc/pki/consumer/key.pem
  homes | while read -r home; do
    ls -d "$home"/.config/syncthing/key.pem "$home"/.local/state/syncthing/key.pem "$home"/actions-runner/.credentials
  done
}
find_nodes() { nodes | sed 's/$/ would identify every clone as one machine/'; }

# The histories of shells, interpreters, databases and editors, wherever these keep them.
find_histories() {
  homes | while read -r home; do
    find -H "$home"/.[!.]* -maxdepth 4 -type f \( -name '*history' -o -name '*hist' -o -name '*histfile' -o \
      -name 'history.sqlite*' -o -name 'history.db*' -o -name '*.shada' -o -name '*viminfo' -o -name '*lesshst' -o \
      -name '*wget-hsts' \) ! -path '*/.git/*'
  done | sort -u
}
fix_histories() { find_histories | remove; }

find_packages() {
  find -H /var/cache/apt /var/lib/apt/lists /var/cache/dnf /var/cache/yum /var/cache/zypp /var/cache/pacman/pkg \
    -type f ! -name lock
}
fix_packages() { find_packages | remove; }

find_leases() {
  find -H /var/lib/dhcp /var/lib/dhclient /var/lib/dhcpcd /var/lib/NetworkManager /var/lib/wicked /etc/dhcpcd.duid \
    -type f \( -name '*lease*' -o -name '*duid*' -o -name secret_key -o -name timestamps \)
}
fix_leases() { find_leases | remove; }

find_logs() { find -H /var/log -type f -size +0; }
fix_logs() {
  find -H /var/log -type f \( -path '*/journal/*' -o -name '*.[gx]z' -o -name '*.[0-9]' -o -name '*.old' \) | remove
  find_logs | while read -r file; do : >"$file"; done
}

# The service writes a new seed when the machine powers off, unless it has been stopped before.
find_seed() { find -H /var/lib/systemd/random-seed /var/lib/urandom/random-seed /boot/efi/loader/random-seed -type f; }
fix_seed() { systemctl stop systemd-random-seed.service; find_seed | remove; }

find_hostkeys() {
  find -H /etc/ssh -name 'ssh_host_*' >"$temporary/found"
  { printf '%s\n' "$host_keys"; sshd_has hostcertificate; } | while read -r file; do
    ls -d "$file" "$file.pub" 2>/dev/null
  done | sort -u - "$temporary/found"
}
fix_hostkeys() { find_hostkeys | remove; }

find_machineid() { [ -f /etc/machine-id ] && [ ! -s /etc/machine-id ] || echo 'empty /etc/machine-id'; }
fix_machineid() { : >/etc/machine-id; }

for name in systemd server; do need $name; done
for name in agent ssh user; do step $name; done
read_user
step key
need login
if [ "$sudo" = yes ]; then step sudo; else hint sudo; fi
for name in console network cloud newkeys dbus; do step $name; done
for name in secrets nodes; do hint $name; done
for name in histories packages leases logs seed; do tidy $name; done
if [ "$mode" = apply ]; then
  if fstrim -a 2>/dev/null || fstrim / 2>/dev/null; then say trim 'done'; else say trim warn 'it cannot be trimmed'; fi
fi
for name in hostkeys machineid; do step $name; done
sync
echo end
"""

# Distributions of Red Hat's family, and newer ones of SUSE's, forbid the agent to run commands, by a list of forbidden
# commands or of allowed ones; the variable in the file has had four names. SELinux confines the agent as well. An agent
# is only restarted if it could not run commands until now: that would end them.
INSTALL_AGENT = r"""
command -v qemu-ga >/dev/null ||
  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install qemu-guest-agent; } ||
  dnf -qy install qemu-guest-agent
for file in /etc/sysconfig/qemu-ga /etc/qemu/qemu-ga.conf; do
  grep -sE '^[^#]*(allow-rpcs|guest-exec)' "$file" | grep -qvE 'allow-rpcs.*guest-exec' || continue
  sed -E -i -e '/^ *#/b' -e 's/,?guest-exec(-status)?//g' -e 's/allow-rpcs *= */&guest-exec,guest-exec-status,/' "$file"
  systemctl stop qemu-guest-agent
done
if command -v semodule >/dev/null; then
  echo '(typepermissive virt_qemu_ga_t)' >/run/kodemachine-agent.cil
  semodule -i /run/kodemachine-agent.cil
fi
systemctl enable --now qemu-guest-agent || systemctl start qemu-guest-agent
"""
CLOUD_INIT = "cloud-init status --wait --long; code=$?; cat /run/cloud-init/result.json; exit $code"


# ---- address and ssh port of a guest


def address_rank(address: str) -> int:
    """0 for a likely address of the guest, 3 for one that can hardly be reached (contract 5)."""
    if re.match(r"127\.|169\.254\.|fe80:", address):
        return 3
    # Container bridges and VPNs.
    if re.match(r"172\.(?:1[7-9]|2\d|3[01])\.|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])\.", address):
        return 2
    return 1 if ":" in address else 0


def parse_addresses(out: str) -> list[str]:
    """The addresses in an answer of `ip-address`, at most 64, the likeliest first. Other lines are ignored."""
    import socket

    def is_address(line: str) -> bool:
        # Anything else, such as 999.1.1.1, would be looked up as a name.
        family = socket.AF_INET6 if ":" in line else socket.AF_INET
        with contextlib.suppress(OSError, ValueError):
            return bool(socket.inet_pton(family, line))
        return False
    lines = dict.fromkeys(line.strip() for line in out.splitlines())
    # Each address costs an open file.
    return sorted(filter(is_address, lines), key=address_rank)[:64]


def is_clear(addresses: Sequence[str]) -> bool:
    """Whether the first of these addresses (the likeliest) is the only one of its rank, and not a link-local one."""
    ranks = [address_rank(address) for address in addresses[:2]]
    return bool(ranks) and ranks[0] not in ranks[1:] and not re.match(r"169\.254\.|fe80:", addresses[0])


# QEMU's own network, which has 10.0.2.0/24 unless it is configured otherwise, lets a guest out and nobody in. UTM calls
# it Emulated VLAN (the mode `emulated`).
EMULATED_VLAN = ("Addresses of 10.0.2.x are those of UTM's network mode Emulated VLAN, in which the Mac cannot connect "
                 "to a guest. Stop the machine, then choose Shared Network in its settings and in those of the image.")


def is_emulated(addresses: Sequence[str]) -> bool:
    """Whether a guest with these addresses is probably in the network mode Emulated VLAN."""
    return any(address.startswith("10.0.2.") for address in addresses)


# Seconds in which an address must greet as an SSH server, before the connection is tried again.
GREETING = 3.0


class Prober:
    """Connects to the ssh port of all candidates at once; the first that greets as an SSH server wins.

    So a container bridge or a VPN address of the guest is passed over. A less likely address is tried later, unless
    there is no better one (as in RFC 8305).
    """

    HEAD_START = (0.0, 0.25, 1.5, 1.5)      # seconds, by rank

    def __init__(self, port: int) -> None:
        self._port = port
        self._began: float | None = None
        self._tries: dict[str, tuple[Any, float]] = {}      # address -> its socket, when it was opened
        self._rest: dict[str, float] = {}                   # address -> not before that time
        self._errors: dict[str, int] = {}                   # address -> the error of its last connection, or 0

    def aim(self, addresses: Sequence[str]) -> None:
        """Replaces the candidates."""
        for address in [a for a in self._tries if a not in addresses]:
            self._give_up(address, 0)
        self._rest = {address: self._rest.get(address, 0.0) for address in addresses}
        self._errors = {address: self._errors.get(address, 0) for address in addresses}
        if addresses and self._began is None:
            self._began = time.monotonic()

    @property
    def unreachable(self) -> bool:
        """Whether there is no route to any of the likeliest candidates.

        For link-local ones there never is a route without the name of an interface, so they prove nothing.
        """
        best = min(map(address_rank, self._errors), default=0)
        errors = {self._errors[address] for address in self._errors if address_rank(address) == best}
        return best < 3 and errors == {errno.EHOSTUNREACH}

    def step(self, seconds: float) -> str | None:
        """Continues for at most `seconds`; returns the address that greeted, after its connection was closed."""
        self._connect_due()
        sockets = {sock: address for address, (sock, _) in self._tries.items()}
        if not sockets:
            time.sleep(seconds)
            return None
        ready = select.select(list(sockets), [], [], seconds)[0]
        greeted = [sockets[sock] for sock in ready if self._greets(sockets[sock])]
        for address, (_, opened) in list(self._tries.items()):
            if time.monotonic() - opened > GREETING:
                self._give_up(address, errno.ETIMEDOUT)
        if greeted:
            self.close()
        return min(greeted, key=address_rank, default=None)

    def _connect_due(self) -> None:
        now = time.monotonic()
        best = min(map(address_rank, self._rest), default=0)
        for address, since in self._rest.items():
            wait = 0.0
            if address_rank(address) > best:
                wait = self.HEAD_START[address_rank(address)]
            if address not in self._tries and now >= max(since, (self._began or now) + wait):
                self._connect(address)

    def _connect(self, address: str) -> None:
        import socket

        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._tries[address] = (sock, time.monotonic())
        try:
            failure = sock.connect_ex((address, self._port))
        # An address that only looks like one.
        except OSError as bad:
            failure = bad.errno or errno.EINVAL
        if failure not in (0, errno.EINPROGRESS):
            self._give_up(address, failure)

    def _greets(self, address: str) -> bool:
        try:
            greeting = self._tries[address][0].recv(4)
        except BlockingIOError:
            return False
        except OSError as failure:
            self._give_up(address, failure.errno or errno.EIO)
            return False
        if greeting != b"SSH-":
            self._give_up(address, errno.EPROTO)
        return bool(greeting == b"SSH-")

    def _give_up(self, address: str, failure: int) -> None:
        sock, _ = self._tries.pop(address)
        sock.close()
        self._errors[address] = failure or self._errors.get(address, 0)
        self._rest[address] = time.monotonic() + 0.1

    def close(self) -> None:
        """Closes every connection: sshd counts those that only look, too."""
        for address in list(self._tries):
            self._give_up(address, 0)


def fingerprint(key: str) -> str:
    """A host key's fingerprint, as ssh prints it."""
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"{key.split()[0]} SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def random_mac() -> str:
    """A locally administered unicast address, made as UTM makes its own (contract 7)."""
    first, *rest = os.urandom(6)
    return ":".join(f"{byte:02X}" for byte in (first & 0xFC | 0x02, *rest))


def local_network_rules() -> bool:
    """Whether this is macOS 15 (Darwin 24) or newer, which asks before a program may use the local network."""
    system = os.uname()
    return system.sysname == "Darwin" and int(system.release.split(".")[0]) >= 24


# ---- VM: one machine


def read_hardware(utm: Utmctl, *uuids: str) -> dict[str, Hardware]:
    """Network addresses and drives of all machines, asked for until those of `uuids` are among them; all but the first
    of these machines may be gone.

    Raises Unreachable, or KodeError after UNIQUE_LIMIT seconds.
    """
    for reply in utm.answers("osascript", "-e", HARDWARE, "--", limit=UNIQUE_LIMIT):
        found = parse_hardware(reply.out) if reply.outcome is Outcome.DONE else {}
        if uuids[0] in found and all(found[uuid].known for uuid in uuids if uuid in found):
            return found
    reason = "" if reply.outcome is Outcome.DONE else f": {reply.sentence or reply.outcome.value}"
    raise KodeError(f"UTM does not report its machines' drives{reason}",
                    "Check UTM's window, then run the same command again.")


MORE_TIME = "allow more time: --timeout of start and ssh, or boot_timeout in the configuration"
LOCAL_NETWORK = ("macOS refuses the way to the guest ('no route to host'). Allow your terminal application in "
                 "System Settings > Privacy & Security > Local Network, then start it again.")
MAC_SETTING = ("With 'Regenerate MAC addresses on clone' turned on in UTM (Settings > Network), a new clone has a "
               "network address of its own from the start.")
# Seconds until a request is repeated that left the state unchanged; for the power key, which a guest may have been too
# young to hear, more.
ASK_AGAIN = 3.0
PRESS_AGAIN = 15.0
# Seconds for each stage of a forced stop.
FORCE_STAGE = 15.0
# Seconds until a deletion without an answer is requested once more.
DELETE_SETTLE = 20.0
# Bytes of input of a guest command, because macOS limits all arguments of osascript to 1 MiB; and characters of it in
# one argument, because Linux, where the tests run, allows at most 128 KiB.
EXEC_INPUT = 256 << 10
EXEC_PIECE = 96 << 10
# Seconds for the command that sets the guest's clock. A session waits for it.
CLOCK_LIMIT = 10.0


# The words of the guest agent for a command that its configuration, its version or SELinux forbids (QEMU's
# qapi/qmp-dispatch.c, and GLib for a program that could not be started), with the remedies.
AGENT_REFUSALS = {
    "has been disabled": (
        "In the guest, as root: edit /etc/sysconfig/qemu-ga (without that file: /etc/qemu/qemu-ga.conf). Remove "
        "guest-exec and guest-exec-status from the list of forbidden commands (BLACKLIST_RPC, BLOCK_RPCS or "
        "--block-rpcs), or add them to the list of allowed ones (--allow-rpcs in FILTER_RPC_ARGS). "
        "Then: systemctl restart qemu-guest-agent"),
    "has not been found": "The guest needs a newer qemu-guest-agent, of QEMU 2.5 or later.",
    "Permission denied": (
        "Check that the file is a program. If SELinux confines the guest agent, allow it, in the guest, as root: "
        "semanage permissive -a virt_qemu_ga_t"),
}


class Request(NamedTuple):
    """The words for utmctl that fit one state of a machine."""

    words: tuple[str, ...]
    patience: float | None = None   # seconds until it is repeated if the state has not changed; None: ASK_AGAIN
    limit: float | None = None      # seconds for one call; None: the verb's own


class Attempt(NamedTuple):
    """The result of `reach`: whether the state was reached, and UTM's words if it was not."""

    reached: bool
    complaint: str = ""
    is_refused: bool = False        # UTM answered each request, and the state did not change

    @property
    def reason(self) -> str:
        """UTM's words for the end of a message; empty without any."""
        return f": {self.complaint}" if self.complaint else ""


class VM:
    """One machine, addressed by its UUID. Its state is asked for when it is needed, and not before."""

    def __init__(self, utm: Utmctl, state: State, machine: Machine) -> None:
        self._utm, self._notes, self._state = utm, utm.notes, state
        self.uuid, self.name, self.label, self.power = machine.uuid, machine.name, machine.label, machine.power
        self.record = machine.record
        self._unsaved: dict[str, Any] = {}
        self._misses = 0
        # Requests to which UTM answered -10004, with the state in which they were made.
        self._denied: list[tuple[Power, tuple[str, ...]]] = []

    def note(self, **changes: Any) -> None:
        """Changes fields of the record here; `remember` writes them later. So a start writes the records once."""
        self.record = self.record._replace(**changes)
        self._unsaved.update(changes)

    def remember(self, **changes: Any) -> None:
        """Writes changed fields of the record, and those noted before. Callers hold the label's lock."""
        self.note(**{key: value for key, value in changes.items() if getattr(self.record, key) != value})
        if self._unsaved:
            self.record = self._state.remember(self.uuid, **self._unsaved)
            self._unsaved = {}

    def reread(self) -> None:
        """Reads the record again, after another process may have changed it."""
        self.record = self._state.records().get(self.uuid, Record())

    def command(self, verb: str) -> str:
        """The command line that does `verb` to this machine: of kodemachine, or of utmctl if it is not a clone."""
        if self.label:
            return f"kodemachine {verb} {self.label}"
        return f"{shlex.quote(self._utm.path())} {verb} {self.uuid}"

    @property
    def how_to_run(self) -> str:
        """The hint for a clone that has to run."""
        if self.power is Power.PAUSED:
            return f"To continue it: kodemachine resume {self.label}"
        return f"To start it: kodemachine start -d {self.label}"

    # -- states

    def status(self) -> Power:
        """The state now; UNKNOWN if UTM does not report it. Raises NotFound if a clean list lacks the machine."""
        reply = self._utm.raise_for_refusal(self._utm.call("status", self.uuid))
        self.power = Power.UNKNOWN
        if reply.outcome is Outcome.DONE:
            self.power = Power(reply.out.strip())
        self._misses = self._misses + 1 if reply.outcome is Outcome.MISSING else 0
        if self._misses and self._misses % 3 == 0:
            rows = self._utm.rows(partial=True)
            if not rows.broken and self.uuid not in {row.uuid for row in rows}:
                raise NotFound(f"{self.name} is gone: it was deleted meanwhile", "To see the others: kodemachine list")
        return self.power

    def _is_denied(self, request: Request) -> bool:
        """Whether UTM answered a request twice by -10004, and left the state unchanged.

        Then the cause is a missing permission (contract 4).
        """
        return self._denied.count((self.power, request.words)) == 2

    def _must_be_permitted(self, request: Request) -> None:
        if self._is_denied(request):
            raise Unreachable(f'UTM did not carry out "{request.words[0]} {self.name}" (Apple Event error -10004)',
                              NOT_ALLOWED)

    def _ask(self, request: Request) -> Reply:
        """Makes one request. Callers check the state before they repeat it. Raises Unreachable."""
        self._must_be_permitted(request)
        reply = self._utm.raise_for_refusal(self._utm.call(*request.words, limit=request.limit))
        if reply.numbers[-1:] == (-10004,):
            self._denied.append((self.power, request.words))
        return reply

    def reach(self, goals: set[Power], limit: float, requests: dict[Power, Request], *, refusals: int = 0,
              final: Outcome | None = None, knows_state: bool = False) -> Attempt:
        """Makes the request that fits the state, again and again, until the state is one of `goals`.

        The state is believed, never the exit status (contract 0, 2). Ends after `limit` seconds, or after as many
        answers as `refusals` that did not change the state (0: never), or one with the outcome `final`. `knows_state`:
        self.power was read just now.
        """
        answered, again_at, complaint = 0, 0.0, ""
        for _ in poll(limit, self._notes.tick, 0.1, 0.5):
            power = self.power if knows_state else self.status()
            knows_state = False
            if power in goals:
                return Attempt(True)
            request = requests.get(power)
            if request is None or time.monotonic() < again_at:
                continue
            if request.patience and self._is_denied(request):
                # The guest may have heard the key, and may need a while.
                continue
            if refusals and answered == refusals:
                return Attempt(False, complaint, is_refused=True)
            reply = self._ask(request)
            complaint = reply.sentence
            if reply.outcome is final:
                answered = refusals
            # Without an answer only the time is the limit.
            elif reply.outcome not in (Outcome.TRANSIENT, Outcome.HUNG):
                answered += 1
            again_at = time.monotonic() + (ASK_AGAIN if request.patience is None else request.patience)
        # The last request has not been checked yet.
        return Attempt(self.status() in goals, complaint)

    def power_on(self, limit: float, before_cold: Callable[[], None] | None = None) -> None:
        """Starts or resumes the machine. `before_cold` runs before it starts from `stopped`; its time does not count.

        Raises TimedOut after `limit` seconds, or KodeError with UTM's words if three answers changed nothing.
        """
        start = Request(("start", "--hide", self.uuid))
        if self.power is not Power.STOPPED and before_cold:
            # The state in the list may be one in between.
            settled = self.reach({Power.STARTED, Power.STOPPED}, limit, {Power.PAUSED: start}, refusals=3,
                                 knows_state=True)
            self._must_have_started(settled, limit)
        if self.power is Power.STARTED:
            return
        if before_cold:
            before_cold()
        started = self.reach({Power.STARTED}, limit, {Power.STOPPED: start, Power.PAUSED: start}, refusals=3,
                             knows_state=True)
        self._must_have_started(started, limit)

    def _must_have_started(self, attempt: Attempt, limit: float) -> None:
        if attempt.is_refused:
            raise KodeError(f"{self.name} does not start, it stays {self.power.word}{attempt.reason}",
                            "Start it in UTM's window, which may show more.")
        if not attempt.reached:
            raise TimedOut(f"{self.name} did not start within {seconds_text(limit)} "
                           f"(it is {self.power.word}){attempt.reason}",
                           f"Check it in UTM's window, or {MORE_TIME}.")

    def ask_to_stop(self, limit: float) -> None:
        """Presses the power key until the guest has powered off. A paused machine is resumed first.

        Raises TimedOut after `limit` seconds; nothing was forced then.
        """
        press = Request(("stop", self.uuid, "--request"), patience=PRESS_AGAIN)
        requests = {Power.STARTED: press, Power.PAUSED: Request(("start", "--hide", self.uuid))}
        attempt = self.reach({Power.STOPPED}, limit, requests)
        if not attempt.reached:
            self._must_be_permitted(press)
            raise TimedOut(f"{self.name} did not power off within {seconds_text(limit)} (it is {self.power.word})",
                           f"To turn it off at once: {self.command('stop --force')}")

    def force_off(self, kill: bool = False) -> None:
        """Turns the machine off with --force, and then with --kill (contract 2). Raises TimedOut."""
        force = Request(("stop", self.uuid, "--force"), limit=FORCE_STAGE / 2)
        end = Request(("stop", self.uuid, "--kill"), limit=FORCE_STAGE / 2)
        if not kill:
            # --force is refused for a paused machine.
            attempt = self.reach({Power.STOPPED, Power.PAUSED}, FORCE_STAGE, {Power.STARTED: force})
            if attempt.reached and self.power is Power.STOPPED:
                return
        if not self.reach({Power.STOPPED}, FORCE_STAGE, dict.fromkeys(Power, end)).reached:
            raise TimedOut(f"{self.name} cannot be turned off (it stays {self.power.word})",
                           "Quit UTM and open it again.")

    def suspend(self, limit: float) -> None:
        """Pauses the machine in memory. Raises WrongState, TimedOut, or KodeError with UTM's words."""
        pause = Request(("suspend", self.uuid))
        attempt = self.reach({Power.PAUSED, Power.STOPPED}, limit, {Power.STARTED: pause}, refusals=2,
                             final=Outcome.FAILED)
        if self.power is Power.STOPPED:
            raise WrongState(f"{self.name} is stopped and cannot be suspended", self.how_to_run)
        if attempt.is_refused:
            raise KodeError(f"{self.name} cannot be suspended{attempt.reason}",
                            f"It is still running. To shut it down instead: kodemachine stop {self.label}")
        if not attempt.reached:
            raise TimedOut(f"{self.name} was not suspended within {seconds_text(limit)} (it is {self.power.word})",
                           f"To see its state: {self.command('status')}")

    def delete(self, limit: float) -> None:
        """Deletes a stopped machine; returns when a clean list lacks it.

        utmctl deletes without a question (contract 1.2). So right before each request a clean list must show this UUID
        with this name, stopped. A request without an answer is checked, and repeated once (contract 9.6).
        Raises WrongState, TimedOut, or KodeError with UTM's words.
        """
        request = Request(("delete", self.uuid))
        asked, again_at, complaint = 0, 0.0, ""
        for _ in poll(limit, self._notes.tick, 0.1, 1.0):
            row = next((row for row in self._utm.rows() if row.uuid == self.uuid), None)
            if row is None:
                return
            self._must_be_deletable(row)
            if row.power is Power.UNKNOWN or time.monotonic() < again_at:
                continue
            self.power = row.power
            if asked >= 2 and not self._is_denied(request):
                break
            reply = self._ask(request)
            complaint = reply.sentence
            if reply.outcome is Outcome.FAILED and asked:
                raise KodeError(f"UTM did not delete {self.name}: {complaint}", "Check it in UTM's window.")
            asked += 1
            has_answer = reply.outcome in (Outcome.FAILED, Outcome.MISSING) or reply.numbers[-1:] == (-10004,)
            again_at = time.monotonic() + (1.0 if has_answer else DELETE_SETTLE)
        reason = f": {complaint}" if complaint else ""
        raise TimedOut(f"{self.name} still exists after its deletion was requested{reason}",
                       "Check it in UTM's window, then try again.")

    def _must_be_deletable(self, row: Row) -> None:
        if row.name != self.name:
            raise WrongState(f"{self.name} is now named {row.name} and was not deleted",
                             "To see all machines: kodemachine list -a")
        if row.power not in (Power.STOPPED, Power.UNKNOWN):
            raise WrongState(f"{self.name} is {row.power.word} and was not deleted",
                             f"To stop it first: kodemachine stop {self.label}")

    # -- the configuration

    def configure(self, name: str = "", memory: int | None = None, cpus: int | None = None,
                  macs: Sequence[str] = ()) -> Reply:
        """Changes a stopped machine's configuration; memory in MiB. Its record says whether it must be offline.

        The answer has a line each for name, memory, CPUs, and every network interface, as they are afterwards.
        """
        network = ""
        if self.record.is_offline:
            network = "offline"
        return self._utm.script(CONFIGURE, self.uuid, name, str(memory or ""), str(cpus or ""), network, *macs)

    def prepare(self, memory: int | None, cpus: int | None) -> None:
        """Prepares a stopped machine for its first start: a whole copy, with network addresses of its own, and with
        `memory` (MiB) and `cpus`; without a route out of the Mac if its record says so (contract 7).

        UTM copies the addresses of the base (contract 3.5). A copy of an offline machine is offline, too.

        Raises Unreachable if macOS refuses, WrongState if the machine is not stopped any more, KodeError unless the
        answer proves it.
        """
        problem = "UTM does not answer"
        for _ in poll(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
            reply = self._utm.script(HARDWARE)
            found = parse_hardware(reply.out)
            if reply.outcome is Outcome.DONE:
                # An empty answer, as while UTM starts, proves nothing.
                if not self._is_reported(found):
                    problem = "UTM does not report its hardware"
                    continue
                self.must_be_whole(found)
                wanted, mine = self._unique_macs(found), found[self.uuid]
                if not mine.is_online:
                    self.note(is_offline=True)
                is_right = wanted == mine.macs and mine.is_online != self.record.is_offline
                if is_right and not memory and not cpus:
                    return
                reply = self.configure("", memory, cpus, wanted)
                if self._is_proved(reply, memory, cpus, wanted):
                    return
            problem = reply.sentence or f"UTM answers {reply.outcome.value}"
            if self._is_final(reply):
                break
        raise self._not_prepared(problem, is_changed=bool(memory or cpus))

    def _not_prepared(self, problem: str, *, is_changed: bool) -> KodeError:
        if self.record.is_offline:
            return KodeError(f"{self.name} was not started: UTM did not take it off the network ({problem})",
                             "In its settings in UTM, set the mode of its network interfaces to Host Only.")
        if is_changed:
            return KodeError(f"{self.name} was not started: its configuration could not be changed ({problem})",
                             "Use other values for --cpus and --memory, or none.")
        return KodeError(f"{self.name} was not started: its network address could not be made unique ({problem})",
                         MAC_SETTING)

    def _is_reported(self, found: dict[str, Hardware]) -> bool:
        relevant = [found[uuid] for uuid in (self.uuid, self.record.copy_of) if uuid in found]
        return self.uuid in found and all(hardware.known for hardware in relevant)

    def _unique_macs(self, found: dict[str, Hardware]) -> list[str]:
        """The machine's addresses, with new ones for those that another machine has, or that are not known."""
        mine = found[self.uuid].macs
        others = {mac for uuid, hardware in found.items() for mac in hardware.macs if uuid != self.uuid}
        is_complete = "?" not in others
        wanted = []
        for mac in mine:
            is_unique = is_complete and mac != "?" and mac not in others and mine.count(mac) == 1
            wanted.append(mac if is_unique else random_mac())
        return wanted

    def _is_proved(self, reply: Reply, memory: int | None, cpus: int | None, macs: Sequence[str]) -> bool:
        """Whether the answer of `configure` shows what was asked for."""
        lines = reply.out.splitlines()
        for wanted, line in zip((memory, cpus), lines[1:3]):
            if wanted is not None and line != str(wanted):
                return False
        interfaces = lines[3:3 + len(macs)]
        if self.record.is_offline and not all(line.endswith(" offline") for line in interfaces):
            return False
        return len(lines) >= 3 and [line.partition(" ")[0] for line in interfaces] == list(macs)

    def _is_final(self, reply: Reply) -> bool:
        """Whether it is useless to repeat a change of the configuration. Raises Unreachable or WrongState."""
        if reply.outcome is Outcome.REFUSED:
            raise Unreachable(f"{self.name} was not started: macOS does not permit control of UTM (-1743), so its "
                              "network address cannot be checked", f"{MAC_SETTING} {NOT_ALLOWED}")
        if reply.outcome not in (Outcome.FAILED, Outcome.MISSING):
            return False
        # An earlier run may have asked UTM to start it.
        if self.status() is not Power.STOPPED:
            raise WrongState(f"{self.name} is {self.power.word}: it was started meanwhile",
                             "Run the same command again.")
        return True

    def must_be_whole(self, found: dict[str, Hardware]) -> None:
        """Raises KodeError if this machine is an incomplete copy.

        UTM ignores errors while it copies, and lists a half bundle after it was interrupted (contract 3, 10.12).
        """
        if not self.record.copy_of:
            return
        missing = missing_part(found[self.uuid], found.get(self.record.copy_of))
        if missing:
            raise KodeError(f"{self.name} ({self.uuid}) is an incomplete copy and cannot be used: {missing}",
                            f"Delete it: {shlex.quote(self._utm.path())} delete {self.uuid}\n"
                            "Then run the same command again.")

    # -- addresses

    def addresses(self) -> list[str]:
        """The addresses that the guest agent reports, the likeliest first; none if it does not answer."""
        reply = self._utm.call("ip-address", self.uuid)
        if reply.outcome is not Outcome.DONE:
            return []
        return parse_addresses(reply.out)

    def wait_for_addresses(self, limit: float) -> list[str]:
        """The addresses, as soon as there are more than link-local ones, which appear early in a boot.

        Raises TimedOut after `limit` seconds without any, KodeError if the machine stops.
        """
        found: list[str] = []
        for reply in self._utm.answers("ip-address", self.uuid, limit=limit):
            if reply.outcome is Outcome.DONE:
                found = parse_addresses(reply.out)
            if any(address_rank(address) < 3 for address in found):
                return found
            self._must_run()
        if found:
            return found
        problem = f"the guest agent of {self.name} reports no IP address"
        if limit:
            raise TimedOut(problem, f"Check its console: kodemachine attach {self.label}")
        raise KodeError(problem, f"To wait while it boots: kodemachine ip --all --wait 60 {self.label}")

    def _must_run(self) -> None:
        if self.status() in (Power.STOPPED, Power.PAUSED):
            raise KodeError(f"{self.name} is {self.power.word}: it did not keep running while kodemachine waited",
                            f"To start it again: {self.command('start')}")

    def wait_for_ssh(self, port: int, limit: float, call: Call | None = None, *, prove: bool = True,
                     more_time: str = MORE_TIME) -> str:
        """Waits until the guest's ssh server greets; returns its address. `call`: a question that has begun already.

        The guest agent is asked while the known addresses are probed. Unless `prove`, an only likely one is returned
        without a probe, which sshd counts against the person. Raises KodeError as soon as the machine is off, TimedOut
        after `limit` seconds; `more_time` is the hint how to allow for more.
        """
        prober, ask_at, has_warned = Prober(port), 0.0, False
        known: list[str] = []
        began = time.monotonic()
        is_silent = bool(call)          # a reconnect, unless it takes long
        try:
            while time.monotonic() < began + limit:
                waited = time.monotonic() - began
                if is_silent and waited > 0.5:
                    is_silent = False
                    self._notes.step(f"waiting for ssh on {self.name}")
                if call is None and time.monotonic() >= ask_at:
                    call = self._utm.begin("ip-address", self.uuid)
                winner = prober.step(0.02) if known or not call else None
                if winner:
                    return winner
                reply = self._utm.finish(call, 0.02 if known else 0.2) if call else None
                if reply:
                    call = None
                    known = self._candidates(reply, known)
                    if not prove and is_clear(known):
                        return known[0]
                    prober.aim(known)
                    # An address is noticed late by a twentieth of the time that has passed.
                    ask_at = time.monotonic() + min(max(0.2, waited / 20), 1.0)
                if waited > 8 and not has_warned and prober.unreachable and local_network_rules():
                    has_warned = True
                    self._notes.warn(LOCAL_NETWORK)
                self._notes.tick()
        finally:
            prober.close()
            self._utm.drop(call)
        raise self._no_ssh(limit, known, prober, more_time)

    def _candidates(self, reply: Reply, known: list[str]) -> list[str]:
        """The addresses after a new answer. Raises KodeError if the machine is off."""
        if reply.outcome is Outcome.DONE:
            return parse_addresses(reply.out)
        self._utm.raise_for_refusal(reply)
        self._must_run()
        return known

    def _no_ssh(self, limit: float, known: Sequence[str], prober: Prober, more_time: str) -> TimedOut:
        seen, hint = "its guest agent reports no IP address", f"Check its console: kodemachine attach {self.name}"
        if known:
            # So the agent works. Images that `base create` makes have no password for the console.
            seen = f"its ssh port does not answer at {', '.join(known)}"
            hint = f"Check its ssh server: kodemachine exec {self.name} -- systemctl status ssh"
        hint = f"{hint}\nOr {more_time}."
        if is_emulated(known):
            hint = EMULATED_VLAN
        if prober.unreachable and local_network_rules():
            hint = LOCAL_NETWORK
        problem = f"{self.name} cannot be reached by ssh after {seconds_text(limit)}"
        return TimedOut(f"{problem}: it is {self.power.word}, but {seen}", hint)

    # -- commands in the guest

    def wait_for_agent(self, limit: float, *, may_change: bool = False) -> None:
        """Waits until the guest agent runs commands. Raises KodeError as soon as the machine is off, or TimedOut.

        Raises Forbidden at once if the guest's configuration forbids that, unless the configuration `may_change`.
        """
        complaint, hint = "", "It needs qemu-guest-agent in the guest, and UTM's QEMU backend."
        for _ in poll(limit, self._notes.tick, 0.3, 3.0):
            try:
                self.run(["true"], limit=LIMITS["osascript"])
                return
            except (Unreachable, UsageError):
                raise
            except Forbidden as failure:
                if not may_change:
                    raise
                complaint, hint = failure.message, failure.hint
            except KodeError as failure:
                complaint = failure.message
            self._must_run()
        raise TimedOut(f"the guest agent of {self.name} does not answer after {seconds_text(limit)}: {complaint}", hint)

    def run(self, argv: Sequence[str], data: bytes = b"", limit: float = float("inf")) -> tuple[int, bytes, bytes]:
        """Runs a command as root through the guest agent; its exit status, stdout and stderr, complete at its end.

        `data`: its input, at most EXEC_INPUT bytes. A command that a signal ended has 128 + its number as status.
        `utmctl exec` does not wait for the command up to 5.0.8 (contract 1.3), so it is not used.
        After `limit` seconds, or a signal to kodemachine, the command continues in the guest (contract 0.4).
        Raises KodeError if the command was not run or its result is lost, TimedOut after `limit`.
        """
        import base64

        text = base64.b64encode(data).decode()
        pieces = [text[i:i + EXEC_PIECE] for i in range(0, len(text), EXEC_PIECE)]
        try:
            reply = self._utm.script(GUEST_COMMAND, self.uuid, str(len(pieces)), *pieces, *argv, limit=limit)
        except Interrupted:
            self._notes.warn(f"the command was not stopped: it may still be running in {self.name}")
            raise
        self._utm.raise_for_refusal(reply)
        status, out, err = (reply.out.split("\n") + ["", ""])[:3]
        match = re.fullmatch(r"(\d{1,10}) (\d{1,3})", status)
        if reply.outcome is not Outcome.DONE or not match:
            raise self._no_result(reply, argv[0], limit)
        code, signal_number = map(int, match.groups())
        output, errors = base64.b64decode(out), base64.b64decode(err)
        if max(len(output), len(errors)) >= EXEC_OUTPUT:
            self._notes.warn("the output was cut at 16 MiB: the guest agent keeps no more")
        return 128 + signal_number if signal_number else code, output, errors

    def set_clock(self) -> bool:
        """Sets the guest's clock if it is late: it stops while the machine is paused or the Mac sleeps.

        A failure is a warning. Returns whether another try is useless: the clock is right, or the agent may not set it.
        """
        words = ["/bin/sh", "-c", CLOCK, "kodemachine", str(int(time.time()))]
        is_final = False
        try:
            code, _, err = self.run(words, limit=CLOCK_LIMIT)
            if code == 0:
                return True
            problem = err.decode("utf-8", "replace").strip().rpartition("\n")[2]
        except KodeError as failure:
            problem, is_final = failure.message, isinstance(failure, Forbidden)
        self._notes.warn(f"the clock of {self.name} may be wrong ({problem}); to set it: "
                         f"kodemachine exec {self.label} -- date -s @$(date +%s)")
        return is_final

    def _no_result(self, reply: Reply, program: str, limit: float) -> KodeError:
        look = f"To check: kodemachine ssh {self.name}"
        if reply.outcome is Outcome.HUNG:
            return TimedOut(f"the command in {self.name} did not end within {seconds_text(limit)} "
                            "and may still be running", look)
        mark = "result lost: "
        # UTM's own words mean that nothing was started, except for a time-out after the command was sent (contract 5).
        if reply.outcome in (Outcome.FAILED, Outcome.MISSING) and mark not in reply.err:
            for words, hint in AGENT_REFUSALS.items():
                if words in reply.sentence:
                    return Forbidden(f"the guest agent of {self.name} is not allowed to run {program}: "
                                     f"{reply.sentence}", hint)
            # The guest agent's own words (glib's).
            if "Failed to execute child process" in reply.sentence:
                return KodeError(f"{program} cannot be run in {self.name}: {reply.sentence}",
                                 "Check its name and path in the guest. For a line of the shell: -- sh -c 'LINE'")
            return KodeError(f"{self.name} did not confirm that it ran {program}: "
                             f"{reply.sentence or reply.outcome.value}",
                             "Check the name of the program. If the guest agent does not answer: the guest needs "
                             f"qemu-guest-agent. ssh may still work: kodemachine ssh {self.name}")
        words = reply.sentence.rpartition(mark)[2]
        reason = f" ({words})" if words else ""
        return KodeError(f"the result of {program} in {self.name} was lost, and it may still be running{reason}", look)

    def serial_port(self, index: int | None) -> str:
        """The machine's serial port: a device path, or host:port of a TCP one (contract 7). Raises KodeError.

        `index` counts all ports from 0; None: the first that can be attached to.
        """
        script = ("osascript", "-e", SERIAL_PORTS, "--", self.uuid)
        for reply in self._utm.answers(*script, limit=LIMITS["status"], first=0.2):
            if reply.outcome in (Outcome.DONE, Outcome.FAILED):
                break
        if reply.outcome is Outcome.FAILED:
            raise KodeError(f"UTM does not report the serial ports of {self.name}: {reply.sentence}",
                            f"Is it still running? To check: kodemachine status {self.label}")
        if reply.outcome is not Outcome.DONE:
            raise TimedOut(f"UTM does not report the serial ports of {self.name} ({reply.outcome.value})",
                           "Check UTM's window, then try again.")
        usable = {}
        for number, port in enumerate(reply.out.splitlines()):
            kind, _, place = port.partition(" ")
            if kind in ("ptty", "tcp") and place:
                usable[number] = place
        if index is None:
            index = min(usable, default=0)
        if index in usable:
            return usable[index]
        if usable:
            raise KodeError(f"{self.name} has no serial port {index} that can be attached to",
                            f"Use --index with one of: {', '.join(map(str, usable))}")
        raise KodeError(f"{self.name} has no serial port that can be attached to",
                        "In UTM, give the image a serial device in mode 'Pseudo-TTY'; new clones then have it.")


# ---- Maker: one way to make a machine

# Seconds after a call that failed at once, until "nothing has changed" is believed.
SETTLE = 10.0
# Seconds for which a half-renamed copy must be unchanged before its rename is completed.
UNCHANGED = 5.0
CONTINUES = "run the same command again to continue"


class Arrival:
    """The machines that may result from an order, as one list after the other shows them."""

    def __init__(self, name: str, order: dict[str, Any]) -> None:
        self._name, self._order = name, order
        self._half_name = re.compile(re.escape(order["base"]) + r"(?: \d+)?")
        self._seen: object = None
        self._since = time.monotonic()
        self.named: list[Row] = []      # with the ordered name
        self.half: list[Row] = []       # with a temporary name of UTM
        self.is_orphaned = False        # the base is gone
        self.has_ended = False          # the call has ended

    def update(self, rows: Rows, has_ended: bool) -> None:
        """Takes a new list into account."""
        new = [row for row in rows if row.uuid not in self._order["listed"]]
        base, base_uuid = self._order["base"], self._order["base_uuid"]
        self.has_ended = has_ended
        self.is_orphaned = bool(base_uuid) and base_uuid not in {row.uuid for row in rows}
        self.named = [row for row in new if row.name == self._name]
        self.half = []
        if not self.named:
            # Without the base beside it, a machine with exactly its name is a new base that somebody has made.
            self.half = [row for row in new if self._half_name.fullmatch(row.name)
                         and not (self.is_orphaned and row.name == base)]
        if self._seen != (new, has_ended):
            self._seen = (new, has_ended)
            self._since = time.monotonic()

    @property
    def unchanged_for(self) -> float:
        """Seconds since the list has shown something new."""
        return time.monotonic() - self._since

    def restart(self) -> None:
        """Something was changed that the list has to show again."""
        self._since = time.monotonic()

    @property
    def is_settled(self) -> bool:
        """Whether the list has been the same for UNCHANGED seconds."""
        return self.unchanged_for >= UNCHANGED

    @property
    def is_empty(self) -> bool:
        """Whether nothing has resulted so far."""
        return not self.named and not self.half


class Maker:
    """Makes one machine of a name, and only one, whatever is lost or interrupted.

    UTM reports no UUID and may report any error (contract 3), so the new machine is the one that was not listed before.
    The order is written first. A later run finds what resulted from it, and never deletes or rolls back.
    """

    def __init__(self, utm: Utmctl, state: State, limit: float) -> None:
        self._utm, self._state, self._limit, self._notes = utm, state, limit, utm.notes

    @staticmethod
    def must_be_free(name: str, rows: Sequence[Row]) -> None:
        """Raises WrongState if a machine has that name; upper and lower case are equal, as for UTM's folders."""
        clash = next((row for row in rows if row.name.lower() == name), None)
        if clash:
            raise WrongState(f"there is a machine {clash.name} already ({clash.uuid})",
                             "Rename it in UTM, or use another name.")

    def claim(self, uuid: str, name: str, listed: set[str]) -> Record | None:
        """Records a machine that resulted from an order for its name, and returns its record; None without one."""
        order = Order(self._state, name)
        found = order.load()
        if not found or uuid in found["listed"]:
            return None
        record = Record(**found["record"])
        record = record._replace(name=name, created=iso_time(found["time"]), never_started=True,
                                 copy_of=found["base_uuid"])
        # The order does not repeat the names of its base.
        if not record.image and not record.is_copy:
            record = record._replace(image=found["base"] if found["base_uuid"] else "", image_uuid=found["base_uuid"])
        self._state.begin(uuid, record, listed)
        order.remove()
        return record

    def resume(self, name: str) -> Machine | None:
        """The machine that results from an earlier run's order, with its record; None if there is none.

        Waits as long as that run would have.
        """
        order = Order(self._state, name)
        found = order.load()
        if not found:
            return None
        if found.get("incomplete") and found["incomplete"] not in {row.uuid for row in self._utm.rows()}:
            # The person has deleted what resulted from it.
            order.remove()
            return None
        left = max(0.0, min(found["time"] + self._limit - time.time(), self._limit))
        wait = f" (for up to {left:.0f} s)" if left else ""
        self._notes.step(f"looking for {name}, which an earlier run began to make{wait}")
        return self._recorded(self._await(name, order, found, None, left))

    def clone(self, base: Machine, name: str, rows: Rows, afterwards: str = CONTINUES, **fields: Any) -> Machine:
        """Clones `base`; `rows` is a clean list read just before. Callers hold the fleet's lock.

        `afterwards`: the hint after an interruption. `fields`: of the new machine's record.
        """
        if self._await_other_calls(base.uuid):
            rows = self._utm.rows()
        self.must_be_free(name, rows)
        order = {"base": base.name, "base_uuid": base.uuid, "listed": [row.uuid for row in rows], "record": fields}
        words = ("clone", base.uuid, "--name", name)
        return self._make(name, order, f"cloning {base.name} to {name}", words, afterwards)

    def make(self, name: str, rows: Rows, words: Sequence[str]) -> Machine:
        """Makes a new machine; `words` are the arguments of MAKE after the name. Callers hold the fleet's lock."""
        self.must_be_free(name, rows)
        order = {"base": name, "base_uuid": "", "listed": [row.uuid for row in rows], "record": {"making": "begun"}}
        script = ("osascript", "-e", MAKE, "--", name, *words)
        return self._make(name, order, f"making {name}", script, CONTINUES)

    def _make(self, name: str, found: dict[str, Any], what: str, words: Sequence[str], afterwards: str) -> Machine:
        """The machine that results from the call `words`, which is made once more if UTM has not heard it."""
        order = Order(self._state, name)
        for attempt in (what, what + " once more"):
            self._notes.step(attempt)
            found["time"] = time.time()
            order.write(found)
            handle = order.lock()
            try:
                call = self._utm.begin(*words, limit=self._limit, keep=[handle])
            except Unreachable:
                # Nothing was asked of UTM.
                order.remove()
                raise
            finally:
                os.close(handle)
            try:
                machine = self._recorded(self._await(name, order, found, call, self._limit))
            except Interrupted:
                self._notes.warn(f"UTM is still {what}; {afterwards}")
                raise
            finally:
                self._utm.drop(call)
            if machine:
                return machine
        order.remove()
        assert call.reply
        number = f" (Apple Event error {call.reply.numbers[-1]})" if call.reply.numbers else ""
        raise Unreachable(f"UTM did not begin {what}{number}", f"Open UTM and try again. {NOT_ALLOWED}")

    def _recorded(self, row: Row | None) -> Machine | None:
        if row is None:
            return None
        record = self.claim(row.uuid, row.name, {other.uuid for other in self._utm.rows()})
        return Machine(row.uuid, row.name, row.power, record=record or Record())

    def _await_other_calls(self, base_uuid: str) -> bool:
        """Waits for clone calls that outlived their kodemachine: two would compete for one name (contract 3).

        Returns whether there were any; raises TimedOut if one does not end.
        """
        had_to_wait = False
        for name in self._state.orders():
            order = Order(self._state, name)
            if not order.is_alive() or (order.load() or {}).get("base_uuid") != base_uuid:
                continue
            had_to_wait = True
            self._notes.step(f"waiting until UTM has cloned {name}")
            for _ in poll(self._limit, self._notes.tick):
                if not order.is_alive():
                    break
            else:
                raise self._under_way(name)
        return had_to_wait

    @staticmethod
    def _under_way(name: str) -> TimedOut:
        return TimedOut(f"an earlier run's call for {name} has not ended; UTM may still be copying",
                        "Run the same command again later. If that does not help, quit UTM and open it again.")

    def _await(self, name: str, order: Order, found: dict[str, Any], call: Call | None, limit: float) -> Row | None:
        """Waits for the machine that this order creates. None: there is none, and none can appear later.

        `found`: the order's content; `call`: this run's own, or None for an earlier run's. After `limit` seconds (0:
        the time had passed before) a machine that appears is not certainly the order's.
        Raises KodeError if the order failed, or if what appeared is not certainly its machine.
        """
        arrival = Arrival(name, found)
        deadline, renames = time.monotonic() + limit, 0
        for _ in poll(max(limit, 2 * UNCHANGED), self._notes.tick, 0.1, 0.5):
            reply = self._utm.finish(call, 1.0) if call else None
            has_ended = bool(reply) if call else not order.is_alive()
            arrival.update(self._utm.rows(), has_ended)
            is_left = self._is_left(arrival)
            if is_left and not arrival.is_orphaned:
                self._must_be_whole(arrival.half[0], order, found)
            row = self._the_one(arrival, name, limit)
            if row:
                return row
            if is_left:
                if renames == 3:
                    break
                self._complete(arrival.half[0], name)
                renames += 1
                arrival.restart()
            elif reply and arrival.is_empty:
                self._raise_if_failed(reply, found, order, name, arrival.unchanged_for)
                if arrival.unchanged_for >= SETTLE and was_not_heard(reply):
                    return None
            elif arrival.is_empty and time.monotonic() >= deadline:
                break
        self._raise_unfinished(arrival, name, call, limit)
        return None

    @staticmethod
    def _the_one(arrival: Arrival, name: str, limit: float) -> Row | None:
        """The machine, if it is complete. Raises WrongState if it is not certain which one that is."""
        named, half = arrival.named, arrival.half
        is_final = arrival.has_ended and arrival.is_settled
        if len(named) == 1 and named[0].power is not Power.UNKNOWN and (arrival.has_ended or arrival.is_settled):
            return named[0]
        if len(named) > 1 or (is_final and len(half) > 1):
            which = ", ".join(f"{row.name} ({row.uuid})" for row in named or half)
            raise WrongState(f"more than one machine may be the new {name}: {which}",
                             f"Name one of them {name} in UTM, and delete or rename the others.")
        if is_final and half and (arrival.is_orphaned or not limit):
            raise WrongState(f"{half[0].name} ({half[0].uuid}) may be the clone {name} that an earlier run began",
                             f"If so, rename it to {name} in UTM; if not, give it another name.")
        return None

    @staticmethod
    def _is_left(arrival: Arrival) -> bool:
        """Whether UTM has left one half-renamed copy."""
        if len(arrival.half) != 1 or not arrival.has_ended or not arrival.is_settled:
            return False
        return arrival.half[0].power is Power.STOPPED

    @staticmethod
    def _raise_unfinished(arrival: Arrival, name: str, call: Call | None, limit: float) -> None:
        if arrival.half:
            half = arrival.half[0]
            raise TimedOut(f"the clone {name} is unfinished: {half.name} ({half.uuid}) is {half.power.word}",
                           f"When UTM has finished, run this again; or rename it to {name} in UTM.")
        if call:
            raise TimedOut(f"UTM has not shown {name} within {seconds_text(limit)}; it may still be copying",
                           "Run the same command again: it uses the machine if it has appeared by then.")
        if not arrival.has_ended:
            raise Maker._under_way(name)

    def _raise_if_failed(self, reply: Reply, found: dict[str, Any], order: Order, name: str, seconds: float) -> None:
        """Raises KodeError if a call that left nothing for `seconds` will leave nothing later."""
        base = found["base"]
        deed = f"clone {base} to {name}" if found["base_uuid"] else f"make {name}"
        failure: KodeError | None = None
        try:
            self._utm.raise_for_refusal(reply)
        except Unreachable as refusal:
            failure = refusal
        if reply.outcome is Outcome.FAILED and seconds >= ASK_AGAIN:
            failure = KodeError(f"UTM could not {deed}: {reply.sentence}", self._reason(found))
        if reply.outcome is Outcome.DONE and seconds >= SETTLE:
            failure = KodeError(f"UTM reported no error, but did not {deed}",
                                "Try again; is the disk full?")
        if failure:
            order.remove()
            raise failure

    def _reason(self, found: dict[str, Any]) -> str:
        """A hint why UTM refused."""
        for row in self._utm.rows():
            if row.uuid == found["base_uuid"] and row.power is not Power.STOPPED:
                return f"{found['base']} is {row.power.word}; only a stopped machine can be cloned."
        return "Is the disk full? Try it in UTM's window, which may show more."

    def _must_be_whole(self, row: Row, order: Order, found: dict[str, Any]) -> None:
        """Raises KodeError if the machine is an incomplete copy; later runs find that in the order."""
        record = Record(copy_of=found["base_uuid"])
        vm = VM(self._utm, self._state, Machine(row.uuid, row.name, row.power, record=record))
        hardware = read_hardware(self._utm, row.uuid, found["base_uuid"])
        try:
            vm.must_be_whole(hardware)
        except KodeError:
            order.write({**found, "incomplete": row.uuid})
            raise

    def _complete(self, row: Row, name: str) -> None:
        """Completes UTM's unfinished rename of a machine that certainly results from the order."""
        self._notes.step(f"completing the name of {row.name}: {name}")
        vm = VM(self._utm, self._state, Machine(row.uuid, row.name, row.power))
        try:
            reply = self._utm.raise_for_refusal(vm.configure(name=name))
        except Unreachable as failure:
            raise Unreachable(f"the new machine is still named {row.name} ({row.uuid}), and cannot be renamed: "
                              f"{failure.message}", f"Rename it to {name} in UTM, then run this again.") from None
        if reply.outcome is not Outcome.DONE:
            self._notes.warn(f"UTM did not rename {row.name}: {reply.sentence}")


# ---- sizes on disk

# macOS may hold a read of UTM's folder until a person has answered its question (contract 6).
DISK_LIMIT = 3.0        # seconds


class Disk(NamedTuple):
    """A machine's memory, the size of its bundle, and the space that its deletion frees. In bytes; None: unknown."""

    memory: int | None = None
    size: int | None = None
    reclaimable: int | None = None


def private_size(path: str) -> int | None:
    """Bytes on APFS that only this file uses, which its deletion would free; None if the system reports none."""
    import ctypes
    import struct

    # The names in Apple's sys/attr.h: ATTR_CMN_RETURNED_ATTRS, ATTR_CMNEXT_PRIVATESIZE, FSOPT_NOFOLLOW and
    # FSOPT_ATTR_CMN_EXTENDED, which puts the second one into the fork group; see getattrlist(2).
    returned_attributes, private = 0x80000000, 0x8
    no_follow, extended = 0x1, 0x20
    bitmap_count, unused = 5, 0
    attributes = struct.pack("=HHIIIII", bitmap_count, unused, returned_attributes, unused, unused, unused, private)
    request = ctypes.create_string_buffer(attributes, len(attributes))
    answer = ctypes.create_string_buffer(64)
    room = ctypes.c_size_t(len(answer))
    options = ctypes.c_uint(no_follow | extended)
    getattrlist = getattr(ctypes.CDLL(None), "getattrlist", None)
    if not getattrlist or getattrlist(os.fsencode(path), request, answer, room, options) != 0:
        return None
    # A 32-bit length, five 32-bit words with the returned attributes, and the size as off_t, packed to 4 bytes.
    layout = "=IIIIIIq"
    length, _common, _volume, _folder, _file, fork, size = struct.unpack_from(layout, answer.raw)
    if length < struct.calcsize(layout) or not fork & private or size < 0:
        return None
    return int(size)


def regular_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """The path and the status of each regular file in a folder and below it, without symbolic links. Raises OSError."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(entry.path)
                elif stat.S_ISREG(status.st_mode):
                    yield entry.path, status


def disk_usage(bundle: str) -> tuple[int, int]:
    """The allocated bytes of a folder, and the bytes that its deletion frees. Raises OSError.

    A file with several hard links counts once. Its deletion frees nothing if one of them is outside of the folder.
    """
    size = reclaimable = 0
    links: dict[tuple[int, int], int] = {}
    for path, status in regular_files(bundle):
        inode = (status.st_dev, status.st_ino)
        links[inode] = links.get(inode, 0) + 1
        allocated = status.st_blocks * 512
        if links[inode] == 1:
            size += allocated
        if links[inode] == status.st_nlink:
            private = private_size(path)
            if private is None:
                private = allocated
            reclaimable += min(private, allocated)
    return size, reclaimable


def read_bundle(documents: str, uuid: str, name: str) -> Disk:
    """The sizes of one machine, from its bundle; unknown if the folder is the bundle of another machine.

    Raises an exception of any class: plistlib has another one for each defect of config.plist.
    """
    import plistlib

    # UTM replaces the characters that a file name cannot have (contract 1.5).
    folder_name = re.sub(r'[,/:\\?%*|"<>]', "-", name) + ".utm"
    bundle = os.path.join(documents, folder_name)
    text = read_text(os.path.join(bundle, "config.plist")) or ""
    config = plistlib.loads(text.encode())
    if config["Information"]["UUID"] != uuid:
        return Disk()
    mebibytes = int(config["System"]["MemorySize"])
    return Disk(mebibytes << 20, *disk_usage(bundle))


def read_bundles(documents: str, rows: Sequence[Row | Machine], seconds: float,
                 tick: Callable[[], None]) -> dict[str, Disk]:
    """The sizes of machines, by UUID, as far as they can be read within `seconds`. Others are left out.

    The read runs in its own thread, because it hangs while macOS asks the person for permission (contract 6).
    """
    found: dict[str, Disk] = {}

    def read_all() -> None:
        for row in rows:
            with contextlib.suppress(Exception):
                found[row.uuid] = read_bundle(documents, row.uuid, row.name)

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    deadline = time.monotonic() + seconds
    while reader.is_alive() and time.monotonic() < deadline:
        reader.join(0.2)
        tick()
    return dict(found)


def free_space(path: str) -> int | None:
    """Free bytes of the volume that holds `path`, which need not exist yet; None if they are unknown."""
    existing = os.path.abspath(path)
    while not os.path.exists(existing) and existing != "/":
        existing = os.path.dirname(existing)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None
# ---- ssh options


def own_command() -> list[str]:
    """The words that start this program from anywhere.

    install.sh makes it a zip application, which contains `__file__`. Its first line names a Python whose path outlives
    an upgrade; the path of the running one may not.
    """
    path = os.path.realpath(__file__)
    if os.path.exists(path):
        return [sys.executable, "-IS", path]
    return [os.path.dirname(path)]


def as_words(options: dict[str, str]) -> list[str]:
    """ssh's options as words of a command line."""
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


# The person's own configuration (`Host *`) applies to our sessions as well. ssh takes the first value that it finds, so
# what is set here replaces theirs. These groups decide about all options of ssh_config(5) of OpenSSH 10.5. The person's
# own stay: keys, certificates, agents and other ways to log in; algorithms; keep-alives; the environment; the escape
# character; messages. None of these leads to another machine, or changes what a session does. Nor does HostKeyAlias,
# which cannot be undone for a name: ssh then refuses the host key.

# For older versions of ssh, and before all others: only unknown options after it are ignored. Three of SESSION_OPTIONS
# came with OpenSSH 8.7, and macOS 12 has 8.6. In a file it ignores them for these hosts only, and ssh fails for all
# others; so what is in the stanza must be older (KnownHostsCommand: 8.5).
ANY_VERSION = {"IgnoreUnknown": "*"}

# Only the host keys that kodemachine knows count, and ssh adds none to them, except the first one of a new machine.
HOST_KEY_OPTIONS = {"GlobalKnownHostsFile": "/dev/null", "UpdateHostKeys": "no", "VerifyHostKeyDNS": "no",
                    "HashKnownHosts": "no", "CheckHostIP": "no", "NoHostAuthenticationForLocalhost": "no",
                    "KnownHostsCommand": "none"}

# A session goes to the machine that was named, over a connection of its own. The machine gets no access to the Mac.
ROUTE_OPTIONS = {"CanonicalizeHostname": "no", "ControlMaster": "no", "ControlPath": "none",
                 "ForwardAgent": "no", "ForwardX11": "no"}

# The way to an address is direct. (BindAddress, in `argv`, also undoes BindInterface.)
DIRECT_OPTIONS = {"ProxyJump": "none", "ProxyCommand": "none", "ProxyUseFdpass": "no", "AddressFamily": "any"}

# What a session and a copy share: scp sets the rest itself, and has a session type of its own.
COPY_OPTIONS = {"ForkAfterAuthentication": "no", "StdinNull": "no"}

# A session of kodemachine runs the command that was asked for, or a shell, and lasts as long: --rm deletes the machine
# after it. It opens no ports, which may be in use. For `ssh km-web`, the person's own call, their values apply.
SESSION_OPTIONS = {**COPY_OPTIONS, "RemoteCommand": "none", "SessionType": "default", "ClearAllForwardings": "yes",
                   "PermitLocalCommand": "no"}

# The address may not have been probed, and its ssh server may start only now. If nothing answers, ssh ends within 45 s.
PATIENCE = {"ConnectionAttempts": "4", "ConnectTimeout": "10"}


def user_name(name: str | None) -> str:
    """The user in the guest: `name`, or else the login name. Raises UsageError."""
    import pwd

    hint = "Use --user of base create, or set one: kodemachine config set ssh_user NAME"
    try:
        name = name or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise UsageError(f"the user ID {os.geteuid()} has no login name", hint) from None
    _, is_valid = SETTINGS["ssh_user"]
    if not is_valid(name):
        raise UsageError(f"{name!r} is not a valid user name", hint)
    return name


NOISE = "your login shell prints something when ssh starts kodemachine with it"
# The file that a shell reads for a command that is not interactive.
START_UP_FILES = {"zsh": "~/.zshenv", "fish": "~/.config/fish/config.fish", "bash": "~/.bashrc", "tcsh": "~/.tcshrc"}


class SshConfig:
    """The options of ssh and scp, so that a session ends in that very machine or not at all."""

    def __init__(self, settings: Settings, utm: Utmctl, state: State, words: Sequence[str]) -> None:
        self._settings, self._utm, self._state, self._words = settings, utm, state, words

    def knows(self, name: str) -> bool:
        """Whether a host key of that machine is pinned. Otherwise ssh may learn one, in the same file."""
        return bool(self._state.pinned(name))

    def keep_alive(self, host: str) -> dict[str, str]:
        """Ends a session whose machine is gone within 45 s, unless the person's configuration has its own interval."""
        reply = None
        # Without ssh there is no session either, and that error is reported then.
        with contextlib.suppress(KodeError):
            reply = self._utm.call("ssh", "-G", "--", host)
        if reply and re.search(r"(?m)^serveraliveinterval [1-9]", reply.out):
            return {}
        return {"ServerAliveInterval": "10", "ServerAliveCountMax": "3"}

    def _own_options(self, is_known: bool) -> dict[str, str]:
        """The options that are the same for an address and for a name.

        The user is always set, because the image has that one, and a `User` for `Host *` is another. So a `User` for
        `Host km-*` has no effect; ssh_user is the place for it.
        """
        def quoted(path: str) -> str:
            return '"' + path.replace("%", "%%") + '"'
        options = {**ANY_VERSION, "UserKnownHostsFile": quoted(self._state.known_hosts),
                   "StrictHostKeyChecking": "yes" if is_known else "accept-new",
                   **HOST_KEY_OPTIONS, **ROUTE_OPTIONS, "User": user_name(self._settings.ssh_user)}
        if self._settings.identity_file:
            options["IdentityFile"] = quoted(self._settings.identity_file)
            # A server refuses after six keys, and an agent may have more. It is still asked for this one.
            options["IdentitiesOnly"] = "yes"
        return options

    def argv(self, vm: VM, address: str, command: Sequence[str], *, forward_agent: bool = False) -> list[str]:
        """The command line of ssh to an address. The guest's login shell joins the words of `command`."""
        anywhere = "::" if ":" in address else "0.0.0.0"
        options = {**self._own_options(self.knows(vm.name)), "HostName": address, "HostKeyAlias": vm.name,
                   "Port": str(self._settings.ssh_port), "BindAddress": anywhere,
                   **DIRECT_OPTIONS, **SESSION_OPTIONS, **PATIENCE, **self.keep_alive(address)}
        # A terminal would change the bytes for a program. For a person, `RequestTTY yes` is the way to run an editor.
        if not (os.isatty(0) and os.isatty(1)):
            options["RequestTTY"] = "auto"
        if forward_agent:
            options["ForwardAgent"] = "yes"
        return ["ssh", *as_words(options), "--", address, *command]

    def learn(self, vm: VM, address: str) -> None:
        """Lets ssh pin the host key of a machine whose guest agent reports none, as its first session would."""
        _, *words = self.argv(vm, address, [])
        self._utm.call("ssh", "-o", "BatchMode=yes", "-o", "PreferredAuthentications=none", *words)

    def name_options(self, is_known: bool = True) -> dict[str, str]:
        """The options with which ssh, scp and others reach a machine by its name, through `kodemachine proxy`.

        They have the default port and no HostKeyAlias, so that the host key is looked up by the plain name. The program
        has its absolute path, because editors lack ~/bin on PATH. The proxy passes its connected socket to ssh.
        """
        words = [*own_command(), *self._words, "proxy"]
        if not is_known:
            words.append("--learning")
        proxy = shlex.join(words).replace("%", "%%")
        return {**self._own_options(is_known), "HostName": "%h", "Port": "22",
                "ProxyCommand": f"{proxy} %h", "ProxyUseFdpass": "yes"}

    def overruled(self) -> list[str]:
        """Those of name_options that ssh does not use for a machine's name, with the values that it uses instead.

        With ours on the command line, where they win, ssh itself prints them in the form of its answer (`ssh -G`).
        Raises KodeError.
        """
        host, ours = self._settings.prefix + "x", self.name_options()
        answers = []
        for options in (ours, {}):
            reply = self._utm.call("ssh", "-G", *as_words(options), "--", host)
            if reply.outcome is not Outcome.DONE:
                raise KodeError(f"ssh does not accept its configuration: {' '.join(reply.err.split())}",
                                f"Fix it, then check it: ssh -G {host}")
            answers.append(reply.out.splitlines())
        wanted, used = answers
        values = dict(line.partition(" ")[::2] for line in used)
        lost = {line.partition(" ")[0] for line in wanted if line not in used}
        # This one only lets older versions of ssh accept the others.
        lost.discard("ignoreunknown")
        return [f"{key} {values.get(key, '(unset)')}" for key in map(str.lower, ours) if key in lost]

    def start_up_noise(self) -> str:
        """The remedy if the login shell prints something when ssh starts a proxy with it; empty if it does not.

        ssh expects a socket from the proxy, and reports a text with these words. Raises KodeError.
        """
        # Without SHLVL, as in an editor that no terminal has started, bash reads .bashrc if its input is a socket.
        os.environ.pop("SHLVL", None)
        reply = self._utm.call("ssh", "-F", "none", *as_words({"ProxyUseFdpass": "yes", "ProxyCommand": "true"}),
                               "--", "start-up")
        if "no message header" not in reply.err:
            return ""
        shell = os.path.basename(os.environ.get("SHELL", "sh"))
        file = START_UP_FILES.get(shell, "its start-up file")
        return f"Change {file}, so that it prints only in an interactive shell."


# ---- Manager: find or clone, start, stop, delete


class StartOptions(NamedTuple):
    """The options of a start. `memory` in MiB, `timeout` in seconds; None: unchanged."""

    base: str | None = None
    cpus: int | None = None
    memory: int | None = None
    timeout: float | None = None
    offline: bool = False           # a new machine without a route out of the Mac
    only_new: bool = False          # --rm: the machine must not exist yet
    may_clone: bool = True
    prove: bool = True              # see the ssh server answer, even where only one address is likely
    bare: bool = False              # the label was alone on the command line, where a command may be meant
    commands: tuple[str, ...] = ()  # the names of all commands, for a typo of one
    afterwards: str = CONTINUES     # the hint for a person who interrupts the cloning


class Identity(NamedTuple):
    """The identity that a guest reports: its host keys (`type base64`) and its machine-id.

    `problem`: what its answer does not prove, with the reason. `is_final`: the next try would have the same problem.
    `is_renewed`: the host keys and the machine-id are new.
    """

    host_keys: list[str]
    machine_id: str
    problem: str = ""
    is_final: bool = False
    is_renewed: bool = False


class Facts(NamedTuple):
    """One machine as `list` and `status` show it: the keys of --json, in this order. Sizes in bytes; None: unknown."""

    label: str | None
    name: str
    uuid: str
    status: str
    ip: str | None
    image: str | None
    memory: int | None
    size: int | None
    reclaimable: int | None
    created: str | None
    network: str | None


# What the script IDENTITY did not do, by the key that its answer lacks.
UNDONE = {"hostname": "its hostname is another one", "stored": "/etc/hostname does not keep the name",
          "hosts": "/etc/hosts does not have the name", "renewed": "its host keys and machine-id are not all new"}

DOCUMENTS = "~/Library/Containers/com.utmapp.UTM/Data/Documents"
# Seconds for a guest's addresses in a list: its agent may hang (contract 5).
ADDRESS_LIMIT = 5.0


def open_script(path: str) -> BinaryIO:
    """Opens the script that `first_boot` names. Raises UsageError if it is not readable, or was made on Windows."""
    try:
        first = (read_text(path) or "").partition("\n")[0]
        # Linux reads a "\r" as a part of the interpreter's name, and sees no "#!" after a byte order mark.
        if not first.startswith("\ufeff") and not first.endswith("\r"):
            return open(path, "rb")
    except OSError as failure:
        raise UsageError(f"first_boot is {path}: {failure.strerror or failure}", "Name another script: kodemachine "
                         "config set first_boot PATH; for none: kodemachine config unset first_boot") from None
    raise UsageError(f"first_boot is {path}, which has the line ends (CRLF) or the byte order mark of a Windows file",
                     rf"To convert it: perl -pi -e 's/^\xEF\xBB\xBF//; s/\r$//' {shlex.quote(path)}")


class Manager:
    """All machines: finds or clones them, starts, stops and deletes them."""

    def __init__(self, settings: Settings, utm: Utmctl, state: State, words: Sequence[str] = ()) -> None:
        """`words`: options for a kodemachine that other programs start."""
        self.settings, self.utm, self.state = settings, utm, state
        self._notes, self.maker = utm.notes, Maker(utm, state, settings.clone_timeout)
        self.ssh = SshConfig(settings, utm, state, words)
        self._turn = threading.Lock()
        self._waiting_since: float | None = None        # for the fleet's lock of another kodemachine

    # -- machines

    def label(self, text: str) -> str:
        """The label that a word of the command line means. Raises UsageError."""
        return check_label(text, self.settings)

    def name(self, label: str) -> str:
        """The machine's name in UTM, for ssh, and in the known-hosts file."""
        return self.settings.prefix + label

    def fleet(self, partial: bool = False, call: Call | None = None) -> Fleet:
        """All machines; `partial` and `call` as for Utmctl.rows. Raises Unreachable, TimedOut or KodeError."""
        return Fleet(self.utm.rows(partial, call), self.state.records(), self.settings)

    def vm(self, machine: Machine) -> VM:
        """The machine as an object that can be started, stopped, and so on."""
        return VM(self.utm, self.state, machine)

    def vm_of(self, made: Machine) -> VM:
        """A machine that was just made, as an object with its label."""
        return self.vm(made._replace(label=label_in(made.name, self.settings.prefix)))

    def find(self, label: str) -> VM:
        """The clone with that label. Raises NotFound if a clean list lacks it."""
        return self.vm(self.fleet(partial=True).find(label))

    @contextlib.contextmanager
    def holding(self, label: str, *, wait: bool = True) -> Iterator[None]:
        """Holds the label's lock, which is taken before the fleet's."""
        with self.state.lock(self.name(label), self.settings.lock_limit, wait=wait):
            yield

    @contextlib.contextmanager
    def fleet_lock(self) -> Iterator[None]:
        """Holds the fleet's lock: to clone, rename, configure and delete.

        Our own threads take turns, so that only the time of other processes counts as waiting. It counts once for all.
        """
        with self._turn:
            self._waiting_since = self._waiting_since or time.monotonic()
            left = self._waiting_since + self.settings.lock_limit - time.monotonic()
            with self.state.lock("fleet", max(1.0, left), what="the list of machines"):
                self._waiting_since = None
                yield

    # -- find or clone

    def find_or_clone(self, label: str, options: StartOptions) -> tuple[VM, Call | None]:
        """The clone with that label, made if it is missing, and a question for its addresses that has begun.

        That question is about the UUID remembered for the name, and is asked together with the list. It is kept only if
        the list shows exactly that machine, started. Callers hold the label's lock.
        """
        name = self.name(label)
        records = self.state.records()
        known = [uuid for uuid, record in records.items() if record.name == name and UUID.fullmatch(uuid)]
        call = self.utm.begin("ip-address", known[0]) if len(known) == 1 else None
        try:
            listing = self.utm.begin("list")
            # The modules that ssh options and the probe need: while UTM answers, their import costs no time.
            import base64  # noqa: F401
            import socket  # noqa: F401

            fleet = Fleet(self.utm.rows(partial=True, call=listing), records, self.settings)
            machine = fleet.get(label)
            if machine is None:
                fleet.rows.must_be_complete()
                self._must_be_meant(label, options, fleet)
                return self._clone(label, options), None
            vm = self._taken(machine, label, options, fleet)
            if vm.uuid in known and vm.power is Power.STARTED:
                kept, call = call, None
                return vm, kept
            return vm, None
        finally:
            self.utm.drop(call)

    def _taken(self, machine: Machine, label: str, options: StartOptions, fleet: Fleet) -> VM:
        """A machine that exists already, with its record up to date."""
        name = self.name(label)
        record = self.maker.claim(machine.uuid, name, fleet.uuids) or machine.record
        machine = machine._replace(record=record)
        vm = self.vm(machine)
        self._refuse_options(vm, label, options)
        if options.offline and record.network != "offline":
            # Its next start proves it.
            vm.remember(is_offline=True, mac_is_unique=False)
        if self.is_orphan(machine):
            # Somebody wants it after all.
            vm.remember(is_temporary=False)
        if record.name not in ("", name):
            # It was renamed in UTM. Its guest has the old name.
            self.state.pin(name, self.state.pinned(record.name))
            vm.remember(name=name, is_named=False, refusal="")
        return vm

    def _must_be_meant(self, label: str, options: StartOptions, fleet: Fleet) -> None:
        """Raises NotFound or UsageError if a new machine of that label is perhaps a mistake."""
        other = near_label(label, [str(clone.label) for clone in fleet.clones])
        if not options.may_clone:
            meant = f"; did you mean {other!r}?" if other else ""
            raise NotFound(f"there is no machine {label}{meant}", f"To create it: kodemachine {label}")
        if options.bare:
            self._must_not_be_a_command(label, options.commands)
        if other:
            self._notes.warn(f"{label} is a new machine; {other} exists as well")

    @staticmethod
    def _must_not_be_a_command(label: str, commands: Sequence[str]) -> None:
        near = near_command(label, commands)
        if near is None:
            return
        problem = f"there is no machine {label}; did you mean {near!r}?"
        if near == "start":
            # `up` alone does not say which machine.
            raise UsageError(problem, "To start a machine, for example: kodemachine project-alpha")
        hint = f"See: kodemachine help {near}"
        if label not in SYNONYMS:
            # It may be a label after all.
            hint += f"; to create a machine of that name: kodemachine start {label}"
        raise UsageError(problem, hint)

    def _refuse_options(self, vm: VM, label: str, options: StartOptions) -> None:
        """Raises WrongState for options that only a new machine can have."""
        record = vm.record
        again = "To replace it: the same command with --fresh"
        if options.only_new:
            raise WrongState(f"{vm.name} exists already, and --rm is only for a machine that the command creates",
                             f"To use it: kodemachine {label}; to delete it first: kodemachine delete --force {label}")
        is_other = options.base not in (None, record.image) and whole_name(options.base or "") != record.image
        if is_other and (options.base or "").upper() != record.image_uuid:
            raise WrongState(f"{vm.name} was cloned from {record.image or 'an unknown image'}", again)
        # A run that was interrupted before its first start has made it.
        is_new = record.never_started and vm.power is Power.STOPPED
        if (options.cpus or options.memory) and not is_new:
            raise WrongState(f"{vm.name} exists already; --cpus and --memory are for a new clone", again)
        if options.offline and record.network != "offline" and not is_new:
            raise WrongState(f"{vm.name} exists already and is not offline; --offline is for a new clone", again)

    def _clone(self, label: str, options: StartOptions) -> VM:
        """A new machine with that label, or the one that an earlier run began to make. `records`: as read before."""
        name = self.name(label)
        with self.fleet_lock():
            begun = Order(self.state, name).load()
            made = self.maker.resume(name)
            fleet = self.fleet()
            # It may have appeared since the first look, while UTM was starting.
            machine = fleet.get(label)
            if machine is None and begun and begun["record"].get("is_copy"):
                # Otherwise the new machine would pass for that copy.
                Order(self.state, name).remove()
                raise WrongState(f"an earlier `{self.order_command(name, begun)}` was interrupted and left no machine",
                                 "To repeat it, run it again. For a machine from the image, run this command again.")
            if machine is None:
                base = self.base_for_new(fleet, options.base)
                made = self.maker.clone(base, name, fleet.rows, options.afterwards, is_temporary=options.only_new,
                                        is_offline=options.offline)
                return self.vm_of(made)
            vm = self._taken(machine, label, options._replace(only_new=options.only_new and made is None), fleet)
            if options.only_new:
                vm.remember(is_temporary=True)
            return vm

    def copy(self, label: str, new: str) -> None:
        """Clones a stopped clone with a new label; the copy counts as one of the same image.

        Raises WrongState if that is not possible, or if there is a machine of that name, unless an earlier run of this
        made it. Callers hold both labels' locks.
        """
        vm, name = self.find(label), self.name(new)
        if vm.power is not Power.STOPPED:
            raise WrongState(f"{vm.name} is {vm.power.word}; only a stopped machine can be cloned",
                             f"To stop it first: kodemachine stop {label}")
        with self.fleet_lock():
            self._refuse_other_order(vm, new)
            made = self.maker.resume(name)
            fleet = self.fleet()
            if made is None and fleet.get(new):
                raise WrongState(f"{name} exists already",
                                 f"Use another label, or delete it first: kodemachine delete {new}")
            if made is None:
                self.prove_whole(vm)
                # The script has left its results on the disk, unless it was never run.
                first_boot = "" if vm.record.never_started else vm.record.first_boot or "done"
                source = Machine(vm.uuid, vm.name, vm.power)
                made = self.maker.clone(source, name, fleet.rows, image=vm.record.image,
                                        image_uuid=vm.record.image_uuid, is_copy=True, first_boot=first_boot,
                                        is_offline=vm.record.is_offline)
            self.prove_whole(self.vm_of(made))

    def _refuse_other_order(self, vm: VM, new: str) -> None:
        """Raises WrongState if an earlier run began to make the new machine from another one."""
        name = self.name(new)
        order = Order(self.state, name)
        found = order.load()
        if not found or found["base_uuid"] == vm.uuid:
            return
        fleet = self.fleet()
        # A deleted machine cannot be cloned; `resume` finds a clone that was already made.
        if order.is_alive() or fleet.get(new) or fleet.by_uuid(found["base_uuid"]):
            raise WrongState(f"an earlier run began to clone {found['base']} to {name}",
                             f"To complete that: {self.order_command(name, found)}")

    def order_command(self, name: str, order: dict[str, Any]) -> str:
        """The command line that completes an order."""
        label = label_in(name, self.settings.prefix)
        if order.get("record", {}).get("is_copy"):
            # Under another prefix, the original may have been a clone.
            return f"kodemachine clone {label_in(order['base'], self.settings.prefix) or order['base']} {label}"
        return f"kodemachine {label}"

    def prove_whole(self, vm: VM) -> None:
        """Raises KodeError if a machine that was never started is an incomplete copy. The proof is recorded."""
        if vm.record.copy_of:
            vm.must_be_whole(read_hardware(self.utm, vm.uuid, vm.record.copy_of))
            vm.remember(copy_of="")

    def base_for_new(self, fleet: Fleet, wanted: str | None) -> Machine:
        """The image for a new machine. Raises KodeError if that cannot succeed."""
        if self.settings.first_boot:
            # The error is better now than after the clone.
            open_script(self.settings.first_boot).close()
        image = fleet.image(wanted)
        self.prove_whole(self.vm(image))
        return image

    @contextlib.contextmanager
    def continuing(self, vm: VM, verb: str) -> Iterator[None]:
        """Says after an interruption that UTM may still do what it was asked for."""
        try:
            yield
        except Interrupted:
            self._notes.warn(f"UTM may still {verb} {vm.name}; to see its state: kodemachine status {vm.label}")
            raise

    # -- start

    def start(self, vm: VM, options: StartOptions, call: Call | None = None) -> str:
        """Starts or resumes a machine, waits for its ssh server and gives it its identity; returns the address.

        Callers hold the label's lock.
        """
        before = vm.power
        # One write for the whole start. The failure of a start counts more than one of this write.
        try:
            address = self._start(vm, options, call)
        except BaseException as failure:
            with contextlib.suppress(KodeError):
                vm.remember()
            if isinstance(failure, Interrupted) and before is not Power.STARTED and not vm.record.is_temporary:
                state = f"{vm.name} is {vm.power.word}"
                if vm.power is Power.STOPPED:
                    state = f"UTM may still start {vm.name}"
                self._notes.warn(f"{state}; to continue: kodemachine {vm.label}; to shut it down: kodemachine stop "
                                 f"{vm.label}")
            raise
        vm.remember()
        return address

    def _start(self, vm: VM, options: StartOptions, call: Call | None) -> str:
        limit, before = options.timeout or self.settings.boot_timeout, vm.power
        needs_renewal = vm.record.is_copy and before is Power.STOPPED
        began = time.monotonic()

        def before_cold() -> None:
            nonlocal began
            self._prepare(vm, options.memory, options.cpus)
            # The wait for another kodemachine's lock is not a part of the boot.
            began = time.monotonic()

        if before is not Power.STARTED:
            verb = "resuming" if before is Power.PAUSED else "starting"
            self._notes.step(f"{verb} {vm.name}")
            vm.power_on(limit, before_cold=before_cold)
        if vm.record.never_started:
            first_boot = vm.record.first_boot
            if not first_boot and self.settings.first_boot:
                first_boot = "pending"
            vm.note(never_started=False, first_boot=first_boot)
        if not call:
            self._notes.step(f"waiting for ssh on {vm.name}")
        left = max(1.0, limit - (time.monotonic() - began))
        # A machine that has its identity, or cannot get one, was reached before.
        prove = options.prove or not call or not (vm.record.is_named or vm.record.refusal)
        address = vm.wait_for_ssh(self.settings.ssh_port, left, call, prove=prove)
        if needs_renewal:
            address = self._renew(vm, limit) or address
        else:
            self._name(vm, before)
        if options.prove and not self.ssh.knows(vm.name):
            # No session follows in which ssh would learn the key, and by its name a machine is reached only with one.
            self.ssh.learn(vm, address)
        self._check_clock(vm, before)
        return address

    def _name(self, vm: VM, before: Power) -> None:
        """Gives the guest its name and pins its host keys, unless that is done. `before`: the state before this start.

        The known-hosts file may have been lost. What the guest agent has refused is tried again after a boot only.
        """
        is_known = vm.record.is_named and self.ssh.knows(vm.name)
        if is_known or (before is Power.STARTED and vm.record.refusal):
            return
        self._notes.step(f"naming the guest {vm.label}")
        self._record_identity(vm, self.read_identity(vm))

    def _check_clock(self, vm: VM, before: Power) -> None:
        """Sets the guest's clock if the machine was paused, or the Mac has slept since the clock was right.

        `before`: the machine's state before this start.
        """
        wake = self.last_wake() or vm.record.wake
        has_slept = before is Power.STARTED and wake != vm.record.wake
        is_right = True
        if has_slept or before in (Power.PAUSING, Power.PAUSED, Power.RESUMING):
            is_right = vm.set_clock()
        if is_right and wake != vm.record.wake:
            vm.note(wake=wake)

    def last_wake(self) -> str:
        """When the Mac woke up last, in seconds since the epoch; empty if the system does not report it."""
        with contextlib.suppress(KodeError):
            match = re.match(r"\{ sec = (\d+),", self.utm.call("sysctl", "-n", "kern.waketime").out)
            if match:
                return match.group(1)
        return ""

    def before_cold_start(self, vm: VM) -> None:
        """Proves that the machine is a whole copy, and gives it a network address of its own."""
        self._prepare(vm, None, None)
        vm.remember()

    def _prepare(self, vm: VM, memory: int | None, cpus: int | None) -> None:
        # A person may have changed the network of an offline machine in UTM.
        if memory or cpus or vm.record.is_offline or not vm.record.mac_is_unique:
            with self.fleet_lock():
                self._notes.step(f"checking the network address of {vm.name}")
                vm.prepare(memory, cpus)
        vm.note(name=vm.name, mac_is_unique=True, copy_of="")

    def _record_identity(self, vm: VM, identity: Identity) -> None:
        """Pins the host keys, and records that the guest is named. A problem is reported; a final one, once."""
        problem = identity.problem
        if identity.host_keys:
            self.state.pin(vm.name, identity.host_keys)
        if not problem:
            vm.note(name=vm.name, is_named=True, machine_id=printable(identity.machine_id))
        elif not identity.is_final:
            self._notes.warn(f"{problem}; the next start tries again")
            return
        if not problem and not identity.host_keys:
            problem = f"the guest agent reports no host keys of {vm.name}; ssh accepts the first one that it sees"
        self._record_refusal(vm, problem, "This is tried again when the machine boots.")

    def _record_refusal(self, vm: VM, problem: str, afterwards: str) -> None:
        """Reports a lasting problem with the guest agent, once; "" if there is none any more."""
        refusal = problem.partition("\n")[0]
        if problem and refusal != vm.record.refusal:
            self._notes.warn(f"{problem}\n  {afterwards}")
        vm.note(refusal=refusal)

    def _renew(self, vm: VM, limit: float) -> str | None:
        """Gives a copy host keys and a machine-id of its own, and restarts it, because only then they count.

        Returns its address then, or None if its guest agent did not do it; the next cold start tries again.
        """
        self._notes.step(f"giving {vm.name} host keys and a machine-id of its own")
        identity = self.read_identity(vm, renew=True)
        if not identity.is_renewed:
            # sshd has its old keys until the restart.
            if identity.is_final:
                self._record_refusal(vm, identity.problem, "The next cold start tries again.")
            else:
                self._notes.warn(f"{identity.problem}; the next cold start tries again")
            return None
        self._notes.step(f"restarting {vm.name}")
        try:
            vm.ask_to_stop(self.settings.stop_timeout)
        except TimedOut:
            # The new identity has been flushed to the disk.
            vm.force_off()
        self._record_identity(vm, identity)
        vm.note(is_copy=False)
        vm.power_on(limit)
        self._notes.step(f"waiting for ssh on {vm.name}")
        return vm.wait_for_ssh(self.settings.ssh_port, limit)

    def read_identity(self, vm: VM, *, needed: bool = False, renew: bool = False) -> Identity:
        """Names the guest, and returns what its answer proves; with `needed`, a command that was not run is an error.

        Host keys count even if the agent, which may be confined, could not do everything else.
        """
        label = str(vm.label)
        words = ["/bin/sh", "-c", IDENTITY, "kodemachine", label]
        wanted = {"hostname": label, "stored": label, "hosts": label}
        if renew:
            words.append("renew")
            wanted["renewed"] = "yes"
        problem = f"the guest agent did not name {vm.name}"
        try:
            _, out, err = vm.run(words, limit=LIMITS["osascript"])
        except KodeError as failure:
            if needed:
                raise
            problem = f"{problem} ({failure.message})"
            if isinstance(failure, Forbidden):
                return Identity([], "", f"{problem}\n  {failure.hint}", True)
            return Identity([], "", problem)
        pairs = [line.split("=", 1) for line in out.decode("utf-8", "replace").splitlines() if "=" in line]
        found = dict(pairs)
        host_keys = parse_host_keys([value for key, value in pairs if key == "key"])
        identity = Identity(host_keys, found.get("machine-id", "")[:64], f"{problem} (its answer is incomplete)")
        if found.get("end") != label:
            return identity
        identity = identity._replace(problem="", is_renewed=found.get("renewed") == "yes")
        undone = [UNDONE[key] for key, value in wanted.items() if found.get(key) != value]
        if not undone:
            return identity
        reason = (err.decode("utf-8", "replace").strip().splitlines() or ["the guest reported no error"])[-1]
        return identity._replace(problem=f"{problem}: {', '.join(undone)} ({printable(reason)})", is_final=True)

    def running(self, label: str) -> tuple[VM, str, bool]:
        """A running machine, its likeliest address, and whether its host key is known.

        It is neither cloned nor started. Raises NotFound or WrongState. Callers hold the label's lock.
        """
        options = StartOptions(may_clone=False, prove=False)
        vm, call = self.find_or_clone(label, options)
        if vm.power is not Power.STARTED:
            raise WrongState(f"{vm.name} is {vm.power.word}", vm.how_to_run)
        address = self.start(vm, options, call)
        return vm, address, self.ssh.knows(vm.name)

    # -- facts

    @property
    def documents(self) -> str:
        """The folder of UTM's bundles."""
        return self.settings.documents or os.path.expanduser(DOCUMENTS)

    def describe(self, machines: Sequence[Machine], *, ip: bool = True, sizes: bool = False) -> list[Facts]:
        """The facts about these machines. A guest that hangs costs its own row the address.

        Sizes are read only if wanted: macOS asks the person before a program reads UTM's folder (contract 6).
        """
        running = [machine for machine in machines if ip and machine.power is Power.STARTED]
        replies = self.utm.gather([("ip-address", machine.uuid) for machine in running], limit=ADDRESS_LIMIT)
        addresses = {machine.uuid: parse_addresses(reply.out) for machine, reply in zip(running, replies)
                     if reply.outcome is Outcome.DONE}
        disks: dict[str, Disk] = {}
        if sizes and machines:
            disks = read_bundles(self.documents, machines, DISK_LIMIT, self._notes.tick)
        found = []
        for machine in machines:
            record, disk = machine.record, disks.get(machine.uuid, Disk())
            address = next(iter(addresses.get(machine.uuid, [])), None)
            found.append(Facts(machine.label, machine.name, machine.uuid, machine.power.word, address,
                               record.image or None, disk.memory, disk.size, disk.reclaimable, record.created or None,
                               record.network))
        return found

    # -- the everyday verbs; callers hold the label's lock

    def stop(self, label: str, limit: float, *, force: bool = False, kill: bool = False) -> str:
        """Turns a machine off; the guest is asked first, unless forced. Returns a description of the result."""
        vm = self.find(label)
        if vm.power is Power.STOPPED:
            return "is already stopped"
        self._notes.step(f"stopping {label}")
        with self.continuing(vm, "shut down"):
            if force or kill:
                vm.force_off(kill)
            else:
                vm.ask_to_stop(limit)
        return "stopped"

    def suspend(self, label: str) -> str:
        """Pauses a machine in memory. Returns a description of the result."""
        vm = self.find(label)
        if vm.power is Power.PAUSED:
            return "is already suspended"
        with self.continuing(vm, "suspend"):
            vm.suspend(self.settings.stop_timeout)
        return "suspended"

    def resume(self, label: str) -> str:
        """Continues a paused machine. Returns a description of the result. Raises WrongState for a stopped one."""
        vm = self.find(label)
        if vm.power is Power.STARTED:
            return "is already running"

        def before_cold() -> None:
            raise WrongState(f"{vm.name} is stopped and cannot be resumed", vm.how_to_run)
        with self.continuing(vm, "resume"):
            vm.power_on(self.settings.boot_timeout, before_cold=before_cold)
        vm.set_clock()
        return "resumed"

    def delete(self, vm: VM, *, force: bool, measure: bool = False) -> int | None:
        """Deletes a clone, stopping it first with `force`.

        With `measure` it returns the bytes that this frees. None: unknown, because macOS may refuse UTM's folder.
        """
        if vm.power is not Power.STOPPED:
            if not force:
                raise WrongState(f"{vm.name} is {vm.power.word}",
                                 f"To stop and delete it: kodemachine delete --force {vm.label}")
            # Without a complete list the machine would be turned off, and not be deleted.
            self.utm.rows()
            vm.force_off()
        disks: dict[str, Disk] = {}
        if measure:
            row = Row(vm.uuid, vm.power, vm.name)
            disks = read_bundles(self.documents, [row], DISK_LIMIT, self._notes.tick)
        with self.fleet_lock():
            fleet = self.fleet()
            machine = fleet.by_uuid(vm.uuid)
            # A machine that is gone meanwhile is the wanted result.
            if machine and (machine.name != vm.name or not machine.label):
                raise WrongState(f"{vm.uuid} is not the clone {vm.name} any more, and was not deleted",
                                 "To see all machines: kodemachine list -a")
            with self.continuing(vm, "delete"):
                vm.delete(LIMITS["delete"])
            Order(self.state, vm.name).remove()
            # It may have been renamed in UTM.
            for name in {vm.name, vm.record.name or vm.name}:
                self.state.forget(name, fleet.uuids - {vm.uuid})
        return disks.get(vm.uuid, Disk()).reclaimable

    def forget_missing(self) -> None:
        """Removes the records of machines that a clean list lacks; the fleet's lock protects those being made."""
        if not self.state.records():
            return
        with self.fleet_lock():
            fleet = self.fleet()
            # Without any machine UTM perhaps has no window yet (contract 4).
            if not fleet.machines:
                return
            records = self.state.records()
            for name in {record.name for uuid, record in records.items() if uuid not in fleet.uuids}:
                self.state.forget(name, fleet.uuids)

    # -- temporary machines

    def session_lock(self, vm: VM) -> contextlib.AbstractContextManager[None]:
        """The lock that a --rm session holds for its machine; so an orphan can be recognised."""
        # `list` holds this lock for a moment while it checks it.
        return self.state.lock(vm.uuid + ".session", 5.0)

    def is_orphan(self, machine: Machine) -> bool:
        """Whether a machine was made with --rm, and its kodemachine no longer runs."""
        return machine.record.is_temporary and not self.state.locked(machine.uuid + ".session")


# ---- images: Sealer, Creator

# The prefix of an image's name while it is being made. The result is neither an image's name nor a clone's.
UNFINISHED = "unfinished-"
PUBLIC_KEY = re.compile(r"((?:ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/]+=*)(?:\s|$)")
# ~/.ssh/id_KIND: the keys that ssh offers without any configuration (ssh_config(5), IdentityFile).
KEY_KINDS = ("ed25519", "ecdsa", "rsa", "ed25519_sk", "ecdsa_sk")


def usable_key(text: str) -> str:
    """The public key at the beginning of a text, as `type base64 comment`; "" if there is none."""
    line = text.partition("\n")[0]
    match = PUBLIC_KEY.match(line)
    if not match:
        return ""
    # A comment may contain anything; the key goes into shell scripts and JSON.
    if line.isascii() and line.isprintable():
        return line
    return match.group(1)


def agent_key(utm: Utmctl) -> str:
    """The first key of the ssh agent that ssh uses; "" if there is none. Password managers keep keys only there."""
    words = ["ssh-add", "-L"]
    agent = re.search(r"(?m)^identityagent (none$|/.*)", utm.call("ssh", "-G", "--", "kodemachine").out)
    if agent and agent.group(1) == "none":
        return ""
    if agent:
        words = ["env", f"SSH_AUTH_SOCK={agent.group(1)}", *words]
    reply = utm.call(*words, limit=LIMITS["ssh-add"])
    if reply.outcome is not Outcome.DONE:
        return ""
    return usable_key(reply.out)


def public_key(utm: Utmctl, identity_file: str | None) -> str:
    """The person's public key, as `type base64 comment`. Raises KodeError if there is none.

    Without a configured file, and without one of ssh's own names, it is taken from the ssh agent.
    """
    if identity_file:
        places = [identity_file.removesuffix(".pub") + ".pub"]
        hint = "Name the key that you use: kodemachine config set identity_file PATH"
    else:
        places = [os.path.expanduser(f"~/.ssh/id_{kind}.pub") for kind in KEY_KINDS]
        hint = "Make one: ssh-keygen -t ed25519; or name yours: kodemachine config set identity_file PATH"
    for place in places:
        with explained(place):
            key = usable_key(read_text(place) or "")
        if key:
            return key
    where = " or ".join(places[:3])
    if not identity_file:
        key = agent_key(utm)
        if key:
            return key
        where += ", nor in an ssh agent"
    raise KodeError(f"there is no ssh public key at {where}", hint)


class Images:
    """The machines that may become images, and their copies."""

    def __init__(self, manager: Manager) -> None:
        self._manager, self._utm = manager, manager.utm

    def _sealable(self, text: str) -> Machine:
        """The machine of that UTM name, UUID or label, if it is not an image. Raises NotFound or WrongState."""
        prefix = self._manager.settings.prefix
        found = [machine for machine in self._manager.fleet().machines
                 if text in (machine.name, label_in(machine.name, prefix)) or text.upper() == machine.uuid]
        if not found:
            raise NotFound(f"there is no machine {text}", "See them all: kodemachine list -a")
        if len(found) > 1:
            which = ", ".join(f"{machine.name} ({machine.uuid})" for machine in found)
            raise WrongState(f"{text} matches {len(found)} machines: {which}", "Give the UUID instead.")
        machine = found[0]
        if machine.is_image or machine.name.startswith("kodeimage-"):
            raise WrongState(f"{machine.name} is an image, and images are never changed",
                             "Seal a clone of it instead.")
        return machine

    @contextlib.contextmanager
    def sealing(self, text: str) -> Iterator[VM]:
        """Holds the lock of a machine that may be sealed. Raises NotFound, WrongState or TimedOut."""
        machine = self._sealable(text)
        # The name of a foreign machine may not be usable as a file name.
        lock = machine.name if machine.label else machine.uuid
        with self._manager.state.lock(lock, self._manager.settings.lock_limit, what=machine.name):
            yield self._manager.vm(self._sealable(machine.uuid))

    def resume_copy(self, vm: VM, name: str) -> VM | None:
        """The image `name` that an interrupted run copied from this machine; None without one. Raises WrongState."""
        with self._manager.fleet_lock():
            row = self._manager.maker.resume(name)
            if row:
                image = self._manager.vm_of(row)
                if image.record.image_uuid == vm.uuid:
                    self._manager.prove_whole(image)
                    return image
            Maker.must_be_free(name, self._utm.rows())
            return None

    def copy(self, vm: VM, name: str) -> VM:
        """Copies a stopped machine to the image `name`. Raises KodeError."""
        with self._manager.fleet_lock():
            base = Machine(vm.uuid, vm.name, vm.power)
            image = self._manager.vm_of(self._manager.maker.clone(base, name, self._utm.rows()))
            self._manager.prove_whole(image)
            return image


# Seconds for the script that seals a machine; it trims the disk.
SEAL_LIMIT = 300.0


class Step(NamedTuple):
    """One step of the script SEAL; `status` is ok, would, done, bad or warn."""

    name: str
    status: str
    detail: str


class Sealer:
    """Makes a machine the source of an image, through its guest agent. The next run completes an interrupted one."""

    def __init__(self, manager: Manager, vm: VM, user: str, key: str) -> None:
        self._manager, self._notes = manager, manager.utm.notes
        self.vm, self.user, self._key = vm, user, key

    def wake(self, limit: float, *, may_change: bool = False) -> None:
        """Starts the machine if it is off, and waits for its guest agent, at most `limit` seconds for each."""
        vm = self.vm
        if vm.power is not Power.STARTED:
            self._notes.step(f"starting {vm.name}")
            vm.power_on(limit, before_cold=lambda: self._manager.before_cold_start(vm))
        self._notes.step(f"waiting for the guest agent of {vm.name}")
        vm.wait_for_agent(limit, may_change=may_change)

    def ask(self, mode: str, *, sudo: bool = False) -> list[Step]:
        """The steps that SEAL reports in that mode: check, apply or prove. Raises KodeError if it was interrupted."""
        may_become_root = "yes" if sudo else ""
        words = ["/bin/sh", "-c", SEAL, "kodemachine", mode, self.user, self._key, may_become_root]
        _, out, err = self.vm.run(words, limit=SEAL_LIMIT)
        text = out.decode("utf-8", "replace")
        steps = [Step(*found) for found in re.findall(r"^step (\S+) (\S+) ?(.*)$", text, re.MULTILINE)]
        if not text.endswith("end\n"):
            where = f" after step {steps[-1].name}" if steps else ""
            lines = err.decode("utf-8", "replace").strip().splitlines() or ["the guest reported no error"]
            raise KodeError(f"sealing {self.vm.name} was interrupted{where}: {lines[-1]}", RUN_AGAIN)
        return steps

    def must(self, steps: Sequence[Step]) -> Sequence[Step]:
        """The steps. Raises KodeError with the names of the bad ones, if there are any."""
        bad = [f"{step.name} ({step.detail})" for step in steps if step.status == "bad"]
        if bad:
            raise KodeError(f"{self.vm.name} cannot be sealed: {', '.join(bad)}",
                            "Fix that in the machine and run the command again.")
        return steps

    def apply(self, *, sudo: bool = False) -> Sequence[Step]:
        """Does every step, proves that each had its effect, and powers the machine off. Raises KodeError."""
        # This comes before the guest loses its identity: an interrupted run must leave no pinned key.
        self.vm.remember(is_named=False, machine_id="", refusal="")
        self._manager.state.pin(self.vm.name, [])
        self._notes.step(f"sealing {self.vm.name}")
        steps = self.must(self.ask("apply", sudo=sudo))
        self.must(self.ask("prove"))
        self.power_off()
        return steps

    def power_off(self) -> None:
        """Asks the guest to power off, and waits until it has. Raises TimedOut."""
        self._notes.step(f"stopping {self.vm.name}")
        self.vm.ask_to_stop(self._manager.settings.stop_timeout)


QCOW2_HEADER = 104      # bytes


class Qcow2(NamedTuple):
    """The header of a qcow2 image (QEMU, docs/interop/qcow2). Sizes in bytes; of the L1 table, in entries of 8 bytes.

    `l1_room`: the size that the table could have in its clusters; 0 if it does not begin with a cluster.
    """

    size: int
    cluster: int
    l1_size: int
    l1_offset: int
    l1_room: int


def parse_qcow2(header: bytes) -> Qcow2:
    """The header of an image that can be grown in place. Raises ValueError with the reason if it cannot."""
    import struct

    if len(header) < QCOW2_HEADER or header[:4] != b"QFI\xfb":
        raise ValueError("it is not a qcow2 image")
    fields = struct.unpack_from(">IQIIQIIQQII", header, 4)
    version, backing_file, _, cluster_bits, size, encryption, l1_size, l1_offset, _, _, snapshots = fields
    incompatible, autoclear = 0, 0
    if version == 3:
        incompatible, _, autoclear = struct.unpack_from(">QQQ", header, 72)
    # Bit 3 of the incompatible features only says how clusters are compressed.
    problems = {
        f"its format has version {version}": version not in (2, 3),
        "it has a backing file": backing_file != 0,
        "it is encrypted": encryption != 0,
        "it has snapshots": snapshots != 0,
        "it was not closed properly": bool(incompatible & 0b11),
        "its data is in another file": bool(incompatible & 0b100),
        "it uses features of a newer format": bool(incompatible & ~0b1111),
        "it has bitmaps or similar additions": autoclear != 0,
        f"its cluster size of 2^{cluster_bits} bytes is not valid": not 9 <= cluster_bits <= 21,
    }
    for problem, is_present in problems.items():
        if is_present:
            raise ValueError(problem)
    cluster = 1 << cluster_bits
    l1_room = 0
    if l1_offset != 0 and l1_offset % cluster == 0:
        l1_room = l1_size + -l1_size % (cluster // 8)
    return Qcow2(size, cluster, l1_size, l1_offset, l1_room)


def grow_qcow2(path: str, size: int) -> None:
    """Makes the virtual disk of an image `size` bytes large, in place. The new part reads as zeros.

    An entry of the L1 table has 8 bytes and maps one cluster of such entries, which map one cluster of the disk each.
    The table owns whole clusters, so it can grow to the end of its last one: with clusters of 64 KiB, for a disk of
    4 TiB. Raises ValueError if that is not enough or the image cannot be grown, and OSError.
    """
    import struct

    with open(path, "r+b") as file:
        image = parse_qcow2(file.read(QCOW2_HEADER))
        if size < image.size:
            raise ValueError(f"its disk already has {size_text(image.size)}")
        bytes_per_entry = image.cluster * image.cluster // 8
        needed = (size + bytes_per_entry - 1) // bytes_per_entry
        entries = max(image.l1_size, needed)
        if entries > image.l1_room:
            raise ValueError(f"its clusters of {size_text(image.cluster)} are too small for that")
        # The new entries must be on disk before the header counts them.
        file.seek(image.l1_offset + image.l1_size * 8)
        file.write(bytes((entries - image.l1_size) * 8))
        file.flush()
        os.fsync(file.fileno())
        # Size, encryption and number of entries are neighbours: one write changes them.
        file.seek(24)
        file.write(struct.pack(">QII", size, 0, entries))


# Seconds for short runs of other programs.
TOOL_LIMIT = 120.0
# Seconds for a download. curl ends one that makes no progress.
DOWNLOAD_LIMIT = 14400.0
CURL = ("-fsSL", "--connect-timeout", "30", "--speed-limit", "1000", "--speed-time", "60")
# Exit statuses of curl: the server answered with an error; it cannot send a part of a file.
CURL_HTTP_ERROR, CURL_NO_RANGE = 22, 33


def output_of(reply: Reply) -> str:
    """The output of a program other than UTM's. Raises KodeError with the last line of its errors if it failed."""
    if reply.outcome is not Outcome.DONE:
        problem = reply.sentence or f"{reply.verb} ended with {reply.code} ({reply.outcome.value})"
        raise KodeError(problem, RUN_AGAIN)
    return reply.out


class Downloads:
    """The folder of downloaded images, checked against the server's SHA256SUMS. Callers hold the folder's lock."""

    def __init__(self, utm: Utmctl, folder: str) -> None:
        self._utm, self._notes, self._folder = utm, utm.notes, folder

    def get(self, url: str) -> str:
        """The path of the file at a URL, downloaded unless the folder has it already. Raises KodeError."""
        folder, _, name = url.rpartition("/")
        sums = f"{folder}/SHA256SUMS"
        published = self._published_digest(sums, name)
        target = os.path.join(self._folder, re.sub(r"[^\w.-]", "-", name))
        part = target + ".part"
        if self._digest(target) == published:
            return target
        if self._digest(part) != published:
            self._download(url, part)
        if self._digest(part) != published:
            with explained(part):
                os.unlink(part)
            raise KodeError(f"{name} does not have the checksum in {sums}, and was removed",
                            "The file may have been replaced on the server just now: run the same command again.")
        with explained(part):
            os.replace(part, target)
        return target

    def _published_digest(self, sums: str, name: str) -> str:
        hint = "Download and check the image yourself, then name the file: --image FILE"
        reply = self._utm.call("curl", *CURL, "--url", sums, limit=TOOL_LIMIT)
        if reply.code == CURL_HTTP_ERROR and "404" in reply.err:
            raise KodeError(f"there is no {sums}", hint)
        match = re.search(rf"^([0-9a-f]{{64}}) [ *]{re.escape(name)}$", output_of(reply), re.MULTILINE)
        if not match:
            raise KodeError(f"{sums} does not list {name}", hint)
        return match.group(1)

    def _download(self, url: str, part: str) -> None:
        """Downloads to `part`. If the file has a beginning already and the server allows it, only the rest."""
        self._notes.step(f"downloading {url}")
        reply = self._run_curl(url, part)
        if reply.code in (CURL_HTTP_ERROR, CURL_NO_RANGE) and os.path.exists(part):
            with explained(part):
                os.unlink(part)
            reply = self._run_curl(url, part)
        output_of(reply)

    def _run_curl(self, url: str, part: str) -> Reply:
        call = self._utm.begin("curl", *CURL, "-C", "-", "-o", part, "--url", url, limit=DOWNLOAD_LIMIT)
        while True:
            reply = self._utm.finish(call, 0.5)
            if reply:
                return reply
            with contextlib.suppress(OSError):
                self._notes.progress(size_text(os.path.getsize(part)))

    def _digest(self, path: str) -> str | None:
        """The SHA-256 of a file; None if there is none."""
        import hashlib

        digest = hashlib.sha256()
        if not os.path.exists(path):
            return None
        with explained(path), open(path, "rb") as file:
            while True:
                data = file.read(1 << 20)
                if not data:
                    return digest.hexdigest()
                digest.update(data)
                self._notes.tick()


def seed_files(image: str, user: str, key: str) -> dict[str, str]:
    """The files of cloud-init's NoCloud seed, by name: JSON, which is YAML too and quotes what must be quoted.

    The network's profile has neither a MAC address nor the name of a card. It sets no DHCP identifier either: the
    default follows the machine-id, which sealing removes.
    """
    meta_data = {"instance-id": image, "local-hostname": "kodeimage"}
    network_config = {"version": 2, "ethernets": {"any": {"match": {"name": "e*"}, "dhcp4": True}}}
    user_data = {
        "users": [{
            "name": user,
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": True,
            "ssh_authorized_keys": [key],
        }],
        "ssh_pwauth": False,
        "runcmd": [["sh", "-c", INSTALL_AGENT]],
    }
    return {
        "meta-data": json.dumps(meta_data) + "\n",
        "network-config": json.dumps(network_config) + "\n",
        "user-data": "#cloud-config\n" + json.dumps(user_data) + "\n",
    }


# Ubuntu's images, by UTM's name of the architecture.
UBUNTU = "https://cloud-images.ubuntu.com/releases/24.04/release/ubuntu-24.04-server-cloudimg-{}.img"
UBUNTU_IMAGES = {"aarch64": UBUNTU.format("arm64"), "x86_64": UBUNTU.format("amd64")}
# Seconds for a new machine's first boot, and then for cloud-init, which may install the guest agent.
CREATE_LIMIT = 900.0


class Plan(NamedTuple):
    """The parameters of `base create`; `disk` in bytes, `memory` in MiB, `image` a URL or a path (None: Ubuntu's)."""

    name: str
    image: str | None
    disk: int
    cpus: int
    memory: int
    user: str
    key: str


class Creator:
    """Makes a golden image from a distribution's cloud image, or continues an earlier run that was interrupted.

    Until the end the machine has a temporary name, and `making` in its record.
    """

    def __init__(self, manager: Manager, cache: str, plan: Plan) -> None:
        self._manager, self._utm, self._notes = manager, manager.utm, manager.utm.notes
        self._cache, self._plan = cache, plan
        self._working_name = UNFINISHED + plan.name
        base = os.path.join(cache, plan.name)
        self._disk, self._seed, self._seed_folder = base + ".qcow2", base + ".iso", base + ".seed"

    def create(self) -> VM:
        """Makes the image, or completes an earlier run's. Raises WrongState if another machine has its name."""
        with self._manager.state.lock(self._plan.name, self._manager.settings.lock_limit):
            make_folder(self._cache)
            vm = self._begun() or self._make()
            if vm.name != self._plan.name:
                self._complete(vm)
            return vm

    def done(self, vm: VM) -> None:
        """Records that the machine is complete, and deletes the files that were only needed to make it."""
        vm.remember(name=self._plan.name, making="", never_started=False)
        # A run that was killed may have left it.
        Order(self._manager.state, self._working_name).remove()
        for path in (self._disk, self._seed):
            with contextlib.suppress(OSError):
                os.unlink(path)
        shutil.rmtree(self._seed_folder, ignore_errors=True)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Adds the name of the step to a failure of the block."""
        try:
            yield
        except KodeError as failure:
            failure.message = f"{name}: {failure.message}"
            failure.hint = f"{failure.hint} The next run continues with this step.".lstrip()
            raise

    def _begun(self) -> VM | None:
        """The machine that an earlier run began; None if there is none and both names are free."""
        manager = self._manager
        fleet = manager.fleet()
        for machine in fleet.named(self._plan.name) + fleet.named(self._working_name):
            if machine.record.making:
                return manager.vm(machine)
        Maker.must_be_free(self._plan.name, fleet.rows)
        with manager.fleet_lock():
            made = manager.maker.resume(self._working_name)
        if made:
            return manager.vm_of(made)
        unknown = fleet.named(self._working_name)
        if unknown:
            raise WrongState(f"kodemachine has no record of the machine {unknown[0].name} ({unknown[0].uuid})",
                             "Delete it in UTM, then run the same command again.")
        return None

    def _make(self) -> VM:
        """A new machine with the disk and the seed."""
        architecture = self._architecture()
        with self._step("getting the disk"):
            self._make_disk(self._plan.image or UBUNTU_IMAGES[architecture])
        with self._step("writing the seed"):
            self._make_seed()
        with self._step("making the machine"), self._manager.fleet_lock():
            words = (architecture, str(self._plan.cpus), str(self._plan.memory), self._disk, self._seed)
            row = self._manager.maker.make(self._working_name, self._utm.rows(), words)
            return self._manager.vm_of(row)

    def _complete(self, vm: VM) -> None:
        """Boots and seals the machine if that is still to be done, and gives it its name."""
        if vm.record.making != "sealed" or vm.power is not Power.STOPPED:
            sealer = Sealer(self._manager, vm, self._plan.user, self._plan.key)
            with self._step("booting it for the first time"):
                # The seed makes cloud-init allow the agent to run commands.
                sealer.wake(CREATE_LIMIT, may_change=True)
            with self._step("waiting for cloud-init"):
                self._wait_for_cloud_init(vm)
            with self._step("sealing"):
                sealer.apply()
            vm.remember(making="sealed")
        with self._step("detaching the seed"):
            self._detach_seed(vm)
        with self._step("renaming the machine"):
            self._rename(vm)

    def _architecture(self) -> str:
        """The Mac's architecture, as UTM names it."""
        system = os.uname()
        is_arm = system.machine in ("arm64", "aarch64")
        if system.sysname == "Darwin":
            # Under Rosetta, Python reports x86_64 on an ARM Mac.
            reply = self._utm.call("sysctl", "-n", "hw.optional.arm64", limit=TOOL_LIMIT)
            is_arm = reply.out.strip() == "1"
        return "aarch64" if is_arm else "x86_64"

    def _make_disk(self, image: str) -> None:
        """A copy of the distribution's image, a URL or a path, with a virtual disk of the plan's size."""
        source = os.path.abspath(os.path.expanduser(image))
        if "://" in image:
            # All images share the downloads.
            with self._manager.state.lock("download", DOWNLOAD_LIMIT, what="the cache"):
                source = Downloads(self._utm, self._cache).get(image)
        size = size_text(self._plan.disk)
        self._notes.step(f"growing the disk to {size}")
        part = self._disk + ".part"
        try:
            with explained(source):
                # Opening a named pipe would block.
                if not stat.S_ISREG(os.stat(source).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                with open(source, "rb") as file:
                    parse_qcow2(file.read(QCOW2_HEADER))
            with explained(part):
                shutil.copyfile(source, part)
                grow_qcow2(part, self._plan.disk)
                os.replace(part, self._disk)
        except ValueError as failure:
            raise KodeError(f"{source} cannot be grown to {size}: {failure}",
                            "Choose another --disk or --image.") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    def _make_seed(self) -> None:
        """An ISO image with the seed for cloud-init."""
        for name, text in seed_files(self._plan.name, self._plan.user, self._plan.key).items():
            write_file(os.path.join(self._seed_folder, name), text)
        options = ("-quiet", "-ov", "-iso", "-joliet", "-default-volume-name", "cidata")
        output_of(self._utm.call("hdiutil", "makehybrid", *options, "-o", self._seed, self._seed_folder,
                                 limit=TOOL_LIMIT))

    def _wait_for_cloud_init(self, vm: VM) -> None:
        self._notes.step(f"waiting for cloud-init in {vm.name}")
        code, out, err = vm.run(["/bin/sh", "-c", CLOUD_INIT], limit=CREATE_LIMIT)
        # A line of dots, the status in words, and then the file result.json.
        text, _, result = (out + err).decode("utf-8", "replace").partition("{")
        status = " ".join(text.lstrip(".").split())[:300]
        start_over = f"To start over, delete {vm.name} in UTM."
        if "DataSourceNone" in result:
            raise KodeError(f"cloud-init did not find its seed in {vm.name}, or the guest cannot read an ISO image",
                            start_over)
        if code == 2:
            self._notes.warn(f"cloud-init finished with warnings: {status}")
        elif code:
            raise KodeError(f"cloud-init failed: {status}",
                            f"See /var/log/cloud-init-output.log in the machine. {start_over}")

    def _detach_seed(self, vm: VM) -> None:
        """Removes every drive but the first, and returns when UTM shows that. Raises KodeError."""
        for _ in poll(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
            reply = self._utm.raise_for_refusal(self._utm.script(DETACH, vm.uuid))
            # The answer: the number of drives, and the identifier of the first one before and after.
            if reply.outcome is Outcome.DONE and re.fullmatch(r"1 (\S+) \1\s*", reply.out):
                return
            # An empty answer says nothing.
            if reply.outcome is Outcome.FAILED or (reply.outcome is Outcome.DONE and reply.out.strip()):
                break
        count = reply.out.partition(" ")[0] or "no"
        problem = reply.sentence or f"it has {count} drives"
        raise KodeError(f"UTM did not remove the seed from {vm.name}: {problem}",
                        "Check its drives in UTM, then run the same command again.")

    def _rename(self, vm: VM) -> None:
        """Gives the machine the image's name, and returns when a clean list shows it. Raises KodeError."""
        name = self._plan.name
        self._notes.step(f"renaming {vm.name} to {name}")
        with self._manager.fleet_lock():
            Maker.must_be_free(name, self._utm.rows())
            for _ in poll(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
                reply = self._utm.raise_for_refusal(vm.configure(name=name))
                if Row(vm.uuid, Power.STOPPED, name) in self._utm.rows():
                    vm.name = name
                    return
                if reply.outcome is Outcome.FAILED:
                    break
        raise KodeError(f"UTM did not rename {vm.name} to {name}: {reply.sentence}",
                        "Rename it in UTM, then run the same command again.")
# ---- doctor

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"

# One result of a check: its level, message and remedy; and a check, which is a method of Doctor.
Result = tuple[str, str, str]
Checker = Callable[[Any], Iterable[Result]]


class Finding(NamedTuple):
    """One result, with the name of its check. The fields are the keys of `doctor --json`, in this order."""

    check: str
    level: str
    message: str
    remedy: str


class Check(NamedTuple):
    """One check. `needs`: the checks that must work before it. `passed`: its message if `run` yields no result."""

    name: str
    needs: Sequence[str]
    passed: str
    run: Checker


# All checks, in the order of the methods of Doctor: a cause comes before its consequences.
CHECKS: list[Check] = []


def doctor_check(name: str, needs: str = "", passed: str = "") -> Callable[[Checker], Checker]:
    """Adds a method of Doctor to the table of checks. `needs`: names of earlier checks, separated by spaces."""
    def add(run: Checker) -> Checker:
        CHECKS.append(Check(name, needs.split(), passed, run))
        return run
    return add


# Versions of UTM, from and to, and the trouble with each (contract: version landmarks, 7, 9.20, 9.23).
# `utmctl attach` and `exec` differ between versions, too, but kodemachine uses neither.
VERSIONS = (
    ((0,), (4, 6, 4), ERROR, "is too old; kodemachine needs 4.6.5 or newer"),
    ((4, 6, 5), (4, 7, 0), WARNING, "replaces a machine's displays whenever its MAC address is changed"),
    ((4, 7, 1), (4, 7, 1), OK, "has no setting that gives clones their own MAC addresses; kodemachine does that"),
    ((4, 7, 2), (4, 7, 2), ERROR, "has broken scripting"),
)
NEWEST_KNOWN = (5, 0, 9)


def judge_version(version: str) -> Result:
    """The result for a version of UTM, such as "5.0.9"; empty if it is unknown."""
    update = "Update UTM in the App Store, or: brew upgrade --cask utm"
    number = tuple(map(int, re.findall(r"\d{1,6}", version)[:3]))
    if not number:
        return WARNING, "UTM does not report its version: it is older than 4.7.2, or does not answer", update
    for first, last, level, trouble in VERSIONS:
        if first <= number <= last:
            remedy = "" if level == OK else update
            return level, f"UTM {version} {trouble}", remedy
    if number > NEWEST_KNOWN:
        newest = ".".join(map(str, NEWEST_KNOWN))
        return OK, f"UTM {version} is newer than the newest one that this kodemachine knows ({newest})", ""
    return OK, f"UTM {version}", ""


def identity_problems(path: str) -> Iterator[Result]:
    """Judges `identity_file`: the private key, or only the public key if an ssh agent has the private one."""
    public = path.removesuffix(".pub") + ".pub"
    if path != public and os.path.exists(path):
        if os.stat(path).st_mode & 0o077:
            yield ERROR, f"ssh ignores {path}, because others may read it", f"chmod 600 {shlex.quote(path)}"
    elif os.path.exists(public):
        yield OK, f"{public} exists; the ssh agent must have its private key", ""
    else:
        yield ERROR, f"identity_file {path} does not exist", f"ssh-keygen -t ed25519 -f {shlex.quote(path)}"


def grouped(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """The second members of the pairs, by the first: for example, the machines that have a MAC address."""
    groups: dict[str, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def half_written_files(folder: str) -> Iterator[str]:
    """The temporary files that interrupted runs have left in a folder. One younger than 60 s may still be written."""
    entries = os.listdir(folder) if os.path.isdir(folder) else []
    for entry in sorted(entries):
        path = os.path.join(folder, entry)
        with contextlib.suppress(FileNotFoundError):
            if entry.endswith(".new") and time.time() - os.stat(path).st_mtime > 60.0:
                yield path


# Free bytes below which the check `space` warns, or fails.
SPACE_LOW, SPACE_OUT = 10 << 30, 1 << 30


class Doctor:
    """Checks the host, UTM, the image and the machines, and changes nothing."""

    def __init__(self, manager: Manager) -> None:
        self._manager, self._settings = manager, manager.settings
        self._utm, self._state = manager.utm, manager.state
        # For each check that did not work: the failed check that is the cause.
        self._failed: dict[str, str] = {}
        self._fleet = Fleet(Rows([]), {}, manager.settings)
        self._no_fleet: KodeError | None = None
        # By UUID, as far as UTM has reported it.
        self._hardware: dict[str, Hardware] = {}
        # The running clones, by their likeliest address.
        self._running: dict[str, list[Facts]] = {}

    def findings(self) -> Iterator[Finding]:
        """Runs all checks. One that raises KodeError or OSError has failed, and those that need it are skipped."""
        for check in CHECKS:
            for result in self._results(check):
                yield Finding(check.name, *result)

    def _results(self, check: Check) -> list[Result]:
        cause = next((self._failed[need] for need in check.needs if need in self._failed), "")
        if cause:
            self._failed[check.name] = cause
            return [(SKIPPED, f"not checked, because {cause} failed", "")]
        try:
            return list(check.run(self)) or [(OK, check.passed, "")]
        except KodeError as failure:
            message, remedy = failure.message, failure.hint
        except OSError as failure:
            message = f"{failure.filename or 'the system'}: {failure.strerror}"
            remedy = "Fix that, then run again: kodemachine doctor"
        self._failed[check.name] = check.name
        return [(ERROR, message, remedy)]

    @doctor_check("user", passed="not run as root")
    def _user(self) -> Iterable[Result]:
        """UTM does not answer Apple Events of root (contract 9.2)."""
        if os.uname().sysname == "Darwin" and os.geteuid() == 0:
            yield (ERROR, "kodemachine runs as root, and UTM does not answer root (-600)",
                   "Run kodemachine without sudo.")

    @doctor_check("utmctl")
    def _utmctl(self) -> Iterable[Result]:
        yield OK, self._utm.path(), ""

    @doctor_check("version", needs="utmctl")
    def _version(self) -> Iterable[Result]:
        version = self._utm.version()
        if not version:
            reply = self._utm.call("version")
            version = reply.out.strip() if reply.outcome is Outcome.DONE else ""
        yield judge_version(version)

    @doctor_check("automation", needs="utmctl", passed="macOS lets this terminal control UTM")
    def _automation(self) -> Iterable[Result]:
        """Reads the machines, once for all checks. A failure other than NotPermitted is reported by the check `utm`."""
        try:
            self._fleet = self._manager.fleet(partial=True)
        except NotPermitted:
            raise
        except KodeError as failure:
            self._no_fleet = failure
            yield SKIPPED, "unknown, because the list of machines cannot be read", ""

    @doctor_check("utm", needs="utmctl automation")
    def _list(self) -> Iterable[Result]:
        if self._no_fleet:
            raise self._no_fleet
        if self._fleet.broken:
            yield ERROR, f"UTM's list has a row that cannot be read: {self._fleet.broken!r}", LINE_BREAK
        yield OK, f"machines: {len(self._fleet.machines)}, clones: {len(self._fleet.clones)}", ""

    @doctor_check("osascript", needs="utm", passed="macOS lets osascript control UTM")
    def _osascript(self) -> Iterable[Result]:
        """Reads the MAC addresses and drives of all machines. While UTM starts, it reports none (contract 4)."""
        for _ in poll(WARM_UP, self._utm.notes.tick, 0.3, 3.0):
            reply = self._utm.script(HARDWARE)
            if reply.outcome is Outcome.REFUSED:
                raise KodeError("macOS does not permit osascript to control UTM (-1743), "
                                "so no new machine can be started", NOT_ALLOWED)
            found = parse_hardware(reply.out)
            self._hardware = {uuid: hardware for uuid, hardware in found.items() if hardware.known}
            problem = reply.sentence or reply.outcome.value
            if reply.outcome is Outcome.DONE:
                if found or not self._fleet.machines:
                    return []
                problem = "its answer has no machine"
            elif reply.outcome is Outcome.FAILED:
                break
        raise KodeError(f"osascript cannot read UTM's machines: {problem}",
                        "Check UTM's window, then run again: kodemachine doctor")

    @doctor_check("image", needs="utm")
    def _image(self) -> Iterable[Result]:
        yield OK, f"{self._fleet.image(None).name} exists and is stopped", ""

    @doctor_check("devices", needs="osascript image", passed="the image is headless, has a serial port, and uses QEMU")
    def _devices(self) -> Iterable[Result]:
        image = self._fleet.image(None)
        reply = self._utm.script(DEVICES, image.uuid)
        if reply.outcome is not Outcome.DONE or not reply.out.startswith("backend "):
            problem = reply.sentence or reply.outcome.value
            yield (WARNING, f"UTM does not report the devices of {image.name}: {problem}",
                   "Check in its settings in UTM that it has no display, and a serial device in mode Pseudo-TTY.")
            return
        devices = reply.out.split("\n")
        if "backend qemu" not in devices:
            yield (ERROR, f"{image.name} does not use the QEMU backend, so it has no guest agent",
                   "Create the image again, without 'Use Apple Virtualization'.")
        if "displays 0" not in devices or "serial window" in devices:
            yield (WARNING,
                   f"{image.name} is not headless: a window opens at each start, and closing it stops the machine",
                   "In its settings in UTM, remove the display, and any serial device in mode Built-in Terminal.")
        if "serial ptty" not in devices and "serial tcp" not in devices:
            yield (WARNING, f"{image.name} has no serial port, so `kodemachine attach` cannot reach its clones",
                   "In its settings in UTM, add a serial device in mode Pseudo-TTY.")

    @doctor_check("ssh-key", passed="there is a key for ssh")
    def _ssh_key(self) -> Iterable[Result]:
        if self._settings.identity_file:
            return identity_problems(self._settings.identity_file)
        folder = os.path.expanduser("~/.ssh")
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            return [(ERROR, f"{folder} cannot be read, and ssh needs it", access_hint(folder))]
        paths = [os.path.join(folder, f"id_{kind}") for kind in KEY_KINDS]
        # The exit status of ssh-add is 1 for an agent without keys, and 2 without an agent (ssh-add(1)).
        if any(map(os.path.exists, paths)) or self._utm.call("ssh-add", "-l").outcome is Outcome.DONE:
            return []
        return [(WARNING, "there is no key in ~/.ssh or in an ssh agent, but ssh's configuration may name another one",
                 "To create a key, before you seal or create an image: ssh-keygen -t ed25519")]

    @doctor_check("ssh-names", passed="ssh reaches machines by name")
    def _ssh_names(self) -> Iterable[Result]:
        """Whether ssh uses the whole stanza of `ssh-config`, if any of it."""
        overruled = self._manager.ssh.overruled()
        if any(line.startswith("proxycommand ") for line in overruled):
            yield OK, "ssh does not know machines by name; to change that: kodemachine ssh-config --install", ""
        elif overruled:
            yield (WARNING, f"for machines by name, ssh uses: {', '.join(overruled)}",
                   "To put kodemachine's own values first: kodemachine ssh-config --install")

    @doctor_check("shell", needs="ssh-names", passed="the login shell prints nothing when ssh starts it")
    def _shell(self) -> Iterable[Result]:
        remedy = self._manager.ssh.start_up_noise()
        if remedy:
            yield WARNING, f"ssh, git and editors cannot connect by name: {NOISE}", remedy

    @doctor_check("names", needs="utm", passed="no two machines share a name")
    def _names(self) -> Iterable[Result]:
        """Names are compared without case, as UTM's folders are."""
        uuids = grouped((machine.name.lower(), machine.uuid) for machine in self._fleet.machines)
        for name in sorted({machine.name.lower() for machine in self._ours()}):
            if len(uuids[name]) > 1:
                yield (ERROR, f"{len(uuids[name])} machines are named {name}: {', '.join(uuids[name])}",
                       "Rename or delete one of them in UTM.")

    def _ours(self) -> list[Machine]:
        return [*self._fleet.images, *self._fleet.clones]

    @doctor_check("macs", needs="utm osascript", passed="no two machines share a MAC address")
    def _mac_addresses(self) -> Iterable[Result]:
        for mac, machines in grouped(self._kept_macs()).items():
            if len(machines) < 2 or not any(machine.label for machine in machines):
                continue
            names = " and ".join(machine.name for machine in machines)
            running = [machine for machine in machines if machine.power is not Power.STOPPED]
            level = ERROR if len(running) > 1 else WARNING
            yield (level, f"{names} share the MAC address {mac}",
                   "Stop one of them, then open its settings in UTM: Network > MAC Address > Random.")

    def _kept_macs(self) -> Iterator[tuple[str, Machine]]:
        """The addresses that machines keep: an image is never started, and a clone's first start gives it a new one."""
        for machine in self._fleet.machines:
            is_new = machine.label and machine.power is Power.STOPPED and not machine.record.mac_is_unique
            if machine.uuid in self._hardware and not machine.is_image and not is_new:
                for mac in set(self._hardware[machine.uuid].macs) - {"?"}:
                    yield mac, machine

    @doctor_check("offline", needs="utm osascript", passed="no offline machine has a route out of the Mac")
    def _offline(self) -> Iterable[Result]:
        for machine in self._fleet.clones:
            hardware = self._hardware.get(machine.uuid, Hardware([], []))
            if machine.record.network == "offline" and hardware.is_online:
                yield (ERROR, f"{machine.name} is recorded as offline, and has a route out of the Mac",
                       "Stop it, then set the mode of its network interfaces in UTM to Host Only.")

    @doctor_check("host-keys", needs="utm", passed="no two clones are known to share a host key")
    def _host_keys(self) -> Iterable[Result]:
        names = dict.fromkeys(machine.name for machine in self._fleet.clones)
        keys = [(key, name) for name in names for key in self._state.pinned(name)]
        return self._unsealed(keys, "share a host key, so each can pass for the other")

    @doctor_check("machine-ids", needs="utm", passed="no two clones are known to share a machine-id")
    def _machine_ids(self) -> Iterable[Result]:
        ids = [(machine.record.machine_id, machine.name) for machine in self._fleet.clones if machine.record.machine_id]
        return self._unsealed(ids, "share a machine-id, so they may get the same IP address")

    @staticmethod
    def _unsealed(pairs: Iterable[tuple[str, str]], problem: str) -> Iterator[Result]:
        """Machines have something in common only if their image was not sealed. `pairs`: a value, a machine's name."""
        groups = [" and ".join(names) for names in grouped(pairs).values() if len(names) > 1]
        for group in dict.fromkeys(groups):
            yield (WARNING, f"{group} {problem}",
                   "Seal an image: kodemachine base seal LABEL --as vX.Y.Z; then replace each of these machines: "
                   "kodemachine start LABEL --fresh")

    @doctor_check("addresses", needs="utm", passed="no two running clones share an IP address")
    def _addresses(self) -> Iterable[Result]:
        facts = self._manager.describe(self._started_clones())
        # A container bridge, of rank 2, has the same address in every guest.
        self._running = grouped((own.ip, own) for own in facts if own.ip and address_rank(own.ip) != 2)
        for address, holders in self._running.items():
            if len(holders) > 1:
                names = " and ".join(facts.name for facts in holders)
                if is_emulated([address]):
                    yield ERROR, f"{names} share the IP address {address}", EMULATED_VLAN
                    continue
                yield (ERROR, f"{names} share the IP address {address}: they have the same machine-id or MAC address",
                       f"Replace one of them: kodemachine start {holders[-1].label} --fresh")

    def _started_clones(self) -> list[Machine]:
        return [machine for machine in self._fleet.clones if machine.power is Power.STARTED]

    @doctor_check("copies", needs="utm", passed="no machine is an incomplete copy")
    def _copies(self) -> Iterable[Result]:
        """Incomplete copies have small drives (contract 10.12, 10.13), or the temporary name that UTM gives them."""
        names = [machine.name for machine in self._ours()]
        is_cloning = self._state.locked("fleet")
        for machine in self._fleet.machines:
            title = f"{machine.name} ({machine.uuid})"
            # UTM first names a copy like its original, with a number (contract 3).
            original, _, number = machine.name.rpartition(" ")
            missing = self._missing_part(machine, original)
            if missing:
                yield (ERROR, f"{title} is an incomplete copy: {missing}",
                       f"Delete it: {shlex.quote(self._utm.path())} delete {machine.uuid}")
            elif original in names and number.isdigit() and not is_cloning:
                yield (WARNING, f"{title} was left by an interrupted clone",
                       "Run the interrupted command again to complete it, or delete the machine in UTM.")

    def _missing_part(self, machine: Machine, original: str) -> str:
        """The part that a machine lacks of its recorded original, or of one with its name or the name `original`."""
        originals = [machine.record.copy_of]
        for other in self._ours():
            if other.name in (machine.name, original) and other.uuid != machine.uuid:
                originals.append(other.uuid)
        for uuid in originals:
            if machine.uuid in self._hardware and uuid in self._hardware:
                missing = missing_part(self._hardware[machine.uuid], self._hardware[uuid])
                if missing:
                    return missing
        return ""

    @doctor_check("space")
    def _space(self) -> Iterable[Result]:
        free = free_space(self._settings.documents or os.path.expanduser("~"))
        if free is None:
            yield WARNING, "the free space of the disk is unknown", "Check it: df -h"
        elif free < SPACE_LOW:
            level = ERROR if free < SPACE_OUT else WARNING
            yield (level, f"only {size_text(free)} of disk space is free",
                   "To see which machines could be deleted: kodemachine purge --dry-run")
        else:
            yield OK, f"{size_text(free)} of disk space is free", ""

    @doctor_check("sizes", needs="utm", passed="UTM's data can be read")
    def _sizes(self) -> Iterable[Result]:
        """macOS 14 and newer ask whether a program may read another program's container (contract 6)."""
        folder, machines = self._manager.documents, self._fleet.machines
        if machines and not read_bundles(folder, machines, DISK_LIMIT, self._utm.notes.tick):
            yield (WARNING, f"UTM's data in {folder} cannot be read, so MEMORY, SIZE and RECLAIM stay empty",
                   "Allow it when macOS asks, or give the terminal Full Disk Access, which is permanent. "
                   "If UTM's machines are in another folder: kodemachine config set documents PATH")

    @doctor_check("leftovers", needs="utm", passed="the state folder is in order")
    def _leftovers(self) -> Iterable[Result]:
        listed = {machine.uuid for machine in self._fleet.machines}
        missing = set(self._state.records()) - listed
        if self._state.trouble:
            yield (ERROR, self._state.trouble,
                   "Move it away. No machine is lost, only what kodemachine remembers of them.")
        # An empty list may only mean that UTM has no window yet (contract 4).
        if listed and missing:
            yield (WARNING, f"remembered machines that no longer exist: {len(missing)}",
                   "To forget them (it asks before it deletes a machine): kodemachine purge")
        yield from self._interrupted_orders()
        for folder in (self._state.folder, self._state.path("intents")):
            for path in half_written_files(folder):
                yield WARNING, f"{path} is an incomplete file of an interrupted run", f"rm {shlex.quote(path)}"

    def _interrupted_orders(self) -> Iterator[Result]:
        for name in self._state.orders():
            order = Order(self._state, name)
            if order.is_alive() or self._state.locked(name.removeprefix(UNFINISHED)):
                continue
            remedy = f"rm {shlex.quote(order.path)}"
            command = self._command_to_complete(name, order.load() or {})
            if command:
                remedy = f"To complete it: {command}"
            yield WARNING, f"the creation of {name} was interrupted", remedy

    def _command_to_complete(self, name: str, order: dict[str, Any]) -> str:
        """The command that makes the machine of an order; empty if no command makes a machine of that name."""
        version = name.removeprefix(UNFINISHED).removeprefix("kodeimage-")
        if name.startswith(UNFINISHED):
            return f"kodemachine base create {version}"
        if IMAGE.fullmatch(name):
            sealed = order.get("base", "VM")
            return f"kodemachine base seal {shlex.quote(sealed)} --as {version}"
        if label_in(name, self._settings.prefix):
            return self._manager.order_command(name, order)
        return ""

    @doctor_check("network", needs="utm")
    def _network(self) -> Iterable[Result]:
        """Only a connection shows whether macOS 15 and newer permit access to the guests (Apple's TN3179)."""
        silent = self._started_clones()
        if self._running:
            yield self._probe()
        elif silent:
            names = ", ".join(machine.name for machine in silent)
            yield (WARNING, f"no guest agent reports an IP address (running: {names})",
                   f"Check on the console that qemu-guest-agent runs: kodemachine attach {silent[0].label}")
        else:
            yield OK, "no clone is running, so the network was not tested", ""

    def _probe(self) -> Result:
        """Connects to the ssh servers of the running clones, all at once."""
        silent = list(self._running)
        prober = Prober(self._settings.ssh_port)
        prober.aim(silent)
        deadline = time.monotonic() + GREETING
        while silent and time.monotonic() < deadline:
            winner = prober.step(0.05)
            if winner:
                silent.remove(winner)
                prober.aim(silent)
        has_no_route = prober.unreachable
        prober.close()
        if not silent:
            return OK, f"the ssh servers of {counted(len(self._running), 'running clone')} answer", ""
        if is_emulated(silent):
            return ERROR, f"no ssh server answers at {', '.join(silent)}", EMULATED_VLAN
        if has_no_route and local_network_rules():
            return ERROR, "macOS blocks connections to the guests (no route to host)", LOCAL_NETWORK
        label = self._running[silent[0]][0].label
        return (WARNING, f"no ssh server answers at {', '.join(silent)}",
                f"Check it: kodemachine exec {label} -- systemctl status ssh")


# ---- serial console

OLD_DEVICE = "UTM may still report the device of an earlier run. Stop the machine and start it again."


@contextlib.contextmanager
def raw_terminal(handle: int) -> Iterator[None]:
    """Sets the terminal `handle` to raw mode, and restores it afterwards. Does nothing if it is not a terminal."""
    if not os.isatty(handle):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(handle)
    try:
        tty.setraw(handle)
        yield
    finally:
        # The terminal may be closed by now. TCSAFLUSH discards half-typed keys, which must not reach the shell.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(handle, termios.TCSAFLUSH, before)


def open_tcp_port(port: str) -> int:
    """Connects to a serial port at host:port within 5 s, and returns its handle. Raises KodeError."""
    import socket

    host, _, number = port.rpartition(":")
    try:
        address = (host.strip("[]"), int(number))
        with socket.create_connection(address, timeout=5) as connection:
            connection.setblocking(False)
            return os.dup(connection.fileno())
    except (OSError, ValueError, OverflowError) as failure:
        raise KodeError(f"cannot connect to the serial port at {port}: {failure}",
                        "Is another program connected to it? A TCP port accepts one at a time.") from None


def open_line(port: str) -> int:
    """Opens a serial port, the user's device or host:port, without blocking; returns its handle. Raises KodeError."""
    if not port.startswith("/"):
        return open_tcp_port(port)
    import termios
    import tty

    try:
        line = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as failure:
        raise KodeError(f"cannot open the serial port {port}: {failure.strerror}", OLD_DEVICE) from None
    status = os.fstat(line)
    if not stat.S_ISCHR(status.st_mode) or status.st_uid != os.geteuid():
        os.close(line)
        raise KodeError(f"{port} is not a serial port of yours and was not used", OLD_DEVICE)
    # Without raw mode the line would echo its input. TCSANOW keeps the output that is already waiting.
    with contextlib.suppress(termios.error):
        tty.setraw(line, termios.TCSANOW)
    return line


class Outlet:
    """A handle that bytes are written to, at most `piece` at once, and the bytes that wait for it."""

    def __init__(self, handle: int, piece: int) -> None:
        self.handle, self._piece = handle, piece
        self.waiting = bytearray()

    def write(self) -> bool:
        """Writes as many of the waiting bytes as the handle takes. False: nobody reads them any more."""
        try:
            written = os.write(self.handle, self.waiting[:self._piece])
        except BlockingIOError:
            return True
        except OSError:
            return False
        del self.waiting[:written]
        return True

    def drain(self) -> None:
        """Writes all waiting bytes, but gives up after a second, or when nobody reads them any more."""
        deadline = time.monotonic() + 1.0
        while self.waiting and time.monotonic() < deadline:
            _, is_ready, _ = select.select([], [self.handle], [], 0.1)
            if is_ready and not self.write():
                return


# A key in kitty's keyboard protocol (sw.kovidgoyal.net/kitty/keyboard-protocol).
KEY_EVENT = re.compile(rb"\x1b\[(?P<code>\d+)(?::(?P<shifted>\d*))?(?::(?P<base>\d*))?"
                       rb"(?:;(?P<modifiers>\d*)(?::(?P<event>\d*))?(?:;(?P<text>\d*)[\d:]*)?)?u")
SHIFT, CTRL, LOCKS = 1, 4, 64 + 128
# The keys that send a control byte together with Ctrl, besides the one that it is named after.
CONTROL_ALIASES = {0: " 2", 27: "3", 28: "4", 29: "5", 30: "6~", 31: "7/-"}


def is_key(sequence: bytes, key: int) -> bool:
    """Whether an escape sequence is a press of the key that sends the byte `key` in a plain terminal.

    kitty's keyboard protocol has CSI code:shifted:base ; modifiers:event ; text u. xterm's modifyOtherKeys has
    CSI 27 ; modifiers ; code ~, or the same as kitty. The modifiers are 1 + a bit for each; event 3 is a release.
    """
    match = KEY_EVENT.fullmatch(re.sub(rb"\[27;(\d+);(\d+)~\Z", rb"[\2;\1u", sequence))
    if not match or match["event"] == b"3":
        return False
    pressed = int(match["modifiers"] or 1) - 1
    if key < 32:
        # As in a plain terminal, other modifiers than Ctrl make no difference.
        names = chr(key + 64) + chr(key + 64).lower() + CONTROL_ALIASES.get(key, "")
        codes = {int(match[part] or 0) for part in ("code", "shifted", "base")}
        return bool(pressed & CTRL) and not codes.isdisjoint(map(ord, names))
    typed = int(match["text"] or match["shifted"] or match["code"])
    if pressed & SHIFT and ord("a") <= typed <= ord("z"):
        typed -= 32
    return typed == key and not pressed & ~(SHIFT | LOCKS)


class SerialRelay:
    """A relay between a person (or a pipe) and a serial line: raw, 8-bit clean, with back-pressure both ways."""

    CHUNK = 1 << 16     # bytes that are read at once
    FULL = 1 << 18      # bytes that may wait

    def __init__(self, line: int, source: int, sink: int, escape: bytes, log: int | None) -> None:
        """Relays `source` to `line`, and `line` to `sink` and `log`. The key `escape` ends it; without one: b""."""
        self._line, self._source = line, source
        self._escape, self._log = escape, log
        # An escape sequence, the escape key, or the beginning of a sequence at the end of what was read.
        self._keys = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|%b|(?P<begun>\x1b(?:\[[0-?]{0,60})?\Z)" % re.escape(escape))
        self._begun = b""
        # A terminal that was closed is not one any more.
        self._is_person, self._source_ended = os.isatty(source), False
        self._opened: int | None = None
        self._to_line = Outlet(line, self.CHUNK)
        # A pipe that is ready for writing takes this many bytes without blocking.
        self._to_sink = Outlet(sink, select.PIPE_BUF)
        if os.isatty(sink):
            # The shell shares `sink`. It is opened a second time, so that O_NONBLOCK does not affect the shell.
            with contextlib.suppress(OSError):
                self._opened = os.open(os.ttyname(sink), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                self._to_sink = Outlet(self._opened, self.CHUNK)

    def close(self) -> None:
        """Closes the handle that the relay has opened itself. The caller closes the line."""
        if self._opened is not None:
            os.close(self._opened)

    def relay(self, deadline: float | None, at_end: Callable[[], None] | None = None) -> str:
        """Relays until one side ends, and returns the reason: `escape`, `closed` (the line), `reader` or `timeout`.

        `deadline` is in seconds of time.monotonic(). `at_end` is called once, when the source has ended and the
        line has taken all its bytes.
        """
        while True:
            left = None
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
            writers = [outlet.handle for outlet in (self._to_line, self._to_sink) if outlet.waiting]
            readable, writable, _ = select.select(self._readers(), writers, [], left)
            reason = self._transfer(readable, writable)
            if reason:
                return reason
            if at_end and self._source_ended and not self._to_line.waiting:
                at_end()
                at_end = None
            if left == 0:
                self._to_sink.drain()
                return "timeout"

    def _readers(self) -> list[int]:
        """The handles to read from. A side whose bytes cannot be passed on has to wait."""
        readers = []
        if len(self._to_sink.waiting) < self.FULL:
            readers.append(self._line)
        if not self._source_ended and len(self._to_line.waiting) < self.FULL:
            readers.append(self._source)
        return readers

    def _transfer(self, readable: Sequence[int], writable: Sequence[int]) -> str:
        """Reads from and writes to the sides that are ready. Returns the reason for an end, or ""."""
        reason = ""
        if self._line in readable:
            reason = self._read_line()
        if not reason and self._source in readable:
            reason = self._read_source()
        if reason:
            return reason
        if self._to_line.handle in writable and not self._to_line.write():
            return "closed"
        if self._to_sink.handle in writable and not self._to_sink.write():
            return "reader"
        return ""

    def _read_line(self) -> str:
        data = self._read(self._line)
        if data == b"":
            self._to_sink.drain()
            return "closed"
        if data:
            self._to_sink.waiting += data
            if self._log is not None:
                os.write(self._log, data)
        return ""

    def _read_source(self) -> str:
        data = self._read(self._source)
        if data == b"":
            self._source_ended = True
            # The end of a pipe is only the end of its input. A terminal that ends was closed.
            return "reader" if self._is_person else ""
        keys = data or b""
        end = self.before_escape(keys)
        self._to_line.waiting += keys[:end]
        if end is not None:
            self._to_line.drain()
            return "escape"
        return ""

    def before_escape(self, data: bytes) -> int | None:
        """How many of the bytes come before the escape key; None without it.

        The key is found in each form that a terminal can send. To turn these forms off would not help: a program in
        the guest turns them on through this very line, and needs them. Nothing is held back from the guest, whose
        programs wait for what follows a lone ESC. So of a sequence that arrives in two parts, the guest gets the first.
        """
        if not self._escape:
            return None
        text, earlier = self._begun + data, len(self._begun)
        self._begun = b""
        for match in self._keys.finditer(text):
            if match[0] == self._escape or is_key(match[0], self._escape[0]):
                return max(0, match.start() - earlier)
            self._begun = match["begun"] or b""
        return None

    def _read(self, handle: int) -> bytes | None:
        """Bytes from a handle; b"" at its end; None if there was nothing to read after all."""
        try:
            return os.read(handle, self.CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            # A pty reports EIO when its other side is closed.
            return b""


def escape_byte(text: str) -> bytes:
    """The byte of the key `ctrl-]`, `^]`, or a single character; b"" for `none`. Raises UsageError."""
    if text == "none":
        return b""
    control = re.fullmatch(r"(?:ctrl-|\^)([a-z@\[\]\\^_])", text.lower())
    if control:
        return bytes([ord(control.group(1).upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise UsageError(f"{text!r} is not an escape key", "For example: --escape ctrl-a, or --escape none")
# ---- terminal output


def display_width(text: str) -> int:
    """Columns of a terminal that a text occupies."""
    if text.isascii():
        return len(text)
    import unicodedata

    # A combining character is drawn over the one before it.
    shown = [c for c in text if not unicodedata.combining(c)]
    wide = [c for c in shown if unicodedata.east_asian_width(c) in ("W", "F")]
    return len(shown) + len(wide)


def truncate(text: str, width: int) -> str:
    """The longest beginning of a text that fits into `width` columns of a terminal."""
    while text and display_width(text) > width:
        text = text[:-1]
    return text


Column = Sequence[str]


def table_width(columns: Sequence[Column]) -> int:
    """Columns of a terminal that a table occupies."""
    return sum(max(map(display_width, column)) for column in columns) + 2 * (len(columns) - 1)


def fitting(columns: Sequence[Column], width: int | None, expendable: Sequence[str]) -> list[Column]:
    """The columns of a table that remain if it must be at most `width` wide (None: all). The first cell is the heading.

    Expendable columns are removed until the table fits: first those without any value, then the others, both in the
    order of `expendable`.
    """
    kept = list(columns)
    empty = {name for name, *cells in columns if set(cells) <= {"-"}}
    for candidate in sorted(expendable, key=lambda name: name not in empty):
        if width is None or table_width(kept) <= width:
            break
        kept = [column for column in kept if column[0] != candidate]
    return kept


def table(columns: Sequence[Column], paint: Callable[[str, str], str] = lambda heading, cell: cell) -> str:
    """Lines with aligned columns, each of which begins with its heading. `paint` may add colours to a cell."""
    widths = [max(map(display_width, column)) for column in columns]
    lines = []
    for row in zip(*columns):
        cells = []
        for column, cell, width in zip(columns, row, widths):
            cells.append(paint(column[0], cell) + " " * (width - display_width(cell)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def wrapped(text: str, columns: int, first: str, later: str) -> list[str]:
    """The lines of a text, broken between words. `first` and `later`: indentation of the first line and the others."""
    import textwrap

    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=later,
                         break_long_words=False, break_on_hyphens=False)


# A command that a message offers: the whole message, or from a colon up to "; " and the next offer. (Not a usage.)
PASTED = (r"kodemachine|brew|chmod|df|echo|Include|ls|perl|ps|rm|semanage|ssh|ssh-keygen|stty|sudo|systemctl|tccutil|"
          r"tmutil|'?/[^:]*utmctl'?")
TO_PASTE = re.compile(rf"(?:^|(?<=: ))(?:{PASTED}) (?!\[).*?(?=; [a-z][^:;]*: kodemachine |$)")


def laid_out(text: str, columns: int | None, first: str, later: str, bold: Callable[[str], str]) -> str:
    """A message, wrapped for a terminal (None: not for one). `first` and `later`: indentation.

    A command in it is bold. It is never broken, because it is pasted: if the message does not fit into one line, each
    command has a line of its own.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if columns is None or display_width(first + line) <= columns:
            lines.append(first + TO_PASTE.sub(lambda match: bold(match.group()), line))
            continue
        begin, indent = 0, first
        for command in TO_PASTE.finditer(line):
            lines += wrapped(line[begin:command.start()].lstrip("; "), columns, indent, later)
            lines.append((later + "  " if command.start() else first) + bold(command.group()))
            begin, indent = command.end(), later
        lines += wrapped(line[begin:], columns, indent, later)
    return "\n".join(lines)


def fitted_help(text: str, columns: int | None) -> str:
    """A text in which some lines have two columns, such as a help, wrapped for a terminal (None: not for one)."""
    lines: list[str] = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        row = re.match(r"( *\S.*?  +)(\S.*)", line)
        # Newer versions of argparse colour lines that they have wrapped themselves.
        if columns is None or display_width(line) <= columns or "\x1b" in line:
            lines.append(line)
        elif row and columns - len(row[1]) >= 24:
            lines += wrapped(line, columns, "", " " * len(row[1]))
        elif row:
            lines += [row[1].rstrip(), *wrapped(row[2], columns, indent + "    ", indent + "    ")]
        else:
            lines.append(laid_out(line.lstrip(), columns, indent, indent + "  ", str))
    return "\n".join(lines)


def discard_output(handle: int) -> None:
    """Sends everything that is written to `handle` from now on to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)


def terminal_columns(handle: int) -> int | None:
    """Columns of a terminal; None if `handle` is not one, or one whose size was never set."""
    try:
        return os.get_terminal_size(handle).columns or None
    except OSError:
        return None


# Not yellow and cyan, which are too light on a white background, nor blue, which is too dark on a black one.
BOLD, DIM, RED, GREEN, MAGENTA = 1, 2, 31, 32, 35


class LiveLine:
    """A line that shows the current step until its end: of one of several machines, or of the whole command."""

    def __init__(self, label: str, text: str) -> None:
        """`label`: the machine, with blanks up to the width of all labels; "" for the whole command."""
        self.label, self.progress = label, ""
        self._began = time.monotonic()
        self.change(text)

    def clock(self) -> str:
        """The progress and the seconds since the beginning, for the end of a line. Empty in the first second."""
        elapsed = time.monotonic() - self._began
        if elapsed < 0.95:
            return ""
        return f"  {self.progress}{elapsed:.0f} s"

    def change(self, text: str) -> None:
        """The next step. The machine is at the beginning of the line already, so its name is removed from the end."""
        if self.label:
            name = re.escape(self.label.rstrip())
            text = self.label + "  " + re.sub(rf"( to| on| of| with)? (\S*-)?{name}$", "", text)
        self._text = text

    def shown(self, columns: int | None = None) -> str:
        """The line, cut to fit into `columns` together with its clock."""
        text, clock = self._text, self.clock()
        if columns is not None:
            text = truncate(text, columns - display_width(clock))
        return text + clock


class Terminal(Notes):
    """Results on stdout, the rest on stderr, all made printable here.

    A terminal shows live lines below everything else: one for the current step, or one for each of several machines.
    """

    REPAINT_AFTER = 0.5     # seconds

    def __init__(self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> None:
        """`quiet`: no progress and no notes. `verbose`: shows external calls. `as_json`: errors are JSON objects."""
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self._is_terminal = sys.stderr.isatty()
        can_paint = os.environ.get("TERM", "dumb") != "dumb"
        has_colour = can_paint and not os.environ.get("NO_COLOR")
        # By the handles of stdout and stderr.
        self._has_colour = {1: has_colour and sys.stdout.isatty(), 2: has_colour and self._is_terminal}
        self.is_live = can_paint and self._is_terminal
        # Several machines are worked on by several threads, each of which has its own line.
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._live: list[LiveLine] = []
        # The widths of the lines on the screen, and when they were painted.
        self._widths: list[int] = []
        self._painted = 0.0

    def styled(self, text: str, code: int, handle: int = 1) -> str:
        """A text in a colour, if the terminal at that handle shows any."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colour[handle] else text

    def step(self, text: str) -> None:
        """A step begins: the live line changes, or a new one begins; without a terminal it is one ordinary line."""
        text = printable(text)
        with self._lock:
            own = self._own_line()
            if own:
                own.change(text)
                self._paint()
            elif self.is_live and not self.quiet:
                self.end_step()
                self._live.append(LiveLine("", text))
                self._paint()
            elif not self.quiet:
                self._write_line(text)

    def _own_line(self) -> LiveLine | None:
        """The live line of this thread's machine."""
        return getattr(self._thread, "line", None)

    @contextlib.contextmanager
    def live_line(self, label: str, text: str) -> Iterator[None]:
        """Until the block ends, the steps of this thread are one live line, which then disappears.

        Without a live terminal nothing changes.
        """
        if self.quiet or not self.is_live:
            yield
            return
        line = self._thread.line = LiveLine(label, text)
        with self._above():
            self._live.append(line)
        try:
            yield
        finally:
            self._thread.line = None
            with self._above():
                self._live = [other for other in self._live if other is not line]

    def progress(self, text: str) -> None:
        """How far the step has come; shown after its name in a live line."""
        with self._lock:
            for line in self._live:
                line.progress = printable(text) + " "

    def tick(self) -> None:
        """Repaints the live lines about twice a second."""
        with self._lock:
            if self._live and time.monotonic() - self._painted > self.REPAINT_AFTER:
                self._paint()

    def end_step(self) -> None:
        """Turns the live lines, if there are any, into ordinary ones."""
        with self._lock:
            text, ended, self._live = self._erasure(), self._live, []
            for line in ended:
                text += self.styled(line.shown(), DIM, 2) + "\n"
            self._write(text)

    @contextlib.contextmanager
    def _above(self) -> Iterator[None]:
        """The output of the block appears above the live lines of machines. A step of the whole command ends."""
        with self._lock:
            if not self.is_live:
                yield
                return
            if self._live and not self._live[0].label:
                self.end_step()
            self._write(self._erasure())
            yield
            self._paint()

    def _erasure(self) -> str:
        """The codes that erase the live lines. A terminal that became narrower has broken them into more rows."""
        columns = terminal_columns(2) or 80
        rows = sum(-(-width // columns) for width in self._widths)
        self._widths = []
        if rows == 0:
            return ""
        return "\r\x1b[K" + "\x1b[A\x1b[K" * (rows - 1)

    def _paint(self) -> None:
        """Paints the live lines. None of them wraps, and there are fewer than the terminal has rows."""
        columns, rows = terminal_columns(2) or 80, 24
        with contextlib.suppress(OSError):
            rows = os.get_terminal_size(2).lines or rows
        shown = [line.shown(columns - 1) for line in self._live[:max(1, rows - 1)]]
        self._write(self._erasure() + "\n".join(shown))
        self._widths = [max(1, display_width(line)) for line in shown]
        self._painted = time.monotonic()

    def elapsed(self) -> str:
        """The seconds since this thread's live line began, for the end of a result. Only on a terminal."""
        own = self._own_line()
        return own.clock() if own and self.width else ""

    @staticmethod
    def _wrapped(text: str, handle: int) -> str:
        """A message without commands, made printable and wrapped for the terminal at that handle."""
        columns = terminal_columns(handle)
        if columns is None:
            return printable(text)
        lines: list[str] = []
        for line in printable(text).split("\n"):
            lines += wrapped(line, columns, "", "  ")
        return "\n".join(lines)

    def _laid_out(self, text: str, handle: int, first: str = "", later: str = "  ") -> str:
        """A message that may offer commands, made printable and wrapped for the terminal at that handle."""
        return laid_out(printable(text), terminal_columns(handle), first, later,
                        lambda command: self.styled(command, BOLD, handle))

    def note(self, text: str, *, needed: bool = False) -> None:
        """A line for the person that is not a result. -q hides it unless it is `needed`, as before a question."""
        if needed or not self.quiet:
            self._write_line(self._laid_out(text, 2))

    def aside(self, text: str) -> None:
        """A note that is of less interest."""
        if not self.quiet:
            self._write_line(self.styled(self._laid_out(text, 2), DIM, 2))

    def ready(self, text: str) -> None:
        """A last line that says what is ready and what to type next. Only on a terminal, and not with -q."""
        if self._is_terminal:
            self.note(text)

    def warn(self, text: str) -> None:
        """Something that the person should know. The work continues."""
        self._write_line(self._laid_out(f"kodemachine: warning: {text}", 2)
                         .replace("warning:", self.styled("warning:", MAGENTA, 2), 1))

    def trace(self, text: str) -> None:
        """A call to an external program. Shown with -v."""
        if self.verbose:
            self._write_line(f"+ {printable(text)}")

    def error(self, failure: KodeError) -> None:
        """Shows the message of a failure and its hint; with --json one JSON object."""
        message, hint = printable(failure.message), printable(failure.hint)
        if self.as_json:
            self._write_line(json.dumps({"error": {"code": failure.slug, "message": message, "hint": hint}}))
            return
        lines = self._wrapped("kodemachine: " + message, 2)
        lines = lines.replace("kodemachine:", self.styled("kodemachine:", RED, 2), 1)
        if hint:
            lines += "\n" + self._laid_out(hint, 2, first="  ")
        self._write_line(lines)

    def _write_line(self, text: str) -> None:
        """An ordinary line, above the live ones."""
        with self._above():
            self._write(text + "\n")

    @staticmethod
    def _write(text: str) -> None:
        """Writes to stderr. A terminal that is gone neither stops the work nor makes the exit fail."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            discard_output(2)

    def raw(self, out: bytes, err: bytes = b"") -> None:
        """Writes bytes to stdout and stderr unchanged. Raises BrokenPipeError when nobody reads, or KodeError."""
        with self._above():
            try:
                sys.stderr.buffer.write(err)
                sys.stderr.flush()
                sys.stdout.buffer.write(out)
                sys.stdout.flush()
            except BrokenPipeError:
                raise
            except OSError as failure:
                # Or the flush at exit would fail again.
                discard_output(1)
                raise KodeError(f"the output cannot be written: {failure.strerror}",
                                RUN_AGAIN) from None

    def result(self, text: str) -> None:
        """Writes a result to stdout. Raises as `raw` does."""
        self.raw((printable(text) + "\n").encode())

    def finding(self, sign: str, colour: int, text: str, remedy: str) -> None:
        """Writes a result that begins with a coloured sign, with its remedy below. Raises as `raw` does."""
        lines = self.styled(sign, colour) + self._wrapped(f"{sign} {text}", 1)[len(sign):]
        if remedy:
            lines += "\n" + self._laid_out(remedy, 1, "    ", "    ")
        self.raw((lines + "\n").encode())

    def json(self, value: object) -> None:
        """Writes a result for a program to stdout, as JSON. Raises as `raw` does."""
        self.result(json.dumps(value, indent=1))

    @staticmethod
    def fits(text: str) -> bool:
        """Whether the encoding of stdout has these characters."""
        try:
            text.encode(sys.stdout.encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    @property
    def width(self) -> int | None:
        """Columns of the terminal on stdout; None if it is not a terminal, or reports no size."""
        return terminal_columns(1)

    @property
    def can_ask(self) -> bool:
        """Whether a person can answer a question on the terminal."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def must_be_able_to_ask(self, what: str) -> None:
        """Raises UsageError if there is no terminal on which the person can confirm `what`."""
        if not self.can_ask:
            raise UsageError(f"{what} needs a yes, and there is no terminal to ask on",
                             "Add -y to continue without a question.")

    def confirm(self, question: str, what: str) -> bool:
        """Asks a yes-no question on the terminal. Raises UsageError if there is no terminal."""
        self.end_step()
        self.must_be_able_to_ask(what)
        self._write(self._laid_out(f"{question} [y/N]", 2) + " ")
        answer = ""
        try:
            answer = sys.stdin.readline()
        finally:
            # After Ctrl-C or Ctrl-D the cursor is still in the line of the question.
            if not answer:
                self._write("\n")
        return answer.strip().lower() in ("y", "yes")
# ---- commands


class Context(NamedTuple):
    """The layers that a command works with."""

    manager: Manager
    out: Terminal
    interrupts: Interrupts
    config: Config


Arguments = argparse.Namespace
# One argument of a command: its names, and the keywords of argparse's add_argument.
Option = tuple[tuple[str, ...], dict[str, Any]]
Run = Callable[[Context, Arguments], int]


class Command(NamedTuple):
    """One entry of the command table. `examples` are command lines without the name of the program."""

    run: Run
    summary: str
    options: tuple[Option, ...]
    aliases: tuple[str, ...]
    hidden: bool
    examples: tuple[str, ...]


# By name. "base seal" is the command `seal` of the group `base`.
COMMANDS: dict[str, Command] = {}
# All names of all commands, with the name in the table: `base ls` means `base list`.
SPELLINGS: dict[str, str] = {}
GROUPS = {"base": "golden images: list, choose, seal and create them"}


def command(name: str, *options: Option, aliases: Sequence[str] = (), hidden: bool = False,
            examples: Sequence[str] = ()) -> Callable[[Run], Run]:
    """Adds a function to the command table. Its docstring is the command's help."""
    def add(run: Run) -> Run:
        COMMANDS[name] = Command(run, run.__doc__ or "", options, tuple(aliases), hidden, tuple(examples))
        group, blank, word = name.rpartition(" ")
        for spelling in (word, *aliases):
            SPELLINGS[group + blank + spelling] = name
        return run
    return add


def option(*names: str, **how: Any) -> Option:
    """One argument of a command, with argparse's keywords. Completion goes by its metavar or name."""
    return names, how


def command_words() -> set[str]:
    """The first words of the commands that are shown to people, without aliases."""
    return {name.partition(" ")[0] for name, entry in COMMANDS.items() if not entry.hidden}


def operands_of(name: str) -> list[Option]:
    """The arguments of a command that are not options."""
    return [(names, how) for names, how in COMMANDS[name].options if not names[0].startswith("-")]


def command_line(words: Sequence[str], rest: Sequence[str] | None = None) -> str:
    """A command line that can be pasted into a shell."""
    text = "kodemachine " + shlex.join(words)
    return text if rest is None else f"{text} -- {shlex.join(rest)}"


def number_type(convert: Callable[[str], float], low: float, high: float, wanted: str) -> Callable[[str], Any]:
    """A type for argparse: numbers from `low` to below `high`. `convert` may raise ValueError."""
    def checked(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if low <= value < high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return checked


seconds = number_type(float, 0.001, 1e6, "a positive number of seconds")
period = number_type(parse_age, 0.0, float("inf"), "a length of time, such as 12h or 7d")
count = number_type(int, 1, 1000, "a whole number from 1 to 999")
port_index = number_type(int, 0, 100, "a number from 0 to 99")
# The memory in MiB, and the disk in bytes, but whole MiB.
mebibytes = number_type(lambda text: parse_size(text) >> 20, 32, 1 << 24, "a size of memory, such as 4G or 512M")
disk_size = number_type(lambda text: parse_size(text) >> 20 << 20, 1 << 30, 1 << 46, "a size of a disk, such as 64G")


def version(text: str) -> str:
    """The name of the image of that version. Raises ArgumentTypeError."""
    name = "kodeimage-" + text
    if not IMAGE.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version, such as v0.2.0")
    return name


LABEL_ARG = option("label", help="the machine")
LABELS = option("labels", metavar="label", nargs="*", help="the machines")
ALL = option("--all", action="store_true", help="every clone")
JSON = option("--json", action="store_true", dest="as_json", help="for programs")
YES = option("-y", "--yes", action="store_true", help="do not ask")
SIZE = option("-s", "--size", action="store_true", help="read sizes from UTM's folder; macOS may ask for permission")
FORWARD_AGENT = option("-A", "--forward-agent", action="store_true", help="forward the ssh agent for this session")
START_TIMEOUT = option("--timeout", type=seconds, metavar="S", help="seconds to wait until ssh answers")
STOP_TIMEOUT = option("-t", "--timeout", type=seconds, metavar="S", help="seconds that the guest has to shut down")


def report_image(ctx: Context, image: Machine | VM, is_default: bool) -> None:
    """Says that a new image is ready, and how to use it."""
    if is_default:
        ctx.out.note(f"{image.name} is ready; to create a machine from it: kodemachine project-alpha")
    else:
        ctx.out.note(f"{image.name} is ready; to use it for new machines: kodemachine base use {image.name}")


def chosen(ctx: Context, opts: Arguments, fits: Callable[[Machine], bool] = lambda machine: True) -> list[str]:
    """The labels on the command line, each once; with --all those of the clones that fit. Raises UsageError."""
    see = f"See: kodemachine help {opts.name}"
    if "all" in opts and opts.all:
        if opts.labels:
            raise UsageError("either labels or --all, not both", see)
        clones = ctx.manager.fleet(partial=True).clones
        labels = [str(machine.label) for machine in clones if fits(machine)]
    elif opts.labels:
        labels = [ctx.manager.label(text) for text in opts.labels]
    else:
        raise UsageError(f"{opts.name} needs a label", see)
    return list(dict.fromkeys(labels))


def running_vm(ctx: Context, text: str, because: str = "", *, soon: bool = False) -> VM:
    """The running machine with that label; with `soon` also one about to run. `because` ends the error."""
    vm = ctx.manager.find(ctx.manager.label(text))
    may_run = soon and vm.power not in (Power.STOPPED, Power.PAUSED)
    if vm.power is not Power.STARTED and not may_run:
        raise WrongState(f"{vm.name} is {vm.power.word}{because}", vm.how_to_run)
    return vm


def join_all(ctx: Context, threads: Sequence[threading.Thread]) -> None:
    """Runs threads to their end. An interruption first ends their calls, so that they can end."""
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                ctx.out.tick()
    except BaseException:
        # It shows how far each machine came.
        ctx.out.end_step()
        ctx.manager.utm.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join(2)
        raise


def each(ctx: Context, labels: Sequence[str], doing: str, work: Callable[[str], str]) -> int:
    """Does `work` for each label, in WIDTH threads, and returns the status of the first failure.

    The result of `work` is a line for the person. Until then, a terminal shows its label and step, first `doing`.
    For a single label, a failure is raised.
    """
    waiting = iter(labels)
    width = max(map(len, labels), default=0)
    statuses: dict[str, int] = {}
    unexpected: list[BaseException] = []

    def report(label: str) -> None:
        line = work(label)
        if line:
            ctx.out.note(line)

    def run_waiting() -> None:
        for label in waiting:
            try:
                with ctx.out.live_line(label.ljust(width), doing):
                    report(label)
            except KodeError as failure:
                ctx.out.error(failure)
                statuses[label] = failure.status
            except BaseException as failure:
                unexpected.append(failure)
            if unexpected:
                break

    if len(labels) == 1:
        report(labels[0])
        return 0
    join_all(ctx, [threading.Thread(target=run_waiting, daemon=True) for _ in labels[:WIDTH]])
    if unexpected:
        raise unexpected[0]
    return next((statuses[label] for label in labels if label in statuses), 0)


def each_locked(ctx: Context, labels: Sequence[str], doing: str, work: Callable[[str], str]) -> int:
    """Does `work` for each label while its lock is held, and shows its result after the label."""
    def locked(label: str) -> str:
        with ctx.manager.holding(label):
            return f"{label} {work(label)}"
    return each(ctx, labels, doing, locked)


def exec_ssh(argv: Sequence[str]) -> NoReturn:
    """Replaces this process with ssh. That releases the locks: their handles are not inherited."""
    # Python ignores these two, and the new program would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as failure:
        raise KodeError(f"{argv[0]} cannot be run: {failure.strerror}", "Install OpenSSH on PATH.") from None


@contextlib.contextmanager
def lent_terminal() -> Iterator[list[int]]:
    """Leaves Ctrl-C and Ctrl-\\ to a child, and yields them. Restores the attributes of the terminal at the end."""
    import termios

    pressed: list[int] = []
    attributes = termios.tcgetattr(0) if sys.stdin.isatty() else None
    numbers = (signal.SIGINT, signal.SIGQUIT)
    before = {number: signal.signal(number, lambda number, _: pressed.append(number)) for number in numbers}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # The terminal may be gone, or, for a job in the background, another's.
        with contextlib.suppress(OSError, termios.error):
            if attributes and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSADRAIN, attributes)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Asks a child to end, and kills it after 5 s."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
    child.kill()
    child.wait()


def run_foreground(ctx: Context, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> int:
    """Runs ssh or scp as a child in the foreground, and returns its status as a shell does. Raises KodeError."""
    child = None
    with lent_terminal() as pressed:
        try:
            # A child that was just started and has no name here yet could not be ended.
            with ctx.interrupts.held():
                child = subprocess.Popen(list(argv), stdin=stdin, stdout=stdout)
            code = child.wait()
        except FileNotFoundError:
            raise KodeError(f"{argv[0]} is not on PATH", "Install OpenSSH on PATH.") from None
        except BaseException:
            # Such as a signal that ends this program.
            if child:
                end_child(child)
            raise
    # ssh handles the key's signal itself, and then ends with 255; scp, with 1.
    if pressed and code in (1, 255):
        return 128 + pressed[0]
    return code if code >= 0 else 128 - code


def session(ctx: Context, vm: VM, address: str, opts: Arguments) -> list[str]:
    """The ssh command for a shell, or for the words after `--`. One word is a command line; several are quoted."""
    words = list(opts.rest or [])
    if len(words) > 1:
        words = [shlex.join(words)]
    ctx.out.end_step()
    return ctx.manager.ssh.argv(vm, address, words, forward_agent=opts.forward_agent)


DETACH_EXCLUDES_COMMAND = "--detach and a command exclude each other"


def start_then_run(labels: Sequence[str], rest: Sequence[str] | None) -> str:
    """The hint for somebody who wants to start machines and run a command in them."""
    hint = f"Start first: {command_line(['start', '-d', *labels])}"
    for label in labels:
        hint += f"; then: {command_line([label], rest or None)}"
    return hint


def start_options(opts: Arguments, labels: Sequence[str]) -> StartOptions:
    """The options of `start`. Raises UsageError for those that exclude each other."""
    detached = command_line(["start", "-d", *labels])
    several = len(labels) > 1
    conflicts = (
        (opts.rm and opts.detach,
         "--rm and --detach exclude each other: --rm deletes the machine when its session ends",
         f"To keep the machine: {detached}"),
        (opts.rm and opts.fresh,
         "--rm and --fresh exclude each other: --rm is only for a machine that this command creates",
         f"To delete the old machine first: {command_line(['delete', '--force', *labels])}"),
        (opts.detach and opts.rest is not None, DETACH_EXCLUDES_COMMAND, start_then_run(labels, opts.rest)),
        (opts.detach and opts.forward_agent,
         "--detach and --forward-agent exclude each other: the agent is forwarded to a session",
         f"Start first: {detached}; then: {command_line(['ssh', '-A', *labels[:1]])}"),
        (several and opts.rest is not None, "a command runs in one machine at a time",
         start_then_run(labels, opts.rest)),
        (several and not opts.detach, "several labels need --detach", detached),
        (several and (opts.fresh or opts.repin) and not opts.yes,
         "several labels with --fresh or --repin need -y: one terminal cannot answer for all at once",
         "Add -y, or run the command for one label at a time."))
    for is_conflict, message, hint in conflicts:
        if is_conflict:
            raise UsageError(message, hint)
    return StartOptions(base=opts.base, cpus=opts.cpus, memory=opts.memory, timeout=opts.timeout,
                        offline=opts.offline, only_new=opts.rm, prove=opts.detach, bare=opts.bare,
                        commands=tuple(command_words()))


def delete_existing(ctx: Context, label: str, options: StartOptions, opts: Arguments) -> bool:
    """--fresh: deletes the machine of that label, if a new one can be made. Returns whether there was one."""
    manager, out = ctx.manager, ctx.out
    fleet = manager.fleet()
    machine = fleet.get(label)
    if machine is None:
        return False
    manager.base_for_new(fleet, options.base)
    question = f"Delete {machine.name} ({machine.power.word}) and create it again?"
    if not opts.yes and not out.confirm(question, "--fresh"):
        raise KodeError("nothing was changed")
    out.step(f"deleting {machine.name}")
    manager.delete(manager.vm(machine), force=True)
    return True


def repin(ctx: Context, vm: VM, opts: Arguments) -> None:
    """--repin: reads the host keys through the guest agent, which no network can forge, shows them, and asks."""
    manager, out = ctx.manager, ctx.out
    identity = manager.read_identity(vm, needed=True)
    if not identity.host_keys:
        raise KodeError(f"the guest agent reports no host keys of {vm.name}; nothing was changed",
                        f"Check on its console that qemu-guest-agent runs: kodemachine attach {vm.label}")
    pinned = manager.state.pinned(vm.name)
    if pinned == identity.host_keys:
        out.note(f"the host keys of {vm.name} are the pinned ones")
        return
    for title, keys in (("pinned", pinned), ("now", identity.host_keys)):
        for key in keys:
            out.note(f"{title:7} {fingerprint(key)}", needed=not opts.yes)
    if not opts.yes and not out.confirm(f"Pin the new keys of {vm.name}?", "--repin"):
        raise KodeError("nothing was changed")
    manager.state.pin(vm.name, identity.host_keys)
    vm.remember(machine_id=printable(identity.machine_id))


def ready(ctx: Context, label: str, options: StartOptions, opts: Arguments) -> tuple[VM, str]:
    """The machine of that label, with its ssh server answering, and its address. The caller holds its lock."""
    if opts.fresh:
        has_existed = delete_existing(ctx, label, options, opts)
        # A label that a machine had is not a mistyped command.
        options = options._replace(bare=options.bare and not has_existed,
                                   afterwards="run the same command without --fresh to continue")
    vm, call = ctx.manager.find_or_clone(label, options)
    address = ctx.manager.start(vm, options, call)
    if opts.repin:
        repin(ctx, vm, opts)
    return vm, address


def due_script(ctx: Context, vm: VM) -> str | None:
    """The path of the first_boot script, if the machine has not run it yet."""
    if vm.record.first_boot != "pending":
        return None
    return ctx.manager.settings.first_boot


# The script arrives on stdin as a whole and is run from a file: then its #! line counts, and it cannot read itself.
RUN_SCRIPT = ('file=$(mktemp "$HOME/.first-boot.XXXXXX") && cat > "$file" && chmod 700 "$file" || exit; '
              'cd && "$file"; code=$?; rm -f "$file"; exit "$code"')


def run_first_boot(ctx: Context, vm: VM, address: str) -> None:
    """Runs the first_boot script in a new machine, as the user, over ssh. Its output goes to stderr.

    A script that failed is still due: raises KodeError. The caller holds the label's lock.
    """
    path = due_script(ctx, vm)
    if not path:
        return
    program, *words = ctx.manager.ssh.argv(vm, address, [shlex.join(["exec", "sh", "-c", RUN_SCRIPT])])
    try:
        with open_script(path) as file:
            ctx.out.step(f"running {path} in {vm.name}")
            ctx.out.end_step()
            code = run_foreground(ctx, [program, "-T", *words], file.fileno(), 2)
        if code in (128 + signal.SIGINT, 128 + signal.SIGQUIT):
            raise Interrupted(code - 128)
    except Interrupted:
        if not vm.record.is_temporary:
            ctx.out.warn(f"first_boot was interrupted in {vm.name}; to run it again: kodemachine {vm.label}")
        raise
    if code:
        hint = (f"The machine is kept. To run the script again: kodemachine {vm.label}; to look inside: "
                f"kodemachine ssh {vm.label}; to start without it: kodemachine config unset first_boot")
        if vm.record.is_temporary:
            hint = f"Fix {path} and run the command again."
        raise KodeError(f"first_boot failed in {vm.name}: {path} ended with exit status {code}", hint)
    vm.remember(first_boot="done")


def start_detached(ctx: Context, labels: Sequence[str], prepare: Callable[[str], tuple[VM, str]]) -> int:
    """Prepares machines at the same time, runs first_boot where it is due, and prints the addresses.

    first_boot has the terminal, so several machines run it one after the other.
    """
    several = len(labels) > 1
    # A terminal shows the addresses of several machines in a column.
    width = max(map(len, labels)) + 1 if ctx.out.width else 0
    due: dict[str, tuple[VM, str]] = {}
    started: list[str] = []

    def report(label: str, address: str) -> None:
        started.append(label)
        ctx.out.result(f"{label.ljust(width)} {address}{ctx.out.elapsed()}" if several else address)

    def start(label: str) -> str:
        with ctx.manager.holding(label):
            vm, address = prepare(label)
            if several and due_script(ctx, vm):
                due[label] = vm, address
                return ""
            run_first_boot(ctx, vm, address)
        report(label, address)
        return ""

    status = each(ctx, labels, "starting", start)
    for label in [label for label in labels if label in due]:
        vm, address = due[label]
        try:
            with ctx.manager.holding(label):
                vm.reread()
                run_first_boot(ctx, vm, address)
            report(label, address)
        except KodeError as failure:
            ctx.out.error(failure)
            status = status or failure.status
    if started:
        names = f"ready: {', '.join(started)}" if several else f"{started[0]} is ready"
        ctx.out.ready(f"{names}; to connect: kodemachine ssh {started[0]}")
    return status


def delete_temporary(ctx: Context, vm: VM, label: str) -> None:
    """Deletes a --rm machine. Signals do not interrupt it. A failure is a warning with the command to do it later."""
    with ctx.interrupts.held():
        ctx.out.step(f"deleting {vm.name} (--rm)")
        try:
            with ctx.manager.holding(label):
                vm.status()
                ctx.manager.delete(vm, force=True)
        except NotFound:
            # Somebody else has deleted it.
            pass
        except KodeError as failure:
            ctx.out.warn(f"{vm.name} was not deleted: {failure.message.rstrip('.')}. "
                         f"To delete it: kodemachine delete --force {label}")
        ctx.out.end_step()


def run_temporary(ctx: Context, label: str, options: StartOptions, opts: Arguments) -> int:
    """--rm: runs a session in a new machine, which is deleted at the end of the session, however it ends."""
    manager = ctx.manager
    options = options._replace(afterwards=f"when {label} is there, delete it: kodemachine delete {label}")
    with contextlib.ExitStack() as stack:
        with manager.holding(label):
            vm, call = manager.find_or_clone(label, options)
            stack.enter_context(manager.session_lock(vm))
            stack.callback(delete_temporary, ctx, vm, label)
            address = manager.start(vm, options, call)
            run_first_boot(ctx, vm, address)
        return run_foreground(ctx, session(ctx, vm, address, opts))


@command("start", LABELS,
         option("-d", "--detach", action="store_true", help="do not connect; print the address"),
         option("--rm", action="store_true", help="delete the new machine when its session ends"),
         option("--fresh", action="store_true", help="delete an existing machine first"), YES,
         option("--base", metavar="IMAGE", help="clone this image (a name, a version, or a UUID)"),
         option("--cpus", type=count, metavar="N", help="CPUs of a new clone"),
         option("--memory", type=mebibytes, metavar="SIZE", help="memory of a new clone, such as 4G"),
         option("--offline", action="store_true", help="a new clone that reaches only this Mac"), FORWARD_AGENT,
         option("--repin", action="store_true", help="accept changed host keys, after showing them"),
         START_TIMEOUT,
         examples=["project-alpha", "start -d project-alpha project-beta", "trial --rm --memory 8G -- make test"])
def cmd_start(ctx: Context, opts: Arguments) -> int:
    """clone if missing, start, and connect by ssh, or run the command after --"""
    labels = chosen(ctx, opts)
    options = start_options(opts, labels)
    if opts.rm:
        return run_temporary(ctx, labels[0], options, opts)

    def prepare(label: str) -> tuple[VM, str]:
        return ready(ctx, label, options, opts)
    if opts.detach:
        return start_detached(ctx, labels, prepare)
    with ctx.manager.holding(labels[0]):
        vm, address = prepare(labels[0])
        run_first_boot(ctx, vm, address)
        exec_ssh(session(ctx, vm, address, opts))


@command("ssh", LABEL_ARG, FORWARD_AGENT, START_TIMEOUT,
         examples=["ssh project-alpha", "ssh project-alpha -- tail -f /var/log/syslog"])
def cmd_ssh(ctx: Context, opts: Arguments) -> int:
    """start if needed and connect, or run the command after --; never clone"""
    label = ctx.manager.label(opts.label)
    options = StartOptions(timeout=opts.timeout, may_clone=False, prove=False)
    with ctx.manager.holding(label):
        vm, call = ctx.manager.find_or_clone(label, options)
        address = ctx.manager.start(vm, options, call)
        exec_ssh(session(ctx, vm, address, opts))


@command("exec", LABEL_ARG, option("--input", action="store_true", help="pass standard input to the command"),
         examples=["exec project-alpha -- ip addr", "exec project-alpha --input -- tee /etc/motd"])
def cmd_exec(ctx: Context, opts: Arguments) -> int:
    """run the command after -- as root through the guest agent, without network or ssh"""
    if not opts.rest:
        raise UsageError("exec needs a command after --", f"For example: kodemachine exec {opts.label} -- ip addr")
    if opts.input and sys.stdin.isatty():
        raise UsageError("--input takes a file or a pipe, not a terminal",
                         f"For a terminal: kodemachine ssh {opts.label}")
    for word in opts.rest:
        if not is_utf8(word):
            raise UsageError(f"{printable(word)} is not UTF-8, and would be changed on its way into the guest",
                             "Copy the file with kodemachine cp, and name it with a pattern.")
    vm = running_vm(ctx, opts.label)
    data = sys.stdin.buffer.read(EXEC_INPUT + 1) if opts.input else b""
    if len(data) > EXEC_INPUT:
        raise UsageError(f"--input takes at most {size_text(EXEC_INPUT)}",
                         f"Copy the file first: kodemachine cp FILE {vm.label}:")
    code, out, err = vm.run(opts.rest, data)
    ctx.out.raw(out, err)
    return code


@contextlib.contextmanager
def local_path_suggested(path: str) -> Iterator[None]:
    """Adds to the error for a path whose part before the colon is not a machine that the path may be a local one."""
    try:
        yield
    except (UsageError, NotFound) as failure:
        failure.hint += f"\nFor a file on this Mac: {shlex.quote('./' + path)}"
        raise


def cp_operands(manager: Manager, paths: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The labels in the paths, each with a path that has it, and the paths for scp. Raises UsageError."""
    labels: dict[str, str] = {}
    operands = []
    for path in paths:
        host, colon, file = path.partition(":")
        if not colon or "/" in host:
            operands.append(path)
            continue
        with local_path_suggested(path):
            label = manager.label(host)
        labels[label] = path
        operands.append(f"{manager.name(label)}:{file}")
    return labels, operands


@command("cp", option("paths", metavar="path", nargs="+", help="sources and a destination; LABEL:PATH is in a machine"),
         option("-r", action="store_true", dest="recursive", help="whole folders"),
         option("-O", action="store_true", dest="without_sftp", help="use scp's old protocol: the guest needs scp"),
         examples=["cp notes.txt project-alpha:", "cp -r project-alpha:results ."])
def cmd_cp(ctx: Context, opts: Arguments) -> int:
    """copy files to, from and between running machines"""
    example = "For example: kodemachine cp notes.txt project-alpha:"
    if len(opts.paths) < 2:
        raise UsageError("cp needs a source and a destination", example)
    manager = ctx.manager
    labels, operands = cp_operands(manager, opts.paths)
    if not labels:
        raise UsageError("none of these paths is in a machine", example)
    pinned = True
    for label, path in labels.items():
        # Without this, scp would report a machine that is missing or off in its own, unclear words.
        with local_path_suggested(path), manager.holding(label):
            pinned &= manager.running(label)[2]
    ctx.out.end_step()
    options = {**manager.ssh.name_options(pinned), **COPY_OPTIONS,
               **manager.ssh.keep_alive(manager.name(next(iter(labels))))}
    # ssh starts our proxy with this shell. sh reads no start-up file, which could print something first.
    os.environ["SHELL"] = "/bin/sh"
    flags = ["-3"]
    if opts.recursive:
        flags.append("-r")
    if opts.without_sftp:
        flags.append("-O")
    code = run_foreground(ctx, ["scp", *flags, *as_words(options), "--", *operands])
    # scp's own words for a guest without an sftp server are "subsystem request failed".
    if code == 255 and not opts.without_sftp:
        ctx.out.warn("scp has failed. If the message above is about a subsystem request, the guest has no sftp server: "
                     "install openssh-sftp-server in it, or add -O to this command")
    return code


# The words for each way in which a console session ends.
CONSOLE_ENDS = {"escape": "left", "closed": "the machine closed the line", "timeout": "the time limit has passed",
                "reader": "the reader has gone"}


def greet_person(ctx: Context, vm: VM, escape: bytes) -> None:
    """Says how to leave the console, and how to set the size of its window."""
    leave = "no escape key"
    if escape:
        key = f"Ctrl-{chr(escape[0] + 64)}" if escape < b" " else escape.decode()
        leave = f"leave with {key}"
    ctx.out.note(f"--- console of {vm.name}; Enter shows its prompt; {leave} ---")
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(0)
        # A terminal without a window reports zeros.
        if size.lines and size.columns:
            ctx.out.note(f"--- to set the window size in the guest: stty rows {size.lines} cols {size.columns}")


def run_console(ctx: Context, vm: VM, line: int, escape: bytes, opts: Arguments) -> int:
    """Relays until the session ends, and says why it ended. The terminal is then as it was before."""
    log = None
    if opts.log is not None:
        with explained(opts.log, "Name another file with --log."):
            log = os.open(opts.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    is_person = sys.stdin.isatty()
    if is_person:
        greet_person(ctx, vm, escape)
    relay = SerialRelay(line, 0, 1, escape if is_person else b"", log)
    deadline = None
    if opts.timeout and not is_person:
        deadline = time.monotonic() + opts.timeout
    try:
        with raw_terminal(0):
            end = relay.relay(deadline)
    finally:
        relay.close()
        if log is not None:
            os.close(log)
    if is_person:
        # The guest may have left the cursor inside a line.
        ctx.out.note("")
    ctx.out.note(f"--- console of {vm.name}: {CONSOLE_ENDS[end]} ---")
    return 128 + signal.SIGPIPE if end == "reader" else 0


@command("attach", LABEL_ARG, option("--index", type=port_index, metavar="N", help="the N-th serial port, from 0"),
         option("--log", metavar="FILE", help="also append the guest's output to FILE"),
         option("--escape", default="ctrl-]", metavar="KEY", help="the key that leaves, or none (ctrl-])"),
         option("--timeout", type=seconds, metavar="S", help="seconds to listen, without a terminal"),
         examples=["attach project-alpha", "attach project-alpha --log boot.log"])
def cmd_attach(ctx: Context, opts: Arguments) -> int:
    """connect to the serial console, for when the network fails"""
    escape = escape_byte(opts.escape)
    vm = running_vm(ctx, opts.label, "; only a running machine has a console")
    port = vm.serial_port(opts.index)
    name = "serial-" + re.sub(r"[^A-Za-z0-9.]+", "-", port)
    with ctx.manager.state.lock(name, 0.0, wait=False, what=f"the console of {vm.name}"):
        line = open_line(port)
        try:
            return run_console(ctx, vm, line, escape, opts)
        finally:
            os.close(line)


def shown_name(machine: Machine) -> str:
    """The label of a clone, and the name of any other machine."""
    return machine.label or machine.name


def first_step(fleet: Fleet) -> str:
    """The next command for a person who has no machines."""
    images = sorted(image.name for image in fleet.images)
    if fleet.default_image in images:
        return "to create one: kodemachine project-alpha"
    if images:
        return f"the default image does not exist, so first choose one: {command_line(['base', 'use', images[-1]])}"
    return "first create an image: kodemachine base create v0.1.0"


def inventory(manager: Manager, machines: Sequence[Machine]) -> dict[str, Any]:
    """An Ansible inventory of clones, by status. Its variables are in one group, so they reach no other hosts."""
    # Ansible shares its connections itself.
    options = {key: value for key, value in manager.ssh.name_options().items() if not key.startswith("Control")}
    # A shared connection to a machine that is off by now would hang, and the next play with it.
    options.update(ServerAliveInterval="5", ServerAliveCountMax="3")
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for fact in manager.describe(machines, ip=False):
        group = groups.setdefault(f"kodemachine_{fact.status}", {"hosts": {}})
        group["hosts"][fact.name] = {"kodemachine_label": fact.label, "kodemachine_image": fact.image}
    shared = {"ansible_ssh_common_args": shlex.join(as_words(options))}
    return {"all": {"children": {"kodemachine": {"vars": shared, "children": groups}}}}


def status_text(ctx: Context, machine: Machine) -> str:
    """The status of a machine, with marks for an offline one, and for one that an interrupted --rm session left."""
    text = machine.power.word
    if machine.record.network == "offline":
        text += " offline"
    if ctx.manager.is_orphan(machine):
        text += " (--rm)"
    return text


def fitted_columns(ctx: Context, header: Sequence[str], rows: Sequence[Sequence[str]],
                   expendable: Sequence[str]) -> list[Column]:
    """The columns of a table that fit into the terminal, with printable cells. A note names those that do not.

    Cells without a heading are left out.
    """
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    columns: list[Column] = list(zip(header, *rows))
    kept = fitting(columns, ctx.out.width, expendable)
    hidden = [name for name, *cells in columns if (name, *cells) not in kept and set(cells) != {"-"}]
    if hidden:
        ctx.out.aside(f"hidden, for lack of width: {', '.join(hidden)}")
    return kept


def image_text(ctx: Context, name: str | None) -> str:
    """The name of an image; on a terminal only its version, which every option for an image takes, too."""
    if name and ctx.out.width and IMAGE.fullmatch(name):
        return name.removeprefix("kodeimage-")
    return name or "-"


def machine_cells(ctx: Context, machine: Machine, fact: Facts) -> dict[str, str]:
    """The facts about a machine for a table, by their headings."""
    age = age_text(age_of(machine.record.created))
    return {"LABEL": shown_name(machine), "STATUS": status_text(ctx, machine), "IP": fact.ip or "-",
            "IMAGE": image_text(ctx, fact.image), "AGE": age, "MEMORY": size_text(fact.memory),
            "SIZE": size_text(fact.size), "RECLAIM": size_text(fact.reclaimable)}


def machine_columns(ctx: Context, header: Sequence[str], cells: Sequence[dict[str, str]]) -> list[Column]:
    """The columns of `list` and `purge`. Those that the person asked for are the last ones to be left out."""
    rows = [[row[heading] for heading in header] for row in cells]
    return fitted_columns(ctx, header, rows, ("AGE", "IMAGE", "IP", "MEMORY", "SIZE"))


def coloured_list(ctx: Context, columns: Sequence[Column]) -> str:
    """The table of `list`, with coloured words for the status."""
    colours = {Power.STARTED.word: GREEN, Power.UNKNOWN.word: RED}

    def paint(heading: str, cell: str) -> str:
        word, blank, mark = cell.partition(" ")
        if heading != "STATUS" or word in ("STATUS", Power.STOPPED.word):
            return cell
        return ctx.out.styled(word, colours.get(word, MAGENTA)) + blank + mark
    return table(columns, paint)


@command("list", option("-a", "--all", action="store_true", help="images and other machines too"), SIZE, JSON,
         option("--format", choices=["ansible"], help="an inventory for Ansible, by the machines' names"),
         option("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="labels only"),
         option("--no-ip", action="store_false", dest="ip", help="do not ask the guests for addresses"),
         aliases=["ls"], examples=["list", "list -a --json", "list --format ansible"])
def cmd_list(ctx: Context, opts: Arguments) -> int:
    """list the machines with their status, address, image and age"""
    if [opts.as_json, opts.quiet, bool(opts.format)].count(True) > 1:
        raise UsageError("one of -q, --json and --format at a time", "See: kodemachine help list")
    manager, out = ctx.manager, ctx.out
    fleet = manager.fleet(partial=True)
    if opts.format:
        out.json(inventory(manager, fleet.clones))
        return 0
    machines = fleet.clones
    if opts.all:
        machines = sorted(fleet.machines, key=shown_name)
    if opts.quiet:
        for machine in machines:
            out.result(shown_name(machine))
        return 0
    facts = manager.describe(machines, ip=opts.ip, sizes=opts.size)
    if opts.as_json:
        out.json([fact._asdict() for fact in facts])
    elif facts:
        header = ["LABEL", "STATUS", "IP", "IMAGE", "AGE"]
        if opts.size:
            header += ["MEMORY", "SIZE", "RECLAIM"]
        cells = [machine_cells(ctx, machine, fact) for machine, fact in zip(machines, facts)]
        # The cells are printable, and the colours must stay.
        out.raw((coloured_list(ctx, machine_columns(ctx, header, cells)) + "\n").encode())
    else:
        out.note(f"no machines yet; {first_step(fleet)}")
    return 0


def machine_facts(ctx: Context, opts: Arguments) -> dict[str, Any]:
    """The facts of one machine, with all its addresses; without --json as texts for a person."""
    machine = ctx.manager.fleet(partial=True).find(ctx.manager.label(opts.label))
    addresses = []
    if machine.power is Power.STARTED:
        addresses = ctx.manager.vm(machine).addresses()
    facts = ctx.manager.describe([machine], ip=False, sizes=opts.size)[0]._asdict()
    facts["ip"] = addresses[0] if addresses else None
    facts["addresses"] = addresses
    if opts.as_json:
        return facts
    facts["status"] = status_text(ctx, machine)
    facts["addresses"] = ", ".join(addresses)
    for key in ("memory", "size", "reclaimable"):
        if opts.size:
            facts[key] = size_text(facts[key])
        else:
            del facts[key]
    return facts


def installation_facts(ctx: Context, opts: Arguments) -> dict[str, Any]:
    """The versions, the image for new clones, the number of machines in each state, and the paths."""
    manager = ctx.manager
    fleet = manager.fleet(partial=True)
    reply = manager.utm.call("version")
    image = None
    try:
        image = fleet.image(None).name
    except KodeError as failure:
        ctx.out.warn(failure.message)
    powers = [machine.power.word for machine in fleet.clones]
    machines: Any = {word: powers.count(word) for word in powers}
    if not opts.as_json:
        machines = ", ".join(f"{number} {word}" for word, number in machines.items()) or "none"
    return {
        "version": __version__,
        "utm": reply.out.strip() if reply.outcome is Outcome.DONE else None,
        "utmctl": manager.utm.path(),
        "image": image,
        "machines": machines,
        "config": ctx.config.path,
        "state": manager.state.folder,
    }


@command("status", option("label", nargs="?", help="the machine; without it the installation"), SIZE, JSON,
         aliases=["info"], examples=["status", "status project-alpha"])
def cmd_status(ctx: Context, opts: Arguments) -> int:
    """show one machine in full, or the installation at a glance"""
    facts = machine_facts(ctx, opts) if opts.label else installation_facts(ctx, opts)
    if opts.as_json:
        ctx.out.json(facts)
        return 0
    for key, value in facts.items():
        ctx.out.result(f"{key + ':':12} {value or '-'}")
    return 0


@command("ip", LABEL_ARG, option("--all", action="store_true", help="every address that the guest reports"),
         option("--wait", type=seconds, metavar="S", help="seconds to wait until its ssh server answers"),
         examples=["ip project-alpha", "ip project-alpha --wait 60"])
def cmd_ip(ctx: Context, opts: Arguments) -> int:
    """print the address for ssh, alone on stdout"""
    vm = running_vm(ctx, opts.label, " and has no address", soon=bool(opts.wait))
    if opts.all:
        ctx.out.result("\n".join(vm.wait_for_addresses(opts.wait or 0.0)))
        return 0
    port = ctx.manager.settings.ssh_port
    # Only --wait asks for a proof. sshd counts a connection without a login, and then refuses this person for a while.
    ctx.out.result(vm.wait_for_ssh(port, opts.wait or 5.0, prove=bool(opts.wait),
                                   more_time="allow more time with --wait"))
    return 0


def all_findings(ctx: Context) -> Iterator[Finding]:
    """The findings of the doctor. If the configuration is broken, that is the first one."""
    try:
        # Read again, without the warnings that the first reading has shown.
        Config(ctx.config.path, Notes()).settings()
    except KodeError as failure:
        yield Finding("config", ERROR, failure.message, failure.hint)
    # A configuration that others maintain may be read-only.
    folders = {"config": (WARNING, os.path.dirname(ctx.config.path)), "state": (ERROR, ctx.manager.state.folder)}
    for name, (level, folder) in folders.items():
        try:
            must_be_usable(folder)
        except KodeError as failure:
            yield Finding(name, level, failure.message, failure.hint)
    yield from Doctor(ctx.manager).findings()


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """The passed checks as one finding, the skipped ones as one for each cause, and then the problems."""
    shown = []
    passed = {finding.check for finding in findings} - {finding.check for finding in findings if finding.level != OK}
    if passed:
        shown.append(Finding("", OK, f"{counted(len(passed), 'check')} passed (-v shows them)", ""))
    skipped = grouped((finding.message, finding.check) for finding in findings if finding.level == SKIPPED)
    for message, checks in skipped.items():
        shown.append(Finding(", ".join(checks), SKIPPED, message, ""))
    return shown + [finding for finding in findings if finding.level in (WARNING, ERROR)]


COLOURS = {OK: GREEN, WARNING: MAGENTA, ERROR: RED, SKIPPED: DIM}


@command("doctor", JSON, examples=["doctor", "doctor -v"])
def cmd_doctor(ctx: Context, opts: Arguments) -> int:
    """check the host, UTM, the image and the machines; each finding has a remedy"""
    signs = {OK: "ok", WARNING: "! ", ERROR: "x ", SKIPPED: "- "}
    if ctx.out.fits("\u2713\u2717"):
        signs = {OK: "\u2713", WARNING: "!", ERROR: "\u2717", SKIPPED: "-"}
    with ctx.out.live_line("doctor", "checking the Mac, UTM and the machines"):
        findings = list(all_findings(ctx))
    if opts.as_json:
        ctx.out.json([finding._asdict() for finding in findings])
    else:
        for finding in findings if opts.verbose else folded(findings):
            title = f"{finding.check}: " if finding.check else ""
            ctx.out.finding(signs[finding.level], COLOURS[finding.level], title + finding.message, finding.remedy)
    levels = [finding.level for finding in findings]
    problems = [counted(levels.count(level), level) for level in (ERROR, WARNING) if level in levels]
    ctx.out.note(", ".join(problems) or "no problems found")
    return 1 if ERROR in levels else 0


@command("stop", LABELS, ALL, STOP_TIMEOUT,
         option("-f", "--force", action="store_true", help="turn it off without asking the guest"),
         option("--kill", action="store_true", help="end the machine's process"),
         examples=["stop project-alpha", "stop --all -t 120", "stop --force project-alpha"])
def cmd_stop(ctx: Context, opts: Arguments) -> int:
    """shut down: ask the guest, and wait until it is off"""
    limit = opts.timeout or ctx.manager.settings.stop_timeout
    labels = chosen(ctx, opts, lambda machine: machine.power is not Power.STOPPED)
    if not labels:
        ctx.out.note("no machine to stop")

    def stop(label: str) -> str:
        return ctx.manager.stop(label, limit, force=opts.force, kill=opts.kill)
    return each_locked(ctx, labels, "stopping", stop)


@command("restart", LABELS, STOP_TIMEOUT, examples=["restart project-alpha"])
def cmd_restart(ctx: Context, opts: Arguments) -> int:
    """stop, then start -d"""
    manager = ctx.manager
    limit = opts.timeout or manager.settings.stop_timeout
    labels = chosen(ctx, opts)
    options = StartOptions(may_clone=False)

    def restart(label: str) -> tuple[VM, str]:
        manager.stop(label, limit)
        vm, call = manager.find_or_clone(label, options)
        return vm, manager.start(vm, options, call)
    return start_detached(ctx, labels, restart)


@command("suspend", LABELS, ALL, examples=["suspend project-alpha", "suspend --all"])
def cmd_suspend(ctx: Context, opts: Arguments) -> int:
    """pause in memory"""
    labels = chosen(ctx, opts, lambda machine: machine.power is Power.STARTED)
    return each_locked(ctx, labels, "suspending", ctx.manager.suspend)


@command("resume", LABELS, ALL, examples=["resume project-alpha"])
def cmd_resume(ctx: Context, opts: Arguments) -> int:
    """continue a suspended machine"""
    labels = chosen(ctx, opts, lambda machine: machine.power is Power.PAUSED)
    return each_locked(ctx, labels, "resuming", ctx.manager.resume)


@command("clone", LABEL_ARG, option("new", help="the label of the copy"),
         examples=["clone project-alpha project-beta"])
def cmd_clone(ctx: Context, opts: Arguments) -> int:
    """copy a stopped machine to a new label"""
    label, new = ctx.manager.label(opts.label), ctx.manager.label(opts.new)
    if label == new:
        raise UsageError(f"{label} cannot be a copy of itself", f"For example: kodemachine clone {label} {label}-2")
    # Every run that takes both locks takes them in this order.
    first, second = sorted((label, new))
    with ctx.manager.holding(first), ctx.manager.holding(second):
        ctx.manager.copy(label, new)
    ctx.out.note(f"{new} is a copy of {label}; to start it: kodemachine {new}")
    return 0


@command("delete", LABELS, option("-f", "--force", action="store_true", help="turn a running machine off first"),
         aliases=["rm"], examples=["delete project-alpha", "delete --force project-alpha project-beta"])
def cmd_delete(ctx: Context, opts: Arguments) -> int:
    """delete machines, and show the space that this freed"""
    def delete(label: str) -> str:
        freed = ctx.manager.delete(ctx.manager.find(label), force=opts.force, measure=True)
        return "deleted" if freed is None else f"deleted, freed {size_text(freed)}"
    return each_locked(ctx, chosen(ctx, opts), "deleting", delete)


# What `purge` does with a machine. Any other text is the reason why one that matches is skipped.
PURGED, RUNNING, UNKNOWN, OTHER = "purged", "running", "unknown", "other"


def purge_verdict(ctx: Context, opts: Arguments, fleet: Fleet, machine: Machine, image: str | None) -> str:
    """PURGED, RUNNING, UNKNOWN (it may match the filters or not), OTHER (it does not match), or a problem."""
    power, origin = machine.power, machine.record.image
    age = age_of(machine.record.created)
    if opts.older_than is not None and age is None:
        return UNKNOWN
    if image is not None and not origin:
        return UNKNOWN
    if opts.older_than is not None and age is not None and age < opts.older_than:
        return OTHER
    if image is not None and image != origin:
        return OTHER
    if len(fleet.named(machine.name)) > 1:
        return f"its UUID is {machine.uuid}, and another machine has the same name"
    if power is Power.STOPPED:
        return PURGED
    if power in (Power.STARTED, Power.PAUSED):
        may_stop = opts.all or ctx.manager.is_orphan(machine)
        return PURGED if may_stop else RUNNING
    if power is Power.UNKNOWN or opts.all:
        return f"it is {power.word}"
    return RUNNING


def select_for_purge(ctx: Context, opts: Arguments) -> tuple[list[Machine], int]:
    """The machines to delete, and the exit status so far: not 0 if one that matches had to be skipped."""
    fleet = ctx.manager.fleet()
    # A whole name that a clone comes from, or else a version or any name.
    image, images = opts.image, {machine.record.image for machine in fleet.clones}
    if image is not None and image not in images:
        image = whole_name(image)
    found: dict[str, list[Machine]] = {PURGED: [], RUNNING: [], UNKNOWN: [], OTHER: []}
    status = 0
    for machine in fleet.clones:
        verdict = purge_verdict(ctx, opts, fleet, machine, image)
        if verdict in found:
            found[verdict].append(machine)
        else:
            ctx.out.note(f"skipped {machine.name}: {verdict}")
            status = WrongState.status
    if image is not None and image not in images:
        ctx.out.note(f"no machine is known to be cloned from {opts.image}")
    if found[RUNNING]:
        running = counted(len(found[RUNNING]), "machine")
        ctx.out.note(f"skipped {running}: running or paused (--all deletes those too)")
    if found[UNKNOWN]:
        ctx.out.note(f"skipped {counted(len(found[UNKNOWN]), 'machine')} of unknown age or image")
    return found[PURGED], status


def show_purge(ctx: Context, opts: Arguments, machines: Sequence[Machine], facts: Sequence[Facts]) -> bool:
    """Shows the machines and the space, and asks. Returns whether to delete them. Raises KodeError after a no."""
    known = [fact.reclaimable for fact in facts if fact.reclaimable is not None]
    amount = f"at least {size_text(sum(known))}" if known else "an unknown amount"
    cells = [machine_cells(ctx, machine, fact) for machine, fact in zip(machines, facts)]
    header = ["LABEL"]
    for heading in ("STATUS", "IMAGE", "AGE", "SIZE", "RECLAIM"):
        # A column without a value, or with the usual status, has nothing to decide by.
        if {row[heading] for row in cells} - {"-", Power.STOPPED.word}:
            header.append(heading)
    shown = table(machine_columns(ctx, header, cells))
    number = counted(len(machines), "machine")
    if opts.dry_run:
        ctx.out.result(shown)
        ctx.out.note(f"would delete {number} and free {amount} of disk space")
        return False
    ctx.out.note(shown, needed=not opts.yes)
    if not opts.yes and not ctx.out.confirm(f"Delete {number} and free {amount} of disk space?", "purge"):
        raise KodeError("nothing was deleted")
    return True


def purge_one(ctx: Context, shown: Machine, *, everything: bool) -> str:
    """Deletes one machine, if it is still the one that was shown. Returns a line for the person."""
    manager, label = ctx.manager, str(shown.label)
    try:
        with manager.holding(label, wait=False):
            machine = manager.fleet(partial=True).find(label)
            if machine.uuid != shown.uuid:
                return f"skipped {label}: it is another machine now"
            force = everything or manager.is_orphan(machine)
            if machine.power is not Power.STOPPED and not force:
                return f"skipped {label}: it is {machine.power.word} now"
            manager.delete(manager.vm(machine), force=force)
    except NotFound:
        return f"{label} is already gone"
    except Busy as failure:
        return f"skipped {label}: {failure.message}"
    return f"{label} deleted"


def delete_shown(ctx: Context, opts: Arguments, machines: Sequence[Machine], facts: Sequence[Facts]) -> int:
    """Deletes machines that were shown, and reports the space gained. Returns the status of the first failure."""
    manager = ctx.manager
    shown = {str(machine.label): machine for machine in machines}
    before = free_space(manager.documents)
    status = each(ctx, list(shown), "deleting", lambda label: purge_one(ctx, shown[label], everything=opts.all))
    remaining = {machine.uuid for machine in manager.fleet().machines}
    deleted = [fact.reclaimable for fact in facts if fact.reclaimable and fact.uuid not in remaining]
    after = free_space(manager.documents)
    if before is not None and after is not None:
        gained = max(0, after - before)
        ctx.out.note(f"the volume gained {size_text(gained)}")
        if gained < sum(deleted) * 0.9 and sys.platform == "darwin":
            ctx.out.note("Less than expected: local snapshots may still hold the blocks. "
                         "To list them: tmutil listlocalsnapshots /")
    return status


@command("purge", option("--stopped", action="store_true", help="stopped machines (the default)"),
         option("--all", action="store_true", help="running and paused ones too"),
         option("--older-than", type=period, metavar="AGE", help="created longer ago than this, such as 7d"),
         option("--image", metavar="IMAGE", help="cloned from this image"),
         option("-n", "--dry-run", action="store_true", help="only show what would be deleted"), YES, JSON,
         aliases=["prune"],
         examples=["purge --dry-run", "purge --older-than 7d", "purge --all --image kodeimage-v0.1.0"])
def cmd_purge(ctx: Context, opts: Arguments) -> int:
    """delete many machines, after showing them and the space that this frees"""
    if opts.all and opts.stopped:
        raise UsageError("either --stopped or --all, not both", "See: kodemachine help purge")
    if opts.as_json and not opts.dry_run:
        raise UsageError("--json is only for --dry-run", "kodemachine purge --dry-run --json")
    machines, status = select_for_purge(ctx, opts)
    if not opts.dry_run:
        ctx.manager.forget_missing()
    facts = ctx.manager.describe(machines, ip=False, sizes=True) if machines else []
    if opts.as_json:
        ctx.out.json([fact._asdict() for fact in facts])
        return status
    if not machines:
        ctx.out.note("nothing to purge")
        return status
    if show_purge(ctx, opts, machines, facts):
        status = delete_shown(ctx, opts, machines, facts) or status
    return status


@command("base list", SIZE, JSON, aliases=["ls"], examples=["base list"])
def cmd_base_list(ctx: Context, opts: Arguments) -> int:
    """list the images, the one for new machines, and the number of clones of each"""
    manager, out = ctx.manager, ctx.out
    fleet = manager.fleet(partial=True)
    origins = [machine.record.image_uuid for machine in fleet.clones]
    images: list[dict[str, Any]] = []

    def by_version(image: Machine) -> tuple[str, list[int]]:
        return IMAGE.sub("", image.name), [int(number) for number in re.findall(r"\d+", image.name)]
    for fact in manager.describe(sorted(fleet.images, key=by_version), ip=False, sizes=opts.size):
        images.append({"name": fact.name, "uuid": fact.uuid, "status": fact.status, "size": fact.size,
                       "configured": fact.name == fleet.default_image, "clones": origins.count(fact.uuid)})
    if opts.as_json:
        out.json(images)
        return 0
    if fleet.default_image and not fleet.named(fleet.default_image):
        out.warn(f"base_image is {fleet.default_image}, which does not exist")
    if not images:
        out.note("no images yet; to create one: kodemachine base create v0.1.0")
        return 0
    header = ["", "IMAGE", "STATUS", "CLONES"]
    if opts.size:
        header.append("SIZE")
    rows = []
    for image in images:
        # It marks the image for new machines.
        star = "*" if image["configured"] else ""
        rows.append([star, image["name"], image["status"], str(image["clones"]), size_text(image["size"])])
    out.result(table(fitted_columns(ctx, header, rows, ("SIZE", "CLONES"))))
    return 0


@command("base use", option("image", metavar="IMAGE", help="its name in UTM, version or UUID"),
         examples=["base use kodeimage-v0.2.0"])
def cmd_base_use(ctx: Context, opts: Arguments) -> int:
    """choose the image for new machines"""
    with ctx.manager.fleet_lock():
        image = ctx.manager.fleet().image(opts.image)
        ctx.config.set("base_image", image.name)
    ctx.out.note(f"new machines are cloned from {image.name}")
    return 0


def step_table(steps: Sequence[Step]) -> str:
    """The steps of a seal, one per line."""
    return table(list(zip(("STEP", "", ""), *steps)))


def seal(ctx: Context, sealer: Sealer, opts: Arguments) -> bool:
    """Shows the steps, asks, and seals. Returns False with --check, which changes nothing. Raises KodeError."""
    out, vm = ctx.out, sealer.vm
    was_off = vm.power is Power.STOPPED
    if opts.check and vm.power is not Power.STARTED:
        raise WrongState(f"{vm.name} is {vm.power.word}; --check needs a running machine", "Start it in UTM first.")
    sealer.wake(ctx.manager.settings.boot_timeout)
    steps = sealer.ask("check")
    if opts.check:
        out.result(step_table(steps))
        sealer.must(steps)
        return False
    out.note(step_table(steps), needed=not opts.yes)
    sealer.must(steps)
    if not opts.yes and not out.confirm(f"Seal {vm.name} and shut it down?", "base seal"):
        if was_off:
            sealer.power_off()
        raise KodeError("nothing was changed")
    needs_password = any(step.name == "sudo" and step.status == "warn" for step in steps)
    sudo = False
    if needs_password and not opts.yes and out.can_ask:
        sudo = out.confirm(f"May {sealer.user} become root without a password?", "sudo")
    applied = sealer.apply(sudo=sudo)
    out.note(step_table([step for step in applied if step.status != "ok"]))
    return True


@command("base seal", option("vm", help="its name or UUID in UTM, or its label"),
         option("--as", dest="image", type=version, metavar="vX.Y.Z", help="then copy it to the image of that version"),
         option("--check", action="store_true", help="only show what would change"), YES,
         examples=["base seal --check project-alpha", "base seal project-alpha --as v0.2.0"])
def cmd_base_seal(ctx: Context, opts: Arguments) -> int:
    """prepare a machine to be an image: remove its identity, and shut it down"""
    manager, out = ctx.manager, ctx.out
    if not (opts.yes or opts.check):
        out.must_be_able_to_ask("base seal")
    images = Images(manager)
    with images.sealing(opts.vm) as vm:
        image = None
        if opts.image and not opts.check:
            image = images.resume_copy(vm, opts.image)
        if not image:
            user = user_name(manager.settings.ssh_user)
            sealer = Sealer(manager, vm, user, public_key(manager.utm, manager.settings.identity_file))
            if not seal(ctx, sealer, opts):
                return 0
            image = images.copy(vm, opts.image) if opts.image else None
    if image:
        report_image(ctx, image, manager.fleet().default_image == image.name)
    else:
        out.note(f"{vm.name} is sealed and off. Its name makes it an image: rename it in UTM to kodeimage-vX.Y.Z")
    return 0


def xdg_folder(variable: str, default: str) -> str:
    """The folder of kodemachine in the one that an environment variable names, if that is absolute, or the default."""
    base = os.environ.get(variable) or ""
    if not os.path.isabs(base):
        base = os.path.expanduser(default)
    return os.path.join(base, "kodemachine")


def use_if_only(ctx: Context, vm: VM) -> bool:
    """Configures an image if it is the only one and none is configured. Returns whether new machines come from it."""
    with ctx.manager.fleet_lock():
        fleet = ctx.manager.fleet()
        # Another run may have set it meanwhile.
        configured = ctx.config.settings().base_image
        if configured:
            return configured in (vm.name, vm.uuid)
        if {image.uuid for image in fleet.images} <= {vm.uuid}:
            try:
                ctx.config.set("base_image", vm.name)
                return True
            except KodeError as failure:
                # The image is made. Unless another one is, it is the default without this.
                ctx.out.warn(f"{failure.message}. {failure.hint}")
    return fleet.default_image == vm.name


@command("base create", option("name", metavar="vX.Y.Z", type=version, help="the image's version"),
         option("--image", metavar="URL|FILE", help="a cloud image in qcow2 format instead of Ubuntu 24.04"),
         option("--disk", type=disk_size, default=64 << 30, metavar="SIZE", help="size of the virtual disk (64G)"),
         option("--cpus", type=count, default=4, metavar="N", help="CPUs of its clones (4)"),
         option("--memory", type=mebibytes, default=4096, metavar="SIZE", help="memory of its clones (4G)"),
         option("--user", metavar="NAME", help="the user in it (ssh_user, or your login name)"),
         examples=["base create v0.1.0", "base create v0.1.0 --disk 128G --memory 8G"])
def cmd_base_create(ctx: Context, opts: Arguments) -> int:
    """create an image: download a cloud image, verify it, set it up, and seal it"""
    settings = ctx.manager.settings
    user = user_name(opts.user or settings.ssh_user)
    key = public_key(ctx.manager.utm, settings.identity_file)
    plan = Plan(opts.name, opts.image, opts.disk, opts.cpus, opts.memory, user, key)
    creator = Creator(ctx.manager, xdg_folder("XDG_CACHE_HOME", "~/.cache"), plan)
    vm = creator.create()
    is_default = use_if_only(ctx, vm)
    creator.done(vm)
    report_image(ctx, vm, is_default)
    if opts.user not in (None, settings.ssh_user):
        ctx.out.note(f"Its user is {user}; for ssh: kodemachine config set ssh_user {user}")
    return 0


KNOWN_KEYS = "Keys: " + ", ".join(SETTINGS)


def show_settings(ctx: Context, key: str | None, *, as_json: bool) -> None:
    """Shows the value of one key, or all keys with their values."""
    values = ctx.manager.settings._asdict()
    if key is not None and key not in values:
        raise UsageError(f"unknown key {key!r}", KNOWN_KEYS)
    if as_json:
        ctx.out.json(values if key is None else values[key])
        return
    shown = values if key is None else {key: values[key]}
    for name, value in shown.items():
        text = "" if value is None else str(value)
        ctx.out.result(f"{name} = {text}" if key is None else text)


@command("config", option("action", nargs="?", choices=["get", "set", "unset", "path"], help="get, set, unset or path"),
         option("key", nargs="?", help="one key"), option("value", nargs="?", help="its new value"), JSON,
         examples=["config", "config get base_image", "config set ssh_user me", "config unset ssh_user"])
def cmd_config(ctx: Context, opts: Arguments) -> int:
    """show or change the configuration"""
    action, key, value = opts.action or "get", opts.key, opts.value
    set_it = command_line(["config", "set", str(key), str(value)])
    mistakes = {"path": (key is not None, "config path takes no other words", "kodemachine config path"),
                "set": (value is None, "config set needs a key and a value", KNOWN_KEYS),
                "unset": (key is None or value is not None, "config unset needs one key", KNOWN_KEYS),
                "get": (value is not None, "config get takes one key and no value", f"To set it: {set_it}")}
    is_mistake, message, hint = mistakes[action]
    if is_mistake:
        raise UsageError(message, hint)
    if action == "path":
        ctx.out.result(ctx.config.path)
        return 0
    if action == "get":
        show_settings(ctx, key, as_json=opts.as_json)
        return 0
    path = os.path.expanduser(value or "")
    if key == "first_boot" and os.path.exists(path):
        open_script(path).close()
    with ctx.manager.state.lock("fleet", 30, what="the list of machines"):
        # An empty value unsets it too.
        if value:
            ctx.config.set(key, value)
        else:
            ctx.config.unset(key)
    if key in PATHS and value and not os.path.exists(path):
        ctx.out.warn(f"{key}: {value} does not exist yet")
    return 0


PASTE = "To show the lines and paste them: kodemachine ssh-config"


def write_stanza(path: str, stanza: str) -> None:
    """Writes kodemachine's own file for ssh. Raises KodeError."""
    with explained(path):
        existing = read_text(path, "surrogateescape")
    if existing and " proxy %h" not in existing:
        raise KodeError(f"{path} is not kodemachine's file and is not replaced",
                        "Keep config.json in a folder of its own, or paste the lines of: kodemachine ssh-config")
    if existing != stanza:
        write_file(path, stanza, PASTE)


def include_first(theirs: str, include: str) -> None:
    """Makes a line the first one of the person's ssh configuration. Raises KodeError.

    ssh uses the first value that it finds, and below a Host line the line would count only for that host.
    """
    with explained(theirs, PASTE):
        before = read_text(theirs, "surrogateescape") or ""
    if before.startswith(include + "\n"):
        return
    others = "".join(line for line in before.splitlines(keepends=True) if line.strip() != include)
    hint = f"Add this line before all others of {theirs}: {include}"
    # A file that had the line already has a backup from before.
    if before and others == before:
        write_file(theirs + ".before-kodemachine", before, hint)
    write_file(os.path.realpath(theirs), f"{include}\n\n{others}", hint)


def install_stanza(ctx: Context, stanza: str) -> None:
    """Lets ssh use the stanza before all else, and proves it. Raises KodeError."""
    ours = os.path.join(os.path.dirname(ctx.config.path), "ssh_config")
    write_stanza(ours, stanza)
    # ssh takes these for a pattern (glob(3)).
    include_first(os.path.expanduser("~/.ssh/config"), 'Include "' + re.sub(r"[][*?]", r"\\\g<0>", ours) + '"')
    overruled = ctx.manager.ssh.overruled()
    if overruled:
        host = ctx.manager.settings.prefix + "x"
        raise KodeError(f"~/.ssh/config now includes {ours}, but ssh uses: {', '.join(overruled[:3])}",
                        f"To see the files that ssh reads: ssh -v {host}\n"
                        "To show the lines for the top of one of them: kodemachine ssh-config")


@command("ssh-config", option("--install", action="store_true", help="include it in ~/.ssh/config"),
         examples=["ssh-config --install"])
def cmd_ssh_config(ctx: Context, opts: Arguments) -> int:
    """let ssh, scp, rsync, git and editors use machines by name"""
    ssh, prefix = ctx.manager.ssh, ctx.manager.settings.prefix
    stanza = f"Host {prefix}*\n"
    for key, value in ssh.name_options().items():
        stanza += f"  {key} {value}\n"
    if not opts.install:
        ctx.out.result(stanza.rstrip())
        ctx.out.note("Paste this before the first Host line of ~/.ssh/config, or: kodemachine ssh-config --install")
        return 0
    # Another program may manage the files, and have these lines already.
    if ssh.overruled():
        install_stanza(ctx, stanza)
    remedy = ssh.start_up_noise()
    if remedy:
        raise KodeError(f"ssh {prefix}LABEL does not work yet, because {NOISE}", remedy)
    ctx.out.note(f"ssh {prefix}LABEL works now")
    return 0


# Seconds for ssh to receive the socket that is passed to it.
FDPASS_LIMIT = 10.0


def pass_socket(handle: int) -> None:
    """Passes a connected socket to ssh, through stdout (ProxyUseFdpass)."""
    import socket

    os.set_blocking(handle, True)
    with socket.socket(fileno=os.dup(1)) as ssh:
        socket.send_fds(ssh, [b"\0"], [handle])
        # macOS may discard a socket in flight whose sender has gone. ssh closes its end when it has the socket.
        select.select([ssh], [], [], FDPASS_LIMIT)


def relay_socket(handle: int) -> None:
    """Relays between a connected socket and stdin and stdout, until both ends are closed."""
    import socket

    os.set_blocking(handle, False)

    def hang_up() -> None:
        # The guest may have closed the connection already.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(handle)) as connection:
            connection.shutdown(socket.SHUT_WR)

    relay = SerialRelay(handle, 0, 1, b"", None)
    relay.relay(None, hang_up)
    relay.close()


@command("proxy", option("name", help="the machine's name, with the prefix"),
         option("--learning", action="store_true", help="an unknown host key will be learned"), hidden=True)
def cmd_proxy(ctx: Context, opts: Arguments) -> int:
    """for ssh's ProxyCommand: connect to a running machine by name"""
    import socket

    manager, port = ctx.manager, ctx.manager.settings.ssh_port
    label = label_in(opts.name, manager.settings.prefix)
    if label is None:
        raise NotFound(f"{opts.name} is not the name of a machine", "To see the machines: kodemachine list")
    # Progress would appear in the output of ssh, rsync and git. A warning does.
    ctx.out.quiet = True
    with manager.holding(label):
        vm, address, pinned = manager.running(label)
    if not (pinned or opts.learning):
        ctx.out.warn(f"the host key of {vm.name} is not known yet; to learn it: kodemachine ssh {label}")
    try:
        connection = socket.create_connection((address, port), timeout=10)
    except OSError:
        # It may be booting.
        limit = seconds_text(manager.settings.boot_timeout)
        ctx.out.warn(f"{vm.name} does not answer at {address} yet; waiting for its ssh server for up to {limit}")
        address = vm.wait_for_ssh(port, manager.settings.boot_timeout)
        try:
            connection = socket.create_connection((address, port), timeout=10)
        except OSError as failure:
            raise KodeError(f"{vm.name} does not answer at {address}: {failure.strerror or failure}",
                            f"Check its console: kodemachine attach {label}") from None
    with connection:
        if stat.S_ISSOCK(os.fstat(1).st_mode):
            pass_socket(connection.fileno())
        else:
            relay_socket(connection.fileno())
    return 0
# ---- parser

USAGE = """\
kodemachine [-v | -q] [--config FILE] <label> [options] [-- command ...]
       kodemachine [-v | -q] [--config FILE] <command> ..."""
TITLE = "A fresh, isolated Linux machine in seconds, from a golden image in UTM."
EPILOG = """\
kodemachine project-alpha              a shell in a machine of its own, created if it is missing
kodemachine project-alpha -- make      run one command there
kodemachine list                       the machines and their addresses
kodemachine stop project-alpha         shut it down
kodemachine purge                      delete the stopped machines"""
# The headings of the help, and the commands below them.
TOPICS = {"work in a machine": "start ssh exec cp attach", "show": "list status ip doctor",
          "turn off, keep, delete": "stop restart suspend resume clone delete purge",
          "images, settings, other tools": "base config ssh-config completion help"}
# Commands that use the words after `--`.
TAKES_REST = ("start", "ssh", "exec", "__complete")
# Options that every command accepts. Their defaults are set once, by the parser of the whole command line.
GLOBAL_OPTIONS = (
    option("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show each call to UTM"),
    option("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress"),
    option("--config", metavar="FILE", default=argparse.SUPPRESS, help="another configuration file"))
HELP_OPTIONS = ("-h", "--help")
TEXT_OPTIONS = (*HELP_OPTIONS, "--version")
GLOBAL_NAMES = {name for names, _ in GLOBAL_OPTIONS for name in names}


def overview() -> str:
    """The commands by topic."""
    paragraphs = []
    for topic, words in TOPICS.items():
        lines = [f"  {word:11} {GROUPS.get(word) or COMMANDS[word].summary}" for word in words.split()]
        paragraphs.append("\n".join([topic + ":", *lines]))
    return "\n\n".join(paragraphs)


def options_with_value() -> set[str]:
    """The names of all options, of all commands, that are followed by a value."""
    found: set[str] = set()
    for options in (GLOBAL_OPTIONS, *(entry.options for entry in COMMANDS.values())):
        for names, how in options:
            if names[0].startswith("-") and not str(how.get("action", "")).startswith("store_"):
                found.update(names)
    return found


def leading_options(words: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The options before the first command or label, each with its value, and the words from that one."""
    with_value = options_with_value()
    options = []
    others = list(words)
    while others and others[0].startswith("-") and others[0] != "-":
        length = 2 if others[0] in with_value else 1
        options.append(others[:length])
        others = others[length:]
    return options, others


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str] | None, bool]:
    """The words before the first `--`, the words after it (None without `--`), and whether a label is without command.

    `start` is inserted before such a label.
    """
    words = list(argv)
    rest = None
    if "--" in words:
        dashes = words.index("--")
        words, rest = words[:dashes], words[dashes + 1:]
    options, others = leading_options(words)
    known = {name.partition(" ")[0] for name in SPELLINGS}
    if not others or others[0] in known or any(option[0] in TEXT_OPTIONS for option in options):
        return words, rest, False
    words.insert(len(words) - len(others), "start")
    return words, rest, True


def unknown_option(name: str, word: str) -> UsageError:
    """The error for a word that a command, or kodemachine alone, does not take."""
    topic = ["help", *name.split()]
    return UsageError(f"{name or 'kodemachine'} does not take {word!r}", f"See: {command_line(topic)}")


def check_order(words: Sequence[str], rest: Sequence[str] | None) -> None:
    """Raises UsageError for an option of a command that comes before the command."""
    options, others = leading_options(words)
    common: list[str] = []
    misplaced: list[str] = []
    for option in options:
        is_common = option[0].partition("=")[0] in GLOBAL_NAMES
        (common if is_common else misplaced).extend(option)
    if not misplaced or any(option[0] in TEXT_OPTIONS for option in options):
        return
    typed = misplaced[0].partition("=")[0]
    name = SPELLINGS.get(" ".join(others[:2])) or SPELLINGS.get(" ".join(others[:1]), "")
    if not name or not any(typed in names for names, _ in COMMANDS[name].options):
        raise unknown_option(name, typed)
    length = len(name.split())
    if rest is not None and typed in ("-d", "--detach"):
        labels = [word for word in others[length:] if not word.startswith("-")]
        raise UsageError(DETACH_EXCLUDES_COMMAND, start_then_run(labels, rest))
    meant = [*common, *others[:length], *misplaced, *others[length:]]
    raise UsageError(f"{typed} goes after the command", command_line(meant, rest))


class Parser(argparse.ArgumentParser):
    """argparse with the program's own errors: one line and a hint."""

    def __init__(self, **form: Any) -> None:
        """Later options replace earlier ones of the same name: `list -q` has its own meaning."""
        super().__init__(allow_abbrev=False, conflict_handler="resolve",
                         formatter_class=argparse.RawDescriptionHelpFormatter, **form)

    def format_help(self) -> str:
        """The help, wrapped for the terminal: argparse wraps only its own lists."""
        return fitted_help(super().format_help(), terminal_columns(1))

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        program, *words = self.prog.split()
        message = re.sub("^the following arguments are required: ", f"{' '.join(words)} needs: ", message)
        raise UsageError(message, f"See: {' '.join([program, 'help', *words])}")


def add_parser(commands: Any, word: str, text: str, options: Sequence[Option], **form: Any) -> Parser:
    """Adds the parser of a command or group, which accepts the global options too, without a mention in its help."""
    parser: Parser = commands.add_parser(word, help=text, description=text, **form)
    for names, how in GLOBAL_OPTIONS:
        parser.add_argument(*names, **{**how, "help": argparse.SUPPRESS})
    for names, how in options:
        parser.add_argument(*names, **how)
    return parser


def add_group(commands: Any, group: str) -> Any:
    """Adds a group of commands. Without one of them, it shows its help. Returns the place for its commands."""
    parser = add_parser(commands, group, GROUPS[group], ())
    parser.set_defaults(run=COMMANDS["help"].run, topic=[group], name=group)
    return parser.add_subparsers(metavar="command", parser_class=Parser)


def add_command(commands: Any, name: str, *, wants_help: bool) -> None:
    """Adds the parser of one command, from the table."""
    entry = COMMANDS[name]
    examples = "\n  kodemachine ".join(["examples:", *entry.examples])
    parser = add_parser(commands, name.rpartition(" ")[2], entry.summary, entry.options,
                        aliases=list(entry.aliases), epilog=examples)
    parser.set_defaults(run=entry.run, name=name)
    if wants_help and name in TAKES_REST:
        usage = parser.format_usage().partition(" ")[2].rstrip()
        parser.usage = f"{usage} -- command ..." if name == "exec" else f"{usage} [-- command ...]"


def build_parser(words: Sequence[str] = HELP_OPTIONS) -> Parser:
    """The parser of everything before the first `--`. No I/O.

    It has only the commands that are among `words`, because each costs time; all of them if `words` ask for help.
    """
    parser = Parser(prog="kodemachine", usage=USAGE, description=TITLE)
    for names, how in GLOBAL_OPTIONS:
        parser.add_argument(*names, **how)
    parser.add_argument("--version", action="version", version=f"kodemachine {__version__}")
    parser.set_defaults(verbose=False, quiet=False, config=None, run=None, name="")
    # The epilog has the commands, by topic.
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser, prog="kodemachine",
                                     help=argparse.SUPPRESS)
    wants_help = not set(HELP_OPTIONS).isdisjoint(words)
    if wants_help:
        parser.epilog = f"{overview()}\n\n{EPILOG}"
    wanted = {name for spelling, name in SPELLINGS.items() if wants_help or spelling.partition(" ")[0] in words}
    groups: dict[str, Any] = {"": commands}
    for name in COMMANDS:
        group = name.rpartition(" ")[0]
        if name in wanted:
            if group not in groups:
                groups[group] = add_group(commands, group)
            add_command(groups[group], name, wants_help=wants_help)
    return parser


# Words of tools that share folders.
SHARING_WORDS = ("mount", "share", "sync", "rsync")


def corrected(name: str, operands: Sequence[str]) -> str:
    """The command line that was probably meant: the command with these operands, or else its help."""
    words = [name, *operands]
    instead = f"See: {command_line(['help', name])}"
    if name.startswith("-"):
        return command_line([name])
    if name in ("ssh", "exec") and len(operands) > 1:
        return command_line(words[:2], operands[1:])
    if name == "clone" and len(operands) == 1:
        return command_line([*words, operands[0] + "-2"])
    # The parser does not know what else these commands need.
    has_remote = ":" in "".join(operands)
    lacks_more = {"exec": True, "start": len(operands) > 1, "cp": len(operands) < 2 or not has_remote}
    if not operands or lacks_more.get(name):
        return instead
    try:
        build_parser(words).parse_args(words)
    except UsageError:
        return instead
    return command_line(words)


def no_shared_folders(operands: Sequence[str]) -> UsageError:
    """The error for an attempt to share a folder with a machine."""
    copy = command_line(["help", "cp"])
    if len(operands) == 2 and LABEL.fullmatch(operands[1]):
        copy = command_line(["cp", "-r", operands[0], operands[1] + ":"])
    return UsageError("there are no shared folders: no folder of the Mac is in a guest",
                      f"To copy files: {copy}; for rsync: kodemachine ssh-config --install")


def unknown_command(word: str, operands: Sequence[str] = ()) -> UsageError:
    """The error for a word that is not a command. With operands it may be a label, which must be alone."""
    if operands and word in SHARING_WORDS:
        return no_shared_folders(operands)
    inside = command_line([word], operands)
    meant = SPELLINGS.get(operands[0]) if operands else None
    if meant and operands_of(meant) and operands_of(meant)[0][0][0] in ("label", "labels"):
        return UsageError("the command comes before the label",
                          f"{corrected(meant, [word, *operands[1:]])}; or, to run it in that machine: {inside}")
    near = near_command(word, command_words())
    if near:
        return UsageError(f"unknown command {word!r}; did you mean {near!r}?", corrected(near, operands))
    if not operands:
        return UsageError(f"unknown command {word!r}", "See: kodemachine help")
    hint = f"To run a command in that machine: {inside}"
    if RESERVED.isdisjoint(operands):
        hint += f"; to start several: {command_line(['start', '-d', word, *operands])}"
    return UsageError(f"unknown command {word!r}", hint)


def unknown_words(opts: Arguments, words: Sequence[str], unknown: Sequence[str]) -> UsageError:
    """The error for words that the command does not take."""
    if opts.bare and (len(opts.labels) > 1 or near_command(opts.labels[0], command_words())):
        return unknown_command(opts.labels[0])
    options = [word for word in unknown if word.startswith("-")]
    if not options and opts.name in TAKES_REST and opts.rest is None:
        before = words[:len(words) - len(unknown)]
        return UsageError(f"{opts.name} does not take {unknown[0]!r}",
                          f"A command for the machine goes after --: {command_line(before, unknown)}")
    return unknown_option(opts.name, (options or unknown)[0])


def parse(argv: Sequence[str]) -> Arguments:
    """The command line as values, `rest` and `bare` among them. Raises UsageError, or SystemExit after help."""
    words, rest, bare = split_command_line(argv)
    check_order(words, rest)
    opts, unknown = build_parser(words).parse_known_args(words)
    opts.rest, opts.bare = rest, bare
    operands = getattr(opts, "labels", getattr(opts, "paths", None))
    if operands is not None and not any(word.startswith("-") for word in unknown):
        # argparse does not expect labels and paths after an option.
        operands.extend(unknown)
    elif unknown:
        raise unknown_words(opts, words, unknown)
    if bare and len(opts.labels) > 1:
        raise unknown_command(opts.labels[0], opts.labels[1:])
    if opts.verbose and opts.quiet:
        raise UsageError("-v and -q exclude each other", "See: kodemachine help")
    if rest is not None and opts.name not in TAKES_REST:
        message = f"{opts.name} takes no command after --" if opts.name else "there is no label before --"
        example = command_line(["project-alpha"], rest or ["make"])
        raise UsageError(message, f"To run a command in a machine, for example: {example}")
    return opts
# ---- completion, help, first screen

# Each script asks the program itself, so nothing in it becomes outdated. For the names of files, and when the program
# offers nothing, each shell does what it does without the script.
#
# Each works with the options that a person may have set: of zsh, ksh_arrays or ignore_braces; of bash, another IFS,
# failglob or posix, in which 3.2 of macOS has no <(). That bash has neither compopt nor mapfile; so each word brings
# the blank that ends it.
COMPLETIONS = {"bash": r"""# for ~/.bashrc: eval "$(kodemachine completion bash)"
_kodemachine() {
  local line=${COMP_LINE:0:COMP_POINT} word found end IFS=$' \t\n'
  local -a words
  read -r -a words <<<"$line"
  [[ $line != *[[:blank:]] ]] || words[${#words[@]}]=
  word=${words[${#words[@]} - 1]}
  COMPREPLY=()
  while IFS=$'\t' read -r found _; do
    [[ -n $found && $found == "$word"* ]] || continue
    [[ $found == *: ]] || found+=' '
    COMPREPLY[${#COMPREPLY[@]}]=$found
  done <<<"$(kodemachine __complete -- "${words[@]:1}" 2>/dev/null)"
  if [[ ${#COMPREPLY[@]} == 0 ]]; then
    compopt +o nospace 2>/dev/null
    return
  fi
  # Bash breaks words at these characters, too: it has the part before them already.
  end=${word%"${word##*[:=]}"}
  [[ -z $end || $COMP_WORDBREAKS != *:* ]] || COMPREPLY=("${COMPREPLY[@]#"$end"}")
}
complete -o default -o nospace -F _kodemachine kodemachine
""", "zsh": r"""#compdef kodemachine
# for ~/.zshrc: eval "$(kodemachine completion zsh)"
_kodemachine() {
  local line word found=1
  local -a whole open
  for line in "${(@f)$(kodemachine __complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}"; do
    word=${line%%$'\t'*}
    case $word in
      '') ;;
      *:) open+=("$word") ;;
      *) whole+=("${word//:/\\:}:${line#*$'\t'}") ;;
    esac
  done
  (( ! $#whole )) || { _describe kodemachine whole && found=0; }
  (( ! $#open )) || { compadd -S '' -a open && found=0; }
  (( ! found )) || { _files && found=0; }
  return found
}
if [[ ${funcstack[1]-} == _kodemachine ]]; then
  _kodemachine "$@"
else
  if (( ! ${+functions[compdef]} )); then
    autoload -Uz compinit && compinit -i
  fi
  compdef _kodemachine kodemachine
fi
""", "fish": r"""# for ~/.config/fish/config.fish: kodemachine completion fish | source
function __kodemachine
    set -l words (commandline -opc) (commandline -ct)
    kodemachine __complete -- $words[2..-1] 2>/dev/null
end
complete -c kodemachine -a '(__kodemachine)'
"""}


@command("completion", option("shell", choices=list(COMPLETIONS), help="your shell"), examples=["completion zsh"])
def cmd_completion(ctx: Context, opts: Arguments) -> int:
    """print a script that lets the shell complete commands, labels and images"""
    ctx.out.result(COMPLETIONS[opts.shell].rstrip("\n"))
    return 0


def options_at(name: str | None) -> list[Option]:
    """The options that are possible at a place with that name."""
    options: list[Option] = [(HELP_OPTIONS, {"help": "show the help"})]
    if name == "":
        options.append((("--version",), {"help": "show the version"}))
        options += GLOBAL_OPTIONS
    if name in COMMANDS:
        options += [(names, how) for names, how in COMMANDS[name].options if names[0].startswith("-")]
    return options


def place_after(words: Sequence[str]) -> tuple[str | None, Option | None]:
    """The command before a place, and the argument that comes next. `words`: those before it, without the program.

    The name is that of a group if its command comes next, "" before a command, and None after something unknown.
    """
    name: str | None = ""
    operands: list[Option] = []
    value_of: Option | None = None
    with_value = options_with_value()
    for word in words:
        if value_of:
            value_of = None
        elif word in with_value:
            value_of = next((one for one in [*options_at(name), *GLOBAL_OPTIONS] if word in one[0]), None)
        elif word.startswith("-"):
            continue
        elif name == "" or name in GROUPS:
            name = f"{name} {word}".strip()
            if name not in GROUPS:
                name = SPELLINGS.get(name)
            operands = operands_of(name) if name in COMMANDS else []
        elif operands and operands[0][1].get("nargs") not in ("*", "+"):
            operands.pop(0)
    return name, value_of or next(iter(operands), None)


def known_commands(group: str) -> dict[str, str]:
    """The words of the commands of a group, or with "" the first words of all, each with its help."""
    found = {}
    for name, entry in COMMANDS.items():
        word, _, second = name.partition(" ")
        if group and word == group and second:
            found[second] = entry.summary
        elif not group and not entry.hidden:
            found[word] = GROUPS.get(word) or entry.summary
    return found


# Seconds for one list, when a person waits at a prompt.
GLANCE = 2.0


def known_machines(ctx: Context, ending: str = "", *, images: bool = False) -> dict[str, str]:
    """The labels, each with `ending`, or the images, with their states. Empty if UTM does not answer soon."""
    # No message may appear on the person's command line.
    notes = Notes()
    try:
        settings = Config(ctx.config.path, notes).settings()
        with contextlib.closing(Utmctl(settings.utmctl, ctx.interrupts, notes)) as utm:
            rows = Rows(utm.list_once(GLANCE))
        fleet = Fleet(rows, State(ctx.manager.state.folder, notes).records(), settings)
    except KodeError:
        return {}
    if images:
        return {printable(machine.name): machine.power.word for machine in fleet.images}
    return {f"{machine.label}{ending}": machine.power.word for machine in fleet.clones}


def candidates(ctx: Context, words: Sequence[str], word: str) -> dict[str, str]:
    """The words that are possible after `words`, where `word` was begun, each with its explanation. Not files."""
    place, argument = place_after(words)
    names, how = argument or (("",), {})
    if word.startswith("-") and not names[0].startswith("-"):
        return {name: str(how.get("help", "")) for names, how in options_at(place) for name in names}
    if argument is None and place == "":
        # A label can be in the place of a command.
        return {**known_commands(""), **known_machines(ctx)}
    if argument is None:
        return known_commands(place) if place in GROUPS else {}
    if "choices" in how:
        return dict.fromkeys(how["choices"], "")
    kind = str(how.get("metavar") or names[0]).lower()
    if kind in ("label", "vm"):
        return known_machines(ctx)
    if kind == "image" and names[0] != "--as":
        return known_machines(ctx, images=True)
    if kind == "path":
        return known_machines(ctx, ":")
    return known_commands(" ".join(words[1:])) if kind == "command" else {}


@command("__complete", hidden=True)
def cmd_complete(ctx: Context, opts: Arguments) -> int:
    """for the shells: the candidates for the last of the words after --, one per line, each with an explanation"""
    *before, word = opts.rest or [""]
    words, rest, _ = split_command_line(before)
    # The words after a second `--` are a command for the guest.
    found = {} if rest is not None else candidates(ctx, words, word)
    lines = [f"{text}\t{explanation}\n" for text, explanation in found.items() if text not in before]
    ctx.out.raw("".join(lines).encode())
    return 0


@command("help", option("topic", nargs="*", metavar="command", help="the command to explain"),
         examples=["help", "help stop"])
def cmd_help(ctx: Context, opts: Arguments) -> int:
    """show this help, or that of one command"""
    topic = " ".join(opts.topic)
    if topic and topic not in SPELLINGS and topic not in GROUPS:
        raise unknown_command(topic)
    build_parser().parse_args([*opts.topic, "--help"])
    return 0


def show_first_screen(ctx: Context, opts: Arguments) -> int:
    """The output of `kodemachine` alone: the lines that a newcomer needs. It asks nothing of UTM."""
    examples = EPILOG.replace("kodemachine ", "  kodemachine ")
    text = (f"{TITLE}\n\n{examples}\n\n"
            "To create the first image: kodemachine base create v0.1.0\n"
            "To check this Mac and UTM: kodemachine doctor\n"
            "All commands: kodemachine help")
    ctx.out.result(fitted_help(text, ctx.out.width))
    return 0
# ---- main


def config_path(opts: Arguments) -> str:
    """The path of the configuration file. Raises UsageError if the file of --config does not exist."""
    if not opts.config:
        return os.path.join(xdg_folder("XDG_CONFIG_HOME", "~/.config"), "config.json")
    path = os.path.abspath(str(opts.config))
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist", f"To begin with the defaults: echo '{{}}' > {shlex.quote(path)}")
    return path


def settings_for(opts: Arguments, config: Config) -> Settings:
    """The settings, or the defaults for commands that must work with a broken configuration. Raises UsageError."""
    changes_config = opts.name == "config" and opts.action in ("path", "set", "unset")
    if changes_config or opts.name in ("", "base", "help", "completion", "__complete"):
        return Settings()
    try:
        return config.settings()
    except UsageError:
        # doctor shows the error as its first finding.
        if opts.name != "doctor":
            raise
        return Settings()


def run_command(argv: Sequence[str], out: Terminal, interrupts: Interrupts) -> int:
    """Parses the command line, builds the layers, and runs the command. Raises KodeError."""
    words, _, _ = split_command_line(argv)
    # Also an error of the command line is JSON then.
    out.as_json = "--json" in words
    opts = parse(argv)
    # A program that reads JSON gets no progress.
    out.quiet, out.verbose = opts.quiet or out.as_json, opts.verbose
    config = Config(config_path(opts), out)
    settings = settings_for(opts, config)
    own_words = ["--config", config.path] if opts.config else []
    utm = Utmctl(settings.utmctl, interrupts, out)
    state = State(xdg_folder("XDG_STATE_HOME", "~/.local/state"), out)
    manager = Manager(settings, utm, state, own_words)
    run = opts.run or show_first_screen
    with contextlib.closing(utm):
        return int(run(Context(manager, out, interrupts, config), opts))


def complete_handles() -> None:
    """Opens those of the three standard handles that are closed. Otherwise the first opened file would become one."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            # open() returns the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs kodemachine and returns its exit status. Only this function turns failures into a status."""
    complete_handles()
    interrupts = Interrupts()
    interrupts.install()
    out = Terminal()
    try:
        try:
            status = run_command(sys.argv[1:] if argv is None else argv, out, interrupts)
        except SystemExit as help_or_version:
            status = int(help_or_version.code or 0)
        # A reader that has gone, or a full disk, is noticed here and not at exit.
        out.raw(b"")
        return status
    except KodeError as failure:
        out.error(failure)
        return failure.status
    except Interrupted as interruption:
        out.end_step()
        return 128 + interruption.number
    except BrokenPipeError:
        discard_output(1)
        return 128 + signal.SIGPIPE
    # Such as a folder that is gone, or a volume without locks.
    except OSError as failure:
        out.error(KodeError(f"{failure.filename or 'the system'}: {failure.strerror or failure}",
                            RUN_AGAIN))
        return KodeError.status


if __name__ == "__main__":
    sys.exit(main())
