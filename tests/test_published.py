"""Weights from elsewhere, in files written here as the released DoRA and DINO write theirs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_ray import evaluate, export, load_backbone
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.errors import CheckpointError
from dora_ray.published import fold_normalization, load_timm, read_published
from dora_ray.weights import load_head, random_backbone
from tests.video.servers import serve

WIDTH, DEPTH, PATCH, GRID, OUTPUTS = 128, 2, 8, 4, 12
Tensors = dict[str, Tensor]


def dino_tensors(seed: int = 0) -> Tensors:
    """An encoder's tensors under DINO's names, written out from its architecture."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
    }
    layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for block in range(DEPTH):
        for name, shape in layers.items():
            tensors |= {f"blocks.{block}.{name}.weight": draw(*shape), f"blocks.{block}.{name}.bias": draw(shape[0])}
        for norm in ("norm1", "norm2"):
            tensors |= {f"blocks.{block}.{norm}.weight": 1 + draw(WIDTH), f"blocks.{block}.{norm}.bias": draw(WIDTH)}
    return tensors


def head_tensors() -> Tensors:
    """A projection head of torch's own parts: an MLP and a weight-normalized layer without bias."""
    torch.manual_seed(5)
    with pytest.warns(FutureWarning):
        last = torch.nn.utils.weight_norm(nn.Linear(8, OUTPUTS, bias=False))
    mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    return {f"mlp.{k}": v for k, v in mlp.state_dict().items()} | {
        f"last_layer.{k}": v for k, v in last.state_dict().items()
    }


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def released(wrapper: str = "module.") -> dict[str, Any]:
    """A training's file: both networks, and the options of the program as argparse made them."""
    networks = {
        name: prefixed(f"{wrapper}backbone.", dino_tensors(seed)) | prefixed(f"{wrapper}head.", head_tensors())
        for name, seed in (("student", 1), ("teacher", 0))
    }
    return {**networks, "epoch": 3, "args": argparse.Namespace(arch="vit_small", patch_size=PATCH, lr=5e-4)}


