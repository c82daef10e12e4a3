"""A signal store without a teacher server: the states that a tiny model computes in this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from trainer_doubles import InProcessTeacher
from tutelage.data.signal_store import Prefixes, teacher_key
from tutelage.identity import tokenizer_digests
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.signals.store import SignalStore
from tutelage.teacher_server.signals.unembedding import Unembedding
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec


def store_signals(folder: Path, model: Path, sequences: Iterable[list[int]]) -> None:
    """Fills a store with the states that `InProcessTeacher` computes."""
    teacher = InProcessTeacher(model)
    rows = torch.from_numpy(teacher.unembedding().rows_VD).view(torch.bfloat16)
    unembedding = Unembedding(rows, None, 1.0, 0.0)
    info = pb.GetTeacherInfoResponse(
        model_name="tiny",
        weights_digest=teacher.identity.weights_digest,
        tokenizer_digests=tokenizer_digests(model),
        vocabulary_size=teacher.identity.vocabulary_size,
        hidden_size=teacher.identity.hidden_size,
        unembedding=pb.Unembedding(digest=unembedding.digest, logit_scale=1.0),
    )
    store = SignalStore(folder, teacher_key(info.weights_digest, "float32", "here"), 10**9)
    for ids in sequences:
        (states,) = teacher.score([TokenSequence(np.array(ids, np.int32), 0, len(ids))], SignalSpec("hidden"))
        store.put(Prefixes(ids), torch.from_numpy(states["hidden_RD"].copy()).view(torch.bfloat16))
    store.describe(info, unembedding)
    store.close()
