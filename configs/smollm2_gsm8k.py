# 2-core CPU, as long as you like: a model of 135 M parameters is too small for most of GSM8K.
out_dir = "out/smollm2_gsm8k"
model = "out/smollm2_calc"  # whose adapter is trained on: it knows how to call python
tune = "lora"
lora_r = 16
lora_alpha = 32
data = "openai/gsm8k:main"  # or files with the same columns: --data=gsm8k_train.jsonl
prompt_column = "question"
answer_column = "answer"
answer_after = "####"
system_prompt = "Give the answer in \\boxed{}."
tools = ("python",)
format = "fence"
rewards = ("correct",)
steps = 40
save_every = 10
token_budget = 4096
prompts_per_step = 8
group_size = 8
max_tokens = 448
max_new_tokens = 96
max_turns = 3
trajectory_timeout = 1200.0  # of a machine that does other work, too
learning_rate = 2e-4
