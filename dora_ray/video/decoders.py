"""Decoders by name, behind one protocol: downscaled frames by presentation time, as JPEG's full-range planes.

A decoder known to return wrong frames of a file refuses it and says why: a missing frame is recorded, but a wrong one
would go unnoticed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from dora_ray.errors import ConfigError
from dora_ray.video.frames import DecodedFrame, Decoder, scaled_size
from dora_ray.video.other_decoders import DecordDecoder, TorchCodecDecoder, first_line
from dora_ray.video.pyav_decoder import PyAVDecoder

__all__ = ["NAMES", "DecodedFrame", "Decoder", "PyAVDecoder", "get_decoder", "scaled_size"]

NAMES = ("pyav", "decord", "torchcodec")


def get_decoder(name: str) -> Decoder:
    """Return the decoder of this name.

    Raises:
        ConfigError: the name is unknown, or the library is not installed.
    """
    if name == "pyav":
        return PyAVDecoder()
    if name == "decord":
        _refuse_decord2()
        return DecordDecoder(_library("decord", "it has wheels for x86-64 Linux and Windows only: pip install decord"))
    if name == "torchcodec":
        hint = "pip install 'dora-ray[torchcodec]' and have FFmpeg's shared libraries on the system"
        return TorchCodecDecoder(_library("torchcodec.decoders", hint))
    raise ConfigError(f"data.decoder: {name!r} is unknown; choose one of {', '.join(NAMES)}")


def _refuse_decord2() -> None:
    """Refuse decord2: it installs a module named decord, and returned wrong frames with only a line on stderr."""
    try:
        found = importlib.metadata.version("decord2")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"data.decoder: decord2 {found} is installed in place of decord, and returns wrong frames of some files; pip"
        " uninstall decord2 and pip install --force-reinstall decord, or use data.decoder=pyav"
    )


def _library(name: str, hint: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        package = name.partition(".")[0]
        reason = first_line(error)
        raise ConfigError(
            f"data.decoder: {package} cannot be used here ({reason}); {hint}, or use data.decoder=pyav"
        ) from error
