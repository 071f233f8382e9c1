"""From the name a user gives to a model folder on this machine: a path, `bundled:NAME`, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from optgptq.bundled import bundled_path
from optgptq.environment import read_environment
from optgptq.errors import ModelError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_BUNDLED = "bundled:"

# Weights, configuration and tokenizer; pickles, other engines' weights and original checkpoints stay where they are.
_WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
_UNWANTED_FILES = ("original/*", "*.bin", "*.pt", "*.pth", "*.gguf", "onnx/*")


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return the folder that `name` means, downloading a hub model into the hub's cache where it is not there yet.

    A folder that exists wins over a hub id of the same spelling. `HF_HUB_OFFLINE` and
    `TRANSFORMERS_OFFLINE` are honoured: only what the cache holds is used then. Nothing is downloaded but safetensors,
    JSON, tokenizer files and the model card.

    Raises:
        UsageError: a revision for something that is not on the hub.
        ModelError: no such folder, no such hub model, no access, or no connection.
    """
    if name.startswith(_BUNDLED) or (name and os.path.exists(name)):
        if revision is not None:
            raise UsageError(
                "--revision",
                expected="a hub model to go with it",
                found=f"{name}, which is on this machine",
                action="Leave --revision out.",
            )
        return bundled_path(name) if name.startswith(_BUNDLED) else Path(name)
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise ModelError(
            name,
            expected="a model folder, `bundled:story-llama`, or a hub id such as `owner/model`",
            found="nothing at this path",
            action="Check the spelling; relative paths start from the folder the command runs in.",
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_WANTED_FILES),
            ignore_patterns=list(_UNWANTED_FILES),
            local_files_only=read_environment().offline,
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"hub model {name}",
            expected=f"a model at revision {revision or 'main'} that this machine may read",
            found=_first_line(error),
            action="Check id and revision, and that `hf auth login` was done for a gated or private model.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}",
            expected="a model folder, or a hub model in the local cache",
            found="no such folder, and the hub cannot be reached or HF_HUB_OFFLINE is set",
            action="Check the spelling, or download the model once with a connection and without HF_HUB_OFFLINE.",
        ) from error
    except (HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise ModelError(
            f"hub model {name}",
            expected="a complete download",
            found=_first_line(error),
            action="Check the connection and run the command again: what is complete is not downloaded twice.",
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
