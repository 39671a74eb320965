"""Checkpoint -> bundle; needs the extra ``export``, whose packages are imported only once asked to work."""

from dualfocus.export.bundle import export_bundle
from dualfocus.export.errors import ExportError

__all__ = ["ExportError", "export_bundle"]
