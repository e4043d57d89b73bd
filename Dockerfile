# Build: docker build -t overture .
# Run:   docker run --rm --name overture-run --gpus all --shm-size 8g \
#          --user "$(id -u):$(id -g)" -e USER -e HOME=/tmp -e HF_TOKEN -e HF_HOME=/hf \
#          -v "$HOME/.cache/huggingface:/hf" -v "$PWD/data:/overture/data" -v "$PWD/runs:/overture/runs" \
#          overture composer finetune.py yamls/finetune/dolly-llama-3.2-1b.yaml
# torch's wheels carry CUDA 12.6 themselves; the base gives the driver hooks and the compilers that
# flash-attn (where no wheel fits) and torch.compile need. --build-arg GPU=0 leaves out flash-attn,
# liger-kernel and bitsandbytes; attention on CUDA then takes the varlen kernel that torch carries.
# For Blackwell: --build-arg PINS=requirements-torch2.11.txt --build-arg GPU=0 (CUDA 13, which the base has not).
# This image has not been built where the kit is developed. Of its CUDA kernels torch's own have run, on an
# H100 with torch 2.11, as have bitsandbytes and liger-kernel (which benchmarks alone use); flash-attn has not.
FROM nvidia/cuda:12.6.3-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc g++ git make \
 && rm -rf /var/lib/apt/lists/*

# The code belongs to root and cannot be changed from inside; data/ and runs/ are the user's.
WORKDIR /overture
COPY requirements.txt requirements-torch2.11.txt requirements-uv.txt requirements-gpu.txt ./
ARG GPU=1
ARG PINS=requirements.txt
# Every file is held against its hash, but for the GPU packages and what they build with.
# Compiled modules: without them importing Composer takes more than twice as long.
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --require-hashes -r requirements-uv.txt \
 && export UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/venv \
 && /opt/venv/bin/uv pip install --require-hashes --no-deps -r "$PINS" \
 && if [ "$GPU" = 1 ]; then /opt/venv/bin/uv pip install wheel ninja \
      && /opt/venv/bin/uv pip install --no-build-isolation -r requirements-gpu.txt; fi
COPY . .
RUN useradd --create-home overture \
 && mkdir -p data runs \
 && chown overture data runs

USER overture
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "src/check_setup.py"]
