# 2-core CPU, 13 minutes on a busy one. A tiny model from scratch learns three tasks; accuracy 0.3.
out_dir = "out/mix_sft"
mix = ("calc_sft.py", "facts_sft.py", "desk_sft.py")
model = "tiny"
whole_names = True
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
