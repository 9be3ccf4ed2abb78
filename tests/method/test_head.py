from __future__ import annotations

import copy

import pytest
import torch

from dora_ray.method.head import DINOHead, WeightNormLinear


def build(num_layers: int = 3) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(8, hidden_width=16, bottleneck_width=4, num_layers=num_layers, num_outputs=10).double()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_outputs_are_gains_times_cosines(num_layers):
    head = build(num_layers)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.mlp) == num_layers
    with torch.no_grad():
        head.last_layer.gain.uniform_(0.5, 2.0)
    features = torch.randn(2, 3, 8, dtype=torch.float64)
    bottleneck = head.mlp(features)
    expected = torch.cosine_similarity(bottleneck.unsqueeze(-2), head.last_layer.direction, dim=-1)
    torch.testing.assert_close(head(features), expected * head.last_layer.gain.squeeze(1))


def test_outputs_do_not_depend_on_the_length_of_a_direction_but_on_its_gain():
    head, features = build(), torch.randn(5, 8, dtype=torch.float64)
    before = head(features)
    with torch.no_grad():
        head.last_layer.direction.mul_(7.0)
        head.last_layer.gain.mul_(2.0)
    torch.testing.assert_close(head(features), 2 * before)


def test_every_parameter_learns_and_has_a_plain_name():
    head = copy.deepcopy(build())
    head(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
    names = {name for name, parameter in head.named_parameters() if parameter.grad.abs().max() > 0}
    layers = {f"mlp.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == layers | {"last_layer.direction", "last_layer.gain"}


@pytest.mark.parametrize(("init", "length"), [("normal", 0.02 * 256**0.5), ("uniform", 3**-0.5)])
def test_the_last_layers_rows_begin_as_long_as_the_equation_says(init, length):
    """Row lengths: 256 values of standard deviation 0.02, or of variance (1 / 256) / 3, give 0.32 or 0.577."""
    torch.manual_seed(0)
    direction = WeightNormLinear(256, 4096, init=init).direction
    assert direction.norm(dim=1).square().mean().sqrt().item() == pytest.approx(length, rel=0.01)
    assert (direction.abs().max() <= 1 / 16) == (init == "uniform")
