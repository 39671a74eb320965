"""From a bundle, a picture and a question to an answer: numpy, Pillow, tokenizers and an inference library.

model = DualFocus()
result = model.ask("photo.jpg", "What is written on the sign?")
"""

import os

# ONNX Runtime's wheels report every session to their maker and keep an identifier in the user's cache
# folder, unless this was set before they are first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.engine import Engine
from dualfocus.runtime.errors import (
    BundleError,
    BusyError,
    EngineError,
    InputError,
    PictureError,
    PictureWarning,
    QuestionError,
)
from dualfocus.runtime.geometry import Region
from dualfocus.runtime.image import open_picture
from dualfocus.runtime.model import DualFocus, Session
from dualfocus.runtime.reference import Reference
from dualfocus.runtime.result import FocusResult, ReplyToken, Stage
from dualfocus.runtime.turns import Question
from dualfocus.runtime.worker import Handle

__all__ = [
    "Bundle",
    "BundleError",
    "BusyError",
    "DualFocus",
    "Engine",
    "EngineError",
    "FocusResult",
    "Handle",
    "InputError",
    "PictureError",
    "PictureWarning",
    "Question",
    "QuestionError",
    "Reference",
    "Region",
    "ReplyToken",
    "Session",
    "Stage",
    "open_picture",
]
