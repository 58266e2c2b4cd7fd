#!/usr/bin/env python3
"""How fast kodemachine is, against floors that nothing can go below. Standard library only, no Mac needed.

    python3 .ci/bench.py [--quick] [--json] [-k PART]

Every scenario takes turns with its floor, so that what else the machine is doing slows both, and medians are compared.
The program is the one that install.sh makes, unless a row says `script`. UTM is the tests' fake, whose calls take as
long as they are told; what a call to the real one takes, on a Mac, nobody has measured with this.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import kodemachine  # noqa: E402 (it is in the folder above)
import test_kodemachine as tests  # noqa: E402

IMPORTS = "import argparse, json, os, re, shutil, signal, subprocess, sys, time"
# Runs a program and tells, through a pipe, what it alone has used: seconds of CPU, and kilobytes at its peak. (Linux
# counts in ru_maxrss what the parent had, macOS counts bytes.)
OWN = """\
import atexit, os, resource, runpy, sys
def tell(pipe):
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss // 1024
    if os.path.exists("/proc/self/status"):
        peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    os.write(pipe, b"%f %d" % (used.ru_utime + used.ru_stime, peak))
atexit.register(tell, int(sys.argv.pop(1)))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What `attach` is measured against: the least that relays between a serial line and a terminal.
RELAY = """\
import os, select, sys
line = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
os.write(1, b"console")
while True:
    for handle in select.select([line, 0], [], [])[0]:
        os.write(1 if handle == line else line, os.read(handle, 65536))
"""


class Row(NamedTuple):
    """One line of the result. Times in milliseconds; `spread`: half of the values lie within so much of the median."""

    scenario: str
    ours: float
    unit: str
    spread: float
    floor: str
    floor_value: float | None
    result: str
    target: str
    met: bool | None
    calls: str


class World(tests.Case):
    """The tests' fake UTM, and kodemachine installed beside it."""

    GREETERS = 1

    def setUp(self) -> None:
        super().setUp()
        surroundings = {**self.environment, "PYTHON": sys.executable}
        install = ["sh", os.path.join(os.path.dirname(HERE), "install.sh")]
        subprocess.run(install, env=surroundings, stdout=subprocess.DEVNULL, check=True)
        self.program = os.path.join(self.home, "bin", "kodemachine")
        # The end of this ssh is the moment of its exec, nearly.
        os.unlink(os.path.join(self.bin, "ssh"))
        os.symlink(shutil.which("true") or "/usr/bin/true", os.path.join(self.bin, "ssh"))

    def fleet(self, count: int) -> None:
        """So many machines, a third of them running, with packages on disk."""
        documents = os.path.join(self.folder, f"{count} machines")
        with self.utm.fake as utm:
            utm.vms.clear()
        os.mkdir(documents)
        self.utm.option(documents=documents)
        self.use(documents=documents)
        for n in range(count):
            status, address = ("started", [f"10.0.{n // 250}.{n % 250 + 1}"]) if n % 3 == 0 else ("stopped", [])
            self.vm(f"m{n}", status, ips=address, disk=4096)
        self.remember(**{f"m{n}": {"image": tests.IMAGE, "image_uuid": "-", "created": tests.hours_ago(n)}
                         for n in range(count)})

    def seconds(self, *argv: str) -> float:
        """How long a program takes, which must succeed."""
        began = time.perf_counter()
        done = subprocess.run(argv, env=self.environment, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True)
        took = time.perf_counter() - began
        assert done.returncode == 0, (argv, done)
        return took

    def own(self, *args: str) -> tuple[float, int]:
        """What kodemachine itself uses, without its children: seconds of CPU, and kilobytes at its peak."""
        reader, writer = os.pipe()
        with open(reader, encoding="ascii") as told:
            try:
                argv = [sys.executable, "-IS", "-c", OWN, str(writer), self.program, *args]
                subprocess.run(argv, env=self.environment, cwd=self.home, stdin=subprocess.DEVNULL,
                               capture_output=True, check=True, pass_fds=[writer])
            finally:
                os.close(writer)
            cpu, peak = told.read().split()
        return float(cpu), int(peak)

    def calls(self, *argv: str) -> str:
        """The external calls of a program."""
        before = len(self.utm.journal())
        self.seconds(*argv)
        verbs = [entry["verb"] for entry in self.utm.journal()[before:] if "verb" in entry]
        return ", ".join(f"{number} {verb}" for verb, number in sorted(collections.Counter(verbs).items()))


