"""Finds the model that a name stands for: a directory, a file, or files of a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.gguf.file import is_gguf
from flowspec_edge.errors import CheckpointError

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*.safetensors",
)
"""What an export reads of a repository; these files may have hundreds of others beside them."""
PICKLED_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*.bin")
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<file>[^:\\]+))?")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def find_model(name: str, *, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint, or the GGUF file, that ``name`` stands for.

    ``ORG/REPO`` and ``ORG/REPO:file.gguf`` are fetched from the hub into the cache of huggingface_hub, which honours
    ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` and shows its progress where stderr is a terminal.

    Args:
        allow_pickle: fetch ``pytorch_model.bin`` too.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if is_gguf(path):
            return path
        raise CheckpointError(f"{name}: is a file, but no GGUF file; give that, or the directory of a checkpoint")
    on_hub = _NAME.fullmatch(name)
    if on_hub is None or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such directory or file, and no name on the hub, as ORG/REPO or ORG/REPO:file.gguf"
        )
    repo, file = on_hub["repo"], on_hub["file"]
    if file is None:
        return _fetch_checkpoint(repo, FILES + (PICKLED_FILES if allow_pickle else ()))
    return _fetch_gguf(repo, file)


def find_draft_head(name: str, *, allow_pickle: bool = False) -> Path:
    """The directory of the draft head that ``name`` stands for. Raises CheckpointError as :func:`find_model` does."""
    path = find_model(name, allow_pickle=allow_pickle)
    if path.is_file():
        raise CheckpointError(
            f"{name}: is a GGUF file; draft heads are read as they were published, from a directory or as ORG/REPO"
        )
    return path


def _fetch_checkpoint(repo: str, patterns: tuple[str, ...]) -> Path:
    directory = _fetch(repo, patterns)
    if not (directory / "config.json").is_file():
        files = _gguf_files(repo) or sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"it has {', '.join(files)}; name one, as {repo}:{files[0]}" if files else "it has no model"
        raise CheckpointError(f"{repo}: has no config.json, so it is no checkpoint; {hint}")
    return directory


def _fetch_gguf(repo: str, file: str) -> Path:
    """The file in the cache, with all its parts beside it where it is one of several."""
    part = _PART.search(file)
    wanted = f"{file[: part.start()]}-*-of-{part[1]}.gguf" if part else file
    path = _fetch(repo, (wanted,)) / file
    if not path.is_file():
        files = _gguf_files(repo)
        hint = f"; its GGUF files: {', '.join(files)}" if files else ""
        raise CheckpointError(f"{repo}: has no file {file}{hint}")
    return path


def _fetch(repo: str, patterns: tuple[str, ...]) -> Path:
    """The directory of the cache that holds the repository's files of these names."""
    import requests
    from huggingface_hub import snapshot_download  # takes a second to import
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    below = [pattern for pattern in patterns if "/" in pattern]
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=None if below else ["*/*"]))
    except GatedRepoError as cause:
        raise CheckpointError(
            f"{repo}: its owner asks you to accept terms first; do so on its page, then set HF_TOKEN or log in by `hf`"
        ) from cause
    except RepositoryNotFoundError as cause:
        raise CheckpointError(
            f"{repo}: no such directory, and no such repository on the hub (if it is private: `hf auth login`)"
        ) from cause
    except LocalEntryNotFoundError as cause:
        raise CheckpointError(
            f"{repo}: no such directory, and not in the cache of the hub, which cannot be reached from here"
        ) from cause
    except HFValidationError as cause:
        raise CheckpointError(
            f"{repo}: no such directory, and no name that a repository on the hub can have"
        ) from cause
    except (requests.RequestException, OSError) as cause:
        problem = " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{repo}: could not be fetched from the hub ({problem})") from cause


def _gguf_files(repo: str) -> list[str]:
    """The GGUF files of a repository; none where the hub cannot be asked."""
    import requests
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(repo).siblings or []
    except (requests.RequestException, OSError):
        return []
    return sorted(file.rfilename for file in files if file.rfilename.endswith(".gguf"))
