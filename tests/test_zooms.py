"""Several zooms: the engine answers what the reference does, and one zoom is DualFocus."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from equality import Pair, same
from PIL import Image
from test_engine import BOX, CHOICE, QUESTION, spelled
from typer.testing import CliRunner

from dualfocus.cli import app
from dualfocus.runtime import Bundle, DualFocus, Engine, Reference
from dualfocus.runtime.zooms import LARGER, zooms

PICTURE = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
ROOT = Path(__file__).parent.parent


def deep(context: int = 1500) -> Bundle:
    """A model that says the same after every image: a box to the locate turn, `AB7` to the micro turn."""
    script = {"bounding box": spelled(BOX), "combine": spelled("AB7."), "\nWhat": spelled("a sta")}
    spec = replace(fakes.make_bundle().manifest.decoder, context=context)
    return fakes.make_bundle(script, decoder=spec)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("question", [QUESTION, CHOICE, "What else?"])
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_the_engine_answers_what_the_reference_does(most, question, slots):
    bundle = deep()
    protocol = partial(zooms, most=most)
    engine = Engine(bundle, slots=slots, chunk=64)
    fast = engine.run(engine.submit(PICTURE, question, protocol))
    plain = Reference(bundle, free_box=False).run(PICTURE, question, protocol)
    for name in ("answer", "box", "crop", "chosen"):
        assert getattr(fast, name) == getattr(plain, name)
    assert fast.micro.generation.tokens == plain.micro.generation.tokens
    assert fast.micro.loss == pytest.approx(plain.micro.loss, abs=1e-4)
    assert fast.counters.vision_encodes <= 1 + most
    assert fast.counters.tokens_prefilled + fast.counters.tokens_reused == plain.counters.tokens_prefilled


@pytest.mark.parametrize("question", [QUESTION, CHOICE])
def test_one_zoom_is_dualfocus(question):
    bundle = deep()
    expected = Reference(bundle, free_box=False).ask(PICTURE, question)
    found = DualFocus(bundle).submit(PICTURE, question, partial(zooms, most=1)).result()
    same(Pair(PICTURE, question), found, expected, bundle, alike=True)


def test_a_crop_is_looked_into_while_it_is_larger_than_what_the_model_sees():
    """Half of the crop at each zoom: 400 pixels, then about 250, 190 …; the fake sees 8."""
    bundle = deep()
    encodes = []
    for most in (1, 2, 3):
        engine = Engine(bundle)
        result = engine.run(engine.submit(PICTURE, QUESTION, partial(zooms, most=most)))
        encodes.append(result.counters.vision_encodes)
    assert encodes == [2, 3, 4]
    small = PICTURE[:9, :9]  # no crop of it is larger than what is seen
    assert max(small.shape) < LARGER * bundle.manifest.image.size
    engine = Engine(bundle)
    assert engine.run(engine.submit(small, QUESTION, partial(zooms, most=3))).counters.vision_encodes == 2


def test_a_second_crop_is_a_part_of_the_first_in_pixels_of_the_picture():
    bundle = deep()
    crops = []

    def seen(task):
        steps = zooms(task, 3)
        work = next(steps)
        while True:
            crops.extend(item.crop for item in work if type(item).__name__ == "Encode")
            try:
                work = steps.send((yield work))
            except StopIteration as end:
                return end.value

    model = DualFocus(bundle)
    model.submit(PICTURE, QUESTION, seen).result()
    # of the first look, the region comes from a generator beside the macro answer
    assert len(crops) == 3
    outer, *inner = crops
    assert outer == (0, 0, 400, 400)
    for left, top, right, bottom in inner:
        assert outer[0] <= left < right <= outer[2]
        assert outer[1] <= top < bottom <= outer[3]
        outer = left, top, right, bottom
    whole = DualFocus(bundle).submit(PICTURE, QUESTION, partial(zooms, most=1)).result()
    # the second box is read within the first crop
    left, top, right, bottom = whole.crop
    x0, y0, x1, y1 = (float(number) for number in re.findall(r"[\d.]+", BOX))
    centre = left + (x0 + x1) / 2 * (right - left), top + (y0 + y1) / 2 * (bottom - top)
    left, top, right, bottom = crops[1]
    assert left < centre[0] < right
    assert top < centre[1] < bottom


def test_without_a_region_the_macro_answer_stands():
    bundle = fakes.make_bundle({"bounding box": spelled("none"), "\nWhat": spelled("a sta")})
    result = DualFocus(bundle).submit(PICTURE, QUESTION, partial(zooms, most=3, free_box=True)).result()
    expected = Reference(bundle).ask(PICTURE, QUESTION)
    same(Pair(PICTURE, QUESTION), result, expected, bundle, alike=True)
    assert result.chosen == "macro"
    assert result.fallback


def test_where_the_context_is_full_no_further_look_is_taken():
    """Room for two images and their dialogue, then for three, then for what is to be scored."""
    found = set()
    for context in range(480, 760, 20):
        bundle = deep(context)
        engine = Engine(bundle)
        fast = engine.run(engine.submit(PICTURE, QUESTION, partial(zooms, most=4)))
        plain = Reference(bundle, free_box=False).run(PICTURE, QUESTION, partial(zooms, most=4))
        assert (fast.answer, fast.crop, fast.box) == (plain.answer, plain.crop, plain.box)
        found.add((fast.counters.vision_encodes, fast.macro.loss is not None))
    assert len({encodes for encodes, _ in found}) > 1
    assert {scored for _, scored in found} == {True, False}


def test_zooms_on_the_command_line(tmp_path):
    """Of a picture whose first crop is more than twice what the model sees."""
    with Image.open(ROOT / "examples" / "scene.png") as scene:
        scene.resize([3 * side for side in scene.size]).save(tmp_path / "large.png")
    question = (ROOT / "examples" / "scene.txt").read_text().strip()

    def ask(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["ask", str(tmp_path / "large.png"), question, "--json", *options])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    one, two, plain = ask(), ask("--zooms", "2"), ask("--zooms", "2", "--plain")
    assert [of["counters"]["vision_encodes"] for of in (one, two)] == [2, 3]
    for name in ("answer", "chosen", "box", "crop"):
        assert two[name] == plain[name]
    for option in (["--mode", "macro"], ["--mode", "micro"], ["--skip-above", "0.5"]):
        refused = CliRunner().invoke(
            app, ["ask", str(tmp_path / "large.png"), question, "--zooms", "2", *option]
        )
        assert refused.exit_code == 2
        assert option[0] in refused.stderr


def test_the_documentations_protocol_runs():
    text = (ROOT / "docs" / "architecture.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    told: list[object] = []
    exec(code.replace("examples/", f"{ROOT}/examples/"), {"print": told.append})
    assert told == [["no"] * 4]
