"""From a bundle, a picture and a question to an answer: numpy, Pillow, tokenizers and an inference library.

bundle = Bundle.open()
result = FocusRunner(bundle).ask(open_picture("photo.jpg"), "What is written on the sign?")
"""

import os

# ONNX Runtime's wheels report every session to their maker and keep an identifier in the user's cache
# folder, unless this was set before they are first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.errors import BundleError, EngineError, InputError, PictureError, QuestionError
from dualfocus.runtime.geometry import Region
from dualfocus.runtime.image import open_picture
from dualfocus.runtime.plain import PlainRunner
from dualfocus.runtime.result import FocusResult, ReplyToken, Stage
from dualfocus.runtime.scheduler import FocusRunner, Session
from dualfocus.runtime.turns import Question

__all__ = [
    "Bundle",
    "BundleError",
    "EngineError",
    "FocusResult",
    "FocusRunner",
    "InputError",
    "PictureError",
    "PlainRunner",
    "Question",
    "QuestionError",
    "Region",
    "ReplyToken",
    "Session",
    "Stage",
    "open_picture",
]
