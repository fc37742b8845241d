# The search page, on the CPU and without root: docs/serving.md says how to run it.
#     docker build -t image-search .
FROM python:3.12-slim

WORKDIR /app
COPY requirements.txt requirements-serve.txt ./
# PyTorch's own index has builds without CUDA, which are a tenth of the size.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements-serve.txt

COPY serve.py model.py recipes.py utils.py ./
COPY common ./common
COPY imagedata ./imagedata
COPY retrieval ./retrieval
COPY serving ./serving
COPY templates ./templates

# The model file holds the weights, so nothing is downloaded; no file is written.
ENV HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
CMD ["--data_base", "/collection/museum.pth"]
