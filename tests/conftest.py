"""What all tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face package is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
