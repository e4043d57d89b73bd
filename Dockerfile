# Build: docker build -t overture .
# Run:   docker run --rm --gpus all --shm-size 8g -e HF_TOKEN -v "$PWD/data:/overture/data" \
#          -v "$PWD/runs:/overture/runs" -v "$HOME/.cache/huggingface:/home/overture/.cache/huggingface" \
#          overture composer finetune.py yamls/finetune/dolly-llama-3.2-1b.yaml
# torch's wheels carry CUDA 12.6 themselves; the base gives the driver hooks and a compiler.
# This image has not been built where the kit is developed.
FROM nvidia/cuda:12.6.3-base-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc g++ git make \
 && rm -rf /var/lib/apt/lists/*

# The code belongs to root and cannot be changed from inside; data/ and runs/ are the user's.
WORKDIR /overture
COPY requirements.txt ./
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir uv \
 && /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python -r requirements.txt
COPY . .
RUN useradd --create-home overture \
 && mkdir -p data runs \
 && chown overture data runs

USER overture
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "src/check_setup.py"]
