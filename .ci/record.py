#!/usr/bin/env python3
"""Records `make demo` as an animated SVG, .github/demo.svg. Standard library only.

The words are those of the run. The times are not: they follow from what is shown, so that a second recording differs
from the first one only where the words differ. The picture has text and CSS animations, and loads nothing.
"""
from __future__ import annotations

import html
import itertools
import os
import re
import subprocess
import sys
from typing import NamedTuple

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.path.join(HERE, ".github", "demo.svg")
PACE = "0.3"                                # of the demo's typing and waiting, which are not shown

COLUMNS, ROWS = 80, 20
WIDTH, HEIGHT, MARGIN, BAR = 8.4, 19, 16, 30            # of a character and a row, around the text, of the title bar

# Seconds that pass after a key, an output line, a step of kodemachine, Enter, and a prompt; and at the end.
KEY, LINE, STEP, ENTER, READ, END = 0.04, 0.06, 0.5, 0.3, 1.0, 3.0
PROMPT = re.compile(r"(?:[\w-]+:~)?\$ ")
ESCAPE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")

STYLE = """\
svg{--back:#fff;--text:#1f2328;--line:#d1d9e0;--faint:#59636e;--red:#cf222e;--green:#1a7f37}
@media(prefers-color-scheme:dark){
svg{--back:#0d1117;--text:#e6edf3;--line:#3d444d;--faint:#9198a1;--red:#ff7b72;--green:#3fb950}}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;\
fill:var(--text);white-space:pre}
.s1{font-weight:700}.s2{fill:var(--faint)}.s31{fill:var(--red)}.s32{fill:var(--green)}
.window{fill:var(--back);stroke:var(--line)}.title{fill:var(--faint);text-anchor:middle}.cursor{fill:var(--faint)}
.hidden{visibility:hidden}
"""

Cell = tuple[str, str]                      # a character, and the class of its style
Row = tuple[Cell, ...]


class Frame(NamedTuple):
    """What the terminal shows from a time on."""

    start: float            # seconds
    rows: tuple[Row, ...]   # all rows since the beginning; the cursor is at the end of the last one


class Screen:
    """A terminal that knows what the demo prints: a line feed, a carriage return, erasing to the end, colours."""

    def __init__(self) -> None:
        self.rows: list[list[Cell]] = [[]]
        self.column = 0
        self.style = ""
        self.clock = 0.0
        self.frames: list[Frame] = []

    def text(self) -> str:
        """The last row."""
        return "".join(char for char, _ in self.rows[-1])

    def show(self, seconds: float) -> None:
        """Shows the present state for so many seconds, if it differs from that before."""
        rows = tuple(map(tuple, self.rows))
        if not self.frames or self.frames[-1].rows != rows:
            self.frames.append(Frame(self.clock, rows))
            self.clock += seconds

    def feed(self, output: str) -> None:
        """Prints the output of the demo. Raises ValueError if it has an unknown control sequence."""
        at = 0
        while at < len(output):
            escape = ESCAPE.match(output, at)
            if escape:
                self.control(escape[1], escape[2])
                at = escape.end()
                continue
            self.print(output[at])
            at += 1

    def control(self, numbers: str, letter: str) -> None:
        """Follows a control sequence."""
        if letter == "K" and not numbers:
            if self.rows[-1][self.column:]:
                self.show(STEP)
            del self.rows[-1][self.column:]
        elif letter == "m":
            self.style = " ".join(f"s{number}" for number in numbers.split(";") if number.strip("0"))
        elif numbers != "?2004":        # whether a shell wants to know what was pasted
            raise ValueError(f"unknown control sequence: {numbers}{letter}")

    def print(self, char: str) -> None:
        """Prints a character, or moves the cursor."""
        typed = PROMPT.match(self.text())
        if char == "\n":
            self.show(ENTER if typed else LINE)
            self.rows.append([])
        elif char == "\r":
            self.column = 0
        elif char < " ":
            raise ValueError(f"unknown control character: {char!r}")
        else:
            style = self.style
            if typed:
                style = "s1"
            self.rows[-1][self.column:self.column + 1] = [(char, style)]
            self.column += 1
            if typed:
                self.show(KEY)
            elif PROMPT.fullmatch(self.text()):
                self.show(READ)


