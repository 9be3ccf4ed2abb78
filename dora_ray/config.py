"""All settings of dora_ray with unit, origin and default; `config_network` has those of the network.

The defaults are the recipe `paper`: the method of arXiv 2310.08584 and, for values that the paper does not give, those
of the released code. "Released" below means that code's value. Recipes and YAML files hold only the differences.
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
    """One or a list of: files, folders, globs, URIs, or package:NAME/PATH for a file in an installed Python package."""
    store: str | None = None
    """Folder or URI of the frame store; default: the folder `store` beside the run's folder."""
    cache: str | None = None
    """Folder on each node's local disk to copy the frame store to, once, and to read it from; default: read the store
    directly. Useful for stores in object stores; the copies are not removed."""
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Decoder library of the ingest; PyAV is exact on every file of the conformance suite."""
    frames_per_second: Positive = 6.0
    """Frames per second of video to keep in the store; a clip may start at each of them."""
    short_side: Count = 512
    """Short side of a stored frame, pixels; large enough that the smallest first crop needs almost no upsampling."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 85
    """JPEG quality of a stored frame."""
    segment_seconds: Positive = 20.0
    """Length of an ingest task, rounded up to a key frame; a failed task repeats this much."""
    decode_seconds: Positive = 120.0
    """Time limit for reading one clip, or decoding ten seconds of video at ingest. After it the process is killed and
    the work retried in another one; after a second timeout the frames count as unreadable."""
    max_bad_fraction: Fraction = 0.01
    """Largest share of a video's frames that may be missing after ingest, and of a run's clips that may be unreadable
    before the run stops."""
    skip_unreadable: bool = False
    """Skip videos that cannot be read or lack more than max_bad_fraction, with a warning, instead of raising an error
    that names them all."""
    prefetch_slots: Count = 4
    """Slots prefetched for each training worker."""
    slots_per_task: Count = 1
    """Slots per read task; raise it if reading a slot takes only milliseconds."""


class ClipConfig(Section):
    """The clip of one training sample."""

    num_frames: Annotated[int, Field(ge=2)] = 8
    """Frames T of a clip; 2 is the frame pair (paper: 8)."""
    stride_seconds: Positive = 1.0
    """Time between a clip's frames (paper: 1 s, 60 frames)."""
    avoid_cuts: bool = True
    """Avoid clips that contain a shot cut, across which objects cannot be tracked."""
    shuffle: Literal["global", "window"] = "global"
    """Order of an epoch. global: all starts shuffled together, after the complete ingest. window: segments are
    permuted, and starts shuffled within windows of segments; training starts when the first window is stored, while
    the ingest continues."""
    window_segments: Count = 32
    """With clip.shuffle=window: segments (of data.segment_seconds) per window. A smaller window starts sooner and mixes
    less."""


class CropsConfig(Section):
    """Views and their augmentation (released)."""

    clip_size: Count = 300
    """Side of the first random resized crop, shared by a clip's frames and sent to the training worker, pixels."""
    clip_scale: Interval = (0.2, 1.0)
    """Area of the first crop, share of the frame."""
    global_size: Count = 224
    """Side of a global view, pixels."""
    global_scale: Interval = (0.4, 1.0)
    """Area of a global view, share of the first crop."""
    num_globals: Annotated[int, Field(ge=1, le=2)] | None = None
    """Global views per clip; default: 1 with objects, 2 without (DINO compares two)."""
    num_locals: Natural = 6
    """Local views L per frame."""
    local_size: Count = 96
    """Side of a local view, pixels (DINO's; released: 112)."""
    local_scale: Interval = (0.05, 0.4)
    """Area of a local view, share of the first crop."""
    local_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Kernel of the resize to a local view, antialiased (released: bicubic). Other crops are bilinear."""
    aspect_ratio: Interval = (0.75, 4 / 3)
    """Width / height of a crop before it is resized to a square."""
    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip of a global view, shared by the clip's frames."""
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
    """Mask rule. clip: above the mean of its own frame; batch: the released rule over the slot; or soft."""
    heads_per: Literal["clip", "slot"] = "clip"
    """Draw heads for each clip, or once per slot (released)."""
    views: Literal["masked", "packed"] = "masked"
    """Object views. masked: whole frames, 0 outside the object; packed: its patches only (ours, less compute)."""
    every_steps: Count = 1
    """Use objects in every n-th step only, with n times their loss; the other steps use local views alone (ours)."""


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
    """Slots S of a global batch: an upper bound on the number of workers, and part of the run's definition."""
    clips_per_slot: Count = 16
    """Clips M per slot (released: 16 per GPU, 128 per batch)."""
    lr: Positive = 2.5e-4
    """Learning rate after warm-up, not scaled further (released: 5e-4 x clips / 256)."""
    final_lr: Annotated[float, Field(ge=0.0)] = 1e-5
    """Learning rate at the last step (released)."""
    warmup_steps: Span = 0.1
    """Linear warm-up in steps, or as a share of optim.steps if below 1 (released: 10 of 100 epochs)."""
    freeze_last_layer_steps: Span = 0.01
    """Steps without updates of the head's last layer, or a share of optim.steps if below 1 (released: 1 of 100
    epochs)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.04
    """AdamW weight decay at the start, for every tensor of two or more dimensions (released)."""
    final_weight_decay: Annotated[float, Field(ge=0.0)] = 0.4
    """Weight decay at the last step, on a cosine schedule (released)."""
    teacher_momentum: Fraction = 0.996
    """Momentum of the teacher's moving average at the start (released)."""
    final_teacher_momentum: Fraction = 1.0
    """Teacher momentum at the last step, on a cosine schedule (released)."""
    gradient_clip: Positive | None = 3.0
    """Largest norm of each parameter's gradient (released: per parameter, not global); null: no clipping."""
    reduction: Literal["exact", "float32"] = "exact"
    """Sum of slot gradients. exact: fixed point, bit-identical for any number of workers; or float32."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Autocast type of the forward on a GPU; a CPU always computes in float32."""
    teacher_precision: Literal["same", "bf16", "fp8"] = "same"
    """Precision of the teacher on any device: same as the student, bf16, or bf16 with fp8 in the linear layers of its
    blocks (GPUs since Ada and Hopper; slower on a CPU)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the student's blocks and recompute the rest in the backward: less memory, more time."""
    compile: bool = False
    """Compile the per-token parts of a block with torch.compile: a minute on each new node, then cached. Faster on a
    GPU together with cuda_graph (`dora-ray bench step` prints compiled_speedup), not on a CPU."""
    cuda_graph: bool = True
    """Repeat a slot's kernels on a GPU as a CUDA graph, with equal bits and less time between small kernels. Without
    effect on packed views and with activation checkpointing. Evaluation during the run needs memory of its own."""

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return span_steps(self.warmup_steps, self.steps)

    @property
    def num_frozen_steps(self) -> int:
        """Steps during which the head's last layer is not updated."""
        return span_steps(self.freeze_last_layer_steps, self.steps)


