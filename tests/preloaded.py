"""Imported once by the process that the tests fork their commands from."""
import pymilvus  # noqa: F401
import sentence_transformers  # noqa: F401
import torch._dynamo  # noqa: F401
