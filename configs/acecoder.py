# 1x80 GB GPU, a day; not run here. AceCoder (arXiv:2502.01718), from Qwen2.5-Coder-7B:
# 80 steps of RL add over 25 points on HumanEval-plus and 6 on MBPP-plus.
out_dir = "out/acecoder"
model = "Qwen/Qwen2.5-Coder-7B-Instruct"
engine = "vllm"
data = "TIGER-Lab/AceCode-87K"
prompt_column = "question"
answer_column = "test_cases"
reward_options = ("code_tests.column=test_cases",)
system_prompt = (
    "Write a python program that solves the task. Try it with the python tool. Then write the "
    "whole of it in a ```python block."
)
tools = ("python",)
format = "hermes"
rewards = ("code_tests",)
steps = 80
prompts_per_step = 64
group_size = 8
max_tokens = 6144
max_new_tokens = 2048
max_turns = 4
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
gradient_checkpointing = True  # else a pass keeps 150 GiB
