# 2-core CPU, about 2 minutes. A tiny model from scratch learns three tasks at once.
out_dir = "out/mix_sft"
mix = ("calc_sft.py", "facts_sft.py", "shop_sft.py")
model = "tiny"
whole_names = True
batch_size = 32
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
