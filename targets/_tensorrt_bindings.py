"""TensorRT's Python bindings: imported late, their version, and their log caught so that errors carry its last words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from perwatt.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

OLDEST = 10
"""Major version. TensorRT 8 has other names for most of what is used here."""


def bindings() -> Any:
    """The module `tensorrt`. Raises ImportError where it, or a library that it wants, is not there."""
    import tensorrt

    return tensorrt


def version() -> str:
    """As `11.4.0.106`."""
    return str(bindings().__version__)


def major() -> int:
    """10 of `10.16.1.11`."""
    return int(version().split(".")[0])


class Log:
    """What TensorRT is given to log to (`logger`), and what it said went wrong, in order (`errors`)."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.logger: trt.ILogger = _logger(self.errors)


def _logger(errors: list[str]) -> trt.ILogger:
    trt = bindings()

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            # pybind11 wants the base initialized by name, or the first message ends the process.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(msg)

    return Listener()


def last_words(log: Log, otherwise: str = "it gave no reason") -> str:
    """What TensorRT logged as errors, shortened to what tells a person something; the list is empty afterwards."""
    said = [re.sub(r"\s+", " ", message).strip() for message in log.errors]
    log.errors.clear()
    return "; ".join(dict.fromkeys(said))[:600] or otherwise


def opened(engine: bytes, log: Log) -> tuple[trt.Runtime, trt.ICudaEngine]:
    """A runtime, and the engine that `engine` holds. Raises BackendError with TensorRT's own words."""
    trt = bindings()
    try:
        runtime = trt.Runtime(log.logger)
        opened_engine = runtime.deserialize_cuda_engine(engine)
    except (TypeError, RuntimeError) as error:
        raise BackendError(f"TensorRT does not start: {last_words(log, str(error))}") from error
    if opened_engine is None:
        raise BackendError(f"TensorRT refused the engine: {last_words(log)}")
    return runtime, opened_engine
