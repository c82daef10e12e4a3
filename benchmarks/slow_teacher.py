"""The teacher server's own command with an engine that is as much slower as a file says, for `trainer_streaming.py`.

    SECONDS_A_TOKEN_FILE=FILE python benchmarks/slow_teacher.py teacher serve MODEL …

Whatever vLLM computed is held back until a slower engine would have computed it: one sequence after the other, the
file's seconds for each token that was not read from the cache. It takes no processor time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from tutelage.cli import main
from tutelage.teacher_server.engine.base import ComputedStates
from tutelage.teacher_server.engine.vllm import VllmScoringEngine

SECONDS_A_TOKEN = Path(os.environ["SECONDS_A_TOKEN_FILE"])
_compute = VllmScoringEngine.hidden_states
_idle_since = 0.0


async def _hidden_states(engine: VllmScoringEngine, *arguments: Any) -> ComputedStates:
    global _idle_since
    asked = time.monotonic()
    made = await _compute(engine, *arguments)
    _idle_since = max(_idle_since, asked) + made.computed_tokens * float(SECONDS_A_TOKEN.read_text())
    await asyncio.sleep(max(0.0, _idle_since - time.monotonic()))
    return made


VllmScoringEngine.hidden_states = _hidden_states  # type: ignore[assignment, method-assign]
if __name__ == "__main__":
    sys.exit(main())
