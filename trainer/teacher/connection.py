"""One server of a teacher: what it can be asked, and a stream of requests whose answers are delivered as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from tutelage.errors import NotServed, TutelageError, Unreachable
from tutelage.rpc.tls import ClientTls
from tutelage.rpc.transport import (
    ADAPTER_METADATA_KEY,
    INSTANCE_METADATA_KEY,
    STUDENT_METADATA_KEY,
    Endpoint,
    error_of_rpc,
    open_channel,
    token_metadata,
)
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as rpc

_INFO_TIMEOUT_SECONDS = 5.0

Outcome = pb.ScoreSequencesResponse | TutelageError | None
"""A response, why there will be no more of them, or None: the server ended the stream in order."""
Deliver = Callable[["ScoreStream", Outcome], None]


class Connection:
    """A channel to one server; errors of its calls are `TutelageError`s that name its address.

    Args:
        endpoint: where it is.
        student_id: under which the server counts the work.
        adapter: name of the teacher's LoRA adapter; none means the base model.
        tls: how to know the server; none means an unencrypted connection.
        token_file: file with our bearer token, read again before each call.

    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        student_id: str,
        adapter: str | None = None,
        tls: ClientTls | None = None,
        token_file: Path | None = None,
    ) -> None:
        self.address = endpoint.address
        self._token_file = token_file
        named = () if adapter is None else ((ADAPTER_METADATA_KEY, adapter),)
        self._about = ((STUDENT_METADATA_KEY, student_id), *named)
        self._channel = open_channel(endpoint.address, tls, certified_name=endpoint.name)
        self._stub = rpc.TeacherServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection and all that is under way on it."""
        self._channel.close()

    def info(self) -> pb.GetTeacherInfoResponse:
        """Who answers there.

        Raises:
            Unreachable: nobody, or a server that loads or drains.
            TutelageError: it refuses to say.

        """
        try:
            return self._stub.GetTeacherInfo(
                pb.GetTeacherInfoRequest(), timeout=_INFO_TIMEOUT_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_of_rpc(error, self.address, "teacher") from error

    def unembedding(self, row_start: int, timeout_seconds: float) -> Iterator[pb.GetUnembeddingResponse]:
        """Chunks of the unembedding from a row on; raises as `info`."""
        request = pb.GetUnembeddingRequest(row_start=row_start)
        try:
            yield from self._stub.GetUnembedding(request, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_rpc(error, self.address, "teacher") from error

    def stream(self, instance_id: str, deliver: Deliver) -> ScoreStream:
        """A stream of requests to the process of that id.

        Args:
            instance_id: of the server that was found to be the teacher.
            deliver: given each response, and what ended the stream, in another thread; nothing after the end.

        """
        requests: SimpleQueue[pb.ScoreSequencesRequest | None] = SimpleQueue()
        call = self._stub.ScoreSequences(iter(requests.get, None), metadata=self._metadata)
        return ScoreStream(self.address, instance_id, requests, call, deliver)

    def score(
        self, message: pb.ScoreSequencesRequest, instance_id: str, timeout_seconds: float
    ) -> Iterator[pb.ScoreSequencesResponse]:
        """Responses to one request of its own, each within a time; raises as `info`."""
        outcomes: SimpleQueue[Outcome] = SimpleQueue()
        stream = self.stream(instance_id, lambda _, outcome: outcomes.put(outcome))
        try:
            stream.send(message)
            stream.finish()
            while (outcome := outcomes.get(timeout=timeout_seconds)) is not None:
                if isinstance(outcome, TutelageError):
                    raise outcome
                yield outcome
        except Empty as error:
            raise Unreachable(f"the teacher at {self.address} said nothing for {timeout_seconds:.0f} s") from error
        finally:
            stream.close()

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self._about, *token_metadata(self._token_file))


class ScoreStream:
    """A `ScoreSequences` call whose answers all come from one process, which is the one that was meant."""

    def __init__(
        self,
        address: str,
        instance_id: str,
        requests: SimpleQueue[pb.ScoreSequencesRequest | None],
        call: Any,
        deliver: Deliver,
    ) -> None:
        self._address, self._instance_id = address, instance_id
        self._requests, self._call, self._deliver = requests, call, deliver
        self.finished = False
        """Whether no more may be asked."""
        threading.Thread(target=self._read, name=f"answers-{address}", daemon=True).start()

    def send(self, message: pb.ScoreSequencesRequest) -> None:
        """Asks for one more."""
        self._requests.put(message)

    def finish(self) -> None:
        """Asks for no more; what was asked is answered."""
        if not self.finished:
            self.finished = True
            self._requests.put(None)

    def close(self) -> None:
        """Ends it. Else the server would go on computing for a stream that nobody reads."""
        self.finish()
        self._call.cancel()

    def _read(self) -> None:
        outcome: Outcome = None
        try:
            for number, response in enumerate(self._call):
                # The channel reconnects by itself, perhaps to a server that was started anew as another teacher.
                if number == 0:
                    self._require_same_instance()
                self._deliver(self, response)
        except grpc.RpcError as error:
            outcome = error_of_rpc(error, self._address, "teacher")
        except TutelageError as error:
            outcome = error
        self._deliver(self, outcome)

    def _require_same_instance(self) -> None:
        answering = dict(self._call.initial_metadata()).get(INSTANCE_METADATA_KEY)
        if answering is None:
            raise NotServed(
                f"the teacher at {self._address} does not say which process answers; is it an older version?"
            )
        if answering != self._instance_id:
            raise Unreachable(f"the teacher at {self._address} was started anew")
