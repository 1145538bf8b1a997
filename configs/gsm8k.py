# 1x24 GB GPU, hours; not run here. Published, without a tool: 49.6 -> 54.3 % (verl, LoRA).
# Evaluation runs anywhere. A warm start first: sft_gsm8k.py, then --model=out/gsm8k_sft.
out_dir = "out/gsm8k"
model = "Qwen/Qwen2.5-0.5B-Instruct"
data = "openai/gsm8k:main"  # or a file with the same columns: --data=gsm8k_test.jsonl
prompt_column = "question"
answer_column = "answer"
answer_after = "####"
system_prompt = (
    "Solve the problem step by step. Use the python tool for every calculation, and put the final "
    "answer, a number, in \\boxed{}."
)
tools = ("python",)
rewards = ("correct",)
steps = 200
prompts_per_step = 32
group_size = 8
max_tokens = 2048
max_new_tokens = 512
max_turns = 4
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
token_budget = 8192  # 16384 take 37 GiB
