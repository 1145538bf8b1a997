"""Writes demonstrations that call python, from worked solutions such as GSM8K's.

    python -m tasks.worked --file=gsm8k_train.jsonl --out=out/gsm8k_worked.jsonl

GSM8K (Cobbe et al., arXiv:2110.14168) marks each calculation of a solution, "48/2 = <<48/2=24>>24
clips", and ends it with "#### 72". Each mark becomes a call: the text before it, `print(48/2)`, the
result, and the text goes on behind it. For a model that is too small to find several steps by
itself: SFT on these first, then GRPO.

A solution is left out where it marks nothing, where a mark is no arithmetic, or where its value
is not what python says: one in 80 of GSM8K's.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from run import config
from run.config import UserError

if __name__ == "__main__":
    config.answer_help(__file__)

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")  # no names: nothing else than a number comes of it
CALLED = re.compile(r"[0-9.)] *\(")
MOST_CHARACTERS = 100  # of an expression
ROUNDED = 0.01  # how far from python's a value may be that was rounded by hand, in parts of it


@dataclass
class Config:
    file: str = ""  # .jsonl with the columns question and answer
    out: str = "out/worked.jsonl"  # .jsonl with the column messages; must be new
    limit: int | None = None  # the first n rows


def convert(cfg: Config) -> tuple[int, int]:
    """Writes the demonstrations; returns how many were written and left out. Raises UserError where
    a file is missing, there already, or has other rows."""
    rows = _read(cfg)
    out = Path(cfg.out).expanduser()
    if out.exists():
        raise UserError(f"out = {cfg.out!r} is there already: give another name, or remove it")
    made = [demonstration(row["question"], row["answer"]) for row in rows]
    kept = [messages for messages in made if messages]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for messages in kept:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(kept), len(made) - len(kept)


def _read(cfg: Config) -> list[dict]:
    path = Path(cfg.file).expanduser()
    if not cfg.file or not path.is_file():
        raise UserError(f"file = {cfg.file!r}: expected a .jsonl file with question and answer")
    rows = []
    # not splitlines(), which also ends a line at characters that JSON may hold
    for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{cfg.file}, line {number}: no JSON") from None
        texts = [row.get(name) for name in ("question", "answer")] if isinstance(row, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{cfg.file}, line {number}: expected texts as question and answer")
        rows.append(row)
        if len(rows) == cfg.limit:
            break
    return rows


def demonstration(question: str, answer: str) -> list[dict] | None:
    """Makes the chat messages of a solved problem; None if its solution cannot be shown as calls.

    question: the prompt. answer: the solution, with its marks, and "#### " and the number.
    """
    solution, _, number = answer.rpartition("####")
    messages = [{"role": "user", "content": question}]
    at = 0
    for mark in MARK.finditer(solution):
        result = calculate(mark[1], mark[2])
        if result is None:
            return None
        said = solution[at : mark.start()].strip().removesuffix("$").rstrip("= ")
        function = {"name": "python", "arguments": {"code": f"print({mark[1].strip()})"}}
        call = {"type": "function", "function": function}
        messages.append({"role": "assistant", "content": said, "tool_calls": [call]})
        messages.append({"role": "tool", "name": "python", "content": result})
        at = mark.end()
    if at == 0:
        return None
    rest = solution[at:].strip()
    final = f"{rest}\nThe answer is \\boxed{{{number.strip()}}}."
    messages.append({"role": "assistant", "content": final})
    return messages


def calculate(expression: str, stated: str) -> str | None:
    """Computes what python prints for an expression; None unless it is about what is stated."""
    if len(expression) > MOST_CHARACTERS or not ARITHMETIC.fullmatch(expression):
        return None
    if "**" in expression:  # a power could take for ever
        return None
    if CALLED.search(expression):  # 2(3): python would call the number
        return None
    try:
        value = eval(expression, {"__builtins__": {}})
        by_hand = float(stated.replace(",", ""))
    except (ArithmeticError, SyntaxError, TypeError, ValueError):
        return None
    if abs(value - by_hand) > ROUNDED * max(1, abs(value)):
        return None
    return str(value)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    kept, left_out = convert(cfg)
    print(f"{cfg.out}: {kept} demonstrations; {left_out} solutions left out")


if __name__ == "__main__":
    config.main(main)
