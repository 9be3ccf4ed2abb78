"""Blocks over sequences of unlike lengths: each as if it were alone, compiled or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_ray.method import blocks
from dora_ray.method.blocks import Layout, cls_of_blocks, compile_blocks, run_block
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


def test_what_comes_out_of_gelu_is_not_kept_for_the_backward():
    """4 D of the 18 D numbers a token that a block in float32 would keep."""
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
    """What autocast on a GPU makes of a norm."""

    def forward(self, heads: Tensor) -> Tensor:
        return heads.float()


def test_the_kernel_for_unlike_lengths_gets_one_type_and_a_window_that_hides_nothing(monkeypatch):
    """A window is what keeps torch's varlen_attn from cuDNN, whose backward is not deterministic."""

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
    monkeypatch.setattr(blocks, "varlen_attn", kernel)
    monkeypatch.setattr(blocks, "_has_kernel", lambda *_: True)
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
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at all tensors' attributes
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_one_compilation_serves_all_blocks_and_lengths():
    from torch._dynamo.utils import counters

    plain = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train()
    compiled = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train()
    compile_blocks(compiled)
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


# Prints how many graphs inductor compiled and how many it found compiled.
COMPILE = """
import torch
from torch._dynamo.utils import counters
from dora_ray.method.blocks import Layout, cls_of_blocks, compile_blocks
from tests.method.networks import build_small

vit = build_small(0, drop_path=0.5, dtype=torch.float32).backbone.train()
compile_blocks(vit)
for lengths in ([5, 5, 9], [3, 4, 4, 17]):
    cls = cls_of_blocks(vit, torch.randn(sum(lengths), 24), Layout.of_lengths(lengths, torch.device("cpu")))
    cls.square().sum().backward()
print(*(counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_next_process_of_a_node_compiles_nothing(tmp_path):
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
        )
        counts.append([int(count) for count in done.stdout.split()])
    (compiled, _), again = counts
    assert compiled > 0
    assert again == [0, compiled]
