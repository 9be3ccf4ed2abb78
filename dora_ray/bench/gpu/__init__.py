"""Everything that a GPU has to answer, in one command of ten minutes: `scripts/gpu_check.py`.

It needs torch, torchvision, timm, NumPy, safetensors, PyYAML, pytest and pydantic, and nothing else: no Ray, no
network, no decoder. Each part runs in a process of its own, under its own time limit, the most valuable one first.
"""
