"""PEFT's LoRA adapters: what they declare, which tensors they change, and how one is merged.

Other rooms take ``Adapter`` and ``BoundAdapter``, and of the files beside an adapter ``settings_of_all`` and
``check_adapter_files``.
"""
