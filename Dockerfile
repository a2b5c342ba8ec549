# The book at the size of a laptop:
#
#   docker build -t sparsity-trap .
#   docker run --rm -v "$PWD/results:/sparsity-trap/results" -v "$PWD/_build:/sparsity-trap/_build" sparsity-trap
#
# Without a GPU: torch comes without CUDA here.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /sparsity-trap

# What the environment is made from comes first, so that other changes do not install it again.
COPY Makefile pyproject.toml requirements.lock.txt README.md ./
COPY sparsity_trap sparsity_trap
RUN make env

COPY . .
CMD ["make", "book", "PRESET=laptop"]
