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
import ast
import base64
import concurrent.futures
import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import functools
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import marshal
import os
import plistlib
import pwd
import py_compile
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import string
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import threading
import time
import tty
import types
import unittest
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import kodemachine
from kodemachine import UUID, KodeError, Power, Reply, parse_host_keys
from kodemachine import Outcome as Verdict

HERE = os.path.dirname(os.path.abspath(__file__))
KODEMACHINE = os.path.join(HERE, "kodemachine.py")
Machine = dict[str, Any]

# ---- the fake UTM
#
# This part runs in two places: here and, copied by Utm.install(), in the fake utmctl and osascript. They
# start thousands of times. So they load only FAKE_IMPORTS at first, and other modules where they need them.
# Importing json and re would double the time of a call, so the files are in marshal's format.

FAKE_IMPORTS = "from __future__ import annotations; import fcntl, marshal, os, sys, time"


class Refused(Exception):
    """A failed Apple Event: its OSStatus number and UTM's own words, if it sent any."""

    def __init__(self, number: int, words: str = "") -> None:
        super().__init__(number, words)
        self.number, self.words = number, words


class Exit(Exception):
    """Ends the program with this exit status and this message: on stdout if the status is 0, else on stderr."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words


class FakeUTM:
    """UTM.app: its machines and their pending changes, in a file that any number of processes share.

    Nothing runs in the background. An action that takes time is stored with its due time (`later`). The next process
    that opens the state (`with utm:`) first does the actions that are due. So an action continues although its
    caller got an error, or was killed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.now = (
            0.0  # seconds since the epoch: the present, or the due time of the current action
        )
        self.delay = 0.0  # seconds by which a fault delays the current request
        self.state: dict[str, Any] = {}

    def __enter__(self) -> FakeUTM:
        self._lock = open(self.path("lock"), "w")  # noqa: SIM115 (__exit__ closes it, which unlocks)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with open(self.path("state"), "rb") as file:
            self._before = file.read()
        self.state = marshal.loads(self._before)
        self.now, self.delay, clock = 0.0, 0.0, time.time()
        while self.state["pending"] and self.state["pending"][0][0] <= clock:
            self.now, action, *words = self.state["pending"].pop(0)
            getattr(self, action)(*words)
        self.now = clock
        return self

    def __exit__(self, *_: object) -> None:
        now = marshal.dumps(self.state, 2)  # without references, equal states are equal bytes
        if now != self._before:
            with open(self.path("state.new"), "wb") as file:
                file.write(now)
            os.replace(self.path("state.new"), self.path("state"))
        self._lock.close()

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def journal(self, **entry: Any) -> None:
        """Adds an entry; a single write to a file opened for appending is not mixed with another's."""
        log = os.open(self.path("calls.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(log, marshal.dumps({"pid": os.getpid(), **entry}))
        os.close(log)

    # -- queries

    @property
    def app(self) -> dict[str, Any]:
        return self.state["app"]  # type: ignore[no-any-return]

    @property
    def vms(self) -> list[Machine]:
        return self.state["vms"]  # type: ignore[no-any-return]

    def awake(self) -> bool:
        """Whether UTM shows its machines. Any command launches UTM; the machines appear with its window."""
        if not self.app["running"]:
            self.app.update(running=True, ready_at=self.now + self.app["launch_seconds"])
        return bool(self.app["ready_at"] <= self.now)

    def find(self, identifier: str) -> Machine | None:
        """Finds a machine by exact UUID, else by exact name. The first in the list wins."""
        matches = [vm for key in ("uuid", "name") for vm in self.vms if vm[key] == identifier]
        return matches[0] if matches else None

    def fault(self, tool: str, verb: str, argv: Sequence[str]) -> dict[str, Any]:
        """The first rule that applies to this call, or an empty one. Rules count what they match."""
        found = [vm for vm in map(self.find, argv) if vm]
        for rule in self.state["faults"]:
            vm = rule.get("vm")
            if (
                "event" in rule  # a rule for one event of a script, not for a process
                or rule.get("tool", tool) != tool
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
        """An address that no machine has. If all are taken: the last one again, as with mixed-up leases."""
        taken = {ip for vm in self.vms for ip in vm["ips"] or []}
        return [ip for ip in self.app["addresses"] if ip not in taken][:1] or self.app["addresses"][-1:]

    # -- the passage of time

    def later(self, seconds: float, action: str, *words: Any) -> None:
        """Calls the method `action` after so many seconds; at once for 0."""
        due = self.now + self.delay + seconds
        if due <= self.now:
            getattr(self, action)(*words)
        else:
            self.state["pending"].append([due, action, *words])
            self.state["pending"].sort(key=lambda entry: entry[0])

    def become(self, uuid: str, old: str, new: str) -> None:
        """Changes the state from `old` ("*": any) to `new`, unless the machine has left `old` or hangs in it."""
        vm = self.find(uuid)
        if vm is None or old not in ("*", vm["status"]) or old in vm["stuck"]:
            return
        vm["status"] = new
        if new == "starting":
            vm["saved"] = False  # restored, or (disposable) lost
        elif (old, new) == ("starting", "started"):
            vm["up_at"] = self.now
            vm["ips"] = self.free_address() if vm["ips"] is None else vm["ips"]
            if self.app["consoles"]:
                self.boot(vm)
        elif new == "stopped":
            vm.update(disposable=False, up_at=None)
            # Pending actions of this run must not happen in the next one.
            self.state["pending"] = [entry for entry in self.state["pending"] if entry[2] != uuid]

    def boot(self, vm: Machine) -> None:
        """In the demo and the sandbox: connects the console of its address, and runs what a guest runs at boot."""
        address = vm["ips"][0]
        vm["serials"] = [{"kind": "ptty", "path": self.app["consoles"][address]}]
        Guest(self, vm["uuid"]).boot(address)
        # The first blocks of its own.
        with open(self.bundle(vm, "Data", "efi_vars.fd"), "wb") as file:
            file.write(bytes(2 << 20))

    # -- actions on a machine; each returns the seconds until UTM replies

    def need(self, vm: Machine, status: str, words: str) -> None:
        if vm["status"] != status:
            raise Refused(-2700, words)

    def need_stopped(self, vm: Machine) -> None:
        self.need(vm, "stopped", "The virtual machine must be stopped before this operation can be performed.")

    def need_started(self, vm: Machine) -> None:
        self.need(vm, "started", "The virtual machine is not running.")

    def start(self, vm: Machine, disposable: bool, recovery: bool) -> float:
        if vm["status"] == "paused":
            vm["saved"] = False  # its snapshot is deleted
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
        """The guest shuts itself down. request_seconds None: it never finishes."""
        if vm["request_seconds"] is not None:
            self.later(vm["request_seconds"], "become", vm["uuid"], "started", "stopped")

    def power_off_if_asked(self, uuid: str) -> None:
        """Powers the guest off if a command in it has asked for that."""
        mark = self.path("guests", uuid, "power-off")
        vm = self.find(uuid)
        if vm and os.path.exists(mark):
            os.unlink(mark)
            self.power_off(vm)

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
        """Returns the new UUID and the duration. The copy is listed after half of it, and renamed at its end."""
        self.need_stopped(base)
        uuid, seconds = self.new_uuid(), self.app["clone_seconds"]
        middle = (self.delay + seconds) / 2 - self.delay  # later() adds the delay
        self.later(middle, "insert", uuid, base["uuid"], partial)
        if name and partial in ("", "short"):
            self.later(seconds, "rename", uuid, name)
        return uuid, float(seconds)

    def insert(self, uuid: str, origin: str, partial: str = "") -> None:
        """A copy of `origin` under UTM's temporary name, right after it in the list."""
        base = self.find(origin)
        if base is None:
            return
        folders = {vm["bundle"].casefold() for vm in self.vms if not vm["shortcut"]} | set(self.state["orphans"])
        number, name = 1, base["name"]
        while self.bundle_name(name).casefold() in folders:
            number += 1
            name = f"{base['name']} {number}"
        copy = {**base, "uuid": uuid, "name": name, "bundle": self.bundle_name(name), "copied_from": origin}
        copy.update(
            saved=False, shortcut=False, ips=None, stuck=[], serials=[dict(s) for s in base["serials"]],
            drives=[dict(drive) for drive in base["drives"]],
        )
        if partial in ("short", "half"):  # UTM ignored an error while it copied, or has quit meanwhile
            copy["drives"][0]["size"] = 1
        if self.app["regenerate_mac"] and base["backend"] == "qemu":
            copy["macs"] = [self.new_mac() for _ in base["macs"]]
        if partial == "copy-only":
            copy["uuid"] = origin
            self.state["orphans"].append(copy["bundle"].casefold())
        elif partial == "half":  # UTM's next launch finds it under the name in it
            copy["name"] = base["name"]
            self.vms.insert(0, copy)
        else:
            self.vms.insert(self.vms.index(base) + 1, copy)
        self.copy_bundle(base, copy)

    def rename(self, uuid: str, name: str) -> None:
        """Writes the name, then moves the folder. If that fails, two machines have one name."""
        vm = self.find(uuid)
        if vm is None:
            return
        vm["name"] = name
        others = {other["bundle"].casefold() for other in self.vms if other is not vm and not other["shortcut"]}
        if self.bundle_name(name).casefold() not in others:
            self.move_bundle(vm, self.bundle_name(name))
        self.write_bundle(vm)

    @staticmethod
    def new_machine(name: str) -> Machine:
        """A machine with the default fields."""
        return {
            "uuid": FakeUTM.new_uuid(),
            "name": name,
            "status": "stopped",
            "backend": "qemu",
            "macs": [FakeUTM.new_mac()],
            "modes": [],  # of the network interfaces; missing ones are "shared"
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
            "icon": "linux",
            "drives": [{"id": FakeUTM.new_uuid(), "removable": False, "size": 331}],  # allocated MiB
            "bundle": FakeUTM.bundle_name(name),
        }

    def make(self, record: dict[str, Any]) -> tuple[str, float]:
        """A new machine with a ptty serial port and with copies of files as drives; a removable drive has no copy."""
        if any(vm["name"] == record["name"] for vm in self.vms):
            raise Refused(-2700, "An existing virtual machine already exists with this name.")
        drives = []
        for drive in record["drives"]:
            if not os.path.isfile(drive["source"]):
                raise Refused(-2700, "The file couldn’t be opened because there is no such file.")
            size = -(-os.path.getsize(drive["source"]) >> 20) or 1
            removable = drive.get("removable", False)
            drives.append({"id": self.new_uuid(), "removable": removable, "size": 0 if removable else size,
                           "source": drive["source"]})
        vm = {**self.new_machine(record["name"]), "cpus": record["cpu cores"], "memory": record["memory"],
              "drives": drives, "serials": [{"kind": "ptty"}]}
        self.later(self.app["clone_seconds"], "appear", vm)
        return str(vm["uuid"]), float(self.app["clone_seconds"])

    def appear(self, vm: Machine) -> None:
        self.vms.append(vm)
        self.write_bundle(vm)

    @staticmethod
    def mode(vm: Machine, n: int) -> str:
        """The mode of the n-th network interface."""
        return str(vm["modes"][n]) if n < len(vm["modes"]) else "shared"

    def configure(self, vm: Machine, name: str, memory: int, cpus: int, nics: Sequence[dict[str, str]]) -> None:
        """Changes settings. An empty value, or a memory (MiB) of 0, means: no change."""
        vm.update(memory=memory or vm["memory"], cpus=cpus, modes=[str(nic["mode"]) for nic in nics])
        vm["macs"] = [nic["address"] or old for old, nic in zip(vm["macs"], nics)]
        self.write_bundle(vm)
        if name and name != vm["name"]:
            self.rename(vm["uuid"], name)

    def agent(self, vm: Machine) -> bool:
        """Whether the agent reports more than link-local addresses. Refused until the agent answers."""
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
        text = os.urandom(16).hex().upper()
        return "-".join([text[:8], text[8:12], text[12:16], text[16:20], text[20:]])

    @staticmethod
    def new_mac() -> str:
        first, *rest = os.urandom(6)
        return ":".join(f"{byte:02X}" for byte in (first & 0xFC | 0x02, *rest))

    @staticmethod
    def bundle_name(name: str) -> str:
        return "".join("-" if char in ',/:\\?%*|"<>' else char for char in name) + ".utm"

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
            "Drive": [{"Identifier": "DRIVE", "ImageName": "disk.qcow2", "ImageType": "Disk", "ReadOnly": False}],
            "Network": [
                {"Mode": self.mode(vm, n).title(), "MacAddress": mac} for n, mac in enumerate(vm["macs"])
            ],
            "Serial": [{"Mode": "Ptty", "Target": "Auto"} for _ in vm["serials"]],
            "Display": vm["displays"],
            "QEMU" if qemu else "Virtualization": {},
        }
        with open(self.bundle(vm, "config.plist"), "wb") as file:
            plistlib.dump(config, file)

    # A process may be killed after these and before it writes the state. Then the next process repeats them.

    @staticmethod
    def copy_tree(old: str, new: str) -> None:
        """Copies a folder. As on APFS, the copy of a disk shares its blocks; nothing writes to them."""
        import shutil

        def copy_file(place: str, copy: str) -> None:
            (os.link if place.endswith(".qcow2") else shutil.copy2)(place, copy)

        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new, symlinks=True, copy_function=copy_file)

    def copy_bundle(self, base: Machine, copy: Machine) -> None:
        if self.app["documents"]:
            self.copy_tree(self.bundle(base), self.bundle(copy))
            self.write_bundle(copy)
        guest = self.path("guests", base["uuid"])
        if os.path.isdir(guest) and copy["uuid"] != base["uuid"]:
            self.copy_tree(guest, self.path("guests", copy["uuid"]))
            Guest(self, copy["uuid"]).give_away(self.path("guests", copy["uuid"]))

    def move_bundle(self, vm: Machine, bundle: str) -> None:
        old = dict(vm)
        vm["bundle"] = bundle
        if self.app["documents"] and os.path.exists(self.bundle(old)):
            os.rename(self.bundle(old), self.bundle(vm))

    def erase_bundle(self, vm: Machine) -> None:
        if self.app["documents"]:
            import shutil

            shutil.rmtree(self.bundle(vm), ignore_errors=True)


class Guest:
    """The inside of a machine: a folder in place of `/`, and real processes that cannot change the host's files.

    Absolute paths in their arguments are redirected into that folder. A path that is missed can be read but not
    written: when the tests run as root, these processes run as nobody. On PATH are TOOLS and the STUBS, which change
    nothing but the guest.
    """

    FOLDERS = (
        "etc/ssh etc/systemd/system etc/sudoers.d proc/sys/kernel var/log var/lib/dbus root/.ssh home run/cloud-init"
        " tmp usr/local bin"
    )
    TOOLS = (
        "awk base64 basename cat chmod cmp cp cut dd dirname echo env expr false find grep head kill ln"
        " ls mkdir mktemp mv od printf pwd readlink rm rmdir sed seq sh sleep sort ssh-keygen stat tail tee"
        " test touch tr true truncate uname uniq wc xargs"
    )
    STUBS = {
        "hostname": 'case $1 in -I) cat "$ROOT/run/address";; -* | "") cat "$ROOT/proc/sys/kernel/hostname";;\n'
        '*) printf "%s\\n" "$1" >"$ROOT/proc/sys/kernel/hostname";; esac',
        "hostnamectl": 'case $1 in set-hostname|hostname) printf "%s\\n" "$2" |\n'
        'tee "$ROOT/proc/sys/kernel/hostname" >"$ROOT/etc/hostname";; esac',
        "systemctl": "list=$ROOT/etc/systemd/enabled\nstopped=$ROOT/run/ssh.stopped\nfor unit; do :; done\n"
        "case $1-$unit in stop-ssh*) : >$stopped;; start-ssh* | restart-ssh*) rm -f $stopped;;\n"
        "status-ssh*) echo '* ssh.service - OpenBSD Secure Shell server'\n"
        "if [ -e $stopped ]; then echo '     Active: inactive (dead)'; exit 3; fi\n"
        "echo '     Active: active (running)';; esac\n"
        "case $1 in is-active) echo active;; is-enabled) grep -qx \"$unit\" $list && echo enabled;;\n"
        'enable) case $unit in serial-getty@*) ;; *) [ -e "$ROOT/etc/systemd/system/$unit" ] || exit 1;; esac\n'
        'grep -qx "$unit" $list || echo "$unit" >>$list;;\npoweroff) : >"$ROOT/power-off";; esac',
        "useradd": 'for user; do :; done\nmkdir -p "$ROOT/home/$user"\n'
        'echo "$user:*:$(/usr/bin/id -u):1000::$ROOT/home/$user:/bin/bash" >>"$ROOT/etc/passwd"',
        "sudo": 'case $1 in -*) ;; *) USER=root exec "$@";; esac\n'
        'for user; do :; done\ncat "$ROOT"/etc/sudoers.d/* | sed -n "s/^$user ALL=//p"',
        "getent": 'grep "^$2" "$ROOT/etc/$1"',
        # A real sshd reads the guest's configuration, and is redirected into the guest. It reports a missing key.
        "sshd": 'for real in /usr/sbin/sshd /usr/bin/sshd /usr/local/sbin/sshd; do [ -x $real ] && break; done\n'
        '[ -x $real ] || { echo "authorizedkeysfile .ssh/authorized_keys"; echo "pubkeyauthentication yes"\n'
        'echo "authenticationmethods any"; echo "pubkeyacceptedalgorithms ssh-ed25519"; exit; }\n'
        'found=$($real "$@" -f "$ROOT/etc/ssh/sshd_config") || exit\n'
        'printf "%s\\n" "$found" | sed "s,\\([a-z] \\| \\)/\\(etc\\|var\\)/,\\1$ROOT/\\2/,g"',
        "ip": 'echo "1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536"; echo "2: enp0s1: <BROADCAST,UP,LOWER_UP> mtu 1500"\n'
        'if [ -f "$ROOT/run/address" ]; then sed "s|.*|    inet &/24 scope global enp0s1|" "$ROOT/run/address"; fi',
        "whoami": 'echo "${USER:-root}"',
        # A clock that is some seconds off this host's.
        "date": 'clock=$ROOT/run/clock\n'
        'case $1 in -s) echo $((${2#@} - $(command -p date +%s))) >"$clock";;\n'
        '+%s) echo $(($(command -p date +%s) + $(cat "$clock" 2>/dev/null || echo 0)));;\n'
        '*) command -p date "$@";; esac',
        "cloud-init": "echo status: done",
        "poweroff": ': >"$ROOT/power-off"',
        "shutdown": ': >"$ROOT/power-off"',
        "id": 'case $USER in ""|root) ;; *) exec /usr/bin/id "$@";; esac\n'
        'case $1$2 in -u) echo 0;; -u?*) awk -F : -v user="$2" \'$1 == user { print $3; found = 1 }\n'
        'END { exit !found }\' "$ROOT/etc/passwd";;\n'
        '-Gn?*) sed -n "s/:.*[:,]$2$//p" "$ROOT/etc/group";; *) echo "uid=0(root) gid=0(root) groups=0(root)";; esac',
        "chown": "",
        "fstrim": "",
        "sync": ': >"$ROOT/run/synced"',
    }
    INSIDE = r"(?<![\w.}])/(etc|proc|var|root|home|run|tmp|boot|lib|mnt|opt|srv|sys|usr/(?!s?bin\b)\w+)\b"
    PROGRAM = r"(?<![\w.}])/(?:usr/)?s?bin/([\w-]+)"

    def __init__(self, utm: FakeUTM, uuid: str) -> None:
        """The state must be open: two processes at once would build the folder twice."""
        self.root = utm.path("guests", uuid)
        if not os.path.isdir(self.root):
            self._furnish(utm, uuid)

    def _furnish(self, utm: FakeUTM, uuid: str) -> None:
        """Builds the folder completely or not at all: the caller may be killed meanwhile."""
        new = self.root + ".new"
        if os.path.exists(new):
            import shutil

            shutil.rmtree(new)
        for folder in self.FOLDERS.split():
            os.makedirs(os.path.join(new, folder))
        files = {
            "etc/hostname": "kodeimage\n",
            "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 kodeimage\n",
            "etc/machine-id": uuid.replace("-", "").lower() + "\n",
            # Its uid is that of the guest's files.
            "etc/passwd": f"root:*:{self.stranger(new).get('user', os.geteuid())}:0:root:{self.root}/root:/bin/sh\n",
            "etc/systemd/enabled": "qemu-guest-agent.service\nssh.service\n",
            "etc/systemd/system/qemu-guest-agent.service": "",
            "etc/systemd/system/ssh.service": "",
            "etc/ssh/sshd_config": "",
            "etc/ssh/ssh_host_ed25519_key.pub": utm.app["host_key"].format(uuid.replace("-", "")) + "\n",
            "proc/sys/kernel/hostname": "kodeimage\n",
            "run/cloud-init/result.json": self._cloud_init_result(utm, uuid),
            **{
                f"bin/{name}": f'#!/bin/sh\nROOT=$(cd "${{0%/*}}/.." && pwd)\n{body}\n'
                for name, body in self.STUBS.items()
            },
        }
        for name, text in files.items():
            with open(os.path.join(new, name), "w", encoding="utf-8") as file:
                file.write(text)
            if name.startswith("bin/"):
                os.chmod(file.name, 0o755)
        for name in self.TOOLS.split():
            for program in filter(os.path.exists, (f"/usr/bin/{name}", f"/bin/{name}")):
                os.symlink(program, os.path.join(new, "bin", name))
                break
        self.give_away(new)
        os.rename(new, self.root)

    def boot(self, address: str) -> None:
        """What systemd and the services of a Linux do at boot, in the demo and the sandbox."""
        import subprocess

        key = os.path.join(self.root, "etc/ssh/ssh_host_ed25519_key")
        if not os.path.exists(key):
            for public in filter(os.path.exists, [key + ".pub"]):
                os.unlink(public)
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "root@guest", "-f", key]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        files = {"run/address": address + "\n"}
        if not os.path.getsize(os.path.join(self.root, "etc/machine-id")):
            files["etc/machine-id"] = os.urandom(16).hex() + "\n"
        for name, text in files.items():
            with open(os.path.join(self.root, name), "w", encoding="utf-8") as file:
                file.write(text)
        for stopped in filter(os.path.exists, [os.path.join(self.root, "run/ssh.stopped")]):
            os.unlink(stopped)
        self.give_away(self.root)

    @staticmethod
    def _cloud_init_result(utm: FakeUTM, uuid: str) -> str:
        """Whether cloud-init found its seed: on a disk, but not on the USB CD-ROM that a removable drive is."""
        vm = utm.find(uuid)
        found = vm and any(not drive["removable"] for drive in vm["drives"][1:])
        return f'{{"v1": {{"datasource": "DataSource{"NoCloud" if found else "None"}"}}}}\n'

    @staticmethod
    def stranger(path: str) -> dict[str, Any]:
        """Arguments of Popen that start a process as nobody, if nobody can own `path`. Only root needs them."""
        if os.geteuid() != 0:
            return {}
        import pwd

        nobody = pwd.getpwnam("nobody")
        try:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        except OSError:  # a namespace without other users: its root is an ordinary user outside
            return {}
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def give_away(self, top: str) -> None:
        owner = self.stranger(top)
        if owner:
            for folder, _, files in os.walk(top):
                for name in [folder, *(os.path.join(folder, file) for file in files)]:
                    os.chown(name, owner["user"], owner["group"], follow_symlinks=False)

    def inside(self, word: str) -> str:
        """A word of a command line with its absolute paths redirected into the guest."""
        import re

        def program(match: re.Match[str]) -> str:
            return f"{self.root}/bin/{match[1]}" if match[1] in self.STUBS else match.group()

        return re.sub(self.PROGRAM, program, re.sub(self.INSIDE, lambda match: self.root + match.group(), word))

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
        # PATH is always the guest's bin: the host's programs are not in the guest.
        surroundings = {**(given or {"HOME": self.root + "/root", "LANG": "C"}), "PATH": bin_folder}
        try:
            return subprocess.Popen(
                words, env=surroundings, cwd=self.root, stdin=stdin, stdout=stdout, stderr=stderr,
                start_new_session=True, **self.stranger(self.root),
            )
        except OSError as error:
            glib = f"Failed to execute child process \u201c{argv[0]}\u201d ({error.strerror})"
            raise Refused(-2700, f"Guest agent command failed, error was '{glib}'") from None


class Tool:
    """A program that sends Apple Events to UTM: the common part of utmctl and osascript, mainly the faults.

    A verb is a generator. It runs with the state open. Where it yields, that many seconds pass with the state
    closed. Before its first yield it sends the request, which may be refused; after that it prints the answer.
    """

    name = ""

    def __init__(self, utm: FakeUTM, argv: Sequence[str]) -> None:
        self.utm, self.argv = utm, argv
        self.verb = " ".join(argv[: 2 if argv[:1] in (["file"], ["usb"]) else 1])
        self.out: list[bytes] = []  # the output at the end, unless a fault replaces it: on stdout
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
        """Runs a verb, changed by the first fault that applies, and returns the exit status."""
        with self.utm as utm:
            self.rule = rule = utm.fault(self.name, verb, self.argv)
            self.language, latency = rule.get("language", utm.app["language"]), utm.app["latency"]
        time.sleep(latency)
        if rule.get("kill_parent") == "before":
            self.kill_parent()
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
        if rule.get("kill_parent") == "after":
            self.kill_parent()
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
        """Runs a verb to its end, or for `limit` seconds: then the caller gets another answer."""
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

    def need_agent(self, vm: Machine) -> Guest:
        self.utm.need_started(vm)
        if vm["backend"] != "qemu":
            raise Refused(-2700, "Operation not supported by the backend.")
        self.utm.agent(vm)
        return Guest(self.utm, vm["uuid"])

    def output(self, uuid: str, stream: Any) -> bytes:
        """The output of a command in a guest, which does not know that its `/` is a folder of this host."""
        stream.seek(0)
        octets: bytes = stream.read(self.utm.app["exec_limit"])
        return octets.replace(os.fsencode(self.utm.path("guests", uuid)), b"")

    @staticmethod
    def kill_parent() -> None:
        """Kills the caller with SIGKILL; this process continues."""
        import signal

        if os.getppid() > 1:  # 1: it is dead already
            os.kill(os.getppid(), signal.SIGKILL)

    @staticmethod
    def crash(name: str) -> None:
        """Dies of SIGTRAP or SIGABRT like a Swift program that unwraps nil, without a core file."""
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

    def version(self) -> tuple[int, ...]:
        """UTM's version, which decides the grammar. A UTM without the verb `version` counts as 4.7.1."""
        with self.utm as utm:
            return tuple(map(int, (utm.app["version"] or "4.7.1").split(".")))

    def usage(self, verb: str) -> str:
        """The grammar of a command. `attach` and `--attach` ended with 5.0.9; `--recovery` began with 4.7.0."""
        usage = self.USAGE[verb]
        usage = usage.replace(" [--attach]", "") if self.version() >= (5, 0, 9) else usage
        return usage.replace(" [--recovery]", "") if self.version() < (4, 7) else usage

    def parse(self) -> tuple[str, dict[str, Any]]:
        words = list(self.argv)
        for word in words[: words.index("--")] if "--" in words else words:
            if word.startswith(("---", "-=")):
                raise self.misuse("", f"Invalid option: {word}")
        missing = {"attach"} if self.version() >= (5, 0, 9) else set()
        missing |= {"version"} if self.version() < (4, 7, 2) else set()
        verbs = [verb for verb in self.USAGE if verb not in missing]
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
        usage = self.usage(verb)
        parts = [part.partition("]") for part in usage.split("[")[1:]]  # the part in brackets, and the part after it
        takes = {words.split()[0]: "".join(" " + word for word in words.split()[1:2]) for words, _, _ in parts}
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
                raise self.misuse(verb, f"The option '{long}' does not take any value, but '{value}' was specified.")
            else:
                options[long] = True
        for missing in "".join(after for _, _, after in parts).partition("--cmd")[0].split():
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
        """The value after `=`, or the next word unless it looks like an option."""
        if not value and (not words or (words[0].startswith("-") and words[0] != "-")):
            raise self.misuse(verb, f"Missing value for '{option}'", option)
        value = value or words.pop(0)
        if "--index" in option and not value[value[:1] in ("+", "-") :].isdecimal():
            raise self.misuse(verb, f"The value '{value}' is invalid for '{option}'", option)
        return value

    def misuse(self, verb: str, message: str, about: str = "") -> Exit:
        usage = self.usage(verb) if verb in self.USAGE else "<subcommand>"
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
        """The look-up of the machine and the verb itself, with the state open."""
        awake = self.utm.awake()
        if "--hide" in options:
            self.utm.app["keep_running"] = True
            if "hide_error" in self.rule:
                self.report(Refused(self.rule["hide_error"]))
        words: list[Any] = []
        if "<identifier>" in options:
            # Errors are not reported during the look-up: each of them ends in the same sentence.
            vm = self.utm.find(options["<identifier>"]) if awake else None
            if vm is None:
                raise Exit(1, self.NOT_FOUND)
            words.append(vm)
        method = getattr(self, "verb_" + verb.replace("-", "_").replace(" ", "_"))
        yield from method(*words, options)

    def again(self, vm: Machine) -> Machine:
        """The present state of the machine, after some time."""
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

    def verb_exec(self, vm: Machine, options: dict[str, Any]) -> Iterator[float]:
        """Up to 5.0.8 utmctl checks once, too early: it prints nothing, and the process continues. From 5.0.9 on the
        output arrives at the end of the process and is capped. A process killed by a signal counts as exit status 0."""
        import subprocess
        import tempfile

        yield 0
        guest = self.need_agent(self.again(vm))
        with (tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err):
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
            if self.version() < (5, 0, 9):
                return
            while process.poll() is None:
                yield 0.005
            self.status = max(0, process.returncode)
            for stream, lines in ((out, self.out), (err, self.err)):
                lines.append(self.output(vm["uuid"], stream))
        self.utm.power_off_if_asked(vm["uuid"])

    def read_stdin(self, into: Any) -> Iterator[float]:
        """Reads stdin to its end, with the state closed meanwhile: the writer may be slow."""
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
            raise Refused(-2700, f"failed to open file '{options['<path>']}' (mode: 'r'): {error.strerror}") from None

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


class AppleScript:
    """The statements of AppleScript that kodemachine's scripts use; any other is a syntax error (-2741).

    A line is a list of words: names and numbers as they are, texts with a leading quotation mark, and marks. A
    statement is a generator: where it yields, so many seconds pass with UTM's state closed. The traps are in section
    7 of the contract: see `property` and `assign`.
    """

    RESERVED = """
        about after against and apart around as aside at back before beginning behind below beneath beside between but
        by considering contain contains continue copy div does else end equal equals error every exit false first for
        from front get given global if ignoring in instead into is it its last local me middle mod my not of on onto
        or out over prop property put ref reference repeat return returning script second set since some tell that the
        then third through thru timeout times to transaction true try until where while whose with without result
    """.split()  # noqa: SIM905 (as a list it would fill a page)
    # The part of UTM's dictionary that is in use: properties of machines and records, and constants.
    PROPERTIES = (
        "id", "name", "icon", "status", "backend", "configuration", "memory", "cpu cores", "drives", "displays",
        "network interfaces", "serial ports", "interface", "address", "mode", "port", "host size", "removable",
        "exited", "exit code", "signal code", "output data", "error data", "output text", "error text", "class SrPt",
    )
    CONSTANTS = ("qemu", "apple", "unavailable", "ptty", "tcp", "shared", "host", "bridged", "emulated")
    KEYS = (*PROPERTIES, "architecture", "hypervisor", "uefi", "source")  # of a literal record
    LISTS = ("drives", "displays", "network interfaces")
    ICONS = ("", "linux", "debian", "ubuntu")

    def __init__(self, tool: Osascript, text: str) -> None:
        self.tool = tool
        self.names: dict[str, Any] = {}
        self.telling = False
        self.lines = [line for line in self.split(text) if line]
        if self.lines[:1] != [["on", "run", "argv"]]:
            self.misunderstood(["the beginning of the script"])
        self.body = self.nest(["end", "run"], 1)

    @staticmethod
    def misunderstood(line: Sequence[str]) -> Any:
        raise Exit(1, f"0:0: syntax error: {' '.join(line)} is not understood. (-2741)")

    # -- reading the text

    def split(self, text: str) -> list[list[str]]:
        text = text.replace("\u00ac\n", " ")
        lines: list[list[str]] = [[]]
        at = 0
        while at < len(text):
            char, start = text[at], at
            if char == "\n":
                lines.append([])
            elif text.startswith("--", at):
                at = text.index("\n", at) - 1
            elif char == '"':
                word = '"'
                at += 1
                while text[at] != '"':
                    if text[at] == "\\":
                        at += 1
                        word += {"n": "\n", "t": "\t"}.get(text[at], text[at])
                    else:
                        word += text[at]
                    at += 1
                lines[-1].append(word)
            elif char == "\u00ab":
                at = text.index("\u00bb", at)
                lines[-1].append(text[start + 1 : at])
            elif char.isalnum() or char == "_":
                while text[at : at + 1].isalnum() or text[at : at + 1] == "_" or (char.isdigit() and text[at] == "."):
                    at += 1
                lines[-1].append(text[start:at])
                continue
            elif not char.isspace():
                lines[-1].append(char)
            at += 1
        return lines

    def nest(self, end: Sequence[str], at: int) -> list[Any]:
        """The statements from line `at` on, up to the line `end`; those with a body are (line, [(line, body), ...])."""
        found: list[Any] = []
        self.at = at
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line == end:
                return found
            if line[0] == "else" or line[:2] == ["on", "error"]:
                return found
            self.at += 1
            opens = {"repeat": "repeat", "try": "try", "tell": "tell"}.get(line[0])
            if line[0] == "if" and line[-1] == "then":
                opens = "if"
            if line[:3] == ["with", "timeout", "of"] and line[-1] == "seconds":
                opens = "timeout"
            if not opens:
                self.check(line)
                found.append((line, []))
                continue
            parts = [(line, self.nest(["end", opens], self.at))]
            while self.at < len(self.lines) and self.lines[self.at] != ["end", opens]:
                branch = self.lines[self.at]
                if (branch[0] == "else") != (opens == "if"):
                    self.misunderstood(branch)
                parts.append((branch, self.nest(["end", opens], self.at + 1)))
            self.at += 1
            found.append((line, parts))
        raise self.misunderstood(["the end of the script"])

    def check(self, line: Sequence[str]) -> None:
        """Rejects simple statements that are not known."""
        if line[0] == "if" and "then" in line:
            return self.check(line[line.index("then") + 1 :])
        known = (["exit", "repeat"], ["update", "configuration"])
        if line[0] not in ("set", "return", "delay", "error") and line[:2] not in known:
            self.misunderstood(line)
        if line[0] == "set":
            target = [word for word in line[1 : line.index("to")] if word not in "{,}"]
            if line[1] != "{" and "of" in target:
                return None
            for name in target if line[1] == "{" else [" ".join(target)]:
                if name in self.RESERVED or name in self.PROPERTIES or not name.replace("_", "a").isalnum():
                    self.misunderstood(line)
        return None

    # -- running it

    def run(self, argv: Sequence[str]) -> Iterator[float]:
        self.names["argv"] = list(argv)
        yield 0
        done = yield from self.block(self.body)
        if done and done[0] == "return":
            self.tool.say(self.text(done[1]) + "\n")

    def block(self, statements: Sequence[Any]) -> Any:
        """Runs statements; returns ("return", value) or ("exit",) if one of them ended the block."""
        for line, parts in statements:
            done = yield from self.compound(line, parts) if parts else self.simple(line)
            if done:
                return done
        return None

    def compound(self, line: Sequence[str], parts: Sequence[Any]) -> Any:
        body = parts[0][1]
        if line[0] == "tell":
            if line != ["tell", "application", '"UTM']:
                self.misunderstood(line)
            self.telling = True
            done = yield from self.block(body)
            self.telling = False
            return done
        if line[0] == "with":
            return (yield from self.block(body))
        if line[0] == "try":
            try:
                return (yield from self.block(body))
            except Refused as failure:
                handler, statements = parts[1] if parts[1:] else ([], [])
                if handler[2:]:  # on error TEXT number NUMBER
                    self.names.update({handler[2]: self.tool.sentence(failure), handler[4]: failure.number})
                return (yield from self.block(statements))
        if line[0] == "if":
            for condition, statements in parts:
                words = condition[condition.index("if") + 1 : -1] if "if" in condition else []
                if not words or self.value(words):
                    return (yield from self.block(statements))
            return None
        for name, item in self.rounds(line):
            self.names.update({name: item})
            done = yield from self.block(body)
            if done and done[0] == "return":
                return done
            if done:
                return None
        return None

    def rounds(self, line: Sequence[str]) -> Iterator[tuple[str, Any]]:
        if line == ["repeat"]:
            while True:
                yield "", None
        if line[:2] != ["repeat", "with"] or line[3] not in ("in", "from"):
            self.misunderstood(line)
        if line[3] == "in":
            items = self.value(line[4:])
        else:
            to = line.index("to")
            items = range(self.value(line[4:to]), self.value(line[to + 1 :]) + 1)
        for item in items:
            yield line[2], item

    def simple(self, line: Sequence[str]) -> Any:
        if line[0] == "if":
            then = line.index("then")
            return (yield from self.simple(line[then + 1 :])) if self.value(line[1:then]) else None
        if line[0] == "return":
            return "return", self.value(line[1:])
        if line[0] == "exit":
            return ("exit",)
        if line[0] == "delay":
            yield float(self.value(line[1:]))
        elif line[0] == "error":
            at = len(line) - 1 - line[::-1].index("number")
            raise Refused(self.value(line[at + 1 :]), "\0" + self.value(line[1:at]))
        elif line[0] == "update":
            at = line.index("with")
            vm = self.machine(self.value(line[3:at]))
            self.update(vm, self.value(line[at + 1 :]))
            yield 0
        else:
            at = line.index("to")
            value = yield from self.command(line[at + 1 :])
            self.assign(line[1:at], value)
        return None

    def command(self, words: Sequence[str]) -> Any:
        """The value of an expression, or of one of UTM's commands, which take time."""
        if words[:3] == ["make", "new", "virtual"]:
            return (yield from self.make(words))
        if words[0] == "execute":
            return self.execute(words)
        if words[:2] == ["get", "result"]:
            yield 0
            return self.result(self.value(words[2:]))
        return self.value(words)

    def assign(self, target: Sequence[str], value: Any) -> None:
        if target[0] == "{":
            names = [word for word in target if word not in "{,}"]
            if len(names) != len(value):
                raise Refused(-1728, "Can’t get item.")
            self.names.update(zip(names, value))
        elif "of" in target:
            at = target.index("of")
            name, record = " ".join(target[:at]), self.value(target[at + 1 :])
            if not isinstance(record, dict) or name not in record or name == "serial ports":
                raise Refused(-10006, f"Can’t set {name}.")
            record[name] = value
        else:
            # A record in a variable is no longer fresh from UTM.
            self.names[target[0]] = {**value} if isinstance(value, Fresh) else value

    # -- expressions

    def value(self, words: Sequence[str]) -> Any:
        """An expression; the loosest operator first. Parentheses and braces are skipped."""
        left, right = self.cut(words, "or")
        if right:
            return self.value(left) or self.value(right)
        if words[0] == "not":
            return not self.value(words[1:])
        left, right = self.cut(words, "is")
        if right:
            if right[0] == "not":
                return self.value(left) != self.value(right[1:])
            return self.value(left) == self.value(right)
        for operator in "<>":
            left, right = self.cut(words, operator)
            if right:
                a, b = self.value(left), self.value(right)
                return a < b if operator == "<" else a > b
        left, right = self.cut(words, "&", last=True)
        if right:
            return self.text(self.value(left)) + self.text(self.value(right))
        left, right = self.cut(words, "+", last=True)
        if right:
            return self.value(left) + self.value(right)
        left, right = self.cut(words, "as", last=True)
        if right:
            return int(self.value(left)) if right == ["integer"] else self.misunderstood(words)
        return self.term(words)

    def cut(self, words: Sequence[str], operator: str, last: bool = False) -> tuple[Sequence[str], Sequence[str]]:
        """The words before and after an operator outside of parentheses; without the operator, nothing after it."""
        depth, places = 0, []
        for at, word in enumerate(words):
            depth += (word in ("(", "{")) - (word in (")", "}"))
            if word == operator and not depth and at:
                places.append(at)
        if not places:
            return words, []
        at = places[-1 if last else 0]
        return words[:at], words[at + 1 :]

    def term(self, words: Sequence[str]) -> Any:
        first = words[0]
        if first[0] == '"' and len(words) == 1:
            return first[1:]
        if first[0].isdigit() and len(words) == 1:
            return float(first) if "." in first else int(first)
        if first == "-" and len(words) == 2:
            return -self.value(words[1:])
        if first == "(" and words[-1] == ")":
            return self.value(words[1:-1])
        if first == "{" and words[-1] == "}":
            return self.braces(words[1:-1])
        if words == ["linefeed"]:
            return "\n"
        if first in ("true", "false") and len(words) == 1:
            return first == "true"
        if first == "get":
            return self.value(words[1:])
        if first == "POSIX" and words[1] == "file":
            path = self.value(words[2:])
            if self.telling:  # the request goes to UTM, which has no such object
                raise Refused(-1728, f"Can’t get POSIX file \"{path}\".")
            return path
        if words[:2] == ["virtual", "machines"] and len(words) == 2:
            self.tool.event("virtual machines")
            return [Reference(vm["uuid"]) for vm in (self.tool.utm.vms if self.tool.utm.awake() else [])]
        if words[:3] == ["virtual", "machine", "id"]:
            return Reference(self.value(words[3:]))
        return self.part(words)

    def part(self, words: Sequence[str]) -> Any:
        """`count of`, `item n of`, `items a thru b of`, a property of something, a name or a constant."""
        left, right = self.cut(words, "of")
        if right:
            if left == ["count"]:
                return len(self.value(right))
            if left[0] in ("item", "items"):
                whole = self.value(right)
                first, last = self.cut(left[1:], "thru")
                at = self.value(first)
                self.must_have(whole, at)
                if last == ["-", "1"]:
                    return whole[at - 1 :]
                return self.misunderstood(words) if last else whole[at - 1]
            if " ".join(left) in self.PROPERTIES:
                return self.property(" ".join(left), self.value(right))
        if len(words) == 1 and words[0] in self.names:
            return self.names[words[0]]
        if len(words) == 1 and words[0] in self.CONSTANTS and self.telling:
            return Constant(words[0])
        raise Refused(-2753, f"The variable {' '.join(words)} is not defined.")

    @staticmethod
    def must_have(items: Any, at: int) -> None:
        if not isinstance(items, list) or not 1 <= at <= len(items):
            raise Refused(-1728, f"Can’t get item {at}.")

    def braces(self, words: Sequence[str]) -> Any:
        """A list or a record."""
        parts: list[Sequence[str]] = []
        while words:
            part, words = self.cut(words, ",")
            parts.append(part)
        if not (parts and self.cut(parts[0], ":")[1]):
            return [self.value(part) for part in parts]
        record = {}
        for part in parts:
            key, value = self.cut(part, ":")
            if " ".join(key) not in self.KEYS:
                self.misunderstood(part)
            record[" ".join(key)] = self.value(value)
        return record

    def text(self, value: Any) -> str:
        if isinstance(value, (dict, list, Reference)):
            raise Refused(-1700, "Can’t make this into type text.")
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)

    # -- UTM's objects

    def machine(self, reference: Any) -> Machine:
        if not isinstance(reference, Reference):
            raise Refused(-1708, "It doesn’t understand the message.")
        vm = self.tool.utm.find(reference.uuid) if self.tool.utm.awake() else None
        if vm is None or vm["uuid"] != reference.uuid:
            raise Refused(-1728, f'Can’t get virtual machine id "{reference.uuid}".')
        return vm

    def property(self, name: str, thing: Any) -> Any:
        if isinstance(thing, Reference):
            self.tool.event(f"get {name}", thing.uuid)
            vm = self.machine(thing)
            if name == "serial ports":
                return [self.serial_port(serial) for serial in vm["serials"]]
            if name == "configuration":
                return Fresh(self.configuration(vm))
            if name in ("id", "backend"):
                return vm["uuid"] if name == "id" else Constant(vm["backend"])
        if isinstance(thing, dict):
            # These words mean the class of a record; and a record that is not in a variable has no lists.
            trapped = name == "serial ports" or (isinstance(thing, Fresh) and name in self.LISTS)
            if name in thing and not trapped:
                return thing[name]
        raise Refused(-1728, f"Can’t get {name}.")

    @staticmethod
    def serial_port(serial: dict[str, Any]) -> dict[str, Any]:
        """A serial port in a script. A stopped machine still has the pty of its last run."""
        kind = serial["kind"]
        if kind == "tcp":
            return {"interface": Constant("tcp"), "address": serial["host"], "port": serial["port"]}
        if kind == "ptty" and serial.get("path"):
            return {"interface": Constant("ptty"), "address": serial["path"], "port": 0}
        return {"interface": Constant("unavailable"), "address": "", "port": 0}

    @staticmethod
    def configuration(vm: Machine) -> dict[str, Any]:
        kinds = {"ptty": "ptty", "tcp": "tcp", "terminal": "unavailable"}
        drives = [
            {"id": drive["id"], "removable": drive["removable"], "host size": drive["size"]} for drive in vm["drives"]
        ]
        return {
            "name": vm["name"], "icon": vm["icon"], "memory": vm["memory"], "cpu cores": vm["cpus"], "drives": drives,
            "network interfaces": [
                {"address": mac, "mode": Constant(FakeUTM.mode(vm, n))} for n, mac in enumerate(vm["macs"])
            ],
            "displays": [{} for _ in vm["displays"]],
            "class SrPt": [{"interface": Constant(kinds[serial["kind"]])} for serial in vm["serials"]],
        }

    def update(self, vm: Machine, record: Any) -> None:
        self.tool.event("update configuration", vm["uuid"])
        self.tool.utm.need_stopped(vm)
        if record["icon"] not in self.ICONS:
            raise Refused(-2700, f"The icon named ‘{record['icon']}’ cannot be found in the built-in icons.")
        kept = [drive["id"] for drive in record["drives"]]
        vm["drives"] = [drive for drive in vm["drives"] if drive["id"] in kept]
        nics = record["network interfaces"]
        self.tool.utm.configure(vm, record["name"], record["memory"], record["cpu cores"], nics)

    def make(self, words: Sequence[str]) -> Any:
        at = words.index("properties")
        given = self.value(words[at + 1 :])
        record = given["configuration"]
        self.tool.event("make")
        if str(given["backend"]) != "qemu" or record.get("architecture") not in ("aarch64", "x86_64"):
            raise Refused(-2700, "No architecture specified in the configuration.")
        self.tool.utm.awake()
        uuid, seconds = self.tool.utm.make(record)
        yield seconds
        return Reference(uuid)

    def execute(self, words: Sequence[str]) -> Process:
        labels = [["with", "arguments"], ["using", "input"], ["base64", "encoding"], ["output", "capturing"]]
        vm_words, rest = self.cut(words[1:], "at")
        given: dict[str, Any] = {}
        label = "at"
        while rest:
            starts = [at for at in range(len(rest)) if list(rest[at : at + 2]) in labels]
            end = starts[0] if starts else len(rest)
            given[label] = self.value(rest[:end])
            label, rest = " ".join(rest[end : end + 2]), rest[end + 2 :]
        vm = self.machine(self.value(vm_words))
        self.tool.event("execute", vm["uuid"])
        return self.tool.execute(vm, given)

    def result(self, process: Any) -> dict[str, Any]:
        if not isinstance(process, Process):
            raise Refused(-1708, "It doesn’t understand the message.")
        self.tool.event("get result", process.uuid)
        return self.tool.result(process)


class Fresh(dict):  # type: ignore[type-arg]
    """A record as UTM has just sent it, before it is kept in a variable."""


class Constant(str):
    """A constant of UTM's dictionary. It equals itself, but not the text of its name."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and str(self) == str(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class Reference:
    """A reference to a virtual machine in a script."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid


class Process:
    """A command in a guest, and the files for its output. child None: the agent has forgotten it."""

    def __init__(self, uuid: str, child: Any, out: Any, err: Any) -> None:
        self.uuid, self.child, self.streams = uuid, child, {"output": out, "error": err}


class Osascript(Tool):
    """Compiles the text of a script and runs it. The name in its first line, `-- kodemachine: NAME`, counts only for
    faults and the journal. Unlike utmctl, osascript exits with 1 when an event fails."""

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
        while self.words[:1] == ["-e"]:
            scripts.append(self.words[1])
            del self.words[:2]
        if self.words[:1] == ["--"]:
            del self.words[0]
        self.text = "\n".join(scripts)
        marked = self.text.split(None, 3)
        self.verb = marked[2] if marked[:2] == ["--", "kodemachine:"] and marked[2:] else ""

    def run(self) -> int:
        return self.serve(self.verb, AppleScript(self, self.text).run(self.words))

    def event(self, event: str, uuid: str = "") -> None:
        """Sends one Apple Event. Refused if a fault is planned for it."""
        for rule in self.utm.state["faults"]:
            vm = self.utm.find(rule["vm"]) if "vm" in rule else None
            if rule.get("event") != event or (vm and vm["uuid"] != uuid):
                continue
            rule["seen"] = rule.get("seen", 0) + 1
            count = rule["seen"] - rule.get("skip", 0)
            if 0 < count <= rule.get("times", count) and rule.get("nth", count) == count:
                raise Refused(rule["error"], rule.get("string", ""))

    def sentence(self, error: Refused) -> str:
        """The text of an error in a script. Errors of the script itself are marked with a zero byte."""
        if error.words.startswith("\0"):
            return error.words[1:]
        words = error.words or self.ERRORS.get(error.number, "An error has occurred.")
        return words if error.number in self.ERRORS and not error.words else "UTM got an error: " + words

    def report(self, error: Refused) -> None:
        self.complain(f"0:0: execution error: {self.sentence(error)} ({error.number})\n")
        self.status = 1

    def execute(self, vm: Machine, given: dict[str, Any]) -> Process:
        import tempfile

        guest = self.need_agent(vm)
        text = given.get("using input", "").encode()
        if given.get("base64 encoding"):
            import base64

            text = base64.b64decode(text, validate=True)
        stdin, out, err = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115 (they end with this process)
        stdin.write(text)
        stdin.seek(0)
        child = guest.run([given["at"], *given.get("with arguments", [])], [], stdin, out, err)
        self.utm.journal(guest=child.pid)
        return Process(vm["uuid"], child, out, err)

    def result(self, process: Process) -> dict[str, Any]:
        """The guest agent's report on a command. After it has reported the end, it forgets the command."""
        import base64

        if process.child is None:
            raise Refused(-2700, "Guest agent command failed, error was 'PID does not exist'")
        code = process.child.poll()
        if code is None:
            return {"exited": False, "exit code": 0, "signal code": 0}
        process.child = None
        found: dict[str, Any] = {"exited": True, "exit code": max(0, code), "signal code": max(0, -code)}
        for name, stream in process.streams.items():
            data = self.output(process.uuid, stream)
            if data:
                found[f"{name} data"] = base64.b64encode(data).decode()
                found[f"{name} text"] = data.decode("utf-8", "replace")
        self.utm.power_off_if_asked(process.uuid)
        return found


class Session:
    """A person's shell in a guest, in the demo and the sandbox; or the one command that they have sent.

    Its programs are the guest's and those of the folder `tools`. They run on this computer, and like all that runs in a
    guest they are nobody's if the caller is root.
    """

    PASSWORD = "sandbox"
    SFTP = ("/usr/lib/openssh", "/usr/libexec", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/lib/misc")

    def __init__(self, utm: FakeUTM, uuid: str) -> None:
        with utm:
            self.guest = Guest(utm, uuid)
        with open(self.guest.file("/etc/hostname"), encoding="utf-8") as file:
            self.label = file.read().strip()
        self.tools = utm.path("tools")

    def log_in(self) -> None:
        """Asks for a name and a password, as getty does."""
        import getpass

        while True:
            name = input(f"\n{self.label} login: ")
            if name and (name, getpass.getpass("Password: ")) == ("root", self.PASSWORD):
                return
            print("\nLogin incorrect" if name else "", flush=True)

    def become_shell(self, name: str, command: str) -> None:
        """Becomes the shell of the user `name`; runs `command` in it unless that is empty."""
        home = self.guest.file("/root" if name == "root" else "/home/" + name)
        os.makedirs(home, exist_ok=True)
        env = {
            "HOME": home, "USER": name, "LOGNAME": name, "PATH": f"{self.guest.root}/bin:{self.tools}",
            "SHELL": "/bin/sh", "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb"),
            "PS1": f"{self.label}:~{'$' if 'SSH_CONNECTION' in os.environ else '#'} ",
            "BASH_SILENCE_DEPRECATION_WARNING": "1",
        }
        words = ["/bin/sh"]
        if os.path.exists("/bin/bash"):
            env.update(SHELL="/bin/bash", PS1=env["PS1"].replace("~", "\\w"))
            words = ["/bin/bash", "--noprofile", "--norc"]
        if command == "internal-sftp":
            words = next([path] for path in (f"{folder}/sftp-server" for folder in self.SFTP) if os.path.exists(path))
        elif command:
            words = [words[0], "-c", self.guest.inside(command)]
        owner = self.guest.stranger(home)
        if owner:
            os.setgroups(owner["extra_groups"])
            os.setgid(owner["group"])
            os.setuid(owner["user"])
        os.chdir(home)
        os.execve(words[0], words, env)


def open_session(utm: FakeUTM, uuid: str, *console: str) -> None:
    """Becomes the forced command of a guest's sshd, or what is at its serial console."""
    session = Session(utm, uuid)
    if console:
        session.log_in()
    name = "root" if console else os.environ["USER"]
    session.become_shell(name, os.environ.get("SSH_ORIGINAL_COMMAND", ""))


def fake_main(tool: str, folder: str) -> int:
    """The fake program `tool`: Utmctl or Osascript, the real ssh or scp with the test's configuration, or a Session."""
    utm, argv = FakeUTM(folder), sys.argv[1:]
    if tool == "session":
        open_session(utm, *argv)
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


# ---- the tests' side
#
# How a test is written. `Case.setUp` makes a private home and an empty fake UTM, self.utm. A test adds machines to it,
# plans faults if it wants any, runs kodemachine as its users do, and checks the exit status, the output, the machines
# and the calls. Only the tests of pure functions, and a few that need another system, call functions of kodemachine.py.
#
#     class StopTest(Case):
#         def test_lost_answer_does_not_decide(self) -> None:
#             uuid = self.vm("a", "started", request_seconds=0.5)      # self.utm.add("km-a", status="started", ...)
#             self.utm.fault("stop", error=-1712, when="after")        # UTM does it, and reports a time-out
#             self.assert_says(self.km("stop", "a"), 0, "a stopped")   # kodemachine: exit status, words on stderr
#             self.assertEqual(self.states(), {"km-a": "stopped"})     # the machines of the fake
#             self.assertEqual(self.asked("stop"), [[uuid, "--request"]])
#
# - The fields of a machine are in FakeUTM.new_machine, those of the app in Utm, the faults in Utm.fault.
# - self.km waits for the end; self.start_km returns a process, self.km_tty and self.screen a Terminal. Wait for an
#   event with wait_for(lambda: self.calls_of("stop")), never with time.sleep; then get the result with self.ended.
# - GREETERS = 1 in a class: there is an image, and guests answer like sshd. self.with_sshd() has a real sshd.
# - self.config writes config.json, self.remember adds to machines.json, self.read and self.write are for other files.
# - The limits of kodemachine are shorter in tests (PATIENCE): a test needs no patience to see a time-out.

TOOLS = ("utmctl", "osascript", "ssh", "scp")       # the programs on PATH that are fakes, or journaled
IMAGE = "kodeimage-v0.2.0"
JSON_KEYS = ["label", "name", "uuid", "status", "ip", "image", "memory", "size", "reclaimable", "created",
             "network"]
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "Fake" * 10 + "Fak"


@functools.lru_cache(maxsize=None)  # noqa: UP033 (functools.cache is this, spelled for 3.9 on)
def fake_module() -> bytes:
    """The fake UTM as a compiled module. Its line numbers are those of this file, for tracebacks."""
    with open(__file__, encoding="utf-8") as file:
        lines = file.readlines()
    first, end = lines.index("# ---- the fake UTM\n"), lines.index("# ---- the tests' side\n")
    text = FAKE_IMPORTS + "\n" * first + "".join(lines[first:end])
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = os.path.join(folder, "fakeutm.py"), os.path.join(folder, "fakeutm.pyc")
        write_text(source, text)
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(source, compiled, os.path.abspath(__file__), doraise=True, invalidation_mode=unchecked)
        with open(compiled, "rb") as octets:
            return octets.read()


def wait_for(predicate: Callable[[], Any], limit: float = 60) -> Any:
    """Waits until `predicate` is true, and returns its result; fails after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        found = predicate()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {limit} s: {inspect.getsource(predicate).strip()}")
        time.sleep(0.01)


class Utm:
    """A test's handle on its fake UTM: adds machines, plans faults, returns the calls."""

    def __init__(self, folder: str) -> None:
        os.makedirs(os.path.join(folder, "guests"))
        for part in (folder, os.path.join(folder, "guests")):
            os.chmod(part, 0o711)  # guest processes may run as nobody, and must reach their files
        self.folder, self.fake = folder, FakeUTM(folder)
        app = {
            "running": True,
            "ready_at": 0.0,  # seconds since the epoch
            "launch_seconds": 0.0,
            "keep_running": False,
            "regenerate_mac": False,
            "version": "5.0.9",  # None: a utmctl without that verb
            "language": "en",
            "latency": 0.0,  # seconds every call takes
            "clone_seconds": 0.0,
            "delete_seconds": 0.0,
            "exec_limit": 16 << 20,  # bytes
            "documents": None,  # a folder: machines are packages in it, too
            "addresses": [f"127.0.0.{n}" for n in range(2, 10)],  # for machines without `ips`, one each
            "consoles": {},  # by address, the device of the serial console; with these, guests boot: Guest.boot
            "host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "Fake" * 10 + "Fak root@guest",
        }
        with open(self.fake.path("state"), "wb") as file:
            marshal.dump({"app": app, "vms": [], "faults": [], "pending": [], "orphans": []}, file, 2)

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
                    # All output is written; an orderly end of the interpreter would take 2 ms.
                    f"{start}import os, sys\nsys.path.insert(0, {self.folder!r})\n"
                    f"from fakeutm import fake_main\nos._exit(fake_main({tool!r}, {self.folder!r}))\n"
                )
            os.chmod(file.name, 0o755)

    def add(self, name: str, **fields: Any) -> str:
        """A new machine at the end of the list; returns its UUID."""
        vm = FakeUTM.new_machine(name)
        unknown = set(fields) - set(vm)
        assert not unknown, f"no such fields: {unknown}"
        vm.update(fields)
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
        """Changes settings of the app; `ready_in` (seconds) sets `ready_at`."""
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
          event         one Apple Event of a script, such as "get result"; with error, string, vm, skip, times and nth
          skip, times   not the first calls that match; only so many
          nth           only the nth after those skipped, from 1
        What happens:
          error, string the OSStatus number, UTM's own words
          lookup        with error: the look-up fails, "Virtual machine not found.", as without permission
          language      of the error: "de", "ja"
          crash, hang   dies by "TRAP" or "ABRT"; never ends
          silent, empty no action and no output; list's header alone
          unknown       list: machines whose status fails, by name
          blank         list: a row without UUID and name
          partial       clone: "no-rename", "copy-only"; "half": UTM quits meanwhile; "short": it copies less
          stdout, stderr, status  in place of everything else
          hide_error    the number of an error of --hide, before the verb succeeds
          no_app        "Application not found."
          kill_parent   the caller is killed, "before" or "after" it is done
        How:
          when          "before" (nothing is done; the default) or "after" (done all the same)
          delay         seconds until it is done
          report_after  seconds until the caller gets the answer; the action continues by itself
        """
        known = (
            "tool vm contains event skip times nth error string crash hang silent empty stdout stderr status no_app"
            " kill_parent lookup language partial unknown blank hide_error when delay report_after"
        )
        assert not set(rule) - set(known.split()), rule
        with self.fake as utm:
            utm.state["faults"].append({"verb": verb, **rule})

    def clear_faults(self) -> None:
        with self.fake as utm:
            utm.state["faults"] = []

    def hangs(self) -> bool:
        """Whether a fault makes calls hang."""
        with self.fake as utm:
            return any(rule.get("hang") for rule in utm.state["faults"])

    def met(self) -> int:
        """How many calls have met a fault rule; a call in `calls` may not have got that far yet."""
        with self.fake as utm:
            return sum(rule.get("seen", 0) for rule in utm.state["faults"])

    def clones(self) -> bool:
        """Whether the app has got a request to clone. Before that, the next run would wait for the time limit."""
        with self.fake as utm:
            return any(action in ("insert", "rename") for _, action, *_ in utm.state["pending"])

    def restart(self) -> None:
        """UTM quits and restarts: all machines are stopped, and saved sessions wait for the next start."""
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
        entries: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError, EOFError), open(self.fake.path("calls.log"), "rb") as file:
            while True:
                entries.append(marshal.load(file))
        return entries

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
        looks = verb is None and tool == "ssh"      # `ssh -G` only asks what the configuration says
        return [call for call in calls if call["tool"] == tool and verb in (None, call["verb"])
                and not (looks and call["argv"][:1] == ["-G"])]

    def verbs(self) -> list[str]:
        """The verbs of utmctl's calls, in their order."""
        return [call["verb"] for call in self.calls()]


class Sshd:
    """A real sshd on some of 127.0.0.2, 127.0.0.3 ..., with throw-away keys for the host and for the user."""

    OPTIONS = {
        "PidFile": "none", "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no",
        "PermitRootLogin": "yes", "PermitUserRC": "no", "MaxStartups": 100, "PrintMotd": "no", "PrintLastLog": "no",
        "Subsystem": "sftp internal-sftp",
    }

    @staticmethod
    def program() -> str | None:
        return shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/libexec"]))

    @staticmethod
    def why_not(hosts: Sequence[str]) -> str:
        """The reason why it cannot run here, if there is one."""
        if not Sshd.program() or not shutil.which("ssh-keygen"):
            return "no sshd here"
        return next(filter(None, map(Sshd.why_not_bind, hosts)), "")

    @staticmethod
    def why_not_bind(host: str) -> str:
        """The reason why nothing can listen at an address, if there is one."""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, 0))
            except OSError:
                return f"this machine has no address {host}"
        return ""

    @staticmethod
    def make_run_folder() -> None:
        """Debian's sshd, as root, refuses to start without this folder, which an init system makes."""
        if os.geteuid() == 0 and sys.platform == "linux":
            os.makedirs("/run/sshd", 0o755, exist_ok=True)

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
        return read_text(self.path("host.pub")).strip()

    def start(self, sftp: bool = True) -> None:
        program = self.program()
        assert program
        self.make_run_folder()
        options = {
            **self.OPTIONS,
            "Port": self.port,
            "HostKey": f'"{self.path("host")}"',
            "AuthorizedKeysFile": f'"{self.path("user.pub")}"',
            "LogLevel": "VERBOSE",
        }
        if not sftp:
            del options["Subsystem"]
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
    """A program on a terminal of its own, and the person who uses it."""

    # Only the leader of the new session can make the terminal its own. (os.login_tty is not in 3.9.)
    LOGIN = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, argv: Sequence[str], env: dict[str, str], cwd: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = self.attributes()
        self.seen = b""  # all output so far
        self._read = 0  # how much of it expect() has consumed
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.LOGIN, *argv],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=env, cwd=cwd, start_new_session=True,
        )

    def attributes(self) -> list[Any]:
        """The result of termios.tcgetattr, to compare with `before`.

        It asks the master side: macOS revokes the other side when the session's leader ends.
        """
        return termios.tcgetattr(self.master)

    def send(self, octets: bytes) -> None:
        os.write(self.master, octets)

    def _take(self, seconds: float) -> bool:
        """Reads the output within that time; returns whether there was any."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        octets = os.read(self.master, 65536)        # empty: macOS has revoked the other side, and everything is read
        self.seen += octets
        return bool(octets)

    def expect(self, pattern: bytes, limit: float = 60) -> re.Match[bytes]:
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

    def wait(self, limit: float = 60) -> int:
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


class Greeter:
    """A server that greets like sshd and hangs up, on some addresses at one port."""

    def __init__(self, hosts: Sequence[str], greeting: bytes = b"SSH-2.0-test\r\n", port: int = 0) -> None:
        self._greeting, self.port = greeting, port
        self._wake, self._woken = socket.socketpair()
        self._listeners = [self._listen(host) for host in hosts]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _listen(self, host: str) -> socket.socket:
        listener = socket.create_server((host, self.port), backlog=100)
        self.port = listener.getsockname()[1]
        return listener

    def _serve(self) -> None:
        while True:
            ready = select.select([self._woken, *self._listeners], [], [])[0]
            if self._woken in ready:
                return
            for listener in ready:
                with contextlib.suppress(OSError), listener.accept()[0] as connection:
                    connection.sendall(self._greeting)

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for end in (self._wake, self._woken, *self._listeners):
            end.close()


def host_key(kind: str = "ssh-ed25519", inside: str = "") -> str:
    """A well-formed public key; `inside`: another type within the key."""
    name = (inside or kind).encode()
    return f"{kind} {base64.b64encode(len(name).to_bytes(4, 'big') + name + bytes(36)).decode()}"


def hours_ago(hours: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - hours * 3600))


def allocated(folder: str) -> int:
    """Bytes in blocks that the files in a folder occupy."""
    found = [os.lstat(os.path.join(top, name)) for top, _, names in os.walk(folder) for name in names]
    return sum({(info.st_dev, info.st_ino): info.st_blocks * 512 for info in found}.values())


def read_text(path: str) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def write_text(path: str, text: str, mode: int | None = None) -> str:
    """Writes a file, with the folders that it takes, and returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    if mode is not None:
        os.chmod(path, mode)
    return path


class Case(unittest.TestCase):
    """A private home with blanks in its path, an empty fake UTM, and none of this machine's own settings."""

    maxDiff = None
    GREETERS = 0        # how many of the guests' addresses greet as ssh servers do; if any, there is an image, too

    def setUp(self) -> None:
        # Resolved because macOS' temporary folder is a link; without blanks because guests' scripts name it.
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="kodemachine-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        os.chmod(self.folder, 0o711)
        self.home = os.path.join(self.folder, "home of a user")
        self.bin = os.path.join(self.folder, "fake bin")
        self.state = os.path.join(self.home, ".local", "state", "kodemachine")
        self.uses: dict[str, Any] = {}      # what config.json has
        os.mkdir(self.home)
        os.mkdir(self.bin)
        self.utm = Utm(os.path.join(self.folder, "utm"))
        self.utm.install(self.bin, *TOOLS)
        self.ssh_config = self.write(os.path.join(self.utm.folder, "ssh_config"), "# for every ssh of this test\n")
        for tool in ("ssh", "scp"):
            self.real_tool(tool, shutil.which(tool) or "/usr/bin/false")
        self.environment = {
            "HOME": self.home,
            "PATH": os.pathsep.join([self.bin, "/usr/bin", "/bin", "/usr/sbin", "/sbin"]),
            "TERM": "dumb", "TMPDIR": self.folder, "USER": "tester", "LOGNAME": "tester",
        }
        for tool in TOOLS:
            found = shutil.which(tool, path=self.environment["PATH"])
            self.assertEqual(found, os.path.join(self.bin, tool), "not the fake")
        self.addCleanup(self._kill_the_rest)
        if self.GREETERS:
            self.base = self.image()
            self.greet()

    # -- files

    def read(self, path: str) -> str:
        """The text of a file; a relative path starts at the home."""
        return read_text(os.path.join(self.home, path))

    def write(self, path: str, text: str, mode: int | None = None) -> str:
        """Writes a file, with the folders that it takes, and returns its path; a relative one starts at the home."""
        return write_text(os.path.join(self.home, path), text, mode)

    def files(self) -> list[str]:
        """Every file and folder in the home."""
        return [os.path.join(top, name) for top, folders, files in os.walk(self.home) for name in (*folders, *files)]

    def config(self, **keys: Any) -> str:
        """Writes config.json with these keys alone, and returns its path."""
        self.uses = keys
        return self.write(".config/kodemachine/config.json", json.dumps(keys))

    def use(self, **keys: Any) -> None:
        """Adds to config.json."""
        self.config(**{**self.uses, **keys})

    def ssh_options(self, text: str) -> None:
        """Adds to the configuration of every ssh of this test."""
        with open(self.ssh_config, "a", encoding="utf-8") as file:
            file.write(text)

    def real_tool(self, tool: str, path: str) -> None:
        """The program that the journal's ssh or scp becomes."""
        self.write(os.path.join(self.utm.folder, tool + ".real"), path)

    def write_state(self, name: str, text: str) -> None:
        """Writes a file in kodemachine's state folder, as private as its own."""
        os.makedirs(self.state, 0o700, exist_ok=True)
        self.write(os.path.join(self.state, name), text, 0o600)

    def read_state(self, name: str) -> str:
        """A file in kodemachine's state folder; "" if it is missing."""
        with contextlib.suppress(FileNotFoundError):
            return self.read(os.path.join(self.state, name))
        return ""

    def records(self) -> dict[str, dict[str, Any]]:
        """machines.json."""
        return dict(json.loads(self.read_state("machines.json") or "{}"))

    def record(self, label: str) -> dict[str, Any]:
        """The record of a machine that exists."""
        return self.records().get(self.utm.machine("km-" + label)["uuid"], {})

    def remember(self, **records: dict[str, Any]) -> None:
        """Adds to machines.json; the keys are labels."""
        known = self.records()
        for label, fields in records.items():
            known.setdefault(self.utm.machine("km-" + label)["uuid"], {"name": "km-" + label}).update(fields)
        self.write_state("machines.json", json.dumps(known))

    @contextlib.contextmanager
    def held_lock(self, name: str) -> Iterator[None]:
        """Another kodemachine (pid 4242) holds this lock."""
        path = self.write(os.path.join(self.state, "locks", name + ".lock"), "4242\n")
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read_only(self, folder: str, argv: Sequence[str]) -> Result:
        """Runs a command to its end while nothing can be written into a folder."""
        if os.geteuid():
            os.chmod(folder, 0o500)
            self.addCleanup(os.chmod, folder, 0o700)
            return self.run_program(argv)
        unshare, mount = shutil.which("unshare"), shutil.which("mount")
        if not (unshare and mount):
            self.skipTest("root may write everywhere")
        script = f'{mount} --bind "$0" "$0" && {mount} -o remount,bind,ro "$0" && exec "$@"'
        return self.run_program([unshare, "-m", "/bin/sh", "-c", script, folder, *argv])

    # -- machines

    def image(self, name: str = IMAGE, **fields: Any) -> str:
        return self.utm.add(name, **fields)

    def vm(self, label: str, status: str = "stopped", **fields: Any) -> str:
        return self.utm.add("km-" + label, status=status, **fields)

    def remove(self, name: str) -> None:
        """Deletes a machine in UTM's own window."""
        with self.utm.fake as utm:
            vm = utm.find(name)
            assert vm
            utm.remove(vm["uuid"])

    def states(self) -> dict[str, str]:
        return {vm["name"]: vm["status"] for vm in self.utm.machines()}

    def documents(self) -> str:
        """From now on machines are packages on disk, too; returns their folder."""
        folder = os.path.join(self.folder, "Documents of UTM")
        os.mkdir(folder)
        self.utm.option(documents=folder)
        self.config(documents=folder)
        return folder

    def inside(self, name: str, path: str) -> str:
        """Where a file of a machine's guest is on this host."""
        return os.path.join(self.utm.guest(name), path)

    def greet(self) -> None:
        """Guests can be reached: a Greeter listens at the first addresses."""
        addresses = self.utm.app()["addresses"][:self.GREETERS or 1]
        try:
            greeter = Greeter(addresses)
        except OSError:                         # a Mac has only this one
            if self.GREETERS > 1:
                self.skipTest(f"this machine has no addresses {addresses}")
            addresses = ["127.0.0.1"]
            self.utm.option(addresses=addresses)
            greeter = Greeter(addresses)
        self.addCleanup(greeter.close)
        self.address = addresses[0]
        self.use(ssh_port=greeter.port)

    def sshd(self, count: int = 1) -> Sshd:
        """A running sshd on the first `count` addresses, with the guests' host key; or skips the test."""
        hosts = self.utm.app()["addresses"][:count]
        reason = Sshd.why_not(hosts)
        if reason:
            self.skipTest(reason)
        sshd = Sshd(os.path.join(self.folder, "sshd"), hosts)
        sshd.start()
        self.addCleanup(sshd.stop)
        self.utm.option(host_key=sshd.host_key_line)
        self.ssh_options(f'IdentityFile "{sshd.user_key}"\nIdentitiesOnly yes\n')
        return sshd

    def with_sshd(self, **settings: Any) -> Sshd:
        """An image, and guests that ssh can reach."""
        sshd = self.sshd()
        self.image()
        self.config(ssh_port=sshd.port, **settings)
        return sshd

    def with_names(self) -> Sshd:
        """km-a and km-b run, and every ssh has the stanza of `ssh-config` before its other options."""
        sshd = self.sshd(2)
        self.config(ssh_port=sshd.port, ssh_user=pwd.getpwuid(os.getuid()).pw_name)
        for label in ("a", "b"):
            self.vm(label, "started")
        self.write(self.ssh_config, self.km("ssh-config").out + "Host *\n" + self.read(self.ssh_config))
        return sshd

    # -- kodemachine

    # kodemachine's time limits in tests, in seconds: an event in a test happens at once or never.
    PATIENCE: dict[str, Any] = {
        "WARM_UP": 0.6, "SETTLE": 0.8, "UNCHANGED": 0.4, "ASK_AGAIN": 0.4, "PRESS_AGAIN": 0.6, "FORCE_STAGE": 8.0,
        "DELETE_SETTLE": 0.6, "LOOK_LIMIT": 10.0, "UNIQUE_LIMIT": 15.0, "GLANCE": 20.0, "DISK_LIMIT": 20.0,
        "LIMITS": {**kodemachine.LIMITS, "status": 6.0, "delete": 10.0},
    }
    # The limits of calls where a fault makes calls hang. Without one, an answer may be slow: the host may be busy.
    WITH_HANGING: dict[str, Any] = {
        "GLANCE": 1.0,
        "LIMITS": {**dict.fromkeys(kodemachine.LIMITS, 2.0), "list": 3.0, "delete": 5.0, "osascript": 3.0},
    }
    PYTHON = (sys.executable, "-IS", "-X", "faulthandler", "-W", "error")
    LAUNCH = (
        "import json, sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "import kodemachine\n"
        "vars(kodemachine).update(json.loads(sys.argv.pop(1)))\n"
        "sys.exit(kodemachine.main())"
    )

    def command(self, *args: str, patience: dict[str, Any] | None = None, before: str = "") -> list[str]:
        """The command line of kodemachine with the patience of the tests; {}: with its own, as installed.

        `before`: Python code that the process runs first.
        """
        if patience == {}:
            return [*self.PYTHON, KODEMACHINE, *args]
        hanging = self.WITH_HANGING if self.utm.hangs() else {}
        changed = json.dumps({**self.PATIENCE, **hanging, **(patience or {})})
        return [*self.PYTHON, "-c", before + self.LAUNCH, HERE, changed, *args]

    def km(self, *args: str, stdin: str | None = None, env: dict[str, str] | None = None, timeout: float = 60,
           patience: dict[str, Any] | None = None) -> Result:
        """Runs kodemachine to its end, with no input unless given."""
        return self.run_program(self.command(*args, patience=patience), stdin, env, timeout)

    def start_km(self, *args: str, env: dict[str, str] | None = None,
                 input_follows: bool = False) -> subprocess.Popen[bytes]:
        """Starts kodemachine, and does not wait for its end: see `ended`."""
        return self.start_program(self.command(*args), env, input_follows)

    def km_tty(self, *args: str, env: dict[str, str] | None = None) -> Terminal:
        """kodemachine on a terminal of its own."""
        terminal = Terminal(self.command(*args), {**self.environment, **(env or {})}, self.home)
        self.addCleanup(terminal.close)
        return terminal

    def screen(self, *args: str, columns: int = 80, **env: str) -> Terminal:
        """kodemachine on a terminal of that width, which is set before it starts."""
        resize = ["/bin/sh", "-c", f'stty cols {columns} rows 24 && exec "$@"', "sh"]
        terminal = Terminal([*resize, *self.command(*args)], {**self.environment, **env}, self.home)
        self.addCleanup(terminal.close)
        return terminal

    def spawn(self, *args: str, code: int = 0, patience: dict[str, Any] | None = None) -> Result:
        """Runs kodemachine (by default `start -d alpha`), and expects that exit status and no process left."""
        result = self.km(*(args or ("start", "-d", "alpha")), patience=patience)
        self.assertEqual(result.code, code, result.err)
        self.assertNotIn("Traceback", result.err)
        if code == 0 and not args:
            self.assertEqual(result.out, self.address + "\n")
        self.assertNoChildrenLeft()
        return result

    def listed(self, *args: str) -> dict[str, dict[str, Any]]:
        """`list --json`, by name."""
        result = self.km("list", "--json", *args)
        self.assertEqual(result.code, 0, result.err)
        return {machine["name"]: machine for machine in json.loads(result.out)}

    # -- other programs

    def utmctl(self, *args: str, stdin: str | None = None, timeout: float = 60) -> Result:
        return self.run_program([os.path.join(self.bin, "utmctl"), *args], stdin, None, timeout)

    def run_program(self, argv: Sequence[str], stdin: str | None = None, env: dict[str, str] | None = None,
                    timeout: float = 60) -> Result:
        return self.ended(self.start_program(argv, env, stdin is not None), stdin, timeout)

    def ended(self, process: subprocess.Popen[bytes], stdin: str | None = None, timeout: float = 60) -> Result:
        """Waits for the end of a program. One that does not end within `timeout` seconds prints its stack."""
        in_time = True
        try:
            out, err = process.communicate(None if stdin is None else stdin.encode(), timeout)
        except subprocess.TimeoutExpired:
            in_time = False
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate(timeout=10)
        result = Result(process.returncode, *(text.decode("utf-8", "surrogateescape") for text in (out, err)))
        if not in_time:
            self.fail(f"still running after {timeout} s: {process.args!r}\n{result.err}")
        return result

    def start_program(self, argv: Sequence[str], env: dict[str, str] | None = None,
                      input_follows: bool = False) -> subprocess.Popen[bytes]:
        """A child that ends with the test; its streams are pipes, its input is empty unless announced."""
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE if input_follows else subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**self.environment, **(env or {})}, cwd=self.home)
        self.addCleanup(self._end, process)
        return process

    # -- what UTM was asked for

    def calls_of(self, verb: str | None = None) -> list[dict[str, Any]]:
        """The calls of utmctl and osascript, or those for one verb, in their order; see Utm.calls."""
        calls = self.utm.calls(verb) + self.utm.calls(verb, "osascript")
        return sorted(calls, key=lambda call: float(call["time"]))

    def asked(self, verb: str) -> list[list[str]]:
        """The arguments of utmctl's calls for one verb."""
        return [call["argv"][1:] for call in self.utm.calls(verb)]

    def wait_until_asked(self, verb: str, uuid: str) -> None:
        wait_for(lambda: any(args[0] == uuid for args in self.asked(verb)))

    def steps(self) -> list[str]:
        """The verbs of all calls in their order, without repetitions."""
        return [verb for verb, _ in itertools.groupby(call["verb"] for call in self.calls_of())]

    # -- what must hold

    def assert_says(self, result: Result, code: int, *words: str) -> None:
        """That exit status, and these words on stderr."""
        self.assertEqual(result.code, code, result.err)
        for word in words:
            self.assertIn(word, result.err)

    def assert_machines(self, *names: str) -> None:
        """There are these machines, and the image."""
        self.assertEqual(sorted(self.utm.names()), sorted([IMAGE, *names]))

    def processes(self) -> dict[int, str]:
        """Command lines that mention this test's folder, by pid; without those of guests, and of its sshd."""
        ps = ["ps", "-A", "-ww", "-o", "pid=", "-o", "pgid=", "-o", "command="]
        listing = subprocess.run(ps, stdout=subprocess.PIPE, check=True).stdout.decode(errors="replace")
        sshd = os.path.join(self.folder, "sshd")
        lines = [line for line in listing.splitlines() if self.folder in line and sshd not in line]
        ours = [line.split(None, 2) for line in lines]
        guests = {call["guest"] for call in self.calls_of("exec")}
        return {int(pid): command for pid, group, command in ours if int(group) not in guests}

    def assertNoChildrenLeft(self, limit: float = 20) -> None:  # noqa: N802 (as unittest's)
        """Nothing that kodemachine started is alive; a process that was just killed has `limit` seconds to end."""
        wait_for(lambda: not self.processes(), limit)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()
        # Closed unread: a remaining process may hold the other end open.
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()

    def _kill_the_rest(self) -> None:
        """Kills fakes that hang, and processes in guests. It checks twice: a pid may be another process's by now."""
        unfinished = [call for call in self.calls_of() if call["end"] is None]
        alive = self.processes() if unfinished else {}
        for call in unfinished:
            if call["pid"] in alive:
                os.kill(call["pid"], signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if call["guest"] and os.getsid(call["guest"]) == call["guest"]:
                    os.killpg(call["guest"], signal.SIGKILL)


# ---- tests of the fake

EVENT = "Error from event: The operation couldn’t be completed. (OSStatus error {}.)\n"
NOT_FOUND = "Error: Virtual machine not found.\n"


class FakeTest(Case):
    """The fake UTM, utmctl and osascript behave as the real ones are known to."""

    def assert_utmctl(self, args: str, code: int = 0, out: str = "", err: str = "") -> None:
        self.assertEqual(self.utmctl(*shlex.split(args)), (code, out, err), args)

    def osascript(self, script: str, *args: str) -> Result:
        return self.run_program([os.path.join(self.bin, "osascript"), "-e", script, "--", *args])

    def run_lines(self, *lines: str, args: Sequence[str] = ()) -> Result:
        """Runs statements inside a `tell` block."""
        body = "\n".join(["on run argv", 'tell application "UTM"', *lines, "end tell", "end run", ""])
        return self.osascript(body, *args)

    # -- the command line

    def test_utmctl_usage_errors_exit_64_with_the_usage_on_stderr(self) -> None:
        base, top = "[--debug] [--hide] <identifier>", "<subcommand>"
        about = "Help:  <identifier>  Either the UUID or the complete name of the virtual machine.\n"
        cmd = "Help:  --cmd <cmd>  Command line to execute on the guest.\n"
        start = f"start {base} [--disposable] [--recovery]"
        run = f"exec {base} [--input] [--env <env> ...] --cmd <cmd> ..."
        clone = f"clone {base} [--name <name>]"
        for args, message, usage in (
            ("--hide list", "Unknown option '--hide'", top),
            ("lst", "Unexpected argument 'lst'", top),
            ("up x", "2 unexpected arguments: 'up', 'x'", top),
            ("start ---x", "Invalid option: ---x", top),
            ("exec x --cmd ls ---x", "Invalid option: ---x", top),
            ("list -=x", "Invalid option: -=x", top),
            ("list x", "Unexpected argument 'x'", "list [--debug] [--hide]"),
            ("status a b c", "2 unexpected arguments: 'b', 'c'", f"status {base}"),
            ("attach x", "2 unexpected arguments: 'attach', 'x'", top),
            ("start x --detach", "Unknown option '--detach'", start),
            ("start x --hid", "Unknown option '--hid'. Did you mean '--hide'?", start),
            ("start x --wait-for-it", "Unknown option '--wait-for-it'", start),
            ("start x -x", "Unknown option '-x'", start),
            ("start --hide", f"Missing expected argument '<identifier>'\n{about}", start),
            ("start -odd", f"Missing expected argument '<identifier>'\n{about}", start),
            ("clone x --name", "Missing value for '--name <name>'", clone),
            ("clone x --name=", "Missing value for '--name <name>'", clone),
            ("clone x --name -x", "Missing value for '--name <name>'", clone),
            ("exec x ls", f"Missing expected argument '--cmd <cmd> ...'\n{cmd}", run),
            ("exec x --cmd", f"Missing expected argument '--cmd <cmd> ...'\n{cmd}", run),
        ):
            command = f"utmctl {usage}".split(" [")[0].split(" <")[0]
            see = f"  See '{command} --help' for more information.\n"
            text = f"Error: {message.rstrip()}\nUsage: utmctl {usage}\n{see}"
            with self.subTest(args):
                self.assert_utmctl(args, 64, "", text)

    def test_utmctl_own_errors_exit_1(self) -> None:
        self.assert_utmctl("status km-a", 1, "", NOT_FOUND)
        words = "Error: You can only specify one of: --force, --kill, or --request\n"
        self.assert_utmctl("stop km-a --force --kill", 1, "", words)

    def test_utmctl_help_goes_to_stdout(self) -> None:
        for args in ("", "help", "--help", "file", "usb", "start --help", "exec -h"):
            code, out, err = self.utmctl(*args.split())
            self.assertEqual((code, "USAGE: utmctl" in out, err), (0, True, ""), args)

    def test_utmctl_takes_words_after_a_double_dash_as_arguments(self) -> None:
        self.utm.add("-odd")
        self.assert_utmctl("status -- -odd", 0, "stopped\n")

    def test_utmctl_option_value_after_an_equals_sign_may_begin_with_a_dash(self) -> None:
        self.image("base")
        self.assert_utmctl("clone base --name=-x")
        self.assertEqual(self.utm.names(), ["base", "-x"])

    def test_utmctl_has_attach_up_to_5_0_8(self) -> None:
        self.utm.option(version="5.0.8")
        result = self.utmctl("attach", "x", "--index", "a")
        self.assertEqual(result.code, 64)
        help_line = "Help:  --index <index>  Index"
        self.assertIn(f"Error: The value 'a' is invalid for '--index <index>'\n{help_line}", result.err)
        self.assertIn("Did you mean '--attach'?", self.utmctl("start", "x", "--detach").err)

    def test_utmctl_of_old_versions_lacks_the_version_command(self) -> None:
        self.assert_utmctl("version", 0, "5.0.9\n")
        self.utm.option(version=None)
        self.assertIn("Error: Unexpected argument 'version'\n", self.utmctl("version").err)

    def test_utmctl_hide_option_works_everywhere_and_keeps_utm_running(self) -> None:
        self.image("base")
        self.utm.fault("start", hide_error=-1712)
        self.assert_utmctl("start --hide base", 0, "", EVENT.format(-1712))
        self.assertTrue(self.utm.app()["keep_running"])
        self.assertEqual(self.utm.machine("base")["status"], "started")

    # -- list, and finding machines

    def test_utmctl_list_prints_a_header_and_a_row_per_machine(self) -> None:
        one, two = self.utm.add("km-a", status="resuming"), self.utm.add("with blanks 機", status="stopped")
        header = "UUID                                 Status   Name\n"
        self.assert_utmctl("list", 0, f"{header}{one} resuming km-a\n{two} stopped  with blanks 機\n")

    def test_machine_is_found_by_exact_uuid_then_by_exact_name(self) -> None:
        uuid = self.utm.add("km-a")
        self.utm.add(uuid, status="paused")
        self.assert_utmctl(f"status {uuid}", 0, "stopped\n")
        for other in (uuid.lower(), "KM-A", "km"):
            self.assert_utmctl(f"status {other}", 1, "", NOT_FOUND)

    def test_utm_has_no_machines_until_its_window_appears(self) -> None:
        self.image("base")
        self.utm.option(running=False, launch_seconds=6)
        self.assert_utmctl("list", 0, Utmctl.HEADER)
        self.assert_utmctl("status base", 1, "", NOT_FOUND)
        wait_for(lambda: "base" in self.utmctl("list").out)

    # -- states

    def test_states_follow_each_other_in_time(self) -> None:
        self.image("base", start_seconds=3, stop_seconds=6)
        start = self.start_program([os.path.join(self.bin, "utmctl"), "start", "base"])
        wait_for(lambda: self.utm.machine("base")["status"] == "starting")
        self.assertEqual(start.wait(), 0)
        self.assert_utmctl("status base", 0, "started\n")
        self.assert_utmctl("stop base")
        self.assert_utmctl("status base", 0, "stopping\n")
        wait_for(lambda: self.utm.machine("base")["status"] == "stopped")

    def test_verb_that_does_not_fit_the_state_is_refused_with_exit_0(self) -> None:
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

    def test_suspended_machine_is_paused_and_starts_again(self) -> None:
        self.utm.add("km-a", status="started")
        self.assert_utmctl("suspend km-a -s")
        self.assertEqual((self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("paused", True))
        self.utm.restart()
        self.assertEqual((self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("stopped", True))
        self.assert_utmctl("start km-a")
        self.assertEqual((self.utm.machine("km-a")["status"], self.utm.machine("km-a")["saved"]), ("started", False))

    def test_failed_save_leaves_the_machine_paused(self) -> None:
        self.utm.add("km-a", status="started", save_error="Timed out waiting for RPC.")
        self.assert_utmctl("suspend -s km-a", 0, "", f"{EVENT.format(-2700)}Timed out waiting for RPC.\n")
        self.assertEqual(self.utm.machine("km-a")["status"], "paused")

    def test_kill_alone_stops_a_machine_that_hangs_or_ignores_its_power_key(self) -> None:
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

    def test_clone_is_listed_under_a_temporary_name_after_its_base(self) -> None:
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

    def test_clone_has_its_own_mac_if_utm_is_set_to_regenerate_it(self) -> None:
        self.image("base")
        self.utm.option(regenerate_mac=True)
        self.assert_utmctl("clone base --name new")
        self.assertNotEqual(self.utm.machine("new")["macs"], self.utm.machine("base")["macs"])

    def test_clone_to_a_taken_name_becomes_a_second_machine_of_that_name(self) -> None:
        self.image("base")
        self.utm.add("New")
        code, out, err = self.utmctl("clone", "base", "--name", "new")
        self.assertEqual((code, out, err.splitlines()[0] + "\n"), (0, "", EVENT.format(-2700)))
        self.assertEqual([(vm["name"], vm["bundle"]) for vm in self.utm.machines()][1], ("new", "base 2.utm"))

    def test_clone_may_end_before_it_is_renamed_or_listed(self) -> None:
        self.image("base")
        self.utm.fault("clone", partial="no-rename", times=1)
        self.utm.fault("clone", partial="copy-only", times=1)
        self.assert_utmctl("clone base --name new")
        self.assertEqual(self.utm.names(), ["base", "base 2"])
        self.assert_utmctl("clone base --name new")
        self.assertEqual(self.utm.names(), ["base", "base 2"])

    def test_machines_are_packages_on_disk(self) -> None:
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

    def test_guest_agent_starts_step_by_step(self) -> None:
        none = "The QEMU guest agent is not running or not installed on the guest."
        steps = []
        self.image("base", agent_after=2000, rpc_seconds=1000, link_local_seconds=1000, ips=["10.0.0.5", "fd00::1"])
        self.assert_utmctl("start base")
        for age in (500, 1500, 2500, 3500):
            self.utm.change("base", up_at=time.time() - age)
            answer = self.utmctl("ip-address", "base")
            self.assertEqual(answer.code, 0)
            steps.append(answer.out or answer.err.splitlines()[1])
        link_local = "fe80::5054:ff:fe12:3456\n"
        self.assertEqual(steps, [none, "Timed out waiting for RPC.", link_local, "10.0.0.5\nfd00::1\n"])

    def test_apple_machine_has_no_agent_and_may_have_no_address(self) -> None:
        self.utm.add("mac", backend="apple", status="started", ips=[])
        self.assert_utmctl("ip-address mac")
        words = "Operation not supported by the backend.\n"
        self.assert_utmctl("exec mac --cmd ls", 0, "", EVENT.format(-2700) + words)

    def test_exec_takes_the_words_after_cmd_unchanged(self) -> None:
        self.utm.add("km-a", status="started")
        result = self.utmctl("exec", "--hide", "km-a", "--env", "A=1", "--cmd", "echo", "--", "--hide", "-x", "--help")
        self.assertEqual(result, (0, "-- --hide -x --help\n", ""))

    def test_exec_returns_the_exit_status_of_the_command_and_0_for_a_signal(self) -> None:
        self.utm.add("km-a", status="started")
        for script, code in (("exit 7", 7), ("kill -9 $$", 0)):
            self.assertEqual(self.utmctl("exec", "km-a", "--cmd", "sh", "-c", script).code, code)

    def test_exec_passes_input_on_only_with_its_option(self) -> None:
        self.utm.add("km-a", status="started")
        self.assertEqual(self.utmctl("exec", "km-a", "--input", "--cmd", "cat", stdin="abc").out, "abc")
        self.assertEqual(self.utmctl("exec", "km-a", "--cmd", "cat", stdin="abc").out, "")
        self.assertEqual([call["stdin_used"] for call in self.calls_of("exec")], [True, False])

    def test_exec_up_to_5_0_8_checks_once_and_leaves_the_command_running(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.option(version="5.0.3")
        self.assert_utmctl("exec km-a --cmd sh -c 'echo out; touch /etc/ran; exit 7'", 0, "")
        wait_for(lambda: os.path.exists(os.path.join(self.utm.guest("km-a"), "etc", "ran")))

    def test_exec_truncates_long_output_silently(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.option(exec_limit=10)
        self.assert_utmctl("exec km-a --cmd seq 100", 0, "1\n2\n3\n4\n5\n")

    def test_exec_reads_the_files_of_the_guest_and_cannot_write_those_of_the_host(self) -> None:
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

    def test_guest_that_powers_itself_off_is_stopped(self) -> None:
        self.utm.add("km-a", status="started")
        self.assert_utmctl("exec km-a --cmd /sbin/poweroff")
        self.assertEqual(self.utm.machine("km-a")["status"], "stopped")

    def test_files_are_pushed_to_and_pulled_from_the_guest(self) -> None:
        self.utm.add("km-a", status="started")
        self.assertEqual(self.utmctl("file", "push", "km-a", "/root/x", stdin="abc"), (0, "", ""))
        self.assert_utmctl("file pull km-a /root/x", 0, "abc")
        self.assert_utmctl("exec km-a --cmd cat /root/x", 0, "abc")
        self.assertIn("(OSStatus error -2700.)", self.utmctl("file", "pull", "km-a", "/../../state").err)

    def test_attach_prints_the_address_of_the_serial_port(self) -> None:
        self.utm.option(version="5.0.3")
        warning = "WARNING: attach command is not implemented yet!\n"
        ports = [{"kind": "terminal"}, {"kind": "tcp", "host": "127.0.0.1", "port": 9}, {"kind": "ptty", "path": "/x"}]
        self.utm.add("three", serials=ports)
        self.utm.add("none")
        self.assert_utmctl("attach three", 0, f"{warning}{warning}TCP: 127.0.0.1:9\n")
        self.assert_utmctl("attach three --index 2", 0, f"{warning}PTTY: /x\n")
        self.assert_utmctl("attach three --index 0", 0, warning)
        self.assert_utmctl("attach three --index 3")
        self.assert_utmctl("attach none")

    # -- faults

    def test_missing_permission_hides_the_machines_and_list_prints_its_header(self) -> None:
        self.image("base")
        self.utm.fault(error=-1743, lookup=True)
        note = "NOTE: utmctl does not work from SSH sessions or before logging in.\n"
        self.assert_utmctl("list", 0, Utmctl.HEADER, EVENT.format(-1743) + note)
        self.assert_utmctl("status base", 1, "", NOT_FOUND)

    def test_errors_can_be_in_other_languages(self) -> None:
        self.image("base")
        self.utm.fault("start", error=-609, language="ja", times=1)
        self.utm.fault("start", error=-609, language="de", times=1)
        self.assertIn("（OSStatusエラー-609）\n", self.utmctl("start", "base").err)
        self.assertIn("(OSStatus-Fehler -609.)\n", self.utmctl("start", "base").err)
        self.assert_utmctl("start base")

    def test_fault_rules_count_the_calls_that_they_match(self) -> None:
        self.utm.add("km-a")
        self.utm.add("km-b")
        self.utm.fault("status", vm="km-a", skip=1, times=2, error=-600)
        self.utm.fault("status", contains="km-b", nth=2, error=-609)
        errors = [self.utmctl("status", name).err != "" for name in ("km-a", "km-b") * 4]
        self.assertEqual(errors, [False, False, True, True, True, False, False, False])

    def test_clone_that_was_reported_as_timed_out_finishes_later(self) -> None:
        self.image("base")
        self.utm.fault("clone", error=-1712, when="after", delay=2, report_after=0.1)
        self.assert_utmctl("clone base --name new", 0, "", EVENT.format(-1712))
        self.assertEqual(self.utm.names(), ["base"])
        wait_for(lambda: self.utm.names() == ["base", "base 2"])
        wait_for(lambda: self.utm.names() == ["base", "new"])

    def test_killed_utmctl_does_not_stop_what_it_asked_for(self) -> None:
        self.image("base", start_seconds=1)
        start = self.start_program([os.path.join(self.bin, "utmctl"), "start", "base"])
        wait_for(lambda: self.utm.machine("base")["status"] == "starting")
        start.kill()
        wait_for(lambda: self.utm.machine("base")["status"] == "started")
        self.assertIsNone(self.calls_of("start")[0]["end"])

    def test_fault_before_prevents_the_action_and_fault_after_does_not(self) -> None:
        for name, when, left in (("a", "before", "stopped"), ("b", "after", "started")):
            self.utm.add(name)
            self.utm.fault("start", vm=name, error=-10004, when=when)
            self.assert_utmctl(f"start {name}", 0, "", EVENT.format(-10004))
            self.assertEqual(self.utm.machine(name)["status"], left)

    def test_utmctl_can_do_nothing_and_report_nothing(self) -> None:
        self.image("base")
        self.utm.fault("clone", silent=True)
        self.utm.fault("list", empty=True)
        self.assert_utmctl("clone base --name new")
        self.assert_utmctl("list", 0, Utmctl.HEADER)
        self.assertEqual(self.utm.names(), ["base"])

    def test_utmctl_can_crash_or_hang(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.fault("list", crash="ABRT")
        self.utm.fault("exec", crash="TRAP", error=-2700, string="words")
        self.utm.fault("status", hang=True)
        self.assert_utmctl("list", -signal.SIGABRT)
        self.assert_utmctl("exec km-a --cmd ls", -signal.SIGTRAP, "", EVENT.format(-2700) + "words\n")
        hung = self.start_program([os.path.join(self.bin, "utmctl"), "status", "km-a"])
        wait_for(lambda: self.calls_of("status"))
        with self.assertRaises(subprocess.TimeoutExpired):
            hung.wait(0.3)
        with self.assertRaises(AssertionError):
            self.assertNoChildrenLeft(0.2)

    def test_exec_with_a_lost_result_exits_0_without_output(self) -> None:
        self.utm.add("km-a", status="started")
        self.utm.fault("exec", error=-1712, when="after")
        self.assert_utmctl("exec km-a --cmd sh -c 'echo x; exit 3'", 0, "", EVENT.format(-1712))

    def test_list_can_have_unknown_blank_and_broken_rows(self) -> None:
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

    def test_osascript_reads_and_changes_settings(self) -> None:
        uuid = self.utm.add("km-a", macs=["02:00:00:00:00:01", "02:00:00:00:00:02"])
        bare = self.utm.add("no interface", macs=[])
        lines = f"{uuid} machine\n{uuid} mac 02:00:00:00:00:01\n{uuid} online\n{uuid} mac 02:00:00:00:00:02\n" \
                f"{uuid} online\n{uuid} drive 331\n{bare} machine\n{bare} drive 331\n\n"
        self.assertEqual(self.osascript(kodemachine.HARDWARE), (0, lines, ""))
        changed = self.osascript(kodemachine.CONFIGURE, uuid, "km-b", "512", "1", "", "", "02:00:00:00:00:03")
        self.assertEqual(changed, (0, "km-b\n512\n1\n02:00:00:00:00:01\n02:00:00:00:00:03\n\n", ""))
        vm = self.utm.machine("km-b")
        self.assertEqual((vm["macs"][1], vm["memory"], vm["cpus"]), ("02:00:00:00:00:03", 512, 1))
        self.assertEqual(vm["modes"], ["shared", "shared"])
        self.assertEqual([call["verb"] for call in self.utm.calls(tool="osascript")], ["hardware", "configure"])

    def test_osascript_exits_1_when_it_is_refused(self) -> None:
        uuid = self.utm.add("km-a", status="started")
        error = "0:0: execution error: UTM got an error: {} (-2700)\n"
        stopped = "The virtual machine must be stopped before this operation can be performed."
        self.assertEqual(self.osascript(kodemachine.CONFIGURE, uuid, "", "", "1", ""), (1, "", error.format(stopped)))
        self.utm.fault("osascript", error=-1743)
        self.assertIn("Not authorized to send Apple events to UTM. (-1743)", self.osascript(kodemachine.HARDWARE).err)

    def test_osascript_rejects_statements_that_the_scripts_do_not_use(self) -> None:
        for line in ("activate", "set given to 1", "set address to 1", "repeat while true", "set x to 1\nend if",
                     "beep 3", "make new document"):
            with self.subTest(line):
                result = self.run_lines(line)
                self.assertEqual((result.code, result.out), (1, ""))
                self.assertRegex(result.err, r"syntax error: .* \(-2741\)$|execution error: .* \(-2753\)$")
        self.assertEqual(self.osascript("beep").code, 1)

    def test_osascript_fails_at_each_known_trap_of_applescript(self) -> None:
        """Contract 7: the first form fails, and the second is what to write."""
        console = {"kind": "ptty", "path": "/dev/ttys001"}
        uuid = self.utm.add("km-a", icon="my-own", serials=[console], displays=[{}])
        vm = 'set vm to virtual machine id (item 1 of argv)'
        config = "set config to configuration of vm"
        for wrong, right, number in (
            ([config, "return count of (serial ports of config)"],
             [config, "return count of (\u00abclass SrPt\u00bb of config)"], -1728),
            (["return count of (displays of (configuration of vm))"],
             [config, "set d to displays of config", "return count of d"], -1728),
            ([config, "update configuration of vm with config"],
             [config, 'set icon of config to ""', "update configuration of vm with config", "return 1"], -2700),
            ([config, 'set notes of config to ""'], [config, 'set icon of config to ""', "return 1"], -10006),
            (['set f to POSIX file "/etc/hosts"'], ["return 1"], -1728),
            (['if interface of item 1 of (serial ports of vm) is "ptty" then return 2', "return no_such_name"],
             ["if interface of item 1 of (serial ports of vm) is ptty then return 1"], -2753),
        ):
            with self.subTest(wrong):
                self.assertIn(f"({number})", self.run_lines(vm, *wrong, args=[uuid]).err)
                self.assertEqual(self.run_lines(vm, *right, args=[uuid]), (0, "1\n", ""))

    def test_osascript_removes_a_drive_that_a_new_record_omits(self) -> None:
        drives = [{"id": name, "removable": False, "size": 9} for name in "AB"]
        uuid = self.utm.add("km-a", drives=drives)
        self.assertEqual(self.osascript(kodemachine.DETACH, uuid), (0, "1 A A\n", ""))
        self.assertEqual([drive["id"] for drive in self.utm.machine(uuid)["drives"]], ["A"])

    def test_osascript_returns_the_result_of_a_command_once_and_omits_empty_texts(self) -> None:
        uuid = self.utm.add("km-a", status="started")
        run = ["set vm to virtual machine id (item 1 of argv)",
               'set p to execute vm at "sh" with arguments {"-c", item 2 of argv} output capturing true']
        loop = ["repeat", "set r to get result p", "if exited of r then exit repeat", "delay 0.02", "end repeat"]
        said = self.run_lines(*run, "set r to get result p", "return exited of r", args=[uuid, "sleep 1"])
        self.assertEqual(said, (0, "false\n", ""))
        told = "return output text of r & (exit code of r) & (signal code of r)"
        said = self.run_lines(*run, *loop, told, args=[uuid, "echo x; exit 3"])
        self.assertEqual(said, (0, "x\n30\n", ""))
        said = self.run_lines(*run, *loop, "return signal code of r", args=[uuid, "kill -9 $$"])
        self.assertEqual(said, (0, "9\n", ""))
        self.assertIn("(-1728)", self.run_lines(*run, *loop, "return error data of r", args=[uuid, "true"]).err)
        self.assertIn("(-2700)", self.run_lines(*run, *loop, "set r to get result p", args=[uuid, "true"]).err)

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
    """The other tools of the tests: ssh, terminals, processes."""

    def test_ssh_reaches_the_sshd_and_is_in_the_journal(self) -> None:
        sshd = self.sshd(2)
        known = os.path.join(self.folder, "known_hosts")
        options = ["-o", f'UserKnownHostsFile="{known}"', "-o", "StrictHostKeyChecking=accept-new"]
        login = [*options, "-p", str(sshd.port), "-l", pwd.getpwuid(os.getuid()).pw_name]
        for host in sshd.hosts:
            result = self.run_program([os.path.join(self.bin, "ssh"), *login, host, "echo", "hello"])
            self.assertEqual((result.code, result.out), (0, "hello\n"), result.err + sshd.log())
        self.assertEqual(self.utm.calls(tool="ssh")[0]["argv"][-2:], ["echo", "hello"])
        self.assertIn(sshd.host_key_line.split()[1], self.read(known))
        sshd.replace_host_key()
        self.assertEqual(self.run_program([os.path.join(self.bin, "ssh"), *login, host, "true"]).code, 255)

    def test_terminal_is_the_controlling_terminal_of_its_program(self) -> None:
        script = ("import termios; f = open('/dev/tty'); print('ready'); print(len(input())); raise SystemExit(7)")
        terminal = Terminal([sys.executable, "-IS", "-c", script], self.environment, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(b"ready")
        terminal.send(b"abc\n")
        terminal.expect(b"3\r\n")
        self.assertEqual(terminal.wait(), 7)
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c_on_a_terminal_interrupts_its_program(self) -> None:
        script = "import signal, os; print('ready', flush=True); signal.pause()"
        terminal = Terminal([sys.executable, "-IS", "-c", script], self.environment, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(b"ready")
        terminal.send(b"\x03")
        self.assertEqual(terminal.wait(), -signal.SIGINT)


# ---- pure functions

UUID_A, UUID_B = "AAAAAAAA-0000-4000-8000-00000000000A", "BBBBBBBB-0000-4000-8000-00000000000B"
OTHER_TONGUES = "".join("Error from event: " + Utmctl.ERRORS[tongue].format(-609) + "\n" for tongue in ("de", "ja"))


class PureTest(unittest.TestCase):
    """Functions that parse input from outside, and functions that print for a person."""

    def test_event_errors_are_found_by_number_in_any_language(self) -> None:
        table: list[tuple[str, tuple[int, ...]]] = [
            ("", ()),
            (EVENT.format(-1712), (-1712,)),
            (OTHER_TONGUES, (-609, -609)),
            (EVENT.format(-600) + EVENT.format(-2700) + "Fehler (OSStatus error -1.)\n", (-600, -2700)),
            ("Error from event: something new\n", (0,)),
            ("guest: Error from event: (OSStatus error -1743.)\n", ()),
        ]
        for err, numbers in table:
            with self.subTest(err):
                self.assertEqual(kodemachine.event_numbers(err), numbers)

    def test_call_outcome_follows_from_its_error_numbers_and_exit_status(self) -> None:
        missing_app = "Can't find app with file path /Applications/UTM.app\nError: Application not found.\n"
        script = "0:0: execution error: UTM got an error: {} ({})\n"
        table = [
            ("start", 0, "", Verdict.DONE),
            ("start", 0, OTHER_TONGUES, Verdict.TRANSIENT),
            *(("clone", 0, EVENT.format(n), Verdict.TRANSIENT) for n in (-1712, -10004, -609, -600, -10000, -12345)),
            ("list", 0, EVENT.format(-1743) + EVENT.format(-2700), Verdict.REFUSED),
            ("start", 0, EVENT.format(-609) + EVENT.format(-2700) + "Operation not available.\n", Verdict.FAILED),
            ("status", 0, EVENT.format(-1728), Verdict.MISSING),
            ("status", 1, NOT_FOUND, Verdict.MISSING),
            ("status", 1, "Error: something else\n", Verdict.FAILED),
            ("list", 1, missing_app, Verdict.NO_APP),
            ("version", 64, "Error: Unexpected argument 'version'\nUsage: ...\n", Verdict.USAGE),
            ("list", 64, "", Verdict.FAILED),
            ("list", 64, "the guest: Error: no such file\n", Verdict.FAILED),
            ("list", -signal.SIGTRAP, "", Verdict.CRASHED),
            ("list", 134, "", Verdict.CRASHED),
            ("osascript", 0, "(-1743)", Verdict.DONE),
            ("osascript", 1, "3:9: execution error: result lost: x (-609) (-1712)\n", Verdict.TRANSIENT),
            ("osascript", 1, script.format("Nicht erlaubt.", -1743), Verdict.REFUSED),
            ("osascript", 1, script.format("タイムアウト", -1712), Verdict.TRANSIENT),
            ("osascript", 1, script.format("Geht nicht.", -2700), Verdict.FAILED),
            ("osascript", 1, script.format("weg", -1728), Verdict.MISSING),
            ("osascript", 1, "dyld: broken\n", Verdict.FAILED),
            ("osascript", -signal.SIGABRT, "", Verdict.CRASHED),
        ]
        for verb, code, err, outcome in table:
            with self.subTest(verb=verb, code=code, err=err):
                self.assertIs(kodemachine.classify(verb, code, err)[0], outcome)

    def test_list_is_parsed_by_columns(self) -> None:
        rows = [(UUID_A, Power.STARTED, "a  name with blanks "), (UUID_B, Power.UNKNOWN, "日本\u2028\x0c語")]
        text = Utmctl.HEADER + f"{UUID_A} started  a  name with blanks \n{UUID_B} sleeping 日本\u2028\x0c語\n"
        self.assertEqual(kodemachine.parse_list(text), (rows, "", True))
        self.assertEqual(kodemachine.parse_list(Utmctl.HEADER), ([], "", True))
        row = f"{UUID_A} stopped  a\n"
        for broken in (
            "",
            row,
            "garbage\n" + row,
            Utmctl.HEADER + "garbage\n",
            Utmctl.HEADER + " " * 36 + " unknown  \n",
            Utmctl.HEADER + row.lower(),
            Utmctl.HEADER + row + row,
            Utmctl.HEADER + row + "\n",
            Utmctl.HEADER + f"{UUID_A} stopped  \n",
        ):
            with self.subTest(broken):
                _, first_broken, sound = kodemachine.parse_list(broken)
                self.assertFalse(sound and not first_broken)

    def test_name_with_a_line_break_breaks_only_its_own_row(self) -> None:
        text = Utmctl.HEADER + f"{UUID_A} stopped  two\nlines\n{UUID_B} started  b\n"
        found = ([(UUID_B, Power.STARTED, "b")], f"{UUID_A} stopped two", True)
        self.assertEqual(kodemachine.parse_list(text), found)

    def test_list_is_whole_or_names_every_machine_or_is_rejected(self) -> None:
        good, unknown, blank = f"{UUID_A} stopped  a\n", f"{UUID_B} unknown  b\n", " " * 36 + " unknown  \n"
        table = [
            (good, 0, Verdict.DONE, True, True),
            ("", 0, Verdict.DONE, True, True),
            ("", 1, Verdict.TRANSIENT, False, False),
            (good + unknown, 1, Verdict.TRANSIENT, False, True),
            (good + unknown, 2, Verdict.TRANSIENT, False, False),
            (good, 1, Verdict.TRANSIENT, False, False),
            (good + blank, 3, Verdict.TRANSIENT, False, False),
            (good + unknown, 1, Verdict.HUNG, False, False),
            (good, 0, Verdict.CRASHED, False, False),
        ]
        for rows, errors, outcome, whole, named in table:
            with self.subTest(rows=rows, errors=errors, outcome=outcome):
                reply = Reply("list", outcome, 0, Utmctl.HEADER + rows, "", (-1712,) * errors, 0.0)
                listing = kodemachine.judge_list(reply)
                self.assertEqual((listing.whole, listing.named), (whole, named))

    def test_addresses_are_sorted_with_the_likeliest_first(self) -> None:
        ranked = [["192.168.64.5", "10.0.0.1", "172.16.0.9", "172.32.0.1", "100.63.0.1", "100.128.0.1"],
                  ["fd00::5", "2001:db8::1"], ["172.17.0.1", "172.31.9.9", "100.64.0.1", "100.127.255.1"],
                  ["127.0.0.2", "169.254.1.1", "fe80::5054:ff:fe12:3456"]]
        for rank, addresses in enumerate(ranked):
            for address in addresses:
                with self.subTest(address):
                    self.assertEqual(kodemachine.address_rank(address), rank)
        everything = list(itertools.chain(*ranked))
        self.assertEqual(
            kodemachine.parse_addresses("\n".join(sorted(everything, key=kodemachine.address_rank))), everything
        )
        self.assertEqual(kodemachine.parse_addresses("fe80::1\n172.17.0.1\n10.0.0.1\n10.0.0.1\n"),
                         ["10.0.0.1", "172.17.0.1", "fe80::1"])

    def test_addresses_that_are_malformed_are_ignored(self) -> None:
        for line in (
            "", "localhost", "1.2.3", "1.2.3.4.5", "999.1.1.1", "-oProxyCommand=x", "10.0.0.1 x", "::::", "1:2",
            "fe80::1%en0", "１.2.3.4",
        ):
            with self.subTest(line):
                self.assertEqual(kodemachine.parse_addresses(line + "\n"), [])

    def test_host_keys_from_a_guest_cannot_inject_into_known_hosts(self) -> None:
        good = host_key()
        kinds = [host_key(kind) for kind in ("ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp521")]
        self.assertEqual(kodemachine.parse_host_keys([good, good + " root@guest", *kinds]), [good, good, *kinds])
        hostile = [
            "",
            "@revoked * " + good,
            "@cert-authority * " + good,
            "* " + good,
            " " + good,
            good.replace(" ", "  "),
            good + "\nevil " + good,
            good + "\r",
            good + "!",
            good[:-3],
            host_key(inside="ssh-rsa"),
            host_key("ssh-dss"),
            'command="x" ' + good,
            "ssh-ed25519 " + "A" * 4000,
            "ssh-ed25519 AAAA",
        ]
        for line in hostile:
            with self.subTest(line):
                self.assertEqual(kodemachine.parse_host_keys([line]), [])
        self.assertEqual(len(kodemachine.parse_host_keys([good] * 1000)), 8)

    def test_one_edit_is_an_insertion_a_deletion_a_change_or_a_swap(self) -> None:
        def edits(word: str) -> set[str]:
            splits = [(word[:i], word[i:]) for i in range(len(word) + 1)]
            return {*(a + c + b for a, b in splits for c in "abc"), *(a + b[1:] for a, b in splits if b),
                    *(a + c + b[1:] for a, b in splits if b for c in "abc"),
                    *(a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1)} - {word}

        words = ["".join(letters) for size in range(5) for letters in itertools.product("abc", repeat=size)]
        for word in words:
            self.assertEqual([other for other in words if kodemachine.one_edit(word, other)],
                             [other for other in words if other in edits(word)], word)

    def test_sizes_and_ages_are_parsed(self) -> None:
        for text, size in {"4G": 4 << 30, "512M": 512 << 20, "2048": 2048 << 20, "1.5g": 3 << 29, "1 GiB": 1 << 30,
                           "2TB": 2 << 40}.items():
            self.assertEqual(kodemachine.parse_size(text), size, text)
        for text, age in {"90s": 90, "30m": 1800, "12h": 43200, "7d": 604800, "2w": 1209600, "1.5h": 5400}.items():
            self.assertEqual(kodemachine.parse_age(text), age, text)

    def test_invalid_sizes_and_ages_are_rejected(self) -> None:
        for text in ("", "x", "-1", "1e9", "4X", "G", "1.2.3", "inf", "nan", "4 4", "9" * 400 + "G", "9" * 400 + "d"):
            for parse in (kodemachine.parse_size, kodemachine.parse_age):
                self.assertRaises(ValueError, parse, text)

    def test_sizes_and_ages_are_printed_with_a_unit(self) -> None:
        written = {None: "-", 0: "0B", 999: "999B", 512 << 20: "512M", 4.2 * (1 << 30): "4.2G", 1 << 60: "1048576T"}
        for number, text in written.items():
            self.assertEqual(kodemachine.size_text(None if number is None else int(number)), text)
        for seconds, text in {None: "-", 5: "5s", 59: "59s", 60: "1m", 3600: "1h", 172799: "47h", 172800: "2d"}.items():
            self.assertEqual(kodemachine.age_text(seconds), text)

    def test_age_is_computed_from_an_iso_time(self) -> None:
        self.assertIsNone(kodemachine.age_of("yesterday"))
        self.assertEqual(kodemachine.age_of("2999-01-01T00:00:00Z"), 0)
        self.assertLess(kodemachine.age_of(kodemachine.iso_time(time.time())) or 0, 60)

    def test_text_width_is_counted_in_terminal_columns(self) -> None:
        for text, width in (("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("ｱ", 1), ("Ａ", 2)):
            self.assertEqual(kodemachine.display_width(text), width, text)
        for room, left in ((-1, ""), (0, ""), (1, "a"), (2, "a"), (3, "a日"), (4, "a日"), (9, "a日本")):
            self.assertEqual(kodemachine.truncate("a日本", room), left, room)
        self.assertEqual(kodemachine.table([("A", "日", "y"), ("B", "x", "z")]), "A   B\n日  x\ny   z")

    def test_table_drops_its_optional_columns_until_it_fits(self) -> None:
        columns = [("NAME", "a", ""), ("X", "bb", "-"), ("LONG", "cccccccc", "d"), ("NONE", "-", "-")]
        cases: dict[int | None, str] = {None: "NAME X LONG NONE", 24: "NAME X LONG NONE", 23: "NAME X LONG",
                                        18: "NAME X LONG", 17: "NAME X", 1: "NAME"}
        for room, kept in cases.items():
            fitting = kodemachine.fitting(columns, room, ["LONG", "X", "NONE"])
            self.assertEqual([column[0] for column in fitting], kept.split(), room)
        self.assertEqual(kodemachine.table(columns[:3]), "NAME  X   LONG\na     bb  cccccccc\n      -   d")
        painted = kodemachine.table(columns[:2], lambda heading, cell: f"<{cell}>" if heading == "X" else cell)
        self.assertEqual(painted, "NAME  <X>\na     <bb>\n      <->")

    def test_live_line_has_the_name_of_its_machine_once_and_keeps_those_of_others(self) -> None:
        for label, step, shown in (("web", "cloning v1 to km-web", "web  cloning v1"),
                                   ("b", "waiting until UTM has cloned km-web",
                                    "b  waiting until UTM has cloned km-web"),
                                   ("s", "waiting for the list of machines", "s  waiting for the list of machines")):
            self.assertEqual(kodemachine.LiveLine(label, step).shown(), shown)

    def test_message_is_wrapped_at_words_and_commands_have_a_line_of_their_own(self) -> None:
        offers = ("The machine is kept. To run the script again: kodemachine web; to look inside: kodemachine ssh web; "
                  "to start without it: kodemachine config unset first_boot")

        def laid_out(text: str, columns: int | None, first: str = "") -> list[str]:
            return kodemachine.laid_out(text, columns, first, "  ", lambda text: f"<{text}>").split("\n")

        for columns in (40, 80, 100):
            text = laid_out(offers, columns, "  ")
            self.assertEqual([line for line in text if "<" in line], [
                "    <kodemachine web>", "    <kodemachine ssh web>", "    <kodemachine config unset first_boot>"])
            self.assertLessEqual(max(len(line.strip("<>")) for line in text), columns + 2)
            self.assertIn("  to look inside:", text)
        marked = re.sub("(kodemachine [^;]+)", "<\\1>", offers)
        self.assertEqual((laid_out(offers, None), laid_out(offers, 200)), ([marked], [marked]))
        for command in ("kodemachine start -d web db -- sh -c 'a: b; c'", "chmod 600 '/a b/c'", "rm /x/y",
                        "'/Applications/My UTM.app/Contents/MacOS/utmctl' delete 0-0", "ssh-keygen -t ed25519 -f /x",
                        'sudo chown -R "$(id -un)" /x', "perl -pi -e 's/a/b/' /x", "ssh -v km-x"):
            for before, columns in (("", 10), ("Do it in this way: ", 20), ("Do it: ", 200)):
                self.assertIn(f"<{command}>", laid_out(before + command, columns)[-1], "not broken")
        self.assertEqual(laid_out("a\n\nb", 1), ["a", "", "b"])
        long = "/a/path/without/blanks/which/is/longer/than/the/terminal/is/wide"
        self.assertEqual(laid_out(f"There is no {long} at all.", 20), ["There is no", "  " + long, "  at all."])

    def test_printed_text_contains_no_terminal_control_characters(self) -> None:
        self.assertEqual(kodemachine.printable("é日\n"), "é日\n")
        for c in "\x1b\x07\r\x00\x9b\u202e\u2028\ud800":
            self.assertEqual(kodemachine.printable(f"a{c}b"), "a\ufffdb")

    def test_escape_key_can_be_written_in_several_ways(self) -> None:
        keys = {"ctrl-]": b"\x1d", "^]": b"\x1d", "Ctrl-A": b"\x01", "^_": b"\x1f", "~": b"~", "none": b""}
        for text, octets in keys.items():
            self.assertEqual(kodemachine.escape_byte(text), octets, text)
        for text in ("", "ctrl-", "ctrl-1", "é", "ab"):
            self.assertRaises(kodemachine.UsageError, kodemachine.escape_byte, text)

    def test_new_mac_addresses_are_local_and_unique(self) -> None:
        made = {kodemachine.random_mac() for _ in range(200)}
        self.assertEqual(len(made), 200)
        for mac in made:
            self.assertRegex(mac, kodemachine.MAC)
            self.assertEqual(int(mac[:2], 16) & 3, 2)

    def test_parsers_raise_only_documented_errors_for_any_input(self) -> None:
        draw = random.Random(2)
        pieces = [
            Utmctl.HEADER,
            UUID_A,
            UUID_B,
            " started  ",
            " unknown  ",
            "\n",
            "\0",
            "\x1b[",
            "ssh-ed25519 ",
            host_key(),
            "10.0.0.1",
            "fe80::",
            EVENT.format(-1743),
            OTHER_TONGUES,
            NOT_FOUND,
            "(-",
            "-1743",
            "=",
            "é",
            "\udc80",
            "9" * 400,
            "9" * 400 + "G",
            *string.printable,
        ]
        parsers: list[Callable[[str], object]] = [
            kodemachine.parse_list,
            kodemachine.parse_addresses,
            kodemachine.event_numbers,
            kodemachine.printable,
            kodemachine.parse_size,
            kodemachine.parse_age,
            kodemachine.age_of,
            kodemachine.escape_byte,
            lambda text: kodemachine.parse_host_keys(text.split("\n")),
            lambda text: kodemachine.classify("start", draw.choice([0, 1, 64, -5]), text),
            lambda text: kodemachine.classify("osascript", draw.choice([0, 1, -6]), text),
            lambda text: Reply("osascript", Verdict.DONE, 0, "", text, (), 0.0).sentence,
        ]
        for _ in range(1500):
            text = "".join(draw.choices(pieces, k=draw.randrange(12)))
            for parse in parsers:
                with self.subTest(text=text), contextlib.suppress(KodeError, ValueError):
                    parse(text)

    def test_public_key_is_read_with_any_comment(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "key.pub")
            for text, found in ((f"{PUBLIC_KEY} me@mac\n", f"{PUBLIC_KEY} me@mac"), (PUBLIC_KEY, PUBLIC_KEY),
                                (f"{PUBLIC_KEY} me@m\u00fcller\n", PUBLIC_KEY), (f"{PUBLIC_KEY}\r\n", PUBLIC_KEY),
                                ("", None), ("-----BEGIN OPENSSH PRIVATE KEY-----\n", None)):
                write_text(path, text)
                if found:
                    self.assertEqual(kodemachine.public_key(mock.Mock(), path), found)
                else:
                    self.assertRaises(kodemachine.KodeError, kodemachine.public_key, mock.Mock(), path)


class ProberTest(unittest.TestCase):
    """Prober: when it reports that the system cannot reach the addresses."""

    def test_unreachable_counts_only_current_results_of_the_likeliest_addresses(self) -> None:
        prober, near, far, bridge = kodemachine.Prober(22), "192.168.64.2", "192.168.64.3", "fe80::1"
        self.assertFalse(prober.unreachable)
        failures: dict[str, int] = {}

        def connect(_sock: socket.socket, to: tuple[str, int]) -> int:
            return failures.get(to[0], errno.EINPROGRESS)

        with mock.patch.object(socket.socket, "connect_ex", connect):
            def unreachable(*addresses: str) -> bool:
                prober.aim(addresses)
                prober._rest = dict.fromkeys(addresses, 0.0)        # without the pause between two tries
                prober.step(0.0)
                return prober.unreachable

            failures[near] = errno.EHOSTUNREACH
            self.assertTrue(unreachable(near))
            self.assertFalse(unreachable(near, far), "one of them may answer yet")
            self.assertTrue(unreachable(near, bridge), "the less likely one has not been tried")
            failures[near] = errno.ECONNREFUSED
            self.assertFalse(unreachable(near))
            failures[far] = errno.EHOSTUNREACH
            failures[bridge] = errno.EHOSTUNREACH
            self.assertFalse(unreachable(bridge), "no system finds its way to a link-local one without its interface")
            self.assertTrue(unreachable(far), "what another address said before is over")
        prober.close()
        self.assertTrue(prober.unreachable)


class DiskTest(unittest.TestCase):
    """Disk usage: the numbers of the kernel, and Apple's documented structures byte for byte."""

    def setUp(self) -> None:
        self.folder = os.path.join(os.path.realpath(self.enterTemporary()), "km-x.utm")
        os.makedirs(os.path.join(self.folder, "Data"))

    def enterTemporary(self) -> str:  # noqa: N802 (enterContext, which 3.9 lacks)
        import tempfile

        temporary = tempfile.TemporaryDirectory(prefix="kodemachine-test-")
        self.addCleanup(temporary.cleanup)
        return temporary.name

    def write(self, name: str, size: int, sparse: int = 0) -> int:
        """A file in the bundle; returns the bytes of its blocks."""
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(os.urandom(size))
            file.truncate(size + sparse)
            os.fsync(file.fileno())
        return os.stat(path).st_blocks * 512

    def assert_usage(self, size: int, reclaimable: int) -> None:
        found = kodemachine.disk_usage(self.folder)
        if sys.platform == "darwin":  # the private size, which may be less
            self.assertEqual((found[0], found[1] <= reclaimable), (size, True))
        else:
            self.assertEqual(found, (size, reclaimable))

    # <sys/attr.h>: ATTR_BIT_MAP_COUNT 5; ATTR_CMN_RETURNED_ATTRS 0x80000000, in commonattr;
    # ATTR_CMNEXT_PRIVATESIZE 0x00000008, in forkattr with FSOPT_ATTR_CMN_EXTENDED 0x20; FSOPT_NOFOLLOW 0x1.
    REQUEST = {  # struct attrlist
        "bitmapcount": (5, 2), "reserved": (0, 2), "commonattr": (0x80000000, 4), "volattr": (0, 4), "dirattr": (0, 4),
        "fileattr": (0, 4), "forkattr": (0x8, 4),
    }

    @staticmethod
    def answer(size: int, length: int = 32, fork: int = 0x8) -> bytes:
        """u_int32_t length; attribute_set_t returned, five groups; off_t size, packed to 4 bytes; the rest of 64."""
        words = (length, 0x80000000, 0, 0, 0, fork)
        packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words) + size.to_bytes(
            8, sys.byteorder, signed=True
        )
        return packed.ljust(64, b"\xaa")

    def test_holes_take_no_space(self) -> None:
        blocks = self.write("Data/disk.qcow2", 100_000, sparse=1 << 30)
        self.assertLess(blocks, 1 << 20)
        self.assert_usage(blocks, blocks)

    def test_file_with_two_names_inside_counts_once_and_is_freed(self) -> None:
        blocks = self.write("Data/disk.qcow2", 100_000)
        os.link(os.path.join(self.folder, "Data/disk.qcow2"), os.path.join(self.folder, "again"))
        self.assert_usage(blocks, blocks)

    def test_file_with_a_name_outside_is_not_freed(self) -> None:
        mine, shared = self.write("config.plist", 5_000), self.write("Data/disk.qcow2", 100_000)
        os.link(os.path.join(self.folder, "Data/disk.qcow2"), self.folder + ".copy")
        self.assert_usage(mine + shared, mine)

    def test_links_are_not_followed_and_only_regular_files_count(self) -> None:
        blocks = self.write("config.plist", 5_000)
        os.symlink(self.folder, os.path.join(self.folder, "Data", "loop"))
        os.symlink("/", os.path.join(self.folder, "Data", "root"))
        os.symlink("nowhere", os.path.join(self.folder, "Data", "dangling"))
        os.mkfifo(os.path.join(self.folder, "Data", "fifo"))
        self.assert_usage(blocks, blocks)

    def private_size(self, answer: bytes, status: int = 0) -> tuple[int | None, list[tuple[Any, ...]]]:
        """The private size of the file "/a b" if libc gives that answer, and how libc was asked."""
        asked: list[tuple[Any, ...]] = []

        class Library:
            """libc of a Mac."""

            def getattrlist(self, path: bytes, request: Any, room: Any, size: Any, options: Any) -> int:
                asked.append((path, request.raw, size.value, options.value))
                room.raw = answer
                return status

        with mock.patch.object(ctypes, "CDLL", lambda *_, **__: Library()):
            return kodemachine.private_size("/a b"), asked

    def test_getattrlist_is_asked_with_the_struct_of_apple(self) -> None:
        want = b"".join(value.to_bytes(width, sys.byteorder) for value, width in self.REQUEST.values())
        _, asked = self.private_size(self.answer(0))
        self.assertEqual((asked, len(want)), ([(b"/a b", want, 64, 0x21)], 24))

    def test_getattrlist_answer_is_length_groups_and_size(self) -> None:
        for size in (0, 4096, 5 << 30, (1 << 63) - 1):
            self.assertEqual(self.private_size(self.answer(size))[0], size)
        for nothing in (self.answer(4096, fork=0), self.answer(4096, length=24), self.answer(-1), bytes(64)):
            self.assertIsNone(self.private_size(nothing)[0])

    def test_file_system_without_private_sizes_reports_none(self) -> None:
        self.assertIsNone(self.private_size(self.answer(12345), status=-1)[0])


# ---- work in a machine: start


class StartTest(Case):
    """start: from a label to a machine that answers."""

    GREETERS = 1

    def test_new_machine_takes_these_steps(self) -> None:
        result = self.spawn()
        uuid = self.utm.machine("km-alpha")["uuid"]
        self.assertEqual(
            self.steps(), ["list", "clone", "list", "hardware", "configure", "start", "status", "ip-address", "exec"]
        )
        argv = {call["verb"]: call["argv"] for call in self.calls_of()}
        self.assertEqual(argv["clone"], ["clone", self.base, "--name", "km-alpha"])
        self.assertEqual(argv["start"], ["start", "--hide", uuid])
        self.assertEqual(argv["exec"][2:6], ["--", uuid, "0", "/bin/sh"])
        self.assertEqual(self.utm.machine("kodeimage-v0.2.0")["status"], "stopped")
        for words in ("cloning", "checking the network address", "starting", "waiting for ssh", "naming the guest"):
            self.assertEqual(result.err.count(words), 1, result.err)

    def test_quiet_prints_only_the_result(self) -> None:
        self.assertEqual(self.spawn("-q", "start", "-d", "alpha"), (0, self.address + "\n", ""))

    def test_machine_of_an_interrupted_rm_is_kept_by_the_next_start(self) -> None:
        self.utm.option(clone_seconds=1.0)
        process = self.start_km("alpha", "--rm")
        wait_for(self.utm.clones)
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.ended(process).code, 130)
        self.spawn()
        self.assertNotIn("--rm", self.km("list").out)
        self.assertEqual(self.km("purge", "-y").code, 0)
        self.assert_machines("km-alpha")

    def test_host_keys_are_pinned_again_after_known_hosts_was_lost(self) -> None:
        self.spawn()
        known = self.read_state("known_hosts")
        self.assertIn("km-alpha ssh-ed25519 ", known)
        for text in ("", "km-alpha ssh-ed25519\n"):
            self.write_state("known_hosts", text)
            self.spawn()
            self.assertEqual(self.read_state("known_hosts"), known)

    def test_signal_counts_more_than_records_that_cannot_be_written(self) -> None:
        self.utm.change(self.base, agent_after=None)
        process = self.start_km("start", "-d", "alpha")
        wait_for(lambda: self.utm.calls("ip-address"))
        os.unlink(os.path.join(self.state, "machines.json"))
        os.mkdir(os.path.join(self.state, "machines.json"))
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.ended(process).code, 130)

    def test_running_machine_is_reached_with_two_parallel_calls(self) -> None:
        self.spawn()
        self.utm.fault("list", delay=2)
        before = len(self.utm.journal())
        self.spawn()
        entries = self.utm.journal()[before:]
        verbs = {entry["pid"]: entry["verb"] for entry in entries if "tool" in entry and entry["tool"] != "ssh"}
        order = [("begin " if "tool" in entry else "end ") + verbs[entry["pid"]] for entry in entries
                 if entry["pid"] in verbs]
        self.assertEqual(sorted(order), ["begin ip-address", "begin list", "end ip-address", "end list"])
        self.assertLess(order.index("begin ip-address"), order.index("end list"))

    def test_machine_renamed_in_utm_is_recorded_under_its_new_name(self) -> None:
        self.spawn()
        uuid = self.utm.machine("km-alpha")["uuid"]
        self.utm.change(uuid, name="km-beta")
        self.spawn("start", "-d", "beta")
        self.assertEqual(json.loads(self.read_state("machines.json"))[uuid]["name"], "km-beta")

    def test_remembered_address_is_used_only_if_the_list_shows_the_machine(self) -> None:
        self.spawn()
        old = self.utm.machine("km-alpha")["uuid"]
        self.utm.change(old, name="renamed by hand", ips=["127.0.0.9"])
        new = self.utm.add("km-alpha", status="started", ips=[self.address])
        before, guest_commands = len(self.utm.calls()), len(self.calls_of("exec"))
        self.spawn()
        self.assertIn(["ip-address", new], [call["argv"] for call in self.utm.calls()[before:]])
        self.assertEqual({call["argv"][3] for call in self.calls_of("exec")[guest_commands:]}, {new})

    def test_start_works_from_every_state(self) -> None:
        table = [("paused", "", ["start"]), ("starting", "started", []), ("resuming", "started", []),
                 ("stopping", "stopped", ["start"]), ("pausing", "paused", ["start"]), ("started", "", [])]
        for state, then, actions in table:
            with self.subTest(state):
                uuid = self.utm.add("km-alpha", status=state)
                before = len(self.utm.calls())
                if then:
                    with self.utm.fake as utm:
                        utm.later(0.4, "become", uuid, state, then)
                self.spawn()
                verbs = [verb for verb in self.utm.verbs()[before:] if verb in ("start", "stop", "clone")]
                self.assertEqual((verbs, self.utm.machine("km-alpha")["status"]), (actions, "started"))
                self.remove("km-alpha")


    # -- the image

    def test_image_with_the_highest_version_is_cloned_unless_another_is_named(self) -> None:
        newest = self.image("kodeimage-v0.10.0")
        self.image("kodeimage-v0.9.9-rc1")
        other = self.image("my image")
        for args, config, base in (
            ((), None, newest),
            (("--base", "my image"), None, other),
            ((), "my image", other),
            (("--base", self.base), "my image", self.base),
            (("--base", self.base.lower()), None, self.base),
        ):
            with self.subTest(args=args, config=config):
                self.use(base_image=config)
                self.spawn("start", "-d", "alpha", *args)
                clone = self.utm.machine("km-alpha")
                self.assertEqual(clone["copied_from"], base)
                self.remove("km-alpha")

    def test_image_that_cannot_be_cloned_is_an_error_with_a_remedy(self) -> None:
        self.utm.add("twin")
        self.utm.add("twin")
        self.utm.add("km-beta")
        self.utm.change(self.base, status="started")
        table = [
            ("kodeimage-v0.2.0", 4, "the image kodeimage-v0.2.0 is running; only a stopped image can be cloned"),
            ("nothing", 3, "Images: kodeimage-v0.2.0"),
            ("twin", 4, "2 machines are named twin"),
            ("km-beta", 4, "is a clone, not an image"),
        ]
        for base, code, words in table:
            with self.subTest(base):
                self.assertIn(words, self.spawn("start", "-d", "alpha", "--base", base, code=code).err)
        self.assertEqual(self.utm.calls("clone"), [])

    def test_base_option_with_another_image_is_refused_for_an_existing_machine(self) -> None:
        self.image("other")
        self.spawn()
        self.assertIn("--fresh", self.spawn("start", "-d", "alpha", "--base", "other", code=4).err)
        self.spawn("start", "-d", "alpha", "--base", "kodeimage-v0.2.0")

    # -- the network address, CPUs and memory

    def test_mac_addresses_become_unique_before_the_first_start(self) -> None:
        macs = ["AA:BB:CC:00:00:01", "AA:BB:CC:00:00:02"]
        self.utm.change(self.base, macs=macs)
        self.spawn()
        self.assertEqual(self.utm.machine("kodeimage-v0.2.0")["macs"], macs)
        self.assertEqual(len({*macs, *self.utm.machine("km-alpha")["macs"]}), 4)
        steps = self.steps()
        self.assertLess(steps.index("configure"), steps.index("start"))

    def test_mac_address_that_is_unique_is_kept(self) -> None:
        self.utm.option(regenerate_mac=True)
        self.spawn()
        self.assertEqual([call["verb"] for call in self.utm.calls(tool="osascript")], ["hardware", "exec"])

    def test_machine_with_a_shared_mac_address_is_not_started(self) -> None:
        table: list[tuple[str, dict[str, Any], int]] = [
            ("hardware", {"error": -1743}, 5),
            ("configure", {"error": -1743}, 5),
            ("configure", {"error": -2700, "string": "No."}, 1),
        ]
        for operation, fault, code in table:
            with self.subTest(operation=operation, **fault):
                self.utm.clear_faults()
                self.utm.fault(operation, **fault)
                err = self.spawn(code=code).err
                self.assertIn("Regenerate MAC addresses on clone", err)
                self.assertEqual("Automation" in err, code == 5)
        self.assertEqual(self.calls_of("start"), [])
        self.utm.clear_faults()
        self.spawn()
        self.assertEqual(len(self.calls_of("clone")), 1)
        self.assertNotEqual(*(vm["macs"] for vm in self.utm.machines()))

    def test_machine_is_not_started_unless_the_answer_proves_its_configuration(self) -> None:
        mac = "52:54:00:00:00:09"
        unchanged: list[dict[str, Any]] = [{"silent": True}, {"stdout": f"km-alpha\n4096\n4\n{mac}\n"}]
        options: list[list[str]] = [[], ["--cpus", "2"], ["--memory", "2G"]]
        for words in options:
            for fault in unchanged:
                with self.subTest(words=words, **fault):
                    self.utm.clear_faults()
                    self.utm.fault("configure", **fault)
                    err = self.spawn("start", "-d", "alpha", *words, code=1, patience={"UNIQUE_LIMIT": 0.5}).err
                    self.assertRegex(err, r"km-alpha was not started: .* \(UTM answers done\)")
            self.utm.change("km-alpha", macs=[mac])     # which is unique; from now on only CPUs and memory differ
        self.assertEqual(self.calls_of("start"), [])

    def test_cpus_and_memory_are_set_only_before_the_first_start(self) -> None:
        self.spawn("start", "-d", "alpha", "--cpus", "2", "--memory", "1.5G")
        vm = self.utm.machine("km-alpha")
        self.assertEqual((vm["cpus"], vm["memory"]), (2, 1536))
        self.assertEqual(len(self.calls_of("configure")), 1)
        for option in (("--cpus", "4"), ("--memory", "2G")):
            self.assertIn("--fresh", self.spawn("start", "-d", "alpha", *option, code=4).err)

    # -- the guest

    def test_guest_gets_its_host_name(self) -> None:
        self.spawn()
        guest = self.utm.guest("km-alpha")
        for file, text in (("etc/hostname", "alpha\n"), ("proc/sys/kernel/hostname", "alpha\n"),
                           ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 alpha\n")):
            self.assertEqual(self.read(os.path.join(guest, file)), text)

    def test_guest_that_was_not_named_is_named_at_the_next_start(self) -> None:
        answers = ("hostname=beta\n", "hostname=alpha\n", "")
        half_proofs = [{"stdout": f"0 0\n{base64.b64encode(text.encode()).decode()}\n"} for text in answers]
        faults: list[dict[str, Any]] = [{"error": -2700}, {"silent": True}, {"crash": "TRAP"}, *half_proofs]
        for fault in faults:
            self.utm.clear_faults()
            self.utm.fault("exec", **fault)
            with self.subTest(**fault):
                self.assertIn("the next start tries again", self.spawn().err)
        self.utm.clear_faults()
        self.spawn()
        calls = len(self.calls_of("exec"))
        self.spawn()
        self.assertEqual((calls, len(self.calls_of("exec"))), (7, 7))


    def guest_with(self, **files: str) -> str:
        """The folder of km-alpha's guest, which runs and has these files in /etc; km-alpha has not been named."""
        uuid = self.vm("alpha", "started", ips=[self.address])
        root = self.utm.guest(uuid)
        for name, text in files.items():
            self.write(os.path.join(root, "etc", name), text)
        return root

    def give_away(self, root: str) -> None:
        """Makes the guest's processes the owner of its files."""
        uuid = self.utm.machine("km-alpha")["uuid"]
        with self.utm.fake as utm:
            Guest(utm, uuid).give_away(root)

    def test_host_keys_are_read_where_sshd_has_them(self) -> None:
        root = self.guest_with()
        folder = os.path.join(root, "var/lib/ssh keys")
        os.mkdir(folder)
        for kind in ("ed25519", "ecdsa"):
            path = os.path.join(folder, kind)
            subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path], stdin=subprocess.DEVNULL, check=True)
        keys = [" ".join(self.read(os.path.join(folder, kind + ".pub")).split()[:2]) for kind in ("ed25519", "ecdsa")]
        # sshd does not read the public keys: one is missing, the other is old.
        os.unlink(os.path.join(folder, "ed25519.pub"))
        self.write(os.path.join(folder, "ecdsa.pub"), host_key() + "\n")
        included = self.write(os.path.join(root, "etc/ssh/sshd_config.d/keys.conf"),
                              f'HostKey "{folder}/ed25519"\nHostKey "{folder}/ecdsa"\n')
        self.write(os.path.join(root, "etc/ssh/sshd_config"), f"Include {included}\n")
        self.give_away(root)
        self.spawn()
        self.assertEqual(self.read_state("known_hosts"), "".join(f"km-alpha {key}\n" for key in keys))

    def test_hosts_file_without_a_final_newline_keeps_its_last_entry(self) -> None:
        root = self.guest_with(hosts="127.0.0.1 localhost\n10.0.0.1 registry.example.com")
        self.assertEqual(self.spawn().err.count("did not name"), 0)
        self.assertEqual(self.read(os.path.join(root, "etc/hosts")),
                         "127.0.0.1 localhost\n10.0.0.1 registry.example.com\n127.0.1.1 alpha\n")

    def test_hostname_that_a_boot_would_lose_is_reported_once(self) -> None:
        root = self.guest_with()
        path = os.path.join(root, "etc/hostname")
        for target, text in (("run/hostname", "/etc/hostname does not keep the name"), ("", "cannot create ")):
            os.unlink(path)
            if target:
                os.symlink(os.path.join(root, target), path)
            else:
                self.write(path, "kodeimage\n", 0o444)
            with self.subTest(target):
                self.give_away(root)
                self.assertIn(text, self.spawn().err)
                self.assertIn("km-alpha ssh-ed25519 ", self.read_state("known_hosts"))
                calls = len(self.calls_of("exec"))
                self.assertNotIn("hostname", self.spawn().err)
                self.assertEqual((len(self.calls_of("exec")), self.record("alpha").get("is_named")), (calls, None))
                # After a boot the guest has its old name.
                self.write(os.path.join(root, "proc/sys/kernel/hostname"), "kodeimage\n")
                self.utm.change("km-alpha", status="stopped")
                self.assertNotIn("did not name", self.spawn().err)
                self.assertEqual(self.read(os.path.join(root, "proc/sys/kernel/hostname")), "alpha\n")
                self.remember(alpha={"refusal": "another"})
                self.utm.change("km-alpha", status="stopped")
        os.unlink(path)
        self.give_away(root)
        self.spawn()
        self.assertEqual((self.record("alpha")["is_named"], self.record("alpha").get("refusal")), (True, None))

    REFUSALS = (
        ("Command guest-exec has been disabled: the command is not allowed", "/etc/sysconfig/qemu-ga"),
        ("The command guest-exec has been disabled for this instance", "/etc/sysconfig/qemu-ga"),
        ("The command guest-exec has not been found", "a newer qemu-guest-agent"),
        ("error was 'Failed to execute child process \u201c/bin/sh\u201d (Permission denied)'",
         "semanage permissive -a virt_qemu_ga_t"),
    )

    def test_agent_that_may_not_run_commands_is_reported_once_with_the_remedy(self) -> None:
        self.spawn()
        for words, remedy in self.REFUSALS:
            with self.subTest(words):
                self.remember(alpha={"is_named": False, "refusal": ""})
                self.utm.fault("exec", error=-2700, string=words)
                err = self.spawn().err
                self.assertIn(words, err)
                self.assertIn(remedy, err)
                calls = len(self.calls_of("exec"))
                self.assertNotIn("guest agent", self.spawn().err)
                self.assertEqual(len(self.calls_of("exec")), calls)
                self.utm.change("km-alpha", status="stopped")
                self.assertNotIn("guest agent", self.spawn().err)
                self.assertEqual(len(self.calls_of("exec")), calls + 1)
                self.utm.clear_faults()
                self.utm.change("km-alpha", status="stopped")
                self.spawn()
                self.assertEqual(self.record("alpha")["is_named"], True)

    def test_guest_whose_agent_reports_no_host_keys_is_named_once(self) -> None:
        root = self.guest_with()
        os.unlink(os.path.join(root, "etc/ssh/ssh_host_ed25519_key.pub"))
        self.assertIn("reports no host keys of km-alpha", self.spawn().err)
        calls = len(self.calls_of("exec"))
        self.assertNotIn("host keys", self.spawn().err)
        self.assertEqual((len(self.calls_of("exec")), self.record("alpha")["is_named"]), (calls, True))

    def test_learned_host_key_is_kept_if_the_agent_reports_none(self) -> None:
        root = self.guest_with()
        os.unlink(os.path.join(root, "etc/ssh/ssh_host_ed25519_key.pub"))
        self.write_state("known_hosts", f"km-alpha {host_key()}\n")
        self.spawn()
        self.assertEqual(self.read_state("known_hosts"), f"km-alpha {host_key()}\n")

    def test_late_guest_agent_is_waited_for(self) -> None:
        self.utm.change(self.base, agent_after=0.6, rpc_seconds=0.3, link_local_seconds=0.3)
        self.spawn()

    def test_machine_that_stops_during_the_wait_is_an_error_at_once(self) -> None:
        self.utm.change(self.base, agent_after=None)
        process = self.start_km("start", "-d", "alpha")
        wait_for(lambda: self.utm.calls("ip-address"))
        self.utm.change("km-alpha", status="stopped")
        result = self.ended(process)
        self.assertEqual(result.code, 1, result.err)
        self.assertIn("km-alpha is stopped: it did not keep running while kodemachine waited", result.err)

    def test_machine_without_ssh_times_out_with_an_explanation(self) -> None:
        with socket.socket() as port:               # bound, without a listener
            port.bind((self.address, 0))
            self.use(ssh_port=port.getsockname()[1])
            err = self.spawn("start", "-d", "alpha", "--timeout", "8", code=6).err
        self.assertIn(f"its ssh port does not answer at {self.address}", err)
        self.assertIn("kodemachine exec km-alpha -- systemctl status ssh", err)     # the agent works
        self.assertNotIn("kodemachine attach", err)

    def test_ssh_dies_of_a_closed_pipe_by_itself(self) -> None:
        self.write(os.path.join(self.bin, "ssh"), "#!/bin/sh\nkill -PIPE $$\necho survived\n")
        self.assertEqual(self.spawn("alpha", code=-signal.SIGPIPE).out, "")

    # Notes each time that kodemachine reads machines.json, or replaces it.
    TRACED_RECORDS = """
import os
def traced(name, position, word):
    function = getattr(os, name)
    def call(*args, **kwargs):
        if str(args[position]).endswith("/machines.json"):
            with open({trace!r}, "a") as file:
                file.write(word)
        return function(*args, **kwargs)
    setattr(os, name, call)
traced("open", 0, "r")
traced("replace", 1, "w")
"""

    def reads_and_writes(self, *words: str) -> tuple[int, int]:
        """How often that command reads machines.json, and how often it writes it."""
        trace = os.path.join(self.folder, "trace of machines.json")
        with open(trace, "w", encoding="utf-8"):
            pass
        argv = self.command(*words)
        argv[argv.index(self.LAUNCH)] = self.TRACED_RECORDS.format(trace=trace) + self.LAUNCH
        result = self.run_program(argv)
        self.assertEqual(result.code, 0, result.err)
        found = kodemachine.read_text(trace) or ""
        return found.count("r"), found.count("w")

    def test_the_records_are_read_and_written_as_few_times_as_possible(self) -> None:
        start = ("start", "-d", "alpha")
        # One read finds the machine. Each change needs one more: the record of the new clone must not be lost, however
        # the start ends.
        self.assertEqual(self.reads_and_writes(*start), (1, 2))
        # A reconnect.
        self.assertEqual(self.reads_and_writes(*start), (1, 0))
        for words in (("list",), ("status", "alpha"), ("ip", "alpha"), ("stop", "alpha")):
            self.assertEqual(self.reads_and_writes(*words), (1, 0), words)
        # A cold start, which confirms what is recorded.
        reads, writes = self.reads_and_writes(*start)
        self.assertEqual((reads <= 2, writes), (True, 0))

    def test_files_of_version_0_1_0_are_continued(self) -> None:
        state = os.path.join(self.home, ".local", "state", "kodemachine")
        os.makedirs(os.path.join(state, "intents"), 0o700)
        beta = self.utm.add("km-beta", ips=[self.address])
        image = {"name": "kodeimage-v0.2.0", "uuid": self.base}
        old = {**StateTest.OLD_RECORD, "name": "km-beta", "image": image, "new": None, "fork": None, "copy_of": None,
               "host_keys": ["ssh-ed25519 AAAA"]}
        order = {"base": "kodeimage-v0.2.0", "base_uuid": self.base, "time": time.time() - 5,
                 "listed": [self.base, beta], "inherits": {}}
        for name, content in (("machines.json", {beta: old}), ("intents/km-alpha.json", order)):
            with open(os.path.join(state, name), "w", encoding="utf-8") as file:
                json.dump(content, file)
        # The machine that results from the order.
        alpha = self.utm.add("km-alpha", ips=[self.address])
        removed = "machines.json: ignoring keys that are no longer used: saved, disposable"
        self.assertEqual(self.spawn("list").err.count(removed), 1)
        err = self.spawn("start", "-d", "alpha", "beta").err
        self.assertEqual(err.count(removed), 1)
        self.assertEqual((self.utm.calls("clone"), os.listdir(os.path.join(state, "intents"))), ([], []))
        with open(os.path.join(state, "machines.json"), encoding="utf-8") as file:
            records = json.load(file)
        self.assertEqual((records[alpha]["image"], records[alpha]["image_uuid"]), ("kodeimage-v0.2.0", self.base))
        self.assertEqual(records[beta], {"name": "km-beta", "image": "kodeimage-v0.2.0", "image_uuid": self.base,
                                         "created": old["created"], "machine_id": records[beta]["machine_id"],
                                         "mac_is_unique": True, "is_named": True, "first_boot": "pending"})
        self.assertEqual(self.spawn("list").err, "")


class LabelTest(Case):
    """Which words are labels, and which mistakes create no machine."""

    GREETERS = 1

    def test_invalid_label_creates_no_machine(self) -> None:
        bad = ["Alpha", "a_b", "a" * 61, "", "../x", "-a", "a-", "a b", "ä", "a.b", "km-", "km-km-a", "list\n"]
        for args in [
            *(("start", "-d", label) for label in bad),
            *((label,) for label in bad),
            ("start", "list"),
            ("start", "km-list"),
        ]:
            with self.subTest(args):
                result = self.km(*args)
                self.assertEqual((result.code, result.out), (2, ""))
                self.assertRegex(result.err, r"\Akodemachine: .*\n(?:  .*\n)?\Z")
        self.assertEqual(self.utm.calls(), [])

    def test_label_may_be_as_long_as_a_host_name(self) -> None:
        self.spawn("start", "-d", "a" * 60)
        self.assert_machines("km-" + "a" * 60)

    def test_label_may_be_typed_with_the_prefix(self) -> None:
        self.spawn("start", "-d", "km-alpha")
        self.assert_machines("km-alpha")

    def test_dot_means_the_name_of_the_current_folder(self) -> None:
        self.spawn("start", "-d", ".")
        self.assert_machines("km-home-of-a-user")
        folder = os.path.join(self.home, "KM-foo")
        os.mkdir(folder)
        self.assertIn("there is no machine foo", self.stop_dot("KM-foo").err)

    def stop_dot(self, folder: str) -> Result:
        """`stop .` in a folder of the home."""
        path = os.path.join(self.home, folder)
        os.makedirs(path, exist_ok=True)
        there = ["/bin/sh", "-c", f'cd {shlex.quote(path)} && exec "$@"', "sh", *self.command("stop", ".")]
        return self.run_program(there)

    def test_dot_drops_accents_and_never_letters(self) -> None:
        for folder, label in (("café", "cafe"), ("cafe\u0301 2", "cafe-2"), ("Größe", "grosse"), ("Ｗｅｂ", "web"),
                              ("my_app (copy)", "my-app-copy"), ("İstanbul", "istanbul")):
            self.assert_says(self.stop_dot(folder), 3, f"there is no machine {label}\n")
        for folder, suggested in (("Проект 1", "project-1"), ("Другой 1", "project-1"), ("søk", "project-s-k"),
                                  ("日本", "project"), ("🌙 web", "project-web"), ("___", "project"),
                                  ("a" * 61, "project-" + "a" * 32)):
            result = self.stop_dot(folder)
            self.assert_says(result, 2, f"the current folder, {folder!r}, cannot", f"for example: {suggested}\n")
            self.assertEqual(kodemachine.check_label(suggested, kodemachine.Settings()), suggested)

    def test_new_label_near_an_existing_one_is_reported(self) -> None:
        self.vm("web")
        self.assert_says(self.spawn("start", "-d", "wbe"), 0, "wbe is a new machine; web exists as well")

    def test_mistyped_command_creates_no_machine(self) -> None:
        for word, meant in (
            ("lsit", "list"),
            ("stat", "start"),
            ("lst", "list"),
            ("atach", "attach"),
            ("stopp", "stop"),
            ("log", "attach"),
            ("shells", "ssh"),
        ):
            with self.subTest(word):
                err = self.spawn(word, code=2).err
                self.assertIn(f"did you mean {meant!r}?", err)
                how = "kodemachine project-alpha" if meant == "start" else f"kodemachine start {word}"
                self.assertIn(how, err)
        self.assert_machines()
        self.spawn("start", "-d", "lsit")
        self.assertEqual(self.spawn("lsit", "-d").out, self.address + "\n")
        self.assert_machines("km-lsit")

    def test_invalid_options_are_usage_errors(self) -> None:
        for args in ("alpha --timeout 0", "alpha --timeout x", "alpha --cpus 0", "alpha --memory 4X", "alpha -d --rm",
                     "alpha --detach -- ls", "start", "start a b", "list -- x", "--nothing", "alpha --nothing"):
            with self.subTest(args):
                self.spawn(*args.split(), code=2)
        self.assertEqual(self.utm.calls(), [])


class AddressesTest(Case):
    """start: a guest with several addresses."""

    GREETERS = 2

    def test_answer_about_another_machine_is_not_used(self) -> None:
        first, second = self.utm.app()["addresses"][:2]
        self.vm("a", "started", ips=[second])
        self.remember(a={})
        self.utm.change("km-a", name="renamed by hand")
        self.vm("a", "started", ips=[first])
        self.assertEqual(self.spawn("start", "-d", "a").out, first + "\n")

    def test_first_address_that_greets_as_ssh_is_used(self) -> None:
        port = self.uses["ssh_port"]
        greeting, polite = self.utm.app()["addresses"][:2]
        web = Greeter(["127.0.0.4"], b"HTTP/1.1 400 Bad Request\r\n", port)
        self.addCleanup(web.close)
        mute = socket.create_server(("127.0.0.5", port))
        self.addCleanup(mute.close)
        self.utm.add("km-alpha", ips=["127.0.0.6", "127.0.0.4", "127.0.0.5", greeting])
        self.spawn()
        self.assertEqual(self.spawn("ip", "alpha").out, greeting + "\n")
        self.utm.change("km-alpha", ips=["127.0.0.5", polite])
        self.assertEqual(self.spawn("ip", "alpha").out, polite + "\n")

    def test_session_gets_the_only_likely_address_without_a_probe(self) -> None:
        """sshd counts probes; from OpenSSH 9.8 on it then refuses the person for a while."""
        answers = self.address
        self.real_tool("ssh", "/usr/bin/true")
        self.spawn("start", "-d", "alpha")
        table = (("one address", ["127.0.0.9"], "127.0.0.9"),
                 ("one likely address", ["fe80::1", "127.0.0.9", "192.168.64.99"], "192.168.64.99"),
                 ("two equally likely addresses", ["127.0.0.9", answers], answers))
        for case, ips, chosen in table:
            with self.subTest(case):
                self.utm.change("km-alpha", ips=ips)
                for command in (("alpha", "--", "true"), ("ssh", "alpha")):
                    self.spawn(*command)
                    self.assertIn(f"HostName={chosen}", self.utm.calls(tool="ssh")[-1]["argv"])
        self.utm.change("km-alpha", ips=["127.0.0.9"])
        result = self.km("start", "-d", "alpha", "--timeout", "1")
        self.assert_says(result, 6, "its ssh port does not answer at 127.0.0.9")


class StartOptionsTest(Case):
    """start: several labels, --fresh, --disposable, --cpus and --memory."""

    def test_several_labels_print_a_line_of_label_and_address_each(self) -> None:
        sshd = self.sshd(3)
        self.image()
        self.config(ssh_port=sshd.port)
        self.vm("b", "paused")
        result = self.km("start", "-d", "a", "b", "km-c", "a")
        self.assertEqual(result.code, 0, result.err)
        addresses = {name[3:]: self.utm.machine(name)["ips"][0] for name in self.utm.names() if name != IMAGE}
        self.assertEqual(sorted(result.out.splitlines()), sorted(f"{label} {ip}" for label, ip in addresses.items()))
        self.assertEqual(sorted(addresses), ["a", "b", "c"])

    def test_failure_of_one_machine_does_not_stop_the_others(self) -> None:
        sshd = self.with_sshd()
        for _ in range(2):
            self.vm("twin")
        result = self.km("start", "-d", "twin", "a")
        self.assert_says(result, 4, "2 machines are named km-twin")
        self.assertEqual(result.out, f"a {sshd.hosts[0]}\n")

    def test_fresh_asks_and_makes_a_new_machine(self) -> None:
        self.with_sshd()
        old = self.vm("a", "started")
        for answer, code in ((b"n\n", 1), (b"y\n", 0)):
            terminal = self.screen("start", "-d", "a", "--fresh")
            terminal.expect(rb"Delete km-a \(running\) and create it again\? \[y/N\] ")
            self.assertEqual(self.utm.machine("km-a")["uuid"], old)
            terminal.send(answer)
            self.assertEqual(terminal.wait(), code, terminal.seen)
        self.assertNotEqual(self.utm.machine("km-a")["uuid"], old)
        self.assertEqual(list(self.records()), [self.utm.machine("km-a")["uuid"]])
        self.assert_says(self.km("start", "-d", "a", "--fresh"), 2, "--fresh needs a yes", "Add -y")
        self.assert_says(self.km("start", "-d", "a", "--fresh", "-y"), 0)
        self.assertEqual(self.asked("delete")[0], [old])
        self.assertEqual((len(self.asked("delete")), self.utm.names()), (2, [IMAGE, "km-a"]))


    def test_fresh_works_for_a_label_that_resembles_a_command(self) -> None:
        self.with_sshd()
        self.vm("helm")
        self.assert_says(self.km("helm", "--fresh", "-y", "-d"), 0, "deleting km-helm", "cloning")
        self.assertEqual(self.utm.names(), [IMAGE, "km-helm"])
        self.assert_says(self.km("shop", "--fresh", "-y", "-d"), 2, "did you mean 'stop'?")

    def test_fresh_keeps_the_machine_if_the_image_cannot_be_cloned(self) -> None:
        self.image(status="started")
        self.vm("a")
        self.vm("clone")
        for args, code, words in (
            ((), 4, "only a stopped image can be cloned"),
            (("--base", "nope"), 3, "no image nope"),
            (("--base", "km-a"), 4, "not an image"),
        ):
            self.assert_says(self.km("start", "-d", "a", "--fresh", "-y", *args), code, words)
        self.assertEqual((self.asked("delete"), "km-a" in self.utm.names()), ([], True))

    def test_fresh_keeps_the_machine_if_the_first_boot_script_cannot_be_read(self) -> None:
        self.with_sshd(first_boot="/nonexistent/script")
        self.vm("a")
        self.assert_says(self.km("start", "-d", "a", "--fresh", "-y"), 2, "first_boot is /nonexistent/script")
        self.assertEqual(self.utm.names(), [IMAGE, "km-a"])

    def test_fresh_without_a_machine_needs_no_yes(self) -> None:
        sshd = self.with_sshd()
        self.assertEqual(self.km("start", "-d", "a", "--fresh").out, sshd.hosts[0] + "\n")


    def test_cpus_memory_and_mac_are_set_in_one_change_before_the_first_start(self) -> None:
        self.with_sshd()
        result = self.km("start", "-d", "a", "--cpus", "2", "--memory", "1.5G")
        self.assertEqual(result.code, 0, result.err)
        vm = self.utm.machine("km-a")
        self.assertEqual((vm["cpus"], vm["memory"]), (2, 1536))
        self.assertNotEqual(vm["macs"], self.utm.machine(IMAGE)["macs"])
        changes = self.calls_of("configure")
        self.assertEqual([call["argv"][3:] for call in changes], [[vm["uuid"], "", "1536", "2", "", *vm["macs"]]])
        self.assertLess(changes[0]["time"], self.calls_of("start")[0]["time"])
        self.assertEqual((self.utm.machine(IMAGE)["cpus"], self.utm.machine(IMAGE)["memory"]), (4, 4096))

    def test_wait_for_the_fleet_lock_does_not_count_as_boot_time(self) -> None:
        sshd = self.with_sshd(boot_timeout=8)
        self.vm("a", start_seconds=0.4)
        with self.held_lock("fleet"):
            process = self.start_km("start", "-d", "a")
            assert process.stderr
            while b"waiting for another kodemachine" not in process.stderr.readline():
                pass
            time.sleep(8)           # the time limit of the boot
        self.assertEqual(self.ended(process)[:2], (0, sshd.hosts[0] + "\n"))

    def test_machine_turned_on_meanwhile_is_not_changed_and_reported(self) -> None:
        self.with_sshd()
        uuid = self.vm("a")
        self.remember(a={"never_started": True})
        self.utm.fault("configure", delay=1.5, when="before")
        process = self.start_km("start", "-d", "a", "--cpus", "2")
        wait_for(lambda: self.utm.calls("configure", "osascript"))
        self.utm.change(uuid, status="started")
        self.assert_says(self.ended(process), 4, "km-a is running: it was started meanwhile", "again")

    def test_base_option_must_match_a_clone_begun_earlier(self) -> None:
        self.with_sshd()
        self.image("kodeimage-v0.1.0")
        self.utm.option(clone_seconds=0.6)
        process = self.start_km("start", "-d", "a")
        wait_for(lambda: self.calls_of("clone"))
        process.kill()
        process.wait()
        result = self.km("start", "-d", "a", "--base", "kodeimage-v0.1.0")
        self.assert_says(result, 4, f"km-a was cloned from {IMAGE}", "the same command with --fresh")
        self.assert_says(self.km("start", "-d", "a", "--base", IMAGE), 0)

    def test_options_for_new_machines_exit_4_on_an_existing_one(self) -> None:
        self.image("other")
        self.image()
        self.vm("a", "started")
        self.remember(a={"image": IMAGE, "image_uuid": self.utm.machine(IMAGE)["uuid"]})
        for args in (("--cpus", "2"), ("--memory", "1G"), ("--base", "other")):
            self.assert_says(self.km("start", "a", *args), 4, "the same command with --fresh")
        self.assertEqual(set(self.utm.verbs()) - {"list", "ip-address"}, set())
        self.remember(a={"image": 1})
        self.assert_says(self.km("start", "a", "--base", "other"), 4, "km-a was cloned from an unknown image")

    def test_conflicting_options_exit_2_and_do_nothing(self) -> None:
        for args in (
            ("a", "--rm", "-d"),
            ("a", "--rm", "--fresh", "-y"),
            ("a", "-d", "--", "true"),
            ("start", "a", "b"),
            ("start", "a", "b", "--rm"),
            ("start", "a", "b", "--", "true"),
            ("start",),
            ("-v", "-q", "a"),
            ("a", "--cpus", "0"),
            ("a", "--cpus", "two"),
            ("a", "--memory", "4X"),
            ("a", "--memory", "1M"),
            ("a", "--timeout", "-1"),
            ("a", "--timeout", "inf"),
            ("a", "--json"),
            ("ssh", "a", "--rm"),
            ("ssh", "a", "b"),
        ):
            with self.subTest(args):
                result = self.km(*args)
                self.assertEqual(
                    (result.code, result.out, len(result.err.splitlines()) <= 2), (2, "", True), result.err
                )
        self.assertEqual(self.utm.calls(), [])

    def with_sshd_at(self, count: int) -> None:
        """As with_sshd, for as many machines."""
        sshd = self.sshd(count)
        self.image()
        self.config(ssh_port=sshd.port)

    def test_on_a_terminal_the_last_line_says_what_to_type_next(self) -> None:
        self.with_sshd_at(2)
        for labels, words in ((["a"], b"a is ready; to connect: \x1b\\[1mkodemachine ssh a\x1b"),
                              (["a", "b"], b"ready: (a, b|b, a); to connect: \x1b\\[1mkodemachine ssh [ab]\x1b")):
            terminal = self.screen("start", "-d", *labels, TERM="xterm")
            terminal.expect(words + rb"\[0m\s*\Z")
            self.assertEqual(terminal.wait(), 0)
        self.assertNotIn("ready", self.km("start", "-d", "a").err)

    def test_a_command_for_several_machines_is_refused_with_the_commands_to_type_instead(self) -> None:
        commands = ("start -d a b", "a -- make 'x y'", "b -- make 'x y'")
        then = "; then: ".join(f"kodemachine {words}" for words in commands)
        self.assertIn(then + "\n", self.km("start", "a", "b", "--", "make", "x y").err)
        self.assertIn("kodemachine start -d a b\n", self.km("start", "a", "b").err)

    def test_utms_folder_is_read_only_for_sizes(self) -> None:
        """macOS asks the person before a program reads it."""
        self.with_sshd_at(3)
        self.documents_are_never_read(["start", "-d", "a"], ["a", "--", "true"], ["list"], ["list", "--json"],
                                      ["status", "a"], ["status"], ["start", "-d", "a", "--fresh", "-y"],
                                      ["t", "--rm", "--", "true"], ["base", "list"], ["stop", "a"], ["list", "-a"])
        self.assertEqual(self.utm.names(), [IMAGE, "km-a"])

    def documents_are_never_read(self, *commands: list[str]) -> None:
        for words in commands:
            with self.subTest(words):
                argv = self.command(*words)
                launch = self.LAUNCH.replace("sys.exit(", "kodemachine.read_bundles = None\nsys.exit(")
                argv[argv.index(self.LAUNCH)] = launch
                self.assert_says(self.run_program(argv), 0)


class OfflineTest(Case):
    """--offline: a new machine whose network interfaces have no route out of the Mac."""

    def modes(self, label: str) -> list[str]:
        return [str(mode) for mode in self.utm.machine("km-" + label)["modes"]]

    def shown(self, label: str) -> tuple[str, str]:
        """The network of a machine in JSON, and its status in text."""
        text = re.findall(r"^status: +(.*)$", self.km("status", label).out, re.MULTILINE)
        return str(self.listed()["km-" + label]["network"]), text[0]

    def test_every_interface_is_offline_before_the_first_start(self) -> None:
        self.with_sshd()
        self.utm.change(IMAGE, macs=["02:00:00:00:00:01", "02:00:00:00:00:02"])
        self.assertEqual(self.km("a", "--offline", "--", "echo", "in").out, "in\n")
        self.assertEqual(self.modes("a"), ["host", "host"])
        self.assertLess(self.calls_of("configure")[0]["time"], self.calls_of("start")[0]["time"])
        self.assertEqual(len(self.calls_of("configure")), 1)
        self.assertEqual(self.shown("a"), ("offline", "running offline"))
        self.assertEqual(self.utm.machine(IMAGE)["modes"], [])

    def test_ordinary_machine_is_shared(self) -> None:
        self.with_sshd()
        self.km("start", "-d", "a")
        self.assertEqual((self.modes("a"), self.shown("a")), (["shared"], ("shared", "running")))

    def test_machine_that_is_not_proved_offline_is_not_started(self) -> None:
        self.with_sshd()
        # So only the network mode is left to be proved.
        self.utm.option(regenerate_mac=True)
        for rule in ({"error": -1712}, {"error": -2700, "string": "No."}, {"stdout": "km-a\n4096\n4\n{}\n"}):
            self.utm.clear_faults()
            if "stdout" in rule:
                mac = self.utm.machine("km-a")["macs"][0]
                rule = {"stdout": str(rule["stdout"]).format(mac)}
            self.utm.fault("configure", **rule)
            result = self.km("start", "-d", "a", "--offline", patience={"UNIQUE_LIMIT": 1.0})
            self.assert_says(result, 1, "km-a was not started: UTM did not take it off the network")
        self.assertEqual(self.asked("start"), [])
        # The next run continues, also without the option.
        self.utm.clear_faults()
        self.assert_says(self.km("start", "-d", "a"), 0)
        self.assertEqual((self.modes("a"), self.shown("a")[0]), (["host"], "offline"))

    def test_interrupted_clone_becomes_offline_before_its_start(self) -> None:
        self.with_sshd()
        for first, second in ((["--offline"], []), ([], ["--offline"])):
            self.utm.option(clone_seconds=0.4)
            process = self.start_km("start", "-d", "a", *first)
            wait_for(lambda: self.utm.clones())
            process.kill()
            self.ended(process)
            self.assert_says(self.km("start", "-d", "a", *second), 0)
            self.assertEqual((self.modes("a"), self.shown("a")[0]), (["host"], "offline"))
            self.assert_says(self.km("delete", "-f", "a"), 0)

    def test_existing_machine_does_not_go_offline(self) -> None:
        self.with_sshd()
        self.vm("a")
        self.assert_says(self.km("start", "-d", "a", "--offline"), 4, "km-a exists already and is not offline",
                         "To replace it: the same command with --fresh")
        self.assert_says(self.km("start", "-d", "a", "--offline", "--fresh", "-y"), 0)
        self.assertEqual(self.shown("a")[0], "offline")
        self.assert_says(self.km("start", "-d", "a", "--offline"), 0)

    def test_prepared_machine_that_was_not_started_yet_goes_offline(self) -> None:
        self.with_sshd()
        self.vm("a")
        self.remember(a={"mac_is_unique": True, "never_started": True})
        self.assertEqual(self.shown("a"), ("shared", "stopped"))
        self.utm.fault("configure", error=-2700, string="No.", times=1)
        self.assert_says(self.km("start", "-d", "a", "--offline"), 1, "UTM did not take it off the network")
        self.assertEqual(self.shown("a"), ("None", "stopped"))
        self.assert_says(self.km("start", "-d", "a", "--offline"), 0)
        self.assertEqual((self.modes("a"), self.shown("a")[0]), (["host"], "offline"))

    def test_offline_machine_that_a_person_changed_is_offline_again_at_its_next_start(self) -> None:
        self.with_sshd()
        self.km("start", "-d", "a", "--offline")
        self.km("stop", "a")
        self.utm.change("km-a", modes=["shared"])
        self.assert_says(self.km("start", "-d", "a"), 0)
        self.assertEqual((self.modes("a"), self.shown("a")[0]), (["host"], "offline"))

    def test_machine_that_was_started_by_hand_before_the_proof_does_not_count_as_offline(self) -> None:
        self.with_sshd()
        self.vm("a", "started")
        self.remember(a={"is_offline": True, "never_started": True})
        self.assert_says(self.km("a", "--offline", "--", "true"), 4, "km-a exists already and is not offline")
        self.assertEqual(self.listed()["km-a"]["network"], None)

    def test_copy_of_an_offline_machine_is_offline(self) -> None:
        self.with_sshd()
        self.km("start", "-d", "a", "--offline")
        self.km("stop", "a")
        self.utm.change("km-a", ips=["127.0.0.9"])
        self.assert_says(self.km("clone", "a", "b"), 0)
        self.utm.change("km-b", modes=["shared"])
        self.assert_says(self.km("start", "-d", "b"), 0)
        self.assertEqual((self.modes("b"), self.shown("b")[0]), (["host"], "offline"))

    def test_machine_from_an_offline_image_is_shown_as_offline(self) -> None:
        self.with_sshd()
        self.utm.change(IMAGE, modes=["host"])
        self.km("start", "-d", "a")
        self.assertEqual((self.modes("a"), self.shown("a")[0]), (["host"], "offline"))

    def test_network_of_other_machines_is_unknown(self) -> None:
        self.image()
        self.assertEqual(self.listed("-a")[IMAGE]["network"], None)


class ClockTest(Case):
    """The guest's clock, which stops while the machine is paused or the Mac sleeps, is set before the shell opens."""

    GREETERS = 1

    def sleep_of_mac(self, wake: int | None) -> None:
        """A sysctl that reports when the Mac woke up; None: an unknown name, as on other systems."""
        line = "echo \"sysctl: unknown oid 'kern.waketime'\" >&2; exit 1"
        if wake is not None:
            line = f"echo '{{ sec = {wake}, usec = 7 }} Sat Nov 28 07:00:00 2026'"
        script = f'#!/bin/sh\n[ "$*" = "-n kern.waketime" ] || exit 9\n{line}\n'
        self.write(os.path.join(self.bin, "sysctl"), script, 0o755)

    def turn_clock(self, offset: int) -> None:
        """Makes the guest's clock wrong by so many seconds."""
        self.write(self.inside("km-alpha", "run/clock"), f"{offset}\n", 0o666)

    @property
    def offset(self) -> int:
        return int(self.read(self.inside("km-alpha", "run/clock")))

    def settings(self) -> int:
        """How many commands about the clock the guest has run."""
        return sum("date -s" in " ".join(call["argv"]) for call in self.calls_of("exec"))

    def setUp(self) -> None:
        super().setUp()
        self.sleep_of_mac(0)
        self.spawn()

    def test_new_machine_and_reconnect_ask_nothing_of_the_clock(self) -> None:
        self.spawn()
        self.assertEqual(self.settings(), 0)

    def test_clock_is_set_once_after_the_mac_has_slept(self) -> None:
        for wake in (1700000000, 1700009999):
            self.turn_clock(-3600)
            self.sleep_of_mac(wake)
            before = self.settings()
            self.spawn()
            self.assertLessEqual(abs(self.offset), 2)
            self.turn_clock(-3600)
            self.spawn()
            self.assertEqual((self.settings(), self.offset), (before + 1, -3600))

    def test_clock_is_set_when_a_paused_machine_continues(self) -> None:
        for words in (["start", "-d"], ["resume"]):
            self.turn_clock(-60)
            self.assert_says(self.km("suspend", "alpha"), 0)
            self.assert_says(self.km(*words, "alpha"), 0)
            self.assertLessEqual(abs(self.offset), 2)
        self.turn_clock(-60)
        self.utm.change("km-alpha", status="resuming")
        before = len(self.utm.calls("status"))
        start = self.start_km("start", "-d", "alpha")
        wait_for(lambda: len(self.utm.calls("status")) > before)
        self.utm.change("km-alpha", status="started")
        self.assert_says(self.ended(start), 0)
        self.assertLessEqual(abs(self.offset), 2)

    def test_clock_that_is_late_by_at_most_two_seconds_or_early_is_not_changed(self) -> None:
        for offset in (-1, 60):
            self.turn_clock(offset)
            self.km("suspend", "alpha")
            self.km("resume", "alpha")
            self.assertEqual(self.offset, offset)

    def test_mac_without_that_sysctl_has_never_slept(self) -> None:
        self.sleep_of_mac(None)
        self.spawn()
        self.assertEqual(self.settings(), 0)

    def test_clock_that_cannot_be_set_is_a_warning(self) -> None:
        self.turn_clock(-60)
        refusal = "#!/bin/sh\n[ $1 = +%s ] && echo 5\necho 'not today' >&2; exit 1\n"
        self.write(self.inside("km-alpha", "bin/date"), refusal)
        self.sleep_of_mac(1700000000)
        self.assertIn("the clock of km-alpha may be wrong (not today); to set it: kodemachine exec alpha -- date -s",
                      self.spawn("start", "-d", "alpha").err)
        self.utm.fault("exec", error=-2700, string="No.", times=1)
        self.sleep_of_mac(1700009999)
        self.assertIn("the clock of km-alpha may be wrong (", self.spawn("start", "-d", "alpha").err)
        os.unlink(self.inside("km-alpha", "bin/date"))
        os.symlink("/bin/true", self.inside("km-alpha", "bin/date"))
        before = self.settings()
        self.spawn()
        self.spawn()
        self.assertEqual(self.settings(), before + 2, "tried until it succeeds")


class FirstBootTest(Case):
    """start: the script that a new machine runs."""

    def setUp(self) -> None:
        super().setUp()
        self.script = os.path.join(self.folder, "my script")
        self.write_script("#!/bin/sh", "echo hello")

    def write_script(self, *lines: str) -> None:
        self.write(self.script, "\n".join([*lines, ""]))

    def with_fake_ssh(self) -> None:
        """ssh stores its input in a file, and exits with the status in the file `code`."""
        self.image()
        try:
            greeter = Greeter(self.utm.app()["addresses"][:3])
        except OSError:
            self.skipTest("this machine has not so many addresses")
        self.addCleanup(greeter.close)
        self.config(ssh_port=greeter.port, first_boot=self.script)
        real = os.path.join(self.utm.folder, "ssh.real")
        self.write(real, real + ".sh")
        self.write(real + ".sh", f'#!/bin/sh\ncat >>"{self.folder}/sent"\nexit $(cat "{self.folder}/code")\n', 0o755)
        self.end_with(0)

    def end_with(self, code: int) -> None:
        self.write(os.path.join(self.folder, "code"), str(code))

    def sent(self) -> int:
        """How often the script has been sent."""
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.folder, "sent"), encoding="utf-8") as file:
            return file.read().count("echo hello")
        return 0

    LINES = ("#!/bin/sh -u", 'echo "user $(id -un) in $PWD: $0"', "echo to stderr >&2", 'echo "input: $(cat)"')

    def test_script_runs_as_the_user_over_ssh_and_its_failure_is_reported(self) -> None:
        self.with_sshd(first_boot=self.script)
        self.write_script(*self.LINES, "exit 3")
        failed = self.km("start", "-d", "a")
        self.assertEqual((failed.code, failed.out), (1, ""))
        home = os.path.expanduser("~" + pwd.getpwuid(os.geteuid()).pw_name)
        user = re.search(r"(?m)^user (\S+) in (.*): (/.*/\.first-boot\.\w+)$", failed.err)
        assert user, failed.err
        self.assertEqual(user.groups()[:2], (pwd.getpwuid(os.geteuid()).pw_name, home))
        self.assertFalse(os.path.exists(user.group(3)))
        for words in ("running " + self.script, "to stderr", "input: \n", "exit status 3", "kodemachine ssh a"):
            self.assertIn(words, failed.err)
        self.assertEqual((self.states()["km-a"], self.record("a")["first_boot"]), ("started", "pending"))

    def test_script_runs_again_after_a_failure_and_never_after_its_success(self) -> None:
        sshd = self.with_sshd(first_boot=self.script)
        self.write_script(*self.LINES, "exit 3")
        self.assertEqual(self.km("start", "-d", "a").code, 1)
        inside = self.km("ssh", "a", "--", "echo inside")
        self.assertEqual((inside.code, inside.out), (0, "inside\n"))
        self.assertNotIn("running", inside.err)
        self.write_script(*self.LINES)
        again = self.km("start", "-d", "a")
        self.assertEqual((again.code, again.out), (0, sshd.hosts[0] + "\n"), again.err)
        self.assertIn("\nuser ", again.err)
        self.assertEqual(self.record("a")["first_boot"], "done")
        self.assertEqual(self.km("a", "--", "echo session"), (0, "session\n", ""))


    def test_script_runs_in_several_machines_and_each_failure_counts(self) -> None:
        self.with_fake_ssh()
        self.end_with(7)
        result = self.km("start", "-d", "a", "b")
        self.assertEqual((result.code, result.out, result.err.count("exit status 7"), self.sent()), (1, "", 2, 2))
        self.end_with(0)
        result = self.km("start", "-d", "a", "b")
        self.assertEqual((result.code, len(result.out.splitlines()), self.sent()), (0, 2, 4), result.err)

    def test_failure_with_rm_deletes_the_machine(self) -> None:
        self.with_fake_ssh()
        self.end_with(9)
        self.assert_says(self.km("a", "--rm"), 1, "ended with exit status 9", "deleting km-a (--rm)")
        self.assertEqual(self.utm.names(), [IMAGE])

    def test_script_that_cannot_run_creates_no_machine(self) -> None:
        self.with_fake_ssh()
        for content, words in ((None, ("No such file", "config set first_boot")), ("folder", ("not a regular",)),
                               ("fifo", ("not a regular file",)), ("\ufeff#!/bin/sh\n", ("byte order mark",)),
                               ("#!/bin/sh\r\necho hello\r\n", ("line ends (CRLF)", "perl -pi"))):
            self.script = os.path.join(self.folder, f"script {len(os.listdir(self.folder))}")
            if content == "folder":
                os.mkdir(self.script)
            elif content == "fifo":
                os.mkfifo(self.script)
            elif content is not None:
                self.write(self.script, content)
            self.use(first_boot=self.script)
            self.assert_says(self.km("start", "-d", "a"), 2, f"first_boot is {self.script}", *words)
            code = 0 if content is None else 2
            self.assert_says(self.km("config", "set", "first_boot", self.script), code)
        self.assertEqual((self.utm.names(), self.asked("clone")), ([IMAGE], []))
        convert = re.search(r"To convert it: (.*)", self.km("start", "-d", "a").err)
        assert convert
        self.assertEqual(self.run_program(["/bin/sh", "-c", convert[1]]), (0, "", ""))
        self.assertEqual(self.read(self.script), "#!/bin/sh\necho hello\n")
        self.assert_says(self.km("start", "-d", "a"), 0)
        self.assertEqual(self.sent(), 1)

    def test_script_without_an_interpreter_runs_in_sh(self) -> None:
        self.with_sshd(first_boot=self.script)
        self.write_script('echo "hello from sh"')
        self.assert_says(self.km("start", "-d", "a"), 0, "hello from sh")

    def test_ctrl_c_and_ctrl_backslash_end_the_script_and_it_is_run_again(self) -> None:
        self.with_sshd(first_boot=self.script)
        self.write_script("#!/bin/sh", "echo ready", "exec sleep 30")
        for key, code in ((b"\x03", 130), (b"\x1c", 131)):
            terminal = self.screen("a", columns=120)
            terminal.expect(b"ready")
            terminal.send(key)
            self.assertEqual(terminal.wait(), code)
            terminal.expect(b"first_boot was interrupted in km-a; to run it again: kodemachine a\r\n")
            self.assertEqual(terminal.attributes(), terminal.before)
            self.assertEqual(self.record("a")["first_boot"], "pending")

    def test_signal_ends_the_script_and_it_is_run_again(self) -> None:
        self.with_sshd(first_boot=self.script)
        self.write_script("#!/bin/sh", "echo ready", "exec sleep 30")
        for number in (signal.SIGTERM, signal.SIGHUP):
            process = self.start_km("start", "-d", "a")
            assert process.stderr
            while process.stderr.readline() not in (b"ready\n", b""):
                pass
            process.send_signal(number)
            self.assertEqual(self.ended(process)[:2], (128 + number, ""))
            self.assertNoChildrenLeft()
            self.assertEqual(self.record("a")["first_boot"], "pending")

    def test_a_copy_of_a_machine_whose_script_failed_runs_it(self) -> None:
        self.with_fake_ssh()
        self.end_with(7)
        self.assert_says(self.km("start", "-d", "a"), 1, "ended with exit status 7")
        self.assert_says(self.km("stop", "a"), 0)
        self.assert_says(self.km("clone", "a", "b"), 0)
        self.assertEqual([self.record(label)["first_boot"] for label in "ab"], ["pending", "pending"])
        self.end_with(0)
        self.assert_says(self.km("start", "-d", "b"), 0)
        self.assertEqual((self.sent(), self.record("b")["first_boot"]), (2, "done"))

    def test_only_a_new_machine_runs_it_and_only_once(self) -> None:
        self.with_fake_ssh()
        self.vm("old")
        self.assert_says(self.km("start", "-d", "old"), 0)
        self.assertEqual(self.sent(), 0)
        for _ in range(2):
            self.assert_says(self.km("start", "-d", "a"), 0)
            self.assertEqual((self.sent(), self.record("a")["first_boot"]), (1, "done"))
            self.assert_says(self.km("stop", "a"), 0)
        self.assert_says(self.km("clone", "a", "b"), 0)
        self.assert_says(self.km("b"), 0)                   # whose disk has all that it did
        self.assertEqual((self.sent(), self.record("b")["first_boot"]), (1, "done"))
        [command] = {call["argv"][-1] for call in self.utm.calls(tool="ssh") if "-T" in call["argv"]}
        self.assertRegex(command, r"\Aexec sh -c '")
        for call in self.utm.calls(tool="ssh"):
            self.assertIn("StrictHostKeyChecking=yes", call["argv"])


class RmTest(Case):
    """start --rm: the machine of a session is deleted with it, however the session ends."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.with_sshd()

    def session(self) -> subprocess.Popen[bytes]:
        """A session that lasts until its input ends."""
        process = self.start_km("t", "--rm", "--", "echo ready; exec cat", input_follows=True)
        assert process.stdout
        self.assertEqual(process.stdout.readline(), b"ready\n", self.server.log())
        self.assertEqual(self.states()["km-t"], "started")
        return process

    def test_session_status_is_returned_and_the_machine_deleted(self) -> None:
        result = self.km("t", "--rm", "--", "echo hello; exit 7")
        self.assertEqual((result.code, result.out), (7, "hello\n"), result.err)
        self.assertIn("deleting km-t (--rm)\n", result.err)
        self.assertEqual((self.utm.names(), self.records(), self.read_state("known_hosts")), ([IMAGE], {}, ""))
        self.assertNoChildrenLeft()

    def test_existing_machine_is_not_touched(self) -> None:
        for label, status in (("off", "stopped"), ("on", "started")):
            self.vm(label, status)
            self.assert_says(self.km(label, "--rm"), 4, "exists already", f"kodemachine delete --force {label}")
        self.assertEqual(self.states(), {IMAGE: "stopped", "km-off": "stopped", "km-on": "started"})
        self.assertEqual((self.asked("start"), self.utm.calls(tool="ssh"), self.records()), ([], [], {}))

    def test_session_deletes_only_its_own_machine(self) -> None:
        process = self.session()
        self.utm.change("km-t", name="km-precious")
        other = self.vm("t")
        result = self.ended(process)
        self.assert_says(result, 0, "km-t was not deleted", "kodemachine delete --force t")
        self.assertEqual((self.asked("delete"), self.utm.machine(other)["name"]), ([], "km-t"))
        self.assertIn("km-precious", self.utm.names())

    def test_signal_ends_ssh_and_the_machine_is_deleted(self) -> None:
        for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            process = self.session()
            process.send_signal(number)
            self.assertEqual((self.ended(process).code, self.utm.names()), (code, [IMAGE]))
            self.assertNoChildrenLeft()

    def test_signals_during_the_deletion_do_not_stop_it(self) -> None:
        self.utm.change(IMAGE, stop_seconds=1.5)
        for first, codes in ((signal.SIGTERM, {143}), (None, {129, 130, 143})):  # None: the session ends by itself
            process = self.session()
            if first:
                process.send_signal(first)
            elif process.stdin:
                process.stdin.close()
                process.stdin = None
            self.wait_until_asked("stop", self.utm.machine("km-t")["uuid"])
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                process.send_signal(number)
            self.assertIn(self.ended(process).code, codes)
            self.assertEqual((self.utm.names(), self.records()), ([IMAGE], {}))

    def test_closed_terminal_still_deletes_the_machine(self) -> None:
        terminal = self.km_tty("t", "--rm", "--", "echo ready; exec sleep 60")
        terminal.expect(rb"ready\r?\n")
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, terminal.master)  # the window is closed
        os.close(nowhere)
        self.assertEqual((terminal.process.wait(60), self.utm.names()), (129, [IMAGE]))
        self.assertNoChildrenLeft()

    def test_ctrl_c_goes_to_the_remote_command_and_the_terminal_is_restored(self) -> None:
        self.ssh_options("RequestTTY force\n")
        script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done"
        terminal = self.km_tty("t", "--rm", "--", f'exec sh -c "{script}"')
        terminal.expect(rb"ready\r?\n")
        terminal.send(b"\x03")
        terminal.expect(b"caught")
        self.assertEqual((terminal.wait(), self.utm.names()), (7, [IMAGE]))
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c_without_a_remote_terminal_ends_ssh_and_the_machine_is_deleted(self) -> None:
        terminal = self.km_tty("t", "--rm", "--", "echo ready; exec sleep 60")
        terminal.expect(rb"ready\r?\n")
        terminal.send(b"\x03")
        self.assertIn(terminal.wait(), (255, 130))  # it depends on the ssh
        self.assertEqual(self.utm.names(), [IMAGE])

    def test_terminal_is_restored_if_ssh_dies_in_raw_mode(self) -> None:
        path = os.path.join(self.folder, "dying-ssh")
        self.real_tool("ssh", self.write(path, "#!/bin/sh\nstty raw -echo\nkill -KILL $$\n", 0o755))
        terminal = self.km_tty("t", "--rm")
        self.assertEqual((terminal.wait(), self.utm.names()), (128 + signal.SIGKILL, [IMAGE]))
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_failed_deletion_names_the_command_to_repeat_it(self) -> None:
        self.utm.fault("delete", error=-2700, string="Disk on fire.")
        result = self.km("t", "--rm", "--", "exit 3")
        self.assert_says(result, 3, "km-t was not deleted",
                         "Disk on fire. To delete it: kodemachine delete --force t\n")
        self.assertIn("km-t", self.utm.names())

    def test_machine_deleted_by_somebody_else_is_not_an_error(self) -> None:
        process = self.session()
        with self.utm.fake as utm:
            utm.remove(self.utm.fake.vms[1]["uuid"])
        result = self.ended(process)
        self.assertEqual((result.code, "not deleted" in result.err), (0, False), result.err)

    def test_machine_without_a_session_is_deleted(self) -> None:
        self.utm.fault("start", error=-2700, string="QEMU is tired.")
        self.assert_says(self.km("t", "--rm"), 1, "does not start", "QEMU is tired.")
        self.utm.clear_faults()
        self.assertEqual(self.utm.names(), [IMAGE])
        self.utm.change(IMAGE, agent_after=None)
        process = self.start_km("t", "--rm")
        wait_for(lambda: self.asked("ip-address"))
        process.send_signal(signal.SIGINT)
        self.assertEqual((self.ended(process).code, self.utm.names()), (130, [IMAGE]))

    def test_interrupted_clone_reports_how_to_delete_it(self) -> None:
        self.utm.option(clone_seconds=4)
        process = self.start_km("t", "--rm")
        wait_for(lambda: f"{IMAGE} 2" in self.utm.names())
        process.send_signal(signal.SIGINT)
        self.assert_says(self.ended(process), 130, f"UTM is still cloning {IMAGE} to km-t; "
                         "when t is there, delete it: kodemachine delete t")
        wait_for(lambda: "km-t" in self.utm.names())
        self.assert_says(self.km("delete", "t"), 0, "t deleted")

    def test_machine_left_by_a_kill_is_marked_and_purged_while_running(self) -> None:
        process = self.session()
        self.assertNotIn("--rm", self.km("list").out)
        self.assertIn("nothing to purge", self.km("purge", "-y").err)
        process.kill()
        process.wait()
        self.assertRegex(self.km("list").out, r"(?m)^t +running \(--rm\)")
        self.assert_says(self.km("purge", "-y"), 0, "t deleted")
        self.assertEqual(self.utm.names(), [IMAGE])
        assert process.stdin
        process.stdin.close()  # ends the ssh that it left behind

    def test_machine_left_by_a_kill_is_kept_once_somebody_uses_it(self) -> None:
        process = self.session()
        process.kill()
        process.wait()
        self.assertEqual(self.km("ssh", "t", "--", "true").code, 0)
        self.assertNotIn("--rm", self.km("list").out)
        self.assert_says(self.km("purge", "-y"), 0, "skipped 1 machine: running or paused (--all deletes those too)",
                         "nothing to purge")
        self.assertEqual(self.states()["km-t"], "started")

    def test_session_of_a_deleted_machine_does_not_block_the_next(self) -> None:
        first = self.session()
        self.assertEqual(self.km("delete", "-f", "t").code, 0)
        self.assert_says(self.km("t", "--rm", "--", "exit 3"), 3, "deleting km-t")
        self.assertEqual(self.ended(first).code, 0)
        self.assertEqual(self.utm.names(), [IMAGE])
        self.assertEqual([name for name in os.listdir(os.path.join(self.state, "locks")) if "session" in name], [])


# ---- work in a machine: ssh, exec, cp, attach


class SshTest(Case):
    """ssh: the end of a start is a real ssh session with a real sshd."""

    GREETERS = 1

    def greet(self) -> None:
        self.server: Sshd = self.sshd()
        self.address = self.server.hosts[0]
        self.use(ssh_port=self.server.port)
        self.theirs = os.path.join(self.folder, "known_hosts of a person")
        self.ssh_options(f'UserKnownHostsFile "{self.theirs}"\n')

    @property
    def ours(self) -> list[str]:
        """The lines of kodemachine's own known-hosts file."""
        return self.read_state("known_hosts").splitlines()

    @property
    def key(self) -> str:
        return " ".join(self.server.host_key_line.split()[:2])

    def change_key(self) -> str:
        """Replaces the server's host key, which the guest's agent reports. Returns the path of a missing file."""
        self.server.replace_host_key()
        path = os.path.join(self.utm.guest("km-alpha"), "etc", "ssh", "ssh_host_ed25519_key.pub")
        self.write(path, self.server.host_key_line + "\n")
        return os.path.join(self.folder, "mark")

    def assert_refused(self, mark: str) -> None:
        self.spawn("alpha", "--", "touch", mark, code=255)
        self.assertFalse(os.path.exists(mark))

    def test_ssh_connects_but_does_not_clone(self) -> None:
        self.assertIn("there is no machine alpha", self.spawn("ssh", "alpha", code=3).err)
        self.assert_machines()

    def test_command_output_and_exit_status_are_passed_on(self) -> None:
        result = self.spawn("alpha", "--", "echo $((6 * 7)); echo oops >&2; exit 7", code=7)
        self.assertEqual(result.out, "42\n")
        self.assertTrue(result.err.endswith("oops\n"), result.err)
        self.assertEqual(self.ours, [f"km-alpha {self.key}"])
        self.assertFalse(os.path.exists(self.theirs))

    def test_keepalive_is_set_unless_the_user_has_set_it(self) -> None:
        self.spawn("alpha", "--", "true")
        argv = self.utm.calls(tool="ssh")[-1]["argv"]
        self.assertIn("ServerAliveInterval=10", argv)
        self.assertIn("ServerAliveCountMax=3", argv)
        self.ssh_options("Host *\n  ServerAliveInterval 240\n")
        self.spawn("alpha", "--", "true")
        self.assertNotIn("ServerAlive", " ".join(self.utm.calls(tool="ssh")[-1]["argv"]))


    def test_agent_is_forwarded_for_one_session_only(self) -> None:
        place = os.path.join(self.folder, "agent")
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.terminate)
        self.environment["SSH_AUTH_SOCK"] = place
        add = ["ssh-add", "-q", self.server.user_key]
        wait_for(lambda: self.run_program(add).code == 0)
        self.ssh_options("ForwardAgent yes\n")
        show = "ssh-add -l || true"
        for words, forwards in ((["alpha", "--rm", "-A"], True), (["alpha"], False), (["alpha", "-A"], True),
                                (["ssh", "--forward-agent", "alpha"], True), (["ssh", "alpha"], False)):
            result = self.km(*words, "--", show)
            self.assertEqual((result.code, "ED25519" in result.out), (0, forwards), (words, result))
        self.assert_says(self.km("start", "-d", "-A", "alpha"), 2, "--detach and --forward-agent exclude each other",
                         "kodemachine start -d alpha; then: kodemachine ssh -A alpha")

    def test_changed_host_key_is_refused_until_it_is_pinned_again(self) -> None:
        self.spawn("alpha", "--", "true")
        old = kodemachine.fingerprint(self.key)
        mark = self.change_key()
        self.assert_refused(mark)
        self.assertIn("-y", self.spawn("start", "alpha", "--repin", "--", "touch", mark, code=2).err)
        self.assert_refused(mark)
        err = self.spawn("start", "alpha", "--repin", "-y", "--", "touch", mark).err
        self.assertIn(f"pinned  {old}\n", err)
        self.assertIn(f"now     {kodemachine.fingerprint(self.key)}\n", err)
        self.assertTrue(os.path.exists(mark))
        self.assertEqual(self.ours, [f"km-alpha {self.key}"])

    def test_machine_deleted_in_utm_and_cloned_again_connects_without_a_question(self) -> None:
        self.spawn("alpha", "--", "true")
        self.remove("km-alpha")
        self.server.replace_host_key()
        self.utm.option(host_key=self.server.host_key_line)
        self.assertEqual(self.spawn("alpha", "--", "echo", "again").out, "again\n")
        self.assertEqual(self.ours, [f"km-alpha {self.key}"])
        self.assertEqual(len(json.loads(self.read_state("machines.json"))), 1)

    def test_ssh_configuration_of_the_user_cannot_change_the_session(self) -> None:
        self.ssh_options("Host *\n  RemoteCommand tmux new -A\n  SessionType none\n  StdinNull yes\n"
                         "  HostName %h.example.com\n  LocalForward 1 localhost:1\n  PermitLocalCommand yes\n"
                         "  LocalCommand touch /nonexistent\n  ForkAfterAuthentication yes\n")
        result = self.km("alpha", "--", "cat", stdin="hello")
        self.assertEqual((result.code, result.out), (0, "hello"), result.err)

    def test_ssh_configuration_of_the_user_cannot_weaken_the_pin(self) -> None:
        socket_path = os.path.join(self.folder, "master")
        self.ssh_options(
            "Host *\n  ControlMaster auto\n  ControlPersist 5\n  ForwardAgent yes\n  ProxyJump nobody@192.0.2.1\n"
            f"  ControlPath {socket_path}\n  StrictHostKeyChecking no\n  UpdateHostKeys yes\n  HostKeyAlias other\n"
            "  CanonicalizeHostname always\n  GlobalKnownHostsFile /dev/null\n")
        self.spawn("alpha", "--", "true")
        self.assertFalse(os.path.exists(socket_path))
        argv = self.utm.calls(tool="ssh")[-1]["argv"]
        self.assertLessEqual({"ProxyJump=none", "ProxyCommand=none", "ControlPath=none"}, set(argv))
        dump = self.run_program([os.path.join(self.bin, "ssh"), "-G", *argv]).out.splitlines()
        for line in ("forwardagent no", "controlmaster false", "stricthostkeychecking true", "hostkeyalias km-alpha",
                     "updatehostkeys false", "canonicalizehostname false", "globalknownhostsfile /dev/null"):
            self.assertIn(line, dump)
        self.assert_refused(self.change_key())
        self.assertFalse(os.path.exists(self.theirs))

    def test_unknown_options_hashed_hosts_and_address_checks_do_no_harm(self) -> None:
        self.ssh_options("Host *\nIgnoreUnknown UseKeychain\nUseKeychain yes\nHashKnownHosts yes\nCheckHostIP yes\n")
        self.utm.fault("exec", error=-2700)         # so that ssh itself learns the key
        for _ in range(2):
            self.spawn("alpha", "--", "true")
            self.assertEqual(self.ours, [f"km-alpha {self.key}"])

    def test_first_host_key_seen_is_kept_if_the_agent_reports_none(self) -> None:
        self.utm.fault("exec", error=-2700)
        for _ in range(2):
            self.spawn("alpha", "--", "true")
            self.assertEqual(self.ours, [f"km-alpha {self.key}"])
        self.assertFalse(os.path.exists(self.theirs))
        self.assert_refused(self.change_key())

    def test_state_folder_with_percent_signs_works(self) -> None:
        folder = os.path.join(self.folder, "100%h of it")
        result = self.km("alpha", "--", "echo", "in", env={"XDG_STATE_HOME": folder})
        self.assertEqual((result.code, result.out), (0, "in\n"), result.err)
        self.assertTrue(os.path.exists(os.path.join(folder, "kodemachine", "known_hosts")))

    def test_session_holds_no_lock(self) -> None:
        session = self.start_km("alpha", "--", "echo up; cat", input_follows=True)
        assert session.stdout
        self.assertEqual(session.stdout.readline(), b"up\n")
        self.use(clone_timeout=5, boot_timeout=5)           # within that it would have to wait for a lock
        self.assertEqual(self.km("start", "-d", "alpha").code, 0)
        self.assertEqual(self.ended(session, "x")[:2], (0, "x"))

    def test_session_ends_when_its_reader_leaves(self) -> None:
        command = shlex.join(self.command("alpha", "--", "cat", "/dev/zero"))
        result = self.run_program(["/bin/sh", "-c", f"{command} | head -c1"], timeout=60)
        self.assertEqual((result.code, result.out), (0, "\0"))
        self.assertNoChildrenLeft()

    def test_one_word_is_a_shell_line_and_its_input_reaches_it(self) -> None:
        result = self.km("alpha", "--", "read x; echo a  b $x --", stdin="typed\n")
        self.assertEqual((result.code, result.out), (0, "a b typed --\n"), result.err)

    def test_several_words_stay_the_words_that_they_are(self) -> None:
        words = ["a  b", "$HOME", "*", "", "--", "-x", "it's;", "`id`"]
        for first in (("alpha",), ("ssh", "alpha")):
            result = self.km(*first, "--", "printf", "<%s>\\n", *words)
            self.assertEqual((result.code, result.out), (0, "".join(f"<{word}>\n" for word in words)), result.err)
        self.spawn("alpha", "--", "sh", "-c", "exit 3", code=3)


class ExecTest(Case):
    """exec: commands through the guest agent."""

    def setUp(self) -> None:
        super().setUp()
        self.utm.add("km-a", status="started")

    def execute(self, *command: str, stdin: str | None = None) -> Result:
        words = ["--input"] if stdin is not None else []
        return self.km("exec", "a", *words, "--", *command, stdin=stdin)

    def test_output_and_exit_status_are_those_of_the_command(self) -> None:
        for status in (0, 3, 255):
            self.assertEqual(
                self.execute("sh", "-c", f"echo out; echo err >&2; exit {status}"), (status, "out\n", "err\n")
            )

    def test_command_killed_by_a_signal_exits_128_plus_its_number(self) -> None:
        self.assertEqual(self.execute("sh", "-c", "kill -9 $$").code, 137)

    def test_command_words_are_passed_unchanged(self) -> None:
        words = ["---x", "-=y", "--", "--cmd", "--hide", "a b", "$HOME", "*", ""]
        self.assertEqual(self.execute("printf", "<%s>\\n", *words).out, "".join(f"<{word}>\n" for word in words))

    def test_missing_program_is_named(self) -> None:
        missing = self.execute("nosuch", "--version")
        self.assertEqual((missing.code, missing.out), (1, ""))
        self.assertRegex(missing.err, "nosuch cannot be run in km-a: .*No such file.*\n  Check its name and path")

    def test_input_is_passed_on_only_with_its_option(self) -> None:
        text = "0123456789abcdef\n" * 15000
        self.assertEqual(self.execute("wc", "-c", stdin=text).out.strip(), str(len(text)))
        self.assertEqual(self.km("exec", "a", "--", "wc", "-c", stdin=text).out.strip(), "0")

    def test_output_is_passed_on_byte_for_byte(self) -> None:
        process = self.start_km("exec", "a", "--", "printf", r"\000\377\033[0m\n\r")
        self.assertEqual(process.communicate(timeout=60)[0], b"\x00\xff\x1b[0m\n\r")

    def test_truncated_output_is_reported(self) -> None:
        process = self.start_km("exec", "a", "--", "dd", "if=/dev/zero", "bs=65536", "count=257")
        out, err = process.communicate(timeout=60)
        self.assertEqual((len(out), process.returncode), (16 << 20, 0))
        self.assertIn(b"cut at 16 MiB", err)

    def test_too_much_input_is_refused_and_cp_is_suggested(self) -> None:
        result = self.execute("cat", stdin="x" * (kodemachine.EXEC_INPUT + 1))
        self.assertEqual(result.code, 2)
        self.assertIn("--input takes at most 256K\n  Copy the file first: kodemachine cp FILE a:", result.err)
        self.assertEqual(self.execute("wc", "-c", stdin="x" * kodemachine.EXEC_INPUT).out.strip(), str(256 << 10))

    def test_word_that_is_not_utf8_is_refused(self) -> None:
        process = self.start_program([*self.command("exec", "a", "--", "ls"), os.fsdecode(b"caf\xe9")])
        result = self.ended(process)
        self.assertEqual((result.code, self.utm.calls()), (2, []))
        self.assertIn("caf\ufffd is not UTF-8", result.err)

    def test_command_line_that_is_too_long_is_a_usage_error(self) -> None:
        with mock.patch("subprocess.Popen", side_effect=OSError(errno.E2BIG, "Argument list too long")):
            utm = kodemachine.Utmctl(os.path.join(self.bin, "utmctl"), kodemachine.Interrupts(), kodemachine.Notes())
            with self.assertRaisesRegex(kodemachine.UsageError, "the command line is too long"):
                utm.begin("list")

    def test_slow_command_is_waited_for(self) -> None:
        self.assertEqual(self.execute("sh", "-c", "sleep 1; echo late").out, "late\n")

    def test_lost_result_is_an_error(self) -> None:
        for rule in ({"error": -1712, "when": "after"}, {"crash": "TRAP"}, {"silent": True}):
            with self.subTest(rule):
                self.utm.fault("exec", **rule)
                result = self.execute("true")
                self.assertEqual((result.code, result.out), (1, ""))
                self.assertIn("the result of true in km-a was lost, and it may still be running", result.err)
                self.utm.clear_faults()

    def test_query_for_the_result_is_repeated(self) -> None:
        self.utm.fault(event="get result", error=-1712, times=3)
        self.assertEqual(self.execute("sh", "-c", "echo once >>/etc/ran; cat /etc/ran").out, "once\n")
        self.utm.fault(event="get result", error=-2700, string="Timed out waiting for RPC.")
        result = self.execute("true")
        self.assertEqual(result.code, 1)
        self.assertIn("the result of true in km-a was lost, and it may still be running "
                      "(UTM got an error: Timed out waiting for RPC.)", result.err)

    def test_ctrl_c_leaves_the_command_running_and_reports_it(self) -> None:
        process = self.start_km("exec", "a", "--", "sh", "-c", "touch /etc/begun; sleep 3; touch /etc/ended")
        etc = os.path.join(self.utm.guest("km-a"), "etc")
        wait_for(lambda: os.path.exists(os.path.join(etc, "begun")))
        process.send_signal(signal.SIGINT)
        result = self.ended(process)
        self.assertEqual(result.code, 130)
        self.assertIn("the command was not stopped: it may still be running in km-a", result.err)
        wait_for(lambda: os.path.exists(os.path.join(etc, "ended")))

    def test_missing_agent_is_reported(self) -> None:
        self.utm.fault(event="execute", error=-2700, string="The agent is not running.")
        result = self.execute("true")
        self.assertEqual(result.code, 1)
        self.assertIn("km-a did not confirm that it ran true: The agent is not running.", result.err)
        self.assertIn("qemu-guest-agent", result.err)

    def test_exec_needs_a_command_and_a_running_machine(self) -> None:
        self.assertEqual(self.km("exec", "a").code, 2)
        self.assertEqual(self.km("exec", "nosuch", "--", "true").code, 3)
        self.utm.change("km-a", status="stopped")
        self.assertEqual(self.execute("true").code, 4)
        self.assertEqual(self.calls_of("exec"), [])

    def test_input_from_a_terminal_is_refused(self) -> None:
        terminal = self.km_tty("exec", "a", "--input", "--", "cat")
        terminal.expect(b"not a terminal")
        self.assertEqual(terminal.wait(), 2)


class CpTest(Case):
    """cp: copies files with the real scp."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.with_names()

    def test_cp_in_the_background_does_not_wait_for_the_terminal(self) -> None:
        copy = os.path.join(self.home, "copy")
        words = shlex.join(self.command("cp", "/etc/passwd", f"a:{copy}"))
        job = ["/bin/bash", "-c", f"set -m; {words} & wait $!; echo status $?"]
        terminal = Terminal(job, {**self.environment, "TERM": "xterm"}, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(b"status 0\r\n")
        self.assertEqual(self.read(copy), read_text("/etc/passwd"))

    def test_cp_copies_to_from_and_between_machines(self) -> None:
        folder = os.path.join(self.folder, "in the machine")
        os.makedirs(os.path.join(self.home, "sub"))
        os.makedirs(folder)
        for name in ("one", "sub/two"):
            self.write(os.path.join(self.home, name), name)
        for words in (
            ["one", f"a:{folder}/"],
            ["-r", "one", "sub", f"km-a:{folder}/"],
            ["-r", f"a:{folder}/sub", "./back"],
            [f"a:{folder}/one", f"b:{folder}/across"],
        ):
            result = self.km("cp", *words)
            self.assertEqual(result.code, 0, (words, result.err))
        found = [os.path.join(folder, "sub/two"), os.path.join(self.home, "back/two"), os.path.join(folder, "across")]
        self.assertEqual([path for path in found if not os.path.exists(path)], [])

    def test_name_works_after_start_detached_though_the_agent_reports_no_keys(self) -> None:
        self.utm.option(host_key="none")
        self.assert_says(self.km("start", "-d", "a"), 0)
        self.assertIn(f"km-a {self.server.host_key_line.rpartition(' ')[0]}\n", self.read_state("known_hosts"))
        self.assertEqual(self.run_program([os.path.join(self.bin, "ssh"), "km-a", "echo in"]), (0, "in\n", ""))

    def test_colon_in_a_local_path_is_explained(self) -> None:
        self.utm.change("km-a", status="stopped")
        for words, code, said in ((["a:b", "b:"], 4, ""), (["c:d", "b:"], 3, "./c:d"),
                                  (["12 o'clock: x", "b:"], 2, "./12 "), (["b:x", "at:12:30"], 3, "./at:12:30")):
            result = self.km("cp", *words)
            self.assertEqual(result.code, code, result.err)
            hints = re.findall(r"For a file on this Mac: (.*)\n", result.err)
            self.assertEqual([shlex.split(hint)[0].startswith(said) for hint in hints], [True] if said else [])
        self.assertEqual(self.utm.calls(tool="scp"), [])

    def test_guest_without_sftp_server_is_explained_and_the_old_protocol_works(self) -> None:
        self.server.stop()
        self.server.start(sftp=False)
        self.write("one", "one")
        there = os.path.join(self.folder, "copied")
        failed = self.km("cp", "one", f"a:{there}")
        self.assert_says(failed, 255, "subsystem request failed", "has no sftp server: install", "add -O")
        self.assert_says(self.km("cp", "-O", "one", f"a:{there}"), 0)
        self.assertEqual(self.read(there), "one")

    def test_cp_reports_mistakes_before_scp_runs(self) -> None:
        self.utm.change("km-b", status="stopped")
        for status, words in ((2, ["one"]), (2, ["one", "two"]), (3, ["one", "nosuch:"]), (4, ["b:one", "."])):
            result = self.km("cp", *words)
            self.assertEqual((result.code, result.err.startswith("kodemachine: ")), (status, True), words)
        self.assertEqual(self.utm.calls(tool="scp"), [])


class Line:
    """A serial port: kodemachine opens its device, and the test plays the machine."""

    def __init__(self) -> None:
        self.machine, self._device = os.openpty()  # the device is kept open: a pty without one is hung up
        tty.setraw(self._device)
        self.path = os.ttyname(self._device)

    def say(self, octets: bytes) -> None:
        while octets:
            octets = octets[os.write(self.machine, octets) :]

    def hear(self, count: int) -> bytes:
        """The next `count` bytes that reach the machine."""
        heard = b""
        while len(heard) < count:
            assert select.select([self.machine], [], [], 20)[0], f"only {heard!r} has come"
            heard += os.read(self.machine, count - len(heard))
        return heard

    def power_off(self) -> None:
        os.close(self.machine)
        self.machine = -1

    def close(self) -> None:
        for handle in {self.machine, self._device} - {-1}:
            os.close(handle)


class AttachTest(Case):
    """attach: the serial console."""

    def setUp(self) -> None:
        super().setUp()
        self.line = Line()
        self.addCleanup(self.line.close)
        self.utm.add("km-a", status="started", serials=[{"kind": "ptty", "path": self.line.path}])

    def attach(self, *options: str) -> Terminal:
        terminal = self.km_tty("attach", "a", *options)
        terminal.expect(rb"console of km-a; .* ---\r\n")
        wait_for(lambda: terminal.attributes() != terminal.before)
        return terminal

    def pipe(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start_km("attach", "a", *options, input_follows=True)

    def hear_all(self, size: int) -> bytes:
        heard = bytearray()
        while len(heard) < size:
            heard += os.read(self.line.machine, 1 << 16)
        return bytes(heard)

    def test_bytes_pass_both_ways_until_the_escape_key(self) -> None:
        terminal = self.attach()
        self.line.say(b"login: ")
        terminal.expect(b"login: ")
        terminal.send(b"me\r\x1d")
        self.assertEqual(self.line.hear(3), b"me\r")
        self.assertEqual(terminal.wait(), 0)
        terminal.expect(b"console of km-a: left")

    def test_control_keys_and_all_other_bytes_reach_the_guest(self) -> None:
        terminal = self.attach()
        octets = bytes(byte for byte in range(256) if byte != 0x1D)
        terminal.send(octets)
        self.assertEqual(self.line.hear(255), octets)

    def test_output_of_the_guest_reaches_the_terminal_unchanged(self) -> None:
        terminal = self.attach()
        self.line.say(bytes(range(256)))
        terminal.expect(re.escape(bytes(range(256))))

    def test_attach_types_nothing_by_itself(self) -> None:
        terminal = self.attach()
        terminal.send(b"x\x1d")
        terminal.wait()
        self.assertEqual(self.line.hear(1), b"x")
        self.assertFalse(select.select([self.line.machine], [], [], 0)[0])

    def test_terminal_is_restored_after_every_way_to_leave(self) -> None:
        for way, status, words in (
            ("escape", 0, b"left"),
            ("power off", 0, b"the machine closed the line"),
            ("SIGTERM", 143, b""),
            ("SIGHUP", 129, b""),
            ("SIGQUIT", 131, b""),
        ):
            with self.subTest(way):
                terminal = self.attach()
                if way == "escape":
                    terminal.send(b"\x1d")
                elif way == "power off":
                    self.line.power_off()
                else:
                    terminal.process.send_signal(status - 128)
                self.assertEqual(terminal.wait(), status)
                self.assertEqual(terminal.attributes(), terminal.before)
                terminal.expect(words)
                if way == "power off":
                    self.line.close()
                    self.line = Line()
                    self.utm.change("km-a", serials=[{"kind": "ptty", "path": self.line.path}])

    def test_closed_terminal_ends_attach_even_if_hangups_are_ignored(self) -> None:
        for nohup, status in (("", 129), ("trap '' HUP; ", 141)):
            err = os.path.join(self.folder, "stderr")
            words = shlex.join(self.command("attach", "a"))
            command = ["/bin/sh", "-c", f"{nohup}exec {words} 2>{shlex.quote(err)}"]
            terminal = Terminal(command, self.environment, self.home)
            self.addCleanup(terminal.close)
            wait_for(lambda: terminal.attributes() != terminal.before)  # noqa: B023
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, terminal.master)       # the window is closed
            os.close(nowhere)
            self.assertEqual(terminal.process.wait(60), status)
            self.assertNotIn("Traceback", self.read(err))

    def test_second_attach_reports_who_holds_the_console(self) -> None:
        first = self.attach()
        result = self.km("attach", "a", "--timeout", "1")
        self.assertEqual((result.code, result.out), (4, ""))
        self.assertIn(f"the console of km-a is in use by another kodemachine (pid {first.process.pid})", result.err)

    def test_escape_key_can_be_changed(self) -> None:
        terminal = self.attach("--escape", "ctrl-a")
        terminal.send(b"\x1d\x01")
        self.assertEqual(self.line.hear(1), b"\x1d")
        self.assertEqual(terminal.wait(), 0)
        for key, name, octet in (("x", b"x", b"x"), ("^X", b"Ctrl-X", b"\x18")):
            terminal = self.attach("--escape", key)
            self.assertIn(b"leave with " + name + b" ---", terminal.seen)
            terminal.send(octet)
            self.assertEqual(terminal.wait(), 0)
        terminal = self.attach("--escape", "none")
        self.assertIn(b"no escape key ---", terminal.seen)
        self.line.power_off()
        self.assertEqual(terminal.wait(), 0)
        bad = self.km("attach", "a", "--escape", "alt-f4")
        self.assertEqual((bad.code, bad.err.count("\n")), (2, 2))

    # What kitty's keyboard protocol and xterm's modifyOtherKeys (both formats) send for a key.
    ESCAPE_KEYS = (
        ("ctrl-]", "93;5u 93;5:1u 93;5:2u 93;69u 93;133u 93;197:1u 93::93;5u 1098::93;5u 93:125;6u 93;5;29u 53;5u"
                   " 27;5;93~ 27;69;93~", "93u 93;5:3u 93;1u 93;2u 91;5u 27;5;91~ 27;3;93~ 93;5~ 93;5A"),
        ("ctrl-a", "97;5u 97;69u 97:65;6u 27;5;97~ 27;6;65~ 65;6u 1092::97;5u", "97;1u 97:65;2u 98;5u 27;2;65~"),
        ("ctrl-^", "94;5u 54;6u 54:94;6u 27;6;94~", "54;2u"),
        ("x", "120u 120;1u 120;1:1u 120;129u 120;;120u 120;1:1;120u 27;1;120~", "120;5u 120;2u 120;3u 120;1:3u 15~"),
        ("X", "120;2u 120:88;2u 120;2;88u 27;2;88~", "120u"),
        ("~", "96:126;2u 96;2;126u", "3~ 27;5;9~ 96;2u 200~"),
        ("5", "53u", "15~ 1;5A 97;5u"),
    )

    def test_escape_key_is_known_in_all_forms_that_terminals_send(self) -> None:
        for key, forms, others in self.ESCAPE_KEYS:
            escape = kodemachine.escape_byte(key)
            for known, sequences in ((True, forms.split()), (False, others.split())):
                for sequence in sequences:
                    octets = b"a\x1b[" + sequence.encode()
                    relay = kodemachine.SerialRelay(0, 0, 1, escape, None)
                    self.assertEqual(relay.before_escape(octets + b"b"), 1 if known else None, (key, sequence))
                    for cut in range(2, len(octets)):
                        found = relay.before_escape(octets[:cut]), relay.before_escape(octets[cut:] + b"b")
                        self.assertEqual(found, (None, 0 if known else None), (key, sequence, cut))
                    self.assertIsNone(relay.before_escape(b"b"))

    def test_escape_sequence_in_two_parts_leaves_and_a_lone_escape_is_not_held_back(self) -> None:
        terminal = self.attach()
        terminal.send(b"a\x1b")
        self.assertEqual(self.line.hear(2), b"a\x1b")
        terminal.send(b"[93;5u")
        self.assertEqual(terminal.wait(), 0)
        terminal.expect(b"console of km-a: left")
        self.assertFalse(select.select([self.line.machine], [], [], 0)[0])

    def test_window_size_is_named_unless_it_is_unknown(self) -> None:
        terminal = self.attach()
        self.assertNotIn(b"stty", terminal.seen)        # this terminal has 0 rows and 0 columns
        terminal.send(b"\x1d")
        terminal.wait()
        self.screen("attach", "a", columns=77).expect(rb"Enter shows its prompt.*\n.*stty rows 24 cols 77\r\n")

    def test_pipe_passes_input_and_output_until_the_line_closes(self) -> None:
        process = self.pipe()
        assert process.stdin and process.stdout
        process.stdin.write(b"\x1dls\n")  # the escape key counts only on a terminal
        process.stdin.close()
        self.assertEqual(self.line.hear(4), b"\x1dls\n")
        self.line.say(b"README\n")
        self.assertEqual(process.stdout.read(7), b"README\n")
        self.line.power_off()
        self.assertEqual(process.wait(60), 0)

    def test_pipe_can_have_a_time_limit(self) -> None:
        result = self.km("attach", "a", "--timeout", "0.3")
        self.assertEqual((result.code, result.out), (0, ""))
        self.assertIn("the time limit has passed", result.err)

    def test_sixteen_mebibytes_pass_both_ways_at_once(self) -> None:
        size = 16 << 20
        inward, outward = os.urandom(size), os.urandom(size)
        process = self.pipe("--escape", "none")
        assert process.stdin and process.stdout
        heard: list[bytes] = []
        jobs: list[tuple[Any, ...]] = [
            (lambda: heard.append(self.hear_all(size)),),
            (self.line.say, outward),
            (process.stdin.write, inward),
        ]
        threads = [threading.Thread(target=job, args=args, daemon=True) for job, *args in jobs]
        for thread in threads:
            thread.start()
        came = process.stdout.read(size)
        for thread in threads:
            thread.join(60)
        digests = [hashlib.sha256(octets).hexdigest() for octets in (came, *heard)]
        self.assertEqual(digests, [hashlib.sha256(octets).hexdigest() for octets in (outward, inward)])

    def test_slow_reader_loses_nothing(self) -> None:
        process = self.pipe()
        assert process.stdin and process.stdout
        said = os.urandom(3 << 20)
        writer = threading.Thread(target=self.line.say, args=(said,), daemon=True)
        writer.start()
        writer.join(0.5)
        self.assertTrue(writer.is_alive(), "the machine must be held up, not the bytes piled up")
        self.assertEqual(process.stdout.read(len(said)), said)
        writer.join(60)

    def test_vanished_reader_ends_attach(self) -> None:
        process = self.pipe()
        assert process.stdout
        self.line.say(b"x")
        process.stdout.read(1)
        process.stdout.close()
        self.line.say(b"y")
        self.assertEqual(process.wait(60), 141)

    def test_log_contains_the_output_of_the_guest(self) -> None:
        log = os.path.join(self.home, "console.log")
        for said in (b"one\r\n", b"two\x1b[0m\r\n"):
            terminal = self.attach("--log", log)
            self.line.say(said)
            terminal.expect(re.escape(said))
            terminal.send(b"not this\x1d")
            terminal.wait()
        with open(log, "rb") as file:
            self.assertEqual(file.read(), b"one\r\ntwo\x1b[0m\r\n")
        result = self.km("attach", "a", "--log", self.home)
        message = f"kodemachine: {self.home}: Is a directory\n  Name another file with --log.\n"
        self.assertEqual(result, (1, "", message))

    def test_tcp_port_works_as_a_console(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            self.utm.change("km-a", serials=[{"kind": "tcp", "host": "127.0.0.1", "port": port}])
            process = self.pipe()
            assert process.stdin and process.stdout
            with server.accept()[0] as machine:
                machine.sendall(b"login: ")
                self.assertEqual(process.stdout.read(7), b"login: ")
                process.stdin.write(b"me\n")
                process.stdin.close()
                self.assertEqual(machine.recv(3, socket.MSG_WAITALL), b"me\n")
            self.assertEqual(process.wait(60), 0)

    def test_index_option_chooses_the_port(self) -> None:
        self.utm.change("km-a", serials=[{"kind": "terminal"}, {"kind": "ptty", "path": self.line.path}])
        self.assertEqual(self.km("attach", "a", "--index", "1", "--timeout", "0.2").code, 0)
        result = self.km("attach", "a", "--index", "7")
        self.assert_says(result, 1, "no serial port 7", "--index with one of: 1\n")
        self.assert_says(self.km("attach", "a", "--index", "0"), 1, "no serial port 0", "--index with one of: 1\n")

    def test_missing_and_foreign_serial_ports_are_errors(self) -> None:
        with tempfile.NamedTemporaryFile(dir=self.home) as file:
            for serials, words in (
                ([], "has no serial port"),
                ([{"kind": "terminal"}], "has no serial port"),
                ([{"kind": "ptty", "path": "/dev/ttys999-gone"}], "cannot open the serial port"),
                ([{"kind": "ptty", "path": file.name.replace(" ", "%20")}], "cannot open the serial port"),
                ([{"kind": "tcp", "host": "127.0.0.1", "port": 1}], "cannot connect to the serial port"),
            ):
                with self.subTest(serials):
                    self.utm.change("km-a", serials=serials)
                    result = self.km("attach", "a")
                    self.assertEqual((result.code, result.out), (1, ""))
                    self.assertIn(words, result.err)

    def test_console_needs_a_running_machine(self) -> None:
        for state in ("stopped", "paused"):
            self.utm.change("km-a", status=state)
            result = self.km("attach", "a")
            self.assertEqual(result.code, 4)
            self.assertIn(f"km-a is {state}", result.err)
        self.assertEqual(self.km("attach", "nosuch").code, 3)


# ---- see what there is: list, status, ip, doctor


class ListTest(Case):
    """list: the machines at a glance."""

    def fleet(self) -> None:
        self.image()
        self.utm.add("Windows 11", status="started", ips=["10.0.0.9"])
        self.vm("web", "started", ips=["fd00::7", "172.17.0.1", "192.168.64.5"])
        self.vm("db")
        self.vm("idle", "paused")
        self.remember(web={"image": IMAGE, "image_uuid": "-", "created": hours_ago(3.1)}, db={"is_named": True})

    def test_row_shows_label_state_address_image_and_age_with_dashes_for_unknowns(self) -> None:
        self.fleet()
        result = self.km("list")
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertEqual(
            [line.split() for line in result.out.splitlines()],
            [
                ["LABEL", "STATUS", "IP", "IMAGE", "AGE"],
                ["db", "stopped", "-", "-", "-"],
                ["idle", "paused", "-", "-", "-"],
                ["web", "running", "192.168.64.5", IMAGE, "3h"],
            ],
        )
        self.assertEqual(self.km("ls"), result)

    def test_records_are_read_as_often_for_many_machines_as_for_one(self) -> None:
        out = kodemachine.Terminal(quiet=True)
        state = kodemachine.State(self.state, out)
        utm: Any = types.SimpleNamespace(notes=out, gather=lambda *_, **__: [])
        context: Any = types.SimpleNamespace(out=out, manager=kodemachine.Manager(kodemachine.Settings(), utm, state))
        counts = []
        for count in (1, 50):
            rows = kodemachine.Rows(
                kodemachine.Row(FakeUTM.new_uuid(), Power.STOPPED, f"km-m{n}") for n in range(count)
            )
            utm.rows = lambda partial, call, rows=rows: rows
            with mock.patch.object(state, "records", wraps=state.records) as read:
                machines = context.manager.fleet().clones
                facts = context.manager.describe(machines)
                cells = [kodemachine.machine_cells(context, *pair) for pair in zip(machines, facts)]
                self.assertEqual([cell["STATUS"] for cell in cells], ["stopped"] * count)
            counts.append(read.call_count)
        self.assertEqual(counts, [1, 1])

    def test_all_option_shows_images_and_foreign_machines(self) -> None:
        self.fleet()
        self.assertEqual(self.km("list", "-q").out.splitlines(), ["db", "idle", "web"])
        self.assertEqual(self.km("list", "-a", "-q").out.splitlines(), ["Windows 11", "db", "idle", IMAGE, "web"])
        self.assertEqual(list(self.listed("-a")), ["Windows 11", "km-db", "km-idle", IMAGE, "km-web"])

    def test_json_has_ordered_keys_iso_times_and_nulls(self) -> None:
        self.fleet()
        documents = self.documents()
        for machine in self.listed("-a").values():
            self.assertEqual(list(machine), JSON_KEYS)
            self.assertEqual([machine[key] for key in ("memory", "size", "reclaimable")], [None] * 3)
        machines = self.listed("-a", "--size")
        for machine in machines.values():
            self.assertEqual(list(machine), JSON_KEYS)
        web, foreign = machines["km-web"], machines["Windows 11"]
        self.assertEqual(
            (web["label"], web["status"], web["ip"], web["image"]), ("web", "running", "192.168.64.5", IMAGE)
        )
        self.assertEqual((web["memory"], web["size"]), (4 << 30, allocated(os.path.join(documents, "km-web.utm"))))
        self.assertRegex(web["created"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
        self.assertEqual(
            (foreign["label"], foreign["ip"], foreign["image"], foreign["created"]), (None, "10.0.0.9", None, None)
        )
        self.assertIsNone(machines["km-db"]["ip"])
        self.assertIsNone(machines[IMAGE]["label"])

    def test_empty_list_is_an_empty_array_and_a_line_on_stderr(self) -> None:
        self.assertIn("waiting in case it is still starting", self.km("list").err)
        self.assertEqual(self.km("list", "--json"), (0, "[]\n", ""), "to a program, steps say nothing")
        self.image()
        self.assertEqual(self.km("list", "--json"), (0, "[]\n", ""))
        self.assert_says(self.km("list"), 0, "no machines yet; to create one: kodemachine project-alpha")

    def test_list_takes_one_call_and_one_per_running_machine(self) -> None:
        self.fleet()
        self.vm("api", "started")
        for args, verbs in (
            ((), ["ip-address"] * 2 + ["list"]),
            (("-a",), ["ip-address"] * 3 + ["list"]),
            (("--no-ip",), ["list"]),
            (("--no-ip", "--json"), ["list"]),
            (("-q",), ["list"]),
        ):
            before = len(self.utm.calls())
            self.assertEqual(self.km("list", *args).code, 0)
            self.assertEqual(sorted(self.utm.verbs()[before:]), verbs, args)
        self.assertEqual(self.utm.calls(tool="osascript"), [])

    def test_machine_in_an_unknown_state_affects_only_its_row(self) -> None:
        self.fleet()
        self.utm.fault("list", unknown=["km-db", "Windows 11"], error=-1712)
        self.assertEqual(
            [(m["name"], m["status"], m["ip"]) for m in self.listed().values()],
            [("km-db", "unknown", None), ("km-idle", "paused", None), ("km-web", "running", "192.168.64.5")],
        )

    def test_row_without_a_name_is_a_warning_and_affects_no_other_row(self) -> None:
        self.fleet()
        self.utm.fault("list", blank=True)
        result = self.km("list", "-q")
        self.assertEqual((result.code, result.out), (0, "db\nidle\nweb\n"))
        self.assertIn("a row that cannot be read: 'unknown'", result.err)

    def test_half_made_clone_and_vanishing_machine_do_no_harm(self) -> None:
        image = self.image()
        self.vm("web", "started", ips=["192.168.64.5"])
        self.vm("gone", "started")
        with self.utm.fake as utm:
            utm.insert(FakeUTM.new_uuid(), image)
        self.utm.fault("ip-address", vm="km-gone", lookup=True)
        result = self.km("list", "-a", "-q")
        self.assertEqual(result.out.splitlines(), ["gone", IMAGE, IMAGE + " 2", "web"])
        self.assertEqual(
            {name: m["ip"] for name, m in self.listed().items()}, {"km-web": "192.168.64.5", "km-gone": None}
        )

    def test_thirty_machines_are_listed_though_one_agent_hangs_and_one_machine_vanishes(self) -> None:
        self.image()
        for n in range(30):
            self.vm(f"m{n:02}", "started" if n < 10 else "stopped", ips=[f"192.168.64.{n + 2}"])
        self.utm.fault("ip-address", vm="km-m03", hang=True)
        self.utm.fault("ip-address", vm="km-m07", lookup=True)
        result = self.km("list")
        want = [
            [f"m{n:02}", "running", "-" if n in (3, 7) else f"192.168.64.{n + 2}"]
            if n < 10
            else [f"m{n:02}", "stopped", "-"]
            for n in range(30)
        ]
        self.assertEqual([line.split()[:3] for line in result.out.splitlines()[1:]], want)
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertNoChildrenLeft()

    def test_table_fits_the_terminal_and_a_note_names_the_columns_that_are_left_out(self) -> None:
        self.fleet()
        self.documents()
        self.vm("a-long-label", "started", ips=["192.168.64.200"])
        for columns, args, kept, hidden in (
            (80, (), "LABEL STATUS IP IMAGE AGE", ""),
            (40, (), "LABEL STATUS IP", "IMAGE, AGE"),
            (20, (), "LABEL STATUS", "IP, IMAGE, AGE"),
            (80, ("-s",), "LABEL STATUS IP IMAGE AGE MEMORY SIZE RECLAIM", ""),
            (40, ("-s",), "LABEL STATUS SIZE RECLAIM", "IP, IMAGE, AGE, MEMORY"),
        ):
            with self.subTest(columns=columns, args=args):
                terminal = self.screen("list", *args, columns=columns)
                self.assertEqual(terminal.wait(), 0)
                note, heading, table = terminal.seen.decode().partition("LABEL")
                lines = (heading + table).splitlines()
                self.assertEqual((len(lines), lines[0].split()), (5, kept.split()))
                self.assertIn("a-long-label  running", lines[1])
                self.assertEqual(" ".join(note.split()), hidden and f"hidden, for lack of width: {hidden}")
        self.assertEqual(self.screen("-q", "list", columns=20).wait(), 0)

    def test_status_is_coloured_and_versions_are_short_only_on_a_terminal(self) -> None:
        self.fleet()
        self.utm.fault("list", unknown=["Windows 11"])
        for term, no_colour, colours in (("xterm", "", {"running": 32, "paused": 35, "unknown": 31}),
                                         ("xterm", "1", {}), ("dumb", "", {})):
            terminal = self.screen("list", "-a", TERM=term, NO_COLOR=no_colour)
            self.assertEqual(terminal.wait(), 0)
            text = terminal.seen.decode()
            found = re.findall("\x1b\\[([0-9]+)m(\\w+)\x1b\\[0m", text)
            self.assertEqual({word: int(code) for code, word in found}, colours)
            plain = re.sub("\x1b\\[[0-9]+m", "", text)
            lines = plain.splitlines()
            self.assertRegex(lines[-1], r"^web +running  192\S+  v0\.2\.0  3h$")
            address = lines[0].index("IP")
            self.assertEqual({re.sub(r"\S", "x", line[address - 2:address + 1]) for line in lines}, {"  x"}, "aligned")
        # The colours of stdout do not depend on stderr.
        argv = ["/bin/sh", "-c", '"$@" | cat', "sh", *self.command("list")]
        terminal = Terminal(argv, {**self.environment, "TERM": "xterm"}, self.home)
        self.addCleanup(terminal.close)
        terminal.wait()
        self.assertRegex(terminal.seen.decode(), rf"web +running +192\S+ +{IMAGE} +3h")

    def test_piped_table_is_plain_and_complete(self) -> None:
        self.fleet()
        out = self.km("list", "-a", env={"TERM": "xterm-256color", "COLUMNS": "20"}).out
        self.assertEqual(re.findall(r"[^\x20-\x7e\n]", out), [])
        self.assertIn("AGE", out)

    def test_read_only_commands_write_nothing(self) -> None:
        self.fleet()
        looks: list[list[str]] = [
            ["list"],
            ["list", "-a", "--json"],
            ["status"],
            ["status", "web"],
            ["ip", "web", "--all"],
        ]

        def files() -> dict[str, tuple[int, bytes]]:
            found = {}
            for top, folders, names in os.walk(self.home):
                for name in [*folders, *names]:
                    path = os.path.join(top, name)
                    with contextlib.suppress(IsADirectoryError), open(path, "rb") as file:
                        found[path] = (os.stat(path).st_mtime_ns, file.read())
                    found.setdefault(path, (os.stat(path).st_mtime_ns, b""))
            return found

        self.remember(db={"is_temporary": True})
        for state in ("remembered", "nothing remembered"):
            with self.subTest(state):
                before = files()
                for args in looks if state == "remembered" else looks[::2]:
                    self.assertEqual(self.km(*args).code, 0, args)
                self.assertEqual(files(), before)
            shutil.rmtree(os.path.join(self.home, ".local"), ignore_errors=True)

    def test_terminal_control_characters_in_names_are_never_printed(self) -> None:
        hostile = "evil\x1b]0;owned\x07\x1b[31m\r\x0b\x85\u2028\u202e\x9b2J"
        self.fleet()
        self.utm.add(hostile, status="started")
        self.remember(web={"image": "img\x1b[2J\nx", "image_uuid": "-", "created": "\x1b[2J"})
        for args in (
            ["list"],
            ["list", "-a"],
            ["list", "-a", "-q"],
            ["list", "-a", "--json"],
            ["status", "web"],
            ["-v", "list", "-a"],
            ["start", "-d", "x", "--base", hostile],
            ["stop", hostile],
        ):
            result = self.km(*args)
            self.assertTrue((result.out + result.err).replace("\n", "").isprintable(), result)
        self.assertIn(hostile, self.listed("-a"))

    def test_invalid_record_is_shown_as_dashes(self) -> None:
        self.fleet()
        nonsense: dict[str, Any]
        for nonsense in (
            {"created": 7, "image": 7},
            {"created": "yesterday", "image": {"name": None}},
            {"created": {}, "image": True},
            {"created": [], "image": []},
        ):
            self.remember(web=nonsense)
            line = self.km("list").out.splitlines()[3].split()
            self.assertEqual([line[0], line[3], line[-1]], ["web", "-", "-"])
            self.assertEqual(self.km("purge", "--all", "--dry-run", "--older-than", "1s", "--image", "x").code, 0)

    def test_sizes_are_read_only_when_they_are_wanted(self) -> None:
        self.documents()
        self.image()
        self.vm("web")
        # macOS asks the person when a program reads UTM's folder.
        refuse = "import os\ndef scandir(path): raise AssertionError('a folder was read')\nos.scandir = scandir\n"
        for args in (["list"], ["list", "-a", "--json"], ["status", "web"], ["base", "list"]):
            argv = self.command(*args)
            argv[argv.index(self.LAUNCH)] = refuse + self.LAUNCH
            result = self.run_program(argv)
            self.assertEqual((result.code, result.err), (0, ""), args)
            self.assertNotRegex(result.out, "MEMORY|4.0G|[1-9]K")
        header = ["LABEL", "STATUS", "IP", "IMAGE", "AGE", "MEMORY", "SIZE", "RECLAIM"]
        for flag in ("-s", "--size"):
            lines = [line.split() for line in self.km("list", flag).out.splitlines()]
            self.assertEqual((lines[0], lines[1][:6]), (header, ["web", "stopped", "-", "-", "-", "4.0G"]))
            self.assertNotIn("-", lines[1][6:])
            shown = self.km("status", flag, "web").out
            self.assertRegex(shown, r"(?m)^memory: +4\.0G\nsize: +\S+K\nreclaimable: +\S+K$")

    def test_without_machines_it_says_what_to_do_first(self) -> None:
        self.utm.add("Debian")
        self.assert_says(self.km("list"), 0, "first create an image: kodemachine base create v0.1.0")
        self.image()
        self.config(base_image="golden")
        self.assert_says(self.km("list"), 0, "the default image does not exist", f"kodemachine base use {IMAGE}\n")
        self.assertEqual(self.km("base", "use", IMAGE).code, 0)
        self.assert_says(self.km("list"), 0, "to create one: kodemachine project-alpha")

    def test_records_of_version_0_1_0_are_read_and_removed_keys_are_named_once(self) -> None:
        self.fleet()
        self.vm("left", "started")
        self.remember(
            web={"image": {"name": "older", "uuid": "-"}}, left={"rm": True}, db={"saved": True, "disposable": True}
        )
        result = self.km("list")
        self.assertEqual((result.code, result.err.count("no longer used: saved, disposable\n")), (0, 1), result.err)
        self.assertEqual(result.err.count("\n"), 1)
        lines = [re.split("  +", line) for line in result.out.splitlines()]
        self.assertEqual([line[0] + " " + line[1] for line in lines[1:]],
                         ["db stopped", "idle paused", "left running (--rm)", "web running"])
        self.assertEqual(lines[4][3], "older")
        self.utm.change("km-left", status="stopped")
        self.assert_says(self.km("purge", "-y", "--image", "older", "--all"), 0, "web deleted")
        self.assertEqual((self.record("left"), self.record("db")), ({"name": "km-left", "is_temporary": True},
                                                                    {"name": "km-db", "is_named": True}))
        self.assertEqual(self.km("list").err, "")


class BundleTest(Case):
    """list: memory and sizes from the bundles on disk, which may be missing or broken."""

    def test_memory_size_and_reclaimable_space_are_read_from_the_bundle(self) -> None:
        folder = os.path.join(self.documents(), "km-web.utm")
        self.vm("web", memory=2048, disk=300_000)
        os.link(os.path.join(folder, "Data", "disk.qcow2"), os.path.join(self.folder, "kept"))
        kept = os.stat(os.path.join(self.folder, "kept")).st_blocks * 512
        web = self.listed("--size")["km-web"]
        self.assertEqual((web["memory"], web["size"]), (2 << 30, allocated(folder)))
        self.assertGreater(kept, 0)
        self.assertLessEqual(web["reclaimable"], web["size"] - kept)
        if sys.platform != "darwin":  # there a file's private size may be less than its blocks
            self.assertEqual(web["reclaimable"], web["size"] - kept)
        os.unlink(os.path.join(self.folder, "kept"))
        if sys.platform != "darwin":
            self.assertEqual(self.listed("--size")["km-web"]["reclaimable"], web["size"])

    def test_broken_bundle_is_shown_as_dashes_and_blocks_nothing(self) -> None:
        documents = self.documents()
        self.vm("good")
        plist = os.path.join(documents, "km-{}.utm", "config.plist")

        def text(label: str, body: str) -> None:
            with open(plist.format(label), "w", encoding="utf-8") as file:
                file.write(body)

        def rewritten(label: str, old: str, new: str) -> None:
            with open(plist.format(label), encoding="utf-8") as file:
                body = file.read()
            self.assertIn(old, body)
            text(label, body.replace(old, new))

        spoiled = (
            "fifo",
            "folder",
            "missing",
            "garbage",
            "binary",
            "gigantic",
            "deep",
            "bomb",
            "foreign",
            "link",
            "loop",
            "words",
            "infinite",
            "list",
            "nobundle",
        )
        for label in spoiled:
            self.vm(label)
            if label in ("fifo", "folder", "missing", "loop"):
                os.unlink(plist.format(label))
        os.mkfifo(plist.format("fifo"))
        os.mkdir(plist.format("folder"))
        os.symlink("config.plist", plist.format("loop"))
        text("garbage", "<plist><dict>")
        text("list", "<plist><array/></plist>")
        text("deep", "<plist>" + "<array>" * 100_000)
        text(
            "bomb",
            '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><plist><string>&b;</string></plist>',
        )
        with open(plist.format("binary"), "wb") as octets:
            octets.write(b"bplist00" + bytes(range(256)) * 8)
        os.truncate(plist.format("gigantic"), 1 << 32)
        rewritten("foreign", self.utm.machine("km-foreign")["uuid"], self.utm.machine("km-good")["uuid"])
        rewritten("words", "<integer>4096</integer>", "<string>much</string>")
        rewritten("infinite", "<integer>4096</integer>", "<real>inf</real>")
        for label in ("link", "nobundle"):
            shutil.rmtree(os.path.dirname(plist.format(label)))
        os.symlink("km-good.utm", os.path.dirname(plist.format("link")))
        machines = self.listed("--size")
        for label in spoiled:
            on_disk = {machines["km-" + label][key] for key in ("memory", "size", "reclaimable")}
            self.assertEqual(on_disk, {None}, label)
        self.assertEqual(machines["km-good"]["memory"], 4 << 30)

    def test_missing_documents_folder_is_shown_as_dashes(self) -> None:
        self.config(documents=os.path.join(self.folder, "not there"))
        self.vm("web")
        self.assertEqual(self.km("list", "-s").out.splitlines()[1].split(), ["web", "stopped", *"------"])

    def test_hanging_disk_access_is_abandoned_and_the_rest_is_shown(self) -> None:
        self.documents()
        self.vm("web", "started", ips=["192.168.64.5"])
        # As macOS does, while it asks the person whether the terminal may look into another application's data.
        hang = "import os, time\nos.scandir = lambda path: time.sleep(3600)\n"
        argv = self.command("list", "--size", patience={"DISK_LIMIT": 0.2})
        argv[argv.index(self.LAUNCH)] = hang + self.LAUNCH
        result = self.run_program(argv)
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertEqual(
            result.out.splitlines()[1].split(), ["web", "running", "192.168.64.5", "-", "-", "-", "-", "-"]
        )


class InventoryTest(Case):
    """list --format ansible: an inventory of the machines."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.with_names()

    def test_ansible_reaches_the_machines(self) -> None:
        programs = {name: shutil.which(name) or "" for name in ("ansible", "ansible-inventory")}
        if not all(programs.values()):
            self.skipTest("there is no ansible here")
        self.utm.add("km-off")
        with open(self.ssh_config, "w", encoding="utf-8") as file:      # what reaches them is the inventory's alone
            file.write(f'IdentityFile "{self.server.user_key}"\nIdentitiesOnly yes\n')
        hosts = os.path.join(self.home, "hosts.json")
        with open(hosts, "w", encoding="utf-8") as file:
            file.write(self.km("list", "--format", "ansible").out)
        # Ansible refuses to run where text is not UTF-8; its shared connections would outlive the test.
        env = {"LC_ALL": "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8", "ANSIBLE_SSH_ARGS": "-C"}
        listed = self.run_program([programs["ansible-inventory"], "-i", hosts, "--list"], env=env)
        groups = json.loads(listed.out)
        self.assertEqual(groups["kodemachine"]["children"], ["kodemachine_running", "kodemachine_stopped"])
        self.assertEqual(groups["kodemachine_running"]["hosts"], ["km-a", "km-b"])
        self.assertEqual(groups["_meta"]["hostvars"]["km-off"]["kodemachine_label"], "off")
        play = [programs["ansible"], "-i", hosts, "kodemachine", "-m", "command", "-a", "echo here",
                "-e", f"ansible_python_interpreter={sys.executable}"]
        result = self.run_program(play, env=env)
        for name in ("km-a", "km-b"):
            self.assertIn(f"{name} | CHANGED | rc=0 >>\nhere\n", result.out, result.err)
        self.assertRegex(result.out, r"km-off \| UNREACHABLE! (?s:.*)To start it: kodemachine start -d off")

    def test_inventory_groups_machines_by_state_and_affects_no_other_hosts(self) -> None:
        self.image()
        self.utm.add("km-off")
        self.config(ssh_user="me")
        inventory = json.loads(self.km("list", "-a", "--format", "ansible").out)
        self.assertEqual(list(inventory["all"]), ["children"])
        group = inventory["all"]["children"]["kodemachine"]
        self.assertEqual({name: sorted(part["hosts"]) for name, part in group["children"].items()},
                         {"kodemachine_running": ["km-a", "km-b"], "kodemachine_stopped": ["km-off"]})
        self.assertEqual(group["children"]["kodemachine_stopped"]["hosts"]["km-off"],
                         {"kodemachine_label": "off", "kodemachine_image": None})
        options = shlex.split(group["vars"]["ansible_ssh_common_args"])
        self.assertLessEqual({"StrictHostKeyChecking=yes", "User=me", "ServerAliveInterval=5"}, set(options))
        self.assertIn(f'UserKnownHostsFile="{self.home}/.local/state/kodemachine/known_hosts"', options)
        self.assertRegex("\n".join(options), "(?m)^ProxyCommand=.* proxy %h$")
        self.assertNotIn("Control", " ".join(options))


class StatusTest(Case):
    """status: one machine in full, or the installation at a glance."""

    def test_status_shows_one_machine_in_full(self) -> None:
        self.documents()
        uuid = self.vm("web", "started", ips=["fe80::1", "172.17.0.1", "192.168.64.5", "fd00::7"])
        created = hours_ago(1)
        self.remember(web={"image": IMAGE, "image_uuid": "-", "created": created})
        facts = json.loads(self.km("status", "web", "--json", "--size").out)
        self.assertEqual(list(facts), [*JSON_KEYS, "addresses"])
        self.assertEqual(facts["addresses"], ["192.168.64.5", "fd00::7", "172.17.0.1", "fe80::1"])
        self.assertEqual(self.utm.verbs(), ["list", "ip-address"])
        lines = dict(line.split(":", 1) for line in self.km("status", "-s", "web").out.splitlines())
        self.assertEqual(list(lines), list(facts))
        self.assertEqual(
            {key: lines[key].strip() for key in ("uuid", "ip", "image", "memory", "created", "addresses")},
            {
                "uuid": uuid,
                "ip": "192.168.64.5",
                "image": IMAGE,
                "memory": "4.0G",
                "created": created,
                "addresses": "192.168.64.5, fd00::7, 172.17.0.1, fe80::1",
            },
        )
        self.assertEqual(self.km("info", "km-web", "--size", "--json").out, json.dumps(facts, indent=1) + "\n")
        facts.update(dict.fromkeys(("memory", "size", "reclaimable")))
        self.assertEqual(json.loads(self.km("status", "web", "--json").out), facts)
        self.assertEqual([line.split(":")[0] for line in self.km("status", "web").out.splitlines()],
                         [key for key in lines if key not in ("memory", "size", "reclaimable")])

    def test_status_does_not_ask_a_stopped_machine_for_addresses(self) -> None:
        self.vm("web")
        facts = json.loads(self.km("status", "web", "--json").out)
        self.assertEqual((facts["status"], facts["ip"], facts["addresses"]), ("stopped", None, []))
        self.assertEqual(self.utm.verbs(), ["list"])
        self.assertRegex(self.km("status", "web").out, r"(?m)^addresses: +-$")

    def test_status_without_a_label_shows_the_installation(self) -> None:
        self.image("kodeimage-v0.10.0")
        self.image()
        for label, status in (("a", "started"), ("b", "stopped"), ("c", "started")):
            self.vm(label, status)
        self.utm.add("foreign", status="started")
        facts = json.loads(self.km("status", "--json").out)
        self.assertEqual(
            facts,
            {
                "version": kodemachine.__version__,
                "utm": "5.0.9",
                "utmctl": os.path.join(self.bin, "utmctl"),
                "image": "kodeimage-v0.10.0",
                "machines": {"running": 2, "stopped": 1},
                "config": os.path.join(self.home, ".config", "kodemachine", "config.json"),
                "state": self.state,
            },
        )
        self.assertIn("machines:    2 running, 1 stopped\n", self.km("status").out)

    def test_status_works_without_image_version_or_machines(self) -> None:
        self.utm.add("foreign")
        self.utm.option(version=None)
        result = self.km("status", "--json")
        self.assert_says(result, 0, "no image")
        facts = json.loads(result.out)
        self.assertEqual((facts["utm"], facts["image"], facts["machines"]), (None, None, {}))
        self.assertIn("machines:    none\n", self.km("status").out)


class IpTest(Case):
    """ip: the address that answers."""

    def test_ip_prints_only_the_address_that_answers(self) -> None:
        sshd = self.with_sshd()
        self.vm("web", "started", ips=["127.0.0.9", "127.0.0.8", *sshd.hosts])
        self.assertEqual(self.km("ip", "web"), (0, sshd.hosts[0] + "\n", ""))

    def test_ip_all_prints_every_address_with_the_likeliest_first(self) -> None:
        self.vm("web", "started", ips=["fe80::1", "100.64.0.1", "192.168.64.5"])
        self.assertEqual(self.km("ip", "web", "--all"), (0, "192.168.64.5\n100.64.0.1\nfe80::1\n", ""))

    def test_ip_wait_option_limits_the_wait(self) -> None:
        sshd = self.with_sshd()
        uuid = self.vm("web", "starting", ips=sshd.hosts, stuck=["starting"])
        self.assert_says(self.km("ip", "web"), 4, "km-web is starting")
        waiting = self.start_km("ip", "web", "--wait", "60")
        wait_for(lambda: self.utm.calls("ip-address"))
        self.utm.change(uuid, status="started", up_at=0.0)
        self.assertEqual(self.ended(waiting).out, sshd.hosts[0] + "\n")
        self.vm("mute", "started", agent_after=None)
        result = self.km("ip", "mute", "--wait", "0.3")
        self.assert_says(result, 6, "its guest agent reports no IP address", "with --wait")
        self.vm("vlan", "started", ips=["10.0.2.15", "fec0::5054:ff:fe12:3456"])
        self.assert_says(self.km("ip", "vlan", "--wait", "0.3"), 6, "at 10.0.2.15", "Emulated VLAN", "Shared Network")

    def test_ip_explains_why_a_machine_has_no_address(self) -> None:
        for status, verb in (("stopped", "start -d"), ("paused", "resume")):
            self.vm(status, status)
            for args in ((), ("--all",), ("--wait", "9")):
                self.assert_says(self.km("ip", status, *args), 4, f"km-{status} is {status}", f": kodemachine {verb}")
        self.vm("mute", "started", agent_after=None)
        self.assert_says(self.km("ip", "mute", "--all"), 1, "the guest agent of km-mute reports no IP address")
        self.vm("late", "started", agent_after=1, link_local_seconds=1, up_at=time.time(), ips=["192.168.64.9"])
        self.assertEqual(self.km("ip", "late", "--all", "--wait", "60").out, "192.168.64.9\n")
        self.assert_says(self.km("ip", "nope"), 3, "no machine nope", "late, mute, paused, stopped")
        self.assert_says(self.km("status", "nope"), 3, "no machine nope")


class DoctorTest(Case):
    """doctor: each of its findings, and none for a healthy installation."""

    CHECKS = [
        "user", "utmctl", "version", "automation", "utm", "osascript", "image", "devices", "ssh-key", "ssh-names",
        "shell", "names", "macs", "offline", "host-keys", "machine-ids", "addresses", "copies", "space", "sizes",
        "leftovers", "network",
    ]  # fmt: skip

    def setUp(self) -> None:
        super().setUp()
        try:
            self.greeter = Greeter(self.utm.app()["addresses"][:1])
        except OSError:
            # A Mac has no other address for this.
            self.utm.option(addresses=["127.0.0.1"])
            self.greeter = Greeter(["127.0.0.1"])
        self.addCleanup(self.greeter.close)
        self.ssh_key = os.path.join(self.home, ".ssh", "id_ed25519")
        os.mkdir(os.path.dirname(self.ssh_key))
        self.write_key(self.ssh_key)
        self.settings: dict[str, Any] = {"ssh_port": self.greeter.port, "documents": self.documents()}
        self.config(**self.settings)

    def write_key(self, path: str, mode: int = 0o600) -> None:
        with open(path, "w", encoding="utf-8"):
            os.chmod(path, mode)

    def healthy(self) -> None:
        """An image without faults, a running clone and one that was never started."""
        self.image(serials=[{"kind": "ptty", "path": "/dev/ttys1"}])
        self.vm("a", "started")
        self.vm("new", macs=self.utm.machine(IMAGE)["macs"])
        self.remember(a={"mac_is_unique": True, "machine_id": "1" * 32})
        self.write_state("known_hosts", f"km-a {host_key()}\n")

    def doctor(self, patience: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> dict[str, list[str]]:
        """Every finding that is not ok, by check, as `level: message | remedy`. The exit status must fit them."""
        command = self.command("doctor", "--json", patience={"WARM_UP": 0.3, **(patience or {})})
        result = self.run_program(command, env=env)
        self.assertNotIn("Traceback", result.err)
        findings = json.loads(result.out)
        self.assertEqual(list(dict.fromkeys(finding["check"] for finding in findings)), self.CHECKS)
        self.assertEqual(result.code, int(any(finding["level"] == "error" for finding in findings)), result.err)
        said: dict[str, list[str]] = {}
        for finding in findings:
            self.assertEqual(list(finding), ["check", "level", "message", "remedy"])
            self.assertTrue(finding["message"])
            self.assertEqual(bool(finding["remedy"]), finding["level"] in ("warning", "error"), finding)
            if finding["level"] != "ok":
                said.setdefault(finding["check"], []).append("{level}: {message} | {remedy}".format(**finding))
        return said

    def assert_said(self, said: dict[str, list[str]], **patterns: str) -> None:
        """Only these checks (`_` for `-`) have findings. They match the patterns, which ` && ` separates."""
        for check, lines in said.items():
            pattern = patterns.pop(check.replace("-", "_"), "nothing")
            for part in pattern.split(" && "):
                self.assertTrue(any(re.search(part, line) for line in lines), f"{check}: no {part!r} in {lines}")
            self.assertEqual(len(lines), len(pattern.split(" && ")), lines)
        self.assertEqual(patterns, {}, "not found")

    def files_of_state(self) -> list[tuple[str, float]]:
        paths = [os.path.join(top, name) for top, _, names in os.walk(self.state) for name in names]
        return sorted((path, os.stat(path).st_mtime) for path in paths)


    def test_ssh_keys_are_checked_in_files_and_agents(self) -> None:
        self.healthy()
        own = os.path.join(self.folder, "own key")
        self.write_key(own, 0o644)
        self.config(**self.settings, identity_file=own)
        self.assert_said(self.doctor(), ssh_key=rf"error: .*others may read it \| chmod 600 '{own}'")
        # An agent has the private key.
        os.rename(own, own + ".pub")
        self.assert_said(self.doctor())
        self.config(**self.settings, identity_file=own + ".pub")
        self.assert_said(self.doctor())
        self.config(**self.settings)
        os.unlink(self.ssh_key)
        # The exit statuses of `ssh-add -l` with keys, without keys, and without an agent (ssh-add(1)).
        for status in range(3):
            self.stub_ssh_add(status)
            said = self.doctor()
            if status == 0:
                self.assert_said(said)
            else:
                self.assert_said(said, ssh_key=r"warning: there is no key in ~/.ssh or in an ssh agent.*: ssh-keygen")


    def test_versions_of_utm_are_judged(self) -> None:
        contents = os.path.join(self.folder, "UTM.app", "Contents")
        os.makedirs(os.path.join(contents, "MacOS"))
        utm = mock.Mock()
        utm.path.return_value = os.path.join(contents, "MacOS", "utmctl")
        utm.version = lambda: kodemachine.Utmctl.version(utm)
        doctor = kodemachine.Doctor(kodemachine.Manager(kodemachine.Settings(), utm, mock.Mock()))

        def said() -> list[tuple[str, str]]:
            return [(level, message) for level, message, _ in doctor._version()]

        utm.call.return_value = Reply("version", Verdict.USAGE, 64, "", "", (), 0.1)
        [(level, message)] = said()
        self.assertEqual((level, message.partition(":")[0]), ("warning", "UTM does not report its version"))
        for version, expected, words in (
            ("5.0.3", "ok", "UTM 5.0.3$"), ("4.6.4", "error", "4.6.4 is too old"), ("4.6.5", "warning", "displays"),
            ("4.7.0", "warning", "4.7.0 replaces"), ("4.7.1", "ok", "4.7.1 has no"),
            ("4.7.2", "error", "broken scripting"), ("4.10", "ok", "4.10$"), ("5.0.9", "ok", "5.0.9$"),
            ("5.0.10", "ok", "newer than"),
        ):
            utm.call.return_value = Reply("version", Verdict.DONE, 0, version + "\n", "", (), 0.1)
            [(level, message)] = said()
            self.assertEqual(level, expected, version)
            self.assertRegex(message, words)
        with open(os.path.join(contents, "Info.plist"), "wb") as file:
            plistlib.dump({"CFBundleShortVersionString": "4.7.2"}, file, fmt=plistlib.FMT_BINARY)
        self.assertEqual(said(), [("error", "UTM 4.7.2 has broken scripting")])


    def test_healthy_installation_has_no_problems_and_is_not_changed(self) -> None:
        self.healthy()
        before = self.files_of_state()
        passed = f"\u2713 {len(self.CHECKS)} checks passed (-v shows them)\n"
        self.assertEqual(self.km("doctor"), (0, passed, "no problems found\n"))
        self.assertEqual(sorted(self.utm.verbs()), ["ip-address", "list", "version"])
        self.assertEqual(self.files_of_state(), before)

    def test_finding_is_shown_with_its_remedy_below(self) -> None:
        self.image(displays=[{"Hardware": "virtio-gpu-pci"}])
        result = self.km("doctor")
        self.assertEqual((result.code, result.err), (0, "2 warnings\n"))
        self.assertRegex(result.out, r"(?m)^! devices: \S+ is not headless: .*\n {4}In its settings in UTM, remove")
        self.config(**self.settings, identity_file="/nonexistent")
        result = self.km("doctor")
        self.assertEqual((result.code, result.err), (1, "1 error, 2 warnings\n"))

    def test_passed_and_skipped_checks_are_one_line_each_above_the_problems_unless_verbose(self) -> None:
        self.vm("a")
        result = self.km("doctor")
        self.assertEqual(result.code, 1)
        self.assertEqual(result.out.splitlines()[:2], [f"\u2713 {len(self.CHECKS) - 2} checks passed (-v shows them)",
                                                      "- devices: not checked, because image failed"])
        self.assertRegex(result.out, r"\n\u2717 image: there is no image to clone\n    To create one: \S+ base create")
        verbose = self.km("doctor", "-v").out
        self.assertEqual(re.findall(r"(?m)^\S (\S+): ", verbose), self.CHECKS)
        self.assertIn("- devices: not checked, because image failed\n", verbose)

    def test_terminal_shows_progress_and_coloured_signs(self) -> None:
        self.vm("a")
        terminal = self.screen("doctor", columns=40, TERM="xterm")
        terminal.expect(rb"doctor  checking the Mac")
        self.assertEqual(terminal.wait(), 1)
        terminal.expect(b"\r\x1b\\[K\x1b\\[32m\xe2\x9c\x93\x1b\\[0m \\d+ checks passed")
        terminal.expect(b"\r\n\x1b\\[31m\xe2\x9c\x97\x1b\\[0m image: there is no image to clone\r\n"
                        b"    To create one:\r\n      \x1b\\[1mkodemachine base create v0.1.0\x1b\\[0m\r\n")

    def test_signs_depend_on_the_encoding_of_the_terminal(self) -> None:
        for encoding, fits in (("utf-8", True), ("ascii", False), ("iso8859-1", False), ("no-such", False)):
            with mock.patch.object(sys, "stdout", mock.Mock(encoding=encoding)):
                self.assertEqual(kodemachine.Terminal.fits("\u2713\u2717"), fits, encoding)

    def test_fleet_with_every_problem(self) -> None:
        mac, key = self.utm.fake.new_mac(), host_key()
        self.image(backend="apple", displays=[{}], serials=[{"kind": "terminal"}])
        self.utm.add(IMAGE + " 2")
        self.utm.add("KM-Twin")
        self.vm("twin")
        self.vm("a", "started", macs=[mac], ips=["192.168.64.3", "172.17.0.1"])
        self.vm("b", "started", macs=[mac.lower()], ips=["192.168.64.3", "172.17.0.1"])
        self.utm.add("Windows 11", macs=["02:00:00:00:00:01"])
        self.vm("c", macs=["02:00:00:00:00:01"])
        self.vm("new", macs=[mac])
        self.remember(a={"machine_id": "1" * 32}, b={"machine_id": "1" * 32},
                      c={"mac_is_unique": True, "is_offline": True}, new={"is_offline": True})
        self.write_state("known_hosts", f"km-a {key}\nkm-b {key}\n")
        self.write_state("machines.json", json.dumps({**self.records(), FakeUTM.new_uuid(): {"name": "km-gone"}}))
        os.mkdir(os.path.join(self.state, "intents"))
        self.write_state("intents/km-cut.json", "{}")
        self.write_state("intents/km-Odd.json", "{}")
        self.write_state("known_hosts.new", "")
        os.utime(os.path.join(self.state, "known_hosts.new"), (0, 0))
        self.config(**self.settings, identity_file=os.path.join(self.folder, "no key"))
        self.assert_said(
            self.doctor({"SPACE_LOW": 1 << 60, "SPACE_OUT": 1 << 60}),
            devices="error: .*does not use the QEMU backend && warning: .*not headless && warning: .*no serial port",
            ssh_key=r"error: .*no key does not exist \| ssh-keygen -t ed25519 -f '",
            names="error: 2 machines are named km-twin: .*Rename",
            macs=f"error: km-a and km-b share the MAC address {mac} && "
                 "warning: (km-c and Windows 11|Windows 11 and km-c) share the MAC",
            offline="error: km-c is recorded as offline, and has a route out of the Mac .* Host Only",
            host_keys="warning: km-a and km-b share a host key.*base seal LABEL --as",
            machine_ids="warning: km-a and km-b share a machine-id.*base seal LABEL --as",
            addresses=r"error: km-a and km-b share the IP address 192\.168\.64\.3: .*: kodemachine start b --fresh$",
            copies=rf"warning: {IMAGE} 2 \(\S{{36}}\) was left by an interrupted clone",
            space="error: only .* is free .*purge --dry-run",
            leftovers=r"warning: remembered machines that no longer exist: 1 .*: kodemachine purge$ && "
                      r"warning: .*km-cut was interrupted .*: kodemachine cut$ && "
                      r"warning: .*km-Odd was interrupted \| rm '/.*km-Odd\.json'$ && "
                      r"warning: .*known_hosts.new.*\| rm '/.*known_hosts\.new'$",
            network="warning: no ssh server answers at 192.168.64.3 .*: kodemachine exec a -- systemctl status ssh$",
        )  # fmt: skip

    def test_each_machine_whose_ssh_server_does_not_answer_is_named(self) -> None:
        self.healthy()
        self.vm("silent", "started", ips=["127.0.0.9"])
        self.assert_said(self.doctor(),
                         network="warning: no ssh server answers at 127.0.0.9 .*: kodemachine exec silent")

    def test_machines_are_not_missing_while_utm_shows_none(self) -> None:
        self.config(**self.settings)
        self.vm("a")
        self.remember(a={"is_named": True, "name": "km-a"})
        self.utm.option(ready_in=3600)
        self.assertNotIn("remembered", self.km("doctor").out)
        self.assertEqual(self.record("a")["is_named"], True)

    def test_work_in_progress_is_not_a_leftover(self) -> None:
        self.healthy()
        self.utm.add(IMAGE + " 2")
        os.mkdir(os.path.join(self.state, "intents"))
        self.write_state("intents/km-cut.json", "{}")
        self.write_state("intents/unfinished-kodeimage-v0.3.0.json", "{}")
        self.write_state("known_hosts.new", "")
        with self.held_lock("fleet"), self.held_lock("km-cut"), self.held_lock("kodeimage-v0.3.0"):
            self.assert_said(self.doctor())

    def test_remedy_for_an_interrupted_image_completes_it(self) -> None:
        self.healthy()
        os.mkdir(os.path.join(self.state, "intents"))
        order = {"base": "Old Debian", "base_uuid": FakeUTM.new_uuid(), "time": 0, "listed": []}
        self.write_state("intents/unfinished-kodeimage-v0.3.0.json", "{}")
        self.write_state("intents/kodeimage-v0.4.0.json", "{}")
        self.write_state("intents/kodeimage-v0.5.0.json", json.dumps(order))
        self.assert_said(self.doctor(), leftovers=r"warning: .*: kodemachine base create v0\.3\.0$ && "
                                                  r"warning: .*: kodemachine base seal VM --as v0\.4\.0$ && "
                                                  r"warning: .*: kodemachine base seal 'Old Debian' --as v0\.5\.0$")

    def test_data_of_utm_that_cannot_be_read(self) -> None:
        self.healthy()
        self.config(**{**self.settings, "documents": "/nonexistent"})
        self.assert_said(self.doctor(), sizes="warning: .* in /nonexistent cannot be read, .*"
                                              "kodemachine config set documents PATH$")

    def test_address_of_a_container_bridge_is_not_compared(self) -> None:
        self.healthy()
        self.vm("b", "started", ips=["172.17.0.1"])
        self.vm("c", "started", ips=["172.17.0.1"])
        self.assert_said(self.doctor())
        self.utm.change("km-a", ips=[])
        self.assert_said(self.doctor(), network=r"warning: no guest agent reports an IP address "
                         r"\(running: km-a, km-b, km-c\) .*: kodemachine attach a$")

    def test_emulated_vlan_is_the_cause_of_a_shared_address(self) -> None:
        self.healthy()
        self.vm("b", "started", ips=["10.0.2.15"])
        self.vm("c", "started", ips=["10.0.2.15"])
        self.assert_said(self.doctor(), addresses=r"error: km-b and km-c share .* 10\.0\.2\.15 .*Emulated VLAN.*Shared",
                         network=r"error: no ssh server answers at 10\.0\.2\.15 .*Emulated VLAN")

    def stub_ssh_add(self, status: int) -> None:
        path = os.path.join(self.bin, "ssh-add")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\n[ "$*" = -l ] || exit 9\nexit {status}\n')
        os.chmod(path, 0o755)

    def test_image_is_missing_or_runs(self) -> None:
        self.vm("a")
        self.assert_said(self.doctor(), image="error: there is no image", devices="skipped: .*image failed")
        self.image(status="started")
        self.assert_said(self.doctor({"SPACE_LOW": 1 << 60}), image="error: .* is running; .*", devices="skipped: .*",
                         space="warning: only .* is free")  # fmt: skip

    def test_failed_check_is_reported_and_only_those_that_need_it_are_skipped(self) -> None:
        self.healthy()
        by_list = dict.fromkeys(("image", "osascript", "devices", "names", "macs", "offline", "host_keys",
                                 "machine_ids", "addresses", "copies", "sizes", "leftovers", "network"), "skipped: ")
        self.utm.fault("list", error=-1743)
        self.assert_said(self.doctor(), **by_list, utm="skipped: .*automation failed",
                         automation=r"error: .*\(-1743\) \| .*Privacy & Security > Automation")  # fmt: skip
        self.utm.clear_faults()
        fault: dict[str, Any]
        for fault, words in (({"error": -600}, r"error: UTM gave no list within 1 s \(-600\) \| .*sudo"),
                             ({"crash": "TRAP"}, "error: utmctl crashed")):  # fmt: skip
            self.utm.fault("list", **fault)
            said = self.doctor({"LOOK_LIMIT": 1.0 if "error" in fault else 10.0})
            self.assert_said(said, **by_list, utm=words, automation="skipped: .*list of machines cannot be read")
            self.utm.clear_faults()
        by_script = {"macs": "skipped: .*osascript failed", "offline": "skipped: .*osascript failed",
                     "devices": "skipped: .*osascript failed"}
        for fault, words in (({"error": -1743}, r"error: .*osascript.*\(-1743\).*no new machine.* \| .*Automation"),
                             ({"error": -2700, "string": "Broken."}, "error: .*: .*Broken"),
                             ({"silent": True}, "error: osascript cannot read UTM's machines: .* no machine")):
            self.utm.fault("hardware", **fault)
            self.assert_said(self.doctor(), **by_script, osascript=words)
            self.utm.clear_faults()
        self.utm.fault("devices", error=-609)
        self.assert_said(self.doctor(), devices="warning: UTM does not report the devices of .*Connection is invalid")
        os.unlink(os.path.join(self.bin, "utmctl"))
        self.assert_said(self.doctor(), **by_list, utmctl=r"error: utmctl was not found \| Install UTM",
                         **dict.fromkeys(("version", "automation", "utm"), "skipped: .*utmctl failed"))  # fmt: skip

    def test_records_that_cannot_be_read(self) -> None:
        self.healthy()
        self.write_state("machines.json", "{")
        self.assert_said(self.doctor(), leftovers=r"error: .*machines.json cannot be read .* \| Move it away")
        self.assertEqual(self.km("doctor").err.count("cannot be read"), 1)

    def test_file_that_cannot_be_read_is_a_finding_and_the_other_checks_follow(self) -> None:
        doctor = kodemachine.Doctor(kodemachine.Manager(kodemachine.Settings(), mock.Mock(), mock.Mock()))
        failure = PermissionError(errno.EACCES, "Permission denied", "/state")
        checks = [kodemachine.Check("one", [], "", mock.Mock(side_effect=failure)),
                  kodemachine.Check("two", ["one"], "", mock.Mock()),
                  kodemachine.Check("three", [], "well", lambda _: ())]
        with mock.patch.object(kodemachine, "CHECKS", checks):
            found = [finding[:3] for finding in doctor.findings()]
        self.assertEqual(found, [("one", "error", "/state: Permission denied"),
                                 ("two", "skipped", "not checked, because one failed"), ("three", "ok", "well")])

    def test_findings_that_need_a_mac(self) -> None:
        """In this process, because they need another system and another user."""
        manager = kodemachine.Manager(kodemachine.Settings(ssh_port=1), mock.Mock(), mock.Mock())
        doctor = kodemachine.Doctor(manager)
        doctor._running = {"127.0.0.1": [mock.Mock(label="a")]}
        darwin = mock.Mock(sysname="Darwin", release="24.1.0")
        with mock.patch.object(os, "uname", return_value=darwin), mock.patch.object(os, "geteuid") as user, \
                mock.patch.object(kodemachine.Prober, "unreachable", True), \
                mock.patch.object(kodemachine, "GREETING", 0.1):  # fmt: skip
            for uid, level in ((0, ["error"]), (501, [])):
                user.return_value = uid
                self.assertEqual([level for level, *_ in doctor._user()], level)
            self.assertEqual([level for level, *_ in doctor._network()], ["error"])


# ---- turn off, keep, clear away: stop, suspend, resume, clone, delete, purge


class StopTest(Case):
    """stop: asks the guest, verifies the state, and forces nothing without an option."""

    def test_stop_asks_the_guest_and_waits_until_it_is_off(self) -> None:
        uuid = self.vm("a", "started", request_seconds=0.3)
        self.vm("b", "started")
        result = self.km("stop", "a")
        self.assert_says(result, 0, "a stopped")
        self.assertEqual(self.asked("stop"), [[uuid, "--request"]])
        self.assertEqual((self.states(), result.out), ({"km-a": "stopped", "km-b": "started"}, ""))

    def test_guest_that_ignores_the_power_key_keeps_running_and_force_is_suggested(self) -> None:
        for how in ({"ignores_power_key": True}, {"request_seconds": None}):
            name = self.utm.machine(self.vm("deaf" + str(len(how)) + next(iter(how))[:1], "started", **how))["name"]
            self.assert_says(
                self.km("stop", name, "-t", "0.4"), 6, "did not power off within 0.4 s", "kodemachine stop --force"
            )
            self.assertEqual(self.states()[name], "started")
        self.assertEqual({args[1] for args in self.asked("stop")}, {"--request"})

    def test_power_key_is_pressed_again_if_it_had_no_effect(self) -> None:
        self.vm("a", "started", ignores_power_key=True)
        stop = self.start_km("stop", "a")
        wait_for(lambda: self.asked("stop"))
        self.utm.change("km-a", ignores_power_key=False)
        self.assertEqual(stop.wait(60), 0)

    def test_timeout_comes_from_the_configuration(self) -> None:
        self.config(stop_timeout=0.3)
        self.vm("deaf", "started", ignores_power_key=True)
        self.assert_says(self.km("stop", "deaf"), 6)

    def test_force_does_not_ask_the_guest_and_escalates(self) -> None:
        deaf = self.vm("deaf", "started", ignores_power_key=True, stop_seconds=0.2)
        stuck = self.vm("stuck", "started", stuck=["stopping"])
        self.assert_says(self.km("stop", "deaf", "--force"), 0, "deaf stopped")
        self.assert_says(self.km("stop", "-f", "stuck"), 0, "stuck stopped")
        self.assertEqual(self.asked("stop"), [[deaf, "--force"], [stuck, "--force"], [stuck, "--kill"]])

    def test_kill_stops_a_machine_that_hangs_in_stopping(self) -> None:
        uuid = self.vm("stuck", "stopping", stuck=["stopping"])
        self.assert_says(self.km("stop", "stuck", "-t", "0.3"), 6, "it is stopping")
        self.assert_says(self.km("stop", "stuck", "--kill"), 0, "stuck stopped")
        self.assertEqual(self.asked("stop"), [[uuid, "--kill"]])

    def test_paused_machine_is_resumed_to_be_asked_and_killed_when_forced(self) -> None:
        asked, forced = self.vm("a", "paused", resume_seconds=0.2), self.vm("b", "paused")
        self.assert_says(self.km("stop", "a"), 0)
        self.assertEqual((self.asked("start"), self.asked("stop")), ([["--hide", asked]], [[asked, "--request"]]))
        self.assert_says(self.km("stop", "b", "--force"), 0)
        self.assertEqual((len(self.asked("start")), self.asked("stop")[1:]), (1, [[forced, "--kill"]]))


    def test_error_10004_counts_per_action_and_state(self) -> None:
        self.vm("a", "started")
        self.utm.fault("stop", error=-10004, when="after", times=1)
        self.utm.fault("delete", error=-10004, times=1)
        self.assert_says(self.km("delete", "-f", "a"), 0, "a deleted")
        self.assertEqual([len(self.asked(verb)) for verb in ("stop", "delete")], [1, 2])
        self.vm("slow", "started", request_seconds=4)
        self.utm.clear_faults()
        self.utm.fault("stop", error=-10004, when="after")
        self.assert_says(self.km("stop", "slow"), 0, "slow stopped")

    def test_action_refused_twice_is_a_missing_permission(self) -> None:
        for verb in ("stop", "suspend", "delete"):
            self.vm("to-" + verb, "stopped" if verb == "delete" else "started")
            self.utm.fault(verb, error=-10004)
        for verb, *option in (("stop", "-t", "3"), ("stop", "--force"), ("suspend",), ("delete",)):
            words = f'UTM did not carry out "{verb} km-to-{verb}" (Apple Event error -10004)'
            self.assert_says(self.km(verb, *option, "to-" + verb), 5, words, "Automation")
        self.assertEqual([len(self.asked(verb)) for verb in ("stop", "suspend", "delete")], [4, 2, 2])
        self.assertEqual(set(self.states().values()), {"started", "stopped"})
        self.assertEqual(self.states()["km-to-delete"], "stopped")

    def test_stopped_machine_is_not_an_error(self) -> None:
        self.vm("a")
        self.vm("b")
        for args in ((), ("--force",), ("--kill",)):
            self.assert_says(
                self.km("stop", "a", "b", *args),
                0,
                "a is already stopped\n",
                "b is already stopped\n",
            )
        self.assertEqual(self.asked("stop"), [])

    def test_several_machines_are_stopped_in_parallel(self) -> None:
        labels = ["a", "b", "c"]
        for label in labels:
            self.vm(label, "started", request_seconds=None)
        stop = self.start_km("stop", *labels)
        wait_for(lambda: len({args[0] for args in self.asked("stop")}) == 3)  # none of them is off yet
        for label in labels:
            self.utm.change("km-" + label, status="stopped")
        result = self.ended(stop)
        self.assertEqual((result.code, result.err.count(" stopped\n")), (0, 3), result.err)

    def test_each_machine_has_its_line_and_the_first_failure_is_the_exit_status(self) -> None:
        self.vm("a", "started")
        self.vm("deaf", "started", ignores_power_key=True)
        for labels, code in ((("a", "deaf", "nope"), 6), (("nope", "deaf", "a", "nope"), 3)):
            result = self.km("stop", *labels, "-t", "0.5")
            self.assert_says(result, code, "km-deaf did not power off", "no machine nope")
            self.assertRegex(result.err, r"(?m)^a (stopped|is already stopped)$")
            self.assertEqual(result.err.count("no machine nope"), 1)

    def test_all_option_stops_every_clone_that_is_not_off_and_nothing_else(self) -> None:
        self.image(status="started")
        for name in ("foreign", "km-km-a", "km-Foo", "KM-a"):
            self.utm.add(name, status="started")
        mine = {self.vm("a", "started"), self.vm("b", "paused")}
        self.vm("c")
        self.assertEqual(self.km("stop", "--all").code, 0)
        self.assertEqual({args[0] for args in self.asked("stop")}, mine)
        self.assertEqual(
            sorted(name for name, state in self.states().items() if state != "started"), ["km-a", "km-b", "km-c"]
        )
        self.assert_says(self.km("stop", "--all"), 0, "no machine to stop")

    def test_missing_or_conflicting_arguments_stop_nothing(self) -> None:
        self.vm("a", "started")
        for args, words in (
            ((), "stop needs a label"),
            (("a", "--all"), "not both"),
            (("a", "-t", "0"), "is not a positive number of seconds"),
            (("-t", "x", "a"), "is not a positive number of seconds"),
        ):
            self.assert_says(self.km("stop", *args), 2, words)
        self.assertEqual(self.utm.calls(), [])

    def test_lost_or_wrong_answer_does_not_decide(self) -> None:
        for number in (-1712, -609, -600, -10004):
            for when in ("before", "after"):
                label = f"m{-number}{when}"
                self.vm(label, "started")
                self.utm.fault("stop", vm="km-" + label, error=number, when=when, times=1)
                self.utm.fault("status", vm="km-" + label, error=number, times=2)
        result = self.km("stop", "--all")
        self.assertEqual((result.code, set(self.states().values())), (0, {"stopped"}), result.err)
        for call in self.calls_of("stop"):
            self.assertEqual(call["argv"][2], "--request")

    def test_refusal_ends_the_command_at_once(self) -> None:
        uuid = self.vm("a", "started")
        self.utm.fault("stop", error=-1743)
        self.assert_says(self.km("stop", "a"), 5, "-1743", "Automation")
        self.assertEqual(self.asked("stop"), [[uuid, "--request"]])

    def test_lock_of_another_kodemachine_is_waited_for_and_reported(self) -> None:
        self.vm("a", "started")
        self.config(clone_timeout=0.5, boot_timeout=0.5)
        with self.held_lock("km-a"):
            self.assert_says(self.km("stop", "a"), 6, "in use by another kodemachine")
        self.assertEqual(self.utm.calls(), [])

    def test_restart_stops_and_starts_and_prints_the_address(self) -> None:
        sshd = self.with_sshd()
        on = self.vm("on", "started", ips=sshd.hosts)
        result = self.km("restart", "on")
        self.assertEqual((result.code, result.out), (0, sshd.hosts[0] + "\n"), result.err)
        self.assertIn("stopping on\n", result.err)
        self.assertEqual((self.asked("stop"), self.asked("start")), ([[on, "--request"]], [["--hide", on]]))
        off = self.vm("off", ips=sshd.hosts)
        result = self.km("restart", "-q", "off", "on")
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertEqual(sorted(result.out.splitlines()), [f"off {sshd.hosts[0]}", f"on {sshd.hosts[0]}"])
        self.assertEqual((self.asked("stop"), len(self.asked("start"))), ([[on, "--request"]] * 2, 3))
        self.assertEqual((self.states()["km-off"], [off] in self.asked("stop")), ("started", False))

    def test_restart_neither_clones_nor_forces_nor_starts_what_did_not_stop(self) -> None:
        self.image()
        uuid = self.vm("deaf", "started", ignores_power_key=True)
        self.assert_says(self.km("restart", "nope"), 3, "there is no machine nope")
        self.assert_says(self.km("restart", "deaf", "-t", "0.4"), 6, "km-deaf did not power off", "stop --force deaf")
        self.assert_says(self.km("restart"), 2, "restart needs a label")
        self.assertEqual((self.states()["km-deaf"], self.asked("start"), self.asked("clone")), ("started", [], []))
        self.assertEqual({tuple(args) for args in self.asked("stop")}, {(uuid, "--request")})

    def test_all_works_on_them_in_the_order_of_their_labels(self) -> None:
        for label in ("web", "api", "db"):
            self.vm(label, "started")
        self.assert_says(self.km("stop", "--all"), 0, "stopping api\n", "stopping db\n", "stopping web\n")


class SuspendTest(Case):
    """suspend and resume: verified by the state; saved sessions are remembered."""

    def test_resume_does_not_start_a_machine_that_turns_out_to_be_off(self) -> None:
        uuid = self.vm("a", "stopping", stuck=["stopping"])
        resume = self.start_km("resume", "a")
        wait_for(lambda: self.utm.calls("status"))
        self.utm.change(uuid, status="stopped")
        self.assert_says(self.ended(resume), 4, "km-a is stopped and cannot be resumed", "kodemachine start -d a")
        self.assertEqual(self.asked("start"), [])


    def test_suspend_and_resume_are_verified_and_can_be_repeated(self) -> None:
        uuid = self.vm("a", "started", suspend_seconds=0.2, resume_seconds=0.2)
        self.assert_says(self.km("suspend", "a"), 0, "a suspended\n")
        self.assertEqual((self.states(), self.asked("suspend")), ({"km-a": "paused"}, [[uuid]]))
        self.assert_says(self.km("suspend", "a"), 0, "a is already suspended\n")
        self.assert_says(self.km("resume", "a"), 0, "a resumed\n")
        self.assertEqual((self.states(), self.asked("start")), ({"km-a": "started"}, [["--hide", uuid]]))
        self.assert_says(self.km("resume", "a"), 0, "a is already running\n")
        self.assertEqual((len(self.asked("suspend")), len(self.asked("start"))), (1, 1))

    def test_lost_answer_does_not_decide(self) -> None:
        for label, rule in (("a", {"error": -1712, "when": "after"}), ("b", {"error": -1712}), ("c", {"silent": True})):
            self.vm(label, "started")
            self.utm.fault("suspend", vm="km-" + label, times=1, **rule)
            self.utm.fault("start", vm="km-" + label, times=1, **rule)
        self.assert_says(self.km("suspend", "--all"), 0)
        self.assertEqual(set(self.states().values()), {"paused"})
        self.assertEqual(len(self.asked("suspend")), 5)
        self.assert_says(self.km("resume", "--all"), 0)
        self.assertEqual(set(self.states().values()), {"started"})


    def test_refused_suspension_is_an_error_with_the_words_of_utm(self) -> None:
        self.vm("a", "started")
        self.utm.fault("suspend", error=-2700, string="Not today.")
        self.assert_says(self.km("suspend", "a"), 1, "km-a cannot be suspended: Not today.")
        self.assertEqual(self.states(), {"km-a": "started"})


    def test_wrong_state_exits_4_and_changes_nothing(self) -> None:
        for label, status in (("off", "stopped"), ("on", "started"), ("frozen", "paused")):
            self.vm(label, status)
        before = self.states()
        for args, words in (
            (("suspend", "off"), "km-off is stopped and cannot be suspended"),
            (("resume", "off"), "km-off is stopped and cannot be resumed"),
        ):
            self.assert_says(self.km(*args), 4, words, "kodemachine start -d off")
        self.assertEqual((self.states(), self.asked("suspend"), self.asked("start")), (before, [], []))

    def test_all_option_means_running_machines_for_suspend_and_suspended_ones_for_resume(self) -> None:
        self.image(status="started")
        on, frozen = self.vm("on", "started"), self.vm("frozen", "paused")
        self.vm("off")
        self.assertEqual(self.km("suspend", "--all").code, 0)
        self.assertEqual(self.asked("suspend"), [[on]])
        self.assertEqual(self.km("resume", "--all").code, 0)
        self.assertEqual(sorted(args[1] for args in self.asked("start")), sorted([on, frozen]))
        self.assertEqual(self.states()["km-off"], "stopped")

    def test_a_suspension_without_effect_is_requested_twice_and_then_reported(self) -> None:
        self.vm("a", "started")
        self.utm.fault("suspend", silent=True)
        self.assert_says(self.km("suspend", "a"), 1, "km-a cannot be suspended\n", "kodemachine stop a")
        self.assertEqual((len(self.asked("suspend")), self.states()), (2, {"km-a": "started"}))

    def test_it_pauses_in_memory_only(self) -> None:
        self.vm("a", "started")
        self.assert_says(self.km("suspend", "a", "--save"), 2, "suspend does not take '--save'")
        self.assertEqual(self.utm.calls(), [])


class CloneTest(Case):
    """clone: a copy of a clone becomes an independent machine."""

    GREETERS = 2

    def setUp(self) -> None:
        super().setUp()
        self.utm.change(self.base, macs=["02:00:00:00:00:01"])

    def parent(self) -> str:
        """Makes alpha, stopped, with its own identity on its disk; returns its UUID."""
        self.spawn()
        self.spawn("stop", "alpha")
        return str(self.utm.machine("km-alpha")["uuid"])

    def identity(self, name: str) -> list[str]:
        """The machine-id and the host key in the guest."""
        paths = [os.path.join(self.utm.guest(name), "etc", *parts)
                 for parts in (("machine-id",), ("ssh", "ssh_host_ed25519_key.pub"))]
        return [str(kodemachine.read_text(path)).strip() for path in paths]

    def requests(self, name: str) -> list[str]:
        uuid = self.utm.machine(name)["uuid"]
        calls = self.calls_of()
        return [call["verb"] for call in calls if uuid in call["argv"] and call["verb"] in ("start", "stop", "exec")]

    def test_clone_ignores_half_copies_of_a_deleted_original(self) -> None:
        self.parent()
        self.use(clone_timeout=2)
        for again in (["clone", "alpha", "beta"], ["start", "-d", "beta"]):
            self.utm.fault("clone", kill_parent="before", silent=True)
            self.assertEqual(self.km("clone", "alpha", "beta").code, -signal.SIGKILL)
            self.utm.clear_faults()
            self.spawn("start", "-d", "alpha", "--fresh", "-y")
            self.spawn("stop", "alpha")
            alpha = self.utm.machine("km-alpha")["uuid"]
            result = self.km(*again)
            self.assertEqual(result.code, 0 if again[0] == "clone" else 4, result.err)
            self.assertEqual(self.utm.machine(alpha)["name"], "km-alpha")
            if again[0] == "clone":
                self.assertEqual(self.utm.machine("km-beta")["copied_from"], alpha)
                self.remove("km-beta")

    def test_clone_leaves_its_original_unchanged_and_has_its_identity_at_first(self) -> None:
        parent = self.parent()
        before = self.utm.machine(parent)
        result = self.spawn("clone", "alpha", "beta")
        self.assertTrue(result.err.endswith("\nbeta is a copy of alpha; to start it: kodemachine beta\n"), result)
        self.assertEqual(self.utm.machine("km-beta")["copied_from"], parent)
        self.assertEqual(self.utm.machine(parent), before)
        fresh = self.record("beta")
        keys = {"name", "image", "image_uuid", "created", "never_started", "is_copy", "first_boot"}
        self.assertEqual(set(fresh), keys)
        self.assertEqual((fresh["image"], fresh["image_uuid"]), ("kodeimage-v0.2.0", self.base))
        self.assertEqual(self.identity("km-beta"), self.identity("km-alpha"))
        self.spawn("start", "-d", "alpha", "beta")
        mine, theirs = self.identity("km-beta"), self.identity("km-alpha")
        self.assertRegex(mine[0], r"\A[0-9a-f]{32}\Z")
        self.assertRegex(mine[1], r"\Assh-ed25519 \S+ root@beta\Z")
        self.assertEqual([a == b for a, b in zip(mine, theirs)], [False, False])
        record = self.record("beta")
        self.assertEqual(record["machine_id"], mine[0])
        self.assertEqual(self.pinned("km-beta"), [mine[1].rpartition(" ")[0]])
        self.assertEqual({"never_started", "is_copy"} & set(record), set())
        self.assertEqual(len({mac for vm in self.utm.machines() for mac in vm["macs"]}), 3)
        self.assertEqual(self.requests("km-beta"), ["start", "exec", "stop", "start"])
        self.spawn("stop", "beta")
        self.spawn("start", "-d", "beta")
        self.assertEqual((self.identity("km-beta"), self.requests("km-beta")[4:]), (mine, ["stop", "start"]))


    def test_clone_is_refused_with_a_reason_and_makes_nothing(self) -> None:
        self.parent()
        self.utm.add("km-run", status="started")
        self.utm.add("km-paused", status="paused")
        before = self.utm.names()
        for words, code, said in (
            ("alpha alpha", 2, "a copy of itself"), ("alpha list", 2, "'list' is reserved"),
            ("alpha Beta", 2, "cannot be a label"), ("gone beta", 3, "there is no machine gone"),
            ("alpha run", 4, "km-run exists already"), ("run beta", 4, "kodemachine stop run"),
            ("paused beta", 4, "kodemachine stop paused"),
        ):  # fmt: skip
            self.assertIn(said, self.spawn("clone", *words.split(), code=code).err)
        self.assertEqual((self.utm.names(), self.utm.calls("clone")[1:]), (before, []))

    def test_interrupted_clone_is_completed_by_clone_and_by_start(self) -> None:
        parent = self.parent()
        self.utm.add("km-gamma")
        for again in (("clone", "alpha", "beta"), ("start", "-d", "beta")):
            self.utm.fault("clone", kill_parent="after", partial="no-rename", times=1)
            self.assertEqual(self.km("clone", "alpha", "beta").code, -signal.SIGKILL)
            self.utm.clear_faults()
            self.assertIn("an earlier run began to clone km-alpha to km-beta",
                          self.spawn("clone", "gamma", "beta", code=4).err)  # fmt: skip
            self.spawn(*again)
            self.assert_machines("km-alpha", "km-beta", "km-gamma")
            self.assertEqual(self.utm.machine("km-beta")["copied_from"], parent)
            self.assertEqual(self.record("beta")["image_uuid"], self.base)
            self.spawn("delete", "-f", "beta")

    def test_interrupted_clone_without_a_copy_is_not_replaced_by_one_of_the_image(self) -> None:
        parent = self.parent()
        self.use(clone_timeout=2)
        self.utm.fault("clone", kill_parent="before", silent=True)
        self.assertEqual(self.km("clone", "alpha", "beta").code, -signal.SIGKILL)
        self.utm.clear_faults()
        doctor = [finding["remedy"] for finding in json.loads(self.km("doctor", "--json").out)]
        self.assertIn("To complete it: kodemachine clone alpha beta", doctor)
        err = self.spawn("start", "-d", "beta", code=4).err
        self.assertIn("an earlier `kodemachine clone alpha beta` was interrupted and left no machine", err)
        self.assert_machines("km-alpha")
        self.use(clone_timeout=30)
        self.spawn("clone", "alpha", "beta")
        self.assertEqual(self.utm.machine("km-beta")["copied_from"], parent)

    def test_clone_that_kept_its_old_identity_gets_a_new_one_at_the_next_cold_start(self) -> None:
        self.parent()
        self.spawn("clone", "alpha", "beta")
        old = self.identity("km-beta")
        self.utm.fault("exec", silent=True, times=1)
        self.assertIn("did not name km-beta", self.spawn("start", "-d", "beta").err)
        self.spawn("start", "-d", "beta")           # it is not restarted under the hands of whoever uses it
        self.spawn("stop", "beta")
        self.assertEqual((self.identity("km-beta"), self.record("beta")["is_copy"]), (old, True))
        self.utm.change("km-beta", ignores_power_key=True)
        self.use(stop_timeout=0.3)
        self.spawn("start", "-d", "beta")
        self.assertNotIn(self.identity("km-beta")[0], old)
        self.assertNotIn("is_copy", self.record("beta"))

    def test_clone_without_a_host_key_to_replace_is_reported(self) -> None:
        self.parent()
        os.unlink(self.inside("km-alpha", "etc/ssh/ssh_host_ed25519_key.pub"))
        self.spawn("clone", "alpha", "beta")
        self.assertIn("its host keys and machine-id are not all new", self.spawn("start", "-d", "beta").err)
        self.assertEqual(self.record("beta")["is_copy"], True)

    def test_clone_gets_new_host_keys_where_sshd_has_them(self) -> None:
        self.parent()
        root = self.utm.guest("km-alpha")
        old = {}
        for kind, bits in (("ed25519", "256"), ("ecdsa", "384")):
            path = os.path.join(root, "var/lib", kind)
            subprocess.run(["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-f", path], stdin=subprocess.DEVNULL,
                           check=True)
            os.unlink(path + ".pub")
            old[kind] = self.read(path)
        self.spawn("clone", "alpha", "beta")
        root = self.utm.guest("km-beta")
        keys = {kind: os.path.join(root, "var/lib", kind) for kind in old}
        self.write(os.path.join(root, "etc/ssh/sshd_config"), "".join(f"HostKey {path}\n" for path in keys.values()))
        # A hostname that the guest does not keep is another problem.
        os.unlink(os.path.join(root, "etc/hostname"))
        os.symlink(os.path.join(root, "run/hostname"), os.path.join(root, "etc/hostname"))
        self.assertIn("/etc/hostname does not keep the name", self.spawn("start", "-d", "beta").err)
        self.assertEqual([self.read(keys[kind]) == old[kind] for kind in old], [False, False])
        public = [" ".join(self.read(path + ".pub").split()[:2]) for path in keys.values()]
        self.assertEqual(self.pinned("km-beta"), public)
        self.assertIn("ecdsa-sha2-nistp384 ", public[1])

    def test_clone_whose_guest_does_not_confirm_its_new_identity_keeps_the_old_one(self) -> None:
        self.parent()
        self.spawn("clone", "alpha", "beta")
        for answer in ("renewed=no\nhostname=beta\nend=beta\n", "hostname=beta\nend=beta\n"):
            self.utm.clear_faults()
            self.remember(beta={"refusal": ""})
            self.utm.fault("exec", stdout=f"0 0\n{base64.b64encode(answer.encode()).decode()}\n")
            self.assertIn("did not name km-beta", self.spawn("start", "-d", "beta").err)
            self.assertEqual((self.requests("km-beta")[-1], self.record("beta")["is_copy"]), ("exec", True))
            self.spawn("stop", "beta")

    def pinned(self, name: str) -> list[str]:
        """The host keys of that machine in kodemachine's own known-hosts file."""
        text = kodemachine.read_text(os.path.join(self.home, ".local", "state", "kodemachine", "known_hosts")) or ""
        return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(name + " ")]


class DeleteTest(Case):
    """delete: only the named machine, by UUID, checked before and verified after."""

    def test_machine_that_is_not_off_is_refused_and_force_stops_it_first(self) -> None:
        uuids = [self.vm(status, status) for status in ("started", "paused", "starting")]
        for label, word in (("started", "running"), ("paused", "paused"), ("starting", "starting")):
            self.assert_says(
                self.km("delete", label), 4, f"km-{label} is {word}\n", f"kodemachine delete --force {label}\n"
            )
        self.assertEqual((self.asked("delete"), self.asked("stop")), ([], []))
        self.assert_says(self.km("rm", "-f", "started", "paused"), 0, "started deleted", "paused deleted")
        self.assertEqual(self.utm.names(), ["km-starting"])
        self.assertEqual(sorted(self.asked("delete")), sorted([uuid] for uuid in uuids[:2]))

    def test_delete_reports_the_freed_space(self) -> None:
        documents = self.documents()
        self.vm("a", disk=300_000)
        size = allocated(os.path.join(documents, "km-a.utm"))
        result = self.km("delete", "a")
        freed = re.search(r"^a deleted, freed (\S+)$", result.err, re.MULTILINE)
        self.assertTrue(freed, result.err)
        if freed and sys.platform != "darwin":
            self.assertEqual(freed[1], kodemachine.size_text(size))
        self.assertEqual(os.listdir(documents), [])

    def test_delete_removes_the_pinned_keys_and_record_of_that_machine_only(self) -> None:
        for label in ("a", "ab"):
            self.vm(label)
        self.remember(a={"created": hours_ago(1)}, ab={"created": hours_ago(2)})
        lines = [f"{name} {PUBLIC_KEY}\n" for name in ("km-a", "km-ab", "km-b", "km-a")]
        self.write_state("known_hosts", "".join(lines))
        kept = self.record("ab")
        self.assert_says(self.km("delete", "a"), 0, "a deleted")
        self.assertEqual(self.read_state("known_hosts"), lines[1] + lines[2])
        self.assertEqual(list(self.records().values()), [kept])

    def test_deletion_without_effect_is_repeated_once_and_reported(self) -> None:
        uuids = [self.vm("a"), self.vm("b")]
        self.utm.fault("delete", vm="km-a", silent=True)
        self.utm.fault("delete", vm="km-b", error=-1712)
        self.assert_says(self.km("delete", "a", "b"), 6, "km-a still exists", "km-b still exists")
        self.assertEqual(sorted(self.asked("delete")), sorted([uuid] for uuid in uuids * 2))
        self.assertEqual(self.utm.names(), ["km-a", "km-b"])

    def test_lost_request_is_repeated_once(self) -> None:
        self.image()
        for number in (-1712, -10004):
            self.utm.fault("delete", vm=self.vm(f"m{-number}"), error=number, times=1)
        result = self.km("delete", "m1712", "m10004")
        self.assertEqual((result.code, self.utm.names(), len(self.asked("delete"))), (0, [IMAGE], 4), result.err)

    def test_machine_renamed_between_two_requests_is_not_deleted(self) -> None:
        uuid = self.vm("a")
        self.utm.fault("delete", silent=True, times=1)
        delete = self.start_km("delete", "a")
        wait_for(self.utm.met)
        self.utm.change(uuid, name="precious")
        self.assert_says(self.ended(delete), 4, "km-a is now named precious and was not deleted")
        self.assertEqual((self.asked("delete"), self.utm.names()), ([[uuid]], ["precious"]))

    def test_late_deletion_is_waited_for_and_not_repeated(self) -> None:
        self.image()
        uuid = self.vm("a")
        self.utm.fault("delete", error=-1712, when="after", delay=0.5, report_after=0.1)
        self.assert_says(self.km("delete", "a"), 0, "a deleted")
        self.assertEqual((self.asked("delete"), self.utm.names()), ([[uuid]], [IMAGE]))

    def test_failed_list_does_not_prove_the_deletion(self) -> None:
        self.image()
        self.vm("a")
        self.utm.fault("delete", silent=True, times=1)
        self.utm.fault("list", skip=3, times=2, error=-1712)        # after the deletion
        self.utm.fault("list", skip=3, times=1, empty=True)         # the calls after those of the first rule
        self.assert_says(self.km("delete", "a"), 0)
        self.assertEqual((len(self.asked("delete")), self.utm.names()), (2, [IMAGE]))

    def test_delete_touches_only_the_clone_with_that_label(self) -> None:
        self.config(base_image="golden")
        self.image()
        for name in ("golden", "silver", "km-km-z", "km-Foo", "KM-upper", "km-parent", "km-child", "km-" + "x" * 61):
            self.utm.add(name, status="stopped")
        twins = [self.utm.add("km-twin") for _ in range(2)]
        self.remember(child={"image": "km-parent", "image_uuid": self.utm.machine("km-parent")["uuid"]})
        before = self.utm.names()
        for label, code, words in (
            (IMAGE, 2, f"kodemachine start LABEL --base {IMAGE}"),
            ("golden", 3, "no machine"),
            ("parent", 4, "is an image"),
            ("silver", 3, "no machine"),
            ("km-km-z", 2, "cannot be a label"),
            ("km-z", 3, "no machine z"),
            ("Foo", 2, "cannot be a label"),
            ("km-Foo", 2, "label"),
            ("upper", 3, "no machine"),
            ("x" * 61, 2, "too long"),
            ("twin", 4, twins[0]),
            ("twin", 4, twins[1]),
            (twins[0], 2, "cannot be a label"),
            ("list", 2, "is reserved"),
            ("", 2, "cannot be a label"),
        ):
            with self.subTest(label):
                self.assert_says(self.km("delete", "--force", label), code, words)
        self.assert_says(self.km("delete"), 2, "needs a label")
        self.assertEqual((self.utm.names(), self.asked("delete"), self.asked("stop")), (before, [], []))

    def test_record_of_a_machine_renamed_in_utm_is_removed(self) -> None:
        self.vm("a")
        self.remember(a={"image": IMAGE, "image_uuid": "-", "name": "km-a"})
        self.utm.change("km-a", name="km-b")
        self.assert_says(self.km("delete", "b"), 0, "b deleted")
        self.assertEqual(self.records(), {})

    def test_machine_renamed_or_started_meanwhile_is_not_deleted(self) -> None:
        for label, change, words in (
            ("a", {"name": "precious", "status": "stopped"}, "not the clone km-a any more"),
            ("b", {"status": "stopped"}, "and was not deleted"),  # running, or still stopping
        ):
            uuid = self.vm(label, "started", stuck=["stopping"])
            if label == "b":  # seen off by `status`, and on again when the deletion is prepared
                self.utm.fault("status", vm=uuid, skip=1, stdout="stopped\n")
                change = {"status": "started"}
            delete = self.start_km("delete", "--force", label)
            self.wait_until_asked("stop", uuid)
            self.utm.change(uuid, **change)
            self.assert_says(self.ended(delete), 4, words)
        self.assertEqual((self.asked("delete"), len(self.utm.names())), ([], 2))


class PurgeTest(Case):
    """purge: deletes many machines, and only the right ones."""

    KEPT = ("kodeimage-v0.2.0", "Windows", "km-km-z", "km-Foo", "KM-a")

    def fleet(self) -> None:
        for name in self.KEPT:
            self.utm.add(name)
        for label, status in (("a", "stopped"), ("on", "started"), ("frozen", "paused")):
            self.vm(label, status)

    def clones(self) -> list[str]:
        """The labels of the clones that are left. Verifies that nothing else was deleted."""
        names = self.utm.names()
        self.assertEqual(tuple(names[: len(self.KEPT)]), self.KEPT)
        return [name[3:] for name in names[len(self.KEPT) :]]

    def test_image_option_takes_a_full_name_or_a_version(self) -> None:
        for label, image in (("a", "debian"), ("b", "kodeimage-debian"), ("c", "kodeimage-v0.1.0"), ("d", "v0.2.0"),
                             ("e", "kodeimage-v0.2.0")):  # fmt: skip
            self.vm(label)
            self.remember(**{label: {"image": image, "image_uuid": "-"}})
        for image, labels in (("debian", "a"), ("v0.1.0", "c"), ("v0.2.0", "d")):
            self.assert_says(self.km("purge", "-y", "--image", image), 0, f"{labels} deleted")
        self.assertEqual(self.utm.names(), ["km-b", "km-e"])

    def test_records_are_kept_while_utm_shows_no_machines(self) -> None:
        self.vm("a")
        self.remember(a={"is_named": True, "name": "km-a"})
        before = self.records()
        self.utm.option(ready_in=3600)
        self.assert_says(self.km("purge"), 0, "nothing to purge")
        self.assertEqual(self.records(), before)

    def test_records_of_missing_machines_are_removed_even_if_nothing_is_deleted(self) -> None:
        self.vm("a")
        self.write_state("machines.json", json.dumps({FakeUTM.new_uuid(): {"name": "km-gone"}}))
        self.assert_says(self.km("purge", "--dry-run"), 0)
        self.assertEqual(len(self.records()), 1)
        self.assertEqual(self.km("purge").code, 2)              # without a terminal there is no yes
        self.assertEqual((self.records(), self.states()), ({}, {"km-a": "stopped"}))


    def test_machine_between_two_states_does_not_count_as_stopped(self) -> None:
        self.fleet()
        self.vm("starting", "starting")
        self.assert_says(self.km("purge", "-y"), 0, "a deleted")
        self.assertIn("starting", self.clones())

    def test_all_option_forces_machines_off_and_skips_those_between_two_states(self) -> None:
        self.fleet()
        self.vm("starting", "starting", stuck=["starting"])
        self.assert_says(self.km("purge", "--all", "-y"), 4, "skipped km-starting: it is starting")
        self.assertEqual(self.clones(), ["starting"])

    def test_machine_in_an_unknown_state_is_skipped_with_exit_4(self) -> None:
        self.fleet()
        self.utm.fault("list", unknown=["km-a"])
        for args in ((), ("--all",)):
            result = self.km("purge", "-n", *args)
            self.assert_says(result, 4, "skipped km-a: it is unknown")
            self.assertNotIn("\na ", result.out)

    def test_filters_match_neither_unknown_ages_nor_unknown_images(self) -> None:
        self.fleet()
        for label, hours, image in (
            ("old", 24 * 8, "one"),
            ("new", 1, "one"),
            ("other", 24 * 8, "two"),
            ("newer", 0, ""),
        ):
            self.vm(label)
            self.remember(
                **{label: {"created": hours_ago(hours), "image": image}}
            )
        for args, going, unknown in (
            (("--older-than", "7d"), ["old", "other"], 3),
            (("--older-than", "30m"), ["new", "old", "other"], 3),
            (("--image", "one"), ["new", "old"], 4),
            (("--older-than", "1w", "--image", "two"), ["other"], 4),
            (("--older-than", "0s"), ["new", "newer", "old", "other"], 3),
            (("--image", ""), [], 4),
            (("--image", "ONE"), [], 4),
            (("--all", "--older-than", "9d"), [], 3),
        ):
            with self.subTest(args):
                result = self.km("purge", "--dry-run", *args)
                self.assert_says(result, 0, f"skipped {unknown} machines of unknown age or image")
                self.assertEqual([line.split()[0] for line in result.out.splitlines()[1:]], going)
        self.assertEqual(self.km("purge", "-y", "--older-than", "7d", "--image", "one").code, 0)
        self.assertEqual(sorted(set(self.clones())), ["a", "frozen", "new", "newer", "on", "other"])

    def test_dry_run_changes_nothing(self) -> None:
        self.fleet()
        before, remembered = self.states(), self.records()
        result = self.km("purge", "--all", "-n")
        self.assert_says(result, 0, "would delete 3 machines and free an unknown amount of disk space")
        self.assertEqual([line.split()[0] for line in result.out.splitlines()], ["LABEL", "a", "frozen", "on"])
        self.assertEqual((self.states(), self.records(), self.utm.verbs()), (before, remembered, ["list"]))
        result = self.km("purge", "--all", "-n", "--json")
        machines = json.loads(result.out)
        self.assertEqual((result.err, [machine["label"] for machine in machines]), ("", ["a", "frozen", "on"]))
        self.assertEqual(list(machines[0]), JSON_KEYS)
        self.assert_says(self.km("purge", "-y", "--json"), 2, "purge --dry-run --json")
        self.assertEqual((self.states(), self.records()), (before, remembered))

    def test_purge_deletes_nothing_without_a_yes(self) -> None:
        self.fleet()
        self.assert_says(self.km("purge"), 2, "needs a yes", "Add -y")
        self.assert_says(self.km("purge", "--all", "--stopped", "-y"), 2, "not both")
        self.assert_says(self.km("purge", "-y", "--older-than", "7"), 2, "is not a length of time")
        self.assert_says(self.km("purge", "-y", "a"), 2, "does not take 'a'")
        self.assertEqual((self.clones(), self.utm.calls("delete")), (["a", "on", "frozen"], []))

    def test_terminal_shows_the_list_and_the_size_and_asks(self) -> None:
        self.documents()
        self.fleet()
        for answer, code in ((b"n\n", 1), (b"\n", 1), (b"yo\n", 1), (b"\x04", 1), (b"y\n", 0)):
            with self.subTest(answer):
                self.assertIn("a", self.clones())
                terminal = self.screen("purge")
                terminal.expect(rb"LABEL +SIZE +RECLAIM\r\na +\d+K +\d+K\r\n")
                terminal.expect(rb"Delete 1 machine and free at least \d+K of disk space\? \[y/N\] ")
                terminal.send(answer)
                self.assertEqual(terminal.wait(), code, terminal.seen)
        self.assertNotIn("a", self.clones())

    def test_records_of_missing_machines_are_removed_without_any_candidate(self) -> None:
        self.write_state("machines.json", json.dumps({FakeUTM.new_uuid(): {"name": "km-gone"}}))
        self.vm("kept", "started")
        self.remember(kept={})
        self.km("purge", "--dry-run")
        self.assertEqual(len(self.records()), 2)
        self.assert_says(self.km("purge"), 0, "nothing to purge")
        self.assertEqual([record["name"] for record in self.records().values()], ["km-kept"])

    def test_table_has_only_columns_to_decide_by_and_the_space_last(self) -> None:
        self.documents()
        self.fleet()
        self.remember(a={"image": IMAGE, "created": hours_ago(1)})
        for args, columns, header in (((), 80, "LABEL IMAGE AGE SIZE RECLAIM"), ((), 28, "LABEL IMAGE SIZE RECLAIM"),
                                      ((), 20, "LABEL SIZE RECLAIM"),
                                      ((), 10, "LABEL RECLAIM"),
                                      (("--all",), 80, "LABEL STATUS IMAGE AGE SIZE RECLAIM"),
                                      (("--all",), 24, "LABEL STATUS RECLAIM")):
            terminal = self.screen("purge", "-n", *args, columns=columns)
            self.assertEqual(terminal.wait(), 0)
            heading = terminal.expect(rb"(?m)^LABEL.*").group().decode()
            self.assertEqual(heading.split(), header.split(), terminal.seen)

    def test_running_machines_are_mentioned_also_if_others_are_deleted(self) -> None:
        self.fleet()
        self.assert_says(self.km("purge", "-y"), 0, "skipped 2 machines: running or paused (--all deletes those too)",
                         "a deleted")

    def test_nothing_to_purge_is_not_an_error(self) -> None:
        self.image()
        self.vm("on", "started")
        for args in ((), ("-y",), ("--dry-run",), ("--older-than", "1s")):
            self.assert_says(self.km("purge", *args), 0, "nothing to purge")

    def test_machine_locked_by_another_kodemachine_is_skipped(self) -> None:
        self.fleet()
        self.vm("b")
        with self.held_lock("km-a"):
            self.assert_says(self.km("purge", "-y"), 0, "skipped a: km-a is in use by another kodemachine", "b deleted")
        self.assertEqual(self.clones(), ["a", "on", "frozen"])

    def test_purge_reports_the_expected_and_the_gained_space(self) -> None:
        documents = self.documents()
        for label in ("a", "b"):
            self.vm(label, disk=300_000)
        promised = allocated(documents)
        result = self.km("prune", "-n")
        self.assertRegex(result.err, r"would delete 2 machines and free at least \d+K of disk space")
        if sys.platform != "darwin":
            self.assertIn(f"at least {kodemachine.size_text(promised)}", result.err)
        self.assertRegex(self.km("purge", "-y").err, r"(?m)^the volume gained \S+$")

    def test_machines_of_one_name_are_skipped_and_named(self) -> None:
        self.fleet()
        twins = [self.vm("twin") for _ in range(2)]
        self.assert_says(self.km("purge", "-y", "--all"), 4, *twins)
        self.assertEqual(
            (self.clones(), [uuid for uuid in twins if [uuid] in self.asked("delete")]), (["twin", "twin"], [])
        )

    def test_machine_left_by_a_dead_rm_session_is_deleted_and_that_of_a_live_one_kept(self) -> None:
        self.fleet()
        self.vm("dead", "started")
        self.vm("alive", "started")
        self.remember(dead={"is_temporary": True}, alive={"is_temporary": True})
        with self.held_lock(self.utm.machine("km-alive")["uuid"] + ".session"):
            self.assertEqual(re.findall(r"(?m)^(\S+) +running \(--rm\)", self.km("list").out), ["dead"])
            self.assert_says(self.km("purge", "-y"), 0, "dead deleted")
        self.assertEqual(self.clones(), ["on", "frozen", "alive"])

    def test_failure_is_reported_and_the_others_are_deleted(self) -> None:
        self.fleet()
        self.vm("b")
        self.utm.fault("delete", vm="km-a", error=-2700, string="Disk on fire.")
        self.assert_says(self.km("purge", "-y"), 1, "UTM did not delete km-a: Disk on fire.", "b deleted")
        self.assertEqual(self.clones(), ["a", "on", "frozen"])

    def test_question_shows_its_list_even_with_quiet(self) -> None:
        self.fleet()
        terminal = self.screen("-q", "purge")
        terminal.expect(rb"(?s)LABEL\r\na\r\nDelete 1 machine ")
        terminal.send(b"n\n")
        self.assertEqual(terminal.wait(), 1)
        self.assertEqual(self.km("-q", "purge", "-y").err, "")

    def test_purge_deletes_only_what_it_has_shown(self) -> None:
        self.fleet()
        terminal = self.screen("purge")
        terminal.expect(rb"Delete 1 machine ")
        self.utm.change("km-a", name="km-other")
        late = self.vm("a")
        terminal.send(b"y\n")
        self.assertEqual(terminal.wait(), 0)
        terminal.expect(rb"skipped a: it is another machine now")
        self.assertEqual((self.asked("delete"), self.utm.machine(late)["name"]), ([], "km-a"))

    def test_purge_skips_a_machine_that_was_started_after_it_was_shown(self) -> None:
        self.fleet()
        terminal = self.screen("purge")
        terminal.expect(rb"Delete 1 machine ")
        self.utm.change("km-a", status="started")
        terminal.send(b"y\n")
        self.assertEqual(terminal.wait(), 0)
        terminal.expect(rb"skipped a: it is running now")
        self.assertEqual((self.asked("delete"), self.asked("stop")), ([], []))

    def test_by_default_only_stopped_ones_go(self) -> None:
        for flag in ((), ("--stopped",)):
            self.fleet() if not self.utm.names() else self.vm("a")
            result = self.km("purge", "-y", *flag)
            self.assert_says(result, 0, "a deleted")
            self.assertEqual((sorted(self.clones()), self.asked("stop")), (["frozen", "on"], []))
        self.assert_says(self.km("purge", "-y"), 0, "skipped 2 machines: running or paused (--all", "nothing to purge")


class RandomFleetTest(Case):
    """delete and purge in random fleets: UTM is asked to change only clones that may be deleted."""

    NAMES = (
        "km-a",
        "km-b",
        "km-a1",
        "km-a-b",
        "km-a-",
        "km--a",
        "km-",
        "km-A",
        "KM-a",
        "km-km-a",
        "km-km-",
        "km-kmx",
        "km-a_b",
        "km-a.b",
        "km-\xe4",
        " km-a",
        "km-a ",
        "km-a\x1b[2J",
        "xkm-a",
        "Windows 11",
        "kodeimage-v0.2.0",
        "kodeimage-v0.10.0",
        "kodeimage-vfoo",
        "kodeimage-v0.2.0 2",
        "km-kodeimage-v1",
        "kodeimage",
        "golden",
        "km-golden",
        "km-" + "a" * 60,
        "km-" + "a" * 61,
        "km-start",
        "km-0",
    )

    def fleet(self, rng: random.Random) -> tuple[list[kodemachine.Row], dict[str, dict[str, Any]], str | None]:
        """Machines, records as they are in the file (of this version or of 0.1.0), and the configured image."""
        states = [kodemachine.Power(word) for word in ("stopped",) * 4 + ("started", "paused", "starting", "unknown")]
        rows = [
            kodemachine.Row(
                f"{rng.getrandbits(32):08X}-0000-4000-8000-{n:012X}", rng.choice(states), rng.choice(self.NAMES)
            )
            for n in range(rng.randint(0, 14))
        ]
        uuids = [row.uuid for row in rows] + ["GONE"]
        records: dict[str, dict[str, Any]] = {}
        for uuid in uuids:
            name, base = rng.choice(self.NAMES), rng.choice(uuids)
            origins: list[dict[str, Any]] = [
                {},
                {"image": 5, "image_uuid": None},
                {"image": {}},
                {"image": {"name": "golden"}},
                {"image": {"name": name, "uuid": base}},
                {"image": name, "image_uuid": base},
            ]
            record = {
                "name": rng.choice([None, rng.choice(self.NAMES)]),
                "created": rng.choice([None, 5, "never", hours_ago(1), hours_ago(999)]),
                "saved": rng.choice([None, True]),
                rng.choice(["rm", "is_temporary"]): rng.choice([None, None, True]),
                **rng.choice(origins),
            }
            records.update({uuid: record} if rng.random() < 0.6 else {})
        return rows, records, rng.choice([None, None, "golden", "kodeimage", "km-b", rng.choice(uuids).lower()])

    @classmethod
    def clones(
        cls, rows: Sequence[kodemachine.Row], records: dict[str, dict[str, Any]], base: str | None
    ) -> list[kodemachine.Row]:
        """Likewise: what `delete` and `purge` may touch, by label."""
        images, names = cls.images(rows, records, base), [row.name for row in rows]
        found = [
            row
            for row in rows
            if re.fullmatch("km-(?!km-)(?:[a-z0-9]|[a-z0-9][a-z0-9-]{0,58}[a-z0-9])", row.name)
            and row not in images
            and names.count(row.name) == 1
        ]
        return sorted(found, key=lambda row: row.name[3:])

    def test_selection_is_right_in_a_thousand_random_fleets(self) -> None:
        class Known(kodemachine.State):
            """Records that need no file."""

            known: dict[str, dict[str, Any]] = {}

            def records(self) -> dict[str, kodemachine.Record]:
                return {uuid: kodemachine.Record.from_json(record) for uuid, record in self.known.items()}

        class Told(kodemachine.Terminal):
            """Keeps lines to itself."""

            def note(self, text: str, *, needed: bool = False) -> None:
                lines.append(text)

        out = Told(quiet=True)
        state, lines = Known(os.path.join(self.folder, "state"), out), list[str]()
        for seed in range(1000):
            rng = random.Random(seed)
            rows, state.known, base = self.fleet(rng)
            listing = kodemachine.Rows(rows)
            utm: Any = types.SimpleNamespace(rows=lambda *_, listing=listing: listing, notes=out)
            manager = kodemachine.Manager(kodemachine.Settings(base_image=base), utm, state)
            may = self.clones(rows, state.known, base)
            with self.subTest(seed=seed):
                fleet = manager.fleet()
                want = [(row.uuid, row.name, row.power) for row in rows]
                self.assertEqual([machine[:3] for machine in fleet.machines], want)
                images = [row.uuid for row in self.images(rows, state.known, base)]
                self.assertEqual([machine.uuid for machine in fleet.images], images)
                names = [row.name for row in rows]
                single = [machine.uuid for machine in fleet.clones if names.count(machine.name) == 1]
                self.assertEqual(single, [row.uuid for row in may])
                for row in rows:
                    label = row.name[3:] if row.name.startswith("km-") else row.name
                    found = None
                    with contextlib.suppress(kodemachine.KodeError):
                        found = fleet.get(manager.label(label))
                    if found is not None:
                        self.assertIn(found.uuid, single)
                    if row in may and label != "start":
                        self.assertEqual(found and found.uuid, row.uuid)
                opts = types.SimpleNamespace(
                    all=rng.random() < 0.5,
                    older_than=rng.choice([None, 0.0, 7200.0]),
                    image=rng.choice([None, None, "golden", "km-a", "v0.2.0", ""]),
                )
                context: Any = types.SimpleNamespace(manager=manager, out=out)
                offered, _ = kodemachine.select_for_purge(context, opts)  # type: ignore[arg-type]
                going = [row.uuid for row in may if self.goes(row, state.known.get(row.uuid, {}), opts)]
                self.assertEqual([machine.uuid for machine in offered], going)
        self.assertTrue(lines)

    def test_program_touches_only_clones_in_random_fleets(self) -> None:
        for seed in range(24):
            rng = random.Random(seed)
            rows, records, base = self.fleet(rng)
            rows = rows[:5]
            with self.utm.fake as utm:
                utm.vms.clear()
            for row in rows:
                self.utm.add(
                    row.name, uuid=row.uuid, status=row.power.value if row.power.value != "unknown" else "pausing"
                )
            self.write_state("machines.json", json.dumps(records))
            self.config(**({"base_image": base} if base else {}))
            may = {row.uuid for row in self.clones(rows, records, base)}
            before = len(self.utm.calls())
            with self.subTest(seed=seed):
                label = rng.choice(rows).name.replace("km-", "", 1) if rows else "a"
                if seed % 3 == 0:
                    self.assertNotIn("Traceback", self.km("delete", label, patience={"WARM_UP": 0.0}).err)
                filters = rng.choice([(), ("--all",), ("--older-than", "0s")])
                result = self.km("purge", "-y", *filters, patience={"WARM_UP": 0.0})
                self.assertIn(result.code, (0, 4), result.err)
                named = {
                    word for call in self.utm.calls()[before:] for word in call["argv"][1:] if not word.startswith("-")
                }
                self.assertLessEqual(named, may)
                gone = {row.uuid for row in rows} - {vm["uuid"] for vm in self.utm.machines()}
                self.assertLessEqual(gone, may)

    @staticmethod
    def origin(record: dict[str, Any]) -> tuple[str, str]:
        """The name and the UUID of the image in a record; empty if unknown."""
        image = record.get("image")
        if isinstance(image, dict):
            return image.get("name", ""), image.get("uuid", "")
        return (image, record["image_uuid"]) if isinstance(image, str) else ("", "")

    @classmethod
    def images(
        cls, rows: Sequence[kodemachine.Row], records: dict[str, dict[str, Any]], base: str | None
    ) -> list[kodemachine.Row]:
        """The specification in other words than the program's: the images, which nothing may touch."""
        bases = {
            cls.origin(record)[1]
            for record in records.values()
            if not re.fullmatch(r"kodeimage-v\d+\.\d+\.\d+", record["name"] or "")
        }
        return [
            row
            for row in rows
            if row.uuid in bases or base in (row.name, row.uuid.lower()) or row.name.startswith("kodeimage-v")
        ]

    @classmethod
    def goes(cls, row: kodemachine.Row, record: dict[str, Any], opts: Any) -> bool:
        """Whether `purge` deletes a clone."""
        created = record.get("created")
        age = kodemachine.age_of(created) if isinstance(created, str) else None
        if opts.older_than is not None and (age is None or age < opts.older_than):
            return False
        image = cls.origin(record)[0]
        if opts.image is not None and (not image or image not in (opts.image, "kodeimage-" + opts.image)):
            return False
        if row.power in (Power.STARTED, Power.PAUSED):
            return bool(opts.all or record.get("rm") or record.get("is_temporary"))
        return row.power is Power.STOPPED


# ---- images: base


class BaseTest(Case):
    """base list and base use: which images exist, and which one new machines come from."""


    def test_use_and_config_set_name_the_line_for_a_file_that_cannot_be_written(self) -> None:
        self.image()
        folder = os.path.dirname(self.config(boot_timeout=7))
        line = f'add this to it: "base_image": "{IMAGE}"'
        missing = 'add this to it: {"ssh_port": 2222}'
        for words, hint in ((("base", "use", IMAGE), line), (("config", "set", "base_image", IMAGE), line),
                            (("config", "unset", "boot_timeout"), "remove boot_timeout from it there"),
                            (("config", "set", "ssh_port", "2222"), missing)):
            if hint == missing:
                os.unlink(os.path.join(folder, "config.json"))
            with self.subTest(words):
                result = self.read_only(folder, self.command(*words))
                self.assert_says(result, 1, os.path.join(folder, "config.json"), hint)

    def test_use_sets_the_image_and_keeps_the_other_keys(self) -> None:
        path = self.config(boot_timeout=7)
        self.image("kodeimage-v0.1.0")
        uuid = self.image("Old Debian")
        for word in ("Old Debian", uuid, uuid.lower()):
            self.assert_says(self.km("base", "use", word), 0, "new machines are cloned from Old Debian")
            with open(path, encoding="utf-8") as file:
                self.assertEqual(json.load(file), {"boot_timeout": 7, "base_image": "Old Debian"})

    def test_use_refuses_what_cannot_be_cloned_and_changes_nothing(self) -> None:
        path = self.config(base_image="kodeimage-v0.1.0")
        self.image("kodeimage-v0.1.0")
        self.image("kodeimage-v0.2.0", status="started")
        twins = [self.utm.add("twin") for _ in range(2)]
        self.vm("a")
        for name, code, words in (("nosuch", 3, ["no image nosuch"]), ("kodeimage-v0.2.0", 4, ["is running"]),
                                  ("v9.9.9", 3, ["no image v9.9.9", "Images: kodeimage-v0.1.0, kodeimage-v0.2.0"]),
                                  ("km-a", 4, ["is a clone"]), ("twin", 4, twins)):
            result = self.km("base", "use", name)
            self.assert_says(result, code, *words)
            self.assertNotIn("--base", result.err)
        with open(path, encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"base_image": "kodeimage-v0.1.0"})

    def test_list_shows_the_configured_image_and_the_number_of_clones_of_each(self) -> None:
        self.documents()
        old, new = self.image("kodeimage-v0.9.0"), self.image("kodeimage-v0.10.0")
        other = self.image("Old Debian", status="started")
        for label, uuid in (("a", old), ("b", old), ("c", other)):
            self.vm(label)
            self.remember(**{label: {"image": "whatever", "image_uuid": uuid}})
        facts = json.loads(self.km("base", "list", "--json").out)
        self.assertEqual([list(fact) for fact in facts][0],
                         ["name", "uuid", "status", "size", "configured", "clones"])
        self.assertEqual({fact["uuid"]: list(fact.values())[2:] for fact in facts},
                         {old: ["stopped", None, False, 2], new: ["stopped", None, True, 0],
                          other: ["running", None, False, 1]})
        expected = [["kodeimage-v0.9.0", "stopped", "2"], ["*", "kodeimage-v0.10.0", "stopped", "0"],
                    ["Old", "Debian", "running", "1"]]
        lines = [line.split() for line in self.km("base", "list").out.splitlines()]
        self.assertEqual(lines, [["IMAGE", "STATUS", "CLONES"], *expected])
        facts = json.loads(self.km("base", "ls", "--size", "--json").out)
        self.assertEqual([fact["size"] > 65536 for fact in facts], [True] * 3)
        lines = [line.split() for line in self.km("base", "ls", "-s").out.splitlines()]
        self.assertEqual([line[:-1] for line in lines], [["IMAGE", "STATUS", "CLONES"], *expected])
        self.assertEqual(lines[0][-1], "SIZE")
        self.config(base_image="gone")
        self.assert_says(self.km("base", "list"), 0, "base_image is gone, which does not exist")

    def test_image_may_be_named_by_its_version(self) -> None:
        self.image("kodeimage-v0.1.0")
        self.image()
        self.assert_says(self.km("base", "use", "v0.1.0"), 0, "new machines are cloned from kodeimage-v0.1.0")
        self.image("kodeimage-v0.3.0", status="started")
        self.assert_says(self.km("start", "-d", "a", "--base", "v0.3.0"), 4, "the image kodeimage-v0.3.0 is running")
        self.assert_says(self.km("config", "set", "base_image", "v0.2.0"), 0)
        self.image("v1.0.0")
        self.vm("a")
        self.remember(a={"image": "kodeimage-v0.1.0", "image_uuid": "-"})
        self.assert_says(self.km("base", "use", "v1.0.0"), 0, "new machines are cloned from v1.0.0")
        self.assert_says(self.km("start", "-d", "a", "--base", "v0.3.0"), 4, "km-a was cloned from kodeimage-v0.1.0")
        self.assert_says(self.km("purge", "--image", "v0.1.0", "-n"), 0, "would delete 1 machine and")

    def test_machine_configured_by_its_uuid_is_an_image(self) -> None:
        uuid = self.utm.add("Plain")
        self.config(base_image=uuid.lower())
        result = self.km("base", "list")
        self.assertRegex(result.out, r"(?m)^\*  Plain +stopped")
        self.assertNotIn("does not exist", result.err)
        self.assert_says(self.km("base", "seal", "Plain", "-y"), 4, "Plain is an image")

    def test_list_without_images_names_the_command_that_creates_one(self) -> None:
        self.vm("a")
        self.assertEqual(self.km("base", "list", "--json").out, "[]\n")
        self.assert_says(self.km("base", "list"), 0, "kodemachine base create v0.1.0")


class SealTest(Case):
    """base seal: a machine becomes an image."""

    PINNED = {
        "etc/netplan/50-cloud-init.yaml": "network:\n  ethernets:\n    eth0:\n      match: {macaddress: 'a'}\n",
        "etc/systemd/network/10-a.network": "[Match]\nPermanentMACAddress=52:54:00:00:00:01\n[Network]\nDHCP=yes\n",
        "etc/systemd/network/11-b.network": "[Match]\nName=enp0s1\n[Network]\nAddress=10.0.0.1/24\n",
        "etc/systemd/network/10-c.link": "[Match]\nMACAddress=52:54:00:00:00:01\n[Link]\nName=lan\n",
        "etc/udev/rules.d/70-persistent-net.rules": 'SUBSYSTEM=="net"\n',
    }
    FREE = {
        "etc/netplan/90-any.yaml": "network:\n  ethernets:\n    any:\n      match:\n        name: 'e*'\n",
        "etc/systemd/network/80-any.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n",
    }
    LITTER = {
        "root/.bash_history": "secret\n", "home/me/.python_history": "x\n", "var/cache/apt/archives/a.deb": "deb",
        "var/lib/NetworkManager/a.lease": "x", "var/log/syslog": "x\n", "var/log/syslog.1": "x\n",
        "var/log/journal/0/system.journal": "x", "var/lib/systemd/random-seed": "x",
        "etc/ssh/ssh_host_rsa_key": "x",
    }
    PROFILE = "[connection]\nid=Wired\ninterface-name=enp0s1\n\n[ethernet]\nmac-address=52:54:00:00:00:01\n"
    REPAIRED = ["user", "key", "console", "network", "cloud", "newkeys", "dbus"]

    def setUp(self) -> None:
        super().setUp()
        self.image()
        self.config(ssh_user="me")
        self.put(self.home, {".ssh/id_ed25519.pub": PUBLIC_KEY + " me@mac\n"})
        self.uuid = self.vm("alpha", "started")
        self.root = self.utm.guest("km-alpha")
        self.litter()

    def litter(self) -> None:
        """Gives the guest files that must not be in an image."""
        self.put(self.root, {**self.PINNED, **self.FREE, **self.LITTER, "etc/cloud/cloud.cfg": "x",
                             "var/lib/dbus/machine-id": "0123456789abcdef0123456789abcdef\n", "root/.netrc": "x",
                             "etc/NetworkManager/system-connections/Wired connection 1.nmconnection": self.PROFILE})
        with self.utm.fake as utm:
            Guest(utm, self.uuid).give_away(self.root)
        self.guest_uid = os.stat(self.root).st_uid

    def put(self, folder: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            self.write(os.path.join(folder, name), text)

    def guest_file(self, name: str) -> str:
        return self.read(os.path.join(self.root, name))

    def there(self, *names: str) -> list[str]:
        return [name for name in names if os.path.exists(os.path.join(self.root, name))]

    def step_statuses(self, text: str) -> dict[str, str]:
        """The status of each step in a table."""
        return dict(re.findall(r"(?m)^([a-z]+) +(ok|would|done|bad|warn)\b", text))

    def seal(self, *args: str, code: int = 0) -> Result:
        result = self.km("base", "seal", *(args or ("alpha", "-y")))
        self.assertEqual(result.code, code, result.err)
        return result

    def assert_sealed(self) -> None:
        self.assertEqual(self.states()["km-alpha"], "stopped")
        self.assertEqual(self.guest_file("etc/machine-id"), "")
        self.assertEqual(os.readlink(os.path.join(self.root, "var/lib/dbus/machine-id")), self.root + "/etc/machine-id")
        self.assertEqual([name for name in os.listdir(self.root + "/etc/ssh") if name.startswith("ssh_host")], [])
        self.assertEqual(self.there(*(set(self.LITTER) - {"var/log/syslog"}), *self.PINNED), [])
        self.assertEqual(self.guest_file("var/log/syslog"), "")
        self.assertEqual(sorted(self.there(*(name + ".before-kodemachine" for name in self.PINNED))),
                         sorted(name + ".before-kodemachine" for name in self.PINNED))
        for name, text in self.FREE.items():
            self.assertEqual(self.guest_file(name), text)
        self.assertIn('match: {name: "e*"}', self.guest_file("etc/netplan/60-kodemachine.yaml"))
        self.assertIn("Name=en* eth*\n", self.guest_file("etc/systemd/network/60-kodemachine.network"))
        self.assertEqual(self.guest_file("etc/NetworkManager/system-connections/Wired connection 1.nmconnection"),
                         "[connection]\nid=Wired\n\n[ethernet]\n")
        self.assertEqual(self.guest_file("home/me/.ssh/authorized_keys"), PUBLIC_KEY + " me@mac\n")
        port = "ttyAMA0" if os.uname().machine in ("aarch64", "arm64") else "ttyS0"
        self.assertLessEqual({f"serial-getty@{port}.service", "kodemachine-hostkeys.service"},
                             set(self.guest_file("etc/systemd/enabled").split()))
        self.assertEqual(self.there("etc/cloud/cloud-init.disabled"), ["etc/cloud/cloud-init.disabled"])

    def test_check_option_shows_the_changes_and_makes_none(self) -> None:
        def everything() -> dict[str, tuple[int, int]]:
            # The stub of `sync` leaves a mark.
            paths = [os.path.join(top, name) for top, _, names in os.walk(self.root) for name in names
                     if name != "synced"]
            return {path: (os.lstat(path).st_ino, os.lstat(path).st_mtime_ns) for path in paths}
        before = everything()
        status = self.step_statuses(self.seal("alpha", "--check").out)
        self.assertEqual({name for name in status if status[name] == "would"},
                         {*self.REPAIRED, "histories", "packages", "leases", "logs", "seed", "hostkeys", "machineid"})
        self.assertEqual({name for name in status if status[name] == "warn"}, {"sudo", "secrets"})
        self.assertEqual(everything(), before)
        self.assertEqual(self.states()["km-alpha"], "started")


    def test_yes_option_answers_every_question(self) -> None:
        terminal = self.km_tty("base", "seal", "alpha", "-y")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertEqual(self.there("etc/sudoers.d/90-kodemachine"), [])


    def test_seal_repairs_cleans_and_stops_and_again_has_nothing_to_repair(self) -> None:
        self.remember(alpha={"is_named": True, "machine_id": "x"})
        self.write_state("known_hosts", f"km-alpha {host_key()}\n")
        first = self.seal()
        self.assert_sealed()
        self.assertLessEqual(set(self.REPAIRED), {name for name, status in self.step_statuses(first.err).items()
                                                  if status == "done"})
        self.assertIn("/root/.netrc would be in every clone", first.err)
        self.assertEqual(self.record("alpha"), {"name": "km-alpha"})
        self.assertEqual(self.read_state("known_hosts"), "")
        # The machine is off, so it is started first.
        second = self.seal()
        self.assertIn("starting km-alpha", second.err)
        done = re.findall(r"(?m)^([a-z]+) +done", second.err)
        self.assertEqual(done, ["trim"])
        self.assert_sealed()

    def test_correct_settings_are_not_changed(self) -> None:
        key = PUBLIC_KEY + " elsewhere"
        self.put(self.root, {"home/me/.ssh/authorized_keys": f"# {PUBLIC_KEY[:30]}\nssh-rsa AAAA other\n{key}",
                             "etc/passwd": f"me:*:{self.guest_uid}:1000::{self.root}/home/me:/bin/bash\n",
                             "etc/sudoers.d/me": "me ALL=(ALL) NOPASSWD: ALL\n"})
        status = self.step_statuses(self.seal("alpha", "--check").out)
        self.assertEqual([status[name] for name in ("agent", "ssh", "user", "key", "sudo")], ["ok"] * 5)

    def unit_command(self) -> list[str]:
        """Starts the sealed machine again. Returns the command line of the service that makes its host keys."""
        unit = self.guest_file("etc/systemd/system/kodemachine-hostkeys.service")
        self.assertRegex(unit, "Before=ssh.service sshd.service\n")
        line = re.search(r"(?ms)^ExecStart=(.*?[^\\])$", unit)
        assert line
        self.utm.change("km-alpha", status="started", up_at=0.0)
        return shlex.split(line[1].replace("\\\n", " ").replace("$$", "$").replace(self.root, ""))

    def test_unit_keeps_the_host_key_that_another_service_makes_meanwhile(self) -> None:
        self.seal()
        words = self.unit_command()
        program = os.path.join(self.root, "bin/ssh-keygen")
        key = os.path.join(self.root, "etc/ssh/ssh_host_ed25519_key")
        real = shutil.which("ssh-keygen")
        os.unlink(program)
        self.write(program, f"#!/bin/sh\necho theirs >{key}\necho theirs >{key}.pub\nexec {real} \"$@\"\n", 0o755)
        result = self.utmctl("exec", "km-alpha", "--cmd", *words)
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertEqual(sorted(os.listdir(os.path.dirname(key))).count("ssh_host_ed25519_key.new"), 0)
        self.assertEqual((read_text(key), read_text(key + ".pub")), ("theirs\n", "theirs\n"))

    def test_unit_makes_new_host_keys_before_sshd_starts(self) -> None:
        self.seal()
        words = self.unit_command()
        for _ in range(2):
            result = self.utmctl("exec", "km-alpha", "--cmd", *words)
            self.assertEqual((result.code, result.err), (0, ""))
            public = self.guest_file("etc/ssh/ssh_host_ed25519_key.pub")
        self.assertEqual(len(parse_host_keys([public])), 1)
        self.assertEqual(self.guest_file("etc/ssh/ssh_host_ed25519_key.pub"), public)

    def test_without_a_terminal_and_y_utm_is_not_called(self) -> None:
        self.assert_says(self.seal("alpha", code=2), 2, "needs a yes", "-y")
        self.assertEqual(self.utm.verbs(), [])

    def test_person_is_asked_twice_and_may_say_no(self) -> None:
        terminal = self.km_tty("base", "seal", "alpha")
        terminal.expect(b"Seal km-alpha and shut it down\\? \\[y/N\\] ")
        terminal.send(b"n\n")
        self.assertEqual(terminal.wait(), 1)
        self.assertEqual(self.there("etc/cloud/cloud-init.disabled"), [])
        for answer in (b"n\n", b"y\n"):
            terminal = self.km_tty("base", "seal", "alpha")
            terminal.expect(b"shut it down\\? \\[y/N\\] ")
            terminal.send(b"y\n")
            terminal.expect(b"May me become root without a password\\? \\[y/N\\] ")
            terminal.send(answer)
            self.assertEqual(terminal.wait(), 0, terminal.seen)
            self.assertEqual(bool(self.there("etc/sudoers.d/90-kodemachine")), answer == b"y\n")
        self.assertEqual(self.guest_file("etc/sudoers.d/90-kodemachine"), "me ALL=(ALL) NOPASSWD: ALL\n")

    def test_as_copies_the_machine_which_stays_a_clone(self) -> None:
        self.assert_says(self.seal("km-alpha", "-y", "--as", "v0.3.0"), 0, "kodeimage-v0.3.0 is ready")
        self.assertEqual(self.states(), {IMAGE: "stopped", "km-alpha": "stopped", "kodeimage-v0.3.0": "stopped"})
        image = self.utm.machine("kodeimage-v0.3.0")
        self.assertEqual(self.records()[image["uuid"]]["image_uuid"], self.uuid)
        self.assertEqual(list(self.listed()), ["km-alpha"])
        self.seal()

    def test_check_does_not_complete_an_interrupted_copy(self) -> None:
        self.utm.fault("clone", kill_parent="before", delay=0.1)
        self.km("base", "seal", "alpha", "-y", "--as", "v0.3.0")
        self.utm.clear_faults()
        self.utm.change("km-alpha", status="started", up_at=0.0)
        before = self.records()
        result = self.seal("alpha", "--check", "--as", "v0.3.0")
        self.assertEqual((self.step_statuses(result.out)["agent"], self.records()), ("ok", before))

    def test_user_name_may_end_in_a_hyphen(self) -> None:
        self.config(ssh_user="x-")
        self.assertEqual(self.step_statuses(self.seal("alpha", "--check").out)["user"], "would")

    def test_machines_that_may_not_be_sealed(self) -> None:
        self.utm.add("alpha")
        self.utm.add("plain", status="started")
        other = self.image("kodeimage-custom")
        self.vm("paused", "paused")
        self.vm("off")
        for words, code, said in (
            ("alpha", 4, [self.uuid, self.utm.machine("alpha")["uuid"]]), (IMAGE, 4, ["is an image"]),
            (other, 4, ["is an image"]), ("nosuch", 3, ["no machine nosuch"]),
            ("plain --as 0.3.0", 2, ["is not a version"]),
            (f"plain --as {IMAGE[10:]}", 4, [f"a machine {IMAGE} already"]),
            ("paused --check", 4, ["km-paused is paused; --check needs a running machine"]),
            ("km-off --check", 4, ["km-off is stopped; --check needs a running machine"]),
        ):  # fmt: skip
            with self.subTest(words):
                self.assert_says(self.seal(*words.split(), "-y", code=code), code, *said)
        self.config(ssh_user="me", base_image="plain")
        self.assert_says(self.seal("plain", "-y", code=4), 4, "plain is an image")
        self.assertEqual(set(self.utm.verbs()), {"list"})

    def test_public_key_of_the_person_is_needed(self) -> None:
        self.config(ssh_user="me", identity_file="~/.ssh/work")
        self.assert_says(self.seal("alpha", "-y", code=1), 1, "there is no ssh public key at ", ".ssh/work.pub\n")
        self.put(self.home, {".ssh/work.pub": "ssh-ed25519 AAAAwork\n"})
        self.seal()
        self.assertEqual(self.guest_file("home/me/.ssh/authorized_keys"), "ssh-ed25519 AAAAwork\n")

    def run_script(self, script: str, mode: str) -> str:
        """Runs a script with the arguments of SEAL; its output without the guest's folder."""
        words = ["/bin/sh", "-c", script, "kodemachine", mode, "me", PUBLIC_KEY + " me@mac", ""]
        with self.utm.fake as utm:
            process = Guest(utm, self.uuid).run(words, [], subprocess.DEVNULL, subprocess.PIPE, subprocess.DEVNULL)
        return str(process.communicate()[0].decode().replace(self.root, ""))

    def steps_of(self, mode: str = "check") -> dict[str, str]:
        """The details of each step that is not ok, one per line."""
        out = self.run_script(kodemachine.SEAL, mode)
        self.assertTrue(out.endswith("end\n"), out)
        found: dict[str, str] = {}
        for name, detail in re.findall(r"(?m)^step ([a-z]+) (?:would|bad|warn) (.*)$", out):
            found[name] = (found.get(name, "") + "\n" + detail).lstrip()
        return found

    def give_away(self) -> None:
        """Makes the guest's processes the owner of its files."""
        with self.utm.fake as utm:
            Guest(utm, self.uuid).give_away(self.root)

    def add_user(self, line: str = PUBLIC_KEY + "\n") -> None:
        """Adds the user, with that line in authorized_keys."""
        self.put(self.root, {"etc/passwd": f"me:*:{self.guest_uid}:1000::{self.root}/home/me:/bin/bash\n",
                             "home/me/.ssh/authorized_keys": line})
        self.give_away()

    def sshd_config(self, text: str) -> None:
        self.put(self.root, {"etc/ssh/sshd_config": text})

    def test_table_after_a_seal_says_what_was_done(self) -> None:
        said = self.seal().err.replace(self.root, "").partition("sealing")[2]
        for text in ("user done add the user me", "newkeys done make new host keys at boot",
                     "machineid done empty /etc/machine-id", "seed done remove /var/lib/systemd/random-seed"):
            self.assertIn(text, [" ".join(line.split()) for line in said.splitlines()])

    def test_host_keys_elsewhere_are_removed_and_made_again_at_boot(self) -> None:
        keys = os.path.join(self.root, "var/lib/ssh keys")
        os.mkdir(keys)
        real = self.write(os.path.join(self.root, "srv/key"), "private\n")
        os.symlink(real, os.path.join(keys, "linked_rsa"))
        for name in ("host", "host.pub", "linked_rsa.pub", "host-cert.pub"):
            self.write(os.path.join(keys, name), "x\n", 0o600)
        included = self.write(os.path.join(self.root, "etc/ssh/sshd_config.d/a.conf"),
                              f'HostKey "{keys}/host"\nHostKey "{keys}/linked_rsa"\n'
                              f'HostCertificate "{keys}/host-cert.pub"\n')
        self.sshd_config(f"Include {included}\n")
        self.give_away()
        self.seal()
        self.assertEqual((os.listdir(keys), os.path.exists(real)), ([], False))
        words = self.unit_command()
        for _ in range(2):
            result = self.utmctl("exec", "km-alpha", "--cmd", *words)
            self.assertEqual((result.code, result.err), (0, ""))
            public = {name: self.read(os.path.join(keys, name + ".pub")).split()[0] for name in ("host", "linked_rsa")}
        self.assertEqual(public, {"host": "ssh-ed25519", "linked_rsa": "ssh-rsa"})
        self.assertEqual(sorted(os.listdir(keys)), ["host", "host.pub", "linked_rsa", "linked_rsa.pub"])

    def test_configuration_that_sshd_rejects_is_an_error(self) -> None:
        self.sshd_config("Port twentytwo\n")
        self.assertIn("sshd rejects its configuration: ", self.steps_of()["server"])

    def test_key_is_added_where_sshd_looks_for_it(self) -> None:
        self.add_user()
        self.assertNotIn("key", self.steps_of())
        for text, place in (
            ("AuthorizedKeysFile .ssh/keys2 .ssh/authorized_keys3\n", "home/me/.ssh/keys2"),
            ("AuthorizedKeysFile %h/.config/keys/%u\n", "home/me/.config/keys/me"),
            (f"StrictModes no\nMatch User me\n  AuthorizedKeysFile {self.root}/etc/keys/%U-%u\n",
             f"etc/keys/{self.guest_uid}-me"),
        ):
            with self.subTest(text):
                self.sshd_config(text)
                self.assertEqual(self.steps_of()["key"], "let me log in with your ssh key")
                self.assertNotIn("key", self.steps_of("apply"))
                self.assertEqual(self.guest_file(place), PUBLIC_KEY + " me@mac\n")
                self.assertNotIn("key", self.steps_of())
        shared = os.path.join(self.root, "etc/shared_keys")
        self.write(shared, "ssh-ed25519 AAAAtheirs them\n", 0o666)
        self.sshd_config(f"StrictModes no\nAuthorizedKeysFile {self.root}/etc/shared_keys\n")
        self.assertNotIn("key", self.steps_of("apply"))
        self.assertEqual(self.read(shared), f"{PUBLIC_KEY} me@mac\nssh-ed25519 AAAAtheirs them\n")
        self.assertEqual(stat.S_IMODE(os.stat(shared).st_mode), 0o666)
        for text in ("AuthorizedKeysFile none\n", "AuthorizedKeysCommand /bin/true\nAuthorizedKeysCommandUser root\n"
                     "AuthorizedKeysFile none\n"):
            self.sshd_config(text)
            self.assertIn("your ssh key: sshd reads no file with keys: ", self.steps_of("apply")["key"])

    def test_key_with_options_that_keep_the_person_out_gets_a_line_without_them(self) -> None:
        for options in ('command="echo no"', 'no-pty,from="10.0.0.0/8"', 'expiry-time="20200101"', "cert-authority"):
            with self.subTest(options):
                self.add_user(f"# mine\n{options} {PUBLIC_KEY} me\n")
                self.assertEqual(self.steps_of()["key"],
                                 f"let me log in with your ssh key, without these options: {options}")
        self.assertNotIn("key", self.steps_of("apply"))
        self.assertEqual(self.guest_file("home/me/.ssh/authorized_keys"),
                         f"{PUBLIC_KEY} me@mac\n# mine\ncert-authority {PUBLIC_KEY} me\n")
        self.add_user(f'no-port-forwarding,environment="A=b" {PUBLIC_KEY} me\n')
        self.assertNotIn("key", self.steps_of())

    def test_owners_and_modes_that_sshd_rejects_are_repaired(self) -> None:
        self.add_user()
        for name, mode in (("home/me", 0o775), ("home/me/.ssh", 0o777), ("home/me/.ssh/authorized_keys", 0o660)):
            os.chmod(os.path.join(self.root, name), mode)
            self.assertEqual(self.steps_of()["key"], f"fix the owner or the mode of /{name}")
            self.assertNotIn("key", self.steps_of("apply"))
        os.chmod(os.path.join(self.root, "home/me"), 0o775)
        self.sshd_config("StrictModes no\n")
        self.assertNotIn("key", self.steps_of())

    def refusals(self) -> str:
        """What the step `login` finds."""
        definitions = kodemachine.SEAL.partition("for name in systemd")[0]
        return self.run_script(definitions + "find_login", "check").strip()

    def test_account_that_cannot_log_in_is_an_error(self) -> None:
        self.add_user()
        self.put(self.root, {"etc/group": "users:x:100:other,me\nops:x:101:other\n"})
        sshd = "sshd does not let me in: see {} in its configuration"
        for text, option in (
            ("PubkeyAuthentication no\n", "PubkeyAuthentication"),
            ("Match User m?\n PubkeyAuthentication no\n", "PubkeyAuthentication"),
            ("AuthenticationMethods publickey,password\n", "AuthenticationMethods"),
            ("AllowUsers bob me2\n", "AllowUsers"), ("DenyUsers m*\n", "DenyUsers"),
            ("ForceCommand echo no\n", "ForceCommand"), ("ChrootDirectory /var/empty\n", "ChrootDirectory"),
            ("PermitTTY no\n", "PermitTTY"), ("PubkeyAcceptedAlgorithms rsa-sha2-512\n", "PubkeyAcceptedAlgorithms"),
            ("AllowGroups ops\n", "AllowGroups"), ("DenyGroups u*\n", "DenyGroups"),
        ):
            with self.subTest(text):
                self.sshd_config(text)
                self.assertEqual(self.refusals(), sshd.format(option))
        self.assert_says(self.seal(code=1), 1, "km-alpha cannot be sealed: login (sshd does not let me in: see DenyG")
        self.sshd_config("AllowUsers bob me@192.168.*\nAllowGroups users\nDenyUsers root me@10.9.* *@203.0.113.7\n"
                         "DenyGroups ops\n"
                         "AuthenticationMethods publickey,password publickey\nUsePAM no\n")
        self.assertEqual(self.refusals(), "")
        self.put(self.root, {"etc/shadow": "me:!:19000:0:99999:7:::\n"})
        self.assertIn("without PAM, sshd takes an account for locked", self.refusals())
        self.sshd_config("UsePAM yes\n")
        self.assertEqual(self.refusals(), "")
        for fields, what in (("*:19000:0:99999:7::1:", "account"), ("*:0:0:99999:7:::", "password"),
                             ("*:19000:0:90:7:::", "password")):
            self.put(self.root, {"etc/shadow": f"me:{fields}\n"})
            self.assertEqual(self.refusals(), f"the {what} has expired: see chage -l me")
        os.unlink(os.path.join(self.root, "etc/shadow"))
        passwd = self.guest_file("etc/passwd")
        self.put(self.root, {"etc/passwd": passwd.replace("/bin/bash", "/bin/false"), "etc/nologin": ""})
        self.assertEqual(self.refusals(), "only root can log in: there is /etc/nologin\n"
                         "the shell of me, /bin/false, runs no commands")

    HISTORIES = (
        ".bash_history", ".zsh_history", ".histfile", ".zhistory", ".local/share/fish/fish_history", ".python_history",
        ".local/state/python_history", ".psql_history", ".mysql_history", ".sqlite_history", ".rediscli_history",
        ".node_repl_history", ".lesshst", ".local/state/lesshst", ".viminfo", ".vim/viminfo", ".wget-hsts", ".Rhistory",
        ".local/share/nvim/shada/main.shada", ".local/state/nvim/shada/main.shada", ".local/share/nano/search_history",
        ".ipython/profile_default/history.sqlite", ".config/zsh/.zsh_history", ".local/share/atuin/history.db",
    )

    def test_histories_are_removed_wherever_programs_keep_them(self) -> None:
        homes = ("root", "home/me", "home/deleted", "var/lib/postgresql")
        self.put(self.root, {f"{home}/{name}": "secret\n" for home in homes for name in self.HISTORIES})
        kept = {"home/me/.oh-my-zsh/lib/history.zsh": "x", "home/me/src/history": "x", "home/me/.bashrc": "x",
                "home/me/.dotfiles/.git/refs/heads/history": "x"}
        self.put(self.root, {**kept, "etc/passwd": f"postgres:x:70:70::{self.root}/var/lib/postgresql:/bin/sh\n"
                             f"daemon:*:1:1::/:/bin/false\nroot:x:0:0::{self.root}/root:/bin/sh\n"})
        # Links in place of folders.
        os.makedirs(os.path.join(self.root, "srv"), exist_ok=True)
        for name in ("root", "var/log"):
            os.rename(os.path.join(self.root, name), os.path.join(self.root, "srv", os.path.basename(name)))
            os.symlink(os.path.join(self.root, "srv", os.path.basename(name)), os.path.join(self.root, name))
        self.give_away()
        self.assertNotIn("histories", self.steps_of("apply"))
        self.assertEqual(self.there(*(f"{home}/{name}" for home in homes for name in self.HISTORIES)), [])
        self.assertEqual(self.there(*kept), list(kept))
        self.assertEqual(self.guest_file("srv/log/syslog"), "")

    TIED = {
        "etc/sysconfig/network-scripts/ifcfg-eth0": ("DEVICE=eth0\nHWADDR=52:54:00:00:00:01\nONBOOT=yes\n",
                                                     "DEVICE=eth0\nONBOOT=yes\n"),
        "etc/sysconfig/network-scripts/ifcfg-x": ('DEVICE="ens3"\nMACADDR=52:54:00:00:00:01\nBOOT=yes\n', "BOOT=yes\n"),
        "etc/network/interfaces": ("iface a inet dhcp\n    hwaddress ether 52:54:00:00:00:01\n", "iface a inet dhcp\n"),
        "etc/network/interfaces.d/a": ("iface b inet dhcp\n\thwaddress 52:54:00:00:00:01\n", "iface b inet dhcp\n"),
        "etc/NetworkManager/system-connections/a.nmconnection": (
            "[ethernet]\ncloned-mac-address=52:54:00:00:00:01\n[ipv4]\ndhcp-client-id=01:52:54\nmethod=auto\n",
            "[ethernet]\n[ipv4]\nmethod=auto\n"),
        "etc/NetworkManager/conf.d/a.conf": ("[a]\nethernet.cloned-mac-address=52:54:00:00:00:01\n", "[a]\n"),
        "etc/dhcp/dhclient.conf": ('send dhcp-client-identifier "web";\nsend host-name = gethostname();\n',
                                   "send host-name = gethostname();\n"),
        "etc/dhcpcd.conf": ("hostname\nclientid 01:52:54:00:00:00:01\n", "hostname\n"),
        "etc/systemd/networkd.conf": ("[DHCPv4]\nDUIDRawData=00:00:ab:11\n", "[DHCPv4]\n"),
    }
    UNTIED = {
        "etc/network/interfaces.d/b": "iface eth0 inet dhcp\n",
        "etc/NetworkManager/conf.d/b.conf": "[connection]\nethernet.cloned-mac-address=stable\n",
        "etc/NetworkManager/system-connections/b.nmconnection": "mac-address-denylist=\n[ipv4]\ndhcp-client-id=mac\n",
        "etc/dhcp/dhclient6.conf": "#send dhcp-client-identifier 1:0:a0;\nsend dhcp-client-identifier = hardware;\n",
        "etc/udev/rules.d/60-other.rules": 'ACTION=="add", ATTR{address}=="52:54:00:00:00:01", TAG+="x"\n',
    }

    def test_network_settings_of_every_kind_are_untied_from_the_card(self) -> None:
        rules = {"etc/udev/rules.d/10-net.rules": 'ATTR{address}=="52:54:00:00:00:01", NAME="lan0"\n'}
        for name in self.PINNED:
            os.unlink(os.path.join(self.root, name))
        self.put(self.root, {**{name: before for name, (before, _) in self.TIED.items()}, **self.UNTIED, **rules})
        self.give_away()
        self.assertNotIn("network", self.steps_of("apply"))
        self.assertEqual({name: self.guest_file(name) for name in self.TIED},
                         {name: after for name, (_, after) in self.TIED.items()})
        self.assertEqual({name: self.guest_file(name) for name in self.UNTIED}, self.UNTIED)
        self.assertEqual(self.there(*rules), [])
        self.assertNotIn("network", self.steps_of())

    def test_secrets_and_identities_of_nodes_are_all_named_and_stay(self) -> None:
        key = "-----BEGIN EC PRIVATE KEY-----\n"
        secrets = {"home/me/.ssh/id_work": key, "etc/salt/pki/minion/minion.pem": key, "root/.netrc": "x",
                   "etc/wireguard/wg0.conf": "[Interface]\nPrivateKey = x\n"}
        nodes = {"var/lib/tailscale/tailscaled.state": "x", "var/lib/zerotier-one/identity.secret": "x",
                 "etc/rancher/node/password": "x", "etc/salt/pki/minion/minion.pem": key,
                 "home/me/.local/state/syncthing/key.pem": "x", "var/lib/docker/swarm/certificates/swarm-node.key": "x"}
        self.put(self.root, {**secrets, **nodes})
        self.sshd_config("HostKeyAgent /run/agent.sock\n")
        self.give_away()
        found = self.steps_of()
        for name in secrets:
            self.assertIn(f"/{name} would be in every clone", found["secrets"])
        self.assertIn("every clone would have the host keys of the ssh agent /run/agent.sock", found["secrets"])
        for name in nodes:
            self.assertIn("/" + name.replace("/swarm-node.key", "") + " would identify every clone", found["nodes"])
        self.steps_of("apply")
        self.assertEqual(len(self.there(*secrets, *nodes)), len(secrets) + len(nodes))

    def start_agent(self) -> tuple[str, str]:
        """A real ssh agent with a key that is in no file; its socket and the public key."""
        folder = tempfile.mkdtemp(prefix="km-")
        self.addCleanup(shutil.rmtree, folder)
        path, key = os.path.join(folder, "agent"), os.path.join(folder, "key")
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.terminate)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "in the vault", "-f", key], check=True)
        wait_for(lambda: os.path.exists(path))
        subprocess.run(["ssh-add", "-q", key], env={**os.environ, "SSH_AUTH_SOCK": path}, check=True)
        os.unlink(key)
        return path, self.read(key + ".pub")

    def test_key_of_the_agent_is_used_if_there_is_no_file(self) -> None:
        path, key = self.start_agent()
        self.assertEqual(self.km("base", "seal", "alpha", "--check", env={"SSH_AUTH_SOCK": path}).code, 0)
        os.unlink(os.path.join(self.home, ".ssh/id_ed25519.pub"))
        self.assert_says(self.seal(code=1), 1, "there is no ssh public key at ", ", nor in an ssh agent")
        self.ssh_options("Host *\n  IdentityAgent none\n")
        result = self.km("base", "seal", "alpha", "--check", env={"SSH_AUTH_SOCK": path})
        self.assert_says(result, 1, ", nor in an ssh agent")
        self.write(self.ssh_config, "")
        # As 1Password has it set.
        self.ssh_options(f'Host *\n  IdentityAgent "{path}"\n')
        self.seal()
        self.assertEqual(self.guest_file("home/me/.ssh/authorized_keys"), key)
        self.config(ssh_user="me", identity_file="~/.ssh/work")
        self.assert_says(self.seal(code=1), 1, "there is no ssh public key at ", ".ssh/work.pub\n")

    def test_failed_step_is_named_and_the_later_ones_are_not_done(self) -> None:
        self.put(self.root, {"bin/useradd": "#!/bin/sh\necho useradd: no space >&2; exit 1\n"})
        self.assert_says(self.seal(code=1), 1, "user (add the user me: useradd: no space)")
        self.assertEqual((self.there("etc/cloud/cloud-init.disabled"), self.states()["km-alpha"]), ([], "started"))

    def test_next_run_completes_an_interrupted_seal(self) -> None:
        for name in ("fix_network", "fix_newkeys", "fix_hostkeys"):
            with self.subTest(name):
                shutil.rmtree(self.root)
                self.utm.guest("km-alpha")
                self.litter()
                self.utm.change("km-alpha", status="started", up_at=0.0)
                script = kodemachine.SEAL.replace(name + "() {", name + "() { kill -9 $$;")
                self.assertNotEqual(script, kodemachine.SEAL)
                result = self.run_program(self.command("base", "seal", "alpha", "-y", patience={"SEAL": script}))
                self.assert_says(result, 1, "sealing km-alpha was interrupted after step ", "run the command again")
                self.seal()
                self.assert_sealed()

    def test_seal_is_proved_before_the_machine_is_powered_off(self) -> None:
        script = kodemachine.SEAL.replace("for name in hostkeys machineid",
                                          '[ "$mode" = apply ] || for name in hostkeys machineid')
        self.assertNotEqual(script, kodemachine.SEAL)
        result = self.run_program(self.command("base", "seal", "alpha", "-y", patience={"SEAL": script}))
        self.assert_says(result, 1, "km-alpha cannot be sealed: hostkeys (", "run the command again")
        self.assertEqual(self.states()["km-alpha"], "started")
        self.seal()
        self.assert_sealed()

    def test_interrupted_copy_is_completed_and_not_made_twice(self) -> None:
        self.utm.fault("clone", kill_parent="before", delay=0.3)
        self.km("base", "seal", "alpha", "-y", "--as", "v0.3.0")
        self.utm.clear_faults()
        self.assert_says(self.seal("alpha", "-y", "--as", "v0.3.0"), 0, "kodeimage-v0.3.0 is ready")
        self.assertEqual(len(self.utm.machines()), 3)
        # The machine was sealed once.
        self.assertEqual(len(self.utm.calls("exec", "osascript")), 4)
        self.assert_says(self.seal("alpha", "-y", "--as", "v0.3.0", code=4), 4, "already")

    def test_guest_without_an_agent_is_an_error_after_boot_timeout(self) -> None:
        self.config(ssh_user="me", boot_timeout=0.5)
        self.utm.change("km-alpha", agent_after=None)
        self.assert_says(self.seal(code=6), 6, "agent of km-alpha does not answer", "not running or not installed")


def empty_qcow2(size: int) -> bytes:
    """An empty image of version 3: header, refcount table, one refcount block, L1 table."""
    cluster = 65536
    entries = -(-size // (cluster * cluster // 8))
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, size, 0, entries, 3 * cluster, cluster, 1,
                         0, 0, 0, 0, 0, 4, 104) + bytes(8)
    parts = (header, struct.pack(">Q", 2 * cluster), struct.pack(">HHHH", 1, 1, 1, 1), b"")
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


class Qcow2Test(unittest.TestCase):
    """base create: growing a disk image in place, verified by qemu-img."""

    def setUp(self) -> None:
        if not shutil.which("qemu-img"):
            self.skipTest("no qemu-img here")
        folder = tempfile.mkdtemp(prefix="kodemachine-test-")
        self.addCleanup(shutil.rmtree, folder)
        self.path = os.path.join(folder, "disk.qcow2")

    def qemu_img(self, *words: str) -> str:
        return subprocess.run(["qemu-img", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=True).stdout.decode()

    def make(self, options: str, compressed: bool) -> None:
        """Makes an image of 5 MiB with some data, and a raw file with the same content beside it."""
        data = b"".join(os.urandom(4096) + bytes(200000) + b"text " * 5000 for _ in range(20))
        data = data.ljust(5 << 20, b"\0")
        with open(self.path + ".raw", "wb") as file:
            file.write(data)
        self.qemu_img("convert", "-f", "raw", "-O", "qcow2", *["-c"] * compressed, "-o", options, self.path + ".raw",
                      self.path)


    def fill_rest_of_table(self) -> None:
        """Writes garbage after the last entry of the L1 table, where its last cluster has room for more."""
        with open(self.path, "r+b") as file:
            image = kodemachine.parse_qcow2(file.read(104))
            file.seek(image.l1_offset + image.l1_size * 8)
            file.write(b"\xff" * (image.l1_room - image.l1_size) * 8)

    def test_image_of_every_kind_stays_valid_and_keeps_its_content(self) -> None:
        for compat, bits, compressed in itertools.product(("0.10", "1.1"), (14, 16, 21), (False, True)):
            with self.subTest(compat=compat, bits=bits, compressed=compressed):
                self.make(f"compat={compat},cluster_size={1 << bits}", compressed)
                self.fill_rest_of_table()
                size = 3 << 30
                kodemachine.grow_qcow2(self.path, size)
                self.assertIn("No errors were found", self.qemu_img("check", self.path))
                self.assertEqual(json.loads(self.qemu_img("info", "--output=json", self.path))["virtual-size"], size)
                with open(self.path + ".raw", "r+b") as file:
                    file.truncate(size)
                self.assertIn("identical", self.qemu_img("compare", "-f", "raw", "-F", "qcow2", self.path + ".raw",
                                                         self.path))
                # There is nothing to do.
                kodemachine.grow_qcow2(self.path, size)

    def test_zstd_image_grows_too(self) -> None:
        try:
            self.make("compat=1.1,compression_type=zstd", True)
        except subprocess.CalledProcessError:
            self.skipTest("this qemu-img has no zstd")
        kodemachine.grow_qcow2(self.path, 1 << 30)
        self.assertIn("No errors were found", self.qemu_img("check", self.path))

    def test_unusual_image_is_refused_and_not_changed(self) -> None:
        def header(offset: int, value: bytes) -> None:
            with open(self.path, "r+b") as file:
                file.seek(offset)
                file.write(value)
        self.make("compat=1.1", False)
        shutil.copy(self.path, self.path + ".other")
        cases: dict[str, Callable[[], Any]] = {
            "snapshots": lambda: self.qemu_img("snapshot", "-c", "one", self.path),
            "not closed properly": lambda: header(79, b"\1"),
            "not closed": lambda: header(79, b"\2"),
            "encrypted": lambda: header(35, b"\1"),
            "another file": lambda: header(79, b"\4"),
            "newer format": lambda: header(79, b"\x10"),
            "bitmaps": lambda: self.qemu_img("bitmap", "--add", self.path, "b"),
            "backing file": lambda: self.qemu_img("create", "-f", "qcow2", "-b", self.path + ".other", "-F", "qcow2",
                                                  self.path),
            "version 4": lambda: header(7, b"\4"),
            "not a qcow2 image": lambda: header(0, b"QFI"  b"\0"),
            "too small": lambda: self.qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", self.path, "5M"),
        }
        for words, change in cases.items():
            with self.subTest(words):
                self.make("compat=1.1", False)
                change()
                with open(self.path, "rb") as file:
                    before = file.read()
                with self.assertRaisesRegex(ValueError, words):
                    kodemachine.grow_qcow2(self.path, 1 << 30)
                with open(self.path, "rb") as file:
                    self.assertEqual(file.read(), before)
        self.make("compat=1.1", False)
        with self.assertRaisesRegex(ValueError, "already has 5.0M"):
            kodemachine.grow_qcow2(self.path, 4 << 20)


class Mirror:
    """A web server with an image and its SHA256SUMS, which can be made to fail."""

    def __init__(self, files: dict[str, bytes]) -> None:
        mirror = self
        self.files = files
        self.asked: list[tuple[str, str | None]] = []       # path, Range
        self.ranges = True                                  # whether it supports ranges
        self.cut = 0                                        # the number of bytes that each answer lacks
        self.missing = 404                                  # the status for a missing file

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 (as http.server's)
                wanted = self.headers["Range"]
                mirror.asked.append((self.path, wanted))
                data = mirror.files.get(self.path)
                start = int(re.findall(r"\d+", wanted)[0]) if wanted and mirror.ranges else 0
                if data is None or (start and start >= len(data)):
                    return self.send_error(mirror.missing if data is None else 416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:len(data) - mirror.cut * (self.path != "/SHA256SUMS")])

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients may disconnect
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class CreateTest(Case):
    """base create: from a cloud image to a golden one."""

    def setUp(self) -> None:
        super().setUp()
        curl = shutil.which("curl")
        if not curl:
            self.skipTest("no curl here")
        tools = os.path.join(self.folder, "tools")
        os.mkdir(tools)
        os.symlink(curl, os.path.join(tools, "curl"))
        self.environment["PATH"] = os.pathsep.join([self.bin, tools])
        self.stub_hdiutil('[ -f "$folder/user-data" ] && echo seed >"$target"')
        # An empty list would be waited for.
        self.utm.add("Windows 11")
        self.image_data = empty_qcow2(2 << 30) + os.urandom(300000)
        self.mirror = Mirror({"/cloud.img": self.image_data})
        self.addCleanup(self.mirror.close)
        self.publish(self.image_data)
        self.cache = os.path.join(self.home, ".cache", "kodemachine")
        os.makedirs(os.path.join(self.home, ".ssh"))
        with open(os.path.join(self.home, ".ssh", "id_rsa.pub"), "w", encoding="utf-8") as file:
            file.write(PUBLIC_KEY + "\n")

    def publish(self, data: bytes) -> None:
        """Publishes the checksum of `data`."""
        text = f"{'0' * 64} *other.img\n{hashlib.sha256(data).hexdigest()} *cloud.img\n"
        self.mirror.files["/SHA256SUMS"] = text.encode()

    def create(self, *args: str, code: int = 0, image: str | None = None) -> Result:
        image = image or self.mirror.url + "/cloud.img"
        result = self.km("base", "create", "v0.1.0", "--image", image, "--user", "me", *args)
        self.assertEqual(result.code, code, result.err)
        self.assertNotIn("Traceback", result.err)
        return result

    def put_seed_result(self, root: str, datasource: str) -> None:
        result = {"v1": {"datasource": datasource, "errors": []}}
        self.write(os.path.join(root, "run/cloud-init/result.json"), json.dumps(result))

    def fetch(self) -> None:
        """Downloads the image, and fails because its disk is larger than the one asked for."""
        self.assert_says(self.create("--disk", "1G", code=1), 1, "its disk already has 2.0G")
        self.assertEqual(os.listdir(self.cache), ["cloud.img"])

    def downloads(self) -> list[str | None]:
        return [wanted for path, wanted in self.mirror.asked if path == "/cloud.img"]

    def assert_made(self) -> None:
        self.assertEqual(self.states(), {"Windows 11": "stopped", "kodeimage-v0.1.0": "stopped"})
        vm = self.utm.machine("kodeimage-v0.1.0")
        self.assertEqual((vm["cpus"], vm["memory"], vm["drives"]), (4, 4096, [vm["drives"][0]]))
        self.assertEqual(os.listdir(self.cache), ["cloud.img"])
        self.assertEqual(self.records()[vm["uuid"]].get("making"), None)
        self.assertEqual(self.read(os.path.join(self.utm.guest(vm["uuid"]), "etc/machine-id")), "")
        self.assertEqual(os.listdir(os.path.join(self.state, "intents")), [])


    def test_downloads_take_turns(self) -> None:
        with self.held_lock("download"):
            process = self.start_km("base", "create", "v0.1.0", "--image", self.mirror.url + "/cloud.img",
                                    "--disk", "1G", "--user", "me")
            assert process.stderr
            while b"to finish with the cache" not in process.stderr.readline():
                self.assertIsNone(process.poll())
            self.assertEqual(self.mirror.asked, [])
        self.assert_says(self.ended(process), 1, "its disk already has 2.0G")


    def fail_to_make(self) -> str:
        """Runs until UTM refuses to make the machine; returns the path of the disk and the seed, without suffix."""
        self.utm.fault("make", error=-2700, string="No room.")
        self.assert_says(self.create("--disk", "3G", code=1), 1,
                         "making the machine: UTM could not make unfinished-kodeimage-v0.1.0: ", "No room.")
        return os.path.join(self.cache, "kodeimage-v0.1.0")


    def stub_hdiutil(self, command: str) -> None:
        """Puts an hdiutil on PATH that makes the file $target from $folder with that shell command."""
        path = os.path.join(self.bin, "hdiutil")
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                "#!/bin/sh\n"
                'words="makehybrid -quiet -ov -iso -joliet -default-volume-name cidata -o"\n'
                '[ "$1 $2 $3 $4 $5 $6 $7 $8" = "$words" ] && [ $# = 10 ] || { echo "hdiutil: $*" >&2; exit 1; }\n'
                f'target=$9; shift; folder=$9\n{command}\n')
        os.chmod(path, 0o755)

    def use_iso_writer(self) -> None:
        """Puts an hdiutil on PATH that makes a real ISO image: the Mac's own, or one that runs xorriso."""
        hdiutil, xorriso = shutil.which("hdiutil"), shutil.which("xorriso")
        if hdiutil:
            self.stub_hdiutil(f'exec {hdiutil} $words "$target" "$folder"')
        elif xorriso:
            self.stub_hdiutil(f'exec {xorriso} -as mkisofs -quiet -V cidata -J -r -o "$target" "$folder"')
        else:
            self.skipTest("neither hdiutil nor xorriso here")

    def test_first_image_becomes_the_one_for_new_machines(self) -> None:
        result = self.create("--cpus", "4", "--memory", "4G", "--disk", "3G")
        self.assert_made()
        self.assertIn("kodeimage-v0.1.0 is ready; to create a machine from it: kodemachine project-alpha", result.err)
        self.assertIn("kodemachine config set ssh_user me", result.err)
        with open(os.path.join(self.home, ".config/kodemachine/config.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"base_image": "kodeimage-v0.1.0"})
        self.assert_says(self.create(code=4), 4, "a machine kodeimage-v0.1.0 already")
        self.assertEqual(len(self.downloads()), 1)

    def test_image_is_made_although_the_configuration_cannot_be_written(self) -> None:
        self.config()
        words = ("base", "create", "v0.1.0", "--image", self.mirror.url + "/cloud.img", "--user", "me", "--disk", "3G")
        result = self.read_only(os.path.join(self.home, ".config", "kodemachine"), self.command(*words))
        self.assert_made()
        self.assert_says(result, 0, "kodeimage-v0.1.0 is ready; to create a machine from it: kodemachine project-alpha",
                         'add this to it: {"base_image": "kodeimage-v0.1.0"}')

    def test_image_that_was_configured_meanwhile_stays_configured(self) -> None:
        self.utm.fault("make", delay=1.5, when="before")
        process = self.start_km("base", "create", "v0.1.0", "--image", self.mirror.url + "/cloud.img", "--user", "me")
        wait_for(lambda: self.utm.calls("make", tool="osascript"))
        path = self.config(base_image="mine")
        result = self.ended(process)
        self.assert_says(result, 0, "v0.1.0 is ready; to use it for new machines: kodemachine base use kodeimage-v")
        with open(path, encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"base_image": "mine"})

    def test_unknown_unfinished_machine_is_an_error_before_the_download(self) -> None:
        uuid = self.utm.add("unfinished-kodeimage-v0.1.0")
        self.assert_says(self.create(code=4), 4, uuid, "Delete it in UTM")
        self.assertEqual(self.mirror.asked, [])

    def test_next_run_removes_the_order_of_a_killed_one(self) -> None:
        patch = (
            "import os, signal\n"
            "def unlink(path, real=os.unlink):\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if path.endswith('.json') else real(path)\n"
            "os.unlink = unlink\n"
        )
        command = self.command("base", "create", "v0.1.0", "--image", self.mirror.url + "/cloud.img", "--user", "me")
        command[command.index(self.LAUNCH)] = patch + self.LAUNCH
        self.assertEqual(self.run_program(command).code, -signal.SIGKILL)
        self.create()
        self.assert_made()

    def test_login_name_is_not_needed_if_the_user_is_named(self) -> None:
        """The user ID has no name in this process. That must not be noticed after the work is done."""
        for words, code, text in (([], 2, "has no login name"), (["--user", "me"], 0, "config set ssh_user me")):
            command = self.command("base", "create", "v0.1.0", "--image", self.mirror.url + "/cloud.img", *words)
            command[command.index(self.LAUNCH)] = "import pwd\npwd.getpwuid = {}.__getitem__\n" + self.LAUNCH
            self.assert_says(self.run_program(command), code, text)
        self.assert_made()

    def test_configuration_stays_if_there_is_another_image(self) -> None:
        self.image("kodeimage-v0.0.9")
        self.create()
        self.assertFalse(os.path.exists(os.path.join(self.home, ".config/kodemachine/config.json")))

    def test_seed_on_a_removable_drive_is_not_found(self) -> None:
        """Contract 7, Drives. The fake's cloud-init reports that; the product's script makes an ordinary drive."""
        made = kodemachine.MAKE.replace("{source:the_seed}", "{removable:true, source:the_seed}")
        with mock.patch.object(self, "PATIENCE", {**self.PATIENCE, "MAKE": made}):
            said = self.create(code=1)
        self.assert_says(said, 1, "waiting for cloud-init: cloud-init did not find its seed")

    def test_seed_and_disk_have_the_right_formats(self) -> None:
        self.use_iso_writer()
        self.utm.fault("make", error=-2700, string="No room.")
        self.assert_says(self.create("--disk", "3G", code=1), 1,
                         "making the machine: UTM could not make unfinished-kodeimage-v0.1.0: ", "No room.")
        base = os.path.join(self.cache, "kodeimage-v0.1.0")
        with open(base + ".iso", "rb") as file:
            file.seek(32768 + 40)
            self.assertEqual(file.read(32).rstrip(), b"cidata")
        with open(base + ".qcow2", "rb") as file:
            self.assertEqual(kodemachine.parse_qcow2(file.read(104)).size, 3 << 30)
        seed = {}
        for name in ("user-data", "meta-data", "network-config"):
            with open(os.path.join(base + ".seed", name), encoding="utf-8") as file:
                first, _, rest = file.read().partition("#cloud-config\n")
                seed[name] = json.loads(rest or first)
        self.assertEqual(seed["user-data"]["users"][0]["name"], "me")
        self.assertEqual(seed["user-data"]["users"][0]["ssh_authorized_keys"], [PUBLIC_KEY])
        self.assertEqual(seed["network-config"]["ethernets"]["any"]["match"], {"name": "e*"})
        made = self.utm.calls("make", tool="osascript")[0]["argv"]
        self.assertEqual(made[3], "unfinished-kodeimage-v0.1.0")
        self.assertEqual(made[5:], ["4", "4096", base + ".qcow2", base + ".iso"])
        self.utm.clear_faults()
        self.create()
        self.assert_made()
        self.assertEqual(len(self.downloads()), 1)

    def test_seed_that_cannot_be_written_is_explained(self) -> None:
        self.stub_hdiutil("echo hdiutil: makehybrid failed - No space left on device >&2; exit 1")
        self.assert_says(self.create(code=1), 1, "writing the seed: hdiutil: makehybrid failed - No space",
                         "Fix that and run the command again.")
        os.unlink(os.path.join(self.bin, "hdiutil"))
        self.assert_says(self.create(code=1), 1, "writing the seed: hdiutil was not found on PATH",
                         "check that /usr/bin and /usr/sbin are on PATH")
        self.assertEqual(list(self.states()), ["Windows 11"])

    def test_truncated_download_is_resumed(self) -> None:
        self.mirror.cut = 100000
        self.assert_says(self.create(code=1), 1, "getting the disk: curl: (18)", "run the command again")
        self.assertEqual(os.listdir(self.cache), ["cloud.img.part"])
        self.mirror.cut = 0
        self.fetch()
        self.assertEqual(self.downloads(), [None, f"bytes={len(self.image_data) - 100000}-"])

    def test_server_that_cannot_resume_sends_the_whole_file_again(self) -> None:
        self.mirror.cut, self.mirror.ranges = 100000, False
        self.create(code=1)
        self.mirror.cut = 0
        self.fetch()

    def test_wrong_checksum_removes_the_download_and_the_next_run_succeeds(self) -> None:
        self.publish(b"something else")
        self.assert_says(self.create(code=1), 1, "cloud.img does not have the checksum in ", "and was removed",
                         "run the same command again")
        self.assertEqual(os.listdir(self.cache), [])
        self.mirror.files["/SHA256SUMS"] = b"\n"
        self.assert_says(self.create(code=1), 1, "SHA256SUMS does not list cloud.img")
        del self.mirror.files["/SHA256SUMS"]
        self.assert_says(self.create(code=1), 1, "there is no http", "/SHA256SUMS", "--image FILE")
        self.mirror.missing = 503
        down = self.create(code=1)
        self.assertEqual(("503" in down.err, "--image FILE" in down.err), (True, False), down.err)
        self.publish(self.image_data)
        self.fetch()

    def test_newer_image_replaces_the_one_in_the_cache(self) -> None:
        self.fetch()
        self.mirror.files["/cloud.img"] = newer = empty_qcow2(2 << 30) + b"newer"
        self.publish(newer)
        self.fetch()
        with open(os.path.join(self.cache, "cloud.img"), "rb") as file:
            self.assertEqual(file.read(), newer)

    def test_local_file_is_used_and_not_changed(self) -> None:
        path = os.path.join(self.home, "my image.qcow2")
        with open(path, "wb") as file:
            file.write(self.image_data)
        self.create(image="~/my image.qcow2")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), self.image_data)
        self.assertEqual((self.states()["kodeimage-v0.1.0"], self.mirror.asked), ("stopped", []))

    def test_mistakes_and_failures_are_explained(self) -> None:
        other = os.path.join(self.home, "raw.img")
        with open(other, "wb") as file:
            file.write(bytes(1 << 20))
        cases: tuple[tuple[list[str], int, str], ...] = (
            (["--image", other], 1, "it is not a qcow2 image"), (["--image", "/nosuch"], 1, "/nosuch: No such file"),
            (["--image", self.mirror.url + "/none.img"], 1, "SHA256SUMS does not list none.img"),
            (["--image", "http://127.0.0.1:1/a.img"], 1, "curl: (7)"), (["--disk", "1G"], 1, "already has 2.0G"),
            (["--disk", "5M"], 2, "is not a size of a disk"), (["--user", "a b"], 2, "'a b' is not a valid user name"),
        )  # fmt: skip
        for args, code, words in cases:
            with self.subTest(words):
                self.assert_says(self.create(*args, code=code), code, words)
        self.assertEqual((list(self.states()), os.listdir(self.cache)), (["Windows 11"], ["cloud.img"]))
        self.utm.add("KODEIMAGE-v0.1.0")
        self.assert_says(self.create(code=4), 4, "a machine KODEIMAGE-v0.1.0 already")

    def test_full_disk_is_explained_and_the_next_run_succeeds(self) -> None:
        tool = os.path.join(self.folder, "tools", "curl")
        real = os.readlink(tool)
        os.unlink(tool)
        with open(tool, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\ntrap "" XFSZ\nulimit -f 200\nexec {real} "$@"\n')
        os.chmod(tool, 0o755)
        self.assert_says(self.create(code=1), 1, "getting the disk: curl: (23)")
        os.unlink(tool)
        os.symlink(real, tool)
        self.fetch()

    def test_next_run_continues_one_that_was_killed(self) -> None:
        for verb, nth, when in (("make", 1, "before"), ("exec", 3, "after"), ("configure", 1, "after")):
            with self.subTest(verb, when=when):
                self.utm.fault(verb, kill_parent=when, nth=nth)
                self.create(code=-signal.SIGKILL)
                self.utm.clear_faults()
                self.create()
                self.assert_made()
                self.assertEqual(len(self.downloads()), 1)
                with self.utm.fake as utm:
                    utm.remove(utm.vms[1]["uuid"])

    def test_rename_without_effect_is_repeated(self) -> None:
        self.utm.fault("configure", silent=True, times=1)
        self.create()
        self.assert_made()
        self.assertEqual(len(self.utm.calls("configure", tool="osascript")), 2)

    # The lines that forbid the agent to run commands (RHEL 8; Fedora and RHEL 9; RHEL 9.4; newer Fedoras; Tumbleweed; a
    # configuration file of QEMU's own), and what they must become.
    FORBIDDING = (
        ("sysconfig/qemu-ga", "BLACKLIST_RPC=guest-ping,guest-exec,guest-exec-status", "BLACKLIST_RPC=guest-ping"),
        ("sysconfig/qemu-ga", "BLOCK_RPCS=guest-ping,guest-exec,guest-exec-status", "BLOCK_RPCS=guest-ping"),
        ("sysconfig/qemu-ga", 'FILTER_RPC_ARGS="--allow-rpcs=guest-sync,guest-info"',
         'FILTER_RPC_ARGS="--allow-rpcs=guest-exec,guest-exec-status,guest-sync,guest-info"'),
        ("sysconfig/qemu-ga", 'QEMU_GA_ARGS="--verbose --block-rpcs=guest-ping,guest-exec,guest-exec-status"',
         'QEMU_GA_ARGS="--verbose --block-rpcs=guest-ping"'),
        ("sysconfig/qemu-ga", 'FILTER_RPC_ARGS="--block-rpcs=guest-exec,guest-exec-status"',
         'FILTER_RPC_ARGS="--block-rpcs="'),
        ("qemu/qemu-ga.conf", "[general]\nblock-rpcs = guest-exec,guest-exec-status", "[general]\nblock-rpcs = "),
        ("qemu/qemu-ga.conf", "[general]\nallow-rpcs=guest-ping",
         "[general]\nallow-rpcs=guest-exec,guest-exec-status,guest-ping"),
    )

    def test_agent_is_allowed_to_run_commands_before_it_starts(self) -> None:
        uuid = self.vm("a", "started")
        root = self.utm.guest("km-a")
        log = os.path.join(root, "log")
        for name in ("qemu-ga", "systemctl"):
            self.write(os.path.join(root, "bin", name), f'#!/bin/sh\necho "$*" >>{log}\n', 0o755)
        comment = "# BLACKLIST_RPC=guest-exec\n"
        for name, before, after in self.FORBIDDING:
            with self.subTest(before):
                path = self.write(os.path.join(root, "etc", name), f"{comment}{before}\nX=1\n")
                with self.utm.fake as utm:
                    Guest(utm, uuid).give_away(root)
                for _ in range(2):
                    self.utmctl("exec", "km-a", "--cmd", "/bin/sh", "-c", kodemachine.INSTALL_AGENT)
                    self.assertEqual(self.read(path), f"{comment}{after}\nX=1\n")
                # It is stopped once: the second time it may be running commands.
                self.assertEqual(self.read(log), "stop qemu-guest-agent\n" + 2 * "enable --now qemu-guest-agent\n")
                os.unlink(log)
                os.unlink(path)

    def test_agent_that_may_not_run_commands_yet_is_waited_for(self) -> None:
        self.utm.fault("exec", error=-2700, string="Command guest-exec has been disabled: not allowed", times=2)
        self.create()
        self.assert_made()

    def test_seed_that_utm_does_not_remove_is_an_error(self) -> None:
        for answer in ("2 disk disk\n", "1 disk seed\n"):
            self.utm.fault("detach", stdout=answer)
            self.assert_says(self.create(code=1), 1, "detaching the seed: UTM did not remove the seed from unfinished-",
                             "Check its drives in UTM")
            self.utm.clear_faults()
        self.create()
        self.assert_made()

    def test_seed_is_removed_from_a_machine_with_a_custom_icon(self) -> None:
        self.utm.fault("detach", stdout="2 disk disk\n")
        self.create(code=1)
        self.utm.clear_faults()
        self.utm.change("unfinished-kodeimage-v0.1.0", icon="my-own")
        self.create()
        self.assert_made()

    def test_result_of_cloud_init_is_checked(self) -> None:
        self.utm.fault("start", error=-2700, string="No memory.")
        self.assert_says(self.create(code=1), 1, "booting it for the first time: unfinished-", "No memory.")
        self.utm.clear_faults()
        stub = os.path.join(self.utm.guest("unfinished-kodeimage-v0.1.0"), "bin", "cloud-init")
        self.put_seed_result(os.path.dirname(os.path.dirname(stub)), "DataSourceNone")
        self.assert_says(self.create(code=1), 1, "cloud-init did not find its seed", "delete unfinished-")
        self.put_seed_result(os.path.dirname(os.path.dirname(stub)), "DataSourceNoCloud [seed=/dev/vdb]")
        with open(stub, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\necho status: error\nexit 1\n")
        self.assert_says(self.create(code=1), 1, "waiting for cloud-init: cloud-init failed: status: error")
        with open(stub, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\necho status: done\nexit 2\n")
        self.assert_says(self.create(), 0, "cloud-init finished with warnings: status: done")
        self.assert_made()


# ---- settings and other tools: config, ssh-config, completion, help


class ConfigTest(Case):
    """config: the configuration is the content of its file, or an error with a position."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.config()

    def assert_refused(self, words: str, *args: str) -> None:
        result = self.run_program(self.command(*(args or ("list",))))
        self.assertEqual((result.code, result.out), (2, ""))
        self.assertRegex(result.err, r"\Akodemachine: .*\n(?:  .*\n)?\Z")
        self.assertIn(words, result.err)

    def test_image_names_cannot_begin_with_the_prefix_of_clones(self) -> None:
        self.write(self.path, "{}")
        self.assert_refused("prefix must be", "config", "set", "prefix", "kodeimage-v0-")
        self.assert_refused("base_image 'km-golden' begins with the prefix", "config", "set", "base_image", "km-golden")
        self.assertEqual(self.km("config", "set", "base_image", "vm-golden").code, 0)
        self.assert_refused("begins with the prefix of clones, 'vm-'", "config", "set", "prefix", "vm-")
        self.write(self.path, '{"base_image": "km-golden"}')
        self.assert_refused(f"{self.path}: base_image 'km-golden' begins")
        self.assertEqual(self.km("config", "set", "base_image", "").code, 0)

    def test_broken_file_is_reported_with_its_position_and_left_unchanged(self) -> None:
        table = {
            "": ":1:1: the file is empty",
            "{": ":1:2: ",
            '{\n "prefix": "km-"\n "ssh_port": 22}': ":3:2: ",
            "[]": ":1:1: not a JSON object",
            '{\n  "ssh_port": "22"\n}': ':2:3: ssh_port must be a port number, not "22"',
            '{"ssh_port": true}': ":1:2: ssh_port",
            '{"boot_timeout": 0}': ":1:2: boot_timeout must be a positive number of seconds",
            '{"boot_timeout": NaN}': ":1:2: boot_timeout",
            '{"prefix": "KM-"}': ":1:2: prefix",
            '{"prefix": "kodeimage-v"}': ":1:2: prefix",
            '{"prefix": ""}': ":1:2: prefix",
            '{"ssh_user": "-oProxyCommand=x"}': ":1:2: ssh_user",
            '{"base_image": ["x"]}': ":1:2: base_image",
            '{"basee_image": "x"}': ":1:2: unknown key 'basee_image'\n  Did you mean 'base_image'?",
            '{"prefix": "a-", "prefix": "b-"}': "key 'prefix' appears twice",
            " \n": ":1:1: the file is empty",
            '{\n "ssh_port": 22,\n}': ": JSON does not allow a comma after the last value",
            '{\n // mine\n "ssh_port": 22}': ":2:2: JSON does not allow comments",
            '{"ssh_port": 22 /* mine */}': ":1:17: JSON does not allow comments",
            '# mine\n{}': ":1:1: JSON does not allow comments",
            "[" * 100000: "",
            '{"base_image": "\x1b[2J"}': ":1:17: ",
        }
        for text, words in table.items():
            with self.subTest(text[:40]):
                self.write(self.path, text)
                self.assert_refused(words)
                self.assert_refused(words, "config", "set", "stop_timeout", "23")
                self.assertEqual(self.read(self.path), text)
        self.assertEqual(self.utm.calls(), [])


    def test_byte_order_mark_is_ignored(self) -> None:
        self.write(self.path, '\ufeff{"ssh_user": "me"}')
        self.assertEqual(self.km("config", "get", "ssh_user"), (0, "me\n", ""))

    def test_get_rejects_a_value(self) -> None:
        self.assert_refused("kodemachine config set ssh_user 'a b'", "config", "get", "ssh_user", "a b")

    def test_path_that_is_not_a_regular_file_is_an_error(self) -> None:
        os.unlink(self.path)
        os.mkfifo(self.path)
        self.assert_refused(f"{self.path}: not a regular file")
        os.unlink(self.path)
        os.mkdir(self.path)
        self.assert_refused(f"{self.path}: ")
        self.assert_refused(f"{self.path}: ", "config", "set", "ssh_port", "23")

    def test_unreadable_file_is_an_error(self) -> None:
        os.unlink(self.path)
        os.symlink(self.path, self.path)  # not even root can read this one
        self.assertEqual(self.km("config").code, 2)

    def test_missing_file_means_the_defaults(self) -> None:
        os.unlink(self.path)
        shown = dict(line.split(" = ") for line in self.km("config").out.splitlines())
        self.assertEqual(
            shown,
            {
                "base_image": "",
                "ssh_user": "",
                "ssh_port": "22",
                "prefix": "km-",
                "identity_file": "",
                "boot_timeout": "120",
                "clone_timeout": "600",
                "stop_timeout": "60",
                "utmctl": "",
                "documents": "",
                "first_boot": "",
            },
        )
        self.assertFalse(os.path.exists(self.path))

    def test_set_stores_a_value_of_the_right_type_and_keeps_the_other_keys(self) -> None:
        self.write(self.path, '{"ssh_user": "me"}')
        self.assertEqual(self.km("config", "path").out, self.path + "\n")
        for key, value, stored in (("ssh_port", "2222", 2222), ("base_image", "7", "7"),
                                   ("identity_file", "~/id", "~/id"), ("boot_timeout", "1.5", 1.5)):
            warning = ""
            if key == "identity_file":
                warning = f"kodemachine: warning: {key}: {value} does not exist yet\n"
            self.assertEqual(self.km("config", "set", key, value), (0, "", warning))
            self.assertEqual(json.loads(self.read(self.path))[key], stored)
        self.assertEqual(self.km("config", "get", "ssh_port").out, "2222\n")
        self.assertEqual(self.km("config", "get", "identity_file").out, f"{self.home}/id\n")
        told = json.loads(self.km("config", "--json").out)
        self.assertEqual((list(told), told["ssh_port"]), (list(kodemachine.SETTINGS), 2222))
        self.assertEqual(self.km("config", "get", "first_boot", "--json").out, "null\n")
        self.assertEqual(self.km("config", "set", "ssh_port", "").code, 0)
        self.assertEqual(self.km("config", "get", "ssh_port").out, "22\n")
        self.assertEqual(json.loads(self.read(self.path))["ssh_user"], "me")


    def test_relative_path_is_stored_as_an_absolute_path(self) -> None:
        script = os.path.join(self.home, "set up.sh")
        self.write(script, "#!/bin/sh\n")
        for key, path in (("first_boot", "set up.sh"), ("documents", "."), ("identity_file", "./x/../set up.sh")):
            self.assertEqual(self.km("config", "set", key, path).code, 0)
            self.assertEqual(json.loads(self.read(self.path))[key], self.home if path == "." else script)
        self.assertEqual(self.km("config", "set", "first_boot", "").code, 0)
        self.assertNotIn("first_boot", json.loads(self.read(self.path)))

    def test_set_rejects_invalid_values(self) -> None:
        self.write(self.path, '{"ssh_user": "me"}')
        for key, value in (
            ("ssh_port", "x"),
            ("ssh_port", "0"),
            ("headless", "true"),
            ("prefix", "km"),
            ("nothing", "1"),
            ("boot_timeout", "-1"),
            ("boot_timeout", "1e999"),
        ):
            with self.subTest(key=key, value=value):
                self.assert_refused(key, "config", "set", key, value)
        self.assert_refused("nothing", "config", "get", "nothing")
        self.assertEqual(self.read(self.path), '{"ssh_user": "me"}')

    def test_config_option_names_another_file_that_must_exist(self) -> None:
        other = os.path.join(self.home, "other.json")
        self.assert_refused(other, "--config", other, "list")
        self.write(other, '{"ssh_port": 7}')
        self.write(self.path, "broken")
        self.assertEqual(self.km("--config", "other.json", "config", "get", "ssh_port").out, "7\n")
        self.assertEqual(self.km("--config", other, "config", "set", "ssh_port", "8").code, 0)
        self.assertEqual(self.read(self.path), "broken")

    def test_xdg_config_home_counts_if_it_is_absolute(self) -> None:
        elsewhere = os.path.join(self.folder, "xdg")
        expected = {
            elsewhere: os.path.join(elsewhere, "kodemachine", "config.json"),
            "relative": self.path,
            "": self.path,
        }
        for value, path in expected.items():
            self.assertEqual(self.km("config", "path", env={"XDG_CONFIG_HOME": value}).out, path + "\n")

    def test_symbolic_link_is_kept_and_its_target_replaced(self) -> None:
        target = os.path.join(self.folder, "dotfiles.json")
        os.rename(self.path, target)
        os.symlink(target, self.path)
        inode = os.stat(target).st_ino
        self.assertEqual(self.km("config", "set", "ssh_port", "23").code, 0)
        self.assertTrue(os.path.islink(self.path))
        self.assertEqual(self.read(self.path), '{\n  "ssh_port": 23\n}\n')
        self.assertNotEqual(os.stat(target).st_ino, inode)

    def test_failed_write_keeps_the_old_file_and_leaves_no_other(self) -> None:
        self.write(self.path, '{"ssh_user": "me"}')
        limited = ["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *self.command("config", "set", "ssh_port", "23")]
        result = self.run_program(limited)
        self.assertEqual(result.code, 1, result.err)
        self.assertNotIn("Traceback", result.err)
        self.assertEqual(self.read(self.path), '{"ssh_user": "me"}')
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ["config.json"])

    def test_written_files_are_private_under_any_umask(self) -> None:
        self.image()
        for mask in ("000", "022", "077"):
            home = os.path.join(self.folder, f"home {mask}")
            os.mkdir(home)
            for args in (("config", "set", "ssh_user", "me"), ("start", "-d", f"alpha-{mask}")):
                self.utm.fault("start", error=-1743)
                self.run_program(
                    ["/bin/sh", "-c", f'umask {mask}; exec "$@"', "sh", *self.command(*args)], env={"HOME": home}
                )
            found = {os.path.join(top, name) for top, folders, files in os.walk(home) for name in (*folders, *files)}
            self.assertIn(os.path.join(home, ".local/state/kodemachine/machines.json"), found)
            for path in found:
                self.assertEqual(oct(os.stat(path).st_mode & 0o777), oct(0o700 if os.path.isdir(path) else 0o600), path)

    def test_a_bad_value_and_an_unknown_key_can_be_fixed_as_their_error_says(self) -> None:
        for text, key, words, fixed in (
            ('{"prefix": "a-", "boot_timeout": 0}', "boot_timeout", ("set", "boot_timeout", "7"),
             {"prefix": "a-", "boot_timeout": 7}),
            ('{"prefix": "a-", "boot_timeout": 0}', "boot_timeout", ("unset", "boot_timeout"), {"prefix": "a-"}),
            ('{"prefix": "a-", "old_key": 0}', "old_key", ("unset", "old_key"), {"prefix": "a-"}),
            ('{"prefix": "a-", "old_key": 0}', "old_key", ("set", "old_key", ""), {"prefix": "a-"}),
        ):
            self.write(self.path, text)
            self.assert_refused(key, "list")
            self.assertEqual(self.km("config", *words), (0, "", ""))
            self.assertEqual(json.loads(self.read(self.path)), fixed)
        self.assert_refused("unknown key", "config", "set", "old_key", "")
        self.assert_refused("unknown key", "config", "unset", "old_key")

    def test_a_removed_key_is_ignored_with_a_warning_that_names_it(self) -> None:
        self.write(self.path, '{"headless": false, "ssh_port": 7}')
        warning = f"kodemachine: warning: {self.path}: ignoring keys that are no longer used: headless. To remove one: "
        warning += "kodemachine config unset headless\n"
        self.assertEqual(self.km("config", "get", "ssh_port"), (0, "7\n", warning))
        self.assertEqual(self.km("config", "set", "ssh_port", "8").code, 0)
        self.assertEqual(self.read(self.path), '{\n  "ssh_port": 8\n}\n')
        self.assert_refused("unknown key 'headless'", "config", "set", "headless", "true")
        self.write(self.path, '{"headless": false}')
        self.assertEqual(self.km("config", "unset", "headless").code, 0)
        self.assertEqual(self.read(self.path), "{}\n")

    def test_unset_of_a_key_that_is_not_set_writes_nothing(self) -> None:
        self.write(self.path, '{"ssh_user": "me"}')
        self.assertEqual(self.km("config", "unset", "ssh_port"), (0, "", ""))
        self.assertEqual(self.read(self.path), '{"ssh_user": "me"}')

    def test_unset_takes_one_key_and_keeps_the_others(self) -> None:
        self.write(self.path, '{"ssh_user": "me", "first_boot": "/x"}')
        self.assertEqual(self.km("config", "unset", "first_boot"), (0, "", ""))
        self.assertEqual(self.read(self.path), '{\n  "ssh_user": "me"\n}\n')
        self.assert_refused("config unset needs one key", "config", "unset")
        self.assert_refused("config unset needs one key", "config", "unset", "ssh_user", "me")
        self.assertEqual(self.read(self.path), '{\n  "ssh_user": "me"\n}\n')


LOGIN = pwd.getpwuid(os.getuid()).pw_name
# The worst `Host *`: for each option its value there, the lines of `ssh -G` for a session of kodemachine, and those for
# `ssh km-a`. None: the person's own value applies. {address}, {port} and {known} are the machine's. An empty text: the
# option is not set.
WORST: dict[str, tuple[str, str | None, str | None]] = {
    "HostName": ("%h.corp.example.com", "{address}", "km-a"),
    "User": ("deploy", LOGIN, LOGIN),
    "Port": ("2222", "{port}", "22"),
    "ProxyJump": ("nobody@192.0.2.1", "", ""),
    "AddressFamily": ("inet6", "any", None),
    "BindAddress": ("192.0.2.9", "0.0.0.0", None),
    "BindInterface": ("nosuch0", None, None),                   # undone by BindAddress
    "CanonicalizeHostname": ("always", "false", "false"),
    "ControlMaster": ("auto", "false", "false"),
    "ControlPath": ("/nonexistent/%C", "", ""),
    "ControlPersist": ("5", None, None),                        # nothing without ControlPath
    "ForwardAgent": ("yes", "no", "no"),
    "ForwardX11": ("yes", "no", "no"),
    "StrictHostKeyChecking": ("no", "true", "true"),
    "UserKnownHostsFile": ("/dev/null", "{known}", "{known}"),
    "GlobalKnownHostsFile": ("/nonexistent/hosts", "/dev/null", "/dev/null"),
    "UpdateHostKeys": ("yes", "false", "false"),
    "VerifyHostKeyDNS": ("yes", "false", "false"),
    "HashKnownHosts": ("yes", "no", "no"),
    "CheckHostIP": ("yes", "no", "no"),
    "NoHostAuthenticationForLocalhost": ("yes", "no", "no"),
    "KnownHostsCommand": ("/bin/echo %H", "", ""),
    "RemoteCommand": ("tmux new -A", "", None),
    "SessionType": ("none", "default", None),
    "ForkAfterAuthentication": ("yes", "no", None),
    "StdinNull": ("yes", "no", None),
    "RequestTTY": ("force", "auto", None),
    "LocalForward": ("1 [localhost]:1", "", None),
    "RemoteForward": ("2 [localhost]:2", "", None),
    "DynamicForward": ("3", "", None),
    "Tunnel": ("point-to-point", "false", None),
    "PermitLocalCommand": ("yes", "no", None),
    "LocalCommand": ("touch /nonexistent/file", None, None),    # nothing without PermitLocalCommand
    "ConnectionAttempts": ("9", "4", None),
    "ConnectTimeout": ("99", "10", None),
    # These are the person's own in every session.
    "ServerAliveInterval": ("240", None, None),
    "SendEnv": ("KODEMACHINE_TEST", None, None),
    "SetEnv": ("KODEMACHINE=test", None, None),
    "IdentityAgent": ("/nonexistent/agent", None, None),
    "EscapeChar": ("none", None, None),
    "LogLevel": ("VERBOSE", None, None),
}


class SshConfigTest(Case):
    """ssh-config: ssh, scp and other programs reach machines by name."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.with_names()

    def by_name(self, *argv: str) -> Result:
        return self.run_program([shutil.which(argv[0], path=self.environment["PATH"]) or argv[0], *argv[1:]])

    def home_configuration(self, text: str) -> str:
        """Writes ~/.ssh/config, which every ssh of this test reads before its other options; returns its path.

        ssh itself takes the home from the list of users (getpwuid), where it is another one.
        """
        path = self.write(".ssh/config", text)
        os.chmod(os.path.dirname(path), 0o700)
        self.write(self.ssh_config, f'Include "{path}"\nHost *\n{self.read(self.ssh_config).partition("Host *")[2]}')
        return path

    WORST_LINES = "".join(f"  {option} {value}\n" for option, (value, _, _) in WORST.items())

    def worst(self) -> None:
        """Every ssh gets the worst `Host *` after the stanza, and no `ssh_user` is configured."""
        self.config(ssh_port=self.server.port)
        keys = self.read(self.ssh_config).partition("Host *\n")[2]
        self.write(self.ssh_config, f"{self.km('ssh-config').out}Host *\n{keys}{self.WORST_LINES}")

    def printed(self, *argv: str) -> dict[str, str]:
        """What `ssh -G` prints for a command line."""
        result = self.by_name("ssh", "-G", *argv)
        self.assertEqual(result.code, 0, result.err)
        return dict(line.partition(" ")[::2] for line in result.out.splitlines())

    def test_worst_configuration_for_all_hosts_leaves_only_what_is_the_persons_own(self) -> None:
        self.worst()
        self.assertEqual(self.km("a", "--", "true").code, 0)
        places = {"address": self.server.hosts[0], "port": self.server.port,
                  "known": os.path.join(self.state, "known_hosts")}
        session, by_name = self.printed(*self.utm.calls(tool="ssh")[-1]["argv"]), self.printed("km-a")
        plain = self.printed("-F", self.write("only this", f"IgnoreUnknown *\n{self.WORST_LINES}"), "km-a")
        for option, (_, in_session, for_name) in WORST.items():
            key = option.lower()
            for found, wanted in ((session, in_session), (by_name, for_name)):
                with self.subTest(option, session=found is session):
                    if key in plain or wanted is not None:
                        wanted = plain[key] if wanted is None else wanted.format(**places)
                        self.assertEqual(found.get(key, ""), wanted)

    def test_sessions_and_copies_do_their_work_under_the_worst_configuration(self) -> None:
        self.image()
        self.remove("km-b")
        self.worst()
        # A session that ssh continues in the background would end this run, and --rm would delete its machine.
        exists = f"sleep 0.3; grep -q km-web '{self.utm.fake.path('state')}' && echo still there"
        result = self.km("web", "--rm", "--", exists)
        self.assertEqual((result.code, result.out), (0, "still there\n"), result.err)
        self.assertNotIn("km-web", self.utm.names())
        echoed = self.km("a", "--", "cat", stdin="hello")
        self.assertEqual((echoed.code, echoed.out), (0, "hello"), echoed.err)
        copy = os.path.join(self.folder, "copy")
        copied = self.km("cp", self.ssh_config, f"a:{copy}")
        self.assertEqual((copied.code, os.path.exists(copy)), (0, True), copied.err)
        # These are the person's own wishes for a plain ssh. The rest would lead to another machine or user.
        theirs = {"RemoteCommand": "none", "SessionType": "default", "ForkAfterAuthentication": "no",
                  "StdinNull": "no", "RequestTTY": "no", "ClearAllForwardings": "yes"}
        named = self.by_name("ssh", *kodemachine.as_words(theirs), "km-a", "id -un")
        self.assertEqual((named.code, named.out), (0, LOGIN + "\n"), named.err)

    def test_first_boot_runs_to_its_end_under_the_worst_configuration(self) -> None:
        self.image()
        self.remove("km-b")
        self.worst()
        done = os.path.join(self.folder, "done")
        self.use(first_boot=self.write("first boot", f"sleep 0.3\necho done >'{done}'\n"))
        self.assert_says(self.km("start", "-d", "web"), 0)
        self.assertTrue(os.path.exists(done))

    def test_person_keeps_port_forwardings_for_a_name(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ssh_options(f"LocalForward 127.0.0.1:{port} {self.server.hosts[0]}:{self.server.port}\n")
        process = self.start_program([os.path.join(self.bin, "ssh"), "km-a", "echo up; cat"], input_follows=True)
        assert process.stdout
        self.assertEqual(process.stdout.readline(), b"up\n")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            self.assertEqual(connection.recv(4), b"SSH-")
        self.ended(process, "")

    def test_key_of_identity_file_is_offered_before_the_server_gives_up(self) -> None:
        """sshd allows six tries (MaxAuthTries), and each key of an agent is one."""
        sock = os.path.join(self.folder, "agent")
        agent = self.start_program(["ssh-agent", "-D", "-a", sock])
        wait_for(lambda: os.path.exists(sock) or agent.poll() is not None)
        self.environment["SSH_AUTH_SOCK"] = sock
        for number in range(7):
            self.assertEqual(self.by_name("ssh-add", "-q", self.server._make_key(f"other{number}")).code, 0)
        public = self.write("only public.pub", self.read(self.server.user_key + ".pub"))
        self.assertEqual(self.by_name("ssh-add", "-q", self.server.user_key).code, 0)
        for key in (self.server.user_key, public, public.removesuffix(".pub")):
            self.use(identity_file=key)
            self.write(self.ssh_config, self.km("ssh-config").out)
            with self.subTest(key):
                self.assert_says(self.km("a", "--", "true"), 0)
                self.assertEqual(self.by_name("ssh", "km-a", "true").code, 0)
                self.assert_says(self.km("cp", "a:/etc/passwd", "."), 0)
            if key == self.server.user_key:
                self.assertEqual(self.by_name("ssh-add", "-q", "-d", key + ".pub").code, 0)
                self.assert_says(self.km("a", "--", "true"), 0)         # from the file
                self.assertEqual(self.by_name("ssh-add", "-q", key).code, 0)

    def test_a_connection_is_always_a_login(self) -> None:
        """From OpenSSH 9.8 on, sshd refuses a person for a while after connections without one."""
        copy = os.path.join(self.home, "copy")
        table = [("a", "--", "true"), ("ssh", "a", "--", "true"), ("cp", "/etc/passwd", f"a:{copy}"),
                 ("ip", "a"), ("status", "a"), ("list",)]
        self.assert_says(self.km("start", "-d", "a"), 0)
        before = len(self.server.log())
        for words in table:
            self.assert_says(self.km(*words), 0)
        self.assertEqual(self.by_name("ssh", "km-a", "true").code, 0)
        wait_for(lambda: self.server.log().count("Disconnected from user", before) == 4)
        log = self.server.log()[before:]
        self.assertEqual((log.count("Connection from "), log.count("Accepted publickey")), (4, 4), log)
        self.remember(a={"is_named": False, "refusal": "the guest agent may not run commands"})
        self.assert_says(self.km("a", "--", "true"), 0)
        wait_for(lambda: self.server.log().count("Disconnected from user", before) == 5)
        self.assertEqual(self.server.log().count("Connection from ", before), 5)

    def test_ssh_reaches_a_machine_by_name(self) -> None:
        self.utm.fault("ip-address", delay=0.8)     # long enough for a line of progress, which would be in the way
        self.assertEqual(self.by_name("ssh", "km-a", "echo here; exit 7"), (7, "here\n", ""))
        self.assertEqual(self.utm.machine("km-a")["status"], "started")

    def test_proxy_is_gone_while_the_session_lasts(self) -> None:
        process = self.start_program([os.path.join(self.bin, "ssh"), "km-a", "echo up; cat"], input_follows=True)
        assert process.stdout and process.stdin
        self.assertEqual(process.stdout.readline(), b"up\n")
        wait_for(lambda: not any("proxy" in command for command in self.processes().values()))
        out, _ = process.communicate(b"still here\n", timeout=60)
        self.assertEqual(out, b"still here\n")

    def test_proxy_serves_programs_that_take_no_descriptor_through_a_pipe(self) -> None:
        said = self.by_name("ssh", "-o", "ProxyUseFdpass=no", "km-a", "echo here; exit 7")
        self.assertEqual(said[:2], (7, "here\n"))
        self.assertNoChildrenLeft()

    def test_proxy_waits_for_an_ssh_server_that_does_not_answer_yet(self) -> None:
        self.use(boot_timeout=1)
        self.utm.change("km-a", ips=["127.0.0.9"])
        self.assert_says(self.km("proxy", "km-a"), 6, "its ssh port does not answer at 127.0.0.9")
        # The address of a machine that has its identity gets no probe before.
        self.remember(a={"is_named": True})
        result = self.km("proxy", "km-a")
        self.assert_says(result, 6, "km-a does not answer at 127.0.0.9 yet; waiting for its ssh server for up to 1 s",
                         "its ssh port does not answer at 127.0.0.9")

    def test_proxy_stays_until_ssh_has_taken_its_socket(self) -> None:
        """macOS may discard a socket in flight whose sender has gone."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        proxy = subprocess.Popen(self.command("proxy", "km-a"), stdin=subprocess.DEVNULL, stdout=theirs.fileno(),
                                 env=self.environment, cwd=self.home)
        self.addCleanup(self._end, proxy)
        theirs.close()
        _, handles, _, _ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=handles[0]) as connection:
            self.assertEqual(connection.recv(4), b"SSH-")
        with self.assertRaises(subprocess.TimeoutExpired):
            proxy.wait(0.5)
        ours.close()
        self.assertEqual(proxy.wait(60), 0)

    def test_proxy_finds_a_changed_address_and_starts_no_machine(self) -> None:
        first = self.utm.machine("km-a")["ips"]
        self.assertEqual(self.by_name("ssh", "km-a", "true").code, 0)
        self.utm.change("km-a", status="stopped", ips=self.utm.machine("km-b")["ips"])
        self.utm.change("km-b", ips=first)
        self.assertIn("km-a is stopped", self.by_name("ssh", "km-a", "true").err)
        self.assertEqual(self.calls_of("start"), [], "editors poke at host names")
        self.utm.change("km-a", status="started")
        self.assertEqual(self.by_name("ssh", "km-a", "true").code, 0)

    def test_changed_host_key_is_refused(self) -> None:
        self.assertEqual(self.by_name("ssh", "km-a", "true").code, 0)
        self.server.replace_host_key()
        result = self.by_name("ssh", "km-a", "echo here")
        self.assertEqual((result.code, result.out), (255, ""))
        self.assertIn("REMOTE HOST IDENTIFICATION HAS CHANGED", result.err)

    def test_unknown_name_is_an_error_of_one_line(self) -> None:
        for name in ("km-nosuch", "km-km-a"):
            result = self.by_name("ssh", name, "true")
            self.assertEqual(result.code, 255)
            self.assertIn("kodemachine: ", result.err)
        self.assertEqual(self.calls_of("clone"), [])

    def test_scp_rsync_and_git_work_by_name(self) -> None:
        source = os.path.join(self.home, "repo")
        git = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
        self.assertEqual(self.by_name("scp", "km-a:/etc/passwd", os.path.join(self.home, "x")).code, 0)
        if shutil.which("rsync"):
            self.environment["RSYNC_RSH"] = "ssh"
            self.assertEqual(self.by_name("rsync", "km-a:/etc/passwd", os.path.join(self.home, "y")).code, 0)
        if shutil.which("git"):
            repo = os.path.join(self.folder, "repo")
            self.by_name("git", *git, "init", "-q", repo)
            self.by_name("git", "-C", repo, *git, "commit", "-q", "--allow-empty", "-m", "first")
            cloned = self.by_name("git", "clone", "-q", f"km-a:{repo}", source)
            self.assertEqual(cloned.code, 0, cloned.err)

    def test_unknown_host_key_is_learned_by_cp_and_explained_by_ssh(self) -> None:
        self.utm.fault("exec", error=-2700)
        note, there = os.path.join(self.home, "note"), os.path.join(self.folder, "note there")
        with open(note, "w", encoding="utf-8") as file:
            file.write("x")
        refused = self.by_name("ssh", "km-a", "true")
        self.assertEqual(refused.code, 255)
        self.assertIn("the host key of km-a is not known yet; to learn it: kodemachine ssh a", refused.err)
        copied = self.km("cp", note, f"a:{there}")
        self.assertEqual((copied.code, "not known yet" in copied.err), (0, False), copied.err)
        self.assertTrue(os.path.exists(there))
        again = self.by_name("ssh", "km-a", "true")
        self.assertEqual((again.code, "not known" in again.err), (0, False), again.err)
        self.server.replace_host_key()
        self.assertIn("REMOTE HOST IDENTIFICATION HAS CHANGED", self.km("cp", note, f"a:{there}").err)

    def test_install_includes_the_stanza_once_and_keeps_the_rest(self) -> None:
        theirs = self.home_configuration("Host *\n  ForwardAgent yes\n")
        for _ in range(2):
            self.assertEqual(self.km("ssh-config", "--install").code, 0)
        lines = self.read(theirs).splitlines()
        self.assertEqual((len(lines), lines[2:]), (4, ["Host *", "  ForwardAgent yes"]))
        self.assertEqual(self.read(lines[0].split('"')[1]), self.km("ssh-config").out)
        self.assertEqual(self.read(theirs + ".before-kodemachine"), "Host *\n  ForwardAgent yes\n")

    def test_install_moves_its_line_above_all_that_would_win(self) -> None:
        theirs = self.home_configuration("")
        self.assert_says(self.km("ssh-config", "--install"), 0, "ssh km-LABEL works now")
        line = self.read(theirs).splitlines()[0]
        for before in (f"Host web\n  {line}\n", f"StrictHostKeyChecking no\nUser deploy\n{line}\n",
                       f"# mine\n\nHost *\n  ProxyJump nobody@192.0.2.1\n{line}\n{line}\n"):
            with self.subTest(before):
                self.write(theirs, before)
                self.assert_says(self.km("ssh-config", "--install"), 0, "ssh km-LABEL works now")
                self.assertEqual(self.read(theirs).splitlines()[0], line)
                self.assertEqual(self.read(theirs).count(line), 1)
                self.assertEqual(self.by_name("ssh", "km-a", "echo here")[:2], (0, "here\n"))
        kept = f"# mine\n{self.read(theirs)}"
        self.write(theirs, kept)
        self.assert_says(self.km("ssh-config", "--install"), 0)
        self.assertEqual(self.read(theirs), kept, "it is in effect")

    def test_later_install_keeps_the_backup(self) -> None:
        theirs = self.home_configuration("# mine\n")
        for user in ("me", "eve"):
            self.use(ssh_user=user)
            self.assert_says(self.km("ssh-config", "--install"), 0, "ssh km-LABEL works now")
            self.assertEqual(self.read(theirs + ".before-kodemachine"), "# mine\n")
            self.assertRegex(self.read(theirs), r'\AInclude "[^"]*"\n\n# mine\n\Z')

    def test_copy_whose_agent_may_not_run_commands_is_reached_by_name(self) -> None:
        self.km("start", "-d", "a")
        self.km("stop", "a")
        self.km("delete", "-f", "b")
        self.assert_says(self.km("clone", "a", "b"), 0)
        self.utm.fault("exec", error=-2700, string="Command guest-exec has been disabled: not allowed")
        self.assert_says(self.km("start", "-d", "b"), 0, "has been disabled", "The next cold start tries again.")
        self.assertEqual(self.by_name("ssh", "km-b", "true").code, 0)
        self.km("stop", "b")
        self.assertNotIn("disabled", self.km("start", "-d", "b").err)

    def test_install_in_a_folder_whose_name_is_a_pattern(self) -> None:
        self.home_configuration("")
        folder = os.path.join(self.home, "dot[files] *?")
        self.write(os.path.join(folder, "kodemachine", "config.json"), json.dumps(self.uses))
        result = self.km("ssh-config", "--install", env={"XDG_CONFIG_HOME": folder})
        self.assert_says(result, 0, "ssh km-LABEL works now")
        self.assertEqual(self.by_name("ssh", "km-a", "echo here")[:2], (0, "here\n"))

    def test_install_does_not_claim_what_ssh_does_not_do(self) -> None:
        self.home_configuration("Port frob\n")
        self.assert_says(self.km("ssh-config", "--install"), 1, "Bad port", "ssh -G km-x")
        self.write(self.ssh_config, "User deploy\n")           # the file that ssh reads is another one
        result = self.km("ssh-config", "--install")
        self.assert_says(result, 1, "stricthostkeychecking ask", "ssh -v km-x")
        self.assertNotIn("works now", result.err)

    def test_install_with_a_read_only_configuration(self) -> None:
        theirs = self.home_configuration("Host *\n  ForwardX11 yes\n")
        dotfiles = os.path.join(self.folder, "dotfiles")
        os.mkdir(dotfiles)
        managed = os.path.join(dotfiles, "config")
        os.rename(theirs, managed)
        os.symlink(managed, theirs)
        result = self.read_only(dotfiles, self.command("ssh-config", "--install"))
        self.assert_says(result, 1, managed)
        [line] = re.findall(r"Add this line before all others of \S.*?: (Include .*)\n", result.err)
        os.chmod(dotfiles, 0o700)
        self.write(managed, f"{line}\n{self.read(managed)}")
        result = self.read_only(dotfiles, self.command("ssh-config", "--install"))
        self.assert_says(result, 0, "ssh km-LABEL works now")
        os.unlink(os.path.join(self.home, ".config", "kodemachine", "ssh_config"))
        folder = os.path.join(self.home, ".config", "kodemachine")
        result = self.read_only(folder, self.command("ssh-config", "--install"))
        self.assert_says(result, 1, folder, "paste them: kodemachine ssh-config")
        os.chmod(folder, 0o700)
        self.write(managed, self.km("ssh-config").out)
        result = self.read_only(folder, self.command("ssh-config", "--install"))
        self.assert_says(result, 0, "ssh km-LABEL works now")
        self.assertEqual(self.by_name("ssh", "km-a", "echo here")[:2], (0, "here\n"))

    def test_start_up_file_that_prints_is_reported_and_does_not_disturb_cp(self) -> None:
        self.home_configuration("")
        self.assert_says(self.km("ssh-config", "--install"), 0)
        tried = 0
        for shell, file in (("zsh", ".zshenv"), ("bash", ".bashrc"), ("fish", ".config/fish/config.fish")):
            found = shutil.which(shell)
            if not found:
                continue
            tried += 1
            self.environment["SHELL"] = found
            with self.subTest(shell):
                self.assert_says(self.km("ssh-config", "--install"), 0, "works now")
                self.write(file, "echo welcome\n")
                self.assertEqual(self.by_name("ssh", "km-a", "true").code, 255)
                self.assert_says(self.km("ssh-config", "--install"), 1, "prints something", f"Change ~/{file}, so that")
                doctor = json.loads(self.km("doctor", "--json").out)
                [said] = [finding for finding in doctor if finding["check"] == "shell"]
                self.assertEqual((said["level"], f"~/{file}" in said["remedy"]), ("warning", True), said)
                self.assert_says(self.km("cp", "a:/etc/passwd", "."), 0)
        self.assertGreater(tried, 0)

    def test_doctor_reports_an_option_that_wins_over_the_stanza(self) -> None:
        def found() -> tuple[str, str]:
            checks = json.loads(self.km("doctor", "--json").out)
            [said] = [finding for finding in checks if finding["check"] == "ssh-names"]
            return said["level"], said["message"]
        theirs = self.home_configuration("")
        self.assertEqual(found(), ("ok", "ssh does not know machines by name; to change that: "
                                         "kodemachine ssh-config --install"))
        self.assert_says(self.km("ssh-config", "--install"), 0)
        self.assertEqual(found(), ("ok", "ssh reaches machines by name"))
        self.write(theirs, f"User deploy\nStrictHostKeyChecking no\n{self.read(theirs)}")
        self.assertEqual(found(), ("warning", "for machines by name, ssh uses: stricthostkeychecking false, "
                                              "user deploy"))

    def test_install_overwrites_no_file_of_the_user(self) -> None:
        with open(self.config(ssh_port=22), encoding="utf-8") as file:
            text = file.read()
        for name, content in (("config.json", text), ("ssh_config", "Host mine\n")):
            with open(os.path.join(self.home, name), "w", encoding="utf-8") as file:
                file.write(content)
        self.write(self.ssh_config, "")
        result = self.km("--config", "config.json", "ssh-config", "--install")
        self.assertEqual(result.code, 1)
        self.assertIn(f"{file.name} is not kodemachine's file and is not replaced", result.err)
        self.assertEqual(kodemachine.read_text(file.name), "Host mine\n")
        self.assertFalse(os.path.exists(os.path.join(self.home, ".ssh")))

    def test_install_keeps_text_that_is_not_utf8(self) -> None:
        theirs = self.home_configuration("")
        before = b"# caf\xe9\nHost caf\xe9\n"
        with open(theirs, "wb") as octets:
            octets.write(before)
        self.assertEqual(self.km("ssh-config", "--install").code, 0)
        for name in (theirs, theirs + ".before-kodemachine"):
            with open(name, "rb") as octets:
                self.assertTrue(octets.read().endswith(before), name)

    def test_proxy_uses_the_configuration_named_with_the_config_option(self) -> None:
        text = self.read(self.config(ssh_port=self.server.port))
        other = os.path.join(self.home, "other one.json")
        self.write(other, text)
        self.config(prefix="no-")
        self.assertIn(f" --config '{other}' proxy %h\n", self.km("--config", other, "ssh-config").out)
        result = self.km("--config", other, "cp", "a:/etc/passwd", ".")
        self.assertEqual(result.code, 0, result.err)

    def test_proxy_passes_the_end_of_input_on(self) -> None:
        server = socket.create_server((self.utm.machine("km-a")["ips"][0], 0))
        self.addCleanup(server.close)
        self.config(ssh_port=server.getsockname()[1])
        folder = os.path.join(self.home, ".local", "state", "kodemachine")
        os.makedirs(folder, 0o700)
        with open(os.path.join(folder, "machines.json"), "w", encoding="utf-8") as file:
            json.dump({self.utm.machine("km-a")["uuid"]: {"is_named": True}}, file)
        with open(os.path.join(folder, "known_hosts"), "w", encoding="utf-8") as file:
            file.write(f"km-a {host_key()}\n")
        process = self.start_km("proxy", "km-a", input_follows=True)
        assert process.stdin
        with server.accept()[0] as probe:
            probe.sendall(b"SSH-")
        process.stdin.write(b"hello")
        process.stdin.close()
        process.stdin = None
        with server.accept()[0] as guest:
            self.assertEqual(guest.recv(100, socket.MSG_WAITALL), b"hello")
            guest.sendall(b"bye")
        self.assertEqual(self.ended(process)[:2], (0, "bye"))

    def test_stanza_follows_the_configuration(self) -> None:
        self.config(prefix="dev-", ssh_user="me", identity_file="~/a key")
        stanza = self.km("ssh-config").out
        self.assertIn("Host dev-*\n", stanza)
        self.assertIn("  User me\n", stanza)
        self.assertIn(f'  IdentityFile "{self.home}/a key"\n', stanza)
        self.assertIn("  Port 22\n", stanza)            # with another one, a host key would be looked up as [name]:port
        self.assertNotIn("HostKeyAlias", stanza)
        self.assertIn(json.dumps(self.home)[1:-1], stanza)


COMMAND_WORDS = {name.partition(" ")[0] for name, entry in kodemachine.COMMANDS.items() if not entry.hidden}


class WordsTest(unittest.TestCase):
    """completion: the words that the program offers to the shells."""

    LABELS = {"alpha", "beta-2"}

    def test_completion_offers_the_words_for_every_place(self) -> None:
        def machines(_ctx: object, ending: str = "", *, images: bool = False) -> dict[str, str]:
            return {IMAGE: "stopped"} if images else dict.fromkeys((label + ending for label in self.LABELS), "")

        ctx: Any = mock.Mock()
        with mock.patch.object(kodemachine, "known_machines", machines):
            for line, words in (
                ("", COMMAND_WORDS | self.LABELS),
                ("-v --config file ", COMMAND_WORDS | self.LABELS),
                ("stop ", self.LABELS),
                ("stop alpha ", {"beta-2"}),
                ("stop -t ", set()),
                ("stop -t 5 ", self.LABELS),
                ("rm ", self.LABELS),
                ("status alpha ", set()),
                ("alpha ", {"beta-2"}),
                ("alpha --base ", {IMAGE}),
                ("purge --image ", {IMAGE}),
                ("cp -r notes ", {"alpha:", "beta-2:"}),
                ("attach alpha --log ", set()),
                ("--config ", set()),
                ("config ", {"get", "set", "unset", "path"}),
                ("config set ", set()),
                ("completion ", {"bash", "zsh", "fish"}),
                ("help ", COMMAND_WORDS - {"help"}),
                ("help stop ", set()),
                ("exec alpha -- ", set()),
                ("alpha -- tar -", set()),
                ("-", {"-h", "--help", "-v", "--verbose", "-q", "--quiet", "--config", "--version"}),
                ("suspend alpha --all -", {"-h", "--help"}),
                ("restart ", self.LABELS),
                ("restart -t 5 alpha -", {"-h", "--help", "--timeout"}),
                ("list -", {"-h", "--help", "-a", "--all", "-s", "--size", "--json", "--format", "-q", "--quiet",
                            "--no-ip"}),
                ("base ls -", {"-h", "--help", "-s", "--size", "--json"}),
                ("base use ", {IMAGE}),
                ("base seal ", self.LABELS),
                ("base seal --as ", set()),
            ):
                *ctx.rest, _ = line.split(" ")
                kodemachine.cmd_complete(ctx, argparse.Namespace(rest=line.split(" ")))
                offered = ctx.out.raw.call_args[0][0].decode()
                self.assertEqual({word.partition("\t")[0] for word in offered.splitlines()}, words, line)

    def test_completion_offers_two_word_commands_one_word_at_a_time(self) -> None:
        ctx: Any = None
        words_of_base = {"list", "use", "create", "seal"}
        for words, word, expected in (
            (["base"], "", words_of_base),
            (["base", "use"], "-", {"-h", "--help"}),
            (["base", "create", "v0.1.0", "--image"], "", set()),
            (["base", "nonsense"], "", set()),
            (["help", "base"], "", words_of_base),
        ):
            self.assertEqual(set(kodemachine.candidates(ctx, words, word)), expected, words)
        self.assertIn("base", kodemachine.candidates(ctx, ["help"], ""))


class TabTest(Case):
    """completion: the Tab key in the three real shells, and without UTM."""

    def setUp(self) -> None:
        super().setUp()
        self.image()
        self.vm("alpha", "started")
        self.vm("beta-2")
        self.utm.add("Windows 11")
        self.write(os.path.join(self.bin, "kodemachine"), f'#!/bin/sh\nexec {shlex.join(self.command())} "$@"\n', 0o755)

    def offered(self, line: str, code: int = 0) -> set[str]:
        """The words that the program offers for the last word of a command line; stderr is empty."""
        result = self.km("__complete", "--", *line.split(" "))
        self.assertEqual((result.code, result.err), (code, ""), line)
        return {word.partition("\t")[0] for word in result.out.splitlines()}

    # -- in the shells

    # What is typed, and what is there after Tab.
    TYPED = (
        ("kodemachine sta", "kodemachine sta"),         # start, status
        ("kodemachine al", "kodemachine alpha "),
        ("kodemachine stop --fo", "kodemachine stop --force "),
        ("kodemachine start --base ko", f"kodemachine start --base {IMAGE} "),
        ("kodemachine cp be", "kodemachine cp beta-2:"),
        ("kodemachine cp beta-2:", "kodemachine cp beta-2:"),       # Tab once more
        ("kodemachine cp files/tw", "kodemachine cp files/two\\ words "),
        ("kodemachine cp alpha:notes files/fo", "kodemachine cp alpha:notes files/folder/"),
        ("kodemachine alpha -- cat files/al", "kodemachine alpha -- cat files/alpine.txt "),
        ("kodemachine --config ~/files/al", "kodemachine --config ~/files/alpine.txt "),
        ("kodemachine stop -t ", "kodemachine stop -t files/"),     # the shell's own
    )

    def shell(self, name: str) -> str:
        path = shutil.which(name)
        if not path:
            self.skipTest(f"there is no {name} here")
        os.makedirs(os.path.join(self.home, "files", "folder"))
        for file in ("alpine.txt", "two words"):
            os.close(os.open(os.path.join(self.home, "files", file), os.O_CREAT))
        return path

    def type_all(self, *argv: str, options: str = "") -> None:
        """Types each line and Tab in an interactive shell, and compares the completed line, which echo prints.

        `options`: a command line that the person's own startup file has.
        """
        terminal = Terminal(argv, {**self.environment, "TERM": "xterm", "PS1": "> "}, self.home)
        self.addCleanup(terminal.close)
        load = f'eval "$(kodemachine completion {os.path.basename(argv[0])})"'
        terminal.send(f"stty cols 200; {options}\r{load}\r".encode())
        for typed, completed in self.TYPED:
            terminal.send(typed.encode() + b'\tx\x01echo "<\x05>"\r')      # an x, because zsh removes a last blank
            found = terminal.expect(rb"[\r\n](?:\x1b\[J)?<([^>\r\n]*)>\r\n").group(1).decode()
            self.assertEqual(found, completed + "x", options)
        terminal.send(b"exit\r")
        self.assertEqual(terminal.wait(), 0)

    def test_completion_is_quick_and_silent_when_utm_is_away(self) -> None:
        self.assertLessEqual(kodemachine.GLANCE, 2)
        faults: tuple[dict[str, Any], ...] = ({"hang": True}, {"error": -1743}, {"empty": True}, {"crash": "TRAP"})
        for fault in faults:
            self.utm.clear_faults()
            self.utm.fault("list", **fault)
            before = len(self.utm.calls())
            self.assertEqual(self.offered("stop "), set(), fault)
            self.assertEqual(len(self.utm.calls()) - before, 1, "it asks once")
        self.config(utmctl="/nonexistent")
        self.assertEqual(self.offered(""), COMMAND_WORDS)
        self.write(self.config(), "{")
        self.assertEqual(self.offered("stop "), set())

    def test_completion_works_in_bash(self) -> None:
        self.type_all(self.shell("bash"), "--noprofile", "--norc", "-i")

    def test_completion_works_in_bash_with_other_options(self) -> None:
        bash, options = self.shell("bash"), "IFS=xa; set -u -o posix; shopt -s failglob nullglob nocasematch"
        self.type_all(bash, "--noprofile", "--norc", "-i", options=options)

    def test_completion_works_in_zsh_with_other_options(self) -> None:
        zsh = self.shell("zsh")
        options = "IFS=xa; setopt ksh_arrays sh_word_split no_unset null_glob ignore_braces glob_subst rc_expand_param"
        self.type_all(zsh, "-f", "-i", options=options)

    def test_completion_works_in_zsh(self) -> None:
        self.type_all(self.shell("zsh"), "-f", "-i")

    def test_completion_works_in_zsh_from_a_folder_of_functions(self) -> None:
        zsh = self.shell("zsh")
        self.write("_kodemachine", kodemachine.COMPLETIONS["zsh"])
        script = f"fpath+=({shlex.quote(self.home)}); autoload -Uz compinit; compinit -u; echo $_comps[kodemachine]"
        self.assertEqual(self.run_program([zsh, "-f", "-c", script]), (0, "_kodemachine\n", ""))

    def test_completion_works_in_fish(self) -> None:
        lines = [typed for typed, _ in self.TYPED]
        script = "kodemachine completion fish | source; for line in $argv; echo; complete -C $line; end"
        result = self.run_program([self.shell("fish"), "--no-config", "-c", script, *lines])
        self.assertEqual((result.code, result.err), (0, ""))
        for (typed, completed), answer in zip(self.TYPED, result.out.lstrip("\n").split("\n\n")):
            words = [word.partition("\t")[0] for word in answer.splitlines()]
            if typed.endswith(":"):         # fish offers files, too
                self.assertEqual(words[0], typed.rpartition(" ")[2])
            elif typed == completed:
                self.assertIn(words, ([], ["start", "status"]), typed)
            else:
                self.assertEqual(words, [completed.rpartition(" ")[2] or shlex.split(completed)[-1]], typed)


def explained(*words: str) -> str:
    """The output of a command that prints its help."""
    with mock.patch("sys.stdout", new=io.StringIO()) as stdout, contextlib.suppress(SystemExit):
        kodemachine.run_command(words, kodemachine.Terminal(), kodemachine.Interrupts())
    return stdout.getvalue()


class HelpTest(unittest.TestCase):
    """help: of every command, with examples."""

    def test_help_of_every_command_mentions_its_options(self) -> None:
        for name, entry in kodemachine.COMMANDS.items():
            text = explained("help", *name.split())
            self.assertEqual(text, explained(*name.split(), "--help"))
            self.assertRegex(text, rf"^usage: kodemachine {name} ")
            self.assertEqual("-- command ..." in text, name in kodemachine.TAKES_REST, name)
            for alias in entry.aliases:
                self.assertEqual(explained("help", *name.split()[:-1], alias), text)
            for names, how in entry.options:
                shown = how.get("metavar") or ",".join(how.get("choices", [])) or names[0]
                for option in [n for n in names if n.startswith("-")] or [shown]:
                    self.assertIn(option, text, name)
                self.assertTrue(how.get("help"), (name, names))
        top = explained("help")
        self.assertEqual(top, explained("--help"))
        self.assertEqual(sorted(re.findall(r"(?m)^  ([a-z][a-z-]*)", top)), sorted(COMMAND_WORDS))

    def test_examples_of_every_command_can_be_parsed(self) -> None:
        for name, entry in kodemachine.COMMANDS.items():
            self.assertEqual(bool(entry.examples), not entry.hidden, name)
            for example in entry.examples:
                words, rest, _ = kodemachine.split_command_line(shlex.split(example))
                options, unknown = kodemachine.build_parser().parse_known_args(words)
                self.assertEqual((options.run, unknown), (entry.run, []), example)
                self.assertTrue(rest is None or name in kodemachine.TAKES_REST, example)
        self.assertIn("\n\nexamples:\n  kodemachine stop project-alpha\n", explained("help", "stop"))

    def test_command_group_has_its_own_help(self) -> None:
        group, one = explained("base"), explained("base", "list", "--help")
        self.assertEqual([explained("help", "base"), explained("base", "--help")], [group, group])
        self.assertEqual(explained("help", "base", "list"), one)
        self.assertIn(kodemachine.GROUPS["base"], group)
        self.assertRegex(group, r"(?m)^ +seal +prepare a machine")
        self.assertRegex(one, "^usage: kodemachine base list ")


class FirstScreenTest(Case):
    """`kodemachine` without arguments."""

    END = "\n\nAll commands: kodemachine help"
    AWAY = "the machines are not shown: {}; see: kodemachine doctor" + END

    def said(self) -> str:
        """Runs `kodemachine`, and returns its output after the five example commands."""
        five = "\n".join(f"  {line}" for line in kodemachine.EPILOG.splitlines())
        self.assertEqual(five.count("\n"), 4)
        result = self.km()
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertIn(five, result.out)
        return result.out.partition(five)[2].strip()


    def test_it_has_what_a_newcomer_needs_and_asks_nothing_of_utm(self) -> None:
        lines = "".join(f"  {line}\n" for line in kodemachine.EPILOG.splitlines())
        self.assertEqual(lines.count("\n"), 5)
        screen = f"""{kodemachine.TITLE}

{lines}
To create the first image: kodemachine base create v0.1.0
To check this Mac and UTM: kodemachine doctor
All commands: kodemachine help
"""
        self.image()
        self.utm.fault("list", error=-1743)
        for words in ((), ("-v",), ("-q",)):
            self.assertEqual(self.km(*words), (0, screen, ""))
        with open(self.config(), "w", encoding="utf-8") as file:
            file.write("{")
        self.assertEqual(self.km(), (0, screen, ""))
        self.assertEqual(self.utm.calls(), [])
        self.assertFalse(os.path.exists(self.state))


    def test_help_is_wrapped_at_words_and_commands_are_not(self) -> None:
        for words in ((), ("help",), ("help", "start")):
            plain = self.km(*words, env={"COLUMNS": "80"}).out
            for columns in (40, 80):
                with self.subTest(words, columns=columns):
                    terminal = self.screen(*words, columns=columns)
                    self.assertEqual(terminal.wait(), 0)
                    lines = terminal.seen.decode().splitlines()
                    self.assertEqual([line for line in lines if len(line) > columns and "kodemachine" not in line], [])
                    self.assertEqual(" ".join(lines).split(), plain.split(), "the same words")
                    for command in re.findall(r"(?m)(?:^  |: )(kodemachine [^\[\n]+?)(?:  .*)?$", plain):
                        found = [line for line in lines if line.endswith(command) or command + "  " in line]
                        self.assertTrue(found, f"{command} is broken")


class MistakesTest(Case):
    """Mistyped command lines: the message and the hint."""

    GREETERS = 1


    def test_label_that_resembles_an_existing_one_is_pointed_out(self) -> None:
        self.remove("kodeimage-v0.2.0")
        self.utm.add("km-project-alpha")
        self.utm.add("km-web1")
        result = self.km("ssh", "project-alhpa")
        self.assertEqual((result.code, result.err.partition("\n")[0]),
                         (3, "kodemachine: there is no machine project-alhpa; did you mean 'project-alpha'?"))
        for label, words in (("project-alhpa", "project-alhpa is a new machine; project-alpha exists as well"),
                             ("web2", ""), ("web1x", "web1 exists as well")):
            result = self.km("start", "-d", label)      # there is no image
            self.assertEqual((result.code, "exists as well" in result.err), (3, bool(words)), result.err)
            self.assertIn(words, result.err)

    def test_unwritable_output_is_an_error_without_a_traceback(self) -> None:
        if not os.path.exists("/dev/full"):
            return  # only Linux has a disk that is always full
        self.utm.add("km-a")
        with open("/dev/full", "wb") as full:
            process = subprocess.Popen(
                self.command("list"), stdout=full, stderr=subprocess.PIPE, env=self.environment, cwd=self.home
            )
            said = process.communicate(timeout=60)[1].decode()
        self.assertEqual((process.returncode, said.count("\n")), (1, 2))
        self.assertIn("the output cannot be written: ", said)

    def setUp(self) -> None:
        super().setUp()
        self.use(ssh_user="me", stop_timeout=8)
        self.utm.option(addresses=[self.address])       # of all machines
        for tool in ("ssh", "scp"):
            with open(os.path.join(self.utm.folder, tool + ".real"), "w", encoding="utf-8") as file:
                file.write(shutil.which("true") or "/bin/true")
        with open(os.path.join(self.bin, "curl"), "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\nexit 6\n")       # there is no network
        os.chmod(file.name, 0o755)
        os.mkdir(os.path.join(self.home, ".ssh"))
        with open(os.path.join(self.home, ".ssh", "id_ed25519.pub"), "w", encoding="utf-8") as file:
            file.write(PUBLIC_KEY + "\n")

    # A command line, and parts of the first and of the following lines on stderr. The exit status is 2.
    MISTAKES: tuple[tuple[str, str, str], ...] = (
        ("sotp alpha", "unknown command 'sotp'; did you mean 'stop'?", "kodemachine stop alpha\n"),
        ("alpha hostname", "unknown command 'alpha'", "kodemachine alpha -- hostname; to start several:"),
        ("exec alpha hostname", "exec does not take 'hostname'", "goes after --: kodemachine exec alpha -- hostname\n"),
        ("stop alpha --now", "stop does not take '--now'", "kodemachine help stop"),
        ("-- hostname", "there is no label before --", "kodemachine project-alpha -- hostname\n"),
        ("list -- hostname", "list takes no command after --", "kodemachine project-alpha -- hostname\n"),
        ("help lsit", "unknown command 'lsit'; did you mean 'list'?", "kodemachine help list\n"),
        ("version", "'version' is reserved and cannot be", "Did you mean: kodemachine --version\n"),
        ("shell", "'shell' is reserved and cannot be a machine's label; did you mean 'ssh'?", "kodemachine help ssh\n"),
        ("start ls", "'ls' is reserved and cannot be a machine's label", "kodemachine help ls\n"),
        ("shell alpha", "unknown command 'shell'; did you mean 'ssh'?", "kodemachine ssh alpha\n"),
        ("-a", "kodemachine does not take '-a'", "See: kodemachine help"),
        ("launch", "there is no machine launch; did you mean 'start'?", "for example: kodemachine project-alpha\n"),
        ("destroy alpha", "unknown command 'destroy'; did you mean 'delete'?", "kodemachine delete alpha\n"),
        ("reboot alpha", "unknown command 'reboot'; did you mean 'restart'?", "kodemachine restart alpha\n"),
        ("ps", "there is no machine ps; did you mean 'list'?", "See: kodemachine help list\n"),
        ("rsync", "there is no machine rsync; did you mean 'cp'?", "See: kodemachine help cp\n"),
        ("stpo", "there is no machine stpo; did you mean 'stop'?", "of that name: kodemachine start stpo\n"),
        ("frob alpha", "unknown command 'frob'", "to start several: kodemachine start -d frob alpha\n"),
        ("alpha stop", "the command comes before the label", "kodemachine stop alpha; or, to run it in"),
        ("alpha status", "the command comes before the label", "kodemachine status alpha"),
        ("login alpha make x", "unknown command 'login'", "kodemachine ssh alpha -- make x\n"),
        ("up web db", "unknown command 'up'; did you mean 'start'?", "See: kodemachine help start\n"),
        ("version alpha", "did you mean '--version'?", "kodemachine --version\n"),
        ("-a ls", "-a goes after the command", "kodemachine ls -a\n"),
        ("--check base seal alpha", "--check goes after the command", "kodemachine base seal --check alpha\n"),
        ("config path x", "config path takes no other words", "kodemachine config path\n"),
        ("config unset", "config unset needs one key", "Keys: base_image, "),
        ("alpha ls", "unknown command 'alpha'", "in that machine: kodemachine alpha -- ls\n"),
        ("lst alpha", "unknown command 'lst'; did you mean 'list'?", "See: kodemachine help list\n"),
        ("-a list", "-a goes after the command", "kodemachine list -a\n"),
        ("-d start web", "-d goes after the command", "kodemachine start -d web\n"),
        ("-d web -- make", "--detach and a command exclude each other", "then: kodemachine web -- make\n"),
        ("list --config x", "/x does not exist", "To begin with the defaults: echo '{}' > "),
        ("list --frob", "list does not take '--frob'", "See: kodemachine help list\n"),
        ("-v list -q", "-v and -q exclude each other", "See: kodemachine help\n"),
        ("start a b", "several labels need --detach", "kodemachine start -d a b\n"),
        ("start -d a b --fresh", "need -y", "Add -y"),
        ("restart", "restart needs a label", "See: kodemachine help restart\n"),
        ("stop -t x", "'x' is not a positive number of seconds", "kodemachine help stop"),
        ("help bogus", "unknown command 'bogus'", "kodemachine help\n"),
        ("start alpha --memory much", "'much' is not a size of memory", "kodemachine help start"),
        ("start alpha --disposable", "start does not take '--disposable'", "See: kodemachine help start\n"),
        ("suspend alpha --save", "suspend does not take '--save'", "See: kodemachine help suspend\n"),
    )

    def test_each_gets_one_line_and_the_next_step(self) -> None:
        for words, message, hint in self.MISTAKES:
            with self.subTest(words):
                result = self.km(*words.split())
                self.assertEqual((result.code, result.out), (2, ""))
                first, _, second = result.err.partition("\n")
                self.assertIn(message, first)
                self.assertIn(hint, second)
                self.assertEqual(self.utm.names(), ["kodeimage-v0.2.0"])
                self.try_suggestions(words, result)
                for name in set(self.utm.names()) - {"kodeimage-v0.2.0"}:
                    self.remove(name)

    def test_with_json_a_mistake_is_an_object(self) -> None:
        for words in ("list -q --json", "list --json --format ansible"):
            error = json.loads(self.km(*words.split()).err)["error"]
            self.assertEqual((error["code"], error["hint"]), ("usage", "See: kodemachine help list"))
            self.assertIn("one of -q, --json and --format", error["message"])

    def test_common_options_are_accepted_anywhere_before_the_dashes(self) -> None:
        other = os.path.join(self.folder, "other.json")
        with open(other, "w", encoding="utf-8") as file:
            json.dump({**self.uses, "prefix": "x-"}, file)
        self.utm.add("km-a", status="started", ips=[self.address])
        self.utm.add("x-b", status="started", ips=[self.address])
        for words in (("--config", other, "-q", "ssh", "b"), ("ssh", "--config", other, "-q", "b"),
                      ("ssh", "b", "--quiet", f"--config={other}"), ("-q", "b", "--config", other)):
            self.assertEqual(self.km(*words, "--", "true"), (0, "", ""), words)
        self.assertIn("utmctl list", self.km("stop", "a", "-v").err)
        self.assertEqual(self.km("base", "ls", "-q").code, 0)
        self.assertEqual((self.km("list", "-q").out, self.km("-q", "ls").out), ("a\n", "a\n"))

    @staticmethod
    def suggestions(err: str) -> list[str]:
        """The commands that an error or a hint suggests, in their order."""
        hints = re.sub(r"(?m)^kodemachine: (?!warning: ).*", "", err)
        if err.startswith('{"error":'):
            hints = json.loads(err)["error"]["hint"]
        return re.findall(r"\bkodemachine ([^;\n]+?)(?=;|\.?$|\. [A-Z])", hints, re.MULTILINE)

    def try_suggestions(self, situation: str, result: Result) -> list[str]:
        """Runs each suggested command in the state in which it was suggested; it must be accepted."""
        found = self.suggestions(result.err)
        for suggestion in found:
            self.assertNotRegex(suggestion, r"\b[A-Z]{3,}\b", situation)
            again = self.km(*shlex.split(suggestion))
            self.assertNotIn("Traceback", again.err)
            self.assertNotEqual(again.code, 2, f"{situation}: {suggestion}: {again.err}")
            if again.code:
                self.assertNotEqual(again.err.partition("\n")[0], result.err.partition("\n")[0], suggestion)
        return found

    def test_every_suggested_command_is_accepted(self) -> None:
        started, stopped = {"km-web": "started"}, {"km-web": "stopped"}
        no_image: dict[str, str] = {"kodeimage-v0.2.0": ""}
        for words, fleet, expected in (
            ("-d web", {}, ["start -d web"]),
            ("start a b -- true", {}, ["start -d a b", "a -- true", "b -- true"]),
            ("start -d a -- true", {}, ["start -d a", "a -- true"]),
            ("start web --rm -d", {}, ["start -d web"]),
            ("start web --rm --fresh", started, ["delete --force web"]),
            ("base use v9.9.9", {}, []),
            ("snapshot web", stopped, ["clone web web-2"]),
            ("clone web", stopped, ["help clone"]),
            ("clone web web", stopped, ["clone web web-2"]),
            ("clone web db", started, ["stop web"]),
            ("copy", {}, ["help cp"]),
            ("scp", {}, ["help cp"]),
            ("transfer notes web:", started, ["cp notes web:"]),
            ("cp notes web:", stopped, ["start -d web"]),
            ("mount . web", started, ["cp -r . web:", "ssh-config --install"]),
            ("mount", {}, ["help cp"]),
            ("web --rm", started, ["web", "delete --force web"]),
            ("delete web", started, ["delete --force web"]),
            ("up", {}, ["project-alpha"]),
            ("pruge", stopped, ["help purge", "start pruge"]),
            ("list", no_image, ["base create v0.1.0"]),
            ("base list", no_image, ["base create v0.1.0"]),
            ("web", no_image, ["base create v0.1.0"]),
            ("list", {}, ["project-alpha"]),
            ("suspend web", stopped, ["start -d web"]),
            ("resume web", stopped, ["start -d web"]),
            ("ip web", stopped, ["start -d web"]),
            ("exec web -- true", stopped, ["start -d web"]),
            ("exec web", started, ["exec web -- ip addr"]),
            ("attach web", stopped, ["start -d web"]),
            ("ssh web", {}, ["web"]),
            ("stop web", {}, ["web"]),
            ("config get ssh_user you", {}, ["config set ssh_user you"]),
            ("config set boot_timeout x", {}, ["config unset boot_timeout"]),
            ("purge --json", {}, ["purge --dry-run --json"]),
            ("ssh-config", {}, ["ssh-config --install"]),
        ):
            with self.subTest(words, fleet=fleet):
                for name in self.utm.names():
                    self.remove(name)
                shutil.rmtree(os.path.join(self.home, ".local"), ignore_errors=True)
                self.utm.add("Windows 11")
                for name, status in {"kodeimage-v0.2.0": "stopped", **fleet}.items():
                    if status:
                        self.utm.add(name, status=status, ips=[self.address])
                found = self.try_suggestions(words, self.km(*words.split()))
                self.assertEqual(found, expected)

    def test_a_state_folder_that_cannot_be_made_is_named(self) -> None:
        for name, problem in (("file", "/kodemachine: Not a directory"), ("link", ": No such file or directory")):
            with self.subTest(name):
                above = os.path.join(self.folder, name)
                if name == "file":
                    os.close(os.open(above, os.O_CREAT))
                else:
                    os.symlink("nowhere", above)
                result = self.run_program(self.command("start", "-d", "a"), env={"XDG_STATE_HOME": above})
                self.assert_says(result, 1, above + problem)
                self.assertNotIn("Remove it", result.err)
                self.assertEqual(self.suggestions(result.err), [])

    def test_a_read_only_state_folder_is_named_with_its_owner(self) -> None:
        if os.geteuid() == 0:
            return      # root may write everywhere
        above = os.path.join(self.folder, "read-only")
        os.mkdir(above, 0o500)
        result = self.run_program(self.command("start", "-d", "a"), env={"XDG_STATE_HOME": above})
        self.assertEqual(result.code, 1, result.err)
        self.assertIn(f"{above}/kodemachine: Permission denied\n", result.err)
        self.assertIn(f"ls -ld {shlex.quote(above)}\n", result.err)


# ---- the whole: output and exit statuses


class OutputTest(Case):
    """Output for a person and for a pipe."""

    def test_results_are_alone_on_stdout(self) -> None:
        sshd = self.with_sshd()
        for flag in ((), ("-v",), ("-q",)):
            result = self.km(*flag, "start", "-d", "a")
            self.assertEqual((result.code, result.out), (0, sshd.hosts[0] + "\n"))
            self.assertEqual(result.err == "", flag == ("-q",) or not flag and "a" in self.utm.names(), flag)

    def test_piped_progress_is_one_plain_line_per_step(self) -> None:
        self.with_sshd()
        err = self.km("start", "-d", "a", env={"TERM": "xterm-256color"}).err
        self.assertEqual(
            err.splitlines(),
            [
                f"cloning {IMAGE} to km-a", "starting km-a", "checking the network address of km-a",
                "waiting for ssh on km-a", "naming the guest a",
            ],
        )

    def test_verbose_shows_every_call_with_outcome_status_and_time(self) -> None:
        uuid = self.vm("a", "started")
        self.utm.fault("ip-address", error=-1712)
        err = self.km("-v", "list").err
        self.assertRegex(err, r"(?m)^\+ utmctl list: done, exit 0, \d+\.\d\d s$")
        self.assertRegex(err, rf"(?m)^\+ utmctl ip-address {uuid}: transient -1712, exit 0, \d+\.\d\d s$")

    def test_step_on_a_terminal_is_one_live_line_unless_the_terminal_is_dumb(self) -> None:
        for env, live, colours in (
            ({"TERM": "xterm"}, True, True),
            ({"TERM": "dumb"}, False, False),
            ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
            ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ):
            with self.subTest(env):
                label = f"m{len(self.utm.names())}"
                self.vm(label, "started")
                terminal = self.screen("stop", label, columns=70, **env)
                self.assertEqual(terminal.wait(), 0)
                text = terminal.seen.decode()
                self.assertEqual(("\r\x1b[K" in text, bool(re.search("\x1b\\[[0-9]*m", text))), (live, colours), text)
                plain = re.sub("\x1b\\[[0-9]*m", "", text)
                lines = [
                    re.split("\r\x1b\\[K", line)[-1] for line in plain.replace("\r\n", "\n").rstrip("\n").split("\n")
                ]
                self.assertEqual(sum(line.startswith("stopping ") for line in lines), 1, lines)
                self.assertIn(f"{label} stopped", lines)
                self.assertNotIn("\x1b", "".join(lines))

    def test_elapsed_seconds_are_shown_during_a_step(self) -> None:
        self.vm("a", "started", request_seconds=None)
        terminal = self.screen("stop", "a", TERM="xterm")
        terminal.expect(rb"\r\x1b\[Kstopping a  [1-9] s")
        self.utm.change("km-a", status="stopped")
        self.assertEqual(terminal.wait(), 0)

    def test_live_line_is_cut_to_the_width_and_keeps_its_clock(self) -> None:
        label = "a-machine-with-quite-a-long-name-for-a-narrow-terminal"
        uuid = self.vm(label, "started", request_seconds=None)
        for columns, room in ((30, 29), (0, 79)):       # 0: the terminal has no size
            terminal = self.screen("stop", label, columns=columns, TERM="xterm")
            shown = terminal.expect(rb"\r\x1b\[K(stopping a-mach[^\r]*)  [1-9] s").group(1).decode()
            self.assertEqual(len(shown), min(len("stopping " + label), room - 5))
            self.utm.change(uuid, status="stopped")
            self.assertEqual(terminal.wait(), 0)
            self.assertRegex(terminal.seen.decode(), f"\\[K(\x1b\\[2m)?stopping {label}  \\d+ s", "whole at its end")
            self.utm.change(uuid, status="started")

    @staticmethod
    def rows(terminal: Terminal) -> list[str]:
        """The rows on the screen: the output, after what was painted over was erased as these codes do it."""
        rows = [""]
        for part in re.split("(\r\x1b\\[K|\x1b\\[A\x1b\\[K|\r\n)", terminal.seen.decode()):
            if part == "\r\n":
                rows.append("")
            elif part == "\r\x1b[K":
                rows[-1] = ""
            elif part == "\x1b[A\x1b[K":
                rows[-2:] = [""]
            else:
                rows[-1] += re.sub("\x1b\\[[0-9]*m", "", part)
        return rows

    def test_each_of_several_starts_is_one_live_line_which_becomes_its_address(self) -> None:
        self.config(ssh_port=self.sshd(2).port)
        for label in ("web", "database", "off"):
            self.vm(label, agent_after=1.2)
        self.utm.fault("start", vm="km-off", error=-2700, string="Disk on fire.")
        terminal = self.screen("start", "-d", "web", "database", "off", TERM="xterm")
        terminal.expect(rb"web       waiting for ssh  1 s\r\ndatabase  waiting for ssh  1 s\r\noff       \w")
        self.assertEqual(terminal.wait(), 1)
        *rows, ready, end = self.rows(terminal)
        self.assertIn("kodemachine: km-off does not start, it stays stopped: Disk on fire.", rows)
        addresses = "\n".join(sorted(row for row in rows if "127" in row))
        self.assertRegex(addresses, r"\Adatabase  127\.0\.0\.\d  \d s\nweb       127\.0\.0\.\d  \d s\Z")
        self.assertRegex(ready, "ready: (web, database|database, web); to connect: kodemachine ssh ")
        self.assertEqual((end, len(rows)), ("", 4), rows)

    def test_live_lines_fit_into_a_small_terminal_and_end_cleanly(self) -> None:
        labels = [f"machine-number-{n}" for n in range(6)]
        for label in labels:
            self.vm(label, "started", ignores_power_key=True)
        resize = ["/bin/sh", "-c", 'stty cols 30 rows 4 && exec "$@"', "sh"]
        terminal = Terminal([*resize, *self.command("stop", *labels)], {**self.environment, "TERM": "xterm"}, self.home)
        self.addCleanup(terminal.close)
        terminal.expect(rb"stoppi  1 s\r\n\S+  stoppi  1 s\r\n\S+  stoppi  1 s")
        self.assertEqual([len(row) for row in self.rows(terminal)], [29] * 3)
        # A terminal that becomes narrower breaks each line into two.
        fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 4, 20, 0, 0))
        terminal.expect(rb"\r\x1b\[K(\x1b\[A\x1b\[K){5}machine-number")
        terminal.send(b"\x03")
        self.assertEqual(terminal.wait(), 130)
        rows = self.rows(terminal)
        ended = sorted(row.partition("  ")[0] for row in rows if row.startswith("machine-number"))
        self.assertEqual((ended, rows[-1]), (labels, ""), terminal.seen)
        self.assertIn("kodemachine status", "\n".join(rows))

    def test_commands_for_several_machines_leave_one_line_each(self) -> None:
        for label in ("a", "b"):
            self.vm(label, "started")
        results = {"suspend": "suspended", "resume": "resumed", "stop": "stopped", "delete": "deleted"}
        for verb, result in results.items():
            terminal = self.screen(verb, "a", "b", TERM="xterm")
            self.assertEqual(terminal.wait(), 0)
            rows = sorted(row.split(",")[0] for row in self.rows(terminal))
            self.assertEqual(rows, ["", f"a {result}", f"b {result}"])

    def test_hint_is_wrapped_and_its_command_is_bold_only_on_a_terminal(self) -> None:
        self.vm("a-machine-with-a-name", "started")
        plain = self.km("delete", "a-machine-with-a-name", env={"TERM": "xterm", "COLUMNS": "20"}).err
        self.assertEqual(plain, "kodemachine: km-a-machine-with-a-name is running\n  To stop and delete it: "
                                "kodemachine delete --force a-machine-with-a-name\n")
        for env, bold, normal in (({"TERM": "xterm"}, "\x1b[1m", "\x1b[0m"), ({"TERM": "dumb"}, "", "")):
            terminal = self.screen("delete", "a-machine-with-a-name", columns=50, **env)
            self.assertEqual(terminal.wait(), 4)
            self.assertTrue(terminal.seen.decode().endswith(
                f"  To stop and delete it:\r\n    {bold}kodemachine delete --force a-machine-with-a-name{normal}\r\n"))

    def test_message_about_kodemachine_is_not_taken_for_a_command(self) -> None:
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import kodemachine as k\n"
                "k.Terminal().error(k.KodeError('kodemachine has no record of machine a', 'See: kodemachine list'))")
        resize = ["/bin/sh", "-c", 'stty cols 40 && exec "$@"', "sh"]
        argv = [*resize, *self.PYTHON, "-c", code, HERE]
        terminal = Terminal(argv, {**self.environment, "TERM": "xterm"}, self.home)
        self.addCleanup(terminal.close)
        self.assertEqual(terminal.wait(), 0)
        self.assertEqual(terminal.seen, b"\x1b[31mkodemachine:\x1b[0m kodemachine has no record\r\n"
                                        b"  of machine a\r\n  See: \x1b[1mkodemachine list\x1b[0m\r\n")

    def test_quiet_prints_nothing(self) -> None:
        self.image()
        self.vm("a", "started")
        for args in (("stop", "a"), ("purge", "-y"), ("list",)):
            self.assertEqual(self.km("-q", *args), (0, "", ""), args)
        self.assert_says(self.km("-q", "stop", "a"), 3, "no machine a")
        self.vm("on")
        for line in ("-q list", "list -q", "list --no-ip --quiet"):
            self.assertEqual(self.km(*line.split()), (0, "on\n", ""), line)
        for label, args in (("b", ("-q", "stop")), ("c", ("stop", "-q"))):
            self.vm(label, "started", request_seconds=1.5)
            terminal = self.screen(*args, label, TERM="xterm")
            self.assertEqual((terminal.wait(), terminal.seen), (0, b""))

    def test_signal_ends_all_parallel_work(self) -> None:
        for label in ("a", "b", "c"):
            self.vm(label, "started", ignores_power_key=True)
        process = self.start_km("stop", "--all")
        wait_for(lambda: len({args[0] for args in self.asked("stop")}) == 3)
        process.send_signal(signal.SIGTERM)
        result = self.ended(process)
        self.assertEqual((result.code, "Traceback" in result.err), (143, False), result.err)
        self.assertNoChildrenLeft()

    def test_parser_is_built_only_for_the_command_in_use(self) -> None:
        for words, made in (([], 1), (["--version"], 1), (["-q", "ls", "--json"], 2), (["start", "alpha"], 2)):
            with mock.patch.object(kodemachine, "Parser", wraps=kodemachine.Parser) as parser:
                kodemachine.build_parser(words)
            self.assertEqual(parser.call_count, made, words)

    def test_modules_that_are_not_needed_are_not_loaded(self) -> None:
        self.vm("a")
        modules = "; print('MODULES', *sorted(sys.modules), file=sys.stderr)"
        argparse = (
            "import argparse, sys; p = argparse.ArgumentParser(); p.add_subparsers().add_parser('x'); p.format_help()"
        )
        start = "import atexit, sys; sys.path.insert(0, sys.argv.pop(1)); atexit.register(lambda: exec(sys.argv[0]))"

        def loaded(code: str, *args: str) -> set[str]:
            result = self.run_program([sys.executable, "-IS", "-c", code, *args])
            return set(result.err.rpartition("MODULES ")[2].split())

        def loaded_by(*args: str) -> set[str]:
            """The modules beyond those that argparse loads itself, which depend on the version."""
            where = os.path.dirname(KODEMACHINE)
            code = (
                f"{start.replace('exec(sys.argv[0])', modules[2:].replace(chr(39), chr(34)))}\n"
                "import kodemachine; sys.exit(kodemachine.main(sys.argv[1:]))"
            )
            found = loaded(code, where, *args)
            self.assertIn("kodemachine", found)
            return found - loaded(argparse + modules)

        heavy = {
            "asyncio", "concurrent", "concurrent.futures", "ctypes", "dataclasses", "difflib", "email", "hashlib",
            "http", "inspect", "logging", "multiprocessing", "pathlib", "queue", "random", "tempfile",
            "typing_extensions", "urllib", "uuid",
        }
        quick = heavy | {"base64", "calendar", "plistlib", "socket", "termios", "xml"}
        self.assertEqual(loaded_by("--version") & quick, set())
        self.assertEqual(loaded_by("list", "--no-ip", "-q") & quick, set())
        self.assertEqual(loaded_by("list") & (heavy - {"ctypes"} if sys.platform == "darwin" else heavy), set())


class ExitStatusTest(Case):
    """Every documented exit status, and the code of an error in JSON."""

    GREETERS = 1
    CODES = {1: "error", 2: "usage", 3: "not-found", 4: "wrong-state", 5: "utm-unreachable", 6: "timeout"}

    # The status, a command line, and what is wrong with UTM's `list`. `on` runs but has no agent, `deaf` ignores its
    # power key, and there are two of `twin`.
    CASES: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (0, "list", {}),
        (0, "stop off", {}),
        (0, "status --json off", {}),
        (0, "config unset prefix", {}),
        (0, "purge --older-than 1d -y", {}),            # nothing to do
        (1, "ip --all on", {}),                         # it has failed
        (2, "list --json --bogus", {}),                 # usage
        (2, "--config broken.json list --json", {}),
        (2, "lsit", {}),                                # more likely a typo than a machine's name
        (2, "purge", {}),                               # nobody to say yes
        (2, "start off --fresh", {}),
        (2, "restart", {}),
        (2, "config unset nonsense", {}),
        (3, "ssh nope", {}),                            # no such machine
        (3, "restart nope", {}),
        (3, "status nope --json", {}),
        (3, "start -d new --base nope", {}),            # no such image
        (4, "ip off", {}),                              # the wrong state
        (4, "suspend off", {}),
        (4, "resume off", {}),
        (4, "status twin --json", {}),
        (4, "delete on", {}),
        (4, "start -d off --cpus 2", {}),
        (5, "list", {"error": -1743}),                  # UTM refuses
        (5, "status --json off", {"error": -1743}),
        (5, "list --json", {"crash": "TRAP"}),          # UTM cannot be reached
        (5, "list --json", {"no_app": True}),
        (6, "stop deaf -t 0.2", {}),                    # the time limit has passed
        (6, "restart deaf -t 0.2", {}),
        (6, "list --json", {"hang": True}),
        (6, "stop deaf nope -t 0.2", {}),               # several: the first that failed
        (3, "stop nope deaf -t 0.2", {}),
        (7, "alpha -- exit-7", {}),                     # ssh's own, once it has started
        (9, "exec alpha -- /bin/sh -c exit\\ 9", {}),   # the command's own, once it has started
        (0, "attach alpha --timeout 0.1", {}),          # a session is no failure, however it ends
    )

    def setUp(self) -> None:
        super().setUp()
        master, slave = os.openpty()
        for handle in (master, slave):
            self.addCleanup(os.close, handle)
        self.vm("alpha", "started", serials=[{"kind": "ptty", "path": os.ttyname(slave)}])
        self.vm("off")
        self.vm("on", "started", agent_after=None)
        self.vm("deaf", "started", ignores_power_key=True)
        for _ in range(2):
            self.vm("twin")
        self.write("broken.json", "{")
        ssh = os.path.join(self.folder, "ssh that ends with 7")
        self.write(ssh, "#!/bin/sh\nexit 7\n", 0o755)
        self.real_tool("ssh", ssh)

    def test_exit_statuses_are_the_documented_ones_in_each_case(self) -> None:
        limits = {**self.WITH_HANGING["LIMITS"], "list": 0.3}
        for status, line, fault in self.CASES:
            with self.subTest(line):
                self.utm.clear_faults()
                if fault:
                    self.utm.fault("list", **fault)
                impatient = {"LIMITS": limits, "LOOK_LIMIT": 0.6} if "hang" in fault else {}
                result = self.km(*shlex.split(line), patience=impatient)
                self.assertEqual(result.code, status, result.err)
                if status in self.CODES and "--json" in line:
                    self.assertEqual(result.out, "")
                    error = json.loads(result.err)["error"]
                    self.assertEqual((list(error), error["code"]), (["code", "message", "hint"], self.CODES[status]))
                    self.assertTrue(error["message"] and error["hint"])
                elif status in self.CODES:
                    self.assertRegex(result.err, r"(?m)^kodemachine: .+\n  .+", "what it is, and what to do next")

    def test_answer_no_exits_1(self) -> None:
        terminal = self.screen("purge")
        terminal.expect(rb"\[y/N\] ")
        terminal.send(b"n\n")
        self.assertEqual(terminal.wait(), 1)

    def test_closed_stdout_exits_141_without_a_message(self) -> None:
        self.vm("a")
        for args in (
            (),
            ("list",),
            ("list", "--json"),
            ("status", "off"),
            ("--help",),
            ("help", "list"),
            ("--version",),
            ("config",),
        ):
            process = self.start_km(*args)
            assert process.stdout and process.stderr
            process.stdout.close()
            self.assertEqual((process.wait(60), process.stderr.read()), (141, b""), args)

    def test_signal_exits_128_plus_its_number_and_leaves_no_child(self) -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            uuid = self.vm(f"deaf{number}", "started", ignores_power_key=True)
            process = self.start_km("stop", f"deaf{number}")
            self.wait_until_asked("stop", uuid)
            process.send_signal(number)
            result = self.ended(process)
            self.assertEqual((result.code, "Traceback" in result.err), (128 + number, False), result.err)
            self.assertNoChildrenLeft()

    def test_closed_handles_do_no_harm(self) -> None:
        for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
            for words, code in (("list", 0), ("exec off --input -- true", 4), ("attach off", 4), ("purge", 2)):
                script = f'exec "$@" {closed}'
                result = self.run_program(["/bin/sh", "-c", script, "sh", *self.command(*words.split())])
                self.assertEqual((result.code, "Traceback" in result.err), (code, False), (closed, words, result.err))

    def test_full_disk_is_reported_for_help_too(self) -> None:
        for words in (["--version"], ["help"], ["list", "--help"]):
            result = self.run_program(["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh", *self.command(*words)])
            self.assertEqual((result.code, result.err.count("\n")), (1, 2), result.err)
            self.assertIn("the output cannot be written", result.err)

    def test_options_may_stand_between_labels(self) -> None:
        for line, code in (("stop off -t 5 -f off", 0), ("delete off -f nope", 3), ("start off --fresh on", 2)):
            result = self.km(*line.split())
            self.assertEqual((result.code, "does not take" in result.err), (code, False), result.err)
        self.assertIn("+ utmctl list: done", self.km("list", "-v").err)
        self.assertEqual(self.km("start", "off", "-q", "--base", "nosuch").err.count("\n"), 2)
        for line in ("stop off -t 5 --frce", "status off -v on", "stop off -t 5 on --frce"):
            self.assertIn("does not take", self.km(*line.split()).err)

    def test_system_errors_are_reported_without_a_traceback(self) -> None:
        gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
        result = self.run_program(["/bin/sh", "-c", gone, "sh", *self.command("start", "-d", ".")])
        self.assertEqual((result.code, result.err.partition(":")[2].partition("\n")[0]),
                         (2, " the current folder has no name: No such file or directory"), result.err)
        no_locks = (
            "import errno, fcntl\n"
            "def flock(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
            "fcntl.flock = flock\n"
        )
        result = self.run_program(self.command("stop", "off", before=no_locks))
        self.assertRegex(result.err, r"\Akodemachine: the system: No locks available\n  .+\n\Z")
        self.assertEqual(result.code, 1)

    def test_ctrl_c_while_the_program_is_loaded_prints_no_traceback(self) -> None:
        folder = os.path.join(self.folder, "checkout")
        program = self.write(os.path.join(folder, "kodemachine.py"), read_text(KODEMACHINE))
        # It is imported instead of Python's, because it is beside the program.
        self.write(os.path.join(folder, "argparse.py"), "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        self.assertEqual(self.run_program([sys.executable, program, "list"]), (-signal.SIGINT, "", ""))

    def test_signal_in_a_finalizer_is_not_lost(self) -> None:
        patch = (
            "import os, signal, subprocess\n"
            "def finalizer(popen, once=[]):\n"
            "    once.append(os.kill(os.getpid(), signal.SIGTERM)) if not once else None\n"
            "subprocess.Popen.__del__ = finalizer\n"
        )
        result = self.run_program(self.command("stop", "deaf", "--timeout", "10", before=patch))
        self.assertEqual(result.code, 128 + signal.SIGTERM)
        self.assertRegex(result.err, r"\Astopping deaf\nkodemachine: warning: UTM may still shut down km-deaf; .*\n\Z")
        self.assertNoChildrenLeft()

    def test_exit_statuses_and_error_codes_match_the_readme(self) -> None:
        classes = [kodemachine.KodeError, kodemachine.UsageError, kodemachine.NotFound, kodemachine.WrongState,
                   kodemachine.Unreachable, kodemachine.TimedOut]
        self.assertEqual({kind.status: kind.slug for kind in classes}, self.CODES)
        readme = self.read(os.path.join(HERE, "README.md"))
        rows = re.findall(r"(?m)^\| (\d+(?:, \d+)*) \|", readme)
        documented = {int(number) for row in rows for number in row.split(", ")}
        by_signal = {128 + getattr(signal, "SIG" + name) for name in ("HUP", "INT", "QUIT", "TERM", "PIPE")}
        self.assertEqual(documented, {0, *self.CODES, *by_signal})
        for word in (*self.CODES.values(), *JSON_KEYS, "addresses"):
            self.assertIn(f"`{word}`", readme)


# ---- the whole: calls to UTM, and their faults


class CallTest(Case):
    """Calls to utmctl and osascript."""

    GREETERS = 1

    def own_utmctl(self, *lines: str) -> None:
        """From now on utmctl is this shell script."""
        script = self.write(os.path.join(self.folder, "own utmctl"), "\n".join(["#!/bin/sh", *lines, ""]), 0o755)
        self.use(utmctl=script)

    def processes_during_list(self) -> str:
        self.utm.fault("list", hang=True, times=1)
        before = len(self.calls_of("list"))
        self.start_km("list")
        wait_for(lambda: len(self.calls_of("list")) > before)
        return self.processes().get(self.calls_of("list")[-1]["pid"], "")

    def test_calls_cannot_read_what_the_user_types(self) -> None:
        self.assertEqual(self.km("start", "-d", "alpha", stdin="typed\n").code, 0)
        calls = self.calls_of()
        self.assertGreater(len(calls), 5)
        self.assertEqual({call["stdin"] for call in calls}, {"null"})

    def test_hung_call_is_ended_with_all_its_children(self) -> None:
        self.own_utmctl('if [ "$1" = list ]; then "$0" child & fi', "sleep 30", "exit 0")
        result = self.spawn(code=6, patience={"LOOK_LIMIT": 0.6, "LIMITS": {**kodemachine.LIMITS, "list": 0.3}})
        self.assertIn("UTM gave no list within", result.err)

    def test_endless_output_is_neither_kept_nor_waited_for(self) -> None:
        self.own_utmctl("exec cat /dev/zero")
        limits = {**kodemachine.LIMITS, "list": 0.3}
        self.spawn(code=6, patience={"LOOK_LIMIT": 0.6, "LIMITS": limits, "MAX_ANSWER": 1 << 20})

    def test_guest_with_a_thousand_addresses_is_reached(self) -> None:
        others = [f"127.{n}.0.1" for n in range(1, 255)] + [f"fe80::{n}" for n in range(750)]
        self.utm.add("km-alpha", ips=[self.address, *others])
        few_files = ["/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *self.command("start", "-d", "alpha")]
        self.assertEqual(self.run_program(few_files)[:2], (0, self.address + "\n"))

    def test_utmctl_that_crashes_once_is_called_again_and_repeated_crashes_are_an_error(self) -> None:
        self.utm.fault("list", crash="ABRT", times=2)
        self.spawn("list")
        self.utm.fault("list", crash="TRAP")
        self.assertIn(f"utmctl crashed (exit {-signal.SIGTRAP})", self.spawn("list", code=5).err)

    def test_verbose_shows_each_call_with_outcome_and_time(self) -> None:
        self.utm.fault("list", error=-609, times=1)
        err = self.spawn("-v", "start", "-d", "alpha").err
        shown = re.findall(r"^\+ (\S+) (\S+).*: (.*), exit (-?\d+), \d+\.\d\d s$", err, re.MULTILINE)
        self.assertEqual(shown[:2], [("utmctl", "list", "transient -609", "0"), ("utmctl", "list", "done", "0")])
        calls = self.calls_of()
        self.assertEqual(len([program for program, *_ in shown if program != "sysctl"]), len(calls))
        self.assertIn(f"+ utmctl clone {self.base} --name km-alpha: done", err)
        self.assertNotIn("+ ", self.spawn("start", "-d", "alpha").err)

    def test_missing_permission_ends_the_run_at_once_and_explains_how_to_grant_it(self) -> None:
        self.utm.fault(error=-1743, lookup=True)
        for args in (("start", "-d", "alpha"), ("list",)):
            before = len(self.utm.calls())
            err = self.spawn(*args, code=5).err
            for words in ("-1743", "Privacy & Security > Automation", "ssh session", "tccutil reset AppleEvents"):
                self.assertIn(words, err)
            self.assertEqual(len(self.utm.calls()), before + 1)

    def test_missing_utmctl_is_an_error_with_a_remedy(self) -> None:
        self.use(utmctl=os.path.join(self.folder, "nowhere", "utmctl"))
        self.assertIn("nowhere/utmctl", self.spawn("list", code=5).err)
        self.uses.pop("utmctl")
        self.use()
        os.unlink(os.path.join(self.bin, "utmctl"))
        self.assertIn("kodemachine config set utmctl PATH", self.spawn("list", code=5).err)

    def test_utmctl_is_called_by_its_real_path(self) -> None:
        inside = os.path.join(self.folder, "UTM.app", "Contents", "MacOS")
        os.makedirs(inside)
        os.rename(os.path.join(self.bin, "utmctl"), os.path.join(inside, "utmctl"))
        os.symlink(os.path.join(inside, "utmctl"), os.path.join(self.bin, "utmctl"))
        self.assertIn(f"utmctl:      {inside}/utmctl\n", self.spawn("status").out)
        self.assertIn(f"{inside}/utmctl", self.processes_during_list())

    def test_utmctl_without_utm_or_without_a_command_is_named(self) -> None:
        self.utm.fault("list", no_app=True, times=1)
        self.assertIn("kodemachine config set utmctl PATH", self.spawn("list", code=5).err)
        self.utm.fault(
            "list", stderr="Error: Unexpected argument 'list'\nUsage: utmctl <subcommand>\n", status=64, times=1
        )
        err = self.spawn("list", code=5).err
        self.assertIn("utmctl does not know the command list: Unexpected argument 'list'\n  Use a UTM from 4.6.5", err)

    def test_utm_that_is_not_running_is_asked_again_until_the_deadline(self) -> None:
        self.utm.fault("list", error=-600, times=2)
        self.spawn("list")
        self.utm.fault("list", error=-600)
        result = self.km("list", patience={"LOOK_LIMIT": 0.5})
        self.assertEqual(result.code, 6)
        self.assertIn("(-600)", result.err)


class ListOfUtmTest(Case):
    """The list of utmctl: only a clean one proves that a machine is missing."""

    GREETERS = 1

    def test_unreadable_list_never_counts_as_no_machines(self) -> None:
        self.utm.add("km-alpha")
        faults: list[dict[str, Any]] = [
            {"error": -1712}, {"error": -10004}, {"stdout": "garbage\n"}, {"stdout": ""},
            {"stdout": f"{Utmctl.HEADER}{UUID_A} stopped  a\n", "stderr": EVENT.format(-1728)}, {"crash": "TRAP"},
        ]
        for fault in faults:
            with self.subTest(fault):
                self.utm.clear_faults()
                self.utm.fault("list", **fault)
                crashed = "crash" in fault
                self.spawn("start", "-d", "beta", code=5 if crashed else 6,
                           patience={"LOOK_LIMIT": 10.0 if crashed else 0.5})
        self.assertEqual(set(self.utm.verbs()), {"list"})
        self.assert_machines("km-alpha")

    def test_unreadable_row_keeps_the_others_usable_and_no_machine_counts_as_missing(self) -> None:
        self.spawn()
        broken = self.utm.add("two\nlines")
        before = len(self.utm.calls("list"))
        err = self.spawn().err
        self.assertIn(f"UTM's list has a row that cannot be read: '{broken} stopped two'. A machine's name may", err)
        self.assertEqual(len(self.utm.calls("list")), before + 3)
        self.spawn("stop", "alpha")
        for words in (["start", "-d", "beta"], ["delete", "alpha"], ["purge", "-y"], ["status", "beta"],
                      ["base", "use", "v0.2.0"], ["start", "-d", "--fresh", "-y", "alpha"]):  # fmt: skip
            with self.subTest(words):
                self.assertIn(f"does not show whether a machine exists: '{broken}", self.spawn(*words, code=1).err)
        self.assert_machines("km-alpha", "two\nlines")
        self.assertEqual(len(self.utm.calls("clone")), 1)
        self.spawn("resume", "alpha", code=4)
        self.spawn("start", "-d", "alpha")
        self.assertEqual(self.utm.machine("km-alpha")["status"], "started")
        self.utm.change(broken, name="one line")
        self.assertNotIn("cannot be read", self.spawn().err)

    def test_nothing_is_turned_off_if_the_list_forbids_its_deletion(self) -> None:
        self.utm.add("km-alpha", status="started")
        self.utm.add("two\nlines")
        for words in (["delete", "--force", "alpha"], ["start", "-d", "--fresh", "-y", "alpha"]):
            self.assertIn("does not show whether a machine exists", self.spawn(*words, code=1).err)
        self.assertEqual((self.states()["km-alpha"], self.asked("stop")), ("started", []))

    def test_list_is_read_again_while_utm_is_starting(self) -> None:
        self.utm.add("km-alpha")
        self.utm.fault("list", empty=True, times=2)
        err = self.spawn(patience={"WARM_UP": 30.0}).err
        self.assertIn("UTM shows no machines; waiting in case it is still starting", err)
        self.assertEqual(self.utm.calls("clone"), [])

    def test_machine_that_appears_after_the_first_list_is_used(self) -> None:
        self.utm.add("km-alpha")
        self.utm.fault("list", empty=True, times=1)
        self.spawn(patience={"WARM_UP": 0.0})
        self.assert_machines("km-alpha")
        self.assertEqual(self.calls_of("clone"), [])

    def test_empty_list_is_accepted_after_waiting(self) -> None:
        self.utm.fault("list", empty=True)
        self.assertEqual(self.spawn("list").out, "")
        self.assertIn("there is no image to clone", self.spawn(code=3).err)

    def test_two_machines_of_one_name_are_both_reported_and_left_alone(self) -> None:
        twins = [self.utm.add("km-alpha"), self.utm.add("km-alpha")]
        err = self.spawn(code=4).err
        for uuid in twins:
            self.assertIn(uuid, err)
        self.assertEqual(set(self.utm.verbs()), {"list"})

    def test_machine_in_an_unknown_state_does_not_affect_others(self) -> None:
        self.utm.add("km-broken")
        self.utm.fault("list", unknown=["km-broken"])
        self.spawn()
        self.assert_machines("km-alpha", "km-broken")

    def test_machine_in_an_unknown_state_is_not_cloned_again(self) -> None:
        self.utm.add("km-alpha")
        self.utm.fault("list", unknown=["km-alpha"])
        self.spawn()
        self.assert_machines("km-alpha")


class FaultTest(Case):
    """Any answer to a call leads to one machine, or to none and a reason."""

    GREETERS = 1

    def test_clone_faults_that_leave_one_machine(self) -> None:
        table: list[tuple[str, int, dict[str, Any]]] = [
            ("-1712, and it finishes later", 1, {"error": -1712, "when": "after", "delay": 0.5, "report_after": 0.1}),
            ("-10004, though done", 1, {"error": -10004, "when": "after"}),
            ("-10004, not done", 2, {"error": -10004, "times": 1}),
            ("-609, not done", 2, {"error": -609, "times": 1}),
            ("not found, though it is there", 2, {"error": -1743, "lookup": True, "times": 1}),
            ("not renamed", 1, {"partial": "no-rename"}),
            ("not renamed, and -1712", 1, {"partial": "no-rename", "error": -1712, "when": "after"}),
            ("hung, though done", 1, {"hang": True, "when": "after"}),
            ("trapped, though done", 1, {"crash": "TRAP", "when": "after"}),
        ]
        for title, calls, fault in table:
            with self.subTest(title):
                self.utm.clear_faults()
                self.utm.fault("clone", **fault)
                before = len(self.calls_of("clone"))
                self.spawn()
                self.assert_machines("km-alpha")
                self.assertEqual(len(self.calls_of("clone")), before + calls)
                self.remove("km-alpha")

    def test_truncated_copy_is_reported_and_never_started(self) -> None:
        """Contract 3.3 and 10.12: UTM ignores errors while it copies, and lists half a bundle after a restart."""
        for partial, name, code in (("short", "km-alpha", 1), ("half", "kodeimage-v0.2.0", 1)):
            with self.subTest(partial):
                self.use(clone_timeout=4)
                started = len(self.calls_of("start"))
                self.utm.fault("clone", partial=partial, error=-609, when="after", times=1)
                err = self.spawn("start", "-d", "alpha", code=code).err
                [half] = [vm for vm in self.utm.machines() if vm["drives"][0]["size"] == 1]
                self.assertEqual(half["name"], name)
                words = f"{name} ({half['uuid']}) is an incomplete copy and cannot be used: a drive has 1 of 331 MiB"
                for repeated in (err, self.spawn("start", "-d", "alpha", code=code).err):
                    self.assertIn(words, repeated)
                self.assertIn(words.partition(" and")[0], self.spawn("doctor", code=1).out)
                self.assertEqual(len(self.calls_of("start")), started)
                [remedy] = re.findall(r"(?m)^  Delete it: (.*)$", err)
                self.assertEqual(self.run_program(["sh", "-c", remedy]).code, 0)
                self.spawn("start", "-d", "alpha")
                self.assert_machines("km-alpha")
                self.remove("km-alpha")

    def test_old_half_copy_is_called_incomplete_and_no_rename_is_advised(self) -> None:
        self.utm.fault("clone", partial="half", error=-609, when="after", times=1)
        self.spawn("start", "-d", "alpha", code=1)
        path = os.path.join(self.state, "intents", "km-alpha.json")
        order = json.loads(self.read(path))
        del order["incomplete"]
        self.write(path, json.dumps({**order, "time": order["time"] - 3600}))
        self.assertIn("is an incomplete copy and cannot be used", self.spawn("start", "-d", "alpha", code=1).err)

    def test_image_that_is_an_incomplete_copy_is_not_cloned(self) -> None:
        half = self.image("kodeimage-v0.3.0")
        [drive] = self.utm.machine(half)["drives"]
        self.utm.change(half, drives=[{**drive, "size": 1}])
        self.write_state("machines.json", json.dumps({half: {"name": "kodeimage-v0.3.0", "copy_of": self.base}}))
        self.assertIn(f"kodeimage-v0.3.0 ({half}) is an incomplete copy", self.spawn(code=1).err)
        self.assertEqual(self.calls_of("clone"), [])

    def test_copies_are_compared_with_their_originals_before_use(self) -> None:
        self.spawn("start", "-d", "alpha")
        self.spawn("stop", "alpha")
        self.utm.fault("clone", partial="short")
        self.assertIn("km-beta", self.spawn("clone", "alpha", "beta", code=1).err)
        self.assertIn("is an incomplete copy", self.spawn("start", "-d", "beta", code=1).err)
        self.assertIn("is an incomplete copy", self.spawn("clone", "beta", "gamma", code=1).err)
        self.spawn("delete", "beta")
        self.utm.clear_faults()
        self.spawn("clone", "alpha", "beta")
        self.spawn("delete", "alpha")
        self.spawn("start", "-d", "beta")       # it was compared while the original existed

    def test_new_host_name_is_flushed_to_the_disk(self) -> None:
        """A machine that is forced off within a minute would lose its name and host keys otherwise."""
        self.spawn()
        self.assertTrue(os.path.exists(os.path.join(self.utm.guest("km-alpha"), "run", "synced")))

    def test_image_with_a_custom_icon_can_be_cloned(self) -> None:
        self.utm.change(self.base, icon="my-own")
        self.spawn()
        self.assertEqual(self.utm.machine("km-alpha")["icon"], "my-own")
        self.assertNotEqual(*(vm["macs"] for vm in self.utm.machines()))

    def test_clone_faults_that_leave_no_machine(self) -> None:
        table: list[tuple[str, int, int, str, dict[str, Any]]] = [
            ("-10004 for ever", 5, 2, "Automation", {"error": -10004}),
            ("refused", 5, 1, "Automation", {"error": -1743}),
            ("UTM's own words", 1, 1, "Kein Platz.", {"error": -2700, "string": "Kein Platz."}),
            ("an error without words", 1, 1, "km-alpha: error -2700\n  Is the disk full?", {"error": -2700}),
            ("nothing is done and nothing said", 1, 1, "UTM reported no error, but did not clone", {"silent": True}),
            ("-1712 for ever", 6, 1, "Run the same command again", {"error": -1712}),
            ("hung", 6, 1, "Run the same command again", {"hang": True}),
            ("aborted", 6, 1, "Run the same command again", {"crash": "ABRT"}),
        ]
        for title, code, calls, words, fault in table:
            with self.subTest(title):
                self.utm.clear_faults()
                self.utm.fault("clone", **fault)
                self.use(clone_timeout=4 if code == 6 else 30)
                before = len(self.calls_of("clone"))
                self.assertIn(words, self.spawn(code=code).err)
                self.assert_machines()
                self.assertEqual(len(self.calls_of("clone")), before + calls)
                self.utm.clear_faults()
                self.use(clone_timeout=6)       # it first waits so long for a clone that may still appear
                self.spawn()
                self.assert_machines("km-alpha")
                self.remove("km-alpha")

    def test_clone_without_its_name_is_renamed_by_uuid_and_older_copies_are_left_alone(self) -> None:
        old = self.utm.add("kodeimage-v0.2.0 2")
        self.utm.fault("clone", partial="no-rename")
        self.spawn()
        self.assert_machines("km-alpha", "kodeimage-v0.2.0 2")
        self.assertEqual(self.utm.machine("kodeimage-v0.2.0 2")["uuid"], old)

    def test_clone_that_cannot_be_renamed_is_named_exactly(self) -> None:
        self.utm.fault("clone", partial="no-rename")
        self.utm.fault("configure", error=-1743)
        err = self.spawn(code=5).err
        self.assertIn(f"kodeimage-v0.2.0 2 ({self.utm.machine('kodeimage-v0.2.0 2')['uuid']})", err)
        self.utm.clear_faults()
        self.spawn()
        self.assert_machines("km-alpha")
        self.assertEqual(len(self.calls_of("clone")), 1)

    def test_clone_is_refused_where_a_name_differs_only_in_case(self) -> None:
        uuid = self.utm.add("KM-Alpha")
        self.assertIn(f"KM-Alpha already ({uuid})", self.spawn(code=4).err)
        self.assertEqual(self.calls_of("clone"), [])

    def test_clone_whose_folder_could_not_be_moved_is_used(self) -> None:
        self.utm.add("km/alpha")
        self.spawn()
        self.assert_machines("km-alpha", "km/alpha")

    def test_start_faults_have_their_exit_status_and_number_of_calls(self) -> None:
        table: list[tuple[str, int, int, str, dict[str, Any]]] = [
            ("-1712, though done", 0, 1, "", {"error": -1712, "when": "after"}),
            ("-1712, not done", 0, 2, "", {"error": -1712, "times": 1}),
            ("refused by UTM for ever", 1, 3, "Disk locked.", {"error": -2700, "string": "Disk locked."}),
            ("no permission", 5, 1, "Automation", {"error": -1743}),
            ("-10004 for ever", 5, 2, "Automation", {"error": -10004}),
            ("crashed, though done", 0, 1, "", {"crash": "TRAP", "when": "after"}),
            ("an error of --hide before it", 0, 1, "", {"hide_error": -609}),
        ]
        for title, code, calls, words, fault in table:
            with self.subTest(title):
                self.utm.add("km-alpha")
                self.utm.clear_faults()
                self.utm.fault("start", **fault)
                before = len(self.calls_of("start"))
                self.assertIn(words, self.spawn("start", "-d", "alpha", code=code).err)
                self.assertEqual(len(self.calls_of("start")), before + calls)
                self.remove("km-alpha")
        self.utm.add("km-alpha")
        self.utm.clear_faults()
        self.utm.fault("start", error=-1712)
        err = self.spawn("start", "-d", "alpha", "--timeout", "2", code=6).err
        self.assertIn("km-alpha did not start within 2 s (it is stopped): error -1712", err)

    def test_queries_without_an_answer_are_repeated(self) -> None:
        for verb, number in (
            ("list", -1712),
            ("status", -609),
            ("ip-address", -600),
            ("addresses", -1712),
            ("configure", -609),
        ):
            self.utm.fault(verb, error=number, times=2)
        self.utm.fault("status", error=-1743, lookup=True, skip=2, times=2)
        self.spawn()
        self.assert_machines("km-alpha")
        self.assertEqual((len(self.calls_of("clone")), len(self.calls_of("start"))), (1, 1))

    def test_any_call_may_hang_once(self) -> None:
        limits = dict.fromkeys(kodemachine.LIMITS, 0.8)
        for verb in ("list", "start", "status", "ip-address", "hardware", "configure"):
            self.utm.fault(verb, hang=True, times=1)
        self.spawn(patience={"LIMITS": limits})
        self.assert_machines("km-alpha")

    def test_any_call_may_crash_once(self) -> None:
        for verb, name in (
            ("list", "TRAP"),
            ("start", "ABRT"),
            ("status", "TRAP"),
            ("ip-address", "ABRT"),
            ("addresses", "ABRT"),
            ("configure", "ABRT"),
        ):
            self.utm.fault(verb, crash=name, times=1)
        self.spawn()
        self.assert_machines("km-alpha")

    def test_faults_in_another_language_have_the_same_result(self) -> None:
        self.utm.option(language="ja")
        self.utm.fault("clone", error=-1712, when="after")
        self.utm.fault("start", error=-609, times=1)
        self.spawn()
        self.utm.fault(error=-1743, lookup=True)
        self.assertIn("Automation", self.spawn(code=5).err)


# ---- the whole: locks, crashes, many runs at once


class StateTest(unittest.TestCase):
    """The state folder: locks, records, and files with foreign content."""

    def setUp(self) -> None:
        self.folder = os.path.join(tempfile.mkdtemp(prefix="kodemachine-test-"), "state")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.folder))
        self.notes = mock.Mock()
        self.state = kodemachine.State(self.folder, self.notes)

    def test_threads_of_one_process_take_turns_without_a_time_limit(self) -> None:
        settings = kodemachine.Settings(clone_timeout=0.1, boot_timeout=0.1)
        manager = kodemachine.Manager(settings, mock.Mock(), self.state)
        entered, leave, done = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            with manager.fleet_lock():
                entered.set()
                leave.wait(60)

        def second() -> None:
            with manager.fleet_lock():
                done.set()

        threads = [threading.Thread(target=target) for target in (first, second)]
        threads[0].start()
        self.assertTrue(entered.wait(60))
        threads[1].start()
        until = time.monotonic() + 2 * settings.lock_limit
        wait_for(lambda: time.monotonic() > until or not threads[1].is_alive())
        leave.set()
        for thread in threads:
            thread.join()
        self.assertTrue(done.is_set())

    def test_threads_of_one_process_wait_for_another_process_only_once(self) -> None:
        settings = kodemachine.Settings(clone_timeout=100, boot_timeout=50)
        manager = kodemachine.Manager(settings, mock.Mock(), self.state)
        limits: list[float] = []

        @contextlib.contextmanager
        def lock(_name: str, limit: float, **_words: Any) -> Iterator[None]:
            limits.append(limit)
            if len(limits) < 3:
                assert manager._waiting_since
                manager._waiting_since -= limit         # the time passes
                raise kodemachine.TimedOut("the fleet is in use")
            yield

        with mock.patch.object(self.state, "lock", lock):
            for _ in range(2):
                with self.assertRaises(kodemachine.TimedOut), manager.fleet_lock():
                    pass
            for _ in range(2):
                with manager.fleet_lock():
                    pass
        self.assertEqual([round(limit) for limit in limits], [150, 1, 1, 150])

    def test_changes_of_records_and_of_host_keys_wait_for_their_lock(self) -> None:
        changes: list[Callable[[], Any]] = [lambda: self.state.remember(UUID_A, name="km-a"),
                                            lambda: self.state.pin("km-a", [host_key()])]
        with concurrent.futures.ThreadPoolExecutor(2) as pool, self.state.lock("records", 1):
            running = [pool.submit(change) for change in changes]
            self.assertEqual(concurrent.futures.wait(running, 0.3).done, set())
        self.assertEqual([future.exception() for future in running], [None, None])
        self.assertEqual((self.state.records()[UUID_A].name, self.state.pinned("km-a")), ("km-a", [host_key()]))

    def test_file_is_on_the_disk_before_it_replaces_the_old_one(self) -> None:
        calls = mock.Mock()
        with mock.patch("os.fsync", calls.fsync), mock.patch("os.replace", calls.replace):
            kodemachine.write_file(self.state.path("machines.json"), "{}")
        self.assertEqual([name for name, _, _ in calls.mock_calls], ["fsync", "replace"])

    def test_empty_record_is_removed(self) -> None:
        self.assertEqual(self.state.remember(UUID_A, never_started=False), kodemachine.Record())
        self.assertEqual((self.state.records(), os.listdir(self.folder)), ({}, ["locks"]))
        record = self.state.remember(UUID_A, name="km-a", never_started=True)
        self.assertEqual(record, kodemachine.Record(name="km-a", never_started=True))
        self.state.remember(UUID_A, name="", never_started=False)
        self.assertEqual(self.state.records(), {})

    def test_foreign_content_of_state_files_is_ignored_with_one_warning(self) -> None:
        os.mkdir(self.folder, 0o700)
        os.mkdir(os.path.join(self.folder, "intents"), 0o700)
        deep = "[" * 100_000
        for text in ("[]", '{"a": 1}', deep, "{"):
            state = kodemachine.State(self.folder, self.notes)
            for path in (state.path("machines.json"), state.path("intents", "km-a.json")):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
            self.assertEqual((state.records(), state.records()), ({}, {}))
            self.assertIsNone(kodemachine.Order(state, "km-a").load())
            self.assertIn("machines.json cannot be read", self.notes.warn.call_args[0][0])
        self.assertEqual(self.notes.warn.call_count, 4)

    def test_checking_a_lock_does_not_take_it(self) -> None:
        path = self.state.path("locks", "a.lock")
        self.assertFalse(self.state.locked("a"))
        self.assertFalse(os.path.exists(self.folder))
        with self.state.lock("a", 1):
            self.assertTrue(self.state.locked("a"))
        with open(path, encoding="utf-8") as other:
            fcntl.flock(other, fcntl.LOCK_SH)           # another process that checks
            self.assertFalse(self.state.locked("a"))

    # As version 0.1.0 wrote it, with all keys.
    OLD_RECORD = {
        "name": "km-a", "image": {"name": "kodeimage-v0.2.0", "uuid": UUID_B}, "created": "2024-05-06T07:08:09Z",
        "new": True, "fork": True, "mac_checked": True, "personality": True, "host_keys": [host_key()],
        "learning": True, "machine_id": "0" * 32, "rm": True, "saved": True, "disposable": True, "first_boot": "ran",
        "copy_of": UUID_B,
    }

    def write(self, name: str, content: Any) -> None:
        path = self.state.path(name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)

    def test_records_of_version_0_1_0_load_with_one_warning_about_removed_keys(self) -> None:
        self.write("machines.json", {UUID_A: self.OLD_RECORD, UUID_B: {"image": None, "making": True, "sealed": True}})
        expected = {
            UUID_A: kodemachine.Record(
                name="km-a", image="kodeimage-v0.2.0", image_uuid=UUID_B, created="2024-05-06T07:08:09Z",
                machine_id="0" * 32, mac_is_unique=True, never_started=True, is_copy=True, copy_of=UUID_B,
                is_temporary=True, first_boot="pending"),
            UUID_B: kodemachine.Record(making="sealed"),
        }
        self.assertEqual((self.state.records(), self.state.records()), (expected, expected))
        self.assertEqual([call[0][0] for call in self.notes.warn.call_args_list],
                         [f"{self.folder}/machines.json: ignoring keys that are no longer used: saved, disposable"])
        self.state.remember(UUID_B, making="")
        self.assertEqual(set(json.loads(kodemachine.read_text(self.state.path("machines.json")) or "")[UUID_A]),
                         {key for key, value in expected[UUID_A]._asdict().items() if value})
        again = kodemachine.State(self.folder, self.notes)
        self.assertEqual(again.records(), {UUID_A: expected[UUID_A]})
        self.assertEqual(self.notes.warn.call_count, 1)

    def test_a_key_of_the_wrong_type_is_ignored(self) -> None:
        self.write("machines.json", {UUID_A: {"name": 1, "image": [], "is_copy": "yes", "created": None, "other": 1}})
        self.assertEqual(self.state.records(), {UUID_A: kodemachine.Record()})

    def test_an_order_of_version_0_1_0_loads(self) -> None:
        image = {"name": "kodeimage-v0.2.0", "uuid": UUID_B}
        for inherits, record in (
            ({"image": image, "fork": True, "first_boot": "done"},
             {"image": "kodeimage-v0.2.0", "image_uuid": UUID_B, "is_copy": True, "first_boot": "done"}),
            ({"rm": True}, {"is_temporary": True}),
            ({"image": None, "making": True}, {"making": "begun"}),
            ({}, {}),
        ):
            old = {"base": "km-b", "base_uuid": UUID_B, "time": 5.5, "listed": [UUID_B], "inherits": inherits}
            self.write("intents/km-a.json", old)
            self.assertEqual(kodemachine.Order(self.state, "km-a").load(), {**old, "record": record})
            self.assertEqual(self.state.orders(), ["km-a"])


class StateFolderTest(Case):
    """The state folder after somebody else has changed it."""

    def setUp(self) -> None:
        super().setUp()
        self.utm.add("km-a")

    def test_fifo_link_or_folder_in_place_of_a_file_does_no_harm(self) -> None:
        target = os.path.join(self.home, "precious")
        for name in ("machines.json", "known_hosts", "locks/km-a.lock", "locks/fleet.lock", "locks/records.lock"):
            for kind in ("fifo", "link", "folder"):
                with self.subTest(f"{name} is a {kind}"):
                    shutil.rmtree(self.state, ignore_errors=True)
                    path = os.path.join(self.state, name)
                    os.makedirs(os.path.dirname(path), 0o700)
                    if not self.utm.names():
                        self.utm.add("km-a")
                    self.write(target, "precious")
                    if kind == "fifo":
                        os.mkfifo(path)
                    elif kind == "link":
                        os.symlink(target, path)
                    else:
                        os.mkdir(path)
                    result = self.km("delete", "a")
                    self.assertIn(result.code, (0, 1), result.err)
                    self.assertNotIn("Traceback", result.err)
                    self.assertEqual(self.read(target), "precious")

    def test_folder_or_configuration_of_another_user_is_refused(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can give files away")
        nobody = pwd.getpwnam("nobody").pw_uid
        os.makedirs(self.state)
        os.chown(self.state, nobody, -1)
        result = self.km("delete", "a")
        self.assertEqual((result.code, self.utm.names()), (1, ["km-a"]))
        self.assert_says(result, 1, "belongs to another user", f'sudo chown -R "$(id -un)" \'{self.state}\'\n')
        os.chown(self.config(), nobody, -1)
        result = self.km("list")
        self.assert_says(result, 2, "belongs to another user", f'sudo chown -R "$(id -un)" \'{self.config()}\'\n')

    # Everything is imported before the change of the user, who may not read Python's own files.
    AS_NOBODY = """import os, sys; sys.path.insert(0, sys.argv[1]); import kodemachine as k; os.setuid(int(sys.argv[2]))
for do in k.make_folder, k.must_be_usable, lambda path: k.write_file(path + "/x", ""):
    try: do(sys.argv[3])
    except k.KodeError as failure: print(failure.hint)"""

    def test_the_folder_of_root_is_named_whichever_it_is(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can make a folder of root")
        nobody = pwd.getpwnam("nobody").pw_uid
        os.chown(self.home, nobody, -1)
        for of_root, mode in ((".local", 0o755), (".local", 0o700), (".local/state", 0o755),
                              (".local/state/kodemachine", 0o700)):
            shutil.rmtree(os.path.join(self.home, ".local"), ignore_errors=True)
            os.makedirs(os.path.join(self.home, of_root))
            for path in (".local", ".local/state", ".local/state/kodemachine")[:of_root.count("/")]:
                os.chown(os.path.join(self.home, path), nobody, -1)
            os.chmod(os.path.join(self.home, of_root), mode)
            at_fault = os.path.join(self.home, of_root)
            hint = f'To make {at_fault} yours: sudo chown -R "$(id -un)" \'{at_fault}\'\n'
            result = self.run_program([*self.PYTHON, "-c", self.AS_NOBODY, HERE, str(nobody), self.state])
            self.assertEqual(result, (0, hint * 3, ""), (of_root, oct(mode)))

    def test_doctor_names_a_folder_that_cannot_be_used(self) -> None:
        self.write(".local/state", "a file")
        self.assertIn(f"{self.home}/.local/state is not a folder", self.km("doctor").out)

    def test_configuration_may_be_in_a_folder_of_another_user(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can give files away")
        shared = os.path.join(self.folder, "shared")
        os.mkdir(shared)
        os.chown(shared, pwd.getpwnam("nobody").pw_uid, -1)
        path = os.path.join(shared, "config.json")
        self.write(path, "{}")
        result = self.km("--config", path, "config", "set", "boot_timeout", "7")
        self.assertEqual(result.code, 0, result.err)
        self.assertEqual(json.loads(self.read(path)), {"boot_timeout": 7})


class CrashTest(Case):
    """Killed, interrupted and parallel runs: the next run continues, and there is one machine."""

    GREETERS = 3

    def greet(self) -> None:
        super().greet()
        self.addCleanup(self.assert_no_half_made_files)

    def assert_no_half_made_files(self) -> None:
        self.assertEqual([path for path in self.files() if path.endswith(".new")], [])

    def cut_off(self, *args: str) -> None:
        """Simulates a run that was killed an hour ago, before UTM got the request to clone."""
        self.utm.fault("clone", kill_parent="before", silent=True)
        self.assertEqual(self.km(*args).code, -signal.SIGKILL)
        self.utm.clear_faults()
        path = os.path.join(self.state, "intents", "km-alpha.json")
        intent = json.loads(self.read(path))
        self.write(path, json.dumps({**intent, "time": intent["time"] - 3600}))

    def await_call(self, verb: str, number: int) -> None:
        wait_for(lambda: len(self.calls_of(verb)) >= number)

    def finish(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            result = self.ended(process)
            self.assertEqual(result.code, 0, result.err)
            self.assertNotIn("Traceback", result.err)

    def test_run_after_a_kill_during_cloning_uses_the_clone(self) -> None:
        self.utm.option(clone_seconds=1.0)
        for too in (False, True):
            with self.subTest(utmctl_killed_too=too):
                before = len(self.calls_of("clone"))
                process = self.start_km("start", "-d", "alpha")
                wait_for(self.utm.clones)
                process.kill()
                process.wait()
                if too:
                    os.kill(self.calls_of("clone")[-1]["pid"], signal.SIGKILL)
                self.spawn()
                self.assert_machines("km-alpha")
                self.assertEqual(len(self.calls_of("clone")), before + 1)
                self.remove("km-alpha")

    def test_replaced_image_is_not_mistaken_for_an_unfinished_clone(self) -> None:
        self.cut_off("start", "-d", "alpha")
        self.remove("kodeimage-v0.2.0")
        image = self.image()
        self.spawn()
        self.assertEqual(self.utm.machine(image)["name"], "kodeimage-v0.2.0")
        self.assertEqual(self.utm.machine("km-alpha")["copied_from"], image)

    def test_unfinished_clone_of_a_deleted_image_is_reported(self) -> None:
        self.utm.fault("clone", partial="no-rename", kill_parent="after")
        self.assertEqual(self.km("start", "-d", "alpha").code, -signal.SIGKILL)
        self.utm.clear_faults()
        self.remove("kodeimage-v0.2.0")
        self.image("kodeimage-v0.3.0")
        err = self.spawn(code=4).err
        self.assertRegex(err, "kodeimage-v0.2.0 2 .* may be the clone km-alpha that an earlier run began")
        self.assertEqual(self.utm.names(), ["kodeimage-v0.2.0 2", "kodeimage-v0.3.0"])
        self.utm.change("kodeimage-v0.2.0 2", name="km-alpha")
        self.spawn()
        self.assertEqual(self.utm.names(), ["km-alpha", "kodeimage-v0.3.0"])

    def test_machine_listed_before_the_order_is_not_taken_for_its_result(self) -> None:
        uuid = self.utm.add("km-other")
        self.cut_off("start", "-d", "alpha")
        self.utm.change(uuid, name="km-alpha")
        self.spawn()
        self.assertNotIn("image", self.record("alpha"))

    def test_copy_made_by_hand_later_is_left_to_the_user(self) -> None:
        self.cut_off("start", "-d", "alpha")
        with self.utm.fake as utm:
            utm.insert(utm.new_uuid(), self.base)
        result = self.spawn(code=4)
        self.assertRegex(result.err, r"kodeimage-v0.2.0 2 \([0-9A-F-]{36}\) may be the clone km-alpha that")
        self.assertEqual(self.utm.names(), ["kodeimage-v0.2.0", "kodeimage-v0.2.0 2"])
        self.utm.change("kodeimage-v0.2.0 2", name="my own")
        self.spawn()
        self.assert_machines("my own", "km-alpha")

    def test_run_after_a_kill_before_cloning_clones_once_the_time_limit_is_over(self) -> None:
        self.use(clone_timeout=6)
        self.utm.fault("clone", hang=True, times=1)
        process = self.start_km("start", "-d", "alpha")
        wait_for(self.utm.met)                  # if the call were killed earlier, the next run would meet the fault
        for pid in (process.pid, self.calls_of("clone")[0]["pid"]):
            os.kill(pid, signal.SIGKILL)
        self.spawn()
        self.assert_machines("km-alpha")

    def test_run_after_a_kill_clones_nothing_while_the_old_call_lives(self) -> None:
        self.utm.fault("clone", delay=8)
        process = self.start_km("start", "-d", "alpha")
        wait_for(self.utm.met)
        process.kill()
        process.wait()
        self.use(clone_timeout=1)
        while True:
            result = self.run_program(self.command("start", "-d", "alpha"))
            if result.code == 0:
                break
            self.assertEqual(result.code, 6)
            self.assertRegex(result.err, "an earlier run's call for km-alpha has not ended|unfinished")
        self.assert_machines("km-alpha")
        self.assertEqual(len(self.utm.calls("clone")), 1)

    def test_clone_waits_for_the_call_of_a_killed_run_on_the_same_image(self) -> None:
        self.utm.fault("clone", delay=2, times=1)
        process = self.start_km("start", "-d", "alpha")
        wait_for(self.utm.met)
        process.kill()
        process.wait()
        self.assertIn("waiting until UTM has cloned km-alpha", self.spawn("start", "-d", "beta").err)
        self.assert_machines("km-alpha", "km-beta")

    def test_signal_at_any_step_leaves_no_process_and_the_next_run_succeeds(self) -> None:
        moments: list[tuple[str, dict[str, Any]]] = [
            ("list", {"hang": True}), ("clone", {"when": "after", "delay": 0.6}), ("hardware", {"hang": True}),
            ("start", {"hang": True, "when": "after"}), ("ip-address", {"hang": True}), ("exec", {"hang": True})]
        signals = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        for (verb, fault), number in zip(moments, signals):
            with self.subTest(verb, signal=number.name):
                self.utm.clear_faults()
                self.utm.fault(verb, **fault)
                before = len(self.calls_of(verb))
                process = self.start_km("start", "-d", "alpha")
                self.await_call(verb, before + 1)
                if verb == "clone":
                    wait_for(self.utm.clones)
                process.send_signal(number)
                result = self.ended(process)
                self.assertEqual((result.code, result.out), (128 + number, ""), result.err)
                self.assertNotIn("Traceback", result.err)
                self.assertNoChildrenLeft()
                self.assert_no_half_made_files()
                self.utm.clear_faults()
                self.spawn()
                self.assert_machines("km-alpha")
                self.remove("km-alpha")

    def test_interruption_reports_what_still_happens(self) -> None:
        running = "km-a is running; to continue: kodemachine a; to shut it down: kodemachine stop a\n"
        for words, asked, fields, said in (
            ("start -d a", "ip-address", {"status": "stopped", "ips": []}, running),
            ("start -d a", "start", {"status": "stopped", "start_seconds": 9.0}, "UTM may still start km-a; to cont"),
            ("resume a", "start", {"status": "paused", "resume_seconds": 9.0}, "UTM may still resume km-a; to see"),
            ("stop a", "stop", {"status": "started", "request_seconds": None}, "UTM may still shut down km-a; to see"),
            ("restart a", "stop", {"status": "started"}, "UTM may still shut down km-a; to see its state: kodemachine"),
            ("suspend a", "suspend", {"status": "started", "suspend_seconds": 9.0}, "UTM may still suspend km-a"),
        ):
            with self.subTest(words):
                uuid = self.vm("a", **fields)
                process = self.start_km(*words.split())
                wait_for(lambda: any(uuid in args for args in self.asked(asked)))  # noqa: B023
                process.send_signal(signal.SIGINT)
                self.assert_says(self.ended(process), 130, said)
                self.remove("km-a")

    def test_ctrl_c_ends_the_run_and_restores_the_terminal(self) -> None:
        self.utm.option(clone_seconds=2.0)
        terminal = self.km_tty("start", "-d", "alpha", env={"TERM": "xterm"})
        terminal.expect(b"cloning")
        wait_for(self.utm.clones)
        terminal.send(b"\x03")
        self.assertEqual(terminal.wait(), 130)
        terminal.expect(b"UTM is still cloning kodeimage-v0.2.0 to km-alpha; run the same command again to continue")
        self.assertEqual(terminal.attributes(), terminal.before)
        self.assertTrue(terminal.seen.endswith(b"\n"), terminal.seen)
        self.assertNoChildrenLeft()
        self.spawn()
        self.assert_machines("km-alpha")
        self.assertEqual(len(self.utm.calls("clone")), 1)

    def test_ignored_signals_stay_ignored(self) -> None:
        self.utm.option(clone_seconds=0.4)
        command = shlex.join(self.command("start", "-d", "alpha"))
        process = self.start_program(["/bin/sh", "-c", f"trap '' HUP; exec {command}"])
        wait_for(lambda: self.calls_of("clone"))
        process.send_signal(signal.SIGHUP)
        self.assertEqual(process.wait(60), 0)

    def test_six_runs_at_once_make_one_machine(self) -> None:
        self.utm.option(clone_seconds=0.2)
        self.finish([self.start_km("start", "-d", "alpha") for _ in range(6)])
        self.assert_machines("km-alpha")

    def test_parallel_starts_share_no_mac_address(self) -> None:
        self.utm.option(clone_seconds=0.1)
        self.finish([self.start_km("start", "-d", label) for label in ("a", "b", "c")])
        self.assert_machines("km-a", "km-b", "km-c")
        self.assertEqual(len({mac for vm in self.utm.machines() for mac in vm["macs"]}), 4)

    def test_lock_of_a_dead_process_is_ignored(self) -> None:
        self.write(os.path.join(self.state, "locks", "km-alpha.lock"), "4194305\n")
        self.spawn()

    def test_lock_of_a_live_process_is_an_error_that_names_its_pid(self) -> None:
        self.use(clone_timeout=0.5, boot_timeout=0.5)
        with self.held_lock("km-alpha"):
            err = self.spawn(code=6).err
        self.assertIn("waiting for another kodemachine (pid 4242)", err)
        self.assertIn("ps -p 4242", err)
        self.assertEqual(self.utm.calls(), [])


class CrowdTest(Case):
    """Twenty kodemachines at the same time."""

    COUNT = 20

    def crowd(self, *commands: Sequence[str]) -> list[Result]:
        processes = [self.start_km(*words) for words in commands]
        return [self.ended(process, timeout=80) for process in processes]

    def setUp(self) -> None:
        super().setUp()
        server = self.sshd()
        self.utm.option(clone_seconds=0.1, addresses=server.hosts)  # an sshd listens at 16 addresses at most
        self.config(ssh_port=server.port, ssh_user=pwd.getpwuid(os.getuid()).pw_name)
        self.image()

    def test_twenty_runs_on_one_label_make_one_machine_with_a_session_each(self) -> None:
        results = self.crowd(*[["alpha", "--", "echo", str(n)] for n in range(self.COUNT)])
        self.assertEqual([(r.code, r.out) for r in results], [(0, f"{n}\n") for n in range(self.COUNT)], results)
        self.assertEqual(self.utm.names(), ["kodeimage-v0.2.0", "km-alpha"])
        self.assertEqual([len(self.calls_of(verb)) for verb in ("clone", "start")], [1, 1])

    def test_twenty_labels_make_twenty_machines_undisturbed_by_list_and_purge(self) -> None:
        starts = [["start", "-d", f"m{n}"] for n in range(self.COUNT)]
        others = [["list"], ["list", "--json"], ["purge", "-y"], ["purge", "-y", "--older-than", "0s"]] * 2
        results = self.crowd(*starts, *others)
        self.assertEqual([r.code for r in results], [0] * len(results), [r.err for r in results if r.code])
        clones = [vm for vm in self.utm.machines() if vm["name"].startswith("km-")]
        self.assertEqual(len({mac for vm in clones for mac in vm["macs"]}), self.COUNT)
        self.assertEqual({vm["status"] for vm in clones}, {"started"})
        self.assertEqual(self.calls_of("delete"), [])


# ---- the whole: the fault matrix, every fault at every call of every command


class Scene(NamedTuple):
    """A command, the machines at its start, and its goal.

    `fleet`: states by label. `+` after a state: its record is complete; `saved`: stopped, with a session on disk;
    `fork`: stopped, and made by `clone`.
    `goal`: the requested states; "": the machine is gone. `may`: the verbs that UTM may be asked for.
    """

    words: str
    fleet: dict[str, str]
    goal: dict[str, str]
    may: str = ""
    says: str = "^"         # a pattern of its output if it succeeds
    again: tuple[int, ...] = (0,)       # the exit statuses of a second run
    every: int = 1          # only every n-th of its cases is run: another scene has most of its calls


SPAWN = "clone configure start"
SCENES = {
    "spawn-missing": Scene("alpha -- true", {}, {"alpha": "started"}, SPAWN),
    "spawn-stopped": Scene("alpha -- true", {"alpha": "stopped"}, {"alpha": "started"}, "configure start"),
    "spawn-paused": Scene("alpha -- true", {"alpha": "paused"}, {"alpha": "started"}, "start"),
    "spawn-running": Scene("alpha -- true", {"alpha": "started+"}, {"alpha": "started"}),
    "spawn-hook": Scene("alpha -- true", {}, {"alpha": "started"}, SPAWN, every=4),
    "spawn-copy": Scene("alpha -- true", {"alpha": "copy"}, {"alpha": "started"}, "configure start stop", every=3),
    "clone": Scene("clone alpha beta", {"alpha": "stopped+"}, {"beta": "stopped"}, "clone configure",
                   again=(0, 4)),
    "ssh": Scene("ssh alpha -- true", {"alpha": "stopped+"}, {"alpha": "started"}, "start", every=3),
    "start-two": Scene("start -d alpha beta", {}, {"alpha": "started", "beta": "started"}, SPAWN,
                       r"(?m)\A(alpha|beta) 127\S+\n(alpha|beta) 127\S+\Z", every=4),
    "start-sized": Scene("start -d alpha --cpus 2 --memory 2G", {}, {"alpha": "started"}, SPAWN, r"127\S+", (0, 4),
                         every=3),
    "restart": Scene("restart alpha", {"alpha": "started+"}, {"alpha": "started"}, "stop start", r"\A127\S+\Z"),
    "repin": Scene("start -d alpha --repin -y", {"alpha": "started+"}, {"alpha": "started"}, says=r"127\S+"),
    "rm": Scene("alpha --rm -- true", {}, {"alpha": ""}, SPAWN + " stop delete", again=(0, 4), every=4),
    "fresh": Scene("start -d alpha --fresh -y", {"alpha": "started"}, {"alpha": "started"}, SPAWN + " stop delete",
                   r"127\S+", every=4),
    "list": Scene("list", {"alpha": "started"}, {}, says="(?s)(?=.*alpha ).*other "),
    "list-json": Scene("list -a --json", {"alpha": "started"}, {}, says="(?s)(?=.*km-alpha).*kodeimage"),
    "list-ansible": Scene("list --format ansible", {"alpha": "started"}, {}, says="(?s)kodemachine_running.*km-alpha",
                          every=3),
    "list-size": Scene("list --size", {"alpha": "started"}, {}, says="(?s)RECLAIM(?=.*alpha ).*other ", every=2),
    "complete": Scene("__complete -- a", {"alpha": "started"}, {}, says="(?m)^attach\t"),
    "status": Scene("status", {"alpha": "started"}, {}, says="image: +kodeimage-v0.2.0"),
    "status-one": Scene("status alpha", {"alpha": "started"}, {}, says="status: +running"),
    "ip": Scene("ip alpha", {"alpha": "started"}, {}, says=r"\A127\S+\Z"),
    "attach": Scene("attach alpha --timeout 0.2", {"alpha": "started"}, {}),
    "exec": Scene("exec alpha -- echo here", {"alpha": "started"}, {}, says=r"\Ahere\Z"),
    "cp": Scene("cp alpha:/etc/hostname .", {"alpha": "started"}, {}, every=3),
    "proxy": Scene("proxy km-alpha", {"alpha": "started+"}, {}, says=r"\ASSH-2.0-test"),
    "stop": Scene("stop alpha", {"alpha": "started"}, {"alpha": "stopped"}, "stop"),
    "stop-paused": Scene("stop alpha", {"alpha": "paused"}, {"alpha": "stopped"}, "start stop", every=2),
    "stop-force": Scene("stop --force alpha", {"alpha": "started"}, {"alpha": "stopped"}, "stop", every=2),
    "stop-kill": Scene("stop --kill alpha", {"alpha": "paused"}, {"alpha": "stopped"}, "stop", every=2),
    "suspend": Scene("suspend alpha", {"alpha": "started"}, {"alpha": "paused"}, "suspend"),
    "resume": Scene("resume alpha", {"alpha": "paused"}, {"alpha": "started"}, "start"),
    "delete": Scene("delete alpha", {"alpha": "stopped+"}, {"alpha": ""}, "delete", again=(0, 3)),
    "delete-force": Scene("delete -f alpha", {"alpha": "started"}, {"alpha": ""}, "stop delete", again=(0, 3), every=2),
    "purge": Scene("purge -y", {"alpha": "stopped+", "beta": "stopped", "gamma": "paused"}, {"alpha": "", "beta": ""},
                   "delete", every=2),
    "purge-all": Scene("purge --all -y", {"alpha": "started", "beta": "paused"}, {"alpha": "", "beta": "", "other": ""},
                       "stop delete", every=4),
    "doctor": Scene("doctor", {"alpha": "started"}, {}, says="checks? passed"),
    "config": Scene("config set boot_timeout 11", {}, {}),
    "base-list": Scene("base list", {"alpha": "started"}, {}, says=r"(?s)\*  kodeimage-v0.2.0  stopped", every=3),
    "base-use": Scene("base use kodeimage-v0.1.0", {}, {}),
    "seal": Scene("base seal alpha -y", {"alpha": "started+"}, {"alpha": "stopped"}, "start configure stop", every=2),
    "seal-as": Scene("base seal alpha -y --as v0.3.0", {"alpha": "stopped"},
                     {"alpha": "stopped", "kodeimage-v0.3.0": "stopped"}, "start configure stop clone", again=(0, 4),
                     every=5),
    "create": Scene("base create v0.3.0 --image cloud.img --disk 3G", {}, {"kodeimage-v0.3.0": "stopped"},
                    "make start configure stop detach", again=(0, 4), every=5),
}  # fmt: skip

# What touches the guest, the serial port or the version is tried with the UTM of before as well.
SCENES.update({f"{name}@5.0.3": SCENES[name]._replace(every=3 * SCENES[name].every) for name in (
    "spawn-missing", "spawn-copy", "repin", "exec", "attach", "doctor", "status", "seal", "seal-as", "create")})
SCRIPTS = ("hardware", "devices", "serial-ports", "configure", "make", "detach", "exec")        # for osascript
LOOKS = ("list", "status", "ip-address", "version", "hardware", "devices", "serial-ports")      # these change nothing
DEEDS = ("clone", "start", "stop", "suspend", "delete", "exec", "configure", "make", "detach")
NOT_STOPPED = "The virtual machine must be stopped before this operation can be performed."
NOT_RUNNING = "The virtual machine is not running."
TEXTS = {**dict.fromkeys(("clone", "delete", "configure", "detach"), [NOT_STOPPED]),
         "start": ["Operation not available."], "stop": [NOT_RUNNING], "suspend": [NOT_RUNNING],
         **dict.fromkeys(("ip-address", "exec"), [
             NOT_RUNNING, "Timed out waiting for RPC.",
             "The QEMU guest agent is not running or not installed on the guest."])}


def faults(verb: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every fault that fits a verb, by name: those of the contract, and kill -9 of the caller."""
    for number in (-1712, -10004, -609, -600, -10000):
        yield f"{number}-before", {"error": number}
        if verb in DEEDS:
            yield f"{number}-after", {"error": number, "when": "after"}
    if verb in DEEDS:
        delay = 2.4 if verb in ("clone", "make") else 0.5   # longer than a run waits that only checks again
        yield "-1712-late", {"error": -1712, "when": "after", "delay": delay, "report_after": 0.1}
        yield "hang-after", {"hang": True, "when": "after"}
        yield "killed-before", {"kill_parent": "before"}
        yield "killed-before-slow", {"kill_parent": "before", "delay": 0.5}
        yield "killed-after", {"kill_parent": "after"}
    else:
        yield "killed", {"kill_parent": "before"}
    yield "-1743", {"error": -1743}
    yield "hang", {"hang": True}
    yield "silent", {"silent": True}
    yield "garbage", {"stdout": "\udcff\udcfe\0\x1b[2J\udcc3(\n"}
    for signal_name in ("TRAP", "ABRT"):
        yield f"SIG{signal_name}-before", {"crash": signal_name}
        if verb in DEEDS:
            yield f"SIG{signal_name}-after", {"crash": signal_name, "when": "after"}
    for i, text in enumerate(TEXTS.get(verb, [""]), 1):
        yield f"-2700-{i}", {"error": -2700, "string": text}
    if verb not in SCRIPTS:
        yield "no-app", {"no_app": True}
        for language in ("de", "ja"):
            yield f"-609-{language}", {"error": -609, "language": language}
        yield "-2700-ja", {"error": -2700, "string": "仮想マシンを停止してください。", "language": "ja"}
        if verb not in ("list", "version"):
            yield "not-found", {"error": -1743, "lookup": True}
    if verb == "list":
        for name in ("km-alpha", "kodeimage-v0.2.0", "Windows 11"):
            yield f"unknown-{name.partition(' ')[0].partition('.')[0]}", {"unknown": [name]}
        yield "blank", {"blank": True}
    if verb == "clone":
        yield "half-named", {"partial": "no-rename"}
        yield "half-named-1712", {"partial": "no-rename", "error": -1712, "when": "after"}
        yield "unlisted", {"partial": "copy-only"}
    if verb == "start":
        yield "hide-error", {"hide_error": -609}


# The exit statuses after a single fault, by SCENE/VERB/FAULT; the first that matches counts. Else it is got over: 0.
EXPECTED: tuple[tuple[str, set[int]], ...] = (
    ("complete/.*", {0}),                                       # completion never fails
    ("doctor/.*", {0, 1}),
    ("rm/(list|status|stop|delete)/(-1743|no-app)", {0, 5}),    # at its end there is a warning, and ssh's status
    ("rm/(stop|delete)/.*", {0}),
    ("(clone|seal-as)/hardware/-2700.*", {0, 1}),               # the question for a copy's drives is repeated
    ("repin/exec/hang.*", {0, 1, 6}),                           # the first of its two questions may fail
    ("create/detach/silent", {0, 1}),                           # UTM may be asked again
    ("(exec|repin)/exec/(-1743|no-app)", {5}),
    ("(seal|seal-as|create)/exec/(-1743|no-app)", {5}),
    ("(seal|seal-as|create)/exec/.*", {0, 1, 6}),               # a lost answer is no success
    (".*/(exec|version)/(-1743|no-app)", {0}),                  # it goes without
    (".*/ip-address/(-1743|no-app)", {0, 5}),                   # some answers nobody waits for
    (".*/(-1743|no-app)", {5}),
    (".*/(clone|make)/(-1712-before|hang|SIG.*-before)", {6}),  # it may still come
    (".*/(clone|make)/(-2700.*|silent|garbage|unlisted)", {1}),
    (".*/(hardware|configure|suspend|detach)/-2700.*", {1}),
    (".*/delete/hang", {6}),
    ("(exec|repin)/exec/.*", {0, 1}),                           # perhaps it has run: it is not repeated
    ("attach/serial-ports/(-2700.*|silent|garbage)", {1}),
)


def expected(case: str) -> set[int]:
    """The exit statuses that fit a case's fault."""
    name = re.sub(":[0-9]+|@[0-9.]+", "", case)
    return next((statuses for pattern, statuses in EXPECTED if re.fullmatch(pattern, name)), {0})


# Kills kodemachine at the n-th operation that makes, writes, moves or removes a file, and logs each of them.
FATAL_WRITES = """
import itertools, os, signal
def fatal(name, count=itertools.count(1)):
    function = getattr(os, name)
    def call(*args, **kwargs):
        if name != "open" or args[1] & os.O_CREAT:
            n = next(count)
            with open({trace!r}, "a") as file:
                print(name, *args[:1], file=file)
            if n == {n}:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(os, name, call)
for name in ("mkdir", "open", "fchmod", "replace", "unlink", "ftruncate", "pwrite"):    # fchmod: it is still empty
    fatal(name)
"""


class World(Case):
    """One case of the matrix, named SCENE/CALL:NUMBER/FAULT: the fault at that call in that scene."""

    PATIENCE = {
        **Case.PATIENCE,
        "WARM_UP": 0.3, "SETTLE": 0.5, "UNCHANGED": 0.3, "ASK_AGAIN": 0.3, "PRESS_AGAIN": 0.4, "FORCE_STAGE": 4.0,
        "SEAL_LIMIT": 30.0, "CREATE_LIMIT": 30.0,
    }
    WITH_HANGING = {"LIMITS": {**dict.fromkeys(kodemachine.LIMITS, 2.5), "delete": 4.0}, "FORCE_STAGE": 2.5,
                    "SEAL_LIMIT": 4.0, "CREATE_LIMIT": 6.0}
    NEVER_COMES = r"-1712-before|hang|SIG\w+-before|killed.*"        # kodemachine then waits for its full time limit

    def __init__(self, case: str) -> None:
        super().__init__("hold")
        self.case = case
        self.name, self.call, self.fault = case.split("/")
        self.scene = SCENES[self.name]
        self.name, _, self.version = self.name.partition("@")
        self.result = Result(0, "", "")
        self.GREETERS = 2 if self.name == "start-two" else 1

    def __str__(self) -> str:
        return self.case

    # -- the world

    def setUp(self) -> None:
        super().setUp()
        clone_timeout = 4 if re.fullmatch(self.NEVER_COMES, self.fault) else 20
        self.use(boot_timeout=20, clone_timeout=clone_timeout, stop_timeout=8, ssh_user="me")
        if self.version:
            self.utm.option(version=self.version)
        if self.name == "spawn-hook":
            self.use(first_boot=KODEMACHINE)
        os.mkdir(os.path.join(self.home, ".ssh"))
        self.write(".ssh/id_ed25519.pub", PUBLIC_KEY + "\n")
        with open(os.path.join(self.home, "cloud.img"), "wb") as octets:
            octets.write(empty_qcow2(2 << 30))
        touch_output = 'for word; do case $last in -o) : >"$word";; esac; last=$word; done'
        self.write(os.path.join(self.bin, "hdiutil"), f"#!/bin/sh\n{touch_output}\n", 0o755)
        for tool in ("ssh", "scp"):
            self.real_tool(tool, shutil.which("true") or "/bin/true")
        master, slave = os.openpty()
        tty.setraw(slave)
        for handle in (master, slave):
            self.addCleanup(os.close, handle)
        serials = [{"kind": "ptty", "path": os.ttyname(slave)}]
        self.image("kodeimage-v0.1.0")
        self.utm.add("Windows 11", status="started", ips=["10.0.0.9"])
        self.utm.add("km-Foo")
        other = self.utm.add("km-other", status="started", ips=["10.0.0.8"])
        records: dict[str, dict[str, Any]] = {other: {"name": "km-other"}}      # whoever has a pinned key has a record
        known = [f"km-other {host_key()}\n"]
        for label, word in self.scene.fleet.items():
            status = word.replace("copy", "stopped").rstrip("+")
            uuid = self.utm.add("km-" + label, status=status, serials=serials)
            records[uuid] = {"name": "km-" + label}
            if word == "copy":
                records[uuid]["is_copy"] = True
            if word.endswith("+"):
                records[uuid].update(is_named=True, mac_is_unique=True)
                known.append(f"km-{label} {host_key()}\n")
        self.write_state("machines.json", json.dumps(records))
        self.write_state("known_hosts", "".join(known))
        self.before = {vm["uuid"]: vm for vm in self.utm.machines()}
        self.targets = {name if name.startswith("kodeimage-") else "km-" + name: state
                        for name, state in self.scene.goal.items()}

    # -- what happens

    def run_scene(self, fatal_write: int | None = None) -> None:
        before = "" if fatal_write is None else FATAL_WRITES.format(trace=self.trace, n=fatal_write)
        self.result = self.run_program(self.command(*self.scene.words.split(), before=before), timeout=40)

    @property
    def trace(self) -> str:
        return os.path.join(self.folder, "writes")

    def hold(self) -> None:
        """The test: whatever the fault, nothing is lost, and a second run ends in what was asked for."""
        verb, _, number = self.call.partition(":")
        killed = self.fault.startswith("killed")
        if verb == "write":
            self.run_scene(int(number))
        else:
            rule = dict(faults(verb))[self.fault]
            self.utm.fault(verb, nth=int(number), **rule)
            self.run_scene()
            with self.utm.fake as utm:
                met = utm.state["faults"][0].get("seen", 0) >= int(number)
            # A question for addresses that nobody waits for may be ended before it is counted, or before it kills.
            if verb == "ip-address":
                met = met and (self.result.code == -signal.SIGKILL or not killed)
            elif not met:
                self.assertTrue(verb in LOOKS or int(number) > 1, "there was no such call")
                return          # what is repeated, is so as often as time demands: this time it was enough before
            killed = killed and met
        first = self.result
        if killed:
            self.assertEqual(first.code, -signal.SIGKILL, f"it was not killed\n{first.err}")
            self.assert_files_are_whole(rest=True)
        else:
            self.assertIn(first.code, expected(self.case), first.err)
            self.assert_explained()
            self.assertNoChildrenLeft()
            self.assert_files_are_whole()
            self.assert_nothing_else_touched()
            if first.code == 0:
                self.assert_goal()
        self.utm.clear_faults()
        if killed and self.name in ("fresh", "spawn-copy", "seal", "seal-as", "create"):
            self.assertNoChildrenLeft()         # what was asked for last comes to its end
        self.run_scene()
        self.assertIn(self.result.code, self.scene.again, f"{self.result.err}\nbefore: {first}")
        self.assert_explained()
        if self.result.code == 4 and self.name == "rm":     # the machine is there; the person decides
            self.assertEqual(self.km("delete", "-f", "alpha").code, 0)
        self.assert_goal()
        self.assertNoChildrenLeft()
        self.assert_files_are_whole(rest=killed)
        self.assert_nothing_else_touched()
        if self.result.code == 0:
            self.assertEqual([path for path in self.files() if "intents/" in path], [])

    # -- what must hold

    def assert_explained(self) -> None:
        code, _, err = self.result
        self.assertNotIn("Traceback", err)
        if code and self.name != "doctor":          # its result has that status
            self.assertRegex(err, r'(?m)^kodemachine: .|^\{"error": ')
            self.assertIn(code, (1, 3, 4, 5, 6), err)

    def assert_goal(self) -> None:
        """What was asked for is so; an exit status of 0 says that."""
        said = f"{self.result.err}\n{[(vm['name'], vm['status']) for vm in self.utm.machines()]}"
        if "was not deleted" in self.result.err:        # --rm ends with the session's status all the same
            return
        if self.result.code == 0:
            self.assertRegex(self.result.out.rstrip("\n"), self.scene.says)
        for name, state in self.targets.items():
            found = [vm for vm in self.utm.machines() if vm["name"] == name]
            self.assertEqual([vm["status"] for vm in found], [state] if state else [], said)
            if not state:
                # Otherwise the next machine of that name drops them.
                if self.result.code == 0 and not self.fault.startswith("killed"):
                    self.assertNotIn(name + " ", self.read_state("known_hosts"))
                continue
            if state == "started" and self.name != "resume":
                others = {mac for vm in self.utm.machines() if vm["uuid"] != found[0]["uuid"] for mac in vm["macs"]}
                self.assertEqual(others & set(found[0]["macs"]), set(), "it shares its address with another")
            if self.name == "spawn-hook" and self.result.code == 0:
                self.assertIn('"first_boot": "done"', self.read_state("machines.json"))
            if self.name == "start-sized":
                self.assertEqual((found[0]["cpus"], found[0]["memory"]), (2, 2048))
            if self.name in ("seal", "create") and self.result.code == 0:
                with open(os.path.join(self.utm.guest(name), "etc/machine-id"), encoding="utf-8") as file:
                    self.assertEqual((file.read(), len(found[0]["drives"])), ("", 1))
        if self.name == "base-use" and self.result.code == 0:
            with open(os.path.join(self.home, ".config/kodemachine/config.json"), encoding="utf-8") as file:
                self.assertEqual(json.load(file), {**self.uses, "base_image": "kodeimage-v0.1.0"})

    def assert_nothing_else_touched(self) -> None:
        """Verifies: at most one clone per label, and no request to change any other machine."""
        now = self.utm.machines()
        for uuid, vm in self.before.items():
            if vm["name"] not in self.targets:
                self.assertEqual([other for other in now if other["uuid"] == uuid], [vm])
        new = {vm["uuid"]: vm["name"] for vm in now if vm["uuid"] not in self.before}
        self.assertEqual(sorted(set(new.values())), sorted(new.values()), "more than one clone of a label")
        self.assertLessEqual(len(new), len(self.targets) if {"clone", "make"} & set(self.scene.may.split()) else 0)
        base = "km-alpha" if self.name in ("clone", "seal-as") else "kodeimage-v0.2.0"
        bases = [uuid for uuid, vm in self.before.items() if vm["name"] == base]
        theirs = {uuid for uuid, vm in self.before.items() if vm["name"] not in self.targets}
        for call in self.calls_of():
            if call["verb"] not in (*LOOKS, "exec"):
                self.assertIn(call["verb"], self.scene.may.split(), call["argv"])
                named = set(UUID.findall(" ".join(call["argv"])))
                self.assertEqual(len(named), int(call["verb"] != "make"), call["argv"])
                allowed = theirs & set(bases) if call["verb"] == "clone" else set()
                self.assertEqual(named & theirs, allowed, call["argv"])

    def assert_files_are_whole(self, rest: bool = False) -> None:
        """Verifies that each file is private and can be parsed; `rest`: a kill -9 may have left an unfinished one."""
        for path in self.files():
            mode = os.lstat(path).st_mode
            if path.startswith(self.state):
                self.assertEqual(stat.S_IMODE(mode), 0o700 if stat.S_ISDIR(mode) else 0o600, path)
            if path.endswith(".new"):
                self.assertTrue(rest, f"{path} is left")
            elif path.endswith(".json"):
                self.assertIsInstance(json.loads(self.read(path)), dict, path)
        for line in self.read_state("known_hosts").splitlines():
            self.assertEqual(len(parse_host_keys([line.partition(" ")[2]])), 1, line)


def plan(scene: str) -> list[str]:
    """The cases of a scene: runs it without a fault, and counts its calls and writes."""
    world = World(f"{scene}/write:0/killed")
    seen: list[str] = []
    writes: list[str] = []

    def look() -> None:
        world.run_scene(0)
        assert world.result.code == 0, f"{scene}: {world.result}"
        world.assert_goal()
        world.assert_nothing_else_touched()
        seen.extend(call["verb"] for call in world.calls_of())
        if os.path.exists(world.trace):
            with open(world.trace, encoding="utf-8") as file:
                writes.extend(file)

    world.hold = look  # type: ignore[method-assign]
    result = unittest.TestResult()
    world.run(result)
    for _, text in result.errors + result.failures:
        raise AssertionError(text)
    cases, counts = [], dict.fromkeys(seen, 0)
    for verb in seen:
        counts[verb] += 1
        # The user's own command has no time limit.
        hangs = scene.startswith("exec") and verb == "exec"
        fitting = [name for name, _ in faults(verb) if not hangs or "hang" not in name]
        cases += [f"{scene}/{verb}:{counts[verb]}/{name}" for name in fitting]
    # A lock is taken and signed many times: the first time is enough.
    again = re.compile(r"(mkdir|ftruncate|pwrite) |.*\.lock$")
    unlike = [i for i, line in enumerate(writes) if not again.match(line) or line not in writes[:i]]
    cases += [f"{scene}/write:{i + 1}/killed" for i in unlike]
    return [case for case in cases if zlib.crc32(case.encode()) % SCENES[scene].every == 0]


class MatrixTest(unittest.TestCase):
    """A sample of the matrix. All of it: python3 test_kodemachine.py --matrix"""

    def hold(self, *cases: str) -> None:
        for case in cases:
            with self.subTest(case):
                result = unittest.TestResult()
                World(case).run(result)
                self.assertEqual([text for _, text in result.errors + result.failures], [], case)
                for _, reason in result.skipped:
                    self.skipTest(reason)

    def test_start_recovers_from_faults(self) -> None:
        self.hold("spawn-missing/list:2/silent", "spawn-missing/clone:1/-1712-after", "spawn-paused/status:1/not-found",
                  "spawn-running/list:1/unknown-km-alpha")

    def test_first_start_recovers_from_faults(self) -> None:
        self.hold("spawn-missing/hardware:1/silent", "spawn-missing/configure:1/-609-before",
                  "spawn-stopped/exec:1/garbage")

    def test_clone_and_its_first_start_recover_from_faults(self) -> None:
        self.hold("clone/clone:1/-1712-late", "spawn-copy/exec:1/hang-after", "spawn-copy/stop:1/killed-after",
                  "spawn-hook/list:2/killed", "doctor/hardware:1/-1743")

    def test_list_status_and_attach_recover_from_faults(self) -> None:
        self.hold("list/ip-address:1/-2700-2", "status/list:1/-609-ja", "attach/serial-ports:1/SIGABRT-before",
                  "list-size/list:1/silent")

    def test_stop_suspend_and_resume_recover_from_faults(self) -> None:
        self.hold("stop/stop:1/-1712-late", "suspend/suspend:1/-600-before", "resume/start:1/silent",
                  "stop-force/status:1/-1743", "restart/stop:1/-10004-after", "restart/start:1/killed-before")

    def test_delete_and_purge_recover_from_faults(self) -> None:
        self.hold("delete/delete:1/-10000-after", "purge/delete:2/-2700-1", "delete-force/list:2/garbage")

    def test_base_commands_recover_from_faults(self) -> None:
        self.hold("seal/exec:3/silent", "seal-as/clone:1/-10004-after", "create/make:1/-1712-after",
                  "base-use/list:1/-1743")

    def test_run_after_a_kill_reaches_the_goal(self) -> None:
        self.hold("spawn-missing/clone:1/killed-before-slow", "delete-force/stop:1/killed-after",
                  "spawn-stopped/write:8/killed")


def matrix(jobs: int, only: str) -> int:
    """Runs every case of the matrix, or those that begin with `only`; prints the failures, and how many there were."""
    cases = [only]
    if only.count("/") < 2:
        scenes = [scene for scene in SCENES if scene.startswith(only.partition("/")[0])]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            cases = [case for found in pool.map(plan, scenes) for case in found if case.startswith(only)]
    began, failed = time.monotonic(), 0
    for done, outcome in enumerate(outcomes(cases, jobs), 1):
        if outcome.failure:
            failed += 1
            print(f"FAILED python3 test_kodemachine.py --matrix '{outcome.test}'\n{outcome.failure}", flush=True)
        if done % 500 == 0:
            print(f"the matrix: {done} of {len(cases)} cases, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


# ---- the demo and the sandbox


class Network:
    """The ssh ports and serial consoles of the guests: a machine has those of its address while it runs.

    A connection gets an `sshd -i` with the machine's host key. The other end of a console is a program on a terminal of
    its own, which starts with the first key.
    """

    def __init__(self, utm: Utm, hosts: Sequence[str], session: str, public_key: str) -> None:
        """`session`: the program that becomes a shell in the machine whose UUID is its argument."""
        self.utm, self.session = utm, session
        self.listeners: dict[str, socket.socket] = {}
        self.machines: dict[str, str] = {}      # UUIDs by address: they run, and their agent answers
        self.sessions: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.is_open = True
        self.options = write_text(utm.fake.path("sshd_config"), "".join(
            f"{key} {value}\n" for key, value in {**Sshd.OPTIONS, "AuthorizedKeysFile": f'"{public_key}"'}.items()))
        Sshd.make_run_folder()
        with self._listen(hosts[0], 0) as probe:
            self.port = int(probe.getsockname()[1])
        utm.option(consoles={host: self._console(host) for host in hosts})
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @staticmethod
    def _listen(host: str, port: int) -> socket.socket:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

    def _serve(self) -> None:
        while self.is_open:
            # The state is missing while a test replaces it.
            with contextlib.suppress(OSError):
                self._follow()
            for listener in select.select(list(self.listeners.values()), [], [], 0.02)[0]:
                with contextlib.suppress(OSError):
                    self._accept(listener)

    def _follow(self) -> None:
        """Makes the ports and the sessions fit the machines. Reads the state without its lock, to disturb nobody."""
        with open(self.utm.fake.path("state"), "rb") as file:
            state = marshal.load(file)
        now = time.time()
        up = [vm for vm in state["vms"] if vm["status"] == "started" and vm["up_at"] + vm["agent_after"] <= now]
        self.machines = {vm["ips"][0]: vm["uuid"] for vm in up}
        alive = [vm["uuid"] for vm in state["vms"] if vm["status"] != "stopped"]
        ports = {host for host, uuid in self.machines.items() if not self._has("run/ssh.stopped", uuid)}
        for host in set(self.listeners) - ports:
            self.listeners.pop(host).close()
        for host in ports - set(self.listeners):
            self.listeners[host] = self._listen(host, self.port)
        for uuid, process in list(self.sessions):
            if process.poll() is not None:
                self.sessions.remove((uuid, process))
            elif uuid not in alive:
                os.killpg(process.pid, signal.SIGHUP)       # an interactive shell ignores SIGTERM
        leaving = [uuid for uuid in self.machines.values() if self._has("power-off", uuid)]
        if leaving or any(due <= now for due, *_ in state["pending"]):
            with FakeUTM(self.utm.folder) as utm:
                for uuid in leaving:
                    utm.power_off_if_asked(uuid)

    def _has(self, name: str, uuid: str) -> bool:
        return os.path.exists(self.utm.fake.path("guests", uuid, name))

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        uuid = self.machines[listener.getsockname()[0]]
        root = self.utm.fake.path("guests", uuid)
        program = Sshd.program()
        assert program
        # With this HOME the person's login shell, which starts the session, does not read their own files.
        command = [program, "-i", "-f", self.options, "-h", root + "/etc/ssh/ssh_host_ed25519_key",
                   "-o", f"SetEnv=HOME={root}/root", "-o", f"ForceCommand={self.session} {uuid}"]
        with connection:
            ends = connection.fileno()
            process = subprocess.Popen(command, stdin=ends, stdout=ends, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
        self.sessions.append((uuid, process))

    def _console(self, host: str) -> str:
        """Makes the serial console of an address; returns its device."""
        master, slave = os.openpty()
        tty.setraw(slave)  # and kept open: a pty without a slave is hung up
        threading.Thread(target=self._wait_for_key, args=[host, master], daemon=True).start()
        return os.ttyname(slave)

    def _wait_for_key(self, host: str, master: int) -> None:
        while True:
            # Enter only shows the prompt.
            keys = os.read(master, 4096).strip(b"\r\n")
            while self.is_open and host in self.machines:
                self._log_in(self.machines[host], master, keys and keys + b"\r")
                keys = b""

    def _log_in(self, uuid: str, master: int, keys: bytes) -> None:
        """A login on a console, until it ends. `keys` have been typed already."""
        terminal = Terminal([self.session, uuid, "console"], {"TERM": os.environ.get("TERM", "dumb")}, "/")
        self.sessions.append((uuid, terminal.process))
        other = {master: terminal.master, terminal.master: master}
        while True:
            has_ended = terminal.process.poll() is not None
            ready = select.select(list(other), [], [], 0 if has_ended else 0.1)[0]
            for end in ready:
                os.write(other[end], os.read(end, 4096))
                if end == terminal.master and keys:
                    os.write(end, keys)
                    keys = b""
            if has_ended and terminal.master not in ready:
                break
        terminal.close()

    def close(self) -> None:
        """Ends all sessions."""
        self.is_open = False
        self.thread.join()
        for listener in self.listeners.values():
            listener.close()
        for _, process in self.sessions:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Stage:
    """A world for demonstrations: a home with an ssh key, a fake UTM with one image, and guests with an ssh server.

    kodemachine, ssh, sshd, and the commands in the guests are real. UTM and the guests' services are imitations.
    """

    # Programs for people in a guest, beside the guest's own. None of them changes the system.
    PROGRAMS = (
        "bash clear curl df diff du free git git-receive-pack git-upload-pack gzip less nano ps rsync scp stty tar top"
        " tput tty uptime vi vim which"
    )

    def __init__(self, folder: str, pace: float = 1.0) -> None:
        """`pace`: how slow UTM and the guests are; 0: they take no time."""
        os.chmod(folder, 0o711)  # the guests' processes may be nobody's
        self.home, programs = os.path.join(folder, "home"), os.path.join(folder, "bin")
        os.mkdir(self.home, 0o700)
        os.mkdir(programs)
        self.utm = Utm(os.path.join(folder, "utm"))
        self.utm.install(programs, *TOOLS, "session")
        self._link_programs(self.utm.fake.path("tools"))
        key = self._make_key()
        hosts = [host for host in (*(f"127.0.0.{n}" for n in range(2, 22)), "127.0.0.1", "::1")
                 if not Sshd.why_not_bind(host)]
        self.hosts = hosts[:20]
        documents = os.path.join(self.home, "Documents of UTM")
        self.utm.option(documents=documents, addresses=self.hosts, clone_seconds=0.7 * pace, launch_seconds=pace)
        seconds = {"start_seconds": 0.8 * pace, "agent_after": 1.2 * pace, "request_seconds": pace}
        self.utm.add(IMAGE, disk=24 << 20, serials=[{"kind": "ptty"}], **seconds)
        self.network = Network(self.utm, self.hosts, os.path.join(programs, "session"), key + ".pub")
        config = {"ssh_port": self.network.port, "documents": documents}
        write_text(os.path.join(self.home, ".config", "kodemachine", "config.json"), json.dumps(config))
        start = f"import sys; sys.path.insert(0, {HERE!r}); import kodemachine; sys.exit(kodemachine.main())"
        self.program("kodemachine", f'exec {shlex.join([sys.executable, "-IS", "-c", start])} "$@"')
        # Of these, the person's own would lead kodemachine or the shell to their own files and keys.
        own = ("XDG_", "KODEMACHINE_", "SSH_", "ZDOTDIR", "HISTFILE", "ENV", "BASH_ENV")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(own)},
            "HOME": self.home,
            "PATH": programs + os.pathsep + os.environ.get("PATH", "/usr/bin:/bin"),
        }

    @staticmethod
    def why_not() -> str:
        """The reason why there can be no stage here, if there is one."""
        return Sshd.why_not([]) or ("" if shutil.which("ssh") else "no ssh here")

    def program(self, name: str, text: str) -> None:
        """Puts a shell script on PATH."""
        write_text(os.path.join(os.path.dirname(self.home), "bin", name), f"#!/bin/sh\n{text}\n", 0o755)

    def _link_programs(self, folder: str) -> None:
        os.mkdir(folder)
        for name in self.PROGRAMS.split():
            found = shutil.which(name)
            if found:
                os.symlink(found, os.path.join(folder, name))

    def _make_key(self) -> str:
        """An ssh key, and the configuration of every ssh. By itself, ssh looks for both in the person's own home."""
        folder = os.path.join(self.home, ".ssh")
        os.mkdir(folder, 0o700)
        key = os.path.join(folder, "id_ed25519")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "sandbox", "-f", key],
                       stdin=subprocess.DEVNULL, check=True)
        write_text(self.utm.fake.path("ssh_config"), f'Include "{folder}/config"\nHost *\nIdentityFile "{key}"\n'
                   f'IdentitiesOnly yes\nUserKnownHostsFile "{folder}/known_hosts"\n')
        for tool in ("ssh", "scp"):
            write_text(self.utm.fake.path(tool + ".real"), shutil.which(tool) or "/usr/bin/false")
        return key

    def close(self) -> None:
        self.network.close()


class Player(Terminal):
    """A terminal whose output is shown on stdout, with a person who types."""

    # A prompt, with the exit status unless it is 0: of the shell, or of one in a machine.
    PROMPT = rb"(?:^|[\r\n])(?:\x1b\[\?2004h)?(\d*)(?:[\w-]+:~)?\$ "

    def _take(self, seconds: float) -> bool:
        start = len(self.seen)
        has_read = super()._take(seconds)
        sys.stdout.buffer.write(self.seen[start:])
        sys.stdout.flush()
        return has_read

    def type(self, line: str, seconds: float) -> None:
        """Types a line, with so many seconds between the keys."""
        for key in line + "\r":
            self.send(key.encode())
            self._take(seconds)
            time.sleep(seconds)


DEMO = """\
kodemachine project-alpha
echo 'it works' > notes.txt
exit
kodemachine project-alpha -- cat notes.txt
kodemachine cp project-alpha:notes.txt .
kodemachine start -d web
kodemachine list --size
kodemachine stop web
kodemachine purge -y
kodemachine list
"""


def demo(pace: float) -> int:
    """A session of kodemachine with a fake UTM; 0 if all its commands succeed. `pace`: see Stage."""
    if Stage.why_not():
        sys.exit(f"The demo needs an ssh server: {Stage.why_not()}.")
    print("A session of the real kodemachine, with a fake UTM. Commands in its machines run on this computer.",
          file=sys.stderr)
    statuses = b""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kodemachine-demo-"))
        stage = stack.enter_context(contextlib.closing(Stage(os.path.realpath(folder), pace)))
        env = {**stage.environment, "PS1": "${?#0}$ ", "TERM": "xterm"}
        start = ["/bin/sh", "-c", "stty rows 24 cols 80; exec /bin/sh -i"]
        shell = stack.enter_context(contextlib.closing(Player(start, env, stage.home)))
        for line in DEMO.splitlines():
            statuses += shell.expect(Player.PROMPT)[1]
            time.sleep(0.8 * pace)
            shell.type(line, 0.04 * pace)
        statuses += shell.expect(Player.PROMPT)[1]
    print()
    return 1 if statuses else 0


def end_descendants() -> None:
    """Kills the processes that descend from this one, as long as there are any."""
    for _ in range(100):
        with subprocess.Popen(["ps", "-A", "-o", "pid=", "-o", "ppid="], stdout=subprocess.PIPE) as ps:
            rows = [tuple(map(int, line.split())) for line in ps.communicate()[0].splitlines()]
        family = [os.getpid()]
        for member in family:
            family += [pid for pid, parent in rows if parent == member and pid != ps.pid]
        if len(family) == 1:
            return
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


# Of the program `sandbox`, in the sandbox.
SANDBOX = """\
case $#-$1 in
2-break)
  kodemachine exec "$2" -- systemctl stop ssh || exit
  echo "The ssh server of $2 has stopped, so this fails: kodemachine $2
Two ways into the machine are left. To look, and to repair it:
  kodemachine exec $2 -- systemctl status ssh
  kodemachine attach $2          # log in as root, then: systemctl start ssh";;
2-fix) kodemachine exec "$2" -- systemctl start ssh;;
*) echo "usage: sandbox break LABEL | sandbox fix LABEL" >&2; exit 2;;
esac"""

BANNER = """\
kodemachine works in this shell, with a fake UTM. Its machines are imitations:
COMMANDS IN THEM RUN ON THIS COMPUTER, as {user} files.
This shell has a home and an ssh key of its own. When it ends, they are removed,
and everything that was started in it ends, too.

  kodemachine project-alpha                  a new machine, and a shell in it
  kodemachine exec project-alpha -- ip addr  a command, without ssh
  kodemachine attach project-alpha           its console: root, password {password}
  sandbox break project-alpha                stop its ssh, to try the rescue
  kodemachine base create v0.3.0             an image, from a small local file
  exit                                       leave
"""


class Sandbox(Stage):
    """A stage for a newcomer, with what `base create` and `sandbox break` need."""

    # Its prompt and completion are set after the system's start files; and zsh asks a new user no questions.
    START_FILES = {
        ".bashrc": "PS1='sandbox$ '\neval \"$(kodemachine completion bash)\"\n",
        ".zshrc": "PS1='sandbox$ '\neval \"$(kodemachine completion zsh)\"\n",
        ".config/fish/config.fish": "set fish_greeting; function fish_prompt; echo 'sandbox$ '; end\n"
                                    "kodemachine completion fish | source\n",
    }

    def __init__(self, folder: str, pace: float) -> None:
        super().__init__(folder, pace)
        self.environment["PS1"] = "sandbox$ "
        self.program("sandbox", SANDBOX)
        for name, text in self.START_FILES.items():
            write_text(os.path.join(self.home, name), text)
        # If this folder is missing, fish fills it in the background, even during the cleanup.
        os.makedirs(os.path.join(self.home, ".local", "share", "fish", "generated_completions"))
        data = empty_qcow2(2 << 30) + os.urandom(300000)
        names = [os.path.basename(url) for url in kodemachine.UBUNTU_IMAGES.values()]
        sums = "".join(f"{hashlib.sha256(data).hexdigest()} *{name}\n" for name in names)
        self.mirror = Mirror({"/SHA256SUMS": sums.encode(), **{"/" + name: data for name in names}})
        site = kodemachine.UBUNTU.rpartition("/")[0]
        self.program("curl", f'for word; do shift\ncase $word in {site}/*) word={self.mirror.url}/${{word##*/}}\n'
                     f'no_proxy=127.0.0.1; export no_proxy;; esac\nset -- "$@" "$word"; done\n'
                     f'exec {shlex.quote(shutil.which("curl") or "curl: not found")} "$@"')
        if not shutil.which("hdiutil"):
            self.program("hdiutil", 'for target; do [ "$last" = -o ] && echo seed >"$target"; last=$target; done')

    def banner(self) -> str:
        user = "you: they can read and change your"
        if os.geteuid() == 0:
            user = "nobody: they can read its"
        text = BANNER.format(user=user, password=Session.PASSWORD)
        if len(self.hosts) < 4:
            text += (f"\nThis computer has addresses for {len(self.hosts)} machines at a time. For more, first run: "
                     "sudo ifconfig lo0 alias 127.0.0.2\n")
        return text


def sandbox(pace: float) -> int:
    """A shell in which kodemachine works, on a fake UTM that ends with it. `pace`: see Stage."""
    if Stage.why_not():
        sys.exit(f"The sandbox needs an ssh server: {Stage.why_not()}.")
    # The window is closed: tidy up. Ctrl-C is for the shell.
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, lambda *_: None)
    if sys.platform == "linux":
        adopt_orphans = 36      # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(adopt_orphans, 1, 0, 0, 0)
    folder = os.path.realpath(tempfile.mkdtemp(prefix="kodemachine-sandbox-"))
    try:
        stage = Sandbox(folder, pace)
        print(stage.banner())
        subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=stage.environment, cwd=stage.home)
        return 0
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)


class DemoTest(unittest.TestCase):
    """The demo and its recording."""

    def test_demo_runs_its_commands_without_a_failure(self) -> None:
        if Stage.why_not():
            self.skipTest(Stage.why_not())
        command = [sys.executable, os.path.abspath(__file__), "--demo", "0"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout)
        for words in (b"\r\nit works\r\n", b"web is ready", b"web deleted"):
            self.assertIn(words, done.stdout)

    def test_recording_shows_the_demo_and_needs_nothing_else(self) -> None:
        path = os.path.join(HERE, ".github", "demo.svg")
        text = read_text(path)
        self.assertLess(len(text.encode()), 300000)
        self.assertNotRegex(text, r"(?i)<script|\bon\w+=|href|url\(|@import|foreignObject")
        self.assertIn("prefers-color-scheme:dark", text)
        self.assertLessEqual(float(re.findall(r"animation:([\d.]+)s", text)[0]), 30)
        rows = ["".join(row.itertext()) for row in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
        shown = "\n".join(rows)
        for line in DEMO.splitlines():
            self.assertIn(f"$ {line}\n", shown, "make record")


class SandboxTest(unittest.TestCase):
    """make sandbox, as a newcomer uses it."""

    def setUp(self) -> None:
        if Stage.why_not():
            self.skipTest(Stage.why_not())
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="kodemachine-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        os.chmod(self.folder, 0o711)
        self.home = os.path.join(self.folder, "own home")
        os.mkdir(self.home)
        bash = shutil.which("bash") or "/bin/sh"
        env = {"HOME": self.home, "PATH": os.environ["PATH"], "SHELL": bash, "TERM": "dumb", "TMPDIR": self.folder,
               "XDG_STATE_HOME": self.home, "HISTFILE": os.path.join(self.home, "history")}
        command = [sys.executable, "-B", os.path.abspath(__file__), "--sandbox", "0"]
        self.terminal = Terminal(command, env, self.home)
        self.addCleanup(self.terminal.close)
        self.terminal.expect(b"RUN ON THIS COMPUTER")
        self.terminal.expect(rb"sandbox\$ ")

    def type(self, line: str, *answers: str, prompt: str = r"sandbox\$ ") -> None:
        """Types a line, and waits for answers and a prompt."""
        self.terminal.send(line.encode() + b"\r")
        for answer in (*answers, prompt):
            self.terminal.expect(answer.encode())

    def leave(self) -> None:
        """Ends the sandbox, of which nothing may be left."""
        self.terminal.send(b"exit\r")
        self.assertEqual(self.terminal.wait(), 0, self.terminal.seen)
        self.assertEqual((os.listdir(self.home), os.listdir(self.folder)), ([], ["own home"]))
        ps = ["ps", "-A", "-ww", "-o", "command="]
        listing = subprocess.run(ps, stdout=subprocess.PIPE, check=True).stdout.decode(errors="replace")
        self.assertNotIn(self.folder, listing)

    def test_newcomer_gets_a_shell_and_plausible_answers(self) -> None:
        self.type("kodemachine project-alpha", prompt=r"project-alpha:~\$ ")
        self.type("hostname; sudo whoami", r"\nproject-alpha\r\nroot\r\n", prompt=r"project-alpha:~\$ ")
        self.type("exit")
        self.type("kodemachine exec project-alpha -- whoami", r"\nroot\r\n")
        self.type("kodemachine exec project-alpha -- ip addr", r"inet (127\.0\.0\.\d+|::1)/")
        self.type("kodemachine list --size", r"26M +2\.0M\r\n")
        self.type("echo words > f; kodemachine cp f project-alpha:~/g")
        self.type("kodemachine project-alpha -- cat g", r"\nwords\r\n")
        self.leave()

    def attach(self, *answers: tuple[str, str]) -> None:
        """Types at the console of the machine `a`, and leaves it."""
        self.type("kodemachine attach a", prompt="leave with")
        # What is typed before that is discarded.
        wait_for(lambda: not self.terminal.attributes()[3] & termios.ECHO)
        for keys, answer in answers:
            self.type(keys, prompt=answer)
        self.type("\x1d", "a: left")

    def test_machine_without_ssh_can_be_rescued_at_its_console(self) -> None:
        self.type("kodemachine start -d a")
        self.type("sandbox break a", "systemctl status ssh")
        self.type("kodemachine ip a --wait 0.2", "its ssh port does not answer")
        self.type("kodemachine exec a -- systemctl status ssh", r"inactive \(dead\)")
        log_in = ("root", "Password: "), ("sandbox", "a:~# ")
        self.attach(("", "a login: "), ("root", "Password: "), ("wrong", "Login incorrect"), *log_in,
                    ("systemctl start ssh; hostname", r"\na\r\na:~# "), ("exit", "a login: "))
        self.type("kodemachine ssh a -- hostname", r"\na\r\n")
        self.leave()

    def test_shell_at_the_console_ends_with_its_machine(self) -> None:
        self.type("kodemachine start -d a")
        self.attach(("root", "a login: root\r\nPassword: "), ("sandbox", "a:~# "), ("poweroff", "a:~# "))
        self.type("kodemachine stop a; kodemachine start -d a", "a is ready")
        self.attach(("", "a login: "))
        self.leave()

    def test_image_is_created_offline_and_its_machines_have_host_keys(self) -> None:
        self.type("kodemachine base create v0.3.0", "kodeimage-v0.3.0 is ready")
        self.type("kodemachine base use v0.3.0; kodemachine start -d a; kodemachine start -d b", "b is ready")
        self.type("cat ~/.local/state/kodemachine/known_hosts", r"\nkm-a ssh-ed25519 .*\n", "km-b ssh-ed25519 ")
        self.type("kodemachine doctor", "no problems found")
        self.leave()

    def test_processes_end_with_the_sandbox_and_sessions_with_their_machine(self) -> None:
        self.type("kodemachine a", prompt=r"a:~\$ ")
        self.type("sudo poweroff", "closed by remote host")
        self.type(f"sh -c 'sleep 1000; : {self.folder}' & disown")
        self.leave()


# ---- install.sh and make


class InstallTest(unittest.TestCase):
    """install.sh in a checkout of its own, on a machine with only the tools that it may use."""

    shell = shutil.which("dash") or "/bin/sh"
    tools = ("awk", "cat", "chmod", "cmp", "dirname", "grep", "head", "mkdir", "mv", "rm", "sed", "uname")
    program = """\
#!/usr/bin/env python3
'''Stands in for kodemachine: prints what it was run with.'''
import sys
__version__ = "{}"
print(sys.executable, sys.flags.isolated, sys.flags.no_site, *sys.argv[1:], sep="|")
"""

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory(prefix="kode machine ")
        self.addCleanup(scratch.cleanup)
        self.top = os.path.realpath(scratch.name)
        self.target = self.path("home/bin/kodemachine")
        for folder in ("home", "tools", "stubs"):
            os.mkdir(self.path(folder))
        for tool in self.tools:
            os.symlink(shutil.which(tool) or "", self.path("tools/" + tool))
        script = read_text(os.path.join(HERE, "install.sh"))
        # This machine's own interpreters must not affect the tests.
        self.write("check out/install.sh", re.sub("/(opt/homebrew|usr/local)/", "/nonexistent/", script))
        self.release("1.0.0")

    def path(self, name: str) -> str:
        return os.path.join(self.top, name)

    def write(self, name: str, text: str) -> str:
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        write_text(self.path(name), text, 0o755)
        return self.path(name)

    def read(self, name: str) -> str:
        return read_text(self.path(name))

    def release(self, version: str) -> None:
        self.write("check out/kodemachine.py", self.program.format(version))

    def python(self, name: str) -> str:
        """A script that runs this Python, like pyenv's shims."""
        return self.write(name, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    def old_python(self, name: str) -> str:
        """This Python, which claims to be 3.8 in any code run with -IS -c CODE."""
        claim = "import sys; sys.version_info = (3, 8, 18)"
        return self.write(name, f'#!/bin/sh\nexec "{sys.executable}" -IS -c "{claim}; $3"\n')

    def run_script(self, *args: str, **env: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of install.sh, run from a folder that is not its own."""
        home = {"HOME": self.path("home"), "PATH": self.path("stubs") + ":" + self.path("tools"),
                "PYTHON": sys.executable, "SHELL": "/bin/zsh"}
        done = subprocess.run([self.shell, self.path("check out/install.sh"), *args], env={**home, **env},
                              cwd=self.top, stdin=subprocess.DEVNULL, capture_output=True,
                              encoding="utf-8", timeout=60)
        return done.returncode, done.stdout, done.stderr

    def install(self, *args: str, **env: str) -> str:
        """Stdout of a run that must succeed, with an empty stderr."""
        code, out, err = self.run_script(*args, **env)
        self.assertEqual((code, err), (0, ""), out)
        return out

    def first_line(self) -> str:
        with open(self.target, "rb") as file:
            return file.readline().decode().rstrip("\n")

    def test_installed_program_runs_isolated_with_the_chosen_python(self) -> None:
        self.assertIn(f"installed kodemachine 1.0.0: {self.target} (Python ", self.install())
        self.assertEqual(stat.S_IMODE(os.stat(self.target).st_mode), 0o755)
        self.assertEqual(self.first_line(), f"#!{sys.executable} -IS")
        out = subprocess.check_output([self.target, "a b"], encoding="utf-8")
        python, *rest = out.rstrip("\n").split("|")
        self.assertEqual(os.path.realpath(python), os.path.realpath(sys.executable))
        self.assertEqual(rest, ["1", "1", "a b"])

    def test_installed_program_is_compiled_and_has_its_source_for_other_pythons(self) -> None:
        self.install()
        with zipfile.ZipFile(self.target) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        self.assertEqual(parts["__main__.py"].decode(), self.read("check out/kodemachine.py"))
        # Code of another Python, and broken code: code with the right version is not compiled again.
        for number, code, status in ((b"\0\0\0\0", b"", 0), (importlib.util.MAGIC_NUMBER, b"spoilt", 1)):
            with zipfile.ZipFile(self.path("other"), "w") as archive:
                archive.writestr("__main__.pyc", number + parts["__main__.pyc"][4:16] + code)
                archive.writestr("__main__.py", parts["__main__.py"])
            done = subprocess.run([sys.executable, "-IS", self.path("other"), "x"], capture_output=True, timeout=60)
            self.assertEqual((done.returncode, b"|x" in done.stdout), (status, not status), done.stderr)

    def test_installed_kodemachine_is_recognised_and_knows_its_path(self) -> None:
        shutil.copy(os.path.join(HERE, "kodemachine.py"), self.path("check out"))
        self.install()
        self.assertIn(" is already up to date: ", self.install())
        os.symlink(self.target, self.path("km"))
        for program in (self.target, self.path("km"), self.path("check out/kodemachine.py")):
            done = subprocess.run([sys.executable, "-IS", program, "ssh-config"], env={"HOME": self.path("home")},
                                  capture_output=True, encoding="utf-8", timeout=60)
            # As installed its first line names a Python that an upgrade leaves where it is.
            words = f"{sys.executable} -IS '{program}'" if program.endswith(".py") else f"'{self.target}'"
            self.assertIn(f"  ProxyCommand {words} proxy %h\n", done.stdout)

    def test_plain_copy_is_recognised_and_replaced(self) -> None:
        os.mkdir(self.path("home/bin"))
        shutil.copy(self.path("check out/kodemachine.py"), self.target)
        self.assertIn("updated kodemachine 1.0.0 -> 1.0.0: ", self.install())
        self.assertIn("kodemachine 1.0.0 is already up to date", self.install())

    def test_second_run_changes_nothing_and_a_new_release_updates(self) -> None:
        self.install()
        before = os.stat(self.target)
        self.assertIn("kodemachine 1.0.0 is already up to date: " + self.target, self.install())
        self.assertEqual(os.stat(self.target).st_ino, before.st_ino)
        self.release("1.1.0")
        self.assertIn("updated kodemachine 1.0.0 -> 1.1.0: " + self.target, self.install())
        self.assertEqual(os.listdir(self.path("home/bin")), ["kodemachine"])

    def test_running_copy_is_replaced_and_not_rewritten(self) -> None:
        self.install()
        with open(self.target, "rb") as running:
            self.release("1.1.0")
            self.install()
            self.assertIn(b'"1.0.0"', running.read())

    def test_missing_home_requires_a_prefix(self) -> None:
        code, _, err = self.run_script(HOME="")
        self.assertEqual((code, "--prefix" in err), (2, True), err)
        self.install("--prefix", self.path("opt"), HOME="")
        self.assertTrue(os.access(self.path("opt/bin/kodemachine"), os.X_OK))
        self.assertFalse(os.path.exists(self.target))

    def test_prefix_may_be_relative_or_contain_blanks_or_a_tilde(self) -> None:
        for prefix, folder in (("a prefix", "a prefix"), ("~/tools/", "home/tools"),
                               (self.path("absolute"), "absolute")):
            with self.subTest(prefix):
                self.install("--prefix", prefix)
                self.assertTrue(os.access(self.path(folder + "/bin/kodemachine"), os.X_OK))

    def test_destdir_prints_no_notes_about_this_machine(self) -> None:
        out = self.install("--prefix=/opt/kode", DESTDIR=self.path("stage"))
        self.assertTrue(os.path.exists(self.path("stage/opt/kode/bin/kodemachine")))
        self.assertNotIn("note:", out)

    def test_uninstall_removes_only_the_program_and_lists_what_remains(self) -> None:
        self.install()
        self.write("home/bin/other", "")
        config = self.write("home/.config/kodemachine/config.json", "{}")
        out = self.install("--uninstall", XDG_STATE_HOME="/elsewhere")
        self.assertIn("removed kodemachine 1.0.0: " + self.target, out)
        self.assertIn(os.path.dirname(config) + " stays (configuration)", out)
        self.assertNotIn("/elsewhere/kodemachine", out, "it does not exist")
        self.assertEqual(os.listdir(self.path("home/bin")), ["other"])
        self.assertTrue(os.path.exists(config))
        self.assertIn("kodemachine is not installed: " + self.target, self.install("--uninstall"))

    def test_other_program_of_that_name_is_neither_replaced_nor_removed(self) -> None:
        self.write("home/bin/kodemachine", "#!/bin/sh\necho mine\n")
        for args in ((), ("--uninstall",)):
            with self.subTest(args):
                code, out, err = self.run_script(*args)
                self.assertEqual((code, out, err.count("\n")), (1, "", 1))
                self.assertIn(f"{self.target} is not kodemachine", err)
        self.assertEqual(self.read(self.target), "#!/bin/sh\necho mine\n")

    def test_folder_or_dangling_link_of_that_name_is_left_alone(self) -> None:
        os.makedirs(self.target)
        self.assertEqual(self.run_script()[0], 1)
        os.rmdir(self.target)
        os.symlink("nowhere", self.target)
        self.assertEqual(self.run_script()[0], 1)
        self.assertEqual(os.readlink(self.target), "nowhere")

    def test_link_to_the_checkout_is_replaced_and_the_checkout_kept(self) -> None:
        os.mkdir(self.path("home/bin"))
        os.symlink(self.path("check out/kodemachine.py"), self.target)
        self.install()
        self.assertFalse(os.path.islink(self.target))
        self.assertEqual(self.read("check out/kodemachine.py"), self.program.format("1.0.0"))

    def test_python_that_is_too_old_is_skipped(self) -> None:
        old = self.old_python("old/python3")
        self.python("stubs/python3")
        out = self.install(PYTHON=old)
        self.assertIn(f"passed over: {old} (3.8.18)\n", out)
        self.assertIn(f", {sys.executable})\n", out)

    def test_missing_python_is_reported_in_one_line_with_the_ones_found(self) -> None:
        old = self.old_python("old/python3")
        broken = self.write("stubs/python3", "#!/bin/sh\nexit 127\n")
        code, out, err = self.run_script(PYTHON=old)
        self.assertEqual((code, out, err.count("\n")), (1, "", 1))
        self.assertIn(f"no Python 3.9 or newer, found: {old} (3.8.18), {broken} (unusable)", err)
        self.assertIn("xcode-select --install", err)
        self.assertFalse(os.path.exists(self.path("home/bin")))

    def test_virtual_environment_on_path_is_skipped(self) -> None:
        self.python("venv/bin/python3")
        self.write("venv/pyvenv.cfg", "")
        path = self.path("venv/bin") + ":" + self.path("tools")
        self.assertIn("found: none", self.run_script(PYTHON="", PATH=path)[2])
        self.assertEqual(self.run_script(PYTHON="/nope/python3")[::2],
                         (1, "install.sh: PYTHON=/nope/python3: there is no such program\n"))

    def test_apple_python_is_used_only_through_xcode_select(self) -> None:
        self.write("stubs/uname", "#!/bin/sh\necho Darwin\n")
        self.write("stubs/xcode-select", "#!/bin/sh\nexit 2\n")
        self.assertIn("found: none", self.run_script(PYTHON="/usr/bin/python3")[2])
        self.write("stubs/xcode-select", f"#!/bin/sh\necho '{self.path('clt')}'\n")
        self.python("clt/usr/bin/python3")
        self.assertIn(f", {sys.executable})\n", self.install(PYTHON="/usr/bin/python3"))

    def test_shim_is_resolved_to_its_interpreter(self) -> None:
        self.assertIn(f", {sys.executable})\n", self.install(PYTHON=self.python("shims/python3")))
        self.assertEqual(self.first_line(), f"#!{sys.executable} -IS")

    def test_python_path_that_does_not_fit_the_first_line_is_found_through_env(self) -> None:
        long = tempfile.TemporaryDirectory(prefix="long" * 30)
        self.addCleanup(long.cleanup)
        for folder in (self.path("stubs"), long.name):
            with self.subTest(folder):
                python = os.path.join(folder, "python3")
                os.symlink(sys.executable, python)
                self.install(PYTHON=python)
                self.assertEqual(self.first_line(), "#!/usr/bin/env python3")

    def test_path_entries_are_compared_exactly(self) -> None:
        for entry, noted in (("home/bin", False), ("home/bin/", False), ("home/bin2", True), ("home", True)):
            with self.subTest(entry):
                out = self.install(PATH=self.path("tools") + ":" + self.path(entry))
                self.assertEqual(f"note: {self.path('home/bin')} is not on PATH" in out, noted)

    def test_path_note_has_the_line_for_the_shell_in_use(self) -> None:
        for shell, file, line in (("/bin/zsh", ".zshrc", 'export PATH="{}:$PATH"'),
                                  ("/bin/bash", ".bashrc", 'export PATH="{}:$PATH"'),
                                  ("/usr/bin/fish", ".config/fish/config.fish", 'fish_add_path "{}"'),
                                  ("/bin/ksh", ".profile", 'export PATH="{}:$PATH"')):
            with self.subTest(shell):
                self.write("stubs/uname", "#!/bin/sh\necho Linux\n")
                line = line.format(self.path("home/bin"))
                out = self.install(SHELL=shell)
                self.assertIn(f"is not on PATH; add this line to ~/{file}:\n  {line}\n", out)
                self.assertFalse(os.path.exists(self.path("home/" + file)))

    def test_completion_note_is_shown_until_its_line_exists(self) -> None:
        for shell, file, line in (("/bin/zsh", ".zshrc", 'eval "$(kodemachine completion zsh)"'),
                                  ("/bin/bash", ".bashrc", 'eval "$(kodemachine completion bash)"'),
                                  ("/bin/fish", ".config/fish/config.fish", "kodemachine completion fish | source")):
            with self.subTest(shell):
                self.write("stubs/uname", "#!/bin/sh\necho Linux\n")
                note = f"note: for completion by Tab add this line to ~/{file}:\n  {line}\n"
                self.assertIn(note, self.install(SHELL=shell))
                self.write("home/" + file, line + "\n")
                self.assertNotIn("Tab", self.install(SHELL=shell))
                self.assertEqual(self.read("home/" + file), line + "\n")
        self.assertNotIn("Tab", self.install(SHELL="/bin/ksh"))
        self.assertNotIn("Tab", self.install(SHELL=""))

    def test_missing_companions_are_notes_and_not_errors(self) -> None:
        out = self.install()
        self.assertIn("note: ssh is missing", out)
        utm = os.path.exists("/Applications/UTM.app/Contents/MacOS/utmctl")
        self.assertEqual("note: UTM is missing; brew install --cask utm" in out, not utm)
        self.write("home/Applications/UTM.app/Contents/MacOS/utmctl", "#!/bin/sh\n")
        self.write("stubs/ssh", "#!/bin/sh\n")
        self.assertNotIn("is missing", self.install())

    def test_usage_errors_exit_2(self) -> None:
        for args in (("--wat",), ("extra",), ("--prefix",), ("--prefix", ""), ("--prefix", "--uninstall")):
            with self.subTest(args):
                code, out, err = self.run_script(*args)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("--uninstall", self.install("--help"))
        self.assertFalse(os.path.exists(self.path("home/bin")))


class MakefileTest(unittest.TestCase):
    """The Makefile."""

    def make(self, *args: str) -> str:
        # MAKEFLAGS of a `make test` around us would change what is printed.
        env = {"PATH": os.environ["PATH"]}
        return subprocess.check_output(["make", "-C", HERE, "--no-print-directory", *args], env=env, encoding="utf-8")

    def test_help_is_the_default_target_and_lists_all_targets(self) -> None:
        targets = re.findall(r"^\.PHONY: (.*)$", read_text(os.path.join(HERE, "Makefile")), re.MULTILINE)[0].split()
        listed = re.findall(r"^  make (\S+) +\S.*$", self.make(), re.MULTILINE)
        self.assertEqual(listed, targets)

    def test_prefix_is_passed_on_only_when_given(self) -> None:
        self.assertEqual(self.make("-n", "install").split(), ["sh", "install.sh"])
        self.assertEqual(self.make("-n", "uninstall", "PREFIX=/a b"), 'sh install.sh --prefix "/a b" --uninstall\n')


# ---- the README


class ReadmeTest(unittest.TestCase):
    """The commands and sessions in the README work as shown."""

    # These have tests of their own: they need a network, a guest with systemd, or a real ssh.
    ELSEWHERE = ("base create", "base seal", "cp")

    # These programs are not in the fake's guests.
    STATUS = {"kodemachine next -- sudo apt-get install -y build-essential": 127,
              "kodemachine project-alpha -- make test": 127}

    def setUp(self) -> None:
        self.text = read_text(os.path.join(HERE, "README.md"))
        self.blocks = re.findall(r"(?ms)^```(\w+)\n(.*?)^```", self.text)
        spans = re.findall(r"`(kodemachine [^`]+)`", re.sub(r"(?ms)^```.*?^```", "", self.text))
        lines = [line.strip() for _, block in self.blocks for line in block.splitlines()]
        lines += [line.strip() for line in self.text.splitlines() if line.startswith("    kodemachine ")]
        typed = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?kodemachine ", line)]
        self.commands = [re.sub(r" {3,}#.*", "", text) for text in dict.fromkeys([*typed, *spans])]

    def stage(self) -> Stage:
        folder = tempfile.mkdtemp(prefix="kodemachine-test-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        stage = Stage(os.path.realpath(folder), pace=0)
        self.addCleanup(stage.close)
        return stage

    def run_in(self, stage: Stage, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command], env={**stage.environment, "LC_ALL": "C.UTF-8"}, cwd=stage.home,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=60,
        )

    def try_out(self, commands: Sequence[str]) -> None:
        """Runs each in a fleet that no other has changed."""
        stage = self.stage()
        stage.utm.add("kodeimage-v0.1.0")
        labels = "project-alpha next agent web web-1"
        alpha = self.run_in(stage, f"kodemachine start -d {labels} && kodemachine stop web web-1")
        self.assertEqual(alpha.returncode, 0, alpha.stdout)
        write_text(os.path.join(stage.home, "hook"), "#!/bin/sh\n")
        kept = os.path.join(os.path.dirname(stage.home), "kept")
        folders = {stage.home: kept + "-home", stage.utm.folder: kept + "-utm"}

        def copy_file(place: str, copy: str) -> None:
            """A disk is never written to, and need not be copied."""
            (os.link if os.path.getsize(place) > 1 << 20 else shutil.copyfile)(place, copy)
            shutil.copymode(place, copy)

        for place, copy in folders.items():
            shutil.copytree(place, copy, symlinks=True, copy_function=copy_file)
        for text in commands:
            skipped = any(text.startswith(f"kodemachine {words}") for words in self.ELSEWHERE)
            if skipped or re.search(r"\b[A-Z]{3,}\b|\b[SN]$|<label>|\.\.\.", text):
                continue
            with self.subTest(text):
                words = text.replace("db", "web-1")
                if re.search(r"--fresh|purge( --all)?$", text):
                    words += " -y"
                done = self.run_in(stage, re.sub(r"attach \S+$", r"\g<0> --timeout 0.1", words))
                self.assertEqual(done.returncode, self.STATUS.get(text, 0), done.stdout)
                self.assertNotIn("Traceback", done.stdout)
            if re.match(r"kodemachine (list|status|ip|doctor|help|completion|config get)\b", text):
                continue        # it changes nothing
            for place, copy in folders.items():
                shutil.rmtree(place)
                shutil.copytree(copy, place, symlinks=True, copy_function=copy_file)

    def test_sessions_match_the_output_of_the_program(self) -> None:
        stage = self.stage()

        def general(text: str) -> str:
            for pattern, word in ((r"127\.0\.0\.\d+|192\.168\.64\.\d+", "IP"), (r"\b[\d.]+[BKMGT]\b", "SIZE"),
                                  (r"\b\d+[smhd]\b", "AGE"), (r" +", " ")):
                text = re.sub(pattern, word, text)
            return "\n".join(line.strip() for line in text.replace("\r", "").splitlines())

        self.run_in(stage, "kodemachine start -d project-alpha")
        for _, block in (found for found in self.blocks if found[0] == "console"):
            for session in re.split(r"(?m)^\$ ", block)[1:]:
                command, _, shown = session.partition("\n")
                with self.subTest(command):
                    self.assertEqual(general(self.run_in(stage, command).stdout), general(shown))

    def test_commands_can_be_parsed(self) -> None:
        values = {"S": "5", "N": "1", "AGE": "7d", "SIZE": "4G", "KEY": "prefix", "VALUE": "x-", "vX.Y.Z": "v0.3.0"}
        self.assertGreater(len(self.commands), 40)
        for text in self.commands:
            with self.subTest(text):
                argv = shlex.split(re.split(r" [|<>] ", text)[0].replace("LABEL", "alpha"))[1:]
                words, _, _ = kodemachine.split_command_line([values.get(word, word) for word in argv])
                if not words[-1].islower() or "--help" not in words:
                    kodemachine.build_parser(words).parse_args(words)

    def test_commands_succeed_part_1(self) -> None:
        self.try_out(self.commands[0::3])

    def test_commands_succeed_part_2(self) -> None:
        self.try_out(self.commands[1::3])

    def test_commands_succeed_part_3(self) -> None:
        self.try_out(self.commands[2::3])

    def test_reference_names_every_setting_and_exit_status(self) -> None:
        for key, default in kodemachine.Settings._field_defaults.items():
            row = re.search(rf"(?m)^\| `{key}` \| (.*?) \|", self.text)
            self.assertTrue(row, key)
            if row and default is not None:
                self.assertEqual(row[1].strip("`"), default if isinstance(default, str) else json.dumps(default))
        for status in ("0", "1", "2", "3", "4", "5", "6", "129, 130, 131, 143, 141"):
            self.assertRegex(self.text, rf"(?m)^\| {status} \|", status)

    def test_reference_has_the_json_keys_of_the_program(self) -> None:
        stage = self.stage()
        self.run_in(stage, "kodemachine start -d alpha")
        machine = list(kodemachine.Facts._fields)
        for row, command, others in (
            ("list --json", "kodemachine list --json", ["list", "--size", "shared", "offline"]),
            ("status --json LABEL", "kodemachine status --json alpha", machine),
            ("status --json", "kodemachine status --json", []),
            ("base list --json", "kodemachine base list --json", []),
            ("doctor --json", "kodemachine doctor --json", []),
        ):
            with self.subTest(row):
                found = json.loads(self.run_in(stage, command + " 2>/dev/null").stdout)
                first = found[0] if isinstance(found, list) else found
                cells = re.search(rf"(?m)^\| `{row}`.*?\| (.*) \|$", self.text)
                assert cells
                self.assertEqual(set(re.findall(r"`(.*?)`", cells[1])) | set(others), set(first) | set(others))

    def test_readme_is_short(self) -> None:
        """A newcomer reads it in a few minutes."""
        self.assertLessEqual(len(self.text.splitlines()), 320)


# ---- the architecture


class WithoutAnnotations(ast.NodeTransformer):
    """Removes the annotations, which are not evaluated."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802 (as ast's)
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:  # noqa: N802 (as ast's)
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=node.lineno))


def used_names(top: ast.stmt) -> set[str]:
    """The global names that a top-level statement uses, inside of its functions too; local names do not count."""
    bare = WithoutAnnotations().visit(ast.parse(ast.unparse(top)))
    table = symtable.symtable(ast.unparse(ast.fix_missing_locations(bare)), "", "exec")
    found: set[str] = set()
    tables = [table]
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        found.update(symbol.get_name() for symbol in scope.get_symbols()
                     if symbol.is_referenced() and (scope is table or symbol.is_global()))
    return found


class ArchitectureTest(unittest.TestCase):
    """The rules of the first page of kodemachine.py, checked in its text."""

    def setUp(self) -> None:
        with open(KODEMACHINE, encoding="utf-8") as file:
            self.text = file.read()
        self.tree = ast.parse(self.text)
        self.names: dict[str, set[str]] = {}  # dotted names, and the top-level names inside of which they are used
        for top in self.tree.body:
            for node in ast.walk(top):
                if isinstance(node, (ast.Attribute, ast.Name)):
                    self.names.setdefault(ast.unparse(node), set()).add(self.place(top))

    def users(self, *patterns: str) -> set[str]:
        """The top-level names inside of which a dotted name that matches is used."""
        wanted = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
        return {top for name, tops in self.names.items() if wanted.fullmatch(name) for top in tops}

    def test_processes_are_started_only_here(self) -> None:
        starting = (
            r"subprocess\.(Popen|run|call|check_\w+|getoutput|getstatusoutput)",
            r"os\.(exec|spawn|posix_spawn)\w*",
            r"os\.(system|fork|forkpty|popen)",
            r"pty\.(fork|spawn)",
        )
        # `end_child` only names the class in an annotation.
        self.assertEqual(self.users(*starting), {"Call", "run_foreground", "exec_ssh", "end_child"})

    def test_standard_streams_are_written_only_here(self) -> None:
        self.assertEqual(self.users(r"sys\.(__)?(stdout|stderr)(__)?"), {"Terminal", "complete_handles"})
        self.assertEqual(self.users("print", "input", "breakpoint"), set())

    def test_sleep_is_called_only_here(self) -> None:
        self.assertEqual(self.users(r"time\.sleep"), {"poll", "Prober"})


    def test_public_names_have_docstrings(self) -> None:
        silent = []
        for top in self.tree.body:
            inner = top.body if isinstance(top, ast.ClassDef) else []
            for node in (top, *inner):
                if isinstance(node, self.DEFINITIONS) and node.name[0] != "_" and not ast.get_docstring(node):
                    silent.append(f"{self.place(top)}.{node.name}")
        self.assertEqual(silent, [])

    def test_errors_have_a_hint(self) -> None:
        kinds = {name for name, kind in vars(kodemachine).items()
                 if isinstance(kind, type) and issubclass(kind, KodeError)}
        silent = {
            ast.unparse(node)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and len(node.args) < 2
        }
        # These two follow the user's no.
        self.assertEqual(silent, {"KodeError('nothing was changed')", "KodeError('nothing was deleted')"})

    def test_imports_are_from_the_standard_library(self) -> None:
        imported = {alias.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)}
        known = getattr(sys, "stdlib_module_names", None)  # from 3.10 on
        imported = {name.partition(".")[0] for name in imported}
        self.assertLessEqual(imported, known or imported)

    DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

    # Names that are used above their definition, with the top-level name that uses them, and the reason. An annotation
    # is not a use, because `from __future__ import annotations` leaves it unevaluated. Nor is recursion.
    UPWARDS: dict[tuple[str, str], str] = {}

    @staticmethod
    def place(top: ast.stmt) -> str:
        """The name of a top-level statement; the line of one that has none."""
        if isinstance(top, (ast.Assign, ast.AnnAssign)):
            return ast.unparse(top.targets[0] if isinstance(top, ast.Assign) else top.target)
        return str(getattr(top, "name", f"line {top.lineno}"))

    def defined(self) -> dict[str, ast.stmt]:
        """The statements that define the top-level names."""
        found: dict[str, ast.stmt] = {}
        for top in self.tree.body:
            names = [self.place(top)] if isinstance(top, self.DEFINITIONS) else []
            if isinstance(top, (ast.Assign, ast.AnnAssign)):
                names = [node.id for node in ast.walk(top) if isinstance(node, ast.Name)
                         and isinstance(node.ctx, ast.Store)]
            for name in names:
                found.setdefault(name, top)
        return found

    def test_code_uses_only_names_that_are_defined_above_it(self) -> None:
        defined = self.defined()
        self.assertGreater(len(defined), 300)
        upwards = {(self.place(top), name) for top in self.tree.body for name in used_names(top)
                   if name in defined and defined[name].lineno > top.lineno}
        self.assertEqual(upwards, set(self.UPWARDS))

    def test_a_use_above_the_definition_is_found(self) -> None:
        for text, names in (
            ("def a(): return b()", {"b"}),
            ("def a():\n    def inner(): return b\n    return inner", {"b"}),
            ("class A(B):\n    c = C\n    def d(self): return [E for x in F]", {"B", "C", "E", "F"}),
            ("@b\ndef a(c=D): pass", {"b", "D"}),
            ("a = lambda: b.c", {"b"}),
            ("def a(b: C, *d: E, **f: G) -> H:\n    b = d\n    x: I = f\n    y: J\n    return b + x", set()),
            ("class A:\n    b: C\n    d: E = 1", set()),
        ):
            found = used_names(ast.parse(text).body[0])
            self.assertEqual(found - {"__class__"}, names, text)

    def test_sections_are_those_of_the_docstring_in_that_order(self) -> None:
        first, *headings = ["docstring, imports, version", *re.findall(r"(?m)^# ---- (.*)$", self.text)]
        listed = re.findall(r"(?:^|  )\s*(\d+)  (\S+(?: \S+)*)", str(ast.get_docstring(self.tree)), re.MULTILINE)
        titles = [title for _, title in sorted(listed, key=lambda entry: int(entry[0]))]
        self.assertEqual(sorted(int(number) for number, _ in listed), list(range(1, len(titles) + 1)))
        self.assertEqual(titles, [first, *headings])


# ---- running the tests

TEST_LIMIT = 180  # seconds that one test may take
MEMORY = "/dev/shm"  # where Linux keeps files in memory


def settle_down() -> None:
    """Makes the tests independent of the caller's settings, and faster where possible."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # else the children of a background job ignore them
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        volume = os.statvfs(MEMORY)
        roomy = volume.f_bavail * volume.f_frsize > 2 << 30 and not volume.f_flag & os.ST_NOEXEC
        if roomy and os.access(MEMORY, os.W_OK) and "TMPDIR" not in os.environ:
            os.environ["TMPDIR"] = MEMORY       # the fake's many small files take a sixth of all the time on a disk


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
        """Gives the worker a test; ends it if no test is left."""
        assert self.process.stdin
        self.test = self.waiting.pop(0) if self.waiting else ""
        if self.test:
            with contextlib.suppress(BrokenPipeError):  # it is dead: reading its answer reports that
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
    faulthandler.dump_traceback_later(TEST_LIMIT, exit=True)  # a test that hangs has failed
    if "/" in test:
        World(test).run(result)
    else:
        unittest.defaultTestLoader.loadTestsFromName(test, sys.modules[__name__]).run(result)
    faulthandler.cancel_dump_traceback_later()
    failures = [f"{which}\n{text}" for which, text in result.errors + result.failures]
    failures += ["unexpected success"] * len(result.unexpectedSuccesses)
    skipped = "; ".join(reason for _, reason in result.skipped)
    if skipped and os.environ.get("KODEMACHINE_NO_SKIP"):
        failures.append(f"skipped: {skipped}")
    return Outcome(test, time.monotonic() - started, "\n".join(failures), "" if failures else skipped)


def work() -> int:
    """Runs the tests named on stdin. Their output goes to stderr, since stdout is for results."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with results:
        for line in sys.stdin:
            print(json.dumps(run_one(line.strip())), file=results, flush=True)
    return 0


def outcomes(tests: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """Yields results as they arrive. A worker that dies has failed its test, and is replaced."""
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
    parser.add_argument("-j", "--jobs", type=int, default=4 * (os.cpu_count() or 1), help="tests at a time")
    parser.add_argument("-k", metavar="PATTERN", action="append", help="only tests whose name contains it")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--matrix", nargs="?", const="", metavar="CASE", help="every fault at every call, or some")
    parser.add_argument("--demo", nargs="?", const=1.0, type=float, metavar="PACE",
                        help="a session of kodemachine, instead of tests; with 0 as fast as possible")
    parser.add_argument("--sandbox", nargs="?", const=1.0, type=float, metavar="PACE",
                        help="a shell to try kodemachine in, instead of tests")
    options = parser.parse_args()
    if options.worker:
        return work()
    for pace, run in ((options.demo, demo), (options.sandbox, sandbox)):
        if pace is not None:
            return run(pace)
    settle_down()
    if options.matrix is not None:
        return matrix(options.jobs, options.matrix)
    module, loader = sys.modules[__name__], unittest.defaultTestLoader
    loader.testNamePatterns = ([text if "*" in text else f"*{text}*" for text in options.k] if options.k else None)
    names = options.names
    suite = loader.loadTestsFromNames(names, module) if names else loader.loadTestsFromModule(module)
    if loader.errors:
        parser.error(f"no such tests: {' '.join(names)}")
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
