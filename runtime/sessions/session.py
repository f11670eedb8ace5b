"""A graph opened by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import ActivationConstant
from embedge.runtime.errors import BundleError, EmbedgeError, InferenceError
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.processor import keep_products_exact, saturates_u8s8
from embedge.runtime.kernels.library import own_kernels, use_own_kernels
from embedge.runtime.sessions.device import PROVIDERS
from embedge.runtime.sessions.unpack import Initializers

__all__ = ["GraphSession", "give_initializers"]


class GraphSession:
    """A graph that is ready to run; safe to run from several threads at once.

    On the processor, if integer products saturate there all the same, ``constants`` are replaced by their
    reduced values when the session opens.

    Args:
        file: the graph, its external data beside it.
        device: "cpu" or "cuda".
        device_index: number of the GPU.
        threads: threads of one run.
        constants: activation constants by initializer name, empty where there are none.
        inputs: names the graph has to take.
        integer: whether its products are of integers, for which embedge has kernels.
        arena: keep freed activations for the next run; faster, at the size of the largest batch.
        prepared: the same graph as :class:`PreparedGraphs` stored it, opened in its place; for a
            processor whose integer products do not saturate.
        unpack: makes the initializers that the graph's file does not hold; not called for a prepared graph.
            Given whether the weights have to lie in panels, see :mod:`embedge.runtime.kernels.library`.

    Raises:
        BundleError: if ONNX Runtime refuses the graph, or it takes other inputs.
        DeviceError: if the device's provider did not load.
    """

    def __init__(
        self,
        file: Path,
        *,
        device: str,
        device_index: int = 0,
        threads: int,
        constants: Mapping[str, ActivationConstant],
        inputs: Sequence[str],
        integer: bool = False,
        arena: bool = True,
        prepared: Path | None = None,
        unpack: Callable[[bool], Initializers] | None = None,
    ) -> None:
        onnxruntime = load_onnxruntime()
        self.file = file = prepared or file
        self.device = device
        self.threads = threads
        options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if prepared is None else level.ORT_DISABLE_ALL
        )
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = arena
        options.log_severity_level = 4  # what it logs at 3 it also raises
        keep_products_exact(options)
        # ONNX Runtime reads these where they lie: they live as long as the session.
        self._replaced = []
        if constants and device == "cpu" and saturates_u8s8():
            for name, constant in constants.items():
                value = np.array(constant.reduced, constant.dtype)
                self._replaced.append(onnxruntime.OrtValue.ortvalue_from_numpy(value))
                options.add_initializer(name, self._replaced[-1])
        own = device == "cpu" and integer and own_kernels()
        unpacked = unpack(own) if unpack is not None and prepared is None else {}
        if own:
            use_own_kernels(options, panels=bool(unpacked) or prepared is not None)
        held = give_initializers(options, unpacked)
        providers: list[Any] = [PROVIDERS["cpu"]]
        if device == "cuda":
            # TF32 keeps 10 bits of a product's mantissa: fp32 would not be fp32.
            providers.insert(
                0, (PROVIDERS["cuda"], {"use_tf32": "0", "device_id": str(device_index)})
            )
        try:
            self._session = open_session(str(file), options, providers)
        except EmbedgeError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise BundleError(
                f"{file}: ONNX Runtime {onnxruntime.__version__} cannot open it: "
                f"{_one_line(error)}; `embedge inspect --verify` checks the bundle's files"
            ) from error
        del held, unpacked  # what is not read in place has been copied
        found = {value.name for value in self._session.get_inputs()}
        if found != set(inputs):
            raise BundleError(
                f"{file}: expected inputs {', '.join(sorted(inputs))}, found "
                f"{', '.join(sorted(found))}; export the bundle again"
            )
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, output: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One output for a batch, as float32.

        Raises:
            BundleError: if the graph has no such output, or it holds something else than floats.
            InferenceError: if the run fails or its result is not finite.
        """
        if output not in self.outputs:
            raise BundleError(
                f"{self.file}: expected an output {output}, found {', '.join(self.outputs)}; "
                "export the bundle again"
            )
        try:
            if self.device == "cuda":
                result = self._run_bound(output, inputs)
            else:
                (result,) = self._session.run([output], dict(inputs))
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise InferenceError(
                f"{self.file}: failed on {_batch(inputs)}: {_one_line(error)}; if memory ran out, "
                "lower max_batch_tokens, shorten the text, or lower max_pixels for images"
            ) from error
        if not isinstance(result, np.ndarray) or result.dtype not in (np.float32, np.float16):
            found = getattr(result, "dtype", type(result).__name__)
            raise BundleError(
                f"{self.file}: expected numbers of float32 as {output}, found {found}; export the bundle "
                "again"
            )
        if not np.isfinite(result).all():
            raise InferenceError(
                f"{self.file}: gave values that are not finite; `embedge inspect --verify` checks "
                "the bundle's files"
            )
        return np.asarray(result, np.float32)

    def _run_bound(self, output: str, inputs: Mapping[str, NDArray[Any]]) -> Any:
        """A run with its inputs copied to the device first and its output fetched once."""
        onnxruntime = load_onnxruntime()
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0)
            )
        binding.bind_output(output, self.device, 0)
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


def give_initializers(options: Any, arrays: Initializers) -> list[Any]:
    """Let a session that is opened with ``options`` take arrays as external initializers.

    Returns:
        What has to live until the session is open.
    """
    onnxruntime = load_onnxruntime()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    if values:
        options.add_external_initializers(list(arrays), values)
    return values


def _batch(inputs: Mapping[str, NDArray[Any]]) -> str:
    """The size of a batch in words."""
    if "input_ids" in inputs:
        rows, tokens = inputs["input_ids"].shape
        return f"a batch of {rows} × {tokens} tokens"
    images, patches = inputs["pixel_values"].shape[:2]
    return f"{images} images of {patches} patches"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