class ClusterConfig(Section):
    """Resources of the run. Nothing here changes the result of the training."""

    num_workers: Natural | tuple[Natural, Count] = 1
    """Training workers: a number, 0 (train in this process), or [fewest, most] for an elastic run."""
    use_gpu: bool | None = None
    """Use one GPU per worker; default: if the machine or cluster has enough GPUs, or can grow to have them."""
    cpus_per_worker: Positive = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Count = 1
    """CPU threads per worker. Threads change the last bits of sums, workers do not: prefer more workers."""
    decode_cpus: Positive = 0.5
    """CPUs that Ray reserves for one decode task."""
    decode_label: str | None = None
    """Value of the node label `role` that decode tasks are pinned to, such as "decode"; default: any node."""
    max_failures: Annotated[int, Field(ge=-1)] = 8
    """Worker failures that the run survives, -1 for any number; drained nodes do not count."""
    stall_seconds: Positive = 900.0
    """Restart the workers if one step takes longer than this. Must exceed the time of one evaluation, and 4 x
    data.decode_seconds, the longest wait for clips whose reading hangs."""
    fast_recovery: bool = True
    """Check for failures twice a second, react to cluster changes at once, and keep a spare process per worker of an
    elastic run (with the memory of a worker before its first step). False: Ray Train's default pace."""
    resize_seconds: Positive = 10.0
    """Minimum time between two checks for more workers in an elastic run."""


class RunConfig(Section):
    """Bookkeeping."""

    seed: Natural = 0
    """Seed of all random numbers."""
    checkpoint_seconds: Positive = 60.0
    """Time between checkpoints. A killed worker costs at most this, the time to write a checkpoint, and one step."""
    log_every_steps: Count = 10
    """Steps between lines of metrics.jsonl; a line holds the means since the last one."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    loggers: Loggers = ()
    """Services that also receive metrics and events: wandb, mlflow, trackio (one, or a list)."""
    pictures: Natural = 3
    """Number of pictures of objects to draw, at evenly spaced steps from first to last, for the run's folder
    `pictures`, TensorBoard and run.loggers; 1: after the last step only, 0: none."""
    deterministic: bool = True
    """Use deterministic kernels in torch; without them a GPU's results differ from run to run."""


class EvaluationConfig(Section):
    """Evaluations of a run's teacher, during training and at its end, on data that it was not trained on."""

    images: str | None = None
    """Labeled folder with train/CLASS/* and test/CLASS/*, for kNN."""
    tour: str | None = None
    """Labeled tour (`data synth tour`) or DAVIS 2017 folder, for the IoU of the run's own object masks (object_iou,
    tracking_iou) and label propagation from each sequence's first mask (j_and_f)."""
    video: str | None = None
    """Held-out video, labeled tour or folder of frames, for view_matching and rankme."""
    every_steps: Natural = 0
    """Steps between evaluations, in addition to the last step; 0: only at the last step."""
    max_images: Count = 2000
    """Images of each split of `images` to use during training."""
    max_clips: Annotated[int, Field(ge=4)] = 64
    """Clips of `tour`, and scenes of `video`, to use during training, evenly spaced."""
    tour_frames: Annotated[int, Field(ge=2)] = 4
    """Frames per clip of `tour`: objects are discovered in the first and tracked through the others."""
    tour_short_side: Count | None = None
    """Short side of the tour's frames, which are not cropped, pixels; default: crops.global_size."""


class Config(Section):
    """Complete configuration of a run."""

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
        """Global views per clip: as set, or as needed by the kind of tracking."""
        return self.crops.num_globals or (2 if self.tracking.kind == "none" else 1)

    @property
    def max_workers(self) -> int:
        """Largest number of training workers; 1 in local mode."""
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
    """Load and check a configuration.

    Args:
        source: name of a recipe, path of a YAML file, mapping, or Config. The key `base` in a file or mapping names the
            recipe or file that it extends.
        overrides: "section.key=value" with the value as YAML, or mappings such as {"optim": {"steps": 300}}.

    Raises:
        ConfigError: a key or value is invalid; the message has the key, what is allowed, and the nearest known key.
    """
    values = source.model_dump(mode="json") if isinstance(source, Config) else load_values(source)
    for override in overrides:
        values = with_override(values, override)
    return checked(Config, values, "configuration key")
