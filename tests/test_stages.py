"""One question stage by stage: what adds up, what is counted and what is told, never how long it took."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.bench import energy, fresh, harness, stages
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.result import Counters

STAGES = [
    "decode_picture", "hash", "view_whole", "encode_whole", "prefill", "decode", "view_crop", "encode_crop",
    "micro_prefill", "micro_decode", "select", "rest",
]  # fmt: skip


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "bundle"
    export_bundle(tiny.Shape(name="small", vocabulary=2000), folder, progress=lambda _: None)
    return folder


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a quarter of a second passes between two looks at it, exact in binary."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 4)


def asked(bundle: Path) -> stages.Round:
    opened = Bundle.open(bundle, threads=1)
    return stages.Asker(opened, stages.find_subject(opened)).ask()


@pytest.mark.usefixtures("ticking")
def test_stages_add_up_to_the_total(random_bundle: Path) -> None:
    of = asked(random_bundle)
    assert list(of.stages) == STAGES
    assert sum(of.stages.values()) == of.total
    assert min(of.stages.values()) > 0
    # four looks: as the runtime's clock is made, as its first stage begins, in the queue, and behind its last
    assert of.stages["rest"] == 4 * 250
    # the decoder's calls are of the stages they stand under, and one after the other
    assert [call.stage for call in of.calls] == sorted((c.stage for c in of.calls), key=STAGES.index)
    for call, following in itertools.pairwise(of.calls):
        assert call.begin < call.end < following.begin
    for name in STAGES:
        inside = sum(1e3 * (call.end - call.begin) for call in of.calls if call.stage == name)
        assert inside < of.stages[name]
    names = [name for name, _ in of.entered]
    assert names == STAGES[:-1]
    begins = [at for _, at in of.entered]
    assert begins == sorted(begins)


def test_calls_and_tokens_are_those_of_the_question(random_bundle: Path) -> None:
    of = asked(random_bundle)
    counters = of.result.counters
    # the macro prompt on an empty row, the locate prompt behind the picture, both then in one batch
    macro, locate, *rest = of.calls
    assert (macro.stage, macro.rows, macro.past) == ("prefill", (0,), (0,))
    assert (locate.stage, locate.rows) == ("prefill", (1,))
    assert locate.past[0] > 16  # the image's tokens among them
    decoding = [call for call in rest if call.stage == "decode"]
    assert decoding[0].rows == (0, 1)
    assert sum(call.stage in stages.DECODE for call in of.calls) == counters.decode_steps
    replies = {name: of.said_in(name) for name in ("macro", "locate", "micro")}
    assert len(replies["macro"]) == len(of.result.macro.generation.tokens) == 3
    assert len(replies["locate"]) == len(of.result.located.tokens)
    assert len(replies["micro"]) == 3
    # each ask starts from nothing
    opened = Bundle.open(random_bundle, threads=1)
    asker = stages.Asker(opened, stages.find_subject(opened))
    first, second = asker.ask(), asker.ask()
    assert first.result == second.result == of.result


def round_of(total: float, said: list[tuple[str, str, float]], calls: list[stages.Call]) -> stages.Round:
    times = {"prefill": 400.0, "decode": total - 500.0, "rest": 100.0}
    result: Any = SimpleNamespace(counters=Counters(tokens_prefilled=200))
    return stages.Round(times, total, 10.0, [("prefill", 10.0), ("decode", 10.4)], said, calls, result)


def test_rates_are_over_the_stages_that_make_them() -> None:
    calls = [
        stages.Call("prefill", 10.1, 10.3, (1,), (200,), (0,)),
        stages.Call("decode", 10.5, 10.6, (0, 1), (1, 2), (200, 180)),
        stages.Call("decode", 10.6, 10.8, (0,), (1,), (201,)),
    ]
    said = [("macro", "prefill", 10.35), ("macro", "decode", 10.75), ("macro", "decode", 11.25)]
    rounds = [round_of(1000.0, said, calls), round_of(1000.0, said, calls), round_of(2000.0, said, calls)]
    found = stages.summarise(rounds)
    assert found["total"]["median"] == 1000
    assert found["stages"]["decode"]["median"] == 500
    assert found["stages"]["decode"]["share"] == pytest.approx(2500 / 4000)
    assert sum(row["share"] for row in found["stages"].values()) == pytest.approx(1)
    assert (found["stages"]["decode"]["decoder_calls"], found["stages"]["decode"]["decoder_tokens"]) == (2, 4)
    assert found["stages"]["prefill"]["decoder_share"] == pytest.approx(0.5)
    assert found["stages"]["rest"]["decoder_share"] is None
    assert found["time_to_first_token"]["median"] == pytest.approx(350)
    assert found["time_per_output_token"].keys() == {"macro"}
    assert found["time_per_output_token"]["macro"]["median"] == pytest.approx(450)
    assert found["tokens_per_second"] == pytest.approx({"prefill": 200 / 0.4, "decode": 2 / 0.5})
    assert found["timeline"]["total"] == 1000
    assert found["timeline"]["calls"][1]["begin"] == pytest.approx(500)


def test_stages_of_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(stages, "FRESH", 2)
    command = ["bench", "stages", "--rounds", "2", "--threads", "1", "--json", "--save"]
    done = CliRunner().invoke(cli.app, [*command, "--plot", str(tmp_path / "fall.svg")])
    assert done.exit_code == 0, (done.stderr, done.exception)
    result = json.loads(done.stdout)
    assert result.keys() == {
        "schema", "bench", "machine", "bundle", "precision", "scripted", "rounds", "unit", "picture",
        "question", "macro", "micro", "total", "stages", "time_to_first_token", "time_per_output_token",
        "tokens_per_second", "tokens_said_in_decode", "counters", "timeline", "first_answer", "memory",
        "bundle_bytes",
    } | ({"joules_a_question"} if energy.Meter().joules is not None else set())  # fmt: skip
    assert (result["bench"], result["bundle"], result["scripted"]) == ("stages", "nano", False)
    assert list(result["stages"]) == STAGES
    assert result["macro"] != result["micro"]
    assert result["counters"]["vision_encodes"] == 2
    assert list(result["first_answer"]) == [*fresh.STEPS, "total"]
    assert result["bundle_bytes"] == sum(
        entry.size for entry in Bundle.open(threads=1).manifest.files.values()
    )
    if sys.platform == "linux":
        assert result["memory"]["peak_rss"] > result["memory"]["rss_anon"] > 0
    drawn = (tmp_path / "fall.svg").read_text()
    assert "<svg" in drawn
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.name.endswith("-stages-nano.json")
    for name in STAGES:
        assert f"| {name.replace('_', ' ')} | " in stages.markdown(result)


def test_stages_of_random_weights_as_a_table(random_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FRESH", 2)
    command = ["bench", "stages", "--rounds", "2", "--no-spin", "--bundle", str(random_bundle)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "Random weights" in done.stdout
    for name in STAGES:
        assert done.stdout.count(f"\n{name.replace('_', ' ')}  ") == 1
    for figure in ("time to first token", "time per output token: macro ", "prefill: ", "first answer from"):
        assert f"\n{figure}" in done.stdout


def test_random_weights_are_asked_about_a_photograph(random_bundle: Path) -> None:
    subject = stages.find_subject(Bundle.open(random_bundle, threads=1))
    with Image.open(io.BytesIO(subject.file)) as image:
        assert image.format == "JPEG"
        assert image.width * image.height == pytest.approx(stages.PIXELS, rel=1e-3)
    assert subject.script


def test_a_model_whose_passes_never_disagree_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.savings, "kind_of", lambda _: "agree")
    monkeypatch.setattr(stages.savings, "SEARCHED", 3)
    with pytest.raises(InputError, match="among 3 held-out questions"):
        stages.find_subject(Bundle.open(tiny_bundle, threads=1))


def test_a_fresh_process_answers_and_a_wrong_one_is_noticed(
    random_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "FRESH", 2)
    bundle = Bundle.open(random_bundle, threads=1)
    subject = stages.find_subject(bundle)
    with pytest.raises(RuntimeError, match="expected 'another'"):
        stages.begin_afresh(bundle, subject, (1, True), "another", lambda *_: None)
    with pytest.raises(RuntimeError, match="did not answer"):
        fresh.measure(Path("/nowhere.jpg"), "What?", random_bundle, 1, True, {})


# Energy, on files that are made up


def rapl(root: Path, zone: str, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    folder = root / "class/powercap" / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{span - 1}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_energy_is_the_packages_and_the_memorys_and_wraps_around(tmp_path: Path) -> None:
    package = rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    core = rapl(tmp_path, "intel-rapl:0:0", "core", 0)
    memory = rapl(tmp_path, "intel-rapl:0:1", "dram", 100)
    rapl(tmp_path, "intel-rapl:1", "psys", 0)
    with energy.Meter(tmp_path) as meter:
        package.write_text("999999\n")
        meter.look()
        package.write_text("200000\n")  # around once
        core.write_text("500000\n")  # part of the package
        memory.write_text("50100\n")
    assert meter.joules == pytest.approx(0.3 + 0.05)


def test_power_is_added_up_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "INTERVAL", 1e6)
    now = [0.0]
    monkeypatch.setattr(energy.time, "perf_counter", lambda: now[0])
    folder = tmp_path / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    folder.mkdir(parents=True)
    for number, label, volts, amperes in ((1, "VDD_GPU_SOC", 5000, 400), (2, "VDD_CPU_CV", 5000, 600)):
        (folder / f"in{number}_label").write_text(label)
        (folder / f"in{number}_input").write_text(f"{volts}\n")
        (folder / f"curr{number}_input").write_text(f"{amperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages")
    (folder / "in7_input").write_text("9\n")
    with energy.Meter(tmp_path) as meter:  # 5 watts
        now[0] = 2.0
        (folder / "curr1_input").write_text("1400\n")  # 10 watts
        meter.look()
        now[0] = 3.0
    assert meter.joules == pytest.approx((5 + 10) / 2 * 2 + 10)


def test_a_boards_rail_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "INTERVAL", 1e6)
    now = [0.0]
    monkeypatch.setattr(energy.time, "perf_counter", lambda: now[0])
    folder = tmp_path / "bus/i2c/drivers/ina3221x/0-0041/iio:device1"
    folder.mkdir(parents=True)
    for number, label, milliwatts in ((0, "VDD_IN", 8000), (1, "VDD_GPU", 3000)):
        (folder / f"rail_name_{number}").write_text(f"{label}\n")
        (folder / f"in_power{number}_input").write_text(f"{milliwatts}\n")
    with energy.Meter(tmp_path) as meter:
        now[0] = 0.5
    assert meter.joules == pytest.approx(4)


# Rails as public reports of these boards list them, with made-up readings; none was at hand. A list is an
# INA3221 with its channels' label, millivolts and milliamperes, if it is switched on.
ORIN_NX = [[("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 300), ("VDD_SOC", 5000, 250)]]
AGX_ORIN = [
    [("VDD_GPU_SOC", 12_000, 500), ("VDD_CPU_CV", 12_000, 100), ("VIN_SYS_5V0", 5000, 800)],
    [("NC", 12_000, 7), ("VDDQ_VDD2_1V8AO", 5000, 200), ("NC", 0, None)],
]
THOR = [[("VDD_GPU", 12_000, 2000), ("VDD_CPU_SOC_MSS", 12_000, 900), ("VIN_SYS_5V0", 5000, 1000)]]


@pytest.mark.parametrize(
    ("chips", "microwatts", "watts"),
    [
        (ORIN_NX, None, 6.0),  # the board's
        (AGX_ORIN, None, 6.0 + 1.2 + 4.0 + 1.0),
        (THOR, None, 24.0 + 10.8 + 5.0),
        (THOR, 61_500_000, 61.5),  # the INA238 at the input
        ([], 61_500_000, 61.5),
    ],
)
def test_the_rails_of_jetsons(
    chips: list[list[tuple[str, int, int | None]]],
    microwatts: int | None,
    watts: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(energy, "INTERVAL", 1e6)
    now = [0.0]
    monkeypatch.setattr(energy.time, "perf_counter", lambda: now[0])
    drivers = tmp_path / "bus/i2c/drivers"
    for at, channels in enumerate(chips):
        folder = drivers / f"ina3221/1-004{at}/hwmon/hwmon{at}"
        folder.mkdir(parents=True)
        for number, (label, volts, amperes) in enumerate(channels, 1):
            (folder / f"in{number}_label").write_text(f"{label}\n")
            (folder / f"in{number}_input").write_text(f"{volts}\n")
            (folder / f"in{number + 3}_input").write_text("80\n")  # of the shunt
            if amperes is not None:
                (folder / f"curr{number}_input").write_text(f"{amperes}\n")
        (folder / "in7_label").write_text("sum of shunt voltages\n")
        (folder / "in7_input").write_text("240\n")
        (folder / "curr4_input").write_text("900\n")  # the channels' sum
    if microwatts is not None:
        folder = drivers / "ina238/2-0044/hwmon/hwmon9"
        folder.mkdir(parents=True)
        for name, value in (("in0_input", 5), ("in1_input", 20_000), ("curr1_input", 3075)):
            (folder / name).write_text(f"{value}\n")
        (folder / "power1_input").write_text(f"{microwatts}\n")
    with energy.Meter(tmp_path) as meter:
        now[0] = 2.0
    assert meter.joules == pytest.approx(2 * watts)


def test_where_nothing_is_told_there_are_no_joules(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 1).unlink()  # as where only root may read it
    with energy.Meter(tmp_path) as meter:
        pass
    assert meter.joules is None
