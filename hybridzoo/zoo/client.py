"""huggingface_hub, asked with patience; whatever it raises is one sentence."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hybridzoo import __version__
from hybridzoo.errors import HubError
from hybridzoo.options import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
_ATTEMPTS = 5
# seconds; who is to wait longer than this should hear of it
_LONGEST_WAIT = 120
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_PASSING = (408, 429, 500, 502, 503, 504)


def api() -> HfApi:
    """The client of HF_ENDPOINT, with HF_TOKEN or the token of `hf auth login`."""
    from huggingface_hub import HfApi

    if not re.match(r"https?://[\w.-]+(:\d+)?(/|$)", endpoint()):
        raise HubError(
            f"HF_ENDPOINT: no address ({shown(endpoint())}); it is such as https://huggingface.co. "
            "Correct or unset it."
        )
    return HfApi(library_name="hybridzoo", library_version=__version__)


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every request."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def ask(
    repo: str, revision: str | None, call: Callable[[], T], *, left: str = "whole files are kept"
) -> T:
    """What `call` returns; where the hub is busy or down for a moment it is called again.

    Args:
        repo: owner/name.
        revision: of the repository, for the sentences.
        call: asks the hub through the client.
        left: what a call that fails leaves behind, as its sentence says it.

    Raises:
        HubError: it failed, or the hub wants a wait of more than two minutes.
    """
    with _sentences(repo, revision, left), _bounded_waits():
        for attempt in range(_ATTEMPTS - 1):
            try:
                return call()
            except OSError as error:
                wait = _wait(error, attempt)
                if wait is None:
                    raise
                time.sleep(wait)
        return call()


def is_out_of_reach(error: HubError) -> bool:
    """Whether nobody answered, rather than answered no."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = _cause(error.__cause__)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _PASSING
    return isinstance(cause, OfflineModeIsEnabled | _network_error())


@contextmanager
def _bounded_waits() -> Iterator[None]:
    """The client waits by itself, as long as a busy hub says; within limits, here."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(response: object) -> None:
        error = HfHubHTTPError("a long wait", response=response)  # type: ignore[arg-type]
        if error.response.status_code in _PASSING and _asked_wait(error) > _LONGEST_WAIT:
            raise error

    hooks = get_session().event_hooks["response"]
    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


def _wait(error: OSError, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None where another one is of no use."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = _cause(error)
    if not isinstance(cause, HfHubHTTPError) or cause.response.status_code not in _PASSING:
        return None
    wait = max(_asked_wait(cause), 2.0**attempt)
    return wait if wait <= _LONGEST_WAIT else None


def _asked_wait(error: HfHubHTTPError) -> float:
    """Seconds, of the header that the client obeys."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = headers.get("Retry-After", "")
    # the other form, a date, comes from no hub
    return float(text) if text.isdecimal() else 0.0


def _network_error() -> type[Exception]:
    # httpx's or httpx2's, by the client's version, which exports only this child of it
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _cause(error: BaseException | None) -> BaseException | None:
    """What really happened: the client says of much that no file is in its cache."""
    # of a network error the cause is another of the same
    while error is not None and not isinstance(error, _network_error()):
        if error.__cause__ is None:
            break
        error = error.__cause__
    return error


@contextmanager
def _sentences(repo: str, revision: str | None, left: str) -> Iterator[None]:
    try:
        yield
    # KeyError, TypeError: an answer that lacks what the client takes for granted; RuntimeError: how
    # it wraps what stops an upload
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, _network_error()) as error:
        cause = _cause(error)
        raise HubError(f"{repo}: {_sentence(cause or error, repo, revision, left)}") from error


def _sentence(error: BaseException, repo: str, revision: str | None, left: str) -> str:
    from huggingface_hub import constants, errors

    where = endpoint()
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo, revision, left)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"no such file or directory; as a repository it is not in {constants.HF_HUB_CACHE},"
            f" and HF_HUB_OFFLINE is set: {where} is not asked. Check the path, or unset it."
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no token ({where}); the hub has to know who asks. Please {_LOGIN}."
    if isinstance(error, errors.HFValidationError):
        return f"no name of a repository ({error}); it is owner/name. Correct it."
    if isinstance(error, _network_error()):
        return (
            f"{where} does not answer, or stops ({type(error).__name__}: {shown(str(error))}); "
            f"{left}. Check the network and HF_ENDPOINT, and try again."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"no room left on the disk of {constants.HF_HUB_CACHE}; {left}. Make room, "
            "or set HF_HOME to another disk, and try again."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}. Check its rights."
    return (
        f"an answer of {where} that is cut or none of a hub's ({shown(str(error))}); another "
        "server, a proxy or a bad line can be the reason. Check HF_ENDPOINT and try again."
    )


def _refusal(error: HfHubHTTPError, repo: str, revision: str | None, left: str) -> str:
    from huggingface_hub import errors

    status, url = error.response.status_code, f"{endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"gated ({status}); its owner gives it to those who ask. Accept its terms at {url}, "
            f"then {_LOGIN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"no revision {revision or 'main'!r} ({status}); it is a branch, a tag or a commit. "
            f"{url}/tree/main shows them."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository at {endpoint()} ({status}), or a private one, and no such "
            f"directory here. Check the name; for a private one {_LOGIN}."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"the hub lists a file that it does not have ({status}). Try again later."
    if status in (401, 403):
        said = error.server_message or error.response.headers.get("X-Error-Message") or "no reason"
        return (
            f"not allowed ({status}: {shown(said)}); this token may not do that. Use another one: "
            f"{_LOGIN}."
        )
    if status in (409, 412):
        return f"changed while it was written to ({status}); {left}. Try again."
    wait = _asked_wait(error)
    if status in _PASSING:
        asked = f" and asks to wait {wait:.0f} s" if wait else ""
        what = "gets too many requests" if status == 429 else "is down"
        return f"the hub {what} ({status}){asked}; {left}. Try again later."
    return f"the hub refused ({status}: {shown(error.server_message or str(error))}). See {url}."
