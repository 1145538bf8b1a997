# 2-core CPU, about 2 minutes. A tiny model from scratch learns to see, to point and to read.
out_dir = "out/chart_sft"
model = "tiny"
whole_names = True
data = "task:chart"
rows = 8000
system_prompt = "Answer the question. You can zoom in. Give the answer in \\boxed{}."
tools = ("zoom",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 5e-3
schedule = "linear"
