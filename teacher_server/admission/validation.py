"""Checks every field of a request against the contract; nothing that passes can hurt the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tutelage.errors import CorruptFrame, InvalidRequest, NotServed
from tutelage.rpc.codec import decode
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.engine.base import Sampling

MAX_REQUEST_ID_BYTES = 128
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64
MAX_SAMPLING_TEMPERATURE = 2.0  # `SamplingParams` of vLLM refuses more


@dataclass(frozen=True)
class Signal:
    """A checked `SignalSpec`."""

    kind: pb.SignalKind.ValueType
    k: int
    temperatures: tuple[float, ...]
    candidate_ids_RC: npt.NDArray[np.int32] | None
    min_mass: float = 0.0
    """`topk`: if above 0, rows keep as many ids as have this mass, k at most."""
    mass_temperature: float = 0.0
    """At which it is measured; one of `temperatures`."""


@dataclass(frozen=True)
class Scoring:
    """A checked `ScoreSequencesRequest`."""

    token_ids: npt.NDArray[np.int32]
    signal: Signal
    start: int
    end: int


@dataclass(frozen=True)
class Generation:
    """A checked `WriteRationalesRequest`."""

    prompt_token_ids: npt.NDArray[np.int32]
    sampling: Sampling
    signal: Signal | None


class Validator:
    """What one server allows."""

    def __init__(
        self,
        limits: pb.Limits,
        *,
        vocabulary_size: int,
        kinds: Sequence[pb.SignalKind.ValueType],
        roles: Sequence[pb.TeacherRole.ValueType],
    ) -> None:
        self._limits = limits
        self._vocabulary_size = vocabulary_size
        self._kinds = kinds
        self._roles = roles

    def scoring(self, request: pb.ScoreSequencesRequest) -> Scoring:
        """A checked request.

        Raises:
            InvalidRequest: a field is outside what the contract allows; `field` is its path.
            NotServed: this server does not score, or does not serve the kind.

        """
        self.role(pb.TEACHER_ROLE_SCORE)
        check_request_id(request.request_id)
        token_ids = self._token_ids(request.token_ids, "token_ids", self._limits.max_sequence_tokens)
        length = len(token_ids)
        start, end = request.score_start, request.score_end or length
        _check(start < length, "score_start", start, f"0 to {length - 1}")
        _check(start < end <= length, "score_end", end, f"{start + 1} to {length}")
        return Scoring(token_ids, self._signal(request.signal, end - start), start, end)

    def generation(self, request: pb.WriteRationalesRequest) -> Generation:
        """A checked request.

        Raises:
            InvalidRequest: a field is outside what the contract allows; `field` is its path.
            NotServed: this server does not generate, or does not serve the signals asked for.

        """
        self.role(pb.TEACHER_ROLE_WRITE)
        check_request_id(request.request_id)
        _check(request.max_new_tokens >= 1, "max_new_tokens", request.max_new_tokens, "at least 1")
        room = self._limits.max_sequence_tokens - request.max_new_tokens
        _check(room >= 1, "max_new_tokens", request.max_new_tokens, f"below {self._limits.max_sequence_tokens}")
        prompt = self._token_ids(request.prompt_token_ids, "prompt_token_ids", room)
        signal = None
        if request.HasField("signal"):
            self.role(pb.TEACHER_ROLE_SCORE)
            if request.signal.kind == pb.SIGNAL_KIND_CANDIDATES:
                raise InvalidRequest("candidates of a sequence that is not generated yet; ask for topk or hidden, or "
                                     "score the finished sequence", "signal.kind")  # fmt: skip
            signal = self._signal(request.signal, rows=0)
        return Generation(prompt, self._sampling(request), signal)

    def role(self, role: pb.TeacherRole.ValueType) -> None:
        """Refuses what needs a role that this process does not play.

        Raises:
            NotServed: it does not.

        """
        if role not in self._roles:
            name = pb.TeacherRole.Name(role).removeprefix("TEACHER_ROLE_").lower()
            raise NotServed(f"this teacher was started without the role {name!r}; start it with --roles {name}")

    def unembedding_row(self, request: pb.GetUnembeddingRequest) -> int:
        """The first row to send.

        Raises:
            InvalidRequest: there is no such row.
            NotServed: this server does not score.

        """
        self.role(pb.TEACHER_ROLE_SCORE)
        row = request.row_start
        _check(row < self._vocabulary_size, "row_start", row, f"0 to {self._vocabulary_size - 1}")
        return row

    def _token_ids(self, tensor: pb.Tensor, field: str, most: int) -> npt.NDArray[np.int32]:
        ids = _int32(tensor, field, dimensions=1)
        _check(1 <= len(ids) <= most, field, f"{len(ids)} tokens", f"1 to {most} tokens")
        outside = ids[(ids < 0) | (ids >= self._vocabulary_size)]
        _check(len(outside) == 0, field, f"id {outside[:1]}", f"ids in [0, {self._vocabulary_size})")
        return ids

    def _signal(self, spec: pb.SignalSpec, rows: int) -> Signal:
        _check(spec.kind in pb.SignalKind.values() and spec.kind != 0, "signal.kind", spec.kind, "a SignalKind")
        if spec.kind not in self._kinds:
            raise NotServed(f"{pb.SignalKind.Name(spec.kind)} is not served here", "signal.kind")
        if spec.kind == pb.SIGNAL_KIND_TOPK:
            _check(1 <= spec.k <= self._limits.max_k, "signal.k", spec.k, f"1 to {self._limits.max_k}")
        else:
            _check(spec.k == 0, "signal.k", spec.k, "0 for this kind")
        temperatures = self._temperatures(spec)
        mass = _mass(spec, temperatures)
        return Signal(spec.kind, spec.k, temperatures, self._candidates(spec, rows), *mass)

    def _temperatures(self, spec: pb.SignalSpec) -> tuple[float, ...]:
        given, field = tuple(spec.temperatures), "signal.temperatures"
        if spec.kind == pb.SIGNAL_KIND_HIDDEN:
            _check(not given, field, list(given), "none for hidden states")
            return ()
        most = self._limits.max_temperatures
        _check(1 <= len(given) <= most, field, f"{len(given)} of them", f"1 to {most}")
        _check(all(math.isfinite(T) and T > 0 for T in given), field, list(given), "finite and above 0")
        _check(len(set(given)) == len(given), field, list(given), "no two alike")
        return given

    def _candidates(self, spec: pb.SignalSpec, rows: int) -> npt.NDArray[np.int32] | None:
        field = "signal.candidate_ids"
        if spec.kind != pb.SIGNAL_KIND_CANDIDATES:
            _check(not spec.HasField("candidate_ids"), field, "some", "none for this kind")
            return None
        ids = _int32(spec.candidate_ids, field, dimensions=2)
        _check(len(ids) == rows, field, f"{len(ids)} rows", f"{rows}, one a scored position")
        most = self._limits.max_k
        _check(1 <= ids.shape[1] <= most, field, f"{ids.shape[1]} columns", f"1 to {most}")
        outside = ids[(ids < -1) | (ids >= self._vocabulary_size)]
        _check(len(outside) == 0, field, f"id {outside[:1]}", f"ids in [0, {self._vocabulary_size}), or -1 as padding")
        return ids

    def _sampling(self, request: pb.WriteRationalesRequest) -> Sampling:
        samples, temperature, top_p = request.samples or 1, request.temperature, request.top_p or 1.0
        most = self._limits.max_samples
        _check(samples <= most, "samples", samples, f"at most {most}")
        allowed = 0 <= temperature <= MAX_SAMPLING_TEMPERATURE  # false for NaN, as it should be
        _check(allowed, "temperature", temperature, f"0 to {MAX_SAMPLING_TEMPERATURE}")
        _check(temperature > 0 or samples == 1, "samples", samples, "1 at temperature 0, where all would be alike")
        _check(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
        _check(len(request.stop) <= MAX_STOPS, "stop", f"{len(request.stop)} strings", f"at most {MAX_STOPS}")
        for index, stop in enumerate(request.stop):
            allowed = 1 <= len(stop) <= MAX_STOP_CHARACTERS
            _check(allowed, f"stop[{index}]", f"{len(stop)} characters", f"1 to {MAX_STOP_CHARACTERS}")
        return Sampling(
            samples=samples,
            max_new_tokens=request.max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            # vLLM adds the sample's index (`ParentRequest`), and torch takes seeds below 2**64.
            seed=request.seed % 2**63,
            stop=tuple(request.stop),
        )


def check_request_id(request_id: str) -> None:
    """Refuses an id that is empty or long.

    Raises:
        InvalidRequest: it is.

    """
    size = len(request_id.encode())
    _check(1 <= size <= MAX_REQUEST_ID_BYTES, "request_id", f"{size} bytes", f"1 to {MAX_REQUEST_ID_BYTES} bytes")


def _mass(spec: pb.SignalSpec, temperatures: Sequence[float]) -> tuple[float, float]:
    """Mass to keep and the temperature at which it is measured; zeros if k is fixed."""
    mass, temperature = spec.min_mass, spec.mass_temperature
    if spec.kind != pb.SIGNAL_KIND_TOPK or mass == 0:
        _check(mass == 0, "signal.min_mass", mass, "0 for this kind")
        _check(temperature == 0, "signal.mass_temperature", temperature, "0 without min_mass")
        return 0.0, 0.0
    _check(0 < mass <= 1, "signal.min_mass", mass, "above 0, at most 1; 0 for a fixed k")  # false for NaN
    allowed = f"one of signal.temperatures, {list(temperatures)}"
    _check(temperature in temperatures, "signal.mass_temperature", temperature, allowed)
    return mass, temperature


def _int32(tensor: pb.Tensor, field: str, *, dimensions: int) -> npt.NDArray[np.int32]:
    _check(tensor.dtype == pb.DTYPE_INT32, f"{field}.dtype", tensor.dtype, f"{pb.DTYPE_INT32} (DTYPE_INT32)")
    _check(len(tensor.shape) == dimensions, f"{field}.shape", list(tensor.shape), f"{dimensions} axes")
    try:
        return decode(tensor, field)
    except CorruptFrame as error:
        raise InvalidRequest(error.message, f"{field}.data") from error


def _check(allowed: bool, field: str, given: object, expected: str) -> None:
    if not allowed:
        raise InvalidRequest(f"given {given}, allowed: {expected}", field)
