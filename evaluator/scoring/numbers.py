"""The number that an output answers with: one spelling for mathematics and words, then the last one committed to.

A number comes as digits with commas, currency, sign, fraction, power of ten or scale ("2 million"), as a word up to a
hundred, as LaTeX. Of a calculation its result counts, and a calculation without a result is no number yet.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

from tutelage.evaluator.scoring.reading import JUDGED, answer_text, attempts, without_confirmations, without_reasons

_BOX_REACH = 400  # characters of a box that are read
_DEPTH = 4  # of fractions in fractions
_WINDOW = 24  # characters before a number word that are read
_MARKERS = 50
_CLAUSE_REACH = 200
_EQUATION_REACH = 400


def canonical_number(value: float) -> str:
    """One spelling a value ("4", "4.0" and "4." agree); empty for what is not finite."""
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


# One spelling.

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORD_VALUES = {
    **{word: value for value, word in enumerate(_UNITS)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}
# "One" is a pronoun ("each one", "one of them") unless it is what something is.
_ONE = (
    r"one(?=\s+hundred|\sand\sa\s(?:half|quarter)|\W*$)"
    r"|(?<=is )one(?!\s+(?:of|for|who|that|which|in|by|more)\b)|(?<=are )one(?=\W)"
)
_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<unit>{'|'.join(_UNITS[1:10])}))?"
    rf"|(?P<small>{'|'.join([_UNITS[0], *_UNITS[2:]])}|{_ONE}|a(?=\s+hundred\b)))\b",
    re.IGNORECASE,
)
# What stands before and after a number word that says what something is, although others are written as digits.
_RESULTS = tuple(
    (re.compile(before, re.IGNORECASE), re.compile(after, re.IGNORECASE))
    for before, after in (
        (r"\b(?:is|are|gives?|gets?|makes?|leaves?|leaving|has|have|had)[:,]?\s+[$(]*\Z", ""),
        (r"\b(?:total of|in total|in all|altogether),?\s+[$(]*\Z", ""),
        (r"(?:=|####|\b(?:answer|total|result):)\s*[$(]*\Z", ""),
        (r"\b(?:so|therefore|thus|hence),?\s+\Z", r"(?:\s[a-z]+){0,2}+[^\w\n]*(?:[.!\n]|\Z)"),
        (r"(?:^|\n)[^\w\n]*\Z", r"[^\w\n]*(?:\n|\Z)"),
        ("", r"\sand\sa\s(?:half|quarter)\b"),
    )
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_VULGAR = dict(zip("½⅓⅔¼¾⅕⅛⅜⅝⅞", ("1/2", "1/3", "2/3", "1/4", "3/4", "1/5", "1/8", "3/8", "5/8", "7/8"), strict=True))
_SPELLINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>\n]{0,200}>>", ""),  # GSM8K's calculator
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]++", lambda found: "^" + found.group().translate(_SUPERSCRIPTS)),
        (f"[{''.join(_VULGAR)}]", lambda found: f" {_VULGAR[found.group()]} "),
        (r"\{,\}|(?<=\d)\\[,;!](?=\d)|(?<=\d)[\u00a0\u2009\u202f](?=\d{3}\b)", ""),
        (r"(?<![\d ])(\d{1,3}) ((?:\d{3} )*+)000\b", lambda found: found[1] + found[2].replace(" ", "") + "000"),
        (r"\\(?:left|right|displaystyle|quad|[,;:! ])", " "),
        (r"\\([$%])", r"\1"),
        (r"\\(?:text\w{0,2}|math\w{2}|mbox)\{([^{}]{0,200})\}", r" \1 "),
        (r"\\sqrt\[(\d)\]\{([^{}]{0,80})\}", r"((\2)^(1/\1))"),
        (r"\*\*|__|\\[()\[\]]", " "),
        (r"[−–]", "-"),
        (r"≈|\\approx|\bequals\b|\bis equal to\b", "="),
        (r"×|·|\\(?:times|cdot)\b|(?:(?<=\d)|(?<=\ws)[^\S\n])[^\S\n]*+x[^\S\n]*+(?=[$\d])", "*"),
        (r"÷|\\div\b", "/"),
        (r"(?<=[A-Za-z])\^[{(]?-?\d{1,3}[})]?|(?<![A-Za-z])[kcmd]?m[23]\b", ""),  # cm^3
    )
)
_PART = r"\s*(?:\{([^{}]{0,80})\}|(\d))"
_FRACTION = re.compile(rf"(?:(\d)\s*+)?\\[dt]?frac{_PART}{_PART}")
_BRACED = re.compile(r"(\\sqrt|\^)\s*\{([^{}]{0,80})\}")
_DECIMAL = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")
# Mixed numbers and operations in words; after number words, which may be what they join.
_JOINED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(?<=\d)[^\S\n]++and[^\S\n]++a[^\S\n]++half\b", " 1/2"),
        (r"(?<=\d)[^\S\n]++and[^\S\n]++a[^\S\n]++quarter\b", " 1/4"),
        (r"(?<![\d/.,])(\d{1,15})[^\S\n]++(?:and|&)[^\S\n]++\$?[^\S\n]*+(\d{1,3}/\d{1,3})\b(?!\s+of\b)", r"\1 \2"),
        (r"(?<=\d)[^\S\n]++minus[^\S\n]++(?=[$\d])", " - "),
        (r"(?<=\d)[^\S\n]++plus[^\S\n]++(?=[$\d])", " + "),
        (r"(?<=\d)[^\S\n]++(?:times|multiplied by)[^\S\n]++(?=[$\d])", " * "),
        (r"(?<=\d)[^\S\n]++divided by[^\S\n]++(?=[$\d])", " / "),
    )
)


def _fraction(found: re.Match[str]) -> str:
    whole, above, below = found[1] or "", (found[2] or found[3] or "").strip(), (found[4] or found[5] or "").strip()
    if above.isdigit() and below.isdigit():
        negated = found.string.endswith("-", 0, found.start())
        return f"{above}/{below}" if negated and not whole else f"{whole} {above}/{below}"
    if not whole and _DECIMAL.fullmatch(above) and _DECIMAL.fullmatch(below) and float(below):
        return canonical_number(float(above) / float(below))
    return f"{whole}*(({above})/({below}))".removeprefix("*")


def _words(text: str) -> str:
    """Number words as digits: all of a text without digits, else those that say what something is or comes to."""
    has_digits = re.search(r"\d", text) is not None

    def says_what_it_is(found: re.Match[str]) -> bool:
        begin, end = found.span()
        return any(
            before.search(text, max(0, begin - _WINDOW), begin) and after.match(text, end) for before, after in _RESULTS
        )

    def digits(found: re.Match[str]) -> str:
        if has_digits and not says_what_it_is(found):
            return found.group()
        word = found["tens"] or found["small"]
        value = _WORD_VALUES.get(word.lower(), 1)
        return str(value + (_WORD_VALUES[found["unit"].lower()] if found["unit"] else 0))

    return _WORD.sub(digits, text)


def _spelled(text: str) -> str:
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    for _ in range(_DEPTH if "\\" in text else 0):
        text = _FRACTION.sub(_fraction, _BRACED.sub(r"\1(\2)", text))
    text = _words(_unboxed(text))
    for pattern, replacement in _JOINED:
        text = pattern.sub(replacement, text)
    return text


_BOX = re.compile(r"\\f?boxed\s*\{")


def _unboxed(text: str) -> str:
    r"""Each `\boxed{…}` as "#### …" on a line of its own; what it computes is its value."""
    pieces, position = [], 0
    while box := _BOX.search(text, position):
        end, depth = box.end(), 1
        while end < min(len(text), box.end() + _BOX_REACH):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                break
            end += 1
        content = text[box.end() : end]
        value = _computed(content)
        inside = content if value is None else canonical_number(value)
        pieces.append(text[position : box.start()] + (f"\n#### {inside}\n" if inside.strip() else " "))
        position = end + 1
    return "".join(pieces) + text[position:]


_OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_EXPRESSION = (
    (r"\\?sqrt\s*[{(]|√[{(]", "sqrt("),
    (r"√\s*(\d++)", r"sqrt(\1)"),
    (r"\\pi\b|π", f"({math.pi})"),
    (r"[{\[]", "("),
    (r"[}\]]", ")"),
    (r"\^", "**"),
    (r"(?<=\d),(?=\d{3}\b)|\$|%\s*$", ""),
    (r"(\d+) (\d+/\d+)", r"(\1+\2)"),  # a mixed number
    (r"(?<=[\d)])\s*(?=\(|sqrt)", "*"),
)
_ARITHMETIC = re.compile(r"(?>sqrt\(|[0-9.+\-*/() ])*+")


def _computed(text: str) -> float | None:
    """The value of an expression of numbers, operations, roots and pi, in float arithmetic; None of anything else."""
    for pattern, replacement in _EXPRESSION:
        text = re.sub(pattern, replacement, text)
    if not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sqrt":
        return math.sqrt(_evaluated(node.args[0]))
    raise ValueError(node)


# Numbers and calculations of the one spelling.

_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SCALES |= {"k": 1e3, "m": 1e6, "b": 1e9}
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])-)?(?P<currency>[$€£¥])?(?P<sign_after>-)?(?<![A-Za-z0-9_^])"
    r"(?:(?P<whole>\d++)[^\S\n]{1,2}(?=\d+/\d))?"
    r"(?P<value>(?>\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\.)\.\d++)"
    r"(?P<denominator>/\d++)?"
    r"(?:e(?P<e>[-+]?\d{1,3})\b|(?:\s?\*\s?10|(?<=10))\^[{(]?(?P<power>[-+]?\d{1,3})[})]?)?"
    r"(?:\$?[^\S\n]{1,4}(?P<scale>hundred|thousand|million|billion|trillion)\b|(?<=\d)(?P<letter>[kKMB])\b)?"
)
_CALCULATION = re.compile(r"(?>[^\S\n]|[$€£¥%(){}]|\\[a-z]++|[-+*/^])*+(?=[\d$€£¥.])")
_OPERATOR = re.compile(r"[-+*/^]")
_EQUALS = re.compile(r"(?>[^\S\n]|[$€£¥%)}])*+=(?>[^\S\n]|[({])*+(?=[-$€£¥.\d√])√?")
# After a calculation, in words; after a number alone this begins something else ("5, which is 3 more").
_COMES_TO = re.compile(
    r"[$%)}]*+(?:,?\s(?:which|that)\s(?:is|gives|makes|leaves)|,?\s(?:is|are|gives|makes|leaves)|,\sor)\s"
    r"(?=[-$€£¥.]?\d)",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r"(?:(?:[^\S\n]|[^\S\n]?/)(?!(?:where|if|when|with|because|since|so|and|as|for|let)\b)[A-Za-z]{1,20}){1,3}+"
    r"(?=[^\S\n]{0,2}(?:[-+*/]|(?P<equals>=)))"
)
_UNFINISHED = re.compile(r"(?>[^\S\n]|[$%)])*+[-+*/^=][^\S\n$]*+(?:\n|\Z)")


def _value(number: re.Match[str]) -> float:
    digits = number["value"].replace(",", "")
    exponent = number["e"] or number["power"]
    mantissa = "1" if "10^" in number.group() and "*" not in number.group() else digits
    value = float(f"{mantissa}e{exponent or 0}")
    below = float(number["denominator"][1:]) if number["denominator"] else 0
    whole = float(number["whole"] or 0)
    value = (value / below if below else value) + (whole if value < below else 0)
    value *= _SCALES[number["scale"]] if number["scale"] else 1
    value *= _SCALES[number["letter"].lower()] if number["letter"] and number["currency"] else 1  # not "5K run"
    return -value if number["sign"] or number["sign_after"] else value


def _calculated(text: str, first: re.Match[str], *, units: bool = False) -> tuple[re.Match[str] | None, int]:
    """The result of the calculation that begins with a number ("6 * 7 = 42", "42 = 6 * 7"), or the number itself.

    And where it ends. None for a calculation without a result, which is no number yet. With `units`, "5 dollars * 3 =
    15 dollars" is a calculation too.
    """
    number, calculates, result_first = first, False, False
    limit = first.start() + _EQUATION_REACH
    while number.end() < limit:
        unit = _UNIT.match(text, number.end()) if units else None
        position = unit.end() if unit and (calculates or not unit["equals"]) else number.end()
        equals = _EQUALS.match(text, position) or (_COMES_TO.match(text, position) if calculates else None)
        step = equals or _operation(text, position)
        following = _NUMBER.match(text, step.end()) if step else None
        if following is None:
            break
        result_first |= equals is not None and number is first
        number, calculates = following, equals is None
    if _UNFINISHED.match(text, number.end()):
        return None, number.end()
    return (number if not calculates else first if result_first else None), number.end()


def _operation(text: str, position: int) -> re.Match[str] | None:
    between = _CALCULATION.match(text, position)
    return between if between and _OPERATOR.search(between.group()) else None


def _answered(text: str, first: re.Match[str]) -> re.Match[str] | None:
    """What a number that follows a marker leads to; a unit belongs to a calculation if that has a result."""
    return _calculated(text, first, units=True)[0] or _calculated(text, first)[0]


# Between what a calculation gives and a number that goes beyond it.
_GOES_ON = re.compile(
    r"[,;:()\n=]|[.!?]\s|\b(?:so|then|but|which|who|is|are|was|were|has|have|had|needs?|leaves?|leaving|gives?|makes?)\b",
    re.IGNORECASE,
)


def _last(text: str) -> re.Match[str] | None:
    """The last number; but what a calculation gives goes before numbers that only describe it ("= 40 hours for 6")."""
    last, given, beyond, position = None, None, 0, 0
    while first := _NUMBER.search(text, position):
        result, position = _calculated(text, first)
        if result:
            last = result
            given, beyond = (result, position) if position > first.end() else (given, beyond)
    if last is None or given is None or _GOES_ON.search(text, beyond, last.start()):
        return last
    return given


# What is committed to.

_ANSWER_IS = re.compile(
    rf"(?:(?:answer|option|choice)(?:\s+(?:is|(?:would|should|must)\s+be)\b(?!{JUDGED})|\s*[:=：])|答案(?:是|：|:)"
    r"|####|<answer>|(?m:^\W{0,6}answer\W{0,4}$))[^\S\n]*+[:：]?",
    re.IGNORECASE,
)
_IMMEDIATE = re.compile(
    r"(?>[^\w.\-$€£¥√]|(?:about|approximately|exactly|only|just|x)\b)*+=?\s*+(?=[-$€£¥]{0,2}\.?\d)", re.IGNORECASE
)
_CLAUSE = re.compile(r"\s*+[^\n]*?(?=[.!?](?:\s|\Z)|\n|\Z)")
_N = r"(?:the |just |only )?[$€£]?\d++(?:[.,]\d++)*+"
_MONTH = (r"(?:Jan(?:uary)?|Feb(?:ruary)?|March|Mar|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|"
          r"Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?")  # fmt: skip
# Said of something else than the answer, whatever else there is.
_NEVER = re.compile(
    rf"\(not\b[^()\n]{{0,80}}\)|(?:\bnot|n't|\binstead of|\brather than)\s+{_N}"
    rf"|\bbetween\s+{_N}[^\d\n]{{0,12}}\sand\s+{_N}|\b(?:step|part|method)\s+\d++\b",
    re.IGNORECASE,
)
# Said beside the answer, if there is another number.
_BESIDE = re.compile(
    rf"(?<=[\w.%$}}])[^\S\n]++\([^()\n]{{0,200}}\)|\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s+\d{{4}}\b)?"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:,?\s+\d{{4}}\b)?"
    rf"|\bof\s+(?:the|his|her|its|their|our|my|those|these)\s+[$€£]?\d++(?:[.,]\d++)*+|\bfor all\s+{_N}"
    rf"|(?<=\d )\w+s of\s+\d++|(?:\b(?:more|less|fewer|greater|larger|smaller|higher|lower) than\s+{_N})"
    rf"|\bthe (?:sum|difference|product|quotient) of\s+{_N}\s+(?:and|by)\s+{_N}"
)
_LISTED = re.compile(r"(?m)^[^\S\n]*+(?:[-*][^\S\n]++)?(\d{1,2})[.)](?=[^\S\n]|$)")
_NONE_LEFT = re.compile(r"\b(?:no|none|nothing)\b[^.\n]{0,60}\b(?:left|remains?|remaining)\b", re.IGNORECASE)


def _without_list_numbers(text: str) -> str:
    """Without the numbers 1, 2, … at the beginnings of lines, where they count items."""
    found = [one for one in _LISTED.finditer(text) if text[one.end() :].strip() or one.start()]
    if [int(one[1]) for one in found] != list(range(1, len(found) + 1)):
        return text
    for one in reversed(found):
        text = text[: one.start()] + text[one.end() :]
    return text


def _committed(text: str) -> re.Match[str] | str | None:
    """What an attempt commits to: a number, or "" where it begins a calculation and ends; None without a number."""
    for marker in [*_ANSWER_IS.finditer(text)][-_MARKERS:][::-1]:
        begins = _IMMEDIATE.match(text, marker.end())
        if begins and (first := _NUMBER.match(text, begins.end())):
            return _answered(text, first) or ""
        clause = _CLAUSE.match(text, marker.end(), marker.end() + _CLAUSE_REACH)
        if clause and (found := _last(_BESIDE.sub(" ", without_reasons(clause.group()))) or _last(clause.group())):
            return found
    return _last(_BESIDE.sub(" ", without_reasons(text))) or _last(text)


def corrected_number(text: str) -> str:
    """The number that the last attempt commits to by "the answer is" or a box, else the last one that is an answer.

    An aside, a reason, a date, or what something is not, is read only where there is nothing else.
    """
    text = _NEVER.sub(" ~ ", _without_list_numbers(without_confirmations(_spelled(answer_text(text)))))
    for attempt in attempts(text):
        found = _committed(attempt)
        if found is not None:
            return found if isinstance(found, str) else canonical_number(_value(found))
    return "0" if _NONE_LEFT.search(text) else ""
