# 1x24 GB GPU, hours. Qwen2.5-0.5B-Instruct with python; not run here. Evaluation runs anywhere.
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
