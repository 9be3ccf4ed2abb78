"""Part d: real training on the clips file, of DoRA and its baselines, compared with random encoders.

Legend: M images, N scenes, D width.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dora_ray.bench.gpu.figures import Figures
from dora_ray.bench.gpu.kit import ArrayVideo, Kit, Sequence, load_kit, plan_of, read_steps
from dora_ray.bench.products import synchronize
from dora_ray.config import Config, load_config
from dora_ray.evaluation.contours import boundary_accuracy, region_similarity
from dora_ray.evaluation.features import final_cls, normalize
from dora_ray.evaluation.knn import knn_accuracies
from dora_ray.evaluation.matching import match_views
from dora_ray.evaluation.propagation import segment
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.step import TrainState, apply_step, initial_state, sum_slots

NO_RECORDS = torch.zeros(0, dtype=torch.int64)
BASE = (
    "model.width=192",
    "model.depth=12",
    "model.patch_size=8",
    "clip.num_frames=2",
    "clip.stride_seconds=0.5",
    "crops.clip_size=80",
    "crops.global_size=64",
    "crops.local_size=32",
    "head.num_outputs=1024",
    "optim.slots=2",
    "optim.clips_per_slot=32",
    # Half of the rate of `tiny`, whose network is a third as deep; at twice this rate, this teacher collapses.
    "optim.lr=5.0e-4",
    "optim.teacher_momentum=0.98",
)
REHEARSAL = ("model.width=48", "model.depth=2", "head.num_outputs=64", "optim.clips_per_slot=2", "crops.num_locals=2")
KINDS: dict[str, tuple[str, ...]] = {
    "dora": (),
    "dino": ("tracking.kind=none", "crops.num_globals=2"),
    "naive_tracking": ("tracking.num_iterations=0",),
    "random_masks": ("tracking.kind=random",),
}
# Steps that measure the speed; the first ones select kernels.
TRIAL_STEPS = 12
# A fifth of the run, as in `tiny`.
WARMUP_SHARE = 0.2
NUM_NEIGHBORS = 20
RANDOM_SEEDS = (0, 1, 2)
# Frames between a scene and its later view.
LATER = 3


def run(figures: Figures, *, clips: Path, seconds: float, rehearse: bool) -> None:
    """Train each kind for the same time, and evaluate all.

    Args:
        figures: destination of the figures.
        clips: the clips file.
        seconds: time of each training.
        rehearse: use a network small enough for a CPU.
    """
    kit = load_kit(clips)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_config("tiny", *BASE, *(REHEARSAL if rehearse else ()), "cluster.num_workers=0")
    prepare_torch(device, base.optim, deterministic=False)
    facts = {
        "videos": len(kit.videos),
        "frames": sum(len(video.times) for video in kit.videos),
        "train_images": len(kit.train.images),
        "test_images": len(kit.test.images),
        "chance_knn": float(np.bincount(kit.test.labels).max() / len(kit.test.labels)),
        "scenes": len(_scenes(kit)[0]),
    }
    figures.put("setting", facts | {"network": f"{base.model.width} wide, {base.model.depth} deep"})
    for seed in RANDOM_SEEDS:
        state = initial_state(load_config(base, f"run.seed={seed}"), device)
        figures.attempt(f"random_{seed}", functools.partial(evaluate, state.teacher.backbone, kit, device))
    for name, words in KINDS.items():
        config = load_config(base, *words)
        figures.attempt(name, functools.partial(_learn, config, kit, device, seconds))


def _learn(config: Config, kit: Kit, device: torch.device, seconds: float) -> dict[str, Any]:
    """Train as many steps as fit into the time, with schedules of that length, and evaluate the teacher."""
    trial = initial_state(_of_steps(config, TRIAL_STEPS), device)
    taken = [found for _, found in _train(trial, _of_steps(config, TRIAL_STEPS), kit)]
    each = statistics.median(taken[TRIAL_STEPS // 2 :])
    config = _of_steps(config, max(TRIAL_STEPS, int(max(1.0, seconds - sum(taken)) / each)))
    state, began = initial_state(config, device), time.perf_counter()
    measures: list[dict[str, float]] = []
    for number, (found, _) in enumerate(_train(state, config, kit)):
        if number % 20 == 0 or number + 1 == config.optim.steps:
            measures.append({name: float(value) for name, value in found.items()})
        if number + 1 >= TRIAL_STEPS and time.perf_counter() - began > 1.3 * seconds:
            break
    synchronize(device)
    spent = time.perf_counter() - began
    facts = {
        "steps": state.step,
        "planned_steps": config.optim.steps,
        "train_seconds": spent,
        "clips_per_second": state.step * config.optim.slots * config.optim.clips_per_slot / spent,
        "first": measures[0],
        "last": measures[-1],
    }
    return facts | evaluate(state.teacher.backbone, kit, device)


def _of_steps(config: Config, steps: int) -> Config:
    share = max(1, int(WARMUP_SHARE * steps))
    words = (f"optim.steps={steps}", f"optim.warmup_steps={share}", f"optim.freeze_last_layer_steps={share}")
    return load_config(config, *words)


def _train(state: TrainState, config: Config, kit: Kit) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Yield the measures and the seconds of each step."""
    device = state.center.device
    for batches in read_steps(plan_of(kit.trained_on(), config), config.optim.steps):
        began = time.perf_counter()
        measures, _ = apply_step(state, sum_slots(state, batches, NO_RECORDS, config, None), config)
        # Synchronize to time the trial's steps; a real training loop does not wait here.
        synchronize(device)
        yield measures, time.perf_counter() - began


