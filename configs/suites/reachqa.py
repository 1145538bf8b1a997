# ReachQA, 2000 questions of its test split. Published figures are by a judge, too.
data = "hewei2001/ReachQA"
prompt_column = "question"
answer_column = "answer"
rewards = ("relaxed",)
