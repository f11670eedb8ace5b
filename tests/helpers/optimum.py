"""optimum-onnx, which needs transformers below 4.58."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["model_class"]


def model_class() -> Any:
    """``ORTModelForFeatureExtraction``; skips the test where it cannot be imported.

    ``optimum.onnxruntime`` imports it late, so that importing the package says nothing.
    """
    try:
        from optimum.onnxruntime import ORTModelForFeatureExtraction
    except ImportError as error:
        pytest.skip(f"needs optimum-onnx, and with it transformers below 4.58: {error}")
    return ORTModelForFeatureExtraction
