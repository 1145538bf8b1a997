# 2-core CPU, 8 minutes on a busy one. GRPO from out/mix_sft, on three tasks at once, each with its
# own rows, prompt, tools and kind of reward (right answer, exact match, final state): 0.31 -> 0.99.
out_dir = "out/mix"
mix = ("calc.py", "facts.py", "desk.py")  # each with :weight, else 1
model = "out/mix_sft"
steps = 60
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 48  # 960 of each source, as many as calc.py and facts.py have by themselves
group_size = 8
max_tokens = 384
learning_rate = 3e-4
