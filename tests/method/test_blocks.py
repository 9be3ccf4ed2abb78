"""Blocks over packed sequences of different lengths: equal to each sequence alone, compiled or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_ray.method import attention, blocks
from dora_ray.method.attention import Layout
from dora_ray.method.blocks import cls_of_blocks, compile_blocks, run_block
from tests.method.networks import build_small

CPU = torch.device("cpu")


def test_a_layout_says_where_every_sequence_begins():
    layout = Layout.of_lengths([2, 2, 5], CPU) + Layout(((3, 4),), CPU)
    assert layout.runs == ((2, 2), (1, 5), (3, 4))
    assert (layout.num_sequences, layout.num_tokens) == (6, 21)
    assert layout.lengths.tolist() == [2, 2, 5, 4, 4, 4]
    assert layout.bounds.tolist() == [0, 2, 4, 9, 13, 17, 21]
    assert layout.firsts.tolist() == [0, 2, 4, 9, 13, 17]


def test_sequences_do_not_see_each_other():
    vit = build_small(0).backbone.eval()
    lengths = [3, 3, 1, 7]
    sequences = [torch.randn(length, 24, dtype=torch.float64) for length in lengths]
    layout = Layout.of_lengths(lengths, CPU)
    alone = [run_block(vit.blocks[0], one, Layout(((1, len(one)),), CPU)) for one in sequences]
    torch.testing.assert_close(run_block(vit.blocks[0], torch.cat(sequences), layout), torch.cat(alone))
    cls = [cls_of_blocks(vit, one, Layout(((1, len(one)),), CPU)) for one in sequences]
    torch.testing.assert_close(cls_of_blocks(vit, torch.cat(sequences), layout), torch.cat(cls))


def test_the_output_of_gelu_is_not_saved_for_the_backward():
    """GELU's output is 4 D of the 18 D numbers per token that a float32 block would save."""
    vit = build_small(0, dtype=torch.float32).backbone.train()
    block, layout = vit.blocks[0], Layout(((1, 1000),), CPU)
    tokens, kept = torch.randn(1000, 24, requires_grad=True), {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and len(tensor) == 1000:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run_block(block, tokens, layout)
    assert sum(kept.values()) <= (2 + 2 + 3 + 1 + 4) * 24 * 1000
    ours = torch.autograd.grad(output.sin().sum(), [tokens, *block.parameters()])
    theirs = torch.autograd.grad(block(tokens[None]).sin().sum(), [tokens, *block.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class InFloat32(nn.Module):
    """Norm that returns float32, as under autocast on a GPU."""

    def forward(self, heads: Tensor) -> Tensor:
        return heads.float()


def test_the_kernel_for_unlike_lengths_gets_one_type_and_a_window_that_hides_nothing(monkeypatch):
    """The window keeps torch's varlen_attn from using cuDNN, whose backward is not deterministic."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, window_size: tuple[int, int]) -> Tensor:
        of_query, of_key, longest_query, longest_key = bounds
        assert query.dtype == key.dtype == value.dtype
        assert longest_query == int(of_query.diff().max())
        assert min(window_size) >= longest_key == int(of_key.diff().max())
        heads = [
            F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (q, k, v))).transpose(0, 1)
            for q, k, v in zip(
                query.split(of_query.diff().tolist()),
                key.split(of_key.diff().tolist()),
                value.split(of_key.diff().tolist()),
                strict=True,
            )
        ]
        return torch.cat(heads)

    vit = build_small(0, dtype=torch.bfloat16).backbone.eval()
    for block in vit.blocks:
        block.attn.q_norm, block.attn.k_norm = InFloat32(), InFloat32()
    layout = Layout.of_lengths([2, 3, 1, 7, 5], CPU)
    tokens = torch.randn(layout.num_tokens, 24, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    together = cls_of_blocks(vit, tokens, layout)
    for block in vit.blocks:
        block.attn.q_norm, block.attn.k_norm = nn.Identity(), nn.Identity()
    monkeypatch.undo()
    torch.testing.assert_close(together, cls_of_blocks(vit, tokens, layout))


def test_drop_path_drops_whole_sequences():
    vit = build_small(0, drop_path=0.5).backbone.train()
    tokens = torch.randn(40, 24, dtype=torch.float64)
    torch.manual_seed(0)
    out = run_block(vit.blocks[-1], tokens, Layout(((10, 4),), CPU)).view(10, 4, 24)
    unchanged = (out == tokens.view(10, 4, 24)).all(dim=-1)
    assert torch.equal(unchanged.any(dim=1), unchanged.all(dim=1))
    assert 0 < unchanged[:, 0].sum() < 10


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_dropped_branchs_gradient_is_what_autograd_gives(kind):
    tokens, branch = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4).to(kind).requires_grad_()
    kept, weights = torch.rand(6, 1).round() * 2, torch.randn(6, 4)
    ours, theirs = blocks._residual(tokens, branch, kept), torch.addcmul(tokens, branch, kept)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad((output * weights).sum(), [tokens, branch]) for output in (ours, theirs)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile inspects all tensors' attributes
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_one_compilation_serves_all_blocks_and_lengths():
    from torch._dynamo.utils import counters

    plain = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train()
    compiled = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train()
    compile_blocks(compiled, 20)
    graphs = []
    for lengths in ([5, 5, 9], [3, 4, 4, 17], [8] * 6):
        tokens, layout = torch.randn(sum(lengths), 24), Layout.of_lengths(lengths, CPU)
        results = []
        for vit in (plain, compiled):
            torch.manual_seed(1)
            cls = cls_of_blocks(vit, tokens, layout)
            results.append((cls, *torch.autograd.grad(cls.square().sum(), list(vit.blocks.parameters()))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


# Runs slots of several lengths in turn. Prints the number of graphs compiled by inductor, the number of cache hits, and
# a hash of the last slot's gradients.
COMPILE = """
import hashlib, json, sys
import torch
from torch._dynamo.utils import counters
from dora_ray.method.attention import Layout
from dora_ray.method.blocks import cls_of_blocks, compile_blocks
from tests.method.networks import build_small

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
vit = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train().to(device)
compile_blocks(vit, 40)
for lengths in json.loads(sys.argv[1]):
    torch.manual_seed(1)
    tokens = torch.randn(sum(lengths), 24).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        cls = cls_of_blocks(vit, tokens, Layout.of_lengths(lengths, device))
    gradients = torch.autograd.grad(cls.square().sum(), list(vit.blocks.parameters()))
content = b"".join(gradient.cpu().numpy().tobytes() for gradient in gradients)
print(*(counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")), hashlib.sha256(content).hexdigest())
"""


def compiled_run(cache: Path, slots: list[list[int]]) -> tuple[int, int, str]:
    """Return graphs compiled, cache hits, and the hash of the last slot's gradients, from a separate process."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, json.dumps(slots)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    missed, found, digest = done.stdout.split()
    return int(missed), int(found), digest


@pytest.mark.long  # compiles everything twice
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_equal_slots_give_equal_bits_whatever_a_process_compiled_for_and_the_next_compiles_nothing(tmp_path):
    slot = [3, 4, 4, 17]
    compiled, found, digest = compiled_run(tmp_path / "one", [[5, 5, 9], slot])
    assert compiled > 0
    assert found == 0
    *_, of_other = compiled_run(tmp_path / "other", [[1000] * 4, slot])
    assert of_other == digest
    assert compiled_run(tmp_path / "one", [[5, 5, 9], slot]) == (0, compiled, digest)
