"""Parts that configurations are made of, and one way to say what is wrong with a value."""

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
# A number of steps, or a share of the run: below 1, so that no number means two things.
Span = Natural | Annotated[float, Field(ge=0.0, lt=1.0)]


def _listed(value: Any) -> Any:
    """Make a list of the one path that stands alone."""
    if isinstance(value, str | PathLike):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(str(path) if isinstance(path, PathLike) else path for path in value)
    raise ValueError(f"data.videos={value!r} is neither a path nor a list of paths; {QUOTED_VIDEOS}")


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed)]
# An error lists all keys where they are no more than these.
MOST_LISTED = 30


class Section(BaseModel):
    """A part of a configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def span_steps(span: float, num_steps: int) -> int:
    """Return a span in steps: itself, or the share of so many steps that it is, rounded."""
    return round(span * num_steps) if 0 < span < 1 else int(span)


def checked(kind: type[S], values: Mapping[str, Any], noun: str) -> S:
    """A section with these values.

    Args:
        kind: of section.
        values: nested mappings of keys.
        noun: what an error calls one of its keys, such as "configuration key".

    Raises:
        ConfigError: a sentence for each value: its key, what it got, what is allowed, the nearest known key.
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
    # Between the keys pydantic names the members of unions.
    words = {word for key in keys_of(kind) for word in key.split(".")}
    key = ".".join(str(part) for part in detail["loc"] if str(part) in words)
    return f"{key}={detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def keys_of(kind: type[Section]) -> list[str]:
    """All dotted keys of a section and the sections in it."""
    found = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, Section):
            found += [f"{name}.{key}" for key in keys_of(inner)]
        else:
            found.append(name)
    return found


def unknown_key(key: str, kind: type[Section], noun: str) -> str:
    """The sentence about a key that there is not: with the nearest one, or those that there are."""
    known = keys_of(kind)
    tail = key.rsplit(".", 1)[-1]
    close = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    close += difflib.get_close_matches(key, [*known, *kind.model_fields], n=1, cutoff=0.5)
    if close:
        hint = f"Did you mean {close[0]}?"
    elif len(known) <= MOST_LISTED:
        hint = f"There are {', '.join(known)}."
    else:
        hint = "`dora-ray config` lists all keys."
    return f"unknown {noun} {key}. {hint}"
