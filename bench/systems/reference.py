"""The yardstick: the unquantized model in torch, the adapter applied by PEFT and left unmerged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.systems.backbone import load_backbone, merge
from embedge.bench.systems.pooling import pool
from embedge.bench.systems.source import Source, read_source, source_of_task
from embedge.bench.systems.tokens import Ids, TextTokens

__all__ = ["Reference"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Reference:
    """A model and at most one adapter, in torch.

    Nothing of embedge takes part: transformers runs the backbone, PEFT the adapter, and pooling and
    limits are read by the bench's own reader. With ``merged=True`` it is what torch users run for
    speed; fidelity and quality are always measured against the unmerged form.
    """

    def __init__(
        self,
        source: str | Path | Source,
        adapter: str | Path | None = None,
        dtype: str = "float32",
        pooling: str | None = None,
        threads: int | None = None,
        *,
        merged: bool = False,
        device: str = "cpu",
        task: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            source: a model folder or a hub id.
            adapter: a folder in PEFT's format, whose own modules and prompts count where
                sentence-transformers saved them there; ``None`` is the bare backbone.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, of weights and activations; pooling
                is float32.
            pooling: overrides what the model's files say.
            threads: torch's threads, for the whole process; ``None`` leaves them as they are.
            merged: add the adapter to the weights.
            device: torch's name of what runs it, ``"cpu"`` or ``"cuda"``; float32 products stay
                float32 there, without TF32.
            task: whose tensors count where an adapter's file holds those of several tasks.

        Raises:
            BenchError: the files ask for something the reference does not do, or the adapter has
                tensors that find no place in the model.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        base = source if isinstance(source, Source) else read_source(source, pooling)
        self.source = source_of_task(base, adapter, task)
        self.tokens = TextTokens(self.source)
        model = load_backbone(self.source.transformer, adapter, self.source.base_quantization, task)
        if merged and adapter is not None:
            model = merge(model)
        self._device = torch.device(device)
        if self._device.type == "cuda":  # an environment variable of some containers says otherwise
            torch.set_float32_matmul_precision("highest")
        self._model: Any = model.to(self._device, _DTYPES[dtype]).eval()

    @property
    def backbone(self) -> Any:
        """The torch module: ids and mask in, ``last_hidden_state`` out."""
        return self._model

    def forward(self, ids: Ids, mask: Ids, unpooled: int = 0) -> NDArray[np.float32]:
        """Return the vectors of token ids, float32 ``[batch, dim]``.

        Args:
            ids: int64 ``[batch, tokens]``.
            mask: int64 ``[batch, tokens]``, right-padded.
            unpooled: how many first tokens of each row the pooling leaves out.
        """
        with torch.inference_mode():
            ids_there, mask_there = (torch.from_numpy(a).to(self._device) for a in (ids, mask))
            output = self._model(input_ids=ids_there, attention_mask=mask_there)
            pooled = pool(output.last_hidden_state, mask_there, self.source, unpooled)
            vectors: NDArray[np.float32] = pooled.cpu().numpy()
        return vectors

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, prompt: str | None = None
    ) -> NDArray[np.float32]:
        """Return one vector a text, float32 ``[n, dim]``.

        Args:
            texts: the texts.
            batch_size: texts a forward pass; batches hold texts of similar length.
            prompt: text put before each; ``None`` is the model's default prompt.
        """
        prompt = self.source.prompt() if prompt is None else prompt
        run = partial(self.forward, unpooled=self.tokens.unpooled(prompt))
        return self.tokens.embed([prompt + text for text in texts], batch_size, run)
