# 2-core CPU, about 1 minute. A tiny model from scratch learns the form; greedy accuracy 0.3.
out_dir = "out/facts_sft"
model = "tiny"
whole_names = True
data = "task:facts"
rows = 14400
system_prompt = "Answer the question. You can search. Give the answer in \\boxed{}."
tools = ("search",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
