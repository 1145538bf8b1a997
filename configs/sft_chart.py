# 1x80 GB GPU, hours; not run here. A warm start for chartgemma.py, on a stronger model's right
# rollouts with the same tools, images and all:
# python evaluate.py --config chartgemma.py --model=Qwen/Qwen2-VL-7B-Instruct --limit=2000
#     --n=4 --temperature=1 --save_to=out/chart_teacher
# or on rows with `conversations` and `images`, as OpenThinkIMG and LLaMA-Factory have them.
out_dir = "out/chart_vl"
model = "Qwen/Qwen2-VL-2B-Instruct"
data = "out/chart_teacher/rollouts.jsonl"
min_reward = 1.0
val_rows = 64
tools = ("zoom", "subfigure", "draw_horizontal", "draw_vertical")
format = "json_actions"
max_pixels = 602112
max_tokens = 6144
epochs = 2
batch_size = 32
gradient_checkpointing = True
learning_rate = 1e-5
dtype = "mixed"
