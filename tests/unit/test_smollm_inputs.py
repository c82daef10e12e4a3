"""The real-model study's rows: equations of the data as one writes them, and only those that come to their answer."""

from __future__ import annotations

import pytest

from tutelage.studies.smollm_inputs import rows


@pytest.mark.parametrize(
    ("equation", "answer", "worked"),
    [
        ("X=(49.0-44.0)", 5.0, "49 - 44 = 5. The answer is 5."),
        ("x=12.02+0.01*57.009", 12.59009, "12.02 + 0.01 * 57.009 = 12.59009. The answer is 12.59009."),
        ("x=(9.0-1.0)/(1.0+3.0)", 2.0, "(9 - 1) / (1 + 3) = 2. The answer is 2."),
        ("x=1236666.75-0.0", 1236666.75, "1236666.75 - 0 = 1236666.75. The answer is 1236666.75."),
        ("x=3.0*-4.0", -12.0, "3 * -4 = -12. The answer is -12."),
        ("miles=4.0/30.0*48.0", 6.4, "4 / 30 * 48 = 6.4. The answer is 6.4."),
        ("x=0.8*0.6667", 0.53, None),
        ("(200.0/x)-(200.0/(10.0+x))=1.0", 40.0, None),
        ("x=(10.0-x)*2.0", 4.0, None),
    ],
)
def test_an_equation_is_worked_out_as_one_writes_it_or_left_out(
    equation: str, answer: float, worked: str | None
) -> None:
    found = rows([{"original_text": "How many?", "equation": equation, "ans": answer}])
    assert found == ([{"question": "How many?", "answer": worked}] if worked else [])
