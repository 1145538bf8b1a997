# 2-core CPU, about 1.2 minutes. GRPO from out/multi_sft: held-out accuracy 0.3 -> 0.94 - 1.00.
out_dir = "out/multi"
model = "out/multi_sft"
data = "task:multi"
system_prompt = "Choose the tool that the question needs. Give the answer in \\boxed{}."
tools = ("python", "search", "sql")
tool_options = ("search.corpus=task:facts", "search.k=1")  # needs .[search]
format = "hermes"
rewards = ("correct", "tasks/multi.py:right_tool:0")  # weight 0: right_tool is only logged
steps = 60
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 256
max_new_tokens = 48
max_turns = 4
learning_rate = 3e-4
