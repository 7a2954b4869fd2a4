# Not built on the machine that this was written on, which has no Docker. CUDA and cuDNN come with torch's wheels; the
# image needs what lets a driver in.
#   docker build -t dreambooth .
#   docker run --gpus all --ipc=host -v "$PWD/photos:/photos" -v "$PWD/model:/app/model" -v "$PWD/out:/out" \
#     -e INSTANCE_DIR=/photos -e OUTPUT_DIR=/out/model -e RESULT_DIR=/out/result dreambooth
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt setup.sh ./
RUN bash setup.sh
COPY . .
ENTRYPOINT ["bash", "run.sh"]
