"""From images to features to rows of tokens to vectors.

Images go through in windows: first the vision tower gives the features of a window, then the task's
graph makes vectors of them. So the two graphs are never needed at once, and under a memory limit
one is closed before the other is opened. Within a window images are read chunk by chunk, and those
of a chunk that have the same number of patches share runs. A thread reads the next chunk while the
graphs run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.image_settings import ImageSettings
from embedge.runtime.encode.batch_runner import RowRunner
from embedge.runtime.encode.batches import ImageTokens
from embedge.runtime.encode.prefetch import ahead
from embedge.runtime.encode.request import Request
from embedge.runtime.errors import BundleError, EmbedgeValueError, ImageError
from embedge.runtime.images.layout import image_row, image_tokens, vision_inputs
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

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class _Seen:
    """An image that was read, and its place in the call."""

    place: int
    patches: ImagePatches


class ImagePipeline:
    """The steps from images to vectors for one precision of a bundle with a vision tower.

    Args:
        graphs: of the precision.
        runner: rows to vectors.
        settings: how images become patches and tokens.
        max_length: most tokens of an image's row.
        pooling: "mean" lets a single vector do without the tokens behind the image.
    """

    def __init__(
        self,
        graphs: Graphs,
        runner: RowRunner,
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

    def embed(
        self,
        images: Sequence[Any],
        places: Sequence[int],
        name: str,
        request: Request,
        store: Callable[[int, Vectors], None],
        advance: Callable[[int], object],
    ) -> None:
        """Stores each image's result under its place.

        Args:
            images: paths, bytes, PIL images, arrays.
            places: where each stands in the call.
            name: the argument they came in, for messages.
            request: the call.
            store: takes a place and float32 ``[dim]``, or ``[tokens, dim]`` for multi-vectors.
            advance: takes the number of images that were done.

        Raises:
            ImageError: for an image that cannot be read, or has too many tokens.
        """
        seen = (
            _Seen(place, self._read(image, place, name, request))
            for image, place in zip(images, places, strict=True)
        )
        done = 0
        with closing(ahead(_chunks(seen))) as chunks:
            while done < len(images):
                window = self._window(chunks, request)
                done += len(window)
                rows, places_of_rows = [row for _, row in window], [place for place, _ in window]
                self._runner.run(rows, places_of_rows, request, store, advance)

    def _read(self, image: Any, place: int, name: str, request: Request) -> ImagePatches:
        """The patches of one image."""
        where = f"{name}[{place}]"
        try:
            picture = load_image(image, where)
            patches = self._processor(picture, request.min_pixels, request.max_pixels, where)
        except EmbedgeValueError as error:
            raise ImageError(name, place, str(error).removeprefix(f"{where}: ")) from error
        tokens = image_tokens(patches.grid, self._settings)
        if tokens > self._max_length:
            rows, columns = (n * self._settings.patch_size for n in patches.grid)
            raise ImageError(
                name,
                place,
                f"{columns} × {rows} pixels are {tokens} tokens, and the model takes "
                f"{self._max_length}; lower max_pixels",
            )
        return patches

    def _window(
        self, chunks: Iterator[list[_Seen]], request: Request
    ) -> list[tuple[int, ImageTokens]]:
        """Places and rows of the next images, in any order; empty after the last one."""
        window: list[tuple[int, ImageTokens]] = []

        def fill(lanes: SessionWorkers) -> None:
            while sum(row.features.nbytes for _, row in window) < _WINDOW_BYTES:
                runs = self._runs(next(chunks, []), request.batch_size)
                if not runs:
                    break
                largest = max(len(run) * run[0].patches.patches for run in runs)
                lanes.run(runs, self._look, done, tokens=largest)
                del runs  # and their patches, before the next ones are read

        def done(run: list[_Seen], features: Vectors) -> None:
            for image, of_image in zip(run, features, strict=True):
                row = image_row(
                    image.patches.grid,
                    self._settings,
                    pooled_only=self._pools_mean and not request.multi_vector,
                )
                window.append((image.place, ImageTokens(row, of_image)))

        self._graphs.use(VISION, fill)
        return window

    def _runs(self, chunk: Sequence[_Seen], batch_size: int) -> list[list[_Seen]]:
        """Images of one number of patches each, within the budget of a run; largest first."""
        budget = self._graphs.batch_tokens(VISION)
        groups: dict[int, list[_Seen]] = defaultdict(list)
        for image in chunk:
            groups[image.patches.patches].append(image)
        runs = []
        for patches in sorted(groups, reverse=True):
            group = groups[patches]
            step = max(1, min(batch_size, budget // patches))
            runs += [group[start : start + step] for start in range(0, len(group), step)]
        return runs

    def _look(self, session: GraphSession, run: Sequence[_Seen]) -> Vectors:
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


def _chunks(seen: Iterator[_Seen]) -> Iterator[list[_Seen]]:
    """The images in chunks, each until its patches are as many bytes as a chunk holds."""
    chunk: list[_Seen] = []
    held = 0
    for image in seen:
        chunk.append(image)
        held += image.patches.values.nbytes
        del image
        if held >= _CHUNK_BYTES:
            handed, chunk, held = [chunk], [], 0
            yield handed.pop()  # popped, so that nothing here keeps it alive
    if chunk:
        yield chunk
