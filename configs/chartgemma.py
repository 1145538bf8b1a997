# 1x80 GB GPU, days; not run here. OpenThinkIMG's V-ToolRL, from this model on ChartGemma: 29.6 %,
# 45.7 after SFT, 59.4 after RL (theirs). A warm start: sft_chart.py, then --model=out/chart_vl.
# ChartGemma also has summaries and programs; its questions with short answers:
# from datasets import load_dataset
# rows = load_dataset("ahmed-masry/ChartGemma", split="train")
# rows.filter(lambda row: len(row["output"].split()) < 4).to_parquet("chartgemma.parquet")
# They also have ocr (it needs tesseract), point and segment (by python -m serve.tools).
out_dir = "out/chartgemma"
model = "Qwen/Qwen2-VL-2B-Instruct"
data = "chartgemma.parquet"  # image, input, output
prompt_column = "input"
answer_column = "output"
system_prompt = (
    "Answer the question about the chart. Look closer, or draw lines, where that helps to read it. "
    "Put the final answer, a number or a few words, in \\boxed{}."
)
tools = ("zoom", "subfigure", "draw_horizontal", "draw_vertical")
tool_options = ("zoom.side=560",)
format = "json_actions"  # Qwen2-VL's template knows no tools
max_pixels = 602112  # 768 tokens an image
rewards = ("relaxed", "format:0.1", "repeated_calls:0.5")
steps = 200
prompts_per_step = 32
group_size = 8
max_tokens = 6144
max_new_tokens = 512
max_turns = 4
learning_rate = 1e-6
dtype = "mixed"
gradient_checkpointing = True
