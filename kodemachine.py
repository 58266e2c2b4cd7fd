#!/usr/bin/env python3
"""kodemachine: a fresh, isolated Linux machine in seconds, from a golden image in UTM.

    kodemachine project-alpha       clone if missing, start, wait for ssh, become ssh

This file is the whole program. It is installed as one file in ~/bin, compiled (a plain copy works, too), and started
a hundred times a day, so it imports at the top only what every run needs; the rest is imported where it is used.

It reads from top to bottom, and calls go the same way back, never up:

    main -> cmd_* -> Manager -> VM -> Utmctl -> Call     one choke point to the world outside
                  -> Sealer, Creator, Doctor -> Manager
                  -> Console, Out

What shapes it are five facts about utmctl, the command that comes with UTM ("contract N" in the text names
the section of the notes on UTM's behaviour where a fact is shown from UTM's source):

1. Exit status 0 does not mean success: a failed Apple Event is only reported on stderr (contract 0).
2. "Virtual machine not found." does not mean that it is absent; only a clean list says so (contract 0).
3. The words are translated by macOS, the numbers are not (contract 0). We read numbers.
4. Ending utmctl cancels nothing in UTM (contract 0). After every action the state is read again.
5. Names are not unique, and clone returns no UUID (contract 1.5, 3). After the first look a machine is its UUID.
"""
from __future__ import annotations

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
import signal
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

# ---- constants

# Seconds that one call may take before it is ended (contract 10). The state is read afterwards in any case,
# so a limit only bounds how long we listen. `clone` is bounded by its callers.
LIMITS = {"list": 30.0, "status": 20.0, "ip-address": 20.0, "start": 30.0, "stop": 30.0,
          "suspend": 60.0, "delete": 120.0, "osascript": 60.0, "ssh": 10.0}
LOOK_LIMIT = 65.0       # for a clean list, all its repetitions together
WARM_UP = 10.0          # an empty list is not believed before: UTM loads its machines with its window (contract 4)
SETTLE = 10.0           # after a call that failed at once, until "nothing has changed" is believed
UNCHANGED = 5.0         # for so long a half-renamed copy must stay as it is before its rename is completed
ASK_AGAIN = 3.0         # after a start that left the machine stopped
PRESS_AGAIN = 15.0      # after a power key that the guest may have been too young to hear
FORCE_STAGE = 15.0      # for each stage of a forced stop
DELETE_SETTLE = 20.0    # until a deletion without an answer is asked for once more
ADDRESS_LIMIT = 5.0     # for a guest's addresses in a list: its agent may hang (contract 5)
UNIQUE_LIMIT = 30.0     # for comparing and changing network addresses
GLANCE = 2.0            # for a look at the fleet that nobody has asked for: Tab, and the first screen
TOOL_LIMIT = 120.0      # for curl's smaller errands, qemu-img and the like
DOWNLOAD_LIMIT = 14400.0        # for an image, as long as it comes at all: curl sees to that
CREATE_LIMIT = 900.0    # for a new machine's first boot, and then for cloud-init, which may install the guest agent
SEAL_LIMIT = 300.0      # for the script that seals a machine, in which a disk is trimmed
DISK_LIMIT = 3.0        # for reading bundles: macOS may hold the read until a person answers (contract 6)
UNFINISHED = "unfinished-"      # before the name of an image that is being made: no image's name, and no clone's
SPACE_LOW, SPACE_OUT = 10 << 30, 1 << 30     # bytes free on the volume, below which `doctor` warns, or fails
FDPASS_LIMIT = 10.0     # for ssh to take the socket that it is handed
GREETING = 3.0          # for an address to greet as an SSH server, before the connection is tried anew
WIDTH = 8               # utmctl calls at the same time, and machines worked on at the same time
EXEC_OUTPUT = 16 << 20  # bytes of each stream that the guest agent keeps (contract 5)
EXEC_INPUT = 256 << 10  # bytes of input that a guest command takes: macOS limits all arguments of osascript to 1 MiB
EXEC_PIECE = 96 << 10   # characters of that input in one argument: Linux, where the tests run, takes at most 128 KiB
MAX_ANSWER = EXEC_OUTPUT * 4    # bytes that we keep of any stream: both of a guest's, in base64
WHOLE = 0.9             # of the base's allocated size: a smaller drive was not copied to its end (contract 10.13)

DOCUMENTS = "~/Library/Containers/com.utmapp.UTM/Data/Documents"
UTMCTL_PLACES = ("/Applications/UTM.app/Contents/MacOS/utmctl", "~/Applications/UTM.app/Contents/MacOS/utmctl")
LIST_HEADER = "UUID" + " " * 33 + "Status" + " " * 3 + "Name"
UUID = re.compile(r"[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}")
LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
PREFIX = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?-")
IMAGE = re.compile(r"kodeimage-v(\d+)\.(\d+)\.(\d+)")
ISO_TIME = "%Y-%m-%dT%H:%M:%SZ"
MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
EVENT_ERROR = re.compile(r"^Error from event: .*$", re.MULTILINE)
OSSTATUS = re.compile(r"OSStatus[^\d\n]*?(-\d+)")
SCRIPT_ERROR = re.compile(r"(?:\d+:\d+: \S+ error: )?(?:UTM got an error: )?(.*) \((-\d+)\)")
HOST_KEY = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)) ([A-Za-z0-9+/]{40,2000}={0,3})")

UBUNTU = "https://cloud-images.ubuntu.com/releases/24.04/release/ubuntu-24.04-server-cloudimg-{}.img"
CURL = ("-fsSL", "--connect-timeout", "30", "--speed-limit", "1000", "--speed-time", "60")
# What is called beside utmctl.
PROGRAMS = ("osascript", "curl", "hdiutil", "xorriso", "genisoimage", "qemu-img", "sysctl", "ssh")

# Every command and alias, those that are still to come included: a label that was once allowed stays allowed.
RESERVED = frozenset({
    "attach", "base", "clone", "completion", "config", "cp", "create", "delete", "doctor", "exec", "help", "info", "ip",
    "list", "logs", "ls", "proxy", "prune", "purge", "restart", "resume", "rm", "shell", "snapshot", "ssh",
    "ssh-config", "start", "status", "stop", "suspend", "version"})
# What other tools call it, and what it is here. Those that are not reserved stay allowed as labels.
ELSEWHERE = {
    "boot": "start", "launch": "start", "create": "start", "new": "start", "run": "start", "up": "start",
    "connect": "ssh", "enter": "ssh", "login": "ssh", "shell": "ssh", "down": "stop", "halt": "stop", "kill": "stop",
    "poweroff": "stop", "reboot": "stop", "restart": "stop", "shutdown": "stop", "pause": "suspend", "save": "suspend",
    "unpause": "resume", "destroy": "delete", "remove": "delete", "clean": "purge", "copy": "clone", "fork": "clone",
    "snapshot": "clone", "console": "attach", "logs": "attach", "info": "status", "inspect": "status",
    "show": "status", "ps": "list", "image": "base", "images": "base", "init": "base", "settings": "config",
    "version": "--version"}

NOT_ALLOWED = ("macOS does not let this terminal control UTM. Allow it in System Settings > Privacy & Security > "
               "Automation (for a fresh question: tccutil reset AppleEvents). It cannot work from an ssh session "
               "or before somebody has logged in at the screen.")
RUN_AGAIN = "the same command, run again, takes it from there"
MORE_TIME = "allow more time: --timeout of start and ssh, or boot_timeout in the configuration"
LOCAL_NETWORK = ("macOS refuses the way to the guest ('no route to host'). Allow your terminal application in "
                 "System Settings > Privacy & Security > Local Network, then start it anew.")
LINE_BREAK = "A machine's name may have a line break: rename it in UTM. To see the whole list: utmctl list"
MAC_SETTING = ("With 'Regenerate MAC addresses on clone' turned on in UTM (Settings > Network), a new clone has a "
               "network address of its own from the start.")

# ---- errors


class KodeError(Exception):
    """A failure that can be explained in a sentence; `hint` is what to do next."""

    status, slug = 1, "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(KodeError):
    """The command line or the configuration cannot be used as it is."""

    status, slug = 2, "usage"


class NotFound(KodeError):
    """No such machine or image, shown by a clean list."""

    status, slug = 3, "not-found"


class WrongState(KodeError):
    """The machine is not in a state for that, or its name does not say which one is meant."""

    status, slug = 4, "wrong-state"


class Busy(WrongState):
    """Another kodemachine is at work on the machine."""


class Unreachable(KodeError):
    """UTM cannot be reached, or refuses us."""

    status, slug = 5, "utm-unreachable"


class NotPermitted(Unreachable):
    """macOS does not let us control UTM (-1743)."""


class TimedOut(KodeError):
    """Our own deadline has passed."""

    status, slug = 6, "timeout"


class Interrupted(BaseException):
    """A signal asked us to end; not an Exception, so that nothing but `main` takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# ---- values


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


class Outcome(enum.Enum):
    """What became of one call, as far as the call itself can tell."""

    DONE = "done"
    TRANSIENT = "transient"     # -1712, -10004, -609, -600, ...: it may or may not have happened
    REFUSED = "refused"         # -1743
    FAILED = "failed"           # -2700 and the like: UTM says why
    MISSING = "not found"       # or not allowed, or not ready: utmctl silences the reason (contract 0)
    NO_APP = "no application"
    USAGE = "usage"             # a utmctl that does not know that command
    CRASHED = "crashed"
    HUNG = "hung"
    ENDED = "ended"             # by us: its answer was not wanted any more


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
        """UTM's own words, from stderr, or utmctl's about a usage error; without any, the error's number."""
        own = ("Error from event: ", "NOTE: ", "WARNING: ")
        lines = [line.strip() for line in self.err.splitlines() if line.strip() and not line.startswith(own)]
        if self.outcome is Outcome.USAGE:
            lines = [line for line in lines if line.startswith("Error: ")]      # its usage and a hint follow
        if not lines:
            return f"error {self.numbers[-1]}" if any(self.numbers) else ""
        script = SCRIPT_ERROR.fullmatch(lines[-1]) if self.verb == "osascript" else None
        return script.group(1) if script else lines[-1].removeprefix("Error: ")


class Row(NamedTuple):
    """One machine as `utmctl list` shows it."""

    uuid: str
    power: Power
    name: str


class Listing(NamedTuple):
    """The rows of one list. `whole`: nothing was amiss. `named`: all UUIDs and names are known, if not all states.
    `broken`: the first row that cannot be read, if there is one."""

    rows: list[Row]
    whole: bool
    named: bool
    broken: str


class Rows(list[Row]):
    """The machines of a list. Where a row is `broken`, nothing can be concluded from the absence of a machine."""

    def __init__(self, rows: Iterable[Row], broken: str = "") -> None:
        super().__init__(rows)
        self.broken = broken

    def must_be_complete(self) -> None:
        """Raises KodeError if a row cannot be read: a machine that is not shown may be there all the same."""
        if self.broken:
            raise KodeError("UTM's list has a row that cannot be read, so it does not show whether a machine is there: "
                            + repr(self.broken), LINE_BREAK)


class Hardware(NamedTuple):
    """What UTM's configuration has of one machine: MAC addresses (`?` where UTM reports none), and the allocated MiB
    of each drive that is not removable, rounded down. `known`: UTM has reported them."""

    macs: list[str]
    drives: list[int]
    known: bool = True


class Disk(NamedTuple):
    """What the bundle on disk tells; None where it cannot be had. All in bytes."""

    memory: int | None = None
    size: int | None = None
    frees: int | None = None


class Machine(NamedTuple):
    """One machine as `list` and `status` show it: the keys of --json, in this order."""

    label: str | None
    name: str
    uuid: str
    status: str
    ip: str | None
    image: str | None
    memory: int | None
    size: int | None
    frees: int | None
    created: str | None


class Wishes(NamedTuple):
    """What the person asked of a start. `memory` in MiB, `timeout` in seconds; None: as it is."""

    base: str | None = None
    cpus: int | None = None
    memory: int | None = None
    disposable: bool = False
    gui: bool = False
    timeout: float | None = None
    only_new: bool = False      # --rm: the machine must not exist yet
    may_clone: bool = True
    bare: bool = False          # the label stood alone on the command line, where a command may be meant
    afterwards: str = RUN_AGAIN     # what to tell a person who interrupts the cloning


class Notes:
    """Where the layers below the command line say what they do; this one keeps silent."""

    def step(self, text: str) -> None:
        """A step has begun."""

    def tick(self) -> None:
        """Time passes."""

    def progress(self, text: str) -> None:
        """How far the step has come."""

    def warn(self, text: str) -> None:
        """Something the person should know, though it goes on."""

    def trace(self, text: str) -> None:
        """A call to the outside has ended."""


# ---- pure helpers


def printable(text: str) -> str:
    """`text` without what a terminal would obey: names and errors may come from a hostile guest."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def event_numbers(err: str) -> tuple[int, ...]:
    """The OSStatus of each Apple Event error in utmctl's stderr; 0 where a line carries none."""
    found = (OSSTATUS.search(line) for line in EVENT_ERROR.findall(err))
    return tuple(int(match.group(1)) if match else 0 for match in found)


def outcome_of(number: int) -> Outcome:
    """The class of an OSStatus (contract 4). An unknown one is transient: the state decides."""
    return {-1743: Outcome.REFUSED, -2700: Outcome.FAILED, -1708: Outcome.FAILED, -1728: Outcome.MISSING,
            -2741: Outcome.FAILED, -1719: Outcome.MISSING}.get(number, Outcome.TRANSIENT)


def classify(verb: str, code: int, err: str) -> tuple[Outcome, tuple[int, ...]]:
    """The outcome of a call to utmctl or one of PROGRAMS that has ended by itself, by its numbers.

    With --hide an error of its own may precede a success (contract 4), so the last number counts; a refusal
    counts wherever it stands.
    """
    if verb in PROGRAMS:
        if code == 0:
            return Outcome.DONE, ()
        lines = err.strip().splitlines()[-1:] if verb == "osascript" else []
        match = SCRIPT_ERROR.fullmatch(lines[0].strip()) if lines else None
        number = int(match.group(2)) if match else 0
        return (Outcome.CRASHED if code < 0 else outcome_of(number) if number else Outcome.FAILED), (number,)
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
    return (Outcome.DONE if code == 0 else Outcome.FAILED), numbers


def was_not_heard(reply: Reply) -> bool:
    """Whether UTM probably never took a request, which may be made once more if nothing has changed (contract 4)."""
    return reply.outcome is Outcome.MISSING or \
        (reply.outcome is Outcome.TRANSIENT and reply.numbers[-1] in (-10004, -609, -600, -10000))


def parse_list(out: str) -> tuple[list[Row], str, bool]:
    """The rows of `utmctl list`, cut by columns (contract 1.2); the first line that is not a row, and whether the
    header and the UUIDs are as they should be.

    A line that is not a row, and not the blank one of a machine that has just gone, is the rest of the name before it:
    so that name, too, cannot be read.
    """
    header, *lines = out.removesuffix("\n").split("\n")       # a name may contain what else splitlines() splits at
    rows: list[Row] = []
    broken = ""
    for line in lines:
        if UUID.fullmatch(line[:36]) and line[36:37] == line[45:46] == " " and line[46:]:
            rows.append(Row(line[:36], Power(line[37:45].rstrip()), line[46:]))
        elif rows and not line.startswith(" " * 36):
            cut_name = rows.pop()
            broken = broken or f"{cut_name.uuid} {cut_name.power.value} {cut_name.name}"
        else:
            broken = broken or line.strip() or "a row without a name"
    return rows, broken, header == LIST_HEADER and len({row.uuid for row in rows}) == len(rows)


def judge_list(reply: Reply) -> Listing:
    """How far a list can be believed. Each unknown state accounts for one error, and each blank row, of a machine that
    has just gone, for three; any other error spoils it."""
    rows, broken, sound = parse_list(reply.out)
    unknown = sum(row.power is Power.UNKNOWN for row in rows)
    blank = sum(line.startswith(" " * 36) for line in reply.out.splitlines())
    whole = sound and not broken and not unknown and reply.outcome is Outcome.DONE
    ended = reply.outcome not in (Outcome.HUNG, Outcome.CRASHED)
    readable = sound and ended and bool(rows or broken) and len(reply.numbers) <= unknown + 3 * blank
    return Listing(rows, whole, whole or (readable and not broken), broken if readable else "")


def address_rank(address: str) -> int:
    """0 for a likely address of the guest, 3 for one that is hardly reachable (contract 5)."""
    if re.match(r"127\.|169\.254\.|fe80:", address):
        return 3
    if re.match(r"172\.(?:1[7-9]|2\d|3[01])\.|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])\.", address):
        return 2                    # container bridges, VPNs
    return 1 if ":" in address else 0


def parse_addresses(out: str) -> list[str]:
    """The addresses in an answer of `ip-address`, at most 64, likeliest first; other lines are left out."""
    import socket

    def is_address(line: str) -> bool:      # all else, such as 999.1.1.1, would be looked up as a name
        with contextlib.suppress(OSError, ValueError):
            return bool(socket.inet_pton(socket.AF_INET6 if ":" in line else socket.AF_INET, line))
        return False
    lines = dict.fromkeys(line.strip() for line in out.splitlines())
    return sorted(filter(is_address, lines), key=address_rank)[:64]     # each costs an open file


def parse_hardware(out: str) -> dict[str, Hardware]:
    """What HARDWARE reports, by UUID."""
    found: dict[str, Hardware] = {}
    for uuid, key, value in re.findall(r"^(\S{36}) (\S+) ?(.*)$", out, re.MULTILINE):
        if key == "unknown":
            found[uuid] = Hardware(["?"], [], known=False)
            continue
        hardware = found.setdefault(uuid, Hardware([], []))
        if key == "mac":
            hardware.macs.append(value.upper() if MAC.fullmatch(value) else "?")
        elif key == "drive" and re.fullmatch(r"\d{1,12}", value):
            hardware.drives.append(int(value))
    return found


def missing_part(copy: Hardware, base: Hardware | None) -> str:
    """What a copy lacks of its base, in words; nothing if it is whole (contract 10.13).

    With a base that is gone, a copy cannot be compared: then it must only have something on a drive.
    """
    if base is None:
        return "" if any(copy.drives) else "its drives are empty"
    if len(copy.drives) < len(base.drives):
        return f"it has {len(copy.drives)} of {len(base.drives)} drives"
    for size, whole in zip(copy.drives, base.drives):
        if size < whole * WHOLE:
            return f"a drive has {size} of {whole} MiB"
    return ""


def parse_host_keys(lines: Sequence[str]) -> list[str]:
    """The host keys, as `type base64`, whose type stands inside them as well; a guest may send anything."""
    import base64
    import binascii

    keys = []
    for line in lines:
        match = HOST_KEY.match(line)
        if match and match.end() in (len(line), line.find(" ", match.end())):
            kind = match.group(1).encode()
            with contextlib.suppress(binascii.Error):
                if base64.b64decode(match.group(2), validate=True).startswith(len(kind).to_bytes(4, "big") + kind):
                    keys.append(f"{match.group(1)} {match.group(2)}")
    return keys[:8]


def fingerprint(key: str) -> str:
    """A host key's fingerprint, as ssh prints it."""
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"{key.split()[0]} SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def one_edit(word: str, other: str) -> bool:
    """Whether one insertion, removal, change or swap of neighbours makes one of the other."""
    if len(word) > len(other):
        word, other = other, word
    if len(other) - len(word) > 1 or word == other:
        return False
    i = next((i for i, (a, b) in enumerate(zip(word, other)) if a != b), len(word))
    if len(word) < len(other):
        return word[i:] == other[i + 1:]
    return word[i + 1:] == other[i + 1:] or word[i:i + 2] == other[i:i + 2][::-1] and word[i + 2:] == other[i + 2:]


def near_command(label: str) -> str | None:
    """The command that was perhaps meant: as other tools call it, or of three letters or more and one edit away."""
    words = sorted(RESERVED - {"proxy"})        # which is not for people
    near = label if label in ELSEWHERE else next((w for w in words if len(w) >= 3 and one_edit(label, w)), None)
    return near and ELSEWHERE.get(near, near)


def near_label(label: str, labels: Iterable[str]) -> str | None:
    """The one of `labels` that is one edit away, and not in a digit: web1 and web2 are both meant."""
    def letters(text: str) -> str:
        return re.sub(r"\d", "", text)
    return next((other for other in labels if len(label) >= 4 and one_edit(label, other)
                 and letters(label) != letters(other)), None)


def size_text(size: int | None) -> str:
    """Bytes for a person: 0B, 512M, 4.2G."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for unit in "BKMGT":
        if value < 1000 or unit == "T":
            break
        value /= 1024
    return f"{value:.1f}{unit}" if unit != "B" and value < 9.95 else f"{value:.0f}{unit}"


def parse_size(text: str) -> int:
    """Bytes of `4G`, `512M`, `2048` (MiB when bare, as in UTM). Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(text)
    return int(float(match.group(1)) * 1024 ** " KMGT".index(match.group(2).upper() or "M"))


def parse_age(text: str) -> float:
    """Seconds of `90s`, `30m`, `12h`, `7d`, `2w`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text.strip())
    if not match:
        raise ValueError(text)
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match.group(2)]


def age_of(created: str | None) -> float | None:
    """Seconds since an ISO time in UTC, None if it is unknown."""
    import datetime  # strptime would load three modules more

    try:
        made = datetime.datetime.fromisoformat(str(created).replace("Z", "+00:00"))
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


def cells(text: str) -> int:
    """Columns of a terminal that a text takes: some characters are two wide, and some stand on the one before."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def cut(text: str, room: int) -> str:
    """As much of a text as fits into so many columns."""
    while cells(text) > max(0, room):
        text = text[:-1]
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None,
          expendable: Sequence[str] = ()) -> str:
    """Aligned columns. If they are wider than `width`, the expendable ones go until they fit: first those that tell
    nothing, then in their order. What is too wide even so, is cut."""
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(header)]
    empty = {name for name, *column in columns if set(column) <= {"-"}}
    for name in sorted(expendable, key=lambda name: name not in empty):
        if width is None or sum(max(map(cells, column)) + 2 for column in columns) - 2 <= width:
            break
        columns = [column for column in columns if column[0] != name]
    widths = [max(map(cells, column)) for column in columns]
    lines = ("  ".join(cell + " " * (room - cells(cell)) for cell, room in zip(line, widths)).rstrip()
             for line in zip(*columns))
    return "\n".join(lines if width is None else (cut(line, width) for line in lines))


def is_utf8(text: str) -> bool:
    """Whether a word of the command line was valid UTF-8. Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def iso_time(when: float) -> str:
    """A time in seconds since the epoch as it is recorded: ISO 8601, UTC."""
    return time.strftime(ISO_TIME, time.gmtime(when))


def as_number(text: str) -> int | None:
    """The number that a word is, None if it is none."""
    return int(text) if re.fullmatch(r"\d{1,15}", text) else None


def random_mac() -> str:
    """A locally administered unicast address, made as UTM makes its own (contract 7)."""
    first, *rest = os.urandom(6)
    return ":".join(f"{byte:02X}" for byte in (first & 0xFC | 0x02, *rest))


def attempts(limit: float, tick: Callable[[], None], first: float = 0.1, longest: float = 1.0) -> Iterator[float]:
    """The one wait loop: yields the seconds left, with growing pauses between; at least once, until `limit` is over."""
    deadline, pause = time.monotonic() + limit, first
    while True:
        left = deadline - time.monotonic()
        yield max(left, 0.0)
        until = min(time.monotonic() + pause, deadline)
        if left <= 0:
            return
        while time.monotonic() < until:
            tick()
            time.sleep(max(0.0, min(0.2, until - time.monotonic())))
        pause = min(pause * 1.5, longest)


# ---- the outside: signals, files, children


class Interrupts:
    """The signals that end a program as one exception, once; held back while a step must not be cut in two."""

    def __init__(self) -> None:
        self._held = self._pending = 0

    def install(self) -> None:
        """Takes the signals over, except those that our parent had us ignore (nohup)."""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._arrive)
        sys.unraisablehook = self._dropped

    def _arrive(self, number: int, _frame: object) -> None:
        if self._held:
            self._pending = self._pending or number
        else:
            self._held = 1          # a second signal cannot break the clean-up
            raise Interrupted(number)

    def _dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        """What was raised in a finalizer, Python drops; an interruption then comes with the next call instead."""
        if isinstance(dropped.exc_value, Interrupted):
            self._held, self._pending = 0, dropped.exc_value.number
        else:
            sys.__unraisablehook__(dropped)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this no signal interrupts; one that came is raised at the end, unless an error is on its way."""
        if threading.current_thread() is not threading.main_thread():
            yield               # Python delivers signals to the main thread only
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            self._held = 1
            raise Interrupted(self._pending)


def write_file(path: str, data: str) -> None:
    """Replaces a file as a whole: written beside, synced, renamed; 0600 in a 0700 folder. Callers hold a lock.

    Raises KodeError.
    """
    if not os.path.isdir(os.path.dirname(path)):        # a configuration may lie in a folder that all share
        make_folder(os.path.dirname(path))
    beside = path + ".new"          # always the same, so that nothing piles up after a kill -9
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(handle, 0o600)
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(beside, path)
    except BaseException as failure:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(failure, OSError):
            raise KodeError(f"{path} cannot be written: {failure.strerror}",
                            "Mend that, then run the same command again: it takes up where this one ended.") from None
        raise


def make_folder(path: str) -> None:
    """A private folder of ours, made if it is missing. Raises KodeError if it belongs to somebody else."""
    above = os.path.dirname(path) or "."
    if not os.path.isdir(above):
        make_folder(above)          # makedirs would give it the umask's mode
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        owner = os.stat(path).st_uid
    except OSError as failure:
        raise KodeError(f"{path}: {failure.strerror}", f"See what is there: ls -ld {shlex.quote(path)}") from None
    if owner != os.geteuid():
        raise KodeError(f"{path} belongs to another user", "Remove it, or set XDG_STATE_HOME to a folder of your own.")


def read_text(path: str, errors: str = "replace") -> str | None:
    """The text of a regular file of at most 16 MiB, None if there is none. Raises OSError, never blocks on a fifo.

    `errors`: what becomes of what is not UTF-8; with "surrogateescape", write_file writes it as it was.
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
    """Whether somebody holds a lock on that file. It only looks: nothing is made or written."""
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


class Call:
    """A child of ours: stdin from null, both streams captured, in a session of its own so that Ctrl-C is ours.

    It is ended, with all that it started, when its limit (seconds) has passed.
    """

    def __init__(self, verb: str, argv: Sequence[str], limit: float, tick: Callable[[], None],
                 stdin: int = subprocess.DEVNULL, keep: Sequence[int] = ()) -> None:
        self.verb, self.argv, self._tick = verb, list(argv), tick
        self._began = time.monotonic()
        self._deadline = self._began + limit
        self._child = subprocess.Popen(self.argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       start_new_session=True, pass_fds=tuple(keep))
        assert self._child.stdout and self._child.stderr
        self._pipes = [self._child.stdout, self._child.stderr]
        self._read = {pipe.fileno(): bytearray() for pipe in self._pipes}
        self._open = set(self._read)
        self.reply: Reply | None = None

    @property
    def handles(self) -> list[int]:
        """What to select on for news from the child."""
        return list(self._open)

    def wait(self, seconds: float | None = None) -> Reply | None:
        """The reply, or None if the call is still under way after `seconds` (None: up to its limit)."""
        until = self._deadline if seconds is None else min(self._deadline, time.monotonic() + seconds)
        while self.reply is None:
            left = until - time.monotonic()
            if self._open:
                for fd in select.select(list(self._open), [], [], max(0.0, min(left, 0.2)))[0]:
                    self._take(fd)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(max(0.0, min(left, 0.2)))
                    self._finish(None)
                    continue
            if time.monotonic() >= self._deadline:
                self.end(Outcome.HUNG)
            elif left <= 0:
                break
            self._tick()
        return self.reply

    def _take(self, fd: int) -> None:
        data = os.read(fd, 1 << 16)
        if not data:
            self._open.discard(fd)
        elif len(self._read[fd]) < MAX_ANSWER:
            self._read[fd] += data

    def end(self, outcome: Outcome = Outcome.ENDED) -> None:
        """Ends the child and its children at once, if they are still there; what UTM was asked goes on in UTM."""
        if self.reply is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._finish(outcome)

    def _finish(self, cut_off: Outcome | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        code = self._child.returncode
        out, err = (data.decode("utf-8", "replace") for data in self._read.values())
        outcome, numbers = classify(self.verb, code, err)
        seconds = time.monotonic() - self._began
        self.reply = Reply(self.verb, cut_off or outcome, code, out, err, numbers, seconds)


# ---- state: what kodemachine remembers; losing it loses no machine


class State:
    """The state folder: records by UUID, pinned host keys, clone intents, locks; made when first needed."""

    def __init__(self, folder: str, notes: Notes) -> None:
        self.folder, self._notes = folder, notes
        self.trouble = ""       # what is wrong with the records; said once

    def path(self, *parts: str) -> str:
        """A path in the state folder."""
        return os.path.join(self.folder, *parts)

    @contextlib.contextmanager
    def lock(self, name: str, limit: float, *, wait: bool = True, what: str = "") -> Iterator[None]:
        """Holds the flock `name`; it falls with the process, so a stale one heals by itself.

        Raises TimedOut, naming `what` it guards and the owner, after `limit` seconds, or Busy at once without `wait`.
        """
        make_folder(self.folder)
        make_folder(self.path("locks"))
        try:
            handle = os.open(self.path("locks", name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as failure:
            raise KodeError(f"{self.path('locks', name + '.lock')}: {failure.strerror}", "Remove it.") from None
        try:
            self._take_lock(handle, what or name, limit if wait else 0.0)
            with contextlib.suppress(OSError):      # a full disk: the pid is only for people, and purge must work
                os.pwrite(handle, f"{os.getpid():<19}\n".encode(), 0)       # over the last owner's
            yield
        finally:
            os.close(handle)

    def locked(self, name: str) -> bool:
        """Whether somebody holds that lock."""
        return is_locked(self.path("locks", name + ".lock"))

    def _take_lock(self, handle: int, what: str, limit: float) -> None:
        told = False
        for left in attempts(limit, self._notes.tick, 0.05, 0.5):
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
                if not told and limit - left > 0.5 and owner not in (str(os.getpid()), "unknown"):
                    told = True
                    self._notes.step(f"waiting for another kodemachine (pid {owner}) to be done with {what}")
        kind = TimedOut if limit else Busy
        raise kind(f"{what} is in use by another kodemachine (pid {owner})", f"See what it does: ps -p {owner}")

    def records(self) -> dict[str, dict[str, Any]]:
        """What is known of each machine, by UUID. A broken file counts as lost, and says so."""
        if os.path.isdir(self.folder):
            make_folder(self.folder)        # somebody else's would be a lie
        try:
            found = json.loads(read_text(self.path("machines.json")) or "{}")
            if isinstance(found, dict) and all(isinstance(record, dict) for record in found.values()):
                return found
            problem = "not what kodemachine wrote"
        except (ValueError, RecursionError, OSError) as failure:
            problem = str(failure)
        if not self.trouble:
            self.trouble = f"{self.path('machines.json')} is of no use ({problem})"
            self._notes.warn(f"{self.trouble}; going on without it")
        return {}

    def intents(self) -> list[str]:
        """The names of the machines whose cloning was begun and has not been seen to end."""
        folder = self.path("intents")
        entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        return [entry[:-5] for entry in entries if entry.endswith(".json")]

    def _rewrite(self, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        with self.lock("records", 30, what="its records"):
            records = self.records()
            before = json.dumps(records)
            change(records)
            if json.dumps(records) != before:
                write_file(self.path("machines.json"), json.dumps(records, indent=1, sort_keys=True) + "\n")

    def record(self, uuid: str, **fields: object) -> None:
        """Adds to what is known of a machine; a value of None removes its key."""
        def change(records: dict[str, dict[str, Any]]) -> None:
            merged = {**records.get(uuid, {}), **fields}
            records[uuid] = {key: value for key, value in merged.items() if value is not None}
            if not records[uuid]:
                del records[uuid]
        self._rewrite(change)

    def forget(self, name: str, listed: set[str]) -> None:
        """Drops the records of a name's machines that are no longer listed, and then its pinned keys."""
        def change(records: dict[str, dict[str, Any]]) -> None:
            for uuid in [u for u, record in records.items() if record.get("name") == name and u not in listed]:
                del records[uuid]
                with contextlib.suppress(OSError):      # no machine will ever bear that UUID again
                    os.unlink(self.path("locks", f"{uuid}.session.lock"))
        if os.path.isdir(self.folder):
            self._rewrite(change)
            if not any(record.get("name") == name for record in self.records().values()):
                self.pin(name, [])

    @property
    def known_hosts(self) -> str:
        """Our own known-hosts file."""
        return self.path("known_hosts")

    def pin(self, name: str, keys: Sequence[str]) -> None:
        """Makes `keys` (validated) the only known ones of `name`."""
        wanted = [f"{name} {key}" for key in keys]
        if [line for line in self._known_lines() if line.startswith(name + " ")] == wanted:
            return                      # as at every reconnect, which need not wait for a lock
        with self.lock("records", 30, what="its records"):
            others = [line for line in self._known_lines() if not line.startswith(name + " ")]
            write_file(self.known_hosts, "".join(line + "\n" for line in others + wanted))

    def pinned(self, name: str) -> list[str]:
        """The keys that the known-hosts file has for `name`: ours, or one that ssh itself has learned."""
        return parse_host_keys([line.split(" ", 1)[1] for line in self._known_lines() if line.startswith(name + " ")])

    def _known_lines(self) -> list[str]:
        try:
            return (read_text(self.known_hosts) or "").splitlines()
        except OSError as failure:
            raise KodeError(f"{self.known_hosts}: {failure.strerror}", "Remove it; it is made anew.") from None


