# ChartQA, 2500 questions of its test split: image, query, label (a list).
data = "HuggingFaceM4/ChartQA"
prompt_column = "query"
answer_column = "label"
rewards = ("relaxed",)
