# 1x24 GB GPU, under an hour; not run here. Rejection sampling: SFT on a run's own right rollouts.
# python evaluate.py --config gsm8k.py --split=train --n=4 --temperature=1 --save_to=out/gsm8k_tries
out_dir = "out/gsm8k_sft"
model = "Qwen/Qwen2.5-0.5B-Instruct"
data = "out/gsm8k_tries/rollouts.jsonl"
min_reward = 1.0
val_rows = 64
tools = ("python",)
format = "hermes"
max_tokens = 2048
epochs = 2
batch_size = 32
tune = "lora"
learning_rate = 1e-4
dtype = "bfloat16"