class Intent:
    """The record of a clone under way: written before the call, removed when its machine is seen.

    While the utmctl call lives it holds a flock on the file, even when its parent was killed; so a later run
    can tell whether the call has ended.
    """

    def __init__(self, state: State, name: str) -> None:
        self._path = state.path("intents", name + ".json")

    def load(self) -> dict[str, Any] | None:
        """The intent of an earlier run, None if there is none that can be read."""
        with contextlib.suppress(ValueError, RecursionError, OSError):
            found = json.loads(read_text(self._path) or "null")
            if isinstance(found, dict) and isinstance(found.get("listed"), list) \
                    and isinstance(found.get("inherits", {}), dict) \
                    and all(isinstance(found.get(key), str) for key in ("base", "base_uuid")) \
                    and isinstance(found.get("time"), (int, float)):
                return found
        return None

    def declare(self, base: Row, rows: Sequence[Row], inherits: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Writes the intent, and returns it with the locked handle that the call inherits."""
        intent = {"base": base.name, "base_uuid": base.uuid, "time": time.time(), "listed": [row.uuid for row in rows],
                  "inherits": inherits}
        self.rewrite(intent)
        handle = os.open(self._path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return intent, handle

    def rewrite(self, intent: dict[str, Any]) -> None:
        """Replaces what it says."""
        write_file(self._path, json.dumps(intent) + "\n")

    def call_alive(self) -> bool:
        """Whether the call of an earlier run is still under way."""
        return is_locked(self._path)

    def remove(self) -> None:
        """The machine has been seen, or there will be none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


# ---- configuration


class Settings(NamedTuple):
    """The configuration. Seconds are positive numbers; paths are expanded; None: unset."""

    base_image: str | None = None
    ssh_user: str | None = None
    ssh_port: int = 22
    prefix: str = "km-"
    headless: bool = True
    identity_file: str | None = None
    boot_timeout: float = 120
    clone_timeout: float = 600
    stop_timeout: float = 60
    utmctl: str | None = None
    documents: str | None = None
    first_boot: str | None = None

    @property
    def lock_limit(self) -> float:
        """How long to wait for somebody else's lock, in seconds."""
        return self.clone_timeout + self.boot_timeout


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_prefix(value: object) -> bool:
    return isinstance(value, str) and bool(PREFIX.fullmatch(value)) and len(value) < 40 \
        and not "kodeimage-v".startswith(value) and not value.startswith("kodeimage-v")


# For each key: what it must be, in words for the person, and the test of it.
SETTINGS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "base_image": ("the name of a machine", _is_text),
    "ssh_user": ("a user's name", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w.][\w.-]*", value))),
    "ssh_port": ("a port number", lambda value: type(value) is int and 0 < value < 65536),
    "prefix": ("lower-case letters, digits and hyphens that end in a hyphen, such as 'km-'", _is_prefix),
    "headless": ("true or false", lambda value: isinstance(value, bool)),
    "identity_file": ("a path", _is_text),
    "boot_timeout": ("a positive number of seconds", _is_seconds),
    "clone_timeout": ("a positive number of seconds", _is_seconds),
    "stop_timeout": ("a positive number of seconds", _is_seconds),
    "utmctl": ("a path", _is_text),
    "documents": ("a path", _is_text),
    "first_boot": ("a path", _is_text),
}
PATHS = ("identity_file", "utmctl", "documents", "first_boot")


class Config:
    """The configuration file. Reading never falls back to the defaults when the file is there but broken."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _text(self) -> str | None:
        try:
            text = read_text(self.path)
            if text is not None and os.stat(self.path).st_uid not in (os.geteuid(), 0):
                raise OSError(errno.EPERM, "belongs to another user")
        except OSError as failure:
            raise UsageError(f"{self.path}: {failure.strerror}", "Mend the file, or move it away.") from None
        return text

    def load(self, unless: str = "") -> dict[str, Any]:
        """What the file sets, checked but for the key `unless`.

        Raises UsageError with the file, the position and what is wrong.
        """
        text = self._text()
        if text is None:
            return {}
        if not text:
            raise UsageError(f"{self.path}:1:1: the file is empty", "Write {} into it, or remove it.")
        try:
            found = json.loads(text, object_pairs_hook=self._pairs)
        except (ValueError, RecursionError) as failure:
            where = f":{failure.lineno}:{failure.colno}" if isinstance(failure, json.JSONDecodeError) else ""
            what = failure.msg if isinstance(failure, json.JSONDecodeError) else str(failure)
            raise UsageError(f"{self.path}{where}: {what}", "The file must be one JSON object.") from None
        if not isinstance(found, dict):
            raise UsageError(f"{self.path}:1:1: not a JSON object", 'It must look like {"ssh_user": "me"}.')
        for key, value in found.items():
            if key != unless:
                self._check(key, value, self._position(text, key) + ": ")
        if not unless:
            self._check_image(found)
        return found

    @staticmethod
    def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return found

    def _position(self, text: str, key: str) -> str:
        match = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
        at = match.start() if match else 0
        return f"{self.path}:{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"

    @staticmethod
    def _check(key: str, value: object, where: str = "") -> None:
        """`where`: the value's place in the file, or nothing if it stands on our command line."""
        if key not in SETTINGS:
            import difflib

            near = difflib.get_close_matches(key, SETTINGS, 1)
            raise UsageError(f"{where}unknown key {key!r}",
                             f"Did you mean {near[0]!r}?" if near else "Known keys: " + ", ".join(SETTINGS))
        wanted, test = SETTINGS[key]
        if value is not None and not test(value):
            raise UsageError(f"{where}{key} must be {wanted}, not {json.dumps(value)}",
                             ("Mend it there, or" if where else "So")
                             + f": kodemachine config set {key} VALUE ('' for the default)")

    def _check_image(self, found: dict[str, Any]) -> None:
        """An image that looks like a clone would be treated as one as soon as another is configured."""
        image, prefix = found.get("base_image"), found.get("prefix") or Settings().prefix
        if image and image.startswith(prefix):
            raise UsageError(f"{self.path}: base_image {image!r} begins with the prefix of clones, {prefix!r}",
                             "Rename the image in UTM, then: kodemachine config set base_image NAME")

    def settings(self) -> Settings:
        """The file's values over the defaults, with `~` expanded in paths."""
        found = {key: value for key, value in self.load().items() if value is not None}
        return Settings(**{key: os.path.expanduser(value) if key in PATHS else value for key, value in found.items()})

    def set(self, key: str, text: str) -> None:
        """Sets one key (an empty text unsets it) and keeps the others. A symlinked file keeps its link.

        A relative path is stored as what it means here and now: other runs are in other folders.
        """
        found = self.load(unless=key)       # so what is wrong with it can be mended
        was_set = found.pop(key, None) is not None
        value: object = text
        if key in PATHS and text and not text.startswith("~"):
            value = os.path.abspath(text)
        elif key in SETTINGS and type(Settings._field_defaults[key]) in (int, float, bool):
            with contextlib.suppress(ValueError):
                value = json.loads(text)
        if text != "" or not was_set:
            self._check(key, None if text == "" else value)
        if text != "":
            found[key] = value
        self._check_image(found)
        write_file(os.path.realpath(self.path), json.dumps(found, indent=2) + "\n")


# ---- the choke point: utmctl, osascript, and what an image is made with

# The scripts for osascript (contract 7). The first line is only a name, for people and for -v. A configuration is
# read, changed in place and sent back as a whole, because UTM removes the elements of a list that a record does not
# name. Terms that are traps:
# - `serial ports of` a record is taken for the class of a machine's elements, and fails (-1728). The property of a
#   record is written by its code: «class SrPt». Only of a machine that runs are they what can be attached to.
# - `displays of (configuration of vm)` in one expression fails (-1728): first the record, then its list.
# - `icon` of a record that is sent back must be the name of a built-in one. UTM passes over an empty text.
# - `removable:true` with a source makes a USB CD-ROM, which cloud images for ARM often do not see.
# - `POSIX file` inside the `tell` block is asked of UTM, and fails (-1728).
# - `output text` and `output data` are missing where a command has printed nothing.

# Network addresses and drives of all machines: one event for the list, two for each machine.
# Dictionary: `id`, `configuration`, `network interfaces`, `address`, `drives`, `removable`, `host size` (contract
# 10.13).
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
# What `utmctl attach` printed up to 5.0.8. Dictionary: `serial port` is an element of `virtual machine`, with
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
# Dictionary: `name`, `icon`, `memory` (MiB), `cpu cores`, `network interfaces`, `address`, `update configuration`.
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
    set n to 4
    repeat with nic in nics
      set n to n + 1
      if not (n > (count of argv)) then set address of nic to item (n) of argv
    end repeat
    set icon of config to ""
    update configuration of vm with config
    set config to configuration of vm
    set report to name of config & linefeed & memory of config & linefeed & cpu cores of config & linefeed
    set nics to network interfaces of config
    repeat with nic in nics
      set report to report & address of nic & linefeed
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
INSTALL_AGENT = """\
command -v qemu-ga >/dev/null ||
  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install qemu-guest-agent; } ||
  dnf -qy install qemu-guest-agent
systemctl enable --now qemu-guest-agent || systemctl start qemu-guest-agent"""
# How cloud-init ended, and what it was given: without a seed it ends well, and has done nothing.
CLOUD_INIT = "cloud-init status --wait --long; code=$?; cat /run/cloud-init/result.json; exit $code"


def printed_argument(word: str) -> str:
    """An argument as -v shows it: of a script its name alone, and of what is long its beginning."""
    if word.startswith("-- kodemachine: "):
        return "(" + word.partition("\n")[0][len("-- kodemachine: "):] + ")"
    return word if len(word) <= 80 and "\n" not in word else word.partition("\n")[0][:40] + "..."


class Utmctl:
    """The one door to utmctl, osascript and PROGRAMS: finds them, bounds every call, and says what became of it."""

    def __init__(self, configured: str | None, interrupts: Interrupts, notes: Notes) -> None:
        self._configured, self._interrupts, self.notes = configured, interrupts, notes
        self._found: dict[str, str] = {}
        self._calls: set[Call] = set()
        self._closed = self._warned = False

    def path(self, program: str = "utmctl") -> str:
        """The real path of utmctl: through a link UTM's sandbox hides it from itself (contract 4)."""
        if program not in self._found:
            places = [shutil.which(program) or "", *(UTMCTL_PLACES if program == "utmctl" else ())]
            if program == "utmctl" and self._configured:
                places = [self._configured]
            usable = [place for place in map(os.path.expanduser, filter(None, places))
                      if os.path.isfile(place) and os.access(place, os.X_OK)]
            if not usable and program not in ("utmctl", "osascript"):
                raise KodeError(f"there is no {program} on PATH", "Install it, then run the same command again.")
            if not usable:
                where = f" at {self._configured}" if self._configured and program == "utmctl" else ""
                raise Unreachable(
                    f"there is no {program}{where}",
                    "Install UTM (brew install --cask utm), or name its utmctl: kodemachine config set utmctl PATH"
                    if program == "utmctl"
                    else "It comes with macOS: see that /usr/bin is on PATH.",
                )
            self._found[program] = os.path.realpath(usable[0]) if program == "utmctl" else usable[0]
        return self._found[program]

    def begin(self, verb: str, *args: str, limit: float | None = None, stdin: int = subprocess.DEVNULL,
              keep: Sequence[int] = ()) -> Call:
        """Starts one call; `limit` in seconds, or the verb's own. Raises Unreachable if it cannot be run."""
        argv = [self.path(verb), *args] if verb in PROGRAMS else [self.path(), verb, *args]
        try:
            with self._interrupts.held():       # between the child's birth and its entry here it would be lost
                call = Call(verb, argv, LIMITS[verb] if limit is None else limit, self.notes.tick, stdin, keep)
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
        """The reply of a call, or None if it is still under way after `seconds`."""
        reply = call.wait(seconds)
        if reply and call in self._calls:
            self._calls.discard(call)
            words = [printed_argument(arg) for arg in call.argv[1:]]
            numbers = "".join(f" {number}" for number in reply.numbers)
            self.notes.trace(f"{os.path.basename(call.argv[0])} {shlex.join(words)}: {reply.outcome.value}{numbers}, "
                             f"exit {reply.code}, {reply.seconds:.2f} s")
        return reply

    def drop(self, call: Call | None) -> None:
        """Ends a call whose answer is no longer wanted."""
        if call:
            call.end()
            self.finish(call)

    def call(self, verb: str, *args: str, limit: float | None = None) -> Reply:
        """One call from its beginning to its end."""
        reply = self.finish(self.begin(verb, *args, limit=limit))
        assert reply
        return reply

    def script(self, text: str, *args: str, limit: float | None = None) -> Reply:
        """Runs an AppleScript; unlike utmctl, osascript says by its exit status that it failed (contract 7)."""
        return self.call("osascript", "-e", text, "--", *args, limit=limit)

    def hardware(self, *uuids: str) -> dict[str, Hardware]:
        """Network addresses and drives of all machines, asked for until those of `uuids` are among them; all but the
        first of these machines may be gone.

        Raises Unreachable, or KodeError after UNIQUE_LIMIT seconds.
        """
        for _ in attempts(UNIQUE_LIMIT, self.notes.tick, 0.3, 3.0):
            reply = self.insist(self.script(HARDWARE))
            found = parse_hardware(reply.out) if reply.outcome is Outcome.DONE else {}
            if reply.outcome is Outcome.DONE and uuids[0] in found \
                    and all(found[uuid].known for uuid in uuids if uuid in found):
                return found
        raise KodeError(f"UTM does not report its machines' drives: {reply.sentence or reply.outcome.value}",
                        "Check UTM's window, then run the same command again.")

    def version(self) -> str:
        """The version of the application beside utmctl, from its Info.plist; empty if that cannot be read."""
        import plistlib

        contents = os.path.dirname(os.path.dirname(self.path()))
        try:
            with open(os.path.join(contents, "Info.plist"), "rb") as file:
                return str(plistlib.load(file)["CFBundleShortVersionString"])
        except Exception:       # also expat's own error, whose class plistlib does not name
            return ""

    def gather(self, calls: Sequence[tuple[str, ...]], limit: float) -> list[Reply]:
        """The replies of many calls, at most WIDTH * 4 at the same time."""
        waiting = list(enumerate(calls))
        active: dict[int, Call] = {}
        replies: dict[int, Reply] = {}
        while waiting or active:
            while waiting and len(active) < WIDTH * 4:
                i, words = waiting.pop(0)
                active[i] = self.begin(*words, limit=limit)
            owners = {fd: i for i, call in active.items() for fd in call.handles}
            ending = len(owners) < 2 * len(active)      # one has closed its streams, and will be gone at once
            ready = select.select(list(owners), [], [], 0.005 if ending else 0.2)[0]
            for i in {owners[fd] for fd in ready} if ready and not ending else list(active):
                reply = self.finish(active[i], 0)
                if reply:
                    replies[i] = reply
                    del active[i]
            self.notes.tick()
        return [replies[i] for i in range(len(calls))]

    def insist(self, reply: Reply) -> Reply:
        """The reply, unless no repetition could help: raises Unreachable."""
        if reply.outcome is Outcome.REFUSED:
            raise NotPermitted("macOS does not permit control of UTM (-1743)", NOT_ALLOWED)
        if reply.outcome is Outcome.NO_APP:
            raise Unreachable("utmctl does not find UTM",
                              "Name the utmctl inside UTM.app: kodemachine config set utmctl PATH")
        if reply.outcome is Outcome.USAGE:
            version = self.version()
            raise Unreachable(f"utmctl{' ' * bool(version)}{version} does not know the command {reply.verb}: "
                              f"{reply.sentence}", "Use a UTM from 4.6.5 to 5.0.9. To check it: kodemachine doctor")
        return reply

    def rows(self, partial: bool = False, call: Call | None = None) -> Rows:
        """A clean list, asked for until it is one (contract 0, 4). `call`: one for it that has begun already.

        After three answers a list counts in which only states are unknown. An empty one counts only after WARM_UP.
        After three equal answers a row that cannot be read is not waited for: then `broken` is set, which is an error
        unless `partial`, for callers that conclude nothing from the absence of a machine.
        Raises Unreachable, TimedOut or KodeError.
        """
        crashes, equal, empty_since = 0, 0, float("inf")
        before: Listing | None = None
        for asked, _ in enumerate(attempts(LOOK_LIMIT, self.notes.tick, 0.2, 2.0), 1):
            answer = self.finish(call or self.begin("list"))
            assert answer
            call, reply = None, self.insist(answer)
            listing = judge_list(reply)
            empty = listing.whole and not listing.rows
            empty_since = min(empty_since, time.monotonic()) if empty else float("inf")
            if listing.whole and (listing.rows or time.monotonic() - empty_since >= WARM_UP):
                return Rows(listing.rows)
            if listing.whole and asked == 1:
                self.notes.step("UTM shows no machines; waiting whether it is just starting")
            if asked >= 3 and listing.named and listing.rows:
                return Rows(listing.rows)
            equal = equal + 1 if listing == before else 1
            before = listing
            if listing.broken and equal >= 3:
                rows = Rows(listing.rows, listing.broken)
                if not partial:
                    rows.must_be_complete()
                if not self._warned:
                    self.notes.warn(f"UTM's list has a row that cannot be read: {rows.broken!r}. {LINE_BREAK}")
                self._warned = True
                return rows
            crashes += reply.outcome is Outcome.CRASHED
            if crashes == 3:
                raise Unreachable(
                    f"utmctl crashed (exit {reply.code})",
                    "It needs your session at the screen, outside of any sandbox. Is UTM installed whole?",
                )
        raise self._no_list(reply)

    @staticmethod
    def _no_list(reply: Reply) -> TimedOut:
        """What to say when the last of many answers was no better than this."""
        if reply.outcome is Outcome.DONE:
            return TimedOut("UTM's list cannot be read", "To see its answer: utmctl list")
        number = f" ({reply.numbers[-1]})" if reply.numbers else ""
        return TimedOut(f"UTM gave no list within {LOOK_LIMIT:.0f} s{number}",
                        "Is UTM asking something on the screen? Do not use sudo. "
                        + (NOT_ALLOWED if -10004 in reply.numbers else "Otherwise quit UTM and open it again."))

    def glimpse(self, limit: float) -> list[Row]:
        """What one list tells within `limit` seconds, believed as it is: for looking, never for acting.

        Raises Unreachable or TimedOut.
        """
        reply = self.insist(self.call("list", limit=limit))
        rows, _, sound = parse_list(reply.out)
        if reply.outcome is Outcome.HUNG:
            raise TimedOut(f"UTM gave no list within {limit:.0f} s", "It may only be slow. See: kodemachine list")
        if not rows and not (sound and reply.outcome is Outcome.DONE):
            number = f" ({reply.numbers[-1]})" if reply.numbers else ""
            raise Unreachable(f"UTM gave no list{number}", "It may only be starting. See: kodemachine list")
        return rows

    def close(self) -> None:
        """Ends whatever is still under way; used once, on the way out."""
        self._closed = True
        for call in list(self._calls):
            call.end()


# ---- the bundle on disk: optional knowledge


def private_size(path: str) -> int | None:
    """Bytes that only this file holds, which its deletion would free; None if the file system does not say.

    APFS: getattrlist with ATTR_CMNEXT_PRIVATESIZE (0x8 among the fork attributes, with FSOPT_ATTR_CMN_EXTENDED;
    Apple's sys/attr.h and getattrlist(2)). The answer: a 32-bit length, five 32-bit words that say which
    attributes were returned, and the size as off_t, packed to 4 bytes.
    """
    import ctypes

    request = ctypes.create_string_buffer(attribute_request(), 24)
    answer = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None, use_errno=True)
    no_follow, extended = 0x1, 0x20
    if library.getattrlist(os.fsencode(path), request, answer, ctypes.c_size_t(64),
                           ctypes.c_uint(no_follow | extended)):
        return None
    return parse_private_size(answer.raw)


def attribute_request() -> bytes:
    """`struct attrlist`: ATTR_CMN_RETURNED_ATTRS of the common group, the private size of the fork group."""
    import struct

    return struct.pack("=HHIIIII", 5, 0, 0x80000000, 0, 0, 0, 0x8)


def parse_private_size(answer: bytes) -> int | None:
    """The size in getattrlist's answer, None if it was not returned or makes no sense."""
    import struct

    length, _common, _volume, _folder, _file, fork, size = struct.unpack_from("=IIIIIIq", answer)
    return int(size) if length >= 32 and fork & 0x8 and size >= 0 else None


def disk_usage(bundle: str) -> tuple[int, int]:
    """Allocated bytes of a folder, and those that its deletion frees. Symbolic links are not followed.

    What is freed: on macOS each file's private size; elsewhere the blocks of files without hard links outside.
    """
    files: dict[tuple[int, int], list[tuple[str, os.stat_result]]] = {}
    folders = [bundle]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    folders.append(entry.path)
                elif stat.S_ISREG(info.st_mode):
                    files.setdefault((info.st_dev, info.st_ino), []).append((entry.path, info))
    size = frees = 0
    for links in files.values():
        path, info = links[0]
        blocks = info.st_blocks * 512
        size += blocks
        if info.st_nlink <= len(links):
            own = private_size(path) if sys.platform == "darwin" else None
            frees += blocks if own is None else min(own, blocks)
    return size, frees


def read_bundle(documents: str, uuid: str, name: str) -> Disk:
    """What the bundle of a machine tells. Raises OSError or ValueError; a folder of another machine tells nothing."""
    import plistlib

    bundle = os.path.join(documents, re.sub(r'[,/:\\?%*|"<>]', "-", name) + ".utm")
    text = read_text(os.path.join(bundle, "config.plist"))
    try:
        plist = plistlib.loads((text or "").encode())
        if plist["Information"]["UUID"] != uuid:
            return Disk()
        memory = int(plist["System"]["MemorySize"]) << 20
    except Exception as failure:        # one of many, among them expat's own, whose class plistlib does not name
        raise ValueError(f"{bundle}: {failure}") from None
    return Disk(memory, *disk_usage(bundle))


def read_bundles(documents: str, rows: Sequence[Row], seconds: float, tick: Callable[[], None]) -> dict[str, Disk]:
    """What the bundles tell within `seconds`, by UUID; nothing of those that cannot be read.

    In a thread of its own: while macOS asks the person whether we may look, the read hangs (contract 6).
    """
    found: dict[str, Disk] = {}

    def read() -> None:
        for row in rows:
            with contextlib.suppress(OSError, ValueError):
                found[row.uuid] = read_bundle(documents, row.uuid, row.name)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + seconds
    while reader.is_alive() and time.monotonic() < deadline:
        reader.join(0.2)
        tick()
    return dict(found)


