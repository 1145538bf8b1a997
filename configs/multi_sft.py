# 2-core CPU, about 1.5 minutes. A tiny model from scratch learns the form; greedy accuracy 0.3.
out_dir = "out/multi_sft"
model = "tiny"
whole_names = True
data = "task:multi"
rows = 19200
system_prompt = "Choose the tool that the question needs. Give the answer in \\boxed{}."
tools = ("python", "search", "sql")
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
