"""Warm starts from a teacher: a student's accuracy by the number of episodes that it was shown.

    python bench/teacher.py                       # three seeds: half an hour on 2 quiet cores
    python bench/teacher.py --seeds=0 --episodes=0,200 --save_to=out/evidence

The task is multi: which of three tools does a question need? The teacher is what
`python demo.py --task=multi` makes. The student has the same shape and other weights: it was
taught the task's demonstrations that call no tool, so it reads questions, copies names, and
guesses. The teacher plays rows of the train split with live tools, sampled; what it got right of
the first n of them is what the student learns from; then both students, of SFT alone and of GRPO
behind it, are measured greedily on held-out problems. Written to save_to: teacher.json, and
teacher.png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import evaluate
import train_grpo
import train_sft
from learning import model as models
from tasks import multi, tiny

GUESSES = 12_000  # demonstrations from which those without a call are taken
PASSES = 9600  # rows that a student is shown: many times those of few episodes
PROBLEMS = 256  # held out


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: tuple[int, ...] = (0, 50, 200, 800)
    steps: int = 40  # of GRPO, behind SFT
    out_dir: str = "out/teacher"  # where the runs are made; what is there is used again
    save_to: str = "evidence/teacher"


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    out_dir = Path(cfg.out_dir)
    save_to = Path(cfg.save_to)
    save_to.mkdir(parents=True, exist_ok=True)
    file = save_to / "teacher.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    teacher = make_teacher(out_dir)
    for seed in cfg.seeds:
        student = make_student(teacher, out_dir / f"seed{seed}", seed)
        played = play_teacher(teacher, max(cfg.episodes), seed, out_dir)
        for count in cfg.episodes:
            if any((row["seed"], row["episodes"]) == (seed, count) for row in rows):
                continue
            folder = out_dir / f"seed{seed}/{count}"
            rows.append({"seed": seed, "episodes": count})
            rows[-1] |= teach(student, played, count, cfg.steps, seed, folder)
            print(rows[-1], flush=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, save_to / "teacher.png")


def make_teacher(out_dir: Path) -> str:
    """Trains a model on the task, as the demo does it; returns its folder."""
    sft = out_dir / "teacher_sft"
    if not (sft / "config.json").exists():
        train(train_sft, ["--config=multi_sft.py", f"--out_dir={sft}"])
    teacher = out_dir / "teacher"
    if not (teacher / "config.json").exists():
        train(train_grpo, ["--config=multi.py", f"--model={sft}", f"--out_dir={teacher}"])
    return str(teacher)


def make_student(teacher: str, folder: Path, seed: int) -> str:
    """Trains a student that has never seen a tool called; returns its folder."""
    student = folder / "student"
    if (student / "config.json").exists():
        return str(student)
    tokenizer = models.load_tokenizer(teacher)
    blank = folder / "blank"
    models.save(tiny.tiny(tokenizer, seed), tokenizer, blank)
    guesses = folder / "guesses.jsonl"
    with open(guesses, "w", encoding="utf-8") as file:
        for messages in multi.demos(GUESSES, seed):
            if not any("tool_calls" in message for message in messages):
                file.write(json.dumps({"messages": messages}) + "\n")
    argv = ["--config=multi_sft.py", "--whole_names=false", f"--model={blank}"]
    argv += [f"--data={guesses}", f"--seed={seed}", f"--out_dir={student}"]
    return train(train_sft, argv)


def play_teacher(teacher: str, count: int, seed: int, out_dir: Path) -> str:
    """Plays the teacher's episodes; returns the file with them."""
    folder = out_dir / f"seed{seed}/episodes"
    if not (folder / "eval.json").exists():
        measure(teacher, folder, ["--split=train", "--temperature=1", f"--limit={count}"], seed)
    return str(folder / "rollouts.jsonl")


def teach(
    student: str, played: str, count: int, steps: int, seed: int, folder: Path
) -> dict[str, float]:
    """Teaches the student the first `count` episodes, and measures it, before and after GRPO."""
    taught = student
    if count:
        argv = [f"--model={student}", f"--data={played}", f"--rows={count}", "--min_reward=1"]
        argv += ["--optimizer=muon", "--learning_rate=3e-3", "--schedule=linear"]
        argv += [f"--epochs={PASSES / count:g}", f"--seed={seed}", f"--out_dir={folder}/sft"]
        taught = train(train_sft, argv)
    argv = ["--config=multi.py", f"--model={taught}", f"--steps={steps}"]
    trained = train(train_grpo, [*argv, f"--seed={seed}", f"--out_dir={folder}/grpo"])
    held_out = ["--split=test", f"--limit={PROBLEMS}"]
    before = measure(taught, folder / "eval_sft", held_out, seed=0)
    after = measure(trained, folder / "eval_grpo", held_out, seed=0)
    return {
        "sft": before["accuracy"],
        "sft_calls": before["tool_call_rate"],
        "grpo": after["accuracy"],
        "grpo_calls": after["tool_call_rate"],
    }


def train(script, argv: list[str]) -> str:
    cfg = config.parse(script.Config, argv, script.check)
    script.train(cfg)
    return cfg.out_dir


def measure(model: str, folder: Path, argv: list[str], seed: int) -> dict:
    """Evaluates on the task. argv: keys of evaluate.py."""
    argv = [*argv, f"--seed={seed}", f"--save_to={folder}"]
    given = config.parse(evaluate.Config, argv)
    cfg = config.parse(train_grpo.Config, ["--config=multi.py"], train_grpo.check)
    return evaluate.evaluate(evaluate.for_evaluation(cfg, given, model), given)


def draw(rows: list[dict], file: Path) -> None:
    """Draws accuracy by episodes: a thin line a seed, a thick one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({row["episodes"] for row in rows})
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for stage, colour in (("sft", "tab:orange"), ("grpo", "tab:blue")):
        for seed in sorted({row["seed"] for row in rows}):
            of_seed = {row["episodes"]: row[stage] for row in rows if row["seed"] == seed}
            values = [of_seed.get(count) for count in counts]
            axes.plot(range(len(counts)), values, color=colour, alpha=0.35, linewidth=1)
        means = []
        for count in counts:
            values = [row[stage] for row in rows if row["episodes"] == count]
            means.append(sum(values) / len(values))
        label = "after SFT on them" if stage == "sft" else "and GRPO behind it"
        axes.plot(range(len(counts)), means, color=colour, marker="o", label=label)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("episodes that the teacher played")
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    config.main(main)
