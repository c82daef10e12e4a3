"""What a scored token costs on its way from the teacher's logits to the student's arrays, apart from the model.

    python benchmarks/teacher_wire_cost.py [--tokens 256] [--sequences 16] [--rounds 5]

Two ways from the same float32 logits, k = 64, one thread each, in one run:

    TRL 1.16  its own client, `VLLMClient.get_sequence_logprobs`, and the arrays that its trainer makes of the answer;
              behind it, over HTTP, what `vllm serve` does between logits and answer: vLLM's own sampler, logprobs
              processor and response models, FastAPI and uvicorn
    ours      the trainer's own client, with all its checks; behind it the whole server, but for the engine and the
              signal head, whose results are given

"kept" is from logits to the k kept ids and values; "path" is from those to the student's arrays. Processor time of all
threads, client and server together. Also prints the bytes that cross the wire, protobuf included. TRL's wheel is
unpacked below `build/` the first time. Exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from packaged_models import PACKAGED, model_folder  # noqa: E402

K, VOCABULARY_SIZE, HIDDEN_SIZE = 64, 49152, 576  # SmolLM2-135M's
PROMISED_RATIO = 50
PROMISED_BYTES = {"topk": 400, "hidden": 2 * HIDDEN_SIZE + 16}
TRL = ROOT / "build" / "trl-1.16.0-wheel"


def processor_us(work: Callable[[], Any], tokens: int, rounds: int) -> float:
    """Processor microseconds a token, all threads of this process together: the least of some rounds."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1e6 * min(times) / tokens


def loopback_bytes(work: Callable[[], Any]) -> int:
    """Bytes through the loopback device, headers of all layers included."""
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    work()
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before


# --- TRL's way ---------------------------------------------------------------------------------------------------


