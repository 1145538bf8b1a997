# 1x80 GB GPU, days; not run here. Pixel Reasoner (arXiv:2505.15966), from this 7B by SFT and RL:
# 84 % on V*, 74 on TallyQA-Complex, 84 on InfographicsVQA (theirs). Its rows name files: unpack
# images.zip and videos.zip in pixel_reasoner/, and give select_frames its column, `clip`:
# import pandas
# rows = pandas.read_parquet("pixel_reasoner/release.parquet")
# rows["clip"] = rows["image"].where(rows["is_video"])
# rows["image"] = rows["image"].mask(rows["is_video"])
# rows.to_parquet("pixel_reasoner/rows.parquet")
out_dir = "out/pixel_reasoner"
model = "Qwen/Qwen2.5-VL-7B-Instruct"
data = "pixel_reasoner/rows.parquet"  # question, answer (a list), image or clip (lists of files)
prompt_column = "question"
answer_column = "answer"
system_prompt = (
    "Answer the question about the image, or about the clip, whose frames you may select. Look "
    "closer at what you are not sure of. Put the final answer in \\boxed{}."
)
tools = ("zoom", "select_frames")
tool_options = (
    "zoom.coordinates=pixels",  # what Qwen2.5-VL was trained on
    "select_frames.folder=pixel_reasoner",
)
format = "json_actions"  # Qwen2.5-VL's template knows no tools
max_pixels = 1003520  # 1280 tokens an image
# theirs: looking is paid for while fewer than 0.3 of a group do, and costs from the second time on
rewards = ("correct", "curiosity:0.5", "redundancy:0.05")
steps = 200
prompts_per_step = 32
group_size = 8
max_tokens = 16384
max_new_tokens = 1024
max_turns = 5
dynamic_sampling = "correct"
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
token_budget = 32768
