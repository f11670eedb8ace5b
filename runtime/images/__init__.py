"""From pictures to vectors: loading, patches, the layout of their tokens, runs of the vision tower.

Pillow is imported when the first image is loaded.
"""
