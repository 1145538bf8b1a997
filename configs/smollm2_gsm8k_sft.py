# 2-core CPU. SmolLM2-135M-Instruct, which knows how to call python, learns that school problems
# take several steps. The demonstrations are GSM8K's own worked solutions:
# python -m tasks.worked --file=gsm8k_train.jsonl --out=out/gsm8k_worked.jsonl
out_dir = "out/smollm2_gsm8k_sft"
model = "out/smollm2_calc"  # whose adapter is trained on
tune = "lora"
lora_r = 16
lora_alpha = 32
data = "out/gsm8k_worked.jsonl"
rows = 530  # more of them, up to 7,378, where there is time
val_rows = 30
val_every = 10
system_prompt = "Give the answer in \\boxed{}."
tools = ("python",)
format = "fence"
max_tokens = 512
batch_size = 25
token_budget = 4096
learning_rate = 5e-4
schedule = "linear"
warmup = 3
