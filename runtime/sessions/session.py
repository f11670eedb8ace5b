"""Where a session of a bundle's graph is opened: the graph in ONNX Runtime, ready to run.

:func:`open_graph` is the one way. :class:`SessionConfig` says how; the steps are
    1. the graph as `embedge prepare` stored it, where that fits, else the bundle's own;
    2. weights that the file does not hold, unpacked from 4 bits (:mod:`embedge.runtime.sessions.unpack`);
    3. exact integer matmuls (:mod:`embedge.runtime.host.saturation`) and embedge's kernels;
    4. ``InferenceSession``, by :func:`embedge.runtime.host.onnxruntime.open_session`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import BundleError, EmbedgeError, InferenceError
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.saturation import keep_matmuls_exact, require_exact_matmuls
from embedge.runtime.kernels.library import own_kernels, use_own_kernels
from embedge.runtime.sessions.device import PROVIDERS
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.sessions.task_inputs import TaskInputs
from embedge.runtime.sessions.unpack import Initializers, initializers_of

__all__ = ["GraphSession", "SessionConfig", "give_initializers", "new_options", "open_graph"]


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """How graphs are opened.

    Attributes:
        device: "cpu" or "cuda".
        device_index: number of the GPU.
        threads: threads of a run; as many unpack weights when a graph opens.
        arena: keep freed activations for the next run; faster, at the size of the largest batch.
        prepared: what `embedge prepare` stored, taken in the place of the bundle's graphs where it fits;
            ``None``: always the bundle's.
    """

    threads: int
    device: str = "cpu"
    device_index: int = 0
    arena: bool = True
    prepared: PreparedGraphs | None = None


def open_graph(
    bundle: Bundle, precision: str, name: str, config: SessionConfig, *, threads: int | None = None
) -> GraphSession:
    """A session of the graph of a task, or of ``VISION``.

    Args:
        bundle: whose graph.
        precision: one of its precisions.
        name: of the task, or ``VISION``.
        config: how it is opened.
        threads: threads of a run; ``None``: all of the configuration's.

    Raises:
        BundleError: if ONNX Runtime refuses the graph, it takes other inputs than the manifest says, or
            its files are not the bundle's any more.
        EmbedgeError: if the path is no UTF-8.
    """
    threads = threads or config.threads
    name = bundle.graph_key(precision, name)
    if config.prepared is not None and config.device == "cpu":
        file = config.prepared.find(precision, name)
        if file is not None:
            try:
                return _open(bundle, precision, name, config, threads, file)
            except BundleError as error:
                config.prepared.warn(f"{file.parent}: not used: {error}")
    return _open(bundle, precision, name, config, threads, None)


def _open(
    bundle: Bundle,
    precision: str,
    name: str,
    config: SessionConfig,
    threads: int,
    prepared: Path | None,
) -> GraphSession:
    with bundle.reading(bundle.graph_files(precision, name)):
        file = prepared or bundle.graph(precision, name)
        saturates = bundle.manifest.precisions[precision].saturates
        own = config.device == "cpu" and bundle.multiplies_integers(precision) and own_kernels()
        exact = saturates and not own  # embedge's products are exact on any processor
        options = new_options(
            threads=threads, exact=exact, optimize=prepared is None, arena=config.arena
        )
        if config.device == "cpu" and exact:
            require_exact_matmuls()
        unpacked: Initializers = {}
        if prepared is None and name in bundle.manifest.precisions[precision].unpack:
            unpacked = initializers_of(bundle, precision, name, threads=config.threads, panels=own)
        if own:
            use_own_kernels(options, panels=bool(unpacked) or prepared is not None)
        held = give_initializers(options, unpacked)
        try:
            session = open_session(str(file), options, _providers(config))
        except EmbedgeError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise BundleError(
                f"{file}: ONNX Runtime {load_onnxruntime().__version__} cannot open it: "
                f"{_one_line(error)}; `embedge inspect --verify` checks the bundle's files"
            ) from error
        del held, unpacked  # what is not read in place has been copied
    _check_inputs(file, session, bundle.graph_inputs(precision, name))
    return GraphSession(file, session, device=config.device, threads=threads)


def new_options(*, threads: int, exact: bool, optimize: bool = True, arena: bool = True) -> Any:
    """ONNX Runtime's ``SessionOptions``, with exact integer matmuls.

    Args:
        threads: of a run.
        exact: ask for exact matmuls where they saturate; portable graphs have them anyway, faster.
        optimize: rewrite the graph when it opens; ``False`` for one that was rewritten already.
        arena: as in :class:`SessionConfig`.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = 4  # what it logs at 3 it also raises
    if exact:
        keep_matmuls_exact(options)
    return options


def give_initializers(options: Any, arrays: Initializers) -> list[Any]:
    """Lets a session that is opened with ``options`` take arrays as external initializers.

    Returns:
        What has to live until the session is open.
    """
    onnxruntime = load_onnxruntime()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    if values:
        options.add_external_initializers(list(arrays), values)
    return values


class GraphSession:
    """A graph that is open; safe to run from several threads at once.

    Args:
        file: what was opened, for messages.
        session: ONNX Runtime's.
        device: "cpu" or "cuda".
        threads: threads of one run.
        given: inputs that are the same in every run.
    """

    def __init__(
        self,
        file: Path,
        session: Any,
        *,
        device: str,
        threads: int,
        given: TaskInputs | None = None,
    ) -> None:
        self.file = file
        self._given = given or {}
        self.device = device
        self.threads = threads
        self._session = session
        self.outputs = tuple(value.name for value in session.get_outputs())

    def of_task(self, given: TaskInputs) -> GraphSession:
        """The same session, whose runs get a task's inputs."""
        return GraphSession(
            self.file, self._session, device=self.device, threads=self.threads, given=given
        )

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
            elif self._given:
                result = self._run_with_given(output, inputs)
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

    def _run_with_given(self, output: str, inputs: Mapping[str, NDArray[Any]]) -> Any:
        """A run with inputs that are ONNX Runtime's values already."""
        value_of = load_onnxruntime().OrtValue.ortvalue_from_numpy
        values = {name: value_of(np.ascontiguousarray(array)) for name, array in inputs.items()}
        (result,) = self._session.run_with_ort_values([output], {**values, **self._given})
        return result.numpy()

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


def _providers(config: SessionConfig) -> list[Any]:
    if config.device == "cpu":
        return [PROVIDERS["cpu"]]
    # TF32 keeps 10 bits of a mantissa: fp32 would not be fp32.
    on_gpu = {"use_tf32": "0", "device_id": str(config.device_index)}
    return [(PROVIDERS["cuda"], on_gpu), PROVIDERS["cpu"]]


def _check_inputs(file: Path, session: Any, inputs: Sequence[str]) -> None:
    found = {value.name for value in session.get_inputs()}
    if found != set(inputs):
        raise BundleError(
            f"{file}: expected inputs {', '.join(sorted(inputs))}, found "
            f"{', '.join(sorted(found))}; export the bundle again"
        )


def _batch(inputs: Mapping[str, NDArray[Any]]) -> str:
    """The size of a batch in words."""
    if "input_ids" in inputs:
        rows, tokens = inputs["input_ids"].shape
        return f"a batch of {rows} × {tokens} tokens"
    images, patches = inputs["pixel_values"].shape[:2]
    return f"{images} images of {patches} patches"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
