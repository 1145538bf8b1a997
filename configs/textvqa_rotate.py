# 1x80 GB GPU, a day; not run here. After RL-Factory's recipe: TextVQA with pictures that stand on
# their side or head, and a tool that turns them. No figure of theirs is known to us. The rows:
# from datasets import load_dataset
# def turned(row, number):
#     return {"image": row["image"].convert("RGB").rotate(90 * (number % 4), expand=True)}
# rows = load_dataset("lmms-lab/textvqa", split="train").map(turned, with_indices=True)
# rows.to_parquet("textvqa_turned.parquet")
out_dir = "out/textvqa_rotate"
model = "Qwen/Qwen2.5-VL-3B-Instruct"
data = "textvqa_turned.parquet"  # image, question, answers (of ten people)
prompt_column = "question"
answer_column = "answers"
system_prompt = (
    "Answer the question about the image in a few words. Where it stands on its side or on its "
    "head, turn it first. Put the final answer in \\boxed{}."
)
tools = ("rotate",)
format = "json_actions"  # Qwen2.5-VL's template knows no tools
max_pixels = 602112  # 768 tokens an image
rewards = ("vqa", "format:0.1", "repeated_calls:0.5")
steps = 100
prompts_per_step = 32
group_size = 8
max_tokens = 4096
max_new_tokens = 256
max_turns = 4
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