LAYOUTS: dict[str, Callable[[], Any]] = {
    "released": released,
    "dino-full": lambda: released(wrapper=""),
    "compiled": lambda: released(wrapper="module._orig_mod."),
    "teacher-alone": lambda: {"teacher": prefixed("backbone.", dino_tensors())},
    "backbone": dino_tensors,
    "state-dict": lambda: {"state_dict": prefixed("module.", dino_tensors())},
}


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def by_hand(tensors: Tensors, images: Tensor) -> Tensor:
    """CLS after the final norm, in float64, from the equations of a pre-norm ViT with heads of 64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return (
            centered / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]
        )

    patches = torch.stack(
        [
            images.double()[:, :, r : r + PATCH, c : c + PATCH].flatten(1)
            for r in range(0, GRID * PATCH, PATCH)
            for c in range(0, GRID * PATCH, PATCH)
        ],
        dim=1,
    )
    patches = patches @ t["patch_embed.proj.weight"].flatten(1).T + t["patch_embed.proj.bias"]
    x = torch.cat([t["cls_token"].expand(len(images), -1, -1), patches], dim=1) + t["pos_embed"]
    for block in range(DEPTH):
        q, k, v = linear(f"blocks.{block}.attn.qkv", norm(f"blocks.{block}.norm1", x)).chunk(3, dim=-1)
        heads = [slice(start, start + 64) for start in range(0, WIDTH, 64)]
        seen = [torch.softmax(q[..., h] @ k[..., h].mT / 8, dim=-1) @ v[..., h] for h in heads]
        x = x + linear(f"blocks.{block}.attn.proj", torch.cat(seen, dim=-1))
        inner = linear(f"blocks.{block}.mlp.fc1", norm(f"blocks.{block}.norm2", x))
        x = x + linear(f"blocks.{block}.mlp.fc2", nn.functional.gelu(inner))
    return norm("norm", x)[:, 0]


IMAGES = torch.rand(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_teachers_features(tmp_path: Path, layout: str) -> None:
    path = save(tmp_path / "weights.pth", LAYOUTS[layout]())
    backbone = load_backbone(path)
    assert not backbone.training
    with torch.no_grad():
        torch.testing.assert_close(backbone(IMAGES).double(), by_hand(dino_tensors(), IMAGES), rtol=1e-4, atol=1e-4)
    assert tuple(timm.data.resolve_model_data_config(backbone)["mean"]) == (0.485, 0.456, 0.406)
    assert backbone.patch_embed.img_size == (GRID * PATCH, GRID * PATCH)


def test_older_pickles_half_precision_and_safetensors_load_too(tmp_path: Path) -> None:
    tensors = dino_tensors()
    save(tmp_path / "old.pth", tensors, _use_new_zipfile_serialization=False)
    save(tmp_path / "half.pt", {name: tensor.half() for name, tensor in tensors.items()})
    save_file(tensors, tmp_path / "plain.safetensors")
    for name, tolerance in (("old.pth", 0.0), ("half.pt", 1e-3), ("plain.safetensors", 0.0)):
        for key, value in load_backbone(tmp_path / name).state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, tensors[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("patch", "width", "name"), [(16, 192, "vit_tiny_patch16_224"), (8, 384, "vit_small_patch8_224")]
)
def test_sizes_are_read_from_the_tensors(tmp_path: Path, patch: int, width: int, name: str) -> None:
    vit = timm.create_model(name, num_classes=0)
    found = read_published(str(save(tmp_path / "dino.pth", vit.state_dict())))
    sizes = {"width": width, "depth": 12, "num_heads": width // 64, "patch_size": patch, "image_size": 224}
    assert found.arguments == {"name": name, "drop_path": 0.0} | sizes


def test_the_head_comes_under_our_names(tmp_path: Path) -> None:
    head, known = load_head(save(tmp_path / "released.pth", released())), head_tensors()
    assert torch.equal(head["last_layer.direction"], known["last_layer.weight_v"])
    assert torch.equal(head["last_layer.gain"], known["last_layer.weight_g"])
    assert torch.equal(head["mlp.4.weight"], known["mlp.4.weight"])
    assert load_head(save(tmp_path / "plain.pth", dino_tensors())) == {}


class Evil:
    """A pickle that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "evil.pth", {"teacher": dino_tensors(), "args": Evil()})
    with pytest.raises(CheckpointError, match=r"would run code when loaded \(\S+\), so it was not.*torch\.save"):
        load_backbone(tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


def changed(**changes: Tensor | None) -> Tensors:
    """DINO's tensors with some replaced, added, or (None) taken away; __ stands for a dot."""
    tensors: dict[str, Any] = dino_tensors() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(blocks__1__attn__qkv__bias=None), r"1 missing \(blocks\.1\.attn\.qkv\.bias\)"),
        (changed(head__weight=torch.zeros(2, 2)), r"1 unknown \(head\.weight\)"),
        (changed(mask_token=torch.zeros(1)) | {"blocks.0.ls1.gamma": torch.ones(WIDTH)}, "2 unknown .*ls1.*mask_token"),
        (changed(norm__weight=torch.zeros(3)), r"1 of another shape \(norm\.weight \(3,\) for \(128,\)\)"),
        (changed(norm__weight=torch.full((WIDTH,), float("nan"))), r"not finite in norm\.weight"),
        (changed(pos_embed=torch.zeros(1, 14, WIDTH)), "position embedding of 14 tokens"),
        (changed(pos_embed=None), "holds no ViT.*blocks.0.attn.proj.bias.* and 23 more"),
        ({"fc.weight": torch.zeros(2)}, r"holds no ViT.*found fc\.weight"),
        ({"student": dino_tensors()}, "a student but no teacher"),
        ({"teacher": prefixed("backbone.", dino_tensors()) | {"odd.one": torch.zeros(1)}}, r"other than.*odd\.one"),
        ({"epoch": 3, "lr": 0.1}, "holds no network: epoch, lr are no tensor"),
        ([1, 2], "holds list"),
        ({}, "holds dict"),
        ({"patch_embed.proj.weight": torch.zeros(100, 3, 8, 8), "pos_embed": torch.zeros(1, 17, 100)}, "width 100"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_backbone(save(tmp_path / "weights.pth", content))


@pytest.mark.parametrize("kept", [0, 1, 200, -100])
def test_damaged_files_are_refused(tmp_path: Path, kept: int) -> None:
    content = save(tmp_path / "weights.pth", released()).read_bytes()
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match="damaged"):
            load_backbone(tmp_path / name)
    (tmp_path / "weights.pth").write_bytes(b"no pickle at all" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(tmp_path / "weights.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dino\.pth: there is no such file"):
        resolve_checkpoint(tmp_path / "dino.pth")


def test_a_file_behind_a_uri_loads(tmp_path: Path) -> None:
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(str(save(tmp_path / "weights.pth", released())), "memory://published/weights.pth")
    try:
        loaded = load_backbone("memory://published/weights.pth")
        assert torch.equal(loaded.cls_token, dino_tensors()["cls_token"])
    finally:
        remote.rm("memory://published", recursive=True)


def test_a_file_of_a_web_server_loads_without_being_listed(tmp_path: Path) -> None:
    content, asked = save(tmp_path / "weights.pth", released()).read_bytes(), list[str]()

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond(b"")

        def do_GET(self) -> None:
            self.respond(content)

        def respond(self, body: bytes) -> None:
            asked.append(self.command)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with serve(Server) as address:
        loaded = load_backbone(f"{address}/weights.pth")
    assert torch.equal(loaded.cls_token, dino_tensors()["cls_token"])
    assert asked.count("GET") <= 2


def test_a_file_is_exported_and_reloads_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", released())
    out = export(path, tmp_path / "export")
    stock = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        expected = load_backbone(path)(IMAGES)
        assert torch.equal(stock(IMAGES), expected)
        assert torch.equal(load_backbone(out)(IMAGES), expected)
    assert tuple(timm.data.resolve_model_data_config(stock)["std"]) == (0.229, 0.224, 0.225)
    assert "with the weights of weights.pth" in (out / "README.md").read_text()


def test_a_file_is_evaluated_beside_a_random_encoder_of_its_sizes(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", released())
    for number in range(12):
        folder = tmp_path / "images" / ("train" if number % 3 else "test") / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        gray = 40 + 170 * (number % 2) + number
        Image.new("RGB", (40, 40), (gray, gray, gray)).save(folder / f"{number}.png")
    found = evaluate(path, "knn", data=tmp_path / "images", neighbors=(1,))
    assert found["checkpoint"] == str(path)
    assert found["settings"]["image_size"] == GRID * PATCH
    assert found["results"]["top1"] == 1.0
    random = random_backbone(path, seed=0)
    assert not torch.equal(random.cls_token, dino_tensors()["cls_token"])
    assert evaluate(path, "knn", data=tmp_path / "images", neighbors=(1,), random_init=True)["results"]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A timm model folder of one that takes images with mean and deviation 0.5, as many of timm's do."""
    import json

    folder = tmp_path / "stock"
    folder.mkdir()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=32)
    torch.manual_seed(1)
    for parameter in vit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file(vit.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {"depth": 2, "img_size": 32},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25, 0.5, 0.5], "input_size": [3, 32, 32], "num_classes": 0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_timms_takes_images_as_ours_do(stock: Path) -> None:
    """Its own normalization goes into its patch embedding: the same pixels give the same features."""
    theirs = timm.create_model(f"local-dir:{stock}", pretrained=True, global_pool="token").eval()
    ours = load_backbone(f"timm:local-dir:{stock}")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((pixels - 0.5) / torch.tensor([0.25, 0.5, 0.5])[:, None, None])
        torch.testing.assert_close(ours((pixels - mean) / std), expected, rtol=1e-4, atol=1e-4)
    assert tuple(timm.data.resolve_model_data_config(ours)["mean"]) == (0.485, 0.456, 0.406)


def test_what_timm_does_not_have_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"no model 'vit_smal_patch16_224'\. Near: vit_small_patch16_224"):
        load_timm("timm:vit_smal_patch16_224")
    with pytest.raises(CheckpointError, match="timm:resnet18 "):
        load_timm("timm:resnet18", pretrained=False)
    with pytest.raises(CheckpointError, match="is not a plain ViT"):
        load_timm("timm:vit_small_patch14_reg4_dinov2", pretrained=False)


def test_a_patch_embedding_without_bias_cannot_take_a_normalization() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    vit.patch_embed.proj.bias = None
    with pytest.raises(CheckpointError, match="no bias"):
        fold_normalization(vit, mean=(0.5,) * 3, std=(0.5,) * 3)
