"""An answer as a picture: where the model looked, what it saw there, and what it answered.

Left the picture with the model's box and the crop around it, right the crop zoomed, tied to its place
by two lines; below the question and both answers.
"""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from dualfocus.runtime.image import Picture
from dualfocus.runtime.result import Answer, FocusResult

_LONGEST = 1200  # pixels of the shown picture's longer side
_BACKGROUND = "#14171c"
_TEXT = "#e8eaed"
_FAINT = "#8b95a1"
_BOX = "#ffb000"
_CROP = "#ffffff"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def annotate(picture: Picture, question: str, result: FocusResult) -> Image.Image:
    """An RGB image of about `_LONGEST` pixels that shows `result`, the answer to `question` on `picture`."""
    whole = Image.fromarray(picture)
    scale = min(_LONGEST / max(whole.size), max(1.0, 640 / max(whole.size)))
    shown = whole.resize([max(1, round(side * scale)) for side in whole.size], Image.Resampling.LANCZOS)
    unit = max(12, round(max(shown.size) / 48))  # everything else is measured in this
    zoomed = _zoom(whole, result, min(shown.height, max(shown.size) // 2))

    panel = zoomed.width + 2 * unit if zoomed else 0
    width = unit + shown.width + unit + panel
    captions = _captions(question, result, unit, width - 2 * unit)
    height = unit + max(shown.height, zoomed.height if zoomed else 0) + unit
    line_height = round(unit * 1.6)
    canvas = Image.new("RGB", (width, height + line_height * len(captions) + unit // 2), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    canvas.paste(shown, (unit, unit))
    stroke = max(2, unit // 8)
    if zoomed and result.crop:
        left, top, right, bottom = (unit + round(side * scale) for side in result.crop)
        middle = (top + bottom - zoomed.height) // 2  # as near to the crop as the picture's height allows
        corner = 3 * unit + shown.width, max(unit, min(middle, unit + shown.height - zoomed.height))
        canvas.paste(zoomed, corner)
        frame = *corner, corner[0] + zoomed.width, corner[1] + zoomed.height
        for width, colour in ((stroke + 1, _BACKGROUND), (stroke // 2, _CROP)):  # seen on light and dark
            draw.line([right, top, *frame[:2]], fill=colour, width=width)
            draw.line([right, bottom, frame[0], frame[3]], fill=colour, width=width)
            draw.rectangle((left, top, right, bottom), outline=colour, width=width)
        draw.rectangle(frame, outline=_CROP, width=stroke)
    if result.box:
        x0, y0, x1, y1 = (  # a box may reach far beyond the picture
            unit + min(max(0, round(side * scale)), edge)
            for side, edge in zip(result.box.corners, shown.size * 2, strict=True)
        )
        draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=_BOX, width=stroke)
    for i, (text, colour, font) in enumerate(captions):
        draw.text((unit, height + i * line_height), text, fill=colour, font=font)
    return canvas


def _zoom(whole: Image.Image, result: FocusResult, room: int) -> Image.Image | None:
    """The crop, enlarged or reduced to fit `room` x `room` pixels."""
    if result.crop is None:
        return None
    crop = whole.crop(result.crop)
    scale = room / max(crop.size)
    return crop.resize([max(1, round(side * scale)) for side in crop.size], Image.Resampling.BICUBIC)


def _captions(question: str, result: FocusResult, unit: int, room: int) -> list[tuple[str, str, Font]]:
    """Lines of text, their colours and fonts, none wider than `room` pixels."""
    font, large = ImageFont.load_default(unit), ImageFont.load_default(unit * 1.2)
    lines = [(" ".join(question.split()), _FAINT, font)]
    for name, answer in (("macro", result.macro), ("micro", result.micro)):
        if answer is not None:
            chosen = name == result.chosen
            lines.append((_line(name, answer), _BOX if chosen else _TEXT, large if chosen else font))
    if result.fallback:
        lines.append((f"no micro answer: {result.fallback}", _FAINT, font))
    return [(_fit(text, font, room), colour, font) for text, colour, font in lines]


def _line(name: str, answer: Answer) -> str:
    loss = "" if answer.loss is None else f"    (loss {answer.loss:.3f})"
    return f"{name}:  {' '.join(answer.text.split())}{loss}"


def _fit(text: str, font: Font, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
