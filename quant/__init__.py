"""Number formats and the arithmetic behind them: int8, int4, GPTQ, smoothing, fidelity measures."""

from embedge.quant import fidelity

__all__ = ["fidelity"]
