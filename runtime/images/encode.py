"""From images to features to tokens to vectors.

Images go through in windows: first the vision tower gives the features of a window, then the task's
graph makes vectors of them. So the two graphs are never needed at once, and under a memory limit
one is closed before the other is opened. Within a window images are read chunk by chunk, and those
of a chunk that have the same number of patches share runs. A thread reads the next chunk while the
graphs run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.manifest import ImageSettings
from embedge.runtime.encode.batch_runner import BatchRunner
from embedge.runtime.encode.prefetch import prefetched
from embedge.runtime.encode.request import Request
from embedge.runtime.encode.sequences import ImageTokens
from embedge.runtime.encode.vectors import Vectors
from embedge.runtime.errors import BundleError, EmbedgeValueError, ImageError
from embedge.runtime.images.layout import image_layout, image_tokens, vision_inputs
from embedge.runtime.images.load import load_image
from embedge.runtime.images.patches import ImagePatches, ImageProcessor
from embedge.runtime.sessions.graphs import Graphs
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.session_workers import SessionWorkers

__all__ = ["ImagePipeline"]

# Features and patches held at once, besides those of one image. Patches are 1176 float32 values, a
# feature of four patches is 2048: a window of features comes from some five chunks of patches. Two
# chunks are held, the one in the graph and the one that is being read.
_WINDOW_BYTES = 64 << 20
_CHUNK_BYTES = 32 << 20
_OUTPUT = "image_features"


@dataclass(frozen=True)
class _Image:
    """An image that was read, and its index in the call."""

    index: int
    patches: ImagePatches


class ImagePipeline:
    """The steps from images to vectors for one precision of a bundle with a vision tower.

    Args:
        graphs: of the precision.
        runner: tokens to vectors.
        settings: how images become patches and tokens.
        max_length: most tokens of an image.
        pooling: "mean" lets a single vector do without the tokens behind the image.
    """

    def __init__(
        self,
        graphs: Graphs,
        runner: BatchRunner,
        settings: ImageSettings,
        max_length: int,
        pooling: str,
    ) -> None:
        self._graphs = graphs
        self._runner = runner
        self._settings = settings
        self._max_length = max_length
        self._pools_mean = pooling == "mean"
        self._processor = ImageProcessor(settings)

    def encode(
        self,
        images: Sequence[Any],
        indices: Sequence[int],
        request: Request,
        *,
        name: str,
        pixels: tuple[int, int] | None = None,
    ) -> Generator[tuple[int, Vectors], None, None]:
        """``(index, vector)`` of each image, as batches finish.

        A vector is float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.

        Args:
            images: paths, bytes, PIL images, arrays.
            indices: of the images in the call.
            request: the call.
            name: the argument they came in, for messages.
            pixels: fewest and most that an image is scaled to; ``None``: the bundle's.

        Raises:
            ImageError: for an image that cannot be read, or has too many tokens.
            EmbedgeValueError: for 8-bit codes without ranges of the call.
        """
        request.check_images()
        pixels = pixels or (self._settings.min_pixels, self._settings.max_pixels)
        read = (
            _Image(index, self._read(image, index, name, pixels))
            for index, image in zip(indices, images, strict=True)
        )
        done = 0
        with closing(prefetched(_chunks(read))) as chunks:
            while done < len(images):
                window = self._window(chunks, request)
                done += len(window)
                yield from self._runner.run(window, request)

    def _read(self, image: Any, index: int, name: str, pixels: tuple[int, int]) -> ImagePatches:
        """The patches of one image."""
        where = f"{name}[{index}]"
        try:
            patches = self._processor(load_image(image, where), *pixels, where)
        except EmbedgeValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            raise ImageError(name, index, reason, arguments=error.arguments) from error
        tokens = image_tokens(patches.grid, self._settings)
        if tokens > self._max_length:
            height, width = (n * self._settings.patch_size for n in patches.grid)
            raise ImageError(
                name,
                index,
                f"{width} × {height} pixels are {tokens} tokens, and the model takes "
                f"{self._max_length}; lower max_pixels",
                arguments=["max_pixels"],
            )
        return patches

    def _window(
        self, chunks: Iterator[list[_Image]], request: Request
    ) -> list[tuple[int, ImageTokens]]:
        """Tokens and features of the next images, in any order; empty after the last one."""
        window: list[tuple[int, ImageTokens]] = []
        held = 0
        with self._graphs.use(VISION) as workers:
            while held < _WINDOW_BYTES:
                seen = self._look(workers, next(chunks, []), request)
                if not seen:
                    break
                held += sum(tokens.features.nbytes for _, tokens in seen)
                window += seen
        return window

    def _look(
        self, workers: SessionWorkers, chunk: list[_Image], request: Request
    ) -> list[tuple[int, ImageTokens]]:
        """Tokens and features of a chunk's images, which nothing holds when this returns."""
        runs = self._runs(chunk, request.options.batch_size)
        largest = max((len(run) * run[0].patches.patches for run in runs), default=0)
        pooled_only = self._pools_mean and not request.options.multi_vector
        seen = []
        with closing(workers.run(runs, self._features, tokens=largest)) as results:
            for run, features in results:
                for image, of_image in zip(run, features, strict=True):
                    grid = image.patches.grid
                    layout = image_layout(grid, self._settings, pooled_only=pooled_only)
                    seen.append((image.index, ImageTokens(layout, of_image)))
        return seen

    def _runs(self, chunk: Sequence[_Image], batch_size: int) -> list[list[_Image]]:
        """Images of one number of patches each, within the budget of a run; largest first."""
        budget = self._graphs.settings(VISION).batch_tokens
        groups: dict[int, list[_Image]] = defaultdict(list)
        for image in chunk:
            groups[image.patches.patches].append(image)
        runs = []
        for patches in sorted(groups, reverse=True):
            group = groups[patches]
            step = max(1, min(batch_size, budget // patches))
            runs += [group[start : start + step] for start in range(0, len(group), step)]
        return runs

    def _features(self, session: GraphSession, run: Sequence[_Image]) -> Vectors:
        """The features of some images, float32 ``[images, features, hidden]``."""
        settings = self._settings
        features = session.run(_OUTPUT, vision_inputs([image.patches for image in run], settings))
        count = run[0].patches.patches // settings.merge_size**2
        expected = (len(run), count, settings.hidden_size)
        if features.shape != expected:
            raise BundleError(
                f"{session.file}: expected features of shape {list(expected)}, found "
                f"{list(features.shape)}; export the bundle again"
            )
        return features


def _chunks(images: Iterator[_Image]) -> Iterator[list[_Image]]:
    """The images in chunks, each until its patches are as many bytes as a chunk holds."""
    chunk: list[_Image] = []
    held = 0
    for image in images:
        chunk.append(image)
        held += image.patches.values.nbytes
        del image
        if held >= _CHUNK_BYTES:
            handed, chunk, held = [chunk], [], 0
            yield handed.pop()  # popped, so that nothing here keeps it alive
    if chunk:
        yield chunk
