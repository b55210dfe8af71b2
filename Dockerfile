# histossl with all that it needs, on the CPU; for a GPU name the index of torch's CUDA builds:
#
#   docker build -t histossl .
#   docker build -t histossl:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm --user "$(id -u):$(id -g)" -v /data/slides:/slides:ro -v "$PWD/out:/out" histossl run /slides --out /out/study
#
# For CUDA add `--gpus all` to docker run.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
RUN python -m venv /opt/histossl
COPY constraints.txt ./
RUN torch="$(grep -m1 '^torch==' constraints.txt)" \
    && /opt/histossl/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$torch"
COPY pyproject.toml README.md LICENSE NOTICE CHANGELOG.md ./
COPY .ci .ci
COPY src src
RUN /opt/histossl/bin/pip install --no-cache-dir -c constraints.txt ".[nuclei]"

FROM python:3.11-slim
COPY --from=build /opt/histossl /opt/histossl
# Caches of numba, matplotlib and torch.hub: any user may run the image, and none has a home in it.
ENV PATH=/opt/histossl/bin:$PATH HOME=/tmp PYTHONUTF8=1
WORKDIR /out
RUN histossl doctor
ENTRYPOINT ["histossl"]
CMD ["--help"]
