"""How it is measured: latency, memory, fidelity, quality of a task."""
