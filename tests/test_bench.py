"""The benchmarks: what they count and compare, never how long it took."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner, Result

from dualfocus import cli, kernels
from dualfocus.bench import crop, gate, harness, rules, savings, throughput
from dualfocus.bench.scripted import PUSH, ScriptedDecoder
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.result import Answer, Generation, Pass
from dualfocus.train.curate import Dialogue

FULL_ROWS = [savings.PLAIN, *(f"+ {saving}" for saving in savings.SAVINGS)]
ROWS = [*FULL_ROWS, savings.MACRO, savings.SECOND, savings.SEVERAL]
SMALL = tiny.Shape(name="small", vocabulary=2000)


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "bundle"
    export_bundle(SMALL, folder, progress=lambda _: None)
    return folder


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where --save writes."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def answered(*arguments: object) -> dict[str, Any]:
    result = bench(*arguments, "--threads", 1, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    return result.stderr


def column(case: dict[str, Any], counter: str) -> dict[str, float]:
    return {name: row["counters"][counter] for name, row in case["rows"].items()}


class Clock:
    """Stands still but for what is done on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes the given seconds, one after the other and again."""
        calls = 0

        def call() -> None:
            nonlocal calls
            self.now += seconds[calls % len(seconds)]
            calls += 1
            self.log.append(name)

        return call


def test_candidates_take_turns_and_only_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock.now)
    told: list[tuple[str, int, int]] = []
    timings = harness.interleaved(
        {"a": clock.work("a", 99, 1, 2, 3), "b": clock.work("b", 99, 7)},  # the first call is the warm-up
        3,
        before={"b": clock.work("before b", 50)},
        watch=lambda *doing: told.append(doing),
    )
    assert timings["a"] == harness.Timing(median=2000, low=1500, high=2500, p5=1100, p95=2900)
    assert timings["b"].median == 7000  # of 7, 99, 7
    b = ["before b", "b"]
    assert clock.log == ["a", *b, "a", *b, *b, "a", "a", *b]
    assert told == [(name, i, 8) for i, name in enumerate("ababbaab")]
    assert timings["a"].each(4) == harness.Timing(median=500, low=375, high=625, p5=275, p95=725)


def test_results_are_dated_files_with_a_schema(results: Path) -> None:
    result = harness.header("gate", 3) | {"bundle": "a/b c"}
    path = harness.save(result)
    assert path.parent == results
    assert path.name.endswith("-gate-a_b_c.json")
    kept = json.loads(path.read_text())
    assert (kept["schema"], kept["bench"], kept["machine"]["threads"]) == (harness.SCHEMA, "gate", 3)
    assert kept["machine"].keys() == {
        "date", "command", "processor", "cores", "isa", "governor", "memory", "threads", "spin",
        "environment", "system", "load", "commit", "versions",
    }  # fmt: skip
    assert kept["machine"]["versions"]["numpy"] == np.__version__
    assert kept["machine"]["isa"] in kernels.available()


def test_a_processor_without_a_name_is_its_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(harness, "BOARD", tmp_path / "model")
    harness.CPUINFO.write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd42\n")
    harness.BOARD.write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    assert harness.header("gate", 1)["machine"]["processor"] == "NVIDIA Jetson AGX Orin Developer Kit"
    harness.CPUINFO.write_text("processor\t: 0\nmodel name\t: A 2:1 Processor\n")
    assert harness.header("gate", 1)["machine"]["processor"] == "A 2:1 Processor"
    harness.CPUINFO.unlink()
    harness.BOARD.unlink()
    assert harness.header("gate", 1)["machine"]["processor"]


def test_a_result_of_a_bundle_is_named_for_its_precision(results: Path) -> None:
    manifest = Bundle.open(threads=1).manifest
    for precision, name in (("fp32", "-stages-nano.json"), ("int8", "-stages-nano-int8.json")):
        of = dataclasses.replace(manifest, precision=precision)
        result = harness.header("stages", None, spin=False, manifest=of)
        assert (result["bundle"], result["precision"]) == ("nano", precision)
        assert result["machine"]["spin"] is False
        assert harness.save(result).name.endswith(name)


def test_what_is_wanted_is_met_or_missed() -> None:
    assert harness.verdict(harness.wanted(2, at_least=2)) == "wanted >= 2: met"
    assert harness.verdict(harness.wanted(3, at_most=2)) == "wanted <= 2: missed"
    assert harness.wanted(1)["met"] is None
    assert harness.verdict(harness.wanted(1)) == ""


def test_savings_of_the_built_in_model(tmp_path: Path, results: Path) -> None:
    result = answered("savings", "--rounds", 2, "--plot", tmp_path / "bars.png", "--save")
    assert (result["schema"], result["bench"], result["bundle"]) == (harness.SCHEMA, "savings", "nano")
    assert (result["precision"], result["machine"]["spin"]) == ("fp32", True)
    assert not result["scripted"]
    assert list(result["cases"]) == ["agree", "disagree"]
    for kind, case in result["cases"].items():
        assert list(case["rows"]) == ROWS
        assert (case["macro"] == case["micro"]) == (kind == "agree")
        encodes = column(case, "vision_encodes")
        assert encodes[savings.PLAIN] == (4 if kind == "agree" else 8)  # equal answers are not scored
        assert {encodes[name] for name in FULL_ROWS[1:]} == {2}
        assert encodes[savings.MACRO] == encodes[savings.SECOND] == 1
        assert column(case, "tokens_reused")[savings.PLAIN] == 0
        prefilled = column(case, "tokens_prefilled")
        assert prefilled["+ prefix"] < prefilled["+ images"]
        assert prefilled[savings.SECOND] < prefilled[savings.ALL]
        steps, rows = column(case, "decode_steps"), column(case, "decode_rows")
        assert steps["+ batch"] < steps["+ prefix"] == rows["+ batch"]
        assert steps["+ forced"] < steps["+ batch"]
        assert column(case, "tokens_forced")["+ batch"] == 0 < column(case, "tokens_forced")["+ forced"]
    drafted = [column(result["cases"]["agree"], "tokens_drafted")[row] for row in ("+ forced", "+ draft")]
    assert drafted[0] < drafted[1]
    assert steps_of(result, "agree", "+ draft") < steps_of(result, "agree", "+ forced")
    assert result["fork"]["tokens"] == 67  # the opening, "USER:" and the image
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"
    (kept,) = results.iterdir()
    assert kept.name.endswith("-savings-nano.json")
    assert json.loads(kept.read_text()) == result


def steps_of(result: dict[str, Any], kind: str, row: str) -> float:
    return column(result["cases"][kind], "decode_steps")[row]


def test_savings_of_random_weights_follow_a_script(random_bundle: Path) -> None:
    result = answered("savings", "--rounds", 2, "--bundle", random_bundle)
    assert result["scripted"]
    for kind, case in result["cases"].items():
        assert (case["macro"] == case["micro"]) == (kind == "agree")
        # an answer of 3, a box of 25 and an answer of 3 tokens; the first of each comes with the prefill
        assert steps_of(result, kind, savings.PLAIN) == 2 + 24 + 2
        assert steps_of(result, kind, "+ batch") == 24 + 2
        assert steps_of(result, kind, savings.ALL) <= 12
        assert steps_of(result, kind, savings.MACRO) == 2
        assert column(case, "tokens_forced")[savings.ALL] == 13
    assert column(result["cases"]["disagree"], "vision_encodes")[savings.PLAIN] == 8
    drafted, accepted = (
        {kind: column(case, counter) for kind, case in result["cases"].items()}
        for counter in ("tokens_drafted", "tokens_accepted")
    )
    for kind, more in (("agree", 3), ("disagree", 0)):  # all of the draft is right, or its first token wrong
        assert drafted[kind]["+ draft"] == drafted[kind]["+ forced"] + 3
        assert accepted[kind]["+ draft"] == accepted[kind]["+ forced"] + more


def test_savings_as_a_table(random_bundle: Path) -> None:
    shown = bench("savings", "--rounds", 2, "--threads", 1, "--bundle", random_bundle)
    assert shown.exit_code == 0, shown.stderr
    assert "Random weights" in shown.stdout
    for row in ROWS:
        assert shown.stdout.count(f"\n{row}  ") == 2
    for ratio in ("plain / all", "all / macro only", "second question / first"):
        assert shown.stdout.count(f"\n{ratio}: ") == 2
    assert shown.stdout.count("wanted >= 3.6") == 1  # where plain encodes eight images


@pytest.mark.parametrize("random", [True, False])
def test_questions_in_flight(random: bool, random_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "IN_FLIGHT", (1, 3, 8))
    monkeypatch.setattr(throughput, "QUESTIONS", {True: 9, False: 9})
    bundle = ["--bundle", random_bundle] if random else []
    shown = bench("throughput", "--rounds", 2, "--threads", 1, "--json", *bundle)
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["scripted"] == random
    assert found["questions"] == 9
    rows = found["in_flight"]
    assert list(rows) == ["1", "3", "8"]
    assert rows["1"]["ratio"]["value"] == 1
    assert rows["8"]["ratio"]["wanted"]
    for row in rows.values():
        assert 0 <= row["padded"] < 0.5
        assert row["first_token"]["median"] < row["answer"]["median"]
    assert throughput.markdown(found).count("\n") == 4


def test_a_wrong_answer_is_noticed(random_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = DualFocus.ask

    def wrong(runner: DualFocus, *args: Any) -> Any:
        result = ask(runner, *args)
        return dataclasses.replace(result, located=result.macro.generation) if result.macro else result

    monkeypatch.setattr(DualFocus, "ask", wrong)
    with pytest.raises(RuntimeError, match=r"\+ draft gives"):
        savings.run(Bundle.open(random_bundle, threads=1), 2, 1)


def test_a_script_with_two_replies_at_one_place_is_refused(
    random_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(savings, "HINT", "\nAnswer the question using a single word or phrase.")
    with pytest.raises(InputError, match="meet at position"):
        savings.scripted_cases(Bundle.open(random_bundle, threads=1))


def test_a_model_without_such_questions_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(savings, "SEARCHED", 3)
    told = refused(bench("savings", "--bundle", tiny_bundle, "--threads", 1))
    assert "among 3 held-out questions" in told


def test_a_script_pushes_its_positions_and_no_others() -> None:
    spec = dataclasses.replace(Bundle.open(threads=1).manifest.decoder, layers=1)
    cache = KVCache(spec, rows=2, capacity=9)
    cache.lengths[:] = [5, 2]

    class Zeros:
        def extend(self, cache: KVCache, rows: Any, embeddings: Any, logits_at: Any) -> list[np.ndarray]:
            for row, new in zip(rows, embeddings, strict=True):
                cache.lengths[row] += len(new)
            return [np.zeros((len(at), 4), np.float32) for at in logits_at]

    scripted = ScriptedDecoder(Zeros())
    scripted.script = {4: 1, 6: 3}
    new = [np.zeros((3, 2), np.float32)] * 2
    first, second = scripted.extend(cache, [0, 1], new, [[0, 1], [2]])  # positions 5, 6 and 4
    expected = np.zeros((3, 4), np.float32)
    expected[1, 3] = expected[2, 1] = PUSH
    np.testing.assert_array_equal(np.concatenate([first, second]), expected)


def test_gate(tmp_path: Path) -> None:
    result = answered("gate", "--limit", 20, "--plot", tmp_path / "curve.svg")
    assert (result["bench"], result["questions"]) == ("gate", 20)
    derived, run = result["derived"], result["run"]
    assert list(derived)[:2] == ["never", "1.0"]
    assert derived["never"]["accuracy"] == derived["1.0"]["accuracy"]
    assert (derived["never"]["skipped"], derived["1.0"]["skipped"], derived["0.0"]["skipped"]) == (0, 0, 1)
    gated = [row["skipped"] for name, row in derived.items() if name != "never"]
    assert gated == sorted(gated)
    assert len(set(gated)) > 3  # a curve
    assert derived["0.0"]["accuracy"]["detail"]["share"] == 0  # no macro answer reads a label
    assert list(run) == [str(p) for p in gate.RUN]
    for threshold, row in run.items():
        for fact in ("skipped", "accuracy"):
            assert row[fact] == derived[threshold][fact], threshold
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_rules(tmp_path: Path) -> None:
    result = answered("rules", "--limit", 20, "--plot", tmp_path / "rules.png")
    assert list(result["rules"]) == list(rules.RULES)
    found = {name: row["accuracy"]["all"]["share"] for name, row in result["rules"].items()}
    assert found["oracle"] == max(found.values())
    assert result["rules"]["reference"]["gain"]["all"]["mean"] == 0
    assert result["rules"]["always macro"]["micro"] == 0
    assert (tmp_path / "rules.png").read_bytes()[:4] == b"\x89PNG"


def said(text: str, probability: float) -> Answer:
    return Answer(text, Generation(text, (1,), (math.log(probability),)))


@pytest.mark.parametrize(
    ("macro", "micro", "reference", "answer", "taken"),
    [
        # micro is right, both losses say so, macro was sure enough for the gate and yet less sure than micro
        (("A", 0.95), ("B", 0.99), "micro", "micro", "A B B B A B - B"),
        # the losses differ, macro is below the gate and the surer one
        (("A", 0.8), ("B", 0.5), "macro", "micro", "A B A B A A - B"),
        (("A", 0.8), ("B", 0.5), "micro", "macro", "A B B A B A - B"),
        (("B", 0.8), ("B", 0.5), "macro", "macro", "B B B B B B B B"),
        # no region: the macro answer stands for both, which is no agreement
        (("B", 0.8), None, "macro", "macro", "B B B B B B - B"),
    ],
)
def test_each_rule_takes_its_answer(
    macro: tuple[str, float], micro: tuple[str, float] | None, reference: Pass, answer: Pass, taken: str
) -> None:
    dialogue = Dialogue("How many?", "B", (0, 0, 1, 1), "count")
    asked = rules.Judged.of(
        dialogue, said(*macro), said(*micro) if micro else None, reference=reference, answer=answer
    )
    texts = {"macro": macro[0], "micro": (micro or macro)[0], None: "-"}
    assert [texts[rule(asked)] for rule in rules.RULES.values()] == taken.split()


def test_gate_as_a_table() -> None:
    shown = bench("gate", "--limit", 2, "--threads", 1)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count(" run ") == len(gate.RUN)
    assert shown.stdout.count("100.0 %") >= 1


def test_crop_compares_every_path() -> None:
    result = bench("crop", "--rounds", 2, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout)
    for rows in found["cases"].values():
        assert {f"dualfocus, {isa}" for isa in found["paths"]} < rows.keys()
    assert "scalar" in found["paths"]
    table = crop.markdown(found).splitlines()
    assert len(table) == 2 + len(next(iter(found["cases"].values())))
    assert {line.count("|") for line in table} == {2 + len(found["cases"])}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["savings", "--rounds", 1], "--rounds"),
        (["savings", "--threads", 0], "--threads"),
        (["savings", "--bundle", "/nowhere"], "/nowhere"),
        (["savings", "--plot", "bars.gif"], "expected .svg or .png"),
        (["savings", "--plot", "/nowhere/bars.png"], "does not exist"),
        (["gate", "--limit", 0], "--limit"),
        (["gate", "--plot", "curve"], "no suffix"),
        (["crop", "--rounds", 1], "--rounds"),
        (["stages", "--rounds", 1], "--rounds"),
        (["stages", "--plot", "fall.pdf"], "expected .svg or .png"),
        (["limits", "--threads", 257], "--threads"),
        (["limits", "--bundle", "/nowhere"], "/nowhere"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[object], said: str) -> None:
    assert said in refused(bench(*arguments))


@pytest.mark.parametrize("name", ["savings", "gate", "stages"])
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("bench.savings", "bench.gate", "bench.stages", "bench.scenes", "train.scenes"):
        monkeypatch.delitem(sys.modules, f"dualfocus.{module}", raising=False)
        room, _, leaf = module.partition(".")
        monkeypatch.delattr(f"dualfocus.{room}.{leaf}", raising=False)
    told = refused(bench(name))
    assert told == f"dualfocus: bench {name} needs matplotlib: pip install 'dualfocus[cpu,train]'\n"