def turns(count: int, *kinds: Callable[[], float]) -> list[list[float]]:
    """What each kind gives, `count` times, one after the other and again from the first."""
    found: list[list[float]] = [[] for _ in kinds]
    for _ in range(count):
        for values, kind in zip(found, kinds):
            values.append(kind())
    return found


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles: half of the values lie within so much of the median, about."""
    if len(values) < 3:
        return 0.0
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / 2


def row(scenario: str, values: Sequence[float], floor: str = "", floors: Sequence[float] = (), at_most: float = 0,
        calls: str = "", unit: str = "ms") -> Row:
    """Medians and their ratio, which the target bounds; `at_most` 0: there is no target."""
    scale = 1000 if unit == "ms" else 1
    ours, base = statistics.median(values), statistics.median(floors) if floors else None
    ratio = ours / base if base else None
    return Row(scenario, ours * scale, unit, spread(values) * scale, floor, base * scale if base else None,
               f"{ratio:.2f} x" if ratio else "", f"at most {at_most} x" if at_most else "",
               ratio <= at_most if ratio and at_most else None, calls)


# ---- the scenarios; `many` is how often things are done, a few dozen times


def start_up(world: World, many: int) -> Iterator[Row]:
    """From nothing to --version and --help."""
    python = [sys.executable, "-IS"]
    bare, imports, script, version, helped = turns(
        many, *(functools.partial(world.seconds, *argv) for argv in (
            [*python, "-c", "pass"], [*python, "-c", IMPORTS], [*python, tests.KODEMACHINE, "--version"],
            [world.program, "--version"], [world.program, "--help"])))
    floor = "its imports alone"
    yield row("--version", version, floor, imports, 1.9)
    yield row("--version, as a script", script, floor, imports)
    yield row("--help", helped, floor, imports)
    yield row("--version", version, "the bare interpreter", bare)
    yield row("--help", helped, "the bare interpreter", bare)


def lists(world: World, many: int) -> Iterator[Row]:
    """What a list costs us: CPU of kodemachine itself, whatever UTM takes."""
    costs = {}
    for count in (1, 10, 100, 300):
        world.fleet(count)
        version, cost = turns(max(3, many // 2), lambda: world.own("--version")[0], lambda: world.own("list")[0])
        costs[count] = statistics.median(cost)
        calls = world.calls(world.program, "list")
        yield row(f"list of {count}, own CPU", cost, "--version, own CPU", version, 1.5 if count == 10 else 0, calls)
    small, large = ((costs[n] - costs[m]) / (n - m) for m, n in ((10, 100), (100, 300)))
    yield Row("own CPU per machine, 100 to 300", large * 1000, "ms", 0, "10 to 100", small * 1000,
              f"{large / small:.2f} x", "at most 1.2 x", large <= 1.2 * small, "")
    peaks = [world.own("list")[1] / 1024 for _ in range(3)]
    least = [world.own("--version")[1] / 1024 for _ in range(3)]
    yield row("list of 300, peak memory", peaks, "--version, peak memory", least, unit="MiB")


def slow_list(world: World, many: int) -> Iterator[Row]:
    """Whether addresses are asked for together."""
    world.fleet(100)
    for latency in (0, 0.05, 0.15):
        world.utm.option(latency=latency)
        call = [os.path.join(world.bin, "utmctl"), "ip-address", world.utm.machine("km-m0")["uuid"]]
        ours, one = turns(max(3, many // 4), functools.partial(world.seconds, world.program, "list"),
                          functools.partial(world.seconds, *call))
        yield row(f"list of 100, 34 running, {latency * 1000:.0f} ms a call", ours, "one call", one,
                  5 if latency == 0.15 else 0, world.calls(world.program, "list"))


def reconnect(world: World, many: int) -> Iterator[Row]:
    """To a machine that runs, up to the exec of ssh."""
    uuid = world.vm("alpha", "started", ips=[world.address])
    world.remember(alpha={"is_named": True, "mac_is_unique": True})
    world.write_state("known_hosts", f"km-alpha {tests.host_key()}\n")
    for latency in (0, 0.05, 0.15):
        world.utm.option(latency=latency)
        ours, one = turns(many, functools.partial(world.seconds, world.program, "alpha"),
                          functools.partial(world.seconds, os.path.join(world.bin, "utmctl"), "ip-address", uuid))
        yield row(f"reconnect, {latency * 1000:.0f} ms a call", ours, "one ip-address", one,
                  1.3 if latency == 0.15 else 0, world.calls(world.program, "alpha"))


def cold(world: World, many: int) -> Iterator[Row]:
    """From no machine to the exec of ssh: the time since its sshd answers, or its address is told, if that is later."""
    greeter = tests.Greeter([world.address])
    greeter.close()
    world.use(ssh_port=greeter.port)
    for title, agent, sshd, latency in (("sshd last", 1.0, 2.0, 0.0), ("sshd last, 150 ms a call", 1.0, 2.5, 0.15),
                                        ("the address last", 2.0, 1.0, 0.0)):
        lags, calls = [], ""
        world.utm.option(latency=latency)
        for _ in range(max(3, many // 2)):
            with world.utm.fake as utm:
                utm.vms[:] = [vm for vm in utm.vms if vm["name"] == tests.IMAGE]
            world.utm.change(tests.IMAGE, agent_after=agent)
            before = len(world.utm.journal())
            process = world.start_program([world.program, "alpha"])
            up = tests.wait_for(lambda: [vm["up_at"] for vm in world.utm.machines() if vm["up_at"]])[0]
            time.sleep(max(0.0, up + sshd - time.time()))
            greeter = tests.Greeter([world.address], port=greeter.port)
            ready = max(time.time(), up + agent)
            said = process.communicate()[1]
            lags.append(time.time() - ready)
            greeter.close()
            assert process.returncode == 0, said
            verbs = collections.Counter(e["verb"] for e in world.utm.journal()[before:] if "verb" in e)
            calls = ", ".join(f"{number} {verb}" for verb, number in sorted(verbs.items()))
        lag = statistics.median(lags)
        yield Row(f"cold spawn, {title}", lag * 1000, "ms", spread(lags) * 1000, "guest ready", 0.0, "",
                  "at most 300 ms" if not latency else "", lag <= 0.3 if not latency else None, calls)


def console(world: World, many: int) -> Iterator[Row]:
    """attach against a bare loop over the same kinds of ptys."""
    size = (1 << 20) * (2 if many < 20 else 8)
    found: dict[str, list[tuple[float, float, float]]] = {"ours": [], "bare": []}
    for _ in range(max(3, many // 6)):
        for kind, results in found.items():
            line = tests.Line()
            with world.utm.fake as utm:
                utm.vms.clear()
            world.utm.add("km-alpha", status="started", serials=[{"kind": "ptty", "path": line.path}])
            argv = [world.program, "attach", "alpha"]
            if kind == "bare":
                argv = [sys.executable, "-IS", "-c", RELAY, line.path]
            terminal = tests.Terminal(argv, world.environment, world.home)
            tty.setraw(terminal.slave)
            terminal.expect(b"console")
            results.append(relay_of(terminal, line, size))
            terminal.close()
            line.close()
    (speed, echo, growth), (bare_speed, bare_echo, _) = (
        [[result[i] for result in results] for i in range(3)] for results in found.values()
    )
    ratio = statistics.median(speed) / statistics.median(bare_speed)
    yield Row("attach, throughput", statistics.median(speed), "MB/s", spread(speed), "a bare loop",
              statistics.median(bare_speed), f"{ratio:.2f} x", "at least 0.7 x", ratio >= 0.7, "1 list, 1 attach")
    more = (statistics.median(echo) - statistics.median(bare_echo)) * 1000
    yield Row("attach, echo there and back", statistics.median(echo) * 1000, "ms", spread(echo) * 1000, "a bare loop",
              statistics.median(bare_echo) * 1000, f"{more:+.2f} ms", "at most +1 ms", more <= 1, "")
    more = statistics.median(growth)
    yield Row("attach, memory gained by all that", more, "MiB", spread(growth), "", None, "", "at most 1 MiB",
              more <= 1, "")


def relay_of(terminal: tests.Terminal, line: tests.Line, size: int) -> tuple[float, float, float]:
    """What a relay is worth: megabytes a second to the terminal, seconds of an echo, MiB gained in all."""

    def resident() -> float:
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(terminal.process.pid)])) / 1024

    def pour(count: int) -> float:
        threading.Thread(target=line.say, args=[b"x" * count], daemon=True).start()
        began = time.perf_counter()
        while count:
            count -= len(os.read(terminal.master, 65536))
        return time.perf_counter() - began

    time.sleep(0.3)  # until what it says first has come, and its terminal is as it wants it
    while select.select([terminal.master], [], [], 0)[0]:
        os.read(terminal.master, 65536)
    pour(1 << 18)
    before = resident()
    speed = size / 1e6 / pour(size)
    echoes = []
    for _ in range(100):
        began = time.perf_counter()
        terminal.send(b"k")
        os.write(line.machine, line.hear(1))
        os.read(terminal.master, 1)
        echoes.append(time.perf_counter() - began)
    return speed, statistics.median(echoes), resident() - before


# ---- all of them

SCENARIOS = (start_up, lists, slow_list, reconnect, cold, console)


def noise(world: World) -> dict[str, Any]:
    """How much the machine's own doings blur what is measured."""
    times = sorted(world.seconds(sys.executable, "-IS", "-c", "pass") for _ in range(30))
    best, middle, bad = times[0], times[15], times[27]
    return {"python": sys.version.split()[0], "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
            "bare_interpreter_ms": [round(value * 1000, 1) for value in (best, middle, bad)],
            "noisy": middle > 1.25 * best or bad > 2 * best}


