# 1x80 GB GPU, days; not run here. AIME24 with this model: ToRL 26.7 %, verl-tool 33.3 %.
# ToRL with --model=Qwen/Qwen2.5-Math-7B (arXiv:2503.23383): 43.3 %.
# A base model without a tool template: code in ```python, its result in ```output, in one turn.
out_dir = "out/math_tir"
model = "Qwen/Qwen2.5-Math-1.5B"
engine = "vllm"
data = "zwhe99/DeepMath-103K"
prompt_column = "question"
answer_column = "final_answer"
system_prompt = (
    "Reason step by step and write python code where it helps; its output follows it. Put the "
    "final answer in \\boxed{}."
)
tools = ("python",)
format = "fence"
rewards = ("correct",)
steps = 300
prompts_per_step = 128
group_size = 16
max_tokens = 4096  # all that Qwen2.5-Math has
max_new_tokens = 3072
max_turns = 4
max_observation_tokens = 256
dynamic_sampling = "correct"
learning_rate = 1e-6
dtype = "mixed"
gradient_checkpointing = True
