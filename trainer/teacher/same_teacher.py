"""Whether a server is the teacher that a run learns from: its digests, and a canary that it answers like the others.

Digests say which weights and which tokenizer; the same weights computed in another way (quantized when they were
loaded, by an engine with a fault) give another teacher, which only its answers show. So every server scores the same
short text, and may differ by what the first one announces as its noise floor.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tutelage.errors import CorruptFrame, IdentityMismatch, NotServed
from tutelage.identity import require_same_template, require_same_tokenizer
from tutelage.rpc.transport import error_of_refusal
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec
from tutelage.trainer.teacher.connection import Connection
from tutelage.trainer.teacher.frame_decoder import Answer, to_message

_CANARY_IDS = 64
_CANARY_SECONDS = 60.0  # an engine that is busy with others' sequences comes to it later
# Of float32 logits and log-sum-exps of 10⁵ terms, added in another order.
_ROUNDING_KL = 1e-5


class SameTeacher:
    """What a server must be to take part; the first that is right says what the others are compared with.

    Args:
        tokenizer_digests: of the student.
        chat_template_digest: of the student's template, if the teacher must have it too; empty if it need not.
        weights_digest: of the teacher that this run began with; empty if it begins now.
        canary: whether to compare answers, which takes several servers.

    """

    def __init__(
        self,
        *,
        tokenizer_digests: Mapping[str, str],
        chat_template_digest: str,
        weights_digest: str,
        canary: bool,
    ) -> None:
        self._tokenizer_digests, self._template_digest = tokenizer_digests, chat_template_digest
        self._weights_digest, self._compares = weights_digest, canary
        self._canary: tuple[TokenSequence, SignalArrays] | None = None
        self.info: pb.GetTeacherInfoResponse | None = None
        """What the first server announced that was right."""

    def require(self, info: pb.GetTeacherInfoResponse, connection: Connection) -> None:
        """Refuses a server that is another teacher.

        Args:
            info: what it announced.
            connection: to ask it.

        Raises:
            IdentityMismatch: its weights, tokenizer, chat template or answers are not the teacher's.
            NotServed: it does not score.
            TutelageError: it does not answer the canary.

        """
        where = connection.address
        if pb.TEACHER_ROLE_SCORE not in info.roles:
            raise NotServed(f"the teacher at {where} does not score; serve it with the role score", "roles")
        require_same_tokenizer(info.tokenizer_digests, self._tokenizer_digests)
        require_same_template(info.chat_template_digest, self._template_digest)
        expected = self._weights_digest or (self.info.weights_digest if self.info else info.weights_digest)
        if info.weights_digest != expected:
            raise IdentityMismatch(
                f"the teacher at {where} has weights {info.weights_digest[:12]}…, but this run began with "
                f"{expected[:12]}…; serve that teacher again, or begin a new run in another output folder",
                "teacher",
            )
        if self.info is None:
            if self._compares and len(info.noise_floor.canary_token_ids) > 0:
                self._canary = _likeliest(info, connection)
            self.info = info
        elif self._canary is not None:
            self._require_alike(self.info, *self._canary, info, connection)

    @staticmethod
    def _require_alike(
        first: pb.GetTeacherInfoResponse,
        canary: TokenSequence,
        expected: SignalArrays,
        info: pb.GetTeacherInfoResponse,
        connection: Connection,
    ) -> None:
        given = _ask(canary, SignalSpec("candidates", temperatures=(1.0,)), info, connection)
        kl = bucketed_kl(expected, given)
        floor = max(first.noise_floor.max_kl, info.noise_floor.max_kl) + _ROUNDING_KL
        if not kl <= floor:  # also if it is no number
            raise IdentityMismatch(
                f"the teacher at {connection.address} has the weights of this run's teacher, but answers otherwise: KL "
                f"{kl:.2g} nats a token on {canary.rows} tokens, where the noise floor allows {floor:.2g}; serve it "
                "with the dtype, quantization and version of vLLM that the others have",
                "teacher",
            )


def bucketed_kl(expected: SignalArrays, given: SignalArrays) -> float:
    """Mean KL, nats a token, of two answers about the same ids and the tail beside them; at most the whole KL.

    Args:
        expected: `topk` or `candidates` at temperature 1.
        given: about the same ids.

    """
    p_RK, q_RK = (
        np.exp(answer["logits_RK"].astype(np.float64) - answer["logsumexp_RM"].astype(np.float64))
        for answer in (expected, given)
    )
    # The tail is what rounding leaves of 1, so one that is nothing but rounding is left out.
    p_tail_R, q_tail_R = (np.maximum(1.0 - mass_RK.sum(axis=1), 1e-6) for mass_RK in (p_RK, q_RK))
    kl_R = (p_RK * np.log(p_RK / q_RK)).sum(axis=1) + p_tail_R * np.log(p_tail_R / q_tail_R)
    return float(kl_R.mean())


def _likeliest(info: pb.GetTeacherInfoResponse, connection: Connection) -> tuple[TokenSequence, SignalArrays]:
    """The canary with the ids that the first server finds likeliest, and its answer about them."""
    ids = np.array(info.noise_floor.canary_token_ids, np.int32)
    sequence = TokenSequence(ids, 0, len(ids))
    spec = SignalSpec("topk", min(info.limits.max_k, info.vocabulary_size, _CANARY_IDS), (1.0,))
    answer = _ask(sequence, spec, info, connection)
    return TokenSequence(ids, 0, len(ids), candidate_ids_RC=answer["ids_RK"]), answer


def _ask(
    sequence: TokenSequence, spec: SignalSpec, info: pb.GetTeacherInfoResponse, connection: Connection
) -> SignalArrays:
    answer = Answer(sequence, spec, info.vocabulary_size, info.hidden_size)
    for response in connection.score(to_message("canary", sequence, spec), info.instance_id, _CANARY_SECONDS):
        if response.WhichOneof("outcome") == "refusal":
            raise error_of_refusal(response.refusal)
        answer.add(response.frame)
        if answer.complete:
            return answer.arrays()
    raise CorruptFrame(f"the teacher at {connection.address} ended the stream with the canary unanswered", "last")