@contextlib.contextmanager
def world_of() -> Iterator[World]:
    """A world for one scenario."""
    world = World("setUp")
    try:
        world.setUp()
        yield world
    finally:
        world.doCleanups()


def show(rows: Sequence[Row]) -> str:
    """The table."""
    lines = []
    for r in rows:
        floor = "" if r.floor_value is None else f"{r.floor_value:.1f}"
        met = "" if r.met is None else "yes" if r.met else "NO"
        lines.append((r.scenario, f"{r.ours:.1f} {r.unit}", f"±{r.spread:.1f}", floor, r.floor, r.result, r.target, met,
                      r.calls))
    header = ("SCENARIO", "MEDIAN", "SPREAD", "FLOOR", "OF", "RESULT", "TARGET", "MET", "CALLS")
    return kodemachine.table(list(zip(header, *lines)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures kodemachine against its floors.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few times each, for a first impression")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("-k", metavar="PART", default="", help="only scenarios whose name contains it")
    options = parser.parse_args()
    rows: list[Row] = []
    with world_of() as world:
        about = noise(world)
    for scenario in SCENARIOS:
        if options.k in scenario.__name__:
            print(f"measuring: {scenario.__name__}", file=sys.stderr)
            with world_of() as world:
                rows += scenario(world, 8 if options.quick else 30)
    if options.json:
        print(json.dumps({"about": about, "rows": [r._asdict() for r in rows]}, indent=1))
        return 0
    best, middle, bad = about["bare_interpreter_ms"]
    print(show(rows))
    print(f"\nPython {about['python']}, {about['cores']} cores, load {about['load']}. The bare interpreter takes"
          f" {best} ms at best, {middle} in the median, {bad} at the ninth decile: the machine is"
          f" {'noisy, so mind the spread' if about['noisy'] else 'quiet'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
