"""Building blocks of configurations: types, the base class of sections, validation with readable errors."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dora_ray.config_source import QUOTED_VIDEOS
from dora_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Interval = tuple[float, float]
# A number of steps, or a share of the run if below 1, so the meaning is unambiguous.
Span = Natural | Annotated[float, Field(ge=0.0, lt=1.0)]


def _listed(value: Any) -> Any:
    """Turn a single path into a list."""
    if isinstance(value, str | PathLike):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(str(path) if isinstance(path, PathLike) else path for path in value)
    raise ValueError(f"data.videos={value!r} is neither a path nor a list of paths; {QUOTED_VIDEOS}")


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed)]
# An error lists all keys if there are at most this many.
MOST_LISTED = 30


class Section(BaseModel):
    """A section of a configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def span_steps(span: float, num_steps: int) -> int:
    """Return a span in steps; a share below 1 is multiplied by `num_steps` and rounded."""
    return round(span * num_steps) if 0 < span < 1 else int(span)


def checked(kind: type[S], values: Mapping[str, Any], noun: str) -> S:
    """Build a section from values.

    Args:
        kind: class of the section.
        values: nested mappings of keys.
        noun: name of a key in error messages, such as "configuration key".

    Raises:
        ConfigError: some values are invalid; one line for each with its key, the value, what is allowed, and the
            nearest known key.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, kind, noun) for detail in error.errors())) from None


def _explain(detail: ErrorDetails, kind: type[Section], noun: str) -> str:
    if detail["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in detail["loc"])
        return unknown_key(key, kind, noun)
    if detail["type"] == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    # pydantic's locations also contain names of union members, which are not keys.
    words = {word for key in keys_of(kind) for word in key.split(".")}
    key = ".".join(str(part) for part in detail["loc"] if str(part) in words)
    return f"{key}={detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def keys_of(kind: type[Section]) -> list[str]:
    """Return all dotted keys of a section and its subsections."""
    found = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, Section):
            found += [f"{name}.{key}" for key in keys_of(inner)]
        else:
            found.append(name)
    return found


def unknown_key(key: str, kind: type[Section], noun: str) -> str:
    """Return the message for an unknown key: with the nearest known key, or the list of keys."""
    known = keys_of(kind)
    tail = key.rsplit(".", 1)[-1]
    close = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    close += difflib.get_close_matches(key, [*known, *kind.model_fields], n=1, cutoff=0.5)
    if close:
        hint = f"Did you mean {close[0]}?"
    elif len(known) <= MOST_LISTED:
        hint = f"Known keys: {', '.join(known)}."
    else:
        hint = "`dora-ray config` lists all keys."
    return f"unknown {noun} {key}. {hint}"
