"""Teachers for tests of the trainer: one in this process, and a gRPC server in front of it that can misbehave.

The numbers are those of a real (tiny) model in transformers; only the engine and the network are left out.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tutelage.identity import tokenizer_digests, vocabulary_size, weights_digest
from tutelage.rpc import codec
from tutelage.rpc.transport import INSTANCE_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as rpc
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays


class InProcessTeacher:
    """A `Teacher` without engine or network; each sequence is scored alone, so its answers are bit-stable."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._matrix = self._model.lm_head.weight.detach().to(torch.bfloat16)
        self.identity = TeacherIdentity(
            folder.name, weights_digest(folder), vocabulary_size(folder), self._matrix.shape[1], 0.0
        )
        self.waited_seconds = 0.0
        self.sequences_scored = 0

    def unembedding(self) -> UnembeddingArrays:
        return UnembeddingArrays(self._matrix.view(torch.uint16).numpy(), None, 1.0, 0.0)

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        self.sequences_scored += len(sequences)
        return [self.signals(sequence, spec) for sequence in sequences]

    @torch.no_grad()
    def signals(self, sequence: TokenSequence, spec: SignalSpec) -> SignalArrays:
        ids = torch.from_numpy(np.array(sequence.ids, np.int64))[None]
        hidden = self._model.model(ids).last_hidden_state[0, sequence.start : sequence.end]
        hidden = hidden.to(torch.bfloat16)
        if spec.kind == "hidden":
            return {"hidden_RD": hidden.view(torch.uint16).numpy()}
        logits = hidden.float() @ self._matrix.float().T
        logsumexp = torch.stack([(logits / t).logsumexp(-1) for t in spec.temperatures], dim=-1).numpy()
        following = ids[0, sequence.start + 1 : sequence.end + 1]
        target_logits = logits[: len(following)].gather(-1, following[:, None])[:, 0].numpy()
        both = {"target_logits": target_logits, "logsumexp_RM": logsumexp}
        if spec.kind == "topk":
            top = logits.topk(spec.k)
            return {"ids_RK": top.indices.to(torch.int32).numpy(), "logits_RK": top.values.numpy(), **both}
        wanted = torch.from_numpy(np.array(sequence.candidate_ids_RC, np.int64))
        chosen = logits.gather(-1, wanted.clamp(min=0)).masked_fill(wanted < 0, -torch.inf)
        return {"logits_RK": chosen.numpy(), **both}


Mischief = Callable[[list[pb.ScoreSequencesResponse]], list[pb.ScoreSequencesResponse]]
"""From the frames that a request should get to those that it gets."""


class FaultyServicer(rpc.TeacherServiceServicer):
    """Serves an `InProcessTeacher`, two rows a frame, with the mischief that a test wants."""

    def __init__(self, teacher: InProcessTeacher, folder: Path) -> None:
        self._teacher = teacher
        self.mischief: Mischief = list
        self.abort_after_frames: list[int] = []
        """One number a stream: break it with UNAVAILABLE after so many frames."""
        self.refusals: list[pb.Refusal] = []
        """Sent instead of answers, one after the other."""
        self.spoil_unembedding = False
        self.info = self._announce(folder)

    def _announce(self, folder: Path) -> pb.GetTeacherInfoResponse:
        identity, head = self._teacher.identity, self._teacher.unembedding()
        return pb.GetTeacherInfoResponse(
            model_name=identity.model_name,
            instance_id="a process",
            weights_digest=identity.weights_digest,
            tokenizer_digests=tokenizer_digests(folder),
            vocabulary_size=identity.vocabulary_size,
            hidden_size=identity.hidden_size,
            roles=[pb.TEACHER_ROLE_SCORE],
            limits=pb.Limits(max_k=64),
            noise_floor=pb.NoiseFloor(max_kl=1e-4, canary_token_ids=range(10, 30)),
            unembedding=pb.Unembedding(
                rows=len(head.rows_VD),
                columns=identity.hidden_size,
                dtype=pb.DTYPE_BFLOAT16,
                digest=hashlib.sha256(head.rows_VD.tobytes()).hexdigest(),
                logit_scale=1.0,
            ),
        )

    def GetTeacherInfo(self, request, context):  # noqa: N802
        return self.info

    def GetTeacherUsage(self, request, context):  # noqa: N802
        return pb.GetTeacherUsageResponse()

    def GetUnembedding(self, request, context):  # noqa: N802
        rows = self._teacher.unembedding().rows_VD
        for start in range(request.row_start, len(rows), 200):
            tensor = codec.encode(rows[start : start + 200], bfloat16=True)
            crc = zlib.crc32(b"", zlib.crc32(tensor.data))
            if self.spoil_unembedding:
                tensor.data = b"\1" + tensor.data[1:]
                crc = zlib.crc32(tensor.data)
            yield pb.GetUnembeddingResponse(row_start=start, rows=tensor, checksum=crc, last=start + 200 >= len(rows))

    def ScoreSequences(self, request_iterator, context):  # noqa: N802
        context.send_initial_metadata([(INSTANCE_METADATA_KEY, self.info.instance_id)])
        budget = self.abort_after_frames.pop(0) if self.abort_after_frames else None
        for request in request_iterator:
            for response in self.mischief(self._answer(request)):
                if budget == 0:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
                budget = None if budget is None else budget - 1
                yield response

    def _answer(self, request: pb.ScoreSequencesRequest) -> list[pb.ScoreSequencesResponse]:
        if self.refusals:
            return [pb.ScoreSequencesResponse(request_id=request.request_id, refusal=self.refusals.pop(0))]
        ids = codec.decode(request.token_ids)
        candidates = None
        if request.signal.HasField("candidate_ids"):
            candidates = codec.decode(request.signal.candidate_ids)
        asked = TokenSequence(ids, request.score_start, request.score_end or len(ids), candidates)
        kind = pb.SignalKind.Name(request.signal.kind).removeprefix("SIGNAL_KIND_").lower()
        spec = SignalSpec(kind, request.signal.k, tuple(request.signal.temperatures))
        frames = frames_of(self._teacher.signals(asked, spec), asked, request.signal.kind)
        return [pb.ScoreSequencesResponse(request_id=request.request_id, frame=frame) for frame in frames]


def frames_of(
    signals: SignalArrays, sequence: TokenSequence, kind: int, rows_per_frame: int = 2
) -> list[pb.SignalFrame]:
    """The contract's frames of some rows."""
    total = sequence.rows
    frames = []
    for start in range(0, total, rows_per_frame):
        rows = slice(start, min(start + rows_per_frame, total))
        frame = pb.SignalFrame(
            frame_index=len(frames),
            position_start=sequence.start + start,
            position_count=rows.stop - rows.start,
            last=rows.stop == total,
            sequence_digest=sequence.digest,
            kind=kind,
        )
        for field, array in (
            ("ids", signals.get("ids_RK")),
            ("logits", signals.get("logits_RK")),
            ("target_logits", signals.get("target_logits")),
            ("logsumexp", signals.get("logsumexp_RM")),
        ):
            if array is not None:
                getattr(frame, field).CopyFrom(codec.encode(array[rows]))
        if "hidden_RD" in signals:
            frame.hidden.CopyFrom(codec.encode(signals["hidden_RD"][rows], bfloat16=True))
        frame.checksum = codec.frame_checksum(frame)
        frames.append(frame)
    return frames


@contextmanager
def serving(servicer: rpc.TeacherServiceServicer, address: str = "127.0.0.1:0") -> Iterator[str]:
    """Serves on loopback and gives the address."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    rpc.add_TeacherServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
