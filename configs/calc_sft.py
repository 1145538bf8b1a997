# 2-core CPU, about 1 minute. A tiny model from scratch learns the form; greedy accuracy about 0.3.
out_dir = "out/calc_sft"
model = "tiny"
data = "task:calc"
rows = 9600
system_prompt = "Solve the problem. You can run python. Give the answer in \\boxed{}."
tools = ("python",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