def free_space(path: str) -> int | None:
    """Free bytes of the volume that `path` is on, None if it cannot be told."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != "/":
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


# ---- the way to the guest's ssh server


class Prober:
    """Connects to the ssh port of all candidates at once; the first that greets as an SSH server wins.

    So a container bridge or a VPN address in the guest loses by itself. The less likely an address, the later
    it is tried, unless there is no better one (as in RFC 8305).
    """

    HEAD_START = (0.0, 0.25, 1.5, 1.5)      # seconds, by rank

    def __init__(self, port: int) -> None:
        self._port = port
        self._began: float | None = None
        self._tries: dict[str, tuple[Any, float]] = {}      # address -> its socket, when it was opened
        self._rest: dict[str, float] = {}                   # address -> not before that time
        self._errors: dict[str, int] = {}                   # address -> how its last connection failed, 0: it did not

    def aim(self, addresses: Sequence[str]) -> None:
        """Replaces the candidates."""
        for address in [a for a in self._tries if a not in addresses]:
            self._give_up(address, 0)
        self._rest = {address: self._rest.get(address, 0.0) for address in addresses}
        self._errors = {address: self._errors.get(address, 0) for address in addresses}
        self._began = self._began or (time.monotonic() if addresses else None)

    @property
    def unreachable(self) -> bool:
        """Whether the system says of all the likeliest candidates that there is no route to them.

        To link-local ones there never is, without the name of an interface: that says nothing.
        """
        best = min(map(address_rank, self._errors), default=0)
        return best < 3 and {self._errors[address] for address in self._errors if address_rank(address) == best} == \
            {errno.EHOSTUNREACH}

    def step(self, seconds: float) -> str | None:
        """Goes on for at most `seconds`; the address that greeted, if one has. Its connection is closed by then."""
        now = time.monotonic()
        best = min(map(address_rank, self._rest), default=0)
        for address, since in self._rest.items():
            wait = self.HEAD_START[address_rank(address)] if address_rank(address) > best else 0.0
            if address not in self._tries and now >= max(since, (self._began or now) + wait):
                self._connect(address)
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

    def _connect(self, address: str) -> None:
        import socket

        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._tries[address] = (sock, time.monotonic())
        try:
            failure = sock.connect_ex((address, self._port))
        except OSError as bad:          # an address that only looks like one
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
        """Closes every connection: sshd counts those that are only looking, too."""
        for address in list(self._tries):
            self._give_up(address, 0)


# ---- one machine


class VM:
    """One machine as a state object, addressed by UUID. What it tells is asked for when wanted, and not before."""

    def __init__(self, utm: Utmctl, row: Row) -> None:
        self._utm, self._notes = utm, utm.notes
        self.uuid, self.name, self.power = row.uuid, row.name, row.power
        self._lost = 0
        self._refused: list[tuple[Power, tuple[str, ...]]] = []     # what was asked in which state, and answered -10004

    def status(self) -> Power:
        """The state as UTM tells it now; UNKNOWN if it does not. Raises NotFound if a clean list lacks the machine."""
        reply = self._utm.insist(self._utm.call("status", self.uuid))
        self.power = Power(reply.out.strip()) if reply.outcome is Outcome.DONE else Power.UNKNOWN
        self._lost = self._lost + 1 if reply.outcome is Outcome.MISSING else 0
        if self._lost and self._lost % 3 == 0:
            rows = self._utm.rows(partial=True)
            if not rows.broken and self.uuid not in {row.uuid for row in rows}:
                raise NotFound(f"{self.name} is gone: it was deleted meanwhile", "To see the others: kodemachine list")
        return self.power

    def _denied(self, *words: str) -> Unreachable | None:
        """What there is to say of an order that UTM answered twice by -10004, and the state is as it was.

        Then it is no chance, but a missing permission (contract 4).
        """
        return Unreachable(f"UTM did not take the order ({words[0]} {self.name}) (-10004)", NOT_ALLOWED) \
            if self._refused.count((self.power, words)) == 2 else None

    def _ask(self, *words: str, limit: float | None = None) -> Reply:
        """One order to utmctl, after which callers look at the state before they repeat it. Raises Unreachable."""
        denied = self._denied(*words)
        if denied:
            raise denied
        reply = self._utm.insist(self._utm.call(*words, limit=limit))
        if reply.numbers[-1:] == (-10004,):
            self._refused.append((self.power, words))
        return reply

    def power_on(self, limit: float, *, hide: bool = True, disposable: bool = False,
                 before_cold: Callable[[], None] | None = None) -> None:
        """Starts or resumes, until the state is `started`; the state is believed, never the exit status (contract 2).

        `before_cold` runs before the first start from `stopped`, and its time does not count. Raises TimedOut after
        `limit` seconds, or KodeError with UTM's words if it stays as it was after three answers.
        """
        options = ["--hide"] * hide + ["--disposable"] * disposable
        asked, again_at, complaint = 0, 0.0, ""
        told: Power | None = self.power         # by the list that this machine was just taken from
        for _ in attempts(limit, self._notes.tick, 0.1, 0.5):
            power, told = told or self.status(), None
            if power is Power.STARTED:
                return
            if power in (Power.STOPPED, Power.PAUSED) and time.monotonic() >= again_at:
                if asked == 3:
                    raise KodeError(f"{self.name} does not start, it stays {power.value}" + complaint,
                                    "Try it in UTM's window; it may show more.")
                if power is Power.STOPPED and before_cold:
                    before_cold()
                    self.power_on(limit, hide=hide, disposable=disposable)
                    return
                reply = self._ask("start", *options, self.uuid)
                complaint = f": {reply.sentence}" if reply.sentence else ""
                asked += reply.outcome not in (Outcome.TRANSIENT, Outcome.HUNG)     # for these the time is the limit
                again_at = time.monotonic() + ASK_AGAIN
        raise TimedOut(f"{self.name} did not start within {limit:.0f} s (it is {self.power.value})" + complaint,
                       f"Look at it in UTM's window, or {MORE_TIME}.")

    def greet(self, port: int, limit: float, call: Call | None = None, more_time: str = MORE_TIME) -> str:
        """Waits until the guest's ssh server greets, and returns its address. `call`: a question already asked.

        The guest agent is asked for addresses while those known already are probed. Raises KodeError as soon as the
        machine is off, TimedOut after `limit` seconds, which says how to allow for `more_time`.
        """
        prober, ask_at = Prober(port), 0.0
        known: list[str] = []
        began, warned = time.monotonic(), False
        deadline, quiet = began + limit, bool(call)     # a reconnect says nothing, unless it takes long
        try:
            while time.monotonic() < deadline:
                if quiet and time.monotonic() > began + 0.5:
                    quiet = False
                    self._notes.step(f"waiting for ssh on {self.name}")
                if call is None and time.monotonic() >= ask_at:
                    call = self._utm.begin("ip-address", self.uuid)
                winner = prober.step(0.02) if known or not call else None
                if winner:
                    return winner
                reply = self._utm.finish(call, 0.02 if known else 0.2) if call else None
                if reply:
                    call = None
                    known = parse_addresses(reply.out) if reply.outcome is Outcome.DONE else known
                    prober.aim(known)
                    waited = time.monotonic() - began       # an address is noticed late by a twentieth of that
                    ask_at = began + waited + min(max(0.2, waited / 20), 1.0)
                    if reply.outcome is not Outcome.DONE:
                        self._utm.insist(reply)
                        self._must_run()
                if not warned and prober.unreachable and time.monotonic() > began + 8 and local_network_rules():
                    warned = True
                    self._notes.warn(LOCAL_NETWORK)
                self._notes.tick()
        finally:
            prober.close()
            self._utm.drop(call)
        seen, hint = "its guest agent reports no address", f"Check its console: kodemachine attach {self.name}"
        if known:       # so the agent works; and images that `base create` makes have no password for the console
            seen = f"its ssh port does not answer at {', '.join(known)}"
            hint = f"Check its ssh server: kodemachine exec {self.name} -- systemctl status ssh"
        raise TimedOut(
            f"{self.name} cannot be reached by ssh after {limit:.0f} s: it is {self.power.value}, but {seen}",
            LOCAL_NETWORK if prober.unreachable and local_network_rules() else f"{hint}\nOr {more_time}.",
        )

    def _must_run(self) -> None:
        if self.status() in (Power.STOPPED, Power.PAUSED):
            raise KodeError(f"{self.name} is {self.power.value}: it went off while it was being waited for",
                            f"Its console may tell more, once it is started again: kodemachine attach {self.name}")

    def configure(self, name: str = "", memory: int | None = None, cpus: int | None = None,
                  macs: Sequence[str] = ()) -> Reply:
        """Changes a stopped machine's configuration; memory in MiB.

        The answer has a line each for name, memory, CPUs, and every network address, as they are then.
        """
        return self._utm.script(CONFIGURE, self.uuid, name, str(memory or ""), str(cpus or ""), *macs)

    def prepare(self, memory: int | None, cpus: int | None, copy_of: str = "") -> None:
        """Gives a stopped machine network addresses that no other has, with `memory` (MiB) and `cpus` in one change.

        UTM copies the base's (contract 3.5). `copy_of`: the UUID of the machine that it must be a whole copy of.
        Raises Unreachable if macOS refuses, WrongState if the machine is not stopped any more, KodeError unless it is
        proved done.
        """
        problem = "UTM does not answer"
        for _ in attempts(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
            reply = self._utm.script(HARDWARE)
            if reply.outcome is Outcome.DONE:
                found = parse_hardware(reply.out)
                relevant = [found[uuid] for uuid in (self.uuid, copy_of) if uuid in found]
                # An empty answer, as while UTM starts, proves nothing.
                if self.uuid not in found or not all(hardware.known for hardware in relevant):
                    problem = "UTM does not report its hardware"
                    continue
                if copy_of:
                    self.must_be_whole(found, copy_of)
                mine = found.pop(self.uuid).macs
                others = {mac for hardware in found.values() for mac in hardware.macs}
                shared = [mac in others or mine.count(mac) > 1 or "?" in {mac, *others} for mac in mine]
                if not (any(shared) or memory or cpus):
                    return
                wanted = [random_mac() if bad else mac for mac, bad in zip(mine, shared)]
                reply = self.configure("", memory, cpus, wanted)
                lines = reply.out.splitlines()
                proved = all(want in (None, got) for want, got in zip((memory, cpus), map(as_number, lines[1:3])))
                if proved and lines[3:3 + len(wanted)] == wanted:
                    return
            problem = reply.sentence or f"UTM answers {reply.outcome.value}"
            if reply.outcome is Outcome.REFUSED:
                raise Unreachable(
                    f"{self.name} was not started: macOS does not permit to check its network address (-1743)",
                    f"{NOT_ALLOWED} {MAC_SETTING}",
                )
            if reply.outcome in (Outcome.FAILED, Outcome.MISSING):
                if self.status() is not Power.STOPPED:      # perhaps by what an earlier run had asked of UTM
                    raise WrongState(f"{self.name} is {self.power.value}: it was turned on meanwhile",
                                     "Run the same command again.")
                break
        raise KodeError(f"{self.name} was not started: its network address could not be made unique ({problem})",
                        MAC_SETTING)

    def must_be_whole(self, found: dict[str, Hardware], copy_of: str) -> None:
        """Raises KodeError if this machine is a copy that was not made to its end, of the machine with that UUID.

        UTM ignores errors while it copies, and lists a half bundle after it was interrupted (contract 3, 10.12).
        """
        missing = missing_part(found[self.uuid], found.get(copy_of))
        if missing:
            raise KodeError(f"{self.name} ({self.uuid}) is an incomplete copy and cannot be used: {missing}",
                            f"Delete it: {shlex.quote(self._utm.path())} delete {self.uuid}\n"
                            "Then run the same command again.")

    def addresses(self) -> list[str]:
        """The addresses that the guest agent tells, likeliest first; none if it does not answer."""
        reply = self._utm.call("ip-address", self.uuid)
        return parse_addresses(reply.out) if reply.outcome is Outcome.DONE else []

    def await_addresses(self, limit: float) -> list[str]:
        """The addresses as soon as there are more than link-local ones, which come early in a boot; else those.

        Raises KodeError if there is none (TimedOut after `limit` seconds if that is not 0), or the machine goes off.
        """
        for _ in attempts(limit, self._notes.tick, 0.3, 2.0):
            reply = self._utm.insist(self._utm.call("ip-address", self.uuid))
            found = parse_addresses(reply.out) if reply.outcome is Outcome.DONE else []
            if any(address_rank(address) < 3 for address in found):
                break
            self._must_run()
        if not found:
            raise (TimedOut if limit else KodeError)(
                f"the guest agent of {self.name} tells no address",
                f"Look at its console: kodemachine attach {self.name}" if limit
                else f"While it boots, wait: kodemachine ip --all --wait 60 {self.name}")
        return found

    def ask_to_stop(self, limit: float) -> None:
        """Presses the power key until the guest has powered off. A paused machine is resumed to hear it.

        Raises TimedOut after `limit` seconds; nothing was forced then.
        """
        again_at = 0.0
        for _ in attempts(limit, self._notes.tick, 0.1, 0.5):
            power = self.status()
            if power is Power.STOPPED:
                return
            if time.monotonic() >= again_at and power in (Power.STARTED, Power.PAUSED):
                words = ("stop", self.uuid, "--request") if power is Power.STARTED else ("start", "--hide", self.uuid)
                if power is Power.PAUSED or not self._denied(*words):      # it runs on for a while after a key it heard
                    self._ask(*words)
                again_at = time.monotonic() + (PRESS_AGAIN if power is Power.STARTED else ASK_AGAIN)
        raise self._denied("stop", self.uuid, "--request") or TimedOut(
            f"{self.name} did not power off within {limit:.0f} s (it is {self.power.value})",
            f"Turn it off hard: kodemachine stop --force {self.name}")

    def force_off(self, kill: bool = False) -> None:
        """Turns off through UTM's stages, --force and then --kill, until the state is `stopped` (contract 2)."""
        for stage in ("--kill",) if kill else ("--force", "--kill"):
            again_at = 0.0
            for _ in attempts(FORCE_STAGE, self._notes.tick, 0.1, 0.5):
                power = self.status()
                if power is Power.STOPPED:
                    return
                if stage == "--force" and power in (Power.PAUSED, Power.STOPPING):
                    if power is Power.PAUSED:       # --force is refused there
                        break
                elif time.monotonic() >= again_at and (stage == "--kill" or power is Power.STARTED):
                    self._ask("stop", self.uuid, stage, limit=FORCE_STAGE / 2)
                    again_at = time.monotonic() + ASK_AGAIN
        if self.status() is not Power.STOPPED:      # the last request was not looked after yet
            raise TimedOut(f"{self.name} cannot be turned off (it stays {self.power.value})",
                           "Quit UTM and open it again.")

    def suspend(self, limit: float, save: bool) -> None:
        """Pauses to memory, with `save` also to disk; raises KodeError if only the pause succeeded (contract 2)."""
        asked: Reply | None = None
        again_at, repeated = 0.0, False         # what a repeated request is told, is not about the first one
        for _ in attempts(limit, self._notes.tick, 0.1, 0.5):
            power = self.status()
            if power is Power.STOPPED:
                raise WrongState(f"{self.name} is stopped, there is nothing to suspend",
                                 f"Start it: kodemachine start -d {self.name}")
            if power is Power.PAUSED and (not save or (asked and asked.outcome is Outcome.DONE)):
                return
            if power is Power.PAUSED and not asked:
                raise WrongState(f"{self.name} is paused already; only a running machine can be saved",
                                 f"First: kodemachine resume {self.name}")
            if power is Power.PAUSED and asked and asked.outcome is Outcome.FAILED and not repeated:
                raise KodeError(
                    f"{self.name} is paused in memory, but saving it to disk failed: {asked.sentence}",
                    f"It goes on with: kodemachine resume {self.name}",
                )
            if power is Power.PAUSED:
                raise TimedOut(f"{self.name} is paused; UTM gave no answer to whether it was saved to disk",
                               f"It goes on with: kodemachine resume {self.name}")
            if power is Power.STARTED and time.monotonic() >= again_at:
                if asked and asked.outcome is Outcome.FAILED:
                    raise KodeError(f"{self.name} cannot be suspended: {asked.sentence}",
                                    f"It still runs. To shut it down instead: kodemachine stop {self.name}")
                repeated = asked is not None
                asked = self._ask("suspend", self.uuid, *["--save-state"] * save)
                again_at = time.monotonic() + ASK_AGAIN
        raise TimedOut(f"{self.name} was not suspended within {limit:.0f} s (it is {self.power.value})",
                       f"See what became of it: kodemachine status {self.name}")

    def delete(self, limit: float) -> None:
        """Deletes a stopped machine, which utmctl does unasked (contract 1.2); returns when a clean list lacks it.

        Right before each request a clean list has to show this UUID under this name, stopped. One without an answer is
        looked after, and repeated once (contract 9.6). Raises WrongState, TimedOut, or KodeError with UTM's words.
        """
        asked, again_at, complaint = 0, 0.0, ""
        for _ in attempts(limit, self._notes.tick, 0.1, 1.0):
            row = next((row for row in self._utm.rows() if row.uuid == self.uuid), None)
            if row is None:
                return
            if row.name != self.name:
                raise WrongState(f"{self.name} is called {row.name} now and was not deleted",
                                 "See what is there: kodemachine list -a")
            if row.power is Power.UNKNOWN or time.monotonic() < again_at:
                continue
            if row.power is not Power.STOPPED:
                raise WrongState(f"{self.name} is {row.power.value} and was not deleted",
                                 "Stop it first, or add --force.")
            self.power = row.power
            if asked == 2 and not self._denied("delete", self.uuid):
                break
            reply = self._ask("delete", self.uuid)
            complaint = reply.sentence
            if reply.outcome is Outcome.FAILED and asked:
                raise KodeError(f"UTM did not delete {self.name}: {complaint}", "Look at it in UTM's window.")
            asked += 1
            told = reply.outcome in (Outcome.FAILED, Outcome.MISSING) or reply.numbers[-1:] == (-10004,)
            again_at = time.monotonic() + (1.0 if told else DELETE_SETTLE)
        raise TimedOut(
            f"{self.name} is still there after its deletion was asked for" + (f": {complaint}" if complaint else ""),
            "Look at it in UTM's window, then try again.",
        )

    def await_agent(self, limit: float) -> None:
        """Waits until the guest agent runs commands. Raises KodeError as soon as the machine is off, or TimedOut."""
        complaint = ""
        for _ in attempts(limit, self._notes.tick, 0.3, 3.0):
            try:
                self.run(["true"], limit=LIMITS["osascript"])
                return
            except (Unreachable, UsageError):
                raise
            except KodeError as failure:
                complaint = failure.message
            self._must_run()
        raise TimedOut(f"the guest agent of {self.name} does not answer after {limit:.0f} s: {complaint}",
                       "It needs qemu-guest-agent in the guest, and UTM's QEMU backend.")

    def run(self, argv: Sequence[str], data: bytes = b"", limit: float = float("inf")) -> tuple[int, bytes, bytes]:
        """Runs a command as root through the guest agent; its exit status, stdout and stderr, complete at its end.

        `data`: its input, at most EXEC_INPUT bytes. A command that a signal ended has 128 + its number as status.
        `utmctl exec` is of no help: up to 5.0.8 it does not wait for the command (contract 1.3).
        After `limit` seconds, or a signal to us, the command goes on in the guest (contract 0.4).
        Raises KodeError if the command was not run, or if its result is lost, TimedOut after `limit`.
        """
        import base64

        text = base64.b64encode(data).decode()
        pieces = [text[i:i + EXEC_PIECE] for i in range(0, len(text), EXEC_PIECE)]
        try:
            reply = self._utm.script(GUEST_COMMAND, self.uuid, str(len(pieces)), *pieces, *argv, limit=limit)
        except Interrupted:
            self._notes.warn(f"the command was not stopped: it may still be running in {self.name}")
            raise
        self._utm.insist(reply)
        status, out, err = (reply.out.split("\n") + ["", ""])[:3]
        code = re.fullmatch(r"(\d{1,10}) (\d{1,3})", status)
        if reply.outcome is Outcome.DONE and code:
            output, errors = base64.b64decode(out), base64.b64decode(err)
            if max(len(output), len(errors)) >= EXEC_OUTPUT:
                self._notes.warn("the output was cut at 16 MiB: the guest agent keeps no more")
            return 128 + int(code.group(2)) if code.group(2) != "0" else int(code.group(1)), output, errors
        look = f"To look: kodemachine ssh {self.name}"
        if reply.outcome is Outcome.HUNG:
            raise TimedOut(f"the command in {self.name} did not end within {limit:.0f} s and may still be running",
                           look)
        # UTM's own words mean that nothing was started, except a time-out after the command was sent (contract 5, 7).
        lost = "result lost: "
        if reply.outcome in (Outcome.FAILED, Outcome.MISSING) and lost not in reply.err:
            raise KodeError(f"{self.name} did not confirm that it ran {argv[0]}: "
                            f"{reply.sentence or reply.outcome.value}",
                            "If its guest agent does not answer: it needs qemu-guest-agent. "
                            f"ssh may still work: kodemachine ssh {self.name}")
        raise KodeError(f"the result of {argv[0]} in {self.name} was lost, and it may still be running"
                        + f" ({reply.sentence.rpartition(lost)[2]})" * bool(reply.sentence), look)

    def serial_port(self, index: int | None) -> str:
        """The machine's serial port: a device path, or host:port of a TCP one (contract 7). Raises KodeError.

        `index` counts all ports from 0; None: the first that can be attached to.
        """
        for _ in attempts(LIMITS["status"], self._notes.tick, 0.2, 2.0):
            reply = self._utm.insist(self._utm.script(SERIAL_PORTS, self.uuid))
            if reply.outcome in (Outcome.DONE, Outcome.FAILED):
                break
        if reply.outcome is Outcome.FAILED:
            raise KodeError(f"UTM does not report the serial ports of {self.name}: {reply.sentence}",
                            f"Is it still running? To check: kodemachine status {self.name}")
        if reply.outcome is not Outcome.DONE:
            raise TimedOut(f"UTM does not report the serial ports of {self.name} ({reply.outcome.value})",
                           "Check UTM's window, then try again.")
        ports = reply.out.splitlines()
        if index is not None:
            ports = ports[index:index + 1]
        for port in ports:
            kind, _, place = port.partition(" ")
            if kind in ("ptty", "tcp") and place:
                return place
        raise KodeError(
            f"{self.name} has no serial port {'' if index is None else f'{index} '}that can be attached to",
            "In UTM, give the image a serial device in mode 'Pseudo-TTY'; clones made from then on have it.",
        )


def open_script(path: str) -> BinaryIO:
    """The script that `first_boot` names. Raises UsageError if it cannot be read."""
    try:
        return open(path, "rb")
    except OSError as failure:
        raise UsageError(f"first_boot is {path}: {failure.strerror}",
                         "Name another script: kodemachine config set first_boot PATH ('' for none)") from None


def local_network_rules() -> bool:
    """Whether this is macOS 15 (Darwin 24) or newer, which asks before a program may speak to the local network."""
    system = os.uname()
    return system.sysname == "Darwin" and int(system.release.split(".")[0]) >= 24


def own_command() -> list[str]:
    """The words that start this program from anywhere.

    install.sh makes it a zip application, inside of which `__file__` is; its first line names a Python whose path
    outlives an upgrade, as that of the one which runs may not.
    """
    path = os.path.realpath(__file__)
    return [sys.executable, "-IS", path] if os.path.exists(path) else [os.path.dirname(path)]


def as_words(options: dict[str, str]) -> list[str]:
    """ssh's options as words of a command line."""
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


# ---- the fleet


class Cloner:
    """Makes one copy of a stopped machine under a new name, and only one, whatever is lost or interrupted.

    UTM tells no UUID and may report anything (contract 3), so the copy is what was not there before. The intent is
    written down first; whoever comes next finds what has come of it, and never deletes or rolls back.
    """

    def __init__(self, utm: Utmctl, state: State, limit: float) -> None:
        self._utm, self._state, self._limit, self._notes = utm, state, limit, utm.notes

    def adopt(self, row: Row) -> bool:
        """Records a machine that came of an intent for its name; false if none did."""
        intent = Intent(self._state, row.name)
        found = intent.load()
        if not found or row.uuid in found["listed"]:
            return False
        image = {"name": found["base"], "uuid": found["base_uuid"]}
        inherits = {"image": image, **found.get("inherits", {})}
        self._state.record(row.uuid, **{**inherits, "name": row.name, "created": iso_time(found["time"]), "new": True,
                                        "copy_of": found["base_uuid"] or None})
        intent.remove()
        return True

    def finish(self, name: str) -> Row | None:
        """What an earlier run's clone has come to, waited for as long as that run would have, or None."""
        intent = Intent(self._state, name)
        found = intent.load()
        if not found:
            return None
        left = max(0.0, min(found["time"] + self._limit - time.time(), self._limit))
        if found.get("incomplete") and found["incomplete"] not in {row.uuid for row in self._utm.rows()}:
            intent.remove()             # the person has deleted what came of it
            return None
        self._notes.step(f"looking for the {name} that an earlier run began to clone (for up to {left:.0f} s)")
        return self._await(name, intent, found, None, left)

    @staticmethod
    def must_be_free(name: str, rows: Sequence[Row]) -> None:
        """Raises WrongState if a machine bears that name (compared without case, as UTM's folders are)."""
        clash = next((row for row in rows if row.name.lower() == name), None)
        if clash:
            raise WrongState(f"there is a machine {clash.name} already ({clash.uuid})",
                             "Rename it in UTM, whose folders do not tell upper from lower case, or take another name.")

    def clone(self, base: Row, name: str, rows: Sequence[Row], afterwards: str = RUN_AGAIN, **inherits: Any) -> Row:
        """Clones `base`; `rows` is a clean list made just before. Callers hold the fleet's lock.

        `afterwards`: what to tell a person who interrupts it. `inherits`: what to record of the copy, unless it is
        only that `base` is its image.
        """
        if self._await_other_calls(base):
            rows = self._utm.rows()         # theirs have come since
        self.must_be_free(name, rows)
        return self._bring(base, name, rows, f"cloning {base.name} to {name}",
                           ("clone", base.uuid, "--name", name), inherits, afterwards)

    def make(self, name: str, rows: Sequence[Row], words: Sequence[str]) -> Row:
        """Has UTM make a new machine, with the `words` behind its name in MAKE. Callers hold the fleet's lock."""
        self.must_be_free(name, rows)
        return self._bring(Row("", Power.STOPPED, name), name, rows, f"making {name}",
                           ("osascript", "-e", MAKE, "--", name, *words), {"image": None, "making": True})

    def _bring(self, base: Row, name: str, rows: Sequence[Row], what: str, words: Sequence[str],
               inherits: dict[str, Any], afterwards: str = RUN_AGAIN) -> Row:
        """The machine that the call `words` brings; made once more if UTM has not heard it."""
        intent = Intent(self._state, name)
        for repeated in (False, True):
            self._notes.step(what + " once more" * repeated)
            found, handle = intent.declare(base, rows, inherits)
            try:
                call = self._utm.begin(*words, limit=self._limit, keep=[handle])
            except Unreachable:
                intent.remove()             # nothing was asked of UTM
                raise
            finally:
                os.close(handle)
            try:
                row = self._await(name, intent, found, call, self._limit)
            except Interrupted:
                self._notes.warn(f"UTM goes on {what}; {afterwards}")
                raise
            finally:
                self._utm.drop(call)
            if row:
                return row
        intent.remove()
        assert call.reply
        number = f" ({call.reply.numbers[-1]})" if call.reply.numbers else ""
        raise Unreachable(f"UTM did not take the order ({what}){number}", "Open UTM and try again. " + NOT_ALLOWED)

    def _await_other_calls(self, base: Row) -> bool:
        """Waits for clone calls that outlived their kodemachine: two would race for one name (contract 3).

        Returns whether there were any; raises TimedOut if one does not end.
        """
        waited = False
        for name in self._state.intents():
            intent = Intent(self._state, name)
            if intent.call_alive() and (intent.load() or {}).get("base_uuid") == base.uuid:
                waited = True
                self._notes.step(f"waiting until UTM has cloned {name}")
                for _ in attempts(self._limit, self._notes.tick):
                    if not intent.call_alive():
                        break
                else:
                    raise self._under_way(name)
        return waited

    @staticmethod
    def _under_way(name: str) -> TimedOut:
        return TimedOut(f"the call that an earlier run made for {name} is still under way; UTM may still be copying",
                        "Run the same command again later. If that does not help, quit UTM and open it again.")

    def _await(self, name: str, intent: Intent, found: dict[str, Any], call: Call | None, limit: float) -> Row | None:
        """The machine that comes of an intent; None if there is none, and no later one to be feared.

        `found` is what the intent says, and `call` this run's own, or None for an earlier run's. After `limit` seconds
        (0: that time has been over long since) what comes is no longer ours for sure.
        Raises KodeError if it failed, or if what came is not provably ours.
        """
        half_name = re.compile(re.escape(found["base"]) + r"(?: \d+)?")
        deadline, renames = time.monotonic() + limit, 0
        seen: object = None
        since = 0.0
        for _ in attempts(max(limit, 2 * UNCHANGED), self._notes.tick, 0.1, 0.5):
            reply = self._utm.finish(call, 1.0) if call else None
            ended = bool(reply) or not (call or intent.call_alive())
            rows = self._utm.rows()
            new = [row for row in rows if row.uuid not in found["listed"]]
            named = [row for row in new if row.name == name]
            # Without its base beside it, what bears the base's very name is the base, made anew by somebody.
            orphaned = found["base_uuid"] not in {"", *(row.uuid for row in rows)}
            half = [] if named else [row for row in new if half_name.fullmatch(row.name)
                                     and not (orphaned and row.name == found["base"])]
            if seen != (new, ended):
                seen, since = (new, ended), time.monotonic()
            settled = time.monotonic() - since >= UNCHANGED
            if len(named) == 1 and named[0].power is not Power.UNKNOWN and (ended or settled):
                return named[0]
            if len(named) > 1 or (ended and settled and len(half) > 1):
                which = ", ".join(f"{row.name} ({row.uuid})" for row in named or half)
                raise WrongState(f"more than one machine may be the new {name}: {which}",
                                 f"Name one of them {name} in UTM, and delete or rename the others.")
            if ended and settled and len(half) == 1 and half[0].power is Power.STOPPED:
                self._must_be_whole(half[0], intent, found)
            if ended and settled and half and (orphaned or not limit):
                raise WrongState(f"{half[0].name} ({half[0].uuid}) may be what an earlier run began to clone to {name}",
                                 f"If so, rename it to {name} in UTM; if not, give it another name.")
            if ended and settled and half and half[0].power is Power.STOPPED:
                if renames == 3:
                    break
                self._rename(half[0], name)
                renames, since = renames + 1, time.monotonic()
            elif reply and not (named or half):
                problem = self._in_vain(reply, found, name, time.monotonic() - since)
                if problem:
                    intent.remove()
                    raise problem
                if time.monotonic() - since >= SETTLE and was_not_heard(reply):
                    return None
            elif not (named or half) and time.monotonic() >= deadline:
                break
        if half:
            raise TimedOut(
                f"the clone {name} is unfinished: {half[0].name} ({half[0].uuid}) is {half[0].power.value}",
                f"When UTM is done with it, run this again; or rename it to {name} in UTM.",
            )
        if call:
            raise TimedOut(f"UTM has not shown {name} within {limit:.0f} s; it may still be copying",
                           "Run the same command again: it finds the machine if it has come, and makes no second one.")
        if not ended:
            raise self._under_way(name)
        return None

    def _must_be_whole(self, row: Row, intent: Intent, found: dict[str, Any]) -> None:
        """Raises KodeError if the machine is an incomplete copy; the intent then says so to later runs."""
        hardware = self._utm.hardware(row.uuid, found["base_uuid"])
        try:
            VM(self._utm, row).must_be_whole(hardware, found["base_uuid"])
        except KodeError:
            intent.rewrite({**found, "incomplete": row.uuid})
            raise

    def _in_vain(self, reply: Reply, found: dict[str, Any], name: str, seconds: float) -> KodeError | None:
        """What there is to say of a clone call that has ended, left nothing for `seconds`, and will leave nothing."""
        base = found["base"]
        deed = f"clone {base} to {name}" if found["base_uuid"] else f"make {name}"
        try:
            self._utm.insist(reply)
        except Unreachable as refusal:
            return refusal
        if reply.outcome is Outcome.FAILED and seconds >= ASK_AGAIN:
            running = [row for row in self._utm.rows() if row.uuid == found["base_uuid"]
                       and row.power is not Power.STOPPED]
            return KodeError(
                f"UTM could not {deed}: {reply.sentence}",
                f"{base} is {running[0].power.value}; only a stopped one can be cloned." if running
                else "Is the disk full? Try it in UTM's window; it may show more.",
            )
        if reply.outcome is Outcome.DONE and seconds >= SETTLE:
            return KodeError(f"UTM reported that it did {deed}, but there is no new machine",
                             "Try again; is the disk full?")
        return None

    def _rename(self, row: Row, name: str) -> None:
        """Completes UTM's half-done renaming of a machine that is provably ours."""
        self._notes.step(f"completing the name of {row.name}: {name}")
        try:
            reply = self._utm.insist(VM(self._utm, row).configure(name=name))
        except Unreachable as failure:
            raise Unreachable(
                f"the new machine is still called {row.name} ({row.uuid}), and cannot be renamed: "
                f"{failure.message}",
                f"Rename it to {name} in UTM, then run this again.",
            ) from None
        if reply.outcome is not Outcome.DONE:
            self._notes.warn(f"UTM did not rename {row.name}: {reply.sentence}")


class Handoff:
    """What ssh and scp are told, so that a session ends in that very machine or not at all."""

    def __init__(self, settings: Settings, utm: Utmctl, state: State, words: Sequence[str]) -> None:
        self._settings, self._utm, self._state, self._words = settings, utm, state, words

    def keep_alive(self, host: str) -> dict[str, str]:
        """Ends a session whose machine is gone within 45 s, unless the person's configuration has its own interval."""
        reply = None
        with contextlib.suppress(KodeError):        # without ssh there is no session either, and that is said then
            reply = self._utm.call("ssh", "-G", "--", host)
        if reply and re.search(r"(?m)^serveraliveinterval [1-9]", reply.out):
            return {}
        return {"ServerAliveInterval": "10", "ServerAliveCountMax": "3"}

    def pin(self, vm: VM) -> bool:
        """Makes the machine's recorded host keys the only known ones of its name; false if there are none.

        Then ssh may learn one, in the same file; the next handoff takes it over into the record.
        """
        record = self._state.records().get(vm.uuid, {})
        recorded = record.get("host_keys")
        keys = parse_host_keys([key for key in recorded if isinstance(key, str)]) if isinstance(recorded, list) else []
        if not keys and record.get("learning"):
            keys = self._state.pinned(vm.name)
            self._state.record(vm.uuid, host_keys=keys or None)
        self._state.pin(vm.name, keys)
        if not keys and not record.get("learning"):
            self._state.record(vm.uuid, name=vm.name, learning=True)
        return bool(keys)

    def _own_options(self, pinned: bool) -> dict[str, str]:
        """What ties ssh to our own host keys, whatever the person's own configuration says of `Host *`."""
        def quoted(path: str) -> str:
            return '"' + path.replace("%", "%%") + '"'
        options = {"UserKnownHostsFile": quoted(self._state.known_hosts), "GlobalKnownHostsFile": "/dev/null",
                   "StrictHostKeyChecking": "yes" if pinned else "accept-new", "UpdateHostKeys": "no",
                   "VerifyHostKeyDNS": "no", "HashKnownHosts": "no", "CheckHostIP": "no",
                   "IgnoreUnknown": "*", "KnownHostsCommand": "none",
                   "ControlMaster": "no", "ControlPath": "none", "ForwardAgent": "no", "CanonicalizeHostname": "no"}
        if self._settings.ssh_user:
            options["User"] = self._settings.ssh_user
        if self._settings.identity_file:
            options["IdentityFile"] = quoted(self._settings.identity_file)
        return options

    def argv(self, vm: VM, address: str, command: Sequence[str], pinned: bool) -> list[str]:
        """The command line of ssh to an address; the words of `command` are joined by the guest's login shell."""
        options = {"HostName": address, "HostKeyAlias": vm.name, **self._own_options(pinned), "ProxyJump": "none",
                   "ProxyCommand": "none", "ProxyUseFdpass": "no", "Port": str(self._settings.ssh_port),
                   **self.keep_alive(address)}
        return ["ssh", *as_words(options), "--", address, *command]

    def name_options(self, pinned: bool = True) -> dict[str, str]:
        """The options with which ssh, scp and others reach a machine by its name, by way of `kodemachine proxy`.

        No Port and no HostKeyAlias: so the host key is looked up under the plain name. The program by its absolute
        path, since editors lack ~/bin on PATH; the proxy hands its connected socket to ssh.
        """
        proxy = shlex.join([*own_command(), *self._words, "proxy", *["--learning"] * (not pinned)]).replace("%", "%%")
        return {"ProxyCommand": f"{proxy} %h", "ProxyUseFdpass": "yes", **self._own_options(pinned)}


