"""Both notebooks run, their outputs are stored, and what 02 computes by hand is what learn() does.

pytest tests/test_notebooks.py
"""

import asyncio
import contextlib
import io
from pathlib import Path

import pytest
import torch

import train_grpo

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ONE_ROLLOUT, BY_HAND = NOTEBOOKS


def read(path):
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All text that the cells gave."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs
    ]
    return "".join(texts)


def executed(path):
    """The notebook, run in a kernel of its own."""
    nbclient = pytest.importorskip("nbclient")
    notebook = read(path)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    return notebook


def test_one_rollout_runs():
    text = printed(executed(ONE_ROLLOUT))
    assert "mask 1" in text and "answered, 2 turns" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_are_stored_and_small(path):
    notebook = read(path)
    assert len(path.read_bytes()) < 40_000
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert all(cell.execution_count for cell in code_cells(notebook)), "store it after a run"
    assert len(outputs) >= len(code_cells(notebook)) - 1
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"


def test_the_stored_outputs_are_those_of_todays_cells():
    """As far as they do not depend on the machine's rounding and clock."""
    assert "answered, 2 turns" in printed(read(ONE_ROLLOUT))
    stored = printed(read(BY_HAND))
    before, after = (
        float(stored.split(f"p(<tool_call>) {name}: ")[1].split()[0])
        for name in ("before", "after")
    )
    assert after > before + 0.1


class Recorder:
    """Stands where an optimizer is, and only keeps the gradient."""

    param_groups = ()

    def __init__(self, model):
        self.model = model
        self.gradient = []

    def step(self):
        self.gradient = [parameter.grad.clone() for parameter in self.model.parameters()]

    def zero_grad(self):
        self.model.zero_grad()


def gradient_of_learn(model, trajectories):
    """What train_grpo.learn() hands to its optimizer, unclipped."""
    recorder = Recorder(model)
    cfg = train_grpo.Config(max_grad_norm=1e9)
    settings = train_grpo.LearnSettings.of(cfg)
    train_grpo.learn(model, [recorder], trajectories, cfg.learning_rate, settings)
    return recorder.gradient


@pytest.fixture(scope="module")
def by_hand():
    """The names of notebook 02 after all its cells were run here, and `printed`, what they print.
    An event loop is running, as it is in a kernel."""
    names = {}
    output = io.StringIO()

    async def run_cells():
        for cell in code_cells(read(BY_HAND)):
            exec(compile(cell.source, str(BY_HAND), "exec"), names)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(ROOT / "notebooks")  # where a kernel starts
        asyncio.run(run_cells())
    return names | {"printed": output.getvalue()}


def test_grpo_by_hand_runs(by_hand):
    text = by_hand["printed"]
    assert "p(<tool_call>) after" in text and "nan" not in text.split("p(<tool_call>)")[0]


def test_its_gradient_is_that_of_learn(by_hand):
    """`before` is the model that sampled; the gradient of its update is still on `policy`."""
    group = by_hand["group"]
    expected = gradient_of_learn(by_hand["before"], group)
    ours = [parameter.grad for parameter in by_hand["policy"].parameters()]
    assert len(ours) == len(expected) > 0
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 1e-3
    for by_hand_one, learnt in zip(ours, expected, strict=True):
        assert (by_hand_one - learnt).abs().max() < 1e-5 * largest


def test_its_advantages_are_those_of_learn(by_hand):
    """learn() sets them on the trajectories, one for each turn."""
    group = by_hand["group"]
    gradient_of_learn(by_hand["before"], group)
    for trajectory, advantage in zip(group, by_hand["advantages"].tolist(), strict=True):
        assert trajectory.advantages == pytest.approx([advantage] * len(trajectory.turn_starts))


def test_what_was_right_became_more_probable(by_hand):
    probability = by_hand["probability"]
    right = next(trajectory for trajectory in by_hand["group"] if trajectory.reward == 1)
    assert probability(by_hand["policy"], right) > probability(by_hand["before"], right) + 0.05
    assert torch.is_tensor(by_hand["advantages"]) and 0 < by_hand["rewards"].sum() < 8


def test_it_is_short_beside_its_imports():
    lines = [line for cell in code_cells(read(BY_HAND))[1:] for line in cell.source.splitlines()]
    assert len([line for line in lines if line.strip()]) <= 75
