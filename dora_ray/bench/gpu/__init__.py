"""All GPU measurements in one command of ten minutes: `scripts/gpu_check.py`.

Needs only torch, torchvision, timm, NumPy, safetensors, PyYAML, pytest and pydantic: no Ray, no network, no decoder.
Each part runs in its own process, under its own time limit, the most valuable first.
"""
