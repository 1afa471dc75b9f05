# lmc_dist for CUDA.
#
#   docker build -t lmc_dist .
#   docker run --rm --gpus all lmc_dist lmc doctor
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/data" -v "$PWD/runs:/work/runs" lmc_dist \
#       torchrun --standalone --nproc_per_node 8 launch/train.py --config configs/tofu.yaml --data.path /data/tofu ...
#
# --ipc=host: NCCL and data loaders need more shared memory than a container has by itself.

# With a compiler for CUDA (devel), since DeepSpeed builds its own operators where they are used; its release then has to be
# that of torch (`python -c "import torch; print(torch.version.cuda)"`). With torch's optimizers nothing is built.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git g++ ninja-build openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}
RUN python3 -m venv ${VIRTUAL_ENV}

WORKDIR /work
# torch by itself, before the source: this layer is the large one and seldom changes
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY README.md LICENSE pyproject.toml setup.py ./
COPY lmc_dist ./lmc_dist
RUN pip install --no-cache-dir --use-pep517 -c constraints.txt '.[audit,evaluate,report,wandb]'
COPY launch ./launch
COPY configs ./configs
COPY examples ./examples

ENV TOKENIZERS_PARALLELISM=false
CMD ["lmc", "--help"]
