"""What of an output is its answer: without thoughts and later turns, in attempts, the last of which counts.

Everything here takes time linear in the text, of which the last 10,000 characters are read. `++` and `*+` do not
backtrack.
"""

from __future__ import annotations

import re

_READ = 10_000
# What reasoning models think, between tags of their own: DeepSeek-R1 and Qwen3, Magistral, Kimi, gpt-oss, and prompts
# that ask for such tags. A chat template may have opened them already, so a closing one alone ends thoughts as well.
_THOUGHTS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "scratchpad")),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
_SPECIAL = re.compile(r"<\|[a-z_]{1,24}\|>|</s>")
_NEXT_TURN = re.compile(
    r"### (?:Instruction|Response|Input)\b|\n(?:Question|Q|Problem|Instruction|Response|Human|User):|<\|im_start\|>"
)
# Who says this thinks again: what stands before is taken back, if an answer follows.
_AGAIN = re.compile(
    r"(?:^|(?<=[.!?…,;:\-—–\n])|(?<=but))[^\S\n]*+"
    r"(?:wait|hmm+|oops|actually|correction|scratch that|on second thought|let me re\w+)\b"
    r"|(?<=[.!…,;:\-—–\n])[^\S\n]*+no(?=[,:]|\swait)",
    re.IGNORECASE,
)
# Why something is so, up to the end of the sentence (a decimal point is none). Not what begins a sentence, nor a
# calculation: "… 15 more, because 40 - 25 = 15".
_REASON = re.compile(
    r"(?<=[^\s.!?:;])(?<!\band)(?<!\bbut)(?<!\bso)(?:[^\S\n]|[,)*]){1,4}+"
    r"(?:because|since|so that (?:he|she|they|we|you) (?:has|have|can)|(?<=, )as)\b"
    r"(?:(?![.!?](?:\s|\Z)|,\s(?:then|so|there|it|he|she|they|we)\b)[^\n;=])*+(?=[.!?;\n]|\Z)",
    re.IGNORECASE,
)
# Thinking again that ends where it began ("Wait, … so that is right"), and the sentence of it.
_CONFIRMS = re.compile(
    r"\b(?:so|yes|yeah|then|thus|hence|and|okay|indeed|actually|wait|hmm+)\b,?\s+"
    r"(?:that|this|it|(?:my|the)(?:\s\w{1,12})?\sanswer)"
    r"(?:(?:['’]s|\s(?:is|was))(?:\s(?:indeed|still))?\s(?:right|correct)|\sstands|\s(?:checks\sout|holds))"
    r"(?:,?\s(?:because|since|as)\b.*)?\Z",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:[^.!\n]|[.!](?!\s|\Z))++")
# What "the answer is" says of the answer instead of naming it.
JUDGED = r"\s+(?:(?:in)?correct|right|wrong|best|better|valid|reasonable|based|rounded)\b"
_QUESTION = re.compile(r"(?:(?<=^)|(?<=[.!?\n]))[^.!?\n]{1,400}\?(?=\s)")


def answer_text(text: str) -> str:
    """What a model answers: without its thoughts, up to where it asks itself the next question; the end of that.

    Thoughts that do not end (an output that was cut off) leave nothing behind them.
    """
    for opening, closing in _THOUGHTS:
        kept, position = [], 0
        while (end := text.find(closing, position)) >= 0:
            begin = text.find(opening, position, end)
            kept.append(text[position : max(begin, position)])
            position = end + len(closing)
        text = "".join(kept) + text[position:].partition(opening)[0]
    text = text.strip()
    turn = _NEXT_TURN.search(text, 1)
    return _SPECIAL.sub(" ", text[: turn.start()] if turn else text)[-_READ:]


def attempts(text: str) -> list[str]:
    """The answers that a text gives one after the other ("… 2. Wait, … 3."), the last first."""
    starts = [0, *(found.end() for found in _AGAIN.finditer(text))]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)][::-1]


def without_confirmations(text: str) -> str:
    """Without thinking again that finds right what was said before: it names numbers and choices, but no answer."""

    def kept(sentence: re.Match[str]) -> str:
        confirms = _CONFIRMS.search(sentence.group())
        again = _AGAIN.search(text, sentence.start(), sentence.end()) if confirms else None
        return text[sentence.start() : again.start()] if again else sentence.group()

    return _SENTENCE.sub(kept, text)


def without_reasons(text: str) -> str:
    """Without clauses that say why ("… because 3 boxes hold 4 each"), and without questions."""
    return _QUESTION.sub(" ", _REASON.sub("", text))
