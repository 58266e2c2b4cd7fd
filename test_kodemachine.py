#!/usr/bin/env python3
"""Tests of kodemachine, against a fake UTM on PATH and a real sshd. Standard library only.

    python3 test_kodemachine.py                     everything, several tests at a time
    python3 test_kodemachine.py FakeTest            one class
    python3 test_kodemachine.py FakeTest.test_x     one test; -k PATTERN chooses by a part of the name
    python3 -m unittest test_kodemachine            everything, one after the other

KODEMACHINE_NO_SKIP=1 turns a skipped test into a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import inspect
import json
import os
import plistlib
import pwd
import py_compile
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
KODEMACHINE = os.path.join(HERE, "kodemachine.py")
Machine = dict[str, Any]

# ---- the fake UTM
#
# FAKE_PARTS runs in two places: here and, copied by Utm.install(), in the fake utmctl and osascript. Those
# start thousands of times, so FAKE_IMPORTS is all they load at first, and the rest where it is needed.

FAKE_IMPORTS = "from __future__ import annotations; import fcntl, json, os, re, sys, time"


class Refused(Exception):
    """A failed Apple Event: its OSStatus number and UTM's own words, if it sent any."""

    def __init__(self, number: int, words: str = "") -> None:
        super().__init__(number, words)
        self.number, self.words = number, words


