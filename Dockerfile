# nanotool in a container, for CPUs: `make demo`, or a trained model as an endpoint.
#
#   docker build -t nanotool .
#   docker run --rm -v "$PWD/out:/nanotool/out" nanotool
#   docker run --rm -v "$PWD/out:/nanotool/out" -p 127.0.0.1:8000:8000 nanotool \
#     .venv/bin/python -m serve.agent --run=out/calc --host=0.0.0.0
#
# It runs as root of the container: then what a model writes runs as another user, without more
# rights for docker (docs/tools.md, the sandbox).
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /nanotool

# packages first: they are installed again only when pyproject.toml changes. For GPUs:
# --build-arg INDEX=https://pypi.org/simple, and docker run --gpus all
ARG INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE Makefile ./
RUN python -m venv .venv && .venv/bin/pip install --quiet --index-url "$INDEX" "torch>=2.11,<2.14"
RUN make .venv/installed && .venv/bin/pip install --quiet -e ".[mcp]"

COPY . .
EXPOSE 8000
CMD ["make", "demo"]
