"""Joules, where the machine counts them: Intel's and AMD's RAPL, and the power rails of Jetson boards.

RAPL counts microjoules, for every processor package and mostly for the memory; its counters wrap around,
and on many systems only root may read them. A Jetson's INA3221 tells each rail's volts and amperes, or its
milliwatts; they are added up over time. Where a rail is the whole board's, it alone counts, for it includes
the others: VDD_IN of Orin Nano and NX, and the INA238 at Thor's input, which tells microwatts. AGX Orin has
none, so its rails are summed; that leaves out the carrier board.

All of the machine is measured, not this process: a figure means something where nothing else runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/sys")
INTERVAL = 0.05  # seconds between looks; RAPL's counters take minutes to wrap, rails change within a question
INPUT = "VIN"  # what NVIDIA's tools call the rail of Thor's INA238, which has no label of its own
BOARD = (INPUT, "VDD_IN", "POM_5V_IN")  # rails that feed all others
UNUSED = "NC"  # the label of channels that are not connected


@dataclass(frozen=True)
class Counter:
    """Energy counted by the hardware, in microjoules modulo `span`."""

    path: Path
    span: int

    def read(self) -> int:
        """Microjoules since some time."""
        return int(self.path.read_text())


@dataclass(frozen=True)
class Rail:
    """Power told by the hardware."""

    label: str
    watts: Callable[[], float]


class Meter:
    """Adds up energy inside ``with``; `joules` is None where this machine tells of none."""

    def __init__(self, root: Path = SYSTEM) -> None:
        """`root` is where the system's files about the hardware are."""
        self._counters = _counters(root)
        self._rails = [] if self._counters else _rails(root)
        self._joules = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def joules(self) -> float | None:
        """What was used between entering and leaving."""
        return self._joules if self._counters or self._rails else None

    def __enter__(self) -> Meter:
        if self._counters or self._rails:
            self._counts = [counter.read() for counter in self._counters]
            self._at, self._watts = time.perf_counter(), self._power()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self.look()

    def look(self) -> None:
        """Add what was used since the last look."""
        for i, counter in enumerate(self._counters):
            last, self._counts[i] = self._counts[i], counter.read()
            self._joules += (self._counts[i] - last) % counter.span / 1e6
        if self._rails:
            since, self._at = self._at, time.perf_counter()
            before, self._watts = self._watts, self._power()
            self._joules += (before + self._watts) / 2 * (self._at - since)

    def _follow(self) -> None:
        while not self._done.wait(INTERVAL):
            self.look()

    def _power(self) -> float:
        return sum(rail.watts() for rail in self._rails)


def _counters(root: Path) -> list[Counter]:
    """The packages' counters, and those of the memory, which the packages' do not include."""
    found = []
    for zone in sorted((root / "class/powercap").glob("intel-rapl:*")):
        kind = _text(zone / "name") or ""
        if kind.startswith("package") or kind == "dram":
            counter, span = _text(zone / "energy_uj"), _text(zone / "max_energy_range_uj")
            if counter is not None and span is not None:
                found.append(Counter(zone / "energy_uj", int(span) + 1))
    return found


def _rails(root: Path) -> list[Rail]:
    """The board's rail alone if there is one, else all."""
    found = []
    for device in sorted((root / "bus/i2c/drivers").glob("ina3221*/*")):
        for volts in sorted(device.glob("hwmon/hwmon*/in*_input")):
            number = volts.name.removeprefix("in").removesuffix("_input")
            amperes = volts.with_name(f"curr{number}_input")
            label = _text(volts.with_name(f"in{number}_label"))
            readable = _text(amperes) is not None and _text(volts) is not None
            if label is not None and label != UNUSED and readable:
                found.append(Rail(label, _product(volts, amperes)))
        for power in sorted(device.glob("iio:device*/in_power*_input")):
            number = power.name.removeprefix("in_power").removesuffix("_input")
            label = _text(power.with_name(f"rail_name_{number}"))
            if label is not None and _text(power) is not None:
                found.append(Rail(label, _scaled(power, 1e-3)))
    for power in sorted((root / "bus/i2c/drivers/ina238").glob("*/hwmon/hwmon*/power1_input")):
        if _text(power) is not None:
            found.append(Rail(INPUT, _scaled(power, 1e-6)))
    return [rail for rail in found if rail.label in BOARD] or found


def _product(volts: Path, amperes: Path) -> Callable[[], float]:
    return lambda: int(volts.read_text()) * int(amperes.read_text()) / 1e6  # millivolts, milliamperes


def _scaled(power: Path, unit: float) -> Callable[[], float]:
    return lambda: int(power.read_text()) * unit


def _text(path: Path) -> str | None:
    """What stands in a file of the system; None if it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