# What the guest agent runs in a new clone, as root; $1 is the label. It prints what it found, each line behind a
# mark of its own, and last that it came to its end. Before that all is flushed: a machine that is forced off within a
# minute would come back with an empty /etc/hostname and empty host keys.
#
# If $2 is `renew`, it is a fork, which has the host keys and the machine-id of the machine it was cloned from. They
# are replaced, each as a whole. DHCP clients send what was made of the machine-id at boot (contract 3), and ask for
# the address of their last lease: so that is dropped, and the caller starts the guest anew.
PERSONALITY = r"""
label=$1
{ printf '%s\n' "$label" > /proc/sys/kernel/hostname; } 2>/dev/null || hostnamectl set-hostname "$label"
printf '%s\n' "$label" > /etc/hostname
if grep -q '^127\.0\.1\.1[[:space:]]' /etc/hosts; then
  hosts=$(sed "s/^127\.0\.1\.1[[:space:]].*/127.0.1.1 $label/" /etc/hosts) && printf '%s\n' "$hosts" > /etc/hosts
else
  printf '127.0.1.1 %s\n' "$label" >> /etc/hosts
fi
if [ "$2" = renew ]; then
  renewed=yes
  for public in /etc/ssh/ssh_host_*_key.pub; do
    [ -f "$public" ] || continue
    key=${public%.pub}; kind=${key##*ssh_host_}
    rm -f "$key.new" "$key.new.pub"
    { ssh-keygen -q -t "${kind%_key}" -N '' -C "root@$label" -f "$key.new" < /dev/null &&
      mv "$key.new" "$key" && mv "$key.new.pub" "$public"; } || renewed=no
  done
  id=$(od -An -N16 -tx1 /dev/urandom | tr -dc 0-9a-f)
  { [ ${#id} = 32 ] && echo "$id" > /etc/machine-id.new && mv /etc/machine-id.new /etc/machine-id; } || renewed=no
  if [ -f /var/lib/dbus/machine-id ]; then ln -sf /etc/machine-id /var/lib/dbus/machine-id; fi
  rm -f /var/lib/dhcp/*.leases /var/lib/NetworkManager/*.lease /var/lib/systemd/random-seed
  echo "renewed=$renewed"
fi
echo "hostname=$(cat /proc/sys/kernel/hostname)"
for key in /etc/ssh/ssh_host_*_key.pub; do
  if [ -f "$key" ]; then sed 's/^/key=/' "$key"; fi
done
echo "machine-id=$(cat /etc/machine-id)"
sync
echo "end=$label"
"""


def image_of(record: dict[str, Any]) -> dict[str, Any]:
    """The image that a machine was cloned from, as it is recorded: its name and UUID; {} if that is not known."""
    image = record.get("image")
    return image if isinstance(image, dict) else {}


def whole_name(image: str) -> str:
    """The name of the image that is meant by `v0.2.0`; any other as it is."""
    return "kodeimage-" + image if IMAGE.fullmatch("kodeimage-" + image) else image


def without_trace(record: dict[str, Any]) -> dict[str, str | None]:
    """What to change in a record when a boot that leaves no trace in the machine (--disposable) is over."""
    if not record.get("disposable"):
        return {}
    keys = ["disposable"] if record.get("personality") else ["disposable", "host_keys", "learning"]
    return {**dict.fromkeys(keys), **({"first_boot": "pending"} if record.get("first_boot") == "ran" else {})}


class Manager:
    """The fleet: from a label to a machine, and everything that is done to machines."""

    def __init__(self, settings: Settings, utm: Utmctl, state: State, words: Sequence[str] = ()) -> None:
        """`words`: what a kodemachine that others start for us has to be told on its command line."""
        self.settings, self.utm, self.state = settings, utm, state
        self._notes, self.cloner = utm.notes, Cloner(utm, state, settings.clone_timeout)
        self.handoff = Handoff(settings, utm, state, words)
        self._turn = threading.Lock()
        self._waiting_since: float | None = None        # for another kodemachine to be done with the fleet

    # -- names

    def label(self, text: str) -> str:
        """The label that a person's word stands for; the prefix typed by habit is dropped. Raises UsageError."""
        label = text.removeprefix(self.settings.prefix)
        if text == ".":
            try:
                here = os.getcwd()
            except OSError as failure:
                raise UsageError(f"the current folder has no name: {failure.strerror}", "Change to another.") from None
            label = re.sub(r"[^a-z0-9]+", "-", os.path.basename(here).lower()).strip("-")
            label = label.removeprefix(self.settings.prefix)[:63 - len(self.settings.prefix)].rstrip("-")
        if label in RESERVED:
            raise UsageError(f"{label!r} is a word of kodemachine's own and cannot be a machine's label",
                             f"Did you mean {ELSEWHERE[label]!r}? See: kodemachine help" if label in ELSEWHERE
                             else "See: kodemachine help")
        if not LABEL.fullmatch(label) or label.startswith(self.settings.prefix):
            raise UsageError(
                f"{text!r} cannot be a label",
                f"It is an image's name. For a machine from it: kodemachine start LABEL --base {text}"
                if IMAGE.fullmatch(text) else
                "A label has lower-case letters, digits and inner hyphens, such as project-alpha.",
            )
        if len(self.settings.prefix + label) > 63:
            raise UsageError(
                f"{label!r} is too long for a label",
                f"At most {63 - len(self.settings.prefix)} characters fit, with the prefix {self.settings.prefix!r}.",
            )
        return label

    def label_of(self, name: str) -> str | None:
        """The label in a machine's name; None for a name that no label of ours makes."""
        label = name[len(self.settings.prefix):]
        ours = name.startswith(self.settings.prefix) and len(name) <= 63 and LABEL.fullmatch(label)
        return label if ours and not label.startswith(self.settings.prefix) else None

    def _image_uuids(self) -> set[str]:
        bases = (image_of(record).get("uuid") for record in self.state.records().values()
                 if not IMAGE.fullmatch(str(record.get("name"))))       # what an image was made from, is none itself
        return {uuid for uuid in bases if isinstance(uuid, str)}

    def images(self, rows: Sequence[Row]) -> list[Row]:
        """The golden images among the rows: the configured one, any kodeimage-v..., and any that a clone came from."""
        bases, own = self._image_uuids(), self.settings.base_image or ""
        return [row for row in rows if row.name == own or row.name.startswith("kodeimage-v")
                or row.uuid in (own.upper(), *bases)]

    def clones(self, rows: Sequence[Row]) -> list[Row]:
        """The machines that are ours: the prefix and a valid label make the name, and it is no image."""
        images = set(self.images(rows))
        return [row for row in rows if row not in images and self.label_of(row.name)]

    def row_of(self, rows: Sequence[Row], label: str) -> Row | None:
        """The one clone of that label. Raises WrongState if two bear its name, or if it is an image."""
        name = self.settings.prefix + label
        found = [row for row in rows if row.name == name]
        if len(found) > 1:
            raise WrongState(f"{len(found)} machines are called {name}: " + ", ".join(row.uuid for row in found),
                             "Rename or delete one of them in UTM.")
        if found and found[0] in self.images(rows):
            raise WrongState(f"{name} is an image that other machines were cloned from, not a clone",
                             "Images are never started or changed.")
        return found[0] if found else None

    def find(self, label: str) -> VM:
        """The clone of that label. Raises NotFound if a clean list lacks it."""
        rows = self.utm.rows(partial=True)
        row = self.row_of(rows, label)
        if row is None:
            rows.must_be_complete()
            labels = sorted(str(self.label_of(row.name)) for row in self.clones(rows))
            raise NotFound(f"there is no machine {label}", f"There are: {', '.join(labels)}" if labels else
                           f"Make it: kodemachine {label}")
        return VM(self.utm, row)

    @contextlib.contextmanager
    def holding(self, label: str, *, wait: bool = True) -> Iterator[None]:
        """Holds the label's lock, which comes before the fleet's."""
        with self.state.lock(self.settings.prefix + label, self.settings.lock_limit, wait=wait):
            yield

    @contextlib.contextmanager
    def fleet(self) -> Iterator[None]:
        """Holds the fleet's lock: for clone, rename, configuration and delete.

        Our own threads take turns before it, so that only the time that others take counts as waiting; and that is
        counted once for all of them.
        """
        with self._turn:
            self._waiting_since = self._waiting_since or time.monotonic()
            left = self._waiting_since + self.settings.lock_limit - time.monotonic()
            with self.state.lock("fleet", max(1.0, left), what="the fleet"):
                self._waiting_since = None
                yield

    def record_of(self, uuid: str) -> dict[str, Any]:
        """What is known of a machine."""
        return self.state.records().get(uuid, {})

    # -- the spawn

    def obtain(self, label: str, wishes: Wishes) -> tuple[VM, Call | None]:
        """The clone of that label, made if it is missing, and a question for its addresses.

        That question is asked of the UUID remembered for the name while the list is on its way, and its answer is
        only kept if the list shows exactly that machine, started. Callers hold the label's lock.
        """
        name = self.settings.prefix + label
        known = [uuid for uuid, record in self.state.records().items()
                 if record.get("name") == name and UUID.fullmatch(uuid)]
        call = self.utm.begin("ip-address", known[0]) if len(known) == 1 else None
        try:
            listing = self.utm.begin("list")
            import base64  # noqa: F401 (what probe and handoff need: now, while UTM looks, it costs no time)
            import socket  # noqa: F401

            rows = self.utm.rows(partial=True, call=listing)
            row = self.row_of(rows, label)
            if row is None:
                rows.must_be_complete()
                self._may_clone(label, wishes, filter(None, map(self.label_of, (row.name for row in rows))))
                return VM(self.utm, self._clone(label, wishes)), None
            self.cloner.adopt(row)
            self._keep_as_it_is(row, label, wishes)
            record = self.record_of(row.uuid)
            if self.is_orphan(row, record):
                self.state.record(row.uuid, rm=None)        # somebody wants it after all
            if record.get("name", name) != name:
                self.state.record(row.uuid, name=name)      # it was renamed in UTM
            if row.uuid in known and row.power is Power.STARTED:
                kept, call = call, None
                return VM(self.utm, row), kept
            return VM(self.utm, row), None
        finally:
            self.utm.drop(call)

    def _clone(self, label: str, wishes: Wishes) -> Row:
        """A new machine of that label, or the one that an earlier run began to make."""
        name = self.settings.prefix + label
        with self.fleet():
            intent = Intent(self.state, name)
            begun = intent.load()
            row = self.cloner.finish(name)
            rows = self.utm.rows()
            row = row or self.row_of(rows, label)     # it may have come since the first look, as UTM was starting
            if row:
                self.cloner.adopt(row)
                self._keep_as_it_is(row, label, wishes)
            elif begun and begun.get("inherits", {}).get("fork"):       # else this one would pass for that copy
                intent.remove()
                raise WrongState(f"nothing has come of an earlier run that was to clone {begun['base']} to {name}",
                                 f"To clone it: {self.to_complete(name, begun)}; for a machine from the image, "
                                 "run the same command again.")
            else:
                row = self.cloner.clone(self.base_for_new(rows, wishes.base), name, rows, wishes.afterwards)
                self.cloner.adopt(row)
            self.state.record(row.uuid, name=name, rm=wishes.only_new or None)
            self.state.forget(name, {row.uuid, *(other.uuid for other in rows)})
            return row

    def fork(self, label: str, new: str) -> None:
        """Clones a stopped clone under a new label; the copy counts as one of the same image.

        Raises WrongState if that cannot be, or if there is a machine of that name, unless an earlier run of this
        made it. Callers hold both labels' locks.
        """
        vm, name = self.find(label), self.settings.prefix + new
        record = self.record_of(vm.uuid)
        record.update(without_trace(record))
        if record.get("saved"):
            raise WrongState(f"{vm.name} has a saved session, which its copy would lack",
                             f"First: kodemachine resume {label}, then kodemachine stop {label}")
        if vm.power is not Power.STOPPED:
            raise WrongState(f"{vm.name} is {vm.power.value}; only a stopped machine can be cloned",
                             f"First: kodemachine stop {label}")
        with self.fleet():
            intent = Intent(self.state, name)
            found = intent.load()
            if found and found["base_uuid"] != vm.uuid:
                rows = self.utm.rows()
                # That which is gone is cloned no more; what may have come of it, `finish` sees.
                if intent.call_alive() or self.row_of(rows, new) or found["base_uuid"] in {row.uuid for row in rows}:
                    raise WrongState(f"an earlier run began to clone {found['base']} to {name}",
                                     f"To complete that: {self.to_complete(name, found)}")
            row = self.cloner.finish(name)
            rows = self.utm.rows()
            if row is None and self.row_of(rows, new):
                raise WrongState(f"{name} exists already", f"Choose another label, or first: kodemachine delete {new}")
            if row is None:
                self.prove_whole(Row(vm.uuid, vm.power, vm.name))
            hook = None if record.get("new") else record.get("first_boot") or "done"        # on its disk, as there
            row = row or self.cloner.clone(Row(vm.uuid, vm.power, vm.name), name, rows, image=record.get("image"),
                                            fork=True, first_boot=hook)
            self.cloner.adopt(row)
            self.prove_whole(row)
            self.state.forget(name, {row.uuid, *(other.uuid for other in rows)})

    def to_complete(self, name: str, found: dict[str, Any]) -> str:
        """The command line that completes the clone of which an intent says `found`."""
        label = self.label_of(name)
        return f"kodemachine clone {self.label_of(found['base'])} {label}" if found.get("inherits", {}).get("fork") \
            else f"kodemachine {label}"

    def _may_clone(self, label: str, wishes: Wishes, labels: Iterable[str]) -> None:
        near, other = near_command(label), near_label(label, labels)
        if not wishes.may_clone:
            raise NotFound(f"there is no machine {label}" + (f"; did you mean {other!r}?" if other else ""),
                           f"Make it: kodemachine {label}")
        if wishes.bare and near:
            raise UsageError(f"there is no machine {label}; did you mean {near!r}?",
                             f"To make a machine of that name all the same: kodemachine start {label}")
        if other:
            self._notes.warn(f"{label} is a new machine; {other} exists, too")

    def _keep_as_it_is(self, row: Row, label: str, wishes: Wishes) -> None:
        """Refuses wishes that only a new machine, or one that is off, could fulfil."""
        record = self.record_of(row.uuid)
        again = "To replace it: the same command with --fresh"
        if wishes.only_new:
            raise WrongState(f"{row.name} exists already, and --rm is only for a machine that it makes itself",
                             f"To replace it: kodemachine delete {label}, then the same command")
        image = image_of(record)
        if wishes.base and image.get("name") not in (wishes.base, whole_name(wishes.base)) \
                and wishes.base.upper() != image.get("uuid"):
            raise WrongState(f"{row.name} was cloned from {image.get('name', 'an unknown image')}", again)
        # Made by a run that was cut off before its first start.
        unstarted = record.get("new") and row.power is Power.STOPPED and not record.get("saved")
        if (wishes.cpus or wishes.memory) and not unstarted:
            raise WrongState(f"{row.name} exists already; --cpus and --memory are for a new clone", again)
        if wishes.disposable and record.get("saved"):
            raise WrongState(f"{row.name} has a saved session, which --disposable would lose",
                             f"First: kodemachine resume {label}, then kodemachine stop {label}")
        if wishes.disposable and row.power is not Power.STOPPED and not record.get("disposable"):
            raise WrongState(f"{row.name} is {row.power.value}; only a stopped machine can be started as disposable",
                             f"First: kodemachine stop {label}")

    def configured(self, rows: Sequence[Row]) -> str | None:
        """The name of the image that new machines come from: the configured one, or the highest version there is."""
        own = self.settings.base_image
        if own:
            return next((row.name for row in rows if row.uuid == own.upper()), own)
        versions = [row.name for row in rows if IMAGE.fullmatch(row.name)]
        return max(versions, key=lambda name: tuple(map(int, name[11:].split("."))), default=None)

    def base(self, rows: Sequence[Row], wanted: str | None) -> Row:
        """The image to clone: stopped, and the only one of that name. Raises NotFound or WrongState."""
        names = ", ".join(sorted(row.name for row in self.images(rows))) or "none yet"
        wanted = wanted or self.configured(rows)
        if wanted is None:
            raise NotFound("there is no image to clone", "Make one: kodemachine base create v0.1.0 "
                           "(README: The golden image).")
        found = [row for row in rows if row.name == wanted or row.uuid == wanted.upper()] or \
            [row for row in rows if row.name == whole_name(wanted)]
        if not found:
            raise NotFound(f"there is no image {wanted}", f"Images: {names}. Choose one with --base, or: "
                           "kodemachine config set base_image NAME")
        if len(found) > 1:
            raise WrongState(
                f"{len(found)} machines are called {wanted}: " + ", ".join(row.uuid for row in found),
                "Rename one of them in UTM.",
            )
        if found[0] in self.clones(rows):
            raise WrongState(f"{found[0].name} is a clone, not an image", f"Images: {names}")
        if found[0].power is not Power.STOPPED:
            raise WrongState(
                f"the image {found[0].name} is {found[0].power.value}; only a stopped one can be cloned",
                f"Shut it down in UTM, or: {shlex.quote(self.utm.path())} stop --request {found[0].uuid}",
            )
        return found[0]

    def prove_whole(self, row: Row) -> None:
        """Raises KodeError if a machine that was never started is an incomplete copy. What is proved is recorded."""
        copy_of = self.record_of(row.uuid).get("copy_of")
        if copy_of:
            VM(self.utm, row).must_be_whole(self.utm.hardware(row.uuid, copy_of), copy_of)
            self.state.record(row.uuid, copy_of=None)

    def base_for_new(self, rows: Sequence[Row], wanted: str | None) -> Row:
        """The image for a machine that is to be made now. Raises KodeError if that could not succeed."""
        if self.settings.first_boot:
            open_script(self.settings.first_boot).close()       # said now, and not by the new machine
        row = self.base(rows, wanted)
        self.prove_whole(row)
        return row

    def bring_up(self, vm: VM, label: str, wishes: Wishes, call: Call | None = None) -> str:
        """Starts or resumes a machine, waits for its ssh server and gives it its name; returns the address.

        Callers hold the label's lock.
        """
        limit = wishes.timeout or self.settings.boot_timeout
        began = time.monotonic()
        record = self.record_of(vm.uuid)
        renews = record.get("fork") and vm.power is Power.STOPPED and not (wishes.disposable or record.get("saved"))

        def before_cold() -> None:
            nonlocal began
            self.before_cold_start(vm, record, wishes)
            began = time.monotonic()        # the wait for somebody else's lock is no part of the boot

        if vm.power is not Power.STARTED:
            resumes = vm.power is Power.PAUSED or record.get("saved")
            self._notes.step(f"{'resuming' if resumes else 'starting'} {vm.name}")
            vm.power_on(limit, hide=self.settings.headless and not wishes.gui, disposable=wishes.disposable,
                        before_cold=before_cold)
            record = self.record_of(vm.uuid)
        if record.get("saved") or record.get("new"):
            hook = "pending" if record.get("new") and self.settings.first_boot else None
            self.state.record(vm.uuid, saved=None, new=None, first_boot=record.get("first_boot") or hook)
        if not call:
            self._notes.step(f"waiting for ssh on {vm.name}")
        address = vm.greet(self.settings.ssh_port, max(1.0, limit - (time.monotonic() - began)), call)
        if renews:
            return self._renew(vm, label, wishes) or address
        if not (record.get("personality") or (record.get("disposable") and record.get("host_keys"))):
            self._give_personality(vm, label)
        return address

    def before_cold_start(self, vm: VM, record: dict[str, Any], wishes: Wishes) -> None:
        """Sees to a network address of its own, and drops what an earlier boot alone knew."""
        if not record.get("saved"):
            if wishes.cpus or wishes.memory or not record.get("mac_checked"):
                with self.fleet():
                    self._notes.step(f"checking the network address of {vm.name}")
                    vm.prepare(wishes.memory, wishes.cpus, record.get("copy_of") or "")
            self.state.record(vm.uuid, name=vm.name, mac_checked=True, copy_of=None)
        self.state.record(vm.uuid, **{**without_trace(record), "disposable": wishes.disposable or None})

    def _renew(self, vm: VM, label: str, wishes: Wishes) -> str | None:
        """Gives a fork host keys and a machine-id of its own, and starts it anew, since only then they count.

        Returns its address then, or None if its guest agent did not do it; the next cold start tries again.
        """
        self._notes.step(f"giving {vm.name} host keys and a machine-id of its own")
        told = self.read_guest(vm, label, renew=True)
        if told is None:
            return None
        self._notes.step(f"restarting {vm.name}")
        try:
            vm.ask_to_stop(self.settings.stop_timeout)
        except TimedOut:
            vm.force_off()          # what was written has been synced
        self.state.record(vm.uuid, host_keys=told[0] or None, machine_id=printable(told[1]) or None, personality=True,
                          fork=None, learning=None)
        limit = wishes.timeout or self.settings.boot_timeout
        vm.power_on(limit, hide=self.settings.headless and not wishes.gui)
        self._notes.step(f"waiting for ssh on {vm.name}")
        return vm.greet(self.settings.ssh_port, limit)

    def read_guest(self, vm: VM, label: str, *, needed: bool = False, renew: bool = False) -> \
            tuple[list[str], str] | None:
        """Names the guest, and returns its host keys and machine-id; None if its answer does not prove it.

        With `needed`, a guest agent that does not run commands is an error.
        """
        problem, out = "its answer is not complete", b""
        try:
            _, out, _ = vm.run(["/bin/sh", "-c", PERSONALITY, "kodemachine", label, *["renew"] * renew],
                               limit=LIMITS["osascript"])
        except KodeError as failure:
            if needed:
                raise
            problem = failure.message
        pairs = [line.split("=", 1) for line in out.decode("utf-8", "replace").splitlines() if "=" in line]
        told = dict(pairs)
        wanted = {"hostname": label, "end": label, **({"renewed": "yes"} if renew else {})}
        if any(told.get(key) != value for key, value in wanted.items()):
            self._notes.warn(f"the guest agent did not name {vm.name} ({problem}); the next start tries again")
            return None
        return parse_host_keys([line for key, line in pairs if key == "key"]), told.get("machine-id", "")[:64]

    def _give_personality(self, vm: VM, label: str) -> None:
        self._notes.step(f"naming the guest {label}")
        told = self.read_guest(vm, label)
        if told is None:
            return
        self.state.record(
            vm.uuid,
            name=vm.name,
            host_keys=told[0] or None,
            machine_id=printable(told[1]) or None,
            personality=None if self.record_of(vm.uuid).get("disposable") else True,
            learning=None,
        )

    def first_boot(self, vm: VM) -> str | None:
        """The script that is still to be run in a machine, if there is one."""
        return self.settings.first_boot if self.record_of(vm.uuid).get("first_boot") == "pending" else None

    def first_boot_done(self, vm: VM) -> None:
        """The script has been run; `ran` is forgotten at power-off."""
        self.state.record(vm.uuid, first_boot="ran" if self.record_of(vm.uuid).get("disposable") else "done")

    # -- looking

    def running(self, label: str) -> tuple[VM, str, bool]:
        """A machine that runs, and the address at which it answers; it is neither cloned nor started for that.

        The third is whether its host keys are known; they are pinned then. Raises NotFound or WrongState. Callers
        hold the label's lock.
        """
        wishes = Wishes(may_clone=False)
        vm, call = self.obtain(label, wishes)
        if vm.power is not Power.STARTED:
            raise WrongState(f"{vm.name} is {vm.power.value}", f"Start it: kodemachine start -d {label}")
        address = self.bring_up(vm, label, wishes, call)
        return vm, address, self.handoff.pin(vm)

    @property
    def documents(self) -> str:
        """The folder of UTM's bundles."""
        return self.settings.documents or os.path.expanduser(DOCUMENTS)

    def survey(self, rows: Sequence[Row], *, ip: bool = True, disk: bool = True) -> list[Machine]:
        """What `list` shows of these machines. One that is hung or gone costs its own row a blank."""
        records = self.state.records()
        running = [row for row in rows if row.power is Power.STARTED] if ip else []
        replies = self.utm.gather([("ip-address", row.uuid) for row in running], limit=ADDRESS_LIMIT)
        addresses = {row.uuid: (parse_addresses(reply.out) if reply.outcome is Outcome.DONE else [])
                     for row, reply in zip(running, replies)}
        disks = read_bundles(self.documents, rows, DISK_LIMIT, self._notes.tick) if disk and rows else {}
        images = set(self.images(rows))
        found = []
        for row in rows:
            record, on_disk = records.get(row.uuid, {}), disks.get(row.uuid, Disk())
            found.append(
                Machine(
                    None if row in images else self.label_of(row.name),
                    row.name,
                    row.uuid,
                    row.power.value,
                    next(iter(addresses.get(row.uuid, [])), None),
                    image_of(record).get("name"),
                    on_disk.memory,
                    on_disk.size,
                    on_disk.frees,
                    record.get("created"),
                )
            )
        return found

    # -- the everyday verbs; callers hold the label's lock

    def stop(self, label: str, limit: float, *, force: bool = False, kill: bool = False) -> str:
        """Turns a machine off, asking the guest first unless told otherwise; returns what was done."""
        vm = self.find(label)
        record = self.record_of(vm.uuid)
        if vm.power is Power.STOPPED:
            return "is stopped already" + (", with a saved session" if record.get("saved") else "")
        # A session on disk is lost when the machine goes on, and not by turning off one that is paused (contract 2).
        saved = record.get("saved") if (force or kill) and vm.power in (Power.PAUSING, Power.PAUSED) else None
        if force or kill:
            vm.force_off(kill)
        else:
            try:
                vm.ask_to_stop(limit)
            finally:
                if record.get("saved") and vm.power is Power.STARTED:       # it was resumed, and may yet power off
                    self.state.record(vm.uuid, saved=None)
        self.state.record(vm.uuid, saved=saved, **without_trace(record))
        return "stopped" + ", with a saved session" * bool(saved)

    def suspend(self, label: str, *, save: bool) -> str:
        """Pauses a machine to memory, or to disk; returns what was done."""
        vm = self.find(label)
        if vm.power is Power.PAUSED and not save:
            return "is suspended already"
        record = self.record_of(vm.uuid)
        if save and record.get("disposable"):
            raise WrongState(f"{vm.name} runs as disposable and cannot be saved to disk",
                             f"To memory it can: kodemachine suspend {label}")
        # A machine that runs has no saved session (any more): its snapshot is deleted when it goes on (contract 2).
        before = record.get("saved") if vm.power is not Power.STARTED else None
        if save or record.get("saved"):     # already now: should we be cut off, it may be
            self.state.record(vm.uuid, name=vm.name, saved=save or before)
        try:
            vm.suspend(self.settings.stop_timeout, save)
        except (TimedOut, Unreachable):         # it may have been saved: that is not to be forgotten
            raise
        except KodeError:
            self.state.record(vm.uuid, saved=before)
            raise
        return "saved to disk" if save else "suspended to memory"

    def resume(self, label: str) -> str:
        """Lets a paused or saved machine go on; returns what was done."""
        vm = self.find(label)
        record = self.record_of(vm.uuid)
        if vm.power is Power.STARTED:
            return "is running already"

        def before_cold() -> None:
            if not record.get("saved"):
                raise WrongState(f"{vm.name} is stopped and has no saved session",
                                 f"Start it: kodemachine start -d {label}")
        vm.power_on(self.settings.boot_timeout, hide=self.settings.headless, before_cold=before_cold)
        self.state.record(vm.uuid, saved=None)
        return "resumed"

    def delete(self, vm: VM, *, force: bool) -> int | None:
        """Deletes a clone, stopping it first with `force`; returns the bytes that only it held, if they are known."""
        if vm.power is not Power.STOPPED:
            if not force:
                raise WrongState(f"{vm.name} is {vm.power.value}",
                                 f"Stop it first, or: kodemachine delete --force {self.label_of(vm.name)}")
            self.utm.rows()         # without a complete list nothing is deleted: then it need not be off either
            vm.force_off()
        disk = read_bundles(self.documents, [Row(vm.uuid, vm.power, vm.name)], DISK_LIMIT, self._notes.tick)
        with self.fleet():
            rows = self.utm.rows()
            ours = {row.uuid for row in self.clones(rows) if row.name == vm.name}
            if vm.uuid in {row.uuid for row in rows} - ours:    # one that is gone meanwhile is what was asked for
                raise WrongState(f"{vm.uuid} is not the clone {vm.name} any more, and was not deleted",
                                 "See what is there: kodemachine list -a")
            vm.delete(LIMITS["delete"])
            Intent(self.state, vm.name).remove()
            listed = {row.uuid for row in rows} - {vm.uuid}
            for name in {vm.name, str(self.record_of(vm.uuid).get("name"))}:        # it may have been renamed in UTM
                self.state.forget(name, listed)
        return disk.get(vm.uuid, Disk()).frees

    def tidy(self) -> None:
        """Drops what is remembered of machines that a clean list lacks; the fleet's lock spares those being born."""
        if not self.state.records():
            return
        with self.fleet():
            listed = {row.uuid for row in self.utm.rows()}
            if not listed:
                return              # perhaps UTM only has no window yet (contract 4)
            records = self.state.records()
            for name in {str(record.get("name")) for uuid, record in records.items() if uuid not in listed}:
                self.state.forget(name, listed)

    def session_lock(self, vm: VM) -> contextlib.AbstractContextManager[None]:
        """Held by a --rm session for its machine as long as it lives; so an orphan can be told."""
        return self.state.lock(vm.uuid + ".session", 5.0)       # a `list` that looks holds it for a moment

    def is_orphan(self, row: Row, record: dict[str, Any]) -> bool:
        """Whether a machine was made with --rm, as its record says, and its kodemachine is no more."""
        return bool(record.get("rm")) and not self.state.locked(row.uuid + ".session")


# ---- golden images

