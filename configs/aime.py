# 1x80 GB GPU, days; not run here. AIME24 40.0 % with this 7B: verl's, after SFT too.
# A warm start first: sft_aime.py, then --model=out/aime_sft. From 0.5B on 24 GB (--model=
# Qwen/Qwen2.5-0.5B-Instruct) to 7B; evaluate with
# python evaluate.py --run=out/aime --data=aime24.jsonl --prompt_column=problem
#     --answer_column=answer --n=32 --k=1,8 --temperature=1
out_dir = "out/aime"
model = "Qwen/Qwen2.5-7B-Instruct"
engine = "vllm"
data = "zwhe99/DeepMath-103K"
prompt_column = "question"
answer_column = "final_answer"
system_prompt = (
    "Solve the problem step by step. Use the python tool to compute and to check: numpy and sympy "
    "are there. Put the final answer in \\boxed{}."
)
tools = ("python",)
format = "hermes"
rewards = ("correct",)
steps = 400
prompts_per_step = 64
group_size = 16
max_tokens = 10240
max_new_tokens = 3072
max_turns = 6
overlong = "mask"  # what a limit cut short says nothing about the problem
dynamic_sampling = "correct"
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
gradient_checkpointing = True  # else a pass keeps 150 GiB
