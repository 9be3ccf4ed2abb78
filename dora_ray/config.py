"""Every setting of dora_ray, its unit, its origin and its default; those of the network are in `config_network`.

The defaults are the recipe `paper`: the method of arXiv 2310.08584, and where the paper gives no value, the released
code's. "Released" below means that code's value. A recipe or a user's YAML file holds only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dora_ray.config_network import HeadConfig, ModelConfig
from dora_ray.config_rules import broken_rules
from dora_ray.config_section import (
    Count,
    Fraction,
    Interval,
    Natural,
    Paths,
    Positive,
    Section,
    Span,
    checked,
    span_steps,
)
from dora_ray.config_source import load_values, with_override

Loggers = Annotated[
    tuple[Literal["wandb", "mlflow", "trackio"], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]


class DataConfig(Section):
    """Videos and the frame store."""

    videos: Paths = ()
    """One, or a list of: files, folders, globs, URIs, or package:NAME/PATH for a file inside an installed Python
    package."""
    store: str | None = None
    """Folder or URI of the frame store; not set: the folder `store` beside the run's folder."""
    cache: str | None = None
    """Folder on every node's own disk that the frame store is copied into, once, and read from; not set: frames are
    read where the store is. For stores in object stores; the copies are not removed."""
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Library that decodes at ingest; PyAV is exact on every file of the conformance suite."""
    frames_per_second: Positive = 6.0
    """Frames kept in the store for each second of video: also the number of places a second where a clip may start."""
    short_side: Count = 512
    """Short side of a stored frame, pixels: the smallest first crop then needs almost no upsampling."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 85
    """JPEG quality of a stored frame."""
    segment_seconds: Positive = 20.0
    """Length of a unit of ingest work, rounded up to a key frame: what a failed task repeats."""
    decode_seconds: Positive = 120.0
    """Time that reading one clip, or decoding ten seconds of video at ingest, may take before its process is ended and
    the work is given to another; after a second end the frames count as unreadable."""
    max_bad_fraction: Fraction = 0.01
    """Share of a video's frames that may be missing after its ingest, and of a run's clips that may be unreadable
    before it stops."""
    skip_unreadable: bool = False
    """Leave out videos that cannot be read, or lack more than max_bad_fraction, with a warning; not set: name them all
    in an error."""
    prefetch_slots: Count = 4
    """Slots decoded ahead of each training worker."""
    slots_per_task: Count = 1
    """Slots that one decode task reads and hands over together: raise it where a slot is read in milliseconds."""


class ClipConfig(Section):
    """The clip that one training sample is cut from."""

    num_frames: Annotated[int, Field(ge=2)] = 8
    """Frames T of a clip; 2 is the frame pair (paper: 8)."""
    stride_seconds: Positive = 1.0
    """Time between a clip's frames (paper: 1 s, 60 frames)."""
    avoid_cuts: bool = True
    """Start no clip that a shot cut runs through: an object cannot be tracked across one."""
    shuffle: Literal["global", "window"] = "global"
    """Order of an epoch. global: all starts shuffled together, once everything is ingested; window: within windows of
    segments, which are permuted themselves, so that training begins when the first window is stored, beside the
    ingest."""
    window_segments: Count = 32
    """With clip.shuffle=window: segments (data.segment_seconds) of a window. A smaller window begins sooner and mixes
    less."""


class CropsConfig(Section):
    """Views and their augmentation (released)."""

    clip_size: Count = 300
    """Side of the first random resized crop, shared by a clip's frames, pixels: what travels to the training worker."""
    clip_scale: Interval = (0.2, 1.0)
    """Area of the first crop, share of the frame."""
    global_size: Count = 224
    """Side of a global view, pixels."""
    global_scale: Interval = (0.4, 1.0)
    """Area of a global view, share of the first crop."""
    num_globals: Annotated[int, Field(ge=1, le=2)] | None = None
    """Global views a clip; not set: 1 with objects, 2 without (DINO compares two)."""
    num_locals: Natural = 6
    """Local views L a frame."""
    local_size: Count = 96
    """Side of a local view, pixels (DINO's; released: 112)."""
    local_scale: Interval = (0.05, 0.4)
    """Area of a local view, share of the first crop."""
    local_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Kernel of the resize to a local view, antialiased (released: bicubic). Other crops are bilinear."""
    aspect_ratio: Interval = (0.75, 4 / 3)
    """Width / height of a crop before it is resized to a square."""
    flip_probability: Fraction = 0.5
    """Horizontal flip of a global view, shared by the clip's frames."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter, drawn for each frame."""
    jitter_probability: Fraction = 0.8
    """Share of frames with color jitter."""
    gray_probability: Fraction = 0.2
    """Share of frames turned gray."""
    global_blur_probability: Fraction = 0.1
    """Share of global frames blurred."""
    local_blur_probability: Fraction = 0.5
    """Share of local frames blurred."""
    blur_sigma: Interval = (0.1, 2.0)
    """Standard deviation of the blur, pixels of the view."""