class Exit(Exception):
    """The program ends with this status and these last words: on stdout if it is 0, else on stderr."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words


class FakeUTM:
    """UTM.app: its machines and what becomes of them, in a JSON file that any number of processes share.

    Nothing runs in the background. What takes time is noted with the moment it is due (`later`), and whoever
    next opens the state (`with utm:`) first does what has come due. So things go on by themselves after the
    caller was told of an error, or was killed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.now = (
            0.0  # seconds since the epoch: the present, or the moment at which the thing being done was due
        )
        self.delay = 0.0  # seconds by which a fault puts off whatever is asked for now
        self.state: dict[str, Any] = {}

    def __enter__(self) -> FakeUTM:
        self._lock = open(self.path("lock"), "w")  # noqa: SIM115 (__exit__ closes it, which unlocks)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with open(self.path("state.json"), encoding="utf-8") as file:
            self._text = file.read()
        self.state = json.loads(self._text)
        self.now, self.delay, clock = 0.0, 0.0, time.time()
        while self.state["pending"] and self.state["pending"][0][0] <= clock:
            self.now, action, *words = self.state["pending"].pop(0)
            getattr(self, action)(*words)
        self.now = clock
        return self

    def __exit__(self, *_: object) -> None:
        text = json.dumps(self.state)
        if text != self._text:
            with open(self.path("state.json.new"), "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(self.path("state.json.new"), self.path("state.json"))
        self._lock.close()

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def journal(self, **entry: Any) -> None:
        """Adds a line; a single write to a file opened for appending is not mixed with another's."""
        log = os.open(self.path("calls.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(log, (json.dumps({"pid": os.getpid(), **entry}) + "\n").encode())
        os.close(log)

    # -- looking

    @property
    def app(self) -> dict[str, Any]:
        return self.state["app"]  # type: ignore[no-any-return]

    @property
    def vms(self) -> list[Machine]:
        return self.state["vms"]  # type: ignore[no-any-return]

    def awake(self) -> bool:
        """Whether UTM knows its machines. Any command launches it; they appear with its window."""
        if not self.app["running"]:
            self.app.update(running=True, ready_at=self.now + self.app["launch_seconds"])
        return bool(self.app["ready_at"] <= self.now)

    def find(self, identifier: str) -> Machine | None:
        """By UUID, else by name, and exactly; of two equal names the first in the list."""
        matches = [vm for key in ("uuid", "name") for vm in self.vms if vm[key] == identifier]
        return matches[0] if matches else None

    def fault(self, tool: str, verb: str, argv: Sequence[str]) -> dict[str, Any]:
        """The first rule that applies to this call, or an empty one. Rules count what they match."""
        found = [vm for vm in map(self.find, argv) if vm]
        for rule in self.state["faults"]:
            vm = rule.get("vm")
            if (
                rule.get("tool", tool) != tool
                or rule.get("verb", "*") not in ("*", verb, tool)
                or rule.get("contains", "") not in " ".join(argv)
                or (vm and not any(vm in (m["uuid"], m["name"]) for m in found))
            ):
                continue
            rule["seen"] = rule.get("seen", 0) + 1
            count = rule["seen"] - rule.get("skip", 0)
            if count > 0 and count <= rule.get("times", count) and rule.get("nth", count) == count:
                return dict(rule)
        return {}

    def free_address(self) -> list[str]:
        taken = {ip for vm in self.vms for ip in vm["ips"] or []}
        return [ip for ip in self.app["addresses"] if ip not in taken][:1]

    # -- the passage of time

    def later(self, seconds: float, action: str, *words: Any) -> None:
        """Calls the method `action` in so many seconds (now, if that is none)."""
        due = self.now + self.delay + seconds
        if due <= self.now:
            getattr(self, action)(*words)
        else:
            self.state["pending"].append([due, action, *words])
            self.state["pending"].sort(key=lambda entry: entry[0])

    def become(self, uuid: str, old: str, new: str) -> None:
        """From one state ("*": whichever) to the next, unless it has left that one or is stuck in it."""
        vm = self.find(uuid)
        if vm is None or old not in ("*", vm["status"]) or old in vm["stuck"]:
            return
        vm["status"] = new
        if new == "starting":
            vm["saved"] = False  # restored, or (disposable) lost
        elif (old, new) == ("starting", "started"):
            vm["up_at"] = self.now
            vm["ips"] = self.free_address() if vm["ips"] is None else vm["ips"]
        elif new == "stopped":
            vm.update(disposable=False, up_at=None)
            # What else was to become of this run of it, becomes of no other.
            self.state["pending"] = [entry for entry in self.state["pending"] if entry[2] != uuid]

    # -- what a machine can be told; each returns the seconds until UTM replies

    def need(self, vm: Machine, status: str, words: str) -> None:
        if vm["status"] != status:
            raise Refused(-2700, words)

    def need_stopped(self, vm: Machine) -> None:
        self.need(
            vm, "stopped", "The virtual machine must be stopped before this operation can be performed."
        )

    def need_started(self, vm: Machine) -> None:
        self.need(vm, "started", "The virtual machine is not running.")

    def start(self, vm: Machine, disposable: bool, recovery: bool) -> float:
        if vm["status"] == "paused":
            self.later(0, "become", vm["uuid"], "paused", "resuming")
            self.later(vm["resume_seconds"], "become", vm["uuid"], "resuming", "started")
            return float(vm["resume_seconds"])
        self.need(vm, "stopped", "Operation not available.")
        if (disposable and vm["backend"] == "apple") or (recovery and vm["backend"] == "qemu"):
            raise Refused(-2700, "Operation not supported by the backend.")
        vm["disposable"] = disposable
        self.later(0, "become", vm["uuid"], "stopped", "starting")
        self.later(vm["start_seconds"], "become", vm["uuid"], "starting", "started")
        return float(vm["start_seconds"])

    def suspend(self, vm: Machine, save: bool) -> float:
        self.need_started(vm)
        self.later(0, "become", vm["uuid"], "started", "pausing")
        self.later(vm["suspend_seconds"], "become", vm["uuid"], "pausing", "paused")
        if save and (vm["save_error"] or vm["disposable"]):
            raise Refused(-2700, vm["save_error"] or "Operation not available.")
        vm["saved"] = save and vm["backend"] == "qemu"
        return float(vm["suspend_seconds"])

    def stop(self, vm: Machine, how: str) -> float:
        if vm["backend"] == "apple" and vm["status"] == "stopping":
            return 0.0
        if how == "--kill":
            self.later(0, "become", vm["uuid"], "*", "stopped")
            return 0.0
        self.need_started(vm)
        if how == "--request":
            if not vm["ignores_power_key"]:
                self.power_off(vm)
            return 0.0
        self.later(0, "become", vm["uuid"], "started", "stopping")
        self.later(vm["stop_seconds"], "become", vm["uuid"], "stopping", "stopped")
        return 0.0

    def power_off(self, vm: Machine) -> None:
        """The guest shuts itself down; request_seconds None: it never gets there."""
        if vm["request_seconds"] is not None:
            self.later(vm["request_seconds"], "become", vm["uuid"], "started", "stopped")

    def delete(self, vm: Machine) -> float:
        self.need_stopped(vm)
        self.later(self.app["delete_seconds"], "remove", vm["uuid"])
        return float(self.app["delete_seconds"])

    def remove(self, uuid: str) -> None:
        vm = self.find(uuid)
        if vm:
            self.vms.remove(vm)
            self.erase_bundle(vm)

    def clone(self, base: Machine, name: str, partial: str) -> tuple[str, float]:
        """The new UUID and the seconds it takes: the copy is listed at half-time, and renamed at the end."""
        self.need_stopped(base)
        uuid, seconds = self.new_uuid(), self.app["clone_seconds"]
        middle = (self.delay + seconds) / 2 - self.delay  # later() adds the delay
        self.later(middle, "insert", uuid, base["uuid"], partial)
        if name and not partial:
            self.later(seconds, "rename", uuid, name)
        return uuid, float(seconds)

    def insert(self, uuid: str, origin: str, partial: str = "") -> None:
        """A copy of `origin` under UTM's temporary name, right after it in the list."""
        base = self.find(origin)
        if base is None:
            return
        folders = {vm["bundle"].casefold() for vm in self.vms if not vm["shortcut"]} | set(
            self.state["orphans"]
        )
        number, name = 1, base["name"]
        while self.bundle_name(name).casefold() in folders:
            number += 1
            name = f"{base['name']} {number}"
        copy = {**base, "uuid": uuid, "name": name, "bundle": self.bundle_name(name), "copied_from": origin}
        copy.update(
            saved=False, shortcut=False, ips=None, stuck=[], serials=[dict(s) for s in base["serials"]]
        )
        if self.app["regenerate_mac"] and base["backend"] == "qemu":
            copy["macs"] = [self.new_mac() for _ in base["macs"]]
        if partial == "copy-only":
            copy["uuid"] = origin
            self.state["orphans"].append(copy["bundle"].casefold())
        else:
            self.vms.insert(self.vms.index(base) + 1, copy)
        self.copy_bundle(base, copy)

    def rename(self, uuid: str, name: str) -> None:
        """Writes the name, then moves the folder: where that fails, two machines bear one name."""
        vm = self.find(uuid)
        if vm is None:
            return
        vm["name"] = name
        others = {
            other["bundle"].casefold() for other in self.vms if other is not vm and not other["shortcut"]
        }
        if self.bundle_name(name).casefold() not in others:
            self.move_bundle(vm, self.bundle_name(name))
        self.write_bundle(vm)

    def configure(self, vm: Machine, name: str, memory: str, cpus: str, macs: Sequence[str]) -> None:
        """What is empty stays as it is; memory in MiB. More addresses than interfaces: those are left out."""
        self.need_stopped(vm)
        vm.update(memory=int(memory or vm["memory"]), cpus=int(cpus or vm["cpus"]))
        vm["macs"] = [new or old for old, new in zip(vm["macs"], [*macs, *[""] * len(vm["macs"])])]
        self.write_bundle(vm)
        if name:
            self.rename(vm["uuid"], name)

    def agent(self, vm: Machine) -> bool:
        """Whether the agent knows more than link-local addresses. Refused as long as it does not answer."""
        self.need_started(vm)
        after = vm["agent_after"]
        age = self.now - vm["up_at"]
        if after is None or age < after - vm["rpc_seconds"]:
            raise Refused(-2700, "The QEMU guest agent is not running or not installed on the guest.")
        if age < after:
            raise Refused(-2700, "Timed out waiting for RPC.")
        return bool(age >= after + vm["link_local_seconds"])

    # -- names, and the package on disk (only with the option `documents`)

    @staticmethod
    def new_uuid() -> str:
        return re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", os.urandom(16).hex().upper())

    @staticmethod
    def new_mac() -> str:
        first, *rest = os.urandom(6)
        return ":".join(f"{byte:02X}" for byte in (first & 0xFC | 0x02, *rest))

    @staticmethod
    def bundle_name(name: str) -> str:
        return re.sub(r'[,/:\\?%*|"<>]', "-", name) + ".utm"

    def bundle(self, vm: Machine, *names: str) -> str:
        return os.path.join(self.app["documents"], vm["bundle"], *names)

    def write_bundle(self, vm: Machine) -> None:
        if not self.app["documents"]:
            return
        import plistlib

        os.makedirs(self.bundle(vm, "Data"), exist_ok=True)
        if not os.path.exists(self.bundle(vm, "Data", "disk.qcow2")):
            with open(self.bundle(vm, "Data", "disk.qcow2"), "wb") as disk:
                disk.write(b"QFI\xfb" + os.urandom(vm["disk"] - 4))
                disk.truncate(16 * vm["disk"])  # sparse: a size is not what it occupies
        qemu = vm["backend"] == "qemu"
        config = {
            "ConfigurationVersion": 4,
            "Backend": "QEMU" if qemu else "Apple",
            "Information": {"Name": vm["name"], "UUID": vm["uuid"], "IconCustom": False},
            "System": {"Architecture": "aarch64", "CPUCount": vm["cpus"], "MemorySize": vm["memory"]},
            "Drive": [
                {"Identifier": "DRIVE", "ImageName": "disk.qcow2", "ImageType": "Disk", "ReadOnly": False}
            ],
            "Network": [{"Mode": "Shared", "MacAddress": mac} for mac in vm["macs"]],
            "Serial": [{"Mode": "Ptty", "Target": "Auto"} for _ in vm["serials"]],
            "Display": vm["displays"],
            "QEMU" if qemu else "Virtualization": {},
        }
        with open(self.bundle(vm, "config.plist"), "wb") as file:
            plistlib.dump(config, file)

    def copy_bundle(self, base: Machine, copy: Machine) -> None:
        if self.app["documents"]:
            import shutil

            shutil.copytree(self.bundle(base), self.bundle(copy))
            self.write_bundle(copy)
        guest = self.path("guests", base["uuid"])
        if os.path.isdir(guest) and copy["uuid"] != base["uuid"]:
            import shutil

            shutil.copytree(guest, self.path("guests", copy["uuid"]), symlinks=True)

    def move_bundle(self, vm: Machine, bundle: str) -> None:
        old = dict(vm)
        vm["bundle"] = bundle
        if self.app["documents"]:
            os.rename(self.bundle(old), self.bundle(vm))

    def erase_bundle(self, vm: Machine) -> None:
        if self.app["documents"]:
            import shutil

            shutil.rmtree(self.bundle(vm))


class Guest:
    """The inside of a machine: a folder in place of `/`, and real processes kept away from the host's files.

    Absolute paths in their arguments are led into that folder. What slips through may read but cannot write:
    when the tests run as root, these processes become nobody. On PATH are TOOLS and the STUBS, which change
    nothing but the guest.
    """

    FOLDERS = "etc/ssh proc/sys/kernel var/log root/.ssh home run tmp usr/local bin"
    TOOLS = (
        "awk base64 basename cat chmod cmp cp cut date dd dirname echo env expr false find grep head kill ln"
        " ls mkdir mktemp mv od printf pwd readlink rm rmdir sed seq sh sleep sort ssh-keygen stat tail tee"
        " test touch tr true truncate uname uniq wc xargs"
    )
    STUBS = {
        "hostname": 'if [ $# = 0 ]; then cat "$ROOT/proc/sys/kernel/hostname"\n'
        'else printf "%s\\n" "$1" >"$ROOT/proc/sys/kernel/hostname"; fi',
        "hostnamectl": 'case $1 in set-hostname|hostname) printf "%s\\n" "$2" |\n'
        'tee "$ROOT/proc/sys/kernel/hostname" >"$ROOT/etc/hostname";; esac',
        "systemctl": "case $1 in is-active) echo active;; is-enabled) echo enabled;;\n"
        'poweroff) : >"$ROOT/power-off";; esac',
        "poweroff": ': >"$ROOT/power-off"',
        "shutdown": ': >"$ROOT/power-off"',
        "id": '[ "$1" = -u ] && echo 0 || echo "uid=0(root) gid=0(root) groups=0(root)"',
        "chown": "",
        "fstrim": "",
        "sync": "",
    }
    INSIDE = r"(?<![\w.}])/(etc|proc|var|root|home|run|tmp|boot|lib|mnt|opt|srv|sys|usr/(?!s?bin\b)\w+)\b"
    PROGRAM = r"(?<![\w.}])/(?:usr/)?s?bin/([\w-]+)"

    def __init__(self, utm: FakeUTM, uuid: str) -> None:
        """Expects the state to be open: two first visits at once would build it twice."""
        self.root = utm.path("guests", uuid)
        if not os.path.isdir(self.root):
            self._furnish(utm, uuid)

    def _furnish(self, utm: FakeUTM, uuid: str) -> None:
        import shutil

        for folder in self.FOLDERS.split():
            os.makedirs(os.path.join(self.root, folder))
        files = {
            "etc/hostname": "kodeimage\n",
            "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 kodeimage\n",
            "etc/machine-id": uuid.replace("-", "").lower() + "\n",
            "etc/ssh/ssh_host_ed25519_key.pub": utm.app["host_key"] + "\n",
            "proc/sys/kernel/hostname": "kodeimage\n",
            **{
                f"bin/{name}": f'#!/bin/sh\nROOT=$(cd "${{0%/*}}/.." && pwd)\n{body}\n'
                for name, body in self.STUBS.items()
            },
        }
        for name, text in files.items():
            with open(os.path.join(self.root, name), "w", encoding="utf-8") as file:
                file.write(text)
            if name.startswith("bin/"):
                os.chmod(file.name, 0o755)
        for name in self.TOOLS.split():
            program = shutil.which(name, path="/usr/bin:/bin")
            if program:
                os.symlink(program, os.path.join(self.root, "bin", name))
        self.give_away(self.root)

    def stranger(self) -> dict[str, Any]:
        """How Popen starts a process as nobody, where it is possible: only root can, and only root has to."""
        if os.geteuid() != 0:
            return {}
        import pwd

        nobody = pwd.getpwnam("nobody")
        try:
            os.chown(self.root, nobody.pw_uid, nobody.pw_gid)
        except OSError:  # a namespace that has no other users: its root is an ordinary user outside
            return {}
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def give_away(self, top: str) -> None:
        owner = self.stranger()
        if owner:
            for folder, _, files in os.walk(top):
                for name in [folder, *(os.path.join(folder, file) for file in files)]:
                    os.chown(name, owner["user"], owner["group"], follow_symlinks=False)

    def inside(self, word: str) -> str:
        """A word of a command line with its absolute paths led into the guest."""

        def program(match: re.Match[str]) -> str:
            return f"{self.root}/bin/{match[1]}" if match[1] in self.STUBS else match.group()

        return re.sub(
            self.PROGRAM, program, re.sub(self.INSIDE, lambda match: self.root + match.group(), word)
        )

    def file(self, path: str) -> str:
        """The guest's file of that absolute path; a link out of the guest leads nowhere."""
        found = os.path.realpath(self.root + os.path.normpath("/" + path))
        if not found.startswith(os.path.realpath(self.root) + os.sep):
            raise Refused(-2700, f"failed to open file '{path}' (mode: 'r'): Permission denied")
        return found

    def run(self, argv: Sequence[str], env: Sequence[str], stdin: Any, stdout: Any, stderr: Any) -> Any:
        import subprocess

        bin_folder = os.path.join(self.root, "bin")
        given = dict(entry.partition("=")[::2] for entry in env)
        words = [self.inside(word) for word in argv]
        if "/" not in words[0]:
            words[0] = os.path.join(bin_folder, words[0])
        # The guest's bin stays PATH, whatever the caller says: the host's programs are not the guest's.
        surroundings = {**(given or {"HOME": self.root + "/root", "LANG": "C"}), "PATH": bin_folder}
        try:
            return subprocess.Popen(
                words, env=surroundings, cwd=self.root, stdin=stdin, stdout=stdout, stderr=stderr,
                start_new_session=True, **self.stranger(),
            )  # fmt: skip
        except OSError as error:
            raise Refused(-2700, f"Guest agent command failed, error was '{error.strerror}'") from None


class Tool:
    """A program that sends Apple Events to UTM: what utmctl and osascript have in common, faults above all.

    A verb is a generator. It runs with the state open; where it yields, that many seconds pass with the state
    closed. Before its first yield it asks (and may be refused), after that comes the answer.
    """

    name = ""

    def __init__(self, utm: FakeUTM, argv: Sequence[str]) -> None:
        self.utm, self.argv = utm, argv
        self.verb = " ".join(argv[: 2 if argv[:1] in (["file"], ["usb"]) else 1])
        self.out: list[bytes] = []  # what is printed at the end, if nothing comes between: on stdout
        self.err: list[bytes] = []  # and on stderr
        self.status = 0
        self.stdin_used = False
        self.rule: dict[str, Any] = {}
        self.language = "en"

    def say(self, text: str) -> None:
        self.out.append(text.encode("utf-8", "surrogateescape"))

    def complain(self, text: str) -> None:
        self.write(2, text.encode("utf-8", "surrogateescape"))

    @staticmethod
    def write(fd: int, octets: bytes) -> None:
        while octets:
            octets = octets[os.write(fd, octets) :]

    def report(self, error: Refused) -> None:
        raise NotImplementedError

    def serve(self, verb: str, work: Iterator[float]) -> int:
        """Does a verb, or what the first fault that applies makes of it, and returns the exit status."""
        with self.utm as utm:
            self.rule = rule = utm.fault(self.name, verb, self.argv)
            self.language, latency = rule.get("language", utm.app["language"]), utm.app["latency"]
        time.sleep(latency)
        if "stdout" in rule or "stderr" in rule:
            self.out = []
            self.say(rule.get("stdout", ""))
            self.complain(rule.get("stderr", ""))
            return self.end(rule.get("status", 0))
        if rule.get("no_app"):
            raise Exit(1, "Error: Application not found.")
        if rule.get("lookup") and self.name == "utmctl" and verb not in ("list", "version"):
            raise Exit(1, Utmctl.NOT_FOUND)
        told = Refused(rule["error"], rule.get("string", "")) if "error" in rule else None
        error = None if "unknown" in rule else told
        limit = rule.get("report_after", float("inf"))
        fatal = error or any(rule.get(key) for key in ("silent", "empty", "hang", "crash"))
        if fatal and rule.get("when", "before") == "before":
            time.sleep(min(rule.get("delay", 0), limit))
        else:
            try:
                self.drive(work, rule.get("delay", 0), limit)
            except Refused as refusal:
                error = error or refusal
        while rule.get("hang"):
            time.sleep(60)
        if error:
            self.out = self.out[:1] if verb == "list" else []  # the header comes before the first event
            self.err, self.status = [], 0
            self.report(error)
        if rule.get("crash"):
            self.crash(rule["crash"])
        return self.end(self.status)

    def end(self, status: int) -> int:
        self.write(1, b"".join(self.out))
        self.write(2, b"".join(self.err))
        return status

    def drive(self, work: Iterator[float], delay: float, limit: float) -> None:
        """Runs a verb to its end, or till the caller is told something else, `limit` seconds from now."""
        deadline = time.monotonic() + limit
        while True:
            with self.utm as utm:
                utm.delay = delay
                pause = next(work, None)
            if pause is None or time.monotonic() >= deadline:
                return
            time.sleep(max(0.0, min(pause + delay, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return
            delay = 0.0

    @staticmethod
    def crash(name: str) -> None:
        """Dies by SIGTRAP or SIGABRT, as a program does that unwraps nil; without leaving a core file."""
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = getattr(signal, "SIG" + name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pause()


class Utmctl(Tool):
    """utmctl's grammar, texts, streams and exit statuses. A usage line is the grammar of its command."""

    name = "utmctl"
    USAGE = {
        "version": "[--debug] [--hide]",
        "list": "[--debug] [--hide]",
        "status": "[--debug] [--hide] <identifier>",
        "start": "[--debug] [--hide] <identifier> [--attach] [--disposable] [--recovery]",
        "suspend": "[--debug] [--hide] <identifier> [--save-state]",
        "stop": "[--debug] [--hide] <identifier> [--force] [--kill] [--request]",
        "attach": "[--debug] [--hide] <identifier> [--index <index>]",
        "file pull": "[--debug] [--hide] <identifier> <path>",
        "file push": "[--debug] [--hide] <identifier> <path>",
        "exec": "[--debug] [--hide] <identifier> [--input] [--env <env> ...] --cmd <cmd> ...",
        "ip-address": "[--debug] [--hide] <identifier>",
        "clone": "[--debug] [--hide] <identifier> [--name <name>]",
        "delete": "[--debug] [--hide] <identifier>",
        "usb list": "[--debug] [--hide]",
        "usb connect": "[--debug] [--hide] <identifier> <device>",
        "usb disconnect": "[--debug] [--hide] <device>",
    }
    HELP = {
        "<identifier>": "Either the UUID or the complete name of the virtual machine.",
        "<path>": "Path of the file on the guest.",
        "<device>": "Device identifier either as a VID:PID pair (e.g. DEAD:BEEF) or a location (e.g. 4).",
        "--index <index>": "Index of the serial device to attach to.",
        "--env <env>": "Set a single environment variable in the format NAME=VALUE",
        "--cmd <cmd>": "Command line to execute on the guest.",
    }
    SHORT = {"-d": "--debug", "-a": "--attach", "-s": "--save-state", "-h": "--help"}
    ERRORS = {
        "en": "The operation couldn’t be completed. (OSStatus error {}.)",
        "de": "Der Vorgang konnte nicht abgeschlossen werden. (OSStatus-Fehler {}.)",
        "ja": "操作を完了できませんでした。（OSStatusエラー{}）",
    }
    HEADER = "UUID" + " " * 33 + "Status" + " " * 3 + "Name\n"
    NOT_FOUND = "Error: Virtual machine not found."

    def run(self) -> int:
        verb, options = self.parse()
        if verb == "list":
            self.say(self.HEADER)
        return self.serve(verb, self.work(verb, options))

    # -- the command line

    def parse(self) -> tuple[str, dict[str, Any]]:
        words = list(self.argv)
        for word in words[: words.index("--")] if "--" in words else words:
            if word.startswith(("---", "-=")):
                raise self.misuse("", f"Invalid option: {word}")
        with self.utm as utm:
            verbs = [verb for verb in self.USAGE if verb != "version" or utm.app["version"]]
        verb = words.pop(0) if words else "help"
        if verb in ("file", "usb") and words and f"{verb} {words[0]}" in verbs:
            verb = f"{verb} {words.pop(0)}"
        if verb in ("help", "-h", "--help") or (verb in ("file", "usb") and not words):
            raise Exit(0, "USAGE: utmctl <subcommand>\n\nSUBCOMMANDS:\n  " + "\n  ".join(verbs))
        if verb not in verbs:
            group = verb if verb in ("file", "usb") else ""
            words = words if group else [verb, *words]
            if any(word.startswith("-") for word in words):
                raise self.misuse(group, f"Unknown option '{next(w for w in words if w.startswith('-'))}'")
            raise self.unexpected(group, words)
        return verb, self.options(verb, words)

    def options(self, verb: str, words: list[str]) -> dict[str, Any]:
        usage = self.USAGE[verb]
        takes = dict(re.findall(r"(?<=\[)(--[\w-]+)( <\w+>)?", usage))
        options: dict[str, Any] = {"--env": []}
        plain: list[str] = []
        unknown = ""
        while words:
            word = words.pop(0)
            long, equals, value = word.partition("=")
            long = self.SHORT.get(long, long)
            if word == "--":
                plain += words
                break
            if word == "-" or not word.startswith("-"):
                plain.append(word)
            elif long == "--cmd" and verb == "exec":
                options["--cmd"] = [value] * bool(value) + words
                break
            elif long == "--help":
                raise Exit(0, f"USAGE: utmctl {verb} {usage}")
            elif long not in takes:
                unknown = unknown or word.partition("=")[0]
            elif takes[long]:
                value = self.value(verb, long + takes[long], value, words)
                options[long] = [*options[long], value] if long == "--env" else value
            elif equals:
                raise self.misuse(
                    verb, f"The option '{long}' does not take any value, but '{value}' was specified."
                )
            else:
                options[long] = True
        for missing in re.findall(r"(?<!-)<\w+>", re.sub(r"\[.*?\]|--cmd.*", "", usage)):
            if not plain:
                raise self.misuse(verb, f"Missing expected argument '{missing}'", missing)
            options[missing] = plain.pop(0)
        if verb == "exec" and not options.get("--cmd"):
            raise self.misuse(verb, "Missing expected argument '--cmd <cmd> ...'", "--cmd <cmd>")
        if sum(how in options for how in ("--force", "--kill", "--request")) > 1:
            raise Exit(1, "Error: You can only specify one of: --force, --kill, or --request")
        if unknown:
            known = [*takes, "--cmd"] if verb == "exec" else list(takes)
            raise self.misuse(verb, f"Unknown option '{unknown}'" + self.suggestion(unknown, known))
        if plain:
            raise self.unexpected(verb, plain)
        return options

    def value(self, verb: str, option: str, value: str, words: list[str]) -> str:
        """What stands behind `=` (if anything), or the next word unless that looks like an option."""
        if not value and (not words or (words[0].startswith("-") and words[0] != "-")):
            raise self.misuse(verb, f"Missing value for '{option}'", option)
        value = value or words.pop(0)
        if "--index" in option and not re.fullmatch("[+-]?[0-9]+", value):
            raise self.misuse(verb, f"The value '{value}' is invalid for '{option}'", option)
        return value

    def misuse(self, verb: str, message: str, about: str = "") -> Exit:
        usage = self.USAGE.get(verb, "<subcommand>")
        command = f"utmctl {verb}".rstrip()
        help_line = f"Help:  {about}  {self.HELP[about]}\n" if about in self.HELP else ""
        see = f"  See '{command} --help' for more information."
        return Exit(64, f"Error: {message}\n{help_line}Usage: {command} {usage}\n{see}")

    def unexpected(self, verb: str, words: Sequence[str]) -> Exit:
        if len(words) == 1:
            return self.misuse(verb, f"Unexpected argument '{words[0]}'")
        return self.misuse(verb, f"{len(words)} unexpected arguments: '" + "', '".join(words) + "'")

    @staticmethod
    def suggestion(given: str, known: Sequence[str]) -> str:
        """The nearest option within three edits; none for a single letter."""

        def distance(word: str) -> int:
            row = list(range(len(given) + 1))
            for i, a in enumerate(word, 1):
                last, row = row, [i]
                for j, b in enumerate(given, 1):
                    row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
            return row[-1]

        nearest = min(known, key=distance)
        far = len(given) < 3 or distance(nearest) > 3
        return "" if far else f". Did you mean '{nearest}'?"

    # -- the verbs

    def report(self, error: Refused) -> None:
        self.complain("Error from event: " + self.ERRORS[self.language].format(error.number) + "\n")
        if error.words:
            self.complain(error.words + "\n")
        if error.number == -1743:
            self.complain("NOTE: utmctl does not work from SSH sessions or before logging in.\n")

    def work(self, verb: str, options: dict[str, Any]) -> Iterator[float]:
        """The look-up before and the verb itself, with the state open."""
        awake = self.utm.awake()
        if "--hide" in options:
            self.utm.app["keep_running"] = True
            if "hide_error" in self.rule:
                self.report(Refused(self.rule["hide_error"]))
        words: list[Any] = []
        if "<identifier>" in options:
            # Error reporting is off during the look-up: whatever goes wrong there ends in the same sentence.
            vm = self.utm.find(options["<identifier>"]) if awake else None
            if vm is None:
                raise Exit(1, self.NOT_FOUND)
            words.append(vm)
        method = getattr(self, "verb_" + re.sub("[- ]", "_", verb))
        yield from method(*words, options)

    def again(self, vm: Machine) -> Machine:
        """The machine as it is now that time has passed."""
        found = self.utm.find(vm["uuid"])
        if found is None:
            raise Refused(-1728)
        return found

    def verb_version(self, _: dict[str, Any]) -> Iterator[float]:
        yield 0
        self.say(self.utm.app["version"] + "\n")

    def verb_list(self, _: dict[str, Any]) -> Iterator[float]:
        yield 0
        for vm in self.utm.vms if self.utm.awake() else []:
            status = vm["status"]
            if {vm["name"], vm["uuid"]} & set(self.rule.get("unknown", [])):
                status = "unknown"
                self.report(Refused(self.rule.get("error", -1728)))
            self.say(f"{vm['uuid']} {status:<8.8} {vm['name']}\n")
        if self.rule.get("blank"):
            self.report(Refused(-1728))
            self.say(" " * 36 + " unknown  \n")

    def verb_status(self, vm: Machine, _: dict[str, Any]) -> Iterator[float]:
        yield 0
        self.say(self.again(vm)["status"] + "\n")

    def verb_start(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        if "--attach" in options:
            self.say("WARNING: attach command is not implemented yet!\n")
        yield self.utm.start(vm, "--disposable" in options, "--recovery" in options)

    def verb_suspend(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        yield self.utm.suspend(vm, "--save-state" in options)

    def verb_stop(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        yield self.utm.stop(vm, next((how for how in ("--kill", "--request") if how in options), "--force"))

    def verb_delete(self, vm: Machine, _: dict[str, Any]) -> Iterator[float]:
        yield self.utm.delete(vm)

    def verb_clone(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        name = options.get("--name", "")
        uuid, seconds = self.utm.clone(vm, name, self.rule.get("partial", ""))
        yield seconds
        made = self.utm.find(uuid)
        if made and made["name"] == name and made["bundle"] != self.utm.bundle_name(name):
            raise Refused(
                -2700,
                f"“{made['bundle']}” couldn’t be moved because an item with the same name already exists.",
            )

    def verb_attach(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        yield 0
        ports = self.again(vm)["serials"]
        if "--index" in options:
            index = int(options["--index"])
            ports = ports[index : index + 1] if index >= 0 else []
        for port in ports:
            self.say("WARNING: attach command is not implemented yet!\n")
            if port["kind"] == "ptty" and port.get("path"):
                self.say(f"PTTY: {port['path']}\n")
                return
            if port["kind"] == "tcp":
                self.say(f"TCP: {port['host']}:{port['port']}\n")
                return

    def verb_ip_address(self, vm: Machine, _: dict[str, Any]) -> Iterator[float]:
        yield 0
        vm = self.again(vm)
        self.utm.need_started(vm)
        addresses = vm["ips"]
        if vm["backend"] == "qemu" and not self.utm.agent(vm):
            addresses = [ip for ip in addresses if ip.startswith("fe80:")] or ["fe80::5054:ff:fe12:3456"]
        self.say("".join(address + "\n" for address in addresses))

    def need_agent(self, vm: Machine) -> Guest:
        self.utm.need_started(vm)
        if vm["backend"] != "qemu":
            raise Refused(-2700, "Operation not supported by the backend.")
        self.utm.agent(vm)
        return Guest(self.utm, vm["uuid"])

    def verb_exec(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        """Its output arrives at its end and is capped; a guest process killed by a signal counts as 0."""
        import subprocess
        import tempfile

        yield 0
        guest = self.need_agent(self.again(vm))
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            if "--input" in options:
                yield from self.read_stdin(stdin)
            process = guest.run(
                options["--cmd"],
                options["--env"],
                stdin if "--input" in options else subprocess.DEVNULL,
                out,
                err,
            )
            self.utm.journal(guest=process.pid)
            while process.poll() is None:
                yield 0.005
            self.status = max(0, process.returncode)
            for stream, lines in ((out, self.out), (err, self.err)):
                stream.seek(0)
                lines.append(stream.read(self.utm.app["exec_limit"]))
        if os.path.exists(guest.root + "/power-off"):
            os.unlink(guest.root + "/power-off")
            self.utm.power_off(self.again(vm))

    def read_stdin(self, into: Any) -> Iterator[float]:
        """To its end, and with the state closed meanwhile: the other side may take its time."""
        import select

        self.stdin_used = True
        while True:
            while not select.select([0], [], [], 0)[0]:
                yield 0.005
            chunk = os.read(0, 65536)
            if not chunk:
                break
            into.write(chunk)
        into.seek(0)

    def verb_file_pull(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        yield 0
        path = self.need_agent(self.again(vm)).file(options["<path>"])
        try:
            with open(path, "rb") as file:
                self.out.append(file.read())
        except OSError as error:
            raise Refused(
                -2700, f"failed to open file '{options['<path>']}' (mode: 'r'): {error.strerror}"
            ) from None

    def verb_file_push(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        import tempfile

        yield 0
        guest = self.need_agent(self.again(vm))
        path = guest.file(options["<path>"])
        with tempfile.TemporaryFile() as stdin:
            yield from self.read_stdin(stdin)
            try:
                with open(path, "wb") as file:
                    file.write(stdin.read())
            except OSError as error:
                raise Refused(
                    -2700, f"failed to open file '{options['<path>']}' (mode: 'w'): {error.strerror}"
                ) from None
        guest.give_away(os.path.dirname(path))

    def verb_usb_list(self, _: dict[str, Any]) -> Iterator[float]:
        yield 0

    def verb_usb_connect(self, *_: Any) -> Iterator[float]:
        yield 0
        raise Exit(1, "Error: Device not found.")

    verb_usb_disconnect = verb_usb_connect


class Osascript(Tool):
    """Knows kodemachine's scripts by their first line, `-- kodemachine: OPERATION` (`//` in JavaScript).

    An operation is a method `operation_<name>` that gets the script's arguments. Unlike utmctl, osascript
    exits with 1 when an event fails.
    """

    name = "osascript"
    ERRORS = {
        -1743: "Not authorized to send Apple events to UTM.",
        -1712: "UTM got an error: AppleEvent timed out.",
        -609: "UTM got an error: Connection is invalid.",
        -600: "UTM got an error: Application isn’t running.",
    }

    def __init__(self, utm: FakeUTM, argv: Sequence[str]) -> None:
        super().__init__(utm, argv)
        self.words, scripts = list(argv), []
        while self.words and self.words[0] in ("-e", "-l"):
            option, value = self.words.pop(0), self.words.pop(0)
            scripts += [value] * (option == "-e")
        if not scripts and self.words[:1] == ["-"]:
            self.words.pop(0)
            self.stdin_used = True
            scripts = [sys.stdin.read()]
        marked = re.match(r"\s*(?:--|//) kodemachine: (\S+)", "\n".join(scripts))
        self.verb = marked[1] if marked else ""

    def run(self) -> int:
        method = getattr(self, "operation_" + re.sub(r"\W", "_", self.verb), None)
        if method is None:
            raise Exit(1, "0:0: syntax error: A identifier can’t go after this identifier. (-2741)")
        return self.serve(self.verb, method(*self.words))

    def report(self, error: Refused) -> None:
        words = error.words or self.ERRORS.get(error.number, "An error has occurred.")
        if error.number not in self.ERRORS or error.words:
            words = "UTM got an error: " + words
        self.complain(f"0:0: execution error: {words} ({error.number})\n")
        self.status = 1

    def machine(self, uuid: str) -> Machine:
        vm = self.utm.find(uuid) if self.utm.awake() else None
        if vm is None:
            raise Refused(-1728, f'Can’t get virtual machine id "{uuid}".')
        return vm

    def operation_addresses(self) -> Iterator[float]:
        """One line `UUID MAC` for every network interface."""
        yield 0
        for vm in self.utm.vms if self.utm.awake() else []:
            self.say("".join(f"{vm['uuid']} {mac}\n" for mac in vm["macs"]))

    def operation_configure(
        self, uuid: str, name: str, memory: str, cpus: str, *macs: str
    ) -> Iterator[float]:
        """Changes the configuration, and prints name, memory, CPUs and addresses as they are then."""
        yield 0
        vm = self.machine(uuid)
        self.utm.configure(vm, name, memory, cpus, macs)
        self.say("".join(f"{value}\n" for value in (vm["name"], vm["memory"], vm["cpus"], *vm["macs"])))


def fake_main(tool: str, folder: str) -> int:
    """The fake program `tool`: Utmctl or Osascript, or the real ssh or scp with the test's configuration."""
    utm, argv = FakeUTM(folder), sys.argv[1:]
    program = Osascript(utm, argv) if tool == "osascript" else Utmctl(utm, argv)
    null = os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev
    stdin = "null" if null else "tty" if os.isatty(0) else "other"
    utm.journal(time=time.time(), tool=tool, argv=argv, verb=program.verb, stdin=stdin)
    if tool in ("ssh", "scp"):
        with open(utm.path(tool + ".real"), encoding="utf-8") as file:
            real = file.read()
        os.execv(real, [real, "-F", utm.path("ssh_config"), *argv])
    try:
        status = program.run()
    except Exit as end:
        status = end.status
        program.write(2 if status else 1, (end.words + "\n").encode("utf-8", "surrogateescape"))
    utm.journal(end=status, stdin_used=program.stdin_used)
    return status


FAKE_PARTS = (Refused, Exit, FakeUTM, Guest, Tool, Utmctl, Osascript, fake_main)

# ---- the tests' side


@functools.lru_cache(maxsize=None)  # noqa: UP033 (functools.cache is this, spelled for 3.9 on)
def fake_module() -> bytes:
    """FAKE_PARTS as a compiled module, each at its line of this file so that tracebacks show the source."""
    text = FAKE_IMPORTS
    for part in FAKE_PARTS:
        lines, first = inspect.getsourcelines(part)
        text += "\n" * (first - 1 - text.count("\n")) + "".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = os.path.join(folder, "fakeutm.py"), os.path.join(folder, "fakeutm.pyc")
        with open(source, "w", encoding="utf-8") as file:
            file.write(text)
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(
            source, compiled, os.path.abspath(__file__), doraise=True, invalidation_mode=unchecked
        )
        with open(compiled, "rb") as octets:
            return octets.read()


def wait_for(predicate: Callable[[], Any], limit: float = 20) -> Any:
    """What `predicate` returns once that is true; fails after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        found = predicate()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {limit} s: {inspect.getsource(predicate).strip()}")
        time.sleep(0.01)


class Utm:
    """A test's handle on its fake UTM: puts machines in, plans faults, looks up what was called."""

    def __init__(self, folder: str) -> None:
        os.makedirs(os.path.join(folder, "guests"))
        for part in (folder, os.path.join(folder, "guests")):
            os.chmod(part, 0o711)  # the guests' processes may be nobody's, and must reach their files
        self.folder, self.fake = folder, FakeUTM(folder)
        app = {
            "running": True,
            "ready_at": 0.0,  # seconds since the epoch
            "launch_seconds": 0.0,
            "keep_running": False,
            "regenerate_mac": False,
            "version": "5.0.3",  # None: a utmctl without that verb
            "language": "en",
            "latency": 0.0,  # seconds every call takes
            "clone_seconds": 0.0,
            "delete_seconds": 0.0,
            "exec_limit": 16 << 20,  # bytes
            "documents": None,  # a folder: machines are packages in it too
            "addresses": [f"127.0.0.{n}" for n in range(2, 10)],  # what machines without `ips` get, one each
            "host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "Fake" * 10 + "Fak root@guest",
        }
        with open(self.fake.path("state.json"), "w", encoding="utf-8") as file:
            json.dump({"app": app, "vms": [], "faults": [], "pending": [], "orphans": []}, file)

    def install(self, bin_folder: str, *tools: str) -> None:
        """Puts the programs (utmctl, osascript unless named) into a folder for PATH."""
        with open(self.fake.path("fakeutm.pyc"), "wb") as octets:
            octets.write(fake_module())
        python = os.path.realpath(sys.executable)
        start = f"#!{python} -IS\n"
        if " " in python or len(start) > 120:
            # Too much for a #! line. To sh this is an exec, to Python a string.
            start = f"#!/bin/sh\n'''exec' '{python}' -IS \"$0\" \"$@\"\n' '''\n"
        for tool in tools or ("utmctl", "osascript"):
            with open(os.path.join(bin_folder, tool), "w", encoding="utf-8") as file:
                file.write(
                    f"{start}import sys\nsys.path.insert(0, {self.folder!r})\n"
                    f"from fakeutm import fake_main\nsys.exit(fake_main({tool!r}, {self.folder!r}))\n"
                )
            os.chmod(file.name, 0o755)

    def add(self, name: str, **fields: Any) -> str:
        """A new machine at the end of the list; returns its UUID."""
        vm: Machine = {
            "uuid": FakeUTM.new_uuid(),
            "name": name,
            "status": "stopped",
            "backend": "qemu",
            "macs": [FakeUTM.new_mac()],
            "memory": 4096,  # MiB
            "cpus": 4,
            "disk": 65536,  # bytes
            "displays": [],
            "ips": None,  # None: one of app.addresses at the first start
            "serials": [],  # {kind: ptty, path} {kind: tcp, host, port} {kind: terminal}
            "start_seconds": 0.0,
            "resume_seconds": 0.0,
            "suspend_seconds": 0.0,
            "stop_seconds": 0.0,
            "request_seconds": 0.0,  # None: never
            "ignores_power_key": False,
            "agent_after": 0.0,  # seconds after the start; None: never
            "rpc_seconds": 0.0,  # how much of agent_after is "Timed out waiting for RPC."
            "link_local_seconds": 0.0,  # how long after agent_after there is nothing but fe80
            "stuck": [],  # states that it never leaves by itself
            "saved": False,
            "save_error": "",  # UTM's words when `suspend -s` fails
            "disposable": False,
            "shortcut": False,  # linked: its package is outside UTM's folder
            "copied_from": None,
            "up_at": None,
        }
        unknown = set(fields) - set(vm)
        assert not unknown, f"no such fields: {unknown}"
        vm.update(fields, bundle=FakeUTM.bundle_name(name))
        with self.fake as utm:
            if vm["status"] != "stopped":
                vm["up_at"] = utm.now
                if vm["ips"] is None:
                    vm["ips"] = utm.free_address()
            utm.vms.append(vm)
            utm.write_bundle(vm)
        return str(vm["uuid"])

    def machines(self) -> list[Machine]:
        with self.fake as utm:
            return utm.vms

    def names(self) -> list[str]:
        return [vm["name"] for vm in self.machines()]

    def machine(self, identifier: str) -> Machine:
        found = [vm for vm in self.machines() if identifier in (vm["uuid"], vm["name"])]
        assert len(found) == 1, f"{len(found)} machines are called {identifier}"
        return found[0]

    def change(self, identifier: str, **fields: Any) -> None:
        with self.fake as utm:
            vm = utm.find(identifier)
            assert vm and not set(fields) - set(vm), (identifier, fields)
            vm.update(fields)
            utm.write_bundle(vm)

    def option(self, **settings: Any) -> None:
        """Settings of the app; `ready_in` (seconds) stands for `ready_at`."""
        with self.fake as utm:
            if "ready_in" in settings:
                settings["ready_at"] = utm.now + settings.pop("ready_in")
            assert not set(settings) - set(utm.app), settings
            utm.app.update(settings)
            for vm in utm.vms:
                utm.write_bundle(vm)

    def app(self) -> dict[str, Any]:
        with self.fake as utm:
            return utm.app

    def fault(self, verb: str = "*", **rule: Any) -> None:
        """Plans a fault; of several that apply to a call, the first one counts.

        Which calls:
          verb          utmctl's; "osascript", or an operation of it; "*"
          tool, vm      "utmctl" or "osascript"; a machine's name or UUID
          contains      a part of the command line
          skip, times   not the first calls that match; only so many
          nth           only the nth after those skipped, from 1
        What happens:
          error, string the OSStatus number, UTM's own words
          lookup        with error: the look-up fails, "Virtual machine not found.", as without permission
          language      of the error: "de", "ja"
          crash, hang   dies by "TRAP" or "ABRT"; never ends
          silent, empty nothing, without a word; list's header alone
          unknown       list: machines whose status fails, by name
          blank         list: a row without UUID and name
          partial       clone: "no-rename", "copy-only"
          stdout, stderr, status  in place of everything else
          hide_error    the number of an error of --hide, before the verb succeeds
          no_app        "Application not found."
        How:
          when          "before" (nothing is done; the default) or "after" (done all the same)
          delay         seconds until it is done
          report_after  seconds until the caller hears of it; it goes on by itself
        """
        known = (
            "tool vm contains skip times nth error string crash hang silent empty stdout stderr status no_app"
            " lookup language partial unknown blank hide_error when delay report_after"
        )
        assert not set(rule) - set(known.split()), rule
        with self.fake as utm:
            utm.state["faults"].append({"verb": verb, **rule})

    def clear_faults(self) -> None:
        with self.fake as utm:
            utm.state["faults"] = []

    def restart(self) -> None:
        """UTM quits and comes back: what was not saved is off, what is saved waits for its next start."""
        with self.fake as utm:
            utm.state["pending"] = []
            for vm in utm.vms:
                vm.update(status="stopped", disposable=False, up_at=None)

    def guest(self, identifier: str) -> str:
        """The folder that is `/` inside the machine."""
        with self.fake as utm:
            vm = utm.find(identifier)
            assert vm, identifier
            return Guest(utm, vm["uuid"]).root

    def journal(self) -> list[dict[str, Any]]:
        if not os.path.exists(self.fake.path("calls.log")):
            return []
        with open(self.fake.path("calls.log"), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def calls(self, verb: str | None = None, tool: str = "utmctl") -> list[dict[str, Any]]:
        """Processes of a tool (utmctl, osascript, ssh, scp) in the order in which they were started.

        Each is {tool, argv, verb (osascript's: the operation), time, pid, stdin ("null", "tty", "other"),
        stdin_used, guest (pid of exec's process), end (exit status; None while it runs or if it was killed)}.
        """
        calls: list[dict[str, Any]] = []
        for entry in self.journal():
            if "tool" in entry:
                calls.append({"end": None, "stdin_used": False, "guest": None, **entry})
            else:
                next(call for call in reversed(calls) if call["pid"] == entry["pid"]).update(entry)
        return [call for call in calls if call["tool"] == tool and verb in (None, call["verb"])]

    def verbs(self) -> list[str]:
        """What utmctl was called for, in order."""
        return [call["verb"] for call in self.calls()]


class Sshd:
    """A real sshd on some of 127.0.0.2, 127.0.0.3 ..., with throw-away keys for the host and for the user."""

    @staticmethod
    def program() -> str | None:
        return shutil.which(
            "sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/libexec"])
        )

    @staticmethod
    def why_not(hosts: Sequence[str]) -> str:
        """The reason why it cannot run here, if there is one."""
        if not Sshd.program() or not shutil.which("ssh-keygen"):
            return "no sshd here"
        for host in hosts:
            with socket.socket() as probe:
                try:
                    probe.bind((host, 0))
                except OSError:
                    return f"this machine has no address {host}"
        return ""

    def __init__(self, folder: str, hosts: Sequence[str]) -> None:
        os.makedirs(folder)
        self.folder, self.hosts = folder, hosts
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind((hosts[0], 0))
            self.port: int = probe.getsockname()[1]
        self.user_key = self._make_key("user")
        self._make_key("host")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _make_key(self, name: str) -> str:
        for suffix in ("", ".pub"):
            if os.path.exists(self.path(name + suffix)):
                os.unlink(self.path(name + suffix))
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", self.path(name)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        return self.path(name)

    @property
    def host_key_line(self) -> str:
        """As in /etc/ssh/ssh_host_ed25519_key.pub."""
        with open(self.path("host.pub"), encoding="utf-8") as file:
            return file.read().strip()

    def start(self) -> None:
        program = self.program()
        assert program
        if os.geteuid() == 0 and sys.platform == "linux":
            os.makedirs("/run/sshd", 0o755, exist_ok=True)  # Debian's sshd, as root, refuses to start without
        options = {
            "Port": self.port,
            "HostKey": f'"{self.path("host")}"',
            "AuthorizedKeysFile": f'"{self.path("user.pub")}"',
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "yes",
            "MaxStartups": 100,
            "PrintMotd": "no",
            "Subsystem": "sftp internal-sftp",
        }
        lines = [f"{key} {value}\n" for key, value in options.items()]
        lines += [f"ListenAddress {host}:{self.port}\n" for host in self.hosts]
        with open(self.path("sshd_config"), "w", encoding="utf-8") as file:
            file.writelines(lines)
        with open(self.path("log"), "ab") as log:
            command = [program, "-D", "-e", "-f", self.path("sshd_config")]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(self._greets)

    def _greets(self) -> bool:
        assert self.process and self.process.poll() is None, self.log()
        try:
            for host in self.hosts:
                with socket.create_connection((host, self.port), timeout=5) as connection:
                    if connection.recv(4) != b"SSH-":
                        return False
        except OSError:
            return False
        return True

    def log(self) -> str:
        with open(self.path("log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def stop(self) -> None:
        """Ends the listener; sessions end with their connections."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def replace_host_key(self) -> None:
        self.stop()
        self._make_key("host")
        self.start()


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Terminal:
    """A program on a terminal of its own, and the person in front of it."""

    # Only the leader of the new session can make the terminal its own. (os.login_tty is not in 3.9.)
    LOGIN = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, argv: Sequence[str], env: dict[str, str], cwd: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""  # all output so far
        self._read = 0  # how much of it expect() has consumed
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.LOGIN, *argv],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=env, cwd=cwd, start_new_session=True,
        )  # fmt: skip

    def attributes(self) -> list[Any]:
        """As termios.tcgetattr gives them; compare with `before`."""
        return termios.tcgetattr(self.slave)

    def send(self, octets: bytes) -> None:
        os.write(self.master, octets)

    def _take(self, seconds: float) -> bool:
        """Reads what has come within that time; says whether there was something."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.seen += os.read(self.master, 65536)
        return True

    def expect(self, pattern: bytes, limit: float = 20) -> re.Match[bytes]:
        """The next match of a regular expression in the output, within `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            match = re.compile(pattern).search(self.seen, self._read)
            if match:
                self._read = match.end()
                return match
            ended = self.process.poll() is not None
            if not self._take(0.05) and (ended or time.monotonic() > deadline):
                raise AssertionError(f"no {pattern!r} in {self.seen[self._read :]!r}")

    def wait(self, limit: float = 20) -> int:
        """The exit status (negative: a signal). Reads meanwhile: a full terminal would block the program."""
        deadline = time.monotonic() + limit
        while self.process.poll() is None:
            self._take(0.02)
            if time.monotonic() > deadline:
                raise AssertionError(f"still running after {limit} s: {self.seen!r}")
        while self._take(0):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


class Case(unittest.TestCase):
    """A private home with blanks in its path, an empty fake UTM, and none of this machine's own settings."""

    maxDiff = None

    def setUp(self) -> None:
        # Resolved because macOS' temporary folder is a link; without blanks because guests' scripts name it.
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="kodemachine-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        os.chmod(self.folder, 0o711)
        self.home = os.path.join(self.folder, "home of a user")
        self.bin = os.path.join(self.folder, "fake bin")
        os.mkdir(self.home)
        os.mkdir(self.bin)
        self.utm = Utm(os.path.join(self.folder, "utm"))
        self.utm.install(self.bin, "utmctl", "osascript", "ssh", "scp")
        self.ssh_config = os.path.join(self.utm.folder, "ssh_config")
        for tool in ("ssh", "scp"):
            with open(os.path.join(self.utm.folder, tool + ".real"), "w", encoding="utf-8") as file:
                file.write(shutil.which(tool) or "/usr/bin/false")
        with open(self.ssh_config, "w", encoding="utf-8") as file:
            file.write("# for every ssh of this test\n")
        self.environment = {
            "HOME": self.home,
            "PATH": os.pathsep.join([self.bin, "/usr/bin", "/bin", "/usr/sbin", "/sbin"]),
            "TERM": "dumb",
            "TMPDIR": self.folder,
            "USER": "tester",
            "LOGNAME": "tester",
        }
        for tool in ("utmctl", "osascript", "ssh", "scp"):
            self.assertEqual(
                shutil.which(tool, path=self.environment["PATH"]),
                os.path.join(self.bin, tool),
                "not the fake",
            )
        self.addCleanup(self._kill_the_rest)

    # -- what a test acts with

    def image(self, name: str = "kodeimage-v0.2.0", **fields: Any) -> str:
        return self.utm.add(name, **fields)

    def config(self, **keys: Any) -> str:
        """Writes config.json and returns its path."""
        path = os.path.join(self.home, ".config", "kodemachine", "config.json")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(keys, file)
        return path

    # The product's own patience, in seconds, as it is in tests: what it waits for here comes at once or never.
    PATIENCE = {
        "WARM_UP": 0.6, "SETTLE": 0.8, "UNCHANGED": 0.4, "ASK_AGAIN": 0.4, "PRESS_AGAIN": 0.6, "FORCE_STAGE": 2.0,
        "DELETE_SETTLE": 0.6, "LOOK_LIMIT": 6.0,
        "LIMITS": {"list": 2.0, "status": 2.0, "ip-address": 2.0, "attach": 2.0, "start": 2.0, "stop": 2.0,
                   "suspend": 2.0, "delete": 5.0, "exec": 5.0, "osascript": 2.0},
    }  # fmt: skip
    LAUNCH = (
        "import json, sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "import kodemachine\n"
        "vars(kodemachine).update(json.loads(sys.argv.pop(1)))\n"
        "sys.exit(kodemachine.main())"
    )

    def command(self, *args: str, patience: dict[str, Any] | None = None) -> list[str]:
        """The command line of kodemachine, with less patience than a person has; {}: with its own, as installed."""
        if patience == {}:
            return [sys.executable, "-IS", "-W", "error", KODEMACHINE, *args]
        changed = json.dumps({**self.PATIENCE, **(patience or {})})
        return [sys.executable, "-IS", "-W", "error", "-c", self.LAUNCH, HERE, changed, *args]

    def km(
        self, *args: str, stdin: str | None = None, env: dict[str, str] | None = None, timeout: float = 60
    ) -> Result:
        """Runs kodemachine to its end, with no input unless given."""
        return self.run_program(self.command(*args), stdin, env, timeout)

    def utmctl(self, *args: str, stdin: str | None = None, timeout: float = 60) -> Result:
        return self.run_program([os.path.join(self.bin, "utmctl"), *args], stdin, None, timeout)

    def run_program(
        self,
        argv: Sequence[str],
        stdin: str | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> Result:
        process = self.start_program(argv, env, stdin is not None)
        try:
            out, err = process.communicate(None if stdin is None else stdin.encode(), timeout)
        except subprocess.TimeoutExpired as late:
            said = (late.stderr or b"").decode(errors="replace")
            raise AssertionError(f"still running after {timeout} s: {shlex.join(argv)}\n{said}") from None
        return Result(process.returncode, *(text.decode("utf-8", "surrogateescape") for text in (out, err)))

    def start_program(
        self, argv: Sequence[str], env: dict[str, str] | None = None, input_follows: bool = False
    ) -> subprocess.Popen[bytes]:
        """A child that is ended with the test; its streams are pipes, its input is empty unless announced."""
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if input_follows else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.environment, **(env or {})},
            cwd=self.home,
        )
        self.addCleanup(self._end, process)
        return process

    def start_km(
        self, *args: str, env: dict[str, str] | None = None, input_follows: bool = False
    ) -> subprocess.Popen[bytes]:
        return self.start_program(self.command(*args), env, input_follows)

    def km_tty(self, *args: str, env: dict[str, str] | None = None) -> Terminal:
        terminal = Terminal(self.command(*args), {**self.environment, **(env or {})}, self.home)
        self.addCleanup(terminal.close)
        return terminal

    def sshd(self, count: int = 1) -> Sshd:
        """A running sshd on the first `count` app.addresses, with the guests' host key; or skips the test."""
        hosts = self.utm.app()["addresses"][:count]
        reason = Sshd.why_not(hosts)
        if reason:
            self.skipTest(reason)
        sshd = Sshd(os.path.join(self.folder, "sshd"), hosts)
        sshd.start()
        self.addCleanup(sshd.stop)
        self.utm.option(host_key=sshd.host_key_line)
        with open(self.ssh_config, "a", encoding="utf-8") as file:
            file.write(f'IdentityFile "{sshd.user_key}"\nIdentitiesOnly yes\n')
        return sshd

    # -- what is left

    def processes(self) -> dict[int, str]:
        """Command lines that mention this test's folder, by pid; without those of guests, and of its sshd."""
        ps = ["ps", "-A", "-ww", "-o", "pid=", "-o", "pgid=", "-o", "command="]
        listing = subprocess.run(ps, stdout=subprocess.PIPE, check=True).stdout.decode(errors="replace")
        sshd = os.path.join(self.folder, "sshd")
        lines = [line for line in listing.splitlines() if self.folder in line and sshd not in line]
        ours = [line.split(None, 2) for line in lines]
        guests = {call["guest"] for call in self.utm.calls("exec")}
        return {int(pid): command for pid, group, command in ours if int(group) not in guests}

    def assertNoChildrenLeft(self, limit: float = 5) -> None:  # noqa: N802 (as unittest's)
        """Nothing that kodemachine started is alive; what has just been killed has `limit` seconds to go."""
        wait_for(lambda: not self.processes(), limit)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()
        # Closed unread: a process left behind may hold the other end open.
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()

    def _kill_the_rest(self) -> None:
        """Fakes that hang, and what runs in guests. Looks twice, lest a pid be someone else's by now."""
        calls = self.utm.calls() + self.utm.calls(tool="osascript")
        unfinished = [call for call in calls if call["end"] is None]
        alive = self.processes() if unfinished else {}
        for call in unfinished:
            if call["pid"] in alive:
                os.kill(call["pid"], signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if call["guest"] and os.getsid(call["guest"]) == call["guest"]:
                    os.killpg(call["guest"], signal.SIGKILL)


# ---- the fake itself

EVENT = "Error from event: The operation couldn’t be completed. (OSStatus error {}.)\n"
NOT_FOUND = "Error: Virtual machine not found.\n"


class FakeTest(Case):
    """The fake says and does what UTM and utmctl are known to."""

    def assert_utmctl(self, args: str, code: int = 0, out: str = "", err: str = "") -> None:
        self.assertEqual(self.utmctl(*shlex.split(args)), (code, out, err), args)

    # -- the command line

    def test_usage_errors_end_with_64_and_the_usage_on_stderr(self) -> None:
        base, top = "[--debug] [--hide] <identifier>", "<subcommand>"
        about = "Help:  <identifier>  Either the UUID or the complete name of the virtual machine.\n"
        cmd = "Help:  --cmd <cmd>  Command line to execute on the guest.\n"
        index = "Help:  --index <index>  Index of the serial device to attach to.\n"
        start = f"start {base} [--attach] [--disposable] [--recovery]"
        run = f"exec {base} [--input] [--env <env> ...] --cmd <cmd> ..."
        attach, clone = f"attach {base} [--index <index>]", f"clone {base} [--name <name>]"
        for args, message, usage in (
            ("--hide list", "Unknown option '--hide'", top),
            ("lst", "Unexpected argument 'lst'", top),
            ("up x", "2 unexpected arguments: 'up', 'x'", top),
            ("start ---x", "Invalid option: ---x", top),
            ("exec x --cmd ls ---x", "Invalid option: ---x", top),
            ("list -=x", "Invalid option: -=x", top),
            ("list x", "Unexpected argument 'x'", "list [--debug] [--hide]"),
            ("status a b c", "2 unexpected arguments: 'b', 'c'", f"status {base}"),
            ("start x --detach", "Unknown option '--detach'. Did you mean '--attach'?", start),
            ("start x --wait-for-it", "Unknown option '--wait-for-it'", start),
            ("start x -x", "Unknown option '-x'", start),
            ("start --hide", f"Missing expected argument '<identifier>'\n{about}", start),
            ("start -odd", f"Missing expected argument '<identifier>'\n{about}", start),
            ("clone x --name", "Missing value for '--name <name>'", clone),
            ("clone x --name=", "Missing value for '--name <name>'", clone),
            ("clone x --name -x", "Missing value for '--name <name>'", clone),
            ("attach x --index a", f"The value 'a' is invalid for '--index <index>'\n{index}", attach),
            ("exec x ls", f"Missing expected argument '--cmd <cmd> ...'\n{cmd}", run),
            ("exec x --cmd", f"Missing expected argument '--cmd <cmd> ...'\n{cmd}", run),
        ):
            command = f"utmctl {usage}".split(" [")[0].split(" <")[0]
            see = f"  See '{command} --help' for more information.\n"
            text = f"Error: {message.rstrip()}\nUsage: utmctl {usage}\n{see}"
            with self.subTest(args):
                self.assert_utmctl(args, 64, "", text)

    def test_errors_of_its_own_end_with_1(self) -> None:
        self.assert_utmctl("status km-a", 1, "", NOT_FOUND)
        words = "Error: You can only specify one of: --force, --kill, or --request\n"
        self.assert_utmctl("stop km-a --force --kill", 1, "", words)

    def test_help_goes_to_stdout(self) -> None:
        for args in ("", "help", "--help", "file", "usb", "start --help", "exec -h"):
            code, out, err = self.utmctl(*args.split())
            self.assertEqual((code, "USAGE: utmctl" in out, err), (0, True, ""), args)

    def test_after_a_terminator_nothing_is_an_option(self) -> None:
        self.utm.add("-odd")
        self.assert_utmctl("status -- -odd", 0, "stopped\n")

    def test_a_value_may_begin_with_a_dash_behind_an_equals_sign(self) -> None:
        self.image("base")
        self.assert_utmctl("clone base --name=-x")
        self.assertEqual(self.utm.names(), ["base", "-x"])

    def test_an_old_utmctl_does_not_know_version(self) -> None:
        self.assert_utmctl("version", 0, "5.0.3\n")
        self.utm.option(version=None)
        self.assertIn("Error: Unexpected argument 'version'\n", self.utmctl("version").err)

    def test_every_command_takes_hide_which_keeps_utm_running(self) -> None:
        self.image("base")
        self.utm.fault("start", hide_error=-1712)
        self.assert_utmctl("start --hide base", 0, "", EVENT.format(-1712))
        self.assertTrue(self.utm.app()["keep_running"])
        self.assertEqual(self.utm.machine("base")["status"], "started")

    # -- list, and finding machines

    def test_list_is_a_header_and_a_row_per_machine(self) -> None:
        one, two = self.utm.add("km-a", status="resuming"), self.utm.add("with blanks 機", status="stopped")
        header = "UUID                                 Status   Name\n"
        self.assert_utmctl("list", 0, f"{header}{one} resuming km-a\n{two} stopped  with blanks 機\n")

    def test_machines_are_found_by_exact_uuid_then_name(self) -> None:
        uuid = self.utm.add("km-a")
        self.utm.add(uuid, status="paused")
        self.assert_utmctl(f"status {uuid}", 0, "stopped\n")
        for other in (uuid.lower(), "KM-A", "km"):
            self.assert_utmctl(f"status {other}", 1, "", NOT_FOUND)

    def test_until_its_window_shows_utm_has_no_machines(self) -> None:
        self.image("base")
        self.utm.option(running=False, launch_seconds=0.3)
        self.assert_utmctl("list", 0, Utmctl.HEADER)
        self.assert_utmctl("status base", 1, "", NOT_FOUND)
        wait_for(lambda: "base" in self.utmctl("list").out)

    # -- states

    def test_states_follow_one_another_in_their_time(self) -> None:
        self.image("base", start_seconds=0.5, stop_seconds=1.5)
        start = self.start_program([os.path.join(self.bin, "utmctl"), "start", "base"])
        wait_for(lambda: self.utm.machine("base")["status"] == "starting")
        self.assertEqual(start.wait(), 0)
        self.assert_utmctl("status base", 0, "started\n")
        self.assert_utmctl("stop base")
        self.assert_utmctl("status base", 0, "stopping\n")
        wait_for(lambda: self.utm.machine("base")["status"] == "stopped")

    def test_a_verb_that_does_not_fit_the_state_is_refused_with_exit_status_0(self) -> None:
        running, not_available = "The virtual machine is not running.", "Operation not available."
        stopped = "The virtual machine must be stopped before this operation can be performed."
        for state, verbs, words in (
            ("started", ("start",), not_available),
            ("started", ("delete", "clone"), stopped),
            ("paused", ("stop", "stop --request", "suspend", "ip-address", "file pull x"), running),
            ("stopped", ("stop", "suspend", "ip-address", "exec x --cmd ls"), running),
        ):
            self.utm.add(state, status=state)
            for verb in verbs:
                args = verb.replace(" x", f" {state} x").replace("exec stopped x", "exec stopped")
                args = args if state in args else f"{verb} {state}"
                self.assert_utmctl(args, 0, "", f"{EVENT.format(-2700)}{words}\n")

    def test_suspend_and_start_go_through_paused(self) -> None:
        self.utm.add("km-a", status="started")
        self.assert_utmctl("suspend km-a -s")
        self.assertEqual(
            (self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("paused", True)
        )
        self.utm.restart()
        self.assertEqual(
            (self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("stopped", True)
        )
        self.assert_utmctl("start km-a")
        self.assertEqual(
            (self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("started", False)
        )

    def test_a_failed_save_leaves_the_machine_paused(self) -> None:
        self.utm.add("km-a", status="started", save_error="Timed out waiting for RPC.")
        self.assert_utmctl("suspend -s km-a", 0, "", f"{EVENT.format(-2700)}Timed out waiting for RPC.\n")
        self.assertEqual(self.utm.machine("km-a")["status"], "paused")

    def test_only_kill_ends_a_machine_that_is_stuck_or_ignores_its_power_key(self) -> None:
        self.utm.add("deaf", status="started", ignores_power_key=True)
        self.utm.add("slow", status="started", request_seconds=0.1)
        self.utm.add("stuck", status="started", stuck=["stopping"])
        for args in ("stop --request deaf", "stop --request slow", "stop stuck"):
            self.assert_utmctl(args)
        wait_for(lambda: self.utm.machine("slow")["status"] == "stopped")
        self.assertEqual([vm["status"] for vm in self.utm.machines()], ["started", "stopped", "stopping"])
        for name in ("deaf", "stuck"):
            self.assert_utmctl(f"stop --kill {name}")
            self.assertEqual(self.utm.machine(name)["status"], "stopped")

    # -- clones

    def test_a_clone_is_seen_under_a_temporary_name_behind_its_base(self) -> None:
        base = self.image("base")
        self.utm.add("last")
        self.utm.option(clone_seconds=1)
        clone = self.start_program([os.path.join(self.bin, "utmctl"), "clone", "base", "--name", "new"])
        wait_for(lambda: self.utm.names() == ["base", "base 2", "last"])
        self.assertEqual(clone.communicate(), (b"", b""))
        self.assertEqual(self.utm.names(), ["base", "new", "last"])
        new = self.utm.machine("new")
        self.assertNotEqual(new["uuid"], base)
        self.assertEqual(new["macs"], self.utm.machine("base")["macs"])

    def test_a_clone_has_its_own_mac_if_utm_is_told_so(self) -> None:
        self.image("base")
        self.utm.option(regenerate_mac=True)
        self.assert_utmctl("clone base --name new")
        self.assertNotEqual(self.utm.machine("new")["macs"], self.utm.machine("base")["macs"])

    def test_a_clone_under_a_name_that_is_taken_becomes_a_second_machine_of_that_name(self) -> None:
        self.image("base")
        self.utm.add("New")
        code, out, err = self.utmctl("clone", "base", "--name", "new")
        self.assertEqual((code, out, err.splitlines()[0] + "\n"), (0, "", EVENT.format(-2700)))
        self.assertEqual([(vm["name"], vm["bundle"]) for vm in self.utm.machines()][1], ("new", "base 2.utm"))

    def test_a_clone_may_stop_before_its_renaming_or_its_listing(self) -> None:
        self.image("base")
        self.utm.fault("clone", partial="no-rename", times=1)
        self.utm.fault("clone", partial="copy-only", times=1)
        self.assert_utmctl("clone base --name new")
        self.assertEqual(self.utm.names(), ["base", "base 2"])
        self.assert_utmctl("clone base --name new")
        self.assertEqual(self.utm.names(), ["base", "base 2"])

    def test_machines_are_packages_on_disk_too(self) -> None:
        documents = os.path.join(self.folder, "Documents")
        os.mkdir(documents)
        self.utm.option(documents=documents)
        self.image("base", memory=2048)
        self.assert_utmctl("clone base --name new")
        self.assertEqual(sorted(os.listdir(documents)), ["base.utm", "new.utm"])
        with open(os.path.join(documents, "new.utm", "config.plist"), "rb") as file:
            config = plistlib.load(file)
        self.assertEqual(config["Information"]["UUID"], self.utm.machine("new")["uuid"])
        self.assertEqual((config["Information"]["Name"], config["System"]["MemorySize"]), ("new", 2048))
        self.assert_utmctl("delete new")
        self.assertEqual(os.listdir(documents), ["base.utm"])

    # -- the guest

    def test_the_agent_comes_up_step_by_step(self) -> None:
        none = "The QEMU guest agent is not running or not installed on the guest."
        steps = []
        self.image(
            "base", agent_after=1, rpc_seconds=0.5, link_local_seconds=0.5, ips=["192.168.64.5", "fd00::1"]
        )
        self.assert_utmctl("start base")
        while "192.168.64.5\nfd00::1\n" not in steps:
            answer = self.utmctl("ip-address", "base")
            self.assertEqual(answer.code, 0)
            step = answer.out or answer.err.splitlines()[1]
            steps += [step] if step not in steps else []
        self.assertEqual(steps[:3], [none, "Timed out waiting for RPC.", "fe80::5054:ff:fe12:3456\n"])

    def test_apple_machines_have_no_agent_and_perhaps_no_address(self) -> None:
        self.utm.add("mac", backend="apple", status="started", ips=[])
        self.assert_utmctl("ip-address mac")
        words = "Operation not supported by the backend.\n"
        self.assert_utmctl("exec mac --cmd ls", 0, "", EVENT.format(-2700) + words)

    def test_exec_takes_the_words_after_cmd_as_they_are(self) -> None:
        self.utm.add("km-a", status="started")
        result = self.utmctl(
            "exec", "--hide", "km-a", "--env", "A=1", "--cmd", "echo", "--", "--hide", "-x", "--help"
        )
        self.assertEqual(result, (0, "-- --hide -x --help\n", ""))

    def test_exec_ends_with_the_status_of_the_guests_command_but_a_signal_is_0(self) -> None:
        self.utm.add("km-a", status="started")
        for script, code in (("exit 7", 7), ("kill -9 $$", 0)):
            self.assertEqual(self.utmctl("exec", "km-a", "--cmd", "sh", "-c", script).code, code)

    def test_exec_passes_input_on_only_if_told_so(self) -> None:
        self.utm.add("km-a", status="started")
        self.assertEqual(self.utmctl("exec", "km-a", "--input", "--cmd", "cat", stdin="abc").out, "abc")
        self.assertEqual(self.utmctl("exec", "km-a", "--cmd", "cat", stdin="abc").out, "")
        self.assertEqual([call["stdin_used"] for call in self.utm.calls("exec")], [True, False])

    def test_exec_cuts_long_output_without_a_word(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.option(exec_limit=10)
        self.assert_utmctl("exec km-a --cmd seq 100", 0, "1\n2\n3\n4\n5\n")

    def test_exec_sees_the_guests_files_and_cannot_write_the_hosts(self) -> None:
        uuid = self.utm.add("km-a", status="started")
        host = (os.stat("/etc/hosts").st_mtime_ns, socket.gethostname())
        script = (
            'printf "%s\\n" "$1" >/etc/hostname; cat /etc/hostname; hostnamectl set-hostname "$1"-2'
            " && cat /proc/sys/kernel/hostname /etc/ssh/ssh_host_*_key.pub"
            f"; : >>/etc/hosts; touch /etc/km-{uuid} /var/km-{uuid} /usr/bin/km-{uuid}"
            f"; cd / && touch km-{uuid}"
        )
        code, out, err = self.utmctl("exec", "km-a", "--cmd", "/bin/sh", "-c", script, "kodemachine", "label")
        key = self.utm.app()["host_key"]
        self.assertEqual((code, out), (1, f"label\nlabel-2\n{key}\n"), err)  # 1: the last touch was denied
        for folder in ("/", "/etc", "/var", "/usr/bin"):
            self.assertNotIn(f"km-{uuid}", os.listdir(folder))
        self.assertEqual((os.stat("/etc/hosts").st_mtime_ns, socket.gethostname()), host)
        self.assertTrue(os.path.exists(self.utm.guest("km-a") + f"/etc/km-{uuid}"))

    def test_a_guest_that_powers_itself_off_is_stopped(self) -> None:
        self.utm.add("km-a", status="started")
        self.assert_utmctl("exec km-a --cmd /sbin/poweroff")
        self.assertEqual(self.utm.machine("km-a")["status"], "stopped")

    def test_files_go_both_ways(self) -> None:
        self.utm.add("km-a", status="started")
        self.assertEqual(self.utmctl("file", "push", "km-a", "/root/x", stdin="abc"), (0, "", ""))
        self.assert_utmctl("file pull km-a /root/x", 0, "abc")
        self.assert_utmctl("exec km-a --cmd cat /root/x", 0, "abc")
        self.assertIn("(OSStatus error -2700.)", self.utmctl("file", "pull", "km-a", "/../../state.json").err)

    def test_attach_prints_where_the_serial_port_is(self) -> None:
        warning = "WARNING: attach command is not implemented yet!\n"
        ports = [
            {"kind": "terminal"},
            {"kind": "tcp", "host": "127.0.0.1", "port": 9},
            {"kind": "ptty", "path": "/x"},
        ]
        self.utm.add("three", serials=ports)
        self.utm.add("none")
        self.assert_utmctl("attach three", 0, f"{warning}{warning}TCP: 127.0.0.1:9\n")
        self.assert_utmctl("attach three --index 2", 0, f"{warning}PTTY: /x\n")
        self.assert_utmctl("attach three --index 0", 0, warning)
        self.assert_utmctl("attach three --index 3")
        self.assert_utmctl("attach none")

    # -- faults

    def test_without_permission_nothing_is_found_and_list_shows_its_header(self) -> None:
        self.image("base")
        self.utm.fault(error=-1743, lookup=True)
        note = "NOTE: utmctl does not work from SSH sessions or before logging in.\n"
        self.assert_utmctl("list", 0, Utmctl.HEADER, EVENT.format(-1743) + note)
        self.assert_utmctl("status base", 1, "", NOT_FOUND)

    def test_errors_may_come_in_other_languages(self) -> None:
        self.image("base")
        self.utm.fault("start", error=-609, language="ja", times=1)
        self.utm.fault("start", error=-609, language="de", times=1)
        self.assertIn("（OSStatusエラー-609）\n", self.utmctl("start", "base").err)
        self.assertIn("(OSStatus-Fehler -609.)\n", self.utmctl("start", "base").err)
        self.assert_utmctl("start base")

    def test_rules_count_the_calls_they_match(self) -> None:
        self.utm.add("km-a")
        self.utm.add("km-b")
        self.utm.fault("status", vm="km-a", skip=1, times=2, error=-600)
        self.utm.fault("status", contains="km-b", nth=2, error=-609)
        errors = [self.utmctl("status", name).err != "" for name in ("km-a", "km-b") * 4]
        self.assertEqual(errors, [False, False, True, True, True, False, False, False])

    def test_a_clone_reported_as_timed_out_is_finished_later(self) -> None:
        self.image("base")
        self.utm.fault("clone", error=-1712, when="after", delay=2, report_after=0.1)
        self.assert_utmctl("clone base --name new", 0, "", EVENT.format(-1712))
        self.assertEqual(self.utm.names(), ["base"])
        wait_for(lambda: self.utm.names() == ["base", "base 2"])
        wait_for(lambda: self.utm.names() == ["base", "new"])

    def test_what_was_asked_for_happens_although_utmctl_was_killed(self) -> None:
        self.image("base", start_seconds=1)
        start = self.start_program([os.path.join(self.bin, "utmctl"), "start", "base"])
        wait_for(lambda: self.utm.machine("base")["status"] == "starting")
        start.kill()
        wait_for(lambda: self.utm.machine("base")["status"] == "started")
        self.assertIsNone(self.utm.calls("start")[0]["end"])

    def test_an_error_before_prevents_the_deed_and_one_after_does_not(self) -> None:
        for name, when, left in (("a", "before", "stopped"), ("b", "after", "started")):
            self.utm.add(name)
            self.utm.fault("start", vm=name, error=-10004, when=when)
            self.assert_utmctl(f"start {name}", 0, "", EVENT.format(-10004))
            self.assertEqual(self.utm.machine(name)["status"], left)

    def test_utmctl_can_do_nothing_at_all_and_say_so_to_nobody(self) -> None:
        self.image("base")
        self.utm.fault("clone", silent=True)
        self.utm.fault("list", empty=True)
        self.assert_utmctl("clone base --name new")
        self.assert_utmctl("list", 0, Utmctl.HEADER)
        self.assertEqual(self.utm.names(), ["base"])

    def test_utmctl_can_die_or_hang(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.fault("list", crash="ABRT")
        self.utm.fault("exec", crash="TRAP", error=-2700, string="words")
        self.utm.fault("status", hang=True)
        self.assert_utmctl("list", -signal.SIGABRT)
        self.assert_utmctl("exec km-a --cmd ls", -signal.SIGTRAP, "", EVENT.format(-2700) + "words\n")
        hung = self.start_program([os.path.join(self.bin, "utmctl"), "status", "km-a"])
        wait_for(lambda: self.utm.calls("status"))
        with self.assertRaises(subprocess.TimeoutExpired):
            hung.wait(0.3)
        with self.assertRaises(AssertionError):
            self.assertNoChildrenLeft(0.2)

    def test_a_lost_result_of_exec_is_0_and_empty(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.fault("exec", error=-1712, when="after")
        self.assert_utmctl("exec km-a --cmd sh -c 'echo x; exit 3'", 0, "", EVENT.format(-1712))

    def test_list_can_show_unknown_and_blank_and_garbled_rows(self) -> None:
        uuid = self.utm.add("km-a", status="started")
        self.utm.fault("list", unknown=["km-a"], error=-1712, times=1)
        self.utm.fault("list", blank=True, times=1)
        self.utm.fault("list", stdout="garbage\n", stderr="more\n", times=1)
        self.utm.fault("list", no_app=True)
        self.assert_utmctl("list", 0, f"{Utmctl.HEADER}{uuid} unknown  km-a\n", EVENT.format(-1712))
        self.assertIn(f"\n{' ' * 36} unknown  \n", self.utmctl("list").out)
        self.assert_utmctl("list", 0, "garbage\n", "more\n")
        self.assert_utmctl("list", 1, "", "Error: Application not found.\n")

    # -- osascript

    def osascript(self, operation: str, *args: str) -> Result:
        script = f'-- kodemachine: {operation}\ntell application "UTM"'
        return self.run_program([os.path.join(self.bin, "osascript"), "-e", script, *args])

    def test_osascript_reads_and_changes_settings(self) -> None:
        uuid = self.utm.add("km-a", macs=["02:00:00:00:00:01", "02:00:00:00:00:02"])
        self.utm.add("no interface", macs=[])
        lines = f"{uuid} 02:00:00:00:00:01\n{uuid} 02:00:00:00:00:02\n"
        self.assertEqual(self.osascript("addresses"), (0, lines, ""))
        changed = self.osascript("configure", uuid, "km-b", "512", "1", "", "02:00:00:00:00:03")
        self.assertEqual(changed, (0, "km-b\n512\n1\n02:00:00:00:00:01\n02:00:00:00:00:03\n", ""))
        vm = self.utm.machine("km-b")
        self.assertEqual((vm["macs"][1], vm["memory"], vm["cpus"]), ("02:00:00:00:00:03", 512, 1))
        self.assertEqual(
            [call["verb"] for call in self.utm.calls(tool="osascript")], ["addresses", "configure"]
        )

    def test_osascript_exits_with_1_when_it_is_refused(self) -> None:
        uuid = self.utm.add("km-a", status="started")
        error = "0:0: execution error: UTM got an error: {} (-2700)\n"
        stopped = "The virtual machine must be stopped before this operation can be performed."
        self.assertEqual(self.osascript("configure", uuid, "", "", "1"), (1, "", error.format(stopped)))
        self.assertEqual(self.osascript("nonsense")[0], 1)
        self.utm.fault("osascript", error=-1743)
        self.assertIn("Not authorized to send Apple events to UTM. (-1743)", self.osascript("addresses").err)

    # -- many at once

    def test_many_processes_at_once_lose_no_machine(self) -> None:
        self.image("base")
        self.utm.option(clone_seconds=0.05)
        utmctl = os.path.join(self.bin, "utmctl")
        names = [f"km-{n}" for n in range(10)]
        clones = [self.start_program([utmctl, "clone", "base", "--name", name]) for name in names]
        lists = [self.start_program([utmctl, "list"]) for _ in names]
        self.assertEqual({process.wait() for process in clones + lists}, {0})
        self.assertEqual(sorted(self.utm.names()), ["base", *names])
        self.assertEqual(len({vm["uuid"] for vm in self.utm.machines()}), 11)
        self.assertEqual({call["end"] for call in self.utm.calls()}, {0})


class SurroundingsTest(Case):
    """What the other tests stand on, beside UTM: ssh, terminals, processes."""

    def test_ssh_reaches_the_sshd_and_is_journaled(self) -> None:
        sshd = self.sshd(2)
        known = os.path.join(self.folder, "known_hosts")
        options = ["-o", f'UserKnownHostsFile="{known}"', "-o", "StrictHostKeyChecking=accept-new"]
        login = [*options, "-p", str(sshd.port), "-l", pwd.getpwuid(os.getuid()).pw_name]
        for host in sshd.hosts:
            result = self.run_program([os.path.join(self.bin, "ssh"), *login, host, "echo", "hello"])
            self.assertEqual((result.code, result.out), (0, "hello\n"), result.err + sshd.log())
        self.assertEqual(self.utm.calls(tool="ssh")[0]["argv"][-2:], ["echo", "hello"])
        with open(known, encoding="utf-8") as file:
            self.assertIn(sshd.host_key_line.split()[1], file.read())
        sshd.replace_host_key()
        self.assertEqual(self.run_program([os.path.join(self.bin, "ssh"), *login, host, "true"]).code, 255)

    def test_a_terminal_is_its_programs_controlling_terminal(self) -> None:
        script = (
            "import termios; f = open('/dev/tty'); print('ready'); print(len(input())); raise SystemExit(7)"
        )
        terminal = Terminal([sys.executable, "-IS", "-c", script], self.environment, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(b"ready")
        terminal.send(b"abc\n")
        terminal.expect(b"3\r\n")
        self.assertEqual(terminal.wait(), 7)
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c_on_a_terminal_interrupts(self) -> None:
        script = "import signal, os; print('ready', flush=True); signal.pause()"
        terminal = Terminal([sys.executable, "-IS", "-c", script], self.environment, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(b"ready")
        terminal.send(b"\x03")
        self.assertEqual(terminal.wait(), -signal.SIGINT)


# ---- running the tests


class Worker:
    """A child that runs one test after another: ids go in, results come out, a line each."""

    def __init__(self, waiting: list[str]) -> None:
        self.waiting = waiting
        self.test = ""
        command = [
            sys.executable,
            *(f"-W{option}" for option in sys.warnoptions),
            os.path.abspath(__file__),
            "--worker",
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def next(self) -> bool:
        """Hands it a test; if there is none left, lets it end."""
        assert self.process.stdin
        self.test = self.waiting.pop(0) if self.waiting else ""
        if self.test:
            with contextlib.suppress(BrokenPipeError):  # dead: that is noticed where its answer should come
                self.process.stdin.write((self.test + "\n").encode())
        else:
            self.close()
        return bool(self.test)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Outcome(NamedTuple):
    test: str
    seconds: float
    failure: str  # what went wrong, or nothing
    skipped: str  # the reason, or nothing


def run_one(test: str) -> Outcome:
    result = unittest.TestResult()
    started = time.monotonic()
    unittest.defaultTestLoader.loadTestsFromName(test, sys.modules[__name__]).run(result)
    failures = [text for _, text in result.errors + result.failures]
    failures += ["unexpected success"] * len(result.unexpectedSuccesses)
    skipped = "; ".join(reason for _, reason in result.skipped)
    if skipped and os.environ.get("KODEMACHINE_NO_SKIP"):
        failures.append(f"skipped: {skipped}")
    return Outcome(test, time.monotonic() - started, "\n".join(failures), "" if failures else skipped)


def work() -> int:
    """Runs the tests named on stdin. What they print goes to stderr, since stdout is for results."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with results:
        for line in sys.stdin:
            print(json.dumps(run_one(line.strip())), file=results, flush=True)
    return 0


def outcomes(tests: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """Results as they come. A worker that dies has failed its test, and is replaced."""
    waiting = list(tests)
    with selectors.DefaultSelector() as selector:

        def hire() -> None:
            worker = Worker(waiting)
            worker.next()
            selector.register(worker.process.stdout or -1, selectors.EVENT_READ, worker)

        try:
            for _ in range(min(jobs, len(tests))):
                hire()
            while selector.get_map():
                for key, _ in selector.select():
                    worker = key.data
                    line = worker.process.stdout.readline()
                    if line:
                        yield Outcome(*json.loads(line))
                        if worker.next():
                            continue
                    selector.unregister(key.fileobj)
                    if not line:
                        worker.close()
                        yield Outcome(worker.test, 0.0, f"the worker died: {worker.process.returncode}", "")
                        if waiting:
                            hire()
        finally:
            for key in list(selector.get_map().values()):
                key.data.process.terminate()
                key.data.close()


def names_of(suite: unittest.TestSuite) -> Iterator[str]:
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from names_of(item)
        else:
            yield item.id().partition(".")[2]  # without the module


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs kodemachine's tests.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a class, or class.test")
    parser.add_argument(
        "-j", "--jobs", type=int, default=max(4, 2 * (os.cpu_count() or 1)), help="tests at a time"
    )
    parser.add_argument("-k", metavar="PATTERN", action="append", help="only tests whose name contains it")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    module, loader = sys.modules[__name__], unittest.defaultTestLoader
    loader.testNamePatterns = (
        [text if "*" in text else f"*{text}*" for text in options.k] if options.k else None
    )
    if options.names:
        suite = loader.loadTestsFromNames(options.names, module)
    else:
        suite = loader.loadTestsFromModule(module)
    if loader.errors:
        parser.error(f"no such tests: {' '.join(options.names)}")
    done: list[Outcome] = []
    for outcome in outcomes(list(names_of(suite)), options.jobs):
        done.append(outcome)
        if outcome.failure:
            print(f"FAILED {outcome.test}\n{outcome.failure}", flush=True)
        elif options.verbose:
            print(f"{outcome.seconds:6.2f} s  {outcome.test}", flush=True)
    for outcome in sorted(done, key=lambda outcome: -outcome.seconds)[:5]:
        print(f"slow: {outcome.seconds:.1f} s  {outcome.test}")
    skipped, failed = [o for o in done if o.skipped], [o for o in done if o.failure]
    for outcome in skipped:
        print(f"skipped: {outcome.test}: {outcome.skipped}")
    print(f"{len(done) - len(failed) - len(skipped)} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