def record() -> list[Frame]:
    """Runs the demo. Raises CalledProcessError if a command in it fails."""
    command = [sys.executable, os.path.join(HERE, "test_kodemachine.py"), "--demo", PACE]
    # The demo has a terminal of its own.
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    screen = Screen()
    screen.feed(output.rstrip("\n"))
    return screen.frames


class Picture:
    """The SVG of a recording."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        self.length = frames[-1].start + END
        self.animations: dict[str, str] = {}        # names by keyframes

    def percent(self, seconds: float) -> str:
        return f"{100 * seconds / self.length:.2f}".rstrip("0").rstrip(".") + "%"

    def animation(self, keyframes: str) -> str:
        """The style of an element that has these keyframes."""
        name = self.animations.setdefault(keyframes, f"a{len(self.animations)}")
        return f'style="animation-name:{name}"'

    def element(self, row: Row, number: int, start: float, end: float) -> str:
        """A row of text that is visible for some time."""
        spans = ""
        for style, cells in itertools.groupby(row, key=lambda cell: cell[1]):
            text = html.escape("".join(char for char, _ in cells), quote=False)
            spans += f'<tspan class="{style}">{text}</tspan>' if style else text
        keyframes, kind = "", "row"
        if start:
            keyframes = f"0%{{visibility:hidden}}{self.percent(start)}{{visibility:visible}}"
        if end < self.length:
            keyframes += f"{self.percent(end)}{{visibility:hidden}}"
            kind = "row hidden"
        # The length puts the characters of every font into the same columns.
        return (f'<text class="{kind}" {self.animation(keyframes)} y="{HEIGHT * number + 14}"'
                f' textLength="{WIDTH * len(row):g}">{spans}</text>')

    def texts(self) -> list[str]:
        """Every row, once for each of its states."""
        found = []
        for number in range(len(self.frames[-1].rows)):
            states = [(frame.start, frame.rows[number]) for frame in self.frames if number < len(frame.rows)]
            states = [next(group) for _, group in itertools.groupby(states, key=lambda state: state[1])]
            ends = [start for start, _ in states[1:]] + [self.length]
            found += [self.element(row, number, start, end) for (start, row), end in zip(states, ends) if row]
        return found

    def moves(self, places: list[tuple[float, float, float]]) -> str:
        """The style of an element that jumps to the places (x, y) at their times. Its last place is its own."""
        keyframes = ""
        for (_, x, y), group in itertools.groupby(places, key=lambda place: (0, *place[1:])):
            keyframes += f"{self.percent(next(group)[0])}{{transform:translate({x:g}px,{y:g}px)}}"
        return self.animation(keyframes) + f' transform="translate({places[-1][1]:g} {places[-1][2]:g})"'

    def svg(self) -> str:
        """The text of the file."""
        width, height = WIDTH * COLUMNS, HEIGHT * ROWS
        outer = (width + 2 * MARGIN, height + BAR + MARGIN)
        scroll = self.moves([(f.start, 0, -HEIGHT * max(0, len(f.rows) - ROWS)) for f in self.frames])
        cursor = self.moves([(f.start, WIDTH * len(f.rows[-1]), HEIGHT * (len(f.rows) - 1)) for f in self.frames])
        texts = "\n".join(self.texts())
        keyframes = "".join(f"@keyframes {name}{{{text}}}\n" for text, name in self.animations.items())
        return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {outer[0]:g} {outer[1]:g}" width="{outer[0]:g}" role="img">
<title>A session of kodemachine with a fake UTM</title>
<style>
{STYLE}.row,.cursor,.scroll{{animation:{self.length:.2f}s step-end infinite}}
@media(prefers-reduced-motion:reduce){{*{{animation-name:none!important}}}}
{keyframes}</style>
<rect class="window" x=".5" y=".5" width="{outer[0] - 1:g}" height="{outer[1] - 1:g}" rx="8"/>
<text class="title" x="{outer[0] / 2:g}" y="20">kodemachine, with a fake UTM</text>
<svg x="{MARGIN}" y="{BAR}" width="{width:g}" height="{height}">
<g class="scroll" {scroll}>
{texts}
<rect class="cursor" {cursor} y="2" width="{WIDTH}" height="15"/>
</g>
</svg>
</svg>
"""


def main() -> int:
    picture = Picture(record())
    text = picture.svg()
    with open(TARGET, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{os.path.relpath(TARGET)}: {picture.length:.1f} s, {len(text) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
