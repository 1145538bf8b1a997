# 2-core CPU, about 1 minute. GRPO from out/shop_sft: held-out accuracy 0.3 -> 0.99 - 1.00.
out_dir = "out/shop"
model = "out/shop_sft"
data = "task:shop"
system_prompt = "Answer the question. You can ask the database. Give the answer in \\boxed{}."
tools = ("sql",)
format = "hermes"
rewards = ("correct",)
steps = 40
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 256
max_new_tokens = 48
max_turns = 3
learning_rate = 3e-4
