# 2-core CPU, about 2 minutes. GRPO from out/mix_sft, on three tasks at once, each with its own
# rows, prompt and tools: 0.30 -> 0.95 (calc), 0.94 (facts), 1.00 (shop).
out_dir = "out/mix"
mix = ("calc.py", "facts.py", "shop.py")  # each with :weight, else 1
model = "out/mix_sft"
steps = 60
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 256
learning_rate = 3e-4