class TrackingConfig(Section):
    """Objects: discovered by attention heads, made distinct by Sinkhorn-Knopp, tracked by cross-attention."""

    kind: Literal["dora", "none", "random"] = "dora"
    """dora: tracked objects; none: DINO on the same clips; random: masks of the same area at random places."""
    num_objects: Count = 3
    """Objects k: distinct heads drawn for a clip."""
    block: Annotated[int, Field(le=-1)] = -2
    """Teacher block whose projections give Q and K, counted from the end (paper: second-last; released: last)."""
    normalize_patches: bool = True
    """L2-normalize the patch tokens Z in the cost (released)."""
    num_iterations: Natural = 30
    """Sinkhorn-Knopp iterations (released); 0: naive cross-attention, the prototypes stay as discovered."""
    epsilon: Positive = 0.05
    """Entropic regularization of Sinkhorn-Knopp (released)."""
    threshold: Literal["clip", "batch", "soft"] = "clip"
    """Mask rule: above the mean of its own frame; the released rule over the slot; or soft."""
    heads_per: Literal["clip", "slot"] = "clip"
    """Heads are drawn for each clip, or once for a slot (released)."""
    views: Literal["masked", "packed"] = "masked"
    """Object views: whole frames that are 0 outside the object, or (ours, less work) its patches alone."""
    every_steps: Count = 1
    """Objects are looked for in every n-th step, their loss times n; the other steps have local views alone (ours)."""


class LossConfig(Section):
    """Distillation from teacher to student."""

    student_temperature: Positive = 0.1
    """Temperature of the student's softmax (released)."""
    teacher_temperature: Positive = 0.04
    """Temperature of the teacher's softmax (released)."""
    center_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of the teacher's output center (released)."""
    reduction: Literal["mean", "released"] = "mean"
    """Mean over objects and local views, or the released code's running sum."""


class OptimConfig(Section):
    """The optimizer, its schedules (functions of the step) and the slots of a global batch."""

    steps: Count = 309_000
    """Optimizer updates of the whole run (released: 100 epochs of a 1h50 video in batches of 128)."""
    slots: Count = 8
    """Slots S of a global batch: an upper bound of the number of workers, and part of what the run is."""
    clips_per_slot: Count = 16
    """Clips M of a slot (released: 16 a GPU, 128 a batch)."""
    lr: Positive = 2.5e-4
    """Learning rate after warm-up, as used (released: 5e-4 x clips / 256)."""
    final_lr: Annotated[float, Field(ge=0.0)] = 1e-5
    """Learning rate at the last step (released)."""
    warmup_steps: Span = 0.1
    """Linear warm-up: steps, or below 1 a share of optim.steps (released: 10 of 100 epochs)."""
    freeze_last_layer_steps: Span = 0.01
    """Steps, or below 1 the share of optim.steps, during which the head's last layer is not updated (released: 1 of 100
    epochs)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.04
    """AdamW weight decay at the start, of every tensor of two or more dimensions (released)."""
    final_weight_decay: Annotated[float, Field(ge=0.0)] = 0.4
    """Weight decay at the last step, reached by half a cosine (released)."""
    teacher_momentum: Fraction = 0.996
    """Momentum of the teacher's moving average at the start (released)."""
    final_teacher_momentum: Fraction = 1.0
    """Teacher momentum at the last step, reached by half a cosine (released)."""
    gradient_clip: Positive | None = 3.0
    """Largest norm of each parameter's gradient (released: per parameter, not global); null: no clipping."""
    reduction: Literal["exact", "float32"] = "exact"
    """Sum of slot gradients: in fixed point, bit-identical for any number of workers, or in float32."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Autocast type of the forward on a GPU; a CPU always computes in float32."""
    teacher_precision: Literal["same", "bf16", "fp8"] = "same"
    """Precision of the teacher's networks, on any device: as the student's, bf16, or bf16 with the linear
    layers of its blocks in fp8 (GPUs since Ada and Hopper; a CPU is slower with it)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the student's blocks, compute the rest again in the backward: less memory, more time."""
    compile: bool = False
    """Compile what a block does to single tokens with torch.compile: a minute on each new node, then from its cache.
    It pays on a GPU (`dora-ray bench step` prints compiled_speedup), not on a CPU."""

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return span_steps(self.warmup_steps, self.steps)

    @property
    def num_frozen_steps(self) -> int:
        """Steps during which the head's last layer is not updated."""
        return span_steps(self.freeze_last_layer_steps, self.steps)


