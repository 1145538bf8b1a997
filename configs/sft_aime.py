# 1x80 GB GPU, hours; not run here. A warm start from a stronger model's right rollouts:
# python evaluate.py --config aime.py --endpoint=https://host/v1 --model=name --split=train
#     --limit=2000 --n=4 --temperature=1 --save_to=out/aime_teacher
out_dir = "out/aime_sft"
model = "Qwen/Qwen2.5-7B-Instruct"
data = "out/aime_teacher/rollouts.jsonl"
min_reward = 1.0
val_rows = 64
tools = ("python",)
format = "hermes"
max_tokens = 10240
epochs = 2
batch_size = 32
gradient_checkpointing = True
tune = "lora"
learning_rate = 1e-4
dtype = "bfloat16"
