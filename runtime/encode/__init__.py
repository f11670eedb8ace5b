"""From texts to vectors: tokens, batches, rows, and what a call asks for."""
