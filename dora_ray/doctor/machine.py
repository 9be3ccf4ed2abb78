"""Checks of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from dora_ray.cluster.nodes import unreadable
from dora_ray.cluster.starting import AUTH_MODE, token_source
from dora_ray.doctor.finding import Finding
from dora_ray.ray_folder import long_folder, ray_folder

GIB = 2**30
NEEDED_MEMORY = 4 * GIB
NEEDED_DISK = 5 * GIB
NEEDED_SHARED_MEMORY = 1 * GIB
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "pylance",
    "pyarrow",
    "av",
    "simplejpeg",
    "safetensors",
    "pydantic",
    "tensorboardX",
)
OPTIONAL = {
    "decord": "the decoder decord",
    "torchcodec": "the decoder torchcodec",
    "s3fs": "s3:// paths",
    "scikit-video": "make demo",
}


def examine(paths: Sequence[str] = ()) -> list[Finding]:
    """Run all checks. They write nothing but a temporary file in the working folder, and start no process.

    Args:
        paths: files, folders or URIs that this machine must be able to read.
    """
    checks: tuple[Callable[[], Finding], ...] = (
        _python, _packages, _optional, _processors, _memory, _gpus, _decoders, _ray, _token, _ray_folder,
        _shared_memory, _disk, _run_folder,
    )  # fmt: skip
    return [*(check() for check in checks), *([_storage(paths)] if paths else [])]


def _storage(paths: Sequence[str]) -> Finding:
    bad = unreadable(paths)
    return Finding(
        "storage",
        not bad,
        "; ".join(f"{path}: {reason}" for path, reason in bad.items()) or "readable here; --address asks every node",
        "correct the path; for s3:// and gs://, this machine needs credentials that may read it",
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", sys.version_info >= (3, 11), text, "use Python 3.11 or newer")


def _packages() -> Finding:
    found = {name: _installed(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if number is None]
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    text += f"; missing: {', '.join(missing)}" if missing else ""
    return Finding("packages", not missing, text, f"pip install {' '.join(missing)}, or make setup")


def _optional() -> Finding:
    lacking = [f"{name} (for {use})" for name, use in OPTIONAL.items() if _installed(name) is None]
    return Finding("extras", None, f"not installed: {', '.join(lacking)}" if lacking else "all installed")


def _processors() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("processors", None, f"{usable} usable of {os.cpu_count()}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container_limit()
    usable = min(total, limit) if limit else total
    text = f"{usable / GIB:.1f} GiB" + (
        f" (limit of the container; the machine has {total / GIB:.1f})" if usable < total else ""
    )
    return Finding(
        "memory", usable >= NEEDED_MEMORY, text, f"the recipe tiny needs about {NEEDED_MEMORY / GIB:.0f} GiB"
    )


def _container_limit() -> int | None:
    """Return the control group's memory limit in bytes; None without one."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _gpus() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPUs", False, f"torch cannot be imported: {error}", "make setup")
    if not torch.cuda.is_available():
        return Finding("GPUs", None, "none; training runs on the CPU (cluster.use_gpu=false)")
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPUs", True, ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names))


def _decoders() -> Finding:
    try:
        import av
    except ImportError as error:
        return Finding("decoders", False, f"PyAV cannot be imported: {error}", "pip install av")
    wanted = ("h264", "hevc", "vp9", "av1")
    lacking = [name for name in wanted if name not in av.codecs_available]
    ffmpeg = ", ".join(
        f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libavformat")
    )
    others = [name for name in ("decord", "torchcodec") if _installed(name)]
    text = f"PyAV {av.__version__} with {ffmpeg}; also {', '.join(others) or 'none'}" + (
        f"; cannot decode {', '.join(lacking)}" if lacking else ""
    )
    return Finding(
        "decoders",
        not lacking,
        text,
        "install PyAV from its wheel: pip install --force-reinstall --only-binary :all: av",
    )


def _ray() -> Finding:
    number, address = _installed("ray"), os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS={address}" if address else "no RAY_ADDRESS: a command starts its own Ray on this machine"
    good = number is not None and number.startswith("2.60.")
    return Finding(
        "Ray",
        good,
        f"{number or 'missing'}; {where}",
        "this version relies on Ray 2.60: pip install 'ray[data,default,train,tune]==2.60.*'",
    )


def _ray_folder() -> Finding:
    sentence = long_folder()
    remedy = "a batch system's folder is often too long for sockets: export RAY_TMPDIR=/tmp"
    return Finding("Ray's folder", sentence is None, sentence or f"{ray_folder()} (RAY_TMPDIR or TMPDIR)", remedy)


def _token() -> Finding:
    """Check authentication: without a token, anyone who reaches Ray's ports can run code."""
    if os.environ.get(AUTH_MODE, "token").lower() != "token":
        text = f"{AUTH_MODE}={os.environ[AUTH_MODE]}: whoever reaches Ray's ports may run code here"
        return Finding("token", False, text, f"unset {AUTH_MODE}, or set it to token")
    source = token_source()
    if source is None:
        return Finding("token", None, "none yet; a Ray that is started here makes one in ~/.ray/auth_token")
    if os.path.isfile(source) and stat.S_IMODE(os.stat(source).st_mode) & 0o077:
        # Ray writes it like this, below a home folder that others may be able to enter.
        return Finding("token", None, f"{source}, which other users of this machine may read: chmod 600 {source}")
    return Finding("token", True, source)


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("shared memory", None, "this system has no /dev/shm: Ray keeps its objects in its folder")
    size = shutil.disk_usage("/dev/shm").total
    return Finding(
        "shared memory",
        size >= NEEDED_SHARED_MEMORY,
        f"/dev/shm has {size / GIB:.1f} GiB",
        f"Ray's objects need {NEEDED_SHARED_MEMORY / GIB:.0f} GiB and would go to disk: docker run --shm-size=8g, or "
        "mount -o remount,size=8G /dev/shm",
    )


def _disk() -> Finding:
    free = {folder: shutil.disk_usage(folder).free for folder in (os.getcwd(), tempfile.gettempdir())}
    text = ", ".join(f"{size / GIB:.1f} GiB free at {folder}" for folder, size in free.items())
    return Finding(
        "disk",
        min(free.values()) >= NEEDED_DISK,
        text,
        f"keep {NEEDED_DISK / GIB:.0f} GiB free for the store, checkpoints and Ray's files",
    )


def _run_folder() -> Finding:
    folder = "runs" if os.path.isdir("runs") else "."
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("run folder", True, f"{os.path.abspath(folder)} can be written")
    except OSError as error:
        remedy = "give a folder that you may write: --out DIR"
        return Finding("run folder", False, f"{os.path.abspath(folder)} cannot be written: {error.strerror}", remedy)
