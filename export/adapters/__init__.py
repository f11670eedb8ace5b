"""PEFT's LoRA adapters: what they declare, which tensors they change, and how one is merged."""
