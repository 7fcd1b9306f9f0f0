"""Finds the files of a model: a directory, else the Hugging Face cache, else a download into it.

A model that is cached in full costs no network and no import of huggingface_hub (about a second).
The cache is laid out as huggingface_hub documents it:

    ROOT/models--ORG--NAME/refs/REVISION       a file that holds a commit
    ROOT/models--ORG--NAME/snapshots/COMMIT/   the files, as links into ../../blobs/

Only the presence of files is checked here; what is in them is the checkpoint reader's business.
"""

# os.path answers False where pathlib raises: a name too long, a directory one may not enter.
# ruff: noqa: PTH100, PTH111, PTH112, PTH113

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tinyvllm.errors import CheckpointError, InvalidRequestError
from tinyvllm.stderr import tell

_INDEX = "model.safetensors.index.json"
_REQUIRED = ("config.json", "tokenizer.json")
# What the engine reads besides the weights. Weights are fetched by name: repositories keep second
# copies of them (pytorch_model*.bin, original/*, consolidated.safetensors) that are as large again.
_SMALL_FILES = [
    *_REQUIRED,
    _INDEX,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
_HAND_PATTERNS = ("*.json", "*.jinja", "model*.safetensors")  # the same, short enough to type
_REPO_ID = re.compile(
    r"(?!.*(?:--|\.\.|\.git$))\w[\w.-]{0,95}(?<![.-])/\w[\w.-]{0,95}(?<![.-])", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TIMEOUT_SECONDS = 10.0


def find_model(
    model: str, *, revision: str | None = None, offline: bool = False, quiet: bool = False
) -> Path:
    """Returns the directory of `model`: a path, or a hub name `org/name` or `org/name@revision`.

    `offline`, HF_HUB_OFFLINE=1 and TRANSFORMERS_OFFLINE=1 forbid a download. Its progress goes to
    stderr if that is a terminal, and nowhere with `quiet`. Whatever is wrong on disk or on the
    network is a CheckpointError of one line.
    """
    repo, _, suffix = model.partition("@")
    is_repo = _REPO_ID.fullmatch(repo) is not None
    path = os.path.expanduser(model)
    if model and os.path.isdir(path):
        if (is_repo or revision) and not quiet:
            tell(f"note: {model} is a directory here, so no hub is asked.")
        return Path(path)
    if os.path.lexists(path):
        raise CheckpointError(_not_a_directory(Path(path)))
    if not is_repo:
        raise CheckpointError(
            f'"{path}" is neither a directory that can be seen here nor the name of a hub model. '
            "Pass the directory that holds config.json, or a name like org/name[@revision]."
        )
    if revision and suffix and revision != suffix:
        raise InvalidRequestError(
            f'Two revisions are asked for: "{suffix}" in {model} and "{revision}". Pass one.'
        )
    revision = revision or suffix or "main"
    if ".." in revision or revision.startswith(("/", "-")):
        raise CheckpointError(f'{repo}: "{revision}" is not a branch, a tag or a commit.')

    cache = _cache_root()
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = _cached_snapshot(folder, revision)
    missing = _missing_files(snapshot) if snapshot else []
    if snapshot and not missing:
        return snapshot
    if offline or _network_is_forbidden():
        found = f"{snapshot} lacks {_listed(missing)}" if snapshot else f"{folder} has no snapshot"
        raise CheckpointError(
            f'{repo} (revision "{revision}") is not complete on this machine and downloads are off '
            f"(--offline or HF_HUB_OFFLINE=1). Looked at: {os.path.abspath(path)}, not there; "
            f"{found}. To download it, run: {_download_command(repo, revision, missing)}"
        )
    return _download(repo, revision, cache, folder, quiet)


def _not_a_directory(path: Path) -> str:
    if not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist."
    if path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, which tinyvllm does not read. Pass a directory with "
            "config.json, tokenizer.json and *.safetensors, or the hub name of the original model."
        )
    return f"{path} is a file. Pass the directory that holds the model: {path.parent}"


def _cache_root() -> Path:
    env = os.environ.get  # a variable that is set but empty counts as not set
    home = env("HF_HOME") or f"{env('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    root = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(root)))


def _network_is_forbidden() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _cached_snapshot(folder: Path, revision: str) -> Path | None:
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and os.path.isdir(snapshot) else None


def _missing_files(snapshot: Path) -> list[str]:
    # isfile follows links: one that dangles is left by an interrupted download or a cleaned cache.
    needed = [*_REQUIRED, *_weight_files(snapshot)]
    return [name for name in needed if not os.path.isfile(snapshot / name)]


def _weight_files(snapshot: Path) -> list[str]:
    index = snapshot / _INDEX
    if not os.path.lexists(index):
        return ["model.safetensors"]
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(name for name in shards if isinstance(name, str))
    except OSError:
        return [_INDEX]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # damaged: the checkpoint reader says where and how


def _download(repo: str, revision: str, cache: Path, folder: Path, quiet: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    def fetch(name: str, at: str) -> Path:
        # File after file, in this thread: Ctrl-C ends it at once. The threads of snapshot_download
        # go on after a Ctrl-C until the shards that they are at are complete.
        path = Path(hf_hub_download(repo, name, revision=at, cache_dir=cache))
        return folder / "snapshots" / path.parent.name

    def require(names: Sequence[str]) -> None:
        if absent := [name for name in names if name not in offered]:
            raise CheckpointError(
                f'{repo} (revision "{revision}") has no {_listed(absent)} on the hub. tinyvllm '
                "reads config.json, tokenizer.json and *.safetensors; look for a converted copy."
            )

    try:
        with _hub_output(quiet):
            info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
            offered = [file.rfilename for file in info.siblings or []]
            require(_REQUIRED)
            # Under the name that was asked for, so that the cache notes which commit it stands for.
            snapshot = fetch("config.json", revision)
            for name in offered:
                if any(fnmatchcase(name, pattern) for pattern in _SMALL_FILES):
                    fetch(name, snapshot.name)
            weights = _weight_files(snapshot)
            require(weights)
            for name in weights:
                fetch(name, snapshot.name)
    except CheckpointError:
        raise
    except Exception as error:  # of requests, httpx or hf_xet: huggingface_hub's version decides
        raise CheckpointError(_explain(error, repo, revision, cache)) from error
    if missing := _missing_files(snapshot):
        raise CheckpointError(
            f"The download of {repo} is not complete: {snapshot} lacks {_listed(missing)}. Run the "
            "same command again; finished files are kept."
        )
    return snapshot


@contextlib.contextmanager
def _hub_output(quiet: bool) -> Iterator[None]:
    """huggingface_hub's progress bars only on a terminal; with `quiet` not its warnings either."""
    import logging

    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
    hide = not shown and not are_progress_bars_disabled()
    try:
        if hide:
            disable_progress_bars()
        if quiet:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def _explain(error: BaseException, repo: str, revision: str, cache: Path) -> str:
    """One line for whatever huggingface_hub raised: what failed, and what to try."""
    import shutil

    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    link: BaseException | None = error
    while link is not None:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, GatedRepoError) or status == 403:
            return (
                f"{repo} is gated and this account may not read it (HTTP {status}). Accept its "
                f"licence at {ENDPOINT}/{repo}, run `hf auth login`, and try again."
            )
        if isinstance(link, RevisionNotFoundError):
            return (
                f'{repo} has no branch, tag or commit "{revision}" (HTTP {status}). The ones that '
                f"it has are listed at {ENDPOINT}/{repo}/tree/main."
            )
        if status in (401, 404):
            return (
                f"{repo} is neither a directory here nor a model that {ENDPOINT} shows you (HTTP "
                f"{status}). Check the name; for a private or gated model run `hf auth login`."
            )
        if status is not None:
            return f"{ENDPOINT} answered HTTP {status} when asked for {repo}. Try again later."
        if isinstance(link, OSError) and (link.filename or link.errno in _DISK_ERRORS):
            at = next(place for place in (cache, *cache.absolute().parents) if place.exists())
            free = shutil.disk_usage(at).free / 1e9
            return (
                f"Cannot write {link.filename or repo} into the cache {cache}: {link.strerror} "
                f"({free:.1f} GB free). Make room, or set HF_HUB_CACHE to a directory elsewhere."
            )
        link = link.__cause__
    detail = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return (
        f"{repo} could not be downloaded from {ENDPOINT}: {detail}. Check the network, HF_ENDPOINT "
        "and the proxy, then run the same command again; finished files are kept."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _download_command(repo: str, revision: str, missing: list[str]) -> str:
    other = [n for n in missing if not any(fnmatchcase(n, p) for p in _HAND_PATTERNS)]
    words = ["hf", "download", repo, *_HAND_PATTERNS, *other]
    if revision != "main":
        words += ["--revision", revision]
    return ("HF_HUB_OFFLINE=0 " if _network_is_forbidden() else "") + shlex.join(words)
