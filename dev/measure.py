"""Prints how the code reads: its size, the density of its loops, and what one step of calc enters.

    python dev/measure.py                # of this tree; the step needs out/calc_sft or --model=…
    python dev/measure.py --no-step      # only what is counted in the source

A code line is one that holds any token but comments; its tokens are those of python's `tokenize`,
indentation and line ends not counted, docstrings left out. Comments are lines that hold one, alone
or behind code, as a share of all lines of either kind. "Entered" counts the functions of this
repository that one training step calls, in all of its threads, from sampling to the optimizer.
"""

import argparse
import ast
import contextlib
import io
import sys
import tempfile
import threading
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NOT_CODE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
NOT_CODE |= {tokenize.COMMENT, tokenize.ENCODING}
# file: the functions that a reader of the story meets first
LOOPS = {
    "train_grpo.py": ("train_here", "learn", "accumulate"),
    "rollout.py": ("rollouts", "play", "play_turn"),
    "train_sft.py": ("train_here", "accumulate"),
    "chat.py": ("observation",),
}


def shipped() -> list[Path]:
    """Lists the python files of this tree but tests/, bench/, dev/, and what git ignores."""
    ignored = {"tests", "bench", "dev", "out", "build", ".venv"}
    files = ROOT.rglob("*.py")
    return sorted(f for f in files if not ignored & set(f.relative_to(ROOT).parts))


def function_nodes(file: Path) -> dict:
    """Finds the functions and methods of a file, {name: node}; of equal names the last one."""
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node for node in ast.walk(tree) if isinstance(node, kinds)}


def density(source: str, first: int, last: int) -> tuple[float, float, int]:
    """Measures the lines first..last: (tokens a code line, share of comment lines, code lines)."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(getattr(body[0], "value", None), ast.Constant):
                docstrings |= set(range(body[0].lineno, body[0].end_lineno + 1))
    tokens = {}
    comments = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if not first <= line <= last or line in docstrings:
            continue
        if token.type == tokenize.COMMENT:
            comments.add(line)
        if token.type not in NOT_CODE:
            tokens[line] = tokens.get(line, 0) + 1
    code = len(tokens)
    return (
        sum(tokens.values()) / max(1, code),
        len(comments) / max(1, len(comments | tokens.keys())),
        code,
    )


def print_source() -> None:
    """Prints what is counted in the source alone."""
    files = shipped()
    lines = sum(len(file.read_text().splitlines()) for file in files)
    print(f"{'python files':34} {len(files):6}")
    print(f"{'of these in the root':34} {sum(file.parent == ROOT for file in files):6}")
    print(f"{'lines':34} {lines:6,}")
    print(f"\n{'function':34} {'lines':>6} {'tokens/line':>12} {'comments':>9}")
    for name, functions in LOOPS.items():
        source = (ROOT / name).read_text()
        nodes = function_nodes(ROOT / name)
        for function in functions:
            if function not in nodes:
                print(f"{name + ' ' + function:34} is not there")
                continue
            node = nodes[function]
            mean, share, code = density(source, node.lineno, node.end_lineno)
            print(f"{name + ' ' + function:34} {code:6} {mean:12.1f} {share:9.0%}")
    print(f"\n{'densest files':34} {'lines':>6} {'tokens/line':>12} {'comments':>9}")
    rows = []
    for file in files:
        source = file.read_text()
        count = len(source.splitlines())
        rows.append((*density(source, 1, count), file.relative_to(ROOT)))
    for mean, share, code, name in sorted(rows, key=lambda row: -row[0])[:12]:
        print(f"{str(name):34} {code:6} {mean:12.1f} {share:9.0%}")
    for script in ("train_grpo", "train_sft"):
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        (config,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
        keys = sum(isinstance(node, ast.AnnAssign) for node in config.body)
        print(f"{'keys of ' + script + '.Config':34} {keys:6}")


def print_step(model: str) -> None:
    """Prints how many functions the second of two steps of calc enters, and in how many files."""
    import train_grpo
    from run import config
    from run.log import Log

    entered = set()
    counting = []  # non-empty from the end of the first step to the end of the second

    def note(frame, event, argument):
        if event == "call" and counting:
            code = frame.f_code
            ours = code.co_filename.startswith(str(ROOT)) and ".venv" not in code.co_filename
            if ours and not code.co_name.startswith("<"):
                entered.add((code.co_filename, code.co_qualname, code.co_firstlineno))

    log_step = Log.step

    def count_the_second(self, metrics):
        log_step(self, metrics)
        if metrics["step"] == 0:
            counting.append(True)
        else:
            counting.clear()

    Log.step = count_the_second
    threading.setprofile_all_threads(note) if sys.version_info >= (3, 12) else None
    threading.setprofile(note)
    sys.setprofile(note)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = ["--config", str(ROOT / "configs" / "calc.py"), f"--model={model}", "--steps=2"]
        train_grpo.train(config.parse(train_grpo.Config, [*argv, f"--out_dir={folder}/out"]))
    sys.setprofile(None)
    files = {file for file, *_ in entered}
    lines = 0
    for file in files:
        nodes = {n.lineno: n for n in ast.walk(ast.parse(Path(file).read_text()))
                 if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}  # fmt: skip
        for other, _, first in entered:
            node = next((nodes[at] for at in range(first, first + 6) if at in nodes), None)
            if other == file and node:
                lines += node.end_lineno - node.lineno + 1
    print(
        f"\none step of calc enters {len(entered)} functions in {len(files)} files, {lines} lines"
    )
    for file in sorted(files):
        names = sorted(name for other, name, _ in entered if other == file)
        print(f"  {Path(file).relative_to(ROOT)}: {len(names)}: {', '.join(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-step", action="store_true", help="only count in the source")
    parser.add_argument("--model", default=str(ROOT / "out" / "calc_sft"), help="a warm start")
    given = parser.parse_args()
    print_source()
    if not given.no_step and Path(given.model).is_dir():
        print_step(given.model)


if __name__ == "__main__":
    main()
