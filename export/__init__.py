"""Checkpoint -> bundle; needs the extra ``export``, whose packages are imported only once asked to work."""

from dualfocus.export.bundle import export_bundle
from dualfocus.export.errors import ExportError
from dualfocus.export.shapes import SHAPES, Shape

__all__ = ["SHAPES", "ExportError", "Shape", "export_bundle"]
