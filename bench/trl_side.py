"""What both benches against TRL need: its settings, and how they run and save what they measured.

TRL's GRPOTrainer gets the settings of ours wherever both have one (optimizer and betas, no weight
decay, constant rate, clip, no KL, float32, the norm that gradients are cut to). Whatever costs it
time and is no part of training is off: logging, saving, progress bars, gradient checkpointing
(which it switches on by default).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# from a folder beside this one; ours are imported below
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.config import UserError

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may wait for a network


def arguments(out_dir, steps: int, batch: int, trajectories: int, learning_rate: float, **options):
    """Makes TRL's GRPOConfig. batch: rows of a forward pass; trajectories: rows of an update;
    options: of GRPOConfig, beside those that all benches share."""
    from trl import GRPOConfig

    return GRPOConfig(
        str(out_dir),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=trajectories // batch,
        num_generations=8,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        temperature=1.0,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def in_subprocess(script: str, arguments: list[str]) -> dict:
    """Runs the script again with more arguments; the last line that it prints is its result."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True)
    if done.returncode:
        errors = done.stderr.decode("utf-8", "replace")[-3000:]
        raise UserError(f"{' '.join(arguments)} failed with exit code {done.returncode}:\n{errors}")
    return json.loads(done.stdout.decode().splitlines()[-1])


def save(path: str, values: dict) -> None:
    """Writes values as JSON, with the machine and the versions that they were measured on."""
    import platform

    import torch
    import transformers
    import trl

    about = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(about | values, indent=1) + "\n")
