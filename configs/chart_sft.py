# Being built: reading is learnt in 150 updates, pointing is not (docs/vision.md).
out_dir = "out/chart_sft"
model = "tiny"
whole_names = True
data = "task:chart"
rows = 12800
system_prompt = "Answer the question. You can zoom in. Give the answer in \\boxed{}."
tools = ("zoom",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 5e-3
schedule = "linear"
