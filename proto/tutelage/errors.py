"""Every error that a user or a peer can meet, with its gRPC status and its exit code in one table.

    0 done   1 failed   2 usage or configuration   3 a peer is not reached   4 data, files, checkpoints
    130 interrupted (Ctrl-C)   141 whoever read the output is gone   143 terminated (SIGTERM)

To add one: derive it from `TutelageError` and from the built-in class that fits, give it `status` (the
name of a gRPC status) and `exit_code`, and raise it with a message that says what was given, what is
allowed and what to do. Instances hold nothing but their arguments, so they pickle (Ray carries them
between processes). `as_known` makes one of them of what libraries raise for a cause that a person can mend.
"""

from __future__ import annotations

import re

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_DATA = 0, 1, 2, 3, 4
# As a shell has it: 128 and the number of the signal, SIGINT, SIGPIPE, SIGTERM.
EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, EXIT_TERMINATED = 130, 141, 143
EXIT_CODES = (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    EXIT_UNREACHABLE,
    EXIT_DATA,
    EXIT_INTERRUPTED,
    EXIT_PIPE_CLOSED,
    EXIT_TERMINATED,
)


class Terminated(BaseException):
    """SIGTERM, raised in the main thread of a command as KeyboardInterrupt is for Ctrl-C.

    Args, of both: what to do to go on, if there is something.
    """


class TutelageError(Exception):
    """Root of the errors that this project raises on purpose.

    Args:
        message: what was given, what is allowed, what to do.
        field: path of the offending field of a request or a configuration, if there is one.

    """

    status = "INTERNAL"
    exit_code = EXIT_FAILED

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)

    @property
    def message(self) -> str:
        """What happened, without the field."""
        return str(self.args[0])

    @property
    def field(self) -> str:
        """Path of the offending field, or the empty string."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ConfigurationError(TutelageError, ValueError):
    """A configuration that cannot be run as it is."""

    status, exit_code = "INVALID_ARGUMENT", EXIT_USAGE


class InvalidRequest(TutelageError, ValueError):
    """A request whose field is outside what the contract allows."""

    status, exit_code = "INVALID_ARGUMENT", EXIT_USAGE


class NotServed(TutelageError, LookupError):
    """A valid request for something that this server does not serve."""

    status, exit_code = "FAILED_PRECONDITION", EXIT_USAGE


class NotFound(TutelageError, LookupError):
    """A name that nothing goes by."""

    status, exit_code = "NOT_FOUND", EXIT_USAGE


class Conflict(TutelageError, ValueError):
    """The same name for something else."""

    status, exit_code = "ALREADY_EXISTS", EXIT_USAGE


class IdentityMismatch(TutelageError, ValueError):
    """Teacher and student (or the teacher of before and of now) are not what they must be to each other."""

    status, exit_code = "FAILED_PRECONDITION", EXIT_USAGE


class NotAuthenticated(TutelageError, ValueError):
    """The peer does not know who asks, or the two do not agree on TLS."""

    status, exit_code = "UNAUTHENTICATED", EXIT_USAGE


class NotPermitted(TutelageError, ValueError):
    """The peer knows who asks, and does not let it."""

    status, exit_code = "PERMISSION_DENIED", EXIT_USAGE


class Overloaded(TutelageError, RuntimeError):
    """The server is full; the same request can be tried again, after `retry_after_milliseconds` if that is not 0."""

    status, exit_code = "RESOURCE_EXHAUSTED", EXIT_UNREACHABLE

    def __init__(self, message: str, field: str = "", retry_after_milliseconds: int = 0) -> None:
        Exception.__init__(self, message, field, retry_after_milliseconds)

    @property
    def retry_after_milliseconds(self) -> int:
        """When to try again; 0 if the server did not say."""
        return int(self.args[2])


class Unreachable(TutelageError, ConnectionError):
    """The peer does not answer, is starting, or is draining."""

    status, exit_code = "UNAVAILABLE", EXIT_UNREACHABLE


class Stalled(TutelageError, RuntimeError):
    """A peer that does not read what it asked for."""

    status, exit_code = "DEADLINE_EXCEEDED", EXIT_UNREACHABLE


class CorruptFrame(TutelageError, ValueError):
    """An answer that is damaged, out of order, or for something else; never used."""

    status, exit_code = "DATA_LOSS", EXIT_DATA


class DataError(TutelageError, ValueError):
    """A data file that is missing or holds what it must not."""

    status, exit_code = "FAILED_PRECONDITION", EXIT_DATA


class CheckpointError(TutelageError, OSError):
    """A checkpoint that is missing, incomplete, changed, or of another run."""

    status, exit_code = "FAILED_PRECONDITION", EXIT_DATA

    def __str__(self) -> str:  # OSError's own would print the pair of arguments.
        return TutelageError.__str__(self)


_BY_STATUS: dict[str, type[TutelageError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "FAILED_PRECONDITION": NotServed,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": Conflict,
    "UNAUTHENTICATED": NotAuthenticated,
    "PERMISSION_DENIED": NotPermitted,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unreachable,
    "DATA_LOSS": CorruptFrame,
}


def error_of_status(status: str, message: str, field: str = "") -> TutelageError:
    """The exception that a peer's gRPC status stands for."""
    return _BY_STATUS.get(status, TutelageError)(message, field)


