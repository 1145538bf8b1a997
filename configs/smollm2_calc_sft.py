# 2-core CPU, 1.3 minutes. SmolLM2-135M-Instruct (`make real` fetches it) learns the form of a call
# by LoRA, from 64 imperfect demonstrations; sampled accuracy 0.00 -> about 0.3.
out_dir = "out/smollm2_calc_sft"
model = "out/smollm2"
tune = "lora"
lora_r = 16
lora_alpha = 32
data = "task:calc"
rows = 64
system_prompt = "Give the answer in \\boxed{}."
tools = ("python",)
format = "fence"
batch_size = 16
token_budget = 4096
learning_rate = 1e-3
schedule = "linear"
warmup = 1
