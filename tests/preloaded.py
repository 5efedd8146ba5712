"""Imported once by the process that the tests fork their commands from."""
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import milvus_lite.adapter.grpc.servicer  # noqa: F401
import numba
import pyarrow.parquet  # noqa: F401
import pymilvus  # noqa: F401
import sentence_transformers  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401

numba.njit('int64(int64)')(lambda number: number)  # imports what numba imports when it first compiles