@torch.inference_mode()
def evaluate(backbone: VisionTransformer, kit: Kit, device: torch.device) -> dict[str, float]:
    """Evaluate an encoder: kNN accuracy, scenes matched in a later frame, and J&F of propagated masks.

    Args:
        backbone: the encoder, on the device.
        kit: content of the clips file.
        device: device of the computation.
    """
    backbone.eval()
    size = int(backbone.patch_embed.img_size[0])
    train, test = (_features(backbone, part.images, size, device) for part in (kit.train, kit.test))
    labels = (torch.from_numpy(part.labels).to(device) for part in (kit.train, kit.test))
    k = min(NUM_NEIGHBORS, len(train))
    train_labels, test_labels = labels
    knn = knn_accuracies(train, train_labels, test, test_labels, neighbors=[k], temperature=0.07)[k]
    queries, gallery = (_features(backbone, frames, size, device) for frames in _scenes(kit))
    scores = [_propagated(backbone, sequence, device) for sequence in kit.sequences]
    j, f = (float(np.mean([score[i] for score in scores])) for i in (0, 1))
    return {
        "knn": knn,
        "matching": float(match_views(queries, gallery).mean()),
        "j": j,
        "f": f,
        "j_and_f": (j + f) / 2,
    }


def _scenes(kit: Kit) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, S, S, 3) twice, a later frame of each scene and the scene: center squares of held-out frames."""
    pairs = [
        (_square(video, later), _square(video, later - LATER))
        for video in kit.held_out()
        for later in range(LATER, len(video.times))
    ]
    side = min(len(picture) for pair in pairs for picture in pair)
    queries, gallery = ([picture[:side, :side] for picture in column] for column in zip(*pairs, strict=True))
    return np.stack(queries), np.stack(gallery)


def _square(video: ArrayVideo, row: int) -> np.ndarray:
    side = min(video.height, video.width)
    top, left = (video.height - side) // 2, (video.width - side) // 2
    return video.frames[row, top : top + side, left : left + side]


def _features(backbone: VisionTransformer, images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Return (M, D) CLS of square images, resized to 8 / 7 of the size and center-cropped, as the protocols require."""
    large, encode, found = round(size * 256 / 224), final_cls(backbone), []
    first = (large - size) // 2
    for some in np.array_split(images, max(1, -(-len(images) // 512))):
        pixels = torch.from_numpy(some).to(device).permute(0, 3, 1, 2).float()
        resized = F.interpolate(pixels, (large, large), mode="bicubic", antialias=True).clamp(0, 255)
        cut = resized[:, :, first : first + size, first : first + size]
        found.append(encode(normalize(cut.permute(0, 2, 3, 1))).float())
    return torch.cat(found)


def _propagated(backbone: VisionTransformer, sequence: Sequence, device: torch.device) -> tuple[float, float]:
    """Return J and F of a sequence with the first mask propagated, excluding the first and the last frame."""
    patch = int(backbone.patch_embed.patch_size[0])
    height, width = (side // patch * patch for side in sequence.frames.shape[1:3])

    def features() -> Iterator[Tensor]:
        for frame in sequence.frames:
            pixels = torch.from_numpy(frame[:height, :width]).to(device)
            tokens = backbone.forward_features(normalize(pixels[None]))[0, backbone.num_prefix_tokens :]
            yield F.normalize(torch.unflatten(tokens, 0, (height // patch, width // patch)).float(), dim=-1)

    masks = sequence.masks[:, :height, :width]
    found = segment(features(), masks[:1], num_frames=7, radius=12, num_neighbors=5, temperature=0.1)
    pairs = [(mask[0], truth) for mask, truth in zip(found, masks[1:], strict=True)][:-1]
    return (
        float(np.mean([region_similarity(*pair) for pair in pairs])),
        float(np.mean([boundary_accuracy(*pair) for pair in pairs])),
    )