_NOT_SHOWN = re.compile("\x1b\\[[0-9;]*m|\x1b\\]8;[^\x1b\x07]*(\x1b\\\\|\x07)")
_LONGEST_LINE = 600
# By the names of a class and its bases, so that none of the libraries is imported; of two that fit, the first.
_KINDS: tuple[tuple[str, type[TutelageError], str], ...] = (
    ("builtins.UnicodeError", DataError, "a file is not UTF-8 ({}); convert it, for example with iconv -t utf-8"),
    (
        "builtins.ImportError",
        ConfigurationError,
        "{}; `tutelage doctor` says what each service needs and how to get it",
    ),
    ("safetensors._safetensors_rust.SafetensorError", DataError, "a file of weights is damaged ({}); fetch it again"),
    ("json.decoder.JSONDecodeError", DataError, "a file is not JSON ({})"),
    ("yaml.error.YAMLError", ConfigurationError, "a file is not YAML ({})"),
    ("jinja2.exceptions.TemplateError", ConfigurationError, "a chat template cannot be applied: {}"),
    ("pyarrow.lib.ArrowException", DataError, "{}"),
    ("polars.exceptions.PolarsError", DataError, "{}"),
    ("grpc.RpcError", Unreachable, "{}"),
    ("torch.OutOfMemoryError", TutelageError, "the device has too little memory: {}"),
    ("builtins.MemoryError", TutelageError, "there is too little memory: {}"),
    ("builtins.ConnectionError", Unreachable, "{}"),
    ("builtins.TimeoutError", Unreachable, "{}"),
    ("socket.gaierror", Unreachable, "{}"),
    ("builtins.OSError", DataError, "{}"),
    ("ray.exceptions.RayError", TutelageError, "{}"),
)
# transformers raises a plain ValueError for these.
_TEXTS: tuple[tuple[str, str], ...] = (
    (
        "trust_remote_code",
        "the model brings code of its own, which is not run; give one of an architecture that transformers has ({})",
    ),
    ("does not recognize this architecture", "the installed transformers does not know this model ({})"),
    ("Unrecognized model", "this is no model that transformers knows ({})"),
    ("Unrecognized configuration class", "this is no causal language model ({})"),
)


def as_known(error: BaseException) -> TutelageError | None:
    """The error of this table that says what another one means; None if it is of no known kind, and so a fault of ours.

    Of what Ray raises for a task or an actor, the cause counts.
    """
    if isinstance(error, TutelageError):
        return error
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return as_known(cause)
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, ValueError):
        for part, message in _TEXTS:
            if part in text:
                return ConfigurationError(message.format(text))
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__}
    for name, kind, message in _KINDS:
        if name in bases:
            return kind(message.format(text))
    return None


def one_line(text: str) -> str:
    """A text without line ends and colours, cut where nobody reads on."""
    line = " ".join(_NOT_SHOWN.sub("", text).split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"
