# 2-core CPU, 2 minutes. GRPO from out/chart_sft: held-out accuracy, sampled, 0.4 -> 0.92 - 0.97.
out_dir = "out/chart"
model = "out/chart_sft"
data = "task:chart"
system_prompt = "Answer the question. You can zoom in. Give the answer in \\boxed{}."
tools = ("zoom",)
tool_options = ("zoom.side=32",)  # a tile as it is: as many pixels as this model is shown
format = "hermes"
rewards = ("correct",)
steps = 32
token_budget = 8192
prompts_per_step = 16
group_size = 8
max_tokens = 256
max_new_tokens = 48
max_turns = 3
learning_rate = 5e-4
schedule = "linear"
