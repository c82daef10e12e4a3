"""Hand-made outputs through both extractions of every family of tasks: (text, LLM-Adapters' rule, corrected rule)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from pace import least_seconds
from tutelage.evaluator.scoring.extraction import LETTER, NUMBER, TRUTH, labelled, score
from tutelage.evaluator.tasks import TASKS

NUMBERS = [
    ("The answer is 4.", "4", "4"),
    ("4", "4", "4"),
    ("", "", ""),
    ("I do not know.", "", ""),
    ("-12", "-12", "-12"),
    ("The answer is -3.5", "-3.5", "-3.5"),
    ("16-12", "-12", ""),
    ("16 - 12 = 4", "4", "4"),
    ("x = -5", "-5", "-5"),
    ("He paid $1,000", "1000", "1000"),
    ("The answer is $1,234,567.89 in all.", "1234567.89", "1234567.89"),
    ("1,2345", "12345", "2345"),
    ("She ate 3/4", "4", "0.75"),
    ("The answer is 1/0", "0", "1"),
    (".5", "5", "0.5"),
    ("The answer is .25", "25", "0.25"),
    ("50%", "50", "50"),
    ("The answer is 7. There are 30 days in a month.", "30", "7"),
    ("First I thought the answer is 3, so the answer is 8", "8", "8"),
    ("The answer is 2. Wait, no... the answer is 3.", "3", "3"),
    ("The answer is 5. Let me check: 2 + 2 = 4. So the answer would be 4.", "4", "4"),
    ("#### 4\nNo, #### 5", "5", "5"),
    (r"\boxed{4}, or rather \boxed{5}", "5", "5"),
    ("<think>Maybe the answer is 7?</think> The answer is 6.", "6", "6"),
    ("Maybe the answer is 7?</think> It is 6.", "6", "6"),
    ("<think>Maybe the answer is 7?", "7", ""),
    ("[THINK]The answer is 7[/THINK]6 it is", "6", "6"),
    ("<|channel|>analysis<|message|>6 * 7 = 42, so", "42", ""),
    ("<|channel|>analysis<|message|>6 or 7<|end|><|channel|>final<|message|>It is 6", "6", "6"),
    ("<thinking>9</thinking>The answer is 8.<thinking>Is it 3?</thinking>", "3", "8"),
    ("<think>" + "The answer is 7. " * 1000 + "</think> The answer is 6.", "6", "6"),
    ("First " + "a word and another, " * 1000 + "so the answer is 6.", "6", "6"),
    ("The answer is 6 * 7 = 42", "42", "42"),
    ("The answer is 6 * 7 = 42. There are 2 ways.", "2", "42"),
    ("The answer is 6*7=42, not 2.", "2", "42"),
    ("The answer is $6 + $7 = $13 for 2", "2", "13"),
    ("The answer is 6 x 7 = 42 and 1 more", "1", "42"),
    ("The answer is 1 + 2 + 3 = 3 + 3 = 6, 9", "9", "6"),
    (r"\boxed{6 \times 7 = 42}, 1", "1", "42"),
    ("answer: 10 - 3 = 7 (8 before)", "8", "7"),
    ("The answer is 3/4 = 0.75, 1", "1", "0.75"),
    ("The answer is 5 = 5.0, 1", "1", "5"),
    ("The answer is 12 + 13 + 14 + 15 + 16 + 17 + 18 + 19 + 20 = 144, 1", "1", "144"),
    ("The answer is 6 * 7", "7", ""),
    ("The answer is 5\n- 3 apples", "3", "5"),
    ("The answer is 5 - a lot, or 3", "3", "5"),
    ("The answer is 42. 6 * 8 = 48", "48", "42"),
    ("The answer is 5 (4 apples, 1 pear)", "1", "5"),
    ("The answer is 7 (not 3 + 3 = 6)", "6", "7"),
    ("The answer is 20, since 4 * 5 = 20, or 3", "3", "20"),
    ("#### 42", "42", "42"),
    (r"so \boxed{36} apples in 2 boxes", "2", "36"),
    ("The answer is 9.\n\n### Instruction:\nAdd 5 and 6", "6", "9"),
    ("It is 9\nQuestion: what is 5 + 6?", "6", "9"),
    ("answer: 10", "10", "10"),
    ("4.0", "4", "4"),
    ("12.", "12", "12"),
    ("A-1 costs 20", "20", "20"),
    ("3 apples and 4 pears", "4", "4"),
    ("9" * 400, "", ""),
    ("-$5", "5", "-5"),
    ("The answer is 5 dollars * 3 = 15 dollars.", "15", "15"),
    ("The answer is 3 apples + 4 apples = 7 apples.", "7", "7"),
    ("The answer is $5/hour * 3 hours = $15 for 2 boys.", "2", "15"),
    ("The answer is 5 dollars x 3 = 15 dollars.", "15", "15"),
    ("The answer is 18 dollars - 3 pens cost that.", "3", "18"),
    ("The answer is 12 where n = 4.", "4", "12"),
    ("The answer is 20 minus 5, which is 15.", "15", "15"),
    ("The answer is six times seven, or forty-two.", "", "42"),
    ("The answer is 3 plus 4 is 7.", "7", "7"),
    ("The answer is 12 divided by 4 = 3.", "3", "3"),
    ("The answer is 5, which is 3 more than 2.", "2", "5"),
    ("The answer is 20 minus 5", "5", ""),
    ("#### 42\nThis answer is right because each of the 7 rows holds 6.", "6", "42"),
    (r"\boxed{42} The answer is correct: 7 rows of 6.", "6", "42"),
    ("#### 3.14\nThe answer is rounded to 2 places.", "2", "3.14"),
    ("The answer is wrong because 3 is too small. So it is 4.", "4", "4"),
    ("The answer is 42 = 6 * 7.", "7", "42"),
    ("So he has $42 = $6 * 7", "7", "42"),
    ("He has 42 = 6 * 7 apples for 2 boys.", "2", "42"),
    ("x = 6 * 7", "7", ""),
    ("3 * 4 = 12 + 5", "5", ""),
    ("Tom had 5 apples and got 2 more, for a total of seven.", "2", "7"),
    ("5 + 2 is more than 6.\nAnswer: seven", "6", "7"),
    ("He has 5 and 2, so seven apples.", "2", "7"),
    ("5 + 2\n**seven**", "2", "7"),
    (r"5 + 2: \boxed{seven}", "2", "7"),
    ("5 and 2, altogether seven", "2", "7"),
    ("There are 8 apples.\nTwo are red.", "8", "8"),
    ("She has 7 apples on two plates.", "7", "7"),
    (r"\boxed{3 \text{ million}}", "3", "3000000"),
    ("The answer is $3$ million.", "3", "3000000"),
    (r"\boxed{\$2.5\text{ thousand dollars}}", "2.5", "2500"),
    (r"\boxed{\frac{2^{3}}{4}}", "4", "2"),
    (r"\boxed{\frac{\sqrt{36}}{2}}", "2", "3"),
    (r"\boxed{\frac{\sqrt{\frac{36}{4}}}{2^{2}}}", "2", "0.75"),
    (r"\boxed{\sqrt[3]{27}}", "27", "3"),
    (r"\boxed{\frac1{2}}", "2", "0.5"),
    (r"The answer is $\frac{-3}{4}$.", "4", "-0.75"),
    (r"The answer is $\frac{3}{-4}$.", "-4", "-0.75"),
    (r"The answer is $-\frac{3}{4}$.", "4", "-0.75"),
    (r"The answer is $\frac{1.5}{4}$.", "4", "0.375"),
    (r"x\frac{1}{2}", "2", "0.5"),
    (r"5-\frac{1}{2} = 4.5", "4.5", "4.5"),
    ("The answer is 2 and 1/2.", "2", "2.5"),
    (r"It takes 2 and $\frac{1}{2}$ hours", "2", "2.5"),
    ("The answer is two and a half.", "", "2.5"),
    ("5 / 2, so one and a half more", "2", "1.5"),
    ("He had 3 and 1/3 of the rest", "3", "0.3333333333333333"),
    ("1/2 and 1/3 make 5/6", "6", "0.8333333333333334"),
    ("The answer is 12. Wait, the question says 3 friends, so that is right.", "3", "12"),
    ("So 12. Wait, is that right? There are 3 friends with 4 each, so yes, that's correct.", "4", "12"),
    ("12. Actually, that's right, since 4 friends get 3.", "3", "12"),
    ("So 12. Wait, 3 friends, so that is not right: 9.", "9", "9"),
    ("12. Wait, he paid 3 more, so that is 15.", "15", "15"),
]
LETTERS = [
    ("The answer is (C).", "C", "C"),
    ("B", "B", "B"),
    ("b", "", "B"),
    ("", "", ""),
    ("12", "", ""),
    ("Because 4 > 3, the answer is (D)", "B", "D"),
    ("Answer: E", "A", "E"),
    ("Each has 5, so the answer is A", "E", "A"),
    ("The answer is 62 m, so (C)", "C", "C"),
    ("the answer is b)", "", "B"),
    ("(A) 5 or (B) 6", "A", "A"),
    ("It is (A) or (B)", "A", ""),
    ("C. 35", "C", "C"),
    ("D is right", "D", "D"),
    ("A train leaves; it is D", "A", "D"),
    ("A is correct", "A", "A"),
    ("Option B", "B", "B"),
    ("option c is right", "", "C"),
    ("I am sure it is E.", "E", "E"),
    ("Dividing gives 3.", "D", ""),
    ("the correct option is D", "D", "D"),
    ("the answer is option A because it fits", "A", "A"),
    ("[B]", "B", "B"),
    ("**C**", "C", "C"),
    ("The answer is E.\n### Instruction: pick (A)", "E", "E"),
    ("CD", "C", ""),
    ("none of these", "", ""),
    ("B or D", "B", ""),
    ("The answer is A. Wait, no: the answer is (C).", "A", "C"),
    ("<think>The answer is (A).</think>(B)", "A", "B"),
    ("B because A is too big", "B", "B"),
    ("The answer is: b", "", "B"),
    ("The correct option is:\n\nd", "", "D"),
    ("I do not think the answer is B. It is C.", "B", "C"),
    ("B: 12 days", "B", "B"),
    ("So B. Wait, is A too big? Yes, so my answer stands.", "B", "B"),
]
TRUTHS = [
    ("the correct answer is true", "true", "true"),
    ("the correct answer is false", "false", "false"),
    ("true", "true", "true"),
    ("True", "", "true"),
    ("FALSE.", "", "false"),
    ("yes", "", "true"),
    ("No, it is not.", "", "false"),
    ("", "", ""),
    ("maybe", "", ""),
    ("untrue", "true", "false"),
    ("truely false", "true", "false"),
    ("It is not true, so the answer is false", "true", "false"),
    ("true or false", "true", ""),
    ("false. false.", "false", "false"),
    ("answer: true", "true", "true"),
    ("The answer is: yes", "", "true"),
    ("falsehood", "false", ""),
    ("It is true\n\n### Instruction:\nfalse", "true", "true"),
    ("the correct answer is true because no one said false", "true", "true"),
    ("know", "", ""),
    ("not true", "true", "false"),
    ("the answer is yes or no", "", ""),
    ("1", "", ""),
    ("TRUE\nQuestion: is it false?", "false", "true"),
    ("trueanswer is false", "true", "false"),
    ("(true)", "true", "true"),
    ("Yes, that is true.", "true", "true"),
    ("No, that is false.", "false", "false"),
    ("Yes. There is no doubt.", "", "true"),
    ("True, because no one said false", "false", "true"),
    ("Yes and no", "", ""),
    ("The answer is false. Wait, the answer is true.", "false", "true"),
    ("<think>false?</think>true", "false", "true"),
    ("That statement is not always true.", "true", "false"),
    ("I do not think that is true.", "true", "false"),
    ("I don't think that it is false.", "false", "true"),
    ("That is not a true statement.", "true", "false"),
    ("This could not be true.", "true", "false"),
    ("It cannot possibly be true.", "true", "false"),
    ("This is not quite correct.", "", "false"),
    ("This is no longer true.", "true", "false"),
    ("That does not seem to be true.", "true", "false"),
    ("It is not only true, it is well known.", "true", "true"),
    ("It does not matter, it is true.", "true", "true"),
    ("The claim that he did not smoke is true.", "true", "true"),
    ("I do not know whether it is true.", "true", ""),
    ("It might not be true.", "true", ""),
    ("This could be true.", "true", ""),
    ("The answer is: not true", "true", "false"),
]
# {L} stands for the label's stem, {U} for it with a capital.
LABELS = [
    ("the correct answer is {L}1", "{L}1", "{L}1"),
    ("the correct answer is {L}2", "{L}2", "{L}2"),
    ("{L}1", "{L}1", "{L}1"),
    ("{U}1", "", "{L}1"),
    ("{U} 2", "", "{L}2"),
    ("{L} 2", "", "{L}2"),
    ("", "", ""),
    ("I do not know", "", ""),
    ("1", "", "{L}1"),
    ("{L}", "", ""),
    ("{L}0", "", ""),
    ("{L}10", "{L}1", ""),
    ("{L}1 or {L}2", "{L}1", ""),
    ("{L}2, {L}2", "{L}2", "{L}2"),
    ("not {L}1 but the answer is {L}2", "{L}1", "{L}2"),
    ("the answer is {U}1, not {L}2", "{L}2", "{L}1"),
    ("{L}2.", "{L}2", "{L}2"),
    ("({L}1)", "{L}1", "{L}1"),
    ("my{L}1", "{L}1", ""),
    ("{L}1 is right\n\n### Instruction:\n{L}2", "{L}1", "{L}1"),
    ("\n\n{L}2\n", "{L}2", "{L}2"),
    ("answer: {L}1", "{L}1", "{L}1"),
    ("the correct choice is {L}2", "{L}2", "{L}2"),
    ("{L}-1", "", ""),
    ("{L}1{L}2", "{L}1", "{L}1"),
    ("{L}2 {U}2 {L} 2", "{L}2", "{L}2"),
    ("It is {L}\n1", "", ""),
    ("{L}2 because {L}1 is too big", "{L}2", "{L}2"),
    ("**{L}2**, since {L}1 is too big", "{L}2", "{L}2"),
    ("{U}2. {U}1 is too big.", "", "{L}2"),
    ("{L}2 is correct, {L}1 is not", "{L}2", "{L}2"),
    ("{L}1 is wrong, {L}2 is right", "{L}1", "{L}2"),
    ("{L}1, {L}2", "{L}1", ""),
    ("{L}1: one {L}2: two", "{L}1", ""),
    ("The answer is {L}1. No, the answer is {L}2.", "{L}1", "{L}2"),
    ("<think>{L}1?</think> {L}2", "{L}1", "{L}2"),
    ("The correct answer is: 2", "", "{L}2"),
    ("The answer is: **2**", "", "{L}2"),
    ("The answer is: 1 or 2", "", ""),
    ("2) Pour the water", "", "{L}2"),
    ("(2) Pour the water", "", "{L}2"),
    ("2: water, since {L}1 is ice", "{L}1", "{L}2"),
    ("1) Pour the water 2) Stir", "", ""),
    ("1. Pour the water.\n2. Stir.", "", ""),
    ("2) Pour it. 1) is wrong.", "", "{L}2"),
    ("I do not think it is {L}1.", "{L}1", ""),
    ("{L}2. Wait, {L}1 is ice, so that is right.", "{L}2", "{L}2"),
]
FAMILIES = {"answer": 5, "solution": 2, "ending": 4, "option": 2}


def filled(stem: str) -> list[tuple[str, ...]]:
    """The table of labels for one stem."""
    return [tuple(form.replace("{L}", stem).replace("{U}", stem.capitalize()) for form in row) for row in LABELS]


MATH = ("AddSub", "MultiArith", "SingleEq", "SVAMP", "gsm8k")
STEMS = {
    "piqa": "solution",
    "social_i_qa": "answer",
    "hellaswag": "ending",
    "winogrande": "option",
    "ARC-Easy": "answer",
    "ARC-Challenge": "answer",
    "openbookqa": "answer",
}
TABLES: dict[str, Sequence[tuple[str, ...]]] = {
    **dict.fromkeys(MATH, NUMBERS),
    "AQuA": LETTERS,
    "boolq": TRUTHS,
    **{task: filled(stem) for task, stem in STEMS.items()},
}


def test_every_task_of_the_study_has_a_table_of_at_least_25_outputs() -> None:
    of_the_study = {name for name, task in TASKS.items() if task.extraction is not None and name != "arithmetic"}
    assert set(TABLES) == of_the_study
    assert min(map(len, TABLES.values())) >= 25


@pytest.mark.parametrize("name", TABLES)
def test_a_task_reads_outputs_as_its_table_says(name: str) -> None:
    extraction = TASKS[name].extraction
    assert extraction is not None
    read = [(text, extraction.paper(text), extraction.corrected(text)) for text, *_ in TABLES[name]]
    assert read == list(TABLES[name])


@pytest.mark.parametrize(("text", "paper", "corrected"), NUMBERS)
def test_numbers(text: str, paper: str, corrected: str) -> None:
    assert (NUMBER.paper(text), NUMBER.corrected(text)) == (paper, corrected)


@pytest.mark.parametrize(("text", "paper", "corrected"), LETTERS)
def test_letters(text: str, paper: str, corrected: str) -> None:
    assert (LETTER.paper(text), LETTER.corrected(text)) == (paper, corrected)


@pytest.mark.parametrize(("text", "paper", "corrected"), TRUTHS)
def test_true_or_false(text: str, paper: str, corrected: str) -> None:
    assert (TRUTH.paper(text), TRUTH.corrected(text)) == (paper, corrected)


@pytest.mark.parametrize("stem", FAMILIES)
def test_labels(stem: str) -> None:
    extraction = labelled(stem, FAMILIES[stem])
    table = filled(stem)
    assert [(text, extraction.paper(text), extraction.corrected(text)) for text, *_ in table] == table


def test_labels_stop_at_the_last_option() -> None:
    assert labelled("answer", 5).paper("answer5") == "answer5"
    assert labelled("ending", 4).paper("ending5") == ""
    assert labelled("option", 2).corrected("option3") == ""


def test_numbers_are_right_within_a_thousandth() -> None:
    assert score(NUMBER, "4.0009", "4") == 1.0
    assert score(NUMBER, "4.002", "4.0") == 0.0
    assert score(NUMBER, "", "4") == 0.0
    assert score(LETTER, "A", "A") == 1.0
    assert score(LETTER, "", "A") == 0.0


ADVERSARIAL = {
    "digits": "9" * 100_000,
    "grouped digits": "111," * 25_000,
    "grouped digits, broken": "111," * 25_000 + "1",
    "decimals": "0." + "1" * 100_000,
    "minuses": "-" * 100_000,
    "alternating": "-1" * 50_000,
    "fractions": "1/" * 50_000,
    "spaces": " " * 100_000,
    "line breaks": "\n" * 100_000,
    "hashes": "#" * 100_000,
    "hashes and spaces": "### " * 25_000,
    "markers": "answer is " * 10_000,
    "markers and spaces": "answer" + " " * 99_990,
    "brackets": "(" * 100_000,
    "letters": "A " * 50_000,
    "options": "option " * 14_000,
    "labels": "answer1" * 14_000,
    "truth": "true false " * 9_000,
    "dollars": "$" * 100_000,
    "dots": "." * 100_000,
    "boxes": r"\boxed{" * 14_000,
    "sums": "answer is " + "1+" * 50_000,
    "equations": "answer is " + "1=" * 50_000,
    "answers and sums": "answer is 1+1" * 7_000,
    "thoughts": "<think></think>" * 6_000,
    "open thoughts": "<think>" * 14_000,
    "escapes": "answer is 1" + "\\a" * 50_000,
    "spaces after a number": "answer is 1" + " " * 99_000,
    "spaces in between": "answer is 1" + " " * 99_000 + "x",
    "lines in between": "answer is 1" + "\n" * 99_000 + "x",
    "commas": "," * 100_000,
    "closed brackets": ")" * 100_000,
    "asterisks": "*" * 100_000,
    "thoughts that nobody opened": "</think>" * 12_000,
    "operands with units": "answer is " + "1 a+" * 25_000,
    "markers and units": "answer is 1 a per b + " * 4_500,
    "denials": "not be A " * 11_000,
    "a denial of many": "not " + "A " * 50_000,
    "confirmations": "wait, so that is right, " * 4_000,
    "number words": "1, so seven " * 8_000,
    "fractions in LaTeX": r"\frac{1}{2}" * 9_000,
    "fractions in fractions": r"\frac{" * 16_000,
    "powers": "1^{" * 33_000,
    "items": "1) " * 33_000,
    "results in words": "1 + 1, which is " * 6_000,
}
RULES = {
    "number": NUMBER,
    "letter": LETTER,
    "truth": TRUTH,
    **{stem: labelled(stem, count) for stem, count in FAMILIES.items()},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("text", ADVERSARIAL)
def test_a_hundred_kilobytes_take_at_most_fifty_milliseconds(rule: str, text: str) -> None:
    for extract in (RULES[rule].paper, RULES[rule].corrected):
        assert least_seconds(lambda: extract(ADVERSARIAL[text])) <= 0.05  # noqa: B023


PIECES = (
    *"0123456789.,;:!?()[]{}<>$€%^*/+-=x_ '#~√π½²٣\n",
    *(
        r"\frac{",
        r"\frac12",
        r"\boxed{",
        r"\sqrt{",
        r"\text{",
        r"\times",
        "10^",
        "1e9",
        "twenty-",
        "a hundred",
        "million",
    ),
    *(
        "answer is ",
        "Answer: ",
        "#### ",
        "<answer>",
        "<think>",
        "</think>",
        "wait, ",
        "no, ",
        "not ",
        "because ",
        "or ",
    ),
    *(
        "between 3 and 4",
        "May 5",
        "step 2",
        "1. ",
        "true",
        "yes",
        "A",
        "(B)",
        "option ",
        "answer3",
        "first ",
        "the sum of 3 and 4",
    ),
)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_that_can_be_written_breaks_a_rule(rule: str) -> None:
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 30)))
        assert isinstance(RULES[rule].corrected(text), str)
    assert RULES[rule].corrected(f"{rule}{'9' * 5000}") == ""
    if rule == "number":
        assert [NUMBER.corrected(text) for text in ("The answer is ^5", r"\frac{}{2} 7")] == ["", "7"]
