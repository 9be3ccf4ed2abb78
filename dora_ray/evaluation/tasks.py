"""Evaluation tasks: options, data, and display of results. Does not import torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from dora_ray.evaluation.options import (
    BesideOptions,
    CorlocOptions,
    KnnOptions,
    LinearOptions,
    ObjectsOptions,
    Options,
    OptionsType,
    ViewsOptions,
    VosOptions,
)

# Options handled by `evaluate`, not passed to the tasks' functions.
NOT_OF_THE_TASK = ("random_init", "seed", "random_encoders")


@dataclass(frozen=True)
class Task:
    """One evaluation protocol.

    Attributes:
        title: Short title for the user.
        options: Class of its options.
        function: Its function, as module.function below dora_ray.evaluation. It takes the encoder, the folder, every
            option except those in NOT_OF_THE_TASK, and `progress`, which is called with (done, total); it returns
            JSON-serializable results.
        data: Kind of data that it reads, such as "labeled images".
        unit: Unit of the progress, plural.
        protocol: One-line description of the protocol; names in braces are options or results.
        columns: Columns of the table: header -> key in the results; a mapping makes one column per entry.
        chance: Baseline rows of the table: name -> (header -> key in the results).
        parts: Table of the parts that the scores are averaged over: name of a part, key in the results, and the columns
            within each part.
    """

    title: str
    options: OptionsType
    function: str
    data: str
    unit: str
    protocol: str
    columns: dict[str, str]
    chance: dict[str, dict[str, str]] = field(default_factory=dict)
    parts: tuple[str, str, dict[str, str]] | None = None

    @property
    def beside(self) -> bool:
        """True if the task itself evaluates random encoders on the same clips."""
        return issubclass(self.options, BesideOptions)

    @property
    def run(self) -> Callable[..., dict[str, Any]]:
        """The task's function."""
        module, name = self.function.split(".")
        function: Callable[..., dict[str, Any]] = getattr(import_module(f"dora_ray.evaluation.{module}"), name)
        return function


TASKS: dict[str, Task] = {
    "knn": Task(
        title="nearest neighbors",
        options=KnnOptions,
        function="knn.evaluate_knn",
        data="labeled images",
        unit="images",
        protocol="{num_test} test images, {num_classes} classes; {num_train} training images vote with weight "
        "exp(cosine / {temperature:g}); class token after the final norm, center crop of {image_size} px",
        columns={"top-1": "top1", "k=": "top1_by_k"},
        chance={"most frequent class": {"top-1": "chance", "k=": "chance"}},
    ),
    "linear": Task(
        title="linear probe",
        options=LinearOptions,
        function="linear.evaluate_linear",
        data="labeled images",
        unit="images",
        protocol="{num_test} test images, {num_classes} classes; {epochs} epochs of SGD at lr {lr:g} x "
        "{probe_batch_size} / 256 on {num_train} training images; class tokens of the last {num_blocks} blocks, "
        "center crop of {image_size} px, no augmentation",
        columns={"top-1": "top1", "top-5": "top5", "top-1 in training": "train_top1"},
        chance={"most frequent class": {"top-1": "chance"}},
    ),
    "corloc": Task(
        title="object discovery",
        options=CorlocOptions,
        function="corloc.evaluate_corloc",
        data="VOC folder",
        unit="images",
        protocol="{num_images} images; one box per image by {method}, correct if its IoU with an object's box is "
        "at least 0.5",
        columns={"CorLoc": "corloc"},
        chance={"box around the image": {"CorLoc": "whole_image"}},
    ),
    "vos": Task(
        title="video object segmentation",
        options=VosOptions,
        function="vos.evaluate_vos",
        data="DAVIS folder",
        unit="frames",
        protocol="mean over {averaged}; frames of {short_side} px; labels of the first frame and the "
        "{num_frames} last ones, {num_neighbors} neighbors within {radius} patches, temperature {temperature:g}",
        columns={
            "J&F": "j_and_f",
            "J": "j_mean",
            "J recall": "j_recall",
            "J decay": "j_decay",
            "F": "f_mean",
            "F recall": "f_recall",
            "F decay": "f_decay",
        },
        chance={"first mask repeated": {"J&F": "still_j_and_f", "J": "still_j_mean", "F": "still_f_mean"}},
        parts=("sequence", "sequences", {"J": "j", "F": "f", "frames": "num_frames"}),
    ),
    "objects": Task(
        title="the method's own objects",
        options=ObjectsOptions,
        function="objects.evaluate_objects",
        data="labeled tour or DAVIS folder",
        unit="clips",
        protocol="{num_clips} clips of {num_frames} frames, {num_objects} masks each, drawn {num_draws} times; frames "
        "of {image_size} px, threshold {threshold}",
        columns={"object IoU": "object_iou", "tracking IoU": "tracking_iou"},
        chance={
            "random encoder": {"object IoU": "random_object_iou", "tracking IoU": "random_tracking_iou"},
            "masks at random patches": {
                "object IoU": "object_iou_random_masks",
                "tracking IoU": "tracking_iou_random_masks",
            },
            "masks shifted": {"object IoU": "object_iou_moved_masks", "tracking IoU": "tracking_iou_moved_masks"},
        },
    ),
    "views": Task(
        title="held-out view matching",
        options=ViewsOptions,
        function="views.evaluate_views",
        data="video",
        unit="scenes",
        protocol="{num_scenes} scenes; class token after the final norm, views of {image_size} px",
        columns={
            "both": "view_matching",
            "later frame": "view_matching_later",
            "local crop": "view_matching_local",
        },
        chance={
            "random encoder": {
                "both": "random_view_matching",
                "later frame": "random_view_matching_later",
                "local crop": "random_view_matching_local",
            },
            "chance": {"both": "chance", "later frame": "chance", "local crop": "chance"},
        },
    ),
}


def describe_options(only: str | None = None) -> str:
    """Return the options of one task or all tasks, with defaults and descriptions, for `dora-ray eval --help`."""
    general = set(Options.model_fields)
    parts = ["options of all tasks, as option=value:", *_option_lines(Options, set())]
    for name, task in TASKS.items() if only is None else [(only, TASKS[only])]:
        parts += ["", f"{name}: {task.title} (--data: {task.data})", *_option_lines(task.options, general)]
    return "\n".join(parts)


def _option_lines(options: OptionsType, left_out: set[str]) -> list[str]:
    lines = []
    for name, option in options.model_fields.items():
        if name not in left_out:
            default = "not set" if option.default is None else json.dumps(option.default)
            text = " ".join((option.description or "").split())
            lines += textwrap.wrap(f"{name} ({default}): {text}", 110, initial_indent="  ", subsequent_indent="      ")
    return lines
