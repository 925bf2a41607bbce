"""Model hubs that speak Hugging Face's interface: ``hub:user/name`` is a repository there, wherever ``HF_ENDPOINT``
leads (huggingface.co by default).

What comes from there is data: only the files of policies are fetched, and a policy's loader runs no code of theirs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlopt.errors import RloptError, needed

log = logging.getLogger(__name__)

PREFIX = "hub:"
FOLDER = "policy"
"""Where a repository keeps its policy."""
_WRITES = ("json", "safetensors", "jinja", "txt", "model")
FILES = (
    "*policy.json", "*state.json", "*tensors.safetensors",
    *(f"*{folder}/*.{ending}" for folder in ("model", "adapter") for ending in _WRITES),
)  # fmt: skip
"""What is fetched: the files of policy folders, wherever they lie; the latter are those of language models."""
OTHERS = ("run/*", "curve.png", "replay.mp4", "evaluation.json", "README.md")
"""What else is pushed."""
PATIENCE = 60.0
"""Seconds that a request may wait for a connection or for bytes. The client's own answer is for ever."""
_ADDRESS = re.compile(r"hub:([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """A repository, and what of it is meant."""

    repository: str
    """``user/name``."""
    folder: str = ""
    """A policy's folder in it, such as ``policy/run0``."""
    revision: str | None = None
    """A branch, a tag or a commit; None for the newest of the main branch."""

    def __str__(self) -> str:
        end = f"@{self.revision}" if self.revision else ""
        return PREFIX + "/".join(filter(None, (self.repository, self.folder))) + end


def is_address(path: Path | str) -> bool:
    """Return whether ``path`` means a repository on a hub and no folder."""
    return str(path).startswith(PREFIX)


def parse_address(text: Path | str) -> Address:
    """Read ``hub:user/name``, ``hub:user/name@revision`` or ``hub:user/name/folder@revision``.

    Raises:
        RloptError: it is none of them.
    """
    found = _ADDRESS.fullmatch(str(text))
    parts = [] if found is None else f"{found[1]}{found[2]}/{found[3] or 'main'}".split("/")
    if found is None or any(part.strip(".-") != part or ".." in part for part in parts):
        raise RloptError(f"{text}: write hub:user/name, or hub:user/name@revision")
    return Address(found[1], found[2].strip("/"), found[3])


def refuse_nowhere(path: Path | str) -> None:
    """Raise RloptError where ``path`` is neither an address nor on this machine."""
    if not is_address(path) and not Path(path).exists():
        raise RloptError(f"{path} does not exist; give a policy folder or a run folder")


def local(path: Path | str) -> Path:
    """Return a folder on this machine: ``path`` itself, or that of the policy at ``hub:user/name``, fetched into the
    hub's cache (``HF_HOME``) unless it lies there. Without a network what lies there is taken.

    Raises:
        RloptError: there is no such repository or revision, it cannot be reached, or it holds no policy.
    """
    if not is_address(path):
        return Path(path)
    address = parse_address(path)
    with _client(address) as hub:
        snapshot = Path(_fetch(hub, address))
    folder = snapshot / (address.folder or FOLDER)
    if address.folder or folder.is_dir():
        if not folder.is_dir():
            raise RloptError(f"{address}: the repository has no policy there; leave /{address.folder} out")
        return folder
    return snapshot  # one that was not pushed by rlopt may have its policy at the top


def _fetch(hub: Any, address: Address) -> str:
    """Return the folder in the cache that has what the hub has now. The client alone takes an older one in silence
    whatever goes wrong, and waits for ever where the hub does not answer."""
    errors = needed("huggingface_hub.errors", "hub", "")
    fetch = partial(
        hub.snapshot_download, address.repository, revision=address.revision, allow_patterns=list(FILES)
    )  # fmt: skip
    try:  # the client asks this once more, without a limit of time
        hub.HfApi().repo_info(address.repository, revision=address.revision, timeout=PATIENCE)
    except errors.HfHubHTTPError:
        raise
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as e:
        found = fetch(local_files_only=True)
        log.warning("%s: the hub cannot be reached (%s); what was fetched before is taken", address, e)
        return str(found)
    return str(fetch())


def refuse_strangers(address: Address) -> None:
    """Raise RloptError where this user is not logged in, before any work is done for an upload."""
    with _client(address) as hub:
        if hub.get_token() is None:
            raise RloptError(f"{address}: you are not logged in; {_LOG_IN}")


def upload(folder: Path, address: Address, *, message: str, private: bool = False) -> str:
    """Make ``folder`` the content of a repository, which is made where it is missing, in one commit of one branch, and
    return its page. Files that rlopt pushed before and that are no longer there are deleted; others stay.

    Raises:
        RloptError: the hub refuses, does not answer, or has the repository as a public one that should be ``private``.
    """
    with _client(address) as hub:
        api = hub.HfApi()
        page = api.create_repo(address.repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repository, timeout=PATIENCE).private:
            raise RloptError(f"{address} is there and public; make it private in its settings, or leave --private out")
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            revision=address.revision,
            commit_message=message,
            delete_patterns=[f"{FOLDER}/*", *OTHERS],
        )
    return str(page)


@contextmanager
def _client(address: Address) -> Iterator[Any]:
    """Give the client's module, which cannot wait for ever in here, and raise what goes wrong as one line.

    Its xet transfer is left out: policies are small, it retries for minutes where a hub lacks it, and it cuts an upload
    into several commits.
    """
    hub = needed("huggingface_hub", "hub", str(address))
    errors, constants, utils = (
        needed(f"huggingface_hub.{name}", "hub", "") for name in ("errors", "constants", "utils")
    )
    session = hub.get_session()
    before, quiet = (session.timeout, constants.HF_HUB_DISABLE_XET), utils.are_progress_bars_disabled()
    session.timeout, constants.HF_HUB_DISABLE_XET = PATIENCE, True
    utils.disable_progress_bars()
    try:
        yield hub
    except RloptError:
        raise
    # The client's errors are OSErrors and ValueErrors; those of its transport are ``HTTPError``s.
    except (OSError, ValueError, errors.HTTPError) as e:
        raise RloptError(f"{address}: {_told(e, address, errors)}") from e
    finally:
        session.timeout, constants.HF_HUB_DISABLE_XET = before
        if not quiet:
            utils.enable_progress_bars()


def _told(error: Exception, address: Address, errors: Any) -> str:
    """Return what went wrong and what to do, in one line."""
    said = " ".join((getattr(error, "server_message", None) or str(error)).split())[:200] or type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"no name for a repository ({said}); write hub:user/name"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {address.revision}; name a branch, a tag or a commit of it, or leave @… out"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner must let you in; ask on its page, and {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private; check the name, or {_LOG_IN}"
    if status == 401:
        return f"the hub knows no such token (401); {_LOG_IN}"
    if status == 403:
        return f"the token may not do that (403: {said}); take one with the right to write there"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or name a folder"
    if status is not None:
        return f"the hub refused (HTTP {status}: {said}); try again later, or see the hub's page of its state"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub cannot be reached and the policy is not in its cache; try again with a network"
    return f"the hub cannot be reached ({said}); check the network and HF_ENDPOINT, and try again"
