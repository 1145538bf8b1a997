# 1x80 GB GPU, a day; not run here. Without a tool 84.0 % (relaxed, from its makers' report).
# python evaluate.py --run=out/chartqa
out_dir = "out/chartqa"
model = "Qwen/Qwen2.5-VL-3B-Instruct"
data = "HuggingFaceM4/ChartQA"  # image, query, label (a list); lmms-lab/ChartQA: question, answer
prompt_column = "query"
answer_column = "label"
system_prompt = (
    "Answer the question about the chart. Zoom into what is too small to be read. Think it over, "
    "then put the final answer, a number or a few words, in \\boxed{}."
)
tools = ("zoom", "draw_horizontal", "draw_vertical")
tool_options = (
    "zoom.side=560",
    "zoom.coordinates=pixels",  # what Qwen2.5-VL was trained on
    "draw_horizontal.coordinates=pixels",
    "draw_vertical.coordinates=pixels",
)
format = "json_actions"  # Qwen2.5-VL's template knows no tools
max_pixels = 602112  # 768 tokens an image
rewards = ("relaxed", "format:0.1", "repeated_calls:0.5")
steps = 200
prompts_per_step = 32
group_size = 8
max_tokens = 6144
max_new_tokens = 512
max_turns = 4
dynamic_sampling = "relaxed"
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