# What the guest agent runs in a machine that becomes an image, as root: $1 is `check` (look only), `apply`, or `prove`
# (look once more: what is wrong now is an error), $2 the user, $3 their public key, $4 `yes` if they may become root
# unasked. Each step says `step NAME ok|would|done|bad|warn DETAIL`. What find_NAME prints is what is wrong there, and
# fix_NAME mends it; so whatever was cut off, the next run goes on from there. The end is proved by the last line.
SEAL = r"""
mode=$1 user=$2 key=$3 sudo=$4

say() { printf 'step %s %s %s\n' "$1" "$2" "$3"; }
brief() { awk 'NR == 1 { first = $0 } END { if (NR > 1) first = first " and " NR - 1 " more"; print first }'; }
bad() { say "$1" bad "$2"; [ "$mode" = check ] || { echo end; exit; }; }
need() { found=$(find_"$1"); if [ -n "$found" ]; then bad "$1" "$found"; else say "$1" ok; fi; }
hint() {
  found=$(find_"$1" 2>/dev/null | brief)
  if [ -n "$found" ]; then say "$1" warn "$found"; else say "$1" ok; fi
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
# For what comes back by itself while the machine runs: it is not proved.
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
remove() { while read -r file; do rm -f "$file"; done; }

find_systemd() { command -v systemctl >/dev/null || echo 'this is no Linux with systemd'; }
find_server() { command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || echo 'openssh-server is not installed'; }

find_agent() { enabled qemu-guest-agent.service || echo 'qemu-guest-agent does not start at boot'; }
fix_agent() { start_at_boot qemu-guest-agent.service; }

find_ssh() {
  for unit in ssh.service ssh.socket sshd.service sshd.socket; do if enabled $unit; then return; fi; done
  echo 'the ssh server does not start at boot'
}
fix_ssh() { start_at_boot ssh.service || start_at_boot sshd.service; }

find_user() { id -u "$user" >/dev/null 2>&1 || echo "there is no user $user"; }
fix_user() { useradd -m -s /bin/bash -p '*' "$user"; }

keys() {
  home=$(getent passwd "$user" | cut -d : -f 6)
  printf '%s/.ssh/authorized_keys\n' "${home:-/nonexistent}"
}
find_key() {
  grep -qs "^[^#]*$(printf '%s\n' "$key" | cut -d ' ' -f 1,2)" "$(keys)" || echo "$user does not have your ssh key"
}
fix_key() {
  file=$(keys) folder=${file%/*}
  mkdir -p "$folder"
  [ -z "$(tail -c 1 "$file" 2>/dev/null)" ] || echo >>"$file"
  printf '%s\n' "$key" >>"$file"
  chmod 700 "$folder"; chmod 600 "$file"; chown -R "$user:" "$folder"
  if command -v restorecon >/dev/null; then restorecon -R "$folder"; fi
}

find_sudo() {
  [ "$(id -u "$user" 2>/dev/null)" = 0 ] || sudo -n -l -U "$user" 2>/dev/null | grep -q 'NOPASSWD: ALL' ||
    echo "$user cannot become root without a password"
}
fix_sudo() {
  printf '%s ALL=(ALL) NOPASSWD: ALL\n' "$user" >/etc/sudoers.d/90-kodemachine
  chmod 440 /etc/sudoers.d/90-kodemachine
}

case $(uname -m) in aarch64 | arm64) port=ttyAMA0;; *) port=ttyS0;; esac
find_console() {
  [ "$(systemctl is-enabled "serial-getty@$port.service" 2>/dev/null)" = enabled ] ||    # enabled-runtime is for a boot
    echo "nobody can log in on the serial port $port"
}
fix_console() { start_at_boot "serial-getty@$port.service"; }

# Profiles that hold for one MAC address, or for one name of a card, which a removed drive can change. What is pinned
# is put aside under another name, and what stands in for it names no card. The lease follows the machine-id, which
# each clone makes anew; so the DHCP client's identifier can stay what the system's own default is.
pinned() {
  grep -lE 'macaddress:|set-name:|^ +"?(en[a-z0-9]+|eth[0-9]+)"?:' /etc/netplan/*.yaml
  grep -lE '^ *((Permanent)?MACAddress=|Name=e(n|th)[a-z0-9]*$)' /etc/systemd/network/*.network
  grep -lE '^ *(Permanent)?MACAddress=' /etc/systemd/network/*.link
  grep -lE '^(mac-address=.|interface-name=e)' /etc/NetworkManager/system-connections/*
  grep -l . /etc/udev/rules.d/70-persistent-net.rules
}
find_network() { pinned | sed 's/$/ is for one card only/'; }
fix_network() {
  pinned 2>/dev/null | while read -r file; do
    case $file in
      */NetworkManager/*) sed -i -e '/^mac-address=/d' -e '/^interface-name=e/d' "$file"; continue;;
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

find_cloud() { [ ! -d /etc/cloud ] || [ -e /etc/cloud/cloud-init.disabled ] || echo 'cloud-init runs in each clone'; }
fix_cloud() { : >/etc/cloud/cloud-init.disabled; }

# One key is made, which takes no time, unless sshd is told to use others.
unit=/etc/systemd/system/kodemachine-hostkeys.service
text='[Unit]
Description=Make the SSH host keys of this machine
Before=ssh.service sshd.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c "grep -rqsi ^HostKey[[:blank:]] /etc/ssh/sshd_config /etc/ssh/sshd_config.d && \
exec ssh-keygen -A; \
key=/etc/ssh/ssh_host_ed25519_key; [ -s $$key.pub ] || { rm -f $$key; ssh-keygen -q -t ed25519 -N \"\" -f $$key; }"

[Install]
WantedBy=multi-user.target'
find_newkeys() {
  enabled "${unit##*/}" && [ "$(cat $unit)" = "$text" ] || echo 'nothing makes new host keys at boot'
}
fix_newkeys() { printf '%s\n' "$text" >$unit; chmod 644 $unit; systemctl daemon-reload; start_at_boot "${unit##*/}"; }

find_dbus() {
  [ ! -d /var/lib/dbus ] || [ "$(readlink /var/lib/dbus/machine-id)" = /etc/machine-id ] ||
    echo '/var/lib/dbus/machine-id is not a link to /etc/machine-id'
}
fix_dbus() { ln -sf /etc/machine-id /var/lib/dbus/machine-id; }

secrets() {
  for home in /root /home/*; do
    grep -lsE 'BEGIN .*PRIVATE KEY' "$home"/.ssh/*
    for file in .aws/credentials .netrc .git-credentials .config/gh/hosts.yml .docker/config.json .npmrc .pypirc \
      .kube/config .config/gcloud/credentials.db .gnupg/private-keys-v1.d .claude/.credentials.json .codex/auth.json; do
      if [ -e "$home/$file" ]; then printf '%s/%s\n' "$home" "$file"; fi
    done
  done
}
find_secrets() { secrets | sed 's/$/ would be in every clone/'; }

find_histories() {
  for home in /root /home/*; do
    find "$home" -maxdepth 1 -type f \( -name '.*_history' -o -name .lesshst -o -name .viminfo \)
  done
}
fix_histories() { find_histories | remove; }

find_packages() {
  find /var/cache/apt /var/lib/apt/lists /var/cache/dnf /var/cache/yum /var/cache/zypp /var/cache/pacman/pkg \
    -type f ! -name lock
}
fix_packages() { find_packages | remove; }

find_leases() {
  find /var/lib/dhcp /var/lib/dhcpcd /var/lib/NetworkManager -type f \
    \( -name '*.lease*' -o -name secret_key -o -name timestamps \)
}
fix_leases() { find_leases | remove; }

find_logs() { find /var/log -type f -size +0; }
fix_logs() {
  find /var/log -type f \( -path '*/journal/*' -o -name '*.gz' -o -name '*.xz' -o -name '*.[0-9]' -o -name '*.old' \) |
    remove
  find_logs | while read -r file; do : >"$file"; done
}

# The service would write a new one when the machine powers off, unless it is over by then.
find_seed() { find /var/lib/systemd/random-seed /var/lib/urandom/random-seed /boot/efi/loader/random-seed -type f; }
fix_seed() { systemctl stop systemd-random-seed.service; find_seed | remove; }

find_hostkeys() { find /etc/ssh -name 'ssh_host_*'; }
fix_hostkeys() { find_hostkeys | remove; }

find_machineid() { [ -f /etc/machine-id ] && [ ! -s /etc/machine-id ] || echo '/etc/machine-id is not an empty file'; }
fix_machineid() { : >/etc/machine-id; }

for name in systemd server; do need $name; done
for name in agent ssh user key; do step $name; done
if [ "$sudo" = yes ]; then step sudo; else hint sudo; fi
for name in console network cloud newkeys dbus; do step $name; done
hint secrets
for name in histories packages leases logs seed; do tidy $name; done
if [ "$mode" = apply ]; then
  if fstrim -a 2>/dev/null || fstrim / 2>/dev/null; then say trim 'done'; else say trim warn 'it cannot be trimmed'; fi
fi
for name in hostkeys machineid; do step $name; done
sync
echo end
"""


class Step(NamedTuple):
    """One step of SEAL; `status` is ok, would, done, bad or warn."""

    name: str
    status: str
    detail: str


def public_key(identity_file: str | None) -> str:
    """The person's public key, as `type base64 comment`. Raises KodeError if there is none."""
    kinds = ("ed25519", "ecdsa", "rsa", "ed25519_sk", "ecdsa_sk")
    places = [identity_file.removesuffix(".pub") + ".pub"] if identity_file else \
        [os.path.expanduser(f"~/.ssh/id_{kind}.pub") for kind in kinds]
    for place in places:
        with contextlib.suppress(OSError):
            first = (read_text(place) or "").partition("\n")[0]
            found = re.match(r"((?:ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/]+=*)(?:\s|$)", first)
            if found:                   # in a comment anything may stand
                return first if first.isascii() and first.isprintable() else found[1]
    raise KodeError(f"there is no public key of yours at {' or '.join(places[:1] if identity_file else places[:3])}",
                    "Make one: ssh-keygen -t ed25519, or name yours: kodemachine config set identity_file PATH")


def user_name(name: str | None) -> str:
    """The user in the guest: `name`, or else the login name, as ssh takes it. Raises UsageError."""
    import pwd

    try:
        name = name or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise UsageError("your user has no name here", "Set one: --user or ssh_user") from None
    if not SETTINGS["ssh_user"][1](name):
        raise UsageError(f"{name!r} cannot be a user's name in the guest", "Set another: --user or ssh_user")
    return name


