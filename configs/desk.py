# 2-core CPU, about 3 minutes. GRPO from out/desk_sft: held-out accuracy 0.3 -> 1.00.
out_dir = "out/desk"
model = "out/desk_sft"
data = "task:desk"
system_prompt = "Help the customer. Ask for what you do not know."
tools = ("tasks/desk.py:Desk",)
format = "hermes"
rewards = ("environment",)
steps = 30
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 384
max_new_tokens = 48
max_turns = 8
learning_rate = 3e-4