class ClusterConfig(Section):
    """Where the run may execute. Nothing here changes what is learnt."""

    num_workers: Natural | tuple[Natural, Count] = 1
    """Training workers: a number, 0 (in this very process), or [fewest, most] for an elastic run."""
    use_gpu: bool | None = None
    """One GPU for each worker; not set: where the machine or the cluster has, or can grow to, enough of them."""
    cpus_per_worker: Positive = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Count = 1
    """Threads of a worker on the CPU. They change the last bits of sums, workers do not: prefer workers."""
    decode_cpus: Positive = 0.5
    """CPUs that Ray reserves for one decode task."""
    decode_label: str | None = None
    """Value of the node label `role` that decode tasks are pinned to, such as "decode"; not set: any node."""
    max_failures: Annotated[int, Field(ge=-1)] = 8
    """Worker failures that the run survives, -1 for any number; drained nodes are never counted."""
    stall_seconds: Positive = 900.0
    """Time after which workers whose step does not end are ended and started again, be it that one of them hangs and
    the others wait; more than an evaluation takes, and than 4 x data.decode_seconds, which a step may have to wait for
    clips whose reading hangs."""
    fast_recovery: bool = True
    """Look for failures twice a second, count a changed cluster at once, and keep a spare process for each worker of an
    elastic run (its memory: that of a worker before its first step). False: Ray Train's own pace."""
    resize_seconds: Positive = 10.0
    """Least time between two looks at whether an elastic run can have more workers."""


class RunConfig(Section):
    """Bookkeeping."""

    seed: Natural = 0
    """Seed of everything random."""
    checkpoint_seconds: Positive = 60.0
    """Time between checkpoints. A killed worker costs at most that, what writing one takes, and a step."""
    log_every_steps: Count = 10
    """Steps between lines of metrics.jsonl; a line holds the means since the last one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    loggers: Loggers = ()
    """Services that get the metrics and events beside the run's own files: wandb, mlflow, trackio (one, or a list)."""
    pictures: Natural = 3
    """Pictures of objects that a run draws, at evenly spaced steps from the first to the last, for its folder
    `pictures`, TensorBoard and run.loggers; 1: after the last step alone, 0: none."""
    deterministic: bool = True
    """Ask torch for deterministic kernels, without which a GPU's results differ from run to run."""


class EvaluationConfig(Section):
    """Measures of a run's teacher, at its end and in between, on data that it is not trained for."""

    images: str | None = None
    """Labeled folder with train/CLASS/* and test/CLASS/*, for kNN."""
    tour: str | None = None
    """Labeled tour (`data synth tour`), or DAVIS 2017's folder: IoU of the run's own object masks, for object_iou and
    tracking_iou, and label propagation from each sequence's first mask, for j_and_f."""
    video: str | None = None
    """Video, labeled tour or folder of frames that was not trained on: scenes known again, for view_matching and
    rankme."""
    every_steps: Natural = 0
    """Steps between evaluations, on top of the last step; 0: at the last step alone."""
    max_images: Count = 2000
    """Images of each half of `images` that are used while training."""
    max_clips: Annotated[int, Field(ge=4)] = 64
    """Clips of `tour`, and scenes of `video`, that are used while training, evenly spaced."""
    tour_frames: Annotated[int, Field(ge=2)] = 4
    """Frames of a clip of `tour`: objects are discovered in the first and tracked through the others."""
    tour_short_side: Count | None = None
    """Short side of the tour's frames that the encoder sees whole, pixels; not set: crops.global_size."""


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clip: ClipConfig = ClipConfig()
    crops: CropsConfig = CropsConfig()
    tracking: TrackingConfig = TrackingConfig()
    loss: LossConfig = LossConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def num_globals(self) -> int:
        """Global views a clip: as set, or what the kind of tracking needs."""
        return self.crops.num_globals or (2 if self.tracking.kind == "none" else 1)

    @property
    def max_workers(self) -> int:
        """The most training workers the run may have; 1 in local mode."""
        workers = self.cluster.num_workers
        return max(1, workers if isinstance(workers, int) else workers[1])

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if problems := broken_rules(self):
            raise ValueError("; ".join(problems))
        return self


def load_config(
    source: str | Path | Mapping[str, Any] | Config = "tiny", *overrides: str | Mapping[str, Any]
) -> Config:
    """A checked configuration.

    Args:
        source: a recipe's name, the path of a YAML file, a mapping, or a Config. A file or mapping may name a recipe or
            another file that it starts from with the key `base`.
        overrides: "section.key=value", the value as YAML; or mappings such as {"optim": {"steps": 300}}.

    Raises:
        ConfigError: with the key, what is allowed, and the nearest known key.
    """
    values = source.model_dump(mode="json") if isinstance(source, Config) else load_values(source)
    for override in overrides:
        values = with_override(values, override)
    return checked(Config, values, "configuration key")
