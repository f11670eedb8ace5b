"""What is measured: bundles, and the unquantized reference in torch."""
