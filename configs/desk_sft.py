# 2-core CPU, about 3 minutes. A tiny model from scratch learns the form; accuracy 0.3.
out_dir = "out/desk_sft"
model = "tiny"
whole_names = True
data = "task:desk"
rows = 14400
system_prompt = "Help the customer. Ask for what you do not know."
tools = ("tasks/desk.py:Desk",)
format = "hermes"
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
