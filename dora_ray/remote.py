"""Readable messages for errors of object stores and web servers.

Each library behind fsspec (botocore, aiohttp, Google's) has its own errors. They are recognized by class name, so that
none of these libraries needs to be installed. Lance has one class for all errors, which differ by message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dora_ray.errors import ConfigError

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's account",
}
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
REFUSED = ("PermissionError", "ClientResponseError", "ClientError", "HttpError")
REFUSALS = (
    "401",
    "403",
    "Forbidden",
    "Access Denied",
    "AccessDenied",
    "Unauthorized",
    "InvalidAccessKeyId",
    "Signature",
)
CUT_SHORT = ("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError")
NOT_FOUND = 404
LANCE = "LanceError"
# Parts of Lance's messages -> equivalent errors of the other libraries.
LANCE_WORDS = {
    "CredentialsNotLoaded": "NoCredentialsError",
    "status code": "ClientError",
    "HTTP error": "ConnectionError",
}
UNREACHABLE = ("EndpointConnectionError", "HTTPClientError", "ClientConnectionError", "ConnectionError", "TimeoutError")


def refusal(path: str, error: BaseException) -> str | None:
    """Return why a remote path could not be accessed, and what to do; None for other errors."""
    scheme, separator, _ = path.partition("://")
    if not separator or scheme == "file":
        return None
    # fsspec reports any answer of a web server as "not found" and keeps the actual answer as the cause.
    link: BaseException | None = error
    while link is not None:
        reason = _reason(scheme, link)
        if reason is not None:
            return reason
        link = link.__cause__
    return None


def _reason(scheme: str, error: BaseException) -> str | None:
    ways = CREDENTIALS.get(scheme.removesuffix("a"), "an address that carries them")
    names = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())[:200] or type(error).__name__
    status = getattr(error, "status", None)
    if LANCE in text:
        names, text, status = _lance_words(str(error))
    if names & set(NO_CREDENTIALS):
        return f"no credentials were found ({text}); provide them on every node: {ways}"
    refused = status in (401, 403) if status else any(word in text for word in REFUSALS)
    if "PermissionError" in names or (names & set(REFUSED) and refused):
        return f"access was denied ({text}); the credentials are wrong, or lack permission for this path: {ways}"
    if names & set(UNREACHABLE):
        variable = " and AWS_ENDPOINT_URL" if scheme.startswith("s3") else ""
        return f"cannot be reached ({text}); check the address{variable}, and the network on every node"
    if names & set(CUT_SHORT) or (status and status != NOT_FOUND and names & set(REFUSED)):
        return f"the server failed to answer ({text}); try again, and check whether it is overloaded"
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return f"there is no such bucket ({text}); create it, or correct the address"
    return None


def _lance_words(message: str) -> tuple[set[str], str, int | None]:
    """Return class names, text and HTTP status as for another library's error.

    The server's message comes after the address, which is long, and before locations in Lance's source.
    """
    text = " ".join(message.partition(", /")[0].rpartition(" - ")[2].split())[:200]
    status = re.search(r"status code: (\d+)", text)
    return {name for words, name in LANCE_WORDS.items() if words in text}, text, int(status[1]) if status else None


@contextmanager
def named_refusals(path: str) -> Iterator[None]:
    """Turn access errors of a remote path into ConfigError; other errors pass unchanged.

    Raises:
        ConfigError: no credentials, no permission, no bucket, or no answer.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(path, error)
        if reason is None:
            raise
        raise ConfigError(f"{path}: {reason}") from error
