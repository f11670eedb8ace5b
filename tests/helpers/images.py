"""jina-embeddings-v4's image settings, for tests."""

from __future__ import annotations

from embedge.runtime.bundle.manifest import ImageSettings

SETTINGS = ImageSettings(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=3136,
    max_pixels=602112,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
    resample=3,
    window_size=112,
    rotary_dim=40,
    rotary_theta=10000.0,
    hidden_size=2048,
    before_ids=(151644, 872, 198, 151652),
    image_token_id=151655,
    after_ids=(151653, 74785, 279, 2168, 13, 151645, 198),
    pooled_before=1,
    pooled_after=1,
)
