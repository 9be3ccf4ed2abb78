"""Refusals of object stores and web servers, in sentences for people.

Each library behind fsspec has errors of its own (botocore's, aiohttp's, Google's). They are told apart by the names of
their classes, so that none of those libraries need be installed. Lance has one class for all, and words.
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
# The errors of the other libraries that Lance's words amount to.
LANCE_WORDS = {
    "CredentialsNotLoaded": "NoCredentialsError",
    "status code": "ClientError",
    "HTTP error": "ConnectionError",
}
UNREACHABLE = ("EndpointConnectionError", "HTTPClientError", "ClientConnectionError", "ConnectionError", "TimeoutError")


def refusal(path: str, error: BaseException) -> str | None:
    """Why the place that `path` names did not serve, and what to do; None where the error says something else."""
    scheme, separator, _ = path.partition("://")
    if not separator or scheme == "file":
        return None
    # fsspec calls whatever a web server answers "not found", and keeps the answer as the cause.
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
        return f"no credentials were found ({text}); give them on every node: {ways}"
    refused = status in (401, 403) if status else any(word in text for word in REFUSALS)
    if "PermissionError" in names or (names & set(REFUSED) and refused):
        return f"access is refused ({text}); the credentials are wrong, or lack the right to this place: {ways}"
    if names & set(UNREACHABLE):
        variable = " and AWS_ENDPOINT_URL" if scheme.startswith("s3") else ""
        return f"cannot be reached ({text}); check the address{variable}, and the network on every node"
    if names & set(CUT_SHORT) or (status and status != NOT_FOUND and names & set(REFUSED)):
        return f"the server failed to answer ({text}); try again, and see whether it is overloaded"
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return f"there is no such bucket ({text}); create it, or correct the address"
    return None


def _lance_words(message: str) -> tuple[set[str], str, int | None]:
    """Names, words and status as of another library's error.

    What the server said is behind the address, which is long, and before places in Lance's source.
    """
    text = " ".join(message.partition(", /")[0].rpartition(" - ")[2].split())[:200]
    status = re.search(r"status code: (\d+)", text)
    return {name for words, name in LANCE_WORDS.items() if words in text}, text, int(status[1]) if status else None


@contextmanager
def named_refusals(path: str) -> Iterator[None]:
    """Turn what a place refuses into ConfigError; every other error passes.

    Raises:
        ConfigError: no credentials, no rights, no bucket, or no answer.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(path, error)
        if reason is None:
            raise
        raise ConfigError(f"{path}: {reason}") from error