class Images:
    """The golden images: which machine may become one, and how it comes by its name."""

    def __init__(self, manager: Manager) -> None:
        self._manager, self._utm, self._state = manager, manager.utm, manager.state
        self._cloner, self._notes = manager.cloner, manager.utm.notes

    def _sealable(self, text: str) -> Row:
        """The machine of that UTM name, UUID or label, which is no image. Raises NotFound or WrongState."""
        name = self._manager.settings.prefix + text
        rows = self._utm.rows()
        found = [row for row in rows if row.name == text or row.uuid == text.upper()
                 or (row.name == name and self._manager.label_of(name))]
        if len(found) > 1:
            raise WrongState(f"{text} may be one of {len(found)} machines: "
                             + ", ".join(f"{row.name} ({row.uuid})" for row in found), "Name its UUID.")
        if not found:
            raise NotFound(f"there is no machine {text}", "See them all: kodemachine list -a")
        if found[0] in self._manager.images(rows) or found[0].name.startswith("kodeimage-"):
            raise WrongState(f"{found[0].name} is an image, and images are never changed",
                             "Seal a clone of it instead.")
        return found[0]

    @contextlib.contextmanager
    def sealing(self, text: str) -> Iterator[VM]:
        """Holds the lock of a machine that may be sealed. Raises NotFound or WrongState."""
        row = self._sealable(text)
        name = row.name if self._manager.label_of(row.name) else row.uuid    # foreign names may not do for a file's
        with self._state.lock(name, self._manager.settings.lock_limit, what=row.name):
            row = self._sealable(row.uuid)
            record = self._manager.record_of(row.uuid)
            if record.get("saved"):
                raise WrongState(f"{row.name} has a saved session, which sealing would lose",
                                 "Resume it and shut it down first.")
            if record.get("disposable") and row.power is not Power.STOPPED:
                raise WrongState(f"{row.name} runs as disposable: what is changed in it is lost when it stops",
                                 "Stop it first.")
            yield VM(self._utm, row)

    def forget_guest(self, vm: VM) -> None:
        """Drops what is known of a guest whose host keys are about to go."""
        if vm.uuid in self._state.records():
            self._state.record(vm.uuid, host_keys=None, machine_id=None, personality=None, learning=None)
        self._state.pin(vm.name, [])

    def begun(self, vm: VM, name: str) -> Row | None:
        """The image `name` that an earlier run began to copy from this machine.

        None if there is none. Raises WrongState if a machine of that name is another one.
        """
        with self._manager.fleet():
            begun = Intent(self._state, name).load()
            row = self._cloner.finish(name)
            if row and begun and self._cloner.adopt(row) and begun["base_uuid"] == vm.uuid:
                self._manager.prove_whole(row)
                return row
            self._cloner.must_be_free(name, self._utm.rows())
            return None

    def copy(self, vm: VM, name: str) -> Row:
        """Copies a stopped machine under an image's name."""
        with self._manager.fleet():
            row = self._cloner.clone(Row(vm.uuid, vm.power, vm.name), name, self._utm.rows())
            self._cloner.adopt(row)
            self._manager.prove_whole(row)
            return row

    def made(self, name: str) -> Row | None:
        """The machine that an earlier run asked UTM to make, None if nothing has come of that."""
        with self._manager.fleet():
            row = self._cloner.finish(name)
            return row if row and self._cloner.adopt(row) else None

    def make(self, name: str, *words: str) -> Row:
        """Has UTM make a new machine; the words are MAKE's."""
        with self._manager.fleet():
            row = self._cloner.make(name, self._utm.rows(), words)
            self._cloner.adopt(row)
            return row

    def rename(self, vm: VM, name: str) -> None:
        """Gives a stopped machine another name, and returns when a clean list shows it. Raises KodeError."""
        with self._manager.fleet():
            Cloner.must_be_free(name, self._utm.rows())
            for _ in attempts(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
                reply = self._utm.insist(vm.configure(name=name))
                if Row(vm.uuid, Power.STOPPED, name) in self._utm.rows():
                    vm.name = name
                    return
                if reply.outcome is Outcome.FAILED:
                    break
            raise KodeError(f"UTM did not rename {vm.name} to {name}: {reply.sentence}",
                            "Rename it in UTM, or run the same command again.")


class Sealer:
    """Makes a machine fit for an image, from inside, through its guest agent; what was cut off, the next run ends."""

    def __init__(self, manager: Manager, vm: VM, user: str, key: str) -> None:
        self._manager, self._notes, self.vm = manager, manager.utm.notes, vm
        self.user, self._key = user, key

    def wake(self, limit: float) -> None:
        """Starts the machine if it is off, and waits for its guest agent, each within `limit` seconds."""
        manager, vm = self._manager, self.vm
        if vm.power is not Power.STARTED:
            record = manager.record_of(vm.uuid)
            self._notes.step(f"starting {vm.name}")
            vm.power_on(limit, hide=manager.settings.headless,
                        before_cold=lambda: manager.before_cold_start(vm, record, Wishes()))
        self._notes.step(f"waiting for the guest agent of {vm.name}")
        vm.await_agent(limit)

    def ask(self, mode: str, *, sudo: bool = False) -> list[Step]:
        """What SEAL says in that mode. Raises KodeError if it did not come to its end."""
        words = ["/bin/sh", "-c", SEAL, "kodemachine", mode, self.user, self._key, "yes" * sudo]
        _, out, err = self.vm.run(words, limit=SEAL_LIMIT)
        text = out.decode("utf-8", "replace")
        steps = [Step(*found) for found in re.findall(r"^step (\S+) (\S+) ?(.*)$", text, re.MULTILINE)]
        if not text.endswith("end\n"):
            where = f" after its step {steps[-1].name}" if steps else ""
            last = err.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise KodeError(f"sealing {self.vm.name} broke off{where}: {(last or ['without a word'])[0]}",
                            "Run the same command again: it goes on where this one ended.")
        return steps

    def must(self, steps: Sequence[Step]) -> Sequence[Step]:
        """The steps, unless one of them is bad: raises KodeError with its name."""
        wrong = [f"{step.name} ({step.detail})" for step in steps if step.status == "bad"]
        if wrong:
            raise KodeError(f"{self.vm.name} cannot be sealed: {', '.join(wrong)}",
                            "Mend that in the machine, then run the same command again.")
        return steps

    def apply(self, *, sudo: bool = False) -> Sequence[Step]:
        """Does every step, proves them, and powers the machine off."""
        Images(self._manager).forget_guest(self.vm)     # before its keys go: there is nothing of it to trust any more
        self._notes.step(f"sealing {self.vm.name}")
        steps = self.must(self.ask("apply", sudo=sudo))
        self.must(self.ask("prove"))
        self.power_off()
        return steps

    def power_off(self) -> None:
        """Asks the guest to power off, and waits until it is."""
        self._notes.step(f"stopping {self.vm.name}")
        self.vm.ask_to_stop(self._manager.settings.stop_timeout)


class Qcow2(NamedTuple):
    """What the header of a qcow2 image tells; sizes in bytes, `l1_size` in entries (QEMU, docs/interop/qcow2)."""

    size: int
    cluster: int
    l1_size: int
    l1_offset: int


def parse_qcow2(header: bytes) -> Qcow2:
    """The header of an image that can be grown in place. Raises ValueError, which says what is unusual about it."""
    import struct

    if len(header) < 104 or header[:4] != b"QFI\xfb":
        raise ValueError("it is no qcow2 image")
    version, backing, _, bits, size, crypt, l1_size, l1_offset, _, _, snapshots = \
        struct.unpack_from(">IQIIQIIQQII", header, 4)
    incompatible, _, autoclear = struct.unpack_from(">QQQ", header, 72) if version == 3 else (0, 0, 0)
    unusual = {
        f"it is of version {version}": version not in (2, 3), "it has a backing file": backing,
        "it is encrypted": crypt, "it has snapshots": snapshots, "it was not closed properly": incompatible & 0b11,
        "its data is in another file": incompatible & 0b100,
        "it uses features of a newer format": incompatible & ~0b1111,   # 0b1000: only how clusters are compressed
        "it has bitmaps or the like": autoclear, "its clusters have a strange size": not 9 <= bits <= 21,
    }
    for what, here in unusual.items():
        if here:
            raise ValueError(what)
    return Qcow2(size, 1 << bits, l1_size, l1_offset)


def grow_qcow2(path: str, size: int) -> None:
    """Makes the virtual disk of an image `size` bytes large, in place; what is added reads as zeros.

    The L1 table has an entry for each cluster of 8-byte entries that each stand for a cluster. Its own clusters belong
    to it as a whole, so it can grow up to their end: with clusters of 64 KiB, for a disk of 4 TiB.
    Raises ValueError if that is not enough, or the image is unusual.
    """
    import struct

    with open(path, "r+b") as file:
        old = parse_qcow2(file.read(104))
        entries = -(-size // (old.cluster * old.cluster // 8))
        room = -(-old.l1_size * 8 // old.cluster) * old.cluster // 8
        if size < old.size:
            raise ValueError(f"its disk has {size_text(old.size)} already")
        if entries > room or old.l1_offset % old.cluster or not old.l1_offset:
            raise ValueError(f"its clusters of {size_text(old.cluster)} are too small for that")
        if entries > old.l1_size:
            file.seek(old.l1_offset + old.l1_size * 8)
            file.write(bytes((entries - old.l1_size) * 8))
            file.flush()
            os.fsync(file.fileno())
        file.seek(24)               # size, crypt method and l1_size lie together: one write changes both
        file.write(struct.pack(">QII", size, 0, max(entries, old.l1_size)))


class Plan(NamedTuple):
    """What `base create` is asked for; `disk` in bytes, `memory` in MiB, `image` a URL or a path, None: Ubuntu's."""

    name: str
    image: str | None
    disk: int
    cpus: int
    memory: int
    user: str
    key: str


class Creator:
    """From a distribution's cloud image to a golden image. Each step leaves behind what the next run goes on from.

    The machine has a temporary name, and `making` in its record, until all is done.
    """

    def __init__(self, manager: Manager, cache: str, plan: Plan) -> None:
        self._manager, self._utm, self._notes, self._plan = manager, manager.utm, manager.utm.notes, plan
        self._images, self._cache = Images(manager), cache
        self._working_name = UNFINISHED + plan.name

    def create(self) -> VM:
        """Makes the image, or goes on where an earlier run ended. Raises WrongState if a machine bears its name."""
        with self._manager.state.lock(self._plan.name, self._manager.settings.lock_limit):
            make_folder(self._cache)
            row = self._begun()
            if row is None:
                with self._step("getting the disk"):
                    disk = self._disk()
                with self._step("writing the seed"):
                    seed = self._seed()
                with self._step("making the machine"):
                    row = self._images.make(self._working_name, self._architecture(), str(self._plan.cpus),
                                             str(self._plan.memory), disk, seed)
            vm = VM(self._utm, row)
            if row.name != self._plan.name:
                if not (self._manager.record_of(vm.uuid).get("sealed") and vm.power is Power.STOPPED):
                    self._install(vm)
                with self._step("detaching the seed"):
                    self._detach(vm)
                with self._step("giving it its name"):
                    self._notes.step(f"calling {vm.name} {self._plan.name}")
                    self._images.rename(vm, self._plan.name)
            return vm

    def done(self, vm: VM) -> None:
        """Forgets that the machine was being made, and drops the files that were only needed for that."""
        self._manager.state.record(vm.uuid, name=self._plan.name, making=None, sealed=None, new=None)
        Intent(self._manager.state, self._working_name).remove()        # a run that was cut off may have left it
        for ending in (".qcow2", ".iso"):
            with contextlib.suppress(OSError):
                os.unlink(self._path(ending))
        shutil.rmtree(self._path(".seed"), ignore_errors=True)

    def _path(self, ending: str) -> str:
        return os.path.join(self._cache, self._plan.name + ending)

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        """Names the step in whatever fails in it."""
        try:
            yield
        except KodeError as failure:
            failure.message = f"{what}: {failure.message}"
            failure.hint = (failure.hint + " Run the same command again: it goes on from there.").strip()
            raise

    def _begun(self) -> Row | None:
        """The machine that an earlier run began, None if there is none and the name is free."""
        rows = self._utm.rows()
        records = self._manager.state.records()
        for row in rows:
            if row.name in (self._working_name, self._plan.name) and records.get(row.uuid, {}).get("making"):
                return row
        Cloner.must_be_free(self._plan.name, rows)
        made = self._images.made(self._working_name)
        stray = next((row.uuid for row in rows if row.name == self._working_name), None)
        if stray and not made:
            raise WrongState(f"there is a machine {self._working_name} ({stray}) that kodemachine knows nothing of",
                             "Delete it in UTM, then run the same command again.")
        return made

    # -- the disk

    def _run(self, program: str, *args: str) -> str:
        """Runs a program to its end, and returns its output. Raises KodeError with its own last words."""
        return self._must(program, self._utm.call(program, *args, limit=TOOL_LIMIT))

    @staticmethod
    def _must(program: str, reply: Reply) -> str:
        if reply.outcome is not Outcome.DONE:
            raise KodeError(reply.sentence or f"{program} ended with {reply.code} ({reply.outcome.value})",
                            "Mend that.")
        return reply.out

    def _architecture(self) -> str:
        """As UTM calls it: a Python under Rosetta would say x86_64 on a Mac that is arm64."""
        system = os.uname()
        arm = self._utm.call("sysctl", "-n", "hw.optional.arm64", limit=TOOL_LIMIT).out.strip() == "1" \
            if system.sysname == "Darwin" else system.machine in ("arm64", "aarch64")
        return "aarch64" if arm else "x86_64"

    def _disk(self) -> str:
        """A copy of the distribution's image, as large as the person wants it."""
        kind = {"aarch64": "arm64", "x86_64": "amd64"}[self._architecture()]
        image = self._plan.image or UBUNTU.format(kind)
        source = os.path.abspath(os.path.expanduser(image))
        if "://" in image:
            with self._manager.state.lock("download", DOWNLOAD_LIMIT, what="the cache"):     # its files are everybody's
                source = self._download(image)
        target, beside = self._path(".qcow2"), self._path(".qcow2.part")
        self._notes.step(f"growing the disk to {size_text(self._plan.disk)}")
        try:
            shutil.copyfile(source, beside)
            with open(beside, "rb") as file:
                size = parse_qcow2(file.read(104)).size
            if shutil.which("qemu-img") and self._plan.disk > size:
                self._run("qemu-img", "resize", "-q", "-f", "qcow2", beside, str(self._plan.disk))
            else:
                grow_qcow2(beside, self._plan.disk)
            os.replace(beside, target)
        except OSError as failure:
            where = beside if failure.errno == errno.ENOSPC else failure.filename or beside
            raise KodeError(f"{where}: {failure.strerror or failure}", "Mend that.") from None
        except ValueError as failure:
            raise KodeError(f"the disk of {source} cannot be made {size_text(self._plan.disk)} large: {failure}",
                            "Choose another --disk or --image, or install qemu-img (brew install qemu).") from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
        return target

    def _download(self, url: str) -> str:
        """The file at a URL, from the cache or by curl, checked against the SHA256SUMS beside it."""
        folder, _, name = url.rpartition("/")
        target = os.path.join(self._cache, re.sub(r"[^\w.-]", "-", name))
        part = target + ".part"
        reply = self._utm.call("curl", *CURL, "--url", f"{folder}/SHA256SUMS", limit=TOOL_LIMIT)
        missing = reply.code == 22 and "404" in reply.err       # curl's 22: the server's answer is an error
        sums = "" if missing else self._must("curl", reply)
        found = re.search(rf"^([0-9a-f]{{64}}) [ *]{re.escape(name)}$", sums, re.MULTILINE)
        if not found:
            raise KodeError(f"there is no {folder}/SHA256SUMS" if missing else
                            f"{folder}/SHA256SUMS does not list {name}",
                            "Download and check it yourself, then name the file: --image FILE")
        if self._digest(target) == found[1]:
            return target
        if self._digest(part) != found[1]:
            self._fetch(url, part)
            if self._digest(part) != found[1]:
                os.unlink(part)
                raise KodeError(f"{name} is not what {folder}/SHA256SUMS promises, and was removed",
                                "It may have been replaced there just now: run the same command again.")
        os.replace(part, target)
        return target

    def _fetch(self, url: str, part: str) -> None:
        """Downloads to `part`, after what is in it already if the server can do that."""
        self._notes.step(f"downloading {url}")
        for resumes in (os.path.exists(part), False):
            call = self._utm.begin("curl", *CURL, "-C", "-", "-o", part, "--url", url, limit=DOWNLOAD_LIMIT)
            reply = self._utm.finish(call, 0.5)
            while reply is None:
                with contextlib.suppress(OSError):
                    self._notes.progress(size_text(os.path.getsize(part)))
                reply = self._utm.finish(call, 0.5)
            if not (resumes and reply.code in (22, 33)):        # the server refuses the range, or knows of none
                break
            os.unlink(part)
        assert reply
        self._must("curl", reply)

    def _digest(self, path: str) -> str | None:
        """The SHA-256 of a file, None if there is none."""
        import hashlib

        found = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while True:
                    data = file.read(1 << 20)
                    if not data:
                        return found.hexdigest()
                    found.update(data)
                    self._notes.tick()
        except FileNotFoundError:
            return None

    # -- the seed

    def _seed(self) -> str:
        """An ISO image with what cloud-init's NoCloud takes: JSON, which is YAML too and quotes what needs it.

        The network's profile names neither a MAC address nor a card. Nor a DHCP identifier: what is sent by default
        follows the machine-id, which sealing takes away.
        """
        user = {"name": self._plan.user, "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL", "lock_passwd": True,
                "ssh_authorized_keys": [self._plan.key]}
        files = {
            "meta-data": {"instance-id": self._plan.name, "local-hostname": "kodeimage"},
            "network-config": {"version": 2, "ethernets": {"any": {"match": {"name": "e*"}, "dhcp4": True}}},
            "user-data": {"users": [user], "ssh_pwauth": False, "runcmd": [["sh", "-c", INSTALL_AGENT]]},
        }
        folder, target = self._path(".seed"), self._path(".iso")
        for name, content in files.items():
            text = "#cloud-config\n" * (name == "user-data") + json.dumps(content) + "\n"
            write_file(os.path.join(folder, name), text)
        program = next(filter(shutil.which, ("hdiutil", "xorriso", "genisoimage")), None)
        if program is None:
            raise KodeError("there is no program that makes an ISO image", "Install xorriso.")
        if program == "hdiutil":
            words = ["makehybrid", "-quiet", "-ov", "-iso", "-joliet", "-default-volume-name", "cidata", "-o", target]
        else:
            words = [*["-as", "mkisofs"] * (program == "xorriso"), "-quiet", "-V", "cidata", "-J", "-r", "-o", target]
        self._run(program, *words, folder)
        return target

    # -- the machine

    def _install(self, vm: VM) -> None:
        """Boots it for the first time, lets cloud-init do its work, and seals it."""
        sealer = Sealer(self._manager, vm, self._plan.user, self._plan.key)
        anew = f"To begin anew, delete {vm.name} in UTM."
        with self._step("booting it for the first time"):
            sealer.wake(CREATE_LIMIT)
        with self._step("waiting for cloud-init"):
            self._notes.step(f"waiting for cloud-init in {vm.name}")
            code, out, err = vm.run(["/bin/sh", "-c", CLOUD_INIT], limit=CREATE_LIMIT)
            status, _, result = (out + err).decode("utf-8", "replace").partition("{")
            status = " ".join(status.lstrip(".").split())[:300]
            if "DataSourceNone" in result:
                raise KodeError(f"cloud-init has not found its seed in {vm.name}, or cannot read an ISO image", anew)
            if code == 2:
                self._notes.warn(f"cloud-init did its work, but is not content: {status}")
            elif code:
                raise KodeError(f"cloud-init failed: {status}", f"See /var/log/cloud-init-output.log there. {anew}")
        with self._step("sealing"):
            sealer.apply()
        self._manager.state.record(vm.uuid, sealed=True)

    def _detach(self, vm: VM) -> None:
        """Leaves the machine its disk alone, and proves it."""
        for _ in attempts(UNIQUE_LIMIT, self._notes.tick, 0.3, 3.0):
            reply = self._utm.insist(self._utm.script(DETACH, vm.uuid))
            count, disk_before, disk = (reply.out.split() + ["", "", ""])[:3]
            if reply.outcome is Outcome.DONE and count == "1" and disk == disk_before:
                return
            if reply.outcome is Outcome.FAILED or (reply.outcome is Outcome.DONE and count):
                break
        problem = reply.sentence or f"it has {count or 'no'} drives"
        raise KodeError(f"UTM did not remove the seed from {vm.name}: {problem}",
                        "Look at it in UTM's window, then run the same command again.")


# ---- doctor


OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"

# Versions of UTM, from and to, and what each lacks (contract: version landmarks, 7, 9.20, 9.23). From 5.0.9 on utmctl
# has no `attach`; kodemachine uses neither that nor `utmctl exec`, which does not wait before 5.0.9.
NEWEST_KNOWN = (5, 0, 9)
VERSIONS = (
    ((0,), (4, 6, 4), ERROR, "is too old; kodemachine needs 4.6.5 or newer"),
    ((4, 6, 5), (4, 7, 0), WARNING, "replaces a machine's displays whenever its network address is changed"),
    ((4, 7, 1), (4, 7, 1), OK, "has no setting that gives clones MAC addresses of their own; kodemachine does that"),
    ((4, 7, 2), (4, 7, 2), ERROR, "has broken scripting"),
)
UPDATE = "Update UTM: brew upgrade --cask utm, or in the App Store"


class Finding(NamedTuple):
    """What one check has found: the keys of `doctor --json`, in this order. `remedy`: what to do, if anything."""

    check: str
    level: str
    message: str
    remedy: str


Words = tuple[str, str, str]        # of a finding: its level, message and remedy


class Doctor:
    """Looks at the host, UTM, the image and the fleet, in the order in which trouble bites, and changes nothing."""

    def __init__(self, manager: Manager) -> None:
        self._manager, self._utm, self._state = manager, manager.utm, manager.state
        self._settings = manager.settings
        self._rows = Rows([])
        self._silence: KodeError | None = None      # why UTM gave no list, if it was not for want of permission
        self._image = Row("", Power.UNKNOWN, "")
        self._hardware: dict[str, Hardware] = {}
        self._running: dict[str, list[str]] = {}    # names of the clones that run, by their likeliest address

    def findings(self) -> Iterator[Finding]:
        """One check after the other. What raises KodeError could not look, and what needs it is skipped."""
        blind: dict[str, str] = {}      # what could not look, and the check that is the reason
        for check, needs, well, look in CHECKS:
            reason = next((blind[need] for need in needs.split() if need in blind), "")
            if reason:
                found = [Finding(check, SKIPPED, f"not checked, since {reason} failed", "")]
                blind[check] = reason
            else:
                try:
                    found = [Finding(check, *words) for words in look(self)]
                except KodeError as failure:
                    found = [Finding(check, ERROR, failure.message, failure.hint)]
                    blind[check] = check
                except OSError as failure:
                    place = failure.filename or "the system"
                    found = [Finding(check, ERROR, f"{place}: {failure.strerror}", "Mend that.")]
                    blind[check] = check
            yield from found or [Finding(check, OK, well, "")]

    # -- the host and UTM

    def _python(self) -> Iterable[Words]:
        yield OK, f"Python {sys.version.split()[0]}, {sys.executable}", ""

    def _user(self) -> Iterable[Words]:
        if os.uname().sysname == "Darwin" and os.geteuid() == 0:        # contract 9.2
            yield ERROR, "this is root, whom UTM does not answer (-600)", "Run kodemachine without sudo."

    def _utmctl(self) -> Iterable[Words]:
        yield OK, self._utm.path(), ""

    def _version(self) -> Iterable[Words]:
        version = self._utm.version()
        if not version:
            reply = self._utm.call("version", limit=LIMITS["status"])
            version = reply.out.strip() if reply.outcome is Outcome.DONE else ""
        number = tuple(map(int, re.findall(r"\d{1,6}", version)[:3]))
        if not number:
            return [(WARNING, "UTM does not report its version: it is older than 4.7.2, or does not answer", UPDATE)]
        known = [(level, f"UTM {version} {trouble}", UPDATE if level != OK else "")
                 for first, last, level, trouble in VERSIONS if first <= number <= last]
        if number > NEWEST_KNOWN:
            known = [(OK, f"UTM {version}, which is newer than this version of kodemachine knows (5.0.9)", "")]
        return known or [(OK, f"UTM {version}", "")]

    def _automation(self) -> Iterable[Words]:
        try:
            self._rows = self._utm.rows(partial=True)
        except NotPermitted:
            raise
        except KodeError as failure:
            self._silence = failure
            yield SKIPPED, "not known, since UTM does not answer", ""

    def _answer(self) -> Iterable[Words]:
        if self._silence:
            raise self._silence
        if self._rows.broken:
            yield ERROR, f"UTM's list has a row that cannot be read: {self._rows.broken!r}", LINE_BREAK
        yield OK, f"it shows {len(self._rows)} machines, {len(self._manager.clones(self._rows))} of them clones", ""

    def _osascript(self) -> Iterable[Words]:
        for _ in attempts(WARM_UP, self._utm.notes.tick, 0.3, 3.0):
            reply = self._utm.script(HARDWARE)
            self._hardware = parse_hardware(reply.out)
            if reply.outcome is Outcome.DONE and (self._hardware or not self._rows):
                return []
            if reply.outcome in (Outcome.REFUSED, Outcome.FAILED):
                break
        if reply.outcome is Outcome.REFUSED:
            raise KodeError("macOS does not permit osascript to control UTM (-1743), so no new machine can be started",
                            NOT_ALLOWED)
        raise KodeError(f"osascript learns nothing from UTM: {reply.sentence or reply.outcome.value}",
                        "Look at UTM's window, then run this again.")

    def _session(self) -> Iterable[Words]:
        if os.environ.get("SSH_CONNECTION"):        # set by sshd(8)
            yield (WARNING, "this is an ssh session, from which macOS may refuse control of UTM",
                   "Run kodemachine in a terminal at the screen.")

    # -- the image

    def _base(self) -> Iterable[Words]:
        self._image = self._manager.base(self._rows, None)
        yield OK, f"{self._image.name} is there, and stopped", ""

    def _devices(self) -> Iterable[Words]:
        name = self._image.name
        reply = self._utm.script(DEVICES, self._image.uuid)
        told = reply.out.split("\n")
        if reply.outcome is not Outcome.DONE or not told[0].startswith("backend "):
            yield (WARNING, f"UTM does not tell the devices of {name}: {reply.sentence}",
                   "See in its settings that it has no display, and a serial device in mode Pseudo-TTY.")
            return
        if "backend qemu" not in told:
            yield (ERROR, f"{name} is not on the QEMU backend, and so has no guest agent",
                   "Make the image anew, without 'Use Apple Virtualization'.")
        if "displays 0" not in told or "serial window" in told:
            yield (WARNING, f"{name} is not headless: a window opens at each start, and closing it ends the machine",
                   "In its settings in UTM, remove the display, and any serial device in mode Built-in Terminal.")
        if "serial ptty" not in told and "serial tcp" not in told:
            yield (WARNING, f"{name} has no serial port, so `kodemachine attach` cannot reach its clones",
                   "In its settings in UTM, add a serial device in mode Pseudo-TTY.")

    def _ssh_key(self) -> Iterable[Words]:
        own = self._settings.identity_file
        if own:
            public = own.removesuffix(".pub") + ".pub"
            if os.path.exists(public) and (own == public or not os.path.exists(own)):
                yield OK, f"{public} is there; its other half is for an agent to have", ""
            elif not os.path.exists(own):
                yield ERROR, f"there is no identity_file {own}", f"ssh-keygen -t ed25519 -f {shlex.quote(own)}"
            elif os.stat(own).st_mode & 0o077:
                yield ERROR, f"ssh does not use {own}: others may read it", f"chmod 600 {shlex.quote(own)}"
            return
        folder = os.path.expanduser("~/.ssh")
        if not any(os.path.exists(os.path.join(folder, "id_" + kind)) for kind in
                   ("rsa", "ecdsa", "ecdsa_sk", "ed25519", "ed25519_sk")) and not agent_keys():     # ssh_config(5)
            yield (WARNING, "there is no key in ~/.ssh or an agent, unless ssh's own configuration names one",
                   "ssh-keygen -t ed25519; what `kodemachine base seal` makes of a machine lets that key in")

    def _first_boot(self) -> Iterable[Words]:
        if self._settings.first_boot:
            open_script(self._settings.first_boot).close()
            yield OK, f"new machines will run {self._settings.first_boot}", ""

    # -- the fleet

    def _names(self) -> Iterable[Words]:
        ours = {row.name.lower() for row in (*self._manager.clones(self._rows), *self._manager.images(self._rows))}
        for name in sorted(ours):
            uuids = [row.uuid for row in self._rows if row.name.lower() == name]
            if len(uuids) > 1:
                yield (ERROR, f"{len(uuids)} machines are called {name}: {', '.join(uuids)}",
                       "Rename or delete one of them in UTM.")

    def _mac_addresses(self) -> Iterable[Words]:
        """A clone that was never started is given an address of its own at its first start."""
        records, images = self._state.records(), self._manager.images(self._rows)
        clones = self._manager.clones(self._rows)
        holders: dict[str, list[Row]] = {}
        for row in self._rows:
            fresh = row.power is Power.STOPPED and row in clones and not records.get(row.uuid, {}).get("mac_checked")
            macs = self._hardware[row.uuid].macs if row.uuid in self._hardware else []
            for mac in set(macs) - {"?"} if row not in images and not fresh else ():
                holders.setdefault(mac, []).append(row)
        for mac, rows in holders.items():
            if len(rows) > 1 and any(row in clones for row in rows):
                both_run = sum(row.power is not Power.STOPPED for row in rows) > 1
                names = " and ".join(row.name for row in rows)
                yield (ERROR if both_run else WARNING, f"{names} have one MAC address, {mac}",
                       "Stop one; in its settings in UTM: Network > MAC Address > Random.")

    def _shared(self, key: str, words: str) -> Iterable[Words]:
        """What the records of two clones have in common, and only an image that was not sealed can have given them."""
        records = self._state.records()
        holders: dict[str, list[str]] = {}
        for row in self._manager.clones(self._rows):
            value = records.get(row.uuid, {}).get(key)
            for part in value if isinstance(value, list) else [value] * bool(value):
                holders.setdefault(str(part), []).append(row.name)
        for names in dict.fromkeys(" and ".join(names) for names in holders.values() if len(names) > 1):
            yield (WARNING, f"{names} {words}", "Make an image that forgets them (kodemachine base seal LABEL --as "
                   "vX.Y.Z), then each machine anew: kodemachine start LABEL --fresh")

    def _addresses(self) -> Iterable[Words]:
        running = [row for row in self._manager.clones(self._rows) if row.power is Power.STARTED]
        for machine in self._manager.survey(running, disk=False):
            if machine.ip and address_rank(machine.ip) != 2:    # a container bridge is the same in every guest
                self._running.setdefault(machine.ip, []).append(machine.name)
        for address, names in self._running.items():
            if len(names) > 1:
                yield (ERROR, f"{' and '.join(names)} have one address, {address}: they share a machine-id, or a MAC",
                       "Make one of them anew: kodemachine start LABEL --fresh")

    def _copies(self) -> Iterable[Words]:
        """Half-made copies: by their size (contract 10.12, 10.13), and by the temporary name that UTM gives them."""
        records, ours = self._state.records(), (*self._manager.images(self._rows), *self._manager.clones(self._rows))
        bases = {row.name for row in ours}
        for row in self._rows:
            base, _, number = row.name.rpartition(" ")
            temporary = base in bases and number.isdigit()
            origins = [records.get(row.uuid, {}).get("copy_of")]
            origins += [other.uuid for other in ours if other.name in (row.name, base) and other.uuid != row.uuid]
            mine, theirs = self._hardware.get(row.uuid), [self._hardware.get(str(origin)) for origin in origins]
            missing = next(filter(None, (missing_part(mine, other) for other in theirs
                                         if mine and other and mine.known and other.known)), "")
            if missing:
                yield (ERROR, f"{row.name} ({row.uuid}) is an incomplete copy: {missing}",
                       f"Delete it: {shlex.quote(self._utm.path())} delete {row.uuid}")
            elif temporary and not self._state.locked("fleet"):
                yield (WARNING, f"{row.name} ({row.uuid}) is left from a clone that was interrupted",
                       "Run that command again, which completes it or says what to do; or delete it in UTM.")

    # -- this computer

    def _space(self) -> Iterable[Words]:
        free = free_space(self._settings.documents or os.path.expanduser("~"))
        if free is None:
            yield WARNING, "the volume does not tell how much of it is free", "See for yourself: df -h"
        elif free < SPACE_LOW:
            yield (ERROR if free < SPACE_OUT else WARNING, f"only {size_text(free)} are free",
                   "See what can go: kodemachine purge --dry-run")
        else:
            yield OK, f"{size_text(free)} are free", ""

    def _sizes(self) -> Iterable[Words]:
        """On macOS 14 and newer the person is asked whether a program may look into UTM's container (contract 6)."""
        folder = self._manager.documents
        if self._rows and not read_bundles(folder, self._rows, DISK_LIMIT, self._utm.notes.tick):
            yield (WARNING, f"UTM's data cannot be read in {folder}, so MEMORY, SIZE and FREES stay empty",
                   "Allow it when macOS asks, or give the terminal Full Disk Access, which lasts. "
                   "If UTM's machines lie elsewhere: kodemachine config set documents PATH")

    def _leftovers(self) -> Iterable[Words]:
        state, listed = self._state, {row.uuid for row in self._rows}
        vanished = [uuid for uuid in state.records() if uuid not in listed]
        if state.trouble:
            yield (ERROR, state.trouble, "Move it away: the machines stay, only what is known of them is lost.")
        if vanished and listed:
            yield WARNING, f"{len(vanished)} machines are remembered that are gone", "kodemachine purge forgets them"
        for name in state.intents():
            intent = Intent(state, name)
            if not intent.call_alive() and not state.locked(name):
                again = ""
                if name.startswith(UNFINISHED):
                    again = f"kodemachine base create {name[len(UNFINISHED + 'kodeimage-'):]}"
                elif IMAGE.fullmatch(name):
                    again = f"kodemachine base seal VM --as {name[len('kodeimage-'):]} (VM: what it was cloned from)"
                elif self._manager.label_of(name):
                    again = self._manager.to_complete(name, intent.load() or {})
                yield (WARNING, f"the making of {name} was cut off", f"To complete it: {again}" if again
                       else f"rm {shlex.quote(state.path('intents', name + '.json'))}")
        for folder in (state.folder, state.path("intents")):
            for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                path = os.path.join(folder, entry)
                with contextlib.suppress(FileNotFoundError):
                    if entry.endswith(".new") and time.time() - os.stat(path).st_mtime > 60:
                        yield WARNING, f"{path} was left half-written", f"rm {shlex.quote(path)}"

    def _network(self) -> Iterable[Words]:
        """Local Network privacy can only be felt: macOS 15 and newer refuse the way to the guests (Apple's TN3179)."""
        if not self._running:
            silent = [row.name for row in self._manager.clones(self._rows) if row.power is Power.STARTED]
            yield ((WARNING, f"no guest agent tells an address, of {', '.join(silent)}",
                    "Does qemu-guest-agent run there? Look at the consoles: kodemachine attach LABEL") if silent
                   else (OK, "no machine runs, so the way to one was not tried", ""))
            return
        prober = Prober(self._settings.ssh_port)
        prober.aim(list(self._running))
        deadline = time.monotonic() + GREETING
        winner = None
        while not winner and time.monotonic() < deadline:
            winner = prober.step(0.05)
        refused = prober.unreachable
        prober.close()
        if winner:
            yield OK, f"a guest's ssh server answers at {winner}", ""
        elif refused and local_network_rules():
            yield ERROR, "macOS refuses the way to the guests (no route to host)", LOCAL_NETWORK
        else:
            yield (WARNING, f"no ssh server answers at {', '.join(self._running)}",
                   "Look at the consoles: kodemachine attach LABEL")


# Each check: its name, the checks without which it cannot look, what to say if it finds nothing, and what does it.
CHECKS: tuple[tuple[str, str, str, Callable[[Doctor], Iterable[Words]]], ...] = (
    ("python", "", "", Doctor._python),
    ("user", "", "run without sudo", Doctor._user),
    ("utmctl", "", "", Doctor._utmctl),
    ("version", "utmctl", "", Doctor._version),
    ("automation", "utmctl", "macOS lets this terminal control UTM", Doctor._automation),
    ("utm", "utmctl automation", "", Doctor._answer),
    ("osascript", "utm", "macOS lets osascript control UTM", Doctor._osascript),
    ("session", "", "this is no ssh session", Doctor._session),
    ("image", "utm", "", Doctor._base),
    ("devices", "osascript image", "the image is headless, has a serial port, and is on QEMU", Doctor._devices),
    ("ssh-key", "", "there is a key for ssh", Doctor._ssh_key),
    ("first-boot", "", "new machines run no script", Doctor._first_boot),
    ("names", "utm", "no two machines share a name", Doctor._names),
    ("macs", "utm osascript", "no two machines share a MAC address", Doctor._mac_addresses),
    ("host-keys", "utm", "no two clones are known to share a host key",
     lambda doctor: doctor._shared("host_keys", "have one host key, and each can pass for the other")),
    ("machine-ids", "utm", "no two clones are known to share a machine-id",
     lambda doctor: doctor._shared("machine_id", "have one machine-id, and may be given one address")),
    ("addresses", "utm", "no two running clones share an address", Doctor._addresses),
    ("copies", "utm", "no clone was left half-made", Doctor._copies),
    ("space", "", "", Doctor._space),
    ("sizes", "utm", "UTM's data can be read", Doctor._sizes),
    ("leftovers", "utm", "nothing is left in the state folder", Doctor._leftovers),
    ("network", "utm", "", Doctor._network),
)
CHECK_WIDTH = max(len(check) for check, *_ in CHECKS)


def agent_keys() -> int:
    """How many keys the ssh agent holds, if there is one. The two messages are SSH_AGENTC_REQUEST_IDENTITIES (11) and
    SSH_AGENT_IDENTITIES_ANSWER (12), whose payload begins with the number (OpenSSH's PROTOCOL.agent)."""
    import socket

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(2)
        agent.connect(os.environ.get("SSH_AUTH_SOCK") or "")
        agent.sendall(b"\0\0\0\1\x0b")
        answer = agent.recv(9, socket.MSG_WAITALL)
        return int.from_bytes(answer[5:], "big") if answer[4:5] == b"\x0c" else 0
    return 0


# ---- the serial console


@contextlib.contextmanager
def raw_terminal(handle: int) -> Iterator[None]:
    """The terminal `handle` in raw mode; afterwards exactly as it was. Not a terminal: nothing happens."""
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
        with contextlib.suppress(termios.error):        # the terminal may be gone
            termios.tcsetattr(handle, termios.TCSAFLUSH, before)    # half-typed keys must not reach the shell


def open_line(port: str) -> int:
    """Opens a serial port that UTM told, a device or host:port, without blocking. Raises KodeError."""
    if not port.startswith("/"):
        import socket

        host, _, number = port.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(number)), timeout=5) as connection:
                connection.setblocking(False)
                return os.dup(connection.fileno())
        except (OSError, ValueError, OverflowError) as failure:
            raise KodeError(f"cannot connect to the serial port at {port}: {failure}",
                            "Is another program connected to it? A TCP port takes one at a time.") from None
    import termios
    import tty

    try:
        line = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as failure:
        raise KodeError(f"cannot open the serial port {port}: {failure.strerror}",
                        "UTM may still tell the device of an earlier run: stop and start the machine.") from None
    info = os.fstat(line)
    if not stat.S_ISCHR(info.st_mode) or info.st_uid != os.geteuid():
        os.close(line)
        raise KodeError(f"{port} is not a serial port of yours, and was not used",
                        "UTM may still tell the device of an earlier run: stop and start the machine.")
    with contextlib.suppress(termios.error):
        tty.setraw(line, termios.TCSANOW)       # or the line would echo what it is sent; what it said already stays
    return line


class Console:
    """A relay between a person (or a pipe) and a serial line: raw, 8-bit clean, with back-pressure both ways."""

    CHUNK, FULL = 1 << 16, 1 << 18      # bytes read at once, and held at most in each direction

    def __init__(self, line: int, source: int, sink: int, escape: bytes, log: int | None) -> None:
        self._line, self._source, self._escape, self._log = line, source, escape, log
        self._sink, self._own_sink = sink, False
        self._person = os.isatty(source)
        self._piece = select.PIPE_BUF       # a pipe that is ready takes so many bytes without blocking
        if os.isatty(sink):
            # A second opening, so that O_NONBLOCK does not reach the shell, which shares the first.
            with contextlib.suppress(OSError):
                self._sink = os.open(os.ttyname(sink), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                self._own_sink, self._piece = True, self.CHUNK

    def close(self) -> None:
        """Closes the second opening of the terminal; the line is the caller's."""
        if self._own_sink:
            os.close(self._sink)

    def relay(self, deadline: float | None, at_end: Callable[[], None] = lambda: None) -> str:
        """Relays until an end comes, and says which: `escape`, `closed` (the line), `reader` (gone) or `timeout`.

        `at_end` is called when the source has ended and the line has taken all of it.
        """
        inward, outward, typing, ended = bytearray(), bytearray(), True, False
        while True:
            readers = [self._line] * (len(outward) < self.FULL) + [self._source] * (typing and len(inward) < self.FULL)
            writers = [self._line] * bool(inward) + [self._sink] * bool(outward)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select(readers, writers, [], left)
            if self._line in readable:
                data = self._read(self._line)
                if data == b"":
                    self._drain(self._sink, outward, self._piece)
                    return "closed"
                outward += data or b""
                if self._log is not None and data:
                    os.write(self._log, data)
            if self._source in readable:
                data = self._read(self._source)
                typing = data != b""
                if self._person and not typing:
                    return "reader"         # a terminal that was hung up
                found = data.find(self._escape) if self._escape and data else -1
                inward += data[:found] if data and found >= 0 else data or b""
                if found >= 0:
                    self._drain(self._line, inward, self.CHUNK)
                    return "escape"
            if self._line in writable and not self._write(self._line, inward, self.CHUNK):
                return "closed"
            if self._sink in writable and not self._write(self._sink, outward, self._piece):
                return "reader"
            if not (typing or inward or ended):
                ended = True
                at_end()
            if left == 0:
                self._drain(self._sink, outward, self._piece)
                return "timeout"

    @staticmethod
    def _read(handle: int) -> bytes | None:
        """Bytes; none at the end (a pty whose other side is closed says EIO); None if it was a false alarm."""
        try:
            return os.read(handle, Console.CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    @staticmethod
    def _write(handle: int, data: bytearray, piece: int) -> bool:
        """Writes what fits and removes it from `data`; false if nobody is there any more."""
        try:
            del data[:os.write(handle, data[:piece])]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    @staticmethod
    def _drain(handle: int, data: bytearray, piece: int) -> None:
        """What was said last still reaches a side that takes it within a second."""
        until = time.monotonic() + 1.0
        while data and time.monotonic() < until:
            if select.select([], [handle], [], 0.1)[1] and not Console._write(handle, data, piece):
                return


def escape_byte(text: str) -> bytes:
    """The byte of `ctrl-]`, `^]`, or a single character; nothing for `none`. Raises UsageError."""
    if text == "none":
        return b""
    match = re.fullmatch(r"(?:ctrl-|\^)([a-z@\[\]\\^_])", text.lower())
    if match:
        return bytes([ord(match.group(1).upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise UsageError(f"{text!r} is no escape key", "Such as: --escape ctrl-a, or --escape none")


# ---- what a person or a pipe reads


class Out(Notes):
    """Results on stdout, all else on stderr: on a terminal progress is one live line per step.

    What a terminal would obey is taken out of texts here, and nowhere before.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> None:
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._live = sys.stderr.isatty() and not dumb
        self._colour = sys.stderr.isatty() and not dumb and not os.environ.get("NO_COLOR")
        self._lock = threading.RLock()      # several machines at once are several threads
        self._step: tuple[str, float] | None = None     # of the live line: its text, and when it began
        self._progress = ""
        self._painted = 0.0

    def _err(self, text: str, end: str = "\n") -> None:
        try:
            sys.stderr.write(text + end)
            sys.stderr.flush()
        except (OSError, ValueError):       # a terminal that is gone does not stop the work, or fail our exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def _paint(self, end: str = "") -> None:
        assert self._step
        text, began = self._step
        elapsed = time.monotonic() - began
        clock = "  " + " ".join(filter(None, (self._progress, f"{elapsed:.0f} s"))) if elapsed >= 0.95 else ""
        if not end:             # a line that is alive must not wrap: only one row of it can be painted over
            with contextlib.suppress(OSError):
                room = os.get_terminal_size(2).columns or 80        # 0: nobody has told the terminal its size
                text = cut(text, room - 1 - cells(clock))
        text += clock
        self._painted = time.monotonic()
        self._err("\r\x1b[K" + (f"\x1b[2m{text}\x1b[0m" if self._colour and end else text), end)

    def end_step(self) -> None:
        """The live line, if there is one, becomes an ordinary one."""
        with self._lock:
            if self._step:
                self._paint("\n")
            self._step = None

    def step(self, text: str) -> None:
        """A step has begun: one line, alive until the next."""
        with self._lock:
            self.end_step()
            if self._live and not self.quiet:
                self._step, self._progress = (printable(text), time.monotonic()), ""
                self._paint()
            elif not self.quiet:
                self._err(printable(text))

    def progress(self, text: str) -> None:
        """Shown behind the step's name, where that line is alive."""
        self._progress = text

    def tick(self) -> None:
        """Repaints the live line about twice a second."""
        with self._lock:
            if self._step and time.monotonic() - self._painted > 0.5:
                self._paint()

    def note(self, text: str, *, needed: bool = False) -> None:
        """A line for the person that is no result; `needed`: -q does not silence it, since a question is about it."""
        with self._lock:
            if needed or not self.quiet:
                self.end_step()
                self._err(printable(text))

    def warn(self, text: str) -> None:
        """Something that the person should know, though it goes on."""
        with self._lock:
            self.end_step()
            self._err(f"kodemachine: warning: {printable(text)}")

    def trace(self, text: str) -> None:
        """With -v: each call to the outside."""
        if self.verbose:
            with self._lock:
                self.end_step()
                self._err(f"+ {printable(text)}")

    def error(self, failure: KodeError) -> None:
        """What failed, and below it what to do next; with --json one object."""
        message, hint = printable(failure.message), printable(failure.hint)
        name = "\x1b[31mkodemachine:\x1b[0m" if self._colour else "kodemachine:"
        with self._lock:
            self.end_step()
            self._err(json.dumps({"error": {"code": failure.slug, "message": message, "hint": hint}}) if self.as_json
                      else f"{name} {message}" + (f"\n  {hint}" if hint else ""))

    def raw(self, out: bytes, err: bytes = b"") -> None:
        """Bytes for our two streams, as they are. Raises BrokenPipeError when nobody reads, or KodeError."""
        self.end_step()
        try:
            sys.stderr.buffer.write(err)
            sys.stderr.flush()
            sys.stdout.buffer.write(out)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as failure:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # or the flush at exit fails once more
            raise KodeError(f"the output cannot be written: {failure.strerror}", "Mend that, then try again.") from None

    def result(self, text: str) -> None:
        """A result."""
        self.raw((printable(text) + "\n").encode())

    def json(self, value: object) -> None:
        """A result for a program."""
        self.result(json.dumps(value, indent=1))

    @staticmethod
    def fits(text: str) -> bool:
        """Whether whoever reads stdout can be shown these characters, going by its encoding."""
        try:
            return bool(text.encode(sys.stdout.encoding))
        except (UnicodeEncodeError, LookupError):
            return False

    @property
    def width(self) -> int | None:
        """Columns of the terminal that stdout is; None if it is none."""
        try:
            return os.get_terminal_size(1).columns or None
        except OSError:
            return None

    @property
    def can_ask(self) -> bool:
        """Whether there is a person at a terminal."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def must_be_able_to_ask(self, what: str) -> None:
        """Raises UsageError if there is no terminal to confirm `what` on."""
        if not self.can_ask:
            raise UsageError(f"{what} needs a yes, and there is no terminal to ask on",
                             "Add -y to go ahead without a question.")

    def confirm(self, question: str, what: str) -> bool:
        """Asks on the terminal. Raises UsageError if there is none: nothing is done unasked."""
        self.end_step()
        self.must_be_able_to_ask(what)
        self._err(f"{printable(question)} [y/N] ", "")
        answer = ""
        try:
            answer = sys.stdin.readline()
        finally:
            if not answer:
                self._err("")           # Ctrl-C or Ctrl-D: what follows begins a line
        return answer.strip().lower() in ("y", "yes")


# ---- commands


class Context(NamedTuple):
    """What a command works with."""

    manager: Manager
    out: Out
    interrupts: Interrupts
    config: Config


Arguments = argparse.Namespace
Option = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """One entry of the command table."""

    run: Callable[[Context, Arguments], int]
    options: tuple[Option, ...]
    aliases: tuple[str, ...]
    hidden: bool
    examples: tuple[str, ...]       # command lines, without the program's name


COMMANDS: dict[str, Command] = {}      # "base seal" is the command `seal` of the group `base`
GROUPS = {"base": "golden images: show, choose, seal and create them"}


# The headings of the help, and the commands below them; those that stand nowhere come last.
TOPICS = {"work in a machine": "start ssh exec cp attach", "see what there is": "list status ip doctor",
          "turn off, keep, clear away": "stop suspend resume clone delete purge",
          "images, settings, other tools": "base config ssh-config completion help"}


def command(name: str, *options: Option, aliases: Sequence[str] = (), hidden: bool = False,
            examples: Sequence[str] = ()) -> \
        Callable[[Callable[[Context, Arguments], int]], Callable[[Context, Arguments], int]]:
    """Enters a function in the command table; the first line of its docstring is its help."""
    def enter(run: Callable[[Context, Arguments], int]) -> Callable[[Context, Arguments], int]:
        COMMANDS[name] = Command(run, options, tuple(aliases), hidden, tuple(examples))
        return run
    return enter


def option(*names: str, **how: Any) -> Option:
    """One argument of a command, as argparse takes it. What the help calls its value is what Tab offers (WORDS)."""
    return names, how


def all_names() -> set[str]:
    """What can be explained: every command and alias, and the groups of those of two words."""
    names = set(GROUPS) & {name.partition(" ")[0] for name in COMMANDS}
    for name, entry in COMMANDS.items():
        group, blank, _ = name.rpartition(" ")
        names |= {name, *(group + blank + alias for alias in entry.aliases)}
    return names


def takes_label(name: str) -> bool:
    """Whether that is a command, or an alias of one, behind which a label stands."""
    return any(names[0] in ("label", "labels") for command, entry in COMMANDS.items()
               for names, _ in entry.options if name in (command, *entry.aliases))


def seconds(text: str) -> float:
    """A positive number of seconds."""
    if not re.fullmatch(r"\d{1,6}(?:\.\d+)?|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return float(text)


def count(text: str) -> int:
    """A number of CPUs."""
    if not re.fullmatch(r"[1-9]\d{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 999")
    return int(text)


def port_index(text: str) -> int:
    """The number of a serial port."""
    if not re.fullmatch(r"\d{1,2}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 99")
    return int(text)


def mebibytes(text: str) -> int:
    """A size of memory, in MiB."""
    with contextlib.suppress(ValueError):
        if 32 <= parse_size(text) >> 20 < 1 << 24:
            return parse_size(text) >> 20
    raise argparse.ArgumentTypeError(f"{text!r} is no size of memory, such as 4G or 512M")


def period(text: str) -> float:
    """A length of time, in seconds."""
    with contextlib.suppress(ValueError):
        return parse_age(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no length of time, such as 12h or 7d")


LABEL_ARG = option("label", help="the machine")
LABELS = option("labels", metavar="label", nargs="*", help="the machines")
ALL = option("--all", action="store_true", help="every clone")
JSON = option("--json", action="store_true", dest="as_json", help="for programs")
YES = option("-y", "--yes", action="store_true", help="do not ask")


def lend_terminal(ctx: Context, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> int:
    """Runs ssh as a child in the terminal's foreground, and returns its status as a shell would.

    Ctrl-C and Ctrl-\\ are the child's meanwhile. A signal that asks us to end ends the child first.
    `stdin`, `stdout`: handles for it in place of ours.
    """
    attributes = None
    if sys.stdin.isatty():
        import termios

        attributes = termios.tcgetattr(0)
    pressed: list[int] = []
    ours = {number: signal.signal(number, lambda number, _: pressed.append(number))
            for number in (signal.SIGINT, signal.SIGQUIT)}
    child = None
    try:
        with ctx.interrupts.held():         # between its birth and its name here it would be lost
            child = subprocess.Popen(list(argv), stdin=stdin, stdout=stdout)
        code = child.wait()
    except FileNotFoundError:
        raise KodeError(f"there is no {argv[0]} on PATH", "Install the OpenSSH client.") from None
    except BaseException:
        if child:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            child.kill()
            child.wait()
        raise
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if attributes:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, attributes)
    if pressed and code == 255:         # ssh takes the signal, and ends by itself
        return 128 + pressed[0]
    return 128 - code if code < 0 else code


def become(argv: Sequence[str]) -> NoReturn:
    """Replaces this process with ssh. The locks fall with the exec: their handles are not inherited."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)       # Python ignores them, and that would be inherited
    try:
        os.execvp(argv[0], list(argv))
    except OSError as failure:
        raise KodeError(f"{argv[0]} cannot be run: {failure.strerror}", "It is looked for on PATH.") from None


def under_lock(ctx: Context, work: Callable[[str], str]) -> Callable[[str], str]:
    """`work` on a label whose lock is held meanwhile; its answer follows the label."""
    def locked(label: str) -> str:
        with ctx.manager.holding(label):
            return f"{label} {work(label)}"
    return locked


def each(ctx: Context, labels: Sequence[str], work: Callable[[str], str]) -> int:
    """Does one thing to several machines, WIDTH at a time; returns the status of the first failure.

    What `work` answers is a line for the person.
    """
    def report(line: str) -> None:
        if line:
            ctx.out.note(line)
    if len(labels) == 1:
        report(work(labels[0]))
        return 0
    waiting = list(enumerate(labels))
    done: dict[int, int] = {}
    trouble: list[BaseException] = []

    def worker() -> None:
        while waiting and not trouble:
            with contextlib.suppress(IndexError):
                i, label = waiting.pop(0)
                try:
                    report(work(label))
                    done[i] = 0
                except KodeError as failure:
                    ctx.out.error(failure)
                    done[i] = failure.status
                except BaseException as failure:        # a bug or an interruption: the main thread's to raise
                    trouble.append(failure)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(WIDTH, len(labels)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                ctx.out.tick()
    except BaseException:
        ctx.manager.utm.close()         # ends their calls, so that they come to their end
        for thread in threads:
            thread.join(2)
        raise
    if trouble:
        raise trouble[0]
    return next((done[i] for i in sorted(done) if done[i]), 0)


def chosen(ctx: Context, opts: Arguments, fit: Callable[[Row], bool] = lambda row: True) -> list[str]:
    """The labels on the command line, each once, or those of all fitting clones with --all. Raises UsageError."""
    manager, all_of_them = ctx.manager, getattr(opts, "all", False)
    if all_of_them and opts.labels:
        raise UsageError("either labels or --all, not both", f"See: kodemachine help {opts.command}")
    if all_of_them:
        return [str(manager.label_of(row.name)) for row in manager.clones(manager.utm.rows(partial=True)) if fit(row)]
    if not opts.labels:
        raise UsageError(f"{opts.command} needs a label", f"See: kodemachine help {opts.command}")
    return list(dict.fromkeys(manager.label(text) for text in opts.labels))


def wishes_of(opts: Arguments) -> Wishes:
    """What the options of `start` ask for. Raises UsageError for those that exclude each other."""
    if opts.rm and opts.detach:
        raise UsageError("--rm and --detach exclude each other: the session's end is what deletes the machine",
                         "To keep it, without --rm: kodemachine start -d LABEL")
    if opts.rm and opts.fresh:
        raise UsageError("--rm and --fresh exclude each other: --rm only deletes a machine that it made itself",
                         "To delete it first: kodemachine delete --force LABEL")
    if opts.detach and opts.rest is not None:
        raise UsageError("--detach and a command exclude each other",
                         "Start it first, then: kodemachine LABEL -- command")
    return Wishes(opts.base, opts.cpus, opts.memory, opts.disposable, opts.gui, opts.timeout, opts.rm, True, opts.bare)


def no_command(word: str, *words: str) -> UsageError:
    """What to say where words follow one that is no command: a label stands alone."""
    near, others = near_command(word), " ".join(words)
    inside = f"to run a command in that machine: kodemachine {word} -- {others}"
    if takes_label(words[0]):
        return UsageError("the command comes before the label", f"kodemachine {words[0]} {word}; or, {inside}")
    if near:
        hint = f"See: kodemachine help {near}"
        if near not in all_names():             # --version
            hint = f"kodemachine {near}"
        elif words[1:] and near in ("ssh", "exec"):
            hint = f"kodemachine {near} {words[0]} -- {' '.join(words[1:])}"
        elif takes_label(near) and not (words[1:] and near == "start"):     # whose further words may mean two things
            hint = f"kodemachine {near} {others}"
        return UsageError(f"there is no command {word}; did you mean {near!r}?", hint)
    several = f"; to start several: kodemachine start -d {word} {others}" if RESERVED.isdisjoint(words) else ""
    return UsageError(f"{word} is no command, and a label stands alone",
                      inside[0].upper() + inside[1:] + several)


@command("start", LABELS,
         option("-d", "--detach", action="store_true", help="do not connect; print the address"),
         option("--rm", action="store_true", help="delete the new machine when its session ends"),
         option("--fresh", action="store_true", help="delete an existing machine first"), YES,
         option("--disposable", action="store_true", help="drop all writes at power-off"),
         option("--base", metavar="IMAGE", help="clone this image (a name, a version, or a UUID)"),
         option("--cpus", type=count, metavar="N", help="CPUs of a new clone"),
         option("--memory", type=mebibytes, metavar="SIZE", help="memory of a new clone, such as 4G"),
         option("--repin", action="store_true", help="accept changed host keys, after showing them"),
         option("--gui", action="store_true", help="do not hide UTM"),
         option("--timeout", type=seconds, metavar="S", help="seconds to wait until ssh answers"),
         examples=["project-alpha", "start -d project-alpha project-beta", "trial --rm --memory 8G -- make test"])
def cmd_start(ctx: Context, opts: Arguments) -> int:
    """clone if missing, start, and connect by ssh, or run what follows -- in it"""
    wishes = wishes_of(opts)
    if opts.bare and opts.labels[1:]:
        raise no_command(*opts.labels)
    labels = chosen(ctx, opts)
    if len(labels) > 1 and not opts.detach:
        raise UsageError("several labels need --detach", f"kodemachine start -d {' '.join(labels)}")
    if len(labels) > 1 and (opts.fresh or opts.repin) and not opts.yes:
        raise UsageError("several labels with --fresh or --repin need -y: there is one terminal to ask on",
                         "Add -y, or name one label at a time.")
    if len(labels) > 1:
        return start_several(ctx, labels, wishes, opts)
    if opts.rm:
        return throw_away(ctx, labels[0], wishes, opts)
    with ctx.manager.holding(labels[0]):
        vm, address = ready(ctx, labels[0], wishes, opts)
        furnish(ctx, vm, address)
        if opts.detach:
            ctx.out.result(address)
            return 0
        hand_over(ctx, vm, address, opts)


def ready(ctx: Context, label: str, wishes: Wishes, opts: Arguments) -> tuple[VM, str]:
    """The machine of that label, up and answering, and its address."""
    if opts.fresh:
        existed = make_room(ctx, label, wishes, opts)       # what a machine was called is no typo of a command
        wishes = wishes._replace(bare=wishes.bare and not existed,
                                 afterwards="the same command, without --fresh, takes it from there")
    vm, call = ctx.manager.obtain(label, wishes)
    address = ctx.manager.bring_up(vm, label, wishes, call)
    if opts.repin:
        repin(ctx, vm, label, opts)
    return vm, address


def start_several(ctx: Context, labels: Sequence[str], wishes: Wishes, opts: Arguments) -> int:
    """Starts them at the same time; then first_boot where it is due, one after the other: there is one terminal."""
    due: dict[str, tuple[VM, str]] = {}

    def start(label: str) -> str:
        with ctx.manager.holding(label):
            vm, address = ready(ctx, label, wishes, opts)
        if ctx.manager.first_boot(vm):
            due[label] = vm, address
        else:
            ctx.out.result(f"{label} {address}")
        return ""
    status = each(ctx, labels, start)
    for label in filter(due.__contains__, labels):
        vm, address = due[label]
        try:
            with ctx.manager.holding(label):
                furnish(ctx, vm, address)
            ctx.out.result(f"{label} {address}")
        except KodeError as failure:
            ctx.out.error(failure)
            status = status or failure.status
    return status


def furnish(ctx: Context, vm: VM, address: str) -> None:
    """Runs the first_boot script in a new machine, as the user, over ssh; what it says goes to our stderr.

    It arrives on ssh's stdin as a whole and is run from a file, so that its #! line counts and it cannot read itself.
    Raises KodeError if it fails; then it is still due. Callers hold the label's lock.
    """
    path = ctx.manager.first_boot(vm)
    if not path:
        return
    script = ('file=$(mktemp "$HOME/.first-boot.XXXXXX") && cat > "$file" && chmod 700 "$file" || exit; '
              'cd && "$file"; code=$?; rm -f "$file"; exit "$code"')
    handoff = ctx.manager.handoff
    ssh, *words = handoff.argv(vm, address, [shlex.join(["exec", "sh", "-c", script])], handoff.pin(vm))
    ctx.out.step(f"running {path} in {vm.name}")
    ctx.out.end_step()
    with open_script(path) as file:
        code = lend_terminal(ctx, [ssh, "-T", *words], file.fileno(), 2)
    if code in (128 + signal.SIGINT, 128 + signal.SIGQUIT):
        raise Interrupted(code - 128)
    if code:
        label = ctx.manager.label_of(vm.name)
        raise KodeError(f"first_boot failed in {vm.name}: {path} ended with exit status {code}",
                        "" if ctx.manager.record_of(vm.uuid).get("rm") else
                        f"The machine stays. To run it once more: kodemachine {label}; to look inside: kodemachine ssh "
                        f"{label}; to do without: kodemachine config set first_boot ''")
    ctx.manager.first_boot_done(vm)


def hand_over(ctx: Context, vm: VM, address: str, opts: Arguments) -> NoReturn:
    """Becomes ssh."""
    pinned = ctx.manager.handoff.pin(vm)
    ctx.out.end_step()
    become(ctx.manager.handoff.argv(vm, address, opts.rest or [], pinned))


def make_room(ctx: Context, label: str, wishes: Wishes, opts: Arguments) -> bool:
    """--fresh: deletes the machine of that label, once it is sure that another can be made; false: there is none."""
    manager = ctx.manager
    rows = manager.utm.rows()
    row = manager.row_of(rows, label)
    if row:
        manager.base_for_new(rows, wishes.base)
        if not opts.yes and not ctx.out.confirm(f"Delete {row.name} ({row.power.value}) and make it anew?", "--fresh"):
            raise KodeError("nothing was changed")
        ctx.out.step(f"deleting {row.name}")
        manager.delete(VM(manager.utm, row), force=True)
    return row is not None


def repin(ctx: Context, vm: VM, label: str, opts: Arguments) -> None:
    """--repin: reads the host keys anew through the guest agent, which no network can forge, shows them, and asks."""
    told = ctx.manager.read_guest(vm, label, needed=True)
    if not told or not told[0]:
        raise KodeError(f"the guest agent does not tell the host keys of {vm.name}; nothing was changed",
                        f"Does it run there? Look at its console: kodemachine attach {label}")
    old = ctx.manager.record_of(vm.uuid).get("host_keys") or []
    if old == told[0]:
        return ctx.out.note(f"the host keys of {vm.name} are the pinned ones")
    for title, keys in (("pinned", parse_host_keys(old)), ("now", told[0])):
        for key in keys:
            ctx.out.note(f"{title:7} {fingerprint(key)}", needed=not opts.yes)
    if not opts.yes and not ctx.out.confirm(f"Pin the new keys of {vm.name}?", "--repin"):
        raise KodeError("nothing was changed")
    ctx.manager.state.record(vm.uuid, name=vm.name, host_keys=told[0], machine_id=told[1] or None)


def throw_away(ctx: Context, label: str, wishes: Wishes, opts: Arguments) -> int:
    """--rm: a session in a new machine, which is deleted at its end, however it ends."""
    manager = ctx.manager
    wishes = wishes._replace(afterwards=f"once it is there, delete it: kodemachine delete {label}")
    with contextlib.ExitStack() as stack:
        with manager.holding(label):
            vm, _ = manager.obtain(label, wishes)
            stack.enter_context(manager.session_lock(vm))
            stack.callback(throw_out, ctx, vm, label)
            address = manager.bring_up(vm, label, wishes)
            furnish(ctx, vm, address)
            pinned = manager.handoff.pin(vm)
        ctx.out.end_step()
        return lend_terminal(ctx, manager.handoff.argv(vm, address, opts.rest or [], pinned))


def throw_out(ctx: Context, vm: VM, label: str) -> None:
    """Deletes a --rm machine; no signal stops that, and a failure names the command to do it by hand."""
    with ctx.interrupts.held():
        ctx.out.step(f"deleting {vm.name} (--rm)")
        try:
            with ctx.manager.holding(label):
                vm.status()
                ctx.manager.delete(vm, force=True)
        except NotFound:
            pass                # somebody was faster
        except KodeError as failure:
            ctx.out.warn(f"{vm.name} was not deleted: {failure.message}. By hand: kodemachine delete --force {label}")
        ctx.out.end_step()


@command("ssh", LABEL_ARG, option("--timeout", type=seconds, metavar="S", help="seconds to wait until ssh answers"),
         option("--gui", action="store_true", help="do not hide UTM"),
         examples=["ssh project-alpha", "ssh project-alpha -- tail -f /var/log/syslog"])
def cmd_ssh(ctx: Context, opts: Arguments) -> int:
    """start if needed and connect, or run what follows --, but never clone"""
    label = ctx.manager.label(opts.label)
    wishes = Wishes(gui=opts.gui, timeout=opts.timeout, may_clone=False)
    with ctx.manager.holding(label):
        vm, call = ctx.manager.obtain(label, wishes)
        hand_over(ctx, vm, ctx.manager.bring_up(vm, label, wishes, call), opts)


@command("exec", LABEL_ARG, option("--input", action="store_true", help="give it our standard input"),
         examples=["exec project-alpha -- ip addr", "exec project-alpha --input -- tee /etc/motd"])
def cmd_exec(ctx: Context, opts: Arguments) -> int:
    """run what follows -- as root through the guest agent, without network or ssh"""
    if not opts.rest:
        raise UsageError("exec needs a command after --",
                         f"Such as: kodemachine exec {opts.label} -- ip addr")
    if opts.input and sys.stdin.isatty():
        raise UsageError("--input takes a file or a pipe, not a terminal",
                         f"For a terminal: kodemachine ssh {opts.label}")
    for word in opts.rest:
        if not is_utf8(word):
            raise UsageError(f"{printable(word)} is not UTF-8, and would be changed on its way into the guest",
                             "Copy the file with kodemachine cp, and name it with a pattern.")
    vm = ctx.manager.find(ctx.manager.label(opts.label))
    if vm.power is not Power.STARTED:
        raise WrongState(f"{vm.name} is {vm.power.value}", f"Start it: kodemachine start -d {opts.label}")
    data = sys.stdin.buffer.read(EXEC_INPUT + 1) if opts.input else b""
    if len(data) > EXEC_INPUT:
        raise UsageError(f"--input takes at most {size_text(EXEC_INPUT)}",
                         f"Copy the file first: kodemachine cp FILE {opts.label}:")
    code, out, err = vm.run(opts.rest, data)
    ctx.out.raw(out, err)
    return code


@command("clone", LABEL_ARG, option("new", help="the label of the copy"),
         examples=["clone project-alpha project-beta"])
def cmd_clone(ctx: Context, opts: Arguments) -> int:
    """copy a stopped machine as it is, to one of another label"""
    label, new = ctx.manager.label(opts.label), ctx.manager.label(opts.new)
    if label == new:
        raise UsageError(f"{label} cannot be a copy of itself", f"Such as: kodemachine clone {label} {label}-2")
    first, second = sorted((label, new))        # whoever else takes both takes them in this order
    with ctx.manager.holding(first), ctx.manager.holding(second):
        ctx.manager.fork(label, new)
    ctx.out.note(f"{new} is a copy of {label}; start it: kodemachine {new}")
    return 0


@command("cp", option("paths", metavar="path", nargs="+", help="sources and a destination; LABEL:PATH is in a machine"),
         option("-r", action="store_true", dest="recursive", help="whole folders"),
         examples=["cp notes.txt project-alpha:", "cp -r project-alpha:results ."])
def cmd_cp(ctx: Context, opts: Arguments) -> int:
    """copy files to, from and between running machines"""
    if len(opts.paths) < 2:
        raise UsageError("cp needs a source and a destination", "Such as: kodemachine cp notes.txt project-alpha:")
    labels, operands = [], []
    for path in opts.paths:
        host, colon, rest = path.partition(":")
        if colon and "/" not in host:
            labels.append(ctx.manager.label(host))
            path = f"{ctx.manager.settings.prefix}{labels[-1]}:{rest}"
        operands.append(path)
    if not labels:
        raise UsageError("none of these paths is in a machine", "Such as: kodemachine cp notes.txt project-alpha:")
    pinned = True
    for label in dict.fromkeys(labels):
        with ctx.manager.holding(label):        # says at once, and in our words, what scp could only guess
            pinned = ctx.manager.running(label)[2] and pinned
    ctx.out.end_step()
    handoff = ctx.manager.handoff
    keep_alive = handoff.keep_alive(ctx.manager.settings.prefix + labels[0])
    options = as_words({**handoff.name_options(pinned), **keep_alive})
    become(["scp", *["-r"] * opts.recursive, "-3", *options, "--", *operands])


@command("ssh-config", option("--install", action="store_true", help="include it in ~/.ssh/config"),
         examples=["ssh-config --install"])
def cmd_ssh_config(ctx: Context, opts: Arguments) -> int:
    """what lets ssh, scp, rsync, git and editors use machines by name"""
    options = "".join(f"  {key} {value}\n" for key, value in ctx.manager.handoff.name_options().items())
    stanza = f"Host {ctx.manager.settings.prefix}*\n{options}"
    ours = os.path.join(os.path.dirname(ctx.config.path), "ssh_config")
    include = f'Include "{ours}"'
    if not opts.install:
        ctx.out.result(stanza.rstrip())
        ctx.out.note("Paste this before the first Host line of ~/.ssh/config, or: kodemachine ssh-config --install")
        return 0
    theirs = os.path.expanduser("~/.ssh/config")
    try:
        before = read_text(theirs, "surrogateescape") or ""
    except OSError as failure:
        raise KodeError(f"{theirs}: {failure.strerror}", "Without --install it is shown, to be pasted.") from None
    there = read_text(ours, "surrogateescape")
    if there and " proxy %h" not in there:
        raise KodeError(f"{ours} is not kodemachine's, and stays as it is",
                        "Keep config.json in a folder of its own, or paste what is shown without --install.")
    write_file(ours, stanza)
    if include not in before.splitlines():
        if before:
            write_file(theirs + ".before-kodemachine", before)
        write_file(os.path.realpath(theirs), f"{include}\n\n{before}")
    ctx.out.note(f"ssh {ctx.manager.settings.prefix}LABEL works now ({ours}, included in ~/.ssh/config)")
    return 0


@command("proxy", option("name", help="the machine's name, with the prefix"),
         option("--learning", action="store_true", help="an unknown host key will be learned"), hidden=True)
def cmd_proxy(ctx: Context, opts: Arguments) -> int:
    """for ssh's ProxyCommand: connect to a running machine by name"""
    import socket

    label = ctx.manager.label_of(opts.name)
    if label is None:
        raise NotFound(f"{opts.name} is no machine's name", "See what is there: kodemachine list")
    ctx.out.quiet = True        # progress would stand among the output of ssh, rsync and git
    with ctx.manager.holding(label):
        vm, address, pinned = ctx.manager.running(label)
    if not (pinned or opts.learning):
        ctx.out.warn(f"the host key of {vm.name} is not known yet; what learns it is: kodemachine ssh {label}")
    try:
        connection = socket.create_connection((address, ctx.manager.settings.ssh_port), timeout=10)
    except OSError as failure:
        raise KodeError(f"{vm.name} does not answer at {address}: {failure.strerror or failure}",
                        f"Look at its console: kodemachine attach {label}") from None
    with connection:
        connection.setblocking(True)
        if stat.S_ISSOCK(os.fstat(1).st_mode):      # ProxyUseFdpass: ssh takes the socket itself
            with socket.socket(fileno=os.dup(1)) as ssh:
                socket.send_fds(ssh, [b"\0"], [connection.fileno()])
                # macOS may discard a socket in flight whose sender has gone. ssh closes its end when it has it.
                select.select([ssh], [], [], FDPASS_LIMIT)
            return 0
        connection.setblocking(False)

        def hang_up() -> None:
            with contextlib.suppress(OSError):      # the guest may have done so already
                connection.shutdown(socket.SHUT_WR)

        console = Console(connection.fileno(), 0, 1, b"", None)
        console.relay(None, hang_up)
        console.close()
    return 0


@command("list", option("-a", "--all", action="store_true", help="images and other machines too"), JSON,
         option("--format", choices=["ansible"], help="an inventory for Ansible, by the machines' names"),
         option("-q", action="store_true", dest="labels_only", help="labels only"),
         option("--no-ip", action="store_false", dest="ip", help="do not ask the guests"), aliases=["ls"],
         examples=["list", "list -a --json", "list --format ansible"])
def cmd_list(ctx: Context, opts: Arguments) -> int:
    """the machines, their state, address and size"""
    if opts.as_json + opts.labels_only + bool(opts.format) > 1:
        raise UsageError("one of -q, --json and --format at a time", "See: kodemachine help list")
    manager, out = ctx.manager, ctx.out
    rows = manager.utm.rows(partial=True)
    shown = list(rows) if opts.all else manager.clones(rows)
    if opts.format:
        out.json(inventory(manager, manager.clones(rows)))
        return 0
    if opts.labels_only:
        images = manager.images(rows)
        for row in shown:
            out.result((row not in images and manager.label_of(row.name)) or row.name)
        return 0
    machines = manager.survey(shown, ip=opts.ip)
    if opts.as_json:
        out.json([machine._asdict() for machine in machines])
    elif machines:
        out.result(machine_table(ctx, shown, machines))
    else:
        out.note("no machines yet; make one: kodemachine project-alpha")
    return 0


def inventory(manager: Manager, rows: Sequence[Row]) -> dict[str, Any]:
    """An Ansible inventory of clones in groups by state. All stands below a group of ours: beside other inventories
    nothing of it reaches their hosts. Ansible shares its connections itself, so that is left to it."""
    options = {key: value for key, value in manager.handoff.name_options().items() if not key.startswith("Control")}
    # One that it has kept to a machine that is off by now would hang, and the next play with it.
    options.update(ServerAliveInterval="5", ServerAliveCountMax="3")
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for machine in manager.survey(rows, ip=False, disk=False):
        hosts = groups.setdefault(f"kodemachine_{machine.status}", {"hosts": {}})["hosts"]
        hosts[machine.name] = {"kodemachine_label": machine.label, "kodemachine_image": machine.image}
    shared = {"ansible_ssh_common_args": shlex.join(as_words(options))}
    return {"all": {"children": {"kodemachine": {"vars": shared, "children": groups}}}}


def marks_of(ctx: Context, row: Row, record: dict[str, Any]) -> str:
    """What a person has to know of a machine beside its state, in parentheses behind that."""
    kept = {"saved": record.get("saved"), "--rm": ctx.manager.is_orphan(row, record),
            "disposable": record.get("disposable") and row.power is not Power.STOPPED}
    marks = ", ".join(mark for mark, here in kept.items() if here)
    return f" ({marks})" if marks else ""


def machine_table(ctx: Context, rows: Sequence[Row], machines: Sequence[Machine]) -> str:
    """The table of `list`, as wide as the terminal at most."""
    lines, records = [], ctx.manager.state.records()
    for row, machine in zip(rows, machines):
        record = records.get(row.uuid, {})
        lines.append([machine.label or machine.name, machine.status + marks_of(ctx, row, record),
                      machine.ip or "-", machine.image or "-", size_text(machine.memory), size_text(machine.size),
                      size_text(machine.frees), age_text(age_of(machine.created))])
    header = ("LABEL", "STATUS", "IP", "IMAGE", "MEMORY", "SIZE", "FREES", "AGE")
    safe = [[printable(cell).replace("\n", " ") for cell in line] for line in lines]
    return table(header, safe, ctx.out.width, ("MEMORY", "SIZE", "AGE", "FREES", "IMAGE", "IP"))


@command("status", option("label", nargs="?", help="the machine; without it the installation"), JSON,
         aliases=["info"], examples=["status", "status project-alpha"])
def cmd_status(ctx: Context, opts: Arguments) -> int:
    """one machine in full, or the installation at a glance"""
    facts = machine_facts(ctx, opts.label) if opts.label else installation_facts(ctx)
    if opts.as_json:
        ctx.out.json(facts)
        return 0
    if opts.label:
        row = Row(facts["uuid"], Power(facts["status"]), facts["name"])
        facts["status"] += marks_of(ctx, row, ctx.manager.record_of(row.uuid))
    for key, value in facts.items():
        if key in ("memory", "size", "frees"):
            value = size_text(value)
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{number} {word}" for word, number in value.items()) or "none"
        ctx.out.result(f"{key + ':':11} {'-' if value in (None, '') else value}")
    return 0


def machine_facts(ctx: Context, text: str) -> dict[str, Any]:
    """What is known of one machine, with all its addresses."""
    vm = ctx.manager.find(ctx.manager.label(text))
    row = Row(vm.uuid, vm.power, vm.name)
    addresses = vm.addresses() if vm.power is Power.STARTED else []
    facts = ctx.manager.survey([row], ip=False)[0]._asdict()
    return {**facts, "ip": addresses[0] if addresses else None, "addresses": addresses}


def installation_facts(ctx: Context) -> dict[str, Any]:
    """The program, UTM, the image that a new clone comes from, and how many machines are in which state."""
    manager = ctx.manager
    rows = manager.utm.rows(partial=True)
    version = manager.utm.call("version", limit=LIMITS["status"])
    try:
        base: str | None = manager.base(rows, None).name
    except KodeError as failure:
        base = None
        ctx.out.warn(failure.message)
    states = [row.power.value for row in manager.clones(rows)]
    return {
        "version": __version__,
        "utm": version.out.strip() if version.outcome is Outcome.DONE else None,
        "utmctl": manager.utm.path(),
        "image": base,
        "machines": {state: states.count(state) for state in dict.fromkeys(states)},
        "config": ctx.config.path,
        "state": manager.state.folder,
    }


@command("ip", LABEL_ARG, option("--all", action="store_true", help="every address that the guest tells"),
         option("--wait", type=seconds, metavar="S", help="seconds to wait for an answer"),
         examples=["ip project-alpha", "ip project-alpha --wait 60"])
def cmd_ip(ctx: Context, opts: Arguments) -> int:
    """the address that answers, alone on stdout"""
    vm = ctx.manager.find(ctx.manager.label(opts.label))
    if vm.power in (Power.STOPPED, Power.PAUSED) or (vm.power is not Power.STARTED and not opts.wait):
        raise WrongState(f"{vm.name} is {vm.power.value}, it has no address",
                         f"Start it: kodemachine start -d {opts.label}")
    if opts.all:
        ctx.out.result("\n".join(vm.await_addresses(opts.wait or 0.0)))
    else:
        ctx.out.result(vm.greet(ctx.manager.settings.ssh_port, opts.wait or 5.0, None, "allow more time with --wait"))
    return 0


@command("attach", LABEL_ARG, option("--index", type=port_index, metavar="N", help="the N-th serial port, from 0"),
         option("--log", metavar="FILE", help="also append what the guest says to FILE"),
         option("--escape", default="ctrl-]", metavar="KEY", help="the key that leaves, or none (ctrl-])"),
         option("--timeout", type=seconds, metavar="S", help="seconds to listen, without a terminal"),
         examples=["attach project-alpha", "attach project-alpha --log boot.log"])
def cmd_attach(ctx: Context, opts: Arguments) -> int:
    """a direct serial pipe to the guest, for when the network fails"""
    escape = escape_byte(opts.escape)
    vm = ctx.manager.find(ctx.manager.label(opts.label))
    if vm.power is not Power.STARTED:
        raise WrongState(f"{vm.name} is {vm.power.value}; only a running machine has a console",
                         f"Start it: kodemachine start -d {opts.label}")
    port = vm.serial_port(opts.index)
    name = "serial-" + re.sub(r"[^A-Za-z0-9.]+", "-", port)
    with ctx.manager.state.lock(name, 0.0, wait=False, what=f"the console of {vm.name}"):
        line = open_line(port)
        try:
            return run_console(ctx, vm, line, escape, opts)
        finally:
            os.close(line)


def run_console(ctx: Context, vm: VM, line: int, escape: bytes, opts: Arguments) -> int:
    """Relays until an end comes, and says in one line why; the terminal is as it was before."""
    try:
        log = os.open(opts.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if opts.log else None
    except OSError as failure:
        raise KodeError(f"cannot write the log {opts.log}: {failure.strerror}", "Name another with --log.") from None
    person = sys.stdin.isatty()
    if person:
        leave = "no escape key" if not escape else \
            "leave with " + (f"Ctrl-{chr(escape[0] + 64)}" if escape < b" " else escape.decode())
        ctx.out.note(f"--- console of {vm.name}; Enter shows its prompt; {leave} ---")
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(0)
            fitting = f"stty rows {size.lines} cols {size.columns}"
            ctx.out.note(f"--- a serial line knows no window size; in the guest: {fitting} ---")
    console = Console(line, 0, 1, escape if person else b"", log)
    deadline = time.monotonic() + opts.timeout if opts.timeout and not person else None
    try:
        with raw_terminal(0):
            end = console.relay(deadline)
    finally:
        console.close()
        if log is not None:
            os.close(log)
    words = {"escape": "left", "closed": "the machine closed the line", "timeout": "the time is over",
             "reader": "nobody reads any more"}
    ctx.out.note(("\n" if person else "") + f"--- console of {vm.name}: {words[end]} ---")
    return 128 + signal.SIGPIPE if end == "reader" else 0


@command("stop", LABELS, ALL, option("-t", "--timeout", type=seconds, metavar="S", help="seconds that the guest has"),
         option("-f", "--force", action="store_true", help="do not ask the guest"),
         option("--kill", action="store_true", help="end the machine's process"),
         examples=["stop project-alpha", "stop --all -t 120", "stop --force project-alpha"])
def cmd_stop(ctx: Context, opts: Arguments) -> int:
    """shut down: ask the guest, and wait until it is off"""
    limit = opts.timeout or ctx.manager.settings.stop_timeout
    labels = chosen(ctx, opts, lambda row: row.power is not Power.STOPPED)
    ctx.out.step(f"stopping {', '.join(labels)}" if labels else "nothing to stop")
    return each(ctx, labels, under_lock(
        ctx, lambda label: ctx.manager.stop(label, limit, force=opts.force, kill=opts.kill)))


@command("suspend", LABELS, ALL, option("--save", action="store_true", help="to disk as well"),
         examples=["suspend project-alpha", "suspend --all --save"])
def cmd_suspend(ctx: Context, opts: Arguments) -> int:
    """pause to memory, or to disk"""
    labels = chosen(ctx, opts, lambda row: row.power is Power.STARTED)
    return each(ctx, labels, under_lock(ctx, lambda label: ctx.manager.suspend(label, save=opts.save)))


@command("resume", LABELS, ALL, examples=["resume project-alpha"])
def cmd_resume(ctx: Context, opts: Arguments) -> int:
    """let a suspended machine go on"""
    records = ctx.manager.state.records() if opts.all else {}
    labels = chosen(ctx, opts, lambda row: row.power is Power.PAUSED or bool(records.get(row.uuid, {}).get("saved")))
    return each(ctx, labels, under_lock(ctx, ctx.manager.resume))


@command("delete", LABELS, option("-f", "--force", action="store_true", help="turn a running machine off first"),
         aliases=["rm"], examples=["delete project-alpha", "delete --force project-alpha project-beta"])
def cmd_delete(ctx: Context, opts: Arguments) -> int:
    """delete machines, and say what that freed"""
    def delete(label: str) -> str:
        freed = ctx.manager.delete(ctx.manager.find(label), force=opts.force)
        return "deleted" + (f", freed {size_text(freed)}" if freed is not None else "")
    return each(ctx, chosen(ctx, opts), under_lock(ctx, delete))


@command("purge", option("--stopped", action="store_true", help="stopped machines (the default)"),
         option("--all", action="store_true", help="running, paused and saved ones too"),
         option("--older-than", type=period, metavar="AGE", help="made longer ago than this, such as 7d"),
         option("--image", metavar="IMAGE", help="cloned from this image"),
         option("-n", "--dry-run", action="store_true", help="only show what would go"), YES, JSON, aliases=["prune"],
         examples=["purge --dry-run", "purge --older-than 7d", "purge --all --image kodeimage-v0.1.0"])
def cmd_purge(ctx: Context, opts: Arguments) -> int:
    """delete many machines, after showing which and what they free"""
    if opts.all and opts.stopped:
        raise UsageError("either --stopped or --all, not both", "See what would go: kodemachine purge --all --dry-run")
    if opts.as_json and not opts.dry_run:
        raise UsageError("--json shows what would go, with --dry-run", "So: kodemachine purge --dry-run --json")
    manager, out = ctx.manager, ctx.out
    rows, status = purgeable(ctx, opts)
    if opts.as_json:
        out.json([machine._asdict() for machine in manager.survey(rows, ip=False)])
        return status
    if not opts.dry_run:
        manager.tidy()
    if not rows:
        out.note("nothing to purge")
        return status
    machines = manager.survey(rows, ip=False)
    if opts.dry_run:
        out.result(machine_table(ctx, rows, machines))
    else:
        out.note(machine_table(ctx, rows, machines), needed=not opts.yes)
    known = [machine.frees for machine in machines if machine.frees is not None]
    amount = f"at least {size_text(sum(known))}" if known else "an unknown amount"
    if opts.dry_run:
        out.note(f"{len(rows)} would be deleted, and {amount} would come free")
        return status
    if not opts.yes and not out.confirm(f"Delete {len(rows)}, and free {amount}?", "purge"):
        raise KodeError("nothing was deleted")
    free_before = free_space(manager.documents)
    states = {row.name[len(manager.settings.prefix):]: row for row in rows}

    def purge(label: str) -> str:
        try:
            with manager.holding(label, wait=False):
                row = states[label]
                orphan = manager.is_orphan(row, manager.record_of(row.uuid))
                return purge_one(ctx, row, force=opts.all or orphan)
        except Busy as failure:
            return f"{label} left: {failure.message}"
    status = each(ctx, list(states), purge) or status
    left = {row.uuid for row in manager.utm.rows()}
    tell_gain(ctx, free_before, sum(machine.frees or 0 for machine in machines if machine.uuid not in left))
    return status


def purgeable(ctx: Context, opts: Arguments) -> tuple[list[Row], int]:
    """The machines that match the filters, and the exit status so far: not 0 if one had to be left."""
    manager, out = ctx.manager, ctx.out
    records = manager.state.records()
    origins = {image_of(record).get("name") for record in records.values()}
    image = opts.image if opts.image is None or opts.image in origins else whole_name(opts.image)
    rows, unknown, running, status = [], 0, 0, 0
    listed = manager.utm.rows()
    names = [row.name for row in listed]
    for row in manager.clones(listed):
        record = records.get(row.uuid, {})
        origin, age = image_of(record).get("name"), age_of(record.get("created"))
        if (opts.older_than is not None and age is None) or (image is not None and origin is None):
            unknown += 1
        elif (opts.older_than is not None and age is not None and age < opts.older_than) \
                or image not in (None, origin):
            continue
        elif names.count(row.name) > 1:
            out.note(f"{row.name} ({row.uuid}) left: another machine has the same name")
            status = WrongState.status
        elif (row.power is Power.STOPPED and (opts.all or not record.get("saved"))) or \
                (row.power in (Power.STARTED, Power.PAUSED) and (opts.all or manager.is_orphan(row, record))):
            rows.append(row)
        elif row.power is Power.STOPPED:
            out.note(f"{row.name} left: it has a saved session (--all takes it, too)")
        elif opts.all or row.power is Power.UNKNOWN:
            out.note(f"{row.name} left: it is {row.power.value}")
            status = WrongState.status
        else:
            running += 1
    if image not in (None, *origins):
        out.note(f"no machine is known to come from an image {opts.image}")
    if running and not rows:
        out.note(f"{running} left: running or paused (--all takes those, too)")
    if unknown:
        out.note(f"{unknown} left out: their age or image is not known")
    return rows, status


def purge_one(ctx: Context, shown: Row, *, force: bool) -> str:
    """Deletes one machine that was shown, if it still is what was shown."""
    label = str(ctx.manager.label_of(shown.name))
    try:
        vm = ctx.manager.find(label)
    except NotFound:
        return f"{label} is gone already"
    if vm.uuid != shown.uuid:
        return f"{label} left: it is another machine now"
    if vm.power is not Power.STOPPED and not force:
        return f"{label} left: it is {vm.power.value} now"
    ctx.manager.delete(vm, force=force)
    return f"{label} deleted"


def tell_gain(ctx: Context, before: int | None, promised: int) -> None:
    """What the volume gained, with the likely reason when that is less than promised."""
    after = free_space(ctx.manager.documents)
    if before is None or after is None:
        return
    gained = max(0, after - before)
    ctx.out.note(f"the volume gained {size_text(gained)}")
    if gained < promised * 0.9 and sys.platform == "darwin":
        ctx.out.note("Less than promised: local snapshots may still hold the blocks (tmutil listlocalsnapshots /).")


def version(text: str) -> str:
    """The name of the image of that version. For argparse."""
    if not IMAGE.fullmatch("kodeimage-" + text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version, such as v0.2.0")
    return "kodeimage-" + text


def disk_size(text: str) -> int:
    """A size of a disk, in bytes."""
    with contextlib.suppress(ValueError):
        if 1 << 30 <= parse_size(text) < 1 << 46:
            return parse_size(text) >> 20 << 20
    raise argparse.ArgumentTypeError(f"{text!r} is no size of a disk, such as 64G")


@command("base list", JSON, examples=["base list"])
def cmd_base_list(ctx: Context, opts: Arguments) -> int:
    """the images, which one new machines come from, and how many were cloned from each"""
    manager = ctx.manager
    rows = manager.utm.rows(partial=True)
    records = manager.state.records()
    origins = [image_of(records.get(row.uuid, {})).get("uuid") for row in manager.clones(rows)]
    machines = manager.survey(manager.images(rows), ip=False)
    configured = manager.configured(rows)
    facts = [{"name": machine.name, "uuid": machine.uuid, "status": machine.status, "size": machine.size,
              "configured": machine.name == configured, "clones": origins.count(machine.uuid)} for machine in machines]
    if opts.as_json:
        ctx.out.json(facts)
        return 0
    if configured and configured not in (machine.name for machine in machines):
        ctx.out.warn(f"base_image is {configured}, and there is no such machine")
    lines = [["*" if fact["configured"] else "", printable(str(fact["name"])).replace("\n", " "), str(fact["status"]),
              size_text(machine.size), str(fact["clones"])] for fact, machine in zip(facts, machines)]
    if lines:
        ctx.out.result(table(("", "IMAGE", "STATUS", "SIZE", "CLONES"), lines, ctx.out.width, ("SIZE", "CLONES")))
    else:
        ctx.out.note("no images yet; make one: kodemachine base create v0.1.0")
    return 0


@command("base use", option("image", metavar="IMAGE", help="its name in UTM, version or UUID"),
         examples=["base use kodeimage-v0.2.0"])
def cmd_base_use(ctx: Context, opts: Arguments) -> int:
    """choose the image that new machines come from"""
    with ctx.manager.fleet():
        row = ctx.manager.base(ctx.manager.utm.rows(), opts.image)
        ctx.config.set("base_image", row.name)
    ctx.out.note(f"new machines come from {row.name}")
    return 0


@command("base create", option("name", metavar="vX.Y.Z", type=version, help="the image's version"),
         option("--image", metavar="URL|FILE", help="a cloud image in qcow2 format instead of Ubuntu 24.04"),
         option("--disk", type=disk_size, default=64 << 30, metavar="SIZE", help="of the virtual disk (64G)"),
         option("--cpus", type=count, default=4, metavar="N", help="of a machine made from it (4)"),
         option("--memory", type=mebibytes, default=4096, metavar="SIZE", help="likewise (4G)"),
         option("--user", metavar="NAME", help="the user in it (ssh_user, or your login name)"),
         examples=["base create v0.1.0", "base create v0.1.0 --disk 128G --memory 8G"])
def cmd_base_create(ctx: Context, opts: Arguments) -> int:
    """make an image from nothing: download a cloud image, check it, set it up, seal it"""
    manager = ctx.manager
    user = user_name(opts.user or manager.settings.ssh_user)
    plan = Plan(opts.name, opts.image, opts.disk, opts.cpus, opts.memory, user,
                public_key(manager.settings.identity_file))
    creator = Creator(manager, cache_folder(), plan)
    vm = creator.create()
    with manager.fleet():
        rows, configured = manager.utm.rows(), ctx.config.settings().base_image     # it may have been set meanwhile
        if not configured and {row.uuid for row in manager.images(rows)} <= {vm.uuid}:
            ctx.config.set("base_image", vm.name)
    creator.done(vm)
    ctx.out.note(f"{vm.name} is ready; " + (
        "a machine from it: kodemachine project-alpha" if (configured or manager.configured(rows)) in (vm.name, vm.uuid)
        else f"to have new machines from it: kodemachine base use {vm.name}"))
    if user != user_name(manager.settings.ssh_user):
        ctx.out.note(f"Its user is {user}: kodemachine config set ssh_user {user}")
    return 0


def step_table(steps: Sequence[Step]) -> str:
    """What a seal does or did, a line for each step."""
    return table(("STEP", "", ""), [[step.name, step.status, step.detail] for step in steps], None)


@command("base seal", option("vm", help="its name or UUID in UTM, or its label"),
         option("--as", dest="image", type=version, metavar="vX.Y.Z", help="then copy it to the image of that version"),
         option("--check", action="store_true", help="only show what would change"), YES,
         examples=["base seal --check project-alpha", "base seal project-alpha --as v0.2.0"])
def cmd_base_seal(ctx: Context, opts: Arguments) -> int:
    """make a machine fit for an image: it forgets who it is, and shuts down"""
    manager, out = ctx.manager, ctx.out
    if not (opts.yes or opts.check):
        out.must_be_able_to_ask("base seal")
    images = Images(manager)
    with images.sealing(opts.vm) as vm:
        begun = images.begun(vm, opts.image) if opts.image and not opts.check else None
        if not begun:
            user = user_name(manager.settings.ssh_user)
            sealer = Sealer(manager, vm, user, public_key(manager.settings.identity_file))
            if not seal(ctx, sealer, opts):
                return 0
            begun = images.copy(vm, opts.image) if opts.image else None
    out.note(f"{begun.name} is ready; to have new machines from it: kodemachine base use {begun.name}" if begun else
             f"{vm.name} is sealed and off. It becomes an image by its name: rename it in UTM to kodeimage-vX.Y.Z")
    return 0


def seal(ctx: Context, sealer: Sealer, opts: Arguments) -> bool:
    """Looks, shows, asks and seals; false with --check, after which nothing has changed."""
    out, vm, was_off = ctx.out, sealer.vm, sealer.vm.power is Power.STOPPED
    if opts.check and vm.power is not Power.STARTED:
        raise WrongState(f"{vm.name} is {vm.power.value}; --check looks into a running machine", "Start it first.")
    sealer.wake(ctx.manager.settings.boot_timeout)
    steps = sealer.ask("check")
    if opts.check:
        out.result(step_table(steps))
    else:
        out.note(step_table(steps), needed=not opts.yes)
    sealer.must(steps)
    if opts.check:
        return False
    if not opts.yes and not out.confirm(f"Seal {vm.name}, and shut it down?", "base seal"):
        if was_off:
            sealer.power_off()
        raise KodeError("nothing was changed")
    rootless = any(step.name == "sudo" and step.status == "warn" for step in steps)
    asks = rootless and out.can_ask and not opts.yes
    sudo = asks and out.confirm(f"May {sealer.user} become root without a password?", "sudo")
    done = [step for step in sealer.apply(sudo=sudo) if step.status != "ok"]
    out.note(step_table(done))
    return True


@command("doctor", JSON, examples=["doctor"])
def cmd_doctor(ctx: Context, opts: Arguments) -> int:
    """check the host, UTM, the image and the machines; each finding with its remedy"""
    signs = {OK: "ok", WARNING: "!", ERROR: "x", SKIPPED: "-"}
    if ctx.out.fits("\u2713\u2717"):
        signs.update({OK: "\u2713", ERROR: "\u2717"})
    findings = []
    for finding in Doctor(ctx.manager).findings():
        findings.append(finding)
        if not opts.as_json:
            indent = len(signs[OK]) + 2 + CHECK_WIDTH
            ctx.out.result(f"{signs[finding.level]:{len(signs[OK])}} {finding.check:{CHECK_WIDTH}} {finding.message}"
                           + (f"\n{'':{indent}}{finding.remedy}" if finding.remedy else ""))
    if opts.as_json:
        ctx.out.json([finding._asdict() for finding in findings])
    errors, warnings = (sum(finding.level == level for finding in findings) for level in (ERROR, WARNING))
    ctx.out.note(f"{errors} to mend, {warnings} to look at" if errors or warnings else "all is well")
    return 1 if errors else 0


@command("config", option("action", nargs="?", choices=["get", "set", "path"], help="get, set or path"),
         option("key", nargs="?", help="one key"), option("value", nargs="?", help="its new value; '' unsets it"), JSON,
         examples=["config", "config set ssh_user me", "config get base_image"])
def cmd_config(ctx: Context, opts: Arguments) -> int:
    """show or change the configuration"""
    if opts.action == "path":
        if opts.key is not None:
            raise UsageError("config path takes nothing more", "See: kodemachine help config")
        ctx.out.result(ctx.config.path)
    elif opts.action == "set":
        if opts.key is None or opts.value is None:
            raise UsageError("config set needs a key and a value", "Keys: " + ", ".join(SETTINGS))
        with ctx.manager.state.lock("fleet", 30, what="the fleet"):
            ctx.config.set(opts.key, opts.value)
        if opts.key in PATHS and opts.value and not os.path.exists(os.path.expanduser(opts.value)):
            ctx.out.warn(f"{opts.key}: there is no {opts.value} yet")
    else:
        if opts.value is not None:
            raise UsageError("config get takes one key and no value",
                             f"To set it: kodemachine config set {opts.key} {shlex.quote(opts.value)}")
        values = ctx.manager.settings._asdict()
        if opts.key and opts.key not in values:
            raise UsageError(f"unknown key {opts.key!r}", "Keys: " + ", ".join(SETTINGS))
        if opts.as_json:
            ctx.out.json(values[opts.key] if opts.key else values)
            return 0
        for key in [opts.key] if opts.key else values:
            value = values[key]
            text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
            ctx.out.result(text if opts.key else f"{key} = {text}")
    return 0


# Each asks the program itself, so that there is nothing in them to go stale. Bash: also the 3.2 of macOS, which
# has neither compopt nor mapfile; so each word brings the blank that ends it.
COMPLETIONS = {"bash": r"""# for ~/.bashrc: eval "$(kodemachine completion bash)"
_kodemachine() {
  local line=${COMP_LINE:0:COMP_POINT} word found end
  local -a words
  read -r -a words <<<"$line"
  [[ $line != *[[:blank:]] ]] || words[${#words[@]}]=
  word=${words[${#words[@]} - 1]}
  COMPREPLY=()
  while IFS=$'\t' read -r found _; do
    if [[ $found == / ]]; then
      while IFS= read -r found; do
        end=' '
        [[ ! -d ${found/#\~/$HOME} ]] || end=/
        [[ $found == '~'* ]] || printf -v found %q "$found"
        COMPREPLY[${#COMPREPLY[@]}]=$found$end
      done < <(compgen -f -- "$word")
    elif [[ $found == "$word"* ]]; then
      [[ $found == *: ]] || found+=' '
      COMPREPLY[${#COMPREPLY[@]}]=$found
    fi
  done < <(kodemachine __complete -- "${words[@]:1}" 2>/dev/null)
  # Bash breaks words at these, too: it has that much already.
  end=${word%"${word##*[:=]}"}
  [[ -z $end || $COMP_WORDBREAKS != *:* || ${#COMPREPLY[@]} == 0 ]] || COMPREPLY=("${COMPREPLY[@]#"$end"}")
}
complete -o nospace -F _kodemachine kodemachine
""", "zsh": r"""#compdef kodemachine
# for ~/.zshrc: eval "$(kodemachine completion zsh)"
_kodemachine() {
  local line word files=1 found=1
  local -a whole open
  for line in "${(@f)$(kodemachine __complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}"; do
    word=${line%%$'\t'*}
    case $word in
      '') ;;
      /) files=0 ;;
      *:) open+=("$word") ;;
      *) whole+=("${word//:/\\:}:${line#*$'\t'}") ;;
    esac
  done
  (( ! $#whole )) || { _describe kodemachine whole && found=0 }
  (( ! $#open )) || { compadd -S '' -a open && found=0 }
  (( files )) || { _files && found=0 }
  return found
}
if [[ $funcstack[1] == _kodemachine ]]; then
  _kodemachine "$@"
else
  (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
  compdef _kodemachine kodemachine
fi
""", "fish": r"""# for ~/.config/fish/config.fish: kodemachine completion fish | source
function __kodemachine
    set -l words (commandline -opc) (commandline -ct)
    for line in (kodemachine __complete -- $words[2..-1] 2>/dev/null)
        if string match -q '/*' -- $line
            complete -C "'' "(commandline -ct)
        else
            printf '%s\n' $line
        end
    end
end
complete -c kodemachine -f -a '(__kodemachine)'
"""}


@command("completion", option("shell", choices=list(COMPLETIONS), help="your shell"),
         examples=["completion zsh"])
def cmd_completion(ctx: Context, opts: Arguments) -> int:
    """what lets the shell complete commands, labels and images"""
    ctx.out.result(COMPLETIONS[opts.shell].rstrip("\n"))
    return 0


@command("__complete", hidden=True)
def cmd_complete(ctx: Context, opts: Arguments) -> int:
    """for the shells: what may stand in place of the last of the words behind --, one a line, and / for files"""
    *before, word = opts.rest or [""]
    words, rest, _ = split_command_line(before)
    found = {"/": ""} if rest is not None else fitting(ctx, words, word)
    lines = [f"{text}\t{explanation}\n" for text, explanation in found.items() if text not in before]
    ctx.out.raw("".join(lines).encode())
    return 0


def fitting(ctx: Context, words: Sequence[str], word: str) -> dict[str, str]:
    """What may stand behind `words` where `word` was begun, each with its explanation."""
    parser, place = next_place(words)
    if word.startswith("-") and not (place and place.option_strings):
        return {name: str(action.help) for action in parser._actions for name in action.option_strings}
    if place is None:
        return {}
    if isinstance(place, argparse._SubParsersAction):
        labels = known_machines(ctx) if place.dest == "command" else {}     # a bare label stands where commands do
        return {**{str(entry.dest): str(entry.help) for entry in place._get_subactions()}, **labels}
    if place.choices is not None:
        return dict.fromkeys(place.choices, "")
    found: dict[str, str] = {}
    for kind in str(place.metavar or place.dest).lower().split("|"):
        found.update(WORDS[kind](ctx, words) if kind in WORDS else {})
    return found


def next_place(words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Action | None]:
    """The parser that reads what follows `words`, and the argument that it would be, if there is one."""
    parser: argparse.ArgumentParser = build_parser()
    operands = [action for action in parser._actions if not action.option_strings]
    option: argparse.Action | None = None       # whose value comes next
    for word in words:
        if option:
            option = None
        elif word.startswith("-"):
            named = parser._option_string_actions.get(word)
            option = named if named and named.nargs != 0 else None
        elif operands and isinstance(operands[0], argparse._SubParsersAction):
            parser = operands[0].choices.get(word, Parser())
            operands = [action for action in parser._actions if not action.option_strings]
        elif operands and operands[0].nargs not in ("*", "+"):
            operands.pop(0)
    return parser, option or next(iter(operands), None)


def glimpse(ctx: Context) -> tuple[Manager, list[Row]]:
    """One look at the fleet that costs at most GLANCE seconds and says nothing of its own. Raises KodeError."""
    settings, silent = ctx.config.settings(), Notes()
    utm = Utmctl(settings.utmctl, ctx.interrupts, silent)
    try:
        return Manager(settings, utm, State(state_folder(), silent)), utm.glimpse(GLANCE)
    finally:
        utm.close()


def known_machines(ctx: Context, ending: str = "", *, images: bool = False) -> dict[str, str]:
    """The labels, or the images, each with its state; none if UTM does not tell."""
    with contextlib.suppress(KodeError):
        manager, rows = glimpse(ctx)
        if images:
            return {printable(row.name): row.power.value for row in manager.images(rows)}
        return {f"{manager.label_of(row.name)}{ending}": row.power.value for row in manager.clones(rows)}
    return {}


def known_commands(words: Sequence[str]) -> dict[str, str]:
    """The next word of the commands that begin with `words`."""
    start = " ".join([*words, ""])
    return {name[len(start):].partition(" ")[0]: "" for name, entry in COMMANDS.items()
            if not entry.hidden and name.startswith(start)}


# What Tab offers for a value, by the word that the help has for it; behind `words`.
WORDS: dict[str, Callable[[Context, Sequence[str]], dict[str, str]]] = {
    "label": lambda ctx, words: known_machines(ctx),
    "vm": lambda ctx, words: known_machines(ctx),
    "image": lambda ctx, words: known_machines(ctx, images=True),
    "path": lambda ctx, words: {**known_machines(ctx, ":"), "/": ""},
    "file": lambda ctx, words: {"/": ""},
    "key": lambda ctx, words: {key: wanted for key, (wanted, _) in SETTINGS.items()},
    "command": lambda ctx, words: known_commands(words[1:]),
}


def welcome(ctx: Context, opts: Arguments) -> int:
    """What `kodemachine` alone says: the five lines that one needs, and the fleet at a glance."""
    lines = ["", "All commands: kodemachine help"]
    try:
        manager, rows = glimpse(ctx)
        states: dict[str, list[str]] = {}
        for row in manager.clones(rows):
            states.setdefault(row.power.value, []).append(str(manager.label_of(row.name)))
        lines[:0] = [f"{state + ':':8} {', '.join(sorted(labels))}" for state, labels in sorted(states.items())]
        if not rows:            # an installation that is new
            lines.insert(0, "UTM shows no machines; unless it has only just started: kodemachine base create v0.1.0")
        elif not states:
            manager.base(rows, None)
            lines.insert(0, "no machines yet; the first of these lines makes one")
    except NotFound as failure:
        lines.insert(0, f"no machines yet: {failure.message}. {failure.hint}")
    except UsageError as failure:           # a broken configuration, without which doctor cannot look
        lines.insert(0, f"the machines are not shown: {failure.message}. {failure.hint}")
    except KodeError as failure:
        lines.insert(0, f"the machines are not shown: {failure.message}; see: kodemachine doctor")
    ctx.out.result("\n".join([TITLE, "", *(f"  {line}" for line in EPILOG.splitlines()), "", *lines]))
    return 0


@command("help", option("topic", nargs="*", metavar="command", help="the command to explain"),
         examples=["help", "help stop"])
def cmd_help(ctx: Context, opts: Arguments) -> int:
    """this help, or that of one command"""
    topic = " ".join(opts.topic)
    if topic and topic not in all_names():
        near = near_command(topic)
        raise UsageError(f"there is no command {topic}" + (f"; did you mean {near!r}?" if near else ""),
                         "See: kodemachine help")
    build_parser().parse_args([*opts.topic, "--help"])
    return 0


# ---- the command line

USAGE = """\
kodemachine [-v | -q] [--config FILE] <label> [options] [-- command ...]
       kodemachine [-v | -q] [--config FILE] <command> ..."""
TAKES_REST = ("start", "ssh", "exec", "__complete")      # commands that have a use for what stands behind --
TITLE = "A fresh, isolated Linux machine in seconds, from a golden image in UTM."
EPILOG = """\
kodemachine project-alpha              a shell in a machine of its own, made if it is missing
kodemachine project-alpha -- make      run one command there
kodemachine list                       what there is
kodemachine stop project-alpha         shut it down
kodemachine purge                      take the disk space of stopped machines back"""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of ours: one line and a hint."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        words = self.prog.split()
        message = re.sub("^the following arguments are required: ", f"{' '.join(words[1:])} needs: ", message)
        raise UsageError(message, f"See: {' '.join(words[:1] + ['help'] + words[1:])}")


def overview() -> str:
    """The commands by what they are for."""
    texts = {name.partition(" ")[0]: (entry.run.__doc__ or "").splitlines()[0]
             for name, entry in COMMANDS.items() if not entry.hidden}
    texts.update((name, text) for name, text in GROUPS.items() if name in texts)
    placed = " ".join(TOPICS.values()).split()
    topics = {**TOPICS, "more": " ".join(word for word in texts if word not in placed)}
    return "\n\n".join(
        "\n".join([f"{topic}:", *(f"  {word:11} {texts[word]}" for word in words.split() if word in texts)])
        for topic, words in topics.items() if words)


def build_parser(words: Sequence[str] = ("--help",)) -> Parser:
    """The parser of everything before the first `--`, from the command table; of the commands only those that `words`
    name, since each costs time, unless they ask for help. No I/O."""
    form: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="kodemachine", usage=USAGE, description=TITLE, **form)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="show each call to UTM")
    volume.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--config", metavar="FILE", help="another configuration file")
    parser.add_argument("--version", action="version", version=f"kodemachine {__version__}")
    parser.set_defaults(run=welcome)
    top = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser, prog="kodemachine",
                                help=argparse.SUPPRESS)         # the epilog has them, by topic
    places = {"": top}          # where the parsers of commands with one word, and of those of a group, are added
    helping = not {"-h", "--help"}.isdisjoint(words)
    parser.epilog = f"{overview()}\n\n{EPILOG}" if helping else None
    for name, entry in COMMANDS.items():
        if not helping and {name.partition(" ")[0], *entry.aliases}.isdisjoint(words):
            continue
        text = (entry.run.__doc__ or "").splitlines()[0]
        listed: dict[str, Any] = {} if entry.hidden else {"help": text}
        group, _, word = name.rpartition(" ")
        if group not in places:
            family = top.add_parser(group, help=GROUPS[group], description=GROUPS[group], **form)
            family.set_defaults(run=COMMANDS["help"].run, topic=[group])
            places[group] = family.add_subparsers(metavar="command", parser_class=Parser)
        examples = "\n  kodemachine ".join(["examples:", *entry.examples]) if entry.examples else None
        sub = places[group].add_parser(word, aliases=list(entry.aliases), description=text,
                                       epilog=examples, **form, **listed)
        for names, how in entry.options:
            sub.add_argument(*names, **how)
        if helping and name in TAKES_REST:
            sub.usage = sub.format_usage().partition(" ")[2].rstrip() + (" -- command ..." if name == "exec"
                                                                        else " [-- command ...]")
        sub.set_defaults(run=entry.run)
    return parser


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str] | None, bool]:
    """The words before the first `--`, with `start` put before a bare label; those behind it; whether it was bare."""
    words, rest = list(argv), None
    if "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1:]
    known = {name.partition(" ")[0] for name in all_names()}
    i = 0
    while i < len(words) and words[i].startswith("-") and words[i] != "-":
        i += 2 if words[i] == "--config" else 1
    bare = i < len(words) and words[i] not in known and not {"-h", "--help", "--version"} & set(words[:i])
    return words[:i] + ["start"] * bare + words[i:], rest, bare


def xdg_folder(variable: str, default: str) -> str:
    """Our folder below the one that the environment names, if that is absolute, or else below the default."""
    base = os.environ.get(variable) or ""
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser(default), "kodemachine")


def state_folder() -> str:
    """Where the state is kept."""
    return xdg_folder("XDG_STATE_HOME", "~/.local/state")


def cache_folder() -> str:
    """Where downloaded images are kept; it may be deleted at any time."""
    return xdg_folder("XDG_CACHE_HOME", "~/.cache")


def config_path() -> str:
    """Where the configuration is, unless --config names another place."""
    return os.path.join(xdg_folder("XDG_CONFIG_HOME", "~/.config"), "config.json")


def run_command(argv: Sequence[str], out: Out, interrupts: Interrupts) -> int:
    """Parses, builds the layers, and runs the command."""
    words, rest, bare = split_command_line(argv)
    out.as_json = "--json" in words
    opts, unknown = build_parser(words).parse_known_args(words)
    late = {"-v": "verbose", "--verbose": "verbose", "-q": "quiet", "--quiet": "quiet"}
    for word in filter(late.__contains__, list(unknown)):       # typed last, by somebody who wants to know more
        setattr(opts, late[word], True)
        unknown.remove(word)
    for name in {"labels", "paths"} & set(vars(opts)):
        if not any(word.startswith("-") for word in unknown):       # behind an option argparse does not look for them
            getattr(opts, name).extend(unknown)
            unknown = []
    opts.rest, opts.bare = rest, bare
    out.quiet, out.verbose = opts.quiet or out.as_json, opts.verbose       # to a program, steps say nothing
    takes_rest = opts.command in TAKES_REST
    if unknown:
        if unknown[0] == "--config":
            raise UsageError("--config stands before the command", f"So: kodemachine --config FILE {opts.command} ...")
        for name, entry in COMMANDS.items():
            if entry.run is opts.run and any(unknown[0] in names for names, _ in entry.options):
                raise UsageError(f"{unknown[0]} stands behind the command", f"So: kodemachine {name} {unknown[0]}")
        hint = "A command to run in the machine stands behind --. " * takes_rest
        raise UsageError(f"{opts.command or 'kodemachine'} does not take {unknown[0]!r}",
                         f"{hint}See: kodemachine help {opts.command or ''}".rstrip())
    if rest is not None and not takes_rest:
        raise UsageError(f"{opts.command} takes no command after --" if opts.command else "there is no label before --",
                         "To run a command in a machine: kodemachine LABEL -- command")
    config = Config(os.path.abspath(opts.config) if opts.config else config_path())
    if opts.config and not os.path.exists(config.path):
        raise UsageError(f"{config.path}: there is no such file", "Write {} into it to begin with the defaults.")
    needs_none = opts.run in (welcome, cmd_help, cmd_completion, cmd_complete) or \
        (opts.run is cmd_config and opts.action in ("path", "set"))
    settings = Settings() if needs_none else config.settings()
    utm = Utmctl(settings.utmctl, interrupts, out)
    manager = Manager(settings, utm, State(state_folder(), out), ["--config", config.path] if opts.config else [])
    try:
        return int(opts.run(Context(manager, out, interrupts, config), opts))
    finally:
        utm.close()


def complete_handles() -> None:
    """Opens those of the three standard handles that are closed: else the first file of ours would be one of them."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)     # the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs kodemachine and returns its exit status; the only place that turns failures into one."""
    complete_handles()
    interrupts = Interrupts()
    interrupts.install()
    out = Out()
    try:
        try:
            code = run_command(sys.argv[1:] if argv is None else argv, out, interrupts)
        except SystemExit as help_or_version:
            code = int(help_or_version.code or 0)
        out.raw(b"")                # so that a reader who left, or a full disk, is noticed here and not at exit
        return code
    except KodeError as failure:
        out.error(failure)
        return failure.status
    except Interrupted as interruption:
        out.end_step()
        return 128 + interruption.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as failure:          # such as a folder that is gone, or a volume that knows no locks
        out.error(KodeError(f"{failure.filename or 'the system'}: {failure.strerror or failure}",
                            "Mend that, then run the same command again: it takes up where this one ended."))
        return KodeError.status


if __name__ == "__main__":
    sys.exit(main())
