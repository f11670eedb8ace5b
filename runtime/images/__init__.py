"""From pictures to vectors: loading, patches, and the layout of their tokens."""
