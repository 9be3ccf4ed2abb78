"""Self-supervised learning of image encoders from long videos with DoRA, on Ray.

Public names are imported on first use, so that `import dora_ray` imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_ray.config import Config, load_config
    from dora_ray.evaluation import evaluate
    from dora_ray.evaluation.embedding import embed
    from dora_ray.training.launch import Run, train
    from dora_ray.tuning.sweep import Sweep, sweep
    from dora_ray.weights import export, load_backbone

__version__ = "0.1.0"

_HOMES = {
    "Config": "dora_ray.config",
    "load_config": "dora_ray.config",
    "Run": "dora_ray.training.launch",
    "train": "dora_ray.training.launch",
    "Sweep": "dora_ray.tuning.sweep",
    "sweep": "dora_ray.tuning.sweep",
    "embed": "dora_ray.evaluation.embedding",
    "evaluate": "dora_ray.evaluation",
    "export": "dora_ray.weights",
    "load_backbone": "dora_ray.weights",
}

__all__ = [
    "Config",
    "Run",
    "Sweep",
    "__version__",
    "embed",
    "evaluate",
    "export",
    "load_backbone",
    "load_config",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_ray' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
