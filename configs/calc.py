# 2-core CPU, about 1 minute. GRPO from out/calc_sft: held-out accuracy about 0.3 -> 0.99.
out_dir = "out/calc"
model = "out/calc_sft"
data = "task:calc"
system_prompt = "Solve the problem. You can run python. Give the answer in \\boxed{}."
tools = ("python",)
format = "hermes"
rewards = ("correct",)
steps = 40
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 256
max_new_tokens = 32
max_turns = 3
learning_rate = 3e-4
