# 2-core CPU, about half an hour. SmolLM2-135M-Instruct learns to call python always, and with the
# right code: sampled accuracy about 0.3 -> 0.98.
out_dir = "out/smollm2_calc"
model = "out/smollm2_calc_sft"
tune = "lora"
lora_r = 16
lora_alpha = 32
data = "task:calc"
system_prompt = "Give the answer in \\boxed{}."
tools = ("python",)
format = "fence"
rewards = ("correct",)
steps = 40
save_every = 10
eval_every = 10
eval_rows = 64
token_budget = 4096
prompts_per_step = 8
group_size = 8
max_tokens = 256
max_new_tokens = 48
max_turns = 3
trajectory_timeout = 1200.0  # of a machine that does other work, too
learning_rate = 5e-4
