# 2-core CPU, about 1 minute. GRPO from out/facts_sft: held-out accuracy 0.3 -> 0.96 - 1.00.
out_dir = "out/facts"
model = "out/facts_sft"
data = "task:facts"
system_prompt = "Answer the question. You can search. Give the answer in \\boxed{}."
tools = ("search",)
tool_options = ("search.corpus=task:facts", "search.k=1")  # needs .[search]
format = "hermes"
rewards = ("exact_match",)
steps = 40
token_budget = 4096  # on a CPU, what fits its caches is fastest
prompts_per_step = 24
group_size = 8
max_tokens = 256
max_new_tokens = 32
max_turns = 3
learning_rate = 3e-4
