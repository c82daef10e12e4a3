"""The 14 tasks of the study in one table: LLM-Adapters' test files (Hu et al. 2023, arXiv 2304.01933).

To add a task of these forms, add it here; a task of your own needs no code at all (`custom.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from tutelage.evaluator.scoring.extraction import LETTER, NUMBER, TRUTH, Extraction, labelled
from tutelage.evaluator.tasks.base import Choices, Item, Task
from tutelage.evaluator.tasks.multiple_choice import (
    FilledBlank,
    LabelledOptions,
    lettered_options,
    no_or_yes,
    wikihow_context,
    without_wikihow_tags,
)

SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters, commit 8166572, dataset/"
_CHOOSE = "Please choose the correct {} to the question: "
_VALIDATION = "the validation split: the test split has no public answers"
_IN_MATH10K = "of its items are in the MAWPS training set, which is part of Math10K"


def _number_task(name: str, count: int, *known_problems: str) -> Task:
    """A word problem whose answer is a number; nothing to choose from, so nothing to guess."""
    return Task(
        name=name,
        version=1,
        source=f"{SOURCE}{name}/test.json",
        count=count,
        chance_level=0.0,
        max_new_tokens=256,
        extraction=NUMBER,
        known_problems=known_problems,
    )


def _choice_task(
    name: str,
    count: int,
    chance_level: float,
    extraction: Extraction,
    choices: Callable[[Item], Choices],
    *known_problems: str,
    max_new_tokens: int = 32,
    split: str = "",
    source: str = SOURCE,
    harness_name: str = "",
) -> Task:
    return Task(
        name=name,
        version=1,
        source=f"{source}{name}/test.json{split}",
        count=count,
        chance_level=chance_level,
        max_new_tokens=max_new_tokens,
        extraction=extraction,
        known_problems=known_problems,
        choices=choices,
        harness_name=harness_name,
    )


TASKS = (
    # Grade-school word problems of two to eight steps (Cobbe et al. 2021).
    _number_task("gsm8k", 1319, "the rationale in the file is right in 771 of 1319 items; only the answer is used"),
    # Word problems varied so that shallow cues mislead (Patel et al. 2021).
    _number_task("SVAMP", 1000, "the rationale in the file is right in 803 of 1000 items; only the answer is used"),
    # Word problems of several steps (Roy and Roth 2015).
    _number_task("MultiArith", 600, f"82 % {_IN_MATH10K}", "20 questions appear twice"),
    # Word problems of one equation (Koncel-Kedziorski et al. 2015).
    _number_task("SingleEq", 508, f"86 % {_IN_MATH10K}", "134 answers are not integers"),
    # Word problems of one addition or subtraction (Hosseini et al. 2014).
    _number_task("AddSub", 395, f"83 % {_IN_MATH10K}", "126 answers are not integers"),
    # Algebra word problems with five options (Ling et al. 2017).
    _choice_task(
        "AQuA",
        254,
        0.2,
        LETTER,
        lettered_options,
        "the paper's extraction takes the first capital A to E anywhere, so 'Because …' is option B",
        "254 items: the standard error near chance is 2.5 points",
        max_new_tokens=256,
    ),
    # Which of four endings follows (Zellers et al. 2019).
    _choice_task(
        "hellaswag",
        10042,
        0.25,
        labelled("ending", 4),
        LabelledOptions(
            "Please choose the correct ending to complete the given sentence: ",
            "Ending",
            doc_to_text="{question}",
            process_question=wikihow_context,
            process_option=without_wikihow_tags,
        ),
        "the paper's prompt keeps WikiHow's tags such as [header]; loglik removes them",
        "where the unfinished sentence begins is read off the punctuation, which the file does not mark",
        split=" (the public validation split)",
        harness_name="hellaswag",
    ),
    # Yes-or-no questions that people asked a search engine, without the passage (Clark et al. 2019).
    _choice_task(
        "boolq",
        3270,
        0.5,
        TRUTH,
        no_or_yes,
        "closed-book: the passage is not given",
        "62.2 % of the answers are true, so always saying true scores 62.2 %",
    ),
    # Why people act and what follows (Sap et al. 2019).
    _choice_task(
        "social_i_qa",
        1954,
        0.3333,
        labelled("answer", 5),
        LabelledOptions(_CHOOSE.format("answer"), "Answer", doc_to_text="Q: {question}\nA:"),
        _VALIDATION,
        harness_name="social_iqa",
    ),
    # Two ways to reach a physical goal, one of which works (Bisk et al. 2020).
    _choice_task(
        "piqa",
        1838,
        0.5,
        labelled("solution", 2),
        LabelledOptions(_CHOOSE.format("solution"), "Solution", separator="\n\n"),
        _VALIDATION,
        harness_name="piqa",
    ),
    # Grade-school science questions, the easier part (Clark et al. 2018).
    _choice_task(
        "ARC-Easy",
        2376,
        0.25,
        labelled("answer", 5),
        LabelledOptions(_CHOOSE.format("answer"), "Answer"),
        "eleven items have three or five options instead of four",
        harness_name="arc_easy",
    ),
    # Those that retrieval and co-occurrence get wrong (Clark et al. 2018).
    _choice_task(
        "ARC-Challenge",
        1172,
        0.25,
        labelled("answer", 5),
        LabelledOptions(_CHOOSE.format("answer"), "Answer"),
        harness_name="arc_challenge",
    ),
    # Which of two names fills the blank (Sakaguchi et al. 2020).
    _choice_task(
        "winogrande",
        1267,
        0.5,
        labelled("option", 2),
        FilledBlank(
            "Please choose the correct answer to fill in the blank to complete the given sentence: ", "Option", end=" "
        ),
        "the validation split of winogrande_xl: the test split has no public answers",
        harness_name="winogrande",
    ),
    # Science questions that combine a fact with common knowledge (Mihaylov et al. 2018).
    _choice_task(
        "openbookqa",
        500,
        0.25,
        labelled("answer", 5),
        LabelledOptions(_CHOOSE.format("answer"), "Answer", doc_to_text="{question}"),
        "500 items: the standard error near chance is 1.9 points",
        harness_name="openbookqa",
    ),
)
