# 2-core CPU, about 1 minute. A tiny model from scratch learns the form; greedy accuracy 0.3.
out_dir = "out/shop_sft"
model = "tiny"
whole_names = True
data = "task:shop"
rows = 9600
system_prompt = "Answer the question. You can ask the database. Give the answer in \\boxed{}."
tools = ("sql",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
