# 2-core CPU, about 1 minute. A tiny model from scratch learns the form; greedy accuracy about 0.4.
out_dir = "out/calc_sft"
model = "tiny"
data = "task:calc"
rows = 14000
system_prompt = "Solve the problem. You can run python. Give the answer in \\boxed{}."
tools = ("python",)
format = "hermes"
batch_size = 32
learning_rate = 3e-3
schedule = "linear"
