"""Initial weights from another model (`model.init`) instead of random ones.

Student and teacher both start from the source's teacher, with its projection head if it has one that fits. The
optimizer, the center and the schedules start afresh. Once a run has a checkpoint, the source is never read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS, newest_meta, resolve_checkpoint
from dora_ray.config import Config
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.method.dora import Network, build_network
from dora_ray.timm_folder import sizes
from dora_ray.training.step import TrainState
from dora_ray.weights import differences, load_backbone, load_head, network_arguments


@dataclass(frozen=True)
class GivenWeights:
    """Weights that fit a configuration's networks.

    Attributes:
        backbone: the encoder's tensors.
        head: the projection head's tensors; empty if the head starts from random weights.
        words: one sentence for the user: what was loaded and what was not.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    words: str


def with_resolved_init(config: Config, run: str, *, resume: bool, overwrite: bool) -> tuple[Config, str | None]:
    """Check `model.init` before anything starts, and resolve it to one checkpoint.

    Args:
        config: the run's.
        run: the run's folder.
        resume: continue the run in the folder.
        overwrite: replace the run in the folder.

    Returns:
        The configuration, and a sentence about the weights; None if they are not needed.

    Raises:
        CheckpointError: the weights cannot be loaded, or have another architecture.
        ConfigError: overwriting the run would delete the weights.
    """
    if config.model.init is None or (resume and newest_meta(files.join(run, CHECKPOINTS)) is not None):
        return config, None
    source = resolve_checkpoint(config.model.init)
    if overwrite and source.startswith(run.rstrip("/") + "/"):
        raise ConfigError(f"model.init={source} is inside {run}, which would be overwritten: give another --out.")
    model = config.model.model_copy(update={"init": source})
    resolved = config.model_copy(update={"model": model})
    network = build_network(**network_arguments(config.model_dump(mode="json")))
    return resolved, read_given(resolved, network).words


def begin_with_given(state: TrainState, config: Config) -> str | None:
    """Load the weights of `model.init` into a new state; return a sentence about them, None if `model.init` is unset.

    Raises:
        CheckpointError: as `with_resolved_init`.
    """
    if config.model.init is None:
        return None
    given = read_given(config, state.student)
    for network in (state.student, state.teacher):
        network.backbone.load_state_dict(given.backbone)
        if given.head:
            network.head.load_state_dict(given.head)
    return given.words


def read_given(config: Config, network: Network) -> GivenWeights:
    """Read the weights of `model.init` and fit them to a network.

    A position embedding for another patch grid is resampled as timm does it: bicubic, antialiased.

    Raises:
        CheckpointError: as `with_resolved_init`.
    """
    source = config.model.init
    assert source is not None
    vit = load_backbone(source)
    theirs, ours = sizes(vit), sizes(network.backbone)
    other = [f"{name} {theirs[name]} (configured: {ours[name]})" for name in ours if theirs[name] != ours[name]]
    if other:
        raise CheckpointError(
            f"model.init={source} does not match the configured encoder: {', '.join(other)}. Set model.name and its "
            "sizes to those of the weights, or choose other weights."
        )
    backbone, wanted = vit.state_dict(), network.backbone.state_dict()
    words = f"Training starts from the weights of {source}"
    old, new = vit.patch_embed.grid_size, network.backbone.patch_embed.grid_size
    if old != new:
        backbone["pos_embed"] = _resampled(backbone["pos_embed"], old, new)
        words += f"; position embedding resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
    if wrong := differences(wanted, backbone):
        raise CheckpointError(f"model.init={source} does not fit the configured encoder: {wrong}.")
    head = load_head(source)
    if not head:
        return GivenWeights(backbone, {}, f"{words}; the head is initialized randomly: the source has none.")
    if wrong := differences(network.head.state_dict(), head):
        return GivenWeights(backbone, {}, f"{words}; the head is initialized randomly: theirs does not fit: {wrong}.")
    return GivenWeights(backbone, head, f"{words}, head included.")


@torch.no_grad()
def _resampled(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    from timm.layers.pos_embed import resample_abs_pos_embed

    resampled: Tensor = resample_abs_pos_embed(pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=1)
    return resampled
