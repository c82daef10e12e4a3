"""Servers of one teacher behind a name that a real name server answers for, in a network and with files of their own.

    unshare --map-root-user --mount --net python tests/named_teachers.py FOLDER

`test_teacher_names.py` runs it. Prints, as JSON, which servers a client has first, how many sequences each answered,
and which it has when one has left the name and another has come.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from fake_teacher import VOCABULARY_SIZE, FakeScoringEngine, fake_teacher, serving
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher import routing
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

NAME = "teachers.example"
ADDRESSES = ["127.0.0.2", "127.0.0.3"]
"""What the name stands for; changed while the name server runs."""


def answer_names() -> None:
    """A name server (RFC 1035): addresses for one name, nothing for all others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as served:
        served.bind(("127.0.0.1", 53))
        while True:
            query, client = served.recvfrom(512)
            end = query.index(b"\0", 12) + 1
            kind = struct.unpack(">H", query[end : end + 2])[0]
            named = (
                query[12:end].lower()
                == b"".join(bytes([len(part)]) + part.encode() for part in NAME.split(".")) + b"\0"
            )
            found = ADDRESSES if named and kind == 1 else []  # 1 is A
            records = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(address) for address in found]
            header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(records), 0, 0)
            served.sendto(header + query[12 : end + 4] + b"".join(records), client)


def ask(port: int, replace: threading.Event, replaced: threading.Event) -> dict[str, list[str]]:
    """What a client of the name sees, before and after."""
    rng = np.random.default_rng(0)
    sequences = [TokenSequence(rng.integers(0, VOCABULARY_SIZE, 50).astype(np.int32), 0, 50) for _ in range(40)]
    address = f"dns:///{NAME}:{port}"
    with TeacherClient(address, student_id="ann", wait_seconds=20, tokenizer_digests={}) as client:
        first = list(client.servers)
        client.score(sequences, SignalSpec("hidden"))
        replace.set()
        replaced.wait()
        deadline = time.monotonic() + 20
        while f"127.0.0.4:{port}" not in client.servers and time.monotonic() < deadline:
            time.sleep(0.05)
        client.score(sequences, SignalSpec("hidden"))
        return {"first": first, "then": list(client.servers)}


async def main(folder: Path) -> None:
    """Starts the servers and asks."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name, text in (("resolv.conf", "nameserver 127.0.0.1\n"), ("nsswitch.conf", "hosts: dns\n")):
        (folder / name).write_text(text)
        subprocess.run(["mount", "--bind", str(folder / name), f"/etc/{name}"], check=True)
    threading.Thread(target=answer_names, daemon=True).start()
    routing._RESOLVE_SECONDS = 0.2
    engines = [FakeScoringEngine() for _ in range(3)]
    async with AsyncExitStack() as first, AsyncExitStack() as others:
        leaving = await first.enter_async_context(serving(fake_teacher(engines[0]), f"{ADDRESSES[0]}:0"))
        port = int(leaving.address.rpartition(":")[2])
        await others.enter_async_context(serving(fake_teacher(engines[1]), f"{ADDRESSES[1]}:{port}"))
        replace, replaced = threading.Event(), threading.Event()
        asking = asyncio.create_task(asyncio.to_thread(ask, port, replace, replaced))
        await asyncio.to_thread(replace.wait)
        answered = [engine.started for engine in engines]
        await others.enter_async_context(serving(fake_teacher(engines[2]), f"127.0.0.4:{port}"))
        ADDRESSES[:] = ["127.0.0.3", "127.0.0.4"]
        await first.aclose()
        replaced.set()
        seen = await asking
    hosts = {when: [address.rpartition(":")[0] for address in addresses] for when, addresses in seen.items()}
    print(json.dumps(hosts | {"answered": answered, "answered then": [engine.started for engine in engines]}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
