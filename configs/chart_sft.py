# 2-core CPU, about 1 minute. A tiny model from scratch learns to point, to read; then the form.
out_dir = "out/chart_sft"
model = "tiny"
whole_names = True
data = "task:chart"
rows = 6400
shuffle = False  # its demonstrations begin with lessons
system_prompt = "Answer the question. You can zoom in. Give the answer in \\boxed{}."
tools = ("zoom",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 5e-3
tower_share = 0.2
schedule = "linear"
