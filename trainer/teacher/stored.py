"""A teacher that is a folder: answers from stored hidden states, exactly, with every kind of signal.

What a teacher server (or `tutelage teacher precompute`) has stored is enough for all objectives, temperatures and
noises over the same sequences; sequences that nobody has stored need a teacher.

Shapes: the legend in docs/architecture.md; R scored positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.signal_store import Prefixes, chain, find_teacher, read_block, read_teacher, starts_of_blocks
from tutelage.errors import DataError, IdentityMismatch
from tutelage.identity import require_same_template, require_same_tokenizer
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays
from tutelage.trainer.teacher.frame_decoder import joined
from tutelage.trainer.teacher.rows import Unembedding

# Float32 logits of 128 rows over 49,152 ids; a sequence's at once would be hundreds of MiB.
_CHUNK_LOGITS_BYTES = 24 * 2**20


class StoredTeacher:
    """A `Teacher` behind a signal store.

    Args:
        folder: the store, with the states of one teacher, or one teacher's folder in it.
        tokenizer_digests: of the student; must equal the teacher's.
        chat_template_digest: of the student's template, if the teacher must have it too; empty if it need not.

    Raises:
        CorruptFrame: the folder's description of its teacher is damaged.
        DataError: the folder does not hold the states of one teacher.
        IdentityMismatch: the student has another tokenizer.

    """

    waited_seconds = 0.0

    def __init__(self, folder: Path, *, tokenizer_digests: Mapping[str, str], chat_template_digest: str = "") -> None:
        self._folder = find_teacher(folder)
        self._starts = starts_of_blocks(self._folder)
        stored = read_teacher(self._folder)
        require_same_tokenizer(stored.info.tokenizer_digests, tokenizer_digests)
        require_same_template(stored.info.chat_template_digest, chat_template_digest)
        announced = stored.info.unembedding
        self._arrays = UnembeddingArrays(stored.rows_VD, stored.bias_V, announced.logit_scale, announced.logit_softcap)
        self._head: Unembedding | None = None
        self.identity = TeacherIdentity(
            stored.info.model_name,
            stored.info.weights_digest,
            stored.info.vocabulary_size,
            stored.info.hidden_size,
            stored.info.noise_floor.mean_kl,
            tuple(stored.info.end_token_ids),
        )

    def unembedding(self) -> UnembeddingArrays:
        """As `Teacher.unembedding`."""
        return self._arrays

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`.

        Raises:
            CorruptFrame: a file of the store is damaged.
            DataError: a sequence is not stored.

        """
        return [self._arrays_of(sequence, spec) for sequence in sequences]

    def _arrays_of(self, sequence: TokenSequence, spec: SignalSpec) -> SignalArrays:
        hidden_RD = self._states(Prefixes(sequence.ids), sequence.start, sequence.end)
        if hidden_RD.shape[1] != self.identity.hidden_size:
            raise IdentityMismatch(f"stored states have {hidden_RD.shape[1]} numbers", "signals_from")
        if spec.kind == "hidden":
            return {"hidden_RD": hidden_RD}
        rows = max(1, _CHUNK_LOGITS_BYTES // (4 * self.identity.vocabulary_size))
        starts = range(0, len(hidden_RD), rows)
        return joined([self._part(sequence, spec, hidden_RD, slice(start, start + rows)) for start in starts])

    def _states(self, sequence: Prefixes, start: int, end: int) -> npt.NDArray[np.uint16]:
        """The stored states after tokens `start` … end-1."""
        blocks = chain(self._starts, sequence, start, end)
        if not blocks or blocks[-1][1] < end:  # a server may have stored it in the meantime
            self._starts = starts_of_blocks(self._folder)
            blocks = chain(self._starts, sequence, start, end)
        try:
            parts = [read_block(self._folder, sequence, *block) for block in blocks]
        except FileNotFoundError:  # a server may have deleted it in the meantime
            parts = []
        if not parts or blocks[-1][1] < end:
            raise DataError(
                f"a sequence of {len(sequence)} tokens is not stored in {self._folder}; fill the store with "
                "`tutelage teacher precompute` for this data, template and batch.max_tokens, or train with a teacher",
                "signals_from",
            )
        return np.concatenate(parts)[start - blocks[0][0] : end - blocks[0][0]]

    def _part(
        self, sequence: TokenSequence, spec: SignalSpec, hidden_RD: npt.NDArray[np.uint16], rows: slice
    ) -> SignalArrays:
        """What some of the sequence's rows are, of `topk` or `candidates`."""
        logits_RV = self._float_head().logits(torch.from_numpy(hidden_RD[rows].copy()).view(torch.bfloat16))
        following = sequence.ids[sequence.start + 1 : sequence.end + 1][rows]
        targets = torch.from_numpy(following.astype(np.int64))
        target_logits = logits_RV[: len(targets)].gather(1, targets[:, None])[:, 0]
        logsumexp_RM = torch.stack([(logits_RV / T).logsumexp(1) for T in spec.temperatures], dim=1)
        both = {"target_logits": target_logits.numpy(), "logsumexp_RM": logsumexp_RM.numpy()}
        if sequence.candidate_ids_RC is None:
            logits_RK, ids_RK = logits_RV.topk(spec.k)
            if spec.min_mass > 0:
                ids_RK, logits_RK = _kept(ids_RK, logits_RK, logsumexp_RM[:, 0], spec)
            return {"ids_RK": ids_RK.to(torch.int32).numpy(), "logits_RK": logits_RK.numpy(), **both}
        ids_RC = torch.from_numpy(sequence.candidate_ids_RC[rows].astype(np.int64))
        logits_RC = logits_RV.gather(1, ids_RC.clamp(min=0))
        return {"logits_RK": logits_RC.masked_fill(ids_RC < 0, -torch.inf).numpy(), **both}

    def _float_head(self) -> Unembedding:
        """The head in float32, so that logits are as exact as the server's; made when it is first needed."""
        if self._head is None:
            matrix_VD = torch.from_numpy(self._arrays.rows_VD)
            if matrix_VD.dtype == torch.uint16:
                matrix_VD = matrix_VD.view(torch.bfloat16)
            bias_V = None if self._arrays.bias_V is None else torch.from_numpy(self._arrays.bias_V)
            self._head = Unembedding(matrix_VD.float(), bias_V, self._arrays.scale, self._arrays.softcap)
        return self._head


def _kept(ids_RK: Tensor, logits_RK: Tensor, logsumexp_R: Tensor, spec: SignalSpec) -> tuple[Tensor, Tensor]:
    """The fewest ids that have `min_mass`, padded to the longest row."""
    mass_RK = (logits_RK / spec.temperatures[0] - logsumexp_R[:, None]).exp().cumsum(1)
    lengths_R = ((mass_RK < spec.min_mass).sum(1) + 1).clamp(max=spec.k)
    beyond_RK = torch.arange(int(lengths_R.max())) >= lengths_R[:, None]
    width = beyond_RK.shape[1]
    return ids_RK[:, :width].masked_fill(beyond_RK, -1), logits_RK[:, :width].masked_fill(beyond_RK, -torch.inf)
