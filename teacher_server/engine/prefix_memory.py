"""Which prefixes an engine has in its cache, as far as that can be told from outside: those that it was given last."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TokenIds = Sequence[int] | npt.NDArray[np.int32]


class PrefixMemory:
    """Remembers as many blocks as the engine's cache holds, and forgets those that were used longest ago, as it does.

    Args:
        block_tokens: tokens of a block; 0 if nothing is reused, and nothing remembered.
        tokens: that the cache holds.

    """

    def __init__(self, block_tokens: int, tokens: int) -> None:
        self._block_tokens = block_tokens
        self._most = tokens // block_tokens if block_tokens else 0
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def known(self, token_ids: TokenIds, salt: str = "") -> int:
        """Tokens of the longest prefix of whole blocks that was given with this salt, less than all tokens."""
        blocks = 0
        for key in self._keys(token_ids[: max(0, len(token_ids) - 1)], salt):
            if key not in self._blocks:
                break
            blocks += 1
        return blocks * self._block_tokens

    def note(self, token_ids: TokenIds, salt: str = "") -> None:
        """The engine is given this sequence."""
        for key in reversed(self._keys(token_ids, salt)):  # so that the beginnings, which others share, go last
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def _keys(self, token_ids: TokenIds, salt: str) -> list[bytes]:
        if not self._most:
            return []
        content = np.asarray(token_ids, dtype="<i4").tobytes()
        size, digest, keys = 4 * self._block_tokens, hashlib.sha256(salt.encode() + b"\0"), []
        for end in range(size, len(content) + 1, size):
            digest.update(content[end - size : end])
            keys.append(digest.digest())
        return keys
