"""`fetch`: a checkpoint's folder, or its id on the Hugging Face Hub -> a folder, and the commit it is of.

From the Hub comes only what an export reads, into the Hub's own cache, where an interrupted download goes
on the next time. The small files come first and the weights last, so a snapshot that has its weights has
everything; only such a one is taken from the cache when the Hub cannot be reached.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from dualfocus.export import config
from dualfocus.export.errors import ExportError
from dualfocus.export.source import WEIGHTS, is_id, kind_of_files

SMALL = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "dualfocus.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]
ANSWER_WITHIN = 10.0  # seconds; a Hub that takes longer counts as out of reach


def fetch(
    source: str, revision: str | None = None, check: Callable[[Path], object] | None = None
) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the hash of the Hub's commit that it holds: None for a path.

    `source` is a path, or a model's id on the Hub, such as "llava-hf/llava-1.5-7b-hf"; `revision` a branch,
    tag or commit there, by default "main". A bar shows the download on a terminal. `check` gets the folder
    before its weights come, and may raise. Raises ExportError: `source` is neither, may not be read, has no
    such revision or no weights, or cannot be had whole.
    """
    if os.path.exists(source):  # unlike Path.exists, it raises nothing
        if revision is not None:
            raise ExportError(f"{source} is a path, which has no revision {revision!r}, expected an id")
        return Path(source), None
    if not is_id(source):
        raise ExportError(f"no such folder: {source:.200}, expected a checkpoint's folder or its id")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging
    except ModuleNotFoundError as error:
        raise ExportError(f"export needs {error.name}: pip install 'dualfocus[export,cpu]'") from error
    logging.set_verbosity_error()  # what went wrong is said once, by an ExportError
    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        found = HfApi().model_info(source, revision=revision, timeout=ANSWER_WITHIN)
    except OSError as error:
        if refusal := _refusal(source, revision, error):
            raise ExportError(refusal) from error
        folder = _cached(source, revision, _reason(error))
    else:
        files = {file.rfilename for file in found.siblings or ()}
        folder = _download(source, revision, files, check)
    return folder, folder.name


def _cached(source: str, revision: str | None, reason: str) -> Path:
    """The snapshot that is in the cache; `reason` says why the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except OSError as error:
        raise ExportError(
            f"{source} is neither a folder nor in the Hub's cache, and the Hub is out of reach: {reason}"
        ) from error
    if missing := _missing(folder):
        raise ExportError(
            f"the Hub's cache holds {source} without its {missing}, and the Hub is out of reach: {reason}"
        )
    return folder


def _download(
    source: str, revision: str | None, files: set[str], check: Callable[[Path], object] | None
) -> Path:
    """The snapshot of a repository of these `files`; what the cache has of it is not asked for again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    if problem := kind_of_files(files):
        raise ExportError(f"{source} on the Hub {problem}")
    weights = next((name for name in WEIGHTS if name in files), None)
    if weights is None or "config.json" not in files:
        raise ExportError(f"{source} on the Hub has no config.json or none of {', '.join(WEIGHTS)}")
    sharded = weights.endswith(".json")
    try:
        small = [*SMALL, weights] if sharded else SMALL
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=small))
        if check is not None:
            try:
                check(folder)
            except ExportError as error:
                raise ExportError(str(error).replace(str(folder), source)) from None
        large = _shards(folder / weights) if sharded else [weights]
        snapshot_download(source, revision=folder.name, allow_patterns=large)
    except (OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        if refusal := _refusal(source, revision, error):
            raise ExportError(refusal) from error
        if isinstance(error, OSError) and error.errno is not None:  # a number is a disk's, no network's
            raise ExportError(
                f"the Hub's cache {HF_HUB_CACHE} cannot be written: {error.strerror}; "
                "make room there, or name another folder in HF_HOME"
            ) from error
        raise ExportError(
            f"the download of {source} broke off, and goes on from there when started again: {_reason(error)}"
        ) from error
    if missing := _missing(folder):
        raise ExportError(f"{source} on the Hub lacks {missing}, which {weights} names")
    return folder


def _missing(folder: Path) -> str | None:
    """What the snapshot in `folder` lacks to be whole, if anything."""
    weights = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        return "weights"
    names = _shards(folder / weights) if weights.endswith(".json") else []
    return next((name for name in ["config.json", *names] if not (folder / name).exists()), None)


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names."""
    return sorted(set(config.shards(index).values()))


def _refusal(source: str, revision: str | None, error: Exception) -> str | None:
    """What the Hub says against `source`, as a sentence; None where it could not be asked."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return f"{source} has no revision {revision!r}, expected a branch, tag or commit on the Hub"
    if isinstance(error, GatedRepoError):  # which is a RepositoryNotFoundError, too
        return f"{source} is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{source} is neither a folder nor a model on the Hub, expected one of them; "
            "for a private one, `hf auth login` or set HF_TOKEN"
        )
    if _status(error) in (401, 403):
        return f"the Hub does not let you read {source}: `hf auth login`, or set another HF_TOKEN"
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind `error`, if one is."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    """A few words: those of `requests` are a paragraph of addresses."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, RuntimeError):  # hf_xet's, whose type says nothing; a full disk is one of them
        return " ".join(str(error).split())
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = _status(error)
    return type(error.__cause__ or error).__name__ if status is None else f"it answered {status}"