def import_trl() -> Any:
    """TRL's client class."""
    if not TRL.exists():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(TRL), "trl==1.16.0"]
        subprocess.run(pip, check=True)
    sys.path.append(str(TRL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it knows vLLM up to 0.31
        from trl.generation.vllm_client import VLLMClient
    return VLLMClient


def vllm_kept(logits_TV: torch.Tensor, token_ids: list[int]) -> Any:
    """What vLLM's worker keeps of logits: the k largest log-probabilities, the target token's, its rank."""
    from vllm.v1.sample.sampler import Sampler

    logprobs = Sampler.compute_logprobs(logits_TV)
    return Sampler.gather_logprobs(logprobs, K, torch.tensor(token_ids[1:]))


def vllm_answer(kept: list[Any], tokenizer: Any) -> dict[str, Any]:
    """What vLLM's front end makes of them: objects, a response, and the dictionary that is printed as JSON."""
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
    from vllm.entrypoints.serve.engine.protocol import UsageInfo
    from vllm.v1.engine.logprobs import LogprobsProcessor

    choices = []
    for index, tensors in enumerate(kept):
        processor = LogprobsProcessor(tokenizer, None, [None], None, None, K)
        processor._update_prompt_logprobs(tensors)
        choices.append(CompletionResponseChoice(index=index, text="", prompt_logprobs=processor.prompt_logprobs))
    return CompletionResponse(model="teacher", choices=choices, usage=UsageInfo()).model_dump()


@contextmanager
def vllm_front_end(kept: list[Any], tokenizer: Any) -> Iterator[str]:
    """An HTTP server that answers as `vllm serve` does, with what was kept; its address."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    app = FastAPI()
    app.get("/health")(lambda: {})
    app.get("/v1/models")(lambda: {"data": [{"id": "teacher"}]})

    async def complete(request: dict[str, Any]) -> JSONResponse:
        assert len(CompletionRequest(**request).prompt) == len(kept)
        return JSONResponse(vllm_answer(kept, tokenizer))

    complete.__annotations__ = {"request": dict, "return": JSONResponse}  # FastAPI reads them
    app.post("/v1/completions")(complete)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def trl_arrays(client: Any, sequences: list[list[int]]) -> list[np.ndarray]:
    """What TRL's trainer has in the end: log-probabilities and ids of all sequences."""
    answer = client.get_sequence_logprobs(sequences, [1] * len(sequences), top_logprobs=K)
    dtypes = {"logprobs": np.float32, "logprob_token_ids": np.int64, "actual_logprobs": np.float32}
    return [np.array(rows, dtype=dtype) for name, dtype in dtypes.items() for rows in answer[name]]


# --- our way -----------------------------------------------------------------------------------------------------


@contextmanager
def our_client(teacher: Any) -> Iterator[Any]:
    """A trainer's client of a server, which runs in a thread."""
    from fake_teacher import serving
    from tutelage.trainer.teacher.grpc_client import TeacherClient

    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address: list[str] = []

    async def serve() -> None:
        async with serving(teacher) as server:
            address.append(server.address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    with TeacherClient(address[0], student_id="cost", wait_seconds=60, tokenizer_digests={}) as client:
        yield client
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def given_teacher(states_STD: torch.Tensor, signals: list[Any]) -> Any:
    """A teacher that knows states and signals of the sequences whose tokens begin with 0, 1, 2 and so on."""
    from fake_teacher import FakeScoringEngine, fake_head, fake_teacher
    from tutelage.teacher_server.config import TeacherConfig
    from tutelage.teacher_server.engine.base import ComputedStates
    from tutelage.teacher_server.model.teacher import Teacher, generation_queue, scoring_parts
    from tutelage.teacher_server.signals.logit_head import SignalHead, Signals

    class GivenStates(FakeScoringEngine):
        async def hidden_states(self, token_ids: Any, first: int = 0, salt: str = "") -> ComputedStates:
            return ComputedStates(states_STD[token_ids[0]], 0, len(token_ids))

    class GivenSignals(SignalHead):
        def topk(self, hidden_RD: torch.Tensor, *_: Any, **__: Any) -> Signals:
            return signals[int(hidden_RD[0, 0])]

    config = TeacherConfig(model="given")
    head = GivenSignals(fake_head().unembedding, device="cpu")
    head.vocabulary_size, head.hidden_size = VOCABULARY_SIZE, states_STD.shape[-1]
    info = fake_teacher(FakeScoringEngine()).info
    info.vocabulary_size, info.hidden_size = head.vocabulary_size, head.hidden_size
    info.limits.frame_bytes = config.frame_bytes
    parts = scoring_parts(GivenStates(), head, config, None)
    return Teacher(info, parts, None, generation_queue(config), [])


def our_kept(logits_TV: torch.Tensor, token_ids: list[int]) -> Any:
    """What our signal head keeps of logits."""
    return given_logits_head().topk(logits_TV, token_ids[1:], k=K, temperatures=(1.0,))


@functools.cache
def given_logits_head() -> Any:
    """A signal head that takes logits for hidden states; one for all sequences, as a server has it."""
    from tutelage.teacher_server.signals.logit_head import SignalHead
    from tutelage.teacher_server.signals.unembedding import Unembedding

    class GivenLogits(SignalHead):
        def _logits_of(self, columns: slice, hidden_RD: torch.Tensor) -> torch.Tensor:
            return hidden_RD[:, columns]

    return GivenLogits(Unembedding(torch.zeros(VOCABULARY_SIZE, 1), None, scale=1.0, softcap=0.0), device="cpu")


def our_arrays(client: Any, sequences: list[list[int]], kind: str) -> Any:
    """The checked signals that a trainer has in the end."""
    from tutelage.trainer.data.sequences import TokenSequence
    from tutelage.trainer.teacher.base import SignalSpec

    spec = SignalSpec("topk", k=K, temperatures=(1.0,)) if kind == "topk" else SignalSpec(kind)
    requests = [TokenSequence(np.array(ids, dtype=np.int32), 0, len(ids)) for ids in sequences]
    return client.score(requests, spec)


# --- both --------------------------------------------------------------------------------------------------------


def trl_costs(logits_STV: torch.Tensor, sequences: list[list[int]], rounds: int) -> dict[str, float]:
    """Processor microseconds and bytes a token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(PACKAGED))
    client_class, tokens = import_trl(), sum(map(len, sequences))

    def keep() -> list[Any]:
        return [vllm_kept(rows_TV[:-1], ids) for rows_TV, ids in zip(logits_STV, sequences, strict=True)]

    with vllm_front_end(keep(), tokenizer) as address:
        client = client_class(base_url=address)
        path = processor_us(lambda: trl_arrays(client, sequences), tokens, rounds)
        sent = loopback_bytes(lambda: trl_arrays(client, sequences)) / tokens
    kept = processor_us(keep, tokens, rounds)
    return {"kept": kept, "path": path, "both": kept + path, "loopback bytes": sent}


def our_costs(logits_STV: torch.Tensor, sequences: list[list[int]], rounds: int) -> dict[str, float]:
    """Processor microseconds and bytes a token."""
    tokens = sum(map(len, sequences))

    def keep() -> list[Any]:
        return [our_kept(rows_TV, ids) for rows_TV, ids in zip(logits_STV, sequences, strict=True)]

    with our_client(given_teacher(numbered_states(sequences), keep())) as client:
        path = processor_us(lambda: our_arrays(client, sequences, "topk"), tokens, rounds)
        hidden = processor_us(lambda: our_arrays(client, sequences, "hidden"), tokens, rounds)
        sent = loopback_bytes(lambda: our_arrays(client, sequences, "topk")) / tokens
    kept = processor_us(keep, tokens, rounds)
    print(f"path of hidden states: {hidden:.1f} microseconds a token")
    return {"kept": kept, "path": path, "both": kept + path, "loopback bytes": sent}


def numbered_states(sequences: list[list[int]]) -> torch.Tensor:
    """bfloat16 [S, T, D]: states that begin with the number of their sequence."""
    states_STD = torch.randn(len(sequences), len(sequences[0]), HIDDEN_SIZE).bfloat16()
    states_STD[:, :, 0] = torch.arange(len(sequences))[:, None]
    return states_STD


def message_bytes(kind: str, ids: list[int], logits_TV: torch.Tensor) -> float:
    """Bytes a scored token of our messages for one sequence, with gRPC's 5 before each."""
    from tutelage.rpc.v1 import teacher_pb2 as pb
    from tutelage.teacher_server.admission.validation import Scoring, Signal
    from tutelage.teacher_server.signals import frame_encoder as frames

    topk, states_STD = kind == "topk", numbered_states([ids])
    signal = Signal(pb.SIGNAL_KIND_TOPK if topk else pb.SIGNAL_KIND_HIDDEN, K * topk, (1.0,) * topk, None)
    scoring = Scoring(np.array(ids, dtype=np.int32), signal, 0, len(ids))
    teacher, total = given_teacher(states_STD, [our_kept(logits_TV, ids)]), 0
    head, whole = teacher.scoring.head, (scoring.start, scoring.end)
    for index, (start, end) in enumerate(frames.ranges(scoring, head, teacher.limits.frame_bytes, *whole)):
        frame = frames.frame(scoring, states_STD[0][start:end], teacher.scoring.head, index=index, start=start, end=end)
        total += pb.ScoreSequencesResponse(request_id=str(index), frame=frame).ByteSize() + 5
    return total / len(ids)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    generator, shape = torch.Generator().manual_seed(0), (options.sequences, options.tokens)
    sequences = torch.randint(3, VOCABULARY_SIZE, shape, generator=generator)
    sequences[:, 0] = torch.arange(options.sequences)
    ids, logits_STV = sequences.tolist(), 3 * torch.randn((*shape, VOCABULARY_SIZE), generator=generator)
    theirs, ours = (costs(logits_STV, ids, options.rounds) for costs in (trl_costs, our_costs))
    print(f"{'microseconds a token':<22}{'TRL':>9}{'ours':>9}{'ratio':>9}")
    for name, value in theirs.items():
        print(f"{name:<22}{value:9.1f}{ours[name]:9.1f}{value / ours[name]:9.1f}")
    sent = {kind: message_bytes(kind, ids[0], logits_STV[0]) for kind in PROMISED_BYTES}
    for kind, count in sent.items():
        print(f"message bytes a token, {kind:<7}{count:8.1f}, promised {PROMISED_BYTES[kind]}")
    enough = theirs["path"] / ours["path"] >= PROMISED_RATIO
    return not (enough and all(count <= PROMISED_BYTES[kind] for kind, count in sent.items()))


if __name__ == "__main__":
    sys.exit(main())
