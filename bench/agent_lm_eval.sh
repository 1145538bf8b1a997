#!/bin/sh
# lm_eval, unchanged, through the agent endpoint, beside evaluate.py on the same 256 rows, greedy.
# Of a model that is right in part: what train_sft.py --config calc_sft.py made.
#     sh bench/agent_lm_eval.sh > evidence/bench/agent_lm_eval.txt
set -e
folder=$(mktemp -d)
.venv/bin/python -c "
import json
from tasks import calc
for row in calc.rows('test', seed=17, n=256):
    print(json.dumps({'prompt': row['prompt'], 'answer': row['answer']}))
" > "$folder/rows.jsonl"
cat > "$folder/calc_rows.yaml" <<TASK
task: calc_rows
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: "boxed\\\\{([^}]*)\\\\}", group_select: -1}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
TASK
port=$((20000 + $$ % 10000))
.venv/bin/python -m serve.agent --model=out/calc_sft --config calc.py --port=$port > "$folder/log" &
server=$!
trap 'kill $server; rm -r "$folder"' EXIT
until grep -q serving "$folder/log"; do sleep 1; done
python=$PWD/.venv/lm-eval/bin/python
url=http://127.0.0.1:$port/v1/chat/completions
echo "lm_eval:"
(cd "$folder" && OPENAI_API_KEY=none HF_HUB_OFFLINE=1 HF_HOME=$folder "$python" -m lm_eval run \
  --model local-chat-completions --model_args model=calc_sft,base_url=$url,num_concurrent=32 \
  --tasks calc_rows --include_path "$folder" --apply_chat_template 2> "$folder/errors") | grep "|"
echo "evaluate.py:"
.venv/bin/python evaluate.py --config calc.py --model=out/calc_sft --data="$folder/rows.jsonl" \
  --save_to="$folder/eval" | grep -E "problems|avg@1|accuracy"
